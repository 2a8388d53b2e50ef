//! An instance of the built `tapnat` on a host of the testbed, taken away
//! when the test is done with it.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    process::{Command, Process},
};

/// Where the built program is found, see `cargo xtask test`.
const PROGRAM: &str = "TAPNAT_BIN";
/// How long a start or an end may take on a busy machine, which may be emulated.
pub const PATIENCE: Duration = Duration::from_secs(90);

const PINS: &str = "/sys/fs/bpf/tapnat";
const RUN: &str = "/run/tapnat";
const PREFIX: &str = "test-";

static COUNTER: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// A name for an instance and the host that it runs on.
#[derive(Debug)]
pub struct Instance {
    host: Namespace,
    name: String,
    /// In place of the one that is tested.
    program: Option<OsString>,
}

impl Instance {
    /// Chooses a name that no other test has. Starts nothing.
    #[must_use]
    pub fn new(host: &Namespace) -> Self {
        SWEEP.call_once(sweep);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        Self {
            host: host.clone(),
            name: format!("{PREFIX}{}-{number}", std::process::id()),
            program: None,
        }
    }

    /// Lets another build of the program run from now on.
    pub fn use_program(&mut self, program: impl Into<OsString>) {
        self.program = Some(program.into());
    }

    /// Lets the program see this file as /etc/resolv.conf from now on. What is written to it later
    /// it sees, too.
    ///
    /// # Errors
    /// Files cannot be written.
    pub fn use_resolvers(&mut self, file: &Path) -> Result<()> {
        const MOUNT: &str = "mount --bind \"$1\" /etc/resolv.conf; shift; exec \"$@\"";
        let program = self.program()?;
        let wrapper = file.with_extension("tapnat");
        let script = format!(
            "#!/bin/sh\nexec unshare --mount sh -ec '{MOUNT}' sh '{}' '{}' \"$@\"\n",
            file.display(),
            program.display(),
        );
        fs::write(&wrapper, script)?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        self.use_program(wrapper);
        Ok(())
    }

    /// What the program says that it is.
    ///
    /// # Errors
    /// The program is not known, or does not start.
    pub fn version(&self) -> Result<String> {
        self.host.command(self.program()?).arg("--version").run()
    }

    fn program(&self) -> Result<OsString> {
        self.program.clone().map_or_else(program, Ok)
    }

    /// The name, for `--instance`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its maps and links are pinned while it is up.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        Path::new(PINS).join(&self.name)
    }

    /// Where its lock and its journal are while it is up.
    #[must_use]
    pub fn run_directory(&self) -> PathBuf {
        Path::new(RUN).join(&self.name)
    }

    /// A verb of the program for this instance, to be run on the host.
    ///
    /// # Errors
    /// The program is not known.
    pub fn command(&self, verb: &str) -> Result<Command> {
        self.command_in(&self.host, verb)
    }

    /// A verb of the program for this instance, to be run on another host.
    ///
    /// # Errors
    /// The program is not known.
    pub fn command_in(&self, host: &Namespace, verb: &str) -> Result<Command> {
        Ok(host
            .command(self.program()?)
            .args([verb, "--instance", &self.name])
            .timeout(PATIENCE))
    }

    /// A verb of the program for this instance, to be run on the host by another program with
    /// these arguments before its own.
    ///
    /// # Errors
    /// The program is not known.
    pub fn command_under(&self, wrapper: &[String], verb: &str) -> Result<Command> {
        let (first, arguments) = wrapper.split_first().context("no wrapper")?;
        Ok(self
            .host
            .command(first)
            .args(arguments)
            .arg(self.program()?)
            .args([verb, "--instance", &self.name])
            .timeout(PATIENCE))
    }

    /// Starts `tapnat run` with these arguments and waits until it is ready.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn start(&self, arguments: &[&str]) -> Result<Process> {
        let mut process = self.command("run")?.args(arguments).spawn()?;
        process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
        Ok(process)
    }

    /// What a verb prints.
    ///
    /// # Errors
    /// It fails; the error quotes what it said.
    pub fn ask(&self, verb: &str, arguments: &[&str]) -> Result<String> {
        self.command(verb)?.args(arguments).run()
    }

    /// What a verb prints with `--json`.
    ///
    /// # Errors
    /// It fails, or prints something else.
    pub fn ask_json(&self, verb: &str) -> Result<serde_json::Value> {
        let text = self.ask(verb, &["--json"])?;
        serde_json::from_str(&text).with_context(|| format!("`tapnat {verb} --json`: {text}"))
    }

    /// How many packets left for this reason, as `tapnat status` counts them.
    ///
    /// # Errors
    /// It fails, or knows no such reason.
    pub fn count(&self, reason: &str) -> Result<u64> {
        let status = self.ask_json("status")?;
        let reasons = status["reasons"].as_array();
        reasons
            .and_then(|reasons| reasons.iter().find(|it| it["reason"] == reason))
            .and_then(|it| it["packets"].as_u64())
            .with_context(|| format!("no reason {reason}: {status}"))
    }

    /// Waits until `tapnat status --json` shows what it should.
    ///
    /// # Errors
    /// It does not come to that; the error quotes what it shows.
    pub fn until(&self, holds: impl Fn(&serde_json::Value) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let status = self.ask_json("status")?;
            if holds(&status) {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "{status}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // The test has its verdict already; the next run would not mind.
        let _ = self.command("down").and_then(Command::output);
    }
}

/// What a process has: memory in KiB, and descriptors.
///
/// # Errors
/// It has ended.
pub fn size(process: u32) -> Result<(u64, usize)> {
    let directory = format!("/proc/{process}");
    let status = fs::read_to_string(format!("{directory}/status"))?;
    let memory = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse().ok())
        .context("no VmRSS")?;
    Ok((memory, fs::read_dir(format!("{directory}/fd"))?.count()))
}

/// Removes what killed tests left of their instances. Their processes and
/// namespaces went when the host of this one was made.
fn sweep() {
    for directory in [PINS, RUN] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(is_orphan) {
                // Another test program may be at it, too.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Whether the process that gave an instance this name is no more.
fn is_orphan(name: &str) -> bool {
    let numbers = name.strip_prefix(PREFIX);
    let Some((process, number)) = numbers.and_then(|it| it.split_once('-')) else {
        return false;
    };
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    is_number(process) && is_number(number) && !Path::new("/proc").join(process).exists()
}

fn program() -> Result<OsString> {
    env::var_os(PROGRAM)
        .with_context(|| format!("{PROGRAM} is not set: run the tests with `cargo xtask test`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_killed_tests_left_is_an_orphan() {
        // Numbers of processes end at 2^22.
        assert!(is_orphan("test-4194305-3"));
        assert!(!is_orphan(&format!("test-{}-3", std::process::id())));
        for name in [
            "default",
            "test",
            "test-4194305",
            "test-mine-3",
            "test-4194305-x",
        ] {
            assert!(!is_orphan(name), "{name}");
        }
    }
}
