//! `bpf-linker`, built from crates.io against the LLVM of the compiler whose output it reads.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::apt::Apt;
use crate::command;
use crate::ebpf_toolchain::EbpfToolchain;

const VERSION: &str = "0.13.0";

/// The LLVM releases that this bpf-linker can be built with.
const SUPPORTED_LLVM: [u32; 3] = [21, 22, 23];

/// Builds and installs `bpf-linker` beside Cargo.
///
/// # Errors
/// When no LLVM at least as new as the compiler's can be had, or the build fails.
pub fn install(apt: &mut Apt) -> Result<()> {
    let toolchain = EbpfToolchain::detect().context("there is no compiler for BPF")?;
    let version = toolchain.ask_compiler(&["--version", "--verbose"]);
    let compilers = version
        .as_deref()
        .and_then(llvm_release)
        .with_context(|| format!("the LLVM of toolchain {} is not known", toolchain.name()))?;
    let (llvm, prefix) = have_llvm(compilers, apt)?;

    let mut cargo = Command::new("cargo");
    cargo
        // One that is there already does not start.
        .args([
            "install",
            "--force",
            "--locked",
            "bpf-linker",
            "--version",
            VERSION,
        ])
        .args(["--no-default-features", "--features"])
        .arg(format!("llvm-{llvm}"))
        .env("LLVM_PREFIX", prefix);
    command::output(&mut cargo).map(drop)
}

/// Where Debian puts the development files of an LLVM release, if they are there.
pub fn llvm_prefix(release: u32) -> Option<PathBuf> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{release}"));
    prefix
        .join("include/llvm-c/Core.h")
        .exists()
        .then_some(prefix)
}

/// An LLVM that reads what the compiler's writes: of the same release, or a newer one.
fn have_llvm(compilers: u32, apt: &mut Apt) -> Result<(u32, PathBuf)> {
    let usable = || {
        SUPPORTED_LLVM
            .into_iter()
            .filter(|release| *release >= compilers)
    };
    let here = || usable().find_map(|release| Some((release, llvm_prefix(release)?)));
    if let Some(found) = here() {
        return Ok(found);
    }
    for release in usable() {
        let package = format!("llvm-{release}-dev");
        if apt.offers(&package) {
            apt.install(&[&package])?;
            break;
        }
    }
    here().with_context(|| {
        format!(
            "it needs LLVM {compilers} or newer, and there is no package llvm-{compilers}-dev here: \
             put the program from https://github.com/aya-rs/bpf-linker/releases on your PATH"
        )
    })
}

/// The LLVM release in the output of `rustc --version --verbose`.
fn llvm_release(rustc_version: &str) -> Option<u32> {
    let version = rustc_version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_release_is_read_from_rustc() {
        let output = "rustc 1.96.0 (ac68faa20 2026-05-25)\nhost: x86_64-unknown-linux-gnu\n\
                      release: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(llvm_release(output), Some(22));
        assert_eq!(llvm_release("rustc 1.96.0\n"), None);
    }
}
