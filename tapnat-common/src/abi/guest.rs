//! Guests: what each uses, and who stands in for it in IPv4.

use super::{EndpointKey, Settings};
use crate::{
    embed::Prefix,
    net::{Address, Be128},
    time::{Instant, Ticks},
};

/// What one inside address uses, the value of [`super::maps::Names::guests`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// Sessions now. Only ever added to and taken from.
    pub sessions: u32,
    /// New sessions refused by a limit.
    pub refused: u32,
    /// The link address that its packets come from, in the low 48 bits; 0 where it
    /// is not known. An address stays with it for as long as it has sessions.
    pub link: u64,
    /// What it may begin now, a session for every [`NEW_SESSION`], and when that was
    /// so.
    pub allowance: u32,
    pub allowed_at: Instant,
    /// Outside ports that mappings of its own hold, those that rest among them. Only
    /// ever added to and taken from.
    pub ports: u32,
    /// The inside device that it was last seen on, which it is counted on.
    pub device: u32,
    /// Some of its ports ([`held_port`]), and 0: where the datapath finds what of its is
    /// over, without user space.
    pub own: [u32; OWN_PORTS],
}

impl Guest {
    /// Notes in [`Guest::own`] that it holds this port ([`held_port`]), or does no more. Of
    /// those that share a place the first one is noted, as it is the first to be over.
    #[inline(always)]
    pub fn note_port(&mut self, port: u32, is_held: bool) {
        let (before, after) = if is_held { (0, port) } else { (port, 0) };
        if let Some(place) = self.own.get_mut(Self::place_of(port))
            && *place == before
        {
            *place = after;
        }
    }

    /// Ports next to each other have places of their own, and so have those of one parity.
    #[inline(always)]
    const fn place_of(port: u32) -> usize {
        (port ^ port >> 4 ^ port >> 16) as usize & (OWN_PORTS - 1)
    }

    /// Whether it has as many sessions as it may (RFC 6888 REQ-4).
    #[inline(always)]
    #[must_use]
    pub const fn has_all_sessions<A: Address>(&self, settings: &Settings<A>) -> bool {
        is_reached(self.sessions, settings.guest_max_sessions)
    }

    /// Whether it holds as many ports as it may (RFC 6888 REQ-4).
    #[inline(always)]
    #[must_use]
    pub const fn has_all_ports<A: Address>(&self, settings: &Settings<A>) -> bool {
        is_reached(self.ports, settings.guest_max_ports)
    }
}

/// Whether a limit is, where there is one.
#[inline(always)]
const fn is_reached(used: u32, most: u32) -> bool {
    most != 0 && used >= most
}

/// Ports that a guest is found by, of those that it holds. A power of 2.
pub const OWN_PORTS: usize = 16;

/// A port as [`Guest::own`] has it: the protocol above it.
#[inline(always)]
#[must_use]
pub const fn held_port<A: Address>(outside: &EndpointKey<A>) -> u32 {
    (outside.protocol as u32) << 16 | outside.port.get() as u32
}

/// At most so many guests are known at a time.
pub const MOST_GUESTS: u32 = 8192;

/// In [`super::maps::Names::guests_on`]: all devices together.
pub const EVERY_DEVICE: u32 = 0;

/// What a session takes from [`Guest::allowance`]: the ticks in a second, as a guest
/// gets its limit's worth with every tick.
pub const NEW_SESSION: u32 = Ticks::from_seconds(1).get();

/// The highest limit on the sessions that a guest begins in a second.
pub const MOST_NEW_SESSIONS: u32 = 1_000_000;

/// The value of [`super::maps::NAT64`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nat64 {
    /// Behind which the world's IPv4 addresses are for guests, if it is set.
    pub prefix: Prefix,
    /// What stand-ins are chosen with, so that no guest can choose addresses that get
    /// another's. Stays as it is as long as the tables.
    pub secret: u32,
}

/// A guest that an IPv4 address stands in for, the value of [`super::maps::STAND_INS`]. The
/// datapath adds them; user space removes those without sessions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StandIn {
    pub address: Be128,
    /// The inside device's interface index.
    pub device: u32,
}

const _: () = {
    assert!(size_of::<Nat64>() == 24);
    assert!(size_of::<StandIn>() == 20);
    assert!(size_of::<Guest>() == 32 + 4 * OWN_PORTS);
    assert!(OWN_PORTS.is_power_of_two());
};
