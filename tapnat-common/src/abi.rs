//! The tables that the datapath and the user side share: names, keys, values.
//!
//! `docs/architecture.md` says why the tables are what they are. Who writes
//! what stands at each type. The layout has a version: a change that moves or
//! redefines a field raises [`ABI_VERSION`], and the loader then refuses to
//! adopt the old pins. No behaviour beyond making keys lives here.

use core::num::NonZeroU32;

use crate::{
    checksum::Delta,
    embed::Prefix,
    frame::LinkAddresses,
    nat::STAMP_AFTER,
    net::{Address, Be16, Be32, Be128},
    network::Network,
    time::{Instant, Slot, Ticks},
};

/// Rises with every change to the layout or meaning of a pinned table.
pub const ABI_VERSION: u32 = 14;

/// The maps, by the name they have in the object file and under the pins.
/// The kernel keeps 15 characters of a name.
pub mod maps {
    /// How much more room than for mappings there is in [`Names::inside`], which also holds the
    /// locks of mappings that are removed: at most one for each CPU.
    pub const MAPPING_LOCKS: u32 = 1024;

    /// The maps that each IP version has of its own.
    #[derive(Clone, Copy, Debug)]
    pub struct Names {
        /// [`super::Settings`] at index 0. Written by user space only.
        pub settings: &'static str,
        /// [`super::FlowKey`] to [`super::Session`], two entries a session.
        pub sessions: &'static str,
        /// Outside [`super::EndpointKey`] to [`super::Mapping`].
        pub mappings: &'static str,
        /// Inside [`super::EndpointKey`] to outside [`super::EndpointKey`].
        pub inside: &'static str,
        /// [`super::PermissionKey`] to [`super::Permission`].
        pub permissions: &'static str,
        /// [`super::FragmentKey`] to [`super::Fragment`].
        pub fragments: &'static str,
        /// [`super::HeldKey`] to [`super::Held`].
        pub held: &'static str,
        /// [`super::FlowKey`] to [`super::Unsolicited`].
        pub unsolicited: &'static str,
        /// [`super::FlowKey`] as the host forwards it to [`super::EndpointKey`]: what
        /// the host's firewall was asked about, and the destination that it came with.
        pub asked: &'static str,
        /// Inside address to [`super::Guest`].
        pub guests: &'static str,
        /// Interface index of an inside device to how many guests it has in
        /// [`Names::guests`], as `u32`; [`super::EVERY_DEVICE`] for all. User space adds
        /// and removes devices, the datapath counts.
        pub guests_on: &'static str,
        /// Prefixes that guests must not reach. Written by user space only.
        pub denied: &'static str,
        /// Prefixes that guests reach under their own addresses. Written by user space
        /// only.
        pub untranslated: &'static str,
        /// Interface index to [`super::Device`]. Written by user space only.
        pub devices: &'static str,
        /// [`crate::ports::PortSet`]s, indexed by [`crate::ports::set_index`].
        pub ports: &'static str,
        /// [`super::HostSocketKey`] to the outside [`super::EndpointKey`] that the
        /// socket named. Written by the programs for the host's sockets.
        pub host_sockets: &'static str,
        /// The [`super::Upkeep`] at index 0.
        pub upkeep: &'static str,
        /// A queue of [`super::FlowKey`]s as they arrive on inside devices: sessions that
        /// the datapath is to look after, beside those that mappings name.
        pub looked_after: &'static str,
    }

    impl Names {
        /// All of them.
        #[must_use]
        pub const fn all(&self) -> [&'static str; 18] {
            let Self {
                settings,
                sessions,
                mappings,
                inside,
                permissions,
                fragments,
                held,
                unsolicited,
                asked,
                guests,
                guests_on,
                denied,
                untranslated,
                devices,
                ports,
                host_sockets,
                upkeep,
                looked_after,
            } = *self;
            [
                settings,
                sessions,
                mappings,
                inside,
                permissions,
                fragments,
                held,
                unsolicited,
                asked,
                guests,
                guests_on,
                denied,
                untranslated,
                devices,
                ports,
                host_sockets,
                upkeep,
                looked_after,
            ]
        }
    }

    pub const IPV4: Names = Names {
        settings: "SETTINGS",
        sessions: "SESSIONS",
        mappings: "MAPPINGS",
        inside: "INSIDE",
        permissions: "PERMISSIONS",
        fragments: "FRAGMENTS",
        held: "HELD",
        unsolicited: "UNSOLICITED",
        asked: "ASKED",
        guests: "GUESTS",
        guests_on: "GUESTS_ON",
        denied: "DENIED",
        untranslated: "UNTRANSLATED",
        devices: "DEVICES",
        ports: "PORTS",
        host_sockets: "HOST_SOCKETS",
        upkeep: "UPKEEP",
        looked_after: "LOOKED_AFTER",
    };

    pub const IPV6: Names = Names {
        settings: "SETTINGS6",
        sessions: "SESSIONS6",
        mappings: "MAPPINGS6",
        inside: "INSIDE6",
        permissions: "PERMISSIONS6",
        fragments: "FRAGMENTS6",
        held: "HELD6",
        unsolicited: "UNSOLICITED6",
        asked: "ASKED6",
        guests: "GUESTS6",
        guests_on: "GUESTS_ON6",
        denied: "DENIED6",
        untranslated: "UNTRANSLATED6",
        devices: "DEVICES6",
        ports: "PORTS6",
        host_sockets: "HOST_SOCKETS6",
        upkeep: "UPKEEP6",
        looked_after: "LOOKED_AFTER6",
    };

    /// The [`super::Nat64`] at index 0. Written by user
    /// space only.
    pub const NAT64: &str = "NAT64";
    /// IPv4 addresses that are on no wire to [`super::StandIn`]s.
    pub const STAND_INS: &str = "STAND_INS";
    /// [`crate::nptv6::PrefixPair`]s; those that are set come first. Written by user space
    /// only.
    pub const PREFIXES: &str = "PREFIXES";
    /// The inside networks of IPv6 to the interface index of their device, where prefixes
    /// are translated. Written by user space only.
    pub const INSIDE_NETWORKS: &str = "INSIDE_NETWORKS";
    /// [`crate::ports::Reserved`], one per port class. Written by user space only.
    pub const RESERVED: &str = "RESERVED";
    /// A per-CPU [`super::Counter`] for each [`crate::verdict::Reason`].
    pub const COUNTERS: &str = "COUNTERS";
    /// A ring of [`crate::nat_log::Record`]s. Read by user space.
    pub const NAT_LOG: &str = "NAT_LOG";
    /// A `u64` for each CPU: records that found no room in [`NAT_LOG`].
    pub const NAT_LOG_LOST: &str = "NAT_LOG_LOST";

    /// Interface index to the same device, of those that take frames which are no
    /// skbs. Written by user space only.
    pub const XDP_DEVICES: &str = "XDP_DEVICES";
    /// Programs to go on to, indexed by [`super::stages`]. Written by user space only.
    pub const STAGES: &str = "STAGES";

    /// Every pinned map that serves both IP versions.
    pub const SHARED: [&str; 10] = [
        NAT64,
        STAND_INS,
        PREFIXES,
        INSIDE_NETWORKS,
        RESERVED,
        COUNTERS,
        XDP_DEVICES,
        NAT_LOG,
        NAT_LOG_LOST,
        STAGES,
    ];

    /// Every pinned map.
    pub fn all() -> impl Iterator<Item = &'static str> {
        SHARED.into_iter().chain(IPV4.all()).chain(IPV6.all())
    }
}

/// What user space may take for bytes.
#[cfg(feature = "user")]
pub use aya::Pod as Plain;
/// What user space may take for bytes, which is not here.
#[cfg(not(feature = "user"))]
pub trait Plain {}
#[cfg(not(feature = "user"))]
impl<T> Plain for T {}

/// An IP version with its tables.
pub trait Family: Network + Plain {
    /// Its maps.
    const MAPS: maps::Names;
    /// What is added to [`sweep_tables`] and [`stages`] for its.
    const OFFSET: u32;
}

impl Family for Be32 {
    const MAPS: maps::Names = maps::IPV4;
    const OFFSET: u32 = 0;
}

impl Family for Be128 {
    const MAPS: maps::Names = maps::IPV6;
    const OFFSET: u32 = 32;
}

/// The programs, by the name they have in the object file.
pub mod programs {
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
}

/// Places in [`maps::STAGES`]: the programs that others go on to. [`Family::OFFSET`]
/// is added.
pub mod stages {
    use super::Family;
    use crate::net::{Be32, Be128};

    /// Packets that are not of an established session.
    pub const EXCEPTIONAL: u32 = 0;
    /// Packets without a session.
    pub const START: u32 = 1;
    /// Packets that open a session with a mapping.
    pub const MAP: u32 = 2;
    /// Packets that open a session: what it is to be.
    pub const OPEN: u32 = 3;
    /// First fragments, for which others wait.
    pub const RELEASE: u32 = 4;
    /// Packets that are too long for the way on, which are to be cut.
    pub const CUT: u32 = 5;
    /// Sends one piece of such a packet, and goes on to itself for the next.
    pub const PIECE: u32 = 6;
    /// Packets that the host's firewall is to be asked about.
    pub const ASK: u32 = 7;
    /// Packets that may be of an established session, of the IP version that the
    /// programs at the devices do not look for themselves.
    pub const ESTABLISHED: u32 = 8;
    /// ICMP errors.
    pub const ERROR: u32 = 9;
    /// Packets of a session that is over.
    pub const CLOSE: u32 = 10;
    /// Packets that open a session: makes it.
    pub const INSERT: u32 = 11;
    /// Packets that may be of a session that is there.
    pub const RESUME: u32 = 12;
    /// Of IPv6: packets for the world's IPv4. Of IPv4: packets to a stand-in.
    pub const TRANSLATE: u32 = 13;
    /// The same, ICMP errors.
    pub const TRANSLATE_ERROR: u32 = 14;
    /// Of IPv6: packets whose prefix is translated, without sessions.
    pub const PREFIX: u32 = 15;
    /// Packets that begin a session while nobody sweeps: looks after one that is there,
    /// and goes on to itself for the next.
    pub const UPKEEP: u32 = 16;
    /// Places in the table.
    pub const COUNT: u32 = 64;

    const SIX: u32 = <Be128 as Family>::OFFSET;

    /// The programs, by the name they have in the object file, for IPv4.
    pub const IPV4: [(u32, &str); 13] = [
        (EXCEPTIONAL, "exceptional"),
        (RESUME, "resume"),
        (INSERT, "insert"),
        (CLOSE, "close"),
        (ERROR, "error"),
        (START, "start"),
        (MAP, "map"),
        (OPEN, "open"),
        (RELEASE, "release"),
        (CUT, "cut"),
        (PIECE, "piece"),
        (ASK, "ask"),
        (UPKEEP, "upkeep"),
    ];
    /// The same for IPv6.
    pub const IPV6: [(u32, &str); 12] = [
        (SIX + ESTABLISHED, "established6"),
        (SIX + EXCEPTIONAL, "exceptional6"),
        (SIX + RESUME, "resume6"),
        (SIX + ERROR, "error6"),
        (SIX + INSERT, "insert6"),
        (SIX + CLOSE, "close6"),
        (SIX + START, "start6"),
        (SIX + MAP, "map6"),
        (SIX + OPEN, "open6"),
        (SIX + RELEASE, "release6"),
        (SIX + ASK, "ask6"),
        (SIX + UPKEEP, "upkeep6"),
    ];
    /// The same for NAT64.
    pub const NAT64: [(u32, &str); 5] = [
        (ESTABLISHED, "established4"),
        (SIX + TRANSLATE, "translate6"),
        (SIX + TRANSLATE_ERROR, "translate_error6"),
        (TRANSLATE, "translate4"),
        (TRANSLATE_ERROR, "translate_error4"),
    ];
    /// The same for the translation of prefixes.
    pub const PREFIXES: [(u32, &str); 1] = [(SIX + PREFIX, "prefix6")];
    const _: () = assert!(<Be32 as Family>::OFFSET == 0);
}

/// Constants that the loader sets before the programs are loaded.
pub mod globals {
    /// `u8`: non-zero counts packets and bytes of each session.
    pub const COUNT_TRAFFIC: &str = "COUNT_TRAFFIC";
    /// `u8`: [`crate::nat_log::level`].
    pub const NAT_LOG: &str = "NAT_LOG_LEVEL";
    /// `u8`: non-zero where the kernel has `bpf_ktime_get_coarse_ns` (>= 5.11).
    pub const COARSE_CLOCK: &str = "COARSE_CLOCK";
    /// `u8`: non-zero where `bpf_l4_csum_replace` knows `BPF_F_IPV6` (>= 6.16).
    pub const IPV6_CHECKSUMS: &str = "IPV6_CHECKSUMS";
    /// `u8`: non-zero where there is NAT64.
    pub const NAT64: &str = "HAS_NAT64";
    /// `u8`: non-zero where there is something in [`super::maps::PREFIXES`].
    pub const PREFIXES: &str = "HAS_PREFIXES";
    /// `u64`: the cookie of the network namespace whose sockets are the host's.
    /// 0 is nobody's.
    pub const NETNS_COOKIE: &str = "NETNS_COOKIE";
}

/// At most this many pairs of prefixes.
pub const MAX_PREFIX_PAIRS: u32 = 4;

/// At most this many outside addresses in a pool.
pub const MAX_OUTSIDE_ADDRESSES: usize = 16;

/// Where a packet arrived, and its transport protocol: the protocol in the low
/// 8 bits, above them the inside device's index, or 0 for the outside.
///
/// The device is part of a flow's key, so that one guest cannot send in
/// another guest's sessions from another device.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Arrival(u32);

impl Arrival {
    /// On the inside device with this interface index, or from the outside.
    #[inline(always)]
    #[must_use]
    pub const fn of(device: Option<NonZeroU32>, protocol: u8) -> Self {
        match device {
            Some(device) => Self::inside(device, protocol),
            None => Self::outside(protocol),
        }
    }

    #[inline(always)]
    #[must_use]
    pub const fn outside(protocol: u8) -> Self {
        Self(protocol as u32)
    }

    /// On the inside device with this interface index (below 2^24).
    #[inline(always)]
    #[must_use]
    pub const fn inside(device: NonZeroU32, protocol: u8) -> Self {
        Self((device.get() << 8) | protocol as u32)
    }

    #[inline(always)]
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low 8 bits are asked for"
    )]
    pub const fn protocol(self) -> u8 {
        self.0 as u8
    }

    /// The inside device's interface index; `None` for the outside.
    #[inline(always)]
    #[must_use]
    pub const fn device(self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.0 >> 8)
    }
}

/// The key of [`maps::Names::sessions`]: the tuple of a packet as it arrives.
///
/// An ICMP query's identifier stands in the port of the side that asked; the
/// other port is 0. Protocols without ports have 0 in both.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey<A = Be32> {
    pub source: A,
    pub destination: A,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub arrival: Arrival,
}

impl<A: Address> FlowKey<A> {
    #[inline(always)]
    #[must_use]
    pub const fn source_endpoint(&self) -> EndpointKey<A> {
        EndpointKey::new(self.source, self.source_port, self.arrival.protocol())
    }

    #[inline(always)]
    #[must_use]
    pub const fn destination_endpoint(&self) -> EndpointKey<A> {
        EndpointKey::new(
            self.destination,
            self.destination_port,
            self.arrival.protocol(),
        )
    }
}

/// An address, a port (or ICMP identifier) and a protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndpointKey<A = Be32> {
    pub address: A,
    pub port: Be16,
    pub protocol: u8,
    _zero: u8,
}

impl<A: Address> EndpointKey<A> {
    #[inline(always)]
    #[must_use]
    pub const fn new(address: A, port: Be16, protocol: u8) -> Self {
        Self {
            address,
            port,
            protocol,
            _zero: 0,
        }
    }

    /// Every endpoint of an address at once: the key of a 1:1 mapping.
    #[inline(always)]
    #[must_use]
    pub const fn whole(address: A) -> Self {
        Self::new(address, Be16::ZERO, 0)
    }

    /// Whether this stands for every endpoint of its address: no packet has
    /// this transport protocol, whose number is an IPv6 extension header's.
    #[inline(always)]
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.protocol == 0
    }
}

/// Bits of [`Session::flags`].
pub mod session_flags {
    /// The half that the session's first packet travelled.
    pub const INITIATOR: u8 = 1 << 0;
    /// Packets of this half leave on an inside device.
    pub const TO_INSIDE: u8 = 1 << 1;
    /// [`super::Session::next_hop`]'s link addresses are valid.
    pub const NEXT_HOP_KNOWN: u8 = 1 << 2;
    /// The session stands on its own port, with no endpoint-independent mapping.
    pub const UNMAPPED: u8 = 1 << 3;
    /// The TCP window scale that this half's sender announced, in the high bits.
    pub const WINDOW_SCALE_SHIFT: u8 = 4;
}

/// Bits of [`Session::tcp`]: what this half's sender has shown.
pub mod tcp_state {
    pub const SYN: u8 = 1 << 0;
    pub const FIN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    /// Has acknowledged the other half's SYN, or was picked up in mid-stream.
    pub const OPEN: u8 = 1 << 3;
    /// The host's firewall has to be asked about the session again. In both halves,
    /// until a packet of the one that began it was accepted; not TCP's alone.
    pub const TO_ASK: u8 = 1 << 4;
    /// A packet of this half has come by since, the first in the slot
    /// [`super::Session::confirmed`].
    pub const ASKED: u8 = 1 << 5;
    /// What the firewall has to do with it.
    pub const FIREWALL: u8 = TO_ASK | ASKED;
    /// The state in which a packet without SYN, FIN and RST changes nothing.
    pub const STEADY: u8 = SYN | OPEN;
}

/// Where packets of a session leave, and their link addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextHop {
    /// Interface index.
    pub device: u32,
    /// The neighbour's link address, then our device's.
    pub link: LinkAddresses,
}

/// One direction of a session, the value of [`maps::Names::sessions`]: all that an
/// established packet needs, in one cache line.
///
/// The packets of this direction write it, and the other direction's only when
/// a session (re)starts. User space only reads and deletes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Session<A = Be32> {
    /// What becomes the packet's source and destination.
    pub source: A,
    pub destination: A,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// [`Delta`] of the addresses, and of the ports, to the checksums.
    pub address_delta: u16,
    pub port_delta: u16,
    pub next_hop: NextHop,
    /// When a packet of this direction last came by, to within
    /// [`crate::nat::STAMP_AFTER`].
    pub last_seen: Instant,
    /// The MTU of the way out in bytes.
    pub mtu: u16,
    /// [`Settings::generation`] when the next hop was looked up.
    pub generation: u8,
    /// When next hop and mapping were last looked at. See
    /// [`Settings::confirm_after`].
    pub confirmed: Slot,
    pub tcp: u8,
    pub flags: u8,
    /// TCP: the last window this half's sender announced, unscaled.
    pub window: Be16,
    /// TCP: the last acknowledgement number this half's sender sent.
    pub acknowledged: Be32,
    /// Counted only with [`globals::COUNT_TRAFFIC`].
    pub packets: u64,
    /// Bytes of IP packets, headers included.
    pub bytes: u64,
}

impl<A: Address> Session<A> {
    /// The key under which the other direction's packets arrive, given the key
    /// of this one's.
    #[inline(always)]
    #[must_use]
    pub const fn twin_key(&self, key: &FlowKey<A>) -> FlowKey<A> {
        let protocol = key.arrival.protocol();
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            arrival: self.twin_arrival(protocol),
        }
    }

    /// Where the other direction's packets arrive.
    #[inline(always)]
    #[must_use]
    pub const fn twin_arrival(&self, protocol: u8) -> Arrival {
        match NonZeroU32::new(self.next_hop.device) {
            Some(device) if self.flags & session_flags::TO_INSIDE != 0 => {
                Arrival::inside(device, protocol)
            }
            Some(_) | None => Arrival::outside(protocol),
        }
    }

    /// Whether both make the same of a packet.
    #[inline(always)]
    #[must_use]
    pub fn translates_as(&self, other: &Self) -> bool {
        self.source == other.source
            && self.destination == other.destination
            && self.source_port == other.source_port
            && self.destination_port == other.destination_port
    }

    #[inline(always)]
    #[must_use]
    pub const fn address_delta(&self) -> Delta {
        Delta::from_stored(self.address_delta)
    }

    #[inline(always)]
    #[must_use]
    pub const fn port_delta(&self) -> Delta {
        Delta::from_stored(self.port_delta)
    }
}

/// Bits of [`Mapping::flags`].
pub mod mapping_flags {
    /// Made by the operator (a port forward or a 1:1 mapping): never expires,
    /// and lets in every remote in [`super::Mapping::allowed`].
    pub const STATIC: u8 = 1 << 0;
    /// Of a static one: the configuration file asks for it, not a command.
    pub const CONFIGURED: u8 = 1 << 1;
    /// Of a static one: the operator named no outside address, so it moves with
    /// the first of the pool.
    pub const MOVES: u8 = 1 << 2;
}

/// An endpoint-independent mapping, the value of [`maps::Names::mappings`], keyed by
/// its outside endpoint. Inserting it with `BPF_NOEXIST` is what takes a port.
///
/// A 1:1 mapping is static and has [`EndpointKey::whole`] for both endpoints;
/// its outside address is in no pool, and the sessions under it are
/// [`session_flags::UNMAPPED`].
///
/// Written by the datapath; user space deletes expired ones and writes static
/// ones.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping<A = Be32> {
    pub inside: EndpointKey<A>,
    /// The inside device's interface index.
    pub device: u32,
    /// No session outlives it. A mapping past it counts as absent.
    pub expires_at: Instant,
    /// Sessions that stand on it. Only ever added to and taken from.
    pub sessions: u32,
    /// With [`mapping_flags::STATIC`]: the network that may come in. Else the
    /// one remote that may, as most mappings have no other; the rest is in
    /// [`maps::Names::permissions`].
    pub allowed: A,
    pub allowed_length: u8,
    pub flags: u8,
    /// Whom the session was opened with that was opened last on it, as the guest calls
    /// it; address and port. Unspecified where there is none, and with
    /// [`mapping_flags::STATIC`].
    pub remote_port: Be16,
    pub remote: A,
    /// Until when, for a remote.
    pub allowed_until: Instant,
}

impl<A: Address> Mapping<A> {
    /// Whether a static mapping lets this remote in.
    #[inline(always)]
    #[must_use]
    pub fn lets_in(&self, remote: A) -> bool {
        remote.same_network(self.allowed, A::mask(self.allowed_length))
    }

    /// Makes this the key of the session that was opened last on it, of the half that
    /// arrives on the inside device.
    #[inline(always)]
    pub const fn find_last_session(&self, key: &mut FlowKey<A>) {
        // Field by field: a stack has no room for another one.
        key.source = self.inside.address;
        key.destination = self.remote;
        key.source_port = self.inside.port;
        key.destination_port = self.remote_port;
        key.arrival = Arrival::of(NonZeroU32::new(self.device), self.inside.protocol);
    }

    /// Where a static mapping leads who names this outside endpoint, which is the
    /// mapping's own or one of a 1:1 mapping's address.
    #[inline(always)]
    #[must_use]
    pub const fn leads_to(&self, outside: &EndpointKey<A>) -> EndpointKey<A> {
        if self.inside.is_whole() {
            EndpointKey::new(self.inside.address, outside.port, outside.protocol)
        } else {
            self.inside
        }
    }
}

/// How the datapath itself looks after what is over, index 0 of
/// [`maps::Names::upkeep`]. See [`crate::nat::upkeep`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// When user space last said that it sweeps. The datapath moves it on while it is
    /// long ago, as no clock here goes back far.
    pub attended: Instant,
    /// The place in [`maps::Names::ports`] to go on at, in ports. Written by the datapath.
    pub place: u32,
}

/// The value of [`maps::NAT64`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nat64 {
    /// Behind which the world's IPv4 addresses are for guests, if it is set.
    pub prefix: Prefix,
    /// What stand-ins are chosen with, so that no guest can choose addresses that get
    /// another's. Stays as it is as long as the tables.
    pub secret: u32,
}

/// A guest that an IPv4 address stands in for, the value of [`maps::STAND_INS`]. The
/// datapath adds them; user space removes those without sessions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StandIn {
    pub address: Be128,
    /// The inside device's interface index.
    pub device: u32,
}

/// The key of [`maps::Names::host_sockets`]: a socket of the host, and the inside
/// endpoint that it was led to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HostSocketKey<A = Be32> {
    /// As `bpf_get_socket_cookie` gives it.
    pub cookie: [u32; 2],
    pub inside: EndpointKey<A>,
}

/// A SYN from outside that nobody asked for, the value of [`maps::Names::unsolicited`],
/// keyed as its session would be. The datapath adds them, user space answers
/// and removes them (RFC 5382 REQ-4).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsolicited {
    pub arrived: Instant,
    pub sequence: Be32,
}

/// How long a SYN from outside goes unanswered: a SYN from inside in that time
/// makes it a simultaneous open (RFC 5382 REQ-4).
pub const UNSOLICITED_WAIT: Ticks = Ticks::from_seconds(6);

/// The key of [`maps::Names::permissions`]: a remote address that an inside endpoint
/// has sent to (RFC 4787 section 5, address-dependent filtering).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PermissionKey<A = Be32> {
    pub outside: EndpointKey<A>,
    pub remote: A,
}

/// Until when the remote may send to the mapping, as long as that is this guest's: the
/// next to have the port does not inherit it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permission {
    pub expires_at: Instant,
    /// [`Address::low_bits`] of the guest's address.
    pub owner: u32,
}

/// The key of [`maps::Names::fragments`]: a datagram whose first fragment was seen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey<A = Be32> {
    pub source: A,
    pub destination: A,
    /// With the protocol that all fragments name (IPv4), or that says that they are
    /// fragments (IPv6).
    pub arrival: Arrival,
    /// IPv4's has 16 bits.
    pub identification: Be32,
}

/// What became of a fragmented datagram's first fragment, and so becomes of the
/// others: [`Fragment::fate`].
pub mod fragment_fate {
    /// It has not come yet: the others are held.
    pub const UNKNOWN: u8 = 0;
    /// Translated; the others belong to the session of the same ports.
    pub const TRANSLATED: u8 = 1;
    /// Passed to the host.
    pub const HOST: u8 = 2;
    pub const DROPPED: u8 = 3;
}

/// A datagram that comes in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The ports that the first fragment carried.
    pub source_port: Be16,
    pub destination_port: Be16,
    pub expires_at: Instant,
    /// The identification that a guest's fragments are given (RFC 7857 section 10).
    pub identification: Be32,
    /// How much has come by, and how much there is if the last fragment has, in
    /// units of 8 bytes.
    pub units: u16,
    pub all_units: u16,
    /// Fragments that wait for the first one in [`maps::Names::held`].
    pub held: u8,
    /// [`fragment_fate`].
    pub fate: u8,
    /// The protocol of the first fragment's transport.
    pub protocol: u8,
    pub padding: [u8; 5],
    /// A bit for each 8 bytes of the datagram that have come by.
    pub seen: [u64; 128],
}

/// The key of [`maps::Names::held`]: a fragment that came before its first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HeldKey<A = Be32> {
    pub datagram: FragmentKey<A>,
    /// Counted in the order of arrival.
    pub index: u32,
}

/// The longest frame that is held, in bytes.
pub const HELD_BYTES: u32 = 2044;

/// At most so many fragments of one datagram are held: what 64 KiB take at an
/// MTU of 1400 bytes and a little more.
pub const MAX_HELD: u32 = 48;

/// A frame that waits, as it arrived.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub length: u32,
    pub bytes: [u8; HELD_BYTES as usize],
}

/// What one inside address uses, the value of [`maps::Names::guests`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// Sessions now. Only ever added to and taken from.
    pub sessions: u32,
    /// New sessions refused by a limit.
    pub refused: u32,
    /// The link address that its packets come from, in the low 48 bits; 0 where it
    /// is not known. An address stays with it for as long as it has sessions.
    pub link: u64,
    /// What it may begin now, a session for every [`NEW_SESSION`], and when that was
    /// so.
    pub allowance: u32,
    pub allowed_at: Instant,
    /// Outside ports that mappings of its own hold, those that rest among them. Only
    /// ever added to and taken from.
    pub ports: u32,
    /// The inside device that it was last seen on, which it is counted on.
    pub device: u32,
    /// Some of its ports ([`held_port`]), and 0: where the datapath finds what of its is
    /// over, without user space.
    pub own: [u32; OWN_PORTS],
}

/// Ports that a guest is found by, of those that it holds. A power of 2.
pub const OWN_PORTS: usize = 16;

/// At most so many guests are known at a time.
pub const MOST_GUESTS: u32 = 8192;

/// In [`maps::Names::guests_on`]: all devices together.
pub const EVERY_DEVICE: u32 = 0;

/// A port as [`Guest::own`] has it: the protocol above it.
#[inline(always)]
#[must_use]
pub const fn held_port<A: Address>(outside: &EndpointKey<A>) -> u32 {
    (outside.protocol as u32) << 16 | outside.port.get() as u32
}

impl Guest {
    /// Notes in [`Guest::own`] that it holds this port ([`held_port`]), or does no more. Of
    /// those that share a place the first one is noted, as it is the first to be over.
    #[inline(always)]
    pub fn note_port(&mut self, port: u32, is_held: bool) {
        let (before, after) = if is_held { (0, port) } else { (port, 0) };
        if let Some(place) = self.own.get_mut(Self::place_of(port))
            && *place == before
        {
            *place = after;
        }
    }

    /// Ports next to each other have places of their own, and so have those of one parity.
    #[inline(always)]
    const fn place_of(port: u32) -> usize {
        (port ^ port >> 4 ^ port >> 16) as usize & (OWN_PORTS - 1)
    }

    /// Whether it has as many sessions as it may (RFC 6888 REQ-4).
    #[inline(always)]
    #[must_use]
    pub const fn has_all_sessions<A: Address>(&self, settings: &Settings<A>) -> bool {
        is_reached(self.sessions, settings.guest_max_sessions)
    }

    /// Whether it holds as many ports as it may (RFC 6888 REQ-4).
    #[inline(always)]
    #[must_use]
    pub const fn has_all_ports<A: Address>(&self, settings: &Settings<A>) -> bool {
        is_reached(self.ports, settings.guest_max_ports)
    }
}

/// Whether a limit is, where there is one.
#[inline(always)]
const fn is_reached(used: u32, most: u32) -> bool {
    most != 0 && used >= most
}

/// What a session takes from [`Guest::allowance`]: the ticks in a second, as a guest
/// gets its limit's worth with every tick.
pub const NEW_SESSION: u32 = Ticks::from_seconds(1).get();

/// The highest limit on the sessions that a guest begins in a second.
pub const MOST_NEW_SESSIONS: u32 = 1_000_000;

/// What [`programs::SWEEP`] is to remove: [`Sweep::table`]. [`Family::OFFSET`] is added.
pub mod sweep_tables {
    /// Sessions, by the [`super::FlowKey`] of either half.
    pub const SESSIONS: u32 = 1;
    /// Mappings, by their outside [`super::EndpointKey`].
    pub const MAPPINGS: u32 = 2;
    /// Permissions, by their [`super::PermissionKey`].
    pub const PERMISSIONS: u32 = 3;
    /// Guests without sessions, by their address.
    pub const GUESTS: u32 = 4;
    /// Ports that are marked as taken in [`super::maps::Names::ports`] and that no mapping
    /// has, by an outside [`super::EndpointKey`].
    pub const PORTS: u32 = 5;
    /// Sessions, by the [`super::FlowKey`] of each half: not to remove, but to have
    /// the firewall asked about them again.
    pub const SESSIONS_TO_ASK: u32 = 6;
    /// A port that a guest holds no more, as user space gave its mapping to somebody
    /// else, by the guest's address.
    pub const GUESTS_PORTS: u32 = 7;
}

/// The beginning of a packet that [`programs::SWEEP`] is run on. After it come
/// keys of one table, one every [`sweep_key_bytes`].
///
/// The kernel runs the program as often as user space asks it to on one packet,
/// and each run deals with one key. So it needs no loop, and the kernel can do
/// other things between two keys. It is no less than an Ethernet header, which
/// the kernel takes it for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// [`sweep_tables`].
    pub table: u32,
    /// The number of the next run's key.
    pub next: u32,
    /// Entries removed so far, which is also what the program returns.
    pub removed: u32,
    _zero: u32,
}

impl Sweep {
    /// Of a table ([`sweep_tables`]), before the first run.
    #[must_use]
    pub const fn new(table: u32) -> Self {
        Self {
            table,
            next: 0,
            removed: 0,
            _zero: 0,
        }
    }
}

/// From one key of a [`Sweep`] to the next.
#[must_use]
pub const fn sweep_key_bytes<A: Address>() -> usize {
    size_of::<FlowKey<A>>()
}

/// At most so many keys are in one packet: the kernel's test runs take packets
/// of a page less some room for its own use.
#[must_use]
pub const fn sweep_keys<A: Address>() -> usize {
    3200 / sweep_key_bytes::<A>()
}

/// The role of a device the datapath is attached to.
pub mod role {
    pub const INSIDE: u8 = 1;
    pub const UPLINK: u8 = 2;
}

/// A device the datapath is attached to, the value of [`maps::Names::devices`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device<A = Be32> {
    /// The host's address on it: where our ICMP errors come from.
    pub address: A,
    /// An address of the inside network. The host's is one, unless there is but one guest, and this
    /// is its address (point to point).
    pub network: A,
    /// The network mask of the inside network; guests have addresses in it.
    pub mask: A,
    /// In bytes.
    pub mtu: u16,
    /// [`role`].
    pub role: u8,
    /// Non-zero where frames have an Ethernet header.
    pub ethernet: u8,
}

impl<A: Address> Device<A> {
    /// Whether an address is of the inside network.
    #[inline(always)]
    #[must_use]
    pub fn contains(&self, address: A) -> bool {
        address.same_network(self.network, self.mask)
    }

    /// Whether a guest can have this address.
    #[inline(always)]
    #[must_use]
    pub fn is_guests(&self, address: A) -> bool {
        self.contains(address) && address.is_host(self.mask) && address != self.address
    }
}

/// A per-CPU counter of one reason.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

/// How long things live without traffic, in ticks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// RFC 4787 REQ-5: at least 2, by default 5 minutes.
    pub udp: Ticks,
    /// RFC 5382 REQ-5: at least 2 hours 4 minutes.
    pub tcp_established: Ticks,
    /// RFC 5382 REQ-5: at least 4 minutes.
    pub tcp_opening: Ticks,
    /// RFC 5382 REQ-5: at least 4 minutes; reset sessions, too.
    pub tcp_closing: Ticks,
    /// RFC 5508 REQ-2: at least 60 seconds.
    pub icmp: Ticks,
    /// Protocols that are translated by address only.
    pub other: Ticks,
    /// RFC 6888 REQ-8: how long a freed port rests before another guest gets it.
    pub port_rest: Ticks,
    /// RFC 791: how long fragments of a datagram are waited for.
    pub fragment: Ticks,
    /// For want of room: how long sessions live at most that nobody has answered
    /// in; 0 while there is room.
    pub unanswered: Ticks,
}

impl Timeouts {
    /// What [`Settings::confirm_after`] is to be: eight seconds, and less where
    /// something lives so short that eight seconds more would be much: a seventh of
    /// that.
    #[must_use]
    pub fn confirm_after(&self) -> u8 {
        const MOST: u8 = 15;
        let Self {
            udp,
            tcp_established,
            tcp_opening,
            tcp_closing,
            icmp,
            other,
            port_rest: _,
            fragment: _,
            unanswered: _,
        } = *self;
        let shortest = [tcp_established, tcp_opening, tcp_closing, icmp, other]
            .into_iter()
            .fold(udp, Ord::min);
        (shortest / 7).slots().clamp(1, MOST)
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            udp: Ticks::from_seconds(300),
            tcp_established: Ticks::from_seconds(7440),
            tcp_opening: Ticks::from_seconds(240),
            tcp_closing: Ticks::from_seconds(240),
            icmp: Ticks::from_seconds(60),
            other: Ticks::from_seconds(300),
            port_rest: Ticks::from_seconds(120),
            fragment: Ticks::from_seconds(15),
            unanswered: Ticks::new(0),
        }
    }
}

/// RFC 4787 section 5: which remotes a mapping lets in.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filtering {
    EndpointIndependent = 0,
    #[default]
    AddressDependent = 1,
    AddressAndPortDependent = 2,
}

/// RFC 4787 section 4.1: whether an inside endpoint keeps its outside endpoint
/// for every remote.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MappingMode {
    #[default]
    EndpointIndependent = 0,
    AddressAndPortDependent = 1,
}

/// Bits of [`Settings::flags`].
pub mod setting_flags {
    /// Packets from outside keep a UDP or ICMP session alive too (RFC 4787 REQ-6).
    pub const INBOUND_REFRESH: u32 = 1 << 0;
    /// SYNs from outside that nobody asked for go to the host, whatever the port,
    /// instead of waiting for a simultaneous open (RFC 5382 REQ-4).
    pub const PASS_UNSOLICITED: u32 = 1 << 1;
    /// There is something in [`super::maps::Names::untranslated`].
    pub const UNTRANSLATED: u32 = 1 << 2;
    /// There are static mappings of addresses that are not in the pool, which
    /// guests have to be looked up for, too.
    pub const STATIC_ADDRESSES: u32 = 1 << 3;
    /// For whoever reads the tables: the programs have [`globals::COUNT_TRAFFIC`](super::globals::COUNT_TRAFFIC).
    pub const COUNTED: u32 = 1 << 4;
    /// There is something in [`super::maps::Names::denied`].
    pub const DENY: u32 = 1 << 5;
    /// Guests must not reach each other over outside addresses either.
    pub const ISOLATE: u32 = 1 << 6;
    /// Guests may reach each other under their own addresses, through the host.
    pub const ROUTE_GUESTS: u32 = 1 << 14;
    /// Guests must not reach the host, nor networks that are not behind the uplink.
    pub const DENY_HOST: u32 = 1 << 7;
    /// A guest's address may move to another link address at any time.
    pub const ROAMING: u32 = 1 << 8;
    /// The host's FORWARD chain decides about sessions' first packets.
    pub const ASK_FIREWALL: u32 = 1 << 9;
    /// For whoever writes it: every session that was there is asked about again, or
    /// was accepted.
    pub const FIREWALL_KNOWS: u32 = 1 << 13;
    /// For whoever reads the tables: [`programs::OUTSIDE_XDP`](super::programs::OUTSIDE_XDP)
    /// is at the uplink.
    pub const XDP: u32 = 1 << 10;
    /// For whoever reads the tables: the operator said whether it is to be.
    pub const HOOK_GIVEN: u32 = 1 << 11;
    /// For whoever reads the tables: it could be, as far as the uplink goes.
    pub const XDP_POSSIBLE: u32 = 1 << 12;
}

/// What the operator set for one family, index 0 of [`maps::Names::settings`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings<A = Be32> {
    pub abi_version: u32,
    /// [`setting_flags`].
    pub flags: u32,
    pub timeouts: Timeouts,
    /// The pool of outside addresses; the first `outside_count` are valid.
    pub outside: [A; MAX_OUTSIDE_ADDRESSES],
    pub outside_count: u32,
    /// Sessions that one guest may have; 0 for no limit.
    pub guest_max_sessions: u32,
    /// Sessions that one guest may begin in a second, [`MOST_NEW_SESSIONS`] at most;
    /// 0 for no limit.
    pub guest_new_sessions: u32,
    /// Outside ports that one guest may hold; 0 for no limit.
    pub guest_max_ports: u32,
    /// Rises when routes, neighbours or devices changed: cached next hops of
    /// another generation are looked up anew.
    pub generation: u8,
    /// Slots after which a session's next packet has its next hop looked up again
    /// and keeps its mapping alive. See [`Timeouts::confirm_after`].
    pub confirm_after: u8,
    /// [`Filtering`] of TCP, and of everything else.
    pub filtering_tcp: u8,
    pub filtering_udp: u8,
    /// [`MappingMode`] of TCP, and of everything else.
    pub mapping_tcp: u8,
    pub mapping_udp: u8,
    /// The largest TCP segment that a SYN may announce, in bytes; 0 leaves them.
    pub clamp_mss: u16,
}

impl<A: Address> Settings<A> {
    /// When a session that begins `now` shall have been confirmed: so that it is
    /// in the next slot, when the neighbour will have been found, and what went
    /// wrong with another CPU's packets is put right.
    #[inline(always)]
    #[must_use]
    pub const fn confirmed_before(&self, now: Instant) -> Slot {
        now.slot().before(self.confirm_after.wrapping_sub(1))
    }

    /// How much longer than its sessions a mapping may have to live, as it is
    /// kept alive only when they are confirmed.
    #[inline(always)]
    #[must_use]
    pub const fn mapping_slack(&self) -> Ticks {
        STAMP_AFTER.plus(Ticks::from_slots(self.confirm_after))
    }

    /// Whether the address is one that guests' packets are translated to.
    #[inline(always)]
    #[must_use]
    pub fn is_outside(&self, address: A) -> bool {
        self.place_of_outside(address).is_some()
    }

    /// The place of an outside address in the pool.
    #[inline(always)]
    #[must_use]
    pub fn place_of_outside(&self, address: A) -> Option<u32> {
        // All of them: verifiers do not see that a count from a table is small.
        (0..)
            .zip(&self.outside)
            .find(|(_, outside)| **outside == address)
            .map(|(place, _)| place)
            .filter(|place| *place < self.outside_count)
    }

    #[inline(always)]
    #[must_use]
    pub const fn filtering(&self, protocol: u8) -> Filtering {
        let number = if protocol == crate::net::protocol::TCP {
            self.filtering_tcp
        } else {
            self.filtering_udp
        };
        match number {
            0 => Filtering::EndpointIndependent,
            1 => Filtering::AddressDependent,
            // An unknown number can only be stricter than what it stands for.
            2..=u8::MAX => Filtering::AddressAndPortDependent,
        }
    }

    #[inline(always)]
    #[must_use]
    pub const fn mapping(&self, protocol: u8) -> MappingMode {
        let number = if protocol == crate::net::protocol::TCP {
            self.mapping_tcp
        } else {
            self.mapping_udp
        };
        match number {
            0 => MappingMode::EndpointIndependent,
            1..=u8::MAX => MappingMode::AddressAndPortDependent,
        }
    }
}

const _: () = {
    assert!(size_of::<FlowKey>() == 16);
    assert!(size_of::<FlowKey<Be128>>() == 40);
    // 48 bytes of hash element, 16 of key and 64 of value are two cache lines.
    assert!(size_of::<Session>() == 64);
    assert!(size_of::<Session<Be128>>() == 88);
    assert!(size_of::<EndpointKey>() == 8);
    assert!(size_of::<EndpointKey<Be128>>() == 20);
    assert!(size_of::<Mapping>() == 36);
    assert!(size_of::<Mapping<Be128>>() == 72);
    assert!(size_of::<Upkeep>() == 8);
    assert!(size_of::<PermissionKey>() == 12);
    assert!(size_of::<PermissionKey<Be128>>() == 36);
    assert!(size_of::<HostSocketKey>() == 16);
    assert!(size_of::<HostSocketKey<Be128>>() == 28);
    assert!(size_of::<FragmentKey>() == 16);
    assert!(size_of::<FragmentKey<Be128>>() == 40);
    assert!(size_of::<Fragment>() == 24 + 1024);
    assert!(size_of::<HeldKey>() == 20);
    assert!(size_of::<HeldKey<Be128>>() == 44);
    assert!(size_of::<Sweep>() == 16);
    assert!(size_of::<Nat64>() == 24);
    assert!(size_of::<StandIn>() == 20);
    assert!(size_of::<Guest>() == 32 + 4 * OWN_PORTS);
    assert!(OWN_PORTS.is_power_of_two());
    assert!(size_of::<Device>() == 16);
    assert!(size_of::<Device<Be128>>() == 52);
    assert!(size_of::<Settings>() == 4 + 4 + 36 + 64 + 4 + 4 + 4 + 4 + 8);
    assert!(size_of::<Settings<Be128>>() == 4 + 4 + 36 + 256 + 4 + 4 + 4 + 4 + 8);
};

#[cfg(feature = "user")]
mod pod {
    use super::{
        Arrival, Counter, Device, EndpointKey, Family, FlowKey, Fragment, FragmentKey, Guest, Held,
        HeldKey, Mapping, Nat64, Permission, PermissionKey, Session, Settings, StandIn, Sweep,
        Unsolicited, Upkeep,
    };
    use crate::net::{Be32, Be128};

    macro_rules! pod {
        ($($name:ty),* $(,)?) => {
            $(
                // SAFETY: `repr(C)` or `repr(transparent)`, of integers and
                // arrays of them, without padding (the asserts above).
                unsafe impl aya::Pod for $name {}
            )*
        };
    }
    macro_rules! pod_of_each_family {
        ($($name:ident),* $(,)?) => {
            $(
                // SAFETY: as above, of both families, and there are no more.
                unsafe impl<A: Family> aya::Pod for $name<A> {}
            )*
        };
    }
    pod!(
        Arrival,
        Held,
        Be32,
        Be128,
        Counter,
        Fragment,
        Guest,
        Permission,
        StandIn,
        Sweep,
        Unsolicited,
        Upkeep,
        Nat64,
        crate::nptv6::PrefixPair,
        crate::ports::PortSet,
        crate::ports::Reserved,
    );
    pod_of_each_family!(
        Device,
        EndpointKey,
        FlowKey,
        FragmentKey,
        HeldKey,
        Mapping,
        PermissionKey,
        Session,
        Settings,
    );
}
