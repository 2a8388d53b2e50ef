//! Fragments (RFC 4787 REQ-14): in and out of order, both ways, with bounds.

use tapnat_common::{abi::MAX_HELD, verdict::Reason};
use tapnat_testbed::packet::Builder;

use crate::support::{
    frame::Bytes,
    network::{SECOND_TAP, TAP, Version, at, both_families, ping, pong, tcp, udp},
    world::World,
};

/// Each pair is a datagram as the guest sees it and as the world does.
fn datagrams<A: Version>() -> Vec<(Builder, Builder)> {
    let payload: Vec<u8> = (0..3000_u32)
        .map(|number| number.to_le_bytes()[0])
        .collect();
    let pair =
        |inside: Builder, outside: Builder| (inside.payload(&payload), outside.payload(&payload));
    vec![
        pair(
            udp(at(A::GUEST, 40000), at(A::SERVER, 53)),
            udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)),
        ),
        pair(
            udp(at(A::GUEST, 40000), at(A::SERVER, 53)).without_udp_checksum(),
            udp(at(A::OUTSIDE, 40000), at(A::SERVER, 53)).without_udp_checksum(),
        ),
        pair(
            tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "A"),
            tcp(at(A::OUTSIDE, 40000), at(A::SERVER, 80), "A"),
        ),
        pair(
            ping(A::GUEST, A::SERVER, 77),
            ping(A::OUTSIDE, A::SERVER, 77),
        ),
    ]
}

fn sorted(mut packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    packets.sort();
    packets
}

fn in_order_out_and_back<A: Version>() {
    for (inside, outside) in datagrams::<A>() {
        let world = World::<A>::new();
        for mtu in [1500, 576] {
            let pairs = inside
                .fragments(mtu)
                .into_iter()
                .zip(outside.clone().ttl(63).fragments(mtu));
            for (fragment, expected) in pairs {
                let out = world.guest_sends(TAP, &fragment).all();
                assert_eq!(out, [expected]);
            }
            world.wait_seconds(16);
        }
    }
}
both_families!(in_order_out_and_back);

fn every_order_arrives_complete<A: Version>() {
    for (inside, outside) in datagrams::<A>() {
        let fragments = inside.fragments(1280);
        let expected = outside.clone().ttl(63).fragments(1280);
        assert_eq!(fragments.len(), 3);
        for order in [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let world = World::<A>::new();
            let mut arrived = Vec::new();
            for (place, number) in order.into_iter().enumerate() {
                let exit = world.guest_sends(TAP, &fragments[number]);
                let first = order.iter().position(|number| *number == 0).unwrap();
                if place < first {
                    assert_eq!(exit.reason, Reason::FragmentHeld);
                }
                arrived.extend(exit.all());
            }
            assert_eq!(sorted(arrived), sorted(expected.clone()), "{order:?}");
            assert!(world.held.borrow().is_empty());
        }
    }
}
both_families!(every_order_arrives_complete);

fn from_the_world_in_every_order<A: Version>() {
    let payload = [3; 3000];
    let pairs = [
        (
            udp(at(A::GUEST, 40000), at(A::SERVER, 53)),
            udp(at(A::SERVER, 53), at(A::OUTSIDE, 40000)),
            udp(at(A::SERVER, 53), at(A::GUEST, 40000)),
        ),
        (
            ping(A::GUEST, A::SERVER, 77),
            pong(A::SERVER, A::OUTSIDE, 77),
            pong(A::SERVER, A::GUEST, 77),
        ),
    ];
    for (opening, back, received) in pairs {
        let fragments = back.payload(&payload).fragments(1280);
        let expected = received.payload(&payload).ttl(63).fragments(1280);
        for order in [[0, 1, 2], [0, 2, 1], [1, 2, 0], [2, 1, 0]] {
            let world = World::<A>::new();
            world.guest_sends(TAP, &opening.build());
            let arrived = order
                .into_iter()
                .flat_map(|number| world.world_sends(&fragments[number]).all())
                .collect();
            assert_eq!(sorted(arrived), sorted(expected.clone()), "{order:?}");
        }
    }
}
both_families!(from_the_world_in_every_order);

fn datagrams_do_not_mix<A: Version>() {
    // Interleaved, of two guests with one identification, and of one guest with
    // two.
    let world = World::<A>::new();
    let datagram = |source, identification| {
        udp(source, at(A::SERVER, 53))
            .identification(identification)
            .payload(&[0x42; 2000])
    };
    let flows = [
        (datagram(at(A::GUEST, 4000), 7), at(A::OUTSIDE, 4000)),
        (datagram(at(A::NEIGHBOUR, 4001), 7), at(A::OUTSIDE, 4001)),
        (datagram(at(A::GUEST, 4002), 8), at(A::OUTSIDE, 4002)),
    ];
    for number in 0..2 {
        for (inside, outside) in &flows {
            let expected = datagram(*outside, 0x1234).ttl(63).fragments(1280);
            let exit = world.guest_sends(TAP, &inside.fragments(1280)[number]);
            assert_eq!(exit.all(), [expected[number].clone()]);
        }
    }
}
both_families!(datagrams_do_not_mix);

fn no_byte_goes_by_twice<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &datagram.fragment(bytes)).reason;
    assert_eq!(pass(0..80), Reason::SessionStarted);
    assert_eq!(pass(0..80), Reason::FragmentOverlap, "the first once more");
    assert_eq!(pass(72..160), Reason::FragmentOverlap, "its last 8 bytes");
    assert_eq!(pass(160..240), Reason::Translated);
    assert_eq!(pass(80..168), Reason::FragmentOverlap);
    assert_eq!(pass(80..160), Reason::Translated, "what was still missing");
    assert_eq!(pass(240..408), Reason::Translated);
}
both_families!(no_byte_goes_by_twice);

fn a_later_fragment_that_came_first_overwrites_nothing<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &datagram.fragment(bytes));
    assert_eq!(pass(80..160).reason, Reason::FragmentHeld);
    let exit = pass(0..88);
    assert_eq!(exit.reason, Reason::SessionStarted);
    assert!(exit.released.is_empty(), "the one that waited overlaps");
    assert_eq!(pass(88..160).reason, Reason::Translated);
}
both_families!(a_later_fragment_that_came_first_overwrites_nothing);

fn only_so_many_wait_for_one_datagram<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 2000]);
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
both_families!(only_so_many_wait_for_one_datagram);

fn too_long_a_fragment_does_not_wait<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 6000]);
    let exit = world.guest_sends(TAP, &datagram.fragment(8..3008));
    assert_eq!(exit.reason, Reason::FragmentNotHeld);
}
both_families!(too_long_a_fragment_does_not_wait);

fn a_fragment_may_not_end_beyond_the_largest_datagram<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 400]);
    world.guest_sends(TAP, &datagram.fragment(0..80));
    let mut last = datagram.fragment(80..160);
    // "Ping of death": the offset is as high as can be.
    A::set_fragment_offset(&mut last, 0x1fff);
    // Wrong by that, but checked by nobody before its receiver.
    let exit = world.guest_sends(TAP, &last);
    assert_eq!(exit.reason, Reason::FragmentBeyondEnd);
    // The highest offset with 8 bytes is the end of the largest one.
    let mut end = datagram.fragment(80..88);
    A::set_fragment_offset(&mut end, 0x1fff);
    assert_eq!(world.guest_sends(TAP, &end).reason, Reason::Translated);
}
both_families!(a_fragment_may_not_end_beyond_the_largest_datagram);

fn fragments_share_their_firsts_fate<A: Version>() {
    let world = World::<A>::new();
    // Refused: more than the guest may have.
    world.set(|settings| settings.guest_max_sessions = 1);
    world.guest_sends(TAP, &udp(at(A::GUEST, 4000), at(A::SERVER, 53)).build());
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &datagram.fragment(bytes)).reason;
    assert_eq!(pass(80..160), Reason::FragmentHeld);
    assert_eq!(pass(0..80), Reason::GuestSessionLimit);
    assert_eq!(pass(160..240), Reason::FragmentOfDropped);
}
both_families!(fragments_share_their_firsts_fate);

fn fragments_for_the_host_reach_it<A: Version>() {
    let host = A::HOST[0];
    let world = World::<A>::new();
    let request = ping(A::GUEST, host, 5).payload(&[1; 400]);
    let pass = |bytes| world.guest_sends(TAP, &request.fragment(bytes));
    assert_eq!(pass(0..80).reason, Reason::ForTheHost);
    assert_eq!(pass(80..160).reason, Reason::ForTheHost);
    // Out of order, and from the world.
    let world = World::<A>::new();
    let query = udp(at(A::SERVER, 99), at(A::OUTSIDE, 53)).payload(&[1; 400]);
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
both_families!(fragments_for_the_host_reach_it);

fn fragments_are_waited_for_a_while<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 400]);
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
both_families!(fragments_are_waited_for_a_while);

fn the_time_to_live_of_waiting_fragments_counts_too<A: Version>() {
    let world = World::<A>::new();
    let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).payload(&[1; 400]);
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
both_families!(the_time_to_live_of_waiting_fragments_counts_too);

fn a_flood_of_fragments_pushes_out_fragments_only<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &udp(at(A::GUEST, 4000), at(A::SERVER, 53)).build());
    world.fragments.capacity.set(4);
    let sizes = world.sizes();
    for identification in 0..64 {
        let datagram = udp(at(A::GUEST, 40000), at(A::SERVER, 53))
            .identification(identification)
            .payload(&[1; 400]);
        let exit = world.guest_sends(TAP, &datagram.fragment(80..160));
        assert_eq!(exit.reason, Reason::FragmentHeld);
        assert_eq!(world.sizes(), sizes);
        assert!(world.fragments.len() <= 4);
    }
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 4000), at(A::SERVER, 53)).build());
    assert!(exit.quick);
}
both_families!(a_flood_of_fragments_pushes_out_fragments_only);

/// What the fragments of a datagram have in common.
fn identification<A: Version>(packet: &[u8]) -> Vec<u8> {
    let place = A::shape(packet).unwrap().identification.unwrap();
    packet[place].to_vec()
}

fn two_guests_datagrams_are_told_apart<A: Version>() {
    // RFC 7857 section 10: both count their datagrams alike.
    let world = World::<A>::new();
    world.identification_step.set(1);
    let mut seen = Vec::new();
    for (device, guest, port) in [(TAP, A::GUEST, 4000), (SECOND_TAP, A::OTHER_GUEST, 5000)] {
        let datagram = udp(at(guest, port), at(A::SERVER, 53)).payload(&[1; 3000]);
        let fragments = datagram.identification(7).fragments(1500);
        let mut own: Vec<_> = [1, 0, 2]
            .into_iter()
            .flat_map(|number| {
                let exit = world.guest_sends(device, &fragments[number]);
                let sent = exit.sent.map(|sent| sent.frame);
                sent.into_iter().chain(exit.released)
            })
            .map(|frame| identification::<A>(frame.ip()))
            .collect();
        assert_eq!(own.len(), 3);
        own.dedup();
        seen.extend(own);
    }
    assert_eq!(seen.len(), 2);
    assert_ne!(seen[0], seen[1]);
    // Whole packets keep theirs, and so does what comes from the world.
    let whole = |source| udp(source, at(A::SERVER, 53)).identification(7);
    let sent = world.guest_sends(TAP, &whole(at(A::GUEST, 4000)).build());
    let expected = whole(at(A::OUTSIDE, 4000)).ttl(63).build();
    assert_eq!(sent.forwarded_any(), expected);
    let answer = |destination| {
        udp(at(A::SERVER, 53), destination)
            .identification(7)
            .payload(&[1; 3000])
    };
    let fragment = &answer(at(A::OUTSIDE, 4000)).fragments(1500)[0];
    let expected = &answer(at(A::GUEST, 4000)).ttl(63).fragments(1500)[0];
    assert_eq!(&world.world_sends(fragment).forwarded_any(), expected);
}
both_families!(two_guests_datagrams_are_told_apart);
