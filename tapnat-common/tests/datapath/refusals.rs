//! Packets that are refused with an ICMP error: when, and the error byte by
//! byte. Time to live and sizes, which are the usual reasons, and every reason
//! for want of resources.

use etherparse::IpNumber;
use tapnat_common::{
    refusal::Budget,
    verdict::{Outcome, Reason},
};
use tapnat_testbed::packet::{self, Builder, checksum};

use crate::support::{
    frame::Bytes,
    network::{
        MOST_OPTIONS, TAP, UPLINK, Version, at, both_families, icmp_error, ip, ping, pong, tcp, udp,
    },
    world::{World, route},
};

/// The error as it should be: 64 hops to go, identification 0, and in IPv4
/// with internetwork control's precedence (RFC 1812 section 4.3.2.5).
fn error<A: Version>(from: A, to: A, kind: (u8, u8), mtu: u16, quoted: &[u8]) -> Vec<u8> {
    let [high, low] = mtu.to_be_bytes();
    packet::icmp_error(ip(from), ip(to), kind, [0, 0, high, low], quoted)
        .identification(0)
        .precedence(A::PRECEDENCE_OF_ERRORS)
        .build()
}

/// What an error quotes: the IP header and 20 bytes.
fn quote<A: Version>(packet: &[u8]) -> &[u8] {
    let header = A::shape(packet).unwrap().transport;
    &packet[..packet.len().min(header + 20)]
}

fn the_last_hop_is_ours_to_tell<A: Version>() {
    for builder in [
        udp(at(A::GUEST, 40000), at(A::SERVER, 33434)).payload(&[0x40; 32]),
        tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "S"),
        ping(A::GUEST, A::SERVER, 77).payload(&[1; 56]),
        A::with_options(udp(at(A::GUEST, 40000), at(A::SERVER, 33434)), 2).payload(&[0x40; 32]),
        A::with_options(udp(at(A::GUEST, 40000), at(A::SERVER, 33434)), MOST_OPTIONS),
    ] {
        for time_to_live in [0, 1] {
            let world = World::<A>::new();
            let probe = builder.clone().ttl(time_to_live).build();
            let exit = world.guest_sends(TAP, &probe);
            assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
            assert_eq!(
                exit.refused(Reason::TimeToLiveExceeded),
                error(
                    A::HOST[0],
                    A::GUEST,
                    A::TIME_EXCEEDED,
                    0,
                    quote::<A>(&probe)
                )
            );
            assert_eq!(world.sizes(), [0; 5], "nothing is made for it");
            // Of a session that is there, too.
            world.guest_sends(TAP, &builder.clone().ttl(2).build());
            let exit = world.guest_sends(TAP, &probe);
            assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
        }
    }
}
both_families!(the_last_hop_is_ours_to_tell);

fn short_packets_are_quoted_whole<A: Version>() {
    for payload in [
        &b""[..],
        b"1",
        b"12",
        b"123",
        b"1234",
        b"12345678901",
        b"123456789012",
    ] {
        let world = World::<A>::new();
        let probe = udp(at(A::GUEST, 40000), at(A::SERVER, 33434))
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
        let quoted = &answer[A::HEADER + 8..];
        assert!(quoted.len() >= A::HEADER + 8 && probe.starts_with(quoted));
        assert_eq!(
            answer,
            error(A::HOST[0], A::GUEST, A::TIME_EXCEEDED, 0, quoted)
        );
    }
}
both_families!(short_packets_are_quoted_whole);

fn of_a_protocol_with_less_than_a_header_whole_words_are_quoted<A: Version>() {
    for length in 0..8 {
        let probe = packet::other(ip(A::GUEST), ip(A::SERVER), IpNumber::IGMP)
            .payload(&vec![1; length])
            .ttl(1)
            .build();
        let answer = World::<A>::new()
            .guest_sends(TAP, &probe)
            .refused(Reason::TimeToLiveExceeded);
        let quoted = &probe[..A::HEADER + length / 4 * 4];
        assert_eq!(
            answer,
            error(A::HOST[0], A::GUEST, A::TIME_EXCEEDED, 0, quoted)
        );
    }
}
both_families!(of_a_protocol_with_less_than_a_header_whole_words_are_quoted);

fn the_world_is_told_by_the_outside_address<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &udp(at(A::GUEST, 40000), at(A::SERVER, 53)).build());
    let back = udp(at(A::SERVER, 53), at(A::OUTSIDE, 40000)).ttl(1).build();
    let exit = world.world_sends(&back);
    assert_eq!(exit.sent.as_ref().unwrap().device, UPLINK.get());
    assert_eq!(
        exit.refused(Reason::TimeToLiveExceeded),
        error(
            A::OUTSIDE,
            A::SERVER,
            A::TIME_EXCEEDED,
            0,
            quote::<A>(&back)
        )
    );
}
both_families!(the_world_is_told_by_the_outside_address);

fn two_hops_to_go_are_enough_and_one_is_taken<A: Version>() {
    let world = World::<A>::new();
    let sent = world
        .guest_sends(
            TAP,
            &udp(at(A::GUEST, 40000), at(A::SERVER, 53)).ttl(2).build(),
        )
        .forwarded(Reason::SessionStarted);
    assert_eq!(
        sent,
        udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)).ttl(1).build()
    );
}
both_families!(two_hops_to_go_are_enough_and_one_is_taken);

fn for_the_host_the_last_hop_is_enough<A: Version>() {
    let world = World::<A>::new();
    for time_to_live in [0, 1] {
        let guest_sends = udp(at(A::GUEST, 40000), at(A::HOST[0], 53)).ttl(time_to_live);
        let exit = world.guest_sends(TAP, &guest_sends.build());
        assert_eq!(exit.reason, Reason::ForTheHost);
        let world_sends = udp(at(A::SERVER, 40000), at(A::OUTSIDE, 53)).ttl(time_to_live);
        let exit = world.world_sends(&world_sends.build());
        assert_eq!(exit.reason, Reason::NoMapping);
    }
}
both_families!(for_the_host_the_last_hop_is_enough);

/// A guest's datagram of this many bytes in all.
fn sized<A: Version>(length: usize) -> Builder {
    udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&vec![7; length - A::HEADER - 8])
}

fn what_is_too_big_and_must_not_be_cut_is_refused_with_the_mtu<A: Version>() {
    let world = World::<A>::new();
    world
        .routes
        .borrow_mut()
        .insert(A::SERVER, route(UPLINK.get(), 1400));
    let large = sized::<A>(1401).dont_fragment().build();
    assert_eq!(
        world
            .guest_sends(TAP, &large)
            .refused(Reason::FragmentationNeeded),
        error(A::HOST[0], A::GUEST, A::TOO_BIG, 1400, quote::<A>(&large))
    );
    assert_eq!(world.sizes()[..2], [0, 0], "no session for what did not go");
    // One byte less fits, at first and in the session.
    let fits = sized::<A>(1400).dont_fragment().build();
    assert_eq!(world.guest_sends(TAP, &fits).reason, Reason::SessionStarted);
    let exit = world.guest_sends(TAP, &fits);
    assert!(exit.quick);
    assert_eq!(
        world
            .guest_sends(TAP, &large)
            .refused(Reason::FragmentationNeeded),
        error(A::HOST[0], A::GUEST, A::TOO_BIG, 1400, quote::<A>(&large))
    );
}
both_families!(what_is_too_big_and_must_not_be_cut_is_refused_with_the_mtu);

fn the_way_in_has_its_own_mtu<A: Version>() {
    let world = World::<A>::new();
    world.set_device(TAP, |device| device.mtu = 1280);
    world.guest_sends(TAP, &sized::<A>(100).build());
    let back = |length: usize| {
        udp(at(A::SERVER, 53), at(A::OUTSIDE, 40000))
            .payload(&vec![7; length - A::HEADER - 8])
            .dont_fragment()
            .build()
    };
    let large = back(1281);
    assert_eq!(
        world
            .world_sends(&large)
            .refused(Reason::FragmentationNeeded),
        error(A::OUTSIDE, A::SERVER, A::TOO_BIG, 1280, quote::<A>(&large))
    );
    assert_eq!(world.world_sends(&back(1280)).reason, Reason::Translated);
}
both_families!(the_way_in_has_its_own_mtu);

fn an_mtu_that_shrinks_is_noticed<A: Version>() {
    let world = World::<A>::new();
    let large = sized::<A>(1500).dont_fragment().build();
    world.guest_sends(TAP, &large);
    world
        .routes
        .borrow_mut()
        .insert(A::SERVER, route(UPLINK.get(), 1300));
    assert!(world.guest_sends(TAP, &large).quick, "nobody told yet");
    world.set(|settings| settings.generation += 1);
    assert_eq!(
        world
            .guest_sends(TAP, &large)
            .refused(Reason::FragmentationNeeded),
        error(A::HOST[0], A::GUEST, A::TOO_BIG, 1300, quote::<A>(&large))
    );
    // Without being told, it is looked up again after a while.
    let world = World::<A>::new();
    world.guest_sends(TAP, &large);
    world
        .routes
        .borrow_mut()
        .insert(A::SERVER, route(UPLINK.get(), 1300));
    world.wait_seconds(1);
    assert_eq!(
        world.guest_sends(TAP, &large).reason,
        Reason::FragmentationNeeded
    );
}
both_families!(an_mtu_that_shrinks_is_noticed);

fn segments_yet_to_be_cut_are_measured_by_what_they_become<A: Version>() {
    let large = tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "A")
        .dont_fragment()
        .payload(&[9; 10_000]);
    let frame = |segment_size| Bytes {
        segment_size,
        ..Bytes::offloaded(&large)
    };
    let world = World::<A>::new();
    let most = 1500 - u16::try_from(A::HEADER).unwrap() - 20;
    let exit = world.run(Some(TAP), frame(most));
    assert_eq!(exit.reason.outcome(), Outcome::Forward);
    let exit = world.run(Some(TAP), frame(most + 1));
    assert_eq!(exit.reason, Reason::FragmentationNeeded);
    let answer = exit.refused(Reason::FragmentationNeeded);
    assert_eq!(
        checksum::verify(&answer, checksum::Expect::Complete),
        Ok(())
    );
}
both_families!(segments_yet_to_be_cut_are_measured_by_what_they_become);

fn an_error_about_a_checksum_yet_to_be_completed_has_a_right_one<A: Version>() {
    // The device completes the quoted checksum, over the quoted bytes only.
    for payload in [&b""[..], b"odd", b"longer than what is quoted"] {
        for builder in [
            udp(at(A::GUEST, 40000), at(A::SERVER, 53)),
            tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "S"),
        ] {
            let world = World::<A>::new();
            let exit = world.run(
                Some(TAP),
                Bytes::offloaded(&builder.payload(payload).ttl(1)),
            );
            let answer = exit.refused(Reason::TimeToLiveExceeded);
            assert_eq!(
                checksum::verify(&answer, checksum::Expect::Complete),
                Ok(())
            );
            let parsed = packet::Parsed::new(packet::Link::Ip, &answer).unwrap();
            let quoted = parsed.quoted().unwrap();
            assert_eq!(quoted.source.ip(), ip(A::GUEST));
            assert_eq!(quoted.source.port(), 40000);
        }
    }
}
both_families!(an_error_about_a_checksum_yet_to_be_completed_has_a_right_one);

fn an_error_goes_back_to_where_the_frame_came_from<A: Version>() {
    let world = World::<A>::new();
    let probe = udp(at(A::GUEST, 40000), at(A::SERVER, 53))
        .ttl(1)
        .ethernet([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1])
        .build();
    let sent = world.run(Some(TAP), Bytes::ethernet(&probe)).sent.unwrap();
    assert_eq!(sent.frame.bytes[..6], [1, 2, 3, 4, 5, 6]);
    assert_eq!(sent.frame.bytes[6..12], [6, 5, 4, 3, 2, 1]);
    assert_eq!(sent.frame.bytes[12..14], A::ETHERTYPE);
    assert_eq!(
        sent.frame.ip(),
        error(
            A::HOST[0],
            A::GUEST,
            A::TIME_EXCEEDED,
            0,
            quote::<A>(&probe[14..])
        )
    );
}
both_families!(an_error_goes_back_to_where_the_frame_came_from);

fn some_packets_are_never_answered<A: Version>() {
    // RFC 1122 section 3.2.2: later fragments, and sources that are nobody's.
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 400]);
    world.guest_sends(TAP, &datagram.fragment(0..80));
    let exit = world.guest_sends(TAP, &datagram.clone().ttl(1).fragment(80..160));
    assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
    assert!(exit.sent.is_none());
    for unroutable in A::UNROUTABLE {
        world.set_device(TAP, |device| {
            device.address = A::elsewhere(1);
            device.network = *unroutable;
            device.mask = A::mask(A::BITS);
        });
        let packet = udp(at(*unroutable, 40000), at(A::SERVER, 53)).ttl(1);
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, Reason::TimeToLiveExceeded, "{unroutable:?}");
        assert!(exit.sent.is_none(), "{unroutable:?}");
    }
    // The first fragment is answered.
    let world = World::<A>::new();
    let exit = world.guest_sends(TAP, &datagram.ttl(1).fragment(0..80));
    exit.refused(Reason::TimeToLiveExceeded);
}
both_families!(some_packets_are_never_answered);

fn what_resources_are_missing_for_is_prohibited<A: Version>() {
    // RFC 5508 REQ-8.
    let first = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).build();
    let check = |world: &World<A>, reason| {
        let exit = world.guest_sends(TAP, &first);
        assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
        assert_eq!(
            exit.refused(reason),
            error(A::HOST[0], A::GUEST, A::PROHIBITED, 0, quote::<A>(&first))
        );
    };
    let world = World::<A>::new();
    world.sessions.capacity.set(1);
    check(&world, Reason::SessionTableFull);
    let world = World::<A>::new();
    world.mappings.capacity.set(0);
    check(&world, Reason::MappingTableFull);
    let world = World::<A>::new();
    world.guests.capacity.set(0);
    check(&world, Reason::GuestTableFull);
    let world = World::<A>::new();
    world.withhold(|_| true);
    check(&world, Reason::PortsExhausted);
    let world = World::<A>::new();
    world.set(|settings| settings.guest_max_sessions = 1);
    world.guest_sends(TAP, &udp(at(A::GUEST, 4000), at(A::SERVER, 53)).build());
    check(&world, Reason::GuestSessionLimit);
    let world = World::<A>::new();
    world.set(|settings| settings.guest_max_ports = 1);
    world.guest_sends(TAP, &udp(at(A::GUEST, 4000), at(A::SERVER, 53)).build());
    check(&world, Reason::GuestPortLimit);
}
both_families!(what_resources_are_missing_for_is_prohibited);

fn errors_and_replies_are_not_refused_with_errors<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &ping(A::GUEST, A::SERVER, 7).build());
    let exit = world.world_sends(&pong(A::SERVER, A::OUTSIDE, 7).ttl(1).build());
    // A reply is no error: RFC 1812 section 4.3.2.7 lets it be answered.
    assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
    let about = udp(at(A::SERVER, 53), at(A::GUEST, 40000)).build();
    let unreachable = icmp_error(A::GUEST, A::SERVER, A::PORT_UNREACHABLE, &about).ttl(1);
    let exit = world.guest_sends(TAP, &unreachable.build());
    assert!(exit.sent.is_none());
}
both_families!(errors_and_replies_are_not_refused_with_errors);

fn a_sender_is_told_only_so_often<A: Version>() {
    let world = World::<A>::new();
    let flood = |source| {
        let packet = udp(at(source, 40000), at(A::SERVER, 53)).ttl(1).build();
        (0..2 * Budget::MOST)
            .filter(|_| {
                let exit = world.guest_sends(TAP, &packet);
                assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
                exit.sent.is_some()
            })
            .count()
    };
    let most = usize::try_from(Budget::MOST).unwrap();
    assert_eq!(flood(A::GUEST), most);
    assert_eq!(flood(A::GUEST), 0);
    assert_eq!(flood(A::NEIGHBOUR), most, "others are");
    world.wait_seconds(1);
    assert_eq!(flood(A::GUEST), most);
}
both_families!(a_sender_is_told_only_so_often);
