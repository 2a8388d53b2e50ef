//! Compiles the eBPF crate and leaves the object at `$OUT_DIR/tapnat`, and which one that is in
//! `TAPNAT_OBJECT`.

use anyhow::Result;

fn main() -> Result<()> {
    tapnat_ebpf_build::build("tapnat-ebpf", "tapnat-ebpf", &["tapnat-common"])?;
    tapnat_ebpf_build::tell_identity("tapnat", "TAPNAT_OBJECT")
}
