//! What `tapnat flows` picks, sorts, adds up and watches, of real sessions and of a million.

use std::{
    net::{IpAddr, UdpSocket},
    num::NonZeroU32,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use nix::sys::{signal::Signal, time::TimeValLike as _};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;
use tapnat_common::{
    abi::{Arrival, FlowKey, NextHop, Session, maps, session_flags},
    net::{Be16, Be32, protocol},
    time::Instant,
};
use tapnat_testbed::{
    process::Output,
    terminal::Terminal,
    topology::{HOST_ADDRESS, Inside, Topology, WORLD_ADDRESSES},
    traffic::{self, UdpReflector, reflect_udp},
};
use tapnat_tests::{
    instance::PATIENCE,
    world::{World, server},
};

const MILLION: u32 = 1_000_000;

fn world(arguments: &[&str]) -> Result<World> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2);
    World::start(topology, arguments)
}

/// Of both guests one session to either server, and a ping of the first guest.
struct Talk {
    world: World,
    /// As they are in the world, one server after the other of each guest.
    sockets: Vec<UdpSocket>,
    _servers: Vec<UdpReflector>,
}

/// The sizes of the datagrams, in the order of the sockets.
const SIZES: [usize; 4] = [100, 700, 1000, 400];
/// The number that a reflected datagram begins with, and the headers of UDP and IP.
const OVERHEAD: u64 = 8 + 8 + 20;

fn talk(arguments: &[&str]) -> Result<Talk> {
    let world = world(arguments)?;
    let servers = (0..2)
        .map(|number| {
            UdpReflector::start(
                &world.topology.world,
                server(number, 53 + number16(number)?),
            )
        })
        .collect::<Result<Vec<_>>>()?;
    let mut sockets = Vec::new();
    for (place, size) in SIZES.into_iter().enumerate() {
        let socket = world.guest_socket(place / 2, 0)?;
        let server = servers.get(place % 2).context("no server")?;
        reflect_udp(&socket, server.address(), &traffic::pattern(size))?;
        sockets.push(socket);
    }
    let ping = traffic::ping(&world.guest(0).namespace, server(0, 0).ip(), 1, &[])?;
    ensure!(ping.received == 1, "{}", ping.output);
    Ok(Talk {
        world,
        sockets,
        _servers: servers,
    })
}

fn number16(number: usize) -> Result<u16> {
    Ok(u16::try_from(number)?)
}

impl Talk {
    /// What `tapnat flows --json` prints with these arguments.
    fn flows(&self, arguments: &str) -> Result<Vec<Value>> {
        let arguments = ["--json"].into_iter().chain(arguments.split_whitespace());
        let arguments: Vec<_> = arguments.collect();
        let text = self.world.instance.ask("flows", &arguments)?;
        serde_json::from_str(&text).with_context(|| format!("{arguments:?}: {text}"))
    }

    fn table(&self, arguments: &str) -> Result<String> {
        let arguments: Vec<_> = arguments.split_whitespace().collect();
        self.world.instance.ask("flows", &arguments)
    }
}

#[test]
fn conditions_pick_sessions() -> Result<()> {
    let talk = talk(&["--count"])?;
    let port = talk.sockets[2].local_addr()?.port();
    for (arguments, count) in [
        ("", 5),
        ("--guest 10.0.0.10", 3),
        ("--guest 10.0.0.0/16", 5),
        ("--guest 10.0.0.10,10.0.1.10 --protocol udp", 4),
        ("--guest 192.0.2.0/24", 0),
        ("--protocol icmp", 1),
        ("--protocol 17", 4),
        ("--protocol tcp,47", 0),
        ("--state two-way", 5),
        ("--state one-way,established", 0),
        ("--port 53", 2),
        ("--port 53-54", 4),
        ("--port 54 --guest 10.0.1.10", 1),
        ("--older 1h", 0),
        ("--newer 1h", 5),
        ("--limit 2", 2),
    ] {
        let flows = talk.flows(arguments)?;
        ensure!(flows.len() == count, "{arguments}: {flows:?}");
    }
    let remote = talk.flows(&format!("--remote {}", WORLD_ADDRESSES[1]))?;
    ensure!(remote.len() == 2, "{remote:?}");
    let inside = talk.flows(&format!("--port {port}"))?;
    ensure!(
        inside.iter().any(|it| it["inside"]["port"] == port),
        "{inside:?}"
    );
    Ok(())
}

#[test]
fn sessions_come_in_order_and_sums_with_the_busiest_first() -> Result<()> {
    let talk = talk(&["--count"])?;
    let bytes = |flows: &[Value]| -> Vec<_> {
        flows
            .iter()
            .map(|it| it["bytes"]["outbound"].as_u64())
            .collect()
    };
    let sent = |size: usize| Some(size as u64 + OVERHEAD);
    let flows = talk.flows("--sort bytes --protocol udp")?;
    ensure!(
        bytes(&flows) == [sent(1000), sent(700), sent(400), sent(100)],
        "{flows:?}"
    );
    let flows = talk.flows("--sort bytes --reverse --protocol udp --limit 1")?;
    ensure!(bytes(&flows) == [sent(100)], "{flows:?}");
    let flows = talk.flows("--sort protocol,remote,bytes")?;
    ensure!(
        flows[0]["protocol"] == "icmp"
            && bytes(&flows[1..]) == [sent(1000), sent(100), sent(700), sent(400)],
        "{flows:?}"
    );

    let sums = talk.flows("--by guest")?;
    ensure!(
        sums.len() == 2 && sums[0]["group"] == "10.0.1.10" && sums[0]["sessions"] == 2,
        "{sums:?}"
    );
    ensure!(
        sums[0]["bytes"]["outbound"] == 1000 + 400 + 2 * OVERHEAD,
        "{sums:?}"
    );
    let sums = talk.flows("--by service --protocol udp --guest 10.0.0.10 --limit 1")?;
    ensure!(sums.len() == 1 && sums[0]["group"] == "udp/54", "{sums:?}");

    let table = talk.table("--columns remote,bytes,proto --sort bytes --protocol udp")?;
    let first: Vec<_> = table
        .lines()
        .map(str::split_whitespace)
        .map(Vec::from_iter)
        .collect();
    ensure!(
        first[0] == ["REMOTE", "BYTES", "PROTO"] && first[1][1].starts_with("1036/"),
        "{table}"
    );
    let table = talk.table("--by state")?;
    ensure!(
        table.starts_with("STATE    SESSIONS  ") && table.contains("two-way         5"),
        "{table}"
    );
    Ok(())
}

#[test]
fn without_counts_there_is_no_order_by_them() -> Result<()> {
    let talk = talk(&[])?;
    for arguments in ["--sort bytes", "--columns packets"] {
        let output = refused(&talk, arguments, 1)?;
        ensure!(
            output.stderr.contains("tapnat run --count"),
            "{}",
            output.stderr
        );
    }
    let sums = talk.flows("--by guest")?;
    ensure!(
        sums[0]["group"] == "10.0.0.10"
            && sums[0]["sessions"] == 3
            && sums[0].get("bytes").is_none(),
        "{sums:?}"
    );
    // What is wrong on the command line is another code, and one line, too.
    for arguments in ["--guest 10.0.0.300", "--sort size", "--limit 0"] {
        refused(&talk, arguments, 2)?;
    }
    Ok(())
}

fn refused(talk: &Talk, arguments: &str, code: i32) -> Result<Output> {
    let command = talk.world.instance.command("flows")?;
    let output = command.args(arguments.split_whitespace()).output()?;
    ensure!(
        output.status.code() == Some(code)
            && output.stdout.is_empty()
            && output.stderr.lines().count() == 1,
        "{arguments}: {output:?}"
    );
    Ok(output)
}

#[test]
fn a_terminal_gets_colours_and_no_more_than_fits() -> Result<()> {
    let talk = talk(&["--count"])?;
    let start = |arguments: &str, no_color: bool| {
        let mut command = talk.world.instance.command("flows")?;
        if no_color {
            command = command.env("NO_COLOR", "1");
        }
        Terminal::start(command.args(arguments.split_whitespace()), 80, 12)
    };
    for (arguments, no_color, titles) in [
        ("", false, "PROTO  INSIDE           OUTSIDE"),
        (
            "--sort bytes",
            true,
            "PROTO  INSIDE           REMOTE              BYTES  OUTSIDE",
        ),
    ] {
        let mut terminal = start(arguments, no_color)?;
        ensure!(terminal.process().wait(PATIENCE)?.success());
        let screen = terminal.wait_for(PATIENCE, |screen| screen.lines().count() >= 6)?;
        ensure!(terminal.has_colours() != no_color, "{no_color}:\n{screen}");
        ensure!(
            screen.starts_with(titles) && screen.lines().all(|line| line.len() <= 80),
            "{screen}"
        );
    }
    let mut watched = start("--watch=1 --sort bytes", false)?;
    watched.wait_for(PATIENCE, |screen| {
        screen.starts_with("5 sessions; every 1 s until Ctrl-C\nPROTO")
    })?;
    let more = talk.world.guest_socket(1, 0)?;
    more.send_to(&traffic::pattern(10), server(0, 99))?;
    let screen = watched.wait_for(PATIENCE, |screen| screen.starts_with("6 sessions"))?;
    ensure!(
        screen.contains(":99 ") && screen.lines().count() == 8,
        "{screen}"
    );
    watched.type_keys("\u{3}")?;
    watched.process().wait(PATIENCE)?;

    // In a pipe one list comes after the other.
    let command = talk.world.instance.command("flows")?;
    let mut piped = command.args(["--watch=1", "--json"]).spawn()?;
    piped.wait_for_line(PATIENCE, |line| line == "]")?;
    ensure!(piped.stdout().starts_with("[\n{"), "{}", piped.stdout());
    piped.signal(Signal::SIGINT)?;
    piped.wait(PATIENCE)?;
    // The instance ends, and so does whoever watches it.
    let mut watched = start("--watch=1", false)?;
    watched.wait_for(PATIENCE, |screen| screen.starts_with("6 sessions"))?;
    talk.world.instance.ask("down", &[])?;
    ensure!(watched.process().wait(PATIENCE)?.code() == Some(1));
    watched.wait_for(PATIENCE, |screen| {
        screen.contains("there is no tapnat instance")
    })?;
    Ok(())
}

/// Puts as many sessions into the table as if guests had begun them just now.
fn fill(world: &World, count: u32) -> Result<()> {
    let pin = world.instance.pins().join("maps").join(maps::IPV4.sessions);
    let mut table: HashMap<_, FlowKey, Session> =
        Map::from_map_data(MapData::from_pin(pin)?)?.try_into()?;
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?.num_nanoseconds();
    let now = Instant::from_nanoseconds(now.cast_unsigned());
    let host = &world.topology.host;
    let device = host.device_index("veth0")?.and_then(NonZeroU32::new);
    let device = device.context("the host has no veth0")?;
    let [outside, remote] = [HOST_ADDRESS, WORLD_ADDRESSES[0]].map(Be32::from);
    for number in 0..count {
        let [_, high, middle, low] = number.to_be_bytes();
        let address = Be32::from(std::net::Ipv4Addr::new(10, high, middle, low));
        let key = FlowKey {
            source: address,
            destination: remote,
            source_port: Be16::new(1000),
            destination_port: Be16::new(u16::from(middle) + 1),
            arrival: Arrival::inside(device, protocol::UDP),
        };
        let half = Session {
            source: outside,
            destination: remote,
            // A key of the other half for each session, though no NAT would choose so.
            source_port: Be16::new(u16::from(high) << 8 | u16::from(low)),
            destination_port: key.destination_port,
            last_seen: now,
            flags: session_flags::INITIATOR,
            packets: 1,
            bytes: number.into(),
            ..Session::default()
        };
        let twin = Session {
            source: remote,
            destination: address,
            source_port: key.destination_port,
            destination_port: key.source_port,
            next_hop: NextHop {
                device: device.get(),
                ..NextHop::default()
            },
            last_seen: now,
            flags: session_flags::TO_INSIDE,
            ..Session::default()
        };
        table.insert(key, half, 0)?;
        table.insert(half.twin_key(&key), twin, 0)?;
    }
    Ok(())
}

#[test]
fn a_million_sessions() -> Result<()> {
    let arguments = [
        "--count",
        "--max-sessions",
        "1100000",
        "--udp-timeout",
        "1h",
    ];
    let world = world(&arguments)?;
    fill(&world, MILLION)?;
    let shell = |line: &str| {
        let name = world.instance.name();
        let line = format!(
            "set -o pipefail; flows() {{ \"$TAPNAT_BIN\" flows --instance {name} \"$@\"; }}; {line}"
        );
        let command = world.topology.host.command("bash").args(["-c", &line]);
        let output = command.timeout(PATIENCE * 4).output()?;
        ensure!(
            output.status.success() && output.stderr.is_empty(),
            "{line}: {} {}",
            output.status,
            output.stderr
        );
        Ok(output.stdout)
    };
    let rows = shell("flows | head -n 3")?;
    ensure!(
        rows.lines().count() == 3 && rows.starts_with("PROTO  INSIDE"),
        "{rows}"
    );
    let json = shell("flows --json | head -n 1")?;
    ensure!(json == "[\n", "{json}");
    let sorted = shell("flows --sort bytes --columns inside,bytes | head -n 2")?;
    let last = u64::from(MILLION - 1);
    ensure!(
        sorted
            .lines()
            .nth(1)
            .is_some_and(|row| row.ends_with(&format!(" {last}/0"))),
        "{sorted}"
    );
    let count = shell("flows | wc -l")?;
    ensure!(count.trim() == (MILLION + 1).to_string(), "{count}");
    let one: IpAddr = "10.15.66.63".parse()?;
    let row = shell(&format!("flows --guest {one} --columns inside,bytes"))?;
    ensure!(row.ends_with(&format!("{one}:1000  {last}/0\n")), "{row}");
    let sum = shell("flows --by protocol")?;
    ensure!(
        sum.lines()
            .nth(1)
            .is_some_and(|row| row.starts_with(&format!("udp     {MILLION}"))),
        "{sum}"
    );
    Ok(())
}
