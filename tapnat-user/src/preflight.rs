//! Compares what an instance is asked to do with the host as it is, and refuses with one line that
//! says what, why, and the way out, before anything is changed. Later it says what is to become of
//! a running instance on a host that has changed, where nothing is refused any more. Pure: it sees
//! only the facts that it is given.
//!
//! What is checked has a file for each subject; in which order, is here.

mod device;
mod inside;
mod name;
mod outside;
mod overlap;
mod uplink;

use std::net::IpAddr;

use anyhow::Result;

use self::{
    device::check_routed_plainly, outside::lacks_ipv6, overlap::overlaps_elsewhere,
    uplink::lacks_carrier,
};
pub(crate) use self::{inside::networks_of, overlap::networks_at};
use crate::{
    config::{Config, DeviceName, Firewall, Networks},
    host::netlink::{DefaultRoute, Link},
    instance::InstanceName,
    journal::Claim,
};

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
        let insides = self.insides(config, uplink, &outside_addresses)?;
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
        self.add_present(config, before, &mut plan);
        self.add_included(config, &mut plan);
        plan.warnings.extend(self.warnings(&plan));
        plan
    }

    fn warnings(&self, plan: &Plan) -> Vec<String> {
        [lacks_carrier(&plan.uplink), lacks_ipv6(plan)]
            .into_iter()
            .flatten()
            .chain(overlaps_elsewhere(&plan.insides, &self.links))
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use tapnat_common::abi::Timeouts;

    use super::{device::LOOPBACK, *};
    use crate::{
        config::{Attach, DEFAULT_MAX_SESSIONS, DEFAULT_PORTS, Firewall, PerProtocol},
        host::{
            netlink::{Address, LinkLayer},
            tap::Queues,
        },
        uplink_hook::UplinkHook,
    };

    pub(super) fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
        Link {
            index,
            name: name.to_owned(),
            layer: LinkLayer::Ethernet,
            kind: None,
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            up: true,
            carrier: true,
            carrier_losses: 0,
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

    pub(crate) fn facts() -> Facts {
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

    pub(crate) fn config(insides: &[&str]) -> Config {
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

    pub(super) fn refusal(facts: &Facts, config: &Config) -> String {
        let error = format!("{:#}", facts.plan(config).unwrap_err());
        assert!(!error.contains('\n'), "{error}");
        error
    }

    pub(super) fn networks(plan: &Plan, position: usize) -> String {
        plan.insides[position].networks.to_string()
    }

    pub(super) fn names(plan: &Plan) -> Vec<&str> {
        plan.insides
            .iter()
            .map(PlannedInside::device_name)
            .collect()
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
}
