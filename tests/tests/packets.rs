//! Packets byte by byte: what arrives is what was sent with just the outside
//! endpoint in place of the inside one, one hop later; and what must not
//! arrive does not.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::IpNumber;
use tapnat_testbed::{
    cable::{self, Layer, TunTap},
    packet::{self, Builder, Offload},
    traffic,
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    wires::{self, Whole, Wire, Wires},
    world::World,
};

/// Payload lengths: nothing, odd and even, about the lengths that loops over
/// a payload stop at, and the most that fits with a few options.
fn lengths(family: Family) -> [usize; 12] {
    let most = 1500 - family.header_length() - 28;
    [0, 1, 2, 3, 63, 64, 65, 127, 128, 513, 1000, most]
}

/// Two guests, the second of which always gets other ports than its own
/// because the first has them.
fn world(family: Family) -> Result<(World, Wires)> {
    family.wired(2, &[])
}

/// A kind of packet, made from its ends; of a query the identifier is the port
/// of the inside one.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Udp,
    UdpWithoutChecksum,
    Tcp,
    Echo,
}

impl Kind {
    /// Those that a family has.
    fn all(family: Family) -> &'static [Self] {
        match family {
            V4 => &[Self::Udp, Self::UdpWithoutChecksum, Self::Tcp, Self::Echo],
            V6 => &[Self::Udp, Self::Tcp, Self::Echo],
        }
    }

    /// From the inside, or from outside in its place.
    fn out(self, source: SocketAddr, remote: SocketAddr) -> Builder {
        match self {
            Self::Udp => packet::udp(source, remote),
            Self::UdpWithoutChecksum => packet::udp(source, remote).without_udp_checksum(),
            Self::Tcp => packet::tcp(source, remote).with_tcp(|header| header.syn = true),
            Self::Echo => packet::echo_request(source.ip(), remote.ip(), source.port(), 7),
        }
    }

    /// To the outside, or inside in its place.
    fn back(self, remote: SocketAddr, destination: SocketAddr) -> Builder {
        match self {
            Self::Udp | Self::UdpWithoutChecksum => self.out(remote, destination),
            Self::Tcp => packet::tcp(remote, destination).with_tcp(|header| {
                header.syn = true;
                header.ack = true;
            }),
            Self::Echo => packet::echo_reply(remote.ip(), destination.ip(), destination.port(), 7),
        }
    }
}

/// Sends the packet that `with` makes of each kind both ways between both
/// guests and the world, from this port on, and checks every byte.
fn check_both_ways(wires: &Wires, port: u16, with: impl Fn(Builder) -> Builder) -> Result<()> {
    for (port, kind) in (port..).zip(Kind::all(wires.family)) {
        let remote = wires.family.remote(0, 53);
        for guest in 0..2 {
            let inside = wires.inside(guest, port);
            wires.guests[guest].send(&with(kind.out(inside, remote)))?;
            let arrived = wires.world.receive_captured()?;
            let outside = arrived.parse()?.source();
            let is_kept = outside.port() == port;
            ensure!(
                outside.ip() == wires.family.outside_address() && is_kept == (guest == 0),
                "{kind:?} of {inside} from {outside}"
            );
            arrived.check(&with(kind.out(outside, remote)).ttl(63))?;

            wires.world.send(&with(kind.back(remote, outside)))?;
            wires.guests[guest].receive_this(&with(kind.back(remote, inside)).ttl(63))?;
        }
    }
    wires.nothing_arrives()
}

fn payloads_of_any_length_are_kept(family: Family) -> Result<()> {
    let (_world, wires) = world(family)?;
    for (port, length) in (40_000..).step_by(10).zip(lengths(family)) {
        check_both_ways(&wires, port, |packet| {
            packet.payload(&traffic::pattern(length))
        })?;
    }
    Ok(())
}
both_families!(payloads_of_any_length_are_kept);

#[test]
fn ip_options_are_kept() -> Result<()> {
    const ROUTER_ALERT: [u8; 4] = [148, 4, 0, 0];
    let (_world, wires) = world(V4)?;
    for (port, length) in (40_000..).step_by(10).zip([4, 8, 36, 40]) {
        let mut options = vec![1; length - 4];
        options.extend(ROUTER_ALERT);
        check_both_ways(&wires, port, |packet| {
            packet.options(&options).payload(b"with options")
        })?;
    }
    Ok(())
}

#[test]
fn the_dont_fragment_flag_and_the_identification_are_kept() -> Result<()> {
    let (_world, wires) = world(V4)?;
    for (port, identification) in (40_000..).step_by(10).zip([0, 1, 0x8000, 0xffff]) {
        check_both_ways(&wires, port, |packet| {
            packet.dont_fragment().identification(identification)
        })?;
    }
    Ok(())
}

fn what_follows_the_packet_in_its_frame_changes_nothing(family: Family) -> Result<()> {
    let (_world, wires) = world(family)?;
    let remote = family.remote(0, 53);
    for (port, kind) in (40_000..).zip(Kind::all(family)) {
        let inside = wires.inside(0, port);
        let padded = |packet: &Builder| vec![[packet.build(), vec![0xa5; 18]].concat()];
        wires.guests[0].send_all(&kind.out(inside, remote).payload(b"odd"), padded)?;
        let arrived = wires.world.receive_captured()?;
        let expected = kind.out(family.outside(port), remote).payload(b"odd");
        arrived.check(&expected.ttl(63))?;
        let answer = kind.back(remote, family.outside(port)).payload(b"odd");
        wires.world.send_all(&answer, padded)?;
        wires.guests[0].receive_this(&kind.back(remote, inside).payload(b"odd").ttl(63))?;
    }
    Ok(())
}
both_families!(what_follows_the_packet_in_its_frame_changes_nothing);

/// The payload of two bytes with which a packet has this transport checksum.
fn payload_for(kind: Kind, source: SocketAddr, remote: SocketAddr, checksum: u16) -> [u8; 2] {
    let offset = match kind {
        Kind::Tcp => 16,
        Kind::Udp | Kind::UdpWithoutChecksum => 6,
        Kind::Echo => 2,
    };
    let has_it = |payload: &[u8; 2]| {
        let packet = kind.out(source, remote).payload(payload);
        packet.fragmentable()[offset..][..2] == checksum.to_be_bytes()
    };
    (0..=u16::MAX)
        .map(u16::to_be_bytes)
        .find(has_it)
        .expect("two bytes make every sum")
}

fn a_udp_checksum_that_comes_to_nothing_is_sent_as_all_ones(family: Family) -> Result<()> {
    let (_world, wires) = world(family)?;
    let (source, translated, remote) = (
        wires.inside(0, 40_000),
        family.outside(40_000),
        family.remote(0, 53),
    );
    let payload = payload_for(Kind::Udp, translated, remote, 0xffff);
    wires.guests[0].send(&packet::udp(source, remote).payload(&payload))?;
    let expected = packet::udp(translated, remote).payload(&payload).ttl(63);
    wires.world.receive_this(&expected)?;
    // A checksum of all ones is one, and goes on as another.
    let payload = payload_for(Kind::Udp, source, remote, 0xffff);
    wires.guests[0].send(&packet::udp(source, remote).payload(&payload))?;
    let expected = packet::udp(translated, remote).payload(&payload).ttl(63);
    wires.world.receive_this(&expected)
}
both_families!(a_udp_checksum_that_comes_to_nothing_is_sent_as_all_ones);

fn other_checksums_that_come_to_nothing_are_zero(family: Family) -> Result<()> {
    let (_world, wires) = world(family)?;
    let (source, translated, remote) = (
        wires.inside(0, 40_000),
        family.outside(40_000),
        family.remote(0, 53),
    );
    for kind in [Kind::Tcp, Kind::Echo] {
        let payload = payload_for(kind, translated, remote, 0);
        wires.guests[0].send(&kind.out(source, remote).payload(&payload))?;
        let expected = kind.out(translated, remote).payload(&payload).ttl(63);
        wires.world.receive_this(&expected)?;
    }
    if family == V6 {
        return Ok(());
    }
    // The same of the IP header's.
    let kind = Kind::Udp;
    let header_is_zero = |identification: &u32| {
        let packet = kind.out(translated, remote).ttl(63);
        packet.identification(*identification).build()[10..12] == [0, 0]
    };
    let identification = (0..=0xffff).find(header_is_zero);
    let identification = identification.expect("every sum has its identification");
    wires.guests[0].send(&kind.out(source, remote).identification(identification))?;
    let expected = kind.out(translated, remote).ttl(63);
    let expected = expected.identification(identification);
    wires.world.receive_this(&expected)
}
both_families!(other_checksums_that_come_to_nothing_are_zero);

/// A host whose tap is open here, in place of a guest, and the wire's end in
/// the world.
struct OpenTap {
    family: Family,
    tap: TunTap,
    ethernet: [[u8; 6]; 2],
    wire: Wire,
    _world: World,
}

impl OpenTap {
    fn new(family: Family) -> Result<Self> {
        let topology = family.topology().guests(0).build()?;
        let tap = TunTap::create(&topology.host, "tap0", cable::Options::new(Layer::Ethernet))?;
        let own = [2, 0, 0, 0, 0, 10];
        let peer = wires::mac(&topology.host, "tap0")?.context("a tap has a MAC address")?;
        let network = match family {
            V4 => "tap0=10.0.0.1/24",
            V6 => "tap0=fd00:7a70::1/64",
        };
        let world = World::start_in(topology, &["--inside", network])?;
        let guest = family.inside_host(0, 10);
        world.topology.host.ip(&format!(
            "neighbour replace {guest} lladdr 02:00:00:00:00:0a nud permanent dev tap0"
        ))?;
        Ok(Self {
            family,
            tap,
            ethernet: [own, peer],
            wire: Wire::of_world(&world)?,
            _world: world,
        })
    }

    /// An endpoint of the guest, whose port is the same outside.
    fn guest(&self) -> SocketAddr {
        SocketAddr::new(self.family.inside_host(0, 10), 40_000)
    }

    /// Hands a packet to the tap as a guest's virtio device does, and checks
    /// what arrives in the world: the same, still to be completed.
    fn check(&self, packet: &Builder, expected: &Builder, segment: Option<u16>) -> Result<()> {
        let [own, peer] = self.ethernet;
        let (offload, frame) = packet.clone().ethernet(own, peer).offloaded(segment);
        for header_length in [offload.header_length, 14] {
            // The kernel leaves what is behind this length in pages of its own,
            // also headers.
            let offload = Offload {
                header_length,
                ..offload
            };
            self.tap.send(offload, &frame)?;
            let arrived = self.wire.receive_captured()?;
            arrived.check(&expected.clone().ttl(63).partial_checksum())?;
            ensure!(
                arrived.offload.gso == offload.gso && arrived.offload.checksum.is_some(),
                "sent with {offload:?}, arrived with {:?}",
                arrived.offload
            );
        }
        Ok(())
    }
}

fn checksums_that_are_yet_to_be_completed_stay_so(family: Family) -> Result<()> {
    let tap = OpenTap::new(family)?;
    for kind in [Kind::Udp, Kind::Tcp] {
        for length in lengths(family) {
            let payload = traffic::pattern(length);
            let packet = kind
                .out(tap.guest(), family.remote(0, 53))
                .payload(&payload);
            let expected = kind
                .out(family.outside(40_000), family.remote(0, 53))
                .payload(&payload);
            tap.check(&packet, &expected, None)?;
            let longer = |packet: Builder| match family {
                V4 => packet.options(&[1; 8]),
                V6 => packet.extension(IpNumber::IPV6_DESTINATION_OPTIONS, &[1, 4, 0, 0, 0, 0]),
            };
            tap.check(&longer(packet), &longer(expected), None)?;
        }
    }
    Ok(())
}
both_families!(checksums_that_are_yet_to_be_completed_stay_so);

fn unsegmented_packets_of_64_kilobytes_stay_whole(family: Family) -> Result<()> {
    let tap = OpenTap::new(family)?;
    for kind in [Kind::Udp, Kind::Tcp] {
        // With the most that fits, timestamps among it.
        let most = 1500 - u16::try_from(family.header_length())? - 32;
        for (length, segment) in [(2000, 1000), (40_000, 1400), (64_000, most), (65_000, 1372)] {
            let payload = traffic::pattern(length);
            let packet = kind
                .out(tap.guest(), family.remote(0, 53))
                .payload(&payload);
            let expected = kind
                .out(family.outside(40_000), family.remote(0, 53))
                .payload(&payload);
            tap.check(&packet, &expected, Some(segment))?;
        }
    }
    Ok(())
}
both_families!(unsegmented_packets_of_64_kilobytes_stay_whole);

fn packets_in_fragments_are_kept(family: Family) -> Result<()> {
    let (_world, wires) = world(family)?;
    let most = 1500 - family.header_length() - 8;
    let lengths = [most + 1, most + 2, most + 3, 3000, 8000, 65_000];
    for (port, length) in (40_000..).step_by(10).zip(lengths) {
        let with = |packet: Builder| packet.payload(&traffic::pattern(length));
        for (port, kind) in (port..).zip(Kind::all(family)) {
            let remote = family.remote(0, 53);
            for guest in 0..2 {
                let inside = wires.inside(guest, port);
                let sent = with(kind.out(inside, remote));
                wires.guests[guest].send_all(&sent, |packet| packet.fragments(1500))?;
                let arrived = wires.world.receive_whole()?;
                let translated = if guest == 0 {
                    family.outside(port)
                } else {
                    // The first guest's port cannot be this one's.
                    let [high, low, ..] = arrived.ip_payload[..] else {
                        bail!("{arrived:?}");
                    };
                    let port = match kind {
                        Kind::Echo => [arrived.ip_payload[4], arrived.ip_payload[5]],
                        _ => [high, low],
                    };
                    family.outside(u16::from_be_bytes(port))
                };
                check_whole(&arrived, &with(kind.out(translated, remote)))?;

                let sent = with(kind.back(remote, translated));
                wires
                    .world
                    .send_all(&sent, |packet| packet.fragments(1500))?;
                let arrived = wires.guests[guest].receive_whole()?;
                check_whole(&arrived, &with(kind.back(remote, inside)))?;
            }
        }
    }
    wires.nothing_arrives()
}
both_families!(packets_in_fragments_are_kept);

/// Checks that a packet that came in fragments is this one.
fn check_whole(arrived: &Whole, expected: &Builder) -> Result<()> {
    let expected = expected.fragmentable();
    ensure!(
        arrived.ip_payload == expected,
        "arrived: {arrived:02x?}\nexpected: {expected:02x?}"
    );
    ensure!(arrived.ttl == 63 && arrived.pieces.len() > 1, "{arrived:?}");
    Ok(())
}

/// TCP options in which the maximum segment size is this, at even offsets and
/// at odd ones.
fn segment_size_options(size: u16) -> [Vec<u8>; 3] {
    let [high, low] = size.to_be_bytes();
    [
        vec![2, 4, high, low],
        vec![1, 2, 4, high, low, 3, 3, 7],
        vec![
            4, 2, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 3, 3, 7, 2, 4, high, low, 0, 0, 0,
        ],
    ]
}

/// Sends SYNs and SYN-ACKs that announce one size, and checks that they arrive
/// with another.
fn check_segment_size(wires: &Wires, port: u16, announced: u16, expected: u16) -> Result<()> {
    let with = |packet: Builder, options: &[u8]| {
        let options = options.to_vec();
        packet.with_tcp(move |header| {
            header.set_options_raw(&options).expect("options that fit");
        })
    };
    let options = segment_size_options(announced)
        .into_iter()
        .zip(segment_size_options(expected));
    for (port, (sent, expected)) in (port..).zip(options) {
        let (inside, remote) = (wires.inside(0, port), wires.family.remote(0, 80));
        wires.guests[0].send(&with(Kind::Tcp.out(inside, remote), &sent))?;
        let translated = with(Kind::Tcp.out(wires.family.outside(port), remote), &expected).ttl(63);
        wires.world.receive_this(&translated)?;
        wires.world.send(&with(
            Kind::Tcp.back(remote, wires.family.outside(port)),
            &sent,
        ))?;
        let translated = with(Kind::Tcp.back(remote, inside), &expected).ttl(63);
        wires.guests[0].receive_this(&translated)?;
        // Only where they are announced.
        let data = packet::tcp(inside, remote).with_tcp(|header| header.ack = true);
        wires.guests[0].send(&with(data.clone(), &sent))?;
        let data =
            packet::tcp(wires.family.outside(port), remote).with_tcp(|header| header.ack = true);
        wires.world.receive_this(&with(data, &sent).ttl(63))?;
    }
    Ok(())
}

fn segment_sizes_are_lowered_when_asked(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--clamp-mss", "1300"])?;
    let sizes = [
        (1460, 1300),
        (1301, 1300),
        (65_535, 1300),
        (1300, 1300),
        (536, 536),
    ];
    for (port, (announced, expected)) in (40_000..).step_by(10).zip(sizes) {
        check_segment_size(&wires, port, announced, expected)?;
    }
    let (_world, wires) = family.wired(1, &[])?;
    check_segment_size(&wires, 40_000, 1460, 1460)
}
both_families!(segment_sizes_are_lowered_when_asked);

/// A packet of a protocol whose ports, if it has any, are not for others to change.
fn other(source: IpAddr, destination: IpAddr, protocol: IpNumber) -> Builder {
    // Of SCTP the ports, the same in both directions.
    let ports = [0x12, 0x34, 0x12, 0x34];
    packet::other(source, destination, protocol).payload(&[&ports[..], &[9; 60]].concat())
}

fn protocols_whose_ports_cannot_be_changed_go_by_address(family: Family) -> Result<()> {
    let (_world, wires) = world(family)?;
    let [one, two] = [0, 1].map(|guest| wires.inside(guest, 0).ip());
    let [here, there] = [0, 1].map(|number| family.remote(number, 0).ip());
    for protocol in [
        IpNumber::SCTP,
        IpNumber::GRE,
        IpNumber::ENCAPSULATING_SECURITY_PAYLOAD,
    ] {
        let named = || format!("{protocol:?}");
        wires.guests[0].send(&other(one, here, protocol))?;
        wires
            .world
            .receive_this(&other(family.outside_address(), here, protocol).ttl(63))
            .with_context(named)?;
        wires
            .world
            .send(&other(here, family.outside_address(), protocol))?;
        wires.guests[0]
            .receive_this(&other(here, one, protocol).ttl(63))
            .with_context(named)?;
        // Another guest may have them with another remote, not with the same.
        wires.guests[1].send(&other(two, here, protocol))?;
        wires.nothing_arrives().with_context(named)?;
        wires.guests[1].send(&other(two, there, protocol))?;
        wires
            .world
            .receive_this(&other(family.outside_address(), there, protocol).ttl(63))
            .with_context(named)?;
        wires
            .world
            .send(&other(there, family.outside_address(), protocol))?;
        wires.guests[1]
            .receive_this(&other(there, two, protocol).ttl(63))
            .with_context(named)?;
    }
    Ok(())
}
both_families!(protocols_whose_ports_cannot_be_changed_go_by_address);

fn protocols_that_are_not_known_do_not_get_out(family: Family) -> Result<()> {
    let (world, wires) = world(family)?;
    let inside = wires.inside(0, 0).ip();
    let protocols = [IpNumber::IPV4, IpNumber::OSPFIGP, IpNumber::from(253)];
    for protocol in protocols {
        wires.guests[0].send(&other(inside, family.remote(0, 0).ip(), protocol))?;
    }
    wires.nothing_arrives()?;
    let status = world.instance.ask_json("status")?;
    let reasons = status["reasons"].as_array().context("no reasons")?;
    let dropped = reasons
        .iter()
        .find(|it| it["reason"] == "protocol-not-carried");
    let dropped = dropped.and_then(|it| it["packets"].as_u64());
    ensure!(dropped == Some(3), "{status}");
    Ok(())
}
both_families!(protocols_that_are_not_known_do_not_get_out);
