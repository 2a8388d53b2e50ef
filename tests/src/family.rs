//! The two families of IP, so that one test runs for both: which addresses a
//! world has in each, and what each calls the same thing. Tests that only one
//! of them can have say so in `docs/rfc-compliance.md`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use tapnat_testbed::topology::{
    Builder, GATEWAY, GATEWAY6, Guest, HOST_ADDRESS, HOST_ADDRESS6, Inside, Topology,
    WORLD_ADDRESSES, WORLD_ADDRESSES6,
};

use crate::{
    wires::{SILENT_HOST, Wires},
    world::World,
};

pub use Family::{V4, V6};

/// Makes two tests of a function that takes the family: `name::v4` and
/// `name::v6`.
#[macro_export]
macro_rules! both_families {
    ($name:ident) => {
        mod $name {
            #[test]
            fn v4() -> anyhow::Result<()> {
                super::$name($crate::family::V4)
            }

            #[test]
            fn v6() -> anyhow::Result<()> {
                super::$name($crate::family::V6)
            }
        }
    };
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// Type and code of an ICMP or ICMPv6 message.
pub type IcmpKind = (u8, u8);

impl Family {
    /// Of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => V4,
            IpAddr::V6(_) => V6,
        }
    }

    /// What to build for a world in which there is no other family.
    #[must_use]
    pub fn topology(self) -> Builder {
        match self {
            V4 => Topology::builder(),
            V6 => Topology::builder().ipv6_only(),
        }
    }

    /// A world with this many guests on veths, and its wires.
    ///
    /// # Errors
    /// It cannot be built, or the program does not become ready.
    pub fn wired(self, guests: u8, arguments: &[&str]) -> Result<(World, Wires)> {
        let builder = self.topology().inside(Inside::Veth).guests(guests);
        let world = World::start(builder, arguments)?;
        let wires = Wires::open(&world)?;
        Ok((world, wires))
    }

    /// An address of a guest's network; the host's there is the first.
    #[must_use]
    pub fn inside_host(self, network: u8, host: u8) -> IpAddr {
        self.address([10, 0, network], [0xfd00, 0x7a70, 0, network.into()], host)
    }

    /// The address of a guest.
    #[must_use]
    pub fn address_of(self, guest: &Guest) -> IpAddr {
        let [.., network, host] = guest.address.octets();
        self.inside_host(network, host)
    }

    /// A guest's gateway: the host's address on its device.
    #[must_use]
    pub fn gateway_of(self, guest: &Guest) -> IpAddr {
        let [.., network, host] = guest.gateway.octets();
        self.inside_host(network, host)
    }

    /// An address of the network between the host and its gateway.
    #[must_use]
    pub fn uplink_host(self, host: u8) -> IpAddr {
        self.address([198, 51, 100], [0x2001, 0xdb8, 1, 0], host)
    }

    /// An address of the network behind the gateway. (The other networks that
    /// the world has end with a router that need not be there.)
    #[must_use]
    pub fn world_host(self, host: u8) -> IpAddr {
        self.address([203, 0, 113], [0x2001, 0xdb8, 2, 0], host)
    }

    fn address(self, network: [u8; 3], network6: [u16; 4], host: u8) -> IpAddr {
        match self {
            V4 => {
                let [a, b, c] = network;
                Ipv4Addr::new(a, b, c, host).into()
            }
            V6 => {
                let [a, b, c, d] = network6;
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, host.into()).into()
            }
        }
    }

    /// A router somewhere, which an error comes from.
    #[must_use]
    pub fn router(self) -> IpAddr {
        self.address([192, 0, 2], [0x2001, 0xdb8, 3, 0], 99)
    }

    /// The host's gateway.
    #[must_use]
    pub fn gateway(self) -> IpAddr {
        match self {
            V4 => GATEWAY.into(),
            V6 => GATEWAY6.into(),
        }
    }

    /// What the world sees in place of every guest, unless told otherwise.
    #[must_use]
    pub fn outside_address(self) -> IpAddr {
        match self {
            V4 => HOST_ADDRESS.into(),
            V6 => HOST_ADDRESS6.into(),
        }
    }

    /// An endpoint of the host on the uplink, which is also the guests' outside
    /// endpoint.
    #[must_use]
    pub fn outside(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.outside_address(), port)
    }

    /// An endpoint of the world.
    ///
    /// # Panics
    /// The world has no such address.
    #[must_use]
    pub fn server(self, number: usize, port: u16) -> SocketAddr {
        let address = match self {
            V4 => WORLD_ADDRESSES[number].into(),
            V6 => WORLD_ADDRESSES6[number].into(),
        };
        SocketAddr::new(address, port)
    }

    /// An endpoint in the world that no kernel answers for: of the first such
    /// address, or the second.
    ///
    /// # Panics
    /// There are two.
    #[must_use]
    pub fn remote(self, number: u8, port: u16) -> SocketAddr {
        assert!(number < 2, "the world has two silent addresses");
        SocketAddr::new(self.world_host(SILENT_HOST + number), port)
    }

    /// Length in bytes of an IP header without options or extension headers.
    #[must_use]
    pub fn header_length(self) -> usize {
        match self {
            V4 => 20,
            V6 => 40,
        }
    }

    /// The ICMP errors that every NAT carries, of which RFC 5508 speaks, and
    /// those in RFC 4443: destination unreachable with every code, what is too
    /// big for a link, time exceeded, and parameter problem.
    #[must_use]
    pub fn errors(self) -> Vec<IcmpKind> {
        match self {
            // Among the unreachables is "fragmentation needed".
            V4 => self
                .unreachables()
                .chain([(11, 0), (11, 1), (12, 0), (12, 1)])
                .collect(),
            V6 => self
                .unreachables()
                .chain([(2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)])
                .collect(),
        }
    }

    /// Destination unreachable with every code.
    pub fn unreachables(self) -> impl Iterator<Item = IcmpKind> + Clone {
        let (kind, codes) = match self {
            V4 => (3, 0..16),
            V6 => (1, 0..8),
        };
        codes.map(move |code| (kind, code))
    }

    /// The error about what does not fit a link.
    #[must_use]
    pub fn too_big(self) -> IcmpKind {
        match self {
            V4 => (3, 4),
            V6 => (2, 0),
        }
    }

    /// The error about what has been under way for too long.
    #[must_use]
    pub fn time_exceeded(self) -> IcmpKind {
        match self {
            V4 => (11, 0),
            V6 => (3, 0),
        }
    }

    /// The error about what an administrator does not want.
    #[must_use]
    pub fn prohibited(self) -> IcmpKind {
        match self {
            V4 => (3, 13),
            V6 => (1, 1),
        }
    }

    /// The error about what nobody listens for.
    #[must_use]
    pub fn port_unreachable(self) -> IcmpKind {
        match self {
            V4 => (3, 3),
            V6 => (1, 4),
        }
    }
}
