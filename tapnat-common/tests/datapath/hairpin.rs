//! Guests that meet over an outside address (RFC 4787 REQ-9, RFC 5382 REQ-8,
//! RFC 5508 REQ-7): seen from each side, the other one is outside.

use tapnat_common::{abi::Filtering, verdict::Reason};
use tapnat_testbed::packet::{self, Builder};

use crate::support::{
    network::{
        GUEST, NEIGHBOUR, OTHER_GUEST, OUTSIDE, SECOND_TAP, SERVER, TAP, at, ip, ping, tcp, udp,
    },
    world::World,
};

/// A guest on the other tap has a mapping that lets everybody in.
fn with_peer() -> World {
    let world = World::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(
        SECOND_TAP,
        &udp(at(OTHER_GUEST, 5000), at(SERVER, 53)).build(),
    );
    world.guest_sends(
        SECOND_TAP,
        &tcp(at(OTHER_GUEST, 5000), at(SERVER, 53), "S").build(),
    );
    world
}

/// From one guest to the other and back, several times.
fn meet(world: &World, build: impl Fn(std::net::SocketAddr, std::net::SocketAddr) -> Builder) {
    for reason in [
        Reason::HairpinStarted,
        Reason::Translated,
        Reason::Translated,
    ] {
        let exit = world.guest_sends(TAP, &build(at(GUEST, 40_000), at(OUTSIDE, 5000)).build());
        assert_eq!(exit.sent.as_ref().unwrap().device, SECOND_TAP.get());
        assert_eq!(
            exit.forwarded(reason),
            build(at(OUTSIDE, 40_000), at(OTHER_GUEST, 5000))
                .ttl(63)
                .build()
        );
        let answer = build(at(OTHER_GUEST, 5000), at(OUTSIDE, 40_000));
        let exit = world.guest_sends(SECOND_TAP, &answer.build());
        assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
        assert_eq!(
            exit.forwarded(Reason::Translated),
            build(at(OUTSIDE, 5000), at(GUEST, 40_000)).ttl(63).build()
        );
    }
}

#[test]
fn datagrams_between_guests() {
    let world = with_peer();
    meet(&world, udp);
    // One session, of both guests and on both mappings: the audit has seen it.
    assert_eq!(world.sessions.len(), 6);
}

#[test]
fn a_session_between_guests_keeps_the_mappings_of_both() {
    let world = with_peer();
    let call = udp(at(GUEST, 40_000), at(OUTSIDE, 5000)).build();
    for _ in 0..5 {
        world.guest_sends(TAP, &call).forwarded_any();
        world.wait_seconds(250);
    }
    let third = udp(at(SERVER, 77), at(OUTSIDE, 5000)).build();
    assert_eq!(world.world_sends(&third).reason, Reason::SessionAdmitted);
}

#[test]
fn connections_between_guests() {
    let world = with_peer();
    let syn = tcp(at(GUEST, 40_000), at(OUTSIDE, 5000), "S").build();
    assert_eq!(world.guest_sends(TAP, &syn).reason, Reason::HairpinStarted);
    let answer = tcp(at(OTHER_GUEST, 5000), at(OUTSIDE, 40_000), "SA").build();
    assert_eq!(
        world
            .guest_sends(SECOND_TAP, &answer)
            .forwarded(Reason::Translated),
        tcp(at(OUTSIDE, 5000), at(GUEST, 40_000), "SA")
            .ttl(63)
            .build()
    );
    for _ in 0..2 {
        let data = tcp(at(GUEST, 40_000), at(OUTSIDE, 5000), "PA").build();
        assert_eq!(world.guest_sends(TAP, &data).reason, Reason::Translated);
        let data = tcp(at(OTHER_GUEST, 5000), at(OUTSIDE, 40_000), "PA").build();
        let exit = world.guest_sends(SECOND_TAP, &data);
        assert_eq!(exit.reason, Reason::Translated);
    }
}

#[test]
fn guests_of_one_device_meet_there() {
    let world = World::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &udp(at(NEIGHBOUR, 5000), at(SERVER, 53)).build());
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(OUTSIDE, 5000)).build());
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::HairpinStarted),
        udp(at(OUTSIDE, 40_000), at(NEIGHBOUR, 5000))
            .ttl(63)
            .build()
    );
    let answer = udp(at(NEIGHBOUR, 5000), at(OUTSIDE, 40_000)).build();
    assert_eq!(
        world
            .guest_sends(TAP, &answer)
            .forwarded(Reason::Translated),
        udp(at(OUTSIDE, 5000), at(GUEST, 40_000)).ttl(63).build()
    );
}

#[test]
fn a_guest_meets_itself() {
    // As a STUN client finds out whether its NAT hairpins: from another socket.
    let world = World::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    let probe = udp(at(GUEST, 40_001), at(OUTSIDE, 40_000)).build();
    let exit = world.guest_sends(TAP, &probe);
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::HairpinStarted),
        udp(at(OUTSIDE, 40_001), at(GUEST, 40_000)).ttl(63).build()
    );
    // And from the same one.
    let own = udp(at(GUEST, 40_000), at(OUTSIDE, 40_000)).build();
    for reason in [Reason::HairpinStarted, Reason::Translated] {
        assert_eq!(
            world.guest_sends(TAP, &own).forwarded(reason),
            udp(at(OUTSIDE, 40_000), at(GUEST, 40_000)).ttl(63).build()
        );
    }
    // Until all of it is over.
    world.wait_seconds(1000);
    assert_eq!(world.guest_sends(TAP, &own).reason, Reason::ForTheHost);
}

#[test]
fn filters_hold_between_guests_too() {
    for filtering in [
        Filtering::AddressDependent,
        Filtering::AddressAndPortDependent,
    ] {
        let world = with_peer();
        world.set_filtering(filtering);
        let probe = udp(at(GUEST, 40_000), at(OUTSIDE, 5000)).build();
        assert_eq!(world.guest_sends(TAP, &probe).reason, Reason::Filtered);
        // From another port than the one that was sent to.
        let by_port = filtering == Filtering::AddressAndPortDependent;
        let other = udp(at(OTHER_GUEST, 5001), at(OUTSIDE, 40_000)).build();
        let admitted = world.guest_sends(SECOND_TAP, &other).reason == Reason::HairpinStarted;
        assert_eq!(admitted, !by_port);
        // Having sent to the outside address, it lets the other one in.
        let punch = udp(at(OTHER_GUEST, 5000), at(OUTSIDE, 40_000)).build();
        let exit = world.guest_sends(SECOND_TAP, &punch);
        assert_eq!(exit.reason, Reason::HairpinStarted);
        assert_eq!(world.guest_sends(TAP, &probe).reason, Reason::Translated);
    }
}

#[test]
fn errors_between_guests_are_translated_twice() {
    let world = with_peer();
    let out = udp(at(GUEST, 40_000), at(OUTSIDE, 5000));
    let received = udp(at(OUTSIDE, 40_000), at(OTHER_GUEST, 5000)).ttl(63);
    world.guest_sends(TAP, &out.build());
    // A packet back first, so that the way is known.
    let answer = udp(at(OTHER_GUEST, 5000), at(OUTSIDE, 40_000));
    world.guest_sends(SECOND_TAP, &answer.build());
    let error = packet::unreachable(ip(OTHER_GUEST), ip(OUTSIDE), 3, &received.build()[..28]);
    let exit = world.guest_sends(SECOND_TAP, &error.build());
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::ErrorTranslated),
        packet::unreachable(ip(OUTSIDE), ip(GUEST), 3, &out.ttl(63).build()[..28])
            .ttl(63)
            .build()
    );
}

#[test]
fn an_error_may_be_the_first_answer() {
    // The port is closed: nothing but the error comes back.
    let world = with_peer();
    let out = udp(at(GUEST, 40_000), at(OUTSIDE, 5000));
    let received = udp(at(OUTSIDE, 40_000), at(OTHER_GUEST, 5000)).ttl(63);
    world.guest_sends(TAP, &out.build());
    let error = packet::unreachable(ip(OTHER_GUEST), ip(OUTSIDE), 3, &received.build()[..28]);
    let exit = world.guest_sends(SECOND_TAP, &error.build());
    assert_eq!(exit.reason, Reason::ErrorTranslated);
    assert_eq!(exit.sent.unwrap().device, TAP.get());
    // So it is to the world.
    let world = World::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    world.world_sends(&udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build());
    let received = udp(at(SERVER, 54), at(GUEST, 40_000)).build();
    let error = packet::unreachable(ip(GUEST), ip(SERVER), 3, &received[..28]);
    let exit = world.guest_sends(TAP, &error.build());
    assert_eq!(exit.reason, Reason::ErrorTranslated);
}

#[test]
fn an_outside_address_without_a_mapping_is_the_hosts() {
    let world = with_peer();
    for packet in [
        udp(at(GUEST, 40_000), at(OUTSIDE, 5001)),
        tcp(at(GUEST, 40_000), at(OUTSIDE, 22), "S"),
        ping(GUEST, OUTSIDE, 7),
    ] {
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, Reason::ForTheHost);
    }
}

#[test]
fn echoes_between_guests() {
    // A guest's identifier is not an address to ping: that is the host.
    let world = with_peer();
    world.guest_sends(SECOND_TAP, &ping(OTHER_GUEST, SERVER, 7).build());
    let exit = world.guest_sends(TAP, &ping(GUEST, OUTSIDE, 7).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
}

#[test]
fn a_guest_without_room_for_sessions_can_still_be_met() {
    let world = with_peer();
    world.set(|settings| settings.guest_max_sessions = 2);
    let probe = udp(at(GUEST, 40_000), at(OUTSIDE, 5000)).build();
    assert_eq!(
        world.guest_sends(TAP, &probe).reason,
        Reason::HairpinStarted
    );
}

#[test]
fn time_to_live_and_size_count_between_guests() {
    let world = with_peer();
    let probe = udp(at(GUEST, 40_000), at(OUTSIDE, 5000));
    let exit = world.guest_sends(TAP, &probe.clone().ttl(1).build());
    assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
    world.set_device(SECOND_TAP, |device| device.mtu = 1000);
    let exit = world.guest_sends(TAP, &probe.payload(&[1; 1200]).dont_fragment().build());
    assert_eq!(exit.reason, Reason::FragmentationNeeded);
}
