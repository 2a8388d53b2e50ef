//! `cargo xtask run`: builds `tapnat` and becomes it, so that signals and the exit code are its own.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::build;

/// Build `tapnat` and run it, as in `cargo xtask run -- run --inside tap0=10.0.0.1/24`
#[derive(Args)]
#[group(skip)]
pub struct Options {
    #[command(flatten)]
    build: build::Options,

    /// What follows `--` goes to `tapnat` as it is
    #[arg(last = true, value_name = "TAPNAT ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// Runs the verb. Returns only when `tapnat` could not be started.
pub fn run(options: Options) -> Result<()> {
    let tapnat = build::tapnat(&options.build)?;
    let error = Command::new(&tapnat).args(options.arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", tapnat.display()))
}
