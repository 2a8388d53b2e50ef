//! How long sessions and mappings live, what keeps them, and that their end
//! needs no sweep.

use tapnat_common::{
    abi::{EndpointKey, Filtering, Mapping},
    nat::{STAMP_AFTER, Tables as _, session},
    net::protocol,
    time::Ticks,
    verdict::Reason,
};

use crate::support::{
    network::{TAP, Version, at, both_families, destination, endpoint, ping, pong, source, udp},
    world::{World, route},
};

fn out<A: Version>() -> Vec<u8> {
    udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build()
}

fn back<A: Version>() -> Vec<u8> {
    udp(at(A::SERVER, 53), at(A::OUTSIDE, 40_000)).build()
}

fn mapping<A: Version>(world: &World<A>) -> Option<Mapping<A>> {
    world
        .mappings
        .copy(&endpoint(A::OUTSIDE, 40_000, protocol::UDP))
}

fn mapping_lives<A: Version>(world: &World<A>) -> bool {
    mapping(world).is_some_and(|mapping| world.now().is_before(mapping.expires_at))
}

fn a_datagram_keeps_its_session_for_five_minutes<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    world.wait_seconds(300);
    assert!(mapping_lives(&world));
    assert_eq!(world.world_sends(&back::<A>()).reason, Reason::Translated);
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    world.wait_seconds(301);
    assert_eq!(world.world_sends(&back::<A>()).reason, Reason::NoMapping);
    assert!(!mapping_lives(&world));
    assert_eq!(world.sessions.len(), 0);
}
both_families!(a_datagram_keeps_its_session_for_five_minutes);

fn what_the_guest_sends_refreshes<A: Version>() {
    let world = World::<A>::new();
    for _ in 0..10 {
        let exit = world.guest_sends(TAP, &out::<A>());
        assert_eq!(source(&exit.forwarded_any()), at(A::OUTSIDE, 40_000));
        world.wait_seconds(299);
        assert!(mapping_lives(&world));
    }
    assert_eq!(world.mappings.len(), 1);
    assert_eq!(world.world_sends(&back::<A>()).reason, Reason::Translated);
}
both_families!(what_the_guest_sends_refreshes);

fn what_the_world_sends_refreshes_only_if_asked<A: Version>() {
    let run = |refresh| {
        let world = World::<A>::new();
        if refresh {
            world.set_inbound_refresh();
        }
        world.guest_sends(TAP, &out::<A>());
        for _ in 0..4 {
            world.wait_seconds(100);
            world.world_sends(&back::<A>());
        }
        let reason = world.world_sends(&back::<A>()).reason;
        (reason, mapping_lives(&world))
    };
    assert_eq!(run(false), (Reason::NoMapping, false));
    assert_eq!(run(true), (Reason::Translated, true));
}
both_families!(what_the_world_sends_refreshes_only_if_asked);

fn queries_of_icmp_live_a_minute<A: Version>() {
    let world = World::<A>::new();
    let request = ping(A::GUEST, A::SERVER, 7).build();
    let reply = pong(A::SERVER, A::OUTSIDE, 7).build();
    world.guest_sends(TAP, &request);
    world.wait_seconds(60);
    assert_eq!(world.world_sends(&reply).reason, Reason::Translated);
    // What just came from outside is not looked at closely again for a while.
    world.wait_seconds(8);
    assert_eq!(world.world_sends(&reply).reason, Reason::NoMapping);
}
both_families!(queries_of_icmp_live_a_minute);

fn timeouts_are_the_operators<A: Version>() {
    let world = World::<A>::new();
    world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(2));
    world.guest_sends(TAP, &out::<A>());
    world.wait_seconds(2);
    assert_eq!(world.world_sends(&back::<A>()).reason, Reason::Translated);
    world.wait_seconds(1);
    assert_eq!(world.world_sends(&back::<A>()).reason, Reason::NoMapping);
}
both_families!(timeouts_are_the_operators);

fn a_timeout_that_is_changed_holds_at_once<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    world.wait_seconds(10);
    world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(5));
    // The mapping keeps what it was promised.
    assert_eq!(
        world.world_sends(&back::<A>()).reason,
        Reason::SessionAdmitted
    );
}
both_families!(a_timeout_that_is_changed_holds_at_once);

fn an_expired_session_begins_anew_on_its_port<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(
        TAP,
        &udp(at(A::NEIGHBOUR, 40_000), at(A::SERVER, 53)).build(),
    );
    let port = |world: &World<A>| {
        let exit = world.guest_sends(TAP, &out::<A>());
        source(&exit.forwarded(Reason::SessionStarted)).port()
    };
    let first = port(&world);
    assert_ne!(first, 40_000);
    for seconds in [301, 1000, 100_000] {
        world.wait_seconds(seconds);
        assert_eq!(port(&world), first);
        assert_eq!(world.mappings.len(), 2);
        assert_eq!(world.inside.len(), 2);
    }
}
both_families!(an_expired_session_begins_anew_on_its_port);

fn the_clock_may_wrap_round<A: Version>() {
    // Nearly 50 days, in steps as long as a session lives.
    let world = World::<A>::new();
    for _ in 0..500 {
        world.guest_sends(TAP, &out::<A>());
        assert_eq!(world.world_sends(&back::<A>()).reason, Reason::Translated);
        world.wait_seconds(10_000);
    }
    assert_eq!(world.sessions.len(), 2);
}
both_families!(the_clock_may_wrap_round);

fn no_session_outlives_its_mapping<A: Version>() {
    // Sessions of one socket that begin and end at different times, from both
    // sides: checked at every step.
    let world = World::<A>::new();
    let check = || {
        for (key, half) in world.sessions.all() {
            if session::is_expired(&key, &half, &world) || key.arrival.device().is_none() {
                continue;
            }
            let outside = EndpointKey::new(half.source, half.source_port, key.arrival.protocol());
            let mapping = world.mappings.copy(&outside).expect("a mapping");
            assert!(world.now().is_before(mapping.expires_at), "{key:?}");
        }
    };
    let mut number = 0;
    for seconds in [0, 1, 50, 120, 299, 10, 301, 5, 150, 151] {
        number += 1;
        world.wait_seconds(seconds);
        check();
        let to = [
            at(A::SERVER, 53),
            at(A::OTHER_SERVER, 53),
            at(A::SERVER, 54),
        ][number % 3];
        world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), to).build());
        check();
        world.wait_seconds(seconds / 2);
        check();
        // From a port that the guest never sent to.
        let port = 6000 + u16::try_from(number).unwrap();
        world.world_sends(&udp(at(A::SERVER, port), at(A::OUTSIDE, 40_000)).build());
        check();
        world.wait_seconds(200);
        check();
    }
}
both_families!(no_session_outlives_its_mapping);

fn quick_packets_keep_no_session_beyond_its_mapping<A: Version>() {
    let world = World::<A>::new();
    for packets in 0..20 {
        world.guest_sends(TAP, &out::<A>());
        for _ in 0..packets {
            world.wait(Ticks::SLOT);
            world.guest_sends(TAP, &out::<A>());
        }
        let outlives = |ticks: Ticks| {
            world.wait(ticks);
            let (key, half) = world.sessions.all()[0];
            (
                session::is_expired(&key, &half, &world),
                mapping_lives(&world),
            )
        };
        let last = Ticks::new(world.timeouts().udp.plus(STAMP_AFTER).get() - 1);
        assert_eq!(outlives(last), (false, true), "after {packets}");
        assert!(outlives(Ticks::new(1)).0, "after {packets}");
    }
}
both_families!(quick_packets_keep_no_session_beyond_its_mapping);

fn what_was_long_idle_is_looked_at_whatever_its_slot_says<A: Version>() {
    // Slots come round again after 256.
    for slots in 256..272 {
        let world = World::<A>::new();
        world.guest_sends(TAP, &out::<A>());
        world.wait(Ticks::SLOT);
        assert!(!world.guest_sends(TAP, &out::<A>()).quick);
        assert!(world.guest_sends(TAP, &out::<A>()).quick);
        for _ in 0..slots {
            world.wait(Ticks::SLOT);
        }
        assert!(
            !world.guest_sends(TAP, &out::<A>()).quick,
            "after {slots} slots"
        );
    }
}
both_families!(what_was_long_idle_is_looked_at_whatever_its_slot_says);

fn nobody_is_admitted_to_a_session_that_is_over<A: Version>() {
    let world = World::<A>::new();
    for _ in 0..14 {
        world.guest_sends(TAP, &out::<A>());
        world.wait(Ticks::from_milliseconds(500));
    }
    world.wait_seconds(298);
    let exit = world.world_sends(&udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    for (key, half) in world.sessions.all() {
        assert!(
            half.source_port.get() == 53
                || half.destination_port.get() == 53
                || !session::is_expired(&key, &half, &world),
            "{key:?}"
        );
    }
}
both_families!(nobody_is_admitted_to_a_session_that_is_over);

fn sessions_are_confirmed_every_eight_seconds<A: Version>() {
    let slots = World::<A>::new().timeouts().confirm_after();
    assert_eq!(Ticks::from_slots(slots).milliseconds() / 1000, 8);
}
both_families!(sessions_are_confirmed_every_eight_seconds);

fn what_comes_from_outside_keeps_no_mapping_alive<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    world.wait_seconds(290);
    let other_port = udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build();
    let exit = world.world_sends(&other_port);
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    world.wait_seconds(5);
    assert_eq!(world.world_sends(&other_port).reason, Reason::Translated);
    // The session ends with the mapping that it came in by.
    world.wait_seconds(285);
    assert_eq!(world.world_sends(&other_port).reason, Reason::NoMapping);
}
both_families!(what_comes_from_outside_keeps_no_mapping_alive);

fn quotas_count_sessions_that_live<A: Version>() {
    let world = World::<A>::new();
    world.set(|settings| settings.guest_max_sessions = 2);
    let start = |guest, port| {
        let exit = world.guest_sends(TAP, &udp(at(guest, 4000), at(A::SERVER, port)).build());
        exit.reason
    };
    assert_eq!(start(A::GUEST, 1), Reason::SessionStarted);
    assert_eq!(start(A::GUEST, 2), Reason::SessionStarted);
    for refused in 1..=3 {
        assert_eq!(start(A::GUEST, 3), Reason::GuestSessionLimit);
        let guest = world.guests.copy(&A::GUEST).unwrap();
        assert_eq!((guest.sessions, guest.refused), (2, refused));
    }
    assert_eq!(
        start(A::GUEST, 1),
        Reason::Translated,
        "what it has goes on"
    );
    assert_eq!(
        start(A::NEIGHBOUR, 3),
        Reason::SessionStarted,
        "others, too"
    );
}
both_families!(quotas_count_sessions_that_live);

fn quotas_count_ports_that_are_held<A: Version>() {
    let world = World::<A>::new();
    world.set(|settings| settings.guest_max_ports = 2);
    let start = |guest, port, remote| {
        let exit = world.guest_sends(TAP, &udp(at(guest, port), at(A::SERVER, remote)).build());
        exit.reason
    };
    assert_eq!(start(A::GUEST, 4000, 1), Reason::SessionStarted);
    assert_eq!(start(A::GUEST, 4001, 1), Reason::SessionStarted);
    for refused in 1..=3 {
        assert_eq!(start(A::GUEST, 4002, 1), Reason::GuestPortLimit);
        let guest = world.guests.copy(&A::GUEST).unwrap();
        assert_eq!((guest.ports, guest.refused), (2, refused));
    }
    let (more, others) = (start(A::GUEST, 4001, 2), start(A::NEIGHBOUR, 4002, 1));
    assert_eq!(more, Reason::SessionStarted, "one port has many sessions");
    assert_eq!(others, Reason::SessionStarted, "others, too");
    assert_eq!(
        start(A::GUEST, 4000, 1),
        Reason::Translated,
        "what is there"
    );
    let ping = world.guest_sends(TAP, &ping(A::GUEST, A::SERVER, 7).build());
    assert_eq!(ping.reason, Reason::GuestPortLimit, "of any protocol");
}
both_families!(quotas_count_ports_that_are_held);

fn a_guest_that_holds_all_that_it_may_has_one_of_its_own_again<A: Version>() {
    // Nobody sweeps here.
    let world = World::<A>::new();
    world.withhold(|port| !(30_000..30_004).contains(port));
    world.set(|settings| settings.guest_max_ports = 2);
    let start = |guest, port| {
        let exit = world.guest_sends(TAP, &udp(at(guest, port), at(A::SERVER, 53)).build());
        exit.reason
    };
    start(A::GUEST, 30_000);
    start(A::GUEST, 30_001);
    start(A::NEIGHBOUR, 30_002);
    assert_eq!(start(A::GUEST, 30_003), Reason::GuestPortLimit);
    world.wait_seconds(1000);
    // What the neighbour had is over, too, but would be one more.
    assert_eq!(start(A::GUEST, 30_002), Reason::GuestPortLimit);
    world.chances.borrow_mut().push_back(30_001 - 1024);
    assert_eq!(start(A::GUEST, 30_002), Reason::SessionStarted);
    let (one, other) = (
        endpoint(A::OUTSIDE, 30_001, protocol::UDP),
        endpoint(A::OUTSIDE, 30_002, protocol::UDP),
    );
    let owner = |outside| world.mappings.copy(&outside).unwrap().inside;
    assert_eq!(owner(one), endpoint(A::GUEST, 30_002, protocol::UDP));
    assert_eq!(owner(other).address, A::NEIGHBOUR);
    // With the same port it need not be lucky.
    assert_eq!(start(A::GUEST, 30_000), Reason::SessionStarted);
}
both_families!(a_guest_that_holds_all_that_it_may_has_one_of_its_own_again);

fn a_route_that_is_gone_is_the_hosts_to_tell<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    world
        .routes
        .borrow_mut()
        .insert(A::SERVER, tapnat_common::nat::Route::default());
    world.set(|settings| settings.generation += 1);
    assert_eq!(world.guest_sends(TAP, &out::<A>()).reason, Reason::NoRoute);
    // And when it is back, the session goes on.
    world.routes.borrow_mut().clear();
    assert_eq!(
        world.guest_sends(TAP, &out::<A>()).reason,
        Reason::Translated
    );
}
both_families!(a_route_that_is_gone_is_the_hosts_to_tell);

/// The host would answer of its own address that nobody is there, which would end the connection.
fn a_guest_that_cannot_be_reached_is_waited_for<A: Version>() {
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &out::<A>());
    let new = udp(at(A::OTHER_SERVER, 53), at(A::OUTSIDE, 40_000)).build();
    world
        .routes
        .borrow_mut()
        .insert(A::GUEST, tapnat_common::nat::Route::default());
    world.set(|settings| settings.generation += 1);
    for packet in [&back::<A>(), &new] {
        assert_eq!(world.world_sends(packet).reason, Reason::GuestUnreachable);
    }
    world.routes.borrow_mut().clear();
    assert_eq!(world.world_sends(&back::<A>()).reason, Reason::Translated);
}
both_families!(a_guest_that_cannot_be_reached_is_waited_for);

fn what_cannot_be_sent_keeps_nothing_alive<A: Version>() {
    // Or the session would live on without its mapping.
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    world.wait_seconds(200);
    world
        .routes
        .borrow_mut()
        .insert(A::SERVER, tapnat_common::nat::Route::default());
    assert_eq!(world.guest_sends(TAP, &out::<A>()).reason, Reason::NoRoute);
    world.wait_seconds(130);
    assert!(!mapping_lives(&world));
    assert_eq!(world.world_sends(&back::<A>()).reason, Reason::NoMapping);
}
both_families!(what_cannot_be_sent_keeps_nothing_alive);

fn a_next_hop_that_changed_is_looked_up_again<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    let link = |world: &World<A>| {
        let session = world.half(Some(TAP), &out::<A>()).unwrap();
        session.next_hop.link.destination()
    };
    let before = link(&world);
    let mut other = route(2, 1500);
    other.next_hop.link =
        tapnat_common::frame::LinkAddresses::new([6, 6, 6, 6, 6, 6], [5, 5, 5, 5, 5, 5]);
    world.routes.borrow_mut().insert(A::SERVER, other);
    world.guest_sends(TAP, &out::<A>());
    assert_eq!(link(&world), before);
    world.set(|settings| settings.generation = settings.generation.wrapping_add(1));
    let exit = world.guest_sends(TAP, &out::<A>());
    assert!(exit.sent.unwrap().resolve);
    assert_eq!(link(&world), [6; 6]);
    assert!(world.guest_sends(TAP, &out::<A>()).quick);
}
both_families!(a_next_hop_that_changed_is_looked_up_again);

fn the_first_packet_back_finds_its_way<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    let exit = world.world_sends(&back::<A>());
    assert!(!exit.quick && exit.sent.unwrap().resolve);
    let exit = world.world_sends(&back::<A>());
    assert!(exit.quick && !exit.sent.unwrap().resolve);
}
both_families!(the_first_packet_back_finds_its_way);

fn forwarding_that_is_switched_off_spares_open_sessions<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &out::<A>());
    let off = tapnat_common::nat::Route {
        fate: tapnat_common::nat::Fate::Disabled,
        ..Default::default()
    };
    world.routes.borrow_mut().insert(A::SERVER, off);
    world.set(|settings| settings.generation += 1);
    assert_eq!(
        world.guest_sends(TAP, &out::<A>()).reason,
        Reason::Translated
    );
    let new = udp(at(A::GUEST, 40_001), at(A::SERVER, 53)).build();
    assert_eq!(
        world.guest_sends(TAP, &new).reason,
        Reason::ForwardingDisabled
    );
    // To the host it works all the same.
    let host = udp(at(A::GUEST, 40_001), at(A::HOST[0], 53)).build();
    assert_eq!(world.guest_sends(TAP, &host).reason, Reason::ForTheHost);
}
both_families!(forwarding_that_is_switched_off_spares_open_sessions);

fn packets_are_counted_only_if_asked<A: Version>() {
    let run = |counts| {
        let world = World::<A>::new();
        world.counts_traffic.set(counts);
        for _ in 0..3 {
            world.guest_sends(TAP, &out::<A>());
        }
        world.world_sends(&back::<A>());
        let out = world.half(Some(TAP), &out::<A>()).unwrap();
        let back = world.half(None, &back::<A>()).unwrap();
        (out.packets, out.bytes, back.packets, back.bytes)
    };
    assert_eq!(run(false), (0, 0, 0, 0));
    let length = u64::try_from(A::HEADER).unwrap() + 16;
    assert_eq!(run(true), (3, 3 * length, 1, length));
}
both_families!(packets_are_counted_only_if_asked);

/// The mapping was to end by the old timeout, and so its port is another guest's
/// while the session would still live by the new one.
fn raised_timeouts_do_not_leave_a_session_on_anothers_port<A: Version>() {
    for packets_go_on in [false, true] {
        let world = World::<A>::new();
        world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(100));
        let packet = |guest| udp(at(guest, 40_000), at(A::SERVER, 53)).build();
        let exit = world.guest_sends(TAP, &packet(A::GUEST));
        let outside = source(&exit.forwarded_any());
        assert_eq!(outside, at(A::OUTSIDE, 40_000));
        world.wait_seconds(300);
        world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(600));
        let exit = world.guest_sends(TAP, &packet(A::NEIGHBOUR));
        assert_eq!(source(&exit.forwarded(Reason::SessionStarted)), outside);
        let answer = udp(at(A::SERVER, 53), outside).build();
        let exit = world.world_sends(&answer);
        assert_eq!(
            destination(&exit.forwarded(Reason::Translated)),
            at(A::NEIGHBOUR, 40_000)
        );
        if packets_go_on {
            // Whose it was begins anew, from elsewhere.
            let exit = world.guest_sends(TAP, &packet(A::GUEST));
            assert_ne!(source(&exit.forwarded(Reason::SessionStarted)), outside);
        }
    }
}
both_families!(raised_timeouts_do_not_leave_a_session_on_anothers_port);
