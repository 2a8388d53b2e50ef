//! The benchmarks' eBPF programs: a generator of packets and a sink for each direction, and the
//! paths without NAT that NATs are compared with. They measure nothing: that is done by the program
//! that runs them.
#![no_std]
#![no_main]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_ptr_alignment,
    clippy::inline_always,
    clippy::multiple_unsafe_ops_per_block,
    clippy::needless_pass_by_value,
    reason = "a generator writes whole words at fixed offsets of frames that begin at a multiple of 8"
)]

#[expect(
    dead_code,
    reason = "the names are for the program that loads this one"
)]
mod abi;

use abi::{FRAME_LENGTH, INWARD, OUTWARD, PORT_BITS, PORTS, Received, Stream};
use aya_ebpf::{
    Global,
    bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS},
    btf_maps::{Array, PerCpuArray},
    helpers::generated::bpf_redirect,
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};

#[btf_map]
static STREAMS: Array<Stream, 2> = Array::new();
#[btf_map]
static RECEIVED: PerCpuArray<Received, 2> = PerCpuArray::new();

/// See `abi::UPLINK`.
#[unsafe(no_mangle)]
static UPLINK: Global<u32> = Global::new(0);
/// See `abi::INSIDE`.
#[unsafe(no_mangle)]
static INSIDE: Global<u32> = Global::new(0);

const SOURCE: usize = 26;
const DESTINATION: usize = 30;
const IP_CHECKSUM: usize = 24;
const SOURCE_PORT: usize = 34;
const DESTINATION_PORT: usize = 36;
const UDP_CHECKSUM: usize = 40;
const TCP_CHECKSUM: usize = 50;

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

/// Counts and drops what arrives in the world.
#[xdp]
pub fn receive_outward(context: XdpContext) -> u32 {
    receive(&context, OUTWARD, SOURCE).unwrap_or(XDP_ABORTED)
}

/// Counts and drops what arrives at the guest.
#[xdp]
pub fn receive_inward(context: XdpContext) -> u32 {
    receive(&context, INWARD, DESTINATION).unwrap_or(XDP_ABORTED)
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
    let remote = stream.first_remote + (flow >> PORT_BITS);
    let remote_sum = (remote >> 16) + (remote & 0xffff);

    for (index, word) in stream.header.iter().enumerate() {
        // SAFETY: 56 of the frame's 60 bytes, which begin at a multiple of 8.
        unsafe { frame.cast::<u64>().add(index).write(*word) };
    }
    let (address_offset, port_offset) = if direction == OUTWARD {
        (DESTINATION, SOURCE_PORT)
    } else {
        (SOURCE, DESTINATION_PORT)
    };
    let checksum_offset = if stream.tcp != 0 {
        TCP_CHECKSUM
    } else {
        UDP_CHECKSUM
    };
    store(frame, address_offset, remote >> 16);
    store(frame, address_offset + 2, remote);
    store(frame, port_offset, port);
    store(frame, IP_CHECKSUM, fold(stream.ip_sum + remote_sum));
    let checksum = fold(stream.transport_sum + remote_sum + port);
    store(frame, checksum_offset, checksum);
    Some(XDP_PASS)
}

/// Writes the low 16 bits in network byte order.
#[inline(always)]
fn store(frame: *mut u8, offset: usize, value: u32) {
    // SAFETY: within the frame, whose length was checked, and at an even offset.
    unsafe {
        frame
            .add(offset)
            .cast::<u16>()
            .write((value as u16).to_be());
    }
}

/// The checksum that makes the sum right (RFC 1071); never 0, which UDP reserves.
#[inline(always)]
fn fold(sum: u32) -> u32 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    if sum == 0xffff { 0xffff } else { !sum & 0xffff }
}

#[inline(always)]
fn receive(context: &XdpContext, direction: u32, offset: usize) -> Option<u32> {
    let received = RECEIVED.get_ptr_mut(direction)?;
    // SAFETY: this CPU's own element of the map.
    let received = unsafe { &mut *received };
    let stream = STREAMS.get(direction)?;
    let frame = frame(context)?;
    // SAFETY: within the frame, whose length was checked, and at an even offset.
    let high = unsafe { frame.add(offset).cast::<u16>().read() };
    // SAFETY: as above.
    let low = unsafe { frame.add(offset + 2).cast::<u16>().read() };
    received.packets += 1;
    if [high, low] == stream.proof {
        received.proven += 1;
    }
    Some(XDP_DROP)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
