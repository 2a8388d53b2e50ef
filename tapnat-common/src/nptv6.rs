//! Prefix translation (RFC 6296): one prefix for another, and one word of the address
//! changed so that no checksum over addresses changes.
//!
//! So nothing in a packet changes but the address itself, in an ICMPv6 error's quoted
//! header as little as in the header: no transport checksum, known or unknown, and not
//! the error's own. Knows nothing of sessions: there are none.

use crate::{
    checksum::Delta,
    frame::Frame,
    net::{Address, Be16, Be32, Be128},
};

/// The longest prefix: behind it there are words to make up for its change.
pub const LONGEST: u8 = 64;

/// Two prefixes that are translated into each other.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixPair {
    internal: Be128,
    external: Be128,
    /// In bits; 0 where there is no pair.
    internal_length: u8,
    external_length: u8,
    /// What the internal prefix adds to a sum more than the external one, as
    /// [`Delta::stored`] has it.
    adjustment: u16,
}

const _: () = assert!(size_of::<PrefixPair>() == 36);

/// What is wrong with a pair of prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairError {
    /// Longer than [`LONGEST`], or 0.
    Length,
    /// Bits are set behind a prefix.
    HostBits,
    /// Multicast, link-local, or of addresses that nothing is forwarded to.
    Unroutable,
    /// One prefix lies within the other.
    Overlap,
}

/// The way of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the internal to the external network.
    Out,
    /// From the external to the internal network.
    In,
}

/// Why an address has no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untranslatable {
    /// It does not begin with the prefix, at the length of the longer of the two.
    Outside,
    /// The subnet has the number 0xffff, which would become that of subnet 0.
    SubnetAllOnes,
    /// Behind prefixes longer than 48 bits: an interface identifier of ones only has no
    /// word to change, and one of zeros only is no host's (RFC 6296 section 3.7). The
    /// standard wants the sender to be told of a parameter problem.
    InterfaceIdentifier,
}

impl PrefixPair {
    /// The pair, with its adjustment computed (RFC 6296 section 3.1). The shorter prefix
    /// counts as if it were continued with zeros.
    ///
    /// # Errors
    /// What makes the two no pair.
    pub fn new(
        (internal, internal_length): (Be128, u8),
        (external, external_length): (Be128, u8),
    ) -> Result<Self, PairError> {
        for (address, length) in [(internal, internal_length), (external, external_length)] {
            if !(1..=LONGEST).contains(&length) {
                return Err(PairError::Length);
            }
            if replace(address, Be128::ZERO, length) != Be128::ZERO {
                return Err(PairError::HostBits);
            }
            if address.is_unroutable() || address.is_link_local() {
                return Err(PairError::Unroutable);
            }
        }
        let shorter = Be128::mask(internal_length.min(external_length));
        if internal.same_network(external, shorter) {
            return Err(PairError::Overlap);
        }
        Ok(Self {
            internal,
            external,
            internal_length,
            external_length,
            adjustment: Delta::of_address(external, internal).stored(),
        })
    }

    /// The prefix of the network inside, and its length in bits.
    #[must_use]
    pub const fn internal(self) -> (Be128, u8) {
        (self.internal, self.internal_length)
    }

    /// The prefix that others know the network by, and its length in bits.
    #[must_use]
    pub const fn external(self) -> (Be128, u8) {
        (self.external, self.external_length)
    }

    /// Whether there is one.
    #[inline(always)]
    #[must_use]
    pub const fn is_set(self) -> bool {
        self.internal_length != 0
    }

    /// The length in bits that both prefixes count as.
    #[inline(always)]
    #[must_use]
    pub const fn length(self) -> u8 {
        if self.internal_length > self.external_length {
            self.internal_length
        } else {
            self.external_length
        }
    }

    /// Whether packets from there are translated.
    #[inline(always)]
    #[must_use]
    pub fn has_internal(self, address: Be128) -> bool {
        self.is_set() && address.same_network(self.internal, Be128::mask(self.length()))
    }

    /// Whether packets to there are translated.
    #[inline(always)]
    #[must_use]
    pub fn has_external(self, address: Be128) -> bool {
        self.is_set() && address.same_network(self.external, Be128::mask(self.length()))
    }

    /// The external address of an internal one (RFC 6296 section 3.2).
    ///
    /// # Errors
    /// Why there is none.
    #[inline(always)]
    pub fn translate_out(self, address: Be128) -> Result<Be128, Untranslatable> {
        let adjustment = Delta::from_stored(self.adjustment);
        self.translate(address, self.internal, self.external, adjustment)
    }

    /// The internal address of an external one (RFC 6296 section 3.3).
    ///
    /// # Errors
    /// Why there is none.
    #[inline(always)]
    pub fn translate_in(self, address: Be128) -> Result<Be128, Untranslatable> {
        let adjustment = Delta::from_stored(!self.adjustment);
        self.translate(address, self.external, self.internal, adjustment)
    }

    /// Translates the one address of an IPv6 header that is of the network the packet
    /// leaves: of the packet's own header, or of the one that an ICMPv6 error quotes,
    /// which travelled the other way. `None` when the frame could not be read or changed.
    ///
    /// What the quoted header says need not be of this network at all; an error of
    /// [`Untranslatable::Outside`] then means that nothing was to be done.
    #[inline(always)]
    pub fn apply<F: Frame>(
        self,
        frame: &mut F,
        header_offset: u32,
        direction: Direction,
        is_quoted: bool,
    ) -> Option<Result<(), Untranslatable>> {
        const SOURCE: u32 = 8;
        const DESTINATION: u32 = 24;
        let is_out = direction == Direction::Out;
        let field = if is_out == is_quoted {
            DESTINATION
        } else {
            SOURCE
        };
        let old = frame.read::<Be128>(header_offset + field)?;
        let new = match direction {
            Direction::Out => self.translate_out(old),
            Direction::In => self.translate_in(old),
        };
        match new {
            Ok(new) => frame.write(header_offset + field, &new).map(Ok),
            Err(reason) => Some(Err(reason)),
        }
    }

    #[inline(always)]
    fn translate(
        self,
        address: Be128,
        from: Be128,
        to: Be128,
        adjustment: Delta,
    ) -> Result<Be128, Untranslatable> {
        let length = self.length();
        if !self.is_set() || !address.same_network(from, Be128::mask(length)) {
            return Err(Untranslatable::Outside);
        }
        let [first, second, third, fourth] = replace(address, to, length).words();
        if length <= 48 {
            let (routing, subnet) = halves(second);
            let subnet = adjust(subnet, adjustment).ok_or(Untranslatable::SubnetAllOnes)?;
            let second = joined(routing, subnet);
            return Ok(Be128::from_words([first, second, third, fourth]));
        }
        let (third, fourth) = adjust_identifier(third, fourth, adjustment)
            .ok_or(Untranslatable::InterfaceIdentifier)?;
        Ok(Be128::from_words([first, second, third, fourth]))
    }
}

/// Changes the first word of an interface identifier that is not 0xffff (RFC 6296 section
/// 3.5). `None` if there is none, or if it is or would become the identifier of nobody.
#[inline(always)]
fn adjust_identifier(third: Be32, fourth: Be32, adjustment: Delta) -> Option<(Be32, Be32)> {
    let (a, b) = halves(third);
    let (c, d) = halves(fourth);
    let (new_third, new_fourth) = if let Some(a) = adjust(a, adjustment) {
        (joined(a, b), fourth)
    } else if let Some(b) = adjust(b, adjustment) {
        (joined(a, b), fourth)
    } else if let Some(c) = adjust(c, adjustment) {
        (third, joined(c, d))
    } else {
        (third, joined(c, adjust(d, adjustment)?))
    };
    let was_nobody = third.raw() | fourth.raw() == 0;
    let is_nobody = new_third.raw() | new_fourth.raw() == 0;
    (!was_nobody && !is_nobody).then_some((new_third, new_fourth))
}

/// The word after the change, never 0xffff (RFC 6296 section 3.2); `None` if it was that.
#[inline(always)]
const fn adjust(word: Be16, adjustment: Delta) -> Option<Be16> {
    const ONES: u16 = 0xffff;
    if word.raw() == ONES {
        return None;
    }
    let sum = Delta::from_stored(word.raw()).and(adjustment).stored();
    Some(Be16::from_bytes(
        if sum == ONES { 0 } else { sum }.to_ne_bytes(),
    ))
}

#[inline(always)]
const fn halves(word: Be32) -> (Be16, Be16) {
    let [a, b, c, d] = word.bytes();
    (Be16::from_bytes([a, b]), Be16::from_bytes([c, d]))
}

#[inline(always)]
const fn joined(high: Be16, low: Be16) -> Be32 {
    let ([a, b], [c, d]) = (high.bytes(), low.bytes());
    Be32::from_bytes([a, b, c, d])
}

/// The address with its first `length` bits from the prefix.
#[inline(always)]
fn replace(address: Be128, prefix: Be128, length: u8) -> Be128 {
    let (address, prefix) = (address.words(), prefix.words());
    let mask = Be128::mask(length).words();
    Be128::from_words([
        choose(address[0], prefix[0], mask[0]),
        choose(address[1], prefix[1], mask[1]),
        choose(address[2], prefix[2], mask[2]),
        choose(address[3], prefix[3], mask[3]),
    ])
}

/// The bits of `masked` where the mask is set, and of `other` elsewhere.
#[inline(always)]
const fn choose(other: Be32, masked: Be32, mask: Be32) -> Be32 {
    Be32::from_raw((other.raw() & !mask.raw()) | (masked.raw() & mask.raw()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv6Addr;
    use tapnat_testbed::packet::checksum::sum;

    fn v6(text: &str) -> Be128 {
        text.parse::<Ipv6Addr>().unwrap().into()
    }

    fn prefix(text: &str) -> (Be128, u8) {
        let (address, length) = text.split_once('/').unwrap();
        (v6(address), length.parse().unwrap())
    }

    fn pair(internal: &str, external: &str) -> Result<PrefixPair, PairError> {
        PrefixPair::new(prefix(internal), prefix(external))
    }

    /// RFC 6296 section 3.6, with erratum 3033.
    #[test]
    fn the_example_of_the_standard() {
        let pair = pair("fd01:203:405::/48", "2001:db8:1::/48").unwrap();
        assert_eq!(
            Be16::from_bytes(pair.adjustment.to_ne_bytes()).get(),
            0xd54f
        );
        let internal = v6("fd01:203:405:1::1234");
        let external = v6("2001:db8:1:d550::1234");
        assert_eq!(pair.translate_out(internal), Ok(external));
        assert_eq!(pair.translate_in(external), Ok(internal));
        let none = PrefixPair::default();
        assert_eq!(none.translate_out(internal), Err(Untranslatable::Outside));
    }

    /// The topologies of RFC 6296 sections 2.1 to 2.4: one network behind two, two
    /// translators to one upstream network, two homes.
    #[test]
    fn the_prefixes_of_the_figures() {
        for external in ["2001:db8:1::/48", "2001:db8:6666::/48"] {
            let pair = pair("fd01:4444:5555::/48", external).unwrap();
            for subnet in ["0", "1", "8000", "fffe"] {
                let internal = v6(&format!("fd01:4444:5555:{subnet}::1"));
                let translated = pair.translate_out(internal).unwrap();
                assert_eq!(sum(&[&translated.bytes()]), sum(&[&internal.bytes()]));
                assert_eq!(pair.translate_in(translated), Ok(internal));
            }
        }
    }

    #[test]
    fn longer_prefixes_change_the_first_word_that_is_not_ones() {
        let pair = pair("fd00:0:0:1200::/56", "2001:db8:0:3400::/56").unwrap();
        // 0xfd00 + 0x1200 - 0x2001 - 0x0db8 - 0x3400, with the carry, is 0xad47.
        for (internal, external) in [
            ("fd00:0:0:12ab::1", "2001:db8:0:34ab:ad47::1"),
            ("fd00::12ab:ffff:0:0:1", "2001:db8:0:34ab:ffff:ad47:0:1"),
            (
                "fd00::12ab:ffff:ffff:0:1",
                "2001:db8:0:34ab:ffff:ffff:ad47:1",
            ),
            (
                "fd00::12ab:ffff:ffff:ffff:1",
                "2001:db8:0:34ab:ffff:ffff:ffff:ad48",
            ),
            // 0x52b8 + 0xad47 is 0xffff, which is written as 0.
            ("fd00::12ab:52b8:0:0:1", "2001:db8:0:34ab::1"),
        ] {
            assert_eq!(
                pair.translate_out(v6(internal)),
                Ok(v6(external)),
                "{internal}"
            );
            assert_eq!(
                pair.translate_in(v6(external)),
                Ok(v6(internal)),
                "{external}"
            );
        }
    }

    #[test]
    fn addresses_without_a_counterpart_are_told_apart() {
        let short = pair("fd01:203:405::/48", "2001:db8:1::/48").unwrap();
        let outside = Err(Untranslatable::Outside);
        assert_eq!(short.translate_out(v6("fd01:203:406:1::1")), outside);
        assert_eq!(short.translate_in(v6("fd01:203:405:1::1")), outside);
        let ones = Err(Untranslatable::SubnetAllOnes);
        assert_eq!(short.translate_out(v6("fd01:203:405:ffff::1")), ones);
        assert_eq!(short.translate_in(v6("2001:db8:1:ffff::1")), ones);
        // The identifier is left alone, whatever it is.
        assert!(short.translate_out(v6("fd01:203:405:1::")).is_ok());
        let all = v6("fd01:203:405:1:ffff:ffff:ffff:ffff");
        assert!(short.translate_out(all).is_ok());

        let long = pair("fd00:0:0:1200::/56", "2001:db8:0:3400::/56").unwrap();
        let identifier = Err(Untranslatable::InterfaceIdentifier);
        for nobody in [
            "fd00:0:0:12ab::",
            "fd00::12ab:ffff:ffff:ffff:ffff",
            "fd00::12ab:52b8:0:0:0",
        ] {
            assert_eq!(long.translate_out(v6(nobody)), identifier, "{nobody}");
        }
        assert_eq!(long.translate_in(v6("2001:db8:0:34ab::")), identifier);
    }

    /// RFC 6296 section 3.1: both are extended to the longer one's length with zeros.
    #[test]
    fn the_shorter_prefix_is_continued_with_zeros() {
        let pair = pair("fd01:203::/32", "2001:db8:1:1200::/56").unwrap();
        let internal = v6("fd01:203:0:ab::5");
        let external = pair.translate_out(internal).unwrap();
        let mask = Be128::mask(56);
        assert!(
            external.same_network(v6("2001:db8:1:1200::"), mask),
            "{external:?}"
        );
        assert_eq!(pair.translate_in(external), Ok(internal));
        let beyond = v6("fd01:203:0:1ab::5");
        assert_eq!(pair.translate_out(beyond), Err(Untranslatable::Outside));
    }

    #[test]
    fn prefixes_that_make_no_pair_are_refused() {
        let good = "2001:db8:1::/48";
        for (internal, error) in [
            ("::/0", PairError::Length),
            ("fd00::/65", PairError::Length),
            ("fd00::/128", PairError::Length),
            ("fd00::1/48", PairError::HostBits),
            ("fd00:0:0:1::/48", PairError::HostBits),
            ("ff05::/48", PairError::Unroutable),
            ("fe80::/64", PairError::Unroutable),
            ("2001:db8:1::/48", PairError::Overlap),
            ("2001:db8::/32", PairError::Overlap),
            ("2001:db8:1:2::/64", PairError::Overlap),
        ] {
            assert_eq!(pair(internal, good), Err(error), "{internal}");
            assert_eq!(pair(good, internal), Err(error), "{internal}");
        }
    }

    prop_compose! {
        /// A pair of prefixes, and an address behind the internal one.
        fn pair_and_address()(
            internal: [u8; 16],
            external: [u8; 16],
            internal_length in 8..=LONGEST,
            external_length in 8..=LONGEST,
            words in prop::collection::vec(prop_oneof![Just(0), Just(0xffff), any::<u16>()], 8),
        ) -> (PrefixPair, Be128) {
            let canonical = |mut bytes: [u8; 16], first, length| {
                bytes[0] = first;
                (replace(Be128::ZERO, Be128::from_bytes(bytes), length), length)
            };
            let internal = canonical(internal, 0xfd, internal_length);
            let external = canonical(external, 0x20, external_length);
            let pair = PrefixPair::new(internal, external).unwrap();
            let mut bytes = [0; 16];
            for (place, word) in bytes.chunks_mut(2).zip(words) {
                place.copy_from_slice(&u16::to_be_bytes(word));
            }
            (pair, replace(Be128::from_bytes(bytes), pair.internal, pair.length()))
        }
    }

    proptest! {
        #[test]
        fn every_translation_is_neutral_and_has_a_way_back(
            (pair, internal) in pair_and_address()
        ) {
            match pair.translate_out(internal) {
                Ok(external) => {
                    prop_assert!(external.same_network(pair.external, Be128::mask(pair.length())));
                    // Both zeros of one's complement mean the same to a receiver.
                    let neutral = sum(&[&external.bytes()]) % 0xffff;
                    prop_assert_eq!(neutral, sum(&[&internal.bytes()]) % 0xffff);
                    prop_assert_eq!(pair.translate_in(external), Ok(internal));
                }
                Err(Untranslatable::SubnetAllOnes) => {
                    prop_assert!(pair.length() <= 48);
                    prop_assert_eq!(&internal.bytes()[6..8], &[0xff; 2]);
                }
                Err(Untranslatable::InterfaceIdentifier) => prop_assert!(pair.length() > 48),
                Err(Untranslatable::Outside) => prop_assert!(false, "{:?}", internal),
            }
        }
    }
}
