//! Numbers in network byte order, addresses of both families, and the protocol
//! numbers the datapath knows.
//!
//! A value read from a packet or kept in a map key is a [`Be16`], a [`Be32`] or a
//! [`Be128`]; a bare integer is in host order. No address arithmetic beyond
//! prefixes, and nothing of a header: that is [`crate::network`]'s.

use core::{
    fmt,
    hash::{Hash, Hasher},
};

/// An address of one IP family. What is generic over it serves both.
pub trait Address: Copy + Default + Eq + Hash + fmt::Debug + 'static {
    /// The length of an address in bits.
    const BITS: u8;
    /// The address of nobody: 0.0.0.0 or ::.
    const UNSPECIFIED: Self;

    /// The mask of a prefix of `length` bits; more than there are count as all.
    fn mask(length: u8) -> Self;

    /// Whether both addresses lie in one network of this `mask`.
    fn same_network(self, other: Self, mask: Self) -> bool;

    /// Whether the address can be a host's in its network of this `mask`.
    fn is_host(self, mask: Self) -> bool;

    /// Whether nothing may be forwarded to this address, whatever the scope of
    /// multicast.
    fn is_unroutable(self) -> bool;

    /// Multicast, or the limited broadcast.
    fn is_multicast(self) -> bool;

    /// Whether packets from or to the address stay on their link (RFC 4291 section
    /// 2.5.6). IPv4's are forwarded here like any other.
    fn is_link_local(self) -> bool;

    /// Whether the address stands in for a guest that has none of this family (see
    /// [`crate::nat::nat64`]).
    fn is_stand_in(self) -> bool;

    /// The sum of the address' words of 16 bits, as the machine reads them, for
    /// checksums. At most 2^19.
    fn sum(self) -> u32;

    /// 32 bits that neighbouring addresses differ in.
    fn low_bits(self) -> u32;

    /// The address where both families have to fit: IPv4's are mapped (RFC 4291 section
    /// 2.5.5.2).
    fn mapped(self) -> Be128;

    /// An address that nobody in the world has and that tells this number from
    /// others below 2^24: of "this network" (RFC 1122 section 3.2.1.3), or of
    /// `::/96`, which is not assigned (RFC 4291 section 2.5.5.1).
    fn of_nobody(number: u32) -> Self;
}

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

    /// See [`Address::sum`].
    #[inline(always)]
    #[must_use]
    pub const fn sum(self) -> u32 {
        (self.0 & 0xffff) + (self.0 >> 16)
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

impl Address for Be32 {
    const BITS: u8 = 32;
    const UNSPECIFIED: Self = Self::ZERO;

    #[inline(always)]
    fn mask(length: u8) -> Self {
        Self::mask(length)
    }

    #[inline(always)]
    fn same_network(self, other: Self, mask: Self) -> bool {
        self.same_network(other, mask)
    }

    #[inline(always)]
    fn is_host(self, mask: Self) -> bool {
        self.is_host(mask)
    }

    #[inline(always)]
    fn is_unroutable(self) -> bool {
        self.is_unroutable()
    }

    #[inline(always)]
    fn is_multicast(self) -> bool {
        matches!(self.bytes(), [224..=239, ..] | [255, 255, 255, 255])
    }

    #[inline(always)]
    fn is_link_local(self) -> bool {
        false
    }

    #[inline(always)]
    fn is_stand_in(self) -> bool {
        crate::nat::nat64::is_stand_in(self)
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        self.sum()
    }

    #[inline(always)]
    fn low_bits(self) -> u32 {
        self.get()
    }

    #[inline(always)]
    fn mapped(self) -> Be128 {
        Be128([0, 0, 0xffff_u32.to_be(), self.0])
    }

    #[inline(always)]
    fn of_nobody(number: u32) -> Self {
        Self::new(number)
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

impl From<Be32> for core::net::IpAddr {
    fn from(address: Be32) -> Self {
        Self::V4(address.into())
    }
}

impl From<Be128> for core::net::IpAddr {
    fn from(address: Be128) -> Self {
        Self::V6(address.into())
    }
}

/// A 128-bit number in network byte order: an IPv6 address.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
pub struct Be128([u32; 4]);

impl Be128 {
    pub const ZERO: Self = Self([0; 4]);

    /// From the number in host byte order.
    #[must_use]
    pub const fn new(host: u128) -> Self {
        Self::from_bytes(host.to_be_bytes())
    }

    #[inline(always)]
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let (words, _) = bytes.as_chunks();
        Self([
            u32::from_ne_bytes(words[0]),
            u32::from_ne_bytes(words[1]),
            u32::from_ne_bytes(words[2]),
            u32::from_ne_bytes(words[3]),
        ])
    }

    #[must_use]
    pub const fn bytes(self) -> [u8; 16] {
        self.get().to_be_bytes()
    }

    /// The number in host byte order.
    #[must_use]
    pub const fn get(self) -> u128 {
        let [a, b, c, d] = self.0;
        (u32::from_be(a) as u128) << 96
            | (u32::from_be(b) as u128) << 64
            | (u32::from_be(c) as u128) << 32
            | u32::from_be(d) as u128
    }

    /// The four words of 32 bits, first to last.
    #[inline(always)]
    #[must_use]
    pub const fn words(self) -> [Be32; 4] {
        let [a, b, c, d] = self.0;
        [Be32(a), Be32(b), Be32(c), Be32(d)]
    }

    #[inline(always)]
    #[must_use]
    pub const fn from_words([a, b, c, d]: [Be32; 4]) -> Self {
        Self([a.0, b.0, c.0, d.0])
    }

    /// The first of its words of 16 bits, in host byte order.
    #[inline(always)]
    const fn beginning(self) -> u32 {
        u32::from_be(self.0[0]) >> 16
    }
}

impl PartialEq for Be128 {
    // Without a call, as an array's would be.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (own, others) = (self.0, other.0);
        (own[0] ^ others[0]) | (own[1] ^ others[1]) | (own[2] ^ others[2]) | (own[3] ^ others[3])
            == 0
    }
}

impl Eq for Be128 {}

impl Hash for Be128 {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Address for Be128 {
    const BITS: u8 = 128;
    const UNSPECIFIED: Self = Self::ZERO;

    /// Word by word: the kernel's target has no numbers of 128 bits.
    #[inline(always)]
    fn mask(length: u8) -> Self {
        Self::from_words([
            Be32::mask(length),
            Be32::mask(length.saturating_sub(32)),
            Be32::mask(length.saturating_sub(64)),
            Be32::mask(length.saturating_sub(96)),
        ])
    }

    #[inline(always)]
    fn same_network(self, other: Self, mask: Self) -> bool {
        let (own, others, mask) = (self.0, other.0, mask.0);
        let differs = |word: usize| (own[word] ^ others[word]) & mask[word];
        differs(0) | differs(1) | differs(2) | differs(3) == 0
    }

    /// The subnet-router anycast address is not (RFC 4291 section 2.6.1), but in
    /// networks of two hosts or one (RFC 6164).
    #[inline(always)]
    fn is_host(self, mask: Self) -> bool {
        let (own, mask) = (self.0, mask.0);
        let host = |word: usize| own[word] & !mask[word];
        let is_short =
            mask[0] & mask[1] & mask[2] == u32::MAX && u32::from_be(mask[3]) >= u32::MAX - 1;
        host(0) | host(1) | host(2) | host(3) != 0 || is_short
    }

    /// `::`, `::1`, what is mapped from IPv4 (RFC 4291 section 2.5.5.2, RFC 4942 section
    /// 2.2), and all multicast.
    #[inline(always)]
    fn is_unroutable(self) -> bool {
        let [a, b, c, d] = self.0;
        let is_reserved =
            a | b == 0 && ((c == 0 && u32::from_be(d) <= 1) || c == 0xffff_u32.to_be());
        is_reserved || self.is_multicast()
    }

    #[inline(always)]
    fn is_multicast(self) -> bool {
        self.beginning() >> 8 == 0xff
    }

    #[inline(always)]
    fn is_link_local(self) -> bool {
        self.beginning() & 0xffc0 == 0xfe80
    }

    #[inline(always)]
    fn is_stand_in(self) -> bool {
        false
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        let [a, b, c, d] = self.words();
        a.sum() + b.sum() + c.sum() + d.sum()
    }

    #[inline(always)]
    fn low_bits(self) -> u32 {
        let [a, b, c, d] = self.0;
        // Guests in one network differ at the end, or all over it.
        u32::from_be(d) ^ u32::from_be(c) ^ b ^ a
    }

    #[inline(always)]
    fn mapped(self) -> Be128 {
        self
    }

    #[inline(always)]
    fn of_nobody(number: u32) -> Self {
        Self([0, 0, 0, number.to_be()])
    }
}

impl From<core::net::Ipv6Addr> for Be128 {
    fn from(address: core::net::Ipv6Addr) -> Self {
        Self::from_bytes(address.octets())
    }
}

impl From<Be128> for core::net::Ipv6Addr {
    fn from(address: Be128) -> Self {
        Self::from(address.bytes())
    }
}

impl fmt::Debug for Be128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&core::net::Ipv6Addr::from(*self), f)
    }
}

/// IP protocol numbers (IANA).
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const GRE: u8 = 47;
    pub const ESP: u8 = 50;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
    pub const UDP_LITE: u8 = 136;

    /// IPv6 extension headers (RFC 8200 section 4, RFC 4302).
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION_OPTIONS: u8 = 60;

    /// Whether this is one of the two ICMPs, whose queries have an identifier in the
    /// place of a port.
    #[inline(always)]
    #[must_use]
    pub const fn is_icmp(number: u8) -> bool {
        matches!(number, ICMP | ICMPV6)
    }
}

/// ICMP types and codes (RFC 792, 1191, 1812).
pub mod icmp {
    pub const ECHO_REPLY: u8 = 0;
    pub const DESTINATION_UNREACHABLE: u8 = 3;
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

/// ICMPv6 types and codes (RFC 4443, 4861).
pub mod icmpv6 {
    pub const DESTINATION_UNREACHABLE: u8 = 1;
    pub const PACKET_TOO_BIG: u8 = 2;
    pub const TIME_EXCEEDED: u8 = 3;
    pub const PARAMETER_PROBLEM: u8 = 4;
    pub const ECHO_REQUEST: u8 = 128;
    pub const ECHO_REPLY: u8 = 129;
    pub const ROUTER_SOLICITATION: u8 = 133;
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    pub const REDIRECT: u8 = 137;
    /// Multicast listeners: query, report and done of the first version (RFC 2710), and the report
    /// of the second (RFC 3810).
    pub const MULTICAST_LISTENER_QUERY: u8 = 130;
    pub const MULTICAST_LISTENER_DONE: u8 = 132;
    pub const MULTICAST_LISTENER_REPORT: u8 = 143;

    /// Code of [`DESTINATION_UNREACHABLE`]: administratively prohibited.
    pub const ADMINISTRATIVELY_PROHIBITED: u8 = 1;
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

    fn v6(text: &str) -> Be128 {
        text.parse::<core::net::Ipv6Addr>().unwrap().into()
    }

    #[test]
    fn long_numbers_keep_their_network_order() {
        let address = v6("2001:db8::1:2");
        assert_eq!(std::format!("{address:?}"), "2001:db8::1:2");
        assert_eq!(Be128::new(address.get()), address);
        assert_eq!(Be128::from_bytes(address.bytes()), address);
        assert_eq!(Be128::from_words(address.words()), address);
        assert_ne!(address, v6("2001:db8::1:3"));
        assert_eq!(<Be128 as Address>::mask(64), v6("ffff:ffff:ffff:ffff::"));
        assert_eq!(<Be128 as Address>::mask(0), Be128::ZERO);
        assert_eq!(<Be128 as Address>::mask(200), <Be128 as Address>::mask(128));
    }

    #[test]
    fn ipv6_addresses_are_of_a_kind() {
        for unroutable in ["::", "::1", "::ffff:10.0.0.1", "ff02::1", "ff0e::1"] {
            assert!(v6(unroutable).is_unroutable(), "{unroutable}");
        }
        for routable in ["::2", "2001:db8::1", "fd00::1", "64:ff9b::c000:201"] {
            assert!(!v6(routable).is_unroutable(), "{routable}");
        }
        assert!(v6("fe80::1").is_link_local() && v6("febf::1").is_link_local());
        assert!(!v6("fec0::1").is_link_local() && !v6("fd00::1").is_link_local());
        let mask = <Be128 as Address>::mask;
        assert!(v6("fd00::1").is_host(mask(64)) && !v6("fd00::").is_host(mask(64)));
        assert!(v6("fd00::").is_host(mask(127)) && v6("fd00::").is_host(mask(128)));
        assert!(v6("fd00::5").same_network(v6("fd00::9"), mask(64)));
        assert!(!v6("fd00::5").same_network(v6("fd00::9"), mask(125)));
    }
}
