//! Filtering (RFC 4787 section 5): which remotes may use a mapping from outside.

use super::{Insert, Tables};
use crate::{
    abi::{EndpointKey, Filtering, Mapping, Permission, PermissionKey, mapping_flags},
    network::Network,
    time::Instant,
};

/// Notes that the owner of the mapping of `outside` has sent to `remote`, who may answer
/// until `until`. Only address-dependent filtering needs to know. Returns whether
/// there was room for it.
#[inline(always)]
pub(super) fn permit<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    mapping: Option<&mut Mapping<A>>,
    remote: A,
    until: Instant,
    tables: &T,
) -> bool {
    let Some(settings) = tables.settings() else {
        return false;
    };
    match settings.filtering(outside.protocol) {
        Filtering::EndpointIndependent | Filtering::AddressAndPortDependent => return true,
        Filtering::AddressDependent => {}
    }
    // Whom a static one lets in is the operator's to say.
    let Some(mapping) = mapping.filter(|mapping| mapping.flags & mapping_flags::STATIC == 0) else {
        return true;
    };
    if mapping.allowed == remote {
        mapping.allowed_until = mapping.allowed_until.later_of(until);
        return true;
    }
    if mapping.allowed == A::UNSPECIFIED || !tables.now().is_before(mapping.allowed_until) {
        mapping.allowed = remote;
        mapping.allowed_until = until;
        return true;
    }
    let key = PermissionKey {
        outside: *outside,
        remote,
    };
    let owner = owner_of(mapping);
    if let Some(permission) = tables.permission(&key)
        && permission.owner == owner
    {
        permission.expires_at = permission.expires_at.later_of(until);
        return true;
    }
    note(&key, owner, until, tables)
}

/// Notes a permission. Returns whether there was room for it.
#[inline(always)]
fn note<A: Network, T: Tables<A>>(
    key: &PermissionKey<A>,
    owner: u32,
    until: Instant,
    tables: &T,
) -> bool {
    let permission = Permission {
        expires_at: until,
        owner,
        is_looked_after: 0,
    };
    tables.set_permission(key, &permission) == Insert::Done
}

/// [`Permission::owner`] of what the mapping's guest permits.
#[inline(always)]
pub(super) fn owner_of<A: Network>(mapping: &Mapping<A>) -> u32 {
    mapping.inside.address.low_bits()
}

/// Notes that the owner of the mapping of `outside` has sent to a guest behind the
/// outside endpoint `remote`, who may answer until `until`.
///
/// To the world, a session would be there for the answer even if the first packet
/// was filtered at the far end. Between guests there is none yet.
#[inline(always)]
pub(super) fn permit_guest<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    remote: &EndpointKey<A>,
    until: Instant,
    tables: &T,
) {
    let Some(mapping) = tables.mapping(outside) else {
        return;
    };
    let owner = owner_of(mapping);
    permit(outside, Some(mapping), remote.address, until, tables);
    if let Some(key) = guest_key(outside, remote, tables) {
        note(&key, owner, until, tables);
    }
}

/// As [`admits`], for the guest behind the outside endpoint `remote`.
#[inline(always)]
pub(super) fn admits_guest<A: Network, T: Tables<A>>(
    mapping: &Mapping<A>,
    outside: &EndpointKey<A>,
    remote: &EndpointKey<A>,
    tables: &T,
) -> bool {
    admits(mapping, outside, remote.address, tables)
        || mapping.flags & mapping_flags::STATIC == 0
            && guest_key(outside, remote, tables)
                .is_some_and(|key| is_permitted(&key, mapping, tables))
}

/// What notes a permission for one port of an outside address of ours, under
/// filtering by address and port: an address of "this network" (RFC 1122 section
/// 3.2.1.3), which nobody in the world has, made of the outside address' place in
/// the pool and the port.
#[inline(always)]
fn guest_key<A: Network, T: Tables<A>>(
    outside: &EndpointKey<A>,
    remote: &EndpointKey<A>,
    tables: &T,
) -> Option<PermissionKey<A>> {
    let settings = tables.settings()?;
    match settings.filtering(outside.protocol) {
        Filtering::EndpointIndependent | Filtering::AddressDependent => None,
        Filtering::AddressAndPortDependent => {
            let place = settings.place_of_outside(remote.address)?;
            Some(PermissionKey {
                outside: *outside,
                remote: A::of_nobody((place << 16) | u32::from(remote.port.get())),
            })
        }
    }
}

#[inline(always)]
fn is_permitted<A: Network, T: Tables<A>>(
    key: &PermissionKey<A>,
    mapping: &Mapping<A>,
    tables: &T,
) -> bool {
    tables.permission(key).is_some_and(|permission| {
        permission.owner == owner_of(mapping) && tables.now().is_before(permission.expires_at)
    })
}

/// Whether the mapping of this outside endpoint lets `remote` start a session
/// from outside.
#[inline(always)]
pub(super) fn admits<A: Network, T: Tables<A>>(
    mapping: &Mapping<A>,
    outside: &EndpointKey<A>,
    remote: A,
    tables: &T,
) -> bool {
    let Some(settings) = tables.settings() else {
        return false;
    };
    if mapping.flags & mapping_flags::STATIC != 0 {
        return mapping.lets_in(remote);
    }
    match settings.filtering(outside.protocol) {
        Filtering::EndpointIndependent => true,
        // The session's own key is address and port; no session, no entry.
        Filtering::AddressAndPortDependent => false,
        Filtering::AddressDependent => {
            let key = PermissionKey {
                outside: *outside,
                remote,
            };
            mapping.allowed == remote && tables.now().is_before(mapping.allowed_until)
                || is_permitted(&key, mapping, tables)
        }
    }
}
