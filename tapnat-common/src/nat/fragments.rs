//! Fragments (RFC 4787 REQ-14): later ones have no ports, so the first one's are
//! remembered for them; those that come before it wait for it.
//!
//! Bounded: the tables forget the oldest datagrams, a datagram has a place for
//! [`MAX_HELD`] fragments, and no byte is let through twice.

use core::{hint::black_box, num::NonZeroU32};

use super::Tables;
use crate::{
    abi::{Fragment, FragmentKey, HELD_BYTES, MAX_HELD, fragment_fate},
    parse::{Packet, Part},
    verdict::{Outcome, Plan, Reason},
};

/// Words of [`Fragment::seen`] that one fragment may touch: 10 KiB of it.
const MOST_WORDS: usize = 20;

/// The key of the datagram that the fragment is of.
#[inline(always)]
#[must_use]
pub const fn key_of(packet: &Packet, device: Option<NonZeroU32>, plan: &Plan) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        arrival: packet.key(device).arrival,
        identification: packet.identification,
        at_egress: plan.at_egress as u16,
    }
}

/// Takes note of a fragment, before anything is decided about it. A later one
/// is given the ports of its datagram.
///
/// # Errors
/// The exit of a fragment that does not belong to a known session, or that
/// overlaps with an earlier one.
#[inline(always)]
pub fn enter<T: Tables>(
    packet: &mut Packet,
    device: Option<NonZeroU32>,
    tables: &T,
    plan: &mut Plan,
) -> Result<(), Reason> {
    if packet.part == Part::Whole {
        return Ok(());
    }
    let key = key_of(packet, device, plan);
    let fragment = datagram(&key, tables).ok_or(Reason::FragmentNotHeld)?;
    if fragment.fate == fragment_fate::HOST {
        return Err(Reason::ForTheHost);
    }
    note(packet, fragment)?;
    if fragment.units == fragment.all_units {
        // Complete: the identification is free for another datagram.
        fragment.expires_at = tables.now();
    }
    if packet.part == Part::First {
        return Ok(());
    }
    match fragment.fate {
        fragment_fate::TRANSLATED => {
            packet.source_port = fragment.source_port;
            packet.destination_port = fragment.destination_port;
            Ok(())
        }
        fragment_fate::UNKNOWN => {
            if packet.time_to_live <= 1 {
                return Err(Reason::TimeToLiveExceeded);
            }
            let frame_length = packet.network_offset + packet.length;
            if u32::from(fragment.held) >= MAX_HELD || frame_length > HELD_BYTES {
                return Err(Reason::FragmentNotHeld);
            }
            plan.held = u32::from(fragment.held);
            fragment.held += 1;
            Err(Reason::FragmentHeld)
        }
        fragment_fate::DROPPED.. | fragment_fate::HOST => Err(Reason::FragmentOfDropped),
    }
}

/// Remembers what became of a first fragment, and tells in the plan how many
/// others wait for it.
#[inline(always)]
pub fn settle<T: Tables>(
    packet: &Packet,
    device: Option<NonZeroU32>,
    reason: Reason,
    tables: &T,
    plan: &mut Plan,
) {
    // A repeated first fragment says nothing about its datagram.
    let repeated = matches!(reason, Reason::FragmentOverlap | Reason::FragmentBeyondEnd);
    if packet.part != Part::First || repeated {
        return;
    }
    let Some(fragment) = tables.fragment(&key_of(packet, device, plan)) else {
        return;
    };
    fragment.fate = match reason.outcome() {
        Outcome::Forward => fragment_fate::TRANSLATED,
        Outcome::Pass => fragment_fate::HOST,
        Outcome::Drop | Outcome::Refuse | Outcome::Hold => fragment_fate::DROPPED,
    };
    fragment.source_port = packet.source_port;
    fragment.destination_port = packet.destination_port;
    plan.held = u32::from(fragment.held);
    fragment.held = 0;
}

/// The datagram's entry: the one that is there, or a new one in place of none or
/// of one whose time is over.
#[inline(always)]
fn datagram<'a, T: Tables>(key: &FragmentKey, tables: &'a T) -> Option<&'a mut Fragment> {
    let now = tables.now();
    if let Some(fragment) = tables.fragment(key)
        && now.is_before(fragment.expires_at)
    {
        return Some(fragment);
    }
    let settings = tables.settings()?;
    let fragment = tables.new_fragment(key)?;
    fragment.expires_at = now.after(settings.timeouts.fragment);
    Some(fragment)
}

/// Marks the fragment's bytes as seen.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a datagram has 8192 units at most"
)]
#[inline(always)]
fn note(packet: &Packet, fragment: &mut Fragment) -> Result<(), Reason> {
    let payload = (packet.length - packet.header_length) as usize;
    let start = usize::from(packet.fragment_offset);
    let end = start + payload.div_ceil(8);
    if end > fragment.seen.len() * 64 || end > start + (MOST_WORDS - 1) * 64 {
        return Err(Reason::FragmentBeyondEnd);
    }
    for mark in [false, true] {
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
            if mark {
                *word |= bits;
            } else if *word & bits != 0 {
                return Err(Reason::FragmentOverlap);
            }
        }
    }
    fragment.units = fragment.units.wrapping_add((end - start) as u16);
    if !packet.more_fragments {
        fragment.all_units = end as u16;
    }
    Ok(())
}
