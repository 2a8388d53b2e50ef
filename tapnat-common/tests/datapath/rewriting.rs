//! Translated packets byte by byte, out and back.

use etherparse::IpNumber;
use tapnat_common::{abi::Filtering, verdict::Reason};
use tapnat_testbed::packet::{self, Builder, checksum};

use crate::support::{
    frame::{Bytes, Partial, sum},
    network::{
        GUEST, OTHER_GUEST, OUTSIDE, SECOND_TAP, SERVER, TAP, UPLINK, at, ip, ping, pong, tcp, udp,
    },
    world::World,
};

/// Sends `out` and then `back`, twice each, in a session's beginning and in its
/// course. Both times they are to leave as said.
#[track_caller]
fn translated(world: &World, [out, sent]: [&Builder; 2], [back, received]: [&Builder; 2]) {
    for reason in [Reason::SessionStarted, Reason::Translated] {
        let exit = world.guest_sends(TAP, &out.build());
        assert_eq!(exit.sent.as_ref().unwrap().device, UPLINK.get());
        assert_eq!(exit.forwarded(reason), sent.clone().ttl(63).build());
        let exit = world.world_sends(&back.build());
        assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
        assert_eq!(
            exit.forwarded(Reason::Translated),
            received.clone().ttl(63).build()
        );
    }
}

#[test]
fn udp_out_and_back() {
    for payload in [&b""[..], b"x", b"even", &[0xff; 1471]] {
        let world = World::new();
        let datagram = |source, destination| udp(source, destination).payload(payload);
        translated(
            &world,
            [
                &datagram(at(GUEST, 40000), at(SERVER, 53)),
                &datagram(at(OUTSIDE, 40000), at(SERVER, 53)),
            ],
            [
                &datagram(at(SERVER, 53), at(OUTSIDE, 40000)),
                &datagram(at(SERVER, 53), at(GUEST, 40000)),
            ],
        );
        let out = datagram(at(GUEST, 40000), at(SERVER, 53)).build();
        assert!(world.guest_sends(TAP, &out).quick);
        let back = datagram(at(SERVER, 53), at(OUTSIDE, 40000)).build();
        assert!(world.world_sends(&back).quick);
    }
}

#[test]
fn tcp_out_and_back() {
    let world = World::new();
    let segment = |source, destination, flags: &str, sequence| {
        tcp(source, destination, flags)
            .with_tcp(|header| header.sequence_number = sequence)
            .payload(b"odd")
    };
    let handshake = [("S", 1), ("A", 2)];
    for (flags, sequence) in handshake {
        let inside = segment(at(GUEST, 40000), at(SERVER, 80), flags, sequence);
        let outside = segment(at(OUTSIDE, 40000), at(SERVER, 80), flags, sequence);
        let exit = world.guest_sends(TAP, &inside.build());
        let reason = exit.reason;
        assert_eq!(exit.forwarded(reason), outside.ttl(63).build());
        let back = segment(at(SERVER, 80), at(OUTSIDE, 40000), "SA", 100);
        let received = segment(at(SERVER, 80), at(GUEST, 40000), "SA", 100);
        assert_eq!(
            world
                .world_sends(&back.build())
                .forwarded(Reason::Translated),
            received.ttl(63).build()
        );
    }
    let exit = world.guest_sends(
        TAP,
        &segment(at(GUEST, 40000), at(SERVER, 80), "PA", 5).build(),
    );
    assert!(exit.quick);
    assert_eq!(
        exit.forwarded(Reason::Translated),
        segment(at(OUTSIDE, 40000), at(SERVER, 80), "PA", 5)
            .ttl(63)
            .build()
    );
}

#[test]
fn echoes_out_and_back() {
    translated(
        &World::new(),
        [&ping(GUEST, SERVER, 77), &ping(OUTSIDE, SERVER, 77)],
        [&pong(SERVER, OUTSIDE, 77), &pong(SERVER, GUEST, 77)],
    );
}

#[test]
fn two_guests_pinging_with_one_identifier_get_their_own_replies() {
    let world = World::new();
    let first = world
        .guest_sends(TAP, &ping(GUEST, SERVER, 77).build())
        .forwarded(Reason::SessionStarted);
    assert_eq!(first, ping(OUTSIDE, SERVER, 77).ttl(63).build());
    let second = world
        .guest_sends(SECOND_TAP, &ping(OTHER_GUEST, SERVER, 77).build())
        .forwarded(Reason::SessionStarted);
    let identifier = u16::from_be_bytes([second[24], second[25]]);
    assert_ne!(identifier, 77);
    assert_eq!(second, ping(OUTSIDE, SERVER, identifier).ttl(63).build());
    let exit = world.world_sends(&pong(SERVER, OUTSIDE, identifier).build());
    assert_eq!(exit.sent.as_ref().unwrap().device, SECOND_TAP.get());
    assert_eq!(
        exit.forwarded(Reason::Translated),
        pong(SERVER, OTHER_GUEST, 77).ttl(63).build()
    );
    assert_eq!(
        world
            .world_sends(&pong(SERVER, OUTSIDE, 77).build())
            .forwarded(Reason::Translated),
        pong(SERVER, GUEST, 77).ttl(63).build()
    );
}

#[test]
fn a_port_that_changes_changes_the_checksum() {
    let world = World::new();
    world.guest_sends(TAP, &udp(at(GUEST, 5000), at(SERVER, 53)).build());
    let sent = world
        .guest_sends(
            SECOND_TAP,
            &udp(at(OTHER_GUEST, 5000), at(SERVER, 53)).build(),
        )
        .forwarded(Reason::SessionStarted);
    let port = u16::from_be_bytes([sent[20], sent[21]]);
    assert_ne!(port, 5000);
    assert_eq!(sent, udp(at(OUTSIDE, port), at(SERVER, 53)).ttl(63).build());
    assert_eq!(
        world
            .world_sends(&udp(at(SERVER, 53), at(OUTSIDE, port)).build())
            .forwarded(Reason::Translated),
        udp(at(SERVER, 53), at(OTHER_GUEST, 5000)).ttl(63).build()
    );
}

#[test]
fn ip_options_are_kept() {
    // Router alert, and a record of routes as long as there may be.
    for options in [vec![0x94, 4, 0, 0], [vec![7, 39, 4], vec![0; 37]].concat()] {
        let datagram = |source, destination| udp(source, destination).options(&options);
        translated(
            &World::new(),
            [
                &datagram(at(GUEST, 40000), at(SERVER, 53)),
                &datagram(at(OUTSIDE, 40000), at(SERVER, 53)),
            ],
            [
                &datagram(at(SERVER, 53), at(OUTSIDE, 40000)),
                &datagram(at(SERVER, 53), at(GUEST, 40000)),
            ],
        );
    }
}

#[test]
fn no_udp_checksum_stays_none() {
    let datagram = |source, destination| udp(source, destination).without_udp_checksum();
    translated(
        &World::new(),
        [
            &datagram(at(GUEST, 40000), at(SERVER, 53)),
            &datagram(at(OUTSIDE, 40000), at(SERVER, 53)),
        ],
        [
            &datagram(at(SERVER, 53), at(OUTSIDE, 40000)),
            &datagram(at(SERVER, 53), at(GUEST, 40000)),
        ],
    );
}

/// A payload with which the datagram's checksum is computed as 0.
fn payload_for_zero(build: impl Fn(&[u8]) -> Vec<u8>, field: usize) -> [u8; 2] {
    let without = build(&[0, 0]);
    [without[field], without[field + 1]]
}

#[test]
fn a_computed_udp_checksum_of_zero_is_sent_as_all_ones() {
    let outside = |payload: &[u8]| udp(at(OUTSIDE, 40000), at(SERVER, 53)).payload(payload);
    let payload = payload_for_zero(|payload| outside(payload).build(), 26);
    let sent = World::new()
        .guest_sends(
            TAP,
            &udp(at(GUEST, 40000), at(SERVER, 53))
                .payload(&payload)
                .build(),
        )
        .forwarded(Reason::SessionStarted);
    assert_eq!(sent[26..28], [0xff, 0xff]);
    assert_eq!(sent, outside(&payload).ttl(63).build());
}

#[test]
fn a_computed_tcp_checksum_of_zero_is_sent_as_zero() {
    let outside = |payload: &[u8]| tcp(at(OUTSIDE, 40000), at(SERVER, 80), "S").payload(payload);
    let payload = payload_for_zero(|payload| outside(payload).build(), 36);
    let sent = World::new()
        .guest_sends(
            TAP,
            &tcp(at(GUEST, 40000), at(SERVER, 80), "S")
                .payload(&payload)
                .build(),
        )
        .forwarded(Reason::SessionStarted);
    assert_eq!(sent[36..38], [0, 0]);
    assert_eq!(sent, outside(&payload).ttl(63).build());
}

/// UDP-Lite with its checksum over all of it (RFC 3828 section 3.1).
fn udp_lite(
    source: (std::net::Ipv4Addr, u16),
    destination: (std::net::Ipv4Addr, u16),
    payload: &[u8],
) -> Builder {
    let mut bytes = [source.1, destination.1, 0, 0]
        .iter()
        .flat_map(|number| number.to_be_bytes())
        .collect::<Vec<_>>();
    bytes.extend(payload);
    let pseudo = checksum::pseudo_header(
        ip(source.0),
        ip(destination.0),
        IpNumber::UDP_LITE,
        bytes.len(),
    );
    let value = match !sum(&[pseudo, bytes.clone()].concat()) {
        0 => 0xffff_u16,
        value => value,
    };
    bytes[6..8].copy_from_slice(&value.to_be_bytes());
    packet::other(ip(source.0), ip(destination.0), IpNumber::UDP_LITE).payload(&bytes)
}

#[test]
fn udp_lite_out_and_back() {
    let pseudo = udp_lite((OUTSIDE, 40000), (SERVER, 53), &[0, 0]).build();
    let zero = [pseudo[26], pseudo[27]];
    for payload in [&b"light"[..], &zero] {
        let datagram = |source, destination| udp_lite(source, destination, payload);
        translated(
            &World::new(),
            [
                &datagram((GUEST, 40000), (SERVER, 53)),
                &datagram((OUTSIDE, 40000), (SERVER, 53)),
            ],
            [
                &datagram((SERVER, 53), (OUTSIDE, 40000)),
                &datagram((SERVER, 53), (GUEST, 40000)),
            ],
        );
    }
}

#[test]
fn other_protocols_are_translated_by_address_only() {
    // SCTP has a CRC over its ports, GRE and ESP have none.
    for number in [
        IpNumber::SCTP,
        IpNumber::GRE,
        IpNumber::ENCAPSULATING_SECURITY_PAYLOAD,
    ] {
        let datagram = |source, destination, ports: [u8; 4]| {
            packet::other(ip(source), ip(destination), number)
                .payload(&[&ports[..], &[9; 20]].concat())
        };
        let there = [0x9c, 0x40, 0, 80];
        let back = [0, 80, 0x9c, 0x40];
        translated(
            &World::new(),
            [
                &datagram(GUEST, SERVER, there),
                &datagram(OUTSIDE, SERVER, there),
            ],
            [
                &datagram(SERVER, OUTSIDE, back),
                &datagram(SERVER, GUEST, back),
            ],
        );
    }
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
fn a_checksum_that_the_device_completes_covers_what_is_sent() {
    let world = World::new();
    // The port changes for the second guest; it is not in a partial checksum.
    world.guest_sends(TAP, &udp(at(GUEST, 5000), at(SERVER, 53)).build());
    world.guest_sends(TAP, &tcp(at(GUEST, 5000), at(SERVER, 53), "S").build());
    for builder in [
        udp(at(OTHER_GUEST, 5000), at(SERVER, 53)),
        tcp(at(OTHER_GUEST, 5000), at(SERVER, 53), "S"),
    ] {
        let exit = world.run(Some(SECOND_TAP), partial(&builder));
        assert_eq!(exit.reason, Reason::SessionStarted);
        let frame = exit.sent.unwrap().frame;
        assert!(frame.partial.is_some());
        assert_eq!(
            checksum::verify(frame.ip(), checksum::Expect::PseudoHeader),
            Ok(()),
            "only the pseudo-header is in it"
        );
    }
}

#[test]
fn a_large_packet_yet_to_be_cut_stays_one() {
    let world = World::new();
    let segments = |source, destination| tcp(source, destination, "A").payload(&vec![0x5a; 65_000]);
    let mut frame = partial(&segments(at(GUEST, 40000), at(SERVER, 80)));
    frame.segment_size = 1460;
    for _ in 0..3 {
        let exit = world.run(Some(TAP), frame.clone());
        assert_eq!(
            exit.reason.outcome(),
            tapnat_common::verdict::Outcome::Forward
        );
        let sent = exit.sent.unwrap().frame;
        assert_eq!(sent.segment_size, 1460);
        let expected = segments(at(OUTSIDE, 40000), at(SERVER, 80))
            .ttl(63)
            .partial_checksum()
            .build();
        assert_eq!(sent.ip(), expected);
    }
}

#[test]
fn ethernet_frames_leave_with_the_next_hops_addresses() {
    let world = World::new();
    let out = |source| udp(source, at(SERVER, 53));
    let frame = out(at(GUEST, 40000)).ethernet([9; 6], [8; 6]).build();
    let first = world.run(Some(TAP), Bytes::ethernet(&frame)).sent.unwrap();
    assert!(first.resolve, "the kernel confirms the neighbour at first");
    assert_eq!(first.frame.bytes[..14], frame[..14]);
    let second = world.run(Some(TAP), Bytes::ethernet(&frame)).sent.unwrap();
    assert!(!second.resolve);
    let expected = out(at(OUTSIDE, 40000))
        .ttl(63)
        .ethernet([4, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 2])
        .build();
    assert_eq!(second.frame.bytes, expected);
}

#[test]
fn padding_and_payload_are_left_alone() {
    let world = World::new();
    let mut frame = udp(at(GUEST, 40000), at(SERVER, 53))
        .payload(b"x")
        .ethernet([9; 6], [8; 6])
        .build();
    frame.resize(60, 0xee);
    let sent = world.run(Some(TAP), Bytes::ethernet(&frame)).sent.unwrap();
    assert_eq!(sent.frame.bytes.len(), 60);
    assert_eq!(sent.frame.bytes[43..], frame[43..]);
}

#[test]
fn headers_beyond_the_linear_part_are_pulled_in() {
    let world = World::new();
    let out = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 500]);
    let expected = udp(at(OUTSIDE, 40000), at(SERVER, 53))
        .payload(&[1; 500])
        .ttl(63)
        .build();
    for linear in [0, 14, 20, 28] {
        let frame = Bytes {
            linear,
            ..Bytes::raw(&out.build())
        };
        let sent = world.run(Some(TAP), frame).sent.unwrap();
        assert_eq!(sent.frame.bytes, expected, "{linear} bytes");
    }
}

#[test]
fn wrong_checksums_stay_wrong() {
    let world = World::new();
    world.set_filtering(Filtering::EndpointIndependent);
    let builder = udp(at(GUEST, 40000), at(SERVER, 53));
    world.guest_sends(TAP, &builder.build());
    let sent = world
        .guest_sends(TAP, &builder.bad_transport_checksum().build())
        .forwarded(Reason::Translated);
    let fault = checksum::verify(&sent, checksum::Expect::Complete).unwrap_err();
    assert!(
        matches!(fault, checksum::Fault::Wrong { what: "UDP", .. }),
        "the receiver is to see that it is corrupt: {fault}"
    );
}
