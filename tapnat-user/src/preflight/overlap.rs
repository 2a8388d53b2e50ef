//! Networks that are in two places at once.

use std::net::IpAddr;

use anyhow::{Result, bail};
use ipnet::IpNet;

use super::PlannedInside;
use crate::{config::overlap, host::netlink::Link};

/// RFC 4787 REQ-7: a network that is inside and outside at once is refused.
pub(super) fn check_overlap(
    inside: &PlannedInside,
    uplink: &Link,
    outside_addresses: &[IpAddr],
    earlier: &[PlannedInside],
) -> Result<()> {
    let name = &inside.name;
    for network in inside.networks.guests() {
        if let Some(outside) = networks_at(uplink).find(|other| overlap(network, *other)) {
            bail!(
                "the inside network {network} of {name} overlaps {} of the uplink {}: give {name} \
                 another network",
                outside.trunc(),
                uplink.name
            );
        }
        if let Some(address) = outside_addresses
            .iter()
            .find(|address| network.contains(*address))
        {
            bail!(
                "the outside address {address} is in the inside network {network} of {name}: give \
                 {name} another network"
            );
        }
        let other = earlier.iter().find_map(|other| {
            let network = inside.networks.overlapping(&other.networks)?;
            Some((other, network))
        });
        if let Some((other, network)) = other {
            bail!(
                "the inside network {network} of {name} overlaps that of {}: give each inside \
                 device a network of its own, or join them with a bridge",
                other.name
            );
        }
    }
    Ok(())
}

/// The networks that are reached at a device. That of the link-local addresses is every device's.
pub(crate) fn networks_at(link: &Link) -> impl Iterator<Item = IpNet> + use<'_> {
    let is_link_local =
        |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
    let networks = link.addresses.iter().map(|it| it.net);
    networks.filter(move |net| !is_link_local(net))
}

/// Inside networks that are at another device, too.
pub(super) fn overlaps_elsewhere(insides: &[PlannedInside], links: &[Link]) -> Vec<String> {
    let mut warnings = Vec::new();
    for inside in insides {
        for network in inside.networks.guests() {
            let other = links.iter().find(|link| {
                link.name != inside.device_name()
                    && link.up
                    && networks_at(link).any(|other| overlap(network, other))
            });
            if let Some(other) = other {
                warnings.push(format!(
                    "the inside network {} of {} overlaps a network of {}: this host reaches only \
                     one of them",
                    network, inside.name, other.name
                ));
            }
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::tests::{config, facts, link, refusal};

    #[test]
    fn overlapping_networks_are_refused() {
        for inside in [
            "tap0=192.0.2.129/25",
            "tap0=192.0.0.1/16",
            "tap0=198.51.100.2/30",
        ] {
            let error = refusal(&facts(), &config(&[inside]));
            assert!(error.contains("of the uplink eth0"), "{error}");
        }
        let error = refusal(&facts(), &config(&["tap0=10.0.0.1/8", "tap1=10.1.0.1/16"]));
        assert!(error.contains("overlaps that of tap0"), "{error}");
        let mut asked = config(&["tap0=10.0.0.1/24"]);
        asked.outside_addresses = vec![IpAddr::from([10, 0, 0, 9])];
        assert!(refusal(&facts(), &asked).contains("outside address 10.0.0.9"));
    }

    #[test]
    fn a_network_of_a_third_device_is_only_told() {
        let plan = facts().plan(&config(&["tap0=172.17.5.1/24"])).unwrap();
        assert!(
            plan.warnings[0].contains("overlaps a network of docker0"),
            "{:?}",
            plan.warnings
        );
    }

    #[test]
    fn networks_of_both_families_are_compared() {
        let mut facts = facts();
        let uplink = ["192.0.2.10/24", "fe80::2/64", "2001:db8::10/64"];
        facts.links[1] = link(2, "eth0", &uplink);
        for (inside, said) in [
            ("tap0=10.0.0.1/24,2001:db8::1/64", "of the uplink eth0"),
            ("tap0=2001:db8::1/32", "of the uplink eth0"),
        ] {
            let error = refusal(&facts, &config(&[inside]));
            assert!(error.contains(said), "{error}");
        }
        let twice = config(&["tap0=fd00::1/64", "tap1=10.0.0.1/24,fd00::1:1/64"]);
        assert!(refusal(&facts, &twice).contains("overlaps that of tap0"));
        let plan = facts.plan(&config(&["tap0=fd00::1/64", "virbr0=fd00:1::1/64"]));
        assert_eq!(plan.unwrap().warnings, Vec::<String>::new());
        facts.links[3].mtu = 1279;
        let error = refusal(&facts, &config(&["virbr0=fd00:1::1/64"]));
        assert!(error.contains("IPv6 needs 1280"), "{error}");
    }
}
