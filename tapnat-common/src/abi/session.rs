//! Sessions: two halves each, and what a first packet from outside leaves.

use core::num::NonZeroU32;

use super::{Arrival, FlowKey};
use crate::{
    checksum::Delta,
    frame::LinkAddresses,
    net::{Address, Be16, Be32, Be128},
    time::{Instant, Slot, Ticks},
};

/// Bits of [`Session::flags`].
pub mod session_flags {
    /// The half that the session's first packet travelled.
    pub const INITIATOR: u8 = 1 << 0;
    /// Packets of this half leave on an inside device.
    pub const TO_INSIDE: u8 = 1 << 1;
    /// [`super::Session::next_hop`]'s link addresses are valid.
    pub const NEXT_HOP_KNOWN: u8 = 1 << 2;
    /// The session stands on its own port, with no endpoint-independent mapping.
    pub const UNMAPPED: u8 = 1 << 3;
    /// The TCP window scale that this half's sender announced, in the high bits.
    pub const WINDOW_SCALE_SHIFT: u8 = 4;
}

/// Bits of [`Session::tcp`]: what this half's sender has shown.
pub mod tcp_state {
    pub const SYN: u8 = 1 << 0;
    pub const FIN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    /// Has acknowledged the other half's SYN, or was picked up in mid-stream.
    pub const OPEN: u8 = 1 << 3;
    /// The host's firewall has to be asked about the session again. In both halves,
    /// until a packet of the one that began it was accepted; not TCP's alone.
    pub const TO_ASK: u8 = 1 << 4;
    /// A packet of this half has come by since, the first in the slot
    /// [`super::Session::confirmed`].
    pub const ASKED: u8 = 1 << 5;
    /// What the firewall has to do with it.
    pub const FIREWALL: u8 = TO_ASK | ASKED;
    /// The state in which a packet without SYN, FIN and RST changes nothing.
    pub const STEADY: u8 = SYN | OPEN;
}

/// Where packets of a session leave, and their link addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextHop {
    /// Interface index.
    pub device: u32,
    /// The neighbour's link address, then our device's.
    pub link: LinkAddresses,
}

/// One direction of a session, the value of [`super::maps::Names::sessions`]: all that an
/// established packet needs, in one cache line.
///
/// The packets of this direction write it, and the other direction's only when
/// a session (re)starts. User space only reads and deletes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Session<A = Be32> {
    /// What becomes the packet's source and destination.
    pub source: A,
    pub destination: A,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// [`Delta`] of the addresses, and of the ports, to the checksums.
    pub address_delta: u16,
    pub port_delta: u16,
    pub next_hop: NextHop,
    /// When a packet of this direction last came by, to within
    /// [`crate::nat::STAMP_AFTER`].
    pub last_seen: Instant,
    /// The MTU of the way out in bytes.
    pub mtu: u16,
    /// [`super::Settings::generation`] when the next hop was looked up.
    pub generation: u8,
    /// When next hop and mapping were last looked at. See
    /// [`super::Settings::confirm_after`].
    pub confirmed: Slot,
    pub tcp: u8,
    pub flags: u8,
    /// TCP: the last window this half's sender announced, unscaled.
    pub window: Be16,
    /// TCP: the last acknowledgement number this half's sender sent.
    pub acknowledged: Be32,
    /// Counted only with [`super::globals::COUNT_TRAFFIC`].
    pub packets: u64,
    /// Bytes of IP packets, headers included.
    pub bytes: u64,
}

impl<A: Address> Session<A> {
    /// The key under which the other direction's packets arrive, given the key
    /// of this one's.
    #[inline(always)]
    #[must_use]
    pub const fn twin_key(&self, key: &FlowKey<A>) -> FlowKey<A> {
        let protocol = key.arrival.protocol();
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            arrival: self.twin_arrival(protocol),
        }
    }

    /// Where the other direction's packets arrive.
    #[inline(always)]
    #[must_use]
    pub const fn twin_arrival(&self, protocol: u8) -> Arrival {
        match NonZeroU32::new(self.next_hop.device) {
            Some(device) if self.flags & session_flags::TO_INSIDE != 0 => {
                Arrival::inside(device, protocol)
            }
            Some(_) | None => Arrival::outside(protocol),
        }
    }

    /// Whether both make the same of a packet.
    #[inline(always)]
    #[must_use]
    pub fn translates_as(&self, other: &Self) -> bool {
        self.source == other.source
            && self.destination == other.destination
            && self.source_port == other.source_port
            && self.destination_port == other.destination_port
    }

    #[inline(always)]
    #[must_use]
    pub const fn address_delta(&self) -> Delta {
        Delta::from_stored(self.address_delta)
    }

    #[inline(always)]
    #[must_use]
    pub const fn port_delta(&self) -> Delta {
        Delta::from_stored(self.port_delta)
    }
}

/// A SYN from outside that nobody asked for, the value of [`super::maps::Names::unsolicited`],
/// keyed as its session would be. The datapath adds them, user space answers
/// and removes them (RFC 5382 REQ-4).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsolicited {
    pub arrived: Instant,
    pub sequence: Be32,
}

/// How long a SYN from outside goes unanswered: a SYN from inside in that time
/// makes it a simultaneous open (RFC 5382 REQ-4).
pub const UNSOLICITED_WAIT: Ticks = Ticks::from_seconds(6);

const _: () = {
    // 48 bytes of hash element, 16 of key and 64 of value are two cache lines.
    assert!(size_of::<Session>() == 64);
    assert!(size_of::<Session<Be128>>() == 88);
};
