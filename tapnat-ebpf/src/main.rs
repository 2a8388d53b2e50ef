//! tapnat's datapath: the kernel's shell around `tapnat_common`.
//!
//! Entry points, maps, access to packets, and the exits. No policy: what
//! becomes of a packet is decided in `tapnat_common::nat`.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "this target has no other atomic addition")]

mod emit;
mod maps;
mod skb;
mod tables;

use core::num::NonZeroU32;

use aya_ebpf::{
    Global,
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::debug;
use tapnat_common::{
    frame::Frame as _,
    nat,
    parse::Packet,
    pipeline::{self, Quick},
    refusal::Refusal,
    time::Instant,
    verdict::{Outcome, Plan, Reason},
};

use crate::{maps::Scratch, skb::Skb, tables::Kernel};

/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// No link header: tun, WireGuard, PPP.
const RAW: u32 = 0;

/// See `tapnat_common::abi::globals`.
#[unsafe(no_mangle)]
static COUNT_TRAFFIC: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static COARSE_CLOCK: Global<u8> = Global::new(1);

/// Guests' packets, from a device with Ethernet headers.
#[classifier]
pub fn inside_ethernet(context: TcContext) -> i32 {
    run::<ETHERNET, true>(&context)
}

/// Guests' packets, from a device without link headers.
#[classifier]
pub fn inside_raw(context: TcContext) -> i32 {
    run::<RAW, true>(&context)
}

/// The world's packets, from an uplink with Ethernet headers.
#[classifier]
pub fn outside_ethernet(context: TcContext) -> i32 {
    run::<ETHERNET, false>(&context)
}

/// The world's packets, from an uplink without link headers.
#[classifier]
pub fn outside_raw(context: TcContext) -> i32 {
    run::<RAW, false>(&context)
}

#[inline(always)]
fn run<const LINK: u32, const INSIDE: bool>(context: &TcContext) -> i32 {
    let mut skb = Skb::<LINK>::new(context.skb.skb);
    let device = NonZeroU32::new(skb.device()).filter(|_| INSIDE);
    let kernel = Kernel::new(context.skb.skb, LINK == ETHERNET, now());
    match pipeline::established(&mut skb, device, &kernel) {
        Quick::Onward(next_hop, resolve) => emit::forward(&mut skb, &next_hop, resolve),
        Quick::Not => exceptional(context, skb, device, &kernel),
        Quick::Broken => {
            count(Reason::RewriteFailed, skb.length());
            TC_ACT_SHOT
        }
    }
}

/// All but the established. It reads the packet anew, so that the usual case
/// keeps its own reading in registers.
#[inline(never)]
fn exceptional<const LINK: u32>(
    context: &TcContext,
    mut skb: Skb<LINK>,
    device: Option<NonZeroU32>,
    kernel: &Kernel,
) -> i32 {
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else { return TC_ACT_SHOT };
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    let Scratch { packet, plan } = unsafe { &mut *scratch };
    *packet = Packet::default();
    *plan = Plan::default();
    let reason = pipeline::exceptional(&mut skb, device, kernel, packet, plan);
    note(context, reason, packet, skb.length());
    match reason.outcome() {
        Outcome::Pass => TC_ACT_OK,
        Outcome::Drop => TC_ACT_SHOT,
        Outcome::Refuse => match refusal(reason, packet, device, kernel, plan.mtu) {
            Some(refusal) => emit::refuse(&mut skb, packet, &refusal),
            None => TC_ACT_SHOT,
        },
        Outcome::Forward => emit::forward(&mut skb, &plan.rewrite.next_hop, plan.rewrite.resolve),
    }
}

#[inline(always)]
fn refusal(
    reason: Reason,
    packet: &Packet,
    device: Option<NonZeroU32>,
    kernel: &Kernel,
    mtu: u16,
) -> Option<Refusal> {
    let (icmp_type, code) = reason.icmp_error()?;
    let from = nat::refusal_source(packet, device, kernel)?;
    Some(Refusal { icmp_type, code, mtu, from })
}

/// The datapath's clock. See `tapnat_common::time`.
#[inline(always)]
fn now() -> Instant {
    Instant::from_nanoseconds(if COARSE_CLOCK.load() == 0 {
        // SAFETY: no preconditions.
        unsafe { bpf_ktime_get_ns() }
    } else {
        // SAFETY: no preconditions.
        unsafe { bpf_ktime_get_coarse_ns() }
    })
}

/// Counts and logs an exit that is not the usual one.
#[inline(always)]
fn note(context: &TcContext, reason: Reason, packet: &Packet, bytes: u32) {
    count(reason, bytes);
    debug!(
        context,
        "{} {} {:i}:{} -> {:i}:{}",
        reason.label(),
        packet.protocol,
        packet.source.get(),
        packet.source_port.get(),
        packet.destination.get(),
        packet.destination_port.get()
    );
}

#[inline(always)]
fn count(reason: Reason, bytes: u32) {
    if let Some(counter) = maps::COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own element of the map.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
