//! Collects what is over while nobody sweeps: who begins a session then looks after a
//! few that are there.
//!
//! User space says that it is there ([`Upkeep::attended`](crate::abi::Upkeep)), and then
//! nothing of this is done but to note on each mapping whom it was used with last. When it
//! has not said so for a while, each packet that begins a session goes through a few
//! steps first, by turns along the ports that are taken, each of which leads to a mapping
//! and to the session that was opened on it last, and along a queue of what cannot be
//! found so: what was opened before another session of the same mapping, and what stands
//! on none of a guest's own. One of a guest at a limit first goes through ports that the guest
//! itself holds ([`Guest::own`](crate::abi::Guest::own)), so that it does not wait until the
//! walk along everybody's has come to them. With a session goes what its guest has permitted
//! for it, and with the last thing of a guest the guest, if room is short. Whether something is
//! over, and removing it, is the sweep's ([`sweep`]).
//!
//! Not found are sessions that were opened while user space was there, before the last one
//! on the same mapping, or without one; what was permitted on a mapping that another guest
//! has taken over, or to one port of another guest; and guests who did nothing even then.

use super::{Tables, guests, mapping, sweep};
use crate::{
    abi::{EndpointKey, FlowKey, Mapping, OWN_PORTS, Permission, PermissionKey, mapping_flags},
    net::{Be16, protocol},
    network::Network,
    parse::Packet,
    ports::{CLASSES, Class, SET_PORTS},
    time::Ticks,
    verdict::{Next, Plan},
};

/// User space sweeps no more when it has not said for so long that it does, which it does
/// every second. If it only had no processor, nothing is lost.
pub const UNATTENDED_AFTER: Ticks = Ticks::from_seconds(15);

/// Steps for each packet that begins a session, half of them along the ports. It adds one
/// thing to look after, so what is over waits for a third of the time that it has lived.
const STEPS: u32 = 8;
/// The same for a guest that would be refused, and those before along its own ports, two of
/// which each of them looks at. A packet goes on from program to program 33 times at most.
const MOST_STEPS: u32 = 10;
const OWN_STEPS: u32 = 8;
const _: () = assert!(OWN_STEPS as usize * 2 == OWN_PORTS);

/// Whether nobody sweeps.
#[inline(always)]
fn is_unattended<A: Network, T: Tables<A>>(tables: &T) -> bool {
    let Some(upkeep) = tables.upkeep() else {
        return false;
    };
    let now = tables.now();
    if now.since(upkeep.attended) < UNATTENDED_AFTER {
        return false;
    }
    // What is longer ago than the clock can tell would look as if it were to come.
    upkeep.attended = now.before(UNATTENDED_AFTER);
    true
}

/// Whether the packet has to go through [`step`] before it may begin a session: of this
/// guest, or of one that somebody outside wants to reach.
#[inline(always)]
pub(super) fn is_due<A: Network, T: Tables<A>>(
    guest: Option<A>,
    tables: &T,
    plan: &mut Plan<A>,
) -> bool {
    if plan.upkeep != 0 || !is_unattended(tables) {
        return false;
    }
    let is_at_limit = guest
        .and_then(|guest| tables.guest(guest))
        .zip(tables.settings())
        .is_some_and(|(guest, settings)| {
            guest.has_all_sessions(settings) || guest.has_all_ports(settings)
        });
    plan.upkeep = 1 + if is_at_limit {
        OWN_STEPS + MOST_STEPS
    } else {
        STEPS
    };
    true
}

/// Has a new session found when it is over, by its half that arrives on an inside device.
/// `mapping`: the one that it stands on.
#[inline(always)]
pub(super) fn note<A: Network, T: Tables<A>>(
    key: &FlowKey<A>,
    mapping: Option<&mut Mapping<A>>,
    tables: &T,
) {
    let mut other = *key;
    // Those of static ones are not walked along.
    if let Some(mapping) = mapping
        && mapping.flags & mapping_flags::STATIC == 0
    {
        other.destination = mapping.remote;
        other.destination_port = mapping.remote_port;
        mapping.remote = key.destination;
        mapping.remote_port = key.destination_port;
        if other.destination == A::UNSPECIFIED || other == *key {
            return;
        }
    }
    if is_unattended(tables) {
        tables.look_after(|key| *key = other);
    }
}

/// Has the session found that was opened last on a mapping which goes before it.
#[inline(always)]
pub(super) fn let_go<A: Network, T: Tables<A>>(mapping: &Mapping<A>, tables: &T) {
    if mapping.remote != A::UNSPECIFIED && is_unattended(tables) {
        tables.look_after(|key| mapping.find_last_session(key));
    }
}

/// Looks after one thing, for this packet. See [`is_due`].
#[inline(always)]
pub fn step<A: Network, T: Tables<A>>(packet: &Packet<A>, tables: &T, plan: &mut Plan<A>) -> Next {
    let number = plan.upkeep;
    plan.upkeep = number - 1;
    let next = if plan.upkeep > 1 {
        Next::Upkeep
    } else {
        Next::Start
    };
    // What is not needed before the session is opened serves for keys: a stack is short.
    let ([session, _], outside) = (&mut plan.keys, &mut plan.opening.source);
    let is_own = number > 1 + MOST_STEPS;
    let is_queued = !is_own && number & 1 != 0 && tables.take_looked_after(session);
    if is_queued {
        // If it is not there, nothing is permitted on it either.
        *outside = tables
            .outside_of(&session.source_endpoint())
            .unwrap_or_default();
    } else {
        let is_found = if is_own {
            own_mapping(packet.source, number, tables, session, outside)
        } else {
            next_mapping(tables, session, outside)
        };
        if !is_found {
            return next;
        }
    }
    let is_over = sweep::session(session, tables);
    let permission = kept_permission(outside, session.destination, tables);
    if !is_queued {
        sweep::mapping(outside, tables);
    } else if !is_over && tables.session(session).is_some()
        || permission.is_some_and(|permission| stands_for(permission, session))
    {
        tables.look_after(|key| *key = *session);
    }
    guests::make_room(session.source, tables);
    next
}

/// What lets the remote in still, of the guest with this outside endpoint, beside what its
/// mapping says. What is over is removed.
#[inline(always)]
fn kept_permission<'a, A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    remote: A,
    tables: &'a T,
) -> Option<&'a mut Permission> {
    let key = PermissionKey {
        outside: *outside,
        remote,
    };
    let permission = tables.permission(&key)?;
    (!sweep::permission(&key, tables)).then_some(permission)
}

/// Makes the key of a session that is gone the one by which its permission is found, if
/// that has none yet: there may be very many such sessions. Returns whether it is.
#[inline(always)]
fn stands_for<A: Network>(permission: &mut Permission, session: &mut FlowKey<A>) -> bool {
    // Of no session, or one at most.
    let is_its = session.destination_port == Be16::ZERO;
    if !is_its && permission.is_looked_after != 0 {
        return false;
    }
    permission.is_looked_after = 1;
    session.destination_port = Be16::ZERO;
    true
}

/// Finds a mapping of this guest's own of which something is over, by the number of the
/// step. Returns whether it did, and which session was opened on it last.
#[inline(always)]
fn own_mapping<A: Network, T: Tables<A>>(
    guest: A,
    number: u32,
    tables: &T,
    session: &mut FlowKey<A>,
    outside: &mut EndpointKey<A>,
) -> bool {
    let (Some(entry), Some(settings)) = (tables.guest(guest), tables.settings()) else {
        return false;
    };
    let Ok(pool) = mapping::outside_address(guest, settings) else {
        return false;
    };
    for half in 0..2 {
        let place = (number + half * OWN_STEPS) as usize & (OWN_PORTS - 1);
        let Some(port) = entry.own.get(place).copied().filter(|port| *port != 0) else {
            continue;
        };
        #[expect(clippy::cast_possible_truncation, reason = "it is taken apart")]
        let (number, protocol) = (port as u16, (port >> 16) as u8);
        *outside = EndpointKey::new(pool.address, Be16::new(number), protocol);
        let Some(mapping) = tables
            .mapping(outside)
            .filter(|mapping| mapping.inside.address == guest)
        else {
            entry.note_port(port, false);
            continue;
        };
        let is_of_use = mapping::is_expired(mapping, tables.now())
            && (mapping.sessions != 0 || sweep::mapping_is_over(mapping, settings, tables.now()));
        if is_of_use {
            mapping.find_last_session(session);
            return true;
        }
    }
    false
}

/// Goes on along the ports that are taken. Returns whether a mapping was found of which
/// something may be over, and which session was opened on it last.
#[inline(always)]
fn next_mapping<A: Network, T: Tables<A>>(
    tables: &T,
    session: &mut FlowKey<A>,
    outside: &mut EndpointKey<A>,
) -> bool {
    const TCP: u32 = Class::Tcp as u32;
    const UDP: u32 = Class::Udp as u32;
    let (Some(upkeep), Some(settings)) = (tables.upkeep(), tables.settings()) else {
        return false;
    };
    let set = upkeep.place / SET_PORTS;
    let index = set / 2 / CLASSES;
    let Some(address) = settings
        .outside
        .get(index as usize)
        .filter(|_| index < settings.outside_count)
    else {
        upkeep.place = 0;
        return false;
    };
    let found = tables.next_taken(set, upkeep.place % SET_PORTS);
    if found >= SET_PORTS {
        upkeep.place = set * SET_PORTS + (found - SET_PORTS);
        return false;
    }
    upkeep.place = set * SET_PORTS + found + 1;
    let number = match set / 2 % CLASSES {
        TCP => protocol::TCP,
        UDP => protocol::UDP,
        _ => A::ICMP,
    };
    #[expect(clippy::cast_possible_truncation, reason = "a set has no more ports")]
    let port = (found << 1 | set & 1) as u16;
    *outside = EndpointKey::new(*address, Be16::new(port), number);
    if number == protocol::UDP && tables.mapping(outside).is_none() {
        outside.protocol = protocol::UDP_LITE;
    }
    let Some(mapping) = tables.mapping(outside) else {
        sweep::port(outside, tables);
        return false;
    };
    mapping.find_last_session(session);
    mapping.flags & mapping_flags::STATIC == 0
}

/// The place of a port as [`PortSet::next_taken`](crate::ports::PortSet::next_taken) finds
/// it, in the set with this index; where that finds none, the place to go on at and
/// [`SET_PORTS`] more.
#[inline(always)]
pub fn next_taken<A: Network, T: Tables<A>>(set: u32, place: u32, tables: &T) -> u32 {
    let (Some(ports), Some(reserved)) = (tables.ports(set), tables.reserved(set / 2 % CLASSES))
    else {
        return SET_PORTS * 2;
    };
    let parity = (set & 1) as u16;
    ports
        .next_taken(reserved, parity, place)
        .unwrap_or_else(|next| SET_PORTS + next)
}
