//! What packets and endpoints are known by.

use core::num::NonZeroU32;

use crate::net::{Address, Be16, Be32, Be128};

/// Where a packet arrived, and its transport protocol: the protocol in the low
/// 8 bits, above them the inside device's index, or 0 for the outside.
///
/// The device is part of a flow's key, so that one guest cannot send in
/// another guest's sessions from another device.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Arrival(u32);

impl Arrival {
    /// On the inside device with this interface index, or from the outside.
    #[inline(always)]
    #[must_use]
    pub const fn of(device: Option<NonZeroU32>, protocol: u8) -> Self {
        match device {
            Some(device) => Self::inside(device, protocol),
            None => Self::outside(protocol),
        }
    }

    #[inline(always)]
    #[must_use]
    pub const fn outside(protocol: u8) -> Self {
        Self(protocol as u32)
    }

    /// On the inside device with this interface index (below 2^24).
    #[inline(always)]
    #[must_use]
    pub const fn inside(device: NonZeroU32, protocol: u8) -> Self {
        Self((device.get() << 8) | protocol as u32)
    }

    #[inline(always)]
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low 8 bits are asked for"
    )]
    pub const fn protocol(self) -> u8 {
        self.0 as u8
    }

    /// The inside device's interface index; `None` for the outside.
    #[inline(always)]
    #[must_use]
    pub const fn device(self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.0 >> 8)
    }
}

/// The key of [`super::maps::Names::sessions`]: the tuple of a packet as it arrives.
///
/// An ICMP query's identifier stands in the port of the side that asked; the
/// other port is 0. Protocols without ports have 0 in both.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey<A = Be32> {
    pub source: A,
    pub destination: A,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub arrival: Arrival,
}

impl<A: Address> FlowKey<A> {
    #[inline(always)]
    #[must_use]
    pub const fn source_endpoint(&self) -> EndpointKey<A> {
        EndpointKey::new(self.source, self.source_port, self.arrival.protocol())
    }

    #[inline(always)]
    #[must_use]
    pub const fn destination_endpoint(&self) -> EndpointKey<A> {
        EndpointKey::new(
            self.destination,
            self.destination_port,
            self.arrival.protocol(),
        )
    }
}

/// An address, a port (or ICMP identifier) and a protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndpointKey<A = Be32> {
    pub address: A,
    pub port: Be16,
    pub protocol: u8,
    _zero: u8,
}

impl<A: Address> EndpointKey<A> {
    #[inline(always)]
    #[must_use]
    pub const fn new(address: A, port: Be16, protocol: u8) -> Self {
        Self {
            address,
            port,
            protocol,
            _zero: 0,
        }
    }

    /// Every endpoint of an address at once: the key of a 1:1 mapping.
    #[inline(always)]
    #[must_use]
    pub const fn whole(address: A) -> Self {
        Self::new(address, Be16::ZERO, 0)
    }

    /// Whether this stands for every endpoint of its address: no packet has
    /// this transport protocol, whose number is an IPv6 extension header's.
    #[inline(always)]
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.protocol == 0
    }
}

const _: () = {
    assert!(size_of::<FlowKey>() == 16);
    assert!(size_of::<FlowKey<Be128>>() == 40);
    assert!(size_of::<EndpointKey>() == 8);
    assert!(size_of::<EndpointKey<Be128>>() == 20);
};
