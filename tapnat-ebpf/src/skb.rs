//! A packet in an skb, for `tapnat_common`: direct access to its linear part,
//! checksums through the helpers, which know about offloads.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR,
        BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skb_vlan_pop,
    },
};
use tapnat_common::{
    checksum::Delta,
    frame::{Frame, Header},
    net::Be16,
    network::Network,
};

use crate::{
    IPV6_CHECKSUMS, apart,
    bounds::within,
    maps::{WHOLE_BYTES, Whole},
};

/// A mask, too: all ones.
const LONGEST_LINK_HEADER: u32 = 15;

/// Tells `bpf_l4_csum_replace` that no checksum of the network header makes up for a
/// change of the addresses (Linux 6.16, `include/uapi/linux/bpf.h`).
const BPF_F_IPV6: u64 = 1 << 7;

/// Link, IP and transport header end before this offset.
const FIRST_HEADERS: u32 = 255;

/// An skb.
pub struct Skb {
    context: *mut __sk_buff,
    /// The IP header starts so many bytes in.
    link_length: u32,
}

impl Skb {
    /// `context` is the program's argument.
    #[inline(always)]
    pub const fn new(context: *mut __sk_buff, link_length: u32) -> Self {
        Self {
            context,
            // One that comes from a table is no longer than that: on Linux 6.1 what is
            // known of it is not known of its copies.
            link_length: link_length & LONGEST_LINK_HEADER,
        }
    }

    #[inline(always)]
    pub const fn context(&self) -> *mut __sk_buff {
        self.context
    }

    /// The index of the interface that the packet is on.
    #[inline(always)]
    pub fn device(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.context).ifindex }
    }

    /// Whether the frame has a tag that names no network, but only a priority (IEEE
    /// 802.1Q section 6.9).
    #[inline(always)]
    pub fn has_priority_tag(&self) -> bool {
        const NETWORK: u32 = 0xfff;
        // SAFETY: the context is valid for the program's run.
        self.is_tagged() && unsafe { (*self.context).vlan_tci } & NETWORK == 0
    }

    /// Removes that tag. Returns whether it is gone, and no other one like it was below it.
    #[inline(always)]
    pub fn remove_priority_tag(&mut self) -> bool {
        // SAFETY: the context is valid for the program's run.
        let result = unsafe { bpf_skb_vlan_pop(self.context) };
        self.pull(FIRST_HEADERS);
        result == 0 && !self.has_priority_tag()
    }

    /// Leaves a word in the packet for other programs of the hook.
    #[inline(always)]
    pub fn leave_word(&mut self, place: usize, word: u32) {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.context).cb[place] = word };
    }

    /// Copies the `length` bytes from `offset` on out. `None` if they do not fit or are
    /// not there.
    #[inline(always)]
    pub fn read_into<const N: usize>(
        &self,
        to: &mut [u8; N],
        offset: u32,
        length: u32,
    ) -> Option<()> {
        let length = within(length, N as u32)?;
        let to = to.as_mut_ptr().cast();
        // SAFETY: the helper checks the offset and writes `length` bytes.
        let result = unsafe { bpf_skb_load_bytes(self.context.cast(), offset, to, length) };
        (result == 0).then_some(())
    }

    /// As `read`, to where the value is to be.
    #[inline(always)]
    pub fn fill<T: Header>(&self, to: &mut T, offset: u32) -> Option<()> {
        let size = size_of::<T>() as u32;
        let to = core::ptr::from_mut(to).cast();
        // SAFETY: the helper checks the offset and writes `size` bytes, and a `Header` has
        // any bytes for a value.
        let result = unsafe { bpf_skb_load_bytes(self.context.cast(), offset, to, size) };
        (result == 0).then_some(())
    }

    /// Makes the packet consist of the first `length` of these bytes. `None` if
    /// that failed; the packet may then be anything.
    #[inline(always)]
    pub fn replace_with<const N: usize>(&mut self, from: &[u8; N], length: u32) -> Option<()> {
        let length = within(length, N as u32)?;
        // SAFETY: the context is valid; the helper checks the length.
        if unsafe { bpf_skb_change_tail(self.context, length, 0) } != 0 {
            return None;
        }
        let from = from.as_ptr().cast_mut().cast();
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        // SAFETY: the helper checks the offset and reads `length` bytes.
        let result = unsafe { bpf_skb_store_bytes(self.context, 0, from, length, flags) };
        self.pull(FIRST_HEADERS);
        (result == 0).then_some(())
    }

    /// Makes the packet consist of the first `headers` of these bytes, at most 127,
    /// and of `length` from `start` on. `None` if that failed; the packet may then
    /// be anything.
    #[inline(always)]
    pub fn replace_with_parts(
        &mut self,
        from: &Whole,
        headers: u32,
        start: u32,
        length: u32,
    ) -> Option<()> {
        const HALF: u32 = WHOLE_BYTES as u32 / 2;
        let headers = within(headers, 127)?;
        let length = within(length, HALF - 1)?;
        let start = within(start, HALF - 1)?;
        // SAFETY: the context is valid; the helper checks the length.
        if unsafe { bpf_skb_change_tail(self.context, headers + length, 0) } != 0 {
            return None;
        }
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        let first = from.as_ptr().cast_mut();
        // SAFETY: the helper checks the offset and reads `headers` bytes.
        let result = unsafe { bpf_skb_store_bytes(self.context, 0, first.cast(), headers, flags) };
        if result != 0 {
            return None;
        }
        let second = first.wrapping_add(start as usize);
        // SAFETY: as above, `length` bytes.
        let result =
            unsafe { bpf_skb_store_bytes(self.context, headers, second.cast(), length, flags) };
        (result == 0).then_some(())
    }

    /// Copies `length` bytes of these, from `start` on, to an offset in the packet. None of
    /// them lies behind `most`, which is less than half of the bytes.
    #[inline(always)]
    pub fn store_part(
        &mut self,
        from: &Whole,
        start: u32,
        to: u32,
        length: u32,
        most: u32,
    ) -> Option<()> {
        let start = within(start, most)?;
        let length = within(length, most)?;
        let from = from.as_ptr().cast_mut().wrapping_add(start as usize);
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        // SAFETY: the helper checks the offset and reads `length` bytes.
        let result = unsafe { bpf_skb_store_bytes(self.context, to, from.cast(), length, flags) };
        (result == 0).then_some(())
    }

    /// Whether a device is to complete the checksum of the transport header at this
    /// offset. Shortens the packet if not.
    ///
    /// `bpf_skb_change_tail` never takes such a checksum away, but the rest
    /// (`__bpf_skb_min_len` in net/core/filter.c).
    #[inline(always)]
    pub fn has_partial_checksum(&mut self, transport: u32) -> Option<bool> {
        const EINVAL: i64 = -22;
        // SAFETY: the context is valid; the helper checks the length.
        match unsafe { bpf_skb_change_tail(self.context, transport + 1, 0) } {
            0 => Some(false),
            EINVAL => Some(true),
            _ => None,
        }
    }

    /// Lets no device complete the checksum of the transport header at this offset,
    /// at the cost of the packet's first bytes: the kernel forgets about a checksum
    /// that began in bytes that are taken away (`skb_postpull_rcsum`).
    #[inline(always)]
    pub fn forget_partial_checksum(&mut self, transport: u32) -> Option<()> {
        let all = transport as i32 + 1;
        self.adjust_room(-all, 0)?;
        self.adjust_room(all, 0)
    }

    /// Makes the segments that the kernel will cut this packet into shorter by so
    /// many bytes. TCP only.
    ///
    /// Room that is made in a packet is taken from its segments, but need not be
    /// given back to them.
    #[inline(always)]
    pub fn shorten_segments(&mut self, excess: u16) -> Option<()> {
        self.adjust_room(i32::from(excess), 0)?;
        self.adjust_room(-i32::from(excess), u64::from(BPF_F_ADJ_ROOM_FIXED_GSO))
    }

    #[inline(always)]
    fn adjust_room(&mut self, more: i32, flags: u64) -> Option<()> {
        // SAFETY: the context is valid; the helper checks the length.
        let result = unsafe { bpf_skb_adjust_room(self.context, more, BPF_ADJ_ROOM_MAC, flags) };
        (result == 0).then_some(())
    }

    /// Replaces the header at `offset`.
    #[inline(always)]
    fn store_bytes<T: Header>(&mut self, offset: u32, header: &T, flags: u64) -> Option<()> {
        let size = size_of::<T>() as u32;
        let from = core::ptr::from_ref(header).cast();
        // SAFETY: the helper checks the offset and reads `size` bytes.
        let result = unsafe { bpf_skb_store_bytes(self.context, offset, from, size, flags) };
        (result == 0).then_some(())
    }

    /// Where the header at `offset` lies, if it is in the linear part.
    ///
    /// The packet is `[data, data_end)`, and the verifier wants to see just
    /// these comparisons.
    #[inline(always)]
    fn at<T>(&self, offset: u32) -> Option<*mut T> {
        if offset > FIRST_HEADERS {
            return None;
        }
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
        let start = data.wrapping_add(offset as usize);
        if start.wrapping_add(size_of::<T>()) > end {
            None
        } else {
            Some(start.cast())
        }
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.context).len }
    }

    #[inline(always)]
    fn link_length(&self) -> u32 {
        self.link_length
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.context).vlan_present != 0 }
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.context).gso_size }
    }

    #[inline(always)]
    fn pull(&mut self, length: u32) {
        let length = length.min(self.length());
        // A failure shows as headers that cannot be loaded.
        // SAFETY: the context is valid for the program's run.
        let _ = unsafe { bpf_skb_pull_data(self.context, length) };
    }

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
        // SAFETY: within the packet, which TC programs may write; as for loads.
        unsafe { at.cast::<T::Words>().write(words) };
        Some(())
    }

    #[inline(always)]
    fn read<T: Header>(&self, offset: u32) -> Option<T> {
        let mut header = MaybeUninit::<T>::uninit();
        let size = size_of::<T>() as u32;
        let to = header.as_mut_ptr().cast();
        // SAFETY: the helper checks the offset and writes `size` bytes.
        if unsafe { bpf_skb_load_bytes(self.context.cast(), offset, to, size) } != 0 {
            return None;
        }
        // SAFETY: the helper has filled it; a `Header` has any bytes for a value.
        Some(unsafe { header.assume_init() })
    }

    #[inline(always)]
    fn write<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        self.store_bytes(offset, header, 0)
    }

    #[inline(always)]
    fn overwrite<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        self.store_bytes(offset, header, u64::from(BPF_F_RECOMPUTE_CSUM))
    }

    #[inline(always)]
    fn checksum(&self, offset: u32, length: u32) -> Option<Be16> {
        let sum = apart::checksum_of(self.context, offset, length);
        u16::try_from(sum).ok().map(Be16::new)
    }

    #[inline(always)]
    fn update_checksum<A: Network>(
        &mut self,
        offset: u32,
        addresses: Delta,
        ports: Delta,
        zero_means_none: bool,
    ) -> Option<()> {
        let zero = if zero_means_none {
            u64::from(BPF_F_MARK_MANGLED_0)
        } else {
            0
        };
        // A size of 0 in the flags makes the second number a difference.
        if !addresses.is_nothing() {
            let delta = u64::from(addresses.wide());
            let knows_ipv6 = IPV6_CHECKSUMS.load() != 0;
            let flags = if !A::HAS_HEADER_CHECKSUM && knows_ipv6 {
                u64::from(BPF_F_PSEUDO_HDR) | BPF_F_IPV6 | zero
            } else {
                u64::from(BPF_F_PSEUDO_HDR) | zero
            };
            // SAFETY: the context is valid; the helper checks the offset.
            if unsafe { bpf_l4_csum_replace(self.context, offset, 0, delta, flags) } != 0 {
                return None;
            }
            if !A::HAS_HEADER_CHECKSUM && !knows_ipv6 {
                // The helper has taken the change of the addresses off the sum of the
                // whole packet, as if a header's checksum made up for it. Fails where
                // no device has summed the packet up, which is all the same.
                // SAFETY: the context is valid.
                let _ = unsafe { bpf_csum_update(self.context, addresses.wide()) };
            }
        }
        if !ports.is_nothing() {
            let delta = u64::from(ports.wide());
            // SAFETY: as above.
            if unsafe { bpf_l4_csum_replace(self.context, offset, 0, delta, zero) } != 0 {
                return None;
            }
        }
        Some(())
    }
}
