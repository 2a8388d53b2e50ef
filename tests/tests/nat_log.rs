//! The NAT log and `tapnat who`: what was given and given back is written down, without destinations
//! unless they are asked for, also what happened while no process ran.

use std::{fs, io::Write as _, net::SocketAddr, path::Path, thread, time::Instant};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use serde_json::{Value, json};
use tapnat_testbed::{
    process::Process,
    terminal::Terminal,
    topology::{Inside, Topology},
    traffic::{self, UdpReflector},
};
use tapnat_tests::{
    family::V6,
    instance::{Instance, PATIENCE},
    world::{just_over, server},
};

const INSIDE: [&str; 2] = ["--inside", "veth0=10.0.0.1/24"];
const NOBODY: i32 = 3;

struct Rig {
    process: Process,
    instance: Instance,
    topology: Topology,
    echo: UdpReflector,
    directory: tempfile::TempDir,
}

impl Rig {
    fn start(arguments: &[&str]) -> Result<Self> {
        let topology = Topology::builder().inside(Inside::Veth).build()?;
        let instance = Instance::new(&topology.host);
        let directory = tempfile::tempdir()?;
        let echo = UdpReflector::start(&topology.world, server(0, 7))?;
        let process = start(&instance, directory.path(), arguments)?;
        Ok(Self {
            process,
            instance,
            topology,
            echo,
            directory,
        })
    }

    fn file(&self) -> String {
        file(self.directory.path())
    }

    /// A datagram from this port there and back.
    fn reach(&self, port: u16) -> Result<()> {
        let guest = &self.topology.guests[0];
        let local = (guest.address, port).into();
        let socket = traffic::udp_socket(&guest.namespace, local)?;
        traffic::reflect_udp(&socket, self.echo.address(), b"hello").map(drop)
    }

    /// Waits for a line of this event with this outside port, or with none.
    fn until(&self, event: &str, port: Option<u16>) -> Result<Value> {
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(self.file())?;
            let line = lines(&text)?.into_iter().find(|line| {
                line["event"] == event && line["outside"]["port"].as_u64() == port.map(u64::from)
            });
            if let Some(line) = line {
                return Ok(line);
            }
            ensure!(start.elapsed() < PATIENCE, "no {event} {port:?} in {text}");
            thread::sleep(just_over(0) / 20);
        }
    }

    fn who(&self, arguments: &[&str]) -> Result<(String, i32)> {
        let output = self.instance.command("who")?.args(arguments).output()?;
        let code = output.status.code().context("it was killed")?;
        Ok((output.stdout + &output.stderr, code))
    }
}

fn file(directory: &Path) -> String {
    directory.join("nat.log").to_string_lossy().into_owned()
}

fn start(instance: &Instance, directory: &Path, arguments: &[&str]) -> Result<Process> {
    instance.start(&[&INSIDE[..], &["--nat-log", &file(directory)], arguments].concat())
}

fn lines(text: &str) -> Result<Vec<Value>> {
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
        .collect()
}

#[test]
fn what_is_given_and_given_back_is_written_without_destinations() -> Result<()> {
    let rig = Rig::start(&[
        "--udp-timeout",
        "1s",
        "--port-rest",
        "1s",
        "--sweep-interval",
        "1s",
    ])?;
    rig.until("log-started", None)?;
    rig.reach(40_000)?;
    let created = rig.until("mapping-created", Some(40_000))?;
    ensure!(
        created["protocol"] == "udp" && created["nat_event"] == 8,
        "{created}"
    );
    ensure!(created["inside"]["address"] == "10.0.0.10", "{created}");
    ensure!(created["outside"]["address"] == "198.51.100.2", "{created}");
    let (said, code) = rig.who(&["198.51.100.2:40000"])?;
    ensure!(
        code == 0 && said.starts_with("udp 198.51.100.2:40000 was 10.0.0.10:40000 from "),
        "{said}"
    );
    let removed = rig.until("mapping-removed", Some(40_000))?;
    ensure!(removed["nat_event"] == 9, "{removed}");
    let text = fs::read_to_string(rig.file())?;
    ensure!(
        !text.contains("203.0.113") && !text.contains("session"),
        "{text}"
    );
    thread::sleep(just_over(0));
    let (said, code) = rig.who(&["198.51.100.2:40000"])?;
    ensure!(code == NOBODY && said == "nobody had it then\n", "{said}");
    let then = created["time"].as_str().context("no time")?;
    let (said, code) = rig.who(&["198.51.100.2:40000", "--at", then, "--json"])?;
    let answer: Value = serde_json::from_str(&said)?;
    ensure!(
        code == 0 && answer["schema"] == 1 && answer["is_complete"] == true,
        "{said}"
    );
    ensure!(answer["owners"][0]["until"] == removed["time"], "{said}");
    let (said, code) = rig.who(&["198.51.100.2:40000", "--at", "2001-01-01 12:00"])?;
    ensure!(
        code == 1 && said.contains("the log cannot tell: it reaches from"),
        "{said}"
    );
    let (said, code) = rig.who(&["198.51.100.2", "--at", "x"])?;
    ensure!(code == 2 && said.contains("has no port"), "{said}");
    Ok(())
}

#[test]
fn endpoints_of_ipv6_are_written_and_found() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6().build()?;
    let instance = Instance::new(&topology.host);
    let directory = tempfile::tempdir()?;
    let echo = UdpReflector::start(&topology.world, V6.server(0, 7))?;
    let arguments = ["--inside", "veth0=10.0.0.1/24,fd00:7a70::1/64"];
    let log = file(directory.path());
    let run = || instance.start(&[&arguments[..], &["--nat-log", &log]].concat());
    let mut process = run()?;
    let guest = &topology.guests[0];
    let local = SocketAddr::new(V6.address_of(guest), 40_000);
    let socket = traffic::udp_socket(&guest.namespace, local)?;
    traffic::reflect_udp(&socket, echo.address(), b"hello")?;
    // What is there is told by the next process.
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let _process = run()?;
    let text = fs::read_to_string(&log)?;
    let outside = V6.outside(40_000);
    for event in ["mapping-created", "mapping-present"] {
        let mut lines = lines(&text)?.into_iter();
        let line = lines.find(|line| {
            line["event"] == event && line["outside"]["address"] == json!(outside.ip())
        });
        let line = line.with_context(|| format!("no {event} in {text}"))?;
        ensure!(
            line["protocol"] == "udp"
                && line["inside"] == json!({"address": local.ip(), "port": 40_000}),
            "{line}"
        );
    }
    let said = instance.ask("who", &[&outside.to_string()])?;
    ensure!(
        said.starts_with(&format!("udp {outside} was {local} from ")),
        "{said}"
    );
    for (wrong, way_out) in [
        ("2001:db8:1::2", "has no port: write"),
        ("[2001:db8::g]:1", "is not an address"),
        ("[2001:db8:1::2]:x", "is not a port"),
    ] {
        let output = instance.command("who")?.arg(wrong).output()?;
        ensure!(
            output.status.code() == Some(2) && output.stderr.contains(way_out),
            "{output:?}"
        );
    }
    Ok(())
}

#[test]
fn destinations_are_written_if_asked_for() -> Result<()> {
    let rig = Rig::start(&["--log-destinations"])?;
    rig.reach(40_000)?;
    let session = rig.until("session-created", Some(40_000))?;
    ensure!(session["nat_event"] == 4, "{session}");
    ensure!(
        session["remote"]["address"] == "203.0.113.1" && session["remote"]["port"] == 7,
        "{session}"
    );
    let text = fs::read_to_string(rig.file())?;
    ensure!(
        text.matches("session-created").count() == 1,
        "one for each half: {text}"
    );
    Ok(())
}

#[test]
fn sessions_without_mappings_are_written_without_their_remotes() -> Result<()> {
    let rig = Rig::start(&["--mapping", "address-and-port-dependent"])?;
    rig.reach(40_000)?;
    let session = rig.until("session-created", Some(40_000))?;
    ensure!(session["remote"].is_null(), "{session}");
    let (said, code) = rig.who(&["198.51.100.2:40000"])?;
    ensure!(code == 0 && said.contains("10.0.0.10:40000"), "{said}");
    Ok(())
}

#[test]
fn what_happens_without_a_process_is_written_by_the_next_one() -> Result<()> {
    let mut rig = Rig::start(&[])?;
    rig.reach(40_000)?;
    rig.until("mapping-created", Some(40_000))?;
    rig.process.signal(Signal::SIGKILL)?;
    rig.process.wait(PATIENCE)?;
    rig.reach(41_000)?;
    rig.process = start(&rig.instance, rig.directory.path(), &[])?;
    rig.until("log-resumed", None)?;
    rig.until("mapping-present", Some(41_000))?;
    let text = fs::read_to_string(rig.file())?;
    let place = |what: &str| {
        text.find(what)
            .with_context(|| format!("no {what}: {text}"))
    };
    ensure!(place("41000")? < place("log-resumed")?, "{text}");
    // The file is moved away, and begun anew.
    fs::rename(rig.file(), format!("{}.1", rig.file()))?;
    rig.reach(42_000)?;
    let start = Instant::now();
    while !Path::new(&rig.file()).exists() {
        ensure!(start.elapsed() < PATIENCE, "it is not begun anew");
        thread::sleep(just_over(0) / 20);
    }
    rig.until("mapping-created", Some(42_000))?;
    for port in [40_000, 41_000, 42_000] {
        let (said, code) = rig.who(&[&format!("198.51.100.2:{port}")])?;
        ensure!(
            code == 0 && said.contains(&format!("10.0.0.10:{port} from ")),
            "{said}"
        );
    }
    rig.process.terminate(PATIENCE)?;
    rig.until("log-ended", None)?;
    let (said, code) = rig.who(&["198.51.100.2:40000"])?;
    ensure!(code == 1 && said.contains("--log FILE"), "{said}");
    let log = rig.file();
    let (said, code) = rig.who(&["198.51.100.2:42000", "--log", &log, "--at", "now"])?;
    ensure!(code == NOBODY, "after the end: {said}");
    Ok(())
}

#[test]
fn a_log_that_cannot_be_written_is_refused() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&topology.host);
    let output = instance
        .command("run")?
        .args(INSIDE)
        .args(["--nat-log", "/nonexistent/nat.log"])
        .output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(output.stderr.contains("/nonexistent/nat.log"), "{output:?}");
    ensure!(
        !instance.pins().exists() && !instance.run_directory().exists(),
        "something is left"
    );
    Ok(())
}

#[test]
fn what_takes_long_says_so_on_a_terminal_and_nowhere_else() -> Result<()> {
    let topology = Topology::builder().guests(0).build()?;
    let instance = Instance::new(&topology.host);
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("log");
    mkfifo(&log, Mode::S_IRWXU)?;
    let line = r#"{"schema":1,"time":"2026-11-23T14:02:11Z","instance":"x","event":"log-started"}"#;
    let command = || {
        let path = log.to_str().context("a path that is no text")?;
        let command = instance.command("who")?;
        Ok::<_, anyhow::Error>(command.args(["203.0.113.5:1", "--log", path]))
    };

    let mut terminal = Terminal::start(command()?, 80, 10)?;
    // It is read as far as it goes, and then waited for.
    let mut writer = fs::OpenOptions::new().write(true).open(&log)?;
    writeln!(writer, "{line}")?;
    terminal.wait_for(PATIENCE, |screen| screen.contains("reading the log"))?;
    drop(writer);
    let screen = terminal.wait_for(PATIENCE, |screen| screen.contains("nobody"))?;
    ensure!(screen.trim() == "nobody had it then", "{screen}");
    ensure!(terminal.process().wait(PATIENCE)?.code() == Some(NOBODY));

    let mut process = command()?.spawn()?;
    let mut writer = fs::OpenOptions::new().write(true).open(&log)?;
    writeln!(writer, "{line}")?;
    thread::sleep(just_over(1));
    drop(writer);
    process.wait(PATIENCE)?;
    ensure!(process.stderr().is_empty(), "{}", process.stderr());
    Ok(())
}
