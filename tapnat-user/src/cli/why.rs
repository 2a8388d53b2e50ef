//! `tapnat why`: what would become of a packet, and what became of those of a guest.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use tapnat_common::{
    abi::{Device, role},
    embed::Prefix,
    nat::{Fate, Route},
    net::{Be128, protocol},
    nptv6::PrefixPair,
    verdict::Outcome,
};

use super::{Format, Instance, print};
use crate::{
    activity,
    explain::explain,
    family::IpFamily,
    host::netlink::Netlink,
    tables::{BothTables, PinnedTables},
    view::{DeviceView, GuestView, ReasonView, SCHEMA, is_loss, protocol_number},
    why::{ANY_PORT, Answer, Question, Rehearsed, device_of, rehearse},
};

/// Ends with this when the packet does not get through.
const REFUSED: u8 = 3;
/// In examples.
const INSIDE: &str = "tap0=10.0.0.1/24,fd00:7a70::1/64";

#[derive(Debug, Args)]
pub struct Arguments {
    /// Whose packets [default: the only guest there is]
    #[arg(long, value_name = "ADDRESS")]
    guest: Option<IpAddr>,

    /// tcp, udp or icmp [default: tcp with a port, else icmp]
    #[arg(long, visible_alias = "protocol", value_name = "PROTOCOL", value_parser = parse_protocol)]
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
type End = (IpAddr, Option<u16>);

fn parse_end(text: &str) -> Result<End> {
    if let Ok(address) = text.parse() {
        return Ok((address, None));
    }
    if let Ok(end) = text.parse::<SocketAddr>() {
        return Ok((end.ip(), Some(end.port())));
    }
    let address = text.rsplit_once(':').map_or(text, |(address, _)| address);
    let bare = address.trim_start_matches('[').trim_end_matches(']');
    match bare.parse::<IpAddr>() {
        Ok(address) => bail!(
            "'{text}' does not end in a port: write {}",
            SocketAddr::new(address, 443)
        ),
        Err(_) => {
            bail!("'{text}' does not begin with an address: write 1.1.1.1:443 or [2001:db8::1]:443")
        }
    }
}

fn parse_protocol(text: &str) -> Result<u8> {
    protocol_number(text)
        .map(|number| match number {
            protocol::ICMPV6 => protocol::ICMP,
            other => other,
        })
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
    pub async fn execute(mut self) -> Result<ExitCode> {
        let tables = self.instance.tables()?;
        let prefix = tables.nat64()?;
        let guests = self.guests(&tables, prefix)?;
        let mut nobody = None;
        let guest = match (self.guest, self.from) {
            (Some(guest), _) => Some(guest),
            (None, Some(_)) => None,
            (None, None) => match self.only_guest(&guests, &tables) {
                Ok(guest) => Some(guest),
                // What was dropped may tell why nothing is known of a guest.
                Err(reason) if self.to.is_none() => {
                    nobody = Some(format!("{reason:#}"));
                    None
                }
                Err(reason) => return Err(reason),
            },
        };
        // A guest with IPv6 only has a name of its own for what it reaches by NAT64.
        if let (Some(IpAddr::V6(_)), Some((IpAddr::V4(to), port)), Some(prefix)) =
            (guest, self.to, prefix)
        {
            self.to = Some((prefix.embed(to.into()).into(), port));
        }
        let packet = match (self.to, &tables.ipv6) {
            (None, _) => None,
            (Some(to), _) if to.0.is_ipv4() => {
                Some(self.packet(guest, to, &tables.ipv4, &tables).await?)
            }
            (Some(to), Some(ipv6)) => Some(self.packet(guest, to, ipv6, &tables).await?),
            (Some((to, _)), None) => bail!(
                "'{to}' is of IPv6, which the instance does not translate: give a device a network \
                 of it (`--inside {INSIDE}`)"
            ),
        };
        let crosses = match self.to {
            Some((to, _)) => behind_nat64(&tables, to)?.is_some(),
            None => false,
        };
        let of_guest = guests.into_iter().filter(|it| Some(it.address) == guest);
        let report = Report {
            schema: SCHEMA,
            // One that has both ways to the world is there twice.
            guest: of_guest.max_by_key(|it| it.stand_in.is_some() == crosses),
            drops: drops(&tables.ipv4)?,
            packet,
        };
        if self.format.json {
            print::json(&report)?;
        } else {
            let nobody = nobody.map_or(String::new(), |it| it + "\n");
            print::text(&(nobody + &describe(guest, &report, &tables.prefix_pairs()?)?))?;
        }
        let is_refused = report.packet.as_ref().is_some_and(Answer::is_refusal);
        Ok(if is_refused {
            ExitCode::from(REFUSED)
        } else {
            ExitCode::SUCCESS
        })
    }

    /// Who can be meant: guests of both families, or those that can send such a packet.
    fn guests(&self, tables: &BothTables, prefix: Option<Prefix>) -> Result<Vec<GuestView>> {
        let mut guests = activity::guests(&tables.ipv4)?;
        if let Some(tables) = &tables.ipv6 {
            guests.extend(activity::guests(tables)?);
        }
        if let Some((to, _)) = self.to {
            let is_of_family = |guest: &GuestView| guest.address.is_ipv4() == to.is_ipv4();
            // By NAT64 those with IPv6 only reach IPv4.
            if guests.iter().any(is_of_family) || prefix.is_none() || to.is_ipv6() {
                guests.retain(|guest| is_of_family(guest) || Some(guest.address) == self.guest);
            }
        }
        Ok(guests)
    }

    /// The guest that is meant when none is named. One with both families is one.
    fn only_guest(&self, guests: &[GuestView], tables: &BothTables) -> Result<IpAddr> {
        let Some(first) = guests.first() else {
            let devices = activity::devices(&self.instance.name, tables)?;
            let networks = devices.iter().filter(|it| it.is_inside());
            let mut networks = networks.flat_map(DeviceView::networks);
            let is_meant = |it: IpAddr| self.to.is_none_or(|(to, _)| to.is_ipv4() == it.is_ipv4());
            let network = networks.find(|it| is_meant(it.addr()));
            let network = network.map_or("the inside network".to_owned(), |it| {
                format!("the network of {}", it.addr())
            });
            if !tables.prefix_pairs()?.is_empty() && self.to.is_some_and(|(to, _)| to.is_ipv6()) {
                bail!(
                    "no guest with sessions is known, and of those whose prefix is translated none \
                     is kept: name an address of {network} (--guest)"
                );
            }
            bail!(
                "no guest has sent anything to the world yet: look whether its packets arrive \
                 (`tapnat trace`), or name an address of {network} (--guest)"
            )
        };
        let is_first = |guest: &GuestView| {
            guest.address == first.address
                || guest.link_address.is_some() && guest.link_address == first.link_address
        };
        if guests.iter().skip(1).all(is_first) {
            return Ok(first.address);
        }
        // One that has both ways to the world is there twice.
        let names: BTreeSet<_> = guests.iter().map(|it| it.address).collect();
        let names: Vec<_> = names.iter().take(5).map(ToString::to_string).collect();
        bail!(
            "there are several guests: pass --guest with one, such as {}",
            names.join(", ")
        )
    }

    /// What would become of the packet. `tables` are those of its family.
    async fn packet<A: Rehearsed>(
        &self,
        guest: Option<IpAddr>,
        to: End,
        tables: &PinnedTables<A>,
        both: &BothTables,
    ) -> Result<Answer> {
        let question = self.question(guest, to, both, &tables.devices()?).await?;
        rehearse(&question, both)
    }

    async fn question<A: IpFamily>(
        &self,
        guest: Option<IpAddr>,
        (to, port): End,
        tables: &BothTables,
        devices: &[(u32, Device<A>)],
    ) -> Result<Question<A>> {
        let default = if port.is_some() {
            protocol::TCP
        } else {
            protocol::ICMP
        };
        let number = self.proto.unwrap_or(default);
        ensure!(
            number == protocol::ICMP || port.is_some(),
            "which port? write --to {}",
            SocketAddr::new(to, 443)
        );
        let read = |address| {
            A::from_ip(address).with_context(|| {
                format!(
                    "a packet to {to} is not from {address}: both are of one family, but with \
                     --nat64"
                )
            })
        };
        let first = |wanted| {
            let mut devices = devices.iter();
            let first = devices.find(|(_, device)| device.role == wanted);
            first.map(|(index, _)| *index)
        };
        let (source, device, route) = if let Some((address, port)) = self.from {
            let uplink = first(role::UPLINK).context("the instance has no uplink now")?;
            (
                (read(address)?, port.unwrap_or(ANY_PORT)),
                uplink,
                Route::default(),
            )
        } else {
            let guest = read(guest.context("whose packet? pass --guest ADDRESS")?)?;
            let device = device_of(guest, devices).or_else(|| first(role::INSIDE));
            let device = device.context("the instance has no inside device now")?;
            let known = activity::devices(&self.instance.name, tables)?;
            let known = known.into_iter().find(|it| it.index == device);
            let name = known
                .and_then(|it| it.name)
                .context("the guest's device is not of this host: run tapnat where it is")?;
            let route = match behind_nat64(tables, to)? {
                Some(to) => route(&name, to, &tables.ipv4.devices()?).await?,
                None => route(&name, to, devices).await?,
            };
            ((guest, ANY_PORT), device, route)
        };
        Ok(Question {
            protocol: if number == protocol::ICMP {
                A::ICMP
            } else {
                number
            },
            source,
            destination: (read(to)?, port.unwrap_or(0)),
            device,
            route,
        })
    }
}

/// The address of IPv4 that this one of IPv6 stands for.
fn behind_nat64(tables: &BothTables, address: IpAddr) -> Result<Option<IpAddr>> {
    let (Some(prefix), Some(address)) = (tables.nat64()?, Be128::from_ip(address)) else {
        return Ok(None);
    };
    Ok(prefix.extract(address).map(IpAddr::from))
}

/// Where the kernel sends packets from this inside device.
async fn route<A: IpFamily>(
    device: &str,
    to: IpAddr,
    devices: &[(u32, Device<A>)],
) -> Result<Route> {
    let forwarding = A::forwarding(device).read();
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

fn drops(tables: &PinnedTables) -> Result<Vec<Drops>> {
    let mut drops: Vec<_> = tables
        .counters()?
        .into_iter()
        .filter(|(reason, counter)| counter.packets != 0 && is_loss(reason.outcome()))
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

fn describe(guest: Option<IpAddr>, report: &Report, pairs: &[PrefixPair]) -> Result<String> {
    let is_without_sessions = guest
        .and_then(Be128::from_ip)
        .is_some_and(|guest| pairs.iter().any(|pair| pair.has_internal(guest)));
    let mut text = String::new();
    if let Some(answer) = &report.packet {
        writeln!(text, "{}", answer.before.describe())?;
        let verdict = match answer.outcome {
            Outcome::Forward => "is translated and sent on",
            Outcome::Pass => "goes to the host as it is",
            Outcome::Refuse => "is dropped, and its sender is told",
            Outcome::Drop => "is dropped",
            Outcome::Fragment => "is cut into fragments, which are sent on",
            Outcome::Ask | Outcome::Hold => "waits",
        };
        let reason = answer.reason.label();
        writeln!(text, "  {verdict}: {} ({reason})", answer.meaning)?;
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
            None if is_without_sessions => writeln!(
                text,
                "guest {guest} has no sessions: its prefix is translated without any"
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
            count.packets,
            count.reason.label(),
            drops.meaning
        )?;
        if let Some(advice) = drops.advice {
            writeln!(text, "    what to do: {advice}")?;
        }
    }
    Ok(text)
}
