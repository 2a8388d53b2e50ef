//! Fragments (RFC 4787 REQ-14): in and out of order, both ways, with bounds.

use tapnat_common::{abi::MAX_HELD, verdict::Reason};
use tapnat_testbed::packet::Builder;

use crate::support::{
    frame::Bytes,
    network::{GUEST, HOST, NEIGHBOUR, OUTSIDE, SERVER, TAP, at, ping, pong, tcp, udp},
    world::{Exit, World},
};

/// Each pair is a datagram as the guest sees it and as the world does.
fn datagrams() -> Vec<(Builder, Builder)> {
    let payload: Vec<u8> = (0..3000_u32)
        .map(|number| number.to_le_bytes()[0])
        .collect();
    let pair =
        |inside: Builder, outside: Builder| (inside.payload(&payload), outside.payload(&payload));
    vec![
        pair(
            udp(at(GUEST, 40000), at(SERVER, 53)),
            udp(at(OUTSIDE, 40000), at(SERVER, 53)),
        ),
        pair(
            udp(at(GUEST, 40000), at(SERVER, 53)).without_udp_checksum(),
            udp(at(OUTSIDE, 40000), at(SERVER, 53)).without_udp_checksum(),
        ),
        pair(
            tcp(at(GUEST, 40000), at(SERVER, 80), "A"),
            tcp(at(OUTSIDE, 40000), at(SERVER, 80), "A"),
        ),
        pair(ping(GUEST, SERVER, 77), ping(OUTSIDE, SERVER, 77)),
    ]
}

/// What left because of a packet: itself, and what had waited for it.
fn sent(exit: Exit) -> Vec<Vec<u8>> {
    let own = exit.sent.map(|sent| sent.frame.ip().to_vec());
    let released = exit.released.iter().map(|frame| frame.ip().to_vec());
    own.into_iter().chain(released).collect()
}

fn sorted(mut packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    packets.sort();
    packets
}

#[test]
fn in_order_out_and_back() {
    for (inside, outside) in datagrams() {
        let world = World::new();
        for mtu in [1500, 576] {
            let pairs = inside
                .fragments(mtu)
                .into_iter()
                .zip(outside.clone().ttl(63).fragments(mtu));
            for (fragment, expected) in pairs {
                let out = sent(world.guest_sends(TAP, &fragment));
                assert_eq!(out, [expected]);
            }
            world.wait_seconds(16);
        }
    }
}

#[test]
fn every_order_arrives_complete() {
    for (inside, outside) in datagrams() {
        let fragments = inside.fragments(1280);
        let expected = outside.clone().ttl(63).fragments(1280);
        assert_eq!(fragments.len(), 3);
        for order in [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let world = World::new();
            let mut arrived = Vec::new();
            for (place, number) in order.into_iter().enumerate() {
                let exit = world.guest_sends(TAP, &fragments[number]);
                let first = order.iter().position(|number| *number == 0).unwrap();
                if place < first {
                    assert_eq!(exit.reason, Reason::FragmentHeld);
                }
                arrived.extend(sent(exit));
            }
            assert_eq!(sorted(arrived), sorted(expected.clone()), "{order:?}");
            assert!(world.held.borrow().is_empty());
        }
    }
}

#[test]
fn from_the_world_in_every_order() {
    let payload = [3; 3000];
    let pairs = [
        (
            udp(at(GUEST, 40000), at(SERVER, 53)),
            udp(at(SERVER, 53), at(OUTSIDE, 40000)),
            udp(at(SERVER, 53), at(GUEST, 40000)),
        ),
        (
            ping(GUEST, SERVER, 77),
            pong(SERVER, OUTSIDE, 77),
            pong(SERVER, GUEST, 77),
        ),
    ];
    for (opening, back, received) in pairs {
        let fragments = back.payload(&payload).fragments(1280);
        let expected = received.payload(&payload).ttl(63).fragments(1280);
        for order in [[0, 1, 2], [0, 2, 1], [1, 2, 0], [2, 1, 0]] {
            let world = World::new();
            world.guest_sends(TAP, &opening.build());
            let arrived = order
                .into_iter()
                .flat_map(|number| sent(world.world_sends(&fragments[number])))
                .collect();
            assert_eq!(sorted(arrived), sorted(expected.clone()), "{order:?}");
        }
    }
}

#[test]
fn datagrams_do_not_mix() {
    // Interleaved, of two guests with one identification, and of one guest with
    // two.
    let world = World::new();
    let datagram = |source, identification| {
        udp(source, at(SERVER, 53))
            .identification(identification)
            .payload(&[0x42; 2000])
    };
    let flows = [
        (datagram(at(GUEST, 4000), 7), at(OUTSIDE, 4000)),
        (datagram(at(NEIGHBOUR, 4001), 7), at(OUTSIDE, 4001)),
        (datagram(at(GUEST, 4002), 8), at(OUTSIDE, 4002)),
    ];
    for number in 0..2 {
        for (inside, outside) in &flows {
            let expected = datagram(*outside, 0x1234).ttl(63).fragments(1280);
            let exit = world.guest_sends(TAP, &inside.fragments(1280)[number]);
            assert_eq!(sent(exit), [expected[number].clone()]);
        }
    }
}

#[test]
fn no_byte_goes_by_twice() {
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &datagram.fragment(bytes)).reason;
    assert_eq!(pass(0..80), Reason::SessionStarted);
    assert_eq!(pass(0..80), Reason::FragmentOverlap, "the first once more");
    assert_eq!(pass(72..160), Reason::FragmentOverlap, "its last 8 bytes");
    assert_eq!(pass(160..240), Reason::Translated);
    assert_eq!(pass(80..168), Reason::FragmentOverlap);
    assert_eq!(pass(80..160), Reason::Translated, "what was still missing");
    assert_eq!(pass(240..408), Reason::Translated);
}

#[test]
fn a_later_fragment_that_came_first_overwrites_nothing() {
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &datagram.fragment(bytes));
    assert_eq!(pass(80..160).reason, Reason::FragmentHeld);
    let exit = pass(0..88);
    assert_eq!(exit.reason, Reason::SessionStarted);
    assert!(exit.released.is_empty(), "the one that waited overlaps");
    assert_eq!(pass(88..160).reason, Reason::Translated);
}

#[test]
fn only_so_many_wait_for_one_datagram() {
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 2000]);
    let pass = |number: u32| {
        let start = usize::try_from(number).unwrap() * 8;
        world.guest_sends(TAP, &datagram.fragment(start..start + 8))
    };
    for number in 1..=MAX_HELD {
        assert_eq!(pass(number).reason, Reason::FragmentHeld);
    }
    assert_eq!(pass(MAX_HELD + 1).reason, Reason::FragmentNotHeld);
    let exit = pass(0);
    assert_eq!(exit.reason, Reason::SessionStarted);
    assert_eq!(exit.released.len(), usize::try_from(MAX_HELD).unwrap());
}

#[test]
fn too_long_a_fragment_does_not_wait() {
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 6000]);
    let exit = world.guest_sends(TAP, &datagram.fragment(8..3008));
    assert_eq!(exit.reason, Reason::FragmentNotHeld);
}

#[test]
fn a_fragment_may_not_end_beyond_the_largest_datagram() {
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 400]);
    world.guest_sends(TAP, &datagram.fragment(0..80));
    let mut last = datagram.fragment(80..160);
    // "Ping of death": the offset is as high as can be.
    last[6..8].copy_from_slice(&0x1fff_u16.to_be_bytes());
    // Wrong by that, but checked by nobody before its receiver.
    let exit = world.guest_sends(TAP, &last);
    assert_eq!(exit.reason, Reason::FragmentBeyondEnd);
    // The highest offset with 8 bytes is the end of the largest one.
    let mut end = datagram.fragment(80..88);
    end[6..8].copy_from_slice(&0x1fff_u16.to_be_bytes());
    assert_eq!(world.guest_sends(TAP, &end).reason, Reason::Translated);
}

#[test]
fn fragments_share_their_firsts_fate() {
    let world = World::new();
    // Refused: more than the guest may have.
    world.set(|settings| settings.guest_max_sessions = 1);
    world.guest_sends(TAP, &udp(at(GUEST, 4000), at(SERVER, 53)).build());
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &datagram.fragment(bytes)).reason;
    assert_eq!(pass(80..160), Reason::FragmentHeld);
    assert_eq!(pass(0..80), Reason::GuestSessionLimit);
    assert_eq!(pass(160..240), Reason::FragmentOfDropped);
}

#[test]
fn fragments_for_the_host_reach_it() {
    let host = HOST[0].into();
    let world = World::new();
    let request = ping(GUEST, host, 5).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &request.fragment(bytes));
    assert_eq!(pass(0..80).reason, Reason::ForTheHost);
    assert_eq!(pass(80..160).reason, Reason::ForTheHost);
    // Out of order, and from the world.
    let world = World::new();
    let query = udp(at(SERVER, 99), at(OUTSIDE, 53)).payload(&[1; 400]);
    let waiting = query.fragment(80..160);
    assert_eq!(world.world_sends(&waiting).reason, Reason::FragmentHeld);
    let exit = world.world_sends(&query.fragment(0..80));
    assert_eq!(exit.reason, Reason::NoMapping);
    let released: Vec<_> = exit.released.iter().map(Bytes::ip).collect();
    assert_eq!(released, [waiting.as_slice()], "as it came");
    // It comes by once more on its way up.
    assert_eq!(world.world_sends(&waiting).reason, Reason::ForTheHost);
    assert_eq!(
        world.world_sends(&query.fragment(160..408)).reason,
        Reason::ForTheHost
    );
}

#[test]
fn fragments_are_waited_for_a_while() {
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 400]);
    world.guest_sends(TAP, &datagram.fragment(0..80));
    world.wait_seconds(14);
    let exit = world.guest_sends(TAP, &datagram.fragment(80..160));
    assert_eq!(exit.reason, Reason::Translated);
    world.wait_seconds(2);
    // The identification may now be another datagram's.
    let exit = world.guest_sends(TAP, &datagram.fragment(160..240));
    assert_eq!(exit.reason, Reason::FragmentHeld);
    let exit = world.guest_sends(TAP, &datagram.fragment(0..160));
    assert_eq!(exit.reason, Reason::Translated);
    assert_eq!(exit.released.len(), 1);
}

#[test]
fn the_time_to_live_of_waiting_fragments_counts_too() {
    let world = World::new();
    let datagram = udp(at(GUEST, 40000), at(SERVER, 53)).payload(&[1; 400]);
    for (bytes, time_to_live) in [(80..160, 1), (160..240, 0)] {
        let exit = world.guest_sends(TAP, &datagram.clone().ttl(time_to_live).fragment(bytes));
        assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
        assert!(
            exit.sent.is_none(),
            "RFC 1122: no error about later fragments"
        );
    }
    let exit = world.guest_sends(TAP, &datagram.fragment(0..80));
    assert!(exit.released.is_empty());
}

#[test]
fn a_flood_of_fragments_pushes_out_fragments_only() {
    let world = World::new();
    world.guest_sends(TAP, &udp(at(GUEST, 4000), at(SERVER, 53)).build());
    world.fragments.capacity.set(4);
    let sizes = world.sizes();
    for identification in 0..64 {
        let datagram = udp(at(GUEST, 40000), at(SERVER, 53))
            .identification(identification)
            .payload(&[1; 400]);
        let exit = world.guest_sends(TAP, &datagram.fragment(80..160));
        assert_eq!(exit.reason, Reason::FragmentHeld);
        assert_eq!(world.sizes(), sizes);
        assert!(world.fragments.len() <= 4);
    }
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 4000), at(SERVER, 53)).build());
    assert!(exit.quick);
}
