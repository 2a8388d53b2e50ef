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

/// Of every remote: the sinks take what has another for somebody else's.
pub const REMOTE_PORT: u32 = 4433;

/// The packets that one direction's generator makes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    /// The frame's first bytes, with what differs between flows and both checksums left 0.
    pub header: [u64; 7],
    /// Sum of the IPv4 header's 16-bit words, but for the addresses.
    pub ip_sum: u32,
    /// Sum of the transport header's and the pseudo-header's 16-bit words, but for the addresses
    /// and the guest's port.
    pub transport_sum: u32,
    /// Of flow 0. Each run of [`PORTS`] flows has the next guest, or the same one.
    pub first_guest: u32,
    /// All ones, or zero for one guest only.
    pub guest_mask: u32,
    /// Of flow 0. Each run of [`PORTS`] flows has the next remote, or the same one.
    pub first_remote: u32,
    /// All ones, or zero for one remote only.
    pub remote_mask: u32,
    /// Of flow 0.
    pub first_port: u32,
    pub flows: u32,
    /// At most `flows`, and without a common divisor: the next packet's flow is so many further.
    pub stride: u32,
    /// The last packet's flow. The generator writes it.
    pub position: u32,
    /// Non-zero for TCP, zero for UDP.
    pub tcp: u32,
    /// The interface index to send frames through instead of receiving them, or zero.
    pub through: u32,
    /// The address that proves the translation, as it stands in the packet: the source of what
    /// arrives in the world, the destination of what arrives at the guest.
    pub proof: [u16; 2],
    /// The bits of the address that must be so.
    pub proof_mask: [u16; 2],
}

/// What arrived at a sink.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Received {
    pub packets: u64,
    /// Those of them that carry [`Stream::proof`].
    pub proven: u64,
    /// With link headers. Only counted by the sink for offloaded packets.
    pub bytes: u64,
    /// Segments that the packets are still to be cut into. Only counted by the sink for offloaded
    /// packets.
    pub segments: u64,
}

/// What the stateless rewriting program does to the world's packets: the least that translation in
/// XDP can cost. The map [`REWRITE`] holds it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rewrite {
    /// The destination and source link address of the packet on its way out.
    pub link: [u16; 6],
    /// The new destination, as it stands in the packet.
    pub destination: [u16; 2],
    /// What to add to the complemented checksums for the new destination.
    pub delta: u32,
    /// The interface index to send to.
    pub device: u32,
}

/// See [`Rewrite`].
pub const REWRITE: &str = "REWRITE";
