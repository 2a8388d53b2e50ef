//! Collects what is over while nobody sweeps: who begins a session then looks after a
//! few that are there.
//!
//! User space says that it is there ([`Upkeep::attended`](crate::abi::Upkeep)), and then
//! nothing of this is done but to note on each mapping whom it was used with last. When it
//! has not said so for a while, each packet that begins a session goes through a few
//! steps first, by turns along the ports that are taken, each of which leads to a mapping
//! and to the session that was opened on it last, and along a queue of what cannot be
//! found so: what was opened before another session of the same mapping, and what stands
//! on none of a guest's own. Whether something is over, and removing it, is the sweep's
//! ([`sweep`]).
//!
//! Not found are sessions that were opened while user space was there, before the last one
//! on the same mapping, or without one.

use super::{Tables, sweep};
use crate::{
    abi::{EndpointKey, FlowKey, Mapping, mapping_flags},
    net::{Be16, protocol},
    network::Network,
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
/// The same for a guest that would be refused. A packet goes on from program to program 33
/// times at most.
const MOST_STEPS: u32 = 16;

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
        .and_then(|guest| tables.known_guest(guest))
        .zip(tables.settings())
        .is_some_and(|(guest, settings)| {
            guest.has_all_sessions(settings) || guest.has_all_ports(settings)
        });
    plan.upkeep = 1 + if is_at_limit { MOST_STEPS } else { STEPS };
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

/// Looks after one thing. See [`is_due`].
#[inline(always)]
pub fn step<A: Network, T: Tables<A>>(tables: &T, plan: &mut Plan<A>) -> Next {
    // What is not needed before the session is opened serves for keys: a stack is short.
    let is_queued = plan.upkeep & 1 != 0 && tables.take_looked_after(&mut plan.keys[0]);
    if is_queued || next_mapping(tables, &mut plan.keys[0], &mut plan.opening.source) {
        let session = &plan.keys[0];
        let is_over = sweep::session(session, tables);
        if !is_queued {
            sweep::mapping(&plan.opening.source, tables);
        } else if !is_over && tables.session(session).is_some() {
            tables.look_after(|key| *key = *session);
        }
    }
    plan.upkeep -= 1;
    if plan.upkeep > 1 {
        Next::Upkeep
    } else {
        Next::Start
    }
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
