//! What the operator denies to guests: destinations, each other, the host; and where
//! they go under their own addresses. Asked when a session starts, and again when the settings have changed; packets of a session
//! pay nothing for it.

use core::num::NonZeroU32;

use super::Tables;
use crate::{
    abi::{FlowKey, Guest, Session, Settings, session_flags, setting_flags},
    net::{Be32, protocol},
    parse::{Packet, Transport, tcp_flags},
    verdict::Reason,
};

/// Where DHCP servers listen (RFC 2131 section 4.1).
const DHCP_SERVER: u16 = 67;

/// Whether a guest must not begin to send there.
#[inline(always)]
pub(super) fn denies<T: Tables>(destination: Be32, settings: &Settings, tables: &T) -> bool {
    settings.flags & setting_flags::DENY != 0 && tables.is_denied(destination)
}

/// Whether guests reach this destination under their own addresses (RFC 6888
/// REQ-6).
#[inline(always)]
pub(super) fn exempts<T: Tables>(destination: Be32, settings: &Settings, tables: &T) -> bool {
    settings.flags & setting_flags::UNTRANSLATED != 0 && tables.is_untranslated(destination)
}

/// Whether these guests must not reach each other.
#[inline(always)]
pub(super) fn isolates(one: Be32, other: Be32, settings: &Settings) -> bool {
    settings.flags & setting_flags::ISOLATE != 0 && one != other
}

/// Whether a session that is there must not be any more, since the settings have
/// changed. What came in by a forward is not a guest's doing.
#[inline(always)]
pub(super) fn denies_session<T: Tables>(
    key: &FlowKey,
    session: &Session,
    settings: &Settings,
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

/// Whether guests' packets that are not IPv4 are kept from the host, too. ARP is not.
#[inline(always)]
pub fn keeps_from_host<T: Tables>(device: Option<NonZeroU32>, tables: &T) -> bool {
    device.is_some()
        && tables
            .settings()
            .is_some_and(|settings| settings.flags & setting_flags::DENY_HOST != 0)
}

/// The exit of a guest's packet that is the host's, or goes to a network that only
/// the host knows: `reason`, or that the host is denied to guests.
///
/// Answers to what the host began do get there, and so does DHCP, without which a
/// guest has no address.
#[inline(always)]
pub(super) fn to_host(packet: &Packet, reason: Reason, settings: &Settings) -> Reason {
    if settings.flags & setting_flags::DENY_HOST == 0 {
        return reason;
    }
    let opens = packet.segment.flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    let may_pass = match packet.transport {
        Transport::Tcp => !opens,
        Transport::Udp => {
            packet.protocol == protocol::UDP && packet.destination_port.get() == DHCP_SERVER
        }
        Transport::IcmpReply | Transport::IcmpError => true,
        Transport::IcmpQuery
        | Transport::IcmpOther
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
pub(super) fn check_link(
    guest: &mut Guest,
    link: Option<u64>,
    settings: &Settings,
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
