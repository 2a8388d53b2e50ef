//! Packets that are refused with an ICMP error: when, and the error byte by
//! byte. Time to live and sizes, which are the usual reasons, and every reason
//! for want of resources.

use std::net::Ipv4Addr;

use etherparse::IpNumber;
use tapnat_common::{
    net::Be32,
    refusal::Budget,
    verdict::{Outcome, Reason},
};
use tapnat_testbed::packet::{self, Builder, checksum};

use crate::support::{
    frame::{Bytes, Partial},
    network::{GUEST, HOST, NEIGHBOUR, OUTSIDE, SERVER, TAP, UPLINK, at, ip, ping, pong, tcp, udp},
    world::{World, route},
};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(HOST[0][0], HOST[0][1], HOST[0][2], HOST[0][3]);

/// The error as it should be: 64 hops to go, identification 0, and with
/// internetwork control's precedence (RFC 1812 section 4.3.2.5).
fn error(from: Ipv4Addr, to: Ipv4Addr, kind: (u8, u8), mtu: u16, quoted: &[u8]) -> Vec<u8> {
    let [high, low] = mtu.to_be_bytes();
    packet::icmp_error(ip(from), ip(to), kind, [0, 0, high, low], quoted)
        .identification(0)
        .precedence(6)
        .build()
}

/// What an error quotes: the IP header and 20 bytes.
fn quote(packet: &[u8]) -> &[u8] {
    let header = usize::from(packet[0] & 15) * 4;
    &packet[..packet.len().min(header + 20)]
}

#[test]
fn the_last_hop_is_ours_to_tell() {
    let options = [7, 7, 4, 0, 0, 0, 0, 0];
    for builder in [
        udp(at(GUEST, 40000), at(SERVER, 33434)).payload(&[0x40; 32]),
        tcp(at(GUEST, 40000), at(SERVER, 80), "S"),
        ping(GUEST, SERVER, 77).payload(&[1; 56]),
        udp(at(GUEST, 40000), at(SERVER, 33434))
            .options(&options)
            .payload(&[0x40; 32]),
    ] {
        for time_to_live in [0, 1] {
            let world = World::new();
            let probe = builder.clone().ttl(time_to_live).build();
            let exit = world.guest_sends(TAP, &probe);
            assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
            assert_eq!(
                exit.refused(Reason::TimeToLiveExceeded),
                error(GATEWAY, GUEST, (11, 0), 0, quote(&probe))
            );
            assert_eq!(world.sizes(), [0; 5], "nothing is made for it");
            // Of a session that is there, too.
            world.guest_sends(TAP, &builder.clone().ttl(2).build());
            let exit = world.guest_sends(TAP, &probe);
            assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
        }
    }
}

#[test]
fn short_packets_are_quoted_whole() {
    for payload in [
        &b""[..],
        b"1",
        b"12",
        b"123",
        b"1234",
        b"12345678901",
        b"123456789012",
    ] {
        let world = World::new();
        let probe = udp(at(GUEST, 40000), at(SERVER, 33434))
            .payload(payload)
            .ttl(1)
            .build();
        let answer = world
            .guest_sends(TAP, &probe)
            .refused(Reason::TimeToLiveExceeded);
        assert_eq!(
            checksum::verify(&answer, checksum::Expect::Complete),
            Ok(())
        );
        let quoted = &answer[28..];
        assert!(quoted.len() >= 28 && probe.starts_with(quoted));
        assert_eq!(answer, error(GATEWAY, GUEST, (11, 0), 0, quoted));
    }
}

#[test]
fn of_a_protocol_with_less_than_a_header_whole_words_are_quoted() {
    for length in 0..8 {
        let probe = packet::other(ip(GUEST), ip(SERVER), IpNumber::IGMP)
            .payload(&vec![1; length])
            .ttl(1)
            .build();
        let answer = World::new()
            .guest_sends(TAP, &probe)
            .refused(Reason::TimeToLiveExceeded);
        let quoted = &probe[..20 + length / 4 * 4];
        assert_eq!(answer, error(GATEWAY, GUEST, (11, 0), 0, quoted));
    }
}

#[test]
fn the_world_is_told_by_the_outside_address() {
    let world = World::new();
    world.guest_sends(TAP, &udp(at(GUEST, 40000), at(SERVER, 53)).build());
    let back = udp(at(SERVER, 53), at(OUTSIDE, 40000)).ttl(1).build();
    let exit = world.world_sends(&back);
    assert_eq!(exit.sent.as_ref().unwrap().device, UPLINK.get());
    assert_eq!(
        exit.refused(Reason::TimeToLiveExceeded),
        error(OUTSIDE, SERVER, (11, 0), 0, quote(&back))
    );
}

#[test]
fn two_hops_to_go_are_enough_and_one_is_taken() {
    let world = World::new();
    let sent = world
        .guest_sends(TAP, &udp(at(GUEST, 40000), at(SERVER, 53)).ttl(2).build())
        .forwarded(Reason::SessionStarted);
    assert_eq!(sent, udp(at(OUTSIDE, 40000), at(SERVER, 53)).ttl(1).build());
}

#[test]
fn for_the_host_the_last_hop_is_enough() {
    let world = World::new();
    for time_to_live in [0, 1] {
        let guest_sends = udp(at(GUEST, 40000), at(GATEWAY, 53)).ttl(time_to_live);
        let exit = world.guest_sends(TAP, &guest_sends.build());
        assert_eq!(exit.reason, Reason::ForTheHost);
        let world_sends = udp(at(SERVER, 40000), at(OUTSIDE, 53)).ttl(time_to_live);
        let exit = world.world_sends(&world_sends.build());
        assert_eq!(exit.reason, Reason::NoMapping);
    }
}

/// A guest's datagram of this many bytes in all.
fn sized(length: usize) -> Builder {
    udp(at(GUEST, 40000), at(SERVER, 53)).payload(&vec![7; length - 28])
}

#[test]
fn what_is_too_big_and_must_not_be_cut_is_refused_with_the_mtu() {
    let world = World::new();
    world
        .routes
        .borrow_mut()
        .insert(SERVER.into(), route(UPLINK.get(), 1400));
    let large = sized(1401).dont_fragment().build();
    assert_eq!(
        world
            .guest_sends(TAP, &large)
            .refused(Reason::FragmentationNeeded),
        error(GATEWAY, GUEST, (3, 4), 1400, quote(&large))
    );
    assert_eq!(world.sizes()[..2], [0, 0], "no session for what did not go");
    // One byte less fits, at first and in the session.
    let fits = sized(1400).dont_fragment().build();
    assert_eq!(world.guest_sends(TAP, &fits).reason, Reason::SessionStarted);
    let exit = world.guest_sends(TAP, &fits);
    assert!(exit.quick);
    assert_eq!(
        world
            .guest_sends(TAP, &large)
            .refused(Reason::FragmentationNeeded),
        error(GATEWAY, GUEST, (3, 4), 1400, quote(&large))
    );
}

#[test]
fn the_way_in_has_its_own_mtu() {
    let world = World::new();
    world.set_device(TAP, |device| device.mtu = 1280);
    world.guest_sends(TAP, &sized(100).build());
    let back = |length: usize| {
        udp(at(SERVER, 53), at(OUTSIDE, 40000))
            .payload(&vec![7; length - 28])
            .dont_fragment()
            .build()
    };
    let large = back(1281);
    assert_eq!(
        world
            .world_sends(&large)
            .refused(Reason::FragmentationNeeded),
        error(OUTSIDE, SERVER, (3, 4), 1280, quote(&large))
    );
    assert_eq!(world.world_sends(&back(1280)).reason, Reason::Translated);
}

#[test]
fn an_mtu_that_shrinks_is_noticed() {
    let world = World::new();
    let large = sized(1500).dont_fragment().build();
    world.guest_sends(TAP, &large);
    world
        .routes
        .borrow_mut()
        .insert(SERVER.into(), route(UPLINK.get(), 1300));
    assert!(world.guest_sends(TAP, &large).quick, "nobody told yet");
    world.set(|settings| settings.generation += 1);
    assert_eq!(
        world
            .guest_sends(TAP, &large)
            .refused(Reason::FragmentationNeeded),
        error(GATEWAY, GUEST, (3, 4), 1300, quote(&large))
    );
    // Without being told, it is looked up again after a while.
    let world = World::new();
    world.guest_sends(TAP, &large);
    world
        .routes
        .borrow_mut()
        .insert(SERVER.into(), route(UPLINK.get(), 1300));
    world.wait_seconds(1);
    assert_eq!(
        world.guest_sends(TAP, &large).reason,
        Reason::FragmentationNeeded
    );
}

fn partial(builder: &Builder) -> Bytes {
    let (offload, bytes) = builder.offloaded(None);
    let place = offload.checksum.unwrap();
    let start = usize::from(place.start);
    Bytes {
        partial: Some(Partial {
            start,
            field: start + usize::from(place.offset),
        }),
        ..Bytes::raw(&bytes)
    }
}

#[test]
fn segments_yet_to_be_cut_are_measured_by_what_they_become() {
    let large = tcp(at(GUEST, 40000), at(SERVER, 80), "A")
        .dont_fragment()
        .payload(&[9; 10_000]);
    let frame = |segment_size| Bytes {
        segment_size,
        ..partial(&large)
    };
    let world = World::new();
    let exit = world.run(Some(TAP), frame(1460));
    assert_eq!(exit.reason.outcome(), Outcome::Forward);
    let exit = world.run(Some(TAP), frame(1461));
    assert_eq!(exit.reason, Reason::FragmentationNeeded);
    let answer = exit.refused(Reason::FragmentationNeeded);
    assert_eq!(
        checksum::verify(&answer, checksum::Expect::Complete),
        Ok(())
    );
}

#[test]
fn an_error_about_a_checksum_yet_to_be_completed_has_a_right_one() {
    // The device completes the quoted checksum, over the quoted bytes only.
    for payload in [&b""[..], b"odd", b"longer than what is quoted"] {
        for builder in [
            udp(at(GUEST, 40000), at(SERVER, 53)),
            tcp(at(GUEST, 40000), at(SERVER, 80), "S"),
        ] {
            let world = World::new();
            let exit = world.run(Some(TAP), partial(&builder.payload(payload).ttl(1)));
            let answer = exit.refused(Reason::TimeToLiveExceeded);
            assert_eq!(
                checksum::verify(&answer, checksum::Expect::Complete),
                Ok(())
            );
            let parsed = packet::Parsed::new(packet::Link::Ip, &answer).unwrap();
            let quoted = parsed.quoted().unwrap();
            assert_eq!(quoted.source.ip(), ip(GUEST));
            assert_eq!(quoted.source.port(), 40000);
        }
    }
}

#[test]
fn an_error_goes_back_to_where_the_frame_came_from() {
    let world = World::new();
    let probe = udp(at(GUEST, 40000), at(SERVER, 53))
        .ttl(1)
        .ethernet([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1])
        .build();
    let sent = world.run(Some(TAP), Bytes::ethernet(&probe)).sent.unwrap();
    assert_eq!(sent.frame.bytes[..6], [1, 2, 3, 4, 5, 6]);
    assert_eq!(sent.frame.bytes[6..12], [6, 5, 4, 3, 2, 1]);
    assert_eq!(sent.frame.bytes[12..14], [8, 0]);
    assert_eq!(
        sent.frame.ip(),
        error(GATEWAY, GUEST, (11, 0), 0, quote(&probe[14..]))
    );
}

#[test]
fn some_packets_are_never_answered() {
    // RFC 1122 section 3.2.2: later fragments, and sources that are nobody's.
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 400]);
    world.guest_sends(TAP, &datagram.fragment(0..80));
    let exit = world.guest_sends(TAP, &datagram.clone().ttl(1).fragment(80..160));
    assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
    assert!(exit.sent.is_none());
    world.set_device(TAP, |device| {
        device.address = Be32::from_bytes([127, 0, 0, 1]);
        device.network = device.address;
        device.mask = Be32::mask(8);
    });
    let unroutable = Ipv4Addr::new(127, 0, 0, 9);
    let exit = world.guest_sends(
        TAP,
        &udp(at(unroutable, 40000), at(SERVER, 53)).ttl(1).build(),
    );
    assert!(exit.sent.is_none());
    // The first fragment is answered.
    let world = World::new();
    let exit = world.guest_sends(TAP, &datagram.ttl(1).fragment(0..80));
    exit.refused(Reason::TimeToLiveExceeded);
}

#[test]
fn what_resources_are_missing_for_is_prohibited() {
    // RFC 5508 REQ-8.
    let first = udp(at(GUEST, 40000), at(SERVER, 53)).build();
    let check = |world: &World, reason| {
        let exit = world.guest_sends(TAP, &first);
        assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
        assert_eq!(
            exit.refused(reason),
            error(GATEWAY, GUEST, (3, 13), 0, quote(&first))
        );
    };
    let world = World::new();
    world.sessions.capacity.set(1);
    check(&world, Reason::SessionTableFull);
    let world = World::new();
    world.mappings.capacity.set(0);
    check(&world, Reason::MappingTableFull);
    let world = World::new();
    world.guests.capacity.set(0);
    check(&world, Reason::GuestTableFull);
    let world = World::new();
    world.withhold(|_| true);
    check(&world, Reason::PortsExhausted);
    let world = World::new();
    world.set(|settings| settings.guest_max_sessions = 1);
    world.guest_sends(TAP, &udp(at(GUEST, 4000), at(SERVER, 53)).build());
    check(&world, Reason::GuestSessionLimit);
    let world = World::new();
    world.set(|settings| settings.guest_max_ports = 1);
    world.guest_sends(TAP, &udp(at(GUEST, 4000), at(SERVER, 53)).build());
    check(&world, Reason::GuestPortLimit);
}

#[test]
fn errors_and_replies_are_not_refused_with_errors() {
    let world = World::new();
    world.guest_sends(TAP, &ping(GUEST, SERVER, 7).build());
    let exit = world.world_sends(&pong(SERVER, OUTSIDE, 7).ttl(1).build());
    // A reply is no error: RFC 1812 section 4.3.2.7 lets it be answered.
    assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
    let about = udp(at(SERVER, 53), at(GUEST, 40000)).build();
    let unreachable = packet::unreachable(ip(GUEST), ip(SERVER), 3, &about).ttl(1);
    let exit = world.guest_sends(TAP, &unreachable.build());
    assert!(exit.sent.is_none());
}

#[test]
fn a_sender_is_told_only_so_often() {
    let world = World::new();
    let flood = |source| {
        let packet = udp(at(source, 40000), at(SERVER, 53)).ttl(1).build();
        (0..2 * Budget::MOST)
            .filter(|_| {
                let exit = world.guest_sends(TAP, &packet);
                assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
                exit.sent.is_some()
            })
            .count()
    };
    let most = usize::try_from(Budget::MOST).unwrap();
    assert_eq!(flood(GUEST), most);
    assert_eq!(flood(GUEST), 0);
    assert_eq!(flood(NEIGHBOUR), most, "others are");
    world.wait_seconds(1);
    assert_eq!(flood(GUEST), most);
}
