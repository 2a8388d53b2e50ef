//! Filtering (RFC 4787 section 5): which remotes may use a mapping from outside.

use super::{Insert, Tables};
use crate::{
    abi::{EndpointKey, Filtering, Mapping, Permission, PermissionKey, mapping_flags},
    net::Be32,
    time::Instant,
};

/// Notes that the mapping's owner has sent to `remote`, who may answer until
/// `until`. Only address-dependent filtering needs to know. Returns whether
/// there was room for it.
#[inline(always)]
pub(super) fn permit<T: Tables>(
    outside: &EndpointKey,
    remote: Be32,
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
    let key = PermissionKey {
        outside: *outside,
        remote,
    };
    if let Some(permission) = tables.permission(&key) {
        permission.expires_at = permission.expires_at.later_of(until);
        return true;
    }
    tables.set_permission(&key, &Permission { expires_at: until }) == Insert::Done
}

/// Whether the mapping of this outside endpoint lets `remote` start a session
/// from outside.
#[inline(always)]
pub(super) fn admits<T: Tables>(
    mapping: &Mapping,
    outside: &EndpointKey,
    remote: Be32,
    tables: &T,
) -> bool {
    let Some(settings) = tables.settings() else {
        return false;
    };
    if mapping.flags & mapping_flags::STATIC != 0 {
        return remote.same_network(mapping.allowed, Be32::mask(mapping.allowed_length));
    }
    match settings.filtering(outside.protocol) {
        Filtering::EndpointIndependent => true,
        // The session's own key is address and port; no session, no entry.
        Filtering::AddressAndPortDependent => false,
        Filtering::AddressDependent => tables
            .permission(&PermissionKey {
                outside: *outside,
                remote,
            })
            .is_some_and(|permission| tables.now().is_before(permission.expires_at)),
    }
}
