//! Which packets have their prefix translated (RFC 6296), and where they go. There are no
//! sessions, so that each packet is decided about by itself, fragments too, and both sides
//! may begin.
//!
//! What is between a guest and the host, or between two inside networks, is left to the
//! rest of the NAT. The arithmetic is [`crate::nptv6`]'s.

use core::num::NonZeroU32;

use super::{Fate, Route, Tables, check_size, policy, start::check_ends};
use crate::{
    abi::{MAX_PREFIX_PAIRS, role},
    frame::{Frame, lengths},
    net::{Address as _, Be128},
    network::Network as _,
    nptv6::{Direction, PrefixPair},
    parse::{Packet, Transport},
    rewrite,
    verdict::{Next, Plan, Reason},
};

/// Offsets in IPv6's header.
const NEXT_HEADER: u32 = 6;

/// The pairs that a packet is translated by: of its source, of its destination. Between two
/// guests there are both (RFC 6296 section 4.3).
#[derive(Clone, Copy, Debug, Default)]
pub struct Pairs<'a> {
    out: Option<&'a PrefixPair>,
    into: Option<&'a PrefixPair>,
}

/// Whether an IPv6 frame comes from an internal prefix, or goes to an external one from
/// outside. `device`: the index of the inside device that it arrived on, or `None`.
#[inline(always)]
pub fn concern<F: Frame, T: Tables<Be128>>(
    frame: &F,
    device: Option<NonZeroU32>,
    tables: &T,
) -> bool {
    let offset = frame.link_length();
    let address = if device.is_some() {
        Be128::read_source(frame, offset)
    } else {
        Be128::read_destination(frame, offset)
    };
    let Some(address) = address else {
        return false;
    };
    let pair = if device.is_some() {
        find(tables, |pair| pair.has_internal(address))
    } else {
        find(tables, |pair| pair.has_external(address))
    };
    pair.is_some()
}

/// Decides about a packet that they [`concern`]. Returns by what it is translated; the plan
/// says where it goes then.
///
/// # Errors
/// What becomes of it otherwise.
#[inline(always)]
pub fn decide<'a, T: Tables<Be128>>(
    packet: &Packet<Be128>,
    device: Option<NonZeroU32>,
    tables: &'a T,
    plan: &mut Plan<Be128>,
) -> Result<Pairs<'a>, Next> {
    let is_upkeep =
        packet.transport == Transport::IcmpOther && Be128::is_link_upkeep(packet.icmp_type);
    if is_upkeep || packet.source.is_link_local() {
        return Err(leave_alone(packet));
    }
    if packet.transport == Transport::IcmpError
        && packet.length < packet.header_length + lengths::ICMP + lengths::IPV6
    {
        return Err(Next::Leave(Reason::ErrorUnusable));
    }
    let (pairs, route) = match device {
        Some(device) => from_inside(packet, device, tables)?,
        None => from_outside(packet, tables)?,
    };
    if packet.time_to_live <= 1 {
        return Err(Next::Leave(Reason::TimeToLiveExceeded));
    }
    check_size(packet, route.mtu, packet.destination, plan).map_err(Next::Leave)?;
    plan.rewrite.next_hop = route.next_hop;
    // There is no session that would notice when the neighbour is another.
    plan.rewrite.resolve = true;
    Ok(pairs)
}

#[inline(always)]
fn from_inside<'a, T: Tables<Be128>>(
    packet: &Packet<Be128>,
    device: NonZeroU32,
    tables: &'a T,
) -> Result<(Pairs<'a>, Route), Next> {
    let (Some(settings), Some(inside)) = (tables.settings(), tables.device(device.get())) else {
        return Err(Next::Leave(Reason::NoMapping));
    };
    check_ends(packet, inside, settings, false, tables).map_err(Next::Leave)?;
    let out = find(tables, |pair| pair.has_internal(packet.source));
    let into = find(tables, |pair| pair.has_external(packet.destination));
    if let Some(into) = into
        && let Ok(internal) = into.translate_in(packet.destination)
        && let Some(way) = tables.inside_device(internal)
        && !tables.is_outside(packet.destination)
    {
        if policy::isolates(packet.source, internal, settings) {
            return Err(Next::Leave(Reason::GuestIsolated));
        }
        let route = route_in(way, packet.source, internal, tables)?;
        let into = Some(into);
        return Ok((Pairs { out, into }, route));
    }
    let route = tables.route_from(device, packet);
    let leaves = route.fate == Fate::Onward
        && tables
            .device(route.next_hop.device)
            .is_some_and(|way| way.role == role::UPLINK);
    if !leaves {
        return Err(leave_alone(packet));
    }
    Ok((Pairs { out, into: None }, route))
}

#[inline(always)]
fn from_outside<'a, T: Tables<Be128>>(
    packet: &Packet<Be128>,
    tables: &'a T,
) -> Result<(Pairs<'a>, Route), Next> {
    let leave = |reason| Err(Next::Leave(reason));
    let Some(settings) = tables.settings() else {
        return leave(Reason::NoMapping);
    };
    // The host's own address on a link that has the external prefix.
    if tables.is_outside(packet.destination) {
        return Err(leave_alone(packet));
    }
    if packet.source.is_unroutable()
        || tables.inside_device(packet.source).is_some()
        || find(tables, |pair| pair.has_internal(packet.source)).is_some()
    {
        return leave(Reason::SpoofedSource);
    }
    if policy::denies(packet.source, settings, tables) {
        return leave(Reason::Filtered);
    }
    let into = find(tables, |pair| pair.has_external(packet.destination));
    // Left to the host, what is for nobody would go back to where it came from.
    let Some(Ok(internal)) = into.map(|pair| pair.translate_in(packet.destination)) else {
        return leave(Reason::PrefixUntranslatable);
    };
    let Some(way) = tables.inside_device(internal) else {
        return leave(Reason::PrefixUntranslatable);
    };
    let route = route_in(way, packet.source, internal, tables)?;
    Ok((Pairs { out: None, into }, route))
}

/// The way to an internal address, out of the inside device with this index.
#[inline(always)]
fn route_in<T: Tables<Be128>>(
    device: u32,
    source: Be128,
    internal: Be128,
    tables: &T,
) -> Result<Route, Next> {
    let mut route = tables.route_on(device, source, internal);
    route.next_hop.device = device;
    match route.fate {
        Fate::Onward => Ok(route),
        // The host's own address there, or the device is down.
        Fate::Local => Err(Next::Leave(Reason::PrefixUntranslatable)),
        Fate::Disabled => Err(Next::Leave(Reason::ForwardingDisabled)),
    }
}

/// Translates a packet that was decided about, and what it quotes if it is an ICMPv6
/// error. No checksum changes, but for that of a TCP segment whose options do.
#[inline(always)]
pub fn translate<F: Frame, T: Tables<Be128>>(
    frame: &mut F,
    packet: &Packet<Be128>,
    pairs: Pairs<'_>,
    tables: &T,
) -> Reason {
    match carry_out(frame, packet, pairs, tables) {
        Some(Ok(())) => Reason::PrefixTranslated,
        Some(Err(reason)) => reason,
        None => Reason::RewriteFailed,
    }
}

#[inline(always)]
fn carry_out<F: Frame, T: Tables<Be128>>(
    frame: &mut F,
    packet: &Packet<Be128>,
    pairs: Pairs<'_>,
    tables: &T,
) -> Option<Result<(), Reason>> {
    let quoted = packet.transport_offset() + lengths::ICMP;
    // The destination was translated already, when it was decided about.
    for (pair, direction) in [(pairs.out, Direction::Out), (pairs.into, Direction::In)] {
        let Some(pair) = pair else { continue };
        let is_possible = pair.apply(frame, packet.network_offset, direction, false)?;
        if is_possible.is_err() {
            return Some(Err(Reason::PrefixUntranslatable));
        }
        if packet.transport == Transport::IcmpError {
            // Whatever it quotes may have nothing to do with this network.
            let _ = pair.apply(frame, quoted, direction, true)?;
        }
    }
    let at = packet.network_offset + NEXT_HEADER;
    let [next, hops] = frame.read::<[u8; 2]>(at)?;
    frame.overwrite(at, &[next, hops.wrapping_sub(1)])?;
    if let Some(settings) = tables.settings()
        && settings.clamp_mss != 0
    {
        rewrite::clamp_segment_size(frame, packet, settings.clamp_mss)?;
    }
    Some(Ok(()))
}

/// What becomes of a packet that has nothing to do with the world.
#[inline(always)]
fn leave_alone(packet: &Packet<Be128>) -> Next {
    if packet.transport == Transport::IcmpError {
        Next::Error
    } else {
        Next::Resume
    }
}

#[inline(always)]
fn find<T: Tables<Be128>>(tables: &T, wanted: impl Fn(&PrefixPair) -> bool) -> Option<&PrefixPair> {
    for place in 0..MAX_PREFIX_PAIRS {
        let pair = tables.prefix_pair(place)?;
        if wanted(pair) {
            return Some(pair);
        }
        if !pair.is_set() {
            break;
        }
    }
    None
}
