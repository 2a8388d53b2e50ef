//! Two CPUs at once: a second packet is dealt with as a whole between any two
//! uses of the tables by a first one. Whatever the place, the books stay right,
//! no session loses a half, and both flows work afterwards.

use std::rc::Rc;

use tapnat_common::{
    abi::{Filtering, MappingMode},
    nat::sweep,
    verdict::{Outcome, Reason},
};

use crate::support::{
    network::{SECOND_TAP, TAP, Version, at, both_families, ping, source, tcp, udp},
    world::{Exit, World},
};

/// A packet and where it arrives.
#[derive(Clone)]
struct Arrival {
    device: Option<std::num::NonZeroU32>,
    packet: Vec<u8>,
}

impl Arrival {
    fn run<A: Version>(&self, world: &World<A>) -> Exit {
        match self.device {
            Some(device) => world.guest_sends(device, &self.packet),
            None => world.world_sends(&self.packet),
        }
    }
}

fn guest(packet: Vec<u8>) -> Arrival {
    Arrival {
        device: Some(TAP),
        packet,
    }
}

fn other_guest(packet: Vec<u8>) -> Arrival {
    Arrival {
        device: Some(SECOND_TAP),
        packet,
    }
}

fn outside(packet: Vec<u8>) -> Arrival {
    Arrival {
        device: None,
        packet,
    }
}

/// Lets `second` in at every place of `first`, each time in a new world, and
/// hands the exits of both and the world to `check`.
fn interleave<A: Version>(
    setup: impl Fn() -> World<A>,
    first: &Arrival,
    second: &Arrival,
    check: impl Fn(&World<A>, Exit, Exit),
) {
    for place in 0.. {
        let world = setup();
        let exit = Rc::new(std::cell::RefCell::new(None));
        let (kept, intruder) = (exit.clone(), second.clone());
        world.intrude(place, move |world| {
            kept.replace(Some(intruder.run(world)));
        });
        let first_exit = first.run(&world);
        if !world.intruded() {
            assert!(place > 0, "the first packet uses the tables");
            return;
        }
        let second_exit = exit.take().expect("the intruder has run");
        check(&world, first_exit, second_exit);
        world.audit();
    }
}

#[track_caller]
fn forwarded(exit: Exit) -> Vec<u8> {
    assert_eq!(exit.reason.outcome(), Outcome::Forward, "{:?}", exit.reason);
    exit.forwarded_any()
}

/// The flows of both packets go on, under the sources that were seen.
fn goes_on<A: Version>(world: &World<A>, arrival: &Arrival, seen: &[u8]) {
    let exit = arrival.run(world);
    assert_eq!(exit.reason, Reason::Translated);
    assert_eq!(source(&forwarded(exit)), source(seen));
}

fn one_socket_sends_to_two_remotes<A: Version>() {
    // It may be that its port is taken, so that chance would give it two.
    for taken in [false, true] {
        let setup = || {
            let world = World::<A>::new();
            if taken {
                let packet = udp(at(A::NEIGHBOUR, 40_000), at(A::SERVER, 53)).build();
                world.guest_sends(TAP, &packet);
            }
            world
        };
        let first = guest(udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
        let second = guest(udp(at(A::GUEST, 40_000), at(A::OTHER_SERVER, 53)).build());
        interleave(setup, &first, &second, |world, one, other| {
            let (one, other) = (forwarded(one), forwarded(other));
            assert_eq!(source(&one), source(&other), "one mapping");
            goes_on(world, &first, &one);
            goes_on(world, &second, &other);
            assert_eq!(world.mappings.len(), 1 + usize::from(taken));
        });
    }
}
both_families!(one_socket_sends_to_two_remotes);

fn two_guests_want_one_port<A: Version>() {
    let packets = |guest: A| {
        [
            udp(at(guest, 40_000), at(A::SERVER, 53)).build(),
            tcp(at(guest, 40_000), at(A::SERVER, 80), "S").build(),
            ping(guest, A::SERVER, 40_000).build(),
        ]
    };
    for (one, other) in packets(A::GUEST).into_iter().zip(packets(A::OTHER_GUEST)) {
        let (first, second) = (guest(one), other_guest(other));
        interleave(World::<A>::new, &first, &second, |world, one, other| {
            let (one, other) = (forwarded(one), forwarded(other));
            assert_ne!(source(&one), source(&other), "two mappings");
            goes_on(world, &first, &one);
            goes_on(world, &second, &other);
        });
    }
}
both_families!(two_guests_want_one_port);

fn two_guests_want_the_last_port<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.withhold(|port| *port != 30_000);
        world
    };
    let first = guest(udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    let second = other_guest(udp(at(A::OTHER_GUEST, 40_000), at(A::SERVER, 53)).build());
    interleave(setup, &first, &second, |world, one, other| {
        let mut reasons = [one.reason, other.reason];
        reasons.sort_by_key(|reason| *reason as u32);
        assert_eq!(reasons, [Reason::SessionStarted, Reason::PortsExhausted]);
        assert_eq!(world.mappings.len(), 1);
    });
}
both_families!(two_guests_want_the_last_port);

fn one_packet_comes_twice<A: Version>() {
    for taken in [false, true] {
        for mode in [
            MappingMode::EndpointIndependent,
            MappingMode::AddressAndPortDependent,
        ] {
            let setup = || {
                let world = World::<A>::new();
                world.set_mapping(mode);
                if taken {
                    let packet = udp(at(A::NEIGHBOUR, 40_000), at(A::SERVER, 53)).build();
                    world.guest_sends(TAP, &packet);
                }
                world
            };
            let packet = guest(udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
            interleave(setup, &packet, &packet, |world, one, other| {
                let (one, other) = (forwarded(one), forwarded(other));
                assert_eq!(source(&one), source(&other), "taken {taken}, {mode:?}");
                goes_on(world, &packet, &one);
            });
        }
    }
}
both_families!(one_packet_comes_twice);

fn two_guests_want_one_port_for_one_remote<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.set_mapping(MappingMode::AddressAndPortDependent);
        world
    };
    let first = guest(udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
    let second = other_guest(udp(at(A::OTHER_GUEST, 40_000), at(A::SERVER, 53)).build());
    interleave(setup, &first, &second, |world, one, other| {
        // One may lose, and try again.
        for (arrival, exit) in [(&first, one), (&second, other)] {
            if exit.reason == Reason::SessionConflict {
                let exit = arrival.run(world);
                assert_eq!(exit.reason, Reason::SessionStarted);
            } else {
                goes_on(world, arrival, &forwarded(exit));
            }
        }
    });
}
both_families!(two_guests_want_one_port_for_one_remote);

fn an_answer_comes_while_its_session_is_made<A: Version>() {
    // The remote is allowed already, and sends from the port that the guest is
    // just sending to.
    for filtering in [
        Filtering::EndpointIndependent,
        Filtering::AddressDependent,
        Filtering::AddressAndPortDependent,
    ] {
        let setup = || {
            let world = World::<A>::new();
            world.set_filtering(filtering);
            let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
            world.guest_sends(TAP, &packet);
            world
        };
        let out = guest(udp(at(A::GUEST, 40_000), at(A::SERVER, 54)).build());
        let back = outside(udp(at(A::SERVER, 54), at(A::OUTSIDE, 40_000)).build());
        let check = |world: &World<A>, one: Exit, other: Exit| {
            for exit in [one, other] {
                let lost = [Reason::Filtered, Reason::SessionConflict, Reason::NoMapping];
                assert!(
                    exit.reason.outcome() == Outcome::Forward || lost.contains(&exit.reason),
                    "{:?}",
                    exit.reason
                );
            }
            forwarded(out.run(world));
            assert_eq!(back.run(world).reason, Reason::Translated);
            assert_eq!(out.run(world).reason, Reason::Translated);
            assert_eq!(world.sessions.len(), 4);
        };
        interleave(setup, &out, &back, check);
        interleave(setup, &back, &out, check);
    }
}
both_families!(an_answer_comes_while_its_session_is_made);

fn both_sides_come_back_to_an_expired_session<A: Version>() {
    for inbound_allowed in [false, true] {
        let setup = || {
            let world = World::<A>::new();
            world.set_filtering(Filtering::EndpointIndependent);
            let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
            world.guest_sends(TAP, &packet);
            if inbound_allowed {
                // Another session keeps the mapping.
                world.wait_seconds(200);
                let packet = udp(at(A::GUEST, 40_000), at(A::OTHER_SERVER, 53)).build();
                world.guest_sends(TAP, &packet);
                world.wait_seconds(200);
            } else {
                world.wait_seconds(400);
            }
            world
        };
        let out = guest(udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
        let back = outside(udp(at(A::SERVER, 53), at(A::OUTSIDE, 40_000)).build());
        let check = |world: &World<A>, _: Exit, _: Exit| {
            forwarded(out.run(world));
            assert_eq!(back.run(world).reason, Reason::Translated);
            assert_eq!(out.run(world).reason, Reason::Translated);
        };
        interleave(setup, &out, &back, check);
        interleave(setup, &back, &out, check);
        interleave(setup, &out, &out, check);
        interleave(setup, &back, &back, check);
    }
}
both_families!(both_sides_come_back_to_an_expired_session);

fn two_guests_take_over_one_expired_port<A: Version>() {
    let setup = World::<A>::with_one_expired_port;
    let first = guest(udp(at(A::GUEST, 30_000), at(A::SERVER, 53)).build());
    let second = other_guest(udp(at(A::OTHER_GUEST, 30_000), at(A::SERVER, 53)).build());
    interleave(setup, &first, &second, |world, one, other| {
        let mut reasons = [one.reason, other.reason];
        reasons.sort_by_key(|reason| *reason as u32);
        assert_eq!(reasons, [Reason::SessionStarted, Reason::PortsExhausted]);
        assert_eq!((world.mappings.len(), world.inside.len()), (1, 1));
    });
    // The former owner comes back at the same time.
    let owner = guest(udp(at(A::NEIGHBOUR, 30_000), at(A::SERVER, 53)).build());
    let lenient = || {
        let world = setup();
        world.is_lenient.set(true);
        world
    };
    for [first, second] in [[&first, &owner], [&owner, &first]] {
        interleave(lenient, first, second, |world, one, other| {
            assert!(
                [one.reason, other.reason]
                    .iter()
                    .any(|reason| reason.outcome() == Outcome::Forward)
            );
            assert_eq!(world.mappings.len(), 1);
            // Whatever came of it mends itself.
            world.wait_slack();
            first.run(world);
            second.run(world);
            world.wait_seconds(1000);
            first.run(world);
            second.run(world);
            world.is_lenient.set(false);
        });
    }
}
both_families!(two_guests_take_over_one_expired_port);

fn two_guests_meet_each_other_at_once<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.set_filtering(Filtering::EndpointIndependent);
        world.guest_sends(TAP, &udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
        let packet = udp(at(A::OTHER_GUEST, 5000), at(A::SERVER, 53)).build();
        world.guest_sends(SECOND_TAP, &packet);
        world
    };
    let first = guest(udp(at(A::GUEST, 40_000), at(A::OUTSIDE, 5000)).build());
    let second = other_guest(udp(at(A::OTHER_GUEST, 5000), at(A::OUTSIDE, 40_000)).build());
    interleave(setup, &first, &second, |world, _, _| {
        let one = forwarded(first.run(world));
        let other = forwarded(second.run(world));
        goes_on(world, &first, &one);
        goes_on(world, &second, &other);
        assert_eq!(world.sessions.len(), 6, "one session, not two");
    });
}
both_families!(two_guests_meet_each_other_at_once);

fn a_reset_and_data_at_once<A: Version>() {
    let setup = || {
        let world = World::<A>::new();
        world.guest_sends(
            TAP,
            &tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "S").build(),
        );
        world.world_sends(&tcp(at(A::SERVER, 80), at(A::OUTSIDE, 40_000), "SA").build());
        world.guest_sends(
            TAP,
            &tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "A").build(),
        );
        world.wait_seconds(10);
        world
    };
    let reset = outside(tcp(at(A::SERVER, 80), at(A::OUTSIDE, 40_000), "R").build());
    let data = guest(tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), "PA").build());
    for [first, second] in [[&reset, &data], [&data, &reset]] {
        interleave(setup, first, second, |world, one, other| {
            forwarded(one);
            forwarded(other);
            assert_eq!(world.sessions.len(), 2);
        });
    }
}
both_families!(a_reset_and_data_at_once);

fn half_a_session_is_mended<A: Version>() {
    // However a half got lost: the other one is no session for long, and either
    // side makes a whole one.
    for lost in [Some(TAP), None] {
        for packet in ["out", "back"] {
            let world = World::<A>::new();
            world.set_filtering(Filtering::EndpointIndependent);
            let out = guest(udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build());
            let back = outside(udp(at(A::SERVER, 53), at(A::OUTSIDE, 40_000)).build());
            out.run(&world);
            back.run(&world);
            world.is_lenient.set(true);
            for (key, _) in world.sessions.all() {
                if key.arrival.device() == lost {
                    world.sessions.remove(&key);
                    if lost.is_some() {
                        world.guests.get(&key.source).unwrap().sessions -= 1;
                        let (_, mapping) = world.mappings.all()[0];
                        let outside = world.inside.copy(&mapping.inside).unwrap();
                        world.mappings.get(&outside).unwrap().sessions -= 1;
                    }
                }
            }
            world.wait_slack();
            let arrival = if packet == "out" { &out } else { &back };
            assert_eq!(arrival.run(&world).reason.outcome(), Outcome::Forward);
            world.is_lenient.set(false);
            world.audit();
            assert_eq!(out.run(&world).reason, Reason::Translated);
            assert_eq!(back.run(&world).reason, Reason::Translated);
            assert_eq!(world.sessions.len(), 2);
        }
    }
}
both_families!(half_a_session_is_mended);

fn a_guest_is_forgotten_while_it_begins_a_session_without_a_mapping<A: Version>() {
    let packet = udp(at(A::GUEST, 40_000), at(A::SERVER, 53)).build();
    for place in 0.. {
        let world = World::<A>::new();
        world.set_mapping(MappingMode::AddressAndPortDependent);
        world.intrude(place, |world| {
            let is_counted = world.guests_on.copy(&TAP.get()) == Some(1);
            if is_counted && world.sessions.len() == 0 {
                sweep::guest(A::GUEST, world);
            }
        });
        let exit = world.guest_sends(TAP, &packet);
        if !world.intruded() {
            return;
        }
        // One that goes as soon as it is known is refused.
        match exit.reason {
            Reason::GuestTableFull => assert_eq!(world.sessions.len(), 0, "{place}"),
            reason => assert_eq!(reason, Reason::SessionStarted, "{place}"),
        }
    }
}
both_families!(a_guest_is_forgotten_while_it_begins_a_session_without_a_mapping);
