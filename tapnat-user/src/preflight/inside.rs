//! The devices that guests are behind, and the networks that they have there.

use std::net::IpAddr;

use anyhow::{Error, Result, ensure};
use ipnet::IpNet;

use super::{Facts, Plan, PlannedInside, overlap::check_overlap};
use crate::{
    config::{Config, DeviceName, Networks},
    host::netlink::{Address, Link},
};

/// Bytes that every link takes that has IPv6 (RFC 8200 section 5). On one with a smaller MTU the
/// kernel turns it off.
const LEAST_IPV6_MTU: u32 = 1280;

impl Facts {
    /// The devices that are asked for by name, of which each goes together with the others.
    pub(super) fn insides(
        &self,
        config: &Config,
        uplink: &Link,
        outside_addresses: &[IpAddr],
    ) -> Result<Vec<PlannedInside>> {
        let mut insides: Vec<PlannedInside> = Vec::new();
        for inside in &config.insides {
            let Some(name) = inside.devices.name() else {
                continue;
            };
            let planned = self.inside(name, inside.networks, uplink)?;
            ensure!(
                insides.iter().all(|earlier| earlier.name != planned.name),
                "{} is given twice as an inside device: it has one network; give the other one a \
                 device of its own",
                planned.name
            );
            check_overlap(&planned, uplink, outside_addresses, &insides)?;
            insides.push(planned);
        }
        ensure!(
            !config.insides.is_empty(),
            "no inside device: pass --inside tap0=10.0.0.1/24"
        );
        Ok(insides)
    }

    fn inside(
        &self,
        name: &DeviceName,
        networks: Networks,
        uplink: &Link,
    ) -> Result<PlannedInside> {
        ensure!(
            name.as_str() != uplink.name,
            "{name} is both the uplink and an inside device: guests need a device of their own, \
             such as --inside tap0=10.0.0.1/24"
        );
        let Some(link) = self.link(name.as_str()) else {
            ensure!(
                !networks.is_empty(),
                "there is no device called {name}: {}; to have a tap created, give its address \
                 (--inside {name}=10.0.0.1/24)",
                self.suggest(name.as_str())
            );
            return Ok(PlannedInside {
                name: name.clone(),
                link: None,
                networks,
            });
        };
        self.check_kind(link)?;
        self.check_free(link)?;
        let networks = if networks.is_empty() {
            networks_of(link)
        } else {
            networks
        };
        ensure!(
            !networks.is_empty(),
            "inside device {name} has no address: give it one (--inside {name}=10.0.0.1/24)"
        );
        let planned = PlannedInside {
            name: name.clone(),
            link: Some(link.clone()),
            networks,
        };
        check_mtu(&planned)?;
        Ok(planned)
    }

    /// Adds the devices that are asked for by name and are there.
    pub(super) fn add_present(&self, config: &Config, before: &Plan, plan: &mut Plan) {
        for inside in &config.insides {
            let Some(name) = inside.devices.name() else {
                continue;
            };
            let earlier = before.insides.iter().find(|it| it.name == *name);
            // One that was renamed is still the same.
            let link = self.link(name.as_str()).or_else(|| {
                let index = earlier?.link.as_ref()?.index;
                self.links.iter().find(|link| link.index == index)
            });
            let Some(link) = link else { continue };
            let networks = if inside.networks.is_empty() {
                let kept = earlier
                    .filter(|it| it.link.as_ref().is_some_and(|it| it.index == link.index))
                    .map(|it| it.networks);
                kept.unwrap_or_default().or(networks_of(link))
            } else {
                inside.networks
            };
            self.add(name.clone(), link, networks, plan);
        }
    }

    /// Adds the devices that are there and are meant together with others.
    pub(super) fn add_included(&self, config: &Config, plan: &mut Plan) {
        for inside in &config.insides {
            for link in &self.links {
                let is_planned = plan.insides.iter().any(|it| it.name.as_str() == link.name)
                    || config
                        .insides
                        .iter()
                        .filter_map(|it| it.devices.name())
                        .any(|name| name.as_str() == link.name);
                let is_meant = inside.devices.include(&link.name)
                    && link.index != plan.uplink.index
                    && !is_planned;
                // A name that tapnat would not take is not looked at.
                let Some(name) = link.name.parse().ok().filter(|_| is_meant) else {
                    continue;
                };
                match inside.networks_on(&link.name) {
                    Ok(given) => {
                        let networks = if given.is_empty() {
                            networks_of(link)
                        } else {
                            given
                        };
                        self.add(name, link, networks, plan);
                    }
                    Err(error) => plan.warnings.push(not_served(link, &error)),
                }
            }
        }
    }

    /// Adds a device that is there, or says why not. One without an address may get one yet.
    fn add(&self, name: DeviceName, link: &Link, networks: Networks, plan: &mut Plan) {
        if networks.is_empty() {
            return;
        }
        let planned = PlannedInside {
            name,
            link: Some(link.clone()),
            networks,
        };
        let checked = self
            .check_kind(link)
            .and_then(|()| self.check_free(link))
            .and_then(|()| check_mtu(&planned))
            .and_then(|()| {
                ensure!(link.index != plan.uplink.index, "it is the uplink");
                check_overlap(
                    &planned,
                    &plan.uplink,
                    &plan.outside_addresses,
                    &plan.insides,
                )
            });
        match checked {
            Ok(()) => plan.insides.push(planned),
            Err(error) => plan.warnings.push(not_served(link, &error)),
        }
    }
}

fn not_served(link: &Link, error: &Error) -> String {
    format!("{} is not served: {error:#}", link.name)
}

fn check_mtu(inside: &PlannedInside) -> Result<()> {
    let link = inside.link.as_ref();
    if let Some(link) = link.filter(|link| link.mtu < LEAST_IPV6_MTU) {
        ensure!(
            inside.networks.ipv6.is_none(),
            "{} has an MTU of {}, and IPv6 needs {LEAST_IPV6_MTU}: raise it (`ip link set {0} mtu \
             1500`), or give the device IPv4 only",
            link.name,
            link.mtu
        );
    }
    Ok(())
}

/// The networks that a device has for guests already.
pub(crate) fn networks_of(link: &Link) -> Networks {
    let ipv4 = link.first_ipv4_network();
    Networks {
        ipv4: ipv4.map(|(net, _)| net),
        peer: ipv4.and_then(|(_, it)| it.peer),
        ipv6: link.first_ipv6_network(),
    }
}

impl PlannedInside {
    /// The name that the device has.
    #[must_use]
    pub fn device_name(&self) -> &str {
        match &self.link {
            Some(link) => &link.name,
            None => self.name.as_str(),
        }
    }

    /// The device as it is among these, which may be more recent.
    #[must_use]
    pub fn link_in<'a>(&self, links: &'a [Link]) -> Option<&'a Link> {
        let index = self.link.as_ref()?.index;
        links.iter().find(|link| link.index == index)
    }

    /// Whether this address has to be put on the device.
    #[must_use]
    pub fn lacks(&self, address: IpNet) -> bool {
        self.link.as_ref().is_none_or(|link| {
            let peer = self.networks.peer_of(address);
            let has = |it: &Address| it.net == address && it.peer == peer;
            !link.addresses.iter().any(has)
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::preflight::{
        Facts,
        tests::{config, facts, link, names, networks, refusal},
    };

    #[test]
    fn an_inside_device_without_address_needs_one() {
        let mut facts = facts();
        facts.links.push(link(9, "br0", &[]));
        assert!(refusal(&facts, &config(&["br0"])).contains("--inside br0=10.0.0.1/24"));
    }

    #[test]
    fn a_device_is_served_with_the_networks_that_it_has() {
        let mut facts = facts();
        let addresses = [
            "fe80::1/64",
            "2001:db8:7::5/64",
            "fd00:1::1/64",
            "10.1.0.1/24",
        ];
        facts.links.push(link(9, "br0", &addresses));
        let told = |facts: &Facts, inside| networks(&facts.plan(&config(&[inside])).unwrap(), 0);
        assert_eq!(told(&facts, "br0"), "10.1.0.1/24,2001:db8:7::5/64");
        // What is named is served, and nothing else.
        assert_eq!(told(&facts, "br0=10.1.0.1/24"), "10.1.0.1/24");
        assert_eq!(told(&facts, "br0=fd00:2::1/64"), "fd00:2::1/64");
        // The host is a guest itself where a router gave it its address.
        facts.links[5].addresses[1].permanent = false;
        assert_eq!(told(&facts, "br0"), "10.1.0.1/24,fd00:1::1/64");
        facts.links[5].addresses.truncate(1);
        assert!(refusal(&facts, &config(&["br0"])).contains("has no address"));
    }

    #[test]
    fn inside_devices_are_followed() {
        let mut facts = facts();
        facts.links.push(link(10, "tap0", &[]));
        let asked = config(&["virbr0", "tap*=10.0.0.1/24"]);
        let plan = facts.plan(&asked).unwrap();
        assert_eq!(names(&plan), ["virbr0", "tap0"]);
        facts.links.push(link(11, "tap2", &[]));
        facts.links.push(link(12, "tapx", &[]));
        facts.links[3].name = "virbr9".to_owned();
        let plan = facts.replan(&asked, &plan);
        assert_eq!(names(&plan), ["virbr9", "tap0", "tap2"]);
        assert_eq!(networks(&plan, 2), "10.0.2.1/24");
        assert!(
            plan.warnings[0].contains("tapx is not served"),
            "{:?}",
            plan.warnings
        );
        // A network that came to the uplink meanwhile is not inside any more.
        facts.links[1] = link(2, "eth0", &["10.0.2.77/24"]);
        let plan = facts.replan(&asked, &plan);
        assert_eq!(names(&plan), ["virbr9", "tap0"]);
        facts.links.retain(|link| !link.name.starts_with("tap"));
        let plan = facts.replan(&asked, &plan);
        assert_eq!(names(&plan), ["virbr9"]);
    }
}
