//! How the datapath sees a packet's bytes, whatever holds them.
//!
//! In the kernel that is an skb or an XDP buffer, in tests a vector. This
//! module knows no header's meaning beyond its size.

use network_types::{ip::Ipv4Hdr, tcp::TcpHdr};

use crate::checksum::Delta;

/// A header that can be read from any address: bytes only, no padding.
///
/// # Safety
/// The type has alignment 1 or is read unaligned only, has no padding, and
/// every bit pattern is a value of it.
pub unsafe trait Header: Copy {}

// SAFETY: arrays of bytes, and `repr(C)` structs of them.
unsafe impl<const N: usize> Header for [u8; N] {}
// SAFETY: as above.
unsafe impl<const N: usize, const M: usize> Header for [[u8; N]; M] {}
// SAFETY: as above.
unsafe impl Header for Ipv4Hdr {}
// SAFETY: as above.
unsafe impl Header for TcpHdr {}

/// A packet in memory. Offsets count from the first byte of the frame.
pub trait Frame {
    /// Bytes in the frame, link header included.
    fn length(&self) -> u32;

    /// Bytes of link header before the IP header.
    fn link_length(&self) -> u32;

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

    /// Updates a transport checksum field at `offset` for addresses and ports
    /// that change by these deltas. Where the device will complete the
    /// checksum, only the pseudo-header's part is there and only the addresses
    /// count.
    ///
    /// `zero_means_none`: UDP, where 0 stays 0 and a sum of 0 becomes 0xffff.
    fn update_checksum(
        &mut self,
        offset: u32,
        addresses: Delta,
        ports: Delta,
        zero_means_none: bool,
    ) -> Option<()>;
}
