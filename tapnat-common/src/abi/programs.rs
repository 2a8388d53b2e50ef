//! The programs, by the name they have in the object file.

pub const INSIDE_ETHERNET: &str = "inside_ethernet";
pub const INSIDE_RAW: &str = "inside_raw";
pub const OUTSIDE_ETHERNET: &str = "outside_ethernet";
pub const OUTSIDE_RAW: &str = "outside_raw";
/// The world's packets before the kernel makes skbs of them. XDP.
pub const OUTSIDE_XDP: &str = "outside_xdp";
/// Packets that the host forwards, on their way out of a device: those that its
/// firewall was asked about are accepted.
pub const ACCEPTED: &str = "accepted";
/// Removes what is over. Attached to nothing: user space runs it on packets
/// of [`super::Sweep`].
pub const SWEEP: &str = "sweep";
/// The host's own sockets, in its root control group: what they ask to
/// connect or send to, and whom they are told of.
pub const HOST: [&str; 8] = [
    "host_connect4",
    "host_sendmsg4",
    "host_recvmsg4",
    "host_getpeername4",
    "host_connect6",
    "host_sendmsg6",
    "host_recvmsg6",
    "host_getpeername6",
];
