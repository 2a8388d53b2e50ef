//! What the operator set.

use super::MAX_OUTSIDE_ADDRESSES;
use crate::{
    nat::STAMP_AFTER,
    net::{Address, Be32, Be128},
    time::{Instant, Slot, Ticks},
};

/// How long things live without traffic, in ticks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// RFC 4787 REQ-5: at least 2, by default 5 minutes.
    pub udp: Ticks,
    /// RFC 5382 REQ-5: at least 2 hours 4 minutes.
    pub tcp_established: Ticks,
    /// RFC 5382 REQ-5: at least 4 minutes.
    pub tcp_opening: Ticks,
    /// RFC 5382 REQ-5: at least 4 minutes; reset sessions, too.
    pub tcp_closing: Ticks,
    /// RFC 5508 REQ-2: at least 60 seconds.
    pub icmp: Ticks,
    /// Protocols that are translated by address only.
    pub other: Ticks,
    /// RFC 6888 REQ-8: how long a freed port rests before another guest gets it.
    pub port_rest: Ticks,
    /// RFC 791: how long fragments of a datagram are waited for.
    pub fragment: Ticks,
    /// For want of room: how long sessions live at most that nobody has answered
    /// in; 0 while there is room.
    pub unanswered: Ticks,
}

impl Timeouts {
    /// What [`Settings::confirm_after`] is to be: eight seconds, and less where
    /// something lives so short that eight seconds more would be much: a seventh of
    /// that.
    #[must_use]
    pub fn confirm_after(&self) -> u8 {
        const MOST: u8 = 15;
        let Self {
            udp,
            tcp_established,
            tcp_opening,
            tcp_closing,
            icmp,
            other,
            port_rest: _,
            fragment: _,
            unanswered: _,
        } = *self;
        let shortest = [tcp_established, tcp_opening, tcp_closing, icmp, other]
            .into_iter()
            .fold(udp, Ord::min);
        (shortest / 7).slots().clamp(1, MOST)
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            udp: Ticks::from_seconds(300),
            tcp_established: Ticks::from_seconds(7440),
            tcp_opening: Ticks::from_seconds(240),
            tcp_closing: Ticks::from_seconds(240),
            icmp: Ticks::from_seconds(60),
            other: Ticks::from_seconds(300),
            port_rest: Ticks::from_seconds(120),
            fragment: Ticks::from_seconds(15),
            unanswered: Ticks::new(0),
        }
    }
}

/// RFC 4787 section 5: which remotes a mapping lets in.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filtering {
    EndpointIndependent = 0,
    #[default]
    AddressDependent = 1,
    AddressAndPortDependent = 2,
}

/// RFC 4787 section 4.1: whether an inside endpoint keeps its outside endpoint
/// for every remote.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MappingMode {
    #[default]
    EndpointIndependent = 0,
    AddressAndPortDependent = 1,
}

/// Bits of [`Settings::flags`].
pub mod setting_flags {
    /// Packets from outside keep a UDP or ICMP session alive too (RFC 4787 REQ-6).
    pub const INBOUND_REFRESH: u32 = 1 << 0;
    /// SYNs from outside that nobody asked for go to the host, whatever the port,
    /// instead of waiting for a simultaneous open (RFC 5382 REQ-4).
    pub const PASS_UNSOLICITED: u32 = 1 << 1;
    /// There is something in [`crate::abi::maps::Names::untranslated`].
    pub const UNTRANSLATED: u32 = 1 << 2;
    /// There are static mappings of addresses that are not in the pool, which
    /// guests have to be looked up for, too.
    pub const STATIC_ADDRESSES: u32 = 1 << 3;
    /// For whoever reads the tables: the programs have [`globals::COUNT_TRAFFIC`](crate::abi::globals::COUNT_TRAFFIC).
    pub const COUNTED: u32 = 1 << 4;
    /// There is something in [`crate::abi::maps::Names::denied`].
    pub const DENY: u32 = 1 << 5;
    /// Guests must not reach each other over outside addresses either.
    pub const ISOLATE: u32 = 1 << 6;
    /// Guests may reach each other under their own addresses, through the host.
    pub const ROUTE_GUESTS: u32 = 1 << 14;
    /// Guests must not reach the host, nor networks that are not behind the uplink.
    pub const DENY_HOST: u32 = 1 << 7;
    /// A guest's address may move to another link address at any time.
    pub const ROAMING: u32 = 1 << 8;
    /// The host's FORWARD chain decides about sessions' first packets.
    pub const ASK_FIREWALL: u32 = 1 << 9;
    /// For whoever writes it: every session that was there is asked about again, or
    /// was accepted.
    pub const FIREWALL_KNOWS: u32 = 1 << 13;
    /// For whoever reads the tables: [`programs::OUTSIDE_XDP`](crate::abi::programs::OUTSIDE_XDP)
    /// is at the uplink.
    pub const XDP: u32 = 1 << 10;
    /// For whoever reads the tables: the operator said whether it is to be.
    pub const HOOK_GIVEN: u32 = 1 << 11;
    /// For whoever reads the tables: it could be, as far as the uplink goes.
    pub const XDP_POSSIBLE: u32 = 1 << 12;
}

/// What the operator set for one family, index 0 of [`super::maps::Names::settings`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings<A = Be32> {
    pub abi_version: u32,
    /// [`setting_flags`].
    pub flags: u32,
    pub timeouts: Timeouts,
    /// The pool of outside addresses; the first `outside_count` are valid.
    pub outside: [A; MAX_OUTSIDE_ADDRESSES],
    pub outside_count: u32,
    /// Sessions that one guest may have; 0 for no limit.
    pub guest_max_sessions: u32,
    /// Sessions that one guest may begin in a second, [`super::MOST_NEW_SESSIONS`] at most;
    /// 0 for no limit.
    pub guest_new_sessions: u32,
    /// Outside ports that one guest may hold; 0 for no limit.
    pub guest_max_ports: u32,
    /// Rises when routes, neighbours or devices changed: cached next hops of
    /// another generation are looked up anew.
    pub generation: u8,
    /// Slots after which a session's next packet has its next hop looked up again
    /// and keeps its mapping alive. See [`Timeouts::confirm_after`].
    pub confirm_after: u8,
    /// [`Filtering`] of TCP, and of everything else.
    pub filtering_tcp: u8,
    pub filtering_udp: u8,
    /// [`MappingMode`] of TCP, and of everything else.
    pub mapping_tcp: u8,
    pub mapping_udp: u8,
    /// The largest TCP segment that a SYN may announce, in bytes; 0 leaves them.
    pub clamp_mss: u16,
}

impl<A: Address> Settings<A> {
    /// When a session that begins `now` shall have been confirmed: so that it is
    /// in the next slot, when the neighbour will have been found, and what went
    /// wrong with another CPU's packets is put right.
    #[inline(always)]
    #[must_use]
    pub const fn confirmed_before(&self, now: Instant) -> Slot {
        now.slot().before(self.confirm_after.wrapping_sub(1))
    }

    /// How much longer than its sessions a mapping may have to live, as it is
    /// kept alive only when they are confirmed.
    #[inline(always)]
    #[must_use]
    pub const fn mapping_slack(&self) -> Ticks {
        STAMP_AFTER.plus(Ticks::from_slots(self.confirm_after))
    }

    /// Whether the address is one that guests' packets are translated to.
    #[inline(always)]
    #[must_use]
    pub fn is_outside(&self, address: A) -> bool {
        self.place_of_outside(address).is_some()
    }

    /// The place of an outside address in the pool.
    #[inline(always)]
    #[must_use]
    pub fn place_of_outside(&self, address: A) -> Option<u32> {
        // All of them: verifiers do not see that a count from a table is small.
        (0..)
            .zip(&self.outside)
            .find(|(_, outside)| **outside == address)
            .map(|(place, _)| place)
            .filter(|place| *place < self.outside_count)
    }

    #[inline(always)]
    #[must_use]
    pub const fn filtering(&self, protocol: u8) -> Filtering {
        let number = if protocol == crate::net::protocol::TCP {
            self.filtering_tcp
        } else {
            self.filtering_udp
        };
        match number {
            0 => Filtering::EndpointIndependent,
            1 => Filtering::AddressDependent,
            // An unknown number can only be stricter than what it stands for.
            2..=u8::MAX => Filtering::AddressAndPortDependent,
        }
    }

    #[inline(always)]
    #[must_use]
    pub const fn mapping(&self, protocol: u8) -> MappingMode {
        let number = if protocol == crate::net::protocol::TCP {
            self.mapping_tcp
        } else {
            self.mapping_udp
        };
        match number {
            0 => MappingMode::EndpointIndependent,
            1..=u8::MAX => MappingMode::AddressAndPortDependent,
        }
    }
}

const _: () = {
    assert!(size_of::<Settings>() == 4 + 4 + 36 + 64 + 4 + 4 + 4 + 4 + 8);
    assert!(size_of::<Settings<Be128>>() == 4 + 4 + 36 + 256 + 4 + 4 + 4 + 4 + 8);
};
