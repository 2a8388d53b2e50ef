//! A packet that is no skb yet, for `tapnat_common`: direct access to its first part,
//! which holds all headers. Its checksums are whole, as `pipeline::early` sees to, and
//! so are changed by what the packet is changed by.

use aya_ebpf::bindings::xdp_md;
use tapnat_common::{
    checksum::Delta,
    frame::{Frame, Header, lengths::ETHERNET},
    net::Be16,
    network::Network,
};

/// Link, IP and transport header end before this offset.
const FIRST_HEADERS: u32 = 255;

/// A driver's buffer.
pub struct Buffer {
    context: *mut xdp_md,
}

impl Buffer {
    /// `context` is the program's argument.
    #[inline(always)]
    pub const fn new(context: *mut xdp_md) -> Self {
        Self { context }
    }

    /// Where the packet begins and where its first part ends.
    #[inline(always)]
    fn bounds(&self) -> (*mut u8, *mut u8) {
        // Volatile, so that each comparison has loads of its own: the verifier
        // follows a pointer that was loaded, not one copied as 32 bits, which
        // is what the compiler takes it for.
        // SAFETY: the context is valid for the program's run.
        let data = unsafe { &raw const (*self.context).data };
        // SAFETY: as above.
        let data = unsafe { data.read_volatile() } as usize as *mut u8;
        // SAFETY: as above.
        let end = unsafe { &raw const (*self.context).data_end };
        // SAFETY: as above.
        let end = unsafe { end.read_volatile() } as usize as *mut u8;
        (data, end)
    }

    /// Where the header at `offset` lies, if it is in the first part.
    #[inline(always)]
    fn at<T>(&self, offset: u32) -> Option<*mut T> {
        if offset > FIRST_HEADERS {
            return None;
        }
        let (data, end) = self.bounds();
        let start = data.wrapping_add(offset as usize);
        if start.wrapping_add(size_of::<T>()) > end {
            None
        } else {
            Some(start.cast())
        }
    }
}

impl Frame for Buffer {
    /// Of the first part: a packet that has others is longer than that, by its
    /// header, and none that can leave by a tap.
    #[inline(always)]
    fn length(&self) -> u32 {
        let (data, end) = self.bounds();
        (end as usize - data as usize) as u32
    }

    #[inline(always)]
    fn link_length(&self) -> u32 {
        ETHERNET
    }

    /// A tag that the device took off cannot be seen here.
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        false
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        0
    }

    /// Headers are in one piece, or not to be had.
    #[inline(always)]
    fn pull(&mut self, _length: u32) {}

    #[inline(always)]
    fn load<T: Header>(&self, offset: u32) -> Option<T> {
        let at = self.at::<T>(offset)?;
        // SAFETY: within the packet, and any bytes are a value. Not aligned, but
        // the kernels' machines load so all the same, and the verifier checks.
        let words = unsafe { at.cast::<T::Words>().read() };
        // SAFETY: the same size, and any bytes are a value of a `Header`.
        Some(unsafe { core::mem::transmute_copy(&words) })
    }

    #[inline(always)]
    fn store<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        let at = self.at::<T>(offset)?;
        // SAFETY: the same size, and any bytes are a value of its words.
        let words: T::Words = unsafe { core::mem::transmute_copy(header) };
        // SAFETY: within the packet, which XDP programs may write; as for loads.
        unsafe { at.cast::<T::Words>().write(words) };
        Some(())
    }

    #[inline(always)]
    fn read<T: Header>(&self, offset: u32) -> Option<T> {
        self.load(offset)
    }

    #[inline(always)]
    fn write<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        self.store(offset, header)
    }

    #[inline(always)]
    fn update_checksum<A: Network>(
        &mut self,
        offset: u32,
        addresses: Delta,
        ports: Delta,
        zero_means_none: bool,
    ) -> Option<()> {
        let old = Be16::from_bytes(self.load::<[u8; 2]>(offset)?);
        if zero_means_none && old == Be16::ZERO {
            return Some(());
        }
        let new = addresses.and(ports).apply(old);
        let new = if zero_means_none && new == Be16::ZERO {
            Be16::new(0xffff)
        } else {
            new
        };
        self.store(offset, &new.bytes())
    }
}
