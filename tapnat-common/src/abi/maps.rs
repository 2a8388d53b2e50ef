//! The maps, by the name they have in the object file and under the pins.
//! The kernel keeps 15 characters of a name.

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
