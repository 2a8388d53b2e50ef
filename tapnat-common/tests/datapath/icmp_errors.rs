//! ICMP errors about packets of sessions (RFC 5508 sections 4 and 7): what they
//! quote is translated too, and they neither make, keep nor end anything.

use etherparse::IpNumber;
use tapnat_common::{
    abi::Filtering,
    net::{Be32, protocol},
    verdict::{Outcome, Reason},
};
use tapnat_testbed::packet::{self, Builder, checksum};

use crate::support::{
    frame::sum,
    network::{
        MOST_OPTIONS, SECOND_TAP, TAP, UPLINK, Version, at, both_families, endpoint, icmp_error,
        ip, ping, source, tcp, udp,
    },
    world::World,
};

/// An error from a router on the way to the server.
fn error<A: Version>(kind: (u8, u8), rest: [u8; 4], to: A, quoted: &[u8]) -> Builder {
    packet::icmp_error(ip(A::ROUTER), ip(to), kind, rest, quoted)
}

/// Opens a session and returns what left for the world.
#[track_caller]
fn opened<A: Version>(world: &World<A>, packet: &Builder) -> Vec<u8> {
    world
        .guest_sends(TAP, &packet.build())
        .forwarded(Reason::SessionStarted)
}

/// What a router quotes of a packet that it got with this time to live.
fn quoted(packet: &Builder, length: usize) -> Vec<u8> {
    let mut bytes = packet.clone().ttl(1).build();
    bytes.truncate(length);
    bytes
}

/// Each pair is a packet as a guest sends it and as the world sees it.
fn sessions<A: Version>() -> Vec<(&'static str, Builder, Builder)> {
    vec![
        (
            "UDP",
            udp(at(A::GUEST, 40000), at(A::SERVER, 53)),
            udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)),
        ),
        (
            "UDP without a checksum",
            udp(at(A::GUEST, 40001), at(A::SERVER, 53)).without_udp_checksum(),
            udp(at(A::OUTSIDE, 40001), at(A::SERVER, 53)).without_udp_checksum(),
        ),
        (
            "TCP",
            tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "S").payload(b"fast open"),
            tcp(at(A::OUTSIDE, 40000), at(A::SERVER, 80), "S").payload(b"fast open"),
        ),
        (
            "echo",
            ping(A::GUEST, A::SERVER, 77),
            ping(A::OUTSIDE, A::SERVER, 77),
        ),
        (
            "IP options",
            A::with_options(udp(at(A::GUEST, 40002), at(A::SERVER, 53)), 2),
            A::with_options(udp(at(A::OUTSIDE, 40002), at(A::SERVER, 53)), 2),
        ),
    ]
}

/// The length of the quoted IP header.
fn header<A: Version>(packet: &[u8]) -> usize {
    A::shape(packet).unwrap().transport
}

fn errors_from_the_world_quote_what_the_guest_sent<A: Version>() {
    for (name, inside, outside) in sessions::<A>() {
        let world = World::<A>::new();
        opened(&world, &inside);
        let whole = outside.build();
        // 8 bytes of the transport header are all that is certain (RFC 792).
        for length in (header::<A>(&whole) + 8)..=whole.len() {
            if A::shape(&whole).unwrap().protocol == protocol::TCP
                && length == header::<A>(&whole) + 17
            {
                // Half a checksum, of no use to anyone, is left as it is.
                continue;
            }
            for kind in [
                A::TIME_EXCEEDED,
                A::HOST_UNREACHABLE,
                A::PORT_UNREACHABLE,
                A::PARAMETER_PROBLEM,
            ] {
                let exit = world.world_sends(
                    &error(kind, [0; 4], A::OUTSIDE, &quoted(&outside, length)).build(),
                );
                assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
                let expected = error(kind, [0; 4], A::GUEST, &quoted(&inside, length));
                assert_eq!(
                    exit.forwarded(Reason::ErrorTranslated),
                    expected.ttl(63).build(),
                    "{name}, {length} bytes quoted, type {kind:?}"
                );
            }
        }
    }
}
both_families!(errors_from_the_world_quote_what_the_guest_sent);

fn the_mtu_of_the_way_arrives<A: Version>() {
    let (_, inside, outside) = sessions::<A>().swap_remove(2);
    let world = World::<A>::new();
    opened(&world, &inside);
    let length = A::HEADER + 8;
    let rest = [0, 0, 0x05, 0x14];
    let sent = world
        .world_sends(&error(A::TOO_BIG, rest, A::OUTSIDE, &quoted(&outside, length)).build())
        .forwarded(Reason::ErrorTranslated);
    assert_eq!(
        sent,
        error(A::TOO_BIG, rest, A::GUEST, &quoted(&inside, length))
            .ttl(63)
            .build()
    );
}
both_families!(the_mtu_of_the_way_arrives);

fn errors_from_guests_hide_the_inside<A: Version>() {
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    opened(&world, &udp(at(A::GUEST, 40000), at(A::SERVER, 53)));
    // The server answers, and the guest's port is closed by now.
    let answer = udp(at(A::SERVER, 53), at(A::GUEST, 40000));
    let seen = udp(at(A::SERVER, 53), at(A::OUTSIDE, 40000));
    world.world_sends(&seen.build());
    for length in A::HEADER + 8..=answer.build().len() {
        let guest_sends = icmp_error(
            A::GUEST,
            A::SERVER,
            A::PORT_UNREACHABLE,
            &quoted(&answer.clone(), length),
        );
        let exit = world.guest_sends(TAP, &guest_sends.build());
        assert_eq!(exit.sent.as_ref().unwrap().device, UPLINK.get());
        let expected = icmp_error(
            A::OUTSIDE,
            A::SERVER,
            A::PORT_UNREACHABLE,
            &quoted(&seen.clone(), length),
        );
        assert_eq!(
            exit.forwarded(Reason::ErrorTranslated),
            expected.ttl(63).build(),
            "{length} bytes quoted"
        );
    }
}
both_families!(errors_from_guests_hide_the_inside);

fn errors_from_routers_behind_a_guest_hide_the_inside_too<A: Version>() {
    let world = World::<A>::new();
    opened(&world, &udp(at(A::GUEST, 40000), at(A::SERVER, 53)));
    let answer = udp(at(A::SERVER, 53), at(A::GUEST, 40000));
    world.world_sends(&udp(at(A::SERVER, 53), at(A::OUTSIDE, 40000)).build());
    let inner = A::inside(0, 99);
    let from_router =
        packet::time_exceeded(ip(inner), ip(A::SERVER), &quoted(&answer, A::HEADER + 16));
    let sent = world
        .guest_sends(TAP, &from_router.build())
        .forwarded(Reason::ErrorTranslated);
    let seen = udp(at(A::SERVER, 53), at(A::OUTSIDE, 40000));
    assert_eq!(
        sent,
        packet::time_exceeded(
            ip(A::OUTSIDE),
            ip(A::SERVER),
            &quoted(&seen, A::HEADER + 16)
        )
        .ttl(63)
        .build()
    );
}
both_families!(errors_from_routers_behind_a_guest_hide_the_inside_too);

fn errors_about_a_port_that_was_changed<A: Version>() {
    let world = World::<A>::new();
    opened(&world, &udp(at(A::GUEST, 5000), at(A::SERVER, 53)));
    let inside = udp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53));
    let sent = world
        .guest_sends(SECOND_TAP, &inside.build())
        .forwarded(Reason::SessionStarted);
    let port = source(&sent).port();
    let outside = udp(at(A::OUTSIDE, port), at(A::SERVER, 53));
    let exit = world.world_sends(
        &error(
            A::PORT_UNREACHABLE,
            [0; 4],
            A::OUTSIDE,
            &quoted(&outside, A::HEADER + 8),
        )
        .build(),
    );
    assert_eq!(exit.sent.as_ref().unwrap().device, SECOND_TAP.get());
    assert_eq!(
        exit.forwarded(Reason::ErrorTranslated),
        error(
            A::PORT_UNREACHABLE,
            [0; 4],
            A::OTHER_GUEST,
            &quoted(&inside, A::HEADER + 8)
        )
        .ttl(63)
        .build()
    );
}
both_families!(errors_about_a_port_that_was_changed);

fn quoted_options_do_not_hide_the_ports<A: Version>() {
    // Also in the error's own header.
    let inside = A::with_options(udp(at(A::GUEST, 40000), at(A::SERVER, 53)), MOST_OPTIONS);
    let outside = A::with_options(udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)), MOST_OPTIONS);
    let world = World::<A>::new();
    opened(&world, &inside);
    let length = header::<A>(&inside.build()) + 8;
    let received = error(A::TIME_EXCEEDED, [0; 4], A::GUEST, &quoted(&inside, length));
    let world_sends = error(
        A::TIME_EXCEEDED,
        [0; 4],
        A::OUTSIDE,
        &quoted(&outside, length),
    );
    let world_sends = A::with_options(world_sends, MOST_OPTIONS);
    assert_eq!(
        world
            .world_sends(&world_sends.build())
            .forwarded(Reason::ErrorTranslated),
        A::with_options(received, MOST_OPTIONS).ttl(63).build()
    );
}
both_families!(quoted_options_do_not_hide_the_ports);

/// What follows the quoted packet, padded to 128 bytes: an extension structure
/// with an MPLS label stack (RFC 4884, RFC 4950).
fn extended<A: Version>(quoted: &[u8]) -> Vec<u8> {
    let mut bytes = quoted.to_vec();
    bytes.resize(A::QUOTED_BEFORE_EXTENSION, 0);
    let mut extension = vec![0x20, 0, 0, 0, 0, 8, 1, 1, 0x12, 0x34, 0x51, 1];
    let check = !sum(&extension);
    extension[2..4].copy_from_slice(&check.to_be_bytes());
    bytes.extend(extension);
    bytes
}

fn extensions_are_left_alone<A: Version>() {
    for (name, inside, outside) in sessions::<A>() {
        let world = World::<A>::new();
        opened(&world, &inside);
        let rest = A::EXTENDED;
        let length = outside.build().len();
        let world_sends = error(
            A::TIME_EXCEEDED,
            rest,
            A::OUTSIDE,
            &extended::<A>(&quoted(&outside, length)),
        );
        assert_eq!(
            world
                .world_sends(&world_sends.build())
                .forwarded(Reason::ErrorTranslated),
            error(
                A::TIME_EXCEEDED,
                rest,
                A::GUEST,
                &extended::<A>(&quoted(&inside, length))
            )
            .ttl(63)
            .build(),
            "{name}"
        );
    }
}
both_families!(extensions_are_left_alone);

fn a_quoted_checksum_that_becomes_zero_is_written_as_all_ones<A: Version>() {
    let inside = |payload: &[u8]| udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(payload);
    let without = inside(&[0, 0]).build();
    let payload = [without[A::HEADER + 6], without[A::HEADER + 7]];
    let inside = inside(&payload);
    assert_eq!(inside.build()[A::HEADER + 6..A::HEADER + 8], [0xff, 0xff]);
    let outside = udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)).payload(&payload);
    let world = World::<A>::new();
    opened(&world, &inside);
    let sent = world
        .world_sends(
            &error(
                A::PORT_UNREACHABLE,
                [0; 4],
                A::OUTSIDE,
                &quoted(&outside, A::HEADER + 10),
            )
            .build(),
        )
        .forwarded(Reason::ErrorTranslated);
    assert_eq!(
        sent,
        error(
            A::PORT_UNREACHABLE,
            [0; 4],
            A::GUEST,
            &quoted(&inside, A::HEADER + 10)
        )
        .ttl(63)
        .build()
    );
}
both_families!(a_quoted_checksum_that_becomes_zero_is_written_as_all_ones);

fn a_quoted_transport_checksum_is_not_judged<A: Version>() {
    let inside = udp(at(A::GUEST, 40000), at(A::SERVER, 53));
    let world = World::<A>::new();
    opened(&world, &inside);
    let outside = udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)).bad_transport_checksum();
    let exit = world.world_sends(
        &error(
            A::PORT_UNREACHABLE,
            [0; 4],
            A::OUTSIDE,
            &quoted(&outside, A::HEADER + 16),
        )
        .build(),
    );
    assert_eq!(exit.reason, Reason::ErrorTranslated);
}
both_families!(a_quoted_transport_checksum_is_not_judged);

/// From the world they may be the host's own, which looks at what matters to it.
fn errors_with_wrong_checksums_reach_no_guest<A: Version>() {
    let (_, inside, outside) = sessions::<A>().swap_remove(0);
    let world = World::<A>::new();
    opened(&world, &inside);
    let good = quoted(&outside, A::HEADER + 16);
    let own = error(A::TIME_EXCEEDED, [0; 4], A::OUTSIDE, &good).bad_transport_checksum();
    assert_eq!(world.world_sends(&own.build()).reason, Reason::NoMapping);
    // An odd number of bytes, the last of which is wrong.
    let mut odd = error(
        A::TIME_EXCEEDED,
        [0; 4],
        A::OUTSIDE,
        &good[..A::HEADER + 15],
    )
    .build();
    assert_eq!(world.world_sends(&odd).reason, Reason::ErrorTranslated);
    *odd.last_mut().unwrap() ^= 1;
    assert_eq!(world.world_sends(&odd).reason, Reason::NoMapping);
    let back = udp(at(A::SERVER, 53), at(A::GUEST, 40000)).build();
    let guests =
        icmp_error(A::GUEST, A::SERVER, A::PORT_UNREACHABLE, &back).bad_transport_checksum();
    assert_eq!(
        world.guest_sends(TAP, &guests.build()).reason,
        Reason::ErrorBadChecksum
    );
}
both_families!(errors_with_wrong_checksums_reach_no_guest);

#[test]
fn errors_that_quote_a_wrong_ipv4_checksum_reach_no_guest() {
    let (_, inside, outside) = sessions::<Be32>().swap_remove(0);
    let world = World::<Be32>::new();
    opened(&world, &inside);
    let inner = quoted(&outside.bad_ip_checksum(), 36);
    let about = error(Be32::TIME_EXCEEDED, [0; 4], Be32::OUTSIDE, &inner);
    let exit = world.world_sends(&about.build());
    assert_eq!(exit.reason, Reason::NoMapping);
}

fn errors_that_quote_too_little_are_the_hosts_to_judge<A: Version>() {
    let (_, inside, outside) = sessions::<A>().swap_remove(0);
    let world = World::<A>::new();
    opened(&world, &inside);
    for length in 0..A::HEADER + 8 {
        let exit = world.world_sends(
            &error(
                A::TIME_EXCEEDED,
                [0; 4],
                A::OUTSIDE,
                &quoted(&outside, length),
            )
            .build(),
        );
        assert_eq!(exit.reason, Reason::NoMapping, "{length} bytes quoted");
        let answer = udp(at(A::SERVER, 53), at(A::GUEST, 40000));
        let guest_sends = icmp_error(
            A::GUEST,
            A::SERVER,
            A::PORT_UNREACHABLE,
            &quoted(&answer, length),
        );
        let exit = world.guest_sends(TAP, &guest_sends.build());
        assert_eq!(exit.reason, Reason::ErrorUnusable, "{length} bytes quoted");
    }
}
both_families!(errors_that_quote_too_little_are_the_hosts_to_judge);

fn errors_about_errors_and_about_later_fragments_are_unusable<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)).payload(&[1; 64]);
    opened(&world, &udp(at(A::GUEST, 40000), at(A::SERVER, 53)));
    let about = |inner: &[u8]| {
        world
            .world_sends(&error(A::TIME_EXCEEDED, [0; 4], A::OUTSIDE, inner).build())
            .reason
    };
    assert_eq!(about(&datagram.fragment(0..40)), Reason::ErrorTranslated);
    assert_eq!(about(&datagram.fragment(40..72)), Reason::NoMapping);
    let inner = packet::time_exceeded(ip(A::OUTSIDE), ip(A::SERVER), &datagram.build()).build();
    assert_eq!(about(&inner), Reason::NoMapping);
    let unknown = packet::other(ip(A::OUTSIDE), ip(A::SERVER), IpNumber::IGMP).payload(&[0; 8]);
    assert_eq!(about(&unknown.build()), Reason::NoMapping);
}
both_families!(errors_about_errors_and_about_later_fragments_are_unusable);

fn errors_about_nothing_of_ours<A: Version>() {
    let world = World::<A>::new();
    opened(&world, &udp(at(A::GUEST, 40000), at(A::SERVER, 53)));
    // About the host's own connections: the host's.
    let hosts = udp(at(A::OUTSIDE, 33000), at(A::SERVER, 53));
    let exit = world.world_sends(
        &error(
            A::PORT_UNREACHABLE,
            [0; 4],
            A::OUTSIDE,
            &quoted(&hosts, A::HEADER + 8),
        )
        .build(),
    );
    assert_eq!(exit.reason, Reason::NoMapping);
    // From a guest, about what it never got.
    let never = udp(at(A::SERVER, 99), at(A::GUEST, 40000));
    let to = |destination| {
        icmp_error(
            A::GUEST,
            destination,
            A::PORT_UNREACHABLE,
            &quoted(&never, A::HEADER + 8),
        )
    };
    let exit = world.guest_sends(TAP, &to(A::SERVER).build());
    assert_eq!(exit.reason, Reason::ErrorWithoutSession);
    let exit = world.guest_sends(TAP, &to(A::HOST[0]).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
    // About another guest's session.
    let others = udp(at(A::SERVER, 53), at(A::GUEST, 40000));
    let forged = icmp_error(
        A::OTHER_GUEST,
        A::SERVER,
        A::PORT_UNREACHABLE,
        &quoted(&others, A::HEADER + 8),
    );
    let exit = world.guest_sends(SECOND_TAP, &forged.build());
    assert_eq!(exit.reason, Reason::ErrorWithoutSession);
}
both_families!(errors_about_nothing_of_ours);

fn an_error_whose_time_to_live_ends_here_is_not_answered<A: Version>() {
    let (_, inside, outside) = sessions::<A>().swap_remove(0);
    let world = World::<A>::new();
    opened(&world, &inside);
    let exit = world.world_sends(
        &error(
            A::TIME_EXCEEDED,
            [0; 4],
            A::OUTSIDE,
            &quoted(&outside, A::HEADER + 16),
        )
        .ttl(1)
        .build(),
    );
    assert_eq!(exit.reason.outcome(), Outcome::Drop);
    assert!(exit.sent.is_none());
}
both_families!(an_error_whose_time_to_live_ends_here_is_not_answered);

fn errors_keep_nothing_alive_and_end_nothing<A: Version>() {
    let (_, inside, outside) = sessions::<A>().swap_remove(0);
    let world = World::<A>::new();
    opened(&world, &inside);
    let before = (world.half(Some(TAP), &inside.build()), world.sizes());
    let mapping = || {
        world
            .mappings
            .copy(&endpoint(A::OUTSIDE, 40000, protocol::UDP))
            .unwrap()
    };
    let mapping_before = mapping();
    for seconds in [0, 100, 100, 99] {
        world.wait_seconds(seconds);
        let about = error(
            A::PORT_UNREACHABLE,
            [0; 4],
            A::OUTSIDE,
            &quoted(&outside, A::HEADER + 8),
        )
        .build();
        assert_eq!(world.world_sends(&about).reason, Reason::ErrorTranslated);
        assert_eq!(
            (world.half(Some(TAP), &inside.build()), world.sizes()),
            before
        );
        assert_eq!(mapping(), mapping_before);
    }
    world.wait_seconds(2);
    let about = error(
        A::PORT_UNREACHABLE,
        [0; 4],
        A::OUTSIDE,
        &quoted(&outside, A::HEADER + 8),
    )
    .build();
    assert_eq!(
        world.world_sends(&about).reason,
        Reason::ErrorWithoutSession
    );
}
both_families!(errors_keep_nothing_alive_and_end_nothing);

fn the_error_itself_may_be_long<A: Version>() {
    // Some routers quote all of it.
    let inside = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[0xab; 1440]);
    let outside = udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)).payload(&[0xab; 1440]);
    let world = World::<A>::new();
    opened(&world, &inside);
    let length = 1450;
    let sent = world
        .world_sends(
            &error(
                A::HOST_UNREACHABLE,
                [0; 4],
                A::OUTSIDE,
                &quoted(&outside, length),
            )
            .build(),
        )
        .forwarded(Reason::ErrorTranslated);
    assert_eq!(
        sent,
        error(
            A::HOST_UNREACHABLE,
            [0; 4],
            A::GUEST,
            &quoted(&inside, length)
        )
        .ttl(63)
        .build()
    );
    assert_eq!(checksum::verify(&sent, checksum::Expect::Complete), Ok(()));
}
both_families!(the_error_itself_may_be_long);
