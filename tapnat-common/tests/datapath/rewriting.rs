//! Translated packets byte by byte, out and back.

use etherparse::IpNumber;
use tapnat_common::{abi::Filtering, verdict::Reason};
use tapnat_testbed::packet::{self, Builder, checksum};

use crate::support::{
    frame::{Bytes, sum},
    network::{
        MOST_OPTIONS, SECOND_TAP, TAP, UPLINK, Version, at, both_families, ip, ping, pong, source,
        tcp, udp,
    },
    world::World,
};

/// Sends `out` and then `back`, twice each, in a session's beginning and in its
/// course. Both times they are to leave as said.
#[track_caller]
fn translated<A: Version>(
    world: &World<A>,
    [out, sent]: [&Builder; 2],
    [back, received]: [&Builder; 2],
) {
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

fn udp_out_and_back<A: Version>() {
    for payload in [
        &b""[..],
        b"x",
        b"even",
        &vec![0xff; 1500 - A::HEADER - 8 - 1],
    ] {
        let world = World::<A>::new();
        let datagram = |source, destination| udp(source, destination).payload(payload);
        translated(
            &world,
            [
                &datagram(at(A::GUEST, 40000), at(A::SERVER, 53)),
                &datagram(at(A::OUTSIDE, 40000), at(A::SERVER, 53)),
            ],
            [
                &datagram(at(A::SERVER, 53), at(A::OUTSIDE, 40000)),
                &datagram(at(A::SERVER, 53), at(A::GUEST, 40000)),
            ],
        );
        let out = datagram(at(A::GUEST, 40000), at(A::SERVER, 53)).build();
        assert!(world.guest_sends(TAP, &out).quick);
        let back = datagram(at(A::SERVER, 53), at(A::OUTSIDE, 40000)).build();
        assert!(world.world_sends(&back).quick);
    }
}
both_families!(udp_out_and_back);

fn tcp_out_and_back<A: Version>() {
    let world = World::<A>::new();
    let segment = |source, destination, flags: &str, sequence| {
        tcp(source, destination, flags)
            .with_tcp(|header| header.sequence_number = sequence)
            .payload(b"odd")
    };
    let handshake = [("S", 1), ("A", 2)];
    for (flags, sequence) in handshake {
        let inside = segment(at(A::GUEST, 40000), at(A::SERVER, 80), flags, sequence);
        let outside = segment(at(A::OUTSIDE, 40000), at(A::SERVER, 80), flags, sequence);
        let exit = world.guest_sends(TAP, &inside.build());
        let reason = exit.reason;
        assert_eq!(exit.forwarded(reason), outside.ttl(63).build());
        let back = segment(at(A::SERVER, 80), at(A::OUTSIDE, 40000), "SA", 100);
        let received = segment(at(A::SERVER, 80), at(A::GUEST, 40000), "SA", 100);
        assert_eq!(
            world
                .world_sends(&back.build())
                .forwarded(Reason::Translated),
            received.ttl(63).build()
        );
    }
    let exit = world.guest_sends(
        TAP,
        &segment(at(A::GUEST, 40000), at(A::SERVER, 80), "PA", 5).build(),
    );
    assert!(exit.quick);
    assert_eq!(
        exit.forwarded(Reason::Translated),
        segment(at(A::OUTSIDE, 40000), at(A::SERVER, 80), "PA", 5)
            .ttl(63)
            .build()
    );
}
both_families!(tcp_out_and_back);

fn echoes_out_and_back<A: Version>() {
    translated(
        &World::<A>::new(),
        [
            &ping(A::GUEST, A::SERVER, 77),
            &ping(A::OUTSIDE, A::SERVER, 77),
        ],
        [
            &pong(A::SERVER, A::OUTSIDE, 77),
            &pong(A::SERVER, A::GUEST, 77),
        ],
    );
}
both_families!(echoes_out_and_back);

fn two_guests_pinging_with_one_identifier_get_their_own_replies<A: Version>() {
    let world = World::<A>::new();
    let first = world
        .guest_sends(TAP, &ping(A::GUEST, A::SERVER, 77).build())
        .forwarded(Reason::SessionStarted);
    assert_eq!(first, ping(A::OUTSIDE, A::SERVER, 77).ttl(63).build());
    let second = world
        .guest_sends(SECOND_TAP, &ping(A::OTHER_GUEST, A::SERVER, 77).build())
        .forwarded(Reason::SessionStarted);
    let identifier = source(&second).port();
    assert_ne!(identifier, 77);
    assert_eq!(
        second,
        ping(A::OUTSIDE, A::SERVER, identifier).ttl(63).build()
    );
    let exit = world.world_sends(&pong(A::SERVER, A::OUTSIDE, identifier).build());
    assert_eq!(exit.sent.as_ref().unwrap().device, SECOND_TAP.get());
    assert_eq!(
        exit.forwarded(Reason::Translated),
        pong(A::SERVER, A::OTHER_GUEST, 77).ttl(63).build()
    );
    assert_eq!(
        world
            .world_sends(&pong(A::SERVER, A::OUTSIDE, 77).build())
            .forwarded(Reason::Translated),
        pong(A::SERVER, A::GUEST, 77).ttl(63).build()
    );
}
both_families!(two_guests_pinging_with_one_identifier_get_their_own_replies);

fn a_port_that_changes_changes_the_checksum<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &udp(at(A::GUEST, 5000), at(A::SERVER, 53)).build());
    let sent = world
        .guest_sends(
            SECOND_TAP,
            &udp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53)).build(),
        )
        .forwarded(Reason::SessionStarted);
    let port = source(&sent).port();
    assert_ne!(port, 5000);
    assert_eq!(
        sent,
        udp(at(A::OUTSIDE, port), at(A::SERVER, 53)).ttl(63).build()
    );
    assert_eq!(
        world
            .world_sends(&udp(at(A::SERVER, 53), at(A::OUTSIDE, port)).build())
            .forwarded(Reason::Translated),
        udp(at(A::SERVER, 53), at(A::OTHER_GUEST, 5000))
            .ttl(63)
            .build()
    );
}
both_families!(a_port_that_changes_changes_the_checksum);

fn options_are_kept<A: Version>() {
    for amount in 1..=MOST_OPTIONS {
        let datagram = |source, destination| A::with_options(udp(source, destination), amount);
        translated(
            &World::<A>::new(),
            [
                &datagram(at(A::GUEST, 40000), at(A::SERVER, 53)),
                &datagram(at(A::OUTSIDE, 40000), at(A::SERVER, 53)),
            ],
            [
                &datagram(at(A::SERVER, 53), at(A::OUTSIDE, 40000)),
                &datagram(at(A::SERVER, 53), at(A::GUEST, 40000)),
            ],
        );
    }
}
both_families!(options_are_kept);

fn no_udp_checksum_stays_none<A: Version>() {
    let datagram = |source, destination| udp(source, destination).without_udp_checksum();
    translated(
        &World::<A>::new(),
        [
            &datagram(at(A::GUEST, 40000), at(A::SERVER, 53)),
            &datagram(at(A::OUTSIDE, 40000), at(A::SERVER, 53)),
        ],
        [
            &datagram(at(A::SERVER, 53), at(A::OUTSIDE, 40000)),
            &datagram(at(A::SERVER, 53), at(A::GUEST, 40000)),
        ],
    );
}
both_families!(no_udp_checksum_stays_none);

/// A payload with which the datagram's checksum is computed as 0.
fn payload_for_zero(build: impl Fn(&[u8]) -> Vec<u8>, field: usize) -> [u8; 2] {
    let without = build(&[0, 0]);
    [without[field], without[field + 1]]
}

fn a_computed_udp_checksum_of_zero_is_sent_as_all_ones<A: Version>() {
    let outside = |payload: &[u8]| udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)).payload(payload);
    let payload = payload_for_zero(|payload| outside(payload).build(), A::HEADER + 6);
    let sent = World::<A>::new()
        .guest_sends(
            TAP,
            &udp(at(A::GUEST, 40000), at(A::SERVER, 53))
                .payload(&payload)
                .build(),
        )
        .forwarded(Reason::SessionStarted);
    assert_eq!(sent[A::HEADER + 6..A::HEADER + 8], [0xff, 0xff]);
    assert_eq!(sent, outside(&payload).ttl(63).build());
}
both_families!(a_computed_udp_checksum_of_zero_is_sent_as_all_ones);

fn a_computed_tcp_checksum_of_zero_is_sent_as_zero<A: Version>() {
    let outside =
        |payload: &[u8]| tcp(at(A::OUTSIDE, 40000), at(A::SERVER, 80), "S").payload(payload);
    let payload = payload_for_zero(|payload| outside(payload).build(), A::HEADER + 16);
    let sent = World::<A>::new()
        .guest_sends(
            TAP,
            &tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "S")
                .payload(&payload)
                .build(),
        )
        .forwarded(Reason::SessionStarted);
    assert_eq!(sent[A::HEADER + 16..A::HEADER + 18], [0, 0]);
    assert_eq!(sent, outside(&payload).ttl(63).build());
}
both_families!(a_computed_tcp_checksum_of_zero_is_sent_as_zero);

/// UDP-Lite with its checksum over all of it (RFC 3828 section 3.1).
fn udp_lite<A: Version>(source: (A, u16), destination: (A, u16), payload: &[u8]) -> Builder {
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

fn udp_lite_out_and_back<A: Version>() {
    let pseudo = udp_lite((A::OUTSIDE, 40000), (A::SERVER, 53), &[0, 0]).build();
    let zero = [pseudo[A::HEADER + 6], pseudo[A::HEADER + 7]];
    for payload in [&b"light"[..], &zero] {
        let datagram = |source, destination| udp_lite(source, destination, payload);
        translated(
            &World::<A>::new(),
            [
                &datagram((A::GUEST, 40000), (A::SERVER, 53)),
                &datagram((A::OUTSIDE, 40000), (A::SERVER, 53)),
            ],
            [
                &datagram((A::SERVER, 53), (A::OUTSIDE, 40000)),
                &datagram((A::SERVER, 53), (A::GUEST, 40000)),
            ],
        );
    }
}
both_families!(udp_lite_out_and_back);

fn other_protocols_are_translated_by_address_only<A: Version>() {
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
            &World::<A>::new(),
            [
                &datagram(A::GUEST, A::SERVER, there),
                &datagram(A::OUTSIDE, A::SERVER, there),
            ],
            [
                &datagram(A::SERVER, A::OUTSIDE, back),
                &datagram(A::SERVER, A::GUEST, back),
            ],
        );
    }
}
both_families!(other_protocols_are_translated_by_address_only);

fn a_checksum_that_the_device_completes_covers_what_is_sent<A: Version>() {
    let world = World::<A>::new();
    // The port changes for the second guest; it is not in a partial checksum.
    world.guest_sends(TAP, &udp(at(A::GUEST, 5000), at(A::SERVER, 53)).build());
    world.guest_sends(
        TAP,
        &tcp(at(A::GUEST, 5000), at(A::SERVER, 53), "S").build(),
    );
    for builder in [
        udp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53)),
        tcp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53), "S"),
    ] {
        let exit = world.run(Some(SECOND_TAP), Bytes::offloaded(&builder));
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
both_families!(a_checksum_that_the_device_completes_covers_what_is_sent);

fn a_large_packet_yet_to_be_cut_stays_one<A: Version>() {
    let world = World::<A>::new();
    let segments = |source, destination| tcp(source, destination, "A").payload(&vec![0x5a; 65_000]);
    let mut frame = Bytes::offloaded(&segments(at(A::GUEST, 40000), at(A::SERVER, 80)));
    let size = 1500 - u16::try_from(A::HEADER).unwrap() - 20;
    frame.segment_size = size;
    for _ in 0..3 {
        let exit = world.run(Some(TAP), frame.clone());
        assert_eq!(
            exit.reason.outcome(),
            tapnat_common::verdict::Outcome::Forward
        );
        let sent = exit.sent.unwrap().frame;
        assert_eq!(sent.segment_size, size);
        let expected = segments(at(A::OUTSIDE, 40000), at(A::SERVER, 80))
            .ttl(63)
            .partial_checksum()
            .build();
        assert_eq!(sent.ip(), expected);
    }
}
both_families!(a_large_packet_yet_to_be_cut_stays_one);

fn ethernet_frames_leave_with_the_next_hops_addresses<A: Version>() {
    let world = World::<A>::new();
    let out = |source| udp(source, at(A::SERVER, 53));
    let frame = out(at(A::GUEST, 40000)).ethernet([9; 6], [8; 6]).build();
    let first = world.run(Some(TAP), Bytes::ethernet(&frame)).sent.unwrap();
    assert!(first.resolve, "the kernel confirms the neighbour at first");
    assert_eq!(first.frame.bytes[..14], frame[..14]);
    let second = world.run(Some(TAP), Bytes::ethernet(&frame)).sent.unwrap();
    assert!(!second.resolve);
    let expected = out(at(A::OUTSIDE, 40000))
        .ttl(63)
        .ethernet([4, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 2])
        .build();
    assert_eq!(second.frame.bytes, expected);
}
both_families!(ethernet_frames_leave_with_the_next_hops_addresses);

fn padding_and_payload_are_left_alone<A: Version>() {
    let world = World::<A>::new();
    let mut frame = udp(at(A::GUEST, 40000), at(A::SERVER, 53))
        .payload(b"x")
        .ethernet([9; 6], [8; 6])
        .build();
    let end = frame.len();
    frame.resize(end + 17, 0xee);
    let sent = world.run(Some(TAP), Bytes::ethernet(&frame)).sent.unwrap();
    assert_eq!(sent.frame.bytes.len(), end + 17);
    assert_eq!(sent.frame.bytes[end..], frame[end..]);
}
both_families!(padding_and_payload_are_left_alone);

fn headers_beyond_the_linear_part_are_pulled_in<A: Version>() {
    let world = World::<A>::new();
    let out = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 500]);
    let expected = udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53))
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
both_families!(headers_beyond_the_linear_part_are_pulled_in);

fn wrong_checksums_stay_wrong<A: Version>() {
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    let builder = udp(at(A::GUEST, 40000), at(A::SERVER, 53));
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
both_families!(wrong_checksums_stay_wrong);
