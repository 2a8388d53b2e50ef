//! Sets of outside ports: finding a free one in bounded time.
//!
//! A [`PortSet`] is a hint, not the truth: it is updated without locks, and the
//! `BPF_NOEXIST` insert of the mapping decides. A port wrongly marked free
//! costs one failed insert; one wrongly marked taken is lost until user space's
//! sweep rebuilds the set from the mappings.

use core::hint::black_box;

use crate::net::protocol;

/// Protocols that share a set of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Tcp = 0,
    /// UDP and UDP-Lite.
    Udp = 1,
    /// Identifiers of ICMP queries.
    Icmp = 2,
}

/// The number of [`Class`]es.
pub const CLASSES: u32 = 3;

impl Class {
    /// `None` for protocols that are translated by address only.
    #[inline(always)]
    #[must_use]
    pub const fn of(number: u8) -> Option<Self> {
        match number {
            protocol::TCP => Some(Self::Tcp),
            protocol::UDP | protocol::UDP_LITE => Some(Self::Udp),
            protocol::ICMP | protocol::ICMPV6 => Some(Self::Icmp),
            0..=u8::MAX => None,
        }
    }
}

/// The index of the [`PortSet`] for the ports of one parity, of one [`Class`], of
/// the outside address with this index in the pool.
#[inline(always)]
#[must_use]
pub const fn set_index(address: u32, class: u32, parity: u16) -> u32 {
    (address * CLASSES + class) * 2 + (parity & 1) as u32
}

/// The number of [`PortSet`]s.
#[expect(clippy::cast_possible_truncation, reason = "it is 16")]
pub const SETS: u32 = crate::abi::MAX_OUTSIDE_ADDRESSES as u32 * CLASSES * 2;

/// Ports of a [`PortSet`].
pub const SET_PORTS: u32 = 65536 / 2;

/// Words that one look for a port that is taken goes through.
const LOOK: u32 = 128;

/// Words of a [`PortSet`]: half the ports, the other half has the other parity.
const WORDS: usize = 65536 / 2 / 64;
const SUMMARIES: usize = WORDS / 64;

/// Ports below 1024 are a range of their own (RFC 4787 REQ-3): the first words.
const LOW_WORDS: usize = 1024 / 2 / 64;

/// An index of which the compiler knows nothing, so that it takes no comparison away:
/// not every kernel's verifier sees that a port has no more than 16 bits.
#[inline(always)]
fn opaque(index: impl Into<usize>) -> usize {
    black_box(index.into())
}

/// The ports of one parity: a set bit is a port that is taken, or that must not
/// be handed out.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSet {
    /// A set bit is a word without a free port.
    full: [u64; SUMMARIES],
    words: [u64; WORDS],
}

impl Default for PortSet {
    fn default() -> Self {
        Self {
            full: [0; SUMMARIES],
            words: [0; WORDS],
        }
    }
}

impl PortSet {
    /// Marks the port (of this set's parity) as taken.
    #[inline(always)]
    pub fn take(&mut self, port: u16) {
        let index = opaque(port >> 7);
        if let Some(word) = self.words.get_mut(index) {
            *word |= 1 << (port >> 1 & 63);
            if *word == u64::MAX {
                self.mark_full(index);
            }
        }
    }

    /// Marks the port (of this set's parity) as free.
    #[inline(always)]
    pub fn release(&mut self, port: u16) {
        let index = opaque(port >> 7);
        if let Some(word) = self.words.get_mut(index) {
            *word &= !(1 << (port >> 1 & 63));
        }
        if let Some(summary) = self.full.get_mut(index >> 6) {
            *summary &= !(1 << (index & 63));
        }
    }

    /// Whether the port (of this set's parity) is marked as taken.
    #[must_use]
    pub fn is_taken(&self, port: u16) -> bool {
        self.words
            .get(usize::from(port >> 7))
            .is_some_and(|word| word >> (port >> 1 & 63) & 1 == 1)
    }

    /// The place of the next port from this place on that is marked as taken and not
    /// `reserved`. A place is a port of this set without its last bit, which is `parity`.
    ///
    /// # Errors
    /// The place to go on at if there is none before that; [`SET_PORTS`] at the end.
    #[inline(always)]
    pub fn next_taken(&self, reserved: &Reserved, parity: u16, place: u32) -> Result<u32, u32> {
        let mut number = place >> 6;
        let mut usable = u64::MAX << (place & 63);
        for _ in 0..LOOK {
            let index = opaque(number as usize);
            let Some(word) = self.words.get(index) else {
                return Err(SET_PORTS);
            };
            let mut taken = word & usable;
            if taken != 0 {
                taken &= !reserved.of_parity(index, parity);
            }
            if taken != 0 {
                return Ok(number << 6 | taken.trailing_zeros());
            }
            usable = u64::MAX;
            number += 1;
        }
        Err(number << 6)
    }

    /// The ports that are marked as taken here and not in `other`; `parity` is
    /// that of the sets.
    pub fn taken_beyond(&self, other: &Self, parity: u16) -> impl Iterator<Item = u16> {
        (0u16..)
            .zip(self.words.iter().zip(&other.words))
            .flat_map(move |(index, (word, other))| {
                let beyond = word & !other;
                (0..64)
                    .filter(move |bit| beyond >> bit & 1 == 1)
                    .map(move |bit| index << 7 | bit << 1 | parity & 1)
            })
    }

    #[inline(always)]
    fn mark_full(&mut self, index: usize) {
        if let Some(summary) = self.full.get_mut(index >> 6) {
            *summary |= 1 << (index & 63);
        }
    }

    /// A free port of the same range as `wanted` (below 1024, or not) and of
    /// the set's parity, from a `random` place on; `None` when all are taken.
    ///
    /// Looks at ten words at most: the summary leads straight to one with a
    /// free port.
    #[inline(always)]
    #[must_use]
    pub fn find(&mut self, wanted: u16, random: u32) -> Option<u16> {
        let low = wanted < 1024;
        let chance = random as usize;
        let start = if low {
            chance % LOW_WORDS
        } else {
            LOW_WORDS + chance % (WORDS - LOW_WORDS)
        };
        // One more than there are: the first one's low part comes last.
        for step in 0..=SUMMARIES {
            let summary = ((start >> 6) + step) & (SUMMARIES - 1);
            if low && summary != 0 {
                continue;
            }
            let mut usable = u64::MAX;
            if summary == 0 {
                let low_part = (1u64 << LOW_WORDS) - 1;
                usable = if low { low_part } else { !low_part };
            }
            if step == 0 {
                usable &= u64::MAX << (start & 63);
            }
            let Some(full) = self.full.get(summary) else {
                break;
            };
            let free = !full & usable;
            if free == 0 {
                continue;
            }
            let index = opaque((summary << 6) | free.trailing_zeros() as usize);
            let Some(word) = self.words.get(index) else {
                break;
            };
            let free = !word;
            if free == 0 {
                // Two CPUs took the last two ports at once; set it right.
                self.mark_full(index);
                continue;
            }
            let turn = (random >> 16) & 63;
            let bit = (free.rotate_right(turn).trailing_zeros() + turn) & 63;
            #[expect(clippy::cast_possible_truncation, reason = "index < 512 and bit < 64")]
            let found = (index << 7) as u16 | (bit << 1) as u16 | wanted & 1;
            return Some(found);
        }
        None
    }
}

/// A bit for each port that must never be handed out: the host's own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    words: [u64; 65536 / 64],
}

impl Default for Reserved {
    /// Nothing but 0, which is no port; and as an ICMP identifier it stands for
    /// the host that answers.
    fn default() -> Self {
        let mut words = [0; 65536 / 64];
        words[0] = 1;
        Self { words }
    }
}

impl Reserved {
    /// Keeps the port from being handed out.
    pub fn reserve(&mut self, port: u16) {
        if let Some(word) = self.words.get_mut(usize::from(port >> 6)) {
            *word |= 1 << (port & 63);
        }
    }

    #[inline(always)]
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.words
            .get(opaque(port >> 6))
            .is_some_and(|word| word >> (port & 63) & 1 == 1)
    }

    /// As a word of a set of this parity, the one with this index.
    #[inline(always)]
    fn of_parity(&self, index: usize, parity: u16) -> u64 {
        let half = |index: usize| {
            let word = self.words.get(index).copied().unwrap_or(u64::MAX);
            let mut word = word >> (parity & 1) & 0x5555_5555_5555_5555;
            word = (word | word >> 1) & 0x3333_3333_3333_3333;
            word = (word | word >> 2) & 0x0f0f_0f0f_0f0f_0f0f;
            word = (word | word >> 4) & 0x00ff_00ff_00ff_00ff;
            word = (word | word >> 8) & 0x0000_ffff_0000_ffff;
            (word | word >> 16) & 0xffff_ffff
        };
        half(opaque(index * 2)) | half(opaque(index * 2 + 1)) << 32
    }

    /// The two sets, even ports then odd ones, in which just these are taken.
    #[must_use]
    pub fn sets(&self) -> [PortSet; 2] {
        let mut sets = [PortSet::default(); 2];
        for port in 0..=u16::MAX {
            if self.contains(port)
                && let Some(set) = sets.get_mut(usize::from(port & 1))
            {
                set.take(port);
            }
        }
        sets
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_free_port_is_found() {
        for last in [1024u16, 1026, 40000, 65534, 0, 1022] {
            let mut set = PortSet::default();
            for port in (0..=65535).step_by(2).filter(|port| *port != last) {
                set.take(port);
            }
            for random in [0, 1, 77, 400, 0xffff_ffff, 0x1234_5678] {
                assert_eq!(
                    set.find(if last < 1024 { 2 } else { 2000 }, random),
                    Some(last)
                );
                assert_eq!(set.find(if last < 1024 { 2000 } else { 2 }, random), None);
            }
            set.take(last);
            assert_eq!(set.find(last, 5), None);
            set.release(last);
            assert_eq!(set.find(last, 5), Some(last));
        }
    }

    #[test]
    fn a_stale_summary_is_repaired() {
        let mut set = PortSet::default();
        for word in &mut set.words {
            *word = u64::MAX;
        }
        // Each look repairs what it stumbles on, so the end is reached.
        let looks = (0..100)
            .take_while(|random| set.find(2000, *random * 9999).is_none())
            .count();
        assert_eq!(looks, 100);
        assert!(set.full.iter().any(|summary| *summary != 0));
    }

    #[test]
    fn reserved_ports_are_taken_in_the_sets() {
        let mut reserved = Reserved::default();
        reserved.reserve(53);
        reserved.reserve(32768);
        assert!(reserved.contains(53) && !reserved.contains(54));
        let [even, odd] = reserved.sets();
        assert!(odd.is_taken(53) && even.is_taken(32768) && !even.is_taken(52));
    }

    #[test]
    fn what_is_taken_is_found_port_by_port() {
        let mut reserved = Reserved::default();
        for port in (32_768..=60_999).chain([7, 1024]) {
            reserved.reserve(port);
        }
        for (parity, mut set) in (0..).zip(reserved.sets()) {
            let mut ports = [1026, 1027, 2001, 2002, 32_766, 61_000, 61_001, 65_535, 5].to_vec();
            ports.retain(|port| port & 1 == parity);
            ports.sort_unstable();
            for port in &ports {
                set.take(*port);
            }
            let (mut place, mut looks) = (0, 0);
            let mut found = Vec::new();
            while place < SET_PORTS {
                looks += 1;
                place = match set.next_taken(&reserved, parity, place) {
                    Ok(taken) => {
                        found.push(u16::try_from(taken << 1).unwrap() | parity);
                        taken + 1
                    }
                    Err(next) => next,
                };
            }
            assert_eq!((place, &found), (SET_PORTS, &ports));
            assert!(looks <= ports.len() + 5, "{looks} looks");
        }
    }

    #[test]
    fn sets_are_compared_port_by_port() {
        let (mut one, mut other) = (PortSet::default(), PortSet::default());
        for port in [1, 127, 129, 40001, 65535] {
            one.take(port);
        }
        other.take(129);
        other.take(3);
        let beyond: Vec<_> = one.taken_beyond(&other, 1).collect();
        assert_eq!(beyond, [1, 127, 40001, 65535]);
        assert_eq!(one.taken_beyond(&one, 1).count(), 0);
    }

    proptest! {
        #[test]
        fn a_found_port_is_free_and_of_the_right_kind(
            wanted: u16,
            random: u32,
            taken in proptest::collection::vec(any::<u16>(), 0..3000),
        ) {
            let mut set = PortSet::default();
            for port in &taken {
                set.take(port & !1 | wanted & 1);
            }
            let port = set.find(wanted, random).unwrap();
            prop_assert_eq!(port & 1, wanted & 1);
            prop_assert_eq!(port < 1024, wanted < 1024);
            prop_assert!(!set.is_taken(port));
        }
    }
}
