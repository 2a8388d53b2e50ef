//! Endpoint-independent mappings and the choice of outside ports.

use super::{Insert, Tables, session, upkeep};
use crate::{
    abi::{Arrival, EndpointKey, FlowKey, Mapping, Settings, held_port, mapping_flags},
    net::{Be16, protocol},
    network::Network,
    parse::Packet,
    ports::set_index,
    time::{Instant, Ticks},
    verdict::{Opening, Reason},
};

/// Free ports of a set that are tried before the search gives up: the sets are
/// hints, and each miss corrects one.
const TRIES: u32 = 4;

/// Ports looked at for an expired mapping when the sets say that all are taken:
/// without user space's sweep nobody else gives them back.
const EXPIRED_TRIES: u32 = 8;

/// Ports from here on are a range of their own, apart from the low ones.
const HIGH: u16 = 1024;

/// Ports tried for a session without a mapping.
const UNMAPPED_TRIES: u32 = 16;

/// Whether the mapping no longer counts.
#[inline(always)]
pub(super) fn is_expired<A: Network>(mapping: &Mapping<A>, now: Instant) -> bool {
    mapping.flags & mapping_flags::STATIC == 0 && !now.is_before(mapping.expires_at)
}

/// Lets the mapping end by `until` if it has no other session.
#[inline(always)]
pub(super) fn end_by<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    until: Instant,
    tables: &T,
) {
    if let Some(mapping) = tables.mapping(outside)
        && mapping.sessions <= 1
        && until.is_before(mapping.expires_at)
    {
        mapping.expires_at = until;
    }
}

/// Ends a mapping whose last session is over: it was to outlive that (see
/// [`Settings::mapping_slack`]), or was kept by one that was cut short.
#[inline(always)]
pub(super) fn end_if_unused<A: Network, T: Tables<A>>(mapping: &mut Mapping<A>, tables: &T) {
    let now = tables.now();
    if let Some(settings) = tables.settings()
        && mapping.sessions == 0
    {
        let slack = settings.mapping_slack();
        let left = mapping.expires_at.since(now);
        if left > slack {
            // Another CPU may just have kept it for a session that it is opening,
            // which will keep it again.
            mapping.expires_at = now.after(slack);
        } else if left > Ticks::default() {
            mapping.expires_at = now;
        }
    }
}

/// Lets the mapping live until `until` at least; one session alone also decides
/// when it ends.
#[inline(always)]
pub(super) const fn keep<A: Network>(mapping: &mut Mapping<A>, until: Instant) {
    if mapping.sessions <= 1 || mapping.expires_at.is_before(until) {
        mapping.expires_at = until;
    }
}

/// An outside address and its place in the pool.
pub(super) struct OutsideAddress<A> {
    pub index: u32,
    pub address: A,
}

/// The outside address of a guest: always the same one (paired pooling, RFC
/// 4787 REQ-2).
#[inline(always)]
pub(super) fn outside_address<A: Network>(
    inside: A,
    settings: &Settings<A>,
) -> Result<OutsideAddress<A>, Reason> {
    // Fibonacci hashing spreads neighbouring guests over the pool; the product
    // with the pool's size then has the place in its upper half.
    let hash = u64::from(inside.low_bits().wrapping_mul(0x9e37_79b9));
    let index = (hash * u64::from(settings.outside_count)) >> 32;
    match settings.outside.get(index as usize) {
        Some(address) if settings.outside_count != 0 && *address != A::UNSPECIFIED => {
            Ok(OutsideAddress {
                index: index as u32,
                address: *address,
            })
        }
        Some(_) | None => Err(Reason::NoOutsideAddress),
    }
}

/// Whether guests are no longer translated to the mapping's outside address.
#[inline(always)]
fn is_lost<A: Network, T: Tables<A>>(
    mapping: &Mapping<A>,
    outside: &EndpointKey<A>,
    tables: &T,
) -> bool {
    mapping.flags & mapping_flags::STATIC == 0 && !tables.is_outside(outside.address)
}

/// The outside endpoint for a session: of the mapping that is there, or of a
/// new one.
#[inline(always)]
pub(super) fn of<A: Network, T: Tables<A>>(
    opening: &Opening<A>,
    tables: &T,
) -> Result<EndpointKey<A>, Reason> {
    let inside = opening.inside;
    if let Some(outside) = tables.outside_of(&inside)
        && let Some(mapping) = tables.mapping(&outside)
        && mapping.inside == inside
    {
        if !is_lost(mapping, &outside, tables) {
            // Also one that is expired: nobody else has taken its port.
            mapping.device = opening.device;
            mapping.expires_at = mapping.expires_at.later_of(opening.until);
            return Ok(outside);
        }
        if remove(&outside, &inside, tables) && tables.outside_of(&inside) == Some(outside) {
            tables.remove_outside_of(&inside);
        }
    }
    allocate(opening, tables)
}

/// Inserts a mapping, and counts its port on its guest.
#[inline(always)]
pub(super) fn insert<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    mapping: &Mapping<A>,
    tables: &T,
) -> Insert {
    let inserted = tables.insert_mapping(outside, mapping);
    if inserted == Insert::Done {
        tables.count_port_on_guest(mapping.inside.address, held_port(outside), true);
    }
    inserted
}

/// Removes the mapping of an inside endpoint. Returns whether it was there.
#[inline(always)]
pub(super) fn remove<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    inside: &EndpointKey<A>,
    tables: &T,
) -> bool {
    let removed = tables.remove_mapping(outside);
    if removed {
        tables.count_port_on_guest(inside.address, held_port(outside), false);
    }
    removed
}

/// Takes an outside port: the inside one if it is free, else a random one of
/// the same parity and range (RFC 4787 REQ-3 and REQ-4, RFC 6056), else of the
/// other parity, at last of the other range.
#[inline(always)]
fn allocate<A: Network, T: Tables<A>>(
    opening: &Opening<A>,
    tables: &T,
) -> Result<EndpointKey<A>, Reason> {
    let settings = tables.settings().ok_or(Reason::NoOutsideAddress)?;
    let pool = outside_address(opening.inside.address, settings)?;
    let mapping = Mapping {
        inside: opening.inside,
        device: opening.device,
        expires_at: opening.until,
        ..Mapping::default()
    };
    let class = opening.class;
    let inside_port = opening.inside.port.get();
    let reserved = tables.reserved(class).ok_or(Reason::PortsExhausted)?;
    // It may still have one of its own back: without user space's sweep nobody else
    // takes those that are over from it.
    let guest = tables
        .guest(opening.inside.address)
        .ok_or(Reason::GuestTableFull)?;
    let is_at_limit = guest.has_all_ports(settings);
    // Then only what is over makes room.
    let mut is_full = false;
    for attempt in 0..=TRIES * 3 + EXPIRED_TRIES {
        let mut port = inside_port;
        let usable = if attempt == 0 {
            !reserved.contains(port)
        } else if attempt <= TRIES * 3 {
            if is_at_limit || is_full {
                continue;
            }
            let wanted = if attempt <= TRIES {
                inside_port
            } else if attempt <= TRIES * 2 {
                inside_port ^ 1
            } else {
                inside_port | HIGH
            };
            let index = set_index(pool.index, class, wanted);
            match tables.find_port(index, wanted, tables.random()) {
                Some(free) => {
                    port = free;
                    // Those of an address that is just added are not marked yet.
                    !reserved.contains(port)
                }
                None => false,
            }
        } else {
            port = random_port(inside_port, tables);
            !reserved.contains(port)
        };
        if !usable {
            continue;
        }
        let outside = EndpointKey::new(pool.address, Be16::new(port), mapping.inside.protocol);
        if !is_at_limit
            && !is_full
            && let Some(set) = tables.ports(set_index(pool.index, class, port))
        {
            // Ours from now on, or somebody's already.
            set.take(port);
        }
        match tables.take_port(&outside, &mapping, is_at_limit) {
            Insert::Done => return enter(&mapping.inside, &outside, tables),
            Insert::Exists => {}
            Insert::Full => is_full = true,
        }
    }
    if is_full {
        return Err(Reason::MappingTableFull);
    }
    if is_at_limit {
        guest.refused = guest.refused.wrapping_add(1);
        return Err(Reason::GuestPortLimit);
    }
    Err(Reason::PortsExhausted)
}

/// A random port of the same range.
#[inline(always)]
fn random_port<A: Network, T: Tables<A>>(inside_port: u16, tables: &T) -> u16 {
    let random = tables.random();
    let port = if inside_port < HIGH {
        random % u32::from(HIGH)
    } else {
        u32::from(HIGH) + random % (65_536 - u32::from(HIGH))
    };
    #[expect(clippy::cast_possible_truncation, reason = "below 65536")]
    return port as u16;
}

/// Notes whose outside endpoint it is. Another CPU may have been mapping the
/// same inside endpoint at the same time: the one that notes it first wins.
#[inline(always)]
fn enter<A: Network, T: Tables<A>>(
    inside: &EndpointKey<A>,
    outside: &EndpointKey<A>,
    tables: &T,
) -> Result<EndpointKey<A>, Reason> {
    let inserted = tables.insert_outside_of(inside, outside);
    if inserted == Insert::Exists {
        // One to the very endpoint was left by an earlier mapping.
        if let Some(first) = tables.outside_of(inside)
            && first != *outside
            && tables
                .mapping(&first)
                .is_some_and(|mapping| mapping.inside == *inside)
        {
            remove(outside, inside, tables);
            return Ok(first);
        }
        // What is noted there belongs to somebody else by now.
        tables.remove_outside_of(inside);
        if tables.insert_outside_of(inside, outside) == Insert::Done {
            return Ok(*outside);
        }
    }
    if inserted == Insert::Done {
        return Ok(*outside);
    }
    remove(outside, inside, tables);
    Err(Reason::MappingTableFull)
}

/// An outside endpoint that no session with this remote has yet (address- and
/// port-dependent mapping): the inside port if possible, else a random one of
/// the same parity and range. The twin's insert decides.
#[inline(always)]
pub(super) fn unmapped_port<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    opening: &Opening<A>,
    tables: &T,
) -> Result<EndpointKey<A>, Reason> {
    let reserved = tables
        .reserved(opening.class)
        .ok_or(Reason::PortsExhausted)?;
    let settings = tables.settings().ok_or(Reason::NoOutsideAddress)?;
    let pool = outside_address(packet.source, settings)?;
    let inside_port = packet.source_port.get();
    let mut port = inside_port;
    for attempt in 0..UNMAPPED_TRIES {
        let other_parity = u16::from(attempt > UNMAPPED_TRIES / 2);
        if attempt == 1 || attempt == UNMAPPED_TRIES / 2 + 1 {
            // From a random place on.
            let wanted = inside_port ^ other_parity;
            let index = set_index(pool.index, opening.class, wanted);
            match tables.find_port(index, wanted, tables.random()) {
                Some(free) => port = free,
                None => continue,
            }
        } else if attempt != 0 {
            port = port.wrapping_add(2);
        }
        if reserved.contains(port) {
            continue;
        }
        let mut outside = opening.source;
        outside.port = Be16::new(port);
        let back = FlowKey {
            source: packet.destination,
            destination: outside.address,
            source_port: packet.destination_port,
            destination_port: outside.port,
            arrival: Arrival::outside(outside.protocol),
        };
        if tables.is_unused(&back) {
            return Ok(outside);
        }
    }
    Err(Reason::PortsExhausted)
}

/// Whether neither a session nor a mapping nor the host has packets from outside with
/// this key.
#[inline(always)]
pub fn is_unused<A: Network, T: Tables<A>>(back: &FlowKey<A>, tables: &T) -> bool {
    if let Some(session) = tables.session(back)
        && !session::is_expired(back, session, tables)
    {
        return false;
    }
    let outside = back.destination_endpoint();
    let is_hosts = !protocol::is_icmp(outside.protocol)
        && tables.host_socket(&outside, &back.source_endpoint());
    !is_hosts && tables.mapping(&outside).is_none()
}

/// Tries to take one port. `is_at_limit`: only one that the same guest holds and is done
/// with.
#[inline(always)]
pub fn take<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    mapping: &Mapping<A>,
    is_at_limit: bool,
    tables: &T,
) -> Insert {
    let nobody = EndpointKey::new(A::UNSPECIFIED, Be16::ZERO, outside.protocol);
    if !protocol::is_icmp(outside.protocol) && tables.host_socket(outside, &nobody) {
        return Insert::Exists;
    }
    if !is_at_limit {
        let inserted = insert(outside, mapping, tables);
        if inserted != Insert::Exists {
            return inserted;
        }
    }
    if !may_take_over(mapping, outside, is_at_limit, tables) {
        return Insert::Exists;
    }
    if !lock(outside, tables) {
        return Insert::Exists;
    }
    let inserted = take_over(mapping, outside, is_at_limit, tables);
    unlock(outside, tables);
    inserted
}

/// Keeps others from removing what is in this outside endpoint's place: what a
/// second one removed could be what the first one put there. Returns whether
/// nobody else does already.
///
/// An outside endpoint is nobody's inside one, so the entry is only a lock.
#[inline(always)]
pub(super) fn lock<A: Network, T: Tables<A>>(outside: &EndpointKey<A>, tables: &T) -> bool {
    tables.insert_outside_of(outside, outside) == Insert::Done
}

#[inline(always)]
pub(super) fn unlock<A: Network, T: Tables<A>>(outside: &EndpointKey<A>, tables: &T) {
    tables.remove_outside_of(outside);
}

/// Whether the mapping in the way is over, and has rested if another guest had
/// it. `only_own`: it may not be another guest's.
#[inline(always)]
fn may_take_over<A: Network, T: Tables<A>>(
    mapping: &Mapping<A>,
    outside: &EndpointKey<A>,
    only_own: bool,
    tables: &T,
) -> bool {
    let (Some(old), Some(settings)) = (tables.mapping(outside), tables.settings()) else {
        return false;
    };
    let now = tables.now();
    let rested = !now.is_before(old.expires_at.after(settings.timeouts.port_rest));
    let same_guest = old.inside.address == mapping.inside.address;
    is_expired(old, now) && (same_guest || (rested && !only_own))
}

/// Puts the mapping in the place of one that is over.
#[inline(always)]
fn take_over<A: Network, T: Tables<A>>(
    mapping: &Mapping<A>,
    outside: &EndpointKey<A>,
    only_own: bool,
    tables: &T,
) -> Insert {
    let Some(old) = tables.mapping(outside) else {
        return Insert::Exists;
    };
    let before = old.inside;
    if !may_take_over(mapping, outside, only_own, tables) {
        return Insert::Exists;
    }
    // The way to it first: once it is gone, its owner may come back and map it.
    if tables.outside_of(&before) == Some(*outside) {
        tables.remove_outside_of(&before);
    }
    upkeep::let_go(old, tables);
    if !remove(outside, &before, tables) {
        return Insert::Exists;
    }
    insert(outside, mapping, tables)
}
