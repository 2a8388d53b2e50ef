//! Packets that are too long for the way on and may be fragmented, are (RFC 4787
//! REQ-13).

use tapnat_common::{cut::MAX_PIECES, verdict::Reason};
use tapnat_testbed::packet::Builder;

use crate::support::{
    frame::Bytes,
    network::{SECOND_TAP, TAP, UPLINK, Version, at, ping, tcp, udp},
    world::{Exit, World, route},
};

/// IPv4's alone.
type A = tapnat_common::net::Be32;

/// The uplink is narrower than the tap.
fn narrow() -> World<A> {
    let world = World::<A>::new();
    world
        .routes
        .borrow_mut()
        .insert(A::SERVER, route(UPLINK.get(), 1280));
    world
}

/// As the guest sends them, and as they leave in one piece.
fn large() -> Vec<(Builder, Builder)> {
    let pair = |inside: Builder, outside: Builder| {
        (inside.payload(&[5; 1401]), outside.payload(&[5; 1401]))
    };
    vec![
        pair(
            udp(at(A::GUEST, 40_000), at(A::SERVER, 53)),
            udp(at(A::OUTSIDE, 40_000), at(A::SERVER, 53)),
        ),
        pair(
            tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "A"),
            tcp(at(A::OUTSIDE, 40_000), at(A::SERVER, 80), "A"),
        ),
        pair(ping(A::GUEST, A::SERVER, 7), ping(A::OUTSIDE, A::SERVER, 7)),
    ]
}

fn packets(frames: &[Bytes]) -> Vec<Vec<u8>> {
    frames.iter().map(|frame| frame.ip().to_vec()).collect()
}

#[track_caller]
fn check_pieces(exit: &Exit, expected: &Builder) {
    assert_eq!(exit.reason, Reason::Fragmented);
    assert!(exit.sent.is_none());
    let expected = expected.clone().ttl(63).fragments(1280);
    assert_eq!(packets(&exit.released), expected);
}

#[test]
fn what_is_too_long_is_cut() {
    for (inside, outside) in large() {
        let world = narrow();
        for _ in 0..3 {
            check_pieces(&world.guest_sends(TAP, &inside.build()), &outside);
        }
        assert_eq!((world.sessions.len(), world.mappings.len()), (2, 1));
    }
}

#[test]
fn what_fits_just_so_is_not() {
    let world = narrow();
    let datagram = |length| udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).payload(&vec![5; length]);
    let exit = world.guest_sends(TAP, &datagram(1280 - 28).build());
    assert_eq!(exit.reason, Reason::SessionStarted);
    let exit = world.guest_sends(TAP, &datagram(1281 - 28).build());
    assert_eq!(exit.released.len(), 2);
}

#[test]
fn what_must_not_be_cut_is_refused_all_the_same() {
    let world = narrow();
    for (inside, _) in large() {
        let exit = world.guest_sends(TAP, &inside.dont_fragment().build());
        assert_eq!(exit.reason, Reason::FragmentationNeeded);
    }
}

#[test]
fn a_checksum_that_a_device_was_to_complete_is_complete() {
    for (inside, outside) in large().into_iter().take(2) {
        let world = narrow();
        check_pieces(&world.run(Some(TAP), Bytes::offloaded(&inside)), &outside);
    }
}

#[test]
fn to_a_guest_and_between_guests() {
    // The other guest's tap is narrower.
    let world = narrow();
    let peer = A::OTHER_GUEST;
    world
        .routes
        .borrow_mut()
        .insert(peer, route(SECOND_TAP.get(), 1280));
    world.set_filtering(tapnat_common::abi::Filtering::EndpointIndependent);
    world.guest_sends(
        SECOND_TAP,
        &udp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53)).build(),
    );
    let answer = udp(at(A::SERVER, 53), at(A::OUTSIDE, 5000)).payload(&[5; 1400]);
    let expected = udp(at(A::SERVER, 53), at(A::OTHER_GUEST, 5000)).payload(&[5; 1400]);
    check_pieces(&world.world_sends(&answer.build()), &expected);
    let hairpin = udp(at(A::GUEST, 4000), at(A::OUTSIDE, 5000)).payload(&[5; 1400]);
    let expected = udp(at(A::OUTSIDE, 4000), at(A::OTHER_GUEST, 5000)).payload(&[5; 1400]);
    check_pieces(&world.guest_sends(TAP, &hairpin.build()), &expected);
}

#[test]
fn the_last_hop_is_not_made_longer() {
    let world = narrow();
    let (inside, _) = large().swap_remove(0);
    let exit = world.guest_sends(TAP, &inside.ttl(1).build());
    assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
}

#[test]
fn fragments_that_are_too_long_are_cut_again() {
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [2, 0, 1],
        [1, 2, 0],
        [2, 1, 0],
    ];
    for order in orders {
        let world = narrow();
        let datagram = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).payload(&[5; 3000]);
        let fragments = datagram.fragments(1500);
        assert_eq!(fragments.len(), 3);
        let mut left = Vec::new();
        for number in order {
            let exit = world.guest_sends(TAP, &fragments[number]);
            let sent = exit.sent.map(|sent| sent.frame);
            let frames: Vec<_> = sent.into_iter().chain(exit.released).collect();
            left.extend(packets(&frames));
        }
        let expected = udp(at(A::OUTSIDE, 40_000), at(A::SERVER, 53))
            .payload(&[5; 3000])
            .ttl(63);
        // What 1500 bytes carry is no whole number of what 1280 carry.
        let mut expected: Vec<_> = [0..1256, 1256..1480, 1480..2736, 2736..2960, 2960..3008]
            .into_iter()
            .map(|bytes| expected.fragment(bytes))
            .collect();
        expected.sort();
        left.sort();
        assert_eq!(left, expected, "{order:?}");
        // It is complete, so the identification is free.
        let exit = world.guest_sends(TAP, &fragments[0]);
        assert_eq!(exit.released.len(), 2);
    }
}

#[test]
fn no_more_pieces_than_can_be_made() {
    let world = World::<A>::new();
    let step = 576 - 20 - 4;
    world
        .routes
        .borrow_mut()
        .insert(A::SERVER, route(UPLINK.get(), 576));
    let most = step * usize::try_from(MAX_PIECES).unwrap();
    let datagram =
        |length| udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).payload(&vec![5; length - 8]);
    let exit = world.guest_sends(TAP, &datagram(most).build());
    assert_eq!(exit.released.len(), usize::try_from(MAX_PIECES).unwrap());
    let exit = world.guest_sends(TAP, &datagram(most + 1).build());
    assert_eq!(exit.reason, Reason::TooBigToFragment);
}

#[test]
fn segments_that_are_yet_to_be_cut_are_made_shorter() {
    let world = narrow();
    let (inside, outside) = (
        tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "A"),
        tcp(at(A::OUTSIDE, 40_000), at(A::SERVER, 80), "A"),
    );
    let segments = |packet: Builder| {
        let mut frame = Bytes::raw(&packet.payload(&vec![5; 20_000]).build());
        frame.segment_size = 1448;
        frame
    };
    let exit = world.run(Some(TAP), segments(inside.clone()));
    let sent = exit.sent.unwrap().frame;
    assert_eq!(usize::from(sent.segment_size), 1280 - 40);
    assert_eq!(sent.ip(), segments(outside.ttl(63)).ip());
    // Datagrams are the sender's own to divide.
    let mut frame = Bytes::raw(
        &udp(at(A::GUEST, 40_000), at(A::SERVER, 53))
            .payload(&vec![5; 20_000])
            .build(),
    );
    frame.segment_size = 1448;
    let exit = world.run(Some(TAP), frame);
    assert_eq!(exit.reason, Reason::TooBigToFragment);
}
