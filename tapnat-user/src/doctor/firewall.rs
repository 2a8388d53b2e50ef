//! What the rules of the host's firewall mean for guests.

use dhcproto::v6::SERVER_PORT as DHCPV6_SERVER_PORT;
use ipnet::IpNet;
use smoltcp::wire::DHCP_SERVER_PORT;

use super::{
    Finding, Level,
    networks::InsideNetwork,
    rules::{Firewall, IP6TABLES, IPTABLES},
};
use crate::config::overlap;

/// Whether guests of this network can ask the host for what it gives them.
fn judge_incoming(firewall: &Firewall, inside: &InsideNetwork) -> Option<Finding> {
    let (incoming, what, port) = match inside.network {
        IpNet::V4(_) => (firewall.ipv4, "what is for the host", DHCP_SERVER_PORT),
        IpNet::V6(_) => (
            firewall.ipv6,
            "what of IPv6 is for the host",
            DHCPV6_SERVER_PORT,
        ),
    };
    let drops = incoming.drops || firewall.managers.contains(&"firewalld");
    (drops && !incoming.knows_dhcp).then(|| {
        Finding::new(
            Level::Warning,
            "firewall",
            format!("the firewall drops {what} by default"),
            format!(
                "guests ask the host for their addresses (UDP port {port}), and, where it asks its \
                 resolvers for them, for names (port 53)"
            ),
        )
        .way_out(let_in(firewall, inside, port))
    })
}

/// How to let in what guests ask the host for. `dhcp`: the port of the network's IP version.
fn let_in(firewall: &Firewall, inside: &InsideNetwork, dhcp: u16) -> String {
    let device = &inside.device;
    if firewall.managers.contains(&"ufw") {
        return format!(
            "ufw allow in on {device} proto udp to any port 53,{dhcp}; ufw allow in on {device} proto \
             tcp to any port 53"
        );
    }
    if firewall.managers.contains(&"firewalld") {
        return format!("firewall-cmd --zone=trusted --change-interface={device}");
    }
    let (tool, others) = match inside.network {
        IpNet::V4(_) => (IPTABLES, "tcp port 53"),
        // Without it they do not even find the host (RFC 4890 section 4.4.1).
        IpNet::V6(_) => (IP6TABLES, "tcp port 53 and for all of icmpv6"),
    };
    format!(
        "a rule before the others of INPUT: {tool} -I INPUT -i {device} -p udp -m multiport --dports \
         53,{dhcp} -j ACCEPT, and the same for {others}"
    )
}

/// `asks`: whether the firewall decides about guests' packets.
pub(super) fn judge_firewall(
    firewall: &Firewall,
    networks: &[InsideNetwork],
    asks: bool,
) -> Vec<Finding> {
    let topic = "firewall";
    let mut findings = Vec::new();
    for rule in &firewall.masquerades {
        let covered: Vec<_> = networks
            .iter()
            .filter(|inside| rule.sources.iter().any(|it| overlap(*it, inside.network)))
            .map(|inside| inside.network.to_string())
            .collect();
        if covered.is_empty() && !networks.is_empty() {
            continue;
        }
        let (level, whom) = if covered.is_empty() {
            (Level::Note, "guests".to_owned())
        } else {
            (Level::Warning, covered.join(", "))
        };
        findings.push(
            Finding::new(
                level,
                topic,
                format!("a rule may translate {whom}, too: {}", rule.text),
                if asks {
                    "what the firewall is asked about meets it, and then goes out by the kernel's \
                     own translation instead of tapnat's"
                } else {
                    "packets that tapnat translates never meet it; but while tapnat is down guests \
                     go out by it unnoticed, and so does what tapnat leaves to the host"
                },
            )
            .way_out(rule.removal()),
        );
    }
    if firewall.drops_forwarded {
        findings.push(Finding::new(
            Level::Note,
            topic,
            "the firewall drops forwarded packets by default",
            if asks {
                "guests reach what its rules let through, as --firewall ask says"
            } else {
                "guests reach the world all the same, for tapnat's packets do not pass the \
                 firewall; where the host forwards, as for containers, it holds"
            },
        ));
    }
    let first = |is_ipv6| {
        let mut networks = networks.iter();
        networks.find(|it| it.network.addr().is_ipv6() == is_ipv6)
    };
    let first_of_each = [false, true].into_iter().filter_map(first);
    findings.extend(first_of_each.filter_map(|inside| judge_incoming(firewall, inside)));
    for manager in &firewall.managers {
        let why = match *manager {
            "Docker" => {
                "its rules and tapnat do not touch each other; ports of containers that it \
                 publishes without a proxy (userland-proxy false) need --pass-unsolicited"
            }
            _ if asks => "its rules for forwarded packets decide about guests' sessions",
            _ => {
                "its rules for forwarded packets do not hold for guests' packets to the world, \
                 which never pass them; those for the host itself do"
            }
        };
        findings.push(Finding::new(
            Level::Note,
            topic,
            format!("{manager} manages firewall rules here"),
            why,
        ));
    }
    if !firewall.seen {
        findings.push(
            Finding::new(
                Level::Note,
                topic,
                "the firewall's rules cannot be seen",
                "neither nft nor iptables-save can be run",
            )
            .way_out("run as root, with nftables or iptables installed"),
        );
    } else if findings.is_empty() {
        findings.push(Finding::ok(topic, "no rule translates guests, too"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::tests::levels;

    fn network(text: &str) -> InsideNetwork {
        InsideNetwork {
            device: "tap0".to_owned(),
            network: text.parse().unwrap(),
        }
    }

    fn networks() -> Vec<InsideNetwork> {
        vec![network("10.0.0.0/24")]
    }

    #[test]
    fn rules_that_translate_guests_too_are_found() {
        let judge = |text: &str, networks: &[InsideNetwork]| {
            let firewall = Firewall::of_texts(&[("iptables", text)]);
            levels(&judge_firewall(&firewall, networks, false))
        };
        let all = "-A POSTROUTING -o eth0 -j MASQUERADE\n";
        assert_eq!(judge(all, &networks()), [Level::Warning]);
        assert_eq!(judge(all, &[]), [Level::Note]);
        let docker = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n";
        assert_eq!(judge(docker, &networks()), [Level::Ok]);
        let guests = "-A POSTROUTING -s 10.0.0.0/8 -j SNAT --to-source 192.0.2.1\n";
        assert_eq!(judge(guests, &networks()), [Level::Warning]);
        assert_eq!(judge("", &networks()), [Level::Ok]);
    }
    #[test]
    fn what_keeps_guests_from_asking_is_found_for_each_ip_version() {
        const NONE: [u16; 0] = [];
        let both = [network("10.0.0.0/24"), network("fd00:7a70::/64")];
        let told = |texts: &[(&str, &str)], networks: &[InsideNetwork]| {
            let findings = judge_firewall(&Firewall::of_texts(texts), networks, false);
            let warnings = findings.iter().filter(|it| it.level == Level::Warning);
            let texts = warnings.map(|it| format!("{it:?}"));
            let ports = texts.map(|text| {
                let (old, new) = (text.contains("UDP port 67"), text.contains("UDP port 547"));
                assert!(old != new && new == text.contains("ip6tables -I"), "{text}");
                if new { 547 } else { 67_u16 }
            });
            ports.collect::<Vec<_>>()
        };
        let closed = ":INPUT DROP [0:0]\n";
        let open = ":INPUT DROP [0:0]\n-A INPUT -p udp --dport 67 -j ACCEPT\n";
        let open_for_ipv6 = ":INPUT DROP [0:0]\n-A INPUT -p udp --dport 547 -j ACCEPT\n";
        assert_eq!(told(&[("iptables", closed)], &both), [67]);
        assert_eq!(told(&[("iptables", closed)], &[]), NONE);
        assert_eq!(told(&[("iptables", open)], &both), NONE);
        assert_eq!(told(&[("ip6tables", closed)], &both), [547]);
        assert_eq!(told(&[("ip6tables", closed)], &both[..1]), NONE);
        assert_eq!(told(&[("ip6tables", open)], &both), [547]);
        assert_eq!(told(&[("ip6tables", open_for_ipv6)], &both), NONE);
        let all = [("iptables", closed), ("ip6tables", closed)];
        assert_eq!(told(&all, &both), [67, 547]);
        let nft = "table inet filter {\nchain input {\n\
                   type filter hook input priority filter; policy drop;\n\
                   udp dport { 53, 67 } accept\n}\n}\n";
        assert_eq!(told(&[("nft", nft)], &both), [547]);
        let of_ipv6 = nft.replace("table inet", "table ip6");
        assert_eq!(told(&[("nft", of_ipv6.as_str())], &both), [547]);
        let of_ipv4 = nft.replace("table inet", "table ip");
        assert_eq!(told(&[("nft", of_ipv4.as_str())], &both), NONE);
    }
}
