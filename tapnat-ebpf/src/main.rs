//! tapnat's datapath: the kernel's shell around `tapnat_common`.
//!
//! Entry points, maps, access to packets, and the exits. No policy: what
//! becomes of a packet is decided in `tapnat_common::nat`.
#![no_std]
#![no_main]
#![expect(
    clippy::inline_always,
    reason = "a program has a short stack and few arguments to a call: what is small is part of \
              its caller"
)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "the helpers take sizes of 32 bits and return actions in 64"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the macro for entry points passes the context so"
)]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "this target has no other atomic addition")]

mod apart;
mod bounds;
mod emit;
mod host;
mod maps;
mod nat_log;
mod skb;
mod tables;
mod xdp;

use core::num::NonZeroU32;

use aya_ebpf::{
    Global,
    bindings::{
        TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
    },
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::{cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};
use aya_log_ebpf::debug;
use tapnat_common::{
    abi::{HeldKey, SWEEP_KEY_BYTES, Sweep, stages, sweep_tables},
    cut,
    frame::Frame as _,
    nat::{self, Tables as _, firewall::Forwarded},
    parse::{Packet, Part},
    pipeline::{self, Quick},
    refusal::Refusal,
    time::Instant,
    trace::REASON_WORD,
    verdict::{Next, Outcome, Reason},
};

use crate::{maps::Scratch, skb::Skb, tables::Kernel, xdp::Buffer};

/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// No link header: tun, WireGuard, PPP.
const RAW: u32 = 0;

/// See `tapnat_common::abi::globals`.
#[unsafe(no_mangle)]
static COUNT_TRAFFIC: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static NAT_LOG_LEVEL: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static COARSE_CLOCK: Global<u8> = Global::new(1);

#[unsafe(no_mangle)]
static NETNS_COOKIE: Global<u64> = Global::new(0);

/// A socket of the host names whom it wants to talk to.
#[cgroup_sock_addr(connect4)]
pub fn host_connect4(context: SockAddrContext) -> i32 {
    host::lead(host::Address::v4(context.sock_addr), NETNS_COOKIE.load())
}

/// The same, of one that also speaks IPv6.
#[cgroup_sock_addr(connect6)]
pub fn host_connect6(context: SockAddrContext) -> i32 {
    host::lead(host::Address::v6(context.sock_addr), NETNS_COOKIE.load())
}

/// A socket of the host names whom it sends a datagram to.
#[cgroup_sock_addr(sendmsg4)]
pub fn host_sendmsg4(context: SockAddrContext) -> i32 {
    host::lead(host::Address::v4(context.sock_addr), NETNS_COOKIE.load())
}

/// A socket of the host asks whose datagram it has received.
#[cgroup_sock_addr(recvmsg4)]
pub fn host_recvmsg4(context: SockAddrContext) -> i32 {
    host::tell(host::Address::v4(context.sock_addr), NETNS_COOKIE.load())
}

/// The same, of one that also speaks IPv6.
#[cgroup_sock_addr(recvmsg6)]
pub fn host_recvmsg6(context: SockAddrContext) -> i32 {
    host::tell(host::Address::v6(context.sock_addr), NETNS_COOKIE.load())
}

/// A socket of the host asks whom it is connected to.
#[cgroup_sock_addr(getpeername4)]
pub fn host_getpeername4(context: SockAddrContext) -> i32 {
    host::tell(host::Address::v4(context.sock_addr), NETNS_COOKIE.load())
}

/// The same, of one that also speaks IPv6.
#[cgroup_sock_addr(getpeername6)]
pub fn host_getpeername6(context: SockAddrContext) -> i32 {
    host::tell(host::Address::v6(context.sock_addr), NETNS_COOKIE.load())
}

/// Guests' packets, from a device with Ethernet headers.
#[classifier]
pub fn inside_ethernet(context: TcContext) -> i32 {
    established(&context, ETHERNET, true)
}

/// Guests' packets, from a device without link headers.
#[classifier]
pub fn inside_raw(context: TcContext) -> i32 {
    established(&context, RAW, true)
}

/// The world's packets, from an uplink with Ethernet headers.
#[classifier]
pub fn outside_ethernet(context: TcContext) -> i32 {
    established(&context, ETHERNET, false)
}

/// The world's packets, from an uplink without link headers.
#[classifier]
pub fn outside_raw(context: TcContext) -> i32 {
    established(&context, RAW, false)
}

/// The world's packets before the kernel makes skbs of them, from an uplink with
/// Ethernet headers: those of established sessions that may go at once. The others
/// come by again in [`outside_ethernet`].
#[xdp(frags)]
pub fn outside_xdp(context: XdpContext) -> u32 {
    let mut buffer = Buffer::new(context.ctx);
    // What such packets need asks for no context.
    let kernel = Kernel::new(core::ptr::null_mut(), now());
    let take = |device| maps::XDP_DEVICES.redirect(device, XDP_PASS.into()).is_ok();
    let sent = match pipeline::early(&mut buffer, &kernel, take) {
        Quick::Onward(next_hop, _) => buffer.store(0, &next_hop.link),
        Quick::Not => return XDP_PASS,
        Quick::Broken => None,
    };
    if sent.is_none() {
        count(Reason::RewriteFailed, buffer.length());
        return XDP_DROP;
    }
    if kernel.counts_traffic() {
        count(Reason::Translated, buffer.length());
    }
    XDP_REDIRECT
}

/// Packets that are not of an established session.
#[classifier]
pub fn exceptional(context: TcContext) -> i32 {
    stage(&context, |skb, device, kernel, scratch| {
        scratch.plan.begin();
        pipeline::exceptional(skb, device, kernel, &mut scratch.packet, &mut scratch.plan)
    })
}

/// Packets without a session.
#[classifier]
pub fn start(context: TcContext) -> i32 {
    stage(&context, |skb, device, kernel, scratch| {
        pipeline::start(skb, device, kernel, &scratch.packet, &mut scratch.plan)
    })
}

/// Packets that open a session with a mapping.
#[classifier]
pub fn map(context: TcContext) -> i32 {
    stage(&context, |_, _, kernel, scratch| {
        pipeline::map(kernel, &scratch.packet, &mut scratch.plan)
    })
}

/// Packets that open a session.
#[classifier]
pub fn open(context: TcContext) -> i32 {
    stage(&context, |skb, device, kernel, scratch| {
        pipeline::open(skb, device, kernel, &scratch.packet, &mut scratch.plan)
    })
}

/// Packets that the host's firewall is to be asked about.
#[classifier]
pub fn ask(context: TcContext) -> i32 {
    let Some(scratch) = scratch() else {
        return TC_ACT_SHOT;
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let kernel = Kernel::new(context.skb.skb, now());
    let Scratch { packet, plan, .. } = scratch;
    if pipeline::ask(&mut skb, device, &kernel, packet, plan).is_none() {
        return lose(&skb);
    }
    if packet.part == Part::First && plan.held != 0 {
        return go_on(&context, stages::RELEASE);
    }
    TC_ACT_OK
}

/// What the host sends out of a device. See `tapnat_common::nat::firewall`.
#[classifier]
pub fn accepted(context: TcContext) -> i32 {
    // SAFETY: the context is valid for the program's run.
    let from = unsafe { (*context.skb.skb).ingress_ifindex };
    let Some(scratch) = scratch() else {
        return TC_ACT_SHOT;
    };
    if from == 0 {
        return TC_ACT_UNSPEC;
    }
    let kernel = Kernel::new(context.skb.skb, now());
    let out = Skb::new(context.skb.skb, RAW).device();
    let is_ethernet = kernel.device(out).is_none_or(|out| out.ethernet != 0);
    let link_length = if is_ethernet { ETHERNET } else { RAW };
    let mut skb = Skb::new(context.skb.skb, link_length);
    match pipeline::forwarded(&mut skb, from, out, &kernel, &mut scratch.packet) {
        // For whatever else hangs here.
        Forwarded::Leave => TC_ACT_UNSPEC,
        Forwarded::Accepted(_, device) => {
            scratch.device = device.map_or(0, NonZeroU32::get);
            scratch.link_length = link_length;
            scratch.plan.accepted = true;
            go_on(&context, stages::EXCEPTIONAL)
        }
        Forwarded::Drop(reason) => {
            note(&context, reason, &scratch.packet, skb.length());
            TC_ACT_SHOT
        }
    }
}

/// First fragments, for which others wait.
#[classifier]
pub fn release(context: TcContext) -> i32 {
    let Some(scratch) = scratch() else {
        return TC_ACT_SHOT;
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let datagram = nat::datagram_key(&scratch.packet, device);
    emit::release(&mut skb, &scratch.plan, datagram).unwrap_or_else(|| lose(&skb))
}

/// Packets that are too long for the way on, which are to be cut.
#[classifier]
pub fn cut(context: TcContext) -> i32 {
    let Some(scratch) = scratch() else {
        return TC_ACT_SHOT;
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let kernel = Kernel::new(context.skb.skb, now());
    nat::forget(&scratch.packet, device, &kernel);
    scratch.piece = 0;
    match emit::prepare_cut(&mut skb, &scratch.packet) {
        Some(()) => go_on(&context, stages::PIECE),
        None => lose(&skb),
    }
}

/// One piece of a packet that is too long.
#[classifier]
pub fn piece(context: TcContext) -> i32 {
    let Some(scratch) = scratch() else {
        return TC_ACT_SHOT;
    };
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let number = scratch.piece;
    scratch.piece += 1;
    let Some(piece) = cut::piece(&scratch.packet, scratch.plan.mtu, number) else {
        // All have come by; the packet itself was only their carrier.
        return TC_ACT_SHOT;
    };
    match emit::send_piece(&mut skb, &scratch.packet, piece) {
        Some(()) => go_on(&context, stages::PIECE),
        None => lose(&skb),
    }
}

/// Removes what is over: the entry whose key is next in the packet. See
/// `tapnat_common::abi::Sweep`.
#[classifier]
pub fn sweep(context: TcContext) -> i32 {
    let mut packet = Skb::new(context.skb.skb, RAW);
    let kernel = Kernel::new(context.skb.skb, now());
    let Some(mut sweep) = packet.load::<Sweep>(0) else {
        return 0;
    };
    let at = (size_of::<Sweep>() + sweep.next as usize * SWEEP_KEY_BYTES) as u32;
    let removed = match sweep.table {
        sweep_tables::SESSIONS => packet
            .read(at)
            .map(|key| nat::sweep::session(&key, &kernel)),
        sweep_tables::MAPPINGS => packet
            .read(at)
            .map(|key| nat::sweep::mapping(&key, &kernel)),
        sweep_tables::PERMISSIONS => packet
            .read(at)
            .map(|key| nat::sweep::permission(&key, &kernel)),
        sweep_tables::GUESTS => packet.read(at).map(|key| nat::sweep::guest(key, &kernel)),
        sweep_tables::GUESTS_PORTS => packet
            .read(at)
            .map(|key| nat::sweep::port_of_guest(key, &kernel)),
        sweep_tables::SESSIONS_TO_ASK => packet
            .read(at)
            .map(|key| nat::sweep::ask_again(&key, &kernel)),
        sweep_tables::PORTS => packet.read(at).map(|key| nat::sweep::port(&key, &kernel)),
        _ => None,
    };
    sweep.next += 1;
    sweep.removed += u32::from(removed == Some(true));
    packet.store(0, &sweep);
    sweep.removed as i32
}

/// Runs a program that others go on to.
#[inline(always)]
fn stage(
    context: &TcContext,
    decide: impl FnOnce(&mut Skb, Option<NonZeroU32>, &Kernel, &mut Scratch) -> Next,
) -> i32 {
    let Some(scratch) = scratch() else {
        return TC_ACT_SHOT;
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let kernel = Kernel::new(context.skb.skb, now());
    match decide(&mut skb, device, &kernel, scratch) {
        Next::Leave(reason) => leave(context, &mut skb, &kernel, reason, scratch),
        Next::Start => go_on(context, stages::START),
        Next::Map => go_on(context, stages::MAP),
        Next::Open => go_on(context, stages::OPEN),
    }
}

#[inline(always)]
fn established(context: &TcContext, link_length: u32, is_inside: bool) -> i32 {
    let mut skb = Skb::new(context.skb.skb, link_length);
    let device = NonZeroU32::new(skb.device()).filter(|_| is_inside);
    let kernel = Kernel::new(context.skb.skb, now());
    match pipeline::established(&mut skb, device, &kernel) {
        Quick::Onward(next_hop, resolve) => {
            if kernel.counts_traffic() {
                count(Reason::Translated, skb.length());
            }
            emit::forward(&mut skb, &next_hop, resolve).unwrap_or_else(|| lose(&skb))
        }
        Quick::Not => {
            let Some(scratch) = scratch() else {
                return lose(&skb);
            };
            scratch.device = device.map_or(0, NonZeroU32::get);
            scratch.link_length = link_length;
            scratch.plan.accepted = false;
            go_on(context, stages::EXCEPTIONAL)
        }
        Quick::Broken => lose(&skb),
    }
}

/// Hands the packet to the next program.
#[inline(always)]
fn go_on(context: &TcContext, stage: u32) -> i32 {
    // SAFETY: nothing here waits for its drop.
    unsafe { maps::STAGES.tail_call(context, stage) };
    // Still here: the loader has not filled the table.
    lose(&Skb::new(context.skb.skb, RAW))
}

/// Drops a packet that the kernel has no memory, or no program, to go on with.
#[inline(always)]
fn lose(skb: &Skb) -> i32 {
    count(Reason::RewriteFailed, skb.length());
    TC_ACT_SHOT
}

#[inline(always)]
fn scratch<'a>() -> Option<&'a mut Scratch> {
    let scratch = maps::SCRATCH.get_ptr_mut(0)?;
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    Some(unsafe { &mut *scratch })
}

/// Counts the packet's reason and lets it leave accordingly.
#[inline(always)]
fn leave(
    context: &TcContext,
    skb: &mut Skb,
    kernel: &Kernel,
    reason: Reason,
    scratch: &mut Scratch,
) -> i32 {
    let device = NonZeroU32::new(scratch.device);
    let Scratch { packet, plan, .. } = scratch;
    note(context, reason, packet, skb.length());
    skb.leave_word(REASON_WORD, reason as u32);
    nat::settle(packet, device, reason, kernel, plan);
    if plan.accepted && reason.outcome() != Outcome::Forward {
        // It is on its way out: the host has had it, and its sender is elsewhere.
        return TC_ACT_SHOT;
    }
    if packet.part == Part::First && plan.held != 0 && !plan.accepted {
        match reason.outcome() {
            Outcome::Forward | Outcome::Pass => return go_on(context, stages::RELEASE),
            Outcome::Ask | Outcome::Drop | Outcome::Refuse | Outcome::Hold | Outcome::Fragment => {}
        }
    }
    match reason.outcome() {
        Outcome::Pass => TC_ACT_OK,
        Outcome::Drop => TC_ACT_SHOT,
        Outcome::Refuse => match refusal(reason, packet, device, kernel, plan.mtu) {
            Some(refusal) if emit::may_tell(packet.source, kernel.now()) => {
                apart::refuse(context.skb.skb, &raw const refusal).cast_signed()
            }
            Some(_) | None => TC_ACT_SHOT,
        },
        Outcome::Hold => {
            let datagram = nat::datagram_key(packet, device);
            emit::hold(
                skb,
                &HeldKey {
                    datagram,
                    index: plan.held,
                },
            );
            TC_ACT_SHOT
        }
        Outcome::Fragment => go_on(context, stages::CUT),
        Outcome::Ask => go_on(context, stages::ASK),
        Outcome::Forward => {
            if plan.excess != 0 && skb.shorten_segments(plan.excess).is_none() {
                return lose(skb);
            }
            emit::forward(skb, &plan.rewrite.next_hop, plan.rewrite.resolve)
                .unwrap_or_else(|| lose(skb))
        }
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
    Some(Refusal {
        icmp_type,
        code,
        mtu,
        from,
    })
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

/// Counts and logs an exit that is not the usual one. The log has the reason's
/// number; user space prints its label.
#[inline(always)]
fn note(context: &TcContext, reason: Reason, packet: &Packet, bytes: u32) {
    count(reason, bytes);
    debug!(
        context,
        "{} {} {:i}:{} -> {:i}:{}",
        reason as u32,
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
