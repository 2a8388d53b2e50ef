//! Outside addresses on the uplink: those that the operator gave and that no device of the host has
//! are put there, so that the host answers for them, and taken away again when nobody wants them any
//! more. Knows them by the journal; what is translated to them is the tables' business.

use std::net::IpAddr;

use anyhow::{Result, bail};
use ipnet::IpNet;
use tapnat_common::abi::mapping_flags;

use crate::{
    changes::RealHost,
    family::IpFamily,
    host::netlink::{Device, Link},
    journal::{Change, Journal},
    tables::PinnedTables,
};

/// The addresses that static mappings were made for.
///
/// # Errors
///
/// When the kernel refuses.
pub fn of_statics<A: IpFamily>(tables: &PinnedTables<A>) -> Result<Vec<IpAddr>> {
    let mut addresses: Vec<IpAddr> = tables
        .static_mappings()?
        .iter()
        .filter(|(_, mapping)| mapping.flags & mapping_flags::MOVES == 0)
        .map(|(outside, _)| outside.address.into())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

fn change(uplink: &Device, address: IpAddr) -> Change {
    Change::AddAddress {
        device: uplink.clone(),
        address: address.into(),
        peer: None,
    }
}

/// Whether it is an address without a network.
fn is_alone(net: IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

fn is_ours(journal: &Journal, wanted: &Change) -> bool {
    journal.changes().any(|made| made.same_target(wanted))
}

/// The links without the addresses that were put on the uplink here: only what others put there is
/// the uplink's own.
#[must_use]
pub fn without_ours(mut links: Vec<Link>, uplink: &Device, journal: &Journal) -> Vec<Link> {
    for link in links.iter_mut().filter(|link| link.index == uplink.index) {
        link.addresses.retain(|address| {
            let net = address.net;
            !is_alone(net) || !is_ours(journal, &change(uplink, net.addr()))
        });
    }
    links
}

fn is_there(links: &[Link], address: IpAddr) -> bool {
    let mut all = links.iter().flat_map(|link| &link.addresses);
    all.any(|it| it.net.addr() == address)
}

/// Refuses addresses of the host's routers, while everything is as it was: with such a one on itself
/// the host would reach nothing any more.
///
/// # Errors
///
/// When there is one among the `wanted`, or the kernel does not tell.
pub async fn check(wanted: &[IpAddr], host: &RealHost) -> Result<()> {
    let links = host.netlink().links().await?;
    refuse_routers(wanted, &links, host).await
}

async fn refuse_routers(wanted: &[IpAddr], links: &[Link], host: &RealHost) -> Result<()> {
    let new: Vec<_> = wanted.iter().filter(|it| !is_there(links, **it)).collect();
    if new.is_empty() {
        return Ok(());
    }
    let routers = host.netlink().routers().await?;
    if let Some(address) = new.into_iter().find(|it| routers.contains(it)) {
        bail!(
            "{address} cannot be an outside address: it is a router's, which routes of the host lead \
             by (`ip route`), and on the host itself would cut it off; take an address that nobody has"
        );
    }
    Ok(())
}

/// Puts the `wanted` addresses on the uplink, as far as no device has them, and takes away those that
/// were put there before and are neither wanted nor to be `kept`. Returns what was left alone, and
/// why.
///
/// # Errors
///
/// When one of them is a router's, the kernel refuses, or the journal cannot be written.
pub async fn settle(
    wanted: &[IpAddr],
    kept: &[IpAddr],
    uplink: &Device,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<Vec<String>> {
    let links = host.netlink().links().await?;
    if links.iter().any(|link| link.index == uplink.index) {
        refuse_routers(wanted, &links, host).await?;
        for address in wanted {
            let change = change(uplink, *address);
            let is_there = is_there(&links, *address);
            journal.make_unless(is_there, change, host).await?;
        }
    }
    journal
        .revert_matching(
            |made| {
                matches!(made, Change::AddAddress { device, address, peer: _ }
                    if device.index == uplink.index
                        && !wanted.contains(&address.addr())
                        && !kept.contains(&address.addr()))
            },
            host,
        )
        .await
}
