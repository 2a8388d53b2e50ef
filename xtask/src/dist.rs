//! `cargo xtask dist`: a Debian package of tapnat, built by cargo-deb. What is in it stands in
//! `tapnat-user/Cargo.toml` under `[package.metadata.deb]`, what it does on a machine in
//! `packaging/debian`; man pages and completions are made by the program in `packaging/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::setup::{self, Group};
use crate::{build, command};

/// Build a Debian package: the program, its man pages, completions, unit and configuration
#[derive(Args)]
pub struct Options {
    /// Of a build that is not optimised
    #[arg(long)]
    debug: bool,
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    let build = build::Options {
        release: !options.debug,
    };
    println!("{}", package(&build, None)?.display());
    Ok(())
}

/// Builds the package, of this version of tapnat or of one that is only said to be another, and
/// returns its path.
///
/// # Errors
/// When something that building needs is missing and cannot be installed, or the build fails.
pub fn package(build: &build::Options, version: Option<&str>) -> Result<PathBuf> {
    setup::ensure(&[Group::Build, Group::Dist])?;
    let tapnat = build::tapnat(build)?;
    let generator = build::program("tapnat-packaging", "tapnat-packaging", build)?;
    let directory = tapnat.parent().context("the program has no directory")?;
    command::run(Command::new(generator).arg(directory.join("dist")))?;
    assemble(build, version).map(PathBuf::from)
}

/// Puts together what has been built.
fn assemble(build: &build::Options, version: Option<&str>) -> Result<String> {
    let mut cargo = command::cargo("deb");
    cargo.args(["--package", "tapnat-user", "--no-build", "--quiet"]);
    if !build.release {
        // Of no use but to tests.
        cargo.args(["--profile", "dev", "--fast"]);
    }
    if let Some(version) = version {
        // Cargo-deb takes other versions away from where it puts one.
        let directory = command::target_directory().join("dist").join(version);
        cargo.args(["--deb-version", version]);
        cargo.arg("--output").arg(directory.join("tapnat.deb"));
    }
    // It prints the path.
    let path = command::output(&mut cargo)?.trim().to_owned();
    ensure!(
        Path::new(&path).is_file(),
        "cargo deb said `{path}`, and there is no such file"
    );
    Ok(path)
}
