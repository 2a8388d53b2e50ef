//! How many ports of each outside address stand for guests, by the sets of ports in the tables.

use std::net::IpAddr;

use anyhow::Result;
use serde::Serialize;
use tapnat_common::ports::{Class, set_index};

use crate::{
    family::IpFamily,
    tables::{BothTables, PinnedTables},
    view::UsageView,
};

/// How many ports (or identifiers) of an outside address stand for guests, and how many can.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct PortsView {
    pub address: IpAddr,
    pub tcp: UsageView,
    pub udp: UsageView,
    pub icmp: UsageView,
}

/// Which share of each outside address's ports is taken.
///
/// # Errors
///
/// When the kernel refuses.
pub fn ports_in_use(tables: &BothTables) -> Result<Vec<PortsView>> {
    let mut ports = ports_in_use_of(&tables.ipv4)?;
    if let Some(tables) = &tables.ipv6 {
        ports.extend(ports_in_use_of(tables)?);
    }
    Ok(ports)
}

fn ports_in_use_of<A: IpFamily>(tables: &PinnedTables<A>) -> Result<Vec<PortsView>> {
    (0..)
        .zip(tables.outside_addresses()?)
        .map(|(place, address)| {
            let usage = |class: Class| -> Result<UsageView> {
                let reserved = tables.reserved(class)?;
                let mut used = 0;
                for (parity, set) in (0..).zip(reserved.sets()) {
                    let taken = tables.port_set(set_index(place, class as u32, parity))?;
                    used += taken.taken_beyond(&set, parity).count() as u64;
                }
                let free = (0..=u16::MAX).filter(|port| !reserved.contains(*port));
                Ok(UsageView {
                    used,
                    capacity: u32::try_from(free.count())?,
                })
            };
            Ok(PortsView {
                address,
                tcp: usage(Class::Tcp)?,
                udp: usage(Class::Udp)?,
                icmp: usage(Class::Icmp)?,
            })
        })
        .collect()
}
