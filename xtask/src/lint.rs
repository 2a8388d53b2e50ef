//! `cargo xtask lint`: formatting, and Clippy on both sides of the workspace: the host's crates
//! with the stable toolchain, the eBPF crate for its own target with the toolchain that compiles it;
//! and the documents.
//! Which lints there are is decided in the workspace's `Cargo.toml`.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::ebpf_toolchain::{EbpfToolchain, TARGET};
use crate::setup::{self, Group};
use crate::{command, documents};

/// Runs the verb.
pub fn run() -> Result<()> {
    setup::ensure(&[Group::Build, Group::Lint])?;

    // `cargo fmt` knows no --locked.
    let mut format = Command::new("cargo");
    command::run(
        format
            .current_dir(command::workspace())
            .args(["fmt", "--all", "--check"]),
    )?;

    documents::check()?;

    let deny_warnings = ["--", "-D", "warnings"];
    command::run(
        command::cargo("clippy")
            .args(["--workspace", "--exclude", "tapnat-ebpf", "--all-targets"])
            .args(deny_warnings),
    )?;

    let toolchain = EbpfToolchain::detect().context("the toolchain for BPF has gone")?;
    let mut clippy = Command::new("rustup");
    clippy
        .current_dir(command::workspace())
        .args(["run", toolchain.name(), "cargo", "clippy", "--locked"])
        .args(["--package", "tapnat-ebpf", "--bins", "--target", TARGET])
        // Another compiler than the host's: in one directory each would undo the other's work.
        .arg("--target-dir")
        .arg(command::target_directory().join("lint-ebpf"));
    if toolchain == EbpfToolchain::Nightly {
        clippy.args(["-Z", "build-std=core"]);
    }
    command::run(clippy.args(deny_warnings))
}
