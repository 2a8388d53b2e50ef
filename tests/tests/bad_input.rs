//! What cannot be done is refused with one line that says what, why and the
//! way out, and changes nothing.

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use tapnat_common::abi::Settings;
use tapnat_testbed::{
    Namespace,
    snapshot::Snapshot,
    topology::{Inside, Topology},
};
use tapnat_tests::instance::{Instance, PATIENCE};

const FAILURE: i32 = 1;
const USAGE: i32 = 2;

fn world() -> Result<Topology> {
    Topology::builder().inside(Inside::Veth).build()
}

/// Runs a verb that must fail with this exit code and these words.
fn refused(
    instance: &Instance,
    host: &Namespace,
    (verb, arguments): (&str, &str),
    code: i32,
    words: &[&str],
) -> Result<()> {
    let before = Snapshot::take(host, &instance.pins())?;
    let output = instance
        .command_in(host, verb)?
        .args(arguments.split_whitespace())
        .output()?;
    let said = &output.stderr;
    let check = || {
        ensure!(
            output.status.code() == Some(code),
            "it ended with {}",
            output.status
        );
        ensure!(output.stdout.is_empty(), "it printed {}", output.stdout);
        ensure!(said.lines().count() == 1, "not one line");
        ensure!(said.starts_with("tapnat: "), "it does not say who speaks");
        for word in words {
            ensure!(said.contains(word), "it does not say '{word}'");
        }
        let after = Snapshot::take(host, &instance.pins())?;
        ensure!(before == after, "it left {:?}", before.difference(&after));
        ensure!(
            !instance.run_directory().exists(),
            "its files are still there"
        );
        Ok(())
    };
    check().with_context(|| format!("tapnat {verb} {arguments}\n{said}"))
}

#[test]
fn a_wrong_command_line_is_refused() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let run = |arguments, words: &[&str]| {
        refused(&instance, &world.host, ("run", arguments), USAGE, words)
    };
    run("", &["--inside"])?;
    run(
        "--inside tap0=10.0.0.1",
        &["no prefix length", "write 10.0.0.1/24"],
    )?;
    run(
        "--inside tap0=10.0.0.0/24",
        &["network address", "10.0.0.1/24"],
    )?;
    run("--inside tap0=10.0.0.300/24", &["write 10.0.0.1/24"])?;
    run("--inside a-very-long-device=10.0.0.1/24", &["too long"])?;
    run("--inside tap0=10.0.0.1/24 --ports 9-5", &["upside down"])?;
    run(
        "--inside tap0=10.0.0.1/24 --max-sessions 0",
        &["not in 1.."],
    )?;
    run(
        "--inside tap0=10.0.0.1/24 --filtering open",
        &["endpoint-independent"],
    )?;
    run("--inside tap0=10.0.0.1/24 --udp-timeout 5x", &["write 300"])?;
    run(
        "--inside tap0=10.0.0.1/24 --outside-address 127.0.0.1",
        &["cannot be"],
    )?;
    run("--inside tap0=10.0.0.1/24 --uplnk eth0", &["--uplink"])?;
    refused(&instance, &world.host, ("flow", ""), USAGE, &["flows"])
}

#[test]
fn an_instance_name_with_odd_characters_is_refused() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    for name in ["a.b", "a/b", "..", "-"] {
        let output = world
            .host
            .command(std::env::var_os("TAPNAT_BIN").context("TAPNAT_BIN is not set")?)
            .args(["status", &format!("--instance={name}")])
            .output()?;
        ensure!(output.status.code() == Some(USAGE), "{name}: {output:?}");
        ensure!(
            output.stderr.contains("letters, digits"),
            "{name}: {output:?}"
        );
    }
    drop(instance);
    Ok(())
}

#[test]
fn a_host_that_does_not_fit_is_refused() -> Result<()> {
    let world = world()?;
    let (host, instance) = (&world.host, Instance::new(&world.host));
    let run =
        |arguments, words: &[&str]| refused(&instance, host, ("run", arguments), FAILURE, words);
    run(
        "--inside tap0=10.0.0.1/24 --uplink uplnk0",
        &["uplnk0", "did you mean uplink0?"],
    )?;
    run("--inside tap0=10.0.0.1/24 --uplink lo", &["loopback"])?;
    run(
        "--inside uplink0=10.0.0.1/24",
        &["both the uplink and an inside device"],
    )?;
    run(
        "--inside tap0=10.0.0.1/24 --inside tap0=10.0.1.1/24",
        &["given twice"],
    )?;
    run(
        "--inside tap0=198.51.100.129/25",
        &["overlaps 198.51.100.0/24 of the uplink"],
    )?;
    run(
        "--inside tap0=10.0.0.1/8 --inside tap1=10.1.0.1/16",
        &["overlaps that of tap0"],
    )?;
    run(
        "--inside veth0",
        &["no IPv4 address", "--inside veth0=10.0.0.1/24"],
    )?;
    run("--inside veth1", &["did you mean veth0?"])?;
    run(
        "--inside tap0=10.0.0.1/24 --ports 32768-33000",
        &["no port", "--ports"],
    )?;

    host.ip("link add br9 type bridge")?;
    host.ip("link set veth0 master br9")?;
    run("--inside veth0=10.0.0.1/24", &["port of br9", "name br9"])?;

    host.ip("address flush dev uplink0")?;
    run(
        "--inside tap0=10.0.0.1/24",
        &["no default route", "--uplink"],
    )?;
    run(
        "--inside tap0=10.0.0.1/24 --uplink uplink0",
        &["no IPv4 address", "--outside-address"],
    )?;
    host.ip("link set uplink0 down")?;
    run(
        "--inside tap0=10.0.0.1/24 --uplink uplink0",
        &["is down", "ip link set uplink0 up"],
    )
}

#[test]
fn a_device_belongs_to_one_instance() -> Result<()> {
    let world = world()?;
    let (host, first) = (&world.host, Instance::new(&world.host));
    let _process = first.start(&["--inside", "veth0=10.0.0.1/24"])?;
    let way_out = format!("tapnat down --instance {}", first.name());
    let second = Instance::new(host);
    refused(
        &second,
        host,
        ("run", "--inside tap5=10.0.5.1/24"),
        FAILURE,
        &["uplink0", &way_out],
    )?;
    host.add_veth("uplink1", &world.world, "world1")?;
    host.ip("address add 192.0.2.129/25 dev uplink1")?;
    host.ip("link set uplink1 up")?;
    let arguments = "--inside veth0=10.0.5.1/24 --uplink uplink1";
    refused(
        &second,
        host,
        ("run", arguments),
        FAILURE,
        &["veth0", &way_out],
    )?;

    let again = first
        .command("run")?
        .args(["--inside", "veth0=10.0.0.1/24"])
        .output()?;
    ensure!(again.status.code() == Some(FAILURE), "{again:?}");
    ensure!(
        again.stderr.contains("running already (process"),
        "{again:?}"
    );
    ensure!(
        first.ask_json("status")?["process"].is_number(),
        "the first one ended"
    );
    Ok(())
}

#[test]
fn an_instance_that_is_not_there_cannot_be_shown() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    for verb in ["flows", "mappings", "status"] {
        refused(
            &instance,
            &world.host,
            (verb, ""),
            FAILURE,
            &["there is no tapnat instance"],
        )?;
    }
    Ok(())
}

#[test]
fn tables_of_another_version_are_left_alone() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let arguments = ["--inside", "veth0=10.0.0.1/24"];
    instance
        .start(&[&arguments[..], &["--keep"]].concat())?
        .terminate(PATIENCE)?;
    let path = instance.pins().join("maps/SETTINGS");
    let map = Map::from_map_data(MapData::from_pin(&path)?)?;
    let mut table: Array<_, Settings> = map.try_into()?;
    let mut settings = table.get(&0, 0)?;
    settings.abi_version = u32::MAX;
    table.set(0, settings, 0)?;
    drop(table);

    for verb in ["flows", "mappings", "status"] {
        let output = instance.command(verb)?.output()?;
        ensure!(
            output.stderr.contains("another version of tapnat"),
            "{output:?}"
        );
    }
    let output = instance.command("run")?.args(arguments).output()?;
    ensure!(output.status.code() == Some(FAILURE), "{output:?}");
    ensure!(output.stderr.contains("--fresh"), "{output:?}");
    ensure!(path.exists(), "the other version's tables are gone");
    let _process = instance.start(&[&arguments[..], &["--fresh"]].concat())?;
    instance.ask_json("status")?;
    Ok(())
}
