//! IPv4 addresses in IPv6 addresses (RFC 6052): which prefixes can hold them, putting
//! them in, getting them out.
//!
//! Knows nothing of packets, and leaves it to the caller whether an address may be
//! used: see [`is_global`] and [`Prefix::may_hold`].

use crate::net::{Address, Be32, Be128};

/// The prefix that everybody may use (RFC 6052 section 2.1).
pub const WELL_KNOWN: Prefix = Prefix {
    address: Be128::from_words([Be32::new(0x0064_ff9b), Be32::ZERO, Be32::ZERO, Be32::ZERO]),
    length: 96,
    reserved: [0; 3],
};

/// An IPv6 prefix that IPv4 addresses are embedded behind.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    address: Be128,
    /// In bits; 0 where there is no prefix.
    length: u8,
    reserved: [u8; 3],
}

const _: () = assert!(size_of::<Prefix>() == 20);

/// What is wrong with a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixError {
    /// A length that is none of 32, 40, 48, 56, 64 and 96 (RFC 6052 section 2.2).
    Length,
    /// Bits are set behind the prefix.
    HostBits,
    /// Bits 64 to 71 are part of the prefix and are not all 0 (RFC 6052 section 2.2).
    ReservedBits,
    /// Multicast, link-local, or of addresses that nothing is forwarded to.
    Unroutable,
}

impl Prefix {
    /// # Errors
    /// What RFC 6052 does not allow of a prefix.
    pub fn new(address: Be128, length: u8) -> Result<Self, PrefixError> {
        let [_, _, third, _] = address.words();
        if !matches!(length, 32 | 40 | 48 | 56 | 64 | 96) {
            Err(PrefixError::Length)
        } else if !address.same_network(Be128::ZERO, inverted(Be128::mask(length))) {
            Err(PrefixError::HostBits)
        } else if third.bytes()[0] != 0 {
            Err(PrefixError::ReservedBits)
        } else if address.is_unroutable() || address.is_link_local() {
            Err(PrefixError::Unroutable)
        } else {
            Ok(Self {
                address,
                length,
                reserved: [0; 3],
            })
        }
    }

    #[must_use]
    pub const fn address(self) -> Be128 {
        self.address
    }

    /// In bits.
    #[must_use]
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether there is one.
    #[inline(always)]
    #[must_use]
    pub const fn is_set(self) -> bool {
        self.length != 0
    }

    /// Whether the address begins with the prefix.
    #[inline(always)]
    #[must_use]
    pub fn contains(self, address: Be128) -> bool {
        self.is_set() && address.same_network(self.address, Be128::mask(self.length))
    }

    /// The IPv6 address that stands for this IPv4 address (RFC 6052 section 2.2).
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "taken apart")]
    pub const fn embed(self, address: Be32) -> Be128 {
        let [first, second, third, _] = self.address.words();
        let address = address.get();
        if self.length == 96 {
            return Be128::from_words([first, second, third, Be32::new(address)]);
        }
        // So many bits do not fit before bits 64 to 71, which stay 0, and follow them.
        let behind = self.behind();
        let second = second.get() | (address as u64 >> behind) as u32;
        let last = (address as u64 & ((1 << behind) - 1)) << (56 - behind);
        Be128::from_words([
            first,
            Be32::new(second),
            Be32::new((last >> 32) as u32),
            Be32::new(last as u32),
        ])
    }

    /// The IPv4 address that this IPv6 address stands for; `None` if it does not begin
    /// with the prefix or has a bit of 64 to 71 set. What follows the IPv4 address does
    /// not matter (RFC 6052 section 2.2: "ignored on receipt").
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "taken apart")]
    pub fn extract(self, address: Be128) -> Option<Be32> {
        if !self.contains(address) {
            return None;
        }
        let [_, second, third, fourth] = address.words();
        if self.length == 96 {
            return Some(fourth);
        }
        let behind = self.behind();
        let last = u64::from(third.get()) << 32 | u64::from(fourth.get());
        let before = (u64::from(second.get()) << behind) as u32;
        let after = (last >> (56 - behind)) as u32;
        (last >> 56 == 0).then_some(Be32::new(before | after))
    }

    /// Whether the address may stand behind this prefix: behind the well-known one only
    /// those may that are the same everywhere (RFC 6052 section 3.1).
    #[inline(always)]
    #[must_use]
    pub fn may_hold(self, address: Be32) -> bool {
        self.address != WELL_KNOWN.address || is_global(address)
    }

    /// How many bits of the IPv4 address follow bits 64 to 71.
    #[inline(always)]
    const fn behind(self) -> u32 {
        // The verifier wants to see that no shift is too long.
        (self.length as u32).wrapping_sub(32) & 0x3f
    }
}

#[inline(always)]
fn inverted(address: Be128) -> Be128 {
    Be128::from_words(address.words().map(|word| Be32::from_raw(!word.raw())))
}

/// Whether the IPv4 address means the same host everywhere: it is not for private
/// (RFC 1918) or special use (RFC 5735 section 3, RFC 6598).
#[inline(always)]
#[must_use]
pub const fn is_global(address: Be32) -> bool {
    !matches!(
        address.bytes(),
        [0 | 10 | 127 | 224..=255, ..]
            | [100, 64..=127, ..]
            | [169, 254, ..]
            | [172, 16..=31, ..]
            | [192, 168, ..]
            | [192, 0, 0 | 2, _]
            | [192, 88, 99, _]
            | [198, 18 | 19, ..]
            | [198, 51, 100, _]
            | [203, 0, 113, _]
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn v4(text: &str) -> Be32 {
        text.parse::<Ipv4Addr>().unwrap().into()
    }

    fn v6(text: &str) -> Be128 {
        text.parse::<Ipv6Addr>().unwrap().into()
    }

    fn prefix(text: &str) -> Result<Prefix, PrefixError> {
        let (address, length) = text.split_once('/').unwrap();
        Prefix::new(v6(address), length.parse().unwrap())
    }

    #[test]
    fn the_tables_of_rfc_6052_section_2_4() {
        let address = v4("192.0.2.33");
        for (text, expected) in [
            ("2001:db8::/32", "2001:db8:c000:221::"),
            ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
            ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
            ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
            ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
            ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
            ("64:ff9b::/96", "64:ff9b::192.0.2.33"),
        ] {
            let prefix = prefix(text).unwrap();
            assert_eq!(prefix.embed(address), v6(expected), "{text}");
            assert_eq!(prefix.extract(v6(expected)), Some(address), "{text}");
        }
        assert_eq!(prefix("64:ff9b::/96"), Ok(WELL_KNOWN));
    }

    #[test]
    fn prefixes_that_rfc_6052_does_not_know_are_refused() {
        for length in (0..=u8::MAX).filter(|length| ![32, 40, 48, 56, 64, 96].contains(length)) {
            let refused = Prefix::new(v6("2001:db8::"), length);
            assert_eq!(refused, Err(PrefixError::Length), "{length}");
        }
        for (text, error) in [
            ("2001:db8:1::/32", PrefixError::HostBits),
            ("2001:db8::1/96", PrefixError::HostBits),
            ("2001:db8:0:0:100::/96", PrefixError::ReservedBits),
            ("2001:db8:0:0:ff00::/96", PrefixError::ReservedBits),
            ("::/96", PrefixError::Unroutable),
            ("::ffff:0:0/96", PrefixError::Unroutable),
            ("ff0e::/32", PrefixError::Unroutable),
            ("fe80::/64", PrefixError::Unroutable),
        ] {
            assert_eq!(prefix(text), Err(error), "{text}");
        }
        assert!(prefix("2001:db8:0:0:ff::/96").is_ok());
        assert!(prefix("64:ff9b:1::/48").is_ok());
    }

    #[test]
    fn what_is_behind_the_address_does_not_matter_and_what_is_before_does() {
        let prefix = prefix("2001:db8:100::/40").unwrap();
        let address = Some(v4("192.0.2.33"));
        assert_eq!(
            prefix.extract(v6("2001:db8:1c0:2:21:1234:5678:9abc")),
            address
        );
        // Bits 64 to 71.
        assert_eq!(prefix.extract(v6("2001:db8:1c0:2:121::")), None);
        assert_eq!(prefix.extract(v6("2001:db8:2c0:2:21::")), None);
        assert_eq!(Prefix::default().extract(v6("::192.0.2.33")), None);
    }

    #[test]
    fn private_addresses_are_not_behind_the_well_known_prefix() {
        let own = prefix("2001:db8::/96").unwrap();
        for local in [
            "0.0.0.1",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "169.254.1.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.33",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!WELL_KNOWN.may_hold(v4(local)), "{local}");
            assert!(own.may_hold(v4(local)), "{local}");
        }
        for global in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "169.253.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.0.3.1",
            "192.88.98.1",
            "192.167.1.1",
            "192.169.1.1",
            "198.17.0.1",
            "198.20.0.1",
            "198.51.101.1",
            "203.0.112.1",
            "223.255.255.255",
        ] {
            assert!(WELL_KNOWN.may_hold(v4(global)), "{global}");
        }
    }

    proptest! {
        #[test]
        fn any_address_comes_out_as_it_went_in(
            bytes: [u8; 16],
            length in prop::sample::select(vec![32, 40, 48, 56, 64, 96]),
            address: [u8; 4],
            rest: [u8; 16],
        ) {
            let mut bytes = bytes;
            bytes[0] = 0x20;
            bytes[8] = 0;
            bytes[usize::from(length) / 8..].fill(0);
            let prefix = Prefix::new(Be128::from_bytes(bytes), length).unwrap();
            let embedded = prefix.embed(Be32::from_bytes(address));
            prop_assert!(prefix.contains(embedded));
            prop_assert_eq!(prefix.extract(embedded), Some(Be32::from_bytes(address)));

            // Byte by byte, as the RFC's figure has it.
            let mut places = (usize::from(length) / 8..16).filter(|place| *place != 8);
            let mut expected = bytes;
            for byte in address {
                expected[places.next().unwrap()] = byte;
            }
            prop_assert_eq!(embedded.bytes(), expected);
            for place in places {
                expected[place] = rest[place];
            }
            let suffixed = prefix.extract(Be128::from_bytes(expected));
            prop_assert_eq!(suffixed, Some(Be32::from_bytes(address)));
        }
    }
}
