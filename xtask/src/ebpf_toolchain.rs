//! Which Rust toolchain compiles the eBPF crate. Owns that decision and nothing else: it installs
//! nothing and starts no build. `tapnat-user/build.rs` includes this file too, so that the build
//! script and `cargo xtask setup` can never disagree; hence it uses the standard library alone.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The BPF target of the machine that builds, in Cargo's spelling.
pub const TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};

/// A toolchain that can compile the eBPF crate, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EbpfToolchain {
    /// rustup's nightly with the component `rust-src`: it builds `core` for BPF by itself.
    Nightly,
    /// A toolchain that brings `core` already built for BPF, linked under the name `bpf`
    /// (Debian's `rustc-web` with `libstd-rust-web-dev-bpf`).
    Linked,
}

impl EbpfToolchain {
    /// The name by which rustup knows it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nightly => "nightly",
            Self::Linked => "bpf",
        }
    }

    /// What a sysroot must contain for this toolchain to be of use.
    fn needs(self) -> PathBuf {
        match self {
            Self::Nightly => PathBuf::from("lib/rustlib/src/rust/library/core/Cargo.toml"),
            Self::Linked => Path::new("lib/rustlib").join(TARGET).join("lib"),
        }
    }

    /// The first toolchain whose sysroot has what it needs. `sysroot` gives the directory of a
    /// toolchain, or nothing when it is not installed.
    pub fn choose(sysroot: impl Fn(Self) -> Option<PathBuf>) -> Option<Self> {
        [Self::Nightly, Self::Linked].into_iter().find(|toolchain| {
            sysroot(*toolchain).is_some_and(|root| root.join(toolchain.needs()).exists())
        })
    }

    /// The toolchain to use on this machine, or nothing when `cargo xtask setup` has work to do.
    pub fn detect() -> Option<Self> {
        Self::choose(Self::sysroot)
    }

    /// The directory rustup keeps this toolchain in.
    fn sysroot(self) -> Option<PathBuf> {
        let output = Command::new("rustup")
            .args(["run", self.name(), "rustc", "--print", "sysroot"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
    }
}

/// Whether `bpf-linker` is on the search path and its LLVM library is there too.
pub fn has_linker() -> bool {
    Command::new("bpf-linker")
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
