//! RFC 4787, NAT Behavioral Requirements for Unicast UDP: a test for each
//! requirement, by what arrives.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    capture::{Capture, Captured, Direction, Partial},
    packet::{self, Builder, Parsed},
    topology::{self, GUEST_DEVICE, Inside, Tap, Topology, UPLINK, Uplink},
    traffic::{self, TcpReflector, TcpSession, UdpReflector},
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::Instance,
    wires::{Whole, Wires},
    world::{World, just_over},
};

/// Remotes that differ in address, in port and in both.
fn remotes(family: Family) -> [SocketAddr; 4] {
    [
        family.remote(0, 53),
        family.remote(0, 3478),
        family.remote(1, 53),
        family.remote(1, 3478),
    ]
}

/// A datagram of this length, IP header included.
fn datagram(source: SocketAddr, destination: SocketAddr, length: usize) -> Builder {
    let headers = Family::of(source.ip()).header_length() + 8;
    packet::udp(source, destination).payload(&traffic::pattern(length - headers))
}

/// REQ-1: endpoint-independent mapping.
fn req_1_mapping_is_endpoint_independent(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    for guest in 0..2 {
        for port in [40_000, 40_001] {
            let seen = wires.map_udp(guest, port, remotes(family)[0])?;
            for remote in remotes(family) {
                let again = wires.map_udp(guest, port, remote)?;
                ensure!(again == seen, "{seen}, to {remote} {again}");
                wires.answer_udp(remote, seen, guest, port)?;
            }
        }
    }
    wires.nothing_arrives()
}
both_families!(req_1_mapping_is_endpoint_independent);

/// REQ-2: "IP address pooling" behavior of "Paired": the sessions of one
/// internal address have one external address.
fn req_2_pooling_is_paired(family: Family) -> Result<()> {
    let pool = [2, 3, 4].map(|host| family.uplink_host(host).to_string());
    let (_world, wires) = family.wired(8, &["--outside-address", &pool.join(",")])?;
    let mut used = Vec::new();
    for guest in 0..8 {
        let first = wires.map_udp(guest, 40_000, family.remote(0, 53))?.ip();
        ensure!(pool.contains(&first.to_string()), "from {first}");
        for port in 40_001..40_032 {
            for remote in remotes(family) {
                let seen = wires.map_udp(guest, port, remote)?;
                ensure!(seen.ip() == first, "{first} and {}", seen.ip());
                wires.answer_udp(remote, seen, guest, port)?;
            }
        }
        let syn = packet::tcp(wires.inside(guest, 40_000), family.remote(0, 53));
        let syn = syn.with_tcp(|header| header.syn = true);
        let echo =
            packet::echo_request(wires.inside(guest, 0).ip(), family.remote(1, 0).ip(), 7, 7);
        for packet in [syn, echo] {
            let seen = wires.out(guest, &packet)?.source_address();
            ensure!(seen == first, "{first} and {seen}");
        }
        used.push(first);
    }
    used.sort();
    used.dedup();
    ensure!(used.len() > 1, "all guests have {used:?}");
    Ok(())
}
both_families!(req_2_pooling_is_paired);

/// REQ-3: no "Port assignment" behavior of "Port overloading".
fn req_3_ports_are_not_overloaded(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(3, &[])?;
    for port in [600, 40_000] {
        let seen = (0..3)
            .map(|guest| wires.map_udp(guest, port, family.remote(0, 53)))
            .collect::<Result<Vec<_>>>()?;
        ensure!(
            seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2],
            "{seen:?}"
        );
        for (guest, seen) in seen.into_iter().enumerate() {
            wires.answer_udp(family.remote(0, 53), seen, guest, port)?;
        }
    }
    wires.nothing_arrives()
}
both_families!(req_3_ports_are_not_overloaded);

/// REQ-3a: a source port in 0-1023 is translated to one in that range, one in
/// 1024-65535 to one in that.
fn req_3a_the_port_range_is_kept(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(3, &[])?;
    for port in [
        1, 53, 600, 601, 1022, 1023, 1024, 1025, 40_000, 65_534, 65_535,
    ] {
        // The first guest has the port itself where it may.
        for guest in 0..3 {
            let seen = wires.map_udp(guest, port, family.remote(0, 53))?.port();
            ensure!((seen < 1024) == (port < 1024), "{port} became {seen}");
        }
    }
    Ok(())
}
both_families!(req_3a_the_port_range_is_kept);

/// REQ-4: "Port parity preservation" behavior of "Yes".
fn req_4_the_port_parity_is_kept(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(3, &[])?;
    for port in (600..610).chain(40_000..40_010) {
        for guest in 0..3 {
            let seen = wires.map_udp(guest, port, family.remote(0, 53))?.port();
            ensure!(seen % 2 == port % 2, "{port} became {seen}");
        }
    }
    Ok(())
}
both_families!(req_4_the_port_parity_is_kept);

/// REQ-5: the mapping timer is not under two minutes. REQ-5c: five minutes or
/// more by default.
fn req_5_the_default_timer_is_five_minutes(family: Family) -> Result<()> {
    let (world, _wires) = family.wired(1, &[])?;
    let status = world.instance.ask_json("status")?;
    let timeout = status["timeouts"]["udp"].as_f64();
    ensure!(timeout.is_some_and(|seconds| seconds >= 300.0), "{status}");
    Ok(())
}
both_families!(req_5_the_default_timer_is_five_minutes);

/// REQ-5b: the timer can be configured; then the mapping ends.
fn req_5b_the_timer_is_configurable(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--udp-timeout", "1"])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    wires.answer_udp(family.remote(0, 53), seen, 0, 40_000)?;
    thread::sleep(just_over(1));
    wires.world.send(&packet::udp(family.remote(0, 53), seen))?;
    ensure!(wires.arrivals()?.guests[0].is_empty(), "it arrived");
    // And begins again.
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    wires.answer_udp(family.remote(0, 53), seen, 0, 40_000)
}
both_families!(req_5b_the_timer_is_configurable);

/// REQ-6: "NAT Outbound refresh behavior" of "True".
fn req_6_outbound_packets_refresh_the_mapping(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--udp-timeout", "2"])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    for _ in 0..6 {
        thread::sleep(Duration::from_millis(500));
        let again = wires.map_udp(0, 40_000, family.remote(0, 53))?;
        ensure!(again == seen, "{seen}, then {again}");
    }
    // Also for other remotes' packets, by the same mapping.
    ensure!(wires.map_udp(0, 40_000, family.remote(1, 53))? == seen);
    wires.answer_udp(family.remote(0, 53), seen, 0, 40_000)
}
both_families!(req_6_outbound_packets_refresh_the_mapping);

/// REQ-6a: inbound refresh is a switch, off by default.
fn req_6a_inbound_packets_refresh_when_told_to(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--udp-timeout", "1"])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(300));
        wires.world.send(&packet::udp(family.remote(0, 53), seen))?;
    }
    wires.arrivals()?;
    wires.world.send(&packet::udp(family.remote(0, 53), seen))?;
    ensure!(wires.arrivals()?.guests[0].is_empty(), "it arrived");

    let (_world, wires) = family.wired(1, &["--udp-timeout", "2", "--inbound-refresh"])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    for _ in 0..6 {
        thread::sleep(Duration::from_millis(500));
        wires.answer_udp(family.remote(0, 53), seen, 0, 40_000)?;
    }
    ensure!(
        wires.map_udp(0, 40_000, family.remote(1, 53))? == seen,
        "a new mapping"
    );
    Ok(())
}
both_families!(req_6a_inbound_packets_refresh_when_told_to);

/// REQ-7: an internal network that conflicts with the external one is not
/// translated for: it is refused.
fn req_7_a_conflicting_network_is_refused(family: Family) -> Result<()> {
    let topology = family.topology().inside(Inside::Veth).build()?;
    let networks = match family {
        V4 => ["198.51.100.129/25", "198.51.0.1/16", "198.51.100.1/24"],
        V6 => [
            "2001:db8:1::8000:1/112",
            "2001:db8::1/40",
            "2001:db8:1::1/64",
        ],
    };
    for network in networks {
        let instance = Instance::new(&topology.host);
        let inside = format!("veth0={network}");
        let refused = instance
            .command("run")?
            .args(["--inside", &inside])
            .output()?;
        ensure!(
            !refused.status.success() && refused.stderr.contains("overlaps"),
            "{refused:?}"
        );
    }
    Ok(())
}
both_families!(req_7_a_conflicting_network_is_refused);

/// Whether a datagram from a remote reaches the mapping of guest 0's port
/// 40000.
fn is_let_in(wires: &Wires, from: SocketAddr, mapping: SocketAddr) -> Result<bool> {
    wires
        .world
        .send(&packet::udp(from, mapping).payload(b"in?"))?;
    let arrivals = wires.arrivals()?;
    ensure!(arrivals.world.is_empty(), "{from} got an answer");
    let arrived: Vec<_> = arrivals.guests[0]
        .iter()
        .map(Captured::parse)
        .collect::<Result<_>>()?;
    for packet in &arrived {
        let ends = (packet.source(), packet.destination());
        ensure!(ends == (from, wires.inside(0, 40_000)), "{packet:?}");
    }
    Ok(!arrived.is_empty())
}

/// REQ-8: "Address-Dependent Filtering" where a more stringent filtering is
/// most important: the default.
fn req_8_filtering_is_address_dependent_by_default(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    ensure!(
        !is_let_in(&wires, family.remote(1, 53), seen)?,
        "another address"
    );
    ensure!(
        is_let_in(&wires, family.remote(0, 53), seen)?,
        "the same endpoint"
    );
    ensure!(
        is_let_in(&wires, family.remote(0, 54), seen)?,
        "another port"
    );
    wires.map_udp(0, 40_000, family.remote(1, 99))?;
    ensure!(
        is_let_in(&wires, family.remote(1, 53), seen)?,
        "an address sent to"
    );
    Ok(())
}
both_families!(req_8_filtering_is_address_dependent_by_default);

/// REQ-8: "Endpoint-Independent Filtering" where application transparency is
/// most important.
fn req_8_filtering_can_be_endpoint_independent(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--filtering", "endpoint-independent"])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    for from in remotes(family) {
        ensure!(is_let_in(&wires, from, seen)?, "{from}");
        // And gets its answer, from the same endpoint.
        ensure!(wires.map_udp(0, 40_000, from)? == seen, "another mapping");
    }
    Ok(())
}
both_families!(req_8_filtering_can_be_endpoint_independent);

/// Section 5: "Address and Port-Dependent Filtering", for those who want it.
fn req_8_filtering_can_be_address_and_port_dependent(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--filtering", "udp=address-and-port-dependent"])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    ensure!(
        !is_let_in(&wires, family.remote(1, 53), seen)?,
        "another address"
    );
    ensure!(
        !is_let_in(&wires, family.remote(0, 54), seen)?,
        "another port"
    );
    ensure!(
        is_let_in(&wires, family.remote(0, 53), seen)?,
        "the same endpoint"
    );
    wires.map_udp(0, 40_000, family.remote(0, 54))?;
    ensure!(
        is_let_in(&wires, family.remote(0, 54), seen)?,
        "an endpoint sent to"
    );
    Ok(())
}
both_families!(req_8_filtering_can_be_address_and_port_dependent);

/// Sends a datagram from a guest's port to an outside endpoint, and checks that
/// it arrives at another's (or its own) with its outside endpoint as source.
fn check_hairpin(
    wires: &Wires,
    from: (usize, u16, SocketAddr),
    to: (usize, u16, SocketAddr),
) -> Result<()> {
    let (sender, source_port, source) = from;
    let (receiver, port, destination) = to;
    let inside = wires.inside(sender, source_port);
    let packet = packet::udp(inside, destination).payload(b"hairpin");
    wires.guests[sender].send(&packet)?;
    let arrived = wires.guests[receiver].receive()?;
    ensure!(
        arrived.source() == source
            && arrived.destination() == wires.inside(receiver, port)
            && arrived.payload == b"hairpin"
            && arrived.ttl() == 63,
        "{inside} to {destination} arrived as {arrived:?}, not from {source}"
    );
    Ok(())
}

/// Two guests talk over their outside endpoints, and one with itself.
fn check_hairpins(wires: &Wires) -> Result<()> {
    let family = wires.family;
    let one = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let other = wires.map_udp(1, 50_000, family.remote(0, 53))?;
    let (one, other) = ((0, 40_000, one), (1, 50_000, other));
    for _ in 0..2 {
        check_hairpin(wires, one, other)?;
        check_hairpin(wires, other, one)?;
    }
    let second = wires.map_udp(0, 40_002, family.remote(0, 53))?;
    check_hairpin(wires, one, (0, 40_002, second))?;
    check_hairpin(wires, (0, 40_002, second), one)?;
    check_hairpin(wires, one, one)?;
    // From a port that has no mapping yet.
    let fresh = packet::udp(wires.inside(1, 50_002), one.2);
    wires.guests[1].send(&fresh)?;
    let arrived = wires.guests[0].receive()?;
    ensure!(
        arrived.source().ip() == family.outside_address()
            && arrived.destination() == wires.inside(0, 40_000),
        "{arrived:?}"
    );
    let given = wires.map_udp(1, 50_002, family.remote(1, 53))?;
    ensure!(
        given == arrived.source(),
        "{given} and {}",
        arrived.source()
    );
    wires.nothing_arrives()
}

/// REQ-9: "Hairpinning". REQ-9a: with "External source IP address and port".
fn req_9_hairpins_come_from_the_external_endpoint(family: Family) -> Result<()> {
    for inside in [Inside::Veth, Inside::Bridge, Inside::Tap(Tap::default())] {
        let builder = family.topology().inside(inside).guests(2);
        let world = World::start(builder, &["--filtering", "endpoint-independent"])?;
        check_hairpins(&Wires::open(&world)?).with_context(|| format!("{inside:?}"))?;
    }
    Ok(())
}
both_families!(req_9_hairpins_come_from_the_external_endpoint);

/// REQ-9 with filtering: who sends to an outside endpoint lets its answers in,
/// though it may itself not be let in yet.
fn req_9_hairpins_are_filtered_like_the_world(family: Family) -> Result<()> {
    for filtering in ["address-dependent", "address-and-port-dependent"] {
        let (_world, wires) = family.wired(2, &["--filtering", filtering])?;
        let one = wires.map_udp(0, 40_000, family.remote(0, 53))?;
        let other = wires.map_udp(1, 50_000, family.remote(0, 53))?;
        wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), other))?;
        wires
            .nothing_arrives()
            .with_context(|| format!("{filtering}: not filtered"))?;
        let (one, other) = ((0, 40_000, one), (1, 50_000, other));
        check_hairpin(&wires, other, one).with_context(|| format!("{filtering}: answer"))?;
        check_hairpin(&wires, one, other)?;
    }
    Ok(())
}
both_families!(req_9_hairpins_are_filtered_like_the_world);

/// REQ-10: no ALG for UDP-based protocols.
fn req_10_payloads_are_left_alone(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    for port in [53, 69, 161, 500, 1701, 1719, 3478, 4500, 5060] {
        let inside = wires.inside(0, port);
        let payload = format!(
            "REGISTER sip:203.0.113.77 SIP/2.0\r\nVia: SIP/2.0/UDP {inside};rport\r\n\
             Contact: <sip:guest@{inside}>\r\n\r\no=- 1 1 IN IP4 {}\r\n",
            inside.ip()
        );
        let sent = packet::udp(inside, family.remote(0, port)).payload(payload.as_bytes());
        let arrived = wires.out(0, &sent)?;
        ensure!(arrived.payload == payload.as_bytes(), "{arrived:?}");
        let answer =
            packet::udp(family.remote(0, port), arrived.source()).payload(payload.as_bytes());
        ensure!(wires.back(&answer, 0)?.payload == payload.as_bytes());
    }
    Ok(())
}
both_families!(req_10_payloads_are_left_alone);

/// REQ-11: deterministic behavior: mapping and filtering stay what they are
/// under pressure.
fn req_11_behaviour_stays_the_same_under_port_pressure(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--ports", "40000-40019"])?;
    let mut seen = Vec::new();
    // The markers need a port, too.
    wires.nothing_arrives()?;
    for number in 0..9 {
        for guest in 0..2 {
            // The same ports, from within the range and from outside of it.
            let port = 39_995 + number;
            seen.push((
                guest,
                port,
                wires.map_udp(guest, port, family.remote(0, 53))?,
            ));
        }
    }
    // All are taken.
    let one_more = packet::udp(wires.inside(0, 30_000), family.remote(0, 53));
    for _ in 0..3 {
        wires.guests[0].send(&one_more)?;
        let answer = wires.guests[0].receive()?;
        ensure!(
            answer.icmp_kind() == Some(family.prohibited()),
            "{answer:?}"
        );
    }
    let mut ports: Vec<_> = seen.iter().map(|(.., seen)| seen.port()).collect();
    ports.sort_unstable();
    ports.dedup();
    ensure!(ports.len() == seen.len(), "shared ports: {seen:?}");
    ensure!(
        ports.iter().all(|port| (40_000..40_020).contains(port)),
        "{ports:?}"
    );
    for (guest, port, seen) in seen {
        for remote in remotes(family) {
            let again = wires.map_udp(guest, port, remote)?;
            ensure!(again == seen, "{seen}, to {remote} {again}");
        }
        wires.answer_udp(family.remote(1, 99), seen, guest, port)?;
        let stranger = SocketAddr::new(family.world_host(200), 53);
        wires.world.send(&packet::udp(stranger, seen))?;
    }
    wires.nothing_arrives()
}
both_families!(req_11_behaviour_stays_the_same_under_port_pressure);

/// ICMP errors of all kinds that quote a packet, and those that no NAT carries:
/// source quench and redirect.
fn errors(about: &[u8], to: SocketAddr) -> Vec<Builder> {
    let family = Family::of(to.ip());
    let others: &[_] = match family {
        V4 => &[(4, 0), (5, 0), (5, 1)],
        V6 => &[(137, 0)],
    };
    let kinds = [&family.errors(), others].concat();
    let from = family.remote(1, 0).ip();
    kinds
        .into_iter()
        .map(|kind| packet::icmp_error(from, to.ip(), kind, [0; 4], about))
        .collect()
}

/// REQ-12: no ICMP message ends a mapping.
fn req_12_icmp_does_not_end_a_mapping(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let about = packet::udp(seen, family.remote(0, 53))
        .payload(b"mapping")
        .build();
    for error in errors(&about, seen) {
        wires.world.send(&error)?;
        wires.arrivals()?;
        wires.answer_udp(family.remote(0, 53), seen, 0, 40_000)?;
    }
    ensure!(
        wires.map_udp(0, 40_000, family.remote(1, 1))? == seen,
        "a new mapping"
    );
    let inside = wires.inside(0, 40_000);
    let about = packet::udp(family.remote(0, 53), inside)
        .payload(b"answer")
        .build();
    for error in errors(&about, family.remote(0, 53)) {
        wires.guests[0].send(&error)?;
        wires.arrivals()?;
        wires.answer_udp(family.remote(0, 53), seen, 0, 40_000)?;
    }
    ensure!(
        wires.map_udp(0, 40_000, family.remote(1, 1))? == seen,
        "a new mapping"
    );
    Ok(())
}
both_families!(req_12_icmp_does_not_end_a_mapping);

/// REQ-12a: ICMP messages are not filtered by their source address. REQ-12b:
/// destination unreachable is supported.
fn req_12a_icmp_is_let_in_from_any_router(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let about = packet::udp(seen, family.remote(0, 53))
        .payload(b"mapping")
        .build();
    for router in [family.gateway(), family.router(), family.world_host(200)] {
        for kind in family.unreachables() {
            let error = packet::icmp_error(router, family.outside_address(), kind, [0; 4], &about);
            let arrived = wires.back(&error, 0)?;
            let quoted = arrived.quoted()?;
            ensure!(
                arrived.source_address() == router
                    && (quoted.source, quoted.destination)
                        == (wires.inside(0, 40_000), family.remote(0, 53)),
                "{arrived:?}"
            );
        }
    }
    Ok(())
}
both_families!(req_12a_icmp_is_let_in_from_any_router);

/// REQ-13: a packet with DF that does not fit is answered with "fragmentation
/// needed", with the MTU (RFC 1191); one of IPv6, always, with "packet too big"
/// (RFC 8201).
fn req_13_too_big_with_df_is_answered(family: Family) -> Result<()> {
    let builder = family.topology().inside(Inside::Veth).uplink_mtu(1400);
    let world = World::start(builder, &[])?;
    let wires = Wires::open(&world)?;
    let inside = wires.inside(0, 40_000);
    let large = datagram(inside, family.remote(0, 53), 1500).dont_fragment();
    for _ in 0..2 {
        wires.guests[0].send(&large)?;
        let answer = wires.guests[0].receive()?;
        ensure!(
            answer.icmp_kind() == Some(family.too_big())
                && answer.icmp_rest() == Some([0, 0, 5, 120]),
            "{answer:?}"
        );
        ensure!(answer.quoted()?.source == inside, "{answer:?}");
        wires.nothing_arrives()?;
        // The same with a session.
        wires.map_udp(0, 40_000, family.remote(0, 53))?;
    }
    Ok(())
}
both_families!(req_13_too_big_with_df_is_answered);

/// Checks that what arrived in fragments of at most 1400 bytes, in order, is
/// this packet.
fn check_fragmented(arrived: &Whole, expected: &Builder) -> Result<()> {
    ensure!(
        arrived.ip_payload == expected.fragmentable() && arrived.ttl == 63,
        "arrived: {arrived:02x?}"
    );
    ensure!(
        arrived.pieces.len() > 1 && arrived.pieces.iter().all(|length| *length <= 1400),
        "in pieces of {:?}",
        arrived.pieces
    );
    ensure!(
        arrived.pieces[1..]
            .iter()
            .all(|length| *length <= arrived.pieces[0]),
        "not in order: {:?}",
        arrived.pieces
    );
    Ok(())
}

/// REQ-13a: a packet without DF that does not fit is fragmented, and the
/// fragments are sent in order.
#[test]
fn req_13a_too_big_without_df_is_fragmented() -> Result<()> {
    let builder = Topology::builder().inside(Inside::Veth).uplink_mtu(1400);
    let world = World::start(builder, &[])?;
    let wires = Wires::open(&world)?;
    for length in [1401, 1402, 1403, 1407, 1500] {
        for port in [40_000, 40_001] {
            wires.guests[0].send(&datagram(wires.inside(0, port), V4.remote(0, 53), length))?;
            let arrived = wires.world.receive_whole()?;
            check_fragmented(
                &arrived,
                &datagram(V4.outside(port), V4.remote(0, 53), length),
            )?;
        }
    }
    // Fragments that are themselves too big.
    let large = datagram(wires.inside(0, 40_000), V4.remote(0, 53), 8000);
    wires.guests[0].send_all(&large, |packet| packet.fragments(1500))?;
    let arrived = wires.world.receive_whole()?;
    check_fragmented(
        &arrived,
        &datagram(V4.outside(40_000), V4.remote(0, 53), 8000),
    )
}

/// REQ-13a towards a guest whose link is narrower than the uplink.
#[test]
fn req_13a_too_big_for_the_guest_is_fragmented() -> Result<()> {
    let builder = Topology::builder().inside(Inside::Veth).inside_mtu(1400);
    let world = World::start(builder, &[])?;
    let wires = Wires::open(&world)?;
    let seen = wires.map_udp(0, 40_000, V4.remote(0, 53))?;
    for length in [1401, 1403, 1407, 1500] {
        wires
            .world
            .send(&datagram(V4.remote(0, 53), seen, length))?;
        let arrived = wires.guests[0].receive_whole()?;
        let inside = wires.inside(0, 40_000);
        check_fragmented(&arrived, &datagram(V4.remote(0, 53), inside, length))?;
    }
    Ok(())
}

/// Checks that none of the packets that were captured needs more than 1400 bytes
/// on the wire, and that some were long.
fn check_lengths(capture: Capture) -> Result<()> {
    let packets = capture.stop()?;
    packets.verify_checksums(Partial::Accept)?;
    let arrived = packets
        .list
        .iter()
        .filter(|packet| packet.direction == Direction::In);
    let mut longest = 0;
    for packet in arrived {
        let length = match &packet.offload.gso {
            Some(gso) => {
                let parsed = packet.parse()?;
                let headers = packet.ip().len() - parsed.payload.len();
                headers + usize::from(gso.size)
            }
            None => packet.ip().len(),
        };
        ensure!(length <= 1400, "{length}: {}", packet.summary());
        longest = longest.max(length);
    }
    ensure!(longest > 1300, "{longest}: nothing was cut");
    Ok(())
}

/// REQ-13a with the packets of real stacks that do no path MTU discovery: those
/// have checksums and segments that a device is to make.
#[test]
fn req_13a_packets_with_offloads_are_fragmented() -> Result<()> {
    let taps = [true, false].map(|offloads| {
        Inside::Tap(Tap {
            offloads,
            ..Tap::default()
        })
    });
    let links = [
        (Inside::Veth, Uplink::Ethernet),
        (taps[0], Uplink::Ethernet),
        (taps[1], Uplink::Tun),
        (Inside::Bridge, Uplink::Ethernet),
        (Inside::Tun, Uplink::Ethernet),
        (Inside::Tun, Uplink::Tun),
    ];
    for (inside, uplink) in links {
        for narrow in [UPLINK, GUEST_DEVICE] {
            let builder = Topology::builder().inside(inside).uplink(uplink);
            check_offloads(builder, narrow)
                .with_context(|| format!("{inside:?}, {uplink:?}, narrow {narrow}"))?;
        }
    }
    Ok(())
}

/// With 1400 bytes on one of the two links of the host.
fn check_offloads(builder: topology::Builder, narrow: &str) -> Result<()> {
    let builder = if narrow == UPLINK {
        builder.uplink_mtu(1400)
    } else {
        builder.inside_mtu(1400)
    };
    let world = World::start(builder, &[])?;
    let Topology {
        guests,
        world: outer,
        ..
    } = &world.topology;
    let guest = &guests[0].namespace;
    for namespace in [guest, outer] {
        namespace.sysctl("net.ipv4.ip_no_pmtu_disc", "1")?;
    }
    // Each end believes that the other's link takes 1500 bytes.
    let device = world.topology.world_device();
    let connected = "proto kernel scope link src 198.51.100.1";
    outer.ip(&format!(
        "route replace 198.51.100.0/24 dev {device} {connected} advmss 1460"
    ))?;
    let default = guest.ip("route show default")?;
    guest.ip(&format!("route replace {} advmss 1460", default.trim()))?;
    let capture = if narrow == UPLINK {
        Capture::start(outer, device)?
    } else {
        Capture::start(guest, GUEST_DEVICE)?
    };

    let server = UdpReflector::start(outer, V4.server(0, 7))?;
    let socket = world.guest_socket(0, 40_000)?;
    for length in [1385, 1386, 1400, 1401, 1440, 5000] {
        for content in [traffic::pattern(length), vec![0; length]] {
            traffic::reflect_udp(&socket, server.address(), &content)
                .with_context(|| format!("UDP, {length} bytes"))?;
        }
    }
    let server = TcpReflector::start(outer, server.address())?;
    let mut session = TcpSession::open(guest, None, server.address())?;
    session.exchange(&traffic::pattern(1_000_000))?;
    check_lengths(capture)
}

/// Every order of three things.
const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];

/// The three fragments of a packet in another order.
fn in_order(packet: &Builder, order: [usize; 3]) -> Vec<Vec<u8>> {
    let fragments = packet.fragments(1500);
    order.map(|number| fragments[number].clone()).to_vec()
}

/// Checks that a packet arrived whole, from these ends.
fn check_whole(arrived: &Whole, expected: &Builder) -> Result<()> {
    ensure!(
        arrived.ip_payload == expected.fragmentable(),
        "arrived: {arrived:02x?}"
    );
    Ok(())
}

/// REQ-14: "Received Fragment Out of Order" behavior: fragments are translated
/// in whatever order they come.
fn req_14_fragments_may_come_in_any_order(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let mut identification = 0;
    for (port, order) in (40_000..).zip(ORDERS) {
        let (inside, outside) = (wires.inside(0, port), family.outside(port));
        // First without a session, then with one.
        for _ in 0..2 {
            identification += 1;
            let with_ends = |source, destination| {
                datagram(source, destination, 4000).identification(identification)
            };
            wires.guests[0].send_all(&with_ends(inside, family.remote(0, 53)), |packet| {
                in_order(packet, order)
            })?;
            let arrived = wires
                .world
                .receive_whole()
                .with_context(|| format!("out in the order {order:?}"))?;
            check_whole(&arrived, &with_ends(outside, family.remote(0, 53)))?;
            wires
                .world
                .send_all(&with_ends(family.remote(0, 53), outside), |packet| {
                    in_order(packet, order)
                })?;
            let arrived = wires.guests[0]
                .receive_whole()
                .with_context(|| format!("back in the order {order:?}"))?;
            check_whole(&arrived, &with_ends(family.remote(0, 53), inside))?;
        }
    }
    wires.nothing_arrives()
}
both_families!(req_14_fragments_may_come_in_any_order);

/// REQ-14 for TCP segments and ICMP echoes.
fn req_14_fragments_of_tcp_and_icmp_may_come_in_any_order(family: Family) -> Result<()> {
    type Make = fn(SocketAddr, SocketAddr) -> Builder;
    let (_world, wires) = family.wired(1, &[])?;
    let payload = traffic::pattern(3900);
    let make: [(&str, Make); 2] = [
        ("TCP", |source, destination| {
            packet::tcp(source, destination).with_tcp(|header| header.syn = true)
        }),
        ("ICMP", |source, destination| {
            packet::echo_request(source.ip(), destination.ip(), source.port(), 1)
        }),
    ];
    for (name, make) in make {
        for (port, order) in (40_000..).zip(ORDERS) {
            let packet = make(wires.inside(0, port), family.remote(0, 53))
                .payload(&payload)
                .identification(port.into());
            wires.guests[0].send_all(&packet, |packet| in_order(packet, order))?;
            let arrived = wires
                .world
                .receive_whole()
                .with_context(|| format!("{name} in the order {order:?}"))?;
            let expected = make(family.outside(port), family.remote(0, 53)).payload(&payload);
            check_whole(&arrived, &expected)?;
        }
    }
    wires.nothing_arrives()
}
both_families!(req_14_fragments_of_tcp_and_icmp_may_come_in_any_order);

/// REQ-14 with identifications that come again soon, as they do at a few
/// hundred Mbit/s (RFC 4963).
fn req_14_an_identification_may_come_again(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &[])?;
    let outward = datagram(wires.inside(0, 40_000), family.remote(0, 53), 4000);
    let inward = datagram(family.remote(0, 53), family.outside(40_000), 4000);
    for order in ORDERS {
        wires.guests[0].send_all(&outward, |packet| in_order(packet, order))?;
        let expected = datagram(family.outside(40_000), family.remote(0, 53), 4000);
        check_whole(&wires.world.receive_whole()?, &expected)?;
        wires
            .world
            .send_all(&inward, |packet| in_order(packet, order))?;
        let expected = datagram(family.remote(0, 53), wires.inside(0, 40_000), 4000);
        check_whole(&wires.guests[0].receive_whole()?, &expected)?;
    }
    Ok(())
}
both_families!(req_14_an_identification_may_come_again);

/// REQ-14 with the fragments of two datagrams mixed, of two guests with the
/// same identification.
fn req_14_fragments_of_two_datagrams_do_not_mix(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &[])?;
    let seen = [
        wires.map_udp(0, 40_000, family.remote(0, 53))?,
        wires.map_udp(1, 50_000, family.remote(0, 53))?,
    ];
    let ports = [40_000, 50_000];
    for (identification, order) in (1..).zip(ORDERS) {
        let datagram = |source, destination| {
            datagram(source, destination, 4000).identification(identification)
        };
        // In.
        let packets = [0, 1].map(|number| datagram(family.remote(number, 53), seen[0]));
        wires.map_udp(0, 40_000, family.remote(1, 53))?;
        for number in order {
            for packet in &packets {
                wires.world.send_all(packet, |packet| {
                    vec![packet.fragments(1500)[number].clone()]
                })?;
            }
        }
        let arrivals = wires.arrivals()?;
        ensure!(
            arrivals.guests[0].len() == 6 && arrivals.guests[1].is_empty(),
            "{order:?}: {} and {} fragments",
            arrivals.guests[0].len(),
            arrivals.guests[1].len()
        );
        // Out.
        for number in order {
            for (guest, port) in ports.into_iter().enumerate() {
                let packet = datagram(wires.inside(guest, port), family.remote(0, 53));
                wires.guests[guest].send_all(&packet, |packet| {
                    vec![packet.fragments(1500)[number].clone()]
                })?;
            }
        }
        let arrived = wires.arrivals()?.world;
        ensure!(arrived.len() == 6, "{order:?}: {} fragments", arrived.len());
        let arrived: Vec<Parsed> = arrived.iter().map(Captured::parse).collect::<Result<_>>()?;
        let is_first = |packet: &&Parsed| {
            packet
                .fragment()
                .is_some_and(|fragment| fragment.start == 0)
        };
        let ports: Vec<_> = arrived
            .iter()
            .filter(is_first)
            .map(|packet| packet.payload[..2].to_vec())
            .collect();
        for seen in &seen {
            ensure!(
                ports.contains(&seen.port().to_be_bytes().to_vec()),
                "{seen} in {ports:?}"
            );
        }
    }
    Ok(())
}
both_families!(req_14_fragments_of_two_datagrams_do_not_mix);

/// REQ-14 with nothing known of the next hop, neither outwards nor inwards: it is
/// asked for, and no fragment is lost meanwhile.
fn req_14_fragments_wait_for_the_next_hop(family: Family) -> Result<()> {
    let world = World::start(family.topology().inside(Inside::Veth), &[])?;
    let Topology { host, guests, .. } = &world.topology;
    let wires = Wires::open(&world)?;
    for (port, order) in (40_000..).zip(ORDERS) {
        // A session of its own, as one that is there remembers its next hop.
        let outward = datagram(wires.inside(0, port), family.remote(0, 53), 4000);
        host.ip(&format!("neighbour flush dev {UPLINK}"))?;
        wires.guests[0].send_all(&outward, |packet| in_order(packet, order))?;
        let arrived = wires.world.receive_whole();
        let arrived = arrived.with_context(|| format!("out, {order:?}"))?;
        check_whole(
            &arrived,
            &datagram(family.outside(port), family.remote(0, 53), 4000),
        )?;
    }
    // The guest's own address, as nobody answers ARP for the silent one.
    let address = family.address_of(&guests[0]);
    for (port, order) in (50_000..).zip(ORDERS) {
        let socket = world.guest_socket(0, port)?;
        socket.send_to(b"mapping", family.remote(0, 53))?;
        let seen = wires.world.receive()?.source();
        host.ip(&format!("neighbour flush dev veth0 {address}"))?;
        let inward = datagram(family.remote(0, 53), seen, 4000);
        wires
            .world
            .send_all(&inward, |packet| in_order(packet, order))?;
        let mut received = vec![0; 5000];
        let (length, _) = socket
            .recv_from(&mut received)
            .with_context(|| format!("in, {order:?}"))?;
        ensure!(received[..length] == traffic::pattern(4000 - family.header_length() - 8));
    }
    Ok(())
}
both_families!(req_14_fragments_wait_for_the_next_hop);

/// REQ-14a: a flood of fragments does not keep others from being translated,
/// fragments of others included.
fn req_14a_a_flood_of_fragments_harms_no_other_packets(family: Family) -> Result<()> {
    const FLOOD: u32 = 300;
    let (_world, wires) = family.wired(2, &[])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let whole = |identification: u32| {
        datagram(family.remote(0, 53), seen, 4000).identification(0x8000 | identification)
    };
    for round in 0..20_u32 {
        // Later fragments whose first one never comes, and first ones alone.
        for number in 0..FLOOD {
            let identification = round * FLOOD + number;
            let keep =
                |packet: &Builder| vec![packet.fragments(1500).swap_remove(number as usize % 2)];
            let flood = datagram(wires.inside(1, 50_000), family.remote(1, 53), 4000);
            wires.guests[1].send_all(&flood.identification(identification), keep)?;
            let flood = datagram(family.remote(1, 53), seen, 4000);
            wires
                .world
                .send_all(&flood.identification(identification), keep)?;
        }
        wires.arrivals()?;
        wires.answer_udp(family.remote(0, 53), seen, 0, 40_000)?;
        ensure!(
            wires.map_udp(0, 40_000, family.remote(0, 53))? == seen,
            "remapped"
        );
        wires
            .world
            .send_all(&whole(round), |packet| packet.fragments(1500))?;
        let arrived = wires.guests[0]
            .receive_whole()
            .with_context(|| format!("after {} fragments", 2 * FLOOD * round))?;
        let inside = wires.inside(0, 40_000);
        check_whole(&arrived, &datagram(family.remote(0, 53), inside, 4000))?;
    }
    Ok(())
}
both_families!(req_14a_a_flood_of_fragments_harms_no_other_packets);
