//! A packet in a vector, with what an skb has besides its bytes: a linear part,
//! a segment size, and a checksum that a device is to complete. Its checksum
//! arithmetic is its own, so that a mistake in `checksum.rs` cannot hide here.

use std::{fmt, ptr};

use tapnat_common::{
    checksum::Delta,
    frame::{Frame, Header},
    network::Network,
};
use tapnat_testbed::packet::Builder;

/// As far as the kernel's shell looks for headers directly.
const FIRST_HEADERS: usize = 255;

/// Where a checksum is that a device is to complete, from the frame's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    /// The first byte that it covers.
    pub start: usize,
    /// Its field.
    pub field: usize,
}

/// A frame.
#[derive(Clone, PartialEq, Eq)]
pub struct Bytes {
    #[expect(clippy::struct_field_names, reason = "they are what it is about")]
    pub bytes: Vec<u8>,
    /// Bytes of its link header.
    pub link_length: usize,
    /// Payload bytes of each segment that it is to be cut into, or 0.
    pub segment_size: u16,
    pub partial: Option<Partial>,
    /// It has a VLAN tag, which is beside its bytes.
    pub tagged: bool,
    /// Bytes in its linear part, where headers can be loaded.
    pub linear: usize,
}

impl fmt::Debug for Bytes {
    /// On one line, with the repeated bytes at the end counted.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.bytes.last();
        let same = |byte: &&u8| Some(*byte) == last;
        let repeated = self.bytes.iter().rev().take_while(same).count();
        write!(formatter, "Bytes {{ ")?;
        for byte in &self.bytes[..self.bytes.len() - repeated] {
            write!(formatter, "{byte:02x}")?;
        }
        if let Some(last) = last {
            write!(formatter, " {last:02x} x {repeated}")?;
        }
        write!(
            formatter,
            ", link {}, linear {}, segments {}, tagged {}, {:?} }}",
            self.link_length, self.linear, self.segment_size, self.tagged, self.partial
        )
    }
}

impl Bytes {
    /// A frame without a link header.
    pub fn raw(packet: &[u8]) -> Self {
        Self {
            bytes: packet.to_vec(),
            link_length: 0,
            segment_size: 0,
            partial: None,
            tagged: false,
            linear: packet.len(),
        }
    }

    /// A frame with an Ethernet header.
    pub fn ethernet(frame: &[u8]) -> Self {
        Self {
            link_length: 14,
            ..Self::raw(frame)
        }
    }

    /// A packet without a link header, whose checksum a device is to complete.
    pub fn offloaded(builder: &Builder) -> Self {
        let (offload, bytes) = builder.offloaded(None);
        let place = offload.checksum.unwrap();
        let start = usize::from(place.start);
        Self {
            partial: Some(Partial {
                start,
                field: start + usize::from(place.offset),
            }),
            ..Self::raw(&bytes)
        }
    }

    /// The IP packet in the frame, padding included.
    pub fn ip(&self) -> &[u8] {
        &self.bytes[self.link_length..]
    }

    /// Completes the checksum as the device would.
    pub fn complete(&mut self) {
        if let Some(Partial { start, field }) = self.partial.take() {
            let value = match !sum(&self.bytes[start..]) {
                // Of UDP, whose field is here, a 0 would say that there is none.
                0 if field - start == 6 => 0xffff,
                value => value,
            };
            self.bytes[field..field + 2].copy_from_slice(&value.to_be_bytes());
        }
    }

    /// Cuts the frame off after `length` bytes, as `bpf_skb_change_tail` does,
    /// which keeps a checksum that is to be completed. Whether it could.
    pub fn truncate(&mut self, length: usize) -> bool {
        if let Some(Partial { field, .. }) = self.partial
            && length < field + 2
        {
            return false;
        }
        self.bytes.truncate(length);
        self.linear = self.linear.min(length);
        self.segment_size = 0;
        true
    }

    /// Makes room after the link header, as `bpf_skb_adjust_room` does.
    pub fn make_room(&mut self, length: usize) {
        let at = self.link_length;
        self.bytes.splice(at..at, std::iter::repeat_n(0, length));
        self.linear += length;
        if let Some(Partial { start, field }) = &mut self.partial {
            *start += length;
            *field += length;
        }
    }

    fn place<T>(&self, offset: u32) -> Option<usize> {
        let offset = usize::try_from(offset).unwrap();
        (offset + size_of::<T>() <= self.bytes.len()).then_some(offset)
    }

    fn linear_place<T>(&self, offset: u32) -> Option<usize> {
        let offset = self.place::<T>(offset)?;
        (offset <= FIRST_HEADERS && offset + size_of::<T>() <= self.linear).then_some(offset)
    }

    fn copy<T: Header>(&self, offset: usize) -> T {
        let from = self.bytes[offset..offset + size_of::<T>()].as_ptr();
        // SAFETY: the slice is as long as a `T`, and any bytes are one.
        unsafe { ptr::read_unaligned(from.cast()) }
    }

    fn replace<T: Header>(&mut self, offset: usize, header: &T) {
        let to = self.bytes[offset..offset + size_of::<T>()].as_mut_ptr();
        // SAFETY: the slice is as long as a `T`, which has no padding.
        unsafe { ptr::write_unaligned(to.cast(), *header) };
    }

    /// Adds a difference to the checksum field, as `csum_replace_by_diff()`.
    fn update(&mut self, field: usize, delta: Delta, zero_means_none: bool) {
        let old = u16::from_be_bytes([self.bytes[field], self.bytes[field + 1]]);
        if zero_means_none && old == 0 {
            return;
        }
        let new = !sum(&[(!old).to_be_bytes(), folded(delta)].concat());
        let new = if zero_means_none && new == 0 {
            0xffff
        } else {
            new
        };
        self.bytes[field..field + 2].copy_from_slice(&new.to_be_bytes());
    }
}

/// The difference in 16 bits, in the packet's byte order.
fn folded(delta: Delta) -> [u8; 2] {
    let [a, b, c, d] = delta.wide().to_ne_bytes();
    sum(&[a, b, c, d]).to_be_bytes()
}

/// The ones' complement sum of big-endian words.
pub fn sum(bytes: &[u8]) -> u16 {
    tapnat_testbed::packet::checksum::sum(&[bytes])
}

impl Frame for Bytes {
    fn length(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap()
    }

    fn link_length(&self) -> u32 {
        u32::try_from(self.link_length).unwrap()
    }

    fn is_tagged(&self) -> bool {
        self.tagged
    }

    fn segment_size(&self) -> u32 {
        self.segment_size.into()
    }

    fn pull(&mut self, length: u32) {
        let length = usize::try_from(length).unwrap().min(self.bytes.len());
        self.linear = self.linear.max(length);
    }

    fn load<T: Header>(&self, offset: u32) -> Option<T> {
        Some(self.copy(self.linear_place::<T>(offset)?))
    }

    fn store<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        let offset = self.linear_place::<T>(offset)?;
        self.replace(offset, header);
        Some(())
    }

    fn read<T: Header>(&self, offset: u32) -> Option<T> {
        Some(self.copy(self.place::<T>(offset)?))
    }

    fn write<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        let offset = self.place::<T>(offset)?;
        self.replace(offset, header);
        Some(())
    }

    fn update_checksum<A: Network>(
        &mut self,
        offset: u32,
        addresses: Delta,
        ports: Delta,
        zero_means_none: bool,
    ) -> Option<()> {
        let field = self.place::<[u8; 2]>(offset)?;
        if self.partial.is_some() {
            // inet_proto_csum_replace_by_diff(): the field is not complemented,
            // and only the pseudo-header is in it.
            let old = [self.bytes[field], self.bytes[field + 1]];
            let new = sum(&[old, folded(addresses)].concat());
            self.bytes[field..field + 2].copy_from_slice(&new.to_be_bytes());
        } else {
            self.update(field, addresses, zero_means_none);
            self.update(field, ports, zero_means_none);
        }
        Some(())
    }
}
