//! `tapnat top` on a terminal, over a real instance with traffic.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    terminal::Terminal,
    topology::{Inside, Topology},
    traffic,
};
use tapnat_tests::{
    instance::PATIENCE,
    world::{World, server},
};

fn world(arguments: &[&str]) -> Result<World> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2);
    World::start(topology, arguments)
}

/// Datagrams from the first guest, for as long as this lives.
fn traffic(world: &World) -> Result<impl Drop> {
    let command = world.guest(0).namespace.command("ping");
    command
        .args(["-i", "0.01", "-s", "1000", "-q"])
        .arg(server(0, 0).ip().to_string())
        .spawn()
}

fn top(world: &World, columns: u16, rows: u16) -> Result<Terminal> {
    let command = world.instance.command("top")?;
    Terminal::start(command.args(["--interval", "1"]), columns, rows)
}

/// The words of the first line that begins with one.
fn words<'a>(screen: &'a str, first: &str) -> Vec<&'a str> {
    screen
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.first() == Some(&first))
        .unwrap_or_default()
}

#[test]
fn it_shows_what_happens_and_gives_the_terminal_back() -> Result<()> {
    let world = world(&["--count", "--guest-max-sessions", "2"])?;
    let _ping = traffic(&world)?;
    let socket = world.guest_socket(1, 0)?;
    for port in 1000..1005 {
        socket.send_to(b"more than it may have", server(1, port))?;
    }
    let mut terminal = top(&world, 80, 24)?;
    let screen = terminal.wait_for(PATIENCE, |screen| {
        words(screen, "icmp").last() == Some(&"kbit/s") && !words(screen, "10.0.0.10").is_empty()
    })?;
    ensure!(
        terminal.is_full_screen() && !terminal.has_cursor(),
        "{screen}"
    );
    ensure!(
        screen.lines().all(|line| line.chars().count() <= 80),
        "{screen}"
    );
    ensure!(
        screen.starts_with(&format!("tapnat {}: process ", world.instance.name())),
        "{screen}"
    );
    // A hundred packets of a kilobyte in a second, each way.
    for device in ["veth0", "uplink0"] {
        let line = words(&screen, device);
        ensure!(
            line.iter().filter(|word| **word == "kbit/s").count() == 2,
            "{screen}"
        );
    }
    ensure!(words(&screen, "10.0.1.10")[1..3] == ["2", "3"], "{screen}");
    ensure!(
        words(&screen, "guest-session-limit").contains(&"3"),
        "{screen}"
    );
    // The ping's identifier and two sockets' ports are in use.
    let ports = words(&screen, "198.51.100.2");
    ensure!(
        ports.len() == 10 && ports[1] == "0" && ports[4] == "1" && ports[7] == "1",
        "{screen}"
    );

    terminal.type_keys("h")?;
    terminal.wait_for(PATIENCE, |screen| screen.contains("hold the view"))?;
    terminal.type_keys("\u{1b}")?;
    terminal.wait_for(PATIENCE, |screen| !screen.contains("hold the view"))?;
    terminal.type_keys("\t")?;
    terminal.wait_for(PATIENCE, |screen| screen.contains("▸ BUSIEST"))?;
    terminal.type_keys("s")?;
    terminal.wait_for(PATIENCE, |screen| screen.contains("GUEST by sessions"))?;
    terminal.type_keys("p")?;
    terminal.wait_for(PATIENCE, |screen| screen.contains(" held"))?;
    terminal.type_keys("q")?;
    ensure!(terminal.process().wait(PATIENCE)?.success());
    given_back(&terminal)
}

/// Waits until the terminal is as it was.
fn given_back(terminal: &Terminal) -> Result<()> {
    let start = std::time::Instant::now();
    while terminal.is_full_screen() || !terminal.has_cursor() {
        ensure!(start.elapsed() < PATIENCE, "{}", terminal.screen());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn however_it_ends_the_terminal_is_given_back() -> Result<()> {
    let world = world(&[])?;
    let mut terminal = top(&world, 80, 24)?;
    terminal.wait_for(PATIENCE, |screen| {
        screen.contains("sessions are not counted")
    })?;
    terminal.type_keys("\u{3}")?;
    ensure!(terminal.process().wait(PATIENCE)?.success());
    given_back(&terminal)?;

    let mut terminal = top(&world, 80, 24)?;
    terminal.wait_for(PATIENCE, |screen| {
        screen.contains("sessions are not counted")
    })?;
    terminal.process().signal(Signal::SIGTERM)?;
    ensure!(
        terminal.process().wait(PATIENCE)?.code().is_none(),
        "not ended by the signal"
    );
    given_back(&terminal)?;

    let mut terminal = top(&world, 80, 24)?;
    terminal.wait_for(PATIENCE, |screen| {
        screen.contains("sessions are not counted")
    })?;
    world.instance.ask("down", &[])?;
    ensure!(terminal.process().wait(PATIENCE)?.code() == Some(1));
    given_back(&terminal)?;
    terminal.wait_for(PATIENCE, |screen| {
        screen.contains("there is no tapnat instance")
    })?;
    Ok(())
}

#[test]
fn where_it_cannot_draw_it_says_so() -> Result<()> {
    let world = world(&[])?;
    let mut small = top(&world, 60, 10)?;
    small.wait_for(PATIENCE, |screen| {
        screen.starts_with("This terminal has 60 columns and 10 rows.")
    })?;
    small.type_keys("q")?;
    ensure!(small.process().wait(PATIENCE)?.success());
    given_back(&small)?;
    let piped = world.instance.command("top")?.output()?;
    ensure!(
        piped.status.code() == Some(1)
            && piped.stdout.is_empty()
            && piped.stderr.lines().count() == 1
            && piped.stderr.contains("tapnat top --json"),
        "{piped:?}"
    );
    Ok(())
}

#[test]
fn programs_get_the_same_as_json() -> Result<()> {
    let world = world(&["--count"])?;
    let _ping = traffic(&world)?;
    traffic::ping(&world.guest(1).namespace, server(1, 0).ip(), 1, &[])?;
    let json = world.instance.ask("top", &["--json", "--interval", "1"])?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    ensure!(json["schema"] == 1 && json["counted"] == true, "{json}");
    ensure!(
        json["seconds"].as_f64().is_some_and(|it| it >= 1.0),
        "{json}"
    );
    let rate = |it: &serde_json::Value| it["rates"]["outbound"]["bits"].as_f64();
    let devices = json["devices"].as_array();
    ensure!(
        devices.is_some_and(|all| all.iter().filter(|it| rate(it) > Some(10_000.0)).count() == 2),
        "the first guest's device and the uplink: {json}"
    );
    let guests = json["guests"].as_array();
    ensure!(
        guests.is_some_and(|all| all
            .iter()
            .any(|it| it["address"] == "10.0.0.10" && rate(it) > Some(10_000.0))
            && all
                .iter()
                .any(|it| it["address"] == "10.0.1.10" && rate(it) == Some(0.0))),
        "{json}"
    );
    ensure!(
        json["busiest"][0]["protocol"] == "icmp"
            && json["busiest"][0]["inside"]["address"] == "10.0.0.10",
        "{json}"
    );
    ensure!(json["ports"][0]["icmp"]["used"] == 2, "{json}");
    ensure!(json["reasons"][0]["per_second"].is_number(), "{json}");
    Ok(())
}
