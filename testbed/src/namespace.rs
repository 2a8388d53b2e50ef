//! Network namespaces that go away by themselves: named ones under
//! `/run/netns`, with `lo` up and, unless asked otherwise, without IPv6.
//!
//! Names are `tapnat-PID-NUMBER-ROLE`, with the number of the process that
//! made them, so that the next run can sweep away what a killed one left.
//! Devices between namespaces are made here; which hosts there are is
//! `topology`'s business.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cleanup::{self, Leftover, Registration},
    process::Command,
};

const DIRECTORY: &str = "/run/netns";
const PREFIX: &str = "tapnat-";

/// How long the kernel may take to notice a cable.
const CARRIER_PATIENCE: Duration = Duration::from_secs(5);

static COUNTER: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// A network namespace, deleted when the last clone of this handle is dropped.
///
/// Devices in it go when it is deleted. The kernel keeps a deleted namespace
/// alive while a socket or thread is still in it.
#[derive(Debug, Clone)]
pub struct Namespace {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    file: Arc<File>,
    _registration: Registration,
}

impl Namespace {
    /// Makes a namespace with `lo` up and IPv6 off; `role` is the readable
    /// end of its name.
    ///
    /// # Errors
    /// No root, or no `ip` command.
    pub fn new(role: &str) -> Result<Self> {
        let namespace = Self::with_ipv6(role)?;
        namespace.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
        namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        Ok(namespace)
    }

    /// The same with IPv6 left on, and with it the chatter of neighbour
    /// discovery.
    ///
    /// # Errors
    /// No root, or no `ip` command.
    pub fn with_ipv6(role: &str) -> Result<Self> {
        SWEEP.call_once(sweep);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{role}", std::process::id());
        // Before it is made, so that no signal falls between.
        let registration = cleanup::register(Leftover::Namespace(name.clone()));
        Command::new("ip")
            .args(["netns", "add", &name])
            .run()
            .context("cannot make a network namespace (root is needed)")?;
        let path = Path::new(DIRECTORY).join(&name);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let inner = Inner {
            name,
            file: Arc::new(file),
            _registration: registration,
        };
        let namespace = Self {
            inner: Arc::new(inner),
        };
        namespace.ip("link set lo up")?;
        // Link-local addresses are there at once: while they wait whether somebody else has them,
        // no neighbour is asked for what is forwarded (Linux, `ndisc_send_ns()`).
        for devices in ["all", "default"] {
            namespace.sysctl(&format!("net.ipv6.conf.{devices}.accept_dad"), "0")?;
        }
        Ok(namespace)
    }

    /// The name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The file to hand to `nsenter --net=`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.inner.name)
    }

    /// Runs a closure in the namespace, on a thread of its own. A socket made
    /// in it stays in the namespace wherever it is used later.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the closure's own error.
    ///
    /// # Panics
    /// When the closure panics.
    pub fn run<T: Send>(&self, task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let task = || {
                setns(&*self.inner.file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter namespace {}", self.inner.name))?;
                task()
            };
            match scope.spawn(task).join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A command that will run in the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Command::new(program).in_namespace(self.inner.file.clone())
    }

    /// Runs a line of words as a command and returns what it printed.
    ///
    /// # Errors
    /// The command's failure, with what it said.
    pub fn exec(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("empty command")?;
        self.command(program)
            .args(words)
            .run()
            .with_context(|| format!("in namespace {}", self.inner.name))
    }

    /// Runs `ip` with the words of `line` as arguments.
    ///
    /// # Errors
    /// The command's failure, with what it said.
    pub fn ip(&self, line: &str) -> Result<String> {
        self.exec(&format!("ip {line}"))
    }

    /// Sets a network setting of the namespace, by its dotted name. Dots that
    /// are part of a device's name are written as slashes.
    ///
    /// # Errors
    /// No such setting, or a value it does not take.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        self.run(|| {
            fs::write(&path, value)
                .with_context(|| format!("cannot write {value} to {}", path.display()))
        })
    }

    /// Reads a network setting of the namespace, by its dotted name.
    ///
    /// # Errors
    /// No such setting.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        self.run(|| {
            let value = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Ok(value.trim_end().to_owned())
        })
    }

    /// The index of a device, if the namespace has it.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn device_index(&self, device: &str) -> Result<Option<u32>> {
        self.run(|| Ok(nix::net::if_::if_nametoindex(device).ok()))
    }

    /// The Ethernet address of a device, as `ip` writes it.
    ///
    /// # Errors
    /// No such device, or it has no Ethernet address.
    pub fn mac_address(&self, device: &str) -> Result<String> {
        let links = self.ip(&format!("-json link show dev {device}"))?;
        let links: serde_json::Value =
            serde_json::from_str(&links).context("`ip -json` printed something else")?;
        let address = links
            .pointer("/0/address")
            .and_then(serde_json::Value::as_str);
        address
            .map(str::to_owned)
            .with_context(|| format!("{device} has no Ethernet address"))
    }

    /// Turns off the checksum offload of a device that this namespace sends
    /// by: its packets then leave with finished checksums (and unsegmented
    /// ones no longer leave at all).
    ///
    /// # Errors
    /// The device has no such switch, or no `ethtool` command.
    pub fn disable_checksum_offload(&self, device: &str) -> Result<()> {
        self.exec(&format!("ethtool -K {device} tx off")).map(drop)
    }

    /// Makes a veth pair between this namespace and `peer`, both ends up.
    ///
    /// # Errors
    /// A device of that name exists.
    pub fn add_veth(&self, device: &str, peer: &Self, peer_device: &str) -> Result<()> {
        self.ip(&format!(
            "link add {device} type veth peer name {peer_device} netns {}",
            peer.name()
        ))?;
        self.ip(&format!("link set {device} up"))?;
        peer.ip(&format!("link set {peer_device} up"))?;
        self.wait_for_carrier(device)?;
        peer.wait_for_carrier(peer_device)
    }

    /// Waits until the kernel has noticed that somebody is at the other end of
    /// a device, unless the device is down. Until then it loses what it is to
    /// send, and shows another state.
    ///
    /// # Errors
    /// No such device, or nobody is at its other end.
    pub fn wait_for_carrier(&self, device: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            let links = self.ip(&format!("-json link show dev {device}"))?;
            let links: serde_json::Value =
                serde_json::from_str(&links).context("`ip -json` printed something else")?;
            let flags = links.pointer("/0/flags").and_then(|flags| flags.as_array());
            let flags = flags.with_context(|| format!("`ip` shows no flags of {device}"))?;
            if flags.iter().all(|flag| flag != "NO-CARRIER") {
                return Ok(());
            }
            ensure!(
                start.elapsed() < CARRIER_PATIENCE,
                "{device} has no carrier: nobody is at its other end"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Moves a device to another namespace, where it arrives down and without
    /// addresses.
    ///
    /// # Errors
    /// No such device, or one that cannot move.
    pub fn move_device(&self, device: &str, to: &Self) -> Result<()> {
        self.ip(&format!("link set {device} netns {}", to.name()))
            .map(drop)
    }
}

fn sysctl_path(key: &str) -> PathBuf {
    let swapped = key.chars().map(|character| match character {
        '.' => '/',
        '/' => '.',
        other => other,
    });
    Path::new("/proc/sys").join(swapped.collect::<String>())
}

/// The process that made a namespace, from the namespace's name.
fn maker(name: &str) -> Option<u32> {
    let (process, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let (number, _role) = rest.split_once('-')?;
    number.parse::<u32>().ok()?;
    process.parse().ok()
}

/// Whether a thing of that name was left by a process that is no more.
fn is_orphan(name: &str) -> bool {
    maker(name).is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists())
}

/// Removes the directories of processes that are no more, whose names end so.
pub(crate) fn sweep_directories(parent: &Path, role: &str) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name
            .to_str()
            .is_some_and(|name| name.ends_with(role) && is_orphan(name))
        {
            drop(cleanup::register(Leftover::Directory(entry.path())));
        }
    }
}

/// Removes the namespaces of processes that are no more, and ends what still
/// runs in them.
fn sweep() {
    let Ok(entries) = fs::read_dir(DIRECTORY) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !is_orphan(name) {
            continue;
        }
        for inhabitant in Command::new("ip")
            .args(["netns", "pids", name])
            .run()
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.trim().parse().ok())
        {
            let _ = kill(Pid::from_raw(inhabitant), Signal::SIGKILL);
        }
        drop(cleanup::register(Leftover::Namespace(name.to_owned())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_maker() {
        assert_eq!(maker("tapnat-812-3-host"), Some(812));
        assert_eq!(maker("tapnat-812-3"), None);
        assert_eq!(maker("tapnat-box-3-host"), None);
        assert_eq!(maker("other-812-3-host"), None);
    }

    #[test]
    fn sysctl_names_follow_the_convention() {
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/5.forwarding"),
            Path::new("/proc/sys/net/ipv4/conf/eth0.5/forwarding")
        );
    }
}
