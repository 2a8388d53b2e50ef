//! The tables that the datapath and the user side share: names, keys, values.
//!
//! `docs/architecture.md` says why the tables are what they are. Who writes
//! what stands at each type. The layout has a version: a change that moves or
//! redefines a field raises [`ABI_VERSION`], and the loader then refuses to
//! adopt the old pins. No behaviour beyond making keys lives here.

mod device;
mod fragment;
pub mod globals;
mod guest;
mod keys;
mod mapping;
pub mod maps;
#[cfg(feature = "user")]
mod pod;
pub mod programs;
mod session;
mod settings;
pub mod stages;
mod sweep;

pub use device::{Device, role};
pub use fragment::{Fragment, FragmentKey, HELD_BYTES, Held, HeldKey, MAX_HELD, fragment_fate};
pub use guest::{
    EVERY_DEVICE, Guest, MOST_GUESTS, MOST_NEW_SESSIONS, NEW_SESSION, Nat64, OWN_PORTS, StandIn,
    held_port,
};
pub use keys::{Arrival, EndpointKey, FlowKey};
pub use mapping::{HostSocketKey, Mapping, Permission, PermissionKey, mapping_flags};
pub use session::{NextHop, Session, UNSOLICITED_WAIT, Unsolicited, session_flags, tcp_state};
pub use settings::{Filtering, MappingMode, Settings, Timeouts, setting_flags};
pub use sweep::{Sweep, Upkeep, sweep_key_bytes, sweep_keys, sweep_tables};

use crate::{
    net::{Be32, Be128},
    network::Network,
};

/// Rises with every change to the layout or meaning of a pinned table.
pub const ABI_VERSION: u32 = 14;

/// What user space may take for bytes.
#[cfg(feature = "user")]
pub use aya::Pod as Plain;

/// What user space may take for bytes, which is not here.
#[cfg(not(feature = "user"))]
pub trait Plain {}

#[cfg(not(feature = "user"))]
impl<T> Plain for T {}

/// An IP version with its tables.
pub trait Family: Network + Plain {
    /// Its maps.
    const MAPS: maps::Names;
    /// What is added to [`sweep_tables`] and [`stages`] for its.
    const OFFSET: u32;
}

impl Family for Be32 {
    const MAPS: maps::Names = maps::IPV4;
    const OFFSET: u32 = 0;
}

impl Family for Be128 {
    const MAPS: maps::Names = maps::IPV6;
    const OFFSET: u32 = 32;
}

/// At most this many pairs of prefixes.
pub const MAX_PREFIX_PAIRS: u32 = 4;

/// At most this many outside addresses in a pool.
pub const MAX_OUTSIDE_ADDRESSES: usize = 16;

/// A per-CPU counter of one reason.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}
