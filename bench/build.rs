//! Compiles the benchmarks' eBPF programs and leaves the object at `$OUT_DIR/bench`.

use anyhow::Result;

fn main() -> Result<()> {
    tapnat_ebpf_build::build("tapnat-bench-ebpf", "bench/ebpf", &[])
}
