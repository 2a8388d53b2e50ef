//! `tapnat map` of a real network with traffic: as text, as SVG, as JSON.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tapnat_testbed::{
    process::Process,
    terminal::Terminal,
    topology::{Inside, Topology},
    traffic,
};
use tapnat_tests::{
    instance::PATIENCE,
    world::{World, server},
};

fn world() -> Result<(World, Process)> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2);
    let world = World::start(topology, &["--count"])?;
    traffic::ping(&world.guest(1).namespace, server(1, 0).ip(), 1, &[])?;
    world
        .instance
        .ask("forward", &["add", "tcp", "8080", "10.0.0.10:80"])?;
    let command = world.guest(0).namespace.command("ping");
    let ping = command
        .args(["-i", "0.01", "-s", "1000", "-q"])
        .arg(server(0, 0).ip().to_string())
        .spawn()?;
    Ok((world, ping))
}

#[test]
fn the_picture_shows_who_is_where_and_what_passes() -> Result<()> {
    let (world, _ping) = world()?;
    let text = world.instance.ask("map", &[])?;
    ensure!(
        text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );
    ensure!(!text.contains('\u{1b}'), "colours in a pipe");
    for (one, other) in [
        ("10.0.0.10", "veth0"),
        ("10.0.1.10", "veth1"),
        ("tapnat", "uplink0"),
        ("uplink0", "203.0.113.1"),
        ("10.0.0.10:80 ←", "198.51.100.2:8080"),
    ] {
        let line = text
            .lines()
            .find(|line| line.contains(one) && line.contains(other));
        line.with_context(|| format!("{one} and {other} are not on one line:\n{text}"))?;
    }
    // Of the guest, its device, the uplink.
    ensure!(text.matches(" kbit/s").count() >= 6, "{text}");

    let watch = world.instance.command("map")?.arg("--watch=1");
    let mut terminal = Terminal::start(watch, 100, 40)?;
    terminal.wait_for(PATIENCE, |screen| {
        screen.starts_with("┌─ guests") && screen.contains("8080")
    })?;
    ensure!(terminal.has_colours());
    // Who makes the terminal narrow for a while has it back.
    terminal.resize(50, 40)?;
    terminal.wait_for(PATIENCE, |screen| screen.contains("does not fit 50"))?;
    terminal.resize(100, 40)?;
    terminal.wait_for(PATIENCE, |screen| screen.starts_with("┌─ guests"))?;
    terminal.type_keys("\u{3}")?;
    terminal.process().wait(PATIENCE)?;

    let narrow = world.instance.command("map")?;
    let mut terminal = Terminal::start(narrow, 50, 40)?;
    ensure!(terminal.process().wait(PATIENCE)?.code() == Some(1));
    terminal.wait_for(PATIENCE, |screen| screen.contains("does not fit 50"))?;
    Ok(())
}

#[test]
fn programs_get_it_as_json_and_documents_as_svg() -> Result<()> {
    let (world, _ping) = world()?;
    let json: Value = serde_json::from_str(&world.instance.ask("map", &["--json"])?)?;
    ensure!(
        json["schema"] == 1 && json["forwards"][0]["outside"]["port"] == 8080,
        "{json}"
    );
    ensure!(
        json["devices"].as_array().is_some_and(|it| it.len() == 3),
        "{json}"
    );
    ensure!(
        json["static_addresses"] == Value::Array(Vec::new()),
        "{json}"
    );

    let directory = world.instance.run_directory();
    let path = directory.join("map.svg");
    let file = path.to_str().context("an odd path")?;
    let said = world.instance.ask("map", &["--svg", file])?;
    let svg = fs::read_to_string(&path)?;
    fs::remove_file(&path)?;
    ensure!(said.is_empty(), "{said}");
    ensure!(
        svg.starts_with("<svg")
            && svg.trim_end().ends_with("</svg>")
            && svg.contains(">\n10.0.0.10\n<"),
        "{svg}"
    );
    let missing = directory.join("missing/map.svg");
    let output = world
        .instance
        .command("map")?
        .arg("--svg")
        .arg(&missing)
        .output()?;
    ensure!(
        output.status.code() == Some(1)
            && output.stderr.lines().count() == 1
            && output.stderr.contains("cannot write"),
        "{output:?}"
    );
    Ok(())
}
