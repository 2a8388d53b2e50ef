//! The pinned tables, as user space reads and writes them. The only place of the user side that
//! touches a map; what the entries mean is [`tapnat_common`]'s, how they look to people is
//! [`crate::view`]'s.

mod batch;
mod both;
mod mappings;

use std::{io, iter, net::IpAddr, path::Path};

use anyhow::{Context as _, Error, Result, anyhow};
use aya::{
    Pod,
    maps::{
        Array, HashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
};
use ipnet::IpNet;
use rustix::rand::{GetRandomFlags, getrandom};
use tapnat_common::{
    abi::{
        ABI_VERSION, Counter, Device, EVERY_DEVICE, EndpointKey, FlowKey, Guest, MAX_PREFIX_PAIRS,
        Mapping, Nat64, Permission, PermissionKey, Session, Settings, StandIn, Unsolicited, Upkeep,
        maps, role,
    },
    embed::Prefix,
    nat::nat64::is_stand_in,
    net::{Be32, Be128},
    nptv6::PrefixPair,
    ports::{Class, PortSet, Reserved, SETS, set_index},
    time::Instant,
    verdict::Reason,
};

pub use self::{batch::Walk, both::BothTables};
use self::{batch::for_each, mappings::gone_is_fine};
use crate::{family::IpFamily, instance::InstanceName};

/// Why pinned tables cannot be used.
#[derive(Debug)]
pub enum Unusable {
    /// Nothing is pinned there.
    Missing,
    /// Pinned, but a start was cut short before they were filled.
    Unfinished,
    /// Another version of tapnat pinned them.
    OtherVersion,
    /// The kernel refuses to open them.
    Refused(Error),
}

impl Unusable {
    /// The reason in a sentence, for tables of an instance that should be in `directory`.
    #[must_use]
    pub fn explain(self, instance: &InstanceName, directory: &Path) -> Error {
        let directory = directory.display();
        match self {
            Self::Missing => anyhow!(
                "no tables are pinned in {directory}: start \
                 `tapnat run --instance {instance}`"
            ),
            Self::Unfinished => anyhow!(
                "a start of tapnat was cut short before it filled the tables in {directory}: start \
                 it again, or take it away (`tapnat down --instance {instance}`)"
            ),
            Self::OtherVersion => anyhow!(
                "{directory} holds the tables of another version of tapnat: use that version, or \
                 take it away (`tapnat down --instance {instance}`) and start anew"
            ),
            Self::Refused(error) => error,
        }
    }
}

/// How many entries a table has and can have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Usage {
    pub used: u64,
    pub capacity: u32,
}

/// The tables of one instance.
pub struct PinnedTables<A: IpFamily = Be32> {
    settings: Array<MapData, Settings<A>>,
    sessions: HashMap<MapData, FlowKey<A>, Session<A>>,
    mappings: HashMap<MapData, EndpointKey<A>, Mapping<A>>,
    inside: HashMap<MapData, EndpointKey<A>, EndpointKey<A>>,
    permissions: HashMap<MapData, PermissionKey<A>, Permission>,
    unsolicited: HashMap<MapData, FlowKey<A>, Unsolicited>,
    guests: HashMap<MapData, A, Guest>,
    guests_on: HashMap<MapData, u32, u32>,
    upkeep: Array<MapData, Upkeep>,
    denied: LpmTrie<MapData, A, u8>,
    untranslated: LpmTrie<MapData, A, u8>,
    devices: HashMap<MapData, u32, Device<A>>,
    ports: Array<MapData, PortSet>,
    reserved: Array<MapData, Reserved>,
    nat64: Array<MapData, Nat64>,
    stand_ins: HashMap<MapData, Be32, StandIn>,
    counters: PerCpuArray<MapData, Counter>,
}

const CANNOT_COUNT: &str = "cannot write the table of guests' devices";

/// The tables of IPv6 that the translation of prefixes has of its own.
pub struct PrefixTables {
    pairs: Array<MapData, PrefixPair>,
    networks: LpmTrie<MapData, Be128, u32>,
}

impl PrefixTables {
    /// Opens the tables pinned in `directory`.
    ///
    /// # Errors
    ///
    /// With the reason why they cannot be used.
    pub fn open(directory: &Path) -> Result<Self, Unusable> {
        Ok(Self {
            pairs: open(directory, maps::PREFIXES)?,
            networks: open(directory, maps::INSIDE_NETWORKS)?,
        })
    }

    /// The pairs that are translated.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn pairs(&self) -> Result<Vec<PrefixPair>> {
        let pairs: Vec<_> = self
            .pairs
            .iter()
            .collect::<Result<_, _>>()
            .context("cannot read the pairs of prefixes")?;
        Ok(pairs.into_iter().filter(|pair| pair.is_set()).collect())
    }

    /// Makes these the pairs that are translated, [`MAX_PREFIX_PAIRS`] at most.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_pairs(&mut self, pairs: &[PrefixPair]) -> Result<()> {
        let rest = iter::repeat(PrefixPair::default());
        let all = pairs.iter().copied().chain(rest);
        for (place, pair) in (0..MAX_PREFIX_PAIRS).zip(all) {
            self.pairs
                .set(place, pair, 0)
                .context("cannot write the pairs of prefixes")?;
        }
        Ok(())
    }

    /// Makes the networks of the inside devices among these the ones that are known.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_networks(&mut self, devices: &[(u32, Device<Be128>)]) -> Result<()> {
        let writing = "cannot write the table of inside networks";
        let mut wanted = Vec::new();
        for (index, device) in devices {
            if device.role != role::INSIDE {
                continue;
            }
            let length = u32::from(IpFamily::length(device.mask));
            let address = Be128::new(device.network.get() & device.mask.get());
            let key = Key::new(length, address);
            self.networks.insert(&key, index, 0).context(writing)?;
            wanted.push((length, address));
        }
        let known: Vec<_> = self
            .networks
            .keys()
            .collect::<Result<_, _>>()
            .context(writing)?;
        for key in known {
            if !wanted.contains(&(key.prefix_len(), key.data())) {
                self.networks.remove(&key).context(writing)?;
            }
        }
        Ok(())
    }
}

impl<A: IpFamily> PinnedTables<A> {
    /// Opens the tables pinned in `directory`, if they are of this version's layout and filled.
    ///
    /// # Errors
    ///
    /// With the reason why they cannot be used.
    pub fn open(directory: &Path) -> Result<Self, Unusable> {
        // Of every version, the settings begin with the version.
        let settings: Array<_, Settings<A>> = open(directory, A::MAPS.settings)?;
        match settings.get(&0, 0).map(|settings| settings.abi_version) {
            Ok(ABI_VERSION) => Self::open_unfilled(directory),
            Ok(0) => Err(Unusable::Unfinished),
            Ok(_) => Err(Unusable::OtherVersion),
            Err(error) => Err(Unusable::Refused(anyhow!(error))),
        }
    }

    /// As [`Self::open`], but of tables whose settings are not written yet.
    ///
    /// # Errors
    ///
    /// With the reason why they cannot be used.
    pub fn open_unfilled(directory: &Path) -> Result<Self, Unusable> {
        Ok(Self {
            settings: open(directory, A::MAPS.settings)?,
            sessions: open(directory, A::MAPS.sessions)?,
            mappings: open(directory, A::MAPS.mappings)?,
            inside: open(directory, A::MAPS.inside)?,
            permissions: open(directory, A::MAPS.permissions)?,
            unsolicited: open(directory, A::MAPS.unsolicited)?,
            guests: open(directory, A::MAPS.guests)?,
            guests_on: open(directory, A::MAPS.guests_on)?,
            upkeep: open(directory, A::MAPS.upkeep)?,
            denied: open(directory, A::MAPS.denied)?,
            untranslated: open(directory, A::MAPS.untranslated)?,
            devices: open(directory, A::MAPS.devices)?,
            ports: open(directory, A::MAPS.ports)?,
            reserved: open(directory, maps::RESERVED)?,
            nat64: open(directory, maps::NAT64)?,
            stand_ins: open(directory, maps::STAND_INS)?,
            counters: open(directory, maps::COUNTERS)?,
        })
    }

    /// Sets the prefix of NAT64, which no prefix turns off.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_nat64(&mut self, prefix: Option<Prefix>) -> Result<()> {
        let cannot = "cannot write the prefix of NAT64";
        let mut nat64 = self.nat64_settings()?;
        nat64.prefix = prefix.unwrap_or_default();
        if nat64.secret == 0 {
            nat64.secret = random()?;
        }
        self.nat64.set(0, nat64, 0).context(cannot)
    }

    /// The prefix of NAT64, if there is one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn nat64(&self) -> Result<Option<Prefix>> {
        let prefix = self.nat64_settings()?.prefix;
        Ok(Some(prefix).filter(|prefix| prefix.is_set()))
    }

    /// What stand-ins follow from.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn nat64_settings(&self) -> Result<Nat64> {
        let nat64 = self.nat64.get(&0, 0);
        nat64.context("cannot read the prefix of NAT64")
    }

    /// Who has which stand-in.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn stand_ins(&self) -> Result<Vec<(Be32, StandIn)>> {
        let mut stand_ins = Vec::new();
        for_each(self.stand_ins.map(), |address, guest| {
            stand_ins.push((*address, *guest));
            Ok(())
        })?;
        Ok(stand_ins)
    }

    /// Whose an address inside is: a guest that reaches IPv4 by NAT64 has a stand-in in the tables of
    /// IPv4. The address itself where nobody knows any more whom it stood in for.
    #[must_use]
    pub fn guest_of(&self, address: impl Into<IpAddr>) -> IpAddr {
        let address = address.into();
        self.behind_stand_in(address).unwrap_or(address)
    }

    /// Whom an address stands in for. `None` for any other, and when the kernel refuses.
    #[must_use]
    pub fn behind_stand_in(&self, address: IpAddr) -> Option<IpAddr> {
        let IpAddr::V4(address) = address else {
            return None;
        };
        let address = Be32::from(address);
        let guest = is_stand_in(address).then(|| self.stand_in(address).ok())??;
        Some(guest?.address.into())
    }

    /// The guest that an address stands in for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn stand_in(&self, address: Be32) -> Result<Option<StandIn>> {
        match self.stand_ins.get(&address, 0) {
            Ok(guest) => Ok(Some(guest)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("cannot read the table of stand-ins"),
        }
    }

    /// How full the table of stand-ins is.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn stand_in_usage(&self) -> Result<Usage> {
        usage(&self.stand_ins)
    }

    /// Gives a stand-in back.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn forget_stand_in(&mut self, address: Be32) -> Result<()> {
        gone_is_fine(self.stand_ins.remove(&address)).context("cannot write the table of stand-ins")
    }

    /// What the operator set.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn settings(&self) -> Result<Settings<A>> {
        self.settings.get(&0, 0).context("cannot read the settings")
    }

    /// Sets what the operator set. The datapath translates from then on.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_settings(&mut self, settings: &Settings<A>) -> Result<()> {
        self.settings
            .set(0, settings, 0)
            .context("cannot write the settings")
    }

    /// Tells the datapath that somebody sweeps.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn attend(&mut self, now: Instant) -> Result<()> {
        let upkeep = Upkeep {
            attended: now,
            place: 0,
        };
        self.upkeep
            .set(0, upkeep, 0)
            .context("cannot tell the datapath that somebody sweeps")
    }

    /// How the datapath looks after what is over.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn upkeep(&self) -> Result<Upkeep> {
        self.upkeep
            .get(&0, 0)
            .context("cannot read when somebody swept last")
    }

    /// The addresses that stand for the guests in the world.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn outside_addresses(&self) -> Result<Vec<IpAddr>> {
        let settings = self.settings()?;
        let addresses = settings.outside.into_iter().map(Into::into);
        Ok(addresses.take(settings.outside_count as usize).collect())
    }

    /// Every device that the datapath knows, with its interface index.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn devices(&self) -> Result<Vec<(u32, Device<A>)>> {
        let mut devices: Vec<_> = self
            .devices
            .iter()
            .collect::<Result<_, _>>()
            .context("cannot read the table of devices")?;
        devices.sort_by_key(|(index, _)| *index);
        Ok(devices)
    }

    /// Makes these the devices that the datapath knows.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_devices(&mut self, devices: &[(u32, Device<A>)]) -> Result<()> {
        let guests = self.guests()?;
        self.count_guests_on(EVERY_DEVICE, &guests)?;
        for (index, device) in devices {
            self.count_guests_on(*index, &guests)?;
            self.devices
                .insert(index, device, 0)
                .context("cannot write the table of devices")?;
        }
        for (index, _) in self.devices()? {
            if devices.iter().all(|(known, _)| *known != index) {
                self.devices
                    .remove(&index)
                    .context("cannot write the table of devices")?;
                gone_is_fine(self.guests_on.remove(&index)).context(CANNOT_COUNT)?;
            }
        }
        Ok(())
    }

    /// Has the datapath count guests on a device, from those of these on that are known there: its
    /// own count may have gone wrong, in a race or while the device was none.
    fn count_guests_on(&mut self, index: u32, guests: &[(A, Guest)]) -> Result<()> {
        let is_there = |guest: &Guest| index == EVERY_DEVICE || guest.device == index;
        let known = guests.iter().filter(|(_, guest)| is_there(guest)).count();
        let known = u32::try_from(known)?;
        if self.guests_on(index)? == Some(known) {
            return Ok(());
        }
        self.guests_on.insert(index, known, 0).context(CANNOT_COUNT)
    }

    /// How many guests are known on the device with this index, or on [`EVERY_DEVICE`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn guests_on(&self, index: u32) -> Result<Option<u32>> {
        match self.guests_on.get(&index, 0) {
            Ok(guests) => Ok(Some(guests)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("cannot read the table of guests' devices"),
        }
    }

    /// Where guests must not send to.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn denied(&self) -> Result<Vec<A::Net>> {
        prefixes(&self.denied).context("cannot read what is denied")
    }

    /// Makes this, as far as it is of this IP version, where guests must not send to.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_denied(&mut self, denied: &[IpNet]) -> Result<()> {
        set_prefixes(&mut self.denied, denied).context("cannot write what is denied")
    }

    /// What guests reach under their own addresses.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn untranslated(&self) -> Result<Vec<A::Net>> {
        prefixes(&self.untranslated).context("cannot read what is not translated")
    }

    /// Makes this, as far as it is of this IP version, what guests reach under their own addresses.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_untranslated(&mut self, untranslated: &[IpNet]) -> Result<()> {
        set_prefixes(&mut self.untranslated, untranslated)
            .context("cannot write what is not translated")
    }

    /// Keeps ports of TCP and UDP from being handed out, and marks as taken those that the mappings
    /// of the `outside` addresses have. Identifiers of ICMP queries are not withheld.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_reserved(&mut self, withheld: &Reserved, outside: &[A]) -> Result<()> {
        let mut sets = vec![PortSet::default(); SETS as usize];
        let nothing = Reserved::default();
        let classes = [
            (Class::Tcp, withheld),
            (Class::Udp, withheld),
            (Class::Icmp, &nothing),
        ];
        for (address, _) in (0u32..).zip(outside) {
            for (class, reserved) in classes {
                for (parity, set) in (0..).zip(reserved.sets()) {
                    if let Some(place) =
                        sets.get_mut(set_index(address, class as u32, parity) as usize)
                    {
                        *place = set;
                    }
                }
            }
        }
        self.for_each_mapping(|endpoint, _| {
            let port = endpoint.port.get();
            let address = (0..)
                .zip(outside)
                .find(|(_, address)| **address == endpoint.address);
            if let (Some((address, _)), Some(class)) = (address, Class::of(endpoint.protocol))
                && let Some(set) = sets.get_mut(set_index(address, class as u32, port) as usize)
            {
                set.take(port);
            }
            Ok(())
        })?;
        for (class, reserved) in classes {
            self.reserved
                .set(class as u32, reserved, 0)
                .context("cannot write the reserved ports")?;
        }
        for (index, set) in (0..).zip(&sets) {
            self.ports
                .set(index, set, 0)
                .context("cannot write the sets of ports")?;
        }
        Ok(())
    }

    /// Calls `visit` with every half of a session.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or when `visit` fails.
    pub fn for_each_half(
        &self,
        visit: impl FnMut(&FlowKey<A>, &Session<A>) -> Result<()>,
    ) -> Result<()> {
        for_each(self.sessions.map(), visit)
    }

    /// The half of a session that arrives with this key.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn half(&self, key: &FlowKey<A>) -> Result<Option<Session<A>>> {
        match self.sessions.get(key, 0) {
            Ok(session) => Ok(Some(session)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("cannot read the table of sessions"),
        }
    }

    /// Calls `visit` with every mapping, by its outside endpoint.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or when `visit` fails.
    pub fn for_each_mapping(
        &self,
        visit: impl FnMut(&EndpointKey<A>, &Mapping<A>) -> Result<()>,
    ) -> Result<()> {
        for_each(self.mappings.map(), visit)
    }

    /// Goes on with a walk through the halves of sessions.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn next_halves<'a>(
        &self,
        walk: &'a mut Walk<FlowKey<A>, Session<A>>,
    ) -> Result<impl Iterator<Item = (&'a FlowKey<A>, &'a Session<A>)>> {
        walk.next(self.sessions.map())
    }

    /// Goes on with a walk through the mappings, by their outside endpoints.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn next_mappings<'a>(
        &self,
        walk: &'a mut Walk<EndpointKey<A>, Mapping<A>>,
    ) -> Result<impl Iterator<Item = (&'a EndpointKey<A>, &'a Mapping<A>)>> {
        walk.next(self.mappings.map())
    }

    /// Goes on with a walk through the permissions.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn next_permissions<'a>(
        &self,
        walk: &'a mut Walk<PermissionKey<A>, Permission>,
    ) -> Result<impl Iterator<Item = (&'a PermissionKey<A>, &'a Permission)>> {
        walk.next(self.permissions.map())
    }

    /// Every guest that is known, by its inside address.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn guests(&self) -> Result<Vec<(A, Guest)>> {
        let mut guests = Vec::new();
        for_each(self.guests.map(), |address, guest| {
            guests.push((*address, *guest));
            Ok(())
        })?;
        Ok(guests)
    }

    /// The guest with this inside address, if it was seen.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn guest(&self, address: A) -> Result<Option<Guest>> {
        match self.guests.get(&address, 0) {
            Ok(guest) => Ok(Some(guest)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("cannot read the table of guests"),
        }
    }

    /// The SYNs from outside that nobody asked for and that wait for an answer, by the keys that
    /// their sessions would have.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn unsolicited(&self) -> Result<Vec<(FlowKey<A>, Unsolicited)>> {
        let mut waiting = Vec::new();
        for_each(self.unsolicited.map(), |key, syn| {
            waiting.push((*key, *syn));
            Ok(())
        })?;
        Ok(waiting)
    }

    /// Forgets a SYN from outside, which the table may have done already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn forget_unsolicited(&mut self, key: &FlowKey<A>) -> Result<()> {
        gone_is_fine(self.unsolicited.remove(key))
            .context("cannot write the table of unsolicited SYNs")
    }

    /// Which ports of a set ([`set_index`]) are marked as taken.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn port_set(&self, index: u32) -> Result<PortSet> {
        self.ports
            .get(&index, 0)
            .context("cannot read the sets of ports")
    }

    /// Which ports must not be handed out.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn reserved(&self, class: Class) -> Result<Reserved> {
        self.reserved
            .get(&(class as u32), 0)
            .context("cannot read the reserved ports")
    }

    /// How many packets and bytes left the datapath for each reason, in the order of the reasons.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn counters(&self) -> Result<Vec<(Reason, Counter)>> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let values = self
                    .counters
                    .get(&(*reason as u32), 0)
                    .context("cannot read the counters")?;
                let sum = values
                    .iter()
                    .fold(Counter::default(), |sum, value| Counter {
                        packets: sum.packets + value.packets,
                        bytes: sum.bytes + value.bytes,
                    });
                Ok((*reason, sum))
            })
            .collect()
    }

    /// Sessions, each of which has two entries.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn session_usage(&self) -> Result<Usage> {
        let halves = usage(&self.sessions)?;
        Ok(Usage {
            used: halves.used.div_ceil(2),
            capacity: halves.capacity / 2,
        })
    }

    /// How many sessions there can be.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn session_capacity(&self) -> Result<u32> {
        Ok(capacity(self.sessions.map())? / 2)
    }

    /// Endpoint-independent mappings.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn mapping_usage(&self) -> Result<Usage> {
        usage(&self.mappings)
    }

    /// Guests that were seen.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn guest_usage(&self) -> Result<Usage> {
        usage(&self.guests)
    }
}

fn usage<K: Pod + Default, V: Pod + Default>(map: &HashMap<MapData, K, V>) -> Result<Usage> {
    let mut used = 0;
    for_each(map.map(), |_: &K, _: &V| {
        used += 1;
        Ok(())
    })?;
    Ok(Usage {
        used,
        capacity: capacity(map.map())?,
    })
}

fn capacity(map: &MapData) -> Result<u32> {
    Ok(map
        .info()
        .context("the kernel does not describe a table")?
        .max_entries())
}

/// The prefixes in a trie, in order.
fn prefixes<A: IpFamily>(trie: &LpmTrie<MapData, A, u8>) -> Result<Vec<A::Net>> {
    let mut prefixes = trie
        .keys()
        .map(|key| {
            let key = key?;
            let length = u8::try_from(key.prefix_len())?;
            A::net(key.data(), length).context("a prefix is longer than an address")
        })
        .collect::<Result<Vec<_>>>()?;
    prefixes.sort_unstable();
    Ok(prefixes)
}

/// Makes those of these that are of its IP version the prefixes in a trie. What stays is there all
/// the time.
fn set_prefixes<A: IpFamily>(trie: &mut LpmTrie<MapData, A, u8>, wanted: &[IpNet]) -> Result<()> {
    let wanted: Vec<_> = wanted.iter().filter_map(|net| A::from_net(*net)).collect();
    let key = |net: &A::Net| {
        let (address, length) = A::parts(*net);
        Key::new(length.into(), address)
    };
    for net in &wanted {
        trie.insert(&key(net), 1, 0)?;
    }
    for net in prefixes(trie)? {
        if !wanted.contains(&net) {
            trie.remove(&key(&net))?;
        }
    }
    Ok(())
}

/// Opens one table, whatever its type: [`Map`]'s conversions check the sizes.
fn open<T: TryFrom<Map, Error = MapError>>(directory: &Path, name: &str) -> Result<T, Unusable> {
    let data = match MapData::from_pin(directory.join(name)) {
        Ok(data) => data,
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            return Err(Unusable::Missing);
        }
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == io::ErrorKind::PermissionDenied =>
        {
            let directory = directory.display();
            return Err(Unusable::Refused(anyhow!(
                "permission denied to open the tables in {directory}: run as root"
            )));
        }
        Err(error) => {
            return Err(Unusable::Refused(
                anyhow!(error).context(format!("cannot open the pinned table {name}")),
            ));
        }
    };
    Map::from_map_data(data)
        .and_then(T::try_from)
        .map_err(|_| Unusable::OtherVersion)
}

/// What nobody can guess.
fn random() -> Result<u32> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes, GetRandomFlags::empty()).context("the kernel gives no random number")?;
    Ok(u32::from_ne_bytes(bytes))
}
