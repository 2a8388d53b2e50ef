//! While nobody sweeps, what is over is found by the packets that begin sessions, few of
//! it by each, and what is alive stays.

use std::net::SocketAddr;

use tapnat_common::{
    abi::{EVERY_DEVICE, Guest, MOST_GUESTS, Mapping, MappingMode, mapping_flags},
    nat::{STAMP_AFTER, Tables as _, upkeep::UNATTENDED_AFTER},
    net::protocol,
    ports::Class,
    time::Ticks,
    verdict::Reason,
};

use crate::support::{
    network::{SECOND_TAP, TAP, Version, at, both_families, endpoint, ping, tcp, udp},
    world::World,
};

/// A world whose process is gone, in which each guest may have so many sessions and ports.
fn unattended<A: Version>(limit: u32) -> World<A> {
    let world = World::<A>::new();
    limit_guests(&world, limit);
    leave_alone(&world);
    world
}

fn limit_guests<A: Version>(world: &World<A>, limit: u32) {
    world.set(|settings| {
        settings.guest_max_sessions = limit;
        settings.guest_max_ports = limit;
    });
}

/// Ends the process, and lets the time pass that the datapath waits for another one.
fn leave_alone<A: Version>(world: &World<A>) {
    assert!(world.upkeep().is_some());
    world.is_attended.set(false);
    world.wait(UNATTENDED_AFTER);
}

/// Lets every datagram's session end, and the port of its mapping rest.
fn wait_for_all<A: Version>(world: &World<A>) {
    let timeouts = world.timeouts();
    world.wait(timeouts.udp.plus(STAMP_AFTER));
    world.wait_slack();
    world.wait(timeouts.port_rest);
}

#[track_caller]
fn datagram<A: Version>(world: &World<A>, from: SocketAddr, to: SocketAddr) -> Reason {
    world.guest_sends(TAP, &udp(from, to).build()).reason
}

fn a_guest_goes_on_beginning_sessions_for_ever<A: Version>() {
    for class in [Class::Tcp, Class::Udp, Class::Icmp] {
        let world = unattended::<A>(10);
        for number in 0..200 {
            let port = 20_000 + number;
            let packet = match class {
                Class::Tcp => tcp(at(A::GUEST, port), at(A::SERVER, 80), "S"),
                Class::Udp => udp(at(A::GUEST, port), at(A::SERVER, 53)),
                Class::Icmp => ping(A::GUEST, A::SERVER, port),
            };
            let exit = world.guest_sends(TAP, &packet.build());
            assert_eq!(exit.reason, Reason::SessionStarted, "{class:?} {number}");
            // Ten of them last for longer than they live and rest.
            world.wait_seconds(80);
        }
        let [halves, mappings, ..] = world.sizes();
        assert!(halves <= 20 && mappings <= 10, "{halves} {mappings}");
        assert!(!world.port_set(class, 20_000).is_taken(20_000));
    }
}
both_families!(a_guest_goes_on_beginning_sessions_for_ever);

fn while_somebody_sweeps_nothing_is_collected<A: Version>() {
    let world = World::<A>::new();
    limit_guests(&world, 10);
    for port in 20_000..20_010 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    wait_for_all(&world);
    let again = || datagram(&world, at(A::GUEST, 30_000), at(A::SERVER, 53));
    assert_eq!(again(), Reason::GuestSessionLimit);
    assert_eq!(world.sessions.len(), 20);
    // It may be starting anew, or have no processor.
    world.upkeep();
    world.is_attended.set(false);
    world.wait_seconds(14);
    assert_eq!(again(), Reason::GuestSessionLimit);
    world.wait_seconds(1);
    assert_eq!(again(), Reason::SessionStarted);
    // And when it comes back, the rest is its.
    world.is_attended.set(true);
    let left = world.sessions.len();
    for port in 30_001..30_005 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    assert_eq!(world.sessions.len(), left + 8);
}
both_families!(while_somebody_sweeps_nothing_is_collected);

fn what_was_open_when_the_process_ended_is_found<A: Version>() {
    let world = World::<A>::new();
    limit_guests(&world, 100);
    for port in 20_000..20_100 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    wait_for_all(&world);
    leave_alone(&world);
    for port in 30_000..30_100 {
        let reason = datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
        assert_eq!(reason, Reason::SessionStarted, "{port}");
    }
    assert_eq!(world.sizes(), [200, 100, 100, 0, 1]);
}
both_families!(what_was_open_when_the_process_ended_is_found);

fn sessions_of_one_socket_are_found_one_by_one<A: Version>() {
    let world = unattended::<A>(10);
    for number in 10_u8..160 {
        let server = at(A::world(number), 53);
        let reason = datagram(&world, at(A::GUEST, 20_000), server);
        assert_eq!(reason, Reason::SessionStarted, "{number}");
        world.wait_seconds(60);
    }
    assert!(world.sessions.len() <= 20 && world.looked_after.borrow().len() <= 10);
}
both_families!(sessions_of_one_socket_are_found_one_by_one);

fn sessions_without_a_mapping_are_found<A: Version>() {
    let world = unattended::<A>(10);
    world.set_mapping(MappingMode::AddressAndPortDependent);
    for port in 20_000..20_150 {
        let reason = datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
        assert_eq!(reason, Reason::SessionStarted, "{port}");
        world.wait_seconds(60);
    }
    assert!(world.sessions.len() <= 20 && world.looked_after.borrow().len() <= 10);
}
both_families!(sessions_without_a_mapping_are_found);

fn sessions_that_come_in_by_a_forward_are_found<A: Version>() {
    let world = unattended::<A>(0);
    let forward = Mapping {
        inside: endpoint(A::GUEST, 80, protocol::UDP),
        device: TAP.get(),
        flags: mapping_flags::STATIC,
        ..Mapping::default()
    };
    let outside = endpoint(A::OUTSIDE, 8080, protocol::UDP);
    world.mappings.insert(&outside, &forward);
    world.inside.insert(&forward.inside, &outside);
    for port in 20_000..20_150 {
        let exit = world.world_sends(&udp(at(A::SERVER, port), at(A::OUTSIDE, 8080)).build());
        assert_eq!(exit.reason, Reason::SessionAdmitted, "{port}");
        world.wait_seconds(60);
    }
    assert!(world.sessions.len() <= 20, "{}", world.sessions.len());
    assert_eq!(world.mappings.len(), 1);
}
both_families!(sessions_that_come_in_by_a_forward_are_found);

fn sessions_between_guests_are_found<A: Version>() {
    let world = unattended::<A>(20);
    // The second guest lets the first one in.
    let second = at(A::OTHER_GUEST, 5000);
    for port in 20_000..20_150 {
        let first = at(A::GUEST, port);
        datagram(&world, first, at(A::SERVER, 53));
        world.guest_sends(SECOND_TAP, &udp(second, at(A::OUTSIDE, port)).build());
        let reason = datagram(&world, first, at(A::OUTSIDE, 5000));
        let is_through = matches!(reason, Reason::HairpinStarted | Reason::Translated);
        assert!(is_through, "{port}: {reason:?}");
        world.wait_seconds(100);
    }
    assert!(world.sessions.len() <= 80, "{}", world.sessions.len());
}
both_families!(sessions_between_guests_are_found);

fn what_is_alive_stays<A: Version>() {
    let world = unattended::<A>(100);
    let long = tcp(at(A::NEIGHBOUR, 40_000), at(A::SERVER, 80), "S");
    world.guest_sends(TAP, &long.build());
    world.world_sends(&tcp(at(A::SERVER, 80), at(A::OUTSIDE, 40_000), "SA").build());
    world.guest_sends(
        TAP,
        &tcp(at(A::NEIGHBOUR, 40_000), at(A::SERVER, 80), "A").build(),
    );
    // Two of a mapping, of which the one that was opened last is not in the way.
    for server in [A::SERVER, A::OTHER_SERVER] {
        datagram(&world, at(A::NEIGHBOUR, 41_000), at(server, 53));
    }
    for port in 0..900 {
        datagram(&world, at(A::GUEST, 20_000 + port), at(A::SERVER, 53));
        world.wait_seconds(3);
        if port % 60 == 0 {
            for server in [A::SERVER, A::OTHER_SERVER] {
                let reason = datagram(&world, at(A::NEIGHBOUR, 41_000), at(server, 53));
                assert_eq!(reason, Reason::Translated, "{port} {server:?}");
            }
        }
    }
    let exit = world.world_sends(&tcp(at(A::SERVER, 80), at(A::OUTSIDE, 40_000), "A").build());
    assert_eq!(exit.reason, Reason::Translated);
    assert!(world.looked_after.borrow().len() <= 2);
}
both_families!(what_is_alive_stays);

fn a_full_table_gets_room<A: Version>() {
    let world = World::<A>::new();
    for port in 20_000..20_050 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    world.sessions.fill();
    world.mappings.fill();
    wait_for_all(&world);
    let again = |port| datagram(&world, at(A::NEIGHBOUR, port), at(A::SERVER, 53));
    assert_eq!(again(30_000), Reason::MappingTableFull);
    leave_alone(&world);
    for port in 30_000..30_050 {
        // The first may not come as far as to what is over.
        assert!(
            again(port) == Reason::SessionStarted || port < 30_010,
            "{port}"
        );
    }
}
both_families!(a_full_table_gets_room);

/// Has the neighbour hold these UDP ports for a week.
fn hold<A: Version>(world: &World<A>, ports: std::ops::Range<u16>) {
    let guest = Guest {
        ports: u32::from(ports.end - ports.start),
        device: TAP.get(),
        ..Guest::default()
    };
    world.know(A::NEIGHBOUR, &guest);
    for port in ports {
        let mapping = Mapping {
            inside: endpoint(A::NEIGHBOUR, port, protocol::UDP),
            device: TAP.get(),
            expires_at: world.now().after(Ticks::from_seconds(7 * 24 * 3600)),
            ..Mapping::default()
        };
        let outside = endpoint(A::OUTSIDE, port, protocol::UDP);
        world.mappings.insert(&outside, &mapping);
        world.inside.insert(&mapping.inside, &outside);
        world.port_set(Class::Udp, port).take(port);
    }
}

fn a_guest_with_few_ports_does_not_wait_for_those_of_others<A: Version>() {
    let world = World::<A>::new();
    limit_guests(&world, 10);
    hold(&world, 1024..5120);
    for port in 20_000..20_010 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    wait_for_all(&world);
    leave_alone(&world);
    for port in 30_000..30_040 {
        let reason = datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
        assert_eq!(reason, Reason::SessionStarted, "{port}");
        world.wait_seconds(80);
    }
    assert!(world.guests.get(&A::GUEST).unwrap().sessions <= 10);
}
both_families!(a_guest_with_few_ports_does_not_wait_for_those_of_others);

fn a_port_that_is_a_guests_no_more_is_not_taken_for_its_own<A: Version>() {
    let world = unattended::<A>(1);
    datagram(&world, at(A::GUEST, 20_000), at(A::SERVER, 53));
    // As after a race, or a command.
    let noted = world.guests.copy(&A::GUEST).unwrap().own;
    let guest = Guest {
        device: TAP.get(),
        own: noted,
        ..Guest::default()
    };
    world.know(A::NEIGHBOUR, &guest);
    world.set(|settings| settings.guest_max_sessions = 1);
    world.guests.get(&A::NEIGHBOUR).unwrap().ports = 0;
    wait_for_all(&world);
    assert_eq!(
        datagram(&world, at(A::NEIGHBOUR, 30_000), at(A::SERVER, 53)),
        Reason::SessionStarted
    );
    for _ in 0..2 {
        datagram(&world, at(A::NEIGHBOUR, 30_001), at(A::SERVER, 53));
    }
    let own = world.guests.copy(&A::NEIGHBOUR).unwrap().own;
    assert!(own.iter().all(|port| !noted.contains(port) || *port == 0));
}
both_families!(a_port_that_is_a_guests_no_more_is_not_taken_for_its_own);

fn what_was_permitted_goes_with_the_session<A: Version>() {
    let world = unattended::<A>(10);
    // One socket that talks to many, and sockets that talk to a second one.
    for number in 10_u8..110 {
        datagram(&world, at(A::GUEST, 20_000), at(A::world(number), 53));
        let other = at(A::GUEST, 21_000 + u16::from(number));
        for server in [A::SERVER, A::OTHER_SERVER] {
            datagram(&world, other, at(server, 53));
        }
        world.wait_seconds(200);
    }
    let [halves, _, _, permissions, _] = world.sizes();
    assert!(halves <= 20 && permissions <= 10, "{halves} {permissions}");
}
both_families!(what_was_permitted_goes_with_the_session);

fn sessions_are_forgotten_also_while_their_remote_stays_permitted<A: Version>() {
    let world = unattended::<A>(0);
    let socket = at(A::GUEST, 20_000);
    for port in 1000..1300 {
        // One with each of two that stays, the second of which is permitted apart.
        for server in [at(A::SERVER, 53), at(A::OTHER_SERVER, 53)] {
            datagram(&world, socket, server);
        }
        datagram(&world, socket, at(A::OTHER_SERVER, port));
        world.wait_seconds(60);
    }
    assert_eq!(world.permissions.len(), 1);
    assert!(world.sessions.len() <= 30, "{}", world.sessions.len());
    let left = world.looked_after.borrow().len();
    assert!(left <= 15, "{left} are looked after");
    let exit = world.world_sends(&udp(at(A::OTHER_SERVER, 7), at(A::OUTSIDE, 20_000)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
    // Then it goes, too.
    wait_for_all(&world);
    for port in 30_000..30_020 {
        datagram(&world, at(A::NEIGHBOUR, port), at(A::SERVER, 53));
    }
    assert_eq!(world.permissions.len(), 0);
}
both_families!(sessions_are_forgotten_also_while_their_remote_stays_permitted);

fn what_outlives_its_session_for_hours_is_found<A: Version>() {
    let world = unattended::<A>(0);
    let socket = at(A::GUEST, 20_000);
    let send = |server: A, flags| {
        world.guest_sends(TAP, &tcp(socket, at(server, 80), flags).build());
    };
    let servers = [A::SERVER, A::OTHER_SERVER, A::world(9)];
    for server in servers {
        send(server, "S");
        world.world_sends(&tcp(at(server, 80), at(A::OUTSIDE, 20_000), "SA").build());
        send(server, "A");
    }
    let begin_others = |first: u16| {
        for port in first..first + 10 {
            datagram(&world, at(A::NEIGHBOUR, port), at(A::SERVER, 53));
        }
    };
    // The next minutes' resets and the like end it; it was permitted for two hours.
    send(A::OTHER_SERVER, "F");
    world.wait(world.timeouts().tcp_closing.plus(STAMP_AFTER));
    begin_others(30_000);
    assert_eq!(world.permissions.len(), 2);
    assert!(
        world
            .half(
                Some(TAP),
                &tcp(socket, at(A::OTHER_SERVER, 80), "A").build()
            )
            .is_none()
    );
    world.wait(world.timeouts().tcp_established);
    wait_for_all(&world);
    begin_others(31_000);
    assert_eq!(world.permissions.len(), 0);
}
both_families!(what_outlives_its_session_for_hours_is_found);

fn guests_that_are_gone_make_room<A: Version>() {
    let world = unattended::<A>(0);
    let begin = |guest| datagram(&world, at(guest, 20_000), at(A::SERVER, 53));
    begin(A::NEIGHBOUR);
    wait_for_all(&world);
    // While there is room they stay.
    for port in 30_000..30_010 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    assert!(
        world
            .mappings
            .get(&endpoint(A::OUTSIDE, 20_000, protocol::UDP))
            .is_none()
    );
    assert!(world.guests.get(&A::NEIGHBOUR).is_some());

    begin(A::NEIGHBOUR);
    world.know_others(TAP, MOST_GUESTS / 4);
    wait_for_all(&world);
    for port in 31_000..31_010 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    assert!(world.guests.get(&A::NEIGHBOUR).is_none());
    assert_eq!(
        world.guests_on.copy(&EVERY_DEVICE),
        Some(MOST_GUESTS / 4 + 1)
    );
}
both_families!(guests_that_are_gone_make_room);

fn the_clock_may_go_round<A: Version>() {
    let world = unattended::<A>(10);
    for port in 20_000..20_200 {
        let reason = datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
        assert_eq!(reason, Reason::SessionStarted, "{port}");
        world.wait_seconds(24 * 3600);
    }
}
both_families!(the_clock_may_go_round);

fn a_port_that_nobody_has_is_given_back<A: Version>() {
    let world = unattended::<A>(0);
    world.port_set(Class::Udp, 40_000).take(40_000);
    for port in 20_000..20_010 {
        datagram(&world, at(A::GUEST, port), at(A::SERVER, 53));
    }
    assert!(!world.port_set(Class::Udp, 40_000).is_taken(40_000));
    // Not those that are withheld.
    assert!(world.port_set(Class::Udp, 1000).is_taken(1000));
}
both_families!(a_port_that_nobody_has_is_given_back);
