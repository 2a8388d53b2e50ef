//! Gives back what is over and what no packet has met since.
//!
//! Each function first looks whether what it is to remove is over, by the code
//! that packets are judged by, and so is safe to call about anything at any
//! time. User space finds what is worth asking about on its copies of the
//! entries, with the functions that take a time.

use super::{Insert, Tables, filter, firewall, guests, mapping, session};
use crate::{
    abi::{
        EndpointKey, FlowKey, Mapping, Permission, PermissionKey, Session, Settings, session_flags,
        tcp_state,
    },
    net::protocol,
    network::Network,
    ports::{Class, set_index},
    time::Instant,
};

/// Whether the session that this half belongs to may be over, as far as one half
/// can tell: [`session`] tells.
#[must_use]
pub fn session_may_be_over<A: Network>(
    key: &FlowKey<A>,
    half: &Session<A>,
    settings: &Settings<A>,
    now: Instant,
) -> bool {
    let number = key.arrival.protocol();
    let timeouts = &settings.timeouts;
    let timeout = if number == protocol::TCP {
        let opening = session::timeout(number, session::State::Opening, timeouts);
        let is_closing = half.tcp & (tcp_state::FIN | tcp_state::RST) != 0;
        let is_open = half.tcp & tcp_state::OPEN != 0 && !is_closing;
        if key.arrival.device().is_none() {
            // The half from inside comes by, too, and is as good a witness. This
            // one is for when that is gone.
            timeouts
                .tcp_established
                .max(timeouts.tcp_opening)
                .max(timeouts.tcp_closing)
        } else if is_open {
            timeouts
                .tcp_established
                .min(opening)
                .min(timeouts.tcp_closing)
        } else {
            opening.min(timeouts.tcp_closing)
        }
    } else {
        session::timeout(number, session::State::OneWay, timeouts)
    };
    now.since(half.last_seen) >= timeout.plus(super::STAMP_AFTER)
}

/// Whether the session that this half belongs to may be over because what it
/// stands on is gone: [`session`] tells. `is_there`: whether there is a device with
/// this index.
#[must_use]
pub fn session_may_be_lost<A: Network>(
    key: &FlowKey<A>,
    half: &Session<A>,
    settings: &Settings<A>,
    is_there: impl Fn(u32) -> bool,
) -> bool {
    // The halves that come by from outside tell of all sessions but those between
    // guests.
    let is_inward = half.flags & session_flags::TO_INSIDE != 0;
    is_inward
        && (!is_there(half.next_hop.device)
            || (key.arrival.device().is_none()
                && settings.outside_count != 0
                && !settings.is_outside(key.destination)))
}

/// Removes the session that this half belongs to, if it is over. Returns whether
/// it was.
#[inline(always)]
pub fn session<A: Network, T: Tables<A>>(key: &FlowKey<A>, tables: &T) -> bool {
    let Some(session) = tables.session(key) else {
        return false;
    };
    let is_over = session::is_expired(key, session, tables);
    if is_over {
        tables.close_session(key, None);
    }
    is_over
}

/// Has the host's firewall asked again about the session that this half belongs to.
/// Returns whether it was there.
#[inline(always)]
pub fn ask_again<A: Network, T: Tables<A>>(key: &FlowKey<A>, tables: &T) -> bool {
    let (Some(session), Some(settings)) = (tables.session(key), tables.settings()) else {
        return false;
    };
    firewall::forget_answer(session, settings.generation);
    true
}

/// Whether the mapping is over and its port has rested (RFC 6888 REQ-8).
#[inline(always)]
#[must_use]
pub fn mapping_is_over<A: Network>(
    mapping: &Mapping<A>,
    settings: &Settings<A>,
    now: Instant,
) -> bool {
    mapping::is_expired(mapping, now)
        && !now.is_before(mapping.expires_at.after(settings.timeouts.port_rest))
}

/// Removes a mapping that is over, and marks its port as free. Returns whether it
/// was there and is gone.
#[inline(always)]
pub fn mapping<A: Network, T: Tables<A>>(outside: &EndpointKey<A>, tables: &T) -> bool {
    let is_over = tables
        .mapping(outside)
        .zip(tables.settings())
        .is_some_and(|(mapping, settings)| mapping_is_over(mapping, settings, tables.now()));
    if !is_over || !mapping::lock(outside, tables) {
        return false;
    }
    let removed = remove_mapping(outside, tables);
    mapping::unlock(outside, tables);
    if removed {
        port(outside, tables);
    }
    removed
}

#[inline(always)]
fn remove_mapping<A: Network, T: Tables<A>>(outside: &EndpointKey<A>, tables: &T) -> bool {
    let (Some(mapping), Some(settings)) = (tables.mapping(outside), tables.settings()) else {
        return false;
    };
    let now = tables.now();
    let inside = mapping.inside;
    // Looked at again: another guest may just have taken it over.
    if !mapping_is_over(mapping, settings, now) || !mapping::remove(outside, &inside, tables) {
        return false;
    }
    if mapping.inside == inside && !mapping::is_expired(mapping, now) {
        // Its guest came back to it on another CPU at the last moment.
        return mapping::insert(outside, mapping, tables) == Insert::Full;
    }
    if tables.outside_of(&inside) == Some(*outside) {
        tables.remove_outside_of(&inside);
        if tables
            .mapping(outside)
            .is_some_and(|mapping| mapping.inside == inside)
        {
            // Its guest has made it anew meanwhile, and had noted it already.
            let _ = tables.insert_outside_of(&inside, outside);
        }
    }
    true
}

/// Marks the port as free, unless it must not be handed out or a mapping has it.
/// Returns whether it did.
#[inline(always)]
pub fn port<A: Network, T: Tables<A>>(outside: &EndpointKey<A>, tables: &T) -> bool {
    let number = outside.port.get();
    let (Some(settings), Some(class)) = (tables.settings(), Class::of(outside.protocol)) else {
        return false;
    };
    let Some(address) = settings.place_of_outside(outside.address) else {
        return false;
    };
    let is_reserved = tables
        .reserved(class as u32)
        .is_none_or(|reserved| reserved.contains(number));
    if is_reserved || has_mapping(outside, tables) {
        return false;
    }
    let Some(set) = tables.ports(set_index(address, class as u32, number)) else {
        return false;
    };
    set.release(number);
    if has_mapping(outside, tables) {
        // Taken on another CPU just now.
        set.take(number);
        return false;
    }
    true
}

/// Whether a mapping has this port, of any protocol that shares ports with this
/// one.
#[inline(always)]
fn has_mapping<A: Network, T: Tables<A>>(outside: &EndpointKey<A>, tables: &T) -> bool {
    let other = match outside.protocol {
        protocol::UDP => protocol::UDP_LITE,
        protocol::UDP_LITE => protocol::UDP,
        number => number,
    };
    let other = EndpointKey::new(outside.address, outside.port, other);
    tables.mapping(outside).is_some() || tables.mapping(&other).is_some()
}

/// Whether the permission is past its time.
#[inline(always)]
#[must_use]
pub fn permission_is_over(permission: &Permission, now: Instant) -> bool {
    !now.is_before(permission.expires_at)
}

/// Removes a permission that is over, or whose mapping is gone or another guest's. Returns
/// whether it was there and is gone.
#[inline(always)]
pub fn permission<A: Network, T: Tables<A>>(key: &PermissionKey<A>, tables: &T) -> bool {
    let Some(permission) = tables.permission(key) else {
        return false;
    };
    let is_over = permission_is_over(permission, tables.now());
    let is_anothers = tables
        .mapping(&key.outside)
        .is_none_or(|mapping| filter::owner_of(mapping) != permission.owner);
    (is_over || is_anothers) && tables.remove_permission(key)
}

/// Takes a port from those that a guest holds, whose mapping user space gave to somebody
/// else. Returns `true`.
#[inline(always)]
pub fn port_of_guest<A: Network, T: Tables<A>>(address: A, tables: &T) -> bool {
    tables.count_port_on_guest(address, 0, false);
    true
}

/// Forgets from which link address a guest sent: nobody is behind its device any more, so whoever
/// comes next with its address cannot take it away from anybody. Returns `true`.
#[inline(always)]
pub fn unplugged_guest<A: Network, T: Tables<A>>(address: A, tables: &T) -> bool {
    tables.forget_link_of_guest(address);
    true
}

/// Forgets a guest that has no sessions and holds no ports, and what was refused it. Returns whether
/// it was there.
///
/// A session that another CPU is opening for it right now may then be counted on
/// nobody, so this is for want of room, not for order's sake.
#[inline(always)]
pub fn guest<A: Network, T: Tables<A>>(address: A, tables: &T) -> bool {
    guests::forget(address, tables)
}
