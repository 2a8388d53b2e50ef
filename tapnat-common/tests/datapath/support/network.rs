//! Who is where in the tests' world, in either IP version, and what each calls the
//! same thing: a test that says nothing of the version runs for both.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    ops::Range,
};

use etherparse::IpNumber;
use tapnat_common::{
    abi::EndpointKey,
    net::{Be16, Be32, Be128},
    network::Network,
    parse::Packet,
    verdict::Reason,
};
use tapnat_testbed::packet::{self, Builder, Link, Parsed, checksum};

use super::{frame::Bytes, world::pieces};

const fn device(index: u32) -> NonZeroU32 {
    NonZeroU32::new(index).unwrap()
}

pub const UPLINK: NonZeroU32 = device(2);
pub const TAP: NonZeroU32 = device(11);
pub const SECOND_TAP: NonZeroU32 = device(12);

pub const UPLINK_MTU: u16 = 1500;

/// Makes two tests of a function that is generic over the IP version: `name::v4` and
/// `name::v6`.
macro_rules! both_families {
    ($name:ident) => {
        mod $name {
            #[test]
            fn v4() {
                super::$name::<tapnat_common::net::Be32>();
            }

            #[test]
            fn v6() {
                super::$name::<tapnat_common::net::Be128>();
            }
        }
    };
}
pub(crate) use both_families;

/// See [`Version::with_options`].
pub const MOST_OPTIONS: usize = 10;

/// Type and code of an ICMP message.
pub type IcmpKind = (u8, u8);

/// An IP version, with the addresses that its tests have.
pub trait Version: Network + Into<IpAddr> {
    /// Bytes of a header without options or extension headers.
    const HEADER: usize;
    /// Where the time to live is in it, or the hop limit.
    const TIME_TO_LIVE: usize;
    /// Whether a whole packet has an identification.
    const IDENTIFIES_WHOLE: bool;
    /// Bits of the prefix of every network.
    const PREFIX: u8;
    /// The precedence of an ICMP error of ours.
    const PRECEDENCE_OF_ERRORS: u8;

    /// The host's addresses on its taps.
    const HOST: [Self; 2];
    /// The host's address on its uplink.
    const OUTSIDE: Self;
    /// A guest on [`TAP`].
    const GUEST: Self;
    /// Another guest on [`TAP`], which may be a bridge's port.
    const NEIGHBOUR: Self;
    /// A guest on [`SECOND_TAP`].
    const OTHER_GUEST: Self;
    const SERVER: Self;
    const OTHER_SERVER: Self;
    /// A router on the way to the servers.
    const ROUTER: Self;
    /// The host itself, as no packet on a wire may name it.
    const LOOPBACK: Self;
    /// All hosts of a link.
    const MULTICAST: Self;
    /// Whom nothing may be forwarded to, [`Version::UNSPECIFIED`] and
    /// [`Version::LOOPBACK`] among them.
    const UNROUTABLE: &'static [Self];
    /// Several hosts at once, [`Version::MULTICAST`] among them.
    const GROUPS: &'static [Self];
    /// What no guest may have in the network of [`TAP`].
    const NO_GUESTS: &'static [Self];
    /// What a host sends as that has no address yet; whom it asks for one, and by which
    /// port of its own.
    const NEWCOMER: Self;
    const DHCP_SERVERS: Self;
    const DHCP_CLIENT: u16;

    /// Errors: what does not fit a link, what was under way for too long, what an
    /// administrator does not want, what nobody listens for, what cannot be got to, and
    /// what makes no sense.
    const TOO_BIG: IcmpKind;
    const TIME_EXCEEDED: IcmpKind;
    const PROHIBITED: IcmpKind;
    const PORT_UNREACHABLE: IcmpKind;
    const HOST_UNREACHABLE: IcmpKind;
    const PARAMETER_PROBLEM: IcmpKind;
    /// A better router, which only the own link may tell of; and what becomes of one that
    /// a guest sends.
    const REDIRECT: (IcmpKind, Reason);
    /// What is neither a query nor an error.
    const OTHER_KIND: IcmpKind;
    /// More such types.
    const OTHER_TYPES: &'static [u8];
    /// What says behind the checksum of an error that so many bytes are quoted before an
    /// extension (RFC 4884 section 4).
    const EXTENDED: [u8; 4];
    const QUOTED_BEFORE_EXTENSION: usize = 128;
    /// The types of the errors, each with so many codes.
    const ERROR_TYPES: &'static [(u8, u8)];

    /// An address of a guest's network; the host's there is the first.
    fn inside(network: u8, host: u8) -> Self;
    /// An address of the network that the uplink is in.
    fn uplink(host: u8) -> Self;
    /// An address of a network that is none of those.
    fn elsewhere(host: u8) -> Self;
    /// An address of the network that the servers are in.
    fn world(host: u8) -> Self;
    /// From as many bytes as an address has.
    fn address(bytes: &[u8]) -> Self;

    /// Gives a packet what few have: options, or extension headers, of an amount from 1 to
    /// [`MOST_OPTIONS`].
    fn with_options(builder: Builder, amount: usize) -> Builder;

    /// Source and destination of a packet.
    fn ends(packet: &[u8]) -> [Self; 2] {
        let length = size_of::<Self>();
        let start = Self::HEADER - 2 * length;
        let address = |at: usize| Self::address(&packet[at..at + length]);
        [address(start), address(start + length)]
    }
    /// What is where in a packet. `None` of one that ends before that is told.
    fn shape(packet: &[u8]) -> Option<Shape>;
    /// Whether translating may change this byte of a header without what follows it.
    fn changes(place: usize) -> bool;
    /// The length that a packet says it has, in bytes; 0 if it is too long to say so.
    fn length(packet: &[u8]) -> usize;
    /// Has a packet say that it has so many bytes, if it has what says it. IPv6's has no
    /// fewer than its header.
    fn set_length(packet: &mut [u8], length: usize);
    /// The type of the ICMP message that answers one of this type, if it is a query; or that
    /// it answers.
    fn counterpart(icmp_type: u8) -> Option<u8>;
    /// Makes a fragment the last one, at this offset in units of 8 bytes. Its checksum is
    /// left as it is.
    fn set_fragment_offset(packet: &mut [u8], units: u16);
    /// The packet after so many hops.
    fn aged(packet: &[u8], hops: u8) -> Vec<u8>;
    /// What a packet is cut into that is too long for the way on.
    fn pieces(frame: Bytes, packet: &Packet<Self>, mtu: u16) -> Vec<Bytes>;
}

/// What tells frames of the other IP version.
pub fn other_ethertype<A: Version>() -> [u8; 2] {
    if A::ETHERTYPE == Be32::ETHERTYPE {
        Be128::ETHERTYPE
    } else {
        Be32::ETHERTYPE
    }
}

/// What is where in a packet, read without the code under test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    pub protocol: u8,
    /// Where the transport header begins, or what a later fragment has in its place.
    pub transport: usize,
    pub is_later: bool,
    /// Of a fragment, where its identification is.
    pub identification: Option<Range<usize>>,
}

impl Version for Be32 {
    const HEADER: usize = 20;
    const TIME_TO_LIVE: usize = 8;
    const IDENTIFIES_WHOLE: bool = true;
    const PREFIX: u8 = 24;
    // Internetwork control (RFC 1812 section 4.3.2.5).
    const PRECEDENCE_OF_ERRORS: u8 = 6;

    const HOST: [Self; 2] = [
        Self::from_bytes([10, 0, 0, 1]),
        Self::from_bytes([10, 0, 1, 1]),
    ];
    const OUTSIDE: Self = Self::from_bytes([198, 51, 100, 1]);
    const GUEST: Self = Self::from_bytes([10, 0, 0, 10]);
    const NEIGHBOUR: Self = Self::from_bytes([10, 0, 0, 11]);
    const OTHER_GUEST: Self = Self::from_bytes([10, 0, 1, 20]);
    const SERVER: Self = Self::from_bytes([203, 0, 113, 1]);
    const OTHER_SERVER: Self = Self::from_bytes([203, 0, 113, 2]);
    const ROUTER: Self = Self::from_bytes([192, 0, 2, 77]);
    const LOOPBACK: Self = Self::from_bytes([127, 0, 0, 1]);
    const MULTICAST: Self = Self::from_bytes([224, 0, 0, 1]);
    const UNROUTABLE: &'static [Self] = &[
        Self::ZERO,
        Self::from_bytes([0, 1, 2, 3]),
        Self::LOOPBACK,
        Self::from_bytes([127, 9, 9, 9]),
        Self::from_bytes([240, 0, 0, 1]),
        Self::from_bytes([255, 255, 255, 254]),
    ];
    const GROUPS: &'static [Self] = &[
        Self::MULTICAST,
        Self::from_bytes([224, 0, 0, 251]),
        Self::from_bytes([239, 255, 255, 250]),
        Self::from_bytes([255; 4]),
    ];
    // The network itself, and its broadcast address.
    const NO_GUESTS: &'static [Self] = &[
        Self::HOST[0],
        Self::from_bytes([10, 0, 0, 0]),
        Self::from_bytes([10, 0, 0, 255]),
    ];
    const NEWCOMER: Self = Self::ZERO;
    const DHCP_SERVERS: Self = Self::from_bytes([255; 4]);
    const DHCP_CLIENT: u16 = 68;

    const TOO_BIG: IcmpKind = (3, 4);
    const TIME_EXCEEDED: IcmpKind = (11, 0);
    const PROHIBITED: IcmpKind = (3, 13);
    const PORT_UNREACHABLE: IcmpKind = (3, 3);
    const HOST_UNREACHABLE: IcmpKind = (3, 1);
    const PARAMETER_PROBLEM: IcmpKind = (12, 0);
    const REDIRECT: (IcmpKind, Reason) = ((5, 1), Reason::IcmpTypeNotCarried);
    // An address mask request.
    const OTHER_KIND: IcmpKind = (17, 0);
    // Quench and redirect must not be forwarded (RFC 6633, RFC 1812).
    const OTHER_TYPES: &'static [u8] = &[4, 5, 9, 17];
    // In words of 32 bits.
    const EXTENDED: [u8; 4] = [0, 32, 0, 0];
    const ERROR_TYPES: &'static [(u8, u8)] = &[(3, 16), (11, 2), (12, 2)];

    fn inside(network: u8, host: u8) -> Self {
        Self::from_bytes([10, 0, network, host])
    }

    fn uplink(host: u8) -> Self {
        Self::from_bytes([198, 51, 100, host])
    }

    fn world(host: u8) -> Self {
        Self::from_bytes([203, 0, 113, host])
    }

    fn elsewhere(host: u8) -> Self {
        Self::from_bytes([172, 17, 0, host])
    }

    fn address(bytes: &[u8]) -> Self {
        Self::from_bytes(bytes.try_into().unwrap())
    }

    /// So many words: a router alert, or a record of the route.
    fn with_options(builder: Builder, amount: usize) -> Builder {
        let mut options = vec![0; amount * 4];
        if amount == 1 {
            options.copy_from_slice(&[0x94, 4, 0, 0]);
        } else {
            options[..3].copy_from_slice(&[7, u8::try_from(amount * 4 - 1).unwrap(), 4]);
        }
        builder.options(&options)
    }

    fn shape(packet: &[u8]) -> Option<Shape> {
        let transport = usize::from(packet.first()? & 15) * 4;
        let [high, low] = packet.get(6..8)?.try_into().unwrap();
        let field = u16::from_be_bytes([high, low]);
        Some(Shape {
            protocol: *packet.get(9)?,
            transport,
            is_later: field & 0x1fff != 0,
            identification: (field & 0x3fff != 0).then_some(4..6),
        })
    }

    fn changes(place: usize) -> bool {
        matches!(place, 8 | 10..20)
    }

    fn length(packet: &[u8]) -> usize {
        u16::from_be_bytes([packet[2], packet[3]]).into()
    }

    fn set_length(packet: &mut [u8], length: usize) {
        let length = u16::try_from(length).unwrap();
        if let Some(field) = packet.get_mut(2..4) {
            field.copy_from_slice(&length.to_be_bytes());
        }
    }

    fn counterpart(icmp_type: u8) -> Option<u8> {
        match icmp_type {
            0 | 8 => Some(8 - icmp_type),
            13 | 14 => Some(27 - icmp_type),
            _ => None,
        }
    }

    fn set_fragment_offset(packet: &mut [u8], units: u16) {
        packet[6..8].copy_from_slice(&units.to_be_bytes());
    }

    fn aged(packet: &[u8], hops: u8) -> Vec<u8> {
        let mut bytes = packet.to_vec();
        let header = usize::from(bytes[0] & 15) * 4;
        bytes[8] -= hops;
        bytes[10..12].fill(0);
        let check = !checksum::sum(&[&bytes[..header]]);
        bytes[10..12].copy_from_slice(&check.to_be_bytes());
        bytes
    }

    fn pieces(frame: Bytes, packet: &Packet, mtu: u16) -> Vec<Bytes> {
        pieces(frame, packet, mtu)
    }
}

/// An address of documentation, or of guests, by its network and its last byte.
const fn six(network: [u16; 4], host: u8) -> Be128 {
    let [a, b, c, d] = network;
    Be128::new(
        (a as u128) << 112
            | (b as u128) << 96
            | (c as u128) << 80
            | (d as u128) << 64
            | host as u128,
    )
}

const fn six_inside(network: u8, host: u8) -> Be128 {
    six([0xfd00, 0x7a70, 0, network as u16], host)
}

const fn six_world(host: u8) -> Be128 {
    six([0x2001, 0xdb8, 2, 0], host)
}

const fn six_uplink(host: u8) -> Be128 {
    six([0x2001, 0xdb8, 1, 0], host)
}

impl Version for Be128 {
    const HEADER: usize = 40;
    const TIME_TO_LIVE: usize = 7;
    const IDENTIFIES_WHOLE: bool = false;
    const PREFIX: u8 = 64;
    const PRECEDENCE_OF_ERRORS: u8 = 0;

    const HOST: [Self; 2] = [six_inside(0, 1), six_inside(1, 1)];
    const OUTSIDE: Self = six_uplink(1);
    const GUEST: Self = six_inside(0, 10);
    const NEIGHBOUR: Self = six_inside(0, 11);
    const OTHER_GUEST: Self = six_inside(1, 20);
    const SERVER: Self = six_world(1);
    const OTHER_SERVER: Self = six_world(2);
    const ROUTER: Self = six([0x2001, 0xdb8, 3, 0], 77);
    const LOOPBACK: Self = Self::new(1);
    const MULTICAST: Self = six([0xff02, 0, 0, 0], 1);
    // What is mapped from IPv4 is nothing that may be on a wire.
    const UNROUTABLE: &'static [Self] = &[
        Self::ZERO,
        Self::LOOPBACK,
        Self::new(0xffff << 32 | 0xcb00_7101),
    ];
    // Of every scope.
    const GROUPS: &'static [Self] = &[
        Self::MULTICAST,
        six([0xff02, 0, 0, 0], 0xfb),
        six([0xff05, 0, 0, 0], 0xfb),
        six([0xff0e, 0, 0, 0], 0xfb),
    ];
    // All routers of the network.
    const NO_GUESTS: &'static [Self] = &[Self::HOST[0], six_inside(0, 0)];
    const NEWCOMER: Self = six([0xfe80, 0, 0, 0], 10);
    const DHCP_SERVERS: Self = Self::new(0xff02 << 112 | 0x1_0002);
    const DHCP_CLIENT: u16 = 546;

    const TOO_BIG: IcmpKind = (2, 0);
    const TIME_EXCEEDED: IcmpKind = (3, 0);
    const PROHIBITED: IcmpKind = (1, 1);
    const PORT_UNREACHABLE: IcmpKind = (1, 4);
    const HOST_UNREACHABLE: IcmpKind = (1, 3);
    const PARAMETER_PROBLEM: IcmpKind = (4, 0);
    const REDIRECT: (IcmpKind, Reason) = ((137, 0), Reason::SpoofedRouter);
    // A node information query.
    const OTHER_KIND: IcmpKind = (139, 0);
    // Multicast listeners, neighbours and routers are the link's; what is below 128 is an
    // error that nobody knows.
    const OTHER_TYPES: &'static [u8] = &[
        0, 5, 100, 127, 130, 131, 132, 133, 134, 135, 136, 137, 139, 143, 255,
    ];
    // In words of 64 bits.
    const EXTENDED: [u8; 4] = [16, 0, 0, 0];
    const ERROR_TYPES: &'static [(u8, u8)] = &[(1, 8), (2, 1), (3, 2), (4, 3)];

    fn inside(network: u8, host: u8) -> Self {
        six_inside(network, host)
    }

    fn uplink(host: u8) -> Self {
        six_uplink(host)
    }

    fn world(host: u8) -> Self {
        six_world(host)
    }

    fn elsewhere(host: u8) -> Self {
        six([0x2001, 0xdb8, 0x17, 0], host)
    }

    fn address(bytes: &[u8]) -> Self {
        Self::from_bytes(bytes.try_into().unwrap())
    }

    /// A router alert, a routing header that is used up, and options for the destination,
    /// in the order that is recommended (RFC 8200 section 4.1).
    fn with_options(builder: Builder, amount: usize) -> Builder {
        let padding = |bytes: usize| {
            let length = u8::try_from(bytes - 4).unwrap();
            [vec![1, length], vec![0; bytes - 4]].concat()
        };
        let hop_by_hop = IpNumber::IPV6_HEADER_HOP_BY_HOP;
        let destination = IpNumber::IPV6_DESTINATION_OPTIONS;
        let alert = |builder: Builder| builder.extension(hop_by_hop, &[5, 2, 0, 0, 1, 0]);
        match amount {
            1 => alert(builder),
            MOST_OPTIONS => alert(builder)
                .extension(destination, &padding(8))
                .extension(IpNumber::IPV6_ROUTE_HEADER, &[4, 0, 0, 0, 0, 0])
                .extension(destination, &padding(120)),
            _ if amount.is_multiple_of(2) => builder.extension(destination, &padding(amount * 8)),
            _ => alert(builder).extension(destination, &padding(amount * 8)),
        }
    }

    fn shape(packet: &[u8]) -> Option<Shape> {
        let mut shape = Shape {
            protocol: *packet.get(6)?,
            transport: Self::HEADER,
            ..Shape::default()
        };
        while !shape.is_later {
            let at = shape.transport;
            let length = match IpNumber(shape.protocol) {
                IpNumber::IPV6_HEADER_HOP_BY_HOP
                | IpNumber::IPV6_ROUTE_HEADER
                | IpNumber::IPV6_DESTINATION_OPTIONS => 8 + usize::from(*packet.get(at + 1)?) * 8,
                IpNumber::IPV6_FRAGMENTATION_HEADER => {
                    let [high, low] = packet.get(at + 2..at + 4)?.try_into().unwrap();
                    shape.is_later = u16::from_be_bytes([high, low]) >> 3 != 0;
                    shape.identification = Some(at + 4..at + 8);
                    8
                }
                _ => break,
            };
            shape.protocol = *packet.get(at)?;
            shape.transport += length;
        }
        Some(shape)
    }

    fn changes(place: usize) -> bool {
        matches!(place, 7..40)
    }

    fn length(packet: &[u8]) -> usize {
        match u16::from_be_bytes([packet[4], packet[5]]) {
            0 => 0,
            length => Self::HEADER + usize::from(length),
        }
    }

    fn set_length(packet: &mut [u8], length: usize) {
        let length = u16::try_from(length.saturating_sub(Self::HEADER)).unwrap();
        if let Some(field) = packet.get_mut(4..6) {
            field.copy_from_slice(&length.to_be_bytes());
        }
    }

    fn counterpart(icmp_type: u8) -> Option<u8> {
        matches!(icmp_type, 128 | 129).then_some(icmp_type ^ 1)
    }

    fn set_fragment_offset(packet: &mut [u8], units: u16) {
        let identification = Self::shape(packet).unwrap().identification.unwrap();
        let end = identification.start;
        packet[end - 2..end].copy_from_slice(&(units << 3).to_be_bytes());
    }

    fn aged(packet: &[u8], hops: u8) -> Vec<u8> {
        let mut bytes = packet.to_vec();
        bytes[7] -= hops;
        bytes
    }

    /// Routers do not (RFC 8200 section 5).
    fn pieces(_frame: Bytes, packet: &Packet<Self>, _mtu: u16) -> Vec<Bytes> {
        panic!("{packet:?} is to be cut");
    }
}

pub fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

pub fn ip(address: impl Into<IpAddr>) -> IpAddr {
    address.into()
}

/// An endpoint as the tables have it.
pub fn endpoint<A: Version>(address: A, port: u16, protocol: u8) -> EndpointKey<A> {
    EndpointKey::new(address, Be16::new(port), protocol)
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
pub fn ping<A: Version>(source: A, destination: A, identifier: u16) -> Builder {
    packet::echo_request(source.into(), destination.into(), identifier, 1).payload(b"abcdefgh")
}

/// An echo reply with a payload.
pub fn pong<A: Version>(source: A, destination: A, identifier: u16) -> Builder {
    packet::echo_reply(source.into(), destination.into(), identifier, 1).payload(b"abcdefgh")
}

/// An ICMP error of this kind about a packet.
pub fn icmp_error<A: Version>(from: A, to: A, kind: IcmpKind, quoted: &[u8]) -> Builder {
    packet::icmp_error(from.into(), to.into(), kind, [0; 4], quoted)
}

/// The time to live of a packet, or its hop limit.
pub fn ttl(packet: &[u8]) -> u8 {
    Parsed::new(Link::Ip, packet).unwrap().ttl()
}

/// The source of a packet; of an echo, its identifier is the port.
pub fn source(packet: &[u8]) -> SocketAddr {
    Parsed::new(Link::Ip, packet).unwrap().source()
}

/// The destination of a packet; of an echo, its identifier is the port.
pub fn destination(packet: &[u8]) -> SocketAddr {
    Parsed::new(Link::Ip, packet).unwrap().destination()
}
