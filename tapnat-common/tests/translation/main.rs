//! Translation between the IP versions, and between prefixes, on the host: packets byte
//! by byte, through the same steps as in the kernel, by a shell that moves bytes as the
//! kernel's helpers do.
//!
//! What packets should look like is said by `tapnat_testbed::packet`, which shares nothing
//! with the code under test.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like the tests"
)]

mod arbitrary;
mod decisions;
mod errors;
mod extensions;
#[path = "../datapath/support/frame.rs"]
#[expect(dead_code, reason = "the other tests need more of it")]
mod frame;
mod packets;
mod prefixes;
mod refused;
mod shell;
