//! The addresses that the world is to see in place of the guests'.

use std::net::IpAddr;

use anyhow::{Result, bail};

use super::{Facts, Plan};
use crate::{config::Config, host::netlink::Link};

impl Facts {
    pub(super) fn outside_addresses(&self, config: &Config, uplink: &Link) -> Result<Vec<IpAddr>> {
        let mut addresses = config.outside_addresses.clone();
        if addresses.iter().any(IpAddr::is_ipv4) {
            return Ok(addresses);
        }
        let source = self
            .default_route
            .filter(|route| route.device_index == uplink.index)
            .and_then(|route| route.source)
            .filter(|source| uplink.ipv4().any(|(net, _)| net.addr() == *source));
        let first = || uplink.primary_ipv4().map(|net| net.addr());
        match source.or_else(first) {
            Some(address) => {
                addresses.push(address.into());
                Ok(addresses)
            }
            None if !config.speaks_ipv4() && gets_out_by_ipv6(uplink, &addresses) => Ok(addresses),
            None if !config.speaks_ipv4() => bail!(
                "uplink {} has no IPv6 address that is valid in the world: give it one, or pass \
                 --outside-address",
                uplink.name
            ),
            None => bail!(
                "uplink {} has no IPv4 address: give it one, or pass --outside-address",
                uplink.name
            ),
        }
    }
}

/// Whether there is an IPv6 address to translate guests' to.
fn gets_out_by_ipv6(uplink: &Link, outside_addresses: &[IpAddr]) -> bool {
    uplink.primary_ipv6().is_some() || outside_addresses.iter().any(IpAddr::is_ipv6)
}

/// Whether guests' packets of IPv6 have to wait for an address.
pub(super) fn lacks_ipv6(plan: &Plan) -> Option<String> {
    let has_ipv6 = plan
        .insides
        .iter()
        .any(|inside| inside.networks.ipv6.is_some());
    (has_ipv6 && !gets_out_by_ipv6(&plan.uplink, &plan.outside_addresses)).then(|| {
        format!(
            "uplink {} has no IPv6 address that is valid in the world: by IPv6 guests do not get \
             out until it has one",
            plan.uplink.name
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::netlink::DefaultRoute,
        preflight::tests::{config, facts, refusal},
    };

    #[test]
    fn the_routes_source_address_is_preferred() {
        let mut facts = facts();
        let source = std::net::Ipv4Addr::new(198, 51, 100, 1);
        facts.default_route = Some(DefaultRoute {
            device_index: 2,
            source: Some(source),
        });
        let plan = facts.plan(&config(&["tap0=10.0.0.1/24"])).unwrap();
        assert_eq!(plan.outside_addresses, [source]);
    }

    #[test]
    fn a_link_local_address_is_no_outside_address() {
        let mut facts = facts();
        facts.links[1].addresses[0].global = false;
        facts.links[1].addresses[1].secondary = true;
        let plan = facts.plan(&config(&["tap0=10.0.0.1/24"])).unwrap();
        assert_eq!(plan.outside_addresses, [IpAddr::from([198, 51, 100, 1])]);
        facts.links[1].addresses.truncate(1);
        assert_eq!(
            refusal(&facts, &config(&["tap0=10.0.0.1/24"])),
            "uplink eth0 has no IPv4 address: give it one, or pass --outside-address"
        );
    }

    #[test]
    fn an_uplink_without_address_needs_an_outside_address() {
        let mut facts = facts();
        facts.links[1].addresses.clear();
        let mut config = config(&["tap0=10.0.0.1/24"]);
        config.outside_addresses = vec![IpAddr::from([203, 0, 113, 5])];
        assert_eq!(
            facts.plan(&config).unwrap().outside_addresses,
            config.outside_addresses
        );
    }
}
