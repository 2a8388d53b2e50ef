//! What the host's stack had to fragment for guests is translated as it leaves
//! by the uplink (RFC 4787 REQ-13).

use tapnat_common::{abi::setting_flags, verdict::Reason};
use tapnat_testbed::packet::Builder;

use crate::support::{
    network::{GUEST, OUTSIDE, SERVER, TAP, UPLINK, at, ping, tcp, udp},
    world::{World, route},
};

/// The uplink is narrower than the tap, and its egress is watched.
fn narrow() -> World {
    let world = World::new();
    world.set(|settings| settings.flags |= setting_flags::HOST_FRAGMENTS);
    world
        .routes
        .borrow_mut()
        .insert(SERVER.into(), route(UPLINK.get(), 1280));
    world
}

fn large() -> Vec<(Builder, Builder)> {
    let pair = |inside: Builder, outside: Builder| {
        (inside.payload(&[5; 1400]), outside.payload(&[5; 1400]))
    };
    vec![
        pair(
            udp(at(GUEST, 40_000), at(SERVER, 53)),
            udp(at(OUTSIDE, 40_000), at(SERVER, 53)),
        ),
        pair(
            tcp(at(GUEST, 40_000), at(SERVER, 80), "A"),
            tcp(at(OUTSIDE, 40_000), at(SERVER, 80), "A"),
        ),
        pair(ping(GUEST, SERVER, 7), ping(OUTSIDE, SERVER, 7)),
    ]
}

#[test]
fn what_is_too_long_goes_by_the_host() {
    for (inside, outside) in large() {
        let world = narrow();
        for identification in 0..3 {
            let inside = inside.clone().identification(identification);
            let outside = outside.clone().identification(identification);
            let exit = world.guest_sends(TAP, &inside.build());
            assert_eq!(exit.reason, Reason::FragmentedByHost);
            // The host has taken its hop and cut it.
            let fragments = inside.clone().ttl(63).fragments(1280);
            let expected = outside.clone().ttl(63).fragments(1280);
            for (fragment, expected) in fragments.iter().zip(expected) {
                let exit = world.run_egress(TAP, fragment);
                assert_eq!(exit.forwarded_any(), expected);
            }
        }
        assert_eq!((world.sessions.len(), world.mappings.len()), (2, 1));
    }
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
fn nothing_of_a_guests_leaves_untranslated() {
    let world = narrow();
    world.set(|settings| settings.guest_max_sessions = 1);
    let fits = udp(at(GUEST, 40_001), at(SERVER, 53)).build();
    world.guest_sends(TAP, &fits);
    let (inside, _) = large().swap_remove(0);
    for fragment in inside.ttl(63).fragments(1280) {
        let exit = world.run_egress(TAP, &fragment);
        assert!(exit.sent.is_none(), "{:?}", exit.reason);
    }
    // Not even what is nobody's protocol.
    let unknown =
        tapnat_testbed::packet::other(GUEST.into(), SERVER.into(), etherparse::IpNumber::IGMP);
    let exit = world.run_egress(TAP, &unknown.payload(&[0; 8]).build());
    assert!(exit.sent.is_none());
}

#[test]
fn the_last_hop_was_the_hosts() {
    // The host would have refused it; it arrives with one hop to go.
    let world = narrow();
    let (inside, outside) = large().swap_remove(0);
    let fragments = inside.ttl(1).fragments(1280);
    let expected = outside.ttl(1).fragments(1280);
    for (fragment, expected) in fragments.iter().zip(expected) {
        let exit = world.run_egress(TAP, fragment);
        assert_eq!(exit.forwarded_any(), expected);
    }
}

#[test]
fn fragments_that_are_too_long_go_by_the_host_too() {
    let world = narrow();
    let datagram = udp(at(GUEST, 40_000), at(SERVER, 53)).payload(&[5; 3000]);
    let [first, second, last] = datagram.fragments(1500).try_into().unwrap();
    let exit = world.guest_sends(TAP, &first);
    assert_eq!(exit.reason, Reason::FragmentedByHost);
    for fragment in [second, last] {
        let exit = world.guest_sends(TAP, &fragment);
        assert_eq!(exit.reason, Reason::ForTheHost, "what follows goes with it");
    }
    // Forwarded fragment by fragment, each cut again.
    let cut = datagram.clone().ttl(63).fragments(1280);
    let expected = udp(at(OUTSIDE, 40_000), at(SERVER, 53))
        .payload(&[5; 3000])
        .ttl(63)
        .fragments(1280);
    for (fragment, expected) in cut.iter().zip(expected) {
        let exit = world.run_egress(TAP, fragment);
        assert_eq!(exit.forwarded_any(), expected);
    }
}

#[test]
fn without_the_egress_program_it_is_dropped() {
    let world = narrow();
    world.set(|settings| settings.flags = 0);
    let (inside, _) = large().swap_remove(0);
    let exit = world.guest_sends(TAP, &inside.build());
    assert_eq!(exit.reason, Reason::TooBigToFragment);
}
