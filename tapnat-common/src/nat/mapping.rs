//! Endpoint-independent mappings and the choice of outside ports.

use core::num::NonZeroU32;

use super::{Insert, Tables};
use crate::{
    abi::{EndpointKey, Mapping, Settings, mapping_flags},
    net::{Be16, Be32, protocol},
    ports::{Class, set_index},
    time::Instant,
    verdict::Reason,
};

/// Free ports of a set that are tried before the search gives up: the sets are
/// hints, and each miss corrects one.
const TRIES: u32 = 4;

/// Ports looked at for an expired mapping when the sets say that all are taken:
/// without user space's sweep nobody else gives them back.
const EXPIRED_TRIES: u32 = 8;

/// Whether the mapping no longer counts.
#[inline(always)]
pub(super) fn is_expired(mapping: &Mapping, now: Instant) -> bool {
    mapping.flags & mapping_flags::STATIC == 0 && !now.is_before(mapping.expires_at)
}

/// Lets the mapping live until `until` at least; one session alone also decides
/// when it ends.
#[inline(always)]
pub(super) fn keep_until<T: Tables>(outside: &EndpointKey, until: Instant, tables: &T) {
    if let Some(mapping) = tables.mapping(outside)
        && (mapping.sessions <= 1 || mapping.expires_at.is_before(until))
    {
        mapping.expires_at = until;
    }
}

/// An outside address and its place in the pool.
pub(super) struct OutsideAddress {
    pub index: u32,
    pub address: Be32,
}

/// The outside address of a guest: always the same one (paired pooling, RFC
/// 4787 REQ-2).
#[inline(always)]
pub(super) fn outside_address(inside: Be32, settings: &Settings) -> Result<OutsideAddress, Reason> {
    // Fibonacci hashing spreads neighbouring guests over the pool; the product
    // with the pool's size then has the place in its upper half.
    let hash = u64::from(inside.get().wrapping_mul(0x9e37_79b9));
    let index = (hash * u64::from(settings.outside_count)) >> 32;
    match settings.outside.get(index as usize) {
        Some(address) if *address != Be32::ZERO => {
            Ok(OutsideAddress { index: index as u32, address: *address })
        }
        Some(_) | None => Err(Reason::NoOutsideAddress),
    }
}

/// The outside endpoint of an inside one: the mapping that is there, or a new
/// one that lives until `until`.
#[inline(never)]
pub(super) fn of<T: Tables>(
    inside: &EndpointKey,
    device: NonZeroU32,
    until: Instant,
    tables: &T,
) -> Result<EndpointKey, Reason> {
    if let Some(outside) = tables.outside_of(inside)
        && let Some(mapping) = tables.mapping(&outside)
        && mapping.inside == *inside
    {
        // Also one that is expired: nobody else has taken its port.
        mapping.device = device.get();
        mapping.expires_at = mapping.expires_at.later_of(until);
        return Ok(outside);
    }
    let mapping = Mapping { inside: *inside, device: device.get(), expires_at: until, ..Mapping::default() };
    allocate(&mapping, tables)
}

/// Takes an outside port: the inside one if it is free, else a random one of
/// the same parity and range (RFC 4787 REQ-3 and REQ-4, RFC 6056), at last of
/// the other parity.
#[inline(never)]
fn allocate<T: Tables>(
    mapping: &Mapping,
    tables: &T,
) -> Result<EndpointKey, Reason> {
    let settings = tables.settings().ok_or(Reason::NoOutsideAddress)?;
    let pool = outside_address(mapping.inside.address, settings)?;
    let class = Class::of(mapping.inside.protocol).ok_or(Reason::ProtocolNotCarried)?;
    let wanted = mapping.inside.port.get();
    let reserved = tables.reserved(class as u32).ok_or(Reason::PortsExhausted)?;
    if wanted != 0
        && !reserved.contains(wanted)
        && let Some(taken) = take(mapping, &pool, wanted, tables)
    {
        return taken;
    }
    for attempt in 0..TRIES * 2 {
        let wanted = if attempt < TRIES { wanted } else { wanted ^ 1 };
        let set = tables
            .ports(set_index(pool.index, class, wanted))
            .ok_or(Reason::PortsExhausted)?;
        let mut port = 0;
        if set.find_into(wanted, tables.random(), &mut port)
            && let Some(taken) = take(mapping, &pool, port, tables)
        {
            return taken;
        }
    }
    for _ in 0..EXPIRED_TRIES {
        #[expect(clippy::cast_possible_truncation, reason = "the low 16 bits are as random")]
        let random = tables.random() as u16;
        let port = if wanted < 1024 { random & 1023 } else { random | 1024 };
        if !reserved.contains(port)
            && let Some(taken) = take(mapping, &pool, port, tables)
        {
            return taken;
        }
    }
    Err(Reason::PortsExhausted)
}

/// Tries to take one port: `None` when somebody has it.
#[inline(never)]
fn take<T: Tables>(
    mapping: &Mapping,
    pool: &OutsideAddress,
    port: u16,
    tables: &T,
) -> Option<Result<EndpointKey, Reason>> {
    let outside = EndpointKey::new(pool.address, Be16::new(port), mapping.inside.protocol);
    if let Some(class) = Class::of(mapping.inside.protocol)
        && let Some(set) = tables.ports(set_index(pool.index, class, port))
    {
        // Ours now, or somebody's already.
        set.take(port);
    }
    let nobody = EndpointKey::new(Be32::ZERO, Be16::ZERO, outside.protocol);
    if outside.protocol != protocol::ICMP && tables.host_socket(&outside, &nobody) {
        return None;
    }
    let mut inserted = tables.insert_mapping(&outside, mapping);
    if inserted == Insert::Exists {
        let old = *tables.mapping(&outside)?;
        let settings = tables.settings()?;
        let now = tables.now();
        let rested = !now.is_before(old.expires_at.after(settings.timeouts.port_rest));
        let same_guest = old.inside.address == mapping.inside.address;
        if !is_expired(&old, now) || !(rested || same_guest) || !tables.remove_mapping(&outside) {
            return None;
        }
        inserted = tables.insert_mapping(&outside, mapping);
    }
    match inserted {
        Insert::Exists => None,
        Insert::Full => Some(Err(Reason::MappingTableFull)),
        Insert::Done => match tables.set_outside_of(&mapping.inside, &outside) {
            Insert::Done | Insert::Exists => Some(Ok(outside)),
            Insert::Full => {
                tables.remove_mapping(&outside);
                Some(Err(Reason::MappingTableFull))
            }
        },
    }
}
