//! What the operator denies to guests, and guests that are not who they say.

use tapnat_common::{
    abi::{Filtering, setting_flags},
    nat::Route,
    verdict::Reason,
};
use tapnat_testbed::packet::Builder;

use crate::support::{
    frame::Bytes,
    network::{
        SECOND_TAP, TAP, Version, at, both_families, other_ethertype, ping, pong, source, tcp, udp,
    },
    world::World,
};

fn gateway<A: Version>() -> A {
    A::HOST[0]
}

fn with<A: Version>(flags: u32) -> World<A> {
    let world = World::<A>::new();
    world.set(|settings| settings.flags |= flags);
    world
}

fn denying<A: Version>(prefix: A, length: u8) -> World<A> {
    let world = with::<A>(setting_flags::DENY);
    world.denied.borrow_mut().push((prefix, length));
    world
}

/// The operator changes something.
fn change<A: Version>(world: &World<A>, flags: u32) {
    world.set(|settings| {
        settings.flags = flags;
        settings.generation = settings.generation.wrapping_add(1);
    });
}

fn sends<A: Version>(world: &World<A>, packet: &Builder) -> Reason {
    world.guest_sends(TAP, &packet.build()).reason
}

fn a_denied_destination_is_refused_and_others_are_not<A: Version>() {
    let world = denying(A::SERVER, A::BITS);
    for packet in [
        udp(at(A::GUEST, 5), at(A::SERVER, 53)),
        tcp(at(A::GUEST, 5), at(A::SERVER, 80), "S"),
        tcp(at(A::GUEST, 5), at(A::SERVER, 80), "A"),
        ping(A::GUEST, A::SERVER, 1),
    ] {
        let exit = world.guest_sends(TAP, &packet.build());
        assert_eq!(exit.reason, Reason::DeniedDestination);
        assert!(exit.sent.is_some(), "the guest is told");
    }
    assert_eq!(world.sessions.len(), 0);
    assert_eq!(world.mappings.len(), 0);
    let packet = udp(at(A::GUEST, 5), at(A::OTHER_SERVER, 53));
    assert_eq!(sends(&world, &packet), Reason::SessionStarted);
}
both_families!(a_denied_destination_is_refused_and_others_are_not);

fn what_the_host_would_pass_on_is_denied_too<A: Version>() {
    let container = A::elsewhere(2);
    let packet = udp(at(A::GUEST, 5), at(container, 53));
    for (world, expected) in [
        (World::<A>::new(), Reason::ForTheHost),
        (
            denying(A::elsewhere(0), A::PREFIX),
            Reason::DeniedDestination,
        ),
    ] {
        let routes = &world.routes;
        routes.borrow_mut().insert(container, Route::default());
        assert_eq!(sends(&world, &packet), expected);
    }
    // The gateway is the host.
    let world = denying(A::inside(0, 0), 8);
    let packet = udp(at(A::GUEST, 5), at(gateway::<A>(), 53));
    assert_eq!(sends(&world, &packet), Reason::ForTheHost);
}
both_families!(what_the_host_would_pass_on_is_denied_too);

fn sessions_that_are_denied_later_end_from_both_sides<A: Version>() {
    for from_outside in [false, true] {
        let world = World::<A>::new();
        world.set_filtering(Filtering::EndpointIndependent);
        let out = udp(at(A::GUEST, 5000), at(A::SERVER, 53));
        let outside = source(&world.guest_sends(TAP, &out.build()).forwarded_any());
        let back = udp(at(A::SERVER, 53), outside);
        world.world_sends(&back.build());
        world.denied.borrow_mut().push((A::SERVER, A::BITS));
        change(&world, setting_flags::DENY);
        if from_outside {
            assert_eq!(world.world_sends(&back.build()).reason, Reason::Filtered);
        } else {
            assert_eq!(sends(&world, &out), Reason::DeniedDestination);
        }
        assert_eq!(world.sessions.len(), 0);
        assert_eq!(sends(&world, &out), Reason::DeniedDestination);
        assert_eq!(world.world_sends(&back.build()).reason, Reason::Filtered);
        // Others still find the mapping.
        let other = udp(at(A::OTHER_SERVER, 53), outside);
        assert_eq!(
            world.world_sends(&other.build()).reason,
            Reason::SessionAdmitted
        );
        change(&world, 0);
        assert_eq!(sends(&world, &out), Reason::SessionStarted);
    }
}
both_families!(sessions_that_are_denied_later_end_from_both_sides);

fn isolated_guests_do_not_reach_each_other<A: Version>() {
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    let out = udp(at(A::GUEST, 5000), at(A::SERVER, 53)).build();
    let outside = source(&world.guest_sends(TAP, &out).forwarded_any());
    let hairpin = udp(at(A::OTHER_GUEST, 6000), outside).build();
    let exit = world.guest_sends(SECOND_TAP, &hairpin);
    assert_eq!(exit.reason, Reason::HairpinStarted);
    change(&world, setting_flags::ISOLATE);
    for _ in 0..2 {
        let exit = world.guest_sends(SECOND_TAP, &hairpin);
        assert_eq!(exit.reason, Reason::GuestIsolated);
    }
    // Its own mapping is nobody else's.
    let own = udp(at(A::GUEST, 5001), outside);
    assert_eq!(sends(&world, &own), Reason::HairpinStarted);
    assert_eq!(sends(&world, &own), Reason::Translated);
    let again = world.guest_sends(TAP, &out);
    assert_eq!(again.reason, Reason::Translated);
    change(&world, 0);
    let exit = world.guest_sends(SECOND_TAP, &hairpin);
    assert_eq!(exit.reason, Reason::HairpinStarted);
}
both_families!(isolated_guests_do_not_reach_each_other);

fn guests_reach_each_other_through_the_host_only_if_that_is_allowed<A: Version>() {
    for (flags, expected) in [
        (0, Reason::GuestIsolated),
        (setting_flags::ROUTE_GUESTS, Reason::ForTheHost),
    ] {
        let world = with::<A>(flags);
        for flag in ["S", "SA"] {
            let packet = tcp(at(A::GUEST, 5), at(A::OTHER_GUEST, 22), flag);
            assert_eq!(sends(&world, &packet), expected);
        }
    }
}
both_families!(guests_reach_each_other_through_the_host_only_if_that_is_allowed);

fn who_is_kept_from_the_host_may_answer_it_and_ask_for_an_address<A: Version>() {
    let broadcast = A::DHCP_SERVERS;
    let group = A::MULTICAST;
    let client = at(gateway::<A>(), 999);
    let let_through = [
        (tcp(at(A::GUEST, 22), client, "SA"), Reason::ForTheHost),
        (tcp(at(A::GUEST, 22), client, "A"), Reason::ForTheHost),
        (tcp(at(A::GUEST, 22), client, "R"), Reason::ForTheHost),
        (pong(A::GUEST, gateway::<A>(), 1), Reason::ForTheHost),
        (
            udp(
                at(A::GUEST, A::DHCP_CLIENT),
                at(gateway::<A>(), A::DHCP_SERVER),
            ),
            Reason::ForTheHost,
        ),
        (
            udp(
                at(A::NEWCOMER, A::DHCP_CLIENT),
                at(broadcast, A::DHCP_SERVER),
            ),
            Reason::NotUnicast,
        ),
    ];
    let denied = [
        tcp(at(A::GUEST, 5), at(gateway::<A>(), 22), "S"),
        udp(at(A::GUEST, 5), at(gateway::<A>(), 53)),
        udp(at(A::GUEST, 5), at(broadcast, 53)),
        udp(at(A::GUEST, 5353), at(group, 5353)),
        ping(A::GUEST, gateway::<A>(), 1),
        tcp(at(A::GUEST, 5), at(A::OUTSIDE, 22), "S"),
    ];
    for flags in [0, setting_flags::DENY_HOST] {
        let world = with::<A>(flags);
        for (packet, expected) in &let_through {
            assert_eq!(sends(&world, packet), *expected);
        }
        for packet in &denied {
            let reason = sends(&world, packet);
            assert_eq!(reason == Reason::HostDenied, flags != 0, "{reason:?}");
        }
    }
    // The world is as before.
    let world = with::<A>(setting_flags::DENY_HOST);
    let packet = udp(at(A::GUEST, 5), at(A::SERVER, 53));
    assert_eq!(sends(&world, &packet), Reason::SessionStarted);
}
both_families!(who_is_kept_from_the_host_may_answer_it_and_ask_for_an_address);

fn one_fragment_lets_no_other_datagram_in<A: Version>() {
    let world = with::<A>(setting_flags::DENY_HOST);
    let first = |port| {
        let packet = udp(at(A::GUEST, 5), at(gateway::<A>(), port)).payload(&[0; 64]);
        packet.fragment(0..32)
    };
    assert_eq!(
        world.guest_sends(TAP, &first(A::DHCP_SERVER)).reason,
        Reason::ForTheHost
    );
    // The same identification, but not what was let in.
    assert_eq!(
        world.guest_sends(TAP, &first(53)).reason,
        Reason::HostDenied
    );
}
both_families!(one_fragment_lets_no_other_datagram_in);

/// A frame from this link address.
fn frame(packet: &Builder, last: u8) -> Bytes {
    let packet = packet.clone();
    let frame = packet.ethernet([2, 0, 0, 0, 9, last], [2, 0, 0, 0, 0, 1]);
    Bytes::ethernet(&frame.build())
}

fn other_protocols_are_kept_from_the_host_but_arp<A: Version>() {
    for flags in [0, setting_flags::DENY_HOST] {
        let world = with::<A>(flags);
        for (ethertype, may_pass) in [([8, 6], true), (other_ethertype::<A>(), flags == 0)] {
            let mut bytes = vec![0xff; 12];
            bytes.extend(ethertype);
            bytes.extend([0; 40]);
            let exit = world.run(Some(TAP), Bytes::ethernet(&bytes));
            let expected = if may_pass {
                Reason::NotIp
            } else {
                Reason::HostDenied
            };
            assert_eq!(exit.reason, expected);
            // The uplink's are the host's.
            let exit = world.run(None, Bytes::ethernet(&bytes));
            assert_eq!(exit.reason, Reason::NotIp);
        }
    }
}
both_families!(other_protocols_are_kept_from_the_host_but_arp);

fn an_address_with_sessions_stays_with_its_link_address<A: Version>() {
    let world = World::<A>::new();
    let out = |port| udp(at(A::NEIGHBOUR, port), at(A::SERVER, 53));
    let run = |port, last| world.run(Some(TAP), frame(&out(port), last)).reason;
    assert_eq!(run(1, 7), Reason::SessionStarted);
    assert_eq!(run(2, 7), Reason::SessionStarted);
    assert_eq!(run(3, 8), Reason::SpoofedLinkAddress);
    // Another address of the same guest is fine.
    let other = world.run(
        Some(TAP),
        frame(&udp(at(A::GUEST, 1), at(A::SERVER, 53)), 7),
    );
    assert_eq!(other.reason, Reason::SessionStarted);
    world.set(|settings| settings.flags |= setting_flags::ROAMING);
    assert_eq!(run(3, 8), Reason::SessionStarted);
    world.set(|settings| settings.flags &= !setting_flags::ROAMING);
    assert_eq!(run(4, 7), Reason::SpoofedLinkAddress);
    // When all is over, whoever comes first has it.
    world.wait_seconds(10_000);
    for (key, _) in world.sessions.all() {
        world.act(|| tapnat_common::nat::sweep::session(&key, &world));
    }
    assert_eq!(run(5, 9), Reason::SessionStarted);
}
both_families!(an_address_with_sessions_stays_with_its_link_address);

fn some_destinations_are_reached_untranslated<A: Version>() {
    let world = with::<A>(setting_flags::UNTRANSLATED);
    world.untranslated.borrow_mut().push((A::SERVER, A::BITS));
    let pairs = [
        (
            udp(at(A::GUEST, 5000), at(A::SERVER, 53)),
            udp(at(A::SERVER, 53), at(A::GUEST, 5000)),
        ),
        (
            tcp(at(A::GUEST, 5000), at(A::SERVER, 80), "S"),
            tcp(at(A::SERVER, 80), at(A::GUEST, 5000), "SA"),
        ),
        (
            ping(A::GUEST, A::SERVER, 5000),
            pong(A::SERVER, A::GUEST, 5000),
        ),
    ];
    for (out, back) in &pairs {
        for _ in 0..2 {
            let sent = world.guest_sends(TAP, &out.build()).forwarded_any();
            assert_eq!(sent, out.clone().ttl(63).build());
            let sent = world.world_sends(&back.build()).forwarded_any();
            assert_eq!(sent, back.clone().ttl(63).build());
        }
    }
    assert_eq!((world.sessions.len(), world.mappings.len()), (6, 0));
    // Nobody else gets in that way, and other destinations see no guest.
    let stranger = udp(at(A::SERVER, 54), at(A::GUEST, 5000));
    let exit = world.world_sends(&stranger.build());
    assert_eq!(exit.reason, Reason::NoMapping);
    let other = udp(at(A::GUEST, 5000), at(A::OTHER_SERVER, 53));
    let sent = world.guest_sends(TAP, &other.build()).forwarded_any();
    assert_eq!(source(&sent), at(A::OUTSIDE, 5000));
    // It is kept when something else changes, and ends when it is no longer exempt.
    let (out, back) = &pairs[0];
    change(&world, setting_flags::UNTRANSLATED);
    let exit = world.world_sends(&back.build());
    assert_eq!(exit.reason, Reason::Translated);
    world.untranslated.borrow_mut().clear();
    change(&world, 0);
    let exit = world.world_sends(&back.build());
    assert_eq!(exit.reason, Reason::NoMapping);
    let sent = world.guest_sends(TAP, &out.build()).forwarded_any();
    assert_eq!(source(&sent), at(A::OUTSIDE, 5000));
}
both_families!(some_destinations_are_reached_untranslated);
