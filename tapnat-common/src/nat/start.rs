//! The first packet of a session: from a guest to the world, from a guest to
//! a guest over an outside address, or from the world to a mapping.

use super::{
    Route, Tables, check_size, filter, fragments, mapping, refuse_resources, refuse_time_to_live,
    session::{self, Opening},
};
use crate::{
    abi::{
        EndpointKey, FlowKey, MappingMode, NextHop, Session, Settings, role, session_flags,
    },
    net::{Be16, Be32, protocol},
    parse::{Packet, Part, Transport, tcp_flags},
    rewrite::Rewrite,
    time::Instant,
    verdict::{Reason, Verdict},
};

/// Decides about a packet without a session.
#[inline(never)]
pub(super) fn start<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    now: Instant,
    tables: &T,
) -> Verdict {
    let verdict = match key.arrival.device() {
        Some(device) => from_inside(packet, key, device, now, tables),
        None => from_outside(packet, key, now, tables),
    };
    if packet.part == Part::First
        && let Verdict::Forward(_, _) = verdict
    {
        fragments::remember(packet, key, now, tables);
    }
    verdict
}

#[inline(always)]
fn from_inside<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    device: u32,
    now: Instant,
    tables: &T,
) -> Verdict {
    let (Some(settings), Some(inside)) = (tables.settings(), tables.device(device)) else {
        return Verdict::Pass(Reason::NoMapping);
    };
    if is_multicast(packet) {
        return Verdict::Pass(Reason::NotUnicast);
    }
    if inside.address == packet.source || !packet.source.same_network(inside.address, inside.mask) {
        return Verdict::Drop(Reason::SpoofedSource);
    }
    if packet.destination.is_unroutable() {
        return Verdict::Drop(Reason::UnroutableDestination);
    }
    if settings.is_outside(packet.destination) {
        return hairpin(packet, key, now, tables);
    }
    let (next_hop, linked, mtu) = match tables.route_from(device, packet) {
        Route::Via { next_hop, linked, mtu }
            if tables.device(next_hop.device).is_some_and(|way| way.role == role::UPLINK) =>
        {
            (next_hop, linked, mtu)
        }
        Route::Via { .. } | Route::Local => return Verdict::Pass(Reason::ForTheHost),
        Route::Disabled => return Verdict::Drop(Reason::ForwardingDisabled),
    };
    if let Err(verdict) = may_start(packet, key, settings, tables) {
        return verdict;
    }
    if let Err(verdict) = check_size(packet, mtu, key, tables) {
        return verdict;
    }
    let source = match outside_endpoint(packet, key, device, now, tables) {
        Ok(source) => source,
        Err(reason) => return refuse_resources(reason, key, tables),
    };
    let opening = Opening {
        key,
        source: (source.outside.address, source.outside.port),
        destination: (key.destination, key.destination_port),
        flags: source.flags,
        next_hop,
        linked,
        mtu,
        generation: settings.generation,
    };
    open(&opening, packet, Reason::SessionStarted, now, tables)
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
) -> Result<(), Verdict> {
    if packet.time_to_live <= 1 {
        return Err(refuse_time_to_live(key, tables));
    }
    match packet.transport {
        Transport::Unknown => return Err(Verdict::Drop(Reason::ProtocolNotCarried)),
        Transport::IcmpOther | Transport::IcmpReply | Transport::IcmpError => {
            return Err(Verdict::Drop(Reason::IcmpTypeNotCarried));
        }
        Transport::Tcp => {
            let flags = packet.segment.flags;
            let opens = flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
            // Outwards, a connection from before our time is picked up.
            let goes_on = flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK
                && key.arrival.device().is_some();
            if flags & (tcp_flags::RST | tcp_flags::FIN) != 0 || !(opens || goes_on) {
                return Err(Verdict::Drop(Reason::NoSession));
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
) -> Result<(), Verdict> {
    let Some(guest) = tables.guest(key.source) else {
        return Err(refuse_resources(Reason::GuestTableFull, key, tables));
    };
    let most = settings.guest_max_sessions;
    if most != 0 && guest.sessions >= most {
        guest.refused = guest.refused.wrapping_add(1);
        return Err(refuse_resources(Reason::GuestSessionLimit, key, tables));
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
    device: u32,
    now: Instant,
    tables: &T,
) -> Result<Outside, Reason> {
    let settings = tables.settings().ok_or(Reason::NoOutsideAddress)?;
    let inside = key.source_endpoint();
    if is_unmapped(packet, settings) {
        // The twin's insert decides whether the port is free for this remote.
        let (_, address) = mapping::outside_address(inside.address, settings)?;
        let outside = EndpointKey::new(address, inside.port, inside.protocol);
        return Ok(Outside { outside, flags: session_flags::UNMAPPED });
    }
    let first = if packet.protocol == protocol::TCP {
        session::State::Opening
    } else {
        session::State::OneWay
    };
    let until = now
        .after(session::timeout(packet.protocol, first, &settings.timeouts))
        .after(super::REFRESH_AFTER);
    let outside = mapping::of(&inside, device, (now, until), tables)?;
    if !filter::permit(&outside, key.destination, until, tables) {
        return Err(Reason::MappingTableFull);
    }
    Ok(Outside { outside, flags: 0 })
}

/// A guest sends to an outside address (RFC 4787 REQ-9): to another guest's
/// mapping, or its own, as from its own outside endpoint.
#[inline(never)]
fn hairpin<T: Tables>(packet: &Packet, key: &FlowKey, now: Instant, tables: &T) -> Verdict {
    let (Some(settings), Some(device)) = (tables.settings(), key.arrival.device()) else {
        return Verdict::Pass(Reason::NoMapping);
    };
    let destination = key.destination_endpoint();
    let Some(target) = tables.mapping(&destination).map(|mapping| *mapping) else {
        // The outside address is the host's own, too.
        return Verdict::Pass(Reason::ForTheHost);
    };
    if mapping::is_expired(&target, now) {
        return Verdict::Pass(Reason::ForTheHost);
    }
    if let Err(verdict) = may_start(packet, key, settings, tables) {
        return verdict;
    }
    let source = match outside_endpoint(packet, key, device, now, tables) {
        Ok(source) => source,
        Err(reason) => return refuse_resources(reason, key, tables),
    };
    let remote = source.outside.address;
    if !filter::admits(&destination, &target, remote, settings, (now, tables)) {
        return Verdict::Drop(Reason::Filtered);
    }
    enter(
        packet,
        key,
        (source.outside.address, source.outside.port, source.flags),
        (&target.inside, target.device, Reason::HairpinStarted),
        (now, tables),
    )
}

#[inline(never)]
fn from_outside<T: Tables>(packet: &Packet, key: &FlowKey, now: Instant, tables: &T) -> Verdict {
    let Some(settings) = tables.settings() else { return Verdict::Pass(Reason::NoMapping) };
    let destination = key.destination_endpoint();
    let remote = key.source_endpoint();
    let Some(target) = tables.mapping(&destination).map(|mapping| *mapping) else {
        return Verdict::Pass(Reason::NoMapping);
    };
    if mapping::is_expired(&target, now) {
        return Verdict::Pass(Reason::NoMapping);
    }
    if destination.protocol != protocol::ICMP && tables.host_socket(&destination, &remote) {
        return Verdict::Pass(Reason::HostSocket);
    }
    if !filter::admits(&destination, &target, remote.address, settings, (now, tables)) {
        return Verdict::Drop(Reason::Filtered);
    }
    if let Err(verdict) = may_start(packet, key, settings, tables) {
        return verdict;
    }
    enter(
        packet,
        key,
        (key.source, key.source_port, 0),
        (&target.inside, target.device, Reason::SessionAdmitted),
        (now, tables),
    )
}

/// Opens a session towards a guest.
#[inline(always)]
fn enter<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    (source, source_port, flags): (Be32, Be16, u8),
    (inside, device, reason): (&EndpointKey, u32, Reason),
    (now, tables): (Instant, &T),
) -> Verdict {
    let Some(settings) = tables.settings() else { return Verdict::Pass(Reason::NoMapping) };
    let (next_hop, linked, mtu) = match tables.route_on(device, source, inside.address) {
        Route::Via { next_hop, linked, mtu } => (next_hop, linked, mtu),
        Route::Local => return Verdict::Pass(Reason::NoRoute),
        Route::Disabled => return Verdict::Drop(Reason::ForwardingDisabled),
    };
    if let Err(verdict) = check_size(packet, mtu, key, tables) {
        return verdict;
    }
    let opening = Opening {
        key,
        source: (source, source_port),
        destination: (inside.address, inside.port),
        flags: flags | session_flags::TO_INSIDE,
        next_hop: NextHop { device, ..next_hop },
        linked,
        mtu,
        generation: settings.generation,
    };
    open(&opening, packet, reason, now, tables)
}

/// Makes the session and sends its first packet on.
#[inline(never)]
fn open<T: Tables>(
    opening: &Opening<'_>,
    packet: &Packet,
    reason: Reason,
    now: Instant,
    tables: &T,
) -> Verdict {
    let (forward, back): (Session, Session) = session::halves(opening, packet, now);
    match session::insert(opening.key, &forward, &back, now, tables) {
        Ok(()) => Verdict::Forward(reason, Rewrite::of(&forward, true)),
        Err(Reason::SessionTableFull) => {
            refuse_resources(Reason::SessionTableFull, opening.key, tables)
        }
        // Another CPU had a packet of this session at the same time.
        Err(Reason::SessionConflict) if tables.session(opening.key).is_some() => {
            Verdict::Forward(Reason::Translated, Rewrite::of(&forward, true))
        }
        Err(reason) => Verdict::Drop(reason),
    }
}
