//! The networks with guests, and which of them are elsewhere, too.

use anyhow::Result;
use ipnet::IpNet;
use tapnat_common::abi::role;

use super::{Finding, Level};
use crate::{
    config::{Config, overlap},
    family::IpFamily,
    host::netlink::Link,
    preflight::{networks_at, networks_of},
    tables::{BothTables, PinnedTables},
};

/// A network with guests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct InsideNetwork {
    pub(super) device: String,
    pub(super) network: IpNet,
}

/// The IP versions that guests have: IPv4 where nothing is known of them.
pub(super) fn versions(networks: &[InsideNetwork]) -> (bool, bool) {
    let ipv6 = networks.iter().any(|it| it.network.addr().is_ipv6());
    let ipv4 = networks.iter().any(|it| it.network.addr().is_ipv4());
    (ipv4 || !ipv6, ipv6)
}

/// Of the instance if it is there, else of the configuration.
pub(super) fn inside_networks(
    links: &[Link],
    tables: Option<&BothTables>,
    config: Option<&Config>,
) -> Result<Vec<InsideNetwork>> {
    if let Some(BothTables { ipv4, ipv6, .. }) = tables {
        let mut networks = inside_networks_in(ipv4, links)?;
        if let Some(ipv6) = ipv6 {
            networks.extend(inside_networks_in(ipv6, links)?);
        }
        return Ok(networks);
    }
    let insides = config.map(|config| config.insides.as_slice());
    Ok(insides
        .unwrap_or_default()
        .iter()
        .flat_map(|inside| {
            let named = inside.devices.name().map(ToString::to_string);
            let included = links
                .iter()
                .filter(|link| inside.devices.include(&link.name))
                .map(|link| link.name.clone());
            named.into_iter().chain(included).flat_map(|device| {
                let link = links.iter().find(|it| it.name == device);
                let given = inside.networks_on(&device).unwrap_or_default();
                let networks = if given.is_empty() {
                    link.map(networks_of).unwrap_or_default()
                } else {
                    given
                };
                let networks: Vec<_> = networks.guests().collect();
                networks.into_iter().map(move |network| InsideNetwork {
                    device: device.clone(),
                    network,
                })
            })
        })
        .collect())
}

/// Those of one IP version.
fn inside_networks_in<A: IpFamily>(
    tables: &PinnedTables<A>,
    links: &[Link],
) -> Result<Vec<InsideNetwork>> {
    let devices = tables.devices()?;
    let insides = devices
        .iter()
        .filter(|(_, device)| device.role == role::INSIDE && device.address != A::UNSPECIFIED);
    Ok(insides
        .filter_map(|(index, device)| {
            let network: IpNet = A::net(device.network, A::length(device.mask))?.into();
            Some(InsideNetwork {
                device: name_of(links, *index),
                network: network.trunc(),
            })
        })
        .collect())
}

fn name_of(links: &[Link], index: u32) -> String {
    links
        .iter()
        .find(|link| link.index == index)
        .map_or_else(|| format!("#{index}"), |link| link.name.clone())
}

pub(super) fn overlaps(links: &[Link], networks: &[InsideNetwork]) -> Vec<Finding> {
    let topic = "networks";
    let mut findings = Vec::new();
    for inside in networks {
        for link in links.iter().filter(|it| it.name != inside.device) {
            let other = networks_at(link).find(|net| overlap(*net, inside.network));
            if let Some(other) = other {
                findings.push(
                    Finding::new(
                        Level::Warning,
                        topic,
                        format!(
                            "the inside network {} of {} overlaps {} of {}",
                            inside.network,
                            inside.device,
                            other.trunc(),
                            link.name
                        ),
                        "the host reaches only one of them, and packets to guests may go the wrong \
                         way",
                    )
                    .way_out(format!("give {} another network", inside.device)),
                );
            }
        }
    }
    if findings.is_empty() && !networks.is_empty() {
        findings.push(Finding::ok(topic, "no inside network overlaps another one"));
    }
    findings
}
