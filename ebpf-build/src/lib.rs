//! Compiles a crate of eBPF programs from the build script of the crate that loads them, and leaves
//! the objects at `$OUT_DIR/NAME`, one for each binary. Owns the flags of that build; which toolchain
//! compiles is decided in `xtask/src/ebpf_toolchain.rs`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hasher as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use aya_build::{Package, Toolchain, build_ebpf};
use ebpf_toolchain::{EbpfToolchain, TARGET};

#[path = "../../xtask/src/ebpf_toolchain.rs"]
mod ebpf_toolchain;

/// The instruction set of kernels since 5.1: 32-bit arithmetic and jumps. Without it every 32-bit
/// comparison costs two shifts an operand.
const CPU: &str = "v3";

/// What makes the linker, which generates the code, write memory that is cleared or moved out as
/// stores. Otherwise they are calls of functions that go byte by byte.
const INLINE: &str = "--disable-expand-memcpy-in-order";

/// The whole of a build script: builds the package in this directory of the workspace, anew when a
/// file in it or in one of the directories `others` changed.
///
/// The build script is started again in place of the compiler, and this function then becomes the
/// compiler: so nothing else may come before it.
///
/// # Errors
///
/// When something that building needs is missing, or the build fails.
pub fn build(package: &str, directory: &str, others: &[&str]) -> Result<()> {
    let mut arguments = env::args_os().skip(1);
    if let Some(compiler) = arguments.next() {
        return run_compiler(compiler, arguments.collect());
    }

    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the workspace has no directory")?;
    for path in ["Cargo.toml", "Cargo.lock"].iter().chain(others) {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }

    let toolchain = EbpfToolchain::detect()
        .context("no Rust toolchain here compiles for BPF: run `cargo xtask setup`")?;
    ensure!(
        ebpf_toolchain::has_linker(),
        "bpf-linker is missing or does not start: run `cargo xtask setup`"
    );

    let this_program = env::current_exe().context("cannot find the build script's own path")?;
    // SAFETY: nothing else runs in this process yet that could read the environment.
    unsafe { env::set_var("RUSTC_WRAPPER", this_program) };
    // Cargo would show each line of the inner build's progress as a warning.
    // SAFETY: as above.
    unsafe { env::set_var("CARGO_TERM_QUIET", "true") };

    let directory = workspace.join(directory);
    let package = Package {
        name: package,
        root_dir: &directory.to_string_lossy(),
        ..Package::default()
    };
    build_ebpf([package], Toolchain::Custom(toolchain.name()))
}

/// Lets the crate find out at compile time, in the environment variable `variable`, which object it
/// embeds: a number that another object, of this name, has not. For after [`build`].
///
/// # Errors
///
/// When there is no such object.
pub fn tell_identity(name: &str, variable: &str) -> Result<()> {
    let directory = env::var_os("OUT_DIR").context("a build script has a directory")?;
    let object = Path::new(&directory).join(name);
    let bytes = fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    println!("cargo:rustc-env={variable}={:016x}", hasher.finish());
    Ok(())
}

/// Stands between Cargo and the compiler to choose the processor: aya-build sets the compiler's
/// flags itself and has no way to add one, and Cargo then ignores those of its configuration.
fn run_compiler(compiler: OsString, arguments: Vec<OsString>) -> Result<()> {
    let for_bpf = arguments.iter().any(|argument| argument == TARGET);
    let mut command = Command::new(compiler);
    command.args(arguments);
    if for_bpf {
        command.arg(format!("-Ctarget-cpu={CPU}"));
        command.arg(format!("-Clink-arg={INLINE}"));
    }
    let error = command.exec();
    bail!("cannot start {command:?}: {error}")
}
