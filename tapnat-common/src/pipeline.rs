//! A packet's life up to its exit: parse, decide, rewrite. The kernel's shell
//! and the host's tests both run it.

use core::num::NonZeroU32;

use crate::{
    abi::NextHop,
    checksum,
    frame::{Frame, LinkAddresses},
    nat::{
        self, Tables,
        firewall::{self, Forwarded},
        prefixes,
    },
    net::{Be16, Be128},
    network::Network,
    parse::{self, Packet, Part, Transport},
    rewrite::{self, Rewrite},
    verdict::{Next, Outcome, Plan, Reason},
};

/// What [`established`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quick {
    /// Translated the packet, which now leaves by this next hop; by the
    /// kernel's neighbour table if its link addresses are not known.
    Onward(NextHop, bool),
    /// Nothing: there is no such session. The packet may be for [`exceptional`] as well,
    /// but [`begin`] is shorter.
    New,
    /// Nothing: the packet is for [`exceptional`].
    Not,
    /// Could not change the packet's memory.
    Broken,
}

/// Translates a packet of an established session.
///
/// `device`: the index of the inside device that it arrived on, or `None` for
/// an uplink. `packet`: one of which nothing is known yet.
#[inline(always)]
pub fn established<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &mut Packet<A>,
) -> Quick {
    if !parse::parse_plain(frame, packet) {
        return Quick::Not;
    }
    let Some(session) = tables.session(&packet.key(device)) else {
        return Quick::New;
    };
    if !nat::is_steady(packet, session, tables) {
        return Quick::Not;
    }
    nat::pass_by(packet, session, tables);
    let rewrite = Rewrite::of(session, false);
    match rewrite::apply(frame, packet, &rewrite) {
        Some(()) => Quick::Onward(rewrite.next_hop, rewrite.resolve),
        None => Quick::Broken,
    }
}

/// Has a packet go on to [`start`] that [`established`] has found to be new. `packet` is as
/// that left it.
#[inline(always)]
pub fn begin<A: Network, F: Frame>(frame: &F, packet: &mut Packet<A>, plan: &mut Plan<A>) -> Next {
    A::read_rest(frame, packet);
    plan.begin();
    Next::Start
}

/// Translates a packet from outside, of an established session, that may go before
/// the kernel makes an skb of it.
///
/// `take`: reserves the way out by this device; `false` if frames that are no skbs
/// cannot leave by it. After that the packet goes, or is lost.
#[inline(always)]
pub fn early<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    tables: &T,
    take: impl FnOnce(u32) -> bool,
) -> Quick {
    let mut packet = Packet::default();
    if !parse::parse_plain(frame, &mut packet) || !may_go_early(frame, &packet) {
        return Quick::Not;
    }
    let Some(session) = tables.session(&packet.key(None)) else {
        return Quick::Not;
    };
    if !nat::is_steady(&packet, session, tables) {
        return Quick::Not;
    }
    let rewrite = Rewrite::of(session, false);
    if rewrite.resolve || !take(rewrite.next_hop.device) {
        return Quick::Not;
    }
    nat::pass_by(&packet, session, tables);
    match rewrite::apply(frame, &packet, &rewrite) {
        Some(()) => Quick::Onward(rewrite.next_hop, false),
        None => Quick::Broken,
    }
}

/// Whether nothing is lost if the packet goes before it is an skb: GRO, which makes
/// large packets of TCP's data, or a checksum that a device was to complete, which
/// only an skb can tell.
#[inline(always)]
fn may_go_early<A: Network, F: Frame>(frame: &F, packet: &Packet<A>) -> bool {
    if packet.transport == Transport::Tcp && !parse::is_without_data(frame, packet) {
        return false;
    }
    let check = packet
        .checksum_offset()
        .and_then(|offset| frame.load::<[u8; 2]>(offset));
    // One that is complete may look the same by chance: no harm is done.
    check.is_some_and(|check| {
        !checksum::is_partial(
            Be16::from_bytes(check),
            packet.source,
            packet.destination,
            packet.protocol,
            packet.length - packet.header_length,
        )
    })
}

/// Reads a packet that [`established`] left, of which nothing is planned yet.
///
/// `packet` becomes what was read of it.
#[inline(always)]
pub fn exceptional<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &mut Packet<A>,
) -> Next {
    // The headers may be there, but not in one piece.
    frame.pull(A::ALL_HEADERS);
    if let Err(reason) = parse::parse(frame, packet) {
        let is_denied = reason == Reason::NotIp
            && nat::keeps_from_host(device, tables)
            && !parse::is_arp(frame);
        return Next::Leave(if is_denied {
            Reason::HostDenied
        } else {
            reason
        });
    }
    if packet.transport == Transport::IcmpError {
        return Next::Error;
    }
    Next::Resume
}

/// Decides about a packet whose prefix may be translated, and translates it. See
/// [`prefixes`]; the arguments are as for [`exceptional`].
#[inline(always)]
pub fn prefix<F: Frame, T: Tables<Be128>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &mut Packet<Be128>,
    plan: &mut Plan<Be128>,
) -> Next {
    frame.pull(Be128::ALL_HEADERS);
    if let Err(reason) = parse::parse(frame, packet) {
        return Next::Leave(reason);
    }
    match prefixes::decide(packet, device, tables, plan) {
        Ok(pairs) => Next::Leave(prefixes::translate(frame, packet, pairs, tables)),
        Err(next) => next,
    }
}

/// Decides about a packet that may be of a session that is there, and rewrites it if it
/// goes on. `packet` and `plan` are as [`exceptional`] left them.
#[inline(always)]
pub fn resume<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &mut Packet<A>,
    plan: &mut Plan<A>,
) -> Next {
    match nat::resume(packet, device, tables, plan) {
        Next::Leave(reason) => Next::Leave(carry_out(frame, device, packet, tables, plan, reason)),
        next => next,
    }
}

/// Ends the session of a packet, which is over. `packet` is as [`exceptional`] left it.
#[inline(always)]
pub fn close<A: Network, T: Tables<A>>(
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &Packet<A>,
) -> Next {
    tables.close_session(&packet.key(device), None);
    Next::Start
}

/// Decides about a packet without a session, and plans one. `packet` and `plan`
/// are as [`exceptional`] left them.
#[inline(always)]
pub fn start<A: Network, F: Frame, T: Tables<A>>(
    frame: &F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &Packet<A>,
    plan: &mut Plan<A>,
) -> Next {
    // The firewall gives a packet back with the host's link address.
    let link = if frame.link_length() == 0 || plan.accepted {
        None
    } else {
        frame
            .load::<LinkAddresses>(0)
            .map(LinkAddresses::source_number)
    };
    if let Some(device) = device
        && packet.transport == Transport::IcmpOther
        && A::is_link_upkeep(packet.icmp_type)
        && let Err(reason) = nat::neighbours::check(A::claim(frame, packet), device, link, tables)
    {
        return Next::Leave(reason);
    }
    nat::start(packet, device, link, tables, plan)
}

/// Looks after one session or mapping that is there, when nobody else does. `plan` is as
/// [`start`] left it, which decides about the packet anew in the end.
#[inline(always)]
pub fn upkeep<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Next {
    nat::upkeep::step(packet, tables, plan)
}

/// Takes a packet that the host forwards back to what it was, if it comes from its
/// firewall. `from` is the index of the device that it came by, `out` of the one that it
/// leaves by.
#[inline(always)]
pub fn forwarded<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    from: u32,
    out: u32,
    tables: &T,
    packet: &mut Packet<A>,
) -> Forwarded<A> {
    // Most come here translated, or have nothing to do with guests.
    if !firewall::may_be_asked(from, A::read_source(frame, frame.link_length()), tables) {
        return Forwarded::Leave;
    }
    frame.pull(A::ALL_HEADERS);
    // Nothing that was asked about is of this kind.
    if parse::parse(frame, packet).is_err() {
        return Forwarded::Leave;
    }
    let forwarded = firewall::forwarded(packet, from, out, tables);
    if let Forwarded::Accepted(destination, _) = &forwarded {
        // The hop that the host took from it is ours to take.
        let time_to_live = packet.time_to_live.saturating_add(1);
        if rewrite::redirect(frame, packet, destination, time_to_live).is_none() {
            return Forwarded::Drop(Reason::RewriteFailed);
        }
    }
    forwarded
}

/// Gives a packet that the firewall is to be asked about the destination that it is to
/// see.
#[inline(always)]
pub fn ask<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &Packet<A>,
    plan: &Plan<A>,
) -> Option<()> {
    firewall::note(packet, device, tables, plan);
    let is_same =
        plan.asked.address == packet.destination && plan.asked.port == packet.destination_port;
    if is_same {
        return Some(());
    }
    rewrite::redirect(frame, packet, &plan.asked, packet.time_to_live)
}

/// Finds or makes the mapping for the session that [`start`] planned.
#[inline(always)]
pub fn map<A: Network, T: Tables<A>>(tables: &T, packet: &Packet<A>, plan: &mut Plan<A>) -> Next {
    nat::map(packet, tables, plan)
}

/// Plans the halves of the session that [`start`] planned.
#[inline(always)]
pub fn open<A: Network, T: Tables<A>>(
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &Packet<A>,
    plan: &mut Plan<A>,
) -> Next {
    nat::open(packet, device, tables, plan)
}

/// Makes the session that [`open`] planned, and rewrites its first packet.
#[inline(always)]
pub fn insert<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &Packet<A>,
    plan: &mut Plan<A>,
) -> Next {
    let reason = nat::insert(tables, plan);
    Next::Leave(carry_out(frame, device, packet, tables, plan, reason))
}

#[inline(always)]
fn carry_out<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    packet: &Packet<A>,
    tables: &T,
    plan: &Plan<A>,
    reason: Reason,
) -> Reason {
    if reason.outcome() != Outcome::Forward {
        return reason;
    }
    if let Some(settings) = tables.settings()
        && settings.clamp_mss != 0
        && rewrite::clamp_segment_size(frame, packet, settings.clamp_mss).is_none()
    {
        return Reason::RewriteFailed;
    }
    // Guests may give their datagrams the same one behind a shared address.
    if packet.part != Part::Whole
        && device.is_some()
        && A::renumber(frame, packet, plan.identification).is_none()
    {
        return Reason::RewriteFailed;
    }
    match rewrite::apply(frame, packet, &plan.rewrite) {
        Some(()) => reason,
        None => Reason::RewriteFailed,
    }
}

/// Decides about an ICMP error, and translates it if it is about a packet of a session.
/// `packet` and `plan` are as [`exceptional`] left them.
#[inline(always)]
pub fn error<A: Network, F: Frame, T: Tables<A>>(
    frame: &mut F,
    device: Option<NonZeroU32>,
    tables: &T,
    packet: &Packet<A>,
    plan: &mut Plan<A>,
) -> Next {
    match parse::parse_quoted(frame, packet, &mut plan.quoted) {
        Ok(()) => {}
        // It may well be about something that the host itself sent, which looks at the sums
        // itself, and at those that matter: some routers quote a header with an old one.
        Err(Reason::ErrorUnusable | Reason::ErrorBadChecksum) if device.is_none() => {
            return Next::Leave(Reason::NoMapping);
        }
        Err(reason) => return Next::Leave(reason),
    }
    let reason = nat::decide_error(packet, device, tables, plan);
    if reason.outcome() == Outcome::Forward
        && rewrite::apply_error(
            frame,
            packet,
            &plan.quoted,
            &plan.rewrite,
            plan.error_source,
        )
        .is_none()
    {
        return Next::Leave(Reason::RewriteFailed);
    }
    Next::Leave(reason)
}
