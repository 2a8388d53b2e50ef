//! Fragments (RFC 4787 REQ-14): later ones have no ports, so the first one's are
//! remembered for them; those that come before it wait for it.
//!
//! Bounded: the tables forget the oldest datagrams, a datagram has a place for
//! [`MAX_HELD`] fragments, and no byte is let through twice.

use core::{hint::black_box, num::NonZeroU32};

use super::Tables;
use crate::{
    abi::{Arrival, Fragment, FragmentKey, HELD_BYTES, MAX_HELD, fragment_fate},
    net::protocol,
    network::Network,
    parse::{Packet, Part},
    verdict::{Outcome, Plan, Reason},
};

/// Words of [`Fragment::seen`] that one fragment may touch: 10 KiB of it.
const MOST_WORDS: usize = 20;

/// The key of the datagram that the fragment is of.
#[inline(always)]
#[must_use]
pub const fn key_of<A: Network>(packet: &Packet<A>, device: Option<NonZeroU32>) -> FragmentKey<A> {
    let number = if A::FRAGMENTS_NAME_TRANSPORT {
        packet.protocol
    } else {
        protocol::FRAGMENT
    };
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        arrival: Arrival::of(device, number),
        identification: packet.identification,
    }
}

/// Takes note of a fragment, before anything is decided about it. A later one
/// is given the protocol and the ports of its datagram.
///
/// # Errors
/// The exit of a fragment that does not belong to a known session, or that
/// overlaps with an earlier one.
#[inline(always)]
pub fn enter<A: Network, T: Tables<A>>(
    packet: &mut Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Result<(), Reason> {
    if packet.part == Part::Whole {
        return Ok(());
    }
    let key = key_of(packet, device);
    let fragment = datagram(&key, packet.part, tables).ok_or(Reason::FragmentNotHeld)?;
    if fragment.fate == fragment_fate::HOST {
        return Err(Reason::ForTheHost);
    }
    plan.identification = fragment.identification;
    if packet.part == Part::Later && fragment.fate == fragment_fate::UNKNOWN {
        return Err(hold(packet, fragment, plan));
    }
    note(packet, fragment)?;
    if fragment.units == fragment.all_units {
        // Complete: the identification is free for another datagram.
        fragment.expires_at = tables.now();
    }
    if packet.part == Part::First {
        return Ok(());
    }
    if fragment.fate != fragment_fate::TRANSLATED {
        return Err(Reason::FragmentOfDropped);
    }
    packet.source_port = fragment.source_port;
    packet.destination_port = fragment.destination_port;
    if !A::FRAGMENTS_NAME_TRANSPORT {
        packet.protocol = fragment.protocol;
        packet.transport = A::transport_of(fragment.protocol);
    }
    Ok(())
}

/// Lets the fragment wait for its first, if it can. Its bytes have not been seen
/// yet: it comes by again.
#[inline(always)]
fn hold<A: Network>(packet: &Packet<A>, fragment: &mut Fragment, plan: &mut Plan<A>) -> Reason {
    if packet.time_to_live <= 1 {
        return Reason::TimeToLiveExceeded;
    }
    let frame_length = packet.network_offset + packet.length;
    if u32::from(fragment.held) >= MAX_HELD || frame_length > HELD_BYTES {
        return Reason::FragmentNotHeld;
    }
    plan.held = u32::from(fragment.held);
    fragment.held += 1;
    Reason::FragmentHeld
}

/// Forgets that the fragment came by, as parts of it will.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a datagram has 8192 units at most"
)]
#[inline(always)]
pub fn forget<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
) {
    if packet.part == Part::Whole {
        return;
    }
    let (Some(fragment), Some(settings)) =
        (tables.fragment(&key_of(packet, device)), tables.settings())
    else {
        return;
    };
    let (start, end) = units(packet);
    for_each_word(fragment, start, end, |word, bits| {
        *word &= !bits;
        true
    });
    fragment.units = fragment.units.wrapping_sub((end - start) as u16);
    if !packet.more_fragments {
        fragment.all_units = 0;
    }
    fragment.expires_at = tables.now().after(settings.timeouts.fragment);
}

/// Remembers what became of a first fragment, and tells in the plan how many
/// others wait for it.
#[inline(always)]
pub fn settle<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    reason: Reason,
    tables: &T,
    plan: &mut Plan<A>,
) {
    // A repeated first fragment says nothing about its datagram.
    let repeated = matches!(reason, Reason::FragmentOverlap | Reason::FragmentBeyondEnd);
    // One that is cut comes by again.
    let cut = reason.outcome() == Outcome::Fragment;
    if packet.part != Part::First || repeated || cut {
        return;
    }
    let Some(fragment) = tables.fragment(&key_of(packet, device)) else {
        return;
    };
    fragment.fate = match reason.outcome() {
        Outcome::Forward => fragment_fate::TRANSLATED,
        Outcome::Pass | Outcome::Ask => fragment_fate::HOST,
        Outcome::Drop | Outcome::Refuse | Outcome::Hold | Outcome::Fragment => {
            fragment_fate::DROPPED
        }
    };
    fragment.source_port = packet.source_port;
    fragment.destination_port = packet.destination_port;
    fragment.protocol = packet.protocol;
    plan.held = u32::from(fragment.held);
    fragment.held = 0;
}

/// The datagram's entry: the one that is there, or a new one in place of none or
/// of one whose time is over.
#[inline(always)]
fn datagram<'a, A: Network, T: Tables<A>>(
    key: &FragmentKey<A>,
    part: Part,
    tables: &'a T,
) -> Option<&'a mut Fragment> {
    let now = tables.now();
    if let Some(fragment) = tables.fragment(key)
        && now.is_before(fragment.expires_at)
        // A first one is decided about anew, or it would come to the host by what
        // another one with its identification was let in for.
        && !(part == Part::First && fragment.fate == fragment_fate::HOST)
    {
        return Some(fragment);
    }
    let settings = tables.settings()?;
    let fragment = tables.new_fragment(key)?;
    fragment.expires_at = now.after(settings.timeouts.fragment);
    fragment.identification = tables.next_identification();
    Some(fragment)
}

/// Marks the fragment's bytes as seen.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a datagram has 8192 units at most"
)]
#[inline(always)]
fn note<A: Network>(packet: &Packet<A>, fragment: &mut Fragment) -> Result<(), Reason> {
    let (start, end) = units(packet);
    if end > fragment.seen.len() * 64 || end > start + (MOST_WORDS - 1) * 64 {
        return Err(Reason::FragmentBeyondEnd);
    }
    if !for_each_word(fragment, start, end, |word, bits| *word & bits == 0) {
        return Err(Reason::FragmentOverlap);
    }
    for_each_word(fragment, start, end, |word, bits| {
        *word |= bits;
        true
    });
    fragment.units = fragment.units.wrapping_add((end - start) as u16);
    if !packet.more_fragments {
        fragment.all_units = end as u16;
    }
    Ok(())
}

/// Where the fragment begins and ends in its datagram, in units of 8 bytes.
#[inline(always)]
const fn units<A: Network>(packet: &Packet<A>) -> (usize, usize) {
    let payload = (packet.length - packet.unfragmentable_length) as usize;
    let start = packet.fragment_offset as usize;
    (start, start + payload.div_ceil(8))
}

/// Calls `visit` with each word of [`Fragment::seen`] that has bits for these
/// units, and those bits, for as long as it says so. Returns whether it always
/// did.
#[inline(always)]
fn for_each_word(
    fragment: &mut Fragment,
    start: usize,
    end: usize,
    visit: impl Fn(&mut u64, u64) -> bool,
) -> bool {
    for step in 0..MOST_WORDS {
        let index = (start >> 6) + step;
        let first = index << 6;
        if first >= end {
            break;
        }
        // The verifier wants the comparison made that the compiler deduces.
        let Some(word) = fragment.seen.get_mut(black_box(index)) else {
            break;
        };
        let mut bits = u64::MAX;
        if first < start {
            bits &= u64::MAX << (start & 63);
        }
        if first + 64 > end {
            bits &= !(u64::MAX << (end & 63));
        }
        if !visit(word, bits) {
            return false;
        }
    }
    true
}
