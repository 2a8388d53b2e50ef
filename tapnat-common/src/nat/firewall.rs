//! The host's firewall, where it is to be asked: a session's first packets go the way
//! that the host would forward them. What its FORWARD chain lets through is met again
//! on its way out of a device, taken back to what it was, and translated as accepted.
//!
//! The firewall sees guests under their own addresses, on both sides: that is what it
//! sees with source NAT of the kernel's own, too. What it thinks of a packet is its
//! own business; that it has dropped one shows only in that none comes back.

use core::num::NonZeroU32;

use super::{Tables, policy};
use crate::{
    abi::{EndpointKey, FlowKey, Session, Settings, role, session_flags, setting_flags, tcp_state},
    network::Network,
    parse::{Packet, Part, Transport, tcp_flags},
    time::Slot,
    verdict::{Plan, Reason},
};

/// How long a packet may be with the firewall, in slots: two seconds. After that it was
/// dropped.
const ANSWER_TIME: u8 = 4;
/// How long only the other side may be heard of a session that is to be asked about, in
/// slots: half a minute.
const SILENCE: u8 = 56;

/// What is to be done with a packet that the host sends out of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded<A> {
    /// Nothing: it is the host's own, or translated.
    Leave,
    /// It is accepted. It came with this destination, on this inside device or on an
    /// uplink.
    Accepted(EndpointKey<A>, Option<NonZeroU32>),
    Drop(Reason),
}

/// Whether the firewall has to be asked about the first packet of a session.
#[inline(always)]
pub(super) const fn asks<A: Network>(settings: &Settings<A>, plan: &Plan<A>) -> bool {
    settings.flags & setting_flags::ASK_FIREWALL != 0 && !plan.accepted
}

/// Lets the firewall be asked about the packet, with the destination that it has when it
/// is translated.
#[inline(always)]
pub(super) const fn ask<A: Network>(destination: EndpointKey<A>, plan: &mut Plan<A>) -> Reason {
    plan.asked = destination;
    Reason::FirewallAsked
}

/// Remembers what the firewall is asked about.
#[inline(always)]
pub fn note<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
    plan: &Plan<A>,
) {
    let key = packet.key(device);
    let forwarded = FlowKey {
        destination: plan.asked.address,
        destination_port: plan.asked.port,
        ..key
    };
    tables.note_asked(&forwarded, &key.destination_endpoint());
}

/// Whether a packet that came by the device `from` (an index) may be one that was asked
/// about. `source` is who sent it, if that can be looked at.
#[inline(always)]
pub fn may_be_asked<A: Network, T: Tables<A>>(from: u32, source: Option<A>, tables: &T) -> bool {
    let Some(way_in) = tables.device(from) else {
        return false;
    };
    way_in.role != role::INSIDE || source.is_none_or(|source| way_in.contains(source))
}

/// What a packet is that leaves by the device `out` and came by the device `from`
/// (indices), unless it was of another version or made no sense.
#[inline(always)]
pub fn forwarded<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    from: u32,
    out: u32,
    tables: &T,
) -> Forwarded<A> {
    let (Some(settings), Some(way_in)) = (tables.settings(), tables.device(from)) else {
        return Forwarded::Leave;
    };
    if packet.transport == Transport::IcmpError {
        return Forwarded::Leave;
    }
    let device = NonZeroU32::new(from).filter(|_| way_in.role == role::INSIDE);
    let is_guests = device.is_some() && way_in.contains(packet.source);
    if device.is_some() && !is_guests {
        return Forwarded::Leave;
    }
    let key = packet.key(device);
    if packet.part != Part::Later
        && let Some(destination) = tables.take_asked(&key)
    {
        return Forwarded::Accepted(destination, device);
    }
    let is_leaving = tables
        .device(out)
        .is_some_and(|way_out| way_out.role == role::UPLINK);
    if !is_guests || !is_leaving || policy::exempts(packet.destination, settings, tables) {
        return Forwarded::Leave;
    }
    // What was asked about another packet holds for it: for its first fragment, or for
    // one that waited with it for the next hop's link address.
    let is_known = packet.part == Part::Later
        || tables
            .session(&key)
            .is_some_and(|session| session.tcp & tcp_state::TO_ASK == 0);
    if is_known {
        Forwarded::Accepted(key.destination_endpoint(), device)
    } else {
        Forwarded::Drop(Reason::FirewallNotAsked)
    }
}

/// What the firewall has to do with a packet of a session that it is to be asked about
/// again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// The packet goes on.
    Accepted,
    /// The packet goes on; the session still has to be asked about.
    Undecided,
    /// The packet has to be asked about.
    Ask,
    /// The firewall was asked and let nothing through: the session is over.
    Refused,
}

/// What the firewall has to do with a packet of a session that is there.
#[inline(always)]
pub(super) fn ask_again<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    key: &FlowKey<A>,
    session: &mut Session<A>,
    settings: &Settings<A>,
    tables: &T,
    plan: &Plan<A>,
) -> Again {
    let asks = asks(settings, plan);
    // It may begin another connection on the same ports, the other way round.
    let opens = packet.segment.flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    if asks && opens {
        return Again::Ask;
    }
    if session.tcp & tcp_state::TO_ASK == 0 {
        return Again::Accepted;
    }
    let twin = tables.twin(key, session);
    if !asks {
        session.tcp &= !tcp_state::FIREWALL;
        if let Some(twin) = twin {
            twin.tcp &= !tcp_state::FIREWALL;
        }
        return Again::Accepted;
    }
    let now = tables.now().slot();
    if session.flags & session_flags::INITIATOR != 0 {
        if is_refused(session, now, ANSWER_TIME) {
            return Again::Refused;
        }
        note_asked(session, now);
        return Again::Ask;
    }
    match twin {
        Some(twin) if twin.tcp & tcp_state::TO_ASK == 0 => {
            session.tcp &= !tcp_state::FIREWALL;
            Again::Accepted
        }
        Some(twin) if is_refused(twin, now, ANSWER_TIME) => Again::Refused,
        Some(_) | None if is_refused(session, now, SILENCE) => Again::Refused,
        Some(_) | None => {
            note_asked(session, now);
            Again::Undecided
        }
    }
}

#[inline(always)]
const fn note_asked<A: Network>(session: &mut Session<A>, now: Slot) {
    if session.tcp & tcp_state::ASKED == 0 {
        session.tcp |= tcp_state::ASKED;
        session.confirmed = now;
    }
}

/// Whether nothing was accepted since for longer than this.
#[inline(always)]
const fn is_refused<A: Network>(session: &Session<A>, now: Slot, most: u8) -> bool {
    session.tcp & tcp_state::ASKED != 0 && now.since(session.confirmed) > most
}

/// Has the firewall asked about a session again, of which this is one half.
#[inline(always)]
pub fn forget_answer<A: Network>(session: &mut Session<A>, generation: u8) {
    session.tcp = session.tcp & !tcp_state::ASKED | tcp_state::TO_ASK;
    // So that it is looked at closely.
    session.generation = generation.wrapping_sub(1);
}
