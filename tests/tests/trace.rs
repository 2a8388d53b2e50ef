//! `tapnat trace`: what it tells is what was on the wires; what it filters; and it leaves neither a
//! trace nor a lost packet, however it ends.

use std::{
    fs::File,
    io::BufReader,
    net::{SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use pcap_file::pcapng::{Block, PcapNgReader, blocks::enhanced_packet::EnhancedPacketOption};
use serde_json::Value;
use tapnat_testbed::{
    packet::{Link, Parsed},
    process::{Command, Process},
    snapshot::Snapshot,
    topology::{Builder, Inside, Tap, Topology, Uplink},
    traffic::{self, UdpReflector},
};
use tapnat_tests::{
    family::{V4, V6},
    instance::{Instance, PATIENCE},
    world::{OUTSIDE, World, server},
};

const PORT: u16 = 7;

fn topology() -> Builder {
    Topology::builder().inside(Inside::Veth).guests(2)
}

/// A trace that has begun.
fn trace(instance: &Instance, arguments: &[&str]) -> Result<Process> {
    begin(instance.command("trace")?.args(arguments))
}

fn begin(command: Command) -> Result<Process> {
    let mut process = command.spawn()?;
    process.wait_for_error_line(PATIENCE, |line| line.starts_with("tapnat: tracing"))?;
    Ok(process)
}

/// What a trace has told when it ends, one object a packet.
fn told(process: &mut Process) -> Result<Vec<Value>> {
    let status = process.wait(PATIENCE)?;
    ensure!(status.success(), "{status}: {}", process.stderr());
    let text = process.stdout();
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
        .collect()
}

fn end(value: &Value) -> Result<SocketAddr> {
    let address = value["address"].as_str().context("no address")?.parse()?;
    let port = value["port"].as_u64().context("no port")?;
    Ok(SocketAddr::new(address, u16::try_from(port)?))
}

/// A datagram there and back.
fn reflect(socket: &UdpSocket, echo: &UdpReflector) -> Result<SocketAddr> {
    traffic::reflect_udp(socket, echo.address(), b"hello")
}

fn check_both_ways(builder: Builder, arguments: &[&str], inside: &str, uplink: &str) -> Result<()> {
    let world = World::start(builder, arguments)?;
    let echo = UdpReflector::start(&world.topology.world, server(0, PORT))?;
    let guest = world.guest_endpoint(0, 40_000);
    let socket = world.guest_socket(0, 40_000)?;
    // Steady before, so that the quick way is seen, too.
    reflect(&socket, &echo)?;
    reflect(&socket, &echo)?;
    let arguments = ["--json", "--count", "4", "--protocol", "udp"];
    let mut process = trace(&world.instance, &arguments)?;
    let other = world.guest_socket(0, 40_001)?;
    reflect(&socket, &echo)?;
    reflect(&other, &echo)?;
    let told = told(&mut process)?;
    ensure!(told.len() == 4, "{told:?}");
    let expected = [
        ("translated", inside, 40_000),
        ("translated", uplink, 40_000),
        ("session-started", inside, 40_001),
        ("translated", uplink, 40_001),
    ];
    for (line, (reason, device, port)) in told.iter().zip(expected) {
        ensure!(
            line["reason"] == reason && line["device"] == device,
            "{line}"
        );
        ensure!(
            line["outcome"] == "forward" && line["schema"] == 1,
            "{line}"
        );
        let (before, after) = (&line["before"], &line["after"]);
        let mut guest = guest;
        guest.set_port(port);
        let outside = SocketAddr::new(OUTSIDE, port);
        let (from, to) = (end(&before["source"])?, end(&before["destination"])?);
        let (left_from, left_to) = (end(&after["source"])?, end(&after["destination"])?);
        if device == inside {
            ensure!((from, to) == (guest, echo.address()), "{line}");
            ensure!((left_from, left_to) == (outside, echo.address()), "{line}");
        } else {
            ensure!((from, to) == (echo.address(), outside), "{line}");
            ensure!((left_from, left_to) == (echo.address(), guest), "{line}");
        }
        let hops = |side: &Value| side["time_to_live"].as_u64();
        ensure!(hops(before) == hops(after).map(|it| it + 1), "{line}");
    }
    Ok(())
}

#[test]
fn packets_are_told_as_they_come_and_as_they_leave() -> Result<()> {
    check_both_ways(topology(), &[], "veth0", "uplink0")
}

#[test]
fn both_families_are_told_and_filtered() -> Result<()> {
    let world = World::start(topology().ipv6(), &[])?;
    let guest = world.guest(0);
    let mut links = Vec::new();
    for family in [V4, V6] {
        let echo = UdpReflector::start(&world.topology.world, family.server(0, PORT))?;
        let local = SocketAddr::new(family.address_of(guest), 40_000);
        links.push((echo, traffic::udp_socket(&guest.namespace, local)?));
    }
    for (family, (_, socket)) in [V4, V6].into_iter().zip(&links) {
        let inside = family.address_of(guest).to_string();
        let filter = [
            "--json", "--count", "2", "--guest", &inside, "--port", "40000",
        ];
        let mut process = trace(&world.instance, &filter)?;
        // The other family's must not be among what is told.
        for (echo, socket) in &links {
            reflect(socket, echo)?;
        }
        let told = told(&mut process)?;
        let [out, back] = told.as_slice() else {
            anyhow::bail!("{told:?}")
        };
        let (local, server) = (socket.local_addr()?, family.server(0, PORT));
        let outside = family.outside(40_000);
        for (line, from, to) in [(out, local, server), (back, server, outside)] {
            let before = &line["before"];
            ensure!(before["protocol"] == "udp", "{line}");
            ensure!(
                end(&before["source"])? == from && end(&before["destination"])? == to,
                "{line}"
            );
        }
        ensure!(end(&out["after"]["source"])? == outside, "{out}");
        ensure!(end(&back["after"]["destination"])? == local, "{back}");
    }
    Ok(())
}

#[test]
fn clsact_is_traced_like_tcx() -> Result<()> {
    check_both_ways(topology(), &["--attach", "clsact"], "veth0", "uplink0")
}

#[test]
fn devices_without_ethernet_are_traced_too() -> Result<()> {
    let builder = Topology::builder().inside(Inside::Tun).uplink(Uplink::Tun);
    check_both_ways(builder, &[], "tun0", "uplink0")
}

#[test]
fn filters_let_through_what_they_say() -> Result<()> {
    let world = World::start(topology(), &["--deny", "203.0.113.2"])?;
    let echo = UdpReflector::start(&world.topology.world, server(0, PORT))?;
    let sockets = [
        world.guest_socket(0, 41_000)?,
        world.guest_socket(1, 42_000)?,
    ];
    let filters: [&[&str]; 6] = [
        &["--guest", "10.0.1.10", "--protocol", "udp"],
        &["--port", "42000"],
        &["--device", "veth1", "--protocol", "17"],
        &["--reason", "denied-destination"],
        &["--remote", "203.0.113.2"],
        &[
            "--protocol",
            "udp",
            "--reason",
            "translated",
            "--reason",
            "session-started",
        ],
    ];
    let mut traces = Vec::new();
    for filter in filters {
        traces.push(trace(&world.instance, &[&["--json"], filter].concat())?);
    }
    for socket in &sockets {
        reflect(socket, &echo)?;
        socket.send_to(b"denied", server(1, PORT))?;
    }
    // Behind everything else; the traces end when this has come by.
    traffic::ping(&world.guest(0).namespace, server(0, 0).ip(), 1, &[])?;
    thread::sleep(Duration::from_millis(200));
    let mut all = Vec::new();
    for process in &mut traces {
        process.signal(Signal::SIGINT)?;
        all.push(told(process)?);
    }
    let is_of_second =
        |line: &Value| line.to_string().contains("10.0.1.10") || line.to_string().contains("42000");
    for (told, count) in all[..3].iter().zip([3, 3, 2]) {
        ensure!(
            told.len() == count && told.iter().all(is_of_second),
            "{told:?}"
        );
    }
    for told in &all[3..5] {
        ensure!(told.len() == 2, "{told:?}");
        for line in told {
            ensure!(
                line["reason"] == "denied-destination" && line["outcome"] == "refuse",
                "{line}"
            );
            // What left is the error to the guest.
            ensure!(line["after"]["protocol"] == "icmp", "{line}");
        }
    }
    ensure!(all[5].len() == 4, "{:?}", all[5]);
    Ok(())
}

#[test]
fn a_file_for_wireshark_has_both_sides() -> Result<()> {
    let world = World::start(topology(), &[])?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("trace.pcapng");
    let path = path.to_str().context("an odd directory")?;
    let echo = UdpReflector::start(&world.topology.world, server(0, PORT))?;
    let socket = world.guest_socket(0, 40_000)?;
    let arguments = ["--pcap", path, "--count", "2", "--protocol", "udp"];
    let mut process = trace(&world.instance, &arguments)?;
    let payload = traffic::pattern(1000);
    traffic::reflect_udp(&socket, echo.address(), &payload)?;
    ensure!(told(&mut process)?.is_empty(), "it printed");
    let mut reader = PcapNgReader::new(BufReader::new(File::open(path)?))?;
    let mut packets = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block? {
            packets.push(packet.into_owned());
        }
    }
    ensure!(
        packets.len() == 4 && reader.interfaces().len() == 4,
        "{packets:?}"
    );
    let guest = world.guest_endpoint(0, 40_000);
    let outside = SocketAddr::new(OUTSIDE, 40_000);
    let expected = [
        (guest, echo.address(), "forward session-started"),
        (outside, echo.address(), "forward session-started"),
        (echo.address(), outside, "forward translated"),
        (echo.address(), guest, "forward translated"),
    ];
    for (packet, (source, destination, comment)) in packets.iter().zip(expected) {
        let parsed = Parsed::new(Link::Ethernet, &packet.data)?;
        ensure!(
            (parsed.source(), parsed.destination()) == (source, destination),
            "{parsed:?}"
        );
        ensure!(
            parsed.payload.len() == packet.original_len as usize - 42,
            "not all of it is there: {parsed:?}"
        );
        ensure!(
            packet.options == [EnhancedPacketOption::Comment(comment.into())],
            "{:?}",
            packet.options
        );
    }
    // Programs that are not ours read it, too, also while it is written.
    let line = format!(
        "\"$TAPNAT_BIN\" trace --instance {} --pcap - --protocol udp | tcpdump -nlr -",
        world.instance.name()
    );
    let mut reader = begin(world.topology.host.command("bash").args(["-c", &line]))?;
    traffic::reflect_udp(&socket, echo.address(), &payload)?;
    reader.wait_for_line(PATIENCE, |line| {
        line.contains("203.0.113.1.7 > 10.0.0.10.40000")
    })?;
    drop(reader);
    let read = Command::new("tcpdump").args(["-nr", path]).run()?;
    ensure!(
        read.lines().count() == 4 && read.contains("10.0.0.10.40000 > 203.0.113.1.7"),
        "{read}"
    );
    Ok(())
}

#[test]
fn nothing_is_left_of_a_trace_and_no_packet_is_lost() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let world = World::start(topology(), &["--attach", attach])?;
        let (host, pinned) = (&world.topology.host, world.instance.pins());
        let before = Snapshot::take(host, &pinned)?;
        let target = server(0, 0).ip();
        let guest = &world.guest(0).namespace;
        let interval = Duration::from_millis(2);
        let mut pings = traffic::start_pings(guest, target, 1500, interval)?;
        let mut ended = 0;
        while pings.is_running() {
            let mut process = trace(&world.instance, &[])?;
            thread::sleep(Duration::from_millis(100));
            let signal = if ended % 2 == 0 {
                Signal::SIGKILL
            } else {
                Signal::SIGTERM
            };
            process.signal(signal)?;
            process.wait(PATIENCE)?;
            ended += 1;
        }
        let lost = pings.lost()?;
        ensure!(ended > 1 && lost.is_empty(), "{attach}: {ended}, {lost:?}");
        // In clsact the last one that was killed would wait for the next one.
        trace(&world.instance, &[])?.terminate(PATIENCE)?;
        let after = Snapshot::take(host, &pinned)?;
        if let Some(difference) = before.difference(&after) {
            anyhow::bail!("{attach}: something is left:\n{difference}");
        }
    }
    Ok(())
}

#[test]
fn an_instance_ends_cleanly_under_a_killed_trace() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let topology = topology().build()?;
        let instance = Instance::new(&topology.host);
        let before = Snapshot::take(&topology.host, &instance.pins())?;
        let mut process = instance.start(&["--inside", "veth0=10.0.0.1/24", "--attach", attach])?;
        trace(&instance, &[])?.signal(Signal::SIGKILL)?;
        process.terminate(PATIENCE)?;
        let after = Snapshot::take(&topology.host, &instance.pins())?;
        if let Some(difference) = before.difference(&after) {
            anyhow::bail!("{attach}: the host is not as it was:\n{difference}");
        }
    }
    Ok(())
}

#[test]
fn a_trace_goes_on_when_the_instance_starts_again() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let topology = topology().build()?;
        let instance = Instance::new(&topology.host);
        let arguments = ["--inside", "veth0=10.0.0.1/24", "--attach", attach];
        let mut first = instance.start(&arguments)?;
        let mut process = trace(&instance, &["--json", "--protocol", "udp"])?;
        let echo = UdpReflector::start(&topology.world, server(0, PORT))?;
        let guest = &topology.guests[0];
        let local = SocketAddr::new(guest.address.into(), 0);
        let reach = || -> Result<()> {
            // New flows, which need the programs that others go on to.
            for _ in 0..20 {
                let socket = traffic::udp_socket(&guest.namespace, local)?;
                reflect(&socket, &echo)?;
                thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        };
        first.signal(Signal::SIGKILL)?;
        first.wait(PATIENCE)?;
        let second = instance.start(&arguments)?;
        reach().with_context(|| format!("{attach}: {}", second.stderr()))?;
        process.signal(Signal::SIGINT)?;
        let told = told(&mut process)?;
        ensure!(told.len() == 40, "{attach}: {} were told", told.len());
    }
    Ok(())
}

#[test]
fn a_guest_on_a_tap_with_offloads_is_traced() -> Result<()> {
    let world = World::start(Topology::builder().inside(Inside::Tap(Tap::default())), &[])?;
    let mut process = trace(&world.instance, &["--protocol", "tcp", "--count", "20"])?;
    world.check_reach()?;
    let status = process.wait(PATIENCE)?;
    let said = process.stdout();
    ensure!(status.success() && said.contains("tap0 forward"), "{said}");
    ensure!(said.lines().all(|line| line.len() <= 100), "{said}");
    Ok(())
}
