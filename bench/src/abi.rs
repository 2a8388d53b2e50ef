//! The layouts shared with the eBPF programs, readable by aya.

#[path = "../ebpf/src/abi.rs"]
mod shared;

pub use shared::*;

// SAFETY: `repr(C)`, of integers and arrays of them, without padding (the asserts below).
unsafe impl aya::Pod for Stream {}
// SAFETY: as above.
unsafe impl aya::Pod for Received {}
// SAFETY: as above.
unsafe impl aya::Pod for Rewrite {}

const _: () = {
    assert!(size_of::<Stream>() == 7 * 8 + 14 * 4);
    assert!(size_of::<Received>() == 4 * 8);
    assert!(size_of::<Rewrite>() == 8 * 2 + 2 * 4);
};
