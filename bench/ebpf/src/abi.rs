//! What the eBPF programs of the benchmarks and the program that loads them share: names and
//! layouts. Numbers are in the machine's byte order unless said otherwise.

/// Index in [`STREAMS`] and [`RECEIVED`]: packets from the guest to the world.
pub const OUTWARD: u32 = 0;
/// Index in [`STREAMS`] and [`RECEIVED`]: packets from the world to the guest.
pub const INWARD: u32 = 1;

/// The map of [`Stream`]s.
pub const STREAMS: &str = "STREAMS";
/// The per-CPU map of [`Received`].
pub const RECEIVED: &str = "RECEIVED";
/// The interface index that `redirect_outward` sends to.
pub const UPLINK: &str = "UPLINK";
/// The interface index that `redirect_inward` sends to.
pub const INSIDE: &str = "INSIDE";

/// Bytes of every generated frame.
pub const FRAME_LENGTH: usize = 60;
/// The guest's ports of a stream are so many, and the remote's address rises with every such run.
pub const PORTS: u32 = 1 << PORT_BITS;
/// The flow's number has the port in so many low bits, and the remote above them.
pub const PORT_BITS: u32 = 14;

/// The packets that one direction's generator makes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    /// The frame's first bytes, with what differs between flows and both checksums left 0.
    pub header: [u64; 7],
    /// Sum of the IPv4 header's 16-bit words, but for the remote address.
    pub ip_sum: u32,
    /// Sum of the transport header's and the pseudo-header's 16-bit words, but for the remote
    /// address and the guest's port.
    pub transport_sum: u32,
    /// Of flow 0.
    pub first_remote: u32,
    /// Of flow 0.
    pub first_port: u32,
    pub flows: u32,
    /// Less than `flows`, and without a common divisor: the next packet's flow is so many further.
    pub stride: u32,
    /// The last packet's flow. The generator writes it.
    pub position: u32,
    /// Non-zero for TCP, zero for UDP.
    pub tcp: u32,
    /// The address that proves the translation, as it stands in the packet: the source of what
    /// arrives in the world, the destination of what arrives at the guest.
    pub proof: [u16; 2],
    pub zero: u32,
}

/// What arrived at a sink.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Received {
    pub packets: u64,
    /// Those of them that carry [`Stream::proof`].
    pub proven: u64,
}
