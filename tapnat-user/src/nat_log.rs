//! The NAT log (RFC 6888 section 4): writes down which outside endpoint was whose, and when, as lines of
//! JSON. What happened is told by the datapath through a ring that is read here; what was there
//! before, and what was lost, is taken from the tables. Owns the ring and where the lines go; what
//! lines say of a time is [`history`]'s.

pub mod history;
mod sink;

use std::{collections::HashMap, net::IpAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use aya::maps::{Map, MapData, PerCpuArray, RingBuf};
use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tapnat_common::{
    abi::{EndpointKey, mapping_flags, maps},
    nat_log::{Record, events, mapped},
    net::Be128,
};
use tokio::time::{Instant, sleep_until};

use self::sink::Sink;
pub use self::sink::Target;
use crate::{
    clock::now,
    family::IpFamily,
    instance::InstanceName,
    tables::PinnedTables,
    view::{Endpoint, Protocol, SCHEMA},
};

/// In systemd's journal, what `journalctl -t` asks for.
pub const IDENTIFIER: &str = "tapnat-nat";
/// Guests that are remembered by their stand-ins; with more it begins anew.
const REMEMBERED: usize = 4096;
/// How often the ring is read. It has room for what happens meanwhile.
const PERIOD: Duration = Duration::from_millis(200);

/// What a line tells.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// An inside endpoint got an outside one.
    MappingCreated,
    /// The outside endpoint was given back.
    MappingRemoved,
    /// A session began that has its outside endpoint for itself, or of which all are told.
    SessionCreated,
    SessionRemoved,
    /// Was there when the log began, or after records were lost.
    MappingPresent,
    /// A log began; what is there follows. What an earlier one told is over.
    LogStarted,
    /// A process took over from another one: what happened meanwhile stands before this line, and what
    /// is there follows.
    LogResumed,
    /// The instance ended, and all its mappings with it.
    LogEnded,
    /// So many records found no room; what is there follows.
    RecordsLost,
}

impl Event {
    /// `natEvent` of RFC 8158 section 5.1, where one fits.
    const fn number(self) -> Option<u8> {
        match self {
            Self::SessionCreated => Some(4),
            Self::SessionRemoved => Some(5),
            Self::MappingCreated => Some(8),
            Self::MappingRemoved => Some(9),
            Self::MappingPresent
            | Self::LogStarted
            | Self::LogResumed
            | Self::LogEnded
            | Self::RecordsLost => None,
        }
    }
}

/// A line of the log.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Line {
    pub schema: u32,
    pub time: Timestamp,
    pub instance: String,
    pub event: Event,
    /// `natEvent` of RFC 8158.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nat_event: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inside: Option<Endpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outside: Option<Endpoint>,
    /// Only where destinations are logged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote: Option<Endpoint>,
    /// Of records that were lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

/// The log of an instance.
pub struct NatLog {
    instance: InstanceName,
    ring: RingBuf<MapData>,
    /// Empty where IPv6 is not translated.
    ipv6: PinnedTables<Be128>,
    /// Whom addresses stand in for (NAT64): at a mapping's end the table may know it no more.
    stand_ins: HashMap<IpAddr, IpAddr>,
    lost: PerCpuArray<MapData, u64>,
    known_lost: u64,
    sink: Sink,
    next: Instant,
}

impl NatLog {
    /// Goes on with the ring that is pinned among these tables, and writes what happened while no
    /// process read it, and then what is there. `resumes`: whether that is earlier programs' ring.
    ///
    /// # Errors
    ///
    /// When there is no ring, or the log cannot be written to.
    pub fn begin(
        instance: &InstanceName,
        target: &Target,
        directory: &Path,
        tables: &PinnedTables,
        resumes: bool,
    ) -> Result<Self> {
        let open = |name: &str| -> Result<Map> {
            let data = MapData::from_pin(directory.join(name));
            let map = data.and_then(Map::from_map_data);
            map.with_context(|| format!("cannot open the pinned table {name}"))
        };
        let mut log = Self {
            instance: instance.clone(),
            ring: open(maps::NAT_LOG)?.try_into()?,
            ipv6: PinnedTables::open_unfilled(directory)
                .map_err(|reason| reason.explain(instance, directory))?,
            stand_ins: HashMap::new(),
            lost: open(maps::NAT_LOG_LOST)?.try_into()?,
            known_lost: 0,
            sink: Sink::open(target)?,
            next: Instant::now() + PERIOD,
        };
        let mut lines = log.read()?;
        log.known_lost = log.count_lost()?;
        let event = if resumes {
            Event::LogResumed
        } else {
            Event::LogStarted
        };
        let mut started = log.line(event, Timestamp::now());
        started.count = (log.known_lost != 0).then_some(log.known_lost);
        lines.push(started);
        log.add_present(tables, &mut lines)?;
        log.sink.write(&lines)?;
        Ok(log)
    }

    /// Waits until the ring is worth reading.
    pub async fn due(&self) {
        sleep_until(self.next).await;
    }

    /// Writes what happened since.
    ///
    /// # Errors
    ///
    /// When the log cannot be written to.
    pub fn step(&mut self, tables: &PinnedTables) -> Result<()> {
        self.next = Instant::now() + PERIOD;
        let mut lines = self.read()?;
        let lost = self.count_lost()?;
        if lost != self.known_lost {
            let mut line = self.line(Event::RecordsLost, Timestamp::now());
            line.count = Some(lost.wrapping_sub(self.known_lost));
            self.known_lost = lost;
            lines.push(line);
            self.add_present(tables, &mut lines)?;
        }
        self.sink.write(&lines)
    }

    /// Writes that all is over.
    ///
    /// # Errors
    ///
    /// When the log cannot be written to.
    pub fn end(mut self, tables: &PinnedTables) -> Result<()> {
        self.step(tables)?;
        let line = self.line(Event::LogEnded, Timestamp::now());
        self.sink.write(&[line])
    }

    /// What is in the ring.
    fn read(&mut self) -> Result<Vec<Line>> {
        let read = |clock| Duration::try_from(clock_gettime(clock)).context("there is no clock");
        let offset = read(ClockId::Realtime)?.saturating_sub(read(ClockId::Monotonic)?);
        let mut records = Vec::new();
        while let Some(bytes) = self.ring.next() {
            records.extend(Record::read(&bytes));
        }
        let mut lines = Vec::new();
        for record in &records {
            let event = match record.event {
                events::MAPPING_CREATED => Event::MappingCreated,
                events::MAPPING_REMOVED => Event::MappingRemoved,
                events::SESSION_CREATED => Event::SessionCreated,
                events::SESSION_REMOVED => Event::SessionRemoved,
                _ => continue,
            };
            let time = Timestamp::UNIX_EPOCH + (offset + Duration::from_nanos(record.time));
            let mut line = self.of_endpoints(event, time, record.inside, record.outside);
            line.remote = (record.remote_is_told != 0).then(|| endpoint(record.remote));
            lines.push(line);
        }
        Ok(lines)
    }

    fn count_lost(&self) -> Result<u64> {
        let lost = self.lost.get(&0, 0).context("cannot read what was lost")?;
        Ok(lost.iter().sum())
    }

    /// The mappings that there are.
    fn add_present(&mut self, tables: &PinnedTables, lines: &mut Vec<Line>) -> Result<()> {
        let time = Timestamp::now();
        let four = present(tables)?;
        let six = present(&self.ipv6)?;
        for (inside, outside) in four.into_iter().chain(six) {
            let line = self.of_endpoints(Event::MappingPresent, time, inside, outside);
            lines.push(line);
        }
        Ok(())
    }

    fn of_endpoints(
        &mut self,
        event: Event,
        time: Timestamp,
        inside: EndpointKey<Be128>,
        outside: EndpointKey<Be128>,
    ) -> Line {
        let mut guest = endpoint(inside);
        guest.address = self.guest_of(guest.address, event);
        Line {
            protocol: Some(Protocol(outside.protocol).to_string()),
            inside: Some(guest),
            outside: Some(endpoint(outside)),
            ..self.line(event, time)
        }
    }

    /// Whose an inside address is, or was.
    fn guest_of(&mut self, address: IpAddr, event: Event) -> IpAddr {
        let is_over = matches!(event, Event::MappingRemoved | Event::SessionRemoved);
        if is_over && let Some(guest) = self.stand_ins.get(&address) {
            return *guest;
        }
        let Some(guest) = self.ipv6.behind_stand_in(address) else {
            return address;
        };
        if self.stand_ins.len() >= REMEMBERED {
            self.stand_ins.clear();
        }
        self.stand_ins.insert(address, guest);
        guest
    }

    fn line(&self, event: Event, time: Timestamp) -> Line {
        Line {
            schema: SCHEMA,
            time,
            instance: self.instance.to_string(),
            event,
            nat_event: event.number(),
            protocol: None,
            inside: None,
            outside: None,
            remote: None,
            count: None,
        }
    }
}

/// The mappings of a family that there are: inside and outside.
fn present<A: IpFamily>(
    tables: &PinnedTables<A>,
) -> Result<Vec<(EndpointKey<Be128>, EndpointKey<Be128>)>> {
    let now = now();
    let mut present = Vec::new();
    tables.for_each_mapping(|outside, mapping| {
        let stays = mapping.flags & mapping_flags::STATIC != 0;
        if stays || now.is_before(mapping.expires_at) {
            present.push((mapped(&mapping.inside), mapped(outside)));
        }
        Ok(())
    })?;
    Ok(present)
}

fn endpoint(key: EndpointKey<Be128>) -> Endpoint {
    Endpoint::new(key.address, key.port)
}
