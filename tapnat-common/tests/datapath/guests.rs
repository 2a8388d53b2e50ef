//! Where guests' packets go: to the world, to the host, or nowhere.

use std::net::Ipv4Addr;

use tapnat_common::{
    abi::{role, setting_flags},
    nat::{Fate, Route},
    net::Be32,
    verdict::Reason,
};
use tapnat_testbed::packet;

use crate::support::{
    frame::Bytes,
    network::{
        GUEST, HOST, NEIGHBOUR, OTHER_GUEST, OUTSIDE, SECOND_TAP, SERVER, TAP, UPLINK, at, ip,
        ping, pong, tcp, udp,
    },
    world::{World, route},
};

#[test]
fn a_guest_sends_only_as_itself() {
    let world = World::new();
    let from = |source: Ipv4Addr| {
        world
            .guest_sends(TAP, &udp(at(source, 40_000), at(SERVER, 53)).build())
            .reason
    };
    for foreign in [
        OTHER_GUEST,
        SERVER,
        OUTSIDE,
        // The host's own address on the tap.
        HOST[0].into(),
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::BROADCAST,
        Ipv4Addr::new(224, 0, 0, 1),
        // The network itself, and its broadcast address.
        Ipv4Addr::new(10, 0, 0, 0),
        Ipv4Addr::new(10, 0, 0, 255),
    ] {
        assert_eq!(from(foreign), Reason::SpoofedSource, "{foreign}");
    }
    assert_eq!(world.sizes(), [0; 5]);
    assert_eq!(from(GUEST), Reason::SessionStarted);
}

#[test]
fn one_guest_may_have_a_device_for_itself_with_the_host_in_no_network_of_its() {
    let world = World::new();
    world.set_device(TAP, |device| {
        device.address = Ipv4Addr::new(169, 254, 1, 1).into();
        device.network = GUEST.into();
        device.mask = Be32::mask(32);
    });
    let from = |source| {
        world
            .guest_sends(TAP, &udp(at(source, 40_000), at(SERVER, 53)).build())
            .reason
    };
    for foreign in [
        NEIGHBOUR,
        HOST[0].into(),
        Ipv4Addr::new(169, 254, 1, 1),
        Ipv4Addr::new(169, 254, 1, 2),
    ] {
        assert_eq!(from(foreign), Reason::SpoofedSource, "{foreign}");
    }
    assert_eq!(from(GUEST), Reason::SessionStarted);
}

#[test]
fn a_guest_on_another_device_cannot_use_a_session() {
    let world = World::new();
    let packet = udp(at(GUEST, 40_000), at(SERVER, 53)).build();
    world.guest_sends(TAP, &packet);
    let exit = world.guest_sends(SECOND_TAP, &packet);
    assert_eq!(exit.reason, Reason::SpoofedSource);
    // Not even as the server's answer.
    let forged = udp(at(SERVER, 53), at(OUTSIDE, 40_000)).build();
    let exit = world.guest_sends(SECOND_TAP, &forged);
    assert_eq!(exit.reason, Reason::SpoofedSource);
}

#[test]
fn what_is_for_the_host_goes_to_the_host() {
    let world = World::new();
    let host = HOST[0].into();
    for packet in [
        udp(at(GUEST, 68), at(host, 67)),
        tcp(at(GUEST, 40_000), at(host, 22), "S"),
        ping(GUEST, host, 1),
        pong(GUEST, host, 1),
        // Another of its addresses, and its outside one.
        udp(at(GUEST, 40_000), at(HOST[1].into(), 53)),
        tcp(at(GUEST, 40_000), at(OUTSIDE, 22), "S"),
        ping(GUEST, OUTSIDE, 1),
    ] {
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, Reason::ForTheHost);
    }
    assert_eq!(world.sizes()[..4], [0; 4]);
}

#[test]
fn broadcasts_and_multicasts_stay_here() {
    let world = World::new();
    for destination in [
        Ipv4Addr::BROADCAST,
        Ipv4Addr::new(224, 0, 0, 251),
        Ipv4Addr::new(239, 255, 255, 250),
    ] {
        let exit = world.guest_sends(TAP, &udp(at(GUEST, 5353), at(destination, 5353)).build());
        assert_eq!(exit.reason, Reason::NotUnicast);
    }
    // Without an address yet, it asks for one.
    let discover = udp(at(Ipv4Addr::UNSPECIFIED, 68), at(Ipv4Addr::BROADCAST, 67));
    let exit = world.guest_sends(TAP, &discover.build());
    assert_eq!(exit.reason, Reason::NotUnicast);
}

#[test]
fn nobody_is_sent_to_addresses_of_nobody() {
    let world = World::new();
    for destination in [
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::new(0, 1, 2, 3),
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::new(127, 9, 9, 9),
        Ipv4Addr::new(240, 0, 0, 1),
        Ipv4Addr::new(255, 255, 255, 254),
    ] {
        let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(destination, 53)).build());
        assert_eq!(exit.reason, Reason::UnroutableDestination, "{destination}");
    }
}

#[test]
fn only_what_leaves_by_an_uplink_is_translated() {
    let world = World::new();
    // To another guest by its own address: where that is allowed the host routes, and
    // its firewall decides.
    for (flags, expected) in [
        (0, Reason::GuestIsolated),
        (setting_flags::ROUTE_GUESTS, Reason::ForTheHost),
    ] {
        world.set(|settings| settings.flags = flags);
        for guest in [OTHER_GUEST, NEIGHBOUR] {
            let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(guest, 53)).build());
            assert_eq!(exit.reason, expected);
        }
    }
    // To a network that the host reaches by a device of its own.
    let beyond = Ipv4Addr::new(172, 16, 0, 1);
    world
        .routes
        .borrow_mut()
        .insert(beyond.into(), route(77, 1500));
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(beyond, 53)).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
    // Where there is no route.
    world
        .routes
        .borrow_mut()
        .insert(beyond.into(), Route::default());
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(beyond, 53)).build());
    assert_eq!(exit.reason, Reason::ForTheHost);
    // Where forwarding is off.
    let off = Route {
        fate: Fate::Disabled,
        ..Route::default()
    };
    world.routes.borrow_mut().insert(beyond.into(), off);
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(beyond, 53)).build());
    assert_eq!(exit.reason, Reason::ForwardingDisabled);
    assert_eq!(world.sizes()[..4], [0; 4]);
}

#[test]
fn an_uplink_that_is_none_any_more_is_not_used() {
    let world = World::new();
    world.set_device(UPLINK, |device| device.role = role::INSIDE);
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::GuestIsolated);
}

#[test]
fn what_is_not_carried_is_named() {
    use etherparse::IpNumber;
    let world = World::new();
    for (packet, reason) in [
        (
            packet::other(ip(GUEST), ip(SERVER), IpNumber::IGMP).payload(&[0; 8]),
            Reason::ProtocolNotCarried,
        ),
        (
            packet::other(ip(GUEST), ip(SERVER), IpNumber::IPV6).payload(&[0; 40]),
            Reason::ProtocolNotCarried,
        ),
        // An echo reply that nobody asked for, a redirect, an address mask.
        (pong(GUEST, SERVER, 1), Reason::IcmpTypeNotCarried),
        (
            packet::icmp_error(ip(GUEST), ip(SERVER), (5, 1), [0; 4], &[0; 28]),
            Reason::IcmpTypeNotCarried,
        ),
        (
            packet::icmp_error(ip(GUEST), ip(SERVER), (17, 0), [0; 4], &[]),
            Reason::IcmpTypeNotCarried,
        ),
    ] {
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, reason);
        assert!(exit.sent.is_none());
    }
    assert_eq!(world.sizes()[..4], [0; 4]);
}

#[test]
fn one_guest_may_use_gre_with_one_remote() {
    use etherparse::IpNumber;
    let world = World::new();
    let gre = |guest| packet::other(ip(guest), ip(SERVER), IpNumber::GRE).payload(&[0; 16]);
    let exit = world.guest_sends(TAP, &gre(GUEST).build());
    assert_eq!(exit.reason, Reason::SessionStarted);
    // Nothing would tell two apart.
    let exit = world.guest_sends(TAP, &gre(NEIGHBOUR).build());
    assert_eq!(exit.reason, Reason::SessionConflict);
    assert_eq!(world.sessions.len(), 2);
    // When the first one is done, the second one may.
    world.wait_seconds(301);
    let exit = world.guest_sends(TAP, &gre(NEIGHBOUR).build());
    assert_eq!(exit.reason, Reason::SessionStarted);
}

#[test]
fn frames_in_a_vlan_are_left_alone() {
    let world = World::new();
    let packet = udp(at(GUEST, 40_000), at(SERVER, 53)).build();
    world.guest_sends(TAP, &packet);
    let tagged = Bytes {
        tagged: true,
        ..Bytes::raw(&packet)
    };
    let exit = world.run(Some(TAP), tagged);
    assert_eq!(exit.reason, Reason::NotIp, "not even in a session");
}

#[test]
fn nothing_is_translated_before_there_are_settings() {
    let world = World::unset();
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::NoMapping);
    let exit = world.world_sends(&udp(at(SERVER, 53), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::NoMapping);
}

#[test]
fn a_device_that_is_not_ours_passes_all() {
    let world = World::new();
    let stranger = std::num::NonZeroU32::new(99).unwrap();
    let exit = world.guest_sends(stranger, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::NoMapping);
}
