//! Sessions that the host's firewall is asked about.

use std::num::NonZeroU32;

use tapnat_common::{
    abi::{Guest, Mapping, mapping_flags, setting_flags},
    nat::{Tables as _, sweep},
    net::protocol,
    time::Ticks,
    verdict::Reason,
};
use tapnat_testbed::packet::Builder;

use crate::support::{
    network::{
        SECOND_TAP, TAP, UPLINK, Version, at, both_families, destination, endpoint, ip, ping,
        source, tcp, ttl, udp,
    },
    world::{Exit, World},
};

const UPLINK_INDEX: u32 = UPLINK.get();
const TAP_INDEX: u32 = TAP.get();

fn asking<A: Version>() -> World<A> {
    let world = World::<A>::new();
    world.set(|settings| settings.flags |= setting_flags::ASK_FIREWALL);
    world
}

/// The guest's packet is shown to the firewall, which lets it through.
#[track_caller]
fn asked_and_accepted<A: Version>(world: &World<A>, packet: &Builder) -> Exit {
    let asked = world.guest_sends(TAP, &packet.build()).asked();
    world.host_forwards(TAP_INDEX, UPLINK_INDEX, &asked)
}

/// The operator has every session asked about again.
fn revalidate<A: Version>(world: &World<A>) {
    for (key, _) in world.sessions.all() {
        assert!(sweep::ask_again(&key, world));
    }
}

/// A forward of TCP from port 8080 outside.
fn forward<A: Version>(world: &World<A>, guest: A, device: NonZeroU32) {
    let outside = endpoint(A::OUTSIDE, 8080, protocol::TCP);
    let inside = endpoint(guest, 80, protocol::TCP);
    let mapping = Mapping {
        inside,
        device: device.get(),
        flags: mapping_flags::STATIC,
        ..Mapping::default()
    };
    world.mappings.set(&outside, &mapping);
    world.inside.set(&inside, &outside);
}

fn guest<A: Version>(world: &World<A>) -> Guest {
    *world.guest(A::GUEST).unwrap()
}

fn what_the_firewall_accepts_is_translated_and_then_goes_past_it<A: Version>() {
    for (packet, next) in [
        (
            udp(at(A::GUEST, 5000), at(A::SERVER, 53)),
            udp(at(A::GUEST, 5000), at(A::SERVER, 53)),
        ),
        (
            tcp(at(A::GUEST, 5000), at(A::SERVER, 80), "S"),
            tcp(at(A::GUEST, 5000), at(A::SERVER, 80), "A"),
        ),
        (ping(A::GUEST, A::SERVER, 77), ping(A::GUEST, A::SERVER, 77)),
    ] {
        let packet = packet.ttl(9);
        let world = asking::<A>();
        let asked = world.guest_sends(TAP, &packet.build());
        assert_eq!(
            world.sessions.len(),
            0,
            "nothing is kept of what may be refused"
        );
        assert_eq!(world.mappings.len(), 0);
        let asked = asked.asked();
        assert_eq!(asked, packet.build(), "it sees what the guest sent");

        let sent = world.host_forwards(TAP_INDEX, UPLINK_INDEX, &asked);
        let sent = sent.forwarded(Reason::SessionStarted);
        assert_eq!(source(&sent).ip(), ip(A::OUTSIDE), "translated");
        assert_eq!(ttl(&sent), 8, "the host's hop and ours are one");

        let next = world.guest_sends(TAP, &next.build());
        next.forwarded(Reason::Translated);
    }
}
both_families!(what_the_firewall_accepts_is_translated_and_then_goes_past_it);

fn what_the_firewall_drops_leaves_nothing<A: Version>() {
    let world = asking::<A>();
    let packet = tcp(at(A::GUEST, 5000), at(A::SERVER, 80), "S");
    for _ in 0..3 {
        world.guest_sends(TAP, &packet.build()).asked();
    }
    assert_eq!(world.sessions.len() + world.mappings.len(), 0);
    assert_eq!(guest(&world).sessions, 0);
}
both_families!(what_the_firewall_drops_leaves_nothing);

fn being_asked_about_is_paid_for_once<A: Version>() {
    let world = asking::<A>();
    world.set(|settings| settings.guest_new_sessions = 2);
    let packet = |port| udp(at(A::GUEST, port), at(A::SERVER, 53));
    for port in [1, 2] {
        let exit = asked_and_accepted(&world, &packet(port));
        exit.forwarded(Reason::SessionStarted);
    }
    let third = world.guest_sends(TAP, &packet(3).build());
    assert_eq!(third.reason, Reason::GuestSessionRate);
}
both_families!(being_asked_about_is_paid_for_once);

fn the_firewall_sees_where_a_forward_leads<A: Version>() {
    let world = asking::<A>();
    forward(&world, A::GUEST, TAP);
    let packet = tcp(at(A::SERVER, 4000), at(A::OUTSIDE, 8080), "S");
    let asked = world.world_sends(&packet.build()).asked();
    assert_eq!(destination(&asked), at(A::GUEST, 80));
    assert_eq!(source(&asked), at(A::SERVER, 4000));

    let sent = world.host_forwards(UPLINK_INDEX, TAP_INDEX, &asked);
    let sent = sent.forwarded(Reason::SessionAdmitted);
    assert_eq!(destination(&sent), at(A::GUEST, 80));
    let answer = tcp(at(A::GUEST, 80), at(A::SERVER, 4000), "SA");
    let answer = world.guest_sends(TAP, &answer.build());
    assert_eq!(
        source(&answer.forwarded(Reason::Translated)),
        at(A::OUTSIDE, 8080)
    );
}
both_families!(the_firewall_sees_where_a_forward_leads);

fn the_firewall_sees_both_guests_of_a_hairpin<A: Version>() {
    let world = asking::<A>();
    forward(&world, A::OTHER_GUEST, SECOND_TAP);
    let packet = to_the_forward(&world);
    assert_eq!(destination(&packet), at(A::OTHER_GUEST, 80));
    assert_eq!(source(&packet), at(A::GUEST, 5000));
    let sent = world.host_forwards(TAP_INDEX, SECOND_TAP.get(), &packet);
    let sent = sent.forwarded(Reason::HairpinStarted);
    assert_eq!(source(&sent).ip(), ip(A::OUTSIDE));
}
both_families!(the_firewall_sees_both_guests_of_a_hairpin);

#[track_caller]
fn to_the_forward<A: Version>(world: &World<A>) -> Vec<u8> {
    let packet = tcp(at(A::GUEST, 5000), at(A::OUTSIDE, 8080), "S");
    world.guest_sends(TAP, &packet.build()).asked()
}

fn nothing_else_of_a_guest_leaves_by_the_uplink<A: Version>() {
    let world = asking::<A>();
    let packet = udp(at(A::GUEST, 5000), at(A::SERVER, 53)).build();
    let exit = world.host_forwards(TAP_INDEX, UPLINK_INDEX, &packet);
    assert_eq!(exit.reason, Reason::FirewallNotAsked);
    // Changed on its way, by somebody else's translation.
    let asked = world.guest_sends(TAP, &packet).asked();
    let elsewhere = udp(at(A::GUEST, 5000), at(A::elsewhere(9), 53)).build();
    let exit = world.host_forwards(TAP_INDEX, UPLINK_INDEX, &elsewhere);
    assert_eq!(exit.reason, Reason::FirewallNotAsked);
    // Another that waited with it for the next hop belongs to its session.
    let exit = world.host_forwards(TAP_INDEX, UPLINK_INDEX, &asked);
    exit.forwarded(Reason::SessionStarted);
    let exit = world.host_forwards(TAP_INDEX, UPLINK_INDEX, &asked);
    exit.forwarded(Reason::Translated);
}
both_families!(nothing_else_of_a_guest_leaves_by_the_uplink);

fn what_the_host_forwards_for_others_is_left_alone<A: Version>() {
    let world = asking::<A>();
    for (from, out, packet) in [
        // Translated already.
        (
            TAP_INDEX,
            UPLINK_INDEX,
            udp(at(A::OUTSIDE, 5000), at(A::SERVER, 53)),
        ),
        // From a network behind the uplink to a guest, by a route.
        (
            UPLINK_INDEX,
            TAP_INDEX,
            udp(at(A::SERVER, 53), at(A::GUEST, 5000)),
        ),
        // Of a device that is none of ours.
        (99, UPLINK_INDEX, udp(at(A::GUEST, 5000), at(A::SERVER, 53))),
    ] {
        let exit = world.host_forwards(from, out, &packet.build());
        assert_eq!(exit.reason, Reason::ForTheHost);
    }
}
both_families!(what_the_host_forwards_for_others_is_left_alone);

fn a_fragmented_first_packet_is_asked_about<A: Version>() {
    let world = asking::<A>();
    let datagram = udp(at(A::GUEST, 5000), at(A::SERVER, 53))
        .payload(&[7; 3000])
        .identification(5);
    let fragments = datagram.fragments(1500);
    let asked = world.guest_sends(TAP, &fragments[0]).asked();
    let sent = world.host_forwards(TAP_INDEX, UPLINK_INDEX, &asked);
    sent.forwarded(Reason::SessionStarted);
    for fragment in &fragments[1..] {
        let sent = world.guest_sends(TAP, fragment);
        assert_eq!(
            source(&sent.forwarded(Reason::Translated)).ip(),
            ip(A::OUTSIDE)
        );
    }

    // And when the host puts it together before it looks at it.
    let world = asking::<A>();
    for fragment in &fragments {
        let exit = world.guest_sends(TAP, fragment);
        let expected = if fragment == &fragments[0] {
            Reason::FirewallAsked
        } else {
            Reason::ForTheHost
        };
        assert_eq!(exit.reason, expected);
    }
    for (number, fragment) in fragments.iter().enumerate() {
        let sent = world.host_forwards(TAP_INDEX, UPLINK_INDEX, fragment);
        let expected = if number == 0 {
            Reason::SessionStarted
        } else {
            Reason::Translated
        };
        sent.forwarded(expected);
    }
}
both_families!(a_fragmented_first_packet_is_asked_about);

fn a_session_that_is_accepted_again_goes_on<A: Version>() {
    let world = asking::<A>();
    let packet = udp(at(A::GUEST, 5000), at(A::SERVER, 53));
    let answer = |port| udp(at(A::SERVER, 53), at(A::OUTSIDE, port));
    let sent = asked_and_accepted(&world, &packet).forwarded(Reason::SessionStarted);
    let port = source(&sent).port();
    let to_guest = || world.world_sends(&answer(port).build());
    to_guest().forwarded(Reason::Translated);

    revalidate(&world);
    // What the remote sends says nothing.
    to_guest().forwarded(Reason::Translated);
    world.wait(Ticks::from_slots(40));
    to_guest().forwarded(Reason::Translated);
    let sent = asked_and_accepted(&world, &packet).forwarded(Reason::Translated);
    assert_eq!(source(&sent).port(), port);
    let next = world.guest_sends(TAP, &packet.build());
    assert!(next.quick, "nobody is asked any more");
    world.wait(Ticks::from_slots(10));
    to_guest().forwarded(Reason::Translated);
    world
        .guest_sends(TAP, &packet.build())
        .forwarded(Reason::Translated);
}
both_families!(a_session_that_is_accepted_again_goes_on);

fn a_session_that_is_refused_ends<A: Version>() {
    let world = asking::<A>();
    let packet = udp(at(A::GUEST, 5000), at(A::SERVER, 53));
    let sent = asked_and_accepted(&world, &packet).forwarded(Reason::SessionStarted);
    let answer = udp(at(A::SERVER, 53), source(&sent));
    world
        .world_sends(&answer.build())
        .forwarded(Reason::Translated);

    revalidate(&world);
    world.guest_sends(TAP, &packet.build()).asked();
    // It may still be under way.
    world
        .world_sends(&answer.build())
        .forwarded(Reason::Translated);
    world.wait(Ticks::from_slots(6));
    // The mapping would let it in; but the firewall has to be asked.
    let exit = world.world_sends(&answer.build());
    assert_eq!(exit.reason, Reason::FirewallAsked);
    assert_eq!(world.sessions.len(), 0);
    world.guest_sends(TAP, &packet.build()).asked();
    assert_eq!(world.sessions.len(), 0);
}
both_families!(a_session_that_is_refused_ends);

fn the_other_side_alone_is_not_heard_for_long<A: Version>() {
    let world = asking::<A>();
    let packet = udp(at(A::GUEST, 5000), at(A::SERVER, 53));
    let sent = asked_and_accepted(&world, &packet).forwarded(Reason::SessionStarted);
    let answer = udp(at(A::SERVER, 53), source(&sent));
    revalidate(&world);
    for _ in 0..5 {
        world
            .world_sends(&answer.build())
            .forwarded(Reason::Translated);
        world.wait(Ticks::from_slots(11));
    }
    world.wait(Ticks::from_slots(3));
    let exit = world.world_sends(&answer.build());
    assert_eq!(exit.reason, Reason::FirewallAsked);
}
both_families!(the_other_side_alone_is_not_heard_for_long);

fn a_connection_opened_anew_is_asked_about<A: Version>() {
    let world = asking::<A>();
    let open = tcp(at(A::GUEST, 5000), at(A::SERVER, 80), "S");
    let sent = asked_and_accepted(&world, &open).forwarded(Reason::SessionStarted);
    let outside = source(&sent);
    let answer = |flags| tcp(at(A::SERVER, 80), outside, flags).build();
    world
        .world_sends(&answer("SA"))
        .forwarded(Reason::Translated);
    let guest = |flags| {
        world.guest_sends(
            TAP,
            &tcp(at(A::GUEST, 5000), at(A::SERVER, 80), flags).build(),
        )
    };
    guest("A").forwarded(Reason::Translated);
    guest("FA").forwarded(Reason::Translated);
    guest("S").asked();
    // Nor does the other side get out of being asked about.
    revalidate(&world);
    let asked = world.world_sends(&answer("S")).asked();
    assert_eq!(destination(&asked), at(A::GUEST, 5000));
}
both_families!(a_connection_opened_anew_is_asked_about);

fn who_bypasses_the_firewall_again_is_asked_nothing<A: Version>() {
    let world = asking::<A>();
    let packet = udp(at(A::GUEST, 5000), at(A::SERVER, 53));
    asked_and_accepted(&world, &packet).forwarded(Reason::SessionStarted);
    revalidate(&world);
    world.set(|settings| settings.flags &= !setting_flags::ASK_FIREWALL);
    let sent = world.guest_sends(TAP, &packet.build());
    sent.forwarded(Reason::Translated);
}
both_families!(who_bypasses_the_firewall_again_is_asked_nothing);

fn fragments_between_guests_are_left_to_the_host<A: Version>() {
    let world = asking::<A>();
    let datagram = udp(at(A::GUEST, 5000), at(A::OTHER_GUEST, 53)).payload(&[7; 3000]);
    for fragment in datagram.fragments(1500) {
        let exit = world.host_forwards(TAP_INDEX, SECOND_TAP.get(), &fragment);
        assert_eq!(exit.reason, Reason::ForTheHost);
    }
}
both_families!(fragments_between_guests_are_left_to_the_host);
