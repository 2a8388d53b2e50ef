//! The root of a machine that has Debian, systemd and nothing else, for a package to be installed in.
//! Owns the directory `target/clean-root`; who installs something lays a file system over it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::apt::Apt;
use crate::command;

/// Whether the root is there.
pub fn is_present() -> bool {
    directory().is_dir()
}

/// Where the root lies once it is there.
pub fn directory() -> PathBuf {
    command::target_directory().join("clean-root")
}

/// Makes it.
///
/// # Errors
/// When packages cannot be had, the disk is full, or this is not root.
pub fn install(apt: &mut Apt) -> Result<()> {
    let directory = directory();
    let partial = directory.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    let (release, mirror) = apt.release()?;
    command::output(
        Command::new("debootstrap")
            .args(["--variant=minbase", "--include=systemd", &release])
            .arg(&partial)
            .arg(&mirror),
    )?;
    fs::rename(&partial, &directory).with_context(|| format!("cannot rename {}", partial.display()))
}
