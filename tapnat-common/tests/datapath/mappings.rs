//! Mappings and outside ports: endpoint-independent or not, which port is
//! chosen, what happens when they run out.

use std::collections::HashSet;

use tapnat_common::{abi::MappingMode, net::protocol, ports::Class, verdict::Reason};

use crate::support::{
    network::{
        SECOND_TAP, TAP, Version, at, both_families, destination, endpoint, icmp_error, ip, ping,
        pong, source, tcp, udp,
    },
    world::World,
};

/// The outside port of a guest's datagram to the server.
#[track_caller]
fn outside_port<A: Version>(world: &World<A>, guest: A, port: u16) -> u16 {
    let packet = udp(at(guest, port), at(A::SERVER, 53)).build();
    source(
        &world
            .guest_sends(TAP, &packet)
            .forwarded(Reason::SessionStarted),
    )
    .port()
}

/// The random number with which the datapath comes to try this port last.
fn chance_of(port: u16) -> u32 {
    if port < 1024 {
        port.into()
    } else {
        u32::from(port) - 1024
    }
}

fn one_socket_has_one_outside_endpoint_for_all_remotes<A: Version>() {
    let world = World::<A>::new();
    let remotes = [
        at(A::SERVER, 53),
        at(A::SERVER, 54),
        at(A::OTHER_SERVER, 53),
        at(A::OTHER_SERVER, 54),
    ];
    // The port is not preserved, so that it is the mapping that keeps it.
    outside_port(&world, A::NEIGHBOUR, 40000);
    let seen: HashSet<_> = remotes
        .iter()
        .map(|remote| {
            let packet = udp(at(A::GUEST, 40000), *remote).build();
            source(
                &world
                    .guest_sends(TAP, &packet)
                    .forwarded(Reason::SessionStarted),
            )
        })
        .collect();
    assert_eq!(seen.len(), 1);
    assert_eq!(world.mappings.len(), 2);
    assert!(!seen.contains(&at(A::OUTSIDE, 40000)));
}
both_families!(one_socket_has_one_outside_endpoint_for_all_remotes);

fn protocols_have_mappings_of_their_own<A: Version>() {
    let world = World::<A>::new();
    for packet in [
        udp(at(A::GUEST, 40000), at(A::SERVER, 53)),
        tcp(at(A::GUEST, 40000), at(A::SERVER, 53), "S"),
        ping(A::GUEST, A::SERVER, 40000),
    ] {
        let sent = world
            .guest_sends(TAP, &packet.build())
            .forwarded(Reason::SessionStarted);
        assert_eq!(source(&sent), at(A::OUTSIDE, 40000));
    }
    assert_eq!(world.mappings.len(), 3);
}
both_families!(protocols_have_mappings_of_their_own);

fn a_taken_port_is_replaced_by_one_of_its_kind<A: Version>() {
    for port in [1024, 40000, 40001, 65535] {
        let world = World::<A>::new();
        assert_eq!(outside_port(&world, A::GUEST, port), port);
        let other = outside_port(&world, A::NEIGHBOUR, port);
        assert_ne!(other, port);
        assert_eq!(other % 2, port % 2, "parity is kept");
        assert!(other >= 1024, "and the range");
    }
    for port in [1, 512, 600, 1023] {
        let world = World::<A>::new();
        world.withhold(|port| *port < 1);
        assert_eq!(outside_port(&world, A::GUEST, port), port);
        let other = outside_port(&world, A::NEIGHBOUR, port);
        assert_ne!(other, port);
        assert_eq!((other % 2, other < 1024), (port % 2, true));
    }
}
both_families!(a_taken_port_is_replaced_by_one_of_its_kind);

fn other_kinds_are_better_than_none<A: Version>() {
    // No low ports are left: NTP's port goes to a high one.
    let world = World::<A>::new();
    let port = outside_port(&world, A::GUEST, 123);
    assert!(port >= 1024);
    // Of the wrong parity only.
    let world = World::<A>::new();
    world.withhold(|port| *port != 50_001);
    assert_eq!(outside_port(&world, A::GUEST, 40_000), 50_001);
}
both_families!(other_kinds_are_better_than_none);

fn ports_are_not_handed_out_in_a_row<A: Version>() {
    // RFC 6056: who sees one does not know the next.
    let world = World::<A>::new();
    outside_port(&world, A::inside(0, 200), 40000);
    let mut ports = Vec::new();
    for guest in 20..40 {
        let guest = A::inside(0, guest);
        ports.push(outside_port(&world, guest, 40000));
    }
    let steps: HashSet<_> = ports
        .windows(2)
        .map(|pair| pair[1].wrapping_sub(pair[0]))
        .collect();
    assert!(steps.len() > 10, "{ports:?}");
}
both_families!(ports_are_not_handed_out_in_a_row);

fn the_last_free_port_is_found_and_then_there_is_none<A: Version>() {
    for last in [1024_u16, 30_000, 30_001, 65_534, 65_535] {
        let world = World::<A>::new();
        world.withhold(|port| *port != last);
        assert_eq!(outside_port(&world, A::GUEST, 40_000), last);
        let exit = world.guest_sends(
            TAP,
            &udp(at(A::NEIGHBOUR, 40_000), at(A::SERVER, 53)).build(),
        );
        assert_eq!(exit.reason, Reason::PortsExhausted);
        // Who has it keeps it.
        let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
        assert!(exit.quick);
        let exit = world.guest_sends(
            TAP,
            &udp(at(A::GUEST, 40_000), at(A::OTHER_SERVER, 53)).build(),
        );
        assert_eq!(exit.reason, Reason::SessionStarted);
        // TCP's and ICMP's are others.
        let exit = world.guest_sends(
            TAP,
            &tcp(at(A::GUEST, 40_000), at(A::SERVER, 53), "S").build(),
        );
        assert_eq!(exit.reason, Reason::SessionStarted);
    }
}
both_families!(the_last_free_port_is_found_and_then_there_is_none);

fn a_nearly_full_pool_is_handed_out_to_the_last_port<A: Version>() {
    // 99.9% of the ports are the host's.
    let world = World::<A>::new();
    let free = |port: u16| port % 1000 == 7 && port >= 1024;
    world.withhold(|port| !free(*port));
    let wanted = (1024..=u16::MAX).filter(|port| free(*port)).count();
    let got: HashSet<_> = (0..wanted)
        .map(|number| outside_port(&world, A::GUEST, 2000 + u16::try_from(number).unwrap()))
        .collect();
    assert_eq!(got.len(), wanted);
    assert!(got.into_iter().all(free));
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 1999), at(A::SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::PortsExhausted);
}
both_families!(a_nearly_full_pool_is_handed_out_to_the_last_port);

fn withheld_ports_are_never_handed_out<A: Version>() {
    let world = World::<A>::new();
    let withheld = |port: &u16| *port < 1024 || (32_768..60_000).contains(port);
    world.withhold(withheld);
    for number in 0..400 {
        let port = outside_port(&world, A::GUEST, 33_000 + number);
        assert!(!withheld(&port), "{port}");
    }
}
both_families!(withheld_ports_are_never_handed_out);

fn a_port_that_a_socket_of_the_host_listens_on_is_not_handed_out<A: Version>() {
    let world = World::<A>::new();
    let nobody = endpoint(A::UNSPECIFIED, 0, protocol::UDP);
    world
        .sockets
        .borrow_mut()
        .push((endpoint(A::OUTSIDE, 40_000, protocol::UDP), nobody));
    let port = outside_port(&world, A::GUEST, 40_000);
    assert_ne!(port, 40_000);
    // In TCP nobody listens there.
    let sent = world
        .guest_sends(
            TAP,
            &tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "S").build(),
        )
        .forwarded(Reason::SessionStarted);
    assert_eq!(source(&sent).port(), 40_000);
}
both_families!(a_port_that_a_socket_of_the_host_listens_on_is_not_handed_out);

fn a_freed_port_rests_before_another_guest_gets_it<A: Version>() {
    let world = World::<A>::new();
    let only = 30_000;
    world.withhold(|port| *port != only);
    assert_eq!(outside_port(&world, A::GUEST, 40_000), only);
    let timeouts = world.timeouts();
    world.wait(timeouts.udp);
    world.wait_slack();
    let try_again = || {
        // Chance leads to it at once, so that only its rest is in the way.
        world.chances.borrow_mut().extend([chance_of(only); 32]);
        world
            .guest_sends(
                TAP,
                &udp(at(A::NEIGHBOUR, 40_000), at(A::SERVER, 53)).build(),
            )
            .reason
    };
    assert_eq!(try_again(), Reason::PortsExhausted);
    world.wait_seconds(118);
    assert_eq!(try_again(), Reason::PortsExhausted);
    world.wait_seconds(3);
    assert_eq!(try_again(), Reason::SessionStarted);
    assert_eq!(world.mappings.len(), 1);
    assert_eq!(world.inside.len(), 1, "nothing of the old one is left");
}
both_families!(a_freed_port_rests_before_another_guest_gets_it);

fn the_guest_itself_may_reuse_its_port_at_once<A: Version>() {
    let world = World::<A>::new();
    let only = 30_000;
    world.withhold(|port| *port != only);
    outside_port(&world, A::GUEST, 40_000);
    world.wait(world.timeouts().udp);
    world.wait_seconds(1);
    // By the same socket, and by another one.
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::SessionStarted);
    world.wait(world.timeouts().udp);
    world.wait_slack();
    world.chances.borrow_mut().extend([chance_of(only); 32]);
    assert_eq!(outside_port(&world, A::GUEST, 40_002), only);
}
both_families!(the_guest_itself_may_reuse_its_port_at_once);

fn every_expired_mapping_can_be_found_by_chance<A: Version>() {
    for expired in [1024_u16, 2048, 30_001, 65_535] {
        let world = World::<A>::new();
        world.withhold(|port| *port != expired);
        outside_port(&world, A::GUEST, 40_000);
        world.wait_seconds(1000);
        world.chances.borrow_mut().extend([chance_of(expired); 32]);
        assert_eq!(outside_port(&world, A::NEIGHBOUR, 40_000), expired);
    }
}
both_families!(every_expired_mapping_can_be_found_by_chance);

fn hints_that_are_wrong_are_set_right<A: Version>() {
    let world = World::<A>::new();
    for guest in 1..=4 {
        let guest = A::inside(0, 100 + guest);
        outside_port(&world, guest, 40_000);
    }
    // Marked as free, all of them, while mappings have them.
    let taken: Vec<u16> = world
        .mappings
        .all()
        .iter()
        .map(|(outside, _)| outside.port.get())
        .collect();
    for port in &taken {
        world.port_set(Class::Udp, *port).release(*port);
    }
    let port = outside_port(&world, A::GUEST, 40_000);
    assert!(!taken.contains(&port));
    assert!(world.port_set(Class::Udp, 40_000).is_taken(40_000));
}
both_families!(hints_that_are_wrong_are_set_right);

fn one_guest_has_one_outside_address<A: Version>() {
    // Paired pooling (RFC 4787 REQ-2).
    let world = World::<A>::new();
    let pool: Vec<_> = (1..=4).map(|last| A::uplink(last)).collect();
    world.set(|settings| {
        settings.outside_count = 4;
        for (place, address) in settings.outside.iter_mut().zip(&pool) {
            *place = *address;
        }
    });
    let mut used = HashSet::new();
    for guest in 2..60 {
        let guest = A::inside(0, guest);
        let addresses: HashSet<_> = (0..8)
            .map(|number| {
                let packet = if number % 2 == 0 {
                    udp(at(guest, 4000 + number), at(A::SERVER, 53))
                } else {
                    tcp(at(guest, 4000 + number), at(A::OTHER_SERVER, 80), "S")
                };
                let exit = world.guest_sends(TAP, &packet.build());
                source(&exit.forwarded(Reason::SessionStarted)).ip()
            })
            .collect();
        assert_eq!(addresses.len(), 1);
        used.extend(addresses);
    }
    let all: HashSet<_> = pool.into_iter().map(ip).collect();
    assert_eq!(used, all, "and the pool is used");
}
both_families!(one_guest_has_one_outside_address);

fn without_an_outside_address_nothing_leaves<A: Version>() {
    let world = World::<A>::new();
    world.set(|settings| settings.outside_count = 0);
    let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    assert_eq!(
        world.guest_sends(TAP, &packet).reason,
        Reason::NoOutsideAddress
    );
    world.set(|settings| {
        settings.outside_count = 1;
        settings.outside[0] = A::UNSPECIFIED;
    });
    assert_eq!(
        world.guest_sends(TAP, &packet).reason,
        Reason::NoOutsideAddress
    );
}
both_families!(without_an_outside_address_nothing_leaves);

fn identifiers_are_preserved_if_free_but_never_zero<A: Version>() {
    let world = World::<A>::new();
    let identifier = |guest, identifier| {
        let exit = world.guest_sends(TAP, &ping(guest, A::SERVER, identifier).build());
        source(&exit.forwarded(Reason::SessionStarted)).port()
    };
    for wanted in [1, 2, 1023, 1024, 65_535] {
        assert_eq!(identifier(A::GUEST, wanted), wanted);
        assert_ne!(identifier(A::NEIGHBOUR, wanted), wanted);
    }
    // 0 would stand for pings of the host itself.
    assert_ne!(identifier(A::GUEST, 0), 0);
    // All low even ones but 0 are taken.
    let world = World::<A>::new();
    for number in (2..1024).step_by(2) {
        world.port_set(Class::Icmp, number).take(number);
    }
    let exit = world.guest_sends(TAP, &ping(A::GUEST, A::SERVER, 0).build());
    let sent = exit.forwarded(Reason::SessionStarted);
    assert_ne!(source(&sent).port(), 0);
}
both_families!(identifiers_are_preserved_if_free_but_never_zero);

fn what_has_no_identifier_is_not_taken_for_a_query_with_0<A: Version>() {
    let world = World::<A>::new();
    let exit = world.guest_sends(TAP, &ping(A::GUEST, A::SERVER, 0).build());
    exit.forwarded(Reason::SessionStarted);
    let exit = world.guest_sends(TAP, &pong(A::GUEST, A::SERVER, 0).build());
    assert_eq!(exit.reason, Reason::IcmpTypeNotCarried);
    // Nor is what has none, neither query nor error.
    let solicitation = icmp_error(A::GUEST, A::SERVER, A::OTHER_KIND, b"");
    let exit = world.guest_sends(TAP, &solicitation.build());
    assert_eq!(exit.reason, Reason::IcmpTypeNotCarried);
    // Nor is an error about a query that the guest got, which it did not.
    let quoted = ping(A::SERVER, A::GUEST, 0).build();
    let error = icmp_error(A::GUEST, A::SERVER, A::HOST_UNREACHABLE, &quoted);
    let exit = world.guest_sends(TAP, &error.build());
    assert_eq!(exit.reason, Reason::ErrorWithoutSession);
}
both_families!(what_has_no_identifier_is_not_taken_for_a_query_with_0);

fn a_mapping_follows_its_guest_to_another_device<A: Version>() {
    let world = World::<A>::new();
    let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    world.guest_sends(TAP, &packet);
    // The guest's network is now on the other device.
    let address = |world: &World<A>, device, first| {
        world.set_device(device, |device| {
            device.address = A::inside(first, 1);
            device.network = device.address;
        });
    };
    address(&world, TAP, 9);
    address(&world, SECOND_TAP, 0);
    let exit = world.guest_sends(
        SECOND_TAP,
        &udp(at(A::GUEST, 40_000), at(A::OTHER_SERVER, 53)).build(),
    );
    assert_eq!(
        source(&exit.forwarded(Reason::SessionStarted)),
        at(A::OUTSIDE, 40_000)
    );
    let mapping = world
        .mappings
        .copy(&endpoint(A::OUTSIDE, 40_000, protocol::UDP))
        .unwrap();
    assert_eq!(mapping.device, SECOND_TAP.get());
}
both_families!(a_mapping_follows_its_guest_to_another_device);

fn address_and_port_dependent_mapping_shares_ports_between_remotes<A: Version>() {
    let world = World::<A>::new();
    world.set_mapping(MappingMode::AddressAndPortDependent);
    world.withhold(|port| !(30_000..30_004).contains(port));
    let port = |guest, tap, wanted, remote| {
        let exit = world.guest_sends(tap, &udp(at(guest, wanted), remote).build());
        (exit.reason == Reason::SessionStarted)
            .then(|| source(&exit.forwarded(Reason::SessionStarted)).port())
    };
    // Preserved if free, also when another remote has it.
    assert_eq!(port(A::GUEST, TAP, 30_000, at(A::SERVER, 53)), Some(30_000));
    assert_eq!(
        port(A::NEIGHBOUR, TAP, 30_000, at(A::SERVER, 54)),
        Some(30_000)
    );
    assert_eq!(
        port(A::NEIGHBOUR, TAP, 30_000, at(A::OTHER_SERVER, 53)),
        Some(30_000)
    );
    // Never two sessions on one tuple; the parity is kept as long as possible.
    assert_eq!(
        port(A::OTHER_GUEST, SECOND_TAP, 30_000, at(A::SERVER, 53)),
        Some(30_002)
    );
    assert_eq!(
        port(A::NEIGHBOUR, TAP, 30_002, at(A::SERVER, 53)),
        Some(30_001)
    );
    assert_eq!(world.mappings.len(), 0);
    // The replies find their guests.
    for (to, guest, remote) in [
        (30_000, A::GUEST, at(A::SERVER, 53)),
        (30_000, A::NEIGHBOUR, at(A::SERVER, 54)),
        (30_002, A::OTHER_GUEST, at(A::SERVER, 53)),
    ] {
        let reply = world
            .world_sends(&udp(remote, at(A::OUTSIDE, to)).build())
            .forwarded(Reason::Translated);
        assert_eq!(destination(&reply), at(guest, 30_000));
    }
}
both_families!(address_and_port_dependent_mapping_shares_ports_between_remotes);

fn a_port_for_one_remote_is_free_again_when_its_session_is_over<A: Version>() {
    let world = World::<A>::new();
    world.set_mapping(MappingMode::AddressAndPortDependent);
    world.withhold(|port| *port != 30_000);
    let packet = |guest| udp(at(guest, 30_000), at(A::SERVER, 53)).build();
    world.guest_sends(TAP, &packet(A::GUEST));
    let exit = world.guest_sends(TAP, &packet(A::NEIGHBOUR));
    assert_eq!(exit.reason, Reason::PortsExhausted);
    world.wait_seconds(302);
    let exit = world.guest_sends(TAP, &packet(A::NEIGHBOUR));
    assert_eq!(exit.reason, Reason::SessionStarted);
    assert_eq!(world.sessions.len(), 2, "the old one made way");
}
both_families!(a_port_for_one_remote_is_free_again_when_its_session_is_over);
