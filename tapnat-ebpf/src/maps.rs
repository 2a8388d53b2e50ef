//! The datapath's tables. Their layout and meaning stand in
//! `tapnat_common::abi`; sizes here are defaults that the loader overrides.

use aya_ebpf::{
    btf_maps::{
        Array, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf,
    },
    macros::btf_map,
};
use tapnat_common::{
    abi::{
        Counter, Device, EndpointKey, FlowKey, Fragment, FragmentKey, Guest, Held, HeldKey,
        HostSocketKey, Mapping, Permission, PermissionKey, Session, Settings, Unsolicited, stages,
    },
    cut::MAX_FRAME,
    nat_log::Record,
    net::Be32,
    parse::Packet,
    ports::{CLASSES, PortSet, Reserved, SETS},
    refusal::Budget,
    verdict::{Plan, Reason},
};

#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
pub static SESSIONS: HashMap<FlowKey, Session, 262_144> = HashMap::new();
#[btf_map]
pub static MAPPINGS: HashMap<EndpointKey, Mapping, 65_536> = HashMap::new();
#[btf_map]
pub static INSIDE: HashMap<EndpointKey, EndpointKey, 65_536> = HashMap::new();
#[btf_map]
pub static PERMISSIONS: HashMap<PermissionKey, Permission, 131_072> = HashMap::new();
// The two tables that may forget: a flood of fragments pushes out fragments.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, Fragment, 2048> = LruHashMap::new();
#[btf_map]
pub static HELD: LruHashMap<HeldKey, Held, 512> = LruHashMap::new();
/// Nothing ever written: what a new entry of [`FRAGMENTS`] is copied from, as it
/// is longer than a stack.
#[btf_map]
pub static NO_FRAGMENT: Array<Fragment, 1> = Array::new();
/// A frame on its way into [`HELD`].
#[btf_map]
pub static FRAME: PerCpuArray<Held, 1> = PerCpuArray::new();
/// A frame whose skb is used for others meanwhile.
#[btf_map]
pub static WHOLE: PerCpuArray<Whole, 1> = PerCpuArray::new();
/// The identification of the last datagram that left in fragments, or its
/// predecessors' on another CPU.
#[btf_map]
pub static IDENTIFICATION: Array<u32, 1> = Array::new();
// May forget as well: who floods SYNs loses the answers.
#[btf_map]
pub static UNSOLICITED: LruHashMap<FlowKey, Unsolicited, 1024> = LruHashMap::new();
// And who forwards nothing of what it is asked about, what it was asked.
#[btf_map]
pub static ASKED: LruHashMap<FlowKey, EndpointKey, 4096> = LruHashMap::new();
/// May forget, too: who is told about errors, by address.
#[btf_map]
pub static TOLD: LruHashMap<Be32, Budget, 1024> = LruHashMap::new();
// May forget: such a socket is then told of the guest's own endpoint.
#[btf_map]
pub static HOST_SOCKETS: LruHashMap<HostSocketKey, EndpointKey, 4096> = LruHashMap::new();
#[btf_map]
pub static GUESTS: HashMap<Be32, Guest, 4096> = HashMap::new();
#[btf_map]
pub static DENIED: LpmTrie<Be32, u8, 4096> = LpmTrie::new();
#[btf_map]
pub static UNTRANSLATED: LpmTrie<Be32, u8, 4096> = LpmTrie::new();
#[btf_map]
pub static DEVICES: HashMap<u32, Device, 1024> = HashMap::new();
#[btf_map]
pub static PORTS: Array<PortSet, { SETS as usize }> = Array::new();
#[btf_map]
pub static RESERVED: Array<Reserved, { CLASSES as usize }> = Array::new();
/// What a packet out of the ordinary needs, off the stack, which is short.
#[derive(Clone, Copy)]
pub struct Scratch {
    /// The index of the inside device it arrived on, or 0.
    pub device: u32,
    /// Bytes of its link header.
    pub link_length: u32,
    /// The number of the next piece of a packet that is cut.
    pub piece: u32,
    /// A half of a session on its way into [`SESSIONS`].
    pub half: Session,
    pub packet: Packet,
    pub plan: Plan,
}

/// Twice as long as the longest frame, so that a part of any length may begin at any
/// place in it.
pub type Whole = [u8; WHOLE_BYTES];
pub const WHOLE_BYTES: usize = 2 * (MAX_FRAME as usize + 1);

// Not shared with anyone, and so not part of the ABI.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();
/// The programs that go on with such a packet: each has a stack of its own, and
/// the verifier looks at each by itself. Filled by the loader.
#[btf_map]
pub static STAGES: ProgramArray<{ stages::COUNT as usize }> = ProgramArray::new();
/// Looked up by the kernel's redirection itself.
#[btf_map]
pub static XDP_DEVICES: DevMapHash<1024> = DevMapHash::new();
/// As long as its reader rests; the loader makes it small where there is none.
#[btf_map]
pub static NAT_LOG: RingBuf<Record, { 4 << 20 }> = RingBuf::new();
#[btf_map]
pub static NAT_LOG_LOST: PerCpuArray<u64, 1> = PerCpuArray::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<Counter, { Reason::COUNT as usize }> = PerCpuArray::new();
