//! What `tapnat trace` puts before the datapath's programs while it runs: a program
//! that calls the one behind it, and records what came and what became of it, if it
//! is wanted. It changes nothing.
//!
//! The datapath has no instruction for this on its way for established sessions, and
//! runs as it is: its program is reached by a tail call, made in a function of its
//! own, so that its return comes back here. When the trace ends, however it does,
//! the kernel empties the table of programs that it called, and the packet goes on
//! to the program behind as if this one were not there.
#![no_std]
#![no_main]
#![expect(
    clippy::inline_always,
    reason = "a program has a short stack and few arguments to a call: what is small is part of \
              its caller"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "the maps' sizes and the helpers' are of 32 bits"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the macro for entry points passes the context so"
)]

use core::{hint::black_box, mem::MaybeUninit};

use aya_ebpf::{
    bindings::__sk_buff,
    btf_maps::{Array, PerCpuArray, ProgramArray, RingBuf},
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use tapnat_common::{
    frame::lengths::ETHERNET,
    net::{Be32, Be128},
    network::Network as _,
    trace::{self, Ends, MOST_BYTES, NO_REASON, REASON_WORD, Record, Side, Wanted, actions, names},
};

use self::bounds::within;

mod bounds;

const MOST: usize = MOST_BYTES as usize;
const RAW: u32 = 0;
const PROGRAMS: u32 = names::PROGRAMS.len() as u32;

#[btf_map]
static WANTED: Array<Wanted, 1> = Array::new();
#[btf_map]
static TARGETS: ProgramArray<{ 2 * PROGRAMS as usize }> = ProgramArray::new();
#[btf_map]
static PACKET: PerCpuArray<Packet, 1> = PerCpuArray::new();
#[btf_map]
static RECORDS: RingBuf<u8, { 4 << 20 }> = RingBuf::new();
#[btf_map]
static LOST: PerCpuArray<u64, 1> = PerCpuArray::new();

/// The packet that a CPU is at.
#[repr(C)]
#[derive(Clone, Copy)]
struct Packet {
    record: Record,
    bytes: [u8; 2 * MOST],
    ends: Ends,
}

#[classifier]
pub fn trace_inside_ethernet(context: TcContext) -> i32 {
    trace_one(context.skb.skb, 0, ETHERNET)
}

#[classifier]
pub fn trace_inside_raw(context: TcContext) -> i32 {
    trace_one(context.skb.skb, 1, RAW)
}

#[classifier]
pub fn trace_outside_ethernet(context: TcContext) -> i32 {
    trace_one(context.skb.skb, 2, ETHERNET)
}

#[classifier]
pub fn trace_outside_raw(context: TcContext) -> i32 {
    trace_one(context.skb.skb, 3, RAW)
}

/// Lets the datapath decide about the packet, and tells of it.
#[inline(always)]
fn trace_one(context: *mut __sk_buff, target: u32, link: u32) -> i32 {
    let skb = Skb { context };
    let packet = note(skb, link);
    let mut action = call(context, target);
    if action == actions::NEXT.cast_signed() {
        action = call(context, target + PROGRAMS);
    }
    if action != actions::NEXT.cast_signed()
        && let Some(packet) = packet
    {
        record(skb, packet, action.cast_unsigned(), link);
    }
    action
}

/// What the datapath's program returns, or [`actions::NEXT`] if there is none.
#[inline(never)]
fn call(context: *mut __sk_buff, target: u32) -> i32 {
    // SAFETY: nothing here waits for its drop.
    unsafe { TARGETS.tail_call(&TcContext::new(context), target) };
    // The compiler would find out that only this is ever returned from here.
    black_box(actions::NEXT.cast_signed())
}

/// Takes down what came.
#[inline(always)]
fn note<'a>(skb: Skb, link: u32) -> Option<&'a mut Packet> {
    let wanted = WANTED.get(0)?;
    let packet = PACKET.get_ptr_mut(0)?;
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    let packet = unsafe { &mut *packet };
    skb.set_reason(NO_REASON);
    packet.record.device = skb.device();
    packet.ends = skb.ends(link);
    packet.record.before = skb.copy(packet.bytes.as_mut_ptr(), wanted.bytes, link)?;
    Some(packet)
}

/// Records it with what became of it, if it is wanted.
#[inline(always)]
fn record(skb: Skb, packet: &mut Packet, action: u32, link: u32) {
    let Some(wanted) = WANTED.get(0) else {
        return;
    };
    let reason = trace::reason(skb.reason(), action);
    let leaves = action == actions::REDIRECT;
    let before = packet.record.before;
    let link = if leaves {
        skb.link_after(before, link)
    } else {
        link
    };
    let ends = if leaves {
        skb.ends(link)
    } else {
        Ends::default()
    };
    if !wanted.admits(&packet.ends, &ends, packet.record.device, reason) {
        return;
    }
    // SAFETY: no preconditions.
    packet.record.time = unsafe { bpf_ktime_get_ns() };
    packet.record.reason = reason;
    packet.record.action = action;
    packet.record.after = Side::default();
    let Some(captured) = within(before.captured, MOST_BYTES) else {
        return;
    };
    let mut length = size_of::<Record>() as u32 + captured;
    if leaves {
        let to = packet.bytes.as_mut_ptr().wrapping_add(captured as usize);
        if let Some(side) = skb.copy(to, wanted.bytes, link)
            && let Some(captured) = within(side.captured, MOST_BYTES)
        {
            packet.record.after = side;
            length += captured;
        }
    }
    let from = core::ptr::from_mut(packet).cast::<u8>();
    // SAFETY: the record is followed by the bytes, of which there are so many.
    let bytes = unsafe { core::slice::from_raw_parts(from, length as usize) };
    if RECORDS.output_untyped::<[u8]>(bytes, 0).is_err()
        && let Some(lost) = LOST.get_ptr_mut(0)
    {
        // SAFETY: this CPU's own.
        unsafe { *lost += 1 };
    }
}

#[derive(Clone, Copy)]
struct Skb {
    context: *mut __sk_buff,
}

impl Skb {
    #[inline(always)]
    fn length(self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.context).len }
    }

    #[inline(always)]
    fn device(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.context).ifindex }
    }

    #[inline(always)]
    fn reason(self) -> u32 {
        // SAFETY: as above.
        let word = unsafe { &raw const (*self.context).cb[REASON_WORD] };
        // Volatile: the datapath writes it where the compiler cannot see that.
        // SAFETY: as above.
        unsafe { word.read_volatile() }
    }

    #[inline(always)]
    fn set_reason(self, reason: u32) {
        // SAFETY: as above.
        let word = unsafe { &raw mut (*self.context).cb[REASON_WORD] };
        // SAFETY: as above.
        unsafe { word.write_volatile(reason) };
    }

    /// Copies what is wanted of the packet, if there is room for [`MOST_BYTES`].
    #[inline(always)]
    fn copy(self, to: *mut u8, wanted: u32, link: u32) -> Option<Side> {
        let length = self.length();
        let captured = within(length.min(wanted), MOST_BYTES)?;
        // SAFETY: the helper checks the offset and writes so many bytes.
        let result = unsafe { bpf_skb_load_bytes(self.context.cast(), 0, to.cast(), captured) };
        (result == 0).then_some(Side {
            length,
            captured,
            link,
        })
    }

    #[inline(always)]
    fn read<T>(self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let (to, size) = (value.as_mut_ptr().cast(), size_of::<T>() as u32);
        // SAFETY: the helper checks the offset and writes `size` bytes.
        if unsafe { bpf_skb_load_bytes(self.context.cast(), offset, to, size) } != 0 {
            return None;
        }
        // SAFETY: filled, and only ever bytes.
        Some(unsafe { value.assume_init() })
    }

    #[inline(always)]
    fn ends(self, link: u32) -> Ends {
        match self.read(link) {
            Some(header) => Ends::read(
                &header,
                |offset| self.read(link + offset),
                |offset| self.read(link + offset),
            ),
            None => Ends::default(),
        }
    }

    /// The length of the link header that it leaves with: one that came without gets
    /// one where it leaves by a device that has them.
    #[inline(always)]
    fn link_after(self, before: Side, link: u32) -> u32 {
        let is_longer = self.length() == before.length + ETHERNET;
        if link != RAW || !is_longer {
            return link;
        }
        match self.read(ETHERNET - 2) {
            Some(Be32::ETHERTYPE | Be128::ETHERTYPE) => ETHERNET,
            Some(_) | None => link,
        }
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
