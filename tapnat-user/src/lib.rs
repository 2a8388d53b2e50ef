//! tapnat, user side: what the `tapnat` binary does, as a library.

pub mod activity;
pub mod changes;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod datapath;
pub mod dhcp;
pub mod doctor;
pub mod flows;
pub mod forwards;
pub mod host;
pub mod instance;
pub mod journal;
pub mod logs;
pub mod metrics;
pub mod pool;
pub mod ports;
pub mod preflight;
pub mod statics;
pub mod sweep;
pub mod tables;
pub mod trace;
pub mod unsolicited;
pub mod view;
