//! No room: every insert that a packet asks for is refused once. Whatever is
//! refused, nothing is left behind that would cost others, nothing leaves
//! untranslated, and what was there goes on.

use tapnat_common::{
    abi::{Filtering, MappingMode},
    nat::{STAMP_AFTER, Tables as _},
    verdict::{Outcome, Reason},
};

use crate::{
    support::{
        network::{SECOND_TAP, TAP, Version, at, both_families, ping, tcp, udp},
        world::{Exit, World},
    },
    sweep::sweep_all,
};

/// Refuses each insert of the packet in turn.
fn refuse_each<A: Version>(setup: impl Fn() -> World<A>, run: impl Fn(&World<A>) -> Exit) {
    for number in 0.. {
        let world = setup();
        let before = world.sizes();
        world.refuse_insert(number);
        let exit = run(&world);
        if !world.insert_was_refused() {
            assert!(number > 0, "the packet inserts nothing");
            return;
        }
        match exit.reason.outcome() {
            // Without a permission only the session itself lets the remote in.
            Outcome::Forward => {
                assert_eq!(world.permissions.len(), before[3]);
            }
            Outcome::Refuse => {
                let [sessions, mappings, ..] = world.sizes();
                assert_eq!(sessions, before[0], "{:?}", exit.reason);
                // A mapping that was made for it has ended.
                for (outside, mapping) in world.mappings.all() {
                    let lives = world.now().is_before(mapping.expires_at);
                    assert!(lives != (mapping.sessions == 0), "{outside:?} {mapping:?}");
                }
                assert!(mappings <= before[1] + 1);
            }
            Outcome::Pass | Outcome::Ask | Outcome::Drop | Outcome::Hold | Outcome::Fragment => {
                panic!("{:?}", exit.reason)
            }
        }
        // With room again, it works.
        let exit = run(&world);
        assert_eq!(exit.reason.outcome(), Outcome::Forward, "{:?}", exit.reason);
    }
}

fn a_first_packet_of_each_protocol<A: Version>() {
    for packet in [
        udp(at(A::GUEST, 40_000), at(A::SERVER, 53)),
        tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "S"),
        ping(A::GUEST, A::SERVER, 7),
    ] {
        refuse_each(World::<A>::new, |world| {
            world.guest_sends(TAP, &packet.build())
        });
    }
}
both_families!(a_first_packet_of_each_protocol);

fn a_second_session_of_a_socket<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
        world
    };
    let packet = udp(at(A::GUEST, 40_000), at(A::OTHER_SERVER, 53)).build();
    refuse_each(setup, |world| world.guest_sends(TAP, &packet));
}
both_families!(a_second_session_of_a_socket);

fn a_session_without_a_mapping<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.set_mapping(MappingMode::AddressAndPortDependent);
        world
    };
    let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    refuse_each(setup, |world| world.guest_sends(TAP, &packet));
}
both_families!(a_session_without_a_mapping);

fn a_session_from_outside<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.set_filtering(Filtering::EndpointIndependent);
        world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
        world
    };
    let packet = udp(at(A::OTHER_SERVER, 53), at(A::OUTSIDE, 40_000)).build();
    refuse_each(setup, |world| world.world_sends(&packet));
}
both_families!(a_session_from_outside);

fn guests_that_meet<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.set_filtering(Filtering::EndpointIndependent);
        let packet = udp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53)).build();
        world.guest_sends(SECOND_TAP, &packet);
        world
    };
    let packet = udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000)).build();
    refuse_each(setup, |world| world.guest_sends(TAP, &packet));
}
both_families!(guests_that_meet);

fn an_expired_port_is_taken_over<A: Version>() {
    let setup = World::<A>::with_one_expired_port;
    let packet = udp(at(A::GUEST, 30_000), at(A::SERVER, 53)).build();
    // Taking over takes several inserts, the former owner's session is gone
    // then, and a second try has to find the port by chance.
    for number in 0.. {
        let world = setup();
        world.refuse_insert(number);
        let exit = world.guest_sends(TAP, &packet);
        if !world.insert_was_refused() {
            assert_eq!(exit.reason, Reason::SessionStarted);
            break;
        }
        assert_ne!(exit.reason.outcome(), Outcome::Pass, "{number}");
        for _ in 0..2 {
            world.chances.borrow_mut().extend([30_000 - 1024; 64]);
            world.guest_sends(TAP, &packet);
        }
        let exit = world.guest_sends(TAP, &packet);
        assert_eq!(exit.reason, Reason::Translated, "insert {number}");
        assert_eq!((world.mappings.len(), world.inside.len()), (1, 1));
    }
}
both_families!(an_expired_port_is_taken_over);

fn sessions_go_on_while_the_tables_are_full<A: Version>() {
    let world = World::<A>::new();
    let out = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    let back = udp(at(A::SERVER, 53), at(A::OUTSIDE, 40_000)).build();
    world.guest_sends(TAP, &out);
    world.sessions.fill();
    world.mappings.fill();
    world.inside.fill();
    world.permissions.fill();
    world.guests.fill();
    for seconds in [0, 1, 200, 200, 200] {
        world.wait_seconds(seconds);
        assert_eq!(world.guest_sends(TAP, &out).reason, Reason::Translated);
        assert_eq!(world.world_sends(&back).reason, Reason::Translated);
        let new = udp(at(A::GUEST, 40_001), at(A::SERVER, 53)).build();
        let exit = world.guest_sends(TAP, &new);
        assert_eq!(exit.reason.outcome(), Outcome::Refuse);
        let new = udp(at(A::NEIGHBOUR, 40_001), at(A::SERVER, 53)).build();
        assert_eq!(world.guest_sends(TAP, &new).reason, Reason::GuestTableFull);
    }
    // An expired session makes way for itself.
    world.wait_seconds(1000);
    assert_eq!(world.guest_sends(TAP, &out).reason, Reason::SessionStarted);
}
both_families!(sessions_go_on_while_the_tables_are_full);

fn a_full_table_does_not_use_up_ports<A: Version>() {
    let world = World::<A>::new();
    world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    world.sessions.fill();
    for port in 1024..1100 {
        let packet = udp(at(A::GUEST, port), at(A::SERVER, 53)).build();
        assert_eq!(
            world.guest_sends(TAP, &packet).reason,
            Reason::SessionTableFull
        );
    }
    let living = world
        .mappings
        .all()
        .into_iter()
        .filter(|(_, mapping)| world.now().is_before(mapping.expires_at));
    assert_eq!(living.count(), 1);
}
both_families!(a_full_table_does_not_use_up_ports);

/// As many ports as mappings find room, all of them over.
fn with_full_mappings<A: Version>() -> World<A> {
    let world = World::<A>::new();
    for port in 40_000..40_004 {
        world.guest_sends(TAP, &udp(at(A::GUEST, port), at(A::SERVER, 53)).build());
    }
    world.mappings.fill();
    // As the loader makes it: the locks of mappings that go are in the same table.
    world.inside.capacity.set(world.inside.len() + 1);
    let timeouts = world.timeouts();
    world.wait(timeouts.udp.plus(STAMP_AFTER));
    world.wait_slack();
    world.wait(timeouts.port_rest);
    world
}

fn what_is_over_makes_room_for_other_mappings<A: Version>() {
    let world = with_full_mappings::<A>();
    assert_eq!(sweep_all(&world), [4, 4]);
    let packet = udp(at(A::OTHER_GUEST, 50_000), at(A::SERVER, 53)).build();
    let exit = world.guest_sends(SECOND_TAP, &packet);
    assert_eq!(exit.reason, Reason::SessionStarted);
}
both_families!(what_is_over_makes_room_for_other_mappings);

fn without_a_sweep_a_mapping_that_is_over_is_taken_over<A: Version>() {
    let world = with_full_mappings::<A>();
    let packet = udp(at(A::OTHER_GUEST, 50_000), at(A::SERVER, 53)).build();
    // Where it is found is chance.
    world.chances.borrow_mut().extend([40_001 - 1024; 32]);
    let exit = world.guest_sends(SECOND_TAP, &packet);
    assert_eq!(exit.reason, Reason::SessionStarted);
    assert_eq!(world.mappings.len(), 4);
}
both_families!(without_a_sweep_a_mapping_that_is_over_is_taken_over);
