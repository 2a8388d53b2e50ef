//! What a device needs so that the host is its guests' IPv6 router: kernel parameters of that device
//! alone. Those of all devices are not touched, and other devices lose nothing by it.

use anyhow::{Context as _, Result};

use super::prepare::set_sysctl;
use crate::{
    changes::{RealHost, read_sysctl},
    host::sysctl::Sysctl,
    journal::{Change, Journal},
    notice::warn,
};

/// The value of `accept_ra` that stands for "unless the host forwards".
const UNLESS_FORWARDING: &str = "1";
const ALWAYS: &str = "2";

/// Gets a device ready for IPv6 addresses.
pub(super) async fn prepare(device: &str, host: &RealHost, journal: &mut Journal) -> Result<()> {
    let parameters = [
        (Sysctl::disable_ipv6(device), "0"),
        // The host is the router there, and no guest is the host's.
        (Sysctl::accept_router_advertisements(device), "0"),
        // The link-local address, by which guests know their router, is of use at once, and no guest
        // can deny it to the host.
        (Sysctl::detect_duplicate_addresses(device), "0"),
        (Sysctl::keep_addresses_on_down(device), "1"),
    ];
    for (sysctl, value) in parameters {
        set_sysctl(&sysctl, value, host, journal)
            .await
            .with_context(|| {
                format!(
                    "{device} can have no IPv6 network: give it IPv4 only, or let the kernel have \
                     IPv6 (without ipv6.disable=1)"
                )
            })?;
    }
    Ok(())
}

/// Makes the host a router on a device.
///
/// Thereby the kernel forgets the routes that routers have advertised on *all* devices
/// (`addrconf_fixup_forwarding()` in `net/ipv6/addrconf.c` calls `rt6_purge_dflt_routers()`), and the
/// host would be without a way to the world until its router speaks again. Devices that take
/// advertisements also when the host forwards keep theirs, so for that moment they do.
pub(super) async fn set_forwarding(
    device: &str,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<()> {
    let forwarding = Sysctl::forwarding_ipv6(device);
    if read_sysctl(&forwarding)? == "1" {
        return set_sysctl(&forwarding, "1", host, journal).await;
    }
    let advertised_to = host.netlink().advertised_to().await?;
    let links = host.netlink().links().await?;
    let mut protected = Vec::new();
    for link in links
        .iter()
        .filter(|link| advertised_to.contains(&link.index) && link.name != device)
    {
        let sysctl = Sysctl::accept_router_advertisements(&link.name);
        // One that is gone meanwhile has nothing to lose.
        if sysctl.read().is_ok_and(|value| value == UNLESS_FORWARDING) {
            set_sysctl(&sysctl, ALWAYS, host, journal).await?;
            protected.push(sysctl);
        }
    }
    let made = set_sysctl(&forwarding, "1", host, journal).await;
    let is_protection = |change: &Change| protected.iter().any(|sysctl| change.sets(sysctl));
    for note in journal.revert_matching(is_protection, host).await? {
        warn(&note);
    }
    made
}
