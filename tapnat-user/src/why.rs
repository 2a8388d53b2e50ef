//! What the datapath would do with a packet: its own decisions (`tapnat_common::pipeline`), made here
//! about a packet that is nowhere, over the tables as they are. What they would write goes to copies
//! of the entries, so that nothing changes.
//!
//! Two things are not asked of the kernel as the datapath asks them: a route is looked up over netlink,
//! and that of a guest is taken to be its device.

mod frame;
mod tables;

use std::{net::IpAddr, num::NonZeroU32};

use anyhow::{Context as _, Result, bail};
use etherparse::PacketBuilder;
use serde::Serialize;
use tapnat_common::{
    abi::{Device, role},
    nat::{Route, nat64, prefixes},
    net::{Address as _, Be32, Be128, protocol},
    network::Network as _,
    parse::{self, Packet},
    pipeline::{self, Quick},
    siit::{self, Version},
    verdict::{Next, Outcome, Plan, Reason},
};

use self::{
    frame::Bytes,
    tables::{Rehearsal, StandInTable},
};
use crate::{
    explain::explain,
    family::IpFamily,
    tables::BothTables,
    trace::packet::PacketView,
    view::{by_name, is_loss},
};

/// Of packets that nobody sent: from Linux.
const TIME_TO_LIVE: u8 = 64;
/// Of a SYN that nobody sent.
const WINDOW: u16 = 64_240;
/// An identifier, and the port of a sender that names none.
pub const ANY_PORT: u16 = 40_000;

/// A packet to be decided about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Question<A> {
    /// One of `tapnat_common::net::protocol`: TCP (a SYN), UDP or the family's ICMP (a ping).
    pub protocol: u8,
    pub source: (A, u16),
    pub destination: (A, u16),
    /// The index of the device that it would arrive on.
    pub device: u32,
    /// Where the kernel would send it by its routes.
    pub route: Route,
}

/// What would become of a packet.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Answer {
    #[serde(serialize_with = "by_name")]
    pub reason: Reason,
    #[serde(serialize_with = "by_name")]
    pub outcome: Outcome,
    /// What the reason means.
    pub meaning: &'static str,
    /// What to do about it; null where there is nothing to do.
    pub advice: Option<&'static str>,
    pub before: PacketView,
    /// Null if it would not leave, or go to the host as it is.
    pub after: Option<PacketView>,
}

impl Answer {
    /// Whether it is dropped.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        is_loss(self.outcome)
    }
}

/// Decides about a packet as the datapath would now.
///
/// # Errors
///
/// When the tables cannot be read.
pub fn rehearse<A: Rehearsed>(question: &Question<A>, tables: &BothTables) -> Result<Answer> {
    let packet = build(question)?;
    let mut frame = Bytes::new(packet.clone());
    let both = Both::new(tables, question.route)?;
    let reason = A::decide(&mut frame, question.device, &both);
    both.check()?;
    let explanation = explain(reason).context("a reason is not explained: rebuild tapnat")?;
    let view = |bytes: &[u8]| {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        PacketView::read(bytes, 0, length)
    };
    let outcome = reason.outcome();
    Ok(Answer {
        reason,
        outcome,
        meaning: explanation.meaning,
        advice: explanation.advice,
        before: view(&packet),
        after: (outcome == Outcome::Forward).then(|| view(frame.bytes())),
    })
}

/// The tables of an instance, for one packet.
pub struct Both<'a> {
    ipv4: Rehearsal<'a, Be32>,
    /// Absent where IPv6 is not translated.
    ipv6: Option<Six<'a>>,
}

struct Six<'a> {
    tables: Rehearsal<'a, Be128>,
    stand_ins: StandInTable<'a>,
}

impl<'a> Both<'a> {
    fn new(tables: &'a BothTables, route: Route) -> Result<Self> {
        let six = |ipv6| -> Result<Six<'a>> {
            Ok(Six {
                tables: Rehearsal::new(ipv6, tables.prefix_pairs()?, route)?,
                stand_ins: StandInTable::new(ipv6)?,
            })
        };
        Ok(Self {
            ipv4: Rehearsal::new(&tables.ipv4, Vec::new(), route)?,
            ipv6: tables.ipv6.as_ref().map(six).transpose()?,
        })
    }

    /// Whether every entry could be read.
    fn check(&self) -> Result<()> {
        self.ipv4.check()?;
        if let Some(six) = &self.ipv6 {
            six.tables.check()?;
            six.stand_ins.check()?;
        }
        Ok(())
    }

    /// Decides about a packet of IPv4, from a stand-in perhaps, and takes it to the guest that a
    /// stand-in is for.
    fn decide_in_ipv4(&self, frame: &mut Bytes, device: u32, stands_in: bool) -> Reason {
        let reason = decide(frame, self.ipv4.inside(device), stands_in, &self.ipv4);
        let Some(six) = &self.ipv6 else {
            return reason;
        };
        let destination = Be32::read_destination(frame, 0);
        if reason.outcome() != Outcome::Forward || !destination.is_some_and(Be32::is_stand_in) {
            return reason;
        }
        let back = cross::<Be32>(frame, |packet| {
            let (guest, source) = nat64::to_ipv6(packet, &self.ipv4, &six.tables, &six.stand_ins)?;
            Ok((source, guest.address))
        });
        back.err().unwrap_or(reason)
    }
}

/// A family with what the datapath has in front of its other stages.
pub trait Rehearsed: IpFamily {
    /// Decides about the packet in the frame, which becomes what leaves if it is to be sent on.
    fn decide(frame: &mut Bytes, device: u32, both: &Both<'_>) -> Reason;
}

impl Rehearsed for Be32 {
    fn decide(frame: &mut Bytes, device: u32, both: &Both<'_>) -> Reason {
        both.decide_in_ipv4(frame, device, false)
    }
}

impl Rehearsed for Be128 {
    fn decide(frame: &mut Bytes, device: u32, both: &Both<'_>) -> Reason {
        let Some(Six { tables, stand_ins }) = &both.ipv6 else {
            return Reason::NotIp;
        };
        let inside = tables.inside(device);
        let destination = Self::read_destination(frame, 0);
        if destination.is_some_and(|destination| nat64::is_for(destination, stand_ins)) {
            let across = cross::<Self>(frame, |packet| {
                nat64::to_ipv4(packet, inside, tables, stand_ins)
            });
            return match across {
                Ok(()) => both.decide_in_ipv4(frame, device, true),
                Err(reason) => reason,
            };
        }
        if prefixes::concern(frame, inside, tables) {
            let mut packet = Packet::default();
            let mut plan = Plan::default();
            let next = pipeline::prefix(frame, inside, tables, &mut packet, &mut plan);
            return finish(next, frame, inside, tables, &mut packet, &mut plan);
        }
        decide(frame, inside, false, tables)
    }
}

/// Makes it a packet of the other IP version, with these ends.
fn cross<A: Version>(
    frame: &mut Bytes,
    ends: impl FnOnce(&Packet<A>) -> Result<(A::Other, A::Other), Reason>,
) -> Result<(), Reason> {
    let mut packet = Packet::default();
    parse::parse(frame, &mut packet)?;
    let ends = ends(&packet)?;
    let mut plan = siit::plan(frame, &packet, ends, Be32::ZERO).map_err(nat64::exit)?;
    plan.set_sum(0);
    let difference = A::Other::HEADER.cast_signed() - A::HEADER.cast_signed();
    frame.lengthen(difference + plan.room());
    plan.apply(frame).ok_or(Reason::RewriteFailed)
}

/// The stages of the datapath, in its order.
fn decide<A: IpFamily>(
    frame: &mut Bytes,
    device: Option<NonZeroU32>,
    stands_in: bool,
    tables: &Rehearsal<'_, A>,
) -> Reason {
    let mut packet = Packet::default();
    let mut plan = Plan {
        stands_in,
        ..Plan::default()
    };
    let next = match pipeline::established(frame, device, tables, &mut packet) {
        Quick::Onward(..) => return Reason::Translated,
        Quick::Broken => return Reason::RewriteFailed,
        Quick::New => pipeline::begin(frame, &mut packet, &mut plan),
        Quick::Not => pipeline::exceptional(frame, device, tables, &mut packet),
    };
    finish(next, frame, device, tables, &mut packet, &mut plan)
}

/// The stages from this one on.
fn finish<A: IpFamily>(
    mut next: Next,
    frame: &mut Bytes,
    device: Option<NonZeroU32>,
    tables: &Rehearsal<'_, A>,
    packet: &mut Packet<A>,
    plan: &mut Plan<A>,
) -> Reason {
    loop {
        next = match next {
            Next::Leave(reason) => return reason,
            Next::Start => pipeline::start(frame, device, tables, packet, plan),
            Next::Map => pipeline::map(tables, packet, plan),
            Next::Resume => pipeline::resume(frame, device, tables, packet, plan),
            Next::Error => pipeline::error(frame, device, tables, packet, plan),
            Next::Close => pipeline::close(device, tables, packet),
            Next::Open => pipeline::open(device, tables, packet, plan),
            Next::Insert => pipeline::insert(frame, device, tables, packet, plan),
            Next::Upkeep => pipeline::upkeep(packet, tables, plan),
        };
    }
}

/// Such a packet, without a link header.
fn build<A: IpFamily>(question: &Question<A>) -> Result<Vec<u8>> {
    let (source, source_port) = question.source;
    let (destination, destination_port) = question.destination;
    let builder = match (source.into(), destination.into()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            PacketBuilder::ipv4(source.octets(), destination.octets(), TIME_TO_LIVE)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            PacketBuilder::ipv6(source.octets(), destination.octets(), TIME_TO_LIVE)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            bail!("a packet is of one family")
        }
    };
    let mut bytes = Vec::new();
    match question.protocol {
        protocol::TCP => builder
            .tcp(source_port, destination_port, 0, WINDOW)
            .syn()
            .write(&mut bytes, &[]),
        protocol::UDP => builder
            .udp(source_port, destination_port)
            .write(&mut bytes, &[]),
        protocol::ICMPV6 => builder
            .icmpv6_echo_request(source_port, 1)
            .write(&mut bytes, &[]),
        _ => builder
            .icmpv4_echo_request(source_port, 1)
            .write(&mut bytes, &[]),
    }
    .context("cannot build such a packet")?;
    Ok(bytes)
}

/// The device whose network an address is a guest's of, by its index.
#[must_use]
pub fn device_of<A: IpFamily>(guest: A, devices: &[(u32, Device<A>)]) -> Option<u32> {
    devices
        .iter()
        .find(|(_, device)| device.role == role::INSIDE && device.contains(guest))
        .map(|(index, _)| *index)
}
