//! The first packet of a session: from a guest to the world, from a guest to
//! a guest over an outside address, or from the world to a mapping.

use core::num::NonZeroU32;

use super::{
    Fate, Route, Tables, check_size, filter, firewall, guests, mapping, policy, session, upkeep,
};
use crate::{
    abi::{
        Device, EndpointKey, FlowKey, Guest, MOST_NEW_SESSIONS, Mapping, MappingMode, NEW_SESSION,
        Settings, Unsolicited, mapping_flags, role, session_flags, setting_flags,
    },
    net::protocol,
    network::Network,
    parse::{Packet, Transport, tcp_flags},
    ports::Class,
    rewrite::Rewrite,
    time::Instant,
    verdict::{Next, Outcome, Plan, Reason},
};

/// Decides about a packet without a session. If it is to have one, that is then
/// [`open`]'s to make as the plan says, after [`map`] if it needs a mapping.
///
/// `link`: the link address that it came from, as in [`crate::abi::Guest::link`].
#[inline(always)]
pub fn start<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    link: Option<u64>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Next {
    let key = packet.key(device);
    let next = match device {
        Some(device) => from_inside(packet, &key, device, link, tables, plan),
        None => from_outside(packet, &key, tables, plan),
    };
    match next {
        Ok(next) => next,
        // The host cannot take it from a stand-in, and would not tell the guest.
        Err(reason) if plan.stands_in && reason.outcome() == Outcome::Pass => {
            Next::Leave(Reason::UnreachableByNat64)
        }
        Err(reason) => Next::Leave(reason),
    }
}

/// Finds or makes the mapping that the plan needs, or the outside port that it
/// needs without one.
#[inline(always)]
pub fn map<A: Network, T: Tables<A>>(packet: &Packet<A>, tables: &T, plan: &mut Plan<A>) -> Next {
    let outside = if plan.opening.flags & session_flags::UNMAPPED == 0 {
        mapping::of(&plan.opening, tables)
    } else {
        mapping::unmapped_port(packet, &plan.opening, tables)
    };
    match outside {
        Ok(outside) => {
            plan.opening.source = outside;
            Next::Open
        }
        Err(reason) => Next::Leave(reason),
    }
}

#[inline(always)]
fn from_inside<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    key: &FlowKey<A>,
    device: NonZeroU32,
    link: Option<u64>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Result<Next, Reason> {
    let (Some(settings), Some(inside)) = (tables.settings(), tables.device(device.get())) else {
        return Err(Reason::NoMapping);
    };
    check_ends(packet, inside, settings, plan.stands_in, tables)?;
    // To a guest behind an outside endpoint (RFC 4787 REQ-9), or to the world.
    // An outside address without a mapping is the host's: it is its own, too.
    let mut destination = key.destination_endpoint();
    let has_static = settings.flags & setting_flags::STATIC_ADDRESSES != 0;
    let is_pooled = tables.is_outside(packet.destination);
    let target = if is_pooled || has_static {
        target_of(&destination, settings, tables)
    } else {
        None
    };
    let route = match target {
        Some(target) => {
            destination = target.leads_to(&destination);
            if policy::isolates(packet.source, destination.address, settings) {
                return Err(Reason::GuestIsolated);
            }
            route_in(target, key.source, tables)
        }
        None if is_pooled => {
            return Err(policy::to_host(packet, Reason::ForTheHost, settings));
        }
        None => tables.route_from(device, packet),
    };
    let hairpin = target.is_some();
    let way = tables
        .device(route.next_hop.device)
        .map_or(0, |way| way.role);
    match route.fate {
        Fate::Onward if hairpin || way == role::UPLINK => {}
        Fate::Onward
            if way == role::INSIDE
                && policy::separates(packet.source, packet.destination, settings) =>
        {
            return Err(Reason::GuestIsolated);
        }
        Fate::Onward | Fate::Local => {
            return Err(policy::to_host(packet, Reason::ForTheHost, settings));
        }
        Fate::Disabled => return Err(Reason::ForwardingDisabled),
    }
    may_be_first(packet, key)?;
    // What is cut comes by again and pays then.
    check_size(packet, route.mtu, destination.address, plan)?;
    if upkeep::is_due(Some(key.source), tables, plan) {
        return Ok(Next::Upkeep);
    }
    may_have_more(key, link, settings, tables, plan)?;
    if firewall::asks(settings, plan) {
        return Err(firewall::ask(destination, plan));
    }
    let mut own_address = key.source;
    // A stand-in is on no wire.
    let is_exempt =
        !hairpin && !plan.stands_in && policy::exempts(packet.destination, settings, tables);
    let is_own = is_exempt || has_whole_address(&mut own_address, settings, tables);
    if !is_own {
        own_address = mapping::outside_address(key.source, settings)?.address;
    }
    let (mut flags, reason) = if hairpin {
        (session_flags::TO_INSIDE, Reason::HairpinStarted)
    } else {
        (0, Reason::SessionStarted)
    };
    if is_own {
        flags |= session_flags::UNMAPPED;
    }
    let inside = key.source_endpoint();
    // Field by field: it is long, and a stack is short.
    let opening = &mut plan.opening;
    opening.reason = reason;
    opening.source = EndpointKey::new(own_address, inside.port, inside.protocol);
    opening.destination = destination;
    opening.flags = flags;
    opening.route = route;
    opening.generation = settings.generation;
    opening.confirmed = settings.confirmed_before(tables.now());
    opening.forget_mapping();
    if is_own {
        // The address is this guest's alone.
        return Ok(Next::Open);
    }
    let Some(class) = Class::of(packet.protocol) else {
        // By address only: the twin's insert decides whether it is free.
        plan.opening.flags |= session_flags::UNMAPPED;
        return Ok(Next::Open);
    };
    plan.opening.class = class as u32;
    if settings.mapping(packet.protocol) == MappingMode::AddressAndPortDependent {
        plan.opening.flags |= session_flags::UNMAPPED;
        return Ok(Next::Map);
    }
    let first = if packet.protocol == protocol::TCP {
        session::State::Opening
    } else {
        session::State::OneWay
    };
    let lifetime = session::timeout(packet.protocol, first, &settings.timeouts);
    plan.opening.inside = inside;
    plan.opening.device = device.get();
    plan.opening.until = tables.now().after(lifetime).after(settings.mapping_slack());
    Ok(Next::Map)
}

/// Whether the guest with this address has an outside one for itself, which it then
/// becomes.
#[inline(always)]
fn has_whole_address<A: Network, T: Tables<A>>(
    guest: &mut A,
    settings: &Settings<A>,
    tables: &T,
) -> bool {
    if settings.flags & setting_flags::STATIC_ADDRESSES == 0 {
        return false;
    }
    let Some(outside) = tables.outside_of(&EndpointKey::whole(*guest)) else {
        return false;
    };
    *guest = outside.address;
    true
}

/// What the ends of a guest's packet must fulfil, whatever it is.
#[inline(always)]
pub(super) fn check_ends<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    inside: &Device<A>,
    settings: &Settings<A>,
    stands_in: bool,
    tables: &T,
) -> Result<(), Reason> {
    // Who stands behind a stand-in was looked at before.
    let is_guest = stands_in || inside.is_guests(packet.source);
    let is_nobody = packet.source == A::UNSPECIFIED && packet.destination.is_multicast();
    if !is_guest && !is_nobody && !packet.source.is_link_local() {
        return Err(Reason::SpoofedSource);
    }
    // Between the guest and the host only.
    if packet.destination.is_multicast() {
        return Err(policy::to_host(packet, Reason::NotUnicast, settings));
    }
    if packet.source.is_link_local() || packet.destination.is_link_local() {
        return Err(policy::to_host(packet, Reason::LinkLocal, settings));
    }
    if packet.destination.is_unroutable() {
        return Err(Reason::UnroutableDestination);
    }
    // The gateway is the host, even in a network that is denied.
    if packet.destination != inside.address && policy::denies(packet.destination, settings, tables)
    {
        return Err(Reason::DeniedDestination);
    }
    Ok(())
}

#[inline(always)]
fn live_mapping<'a, A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    tables: &'a T,
) -> Option<&'a Mapping<A>> {
    let mapping = tables.mapping(outside)?;
    if mapping::is_expired(mapping, tables.now()) {
        None
    } else {
        Some(mapping)
    }
}

/// The mapping that packets to an outside endpoint are for: of this endpoint, or
/// of the whole address.
#[inline(always)]
fn target_of<'a, A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    settings: &Settings<A>,
    tables: &'a T,
) -> Option<&'a Mapping<A>> {
    let target = live_mapping(outside, tables);
    if target.is_none() && settings.flags & setting_flags::STATIC_ADDRESSES != 0 {
        return tables
            .mapping(&EndpointKey::whole(outside.address))
            .map(|mapping| &*mapping);
    }
    target
}

/// The way to the guest that a mapping stands for.
#[inline(always)]
fn route_in<A: Network, T: Tables<A>>(target: &Mapping<A>, source: A, tables: &T) -> Route {
    let mut route = tables.route_on(target.device, source, target.inside.address);
    route.next_hop.device = target.device;
    route
}

/// What any first packet must fulfil, wherever it comes from.
#[inline(always)]
fn may_be_first<A: Network>(packet: &Packet<A>, key: &FlowKey<A>) -> Result<(), Reason> {
    if packet.time_to_live <= 1 {
        return Err(Reason::TimeToLiveExceeded);
    }
    match packet.transport {
        Transport::Unknown => return Err(Reason::ProtocolNotCarried),
        Transport::IcmpOther | Transport::IcmpReply | Transport::IcmpError => {
            return Err(Reason::IcmpTypeNotCarried);
        }
        Transport::Tcp => {
            let flags = packet.segment.flags;
            let opens = flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
            // Outwards, a connection from before our time is picked up.
            let goes_on = flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK
                && key.arrival.device().is_some();
            if flags & (tcp_flags::RST | tcp_flags::FIN) != 0 || !(opens || goes_on) {
                return Err(Reason::NoSession);
            }
        }
        Transport::Udp | Transport::IcmpQuery | Transport::PortsFixed | Transport::AddressOnly => {}
    }
    Ok(())
}

/// Whether the guest is who it says, and may have one more session (RFC 6888 REQ-4).
#[inline(always)]
fn may_have_more<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    link: Option<u64>,
    settings: &Settings<A>,
    tables: &T,
    plan: &Plan<A>,
) -> Result<(), Reason> {
    let device = key.arrival.device().map_or(0, NonZeroU32::get);
    let guest = guests::of(key.source, device, tables)?;
    policy::check_link(guest, link, settings)?;
    if guest.has_all_sessions(settings) {
        guest.refused = guest.refused.wrapping_add(1);
        return Err(Reason::GuestSessionLimit);
    }
    // An accepted one has spent already, when it was asked about.
    if !plan.accepted && !spend(guest, settings.guest_new_sessions, tables.now()) {
        guest.refused = guest.refused.wrapping_add(1);
        return Err(Reason::GuestSessionRate);
    }
    Ok(())
}

/// Whether the guest may begin a session now, at so many a second; a second's worth
/// may come at once.
#[inline(always)]
fn spend(guest: &mut Guest, rate: u32, now: Instant) -> bool {
    if rate == 0 {
        return true;
    }
    let rate = rate.min(MOST_NEW_SESSIONS);
    let passed = if guest.allowed_at == Instant::default() {
        // Nothing was taken yet.
        NEW_SESSION
    } else {
        now.since(guest.allowed_at).get().min(NEW_SESSION)
    };
    let allowance = (guest.allowance + passed * rate).min(NEW_SESSION * rate);
    guest.allowed_at = now;
    let may = allowance >= NEW_SESSION;
    guest.allowance = if may {
        allowance - NEW_SESSION
    } else {
        allowance
    };
    may
}

#[inline(always)]
fn from_outside<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    key: &FlowKey<A>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Result<Next, Reason> {
    let destination = key.destination_endpoint();
    let remote = key.source_endpoint();
    let settings = tables.settings().ok_or(Reason::NoMapping)?;
    let target = target_of(&destination, settings, tables);
    let is_whole = target.is_some_and(|target| target.inside.is_whole());
    let is_syn = packet.transport == Transport::Tcp
        && packet.segment.flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    if target.is_none() && !(is_syn && is_ours(&destination, settings, tables)) {
        return Err(Reason::NoMapping);
    }
    // The host has no part in an address that is a guest's alone.
    if !is_whole
        && !protocol::is_icmp(destination.protocol)
        && tables.host_socket(&destination, &remote)
    {
        return Err(Reason::HostSocket);
    }
    let Some(target) =
        target.filter(|target| filter::admits(target, &destination, remote.address, tables))
    else {
        if !is_syn || is_whole {
            return Err(Reason::Filtered);
        }
        let arrived = tables.now();
        let syn = Unsolicited {
            arrived,
            sequence: packet.segment.sequence,
        };
        tables.note_unsolicited(key, &syn);
        return Err(Reason::UnsolicitedSyn);
    };
    // A guest's neighbours do not come from outside; its answer would not go there. Nor
    // would it to what is nobody's, or another link's.
    let source = packet.source;
    if source.is_unroutable()
        || source.is_link_local()
        || tables
            .device(target.device)
            .is_some_and(|inside| inside.contains(source))
    {
        return Err(Reason::SpoofedSource);
    }
    if target.flags & mapping_flags::STATIC == 0 && policy::denies(packet.source, settings, tables)
    {
        return Err(Reason::Filtered);
    }
    may_be_first(packet, key)?;
    let route = route_in(target, key.source, tables);
    match route.fate {
        Fate::Onward => {}
        Fate::Local => return Err(Reason::GuestUnreachable),
        Fate::Disabled => return Err(Reason::ForwardingDisabled),
    }
    check_size(packet, route.mtu, target.inside.address, plan)?;
    if upkeep::is_due(None, tables, plan) {
        return Ok(Next::Upkeep);
    }
    if firewall::asks(settings, plan) {
        let destination = target.leads_to(&destination);
        return Err(firewall::ask(destination, plan));
    }
    let opening = &mut plan.opening;
    opening.reason = Reason::SessionAdmitted;
    opening.source = remote;
    opening.destination = target.leads_to(&destination);
    opening.flags = if is_whole {
        session_flags::TO_INSIDE | session_flags::UNMAPPED
    } else {
        session_flags::TO_INSIDE
    };
    opening.route = route;
    opening.generation = settings.generation;
    opening.confirmed = settings.confirmed_before(tables.now());
    opening.forget_mapping();
    Ok(Next::Open)
}

/// Whether the NAT may hand out this TCP port, so that a guest may yet send from
/// it.
#[inline(always)]
fn is_ours<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    settings: &Settings<A>,
    tables: &T,
) -> bool {
    tables.is_outside(outside.address)
        && settings.flags & setting_flags::PASS_UNSOLICITED == 0
        && tables
            .reserved(Class::Tcp as u32)
            .is_some_and(|reserved| !reserved.contains(outside.port.get()))
}

/// Lets a session from outside end no later than the mapping that it came in by,
/// unless packets from the guest keep both alive (RFC 4787 REQ-6, RFC 7857 section
/// 7).
#[inline(always)]
fn end_with_mapping<A: Network, T: Tables<A>>(plan: &mut Plan<A>, tables: &T) {
    let [key, _] = &plan.keys;
    let Some(settings) = tables.settings() else {
        return;
    };
    let is_tcp = key.arrival.protocol() == protocol::TCP;
    let refreshed = settings.flags & setting_flags::INBOUND_REFRESH != 0;
    if refreshed && !is_tcp {
        return;
    }
    if let Some(mapping) = live_mapping(&key.destination_endpoint(), tables)
        && mapping.flags & mapping_flags::STATIC == 0
    {
        let half = session::Half::from(&plan.halves[0]);
        let lifetime = session::lifetime(key.arrival.protocol(), half, half, settings);
        let kept = mapping.expires_at.before(lifetime);
        let [one, other] = &mut plan.halves;
        if is_tcp && kept.is_before(one.last_seen) {
            one.last_seen = kept;
        }
        if kept.is_before(other.last_seen) {
            other.last_seen = kept;
        }
    }
}

/// Whether the guest behind the outside endpoint lets this one in. Whether or
/// not it does, this one has sent, and so lets the other one in.
#[inline(always)]
fn may_come_back<A: Network, T: Tables<A>>(key: &FlowKey<A>, plan: &Plan<A>, tables: &T) -> bool {
    let Some(settings) = tables.settings() else {
        return false;
    };
    let opening = &plan.opening;
    let outside = key.destination_endpoint();
    if opening.flags & session_flags::UNMAPPED == 0 {
        filter::permit_guest(&opening.source, &outside, opening.until, tables);
    }
    target_of(&outside, settings, tables)
        .is_some_and(|target| filter::admits_guest(target, &outside, &opening.source, tables))
}

/// Plans the halves of the session that [`start`] has planned.
#[inline(always)]
pub fn open<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Next {
    plan.keys[0] = packet.key(device);
    if plan.opening.reason == Reason::HairpinStarted && !may_come_back(&plan.keys[0], plan, tables)
    {
        return Next::Leave(Reason::Filtered);
    }
    session::set_halves(plan, packet, tables.now());
    if device.is_none() {
        end_with_mapping(plan, tables);
    }
    super::count(packet, &mut plan.halves[0], tables);
    plan.rewrite = Rewrite::of(&plan.halves[0], true);
    Next::Insert
}

/// Makes the session that [`open`] has planned.
#[inline(always)]
pub fn insert<A: Network, T: Tables<A>>(tables: &T, plan: &mut Plan<A>) -> Reason {
    let ([key, _], [forward, back]) = (&plan.keys, &plan.halves);
    match session::insert(&plan.keys, &plan.halves, tables) {
        Ok(()) => {
            // Until the first packet back, only this one lets an answer in.
            let other = session::Other::from(back);
            if !session::is_unanswered(key, forward, other) {
                session::keep_alive(key, forward, other, tables);
            }
            plan.opening.reason
        }
        Err(reason) => {
            if reason == Reason::SessionConflict
                && let Some(session) = tables.session(key)
            {
                // Another CPU had a packet of this session at the same time.
                plan.rewrite = Rewrite::of(session, true);
                return Reason::Translated;
            }
            // A mapping made for it has nobody else.
            if let Some(mapping) = tables.mapping(&plan.opening.source)
                && mapping.sessions == 0
                && mapping.inside == plan.opening.inside
            {
                mapping.expires_at = tables.now();
            }
            reason
        }
    }
}
