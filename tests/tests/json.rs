//! The JSON has the fields that `docs/json.md` says, all of them and no others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tapnat_testbed::topology::{Inside, Topology};
use tapnat_tests::{
    instance::PATIENCE,
    world::{World, server},
};

fn document() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/json.md");
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The fields of each section, by its heading.
fn sections(document: &str) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut sections = BTreeMap::new();
    for section in document.split("\n## ").skip(1) {
        let (heading, text) = section.split_once('\n').unwrap_or((section, ""));
        let rows = text.lines().filter(|line| line.starts_with("| `"));
        let fields = rows.flat_map(|row| {
            let first = row.split('|').nth(1).unwrap_or_default();
            quoted(first)
        });
        sections.insert(heading.trim_matches('`'), fields.collect());
    }
    sections
}

/// The names of all fields within, at any depth.
fn fields_within<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| fields_within(item, found)),
        Value::Object(fields) => {
            for (name, field) in fields {
                found.insert(name);
                fields_within(field, found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The fields of an object, or of all objects of an array.
fn fields_of(value: &Value) -> BTreeSet<&str> {
    let objects: Vec<_> = match value {
        Value::Array(items) => items.iter().collect(),
        other => vec![other],
    };
    let objects = objects.into_iter().filter_map(Value::as_object);
    objects
        .flat_map(|fields| fields.keys().map(String::as_str))
        .collect()
}

/// An instance of which everything has something to show.
fn world(log: &Path) -> Result<World> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2);
    let log = log.to_str().context("a path that is no text")?;
    let options = ["--count", "--nat-log", log, "--log-destinations"];
    let world = World::start(topology, &options)?;
    for words in [
        &["forward", "add", "tcp", "8080", "10.0.0.10:80"][..],
        &["static", "add", "198.51.100.77", "10.0.1.10"],
    ] {
        world.instance.ask(words[0], &words[1..])?;
    }
    world.check_reach()?;
    // Something that is dropped.
    let stray = world.guest_socket(0, 0)?;
    stray.send_to(b"to nobody", "240.0.0.1:9")?;
    Ok(world)
}

#[test]
fn every_field_is_documented_and_no_other() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("nat.log");
    let world = world(&log)?;
    let document = document()?;
    let documented = sections(&document);
    let words: BTreeSet<_> = quoted(&document)
        .flat_map(|text| text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_'))
        .collect();

    let outside: IpAddr = tapnat_tests::world::OUTSIDE;
    let mappings = world.instance.ask_json("mappings")?;
    let endpoint = mappings.as_array().and_then(|list| {
        let dynamic = list.iter().find(|it| it["kind"] == "dynamic")?;
        dynamic["outside"]["port"].as_u64()
    });
    let endpoint = format!("{outside}:{}", endpoint.context("no mapping")?);
    // While it looks, a packet comes by.
    let background = world
        .guest(0)
        .namespace
        .command("ping")
        .args(["-i", "0.1", "-w", "60", &server(0, 0).ip().to_string()])
        .timeout(PATIENCE)
        .spawn()?;

    let mut seen = BTreeSet::new();
    for (heading, fields) in &documented {
        let Some(line) = heading.strip_prefix("tapnat ") else {
            continue;
        };
        let mut words_of_line: Vec<_> = line.split(' ').collect();
        let verb = words_of_line.remove(0);
        let extra: &[&str] = match verb {
            "why" => &["--guest", "10.0.0.10", "--to", "203.0.113.1:443"],
            "who" => &[&endpoint],
            "trace" => &["--count", "1"],
            "top" => &["--interval", "1"],
            _ => &[],
        };
        let output = world
            .instance
            .command(verb)?
            .args(&words_of_line)
            .args(extra)
            .output()?;
        let value: Value = serde_json::from_str(&output.stdout)
            .with_context(|| format!("{heading}: {output:?}"))?;
        ensure!(
            fields_of(&value) == *fields,
            "{heading}: {:?}\n{}",
            fields_of(&value).symmetric_difference(fields),
            output.stdout
        );
        if fields.contains("schema") {
            ensure!(value["schema"] == 1, "{heading}: {}", value["schema"]);
        }
        let mut within = BTreeSet::new();
        fields_within(&value, &mut within);
        let unexplained: Vec<_> = within.difference(&words).collect();
        ensure!(
            unexplained.is_empty(),
            "{heading}: what is {unexplained:?}?"
        );
        seen.insert(verb.to_owned());
    }
    drop(background);
    ensure!(seen.len() == 12, "{seen:?}");

    let text = fs::read_to_string(&log)?;
    let lines: Vec<Value> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let lines = Value::Array(lines);
    let mut logged = fields_of(&lines);
    // Nothing was lost.
    logged.insert("count");
    ensure!(logged == documented["The NAT log"], "{logged:?}");
    Ok(())
}

#[test]
fn every_command_that_prints_json_has_a_section() -> Result<()> {
    let document = document()?;
    let documented: BTreeSet<_> = sections(&document)
        .into_keys()
        .filter_map(|heading| {
            let words = heading.strip_prefix("tapnat ")?.split(" --").next()?;
            Some(words.to_owned())
        })
        .collect();
    let program = std::env::var_os("TAPNAT_BIN").context("run with `cargo xtask test`")?;
    let help = |words: &[&str]| {
        tapnat_testbed::process::Command::new(&program)
            .args(words)
            .arg("--help")
            .run()
    };
    let verbs = |text: &str| -> Vec<String> {
        let list = text.split_once("Commands:\n").map_or("", |(_, list)| list);
        let list = list.split("\n\n").next().unwrap_or_default();
        let names = list.lines().filter_map(|line| {
            let name = line.strip_prefix("  ")?.split(' ').next()?;
            (!name.is_empty() && name != "help").then(|| name.to_owned())
        });
        names.collect()
    };
    let mut printing = BTreeSet::new();
    for verb in verbs(&help(&[])?) {
        let text = help(&[&verb])?;
        let below = verbs(&text);
        if below.is_empty() && text.contains("--json") {
            printing.insert(verb.clone());
        }
        for second in below {
            if help(&[&verb, &second])?.contains("--json") {
                printing.insert(format!("{verb} {second}"));
            }
        }
    }
    ensure!(
        printing == documented,
        "{:?}",
        printing.symmetric_difference(&documented)
    );
    Ok(())
}
