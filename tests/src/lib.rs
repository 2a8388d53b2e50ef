//! What the test programs share: the built `tapnat`, run on a host of the
//! testbed.

pub mod instance;
