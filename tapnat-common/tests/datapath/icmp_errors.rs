//! ICMP errors about packets of sessions (RFC 5508 sections 4 and 7): what they
//! quote is translated too, and they neither make, keep nor end anything.

use std::net::Ipv4Addr;

use etherparse::IpNumber;
use tapnat_common::{
    abi::Filtering,
    net::protocol,
    verdict::{Outcome, Reason},
};
use tapnat_testbed::packet::{self, Builder, checksum};

use crate::support::{
    frame::sum,
    network::{
        GUEST, OTHER_GUEST, OUTSIDE, ROUTER, SECOND_TAP, SERVER, TAP, UPLINK, at, endpoint, ip,
        ping, tcp, udp,
    },
    world::World,
};

/// An error from a router on the way to the server.
fn error(kind: (u8, u8), rest: [u8; 4], to: Ipv4Addr, quoted: &[u8]) -> Builder {
    packet::icmp_error(ip(ROUTER), ip(to), kind, rest, quoted)
}

/// Opens a session and returns what left for the world.
#[track_caller]
fn opened(world: &World, packet: &Builder) -> Vec<u8> {
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
fn sessions() -> Vec<(&'static str, Builder, Builder)> {
    let record_route = [7, 7, 4, 0, 0, 0, 0, 0];
    vec![
        (
            "UDP",
            udp(at(GUEST, 40000), at(SERVER, 53)),
            udp(at(OUTSIDE, 40000), at(SERVER, 53)),
        ),
        (
            "UDP without a checksum",
            udp(at(GUEST, 40001), at(SERVER, 53)).without_udp_checksum(),
            udp(at(OUTSIDE, 40001), at(SERVER, 53)).without_udp_checksum(),
        ),
        (
            "TCP",
            tcp(at(GUEST, 40000), at(SERVER, 80), "S").payload(b"fast open"),
            tcp(at(OUTSIDE, 40000), at(SERVER, 80), "S").payload(b"fast open"),
        ),
        ("echo", ping(GUEST, SERVER, 77), ping(OUTSIDE, SERVER, 77)),
        (
            "IP options",
            udp(at(GUEST, 40002), at(SERVER, 53)).options(&record_route),
            udp(at(OUTSIDE, 40002), at(SERVER, 53)).options(&record_route),
        ),
    ]
}

/// The length of the quoted IP header.
fn header(packet: &[u8]) -> usize {
    usize::from(packet[0] & 15) * 4
}

#[test]
fn errors_from_the_world_quote_what_the_guest_sent() {
    for (name, inside, outside) in sessions() {
        let world = World::new();
        opened(&world, &inside);
        let whole = outside.build();
        // 8 bytes of the transport header are all that is certain (RFC 792).
        for length in (header(&whole) + 8)..=whole.len() {
            if whole[9] == protocol::TCP && length == header(&whole) + 17 {
                // Half a checksum, of no use to anyone, is left as it is.
                continue;
            }
            for kind in [(11, 0), (3, 1), (3, 3), (12, 0)] {
                let exit = world
                    .world_sends(&error(kind, [0; 4], OUTSIDE, &quoted(&outside, length)).build());
                assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
                let expected = error(kind, [0; 4], GUEST, &quoted(&inside, length));
                assert_eq!(
                    exit.forwarded(Reason::ErrorTranslated),
                    expected.ttl(63).build(),
                    "{name}, {length} bytes quoted, type {kind:?}"
                );
            }
        }
    }
}

#[test]
fn the_mtu_of_the_way_arrives() {
    let (_, inside, outside) = sessions().swap_remove(2);
    let world = World::new();
    opened(&world, &inside);
    let length = 28;
    let rest = [0, 0, 0x05, 0x14];
    let sent = world
        .world_sends(&error((3, 4), rest, OUTSIDE, &quoted(&outside, length)).build())
        .forwarded(Reason::ErrorTranslated);
    assert_eq!(
        sent,
        error((3, 4), rest, GUEST, &quoted(&inside, length))
            .ttl(63)
            .build()
    );
}

#[test]
fn errors_from_guests_hide_the_inside() {
    let world = World::new();
    world.set_filtering(Filtering::EndpointIndependent);
    opened(&world, &udp(at(GUEST, 40000), at(SERVER, 53)));
    // The server answers, and the guest's port is closed by now.
    let answer = udp(at(SERVER, 53), at(GUEST, 40000));
    let seen = udp(at(SERVER, 53), at(OUTSIDE, 40000));
    world.world_sends(&seen.build());
    for length in 28..=answer.build().len() {
        let guest_sends =
            packet::unreachable(ip(GUEST), ip(SERVER), 3, &quoted(&answer.clone(), length));
        let exit = world.guest_sends(TAP, &guest_sends.build());
        assert_eq!(exit.sent.as_ref().unwrap().device, UPLINK.get());
        let expected =
            packet::unreachable(ip(OUTSIDE), ip(SERVER), 3, &quoted(&seen.clone(), length));
        assert_eq!(
            exit.forwarded(Reason::ErrorTranslated),
            expected.ttl(63).build(),
            "{length} bytes quoted"
        );
    }
}

#[test]
fn errors_from_routers_behind_a_guest_hide_the_inside_too() {
    let world = World::new();
    opened(&world, &udp(at(GUEST, 40000), at(SERVER, 53)));
    let answer = udp(at(SERVER, 53), at(GUEST, 40000));
    world.world_sends(&udp(at(SERVER, 53), at(OUTSIDE, 40000)).build());
    let inner = Ipv4Addr::new(10, 0, 0, 99);
    let from_router = packet::time_exceeded(ip(inner), ip(SERVER), &quoted(&answer, 36));
    let sent = world
        .guest_sends(TAP, &from_router.build())
        .forwarded(Reason::ErrorTranslated);
    let seen = udp(at(SERVER, 53), at(OUTSIDE, 40000));
    assert_eq!(
        sent,
        packet::time_exceeded(ip(OUTSIDE), ip(SERVER), &quoted(&seen, 36))
            .ttl(63)
            .build()
    );
}

#[test]
fn errors_about_a_port_that_was_changed() {
    let world = World::new();
    opened(&world, &udp(at(GUEST, 5000), at(SERVER, 53)));
    let inside = udp(at(OTHER_GUEST, 5000), at(SERVER, 53));
    let sent = world
        .guest_sends(SECOND_TAP, &inside.build())
        .forwarded(Reason::SessionStarted);
    let port = u16::from_be_bytes([sent[20], sent[21]]);
    let outside = udp(at(OUTSIDE, port), at(SERVER, 53));
    let exit = world.world_sends(&error((3, 3), [0; 4], OUTSIDE, &quoted(&outside, 28)).build());
    assert_eq!(exit.sent.as_ref().unwrap().device, SECOND_TAP.get());
    assert_eq!(
        exit.forwarded(Reason::ErrorTranslated),
        error((3, 3), [0; 4], OTHER_GUEST, &quoted(&inside, 28))
            .ttl(63)
            .build()
    );
}

#[test]
fn quoted_options_do_not_hide_the_ports() {
    // Also in the error's own header, as long as options can be.
    let long: Vec<u8> = [vec![7, 39, 4], vec![0; 37]].concat();
    let inside = udp(at(GUEST, 40000), at(SERVER, 53)).options(&long);
    let outside = udp(at(OUTSIDE, 40000), at(SERVER, 53)).options(&long);
    let world = World::new();
    opened(&world, &inside);
    let world_sends = error((11, 0), [0; 4], OUTSIDE, &quoted(&outside, 68)).options(&long);
    assert_eq!(
        world
            .world_sends(&world_sends.build())
            .forwarded(Reason::ErrorTranslated),
        error((11, 0), [0; 4], GUEST, &quoted(&inside, 68))
            .options(&long)
            .ttl(63)
            .build()
    );
}

/// What follows the quoted packet, padded to 128 bytes: an extension structure
/// with an MPLS label stack (RFC 4884, RFC 4950).
fn extended(quoted: &[u8]) -> Vec<u8> {
    let mut bytes = quoted.to_vec();
    bytes.resize(128, 0);
    let mut extension = vec![0x20, 0, 0, 0, 0, 8, 1, 1, 0x12, 0x34, 0x51, 1];
    let check = !sum(&extension);
    extension[2..4].copy_from_slice(&check.to_be_bytes());
    bytes.extend(extension);
    bytes
}

#[test]
fn extensions_are_left_alone() {
    for (name, inside, outside) in sessions() {
        let world = World::new();
        opened(&world, &inside);
        // The length of the quoted packet is given in words of 32 bits.
        let rest = [0, 32, 0, 0];
        let length = outside.build().len();
        let world_sends = error((11, 0), rest, OUTSIDE, &extended(&quoted(&outside, length)));
        assert_eq!(
            world
                .world_sends(&world_sends.build())
                .forwarded(Reason::ErrorTranslated),
            error((11, 0), rest, GUEST, &extended(&quoted(&inside, length)))
                .ttl(63)
                .build(),
            "{name}"
        );
    }
}

#[test]
fn a_quoted_checksum_that_becomes_zero_is_written_as_all_ones() {
    let inside = |payload: &[u8]| udp(at(GUEST, 40000), at(SERVER, 53)).payload(payload);
    let without = inside(&[0, 0]).build();
    let payload = [without[26], without[27]];
    let inside = inside(&payload);
    assert_eq!(inside.build()[26..28], [0xff, 0xff]);
    let outside = udp(at(OUTSIDE, 40000), at(SERVER, 53)).payload(&payload);
    let world = World::new();
    opened(&world, &inside);
    let sent = world
        .world_sends(&error((3, 3), [0; 4], OUTSIDE, &quoted(&outside, 30)).build())
        .forwarded(Reason::ErrorTranslated);
    assert_eq!(
        sent,
        error((3, 3), [0; 4], GUEST, &quoted(&inside, 30))
            .ttl(63)
            .build()
    );
}

#[test]
fn a_quoted_transport_checksum_is_not_judged() {
    let inside = udp(at(GUEST, 40000), at(SERVER, 53));
    let world = World::new();
    opened(&world, &inside);
    let outside = udp(at(OUTSIDE, 40000), at(SERVER, 53)).bad_transport_checksum();
    let exit = world.world_sends(&error((3, 3), [0; 4], OUTSIDE, &quoted(&outside, 36)).build());
    assert_eq!(exit.reason, Reason::ErrorTranslated);
}

#[test]
fn errors_with_wrong_checksums_are_dropped() {
    let (_, inside, outside) = sessions().swap_remove(0);
    let world = World::new();
    opened(&world, &inside);
    let good = quoted(&outside, 36);
    let own = error((11, 0), [0; 4], OUTSIDE, &good).bad_transport_checksum();
    assert_eq!(
        world.world_sends(&own.build()).reason,
        Reason::ErrorBadChecksum
    );
    let inner = quoted(&outside.clone().bad_ip_checksum(), 36);
    let exit = world.world_sends(&error((11, 0), [0; 4], OUTSIDE, &inner).build());
    assert_eq!(exit.reason, Reason::ErrorBadChecksum);
    // An odd number of bytes, the last of which is wrong.
    let mut odd = error((11, 0), [0; 4], OUTSIDE, &good[..35]).build();
    assert_eq!(world.world_sends(&odd).reason, Reason::ErrorTranslated);
    *odd.last_mut().unwrap() ^= 1;
    assert_eq!(world.world_sends(&odd).reason, Reason::ErrorBadChecksum);
}

#[test]
fn errors_that_quote_too_little_are_the_hosts_to_judge() {
    let (_, inside, outside) = sessions().swap_remove(0);
    let world = World::new();
    opened(&world, &inside);
    for length in 0..28 {
        let exit =
            world.world_sends(&error((11, 0), [0; 4], OUTSIDE, &quoted(&outside, length)).build());
        assert_eq!(exit.reason, Reason::NoMapping, "{length} bytes quoted");
        let answer = udp(at(SERVER, 53), at(GUEST, 40000));
        let guest_sends = packet::unreachable(ip(GUEST), ip(SERVER), 3, &quoted(&answer, length));
        let exit = world.guest_sends(TAP, &guest_sends.build());
        assert_eq!(exit.reason, Reason::ErrorUnusable, "{length} bytes quoted");
    }
}

#[test]
fn errors_about_errors_and_about_later_fragments_are_unusable() {
    let world = World::new();
    let datagram = udp(at(OUTSIDE, 40000), at(SERVER, 53)).payload(&[1; 64]);
    opened(&world, &udp(at(GUEST, 40000), at(SERVER, 53)));
    let about = |inner: &[u8]| {
        world
            .world_sends(&error((11, 0), [0; 4], OUTSIDE, inner).build())
            .reason
    };
    assert_eq!(about(&datagram.fragment(0..40)), Reason::ErrorTranslated);
    assert_eq!(about(&datagram.fragment(40..72)), Reason::NoMapping);
    let inner = packet::time_exceeded(ip(OUTSIDE), ip(SERVER), &datagram.build()).build();
    assert_eq!(about(&inner), Reason::NoMapping);
    let unknown = packet::other(ip(OUTSIDE), ip(SERVER), IpNumber::IGMP).payload(&[0; 8]);
    assert_eq!(about(&unknown.build()), Reason::NoMapping);
}

#[test]
fn errors_about_nothing_of_ours() {
    let world = World::new();
    opened(&world, &udp(at(GUEST, 40000), at(SERVER, 53)));
    // About the host's own connections: the host's.
    let hosts = udp(at(OUTSIDE, 33000), at(SERVER, 53));
    let exit = world.world_sends(&error((3, 3), [0; 4], OUTSIDE, &quoted(&hosts, 28)).build());
    assert_eq!(exit.reason, Reason::NoMapping);
    // From a guest, about what it never got.
    let never = udp(at(SERVER, 99), at(GUEST, 40000));
    let to = |destination| packet::unreachable(ip(GUEST), ip(destination), 3, &quoted(&never, 28));
    let exit = world.guest_sends(TAP, &to(SERVER).build());
    assert_eq!(exit.reason, Reason::ErrorWithoutSession);
    let exit = world.guest_sends(TAP, &to(Ipv4Addr::new(10, 0, 0, 1)).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
    // About another guest's session.
    let others = udp(at(SERVER, 53), at(GUEST, 40000));
    let forged = packet::unreachable(ip(OTHER_GUEST), ip(SERVER), 3, &quoted(&others, 28));
    let exit = world.guest_sends(SECOND_TAP, &forged.build());
    assert_eq!(exit.reason, Reason::ErrorWithoutSession);
}

#[test]
fn an_error_whose_time_to_live_ends_here_is_not_answered() {
    let (_, inside, outside) = sessions().swap_remove(0);
    let world = World::new();
    opened(&world, &inside);
    let exit = world.world_sends(
        &error((11, 0), [0; 4], OUTSIDE, &quoted(&outside, 36))
            .ttl(1)
            .build(),
    );
    assert_eq!(exit.reason.outcome(), Outcome::Drop);
    assert!(exit.sent.is_none());
}

#[test]
fn errors_keep_nothing_alive_and_end_nothing() {
    let (_, inside, outside) = sessions().swap_remove(0);
    let world = World::new();
    opened(&world, &inside);
    let before = (world.half(Some(TAP), &inside.build()), world.sizes());
    let mapping = || {
        world
            .mappings
            .copy(&endpoint(OUTSIDE, 40000, protocol::UDP))
            .unwrap()
    };
    let mapping_before = mapping();
    for seconds in [0, 100, 100, 99] {
        world.wait_seconds(seconds);
        let about = error((3, 3), [0; 4], OUTSIDE, &quoted(&outside, 28)).build();
        assert_eq!(world.world_sends(&about).reason, Reason::ErrorTranslated);
        assert_eq!(
            (world.half(Some(TAP), &inside.build()), world.sizes()),
            before
        );
        assert_eq!(mapping(), mapping_before);
    }
    world.wait_seconds(2);
    let about = error((3, 3), [0; 4], OUTSIDE, &quoted(&outside, 28)).build();
    assert_eq!(
        world.world_sends(&about).reason,
        Reason::ErrorWithoutSession
    );
}

#[test]
fn the_error_itself_may_be_long() {
    // Some routers quote all of it.
    let inside = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[0xab; 1440]);
    let outside = udp(at(OUTSIDE, 40000), at(SERVER, 53)).payload(&[0xab; 1440]);
    let world = World::new();
    opened(&world, &inside);
    let length = 1450;
    let sent = world
        .world_sends(&error((3, 1), [0; 4], OUTSIDE, &quoted(&outside, length)).build())
        .forwarded(Reason::ErrorTranslated);
    assert_eq!(
        sent,
        error((3, 1), [0; 4], GUEST, &quoted(&inside, length))
            .ttl(63)
            .build()
    );
    assert_eq!(checksum::verify(&sent, checksum::Expect::Complete), Ok(()));
}
