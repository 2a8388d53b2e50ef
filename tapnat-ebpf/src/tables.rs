//! The maps, the routes and the host's sockets, as `tapnat_common::nat` asks
//! for them.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_ANY, BPF_EXIST, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, BPF_NOEXIST, bpf_fib_lookup,
        bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    btf_maps::lpm_trie::Key,
    helpers::generated::{
        bpf_fib_lookup as fib_lookup, bpf_get_prandom_u32, bpf_sk_lookup_udp, bpf_sk_release,
        bpf_skc_lookup_tcp,
    },
};
use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    marker::PhantomData,
    num::NonZeroU32,
};
use tapnat_common::{
    abi::{
        Device, EndpointKey, FlowKey, Fragment, FragmentKey, Guest, Mapping, NextHop, Permission,
        PermissionKey, Session, Settings, Unsolicited, Upkeep,
    },
    frame::LinkAddresses,
    nat::{
        self, Fate, HalfInsert, Insert, Route, Tables,
        guests::Entry,
        nat64::{GROWTH, TO_STAND_IN},
    },
    nat_log::events,
    net::{Address as _, Be32, Be128, protocol},
    nptv6::PrefixPair,
    parse::Packet,
    ports::{PortSet, Reserved},
    time::Instant,
};

use crate::{
    COUNT_TRAFFIC, HAS_NAT64,
    apart::Apart,
    maps::{self, Maps, Workspace},
    nat_log,
};

const EEXIST: i32 = -17;
/// The network namespace of the packet's device: `BPF_F_CURRENT_NETNS`, which is -1.
const HERE: u64 = u64::MAX;

/// An IP version as the kernel's routing and sockets know it.
pub trait Routed: Apart {
    /// The address family (`sys/socket.h`).
    const ADDRESS_FAMILY: u8;
    /// As `bpf_sock_tuple` has it.
    type SocketTuple;

    fn set_ends(query: &mut bpf_fib_lookup, source: Self, destination: Self);

    /// Of a packet from `remote` to `local`.
    fn socket_tuple(local: &EndpointKey<Self>, remote: &EndpointKey<Self>) -> Self::SocketTuple;
}

impl Routed for Be32 {
    const ADDRESS_FAMILY: u8 = 2;
    type SocketTuple = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1;

    #[inline(always)]
    fn set_ends(query: &mut bpf_fib_lookup, source: Self, destination: Self) {
        query.__bindgen_anon_3.ipv4_src = source.raw();
        query.__bindgen_anon_4.ipv4_dst = destination.raw();
    }

    #[inline(always)]
    fn socket_tuple(local: &EndpointKey, remote: &EndpointKey) -> Self::SocketTuple {
        Self::SocketTuple {
            saddr: remote.address.raw(),
            daddr: local.address.raw(),
            sport: remote.port.raw(),
            dport: local.port.raw(),
        }
    }
}

impl Routed for Be128 {
    const ADDRESS_FAMILY: u8 = 10;
    type SocketTuple = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2;

    #[inline(always)]
    fn set_ends(query: &mut bpf_fib_lookup, source: Self, destination: Self) {
        query.__bindgen_anon_3.ipv6_src = source.words().map(Be32::raw);
        query.__bindgen_anon_4.ipv6_dst = destination.words().map(Be32::raw);
    }

    #[inline(always)]
    fn socket_tuple(local: &EndpointKey<Self>, remote: &EndpointKey<Self>) -> Self::SocketTuple {
        Self::SocketTuple {
            saddr: remote.address.words().map(Be32::raw),
            daddr: local.address.words().map(Be32::raw),
            sport: remote.port.raw(),
            dport: local.port.raw(),
        }
    }
}

/// The kernel's side of [`Tables`], for one packet; with `SWEEPS`, for one run of the sweep.
pub struct Kernel<A, const SWEEPS: bool = false> {
    context: *mut __sk_buff,
    now: Instant,
    family: PhantomData<A>,
}

impl<A: Apart> Kernel<A> {
    #[inline(always)]
    pub const fn new(context: *mut __sk_buff, now: Instant) -> Self {
        Self {
            context,
            now,
            family: PhantomData,
        }
    }
}

impl<A: Apart> Kernel<A, true> {
    #[inline(always)]
    pub const fn of_sweep(context: *mut __sk_buff, now: Instant) -> Self {
        Self {
            context,
            now,
            family: PhantomData,
        }
    }
}

impl<A: Routed, const SWEEPS: bool> Kernel<A, SWEEPS> {
    /// This CPU's, of packets or of the sweep: until Linux 6.3 packets may come while the
    /// kernel runs the sweep.
    #[inline(always)]
    pub fn workspace<'a>() -> Option<&'a mut Workspace<A>> {
        if SWEEPS {
            value(A::sweep_workspace().get_ptr_mut(0))
        } else {
            workspace::<A>()
        }
    }

    /// The key, where a stack has no room for it.
    #[inline(always)]
    fn wide_endpoint(key: &EndpointKey<A>) -> Option<&EndpointKey<A>> {
        if u32::from(A::BITS) <= u32::BITS {
            return Some(key);
        }
        let workspace = Self::workspace()?;
        workspace.endpoint = *key;
        Some(&workspace.endpoint)
    }

    /// See [`Kernel::wide_endpoint`].
    #[inline(always)]
    fn wide_permission(key: &PermissionKey<A>) -> Option<&PermissionKey<A>> {
        if u32::from(A::BITS) <= u32::BITS {
            return Some(key);
        }
        let workspace = Self::workspace()?;
        workspace.permission = *key;
        Some(&workspace.permission)
    }

    /// Keeps what the NAT log is to be told of what is about to be removed, where it is on.
    #[inline(always)]
    fn keep_for_log<'a>(
        endpoint: impl FnOnce() -> Option<EndpointKey<A>>,
    ) -> Option<&'a EndpointKey<A>> {
        if !nat_log::is_on() {
            return None;
        }
        let workspace = Self::workspace()?;
        workspace.logged = endpoint()?;
        Some(&workspace.logged)
    }

    /// The way to a guest that a stand-in is for, which is on this device.
    #[inline(always)]
    fn route_to_stand_in(&self, device: u32) -> Route {
        let mtu = self.device(device).map_or(0, |device| device.mtu);
        Route {
            fate: Fate::Onward,
            next_hop: NextHop {
                device,
                link: TO_STAND_IN,
            },
            linked: false,
            mtu: mtu.saturating_sub(GROWTH),
        }
    }

    /// Asks the kernel's routing, as for a packet that came in on `device`, or
    /// with `BPF_FIB_LOOKUP_OUTPUT` that goes out of it.
    #[inline(always)]
    fn route(&self, query: &mut bpf_fib_lookup, flags: u32) -> Route {
        query.family = A::ADDRESS_FAMILY;
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
                let mtu = unsafe { query.__bindgen_anon_1.mtu_result };
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

/// This CPU's, of packets.
#[inline(always)]
pub fn workspace<'a, A: Maps>() -> Option<&'a mut Workspace<A>> {
    value(A::workspace().get_ptr_mut(0))
}

#[inline(always)]
pub const fn inserted(result: Result<(), i32>) -> Insert {
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

impl<A: Routed, const SWEEPS: bool> Tables<A> for Kernel<A, SWEEPS> {
    #[inline(always)]
    fn settings(&self) -> Option<&Settings<A>> {
        A::settings().get(0)
    }

    #[inline(always)]
    fn device(&self, index: u32) -> Option<&Device<A>> {
        value(A::devices().get_ptr_mut(index)).map(|device| &*device)
    }

    #[inline(always)]
    fn session(&self, key: &FlowKey<A>) -> Option<&mut Session<A>> {
        value(A::sessions().get_ptr_mut(key))
    }

    #[inline(always)]
    fn insert_session(&self, key: &FlowKey<A>, session: &Session<A>) -> Insert {
        let inserted = inserted(A::sessions().insert(key, session, u64::from(BPF_NOEXIST)));
        if inserted == Insert::Done
            && let Some(outside) = nat_log::outside_of(key, session)
        {
            nat_log::session(events::SESSION_CREATED, key, &outside);
        }
        inserted
    }

    #[inline(always)]
    fn remove_session(&self, key: &FlowKey<A>) -> bool {
        let logged = Self::keep_for_log(|| nat_log::outside_of(key, self.session(key)?));
        let is_removed = A::sessions().remove(key).is_ok();
        if let Some(outside) = logged
            && is_removed
        {
            nat_log::session(events::SESSION_REMOVED, key, outside);
        }
        is_removed
    }

    #[inline(always)]
    fn mapping(&self, outside: &EndpointKey<A>) -> Option<&mut Mapping<A>> {
        value(A::mappings().get_ptr_mut(Self::wide_endpoint(outside)?))
    }

    #[inline(always)]
    fn insert_mapping(&self, outside: &EndpointKey<A>, mapping: &Mapping<A>) -> Insert {
        let inserted = inserted(A::mappings().insert(outside, mapping, u64::from(BPF_NOEXIST)));
        if inserted == Insert::Done {
            nat_log::mapping(events::MAPPING_CREATED, outside, &mapping.inside);
        }
        inserted
    }

    #[inline(always)]
    fn remove_mapping(&self, outside: &EndpointKey<A>) -> bool {
        let logged = Self::keep_for_log(|| self.mapping(outside).map(|mapping| mapping.inside));
        let is_removed = A::mappings().remove(outside).is_ok();
        if let Some(inside) = logged
            && is_removed
        {
            nat_log::mapping(events::MAPPING_REMOVED, outside, inside);
        }
        is_removed
    }

    #[inline(always)]
    fn count(&self, counter: &mut u32, more: bool) {
        count(counter, more);
    }

    #[inline(always)]
    fn outside_of(&self, inside: &EndpointKey<A>) -> Option<EndpointKey<A>> {
        value(A::inside().get_ptr_mut(Self::wide_endpoint(inside)?)).map(|outside| *outside)
    }

    #[inline(always)]
    fn insert_outside_of(&self, inside: &EndpointKey<A>, outside: &EndpointKey<A>) -> Insert {
        inserted(A::inside().insert(inside, outside, u64::from(BPF_NOEXIST)))
    }

    #[inline(always)]
    fn remove_outside_of(&self, inside: &EndpointKey<A>) {
        // Gone already is as good.
        let _ = A::inside().remove(inside);
    }

    #[inline(always)]
    fn permission(&self, key: &PermissionKey<A>) -> Option<&mut Permission> {
        value(A::permissions().get_ptr_mut(Self::wide_permission(key)?))
    }

    #[inline(always)]
    fn remove_permission(&self, key: &PermissionKey<A>) -> bool {
        A::permissions().remove(key).is_ok()
    }

    #[inline(always)]
    fn set_permission(&self, key: &PermissionKey<A>, permission: &Permission) -> Insert {
        let Some(key) = Self::wide_permission(key) else {
            return Insert::Full;
        };
        inserted(A::permissions().insert(key, permission, u64::from(BPF_ANY)))
    }

    #[inline(always)]
    fn note_unsolicited(&self, key: &FlowKey<A>, syn: &Unsolicited) {
        // An answer that is lost is no loss.
        let _ = A::unsolicited().insert(key, syn, u64::from(BPF_NOEXIST));
    }

    #[inline(always)]
    fn note_asked(&self, forwarded: &FlowKey<A>, destination: &EndpointKey<A>) {
        // What was forgotten is dropped by name when it comes.
        let _ = A::asked().insert(forwarded, destination, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn take_asked(&self, forwarded: &FlowKey<A>) -> Option<EndpointKey<A>> {
        let destination = value(A::asked().get_ptr_mut(forwarded)).map(|there| *there)?;
        // Gone already is as good.
        let _ = A::asked().remove(forwarded);
        Some(destination)
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey<A>) -> Option<&mut Fragment> {
        value(A::fragments().get_ptr_mut(key))
    }

    #[inline(always)]
    fn new_fragment(&self, key: &FragmentKey<A>) -> Option<&mut Fragment> {
        let empty = maps::NO_FRAGMENT.get(0)?;
        // If the table cannot make room, the look-up tells.
        let _ = A::fragments().insert(key, empty, u64::from(BPF_ANY));
        self.fragment(key)
    }

    #[inline(always)]
    fn next_identification(&self) -> Be32 {
        let Some(last) = value(maps::IDENTIFICATION.get_ptr_mut(0)) else {
            return Be32::ZERO;
        };
        if *last == 0 {
            // Not the same ones after each start.
            *last = self.random();
        }
        count(last, true);
        Be32::new(*last)
    }

    #[inline(always)]
    fn guest(&self, address: A) -> Option<&mut Guest> {
        value(A::guests().get_ptr_mut(address))
    }

    #[inline(always)]
    fn insert_guest(&self, address: A, guest: &Guest) -> Insert {
        inserted(A::guests().insert(address, guest, u64::from(BPF_NOEXIST)))
    }

    #[inline(always)]
    fn remove_guest(&self, address: A) -> bool {
        let is_removed = A::guests().remove(address).is_ok();
        if is_removed && HAS_NAT64.load() != 0 && address.is_stand_in() {
            // It is nobody's any more. One whose packet is under way gets the same one again.
            let _ = maps::STAND_INS.remove(Be32::new(address.low_bits()));
        }
        is_removed
    }

    #[inline(always)]
    fn guests_on(&self, device: u32) -> Option<&mut u32> {
        value(A::guests_on().get_ptr_mut(device))
    }

    #[inline(always)]
    fn enter_guest(&self, address: A, device: u32) -> Entry {
        const DONE: u32 = Entry::Done as u32;
        const DEVICE_LIMIT: u32 = Entry::DeviceLimit as u32;
        match A::enter_guest(&raw const address, device) {
            DONE => Entry::Done,
            DEVICE_LIMIT => Entry::DeviceLimit,
            _ => Entry::Full,
        }
    }

    #[inline(always)]
    fn is_denied(&self, destination: A) -> bool {
        A::denied()
            .get(&Key::new(A::BITS.into(), destination))
            .is_some()
    }

    #[inline(always)]
    fn is_untranslated(&self, destination: A) -> bool {
        A::untranslated()
            .get(&Key::new(A::BITS.into(), destination))
            .is_some()
    }

    #[inline(always)]
    fn count_off_guest(&self, address: A) {
        if let Some(guest) = value(A::guests().get_ptr_mut(address))
            && guest.sessions != 0
        {
            count(&mut guest.sessions, false);
        }
    }

    #[inline(always)]
    fn count_port_on_guest(&self, address: A, port: u32, more: bool) {
        if let Some(guest) = value(A::guests().get_ptr_mut(address)) {
            guest.note_port(port, more);
            if more || guest.ports != 0 {
                count(&mut guest.ports, more);
            }
        }
    }

    #[inline(always)]
    fn forget_link_of_guest(&self, address: A) {
        if let Some(guest) = value(A::guests().get_ptr_mut(address)) {
            guest.link = 0;
        }
    }

    #[inline(always)]
    fn upkeep(&self) -> Option<&mut Upkeep> {
        value(A::upkeep().get_ptr_mut(0))
    }

    #[inline(always)]
    fn look_after(&self, write: impl FnOnce(&mut FlowKey<A>)) {
        if let Some(workspace) = Self::workspace() {
            write(&mut workspace.looked_after);
            let session: &FlowKey<A> = &workspace.looked_after;
            // In place of the oldest one it is always possible.
            let _ = A::looked_after().push(session, u64::from(BPF_EXIST));
        }
    }

    #[inline(always)]
    fn take_looked_after(&self, key: &mut FlowKey<A>) -> bool {
        match A::looked_after().pop() {
            Ok(Some(first)) => {
                *key = first;
                true
            }
            Ok(None) | Err(_) => false,
        }
    }

    #[inline(always)]
    fn next_taken(&self, set: u32, place: u32) -> u32 {
        A::next_taken(set, place)
    }

    #[inline(always)]
    fn ports(&self, index: u32) -> Option<&mut PortSet> {
        value(A::ports().get_ptr_mut(index))
    }

    #[inline(always)]
    fn reserved(&self, class: u32) -> Option<&Reserved> {
        maps::RESERVED.get(class)
    }

    #[inline(always)]
    fn prefix_pair(&self, place: u32) -> Option<&PrefixPair> {
        maps::PREFIXES.get(place)
    }

    #[inline(always)]
    fn inside_device(&self, address: A) -> Option<u32> {
        maps::INSIDE_NETWORKS
            .get(&Key::new(Be128::BITS.into(), address.mapped()))
            .copied()
    }

    #[inline(always)]
    fn route_from(&self, device: NonZeroU32, packet: &Packet<A>) -> Route {
        let Some(workspace) = Self::workspace() else {
            return Route::default();
        };
        let query = &mut workspace.query;
        // SAFETY: numbers and arrays of them.
        *query = unsafe { core::mem::zeroed() };
        query.ifindex = device.get();
        query.l4_protocol = packet.protocol;
        query.sport = packet.source_port.raw();
        query.dport = packet.destination_port.raw();
        A::set_ends(query, packet.source, packet.destination);
        self.route(query, 0)
    }

    #[inline(always)]
    fn route_on(&self, device: u32, source: A, destination: A) -> Route {
        if destination.is_stand_in() {
            return self.route_to_stand_in(device);
        }
        let Some(workspace) = Self::workspace() else {
            return Route::default();
        };
        let query = &mut workspace.query;
        // SAFETY: numbers and arrays of them.
        *query = unsafe { core::mem::zeroed() };
        query.ifindex = device;
        A::set_ends(query, source, destination);
        self.route(query, BPF_FIB_LOOKUP_OUTPUT)
    }

    #[inline(always)]
    fn host_socket(&self, local: &EndpointKey<A>, remote: &EndpointKey<A>) -> bool {
        let mut tuple = A::socket_tuple(local, remote);
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
    fn is_outside(&self, address: A) -> bool {
        A::is_outside(&raw const address) != 0
    }

    #[inline(always)]
    fn find_port(&self, set: u32, wanted: u16, random: u32) -> Option<u16> {
        u16::try_from(A::find_port(set, u32::from(wanted), random)).ok()
    }

    #[inline(always)]
    fn take_port(
        &self,
        outside: &EndpointKey<A>,
        mapping: &Mapping<A>,
        is_at_limit: bool,
    ) -> Insert {
        const DONE: u32 = Insert::Done as u32;
        const EXISTS: u32 = Insert::Exists as u32;
        let now = self.now.number();
        match A::take_port(self.context, outside, mapping, is_at_limit.into(), now) {
            DONE => Insert::Done,
            EXISTS => Insert::Exists,
            _ => Insert::Full,
        }
    }

    #[inline(always)]
    fn is_unused(&self, back: &FlowKey<A>) -> bool {
        A::is_unused(self.context, back, self.now.number()) != 0
    }

    #[inline(always)]
    fn insert_half(
        &self,
        key: &FlowKey<A>,
        session: &Session<A>,
        twin_key: Option<&FlowKey<A>>,
    ) -> HalfInsert {
        const DONE: u32 = HalfInsert::Done as u32;
        const EXISTS: u32 = HalfInsert::Exists as u32;
        const CONFLICT: u32 = HalfInsert::Conflict as u32;
        const OVER: u32 = HalfInsert::Over as u32;
        let twin_key = twin_key.map_or(core::ptr::null(), core::ptr::from_ref);
        match A::insert_half(key, session, twin_key, self.now.number()) {
            DONE => HalfInsert::Done,
            EXISTS => HalfInsert::Exists,
            CONFLICT => HalfInsert::Conflict,
            OVER => HalfInsert::Over,
            _ => HalfInsert::Full,
        }
    }

    #[inline(always)]
    fn close_session(&self, key: &FlowKey<A>, kept: Option<&FlowKey<A>>) {
        if SWEEPS {
            // A function apart would use what packets use.
            nat::session::close(key, kept, self);
            return;
        }
        let kept = kept.map_or(core::ptr::null(), core::ptr::from_ref);
        let _ = A::close_session(key, kept, self.now.number());
    }

    #[inline(always)]
    fn twin(&self, key: &FlowKey<A>, session: &Session<A>) -> Option<&mut Session<A>> {
        let workspace = Self::workspace()?;
        workspace.twin_key = session.twin_key(key);
        self.session(&workspace.twin_key)
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
