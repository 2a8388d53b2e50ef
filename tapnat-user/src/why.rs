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
    nat::{Route, prefixes},
    net::{Be32, Be128, protocol},
    nptv6::PrefixPair,
    parse::Packet,
    pipeline::{self, Quick},
    verdict::{Next, Outcome, Plan, Reason},
};

use self::{frame::Bytes, tables::Rehearsal};
use crate::{
    explain::explain, family::IpFamily, tables::PinnedTables, trace::packet::PacketView,
    view::outcome_label,
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
    pub reason: &'static str,
    pub outcome: &'static str,
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
        [Outcome::Drop, Outcome::Refuse]
            .map(outcome_label)
            .contains(&self.outcome)
    }
}

/// Decides about a packet as the datapath would now. `devices` are those of the tables, and `pairs`
/// the prefixes that are translated.
///
/// # Errors
///
/// When the tables cannot be read.
pub fn rehearse<A: Rehearsed>(
    question: &Question<A>,
    tables: &PinnedTables<A>,
    devices: &[(u32, Device<A>)],
    pairs: &[PrefixPair],
) -> Result<Answer> {
    let packet = build(question)?;
    let is_inside = devices
        .iter()
        .any(|(index, device)| *index == question.device && device.role == role::INSIDE);
    let device = NonZeroU32::new(question.device).filter(|_| is_inside);
    let rehearsal = Rehearsal::new(tables, devices, pairs, question.route)?;
    let mut frame = Bytes::new(packet.clone());
    let reason = decide(&mut frame, device, &rehearsal);
    rehearsal.check()?;
    let explanation = explain(reason).context("a reason is not explained: rebuild tapnat")?;
    let view = |bytes: &[u8]| {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        PacketView::read(bytes, 0, length)
    };
    let outcome = reason.outcome();
    Ok(Answer {
        reason: reason.label(),
        outcome: outcome_label(outcome),
        meaning: explanation.meaning,
        advice: explanation.advice,
        before: view(&packet),
        after: (outcome == Outcome::Forward).then(|| view(frame.bytes())),
    })
}

/// A family with what only it has in front of its other stages.
pub trait Rehearsed: IpFamily {
    /// The translation of prefixes, if it is that packet's.
    fn prefix(
        frame: &mut Bytes,
        device: Option<NonZeroU32>,
        tables: &Rehearsal<'_, Self>,
        packet: &mut Packet<Self>,
        plan: &mut Plan<Self>,
    ) -> Option<Next>;
}

impl Rehearsed for Be32 {
    fn prefix(
        _: &mut Bytes,
        _: Option<NonZeroU32>,
        _: &Rehearsal<'_, Self>,
        _: &mut Packet<Self>,
        _: &mut Plan<Self>,
    ) -> Option<Next> {
        None
    }
}

impl Rehearsed for Be128 {
    fn prefix(
        frame: &mut Bytes,
        device: Option<NonZeroU32>,
        tables: &Rehearsal<'_, Self>,
        packet: &mut Packet<Self>,
        plan: &mut Plan<Self>,
    ) -> Option<Next> {
        prefixes::concern(frame, device, tables)
            .then(|| pipeline::prefix(frame, device, tables, packet, plan))
    }
}

/// The stages of the datapath, in its order.
fn decide<A: Rehearsed>(
    frame: &mut Bytes,
    device: Option<NonZeroU32>,
    tables: &Rehearsal<'_, A>,
) -> Reason {
    let mut packet = Packet::default();
    let mut plan = Plan::default();
    let prefix = A::prefix(frame, device, tables, &mut packet, &mut plan);
    let mut next = match prefix {
        Some(next) => next,
        None => match pipeline::established(frame, device, tables, &mut packet) {
            Quick::Onward(..) => return Reason::Translated,
            Quick::Broken => return Reason::RewriteFailed,
            Quick::New => pipeline::begin(frame, &mut packet, &mut plan),
            Quick::Not => pipeline::exceptional(frame, device, tables, &mut packet, &mut plan),
        },
    };
    loop {
        next = match next {
            Next::Leave(reason) => return reason,
            Next::Start => pipeline::start(frame, device, tables, &packet, &mut plan),
            Next::Map => pipeline::map(tables, &packet, &mut plan),
            Next::Resume => pipeline::resume(frame, device, tables, &mut packet, &mut plan),
            Next::Error => pipeline::error(frame, device, tables, &packet, &mut plan),
            Next::Close => pipeline::close(device, tables, &packet),
            Next::Open => pipeline::open(device, tables, &packet, &mut plan),
            Next::Insert => pipeline::insert(frame, device, tables, &packet, &mut plan),
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
