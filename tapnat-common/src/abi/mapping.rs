//! Mappings, and whom they let in.

use core::num::NonZeroU32;

use super::{Arrival, EndpointKey, FlowKey};
use crate::{
    net::{Address, Be16, Be32, Be128},
    time::Instant,
};

/// Bits of [`Mapping::flags`].
pub mod mapping_flags {
    /// Made by the operator (a port forward or a 1:1 mapping): never expires,
    /// and lets in every remote in [`super::Mapping::allowed`].
    pub const STATIC: u8 = 1 << 0;
    /// Of a static one: the configuration file asks for it, not a command.
    pub const CONFIGURED: u8 = 1 << 1;
    /// Of a static one: the operator named no outside address, so it moves with
    /// the first of the pool.
    pub const MOVES: u8 = 1 << 2;
}

/// An endpoint-independent mapping, the value of [`super::maps::Names::mappings`], keyed by
/// its outside endpoint. Inserting it with `BPF_NOEXIST` is what takes a port.
///
/// A 1:1 mapping is static and has [`EndpointKey::whole`] for both endpoints;
/// its outside address is in no pool, and the sessions under it are
/// [`super::session_flags::UNMAPPED`].
///
/// Written by the datapath; user space deletes expired ones and writes static
/// ones.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping<A = Be32> {
    pub inside: EndpointKey<A>,
    /// The inside device's interface index.
    pub device: u32,
    /// No session outlives it. A mapping past it counts as absent.
    pub expires_at: Instant,
    /// Sessions that stand on it. Only ever added to and taken from.
    pub sessions: u32,
    /// With [`mapping_flags::STATIC`]: the network that may come in. Else the
    /// one remote that may, as most mappings have no other; the rest is in
    /// [`super::maps::Names::permissions`].
    pub allowed: A,
    pub allowed_length: u8,
    pub flags: u8,
    /// Whom the session was opened with that was opened last on it, as the guest calls
    /// it; address and port. Unspecified where there is none, and with
    /// [`mapping_flags::STATIC`].
    pub remote_port: Be16,
    pub remote: A,
    /// Until when, for a remote.
    pub allowed_until: Instant,
}

impl<A: Address> Mapping<A> {
    /// Whether a static mapping lets this remote in.
    #[inline(always)]
    #[must_use]
    pub fn lets_in(&self, remote: A) -> bool {
        remote.same_network(self.allowed, A::mask(self.allowed_length))
    }

    /// Makes this the key of the session that was opened last on it, of the half that
    /// arrives on the inside device.
    #[inline(always)]
    pub const fn find_last_session(&self, key: &mut FlowKey<A>) {
        // Field by field: a stack has no room for another one.
        key.source = self.inside.address;
        key.destination = self.remote;
        key.source_port = self.inside.port;
        key.destination_port = self.remote_port;
        key.arrival = Arrival::of(NonZeroU32::new(self.device), self.inside.protocol);
    }

    /// Where a static mapping leads who names this outside endpoint, which is the
    /// mapping's own or one of a 1:1 mapping's address.
    #[inline(always)]
    #[must_use]
    pub const fn leads_to(&self, outside: &EndpointKey<A>) -> EndpointKey<A> {
        if self.inside.is_whole() {
            EndpointKey::new(self.inside.address, outside.port, outside.protocol)
        } else {
            self.inside
        }
    }
}

/// The key of [`super::maps::Names::permissions`]: a remote address that an inside endpoint
/// has sent to (RFC 4787 section 5, address-dependent filtering).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PermissionKey<A = Be32> {
    pub outside: EndpointKey<A>,
    pub remote: A,
}

/// Until when the remote may send to the mapping, as long as that is this guest's: the
/// next to have the port does not inherit it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permission {
    pub expires_at: Instant,
    /// [`Address::low_bits`] of the guest's address.
    pub owner: u32,
    /// 1 where the queue of what is looked after without user space has a key for it alone.
    pub is_looked_after: u32,
}

/// The key of [`super::maps::Names::host_sockets`]: a socket of the host, and the inside
/// endpoint that it was led to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HostSocketKey<A = Be32> {
    /// As `bpf_get_socket_cookie` gives it.
    pub cookie: [u32; 2],
    pub inside: EndpointKey<A>,
}

const _: () = {
    assert!(size_of::<Mapping>() == 36);
    assert!(size_of::<Mapping<Be128>>() == 72);
    assert!(size_of::<PermissionKey>() == 12);
    assert!(size_of::<PermissionKey<Be128>>() == 36);
    assert!(size_of::<HostSocketKey>() == 16);
    assert!(size_of::<HostSocketKey<Be128>>() == 28);
};
