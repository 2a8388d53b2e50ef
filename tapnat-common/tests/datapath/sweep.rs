//! What is over goes, what is alive stays, also when packets come while the
//! sweep is at it.

use tapnat_common::{
    abi::{EndpointKey, Filtering, FlowKey, Mapping, Session},
    nat::{STAMP_AFTER, Tables as _, sweep},
    net::protocol,
    ports::Class,
    time::Ticks,
    verdict::Reason,
};

use crate::support::{
    network::{
        SECOND_TAP, TAP, Version, at, both_families, endpoint, ping, pong, source, tcp, udp,
    },
    world::World,
};

/// Sweeps all tables but the guests as user space does. Returns how many
/// sessions and how many mappings went.
#[track_caller]
pub fn sweep_all<A: Version>(world: &World<A>) -> [usize; 2] {
    let (settings, now) = (world.settings_now(), world.now());
    let sessions = world
        .sessions
        .all()
        .iter()
        .filter(|(key, half)| sweep::session_may_be_over(key, half, &settings, now))
        .filter(|(key, _)| world.act(|| sweep::session(key, world)))
        .count();
    let mappings = world
        .mappings
        .all()
        .iter()
        .filter(|(_, mapping)| sweep::mapping_is_over(mapping, &settings, now))
        .filter(|(outside, _)| world.act(|| sweep::mapping(outside, world)))
        .count();
    for (key, _) in world.permissions.all() {
        world.act(|| sweep::permission(&key, world));
    }
    [sessions, mappings]
}

/// The time after which a session of this timeout is over.
fn all_of(timeout: Ticks) -> Ticks {
    timeout.plus(STAMP_AFTER)
}

fn one_less(ticks: Ticks) -> Ticks {
    Ticks::new(ticks.get() - 1)
}

fn a_session_goes_with_all_that_was_made_for_it<A: Version>() {
    for number in [protocol::UDP, protocol::TCP, A::ICMP] {
        let world = World::<A>::new();
        let timeouts = world.timeouts();
        let (packet, class, timeout) = match number {
            protocol::UDP => (
                udp(at(A::GUEST, 40000), at(A::SERVER, 53)),
                Class::Udp,
                timeouts.udp,
            ),
            protocol::TCP => (
                tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "S"),
                Class::Tcp,
                timeouts.tcp_opening,
            ),
            _ => (ping(A::GUEST, A::SERVER, 40000), Class::Icmp, timeouts.icmp),
        };
        world
            .guest_sends(TAP, &packet.build())
            .forwarded(Reason::SessionStarted);
        world.wait(one_less(all_of(timeout)));
        assert_eq!(sweep_all(&world), [0, 0]);
        assert_eq!(world.sizes(), [2, 1, 1, 0, 1]);
        world.wait(Ticks::new(1));
        assert_eq!(sweep_all(&world), [1, 0]);
        // The port rests, and the guest may come back to it.
        world.wait(one_less(timeouts.port_rest));
        assert_eq!(sweep_all(&world), [0, 0]);
        assert_eq!(world.sizes(), [0, 1, 1, 0, 1]);
        assert!(world.port_set(class, 40000).is_taken(40000));
        world.wait(Ticks::new(1));
        assert_eq!(sweep_all(&world), [0, 1]);
        assert_eq!(world.sizes(), [0, 0, 0, 0, 1]);
        assert!(!world.port_set(class, 40000).is_taken(40000));
        let address = A::GUEST;
        assert!(world.act(|| sweep::guest(address, &world)));
        assert_eq!(world.guests.len(), 0);
    }
}
both_families!(a_session_goes_with_all_that_was_made_for_it);

fn the_next_owner_of_a_port_does_not_inherit_permissions<A: Version>() {
    let world = World::<A>::new();
    let timeouts = world.timeouts();
    for server in [A::SERVER, A::OTHER_SERVER] {
        world.guest_sends(TAP, &tcp(at(A::GUEST, 40000), at(server, 80), "S").build());
        world.world_sends(&tcp(at(server, 80), at(A::OUTSIDE, 40000), "SA").build());
        world.guest_sends(TAP, &tcp(at(A::GUEST, 40000), at(server, 80), "A").build());
        world.guest_sends(TAP, &tcp(at(A::GUEST, 40000), at(server, 80), "R").build());
    }
    world.wait(all_of(timeouts.tcp_closing));
    assert_eq!(sweep_all(&world), [2, 0]);
    assert_eq!(world.permissions.len(), 1);
    // It was kept for hours by connections that were cut short.
    world.wait_slack();
    world.wait(timeouts.port_rest);
    assert_eq!(sweep_all(&world), [0, 1]);
    assert_eq!(world.permissions.len(), 0);
}
both_families!(the_next_owner_of_a_port_does_not_inherit_permissions);

fn who_takes_a_port_over_before_the_sweep_does_not_either<A: Version>() {
    let world = World::<A>::new();
    world.withhold(|port| *port != 40_000);
    let timeouts = world.timeouts();
    let from_remote = |flags| tcp(at(A::OTHER_SERVER, 81), at(A::OUTSIDE, 40_000), flags).build();
    for server in [A::SERVER, A::OTHER_SERVER] {
        let client = |flags| tcp(at(A::GUEST, 40_000), at(server, 80), flags).build();
        world.guest_sends(TAP, &client("S"));
        world.world_sends(&tcp(at(server, 80), at(A::OUTSIDE, 40_000), "SA").build());
        world.guest_sends(TAP, &client("A"));
        world.guest_sends(TAP, &client("R"));
    }
    assert_eq!(
        world.world_sends(&from_remote("S")).reason,
        Reason::SessionAdmitted
    );
    world.wait(all_of(timeouts.tcp_opening));
    world.wait(all_of(timeouts.tcp_closing));
    for (key, _) in world.sessions.all() {
        world.act(|| sweep::session(&key, &world));
    }
    world.wait_slack();
    world.wait(timeouts.port_rest);
    // The mapping goes, and no permission yet.
    for (outside, mapping) in world.mappings.all() {
        assert!(sweep::mapping_is_over(
            &mapping,
            &world.settings_now(),
            world.now()
        ));
        world.act(|| sweep::mapping(&outside, &world));
    }
    let next = tcp(at(A::OTHER_GUEST, 40_000), at(A::SERVER, 80), "S").build();
    world
        .guest_sends(SECOND_TAP, &next)
        .forwarded(Reason::SessionStarted);
    let permissions = world.permissions.all();
    assert!(
        permissions
            .iter()
            .any(|(_, it)| world.now().is_before(it.expires_at)),
        "what is inherited by nobody: {permissions:?}"
    );
    assert_eq!(
        world.world_sends(&from_remote("S")).reason,
        Reason::UnsolicitedSyn
    );
}
both_families!(who_takes_a_port_over_before_the_sweep_does_not_either);

fn live_sessions_stay<A: Version>() {
    let world = World::<A>::new();
    let timeouts = world.timeouts();
    let client = || tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "");
    let server = || tcp(at(A::SERVER, 80), at(A::OUTSIDE, 40000), "");
    let flags = |builder: tapnat_testbed::packet::Builder, syn, ack| {
        builder
            .with_tcp(|header| (header.syn, header.ack) = (syn, ack))
            .build()
    };
    world.guest_sends(TAP, &flags(client(), true, false));
    world.world_sends(&flags(server(), true, true));
    world.guest_sends(TAP, &flags(client(), false, true));
    world.wait(all_of(timeouts.tcp_closing));
    world.wait(all_of(timeouts.tcp_closing));
    // One half cannot tell that the connection is open.
    let (settings, now) = (world.settings_now(), world.now());
    let asked = |(key, half): &(FlowKey<A>, Session<A>)| {
        sweep::session_may_be_over(key, half, &settings, now)
    };
    assert_eq!(
        world.sessions.all().iter().filter(|it| asked(it)).count(),
        1
    );
    assert_eq!(sweep_all(&world), [0, 0]);
    // A stream in one direction keeps both halves.
    for _ in 0..100 {
        world.wait(Ticks::from_seconds(100));
        world
            .world_sends(&flags(server(), false, true))
            .forwarded(Reason::Translated);
        assert_eq!(sweep_all(&world), [0, 0]);
    }
    world.wait(all_of(timeouts.tcp_established));
    assert_eq!(sweep_all(&world), [1, 0]);
}
both_families!(live_sessions_stay);

fn half_a_session_goes_too<A: Version>() {
    for from_outside in [false, true] {
        let world = World::<A>::new();
        let packet = udp(at(A::GUEST, 40000), at(A::SERVER, 53)).build();
        world.guest_sends(TAP, &packet);
        let halves = world.sessions.all();
        let (lost, _) = halves
            .iter()
            .find(|(key, _)| key.arrival.device().is_none() == from_outside)
            .unwrap();
        // Uncounted, as whoever removes a half does.
        world.sessions.remove(lost);
        if !from_outside {
            world.count_off_guest(A::GUEST);
            let outside = endpoint(A::OUTSIDE, 40000, protocol::UDP);
            world.mappings.get(&outside).unwrap().sessions -= 1;
        }
        world.wait(all_of(world.timeouts().udp));
        assert_eq!(sweep_all(&world), [1, 0]);
        assert_eq!(world.sessions.len(), 0);
    }
}
both_families!(half_a_session_goes_too);

fn a_session_between_guests_goes_once<A: Version>() {
    let world = World::<A>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(
        SECOND_TAP,
        &udp(at(A::OTHER_GUEST, 50000), at(A::SERVER, 53)).build(),
    );
    world
        .guest_sends(
            TAP,
            &udp(at(A::GUEST, 40000), at(A::OUTSIDE, 50000)).build(),
        )
        .forwarded(Reason::HairpinStarted);
    world.wait(all_of(world.timeouts().udp));
    assert_eq!(sweep_all(&world), [2, 0]);
    assert_eq!(world.sessions.len(), 0);
}
both_families!(a_session_between_guests_goes_once);

fn ports_that_must_not_be_handed_out_stay_marked<A: Version>() {
    let world = World::<A>::new();
    let port = |port, number| sweep::port(&endpoint(A::OUTSIDE, port, number), &world);
    let set = |port| world.port_set(Class::Udp, port);
    world.guest_sends(TAP, &udp(at(A::GUEST, 40000), at(A::SERVER, 53)).build());
    for marked in [40000, 40002, 500] {
        set(marked).take(marked);
    }
    // UDP-Lite has its ports in common with UDP.
    for number in [protocol::UDP, protocol::UDP_LITE] {
        assert!(!port(40000, number), "a guest has it");
        assert!(!port(500, number), "the host has it");
    }
    assert!(!port(40001, protocol::GRE), "has no ports");
    assert!(port(40002, protocol::UDP));
    let taken = [40000, 40002, 500].map(|port| set(port).is_taken(port));
    assert_eq!(taken, [true, false, true]);
    // Of an address that is not in the pool nothing is marked.
    assert!(!sweep::port(
        &endpoint(A::SERVER, 40004, protocol::UDP),
        &world
    ));
}
both_families!(ports_that_must_not_be_handed_out_stay_marked);

fn a_guest_with_sessions_is_not_forgotten<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &ping(A::GUEST, A::SERVER, 1).build());
    world.world_sends(&pong(A::SERVER, A::OUTSIDE, 1).build());
    assert!(!sweep::guest(A::GUEST, &world));
    assert_eq!(world.guests.len(), 1);
}
both_families!(a_guest_with_sessions_is_not_forgotten);

/// A guest wants the port at every moment of its mapping's removal, be it the
/// guest that had it or another one: it gets that port or one of its own, never
/// two for one inside endpoint, and none that is another guest's.
fn a_guest_that_comes_meanwhile_has_one_mapping<A: Version>() {
    for newcomer in [A::GUEST, A::NEIGHBOUR] {
        for moment in 0.. {
            if !comes_meanwhile(newcomer, moment) {
                assert!(moment > 6, "the removal takes more steps");
                break;
            }
        }
    }
}
both_families!(a_guest_that_comes_meanwhile_has_one_mapping);

/// Whether the removal of the guest's mapping took so many steps.
fn comes_meanwhile<A: Version>(newcomer: A, moment: usize) -> bool {
    let world = World::<A>::new();
    world.guest_sends(TAP, &udp(at(A::GUEST, 40000), at(A::SERVER, 53)).build());
    world.wait(all_of(world.timeouts().udp));
    assert_eq!(sweep_all(&world), [1, 0]);
    world.wait(world.timeouts().port_rest);
    world.intrude(moment, move |world| {
        world
            .guest_sends(TAP, &udp(at(newcomer, 40000), at(A::SERVER, 53)).build())
            .forwarded(Reason::SessionStarted);
    });
    let outside = endpoint(A::OUTSIDE, 40000, protocol::UDP);
    world.act(|| sweep::mapping(&outside, &world));
    let intruded = world.intruded();
    let seen = |guest, remote| {
        let packet = udp(at(guest, 40000), remote).build();
        source(world.guest_sends(TAP, &packet).sent.unwrap().frame.ip())
    };
    let first = seen(newcomer, at(A::SERVER, 53));
    assert_eq!(
        first,
        seen(newcomer, at(A::OTHER_SERVER, 53)),
        "{newcomer:?} at {moment}"
    );
    let mappings = world.mappings.all();
    let own = |(_, mapping): &&(EndpointKey<A>, Mapping<A>)| mapping.inside.address == newcomer;
    assert_eq!(
        mappings.iter().filter(own).count(),
        1,
        "{newcomer:?} at {moment}"
    );
    for other in [
        // A third guest on the tap.
        A::inside(0, 12),
        if newcomer == A::GUEST {
            A::NEIGHBOUR
        } else {
            A::GUEST
        },
    ] {
        assert_ne!(
            seen(other, at(A::SERVER, 53)),
            first,
            "{newcomer:?} at {moment}"
        );
    }
    // Nothing is left locked.
    world.wait(all_of(world.timeouts().udp));
    world.wait(world.timeouts().port_rest);
    world.wait_slack();
    sweep_all(&world);
    assert_eq!(
        world.mappings.len() + world.inside.len(),
        0,
        "{newcomer:?} at {moment}"
    );
    intruded
}

/// A port rests after its mapping is over, so that a guest which takes another one each
/// time holds more of them than it has sessions.
fn a_guest_that_never_uses_a_port_twice_leaves_others_theirs<A: Version>() {
    let world = World::<A>::new();
    world.withhold(|port| !(20_000..21_000).contains(port));
    world.set(|settings| {
        settings.guest_max_sessions = 500;
        settings.guest_max_ports = 250;
        settings.timeouts.udp = Ticks::from_seconds(60);
    });
    let start = |guest, port| {
        let packet = udp(at(guest, port), at(A::SERVER, 53)).build();
        world.guest_sends(TAP, &packet).reason
    };
    let mut ports = 1024..;
    for _ in 0..6 {
        for port in ports.by_ref().take(600) {
            start(A::GUEST, port);
        }
        let other = start(A::NEIGHBOUR, ports.start);
        assert_eq!(other, Reason::SessionStarted);
        world.wait_seconds(70);
        sweep_all(&world);
    }
}
both_families!(a_guest_that_never_uses_a_port_twice_leaves_others_theirs);
