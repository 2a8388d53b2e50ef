//! What guests are served on each inside device beside translation: addresses, a router of IPv6, names.

use super::Daemon;
use crate::{dhcp, dhcpv6, notice::warn, router};

impl Daemon {
    /// Serves the guests of the devices that there are.
    pub(super) async fn settle_guests(&mut self) {
        let mtu_of = |index| {
            let mut devices = self.four.known.devices.iter();
            devices
                .find(|(known, device)| *known == index && device.ethernet != 0)
                .map(|(_, device)| device.mtu)
        };
        let insides = || {
            let insides = self.plan.insides.iter();
            insides.filter_map(|inside| Some((inside.link.as_ref()?, inside.networks)))
        };
        let mut hosts: Vec<_> = insides()
            .filter_map(|(link, networks)| {
                Some(dhcp::Served {
                    name: link.name.clone(),
                    index: link.index,
                    address: networks.ipv4?.addr(),
                    network: networks.guests_ipv4()?,
                    mtu: mtu_of(link.index)?,
                })
            })
            .collect();
        let mut routers: Vec<_> = insides()
            .filter_map(|(link, networks)| {
                Some(router::Served {
                    name: link.name.clone(),
                    index: link.index,
                    address: networks.ipv6?,
                    link_local: link.link_local()?,
                    link_address: link.mac,
                    mtu: link.mtu,
                    managed: self.config.dhcp && link.mac.is_some(),
                })
            })
            .collect();
        let mut managed: Vec<_> = routers
            .iter()
            .filter_map(|router| {
                Some(dhcpv6::Served {
                    name: router.name.clone(),
                    index: router.index,
                    address: router.address,
                    link_address: router.link_address?,
                })
            })
            .collect();
        let (config, names) = (&self.config, &self.names);
        let gateways: Vec<_> = hosts
            .iter()
            .map(dhcp::Served::gateway)
            .chain(routers.iter().map(router::Served::gateway))
            .collect();
        let mut notes = names.settle(&gateways, &config.resolvers(), &config.deny);
        if !config.dhcp {
            hosts.clear();
            managed.clear();
        }
        if !config.router_advertisements {
            routers.clear();
        }
        let domain = config.domain.as_deref();
        notes.extend(
            self.dhcp
                .settle(&hosts, domain, names, self.host.netlink())
                .await,
        );
        notes.extend(self.dhcpv6.settle(&managed, domain, names).await);
        let advice = router::Advice {
            domain: config.domain.clone(),
            nat64: config.nat64.map(|nat64| nat64.net),
        };
        notes.extend(self.routers.settle(&routers, &advice, names).await);
        for note in notes {
            warn(&note);
        }
    }
}
