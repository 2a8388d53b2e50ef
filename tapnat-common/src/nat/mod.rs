//! Decides what becomes of a packet: the NAT itself.
//!
//! For nearly every packet [`is_steady`] and [`pass_by`] are the whole of it, after one look-up of its
//! session. The rest go to [`resume`], and those without a session to [`start`]. Nothing here touches a
//! packet's bytes, and what it needs of the world comes through [`Tables`].

mod errors;
mod filter;
pub mod firewall;
mod fragments;
pub mod guests;
pub mod mapping;
pub mod nat64;
pub mod neighbours;
mod policy;
pub mod prefixes;
pub mod session;
mod start;
pub mod sweep;
pub mod upkeep;

pub use errors::decide_error;
pub use fragments::{forget, key_of as datagram_key, settle};
pub use policy::keeps_from_host;
pub use start::{insert, map, open, start};

use core::num::NonZeroU32;

use self::firewall::Again;
use crate::{
    abi::{
        Device, EndpointKey, FlowKey, Fragment, FragmentKey, Guest, Mapping, NextHop, Permission,
        PermissionKey, Session, Settings, Unsolicited, Upkeep, role, session_flags, tcp_state,
    },
    cut,
    net::Be32,
    network::Network,
    nptv6::PrefixPair,
    parse::{Packet, Part, Transport, tcp_flags},
    ports::{PortSet, Reserved},
    rewrite::Rewrite,
    time::{Instant, Ticks},
    verdict::{Next, Plan, Reason},
};

/// How old a session's time stamp may get before a packet renews it, about
/// half a second: a stamp is not written for every packet. Timeouts are this
/// much longer, so that none is cut short.
pub const STAMP_AFTER: Ticks = Ticks::new(512);

/// What became of an insert that must not replace anything.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insert {
    Done,
    /// The key was there already.
    Exists,
    /// The table is full, or the kernel is out of memory or too busy.
    Full,
}

/// What became of a half of a new session.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalfInsert {
    Done,
    /// It was there already: another CPU has a packet of the same session, or its
    /// other half got lost.
    Exists,
    /// Another session has its place.
    Conflict,
    /// A session that is over has its place.
    Over,
    Full,
}

impl HalfInsert {
    /// Whether it was put there just now, if it is there.
    #[inline(always)]
    pub(crate) const fn is_new(self) -> Result<bool, Reason> {
        match self {
            Self::Done => Ok(true),
            Self::Exists => Ok(false),
            // Whoever made way for it would have told.
            Self::Conflict | Self::Over => Err(Reason::SessionConflict),
            Self::Full => Err(Reason::SessionTableFull),
        }
    }
}

/// Where a packet would go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fate {
    /// On by a device.
    Onward,
    /// To the host itself, or nowhere: the kernel must deal with it.
    #[default]
    Local,
    /// The kernel does not look routes up for this device.
    Disabled,
}

/// A route. All but the fate is for [`Fate::Onward`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    pub fate: Fate,
    pub next_hop: NextHop,
    /// The next hop's link addresses are known.
    pub linked: bool,
    /// Of the way out, in bytes.
    pub mtu: u16,
}

/// The tables, the kernel's knowledge, time and chance, as far as the NAT uses
/// them, for one packet.
///
/// Values are shared with other CPUs, which may write them at any time; each
/// field is read or written once where that matters.
#[expect(
    clippy::mut_from_ref,
    reason = "values lie in the kernel's maps, not in self"
)]
pub trait Tables<A: Network = Be32> {
    fn settings(&self) -> Option<&Settings<A>>;
    fn device(&self, index: u32) -> Option<&Device<A>>;

    fn session(&self, key: &FlowKey<A>) -> Option<&mut Session<A>>;
    fn insert_session(&self, key: &FlowKey<A>, session: &Session<A>) -> Insert;
    /// Whether it was there: of several who remove it, one is told so.
    fn remove_session(&self, key: &FlowKey<A>) -> bool;

    /// The mapping with this outside endpoint.
    fn mapping(&self, outside: &EndpointKey<A>) -> Option<&mut Mapping<A>>;
    fn insert_mapping(&self, outside: &EndpointKey<A>, mapping: &Mapping<A>) -> Insert;
    fn remove_mapping(&self, outside: &EndpointKey<A>) -> bool;
    /// Adds 1 to, or takes 1 from, a counter that all CPUs share.
    fn count(&self, counter: &mut u32, more: bool);
    /// The outside endpoint of an inside one.
    fn outside_of(&self, inside: &EndpointKey<A>) -> Option<EndpointKey<A>>;
    fn insert_outside_of(&self, inside: &EndpointKey<A>, outside: &EndpointKey<A>) -> Insert;
    fn remove_outside_of(&self, inside: &EndpointKey<A>);

    fn permission(&self, key: &PermissionKey<A>) -> Option<&mut Permission>;
    fn remove_permission(&self, key: &PermissionKey<A>) -> bool;
    /// Replaces what was there.
    fn set_permission(&self, key: &PermissionKey<A>, permission: &Permission) -> Insert;

    /// Keeps what is there: a SYN that comes again waits no longer for it. May
    /// forget.
    fn note_unsolicited(&self, key: &FlowKey<A>, syn: &Unsolicited);

    /// Remembers the destination that a packet came with, by the key that it has when
    /// the host forwards it. May forget.
    fn note_asked(&self, forwarded: &FlowKey<A>, destination: &EndpointKey<A>);
    /// Forgets, and returns, what [`Tables::note_asked`] remembered.
    fn take_asked(&self, forwarded: &FlowKey<A>) -> Option<EndpointKey<A>>;

    fn fragment(&self, key: &FragmentKey<A>) -> Option<&mut Fragment>;
    /// A new entry, all zeros, that replaces what was there.
    fn new_fragment(&self, key: &FragmentKey<A>) -> Option<&mut Fragment>;

    /// An identification for a datagram that leaves in fragments.
    fn next_identification(&self) -> Be32;

    /// What the guest uses, if it is known. See [`guests`].
    fn guest(&self, address: A) -> Option<&mut Guest>;
    fn insert_guest(&self, address: A, guest: &Guest) -> Insert;
    fn remove_guest(&self, address: A) -> bool;
    /// How many guests are known on an inside device, or on
    /// [`EVERY_DEVICE`](crate::abi::EVERY_DEVICE). `None` if there is no such device.
    fn guests_on(&self, device: u32) -> Option<&mut u32>;
    /// See [`guests::enter`].
    #[inline(always)]
    fn enter_guest(&self, address: A, device: u32) -> guests::Entry
    where
        Self: Sized,
    {
        guests::enter(address, device, self)
    }
    /// Whether the operator denies the destination to guests.
    fn is_denied(&self, destination: A) -> bool;
    /// Whether guests reach the destination under their own addresses.
    fn is_untranslated(&self, destination: A) -> bool;
    /// Takes 1 from the guest's sessions; never below 0.
    fn count_off_guest(&self, address: A);
    /// Adds to (or takes from) the ports that the guest holds; never below 0. `port` is a
    /// [`held_port`](crate::abi::held_port), or 0 if it is not known which one it is.
    fn count_port_on_guest(&self, address: A, port: u32, more: bool);
    /// Forgets from which link address a guest that is known sends.
    fn forget_link_of_guest(&self, address: A);

    /// How the datapath looks after what is over.
    fn upkeep(&self) -> Option<&mut Upkeep>;
    /// Puts a session, whose key is written, at the end of those that are to be looked
    /// after, in place of the first if there is no room.
    fn look_after(&self, write: impl FnOnce(&mut FlowKey<A>));
    /// Takes the first one of those. Returns whether there was one.
    fn take_looked_after(&self, key: &mut FlowKey<A>) -> bool;

    fn ports(&self, index: u32) -> Option<&mut PortSet>;
    fn reserved(&self, class: u32) -> Option<&Reserved>;

    /// The pair of prefixes at this place, of those that are translated. IPv4 has none.
    #[inline(always)]
    fn prefix_pair(&self, _place: u32) -> Option<&PrefixPair> {
        None
    }
    /// The index of the inside device whose network has this address, where prefixes
    /// are translated.
    #[inline(always)]
    fn inside_device(&self, _address: A) -> Option<u32> {
        None
    }

    /// The way of a packet that arrived on the inside `device`.
    fn route_from(&self, device: NonZeroU32, packet: &Packet<A>) -> Route;
    /// The way out of `device` to `destination`.
    fn route_on(&self, device: u32, source: A, destination: A) -> Route;
    /// Whether a socket of the host would take a packet from `remote` to
    /// `local`. With no remote (address and port 0): whether one listens.
    fn host_socket(&self, local: &EndpointKey<A>, remote: &EndpointKey<A>) -> bool;

    /// Whether the pool has this outside address.
    #[inline(always)]
    fn is_outside(&self, address: A) -> bool {
        self.settings()
            .is_some_and(|settings| settings.is_outside(address))
    }
    /// A free port as [`PortSet::find`] finds it, in the set with this index.
    #[inline(always)]
    fn find_port(&self, set: u32, wanted: u16, random: u32) -> Option<u16> {
        self.ports(set)?.find(wanted, random)
    }
    /// See [`upkeep::next_taken`].
    #[inline(always)]
    fn next_taken(&self, set: u32, place: u32) -> u32
    where
        Self: Sized,
    {
        upkeep::next_taken(set, place, self)
    }
    /// See [`mapping::take`].
    #[inline(always)]
    fn take_port(&self, outside: &EndpointKey<A>, mapping: &Mapping<A>, is_at_limit: bool) -> Insert
    where
        Self: Sized,
    {
        mapping::take(outside, mapping, is_at_limit, self)
    }
    /// See [`mapping::is_unused`].
    #[inline(always)]
    fn is_unused(&self, back: &FlowKey<A>) -> bool
    where
        Self: Sized,
    {
        mapping::is_unused(back, self)
    }
    /// The other half of the session that this half belongs to.
    #[inline(always)]
    fn twin(&self, key: &FlowKey<A>, session: &Session<A>) -> Option<&mut Session<A>> {
        self.session(&session.twin_key(key))
    }
    /// See [`session::insert_half`].
    #[inline(always)]
    fn insert_half(
        &self,
        key: &FlowKey<A>,
        session: &Session<A>,
        twin_key: Option<&FlowKey<A>>,
    ) -> HalfInsert
    where
        Self: Sized,
    {
        session::insert_half(key, session, twin_key, self)
    }
    /// See [`session::close`].
    #[inline(always)]
    fn close_session(&self, key: &FlowKey<A>, kept: Option<&FlowKey<A>>)
    where
        Self: Sized,
    {
        session::close(key, kept, self);
    }

    fn random(&self) -> u32;
    /// Whether each session's packets and bytes are counted.
    fn counts_traffic(&self) -> bool;
    /// The time at which the packet came.
    fn now(&self) -> Instant;
}

/// Whether a packet of a session changes nothing about it and simply goes on, as nearly
/// every packet does. For whole packets.
#[inline(always)]
pub fn is_steady<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    session: &Session<A>,
    tables: &T,
) -> bool {
    let Some(settings) = tables.settings() else {
        return false;
    };
    let turning = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST;
    packet.time_to_live > 1
        && is_confirmed(session, settings, tables.now())
        && session.generation == settings.generation
        && packet.wire_length <= u32::from(session.mtu)
        && (packet.transport != Transport::Tcp
            || (packet.segment.flags & turning == 0 && session.tcp == tcp_state::STEADY))
}

/// Tells a session of a packet that changes nothing about it.
#[inline(always)]
pub fn pass_by<A: Network, T: Tables<A>>(packet: &Packet<A>, session: &mut Session<A>, tables: &T) {
    stamp(session, tables.now());
    note_window(packet, session);
    count(packet, session, tables);
}

/// Whether neither the session's end nor its next hop need a look yet.
#[inline(always)]
fn is_confirmed<A: Network>(session: &Session<A>, settings: &Settings<A>, now: Instant) -> bool {
    // The first rules out that so many slots have passed that their number is no
    // longer known.
    now.since(session.last_seen) < Ticks::from_slots(settings.confirm_after)
        && now.slot().since(session.confirmed) < settings.confirm_after
}

/// Notes that a packet came by, unless one did a moment ago.
#[inline(always)]
fn stamp<A: Network>(session: &mut Session<A>, now: Instant) {
    if now.since(session.last_seen) >= STAMP_AFTER {
        session.last_seen = now;
    }
}

/// Remembers what a TCP sender expects, to tell a genuine RST from a blind one.
#[inline(always)]
fn note_window<A: Network>(packet: &Packet<A>, session: &mut Session<A>) {
    if packet.transport == Transport::Tcp && packet.segment.flags & tcp_flags::ACK != 0 {
        session.acknowledged = packet.segment.acknowledged;
        session.window = packet.segment.window;
    }
}

#[inline(always)]
pub(crate) fn count<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    session: &mut Session<A>,
    tables: &T,
) {
    if tables.counts_traffic() {
        session.packets += 1;
        session.bytes += u64::from(packet.length);
    }
}

/// Decides about a packet of a session that is there, when more than
/// translating is due. If there is no session, [`start`] decides; if it is over, after
/// it has been closed.
///
/// A later fragment is given the ports of its datagram.
#[inline(always)]
pub fn resume<A: Network, T: Tables<A>>(
    packet: &mut Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Next {
    if let Err(reason) = fragments::enter(packet, device, tables, plan) {
        return Next::Leave(reason);
    }
    let Some(settings) = tables.settings() else {
        return Next::Start;
    };
    let key = &packet.key(device);
    let Some(session) = tables.session(key) else {
        return Next::Start;
    };
    // A reply with identifier 0, and all that has none, has the key of a query with it.
    let is_other = match packet.transport {
        Transport::IcmpReply => session.source_port != packet.source_port,
        Transport::IcmpOther => true,
        _ => false,
    };
    if is_other {
        return Next::Start;
    }
    let now = tables.now();
    let stale = !is_confirmed(session, settings, now);
    // Addresses may have changed as well as routes.
    let renewed = session.generation != settings.generation;
    // Not on the stack, which is short.
    plan.other = if stale || renewed || session::is_first(session) {
        session::Other::of(key, session, tables)
    } else {
        session::Other::default()
    };
    if stale && session::is_over(key, session, plan.other, tables)
        || renewed
            && (session::is_lost(key, session, tables)
                || policy::denies_session(key, session, settings, tables))
    {
        return Next::Close;
    }
    if packet.time_to_live <= 1 {
        return Next::Leave(Reason::TimeToLiveExceeded);
    }
    match firewall::ask_again(packet, key, session, settings, tables, plan) {
        Again::Accepted | Again::Undecided => {}
        Again::Ask => {
            let mut destination = key.destination_endpoint();
            if session.flags & session_flags::TO_INSIDE != 0 {
                destination.address = session.destination;
                destination.port = session.destination_port;
            }
            return Next::Leave(firewall::ask(destination, plan));
        }
        Again::Refused => {
            return Next::Close;
        }
    }
    let changed = session::follow(packet, key, session, &mut plan.other, tables);
    let confirm = stale || changed || renewed;
    if confirm
        && let Err(reason) = renew_next_hop(packet, key, session, settings.generation, tables)
    {
        return Next::Leave(match reason {
            Reason::ForTheHost => policy::to_host(packet, reason, settings),
            reason => reason,
        });
    }
    if session::is_unanswered(key, session, plan.other) {
        // It lives no longer for this packet.
    } else if confirm {
        session.last_seen = now;
        if session.tcp & tcp_state::TO_ASK == 0 {
            session.confirmed = now.slot();
        }
        session::keep_alive(key, session, plan.other, tables);
    } else {
        stamp(session, now);
    }
    note_window(packet, session);
    count(packet, session, tables);
    if session.tcp & tcp_state::TO_ASK != 0 {
        session.generation = settings.generation.wrapping_sub(1);
    }
    Next::Leave(
        match check_size(packet, session.mtu, session.destination, plan) {
            Ok(()) => {
                plan.rewrite = Rewrite::of(session, confirm);
                Reason::Translated
            }
            Err(reason) => reason,
        },
    )
}

/// Looks the session's next hop up again and caches it.
#[inline(always)]
fn renew_next_hop<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    key: &FlowKey<A>,
    session: &mut Session<A>,
    generation: u8,
    tables: &T,
) -> Result<(), Reason> {
    let route = if session.flags & session_flags::TO_INSIDE != 0 {
        tables.route_on(session.next_hop.device, session.source, session.destination)
    } else {
        match key.arrival.device() {
            Some(device) => tables.route_from(device, packet),
            None => Route::default(),
        }
    };
    // An outside address is of use on its uplink only.
    let is_wrong_way = session.flags & session_flags::TO_INSIDE == 0
        && tables
            .device(route.next_hop.device)
            .is_none_or(|way| way.role != role::UPLINK);
    match route.fate {
        Fate::Onward if is_wrong_way => Err(Reason::ForTheHost),
        Fate::Onward => {
            session.next_hop = route.next_hop;
            session.mtu = route.mtu;
            session.generation = generation;
            if route.linked {
                session.flags |= session_flags::NEXT_HOP_KNOWN;
            } else {
                session.flags &= !session_flags::NEXT_HOP_KNOWN;
            }
            Ok(())
        }
        // What is known of the way keeps the session going, if it is known.
        Fate::Disabled if session.mtu != 0 => Ok(()),
        Fate::Disabled => Err(Reason::ForwardingDisabled),
        // The host would say of its own address that nobody is there.
        Fate::Local if session.flags & session_flags::TO_INSIDE != 0 => {
            Err(Reason::GuestUnreachable)
        }
        // What became of the route is the kernel's to say, to the sender.
        Fate::Local => Err(Reason::NoRoute),
    }
}

/// Whether the packet fits the way out to this destination (RFC 4787 REQ-13, RFC 1191).
#[inline(always)]
fn check_size<A: Network>(
    packet: &Packet<A>,
    mtu: u16,
    destination: A,
    plan: &mut Plan<A>,
) -> Result<(), Reason> {
    plan.mtu = mtu;
    // A fragment becomes longer still on the way to IPv6.
    let of_fragments = if destination.is_stand_in() {
        mtu.saturating_sub(nat64::FRAGMENT_GROWTH)
    } else {
        mtu
    };
    let most = if packet.part == Part::Whole {
        mtu
    } else {
        of_fragments
    };
    if packet.wire_length <= u32::from(most) {
        return Ok(());
    }
    if packet.dont_fragment {
        return Err(Reason::FragmentationNeeded);
    }
    if cut::is_possible(packet, of_fragments) {
        plan.mtu = of_fragments;
        return Err(Reason::Fragmented);
    }
    if let Some(excess) = cut::excess(packet, mtu) {
        plan.excess = excess;
        return Ok(());
    }
    Err(Reason::TooBigToFragment)
}

/// Where our ICMP error to the packet's sender comes from: our address on the
/// side that it arrived on. To the world that is the one that the packet was for, unless
/// that is a guest's by its prefix.
#[inline(always)]
pub fn refusal_source<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
) -> Option<A> {
    if let Some(device) = device {
        return tables.device(device.get()).map(|device| device.address);
    }
    let settings = tables.settings()?;
    let [first, ..] = settings.outside;
    let is_ours = settings.outside_count == 0 || settings.is_outside(packet.destination);
    Some(if is_ours { packet.destination } else { first })
}
