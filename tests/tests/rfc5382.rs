//! RFC 5382, NAT Behavioral Requirements for TCP: a test for each requirement,
//! by what arrives.

use std::{
    net::{Shutdown, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    packet,
    topology::{Inside, Tap},
    traffic::{self, TcpReflector, TcpSession},
};
use tapnat_tests::{
    both_families,
    connection::{
        Connection, Flags,
        Flags::{Ack, FinAck, Rst, Syn, SynAck},
        OURS, THEIRS, same_segment, segment,
    },
    family::Family,
    wires::Wires,
    world::{World, just_over},
};

/// REQ-1: endpoint-independent mapping for TCP.
fn req_1_mapping_is_endpoint_independent(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    let remotes = [
        family.remote(0, 80),
        family.remote(0, 81),
        family.remote(1, 80),
        family.remote(1, 81),
    ];
    for guest in 0..2 {
        let mut seen = Vec::new();
        for remote in remotes {
            let mut connection = Connection::new(&wires, guest, 40_000, remote);
            connection.open()?;
            connection.talk()?;
            seen.push(connection.outside()?);
        }
        ensure!(seen == [seen[0]; 4], "{seen:?}");
    }
    wires.nothing_arrives()
}
both_families!(req_1_mapping_is_endpoint_independent);

/// REQ-2: all valid sequences of TCP packets: the three-way handshake, with
/// every packet sent twice, and a close from either side, or from both at once.
fn req_2_three_way_handshakes_and_all_closes(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let mut ports = 40_000..;
    let mut opened = || -> Result<Connection> {
        let port = ports.next().context("no port")?;
        let mut connection = Connection::new(&wires, 0, port, family.remote(0, 80));
        // As if each had been lost on its further way.
        let start = connection.next;
        connection.out(Syn, b"")?;
        connection.next = start;
        connection.out(Syn, b"")?;
        let answered = connection.next;
        connection.back(SynAck, b"")?;
        connection.next = answered;
        connection.back(SynAck, b"")?;
        connection.out(Ack, b"")?;
        connection.talk()?;
        Ok(connection)
    };
    let mut guest_first = opened()?;
    guest_first.out(FinAck, b"")?;
    // Half closed: the other half goes on.
    for _ in 0..3 {
        guest_first.back(Ack, b"and more")?;
        guest_first.out(Ack, b"")?;
    }
    guest_first.back(FinAck, b"")?;
    guest_first.out(Ack, b"")?;

    let mut remote_first = opened()?;
    remote_first.back(FinAck, b"")?;
    for _ in 0..3 {
        remote_first.out(Ack, b"and more")?;
        remote_first.back(Ack, b"")?;
    }
    remote_first.out(FinAck, b"")?;
    remote_first.back(Ack, b"")?;
    // The last acknowledgement again, as in TIME_WAIT.
    remote_first.back(Ack, b"")?;

    let mut both = opened()?;
    let inward = both.inward(FinAck, b"last")?;
    both.out(FinAck, b"last")?;
    let arrived = wires.back(&inward, 0)?;
    ensure!(same_segment(&arrived, &inward), "{arrived:?}");
    both.advance(1, FinAck, b"last");
    both.out(Ack, b"")?;
    both.back(Ack, b"")?;

    let mut reset = opened()?;
    reset.out(Rst, b"")?;
    let mut reset = opened()?;
    reset.back(Rst, b"")?;
    wires.nothing_arrives()
}
both_families!(req_2_three_way_handshakes_and_all_closes);

/// REQ-2a: simultaneous open.
fn req_2a_simultaneous_opens(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    for port in 40_000..40_003 {
        let mut connection = Connection::new(&wires, 0, port, family.remote(0, 80));
        let start = connection.next;
        connection.out(Syn, b"")?;
        // Sent before ours arrived.
        connection.back(Syn, b"")?;
        let after = connection.next;
        // Both answer with their SYN again.
        connection.next = [start[0], after[1]];
        connection.out(SynAck, b"")?;
        connection.next = [after[0], start[1]];
        connection.back(SynAck, b"")?;
        connection.next = after;
        connection.talk()?;
        connection.back(FinAck, b"")?;
        connection.out(FinAck, b"")?;
        connection.back(Ack, b"")?;
    }
    wires.nothing_arrives()
}
both_families!(req_2a_simultaneous_opens);

/// REQ-2 for connections initiated externally, where the filter permits.
fn req_2_connections_from_outside(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--filtering", "endpoint-independent"])?;
    let mut first = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    first.open()?;
    let mut connection = Connection::new(&wires, 0, 40_000, family.remote(1, 1234));
    connection.outside = first.outside;
    connection.back(Syn, b"")?;
    connection.out(SynAck, b"")?;
    connection.back(Ack, b"")?;
    connection.talk()?;
    connection.back(FinAck, b"")?;
    connection.out(FinAck, b"")?;
    connection.back(Ack, b"")?;
    wires.nothing_arrives()
}
both_families!(req_2_connections_from_outside);

/// REQ-2 with real stacks, many at once, that open, talk, half close and close.
fn req_2_real_connections(family: Family) -> Result<()> {
    let world = World::start(family.topology(), &[])?;
    let tcp = TcpReflector::start(&world.topology.world, family.server(0, 7))?;
    let guest = &world.guest(0).namespace;
    let payload = traffic::pattern(300_000);
    let mut sessions = (0..20)
        .map(|_| TcpSession::open(guest, None, tcp.address()))
        .collect::<Result<Vec<_>>>()?;
    for session in &mut sessions {
        session.exchange(&payload)?;
    }
    for session in &sessions {
        // Its answer comes after our end is closed.
        let mut stream = session.stream();
        std::io::Write::write_all(&mut stream, b"last words")?;
        stream.shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut rest)?;
        ensure!(rest == b"last words", "{rest:?}");
    }
    Ok(())
}
both_families!(req_2_real_connections);

/// A connection that began before the NAT did goes on (`docs`: traps).
fn req_2_connections_that_are_older_than_the_nat(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    connection.talk()?;
    ensure!(
        connection.outside()? == family.outside(40_000),
        "another port"
    );
    connection.back(FinAck, b"")?;
    connection.out(FinAck, b"")?;
    wires.nothing_arrives()
}
both_families!(req_2_connections_that_are_older_than_the_nat);

/// REQ-2: a SYN opens a closed connection's endpoints anew (RFC 1122, section
/// 4.2.2.13), with the long timeout.
fn req_2_a_closed_connection_can_be_opened_again(family: Family) -> Result<()> {
    let timeouts = ["--tcp-opening-timeout", "1", "--tcp-closing-timeout", "1"];
    let (_world, wires) = family.wired(1, &timeouts)?;
    let ends: [&[(bool, Flags)]; 3] = [
        &[(true, FinAck), (false, FinAck), (true, Ack)],
        &[(true, Rst)],
        &[(false, Rst)],
    ];
    let mut connections = Vec::new();
    for (port, end) in (40_000..).zip(ends) {
        let mut connection = Connection::new(&wires, 0, port, family.remote(0, 80));
        connection.open()?;
        for (is_outward, flags) in end {
            if *is_outward {
                connection.out(*flags, b"")?;
            } else {
                connection.back(*flags, b"")?;
            }
        }
        // A later one has a higher sequence number (RFC 6191).
        connection.next = [OURS + 0x10_0000, THEIRS.wrapping_add(0x10_0000)];
        connection.open()?;
        connection.talk()?;
        connections.push(connection);
    }
    thread::sleep(just_over(1));
    for connection in &mut connections {
        connection.back(Ack, b"still there")?;
        connection.talk()?;
    }
    Ok(())
}
both_families!(req_2_a_closed_connection_can_be_opened_again);

/// Whether a SYN from this remote is let in to the mapping of a connection.
fn is_let_in(wires: &Wires, from: SocketAddr, mapping: SocketAddr) -> Result<bool> {
    let syn = packet::tcp(from, mapping).with_tcp(|header| header.syn = true);
    wires.world.send(&syn)?;
    let arrivals = wires.arrivals()?;
    ensure!(arrivals.world.is_empty(), "{from} got an answer");
    Ok(!arrivals.guests[0].is_empty())
}

/// REQ-3: address-dependent filtering for TCP by default.
fn req_3_filtering_is_address_dependent_by_default(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    connection.open()?;
    let seen = connection.outside()?;
    ensure!(
        is_let_in(&wires, family.remote(0, 81), seen)?,
        "another port"
    );
    ensure!(
        !is_let_in(&wires, family.remote(1, 80), seen)?,
        "another address"
    );
    connection.talk()
}
both_families!(req_3_filtering_is_address_dependent_by_default);

/// REQ-3a: the administrator chooses the filtering. REQ-3b: for TCP and UDP
/// each.
fn req_3a_filtering_is_configurable(family: Family) -> Result<()> {
    for (mode, lets_in) in [
        ("tcp=endpoint-independent", [true, true]),
        ("tcp=address-and-port-dependent", [false, false]),
        (
            "tcp=address-dependent,udp=endpoint-independent",
            [true, false],
        ),
    ] {
        let (_world, wires) = family.wired(1, &["--filtering", mode])?;
        let mut connection = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
        connection.open()?;
        let seen = connection.outside()?;
        for (from, lets_in) in [family.remote(0, 81), family.remote(1, 80)]
            .into_iter()
            .zip(lets_in)
        {
            ensure!(
                is_let_in(&wires, from, seen)? == lets_in,
                "{mode}, from {from}: not {lets_in}"
            );
        }
    }
    Ok(())
}
both_families!(req_3a_filtering_is_configurable);

/// REQ-4: an unsolicited inbound SYN is not answered for six seconds; an
/// outbound SYN in that time makes it a simultaneous open.
fn req_4_an_unsolicited_syn_is_not_answered_at_once(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    // To a mapping that does not let it in, and to a port without one.
    let mapped = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    let mut mapped = Connection { ..mapped };
    mapped.open()?;
    for port in [40_000, 40_001] {
        let mut connection = Connection::new(&wires, 0, port, family.remote(1, 80));
        connection.outside = Some(family.outside(port));
        connection
            .not_back(Syn, b"")
            .with_context(|| format!("port {port}"))?;
        let start = connection.next;
        connection.out(Syn, b"")?;
        // It comes again, and now it is let in.
        connection.back(Syn, b"")?;
        let after = connection.next;
        connection.next = [start[0], after[1]];
        connection.out(SynAck, b"")?;
        connection.next = after;
        connection.talk()?;
    }
    wires.nothing_arrives()
}
both_families!(req_4_an_unsolicited_syn_is_not_answered_at_once);

/// REQ-4: otherwise it is answered with ICMP port unreachable, about the SYN
/// as it was sent, unless the operator does not want that.
fn req_4_an_unsolicited_syn_is_answered_after_six_seconds(family: Family) -> Result<()> {
    let syn = packet::tcp(family.remote(1, 80), family.outside(40_000))
        .with_tcp(|header| header.syn = true);
    let (_silent, silent) = family.wired(1, &["--no-unsolicited-answer"])?;
    silent.world.send(&syn)?;
    let (_world, wires) = family.wired(1, &[])?;
    let mut mapped = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    mapped.open()?;
    let start = Instant::now();
    wires.world.send(&syn)?;
    wires.nothing_arrives()?;
    let answer = loop {
        match wires.arrivals()?.world.first() {
            Some(answer) => break answer.parse()?,
            None => ensure!(start.elapsed() < Duration::from_secs(20), "no answer"),
        }
        thread::sleep(Duration::from_millis(100));
    };
    let waited = start.elapsed();
    ensure!(waited >= Duration::from_secs(6), "after {waited:?}");
    let quoted = answer.quoted()?;
    ensure!(
        answer.icmp_kind() == Some(family.port_unreachable())
            && answer.source_address() == family.outside_address()
            && answer.destination_address() == family.remote(1, 80).ip()
            && (quoted.source, quoted.destination)
                == (family.remote(1, 80), family.outside(40_000)),
        "{answer:?}"
    );
    thread::sleep(just_over(1));
    silent.nothing_arrives()?;
    mapped.talk()
}
both_families!(req_4_an_unsolicited_syn_is_answered_after_six_seconds);

/// REQ-5: the established connection idle-timeout is not under 2 hours 4
/// minutes, the transitory one not under 4 minutes.
fn req_5_the_default_timeouts_are_long_enough(family: Family) -> Result<()> {
    let (world, _wires) = family.wired(1, &[])?;
    let status = world.instance.ask_json("status")?;
    for (name, least) in [
        ("tcp_established", 7440.0),
        ("tcp_opening", 240.0),
        ("tcp_closing", 240.0),
    ] {
        let timeout = status["timeouts"][name].as_f64();
        ensure!(timeout.is_some_and(|seconds| seconds >= least), "{status}");
    }
    Ok(())
}
both_families!(req_5_the_default_timeouts_are_long_enough);

/// REQ-5a: the timeouts are configurable, each for its states.
fn req_5a_the_timeouts_are_configurable(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--tcp-established-timeout", "1"])?;
    let mut opening = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    opening.out(Syn, b"")?;
    let mut open = Connection::new(&wires, 0, 40_001, family.remote(0, 80));
    open.open()?;
    let mut closing = Connection::new(&wires, 0, 40_002, family.remote(0, 80));
    closing.open()?;
    closing.out(FinAck, b"")?;
    thread::sleep(just_over(1));
    opening.back(SynAck, b"")?;
    closing.back(Ack, b"late")?;
    open.check_ended()?;

    let short = ["--tcp-opening-timeout", "1", "--tcp-closing-timeout", "1"];
    let (_world, wires) = family.wired(1, &short)?;
    let mut opening = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    opening.out(Syn, b"")?;
    let mut open = Connection::new(&wires, 0, 40_001, family.remote(0, 80));
    open.open()?;
    let mut closing = Connection::new(&wires, 0, 40_002, family.remote(0, 80));
    closing.open()?;
    closing.out(FinAck, b"")?;
    thread::sleep(just_over(1));
    open.back(Ack, b"still there")?;
    opening.check_ended()?;
    closing.check_ended()
}
both_families!(req_5a_the_timeouts_are_configurable);

/// REQ-6: no ALG, for FTP neither.
fn req_6_payloads_are_left_alone(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    for (port, server_port) in (40_000..).zip([21, 554, 1720, 1723, 5060, 6667]) {
        let mut connection = Connection::new(&wires, 0, port, family.remote(0, server_port));
        connection.open()?;
        connection.out(Ack, b"PORT 10,0,0,77,156,64\r\n")?;
        connection.back(Ack, b"227 Entering Passive Mode (203,0,113,77,4,1)\r\n")?;
        connection.out(Ack, b"EPRT |1|10.0.0.77|40000|\r\n")?;
        connection.back(Ack, b"200 198.51.100.2\r\n")?;
    }
    Ok(())
}
both_families!(req_6_payloads_are_left_alone);

/// REQ-7: no "Port overloading" for TCP.
fn req_7_ports_are_not_overloaded(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(3, &[])?;
    let mut connections: Vec<_> = (0..3)
        .map(|guest| Connection::new(&wires, guest, 40_000, family.remote(0, 80)))
        .collect();
    let mut seen = Vec::new();
    for connection in &mut connections {
        connection.open()?;
        seen.push(connection.outside()?);
    }
    ensure!(
        seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2],
        "{seen:?}"
    );
    connections.iter_mut().try_for_each(Connection::talk)
}
both_families!(req_7_ports_are_not_overloaded);

/// REQ-8: hairpinning for TCP, with the external source address and port.
fn req_8_hairpins_come_from_the_external_endpoint(family: Family) -> Result<()> {
    for inside in [Inside::Veth, Inside::Bridge, Inside::Tap(Tap::default())] {
        let builder = family.topology().inside(inside).guests(2);
        let world = World::start(builder, &["--filtering", "endpoint-independent"])?;
        let outer = TcpReflector::start(&world.topology.world, family.server(0, 7))?;
        // The second guest's mapping, which its server then has.
        let guest = &world.guest(1).namespace;
        let local = world.guest_endpoint(1, 40_000);
        let mapping = TcpSession::open(guest, Some(local), outer.address())?;
        let target = mapping.seen();
        let server = TcpReflector::start(guest, local)?;
        for number in 0..2 {
            let guest = &world.guest(number).namespace;
            let mut session = TcpSession::open(guest, None, target)
                .with_context(|| format!("{inside:?}, guest {number}"))?;
            ensure!(
                session.seen().ip() == family.outside_address(),
                "from {}",
                session.seen()
            );
            session.exchange(&traffic::pattern(300_000))?;
        }
        drop((mapping, server));
    }
    Ok(())
}
both_families!(req_8_hairpins_come_from_the_external_endpoint);

/// REQ-9: ICMP destination unreachable is translated, and what it quotes.
fn req_9_destination_unreachable_is_translated(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    connection.open()?;
    let ours = connection.outward(Ack, b"request");
    let arrived = wires.out(0, &ours)?;
    let about = segment(
        (arrived.source(), arrived.destination()),
        Ack,
        connection.next,
        b"request",
    );
    let theirs = connection.inward(Ack, b"response")?;
    wires.back(&theirs, 0)?;
    let header = family.header_length();
    for kind in family.unreachables() {
        // As much of it as routers quote: 8 bytes, the header, and all.
        for length in [header + 8, header + 20, header + 27] {
            let router = family.remote(1, 0).ip();
            let about = &about.clone().ttl(62).build()[..length];
            let error = packet::icmp_error(router, family.outside_address(), kind, [0; 4], about);
            let arrived = wires.back(&error, 0)?;
            let quoted = arrived.quoted()?;
            let original = ours.clone().ttl(62).build();
            ensure!(
                arrived.icmp_kind() == Some(kind)
                    && arrived.source_address() == router
                    && [&quoted.header[..], &quoted.transport].concat() == original[..length],
                "{arrived:02x?}\nof {:02x?}",
                &original[..length]
            );
        }
        // And outwards.
        let inside = connection.inside;
        let about = segment(
            (connection.remote, inside),
            Ack,
            [connection.next[1], connection.next[0]],
            b"response",
        );
        let about = about.build();
        let error = packet::icmp_error(inside.ip(), connection.remote.ip(), kind, [0; 4], &about);
        let arrived = wires.out(0, &error)?;
        let quoted = arrived.quoted()?;
        ensure!(
            arrived.source_address() == family.outside_address()
                && [&quoted.header[..], &quoted.transport].concat() == theirs.build(),
            "{arrived:02x?}"
        );
    }
    Ok(())
}
both_families!(req_9_destination_unreachable_is_translated);

/// REQ-10: no ICMP message ends a mapping or a connection.
fn req_10_icmp_does_not_end_a_connection(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, family.remote(0, 80));
    connection.open()?;
    for kind in family.errors() {
        let about = packet::tcp(connection.outside()?, connection.remote).build();
        let router = family.remote(1, 0).ip();
        wires.world.send(&packet::icmp_error(
            router,
            family.outside_address(),
            kind,
            [0; 4],
            &about,
        ))?;
        let about = packet::tcp(connection.remote, connection.inside).build();
        wires.guests[0].send(&packet::icmp_error(
            connection.inside.ip(),
            connection.remote.ip(),
            kind,
            [0; 4],
            &about,
        ))?;
        wires.arrivals()?;
        connection.back(Ack, b"still there")?;
        connection.talk()?;
    }
    Ok(())
}
both_families!(req_10_icmp_does_not_end_a_connection);
