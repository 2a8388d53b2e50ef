//! What `flows`, `mappings` and `status` say about real traffic, with and
//! without a process, from the pinned tables alone.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{maps::MapInfo, programs::loaded_programs};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tapnat_testbed::{
    packet,
    snapshot::Snapshot,
    topology::{Guest, HOST_ADDRESS, Inside, Topology, WORLD_ADDRESSES},
    traffic::{IpSender, TcpReflector, TcpSession, UdpReflector, ping, reflect_udp, udp_socket},
};
use tapnat_tests::{
    family::{V4, V6},
    instance::{Instance, PATIENCE},
    world::World,
};

const ARGUMENTS: [&str; 2] = ["--inside", "veth0=10.0.0.1/24"];

fn world() -> Result<Topology> {
    Topology::builder().inside(Inside::Veth).build()
}

fn guest(world: &Topology) -> Result<&Guest> {
    world.guests.first().context("the world has no guest")
}

fn server() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(WORLD_ADDRESSES[0]), 0)
}

fn endpoint(value: &Value) -> Result<SocketAddr> {
    let address = value["address"].as_str().context("no address")?.parse()?;
    let port = u16::try_from(value["port"].as_u64().context("no port")?)?;
    Ok(SocketAddr::new(address, port))
}

/// The objects of this protocol in an array.
fn of<'a>(list: &'a Value, protocol: &str) -> Result<Vec<&'a Value>> {
    let list = list
        .as_array()
        .with_context(|| format!("not an array: {list}"))?;
    Ok(list
        .iter()
        .filter(|entry| entry["protocol"] == protocol)
        .collect())
}

#[test]
fn sessions_and_mappings_are_shown_as_they_are_on_the_wire() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let mut process = instance.start(&ARGUMENTS)?;
    let guest = guest(&world)?;
    let tcp = TcpReflector::start(&world.world, server())?;
    let udp = UdpReflector::start(&world.world, server())?;
    let session = TcpSession::open(&guest.namespace, None, tcp.address())?;
    let socket = udp_socket(&guest.namespace, SocketAddr::new(guest.address.into(), 0))?;
    let seen = reflect_udp(&socket, udp.address(), b"hello")?;
    guest
        .namespace
        .exec(&format!("ping -c 1 -W 5 {}", WORLD_ADDRESSES[0]))?;

    let check = || {
        let mappings = instance.ask_json("mappings")?;
        let flows = instance.ask_json("flows")?;
        for (protocol, inside, outside, remote, state) in [
            (
                "tcp",
                session.stream().local_addr()?,
                session.seen(),
                tcp.address(),
                "established",
            ),
            ("udp", socket.local_addr()?, seen, udp.address(), "two-way"),
        ] {
            let found = of(&flows, protocol)?;
            ensure!(found.len() == 1, "not one {protocol} flow: {flows}");
            let flow = found[0];
            ensure!(endpoint(&flow["inside"])? == inside, "{flow}");
            ensure!(endpoint(&flow["outside"])? == outside, "{flow}");
            ensure!(endpoint(&flow["remote"])? == remote, "{flow}");
            ensure!(flow["state"] == state, "{flow}");
            let (idle, left) = (
                flow["idle_seconds"].as_u64(),
                flow["expires_in_seconds"].as_u64(),
            );
            ensure!(
                idle.is_some() && left.is_some_and(|left| left > 0),
                "{flow}"
            );
            let found = of(&mappings, protocol)?;
            ensure!(found.len() == 1, "not one {protocol} mapping: {mappings}");
            ensure!(endpoint(&found[0]["inside"])? == inside, "{mappings}");
            ensure!(endpoint(&found[0]["outside"])? == outside, "{mappings}");
            ensure!(found[0]["sessions"] == 1, "{mappings}");
            ensure!(
                found[0]["expires_in_seconds"].as_u64() >= left,
                "a mapping ends before its session: {mappings} {flows}"
            );
        }
        let pings = of(&flows, "icmp")?;
        ensure!(pings.len() == 1, "not one ping: {flows}");
        ensure!(
            endpoint(&pings[0]["inside"])?.ip() == guest.address,
            "{flows}"
        );
        ensure!(
            endpoint(&pings[0]["outside"])?.ip() == HOST_ADDRESS,
            "{flows}"
        );
        ensure!(
            endpoint(&pings[0]["remote"])?.ip() == WORLD_ADDRESSES[0],
            "{flows}"
        );

        let table = instance.ask("flows", &[])?;
        ensure!(
            table.lines().count() == 4,
            "not a header and three rows:\n{table}"
        );
        ensure!(!table.contains('\u{1b}'), "colours in a pipe");
        ensure!(!table.contains("PACKETS"), "nothing is counted:\n{table}");
        let row = table.lines().find(|line| line.starts_with("tcp"));
        ensure!(
            row.is_some_and(|row| row.contains(&session.seen().to_string())),
            "{table}"
        );

        let status = instance.ask_json("status")?;
        ensure!(status["tables"]["sessions"]["used"] == 3, "{status}");
        ensure!(
            status["outside_addresses"] == json!([HOST_ADDRESS]),
            "{status}"
        );
        Ok(())
    };
    check()?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    check().context("without a process")
}

#[test]
#[expect(clippy::too_many_lines, reason = "one world is looked at in every way")]
fn both_families_are_shown_in_everything() -> Result<()> {
    const PORT: u16 = 40_000;
    let builder = Topology::builder().inside(Inside::Veth).ipv6();
    let world = World::start(builder, &["--count"])?;
    let (instance, guest) = (&world.instance, world.guest(0));
    let mut kept = Vec::new();
    for family in [V4, V6] {
        let echo = UdpReflector::start(&world.topology.world, family.server(0, 7))?;
        let local = SocketAddr::new(family.address_of(guest), PORT);
        let socket = udp_socket(&guest.namespace, local)?;
        let seen = reflect_udp(&socket, echo.address(), b"hello")?;
        ensure!(seen == family.outside(PORT), "{seen}");
        let answer = ping(&guest.namespace, family.server(0, 0).ip(), 1, &[])?;
        ensure!(answer.received == 1, "{}", answer.output);
        kept.push(socket);
    }
    let (flows, mappings) = (instance.ask_json("flows")?, instance.ask_json("mappings")?);
    let table = instance.ask("flows", &[])?;
    for (family, icmp) in [(V4, "icmp"), (V6, "icmpv6")] {
        let inside = SocketAddr::new(family.address_of(guest), PORT);
        let is_ours = |it: &&Value| endpoint(&it["inside"]).is_ok_and(|it| it == inside);
        let udp = of(&flows, "udp")?.into_iter().find(is_ours);
        let udp = udp.with_context(|| format!("no session of {inside}: {flows}"))?;
        ensure!(endpoint(&udp["outside"])? == family.outside(PORT), "{udp}");
        ensure!(endpoint(&udp["remote"])? == family.server(0, 7), "{udp}");
        ensure!(
            udp["packets"] == json!({"outbound": 1, "inbound": 1}),
            "{udp}"
        );
        let mapping = of(&mappings, "udp")?.into_iter().find(is_ours);
        let mapping = mapping.with_context(|| format!("no mapping of {inside}: {mappings}"))?;
        ensure!(
            endpoint(&mapping["outside"])? == family.outside(PORT),
            "{mapping}"
        );
        let pings = of(&flows, icmp)?;
        ensure!(
            pings.len() == 1 && endpoint(&pings[0]["inside"])?.ip() == inside.ip(),
            "{flows}"
        );
        let cells = [inside, family.outside(PORT), family.server(0, 7)].map(|it| it.to_string());
        let row = table.lines().find(|row| row.contains(&cells[0]));
        let row: Vec<_> = row.unwrap_or_default().split_whitespace().collect();
        ensure!(
            row.get(1..4) == Some(&cells.each_ref().map(String::as_str)[..]),
            "{table}"
        );

        let network = match family {
            V4 => "10.0.0.0/24",
            V6 => "fd00:7a70::/64",
        };
        let chosen = instance.ask("flows", &["--guest", network, "--protocol", "udp"])?;
        ensure!(
            chosen.lines().count() == 2 && chosen.contains(&cells[0]),
            "{network}: {chosen}"
        );
    }
    let remote = instance.ask("flows", &["--remote", "::/0", "--by", "guest"])?;
    let inside = V6.address_of(guest).to_string();
    ensure!(
        remote.lines().count() == 2 && remote.contains(&inside),
        "{remote}"
    );

    let status = instance.ask_json("status")?;
    ensure!(
        status["outside_addresses"] == json!([V4.outside_address(), V6.outside_address()]),
        "{status}"
    );
    ensure!(status["tables"]["sessions"]["used"] == 4, "{status}");
    ensure!(
        status["families"]["ipv6"]["mappings"]["used"] == 2,
        "{status}"
    );
    let devices = status["devices"].as_array().context("no devices")?;
    let device = devices.iter().find(|it| it["role"] == "inside");
    let device = device.with_context(|| format!("no inside device: {status}"))?;
    ensure!(
        device["address"] == json!(V4.gateway_of(guest))
            && device["ipv6_address"] == json!(V6.gateway_of(guest))
            && device["ipv6_prefix_length"] == 64,
        "{device}"
    );
    let text = instance.ask("status", &[])?;
    let networks = format!("{}/24, {}/64", V4.gateway_of(guest), V6.gateway_of(guest));
    ensure!(text.contains(&networks), "{text}");

    let guests = instance.ask_json("guests")?;
    for (number, family) in [V4, V6].into_iter().enumerate() {
        let it = &guests[number];
        ensure!(
            it["address"] == json!(family.address_of(guest))
                && it["sessions"] == 2
                && it["device"] == "veth0"
                && it["packets"]["outbound"] == 2
                && it["link_address"] == guests[0]["link_address"],
            "{guests}"
        );
    }
    let map = instance.ask("map", &["--interval", "1"])?;
    let top = instance.ask_json("top")?;
    for family in [V4, V6] {
        let device = format!("{}/", family.gateway_of(guest));
        ensure!(
            map.contains(&device) && map.contains(&family.address_of(guest).to_string()),
            "{map}"
        );
        let ports = top["ports"].as_array().context("no ports")?;
        let ours = ports
            .iter()
            .find(|it| it["address"] == json!(family.outside_address()));
        ensure!(ours.is_some_and(|it| it["udp"]["used"] == 1), "{top}");
    }
    let metrics = instance.ask("metrics", &[])?;
    for family in ["ipv4", "ipv6"] {
        let line = format!("table=\"sessions\",family=\"{family}\"}} 2\n");
        ensure!(metrics.contains(&line), "{metrics}");
    }
    ensure!(
        metrics.contains(&format!("guest=\"{inside}\"}} 2\n")),
        "{metrics}"
    );
    Ok(())
}

#[test]
fn packets_and_bytes_are_counted_if_asked() -> Result<()> {
    const HEADERS: u64 = 20 + 8;
    let world = world()?;
    let instance = Instance::new(&world.host);
    let _process = instance.start(&[&ARGUMENTS[..], &["--count"]].concat())?;
    let guest = guest(&world)?;
    let servers = [
        udp_socket(&world.world, server())?,
        udp_socket(&world.world, server())?,
    ];
    let socket = udp_socket(&guest.namespace, SocketAddr::new(guest.address.into(), 0))?;
    let mut buffer = [0; 1000];
    for (server, (outbound, inbound)) in servers.iter().zip([(3, 2), (1, 0)]) {
        for number in 0..outbound {
            socket.send_to(&[0; 100], server.local_addr()?)?;
            let (_, peer) = server.recv_from(&mut buffer)?;
            if number < inbound {
                server.send_to(&[0; 500], peer)?;
                socket.recv_from(&mut buffer)?;
            }
        }
    }
    let flows = instance.ask_json("flows")?;
    for (server, (outbound, inbound)) in servers.iter().zip([(3, 2), (1, 0)]) {
        let flow = of(&flows, "udp")?
            .into_iter()
            .find(|flow| flow["remote"]["port"] == server.local_addr().map_or(0, |it| it.port()))
            .with_context(|| format!("a flow is missing: {flows}"))?;
        let packets = json!({ "outbound": outbound, "inbound": inbound });
        let bytes = json!({
            "outbound": outbound * (HEADERS + 100),
            "inbound": inbound * (HEADERS + 500),
        });
        ensure!(flow["packets"] == packets, "{flow}");
        ensure!(flow["bytes"] == bytes, "{flow}");
    }
    let table = instance.ask("flows", &[])?;
    ensure!(
        table.contains("PACKETS") && table.contains(" 3/2 ") && table.contains(" 1/0 "),
        "{table}"
    );
    Ok(())
}

/// How many bytes the kernel made of the program that starts sessions.
fn size_of_start(instance: &Instance) -> Result<u32> {
    let id = MapInfo::from_pin(instance.pins().join("maps/SETTINGS"))?.id();
    loaded_programs()
        .filter_map(Result::ok)
        .find(|program| {
            let maps = program.map_ids().ok().flatten();
            program.name_as_str() == Some("start") && maps.is_some_and(|maps| maps.contains(&id))
        })
        .and_then(|program| program.size_translated())
        .context("the program is not loaded")
}

#[test]
fn without_verbose_the_verifier_takes_the_logs_out() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let mut process = instance.start(&ARGUMENTS)?;
    let silent = size_of_start(&instance)?;
    process.terminate(PATIENCE)?;
    let _process = instance.start(&[&ARGUMENTS[..], &["-v"]].concat())?;
    let verbose = size_of_start(&instance)?;
    ensure!(silent < verbose, "{silent} bytes, and {verbose} with -v");
    Ok(())
}

#[test]
fn what_becomes_of_packets_is_logged_if_asked() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let mut process = instance.start(&[&ARGUMENTS[..], &["-v"]].concat())?;
    let guest = guest(&world)?;
    let echo = UdpReflector::start(&world.world, server())?;
    let socket = udp_socket(&guest.namespace, SocketAddr::new(guest.address.into(), 0))?;
    reflect_udp(&socket, echo.address(), b"hello")?;
    let started = format!(
        "tapnat: session-started udp {} -> {}",
        socket.local_addr()?,
        echo.address()
    );
    process.wait_for_error_line(PATIENCE, |line| line == started)?;
    // A lone RST of a connection that never was.
    let stray = packet::tcp(
        SocketAddr::new(guest.address.into(), 4000),
        SocketAddr::new(server().ip(), 80),
    )
    .with_tcp(|tcp| tcp.rst = true)
    .build();
    IpSender::open(&guest.namespace, server().ip())?.send(&stray)?;
    process.wait_for_error_line(PATIENCE, |line| {
        line.starts_with("tapnat: no-session tcp 10.0.0.10:4000 -> ")
    })?;
    Ok(())
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let _process = instance.start(&ARGUMENTS)?;
    for verb in [
        "flows",
        "flows --json",
        "flows --by guest",
        "flows --watch",
        "status",
        "mappings --json",
        "guests",
        "map",
        "map --watch",
        "top --json",
    ] {
        // The reader is gone before the first byte.
        let line = format!(
            "exec 3> >(true); wait $!; \"$TAPNAT_BIN\" {verb} --instance {} >&3",
            instance.name()
        );
        let output = world.host.command("bash").args(["-c", &line]).output()?;
        ensure!(
            output.status.success() && output.stderr.is_empty(),
            "{verb}: {output:?}"
        );
    }
    let line = format!(
        "set -o pipefail; \"$TAPNAT_BIN\" flows --instance {} | head -n 1",
        instance.name()
    );
    let output = world.host.command("bash").args(["-c", &line]).output()?;
    ensure!(
        output.status.success() && output.stdout.starts_with("PROTO  INSIDE"),
        "{output:?}"
    );
    Ok(())
}

#[test]
fn timeouts_and_modes_are_those_that_were_asked_for() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let defaults = instance.start(&ARGUMENTS)?;
    let status = instance.ask_json("status")?;
    // RFC 4787 REQ-5, RFC 5382 REQ-5, RFC 5508 REQ-2.
    for (timeout, seconds) in [
        ("udp", 300.0),
        ("tcp_established", 7440.0),
        ("tcp_opening", 240.0),
        ("tcp_closing", 240.0),
        ("icmp", 60.0),
    ] {
        ensure!(status["timeouts"][timeout] == seconds, "{status}");
    }
    ensure!(
        status["mapping"]["udp"] == "endpoint-independent",
        "{status}"
    );
    ensure!(
        status["filtering"]["udp"] == "address-dependent",
        "{status}"
    );
    drop(defaults);
    instance.ask("down", &[])?;

    let asked = [
        "--udp-timeout",
        "2m",
        "--tcp-established-timeout",
        "7500",
        "--tcp-opening-timeout",
        "1500ms",
        "--tcp-closing-timeout",
        "2500ms",
        "--filtering",
        "endpoint-independent,tcp=address-and-port-dependent",
        "--mapping",
        "udp=address-and-port-dependent",
        "--guest-max-sessions",
        "7",
        "--inbound-refresh",
        "--max-sessions",
        "1000",
    ];
    let _process = instance.start(&[&ARGUMENTS[..], &asked].concat())?;
    let status = instance.ask_json("status")?;
    for (timeout, seconds) in [
        ("udp", 120.0),
        ("tcp_established", 7500.0),
        ("tcp_opening", 1.5),
        ("tcp_closing", 2.5),
    ] {
        ensure!(status["timeouts"][timeout] == seconds, "{status}");
    }
    ensure!(
        status["filtering"]["tcp"] == "address-and-port-dependent",
        "{status}"
    );
    ensure!(
        status["filtering"]["udp"] == "endpoint-independent",
        "{status}"
    );
    ensure!(
        status["mapping"]["tcp"] == "endpoint-independent",
        "{status}"
    );
    ensure!(
        status["mapping"]["udp"] == "address-and-port-dependent",
        "{status}"
    );
    ensure!(
        status["guest_max_sessions"] == 7 && status["inbound_refresh"] == true,
        "{status}"
    );
    ensure!(status["tables"]["sessions"]["capacity"] == 1000, "{status}");
    Ok(())
}

/// Another's `show` loaded the programs, and so swapped the tables under those
/// that ran.
#[test]
fn showing_changes_nothing() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let _process = instance.start(&ARGUMENTS)?;
    let guest = guest(&world)?;
    let udp = UdpReflector::start(&world.world, server())?;
    let socket = udp_socket(&guest.namespace, SocketAddr::new(guest.address.into(), 0))?;
    let seen = reflect_udp(&socket, udp.address(), b"before")?;
    let pins = instance.pins();
    let before = (Snapshot::take(&world.host, &pins)?, identities(&pins)?);
    for verb in [
        "flows", "mappings", "status", "guests", "top", "map", "flows",
    ] {
        // It is a terminal's alone.
        if verb != "top" {
            instance.ask(verb, &[])?;
        }
        instance.ask_json(verb)?;
    }
    let after = (Snapshot::take(&world.host, &pins)?, identities(&pins)?);
    if let Some(difference) = before.0.difference(&after.0) {
        bail!("{difference}");
    }
    ensure!(before.1 == after.1, "{:?}, then {:?}", before.1, after.1);
    let still = reflect_udp(&socket, udp.address(), b"after")?;
    ensure!(still == seen, "{seen}, then {still}");
    let flows = instance.ask_json("flows")?;
    ensure!(of(&flows, "udp")?.len() == 1, "{flows}");
    Ok(())
}

/// The kernel's number of each pinned map.
fn identities(pins: &Path) -> Result<BTreeMap<PathBuf, u32>> {
    let mut identities = BTreeMap::new();
    for entry in fs::read_dir(pins.join("maps"))? {
        let path = entry?.path();
        let info = MapInfo::from_pin(&path).with_context(|| path.display().to_string())?;
        identities.insert(path, info.id());
    }
    ensure!(!identities.is_empty(), "nothing is pinned");
    Ok(identities)
}
