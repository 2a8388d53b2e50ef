//! What an instance may do once it runs, and who else may look into it.

use std::{
    env, fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    process::Process,
    topology::{GUEST_DEVICE, Inside, Topology},
    traffic::{self, UdpReflector},
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    world::server,
};

/// Numbers of capabilities (`include/uapi/linux/capability.h`).
const NET_BIND_SERVICE: u32 = 10;
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

fn mask(numbers: &[u32]) -> u64 {
    numbers.iter().map(|number| 1 << number).sum()
}

/// A line of `/proc/PID/status`.
fn line(process: &Process, key: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id()))?;
    let found = status.lines().find_map(|line| line.strip_prefix(key));
    Ok(found
        .with_context(|| format!("no {key}"))?
        .trim()
        .to_owned())
}

fn unit() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/tapnat@.service");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn world() -> Result<Topology> {
    Topology::builder().inside(Inside::Veth).build()
}

/// All that a running instance does: new programs, tables, addresses, kernel
/// parameters, files.
fn check_everything_works(world: &Topology, instance: &Instance) -> Result<()> {
    let guest = &world.guests[0];
    world.host.ip("link delete veth0")?;
    instance.until(|status| status["devices"].as_array().is_some_and(|it| it.len() == 1))?;
    world
        .host
        .add_veth("veth0", &guest.namespace, GUEST_DEVICE)?;
    guest.namespace.ip(&format!(
        "address add {}/24 dev {GUEST_DEVICE}",
        guest.address
    ))?;
    guest
        .namespace
        .ip(&format!("route add default via {}", guest.gateway))?;
    // Its program is attached again.
    instance.until(|status| {
        let forwarding = world.host.read_sysctl("net.ipv4.conf.veth0.forwarding");
        status["devices"].as_array().is_some_and(|it| it.len() == 2)
            && forwarding.is_ok_and(|value| value.trim() == "1")
            && instance
                .pins()
                .join("links")
                .read_dir()
                .is_ok_and(|it| it.count() == 2)
    })?;
    instance.ask(
        "forward",
        &[
            "add",
            "tcp",
            "8080",
            "10.0.0.10:80",
            "--outside-address",
            "198.51.100.200",
        ],
    )?;
    let uplink = world.host.ip("-brief address show dev uplink0")?;
    ensure!(uplink.contains("198.51.100.200"), "{uplink}");
    let led = instance.pins().join("host").read_dir()?.count();
    ensure!(led > 0, "the host does not reach the forward");
    let sockets = world
        .host
        .exec("ss --no-header --listening --udp --numeric")?;
    ensure!(sockets.contains("%veth0:67"), "no DHCP: {sockets}");
    let server = UdpReflector::start(&world.world, server(0, 7))?;
    let local = std::net::SocketAddr::new(guest.address.into(), 0);
    let socket = traffic::udp_socket(&guest.namespace, local)?;
    traffic::reflect_udp(&socket, server.address(), b"still served")?;
    Ok(())
}

#[test]
fn a_running_instance_has_given_up_what_it_does_not_use() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let mut process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    let kept = mask(&[NET_BIND_SERVICE, NET_ADMIN, NET_RAW, PERFMON, BPF]);
    for key in ["CapEff:", "CapPrm:", "CapBnd:"] {
        let value = u64::from_str_radix(&line(&process, key)?, 16)?;
        // Only who mounted the BPF file system has to unmount it.
        let beyond = value & !mask(&[SYS_ADMIN]);
        let mounted = Path::new("/run/tapnat/bpffs-mounted").exists();
        ensure!(beyond == kept, "{key} {value:x}, not {kept:x}");
        ensure!(value == kept || mounted, "{key} {value:x}");
    }
    for key in ["CapInh:", "CapAmb:"] {
        ensure!(
            u64::from_str_radix(&line(&process, key)?, 16)? == 0,
            "{key}"
        );
    }
    ensure!(
        line(&process, "NoNewPrivs:")? == "1",
        "it may gain privileges"
    );
    ensure!(line(&process, "Threads:")? == "1", "others may have more");

    check_everything_works(&world, &instance)?;
    let status = process.terminate(PATIENCE)?;
    ensure!(status.success(), "{status}: {}", process.stderr());
    ensure!(
        !instance.pins().exists() && !instance.run_directory().exists(),
        "left behind"
    );
    Ok(())
}

#[test]
fn an_instance_lives_with_what_its_unit_allows() -> Result<()> {
    let unit = unit()?;
    let allowed = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .context("the unit allows everything")?;
    let allowed: Vec<_> = allowed
        .split_whitespace()
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let bounding = format!("--bounding-set=-all,{}", allowed.join(","));
    let world = world()?;
    let instance = Instance::new(&world.host);
    // As at boot: systemd has mounted it.
    let program = env::var_os("TAPNAT_BIN").context("run this with `cargo xtask test`")?;
    let start = || -> Result<Process> {
        let mut process = world
            .host
            .command("setpriv")
            .args([&bounding, "--no-new-privs"])
            .arg(&program)
            .args(["run", "--instance", instance.name()])
            .args([
                "--inside",
                "veth0=10.0.0.1/24",
                "--inside",
                "tap9=10.0.9.1/24",
            ])
            .spawn()?;
        process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
        Ok(process)
    };
    let mut process = start()?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let mut process = start()?;
    let status = process.terminate(PATIENCE)?;
    ensure!(status.success(), "{status}: {}", process.stderr());
    ensure!(world.host.device_index("tap9")?.is_none(), "the tap stayed");
    ensure!(
        !instance.pins().exists() && !instance.run_directory().exists(),
        "left behind"
    );
    Ok(())
}

#[test]
fn pins_and_state_are_roots_alone() -> Result<()> {
    let world = world()?;
    let instance = Instance::new(&world.host);
    let _process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    let mut paths = vec![instance.pins(), instance.run_directory()];
    let mut files = 0;
    while let Some(path) = paths.pop() {
        let metadata = fs::symlink_metadata(&path)?;
        let mode = metadata.permissions().mode();
        ensure!(metadata.uid() == 0, "{} is not root's", path.display());
        if metadata.is_dir() {
            // Nothing for the group, nor for others.
            ensure!(mode.trailing_zeros() >= 6, "{}: {mode:o}", path.display());
            for entry in fs::read_dir(&path)? {
                paths.push(entry?.path());
            }
        } else {
            files += 1;
        }
    }
    ensure!(files > 15, "only {files} files were looked at");
    // Who is not root is told so.
    let program = env::var_os("TAPNAT_BIN").context("run this with `cargo xtask test`")?;
    // It may not even be able to run the program where that was built.
    let copy = env::temp_dir().join(format!("{}-program", instance.name()));
    fs::copy(program, &copy)?;
    for verb in ["status", "flows", "reload", "down"] {
        let output = world
            .host
            .command("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&copy)
            .args([verb, "--instance", instance.name()])
            .output()?;
        ensure!(
            output.status.code() == Some(1) && output.stderr.contains("root"),
            "{verb}: {output:?}"
        );
    }
    fs::remove_file(&copy)?;
    Ok(())
}
