//! What guests may say about their link (RFC 4861): about themselves, and not that they
//! are a router or somebody else. What is true goes to the host, as before.

use core::num::NonZeroU32;

use super::Tables;
use crate::{abi::setting_flags, network::Network, verdict::Reason};

/// What a message that keeps a link working claims of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim<A> {
    Nothing,
    /// To be a router, or to know a better one.
    Router,
    /// To have this address.
    Address(A),
}

/// Whether a guest may claim that. `link` is the link address that the message came from,
/// as in [`crate::abi::Guest::link`].
///
/// # Errors
/// The exit of a message that must not reach the host.
#[inline(always)]
pub fn check<A: Network, T: Tables<A>>(
    claim: Claim<A>,
    device: NonZeroU32,
    link: Option<u64>,
    tables: &T,
) -> Result<(), Reason> {
    let address = match claim {
        Claim::Nothing => return Ok(()),
        Claim::Router => return Err(Reason::SpoofedRouter),
        Claim::Address(address) => address,
    };
    let is_hosts = tables
        .device(device.get())
        .is_some_and(|device| device.address == address);
    // An address that has sessions stays with the link address that it has them from.
    let is_anothers = link
        .zip(tables.guest(address))
        .is_some_and(|(link, guest)| guest.sessions != 0 && guest.link != 0 && guest.link != link);
    let may_roam = tables
        .settings()
        .is_some_and(|settings| settings.flags & setting_flags::ROAMING != 0);
    if is_hosts || (is_anothers && !may_roam) {
        return Err(Reason::SpoofedNeighbour);
    }
    Ok(())
}
