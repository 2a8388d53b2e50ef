//! `tapnat why`: what it says of a packet is what becomes of one; and asking changes nothing.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tapnat_testbed::{
    snapshot::Snapshot,
    topology::{Inside, Topology},
    traffic::{self, UdpReflector},
};
use tapnat_tests::{
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
    world::{World, server},
};

const PROBLEM: i32 = 3;

fn world(arguments: &[&str]) -> Result<World> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2);
    World::start(topology, arguments)
}

/// The answer about a packet, and the exit code.
fn ask(instance: &Instance, arguments: &[&str]) -> Result<(Value, i32)> {
    let output = instance
        .command("why")?
        .args(arguments)
        .arg("--json")
        .output()?;
    let code = output.status.code().context("it was killed")?;
    let report: Value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("{arguments:?}: {output:?}"))?;
    ensure!(report["schema"] == 1, "{report}");
    Ok((report, code))
}

#[test]
fn what_it_says_is_what_happens() -> Result<()> {
    let world = world(&["--deny", "203.0.113.2", "--isolate"])?;
    let instance = &world.instance;
    let host: SocketAddr = "10.0.0.1:9".parse()?;
    let other: SocketAddr = "10.0.1.10:9".parse()?;
    let nobody: SocketAddr = "240.0.0.1:9".parse()?;
    let broadcast: SocketAddr = "224.0.0.251:5353".parse()?;
    let cases = [
        (server(0, 9), "session-started", "forward"),
        (server(1, 9), "denied-destination", "refuse"),
        (host, "for-the-host", "pass"),
        (other, "guest-isolated", "refuse"),
        (nobody, "unroutable-destination", "drop"),
        (broadcast, "not-unicast", "pass"),
    ];
    let socket = world.guest_socket(0, 40_000)?;
    for (to, reason, outcome) in cases {
        let text = to.to_string();
        let arguments = ["--guest", "10.0.0.10", "--proto", "udp", "--to", &text];
        let before = instance.ask_json("status")?;
        let (report, code) = ask(instance, &arguments)?;
        let packet = &report["packet"];
        ensure!(
            packet["reason"] == reason && packet["outcome"] == outcome,
            "{to}: {packet}"
        );
        ensure!(
            packet["before"]["source"]["address"] == "10.0.0.10",
            "{packet}"
        );
        let refused = ["refuse", "drop"].contains(&outcome);
        ensure!(
            code == if refused { PROBLEM } else { 0 },
            "{to}: it ended with {code}"
        );
        ensure!(
            before == instance.ask_json("status")?,
            "{to}: asking changed something"
        );
        let counted = instance.count(reason)?;
        // Some of them the guest's own kernel does not send.
        if socket.send_to(b"x", to).is_ok() {
            instance
                .until(|_| instance.count(reason).is_ok_and(|count| count > counted))
                .with_context(|| format!("{to}: not {reason}"))?;
        }
    }
    // The outside endpoint that it told is the one that came to be.
    let (report, _) = ask(
        instance,
        &[
            "--guest",
            "10.0.0.10",
            "--proto",
            "udp",
            "--to",
            "203.0.113.1:9",
        ],
    )?;
    let after = &report["packet"]["after"]["source"];
    ensure!(
        *after == json!({"address": "198.51.100.2", "port": 40_000}),
        "{report}"
    );
    ensure!(
        report["packet"]["reason"] == "translated",
        "its session is there: {report}"
    );
    ensure!(report["guest"]["sessions"] == 1, "{report}");
    let drops = report["drops"].as_array().context("no drops")?;
    let denied = drops.iter().find(|it| it["reason"] == "denied-destination");
    let denied = denied.with_context(|| report.to_string())?;
    ensure!(
        denied["packets"] == 1 && denied["advice"].is_null(),
        "{denied}"
    );
    Ok(())
}

#[test]
fn packets_of_both_families_are_asked_about() -> Result<()> {
    let builder = Topology::builder().inside(Inside::Veth).ipv6();
    let world = World::start(builder, &[])?;
    let (instance, guest) = (&world.instance, world.guest(0));
    let tell = |family: Family, name: &str| -> Result<()> {
        let to = family.server(0, 9).to_string();
        let address = family.address_of(guest).to_string();
        let (report, code) = ask(
            instance,
            &["--guest", &address, "--proto", "udp", "--to", &to],
        )?;
        let packet = &report["packet"];
        ensure!(code == 0 && packet["reason"] == name, "{report}");
        let after = &packet["after"]["source"];
        ensure!(
            *after == json!({"address": family.outside_address(), "port": 40_000}),
            "{report}"
        );
        Ok(())
    };
    for family in [V4, V6] {
        tell(family, "session-started")?;
        let local = SocketAddr::new(family.address_of(guest), 40_000);
        let socket = traffic::udp_socket(&guest.namespace, local)?;
        socket.send_to(b"x", family.server(0, 9))?;
        let counted = if family == V4 { 1 } else { 2 };
        instance.until(|_| {
            instance
                .count("session-started")
                .is_ok_and(|it| it == counted)
        })?;
        tell(family, "translated")?;
    }
    // The only guest there is has an address of each.
    for (to, protocol) in [("203.0.113.1", "icmp"), ("2001:db8:2::1", "icmpv6")] {
        let (report, code) = ask(instance, &["--to", to])?;
        ensure!(
            code == 0 && report["packet"]["before"]["protocol"] == protocol,
            "{report}"
        );
    }
    let (report, code) = ask(instance, &["--to", "::1"])?;
    ensure!(
        code == PROBLEM && report["packet"]["reason"] == "unroutable-destination",
        "{report}"
    );
    let (report, _) = ask(
        instance,
        &[
            "--from",
            "[2001:db8:2::1]:5000",
            "--to",
            "[2001:db8:1::2]:8080",
        ],
    )?;
    ensure!(report["packet"]["after"].is_null(), "{report}");
    let mixed = instance.command("why")?;
    let mixed = mixed
        .args(["--guest", "10.0.0.10", "--to", "2001:db8:2::1"])
        .output()?;
    ensure!(
        mixed.status.code() == Some(1) && mixed.stderr.contains("of one family"),
        "{mixed:?}"
    );
    Ok(())
}

/// A status without the packets that hosts with IPv6 send of themselves, whenever they like: to
/// find neighbours and routers.
fn without_upkeep(mut status: Value) -> Value {
    const UPKEEP: [&str; 5] = [
        "link-local",
        "not-unicast",
        "not-ip",
        "for-the-host",
        "no-mapping",
    ];
    if let Some(reasons) = status["reasons"].as_array_mut() {
        reasons.retain(|it| it["reason"].as_str().is_none_or(|it| !UPKEEP.contains(&it)));
    }
    status
}

/// Such a guest asks by the world's own address, or by what it has for it.
#[test]
fn packets_of_guests_with_ipv6_only_to_ipv4_are_asked_about() -> Result<()> {
    let builder = Topology::builder()
        .ipv6_guests()
        .inside(Inside::Veth)
        .guests(2);
    let arguments = [
        &["--nat64", "64:ff9b:1::/96", "--deny", "203.0.113.2"][..],
        &["--filtering", "endpoint-independent"],
    ];
    let world = World::start(builder, &arguments.concat())?;
    let instance = &world.instance;
    let [first, second] = [0, 1].map(|number| V6.address_of(world.guest(number)).to_string());
    let asked = |guest: &str, to: &str, protocol: &str| -> Result<(Value, i32)> {
        let (report, code) = ask(
            instance,
            &["--guest", guest, "--proto", protocol, "--to", to],
        )?;
        Ok((report["packet"].clone(), code))
    };
    let embedded = json!({"address": "64:ff9b:1::cb00:7101", "port": 9});
    let outside = json!({"address": "198.51.100.2", "port": 40_000});
    let before = without_upkeep(instance.ask_json("status")?);
    for to in ["203.0.113.1:9", "[64:ff9b:1::cb00:7101]:9"] {
        let (packet, code) = asked(&first, to, "udp")?;
        ensure!(
            code == 0 && packet["reason"] == "session-started",
            "{packet}"
        );
        ensure!(packet["before"]["destination"] == embedded, "{packet}");
        ensure!(packet["after"]["source"] == outside, "{packet}");
        ensure!(
            packet["after"]["destination"] == json!({"address": "203.0.113.1", "port": 9}),
            "{packet}"
        );
    }
    for (to, reason) in [
        ("203.0.113.2:9", "denied-destination"),
        ("198.51.100.2:9", "unreachable-by-nat64"),
        ("127.0.0.1:9", "unroutable-destination"),
    ] {
        let (packet, code) = asked(&first, to, "udp")?;
        ensure!(code == PROBLEM && packet["reason"] == reason, "{packet}");
    }
    let (packet, _) = asked("fd00:7a70:9::9", "203.0.113.1:9", "udp")?;
    ensure!(packet["reason"] == "spoofed-source", "{packet}");
    let (packet, _) = asked(&first, "203.0.113.1", "icmp")?;
    ensure!(
        packet["before"]["protocol"] == "icmpv6" && packet["after"]["protocol"] == "icmp",
        "{packet}"
    );
    let after = without_upkeep(instance.ask_json("status")?);
    ensure!(
        before == after,
        "asking changed something: {before} became {after}"
    );

    let local = SocketAddr::new(V6.address_of(world.guest(0)), 40_000);
    let socket = traffic::udp_socket(&world.guest(0).namespace, local)?;
    let seen: SocketAddr = "[64:ff9b:1::cb00:7101]:9".parse()?;
    socket.send_to(b"x", seen)?;
    instance.until(|_| instance.count("session-started").is_ok_and(|it| it == 1))?;
    // The only guest there is.
    let arguments = ["--proto", "udp", "--to", "203.0.113.1:9"];
    let (report, _) = ask(instance, &arguments)?;
    ensure!(report["packet"]["reason"] == "translated", "{report}");
    ensure!(report["packet"]["after"]["source"] == outside, "{report}");
    ensure!(
        report["guest"]["address"] == *first && report["guest"]["sessions"] == 1,
        "{report}"
    );
    // What comes back is the guest's again, from the world and from another guest.
    let inside = json!({"address": first, "port": 40_000});
    let arguments = ["--from", "203.0.113.1:9", "--to", "198.51.100.2:40000"];
    let (report, _) = ask(instance, &[&arguments[..], &["--proto", "udp"]].concat())?;
    let packet = &report["packet"];
    ensure!(
        packet["reason"] == "translated"
            && packet["after"]["source"] == embedded
            && packet["after"]["destination"] == inside,
        "{packet}"
    );
    let (packet, _) = asked(&second, "198.51.100.2:40000", "udp")?;
    ensure!(
        packet["reason"] == "hairpin-started" && packet["after"]["destination"] == inside,
        "{packet}"
    );
    Ok(())
}

#[test]
fn packets_from_the_world_are_asked_about_too() -> Result<()> {
    let world = world(&[])?;
    let instance = &world.instance;
    let from = |to: &str| -> Result<String> {
        let (report, _) = ask(instance, &["--from", "203.0.113.1:5000", "--to", to])?;
        Ok(report["packet"].to_string())
    };
    let unasked = from("198.51.100.2:8080")?;
    ensure!(
        unasked.contains("no-mapping") || unasked.contains("unsolicited-syn"),
        "{unasked}"
    );
    instance
        .command("forward")?
        .args(["add", "tcp", "8080", "10.0.0.10:80"])
        .run()?;
    let forwarded = from("198.51.100.2:8080")?;
    ensure!(
        forwarded.contains("session-admitted") && forwarded.contains("10.0.0.10"),
        "{forwarded}"
    );
    // A mapping of a guest lets in whom the guest has sent to, and nobody else.
    let echo = UdpReflector::start(&world.topology.world, server(1, 7))?;
    let socket = world.guest_socket(0, 41_000)?;
    traffic::reflect_udp(&socket, echo.address(), b"hello")?;
    for (address, reason) in [
        ("203.0.113.1", "filtered"),
        ("203.0.113.2", "session-admitted"),
    ] {
        let end = format!("{address}:5000");
        let arguments = [
            "--proto",
            "udp",
            "--from",
            &end,
            "--to",
            "198.51.100.2:41000",
        ];
        let (report, code) = ask(instance, &arguments)?;
        ensure!(report["packet"]["reason"] == reason, "{report}");
        ensure!(
            code == if reason == "filtered" { PROBLEM } else { 0 },
            "{code}"
        );
    }
    Ok(())
}

#[test]
fn it_says_what_to_do_in_sentences_and_without_a_process() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&topology.host);
    let mut process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let host = &topology.host;
    let before = Snapshot::take(host, &instance.pins())?;
    let why = |arguments: &[&str]| -> Result<(String, Option<i32>)> {
        let output = instance.command("why")?.args(arguments).output()?;
        Ok((output.stdout + &output.stderr, output.status.code()))
    };
    let question = ["--guest", "10.0.0.10", "--to", "203.0.113.1:443"];
    let (said, code) = why(&question)?;
    ensure!(
        code == Some(0) && said.contains("is translated and sent on"),
        "{said}"
    );
    ensure!(
        said.contains("198.51.100.2:40000 > 203.0.113.1:443"),
        "{said}"
    );
    // A guest that is in no network of the instance.
    let (said, code) = why(&["--guest", "10.9.9.9", "--to", "203.0.113.1"])?;
    ensure!(
        code == Some(PROBLEM) && said.contains("spoofed-source"),
        "{said}"
    );
    ensure!(
        said.contains("what to do: set the guest's address"),
        "{said}"
    );
    // Of nobody in particular it says why nobody is known: what was dropped.
    let guest = &topology.guests[0].namespace;
    guest.ip("address add 10.9.9.9/32 dev lo")?;
    let ip = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
    traffic::ping(guest, ip, 1, &["-W", "1", "-I", "10.9.9.9"])?;
    let (said, code) = why(&[])?;
    ensure!(code == Some(0) && said.contains("tapnat trace"), "{said}");
    ensure!(said.contains("1 spoofed-source: "), "{said}");
    for wrong in ["1.1.1.1:x", "x", "1.1.1.1:99999"] {
        let (said, code) = why(&["--guest", "10.0.0.10", "--to", wrong])?;
        ensure!(code == Some(2) && said.lines().count() == 1, "{said}");
    }
    let after = Snapshot::take(host, &instance.pins())?;
    ensure!(before == after, "{:?}", before.difference(&after));
    host.sysctl("net.ipv4.conf.veth0.forwarding", "0")?;
    let (said, code) = why(&question)?;
    ensure!(
        code == Some(PROBLEM) && said.contains("forwarding-disabled"),
        "{said}"
    );
    ensure!(said.contains("what to do: set it to 1"), "{said}");
    traffic::ping(guest, ip, 1, &["-W", "1"])?;
    let (said, _) = why(&["--guest", "10.0.0.10"])?;
    ensure!(said.contains("1 forwarding-disabled: "), "{said}");
    Ok(())
}
