//! The sandbox's own instance of tapnat, with a name that tells whose it is.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;
use tapnat_testbed::{
    Namespace,
    process::{Command, Process},
};

/// How long a start or an end may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const PREFIX: &str = "sandbox-";
const RUN_DIRECTORY: &str = "/run/tapnat";
const PIN_DIRECTORY: &str = "/sys/fs/bpf/tapnat";

/// An instance that may or may not be up.
#[derive(Clone, Debug)]
pub struct Instance {
    pub program: PathBuf,
    name: String,
}

impl Instance {
    /// The instance of this process.
    pub fn new(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            name: format!("{PREFIX}{}", std::process::id()),
        }
    }

    /// Where its maps and links are pinned while it is up.
    pub fn pins(&self) -> PathBuf {
        Path::new(PIN_DIRECTORY).join(&self.name)
    }

    /// What there is of it outside the host's network while it is up.
    pub fn directories(&self) -> [PathBuf; 2] {
        [self.pins(), Path::new(RUN_DIRECTORY).join(&self.name)]
    }

    /// Starts `tapnat run` and waits until packets are translated.
    ///
    /// # Errors
    /// It does not become ready; the error quotes what it said.
    pub fn start(&self, host: &Namespace, arguments: &[&str]) -> Result<Process> {
        let mut process = self
            .command(host, "run")
            .args(arguments)
            .grace(PATIENCE)
            .spawn()?;
        process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
        Ok(process)
    }

    /// Ends what [`start`](Self::start) started. Returns its warnings.
    ///
    /// # Errors
    /// It does not end, or could not take everything away.
    pub fn end(mut process: Process) -> Result<String> {
        let status = process.terminate(PATIENCE)?;
        let said = process.stderr();
        anyhow::ensure!(status.success(), "`tapnat run` failed ({status}): {said}");
        Ok(said)
    }

    /// What a verb prints with `--json`.
    ///
    /// # Errors
    /// It fails, or prints something else.
    pub fn ask_json<T: DeserializeOwned>(&self, host: &Namespace, verb: &str) -> Result<T> {
        let text = self.command(host, verb).arg("--json").run()?;
        serde_json::from_str(&text).with_context(|| format!("`tapnat {verb} --json`: {text}"))
    }

    /// Takes away what sandboxes left that were killed. Their network namespaces are gone already.
    ///
    /// # Errors
    /// tapnat cannot take it away.
    pub fn sweep(&self, host: &Namespace) -> Result<()> {
        let names = [RUN_DIRECTORY, PIN_DIRECTORY]
            .into_iter()
            // Neither is there when no instance is.
            .filter_map(|directory| fs::read_dir(directory).ok())
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        for name in names.filter(|name| is_orphan(name)) {
            let left = Self {
                name,
                ..self.clone()
            };
            left.command(host, "down").run()?;
        }
        Ok(())
    }

    fn command(&self, host: &Namespace, verb: &str) -> Command {
        host.command(&self.program)
            .args([verb, "--instance", &self.name])
            .timeout(PATIENCE)
    }
}

/// Whether an instance is of a sandbox whose process is no more.
fn is_orphan(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|process| process.parse::<u32>().ok())
        .is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists())
}

/// The program's path as one would type it here.
pub fn as_typed(program: &Path) -> String {
    let here = env::current_dir().unwrap_or_default();
    let short = program.strip_prefix(here).unwrap_or(program);
    short.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sandboxes_of_dead_processes_are_orphans() {
        assert!(!is_orphan(&format!("{PREFIX}{}", std::process::id())));
        assert!(is_orphan(&format!("{PREFIX}{}", u32::MAX)));
        assert!(!is_orphan("default"));
        assert!(!is_orphan("sandbox-of-mine"));
    }
}
