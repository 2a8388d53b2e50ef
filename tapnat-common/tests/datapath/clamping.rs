//! The maximum segment size that SYNs announce, lowered (`--clamp-mss`).

use etherparse::TcpOptionElement::{
    MaximumSegmentSize, Noop, SelectiveAcknowledgementPermitted, Timestamp, WindowScale,
};
use tapnat_common::verdict::Reason;
use tapnat_testbed::packet::Builder;

use crate::support::{
    network::{TAP, Version, at, both_families, tcp},
    world::World,
};

fn clamped<A: Version>(most: u16) -> World<A> {
    let world = World::<A>::new();
    world.set(|settings| settings.clamp_mss = most);
    world
}

fn syn(source: std::net::SocketAddr, destination: std::net::SocketAddr, mss: u16) -> Builder {
    tcp(source, destination, "S").with_tcp(|header| {
        header
            .set_options(&[
                MaximumSegmentSize(mss),
                SelectiveAcknowledgementPermitted,
                Timestamp(1, 0),
                Noop,
                WindowScale(7),
            ])
            .unwrap();
    })
}

fn both_sides_announce_no_more_than_is_allowed<A: Version>() {
    for (announced, expected) in [(1460, 1300), (1301, 1300), (1300, 1300), (536, 536)] {
        let world = clamped::<A>(1300);
        let (guest, server) = (at(A::GUEST, 40_000), at(A::SERVER, 80));
        let outside = at(A::OUTSIDE, 40_000);
        assert_eq!(
            world
                .guest_sends(TAP, &syn(guest, server, announced).build())
                .forwarded(Reason::SessionStarted),
            syn(outside, server, expected).ttl(63).build()
        );
        let answer =
            |destination, mss| syn(server, destination, mss).with_tcp(|header| header.ack = true);
        assert_eq!(
            world
                .world_sends(&answer(outside, announced).build())
                .forwarded(Reason::Translated),
            answer(guest, expected).ttl(63).build()
        );
        // The SYN again, in its session.
        assert_eq!(
            world
                .guest_sends(TAP, &syn(guest, server, announced).build())
                .forwarded(Reason::Translated),
            syn(outside, server, expected).ttl(63).build()
        );
    }
}
both_families!(both_sides_announce_no_more_than_is_allowed);

fn an_option_at_an_odd_place<A: Version>() {
    for raw in [
        &[1, 2, 4, 5, 0xb4, 0, 0, 0][..],
        &[1, 1, 1, 2, 4, 5, 0xb4, 0],
        &[3, 3, 7, 2, 4, 5, 0xb4, 0],
        &[1, 1, 2, 4, 5, 0xb4, 0, 0],
    ] {
        let build = |source, raw: &[u8]| {
            tcp(source, at(A::SERVER, 80), "S")
                .with_tcp(|header| header.set_options_raw(raw).unwrap())
                .payload(b"odd")
        };
        let mut lowered = raw.to_vec();
        let place = raw.windows(2).position(|pair| pair == [5, 0xb4]).unwrap();
        lowered[place..place + 2].copy_from_slice(&1000_u16.to_be_bytes());
        assert_eq!(
            clamped::<A>(1000)
                .guest_sends(TAP, &build(at(A::GUEST, 40_000), raw).build())
                .forwarded(Reason::SessionStarted),
            build(at(A::OUTSIDE, 40_000), &lowered).ttl(63).build(),
            "{raw:?}"
        );
    }
}
both_families!(an_option_at_an_odd_place);

fn nothing_else_is_touched<A: Version>() {
    let world = clamped::<A>(100);
    let check = |build: &dyn Fn(std::net::SocketAddr) -> Builder| {
        let sent = world
            .guest_sends(TAP, &build(at(A::GUEST, 40_000)).build())
            .forwarded_any();
        assert_eq!(sent, build(at(A::OUTSIDE, 40_000)).ttl(63).build());
    };
    // No option, one of another length, one beyond the end of the header, one
    // behind the end of the list, and one that is no longer a SYN's.
    check(&|source| tcp(source, at(A::SERVER, 80), "S"));
    for raw in [
        &[2, 6, 5, 0xb4, 0, 0, 0, 0][..],
        &[1, 1, 2, 4],
        &[0, 2, 4, 5, 0xb4, 0, 0, 0],
        &[2, 0, 5, 0xb4],
    ] {
        check(&|source| {
            tcp(source, at(A::SERVER, 80), "S")
                .with_tcp(|header| header.set_options_raw(raw).unwrap())
                .payload(&[5, 0xb4, 5, 0xb4])
        });
    }
    check(&|source| {
        tcp(source, at(A::SERVER, 80), "A").with_tcp(|header| {
            header.set_options(&[MaximumSegmentSize(1460)]).unwrap();
        })
    });
}
both_families!(nothing_else_is_touched);
