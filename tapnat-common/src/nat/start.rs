//! The first packet of a session: from a guest to the world, from a guest to
//! a guest over an outside address, or from the world to a mapping.

use core::num::NonZeroU32;

use super::{
    Route, Tables, check_size, filter, mapping,
    session::{self, Opening},
};
use crate::{
    abi::{
        EndpointKey, FlowKey, Mapping, MappingMode, NextHop, Settings, role, session_flags,
    },
    net::{Be32, protocol},
    parse::{Packet, Transport, tcp_flags},
    rewrite::Rewrite,
    verdict::{Plan, Reason},
};

/// Decides about a packet without a session.
#[inline(always)]
pub fn start<T: Tables>(
    packet: &Packet,
    device: Option<NonZeroU32>,
    tables: &T,
    plan: &mut Plan,
) -> Reason {
    let key = packet.key(device);
    match device {
        Some(device) => from_inside(packet, &key, device, tables, plan),
        None => from_outside(packet, &key, tables, plan),
    }
}

/// Where a session from inside leads.
struct Way {
    next_hop: NextHop,
    linked: bool,
    mtu: u16,
    /// The guest's endpoint behind an outside one (RFC 4787 REQ-9), or the
    /// packet's own destination.
    destination: EndpointKey,
    flags: u8,
    reason: Reason,
}

#[inline(always)]
fn from_inside<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    device: NonZeroU32,
    tables: &T,
    plan: &mut Plan,
) -> Reason {
    let (Some(settings), Some(inside)) = (tables.settings(), tables.device(device.get())) else {
        return Reason::NoMapping;
    };
    if is_multicast(packet) {
        return Reason::NotUnicast;
    }
    if inside.address == packet.source || !packet.source.same_network(inside.address, inside.mask) {
        return Reason::SpoofedSource;
    }
    if packet.destination.is_unroutable() {
        return Reason::UnroutableDestination;
    }
    let hairpin = settings.is_outside(packet.destination);
    let way = if hairpin { way_back(key, tables) } else { way_out(packet, key, device, tables) };
    let way = match way {
        Ok(way) => way,
        Err(reason) => return reason,
    };
    if let Err(reason) = may_start(packet, key, settings, tables) {
        return reason;
    }
    if let Err(reason) = check_size(packet, way.mtu, plan) {
        return reason;
    }
    let source = match outside_endpoint(packet, key, device, tables) {
        Ok(source) => source,
        Err(reason) => return reason,
    };
    if hairpin && !filter::admits(&key.destination_endpoint(), source.outside.address, tables) {
        return Reason::Filtered;
    }
    let opening = Opening {
        key,
        source: (source.outside.address, source.outside.port),
        destination: (way.destination.address, way.destination.port),
        flags: way.flags | source.flags,
        next_hop: way.next_hop,
        linked: way.linked,
        mtu: way.mtu,
        generation: settings.generation,
    };
    open(&opening, packet, way.reason, tables, plan)
}

/// To the world, if the route leaves by an uplink.
#[inline(always)]
fn way_out<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    device: NonZeroU32,
    tables: &T,
) -> Result<Way, Reason> {
    match tables.route_from(device, packet) {
        Route::Via { next_hop, linked, mtu }
            if tables.device(next_hop.device).is_some_and(|way| way.role == role::UPLINK) =>
        {
            Ok(Way {
                next_hop,
                linked,
                mtu,
                destination: key.destination_endpoint(),
                flags: 0,
                reason: Reason::SessionStarted,
            })
        }
        Route::Via { .. } | Route::Local => Err(Reason::ForTheHost),
        Route::Disabled => Err(Reason::ForwardingDisabled),
    }
}

/// To the guest that has the outside endpoint. Without one it is the host's:
/// the outside address is its own, too.
#[inline(always)]
fn way_back<T: Tables>(key: &FlowKey, tables: &T) -> Result<Way, Reason> {
    let target = tables.mapping(&key.destination_endpoint()).ok_or(Reason::ForTheHost)?;
    if mapping::is_expired(target, tables.now()) {
        return Err(Reason::ForTheHost);
    }
    way_in(target, key.source, Reason::HairpinStarted, tables)
}

/// To the guest that a mapping stands for.
#[inline(always)]
fn way_in<T: Tables>(
    target: &Mapping,
    source: Be32,
    reason: Reason,
    tables: &T,
) -> Result<Way, Reason> {
    let destination = target.inside;
    let device = target.device;
    match tables.route_on(device, source, destination.address) {
        Route::Via { next_hop, linked, mtu } => Ok(Way {
            next_hop: NextHop { device, ..next_hop },
            linked,
            mtu,
            destination,
            flags: session_flags::TO_INSIDE,
            reason,
        }),
        Route::Local => Err(Reason::NoRoute),
        Route::Disabled => Err(Reason::ForwardingDisabled),
    }
}

#[inline(always)]
const fn is_multicast(packet: &Packet) -> bool {
    let [first, ..] = packet.destination.bytes();
    first >= 224
}

/// What any first packet must fulfil, wherever it comes from.
#[inline(always)]
fn may_start<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    settings: &Settings,
    tables: &T,
) -> Result<(), Reason> {
    if packet.time_to_live <= 1 {
        return Err(Reason::TimeToLiveExceeded);
    }
    match packet.transport {
        Transport::Unknown => return Err(Reason::ProtocolNotCarried),
        Transport::IcmpOther | Transport::IcmpReply | Transport::IcmpError => {
            return Err(Reason::IcmpTypeNotCarried);
        }
        Transport::Tcp => {
            let flags = packet.segment.flags;
            let opens = flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
            // Outwards, a connection from before our time is picked up.
            let goes_on = flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK
                && key.arrival.device().is_some();
            if flags & (tcp_flags::RST | tcp_flags::FIN) != 0 || !(opens || goes_on) {
                return Err(Reason::NoSession);
            }
        }
        Transport::Udp
        | Transport::IcmpQuery
        | Transport::PortsFixed
        | Transport::AddressOnly => {}
    }
    if key.arrival.device().is_some() {
        may_have_more(key, settings, tables)?;
    }
    Ok(())
}

/// Whether the guest may have one more session (RFC 6888 REQ-4).
#[inline(always)]
fn may_have_more<T: Tables>(
    key: &FlowKey,
    settings: &Settings,
    tables: &T,
) -> Result<(), Reason> {
    let Some(guest) = tables.guest(key.source) else {
        return Err(Reason::GuestTableFull);
    };
    let most = settings.guest_max_sessions;
    if most != 0 && guest.sessions >= most {
        guest.refused = guest.refused.wrapping_add(1);
        return Err(Reason::GuestSessionLimit);
    }
    Ok(())
}

/// The outside endpoint of a new session, and its flags.
struct Outside {
    outside: EndpointKey,
    flags: u8,
}

/// Whether this session goes without an endpoint-independent mapping.
#[inline(always)]
const fn is_unmapped(packet: &Packet, settings: &Settings) -> bool {
    match packet.transport {
        Transport::PortsFixed | Transport::AddressOnly => true,
        Transport::Tcp | Transport::Udp => match settings.mapping(packet.protocol) {
            MappingMode::EndpointIndependent => false,
            MappingMode::AddressAndPortDependent => true,
        },
        Transport::IcmpQuery
        | Transport::IcmpReply
        | Transport::IcmpError
        | Transport::IcmpOther
        | Transport::Unknown => false,
    }
}

#[inline(always)]
fn outside_endpoint<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    device: NonZeroU32,
    tables: &T,
) -> Result<Outside, Reason> {
    let settings = tables.settings().ok_or(Reason::NoOutsideAddress)?;
    let inside = key.source_endpoint();
    if is_unmapped(packet, settings) {
        // The twin's insert decides whether the port is free for this remote.
        let pool = mapping::outside_address(inside.address, settings)?;
        let outside = EndpointKey::new(pool.address, inside.port, inside.protocol);
        return Ok(Outside { outside, flags: session_flags::UNMAPPED });
    }
    let first = if packet.protocol == protocol::TCP {
        session::State::Opening
    } else {
        session::State::OneWay
    };
    let until = tables
        .now()
        .after(session::timeout(packet.protocol, first, &settings.timeouts))
        .after(super::REFRESH_AFTER);
    let outside = mapping::of(&inside, device, until, tables)?;
    if !filter::permit(&outside, key.destination, until, tables) {
        return Err(Reason::MappingTableFull);
    }
    Ok(Outside { outside, flags: 0 })
}

#[inline(always)]
fn from_outside<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    tables: &T,
    plan: &mut Plan,
) -> Reason {
    let destination = key.destination_endpoint();
    let remote = key.source_endpoint();
    let (Some(settings), Some(target)) = (tables.settings(), tables.mapping(&destination)) else {
        return Reason::NoMapping;
    };
    if mapping::is_expired(target, tables.now()) {
        return Reason::NoMapping;
    }
    if destination.protocol != protocol::ICMP && tables.host_socket(&destination, &remote) {
        return Reason::HostSocket;
    }
    if !filter::admits(&destination, remote.address, tables) {
        return Reason::Filtered;
    }
    if let Err(reason) = may_start(packet, key, settings, tables) {
        return reason;
    }
    let way = match way_in(target, key.source, Reason::SessionAdmitted, tables) {
        Ok(way) => way,
        Err(reason) => return reason,
    };
    if let Err(reason) = check_size(packet, way.mtu, plan) {
        return reason;
    }
    let opening = Opening {
        key,
        source: (key.source, key.source_port),
        destination: (way.destination.address, way.destination.port),
        flags: way.flags,
        next_hop: way.next_hop,
        linked: way.linked,
        mtu: way.mtu,
        generation: settings.generation,
    };
    open(&opening, packet, way.reason, tables, plan)
}

/// Makes the session and sends its first packet on.
#[inline(never)]
fn open<T: Tables>(
    opening: &Opening<'_>,
    packet: &Packet,
    reason: Reason,
    tables: &T,
    plan: &mut Plan,
) -> Reason {
    plan.halves = session::halves(opening, packet, tables.now());
    let [forward, back] = &plan.halves;
    plan.rewrite = Rewrite::of(forward, true);
    match session::insert(opening.key, forward, back, tables) {
        Ok(()) => reason,
        // Another CPU had a packet of this session at the same time.
        Err(Reason::SessionConflict) if tables.session(opening.key).is_some() => Reason::Translated,
        Err(reason) => reason,
    }
}
