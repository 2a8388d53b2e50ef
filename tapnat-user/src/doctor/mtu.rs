//! How long packets may be on their way.

use super::{Finding, Level, networks::InsideNetwork};
use crate::host::netlink::Link;

pub(super) fn mtus(links: &[Link], uplink: &Link, networks: &[InsideNetwork]) -> Vec<Finding> {
    let topic = "mtu";
    let inside = |name: &str| links.iter().find(|link| link.name == name);
    let mut findings: Vec<_> = networks
        .iter()
        .filter_map(|network| inside(&network.device))
        .filter(|link| link.mtu > uplink.mtu)
        .map(|link| {
            Finding::new(
                Level::Note,
                topic,
                format!(
                    "{} carries {} bytes, the uplink {} only {}",
                    link.name, link.mtu, uplink.name, uplink.mtu
                ),
                "longer packets are fragmented, or their senders told by ICMP, which costs time; \
                 some networks swallow such ICMP",
            )
            .way_out(format!(
                "set the guests' MTU to {0}, or run with --clamp-mss {1}",
                uplink.mtu,
                uplink.mtu.saturating_sub(40)
            ))
        })
        .collect();
    if findings.is_empty() && !networks.is_empty() {
        findings.push(Finding::ok(
            topic,
            "no inside device carries more than the uplink",
        ));
    }
    findings
}
