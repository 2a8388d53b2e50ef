//! `--firewall ask`: the host's FORWARD chain decides about each session's first packets, and again
//! when it is asked to; what it lets through then goes past it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    Namespace, packet,
    snapshot::Snapshot,
    topology::{Inside, Topology, WORLD_ADDRESSES},
    traffic::{self, TcpReflector, TcpSession, UdpReflector},
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    wires::{Wires, remote},
    world::{World, outside, server},
};

const SHORT: Duration = Duration::from_millis(700);
const ASK: &[&str] = &["--firewall", "ask"];

/// A host whose firewall drops all that it forwards, but what these rules accept and count.
fn guarded(guests: u8, arguments: &[&str], rules: &[&str]) -> Result<World> {
    let topology = Topology::builder()
        .inside(Inside::Veth)
        .guests(guests)
        .build()?;
    let host = &topology.host;
    host.exec("nft add table inet guard")?;
    host.exec(
        "nft add chain inet guard forward { type filter hook forward priority 0 ; policy drop ; }",
    )?;
    for rule in rules {
        accept(host, rule)?;
    }
    let arguments: Vec<_> = ASK.iter().chain(arguments).copied().collect();
    World::start_in(topology, &arguments)
}

fn accept(host: &Namespace, rule: &str) -> Result<()> {
    host.exec(&format!(
        "nft add rule inet guard forward {rule} counter accept"
    ))?;
    Ok(())
}

/// The packets that the rules let through.
fn accepted(host: &Namespace) -> Result<u64> {
    let said = host.exec("nft list chain inet guard forward")?;
    let mut words = said.split_whitespace();
    let mut sum = 0;
    while words.by_ref().any(|word| word == "packets") {
        sum += words.next().context("no number")?.parse::<u64>()?;
    }
    Ok(sum)
}

fn ping(namespace: &Namespace, number: usize) -> Result<bool> {
    let to = WORLD_ADDRESSES[number].into();
    Ok(traffic::ping(namespace, to, 1, &["-W", "1"])?.received == 1)
}

#[test]
fn what_the_firewall_drops_does_not_get_out() -> Result<()> {
    let world = guarded(1, &[], &[])?;
    let guest = &world.guest(0).namespace;
    let reflector = TcpReflector::start(&world.topology.world, server(0, 7))?;
    ensure!(
        traffic::connect(guest, None, reflector.address(), SHORT).is_err(),
        "reached"
    );
    ensure!(!ping(guest, 0)?, "answered");
    ensure!(world.instance.count("firewall-asked")? >= 2, "not counted");
    ensure!(world.instance.count("session-started")? == 0, "translated");
    let flows = world.instance.ask_json("flows")?;
    ensure!(flows.as_array().is_none_or(Vec::is_empty), "{flows}");
    let status = world.instance.ask("status", &[])?;
    ensure!(status.contains("firewall is asked"), "{status}");
    Ok(())
}

#[test]
fn what_the_firewall_accepts_goes_past_it_from_then_on() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let world = guarded(
            2,
            &["--attach", attach],
            &["iifname veth0", "iifname veth1"],
        )?;
        world.check_reach()?;
        let packets = accepted(&world.topology.host)?;
        // Two guests, each with a connection, a socket and a ping.
        ensure!(
            (6..=12).contains(&packets),
            "{packets} packets for six sessions"
        );
        world.check_reach()?;
        let reflector = TcpReflector::start(&world.topology.world, server(0, 9))?;
        let mut session = TcpSession::open(&world.guest(0).namespace, None, reflector.address())?;
        let before = accepted(&world.topology.host)?;
        session.exchange(&traffic::pattern(1_000_000))?;
        ensure!(
            accepted(&world.topology.host)? == before,
            "{attach}: not past it"
        );
        ensure!(
            session.seen().ip() == outside(0).ip(),
            "from {}",
            session.seen()
        );
    }
    Ok(())
}

#[test]
fn the_way_by_the_firewall_costs_one_hop_and_no_byte() -> Result<()> {
    let world = guarded(1, &[], &["iifname veth0"])?;
    let wires = Wires::open(&world)?;
    let packet = packet::udp(wires.inside(0, 40_000), remote(0, 53))
        .payload(&traffic::pattern(500))
        .ttl(9);
    let arrived = wires.out(0, &packet)?;
    ensure!(arrived.ttl() == 8, "a time to live of {}", arrived.ttl());
    ensure!(
        arrived.source().ip() == outside(0).ip(),
        "from {}",
        arrived.source()
    );
    // As it would be without a firewall, so a trace of the route shows one host.
    let expiring = packet::udp(wires.inside(0, 40_001), remote(0, 53)).ttl(1);
    wires.guests[0].send(&expiring)?;
    let told = wires.guests[0].receive()?;
    ensure!(told.icmpv4().is_some(), "{told:?}");

    // In fragments, which have no ports for the firewall to look at.
    let large =
        packet::udp(wires.inside(0, 40_002), remote(0, 53)).payload(&traffic::pattern(4000));
    wires.guests[0].send_all(&large, |packet| packet.fragments(1500))?;
    let whole = wires.world.receive_whole()?;
    ensure!(whole.source == outside(0).ip(), "from {}", whole.source);
    Ok(())
}

#[test]
fn forwards_and_other_guests_are_asked_about_too() -> Result<()> {
    let world = guarded(2, &[], &["iifname veth0", "iifname veth1 oifname uplink0"])?;
    let (host, guest) = (&world.topology.host, world.guest(1));
    let inside = world.guest_endpoint(1, 80);
    let _reflector = TcpReflector::start(&guest.namespace, inside)?;
    let words = format!("add tcp 8080 {inside}");
    world
        .instance
        .ask("forward", &words.split(' ').collect::<Vec<_>>())?;

    let from_outside =
        |patience| traffic::connect(&world.topology.world, None, outside(8080), patience);
    ensure!(from_outside(SHORT).is_err(), "let in");
    let rule = format!("iifname uplink0 ip daddr {} tcp dport 80", inside.ip());
    accept(host, &rule)?;
    drop(from_outside(PATIENCE)?);

    // From the other guest, by the outside address.
    let mut hairpin = TcpSession::open(&world.guest(0).namespace, None, outside(8080))?;
    hairpin.exchange(&traffic::pattern(10_000))?;
    ensure!(
        hairpin.seen().ip() == outside(0).ip(),
        "from {}",
        hairpin.seen()
    );
    ensure!(
        world.instance.count("hairpin-started")? == 1,
        "not a hairpin"
    );
    Ok(())
}

#[test]
fn sessions_that_the_firewall_refuses_later_end_when_it_is_asked_again() -> Result<()> {
    let first = format!("iifname veth0 ip daddr {}", WORLD_ADDRESSES[0]);
    let second = format!("iifname veth0 ip daddr {}", WORLD_ADDRESSES[1]);
    let world = guarded(1, &[], &[&first, &second])?;
    let (host, guest) = (&world.topology.host, &world.guest(0).namespace);
    let servers = [
        TcpReflector::start(&world.topology.world, server(0, 7))?,
        TcpReflector::start(&world.topology.world, server(1, 7))?,
    ];
    let datagrams = UdpReflector::start(&world.topology.world, server(0, 8))?;
    let mut kept = TcpSession::open(guest, None, servers[0].address())?;
    let mut ended = TcpSession::open(guest, None, servers[1].address())?;
    let socket = world.guest_socket(0, 0)?;
    let mapped = traffic::reflect_udp(&socket, datagrams.address(), b"before")?;
    kept.exchange(b"both")?;
    ended.exchange(b"both")?;

    host.exec("nft flush chain inet guard forward")?;
    accept(host, &first)?;
    kept.exchange(b"nobody was asked")?;
    ended.exchange(b"nobody was asked")?;
    ensure!(accepted(host)? == 0, "asked unasked");

    world.instance.ask("revalidate", &[])?;
    kept.exchange(&traffic::pattern(300_000))?;
    ensure!(
        traffic::reflect_udp(&socket, datagrams.address(), b"after")? == mapped,
        "another outside endpoint"
    );
    let packets = accepted(host)?;
    ensure!(
        (2..=20).contains(&packets),
        "{packets} packets for two sessions"
    );
    ended
        .stream()
        .set_read_timeout(Some(Duration::from_secs(1)))?;
    ensure!(ended.exchange(b"no more").is_err(), "it goes on");
    kept.exchange(b"still")?;
    Ok(())
}

#[test]
fn it_is_adopted_and_leaves_nothing_behind() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&topology.host);
    let inside = topology.inside();
    let start = |firewall| instance.start(&["--inside", &inside[0], "--firewall", firewall]);
    let host = &topology.host;
    let forwards = || host.read_sysctl("net.ipv4.conf.uplink0.forwarding");
    let reflector = TcpReflector::start(&topology.world, server(0, 9))?;
    let before = Snapshot::take(host, &instance.pins())?;

    let mut process = start("bypass")?;
    let guest = &topology.guests[0].namespace;
    let mut session = TcpSession::open(guest, None, reflector.address())?;
    session.exchange(b"nobody is asked")?;
    ensure!(forwards()?.trim() == "0", "set for nothing");
    host.exec("nft add table inet guard")?;
    host.exec("nft add chain inet guard forward { type filter hook forward priority 0 ; }")?;
    accept(host, "iifname veth0")?;
    process.signal(Signal::SIGKILL)?;

    // What began before is asked about, once.
    let mut process = start("ask")?;
    session.exchange(b"somebody is")?;
    let packets = accepted(host)?;
    ensure!((1..=3).contains(&packets), "{packets} packets");
    process.signal(Signal::SIGKILL)?;
    let _process = start("ask")?;
    session.exchange(b"that was said already")?;
    ensure!(accepted(host)? == packets, "asked again");
    ensure!(forwards()?.trim() == "1", "not set");

    instance.ask("down", &[])?;
    host.exec("nft delete table inet guard")?;
    let difference = before.difference(&Snapshot::take(host, &instance.pins())?);
    ensure!(difference.is_none(), "{difference:?}");
    Ok(())
}

#[test]
fn who_asks_no_firewall_cannot_ask_it_again() -> Result<()> {
    let world = World::start(Topology::builder().inside(Inside::Veth), &[])?;
    let output = world.instance.command("revalidate")?.output()?;
    ensure!(
        output.status.code() == Some(1) && output.stderr.contains("--firewall ask"),
        "{output:?}"
    );
    Ok(())
}
