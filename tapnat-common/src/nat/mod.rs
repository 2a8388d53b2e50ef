//! Decides what becomes of a packet: the NAT itself.
//!
//! [`decide`] is the whole of it for an established session, one lookup; what
//! is rarer lies in the submodules. Nothing here touches a packet's bytes, and
//! what it needs of the world comes through [`Tables`].

mod errors;
mod filter;
mod fragments;
mod mapping;
pub mod session;
mod start;

pub use errors::decide_error;

use crate::{
    abi::{
        Device, EndpointKey, FlowKey, Fragment, FragmentKey, Guest, Mapping, NextHop, Permission,
        PermissionKey, Session, Settings, session_flags, tcp_state,
    },
    net::{Be32, icmp},
    parse::{Packet, Part, Transport, tcp_flags},
    ports::{PortSet, Reserved},
    rewrite::Rewrite,
    time::{Instant, Ticks},
    verdict::{Reason, Refusal, Verdict},
};

/// How old a session's time stamp may get before a packet renews it, about
/// half a second: a stamp is not written for every packet. Timeouts are this
/// much longer, so that none is cut short. The next hop is confirmed as often.
pub const REFRESH_AFTER: Ticks = Ticks::new(512);

/// What became of an insert that must not replace anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insert {
    Done,
    /// The key was there already.
    Exists,
    /// The table is full, or the kernel is out of memory or too busy.
    Full,
}

/// Where a packet would go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// On by a device. `linked`: the next hop's link addresses are known.
    Via { next_hop: NextHop, linked: bool, mtu: u16 },
    /// To the host itself, or nowhere: the kernel must deal with it.
    Local,
    /// The kernel does not look routes up for this device.
    Disabled,
}

/// The tables and the kernel's knowledge, as far as the NAT uses them.
///
/// Values are shared with other CPUs, which may write them at any time; each
/// field is read or written once where that matters.
#[expect(clippy::mut_from_ref, reason = "values lie in the kernel's maps, not in self")]
pub trait Tables {
    fn settings(&self) -> Option<&Settings>;
    fn device(&self, index: u32) -> Option<&Device>;

    fn session(&self, key: &FlowKey) -> Option<&mut Session>;
    fn insert_session(&self, key: &FlowKey, session: &Session) -> Insert;
    /// Whether it was there: of several who remove it, one is told so.
    fn remove_session(&self, key: &FlowKey) -> bool;

    /// The mapping with this outside endpoint.
    fn mapping(&self, outside: &EndpointKey) -> Option<&mut Mapping>;
    fn insert_mapping(&self, outside: &EndpointKey, mapping: &Mapping) -> Insert;
    fn remove_mapping(&self, outside: &EndpointKey) -> bool;
    /// Adds to (or takes from) the sessions that stand on a mapping.
    fn count_on_mapping(&self, outside: &EndpointKey, more: bool);
    /// The outside endpoint of an inside one.
    fn outside_of(&self, inside: &EndpointKey) -> Option<EndpointKey>;
    /// Replaces what was there.
    fn set_outside_of(&self, inside: &EndpointKey, outside: &EndpointKey) -> Insert;

    fn permission(&self, key: &PermissionKey) -> Option<&mut Permission>;
    /// Replaces what was there.
    fn set_permission(&self, key: &PermissionKey, permission: &Permission) -> Insert;

    fn fragment(&self, key: &FragmentKey) -> Option<&Fragment>;
    /// Replaces what was there.
    fn set_fragment(&self, key: &FragmentKey, fragment: &Fragment);

    /// What the guest uses; made on first use. `None` when the table is full.
    fn guest(&self, address: Be32) -> Option<&mut Guest>;
    /// Adds to (or takes from) the guest's sessions.
    fn count_on_guest(&self, address: Be32, more: bool);

    fn ports(&self, index: u32) -> Option<&mut PortSet>;
    fn reserved(&self, class: u32) -> Option<&Reserved>;

    /// The way of a packet that arrived on the inside `device`.
    fn route_from(&self, device: u32, packet: &Packet) -> Route;
    /// The way out of `device` to `destination`.
    fn route_on(&self, device: u32, source: Be32, destination: Be32) -> Route;
    /// Whether a socket of the host would take a packet from `remote` to
    /// `local`. With no remote (address and port 0): whether one listens.
    fn host_socket(&self, local: &EndpointKey, remote: &EndpointKey) -> bool;

    fn random(&self) -> u32;
}

/// Decides about a packet that is no ICMP error; those go to [`decide_error`].
///
/// `device`: the inside device's index it arrived on, or `None` for the uplink.
#[inline(always)]
pub fn decide<T: Tables>(
    packet: &mut Packet,
    device: Option<u32>,
    now: Instant,
    tables: &T,
) -> Verdict {
    let Some(settings) = tables.settings() else {
        return Verdict::Pass(Reason::NoMapping);
    };
    if packet.part == Part::Later
        && let Err(verdict) = fragments::recall(packet, device, now, tables)
    {
        return verdict;
    }
    let key = packet.key(device);
    let Some(session) = tables.session(&key) else {
        return start::start(packet, &key, now, tables);
    };
    if packet.part == Part::First {
        fragments::remember(packet, &key, now, tables);
    }
    if !is_steady(packet, session, settings.generation, now) {
        return resume(packet, &key, now, tables);
    }
    note_window(packet, session);
    let resolve = session.flags & session_flags::NEXT_HOP_KNOWN == 0;
    Verdict::Forward(Reason::Translated, Rewrite::of(session, resolve))
}

/// Whether the packet changes nothing about its session and simply goes.
#[inline(always)]
fn is_steady(packet: &Packet, session: &Session, generation: u16, now: Instant) -> bool {
    let turning = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST;
    packet.time_to_live > 1
        && now.since(session.last_seen) < REFRESH_AFTER
        && session.generation == generation
        && packet.wire_length <= u32::from(session.mtu)
        && (packet.transport != Transport::Tcp
            || packet.part == Part::Later
            || (packet.segment.flags & turning == 0 && session.tcp == tcp_state::STEADY))
}

/// Remembers what a TCP sender expects, to tell a genuine RST from a blind one.
#[inline(always)]
fn note_window(packet: &Packet, session: &mut Session) {
    if packet.transport == Transport::Tcp && packet.segment.flags & tcp_flags::ACK != 0 {
        session.acknowledged = packet.segment.acknowledged;
        session.window = packet.segment.window;
    }
}

/// A packet of a session that is there, when more than translating is due.
#[inline(never)]
fn resume<T: Tables>(packet: &Packet, key: &FlowKey, now: Instant, tables: &T) -> Verdict {
    let (Some(session), Some(settings)) = (tables.session(key), tables.settings()) else {
        return Verdict::Drop(Reason::SessionConflict);
    };
    let twin_key = session.twin_key(key);
    let stale = now.since(session.last_seen) >= REFRESH_AFTER;
    if stale && session::is_expired(key, session, now, tables) {
        session::close(key, session, tables);
        return start::start(packet, key, now, tables);
    }
    if packet.time_to_live <= 1 {
        return refuse_time_to_live(key, tables);
    }
    let changed = session::follow(packet, session, &twin_key, now, tables);
    let mut resolve = session.flags & session_flags::NEXT_HOP_KNOWN == 0;
    if stale || changed || session.generation != settings.generation {
        session.last_seen = now;
        resolve = true;
        if let Err(verdict) = renew_next_hop(packet, key, session, settings.generation, tables) {
            return verdict;
        }
        session::keep_alive(key, session, now, tables);
    }
    note_window(packet, session);
    match check_size(packet, session.mtu, key, tables) {
        Ok(()) => Verdict::Forward(Reason::Translated, Rewrite::of(session, resolve)),
        Err(verdict) => verdict,
    }
}

/// Looks the session's next hop up again and caches it.
#[inline(always)]
fn renew_next_hop<T: Tables>(
    packet: &Packet,
    key: &FlowKey,
    session: &mut Session,
    generation: u16,
    tables: &T,
) -> Result<(), Verdict> {
    let route = if session.flags & session_flags::TO_INSIDE != 0 {
        tables.route_on(session.next_hop.device, session.source, session.destination)
    } else {
        match key.arrival.device() {
            Some(device) => tables.route_from(device, packet),
            None => Route::Local,
        }
    };
    match route {
        Route::Via { next_hop, linked, mtu } => {
            cache_next_hop(session, &next_hop, linked, mtu);
            session.generation = generation;
            Ok(())
        }
        // What is known of the way keeps the session going, if it is known.
        Route::Disabled if session.mtu != 0 => Ok(()),
        Route::Disabled => Err(Verdict::Drop(Reason::ForwardingDisabled)),
        // What became of the route is the kernel's to say, to the sender.
        Route::Local => Err(Verdict::Pass(Reason::NoRoute)),
    }
}

#[inline(always)]
fn cache_next_hop(session: &mut Session, next_hop: &NextHop, linked: bool, mtu: u16) {
    session.next_hop = *next_hop;
    session.mtu = mtu;
    if linked {
        session.flags |= session_flags::NEXT_HOP_KNOWN;
    } else {
        session.flags &= !session_flags::NEXT_HOP_KNOWN;
    }
}

/// Whether the packet fits the way out; else what to tell its sender
/// (RFC 4787 REQ-13, RFC 1191).
#[inline(always)]
fn check_size<T: Tables>(
    packet: &Packet,
    mtu: u16,
    key: &FlowKey,
    tables: &T,
) -> Result<(), Verdict> {
    if packet.wire_length <= u32::from(mtu) {
        return Ok(());
    }
    if !packet.dont_fragment {
        return Err(Verdict::Drop(Reason::TooBigToFragment));
    }
    Err(refuse(
        Reason::FragmentationNeeded,
        key,
        (icmp::DESTINATION_UNREACHABLE, icmp::FRAGMENTATION_NEEDED, mtu),
        tables,
    ))
}

/// Drops the packet and tells its sender, from our address on its side.
///
/// `error` is the ICMP type and code, and the MTU for "fragmentation needed".
#[inline(always)]
fn refuse<T: Tables>(
    reason: Reason,
    key: &FlowKey,
    (icmp_type, code, mtu): (u8, u8, u16),
    tables: &T,
) -> Verdict {
    let from = match key.arrival.device() {
        Some(device) => tables.device(device).map(|device| device.address),
        // The destination is the outside address that was asked for.
        None => Some(key.destination),
    };
    match from {
        Some(from) => Verdict::Refuse(reason, Refusal { icmp_type, code, mtu, from }),
        None => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn refuse_time_to_live<T: Tables>(key: &FlowKey, tables: &T) -> Verdict {
    refuse(Reason::TimeToLiveExceeded, key, (icmp::TIME_EXCEEDED, 0, 0), tables)
}

/// No resources for a new session: RFC 5508 REQ-8.
#[inline(always)]
fn refuse_resources<T: Tables>(reason: Reason, key: &FlowKey, tables: &T) -> Verdict {
    refuse(
        reason,
        key,
        (icmp::DESTINATION_UNREACHABLE, icmp::ADMINISTRATIVELY_PROHIBITED, 0),
        tables,
    )
}
