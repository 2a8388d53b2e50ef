//! What the rules of the host's firewall mean for guests.

use super::{Finding, Level, networks::InsideNetwork, rules::Firewall};
use crate::config::overlap;

/// How to let in what guests ask the host for.
fn let_in(firewall: &Firewall, device: &str) -> String {
    if firewall.managers.contains(&"ufw") {
        format!(
            "ufw allow in on {device} proto udp to any port 53,67; ufw allow in on {device} proto tcp \
             to any port 53"
        )
    } else if firewall.managers.contains(&"firewalld") {
        format!("firewall-cmd --zone=trusted --change-interface={device}")
    } else {
        format!(
            "a rule before the others of INPUT: iptables -I INPUT -i {device} -p udp -m multiport \
             --dports 53,67 -j ACCEPT, and the same for tcp port 53"
        )
    }
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
    if (firewall.drops_incoming || firewall.managers.contains(&"firewalld"))
        && !firewall.knows_dhcp
        && let Some(inside) = networks.first()
    {
        findings.push(
            Finding::new(
                Level::Warning,
                topic,
                "the firewall drops what is for the host by default",
                "guests ask the host for their addresses (UDP port 67), and, where it asks its \
                 resolvers for them, for names (port 53)",
            )
            .way_out(let_in(firewall, &inside.device)),
        );
    }
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

    fn networks() -> Vec<InsideNetwork> {
        vec![InsideNetwork {
            device: "tap0".to_owned(),
            network: "10.0.0.0/24".parse().unwrap(),
        }]
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
        let closed = ":INPUT DROP [0:0]\n";
        assert_eq!(judge(closed, &networks()), [Level::Warning]);
        assert_eq!(judge(closed, &[]), [Level::Ok]);
        let open = ":INPUT DROP [0:0]\n-A INPUT -p udp --dport 67 -j ACCEPT\n";
        assert_eq!(judge(open, &networks()), [Level::Ok]);
        let docker = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n";
        assert_eq!(judge(docker, &networks()), [Level::Ok]);
        let guests = "-A POSTROUTING -s 10.0.0.0/8 -j SNAT --to-source 192.0.2.1\n";
        assert_eq!(judge(guests, &networks()), [Level::Warning]);
        assert_eq!(judge("", &networks()), [Level::Ok]);
    }
}
