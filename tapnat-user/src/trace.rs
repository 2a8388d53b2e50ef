//! Follows packets through a datapath that is already there: while it lasts, a program of its own
//! stands before each of the datapath's, calls it, and records what came and what became of it. Owns
//! what is attached, for as long as it lives; the datapath stays as it is, and what nobody traces
//! costs it nothing.
//!
//! What a record says to people is [`packet`]'s, what it says to other programs [`pcap`]'s.

pub mod packet;
pub mod pcap;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, MapInfo, PerCpuArray, ProgramArray, RingBuf},
    programs::{
        LinkOrder, ProgramId, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        loaded_programs,
        tc::{NlOptions, TcAttachOptions, TcHandle},
    },
};
use tapnat_common::{
    abi::maps,
    trace::{Record, Side, Wanted, names},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    changes::detach_filter,
    datapath::{FILTER_HANDLE, Hook, TRACE_PRIORITY, explain_refusal, link_pin},
};

/// The kernel keeps so many letters of a program's name.
const NAME_LETTERS: usize = 15;
/// How the names of traces' programs begin.
const TRACES: &[u8] = b"trace_";

/// A packet that came by.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    pub record: Record,
    pub before: Vec<u8>,
    pub after: Vec<u8>,
}

impl Seen {
    /// Reads a record as it lies in the ring.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_at_checked(size_of::<Record>())?;
        let word = |number: usize| {
            let bytes = head.get(number * 4..).and_then(<[u8]>::first_chunk)?;
            Some(u32::from_ne_bytes(*bytes))
        };
        let side = |first: usize| {
            Some(Side {
                length: word(first)?,
                captured: word(first + 1)?,
                link: word(first + 2)?,
            })
        };
        let record = Record {
            time: u64::from_ne_bytes(*head.first_chunk()?),
            reason: word(2)?,
            action: word(3)?,
            device: word(4)?,
            before: side(5)?,
            after: side(8)?,
            zero: 0,
        };
        let (before, rest) = rest.split_at_checked(record.before.captured as usize)?;
        let after = rest.get(..record.after.captured as usize)?;
        Some(Self {
            record,
            before: before.to_owned(),
            after: after.to_owned(),
        })
    }
}

/// A trace under way.
pub struct Trace {
    /// What is attached goes with it.
    ebpf: Ebpf,
    /// Where the instance's tables and links are pinned.
    pins: PathBuf,
    /// The number of a table that all programs of the datapath use.
    settings: u32,
    targets: ProgramArray<MapData>,
    /// The program that is called in each place of [`names::TARGETS`].
    called: [Option<Called>; 2 * names::PROGRAMS.len()],
    /// Indices of the devices that are traced.
    devices: Vec<u32>,
    records: AsyncFd<RingBuf<MapData>>,
    lost: PerCpuArray<MapData, u64>,
}

/// A program of the datapath that is called.
struct Called {
    program: u32,
    /// Its tables: the kernel empties those of programs that nobody holds any more.
    _tables: Vec<MapData>,
}

impl Trace {
    /// Begins to trace the datapath that has its pins in this directory, on these devices. Must be
    /// called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When no program of the datapath is there, or the kernel refuses.
    pub fn begin(pins: &Path, hooks: &[Hook], wanted: Wanted) -> Result<Self> {
        let settings = MapInfo::from_pin(pins.join("maps").join(maps::IPV4.settings))
            .context("cannot open the tables")?
            .id();
        let object = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tapnat-trace"));
        let mut ebpf = EbpfLoader::new()
            .load(object)
            .context("cannot load the trace")?;
        let mut take = |name: &str| -> Result<Map> {
            ebpf.take_map(name)
                .with_context(|| format!("the trace has no table {name}: rebuild tapnat"))
        };
        let mut table: Array<_, Wanted> = take(names::WANTED)?.try_into()?;
        table
            .set(0, wanted, 0)
            .context("cannot say what is traced")?;
        let records: RingBuf<_> = take(names::RECORDS)?.try_into()?;
        // SAFETY: the ring owns its descriptor and gives out the same one until it is dropped.
        let records = unsafe { AsyncFd::register_with_interest(records, Interest::READABLE) }
            .context("cannot wait for records")?;
        let lost = take(names::LOST)?.try_into()?;
        let targets = take(names::TARGETS)?.try_into()?;
        let mut trace = Self {
            ebpf,
            pins: pins.to_owned(),
            settings,
            targets,
            called: Default::default(),
            devices: Vec::new(),
            records,
            lost,
        };
        trace.renew(hooks)?;
        ensure!(
            !trace.devices.is_empty(),
            "no program of this instance is attached: start it (`tapnat run`)"
        );
        Ok(trace)
    }

    /// Calls programs that have come since, as after a new start of the instance, and stands before
    /// those on devices that have come.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn renew(&mut self, hooks: &[Hook]) -> Result<()> {
        self.devices
            .retain(|device| hooks.iter().any(|hook| hook.device.index == *device));
        for hook in hooks {
            // It may not be attached there yet, or not any more.
            let Some(program) = self.program_of(hook) else {
                continue;
            };
            let place = hook.place();
            self.call(place + names::PROGRAMS.len(), Some(program))?;
            let behind = self.behind(hook, program);
            self.call(place, behind)?;
            if !self.devices.contains(&hook.device.index) {
                self.attach(hook, behind.unwrap_or(program))
                    .with_context(|| format!("cannot trace on {}", hook.device))?;
                self.devices.push(hook.device.index);
            }
        }
        Ok(())
    }

    /// The number of the program that the datapath has attached there.
    fn program_of(&self, hook: &Hook) -> Option<u32> {
        if let Ok(link) = PinnedLink::from_pin(link_pin(&self.pins, hook)) {
            return FdLink::from(link).info().ok().map(|info| info.program_id());
        }
        // A filter in clsact: the newest one of the instance.
        let letters = hook.program().as_bytes();
        let letters = &letters[..letters.len().min(NAME_LETTERS)];
        loaded_programs()
            .filter_map(Result::ok)
            .filter(|program| program.name() == letters)
            .filter(|program| {
                let tables = program.map_ids().ok().flatten();
                tables.is_some_and(|tables| tables.contains(&self.settings))
            })
            .map(|program| program.id())
            .max()
    }

    /// The program of another trace that is, or is to be, between ours and the datapath's.
    fn behind(&self, hook: &Hook, program: u32) -> Option<u32> {
        let (_, chain) =
            SchedClassifier::query_tcx(&hook.device.name, TcAttachType::Ingress).ok()?;
        let ours = self.ebpf.program(names::PROGRAMS[hook.place()])?;
        let ours = ours.fd().ok().and_then(|_| Some(ours.info().ok()?.id()));
        let mut behind = None;
        let place = chain.iter().position(|it| it.id() == program)?;
        for other in chain[..place].iter().rev() {
            let is_trace = other.name().starts_with(TRACES) && Some(other.id()) != ours;
            if !is_trace {
                break;
            }
            behind = Some(other.id());
        }
        behind
    }

    /// Sees to it that this program is called in this place.
    fn call(&mut self, place: usize, program: Option<u32>) -> Result<()> {
        if self.called[place].as_ref().map(|it| it.program) == program {
            return Ok(());
        }
        let index = u32::try_from(place)?;
        let Some(number) = program else {
            // The kernel may have emptied it already.
            let _ = self.targets.clear_index(&index);
            self.called[place] = None;
            return Ok(());
        };
        let program = loaded_programs()
            .filter_map(Result::ok)
            .find(|program| program.id() == number);
        let Some(program) = program else {
            bail!("the datapath's program {number} is gone: try again");
        };
        let tables = program.map_ids()?.unwrap_or_default();
        // Those of another trace are to be emptied when it ends.
        let holds = place >= names::PROGRAMS.len();
        let tables = tables.into_iter().filter(|_| holds);
        let tables = tables.filter_map(|table| MapData::from_id(table).ok());
        let called = Called {
            program: number,
            _tables: tables.collect(),
        };
        self.targets
            .set(index, &program.fd()?, 0)
            .context("the kernel does not let programs of the datapath be called")?;
        self.called[place] = Some(called);
        Ok(())
    }

    fn attach(&mut self, hook: &Hook, before: u32) -> Result<()> {
        let name = names::PROGRAMS[hook.place()];
        let program: &mut SchedClassifier = self
            .ebpf
            .program_mut(name)
            .with_context(|| format!("the trace has no program {name}: rebuild tapnat"))?
            .try_into()?;
        if program.fd().is_err() {
            program
                .load()
                .map_err(|error| explain_refusal(name, error))?;
        }
        let (device, side) = (&hook.device.name, TcAttachType::Ingress);
        let options = if link_pin(&self.pins, hook).exists() {
            // SAFETY: no preconditions but that the program is there, which the kernel checks.
            let before = unsafe { ProgramId::new(before) };
            TcAttachOptions::TcxOrder(LinkOrder::before_program_id(before))
        } else {
            let handle = TcHandle::new(0, FILTER_HANDLE);
            // One that a killed trace left, which does nothing any more.
            let _ = detach_filter(device, hook.direction, TRACE_PRIORITY, FILTER_HANDLE);
            TcAttachOptions::Netlink(NlOptions {
                priority: TRACE_PRIORITY,
                handle,
                ..NlOptions::default()
            })
        };
        program.attach_with_options(device, side, options)?;
        Ok(())
    }

    /// Waits until packets came by, and gives them to `take`, for as long as that says so. Returns
    /// whether it did to the last.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or when `take` fails.
    pub async fn next(&mut self, mut take: impl FnMut(&Seen) -> Result<bool>) -> Result<bool> {
        let mut ready = self
            .records
            .readable_mut()
            .await
            .context("cannot wait for records")?;
        let records = ready.get_inner_mut();
        while let Some(bytes) = records.next() {
            let seen = Seen::read(&bytes).context("a record is cut short: rebuild tapnat")?;
            drop(bytes);
            if !take(&seen)? {
                return Ok(false);
            }
        }
        ready.clear_ready();
        Ok(true)
    }

    /// Packets that came faster than they were read.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn lost(&self) -> Result<u64> {
        let lost = self.lost.get(&0, 0).context("cannot read what was lost")?;
        Ok(lost.iter().sum())
    }
}
