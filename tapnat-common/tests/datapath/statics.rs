//! What the operator made: forwards and addresses of guests' own; and what
//! becomes of sessions whose outside address is taken away.

use std::net::Ipv4Addr;

use tapnat_common::{
    abi::{EndpointKey, Filtering, Mapping, mapping_flags, setting_flags},
    nat::Tables as _,
    net::{Be32, protocol},
    verdict::Reason,
};

use crate::support::{
    network::{
        GUEST, NEIGHBOUR, OTHER_GUEST, OTHER_SERVER, OUTSIDE, SECOND_TAP, SERVER, TAP, at,
        endpoint, ip, ping, pong, source, tcp, udp,
    },
    world::World,
};

/// An outside address that is not in the pool.
const OWN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 77);

fn make(world: &World, outside: EndpointKey, inside: EndpointKey, from: (Ipv4Addr, u8)) {
    let mapping = Mapping {
        inside,
        device: TAP.get(),
        allowed: from.0.into(),
        allowed_length: from.1,
        flags: mapping_flags::STATIC,
        ..Mapping::default()
    };
    world.mappings.set(&outside, &mapping);
    world.inside.set(&inside, &outside);
}

const ANYWHERE: (Ipv4Addr, u8) = (Ipv4Addr::UNSPECIFIED, 0);

fn with_forward(from: (Ipv4Addr, u8)) -> World {
    let world = World::new();
    for protocol in [protocol::TCP, protocol::UDP] {
        make(
            &world,
            endpoint(OUTSIDE, 80, protocol),
            endpoint(GUEST, 8080, protocol),
            from,
        );
    }
    world
}

fn with_own_address() -> World {
    let world = World::new();
    make(
        &world,
        EndpointKey::whole(OWN.into()),
        EndpointKey::whole(GUEST.into()),
        ANYWHERE,
    );
    world.set(|settings| settings.flags |= setting_flags::STATIC_ADDRESSES);
    world
}

#[test]
fn a_forward_lets_in_and_answers_go_back() {
    // Port 80 is withheld from guests, which does not matter here.
    let world = with_forward(ANYWHERE);
    let open = tcp(at(SERVER, 999), at(OUTSIDE, 80), "S");
    let admitted = tcp(at(SERVER, 999), at(GUEST, 8080), "S").ttl(63);
    let exit = world.world_sends(&open.build());
    assert_eq!(exit.forwarded(Reason::SessionAdmitted), admitted.build());
    let answer = tcp(at(GUEST, 8080), at(SERVER, 999), "SA");
    let translated = tcp(at(OUTSIDE, 80), at(SERVER, 999), "SA").ttl(63);
    let exit = world.guest_sends(TAP, &answer.build());
    assert_eq!(exit.forwarded(Reason::Translated), translated.build());
    // Long after, it is there for others.
    world.wait_seconds(1_000_000);
    let exit = world.world_sends(&udp(at(OTHER_SERVER, 5), at(OUTSIDE, 80)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}

#[test]
fn a_forward_is_also_the_way_out_and_the_way_between_guests() {
    let world = with_forward(ANYWHERE);
    let exit = world.guest_sends(TAP, &udp(at(GUEST, 8080), at(SERVER, 53)).build());
    assert_eq!(
        source(&exit.forwarded(Reason::SessionStarted)),
        at(OUTSIDE, 80)
    );
    let exit = world.guest_sends(
        SECOND_TAP,
        &tcp(at(OTHER_GUEST, 6000), at(OUTSIDE, 80), "S").build(),
    );
    assert_eq!(
        exit.forwarded(Reason::HairpinStarted),
        tcp(at(OUTSIDE, 6000), at(GUEST, 8080), "S").ttl(63).build()
    );
}

#[test]
fn a_forward_is_for_those_that_it_is_for() {
    let world = with_forward((SERVER, 32));
    let exit = world.world_sends(&udp(at(OTHER_SERVER, 5), at(OUTSIDE, 80)).build());
    assert_eq!(exit.reason, Reason::Filtered);
    let exit = world.world_sends(&udp(at(SERVER, 5), at(OUTSIDE, 80)).build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}

#[test]
fn a_forward_that_leads_elsewhere_counts_its_own_sessions_only() {
    let world = with_forward(ANYWHERE);
    world.set_filtering(Filtering::EndpointIndependent);
    let packet = udp(at(SERVER, 5), at(OUTSIDE, 80)).build();
    world.world_sends(&packet);
    let outside = endpoint(OUTSIDE, 80, protocol::UDP);
    assert_eq!(world.mappings.copy(&outside).unwrap().sessions, 1);
    // Taken away, and made anew, as the operator does it: the session goes on.
    world.mappings.remove(&outside);
    make(
        &world,
        outside,
        endpoint(GUEST, 8080, protocol::UDP),
        ANYWHERE,
    );
    world.mappings.get(&outside).unwrap().sessions = 1;
    assert_eq!(world.world_sends(&packet).reason, Reason::Translated);
    world.mappings.get(&outside).unwrap().inside = endpoint(NEIGHBOUR, 80, protocol::UDP);
    world.mappings.get(&outside).unwrap().sessions = 0;
    assert_eq!(world.world_sends(&packet).reason, Reason::Translated);
}

#[test]
fn an_address_of_ones_own_is_for_every_protocol() {
    let world = with_own_address();
    for (out, in_, outside) in [
        (
            udp(at(GUEST, 600), at(SERVER, 53)),
            udp(at(SERVER, 9), at(OWN, 600)),
            udp(at(OWN, 600), at(SERVER, 53)),
        ),
        (
            tcp(at(GUEST, 700), at(SERVER, 53), "S"),
            tcp(at(SERVER, 9), at(OWN, 22), "S"),
            tcp(at(OWN, 700), at(SERVER, 53), "S"),
        ),
        (
            ping(GUEST, SERVER, 7),
            ping(SERVER, OWN, 8),
            ping(OWN, SERVER, 7),
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
    let exit = world.guest_sends(TAP, &pong(GUEST, SERVER, 8).build());
    assert_eq!(
        exit.forwarded(Reason::Translated),
        pong(OWN, SERVER, 8).ttl(63).build()
    );
    // No port was taken for any of it, and other guests are as before.
    assert_eq!(world.mappings.len(), 1);
    let exit = world.guest_sends(TAP, &udp(at(NEIGHBOUR, 600), at(SERVER, 53)).build());
    assert_eq!(source(&exit.forwarded_any()).ip(), ip(OUTSIDE));
    // They meet it over its address.
    let exit = world.guest_sends(SECOND_TAP, &udp(at(OTHER_GUEST, 5), at(OWN, 4000)).build());
    assert_eq!(
        source(&exit.forwarded(Reason::HairpinStarted)).ip(),
        ip(OUTSIDE)
    );
}

#[test]
fn who_loses_an_address_begins_anew_with_another() {
    let world = World::new();
    let out = |remote| udp(at(GUEST, 40_000), at(remote, 53)).build();
    for remote in [SERVER, OTHER_SERVER] {
        world.guest_sends(TAP, &out(remote));
    }
    let give = |address: Option<Ipv4Addr>| {
        world.set(|settings| {
            settings.outside[0] = address.map_or(Be32::ZERO, Into::into);
            settings.outside_count = u32::from(address.is_some());
            settings.generation += 1;
        });
    };
    // Gone for a while, nothing is lost.
    give(None);
    assert_eq!(
        world.guest_sends(TAP, &out(SERVER)).reason,
        Reason::Translated
    );
    give(Some(OUTSIDE));
    assert_eq!(
        world.guest_sends(TAP, &out(SERVER)).reason,
        Reason::Translated
    );
    // Another one in its place: both sessions, each when it is used next.
    give(Some(OWN));
    for remote in [SERVER, OTHER_SERVER, SERVER] {
        let exit = world.guest_sends(TAP, &out(remote));
        assert_eq!(source(&exit.forwarded_any()), at(OWN, 40_000));
    }
    assert_eq!(
        world.mapping(&endpoint(OUTSIDE, 40_000, protocol::UDP)),
        None
    );
    assert_eq!(world.mappings.len(), 1);
    assert_eq!(world.sessions.len(), 4);
}
