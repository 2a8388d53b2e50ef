//! The datapath's decisions and rewrites on the host: packets byte by byte,
//! through the same stages as in the kernel, over tables in memory whose time,
//! chance, capacity and rivals the tests set.
//!
//! What packets should look like is said by `tapnat_testbed::packet`, which
//! shares nothing with the code under test.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like the tests"
)]

mod arbitrary;
mod clamping;
mod cutting;
mod expiry;
mod filtering;
mod firewall;
mod floods;
mod fragments;
mod full_tables;
mod guests;
mod hairpin;
mod icmp_errors;
mod ipv6;
mod layout;
mod mappings;
mod parsing;
mod policy;
mod races;
mod refusals;
mod rewriting;
mod statics;
mod support;
mod sweep;
mod tcp;
mod upkeep;
