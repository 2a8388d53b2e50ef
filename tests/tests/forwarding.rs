//! The host as a hop: time to live, routes, neighbours, and sizes.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    capture::Partial,
    packet::{self, Builder, Parsed},
    topology::{self, Inside, Topology, UPLINK},
    traffic::{self, Amount, TcpReflector, TcpSession, UdpReflector, iperf3, ping, reflect_udp},
};
use tapnat_tests::{
    both_families,
    family::{Family, IcmpKind, V4, V6},
    instance::PATIENCE,
    wires::{self, Wires},
    world::World,
};

/// The host's address on the first guest's device.
fn inside_gateway(family: Family) -> IpAddr {
    family.inside_host(0, 1)
}

fn veth(family: Family) -> topology::Builder {
    family.topology().inside(Inside::Veth)
}

/// Checks that a packet is an ICMP error of this kind, from and to, that quotes
/// the beginning of a packet unchanged, and returns the four bytes behind its
/// checksum.
fn check_error(
    arrived: &Parsed,
    kind: IcmpKind,
    ends: (IpAddr, IpAddr),
    about: &Builder,
) -> Result<[u8; 4]> {
    ensure!(
        arrived.icmp_kind() == Some(kind)
            && (arrived.source_address(), arrived.destination_address()) == ends,
        "{arrived:?}"
    );
    let about = about.build();
    // The IP header and at least 8 bytes (RFC 792).
    let least = Family::of(ends.0).header_length() + 8;
    ensure!(
        arrived.payload.len() >= least && about.starts_with(&arrived.payload),
        "quotes {:02x?}\nof {about:02x?}",
        arrived.payload
    );
    arrived.icmp_rest().context("no ICMP")
}

/// The MTU that a "fragmentation needed" tells, or a "packet too big".
fn mtu(rest: [u8; 4]) -> u32 {
    u32::from_be_bytes(rest)
}

fn traceroute_shows_every_hop(family: Family) -> Result<()> {
    let world = World::start(veth(family).router(), &[])?;
    let target = family.server(0, 0).ip();
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
            inside_gateway(family).to_string(),
            family.gateway().to_string(),
            target.to_string(),
        ];
        ensure!(hops == expected, "traceroute {method}: {said}");
    }
    Ok(())
}
both_families!(traceroute_shows_every_hop);

fn a_packet_out_of_time_is_answered_and_goes_no_further(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let guest = wires.inside(0, 40_000);
    // Without a session, and with one.
    for has_session in [false, true] {
        if has_session {
            wires.map_udp(0, guest.port(), family.remote(0, 53))?;
        }
        for ttl in [0, 1] {
            let late = packet::udp(guest, family.remote(0, 53))
                .ttl(ttl)
                .payload(b"late");
            wires.guests[0].send(&late)?;
            let answer = wires.guests[0].receive()?;
            check_error(
                &answer,
                family.time_exceeded(),
                (inside_gateway(family), guest.ip()),
                &late,
            )?;
            wires.nothing_arrives()?;
        }
    }
    let last = packet::udp(guest, family.remote(0, 53)).ttl(2);
    ensure!(wires.out(0, &last)?.ttl() == 1, "not decremented once");

    let late = packet::udp(family.remote(0, 53), family.outside(guest.port())).ttl(1);
    wires.world.send(&late.clone().payload(b"late"))?;
    let answer = wires.world.receive()?;
    let ends = (family.outside_address(), family.remote(0, 53).ip());
    check_error(
        &answer,
        family.time_exceeded(),
        ends,
        &late.payload(b"late"),
    )?;
    wires.nothing_arrives()
}
both_families!(a_packet_out_of_time_is_answered_and_goes_no_further);

fn no_error_is_answered_with_an_error(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let guest = wires.inside(0, 40_000);
    wires.map_udp(0, guest.port(), family.remote(0, 53))?;
    let about = packet::udp(family.remote(0, 53), guest).build();
    let error = packet::unreachable(guest.ip(), family.remote(0, 53).ip(), 3, &about).ttl(1);
    wires.guests[0].send(&error)?;
    // Nor a fragment that is not the first.
    let large = packet::udp(guest, family.remote(0, 53))
        .payload(&[0; 3000])
        .ttl(1);
    wires.guests[0].send_all(&large, |packet| packet.fragments(1500)[1..].to_vec())?;
    wires.nothing_arrives()
}
both_families!(no_error_is_answered_with_an_error);

fn a_neighbour_on_the_uplink_is_reached_directly(family: Family) -> Result<()> {
    let (world, wires) = family.wired(1, &[])?;
    let neighbour = SocketAddr::new(family.uplink_host(9), 53);
    world.topology.host.ip(&format!(
        "neighbour replace {} lladdr 02:00:00:00:00:99 nud permanent dev {UPLINK}",
        neighbour.ip()
    ))?;
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
both_families!(a_neighbour_on_the_uplink_is_reached_directly);

fn the_first_packet_waits_for_its_neighbour(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let host = &world.topology.host;
    for _ in 0..3 {
        host.ip(&format!("neighbour flush dev {UPLINK}"))?;
        host.ip("neighbour flush dev veth0")?;
        world.check_reach()?;
    }
    Ok(())
}
both_families!(the_first_packet_waits_for_its_neighbour);

fn a_neighbour_that_changes_its_address_is_followed(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let Topology { host, .. } = &world.topology;
    let (peer, device) = world.topology.uplink_peer();
    let reflector = UdpReflector::start(peer, family.server(0, 7))?;
    let socket = world.guest_socket(0, 40_000)?;
    let seen = reflect_udp(&socket, reflector.address(), b"before")?;
    let set = |namespace: &Namespace, address: &str| {
        namespace.ip(&format!("link set {device} address {address}"))
    };
    set(peer, "02:00:00:00:00:42")?;
    let gateway = family.gateway();
    host.ip(&format!(
        "neighbour replace {gateway} lladdr 02:00:00:00:00:42 nud reachable dev {UPLINK}"
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
both_families!(a_neighbour_that_changes_its_address_is_followed);

fn what_is_too_big_for_the_uplink_is_answered_with_its_mtu(family: Family) -> Result<()> {
    let world = World::start(veth(family).uplink_mtu(1400), &[])?;
    let wires = Wires::open(&world)?;
    let guest = wires.inside(0, 40_000);
    let with_length = |packet: Builder, length: usize| {
        let headers = packet.build().len();
        packet
            .dont_fragment()
            .payload(&traffic::pattern(length - headers))
    };
    let kinds = [
        packet::udp(guest, family.remote(0, 53)),
        packet::tcp(guest, family.remote(0, 53)).with_tcp(|header| header.syn = true),
        packet::echo_request(guest.ip(), family.remote(0, 0).ip(), 7, 7),
    ];
    for kind in kinds {
        // First without a session, then with one.
        for length in [1401, 1400, 1500, 1400] {
            let packet = with_length(kind.clone(), length);
            wires.guests[0].send(&packet)?;
            if length > 1400 {
                let answer = wires.guests[0].receive()?;
                let ends = (inside_gateway(family), guest.ip());
                let rest = check_error(&answer, family.too_big(), ends, &packet)?;
                ensure!(mtu(rest) == 1400, "{answer:?}");
            } else {
                wires.world.receive()?;
            }
        }
    }
    wires.nothing_arrives()
}
both_families!(what_is_too_big_for_the_uplink_is_answered_with_its_mtu);

fn what_is_too_big_for_a_guest_is_answered_with_its_mtu(family: Family) -> Result<()> {
    let world = World::start(veth(family).inside_mtu(1400), &[])?;
    let wires = Wires::open(&world)?;
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let most = 1400 - family.header_length() - 8;
    let large = packet::udp(family.remote(0, 53), outside)
        .dont_fragment()
        .payload(&traffic::pattern(most + 1));
    wires.world.send(&large)?;
    let answer = wires.world.receive()?;
    let ends = (family.outside_address(), family.remote(0, 53).ip());
    let rest = check_error(&answer, family.too_big(), ends, &large)?;
    ensure!(mtu(rest) == 1400, "{answer:?}");
    wires.world.send(&large.payload(&traffic::pattern(most)))?;
    ensure!(wires.guests[0].receive()?.payload.len() == most);
    wires.nothing_arrives()
}
both_families!(what_is_too_big_for_a_guest_is_answered_with_its_mtu);

/// TCP both ways, also in bulk, and what `ping` says of a packet too large.
fn check_path_mtu(world: &World, teller: IpAddr) -> Result<()> {
    let family = world.family();
    let guest = &world.guest(0).namespace;
    let outer = &world.topology.world;
    let size = (1500 - family.header_length() - 8).to_string();
    let target = family.server(0, 0).ip();
    let large = ping(guest, target, 1, &["-M", "do", "-s", &size])?;
    let told = large.output.contains(&format!("From {teller} "));
    let mtu = match family {
        V4 => "mtu = 1400",
        V6 => "mtu=1400",
    };
    ensure!(told && large.output.contains(mtu), "{}", large.output);
    let tcp = TcpReflector::start(outer, family.server(1, 7))?;
    TcpSession::open(guest, None, tcp.address())?.exchange(&traffic::pattern(1 << 20))?;
    for options in [&[][..], &["-R"]] {
        let amount = Amount::Bytes(4 << 20);
        let bulk = iperf3(guest, outer, family.server(0, 5201), amount, options)?;
        ensure!(bulk.sent >= 4 << 20, "{bulk:?}");
    }
    Ok(())
}

fn tcp_finds_the_mtu_of_the_uplink(family: Family) -> Result<()> {
    let world = World::start(family.topology().uplink_mtu(1400), &[])?;
    check_path_mtu(&world, inside_gateway(family))
}
both_families!(tcp_finds_the_mtu_of_the_uplink);

fn tcp_finds_the_mtu_of_the_path(family: Family) -> Result<()> {
    let world = World::start(family.topology().path_mtu(1400), &[])?;
    check_path_mtu(&world, family.gateway())
}
both_families!(tcp_finds_the_mtu_of_the_path);

fn tcp_finds_the_mtu_of_the_guests_link(family: Family) -> Result<()> {
    // The guest believes in more than its link carries: only ICMP tells.
    let builder = family.topology();
    let world = World::start(builder, &[])?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    host.ip("link set tap0 mtu 1400")?;
    let tcp = TcpReflector::start(outer, family.server(1, 7))?;
    let guest = &world.guest(0).namespace;
    TcpSession::open(guest, None, tcp.address())?.exchange(&traffic::pattern(1 << 20))
}
both_families!(tcp_finds_the_mtu_of_the_guests_link);

#[test]
fn strict_reverse_path_filters_are_no_obstacle() -> Result<()> {
    let topology = veth(V4).build()?;
    topology.host.sysctl("net.ipv4.conf.all.rp_filter", "1")?;
    topology
        .host
        .sysctl("net.ipv4.conf.uplink0.rp_filter", "1")?;
    World::start_in(topology, &[])?.check_reach()
}

fn sources_that_do_not_belong_to_the_device_do_not_get_out(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    let foreign: &[&str] = match family {
        V4 => &[
            "10.0.1.77",
            "10.0.0.1",
            "192.168.7.7",
            "203.0.113.5",
            "198.51.100.2",
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
        ],
        V6 => &[
            "fd00:7a70:0:1::4d",
            "fd00:7a70::1",
            "fd07::7",
            "2001:db8:2::5",
            "2001:db8:1::2",
            "::1",
            "::",
            "fe80::77",
            "ff02::1",
            "ff0e::1",
            "::ffff:10.0.0.77",
        ],
    };
    for source in foreign {
        let source = SocketAddr::new(source.parse()?, 40_000);
        wires.guests[0].send(&packet::udp(source, family.remote(0, 53)))?;
        wires.guests[0].send(
            &packet::tcp(source, family.remote(0, 53)).with_tcp(|header| {
                header.syn = true;
            }),
        )?;
        wires
            .nothing_arrives()
            .with_context(|| format!("from {source}"))?;
    }
    Ok(())
}
both_families!(sources_that_do_not_belong_to_the_device_do_not_get_out);

fn destinations_that_are_no_single_host_stay_inside(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let destinations: &[&str] = match family {
        V4 => &[
            "224.0.0.251:5353",
            "239.255.255.250:1900",
            "255.255.255.255:67",
            "10.0.0.255:137",
            "127.0.0.1:53",
            "0.0.0.0:53",
            "240.0.0.1:53",
        ],
        V6 => &[
            "[ff02::fb]:5353",
            "[ff02::1]:5353",
            "[ff05::c]:1900",
            "[ff0e::101]:123",
            "[fe80::1]:53",
            "[::1]:53",
            "[::]:53",
            "[::ffff:203.0.113.77]:53",
        ],
    };
    for destination in destinations {
        let destination = destination.parse()?;
        wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), destination))?;
        wires
            .nothing_arrives()
            .with_context(|| format!("to {destination}"))?;
    }
    Ok(())
}
both_families!(destinations_that_are_no_single_host_stay_inside);

fn malformed_packets_are_dropped(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let good = [
        packet::udp(wires.inside(0, 40_000), family.remote(0, 53)).payload(&[7; 64]),
        packet::udp(family.remote(0, 53), outside).payload(&[7; 64]),
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
        let changes = match family {
            V4 => [(0, 0x65), (0, 0x44), (0, 0x40), (2, 0xff), (3, 19)],
            V6 => [(0, 0x45), (0, 0x50), (4, 0xff), (5, 0), (5, 7)],
        };
        for (at, value) in changes {
            wire.send_all(packet, change(at, value))?;
        }
        // Cut off in the IP header, before and in the transport header.
        let header = family.header_length();
        for length in [0, 1, header - 1, header, header + 4, header + 7] {
            wire.send_all(packet, |packet| {
                vec![packet.build()[..ip + length].to_vec()]
            })?;
        }
        wires.nothing_arrives()?;
    }
    Ok(())
}
both_families!(malformed_packets_are_dropped);

/// A frame with a tag is of another network than the device's own, also where
/// the kernel has moved the tag out of the frame.
fn frames_with_a_vlan_tag_are_not_translated(family: Family) -> Result<()> {
    const TAG: [u8; 4] = [0x81, 0, 0, 5];
    let (_world, wires) = family.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let tagged = |packet: &Builder| {
        let frame = packet.build();
        vec![[&frame[..12], &TAG, &frame[12..]].concat()]
    };
    // With a session and without.
    for port in [40_000, 40_001] {
        let packet = packet::udp(wires.inside(0, port), family.remote(0, 53));
        wires.guests[0].send_all(&packet, tagged)?;
        wires.nothing_arrives()?;
    }
    wires
        .world
        .send_all(&packet::udp(family.remote(0, 53), outside), tagged)?;
    wires.nothing_arrives()
}
both_families!(frames_with_a_vlan_tag_are_not_translated);

/// A tag of no network, which has but a priority, changes nothing (IEEE 802.1Q section 6.9): the
/// host takes such frames for its own as well. What is below two of them is nobody's.
fn frames_with_a_priority_tag_are_translated(family: Family) -> Result<()> {
    const TAG: [u8; 4] = [0x81, 0, 0xa0, 0];
    let (world, wires) = family.wired(1, &["--deny-host"])?;
    let tagged = |packet: &Builder, tags: usize| {
        let frame = packet.build();
        vec![[&frame[..12], &TAG.repeat(tags), &frame[12..]].concat()]
    };
    let remote = family.remote(0, 53);
    // To begin a session, and with it.
    for payload in [b"first", b"again"] {
        let packet = packet::udp(wires.inside(0, 40_000), remote).payload(payload);
        wires.guests[0].send_all(&packet, |packet| tagged(packet, 1))?;
        let arrived = wires.world.receive()?;
        ensure!(
            arrived.source() == family.outside(40_000) && arrived.payload == payload,
            "{arrived:?}"
        );
    }
    let answer = packet::udp(remote, family.outside(40_000)).payload(b"answer");
    wires.world.send_all(&answer, |packet| tagged(packet, 1))?;
    let arrived = wires.guests[0].receive()?;
    ensure!(
        arrived.destination() == wires.inside(0, 40_000),
        "{arrived:?}"
    );
    // Nor is it a way around what is denied.
    let host = SocketAddr::new(family.outside_address(), 9);
    let packet = packet::udp(wires.inside(0, 40_000), host);
    wires.guests[0].send_all(&packet, |packet| tagged(packet, 1))?;
    ensure!(
        wires.guests[0].receive()?.icmp_kind().is_some(),
        "let through"
    );
    ensure!(world.instance.count("host-denied")? == 1, "not counted");

    let packet = packet::udp(wires.inside(0, 40_001), remote);
    wires.guests[0].send_all(&packet, |packet| tagged(packet, 2))?;
    wires.nothing_arrives()?;
    ensure!(world.instance.count("bad-header")? == 1, "not counted");
    Ok(())
}
both_families!(frames_with_a_priority_tag_are_translated);

/// Who is nobody, or a neighbour on the uplink's own link, gets no answer from a guest: the host's
/// own checks of sources are passed by.
fn sources_that_nobody_can_answer_are_not_let_in(family: Family) -> Result<()> {
    let arguments = ["--filtering", "endpoint-independent"];
    let (world, wires) = family.wired(1, &arguments)?;
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let sources: &[&str] = match family {
        V4 => &["127.0.0.1", "0.0.0.1", "224.0.0.1", "0.128.0.1"],
        V6 => &["::1", "::ffff:10.0.0.1", "ff02::1", "fe80::1"],
    };
    for source in sources {
        let source = SocketAddr::new(source.parse()?, 53);
        wires.world.send(&packet::udp(source, outside))?;
    }
    wires.nothing_arrives()?;
    let counted = world.instance.count("spoofed-source")?;
    ensure!(counted == sources.len() as u64, "{counted} counted");
    Ok(())
}
both_families!(sources_that_nobody_can_answer_are_not_let_in);

/// A checksum that is wrong stays wrong, so that its receiver can tell.
fn bad_checksums_are_not_made_good(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let out = packet::udp(wires.inside(0, 40_000), family.remote(0, 53)).payload(b"bad");
    let back = packet::udp(family.remote(0, 53), outside).payload(b"bad");
    let mut faults = vec![Builder::bad_transport_checksum as fn(Builder) -> Builder];
    if family == V4 {
        faults.push(Builder::bad_ip_checksum);
    }
    for bad in faults {
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
both_families!(bad_checksums_are_not_made_good);
