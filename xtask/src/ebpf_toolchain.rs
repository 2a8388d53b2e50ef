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
    /// The toolchain to use on this machine, or nothing when `cargo xtask setup` has work to do.
    pub fn detect() -> Option<Self> {
        Self::choose(Self::sysroot)
    }

    /// The first toolchain whose directory, as told by `sysroot`, is complete.
    fn choose(sysroot: impl Fn(Self) -> Option<PathBuf>) -> Option<Self> {
        [Self::Nightly, Self::Linked].into_iter().find(|toolchain| {
            sysroot(*toolchain).is_some_and(|directory| toolchain.is_complete_in(&directory))
        })
    }

    /// The name by which rustup knows it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nightly => "nightly",
            Self::Linked => "bpf",
        }
    }

    /// Whether a toolchain's directory has what compiling for BPF takes.
    pub fn is_complete_in(self, sysroot: &Path) -> bool {
        let libraries = sysroot.join("lib/rustlib");
        match self {
            Self::Nightly => libraries.join("src/rust/library/core/Cargo.toml").exists(),
            Self::Linked => libraries.join(TARGET).join("lib").exists(),
        }
    }

    /// The directory of this toolchain, if rustup has one under its name.
    pub fn sysroot(self) -> Option<PathBuf> {
        self.ask_compiler(&["--print", "sysroot"])
            .map(|path| PathBuf::from(path.trim()))
    }

    /// What this toolchain's compiler prints when it gets these arguments.
    pub fn ask_compiler(self, arguments: &[&str]) -> Option<String> {
        let output = Command::new("rustup")
            .args(["run", self.name(), "rustc"])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8(output.stdout).ok())?
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn nightly_with_its_sources_comes_first() {
        let nightly = tempfile::tempdir().unwrap();
        let linked = tempfile::tempdir().unwrap();
        let sysroot = |toolchain| {
            Some(match toolchain {
                EbpfToolchain::Nightly => nightly.path().to_owned(),
                EbpfToolchain::Linked => linked.path().to_owned(),
            })
        };
        assert_eq!(EbpfToolchain::choose(sysroot), None);

        fs::create_dir_all(linked.path().join("lib/rustlib").join(TARGET).join("lib")).unwrap();
        assert_eq!(EbpfToolchain::choose(sysroot), Some(EbpfToolchain::Linked));

        let core = nightly.path().join("lib/rustlib/src/rust/library/core");
        fs::create_dir_all(&core).unwrap();
        fs::write(core.join("Cargo.toml"), "").unwrap();
        assert_eq!(EbpfToolchain::choose(sysroot), Some(EbpfToolchain::Nightly));
    }

    #[test]
    fn no_toolchain_is_chosen_where_rustup_knows_none() {
        assert_eq!(EbpfToolchain::choose(|_| None), None);
    }
}
