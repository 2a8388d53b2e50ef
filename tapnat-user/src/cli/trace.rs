//! `tapnat trace`: what becomes of packets, one by one, as they come.

use std::{
    io::{self, BufWriter, StdoutLock, Write as _},
    net::IpAddr,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use jiff::{Timestamp, tz::TimeZone};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use tapnat_common::{
    abi::setting_flags,
    net::{Address as _, Be16, Be32, Be128},
    trace::{MOST_BYTES, Reasons, Wanted},
    verdict::Reason,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{Format, Instance, print, read_protocol};
use crate::{
    activity,
    datapath::Hook,
    files::is_stdout,
    host::{namespace::NetworkNamespace, netlink},
    journal::{Direction, Journal},
    notice::{tell, warn},
    trace::{Seen, Trace, packet::TraceView, pcap::PcapFile},
    view::{DeviceView, Label as _, SCHEMA},
};

/// Headers, and what an ICMP error quotes.
const HEADER_BYTES: u32 = 192;
/// How often it is looked whether the datapath has new programs.
const RENEWAL: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct Arguments {
    /// Only of this guest
    #[arg(long, value_name = "ADDRESS")]
    guest: Option<IpAddr>,

    /// Only of this protocol: tcp, udp, icmp, icmpv6 or a number
    #[arg(long, visible_alias = "proto", value_name = "PROTOCOL", value_parser = read_protocol)]
    protocol: Option<u8>,

    /// Only with this port, or identifier of ICMP queries
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// Only from or to this address
    #[arg(long, value_name = "ADDRESS")]
    remote: Option<IpAddr>,

    /// Only what leaves for this reason, as `tapnat status` names it; can be repeated
    #[arg(long, value_name = "REASON", value_parser = parse_reason)]
    reason: Vec<Reason>,

    /// Only what arrives on this device
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,

    /// End after so many packets
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// End after so many seconds
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,

    /// Write packets to this file for Wireshark instead, as they came and as they left; to the
    /// standard output with -
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pcap: Option<PathBuf>,

    #[command(flatten)]
    instance: Instance,

    #[command(flatten)]
    format: Format,
}

/// From 0 (nothing in common) to 1.
const ALIKE: f64 = 0.7;

fn parse_reason(text: &str) -> Result<Reason> {
    let reasons = Reason::ALL.iter();
    if let Some(reason) = reasons.clone().find(|reason| reason.label() == text) {
        return Ok(*reason);
    }
    let similar = reasons
        .map(|reason| (strsim::jaro(reason.label(), text), reason.label()))
        .max_by(|(one, _), (other, _)| one.total_cmp(other));
    match similar.filter(|(likeness, _)| *likeness > ALIKE) {
        Some((_, label)) => bail!("there is no reason '{text}': did you mean {label}?"),
        None => bail!("there is no reason '{text}': `tapnat status --json` names all"),
    }
}

/// Where the datapath is on these devices.
fn hooks(devices: &[DeviceView]) -> Vec<Hook> {
    let hook = |device: &DeviceView| {
        Some(Hook {
            device: netlink::Device {
                name: device.name.clone()?,
                index: device.index,
            },
            role: device.role,
            direction: Direction::Arriving,
            ethernet: device.is_ethernet(),
            xdp: false,
        })
    };
    devices.iter().filter_map(hook).collect()
}

/// One line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    schema: u32,
    #[serde(flatten)]
    packet: &'a TraceView,
}

enum Output {
    Text(BufWriter<StdoutLock<'static>>),
    Json(BufWriter<StdoutLock<'static>>),
    Pcap(PcapFile),
}

/// What is needed to tell about packets.
struct Teller {
    output: Output,
    devices: Vec<DeviceView>,
    /// What `CLOCK_MONOTONIC` has to be added to for the time since 1970.
    epoch: Duration,
    zone: TimeZone,
    told: u64,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        let (tables, pins) = self.instance.tables_and_pins()?;
        self.check_namespace()?;
        let devices = activity::devices(&self.instance.name, &tables)?;
        let wanted = self.wanted(&devices)?;
        let stdout = || BufWriter::new(io::stdout().lock());
        let output = match &self.pcap {
            Some(path) => Output::Pcap(PcapFile::create(path)?),
            None if self.format.json => Output::Json(stdout()),
            None => Output::Text(stdout()),
        };
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
        let mut trace = Trace::begin(&pins, &hooks(&devices), wanted)?;
        let mut teller = Teller {
            output,
            devices,
            epoch: since_1970()?,
            zone: TimeZone::system(),
            told: 0,
        };
        if tables.ipv4.settings()?.flags & setting_flags::XDP != 0 {
            warn(
                "packets from the world that go by the uplink's driver are not seen; all go by tc with \
                 `tapnat run --uplink-hook tc`",
            );
        }
        tell("tracing; Ctrl-C ends it");
        let end = self
            .seconds
            .map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let mut renewal = interval(RENEWAL);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let until = async {
                match end {
                    Some(end) => sleep_until(end).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                () = until => break,
                _ = renewal.tick() => {
                    let devices = activity::devices(&self.instance.name, &tables)?;
                    trace.renew(&hooks(&devices))?;
                    teller.devices = devices;
                }
                goes_on = trace.next(|seen| {
                    teller.tell(seen)?;
                    Ok(self.count.is_none_or(|most| teller.told < most))
                }) => {
                    teller.flush()?;
                    if !goes_on? {
                        break;
                    }
                }
            }
        }
        let lost = trace.lost()?;
        drop(trace);
        let told = teller.told;
        teller.flush()?;
        if let Some(path) = self.pcap.as_ref().filter(|it| !is_stdout(it)) {
            tell(&format!(
                "{told} packet{} in {}",
                print::plural(told),
                path.display()
            ));
        }
        if lost != 0 {
            tell(&format!(
                "{lost} more packet{} came faster than could be shown: filter more, or write them to \
                 a file (--pcap)",
                print::plural(lost)
            ));
        }
        Ok(())
    }

    /// Devices have names in one network namespace only.
    fn check_namespace(&self) -> Result<()> {
        let name = &self.instance.name;
        let here = NetworkNamespace::current()?;
        if Journal::load(name)?.is_some_and(|journal| journal.network_namespace() != here) {
            bail!(
                "the tapnat instance '{name}' belongs to another network namespace: say this there \
                 (`nsenter --net=.. tapnat trace ..`)"
            );
        }
        Ok(())
    }

    fn wanted(&self, devices: &[DeviceView]) -> Result<Wanted> {
        let mut device = 0;
        if let Some(name) = &self.device {
            let known = devices.iter().find(|it| it.name.as_ref() == Some(name));
            let Some(known) = known else {
                let names: Vec<_> = devices.iter().filter_map(|it| it.name.clone()).collect();
                bail!(
                    "the instance does not translate on a device '{name}': it does on {}",
                    names.join(", ")
                )
            };
            device = known.index;
        }
        let address = |address: Option<IpAddr>| match address {
            Some(IpAddr::V4(address)) => Be32::from(address).mapped(),
            Some(IpAddr::V6(address)) => address.into(),
            None => Be128::ZERO,
        };
        Ok(Wanted {
            reasons: self
                .reason
                .iter()
                .fold(Reasons::default(), |reasons, reason| reasons.with(*reason)),
            guest: address(self.guest),
            remote: address(self.remote),
            device,
            port: Be16::new(self.port.unwrap_or(0)),
            protocol: self.protocol.unwrap_or(0),
            bytes: if self.pcap.is_some() {
                MOST_BYTES
            } else {
                HEADER_BYTES
            },
            ..Wanted::default()
        })
    }
}

/// What has to be added to `CLOCK_MONOTONIC`.
fn since_1970() -> Result<Duration> {
    let read = |clock| Duration::try_from(clock_gettime(clock)).context("there is no clock");
    Ok(read(ClockId::Realtime)?.saturating_sub(read(ClockId::Monotonic)?))
}

impl Teller {
    fn tell(&mut self, seen: &Seen) -> Result<()> {
        self.told += 1;
        let time = self.epoch + Duration::from_nanos(seen.record.time);
        let stamp = Timestamp::UNIX_EPOCH + time;
        let device = self
            .devices
            .iter()
            .find(|device| device.index == seen.record.device);
        let view = TraceView::new(
            seen,
            stamp.to_string(),
            device.and_then(|device| device.name.clone()),
            device.map(|device| device.role.label()),
        );
        let fallback = || format!("#{}", seen.record.device);
        let name = view.device.clone().unwrap_or_else(fallback);
        match &mut self.output {
            Output::Json(output) => {
                let line = Line {
                    schema: SCHEMA,
                    packet: &view,
                };
                serde_json::to_writer(&mut *output, &line).map_err(io::Error::from)?;
                writeln!(output)?;
            }
            Output::Text(output) => {
                let at = stamp.to_zoned(self.zone.clone());
                writeln!(
                    output,
                    "{} {name} {} {}",
                    at.strftime("%H:%M:%S%.6f"),
                    view.outcome,
                    view.reason
                )?;
                writeln!(output, "   {}", view.before.describe())?;
                if let Some(after) = &view.after {
                    writeln!(output, "-> {}", after.describe())?;
                }
            }
            Output::Pcap(file) => {
                let comment = format!("{} {}", view.outcome, view.reason);
                file.write(seen, time, &name, &comment)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        match &mut self.output {
            Output::Json(output) | Output::Text(output) => output
                .flush()
                .context("cannot write to the standard output"),
            // Whoever reads along sees packets as they come.
            Output::Pcap(file) => file.flush(),
        }
    }
}
