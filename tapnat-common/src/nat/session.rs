//! A session's life: its two halves, TCP's states, timeouts, its end.
//!
//! The pure functions ([`state`], [`timeout`], [`last_kept`]) are what user space
//! shows and sweeps by, too.

use super::{
    HalfInsert, Insert, STAMP_AFTER, Tables, filter, guests, mapping, nat64::TO_STAND_IN, policy,
    upkeep,
};
use crate::{
    abi::{
        EndpointKey, FlowKey, Guest, Session, Settings, Timeouts, mapping_flags, session_flags,
        setting_flags, tcp_state,
    },
    checksum::Delta,
    net::protocol,
    network::Network,
    parse::{Packet, Part, Transport, tcp_flags},
    time::{Instant, Ticks},
    verdict::{Plan, Reason},
};

/// The state of a session, for timeouts and for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// TCP before both sides have acknowledged each other.
    Opening,
    /// TCP open both ways.
    Established,
    /// TCP after a FIN.
    Closing,
    /// TCP after a RST, with nothing since to show that it was not meant.
    Reset,
    /// Not TCP: packets went one way only.
    OneWay,
    /// Not TCP: packets went both ways.
    TwoWay,
}

impl State {
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Reset => "reset",
            Self::OneWay => "one-way",
            Self::TwoWay => "two-way",
        }
    }
}

/// The part of a half that its session's state depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Half {
    pub last_seen: Instant,
    pub tcp: u8,
    pub flags: u8,
}

impl<A: Network> From<&Session<A>> for Half {
    #[inline(always)]
    fn from(session: &Session<A>) -> Self {
        Self {
            last_seen: session.last_seen,
            tcp: session.tcp,
            flags: session.flags,
        }
    }
}

/// Set in a half's `tcp`, for other protocols too, by its first packet.
const SEEN: u8 = tcp_state::SYN;

/// RFC 7323 section 2.3.
const MAX_WINDOW_SCALE: u8 = 14;

/// How long the other side may go on after a RST before the RST counts as not
/// meant (RFC 7857 section 2): what was in flight arrives within two seconds.
const RESET_GRACE: Ticks = Ticks::new(2048);

/// The state of the session that these halves make.
#[inline(always)]
#[must_use]
pub const fn state(number: u8, one: Half, other: Half) -> State {
    if number != protocol::TCP {
        return if one.tcp & other.tcp & SEEN != 0 {
            State::TwoWay
        } else {
            State::OneWay
        };
    }
    if is_reset(one, other) || is_reset(other, one) {
        State::Reset
    } else if (one.tcp | other.tcp) & tcp_state::FIN != 0 {
        State::Closing
    } else if one.tcp & other.tcp & tcp_state::OPEN != 0 {
        State::Established
    } else {
        State::Opening
    }
}

#[inline(always)]
const fn is_reset(one: Half, other: Half) -> bool {
    one.tcp & tcp_state::RST != 0 && other.last_seen.since(one.last_seen).get() <= RESET_GRACE.get()
}

/// How long a session in this state lives without traffic.
#[inline(always)]
#[must_use]
pub const fn timeout(number: u8, state: State, timeouts: &Timeouts) -> Ticks {
    let usual = match (state, number) {
        (State::Established, _) => timeouts.tcp_established,
        (State::Opening, _) => timeouts.tcp_opening,
        (State::Closing | State::Reset, _) => timeouts.tcp_closing,
        (State::OneWay | State::TwoWay, protocol::UDP | protocol::UDP_LITE) => timeouts.udp,
        (State::OneWay | State::TwoWay, protocol::ICMP | protocol::ICMPV6) => timeouts.icmp,
        (State::OneWay | State::TwoWay, 0..=u8::MAX) => timeouts.other,
    };
    let most = timeouts.unanswered;
    if matches!(state, State::Opening | State::OneWay)
        && most.get() != 0
        && most.get() < usual.get()
    {
        most
    } else {
        usual
    }
}

/// When the session was last kept alive. Without `inbound_refresh` packets
/// from outside do not count for protocols other than TCP (RFC 4787 REQ-6).
#[inline(always)]
#[must_use]
pub const fn last_kept(number: u8, one: Half, other: Half, inbound_refresh: bool) -> Instant {
    if number == protocol::TCP || inbound_refresh {
        return one.last_seen.later_of(other.last_seen);
    }
    // A half came from outside when the other one leaves to the outside.
    if other.flags & session_flags::TO_INSIDE == 0 {
        other.last_seen
    } else if one.flags & session_flags::TO_INSIDE == 0 {
        one.last_seen
    } else {
        one.last_seen.later_of(other.last_seen)
    }
}

/// Whether the session leads to an inside device that is gone, or its outside
/// endpoint is another guest's by now, as happens when timeouts are raised and the
/// mapping was to end by the old ones; or its outside address is no longer one of
/// ours: answers to it would not come back. While there is no outside address at
/// all, the old one may return.
#[inline(always)]
pub(super) fn is_lost<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    session: &Session<A>,
    tables: &T,
) -> bool {
    let Some(settings) = tables.settings() else {
        return false;
    };
    let is_inward = session.flags & session_flags::TO_INSIDE != 0;
    if is_inward && tables.device(session.next_hop.device).is_none() {
        return true;
    }
    let number = key.arrival.protocol();
    let (outside, inside) = match key.arrival.device() {
        Some(_) => (
            EndpointKey::new(session.source, session.source_port, number),
            key.source_endpoint(),
        ),
        None => (
            key.destination_endpoint(),
            EndpointKey::new(session.destination, session.destination_port, number),
        ),
    };
    // What came in by a forward goes on when that leads elsewhere.
    let is_taken = tables.mapping(&outside).is_some_and(|mapping| {
        mapping.flags & mapping_flags::STATIC == 0 && mapping.inside != inside
    });
    if is_taken && session.flags & session_flags::UNMAPPED == 0 {
        return true;
    }
    let (own, remote) = match key.arrival.device() {
        Some(_) => (key.source, session.destination),
        None => (session.destination, key.source),
    };
    if own == outside.address {
        // A guest's own, as long as it may be.
        return !policy::exempts(remote, settings, tables);
    }
    if settings.outside_count == 0 || tables.is_outside(outside.address) {
        return false;
    }
    settings.flags & setting_flags::STATIC_ADDRESSES == 0
        || (tables.mapping(&outside).is_none()
            && tables
                .mapping(&EndpointKey::whole(outside.address))
                .is_none())
}

/// Whether the session that this half belongs to has outlived its timeout, its
/// outside address or its inside device.
#[inline(always)]
pub fn is_expired<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    session: &Session<A>,
    tables: &T,
) -> bool {
    let one = Half::from(session);
    let other = Other::of(key, session, tables).or(one);
    are_expired(key, one, other, tables) || is_lost(key, session, tables)
}

/// What is known of the other half of a session.
///
/// Not an `Option`: in place of what is not there that has whatever a register holds,
/// which the kernel does not let into a table when it is a pointer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Other {
    pub is_there: bool,
    pub half: Half,
}

impl Other {
    #[inline(always)]
    pub(super) fn of<A: Network, T: Tables<A>>(
        key: &FlowKey<A>,
        session: &Session<A>,
        tables: &T,
    ) -> Self {
        tables
            .twin(key, session)
            .map_or(Self::default(), |twin| Self::from(&*twin))
    }

    /// Itself, or in its place the one that is there: a half whose twin is gone lives and
    /// dies by itself.
    #[inline(always)]
    const fn or(self, one: Half) -> Half {
        if self.is_there { self.half } else { one }
    }
}

impl<A: Network> From<&Session<A>> for Other {
    #[inline(always)]
    fn from(session: &Session<A>) -> Self {
        Self {
            is_there: true,
            half: Half::from(session),
        }
    }
}

/// Whether the session that this half belongs to is over: expired, or without
/// its other half, which two CPUs that began it anew at once may have cost it.
#[inline(always)]
pub(super) fn is_over<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    session: &Session<A>,
    other: Other,
    tables: &T,
) -> bool {
    !other.is_there
        || are_expired(key, Half::from(session), other.half, tables)
        || is_lost(key, session, tables)
}

/// Whether no packet has come this way yet.
#[inline(always)]
pub(super) const fn is_first<A: Network>(session: &Session<A>) -> bool {
    session.tcp & SEEN == 0
}

#[inline(always)]
fn are_expired<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    one: Half,
    other: Half,
    tables: &T,
) -> bool {
    let Some(settings) = tables.settings() else {
        return false;
    };
    let number = key.arrival.protocol();
    let refresh = settings.flags & setting_flags::INBOUND_REFRESH != 0;
    let kept = last_kept(number, one, other, refresh);
    tables.now().since(kept) >= lifetime(number, one, other, settings)
}

/// Notes what a packet says about its session, beyond being there. Returns
/// whether it said anything. `other` becomes what the other half is then.
#[inline(always)]
pub(super) fn follow<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    key: &FlowKey<A>,
    session: &mut Session<A>,
    other: &mut Other,
    tables: &T,
) -> bool {
    let before = session.tcp;
    if packet.transport != Transport::Tcp || packet.part == Part::Later {
        session.tcp |= SEEN;
        return session.tcp != before;
    }
    let Some(twin) = tables.twin(key, session) else {
        return false;
    };
    let changed = follow_segment(packet, session, twin, tables);
    *other = Other::from(&*twin);
    changed
}

/// As [`follow`], of TCP.
#[inline(always)]
fn follow_segment<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    session: &mut Session<A>,
    twin: &mut Session<A>,
    tables: &T,
) -> bool {
    let before = session.tcp;
    let flags = packet.segment.flags;
    if flags & tcp_flags::RST != 0 {
        if is_in_window(packet, session, twin) {
            session.tcp |= tcp_state::RST;
        }
        // A repeated RST moves the time on, too.
        return session.tcp & tcp_state::RST != 0;
    }
    if flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN {
        let now_state = state(protocol::TCP, Half::from(&*session), Half::from(&*twin));
        match now_state {
            State::Closing | State::Reset => {
                // A new connection on the old ports (RFC 1122 section 4.2.2.13).
                session.tcp = session.tcp & tcp_state::FIREWALL | tcp_state::SYN;
                note_window_scale(session, packet.segment.window_scale);
                twin.tcp &= tcp_state::FIREWALL;
                if twin.flags & session_flags::TO_INSIDE != 0 {
                    twin.last_seen = tables.now();
                }
                return true;
            }
            State::Opening | State::Established | State::OneWay | State::TwoWay => {}
        }
    }
    session.tcp &= !tcp_state::RST;
    if flags & tcp_flags::SYN != 0 {
        session.tcp |= tcp_state::SYN;
        note_window_scale(session, packet.segment.window_scale);
    }
    if flags & tcp_flags::FIN != 0 {
        session.tcp |= tcp_state::FIN;
    }
    if flags & tcp_flags::ACK != 0 && twin.tcp & tcp_state::SYN != 0 {
        session.tcp |= tcp_state::OPEN;
        if twin.tcp & tcp_state::OPEN != 0 {
            // The twin was picked up in mid-stream; so is this half.
            session.tcp |= tcp_state::SYN;
        }
    }
    session.tcp != before
}

/// Remembers the scale of this half's windows (RFC 7323 section 2).
#[inline(always)]
const fn note_window_scale<A: Network>(session: &mut Session<A>, scale: u8) {
    let others = session.flags & ((1 << session_flags::WINDOW_SCALE_SHIFT) - 1);
    session.flags = others | scale << session_flags::WINDOW_SCALE_SHIFT;
}

/// Whether a RST lies where its receiver looks for data: a blind one from off
/// the path hardly does (RFC 5961 section 3).
#[inline(always)]
fn is_in_window<A: Network>(packet: &Packet<A>, session: &Session<A>, twin: &Session<A>) -> bool {
    let established =
        session.tcp & twin.tcp & tcp_state::OPEN != 0 && twin.tcp & tcp_state::SYN != 0;
    if !established {
        return true;
    }
    let scale = twin.flags >> session_flags::WINDOW_SCALE_SHIFT;
    let window = u32::from(twin.window.get()) << (scale & 15);
    let ahead = packet
        .segment
        .sequence
        .get()
        .wrapping_sub(twin.acknowledged.get());
    ahead <= window
}

/// How long a session lives after it was last kept alive.
#[inline(always)]
pub(super) const fn lifetime<A: Network>(
    number: u8,
    one: Half,
    other: Half,
    settings: &Settings<A>,
) -> Ticks {
    timeout(number, state(number, one, other), &settings.timeouts).plus(STAMP_AFTER)
}

/// Whether somebody outside began this TCP session, and the guest has not answered
/// but by a reset. Then no packet of it keeps it or its mapping alive (RFC 7857
/// section 7.1). `other`: the other half.
#[inline(always)]
pub(super) fn is_unanswered<A: Network>(
    key: &FlowKey<A>,
    session: &Session<A>,
    other: Other,
) -> bool {
    let number = key.arrival.protocol();
    if number != protocol::TCP {
        return false;
    }
    let is_begun_outside = if key.arrival.device().is_none() {
        session.flags & session_flags::INITIATOR != 0
    } else {
        session.flags & session_flags::INITIATOR == 0
            && session.twin_arrival(number).device().is_none()
    };
    if !is_begun_outside {
        return false;
    }
    let guests = if key.arrival.device().is_none() {
        other.half.tcp
    } else {
        session.tcp
    };
    guests & tcp_state::SYN == 0
}

/// Lets the mapping and the permission that the session stands on live on. `other`:
/// the other half.
#[inline(always)]
pub(super) fn keep_alive<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    session: &Session<A>,
    other: Other,
    tables: &T,
) {
    let Some(settings) = tables.settings() else {
        return;
    };
    let number = key.arrival.protocol();
    let from_outside = key.arrival.device().is_none();
    let one = Half::from(session);
    let until = tables
        .now()
        .after(lifetime(number, one, other.or(one), settings))
        .after(Ticks::from_slots(settings.confirm_after));
    if !from_outside && session.flags & session_flags::TO_INSIDE != 0 {
        // A hairpin stands on the other guest's mapping, too.
        if let Some(mapping) = tables.mapping(&key.destination_endpoint()) {
            mapping::keep(mapping, until);
        }
    }
    let refresh = settings.flags & setting_flags::INBOUND_REFRESH != 0;
    if session.flags & session_flags::UNMAPPED != 0
        || (from_outside && !refresh && number != protocol::TCP)
    {
        return;
    }
    let (outside, remote) = if from_outside {
        (key.destination_endpoint(), key.source)
    } else {
        (
            EndpointKey::new(session.source, session.source_port, number),
            key.destination,
        )
    };
    if session.tcp & tcp_state::RST != 0 {
        // What a reset refreshed would outlive its use (RFC 7857 section 7).
        mapping::end_by(&outside, until, tables);
        return;
    }
    let mut mapping = tables.mapping(&outside);
    if let Some(mapping) = &mut mapping {
        mapping::keep(mapping, until);
    }
    filter::permit(&outside, mapping, remote, until, tables);
}

/// Makes the two halves of a new session in the plan, this one's, then its twin's, and
/// the twin's key, given this one's.
#[inline(always)]
pub(super) fn set_halves<A: Network>(plan: &mut Plan<A>, packet: &Packet<A>, now: Instant) {
    let opening = &plan.opening;
    let [key, back_key] = &mut plan.keys;
    let [forward, back] = &mut plan.halves;
    let EndpointKey {
        address: source,
        port: source_port,
        ..
    } = opening.source;
    let EndpointKey {
        address: destination,
        port: destination_port,
        ..
    } = opening.destination;
    let addresses =
        Delta::of_address(key.source, source).and(Delta::of_address(key.destination, destination));
    let ports = Delta::of_word(key.source_port, source_port)
        .and(Delta::of_word(key.destination_port, destination_port));
    let back_addresses =
        Delta::of_address(source, key.source).and(Delta::of_address(destination, key.destination));
    let back_ports = Delta::of_word(source_port, key.source_port)
        .and(Delta::of_word(destination_port, key.destination_port));
    *forward = Session {
        source,
        destination,
        source_port,
        destination_port,
        address_delta: addresses.stored(),
        port_delta: ports.stored(),
        next_hop: opening.route.next_hop,
        last_seen: now,
        mtu: opening.route.mtu,
        generation: opening.generation,
        confirmed: opening.confirmed,
        tcp: first_state(packet),
        flags: opening.flags | session_flags::INITIATOR,
        ..Session::default()
    };
    // The largest that there is, where no SYN has told it.
    let scale = if packet.segment.flags & tcp_flags::SYN != 0 {
        packet.segment.window_scale
    } else {
        MAX_WINDOW_SCALE
    };
    note_window_scale(forward, scale);
    if opening.route.linked {
        forward.flags |= session_flags::NEXT_HOP_KNOWN;
    }
    *back = Session {
        source: key.destination,
        destination: key.source,
        source_port: key.destination_port,
        destination_port: key.source_port,
        address_delta: back_addresses.stored(),
        port_delta: back_ports.stored(),
        last_seen: now,
        // Another generation: the first packet back looks its next hop up.
        generation: opening.generation.wrapping_sub(1),
        flags: opening.flags & session_flags::UNMAPPED,
        ..Session::default()
    };
    note_window_scale(back, MAX_WINDOW_SCALE);
    if let Some(device) = key.arrival.device() {
        back.flags |= session_flags::TO_INSIDE;
        back.next_hop.device = device.get();
    }
    if key.source.is_stand_in() {
        // An error about the first packet goes this way, too.
        back.next_hop.link = TO_STAND_IN;
    }
    *back_key = forward.twin_key(key);
}

#[inline(always)]
const fn first_state<A: Network>(packet: &Packet<A>) -> u8 {
    if !matches!(packet.transport, Transport::Tcp) {
        SEEN
    } else if packet.segment.flags & tcp_flags::SYN != 0 {
        tcp_state::SYN
    } else {
        // Picked up in mid-stream: it was opened before we came.
        tcp_state::STEADY
    }
}

/// Puts both halves into the table, by their keys, and counts them, the one that decides
/// a race for the translated tuple first; leaves nothing behind on failure.
#[inline(always)]
pub(super) fn insert<A: Network, T: Tables<A>>(
    [key, back_key]: &[FlowKey<A>; 2],
    [forward, back]: &[Session<A>; 2],
    tables: &T,
) -> Result<(), Reason> {
    owner_of(key, tables)?;
    if back_key == key {
        // A guest's socket that talks to itself over its own mapping.
        if make_way(key, forward, None, tables).is_new()? {
            count_in(key, forward, tables);
        }
        return Ok(());
    }
    owner_of(back_key, tables)?;
    let inserted = make_way(back_key, back, None, tables).is_new()?;
    if inserted {
        count_in(back_key, back, tables);
    }
    match make_way(key, forward, Some(back_key), tables).is_new() {
        Ok(true) => {
            count_in(key, forward, tables);
            Ok(())
        }
        Ok(false) => Ok(()),
        Err(reason) => {
            if inserted && tables.remove_session(back_key) {
                count_out(back_key, outside_of(back_key, back), tables);
            }
            Err(reason)
        }
    }
}

/// The guest that the half is counted on, if it is: only the half that arrives on an
/// inside device counts, once for each guest of the session.
#[inline(always)]
fn owner_of<'a, A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    tables: &'a T,
) -> Result<Option<&'a mut Guest>, Reason> {
    match key.arrival.device() {
        Some(device) => guests::of(key.source, device.get(), tables).map(Some),
        None => Ok(None),
    }
}

/// Inserts one half, in place of a session that is over. `twin_key`: where the other
/// half is already.
#[inline(always)]
fn make_way<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    session: &Session<A>,
    twin_key: Option<&FlowKey<A>>,
    tables: &T,
) -> HalfInsert {
    let inserted = tables.insert_half(key, session, twin_key);
    if inserted != HalfInsert::Over {
        return inserted;
    }
    tables.close_session(key, twin_key);
    tables.insert_half(key, session, twin_key)
}

/// Inserts one half. `twin_key`: where the other half is already.
#[inline(always)]
pub fn insert_half<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    session: &Session<A>,
    twin_key: Option<&FlowKey<A>>,
    tables: &T,
) -> HalfInsert {
    match tables.insert_session(key, session) {
        Insert::Done => return HalfInsert::Done,
        Insert::Full => return HalfInsert::Full,
        Insert::Exists => {}
    }
    let Some(old) = tables.session(key) else {
        // Removed just now.
        return HalfInsert::Over;
    };
    // What is in its twin's place may be ours by now.
    let is_alone = twin_key.is_some_and(|twin_key| old.twin_key(key) == *twin_key);
    let expired = if is_alone {
        let half = Half::from(&*old);
        are_expired(key, half, half, tables)
    } else {
        is_expired(key, old, tables)
    };
    if expired {
        HalfInsert::Over
    } else if old.translates_as(session) {
        HalfInsert::Exists
    } else {
        HalfInsert::Conflict
    }
}

/// Ends the session that this half belongs to: removes both halves, but not what is in
/// the place of `kept`.
#[inline(always)]
pub fn close<A: Network, T: Tables<A>>(key: &FlowKey<A>, kept: Option<&FlowKey<A>>, tables: &T) {
    let Some(session) = tables.session(key) else {
        return;
    };
    let twin_key = session.twin_key(key);
    let twin = tables.session(&twin_key);
    remove(key, session, tables);
    if let Some(twin) = twin
        && kept != Some(&twin_key)
    {
        remove(&twin_key, twin, tables);
    }
}

#[inline(always)]
fn remove<A: Network, T: Tables<A>>(key: &FlowKey<A>, session: &Session<A>, tables: &T) {
    // What is removed may be written anew at once.
    let outside = outside_of(key, session);
    if tables.remove_session(key) {
        count_out(key, outside, tables);
    }
}

/// The outside endpoint of the mapping that the half counts on, if it counts on one.
#[inline(always)]
fn outside_of<A: Network>(key: &FlowKey<A>, session: &Session<A>) -> (bool, EndpointKey<A>) {
    // Not an option: Linux 6.1 lets nobody read what an option without a value holds, which
    // the compiler is free to.
    (
        session.flags & session_flags::UNMAPPED == 0,
        EndpointKey::new(session.source, session.source_port, key.arrival.protocol()),
    )
}

/// Counts a new half on its guest and its mapping.
#[inline(always)]
fn count_in<A: Network, T: Tables<A>>(key: &FlowKey<A>, session: &Session<A>, tables: &T) {
    // Looked up again: another CPU may have forgotten it, and its place be another guest's.
    let Ok(Some(guest)) = owner_of(key, tables) else {
        return;
    };
    tables.count(&mut guest.sessions, true);
    let (is_mapped, outside) = outside_of(key, session);
    let mut mapping = None;
    if is_mapped
        && let Some(own) = tables.mapping(&outside)
        && own.inside == key.source_endpoint()
    {
        tables.count(&mut own.sessions, true);
        mapping = Some(own);
    }
    upkeep::note(key, mapping, tables);
}

/// Counts a half that is gone on its guest and the mapping of this outside endpoint no
/// more.
#[inline(always)]
fn count_out<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    (is_mapped, outside): (bool, EndpointKey<A>),
    tables: &T,
) {
    if key.arrival.device().is_none() {
        return;
    }
    tables.count_off_guest(key.source);
    // One that has changed hands since counts its new owner's only. And a
    // forward that the operator took away and made anew does not know of
    // the sessions before.
    if is_mapped
        && let Some(mapping) = tables.mapping(&outside)
        && mapping.inside == key.source_endpoint()
        && mapping.sessions != 0
    {
        tables.count(&mut mapping.sessions, false);
        mapping::end_if_unused(mapping, tables);
    }
}
