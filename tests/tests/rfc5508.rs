//! RFC 5508, NAT Behavioral Requirements for ICMP: a test for each requirement,
//! by what arrives.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tapnat_testbed::{
    capture::Captured,
    packet::{self, Builder},
    topology::UPLINK,
    traffic,
};
use tapnat_tests::{
    wires::{Wires, remote, wired},
    world::{OUTSIDE, just_over, outside},
};

/// A router that an error comes from.
const ROUTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 99));

/// Sends an echo request as a guest and returns the identifier that it arrives
/// with in the world.
fn map_echo(wires: &Wires, guest: usize, identifier: u16, remote: IpAddr) -> Result<u16> {
    let source = wires.inside(guest, 0).ip();
    let request = packet::echo_request(source, remote, identifier, 9).payload(b"echo");
    let arrived = wires.out(guest, &request)?;
    ensure!(
        arrived.source_address() == OUTSIDE
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
    let reply = packet::echo_reply(remote, OUTSIDE, translated, 9).payload(b"reply");
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

/// Checks that a packet is this one, from the IP header on.
fn check(packet: &Captured, expected: &Builder) -> Result<()> {
    let expected = expected.build();
    ensure!(
        packet.ip().starts_with(&expected),
        "arrived: {:02x?}\nexpected: {expected:02x?}",
        packet.ip()
    );
    Ok(())
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
        let remote = remote(0, 53);
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
#[test]
fn req_1_queries_and_their_responses_pass() -> Result<()> {
    let (world, wires) = wired(1, &[])?;
    for identifier in [0, 1, 1023, 1024, 40_000, 65_535] {
        let target = remote(0, 0).ip();
        let translated = map_echo(&wires, 0, identifier, target)?;
        answer_echo(&wires, target, translated, 0, identifier)?;
    }
    // Timestamp, and its reply.
    let (inside, target) = (wires.inside(0, 0).ip(), remote(0, 0).ip());
    let timestamp = |source, destination, kind, identifier: u16| {
        let [high, low] = identifier.to_be_bytes();
        packet::icmp_error(source, destination, (kind, 0), [high, low, 0, 1], &[5; 12])
    };
    wires.guests[0].send(&timestamp(inside, target, 13, 77))?;
    let arrived = wires.world.receive_captured()?;
    let translated = u16::from_be_bytes([arrived.ip()[24], arrived.ip()[25]]);
    check(
        &arrived,
        &timestamp(OUTSIDE, target, 13, translated).ttl(63),
    )?;
    wires
        .world
        .send(&timestamp(target, OUTSIDE, 14, translated))?;
    let arrived = wires.guests[0].receive_captured()?;
    check(&arrived, &timestamp(target, inside, 14, 77).ttl(63))?;
    wires.nothing_arrives()?;
    drop(wires);
    let ping = traffic::ping(
        &world.guest(0).namespace,
        tapnat_tests::world::server(1, 0).ip(),
        3,
        &[],
    )?;
    ensure!(ping.received == 3, "{}", ping.output);
    Ok(())
}

/// REQ-1a: the mapping of identifiers is external host independent.
#[test]
fn req_1a_identifiers_do_not_depend_on_the_remote() -> Result<()> {
    let (_world, wires) = wired(3, &[])?;
    let mut seen = Vec::new();
    for guest in 0..3 {
        let first = map_echo(&wires, guest, 77, remote(0, 0).ip())?;
        let other = map_echo(&wires, guest, 77, remote(1, 0).ip())?;
        ensure!(first == other, "{first} and {other}");
        ensure!(!seen.contains(&first), "{first} belongs to two guests");
        seen.push(first);
    }
    for (guest, translated) in seen.into_iter().enumerate() {
        for number in 0..2 {
            answer_echo(&wires, remote(number, 0).ip(), translated, guest, 77)?;
        }
    }
    wires.nothing_arrives()
}

/// REQ-2: the query timer is not under 60 seconds.
#[test]
fn req_2_the_default_timer_is_long_enough() -> Result<()> {
    let (world, _wires) = wired(1, &[])?;
    let status = world.instance.ask_json("status")?;
    let timeout = status["timeouts"]["icmp"].as_f64();
    ensure!(timeout.is_some_and(|seconds| seconds >= 60.0), "{status}");
    Ok(())
}

/// REQ-2a: it is configurable; then the session ends.
#[test]
fn req_2a_the_timer_is_configurable() -> Result<()> {
    let (_world, wires) = wired(1, &["--icmp-timeout", "1"])?;
    let target = remote(0, 0).ip();
    let translated = map_echo(&wires, 0, 77, target)?;
    answer_echo(&wires, target, translated, 0, 77)?;
    thread::sleep(just_over(1));
    wires
        .world
        .send(&packet::echo_reply(target, OUTSIDE, translated, 9))?;
    wires.nothing_arrives()
}

/// REQ-3: an error with a wrong ICMP checksum is dropped. REQ-3a: so is one
/// whose quoted packet has a wrong IP checksum.
#[test]
fn req_3_errors_with_bad_checksums_are_dropped() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let bad = |error: Builder, about: &Builder| {
            let quoting = |about: Builder| error.clone().payload(&about.build());
            [
                quoting(about.clone()).bad_transport_checksum(),
                quoting(about.clone().bad_ip_checksum()),
            ]
        };
        let error = packet::unreachable(ROUTER, OUTSIDE, 3, &[]);
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

/// REQ-3b: IP options of the quoted packet are traversed.
#[test]
fn req_3b_options_of_the_quoted_packet_are_traversed() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        for length in [4, 20, 40] {
            let with = |packet: Builder| packet.options(&vec![1; length]).build();
            let about = with(session.out(outside, remote));
            let error = packet::unreachable(ROUTER, OUTSIDE, 1, &about);
            // The error itself may have some, too.
            wires.world.send(&error.options(&[1; 8]))?;
            let about = with(session.out(inside, remote));
            let expected = packet::unreachable(ROUTER, inside.ip(), 1, &about);
            let expected = expected.options(&[1; 8]).ttl(63);
            check(&wires.guests[1].receive_captured()?, &expected)?;
        }
    }
    Ok(())
}

/// REQ-3c: the transport checksum of the quoted packet is not validated.
#[test]
fn req_3c_the_quoted_transport_checksum_is_not_validated() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let about = session
            .out(outside, remote)
            .bad_transport_checksum()
            .build();
        wires
            .world
            .send(&packet::unreachable(ROUTER, OUTSIDE, 1, &about))?;
        let arrived = wires.guests[1].receive()?;
        let quoted = arrived.quoted()?;
        ensure!(quoted.source == inside, "{session:?}: {arrived:?}");
    }
    // A UDP datagram without one is quoted without one.
    let [inside, outside, remote] = Session::Udp.open(&wires)?;
    let about = |source| Session::Udp.out(source, remote).without_udp_checksum();
    let error = packet::unreachable(ROUTER, OUTSIDE, 1, &about(outside).build());
    wires.world.send(&error)?;
    let expected = packet::unreachable(ROUTER, inside.ip(), 1, &about(inside).build());
    check(&wires.guests[1].receive_captured()?, &expected.ttl(63))
}

/// REQ-3d: extensions behind the quoted packet (RFC 4884) are no part of it.
#[test]
fn req_3d_extensions_are_no_part_of_the_quoted_packet() -> Result<()> {
    // An MPLS label stack (RFC 4950) with the checksum of its structure.
    const EXTENSION: [u8; 12] = [0x20, 0, 0x9b, 0x6e, 0, 8, 1, 1, 0x44, 0x91, 0x01, 0x01];
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        for quoted in [48, 100, 128] {
            // Padded with zeros to 128 bytes; their number in words.
            let extended = |packet: Builder| {
                let mut about = packet.build()[..quoted].to_vec();
                about.resize(128, 0);
                about.extend(EXTENSION);
                about
            };
            let make = |to: IpAddr, about: &[u8]| {
                packet::icmp_error(ROUTER, to, (11, 0), [0, 32, 0, 0], about)
            };
            let about = extended(session.out(outside, remote));
            wires.world.send(&make(OUTSIDE, &about))?;
            let about = extended(session.out(inside, remote));
            let expected = make(inside.ip(), &about).ttl(63);
            check(&wires.guests[1].receive_captured()?, &expected)
                .with_context(|| format!("{session:?}, {quoted} bytes"))?;
        }
    }
    Ok(())
}

/// REQ-4: an error from outside goes to the mapping's owner: (a) the quoted
/// packet as it was sent, (b) type and code unchanged, (c) the destination that
/// of the quoted packet's sender.
#[test]
fn req_4_errors_from_outside_are_translated() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    let kinds = (0..16)
        .map(|code| (3, code))
        .chain([(11, 0), (11, 1), (12, 0), (12, 1)]);
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        for kind in kinds.clone() {
            let whole = session.out(inside, remote).build().len();
            // RFC 792's 8 bytes, odd lengths, and all (RFC 1812).
            for length in [28, 29, 36, 39, 40, 41, whole] {
                let about = |source| session.out(source, remote).ttl(60).build()[..length].to_vec();
                let rest = [0, 0, 5, 100];
                let error = packet::icmp_error(ROUTER, OUTSIDE, kind, rest, &about(outside));
                wires.world.send(&error)?;
                let expected = packet::icmp_error(ROUTER, inside.ip(), kind, rest, &about(inside));
                check(&wires.guests[1].receive_captured()?, &expected.ttl(63))
                    .with_context(|| format!("{session:?} {kind:?}, {length} bytes"))?;
            }
        }
    }
    wires.nothing_arrives()
}

/// REQ-4: without a mapping it is dropped, or the host's.
#[test]
fn req_4_errors_without_a_mapping_reach_no_guest() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    Session::Udp.open(&wires)?;
    for session in SESSIONS {
        let strangers = [
            (outside(50_000), remote(0, 53)),
            (outside(40_000), remote(1, 53)),
            ("198.51.100.9:40000".parse()?, remote(0, 53)),
        ];
        for (source, remote) in strangers {
            let about = session.out(source, remote).build();
            // Too little of it tells nothing.
            for length in [0, 8, 20, 27, about.len()] {
                let error = packet::unreachable(ROUTER, OUTSIDE, 3, &about[..length]);
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

/// REQ-5: an error from inside is translated likewise, (c) with the public
/// address as its source, whoever inside sent it.
#[test]
fn req_5_errors_from_inside_are_translated() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let behind = "10.0.1.88".parse()?;
        for (from, kind) in [(inside.ip(), (3, 3)), (behind, (11, 0)), (behind, (3, 1))] {
            let whole = session.back(remote, inside).build().len();
            for length in [28, 40, whole] {
                let about = |to| session.back(remote, to).ttl(60).build()[..length].to_vec();
                let error = packet::icmp_error(from, remote.ip(), kind, [0; 4], &about(inside));
                wires.guests[1].send(&error)?;
                let expected =
                    packet::icmp_error(OUTSIDE, remote.ip(), kind, [0; 4], &about(outside));
                check(&wires.world.receive_captured()?, &expected.ttl(63))
                    .with_context(|| format!("{session:?} {kind:?}, {length} bytes"))?;
            }
        }
    }
    wires.nothing_arrives()
}

/// REQ-5: without a mapping it is dropped.
#[test]
fn req_5_errors_without_a_mapping_do_not_get_out() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, _, remote] = session.open(&wires)?;
        let other = SocketAddr::new(inside.ip(), 50_000);
        let strangers = [
            session.back(remote, other),
            session.back(tapnat_tests::wires::remote(1, 53), inside),
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

/// REQ-6: an error neither refreshes a session nor deletes it.
#[test]
fn req_6_errors_do_not_refresh_sessions() -> Result<()> {
    let timeouts = [
        "--icmp-timeout",
        "1",
        "--udp-timeout",
        "1",
        "--tcp-opening-timeout",
        "1",
    ];
    let (_world, wires) = wired(2, &timeouts)?;
    let sessions = SESSIONS
        .map(|session| session.open(&wires).map(|ends| (session, ends)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(300));
        for (session, [inside, outside, remote]) in &sessions {
            let about = session.out(*outside, *remote).build();
            wires
                .world
                .send(&packet::unreachable(ROUTER, OUTSIDE, 1, &about))?;
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

/// REQ-6 and RFC 4787 REQ-12: sessions outlive the errors about them.
#[test]
fn req_6_errors_do_not_delete_sessions() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    for session in SESSIONS {
        let [inside, outside, remote] = session.open(&wires)?;
        let out = session.out(outside, remote).build();
        let back = session.back(remote, inside).build();
        for code in 0..16 {
            wires.back(&packet::unreachable(ROUTER, OUTSIDE, code, &out), 1)?;
            wires.out(
                1,
                &packet::unreachable(inside.ip(), remote.ip(), code, &back),
            )?;
            wires.back(&session.back(remote, outside), 1)?;
            let again = wires.out(1, &session.out(inside, remote))?.source();
            ensure!(again == outside, "{session:?}: {outside}, then {again}");
        }
    }
    Ok(())
}

/// REQ-7: hairpinned errors: about a guest's packet to another guest over its
/// outside endpoint. REQ-7a: the destination is that of the quoted packet's
/// sender.
#[test]
fn req_7_hairpinned_errors_are_translated() -> Result<()> {
    let (_world, wires) = wired(2, &["--filtering", "endpoint-independent"])?;
    // Neither guest has its own port outside.
    for (guest, port) in [(1, 40_000), (0, 50_000)] {
        wires.map_udp(guest, port, remote(0, 53))?;
    }
    let one = (
        wires.inside(0, 40_000),
        wires.map_udp(0, 40_000, remote(0, 53))?,
    );
    let other = (
        wires.inside(1, 50_000),
        wires.map_udp(1, 50_000, remote(0, 53))?,
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
        let expected = packet::unreachable(OUTSIDE, sender.ip(), 3, &about.build()).ttl(63);
        check(&wires.guests[guests[0]].receive_captured()?, &expected)?;
    }
    wires.nothing_arrives()
}

/// REQ-7 as RFC 7857 section 12 has it: hairpinned queries reach the guest whose
/// outside address it is, and those to a shared one the host, as from outside.
#[test]
fn req_7_hairpinned_queries_are_answered() -> Result<()> {
    const OWN: &str = "198.51.100.7";
    let (world, wires) = wired(2, &[])?;
    let [asker, guest] = [0, 1].map(|number| wires.inside(number, 0).ip());
    let host = &world.topology.host;
    host.ip(&format!("address add {OWN}/32 dev {UPLINK}"))?;
    let add = ["add", OWN, &guest.to_string()];
    world.instance.ask("static", &add)?;
    let own: IpAddr = OWN.parse()?;
    wires.guests[0].send(&packet::echo_request(asker, own, 77, 1).payload(b"guest?"))?;
    let arrived = wires.guests[1].receive()?;
    ensure!(
        arrived.source_address() == OUTSIDE
            && arrived.destination_address() == guest
            && arrived.payload == b"guest?",
        "{arrived:?}"
    );
    let identifier = arrived.source().port();
    wires.guests[1].send(&packet::echo_reply(guest, OUTSIDE, identifier, 1).payload(b"guest!"))?;
    let arrived = wires.guests[0].receive()?;
    ensure!(
        arrived.source_address() == own
            && arrived.destination() == wires.inside(0, 77)
            && arrived.payload == b"guest!",
        "{arrived:?}"
    );
    wires.guests[0].send(&packet::echo_request(asker, OUTSIDE, 78, 1).payload(b"host?"))?;
    let arrived = wires.guests[0].receive()?;
    ensure!(
        arrived.source_address() == OUTSIDE
            && arrived.destination() == wires.inside(0, 78)
            && arrived.payload == b"host?",
        "{arrived:?}"
    );
    wires.nothing_arrives()
}

/// Checks that a packet of a guest is refused with ICMP 3/13 about it, and goes
/// nowhere.
fn check_refused(wires: &Wires, guest: usize, packet: &Builder) -> Result<()> {
    wires.guests[guest].send(packet)?;
    let answer = wires.guests[guest].receive_captured()?;
    let parsed = answer.parse()?;
    let icmp = parsed.icmpv4().context("no ICMP")?.to_bytes();
    ensure!(
        icmp == [3, 13, icmp[2], icmp[3], 0, 0, 0, 0][..],
        "{icmp:?}"
    );
    let about = packet.build();
    ensure!(
        parsed.payload.len() >= 28 && about.starts_with(&parsed.payload),
        "quotes {:02x?}\nof {about:02x?}",
        parsed.payload
    );
    Ok(())
}

/// REQ-8: what cannot have a session is refused with "communication
/// administratively prohibited", and dropped: out of ports.
#[test]
fn req_8_exhaustion_is_told_to_the_sender() -> Result<()> {
    let (_world, wires) = wired(2, &["--ports", "40000-40007"])?;
    for session in [Session::Udp, Session::Tcp] {
        let mut refused = 0;
        for port in 40_000..40_010 {
            let packet = session.out(wires.inside(0, port), remote(0, 53));
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
        let packet = session.out(wires.inside(0, 40_003), remote(0, 53));
        wires.out(0, &packet)?;
    }
    Ok(())
}

/// REQ-8: by a limit of the administrator's.
#[test]
fn req_8_a_limit_is_told_to_the_sender() -> Result<()> {
    let (_world, wires) = wired(2, &["--guest-max-sessions", "4"])?;
    let sessions = [Session::Udp, Session::Udp, Session::Tcp, Session::Echo];
    for (port, session) in (40_000..).zip(sessions) {
        wires.out(0, &session.out(wires.inside(0, port), remote(0, 53)))?;
    }
    for session in SESSIONS {
        check_refused(
            &wires,
            0,
            &session.out(wires.inside(0, 50_000), remote(0, 53)),
        )?;
    }
    // The other guest has its own.
    wires.out(1, &Session::Udp.out(wires.inside(1, 50_000), remote(0, 53)))?;
    Ok(())
}

/// REQ-10: types that are not carried: source quench, redirect, router
/// advertisement and solicitation, information, address mask. REQ-11: they are
/// dropped, or the host's.
#[test]
fn req_10_other_types_are_not_carried() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    let [inside, outside, remote] = Session::Udp.open(&wires)?;
    for kind in [4, 5, 9, 10, 15, 16, 17, 18, 30, 37, 40, 42, 200] {
        let about = Session::Udp.out(outside, remote).build();
        let error = packet::icmp_error(ROUTER, OUTSIDE, (kind, 0), [10, 0, 0, 1], &about);
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

/// REQ-10d: errors of our own have the precedence of internetwork control (RFC
/// 1812 section 4.3.2.5).
#[test]
fn req_10d_errors_of_our_own_take_precedence() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let inside = wires.inside(0, 40_000);
    let seen = wires.map_udp(0, inside.port(), remote(0, 53))?;
    wires.guests[0].send(&packet::udp(inside, remote(0, 53)).ttl(1))?;
    wires.world.send(&packet::udp(remote(0, 53), seen).ttl(1))?;
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
#[test]
fn req_10f_errors_of_our_own_are_limited_in_rate() -> Result<()> {
    // In half a second; see `refusal::Budget`.
    const MOST: usize = 256;
    const SENT: usize = 6000;
    let (_world, wires) = wired(2, &[])?;
    let expired = |guest| packet::udp(wires.inside(guest, 40_000), remote(0, 53)).ttl(1);
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
    ensure!(error.icmpv4().is_some(), "{error:?}");
    Ok(())
}

/// An echo request from outside is the host's, and makes no session.
#[test]
fn req_10_queries_from_outside_are_the_hosts() -> Result<()> {
    let (_world, wires) = wired(1, &["--filtering", "endpoint-independent"])?;
    let translated = map_echo(&wires, 0, 77, remote(0, 0).ip())?;
    for identifier in [translated, 5000] {
        let request = packet::echo_request(remote(1, 0).ip(), OUTSIDE, identifier, 1);
        wires.world.send(&request.payload(b"to the host"))?;
        let reply = wires.world.receive()?;
        ensure!(
            reply.source() == SocketAddr::new(OUTSIDE, identifier)
                && reply.payload == b"to the host",
            "{reply:?}"
        );
    }
    wires.nothing_arrives()?;
    match map_echo(&wires, 0, 5000, remote(0, 0).ip())? {
        5000 => Ok(()),
        other => bail!("5000 was taken, got {other}"),
    }
}
