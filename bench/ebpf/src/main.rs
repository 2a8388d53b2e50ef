//! The benchmarks' eBPF programs: a generator of packets and a sink for each direction, and the
//! paths without NAT that NATs are compared with. They measure nothing: that is done by the program
//! that runs them.
#![no_std]
#![no_main]
#![expect(
    clippy::inline_always,
    reason = "a call costs, and the verifier follows pointers through none"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "a program's argument is what the attribute makes of it"
)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "helpers' results fit, and of words only their low half is meant"
)]

#[expect(
    dead_code,
    reason = "the names are for the program that loads this one"
)]
mod abi;

use abi::{
    FRAME_LENGTH, INWARD, OUTWARD, PORT_BITS, PORTS, REMOTE_PORT, Received, Rewrite, Stream,
};
use aya_ebpf::{
    Global,
    bindings::{
        TC_ACT_SHOT,
        xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS},
    },
    btf_maps::{Array, PerCpuArray},
    helpers::generated::bpf_redirect,
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};

#[btf_map]
static STREAMS: Array<Stream, 2> = Array::new();
#[btf_map]
static RECEIVED: PerCpuArray<Received, 2> = PerCpuArray::new();

#[btf_map]
static REWRITE: Array<Rewrite, 1> = Array::new();

/// See `abi::UPLINK`.
#[unsafe(no_mangle)]
static UPLINK: Global<u32> = Global::new(0);
/// See `abi::INSIDE`.
#[unsafe(no_mangle)]
static INSIDE: Global<u32> = Global::new(0);

/// The end of the IPv4 header.
const IP_END: usize = 34;
const SOURCE: usize = 26;
const DESTINATION: usize = 30;
const TIME_TO_LIVE: usize = 22;
const IP_CHECKSUM: usize = 24;
const SOURCE_PORT: usize = 34;
const DESTINATION_PORT: usize = 36;
const UDP_CHECKSUM: usize = 40;
const TCP_CHECKSUM: usize = 50;
/// The protocol's number, beside the time to live.
const TCP: u32 = 6;

/// Makes the guest's packets.
#[xdp]
pub fn send_outward(context: XdpContext) -> u32 {
    generate(&context, OUTWARD).unwrap_or(XDP_ABORTED)
}

/// Makes the world's packets.
#[xdp]
pub fn send_inward(context: XdpContext) -> u32 {
    generate(&context, INWARD).unwrap_or(XDP_ABORTED)
}

/// Counts and drops the generator's packets that arrive in the world.
#[xdp]
pub fn receive_outward(context: XdpContext) -> u32 {
    receive(&context, OUTWARD, SOURCE, DESTINATION_PORT).unwrap_or(XDP_PASS)
}

/// Counts and drops the generator's packets that arrive at the guest.
#[xdp]
pub fn receive_inward(context: XdpContext) -> u32 {
    receive(&context, INWARD, DESTINATION, SOURCE_PORT).unwrap_or(XDP_PASS)
}

/// Counts and drops what arrives in the world, offloads and all.
#[classifier]
pub fn receive_offloaded(context: TcContext) -> i32 {
    count_offloaded(&context).unwrap_or(TC_ACT_SHOT)
}

/// Translates the world's packets without looking anything up.
#[xdp]
pub fn rewrite_inward(context: XdpContext) -> u32 {
    rewrite(&context).unwrap_or(XDP_ABORTED)
}

/// The least that a packet can cost on its way to the uplink.
#[classifier]
pub fn redirect_outward(_: TcContext) -> i32 {
    // SAFETY: no preconditions.
    unsafe { bpf_redirect(UPLINK.load(), 0) as i32 }
}

/// The least that a packet can cost on its way to the guest.
#[classifier]
pub fn redirect_inward(_: TcContext) -> i32 {
    // SAFETY: no preconditions.
    unsafe { bpf_redirect(INSIDE.load(), 0) as i32 }
}

/// The frame, if it is as long as the generated ones.
#[inline(always)]
fn frame(context: &XdpContext) -> Option<*mut u8> {
    let start = context.data();
    (start + FRAME_LENGTH <= context.data_end()).then_some(start as *mut u8)
}

/// Writes the whole of the headers: the frame's memory still holds what became of an earlier one.
#[inline(always)]
fn generate(context: &XdpContext, direction: u32) -> Option<u32> {
    let stream = STREAMS.get_ptr_mut(direction)?;
    // SAFETY: a generator runs on one CPU, and nobody else writes the map meanwhile.
    let stream = unsafe { &mut *stream };
    let frame = frame(context)?;

    let mut flow = stream.position + stream.stride;
    if flow >= stream.flows {
        flow -= stream.flows;
    }
    stream.position = flow;
    let port = stream.first_port + (flow & (PORTS - 1));
    let run = flow >> PORT_BITS;
    let guest = stream.first_guest + (run & stream.guest_mask);
    let remote = stream.first_remote + (run & stream.remote_mask);
    let addresses = (guest >> 16) + (guest & 0xffff) + (remote >> 16) + (remote & 0xffff);

    for (index, word) in stream.header.iter().enumerate() {
        // SAFETY: 56 of the frame's 60 bytes.
        unsafe { at::<u64>(frame, index * size_of::<u64>()).write(*word) };
    }
    let (source, destination, port_offset) = if direction == OUTWARD {
        (guest, remote, SOURCE_PORT)
    } else {
        (remote, guest, DESTINATION_PORT)
    };
    store(frame, SOURCE, source >> 16);
    store(frame, SOURCE + 2, source);
    store(frame, DESTINATION, destination >> 16);
    store(frame, DESTINATION + 2, destination);
    store(frame, port_offset, port);
    store(frame, IP_CHECKSUM, fold(stream.ip_sum + addresses));
    let checksum = fold(stream.transport_sum + addresses + port);
    store(frame, checksum_offset(stream.tcp != 0), checksum);
    if stream.through != 0 {
        // SAFETY: no preconditions.
        return Some(unsafe { bpf_redirect(stream.through, 0) } as u32);
    }
    Some(XDP_PASS)
}

#[inline(always)]
const fn checksum_offset(tcp: bool) -> usize {
    if tcp { TCP_CHECKSUM } else { UDP_CHECKSUM }
}

/// A word in the frame, which begins at a multiple of 8; `offset` must be one of the word's size.
#[inline(always)]
const fn at<T>(frame: *mut u8, offset: usize) -> *mut T {
    frame.wrapping_add(offset).cast()
}

/// Writes the low 16 bits in network byte order.
#[inline(always)]
fn store(frame: *mut u8, offset: usize, value: u32) {
    // SAFETY: within the frame, whose length was checked.
    unsafe { at::<u16>(frame, offset).write((value as u16).to_be()) };
}

/// The checksum that makes the sum right (RFC 1071); never 0, which UDP reserves.
#[inline(always)]
fn fold(sum: u32) -> u32 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    if sum == 0xffff { 0xffff } else { !sum & 0xffff }
}

#[inline(always)]
fn load(frame: *mut u8, offset: usize) -> u16 {
    // SAFETY: within the frame, as far as its length was checked.
    unsafe { at::<u16>(frame, offset).read() }
}

/// The same as a number.
#[inline(always)]
fn load_number(frame: *mut u8, offset: usize) -> u32 {
    u16::from_be(load(frame, offset)).into()
}

#[inline(always)]
fn received<'a>(direction: u32) -> Option<&'a mut Received> {
    let received = RECEIVED.get_ptr_mut(direction)?;
    // SAFETY: this CPU's own element of the map.
    Some(unsafe { &mut *received })
}

#[inline(always)]
fn receive(context: &XdpContext, direction: u32, offset: usize, port: usize) -> Option<u32> {
    let received = received(direction)?;
    let stream = STREAMS.get(direction)?;
    let frame = frame(context)?;
    if load_number(frame, port) != REMOTE_PORT {
        // Not a generator's.
        return Some(XDP_PASS);
    }
    received.packets += 1;
    received.proven += u64::from(is_proven(frame, offset, stream));
    Some(XDP_DROP)
}

#[inline(always)]
fn is_proven(frame: *mut u8, offset: usize, stream: &Stream) -> bool {
    let [high, low] = stream.proof;
    let [high_mask, low_mask] = stream.proof_mask;
    load(frame, offset) & high_mask == high && load(frame, offset + 2) & low_mask == low
}

#[inline(always)]
fn count_offloaded(context: &TcContext) -> Option<i32> {
    let received = received(OUTWARD)?;
    let stream = STREAMS.get(OUTWARD)?;
    let start = context.data();
    // No more of a packet need be in one piece.
    if start + IP_END > context.data_end() {
        return None;
    }
    let frame = start as *mut u8;
    received.packets += 1;
    received.bytes += u64::from(context.len());
    // SAFETY: the context is valid for the program's run.
    received.segments += u64::from(unsafe { (*context.skb.skb).gso_segs });
    received.proven += u64::from(is_proven(frame, SOURCE, stream));
    Some(TC_ACT_SHOT)
}

#[inline(always)]
fn rewrite(context: &XdpContext) -> Option<u32> {
    let plan = REWRITE.get(0)?;
    let frame = frame(context)?;
    for (index, word) in plan.link.iter().enumerate() {
        store(frame, index * 2, u16::from_be(*word).into());
    }
    for (index, word) in plan.destination.iter().enumerate() {
        store(frame, DESTINATION + index * 2, u16::from_be(*word).into());
    }
    let life_and_protocol = load_number(frame, TIME_TO_LIVE);
    store(frame, TIME_TO_LIVE, life_and_protocol - 0x100);
    let tcp = life_and_protocol & 0xff == TCP;
    // RFC 1624; one hop less is 0x100 less.
    adjust(frame, IP_CHECKSUM, plan.delta + 0xffff - 0x100);
    adjust(frame, checksum_offset(tcp), plan.delta);
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect(plan.device, 0) } as u32)
}

#[inline(always)]
fn adjust(frame: *mut u8, offset: usize, delta: u32) {
    let old = !load_number(frame, offset) & 0xffff;
    store(frame, offset, fold(old + delta));
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
