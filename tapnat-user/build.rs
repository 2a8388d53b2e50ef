//! Compiles the eBPF crate and leaves the object at `$OUT_DIR/tapnat`. Owns the choice of flags for
//! that build; which toolchain is used is decided in `xtask/src/ebpf_toolchain.rs`.

use std::env;

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain, build_ebpf};
use ebpf_toolchain::EbpfToolchain;

#[path = "../xtask/src/ebpf_toolchain.rs"]
mod ebpf_toolchain;

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=../xtask/src/ebpf_toolchain.rs");
    for path in ["Cargo.toml", "Cargo.lock", "tapnat-common"] {
        println!("cargo:rerun-if-changed=../{path}");
    }

    let toolchain = EbpfToolchain::detect().context(
        "no toolchain here compiles for BPF: run `cargo xtask setup`, \
         or `rustup toolchain install nightly --component rust-src`",
    )?;
    let package = Package {
        name: "tapnat-ebpf",
        root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../tapnat-ebpf"),
        ..Package::default()
    };
    build_ebpf([package], Toolchain::Custom(toolchain.name()))
}
