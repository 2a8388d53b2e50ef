//! Worlds of hosts for tests, the sandbox and benchmarks: network namespaces
//! joined by taps, veths and tuns, with real traffic and captures in them.
//!
//! The crate knows nothing of tapnat: whatever translates in the host
//! namespace is started by the caller. Everything here needs root, and leaves
//! nothing behind when it is dropped, panics or is interrupted.

pub mod cable;
pub mod capture;
mod cleanup;
pub mod namespace;
pub mod packet;
pub mod process;
pub mod qemu;
pub mod setting;
pub mod snapshot;
mod sys;
pub mod terminal;
pub mod topology;
pub mod traffic;

pub use cleanup::at_signal;
pub use namespace::Namespace;
