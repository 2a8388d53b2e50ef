//! What one guest may begin, and what goes first for want of room.

use tapnat_common::{time::Ticks, verdict::Reason};

use crate::support::{
    network::{TAP, Version, at, both_families, source, tcp, udp},
    world::World,
};

fn a_guest_begins_so_many_sessions_in_a_second<A: Version>() {
    const RATE: u32 = 20;
    // Between two tries, in ticks.
    const PAUSE: u32 = 9;
    let world = World::<A>::new();
    world.set(|settings| settings.guest_new_sessions = RATE);
    let mut port = 1024;
    let mut begins = |guest| {
        port += 1;
        let exit = world.guest_sends(TAP, &udp(at(guest, port), at(A::SERVER, 53)).build());
        exit.reason
    };
    let mut begun = |guest, seconds: u32| {
        let ticks = Ticks::from_seconds(seconds).get();
        let mut begun = 0;
        for _ in 0..ticks / PAUSE {
            world.wait(Ticks::new(PAUSE));
            match begins(guest) {
                Reason::SessionStarted => begun += 1,
                reason => assert_eq!(reason, Reason::GuestSessionRate),
            }
        }
        begun
    };
    // A second's worth at once, and then one by one; then only those.
    let first = begun(A::GUEST, 3);
    assert!((4 * RATE - 1..=4 * RATE + 1).contains(&first), "{first}");
    let later = begun(A::GUEST, 3);
    assert!((3 * RATE - 1..=3 * RATE + 1).contains(&later), "{later}");
    // Nobody else is held up by it.
    assert!(begun(A::NEIGHBOUR, 1) > RATE);
    // What there is goes on.
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 1025), at(A::SERVER, 53)).build());
    assert_eq!(exit.reason, Reason::Translated);
    let guest = world.guests.copy(&A::GUEST).unwrap();
    assert_ne!(guest.refused, 0);
}
both_families!(a_guest_begins_so_many_sessions_in_a_second);

fn the_highest_rate_does_not_overflow<A: Version>() {
    let world = World::<A>::new();
    world.set(|settings| settings.guest_new_sessions = u32::MAX);
    for port in 1024..1034 {
        world.wait_seconds(3600);
        let exit = world.guest_sends(TAP, &udp(at(A::GUEST, port), at(A::SERVER, 53)).build());
        assert_eq!(exit.reason, Reason::SessionStarted);
    }
}
both_families!(the_highest_rate_does_not_overflow);

fn for_want_of_room_what_nobody_answers_in_ends_first<A: Version>() {
    let world = World::<A>::new();
    let [asked, answered] = [at(A::SERVER, 53), at(A::OTHER_SERVER, 53)];
    world.guest_sends(TAP, &udp(at(A::GUEST, 1024), asked).build());
    world.guest_sends(TAP, &tcp(at(A::GUEST, 1024), asked, "S").build());
    let exit = world.guest_sends(TAP, &udp(at(A::GUEST, 1025), answered).build());
    world.world_sends(&udp(answered, source(&exit.forwarded_any())).build());
    let exit = world.guest_sends(TAP, &tcp(at(A::GUEST, 1025), answered, "S").build());
    let outside = source(&exit.forwarded_any());
    world.world_sends(&tcp(answered, outside, "SA").build());
    world.guest_sends(TAP, &tcp(at(A::GUEST, 1025), answered, "A").build());
    let collect = || {
        for (key, _) in world.sessions.all() {
            world.act(|| tapnat_common::nat::sweep::session(&key, &world));
        }
        world.sessions.len()
    };
    world.wait_seconds(20);
    assert_eq!(collect(), 8);
    world.set(|settings| settings.timeouts.unanswered = Ticks::from_seconds(10));
    assert_eq!(collect(), 4);
    world.wait_seconds(40);
    assert_eq!(collect(), 4);
    // It never makes anything live longer.
    world.set(|settings| {
        settings.timeouts.unanswered = Ticks::from_seconds(9999);
        settings.timeouts.udp = Ticks::from_seconds(5);
    });
    assert_eq!(collect(), 2);
}
both_families!(for_want_of_room_what_nobody_answers_in_ends_first);
