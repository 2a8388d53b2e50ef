//! What the operator made: forwards and addresses of guests' own; and what
//! becomes of sessions whose outside address is taken away.

use tapnat_common::{
    abi::{EndpointKey, Filtering, Mapping, mapping_flags, setting_flags},
    nat::Tables as _,
    net::protocol,
    verdict::Reason,
};

use crate::support::{
    network::{
        SECOND_TAP, TAP, Version, at, both_families, endpoint, ip, ping, pong, source, tcp, udp,
    },
    world::World,
};

/// An outside address that is not in the pool.
fn own<A: Version>() -> A {
    A::uplink(77)
}

fn make<A: Version>(
    world: &World<A>,
    outside: EndpointKey<A>,
    inside: EndpointKey<A>,
    from: (A, u8),
) {
    let mapping = Mapping {
        inside,
        device: TAP.get(),
        allowed: from.0,
        allowed_length: from.1,
        flags: mapping_flags::STATIC,
        ..Mapping::default()
    };
    world.mappings.set(&outside, &mapping);
    world.inside.set(&inside, &outside);
}

fn anywhere<A: Version>() -> (A, u8) {
    (A::UNSPECIFIED, 0)
}

fn with_forward<A: Version>(from: (A, u8)) -> World<A> {
    let world = World::<A>::new();
    for protocol in [protocol::TCP, protocol::UDP] {
        make(
            &world,
            endpoint(A::OUTSIDE, 80, protocol),
            endpoint(A::GUEST, 8080, protocol),
            from,
        );
    }
    world
}

fn with_own_address<A: Version>() -> World<A> {
    let world = World::<A>::new();
    make(
        &world,
        EndpointKey::whole(own::<A>()),
        EndpointKey::whole(A::GUEST),
        anywhere(),
    );
    world.set(|settings| settings.flags |= setting_flags::STATIC_ADDRESSES);
    world
}

fn a_forward_lets_in_and_answers_go_back<A: Version>() {
    // Port 80 is withheld from guests, which does not matter here.
    let world = with_forward::<A>(anywhere());
    let open = tcp(at(A::SERVER, 999), at(A::OUTSIDE, 80), "S");
    let admitted = tcp(at(A::SERVER, 999), at(A::GUEST, 8080), "S").ttl(63);
    let exit = world.world_sends(&open.build());
    assert_eq!(exit.forwarded(Reason::SessionAdmitted), admitted.build());
    let answer = tcp(at(A::GUEST, 8080), at(A::SERVER, 999), "SA");
    let translated = tcp(at(A::OUTSIDE, 80), at(A::SERVER, 999), "SA").ttl(63);
    let exit = world.guest_sends(TAP, &answer.build());
    assert_eq!(exit.forwarded(Reason::Translated), translated.build());
    // Long after, it is there for others.
    world.wait_seconds(1_000_000);
    let exit = world.world_sends(&udp(at(A::OTHER_SERVER, 5), at(A::OUTSIDE, 80)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}
both_families!(a_forward_lets_in_and_answers_go_back);

fn a_forward_is_also_the_way_out_and_the_way_between_guests<A: Version>() {
    let world = with_forward::<A>(anywhere());
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 8080), at(A::SERVER, 53)).build());
    assert_eq!(
        source(&exit.forwarded(Reason::SessionStarted)),
        at(A::OUTSIDE, 80)
    );
    let exit = world.guest_sends(
        SECOND_TAP,
        &tcp(at(A::OTHER_GUEST, 6000), at(A::OUTSIDE, 80), "S").build(),
    );
    assert_eq!(
        exit.forwarded(Reason::HairpinStarted),
        tcp(at(A::OUTSIDE, 6000), at(A::GUEST, 8080), "S")
            .ttl(63)
            .build()
    );
}
both_families!(a_forward_is_also_the_way_out_and_the_way_between_guests);

fn a_forward_is_for_those_that_it_is_for<A: Version>() {
    let world = with_forward::<A>((A::SERVER, A::BITS));
    let exit = world.world_sends(&udp(at(A::OTHER_SERVER, 5), at(A::OUTSIDE, 80)).build());
    assert_eq!(exit.reason, Reason::Filtered);
    let exit = world.world_sends(&udp(at(A::SERVER, 5), at(A::OUTSIDE, 80)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}
both_families!(a_forward_is_for_those_that_it_is_for);

fn a_forward_that_leads_elsewhere_counts_its_own_sessions_only<A: Version>() {
    let world = with_forward::<A>(anywhere());
    world.set_filtering(Filtering::EndpointIndependent);
    let packet = udp(at(A::SERVER, 5), at(A::OUTSIDE, 80)).build();
    world.world_sends(&packet);
    let outside = endpoint(A::OUTSIDE, 80, protocol::UDP);
    assert_eq!(world.mappings.copy(&outside).unwrap().sessions, 1);
    // Taken away, and made anew, as the operator does it: the session goes on.
    world.mappings.remove(&outside);
    make(
        &world,
        outside,
        endpoint(A::GUEST, 8080, protocol::UDP),
        anywhere(),
    );
    world.mappings.get(&outside).unwrap().sessions = 1;
    assert_eq!(world.world_sends(&packet).reason, Reason::Translated);
    world.mappings.get(&outside).unwrap().inside = endpoint(A::NEIGHBOUR, 80, protocol::UDP);
    world.mappings.get(&outside).unwrap().sessions = 0;
    assert_eq!(world.world_sends(&packet).reason, Reason::Translated);
}
both_families!(a_forward_that_leads_elsewhere_counts_its_own_sessions_only);

fn an_address_of_ones_own_is_for_every_protocol<A: Version>() {
    let world = with_own_address::<A>();
    for (out, in_, outside) in [
        (
            udp(at(A::GUEST, 600), at(A::SERVER, 53)),
            udp(at(A::SERVER, 9), at(own::<A>(), 600)),
            udp(at(own::<A>(), 600), at(A::SERVER, 53)),
        ),
        (
            tcp(at(A::GUEST, 700), at(A::SERVER, 53), "S"),
            tcp(at(A::SERVER, 9), at(own::<A>(), 22), "S"),
            tcp(at(own::<A>(), 700), at(A::SERVER, 53), "S"),
        ),
        (
            ping(A::GUEST, A::SERVER, 7),
            ping(A::SERVER, own::<A>(), 8),
            ping(own::<A>(), A::SERVER, 7),
        ),
    ] {
        let exit = world.guest_sends(TAP, &out.build());
        assert_eq!(
            exit.forwarded(Reason::SessionStarted),
            outside.ttl(63).build()
        );
        let exit = world.world_sends(&in_.build());
        assert_eq!(exit.reason, Reason::SessionAdmitted);
    }
    // What came in is answered from it.
    let exit = world.guest_sends(TAP, &pong(A::GUEST, A::SERVER, 8).build());
    assert_eq!(
        exit.forwarded(Reason::Translated),
        pong(own::<A>(), A::SERVER, 8).ttl(63).build()
    );
    // No port was taken for any of it, and other guests are as before.
    assert_eq!(world.mappings.len(), 1);
    let exit = world.guest_sends(TAP, &udp(at(A::NEIGHBOUR, 600), at(A::SERVER, 53)).build());
    assert_eq!(source(&exit.forwarded_any()).ip(), ip(A::OUTSIDE));
    // They meet it over its address.
    let exit = world.guest_sends(
        SECOND_TAP,
        &udp(at(A::OTHER_GUEST, 5), at(own::<A>(), 4000)).build(),
    );
    assert_eq!(
        source(&exit.forwarded(Reason::HairpinStarted)).ip(),
        ip(A::OUTSIDE)
    );
}
both_families!(an_address_of_ones_own_is_for_every_protocol);

fn who_loses_an_address_begins_anew_with_another<A: Version>() {
    let world = World::<A>::new();
    let out = |remote| udp(at(A::GUEST, 40_000), at(remote, 53)).build();
    for remote in [A::SERVER, A::OTHER_SERVER] {
        world.guest_sends(TAP, &out(remote));
    }
    let give = |address: Option<A>| {
        world.set(|settings| {
            settings.outside[0] = address.unwrap_or(A::UNSPECIFIED);
            settings.outside_count = u32::from(address.is_some());
            settings.generation += 1;
        });
    };
    // Gone for a while, nothing is lost.
    give(None);
    assert_eq!(
        world.guest_sends(TAP, &out(A::SERVER)).reason,
        Reason::Translated
    );
    give(Some(A::OUTSIDE));
    assert_eq!(
        world.guest_sends(TAP, &out(A::SERVER)).reason,
        Reason::Translated
    );
    // Another one in its place: both sessions, each when it is used next.
    give(Some(own::<A>()));
    for remote in [A::SERVER, A::OTHER_SERVER, A::SERVER] {
        let exit = world.guest_sends(TAP, &out(remote));
        assert_eq!(source(&exit.forwarded_any()), at(own::<A>(), 40_000));
    }
    assert_eq!(
        world.mapping(&endpoint(A::OUTSIDE, 40_000, protocol::UDP)),
        None
    );
    assert_eq!(world.mappings.len(), 1);
    assert_eq!(world.sessions.len(), 4);
}
both_families!(who_loses_an_address_begins_anew_with_another);
