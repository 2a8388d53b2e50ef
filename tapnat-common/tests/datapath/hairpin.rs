//! Guests that meet over an outside address (RFC 4787 REQ-9, RFC 5382 REQ-8,
//! RFC 5508 REQ-7): seen from each side, the other one is outside.

use tapnat_common::{abi::Filtering, verdict::Reason};
use tapnat_testbed::packet::Builder;

use crate::support::{
    network::{SECOND_TAP, TAP, Version, at, both_families, icmp_error, ping, tcp, udp},
    world::World,
};

/// A guest on the other tap has a mapping that lets everybody in.
fn with_peer<A: Version>() -> World<A> {
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(
        SECOND_TAP,
        &udp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53)).build(),
    );
    world.guest_sends(
        SECOND_TAP,
        &tcp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53), "S").build(),
    );
    world
}

/// From one guest to the other and back, several times.
fn meet<A: Version>(
    world: &World<A>,
    build: impl Fn(std::net::SocketAddr, std::net::SocketAddr) -> Builder,
) {
    for reason in [
        Reason::HairpinStarted,
        Reason::Translated,
        Reason::Translated,
    ] {
        let exit = world.guest_sends(
            TAP,
            &build(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000)).build(),
        );
        assert_eq!(exit.sent.as_ref().unwrap().device, SECOND_TAP.get());
        assert_eq!(
            exit.forwarded(reason),
            build(at(A::OUTSIDE, 40_000), at(A::OTHER_GUEST, 5000))
                .ttl(63)
                .build()
        );
        let answer = build(at(A::OTHER_GUEST, 5000), at(A::OUTSIDE, 40_000));
        let exit = world.guest_sends(SECOND_TAP, &answer.build());
        assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
        assert_eq!(
            exit.forwarded(Reason::Translated),
            build(at(A::OUTSIDE, 5000), at(A::GUEST, 40_000))
                .ttl(63)
                .build()
        );
    }
}

fn datagrams_between_guests<A: Version>() {
    let world = with_peer::<A>();
    meet(&world, udp);
    // One session, of both guests and on both mappings: the audit has seen it.
    assert_eq!(world.sessions.len(), 6);
}
both_families!(datagrams_between_guests);

fn a_session_between_guests_keeps_the_mappings_of_both<A: Version>() {
    let world = with_peer::<A>();
    let call = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000)).build();
    for _ in 0..5 {
        world.guest_sends(TAP, &call).forwarded_any();
        world.wait_seconds(250);
    }
    let third = udp(at(A::SERVER, 77), at(A::OUTSIDE, 5000)).build();
    assert_eq!(world.world_sends(&third).reason, Reason::SessionAdmitted);
}
both_families!(a_session_between_guests_keeps_the_mappings_of_both);

fn connections_between_guests<A: Version>() {
    let world = with_peer::<A>();
    let syn = tcp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000), "S").build();
    assert_eq!(world.guest_sends(TAP, &syn).reason, Reason::HairpinStarted);
    let answer = tcp(at(A::OTHER_GUEST, 5000), at(A::OUTSIDE, 40_000), "SA").build();
    assert_eq!(
        world
            .guest_sends(SECOND_TAP, &answer)
            .forwarded(Reason::Translated),
        tcp(at(A::OUTSIDE, 5000), at(A::GUEST, 40_000), "SA")
            .ttl(63)
            .build()
    );
    for _ in 0..2 {
        let data = tcp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000), "PA").build();
        assert_eq!(world.guest_sends(TAP, &data).reason, Reason::Translated);
        let data = tcp(at(A::OTHER_GUEST, 5000), at(A::OUTSIDE, 40_000), "PA").build();
        let exit = world.guest_sends(SECOND_TAP, &data);
        assert_eq!(exit.reason, Reason::Translated);
    }
}
both_families!(connections_between_guests);

fn guests_of_one_device_meet_there<A: Version>() {
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &udp(at(A::NEIGHBOUR, 5000), at(A::SERVER, 53)).build());
    let exit = world.guest_sends(
        TAP,
        &udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000)).build(),
    );
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::HairpinStarted),
        udp(at(A::OUTSIDE, 40_000), at(A::NEIGHBOUR, 5000))
            .ttl(63)
            .build()
    );
    let answer = udp(at(A::NEIGHBOUR, 5000), at(A::OUTSIDE, 40_000)).build();
    assert_eq!(
        world
            .guest_sends(TAP, &answer)
            .forwarded(Reason::Translated),
        udp(at(A::OUTSIDE, 5000), at(A::GUEST, 40_000))
            .ttl(63)
            .build()
    );
}
both_families!(guests_of_one_device_meet_there);

fn a_guest_meets_itself<A: Version>() {
    // As a STUN client finds out whether its NAT hairpins: from another socket.
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    let probe = udp(at(A::GUEST, 40_001), at(A::OUTSIDE, 40_000)).build();
    let exit = world.guest_sends(TAP, &probe);
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::HairpinStarted),
        udp(at(A::OUTSIDE, 40_001), at(A::GUEST, 40_000))
            .ttl(63)
            .build()
    );
    // And from the same one.
    let own = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 40_000)).build();
    for reason in [Reason::HairpinStarted, Reason::Translated] {
        assert_eq!(
            world.guest_sends(TAP, &own).forwarded(reason),
            udp(at(A::OUTSIDE, 40_000), at(A::GUEST, 40_000))
                .ttl(63)
                .build()
        );
    }
    // Until all of it is over.
    world.wait_seconds(1000);
    assert_eq!(world.guest_sends(TAP, &own).reason, Reason::ForTheHost);
}
both_families!(a_guest_meets_itself);

fn filters_hold_between_guests_too<A: Version>() {
    for filtering in [
        Filtering::AddressDependent,
        Filtering::AddressAndPortDependent,
    ] {
        let world = with_peer::<A>();
        world.set_filtering(filtering);
        let probe = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000)).build();
        assert_eq!(world.guest_sends(TAP, &probe).reason, Reason::Filtered);
        // From another port than the one that was sent to.
        let by_port = filtering == Filtering::AddressAndPortDependent;
        let other = udp(at(A::OTHER_GUEST, 5001), at(A::OUTSIDE, 40_000)).build();
        let admitted = world.guest_sends(SECOND_TAP, &other).reason == Reason::HairpinStarted;
        assert_eq!(admitted, !by_port);
        // Having sent to the outside address, it lets the other one in.
        let punch = udp(at(A::OTHER_GUEST, 5000), at(A::OUTSIDE, 40_000)).build();
        let exit = world.guest_sends(SECOND_TAP, &punch);
        assert_eq!(exit.reason, Reason::HairpinStarted);
        assert_eq!(world.guest_sends(TAP, &probe).reason, Reason::Translated);
    }
}
both_families!(filters_hold_between_guests_too);

fn errors_between_guests_are_translated_twice<A: Version>() {
    let world = with_peer::<A>();
    let out = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000));
    let received = udp(at(A::OUTSIDE, 40_000), at(A::OTHER_GUEST, 5000)).ttl(63);
    world.guest_sends(TAP, &out.build());
    // A packet back first, so that the way is known.
    let answer = udp(at(A::OTHER_GUEST, 5000), at(A::OUTSIDE, 40_000));
    world.guest_sends(SECOND_TAP, &answer.build());
    let error = icmp_error(
        A::OTHER_GUEST,
        A::OUTSIDE,
        A::PORT_UNREACHABLE,
        &received.build()[..A::HEADER + 8],
    );
    let exit = world.guest_sends(SECOND_TAP, &error.build());
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::ErrorTranslated),
        icmp_error(
            A::OUTSIDE,
            A::GUEST,
            A::PORT_UNREACHABLE,
            &out.ttl(63).build()[..A::HEADER + 8]
        )
        .ttl(63)
        .build()
    );
}
both_families!(errors_between_guests_are_translated_twice);

fn an_error_may_be_the_first_answer<A: Version>() {
    // The port is closed: nothing but the error comes back.
    let world = with_peer::<A>();
    let out = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000));
    let received = udp(at(A::OUTSIDE, 40_000), at(A::OTHER_GUEST, 5000)).ttl(63);
    world.guest_sends(TAP, &out.build());
    let error = icmp_error(
        A::OTHER_GUEST,
        A::OUTSIDE,
        A::PORT_UNREACHABLE,
        &received.build()[..A::HEADER + 8],
    );
    let exit = world.guest_sends(SECOND_TAP, &error.build());
    assert_eq!(exit.reason, Reason::ErrorTranslated);
    assert_eq!(exit.sent.unwrap().device, TAP.get());
    // So it is to the world.
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    world.world_sends(&udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    let received = udp(at(A::SERVER, 54), at(A::GUEST, 40_000)).build();
    let error = icmp_error(
        A::GUEST,
        A::SERVER,
        A::PORT_UNREACHABLE,
        &received[..A::HEADER + 8],
    );
    let exit = world.guest_sends(TAP, &error.build());
    assert_eq!(exit.reason, Reason::ErrorTranslated);
}
both_families!(an_error_may_be_the_first_answer);

fn an_outside_address_without_a_mapping_is_the_hosts<A: Version>() {
    let world = with_peer::<A>();
    for packet in [
        udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5001)),
        tcp(at(A::GUEST, 40_000), at(A::OUTSIDE, 22), "S"),
        ping(A::GUEST, A::OUTSIDE, 7),
    ] {
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, Reason::ForTheHost);
    }
}
both_families!(an_outside_address_without_a_mapping_is_the_hosts);

fn echoes_between_guests<A: Version>() {
    // A guest's identifier is not an address to ping: that is the host.
    let world = with_peer::<A>();
    world.guest_sends(SECOND_TAP, &ping(A::OTHER_GUEST, A::SERVER, 7).build());
    let exit = world.guest_sends(TAP, &ping(A::GUEST, A::OUTSIDE, 7).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
}
both_families!(echoes_between_guests);

fn a_guest_without_room_for_sessions_can_still_be_met<A: Version>() {
    let world = with_peer::<A>();
    world.set(|settings| settings.guest_max_sessions = 2);
    let probe = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000)).build();
    assert_eq!(
        world.guest_sends(TAP, &probe).reason,
        Reason::HairpinStarted
    );
}
both_families!(a_guest_without_room_for_sessions_can_still_be_met);

fn time_to_live_and_size_count_between_guests<A: Version>() {
    let world = with_peer::<A>();
    let probe = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000));
    let exit = world.guest_sends(TAP, &probe.clone().ttl(1).build());
    assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
    world.set_device(SECOND_TAP, |device| device.mtu = 1000);
    let exit = world.guest_sends(TAP, &probe.payload(&[1; 1200]).dont_fragment().build());
    assert_eq!(exit.reason, Reason::FragmentationNeeded);
}
both_families!(time_to_live_and_size_count_between_guests);
