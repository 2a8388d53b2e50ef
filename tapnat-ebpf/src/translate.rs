//! NAT64's shell: lets `tapnat_common::siit` translate packets from one IP version to the
//! other, between the guest and IPv4's part of the NAT. Who is who, and what cannot be
//! translated, is decided in `tapnat_common::nat::nat64`.

use core::num::NonZeroU32;

use aya_ebpf::{
    bindings::{
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_NOEXIST, TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated::{bpf_skb_adjust_room, bpf_skb_change_proto, bpf_skb_change_tail},
    programs::TcContext,
};
use tapnat_common::{
    abi::{NextHop, StandIn, stages},
    embed::Prefix,
    frame::Frame as _,
    nat::{
        Insert, Tables,
        guests::Entry,
        nat64::{self, StandIns},
    },
    net::{Be32, Be128},
    parse::{self, Packet, Transport},
    siit::{self, Mtus, Version, error},
    time::Instant,
    verdict::Reason,
};

use crate::{
    emit, go_on, hand_over, leave, lose, lose_unread,
    maps::{self, Scratch, WHOLE_BYTES},
    note, now, scratch,
    skb::Skb,
    tables::{Kernel, Routed, inserted, value},
};

/// As far as headers are read.
const HEADERS: u32 = 255;

/// The ways on are asked when the packet is sent.
const ANY_MTU: Mtus = Mtus {
    ipv4: u16::MAX,
    ipv6: u16::MAX,
};

/// An IP version with a way to the other one.
pub trait Across: Routed + Version<Other: Routed> {
    /// The other one's number for `bpf_skb_change_proto`.
    const TO: u16;

    /// The plan for an ICMP error, which no stack has room for.
    fn error() -> Option<&'static mut error::Translation<Self::Other>>;

    /// What the packet's ends become.
    fn ends(
        packet: &Packet<Self>,
        device: Option<NonZeroU32>,
        context: &TcContext,
    ) -> Result<(Self::Other, Self::Other), Reason>;

    /// What the ends of the packet that an error quotes become, given what the error's do.
    fn quote_ends(
        packet: &Packet<Self>,
        quote: &error::Quote<Self>,
        ends: (Self::Other, Self::Other),
    ) -> Result<(Self::Other, Self::Other), Reason>;

    /// Lets a packet leave that is not translated.
    fn leave(
        context: &TcContext,
        skb: &mut Skb,
        reason: Reason,
        scratch: &mut Scratch<Self>,
    ) -> i32;

    /// Goes on with a packet that is of the other version now.
    fn go_on(context: &TcContext, skb: &mut Skb, scratch: &Scratch<Self>) -> i32;
}

impl<A: Routed> StandIns for Kernel<A> {
    #[inline(always)]
    fn prefix(&self) -> Option<Prefix> {
        let prefix = maps::NAT64.get(0)?.prefix;
        prefix.is_set().then_some(prefix)
    }

    #[inline(always)]
    fn secret(&self) -> u32 {
        maps::NAT64.get(0).map_or(0, |nat64| nat64.secret)
    }

    #[inline(always)]
    fn stand_in(&self, address: Be32) -> Option<&StandIn> {
        value(maps::STAND_INS.get_ptr_mut(address)).map(|guest| &*guest)
    }

    #[inline(always)]
    fn insert_stand_in(&self, address: Be32, guest: &StandIn) -> Insert {
        if self.stand_in(address).is_some() {
            return Insert::Exists;
        }
        inserted(maps::STAND_INS.insert(address, guest, u64::from(BPF_NOEXIST)))
    }

    #[inline(always)]
    fn enter_guest(&self, address: Be32, device: u32) -> Entry {
        let four = Kernel::<Be32>::new(core::ptr::null_mut(), Instant::default());
        Tables::enter_guest(&four, address, device)
    }
}

impl Across for Be128 {
    const TO: u16 = 0x0800;

    #[inline(always)]
    fn error() -> Option<&'static mut error::Translation<Be32>> {
        value(maps::ERROR_TO_IPV4.get_ptr_mut(0))
    }

    #[inline(always)]
    fn ends(
        packet: &Packet<Self>,
        device: Option<NonZeroU32>,
        context: &TcContext,
    ) -> Result<(Be32, Be32), Reason> {
        let kernel = Kernel::<Self>::new(context.skb.skb, now());
        nat64::to_ipv4(packet, device, &kernel, &kernel)
    }

    #[inline(always)]
    fn quote_ends(
        packet: &Packet<Self>,
        quote: &error::Quote<Self>,
        (stand_in, _): (Be32, Be32),
    ) -> Result<(Be32, Be32), Reason> {
        if quote.destination != packet.source {
            return Err(Reason::ErrorUnusable);
        }
        let kernel = Kernel::<Self>::new(core::ptr::null_mut(), now());
        Ok((nat64::world(quote.source, &kernel)?, stand_in))
    }

    #[inline(always)]
    fn leave(
        context: &TcContext,
        skb: &mut Skb,
        reason: Reason,
        scratch: &mut Scratch<Self>,
    ) -> i32 {
        let kernel = Kernel::new(context.skb.skb, now());
        leave(context, skb, &kernel, reason, scratch)
    }

    /// To IPv4's part, as a packet that a stand-in has sent.
    #[inline(always)]
    fn go_on(context: &TcContext, _skb: &mut Skb, scratch: &Scratch<Self>) -> i32 {
        hand_over::<Be32>(NonZeroU32::new(scratch.device), scratch.link_length, true);
        go_on::<Be32>(context, stages::ESTABLISHED)
    }
}

impl Across for Be32 {
    const TO: u16 = 0x86dd;

    #[inline(always)]
    fn error() -> Option<&'static mut error::Translation<Be128>> {
        value(maps::ERROR_TO_IPV6.get_ptr_mut(0))
    }

    #[inline(always)]
    fn ends(
        packet: &Packet,
        _device: Option<NonZeroU32>,
        context: &TcContext,
    ) -> Result<(Be128, Be128), Reason> {
        let kernel = Kernel::<Self>::new(context.skb.skb, now());
        let six = Kernel::<Be128>::new(context.skb.skb, now());
        let (guest, source) = nat64::to_ipv6(packet, &kernel, &six, &kernel)?;
        Ok((source, guest.address))
    }

    #[inline(always)]
    fn quote_ends(
        _packet: &Packet,
        quote: &error::Quote<Self>,
        (_, guest): (Be128, Be128),
    ) -> Result<(Be128, Be128), Reason> {
        let kernel = Kernel::<Self>::new(core::ptr::null_mut(), now());
        let prefix = kernel.prefix().ok_or(Reason::NotTranslatable)?;
        Ok((guest, prefix.embed(quote.destination)))
    }

    /// Its sender has been told all that there is to say.
    #[inline(always)]
    fn leave(
        context: &TcContext,
        skb: &mut Skb,
        reason: Reason,
        scratch: &mut Scratch<Self>,
    ) -> i32 {
        note(context, reason, &scratch.packet, skb.length());
        TC_ACT_SHOT
    }

    #[inline(always)]
    fn go_on(context: &TcContext, skb: &mut Skb, scratch: &Scratch<Self>) -> i32 {
        let kernel = Kernel::<Self>::new(context.skb.skb, now());
        let Some(guest) = kernel.stand_in(scratch.packet.destination) else {
            return lose(skb);
        };
        let next_hop = NextHop {
            device: guest.device,
            ..NextHop::default()
        };
        emit::forward::<Be128>(skb, &next_hop, true).unwrap_or_else(|| lose(skb))
    }
}

/// Translates a packet, unless it is an ICMP error.
#[inline(always)]
pub fn translate<A: Across>(context: &TcContext) -> i32 {
    let Some(scratch) = scratch::<A>() else {
        return lose_unread(context);
    };
    let device = NonZeroU32::new(scratch.device);
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    skb.pull(HEADERS);
    scratch.plan.begin();
    if let Err(reason) = parse::parse(&skb, &mut scratch.packet) {
        return A::leave(context, &mut skb, reason, scratch);
    }
    let packet = &scratch.packet;
    if packet.transport == Transport::IcmpError {
        return go_on::<A>(context, stages::TRANSLATE_ERROR);
    }
    let kernel = Kernel::<A>::new(context.skb.skb, now());
    let ends = match A::ends(packet, device, context) {
        Ok(ends) => ends,
        Err(reason) => return A::leave(context, &mut skb, reason, scratch),
    };
    let mut plan = match siit::plan(&skb, packet, ends, kernel.next_identification()) {
        Ok(plan) => plan,
        Err(why) => return A::leave(context, &mut skb, nat64::exit(why), scratch),
    };
    if let Some((offset, length)) = plan.unsummed() {
        let Some(sum) = emit::sum_of(&skb, offset, length) else {
            return lose(&skb);
        };
        plan.set_sum(sum);
    }
    let translated = change_version::<A>(&mut skb)
        .and_then(|()| make_room(&mut skb, plan.room()))
        .and_then(|()| plan.apply(&mut skb));
    match translated {
        Some(()) => A::go_on(context, &mut skb, scratch),
        None => lose(&skb),
    }
}

/// Translates an ICMP error.
#[inline(always)]
pub fn translate_error<A: Across>(context: &TcContext) -> i32 {
    let Some(scratch) = scratch::<A>() else {
        return lose_unread(context);
    };
    let mut skb = Skb::new(context.skb.skb, scratch.link_length);
    match plan_error::<A>(context, &skb, scratch) {
        Ok(()) => {}
        Err(reason) => return A::leave(context, &mut skb, reason, scratch),
    }
    match rebuild::<A>(&mut skb) {
        Some(()) => A::go_on(context, &mut skb, scratch),
        None => lose(&skb),
    }
}

#[inline(always)]
fn plan_error<A: Across>(
    context: &TcContext,
    skb: &Skb,
    scratch: &Scratch<A>,
) -> Result<(), Reason> {
    let kernel = Kernel::<A>::new(context.skb.skb, now());
    let plan = A::error().ok_or(Reason::RewriteFailed)?;
    let packet = &scratch.packet;
    plan.read(skb, packet).map_err(nat64::exit)?;
    plan.ends = A::ends(packet, NonZeroU32::new(scratch.device), context)?;
    plan.quote_ends = A::quote_ends(packet, &plan.quote, plan.ends)?;
    plan.plan(skb, packet, ANY_MTU, kernel.next_identification())
        .map_err(nat64::exit)
}

/// Makes the packet what was planned for the ICMP error.
#[inline(always)]
fn rebuild<A: Across>(skb: &mut Skb) -> Option<()> {
    /// What an error is no longer than.
    const MOST: u32 = WHOLE_BYTES as u32 / 2 - 1;
    let plan = A::error()?;
    let whole = value(maps::WHOLE.get_ptr_mut(0))?;
    let length = skb.length();
    skb.read_into(whole, 0, length)?;
    change_version::<A>(skb)?;
    // SAFETY: the context is valid; the helper checks the length.
    if unsafe { bpf_skb_change_tail(skb.context(), plan.length(), 0) } != 0 {
        return None;
    }
    for part in plan.parts() {
        if part.length != 0 {
            skb.store_part(whole, part.from, part.to, part.length, MOST)?;
        }
    }
    plan.apply(skb)
}

#[inline(always)]
fn change_version<A: Across>(skb: &mut Skb) -> Option<()> {
    // SAFETY: the context is valid.
    let result = unsafe { bpf_skb_change_proto(skb.context(), A::TO.to_be(), 0) };
    (result == 0).then_some(())
}

#[inline(always)]
fn make_room(skb: &mut Skb, room: i32) -> Option<()> {
    if room == 0 {
        return Some(());
    }
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    // SAFETY: the context is valid; the helper checks the length.
    let result = unsafe { bpf_skb_adjust_room(skb.context(), room, BPF_ADJ_ROOM_MAC, flags) };
    (result == 0).then_some(())
}
