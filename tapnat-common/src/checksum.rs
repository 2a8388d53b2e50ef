//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are taken over words as the machine reads them: the ones' complement
//! sum is the same in either byte order. Nothing here touches a packet.

use crate::{
    net::{Address, Be16},
    network::pseudo_header,
};

/// What to add to a ones' complement sum to turn old words into new ones.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u32);

impl Delta {
    pub const ZERO: Self = Self(0);

    #[inline(always)]
    #[must_use]
    pub const fn of_word(old: Be16, new: Be16) -> Self {
        Self((!old.raw()) as u32 + new.raw() as u32).folded()
    }

    #[inline(always)]
    #[must_use]
    pub fn of_address<A: Address>(old: A, new: A) -> Self {
        // What a sum of so many words lacks to all ones in each of them.
        let ones = u32::from(A::BITS) / 16 * 0xffff;
        Self(ones - old.sum() + new.sum()).folded()
    }

    /// For sums of words, as the machine reads them, of 2^31 at most.
    #[inline(always)]
    #[must_use]
    pub const fn of_sums(old: u32, new: u32) -> Self {
        let old = Self((old & 0xffff) + (old >> 16)).folded();
        let new = Self((new & 0xffff) + (new >> 16)).folded();
        Self((!old.stored()) as u32).and(new)
    }

    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0).folded()
    }

    /// A delta kept in 16 bits, as a map value keeps it.
    #[inline(always)]
    #[must_use]
    pub const fn from_stored(stored: u16) -> Self {
        Self(stored as u32)
    }

    /// The delta in 16 bits.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "a delta is kept folded")]
    pub const fn stored(self) -> u16 {
        self.0 as u16
    }

    /// The delta as the kernel's `__wsum`, for the checksum helpers.
    #[inline(always)]
    #[must_use]
    pub const fn wide(self) -> u32 {
        self.0
    }

    /// Whether it leaves every checksum as it is.
    #[inline(always)]
    #[must_use]
    pub const fn is_nothing(self) -> bool {
        self.0 == 0 || self.0 == 0xffff
    }

    /// The checksum field after the change (RFC 1624, equation 3).
    #[inline(always)]
    #[must_use]
    pub const fn apply(self, field: Be16) -> Be16 {
        let sum = Self((!field.raw()) as u32 + self.0).folded().stored();
        Be16::from_bytes((!sum).to_ne_bytes())
    }

    /// The delta of the same words one byte further on.
    #[inline(always)]
    #[must_use]
    pub const fn swapped(self) -> Self {
        Self(self.stored().swap_bytes() as u32)
    }

    #[inline(always)]
    const fn folded(self) -> Self {
        let once = (self.0 & 0xffff) + (self.0 >> 16);
        Self((once & 0xffff) + (once >> 16))
    }
}

/// Whether a TCP or UDP checksum field holds the sum of the pseudo-header alone, as
/// it does while a device is to complete it (`CHECKSUM_PARTIAL`). `length`: of the
/// transport header and what follows, in bytes, less than 2^16.
#[inline(always)]
#[must_use]
pub fn is_partial<A: Address>(
    field: Be16,
    source: A,
    destination: A,
    protocol: u8,
    length: u32,
) -> bool {
    let sum = pseudo_header(source, destination, protocol, length);
    Delta(sum).folded().apply(field).raw() == 0
}

/// The checksum field for a header whose words add up to `sum`, a `__wsum` as
/// the kernel's `bpf_csum_diff` returns it.
#[inline(always)]
#[must_use]
pub const fn finish(sum: u32) -> Be16 {
    let folded = Delta(((sum & 0xffff) + (sum >> 16)) & 0x1_ffff)
        .folded()
        .stored();
    Be16::from_bytes((!folded).to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Be32;
    use proptest::prelude::*;

    /// RFC 1071, straight: big-endian words, end-around carry at the end.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    #[test]
    fn rfc_1624_example() {
        // RFC 1624 section 4: the case where equation 4 goes wrong.
        let delta = Delta::of_word(Be16::new(0x5555), Be16::new(0x3285));
        assert_eq!(delta.apply(Be16::new(0xdd2f)), Be16::new(0x0000));
    }

    #[test]
    fn a_partial_checksum_is_recognised() {
        let addresses = (
            Be32::from_bytes([192, 0, 2, 1]),
            Be32::from_bytes([198, 51, 100, 7]),
        );
        let is_partial = |field| is_partial(Be16::new(field), addresses.0, addresses.1, 17, 1480);
        // 0xc000 + 0x0201 + 0xc633 + 0x6407 + 17 + 1480, folded.
        let sum = 0xf215;
        assert!(is_partial(sum));
        for other in [0, 1, !sum, sum + 1, 0xffff] {
            assert!(!is_partial(other), "{other:#x}");
        }
        // Where the sum is 0xffff, 0 is the same.
        let zero =
            |field| super::is_partial(Be16::new(field), Be32::ZERO, Be32::ZERO, 17, 0xffff - 17);
        assert!(zero(0) && zero(0xffff) && !zero(1));
    }

    proptest! {
        #[test]
        fn an_update_equals_a_new_sum(
            mut bytes in proptest::collection::vec(any::<u8>(), 8..64),
            address: [u8; 4],
            port: [u8; 2],
        ) {
            if bytes.len() % 2 == 1 {
                bytes.push(0);
            }
            // A header of zeros only has two right sums; headers never are.
            bytes[6] |= 1;
            let before = Be16::new(reference(&bytes));
            let delta = Delta::of_address(
                Be32::from_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                Be32::from_bytes(address),
            )
            .and(Delta::of_word(Be16::from_bytes([bytes[4], bytes[5]]), Be16::from_bytes(port)));
            bytes[..4].copy_from_slice(&address);
            bytes[4..6].copy_from_slice(&port);
            prop_assert_eq!(delta.apply(before).get(), reference(&bytes));
            prop_assert_eq!(Delta::from_stored(delta.stored()).apply(before).get(), reference(&bytes));
        }

        #[test]
        fn finish_folds_any_wide_sum(words in proptest::collection::vec(any::<u32>(), 1..8)) {
            let mut bytes = Vec::new();
            let mut sum = 0u64;
            for word in &words {
                bytes.extend(word.to_ne_bytes());
                sum += u64::from(*word);
            }
            while sum > u64::from(u32::MAX) {
                sum = (sum & 0xffff_ffff) + (sum >> 32);
            }
            let field = finish(u32::try_from(sum).unwrap());
            prop_assert_eq!(field.get(), reference(&bytes));
        }
    }
}
