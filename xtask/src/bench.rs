//! `cargo xtask bench`: builds the benchmarks and the `tapnat` that they measure, and runs them. What
//! is measured, and how, is the business of `bench/`.

use std::ffi::OsString;

use anyhow::{Result, ensure};
use clap::Args;

use crate::setup::{self, Group};
use crate::{build, command};

/// Measure tapnat against the bare path and other NATs
#[derive(Args)]
pub struct Options {
    /// Fewer, shorter rounds, and benchmarks that are not optimised: to try it out, not to publish
    #[arg(long)]
    quick: bool,

    /// What to measure [default: everything]
    #[arg(value_name = "SCENARIO")]
    scenarios: Vec<String>,

    /// What follows `--` goes to the benchmarks: see `cargo xtask bench -- --help`
    #[arg(last = true, value_name = "BENCHMARK ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    ensure!(
        command::is_root(),
        "the benchmarks make network namespaces and load eBPF programs: run them as root"
    );
    setup::ensure(&[Group::Build, Group::Sandbox, Group::Test, Group::Bench])?;
    // What is measured is optimised either way: how long a start takes is its user side's doing, too.
    let tapnat = build::tapnat(&build::Options { release: true })?;
    let mut cargo = command::cargo("run");
    cargo.args(["--package", "tapnat-bench"]);
    if !options.quick {
        cargo.arg("--release");
    }
    cargo.arg("--");
    if options.quick {
        cargo.arg("--quick");
    }
    cargo
        .arg("--output")
        .arg(command::target_directory().join("bench"))
        .args(&options.scenarios)
        .args(&options.arguments);
    command::run(cargo.env("TAPNAT_BIN", tapnat))
}
