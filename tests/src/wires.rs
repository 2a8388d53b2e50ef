//! The ends of a world's wires: packets sent byte by byte as a guest or the
//! world would, and everything that arrives there.
//!
//! The addresses here belong to no kernel, so that nobody answers but the
//! test. What must not arrive is told without waiting: packets do not overtake
//! each other, and a marker sent later does arrive.

use std::{
    cell::Cell,
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use etherparse::IpNumber;
use tapnat_testbed::{
    Namespace,
    capture::{Capture, Captured, Direction, Partial},
    packet::{self, Builder, Ip, Parsed},
    topology::{GUEST_DEVICE, Topology, UPLINK},
    traffic::FrameSender,
};

use crate::{
    family::{Family, V4},
    world::World,
};

/// How long a packet may be under way on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes before the IP header in frames of a wire with Ethernet.
pub const LINK_LENGTH: usize = 14;
/// The last byte of the address that a guest has besides its own.
pub(crate) const SILENT_HOST: u8 = 77;
/// Ports of the markers, which no test uses.
const MARKER: [u16; 2] = [64_999, 9];

/// [`Family::remote`] of IPv4.
#[must_use]
pub fn remote(number: u8, port: u16) -> SocketAddr {
    V4.remote(number, port)
}

/// One end of a wire.
#[derive(Debug)]
pub struct Wire {
    sender: FrameSender,
    capture: Capture,
    /// Our Ethernet address and that of the wire's other end.
    ethernet: Option<[[u8; 6]; 2]>,
    /// Packets of the capture that were looked at.
    seen: Cell<usize>,
}

/// A packet put together from its fragments, or one that came whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whole {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ttl: u8,
    /// What follows the IP header: transport header and payload.
    pub ip_payload: Vec<u8>,
    /// The lengths of the IP packets that it came in, in their order.
    pub pieces: Vec<usize>,
}

/// Everything that arrived at the ends of a world's wires.
#[derive(Debug, Clone)]
pub struct Arrivals {
    pub world: Vec<Captured>,
    /// By guest.
    pub guests: Vec<Vec<Captured>>,
}

/// The wires of a world.
#[derive(Debug)]
pub struct Wires {
    pub world: Wire,
    /// By guest.
    pub guests: Vec<Wire>,
    /// Of the addresses that no kernel answers for.
    pub family: Family,
    addresses: Vec<IpAddr>,
}

impl Wire {
    fn open(
        namespace: &Namespace,
        device: &str,
        peer: &Namespace,
        peer_device: &str,
    ) -> Result<Self> {
        let own = mac(namespace, device)?;
        let ethernet = own.zip(mac(peer, peer_device)?);
        // A host that forwarded would answer for the silent addresses.
        namespace.sysctl("net.ipv4.ip_forward", "0")?;
        namespace.sysctl("net.ipv6.conf.all.forwarding", "0")?;
        Ok(Self {
            sender: FrameSender::open(namespace, device)?,
            capture: Capture::start(namespace, device)?,
            ethernet: ethernet.map(|(own, peer)| [own, peer]),
            seen: Cell::new(0),
        })
    }

    /// Takes hold of the world's end of its wire alone.
    ///
    /// # Errors
    /// No root, or a device of the topology is missing.
    pub fn of_world(world: &World) -> Result<Self> {
        let Topology {
            host,
            router,
            world: outer,
            ..
        } = &world.topology;
        let (peer, peer_device) = match router {
            Some(router) => (router, "outer0"),
            None => (host, UPLINK),
        };
        let device = world.topology.world_device();
        if world.topology.has_ipv6() {
            // One that does not forward tells all the same that it has no route (Linux,
            // `ip6_pkt_drop()`), though for other than these it says nothing.
            outer.ip("-6 route replace blackhole 2001:db8:2::/64")?;
        }
        Self::open(outer, device, peer, peer_device)
    }

    /// Sends a packet to the wire's other end.
    ///
    /// # Errors
    /// It is too long for the device, or the device is down.
    pub fn send(&self, packet: &Builder) -> Result<()> {
        self.send_all(packet, |packet| vec![packet.build()])
    }

    /// Sends what `frames` makes of a packet that has the Ethernet header it
    /// needs here, in that order.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_all(
        &self,
        packet: &Builder,
        frames: impl FnOnce(&Builder) -> Vec<Vec<u8>>,
    ) -> Result<()> {
        let mut packet = packet.clone();
        if let Some([own, peer]) = self.ethernet {
            packet = packet.ethernet(own, peer);
        }
        frames(&packet)
            .iter()
            .try_for_each(|frame| self.sender.send(frame))
    }

    /// The next packet that arrives, which must have right checksums.
    ///
    /// # Errors
    /// None arrives, or one that cannot be read or has a wrong checksum.
    pub fn receive(&self) -> Result<Parsed> {
        self.receive_captured()?.parse()
    }

    /// The same with its bytes.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn receive_captured(&self) -> Result<Captured> {
        let packet = self.receive_unverified()?;
        packet
            .verify_checksums(Partial::Accept)
            .with_context(|| packet.summary())?;
        Ok(packet)
    }

    /// Waits for the next packet, and checks that it is this one.
    ///
    /// # Errors
    /// As [`Self::receive_captured`], or it is another one.
    pub fn receive_this(&self, expected: &Builder) -> Result<()> {
        self.receive_captured()?.check(expected)
    }

    /// The next packet that arrives, whatever it is.
    ///
    /// # Errors
    /// None arrives.
    pub fn receive_unverified(&self) -> Result<Captured> {
        let mut looked_at = 0;
        let packet = self.capture.wait_for(PATIENCE, |packet| {
            looked_at += 1;
            looked_at > self.seen.get() && packet.direction == Direction::In
        })?;
        self.seen.set(looked_at);
        Ok(packet)
    }

    /// The next packet that arrives, put together from its fragments, which
    /// arrive in any order, but with nothing in between.
    ///
    /// # Errors
    /// As [`receive`](Self::receive), or the fragments are not of one packet,
    /// or overlap.
    pub fn receive_whole(&self) -> Result<Whole> {
        let mut pieces = Vec::new();
        let mut parts = BTreeMap::new();
        let mut identification = None;
        loop {
            let packet = self.receive_captured()?;
            let parsed = packet.parse()?;
            let fragment = parsed.fragment().unwrap_or_default();
            let (headers, length) = lengths(packet.ip(), &parsed);
            let its = (
                fragment.identification,
                parsed.source_address(),
                parsed.destination_address(),
            );
            ensure!(
                *identification.get_or_insert(its) == its,
                "in between: {}",
                packet.summary()
            );
            let payload = packet.ip()[headers..length].to_vec();
            pieces.push(length);
            let is_new = parts.insert(fragment.start, (payload, fragment.more));
            ensure!(is_new.is_none(), "twice: {}", packet.summary());
            if let Some(ip_payload) = join(&parts) {
                return Ok(Whole {
                    source: parsed.source_address(),
                    destination: parsed.destination_address(),
                    ttl: parsed.ttl(),
                    ip_payload,
                    pieces,
                });
            }
        }
    }

    /// What arrives before the marker.
    fn receive_until_marker(&self) -> Result<(Vec<Captured>, SocketAddr)> {
        let mut packets = Vec::new();
        loop {
            let packet = self.receive_unverified()?;
            match packet.parse() {
                Ok(parsed) if is_marker(&parsed) => return Ok((packets, parsed.source())),
                _ => packets.push(packet),
            }
        }
    }
}

/// Length in bytes of the headers that go with every fragment of a packet, and
/// of all of it.
fn lengths(ip: &[u8], parsed: &Parsed) -> (usize, usize) {
    match &parsed.ip {
        Ip::V4(header) => (header.header_len(), header.total_len.into()),
        Ip::V6(header, _) => {
            let length = header.header_len() + usize::from(header.payload_length);
            let mut next = header.next_header;
            let (mut at, mut end) = (header.header_len(), header.header_len());
            loop {
                let header_length = match next {
                    IpNumber::IPV6_FRAGMENTATION_HEADER => return (at + 8, length),
                    IpNumber::IPV6_HEADER_HOP_BY_HOP
                    | IpNumber::IPV6_ROUTE_HEADER
                    | IpNumber::IPV6_DESTINATION_OPTIONS => 8 + 8 * usize::from(ip[at + 1]),
                    _ => return (end, length),
                };
                if next != IpNumber::IPV6_DESTINATION_OPTIONS {
                    end = at + header_length;
                }
                next = IpNumber(ip[at]);
                at += header_length;
            }
        }
    }
}

/// The whole of which these are the parts by their offsets, if none is missing.
fn join(parts: &BTreeMap<usize, (Vec<u8>, bool)>) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    let mut more_fragments = true;
    for (start, (part, more)) in parts {
        if *start != whole.len() {
            return None;
        }
        whole.extend(part);
        more_fragments = *more;
    }
    (!more_fragments).then_some(whole)
}

fn is_marker(packet: &Parsed) -> bool {
    packet.udp().is_some()
        && [packet.source().port(), packet.destination().port()].contains(&MARKER[1])
}

/// [`Family::wired`] of IPv4.
///
/// # Errors
/// It cannot be built, or the program does not become ready.
pub fn wired(guests: u8, arguments: &[&str]) -> Result<(World, Wires)> {
    V4.wired(guests, arguments)
}

impl Wires {
    /// Takes hold of the ends of a world's wires. Guests that share a bridge
    /// have a wire each.
    ///
    /// # Errors
    /// No root, or a device of the topology is missing.
    pub fn open(world: &World) -> Result<Self> {
        Self::open_for(world, world.family())
    }

    /// The same for one of the families of a world that has both.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_for(world: &World, family: Family) -> Result<Self> {
        let Topology { host, guests, .. } = &world.topology;
        let mut wires = Self {
            world: Wire::of_world(world)?,
            guests: Vec::new(),
            family,
            addresses: Vec::new(),
        };
        for (number, guest) in guests.iter().enumerate() {
            let wire = Wire::open(&guest.namespace, GUEST_DEVICE, host, &guest.inside_device)?;
            let [_, _, network, _] = guest.address.octets();
            // Guests on a bridge share a network.
            let address = family.inside_host(network, SILENT_HOST + u8::try_from(number)?);
            if wire.ethernet.is_some() {
                let own = guest.namespace.mac_address(GUEST_DEVICE)?;
                let device = &guest.inside_device;
                host.ip(&format!(
                    "neighbour replace {address} lladdr {own} nud permanent dev {device}"
                ))?;
            }
            wires.guests.push(wire);
            wires.addresses.push(address);
        }
        Ok(wires)
    }

    /// An endpoint of a guest that no kernel answers for.
    ///
    /// # Panics
    /// There are fewer guests.
    #[must_use]
    pub fn inside(&self, guest: usize, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses[guest], port)
    }

    /// Sends a packet as a guest and returns what it arrives as in the world.
    ///
    /// # Errors
    /// Nothing arrives there, or something with a wrong checksum.
    pub fn out(&self, guest: usize, packet: &Builder) -> Result<Parsed> {
        self.guests[guest].send(packet)?;
        self.world.receive()
    }

    /// Sends a packet as the world and returns what it arrives as at a guest.
    ///
    /// # Errors
    /// Nothing arrives there, or something with a wrong checksum.
    pub fn back(&self, packet: &Builder, guest: usize) -> Result<Parsed> {
        self.world.send(packet)?;
        self.guests[guest].receive()
    }

    /// Sends a datagram as a guest and returns the outside endpoint that it
    /// arrives from.
    ///
    /// # Errors
    /// It does not arrive as it was sent.
    pub fn map_udp(&self, guest: usize, port: u16, remote: SocketAddr) -> Result<SocketAddr> {
        const PAYLOAD: &[u8] = b"mapping";
        let inside = self.inside(guest, port);
        let sent = packet::udp(inside, remote).payload(PAYLOAD);
        let arrived = self.out(guest, &sent)?;
        ensure!(
            arrived.destination() == remote && arrived.payload == PAYLOAD,
            "{inside} to {remote} arrived as {arrived:?}"
        );
        Ok(arrived.source())
    }

    /// Sends a datagram as the world and checks that it arrives at that port of
    /// the guest.
    ///
    /// # Errors
    /// It does not arrive as it was sent.
    pub fn answer_udp(
        &self,
        remote: SocketAddr,
        outside: SocketAddr,
        guest: usize,
        port: u16,
    ) -> Result<()> {
        const PAYLOAD: &[u8] = b"answer";
        let inside = self.inside(guest, port);
        let arrived = self.back(&packet::udp(remote, outside).payload(PAYLOAD), guest)?;
        ensure!(
            (arrived.source(), arrived.destination()) == (remote, inside)
                && arrived.payload == PAYLOAD,
            "{remote} to {outside} arrived as {arrived:?} and not at {inside}"
        );
        Ok(())
    }

    /// Everything that has arrived and was not looked at yet: all that what was
    /// sent before can make arrive. All checksums are right.
    ///
    /// # Errors
    /// A marker does not come through, or a checksum is wrong.
    pub fn arrivals(&self) -> Result<Arrivals> {
        let arrivals = self.unverified_arrivals()?;
        for packet in arrivals.guests.iter().flatten().chain(&arrivals.world) {
            packet
                .verify_checksums(Partial::Accept)
                .with_context(|| packet.summary())?;
        }
        Ok(arrivals)
    }

    /// The same, with whatever checksums.
    ///
    /// # Errors
    /// A marker does not come through.
    pub fn unverified_arrivals(&self) -> Result<Arrivals> {
        let mut world = Vec::new();
        let mut guests = Vec::new();
        for (number, wire) in self.guests.iter().enumerate() {
            let markers = (
                self.inside(number, MARKER[0]),
                self.family.remote(0, MARKER[1]),
            );
            let marker = packet::udp(markers.0, markers.1);
            wire.send(&marker)?;
            let (arrived, outside) = self.world.receive_until_marker()?;
            world.extend(arrived);
            self.world.send(&packet::udp(markers.1, outside))?;
            let (arrived, _) = wire.receive_until_marker()?;
            guests.push(arrived);
        }
        Ok(Arrivals { world, guests })
    }

    /// Checks that nothing has arrived anywhere that was not looked at.
    ///
    /// # Errors
    /// Something has.
    pub fn nothing_arrives(&self) -> Result<()> {
        let Arrivals { world, guests } = self.arrivals()?;
        let summary = |packets: &[Captured]| {
            let lines: Vec<_> = packets.iter().map(Captured::summary).collect();
            lines.join("\n")
        };
        ensure!(world.is_empty(), "in the world:\n{}", summary(&world));
        for guest in guests {
            ensure!(guest.is_empty(), "at a guest:\n{}", summary(&guest));
        }
        Ok(())
    }
}

/// The addresses of a packet's ends.
#[must_use]
pub fn ends(packet: &Parsed) -> (SocketAddr, SocketAddr) {
    (packet.source(), packet.destination())
}

/// The Ethernet address of a device, if it has one.
///
/// # Errors
/// `ip` prints one that is none.
pub fn mac(namespace: &Namespace, device: &str) -> Result<Option<[u8; 6]>> {
    // Devices without Ethernet have none.
    let Ok(text) = namespace.mac_address(device) else {
        return Ok(None);
    };
    let bytes: Result<Vec<_>, _> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect();
    let bytes = bytes.with_context(|| format!("{device} has the address {text}"))?;
    let bytes = bytes.try_into().ok();
    Ok(Some(bytes.with_context(|| {
        format!("{device} has the address {text}")
    })?))
}
