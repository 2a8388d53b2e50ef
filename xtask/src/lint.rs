//! `cargo xtask lint`: formatting; the documents; and Clippy on both sides of the workspace: the
//! host's crates with the stable toolchain, the eBPF crates for their own target with the toolchain
//! that compiles it. Which lints there are is decided in the workspace's `Cargo.toml`.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::ebpf_toolchain::{EbpfToolchain, TARGET};
use crate::setup::{self, Group};
use crate::{command, documents};

const DENY_WARNINGS: [&str; 3] = ["--", "-D", "warnings"];

/// Runs the verb: every check, whether or not those before it fail.
pub fn run() -> Result<()> {
    setup::ensure(&[Group::Build, Group::Lint])?;
    let mut failed = 0;
    for check in [check_format, documents::check, lint_host, lint_ebpf] {
        if let Err(error) = check() {
            eprintln!("error: {error:#}");
            failed += 1;
        }
    }
    ensure!(failed == 0, "{failed} of the checks above failed");
    Ok(())
}

fn check_format() -> Result<()> {
    // `cargo fmt` knows no --locked.
    let mut cargo = Command::new("cargo");
    command::run(
        cargo
            .current_dir(command::workspace())
            .args(["fmt", "--all", "--check"]),
    )
}

fn lint_host() -> Result<()> {
    let mut clippy = command::cargo("clippy");
    clippy
        .args(["--workspace", "--all-targets"])
        .args(command::EXCLUDE_EBPF);
    command::run(clippy.args(DENY_WARNINGS))
}

fn lint_ebpf() -> Result<()> {
    let toolchain = EbpfToolchain::detect().context("there is no compiler for BPF")?;
    let mut clippy = Command::new("rustup");
    clippy
        .current_dir(command::workspace())
        .args(["run", toolchain.name(), "cargo", "clippy", "--locked"])
        .args(["--package", "tapnat-ebpf", "--package", "tapnat-bench-ebpf"])
        .args(["--bins", "--target", TARGET])
        // Another compiler than the host's: in one directory each would undo the other's work.
        .arg("--target-dir")
        .arg(command::target_directory().join("lint-ebpf"));
    if toolchain == EbpfToolchain::Nightly {
        clippy.args(["-Z", "build-std=core"]);
    }
    command::run(clippy.args(DENY_WARNINGS))
}
