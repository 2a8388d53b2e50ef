//! What the tests stand on: a host in memory.

pub mod frame;
pub mod network;
pub mod table;
pub mod world;
