//! Compares what an instance is asked to do with the host as it is, and refuses with one line that
//! says what, why, and the way out, before anything is changed. Later it says what is to become of
//! a running instance on a host that has changed, where nothing is refused any more. Pure: it sees
//! only the facts that it is given.

use std::net::IpAddr;

use anyhow::{Error, Result, anyhow, bail, ensure};
use ipnet::IpNet;

use crate::{
    config::{Config, DeviceName, Firewall, Networks, overlap},
    host::netlink::{Address, DefaultRoute, Link, LinkLayer},
    instance::InstanceName,
    journal::{Claim, Role},
};

/// `ARPHRD_LOOPBACK` of `include/uapi/linux/if_arp.h`.
const LOOPBACK: u16 = 772;
/// A name at most this many edits away from a given one is worth suggesting.
const NEAR: usize = 2;
/// Bytes that every link takes that has IPv6 (RFC 8200 section 5). On one with a smaller MTU the
/// kernel turns it off.
const LEAST_IPV6_MTU: u32 = 1280;

/// What is known of the host before anything is changed.
#[derive(Clone, Debug)]
pub struct Facts {
    pub links: Vec<Link>,
    pub default_route: Option<DefaultRoute>,
    /// Devices of this network namespace that other instances work on.
    pub taken: Vec<(InstanceName, Claim)>,
}

/// What an instance will do, with every choice made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// As it was when it was last there.
    pub uplink: Link,
    /// In the order of preference, never without one of IPv4 if any guest is to reach the world's.
    /// Of IPv6 those that the operator named.
    pub outside_addresses: Vec<IpAddr>,
    /// Of a plan for a running instance, those that are there.
    pub insides: Vec<PlannedInside>,
    /// What the user should know though it stops nothing: one line each.
    pub warnings: Vec<String>,
}

/// An inside device, there already or to be created.
#[derive(Clone, Debug)]
pub struct PlannedInside {
    /// By which it was asked for; it may have been renamed since.
    pub name: DeviceName,
    /// None means that a tap is to be created.
    pub link: Option<Link>,
    /// The host's addresses on it, at least one.
    pub networks: Networks,
}

impl Facts {
    fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Makes the plan for `config` on this host.
    ///
    /// # Errors
    ///
    /// With the first reason why it cannot be done.
    pub fn plan(&self, config: &Config) -> Result<Plan> {
        let uplink = self.uplink(config)?;
        let outside_addresses = self.outside_addresses(config, uplink)?;
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
            check_overlap(&planned, uplink, &outside_addresses, &insides)?;
            insides.push(planned);
        }
        ensure!(
            !config.insides.is_empty(),
            "no inside device: pass --inside tap0=10.0.0.1/24"
        );
        if config.firewall == Firewall::Ask {
            let there = insides.iter().filter_map(|inside| inside.link.as_ref());
            for link in there.chain([uplink]) {
                check_routed_plainly(link)?;
            }
        }
        let mut plan = Plan {
            uplink: uplink.clone(),
            outside_addresses,
            insides,
            warnings: Vec::new(),
        };
        let new = plan.insides.iter().filter(|inside| inside.link.is_none());
        plan.warnings = new
            .filter_map(|inside| self.mistyped(inside.name.as_str()))
            .collect();
        self.add_included(config, &mut plan);
        plan.warnings.extend(self.warnings(&plan));
        Ok(plan)
    }

    /// Makes the plan for a running instance anew, on a host that has changed since. What cannot be
    /// done any more is left out, and told in the warnings.
    #[must_use]
    pub fn replan(&self, config: &Config, before: &Plan) -> Plan {
        let mut warnings = Vec::new();
        let uplink = self
            .present_uplink(config, before, &mut warnings)
            .unwrap_or(&before.uplink);
        // Those that another device had are no choice on this one.
        let outside_addresses = if uplink.index == before.uplink.index {
            None
        } else {
            self.outside_addresses(config, uplink).ok()
        };
        let mut plan = Plan {
            uplink: uplink.clone(),
            outside_addresses: outside_addresses
                .unwrap_or_else(|| before.outside_addresses.clone()),
            insides: Vec::new(),
            warnings,
        };
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
            self.add(name.clone(), link, networks, &mut plan);
        }
        self.add_included(config, &mut plan);
        plan.warnings.extend(self.warnings(&plan));
        plan
    }

    /// The uplink of a running instance, if it is there.
    fn present_uplink(
        &self,
        config: &Config,
        before: &Plan,
        warnings: &mut Vec<String>,
    ) -> Option<&Link> {
        let by_index = |index| self.links.iter().find(|link| link.index == index);
        let wanted = match &config.uplink {
            Some(name) => self.link(name.as_str()),
            None => self
                .default_route
                .and_then(|route| by_index(route.device_index)),
        };
        let is_inside = |link: &Link| {
            before.insides.iter().any(|inside| {
                inside
                    .link
                    .as_ref()
                    .is_some_and(|it| it.index == link.index)
            })
        };
        let usable = wanted.filter(|link| {
            link.index == before.uplink.index || {
                let checked = if is_inside(link) {
                    Err(anyhow!("{} is an inside device", link.name))
                } else {
                    self.check_kind(link).and_then(|()| self.check_free(link))
                };
                if let Err(error) = &checked {
                    warnings.push(format!(
                        "the way to the world is {} now, which cannot be the uplink: {error:#}",
                        link.name
                    ));
                }
                checked.is_ok()
            }
        });
        usable
            // Renamed, or without a route for a while.
            .or_else(|| by_index(before.uplink.index))
            // Made anew, and without a route yet.
            .or_else(|| self.link(&before.uplink.name))
    }

    /// Adds the devices that are there and are meant together with others.
    fn add_included(&self, config: &Config, plan: &mut Plan) {
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

    fn uplink(&self, config: &Config) -> Result<&Link> {
        let link = if let Some(name) = &config.uplink {
            let Some(link) = self.link(name.as_str()) else {
                bail!(
                    "there is no device called {name}: {}",
                    self.suggest(name.as_str())
                );
            };
            link
        } else {
            let Some(route) = self.default_route else {
                bail!("no uplink is given and there is no default route: pass --uplink");
            };
            let Some(link) = self
                .links
                .iter()
                .find(|link| link.index == route.device_index)
            else {
                bail!("the default route's device is gone: pass --uplink");
            };
            link
        };
        let name = &link.name;
        ensure!(
            link.up,
            "uplink {name} is down: set it up (`ip link set {name} up`)"
        );
        self.check_kind(link)?;
        self.check_free(link)?;
        Ok(link)
    }

    fn outside_addresses(&self, config: &Config, uplink: &Link) -> Result<Vec<IpAddr>> {
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

    fn check_kind(&self, link: &Link) -> Result<()> {
        let name = &link.name;
        match link.layer {
            LinkLayer::Other(LOOPBACK) => {
                bail!(
                    "{name} is the loopback, which no guest and no world is behind: name another device"
                )
            }
            LinkLayer::Other(number) => bail!(
                "{name} carries neither Ethernet nor bare IP (its ARPHRD number is {number}): \
                 name another device"
            ),
            LinkLayer::Ethernet | LinkLayer::None => {}
        }
        let controller = link
            .controller
            .and_then(|index| self.links.iter().find(|link| link.index == index))
            .filter(|controller| controller.kind.as_deref() != Some("vrf"));
        if let Some(controller) = controller {
            bail!("{name} is a port of {0}: name {0} instead", controller.name);
        }
        Ok(())
    }

    fn check_free(&self, link: &Link) -> Result<()> {
        match self
            .taken
            .iter()
            .find(|(_, claim)| claim.device.index == link.index)
        {
            None => Ok(()),
            Some((instance, claim)) => {
                let role = match claim.role {
                    Role::Inside => "an inside device",
                    Role::Uplink => "the uplink",
                };
                bail!(
                    "{} is {role} of the tapnat instance '{instance}' already: name another device, \
                     or end that instance (`tapnat down --instance {instance}`)",
                    link.name
                )
            }
        }
    }

    fn suggest(&self, name: &str) -> String {
        let mut near: Vec<_> = self
            .links
            .iter()
            .map(|link| (strsim::damerau_levenshtein(name, &link.name), &link.name))
            .filter(|(distance, _)| *distance <= NEAR)
            .collect();
        near.sort();
        if let Some((_, name)) = near.first() {
            return format!("did you mean {name}?");
        }
        let names: Vec<_> = self
            .links
            .iter()
            .filter(|link| link.layer != LinkLayer::Other(LOOPBACK))
            .map(|link| link.name.as_str())
            .collect();
        if names.is_empty() {
            "there is none but the loopback".to_owned()
        } else {
            format!("there is {}", names.join(", "))
        }
    }

    /// What may have been meant by a name that no device has yet. That one is called `tap0` and one
    /// `tap1` is no mistake.
    fn mistyped(&self, name: &str) -> Option<String> {
        let kind = |name: &str| {
            name.trim_end_matches(|it: char| it.is_ascii_digit())
                .to_owned()
        };
        let mut near = self.links.iter().filter(|link| {
            kind(&link.name) != kind(name) && strsim::damerau_levenshtein(name, &link.name) < NEAR
        });
        let known = self.links.iter().any(|link| kind(&link.name) == kind(name));
        let meant = &near.next().filter(|_| !known)?.name;
        Some(format!(
            "there is no {name}, so it is created, as a tap: if {meant} was meant, end this and write \
             that"
        ))
    }

    fn warnings(&self, plan: &Plan) -> Vec<String> {
        let Plan {
            uplink, insides, ..
        } = plan;
        let mut warnings = Vec::new();
        if !uplink.carrier {
            warnings.push(format!(
                "uplink {} has no carrier: is it plugged in?",
                uplink.name
            ));
        }
        let has_ipv6 = insides.iter().any(|inside| inside.networks.ipv6.is_some());
        if has_ipv6 && !gets_out_by_ipv6(uplink, &plan.outside_addresses) {
            warnings.push(format!(
                "uplink {} has no IPv6 address that is valid in the world: by IPv6 guests do not get \
                 out until it has one",
                uplink.name
            ));
        }
        for inside in insides {
            for network in inside.networks.guests() {
                let other = self.links.iter().find(|link| {
                    link.name != inside.device_name()
                        && link.up
                        && networks_at(link).any(|other| overlap(network, other))
                });
                if let Some(other) = other {
                    warnings.push(format!(
                        "the inside network {} of {} overlaps a network of {}: this host reaches \
                         only one of them",
                        network, inside.name, other.name
                    ));
                }
            }
        }
        warnings
    }
}

/// Whether there is an IPv6 address to translate guests' to.
fn gets_out_by_ipv6(uplink: &Link, outside_addresses: &[IpAddr]) -> bool {
    uplink.primary_ipv6().is_some() || outside_addresses.iter().any(IpAddr::is_ipv6)
}

fn not_served(link: &Link, error: &Error) -> String {
    format!("{} is not served: {error:#}", link.name)
}

/// In a VRF the host forgets on which device a packet came, and so what its firewall was asked.
fn check_routed_plainly(link: &Link) -> Result<()> {
    ensure!(
        link.controller.is_none(),
        "{} is in a VRF, where the firewall cannot be asked: take it out of it, or leave \
         --firewall ask away",
        link.name
    );
    Ok(())
}

/// RFC 4787 REQ-7: a network that is inside and outside at once is refused.
fn check_overlap(
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

/// The networks that are reached at a device. That of the link-local addresses is every device's.
pub(crate) fn networks_at(link: &Link) -> impl Iterator<Item = IpNet> + use<'_> {
    let is_link_local =
        |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
    let networks = link.addresses.iter().map(|it| it.net);
    networks.filter(move |net| !is_link_local(net))
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
    use tapnat_common::abi::Timeouts;

    use super::*;
    use crate::{
        config::{Attach, DEFAULT_MAX_SESSIONS, DEFAULT_PORTS, Firewall, PerProtocol},
        host::{netlink::Device, tap::Queues},
        uplink_hook::UplinkHook,
    };

    fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
        Link {
            index,
            name: name.to_owned(),
            layer: LinkLayer::Ethernet,
            kind: None,
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            up: true,
            carrier: true,
            controller: None,
            lower: None,
            addresses: addresses
                .iter()
                .map(|net| Address {
                    net: net.parse().unwrap(),
                    peer: None,
                    global: !net.starts_with("fe80:"),
                    secondary: false,
                    permanent: true,
                    tentative: false,
                    deprecated: false,
                })
                .collect(),
        }
    }

    fn facts() -> Facts {
        let mut loopback = link(1, "lo", &["127.0.0.1/8"]);
        loopback.layer = LinkLayer::Other(LOOPBACK);
        let mut port = link(5, "vnet0", &[]);
        port.controller = Some(4);
        Facts {
            links: vec![
                loopback,
                link(2, "eth0", &["192.0.2.10/24", "198.51.100.1/25"]),
                link(3, "docker0", &["172.17.0.1/16"]),
                link(4, "virbr0", &["192.168.122.1/24"]),
                port,
            ],
            default_route: Some(DefaultRoute {
                device_index: 2,
                source: None,
            }),
            taken: Vec::new(),
        }
    }

    fn config(insides: &[&str]) -> Config {
        Config {
            instance: "default".parse().unwrap(),
            insides: insides
                .iter()
                .map(|inside| inside.parse().unwrap())
                .collect(),
            uplink: None,
            outside_addresses: Vec::new(),
            ports: DEFAULT_PORTS,
            max_sessions: DEFAULT_MAX_SESSIONS,
            guest_max_sessions: std::num::NonZeroU32::MAX,
            guest_max_ports: std::num::NonZeroU32::MAX,
            guest_new_sessions: None,
            timeouts: Timeouts::default(),
            filtering: PerProtocol::default(),
            mapping: PerProtocol::default(),
            inbound_refresh: false,
            clamp_mss: None,
            pass_unsolicited: false,
            deny: Vec::new(),
            untranslated: Vec::new(),
            prefixes: Vec::new(),
            deny_host: false,
            isolate: false,
            route_guests: false,
            roaming: false,
            firewall: Firewall::Bypass,
            answer_unsolicited: true,
            dhcp: false,
            router_advertisements: false,
            nat64: None,
            domain: None,
            dns: Vec::new(),
            metrics: None,
            nat_log: None,
            log_destinations: false,
            count: false,
            verbose: false,
            tap_queues: Queues::Multi,
            tap_owner: None,
            attach: Attach::Auto,
            uplink_hook: UplinkHook::Auto,
            forwards: Vec::new(),
            sweep_interval: None,
        }
    }

    fn refusal(facts: &Facts, config: &Config) -> String {
        let error = format!("{:#}", facts.plan(config).unwrap_err());
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn the_default_routes_device_is_the_uplink() {
        let plan = facts()
            .plan(&config(&["tap0=10.0.0.1/24", "virbr0"]))
            .unwrap();
        assert_eq!(plan.uplink.name, "eth0");
        assert_eq!(plan.outside_addresses, [IpAddr::from([192, 0, 2, 10])]);
        assert!(plan.insides[0].link.is_none());
        assert!(plan.insides[0].lacks("10.0.0.1/24".parse().unwrap()));
        assert_eq!(networks(&plan, 1), "192.168.122.1/24");
        assert!(!plan.insides[1].lacks("192.168.122.1/24".parse().unwrap()));
        assert_eq!(plan.warnings, Vec::<String>::new());
    }

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

    #[test]
    fn unknown_devices_get_suggestions() {
        let mut asked = config(&["tap0=10.0.0.1/24"]);
        asked.uplink = Some("eht0".parse().unwrap());
        assert_eq!(
            refusal(&facts(), &asked),
            "there is no device called eht0: did you mean eth0?"
        );
        asked.uplink = Some("wlp3s0".parse().unwrap());
        assert_eq!(
            refusal(&facts(), &asked),
            "there is no device called wlp3s0: there is eth0, docker0, virbr0, vnet0"
        );
        let error = refusal(&facts(), &config(&["virbr1"]));
        assert!(
            error.contains("did you mean virbr0?") && error.contains("tap created"),
            "{error}"
        );
    }

    #[test]
    fn without_default_route_the_uplink_must_be_named() {
        let mut facts = facts();
        facts.default_route = None;
        assert!(refusal(&facts, &config(&["tap0=10.0.0.1/24"])).contains("pass --uplink"));
    }

    #[test]
    fn a_down_uplink_is_refused_and_a_missing_carrier_is_told() {
        let mut facts = facts();
        facts.links[1].carrier = false;
        let plan = facts.plan(&config(&["tap0=10.0.0.1/24"])).unwrap();
        assert!(
            plan.warnings[0].contains("no carrier"),
            "{:?}",
            plan.warnings
        );
        facts.links[1].up = false;
        assert_eq!(
            refusal(&facts, &config(&["tap0=10.0.0.1/24"])),
            "uplink eth0 is down: set it up (`ip link set eth0 up`)"
        );
    }

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
    fn one_device_has_one_role() {
        assert!(refusal(&facts(), &config(&["eth0=10.0.0.1/24"])).contains("both the uplink"));
        let error = refusal(&facts(), &config(&["tap0=10.0.0.1/24", "tap0=10.0.1.1/24"]));
        assert!(error.contains("given twice"), "{error}");
        assert!(refusal(&facts(), &config(&["lo=10.0.0.1/24"])).contains("the loopback"));
        assert!(refusal(&facts(), &config(&["vnet0=10.0.0.1/24"])).contains("name virbr0 instead"));
    }

    #[test]
    fn a_device_belongs_to_one_instance() {
        let mut facts = facts();
        let device = Device {
            name: "eth0".to_owned(),
            index: 2,
        };
        let claim = Claim {
            device,
            role: Role::Uplink,
        };
        facts.taken = vec![("other".parse().unwrap(), claim)];
        let error = refusal(&facts, &config(&["tap0=10.0.0.1/24"]));
        assert!(error.contains("tapnat down --instance other"), "{error}");
    }

    #[test]
    fn an_inside_device_without_address_needs_one() {
        let mut facts = facts();
        facts.links.push(link(9, "br0", &[]));
        assert!(refusal(&facts, &config(&["br0"])).contains("--inside br0=10.0.0.1/24"));
    }

    fn networks(plan: &Plan, position: usize) -> String {
        plan.insides[position].networks.to_string()
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

    fn names(plan: &Plan) -> Vec<&str> {
        plan.insides
            .iter()
            .map(PlannedInside::device_name)
            .collect()
    }

    #[test]
    fn the_uplink_is_followed() {
        let mut facts = facts();
        let asked = config(&["virbr0"]);
        let plan = facts.plan(&asked).unwrap();
        // Renamed, and without a route.
        facts.links[1].name = "wan0".to_owned();
        facts.default_route = None;
        let plan = facts.replan(&asked, &plan);
        assert_eq!((plan.uplink.name.as_str(), plan.uplink.index), ("wan0", 2));
        // Gone: it may come back.
        let gone = facts.links.remove(1);
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.index, 2);
        assert_eq!(names(&plan), ["virbr0"]);
        // Back by its name, without an address yet.
        facts.links.push(Link {
            index: 20,
            addresses: Vec::new(),
            ..gone
        });
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.index, 20);
        assert_eq!(plan.outside_addresses, [IpAddr::from([192, 0, 2, 10])]);
        // The route goes elsewhere.
        facts.links.push(link(21, "ppp0", &["203.0.113.9/32"]));
        facts.default_route = Some(DefaultRoute {
            device_index: 21,
            source: None,
        });
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.name, "ppp0");
        assert_eq!(plan.outside_addresses, [IpAddr::from([203, 0, 113, 9])]);
        // There it is of no use.
        facts.default_route = Some(DefaultRoute {
            device_index: 4,
            source: None,
        });
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.name, "ppp0");
        assert!(
            plan.warnings[0].contains("virbr0 is an inside device"),
            "{:?}",
            plan.warnings
        );
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

    #[test]
    fn a_tap_with_a_name_that_is_nearly_another_ones_is_told() {
        let warnings = |inside: &str| facts().plan(&config(&[inside])).unwrap().warnings;
        let told = warnings("vent0=10.0.0.1/24");
        assert!(
            told.len() == 1 && told[0].contains("if vnet0 was meant"),
            "{told:?}"
        );
        for new in ["vnet1=10.0.0.1/24", "tap0=10.0.0.1/24"] {
            assert!(warnings(new).is_empty(), "{new}");
        }
    }
}
