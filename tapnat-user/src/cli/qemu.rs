//! `tapnat qemu-ifup` and `tapnat qemu-ifdown`: what QEMU runs when a guest's tap comes and goes
//! (`-netdev tap,script=..,downscript=..`). They see to it that an instance serves the tap; how, is
//! the instance's business.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::{Instant, sleep},
};

use super::{Instance, file};
use crate::{
    daemon,
    host::netlink::{Device, Netlink},
    instance::{InstanceName, Lock},
    journal::{Journal, Role},
    progress::Progress,
};

/// In an instance's run directory: it was started for a guest, and ends with the last one.
const STARTED: &str = "started-by-qemu-ifup";
/// How long an instance may take to serve a tap that is there.
const PATIENCE: Duration = Duration::from_secs(10);
const PERIOD: Duration = Duration::from_millis(20);

#[derive(Debug, Args)]
pub struct Up {
    /// The tap, as QEMU says
    #[arg(value_name = "TAP")]
    tap: String,

    /// What a new instance without a configuration file serves
    #[arg(
        long,
        value_name = "DEVICE=ADDRESS/PREFIX",
        default_value = "tap*=10.0.0.1/24"
    )]
    inside: String,

    #[command(flatten)]
    instance: Instance,
}

#[derive(Debug, Args)]
pub struct Down {
    /// The tap, as QEMU says
    #[arg(value_name = "TAP")]
    tap: String,

    #[command(flatten)]
    instance: Instance,
}

impl Up {
    pub async fn execute(self) -> Result<()> {
        let instance = &self.instance.name;
        ensure!(
            Netlink::open()?.link(&self.tap).await?.is_some(),
            "there is no device {}: this is for QEMU to call, when it has made the tap",
            self.tap
        );
        if Lock::holder(instance).is_none() {
            self.start().await?;
        }
        let _progress = Progress::waiting("tapnat begins to serve the tap");
        let deadline = Instant::now() + PATIENCE;
        while served(instance)?.iter().all(|it| it.name != self.tap) {
            ensure!(
                Lock::holder(instance).is_some(),
                "the tapnat instance '{instance}' has ended: see why with `tapnat run --instance \
                 {instance} --inside '{}'`",
                self.inside
            );
            ensure!(
                Instant::now() < deadline,
                "the tapnat instance '{instance}' runs, but does not serve {tap}: start it with \
                 --inside 'tap*=10.0.0.1/24' or another pattern that {tap} fits, or name the tap \
                 (ifname=) as one that it serves",
                tap = self.tap
            );
            sleep(PERIOD).await;
        }
        Ok(())
    }

    /// Starts an instance that outlives QEMU, and waits until it is ready.
    async fn start(&self) -> Result<()> {
        let instance = &self.instance.name;
        let program = env::current_exe().context("cannot tell where tapnat is")?;
        let mut command = std::process::Command::new(program);
        command.args(["run", "--instance", instance.as_str()]);
        if !file::default_path(instance).exists() {
            command.args(["--inside", &self.inside]);
        }
        // Signals of QEMU's terminal are not for it.
        command.process_group(0);
        command.stdin(Stdio::null());
        let (mut said, end) = UnixStream::pair().context("cannot make a pair of sockets")?;
        command.stdout(Stdio::piped()).stderr(OwnedFd::from(end));
        let mut child = Command::from(command)
            .spawn()
            .context("cannot start tapnat")?;
        if is_ready(&mut child).await? {
            // What it says from now on goes to the journal; what it has said is there to be read.
            said.shutdown(Shutdown::Read)
                .context("cannot take leave of tapnat")?;
            let said = read(&mut said)?;
            // Who has closed it does not want to know.
            let _ = io::stderr().write_all(&said);
            return mark(instance);
        }
        if Lock::holder(instance).is_some() {
            // Another guest's script was faster.
            return Ok(());
        }
        bail!("{}", told(&read(&mut said)?));
    }
}

/// All that the instance said, until it ended or we took leave.
fn read(said: &mut UnixStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    said.read_to_end(&mut bytes)
        .context("cannot read what tapnat said")?;
    Ok(bytes)
}

/// Waits until the instance translates; `false` if it ends.
async fn is_ready(child: &mut Child) -> Result<bool> {
    let stdout = child.stdout.take().context("no output")?;
    let mut lines = BufReader::new(stdout).lines();
    while let Some(line) = lines.next_line().await? {
        if line.starts_with("tapnat ready") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What an instance that did not start said last, without the program's name.
fn told(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let last = text.lines().last().unwrap_or("tapnat did not start");
    last.strip_prefix("tapnat: ").unwrap_or(last).to_owned()
}

impl Down {
    pub async fn execute(self) -> Result<()> {
        let instance = &self.instance.name;
        // The instance may not have noticed yet which taps are gone.
        let links = Netlink::open()?.links().await?;
        let others = served(instance)?.into_iter().any(|device| {
            device.name != self.tap && links.iter().any(|link| link.index == device.index)
        });
        if marker(instance).exists() && !others {
            daemon::down(instance).await?;
        }
        Ok(())
    }
}

/// The inside devices that the instance serves.
fn served(instance: &InstanceName) -> Result<Vec<Device>> {
    let Some(journal) = Journal::load(instance)? else {
        return Ok(Vec::new());
    };
    let claims = journal.claims().iter();
    Ok(claims
        .filter(|claim| claim.role == Role::Inside)
        .map(|claim| claim.device.clone())
        .collect())
}

fn marker(instance: &InstanceName) -> PathBuf {
    instance.run_directory().join(STARTED)
}

fn mark(instance: &InstanceName) -> Result<()> {
    let path = marker(instance);
    match fs::write(&path, "") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot write {}", path.display()))
        }
        _ => Ok(()),
    }
}
