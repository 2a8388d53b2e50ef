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
    topology::{Inside, Tap, Topology},
    traffic::{self, TcpReflector, TcpSession},
};
use tapnat_tests::{
    connection::{
        Connection, Flags,
        Flags::{Ack, FinAck, Rst, Syn, SynAck},
        OURS, THEIRS, same_segment, segment,
    },
    wires::{Wires, remote, wired},
    world::{OUTSIDE, World, just_over, outside, server},
};

/// REQ-1: endpoint-independent mapping for TCP.
#[test]
fn req_1_mapping_is_endpoint_independent() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    let remotes = [remote(0, 80), remote(0, 81), remote(1, 80), remote(1, 81)];
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

/// REQ-2: all valid sequences of TCP packets: the three-way handshake, with
/// every packet sent twice, and a close from either side, or from both at once.
#[test]
fn req_2_three_way_handshakes_and_all_closes() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let mut ports = 40_000..;
    let mut opened = || -> Result<Connection> {
        let port = ports.next().context("no port")?;
        let mut connection = Connection::new(&wires, 0, port, remote(0, 80));
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

/// REQ-2a: simultaneous open.
#[test]
fn req_2a_simultaneous_opens() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    for port in 40_000..40_003 {
        let mut connection = Connection::new(&wires, 0, port, remote(0, 80));
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

/// REQ-2 for connections initiated externally, where the filter permits.
#[test]
fn req_2_connections_from_outside() -> Result<()> {
    let (_world, wires) = wired(1, &["--filtering", "endpoint-independent"])?;
    let mut first = Connection::new(&wires, 0, 40_000, remote(0, 80));
    first.open()?;
    let mut connection = Connection::new(&wires, 0, 40_000, remote(1, 1234));
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

/// REQ-2 with real stacks, many at once, that open, talk, half close and close.
#[test]
fn req_2_real_connections() -> Result<()> {
    let world = World::start(Topology::builder(), &[])?;
    let tcp = TcpReflector::start(&world.topology.world, server(0, 7))?;
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

/// A connection that began before the NAT did goes on (`docs`: traps).
#[test]
fn req_2_connections_that_are_older_than_the_nat() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, remote(0, 80));
    connection.talk()?;
    ensure!(connection.outside()? == outside(40_000), "another port");
    connection.back(FinAck, b"")?;
    connection.out(FinAck, b"")?;
    wires.nothing_arrives()
}

/// REQ-2: a SYN opens a closed connection's endpoints anew (RFC 1122, section
/// 4.2.2.13), with the long timeout.
#[test]
fn req_2_a_closed_connection_can_be_opened_again() -> Result<()> {
    let timeouts = ["--tcp-opening-timeout", "1", "--tcp-closing-timeout", "1"];
    let (_world, wires) = wired(1, &timeouts)?;
    let ends: [&[(bool, Flags)]; 3] = [
        &[(true, FinAck), (false, FinAck), (true, Ack)],
        &[(true, Rst)],
        &[(false, Rst)],
    ];
    let mut connections = Vec::new();
    for (port, end) in (40_000..).zip(ends) {
        let mut connection = Connection::new(&wires, 0, port, remote(0, 80));
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

/// Whether a SYN from this remote is let in to the mapping of a connection.
fn is_let_in(wires: &Wires, from: SocketAddr, mapping: SocketAddr) -> Result<bool> {
    let syn = packet::tcp(from, mapping).with_tcp(|header| header.syn = true);
    wires.world.send(&syn)?;
    let arrivals = wires.arrivals()?;
    ensure!(arrivals.world.is_empty(), "{from} got an answer");
    Ok(!arrivals.guests[0].is_empty())
}

/// REQ-3: address-dependent filtering for TCP by default.
#[test]
fn req_3_filtering_is_address_dependent_by_default() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, remote(0, 80));
    connection.open()?;
    let seen = connection.outside()?;
    ensure!(is_let_in(&wires, remote(0, 81), seen)?, "another port");
    ensure!(!is_let_in(&wires, remote(1, 80), seen)?, "another address");
    connection.talk()
}

/// REQ-3a: the administrator chooses the filtering. REQ-3b: for TCP and UDP
/// each.
#[test]
fn req_3a_filtering_is_configurable() -> Result<()> {
    for (mode, lets_in) in [
        ("tcp=endpoint-independent", [true, true]),
        ("tcp=address-and-port-dependent", [false, false]),
        (
            "tcp=address-dependent,udp=endpoint-independent",
            [true, false],
        ),
    ] {
        let (_world, wires) = wired(1, &["--filtering", mode])?;
        let mut connection = Connection::new(&wires, 0, 40_000, remote(0, 80));
        connection.open()?;
        let seen = connection.outside()?;
        for (from, lets_in) in [remote(0, 81), remote(1, 80)].into_iter().zip(lets_in) {
            ensure!(
                is_let_in(&wires, from, seen)? == lets_in,
                "{mode}, from {from}: not {lets_in}"
            );
        }
    }
    Ok(())
}

/// REQ-4: an unsolicited inbound SYN is not answered for six seconds; an
/// outbound SYN in that time makes it a simultaneous open.
#[test]
fn req_4_an_unsolicited_syn_is_not_answered_at_once() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    // To a mapping that does not let it in, and to a port without one.
    let mapped = Connection::new(&wires, 0, 40_000, remote(0, 80));
    let mut mapped = Connection { ..mapped };
    mapped.open()?;
    for port in [40_000, 40_001] {
        let mut connection = Connection::new(&wires, 0, port, remote(1, 80));
        connection.outside = Some(outside(port));
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

/// REQ-4: otherwise it is answered with ICMP port unreachable, about the SYN
/// as it was sent, unless the operator does not want that.
#[test]
fn req_4_an_unsolicited_syn_is_answered_after_six_seconds() -> Result<()> {
    let syn = packet::tcp(remote(1, 80), outside(40_000)).with_tcp(|header| header.syn = true);
    let (_silent, silent) = wired(1, &["--no-unsolicited-answer"])?;
    silent.world.send(&syn)?;
    let (_world, wires) = wired(1, &[])?;
    let mut mapped = Connection::new(&wires, 0, 40_000, remote(0, 80));
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
    let icmp = answer.icmpv4().context("no ICMP")?.to_bytes();
    let quoted = answer.quoted()?;
    ensure!(
        icmp[..2] == [3, 3]
            && answer.source_address() == OUTSIDE
            && answer.destination_address() == remote(1, 80).ip()
            && (quoted.source, quoted.destination) == (remote(1, 80), outside(40_000)),
        "{answer:?}"
    );
    thread::sleep(just_over(1));
    silent.nothing_arrives()?;
    mapped.talk()
}

/// REQ-5: the established connection idle-timeout is not under 2 hours 4
/// minutes, the transitory one not under 4 minutes.
#[test]
fn req_5_the_default_timeouts_are_long_enough() -> Result<()> {
    let (world, _wires) = wired(1, &[])?;
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

/// REQ-5a: the timeouts are configurable, each for its states.
#[test]
fn req_5a_the_timeouts_are_configurable() -> Result<()> {
    let (_world, wires) = wired(1, &["--tcp-established-timeout", "1"])?;
    let mut opening = Connection::new(&wires, 0, 40_000, remote(0, 80));
    opening.out(Syn, b"")?;
    let mut open = Connection::new(&wires, 0, 40_001, remote(0, 80));
    open.open()?;
    let mut closing = Connection::new(&wires, 0, 40_002, remote(0, 80));
    closing.open()?;
    closing.out(FinAck, b"")?;
    thread::sleep(just_over(1));
    opening.back(SynAck, b"")?;
    closing.back(Ack, b"late")?;
    open.check_ended()?;

    let short = ["--tcp-opening-timeout", "1", "--tcp-closing-timeout", "1"];
    let (_world, wires) = wired(1, &short)?;
    let mut opening = Connection::new(&wires, 0, 40_000, remote(0, 80));
    opening.out(Syn, b"")?;
    let mut open = Connection::new(&wires, 0, 40_001, remote(0, 80));
    open.open()?;
    let mut closing = Connection::new(&wires, 0, 40_002, remote(0, 80));
    closing.open()?;
    closing.out(FinAck, b"")?;
    thread::sleep(just_over(1));
    open.back(Ack, b"still there")?;
    opening.check_ended()?;
    closing.check_ended()
}

/// REQ-6: no ALG, for FTP neither.
#[test]
fn req_6_payloads_are_left_alone() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    for (port, server_port) in (40_000..).zip([21, 554, 1720, 1723, 5060, 6667]) {
        let mut connection = Connection::new(&wires, 0, port, remote(0, server_port));
        connection.open()?;
        connection.out(Ack, b"PORT 10,0,0,77,156,64\r\n")?;
        connection.back(Ack, b"227 Entering Passive Mode (203,0,113,77,4,1)\r\n")?;
        connection.out(Ack, b"EPRT |1|10.0.0.77|40000|\r\n")?;
        connection.back(Ack, b"200 198.51.100.2\r\n")?;
    }
    Ok(())
}

/// REQ-7: no "Port overloading" for TCP.
#[test]
fn req_7_ports_are_not_overloaded() -> Result<()> {
    let (_world, wires) = wired(3, &[])?;
    let mut connections: Vec<_> = (0..3)
        .map(|guest| Connection::new(&wires, guest, 40_000, remote(0, 80)))
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

/// REQ-8: hairpinning for TCP, with the external source address and port.
#[test]
fn req_8_hairpins_come_from_the_external_endpoint() -> Result<()> {
    for inside in [Inside::Veth, Inside::Bridge, Inside::Tap(Tap::default())] {
        let builder = Topology::builder().inside(inside).guests(2);
        let world = World::start(builder, &["--filtering", "endpoint-independent"])?;
        let outer = TcpReflector::start(&world.topology.world, server(0, 7))?;
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
            ensure!(session.seen().ip() == OUTSIDE, "from {}", session.seen());
            session.exchange(&traffic::pattern(300_000))?;
        }
        drop((mapping, server));
    }
    Ok(())
}

/// REQ-9: ICMP destination unreachable is translated, and what it quotes.
#[test]
fn req_9_destination_unreachable_is_translated() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, remote(0, 80));
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
    for code in 0..16 {
        // As much of it as routers quote: 8 bytes, the header, and all.
        for length in [28, 40, 47] {
            let router = remote(1, 0).ip();
            let about = &about.clone().ttl(62).build()[..length];
            let error = packet::unreachable(router, OUTSIDE, code, about);
            let arrived = wires.back(&error, 0)?;
            let quoted = arrived.quoted()?;
            let original = ours.clone().ttl(62).build();
            let icmp = arrived.icmpv4().context("no ICMP")?.to_bytes();
            ensure!(
                icmp[..2] == [3, code]
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
        let error = packet::unreachable(inside.ip(), connection.remote.ip(), code, &about.build());
        let arrived = wires.out(0, &error)?;
        let quoted = arrived.quoted()?;
        ensure!(
            arrived.source_address() == OUTSIDE
                && [&quoted.header[..], &quoted.transport].concat() == theirs.build(),
            "{arrived:02x?}"
        );
    }
    Ok(())
}

/// REQ-10: no ICMP message ends a mapping or a connection.
#[test]
fn req_10_icmp_does_not_end_a_connection() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let mut connection = Connection::new(&wires, 0, 40_000, remote(0, 80));
    connection.open()?;
    let kinds = (0..16)
        .map(|code| (3, code))
        .chain([(4, 0), (5, 1), (11, 0), (11, 1), (12, 0)]);
    for kind in kinds {
        let about = packet::tcp(connection.outside()?, connection.remote).build();
        let router = remote(1, 0).ip();
        wires
            .world
            .send(&packet::icmp_error(router, OUTSIDE, kind, [0; 4], &about))?;
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
