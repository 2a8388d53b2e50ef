//! An instance comes and goes and leaves the host as it was, however it ends;
//! what it had is there for the next one.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{fs::MetadataExt as _, net::UnixDatagram},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{maps::MapInfo, programs::loaded_programs};
use nix::sys::signal::Signal;
use tapnat_common::abi::maps;
use tapnat_testbed::{
    Namespace,
    process::Process,
    snapshot::Snapshot,
    topology::{Guest, Inside, Topology, WORLD_ADDRESSES},
    traffic::{ping, start_pings},
};
use tapnat_tests::{
    both_families,
    family::Family,
    instance::{Instance, PATIENCE},
};

/// A host with an uplink, a guest on a veth, and no instance.
fn world() -> Result<Topology> {
    Topology::builder().inside(Inside::Veth).build()
}

/// The guest's veth, and a tap that is to be created. IPv6 is off on all devices of this host.
const BOTH: [&str; 4] = [
    "--inside",
    "veth0=10.0.0.1/24,fd00:7a70::1/64",
    "--inside",
    "tap9=10.0.9.1/24,fd00:7a70:0:9::1/64",
];

fn same(before: &Snapshot, instance: &Instance, host: &Namespace) -> Result<()> {
    let after = Snapshot::take(host, &instance.pins())?;
    if let Some(difference) = before.difference(&after) {
        anyhow::bail!("the host is not as it was:\n{difference}");
    }
    for path in [instance.pins(), instance.run_directory()] {
        ensure!(!path.exists(), "{} is still there", path.display());
    }
    Ok(())
}

#[test]
fn an_ended_instance_leaves_nothing_behind() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        for attach in ["tcx", "clsact"] {
            let world = world()?;
            let instance = Instance::new(&world.host);
            let before = Snapshot::take(&world.host, &instance.pins())?;
            let mut process = instance.start(&[&BOTH[..], &["--attach", attach]].concat())?;
            let during = Snapshot::take(&world.host, &instance.pins())?;
            ensure!(before.difference(&during).is_some(), "nothing was done");
            process.signal(signal)?;
            let status = process.wait(PATIENCE)?;
            ensure!(status.success(), "{status}: {}", process.stderr());
            same(&before, &instance, &world.host)?;
        }
    }
    Ok(())
}

#[test]
fn down_ends_a_running_instance() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let before = Snapshot::take(&world.host, &instance.pins())?;
    let mut process = instance.start(&BOTH)?;
    fs::write(instance.run_directory().join("of-another-version"), "")?;
    let output = instance.command("down")?.output()?;
    ensure!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    ensure!(process.wait(PATIENCE)?.success(), "{}", process.stderr());
    same(&before, &instance, &world.host)?;
    // There is nothing left to do, which is told but no failure.
    let output = instance.command("down")?.output()?;
    ensure!(
        output.status.success() && output.stderr.contains("nothing"),
        "{output:?}"
    );
    Ok(())
}

#[test]
fn a_signal_during_the_start_ends_it_cleanly() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let before = Snapshot::take(&world.host, &instance.pins())?;
    let mut process = instance.command("run")?.args(BOTH).spawn()?;
    while process.is_running() && !instance.run_directory().join("changes.json").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    process.signal(Signal::SIGTERM)?;
    ensure!(process.wait(PATIENCE)?.success(), "{}", process.stderr());
    same(&before, &instance, &world.host)
}

/// What stays the same while one instance takes over from another: the links'
/// identities, and the tables'.
fn identities(instance: &Instance) -> Result<Vec<(PathBuf, u64)>> {
    let mut identities = Vec::new();
    for directory in ["links", "maps"] {
        for entry in fs::read_dir(instance.pins().join(directory))? {
            let path = entry?.path();
            let inode = fs::metadata(&path)?.ino();
            identities.push((path, inode));
        }
    }
    identities.sort();
    Ok(identities)
}

#[test]
fn the_next_instance_takes_over_from_a_killed_one() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let before = Snapshot::take(&world.host, &instance.pins())?;
    let mut first = instance.start(&BOTH)?;
    first.signal(Signal::SIGKILL)?;
    first.wait(PATIENCE)?;
    let left = instance.ask_json("status")?;
    ensure!(left["process"].is_null(), "{left}");
    let there = identities(&instance)?;
    ensure!(!there.is_empty(), "nothing was left");

    let mut second = instance.start(&BOTH)?;
    ensure!(
        identities(&instance)? == there,
        "links or tables were made anew"
    );
    let status = instance.ask_json("status")?;
    ensure!(status["process"] == second.id(), "{status}");
    ensure!(status["devices"] == left["devices"], "{status}");

    // Taken over once more, by one that does without the tap.
    second.signal(Signal::SIGKILL)?;
    second.wait(PATIENCE)?;
    let mut third = instance.start(&BOTH[..2])?;
    ensure!(world.host.device_index("tap9")?.is_none(), "the tap stayed");
    ensure!(third.terminate(PATIENCE)?.success(), "{}", third.stderr());
    same(&before, &instance, &world.host)
}

/// The numbers that the kernel gave to the programs of an instance.
fn programs(instance: &Instance) -> Result<BTreeSet<u32>> {
    let table = |name: &str| {
        let info = MapInfo::from_pin(instance.pins().join("maps").join(name))?;
        Ok::<_, anyhow::Error>(info.id())
    };
    let tables = [table(maps::IPV4.settings)?, table(maps::IPV4.mappings)?];
    let programs: BTreeSet<_> = loaded_programs()
        .filter_map(Result::ok)
        .filter(|program| {
            let used = program.map_ids().ok().flatten().unwrap_or_default();
            tables.iter().any(|table| used.contains(table))
        })
        .map(|program| program.id())
        .collect();
    ensure!(!programs.is_empty(), "no program is loaded");
    Ok(programs)
}

/// The programs of an instance when the kernel has let go of all of these, which it does in its own
/// time.
fn others_than(earlier: &BTreeSet<u32>, instance: &Instance) -> Result<BTreeSet<u32>> {
    let start = std::time::Instant::now();
    loop {
        let programs = programs(instance)?;
        if programs.is_disjoint(earlier) {
            return Ok(programs);
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "{programs:?} are there, which were {earlier:?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn kill(process: &mut Process) -> Result<()> {
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    Ok(())
}

/// Begins a session and has an answer come back.
fn reach(guest: &Guest) -> Result<()> {
    let said = ping(&guest.namespace, WORLD_ADDRESSES[0].into(), 1, &[])?;
    ensure!(said.received == 1, "{}", said.output);
    Ok(())
}

#[test]
fn the_same_program_is_not_loaded_twice() -> Result<()> {
    let world = world()?;
    let guest = &world.guests[0];
    for attach in ["tcx", "clsact"] {
        let instance = Instance::new(&world.host);
        let before = Snapshot::take(&world.host, &instance.pins())?;
        let arguments = [&BOTH[..], &["--attach", attach]].concat();
        let mut process = instance.start(&arguments)?;
        // The host's own sockets are led to it.
        instance.ask("forward", &["add", "tcp", "8080", "10.0.0.10:80"])?;
        let there = programs(&instance)?;
        for _ in 0..2 {
            kill(&mut process)?;
            process = instance.start(&arguments)?;
            ensure!(programs(&instance)? == there, "{attach}: loaded anew");
            reach(guest)?;
        }
        ensure!(
            process.terminate(PATIENCE)?.success(),
            "{}",
            process.stderr()
        );
        same(&before, &instance, &world.host)?;
    }
    Ok(())
}

#[test]
fn a_program_that_is_wanted_later_joins_those_that_are_there() -> Result<()> {
    let world = Topology::builder().inside(Inside::Tun).build()?;
    let elsewhere = Namespace::new("elsewhere")?;
    world.host.add_veth("veth9", &elsewhere, "lan9")?;
    let instance = Instance::new(&world.host);
    let first = ["--inside", "veth9=10.0.9.1/24"];
    let mut process = instance.start(&first)?;
    let there = programs(&instance)?;
    kill(&mut process)?;
    // It has no link header, so that another program is for it.
    let both = [&first[..], &["--inside", "tun0=10.0.0.1/24"]].concat();
    let mut process = instance.start(&both)?;
    let more = programs(&instance)?;
    ensure!(
        more.is_superset(&there) && more.len() == there.len() + 1,
        "{there:?} became {more:?}"
    );
    // What is out of the ordinary goes on to programs that were there.
    reach(&world.guests[0])?;
    kill(&mut process)?;
    let _process = instance.start(&both)?;
    ensure!(programs(&instance)? == more, "loaded anew");
    reach(&world.guests[0])
}

#[test]
fn other_options_load_other_programs() -> Result<()> {
    let world = world()?;
    let guest = &world.guests[0];
    let instance = Instance::new(&world.host);
    let log = std::env::temp_dir().join(format!("{}.log", instance.name()));
    let log = log.to_str().context("an odd temporary directory")?;
    let mut process = instance.start(&BOTH)?;
    let mut there = programs(&instance)?;
    let links = identities(&instance)?;
    for (options, kept) in [
        (&["--count"][..], 0),
        (&["--verbose"], 0),
        // The ring of the log is another one, too.
        (&["--nat-log", log], 1),
        (&[], 1),
    ] {
        kill(&mut process)?;
        process = instance.start(&[&BOTH[..], options].concat())?;
        there = others_than(&there, &instance).with_context(|| format!("{options:?}"))?;
        let other = identities(&instance)?
            .iter()
            .filter(|it| !links.contains(it))
            .count();
        ensure!(
            other <= kept,
            "{options:?}: {other} links or tables are new"
        );
        reach(guest)?;
    }
    fs::remove_file(log)?;

    // A table that somebody took away is not that of the programs that are there.
    kill(&mut process)?;
    fs::remove_file(instance.pins().join("maps").join(maps::NAT_LOG))?;
    let _process = instance.start(&BOTH)?;
    others_than(&there, &instance)?;
    reach(guest)
}

#[test]
fn what_the_programs_say_is_heard_by_the_next_process() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let arguments = [&BOTH[..], &["--verbose"]].concat();
    let mut process = instance.start(&arguments)?;
    let there = programs(&instance)?;
    kill(&mut process)?;
    let mut process = instance.start(&arguments)?;
    ensure!(programs(&instance)? == there, "loaded anew");
    reach(&world.guests[0])?;
    process.wait_for_error_line(PATIENCE, |line| {
        line.starts_with("tapnat: session-started icmp ")
    })?;
    Ok(())
}

fn no_packet_is_lost_while_processes_are_killed_and_replaced(family: Family) -> Result<()> {
    let world = family.topology().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let devices = world.inside();
    let arguments: Vec<_> = devices
        .iter()
        .flat_map(|device| ["--inside", device])
        .collect();
    let mut process = instance.start(&arguments)?;
    let guest = &world
        .guests
        .first()
        .context("the world has no guest")?
        .namespace;
    let target = family.server(0, 0).ip();
    let check_ping = || -> Result<()> {
        let ping = ping(guest, target, 1, &[])?;
        ensure!(ping.received == 1, "{}", ping.output);
        Ok(())
    };
    check_ping()?;
    let mut pings = start_pings(guest, target, 600, Duration::from_millis(5))?;
    while pings.is_running() {
        process.signal(Signal::SIGKILL)?;
        process.wait(PATIENCE)?;
        check_ping().context("a new session without a process")?;
        process = instance.start(&arguments)?;
    }
    let lost = pings.lost()?;
    ensure!(lost.is_empty(), "{lost:?}");
    Ok(())
}
both_families!(no_packet_is_lost_while_processes_are_killed_and_replaced);

#[test]
fn a_kept_datapath_stays_until_down() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let before = Snapshot::take(&world.host, &instance.pins())?;
    let mut process = instance.start(&[&BOTH[..], &["--keep"]].concat())?;
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let status = instance.ask_json("status")?;
    ensure!(status["process"].is_null(), "{status}");
    ensure!(
        status["devices"]
            .as_array()
            .is_some_and(|devices| devices.len() == 3),
        "{status}"
    );
    instance.ask("down", &[])?;
    same(&before, &instance, &world.host)
}

#[test]
fn a_kept_datapath_of_another_size_is_only_replaced_when_asked() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    instance
        .start(&[&BOTH[..], &["--keep", "--max-sessions", "100"]].concat())?
        .terminate(PATIENCE)?;
    let other = [&BOTH[..], &["--max-sessions", "200"]].concat();
    let refused = instance.command("run")?.args(&other).output()?;
    ensure!(
        !refused.status.success() && refused.stderr.contains("--fresh"),
        "{refused:?}"
    );
    let capacity =
        |status: &serde_json::Value| status["families"]["ipv4"]["sessions"]["capacity"].clone();
    ensure!(
        capacity(&instance.ask_json("status")?) == 100,
        "the refusal changed something"
    );
    let _process = instance.start(&[&other[..], &["--fresh"]].concat())?;
    ensure!(
        capacity(&instance.ask_json("status")?) == 200,
        "the old tables stayed"
    );
    Ok(())
}

#[test]
fn down_elsewhere_says_where_to_go() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let before = Snapshot::take(&world.host, &instance.pins())?;
    let mut process = instance.start(&BOTH)?;
    let refused = || -> Result<()> {
        let refused = instance.command_in(&world.world, "down")?.output()?;
        let way = format!("nsenter --net={} tapnat down", world.host.path().display());
        ensure!(
            !refused.status.success() && refused.stderr.contains(&way),
            "{refused:?}"
        );
        ensure!(instance.pins().exists(), "the refusal took something away");
        Ok(())
    };
    refused()?;
    ensure!(
        instance.ask_json("status")?["process"] == process.id(),
        "it does not run any more"
    );
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    refused()?;
    instance.ask("down", &[])?;
    same(&before, &instance, &world.host)
}

#[test]
fn what_belonged_to_a_namespace_that_is_gone_can_be_taken_away() -> Result<()> {
    let world = world()?;
    let elsewhere = Namespace::new("elsewhere")?;
    let instance = Instance::new(&elsewhere);
    let mut process = instance
        .command_in(&world.host, "run")?
        .args(BOTH)
        .spawn()?;
    process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    drop(world);
    instance.ask("down", &[])?;
    ensure!(
        !instance.pins().exists() && !instance.run_directory().exists(),
        "something is left"
    );
    Ok(())
}

#[test]
fn instances_run_side_by_side_in_namespaces_with_the_same_devices() -> Result<()> {
    let worlds = [world()?, world()?];
    let instances = [
        Instance::new(&worlds[0].host),
        Instance::new(&worlds[1].host),
    ];
    let mut processes = Vec::new();
    for instance in &instances {
        processes.push(instance.start(&BOTH)?);
    }
    for instance in &instances {
        let status = instance.ask_json("status")?;
        ensure!(status["instance"] == instance.name(), "{status}");
    }
    for process in &mut processes {
        ensure!(
            process.terminate(PATIENCE)?.success(),
            "{}",
            process.stderr()
        );
    }
    Ok(())
}

#[test]
fn two_instances_of_one_host_share_the_reserved_ports() -> Result<()> {
    const KEY: &str = "net.ipv4.ip_local_reserved_ports";
    let world = world()?;
    world.host.sysctl(KEY, "40000")?;
    // A second way out, for the second instance.
    world.host.add_veth("uplink1", &world.world, "world1")?;
    world.host.ip("address add 192.0.2.129/25 dev uplink1")?;
    world.host.ip("link set uplink1 up")?;
    let (one, other) = (Instance::new(&world.host), Instance::new(&world.host));
    let mut first = one.start(&BOTH[..2])?;
    let reserved = world.host.read_sysctl(KEY)?;
    ensure!(reserved.trim() == "36864-60999", "{reserved}");
    let mut second = other.start(&[&BOTH[2..], &["--uplink", "uplink1"]].concat())?;
    ensure!(first.terminate(PATIENCE)?.success(), "{}", first.stderr());
    ensure!(
        world.host.read_sysctl(KEY)? == reserved,
        "the second's ports were given back"
    );
    // The operator adds one meanwhile.
    world.host.sysctl(KEY, "36864-60999,63000")?;
    ensure!(second.terminate(PATIENCE)?.success(), "{}", second.stderr());
    let reserved = world.host.read_sysctl(KEY)?;
    ensure!(reserved.trim() == "40000,63000", "{reserved}");
    Ok(())
}

#[test]
fn a_setting_that_somebody_changed_meanwhile_is_left_alone() -> Result<()> {
    const KEY: &str = "net.ipv4.conf.veth0.forwarding";
    let world = world()?;
    world.host.sysctl(KEY, "0")?;
    let instance = Instance::new(&world.host);
    let mut process = instance.start(&BOTH[..2])?;
    ensure!(
        world.host.read_sysctl(KEY)?.trim() == "1",
        "forwarding is off"
    );
    world.host.sysctl(KEY, "2")?;
    let status = process.terminate(PATIENCE)?;
    ensure!(
        status.success() && process.stderr().contains(KEY),
        "{}",
        process.stderr()
    );
    ensure!(
        world.host.read_sysctl(KEY)?.trim() == "2",
        "it was restored"
    );
    Ok(())
}

#[test]
fn the_service_manager_is_told() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let path = std::env::temp_dir().join(format!("{}.sock", instance.name()));
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut process = instance
        .command("run")?
        .args(BOTH)
        .env("NOTIFY_SOCKET", &path)
        .spawn()?;
    let mut told = String::new();
    for word in ["READY=1", "STOPPING=1"] {
        let mut buffer = [0; 1024];
        let length = socket.recv(&mut buffer)?;
        told = String::from_utf8_lossy(&buffer[..length]).into_owned();
        ensure!(told.lines().any(|line| line == word), "{told}");
        if word == "READY=1" {
            process.signal(Signal::SIGTERM)?;
        }
    }
    fs::remove_file(&path)?;
    ensure!(process.wait(PATIENCE)?.success(), "{told}");
    Ok(())
}
