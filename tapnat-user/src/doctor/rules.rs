//! What the host's firewall has to do with guests, read from what `nft` and `iptables` print. Looks
//! for a few words; does not understand rules.

use std::net::IpAddr;

use dhcproto::v6::SERVER_PORT as DHCPV6_SERVER_PORT;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use smoltcp::wire::DHCP_SERVER_PORT;

use super::output;

/// A rule that translates source addresses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    /// As it was printed.
    pub text: String,
    /// The networks that it is for: those of everybody if that cannot be told.
    pub sources: Vec<IpNet>,
}

impl Rule {
    /// How to be rid of it.
    #[must_use]
    pub fn removal(&self) -> String {
        let tool = if self.sources.iter().all(|it| it.addr().is_ipv6()) {
            IP6TABLES
        } else {
            IPTABLES
        };
        match self.text.strip_prefix("-A ") {
            Some(rule) => format!("if it is not needed: {tool} -t nat -D {rule}"),
            None => {
                "if it is not needed: find its handle (`nft -a list ruleset`) and `nft delete rule`"
                    .to_owned()
            }
        }
    }
}

/// What the rules say of one IP version's packets for the host itself.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Incoming {
    /// They are dropped unless a rule accepts them.
    pub drops: bool,
    /// A rule is about the port of DHCP's servers.
    pub knows_dhcp: bool,
}

/// What matters of the rules.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Firewall {
    /// Whether the rules could be read at all.
    pub seen: bool,
    pub masquerades: Vec<Rule>,
    /// Forwarded packets are dropped unless a rule accepts them.
    pub drops_forwarded: bool,
    pub ipv4: Incoming,
    pub ipv6: Incoming,
    /// Programs that manage rules here.
    pub managers: Vec<&'static str>,
}

/// What in a program's rules gives it away.
const MANAGERS: [(&str, &str); 3] = [
    ("DOCKER", "Docker"),
    ("ufw-", "ufw"),
    ("firewalld", "firewalld"),
];

const NFT: &str = "nft";
pub(super) const IPTABLES: &str = "iptables";
pub(super) const IP6TABLES: &str = "ip6tables";

impl Firewall {
    /// Asks the programs that can print the rules. What `iptables-nft` made is among what `nft`
    /// prints.
    #[must_use]
    pub fn read() -> Self {
        let mut texts = Vec::new();
        let suffix = match output(NFT, &["--stateless", "list", "ruleset"]) {
            Ok(text) => {
                texts.push((NFT, text));
                "-legacy-save"
            }
            Err(_) => "-save",
        };
        for tool in [IPTABLES, IP6TABLES] {
            let said = output(&format!("{tool}{suffix}"), &[]);
            texts.extend(said.ok().map(|text| (tool, text)));
        }
        let texts: Vec<_> = texts
            .iter()
            .map(|(tool, text)| (*tool, text.as_str()))
            .collect();
        Self::of_texts(&texts)
    }

    /// Reads what these tools (`nft`, `iptables` or `ip6tables`) printed.
    #[must_use]
    pub fn of_texts(texts: &[(&str, &str)]) -> Self {
        let mut firewall = Self {
            seen: !texts.is_empty(),
            ..Self::default()
        };
        for (tool, text) in texts {
            let (mut hook, mut family) = ("", *tool);
            for line in text.lines().map(str::trim) {
                let words: Vec<_> = line.split_whitespace().collect();
                let (rule, drops_incoming) = if *tool == NFT {
                    if let Some(name) = after(&words, "hook") {
                        hook = name;
                    }
                    if let ["table", name, ..] = words.as_slice() {
                        family = name;
                    }
                    let drops = line.contains("policy drop");
                    firewall.drops_forwarded |= hook == "forward" && drops;
                    (nft_rule(line, family, &words), hook == "input" && drops)
                } else {
                    firewall.drops_forwarded |= line.starts_with(":FORWARD DROP");
                    (
                        iptables_rule(line, family, &words),
                        line.starts_with(":INPUT DROP"),
                    )
                };
                firewall.masquerades.extend(rule);
                for everybody in everybody(family) {
                    let (incoming, port, service) = match everybody {
                        IpNet::V4(_) => (&mut firewall.ipv4, DHCP_SERVER_PORT, "bootps"),
                        IpNet::V6(_) => (&mut firewall.ipv6, DHCPV6_SERVER_PORT, "dhcpv6-server"),
                    };
                    incoming.drops |= drops_incoming;
                    incoming.knows_dhcp |= is_about(line, port, service);
                }
                for (sign, manager) in MANAGERS {
                    if words.iter().any(|word| word.contains(sign))
                        && !firewall.managers.contains(&manager)
                    {
                        firewall.managers.push(manager);
                    }
                }
            }
        }
        firewall
    }
}

/// Whether a rule is about what goes to this port, alone or among others.
fn is_about(line: &str, port: u16, service: &str) -> bool {
    // So ufw keeps out of its log what it drops.
    if line.contains("skip-to-policy") {
        return false;
    }
    let Some((_, to)) = line.split_once("dport") else {
        return false;
    };
    let to = to.split_once("sport").map_or(to, |(to, _)| to);
    let mut words = to.split(|it: char| !it.is_ascii_alphanumeric());
    to.contains(service) || words.any(|word| word == port.to_string())
}

fn after<'a>(words: &[&'a str], word: &str) -> Option<&'a str> {
    let position = words.iter().position(|it| *it == word)?;
    words.get(position + 1).copied()
}

fn iptables_rule(line: &str, family: &str, words: &[&str]) -> Option<Rule> {
    if !["MASQUERADE", "SNAT"].contains(&after(words, "-j")?) {
        return None;
    }
    Some(Rule {
        text: line.to_owned(),
        sources: sources(words, "-s", family),
    })
}

fn nft_rule(line: &str, family: &str, words: &[&str]) -> Option<Rule> {
    let translates = words
        .iter()
        .any(|word| ["masquerade", "snat", "\"MASQUERADE\"", "\"SNAT\""].contains(word));
    let is_rule = !line.ends_with('{') && !line.starts_with("type ");
    (translates && is_rule).then(|| Rule {
        text: line.to_owned(),
        sources: sources(words, "saddr", family),
    })
}

/// The network that follows this word, unless it is the one that the rule is not for; else those of
/// all whom a table of this family is for.
fn sources(words: &[&str], word: &str, family: &str) -> Vec<IpNet> {
    source(words, word).map_or_else(|| everybody(family), |source| vec![source])
}

/// All whom a table of this family is for: a network for each IP version.
fn everybody(family: &str) -> Vec<IpNet> {
    let (ipv4, ipv6) = (Ipv4Net::default().into(), Ipv6Net::default().into());
    match family {
        "ip" | IPTABLES => vec![ipv4],
        "ip6" | IP6TABLES => vec![ipv6],
        _ => vec![ipv4, ipv6],
    }
}

fn source(words: &[&str], word: &str) -> Option<IpNet> {
    let position = words.iter().position(|it| *it == word)?;
    let negated_before = position
        .checked_sub(1)
        .and_then(|before| words.get(before))
        .is_some_and(|it| *it == "!");
    let value = words.get(position + 1)?;
    if negated_before || *value == "!=" {
        return None;
    }
    let address = value.parse::<IpAddr>().map(IpNet::from);
    value.parse().ok().or_else(|| address.ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_iptables() {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n\
                    *nat\n-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n\
                    -A POSTROUTING ! -s 10.0.0.0/8 -o eth0 -j MASQUERADE\n\
                    -A PREROUTING -j DNAT --to-destination 10.0.0.1\nCOMMIT\n";
        let firewall = Firewall::of_texts(&[("iptables", text)]);
        assert!(firewall.seen && firewall.drops_forwarded && !firewall.ipv4.drops);
        let text =
            ":INPUT DROP [0:0]\n-A INPUT -i tap0 -p udp -m multiport --dports 53,67 -j ACCEPT\n";
        let closed = Firewall::of_texts(&[("iptables", text)]);
        assert!(closed.ipv4.drops && closed.ipv4.knows_dhcp);
        assert_eq!(closed.ipv6, Incoming::default());
        assert_eq!(firewall.managers, ["Docker"]);
        assert_eq!(sources_of(&firewall), ["172.17.0.0/16", "0.0.0.0/0"]);
        assert!(
            firewall.masquerades[0]
                .removal()
                .contains("iptables -t nat -D POSTROUTING -s 172")
        );
        let text = "-A POSTROUTING -s fd00::/64 -j MASQUERADE\n-A POSTROUTING -j MASQUERADE\n";
        let firewall = Firewall::of_texts(&[("ip6tables", text)]);
        assert_eq!(sources_of(&firewall), ["fd00::/64", "::/0"]);
        let removal = firewall.masquerades[1].removal();
        assert!(
            removal.contains("ip6tables -t nat -D POSTROUTING"),
            "{removal}"
        );
    }

    fn sources_of(firewall: &Firewall) -> Vec<String> {
        let sources = firewall.masquerades.iter().flat_map(|it| &it.sources);
        sources.map(ToString::to_string).collect()
    }

    #[test]
    fn reads_nft() {
        let text = "table ip nat {\n\tchain POSTROUTING {\n\
                    \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
                    \t\tip saddr 192.168.122.5 oifname \"eth0\" masquerade\n\
                    \t\tip saddr != 10.0.0.0/8 snat to 192.0.2.1\n\
                    \t\toifname \"eth0\" counter packets 0 bytes 0 xt target \"MASQUERADE\"\n\t}\n}\n\
                    table ip6 nat {\n\tchain c {\n\t\tip6 saddr fd00::/64 masquerade\n\
                    \t\tmasquerade\n\t}\n}\n\
                    table inet firewalld {\n\tchain filter_FORWARD {\n\t\tmasquerade\n\
                    \t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        let firewall = Firewall::of_texts(&[("nft", text)]);
        assert!(firewall.drops_forwarded);
        assert_eq!(firewall.managers, ["firewalld"]);
        assert_eq!(
            sources_of(&firewall),
            [
                "192.168.122.5/32",
                "0.0.0.0/0",
                "0.0.0.0/0",
                "fd00::/64",
                "::/0",
                "0.0.0.0/0",
                "::/0"
            ]
        );
        let accepting = "chain c {\ntype filter hook input priority 0; policy drop;\n}\n\
                         chain d {\ntype filter hook forward priority 0; policy accept;\n}\n";
        let firewall = Firewall::of_texts(&[("nft", accepting)]);
        let closed = Incoming {
            drops: true,
            knows_dhcp: false,
        };
        assert!(!firewall.drops_forwarded);
        assert_eq!((firewall.ipv4, firewall.ipv6), (closed, closed));
        let rule = "iifname \"tap0\" udp dport { 53, 67 } accept";
        assert!(Firewall::of_texts(&[("nft", rule)]).ipv4.knows_dhcp);
        assert!(!Firewall::of_texts(&[]).seen);
    }
    #[test]
    fn what_a_manager_does_for_itself_lets_no_guest_in() {
        let knows = |tool, text: &str| {
            let Firewall { ipv4, ipv6, .. } = Firewall::of_texts(&[(tool, text)]);
            (ipv4.knows_dhcp, ipv6.knows_dhcp)
        };
        // The host as a client of DHCP, and what goes unlogged, as ufw has them.
        let ipv4 = "-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT\n\
                    -A ufw-after-input -p udp -m udp --dport 67 -j ufw-skip-to-policy-input\n";
        assert_eq!(knows("iptables", ipv4), (false, false));
        let ipv6 = "-A ufw6-before-input -s fe80::/10 -d fe80::/10 -p udp -m udp --sport 547 --dport 546 \
                    -j ACCEPT\n\
                    -A ufw6-after-input -p udp -m udp --dport 547 -j ufw6-skip-to-policy-input\n";
        assert_eq!(knows("ip6tables", ipv6), (false, false));
        let nft = "table inet firewalld {\nip6 daddr fe80::/64 udp dport 546 accept\n\
                   udp dport 68 udp sport 67 accept\n}\n";
        assert_eq!(knows("nft", nft), (false, false));
        // As `ufw allow in on tap0 proto udp to any port 53,67` and firewalld's service have them.
        let allowed = "-A ufw-user-input -i tap0 -p udp -m multiport --dports 53,67 -j ACCEPT\n";
        assert_eq!(knows("iptables", allowed), (true, false));
        let allowed = allowed.replace("67", "547").replace("ufw", "ufw6");
        assert_eq!(knows("ip6tables", &allowed), (false, true));
        let services =
            "table inet firewalld {\nudp dport 67 accept\nudp dport dhcpv6-server accept\n}\n";
        assert_eq!(knows("nft", services), (true, true));
    }
}
