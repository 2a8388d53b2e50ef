//! The host as a hop: time to live, routes, neighbours, and sizes.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    capture::Partial,
    packet::{self, Builder, Parsed},
    topology::{GATEWAY, Inside, Topology, UPLINK, WORLD_ADDRESSES},
    traffic::{self, Amount, TcpReflector, TcpSession, UdpReflector, iperf3, ping, reflect_udp},
};
use tapnat_tests::{
    instance::PATIENCE,
    wires::{self, Wires, remote, wired},
    world::{OUTSIDE, World, outside, server},
};

/// The host's address on the guest's device.
const INSIDE_GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
/// The ICMP errors here: type and code.
const TIME_EXCEEDED: (u8, u8) = (11, 0);
const FRAGMENTATION_NEEDED: (u8, u8) = (3, 4);

fn veth() -> tapnat_testbed::topology::Builder {
    Topology::builder().inside(Inside::Veth)
}

/// Checks that a packet is an ICMP error of this kind, from and to, that quotes
/// the beginning of a packet unchanged, and returns the four bytes behind its
/// checksum.
fn check_error(
    arrived: &Parsed,
    kind: (u8, u8),
    ends: (IpAddr, IpAddr),
    about: &Builder,
) -> Result<[u8; 4]> {
    let icmp = arrived.icmpv4().with_context(|| format!("{arrived:?}"))?;
    let bytes = icmp.to_bytes();
    ensure!((bytes[0], bytes[1]) == kind, "{arrived:?}");
    ensure!(
        (arrived.source_address(), arrived.destination_address()) == ends,
        "{arrived:?}"
    );
    let about = about.build();
    // The IP header and at least 8 bytes (RFC 792).
    ensure!(
        arrived.payload.len() >= 28 && about.starts_with(&arrived.payload),
        "quotes {:02x?}\nof {about:02x?}",
        arrived.payload
    );
    Ok([bytes[4], bytes[5], bytes[6], bytes[7]])
}

/// The MTU that a "fragmentation needed" tells.
fn mtu(rest: [u8; 4]) -> u16 {
    u16::from_be_bytes([rest[2], rest[3]])
}

#[test]
fn traceroute_shows_every_hop() -> Result<()> {
    let world = World::start(veth().router(), &[])?;
    let [target, _] = WORLD_ADDRESSES;
    for method in ["-I", "-U", "-T"] {
        let said = world.guest(0).namespace.exec(&format!(
            "traceroute -n -q 1 -w 3 -m 5 -N 1 {method} {target}"
        ))?;
        let hops: Vec<_> = said
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        let expected = [
            INSIDE_GATEWAY.to_string(),
            GATEWAY.to_string(),
            target.to_string(),
        ];
        ensure!(hops == expected, "traceroute {method}: {said}");
    }
    Ok(())
}

#[test]
fn a_packet_out_of_time_is_answered_and_goes_no_further() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let guest = wires.inside(0, 40_000);
    // Without a session, and with one.
    for has_session in [false, true] {
        if has_session {
            wires.map_udp(0, guest.port(), remote(0, 53))?;
        }
        for ttl in [0, 1] {
            let late = packet::udp(guest, remote(0, 53)).ttl(ttl).payload(b"late");
            wires.guests[0].send(&late)?;
            let answer = wires.guests[0].receive()?;
            check_error(&answer, TIME_EXCEEDED, (INSIDE_GATEWAY, guest.ip()), &late)?;
            wires.nothing_arrives()?;
        }
    }
    let last = packet::udp(guest, remote(0, 53)).ttl(2);
    ensure!(wires.out(0, &last)?.ttl() == 1, "not decremented once");

    let late = packet::udp(remote(0, 53), outside(guest.port())).ttl(1);
    wires.world.send(&late.clone().payload(b"late"))?;
    let answer = wires.world.receive()?;
    let ends = (OUTSIDE, remote(0, 53).ip());
    check_error(&answer, TIME_EXCEEDED, ends, &late.payload(b"late"))?;
    wires.nothing_arrives()
}

#[test]
fn no_error_is_answered_with_an_error() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let guest = wires.inside(0, 40_000);
    wires.map_udp(0, guest.port(), remote(0, 53))?;
    let about = packet::udp(remote(0, 53), guest).build();
    let error = packet::unreachable(guest.ip(), remote(0, 53).ip(), 3, &about).ttl(1);
    wires.guests[0].send(&error)?;
    // Nor a fragment that is not the first.
    let large = packet::udp(guest, remote(0, 53)).payload(&[0; 3000]).ttl(1);
    wires.guests[0].send_all(&large, |packet| packet.fragments(1500)[1..].to_vec())?;
    wires.nothing_arrives()
}

#[test]
fn a_neighbour_on_the_uplink_is_reached_directly() -> Result<()> {
    let (world, wires) = wired(1, &[])?;
    world.topology.host.ip(&format!(
        "neighbour replace 198.51.100.9 lladdr 02:00:00:00:00:99 nud permanent dev {UPLINK}"
    ))?;
    let neighbour: SocketAddr = "198.51.100.9:53".parse()?;
    for _ in 0..2 {
        let packet = packet::udp(wires.inside(0, 40_000), neighbour);
        // The wire's end sees it, though it is for another.
        let arrived = wires.out(0, &packet)?;
        let frame = arrived.ethernet.as_ref().context("no Ethernet header")?;
        ensure!(
            frame.destination == [2, 0, 0, 0, 0, 0x99] && arrived.destination() == neighbour,
            "{arrived:02x?}"
        );
    }
    Ok(())
}

#[test]
fn the_first_packet_waits_for_its_neighbour() -> Result<()> {
    let world = World::start(veth(), &[])?;
    let host = &world.topology.host;
    for _ in 0..3 {
        host.ip(&format!("neighbour flush dev {UPLINK}"))?;
        host.ip("neighbour flush dev veth0")?;
        world.check_reach()?;
    }
    Ok(())
}

#[test]
fn a_neighbour_that_changes_its_address_is_followed() -> Result<()> {
    let world = World::start(veth(), &[])?;
    let Topology { host, .. } = &world.topology;
    let (peer, device) = world.topology.uplink_peer();
    let reflector = UdpReflector::start(peer, server(0, 7))?;
    let socket = world.guest_socket(0, 40_000)?;
    let seen = reflect_udp(&socket, reflector.address(), b"before")?;
    let set = |namespace: &Namespace, address: &str| {
        namespace.ip(&format!("link set {device} address {address}"))
    };
    set(peer, "02:00:00:00:00:42")?;
    host.ip(&format!(
        "neighbour replace {GATEWAY} lladdr 02:00:00:00:00:42 nud reachable dev {UPLINK}"
    ))?;
    let start = Instant::now();
    let mut number = 0_u32;
    // Not at once: the change is told to tapnat behind the packets' back.
    while !reflector
        .received()
        .iter()
        .any(|datagram| datagram.payload.ends_with(b"after"))
    {
        number += 1;
        socket.send_to(b"after", reflector.address())?;
        std::thread::sleep(std::time::Duration::from_millis(10));
        ensure!(
            start.elapsed() < PATIENCE,
            "none of {number} packets arrived"
        );
    }
    ensure!(
        reflect_udp(&socket, reflector.address(), b"and back")? == seen,
        "another outside endpoint"
    );
    Ok(())
}

#[test]
fn what_is_too_big_for_the_uplink_is_answered_with_its_mtu() -> Result<()> {
    let world = World::start(veth().uplink_mtu(1400), &[])?;
    let wires = Wires::open(&world)?;
    let guest = wires.inside(0, 40_000);
    let with_length = |packet: Builder, length: usize| {
        let headers = packet.build().len();
        packet
            .dont_fragment()
            .payload(&traffic::pattern(length - headers))
    };
    let kinds = [
        packet::udp(guest, remote(0, 53)),
        packet::tcp(guest, remote(0, 53)).with_tcp(|header| header.syn = true),
        packet::echo_request(guest.ip(), remote(0, 0).ip(), 7, 7),
    ];
    for kind in kinds {
        // First without a session, then with one.
        for length in [1401, 1400, 1500, 1400] {
            let packet = with_length(kind.clone(), length);
            wires.guests[0].send(&packet)?;
            if length > 1400 {
                let answer = wires.guests[0].receive()?;
                let ends = (INSIDE_GATEWAY, guest.ip());
                let rest = check_error(&answer, FRAGMENTATION_NEEDED, ends, &packet)?;
                ensure!(mtu(rest) == 1400, "{answer:?}");
            } else {
                wires.world.receive()?;
            }
        }
    }
    wires.nothing_arrives()
}

#[test]
fn what_is_too_big_for_a_guest_is_answered_with_its_mtu() -> Result<()> {
    let world = World::start(veth().inside_mtu(1400), &[])?;
    let wires = Wires::open(&world)?;
    let outside = wires.map_udp(0, 40_000, remote(0, 53))?;
    let large = packet::udp(remote(0, 53), outside)
        .dont_fragment()
        .payload(&traffic::pattern(1373));
    wires.world.send(&large)?;
    let answer = wires.world.receive()?;
    let ends = (OUTSIDE, remote(0, 53).ip());
    let rest = check_error(&answer, FRAGMENTATION_NEEDED, ends, &large)?;
    ensure!(mtu(rest) == 1400, "{answer:?}");
    wires.world.send(&large.payload(&traffic::pattern(1372)))?;
    ensure!(wires.guests[0].receive()?.payload.len() == 1372);
    wires.nothing_arrives()
}

/// TCP both ways, also in bulk, and what `ping` says of a packet too large.
fn check_path_mtu(world: &World, teller: IpAddr) -> Result<()> {
    let guest = &world.guest(0).namespace;
    let outer = &world.topology.world;
    let large = ping(guest, server(0, 0).ip(), 1, &["-M", "do", "-s", "1472"])?;
    let told = large.output.contains(&format!("From {teller} "));
    ensure!(
        told && large.output.contains("mtu = 1400"),
        "{}",
        large.output
    );
    let tcp = TcpReflector::start(outer, server(1, 7))?;
    TcpSession::open(guest, None, tcp.address())?.exchange(&traffic::pattern(1 << 20))?;
    for options in [&[][..], &["-R"]] {
        let amount = Amount::Bytes(4 << 20);
        let bulk = iperf3(guest, outer, server(0, 5201), amount, options)?;
        ensure!(bulk.sent >= 4 << 20, "{bulk:?}");
    }
    Ok(())
}

#[test]
fn tcp_finds_the_mtu_of_the_uplink() -> Result<()> {
    let world = World::start(Topology::builder().uplink_mtu(1400), &[])?;
    check_path_mtu(&world, INSIDE_GATEWAY)
}

#[test]
fn tcp_finds_the_mtu_of_the_path() -> Result<()> {
    let world = World::start(Topology::builder().path_mtu(1400), &[])?;
    check_path_mtu(&world, GATEWAY.into())
}

#[test]
fn tcp_finds_the_mtu_of_the_guests_link() -> Result<()> {
    // The guest believes in more than its link carries: only ICMP tells.
    let builder = Topology::builder();
    let world = World::start(builder, &[])?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    host.ip("link set tap0 mtu 1400")?;
    let tcp = TcpReflector::start(outer, server(1, 7))?;
    let guest = &world.guest(0).namespace;
    TcpSession::open(guest, None, tcp.address())?.exchange(&traffic::pattern(1 << 20))
}

#[test]
fn strict_reverse_path_filters_are_no_obstacle() -> Result<()> {
    let topology = veth().build()?;
    topology.host.sysctl("net.ipv4.conf.all.rp_filter", "1")?;
    topology
        .host
        .sysctl("net.ipv4.conf.uplink0.rp_filter", "1")?;
    World::start_in(topology, &[])?.check_reach()
}

#[test]
fn sources_that_do_not_belong_to_the_device_do_not_get_out() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    let foreign = [
        "10.0.1.77:40000",
        "10.0.0.1:40000",
        "192.168.7.7:40000",
        "203.0.113.5:40000",
        "198.51.100.2:40000",
        "127.0.0.1:40000",
        "0.0.0.0:68",
        "224.0.0.1:40000",
        "255.255.255.255:40000",
    ];
    for source in foreign {
        let source: SocketAddr = source.parse()?;
        wires.guests[0].send(&packet::udp(source, remote(0, 53)))?;
        wires.guests[0].send(&packet::tcp(source, remote(0, 53)).with_tcp(|header| {
            header.syn = true;
        }))?;
        wires
            .nothing_arrives()
            .with_context(|| format!("from {source}"))?;
    }
    Ok(())
}

#[test]
fn destinations_that_are_no_single_host_stay_inside() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    for destination in [
        "224.0.0.251:5353",
        "239.255.255.250:1900",
        "255.255.255.255:67",
        "10.0.0.255:137",
        "127.0.0.1:53",
        "0.0.0.0:53",
        "240.0.0.1:53",
    ] {
        let destination = destination.parse()?;
        wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), destination))?;
        wires
            .nothing_arrives()
            .with_context(|| format!("to {destination}"))?;
    }
    Ok(())
}

#[test]
fn malformed_packets_are_dropped() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, remote(0, 53))?;
    let good = [
        packet::udp(wires.inside(0, 40_000), remote(0, 53)).payload(&[7; 64]),
        packet::udp(remote(0, 53), outside).payload(&[7; 64]),
    ];
    for (packet, wire) in good.iter().zip([&wires.guests[0], &wires.world]) {
        let ip = wires::LINK_LENGTH;
        let change = |at: usize, value: u8| {
            move |packet: &Builder| {
                let mut frame = packet.build();
                frame[ip + at] = value;
                vec![frame]
            }
        };
        // A version, header lengths and lengths that cannot be.
        for (at, value) in [(0, 0x65), (0, 0x44), (0, 0x40), (2, 0xff), (3, 19)] {
            wire.send_all(packet, change(at, value))?;
        }
        // Cut off in the IP header, before and in the transport header.
        for length in [0, 1, 19, 20, 24, 27] {
            wire.send_all(packet, |packet| {
                vec![packet.build()[..ip + length].to_vec()]
            })?;
        }
        wires.nothing_arrives()?;
    }
    Ok(())
}

/// A frame with a tag is of another network than the device's own, also where
/// the kernel has moved the tag out of the frame.
#[test]
fn frames_with_a_vlan_tag_are_not_translated() -> Result<()> {
    const TAG: [u8; 4] = [0x81, 0, 0, 5];
    let (_world, wires) = wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, remote(0, 53))?;
    let tagged = |packet: &Builder| {
        let frame = packet.build();
        vec![[&frame[..12], &TAG, &frame[12..]].concat()]
    };
    // With a session and without.
    for port in [40_000, 40_001] {
        let packet = packet::udp(wires.inside(0, port), remote(0, 53));
        wires.guests[0].send_all(&packet, tagged)?;
        wires.nothing_arrives()?;
    }
    wires
        .world
        .send_all(&packet::udp(remote(0, 53), outside), tagged)?;
    wires.nothing_arrives()
}

/// A checksum that is wrong stays wrong, so that its receiver can tell.
#[test]
fn bad_checksums_are_not_made_good() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, remote(0, 53))?;
    let out = packet::udp(wires.inside(0, 40_000), remote(0, 53)).payload(b"bad");
    let back = packet::udp(remote(0, 53), outside).payload(b"bad");
    for bad in [Builder::bad_ip_checksum, Builder::bad_transport_checksum] {
        wires.guests[0].send(&bad(out.clone()))?;
        wires.world.send(&bad(back.clone()))?;
        let arrived = wires.unverified_arrivals()?;
        for packet in arrived.world.iter().chain(&arrived.guests[0]) {
            ensure!(
                packet.verify_checksums(Partial::Accept).is_err(),
                "{}",
                packet.summary()
            );
        }
    }
    Ok(())
}
