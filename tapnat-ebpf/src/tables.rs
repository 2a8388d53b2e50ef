//! The maps, the routes and the host's sockets, as `tapnat_common::nat` asks
//! for them.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_ANY, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, BPF_NOEXIST, bpf_fib_lookup,
        bpf_sock_tuple,
    },
    btf_maps::lpm_trie::Key,
    helpers::generated::{
        bpf_fib_lookup as fib_lookup, bpf_get_prandom_u32, bpf_sk_lookup_udp, bpf_sk_release,
        bpf_skc_lookup_tcp,
    },
};
use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    mem::MaybeUninit,
    num::NonZeroU32,
};
use tapnat_common::{
    abi::{
        Device, EndpointKey, FlowKey, Fragment, FragmentKey, Guest, Mapping, NextHop, Permission,
        PermissionKey, Session, Settings, Unsolicited,
    },
    frame::LinkAddresses,
    nat::{Fate, HalfInsert, Insert, Route, Tables},
    nat_log::events,
    net::{Be16, Be32, protocol},
    parse::Packet,
    ports::{PortSet, Reserved},
    time::Instant,
};

use crate::{COUNT_TRAFFIC, apart, maps, nat_log};

const AF_INET: u8 = 2;
const EEXIST: i32 = -17;
/// The network namespace of the packet's device: `BPF_F_CURRENT_NETNS`, which is -1.
const HERE: u64 = u64::MAX;

/// The kernel's side of [`Tables`], for one packet.
pub struct Kernel {
    context: *mut __sk_buff,
    now: Instant,
}

impl Kernel {
    #[inline(always)]
    pub const fn new(context: *mut __sk_buff, now: Instant) -> Self {
        Self { context, now }
    }

    /// Asks the kernel's routing, as for a packet that came in on `device`, or
    /// with `BPF_FIB_LOOKUP_OUTPUT` that goes out of it.
    #[inline(always)]
    fn route(&self, query: &mut bpf_fib_lookup, flags: u32) -> Route {
        query.family = AF_INET;
        // A length of 1 always fits and asks for the MTU.
        query.__bindgen_anon_1.tot_len = 1;
        let size = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: the context is valid, the query is a whole bpf_fib_lookup.
        let result = unsafe { fib_lookup(self.context.cast(), query, size, flags) };
        let Ok(result) = u32::try_from(result) else {
            return Route::default();
        };
        let device = self.device(query.ifindex);
        let device_mtu = device.map_or(0, |device| device.mtu);
        match result {
            BPF_FIB_LKUP_RET_SUCCESS => {
                // SAFETY: both members are plain 16-bit numbers.
                let route_mtu = unsafe { query.__bindgen_anon_1.mtu_result };
                // Kernels before 5.12 leave the length where the MTU belongs.
                let mtu = if route_mtu > 1 { route_mtu } else { device_mtu };
                let linked = device.is_some_and(|device| device.ethernet != 0);
                let link = LinkAddresses::new(query.dmac, query.smac);
                let next_hop = NextHop {
                    device: query.ifindex,
                    link,
                };
                Route {
                    fate: Fate::Onward,
                    next_hop,
                    linked,
                    mtu,
                }
            }
            BPF_FIB_LKUP_RET_NO_NEIGH => {
                let next_hop = NextHop {
                    device: query.ifindex,
                    ..NextHop::default()
                };
                Route {
                    fate: Fate::Onward,
                    next_hop,
                    linked: false,
                    mtu: device_mtu,
                }
            }
            BPF_FIB_LKUP_RET_FWD_DISABLED => Route {
                fate: Fate::Disabled,
                ..Route::default()
            },
            // Local, unreachable, prohibited, encapsulated: the kernel's to do.
            _ => Route::default(),
        }
    }
}

#[inline(always)]
fn empty_query() -> bpf_fib_lookup {
    const WORDS: usize = size_of::<bpf_fib_lookup>() / size_of::<u32>();
    let mut query = MaybeUninit::<bpf_fib_lookup>::uninit();
    let words = query.as_mut_ptr().cast::<u32>();
    for word in 0..WORDS {
        // SAFETY: within the query.
        let word = unsafe { words.add(word) };
        // Volatile, or the compiler makes it a call that clears byte by byte.
        // SAFETY: as above, and aligned as the query is.
        unsafe { word.write_volatile(0) };
    }
    // SAFETY: integers and unions of integers, for all of which 0 is a value.
    unsafe { query.assume_init() }
}

#[inline(always)]
const fn inserted(result: Result<(), i32>) -> Insert {
    match result {
        Ok(()) => Insert::Done,
        Err(EEXIST) => Insert::Exists,
        Err(_) => Insert::Full,
    }
}

/// A value in a map as Rust sees it.
#[inline(always)]
pub fn value<'a, V>(pointer: Option<*mut V>) -> Option<&'a mut V> {
    // SAFETY: the kernel keeps the value's memory for the program's run, and
    // every bit pattern is a value of our types. Other CPUs may write it at the
    // same time; no decision rests on two reads of a field agreeing.
    pointer.map(|pointer| unsafe { &mut *pointer })
}

/// Adds 1 to, or takes 1 from, a counter that all CPUs share.
#[inline(always)]
fn count(counter: &mut u32, more: bool) {
    let step = if more { 1 } else { u32::MAX };
    // The result is not used: this target has no atomic that gives one.
    // SAFETY: aligned, and valid as `counter` is.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(counter, step) };
}

impl Tables for Kernel {
    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        maps::SETTINGS.get(0)
    }

    #[inline(always)]
    fn device(&self, index: u32) -> Option<&Device> {
        value(maps::DEVICES.get_ptr_mut(index)).map(|device| &*device)
    }

    #[inline(always)]
    fn session(&self, key: &FlowKey) -> Option<&mut Session> {
        value(maps::SESSIONS.get_ptr_mut(key))
    }

    #[inline(always)]
    fn insert_session(&self, key: &FlowKey, session: &Session) -> Insert {
        let inserted = inserted(maps::SESSIONS.insert(key, session, u64::from(BPF_NOEXIST)));
        if inserted == Insert::Done
            && let Some(outside) = nat_log::outside_of(key, session)
        {
            nat_log::session(events::SESSION_CREATED, key, outside);
        }
        inserted
    }

    #[inline(always)]
    fn remove_session(&self, key: &FlowKey) -> bool {
        let before = if nat_log::is_on() {
            self.session(key)
                .and_then(|session| nat_log::outside_of(key, session))
        } else {
            None
        };
        let is_removed = maps::SESSIONS.remove(key).is_ok();
        if let Some(outside) = before
            && is_removed
        {
            nat_log::session(events::SESSION_REMOVED, key, outside);
        }
        is_removed
    }

    #[inline(always)]
    fn mapping(&self, outside: &EndpointKey) -> Option<&mut Mapping> {
        value(maps::MAPPINGS.get_ptr_mut(outside))
    }

    #[inline(always)]
    fn insert_mapping(&self, outside: &EndpointKey, mapping: &Mapping) -> Insert {
        let inserted = inserted(maps::MAPPINGS.insert(outside, mapping, u64::from(BPF_NOEXIST)));
        if inserted == Insert::Done {
            nat_log::mapping(events::MAPPING_CREATED, outside, &mapping.inside);
        }
        inserted
    }

    #[inline(always)]
    fn remove_mapping(&self, outside: &EndpointKey) -> bool {
        let before = if nat_log::is_on() {
            self.mapping(outside).map(|mapping| mapping.inside)
        } else {
            None
        };
        let is_removed = maps::MAPPINGS.remove(outside).is_ok();
        if let Some(inside) = before
            && is_removed
        {
            nat_log::mapping(events::MAPPING_REMOVED, outside, &inside);
        }
        is_removed
    }

    #[inline(always)]
    fn count_on_mapping(&self, outside: &EndpointKey, more: bool) {
        if let Some(mapping) = self.mapping(outside) {
            count(&mut mapping.sessions, more);
        }
    }

    #[inline(always)]
    fn outside_of(&self, inside: &EndpointKey) -> Option<EndpointKey> {
        value(maps::INSIDE.get_ptr_mut(inside)).map(|outside| *outside)
    }

    #[inline(always)]
    fn insert_outside_of(&self, inside: &EndpointKey, outside: &EndpointKey) -> Insert {
        inserted(maps::INSIDE.insert(inside, outside, u64::from(BPF_NOEXIST)))
    }

    #[inline(always)]
    fn remove_outside_of(&self, inside: &EndpointKey) {
        // Gone already is as good.
        let _ = maps::INSIDE.remove(inside);
    }

    #[inline(always)]
    fn permission(&self, key: &PermissionKey) -> Option<&mut Permission> {
        value(maps::PERMISSIONS.get_ptr_mut(key))
    }

    #[inline(always)]
    fn remove_permission(&self, key: &PermissionKey) -> bool {
        maps::PERMISSIONS.remove(key).is_ok()
    }

    #[inline(always)]
    fn set_permission(&self, key: &PermissionKey, permission: &Permission) -> Insert {
        inserted(maps::PERMISSIONS.insert(key, permission, u64::from(BPF_ANY)))
    }

    #[inline(always)]
    fn note_unsolicited(&self, key: &FlowKey, syn: &Unsolicited) {
        // An answer that is lost is no loss.
        let _ = maps::UNSOLICITED.insert(key, syn, u64::from(BPF_NOEXIST));
    }

    #[inline(always)]
    fn note_asked(&self, forwarded: &FlowKey, destination: &EndpointKey) {
        // What was forgotten is dropped by name when it comes.
        let _ = maps::ASKED.insert(forwarded, destination, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn take_asked(&self, forwarded: &FlowKey) -> Option<EndpointKey> {
        let destination = value(maps::ASKED.get_ptr_mut(forwarded)).map(|there| *there)?;
        // Gone already is as good.
        let _ = maps::ASKED.remove(forwarded);
        Some(destination)
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<&mut Fragment> {
        value(maps::FRAGMENTS.get_ptr_mut(key))
    }

    #[inline(always)]
    fn new_fragment(&self, key: &FragmentKey) -> Option<&mut Fragment> {
        let empty = maps::NO_FRAGMENT.get(0)?;
        // If the table cannot make room, the look-up tells.
        let _ = maps::FRAGMENTS.insert(key, empty, u64::from(BPF_ANY));
        self.fragment(key)
    }

    #[inline(always)]
    fn next_identification(&self) -> Be16 {
        let Some(last) = value(maps::IDENTIFICATION.get_ptr_mut(0)) else {
            return Be16::ZERO;
        };
        if *last == 0 {
            // Not the same ones after each start.
            *last = self.random();
        }
        count(last, true);
        Be16::new(*last as u16)
    }

    #[inline(always)]
    fn guest(&self, address: Be32) -> Option<&mut Guest> {
        if let Some(guest) = value(maps::GUESTS.get_ptr_mut(address)) {
            return Some(guest);
        }
        // Another CPU may have been faster; either way it is there, or full.
        let _ = maps::GUESTS.insert(address, Guest::default(), u64::from(BPF_NOEXIST));
        value(maps::GUESTS.get_ptr_mut(address))
    }

    #[inline(always)]
    fn remove_guest(&self, address: Be32) -> bool {
        maps::GUESTS.remove(address).is_ok()
    }

    #[inline(always)]
    fn is_denied(&self, destination: Be32) -> bool {
        maps::DENIED.get(&Key::new(32, destination)).is_some()
    }

    #[inline(always)]
    fn is_untranslated(&self, destination: Be32) -> bool {
        maps::UNTRANSLATED.get(&Key::new(32, destination)).is_some()
    }

    #[inline(always)]
    fn count_on_guest(&self, address: Be32, more: bool) {
        if let Some(guest) = value(maps::GUESTS.get_ptr_mut(address))
            && (more || guest.sessions != 0)
        {
            count(&mut guest.sessions, more);
        }
    }

    #[inline(always)]
    fn count_port_on_guest(&self, address: Be32, more: bool) {
        if let Some(guest) = value(maps::GUESTS.get_ptr_mut(address))
            && (more || guest.ports != 0)
        {
            count(&mut guest.ports, more);
        }
    }

    #[inline(always)]
    fn ports(&self, index: u32) -> Option<&mut PortSet> {
        value(maps::PORTS.get_ptr_mut(index))
    }

    #[inline(always)]
    fn reserved(&self, class: u32) -> Option<&Reserved> {
        maps::RESERVED.get(class)
    }

    #[inline(always)]
    fn route_from(&self, device: NonZeroU32, packet: &Packet) -> Route {
        let mut query = empty_query();
        query.ifindex = device.get();
        query.l4_protocol = packet.protocol;
        query.sport = packet.source_port.raw();
        query.dport = packet.destination_port.raw();
        query.__bindgen_anon_3.ipv4_src = packet.source.raw();
        query.__bindgen_anon_4.ipv4_dst = packet.destination.raw();
        self.route(&mut query, 0)
    }

    #[inline(always)]
    fn route_on(&self, device: u32, source: Be32, destination: Be32) -> Route {
        let mut query = empty_query();
        query.ifindex = device;
        query.__bindgen_anon_3.ipv4_src = source.raw();
        query.__bindgen_anon_4.ipv4_dst = destination.raw();
        self.route(&mut query, BPF_FIB_LOOKUP_OUTPUT)
    }

    #[inline(always)]
    fn host_socket(&self, local: &EndpointKey, remote: &EndpointKey) -> bool {
        let mut tuple = aya_ebpf::bindings::bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: remote.address.raw(),
            daddr: local.address.raw(),
            sport: remote.port.raw(),
            dport: local.port.raw(),
        };
        // The size tells the helper which member of the union it is.
        let size = size_of_val(&tuple) as u32;
        let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
        let context = self.context.cast();
        let socket = if local.protocol == protocol::TCP {
            // SAFETY: the context is valid, the tuple as long as it says.
            unsafe { bpf_skc_lookup_tcp(context, tuple, size, HERE, 0) }
        } else {
            // SAFETY: as above.
            unsafe { bpf_sk_lookup_udp(context, tuple, size, HERE, 0) }
        };
        if socket.is_null() {
            return false;
        }
        // SAFETY: a lookup that found something gave us a reference.
        unsafe { bpf_sk_release(socket.cast()) };
        true
    }

    #[inline(always)]
    fn is_outside(&self, address: Be32) -> bool {
        apart::is_outside(address.raw()) != 0
    }

    #[inline(always)]
    fn find_port(&self, set: u32, wanted: u16, random: u32) -> Option<u16> {
        u16::try_from(apart::find_port(set, u32::from(wanted), random)).ok()
    }

    #[inline(always)]
    fn take_port(&self, outside: &EndpointKey, mapping: &Mapping) -> Insert {
        const DONE: u32 = Insert::Done as u32;
        const EXISTS: u32 = Insert::Exists as u32;
        match apart::take_port(self.context, outside, mapping) {
            DONE => Insert::Done,
            EXISTS => Insert::Exists,
            _ => Insert::Full,
        }
    }

    #[inline(always)]
    fn is_unused(&self, back: &FlowKey) -> bool {
        apart::is_unused(self.context, back) != 0
    }

    #[inline(always)]
    fn insert_half(
        &self,
        key: &FlowKey,
        session: &Session,
        twin_key: Option<&FlowKey>,
    ) -> HalfInsert {
        const DONE: u32 = HalfInsert::Done as u32;
        const EXISTS: u32 = HalfInsert::Exists as u32;
        const CONFLICT: u32 = HalfInsert::Conflict as u32;
        let twin_key = twin_key.map_or(core::ptr::null(), core::ptr::from_ref);
        match apart::insert_half(key, session, twin_key) {
            DONE => HalfInsert::Done,
            EXISTS => HalfInsert::Exists,
            CONFLICT => HalfInsert::Conflict,
            _ => HalfInsert::Full,
        }
    }

    #[inline(always)]
    fn close_session(&self, key: &FlowKey, session: &Session) {
        let _ = apart::close_session(key, session);
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn counts_traffic(&self) -> bool {
        COUNT_TRAFFIC.load() != 0
    }

    #[inline(always)]
    fn now(&self) -> Instant {
        self.now
    }
}
