//! A packet in a vector, without a link header. Its transport checksum is not kept right: nobody
//! receives it.

use std::{iter, ptr};

use tapnat_common::{
    checksum::Delta,
    frame::{Frame, Header},
    network::Network,
};

/// A packet.
pub struct Bytes(Vec<u8>);

impl Bytes {
    pub fn new(packet: Vec<u8>) -> Self {
        Self(packet)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Makes it longer by this at its beginning, or shorter if that is below 0.
    pub fn lengthen(&mut self, difference: i32) {
        let bytes = difference.unsigned_abs() as usize;
        if difference < 0 {
            self.0.drain(..bytes.min(self.0.len()));
        } else {
            self.0.splice(..0, iter::repeat_n(0, bytes));
        }
    }
}

impl Frame for Bytes {
    fn length(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    fn link_length(&self) -> u32 {
        0
    }

    fn is_tagged(&self) -> bool {
        false
    }

    fn segment_size(&self) -> u32 {
        0
    }

    fn pull(&mut self, _: u32) {}

    fn load<T: Header>(&self, offset: u32) -> Option<T> {
        let bytes = self.0.get(offset as usize..)?.get(..size_of::<T>())?;
        // SAFETY: as long as a header, for which any bytes are a value.
        Some(unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) })
    }

    fn store<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        let bytes = self.0.get_mut(offset as usize..)?;
        let bytes = bytes.get_mut(..size_of::<T>())?;
        // SAFETY: as long as a header, which has no padding.
        unsafe { ptr::write_unaligned(bytes.as_mut_ptr().cast(), *header) };
        Some(())
    }

    fn read<T: Header>(&self, offset: u32) -> Option<T> {
        self.load(offset)
    }

    fn write<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        self.store(offset, header)
    }

    fn update_checksum<A: Network>(&mut self, _: u32, _: Delta, _: Delta, _: bool) -> Option<()> {
        Some(())
    }
}
