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
mod translate;
mod xdp;

use core::num::NonZeroU32;

use aya_ebpf::{
    Global,
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
    },
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::{cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};
use aya_log_ebpf::debug;
use tapnat_common::{
    abi::{
        EndpointKey, Family, FlowKey, HeldKey, NextHop, PermissionKey, Sweep, stages,
        sweep_key_bytes, sweep_tables,
    },
    cut,
    frame::{Frame as _, Header, lengths::ETHERNET},
    nat::{
        self, Tables as _,
        firewall::Forwarded,
        nat64::{self, StandIns as _, TO_STAND_IN},
    },
    net::{Address, Be32, Be128},
    network::Network as _,
    parse::{self, Packet, Part},
    pipeline::{self, Quick},
    refusal::Refusal,
    time::Instant,
    trace::REASON_WORD,
    verdict::{Next, Outcome, Reason},
};

use crate::{
    host::{Four, Six},
    maps::{Maps, Scratch, Swept},
    skb::Skb,
    tables::{Kernel, Routed, workspace},
    translate::{translate, translate_error as translate_icmp_error},
    xdp::Buffer,
};

/// No link header: tun, WireGuard, PPP.
const RAW: u32 = 0;

/// See `tapnat_common::abi::globals`.
#[unsafe(no_mangle)]
static COUNT_TRAFFIC: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static NAT_LOG_LEVEL: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static HAS_NAT64: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static IPV6_CHECKSUMS: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static HAS_PREFIXES: Global<u8> = Global::new(0);

#[unsafe(no_mangle)]
static NETNS_COOKIE: Global<u64> = Global::new(0);

/// A socket of the host names whom it wants to talk to.
#[cgroup_sock_addr(connect4)]
pub fn host_connect4(context: SockAddrContext) -> i32 {
    host::lead(&Four::new(context.sock_addr), NETNS_COOKIE.load())
}

/// The same, of one that also speaks IPv6.
#[cgroup_sock_addr(connect6)]
pub fn host_connect6(context: SockAddrContext) -> i32 {
    lead(Six::new(context.sock_addr))
}

/// A socket of the host names whom it sends a datagram to.
#[cgroup_sock_addr(sendmsg4)]
pub fn host_sendmsg4(context: SockAddrContext) -> i32 {
    host::lead(&Four::new(context.sock_addr), NETNS_COOKIE.load())
}

/// The same, of one that also speaks IPv6. The kernel treats what is mapped as IPv4.
#[cgroup_sock_addr(sendmsg6)]
pub fn host_sendmsg6(context: SockAddrContext) -> i32 {
    host::lead(&Six::new(context.sock_addr), NETNS_COOKIE.load())
}

/// A socket of the host asks whose datagram it has received.
#[cgroup_sock_addr(recvmsg4)]
pub fn host_recvmsg4(context: SockAddrContext) -> i32 {
    host::tell(&Four::new(context.sock_addr), NETNS_COOKIE.load())
}

/// The same, of one that also speaks IPv6.
#[cgroup_sock_addr(recvmsg6)]
pub fn host_recvmsg6(context: SockAddrContext) -> i32 {
    tell(Six::new(context.sock_addr))
}

/// A socket of the host asks whom it is connected to.
#[cgroup_sock_addr(getpeername4)]
pub fn host_getpeername4(context: SockAddrContext) -> i32 {
    host::tell(&Four::new(context.sock_addr), NETNS_COOKIE.load())
}

/// The same, of one that also speaks IPv6.
#[cgroup_sock_addr(getpeername6)]
pub fn host_getpeername6(context: SockAddrContext) -> i32 {
    tell(Six::new(context.sock_addr))
}

#[inline(always)]
fn lead(address: Six) -> i32 {
    match address.four() {
        Some(address) => host::lead(&address, NETNS_COOKIE.load()),
        None => host::lead(&address, NETNS_COOKIE.load()),
    }
}

#[inline(always)]
fn tell(address: Six) -> i32 {
    match address.four() {
        Some(address) => host::tell(&address, NETNS_COOKIE.load()),
        None => host::tell(&address, NETNS_COOKIE.load()),
    }
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
    match early::<Be32>(&mut buffer) {
        XDP_PASS if parse::is::<Be128, _>(&buffer) => early::<Be128>(&mut buffer),
        action => action,
    }
}

#[inline(always)]
fn early<A: Routed>(buffer: &mut Buffer) -> u32 {
    // What such packets need asks for no context.
    let kernel = Kernel::<A>::new(core::ptr::null_mut(), now());
    let take = |device| maps::XDP_DEVICES.redirect(device, XDP_PASS.into()).is_ok();
    let sent = match pipeline::early(buffer, &kernel, take) {
        Quick::Onward(next_hop, _) => buffer.store(0, &next_hop.link),
        Quick::New | Quick::Not => return XDP_PASS,
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

macro_rules! stages {
    ($(
        $(#[$documentation:meta])*
        $name:ident = $stage:ident::<$address:ty>;
    )*) => {
        $(
            $(#[$documentation])*
            #[classifier]
            pub fn $name(context: TcContext) -> i32 {
                $stage::<$address>(&context)
            }
        )*
    };
}

stages! {
    /// IPv6 packets, from any device.
    established6 = established_elsewhere::<Be128>;
    /// Packets that stand-ins have sent.
    established4 = established_elsewhere::<Be32>;
    /// Packets from guests with IPv6 to the world's IPv4, and what goes back to them.
    translate6 = translate::<Be128>;
    translate4 = translate::<Be32>;
    translate_error6 = translate_icmp_error::<Be128>;
    translate_error4 = translate_icmp_error::<Be32>;
    /// Packets that are not of an established session.
    exceptional = be_exceptional::<Be32>;
    exceptional6 = be_exceptional::<Be128>;
    /// Packets that may be of a session that is there.
    resume = resume_session::<Be32>;
    resume6 = resume_session::<Be128>;
    /// ICMP errors.
    error = translate_error::<Be32>;
    error6 = translate_error::<Be128>;
    /// Packets of a session that is over.
    close = close_session::<Be32>;
    close6 = close_session::<Be128>;
    /// Packets without a session.
    start = begin::<Be32>;
    start6 = begin::<Be128>;
    /// Packets that open a session with a mapping.
    map = find_mapping::<Be32>;
    map6 = find_mapping::<Be128>;
    /// Packets that open a session.
    open = open_session::<Be32>;
    open6 = open_session::<Be128>;
    insert = insert_session::<Be32>;
    insert6 = insert_session::<Be128>;
    /// Packets that the host's firewall is to be asked about.
    ask = ask_firewall::<Be32>;
    ask6 = ask_firewall::<Be128>;
    /// Packets that are to begin a session while nobody sweeps.
    upkeep = look_after_others::<Be32>;
    upkeep6 = look_after_others::<Be128>;
    /// First fragments, for which others wait.
    release = release_fragments::<Be32>;
    release6 = release_fragments::<Be128>;
}

/// IPv6 packets whose prefix is translated.
#[classifier]
#[inline(always)]
pub fn prefix6(context: TcContext) -> i32 {
    stage::<Be128>(&context, |skb, device, kernel, scratch| {
        scratch.plan.begin();
        pipeline::prefix(skb, device, kernel, &mut scratch.packet, &mut scratch.plan)
    })
}

/// Whether the prefix of this IPv6 packet is translated.
#[inline(always)]
fn has_prefix(skb: &Skb, device: Option<NonZeroU32>) -> bool {
    // What is looked at asks for no time.
    let kernel = Kernel::new(skb.context(), Instant::default());
    nat::prefixes::concern(skb, device, &kernel)
}

#[inline(always)]
fn established_elsewhere<A: Routed>(context: &TcContext) -> i32 {
    let Some(scratch) = scratch::<A>() else {
        return lose_unread(context);
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    if HAS_NAT64.load() != 0 && A::VERSION == Be128::VERSION && is_for_ipv4(&skb) {
        return go_on::<A>(context, stages::TRANSLATE);
    }
    if HAS_PREFIXES.load() != 0 && A::VERSION == Be128::VERSION && has_prefix(&skb, device) {
        return go_on::<A>(context, stages::PREFIX);
    }
    match quick::<A>(&mut skb, device) {
        Left::Gone(action) => action,
        Left::New(packet) => begin_with(context, &skb, packet),
        Left::Not => go_on::<A>(context, stages::EXCEPTIONAL),
    }
}

/// Whether an IPv6 packet is for the world's IPv4.
#[inline(always)]
fn is_for_ipv4(skb: &Skb) -> bool {
    let destination = Be128::read_destination(skb, skb.link_length());
    let kernel = Kernel::<Be128>::new(skb.context(), now());
    destination.is_some_and(|destination| nat64::is_for(destination, &kernel))
}

#[inline(always)]
fn be_exceptional<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |skb, device, kernel, scratch| {
        scratch.plan.begin();
        pipeline::exceptional(skb, device, kernel, &mut scratch.packet)
    })
}

#[inline(always)]
fn resume_session<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |skb, device, kernel, scratch| {
        pipeline::resume(skb, device, kernel, &mut scratch.packet, &mut scratch.plan)
    })
}

#[inline(always)]
fn translate_error<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |skb, device, kernel, scratch| {
        pipeline::error(skb, device, kernel, &scratch.packet, &mut scratch.plan)
    })
}

#[inline(always)]
fn close_session<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |_, device, kernel, scratch| {
        pipeline::close(device, kernel, &scratch.packet)
    })
}

#[inline(always)]
fn begin<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |skb, device, kernel, scratch| {
        pipeline::start(skb, device, kernel, &scratch.packet, &mut scratch.plan)
    })
}

#[inline(always)]
fn look_after_others<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |_, _, kernel, scratch| {
        pipeline::upkeep(&scratch.packet, kernel, &mut scratch.plan)
    })
}

#[inline(always)]
fn find_mapping<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |_, _, kernel, scratch| {
        pipeline::map(kernel, &scratch.packet, &mut scratch.plan)
    })
}

#[inline(always)]
fn open_session<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |_, device, kernel, scratch| {
        pipeline::open(device, kernel, &scratch.packet, &mut scratch.plan)
    })
}

#[inline(always)]
fn insert_session<A: Routed>(context: &TcContext) -> i32 {
    stage::<A>(context, |skb, device, kernel, scratch| {
        pipeline::insert(skb, device, kernel, &scratch.packet, &mut scratch.plan)
    })
}

#[inline(always)]
fn ask_firewall<A: Routed>(context: &TcContext) -> i32 {
    let Some(scratch) = scratch::<A>() else {
        return lose_unread(context);
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let kernel = Kernel::new(context.skb.skb, scratch.now);
    let Scratch { packet, plan, .. } = scratch;
    if pipeline::ask(&mut skb, device, &kernel, packet, plan).is_none() {
        return lose(&skb);
    }
    if packet.part == Part::First && plan.held != 0 {
        return go_on::<A>(context, stages::RELEASE);
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn release_fragments<A: Routed>(context: &TcContext) -> i32 {
    let Some(scratch) = scratch::<A>() else {
        return lose_unread(context);
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let datagram = nat::datagram_key(&scratch.packet, device);
    if emit::release(&mut skb, scratch.plan.held, datagram).is_none() {
        return lose(&skb);
    }
    let rewrite = &scratch.plan.rewrite;
    if rewrite.next_hop.device == 0 {
        return TC_ACT_UNSPEC;
    }
    send::<A>(&mut skb, &rewrite.next_hop, rewrite.resolve)
}

/// What the host sends out of a device. See `tapnat_common::nat::firewall`.
#[classifier]
pub fn accepted(context: TcContext) -> i32 {
    // SAFETY: the context is valid for the program's run.
    let from = unsafe { (*context.skb.skb).ingress_ifindex };
    if from == 0 {
        return TC_ACT_UNSPEC;
    }
    let out = Skb::new(context.skb.skb, RAW).device();
    let kernel = Kernel::<Be32>::new(context.skb.skb, now());
    let is_ethernet = kernel.device(out).is_none_or(|out| out.ethernet != 0);
    let link_length = if is_ethernet { ETHERNET } else { RAW };
    let skb = Skb::new(context.skb.skb, link_length);
    if parse::is::<Be128, _>(&skb) {
        return accept::<Be128>(&context, skb, (from, out));
    }
    accept::<Be32>(&context, skb, (from, out))
}

/// `from` and `out` are indices of devices.
#[inline(always)]
fn accept<A: Routed>(context: &TcContext, mut skb: Skb, (from, out): (u32, u32)) -> i32 {
    let Some(scratch) = scratch::<A>() else {
        return lose_unread(context);
    };
    let kernel = Kernel::new(context.skb.skb, now());
    match pipeline::forwarded(&mut skb, from, out, &kernel, &mut scratch.packet) {
        // For whatever else hangs here.
        Forwarded::Leave => TC_ACT_UNSPEC,
        Forwarded::Accepted(_, device) => {
            scratch.device = device.map_or(0, NonZeroU32::get);
            scratch.link_length = skb.link_length();
            scratch.now = kernel.now();
            scratch.plan.accepted = true;
            go_on::<A>(context, stages::EXCEPTIONAL)
        }
        Forwarded::Drop(reason) => {
            note(context, reason, &scratch.packet, skb.length());
            TC_ACT_SHOT
        }
    }
}

/// Packets that are too long for the way on, which are to be cut.
#[classifier]
pub fn cut(context: TcContext) -> i32 {
    let Some(scratch) = scratch::<Be32>() else {
        return lose_unread(&context);
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let kernel = Kernel::new(context.skb.skb, scratch.now);
    nat::forget(&scratch.packet, device, &kernel);
    scratch.piece = 0;
    match emit::prepare_cut(&mut skb, &scratch.packet) {
        Some(()) => go_on::<Be32>(&context, stages::PIECE),
        None => lose(&skb),
    }
}

/// One piece of a packet that is too long.
#[classifier]
pub fn piece(context: TcContext) -> i32 {
    let Some(scratch) = scratch::<Be32>() else {
        return lose_unread(&context);
    };
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let number = scratch.piece;
    scratch.piece += 1;
    let Some(piece) = cut::piece(&scratch.packet, scratch.plan.mtu, number) else {
        // All have come by; the packet itself was only their carrier.
        return TC_ACT_SHOT;
    };
    match emit::send_piece(&mut skb, &scratch.packet, piece) {
        Some(()) => go_on::<Be32>(&context, stages::PIECE),
        None => lose(&skb),
    }
}

/// Removes what is over: the entry whose key is next in the packet. See
/// `tapnat_common::abi::Sweep`.
#[classifier]
pub fn sweep(context: TcContext) -> i32 {
    let mut packet = Skb::new(context.skb.skb, RAW);
    let Some(mut sweep) = packet.load::<Sweep>(0) else {
        return 0;
    };
    let removed = match sweep.table.checked_sub(<Be128 as Family>::OFFSET) {
        Some(table) => remove::<Be128>(&packet, table, sweep.next),
        None => remove::<Be32>(&packet, sweep.table, sweep.next),
    };
    sweep.next += 1;
    sweep.removed += u32::from(removed == Some(true));
    packet.store(0, &sweep);
    sweep.removed as i32
}

/// Removes the entry of a table (`tapnat_common::abi::sweep_tables`) whose key has this
/// number in the packet, if it is over.
#[inline(always)]
fn remove<A>(packet: &Skb, table: u32, number: u32) -> Option<bool>
where
    A: Routed,
    FlowKey<A>: Header,
    EndpointKey<A>: Header,
    PermissionKey<A>: Header,
{
    let kernel = Kernel::<A, true>::of_sweep(packet.context(), now());
    let at = (size_of::<Sweep>() + number as usize * sweep_key_bytes::<A>()) as u32;
    // Not on the stack, which is short.
    let Swept {
        session,
        mapping,
        permission,
        asked,
    } = &mut Kernel::<A, true>::workspace()?.swept;
    match table {
        sweep_tables::SESSIONS => {
            packet.fill(session, at)?;
            Some(nat::sweep::session(session, &kernel))
        }
        sweep_tables::MAPPINGS => {
            packet.fill(mapping, at)?;
            Some(nat::sweep::mapping(mapping, &kernel))
        }
        sweep_tables::PERMISSIONS => {
            packet.fill(permission, at)?;
            Some(nat::sweep::permission(permission, &kernel))
        }
        // One key on the stack for all of them.
        sweep_tables::GUESTS | sweep_tables::GUESTS_PORTS | sweep_tables::GUESTS_UNPLUGGED => {
            packet.read(at).map(|key| match table {
                sweep_tables::GUESTS => nat::sweep::guest(key, &kernel),
                sweep_tables::GUESTS_PORTS => nat::sweep::port_of_guest(key, &kernel),
                _ => nat::sweep::unplugged_guest(key, &kernel),
            })
        }
        sweep_tables::SESSIONS_TO_ASK => {
            packet.fill(asked, at)?;
            Some(nat::sweep::ask_again(asked, &kernel))
        }
        sweep_tables::PORTS => {
            packet.fill(mapping, at)?;
            Some(nat::sweep::port(mapping, &kernel))
        }
        _ => None,
    }
}

/// Runs a program that others go on to.
#[inline(always)]
fn stage<A: Routed>(
    context: &TcContext,
    decide: impl FnOnce(&mut Skb, Option<NonZeroU32>, &Kernel<A>, &mut Scratch<A>) -> Next,
) -> i32 {
    let Some(scratch) = scratch::<A>() else {
        return lose_unread(context);
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    let kernel = Kernel::new(context.skb.skb, scratch.now);
    match decide(&mut skb, device, &kernel, scratch) {
        Next::Leave(reason) => leave(context, &mut skb, &kernel, reason, scratch),
        Next::Resume => go_on::<A>(context, stages::RESUME),
        Next::Error => go_on::<A>(context, stages::ERROR),
        Next::Close => go_on::<A>(context, stages::CLOSE),
        Next::Start => go_on::<A>(context, stages::START),
        Next::Map => go_on::<A>(context, stages::MAP),
        Next::Open => go_on::<A>(context, stages::OPEN),
        Next::Insert => go_on::<A>(context, stages::INSERT),
        Next::Upkeep => go_on::<A>(context, stages::UPKEEP),
    }
}

#[inline(always)]
fn established(context: &TcContext, link_length: u32, is_inside: bool) -> i32 {
    let mut skb = Skb::new(context.skb.skb, link_length);
    let device = NonZeroU32::new(skb.device()).filter(|_| is_inside);
    match quick::<Be32>(&mut skb, device) {
        Left::Gone(action) => return action,
        Left::New(packet) => {
            hand_over::<Be32>(device, link_length, stands_in(Some(packet.source), device));
            return begin_with(context, &skb, packet);
        }
        Left::Not => {}
    }
    // To the host this is no other network, and so it is none to us.
    if skb.has_priority_tag() && !skb.remove_priority_tag() {
        count(Reason::BadHeader, skb.length());
        return TC_ACT_SHOT;
    }
    if parse::is::<Be128, _>(&skb) {
        hand_over::<Be128>(device, link_length, false);
        // Without its programs IPv6 is something that is not IP.
        // SAFETY: nothing here waits for its drop.
        unsafe { maps::STAGES.tail_call(context, <Be128 as Family>::OFFSET + stages::ESTABLISHED) };
    }
    let source = Be32::read_source(&skb, link_length);
    hand_over::<Be32>(device, link_length, stands_in(source, device));
    go_on::<Be32>(context, stages::EXCEPTIONAL)
}

/// Whether an IPv4 packet is from the stand-in of a guest on this device: a piece of one
/// that was too long when it was translated.
#[inline(always)]
fn stands_in(source: Option<Be32>, device: Option<NonZeroU32>) -> bool {
    let (true, Some(source), Some(device)) = (HAS_NAT64.load() != 0, source, device) else {
        return false;
    };
    let kernel = Kernel::<Be32>::new(core::ptr::null_mut(), Instant::default());
    source.is_stand_in()
        && kernel
            .stand_in(source)
            .is_some_and(|guest| guest.device == device.get())
}

/// What [`quick`] leaves to be done.
enum Left<A> {
    /// Nothing but to return this.
    Gone(i32),
    /// There is no session, see [`begin_with`].
    New(Packet<A>),
    /// All.
    Not,
}

/// Translates a packet of an established session.
#[inline(always)]
fn quick<A: Routed>(skb: &mut Skb, device: Option<NonZeroU32>) -> Left<A> {
    let kernel = Kernel::<A>::new(skb.context(), now());
    let mut packet = Packet::default();
    match pipeline::established(skb, device, &kernel, &mut packet) {
        Quick::Onward(next_hop, resolve) => {
            if kernel.counts_traffic() {
                count(Reason::Translated, skb.length());
            }
            Left::Gone(send::<A>(skb, &next_hop, resolve))
        }
        Quick::New => Left::New(packet),
        Quick::Not => Left::Not,
        Quick::Broken => Left::Gone(lose(skb)),
    }
}

/// Goes on with a packet that [`quick`] has found to be of no session, after
/// [`hand_over`].
#[inline(always)]
fn begin_with<A: Routed>(context: &TcContext, skb: &Skb, packet: Packet<A>) -> i32 {
    if let Some(scratch) = scratch::<A>() {
        scratch.packet = packet;
        pipeline::begin(skb, &mut scratch.packet, &mut scratch.plan);
    }
    go_on::<A>(context, stages::START)
}

/// Sends the rewritten packet on, across to the other IP version if it is for a stand-in.
#[inline(always)]
fn send<A: Routed>(skb: &mut Skb, next_hop: &NextHop, resolve: bool) -> i32 {
    if resolve && HAS_NAT64.load() != 0 && next_hop.link == TO_STAND_IN {
        return cross_over::<A>(skb);
    }
    emit::forward::<A>(skb, next_hop, resolve).unwrap_or_else(|| lose(skb))
}

/// Goes on to the other IP version.
#[inline(always)]
fn cross_over<A: Routed>(skb: &Skb) -> i32 {
    if let Some(scratch) = scratch::<A>() {
        scratch.link_length = skb.link_length();
    }
    go_on::<A>(&TcContext::new(skb.context()), stages::TRANSLATE)
}

/// Notes where a packet arrived for the programs that go on with it, and whether a
/// stand-in has sent it.
#[inline(always)]
fn hand_over<A: Routed>(device: Option<NonZeroU32>, link_length: u32, stands_in: bool) {
    // Without it they drop the packet.
    if let Some(scratch) = scratch::<A>() {
        scratch.device = device.map_or(0, NonZeroU32::get);
        scratch.link_length = link_length;
        scratch.now = now();
        scratch.plan.accepted = false;
        scratch.plan.stands_in = stands_in;
    }
}

/// Hands the packet to the next program.
#[inline(always)]
fn go_on<A: Family>(context: &TcContext, stage: u32) -> i32 {
    // SAFETY: nothing here waits for its drop.
    unsafe { maps::STAGES.tail_call(context, A::OFFSET + stage) };
    // Still here: the loader has not filled the table.
    lose_unread(context)
}

/// Drops a packet that the kernel has no memory, or no program, to go on with.
#[inline(always)]
fn lose(skb: &Skb) -> i32 {
    count(Reason::RewriteFailed, skb.length());
    TC_ACT_SHOT
}

/// The same, where nothing is known of the packet: what goes with it from program to program
/// is not there, which no kernel lets happen.
#[inline(always)]
fn lose_unread(context: &TcContext) -> i32 {
    lose(&Skb::new(context.skb.skb, RAW))
}

#[inline(always)]
fn scratch<'a, A: Maps>() -> Option<&'a mut Scratch<A>> {
    let scratch = A::scratch().get_ptr_mut(0)?;
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    Some(unsafe { &mut *scratch })
}

/// Counts the packet's reason and lets it leave accordingly.
#[inline(always)]
fn leave<A: Routed>(
    context: &TcContext,
    skb: &mut Skb,
    kernel: &Kernel<A>,
    reason: Reason,
    scratch: &mut Scratch<A>,
) -> i32 {
    scratch.reason = reason;
    // Whatever it is: otherwise the verifier looks at all that follows once for each reason.
    // SAFETY: what was just written.
    let reason = unsafe { (&raw const scratch.reason).read_volatile() };
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
            Outcome::Forward | Outcome::Pass => return go_on::<A>(context, stages::RELEASE),
            Outcome::Ask | Outcome::Drop | Outcome::Refuse | Outcome::Hold | Outcome::Fragment => {}
        }
    }
    match reason.outcome() {
        // On to what else hangs here, and then to the host.
        Outcome::Pass => TC_ACT_UNSPEC,
        Outcome::Drop => TC_ACT_SHOT,
        Outcome::Refuse => match refusal(reason, packet, device, kernel, plan.mtu) {
            Some(refusal) if emit::may_tell(packet.source, kernel.now()) => {
                let told = A::refuse(context.skb.skb, &raw const refusal).cast_signed();
                if HAS_NAT64.load() != 0 && plan.stands_in && told != TC_ACT_SHOT {
                    return cross_over::<A>(skb);
                }
                told
            }
            Some(_) | None => TC_ACT_SHOT,
        },
        Outcome::Hold => {
            if let Some(workspace) = workspace::<A>() {
                workspace.held = HeldKey {
                    datagram: nat::datagram_key(packet, device),
                    index: plan.held,
                };
                emit::hold(skb, &workspace.held);
            }
            TC_ACT_SHOT
        }
        Outcome::Fragment => go_on::<A>(context, stages::CUT),
        Outcome::Ask => go_on::<A>(context, stages::ASK),
        Outcome::Forward => {
            if plan.excess != 0 && skb.shorten_segments(plan.excess).is_none() {
                return lose(skb);
            }
            send::<A>(skb, &plan.rewrite.next_hop, plan.rewrite.resolve)
        }
    }
}

#[inline(always)]
fn refusal<A: Routed>(
    reason: Reason,
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    kernel: &Kernel<A>,
    mtu: u16,
) -> Option<Refusal<A>> {
    let complaint = reason.complaint()?;
    let from = nat::refusal_source(packet, device, kernel)?;
    Some(Refusal {
        complaint,
        mtu,
        from,
    })
}

/// The datapath's clock. See `tapnat_common::time`.
#[inline(always)]
fn now() -> Instant {
    // SAFETY: no preconditions.
    Instant::from_nanoseconds(unsafe { bpf_ktime_get_coarse_ns() })
}

/// Counts and logs an exit that is not the usual one. The log has the reason's
/// number; user space prints its label.
#[inline(always)]
fn note<A: Address>(context: &TcContext, reason: Reason, packet: &Packet<A>, bytes: u32) {
    count(reason, bytes);
    debug!(
        context,
        "{} {} {:i}:{} -> {:i}:{}",
        reason as u32,
        packet.protocol,
        packet.source.mapped().bytes(),
        packet.source_port.get(),
        packet.destination.mapped().bytes(),
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
