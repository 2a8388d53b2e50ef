//! Gives back memory and ports that nobody uses any more. Owns when tables are walked and what is
//! worth asking about; the datapath's sweep program decides and removes, as only it can count a
//! session out while packets come.
//!
//! The datapath treats what is over as absent, so nothing hangs on when the sweep comes ([`pace`]). It goes
//! through the tables in slices of a few milliseconds and rests between them, so that signals and
//! the network are answered at once and it never takes much of a processor.

mod pace;

use std::{
    collections::HashSet,
    marker::PhantomData,
    mem,
    time::{Duration, Instant as Clock},
};

use anyhow::Result;
use aya::Pod;
use rustix::time::{ClockId, clock_gettime};
use tapnat_common::{
    abi::{
        EndpointKey, FlowKey, Guest, Mapping, Permission, PermissionKey, Session, Settings,
        Sweep as Request, sweep_key_bytes, sweep_keys, sweep_tables,
    },
    nat::{guests, sweep},
    net::{Be16, Be32, protocol},
    ports::{Class, PortSet, SETS, set_index},
    time::Instant,
};
use tokio::time::{Instant as Timer, sleep_until};

use self::pace::{Pace, Signs, refuses, starts};
use crate::{
    config::DEFAULT_SWEEP_INTERVAL,
    family::IpFamily,
    tables::{PinnedTables, Walk},
};

/// How soon a walk in a hurry begins: a slice that has just been done may rest.
const SOON: Duration = Duration::from_millis(100);

/// After a slice, a rest of so many times its length.
const REST: u32 = 19;

/// Runs the datapath's sweep program.
pub trait Remover {
    /// Has the program deal with the keys in a packet, one after the other. Returns how many entries
    /// it removed.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    fn remove(&self, packet: &[u8], keys: u32) -> Result<u32>;
}

/// What the sweep of an instance is at.
#[derive(Debug)]
pub struct Sweep<A: IpFamily = Be32> {
    pace: Pace,
    next: Timer,
    /// A walk is under way, or is to begin whatever it takes.
    is_wanted: bool,
    /// There is little room for sessions.
    is_full: bool,
    /// When the last walk ended.
    ended: Timer,
    /// What this walk has taken of a processor, and removed.
    spent: Duration,
    removed: u64,
    stage: Stage<A>,
    /// Guests without sessions when they were last looked at.
    idle: HashSet<A>,
    /// Ports that mappings had in this walk.
    mapped: Ports,
    /// Ports that were marked as taken, by the last walk, and that no mapping had.
    unused: HashSet<EndpointKey<A>>,
}

/// Sessions come before the mappings that they stand on.
#[derive(Debug)]
enum Stage<A: IpFamily> {
    Sessions(Walk<FlowKey<A>, Session<A>>),
    Mappings(Walk<EndpointKey<A>, Mapping<A>>),
    Permissions(Walk<PermissionKey<A>, Permission>),
    Guests,
    Ports,
}

impl<A: IpFamily> Sweep<A> {
    /// Begins to walk after an `interval`, and again so long after the end of each walk; with none
    /// given, whenever it is of use.
    #[must_use]
    pub fn new(interval: Option<Duration>) -> Self {
        let pace = pace(interval);
        Self {
            pace,
            next: Timer::now() + pace.interval(),
            is_wanted: true,
            is_full: false,
            ended: Timer::now(),
            spent: Duration::ZERO,
            removed: 0,
            stage: Stage::Sessions(Walk::default()),
            idle: HashSet::new(),
            mapped: Ports::default(),
            unused: HashSet::new(),
        }
    }

    /// Changes the interval, from the next walk on.
    pub fn set_interval(&mut self, interval: Option<Duration>) {
        self.pace = pace(interval);
    }

    /// Begins a walk now, unless one is under way.
    pub fn hurry(&mut self) {
        self.next = self.next.min(Timer::now() + SOON);
        self.is_wanted = true;
    }

    /// Walks more often while there is little room for sessions, as long as that helps.
    pub fn press(&mut self, is_full: bool) {
        self.is_full = is_full;
        if is_full && self.pace.is_fixed() {
            self.hurry();
        } else if is_full {
            self.next = self.next.min(Timer::now() + SOON);
        }
    }

    /// Waits until there is something to do.
    pub async fn due(&self) {
        sleep_until(self.next).await;
    }

    /// Does the next slice.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. The walk then begins anew after an interval.
    pub fn step(
        &mut self,
        tables: &PinnedTables<A>,
        remover: &impl Remover,
        now: Instant,
    ) -> Result<()> {
        let (begin, used) = (Clock::now(), processor_time());
        // Until it is known that there is more to do at once.
        self.next = Timer::now() + self.pace.interval();
        if !self.is_wanted && !self.pace.is_due(self.ended.elapsed(), self.signs(tables)?) {
            return Ok(());
        }
        self.is_wanted = false;
        let stage = mem::replace(&mut self.stage, Stage::Sessions(Walk::default()));
        let next = self.slice(stage, tables, remover, now)?;
        self.spent += processor_time().saturating_sub(used);
        if let Some(stage) = next {
            self.stage = stage;
            self.is_wanted = true;
            self.next = Timer::now() + begin.elapsed() * REST;
        } else {
            let spent = mem::take(&mut self.spent);
            let count = mem::take(&mut self.removed);
            self.ended = Timer::now();
            let signs = self.signs(tables)?;
            self.pace.walked(spent, count, signs);
        }
        Ok(())
    }

    /// What the tables say of how much a walk is wanted.
    fn signs(&self, tables: &PinnedTables<A>) -> Result<Signs> {
        let mut signs = Signs {
            capacity: tables.session_capacity()?,
            is_full: self.is_full,
            ..Signs::default()
        };
        for (reason, counter) in tables.counters()? {
            if starts(reason) {
                signs.started += counter.packets;
            }
            if refuses(reason) {
                signs.refused += counter.packets;
            }
        }
        let settings = tables.settings()?;
        let is_near =
            |used: u32, most: u32| most != 0 && u64::from(used) * 4 >= u64::from(most) * 3;
        let guests = tables.guests()?;
        signs.is_tight = are_many(&guests)
            || guests.iter().any(|(_, guest)| {
                is_near(guest.sessions, settings.guest_max_sessions)
                    || is_near(guest.ports, settings.guest_max_ports)
            });
        Ok(signs)
    }

    /// Does a slice of a stage. Returns with which to go on, or `None` after the last.
    fn slice(
        &mut self,
        stage: Stage<A>,
        tables: &PinnedTables<A>,
        remover: &impl Remover,
        now: Instant,
    ) -> Result<Option<Stage<A>>> {
        let settings = tables.settings()?;
        let next = match stage {
            Stage::Sessions(mut walk) => {
                let devices = tables.devices()?;
                let is_there = |index| devices.iter().any(|(known, _)| *known == index);
                let mut keys = Keys::<A, _>::new(sweep_tables::SESSIONS, remover);
                for (key, half) in tables.next_halves(&mut walk)? {
                    if sweep::session_may_be_over(key, half, &settings, now)
                        || sweep::session_may_be_lost(key, half, &settings, is_there)
                    {
                        keys.add(key)?;
                    }
                }
                self.removed += keys.finish()?;
                if walk.is_over() {
                    self.mapped = Ports::none();
                    Stage::Mappings(Walk::default())
                } else {
                    Stage::Sessions(walk)
                }
            }
            Stage::Mappings(mut walk) => {
                let mut keys = Keys::<A, _>::new(sweep_tables::MAPPINGS, remover);
                for (outside, mapping) in tables.next_mappings(&mut walk)? {
                    self.mapped.add(*outside, &settings);
                    if sweep::mapping_is_over(mapping, &settings, now) {
                        keys.add(outside)?;
                    }
                }
                self.removed += keys.finish()?;
                if walk.is_over() {
                    Stage::Permissions(Walk::default())
                } else {
                    Stage::Mappings(walk)
                }
            }
            Stage::Permissions(mut walk) => {
                let mut keys = Keys::<A, _>::new(sweep_tables::PERMISSIONS, remover);
                for (key, permission) in tables.next_permissions(&mut walk)? {
                    if sweep::permission_is_over(permission, now)
                        || !self.mapped.has(key.outside, &settings)
                    {
                        keys.add(key)?;
                    }
                }
                self.removed += keys.finish()?;
                if walk.is_over() {
                    Stage::Guests
                } else {
                    Stage::Permissions(walk)
                }
            }
            Stage::Guests => {
                self.sweep_guests(tables, remover)?;
                Stage::Ports
            }
            Stage::Ports => {
                self.sweep_ports(tables, remover, &settings)?;
                return Ok(None);
            }
        };
        Ok(Some(next))
    }

    /// Forgets guests that had no sessions in two walks, if there are many: a guest that is known
    /// costs nothing else.
    fn sweep_guests(&mut self, tables: &PinnedTables<A>, remover: &impl Remover) -> Result<()> {
        let guests = tables.guests()?;
        let are_many = are_many(&guests);
        let idle: HashSet<_> = guests
            .into_iter()
            .filter(|(_, guest)| are_many && guest.sessions == 0 && guest.ports == 0)
            .map(|(address, _)| address)
            .collect();
        let mut keys = Keys::<A, _>::new(sweep_tables::GUESTS, remover);
        for address in idle.intersection(&self.idle) {
            keys.add(address)?;
        }
        self.removed += keys.finish()?;
        self.idle = idle;
        Ok(())
    }

    /// Marks ports as free that no mapping had in two walks. One walk does not tell: the port may
    /// have been taken behind its back.
    fn sweep_ports(
        &mut self,
        tables: &PinnedTables<A>,
        remover: &impl Remover,
        settings: &Settings<A>,
    ) -> Result<()> {
        let mut unused = HashSet::new();
        for (class, number) in [
            (Class::Tcp, protocol::TCP),
            (Class::Udp, protocol::UDP),
            (Class::Icmp, protocol::ICMP),
        ] {
            let reserved = tables.reserved(class)?;
            for (place, address) in (0..settings.outside_count).zip(settings.outside) {
                for parity in [0, 1] {
                    let index = set_index(place, class as u32, parity);
                    let Some(mapped) = self.mapped.0.get(index as usize) else {
                        continue;
                    };
                    let marked = tables.port_set(index)?;
                    unused.extend(
                        marked
                            .taken_beyond(mapped, parity)
                            .filter(|port| !reserved.contains(*port))
                            .map(|port| EndpointKey::new(address, Be16::new(port), number)),
                    );
                }
            }
        }
        let mut keys = Keys::<A, _>::new(sweep_tables::PORTS, remover);
        for port in unused.intersection(&self.unused) {
            keys.add(port)?;
        }
        self.removed += keys.finish()?;
        self.unused = unused;
        self.mapped = Ports::default();
        Ok(())
    }
}

/// Whether those who do nothing have to make room.
fn are_many<A>(guests: &[(A, Guest)]) -> bool {
    u32::try_from(guests.len()).is_ok_and(guests::are_many)
}

fn pace(interval: Option<Duration>) -> Pace {
    Pace::new(
        interval.unwrap_or(DEFAULT_SWEEP_INTERVAL),
        interval.is_some(),
    )
}

/// What this thread has used of processors.
fn processor_time() -> Duration {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        used.tv_sec.cast_unsigned(),
        u32::try_from(used.tv_nsec).unwrap_or(0),
    )
}

/// Ports of the outside addresses: a set for each address, class and parity.
#[derive(Debug, Default)]
struct Ports(Vec<PortSet>);

impl Ports {
    fn none() -> Self {
        Self(vec![PortSet::default(); SETS as usize])
    }

    fn index<A: IpFamily>(outside: EndpointKey<A>, settings: &Settings<A>) -> Option<usize> {
        let class = Class::of(outside.protocol)?;
        let place = settings.place_of_outside(outside.address)?;
        Some(set_index(place, class as u32, outside.port.get()) as usize)
    }

    /// Notes the port, if it is one of an outside address.
    fn add<A: IpFamily>(&mut self, outside: EndpointKey<A>, settings: &Settings<A>) {
        if let Some(index) = Self::index(outside, settings)
            && let Some(set) = self.0.get_mut(index)
        {
            set.take(outside.port.get());
        }
    }

    fn has<A: IpFamily>(&self, outside: EndpointKey<A>, settings: &Settings<A>) -> bool {
        Self::index(outside, settings)
            .and_then(|index| self.0.get(index))
            .is_some_and(|set| set.is_taken(outside.port.get()))
    }
}

/// Has the host's firewall asked again about every session that is there.
///
/// # Errors
///
/// When the kernel refuses.
pub fn ask_again<A: IpFamily>(tables: &PinnedTables<A>, remover: &impl Remover) -> Result<()> {
    // Twice: a signal may have cut the program short, or a packet written what it had just read.
    for _ in 0..2 {
        let mut walk = Walk::default();
        while !walk.is_over() {
            let mut keys = Keys::<A, _>::new(sweep_tables::SESSIONS_TO_ASK, remover);
            for (key, _) in tables.next_halves(&mut walk)? {
                keys.add(key)?;
            }
            keys.finish()?;
        }
    }
    Ok(())
}

/// Takes a port from those that each of these guests holds, as its mapping was replaced.
///
/// # Errors
///
/// When the kernel refuses.
pub fn take_ports_from_guests<A: IpFamily>(guests: &[A], remover: &impl Remover) -> Result<()> {
    let mut keys = Keys::<A, _>::new(sweep_tables::GUESTS_PORTS, remover);
    for guest in guests {
        keys.add(guest)?;
    }
    keys.finish().map(drop)
}

/// Forgets from which link addresses these guests sent, as nobody is behind their device any more.
///
/// # Errors
///
/// When the kernel refuses.
pub fn unplug_guests<A: IpFamily>(guests: &[A], remover: &impl Remover) -> Result<()> {
    let mut keys = Keys::<A, _>::new(sweep_tables::GUESTS_UNPLUGGED, remover);
    for guest in guests {
        keys.add(guest)?;
    }
    keys.finish().map(drop)
}

/// Keys of one table on their way to the sweep program.
struct Keys<'a, A, R> {
    request: Request,
    remover: &'a R,
    packet: Vec<u8>,
    count: u32,
    removed: u64,
    family: PhantomData<A>,
}

impl<'a, A: IpFamily, R: Remover> Keys<'a, A, R> {
    fn new(table: u32, remover: &'a R) -> Self {
        Self {
            request: Request::new(A::OFFSET + table),
            remover,
            packet: Vec::new(),
            count: 0,
            removed: 0,
            family: PhantomData,
        }
    }

    fn add<K: Pod>(&mut self, key: &K) -> Result<()> {
        const { assert!(size_of::<K>() <= sweep_key_bytes::<A>()) };
        if self.packet.is_empty() {
            self.packet.extend_from_slice(bytes(&self.request));
        }
        self.packet.extend_from_slice(bytes(key));
        self.packet.resize(
            self.packet.len() + sweep_key_bytes::<A>() - size_of::<K>(),
            0,
        );
        self.count += 1;
        if self.count as usize == sweep_keys::<A>() {
            self.finish()?;
        }
        Ok(())
    }

    /// Has the rest dealt with. Returns how many entries were removed in all.
    fn finish(&mut self) -> Result<u64> {
        if self.count != 0 {
            let removed = self.remover.remove(&self.packet, self.count)?;
            self.removed += u64::from(removed);
            self.packet.clear();
            self.count = 0;
        }
        Ok(self.removed)
    }
}

fn bytes<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: as many bytes as there are, and a `Pod` has no padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}
