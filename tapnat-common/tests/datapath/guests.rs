//! Where guests' packets go: to the world, to the host, or nowhere.

use std::net::Ipv6Addr;

use tapnat_common::{
    abi::{EVERY_DEVICE, MOST_GUESTS, Mapping, mapping_flags, role, setting_flags},
    nat::{
        Fate, Route,
        guests::{self, Entry},
        sweep,
    },
    net::{Address as _, Be128, protocol},
    verdict::Reason,
};
use tapnat_testbed::packet;

use crate::support::{
    frame::Bytes,
    network::{
        SECOND_TAP, TAP, UPLINK, Version, at, both_families, endpoint, icmp_error, ip, ping, pong,
        tcp, udp,
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

fn guests_behind_one_device_leave_room_for_those_behind_others<A: Version>() {
    let world = World::<A>::new();
    let mut sent = 20_000;
    let mut begin = |device, guest| {
        sent += 1;
        let packet = udp(at(guest, sent), at(A::SERVER, 53)).build();
        world.guest_sends(device, &packet).reason
    };
    // All but half.
    world.know_others(TAP, MOST_GUESTS / 2 - 1);
    assert_eq!(begin(TAP, A::GUEST), Reason::SessionStarted);
    assert_eq!(begin(TAP, A::NEIGHBOUR), Reason::DeviceGuestLimit);
    assert_eq!(world.guests.len(), 4096);
    // Whoever is known goes on, and so do others.
    assert_eq!(begin(TAP, A::GUEST), Reason::SessionStarted);
    assert_eq!(begin(SECOND_TAP, A::OTHER_GUEST), Reason::SessionStarted);
    // Nobody comes to those of the device by a forward either, but to those that are known.
    let forward = |port, guest| {
        let outside = endpoint(A::OUTSIDE, port, protocol::UDP);
        let mapping = Mapping {
            inside: endpoint(guest, port, protocol::UDP),
            device: TAP.get(),
            flags: mapping_flags::STATIC,
            ..Mapping::default()
        };
        world.mappings.insert(&outside, &mapping);
        world.inside.insert(&mapping.inside, &outside);
        let packet = udp(at(A::SERVER, 53), at(A::OUTSIDE, port)).build();
        world.world_sends(&packet).reason
    };
    assert_eq!(forward(80, A::GUEST), Reason::SessionAdmitted);
    assert_eq!(forward(81, A::NEIGHBOUR), Reason::DeviceGuestLimit);

    // When one is forgotten another one has its place.
    world.act(|| sweep::guest(A::of_nobody(1), &world));
    assert_eq!(begin(TAP, A::NEIGHBOUR), Reason::SessionStarted);
}
both_families!(guests_behind_one_device_leave_room_for_those_behind_others);

fn a_guest_is_counted_on_the_device_that_it_is_on<A: Version>() {
    let world = World::<A>::new();
    let counts = || [TAP, SECOND_TAP].map(|device| world.guests_on.copy(&device.get()).unwrap());
    let send = |device, port| {
        let packet = udp(at(A::GUEST, port), at(A::SERVER, 53)).build();
        world.guest_sends(device, &packet).reason
    };
    assert_eq!(send(TAP, 40_000), Reason::SessionStarted);
    assert_eq!(counts(), [1, 0]);
    // The guest's address is of the second one's network now.
    world.set_device(SECOND_TAP, |device| {
        device.address = A::HOST[0];
        device.network = A::HOST[0];
    });
    assert_eq!(send(SECOND_TAP, 40_001), Reason::SessionStarted);
    assert_eq!(counts(), [0, 1]);
    // A device that is gone has no count, which is not missed.
    world.guests_on.remove(&SECOND_TAP.get());
    assert_eq!(send(TAP, 40_002), Reason::SessionStarted);
    assert_eq!(world.guests_on.copy(&TAP.get()), Some(1));
    assert_eq!(world.guests_on.copy(&EVERY_DEVICE), Some(1));
}
both_families!(a_guest_is_counted_on_the_device_that_it_is_on);

fn a_count_that_is_wrong_refuses_nobody_for_ever<A: Version>() {
    let world = World::<A>::new();
    // As when CPUs forget the last one that is counted, at once.
    *world.guests_on.get(&TAP.get()).unwrap() = u32::MAX - 2;
    assert_eq!(guests::enter(A::GUEST, TAP.get(), &world), Entry::Done);
    assert_eq!(guests::enter(A::NEIGHBOUR, TAP.get(), &world), Entry::Done);
    assert_eq!(world.guests.len(), 2);
}
both_families!(a_count_that_is_wrong_refuses_nobody_for_ever);
