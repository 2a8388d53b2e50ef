//! How the datapath sees a packet's bytes, whatever holds them.
//!
//! In the kernel that is an skb or an XDP buffer, in tests a vector. This
//! module knows no header's meaning beyond its size.

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{
    abi::{EndpointKey, FlowKey, PermissionKey, Sweep},
    checksum::Delta,
    net::{Be16, Be32, Be128},
    network::Network,
    parse,
};

/// Bytes of headers, without what is optional in them.
pub mod lengths {
    pub const ETHERNET: u32 = 14;
    pub const IPV4: u32 = 20;
    pub const IPV6: u32 = 40;
    /// Of IPv6's extension header for fragments.
    pub const IPV6_FRAGMENT: u32 = 8;
    pub const TCP: u32 = 20;
    /// Before the packet that an error quotes, or what a query carries.
    pub const ICMP: u32 = 8;
}

/// A header, or a key in its place: bytes only, no padding.
///
/// # Safety
/// Every bit pattern is a value of the type, and of its `Words`; both have the
/// same size.
pub unsafe trait Header: Copy {
    /// The same bytes, in the widest pieces that the kernel's program should
    /// load and store: its compiler takes bytes one by one where it knows of no
    /// alignment, while the machines that run it do not mind.
    type Words: Copy;
}

macro_rules! headers {
    ($($header:ty as $words:ty,)*) => {
        $(
            const _: () = assert!(size_of::<$header>() == size_of::<$words>());
            // SAFETY: integers and arrays of them, of the same size.
            unsafe impl Header for $header {
                type Words = $words;
            }
        )*
    };
}

headers! {
    [u8; 1] as u8,
    [u8; 2] as u16,
    [u8; 4] as u32,
    [u8; 8] as [u32; 2],
    [[u8; 2]; 2] as u32,
    [[u8; 4]; 3] as [u32; 3],
    LinkAddresses as [u32; 3],
    Ipv4Hdr as [u32; 5],
    Ipv6Hdr as [u32; 10],
    TcpHdr as [u32; 5],
    Sweep as [u32; 4],
    FlowKey as [u32; 4],
    EndpointKey as [u32; 2],
    PermissionKey as [u32; 3],
    Be32 as u32,
    Be128 as [u32; 4],
    [Be32; 2] as [u32; 2],
    [Be32; 5] as [u32; 5],
    [Be32; 7] as [u32; 7],
    [Be32; 9] as [u32; 9],
    [Be32; 10] as [u32; 10],
    [Be32; 12] as [u32; 12],
    [Be128; 2] as [u32; 8],
    FlowKey<Be128> as [u32; 10],
    EndpointKey<Be128> as [u32; 5],
    PermissionKey<Be128> as [u32; 9],
}

/// The first 12 bytes of an Ethernet header: destination, then source.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkAddresses([u32; 3]);

impl LinkAddresses {
    #[inline(always)]
    #[must_use]
    pub const fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let [d0, d1, d2, d3, d4, d5] = destination;
        let [s0, s1, s2, s3, s4, s5] = source;
        Self([
            u32::from_ne_bytes([d0, d1, d2, d3]),
            u32::from_ne_bytes([d4, d5, s0, s1]),
            u32::from_ne_bytes([s2, s3, s4, s5]),
        ])
    }

    #[inline(always)]
    #[must_use]
    pub const fn destination(self) -> [u8; 6] {
        let [d0, d1, d2, d3] = self.0[0].to_ne_bytes();
        let [d4, d5, ..] = self.0[1].to_ne_bytes();
        [d0, d1, d2, d3, d4, d5]
    }

    #[inline(always)]
    #[must_use]
    pub const fn source(self) -> [u8; 6] {
        let [_, _, s0, s1] = self.0[1].to_ne_bytes();
        let [s2, s3, s4, s5] = self.0[2].to_ne_bytes();
        [s0, s1, s2, s3, s4, s5]
    }

    /// The source as a number, the first byte in bits 40 to 47.
    #[inline(always)]
    #[must_use]
    pub const fn source_number(self) -> u64 {
        let [s0, s1, s2, s3, s4, s5] = self.source();
        u64::from_be_bytes([0, 0, s0, s1, s2, s3, s4, s5])
    }

    /// For the way back.
    #[inline(always)]
    #[must_use]
    pub const fn swapped(self) -> Self {
        Self::new(self.source(), self.destination())
    }
}

/// A packet in memory. Offsets count from the first byte of the frame.
pub trait Frame {
    /// Bytes in the frame, link header included.
    fn length(&self) -> u32;

    /// Bytes of link header before the IP header.
    fn link_length(&self) -> u32;

    /// Whether the frame has a VLAN tag beside its bytes.
    fn is_tagged(&self) -> bool;

    /// The size of each segment's payload when the kernel will cut this packet
    /// up later (GSO), else 0.
    fn segment_size(&self) -> u32;

    /// Makes the first `length` bytes, as far as there are as many, readable by
    /// [`Frame::load`].
    fn pull(&mut self, length: u32);

    /// A copy of the header at `offset`; `None` past the end. Quick, and in the
    /// kernel only for the first headers, at offsets it can bound.
    fn load<T: Header>(&self, offset: u32) -> Option<T>;

    /// Replaces the header at `offset`; `None` past the end, with nothing
    /// written. As quick and as limited as [`Frame::load`].
    fn store<T: Header>(&mut self, offset: u32, header: &T) -> Option<()>;

    /// [`Frame::load`] for any offset.
    fn read<T: Header>(&self, offset: u32) -> Option<T>;

    /// [`Frame::store`] for any offset.
    fn write<T: Header>(&mut self, offset: u32, header: &T) -> Option<()>;

    /// [`Frame::write`], for bytes whose change no checksum in the packet makes up for:
    /// whoever has the sum of the whole packet keeps it right.
    #[inline(always)]
    fn overwrite<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        self.write(offset, header)
    }

    /// The Internet checksum of `length` bytes from `offset` on, at most
    /// [`parse::LONGEST_ERROR`] of them; `None` past the end.
    #[inline(always)]
    fn checksum(&self, offset: u32, length: u32) -> Option<Be16>
    where
        Self: Sized,
    {
        parse::checksum(self, offset, length)
    }

    /// Updates a transport checksum field at `offset`, in a packet of this IP version,
    /// for addresses and ports that change by these deltas. Where the device will complete the
    /// checksum, only the pseudo-header's part is there and only the addresses
    /// count.
    ///
    /// `zero_means_none`: UDP and UDP-Lite, where 0 stays 0 and a sum of 0 becomes
    /// 0xffff (RFC 768, RFC 3828 section 3.1).
    fn update_checksum<A: Network>(
        &mut self,
        offset: u32,
        addresses: Delta,
        ports: Delta,
        zero_means_none: bool,
    ) -> Option<()>;
}
