//! The Debian package, on a machine that has Debian, systemd and nothing else: a root of its own in a
//! mount, process and control group namespace, on a host of the testbed. What needs the package is
//! ignored unless `cargo xtask test dist` builds it.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tapnat_testbed::{
    Namespace,
    process::{Command, Process},
    snapshot::Snapshot,
    topology::{Inside, Tap, Topology},
    traffic::{HttpServer, TcpReflector, TcpSession, pattern},
};
use tapnat_tests::{
    instance::PATIENCE,
    newcomer, resolver,
    world::{OUTSIDE, server},
};

/// Mounts a root over the clean one and becomes its systemd.
const BOOT: &str = r#"
set -e
echo $$ > "$2/cgroup.procs"
exec unshare --mount --pid --uts --ipc --cgroup --fork --kill-child sh -ec '
    mount --make-rprivate /
    mount -t tmpfs machine /mnt
    mkdir /mnt/changes /mnt/work /mnt/root
    mount -t overlay -o "lowerdir=$1,upperdir=/mnt/changes,workdir=/mnt/work" machine /mnt/root
    cd /mnt/root
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    # As systemd does where it is not in a container.
    mount -t bpf bpf sys/fs/bpf
    mount -t tmpfs tmpfs dev
    mkdir dev/net dev/pts dev/shm
    for device in null zero full random urandom tty net/tun; do
        touch dev/$device
        mount --bind /dev/$device dev/$device
    done
    mount -t tmpfs tmpfs run
    mount -t tmpfs tmpfs tmp
    mkdir run/changes
    mount --bind /mnt/changes run/changes
    exec chroot . env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --log-target=null --show-status=no
' sh "$1"
"#;

/// What Debian's package manager writes down for itself, beneath the root.
const RECORDS: [&str; 6] = [
    "var/lib/dpkg",
    "var/log",
    "var/cache",
    "var/lib/systemd",
    "etc/machine-id",
    "run",
];

static MACHINES: AtomicU32 = AtomicU32::new(0);

/// A machine with a systemd of its own.
struct Machine {
    host: Namespace,
    /// Its first process, as the machine outside numbers it.
    first: u32,
    control_group: PathBuf,
    process: Option<Process>,
}

impl Machine {
    fn boot(host: &Namespace) -> Result<Self> {
        let root = env::var("TAPNAT_CLEAN_ROOT").context("run with `cargo xtask test dist`")?;
        let control_group = make_control_group()?;
        let process = host
            .command("sh")
            .args(["-c", BOOT, "sh", &root])
            .arg(&control_group)
            .spawn()?;
        let first = wait_for(|| only_child(process.id()))
            .with_context(|| format!("no first process: {}", process.stderr()))?;
        let machine = Self {
            host: host.clone(),
            first,
            control_group,
            process: Some(process),
        };
        wait_for(|| {
            let output = machine.command("systemctl is-system-running").output();
            output.ok().filter(|it| it.stdout.trim() == "running")
        })
        .context("systemd does not come up")?;
        Ok(machine)
    }

    /// A command line on the machine.
    fn command(&self, line: &str) -> Command {
        self.host
            .command("nsenter")
            .args(["--target", &self.first.to_string()])
            .args([
                "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd",
            ])
            .args(["sh", "-c", line])
            .timeout(PATIENCE)
    }

    fn run(&self, line: &str) -> Result<String> {
        self.command(line).run()
    }

    fn install(&self, variable: &str) -> Result<String> {
        let package = env::var(variable).context("run with `cargo xtask test dist`")?;
        let inside = format!("/proc/{}/root/tmp/tapnat.deb", self.first);
        fs::copy(&package, &inside).with_context(|| format!("cannot copy {package}"))?;
        self.run("dpkg --install /tmp/tapnat.deb && rm /tmp/tapnat.deb")
    }

    fn main_process(&self) -> Result<String> {
        let shown = self.run("systemctl show --property MainPID --value tapnat@default")?;
        Ok(shown.trim().to_owned())
    }

    /// Files that the root has more than the clean one, or that changed, but
    /// for what the package manager keeps.
    fn changes(&self) -> Result<BTreeSet<String>> {
        let list = self.run("cd /run/changes && find . ! -type d")?;
        Ok(list
            .lines()
            .map(|line| line.trim_start_matches("./").to_owned())
            .filter(|path| !RECORDS.iter().any(|record| path.starts_with(record)))
            .collect())
    }

    fn pins(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/sys/fs/bpf/tapnat", self.first))
    }

    fn has_unit(&self) -> Result<bool> {
        let units = self.run("systemctl list-unit-files --no-legend 'tapnat@*'; true")?;
        Ok(!units.trim().is_empty())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.process = None;
        // Its processes end a little later than the one that waits for them. What is left all the
        // same goes with the next machine.
        let _ = wait_for(|| {
            remove_control_group(&self.control_group);
            (!self.control_group.exists()).then_some(())
        });
    }
}

fn make_control_group() -> Result<PathBuf> {
    let root = Command::new("findmnt")
        .args(["--noheadings", "--first-only", "--types", "cgroup2"])
        .args(["--output", "TARGET"])
        .run()
        .context("there is no control group file system of version 2")?;
    let root = Path::new(root.trim());
    for entry in fs::read_dir(root)?.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|it| it.strip_prefix("tapnat-machine-")?.split('-').next());
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
            remove_control_group(&entry.path());
        }
    }
    let number = MACHINES.fetch_add(1, Ordering::Relaxed);
    let path = root.join(format!("tapnat-machine-{}-{number}", process::id()));
    fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

fn remove_control_group(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_control_group(&entry.path());
        }
    }
    // One that is in use stays.
    let _ = fs::remove_dir(path);
}

/// The process that another one waits for, once it is systemd.
fn only_child(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    let child = children.split_whitespace().next()?.parse().ok()?;
    let name = fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
    (name.trim() == "systemd").then_some(child)
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if start.elapsed() > PATIENCE {
            bail!("not within {PATIENCE:?}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
#[ignore = "builds packages and a root: `cargo xtask test dist`"]
fn the_package_serves_a_guest_through_an_upgrade_and_leaves_nothing() -> Result<()> {
    let topology = Topology::builder()
        .inside(Inside::Tap(Tap::default()))
        .build()?;
    let machine = Machine::boot(&topology.host)?;
    let clean = machine.changes()?;
    let before = Snapshot::take(&topology.host, &machine.pins())?;

    machine.install("TAPNAT_OLD_PACKAGE")?;
    ensure!(machine.run("tapnat --version")?.starts_with("tapnat "));
    machine.run("tapnat check")?;
    machine.run("systemd-analyze verify /lib/systemd/system/tapnat@.service")?;
    ensure!(
        machine
            .run("systemctl is-enabled tapnat@default; true")?
            .trim()
            == "disabled",
        "the package enables what nobody asked for"
    );

    machine.run("printf 'nat-log = \"journald\"\\n# Mine.\\n' >> /etc/tapnat/tapnat.toml")?;
    machine.run("systemctl enable --now tapnat@default || { journalctl -n 30 >&2; false; }")?;
    let reflector = TcpReflector::start(&topology.world, server(0, 7))?;
    let mut session = TcpSession::open(&topology.guests[0].namespace, None, reflector.address())?;
    session.exchange(&pattern(100_000))?;
    let whose = format!("tapnat who {}", session.seen());
    let said = wait_for(|| machine.run(&whose).ok()).context("who was it?")?;
    ensure!(said.contains("was 10.0.0.10:"), "{said}");

    // The unit shuts it in; the host's own sockets are led to guests all the same.
    let added = machine
        .command("tapnat forward add tcp 8080 10.0.0.10:80")
        .output()?;
    ensure!(
        added.status.success() && added.stderr.is_empty(),
        "{added:?}"
    );
    machine.run("ls /sys/fs/bpf/tapnat/default/host/0")?;

    let old = machine.main_process()?;
    machine.install("TAPNAT_PACKAGE")?;
    wait_for(|| {
        let new = machine.main_process().ok()?;
        let state = machine.run("systemctl is-active tapnat@default").ok()?;
        (new != "0" && new != old && state.trim() == "active").then_some(())
    })
    .context("systemd does not start the new program")?;
    session
        .exchange(&pattern(100_000))
        .context("a session was lost in the upgrade")?;
    ensure!(
        machine
            .run("cat /etc/tapnat/tapnat.toml")?
            .ends_with("# Mine.\n"),
        "the upgrade changed the configuration"
    );
    let status = machine.run("systemctl status tapnat@default")?;
    ensure!(status.contains("tap0 10.0.0.1/24"), "{status}");

    machine.run("dpkg --purge tapnat")?;
    let after = Snapshot::take(&topology.host, &machine.pins())?;
    if let Some(difference) = before.difference(&after) {
        bail!("the host is not as it was:\n{difference}");
    }
    let left: Vec<_> = machine.changes()?.difference(&clean).cloned().collect();
    ensure!(left.is_empty(), "left: {left:?}");
    ensure!(!machine.has_unit()?, "systemd still knows the unit");
    let state = machine.run("ls -d /run/tapnat /sys/fs/bpf/tapnat 2>/dev/null; true")?;
    ensure!(state.is_empty(), "left: {state}");
    Ok(())
}

#[test]
#[ignore = "builds packages and a root: `cargo xtask test dist`"]
fn removing_ends_what_runs_and_keeps_what_was_configured() -> Result<()> {
    let topology = Topology::builder()
        .inside(Inside::Tap(Tap::default()))
        .build()?;
    let machine = Machine::boot(&topology.host)?;
    let before = Snapshot::take(&topology.host, &machine.pins())?;
    machine.install("TAPNAT_PACKAGE")?;
    // As QEMU does it, without systemd.
    machine.run("/usr/lib/tapnat/qemu-ifup tap0 < /dev/null > /dev/null 2>&1")?;
    let reflector = TcpReflector::start(&topology.world, server(0, 7))?;
    let guest = &topology.guests[0].namespace;
    let mut session = TcpSession::open(guest, None, reflector.address())?;
    session.exchange(&pattern(1000))?;

    // What it says when the script has ended.
    topology
        .host
        .ip("address delete 198.51.100.2/24 dev uplink0")?;
    let said = || machine.run("journalctl --output cat -t tapnat");
    let is_told = || said().is_ok_and(|it| it.contains("uplink0 lost its IPv4 address"));
    wait_for(|| is_told().then_some(()))
        .with_context(|| format!("what it says is lost: {:?}", said()))?;
    topology
        .host
        .ip("address add 198.51.100.2/24 dev uplink0")?;
    topology.host.ip("route add default via 198.51.100.1")?;

    machine.run("dpkg --remove tapnat")?;
    let after = Snapshot::take(&topology.host, &machine.pins())?;
    if let Some(difference) = before.difference(&after) {
        bail!("the host is not as it was:\n{difference}");
    }
    machine.run("test -e /etc/tapnat/tapnat.toml")?;
    machine.run("dpkg --purge tapnat")?;
    machine.run("test ! -e /etc/tapnat")?;
    Ok(())
}

#[test]
#[ignore = "builds packages and a root: `cargo xtask test dist`"]
fn a_guest_needs_nothing_but_the_package() -> Result<()> {
    let topology = Topology::builder().guests(0).build()?;
    // The host's own resolver is one that guests cannot reach.
    topology.host.ip("link set lo up")?;
    let _resolver = resolver::start(&topology.host, resolver::STUB)?;
    let http = HttpServer::start(&topology.world, server(0, 80))?;
    let machine = Machine::boot(&topology.host)?;
    machine.run(&format!(
        "echo nameserver {} > /etc/resolv.conf",
        resolver::STUB
    ))?;
    machine.install("TAPNAT_PACKAGE")?;
    machine.run("echo 'inside = \"tap0=10.0.0.1/24\"' > /etc/tapnat/tapnat.toml")?;
    machine.run("systemctl enable --now tapnat@default || { journalctl -n 30 >&2; false; }")?;

    let directory = tempfile::tempdir()?;
    let mut guest = newcomer::boot(&topology.host, directory.path())?;
    let seen = newcomer::fetch(&mut guest, http.address().port())?;
    ensure!(seen.ip() == OUTSIDE, "seen as {seen}");
    let flows = machine.run("tapnat flows --protocol tcp")?;
    ensure!(flows.contains(&server(0, 80).ip().to_string()), "{flows}");
    machine.run("dpkg --purge tapnat").map(drop)
}

fn check_configuration(text: &str) -> Result<()> {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile()?;
    file.write_all(text.as_bytes())?;
    let program = env::var_os("TAPNAT_BIN").context("run with `cargo xtask test`")?;
    let check = Command::new(program).arg("check").arg(file.path());
    check.run().map(drop).with_context(|| text.to_owned())
}

#[test]
fn the_configuration_and_the_examples_in_it_are_right() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/tapnat.toml");
    let text = fs::read_to_string(&path)?;
    check_configuration(&text)?;

    let example = |line: &&str| line.starts_with('#') && !line.starts_with("# ");
    let (insides, others): (Vec<_>, Vec<_>) = text
        .lines()
        .filter(example)
        .map(|line| &line[1..])
        .partition(|line| line.starts_with("inside"));
    ensure!(
        insides.len() > 1 && others.len() > 5,
        "{insides:?} {others:?}"
    );
    for inside in insides {
        check_configuration(&format!("{inside}\n{}\n", others.join("\n")))?;
    }
    Ok(())
}
