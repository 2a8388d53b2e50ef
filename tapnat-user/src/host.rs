//! The host that tapnat runs on, as far as it reads or changes it: one submodule for each interface
//! of the kernel. They act when told to and remember nothing; what has to be undone later is kept
//! by [`crate::journal`].

pub mod bpffs;
pub mod capabilities;
pub mod cgroup;
pub mod events;
pub mod multicast;
pub mod namespace;
pub mod netlink;
pub mod resolvers;
pub mod sockets;
pub mod sysctl;
pub mod systemd;
pub mod tap;
pub mod xdp;
