//! The pinned tables as the datapath's decisions see them, each entry read when it is asked for and
//! kept as a copy, to which all that is written goes.

use std::{
    cell::{Cell, RefCell, UnsafeCell},
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    num::NonZeroU32,
};

use anyhow::{Error, Result};
use ipnet::IpNet;
use tapnat_common::{
    abi::{
        Device, EndpointKey, FlowKey, Fragment, FragmentKey, Guest, Mapping, Nat64, NextHop,
        Permission, PermissionKey, Session, Settings, StandIn, Unsolicited, Upkeep, role,
    },
    embed::Prefix,
    frame::LinkAddresses,
    nat::{
        Fate, Insert, Route, Tables,
        guests::Entry,
        nat64::{GROWTH, StandIns, TO_STAND_IN},
    },
    net::{Be32, Be128, protocol},
    nptv6::PrefixPair,
    parse::Packet,
    ports::{CLASSES, Class, PortSet, Reserved},
    time::Instant,
};

use super::device_of;
use crate::{
    clock::now,
    family::IpFamily,
    forwards::Transport,
    host::sockets::{Listener, listeners},
    tables::PinnedTables,
};

/// Copies of entries. They stay where they are for as long as the table does, also when they are
/// removed or replaced, as in the kernel for the run of a program.
struct Copies<K, V> {
    entries: RefCell<HashMap<K, Option<usize>>>,
    values: RefCell<Vec<Box<UnsafeCell<V>>>>,
}

impl<K, V> Default for Copies<K, V> {
    fn default() -> Self {
        Self {
            entries: RefCell::default(),
            values: RefCell::default(),
        }
    }
}

impl<K: Copy + Eq + Hash, V: Copy> Copies<K, V> {
    /// The copy of an entry, which `read` reads the first time.
    #[expect(clippy::mut_from_ref, reason = "as `Tables` wants it")]
    fn get(&self, key: &K, read: impl FnOnce() -> Option<V>) -> Option<&mut V> {
        let known = self.entries.borrow().get(key).copied();
        let place = if let Some(place) = known {
            place?
        } else {
            let Some(value) = read() else {
                self.entries.borrow_mut().insert(*key, None);
                return None;
            };
            self.set(*key, value)
        };
        let values = self.values.borrow();
        let value = values.get(place)?.get();
        // SAFETY: it lies in a box that is there as long as the table is. Callers are those of
        // `Tables`, one thread, which look at one field at a time.
        Some(unsafe { &mut *value })
    }

    fn set(&self, key: K, value: V) -> usize {
        let mut values = self.values.borrow_mut();
        values.push(Box::new(UnsafeCell::new(value)));
        let place = values.len() - 1;
        self.entries.borrow_mut().insert(key, Some(place));
        place
    }

    fn insert(&self, key: &K, value: V, read: impl FnOnce() -> Option<V>) -> Insert {
        if self.get(key, read).is_some() {
            return Insert::Exists;
        }
        self.set(*key, value);
        Insert::Done
    }

    fn remove(&self, key: &K, read: impl FnOnce() -> Option<V>) -> bool {
        let is_there = self.get(key, read).is_some();
        self.entries.borrow_mut().insert(*key, None);
        is_there
    }
}

/// The tables for one packet.
pub struct Rehearsal<'a, A: IpFamily> {
    tables: &'a PinnedTables<A>,
    settings: Settings<A>,
    devices: Vec<(u32, Device<A>)>,
    pairs: Vec<PrefixPair>,
    reserved: Vec<Reserved>,
    denied: Vec<A::Net>,
    untranslated: Vec<A::Net>,
    listeners: Vec<Listener>,
    /// Of the packet, from the inside device that it arrives on.
    route: Route,
    has_room: [bool; 3],
    now: Instant,
    sessions: Copies<FlowKey<A>, Session<A>>,
    mappings: Copies<EndpointKey<A>, Mapping<A>>,
    inside: Copies<EndpointKey<A>, EndpointKey<A>>,
    permissions: Copies<PermissionKey<A>, Permission>,
    fragments: Copies<FragmentKey<A>, Fragment>,
    guests: Copies<A, Guest>,
    guests_on: Copies<u32, u32>,
    upkeep: Copies<(), Upkeep>,
    ports: Copies<u32, PortSet>,
    /// Why an entry could not be read.
    error: Cell<Option<Error>>,
}

impl<'a, A: IpFamily> Rehearsal<'a, A> {
    pub fn new(tables: &'a PinnedTables<A>, pairs: Vec<PrefixPair>, route: Route) -> Result<Self> {
        let mut reserved = Vec::new();
        for class in [Class::Tcp, Class::Udp, Class::Icmp] {
            reserved.push(tables.reserved(class)?);
        }
        debug_assert_eq!(reserved.len(), CLASSES as usize);
        let usages = [
            tables.session_usage()?,
            tables.mapping_usage()?,
            tables.guest_usage()?,
        ];
        Ok(Self {
            tables,
            settings: tables.settings()?,
            devices: tables.devices()?,
            pairs,
            reserved,
            denied: tables.denied()?,
            untranslated: tables.untranslated()?,
            listeners: listeners()?,
            route,
            has_room: usages.map(|usage| usage.used < u64::from(usage.capacity)),
            now: now(),
            sessions: Copies::default(),
            mappings: Copies::default(),
            inside: Copies::default(),
            permissions: Copies::default(),
            fragments: Copies::default(),
            guests: Copies::default(),
            guests_on: Copies::default(),
            upkeep: Copies::default(),
            ports: Copies::default(),
            error: Cell::default(),
        })
    }

    /// Whether every entry could be read.
    pub fn check(&self) -> Result<()> {
        self.error.take().map_or(Ok(()), Err)
    }

    fn read<T>(&self, result: Result<Option<T>>) -> Option<T> {
        read(&self.error, result)
    }

    fn read_session(&self, key: &FlowKey<A>) -> Option<Session<A>> {
        self.read(self.tables.half(key))
    }

    fn read_mapping(&self, outside: EndpointKey<A>) -> Option<Mapping<A>> {
        self.read(self.tables.mapping(&outside))
    }

    fn read_inside(&self, inside: EndpointKey<A>) -> Option<EndpointKey<A>> {
        self.read(self.tables.outside_of(&inside))
    }

    fn read_permission(&self, key: &PermissionKey<A>) -> Option<Permission> {
        self.read(self.tables.permission(key))
    }

    /// The device as the datapath sees where a packet arrived: nobody's unless it is an inside one.
    pub fn inside(&self, index: u32) -> Option<NonZeroU32> {
        let known = self.known(index)?;
        NonZeroU32::new(index).filter(|_| known.role == role::INSIDE)
    }

    fn known(&self, index: u32) -> Option<&Device<A>> {
        let mut devices = self.devices.iter();
        devices
            .find(|(known, _)| *known == index)
            .map(|(_, device)| device)
    }
}

/// Who stands in for whom, for one packet.
pub struct StandInTable<'a> {
    tables: &'a PinnedTables<Be128>,
    nat64: Nat64,
    has_room: bool,
    stand_ins: Copies<Be32, StandIn>,
    /// Why an entry could not be read.
    error: Cell<Option<Error>>,
}

impl<'a> StandInTable<'a> {
    pub fn new(tables: &'a PinnedTables<Be128>) -> Result<Self> {
        let usage = tables.stand_in_usage()?;
        Ok(Self {
            tables,
            nat64: tables.nat64_settings()?,
            has_room: usage.used < u64::from(usage.capacity),
            stand_ins: Copies::default(),
            error: Cell::default(),
        })
    }

    /// Whether every entry could be read.
    pub fn check(&self) -> Result<()> {
        self.error.take().map_or(Ok(()), Err)
    }

    fn read(&self, address: Be32) -> Option<StandIn> {
        read(&self.error, self.tables.stand_in(address))
    }
}

impl StandIns for StandInTable<'_> {
    fn prefix(&self) -> Option<Prefix> {
        Some(self.nat64.prefix).filter(|prefix| prefix.is_set())
    }

    fn secret(&self) -> u32 {
        self.nat64.secret
    }

    fn stand_in(&self, address: Be32) -> Option<&StandIn> {
        let guest = self.stand_ins.get(&address, || self.read(address));
        guest.map(|guest| &*guest)
    }

    fn insert_stand_in(&self, address: Be32, guest: &StandIn) -> Insert {
        let read = || self.read(address);
        insert_or_full(&self.stand_ins, self.has_room, &address, *guest, read)
    }

    fn enter_guest(&self, _address: Be32, _device: u32) -> Entry {
        // The decision about the packet of IPv4 that it becomes comes to it, too; only that
        // the datapath names a limit here before anything else that is in the way there.
        Entry::Done
    }
}

/// What was read; why nothing was goes to `error`.
fn read<T>(error: &Cell<Option<Error>>, result: Result<Option<T>>) -> Option<T> {
    result.unwrap_or_else(|why| {
        error.set(Some(why));
        None
    })
}

fn insert_or_full<K: Copy + Eq + Hash, V: Copy>(
    copies: &Copies<K, V>,
    has_room: bool,
    key: &K,
    value: V,
    read: impl FnOnce() -> Option<V>,
) -> Insert {
    match copies.get(key, read) {
        Some(_) => Insert::Exists,
        None if !has_room => Insert::Full,
        None => copies.insert(key, value, || None),
    }
}

fn any_contains<A: IpFamily>(nets: &[A::Net], address: A) -> bool {
    let address: IpAddr = address.into();
    let mut nets = nets.iter().map(|net| -> IpNet { (*net).into() });
    nets.any(|net| net.contains(&address))
}

impl<A: IpFamily> Tables<A> for Rehearsal<'_, A> {
    fn settings(&self) -> Option<&Settings<A>> {
        Some(&self.settings)
    }

    fn device(&self, index: u32) -> Option<&Device<A>> {
        self.known(index)
    }

    fn session(&self, key: &FlowKey<A>) -> Option<&mut Session<A>> {
        self.sessions.get(key, || self.read_session(key))
    }

    fn insert_session(&self, key: &FlowKey<A>, session: &Session<A>) -> Insert {
        let [has_room, ..] = self.has_room;
        let read = || self.read_session(key);
        insert_or_full(&self.sessions, has_room, key, *session, read)
    }

    fn remove_session(&self, key: &FlowKey<A>) -> bool {
        self.sessions.remove(key, || self.read_session(key))
    }

    fn mapping(&self, outside: &EndpointKey<A>) -> Option<&mut Mapping<A>> {
        self.mappings.get(outside, || self.read_mapping(*outside))
    }

    fn insert_mapping(&self, outside: &EndpointKey<A>, mapping: &Mapping<A>) -> Insert {
        let [_, has_room, _] = self.has_room;
        let read = || self.read_mapping(*outside);
        insert_or_full(&self.mappings, has_room, outside, *mapping, read)
    }

    fn remove_mapping(&self, outside: &EndpointKey<A>) -> bool {
        self.mappings
            .remove(outside, || self.read_mapping(*outside))
    }

    fn count(&self, counter: &mut u32, more: bool) {
        *counter = if more {
            counter.saturating_add(1)
        } else {
            counter.saturating_sub(1)
        };
    }

    fn outside_of(&self, inside: &EndpointKey<A>) -> Option<EndpointKey<A>> {
        let copy = self.inside.get(inside, || self.read_inside(*inside));
        copy.map(|outside| *outside)
    }

    fn insert_outside_of(&self, inside: &EndpointKey<A>, outside: &EndpointKey<A>) -> Insert {
        self.inside
            .insert(inside, *outside, || self.read_inside(*inside))
    }

    fn remove_outside_of(&self, inside: &EndpointKey<A>) {
        self.inside.remove(inside, || None);
    }

    fn permission(&self, key: &PermissionKey<A>) -> Option<&mut Permission> {
        self.permissions.get(key, || self.read_permission(key))
    }

    fn remove_permission(&self, key: &PermissionKey<A>) -> bool {
        self.permissions.remove(key, || self.read_permission(key))
    }

    fn set_permission(&self, key: &PermissionKey<A>, permission: &Permission) -> Insert {
        self.permissions.set(*key, *permission);
        Insert::Done
    }

    fn note_unsolicited(&self, _: &FlowKey<A>, _: &Unsolicited) {}

    // The host's firewall is not asked.
    fn note_asked(&self, _: &FlowKey<A>, _: &EndpointKey<A>) {}

    fn take_asked(&self, _: &FlowKey<A>) -> Option<EndpointKey<A>> {
        None
    }

    fn fragment(&self, key: &FragmentKey<A>) -> Option<&mut Fragment> {
        self.fragments.get(key, || None)
    }

    fn new_fragment(&self, _: &FragmentKey<A>) -> Option<&mut Fragment> {
        // The packets here are whole.
        None
    }

    fn next_identification(&self) -> Be32 {
        Be32::ZERO
    }

    fn guest(&self, address: A) -> Option<&mut Guest> {
        self.guests
            .get(&address, || self.read(self.tables.guest(address)))
    }

    fn insert_guest(&self, address: A, guest: &Guest) -> Insert {
        let [.., has_room] = self.has_room;
        let read = || self.read(self.tables.guest(address));
        insert_or_full(&self.guests, has_room, &address, *guest, read)
    }

    fn guests_on(&self, device: u32) -> Option<&mut u32> {
        self.guests_on
            .get(&device, || self.read(self.tables.guests_on(device)))
    }

    fn remove_guest(&self, address: A) -> bool {
        self.guests.remove(&address, || None)
    }

    fn is_denied(&self, destination: A) -> bool {
        any_contains(&self.denied, destination)
    }

    fn is_untranslated(&self, destination: A) -> bool {
        any_contains(&self.untranslated, destination)
    }

    fn count_off_guest(&self, address: A) {
        if let Some(guest) = self.guest(address) {
            self.count(&mut guest.sessions, false);
        }
    }

    fn count_port_on_guest(&self, address: A, port: u32, more: bool) {
        if let Some(guest) = self.guest(address) {
            guest.note_port(port, more);
            self.count(&mut guest.ports, more);
        }
    }

    fn forget_link_of_guest(&self, address: A) {
        if let Some(guest) = self.guest(address) {
            guest.link = 0;
        }
    }

    fn upkeep(&self) -> Option<&mut Upkeep> {
        self.upkeep
            .get(&(), || self.read(self.tables.upkeep().map(Some)))
    }

    fn look_after(&self, _: impl FnOnce(&mut FlowKey<A>)) {}

    fn take_looked_after(&self, _: &mut FlowKey<A>) -> bool {
        // The queue cannot be looked at without taking from it.
        false
    }

    fn ports(&self, index: u32) -> Option<&mut PortSet> {
        self.ports
            .get(&index, || self.read(self.tables.port_set(index).map(Some)))
    }

    fn reserved(&self, class: u32) -> Option<&Reserved> {
        self.reserved.get(class as usize)
    }

    fn prefix_pair(&self, place: u32) -> Option<&PrefixPair> {
        self.pairs.get(place as usize)
    }

    fn inside_device(&self, address: A) -> Option<u32> {
        let is_known = !self.pairs.is_empty();
        is_known
            .then(|| device_of(address, &self.devices))
            .flatten()
    }

    fn route_from(&self, _: NonZeroU32, _: &Packet<A>) -> Route {
        self.route
    }

    fn route_on(&self, device: u32, _: A, destination: A) -> Route {
        let Some(known) = self.known(device) else {
            return Route::default();
        };
        let (link, growth) = if destination.is_stand_in() {
            (TO_STAND_IN, GROWTH)
        } else {
            (LinkAddresses::default(), 0)
        };
        Route {
            fate: Fate::Onward,
            next_hop: NextHop { device, link },
            linked: false,
            mtu: known.mtu.saturating_sub(growth),
        }
    }

    fn host_socket(&self, local: &EndpointKey<A>, _: &EndpointKey<A>) -> bool {
        let transport = if local.protocol == protocol::TCP {
            Transport::Tcp
        } else {
            Transport::Udp
        };
        let address = local.address.into();
        self.listeners
            .iter()
            .any(|listener| listener.takes(transport, address, local.port.get()))
    }

    fn random(&self) -> u32 {
        // The first free port from the beginning on: which one it is does not matter.
        0
    }

    fn counts_traffic(&self) -> bool {
        false
    }

    fn now(&self) -> Instant {
        self.now
    }
}
