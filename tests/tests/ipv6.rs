//! What only IPv6 has: extension headers, addresses that stay on their link,
//! neighbours and routers that make themselves known by ICMPv6, and hops that do
//! not fragment (RFC 8200, 4443, 4861, 5095, 7112, 8021).

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use etherparse::IpNumber;
use tapnat_testbed::{
    capture::{self, Capture, Captured, Direction},
    packet::{self, Builder},
    topology::{GUEST_DEVICE, Inside, Tap, Topology, UPLINK},
    traffic::{self, ping},
};
use tapnat_tests::{
    family::V6,
    wires::{Wire, Wires},
    world::World,
};

const HOP_BY_HOP: IpNumber = IpNumber::IPV6_HEADER_HOP_BY_HOP;
const ROUTING: IpNumber = IpNumber::IPV6_ROUTE_HEADER;
const OPTIONS: IpNumber = IpNumber::IPV6_DESTINATION_OPTIONS;

/// Options that pad a header to eight bytes.
const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];
/// Kind, segments left, and what is reserved, of a way that was followed.
const FOLLOWED: [u8; 6] = [3, 0, 0, 0, 0, 0];

/// Options of this length that are to be skipped by who does not know them.
fn options(length: usize) -> Vec<u8> {
    let mut options = Vec::new();
    while options.len() < length {
        let rest = (length - options.len()).min(250);
        let data = u8::try_from(rest - 2).expect("an option's length");
        options.extend([0x1e, data]);
        options.resize(options.len() + usize::from(data), 0xa5);
    }
    options
}

/// A packet with these extension headers.
fn with(packet: Builder, extensions: &[(IpNumber, Vec<u8>)]) -> Builder {
    let append =
        |packet: Builder, (number, data): &(IpNumber, Vec<u8>)| packet.extension(*number, data);
    extensions.iter().fold(packet, append)
}

/// A packet outwards and its answer, of each protocol.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Udp,
    Tcp,
    Echo,
}

const KINDS: [Kind; 3] = [Kind::Udp, Kind::Tcp, Kind::Echo];

impl Kind {
    fn out(self, source: SocketAddr, remote: SocketAddr) -> Builder {
        match self {
            Self::Udp => packet::udp(source, remote),
            Self::Tcp => packet::tcp(source, remote).with_tcp(|header| header.syn = true),
            Self::Echo => packet::echo_request(source.ip(), remote.ip(), source.port(), 7),
        }
        .payload(b"odd")
    }

    fn back(self, remote: SocketAddr, destination: SocketAddr) -> Builder {
        match self {
            Self::Udp => packet::udp(remote, destination),
            Self::Tcp => packet::tcp(remote, destination).with_tcp(|header| {
                header.syn = true;
                header.ack = true;
            }),
            Self::Echo => packet::echo_reply(remote.ip(), destination.ip(), destination.port(), 7),
        }
        .payload(b"even")
    }
}

/// Sends what `change` makes of a packet of each kind both ways, from this port
/// on, and checks every byte.
fn check_both_ways(wires: &Wires, port: u16, change: impl Fn(Builder) -> Builder) -> Result<()> {
    let remote = V6.remote(0, 53);
    for (port, kind) in (port..).zip(KINDS) {
        let (inside, outside) = (wires.inside(0, port), V6.outside(port));
        // The first makes the session.
        for _ in 0..2 {
            wires.guests[0].send(&change(kind.out(inside, remote)))?;
            wires
                .world
                .receive_this(&change(kind.out(outside, remote)).ttl(63))?;
            wires.world.send(&change(kind.back(remote, outside)))?;
            wires.guests[0].receive_this(&change(kind.back(remote, inside)).ttl(63))?;
        }
    }
    wires.nothing_arrives()
}

/// As many packets left for a reason as should.
fn check_count(world: &World, reason: &str, count: u64) -> Result<()> {
    let found = world.instance.count(reason)?;
    ensure!(found == count, "{found} packets for {reason}, not {count}");
    Ok(())
}

#[test]
fn extension_headers_are_walked_and_kept() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    let padding = PADDING.to_vec();
    let chains = [
        vec![(HOP_BY_HOP, padding.clone())],
        vec![(OPTIONS, padding.clone())],
        vec![(OPTIONS, options(62))],
        vec![(ROUTING, FOLLOWED.to_vec())],
        vec![(HOP_BY_HOP, options(14)), (OPTIONS, options(22))],
        // All there can be, in the order of RFC 8200 section 4.1.
        vec![
            (HOP_BY_HOP, padding.clone()),
            (OPTIONS, padding.clone()),
            (ROUTING, FOLLOWED.to_vec()),
            (OPTIONS, padding),
        ],
    ];
    for (port, chain) in (40_000..).step_by(10).zip(chains) {
        check_both_ways(&wires, port, |packet| with(packet, &chain))
            .with_context(|| format!("{chain:02x?}"))?;
    }
    Ok(())
}

#[test]
fn the_flow_label_and_the_traffic_class_are_kept() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    for (port, label) in (40_000..).step_by(10).zip([1, 0xa_5a5a, 0xf_ffff]) {
        check_both_ways(&wires, port, |packet| {
            packet.flow_label(label).precedence(5)
        })?;
    }
    Ok(())
}

#[test]
fn fragments_with_extension_headers_are_kept() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    let chains = [
        vec![(HOP_BY_HOP, PADDING.to_vec())],
        vec![(OPTIONS, options(14)), (ROUTING, FOLLOWED.to_vec())],
    ];
    let remote = V6.remote(0, 53);
    for (port, chain) in (40_000..).step_by(10).zip(chains) {
        for (port, kind) in (port..).zip(KINDS) {
            let (inside, outside) = (wires.inside(0, port), V6.outside(port));
            let long = |packet: Builder| with(packet.payload(&traffic::pattern(3000)), &chain);
            for is_reversed in [false, true] {
                let pieces = |packet: &Builder| {
                    let mut pieces = packet.fragments(1280);
                    if is_reversed {
                        pieces.reverse();
                    }
                    pieces
                };
                // Another packet.
                let number = if is_reversed { 2 } else { 1 };
                let long = |packet| long(packet).identification(number);
                wires.guests[0].send_all(&long(kind.out(inside, remote)), pieces)?;
                let arrived = wires.world.receive_whole()?;
                ensure!(
                    arrived.ip_payload == long(kind.out(outside, remote)).fragmentable()
                        && arrived.pieces.len() == 3,
                    "{chain:02x?}: {arrived:02x?}"
                );
                wires
                    .world
                    .send_all(&long(kind.back(remote, outside)), pieces)?;
                let arrived = wires.guests[0].receive_whole()?;
                ensure!(
                    arrived.ip_payload == long(kind.back(remote, inside)).fragmentable()
                        && arrived.pieces.len() == 3,
                    "{chain:02x?}: {arrived:02x?}"
                );
            }
        }
    }
    wires.nothing_arrives()
}

/// Options for the destination come with the first fragment alone, and the others name
/// them and not the transport (RFC 8200 section 4.5): nobody can read one by itself.
#[test]
fn fragments_of_what_begins_with_extension_headers_are_kept() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    let remote = V6.remote(0, 53);
    let long = |packet: Builder| {
        let packet = packet.payload(&traffic::pattern(3000));
        with(packet, &[(OPTIONS, options(14))])
    };
    let pieces = |packet: &Builder| packet.fragments(1280);
    let check = |wire: &Wire, expected: Builder| -> Result<()> {
        for mut expected in pieces(&long(expected).ttl(63)) {
            let arrived = wire.receive_unverified()?;
            // A guest's have a number that tapnat gives them.
            let number = arrived.ip().get(44..48).context("no fragment")?;
            expected[44..48].copy_from_slice(number);
            ensure!(arrived.ip() == expected, "{}", arrived.summary());
        }
        Ok(())
    };
    for (port, kind) in (40_000..).zip(KINDS) {
        let (inside, outside) = (wires.inside(0, port), V6.outside(port));
        wires.guests[0].send_all(&long(kind.out(inside, remote)), pieces)?;
        check(&wires.world, kind.out(outside, remote))?;
        wires
            .world
            .send_all(&long(kind.back(remote, outside)), pieces)?;
        check(&wires.guests[0], kind.back(remote, inside))?;
    }
    wires.nothing_arrives()
}

#[test]
fn chains_of_extension_headers_have_a_bound() -> Result<()> {
    let (world, wires) = V6.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, V6.remote(0, 53))?;
    let padding = (OPTIONS, PADDING.to_vec());
    let chains = [
        vec![padding.clone(); 8],
        vec![padding.clone(); 150],
        vec![(OPTIONS, options(1022))],
        // Not where it may be (RFC 8200 section 4.1).
        vec![padding, (HOP_BY_HOP, PADDING.to_vec())],
        vec![(HOP_BY_HOP, PADDING.to_vec()); 2],
    ];
    let mut count = 0;
    for chain in chains {
        for (wire, packet) in [
            (
                &wires.guests[0],
                packet::udp(wires.inside(0, 40_000), V6.remote(0, 53)),
            ),
            (&wires.world, packet::udp(V6.remote(0, 53), outside)),
        ] {
            wire.send(&with(packet, &chain))?;
            count += 1;
            wires
                .nothing_arrives()
                .with_context(|| format!("{} headers", chain.len()))?;
        }
    }
    check_count(&world, "bad-extension-headers", count)
}

/// Longer than their packet, or cut off with it.
#[test]
fn broken_extension_headers_are_dropped() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, V6.remote(0, 53))?;
    let packets = [
        packet::udp(wires.inside(0, 40_000), V6.remote(0, 53)),
        packet::udp(V6.remote(0, 53), outside),
    ];
    for (packet, wire) in packets.iter().zip([&wires.guests[0], &wires.world]) {
        for kind in [HOP_BY_HOP, ROUTING, OPTIONS] {
            let packet = packet.clone().extension(kind, &PADDING.map(|_| 0));
            for length in [2, 3, 0x20, 0xff] {
                wire.send_all(&packet, |packet| {
                    let mut frame = packet.build();
                    frame[tapnat_tests::wires::LINK_LENGTH + 41] = length;
                    vec![frame]
                })?;
            }
            for length in [0, 1, 2, 7] {
                wire.send_all(&packet, |packet| {
                    let mut frame = packet.build();
                    frame.truncate(tapnat_tests::wires::LINK_LENGTH + 40 + length);
                    frame[tapnat_tests::wires::LINK_LENGTH + 5] =
                        u8::try_from(length).expect("0..8");
                    vec![frame]
                })?;
            }
            let arrivals = wires.arrivals()?;
            ensure!(
                arrivals.guests[0].is_empty(),
                "{kind:?}: at the guest, {}",
                arrivals.guests[0][0].summary()
            );
            // The host itself may say what is wrong with what came from the world.
            let translated = arrivals
                .world
                .iter()
                .find(|packet| packet.is(|packet| packet.icmp_kind().is_none()));
            ensure!(translated.is_none(), "{kind:?}: {translated:?}");
        }
    }
    Ok(())
}

/// RFC 5095 and RFC 8200 section 4.4: nobody is led over another hop.
#[test]
fn packets_that_are_to_go_on_elsewhere_are_dropped() -> Result<()> {
    let (world, wires) = V6.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, V6.remote(0, 53))?;
    let IpAddr::V6(next) = V6.remote(1, 0).ip() else {
        unreachable!()
    };
    let mut count = 0;
    for kind in [0, 2, 3, 4] {
        let way = [&[kind, 1, 0, 0, 0, 0], &next.octets()[..]].concat();
        wires.guests[0].send(
            &packet::udp(wires.inside(0, 40_000), V6.remote(0, 53)).extension(ROUTING, &way),
        )?;
        wires
            .world
            .send(&packet::udp(V6.remote(0, 53), outside).extension(ROUTING, &way))?;
        count += 2;
        wires
            .nothing_arrives()
            .with_context(|| format!("type {kind}"))?;
    }
    check_count(&world, "source-routed", count)
}

/// RFC 7112: what is to be decided by the ports has them in its first fragment.
#[test]
fn first_fragments_without_their_transport_header_are_dropped() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, V6.remote(0, 53))?;
    let packets = [
        packet::udp(wires.inside(0, 40_000), V6.remote(0, 53)),
        packet::udp(V6.remote(0, 53), outside),
    ];
    let mut number = 0;
    for (packet, wire) in packets.iter().zip([&wires.guests[0], &wires.world]) {
        let packet = packet
            .clone()
            .extension(OPTIONS, &options(14))
            .payload(&[7; 80]);
        let end = packet.fragmentable().len();
        // In the options, and behind them.
        for first in [8, 16] {
            for is_reversed in [false, true] {
                number += 1;
                wire.send_all(&packet.clone().identification(number), |packet| {
                    let mut pieces = vec![packet.fragment(0..first), packet.fragment(first..end)];
                    if is_reversed {
                        pieces.reverse();
                    }
                    pieces
                })?;
                wires
                    .nothing_arrives()
                    .with_context(|| format!("{first} bytes, {is_reversed}"))?;
            }
        }
    }
    Ok(())
}

/// RFC 8021: nobody needs them.
#[test]
fn atomic_fragments_are_dropped() -> Result<()> {
    let (world, wires) = V6.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, V6.remote(0, 53))?;
    let packets = [
        packet::udp(wires.inside(0, 40_000), V6.remote(0, 53)),
        packet::udp(V6.remote(0, 53), outside),
    ];
    for (packet, wire) in packets.iter().zip([&wires.guests[0], &wires.world]) {
        wire.send_all(packet, |packet| {
            vec![packet.fragment(0..packet.fragmentable().len())]
        })?;
        wires.nothing_arrives()?;
    }
    check_count(&world, "atomic-fragment", 2)
}

/// Hops do not fragment, also not what is a fragment already.
#[test]
fn fragments_that_do_not_fit_are_answered() -> Result<()> {
    let builder = V6.topology().inside(Inside::Veth).uplink_mtu(1400);
    let world = World::start(builder, &[])?;
    let wires = Wires::open(&world)?;
    let inside = wires.inside(0, 40_000);
    let large = packet::udp(inside, V6.remote(0, 53)).payload(&traffic::pattern(4000));
    wires.guests[0].send_all(&large, |packet| packet.fragments(1500))?;
    let answer = wires.guests[0].receive()?;
    ensure!(
        answer.icmp_kind() == Some(V6.too_big()) && answer.icmp_rest() == Some([0, 0, 5, 120]),
        "{answer:?}"
    );
    ensure!(answer.quoted()?.source == inside, "{answer:?}");
    let arrived = wires.arrivals()?.world;
    let is_long = |packet: &&Captured| packet.ip().len() > 1400;
    ensure!(
        !arrived.iter().any(|packet| is_long(&packet)),
        "{arrived:?}"
    );
    // Those that fit go through.
    let large = large.identification(2);
    wires.guests[0].send_all(&large, |packet| packet.fragments(1400))?;
    let arrived = wires.world.receive_whole()?;
    let expected = packet::udp(V6.outside(40_000), V6.remote(0, 53));
    let expected = expected.payload(&traffic::pattern(4000));
    ensure!(arrived.ip_payload == expected.fragmentable(), "{arrived:?}");
    Ok(())
}

/// RFC 4443 section 2.4 (e): nobody is told of what came from nobody, or was for
/// many.
#[test]
fn who_cannot_be_answered_is_not() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    for source in ["::", "ff02::1", "ff0e::1", "fe80::77"] {
        let source = SocketAddr::new(source.parse()?, 40_000);
        wires.guests[0].send(&packet::udp(source, V6.remote(0, 53)).ttl(1))?;
    }
    for destination in ["ff02::1", "ff05::2", "ff0e::101"] {
        let destination = SocketAddr::new(destination.parse()?, 123);
        wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), destination).ttl(1))?;
    }
    wires.nothing_arrives()
}

/// Everything that a device receives, also the chatter of neighbours.
fn listen(world: &World) -> Result<Capture> {
    let options = capture::Options {
        chatter: true,
        ..capture::Options::default()
    };
    let (peer, device) = world.topology.uplink_peer();
    Capture::start_with(peer, device, options)
}

#[test]
fn link_local_addresses_and_groups_stay_on_their_link() -> Result<()> {
    let (world, wires) = V6.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, V6.remote(0, 53))?;
    let capture = listen(&world)?;
    let guest: SocketAddr = "[fe80::77]:40000".parse()?;
    let inside = wires.inside(0, 40_000);
    for (source, destination) in [
        (guest, V6.remote(0, 53)),
        (guest, "[fe80::99]:53".parse()?),
        (inside, "[fe80::99]:53".parse()?),
        (inside, "[ff02::1]:5353".parse()?),
        (guest, "[ff02::fb]:5353".parse()?),
        (inside, "[ff05::c]:1900".parse()?),
        (inside, "[ff0e::101]:123".parse()?),
    ] {
        for ttl in [1, 64, 255] {
            let packet = packet::udp(source, destination).ttl(ttl);
            wires.guests[0].send(&packet.payload(b"not beyond"))?;
        }
    }
    // Nor in: its sender could not be answered.
    for source in ["[fe80::99]:53", "[ff02::1]:53"] {
        wires
            .world
            .send(&packet::udp(source.parse()?, outside).payload(b"not beyond"))?;
    }
    wires.nothing_arrives()?;
    let packets = capture.stop()?;
    let leaked = packets.list.iter().find(|packet| {
        packet.direction == Direction::In
            && packet.ip().windows(10).any(|bytes| bytes == b"not beyond")
    });
    ensure!(leaked.is_none(), "leaked: {leaked:?}");
    Ok(())
}

/// Guest and host talk over link-local addresses, as router discovery does.
#[test]
fn a_guest_reaches_the_host_by_its_link_local_address() -> Result<()> {
    let world = World::start(V6.topology().inside(Inside::Veth), &[])?;
    let shown = world
        .topology
        .host
        .ip("-6 -oneline address show dev veth0 scope link")?;
    let address = shown
        .split_whitespace()
        .find_map(|word| word.strip_suffix("/64"))
        .with_context(|| shown.clone())?;
    let said = world
        .guest(0)
        .namespace
        .exec(&format!("ping -n -c 1 -W 5 {address}%{GUEST_DEVICE}"))?;
    ensure!(said.contains("1 received"), "{said}");
    Ok(())
}

/// The gateway is found, also when it was forgotten, and so is the guest.
#[test]
fn neighbours_are_found() -> Result<()> {
    for inside in [Inside::Veth, Inside::Bridge, Inside::Tap(Tap::default())] {
        let world = World::start(V6.topology().inside(inside).guests(2), &[])?;
        let Topology { host, guests, .. } = &world.topology;
        for _ in 0..2 {
            world.check_reach().with_context(|| format!("{inside:?}"))?;
            for guest in guests {
                host.ip(&format!("neighbour flush dev {}", guest.inside_device))?;
                guest
                    .namespace
                    .ip(&format!("neighbour flush dev {GUEST_DEVICE}"))?;
            }
            host.ip(&format!("neighbour flush dev {UPLINK}"))?;
        }
    }
    Ok(())
}

/// A message of neighbour discovery, as its neighbours take it (RFC 4861 section
/// 7.1): with a hop limit that no router has lowered.
fn discovery(source: IpAddr, destination: IpAddr, kind: u8, rest: [u8; 4], body: &[u8]) -> Builder {
    packet::icmp_error(source, destination, (kind, 0), rest, body).ttl(255)
}

/// An option with the link address that is to be believed.
const LIAR: [u8; 6] = [2, 0, 0, 0, 0, 0x66];

/// RFC 6105: a guest is no router. What it says of routes and prefixes, the host
/// does not get to hear, and nobody else.
#[test]
fn guests_are_no_routers() -> Result<()> {
    let topology = V6.topology().inside(Inside::Veth).guests(2).build()?;
    // A host that would believe them.
    for setting in ["accept_ra", "accept_redirects", "accept_ra_min_hop_limit"] {
        let value = if setting == "accept_ra" { "2" } else { "1" };
        topology
            .host
            .sysctl(&format!("net.ipv6.conf.veth0.{setting}"), value)?;
    }
    let world = World::start_in(topology, &[])?;
    let wires = Wires::open(&world)?;
    let host = &world.topology.host;
    let capture = listen(&world)?;
    let routes = || host.ip("-6 route show table all");
    let before = routes()?;
    let guest: IpAddr = "fe80::77".parse()?;
    let all: IpAddr = "ff02::1".parse()?;
    let IpAddr::V6(remote) = V6.remote(0, 0).ip() else {
        unreachable!()
    };
    // A default router for half an hour, and a prefix on its link.
    let mut prefix = vec![3, 4, 64, 0xc0, 0, 0, 0x70, 8, 0, 0, 0x70, 8, 0, 0, 0, 0];
    prefix.extend([
        0x20, 0x01, 0x0d, 0xb8, 0x66, 0x66, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let body = [&[0; 8], &[1, 1][..], &LIAR, &prefix].concat();
    let advertisement = |source, to| discovery(source, to, 134, [64, 0, 0x07, 0x08], &body);
    // The remote is better reached by this one.
    let IpAddr::V6(target) = guest else {
        unreachable!()
    };
    let about = packet::udp(V6.outside(1), V6.remote(0, 53)).build();
    let quoted = [&[4, 13, 0, 0, 0, 0, 0, 0], &about[..]].concat();
    let body = [
        &target.octets()[..],
        &remote.octets(),
        &[2, 1],
        &LIAR,
        &quoted,
    ]
    .concat();
    let redirect = |source, to| discovery(source, to, 137, [0; 4], &body);
    let mut count = 0;
    for to in [all, V6.inside_host(0, 1), V6.remote(0, 0).ip()] {
        for source in [guest, wires.inside(0, 0).ip(), V6.inside_host(0, 1)] {
            wires.guests[0].send(&advertisement(source, to))?;
            wires.guests[0].send(&redirect(source, to))?;
            count += 2;
        }
    }
    wires.nothing_arrives()?;
    let after = routes()?;
    ensure!(after == before, "{before}\nbecame\n{after}");
    check_count(&world, "spoofed-router", count)?;
    let packets = capture.stop()?;
    let leaked = packets
        .list
        .iter()
        .find(|packet| packet.ip().windows(6).any(|bytes| bytes == LIAR));
    ensure!(leaked.is_none(), "leaked: {leaked:?}");
    Ok(())
}

/// A guest that says it is somebody else is not believed: neither the gateway,
/// nor another guest that the host knows.
#[test]
fn guests_do_not_pose_as_others() -> Result<()> {
    let world = World::start(V6.topology().inside(Inside::Bridge).guests(2), &[])?;
    let host = &world.topology.host;
    let [victim, gateway] = [V6.address_of(world.guest(1)), V6.inside_host(0, 1)];
    // The victim has a session, and so a link address.
    let pinged = ping(&world.guest(1).namespace, V6.server(0, 0).ip(), 1, &[])?;
    ensure!(pinged.received == 1, "{}", pinged.output);
    let pinged = ping(host, victim, 1, &[])?;
    ensure!(pinged.received == 1, "{}", pinged.output);
    let wires = Wires::open(&world)?;
    let neighbour = || host.ip(&format!("-6 neighbour show {victim} dev br0"));
    let link = world.guest(1).namespace.mac_address(GUEST_DEVICE)?;
    ensure!(neighbour()?.contains(&link), "{}", neighbour()?);
    let liar = wires.inside(0, 0).ip();
    let all: IpAddr = "ff02::1".parse()?;
    let target_of = |address: IpAddr| match address {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(_) => unreachable!(),
    };
    // Unasked, asked, and to override what is known.
    let advertisement = |source, to, address, flags| {
        let body = [&target_of(address)[..], &[2, 1], &LIAR].concat();
        discovery(source, to, 136, [flags, 0, 0, 0], &body)
    };
    let solicitation = |source, to, address| {
        let body = [&target_of(address)[..], &[1, 1], &LIAR].concat();
        discovery(source, to, 135, [0; 4], &body)
    };
    let mut count = 0;
    for address in [victim, gateway] {
        for source in [liar, address] {
            for (to, flags) in [(gateway, 0x60), (gateway, 0x20), (all, 0x20)] {
                wires.guests[0].send(&advertisement(source, to, address, flags))?;
                count += 1;
            }
        }
        // Who asks tells its link address, too.
        wires.guests[0].send(&solicitation(address, gateway, gateway))?;
        count += 1;
    }
    wires.nothing_arrives()?;
    ensure!(neighbour()?.contains(&link), "{}", neighbour()?);
    check_count(&world, "spoofed-neighbour", count)?;
    world.check_reach()
}

/// An error about a packet with extension headers is translated, and what it
/// quotes (RFC 5508 REQ-3b, of IPv4's options).
#[test]
fn extension_headers_of_the_quoted_packet_are_traversed() -> Result<()> {
    let (_world, wires) = V6.wired(1, &[])?;
    let remote = V6.remote(0, 53);
    let chains = [
        vec![(HOP_BY_HOP, PADDING.to_vec())],
        vec![(OPTIONS, options(30))],
        vec![
            (HOP_BY_HOP, PADDING.to_vec()),
            (ROUTING, FOLLOWED.to_vec()),
            (OPTIONS, PADDING.to_vec()),
        ],
    ];
    for (port, kind) in (40_000..).zip(KINDS) {
        let (inside, outside) = (wires.inside(0, port), V6.outside(port));
        wires.guests[0].send(&kind.out(inside, remote))?;
        wires.world.receive()?;
        for chain in &chains {
            let about = |packet: Builder| with(packet, chain).build();
            // The error itself may have some, too.
            let error = |to, about: &[u8]| {
                let error = packet::icmp_error(V6.router(), to, (1, 3), [0; 4], about);
                error.extension(HOP_BY_HOP, &PADDING)
            };
            wires
                .world
                .send(&error(outside.ip(), &about(kind.out(outside, remote))))?;
            let expected = error(inside.ip(), &about(kind.out(inside, remote)));
            wires.guests[0]
                .receive_this(&expected.ttl(63))
                .with_context(|| format!("{kind:?}, {chain:02x?}"))?;
            // Of the first fragment of a packet.
            let about = |packet: Builder| with(packet.payload(&[7; 100]), chain).fragment(0..64);
            wires
                .world
                .send(&error(outside.ip(), &about(kind.out(outside, remote))))?;
            let expected = error(inside.ip(), &about(kind.out(inside, remote)));
            wires.guests[0]
                .receive_this(&expected.ttl(63))
                .with_context(|| format!("{kind:?}, in a fragment, {chain:02x?}"))?;
            // And outwards.
            let about = |packet: Builder| with(packet, chain).build();
            let error =
                |from, about: &[u8]| packet::icmp_error(from, remote.ip(), (1, 4), [0; 4], about);
            wires.guests[0].send(&error(inside.ip(), &about(kind.back(remote, inside))))?;
            let expected = error(outside.ip(), &about(kind.back(remote, outside)));
            wires
                .world
                .receive_this(&expected.ttl(63))
                .with_context(|| format!("{kind:?}, outwards, {chain:02x?}"))?;
        }
    }
    wires.nothing_arrives()
}
