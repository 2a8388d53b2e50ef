//! Filtering (RFC 4787 section 5): who may send to a mapping, in each mode, and
//! what passes to the host.

use tapnat_common::{
    abi::{Filtering, Mapping, mapping_flags},
    net::protocol,
    verdict::Reason,
};

use crate::support::{
    network::{TAP, Version, at, both_families, destination, endpoint, ping, pong, tcp, udp},
    world::World,
};

use Filtering::{AddressAndPortDependent, AddressDependent, EndpointIndependent};

/// What becomes of datagrams from the remote that the guest sent to, from
/// another port of it, and from another remote.
fn datagrams<A: Version>(filtering: Filtering) -> [Reason; 3] {
    let world = World::<A>::new();
    world.set_filtering(filtering);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    [
        at(A::SERVER, 53),
        at(A::SERVER, 54),
        at(A::OTHER_SERVER, 53),
    ]
    .map(|remote| {
        world
            .world_sends(&udp(remote, at(A::OUTSIDE, 40_000)).build())
            .reason
    })
}

fn each_mode_lets_in_whom_it_says<A: Version>() {
    use Reason::{Filtered, SessionAdmitted, Translated};
    assert_eq!(
        datagrams::<A>(EndpointIndependent),
        [Translated, SessionAdmitted, SessionAdmitted]
    );
    assert_eq!(
        datagrams::<A>(AddressDependent),
        [Translated, SessionAdmitted, Filtered]
    );
    assert_eq!(
        datagrams::<A>(AddressAndPortDependent),
        [Translated, Filtered, Filtered]
    );
}
both_families!(each_mode_lets_in_whom_it_says);

fn guests_do_not_come_from_outside<A: Version>() {
    let world = World::<A>::new();
    world.set_filtering(EndpointIndependent);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    let from = |source| {
        let packet = udp(at(source, 40_000), at(A::OUTSIDE, 40_000)).build();
        world.world_sends(&packet).reason
    };
    assert_eq!(from(A::GUEST), Reason::SpoofedSource);
    assert_eq!(from(A::NEIGHBOUR), Reason::SpoofedSource);
    // Nor does an answer get to a guest on another tap.
    assert_eq!(from(A::OTHER_GUEST), Reason::SessionAdmitted);
    let answer = udp(at(A::GUEST, 40_000), at(A::OTHER_GUEST, 40_000)).build();
    let exit = world.guest_sends(TAP, &answer);
    assert_eq!(exit.reason, Reason::ForTheHost);
    assert!(exit.sent.is_none());
}
both_families!(guests_do_not_come_from_outside);

fn connections_are_filtered_alike_but_silently<A: Version>() {
    use Reason::{SessionAdmitted, UnsolicitedSyn};
    for (filtering, expected) in [
        (EndpointIndependent, [SessionAdmitted, SessionAdmitted]),
        (AddressDependent, [SessionAdmitted, UnsolicitedSyn]),
        (AddressAndPortDependent, [UnsolicitedSyn, UnsolicitedSyn]),
    ] {
        let world = World::<A>::new();
        world.set_filtering(filtering);
        world.guest_sends(
            TAP,
            &tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "S").build(),
        );
        let reasons = [at(A::SERVER, 81), at(A::OTHER_SERVER, 80)].map(|remote| {
            world
                .world_sends(&tcp(remote, at(A::OUTSIDE, 40_000), "S").build())
                .reason
        });
        assert_eq!(reasons, expected, "{filtering:?}");
    }
}
both_families!(connections_are_filtered_alike_but_silently);

fn each_protocol_has_its_own_mode<A: Version>() {
    let world = World::<A>::new();
    world.set(|settings| {
        settings.filtering_tcp = EndpointIndependent as u8;
        settings.filtering_udp = AddressAndPortDependent as u8;
    });
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    world.guest_sends(
        TAP,
        &tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "S").build(),
    );
    let exit = world.world_sends(&udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
    let exit =
        world.world_sends(&tcp(at(A::OTHER_SERVER, 54), at(A::OUTSIDE, 40_000), "S").build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}
both_families!(each_protocol_has_its_own_mode);

fn an_unknown_mode_is_the_strictest<A: Version>() {
    let world = World::<A>::new();
    world.set(|settings| settings.filtering_udp = 77);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    let exit = world.world_sends(&udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
}
both_families!(an_unknown_mode_is_the_strictest);

fn who_is_let_in_reaches_the_guest_and_is_answered<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    let exit = world.world_sends(&udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::SessionAdmitted),
        udp(at(A::SERVER, 54), at(A::GUEST, 40_000)).ttl(63).build()
    );
    let answer = udp(at(A::GUEST, 40_000), at(A::SERVER, 54)).build();
    let sent = world
        .guest_sends(TAP, &answer)
        .forwarded(Reason::Translated);
    assert_eq!(
        sent,
        udp(at(A::OUTSIDE, 40_000), at(A::SERVER, 54))
            .ttl(63)
            .build()
    );
    assert_eq!(world.mappings.len(), 1);
}
both_families!(who_is_let_in_reaches_the_guest_and_is_answered);

fn a_permission_ends_when_the_guest_no_longer_sends<A: Version>() {
    let world = World::<A>::new();
    let to = |remote| udp(at(A::GUEST, 40_000), remote).build();
    world.guest_sends(TAP, &to(at(A::SERVER, 53)));
    world.wait_seconds(200);
    // The mapping lives on by another remote.
    world.guest_sends(TAP, &to(at(A::OTHER_SERVER, 53)));
    world.wait_seconds(200);
    let exit = world.world_sends(&udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
    let exit = world.world_sends(&udp(at(A::OTHER_SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    // Sending again renews it.
    world.guest_sends(TAP, &to(at(A::SERVER, 53)));
    let exit = world.world_sends(&udp(at(A::SERVER, 55), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}
both_families!(a_permission_ends_when_the_guest_no_longer_sends);

fn a_permission_is_renewed_by_a_long_session<A: Version>() {
    let world = World::<A>::new();
    let out = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    for _ in 0..10 {
        world.guest_sends(TAP, &out);
        world.wait_seconds(250);
    }
    let exit = world.world_sends(&udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    // The mapping itself knows one.
    assert_eq!(world.permissions.len(), 0);
}
both_families!(a_permission_is_renewed_by_a_long_session);

fn permissions_of_many_remotes_are_renewed<A: Version>() {
    let world = World::<A>::new();
    let remotes = [A::SERVER, A::OTHER_SERVER, A::world(3)];
    for _ in 0..10 {
        for remote in remotes {
            world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(remote, 53)).build());
        }
        world.wait_seconds(250);
    }
    assert_eq!(world.permissions.len(), 2);
    for remote in remotes {
        let exit = world.world_sends(&udp(at(remote, 54), at(A::OUTSIDE, 40_000)).build());
        assert_eq!(exit.reason, Reason::SessionAdmitted);
    }
}
both_families!(permissions_of_many_remotes_are_renewed);

fn what_comes_from_outside_gives_no_permission<A: Version>() {
    // Only what the guest sends does, or strangers would let each other in.
    let world = World::<A>::new();
    world.set_filtering(EndpointIndependent);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    world.world_sends(&udp(at(A::OTHER_SERVER, 53), at(A::OUTSIDE, 40_000)).build());
    world.set_filtering(AddressDependent);
    let exit = world.world_sends(&udp(at(A::OTHER_SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
}
both_families!(what_comes_from_outside_gives_no_permission);

fn a_forward_lets_in_its_network_for_ever<A: Version>() {
    let world = World::<A>::new();
    let forward = Mapping {
        inside: endpoint(A::GUEST, 80, protocol::TCP),
        device: TAP.get(),
        allowed: A::world(0),
        allowed_length: A::PREFIX,
        flags: mapping_flags::STATIC,
        ..Mapping::default()
    };
    world
        .mappings
        .set(&endpoint(A::OUTSIDE, 8080, protocol::TCP), &forward);
    let syn = |from| tcp(at(from, 5000), at(A::OUTSIDE, 8080), "S").build();
    for _ in 0..3 {
        let exit = world.world_sends(&syn(A::SERVER));
        let received = exit.forwarded(Reason::SessionAdmitted);
        assert_eq!(destination(&received), at(A::GUEST, 80));
        world.wait_seconds(100_000);
    }
    let stranger = A::elsewhere(9);
    assert_eq!(
        world.world_sends(&syn(stranger)).reason,
        Reason::UnsolicitedSyn
    );
}
both_families!(a_forward_lets_in_its_network_for_ever);

fn what_nobody_here_asked_for_is_the_hosts<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    for packet in [
        udp(at(A::SERVER, 53), at(A::OUTSIDE, 40_001)),
        udp(at(A::SERVER, 67), at(A::OUTSIDE, 68)),
        // TCP is not UDP, and another of the host's addresses is not the pool's.
        tcp(at(A::SERVER, 53), at(A::OUTSIDE, 40_000), "A"),
        udp(at(A::SERVER, 53), at(A::uplink(9), 40_000)),
        ping(A::SERVER, A::OUTSIDE, 7),
        ping(A::SERVER, A::OUTSIDE, 0),
        pong(A::SERVER, A::OUTSIDE, 7),
    ] {
        let exit = world.world_sends(&packet.build());
        assert_eq!(exit.reason, Reason::NoMapping, "{packet:?}");
    }
}
both_families!(what_nobody_here_asked_for_is_the_hosts);

fn pings_of_the_host_do_not_use_up_identifiers<A: Version>() {
    let world = World::<A>::new();
    for identifier in 0..2000 {
        world.world_sends(&ping(A::SERVER, A::OUTSIDE, identifier).build());
    }
    assert_eq!(world.sizes(), [0; 5]);
    let sent = world
        .guest_sends(TAP, &ping(A::GUEST, A::SERVER, 7).build())
        .forwarded(Reason::SessionStarted);
    assert_eq!(sent, ping(A::OUTSIDE, A::SERVER, 7).ttl(63).build());
    // The host's own ping is still the host's, with the same identifier.
    let exit = world.world_sends(&ping(A::SERVER, A::OUTSIDE, 7).build());
    assert_eq!(exit.reason, Reason::NoMapping);
}
both_families!(pings_of_the_host_do_not_use_up_identifiers);

fn a_socket_of_the_host_comes_before_a_mapping<A: Version>() {
    // It connected from a port that is a guest's by now.
    let world = World::<A>::new();
    world.set_filtering(EndpointIndependent);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    world.sockets.borrow_mut().push((
        endpoint(A::OUTSIDE, 40_000, protocol::UDP),
        endpoint(A::OTHER_SERVER, 53, protocol::UDP),
    ));
    let from = |remote| {
        world
            .world_sends(&udp(remote, at(A::OUTSIDE, 40_000)).build())
            .reason
    };
    assert_eq!(from(at(A::OTHER_SERVER, 53)), Reason::HostSocket);
    assert_eq!(from(at(A::SERVER, 53)), Reason::Translated);
    assert_eq!(from(at(A::SERVER, 54)), Reason::SessionAdmitted);
}
both_families!(a_socket_of_the_host_comes_before_a_mapping);

fn listeners_of_the_host_are_reached<A: Version>() {
    let world = World::<A>::new();
    let nobody = endpoint(A::UNSPECIFIED, 0, protocol::TCP);
    world
        .sockets
        .borrow_mut()
        .push((endpoint(A::OUTSIDE, 8080, protocol::TCP), nobody));
    let syn = |port| tcp(at(A::SERVER, 5000), at(A::OUTSIDE, port), "S").build();
    assert_eq!(world.world_sends(&syn(8080)).reason, Reason::HostSocket);
    // Ports that are never handed out are the host's to answer for.
    assert_eq!(world.world_sends(&syn(22)).reason, Reason::NoMapping);
    assert_eq!(world.world_sends(&syn(8081)).reason, Reason::UnsolicitedSyn);
    world.set(|settings| {
        settings.flags |= tapnat_common::abi::setting_flags::PASS_UNSOLICITED;
    });
    assert_eq!(world.world_sends(&syn(8081)).reason, Reason::NoMapping);
}
both_families!(listeners_of_the_host_are_reached);
