//! Worlds with plain forwarding in place of a translator: whatever joins the
//! hosts, real packets get through, whole and with right checksums. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like the tests"
)]

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tapnat_testbed::{
    cable::{self, Layer, TunTap},
    capture::{Capture, Direction, Partial},
    packet::{self, Link},
    topology::{
        GUEST_DEVICE, Inside, ROUTER_LINK, Tap, TapMaker, Topology, UPLINK, Uplink,
        WORLD_ADDRESSES, WORLD_ADDRESSES6,
    },
    traffic::{
        self, Amount, FrameSender, HttpServer, IpSender, TcpReflector, TcpSession, UdpReflector,
        curl, iperf3, ping, reflect_udp,
    },
};

const PATIENCE: Duration = Duration::from_secs(5);

fn world(number: usize, port: u16) -> SocketAddr {
    SocketAddr::new(WORLD_ADDRESSES[number].into(), port)
}

/// TCP, UDP and ping from every guest to both of the world's addresses.
fn check_traffic(topology: &Topology) {
    let servers = [
        UdpReflector::start(&topology.world, world(0, 3478)).unwrap(),
        UdpReflector::start(&topology.world, world(1, 3478)).unwrap(),
    ];
    let tcp = TcpReflector::start(&topology.world, world(1, 7)).unwrap();
    let http = HttpServer::start(&topology.world, world(0, 80)).unwrap();
    let (peer, device) = topology.uplink_peer();
    let capture = Capture::start(peer, device).unwrap();
    let payload = traffic::pattern(200_000);
    for guest in &topology.guests {
        let local = SocketAddr::new(guest.address.into(), 40_000);
        let socket = traffic::udp_socket(&guest.namespace, local).unwrap();
        for server in &servers {
            assert_eq!(
                reflect_udp(&socket, server.address(), b"hello").unwrap(),
                local
            );
        }
        let mut session = TcpSession::open(&guest.namespace, Some(local), tcp.address()).unwrap();
        assert_eq!(session.seen(), local);
        session.exchange(&payload).unwrap();
        let seen = curl(&guest.namespace, &format!("http://{}/", http.address())).unwrap();
        assert_eq!(seen.parse::<SocketAddr>().unwrap().ip(), guest.address);
        let body = curl(
            &guest.namespace,
            &format!("http://{}/bytes/100000", http.address()),
        );
        assert_eq!(body.unwrap().as_bytes(), &payload[..100_000]);
        let ping = ping(&guest.namespace, world(0, 0).ip(), 3, &[]).unwrap();
        assert_eq!((ping.transmitted, ping.received), (3, 3), "{}", ping.output);
    }
    assert_eq!(servers[0].received().len(), topology.guests.len());
    assert_eq!(tcp.peers().len(), topology.guests.len());
    let packets = capture.stop().unwrap();
    packets.verify_checksums(Partial::Accept).unwrap();
    for direction in [Direction::In, Direction::Out] {
        let tcp = packets.list.iter().filter(|packet| {
            packet.direction == direction && packet.is(|parsed| parsed.tcp().is_some())
        });
        assert!(tcp.count() > 10, "{}", packets.summary());
    }
}

#[test]
fn guests_on_taps() {
    let topology = Topology::builder().guests(2).build().unwrap();
    topology.forward_plainly().unwrap();
    check_traffic(&topology);
    assert_eq!(topology.inside(), ["tap0=10.0.0.1/24", "tap1=10.0.1.1/24"]);
}

#[test]
fn guests_on_veths() {
    let topology = Topology::builder()
        .inside(Inside::Veth)
        .guests(2)
        .build()
        .unwrap();
    topology.forward_plainly().unwrap();
    check_traffic(&topology);
}

#[test]
fn guests_on_a_bridge() {
    let topology = Topology::builder()
        .inside(Inside::Bridge)
        .guests(3)
        .build()
        .unwrap();
    topology.forward_plainly().unwrap();
    assert_eq!(topology.inside(), ["br0=10.0.0.1/24"]);
    check_traffic(&topology);
    let [one, two, ..] = &topology.guests[..] else {
        unreachable!()
    };
    assert_eq!(
        ping(&one.namespace, two.address.into(), 1, &[])
            .unwrap()
            .received,
        1
    );
}

#[test]
fn guests_on_tuns_and_an_uplink_without_ethernet() {
    let topology = Topology::builder()
        .inside(Inside::Tun)
        .guests(2)
        .uplink(Uplink::Tun)
        .build()
        .unwrap();
    topology.forward_plainly().unwrap();
    check_traffic(&topology);
    let capture = Capture::start(&topology.host, UPLINK).unwrap();
    ping(&topology.guests[0].namespace, world(0, 0).ip(), 1, &[]).unwrap();
    let packets = capture.stop().unwrap();
    assert!(packets.list.iter().all(|packet| packet.link == Link::Ip));
    // A connection of before may still be closing.
    let pings = packets.parsed(|packet| packet.icmpv4().is_some());
    assert_eq!(pings.len(), 2, "{}", packets.summary());
}

#[test]
fn both_address_families() {
    let topology = Topology::builder().ipv6().router().build().unwrap();
    topology.forward_plainly().unwrap();
    check_traffic(&topology);
    let guest = &topology.guests[0];
    let (address, _) = guest.ipv6.unwrap();
    let server = SocketAddr::new(WORLD_ADDRESSES6[1].into(), 3478);
    let server = UdpReflector::start(&topology.world, server).unwrap();
    let local = SocketAddr::new(address.into(), 40_000);
    let socket = traffic::udp_socket(&guest.namespace, local).unwrap();
    let capture = Capture::start(&topology.world, topology.world_device()).unwrap();
    assert_eq!(
        reflect_udp(&socket, server.address(), b"hello").unwrap(),
        local
    );
    let ping = ping(&guest.namespace, WORLD_ADDRESSES6[0].into(), 2, &[]).unwrap();
    assert_eq!(ping.received, 2, "{}", ping.output);
    let mut packets = capture.stop().unwrap();
    packets.verify_checksums(Partial::Accept).unwrap();
    packets
        .list
        .retain(|packet| packet.is(|parsed| parsed.source_address().is_ipv6()));
    assert_eq!(
        packets.list.len(),
        6,
        "only what was sent: {}",
        packets.summary()
    );
}

#[test]
fn a_world_with_ipv6_only() {
    for router in [false, true] {
        let builder = Topology::builder().ipv6_only().guests(2);
        let builder = if router { builder.router() } else { builder };
        let topology = builder.build().unwrap();
        topology.forward_plainly().unwrap();
        assert_eq!(
            topology.inside(),
            ["tap0=fd00:7a70::1/64", "tap1=fd00:7a70:0:1::1/64"]
        );
        let hosts = [
            &topology.host,
            &topology.world,
            &topology.guests[0].namespace,
        ];
        for namespace in hosts {
            let addresses = namespace
                .ip("-4 -oneline address show scope global")
                .unwrap();
            assert_eq!(addresses, "");
        }
        for guest in &topology.guests {
            let ping = ping(&guest.namespace, WORLD_ADDRESSES6[0].into(), 1, &[]).unwrap();
            assert_eq!(ping.received, 1, "{}", ping.output);
        }
    }
}

#[test]
fn a_router_shows_in_traceroute_and_path_mtu() {
    let topology = Topology::builder().path_mtu(1400).build().unwrap();
    topology.forward_plainly().unwrap();
    let guest = &topology.guests[0].namespace;
    let target = world(0, 0).ip();
    let hop = |ttl: &str| ping(guest, target, 1, &["-t", ttl]).unwrap().output;
    assert!(hop("1").contains("From 10.0.0.1 "), "{}", hop("1"));
    assert!(hop("2").contains("From 198.51.100.1 "), "{}", hop("2"));
    assert_eq!(ping(guest, target, 1, &["-t", "3"]).unwrap().received, 1);
    let big = ping(guest, target, 1, &["-M", "do", "-s", "1472"]).unwrap();
    assert!(
        big.output.contains("mtu = 1400") || big.output.contains("mtu=1400"),
        "{}",
        big.output
    );
    let world_side = ping(&topology.world, ROUTER_LINK[0].into(), 1, &[]).unwrap();
    assert_eq!(world_side.received, 1);
}

#[test]
fn a_tap_guest_sends_unsegmented_packets_and_an_old_card_does_not() {
    for offloads in [true, false] {
        let tap = Tap {
            offloads,
            ..Tap::default()
        };
        let topology = Topology::builder()
            .inside(Inside::Tap(tap))
            .build()
            .unwrap();
        topology.forward_plainly().unwrap();
        let guest = &topology.guests[0];
        let capture = Capture::start(&topology.host, "tap0").unwrap();
        let report = iperf3(
            &guest.namespace,
            &topology.world,
            world(0, 5201),
            Amount::Bytes(4 << 20),
            &[],
        )
        .unwrap();
        assert!(report.sent >= 4 << 20 && report.received > 0);
        let from_guest = guest.cable().unwrap().from_first();
        assert!(from_guest.bytes > report.received);
        assert_eq!(from_guest.refused, 0);
        assert_eq!(
            (from_guest.gso > 0, from_guest.partial > 0),
            (offloads, offloads)
        );
        let packets = capture.stop().unwrap();
        packets.verify_checksums(Partial::Accept).unwrap();
        let largest = packets
            .list
            .iter()
            .filter(|packet| packet.direction == Direction::In);
        let largest = largest.max_by_key(|packet| packet.data.len()).unwrap();
        assert_eq!(largest.data.len() > 1514, offloads, "{}", largest.summary());
        assert_eq!(
            largest.offload.gso.is_some_and(|gso| gso.size > 1400),
            offloads
        );
    }
}

#[test]
fn taps_made_by_the_program_under_test_are_plugged_in_later() {
    for multi_queue in [false, true] {
        let tap = Tap {
            made_by: TapMaker::Program,
            ..Tap::default()
        };
        let mut topology = Topology::builder()
            .inside(Inside::Tap(tap))
            .build()
            .unwrap();
        let error = topology.plug_in().unwrap_err().to_string();
        assert!(error.contains("no device tap0"), "{error}");
        let options = cable::Options {
            multi_queue,
            ..cable::Options::new(Layer::Ethernet)
        };
        TunTap::create_persistent(&topology.host, "tap0", options).unwrap();
        topology.plug_in().unwrap();
        topology.forward_plainly().unwrap();
        check_traffic(&topology);
        topology.host.ip("link delete tap0").unwrap();
        let cable = topology.guests[0].cable().unwrap();
        let start = std::time::Instant::now();
        while cable.is_connected() {
            assert!(
                start.elapsed() < PATIENCE,
                "the cable does not notice that tap0 is gone"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn several_queues() {
    let tap = Tap {
        queues: 2,
        ..Tap::default()
    };
    let topology = Topology::builder()
        .inside(Inside::Tap(tap))
        .build()
        .unwrap();
    topology.forward_plainly().unwrap();
    check_traffic(&topology);
}

#[test]
fn pinned_neighbours_need_no_arp() {
    for inside in [
        Inside::Tap(Tap::default()),
        Inside::Veth,
        Inside::Bridge,
        Inside::Tun,
    ] {
        let topology = Topology::builder().inside(inside).router().build().unwrap();
        topology.forward_plainly().unwrap();
        topology.pin_neighbours().unwrap();
        let options = tapnat_testbed::capture::Options {
            chatter: true,
            ..Default::default()
        };
        let captures = [
            Capture::start_with(&topology.host, &topology.guests[0].inside_device, options),
            Capture::start_with(&topology.host, UPLINK, options),
        ];
        let guest = &topology.guests[0].namespace;
        assert_eq!(ping(guest, world(0, 0).ip(), 1, &[]).unwrap().received, 1);
        for capture in captures {
            let packets = capture.unwrap().stop().unwrap();
            assert_eq!(packets.list.len(), 2, "{inside:?}: {}", packets.summary());
        }
    }
}

#[test]
fn crafted_packets_arrive_as_they_were_made() {
    let topology = Topology::builder().inside(Inside::Veth).build().unwrap();
    topology.forward_plainly().unwrap();
    let guest = &topology.guests[0];
    let source = SocketAddr::new(guest.address.into(), 600);
    let capture = Capture::start(&topology.world, topology.world_device()).unwrap();

    let sender = IpSender::open(&guest.namespace, guest.address.into()).unwrap();
    let datagram = packet::udp(source, world(0, 53))
        .payload(b"raw")
        .options(&[1, 1, 1, 0]);
    sender.send(&datagram.build()).unwrap();
    let arrived = capture
        .wait_for(PATIENCE, |packet| {
            packet.is(|parsed| parsed.payload == b"raw")
        })
        .unwrap();
    let parsed = arrived.parse().unwrap();
    assert_eq!(
        (parsed.source(), parsed.destination(), parsed.ttl()),
        (source, world(0, 53), 63)
    );
    assert_eq!(parsed.ipv4().unwrap().options.as_slice(), [1, 1, 1, 0]);

    let mac = |namespace: &tapnat_testbed::Namespace, device| {
        let text = namespace.mac_address(device).unwrap();
        let bytes = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap());
        <[u8; 6]>::try_from(bytes.collect::<Vec<_>>()).unwrap()
    };
    let frames = FrameSender::open(&guest.namespace, GUEST_DEVICE).unwrap();
    let ethernet = (
        mac(&guest.namespace, GUEST_DEVICE),
        mac(&topology.host, &guest.inside_device),
    );
    let long = packet::udp(source, world(0, 53))
        .payload(&traffic::pattern(3000))
        .ethernet(ethernet.0, ethernet.1);
    for fragment in long.fragments(1500) {
        frames.send(&fragment).unwrap();
    }
    let is_last =
        |parsed: &packet::Parsed| parsed.is_fragment() && !parsed.ipv4().unwrap().more_fragments;
    capture
        .wait_for(PATIENCE, |packet| packet.is(is_last))
        .unwrap();
    let packets = capture.stop().unwrap();
    packets.verify_checksums(Partial::Refuse).unwrap();
    assert_eq!(packets.parsed(packet::Parsed::is_fragment).len(), 3);
}

#[test]
fn a_written_super_packet_keeps_its_segment_size() {
    let topology = Topology::builder().guests(0).build().unwrap();
    let host = &topology.host;
    let tap = TunTap::create(host, "tap0", cable::Options::new(Layer::Ethernet)).unwrap();
    host.ip("address add 10.0.0.1/24 dev tap0").unwrap();
    topology.forward_plainly().unwrap();
    let text = host.mac_address("tap0").unwrap();
    let bytes = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap());
    let mac = <[u8; 6]>::try_from(bytes.collect::<Vec<_>>()).unwrap();
    host.ip("neighbour add 10.0.0.10 lladdr 02:00:00:00:00:10 nud permanent dev tap0")
        .unwrap();

    let source: SocketAddr = "10.0.0.10:40000".parse().unwrap();
    let payload = traffic::pattern(60_000);
    let packets = [
        packet::tcp(source, world(0, 9)),
        packet::udp(source, world(0, 9)),
    ];
    for (packet, port) in packets.into_iter().zip([9, 9]) {
        let capture = Capture::start(&topology.world, topology.world_device()).unwrap();
        let packet = packet
            .payload(&payload)
            .ethernet([2, 0, 0, 0, 0, 0x10], mac);
        let (offload, frame) = packet.offloaded(Some(1000));
        tap.send(offload, &frame).unwrap();
        let arrived = capture
            .wait_for(PATIENCE, |packet| {
                packet.is(|parsed| parsed.destination() == world(0, port))
            })
            .unwrap();
        arrived.verify_checksums(Partial::Accept).unwrap();
        assert_eq!(arrived.parse().unwrap().payload, payload);
        assert_eq!(arrived.offload.gso, offload.gso);
    }
    // The world refuses the datagram, and its answer comes out of the tap.
    let start = std::time::Instant::now();
    loop {
        assert!(start.elapsed() < PATIENCE);
        let Some((_, frame)) = tap.receive(PATIENCE).unwrap() else {
            continue;
        };
        let Ok(answer) = packet::Parsed::new(Link::Ethernet, &frame) else {
            continue;
        };
        if answer.icmpv4().is_some() {
            assert_eq!(answer.quoted().unwrap().source, source);
            break;
        }
    }
}

#[test]
fn bad_checksums_are_found_in_a_capture() {
    let topology = Topology::builder().inside(Inside::Veth).build().unwrap();
    topology.forward_plainly().unwrap();
    let guest = &topology.guests[0];
    let source = SocketAddr::new(guest.address.into(), 600);
    let address: IpAddr = guest.address.into();
    let sender = IpSender::open(&guest.namespace, address).unwrap();
    let good = packet::udp(source, world(0, 53)).payload(&traffic::pattern(3001));
    let bad = good.clone().bad_transport_checksum();
    let short = packet::tcp(source, world(0, 53)).with_tcp(|header| header.syn = true);
    let cases: [(Vec<Vec<u8>>, Option<&str>); 5] = [
        (vec![short.build()], None),
        (
            vec![short.clone().bad_transport_checksum().build()],
            Some("TCP checksum"),
        ),
        (
            vec![short.clone().partial_checksum().build()],
            Some("TCP checksum"),
        ),
        (good.fragments(1500), None),
        (bad.fragments(1500), Some("reassembled: UDP checksum")),
    ];
    for (packets, fault) in cases {
        let capture = Capture::start(&topology.world, topology.world_device()).unwrap();
        let count = packets.len();
        for packet in packets {
            sender.send(&packet).unwrap();
        }
        let mut arrived = 0;
        capture
            .wait_for(PATIENCE, |packet| {
                arrived += usize::from(packet.direction == Direction::In);
                arrived == count
            })
            .unwrap();
        let mut packets = capture.stop().unwrap();
        packets
            .list
            .retain(|packet| packet.direction == Direction::In);
        let verdict = packets.verify_checksums(Partial::Refuse);
        match fault {
            None => verdict.unwrap(),
            Some(fault) => {
                let error = verdict.unwrap_err().to_string();
                assert!(error.contains(fault), "{error}");
            }
        }
    }
}

#[test]
fn an_empty_capture_verifies_nothing() {
    let topology = Topology::builder().build().unwrap();
    let capture = Capture::start(&topology.host, UPLINK).unwrap();
    assert!(
        capture
            .wait_for(Duration::from_millis(10), |_| true)
            .is_err()
    );
    assert!(
        capture
            .stop()
            .unwrap()
            .verify_checksums(Partial::Accept)
            .is_err()
    );
}

#[test]
fn captures_can_be_read_by_tcpdump() {
    let topology = Topology::builder().build().unwrap();
    topology.forward_plainly().unwrap();
    let capture = Capture::start(&topology.host, UPLINK).unwrap();
    ping(&topology.guests[0].namespace, world(0, 0).ip(), 1, &[]).unwrap();
    let file = std::env::temp_dir().join(format!("{}.pcap", topology.host.name()));
    capture.stop().unwrap().write_pcap(&file).unwrap();
    let read = topology
        .host
        .exec(&format!("tcpdump -n -v -r {}", file.display()));
    std::fs::remove_file(&file).unwrap();
    let read = read.unwrap();
    assert!(
        read.contains("10.0.0.10 > 203.0.113.1: ICMP echo request"),
        "{read}"
    );
    assert!(
        read.contains("203.0.113.1 > 10.0.0.10: ICMP echo reply"),
        "{read}"
    );
    assert!(
        !read.contains("bad cksum") && !read.contains("wrong icmp cksum"),
        "{read}"
    );
}
