//! What the test programs share: the built `tapnat` run on a host of the
//! testbed, worlds that it translates in, and packets sent and received
//! there byte by byte.

pub mod connection;
pub mod family;
pub mod faults;
pub mod instance;
pub mod newcomer;
pub mod resolver;
pub mod stun;
pub mod wires;
pub mod world;
