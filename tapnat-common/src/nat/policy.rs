//! What the operator denies to guests: destinations, each other, the host; and where
//! they go under their own addresses. Asked when a session starts, and again when the settings have changed; packets of a session
//! pay nothing for it.

use core::num::NonZeroU32;

use super::Tables;
use crate::{
    abi::{FlowKey, Guest, Session, Settings, session_flags, setting_flags},
    net::protocol,
    network::Network,
    parse::{Packet, Transport, tcp_flags},
    verdict::Reason,
};

/// Whether a guest must not begin to send there.
#[inline(always)]
pub(super) fn denies<A: Network, T: Tables<A>>(
    destination: A,
    settings: &Settings<A>,
    tables: &T,
) -> bool {
    settings.flags & setting_flags::DENY != 0 && tables.is_denied(destination)
}

/// Whether guests reach this destination under their own addresses (RFC 6888
/// REQ-6).
#[inline(always)]
pub(super) fn exempts<A: Network, T: Tables<A>>(
    destination: A,
    settings: &Settings<A>,
    tables: &T,
) -> bool {
    settings.flags & setting_flags::UNTRANSLATED != 0 && tables.is_untranslated(destination)
}

/// Whether these guests must not reach each other over outside addresses, as the world
/// does.
#[inline(always)]
pub(super) fn isolates<A: Network>(one: A, other: A, settings: &Settings<A>) -> bool {
    settings.flags & setting_flags::ISOLATE != 0 && one != other
}

/// Whether these guests must not reach each other under their own addresses, through the
/// host.
#[inline(always)]
pub(super) fn separates<A: Network>(one: A, other: A, settings: &Settings<A>) -> bool {
    settings.flags & setting_flags::ROUTE_GUESTS == 0 && one != other
}

/// Whether a session that is there must not be any more, since the settings have
/// changed. What came in by a forward is not a guest's doing.
#[inline(always)]
pub(super) fn denies_session<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    session: &Session<A>,
    settings: &Settings<A>,
    tables: &T,
) -> bool {
    let is_inward = session.flags & session_flags::TO_INSIDE != 0;
    let from_inside = key.arrival.device().is_some();
    if is_inward && from_inside {
        return isolates(key.source, session.destination, settings);
    }
    let is_initiator = session.flags & session_flags::INITIATOR != 0;
    let remote = if from_inside {
        session.destination
    } else {
        key.source
    };
    is_initiator == from_inside && denies(remote, settings, tables)
}

/// Whether guests' packets that are not IP are kept from the host, too. ARP is not.
#[inline(always)]
pub fn keeps_from_host<A: Network, T: Tables<A>>(device: Option<NonZeroU32>, tables: &T) -> bool {
    device.is_some()
        && tables
            .settings()
            .is_some_and(|settings| settings.flags & setting_flags::DENY_HOST != 0)
}

/// The exit of a guest's packet that is the host's, or goes to a network that only
/// the host knows: `reason`, or that the host is denied to guests.
///
/// Answers to what the host began do get there, and so do DHCP and what keeps a link
/// working, without which a guest has no address.
#[inline(always)]
pub(super) fn to_host<A: Network>(
    packet: &Packet<A>,
    reason: Reason,
    settings: &Settings<A>,
) -> Reason {
    if settings.flags & setting_flags::DENY_HOST == 0 {
        return reason;
    }
    let opens = packet.segment.flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    let may_pass = match packet.transport {
        Transport::Tcp => !opens,
        Transport::Udp => {
            packet.protocol == protocol::UDP && packet.destination_port.get() == A::DHCP_SERVER
        }
        Transport::IcmpReply | Transport::IcmpError => true,
        Transport::IcmpOther => A::is_link_upkeep(packet.icmp_type),
        Transport::IcmpQuery
        | Transport::PortsFixed
        | Transport::AddressOnly
        | Transport::Unknown => false,
    };
    if may_pass { reason } else { Reason::HostDenied }
}

/// Notes from which link address a guest sends. An address that has sessions stays
/// with the link address that it has them from.
///
/// # Errors
/// When it comes from another one.
#[inline(always)]
pub(super) fn check_link<A: Network>(
    guest: &mut Guest,
    link: Option<u64>,
    settings: &Settings<A>,
) -> Result<(), Reason> {
    let Some(link) = link else { return Ok(()) };
    if guest.link == link {
        return Ok(());
    }
    let is_fixed = settings.flags & setting_flags::ROAMING == 0;
    if is_fixed && guest.link != 0 && guest.sessions != 0 {
        return Err(Reason::SpoofedLinkAddress);
    }
    guest.link = link;
    Ok(())
}
