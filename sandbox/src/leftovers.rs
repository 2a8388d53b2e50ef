//! Looks whether anything of this process's sandbox is still there. Starts no program, so that it also
//! works while a signal ends the process.

use std::{
    env, fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use procfs::process::all_processes;

use crate::instance::Instance;

/// What the proof is about.
pub const WHAT: &str = "no namespace, device, process, pin or file of the sandbox is left";

const PATIENCE: Duration = Duration::from_secs(3);

/// The state of a process that has ended, as the kernel writes it.
const ZOMBIE: char = 'Z';

/// Makes sure that nothing is left. A process that was killed has a moment to end.
///
/// # Errors
/// Something is left; the error names it.
pub fn check(instance: &Instance) -> Result<()> {
    let start = Instant::now();
    loop {
        let left = find(instance)?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "still there: {}",
            left.join(", ")
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn find(instance: &Instance) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for path in instance.directories() {
        if path.exists() {
            left.push(path.display().to_string());
        }
    }
    // The testbed's names say whose they are. Devices are gone with their namespaces.
    let prefix = format!("tapnat-{}-", std::process::id());
    for directory in [Path::new("/run/netns"), &env::temp_dir()] {
        // There is no such directory before the first namespace.
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                left.push(entry.path().display().to_string());
            }
        }
    }
    left.extend(children()?);
    Ok(left)
}

/// Processes that this one started and that have not ended.
fn children() -> Result<Vec<String>> {
    let me = std::process::id().cast_signed();
    let processes = all_processes().context("cannot list the processes")?;
    Ok(processes
        // One that ends while we look is no leftover.
        .filter_map(|process| process.ok()?.stat().ok())
        .filter(|process| process.ppid == me && process.state != ZOMBIE)
        .map(|process| format!("process {} ({})", process.pid, process.comm))
        .collect())
}
