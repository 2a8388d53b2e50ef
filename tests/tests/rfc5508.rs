//! RFC 5508, NAT Behavioral Requirements for ICMP: a test for each requirement,
//! by what arrives.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tapnat_testbed::{
    packet::{self, Builder},
    topology::UPLINK,
    traffic,
};
use tapnat_tests::{
    both_families,
    family::{Family, IcmpKind, V4, V6},
    wires::{Wires, wired},
    world::just_over,
};

/// Sends an echo request as a guest and returns the identifier that it arrives
/// with in the world.
fn map_echo(wires: &Wires, guest: usize, identifier: u16, remote: IpAddr) -> Result<u16> {
    let source = wires.inside(guest, 0).ip();
    let request = packet::echo_request(source, remote, identifier, 9).payload(b"echo");
    let arrived = wires.out(guest, &request)?;
    ensure!(
        arrived.source_address() == wires.family.outside_address()
            && arrived.destination_address() == remote
            && arrived.payload == b"echo",
        "{arrived:?}"
    );
    Ok(arrived.source().port())
}

/// Sends the reply as the world and checks that the guest gets it.
fn answer_echo(
    wires: &Wires,
    remote: IpAddr,
    translated: u16,
    guest: usize,
    identifier: u16,
) -> Result<()> {
    let reply =
        packet::echo_reply(remote, wires.family.outside_address(), translated, 9).payload(b"reply");
    let arrived = wires.back(&reply, guest)?;
    let inside = wires.inside(guest, identifier);
    ensure!(
        arrived.source_address() == remote
            && arrived.destination() == inside
            && arrived.payload == b"reply",
        "{arrived:?}"
    );
    Ok(())
}

/// An error of a router in the world.
fn error_to(to: IpAddr, kind: IcmpKind, about: &[u8]) -> Builder {
    packet::icmp_error(Family::of(to).router(), to, kind, [0; 4], about)
}

/// A session whose packets are quoted in errors.
#[derive(Clone, Copy, Debug)]
enum Session {
    Udp,
    Tcp,
    Echo,
}

const SESSIONS: [Session; 3] = [Session::Udp, Session::Tcp, Session::Echo];

impl Session {
    /// Its packet outwards.
    fn out(self, source: SocketAddr, remote: SocketAddr) -> Builder {
        let packet = match self {
            Self::Udp => packet::udp(source, remote),
            Self::Tcp => packet::tcp(source, remote).with_tcp(|header| header.syn = true),
            Self::Echo => packet::echo_request(source.ip(), remote.ip(), source.port(), 1),
        };
        packet.payload(&traffic::pattern(200))
    }

    /// Its packet inwards.
    fn back(self, remote: SocketAddr, destination: SocketAddr) -> Builder {
        let packet = match self {
            Self::Udp => packet::udp(remote, destination),
            Self::Tcp => packet::tcp(remote, destination).with_tcp(|header| {
                header.syn = true;
                header.ack = true;
            }),
            Self::Echo => packet::echo_reply(remote.ip(), destination.ip(), destination.port(), 1),
        };
        packet.payload(&traffic::pattern(200))
    }

    /// Opens it for a guest that does not get its own port, and returns its
    /// inside, outside and remote endpoints.
    fn open(self, wires: &Wires) -> Result<[SocketAddr; 3]> {
        let remote = wires.family.remote(0, 53);
        // The first guest has the port.
        wires.out(0, &self.out(wires.inside(0, 40_000), remote))?;
        let inside = wires.inside(1, 40_000);
        let outside = wires.out(1, &self.out(inside, remote))?.source();
        ensure!(outside.port() != inside.port(), "{outside} was free");
        wires.back(&self.back(remote, outside), 1)?;
        Ok([inside, outside, remote])
    }
}

/// REQ-1: queries from private hosts, and their responses, pass.
fn req_1_queries_and_their_responses_pass(family: Family) -> Result<()> {
    let (world, wires) = family.wired(1, &[])?;
    for identifier in [0, 1, 1023, 1024, 40_000, 65_535] {
        let target = family.remote(0, 0).ip();
        let translated = map_echo(&wires, 0, identifier, target)?;
        answer_echo(&wires, target, translated, 0, identifier)?;
    }
    wires.nothing_arrives()?;
    drop(wires);
    let ping = traffic::ping(&world.guest(0).namespace, family.server(1, 0).ip(), 3, &[])?;
    ensure!(ping.received == 3, "{}", ping.output);
    Ok(())
}
both_families!(req_1_queries_and_their_responses_pass);

/// REQ-1 and REQ-10b: timestamp, and its reply.
#[test]
fn req_1_timestamps_pass() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let (inside, target) = (wires.inside(0, 0).ip(), V4.remote(0, 0).ip());
    let timestamp = |source, destination, kind, identifier: u16| {
        let [high, low] = identifier.to_be_bytes();
        packet::icmp_error(source, destination, (kind, 0), [high, low, 0, 1], &[5; 12])
    };
    wires.guests[0].send(&timestamp(inside, target, 13, 77))?;
    let arrived = wires.world.receive_captured()?;
    let translated = u16::from_be_bytes([arrived.ip()[24], arrived.ip()[25]]);
    arrived.check(&timestamp(V4.outside_address(), target, 13, translated).ttl(63))?;
    wires
        .world
        .send(&timestamp(target, V4.outside_address(), 14, translated))?;
    wires.guests[0].receive_this(&timestamp(target, inside, 14, 77).ttl(63))?;
    wires.nothing_arrives()
}

/// REQ-1a: the mapping of identifiers is external host independent.
fn req_1a_identifiers_do_not_depend_on_the_remote(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(3, &[])?;
    let mut seen = Vec::new();
    for guest in 0..3 {
        let first = map_echo(&wires, guest, 77, family.remote(0, 0).ip())?;
        let other = map_echo(&wires, guest, 77, family.remote(1, 0).ip())?;
        ensure!(first == other, "{first} and {other}");
        ensure!(!seen.contains(&first), "{first} belongs to two guests");
        seen.push(first);
    }
    for (guest, translated) in seen.into_iter().enumerate() {
        for number in 0..2 {
            answer_echo(&wires, family.remote(number, 0).ip(), translated, guest, 77)?;
        }
    }
    wires.nothing_arrives()
}
both_families!(req_1a_identifiers_do_not_depend_on_the_remote);

/// REQ-2: the query timer is not under 60 seconds.
fn req_2_the_default_timer_is_long_enough(family: Family) -> Result<()> {
    let (world, _wires) = family.wired(1, &[])?;
    let status = world.instance.ask_json("status")?;
    let timeout = status["timeouts"]["icmp"].as_f64();
    ensure!(timeout.is_some_and(|seconds| seconds >= 60.0), "{status}");
    Ok(())
}
both_families!(req_2_the_default_timer_is_long_enough);

/// REQ-2a: it is configurable; then the session ends.
fn req_2a_the_timer_is_configurable(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--icmp-timeout", "1"])?;
    let target = family.remote(0, 0).ip();
    let translated = map_echo(&wires, 0, 77, target)?;
    answer_echo(&wires, target, translated, 0, 77)?;
    thread::sleep(just_over(1));
    wires.world.send(&packet::echo_reply(
        target,
        family.outside_address(),
        translated,
        9,
    ))?;
    wires.nothing_arrives()
}
both_families!(req_2a_the_timer_is_configurable);

/// REQ-3: an error with a wrong ICMP checksum is dropped. REQ-3a: so is one
/// whose quoted packet has a wrong IP checksum, which IPv6 has not.
fn req_3_errors_with_bad_checksums_are_dropped(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let bad = |error: Builder, about: &Builder| {
            let quoting = |about: Builder| error.clone().payload(&about.build());
            let mut bad = vec![quoting(about.clone()).bad_transport_checksum()];
            if family == V4 {
                bad.push(quoting(about.clone().bad_ip_checksum()));
            }
            bad
        };
        let error = packet::unreachable(family.router(), family.outside_address(), 3, &[]);
        for error in bad(error, &session.out(outside, remote)) {
            wires.world.send(&error)?;
            wires
                .nothing_arrives()
                .with_context(|| format!("{session:?}"))?;
        }
        let error = packet::unreachable(inside.ip(), remote.ip(), 3, &[]);
        for error in bad(error, &session.back(remote, inside)) {
            wires.guests[1].send(&error)?;
            wires
                .nothing_arrives()
                .with_context(|| format!("{session:?}"))?;
        }
    }
    Ok(())
}
both_families!(req_3_errors_with_bad_checksums_are_dropped);

/// REQ-3b: IP options of the quoted packet are traversed.
#[test]
fn req_3b_options_of_the_quoted_packet_are_traversed() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        for length in [4, 20, 40] {
            let with = |packet: Builder| packet.options(&vec![1; length]).build();
            let about = with(session.out(outside, remote));
            let error = packet::unreachable(V4.router(), V4.outside_address(), 1, &about);
            // The error itself may have some, too.
            wires.world.send(&error.options(&[1; 8]))?;
            let about = with(session.out(inside, remote));
            let expected = packet::unreachable(V4.router(), inside.ip(), 1, &about);
            let expected = expected.options(&[1; 8]).ttl(63);
            wires.guests[1].receive_this(&expected)?;
        }
    }
    Ok(())
}

/// REQ-3c: the transport checksum of the quoted packet is not validated.
fn req_3c_the_quoted_transport_checksum_is_not_validated(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let about = session
            .out(outside, remote)
            .bad_transport_checksum()
            .build();
        wires.world.send(&packet::unreachable(
            family.router(),
            family.outside_address(),
            1,
            &about,
        ))?;
        let arrived = wires.guests[1].receive()?;
        let quoted = arrived.quoted()?;
        ensure!(quoted.source == inside, "{session:?}: {arrived:?}");
    }
    if family == V6 {
        return Ok(());
    }
    // A UDP datagram without one is quoted without one.
    let [inside, outside, remote] = Session::Udp.open(&wires)?;
    let about = |source| Session::Udp.out(source, remote).without_udp_checksum();
    let error = packet::unreachable(
        family.router(),
        family.outside_address(),
        1,
        &about(outside).build(),
    );
    wires.world.send(&error)?;
    let expected = packet::unreachable(family.router(), inside.ip(), 1, &about(inside).build());
    wires.guests[1].receive_this(&expected.ttl(63))
}
both_families!(req_3c_the_quoted_transport_checksum_is_not_validated);

/// REQ-3d: extensions behind the quoted packet (RFC 4884) are no part of it.
fn req_3d_extensions_are_no_part_of_the_quoted_packet(family: Family) -> Result<()> {
    // An MPLS label stack (RFC 4950) with the checksum of its structure.
    const EXTENSION: [u8; 12] = [0x20, 0, 0x9b, 0x6e, 0, 8, 1, 1, 0x44, 0x91, 0x01, 0x01];
    let (_world, wires) = family.wired(2, &[])?;
    // Their number in words of four bytes, and in IPv6 of eight.
    let rest = match family {
        V4 => [0, 32, 0, 0],
        V6 => [16, 0, 0, 0],
    };
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        for quoted in [family.header_length() + 28, 100, 128] {
            // Padded with zeros to 128 bytes.
            let extended = |packet: Builder| {
                let mut about = packet.build()[..quoted].to_vec();
                about.resize(128, 0);
                about.extend(EXTENSION);
                about
            };
            let make = |to: IpAddr, about: &[u8]| {
                packet::icmp_error(family.router(), to, family.time_exceeded(), rest, about)
            };
            let about = extended(session.out(outside, remote));
            wires.world.send(&make(family.outside_address(), &about))?;
            let about = extended(session.out(inside, remote));
            let expected = make(inside.ip(), &about).ttl(63);
            wires.guests[1]
                .receive_this(&expected)
                .with_context(|| format!("{session:?}, {quoted} bytes"))?;
        }
    }
    Ok(())
}
both_families!(req_3d_extensions_are_no_part_of_the_quoted_packet);

/// REQ-4: an error from outside goes to the mapping's owner: (a) the quoted
/// packet as it was sent, (b) type and code unchanged, (c) the destination that
/// of the quoted packet's sender.
fn req_4_errors_from_outside_are_translated(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    let header = family.header_length();
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        for kind in family.errors() {
            let whole = session.out(inside, remote).build().len();
            // RFC 792's 8 bytes, odd lengths, and all (RFC 1812).
            let lengths = [8, 9, 16, 19, 20, 21].map(|length| header + length);
            for length in lengths.into_iter().chain([whole]) {
                let about = |source| session.out(source, remote).ttl(60).build()[..length].to_vec();
                let rest = [0, 0, 5, 100];
                let error = packet::icmp_error(
                    family.router(),
                    family.outside_address(),
                    kind,
                    rest,
                    &about(outside),
                );
                wires.world.send(&error)?;
                let expected =
                    packet::icmp_error(family.router(), inside.ip(), kind, rest, &about(inside));
                wires.guests[1]
                    .receive_this(&expected.ttl(63))
                    .with_context(|| format!("{session:?} {kind:?}, {length} bytes"))?;
            }
        }
    }
    wires.nothing_arrives()
}
both_families!(req_4_errors_from_outside_are_translated);

/// REQ-4: without a mapping it is dropped, or the host's.
fn req_4_errors_without_a_mapping_reach_no_guest(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    Session::Udp.open(&wires)?;
    for session in SESSIONS {
        let strangers = [
            (family.outside(50_000), family.remote(0, 53)),
            (family.outside(40_000), family.remote(1, 53)),
            (
                SocketAddr::new(family.uplink_host(9), 40_000),
                family.remote(0, 53),
            ),
        ];
        for (source, remote) in strangers {
            let about = session.out(source, remote).build();
            // Too little of it tells nothing.
            let header = family.header_length();
            for length in [0, 8, header, header + 7, about.len()] {
                let about = &about[..length];
                let error = error_to(family.outside_address(), family.port_unreachable(), about);
                wires.world.send(&error)?;
            }
        }
        let arrivals = wires.arrivals()?;
        ensure!(
            arrivals.guests.iter().all(Vec::is_empty),
            "{session:?}: {:?}",
            arrivals.guests
        );
    }
    Ok(())
}
both_families!(req_4_errors_without_a_mapping_reach_no_guest);

/// REQ-5: an error from inside is translated likewise, (c) with the public
/// address as its source, whoever inside sent it.
fn req_5_errors_from_inside_are_translated(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let behind = family.inside_host(1, 88);
        let header = family.header_length();
        for (from, kind) in [
            (inside.ip(), family.port_unreachable()),
            (behind, family.time_exceeded()),
            (behind, family.prohibited()),
        ] {
            let whole = session.back(remote, inside).build().len();
            for length in [header + 8, header + 20, whole] {
                let about = |to| session.back(remote, to).ttl(60).build()[..length].to_vec();
                let error = packet::icmp_error(from, remote.ip(), kind, [0; 4], &about(inside));
                wires.guests[1].send(&error)?;
                let expected = packet::icmp_error(
                    family.outside_address(),
                    remote.ip(),
                    kind,
                    [0; 4],
                    &about(outside),
                );
                wires
                    .world
                    .receive_this(&expected.ttl(63))
                    .with_context(|| format!("{session:?} {kind:?}, {length} bytes"))?;
            }
        }
    }
    wires.nothing_arrives()
}
both_families!(req_5_errors_from_inside_are_translated);

/// REQ-5: without a mapping it is dropped.
fn req_5_errors_without_a_mapping_do_not_get_out(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    for session in SESSIONS {
        let [inside, _, remote] = session.open(&wires)?;
        let other = SocketAddr::new(inside.ip(), 50_000);
        let strangers = [
            session.back(remote, other),
            session.back(family.remote(1, 53), inside),
            // Another guest's session.
            session.back(remote, wires.inside(0, 40_000)),
        ];
        for about in strangers {
            let error = packet::unreachable(inside.ip(), remote.ip(), 3, &about.build());
            wires.guests[1].send(&error)?;
            wires
                .nothing_arrives()
                .with_context(|| format!("{session:?}"))?;
        }
    }
    Ok(())
}
both_families!(req_5_errors_without_a_mapping_do_not_get_out);

/// REQ-6: an error neither refreshes a session nor deletes it.
fn req_6_errors_do_not_refresh_sessions(family: Family) -> Result<()> {
    let timeouts = [
        "--icmp-timeout",
        "1",
        "--udp-timeout",
        "1",
        "--tcp-opening-timeout",
        "1",
    ];
    let (_world, wires) = family.wired(2, &timeouts)?;
    let sessions = SESSIONS
        .map(|session| session.open(&wires).map(|ends| (session, ends)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(300));
        for (session, [inside, outside, remote]) in &sessions {
            let about = session.out(*outside, *remote).build();
            wires.world.send(&packet::unreachable(
                family.router(),
                family.outside_address(),
                1,
                &about,
            ))?;
            let about = session.back(*remote, *inside).build();
            wires.guests[1].send(&packet::unreachable(inside.ip(), remote.ip(), 3, &about))?;
        }
    }
    wires.arrivals()?;
    for (session, [_, outside, remote]) in &sessions {
        wires.world.send(&session.back(*remote, *outside))?;
        let arrivals = wires.arrivals()?;
        ensure!(arrivals.guests[1].is_empty(), "{session:?} is still there");
    }
    Ok(())
}
both_families!(req_6_errors_do_not_refresh_sessions);

/// REQ-6 and RFC 4787 REQ-12: sessions outlive the errors about them.
fn req_6_errors_do_not_delete_sessions(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let out = session.out(outside, remote).build();
        let back = session.back(remote, inside).build();
        for kind in family.unreachables() {
            wires.back(&error_to(family.outside_address(), kind, &out), 1)?;
            let error = packet::icmp_error(inside.ip(), remote.ip(), kind, [0; 4], &back);
            wires.out(1, &error)?;
            wires.back(&session.back(remote, outside), 1)?;
            let again = wires.out(1, &session.out(inside, remote))?.source();
            ensure!(again == outside, "{session:?}: {outside}, then {again}");
        }
    }
    Ok(())
}
both_families!(req_6_errors_do_not_delete_sessions);

/// REQ-7: hairpinned errors: about a guest's packet to another guest over its
/// outside endpoint. REQ-7a: the destination is that of the quoted packet's
/// sender.
fn req_7_hairpinned_errors_are_translated(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--filtering", "endpoint-independent"])?;
    // Neither guest has its own port outside.
    for (guest, port) in [(1, 40_000), (0, 50_000)] {
        wires.map_udp(guest, port, family.remote(0, 53))?;
    }
    let one = (
        wires.inside(0, 40_000),
        wires.map_udp(0, 40_000, family.remote(0, 53))?,
    );
    let other = (
        wires.inside(1, 50_000),
        wires.map_udp(1, 50_000, family.remote(0, 53))?,
    );
    for ((sender, seen), (receiver, target), guests) in [(one, other, [0, 1]), (other, one, [1, 0])]
    {
        let sent = packet::udp(sender, target).payload(b"hairpin");
        wires.guests[guests[0]].send(&sent)?;
        let arrived = wires.guests[guests[1]].receive()?;
        ensure!(
            (arrived.source(), arrived.destination()) == (seen, receiver),
            "{arrived:?}"
        );
        let about = packet::udp(seen, receiver).payload(b"hairpin").ttl(63);
        let error = packet::unreachable(receiver.ip(), seen.ip(), 3, &about.build());
        wires.guests[guests[1]].send(&error)?;
        let about = packet::udp(sender, target).payload(b"hairpin").ttl(63);
        let expected =
            packet::unreachable(family.outside_address(), sender.ip(), 3, &about.build()).ttl(63);
        wires.guests[guests[0]].receive_this(&expected)?;
    }
    wires.nothing_arrives()
}
both_families!(req_7_hairpinned_errors_are_translated);

/// REQ-7 as RFC 7857 section 12 has it: hairpinned queries reach the guest whose
/// outside address it is, and those to a shared one the host, as from outside.
fn req_7_hairpinned_queries_are_answered(family: Family) -> Result<()> {
    let own = family.uplink_host(7);
    let (world, wires) = family.wired(2, &[])?;
    let [asker, guest] = [0, 1].map(|number| wires.inside(number, 0).ip());
    let host = &world.topology.host;
    host.ip(&format!("address add {own} dev {UPLINK}"))?;
    let add = ["add", &own.to_string(), &guest.to_string()];
    world.instance.ask("static", &add)?;
    wires.guests[0].send(&packet::echo_request(asker, own, 77, 1).payload(b"guest?"))?;
    let arrived = wires.guests[1].receive()?;
    ensure!(
        arrived.source_address() == family.outside_address()
            && arrived.destination_address() == guest
            && arrived.payload == b"guest?",
        "{arrived:?}"
    );
    let identifier = arrived.source().port();
    wires.guests[1].send(
        &packet::echo_reply(guest, family.outside_address(), identifier, 1).payload(b"guest!"),
    )?;
    let arrived = wires.guests[0].receive()?;
    ensure!(
        arrived.source_address() == own
            && arrived.destination() == wires.inside(0, 77)
            && arrived.payload == b"guest!",
        "{arrived:?}"
    );
    wires.guests[0]
        .send(&packet::echo_request(asker, family.outside_address(), 78, 1).payload(b"host?"))?;
    let arrived = wires.guests[0].receive()?;
    ensure!(
        arrived.source_address() == family.outside_address()
            && arrived.destination() == wires.inside(0, 78)
            && arrived.payload == b"host?",
        "{arrived:?}"
    );
    wires.nothing_arrives()
}
both_families!(req_7_hairpinned_queries_are_answered);

/// Checks that a packet of a guest is refused as prohibited, with ICMP about it,
/// and goes nowhere.
fn check_refused(wires: &Wires, guest: usize, packet: &Builder) -> Result<()> {
    wires.guests[guest].send(packet)?;
    let answer = wires.guests[guest].receive_captured()?;
    let parsed = answer.parse()?;
    ensure!(
        parsed.icmp_kind() == Some(wires.family.prohibited()) && parsed.icmp_rest() == Some([0; 4]),
        "{parsed:?}"
    );
    let about = packet.build();
    ensure!(
        parsed.payload.len() >= wires.family.header_length() + 8
            && about.starts_with(&parsed.payload),
        "quotes {:02x?}\nof {about:02x?}",
        parsed.payload
    );
    Ok(())
}

/// REQ-8: what cannot have a session is refused with "communication
/// administratively prohibited", and dropped: out of ports.
fn req_8_exhaustion_is_told_to_the_sender(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--ports", "40000-40007"])?;
    for session in [Session::Udp, Session::Tcp] {
        let mut refused = 0;
        for port in 40_000..40_010 {
            let packet = session.out(wires.inside(0, port), family.remote(0, 53));
            if port < 40_008 {
                wires
                    .out(0, &packet)
                    .with_context(|| format!("{session:?}, port {port}"))?;
            } else {
                check_refused(&wires, 0, &packet)?;
                refused += 1;
            }
        }
        ensure!(refused == 2);
        // Those that have a session go on.
        let packet = session.out(wires.inside(0, 40_003), family.remote(0, 53));
        wires.out(0, &packet)?;
    }
    Ok(())
}
both_families!(req_8_exhaustion_is_told_to_the_sender);

/// REQ-8: by a limit of the administrator's.
fn req_8_a_limit_is_told_to_the_sender(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--guest-max-sessions", "4"])?;
    let sessions = [Session::Udp, Session::Udp, Session::Tcp, Session::Echo];
    for (port, session) in (40_000..).zip(sessions) {
        wires.out(0, &session.out(wires.inside(0, port), family.remote(0, 53)))?;
    }
    for session in SESSIONS {
        check_refused(
            &wires,
            0,
            &session.out(wires.inside(0, 50_000), family.remote(0, 53)),
        )?;
    }
    // The other guest has its own.
    wires.out(
        1,
        &Session::Udp.out(wires.inside(1, 50_000), family.remote(0, 53)),
    )?;
    Ok(())
}
both_families!(req_8_a_limit_is_told_to_the_sender);

/// REQ-10: types that are not carried: source quench, redirect, router
/// advertisement and solicitation, information, address mask; in IPv6 what is
/// said of neighbours and groups, and what has no meaning. REQ-11: they are
/// dropped, or the host's.
fn req_10_other_types_are_not_carried(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    let [inside, outside, remote] = Session::Udp.open(&wires)?;
    let kinds: &[u8] = match family {
        V4 => &[4, 5, 9, 10, 15, 16, 17, 18, 30, 37, 40, 42, 200],
        V6 => &[
            0, 5, 100, 127, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 143, 144,
            145, 148, 151, 155, 160, 200, 255,
        ],
    };
    for kind in kinds.iter().copied() {
        let about = Session::Udp.out(outside, remote).build();
        let error = packet::icmp_error(
            family.router(),
            family.outside_address(),
            (kind, 0),
            [10, 0, 0, 1],
            &about,
        );
        wires.world.send(&error)?;
        let about = Session::Udp.back(remote, inside).build();
        let error = packet::icmp_error(inside.ip(), remote.ip(), (kind, 0), [10, 0, 0, 1], &about);
        wires.guests[1].send(&error)?;
        wires
            .nothing_arrives()
            .with_context(|| format!("type {kind}"))?;
    }
    Ok(())
}
both_families!(req_10_other_types_are_not_carried);

/// REQ-10d: errors of our own have the precedence of internetwork control (RFC
/// 1812 section 4.3.2.5).
#[test]
fn req_10d_errors_of_our_own_take_precedence() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let inside = wires.inside(0, 40_000);
    let seen = wires.map_udp(0, inside.port(), V4.remote(0, 53))?;
    wires.guests[0].send(&packet::udp(inside, V4.remote(0, 53)).ttl(1))?;
    wires
        .world
        .send(&packet::udp(V4.remote(0, 53), seen).ttl(1))?;
    for wire in [&wires.guests[0], &wires.world] {
        let error = wire.receive_captured()?;
        let parsed = error.parse()?;
        ensure!(parsed.icmpv4().is_some(), "{parsed:?}");
        ensure!(
            error.ip()[1] == 0xc0,
            "type of service {:#x}",
            error.ip()[1]
        );
    }
    wires.nothing_arrives()
}

/// REQ-10f: errors of our own are limited in rate, for each sender by itself.
fn req_10f_errors_of_our_own_are_limited_in_rate(family: Family) -> Result<()> {
    // In half a second; see `refusal::Budget`.
    const MOST: usize = 256;
    const SENT: usize = 6000;
    let (_world, wires) = family.wired(2, &[])?;
    let expired = |guest| packet::udp(wires.inside(guest, 40_000), family.remote(0, 53)).ttl(1);
    let start = Instant::now();
    for _ in 0..SENT {
        wires.guests[0].send(&expired(0))?;
    }
    let told = wires.arrivals()?.guests.swap_remove(0).len();
    let halves = start.elapsed().as_millis() / 500 + 2;
    let most = MOST * usize::try_from(halves)?;
    ensure!(told >= MOST, "{told} errors");
    ensure!(told <= most, "{told} errors in {halves} half seconds");
    // Another guest is told.
    wires.guests[1].send(&expired(1))?;
    let error = wires.guests[1].receive()?;
    ensure!(
        error.icmp_kind() == Some(family.time_exceeded()),
        "{error:?}"
    );
    Ok(())
}
both_families!(req_10f_errors_of_our_own_are_limited_in_rate);

/// An echo request from outside is the host's, and makes no session.
fn req_10_queries_from_outside_are_the_hosts(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--filtering", "endpoint-independent"])?;
    let translated = map_echo(&wires, 0, 77, family.remote(0, 0).ip())?;
    for identifier in [translated, 5000] {
        let request = packet::echo_request(
            family.remote(1, 0).ip(),
            family.outside_address(),
            identifier,
            1,
        );
        wires.world.send(&request.payload(b"to the host"))?;
        let reply = wires.world.receive()?;
        ensure!(
            reply.source() == SocketAddr::new(family.outside_address(), identifier)
                && reply.payload == b"to the host",
            "{reply:?}"
        );
    }
    wires.nothing_arrives()?;
    match map_echo(&wires, 0, 5000, family.remote(0, 0).ip())? {
        5000 => Ok(()),
        other => bail!("5000 was taken, got {other}"),
    }
}
both_families!(req_10_queries_from_outside_are_the_hosts);
