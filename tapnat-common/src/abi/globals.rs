//! Constants that the loader sets before the programs are loaded.

/// `u8`: non-zero counts packets and bytes of each session.
pub const COUNT_TRAFFIC: &str = "COUNT_TRAFFIC";
/// `u8`: [`crate::nat_log::level`].
pub const NAT_LOG: &str = "NAT_LOG_LEVEL";
/// `u8`: non-zero where `bpf_l4_csum_replace` knows `BPF_F_IPV6` (>= 6.16).
pub const IPV6_CHECKSUMS: &str = "IPV6_CHECKSUMS";
/// `u8`: non-zero where there is NAT64.
pub const NAT64: &str = "HAS_NAT64";
/// `u8`: non-zero where there is something in [`super::maps::PREFIXES`].
pub const PREFIXES: &str = "HAS_PREFIXES";
/// `u64`: the cookie of the network namespace whose sockets are the host's.
/// 0 is nobody's.
pub const NETNS_COOKIE: &str = "NETNS_COOKIE";
