//! Filtering (RFC 4787 section 5): who may send to a mapping, in each mode, and
//! what passes to the host.

use std::net::Ipv4Addr;

use tapnat_common::{
    abi::{Filtering, Mapping, mapping_flags},
    net::{Be32, protocol},
    verdict::Reason,
};

use crate::support::{
    network::{
        GUEST, NEIGHBOUR, OTHER_GUEST, OTHER_SERVER, OUTSIDE, SERVER, TAP, at, destination,
        endpoint, ping, pong, tcp, udp,
    },
    world::World,
};

use Filtering::{AddressAndPortDependent, AddressDependent, EndpointIndependent};

/// What becomes of datagrams from the remote that the guest sent to, from
/// another port of it, and from another remote.
fn datagrams(filtering: Filtering) -> [Reason; 3] {
    let world = World::new();
    world.set_filtering(filtering);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    [at(SERVER, 53), at(SERVER, 54), at(OTHER_SERVER, 53)].map(|remote| {
        world
            .world_sends(&udp(remote, at(OUTSIDE, 40_000)).build())
            .reason
    })
}

#[test]
fn each_mode_lets_in_whom_it_says() {
    use Reason::{Filtered, SessionAdmitted, Translated};
    assert_eq!(
        datagrams(EndpointIndependent),
        [Translated, SessionAdmitted, SessionAdmitted]
    );
    assert_eq!(
        datagrams(AddressDependent),
        [Translated, SessionAdmitted, Filtered]
    );
    assert_eq!(
        datagrams(AddressAndPortDependent),
        [Translated, Filtered, Filtered]
    );
}

#[test]
fn guests_do_not_come_from_outside() {
    let world = World::new();
    world.set_filtering(EndpointIndependent);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    let from = |source| {
        let packet = udp(at(source, 40_000), at(OUTSIDE, 40_000)).build();
        world.world_sends(&packet).reason
    };
    assert_eq!(from(GUEST), Reason::SpoofedSource);
    assert_eq!(from(NEIGHBOUR), Reason::SpoofedSource);
    // Nor does an answer get to a guest on another tap.
    assert_eq!(from(OTHER_GUEST), Reason::SessionAdmitted);
    let answer = udp(at(GUEST, 40_000), at(OTHER_GUEST, 40_000)).build();
    let exit = world.guest_sends(TAP, &answer);
    assert_eq!(exit.reason, Reason::ForTheHost);
    assert!(exit.sent.is_none());
}

#[test]
fn connections_are_filtered_alike_but_silently() {
    use Reason::{SessionAdmitted, UnsolicitedSyn};
    for (filtering, expected) in [
        (EndpointIndependent, [SessionAdmitted, SessionAdmitted]),
        (AddressDependent, [SessionAdmitted, UnsolicitedSyn]),
        (AddressAndPortDependent, [UnsolicitedSyn, UnsolicitedSyn]),
    ] {
        let world = World::new();
        world.set_filtering(filtering);
        world.guest_sends(TAP, &tcp(at(GUEST, 40_000), at(SERVER, 80), "S").build());
        let reasons = [at(SERVER, 81), at(OTHER_SERVER, 80)].map(|remote| {
            world
                .world_sends(&tcp(remote, at(OUTSIDE, 40_000), "S").build())
                .reason
        });
        assert_eq!(reasons, expected, "{filtering:?}");
    }
}

#[test]
fn each_protocol_has_its_own_mode() {
    let world = World::new();
    world.set(|settings| {
        settings.filtering_tcp = EndpointIndependent as u8;
        settings.filtering_udp = AddressAndPortDependent as u8;
    });
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    world.guest_sends(TAP, &tcp(at(GUEST, 40_000), at(SERVER, 80), "S").build());
    let exit = world.world_sends(&udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
    let exit = world.world_sends(&tcp(at(OTHER_SERVER, 54), at(OUTSIDE, 40_000), "S").build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}

#[test]
fn an_unknown_mode_is_the_strictest() {
    let world = World::new();
    world.set(|settings| settings.filtering_udp = 77);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    let exit = world.world_sends(&udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
}

#[test]
fn who_is_let_in_reaches_the_guest_and_is_answered() {
    let world = World::new();
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    let exit = world.world_sends(&udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.sent.as_ref().unwrap().device, TAP.get());
    assert_eq!(
        exit.forwarded(Reason::SessionAdmitted),
        udp(at(SERVER, 54), at(GUEST, 40_000)).ttl(63).build()
    );
    let answer = udp(at(GUEST, 40_000), at(SERVER, 54)).build();
    let sent = world
        .guest_sends(TAP, &answer)
        .forwarded(Reason::Translated);
    assert_eq!(
        sent,
        udp(at(OUTSIDE, 40_000), at(SERVER, 54)).ttl(63).build()
    );
    assert_eq!(world.mappings.len(), 1);
}

#[test]
fn a_permission_ends_when_the_guest_no_longer_sends() {
    let world = World::new();
    let to = |remote| udp(at(GUEST, 40_000), remote).build();
    world.guest_sends(TAP, &to(at(SERVER, 53)));
    world.wait_seconds(200);
    // The mapping lives on by another remote.
    world.guest_sends(TAP, &to(at(OTHER_SERVER, 53)));
    world.wait_seconds(200);
    let exit = world.world_sends(&udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
    let exit = world.world_sends(&udp(at(OTHER_SERVER, 54), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    // Sending again renews it.
    world.guest_sends(TAP, &to(at(SERVER, 53)));
    let exit = world.world_sends(&udp(at(SERVER, 55), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}

#[test]
fn a_permission_is_renewed_by_a_long_session() {
    let world = World::new();
    let out = udp(at(GUEST, 40_000), at(SERVER, 53)).build();
    for _ in 0..10 {
        world.guest_sends(TAP, &out);
        world.wait_seconds(250);
    }
    let exit = world.world_sends(&udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    // The mapping itself knows one.
    assert_eq!(world.permissions.len(), 0);
}

#[test]
fn permissions_of_many_remotes_are_renewed() {
    let world = World::new();
    let remotes = [SERVER, OTHER_SERVER, Ipv4Addr::new(203, 0, 113, 3)];
    for _ in 0..10 {
        for remote in remotes {
            world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(remote, 53)).build());
        }
        world.wait_seconds(250);
    }
    assert_eq!(world.permissions.len(), 2);
    for remote in remotes {
        let exit = world.world_sends(&udp(at(remote, 54), at(OUTSIDE, 40_000)).build());
        assert_eq!(exit.reason, Reason::SessionAdmitted);
    }
}

#[test]
fn what_comes_from_outside_gives_no_permission() {
    // Only what the guest sends does, or strangers would let each other in.
    let world = World::new();
    world.set_filtering(EndpointIndependent);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    world.world_sends(&udp(at(OTHER_SERVER, 53), at(OUTSIDE, 40_000)).build());
    world.set_filtering(AddressDependent);
    let exit = world.world_sends(&udp(at(OTHER_SERVER, 54), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::Filtered);
}

#[test]
fn a_forward_lets_in_its_network_for_ever() {
    let world = World::new();
    let forward = Mapping {
        inside: endpoint(GUEST, 80, protocol::TCP),
        device: TAP.get(),
        allowed: Be32::from_bytes([203, 0, 113, 0]),
        allowed_length: 24,
        flags: mapping_flags::STATIC,
        ..Mapping::default()
    };
    world
        .mappings
        .set(&endpoint(OUTSIDE, 8080, protocol::TCP), &forward);
    let syn = |from| tcp(at(from, 5000), at(OUTSIDE, 8080), "S").build();
    for _ in 0..3 {
        let exit = world.world_sends(&syn(SERVER));
        let received = exit.forwarded(Reason::SessionAdmitted);
        assert_eq!(destination(&received), at(GUEST, 80));
        world.wait_seconds(100_000);
    }
    let stranger = Ipv4Addr::new(192, 0, 2, 9);
    assert_eq!(
        world.world_sends(&syn(stranger)).reason,
        Reason::UnsolicitedSyn
    );
}

#[test]
fn what_nobody_here_asked_for_is_the_hosts() {
    let world = World::new();
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    for packet in [
        udp(at(SERVER, 53), at(OUTSIDE, 40_001)),
        udp(at(SERVER, 67), at(OUTSIDE, 68)),
        // TCP is not UDP, and another of the host's addresses is not the pool's.
        tcp(at(SERVER, 53), at(OUTSIDE, 40_000), "A"),
        udp(at(SERVER, 53), at(Ipv4Addr::new(198, 51, 100, 9), 40_000)),
        ping(SERVER, OUTSIDE, 7),
        ping(SERVER, OUTSIDE, 0),
        pong(SERVER, OUTSIDE, 7),
    ] {
        let exit = world.world_sends(&packet.build());
        assert_eq!(exit.reason, Reason::NoMapping, "{packet:?}");
    }
}

#[test]
fn pings_of_the_host_do_not_use_up_identifiers() {
    let world = World::new();
    for identifier in 0..2000 {
        world.world_sends(&ping(SERVER, OUTSIDE, identifier).build());
    }
    assert_eq!(world.sizes(), [0; 5]);
    let sent = world
        .guest_sends(TAP, &ping(GUEST, SERVER, 7).build())
        .forwarded(Reason::SessionStarted);
    assert_eq!(sent, ping(OUTSIDE, SERVER, 7).ttl(63).build());
    // The host's own ping is still the host's, with the same identifier.
    let exit = world.world_sends(&ping(SERVER, OUTSIDE, 7).build());
    assert_eq!(exit.reason, Reason::NoMapping);
}

#[test]
fn a_socket_of_the_host_comes_before_a_mapping() {
    // It connected from a port that is a guest's by now.
    let world = World::new();
    world.set_filtering(EndpointIndependent);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    world.sockets.borrow_mut().push((
        endpoint(OUTSIDE, 40_000, protocol::UDP),
        endpoint(OTHER_SERVER, 53, protocol::UDP),
    ));
    let from = |remote| {
        world
            .world_sends(&udp(remote, at(OUTSIDE, 40_000)).build())
            .reason
    };
    assert_eq!(from(at(OTHER_SERVER, 53)), Reason::HostSocket);
    assert_eq!(from(at(SERVER, 53)), Reason::Translated);
    assert_eq!(from(at(SERVER, 54)), Reason::SessionAdmitted);
}

#[test]
fn listeners_of_the_host_are_reached() {
    let world = World::new();
    let nobody = endpoint(Ipv4Addr::UNSPECIFIED, 0, protocol::TCP);
    world
        .sockets
        .borrow_mut()
        .push((endpoint(OUTSIDE, 8080, protocol::TCP), nobody));
    let syn = |port| tcp(at(SERVER, 5000), at(OUTSIDE, port), "S").build();
    assert_eq!(world.world_sends(&syn(8080)).reason, Reason::HostSocket);
    // Ports that are never handed out are the host's to answer for.
    assert_eq!(world.world_sends(&syn(22)).reason, Reason::NoMapping);
    assert_eq!(world.world_sends(&syn(8081)).reason, Reason::UnsolicitedSyn);
    world.set(|settings| {
        settings.flags |= tapnat_common::abi::setting_flags::PASS_UNSOLICITED;
    });
    assert_eq!(world.world_sends(&syn(8081)).reason, Reason::NoMapping);
}
