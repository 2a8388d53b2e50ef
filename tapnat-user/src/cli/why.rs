//! `tapnat why`: what would become of a packet, and what became of those of a guest.

use std::{fmt::Write as _, net::Ipv4Addr, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use tapnat_common::{
    abi::{Device, Guest, role},
    nat::{Fate, Route},
    net::{Be32, protocol},
    verdict::{Outcome, Reason},
};

use super::{Format, Instance, print};
use crate::{
    activity,
    explain::explain,
    host::{netlink::Netlink, sysctl::Sysctl},
    tables::PinnedTables,
    view::{GuestView, ReasonView, SCHEMA, protocol_number},
    why::{ANY_PORT, Answer, Question, device_of, rehearse},
};

/// Ends with this when the packet does not get through.
const REFUSED: u8 = 3;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Whose packets [default: the only guest there is]
    #[arg(long, value_name = "ADDRESS")]
    guest: Option<Ipv4Addr>,

    /// tcp, udp or icmp [default: tcp with a port, else icmp]
    #[arg(long, value_name = "PROTOCOL", value_parser = parse_protocol)]
    proto: Option<u8>,

    /// Where the packet goes
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = parse_end)]
    to: Option<End>,

    /// The packet comes from here in the world, to an outside address
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = parse_end, requires = "to",
          conflicts_with = "guest")]
    from: Option<End>,

    #[command(flatten)]
    instance: Instance,

    #[command(flatten)]
    format: Format,
}

/// An address, and a port if one was given.
type End = (Ipv4Addr, Option<u16>);

fn parse_end(text: &str) -> Result<End> {
    let (address, port) = match text.split_once(':') {
        Some((address, port)) => (address, Some(port)),
        None => (text, None),
    };
    let address = address.parse().with_context(|| {
        format!("'{text}' does not begin with an IPv4 address: write 1.1.1.1:443")
    })?;
    let port: Option<u16> = port
        .map(str::parse)
        .transpose()
        .with_context(|| format!("'{text}' does not end in a port: write {address}:443"))?;
    Ok((address, port))
}

fn parse_protocol(text: &str) -> Result<u8> {
    protocol_number(text)
        .filter(|number| [protocol::TCP, protocol::UDP, protocol::ICMP].contains(number))
        .with_context(|| format!("'{text}' is not tcp, udp or icmp"))
}

/// All that is printed.
#[derive(Serialize)]
struct Report {
    schema: u32,
    /// What would become of the packet; null when none was asked about.
    packet: Option<Answer>,
    /// Null when it is not known.
    guest: Option<GuestView>,
    /// What packets were dropped for, of all guests and of the world, most first.
    drops: Vec<Drops>,
}

#[derive(Serialize)]
struct Drops {
    #[serde(flatten)]
    count: ReasonView,
    meaning: &'static str,
    advice: Option<&'static str>,
}

impl Arguments {
    pub async fn execute(self) -> Result<ExitCode> {
        let tables = self.instance.tables()?;
        let devices = tables.devices()?;
        let (guests, _) = tables.guests()?;
        let guest = match (self.guest, self.from) {
            (Some(guest), _) => Some(guest),
            (None, Some(_)) => None,
            (None, None) => Some(only_guest(&guests, &devices)?),
        };
        let packet = match self.to {
            None => None,
            Some(to) => {
                let question = self.question(guest, to, &tables, &devices).await?;
                Some(rehearse(&question, &tables, &devices)?)
            }
        };
        let known = guests
            .iter()
            .find(|(address, _)| Some(Ipv4Addr::from(*address)) == guest);
        let report = Report {
            schema: SCHEMA,
            guest: known.map(|(address, guest)| GuestView::new(*address, guest)),
            drops: drops(&tables)?,
            packet,
        };
        if self.format.json {
            print::json(&report)?;
        } else {
            print::text(&describe(guest, &report)?)?;
        }
        let is_refused = report.packet.as_ref().is_some_and(Answer::is_refusal);
        Ok(if is_refused {
            ExitCode::from(REFUSED)
        } else {
            ExitCode::SUCCESS
        })
    }

    async fn question(
        &self,
        guest: Option<Ipv4Addr>,
        (to, port): End,
        tables: &PinnedTables,
        devices: &[(u32, Device)],
    ) -> Result<Question> {
        let default = if port.is_some() {
            protocol::TCP
        } else {
            protocol::ICMP
        };
        let number = self.proto.unwrap_or(default);
        ensure!(
            number == protocol::ICMP || port.is_some(),
            "which port? write --to {to}:443"
        );
        let first = |wanted| {
            let mut devices = devices.iter();
            let first = devices.find(|(_, device)| device.role == wanted);
            first.map(|(index, _)| *index)
        };
        let (source, device, route) = if let Some((address, port)) = self.from {
            let uplink = first(role::UPLINK).context("the instance has no uplink now")?;
            (
                (address, port.unwrap_or(ANY_PORT)),
                uplink,
                Route::default(),
            )
        } else {
            let guest = guest.context("whose packet? pass --guest ADDRESS")?;
            let device = device_of(guest, devices).or_else(|| first(role::INSIDE));
            let device = device.context("the instance has no inside device now")?;
            let names = activity::devices(&self.instance.name, tables)?;
            let name = names.into_iter().find(|(_, index, _)| *index == device);
            let route = match name.and_then(|(name, ..)| name) {
                Some(name) => route(&name, to, devices).await?,
                None => bail!("the guest's device is not of this host: run tapnat where it is"),
            };
            ((guest, ANY_PORT), device, route)
        };
        Ok(Question {
            protocol: number,
            source,
            destination: (to, port.unwrap_or(0)),
            device,
            route,
        })
    }
}

/// Where the kernel sends packets from this inside device.
async fn route(device: &str, to: Ipv4Addr, devices: &[(u32, Device)]) -> Result<Route> {
    let forwarding = Sysctl::forwarding(device).read();
    if forwarding.is_ok_and(|value| value.trim() == "0") {
        return Ok(Route {
            fate: Fate::Disabled,
            ..Route::default()
        });
    }
    let Some(index) = Netlink::open()?.route_to(to).await? else {
        return Ok(Route::default());
    };
    let mut route = Route {
        fate: Fate::Onward,
        ..Route::default()
    };
    route.next_hop.device = index;
    let known = devices.iter().find(|(known, _)| *known == index);
    route.mtu = known.map_or(u16::MAX, |(_, device)| device.mtu);
    Ok(route)
}

/// The guest that is meant when none is named.
fn only_guest(guests: &[(Be32, Guest)], devices: &[(u32, Device)]) -> Result<Ipv4Addr> {
    match guests {
        [(address, _)] => Ok((*address).into()),
        [] => {
            let inside = devices
                .iter()
                .find(|(_, device)| device.role == role::INSIDE);
            let network = inside.map_or("the inside network".to_owned(), |(_, device)| {
                format!("the network of {}", Ipv4Addr::from(device.address))
            });
            bail!(
                "no guest has sent anything to the world yet: look whether its packets arrive \
                 (`tapnat trace`), or name an address of {network} (--guest)"
            )
        }
        _ => {
            let names: Vec<_> = guests
                .iter()
                .take(5)
                .map(|(address, _)| Ipv4Addr::from(*address).to_string())
                .collect();
            bail!(
                "there are several guests: pass --guest with one, such as {}",
                names.join(", ")
            )
        }
    }
}

fn drops(tables: &PinnedTables) -> Result<Vec<Drops>> {
    let is_loss = |reason: Reason| matches!(reason.outcome(), Outcome::Drop | Outcome::Refuse);
    let mut drops: Vec<_> = tables
        .counters()?
        .into_iter()
        .filter(|(reason, counter)| counter.packets != 0 && is_loss(*reason))
        .filter_map(|(reason, counter)| {
            let explanation = explain(reason)?;
            Some(Drops {
                count: ReasonView::new(reason, counter),
                meaning: explanation.meaning,
                advice: explanation.advice,
            })
        })
        .collect();
    drops.sort_by_key(|drops| std::cmp::Reverse(drops.count.packets));
    Ok(drops)
}

fn describe(guest: Option<Ipv4Addr>, report: &Report) -> Result<String> {
    let mut text = String::new();
    if let Some(answer) = &report.packet {
        writeln!(text, "{}", answer.before.describe())?;
        let verdict = match answer.outcome {
            "forward" => "is translated and sent on",
            "pass" => "goes to the host as it is",
            "refuse" => "is dropped, and its sender is told",
            "drop" => "is dropped",
            "fragment" => "is cut into fragments, which are sent on",
            _ => "waits",
        };
        writeln!(text, "  {verdict}: {} ({})", answer.meaning, answer.reason)?;
        if let Some(after) = &answer.after {
            writeln!(text, "  it leaves as {}", after.describe())?;
        }
        if let Some(advice) = answer.advice {
            writeln!(text, "  what to do: {advice}")?;
        }
    }
    if let Some(guest) = guest {
        match &report.guest {
            Some(known) => writeln!(
                text,
                "guest {guest} has {} session{} now; a limit refused it {}",
                known.sessions,
                print::plural(known.sessions.into()),
                known.refused
            )?,
            None => writeln!(
                text,
                "guest {guest} has sent nothing to the world yet, or was forgotten since"
            )?,
        }
    }
    if report.drops.is_empty() {
        writeln!(text, "nothing was dropped since the instance began")?;
    } else {
        writeln!(
            text,
            "dropped since the instance began, of all guests and the world:"
        )?;
    }
    for drops in &report.drops {
        let count = &drops.count;
        writeln!(
            text,
            "  {} {}: {}",
            count.packets, count.reason, drops.meaning
        )?;
        if let Some(advice) = drops.advice {
            writeln!(text, "    what to do: {advice}")?;
        }
    }
    Ok(text)
}
