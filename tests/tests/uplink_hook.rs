//! XDP at the uplink: what goes by the driver arrives byte for byte as it would have by TC, everything
//! else goes by TC as before, and nothing of it stays behind.
//!
//! A packet that goes by the driver is in no capture on the host's end of the wire, as there is no skb
//! of it; one that goes by TC is.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    TestRun as _, TestRunOptions,
    maps::{Map, MapData, xdp::DevMapHash},
    programs::{
        Xdp,
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};
use aya_obj::programs::XdpAttachType;
use etherparse::IpNumber;
use nix::sys::signal::Signal;
use proptest::{prelude::*, test_runner::Config};
use tapnat_common::abi::maps;
use tapnat_testbed::{
    capture::{Capture, Direction},
    packet::{self, Builder},
    snapshot::Snapshot,
    topology::{GUEST_DEVICE, Inside, Tap, Topology, UPLINK, Uplink},
    traffic::{self, FrameSender},
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    wires::{Wires, mac, remote},
    world::World,
};

const XDP: [&str; 2] = ["--uplink-hook", "xdp"];
const LOCAL: u16 = 40_000;
/// For experiments (RFC 3692).
const MARKER: IpNumber = IpNumber(253);
/// A session's first packets take the long way.
const TRIES: u32 = 60;

fn tap() -> tapnat_testbed::topology::Builder {
    Topology::builder().inside(Inside::Tap(Tap::default()))
}

/// A world with XDP at its uplink, its wires, and what the host's stack sees of the uplink.
struct Early {
    wires: Wires,
    capture: Capture,
    world: World,
}

impl Early {
    fn start(builder: tapnat_testbed::topology::Builder, arguments: &[&str]) -> Result<Self> {
        let topology = builder.build()?;
        for guest in &topology.guests {
            if guest.cable().is_none() {
                // Only then does the host's end of a veth take frames.
                let line = format!("ethtool -K {GUEST_DEVICE} gro on");
                guest.namespace.exec(&line)?;
            }
        }
        let world = World::start_in(topology, &[&XDP, arguments].concat())?;
        Ok(Self {
            wires: Wires::open(&world)?,
            capture: Capture::start(&world.topology.host, UPLINK)?,
            world,
        })
    }

    /// Sends a packet as the world, checks what arrives at the guest, and returns whether it went by
    /// the driver.
    fn back(&self, sent: &Builder, expected: &Builder, identification: u32) -> Result<bool> {
        let sent = sent.clone().identification(identification);
        self.wires.world.send(&sent)?;
        let arrived = self.wires.guests[0].receive_captured()?;
        let expected = expected.clone().identification(identification).ttl(63);
        let expected = expected.build();
        ensure!(
            arrived.ip().starts_with(&expected),
            "arrived: {:02x?}\nexpected: {expected:02x?}",
            arrived.ip()
        );
        Ok(!self.has_seen(identification)?)
    }

    /// Whether the host's stack has seen the world's packet with this identification. What was sent
    /// after it, and is never the driver's, is waited for.
    fn has_seen(&self, identification: u32) -> Result<bool> {
        let marker = packet::other(remote(0, 0).ip(), remote(1, 0).ip(), MARKER);
        self.wires
            .world
            .send(&marker.identification(identification))?;
        let mut seen = false;
        self.capture.wait_for(PATIENCE, |captured| {
            let Some(header) = captured
                .parse()
                .ok()
                .filter(|_| captured.direction == Direction::In)
                .and_then(|parsed| parsed.ipv4().cloned())
            else {
                return false;
            };
            let is_it = u32::from(header.identification) == identification;
            let is_marker = header.protocol == MARKER;
            seen |= is_it && !is_marker;
            is_it && is_marker
        })?;
        Ok(seen)
    }

    /// Sends such packets until one goes by the driver.
    fn until_early(&self, sent: &Builder, expected: &Builder, first: u32) -> Result<()> {
        for identification in first..first + TRIES {
            if self.back(sent, expected, identification)? {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("none of {TRIES} packets went by the driver")
    }

    /// Opens a UDP session and returns its outside endpoint, when its packets go by the driver.
    fn open(&self, port: u16) -> Result<SocketAddr> {
        let outside = self.wires.map_udp(0, port, remote(0, 53))?;
        let inside = self.wires.inside(0, port);
        let from = remote(0, 53);
        self.until_early(&packet::udp(from, outside), &packet::udp(from, inside), 100)?;
        Ok(outside)
    }
}

fn check_all(early: &Early) -> Result<()> {
    let from = remote(0, 53);
    let outside = early.open(LOCAL)?;
    let inside = early.wires.inside(0, LOCAL);
    for (number, length) in (1000..)
        .step_by(TRIES as usize)
        .zip([0, 1, 2, 63, 64, 513, 1472])
    {
        for (number, kind) in [
            (number, packet::udp as fn(_, _) -> _),
            (number + 10_000, |from, to| {
                packet::udp(from, to).without_udp_checksum()
            }),
        ] {
            let with = |to| kind(from, to).payload(&traffic::pattern(length));
            early
                .until_early(&with(outside), &with(inside), number)
                .with_context(|| format!("{length} bytes of UDP"))?;
        }
    }

    // TCP: the handshake, data and the end go by TC, and bare acknowledgements do not.
    let syn = packet::tcp(inside, from).with_tcp(|header| header.syn = true);
    let outside = early.wires.out(0, &syn)?.source();
    let from_world = |to, change: fn(&mut etherparse::TcpHeader)| {
        packet::tcp(from, to).with_tcp(|header| {
            header.ack = true;
            header.window_size = 500;
            change(header);
        })
    };
    let both = |change| (from_world(outside, change), from_world(inside, change));
    let (sent, expected) = both(|header| header.syn = true);
    ensure!(!early.back(&sent, &expected, 3000)?, "a SYN went early");
    let ack = packet::tcp(inside, from).with_tcp(|header| header.ack = true);
    early.wires.out(0, &ack)?;
    let (sent, expected) = both(|_| {});
    early.until_early(&sent, &expected, 3100)?;
    let data = |packet: &Builder| packet.clone().payload(b"data");
    ensure!(
        !early.back(&data(&sent), &data(&expected), 3200)?,
        "data of TCP went early"
    );
    let (sent, expected) = both(|header| header.fin = true);
    ensure!(!early.back(&sent, &expected, 3300)?, "a FIN went early");

    // What is not plain.
    let outside = early.wires.map_udp(0, LOCAL + 1, from)?;
    let with_options = |to| packet::udp(from, to).options(&[148, 4, 0, 0]);
    let inside = early.wires.inside(0, LOCAL + 1);
    let went = early.back(&with_options(outside), &with_options(inside), 4000)?;
    ensure!(!went, "options went early");
    early.wires.nothing_arrives()?;
    // Real stacks, whose checksums are partial on veths.
    early.world.check_reach()
}

#[test]
fn packets_for_guests_on_taps_go_by_the_driver() -> Result<()> {
    check_all(&Early::start(tap(), &[])?)
}

#[test]
fn packets_for_guests_on_veths_go_by_the_driver() -> Result<()> {
    check_all(&Early::start(
        Topology::builder().inside(Inside::Veth),
        &["--attach", "clsact"],
    )?)
}

#[test]
fn what_goes_by_the_driver_is_counted() -> Result<()> {
    let early = Early::start(tap(), &["--count"])?;
    let outside = early.open(LOCAL)?;
    let translated = || early.world.instance.count("translated");
    let before = translated()?;
    let (from, inside) = (remote(0, 53), early.wires.inside(0, LOCAL));
    let (sent, expected) = (packet::udp(from, outside), packet::udp(from, inside));
    let mut went_early = 0;
    for number in 1000..1000 + TRIES {
        went_early += u32::from(early.back(&sent, &expected, number)?);
    }
    ensure!(went_early > 0, "none went by the driver");
    let after = translated()?;
    ensure!(after == before + u64::from(TRIES), "{after} after {before}");
    Ok(())
}

/// Tells a bridge's guests and those on veths that take no frames from others.
#[test]
fn guests_whose_devices_take_no_frames_get_them_by_tc() -> Result<()> {
    for inside in [Inside::Bridge, Inside::Veth, Inside::Tun] {
        let topology = Topology::builder().inside(inside).build()?;
        if inside == Inside::Veth {
            let guest = &topology.guests[0].namespace;
            guest.exec(&format!("ethtool -K {GUEST_DEVICE} gro off"))?;
        }
        let world = World::start_in(topology, &XDP)?;
        let wires = Wires::open(&world)?;
        let outside = wires.map_udp(0, LOCAL, remote(0, 53))?;
        for _ in 0..20 {
            wires.answer_udp(remote(0, 53), outside, 0, LOCAL)?;
            thread::sleep(Duration::from_millis(50));
        }
        world.check_reach()?;
    }
    Ok(())
}

#[test]
fn a_device_that_no_longer_takes_frames_gets_them_by_tc() -> Result<()> {
    let early = Early::start(Topology::builder().inside(Inside::Veth), &[])?;
    let outside = early.open(LOCAL)?;
    let guest = &early.world.guest(0).namespace;
    guest.exec(&format!("ethtool -K {GUEST_DEVICE} gro off"))?;
    let (from, inside) = (remote(0, 53), early.wires.inside(0, LOCAL));
    let (sent, expected) = (packet::udp(from, outside), packet::udp(from, inside));
    // Until the daemon has heard of it packets are lost.
    let path = early
        .world
        .instance
        .pins()
        .join("maps")
        .join(maps::XDP_DEVICES);
    let devices: DevMapHash<_> = Map::from_map_data(MapData::from_pin(path)?)?.try_into()?;
    let start = Instant::now();
    while devices.keys().next().is_some() {
        ensure!(
            start.elapsed() < PATIENCE,
            "the device is still redirected to"
        );
        thread::sleep(Duration::from_millis(20));
    }
    for number in 1000..1010 {
        ensure!(!early.back(&sent, &expected, number)?, "one went early");
    }
    Ok(())
}

#[test]
fn frames_in_several_buffers_go_by_tc() -> Result<()> {
    let early = Early::start(tap().inside_mtu(9000).uplink_mtu(9000), &[])?;
    let outside = early.open(LOCAL)?;
    let (from, inside) = (remote(0, 53), early.wires.inside(0, LOCAL));
    for (number, length) in (1000..).zip([3000, 3600, 5000, 8900]) {
        let with = |to| packet::udp(from, to).payload(&traffic::pattern(length));
        early
            .back(&with(outside), &with(inside), number)
            .with_context(|| format!("{length} bytes"))?;
    }
    Ok(())
}

#[test]
fn tagged_frames_are_not_for_guests() -> Result<()> {
    let early = Early::start(tap(), &[])?;
    let outside = early.open(LOCAL)?;
    let Topology { host, world, .. } = &early.world.topology;
    let device = early.world.topology.world_device();
    let own = mac(world, device)?.context("no Ethernet")?;
    let peer = mac(host, UPLINK)?.context("no Ethernet")?;
    let plain = packet::udp(remote(0, 53), outside)
        .ethernet(own, peer)
        .build();
    let sender = FrameSender::open(world, device)?;
    for tag in [&[0x81, 0, 0, 5][..], &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6]] {
        sender.send(&[&plain[..12], tag, &plain[12..]].concat())?;
    }
    early.wires.nothing_arrives()
}

/// How `ip` shows an XDP program on the uplink.
fn is_attached(topology: &Topology) -> Result<bool> {
    let shown = topology
        .host
        .ip(&format!("-details link show dev {UPLINK}"))?;
    Ok(shown.contains("prog/xdp"))
}

fn hook(world: &World) -> Result<(String, String)> {
    let status = world.instance.ask_json("status")?;
    let text = |key: &str| {
        let text = status["uplink_hook"][key].as_str();
        Ok::<_, anyhow::Error>(text.context("no text")?.to_owned())
    };
    Ok((text("hook")?, text("reason")?))
}

#[test]
fn it_is_adopted_and_changed_and_goes_at_the_end() -> Result<()> {
    let topology = tap().build()?;
    let instance = Instance::new(&topology.host);
    let inside = topology.inside();
    let start = |hook: &str| {
        let arguments = ["--inside", &inside[0], "--uplink-hook", hook];
        instance.start(&arguments)
    };
    let before = Snapshot::take(&topology.host, &instance.pins())?;
    ensure!(!is_attached(&topology)?, "there is a program already");
    let mut process = start("xdp")?;
    let link = instance.pins().join("links").join(format!(
        "xdp-{}",
        topology.host.device_index(UPLINK)?.context("no uplink")?
    ));
    let number = || Ok::<_, anyhow::Error>(FdLink::from(PinnedLink::from_pin(&link)?).info()?.id());
    let first = number()?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    ensure!(is_attached(&topology)?, "it went with its process");

    // The same link with another program.
    let mut process = start("xdp")?;
    ensure!(number()? == first, "it was attached anew");
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;

    let mut process = start("tc")?;
    ensure!(!is_attached(&topology)?, "it stays though tc is asked for");
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;

    let mut process = start("xdp")?;
    ensure!(is_attached(&topology)?, "it is not there again");
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    instance.ask("down", &[])?;
    let after = Snapshot::take(&topology.host, &instance.pins())?;
    if let Some(difference) = before.difference(&after) {
        bail!("the host is not as it was:\n{difference}");
    }
    ensure!(!is_attached(&topology)?, "it is still there");
    Ok(())
}

#[test]
fn status_says_which_hook_and_why() -> Result<()> {
    let mut world = World::start(tap(), &[])?;
    let (hook_now, reason) = hook(&world)?;
    ensure!(
        hook_now == "tc" && reason.contains("--uplink-hook xdp"),
        "{reason}"
    );
    ensure!(!is_attached(&world.topology)?, "auto attached it");
    world.restart(&["--uplink-hook", "tc"])?;
    ensure!(hook(&world)? == ("tc".to_owned(), "as asked for".to_owned()));
    world.restart(&XDP)?;
    ensure!(hook(&world)?.0 == "xdp");
    let text = world.instance.ask("status", &[])?;
    ensure!(text.contains("uplink hook: xdp (as asked for"), "{text}");
    let world = World::start(tap().uplink(Uplink::Tun), &[])?;
    let (hook, reason) = hook(&world)?;
    ensure!(hook == "tc" && reason.contains("cannot"), "{reason}");
    Ok(())
}

/// Starts an instance that must refuse, and returns what it says.
fn refusal(topology: &Topology) -> Result<String> {
    let instance = Instance::new(&topology.host);
    let before = Snapshot::take(&topology.host, &instance.pins())?;
    let inside = topology.inside();
    let output = instance
        .command("run")?
        .args(["--inside", &inside[0]])
        .args(XDP)
        .output()?;
    ensure!(!output.status.success(), "it started");
    let after = Snapshot::take(&topology.host, &instance.pins())?;
    ensure!(before.difference(&after).is_none(), "it left something");
    ensure!(output.stderr.lines().count() == 1, "{}", output.stderr);
    Ok(output.stderr)
}

#[test]
fn uplinks_that_cannot_are_refused() -> Result<()> {
    let said = refusal(&tap().uplink(Uplink::Tun).build()?)?;
    ensure!(said.contains("needs an uplink with Ethernet"), "{said}");

    let topology = tap().build()?;
    let host = &topology.host;
    for line in [
        "link add br1 type bridge",
        "link set br1 up",
        "address add 198.51.100.99/32 dev br1",
        "route replace default dev br1",
    ] {
        host.ip(line)?;
    }
    let said = refusal(&topology)?;
    ensure!(
        said.contains("br1 (bridge) cannot run XDP") && said.contains("--uplink-hook tc"),
        "{said}"
    );
    Ok(())
}

/// `XDP_PASS` and `XDP_REDIRECT`.
const PASS: u32 = 2;
const REDIRECT: u32 = 4;

/// The program that is attached, run by hand.
struct Runs {
    early: Early,
    program: Xdp,
}

impl Runs {
    fn new() -> Result<Self> {
        let early = Early::start(tap(), &[])?;
        let topology = &early.world.topology;
        let index = topology.host.device_index(UPLINK)?.context("no uplink")?;
        let pins = early.world.instance.pins();
        let link = PinnedLink::from_pin(pins.join("links").join(format!("xdp-{index}")))?;
        let id = FdLink::from(link).info()?.program_id();
        let info = loaded_programs()
            .filter_map(Result::ok)
            .find(|info| info.id() == id)
            .context("the attached program is not loaded")?;
        let name = info.name_as_str().unwrap_or_default().to_owned();
        let program = Xdp::from_program_info(info, name.into(), XdpAttachType::Interface)?;
        Ok(Self { early, program })
    }

    fn run(&self, frame: &[u8]) -> Result<(u32, Vec<u8>)> {
        let mut out = vec![0; 4096];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        };
        let result = self.program.test_run(options)?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }
}

#[test]
fn the_program_translates_plain_packets_of_sessions_and_leaves_the_rest() -> Result<()> {
    const ADDRESSES: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let runs = Runs::new()?;
    let outside = runs.early.open(LOCAL)?;
    let inside = runs.early.wires.inside(0, LOCAL);
    let from = remote(0, 53);
    let framed = |packet: Builder| packet.ethernet(ADDRESSES.0, ADDRESSES.1);
    for packet in [
        packet::udp as fn(_, _) -> Builder,
        |from, to| packet::udp(from, to).without_udp_checksum(),
        |from, to| packet::udp(from, to).payload(&[0xff; 1400]),
        |from, to| packet::udp(from, to).dont_fragment().precedence(1),
    ] {
        let frame = framed(packet(from, outside)).build();
        let (mut verdict, mut out) = runs.run(&frame)?;
        for number in (200..).step_by(TRIES as usize).take(3) {
            if verdict == REDIRECT {
                break;
            }
            // It was due for a closer look.
            let plain = |to| packet::udp(from, to);
            runs.early
                .until_early(&plain(outside), &plain(inside), number)?;
            (verdict, out) = runs.run(&frame)?;
        }
        let expected = framed(packet(from, inside).ttl(63)).build();
        ensure!(verdict == REDIRECT, "verdict {verdict}");
        ensure!(out[14..] == expected[14..], "{out:02x?}\n{expected:02x?}");
        ensure!(
            out[..12] != expected[..12],
            "the link addresses are the old ones"
        );
    }
    let other = SocketAddr::new(outside.ip(), outside.port() + 2);
    let plain = || packet::udp(from, outside);
    let tagged = |packet: Builder| {
        let frame = framed(packet).build();
        [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat()
    };
    for (what, frame) in [
        ("of no session", framed(packet::udp(from, other)).build()),
        (
            "of no session",
            framed(packet::udp(remote(1, 53), outside)).build(),
        ),
        (
            "another protocol's",
            framed(packet::tcp(from, outside)).build(),
        ),
        (
            "ICMP",
            framed(packet::echo_reply(
                from.ip(),
                outside.ip(),
                outside.port(),
                1,
            ))
            .build(),
        ),
        ("at its last hop", framed(plain().ttl(1)).build()),
        ("with options", framed(plain().options(&[1; 4])).build()),
        ("too long", framed(plain().payload(&[0; 1473])).build()),
        (
            "with a partial checksum",
            framed(plain().partial_checksum()).build(),
        ),
        (
            "a fragment",
            framed(plain().payload(&[0; 64])).fragment(0..32),
        ),
        (
            "a later fragment",
            framed(plain().payload(&[0; 64])).fragment(32..72),
        ),
        ("tagged", tagged(plain())),
        (
            "cut",
            framed(plain().payload(&[0; 64])).build()[..80].to_vec(),
        ),
        ("cut in its header", framed(plain()).build()[..40].to_vec()),
    ] {
        let (verdict, out) = runs.run(&frame)?;
        ensure!(
            verdict == PASS && out == frame,
            "{what}: {verdict}, {out:02x?}"
        );
    }
    Ok(())
}

#[test]
fn arbitrary_frames_pass_as_they_are_or_leave() -> Result<()> {
    let runs = Runs::new()?;
    let outside = runs.early.open(LOCAL)?;
    let plain = packet::udp(remote(0, 53), outside)
        .payload(&[0; 40])
        .ethernet([2; 6], [4; 6])
        .build();
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let config = Config {
        cases: 2000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let frames = (changes, 14..plain.len() + 1);
    runner
        .run(&frames, |(changes, length)| {
            let mut frame = plain.clone();
            frame.truncate(length);
            for (place, byte) in changes {
                let place = place.index(frame.len());
                frame[place] = byte;
            }
            let (verdict, out) = runs
                .run(&frame)
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
            prop_assert!(verdict == REDIRECT || (verdict == PASS && out == frame));
            prop_assert_eq!(out.len(), frame.len());
            Ok(())
        })
        .map_err(|error| anyhow::anyhow!("{error}"))
}
