//! NAT64 (RFC 6146, 7915): guests with IPv6 only reach the world's IPv4. Packets byte by byte as
//! the guest and the world would send them, and real connections.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tapnat_testbed::{
    packet::{self, Parsed},
    qemu::{Kernel, Machine, Model},
    topology::{GUEST_DEVICE, Inside, Tap, Topology},
    traffic::{self, HttpServer, TcpReflector, TcpSession},
};
use tapnat_tests::{
    family::{V4, V6},
    wires::{Wires, ends},
    world::World,
};

/// For local use (RFC 8215): the well-known one must not hold the addresses of these worlds.
const PREFIX: &str = "64:ff9b:1::/96";
/// Emulation is slow, and the machine may be busy.
const PATIENCE: Duration = Duration::from_mins(1);
const ARGUMENTS: [&str; 2] = ["--nat64", PREFIX];

/// As a guest sees an address of the world.
fn embedded(address: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = address.octets();
    let word = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, word(a, b), word(c, d))
}

/// As a guest sees an endpoint of the world.
fn seen(endpoint: SocketAddr) -> SocketAddr {
    match endpoint.ip() {
        IpAddr::V4(address) => SocketAddr::new(embedded(address).into(), endpoint.port()),
        IpAddr::V6(_) => endpoint,
    }
}

/// Guests with IPv6 only, and a world that also has IPv4.
fn wired(guests: u8, arguments: &[&str]) -> Result<(World, Wires)> {
    let builder = Topology::builder()
        .ipv6_guests()
        .inside(Inside::Veth)
        .guests(guests);
    let arguments: Vec<_> = ARGUMENTS.iter().chain(arguments).copied().collect();
    let world = World::start(builder, &arguments)?;
    let wires = Wires::open_for(&world, V6)?;
    Ok((world, wires))
}

/// A guest's datagram to the world; returns the outside endpoint that it comes from.
fn open(wires: &Wires, guest: usize, port: u16, remote: SocketAddr) -> Result<SocketAddr> {
    const PAYLOAD: &[u8] = b"six to four";
    let sent = packet::udp(wires.inside(guest, port), seen(remote)).payload(PAYLOAD);
    let arrived = wires.out(guest, &sent.ttl(64))?;
    ensure!(
        arrived.destination() == remote && arrived.payload == PAYLOAD && arrived.ttl() == 63,
        "{arrived:?}"
    );
    Ok(arrived.source())
}

fn quoted_ends(error: &Parsed) -> Result<(SocketAddr, SocketAddr)> {
    let quoted = error.quoted()?;
    Ok((quoted.source, quoted.destination))
}

#[test]
fn a_datagram_goes_out_and_its_answer_comes_back() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let remote = V4.remote(0, 53);
    let outside = open(&wires, 0, 40_000, remote)?;
    ensure!(outside == V4.outside(40_000), "{outside}");
    for length in [0, 1, 2, 7, 1400] {
        let answer = packet::udp(remote, outside).payload(&traffic::pattern(length));
        let arrived = wires.back(&answer.ttl(64), 0)?;
        ensure!(
            ends(&arrived) == (seen(remote), wires.inside(0, 40_000))
                && arrived.payload == traffic::pattern(length)
                && arrived.ttl() == 63,
            "{arrived:?}"
        );
    }
    wires.nothing_arrives()
}

/// RFC 6146 section 3.5.1: the same outside endpoint for every remote, another one for another guest.
#[test]
fn mappings_do_not_depend_on_the_remote() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    let first = open(&wires, 0, 40_000, V4.remote(0, 53))?;
    ensure!(open(&wires, 0, 40_000, V4.remote(1, 123))? == first);
    let other = open(&wires, 1, 40_000, V4.remote(0, 53))?;
    ensure!(
        other != first && other.ip() == first.ip(),
        "{first} {other}"
    );
    let arrived = wires.back(&packet::udp(V4.remote(0, 53), other), 1)?;
    ensure!(
        arrived.destination() == wires.inside(1, 40_000),
        "{arrived:?}"
    );
    Ok(())
}

/// RFC 7915 section 4.5: IPv6 knows no UDP without a checksum.
#[test]
fn a_datagram_without_a_checksum_gets_one() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let remote = V4.remote(0, 53);
    let outside = open(&wires, 0, 40_000, remote)?;
    let answer = packet::udp(remote, outside)
        .payload(b"none")
        .without_udp_checksum();
    // Verified as it arrives.
    let arrived = wires.back(&answer, 0)?;
    ensure!(
        arrived.udp().is_some_and(|udp| udp.checksum != 0),
        "{arrived:?}"
    );
    ensure!(arrived.payload == b"none", "{arrived:?}");
    Ok(())
}

#[test]
fn echoes_of_two_guests_with_one_identifier() -> Result<()> {
    let (_world, wires) = wired(2, &[])?;
    let remote = V4.remote(0, 0).ip();
    let mut identifiers = Vec::new();
    for guest in 0..2 {
        let inside = wires.inside(guest, 0).ip();
        let target = seen(SocketAddr::new(remote, 0)).ip();
        let request = packet::echo_request(inside, target, 7, 1).payload(b"ping");
        let arrived = wires.out(guest, &request)?;
        let [high, low, ..] = arrived.icmp_rest().context("no ICMP")?;
        identifiers.push(u16::from_be_bytes([high, low]));
        ensure!(arrived.icmp_kind() == Some((8, 0)), "{arrived:?}");
    }
    ensure!(identifiers[0] != identifiers[1], "{identifiers:?}");
    for (guest, identifier) in identifiers.into_iter().enumerate() {
        let outside = V4.outside_address();
        let reply = packet::echo_reply(remote, outside, identifier, 1).payload(b"pong");
        let arrived = wires.back(&reply, guest)?;
        ensure!(arrived.icmp_kind() == Some((129, 0)), "{arrived:?}");
        ensure!(arrived.destination_address() == wires.inside(guest, 0).ip());
    }
    Ok(())
}

/// RFC 7915 sections 4.2 and 4.3: an error, and what it quotes, as the guest sent it.
#[test]
fn errors_come_back_about_what_was_sent() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let remote = V4.remote(0, 53);
    let inside = wires.inside(0, 40_000);
    let outside = open(&wires, 0, 40_000, remote)?;
    let about = packet::udp(outside, remote).payload(b"six to four").build();
    let router = V4.router();
    // Port unreachable, time exceeded, and too big for 1300 bytes, which are 1320 of IPv6.
    for (kind, rest, expected, told) in [
        ((3, 3), [0; 4], (1, 4), 0),
        ((11, 0), [0; 4], (3, 0), 0),
        ((3, 4), [0, 0, 5, 20], (2, 0), 1320),
    ] {
        let error = packet::icmp_error(router, V4.outside_address(), kind, rest, &about);
        let arrived = wires.back(&error, 0)?;
        ensure!(
            arrived.icmp_kind() == Some(expected),
            "{kind:?}: {arrived:?}"
        );
        ensure!(
            quoted_ends(&arrived)? == (inside, seen(remote)),
            "{kind:?}: {arrived:?}"
        );
        let number = arrived.icmp_rest().context("no ICMP")?;
        ensure!(u32::from_be_bytes(number) == told, "{kind:?}: {number:?}");
        ensure!(arrived.source_address() == seen(SocketAddr::new(router, 0)).ip());
    }
    Ok(())
}

#[test]
fn the_host_is_one_hop() -> Result<()> {
    let (world, wires) = wired(1, &[])?;
    let remote = seen(V4.remote(0, 53));
    wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), remote).ttl(1))?;
    let error = wires.guests[0].receive()?;
    ensure!(error.icmp_kind() == Some((3, 0)), "{error:?}");
    ensure!(
        error.source_address() == V6.gateway_of(world.guest(0)),
        "{error:?}"
    );
    ensure!(
        quoted_ends(&error)? == (wires.inside(0, 40_000), remote),
        "{error:?}"
    );
    Ok(())
}

/// RFC 7915 sections 4.1 and 5.1.1: fragments have a header of their own in IPv6.
#[test]
fn fragments_go_both_ways_in_any_order() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let remote = V4.remote(0, 53);
    let payload = traffic::pattern(3000);
    for reversed in [false, true] {
        let sent = packet::udp(wires.inside(0, 40_000), seen(remote)).payload(&payload);
        wires.guests[0].send_all(&sent.identification(0x1_0001), |packet| {
            let mut fragments = packet.fragments(1280);
            if reversed {
                fragments.reverse();
            }
            fragments
        })?;
        let arrived = wires.world.receive_whole()?;
        ensure!(
            arrived.ip_payload[8..] == payload[..],
            "{reversed}: {arrived:?}"
        );
        let answer = packet::udp(remote, V4.outside(40_000)).payload(&payload);
        wires.world.send_all(&answer.identification(77), |packet| {
            let mut fragments = packet.fragments(1400);
            if reversed {
                fragments.reverse();
            }
            fragments
        })?;
        let arrived = wires.guests[0].receive_whole()?;
        ensure!(
            arrived.ip_payload[8..] == payload[..],
            "{reversed}: {arrived:?}"
        );
        ensure!(arrived.destination == wires.inside(0, 0).ip());
    }
    Ok(())
}

/// What fits IPv4's way and not the guest's is cut, or refused where it may not be.
#[test]
fn what_grows_too_long_is_cut_or_refused() -> Result<()> {
    let (_world, wires) = wired(1, &[])?;
    let remote = V4.remote(0, 53);
    let outside = open(&wires, 0, 40_000, remote)?;
    let payload = traffic::pattern(1500 - 28);
    let answer = packet::udp(remote, outside).payload(&payload);
    wires.world.send(&answer)?;
    let arrived = wires.guests[0].receive_whole()?;
    ensure!(arrived.pieces.len() == 2, "{:?}", arrived.pieces);
    ensure!(arrived.ip_payload[8..] == payload[..]);
    wires.world.send(&answer.dont_fragment())?;
    let error = wires.world.receive()?;
    ensure!(error.icmp_kind() == Some((3, 4)), "{error:?}");
    let number = error.icmp_rest().context("no ICMP")?;
    ensure!(number == [0, 0, 5, 200], "1480 bytes of IPv4: {number:?}");
    Ok(())
}

/// What is cut on the way out begins a session like any other.
#[test]
fn what_is_too_long_for_the_uplink_is_cut() -> Result<()> {
    let builder = Topology::builder()
        .ipv6_guests()
        .inside(Inside::Veth)
        .uplink_mtu(1300);
    let world = World::start(builder, &ARGUMENTS)?;
    let wires = Wires::open_for(&world, V6)?;
    let payload = traffic::pattern(3000);
    let sent = packet::udp(wires.inside(0, 40_000), seen(V4.remote(0, 53))).payload(&payload);
    wires.guests[0].send_all(&sent.identification(7), |packet| packet.fragments(1440))?;
    let arrived = wires.world.receive_whole()?;
    ensure!(arrived.ip_payload[8..] == payload[..], "{arrived:?}");
    ensure!(arrived.source == V4.outside_address(), "{arrived:?}");
    Ok(())
}

/// A stand-in is on no wire, also where guests go by their own addresses.
#[test]
fn nothing_goes_out_untranslated() -> Result<()> {
    let (_world, wires) = wired(1, &["--untranslated", "203.0.113.0/24"])?;
    let outside = open(&wires, 0, 40_000, V4.remote(0, 53))?;
    ensure!(outside == V4.outside(40_000), "{outside}");
    Ok(())
}

#[test]
fn the_host_itself_is_not_behind_the_prefix() -> Result<()> {
    let (world, wires) = wired(1, &[])?;
    let host = seen(SocketAddr::new(V4.outside_address(), 22));
    let sent = packet::udp(wires.inside(0, 40_000), host);
    wires.guests[0].send(&sent)?;
    let error = wires.guests[0].receive()?;
    ensure!(error.icmp_kind() == Some((1, 1)), "{error:?}");
    ensure!(
        quoted_ends(&error)? == (wires.inside(0, 40_000), host),
        "{error:?}"
    );
    ensure!(world.instance.count("unreachable-by-nat64")? == 1);
    Ok(())
}

/// RFC 6146 section 3.5: guests reach each other by their outside endpoints.
#[test]
fn a_guest_reaches_another_by_its_outside_endpoint() -> Result<()> {
    let arguments = ["--filtering", "endpoint-independent"];
    let (_world, wires) = wired(2, &arguments)?;
    let outside = open(&wires, 1, 40_000, V4.remote(0, 53))?;
    let sent = packet::udp(wires.inside(0, 30_000), seen(outside)).payload(b"hairpin");
    wires.guests[0].send(&sent)?;
    let arrived = wires.guests[1].receive()?;
    let from = seen(V4.outside(30_000));
    ensure!(
        ends(&arrived) == (from, wires.inside(1, 40_000)) && arrived.payload == b"hairpin",
        "{arrived:?}"
    );
    wires.guests[1].send(&packet::udp(wires.inside(1, 40_000), from))?;
    let back = wires.guests[0].receive()?;
    ensure!(
        ends(&back) == (seen(outside), wires.inside(0, 30_000)),
        "{back:?}"
    );
    Ok(())
}

#[test]
fn who_is_no_guest_and_what_is_no_address_gets_nowhere() -> Result<()> {
    let (world, wires) = wired(1, &[])?;
    let stranger = SocketAddr::new(V6.inside_host(9, 9), 40_000);
    wires.guests[0].send(&packet::udp(stranger, seen(V4.remote(0, 53))))?;
    // The loopback's, and multicast.
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(224, 0, 0, 1)] {
        let nowhere = SocketAddr::new(embedded(address).into(), 53);
        wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), nowhere))?;
    }
    wires.nothing_arrives()?;
    ensure!(world.instance.count("spoofed-source")? == 1);
    Ok(())
}

/// A guest is destroyed with its sessions open, and another one gets its device and its address, but
/// has an Ethernet address of its own.
#[test]
fn the_next_guest_on_a_cable_is_not_the_last_one() -> Result<()> {
    let (world, _wires) = wired(1, &[])?;
    let web = TcpReflector::start(&world.topology.world, V4.server(0, 7))?;
    let guest = &world.guest(0).namespace;
    let open = TcpSession::open(guest, None, seen(web.address()))?;
    guest.ip(&format!("link set {GUEST_DEVICE} down"))?;
    guest.ip(&format!(
        "link set {GUEST_DEVICE} address 02:00:00:00:00:77"
    ))?;
    guest.ip(&format!("link set {GUEST_DEVICE} up"))?;
    world.guest(0).configure()?;
    let begin = Instant::now();
    while traffic::ping(guest, seen(web.address()).ip(), 1, &[])?.received == 0 {
        ensure!(begin.elapsed() < PATIENCE, "it is taken for the last one");
    }
    TcpSession::open(guest, None, seen(web.address()))?.exchange(b"x")?;
    drop(open);
    Ok(())
}

/// RFC 6052 section 3.1: the well-known prefix is for addresses that are valid everywhere.
#[test]
fn the_well_known_prefix_holds_no_private_address() -> Result<()> {
    let builder = Topology::builder().ipv6_guests().inside(Inside::Veth);
    let world = World::start(builder, &["--nat64", "64:ff9b::/96"])?;
    let wires = Wires::open_for(&world, V6)?;
    let private = SocketAddr::new("64:ff9b::a00:1".parse()?, 53);
    wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), private))?;
    wires.nothing_arrives()?;
    ensure!(world.instance.count("unroutable-destination")? == 1);
    Ok(())
}

/// Large segments of a guest's, and of the world's, keep their checksums and their contents.
#[test]
fn connections_through_a_tap_with_offloads() -> Result<()> {
    let builder = Topology::builder()
        .ipv6_guests()
        .inside(Inside::Tap(Tap::default()));
    let world = World::start(builder, &ARGUMENTS)?;
    let server = TcpReflector::start(&world.topology.world, V4.server(0, 7))?;
    let guest = &world.guest(0).namespace;
    let mut session = TcpSession::open(guest, None, seen(server.address()))?;
    session.exchange(&traffic::pattern(4_000_000))?;
    let ping = traffic::ping(guest, seen(V4.server(1, 0)).ip(), 3, &[])?;
    ensure!(ping.received == 3, "{}", ping.output);
    Ok(())
}

/// A real guest that has IPv6 and nothing else pings a server that has IPv4 and nothing else, and
/// fetches from it.
#[test]
fn a_qemu_guest_with_ipv6_only_reaches_a_server_with_ipv4_only() -> Result<()> {
    let topology = Topology::builder().ipv6().guests(0).build()?;
    let http = HttpServer::start(&topology.world, V4.server(0, 80))?;
    let inside = ["--inside", "tap0=fd00:7a70::1/64"];
    let world = World::start_in(topology, &[inside, ARGUMENTS].concat())?;
    let machine =
        Machine::new(Kernel::installed()?)
            .ipv6()
            .card_with_queues("tap0", Model::Virtio, 2);
    let mut guest = machine.boot(&world.topology.host)?;
    guest.run(
        "/bin/ip link set eth0 up && /bin/ip address add fd00:7a70::10/64 dev eth0 nodad && \
         /bin/ip route add default via fd00:7a70::1",
    )?;
    let server = seen(V4.server(0, http.address().port()));
    let said = guest.run_within(&format!("ping -c 3 -W 5 {}", server.ip()), PATIENCE)?;
    ensure!(said.contains("3 packets received"), "{said}");
    let seen = guest.run_within(
        &format!("/bin/curl -sS --max-time 50 http://{server}/"),
        PATIENCE,
    )?;
    let seen: SocketAddr = seen.parse().with_context(|| seen.clone())?;
    ensure!(seen.ip() == V4.outside_address(), "seen as {seen}");
    let sum = guest.run_within(
        &format!("/bin/curl -sS --max-time 50 http://{server}/bytes/300000 | md5sum"),
        PATIENCE,
    )?;
    let expected = world
        .topology
        .host
        .command("md5sum")
        .stdin(traffic::pattern(300_000))
        .run()?;
    ensure!(sum == expected, "{sum} and not {expected}");
    Ok(())
}

#[test]
fn mistakes_are_told_with_a_way_out() -> Result<()> {
    let topology = Topology::builder()
        .ipv6_guests()
        .inside(Inside::Veth)
        .build()?;
    let instance = tapnat_tests::instance::Instance::new(&topology.host);
    let inside = topology.inside();
    for (arguments, part) in [
        (vec!["--nat64", "64:ff9b::/90"], "give it a length of 96"),
        (vec!["--nat64", "64:ff9b::1/96"], "write 64:ff9b::/96"),
        (vec!["--nat64", "10.0.0.0/8"], "is not an IPv6 prefix"),
        (vec!["--nat64", "ff00::/96"], "prefix of your own"),
        (
            vec!["--nat64", PREFIX, "--firewall", "ask"],
            "leave out nat64",
        ),
    ] {
        let arguments = [vec!["--inside", &inside[0]], arguments].concat();
        let output = instance.command("run")?.args(&arguments).output()?;
        ensure!(!output.status.success(), "{arguments:?}");
        let said = output.stderr.replace('\n', " ");
        ensure!(said.contains(part), "{arguments:?}: {said}");
    }
    Ok(())
}

#[test]
fn the_nat_log_tells_of_the_guests_own_address() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("nat.log").display().to_string();
    let ends = [
        "--udp-timeout",
        "1s",
        "--port-rest",
        "1s",
        "--sweep-interval",
        "1s",
    ];
    let arguments = [&["--count", "--nat-log", &log][..], &ends].concat();
    let (_world, wires) = wired(1, &arguments)?;
    let remote = V4.remote(0, 53);
    let inside = wires.inside(0, 40_000);
    let address = inside.ip().to_string();
    let written = |event: &str| -> Result<Value> {
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(&log)?;
            let mut lines = text.lines().map(serde_json::from_str::<Value>);
            if let Some(line) = lines.find(|it| it.as_ref().is_ok_and(|it| it["event"] == event)) {
                return Ok(line?);
            }
            ensure!(start.elapsed() < PATIENCE, "no {event} in {text}");
            thread::sleep(Duration::from_millis(50));
        }
    };
    open(&wires, 0, 40_000, remote)?;
    for event in ["mapping-created", "mapping-removed"] {
        let line = written(event)?;
        ensure!(line["inside"]["address"] == address, "{line}");
    }
    Ok(())
}

/// Wherever the world's address is told, too.
#[test]
fn a_guest_is_shown_by_its_own_address() -> Result<()> {
    let (world, wires) = wired(2, &["--count"])?;
    let remote = V4.remote(0, 53);
    let inside = wires.inside(0, 40_000);
    let address = inside.ip().to_string();
    open(&wires, 0, 40_000, remote)?;
    open(&wires, 1, 40_000, remote)?;
    let expected = json!({"address": address, "port": 40_000});
    let flows = world.instance.ask_json("flows")?;
    let list = flows.as_array().context("an array")?;
    ensure!(list.len() == 2, "{flows}");
    let is_shown = |flow: &Value| flow["inside"] == expected && flow["outside"]["port"] == 40_000;
    ensure!(list.iter().any(is_shown), "{flows}");
    let mappings = world.instance.ask_json("mappings")?;
    let list = mappings.as_array().context("an array")?;
    ensure!(list.iter().any(|it| it["inside"] == expected), "{mappings}");
    let chosen = world
        .instance
        .ask("flows", &["--guest", &address, "--json"])?;
    let chosen: Value = serde_json::from_str(&chosen)?;
    ensure!(
        chosen.as_array().is_some_and(|it| it.len() == 1),
        "{chosen}"
    );
    let sums = world.instance.ask("flows", &["--by", "guest"])?;
    ensure!(sums.contains(&address), "{sums}");

    let guests = world.instance.ask_json("guests")?;
    let of = |list: &Value| {
        let found = list.as_array()?.iter().find(|it| it["address"] == address);
        found.cloned()
    };
    let guest = of(&guests).with_context(|| guests.to_string())?;
    ensure!(
        guest["device"] == "veth0" && guest["sessions"] == 1 && guest["bytes"]["outbound"] != 0,
        "{guest}"
    );
    ensure!(
        guest["stand_in"]
            .as_str()
            .is_some_and(|it| it.starts_with("0.")),
        "{guest}"
    );
    let status = world.instance.ask("status", &[])?;
    ensure!(status.contains(&format!("behind {PREFIX}\n")), "{status}");
    let text = world.instance.ask("guests", &[])?;
    ensure!(text.contains(&format!("{address} (NAT64)")), "{text}");
    for (command, options) in [
        ("top", &["--interval", "1"][..]),
        ("map", &[]),
        ("status", &[]),
    ] {
        let shown = world
            .instance
            .ask(command, &[options, &["--json"]].concat())?;
        let shown: Value = serde_json::from_str(&shown)?;
        ensure!(of(&shown["guests"]).is_some(), "{command}: {shown}");
    }
    // It has another way to the world, which is counted apart.
    let six = packet::udp(inside, V6.remote(0, 53)).payload(b"six to six");
    wires.out(0, &six)?;
    let guests = world.instance.ask_json("guests")?;
    let entries = guests.as_array().context("an array")?;
    let entries: Vec<_> = entries
        .iter()
        .filter(|it| it["address"] == address)
        .collect();
    ensure!(
        entries.len() == 2 && entries.iter().any(|it| it["stand_in"].is_null()),
        "{guests}"
    );
    let metrics = world.instance.ask("metrics", &[])?;
    let lines: Vec<_> = metrics
        .lines()
        .filter(|line| line.starts_with("tapnat_guest_sessions{") && line.contains(&address))
        .collect();
    ensure!(lines.len() == 1 && lines[0].ends_with(" 2"), "{lines:?}");
    Ok(())
}
