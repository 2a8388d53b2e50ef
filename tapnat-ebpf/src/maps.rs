//! The datapath's tables. Their layout and meaning stand in
//! `tapnat_common::abi`; sizes here are defaults that the loader overrides.

use aya_ebpf::{
    bindings::bpf_fib_lookup,
    btf_maps::{
        Array, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, Queue, RingBuf,
    },
    macros::btf_map,
};
use tapnat_common::{
    abi::{
        Counter, Device, EndpointKey, Family, FlowKey, Fragment, FragmentKey, Guest, Held, HeldKey,
        HostSocketKey, MAX_PREFIX_PAIRS, MOST_GUESTS, Mapping, Nat64, Permission, PermissionKey,
        Session, Settings, StandIn, Unsolicited, Upkeep, stages,
    },
    cut::MAX_FRAME,
    nat_log::Record,
    net::{Be32, Be128},
    nptv6::PrefixPair,
    parse::Packet,
    ports::{CLASSES, PortSet, Reserved, SETS},
    refusal::Budget,
    siit::error,
    time::Instant,
    verdict::{Plan, Reason},
};

/// The sizes, by default.
const HALVES: usize = 262_144;
const MOST_MAPPINGS: usize = 65_536;
const MOST_PERMISSIONS: usize = 131_072;
const MOST_PREFIXES: usize = 4096;
const MOST_KNOWN: usize = MOST_GUESTS as usize;
const MOST_DEVICES: usize = 1024;
const MOST_LOOKED_AFTER: usize = HALVES / 2;

/// An IP version with its maps.
pub trait Maps: Family {
    fn settings() -> &'static Array<Settings<Self>, 1>;
    fn sessions() -> &'static HashMap<FlowKey<Self>, Session<Self>, HALVES>;
    fn mappings() -> &'static HashMap<EndpointKey<Self>, Mapping<Self>, MOST_MAPPINGS>;
    fn inside() -> &'static HashMap<EndpointKey<Self>, EndpointKey<Self>, MOST_MAPPINGS>;
    fn permissions() -> &'static HashMap<PermissionKey<Self>, Permission, MOST_PERMISSIONS>;
    // The two tables that may forget: a flood of fragments pushes out fragments.
    fn fragments() -> &'static LruHashMap<FragmentKey<Self>, Fragment, 2048>;
    fn held() -> &'static LruHashMap<HeldKey<Self>, Held, 512>;
    // May forget as well: who floods SYNs loses the answers.
    fn unsolicited() -> &'static LruHashMap<FlowKey<Self>, Unsolicited, 1024>;
    // And who forwards nothing of what it is asked about, what it was asked.
    fn asked() -> &'static LruHashMap<FlowKey<Self>, EndpointKey<Self>, 4096>;
    /// May forget, too: who is told about errors, by address.
    fn told() -> &'static LruHashMap<Self, Budget, 1024>;
    // May forget: such a socket is then told of the guest's own endpoint.
    fn host_sockets() -> &'static LruHashMap<HostSocketKey<Self>, EndpointKey<Self>, 4096>;
    fn guests() -> &'static HashMap<Self, Guest, MOST_KNOWN>;
    fn guests_on() -> &'static HashMap<u32, u32, { MOST_DEVICES + 1 }>;
    fn denied() -> &'static LpmTrie<Self, u8, MOST_PREFIXES>;
    fn untranslated() -> &'static LpmTrie<Self, u8, MOST_PREFIXES>;
    fn devices() -> &'static HashMap<u32, Device<Self>, MOST_DEVICES>;
    fn ports() -> &'static Array<PortSet, { SETS as usize }>;
    fn upkeep() -> &'static Array<Upkeep, 1>;
    // May forget, if sessions begin faster than they are looked after.
    fn looked_after() -> &'static Queue<FlowKey<Self>, MOST_LOOKED_AFTER>;
    // Not shared with anyone, and so not part of the ABI.
    fn scratch() -> &'static PerCpuArray<Scratch<Self>, 1>;
    fn workspace() -> &'static PerCpuArray<Workspace<Self>, 1>;
    fn sweep_workspace() -> &'static PerCpuArray<Workspace<Self>, 1>;
}

macro_rules! maps {
    (
        $address:ty: $settings:ident, $sessions:ident, $mappings:ident, $inside:ident,
        $permissions:ident, $fragments:ident, $held:ident, $unsolicited:ident, $asked:ident,
        $told:ident, $host_sockets:ident, $guests:ident, $guests_on:ident, $denied:ident,
        $untranslated:ident, $devices:ident, $ports:ident, $upkeep:ident, $looked_after:ident, $scratch:ident,
        $workspace:ident, $sweep_workspace:ident,
    ) => {
        maps! {
            @ $address:
            settings $settings Array<Settings<$address>, 1>,
            sessions $sessions HashMap<FlowKey<$address>, Session<$address>, HALVES>,
            mappings $mappings
                HashMap<EndpointKey<$address>, Mapping<$address>, MOST_MAPPINGS>,
            inside $inside
                HashMap<EndpointKey<$address>, EndpointKey<$address>, MOST_MAPPINGS>,
            permissions $permissions
                HashMap<PermissionKey<$address>, Permission, MOST_PERMISSIONS>,
            fragments $fragments LruHashMap<FragmentKey<$address>, Fragment, 2048>,
            held $held LruHashMap<HeldKey<$address>, Held, 512>,
            unsolicited $unsolicited LruHashMap<FlowKey<$address>, Unsolicited, 1024>,
            asked $asked LruHashMap<FlowKey<$address>, EndpointKey<$address>, 4096>,
            told $told LruHashMap<$address, Budget, 1024>,
            host_sockets $host_sockets
                LruHashMap<HostSocketKey<$address>, EndpointKey<$address>, 4096>,
            guests $guests HashMap<$address, Guest, MOST_KNOWN>,
            guests_on $guests_on HashMap<u32, u32, { MOST_DEVICES + 1 }>,
            denied $denied LpmTrie<$address, u8, MOST_PREFIXES>,
            untranslated $untranslated LpmTrie<$address, u8, MOST_PREFIXES>,
            devices $devices HashMap<u32, Device<$address>, MOST_DEVICES>,
            ports $ports Array<PortSet, { SETS as usize }>,
            upkeep $upkeep Array<Upkeep, 1>,
            looked_after $looked_after Queue<FlowKey<$address>, MOST_LOOKED_AFTER>,
            scratch $scratch PerCpuArray<Scratch<$address>, 1>,
            workspace $workspace PerCpuArray<Workspace<$address>, 1>,
            sweep_workspace $sweep_workspace PerCpuArray<Workspace<$address>, 1>,
        }
    };
    (@ $address:ty: $($method:ident $name:ident $map:ty,)*) => {
        $(
            #[btf_map]
            static $name: $map = <$map>::new();
        )*
        impl Maps for $address {
            $(
                #[inline(always)]
                fn $method() -> &'static $map {
                    &$name
                }
            )*
        }
    };
}

maps! {
    Be32: SETTINGS, SESSIONS, MAPPINGS, INSIDE, PERMISSIONS, FRAGMENTS, HELD, UNSOLICITED, ASKED,
    TOLD, HOST_SOCKETS, GUESTS, GUESTS_ON, DENIED, UNTRANSLATED, DEVICES, PORTS, UPKEEP, LOOKED_AFTER,
    SCRATCH, WORKSPACE, SWEEP_WORKSPACE,
}
maps! {
    Be128: SETTINGS6, SESSIONS6, MAPPINGS6, INSIDE6, PERMISSIONS6, FRAGMENTS6, HELD6,
    UNSOLICITED6, ASKED6, TOLD6, HOST_SOCKETS6, GUESTS6, GUESTS_ON6, DENIED6, UNTRANSLATED6, DEVICES6, PORTS6,
    UPKEEP6, LOOKED_AFTER6, SCRATCH6, WORKSPACE6, SWEEP_WORKSPACE6,
}

/// Nothing ever written: what a new entry of [`Maps::fragments`] is copied from, as it
/// is longer than a stack.
#[btf_map]
pub static NO_FRAGMENT: Array<Fragment, 1> = Array::new();
#[btf_map]
pub static NAT64: Array<Nat64, 1> = Array::new();
#[btf_map]
pub static STAND_INS: HashMap<Be32, StandIn, MOST_KNOWN> = HashMap::new();
/// What becomes of an ICMP error of the other version.
#[btf_map]
pub static ERROR_TO_IPV4: PerCpuArray<error::Translation<Be32>, 1> = PerCpuArray::new();
#[btf_map]
pub static ERROR_TO_IPV6: PerCpuArray<error::Translation<Be128>, 1> = PerCpuArray::new();
/// A frame on its way into [`Maps::held`].
#[btf_map]
pub static FRAME: PerCpuArray<Held, 1> = PerCpuArray::new();
/// A frame whose skb is used for others meanwhile.
#[btf_map]
pub static WHOLE: PerCpuArray<Whole, 1> = PerCpuArray::new();
/// The identification of the last datagram that left in fragments, or its
/// predecessors' on another CPU.
#[btf_map]
pub static IDENTIFICATION: Array<u32, 1> = Array::new();
/// Of IPv6, where prefixes are translated.
#[btf_map]
pub static PREFIXES: Array<PrefixPair, { MAX_PREFIX_PAIRS as usize }> = Array::new();
#[btf_map]
pub static INSIDE_NETWORKS: LpmTrie<Be128, u32, 1024> = LpmTrie::new();
#[btf_map]
pub static RESERVED: Array<Reserved, { CLASSES as usize }> = Array::new();
/// What a packet out of the ordinary needs, off the stack, which is short.
#[derive(Clone, Copy)]
pub struct Scratch<A> {
    /// The index of the inside device it arrived on, or 0.
    pub device: u32,
    /// Bytes of its link header.
    pub link_length: u32,
    /// When it arrived.
    pub now: Instant,
    /// The number of the next piece of a packet that is cut.
    pub piece: u32,
    /// Why it leaves, once that is known.
    pub reason: Reason,
    pub packet: Packet<A>,
    pub plan: Plan<A>,
}

/// What does not fit a stack beside IPv6's addresses. Whoever puts something there uses
/// it at once, but for the four that a function apart was called with.
#[derive(Clone, Copy)]
pub struct Workspace<A> {
    /// Arguments of functions apart.
    pub key: FlowKey<A>,
    pub half: Session<A>,
    pub mapping: Mapping<A>,
    pub outside: EndpointKey<A>,
    /// Keys of what is looked up.
    pub twin_key: FlowKey<A>,
    pub endpoint: EndpointKey<A>,
    pub permission: PermissionKey<A>,
    pub held: HeldKey<A>,
    /// A session on its way into [`Maps::looked_after`].
    pub looked_after: FlowKey<A>,
    /// What the NAT log is to be told of once it is gone.
    pub logged: EndpointKey<A>,
    /// Of the sweep's workspace only.
    pub swept: Swept<A>,
    /// What the kernel's routing is asked.
    pub query: bpf_fib_lookup,
}

/// The key of what the sweep looks at, by its kind.
#[derive(Clone, Copy)]
pub struct Swept<A> {
    pub session: FlowKey<A>,
    pub mapping: EndpointKey<A>,
    pub permission: PermissionKey<A>,
    /// Of a session that the firewall is asked about again, which another process than the
    /// one that sweeps may want at the same time.
    pub asked: FlowKey<A>,
}

/// Twice as long as the longest frame, so that a part of any length may begin at any
/// place in it.
pub type Whole = [u8; WHOLE_BYTES];
pub const WHOLE_BYTES: usize = 2 * (MAX_FRAME as usize + 1);

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
