//! RFC 7857, Updates to NAT Behavioral Requirements: a test for each section
//! that asks for something, by what arrives.

use std::{collections::BTreeSet, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    capture::Captured,
    packet::{self, Parsed},
    traffic,
};
use tapnat_tests::{
    both_families,
    connection::{
        Connection,
        Flags::{Ack, FinAck, Rst, Syn, SynAck},
    },
    family::Family,
    world::just_over,
};

/// Section 2.1: the state machine: a session is established once both sides
/// have answered, and transitory before and after.
fn section_2_1_sessions_follow_their_connections(family: Family) -> Result<()> {
    let (world, wires) = family.wired(1, &[])?;
    let state = || -> Result<String> {
        let flows = world.instance.ask_json("flows")?;
        let flows = flows.as_array().context("no list")?;
        let flow = flows.iter().find(|flow| flow["protocol"] == "tcp");
        let state = flow.and_then(|flow| flow["state"].as_str());
        Ok(state.context("no TCP session")?.to_owned())
    };
    let mut connection = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    connection.out(Syn, b"")?;
    ensure!(state()? == "opening");
    connection.back(SynAck, b"")?;
    ensure!(state()? == "opening");
    connection.out(Ack, b"")?;
    ensure!(state()? == "established");
    connection.talk()?;
    ensure!(state()? == "established");
    connection.back(FinAck, b"")?;
    ensure!(state()? == "closing");
    connection.out(FinAck, b"")?;
    connection.back(Ack, b"")?;
    ensure!(state()? == "closing");
    Ok(())
}
both_families!(section_2_1_sessions_follow_their_connections);

/// Section 2.2: four minutes or more by default for transitory sessions.
fn section_2_2_the_default_transitory_timeout_is_long_enough(family: Family) -> Result<()> {
    let (world, _wires) = family.wired(1, &[])?;
    let status = world.instance.ask_json("status")?;
    for name in ["tcp_opening", "tcp_closing"] {
        let timeout = status["timeouts"][name].as_f64();
        ensure!(timeout.is_some_and(|seconds| seconds >= 240.0), "{status}");
    }
    Ok(())
}
both_families!(section_2_2_the_default_transitory_timeout_is_long_enough);

/// Section 2.2: a timeout for sessions that open, and one for those that close.
fn section_2_2_opening_and_closing_have_timeouts_of_their_own(family: Family) -> Result<()> {
    for (option, is_opening_short) in [
        ("--tcp-opening-timeout", true),
        ("--tcp-closing-timeout", false),
    ] {
        let (_world, wires) = family.wired(1, &[option, "1"])?;
        let mut opening = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
        opening.out(Syn, b"")?;
        let mut answered = Connection::new(&wires, 0, 40_001, family.remote(0, 80));
        answered.out(Syn, b"")?;
        answered.back(SynAck, b"")?;
        let mut open = Connection::new(&wires, 0, 40_002, family.remote(0, 80));
        open.open()?;
        let mut closing = Connection::new(&wires, 0, 40_003, family.remote(0, 80));
        closing.open()?;
        closing.out(FinAck, b"")?;
        let mut reset = Connection::new(&wires, 0, 40_004, family.remote(0, 80));
        reset.open()?;
        reset.out(Rst, b"")?;
        thread::sleep(just_over(1));
        open.back(Ack, b"still there")?;
        let (ended, mut stays) = if is_opening_short {
            ([opening, answered], [closing, reset])
        } else {
            ([closing, reset], [opening, answered])
        };
        for connection in &ended {
            connection.check_ended().context(option)?;
        }
        for connection in &mut stays {
            connection.back(Ack, b"late").context(option)?;
        }
    }
    Ok(())
}
both_families!(section_2_2_opening_and_closing_have_timeouts_of_their_own);

/// Section 2.3: a RST is translated, and its session stays for the closing
/// timeout.
fn section_2_3_a_reset_session_is_not_removed_at_once(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--tcp-closing-timeout", "1"])?;
    let mut by_guest = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    by_guest.open()?;
    by_guest.talk()?;
    by_guest.out(Rst, b"")?;
    // What was under way, and a RST again.
    by_guest.back(Ack, b"under way")?;
    by_guest.out(Rst, b"")?;
    let mut by_remote = Connection::new(&wires, 0, 40_001, family.remote(0, 80));
    by_remote.open()?;
    by_remote.talk()?;
    by_remote.back(Rst, b"")?;
    by_remote.out(Ack, b"under way")?;
    by_remote.back(Rst, b"")?;
    thread::sleep(just_over(1));
    by_guest.check_ended()?;
    by_remote.check_ended()
}
both_families!(section_2_3_a_reset_session_is_not_removed_at_once);

/// Section 2.3: a connection that goes on after a RST was not reset.
fn section_2_3_a_connection_that_goes_on_was_not_reset(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--tcp-closing-timeout", "1"])?;
    let mut connection = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    connection.open()?;
    connection.talk()?;
    connection.back(Rst, b"")?;
    connection.talk()?;
    connection.talk()?;
    thread::sleep(just_over(1));
    connection.back(Ack, b"still there")?;
    connection.talk()
}
both_families!(section_2_3_a_connection_that_goes_on_was_not_reset);

/// Section 2.3 and RFC 5961 section 3: a blind RST, which is not where its
/// receiver is, changes nothing.
fn section_2_3_a_blind_reset_changes_nothing(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--tcp-closing-timeout", "1"])?;
    let mut connections = Vec::new();
    // Behind and ahead of the window of 8192 bytes that both announce.
    let offsets = [
        0x8000_0000,
        10_000,
        0x7fff_ffff,
        u32::MAX,
        u32::MAX - 10_000,
    ];
    for (port, offset) in (40_000..).zip(offsets) {
        let mut connection = Connection::new(&wires, 0, port, family.remote(0, 80));
        connection.open()?;
        connection.talk()?;
        let [ours, theirs] = connection.next;
        for (is_outward, next) in [
            (false, [ours, theirs.wrapping_add(offset)]),
            (true, [ours.wrapping_add(offset), theirs]),
        ] {
            connection.next = next;
            if is_outward {
                wires.guests[0].send(&connection.outward(Rst, b""))?;
            } else {
                wires.world.send(&connection.inward(Rst, b"")?)?;
            }
        }
        connection.next = [ours, theirs];
        connections.push((offset, connection));
        wires.arrivals()?;
    }
    thread::sleep(just_over(1));
    for (offset, connection) in &mut connections {
        connection
            .back(Ack, b"still there")
            .with_context(|| format!("after a RST at an offset of {offset:#x}"))?;
        connection.talk()?;
    }
    Ok(())
}
both_families!(section_2_3_a_blind_reset_changes_nothing);

/// Section 3: ports overlap only where mappings depend on the remote, which has
/// to be asked for.
fn section_3_ports_overlap_only_when_asked_for(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    let one = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let other = wires.map_udp(1, 40_000, family.remote(1, 53))?;
    ensure!(one != other, "both have {one}");

    let mode = ["--mapping", "address-and-port-dependent"];
    let (_world, wires) = family.wired(2, &[&mode[..], &["--ports", "40000-40001"]].concat())?;
    let remotes = [
        family.remote(0, 53),
        family.remote(0, 54),
        family.remote(1, 53),
        family.remote(1, 54),
    ];
    for remote in remotes {
        // Two guests share two ports for each remote.
        let mut seen = Vec::new();
        for guest in 0..2 {
            let outside = wires.map_udp(guest, 40_000, remote)?;
            ensure!(!seen.contains(&outside), "both have {outside} for {remote}");
            seen.push(outside);
        }
        for (guest, outside) in seen.into_iter().enumerate() {
            wires.answer_udp(remote, outside, guest, 40_000)?;
        }
    }
    for (guest, port) in [(0, 40_000), (1, 40_001)] {
        for remote in remotes {
            let mut connection = Connection::new(&wires, guest, port, remote);
            connection.open()?;
            connection.talk()?;
        }
    }
    wires.nothing_arrives()
}
both_families!(section_3_ports_overlap_only_when_asked_for);

/// Section 3: the connections of one outside endpoint to different remotes are
/// told apart, and a remote that was not sent to is told that there is nobody
/// or nothing at all.
fn section_3_overlapping_sessions_are_told_apart(family: Family) -> Result<()> {
    let mode = ["--mapping", "udp=address-and-port-dependent"];
    let (_world, wires) = family.wired(2, &mode)?;
    let one = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let other = wires.map_udp(1, 40_000, family.remote(1, 53))?;
    ensure!(one == other, "{one} and {other}: nothing overlaps");
    wires.answer_udp(family.remote(0, 53), one, 0, 40_000)?;
    wires.answer_udp(family.remote(1, 53), one, 1, 40_000)?;
    for stranger in [family.remote(0, 54), family.remote(1, 54)] {
        wires.world.send(&packet::udp(stranger, one))?;
        let arrivals = wires.arrivals()?;
        ensure!(arrivals.guests.iter().all(Vec::is_empty), "from {stranger}");
    }
    // TCP is as it was.
    let mut one = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    one.open()?;
    let mut other = Connection::new(&wires, 1, 40_000, family.remote(1, 80));
    other.open()?;
    ensure!(one.outside()? != other.outside()?, "TCP overlaps");
    Ok(())
}
both_families!(section_3_overlapping_sessions_are_told_apart);

/// Section 3: ports overlap for the protocol that they were asked to overlap for.
fn section_3_ports_of_tcp_overlap_without_those_of_udp(family: Family) -> Result<()> {
    let mode = ["--mapping", "tcp=address-and-port-dependent"];
    let (_world, wires) = family.wired(2, &mode)?;
    let mut one = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    one.open()?;
    let mut other = Connection::new(&wires, 1, 40_000, family.remote(1, 80));
    other.open()?;
    let (at, same) = (one.outside()?, other.outside()?);
    ensure!(at == same, "{at} and {same}: nothing overlaps");
    one.talk()?;
    other.talk()?;
    // The same remote tells them apart by their ports.
    let mut third = Connection::new(&wires, 1, 40_000, family.remote(0, 80));
    third.open()?;
    ensure!(third.outside()? != at, "both have {at} for one remote");
    third.talk()?;
    one.talk()?;
    let one = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let other = wires.map_udp(1, 40_000, family.remote(1, 53))?;
    ensure!(one != other, "UDP overlaps");
    Ok(())
}
both_families!(section_3_ports_of_tcp_overlap_without_those_of_udp);

/// Section 5: mappings are made for each protocol independently.
fn section_5_mappings_are_made_for_each_protocol(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    ensure!(wires.map_udp(0, 40_000, family.remote(0, 53))? == family.outside(40_000));
    let mut connection = Connection::new(&wires, 1, 40_000, family.remote(0, 80));
    connection.open()?;
    ensure!(
        connection.outside()? == family.outside(40_000),
        "UDP took a TCP port"
    );
    wires.answer_udp(family.remote(0, 53), family.outside(40_000), 0, 40_000)?;
    connection.talk()
}
both_families!(section_5_mappings_are_made_for_each_protocol);

/// Section 6: filtering is done for each protocol independently.
fn section_6_filtering_is_done_for_each_protocol(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--filtering", "endpoint-independent"])?;
    wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let mut connection = Connection::new(&wires, 0, 40_001, family.remote(0, 80));
    connection.open()?;
    for packet in [
        packet::tcp(family.remote(0, 53), family.outside(40_000))
            .with_tcp(|header| header.syn = true),
        packet::udp(family.remote(0, 80), family.outside(40_001)),
    ] {
        wires.world.send(&packet)?;
        let arrivals = wires.arrivals()?;
        ensure!(
            arrivals.guests[0].is_empty(),
            "let in by another protocol's"
        );
    }
    connection.talk()
}
both_families!(section_6_filtering_is_done_for_each_protocol);

/// Section 7: who is let in by endpoint-independent filtering does not keep the
/// mapping alive.
fn section_7_unsolicited_packets_do_not_refresh_the_mapping(family: Family) -> Result<()> {
    let options = ["--filtering", "endpoint-independent", "--udp-timeout", "1"];
    let (_world, wires) = family.wired(1, &options)?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    for port in 1..=10 {
        wires
            .world
            .send(&packet::udp(family.remote(1, port), seen))?;
        thread::sleep(Duration::from_millis(300));
    }
    wires.arrivals()?;
    wires.world.send(&packet::udp(family.remote(0, 53), seen))?;
    ensure!(wires.arrivals()?.guests[0].is_empty(), "it is still there");
    Ok(())
}
both_families!(section_7_unsolicited_packets_do_not_refresh_the_mapping);

/// Section 7.1: a RST that answers a packet from outside does not keep the
/// mapping alive. (ICMP errors: RFC 5508 REQ-6.)
fn section_7_1_resets_do_not_refresh_the_mapping(family: Family) -> Result<()> {
    let options = [
        "--filtering",
        "endpoint-independent",
        "--tcp-opening-timeout",
        "1",
    ];
    let (_world, wires) = family.wired(1, &options)?;
    let mut first = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    first.out(Syn, b"")?;
    for port in 1..=10 {
        let mut stranger = Connection::new(&wires, 0, 40_000, family.remote(1, port));
        stranger.outside = first.outside;
        wires.world.send(&stranger.inward(Syn, b"")?)?;
        wires.guests[0].send(&stranger.outward(Rst, b""))?;
        wires.arrivals()?;
        thread::sleep(Duration::from_millis(300));
    }
    let syn =
        packet::tcp(family.remote(1, 99), first.outside()?).with_tcp(|header| header.syn = true);
    wires.world.send(&syn)?;
    ensure!(wires.arrivals()?.guests[0].is_empty(), "it is still there");
    Ok(())
}
both_families!(section_7_1_resets_do_not_refresh_the_mapping);

/// The outside ports of a guest whose own ports are all taken by another.
fn chosen_ports(family: Family, count: u16) -> Result<Vec<u16>> {
    let (_world, wires) = family.wired(2, &[])?;
    (40_000..40_000 + count)
        .map(|port| {
            wires.map_udp(0, port, family.remote(0, 53))?;
            Ok(wires.map_udp(1, port, family.remote(0, 53))?.port())
        })
        .collect()
}

/// Section 9: ports are randomised (RFC 6056), also from one start to the next.
fn section_9_ports_are_random(family: Family) -> Result<()> {
    let runs = [chosen_ports(family, 40)?, chosen_ports(family, 40)?];
    for ports in &runs {
        let gaps: BTreeSet<_> = ports
            .windows(2)
            .map(|pair| i32::from(pair[1]) - i32::from(pair[0]))
            .collect();
        let (least, most) = (ports.iter().min(), ports.iter().max());
        let spread = most.zip(least).map_or(0, |(most, least)| most - least);
        ensure!(gaps.len() > 30 && spread > 10_000, "{ports:?}");
    }
    let both: BTreeSet<_> = runs.concat().into_iter().collect();
    ensure!(both.len() > 70, "the same again: {runs:?}");
    Ok(())
}
both_families!(section_9_ports_are_random);

/// Section 10 and RFC 6864 section 5.3.1: the identifications of two guests'
/// fragments do not collide behind the shared address.
fn section_10_identifications_do_not_collide(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    for identification in [1, 2, 0x1234, 0xffff] {
        for (guest, port) in [(0, 40_000), (1, 50_000)] {
            let datagram = packet::udp(wires.inside(guest, port), family.remote(0, 53))
                .payload(&traffic::pattern(4000))
                .identification(identification);
            wires.guests[guest].send_all(&datagram, |packet| packet.fragments(1500))?;
        }
        let arrived = wires.arrivals()?.world;
        let arrived: Vec<Parsed> = arrived.iter().map(Captured::parse).collect::<Result<_>>()?;
        let identifications: Vec<_> = arrived
            .iter()
            .filter_map(|packet| Some(packet.fragment()?.identification))
            .collect();
        let distinct: BTreeSet<_> = identifications.iter().collect();
        ensure!(
            identifications.len() == 6 && distinct.len() == 2,
            "{identifications:04x?}"
        );
    }
    Ok(())
}
both_families!(section_10_identifications_do_not_collide);
