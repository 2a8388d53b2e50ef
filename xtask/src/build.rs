//! `cargo xtask build`: leaves the `tapnat` program, with the eBPF object inside, in the target
//! directory. The eBPF object itself is the business of tapnat-user's build script.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::command;
use crate::setup::{self, Group};

/// Build the `tapnat` program
#[derive(Args, Default)]
pub struct Options {
    /// Optimise: the program is then target/release/tapnat, not target/debug/tapnat
    #[arg(long)]
    pub release: bool,
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    tapnat(options).map(drop)
}

/// Builds `tapnat` and returns the program's path.
///
/// # Errors
/// When something that building needs is missing and cannot be installed, or the build fails.
pub fn tapnat(options: &Options) -> Result<PathBuf> {
    setup::ensure(&[Group::Build])?;
    program("tapnat-user", "tapnat", options)
}

/// Builds a program of one of the workspace's packages and returns the program's path.
///
/// # Errors
/// When the build fails.
pub fn program(package: &str, name: &str, options: &Options) -> Result<PathBuf> {
    let mut cargo = command::cargo("build");
    cargo.args(["--package", package, "--bin", name]);
    if options.release {
        cargo.arg("--release");
    }
    command::run(&mut cargo)?;
    let profile = if options.release { "release" } else { "debug" };
    Ok(command::target_directory().join(profile).join(name))
}
