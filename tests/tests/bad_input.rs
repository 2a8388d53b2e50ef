//! What cannot be done is refused with one line that says what, why and the
//! way out, and changes nothing.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use nix::sys::signal::Signal;
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
    run(
        "--inside tap0=10.0.0.1/32",
        &["no room for a guest", "'10.0.0.1 peer 10.0.0.10'"],
    )?;
    run("--inside a-very-long-device=10.0.0.1/24", &["too long"])?;
    run(
        "--inside tap0=fe80::1/64",
        &["link-local", "fd00:7a70::1/64"],
    )?;
    run("--inside tap0=fd00::/64", &["write fd00::1/64"])?;
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
        &["no address", "--inside veth0=10.0.0.1/24"],
    )?;
    run("--inside veth1", &["did you mean veth0?"])?;
    host.ip("link set veth0 mtu 1000")?;
    run(
        "--inside veth0=10.0.0.1/24,fd00::1/64",
        &["MTU of 1000", "IPv6 needs 1280", "raise it"],
    )?;
    host.ip("link set veth0 mtu 1500")?;
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

/// The host, and what the instance has recorded of it.
fn state(instance: &Instance, host: &Namespace) -> Result<(Snapshot, String)> {
    let record = instance.run_directory().join("changes.json");
    let record = fs::read_to_string(&record).with_context(|| record.display().to_string())?;
    Ok((Snapshot::take(host, &instance.pins())?, record))
}

/// Starts an instance with the guest's veth and a tap, and kills it when the
/// kernel has noticed that nobody is at the tap's other end.
fn killed(instance: &Instance, host: &Namespace) -> Result<()> {
    let tap = "tap7=10.0.7.1/24";
    let mut process = instance.start(&["--inside", "veth0=10.0.0.1/24", "--inside", tap])?;
    let start = Instant::now();
    while !host.ip("link show tap7")?.contains("NO-CARRIER") {
        ensure!(start.elapsed() < PATIENCE, "tap7 has a carrier");
        thread::sleep(Duration::from_millis(20));
    }
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    Ok(())
}

/// Runs a start that must fail with these words and change nothing of what the
/// instance has, nor of the host.
fn refused_start(
    instance: &Instance,
    host: &Namespace,
    arguments: &str,
    words: &[&str],
) -> Result<()> {
    let before = state(instance, host)?;
    let output = instance
        .command("run")?
        .args(arguments.split_whitespace())
        .output()?;
    ensure!(output.status.code() == Some(FAILURE), "{output:?}");
    for word in words {
        ensure!(
            output.stderr.contains(word),
            "it does not say '{word}': {output:?}"
        );
    }
    let after = state(instance, host)?;
    let difference = before.0.difference(&after.0);
    ensure!(difference.is_none(), "it left {difference:?}");
    ensure!(
        before.1 == after.1,
        "it recorded {} in place of {}",
        after.1,
        before.1
    );
    Ok(())
}

#[test]
fn a_refused_start_takes_nothing_from_an_earlier_one() -> Result<()> {
    let world = world()?;
    let (host, instance) = (&world.host, Instance::new(&world.host));
    let refused = |arguments: &str, words: &[&str]| {
        refused_start(&instance, host, arguments, words)
            .with_context(|| format!("tapnat run {arguments}"))
    };
    let wrong = "--inside veth0=10.0.0.1/24 --uplink nope0 --fresh";
    // Its address would be one that only the earlier start put there.
    let lost = "--inside veth0=10.0.0.1/24 --inside tap7 --fresh";
    let process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    let running = "is running already (process";
    refused(wrong, &[running])?;
    refused("--inside veth0=10.0.0.1/24 --fresh", &[running])?;
    ensure!(
        instance.ask_json("status")?["process"] == process.id(),
        "it does not run any more"
    );
    instance.ask("down", &[])?;
    killed(&instance, host)?;
    refused(wrong, &["no device called nope0"])?;
    refused(lost, &["tap7"])?;
    refused(
        "--inside veth0=10.0.0.1/24 --inside tap8=10.0.8.1/24 --max-sessions 77",
        &["--fresh"],
    )
}

#[test]
fn without_privileges_nothing_begins() -> Result<()> {
    const CAPABILITIES: &str = "+net_admin,+bpf,+perfmon,+net_raw";
    let world = world()?;
    let instance = Instance::new(&world.host);
    // Nobody may not be able to run the program where that was built.
    let copy = std::env::temp_dir().join(format!("{}-program", instance.name()));
    let program = std::env::var_os("TAPNAT_BIN").context("TAPNAT_BIN is not set")?;
    fs::copy(program, &copy)?;
    // So that it is there and root's, whatever else runs.
    let _process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    let other = Instance::new(&world.host);
    let check = |privileges: &[&str], words: &[&str]| {
        let before = Snapshot::take(&world.host, &other.pins())?;
        let output = world
            .host
            .command("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(privileges)
            .arg(&copy)
            .args(["run", "--instance", other.name()])
            .args(["--inside", "tap7=10.0.7.1/24"])
            .output()?;
        ensure!(output.status.code() == Some(FAILURE), "{output:?}");
        ensure!(output.stderr.lines().count() == 1, "{output:?}");
        for word in words {
            ensure!(output.stderr.contains(word), "not '{word}': {output:?}");
        }
        let after = Snapshot::take(&world.host, &other.pins())?;
        ensure!(before == after, "it left {:?}", before.difference(&after));
        Ok(())
    };
    let none = check(
        &[],
        &[
            "must run as root",
            "CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON",
            "CAP_NET_RAW",
            "/dev/net/tun",
        ],
    );
    let sets = ["inh", "ambient"].map(|set| format!("--{set}-caps={CAPABILITIES}"));
    let given = sets.each_ref().map(String::as_str);
    let some = check(&given, &["/run/tapnat", "let this user write"]);
    fs::remove_file(&copy)?;
    none.and(some)
}

#[test]
fn an_instance_that_begins_or_ends_is_not_called_running() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let mut process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    // As `tapnat down` holds it.
    let lock = fs::File::open(instance.run_directory().join("lock"))?;
    lock.lock()?;
    for arguments in [
        "--inside veth0=10.0.0.1/24",
        "--inside veth0=10.0.0.1/24 --fresh",
    ] {
        refused_start(
            &instance,
            &world.host,
            arguments,
            &["is starting or ending: try again"],
        )?;
    }
    drop(lock);
    instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    Ok(())
}

#[test]
fn tables_of_another_version_are_left_alone() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    killed(&instance, &world.host)?;
    let path = instance.pins().join("maps/SETTINGS");
    let map = Map::from_map_data(MapData::from_pin(&path)?)?;
    let mut table: Array<_, Settings> = map.try_into()?;
    let mut settings = table.get(&0, 0)?;
    settings.abi_version = u32::MAX;
    table.set(0, settings, 0)?;
    drop(table);

    let way_out = format!("`tapnat down --instance {}`", instance.name());
    for verb in ["flows", "mappings", "status"] {
        let output = instance.command(verb)?.output()?;
        ensure!(
            output.stderr.contains("another version of tapnat") && output.stderr.contains(&way_out),
            "{output:?}"
        );
    }
    refused_start(
        &instance,
        &world.host,
        "--inside veth0=10.0.0.1/24 --inside tap8=10.0.8.1/24",
        &["another version of tapnat", "--fresh", &way_out],
    )?;
    ensure!(path.exists(), "the other version's tables are gone");
    let _process = instance.start(&["--inside", "veth0=10.0.0.1/24", "--fresh"])?;
    instance.ask_json("status")?;
    ensure!(
        world.host.device_index("tap7")?.is_none(),
        "the other version's tap stayed"
    );
    Ok(())
}

/// As with `ip netns exec` where the first process's mount namespace is out of reach.
#[test]
fn tables_in_another_mount_namespace_are_said_to_be_there() -> Result<()> {
    const WRAPPER: [&str; 6] = [
        "unshare",
        "--mount",
        "sh",
        "-ec",
        "mount -t bpf bpf /sys/fs/bpf; exec \"$@\"",
        "sh",
    ];
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&topology.host);
    let run = instance.command_under(&WRAPPER.map(str::to_owned), "run")?;
    let mut process = run.args(["--inside", "veth0=10.0.0.1/24"]).spawn()?;
    process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
    let output = instance.command("status")?.output()?;
    ensure!(
        output.status.code() == Some(1)
            && output.stderr.contains("mount namespace of its process")
            && output.stderr.contains("nsenter"),
        "{output:?}"
    );
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    Ok(())
}
