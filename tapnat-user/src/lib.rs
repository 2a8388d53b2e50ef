//! tapnat, user side: what the `tapnat` binary does, as a library.

pub mod changes;
pub mod config;
pub mod host;
pub mod instance;
pub mod journal;
pub mod ports;
pub mod preflight;
