//! Numbers in network byte order, and the protocol numbers the datapath knows.
//!
//! A value read from a packet or kept in a map key is a [`Be16`] or a [`Be32`];
//! a bare integer is in host order. No address arithmetic beyond prefixes.

use core::fmt;

/// A 16-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Be16(u16);

impl Be16 {
    pub const ZERO: Self = Self(0);

    #[inline(always)]
    #[must_use]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    #[inline(always)]
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }

    #[inline(always)]
    #[must_use]
    pub const fn bytes(self) -> [u8; 2] {
        self.0.to_ne_bytes()
    }

    /// The number in host byte order.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The two bytes as the machine reads them, for checksum arithmetic, which
    /// does not care about the byte order as long as it is always the same.
    #[inline(always)]
    #[must_use]
    pub const fn raw(self) -> u16 {
        self.0
    }
}

impl fmt::Debug for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.get(), f)
    }
}

/// A 32-bit number in network byte order, mostly an IPv4 address.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Be32(u32);

impl Be32 {
    pub const ZERO: Self = Self(0);

    #[inline(always)]
    #[must_use]
    pub const fn new(host: u32) -> Self {
        Self(host.to_be())
    }

    #[inline(always)]
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(bytes))
    }

    #[inline(always)]
    #[must_use]
    pub const fn bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// The number in host byte order.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u32 {
        u32::from_be(self.0)
    }

    /// The four bytes as the machine reads them; see [`Be16::raw`].
    #[inline(always)]
    #[must_use]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The bytes that the machine read as `raw`.
    #[inline(always)]
    #[must_use]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// The mask of a prefix of `length` bits; more than 32 count as 32.
    #[must_use]
    pub const fn mask(length: u8) -> Self {
        if length == 0 {
            Self(0)
        } else if length >= 32 {
            Self(u32::MAX)
        } else {
            Self::new(u32::MAX << (32 - length))
        }
    }

    /// Whether both addresses lie in one network of this `mask`.
    #[inline(always)]
    #[must_use]
    pub const fn same_network(self, other: Self, mask: Self) -> bool {
        (self.0 ^ other.0) & mask.0 == 0
    }

    /// Whether the address can be a host's in its network of this `mask`: it is
    /// neither the network's own nor its broadcast address, which networks of two
    /// hosts or one do not have (RFC 3021).
    #[inline(always)]
    #[must_use]
    pub const fn is_host(self, mask: Self) -> bool {
        let host = self.0 & !mask.0;
        (host != 0 && host != !mask.0) || mask.get() >= u32::MAX - 1
    }

    /// 224.0.0.0/4, the limited broadcast address, 0.0.0.0/8 or 127.0.0.0/8:
    /// nothing that a NAT may forward (RFC 1812 section 5.3.7).
    #[inline(always)]
    #[must_use]
    pub const fn is_unroutable(self) -> bool {
        let [first, ..] = self.bytes();
        first >= 224 || first == 0 || first == 127
    }
}

impl From<core::net::Ipv4Addr> for Be32 {
    fn from(address: core::net::Ipv4Addr) -> Self {
        Self::from_bytes(address.octets())
    }
}

impl From<Be32> for core::net::Ipv4Addr {
    fn from(address: Be32) -> Self {
        Self::from(address.bytes())
    }
}

impl fmt::Debug for Be32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&core::net::Ipv4Addr::from(*self), f)
    }
}

/// IP protocol numbers (IANA).
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const GRE: u8 = 47;
    pub const ESP: u8 = 50;
    pub const SCTP: u8 = 132;
    pub const UDP_LITE: u8 = 136;
}

/// ICMP types and codes (RFC 792, 1191, 1812).
pub mod icmp {
    pub const ECHO_REPLY: u8 = 0;
    pub const DESTINATION_UNREACHABLE: u8 = 3;
    pub const SOURCE_QUENCH: u8 = 4;
    pub const REDIRECT: u8 = 5;
    pub const ECHO_REQUEST: u8 = 8;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER_PROBLEM: u8 = 12;
    pub const TIMESTAMP_REQUEST: u8 = 13;
    pub const TIMESTAMP_REPLY: u8 = 14;

    /// Code of [`DESTINATION_UNREACHABLE`]: fragmentation needed and DF set.
    pub const FRAGMENTATION_NEEDED: u8 = 4;
    /// Code of [`DESTINATION_UNREACHABLE`]: administratively prohibited.
    pub const ADMINISTRATIVELY_PROHIBITED: u8 = 13;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_network_order() {
        assert_eq!(Be16::new(0x1234).bytes(), [0x12, 0x34]);
        assert_eq!(Be16::from_bytes([0x12, 0x34]).get(), 0x1234);
        assert_eq!(Be32::new(0x0a00_0001).bytes(), [10, 0, 0, 1]);
        assert_eq!(std::format!("{:?}", Be32::new(0x0a00_0001)), "10.0.0.1");
    }

    #[test]
    fn masks_cover_their_prefix() {
        assert_eq!(Be32::mask(0), Be32::ZERO);
        assert_eq!(Be32::mask(24).bytes(), [255, 255, 255, 0]);
        assert_eq!(Be32::mask(32).bytes(), [255; 4]);
        let address = Be32::from_bytes([10, 0, 0, 200]);
        assert!(address.same_network(Be32::from_bytes([10, 0, 0, 1]), Be32::mask(24)));
        assert!(!address.same_network(Be32::from_bytes([10, 0, 0, 1]), Be32::mask(25)));
        assert!(address.is_host(Be32::mask(24)));
        for (last, length) in [(0, 24), (255, 24), (128, 25), (127, 25), (4, 30), (7, 30)] {
            assert!(!Be32::from_bytes([10, 0, 0, last]).is_host(Be32::mask(length)));
        }
        for (last, length) in [(0, 31), (1, 31), (0, 32), (255, 32), (5, 30), (6, 30)] {
            assert!(Be32::from_bytes([10, 0, 0, last]).is_host(Be32::mask(length)));
        }
    }
}
