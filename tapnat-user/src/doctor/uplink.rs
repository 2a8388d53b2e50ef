//! The way to the world: which device it is, and what its kernel lets in.

use ipnet::IpNet;
use tapnat_common::net::{Be32, Be128};

use super::{
    Finding, Level,
    networks::{InsideNetwork, versions},
};
use crate::{
    config::Config,
    family::IpFamily as _,
    host::{
        netlink::{DefaultRoute, Link},
        sysctl::Sysctl,
    },
    journal::{Journal, Role},
};

pub(super) fn find_uplink<'a>(
    links: &'a [Link],
    default_route: Option<DefaultRoute>,
    config: Option<&Config>,
    journal: Option<&Journal>,
) -> Option<&'a Link> {
    let claimed = journal.and_then(|journal| {
        let claim = journal.claims().iter().find(|it| it.role == Role::Uplink)?;
        links.iter().find(|it| it.index == claim.device.index)
    });
    let named = config
        .and_then(|config| config.uplink.as_ref())
        .and_then(|name| links.iter().find(|it| it.name == name.as_str()));
    let routed = || {
        let route = default_route?;
        links.iter().find(|it| it.index == route.device_index)
    };
    claimed.or(named).or_else(routed)
}

pub(super) fn judge_uplink(
    uplink: Option<&Link>,
    default_route: Option<DefaultRoute>,
    networks: &[InsideNetwork],
) -> Finding {
    let topic = "uplink";
    let Some(link) = uplink else {
        return Finding::new(
            Level::Problem,
            topic,
            "there is no default route, so no uplink",
            "guests' packets have no way out",
        )
        .way_out("connect the host (`ip route add default via ..`), or pass --uplink");
    };
    let name = &link.name;
    if !link.up {
        return Finding::new(
            Level::Problem,
            topic,
            format!("the uplink {name} is down"),
            "guests' packets have no way out",
        )
        .way_out(format!("ip link set {name} up"));
    }
    if !link.carrier {
        return Finding::new(
            Level::Problem,
            topic,
            format!("the uplink {name} has no carrier"),
            "its other end is not there",
        )
        .way_out("plug it in");
    }
    let (ipv4, ipv6) = if networks.is_empty() && link.primary_ipv6().is_some() {
        (link.primary_ipv4().is_some(), true)
    } else {
        versions(networks)
    };
    let ipv4 = ipv4.then(|| (Be32::NAME, link.primary_ipv4().map(IpNet::from)));
    let ipv6 = ipv6.then(|| (Be128::NAME, link.primary_ipv6().map(IpNet::from)));
    let mut addresses = Vec::new();
    for (version, address) in [ipv4, ipv6].into_iter().flatten() {
        let Some(address) = address else {
            return Finding::new(
                Level::Problem,
                topic,
                format!("the uplink {name} has no {version} address"),
                "there is nothing to translate guests' addresses to",
            )
            .way_out("give it one, or pass --outside-address");
        };
        addresses.push(address.to_string());
    }
    if default_route.is_none() {
        return Finding::new(
            Level::Warning,
            topic,
            format!("the uplink {name} has no default route"),
            "guests reach only the networks that the host has routes to",
        )
        .way_out(format!("ip route add default via .. dev {name}"));
    }
    Finding::ok(topic, format!("{name} has {}", addresses.join(" and ")))
}

/// `net.ipv4.conf.*.rp_filter` as it holds for a device: the larger of its own and that of all
/// (`Documentation/networking/ip-sysctl.rst`).
pub(super) fn reverse_path(device: &str) -> u8 {
    let read = |name: &str| {
        let value = Sysctl::reverse_path_filter(name).read();
        value.ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    read("all").max(read(device))
}

pub(super) fn judge_reverse_path(
    device: &str,
    filter: u8,
    has_default_route: bool,
) -> Option<Finding> {
    const STRICT: u8 = 1;
    (filter == STRICT && !has_default_route).then(|| {
        Finding::new(
            Level::Warning,
            "rp-filter",
            format!("{device} drops packets whose answers would leave by another device"),
            "the default route is another device's, so what the world sends to this host over \
             the uplink is dropped (guests' packets are not)",
        )
        .way_out(format!("sysctl -w net.ipv4.conf.{device}.rp_filter=2"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strict_reverse_path_matters_only_beside_the_default_route() {
        assert!(judge_reverse_path("eth1", 1, true).is_none());
        assert!(judge_reverse_path("eth1", 2, false).is_none());
        assert!(judge_reverse_path("eth1", 1, false).is_some());
    }
}
