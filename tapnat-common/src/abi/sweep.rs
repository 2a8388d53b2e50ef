//! What is over: how user space has it removed, and how the datapath looks after it.

use super::FlowKey;
use crate::{net::Address, time::Instant};

/// What [`super::programs::SWEEP`] is to remove: [`Sweep::table`]. [`super::Family::OFFSET`] is added.
pub mod sweep_tables {
    /// Sessions, by the [`crate::abi::FlowKey`] of either half.
    pub const SESSIONS: u32 = 1;
    /// Mappings, by their outside [`crate::abi::EndpointKey`].
    pub const MAPPINGS: u32 = 2;
    /// Permissions, by their [`crate::abi::PermissionKey`].
    pub const PERMISSIONS: u32 = 3;
    /// Guests without sessions, by their address.
    pub const GUESTS: u32 = 4;
    /// Ports that are marked as taken in [`crate::abi::maps::Names::ports`] and that no mapping
    /// has, by an outside [`crate::abi::EndpointKey`].
    pub const PORTS: u32 = 5;
    /// Sessions, by the [`crate::abi::FlowKey`] of each half: not to remove, but to have
    /// the firewall asked about them again.
    pub const SESSIONS_TO_ASK: u32 = 6;
    /// A port that a guest holds no more, as user space gave its mapping to somebody
    /// else, by the guest's address.
    pub const GUESTS_PORTS: u32 = 7;
    /// Guests whose device lost its carrier, by their address: not to remove, but to take
    /// whoever comes next for them.
    pub const GUESTS_UNPLUGGED: u32 = 8;
}

/// The beginning of a packet that [`super::programs::SWEEP`] is run on. After it come
/// keys of one table, one every [`sweep_key_bytes`].
///
/// The kernel runs the program as often as user space asks it to on one packet,
/// and each run deals with one key. So it needs no loop, and the kernel can do
/// other things between two keys. It is no less than an Ethernet header, which
/// the kernel takes it for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// [`sweep_tables`].
    pub table: u32,
    /// The number of the next run's key.
    pub next: u32,
    /// Entries removed so far, which is also what the program returns.
    pub removed: u32,
    _zero: u32,
}

impl Sweep {
    /// Of a table ([`sweep_tables`]), before the first run.
    #[must_use]
    pub const fn new(table: u32) -> Self {
        Self {
            table,
            next: 0,
            removed: 0,
            _zero: 0,
        }
    }
}

/// From one key of a [`Sweep`] to the next.
#[must_use]
pub const fn sweep_key_bytes<A: Address>() -> usize {
    size_of::<FlowKey<A>>()
}

/// At most so many keys are in one packet: the kernel's test runs take packets
/// of a page less some room for its own use.
#[must_use]
pub const fn sweep_keys<A: Address>() -> usize {
    3200 / sweep_key_bytes::<A>()
}

/// How the datapath itself looks after what is over, index 0 of
/// [`super::maps::Names::upkeep`]. See [`crate::nat::upkeep`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// When user space last said that it sweeps. The datapath moves it on while it is
    /// long ago, as no clock here goes back far.
    pub attended: Instant,
    /// The place in [`super::maps::Names::ports`] to go on at, in ports. Written by the datapath.
    pub place: u32,
}

const _: () = {
    assert!(size_of::<Upkeep>() == 8);
    assert!(size_of::<Sweep>() == 16);
};
