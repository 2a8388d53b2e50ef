//! The datapath's decisions and rewrites on the host: packets byte by byte,
//! through the same stages as in the kernel, over tables in memory whose time,
//! chance, capacity and rivals the tests set.
//!
//! What packets should look like is said by `tapnat_testbed::packet`, which
//! shares nothing with the code under test.

mod fragments;
mod icmp_errors;
mod mappings;
mod parsing;
mod refusals;
mod rewriting;
mod support;
mod sweep;
mod tcp;
