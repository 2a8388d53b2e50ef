//! Fragments: their datagrams, and those that wait.

use super::Arrival;
use crate::{
    net::{Be16, Be32, Be128},
    time::Instant,
};

/// The key of [`super::maps::Names::fragments`]: a datagram whose first fragment was seen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey<A = Be32> {
    pub source: A,
    pub destination: A,
    /// With the protocol that all fragments name (IPv4), or that says that they are
    /// fragments (IPv6).
    pub arrival: Arrival,
    /// IPv4's has 16 bits.
    pub identification: Be32,
}

/// What became of a fragmented datagram's first fragment, and so becomes of the
/// others: [`Fragment::fate`].
pub mod fragment_fate {
    /// It has not come yet: the others are held.
    pub const UNKNOWN: u8 = 0;
    /// Translated; the others belong to the session of the same ports.
    pub const TRANSLATED: u8 = 1;
    /// Passed to the host.
    pub const HOST: u8 = 2;
    pub const DROPPED: u8 = 3;
}

/// A datagram that comes in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The ports that the first fragment carried.
    pub source_port: Be16,
    pub destination_port: Be16,
    pub expires_at: Instant,
    /// The identification that a guest's fragments are given (RFC 7857 section 10).
    pub identification: Be32,
    /// How much has come by, and how much there is if the last fragment has, in
    /// units of 8 bytes.
    pub units: u16,
    pub all_units: u16,
    /// Fragments that wait for the first one in [`super::maps::Names::held`].
    pub held: u8,
    /// [`fragment_fate`].
    pub fate: u8,
    /// The protocol of the first fragment's transport.
    pub protocol: u8,
    pub padding: [u8; 5],
    /// A bit for each 8 bytes of the datagram that have come by.
    pub seen: [u64; 128],
}

/// The key of [`super::maps::Names::held`]: a fragment that came before its first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HeldKey<A = Be32> {
    pub datagram: FragmentKey<A>,
    /// Counted in the order of arrival.
    pub index: u32,
}

/// The longest frame that is held, in bytes.
pub const HELD_BYTES: u32 = 2044;

/// At most so many fragments of one datagram are held: what 64 KiB take at an
/// MTU of 1400 bytes and a little more.
pub const MAX_HELD: u32 = 48;

/// A frame that waits, as it arrived.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub length: u32,
    pub bytes: [u8; HELD_BYTES as usize],
}

const _: () = {
    assert!(size_of::<FragmentKey>() == 16);
    assert!(size_of::<FragmentKey<Be128>>() == 40);
    assert!(size_of::<Fragment>() == 24 + 1024);
    assert!(size_of::<HeldKey>() == 20);
    assert!(size_of::<HeldKey<Be128>>() == 44);
};
