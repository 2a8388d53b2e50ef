//! Who is where in the tests' world.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU32,
};

use tapnat_common::{abi::EndpointKey, net::Be16};
use tapnat_testbed::packet::{self, Builder, Link, Parsed};

const fn device(index: u32) -> NonZeroU32 {
    NonZeroU32::new(index).unwrap()
}

pub const UPLINK: NonZeroU32 = device(2);
pub const TAP: NonZeroU32 = device(11);
pub const SECOND_TAP: NonZeroU32 = device(12);

pub const UPLINK_MTU: u16 = 1500;

/// The host's addresses on its taps.
pub const HOST: [[u8; 4]; 2] = [[10, 0, 0, 1], [10, 0, 1, 1]];
/// The host's address on its uplink.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// A guest on [`TAP`].
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
/// Another guest on [`TAP`], which may be a bridge's port.
pub const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 11);
/// A guest on [`SECOND_TAP`].
pub const OTHER_GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 20);
pub const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// A router on the way to the servers.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);

pub fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

pub fn ip(address: Ipv4Addr) -> IpAddr {
    address.into()
}

/// An endpoint as the tables have it.
pub fn endpoint(address: Ipv4Addr, port: u16, protocol: u8) -> EndpointKey {
    EndpointKey::new(address.into(), Be16::new(port), protocol)
}

/// A datagram with a payload.
pub fn udp(source: SocketAddr, destination: SocketAddr) -> Builder {
    packet::udp(source, destination).payload(b"datagram")
}

/// A TCP segment with flags as they are written: `S`, `A`, `F`, `R`, `P`.
pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: &str) -> Builder {
    packet::tcp(source, destination).with_tcp(|header| {
        for flag in flags.chars() {
            match flag {
                'S' => header.syn = true,
                'A' => header.ack = true,
                'F' => header.fin = true,
                'R' => header.rst = true,
                'P' => header.psh = true,
                other => panic!("no such flag: {other}"),
            }
        }
    })
}

/// An echo request with a payload.
pub fn ping(source: Ipv4Addr, destination: Ipv4Addr, identifier: u16) -> Builder {
    packet::echo_request(source.into(), destination.into(), identifier, 1).payload(b"abcdefgh")
}

/// An echo reply with a payload.
pub fn pong(source: Ipv4Addr, destination: Ipv4Addr, identifier: u16) -> Builder {
    packet::echo_reply(source.into(), destination.into(), identifier, 1).payload(b"abcdefgh")
}

/// The source of a packet; of an echo, its identifier is the port.
pub fn source(packet: &[u8]) -> SocketAddr {
    Parsed::new(Link::Ip, packet).unwrap().source()
}

/// The destination of a packet; of an echo, its identifier is the port.
pub fn destination(packet: &[u8]) -> SocketAddr {
    Parsed::new(Link::Ip, packet).unwrap().destination()
}
