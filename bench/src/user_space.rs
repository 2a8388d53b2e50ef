//! NATs that are a process on the host, which has the other end of the guest's device and sends what
//! comes out of it on by sockets of its own. What is a NAT in the kernel is a
//! [`crate::contender::Contender`].

use std::{
    fmt, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    process::Process,
    topology::{GUEST_DEVICE, Topology, UPLINK},
};

/// How long one may take to give its guest a device.
const PATIENCE: Duration = Duration::from_secs(10);

/// A NAT in user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserSpace {
    /// `passt`, as it serves a network namespace.
    Pasta,
    Slirp,
}

impl UserSpace {
    /// Serves the first guest of this topology, in place of its cable. The process must go before
    /// the world does.
    ///
    /// # Errors
    ///
    /// When the program is missing, or the guest gets no way to the world.
    pub fn start(self, topology: &Topology) -> Result<Process> {
        let guest = &topology.guests.first().context("no guest")?.namespace;
        guest.ip(&format!("link delete {GUEST_DEVICE}"))?;
        let path = guest.path();
        let host = &topology.host;
        let mut process = match self {
            Self::Pasta => host
                .command("pasta")
                // Else it is nobody, who may not enter the guest's namespace.
                .args([
                    "--foreground",
                    "--runas",
                    "0",
                    "--config-net",
                    "--interface",
                    UPLINK,
                ])
                .arg("--netns")
                .arg(path),
            Self::Slirp => host
                .command("slirp4netns")
                .args(["--configure", "--mtu=65520", "--netns-type=path"])
                .arg(path)
                .arg(GUEST_DEVICE),
        }
        .spawn()?;
        let start = Instant::now();
        while guest.ip("route show default")?.trim().is_empty() {
            ensure!(
                process.is_running() && start.elapsed() < PATIENCE,
                "{self} gives its guest no way to the world: {}",
                process.stderr()
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }
}

impl fmt::Display for UserSpace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Pasta => "passt (pasta)",
            Self::Slirp => "slirp4netns",
        })
    }
}
