//! Prometheus' own judge of metrics, rules and queries: taken out of Debian's package, whose service
//! nobody here needs, and put under `target/promtool`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::apt::Apt;
use crate::command;

const PACKAGE: &str = "prometheus";
const PROGRAM: &str = "promtool";

/// Where it lies once it is there.
pub fn path() -> PathBuf {
    command::target_directory().join("promtool").join(PROGRAM)
}

pub fn is_present() -> bool {
    path().is_file()
}

/// Downloads the package and keeps this one program of it.
///
/// # Errors
/// When it cannot be downloaded, or has no such program.
pub fn install(apt: &mut Apt) -> Result<()> {
    let path = path();
    let directory = path.parent().context("a path without a directory")?;
    let partial = directory.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    let unpacked = partial.join("unpacked");
    fs::create_dir_all(&unpacked).with_context(|| format!("cannot make {}", unpacked.display()))?;
    apt.download(PACKAGE, &partial)?;
    let archive = super::guest_kernel::only_entry(&partial, &format!("{PACKAGE}_"))?;
    command::output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(&unpacked),
    )?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let program = unpacked.join("usr/bin").join(PROGRAM);
    fs::rename(&program, &path)
        .with_context(|| format!("{PACKAGE} has no {}", program.display()))?;
    fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))
}
