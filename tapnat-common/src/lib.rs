//! What tapnat's datapath and its user side agree on, and every decision that
//! needs no kernel.
//!
//! A packet's life in order: [`parse`] reads it, [`nat`] decides what becomes
//! of it, [`rewrite`] changes it. What the decision needs from outside (tables,
//! routes, time, randomness) comes through [`nat::Tables`] and parameters, so
//! that the same code runs in the kernel and under `cargo test`. [`siit`] and
//! [`embed`] make packets of one IP version those of the other, [`nptv6`] of one
//! prefix those of another. This crate owns no map, calls no helper and does no
//! I/O.
#![cfg_attr(not(test), no_std)]
#![expect(
    clippy::inline_always,
    reason = "the kernel's program has a short stack and few arguments to a call: what is small is \
              part of its caller"
)]

pub mod abi;
pub mod checksum;
pub mod cut;
pub mod embed;
pub mod frame;
pub mod nat;
pub mod nat_log;
pub mod net;
pub mod network;
pub mod nptv6;
pub mod parse;
pub mod pipeline;
pub mod ports;
pub mod refusal;
pub mod rewrite;
pub mod siit;
pub mod time;
pub mod trace;
pub mod verdict;
