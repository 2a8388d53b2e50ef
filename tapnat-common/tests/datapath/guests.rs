//! Where guests' packets go: to the world, to the host, or nowhere.

use std::net::Ipv6Addr;

use tapnat_common::{
    abi::{role, setting_flags},
    nat::{Fate, Route},
    net::{Address as _, Be128},
    verdict::Reason,
};
use tapnat_testbed::packet;

use crate::support::{
    frame::Bytes,
    network::{
        SECOND_TAP, TAP, UPLINK, Version, at, both_families, icmp_error, ip, ping, pong, tcp, udp,
    },
    world::{World, route},
};

fn a_guest_sends_only_as_itself<A: Version>() {
    let world = World::<A>::new();
    let from = |source: A| {
        world
            .guest_sends(TAP, &udp(at(source, 40_000), at(A::SERVER, 53)).build())
            .reason
    };
    let others = [&[A::OTHER_GUEST, A::SERVER, A::OUTSIDE], A::NO_GUESTS];
    let nobody = [A::UNROUTABLE, A::GROUPS];
    for foreign in [others, nobody].concat().concat() {
        assert_eq!(from(foreign), Reason::SpoofedSource, "{foreign:?}");
    }
    assert_eq!(world.sizes(), [0; 5]);
    assert_eq!(from(A::GUEST), Reason::SessionStarted);
}
both_families!(a_guest_sends_only_as_itself);

fn one_guest_may_have_a_device_for_itself_with_the_host_in_no_network_of_its<A: Version>() {
    let world = World::<A>::new();
    world.set_device(TAP, |device| {
        device.address = A::elsewhere(1);
        device.network = A::GUEST;
        device.mask = A::mask(A::BITS);
    });
    let from = |source| {
        world
            .guest_sends(TAP, &udp(at(source, 40_000), at(A::SERVER, 53)).build())
            .reason
    };
    for foreign in [A::NEIGHBOUR, A::HOST[0], A::elsewhere(1), A::elsewhere(2)] {
        assert_eq!(from(foreign), Reason::SpoofedSource, "{foreign:?}");
    }
    assert_eq!(from(A::GUEST), Reason::SessionStarted);
}
both_families!(one_guest_may_have_a_device_for_itself_with_the_host_in_no_network_of_its);

fn a_guest_on_another_device_cannot_use_a_session<A: Version>() {
    let world = World::<A>::new();
    let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    world.guest_sends(TAP, &packet);
    let exit = world.guest_sends(SECOND_TAP, &packet);
    assert_eq!(exit.reason, Reason::SpoofedSource);
    // Not even as the server's answer.
    let forged = udp(at(A::SERVER, 53), at(A::OUTSIDE, 40_000)).build();
    let exit = world.guest_sends(SECOND_TAP, &forged);
    assert_eq!(exit.reason, Reason::SpoofedSource);
}
both_families!(a_guest_on_another_device_cannot_use_a_session);

fn what_is_for_the_host_goes_to_the_host<A: Version>() {
    let world = World::<A>::new();
    let host = A::HOST[0];
    for packet in [
        udp(at(A::GUEST, A::DHCP_CLIENT), at(host, A::DHCP_SERVER)),
        tcp(at(A::GUEST, 40_000), at(host, 22), "S"),
        ping(A::GUEST, host, 1),
        pong(A::GUEST, host, 1),
        // Another of its addresses, and its outside one.
        udp(at(A::GUEST, 40_000), at(A::HOST[1], 53)),
        tcp(at(A::GUEST, 40_000), at(A::OUTSIDE, 22), "S"),
        ping(A::GUEST, A::OUTSIDE, 1),
    ] {
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, Reason::ForTheHost);
    }
    assert_eq!(world.sizes()[..4], [0; 4]);
}
both_families!(what_is_for_the_host_goes_to_the_host);

fn broadcasts_and_multicasts_stay_here<A: Version>() {
    let world = World::<A>::new();
    for destination in A::GROUPS {
        let packet = udp(at(A::GUEST, 5353), at(*destination, 5353));
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, Reason::NotUnicast);
    }
    // Without an address yet, it asks for one.
    let (client, servers) = (
        at(A::NEWCOMER, A::DHCP_CLIENT),
        at(A::DHCP_SERVERS, A::DHCP_SERVER),
    );
    let discover = udp(client, servers);
    let exit = world.guest_sends(TAP, &discover.build());
    assert_eq!(exit.reason, Reason::NotUnicast);
}
both_families!(broadcasts_and_multicasts_stay_here);

fn nor_are_they_sent_in_anothers_name<A: Version>() {
    let world = World::<A>::new();
    for source in [
        A::OTHER_GUEST,
        A::HOST[0],
        A::OUTSIDE,
        A::SERVER,
        A::LOOPBACK,
    ] {
        for destination in A::GROUPS {
            let packet = udp(at(source, 5353), at(*destination, 5353));
            let exit = world.guest_sends(TAP, &packet.build());
            assert_eq!(exit.reason, Reason::SpoofedSource, "{source:?}");
        }
    }
}
both_families!(nor_are_they_sent_in_anothers_name);

#[test]
fn nor_is_what_is_for_the_links_own_addresses() {
    let world = World::<Be128>::new();
    let router: Be128 = "fe80::1".parse::<Ipv6Addr>().unwrap().into();
    for (source, reason) in [
        (Be128::GUEST, Reason::LinkLocal),
        (Be128::SERVER, Reason::SpoofedSource),
        (Be128::UNSPECIFIED, Reason::SpoofedSource),
    ] {
        let packet = udp(at(source, 40_000), at(router, 22));
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, reason, "{source:?}");
    }
}

fn nobody_is_sent_to_addresses_of_nobody<A: Version>() {
    let world = World::<A>::new();
    for destination in A::UNROUTABLE {
        let packet = udp(at(A::GUEST, 40_000), at(*destination, 53));
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(
            exit.reason,
            Reason::UnroutableDestination,
            "{destination:?}"
        );
    }
}
both_families!(nobody_is_sent_to_addresses_of_nobody);

fn only_what_leaves_by_an_uplink_is_translated<A: Version>() {
    let world = World::<A>::new();
    // To another guest by its own address: where that is allowed the host routes, and
    // its firewall decides.
    for (flags, expected) in [
        (0, Reason::GuestIsolated),
        (setting_flags::ROUTE_GUESTS, Reason::ForTheHost),
    ] {
        world.set(|settings| settings.flags = flags);
        for guest in [A::OTHER_GUEST, A::NEIGHBOUR] {
            let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(guest, 53)).build());
            assert_eq!(exit.reason, expected);
        }
    }
    // To a network that the host reaches by a device of its own.
    let beyond = A::elsewhere(1);
    world.routes.borrow_mut().insert(beyond, route(77, 1500));
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(beyond, 53)).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
    // Where there is no route.
    world.routes.borrow_mut().insert(beyond, Route::default());
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(beyond, 53)).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
    // Where forwarding is off.
    let off = Route {
        fate: Fate::Disabled,
        ..Route::default()
    };
    world.routes.borrow_mut().insert(beyond, off);
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(beyond, 53)).build());
    assert_eq!(exit.reason, Reason::ForwardingDisabled);
    assert_eq!(world.sizes()[..4], [0; 4]);
}
both_families!(only_what_leaves_by_an_uplink_is_translated);

fn an_uplink_that_is_none_any_more_is_not_used<A: Version>() {
    let world = World::<A>::new();
    world.set_device(UPLINK, |device| device.role = role::INSIDE);
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::GuestIsolated);
}
both_families!(an_uplink_that_is_none_any_more_is_not_used);

fn what_is_not_carried_is_named<A: Version>() {
    use etherparse::IpNumber;
    let world = World::<A>::new();
    for (packet, reason) in [
        (
            packet::other(ip(A::GUEST), ip(A::SERVER), IpNumber::IGMP).payload(&[0; 8]),
            Reason::ProtocolNotCarried,
        ),
        (
            packet::other(ip(A::GUEST), ip(A::SERVER), IpNumber::IPV6).payload(&[0; 40]),
            Reason::ProtocolNotCarried,
        ),
        // An echo reply that nobody asked for, a redirect, a query without an identifier.
        (pong(A::GUEST, A::SERVER, 1), Reason::IcmpTypeNotCarried),
        (
            icmp_error(A::GUEST, A::SERVER, A::REDIRECT.0, &[0; 28]),
            A::REDIRECT.1,
        ),
        (
            icmp_error(A::GUEST, A::SERVER, A::OTHER_KIND, &[]),
            Reason::IcmpTypeNotCarried,
        ),
    ] {
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, reason);
        assert!(exit.sent.is_none());
    }
    assert_eq!(world.sizes()[..4], [0; 4]);
}
both_families!(what_is_not_carried_is_named);

fn one_guest_may_use_gre_with_one_remote<A: Version>() {
    use etherparse::IpNumber;
    let world = World::<A>::new();
    let gre = |guest| packet::other(ip(guest), ip(A::SERVER), IpNumber::GRE).payload(&[0; 16]);
    let exit = world.guest_sends(TAP, &gre(A::GUEST).build());
    assert_eq!(exit.reason, Reason::SessionStarted);
    // Nothing would tell two apart.
    let exit = world.guest_sends(TAP, &gre(A::NEIGHBOUR).build());
    assert_eq!(exit.reason, Reason::SessionConflict);
    assert_eq!(world.sessions.len(), 2);
    // When the first one is done, the second one may.
    world.wait_seconds(301);
    let exit = world.guest_sends(TAP, &gre(A::NEIGHBOUR).build());
    assert_eq!(exit.reason, Reason::SessionStarted);
}
both_families!(one_guest_may_use_gre_with_one_remote);

fn frames_in_a_vlan_are_left_alone<A: Version>() {
    let world = World::<A>::new();
    let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    world.guest_sends(TAP, &packet);
    let tagged = Bytes {
        tagged: true,
        ..Bytes::raw(&packet)
    };
    let exit = world.run(Some(TAP), tagged);
    assert_eq!(exit.reason, Reason::NotIp, "not even in a session");
}
both_families!(frames_in_a_vlan_are_left_alone);

fn nothing_is_translated_before_there_are_settings<A: Version>() {
    let world = World::<A>::unset();
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::NoMapping);
    let exit = world.world_sends(&udp(at(A::SERVER, 53), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::NoMapping);
}
both_families!(nothing_is_translated_before_there_are_settings);

fn a_device_that_is_not_ours_passes_all<A: Version>() {
    let world = World::<A>::new();
    let stranger = std::num::NonZeroU32::new(99).unwrap();
    let exit = world.guest_sends(
        stranger,
        &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build(),
    );
    assert_eq!(exit.reason, Reason::NoMapping);
}
both_families!(a_device_that_is_not_ours_passes_all);
