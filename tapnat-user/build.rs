//! Compiles the eBPF crate and leaves the object at `$OUT_DIR/tapnat`.

use anyhow::Result;

fn main() -> Result<()> {
    tapnat_ebpf_build::build("tapnat-ebpf", "tapnat-ebpf", &["tapnat-common"])
}
