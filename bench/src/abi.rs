//! The layouts shared with the eBPF programs, readable by aya.

#[path = "../ebpf/src/abi.rs"]
mod shared;

pub use shared::*;

// SAFETY: `repr(C)`, of integers and arrays of them, without padding.
unsafe impl aya::Pod for Stream {}
// SAFETY: as above.
unsafe impl aya::Pod for Received {}

const _: () = assert!(size_of::<Stream>() == 56 + 10 * 4);
