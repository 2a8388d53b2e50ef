//! How long sessions and mappings live, what keeps them, and that their end
//! needs no sweep.

use tapnat_common::{
    abi::{EndpointKey, Mapping},
    nat::{STAMP_AFTER, Tables as _, session},
    net::{Be32, protocol},
    time::Ticks,
    verdict::Reason,
};

use crate::support::{
    network::{
        GUEST, HOST, NEIGHBOUR, OTHER_SERVER, OUTSIDE, SERVER, TAP, at, destination, endpoint,
        ping, pong, source, udp,
    },
    world::{World, route},
};

fn out() -> Vec<u8> {
    udp(at(GUEST, 40_000), at(SERVER, 53)).build()
}

fn back() -> Vec<u8> {
    udp(at(SERVER, 53), at(OUTSIDE, 40_000)).build()
}

fn mapping(world: &World) -> Option<Mapping> {
    world
        .mappings
        .copy(&endpoint(OUTSIDE, 40_000, protocol::UDP))
}

fn mapping_lives(world: &World) -> bool {
    mapping(world).is_some_and(|mapping| world.now().is_before(mapping.expires_at))
}

#[test]
fn a_datagram_keeps_its_session_for_five_minutes() {
    let world = World::new();
    world.guest_sends(TAP, &out());
    world.wait_seconds(300);
    assert!(mapping_lives(&world));
    assert_eq!(world.world_sends(&back()).reason, Reason::Translated);
    let world = World::new();
    world.guest_sends(TAP, &out());
    world.wait_seconds(301);
    assert_eq!(world.world_sends(&back()).reason, Reason::NoMapping);
    assert!(!mapping_lives(&world));
    assert_eq!(world.sessions.len(), 0);
}

#[test]
fn what_the_guest_sends_refreshes() {
    let world = World::new();
    for _ in 0..10 {
        let exit = world.guest_sends(TAP, &out());
        assert_eq!(source(&exit.forwarded_any()), at(OUTSIDE, 40_000));
        world.wait_seconds(299);
        assert!(mapping_lives(&world));
    }
    assert_eq!(world.mappings.len(), 1);
    assert_eq!(world.world_sends(&back()).reason, Reason::Translated);
}

#[test]
fn what_the_world_sends_refreshes_only_if_asked() {
    let run = |refresh| {
        let world = World::new();
        if refresh {
            world.set_inbound_refresh();
        }
        world.guest_sends(TAP, &out());
        for _ in 0..4 {
            world.wait_seconds(100);
            world.world_sends(&back());
        }
        let reason = world.world_sends(&back()).reason;
        (reason, mapping_lives(&world))
    };
    assert_eq!(run(false), (Reason::NoMapping, false));
    assert_eq!(run(true), (Reason::Translated, true));
}

#[test]
fn queries_of_icmp_live_a_minute() {
    let world = World::new();
    let request = ping(GUEST, SERVER, 7).build();
    let reply = pong(SERVER, OUTSIDE, 7).build();
    world.guest_sends(TAP, &request);
    world.wait_seconds(60);
    assert_eq!(world.world_sends(&reply).reason, Reason::Translated);
    // What just came from outside is not looked at closely again for a while.
    world.wait_seconds(8);
    assert_eq!(world.world_sends(&reply).reason, Reason::NoMapping);
}

#[test]
fn timeouts_are_the_operators() {
    let world = World::new();
    world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(2));
    world.guest_sends(TAP, &out());
    world.wait_seconds(2);
    assert_eq!(world.world_sends(&back()).reason, Reason::Translated);
    world.wait_seconds(1);
    assert_eq!(world.world_sends(&back()).reason, Reason::NoMapping);
}

#[test]
fn a_timeout_that_is_changed_holds_at_once() {
    let world = World::new();
    world.guest_sends(TAP, &out());
    world.wait_seconds(10);
    world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(5));
    // The mapping keeps what it was promised.
    assert_eq!(world.world_sends(&back()).reason, Reason::SessionAdmitted);
}

#[test]
fn an_expired_session_begins_anew_on_its_port() {
    let world = World::new();
    world.guest_sends(TAP, &udp(at(NEIGHBOUR, 40_000), at(SERVER, 53)).build());
    let port = |world: &World| {
        let exit = world.guest_sends(TAP, &out());
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

#[test]
fn the_clock_may_wrap_round() {
    // Nearly 50 days, in steps as long as a session lives.
    let world = World::new();
    for _ in 0..500 {
        world.guest_sends(TAP, &out());
        assert_eq!(world.world_sends(&back()).reason, Reason::Translated);
        world.wait_seconds(10_000);
    }
    assert_eq!(world.sessions.len(), 2);
}

#[test]
fn no_session_outlives_its_mapping() {
    // Sessions of one socket that begin and end at different times, from both
    // sides: checked at every step.
    let world = World::new();
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
        let to = [at(SERVER, 53), at(OTHER_SERVER, 53), at(SERVER, 54)][number % 3];
        world.guest_sends(TAP, &udp(at(GUEST, 40_000), to).build());
        check();
        world.wait_seconds(seconds / 2);
        check();
        // From a port that the guest never sent to.
        let port = 6000 + u16::try_from(number).unwrap();
        world.world_sends(&udp(at(SERVER, port), at(OUTSIDE, 40_000)).build());
        check();
        world.wait_seconds(200);
        check();
    }
}

#[test]
fn quick_packets_keep_no_session_beyond_its_mapping() {
    let world = World::new();
    for packets in 0..20 {
        world.guest_sends(TAP, &out());
        for _ in 0..packets {
            world.wait(Ticks::SLOT);
            world.guest_sends(TAP, &out());
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

#[test]
fn what_was_long_idle_is_looked_at_whatever_its_slot_says() {
    // Slots come round again after 256.
    for slots in 256..272 {
        let world = World::new();
        world.guest_sends(TAP, &out());
        world.wait(Ticks::SLOT);
        assert!(!world.guest_sends(TAP, &out()).quick);
        assert!(world.guest_sends(TAP, &out()).quick);
        for _ in 0..slots {
            world.wait(Ticks::SLOT);
        }
        assert!(!world.guest_sends(TAP, &out()).quick, "after {slots} slots");
    }
}

#[test]
fn nobody_is_admitted_to_a_session_that_is_over() {
    let world = World::new();
    for _ in 0..14 {
        world.guest_sends(TAP, &out());
        world.wait(Ticks::from_milliseconds(500));
    }
    world.wait_seconds(298);
    let exit = world.world_sends(&udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build());
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

#[test]
fn sessions_are_confirmed_every_eight_seconds() {
    let slots = World::new().timeouts().confirm_after();
    assert_eq!(Ticks::from_slots(slots).milliseconds() / 1000, 8);
}

#[test]
fn what_comes_from_outside_keeps_no_mapping_alive() {
    let world = World::new();
    world.guest_sends(TAP, &out());
    world.wait_seconds(290);
    let other_port = udp(at(SERVER, 54), at(OUTSIDE, 40_000)).build();
    let exit = world.world_sends(&other_port);
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    world.wait_seconds(5);
    assert_eq!(world.world_sends(&other_port).reason, Reason::Translated);
    // The session ends with the mapping that it came in by.
    world.wait_seconds(285);
    assert_eq!(world.world_sends(&other_port).reason, Reason::NoMapping);
}

#[test]
fn quotas_count_sessions_that_live() {
    let world = World::new();
    world.set(|settings| settings.guest_max_sessions = 2);
    let start = |guest, port| {
        let exit = world.guest_sends(TAP, &udp(at(guest, 4000), at(SERVER, port)).build());
        exit.reason
    };
    assert_eq!(start(GUEST, 1), Reason::SessionStarted);
    assert_eq!(start(GUEST, 2), Reason::SessionStarted);
    for refused in 1..=3 {
        assert_eq!(start(GUEST, 3), Reason::GuestSessionLimit);
        let guest = world.guests.copy(&Be32::from(GUEST)).unwrap();
        assert_eq!((guest.sessions, guest.refused), (2, refused));
    }
    assert_eq!(start(GUEST, 1), Reason::Translated, "what it has goes on");
    assert_eq!(start(NEIGHBOUR, 3), Reason::SessionStarted, "others, too");
}

#[test]
fn quotas_count_ports_that_are_held() {
    let world = World::new();
    world.set(|settings| settings.guest_max_ports = 2);
    let start = |guest, port, remote| {
        let exit = world.guest_sends(TAP, &udp(at(guest, port), at(SERVER, remote)).build());
        exit.reason
    };
    assert_eq!(start(GUEST, 4000, 1), Reason::SessionStarted);
    assert_eq!(start(GUEST, 4001, 1), Reason::SessionStarted);
    for refused in 1..=3 {
        assert_eq!(start(GUEST, 4002, 1), Reason::GuestPortLimit);
        let guest = world.guests.copy(&Be32::from(GUEST)).unwrap();
        assert_eq!((guest.ports, guest.refused), (2, refused));
    }
    let (more, others) = (start(GUEST, 4001, 2), start(NEIGHBOUR, 4002, 1));
    assert_eq!(more, Reason::SessionStarted, "one port has many sessions");
    assert_eq!(others, Reason::SessionStarted, "others, too");
    assert_eq!(start(GUEST, 4000, 1), Reason::Translated, "what is there");
    let ping = world.guest_sends(TAP, &ping(GUEST, SERVER, 7).build());
    assert_eq!(ping.reason, Reason::GuestPortLimit, "of any protocol");
}

#[test]
fn a_guest_that_holds_all_that_it_may_has_one_of_its_own_again() {
    // Nobody sweeps here.
    let world = World::new();
    world.withhold(|port| !(30_000..30_004).contains(port));
    world.set(|settings| settings.guest_max_ports = 2);
    let start = |guest, port| {
        let exit = world.guest_sends(TAP, &udp(at(guest, port), at(SERVER, 53)).build());
        exit.reason
    };
    start(GUEST, 30_000);
    start(GUEST, 30_001);
    start(NEIGHBOUR, 30_002);
    assert_eq!(start(GUEST, 30_003), Reason::GuestPortLimit);
    world.wait_seconds(1000);
    // What the neighbour had is over, too, but would be one more.
    assert_eq!(start(GUEST, 30_002), Reason::GuestPortLimit);
    world.chances.borrow_mut().push_back(30_001 - 1024);
    assert_eq!(start(GUEST, 30_002), Reason::SessionStarted);
    let (one, other) = (
        endpoint(OUTSIDE, 30_001, protocol::UDP),
        endpoint(OUTSIDE, 30_002, protocol::UDP),
    );
    let owner = |outside| world.mappings.copy(&outside).unwrap().inside;
    assert_eq!(owner(one), endpoint(GUEST, 30_002, protocol::UDP));
    assert_eq!(owner(other).address, NEIGHBOUR.into());
    // With the same port it need not be lucky.
    assert_eq!(start(GUEST, 30_000), Reason::SessionStarted);
}

#[test]
fn a_route_that_is_gone_is_the_hosts_to_tell() {
    let world = World::new();
    world.guest_sends(TAP, &out());
    world
        .routes
        .borrow_mut()
        .insert(SERVER.into(), tapnat_common::nat::Route::default());
    world.set(|settings| settings.generation += 1);
    assert_eq!(world.guest_sends(TAP, &out()).reason, Reason::NoRoute);
    // And when it is back, the session goes on.
    world.routes.borrow_mut().clear();
    assert_eq!(world.guest_sends(TAP, &out()).reason, Reason::Translated);
}

#[test]
fn what_cannot_be_sent_keeps_nothing_alive() {
    // Or the session would live on without its mapping.
    let world = World::new();
    world.guest_sends(TAP, &out());
    world.wait_seconds(200);
    world
        .routes
        .borrow_mut()
        .insert(SERVER.into(), tapnat_common::nat::Route::default());
    assert_eq!(world.guest_sends(TAP, &out()).reason, Reason::NoRoute);
    world.wait_seconds(130);
    assert!(!mapping_lives(&world));
    assert_eq!(world.world_sends(&back()).reason, Reason::NoMapping);
}

#[test]
fn a_next_hop_that_changed_is_looked_up_again() {
    let world = World::new();
    world.guest_sends(TAP, &out());
    let link = |world: &World| {
        let session = world.half(Some(TAP), &out()).unwrap();
        session.next_hop.link.destination()
    };
    let before = link(&world);
    let mut other = route(2, 1500);
    other.next_hop.link =
        tapnat_common::frame::LinkAddresses::new([6, 6, 6, 6, 6, 6], [5, 5, 5, 5, 5, 5]);
    world.routes.borrow_mut().insert(SERVER.into(), other);
    world.guest_sends(TAP, &out());
    assert_eq!(link(&world), before);
    world.set(|settings| settings.generation = settings.generation.wrapping_add(1));
    let exit = world.guest_sends(TAP, &out());
    assert!(exit.sent.unwrap().resolve);
    assert_eq!(link(&world), [6; 6]);
    assert!(world.guest_sends(TAP, &out()).quick);
}

#[test]
fn the_first_packet_back_finds_its_way() {
    let world = World::new();
    world.guest_sends(TAP, &out());
    let exit = world.world_sends(&back());
    assert!(!exit.quick && exit.sent.unwrap().resolve);
    let exit = world.world_sends(&back());
    assert!(exit.quick && !exit.sent.unwrap().resolve);
}

#[test]
fn forwarding_that_is_switched_off_spares_open_sessions() {
    let world = World::new();
    world.guest_sends(TAP, &out());
    let off = tapnat_common::nat::Route {
        fate: tapnat_common::nat::Fate::Disabled,
        ..Default::default()
    };
    world.routes.borrow_mut().insert(SERVER.into(), off);
    world.set(|settings| settings.generation += 1);
    assert_eq!(world.guest_sends(TAP, &out()).reason, Reason::Translated);
    let new = udp(at(GUEST, 40_001), at(SERVER, 53)).build();
    assert_eq!(
        world.guest_sends(TAP, &new).reason,
        Reason::ForwardingDisabled
    );
    // To the host it works all the same.
    let host = udp(at(GUEST, 40_001), at(HOST[0].into(), 53)).build();
    assert_eq!(world.guest_sends(TAP, &host).reason, Reason::ForTheHost);
}

#[test]
fn packets_are_counted_only_if_asked() {
    let run = |counts| {
        let world = World::new();
        world.counts_traffic.set(counts);
        for _ in 0..3 {
            world.guest_sends(TAP, &out());
        }
        world.world_sends(&back());
        let out = world.half(Some(TAP), &out()).unwrap();
        let back = world.half(None, &back()).unwrap();
        (out.packets, out.bytes, back.packets, back.bytes)
    };
    assert_eq!(run(false), (0, 0, 0, 0));
    assert_eq!(run(true), (3, 3 * 36, 1, 36));
}

/// The mapping was to end by the old timeout, and so its port is another guest's
/// while the session would still live by the new one.
#[test]
fn raised_timeouts_do_not_leave_a_session_on_anothers_port() {
    for packets_go_on in [false, true] {
        let world = World::new();
        world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(100));
        let packet = |guest| udp(at(guest, 40_000), at(SERVER, 53)).build();
        let exit = world.guest_sends(TAP, &packet(GUEST));
        let outside = source(&exit.forwarded_any());
        assert_eq!(outside, at(OUTSIDE, 40_000));
        world.wait_seconds(300);
        world.set(|settings| settings.timeouts.udp = Ticks::from_seconds(600));
        let exit = world.guest_sends(TAP, &packet(NEIGHBOUR));
        assert_eq!(source(&exit.forwarded(Reason::SessionStarted)), outside);
        let answer = udp(at(SERVER, 53), outside).build();
        let exit = world.world_sends(&answer);
        assert_eq!(
            destination(&exit.forwarded(Reason::Translated)),
            at(NEIGHBOUR, 40_000)
        );
        if packets_go_on {
            // Whose it was begins anew, from elsewhere.
            let exit = world.guest_sends(TAP, &packet(GUEST));
            assert_ne!(source(&exit.forwarded(Reason::SessionStarted)), outside);
        }
    }
}
