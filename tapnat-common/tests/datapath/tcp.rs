//! TCP's states: every transition, and how long each lives (RFC 5382, RFC 7857
//! section 2, RFC 5961 section 3).

use etherparse::{TcpHeader, TcpOptionElement};
use tapnat_common::{
    abi::{Filtering, FlowKey},
    nat::session::{self, Half, State},
    net::protocol,
    parse::{Packet, parse},
    time::Ticks,
    verdict::Reason,
};
use tapnat_testbed::packet::Builder;

use crate::support::{
    frame::Bytes,
    network::{TAP, Version, at, both_families, endpoint, source, tcp},
    world::{Exit, World},
};

/// A connection of the guest to the server.
struct Connection<A: Version> {
    world: World<A>,
}

impl<A: Version> Connection<A> {
    fn new() -> Self {
        Self {
            world: World::<A>::new(),
        }
    }

    /// After the three-way handshake. Both sides announce windows of 65,535
    /// bytes and no scale; the guest is at 1001, the server at 5001.
    fn established() -> Self {
        let connection = Self::new();
        connection.out("S", |header| header.sequence_number = 1000);
        connection.back("SA", |header| {
            header.sequence_number = 5000;
            header.acknowledgment_number = 1001;
        });
        connection.acknowledge();
        assert_eq!(connection.state(), State::Established);
        connection
    }

    fn acknowledge(&self) {
        self.out("A", |header| {
            header.sequence_number = 1001;
            header.acknowledgment_number = 5001;
        });
        self.back("A", |header| {
            header.sequence_number = 5001;
            header.acknowledgment_number = 1001;
        });
    }

    fn inside(flags: &str, change: impl FnOnce(&mut TcpHeader)) -> Builder {
        tcp(at(A::GUEST, 40_000), at(A::SERVER, 80), flags).with_tcp(change)
    }

    fn outside(flags: &str, change: impl FnOnce(&mut TcpHeader)) -> Builder {
        tcp(at(A::SERVER, 80), at(A::OUTSIDE, 40_000), flags).with_tcp(change)
    }

    #[track_caller]
    fn out(&self, flags: &str, change: impl FnOnce(&mut TcpHeader)) -> Exit {
        let exit = self
            .world
            .guest_sends(TAP, &Self::inside(flags, change).build());
        assert!(exit.sent.is_some(), "{flags} out: {:?}", exit.reason);
        exit
    }

    #[track_caller]
    fn back(&self, flags: &str, change: impl FnOnce(&mut TcpHeader)) -> Exit {
        let exit = self
            .world
            .world_sends(&Self::outside(flags, change).build());
        assert!(exit.sent.is_some(), "{flags} back: {:?}", exit.reason);
        exit
    }

    /// Packets without numbers, `>S` out or `<S` back.
    fn exchange(&self, packets: &[&str]) {
        for packet in packets {
            let (direction, flags) = packet.split_at(1);
            if direction == ">" {
                self.out(flags, |_| ());
            } else {
                self.back(flags, |_| ());
            }
        }
    }

    fn key() -> FlowKey<A> {
        let mut packet = Packet::default();
        parse(&Bytes::raw(&Self::inside("A", |_| ()).build()), &mut packet).unwrap();
        packet.key(Some(TAP))
    }

    fn halves(&self) -> Option<[Half; 2]> {
        let one = self.world.sessions.copy(&Self::key())?;
        let other = self.world.sessions.copy(&one.twin_key(&Self::key()))?;
        Some([Half::from(&one), Half::from(&other)])
    }

    #[track_caller]
    fn state(&self) -> State {
        let [one, other] = self.halves().expect("there is a session");
        let state = session::state(protocol::TCP, one, other);
        assert_eq!(session::state(protocol::TCP, other, one), state);
        state
    }

    fn is_expired(&self) -> bool {
        let session = self.world.sessions.copy(&Self::key()).unwrap();
        let expired = session::is_expired(&Self::key(), &session, &self.world);
        let twin_key = session.twin_key(&Self::key());
        let twin = self.world.sessions.copy(&twin_key).unwrap();
        assert_eq!(
            session::is_expired(&twin_key, &twin, &self.world),
            expired,
            "both halves agree"
        );
        expired
    }

    /// The session lives so many seconds from now on, up to a second more.
    #[track_caller]
    fn assert_lives(&self, seconds: u32) {
        self.world.wait_seconds(seconds);
        assert!(!self.is_expired(), "not after {seconds} s");
        let mapping = self
            .world
            .mappings
            .copy(&endpoint(A::OUTSIDE, 40_000, protocol::TCP))
            .unwrap();
        assert_eq!(mapping.sessions, 1);
        self.world.wait_seconds(1);
        assert!(self.is_expired(), "after {seconds} s and a second");
    }
}

fn the_three_way_handshake<A: Version>() {
    let connection = Connection::<A>::new();
    let steps = [
        (">S", State::Opening),
        ("<SA", State::Opening),
        (">A", State::Established),
        ("<A", State::Established),
        (">PA", State::Established),
    ];
    for (packet, state) in steps {
        connection.exchange(&[packet]);
        assert_eq!(connection.state(), state, "{packet}");
    }
    assert!(connection.out("A", |_| ()).quick);
    assert!(connection.back("A", |_| ()).quick);
}
both_families!(the_three_way_handshake);

fn sequences_that_open<A: Version>() {
    let sequences: [&[&str]; 8] = [
        // The SYN, the SYN-ACK or both are sent again.
        &[">S", ">S", "<SA", ">A"],
        &[">S", "<SA", "<SA", ">A", "<SA", ">A"],
        // The last ACK is lost, and comes with data.
        &[">S", "<SA", ">PA"],
        // Simultaneous open (RFC 9293 figure 8), in three interleavings.
        &[">S", "<S", ">SA", "<SA"],
        &[">S", "<S", "<SA", ">SA", ">A"],
        &[">S", "<S", ">SA", "<A"],
        // Data on the SYN (TCP Fast Open).
        &[">SP", "<SPA", ">A"],
        // The server's challenge to an old incarnation, then the real thing.
        &[">S", "<A", ">S", "<SA", ">A"],
    ];
    for sequence in sequences {
        let connection = Connection::<A>::new();
        connection.exchange(sequence);
        assert_eq!(connection.state(), State::Established, "{sequence:?}");
    }
}
both_families!(sequences_that_open);

fn sequences_that_close<A: Version>() {
    let sequences: [&[&str]; 6] = [
        &[">FA"],
        &["<FA"],
        &[">FA", "<A", "<FA", ">A"],
        &["<FA", ">FA", "<A"],
        &[">FA", "<FA", ">A", "<A"],
        // Half-closed, while the other side goes on.
        &[">FA", "<A", "<PA", ">A", "<PA", ">A"],
    ];
    for sequence in sequences {
        let connection = Connection::<A>::established();
        connection.exchange(sequence);
        assert_eq!(connection.state(), State::Closing, "{sequence:?}");
    }
}
both_families!(sequences_that_close);

fn a_half_closed_connection_lives_while_it_is_used<A: Version>() {
    let connection = Connection::<A>::established();
    connection.exchange(&[">FA"]);
    for _ in 0..20 {
        connection.world.wait_seconds(200);
        connection.exchange(&["<PA", ">A"]);
        assert_eq!(connection.state(), State::Closing);
    }
}
both_families!(a_half_closed_connection_lives_while_it_is_used);

fn how_long_each_state_lives<A: Version>() {
    let connection = Connection::<A>::new();
    connection.exchange(&[">S"]);
    connection.assert_lives(240);

    let connection = Connection::<A>::new();
    connection.exchange(&[">S", "<SA"]);
    connection.assert_lives(240);

    Connection::<A>::established().assert_lives(7440);

    for closing in [&[">FA"][..], &["<FA"], &[">FA", "<FA", ">A"]] {
        let connection = Connection::<A>::established();
        connection.exchange(closing);
        connection.assert_lives(240);
    }

    let connection = Connection::<A>::established();
    connection.back("R", |header| header.sequence_number = 5001);
    assert_eq!(connection.state(), State::Reset);
    connection.assert_lives(240);
}
both_families!(how_long_each_state_lives);

fn either_side_keeps_an_established_connection_alive<A: Version>() {
    for packet in [">A", "<A"] {
        let connection = Connection::<A>::established();
        for _ in 0..3 {
            connection.world.wait_seconds(7000);
            connection.exchange(&[packet]);
        }
        connection.assert_lives(7440);
    }
}
both_families!(either_side_keeps_an_established_connection_alive);

fn the_mapping_lives_as_long_as_its_connection<A: Version>() {
    for packet in [">A", "<A"] {
        let connection = Connection::<A>::established();
        connection.world.wait_seconds(7000);
        connection.exchange(&[packet]);
        connection.world.wait_seconds(7000);
        // A new connection of the same socket finds the same mapping.
        let other = tcp(at(A::GUEST, 40_000), at(A::SERVER, 81), "S").build();
        let sent = connection
            .world
            .guest_sends(TAP, &other)
            .forwarded(Reason::SessionStarted);
        assert_eq!(source(&sent), at(A::OUTSIDE, 40_000));
        assert_eq!(connection.world.mappings.len(), 1);
    }
}
both_families!(the_mapping_lives_as_long_as_its_connection);

fn a_closed_connection_gives_its_port_back_soon<A: Version>() {
    let connection = Connection::<A>::established();
    connection.exchange(&[">FA", "<FA", ">A"]);
    connection.world.wait_seconds(240);
    connection.world.wait_slack();
    let mapping = connection
        .world
        .mappings
        .copy(&endpoint(A::OUTSIDE, 40_000, protocol::TCP))
        .unwrap();
    let now = tapnat_common::nat::Tables::now(&connection.world);
    assert!(!now.is_before(mapping.expires_at));
}
both_families!(a_closed_connection_gives_its_port_back_soon);

fn an_expired_connection_is_over_for_both_sides<A: Version>() {
    let connection = Connection::<A>::established();
    connection.world.wait_seconds(7442);
    let exit = connection
        .world
        .world_sends(&Connection::<A>::outside("A", |_| ()).build());
    assert_eq!(exit.reason, Reason::NoMapping);
    assert_eq!(connection.world.sessions.len(), 0, "it is gone at once");
    // The guest's side is picked up again, as after a restart.
    let exit = connection
        .world
        .guest_sends(TAP, &Connection::<A>::inside("A", |_| ()).build());
    assert_eq!(exit.reason, Reason::SessionStarted);
}
both_families!(an_expired_connection_is_over_for_both_sides);

fn a_reset_in_the_window_counts_and_one_beside_it_does_not<A: Version>() {
    // From the server: the guest expects 5001, up to 65,535 bytes ahead.
    let server = |sequence: u32| {
        let connection = Connection::<A>::established();
        connection.back("R", |header| header.sequence_number = sequence);
        connection.state()
    };
    assert_eq!(server(5001), State::Reset);
    assert_eq!(server(5001 + 65_535), State::Reset);
    assert_eq!(server(5000), State::Established);
    assert_eq!(server(5001 + 65_536), State::Established);
    assert_eq!(server(0), State::Established);
    assert_eq!(server(5001_u32.wrapping_sub(1 << 31)), State::Established);
    // From the guest: the server expects 1001.
    let guest = |sequence: u32| {
        let connection = Connection::<A>::established();
        connection.out("RA", |header| header.sequence_number = sequence);
        connection.state()
    };
    assert_eq!(guest(1001), State::Reset);
    assert_eq!(guest(1000), State::Established);
}
both_families!(a_reset_in_the_window_counts_and_one_beside_it_does_not);

fn a_blind_reset_is_still_translated<A: Version>() {
    // Its receiver judges it, and may answer with a challenge ACK.
    let connection = Connection::<A>::established();
    let exit = connection.back("R", |_| ());
    assert_eq!(exit.reason, Reason::Translated);
    assert_eq!(connection.state(), State::Established);
    connection.assert_lives(7440);
}
both_families!(a_blind_reset_is_still_translated);

fn the_window_that_a_reset_must_hit_is_scaled<A: Version>() {
    let scaled = |header: &mut TcpHeader| {
        header
            .set_options(&[TcpOptionElement::WindowScale(7)])
            .unwrap();
    };
    let connection = || {
        let connection = Connection::<A>::new();
        connection.out("S", scaled);
        connection.back("SA", scaled);
        connection.out("A", |header| {
            header.acknowledgment_number = 5001;
            header.window_size = 1000;
        });
        connection.back("A", |header| header.acknowledgment_number = 1001);
        connection
    };
    let reset = |sequence: u32| {
        let connection = connection();
        connection.back("R", |header| header.sequence_number = sequence);
        connection.state()
    };
    assert_eq!(reset(5001 + 128_000), State::Reset);
    assert_eq!(reset(5001 + 128_001), State::Established);
}
both_families!(the_window_that_a_reset_must_hit_is_scaled);

fn refused_connections_reset_whatever_the_number<A: Version>() {
    for flags in ["R", "RA"] {
        let connection = Connection::<A>::new();
        connection.exchange(&[">S"]);
        connection.back(flags, |header| header.sequence_number = 12_345);
        assert_eq!(connection.state(), State::Reset);
        // The guest tries again, on the same ports.
        connection.exchange(&[">S"]);
        assert_eq!(connection.state(), State::Opening);
        connection.exchange(&["<SA", ">A"]);
        assert_eq!(connection.state(), State::Established);
        assert_eq!(connection.world.mappings.len(), 1);
    }
}
both_families!(refused_connections_reset_whatever_the_number);

fn a_reset_that_its_sender_takes_back<A: Version>() {
    // The sender goes on: it was not the sender's.
    let connection = Connection::<A>::established();
    connection.back("R", |header| header.sequence_number = 5001);
    assert_eq!(connection.state(), State::Reset);
    connection.back("A", |header| {
        header.sequence_number = 5001;
        header.acknowledgment_number = 1001;
    });
    assert_eq!(connection.state(), State::Established);
    connection.assert_lives(7440);
}
both_families!(a_reset_that_its_sender_takes_back);

fn a_reset_that_its_receiver_does_not_heed<A: Version>() {
    // What was in flight does not count.
    let connection = Connection::<A>::established();
    connection.back("R", |header| header.sequence_number = 5001);
    connection.world.wait_seconds(1);
    connection.exchange(&[">PA"]);
    assert_eq!(connection.state(), State::Reset);
    // What comes later does (RFC 7857 section 2).
    connection.world.wait_seconds(5);
    connection.exchange(&[">PA"]);
    assert_eq!(connection.state(), State::Established);
    connection.assert_lives(7440);
}
both_families!(a_reset_that_its_receiver_does_not_heed);

fn a_reset_again_and_again<A: Version>() {
    let connection = Connection::<A>::established();
    for _ in 0..10 {
        connection.back("R", |header| header.sequence_number = 5001);
        assert_eq!(connection.state(), State::Reset);
        connection.world.wait_seconds(100);
    }
}
both_families!(a_reset_again_and_again);

fn a_syn_reopens_what_is_closing<A: Version>() {
    let endings: [&[&str]; 3] = [&[">FA", "<FA", ">A"], &["<FA", ">A"], &[">FA"]];
    for ending in endings {
        for opening in [[">S", "<SA", ">A"], ["<S", ">SA", "<A"]] {
            let connection = Connection::<A>::established();
            connection.exchange(ending);
            connection.exchange(&opening[..1]);
            assert_eq!(connection.state(), State::Opening, "{ending:?} {opening:?}");
            connection.exchange(&opening[1..]);
            assert_eq!(connection.state(), State::Established);
            connection.assert_lives(7440);
            assert_eq!(connection.world.sessions.len(), 2);
        }
    }
}
both_families!(a_syn_reopens_what_is_closing);

fn a_reopened_connection_has_windows_of_its_own<A: Version>() {
    let connection = Connection::<A>::established();
    connection.exchange(&[">FA", "<FA", ">A"]);
    let scaled = |header: &mut TcpHeader| {
        header
            .set_options(&[TcpOptionElement::WindowScale(2)])
            .unwrap();
    };
    connection.out("S", |header| {
        scaled(header);
        header.sequence_number = 90_000;
    });
    connection.back("SA", |header| {
        scaled(header);
        header.sequence_number = 70_000;
        header.acknowledgment_number = 90_001;
    });
    connection.out("A", |header| {
        header.sequence_number = 90_001;
        header.acknowledgment_number = 70_001;
        header.window_size = 100;
    });
    assert_eq!(connection.state(), State::Established);
    connection.back("R", |header| header.sequence_number = 70_001 + 401);
    assert_eq!(connection.state(), State::Established);
    connection.back("R", |header| header.sequence_number = 70_001 + 400);
    assert_eq!(connection.state(), State::Reset);
}
both_families!(a_reopened_connection_has_windows_of_its_own);

fn a_reset_after_reopening_is_not_judged_by_old_numbers<A: Version>() {
    let connection = Connection::<A>::established();
    connection.exchange(&[">FA", "<FA", ">A"]);
    connection.out("S", |header| header.sequence_number = 90_000);
    // Refused.
    connection.back("RA", |header| {
        header.sequence_number = 0;
        header.acknowledgment_number = 90_001;
    });
    assert_eq!(connection.state(), State::Reset);
}
both_families!(a_reset_after_reopening_is_not_judged_by_old_numbers);

fn a_syn_into_an_open_connection_changes_nothing<A: Version>() {
    for packet in [">S", "<S"] {
        let connection = Connection::<A>::established();
        connection.exchange(&[packet]);
        assert_eq!(connection.state(), State::Established);
        connection.assert_lives(7440);
    }
}
both_families!(a_syn_into_an_open_connection_changes_nothing);

fn connections_from_before_our_time_are_picked_up<A: Version>() {
    let connection = Connection::<A>::new();
    connection.exchange(&[">PA"]);
    connection.exchange(&["<A"]);
    assert_eq!(connection.state(), State::Established);
    assert!(connection.out("A", |_| ()).quick);
    assert!(connection.back("A", |_| ()).quick);
    connection.assert_lives(7440);
    // As long as only the guest sends, it may be nothing.
    let connection = Connection::<A>::new();
    connection.exchange(&[">A", ">A"]);
    connection.assert_lives(240);
}
both_families!(connections_from_before_our_time_are_picked_up);

fn what_does_not_open_a_connection<A: Version>() {
    let world = World::<A>::new();
    for flags in [
        "", "F", "FA", "R", "RA", "SA", "SF", "SR", "SFA", "P", "SRA",
    ] {
        let exit = world.guest_sends(TAP, &Connection::<A>::inside(flags, |_| ()).build());
        assert_eq!(exit.reason, Reason::NoSession, "{flags:?}");
        assert_eq!(world.sizes()[..4], [0; 4]);
    }
    // With a mapping that lets everybody in.
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &Connection::<A>::inside("S", |_| ()).build());
    for flags in ["", "A", "PA", "F", "FA", "R", "RA", "SA", "SF", "SR"] {
        let stranger = tcp(at(A::SERVER, 9999), at(A::OUTSIDE, 40_000), flags);
        let exit = world.world_sends(&stranger.build());
        assert_eq!(exit.reason, Reason::NoSession, "{flags:?}");
    }
    let stranger = tcp(at(A::SERVER, 9999), at(A::OUTSIDE, 40_000), "S");
    let exit = world.world_sends(&stranger.build());
    assert_eq!(exit.reason, Reason::SessionAdmitted);
}
both_families!(what_does_not_open_a_connection);

fn without_a_mapping_segments_are_the_hosts<A: Version>() {
    let world = World::<A>::new();
    for flags in ["A", "PA", "F", "FA", "R", "RA", "SA"] {
        let exit = world.world_sends(&Connection::<A>::outside(flags, |_| ()).build());
        assert_eq!(exit.reason, Reason::NoMapping, "{flags:?}");
    }
}
both_families!(without_a_mapping_segments_are_the_hosts);

fn an_unsolicited_syn_waits_for_one_from_inside<A: Version>() {
    // RFC 5382 REQ-4.
    let connection = Connection::<A>::new();
    let syn = Connection::<A>::outside("S", |header| header.sequence_number = 777);
    let exit = connection.world.world_sends(&syn.build());
    assert_eq!(exit.reason, Reason::UnsolicitedSyn);
    assert!(exit.sent.is_none(), "it is not answered at once");
    // That it comes again does not put the answer off.
    let first = connection.world.unsolicited.all();
    connection.world.wait_seconds(3);
    connection.world.world_sends(&syn.build());
    let noted = connection.world.unsolicited.all();
    assert_eq!(noted.len(), 1);
    assert_eq!(noted[0].1.arrived, first[0].1.arrived);
    assert_eq!(noted[0].1.sequence.get(), 777);
    assert_eq!(connection.world.sizes()[..4], [0; 4]);
    // The guest's SYN makes it a simultaneous open.
    connection.exchange(&[">S", "<S", ">SA", "<SA"]);
    assert_eq!(connection.state(), State::Established);
}
both_families!(an_unsolicited_syn_waits_for_one_from_inside);

fn stamps_are_not_written_for_every_packet<A: Version>() {
    let connection = Connection::<A>::established();
    let stamp = || connection.halves().unwrap()[0].last_seen;
    let first = stamp();
    connection.world.wait(Ticks::from_milliseconds(400));
    assert!(connection.out("A", |_| ()).quick);
    assert_eq!(stamp(), first);
    connection.world.wait(Ticks::from_milliseconds(200));
    assert!(connection.out("A", |_| ()).quick);
    assert_ne!(stamp(), first);
    // Less often the way is looked at, too.
    let slots = connection.world.timeouts().confirm_after();
    for _ in 2..slots {
        connection.world.wait(Ticks::SLOT);
        let last = stamp();
        assert!(connection.out("A", |_| ()).quick);
        assert_ne!(stamp(), last);
    }
    connection.world.wait(Ticks::SLOT);
    connection.world.wait(Ticks::SLOT);
    let exit = connection.out("A", |_| ());
    assert!(!exit.quick);
    assert!(
        exit.sent.unwrap().resolve,
        "the neighbour is confirmed then"
    );
}
both_families!(stamps_are_not_written_for_every_packet);
