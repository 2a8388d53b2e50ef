//! What an instance does now: looks at its tables and at its devices' counters, and the rates
//! between two looks. What `tapnat top`, `tapnat map`, `tapnat status` and `tapnat metrics` show is
//! made here; how it is drawn is theirs.

use std::{cmp::Reverse, collections::HashMap, net::IpAddr, ops::Add, time::Instant as Clock};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use procfs::net::dev_status;
use serde::Serialize;
use tapnat_common::{
    abi::{Counter, FlowKey, Session, session_flags, setting_flags},
    net::{Be32, Be128},
    ports::{Class, set_index},
};

use crate::{
    clock::now,
    family::IpFamily,
    host::namespace::NetworkNamespace,
    instance::{InstanceName, Lock},
    journal::Journal,
    tables::{BothTables, PinnedTables, Usage},
    view::{
        DeviceView, Directions, FamiliesView, Flow, GuestView, ReasonView, SCHEMA, Status,
        StatusSource, TablesView, UsageView,
    },
};

/// So many sessions are shown, those with the most traffic.
const BUSIEST: usize = 100;

/// Everything at one time.
#[derive(Debug)]
pub struct Look {
    at: Clock,
    pub status: Status,
    ports: Vec<PortsView>,
    /// By the index of the device. Absent where the instance is in another network namespace.
    devices: HashMap<u32, Passed>,
    traffic: Option<Traffic>,
}

/// Packets and bytes for each direction, seen from the guests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Passed {
    pub outbound: Counter,
    pub inbound: Counter,
}

/// What sessions have carried, where they are counted.
#[derive(Debug, Default)]
struct Traffic {
    ipv4: Halves<Be32>,
    ipv6: Halves<Be128>,
    /// Their sums, by what guests have in the tables.
    guests: HashMap<IpAddr, Passed>,
}

/// What each half of a session has carried.
type Halves<A> = HashMap<FlowKey<A>, Counter>;

/// A family whose halves are a part of the traffic.
trait Part: IpFamily {
    fn part(traffic: &Traffic) -> &Halves<Self>;
    fn part_mut(traffic: &mut Traffic) -> &mut Halves<Self>;
}

impl Part for Be32 {
    fn part(traffic: &Traffic) -> &Halves<Self> {
        &traffic.ipv4
    }

    fn part_mut(traffic: &mut Traffic) -> &mut Halves<Self> {
        &mut traffic.ipv4
    }
}

impl Part for Be128 {
    fn part(traffic: &Traffic) -> &Halves<Self> {
        &traffic.ipv6
    }

    fn part_mut(traffic: &mut Traffic) -> &mut Halves<Self> {
        &mut traffic.ipv6
    }
}

impl Traffic {
    fn add<A: Part>(&mut self, key: &FlowKey<A>, half: &Session<A>) {
        let counter = Counter {
            packets: half.packets,
            bytes: half.bytes,
        };
        A::part_mut(self).insert(*key, counter);
        if key.arrival.device().is_some() {
            let guest = self.guests.entry(key.source.into()).or_default();
            add(&mut guest.outbound, counter);
        }
        if half.flags & session_flags::TO_INSIDE != 0 {
            let guest = self.guests.entry(half.destination.into()).or_default();
            add(&mut guest.inbound, counter);
        }
    }
}

fn add(sum: &mut Counter, more: Counter) {
    sum.packets = sum.packets.saturating_add(more.packets);
    sum.bytes = sum.bytes.saturating_add(more.bytes);
}

/// What these tables of an instance say.
///
/// # Errors
///
/// When the kernel refuses.
pub fn status(name: &InstanceName, tables: &BothTables) -> Result<Status> {
    let families = FamiliesView {
        ipv4: usage(&tables.ipv4, tables.ipv4.session_usage()?)?,
        ipv6: match &tables.ipv6 {
            Some(tables) => Some(usage(tables, tables.session_usage()?)?),
            None => None,
        },
    };
    status_with(name, tables, families)
}

fn usage<A: IpFamily>(tables: &PinnedTables<A>, sessions: Usage) -> Result<TablesView> {
    Ok(TablesView {
        sessions: sessions.into(),
        mappings: tables.mapping_usage()?.into(),
        guests: tables.guest_usage()?.into(),
    })
}

/// The devices that an instance translates on, with their names as far as this host knows them.
///
/// # Errors
///
/// When the kernel refuses.
pub fn devices(name: &InstanceName, tables: &BothTables) -> Result<Vec<DeviceView>> {
    // Only for the names; what the datapath does is in the tables alone.
    let journal = Journal::load(name).unwrap_or(None);
    let name_of = |index| {
        let claims = journal.as_ref()?.claims();
        let claim = claims.iter().find(|claim| claim.device.index == index)?;
        Some(claim.device.name.clone())
    };
    let ipv6 = match &tables.ipv6 {
        Some(tables) => tables.devices()?,
        None => Vec::new(),
    };
    let devices = tables.ipv4.devices()?.into_iter();
    Ok(devices
        .map(|(index, device)| {
            let ipv6 = ipv6.iter().find(|(known, _)| *known == index);
            let ipv6 = ipv6.map(|(_, device)| device);
            DeviceView::new(name_of(index), index, &device, ipv6)
        })
        .collect())
}

/// What the tables of each family say.
struct Said {
    outside_addresses: Vec<IpAddr>,
    denied: Vec<IpNet>,
    untranslated: Vec<IpNet>,
    guests: Vec<GuestView>,
}

impl Said {
    fn add<A: IpFamily>(&mut self, tables: &PinnedTables<A>) -> Result<()> {
        self.outside_addresses.extend(tables.outside_addresses()?);
        self.denied
            .extend(tables.denied()?.into_iter().map(Into::into));
        self.untranslated
            .extend(tables.untranslated()?.into_iter().map(Into::into));
        self.guests.extend(guests(tables)?);
        Ok(())
    }
}

/// The guests of a family, each by its own address.
///
/// # Errors
///
/// When the kernel refuses.
pub fn guests<A: IpFamily>(tables: &PinnedTables<A>) -> Result<Vec<GuestView>> {
    let (guests, _) = tables.guests()?;
    let guests = guests.iter().map(|(address, guest)| {
        let behind = tables.behind_stand_in((*address).into());
        GuestView::new(*address, guest).behind(behind)
    });
    Ok(guests.collect())
}

fn status_with(name: &InstanceName, tables: &BothTables, families: FamiliesView) -> Result<Status> {
    let mut said = Said {
        outside_addresses: Vec::new(),
        denied: Vec::new(),
        untranslated: Vec::new(),
        guests: Vec::new(),
    };
    said.add(&tables.ipv4)?;
    if let Some(tables) = &tables.ipv6 {
        said.add(tables)?;
    }
    Ok(Status::from(StatusSource {
        instance: name.to_string(),
        process: Lock::holder(name).and_then(|holder| holder.0),
        settings: tables.ipv4.settings()?,
        outside_addresses: said.outside_addresses,
        devices: devices(name, tables)?,
        denied: said.denied,
        untranslated: said.untranslated,
        nat64: tables.nat64()?,
        prefixes: tables.prefix_pairs()?,
        families,
        guests: said.guests,
        counters: tables.ipv4.counters()?,
    }))
}

impl Look {
    /// Looks at an instance.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn take(name: &InstanceName, tables: &BothTables) -> Result<Self> {
        let at = Clock::now();
        let counted = tables.ipv4.settings()?.flags & setting_flags::COUNTED != 0;
        let mut traffic = counted.then(Traffic::default);
        let families = FamiliesView {
            ipv4: read_sessions(&tables.ipv4, traffic.as_mut())?,
            ipv6: match &tables.ipv6 {
                Some(tables) => Some(read_sessions(tables, traffic.as_mut())?),
                None => None,
            },
        };
        let status = status_with(name, tables, families)?;
        let is_here = Journal::load(name).unwrap_or(None).is_some_and(|journal| {
            NetworkNamespace::current().is_ok_and(|it| it == journal.network_namespace())
        });
        let devices = if is_here {
            device_counters(&status.devices)?
        } else {
            HashMap::new()
        };
        Ok(Self {
            at,
            ports: ports_in_use(tables)?,
            status,
            devices,
            traffic,
        })
    }

    /// What has happened since an earlier look at the same instance.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn since(&self, earlier: &Self, tables: &BothTables) -> Result<Activity> {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64();
        let span = Span { seconds };
        let status = &self.status;
        let devices = status.devices.iter().map(|device| {
            let passed = |look: &Self| look.devices.get(&device.index).copied();
            let rates = passed(earlier).zip(passed(self));
            DeviceActivity {
                device: device.clone(),
                rates: rates.map(|(before, after)| span.rates(before, after)),
            }
        });
        let guests = status.guests.iter().map(|guest| {
            let passed = |look: &Self| {
                let traffic = look.traffic.as_ref()?;
                let passed = traffic.guests.get(&guest.key());
                Some(passed.copied().unwrap_or_default())
            };
            let rates = passed(earlier).zip(passed(self));
            GuestActivity {
                guest: guest.clone(),
                rates: rates.map(|(before, after)| span.rates(before, after)),
            }
        });
        let reasons = status.reasons.iter().zip(&earlier.status.reasons);
        let reasons = reasons.map(|(after, before)| ReasonActivity {
            reason: *after,
            per_second: span.per_second(before.packets, after.packets),
        });
        Ok(Activity {
            schema: SCHEMA,
            instance: status.instance.clone(),
            process: status.process,
            seconds,
            counted: status.counted,
            outside_addresses: status.outside_addresses.clone(),
            tables: status.tables,
            families: status.families,
            ports: self.ports.clone(),
            devices: devices.collect(),
            guests: guests.collect(),
            reasons: reasons.collect(),
            busiest: match (&earlier.traffic, &self.traffic) {
                (Some(before), Some(after)) => busiest(before, after, span, tables)?,
                _ => Vec::new(),
            },
        })
    }
}

impl Look {
    /// Guests by address, with what each may have and what its sessions have carried.
    #[must_use]
    pub fn guests(&self) -> Vec<GuestDetail> {
        let status = &self.status;
        let devices = || status.devices.iter().filter(|it| it.is_inside());
        let guests = status.guests.iter().map(|guest| {
            let is_on = |it: &&DeviceView| it.has_in_network(guest.address);
            let traffic = self.traffic.as_ref();
            let passed = traffic.map(|it| it.guests.get(&guest.key()).copied().unwrap_or_default());
            let both = |part: fn(Counter) -> u64| {
                passed.map(|it| Directions {
                    outbound: part(it.outbound),
                    inbound: part(it.inbound),
                })
            };
            GuestDetail {
                guest: guest.clone(),
                device: devices().find(is_on).and_then(|it| it.name.clone()),
                max_sessions: status.guest_max_sessions,
                max_ports: status.guest_max_ports,
                max_new_sessions: status.guest_new_sessions,
                packets: both(|it| it.packets),
                bytes: both(|it| it.bytes),
            }
        });
        let mut guests: Vec<_> = guests.collect();
        guests.sort_unstable_by_key(|it| (it.guest.address, it.guest.stand_in));
        guests
    }
}

/// Looks at each session of a family, and how full its tables are.
fn read_sessions<A: Part>(
    tables: &PinnedTables<A>,
    mut traffic: Option<&mut Traffic>,
) -> Result<TablesView> {
    let mut halves = 0u64;
    tables.for_each_half(|key, half| {
        halves += 1;
        if let Some(traffic) = &mut traffic {
            traffic.add(key, half);
        }
        Ok(())
    })?;
    let sessions = Usage {
        used: halves.div_ceil(2),
        capacity: tables.session_capacity()?,
    };
    usage(tables, sessions)
}

/// The kernel's counters of these devices, as far as they are there.
fn device_counters(devices: &[DeviceView]) -> Result<HashMap<u32, Passed>> {
    let known = dev_status().context("cannot read the devices' counters (/proc/net/dev)")?;
    let counters = devices.iter().filter_map(|device| {
        let counters = known.get(device.name.as_ref()?)?;
        let received = Counter {
            packets: counters.recv_packets,
            bytes: counters.recv_bytes,
        };
        let sent = Counter {
            packets: counters.sent_packets,
            bytes: counters.sent_bytes,
        };
        let (outbound, inbound) = if device.is_inside() {
            (received, sent)
        } else {
            (sent, received)
        };
        Some((device.index, Passed { outbound, inbound }))
    });
    Ok(counters.collect())
}

/// Which share of each outside address's ports is taken.
///
/// # Errors
///
/// When the kernel refuses.
pub fn ports_in_use(tables: &BothTables) -> Result<Vec<PortsView>> {
    let mut ports = ports_in_use_of(&tables.ipv4)?;
    if let Some(tables) = &tables.ipv6 {
        ports.extend(ports_in_use_of(tables)?);
    }
    Ok(ports)
}

fn ports_in_use_of<A: IpFamily>(tables: &PinnedTables<A>) -> Result<Vec<PortsView>> {
    (0..)
        .zip(tables.outside_addresses()?)
        .map(|(place, address)| {
            let usage = |class: Class| -> Result<UsageView> {
                let reserved = tables.reserved(class)?;
                let mut used = 0;
                for (parity, set) in (0..).zip(reserved.sets()) {
                    let taken = tables.port_set(set_index(place, class as u32, parity))?;
                    used += taken.taken_beyond(&set, parity).count() as u64;
                }
                let free = (0..=u16::MAX).filter(|port| !reserved.contains(*port));
                Ok(UsageView {
                    used,
                    capacity: u32::try_from(free.count())?,
                })
            };
            Ok(PortsView {
                address,
                tcp: usage(Class::Tcp)?,
                udp: usage(Class::Udp)?,
                icmp: usage(Class::Icmp)?,
            })
        })
        .collect()
}

/// The sessions with the most traffic.
fn busiest(
    before: &Traffic,
    after: &Traffic,
    span: Span,
    tables: &BothTables,
) -> Result<Vec<FlowActivity>> {
    let mut flows = busiest_of(before, after, span, &tables.ipv4)?;
    if let Some(tables) = &tables.ipv6 {
        flows.extend(busiest_of(before, after, span, tables)?);
    }
    flows.sort_by(|one, other| other.rates.bits().total_cmp(&one.rates.bits()));
    flows.truncate(BUSIEST);
    Ok(flows)
}

/// The same of one family, in no order, and some more.
fn busiest_of<A: Part>(
    before: &Traffic,
    after: &Traffic,
    span: Span,
    tables: &PinnedTables<A>,
) -> Result<Vec<FlowActivity>> {
    let (before, after) = (A::part(before), A::part(after));
    let passed = |key: &FlowKey<A>| {
        // One that is new began with nothing.
        let was = before.get(key).copied().unwrap_or_default();
        let is = after.get(key).copied().unwrap_or_default();
        (was, is)
    };
    let mut halves: Vec<_> = after
        .iter()
        .filter_map(|(key, is)| {
            let was = before.get(key).copied().unwrap_or_default();
            let more = is.bytes.saturating_sub(was.bytes);
            (more > 0).then_some((Reverse(more), *key))
        })
        .collect();
    // Of a session that is among the first, one half is.
    let enough = 2 * BUSIEST;
    if halves.len() > enough {
        halves.select_nth_unstable_by_key(enough, |(more, _)| *more);
        halves.truncate(enough);
    }
    let settings = tables.settings()?;
    let now = now();
    let mut flows: HashMap<FlowKey<A>, FlowActivity> = HashMap::new();
    for (_, mut key) in halves {
        let Some(mut half) = tables.half(&key)? else {
            continue;
        };
        let mut other_key = half.twin_key(&key);
        let mut other = tables.half(&other_key)?;
        let is_shown = |key: &FlowKey<A>, half: &Session<A>, other: Option<&Session<A>>| {
            Flow::from_half(key, half, other, &settings, now)
        };
        let mut flow = is_shown(&key, &half, other.as_ref());
        if flow.is_none()
            && let Some(twin) = other
        {
            (key, other_key) = (other_key, key);
            (half, other) = (twin, Some(half));
            flow = is_shown(&key, &half, other.as_ref());
        }
        let Some(flow) = flow else { continue };
        let flow = flow.of_guest(tables.guest_of(key.source));
        let (outbound, inbound) = (passed(&key), passed(&other_key));
        let [before, after] = [(outbound.0, inbound.0), (outbound.1, inbound.1)]
            .map(|(outbound, inbound)| Passed { outbound, inbound });
        let rates = span.rates(before, after);
        flows.insert(key, FlowActivity { flow, rates });
    }
    Ok(flows.into_values().collect())
}

/// The time between two looks.
#[derive(Clone, Copy)]
struct Span {
    seconds: f64,
}

impl Span {
    /// What is taken away meanwhile counts as nothing.
    #[expect(clippy::cast_precision_loss, reason = "a rate is not exact")]
    fn per_second(self, before: u64, after: u64) -> f64 {
        if self.seconds > 0.0 {
            after.saturating_sub(before) as f64 / self.seconds
        } else {
            0.0
        }
    }

    fn rate(self, before: Counter, after: Counter) -> Rate {
        Rate {
            packets: self.per_second(before.packets, after.packets),
            bits: self.per_second(before.bytes, after.bytes) * 8.0,
        }
    }

    fn rates(self, before: Passed, after: Passed) -> Rates {
        Rates {
            outbound: self.rate(before.outbound, after.outbound),
            inbound: self.rate(before.inbound, after.inbound),
        }
    }
}

/// A rate in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rate {
    /// In a second.
    pub packets: f64,
    /// In a second.
    pub bits: f64,
}

/// A rate for each direction, seen from the guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    /// Towards the world.
    pub outbound: Rate,
    /// Towards the guests.
    pub inbound: Rate,
}

impl Add for Rate {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            bits: self.bits + other.bits,
        }
    }
}

impl Add for Rates {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            outbound: self.outbound + other.outbound,
            inbound: self.inbound + other.inbound,
        }
    }
}

/// A rate without its fraction.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are neither negative nor near the limit"
)]
pub fn rounded(rate: f64) -> u64 {
    rate.round() as u64
}

impl Rates {
    /// Both ways, in a second.
    #[must_use]
    pub fn bits(self) -> f64 {
        self.outbound.bits + self.inbound.bits
    }
}

/// What an instance does, as rates between two looks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Activity {
    pub schema: u32,
    pub instance: String,
    /// The process of `tapnat run`; null when none runs and the datapath works by itself.
    pub process: Option<i32>,
    /// Between the looks.
    pub seconds: f64,
    /// Whether there are rates of guests and sessions.
    pub counted: bool,
    /// As in a [`Status`].
    pub outside_addresses: Vec<IpAddr>,
    /// Of both families together.
    pub tables: TablesView,
    pub families: FamiliesView,
    /// Of each outside address.
    pub ports: Vec<PortsView>,
    pub devices: Vec<DeviceActivity>,
    /// As in a [`Status`].
    pub guests: Vec<GuestActivity>,
    pub reasons: Vec<ReasonActivity>,
    /// The sessions that carried the most, the busiest first; empty when sessions are not counted.
    pub busiest: Vec<FlowActivity>,
}

/// How many ports (or identifiers) of an outside address stand for guests, and how many can.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct PortsView {
    pub address: IpAddr,
    pub tcp: UsageView,
    pub udp: UsageView,
    pub icmp: UsageView,
}

/// A device, and what passes through it, the host's own traffic included.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceActivity {
    #[serde(flatten)]
    pub device: DeviceView,
    /// Null where the device is in another network namespace.
    pub rates: Option<Rates>,
}

/// A guest, and what its sessions carry.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GuestActivity {
    #[serde(flatten)]
    pub guest: GuestView,
    /// Null when sessions are not counted.
    pub rates: Option<Rates>,
}

/// A guest, and all that is kept about it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct GuestDetail {
    #[serde(flatten)]
    pub guest: GuestView,
    /// That it is behind; null when that is gone.
    pub device: Option<String>,
    /// Sessions that it may have.
    pub max_sessions: u32,
    /// Outside ports that it may hold.
    pub max_ports: u32,
    /// Sessions that it may begin in a second; null for no limit.
    pub max_new_sessions: Option<u32>,
    /// Of the sessions that there are. Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<Directions>,
    /// The same, of IP packets, headers included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Directions>,
}

/// Packets that left for a reason.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ReasonActivity {
    #[serde(flatten)]
    pub reason: ReasonView,
    pub per_second: f64,
}

/// A session, and what it carries.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlowActivity {
    #[serde(flatten)]
    pub flow: Flow,
    pub rates: Rates,
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        borrow::Cow,
        net::{Ipv4Addr, Ipv6Addr},
        num::NonZeroU32,
    };

    use serde_json::json;
    use tapnat_common::{
        abi::Arrival,
        net::{Be16, protocol},
    };

    use super::*;
    use crate::view::Endpoint;

    fn usage(used: u64, capacity: u32) -> UsageView {
        UsageView { used, capacity }
    }

    fn rates(bits: f64) -> Rates {
        let rate = |bits: f64| Rate {
            packets: (bits / 12_000.0).ceil(),
            bits,
        };
        Rates {
            outbound: rate(bits),
            inbound: rate(bits / 40.0),
        }
    }

    pub(crate) fn device(
        name: &str,
        index: u32,
        role: &'static str,
        address: [u8; 4],
    ) -> DeviceActivity {
        DeviceActivity {
            device: DeviceView {
                name: Some(name.to_owned()),
                index,
                role,
                address: Some(address.into()),
                prefix_length: Some(24),
                peer: None,
                ipv6_address: None,
                ipv6_prefix_length: None,
                mtu: 1500,
                link_layer: "ethernet",
            },
            rates: Some(rates(1.21e9)),
        }
    }

    pub(crate) fn guest(last: u8, sessions: u32, refused: u32, bits: f64) -> GuestActivity {
        GuestActivity {
            guest: GuestView {
                address: Ipv4Addr::new(10, 0, 0, last).into(),
                link_address: Some(format!("02:00:00:00:00:{last:02x}")),
                sessions,
                ports: sessions,
                refused,
                stand_in: None,
            },
            rates: Some(rates(bits)),
        }
    }

    fn reason(reason: &'static str, outcome: &'static str, packets: u64) -> ReasonActivity {
        ReasonActivity {
            reason: ReasonView {
                reason,
                outcome,
                packets,
                bytes: packets * 60,
            },
            per_second: 3.0,
        }
    }

    fn flow(guest: u8, bits: f64) -> FlowActivity {
        let endpoint = |address: [u8; 4], port| Endpoint {
            address: Ipv4Addr::from(address).into(),
            port,
        };
        let both = Some(Directions {
            outbound: 1000,
            inbound: 500,
        });
        FlowActivity {
            flow: Flow {
                protocol: Cow::Borrowed("tcp"),
                inside: endpoint([10, 0, 0, guest], 40000),
                outside: endpoint([198, 51, 100, 2], 40000),
                remote: endpoint([203, 0, 113, 1], 443),
                state: "established",
                idle_seconds: 0,
                expires_in_seconds: 7440,
                packets: both,
                bytes: both,
            },
            rates: rates(bits),
        }
    }

    /// The same in both families: the guest that has least to say has IPv6.
    pub(crate) fn activity_in_both() -> Activity {
        let mut activity = activity();
        let outside: Ipv6Addr = "2001:db8:1::2".parse().unwrap();
        activity.outside_addresses.push(outside.into());
        activity.families.ipv6 = Some(TablesView {
            sessions: usage(7, 131_072),
            mappings: usage(7, 65_536),
            guests: usage(1, 4096),
        });
        activity.ports.push(PortsView {
            address: outside.into(),
            tcp: usage(7, 27_231),
            udp: usage(0, 27_231),
            icmp: usage(0, 65_535),
        });
        for it in &mut activity.devices {
            let address = if it.device.is_inside() {
                "fd00:7a70::1"
            } else {
                "2001:db8:1::2"
            };
            it.device.ipv6_address = Some(address.parse().unwrap());
            it.device.ipv6_prefix_length = Some(64);
        }
        let quiet = activity.guests.iter_mut().find(|it| it.guest.sessions == 7);
        if let Some(it) = quiet {
            let address: Ipv6Addr = "fd00:7a70::12".parse().unwrap();
            it.guest.address = address.into();
            it.rates = Some(rates(2.4e6));
            let mut talk = flow(12, 2.4e6);
            talk.flow.inside.address = address.into();
            talk.flow.outside.address = outside.into();
            let remote: Ipv6Addr = "2001:db8:2::1".parse().unwrap();
            talk.flow.remote.address = remote.into();
            activity.busiest.push(talk);
        }
        activity
    }

    /// Something of everything.
    pub(crate) fn activity() -> Activity {
        let tables = TablesView {
            sessions: usage(12_345, 131_072),
            mappings: usage(12_000, 131_072),
            guests: usage(3, 4096),
        };
        Activity {
            schema: SCHEMA,
            instance: "default".to_owned(),
            process: Some(1234),
            seconds: 2.0,
            counted: true,
            outside_addresses: vec![Ipv4Addr::new(198, 51, 100, 2).into()],
            tables,
            families: FamiliesView {
                ipv4: tables,
                ipv6: None,
            },
            ports: vec![PortsView {
                address: Ipv4Addr::new(198, 51, 100, 2).into(),
                tcp: usage(11_000, 27_231),
                udp: usage(990, 27_231),
                icmp: usage(10, 65_535),
            }],
            devices: vec![
                device("uplink0", 2, "uplink", [198, 51, 100, 2]),
                device("tap0", 3, "inside", [10, 0, 0, 1]),
            ],
            guests: vec![
                guest(12, 7, 12, 0.0),
                guest(10, 12_000, 0, 1.2e9),
                guest(11, 338, 0, 9.5e6),
            ],
            reasons: vec![
                reason("session-started", "forward", 13_000),
                reason("no-session", "drop", 17),
                reason("truncated", "drop", 0),
                reason("guest-session-limit", "refuse", 12),
            ],
            busiest: vec![flow(10, 1.2e9), flow(11, 9.5e6)],
        }
    }

    /// The same of an instance that does not count.
    pub(crate) fn uncounted() -> Activity {
        let mut activity = activity();
        activity.counted = false;
        activity.busiest.clear();
        for guest in &mut activity.guests {
            guest.rates = None;
        }
        activity
    }

    #[test]
    fn rates_are_what_came_in_the_time_between() {
        let span = Span { seconds: 2.0 };
        let passed = |packets, bytes| Passed {
            outbound: Counter { packets, bytes },
            inbound: Counter::default(),
        };
        let rates = span.rates(passed(10, 1000), passed(30, 5000));
        assert_eq!(
            rates.outbound,
            Rate {
                packets: 10.0,
                bits: 16_000.0
            }
        );
        assert_eq!(rates.inbound, Rate::default());
        // A device that was made anew, a guest whose sessions went.
        assert_eq!(
            span.rates(passed(30, 5000), passed(10, 1000)),
            Rates::default()
        );
        let none = Span { seconds: 0.0 };
        assert_eq!(none.rates(passed(0, 0), passed(1, 1)), Rates::default());
    }

    #[test]
    fn what_a_half_carries_is_its_guests() {
        let address = |text: &str| Be32::from(text.parse::<Ipv4Addr>().unwrap());
        let mut key = FlowKey {
            source: address("10.0.0.2"),
            destination: address("198.51.100.7"),
            arrival: Arrival::inside(NonZeroU32::MIN, protocol::UDP),
            ..FlowKey::default()
        };
        let mut half = Session {
            destination: key.destination,
            packets: 2,
            bytes: 100,
            ..Session::default()
        };
        let mut traffic = Traffic::default();
        traffic.add(&key, &half);
        // Between guests both get their share.
        key.source_port = Be16::new(7);
        half.destination = address("10.0.0.3");
        half.flags = session_flags::TO_INSIDE;
        traffic.add(&key, &half);
        key.arrival = Arrival::outside(protocol::UDP);
        traffic.add(&key, &half);
        let guest = |last| traffic.guests[&Ipv4Addr::new(10, 0, 0, last).into()];
        let (two, three) = (guest(2), guest(3));
        assert_eq!((two.outbound.bytes, two.inbound.bytes), (200, 0));
        assert_eq!((three.outbound.bytes, three.inbound.packets), (0, 4));
        assert_eq!((traffic.guests.len(), traffic.ipv4.len()), (2, 3));
        let other = "fd00:7a70::10".parse::<Ipv6Addr>().unwrap();
        let key = FlowKey {
            source: Be128::from(other),
            arrival: Arrival::inside(NonZeroU32::MIN, protocol::UDP),
            ..FlowKey::default()
        };
        let half = Session {
            bytes: 60,
            ..Session::default()
        };
        traffic.add(&key, &half);
        assert_eq!(traffic.guests[&other.into()].outbound.bytes, 60);
        assert_eq!((traffic.ipv4.len(), traffic.ipv6.len()), (3, 1));
    }

    #[test]
    fn a_guest_as_json() {
        let detail = GuestDetail {
            guest: guest(10, 7, 2, 0.0).guest,
            device: Some("tap0".to_owned()),
            max_sessions: 100,
            max_ports: 50,
            max_new_sessions: None,
            packets: None,
            bytes: None,
        };
        assert_eq!(
            serde_json::to_value(detail).unwrap(),
            json!({
                "address": "10.0.0.10",
                "link_address": "02:00:00:00:00:0a",
                "sessions": 7,
                "ports": 7,
                "refused": 2,
                "stand_in": null,
                "device": "tap0",
                "max_sessions": 100,
                "max_ports": 50,
                "max_new_sessions": null,
            })
        );
    }

    #[test]
    fn an_activity_as_json() {
        let json = serde_json::to_value(activity()).unwrap();
        assert_eq!(json["schema"], SCHEMA);
        assert_eq!(json["devices"][1]["name"], "tap0");
        assert_eq!(
            json["guests"][0]["rates"]["outbound"],
            json!({"packets": 0.0, "bits": 0.0})
        );
        assert_eq!(json["reasons"][1]["reason"], "no-session");
        assert_eq!(json["reasons"][1]["per_second"], 3.0);
        assert_eq!(json["busiest"][0]["remote"]["port"], 443);
        assert_eq!(
            json["ports"][0]["tcp"],
            json!({"used": 11_000, "capacity": 27_231})
        );
        let json = serde_json::to_value(uncounted()).unwrap();
        assert_eq!(json["guests"][0]["rates"], json!(null));
    }
}
