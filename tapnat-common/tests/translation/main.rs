//! Translation between prefixes, on the host: packets byte by byte.
//!
//! What packets should look like is said by `tapnat_testbed::packet`, which shares nothing
//! with the code under test.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like the tests"
)]

#[path = "../datapath/support/frame.rs"]
#[expect(dead_code, reason = "the other tests need more of it")]
mod frame;
mod prefixes;
