//! What the host's firewall has to do with guests, read from what `nft` and `iptables` print. Looks
//! for a few words; does not understand rules.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::output;

/// A rule that translates source addresses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    /// As it was printed.
    pub text: String,
    /// The network that it is for; none if it is for everybody, or if that cannot be told.
    pub source: Option<Ipv4Net>,
}

impl Rule {
    /// How to be rid of it.
    #[must_use]
    pub fn removal(&self) -> String {
        match self.text.strip_prefix("-A ") {
            Some(rule) => format!("if it is not needed: iptables -t nat -D {rule}"),
            None => {
                "if it is not needed: find its handle (`nft -a list ruleset`) and `nft delete rule`"
                    .to_owned()
            }
        }
    }
}

/// What matters of the rules.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Firewall {
    /// Whether the rules could be read at all.
    pub seen: bool,
    pub masquerades: Vec<Rule>,
    /// Forwarded packets are dropped unless a rule accepts them.
    pub drops_forwarded: bool,
    /// Programs that manage rules here.
    pub managers: Vec<&'static str>,
}

/// What in a program's rules gives it away.
const MANAGERS: [(&str, &str); 3] = [
    ("DOCKER", "Docker"),
    ("ufw-", "ufw"),
    ("firewalld", "firewalld"),
];

impl Firewall {
    /// Asks the programs that can print the rules. What `iptables-nft` made is among what `nft`
    /// prints.
    #[must_use]
    pub fn read() -> Self {
        let mut texts = Vec::new();
        if let Ok(text) = output("nft", &["--stateless", "list", "ruleset"]) {
            texts.push(("nft", text));
            texts.extend(
                output("iptables-legacy-save", &[])
                    .ok()
                    .map(|text| ("iptables", text)),
            );
        } else if let Ok(text) = output("iptables-save", &[]) {
            texts.push(("iptables", text));
        }
        let texts: Vec<_> = texts
            .iter()
            .map(|(tool, text)| (*tool, text.as_str()))
            .collect();
        Self::of_texts(&texts)
    }

    /// Reads what these tools (`nft` or `iptables`) printed.
    #[must_use]
    pub fn of_texts(texts: &[(&str, &str)]) -> Self {
        let mut firewall = Self {
            seen: !texts.is_empty(),
            ..Self::default()
        };
        for (tool, text) in texts {
            let mut hook = "";
            for line in text.lines().map(str::trim) {
                let words: Vec<_> = line.split_whitespace().collect();
                let rule = if *tool == "nft" {
                    if let Some(name) = after(&words, "hook") {
                        hook = name;
                    }
                    firewall.drops_forwarded |= hook == "forward" && line.contains("policy drop");
                    nft_rule(line, &words)
                } else {
                    firewall.drops_forwarded |= line.starts_with(":FORWARD DROP");
                    iptables_rule(line, &words)
                };
                firewall.masquerades.extend(rule);
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

fn after<'a>(words: &[&'a str], word: &str) -> Option<&'a str> {
    let position = words.iter().position(|it| *it == word)?;
    words.get(position + 1).copied()
}

fn iptables_rule(line: &str, words: &[&str]) -> Option<Rule> {
    if !["MASQUERADE", "SNAT"].contains(&after(words, "-j")?) {
        return None;
    }
    Some(Rule {
        text: line.to_owned(),
        source: source(words, "-s"),
    })
}

fn nft_rule(line: &str, words: &[&str]) -> Option<Rule> {
    let translates = words
        .iter()
        .any(|word| ["masquerade", "snat", "\"MASQUERADE\"", "\"SNAT\""].contains(word));
    let is_rule = !line.ends_with('{') && !line.starts_with("type ");
    (translates && is_rule).then(|| Rule {
        text: line.to_owned(),
        source: source(words, "saddr"),
    })
}

/// The network that follows this word, unless it is the one that the rule is not for.
fn source(words: &[&str], word: &str) -> Option<Ipv4Net> {
    let position = words.iter().position(|it| *it == word)?;
    let negated_before = position
        .checked_sub(1)
        .and_then(|before| words.get(before))
        .is_some_and(|it| *it == "!");
    let value = words.get(position + 1)?;
    if negated_before || *value == "!=" {
        return None;
    }
    let address = value.parse::<Ipv4Addr>().map(Ipv4Net::from);
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
        assert!(firewall.seen && firewall.drops_forwarded);
        assert_eq!(firewall.managers, ["Docker"]);
        let sources: Vec<_> = firewall.masquerades.iter().map(|it| it.source).collect();
        assert_eq!(sources, [Some("172.17.0.0/16".parse().unwrap()), None]);
        assert!(
            firewall.masquerades[0]
                .removal()
                .contains("-t nat -D POSTROUTING -s 172")
        );
    }

    #[test]
    fn reads_nft() {
        let text = "table ip nat {\n\tchain POSTROUTING {\n\
                    \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
                    \t\tip saddr 192.168.122.5 oifname \"eth0\" masquerade\n\
                    \t\tip saddr != 10.0.0.0/8 snat to 192.0.2.1\n\
                    \t\toifname \"eth0\" counter packets 0 bytes 0 xt target \"MASQUERADE\"\n\t}\n}\n\
                    table inet firewalld {\n\tchain filter_FORWARD {\n\
                    \t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        let firewall = Firewall::of_texts(&[("nft", text)]);
        assert!(firewall.drops_forwarded);
        assert_eq!(firewall.managers, ["firewalld"]);
        let sources: Vec<_> = firewall.masquerades.iter().map(|it| it.source).collect();
        let one = Ipv4Net::from(Ipv4Addr::new(192, 168, 122, 5));
        assert_eq!(sources, [Some(one), None, None]);
        let accepting = "chain c {\ntype filter hook input priority 0; policy drop;\n}\n\
                         chain d {\ntype filter hook forward priority 0; policy accept;\n}\n";
        assert!(!Firewall::of_texts(&[("nft", accepting)]).drops_forwarded);
        assert!(!Firewall::of_texts(&[]).seen);
    }
}
