//! Which sessions are meant, in which order, and added up by what they have in common. Decides; what
//! a session is is [`crate::view`]'s, how it is printed is [`crate::cli`]'s.

use std::{
    cmp::{Ordering, Reverse},
    collections::HashMap,
    net::IpAddr,
    ops::{ControlFlow, RangeInclusive},
};

use anyhow::Result;
use clap::ValueEnum;
use ipnet::IpNet;
use serde::Serialize;
use tapnat_common::{
    abi::{FlowKey, Session, session_flags},
    nat::session::State,
};

use crate::{
    clock::now,
    family::IpFamily,
    tables::{BothTables, PinnedTables, Walk},
    view::{Directions, Flow},
};

/// Which sessions are meant. Of each kind of condition at least one must hold; where there is none,
/// every session does.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub guests: Vec<IpNet>,
    /// IP protocol numbers.
    pub protocols: Vec<u8>,
    pub states: Vec<State>,
    /// Of the guest, of what stands for it, or of the remote.
    pub ports: Vec<RangeInclusive<u16>>,
    pub remotes: Vec<IpNet>,
    /// Seconds since the last packet, at least.
    pub older: Option<u64>,
    /// Seconds since the last packet, less than that.
    pub newer: Option<u64>,
}

impl Filter {
    /// Whether the session of this half is meant as far as one half tells, so that the other need
    /// not be read. `guest_of` says whose an inside address is.
    fn admits_half<A: IpFamily>(
        &self,
        key: &FlowKey<A>,
        half: &Session<A>,
        guest_of: impl Fn(A) -> IpAddr,
    ) -> bool {
        let to_guest = half.flags & session_flags::TO_INSIDE != 0;
        let contain =
            |nets: &[IpNet], address: IpAddr| nets.iter().any(|net| net.contains(&address));
        let port = |it: &RangeInclusive<u16>| {
            it.contains(&key.source_port.get())
                || it.contains(&half.source_port.get())
                || it.contains(&key.destination_port.get())
        };
        let protocol = key.arrival.protocol();
        (self.guests.is_empty()
            || contain(&self.guests, guest_of(key.source))
            || to_guest && contain(&self.guests, guest_of(half.destination)))
            && (self.protocols.is_empty() || self.protocols.contains(&protocol))
            && (self.remotes.is_empty() || contain(&self.remotes, key.destination.into()))
            && (self.ports.is_empty() || self.ports.iter().any(port))
    }

    /// Whether a session is meant, as far as [`Self::admits_half`] could not tell.
    fn admits(&self, flow: &Flow) -> bool {
        (self.states.is_empty() || self.states.contains(&flow.state))
            && self.older.is_none_or(|least| flow.idle_seconds >= least)
            && self.newer.is_none_or(|most| flow.idle_seconds < most)
    }
}

/// Calls `visit` with each session that is meant, IPv4's first, else in no order, until it breaks.
///
/// # Errors
///
/// When the kernel refuses, or when `visit` fails.
pub fn for_each(
    tables: &BothTables,
    filter: &Filter,
    mut visit: impl FnMut(Flow) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let goes_on = for_each_of(&tables.ipv4, filter, &mut visit)?.is_continue();
    if goes_on && let Some(tables) = &tables.ipv6 {
        let _ = for_each_of(tables, filter, &mut visit)?;
    }
    Ok(())
}

fn for_each_of<A: IpFamily>(
    tables: &PinnedTables<A>,
    filter: &Filter,
    visit: &mut impl FnMut(Flow) -> Result<ControlFlow<()>>,
) -> Result<ControlFlow<()>> {
    let settings = tables.settings()?;
    let now = now();
    let mut walk = Walk::default();
    while !walk.is_over() {
        for (key, half) in tables.next_halves(&mut walk)? {
            let guest_of = |address| tables.guest_of(address);
            if key.arrival.device().is_none() || !filter.admits_half(key, half, guest_of) {
                continue;
            }
            let twin = tables.half(&half.twin_key(key))?;
            let flow = Flow::from_half(key, half, twin.as_ref(), &settings, now);
            if let Some(flow) = flow.map(|flow| flow.of_guest(guest_of(key.source)))
                && filter.admits(&flow)
                && visit(flow)?.is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// What sessions are sorted by.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Key {
    #[value(alias = "proto")]
    Protocol,
    Inside,
    Outside,
    Remote,
    State,
    /// Soonest first
    Expires,
    /// Last heard of first
    Idle,
    /// Most first
    Packets,
    /// Most first
    Bytes,
}

impl Key {
    /// Whether there is something to sort by only where sessions are counted.
    #[must_use]
    pub fn needs_counts(self) -> bool {
        matches!(self, Self::Packets | Self::Bytes)
    }

    fn compare(self, one: &Flow, other: &Flow) -> Ordering {
        let total = |it: Option<Directions>| Reverse(it.map(Directions::total));
        match self {
            Self::Protocol => one.protocol.label().cmp(&other.protocol.label()),
            Self::Inside => one.inside.cmp(&other.inside),
            Self::Outside => one.outside.cmp(&other.outside),
            Self::Remote => one.remote.cmp(&other.remote),
            Self::State => one.state.label().cmp(other.state.label()),
            Self::Expires => one.expires_in_seconds.cmp(&other.expires_in_seconds),
            Self::Idle => one.idle_seconds.cmp(&other.idle_seconds),
            Self::Packets => total(one.packets).cmp(&total(other.packets)),
            Self::Bytes => total(one.bytes).cmp(&total(other.bytes)),
        }
    }
}

/// The order that sessions are shown in.
#[derive(Clone, Debug)]
pub struct Order {
    /// The first counts most.
    pub keys: Vec<Key>,
    pub reverse: bool,
}

impl Order {
    fn compare(&self, one: &Flow, other: &Flow) -> Ordering {
        let keys = self.keys.iter().map(|key| key.compare(one, other));
        let order = keys.fold(Ordering::Equal, Ordering::then);
        if self.reverse { order.reverse() } else { order }
    }
}

/// Sessions in an order, of which only the first so many are kept.
#[derive(Debug)]
pub struct Sorted {
    order: Order,
    limit: usize,
    flows: Vec<Flow>,
}

impl Sorted {
    #[must_use]
    pub fn new(order: Order, limit: usize) -> Self {
        Self {
            order,
            limit,
            flows: Vec::new(),
        }
    }

    pub fn add(&mut self, flow: Flow) {
        self.flows.push(flow);
        // Seldom enough to cost little.
        if self.flows.len() / 4 > self.limit.max(1000) {
            self.settle();
        }
    }

    /// The sessions in their order.
    #[must_use]
    pub fn into_flows(mut self) -> Vec<Flow> {
        self.settle();
        self.flows
    }

    fn settle(&mut self) {
        let order = &self.order;
        self.flows.sort_by(|one, other| order.compare(one, other));
        self.flows.truncate(self.limit);
    }
}

/// What sessions may have in common.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, ValueEnum)]
pub enum Common {
    /// The guest's address
    Guest,
    /// The remote's address
    Remote,
    /// The protocol and the remote's port
    Service,
    Protocol,
    State,
}

impl Common {
    fn of(self, flow: &Flow) -> String {
        match self {
            Self::Guest => flow.inside.address.to_string(),
            Self::Remote => flow.remote.address.to_string(),
            Self::Service => format!("{}/{}", flow.protocol, flow.remote.port),
            Self::Protocol => flow.protocol.to_string(),
            Self::State => flow.state.label().to_owned(),
        }
    }
}

/// Sessions that have something in common, added up.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Sum {
    /// What they have in common: an address, `tcp/443`, a protocol or a state.
    pub group: String,
    pub sessions: u64,
    /// Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<Directions>,
    /// Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Directions>,
}

/// Sums of sessions.
#[derive(Debug)]
pub struct Sums {
    by: Common,
    sums: HashMap<String, Sum>,
}

impl Sums {
    #[must_use]
    pub fn new(by: Common) -> Self {
        Self {
            by,
            sums: HashMap::new(),
        }
    }

    pub fn add(&mut self, flow: &Flow) {
        let sum = self.sums.entry(self.by.of(flow)).or_default();
        sum.sessions += 1;
        for (sum, more) in [
            (&mut sum.packets, flow.packets),
            (&mut sum.bytes, flow.bytes),
        ] {
            if let Some(more) = more {
                *sum = Some(sum.map_or(more, |it| it.plus(more)));
            }
        }
    }

    /// The sums: those with the most bytes first, or with the most sessions where nothing is counted.
    #[must_use]
    pub fn busiest_first(self) -> Vec<Sum> {
        let sums = self.sums.into_iter();
        let mut sums: Vec<_> = sums.map(|(group, sum)| Sum { group, ..sum }).collect();
        sums.sort_by(|one, other| {
            let busy = |it: &Sum| Reverse((it.bytes.map(Directions::total), it.sessions));
            let order = busy(one).cmp(&busy(other));
            order.then_with(|| one.group.cmp(&other.group))
        });
        sums
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, Ipv6Addr},
        num::NonZeroU32,
    };

    use tapnat_common::{
        abi::Arrival,
        net::{Be16, Be32, Be128, protocol},
    };

    use super::*;
    use crate::view::{Endpoint, Protocol};

    fn half(protocol: u8) -> (FlowKey, Session) {
        let address = |text: &str| Be32::from(text.parse::<Ipv4Addr>().unwrap());
        let key = FlowKey {
            source: address("10.0.0.2"),
            destination: address("198.51.100.7"),
            source_port: Be16::new(40000),
            destination_port: Be16::new(443),
            arrival: Arrival::inside(NonZeroU32::MIN, protocol),
        };
        let half = Session {
            source: address("192.0.2.10"),
            destination: address("10.0.1.3"),
            source_port: Be16::new(41000),
            destination_port: Be16::new(44300),
            ..Session::default()
        };
        (key, half)
    }

    fn net(text: &str) -> Vec<IpNet> {
        vec![text.parse().unwrap()]
    }

    #[test]
    fn a_filter_looks_at_every_endpoint_that_is_shown() {
        let (key, mut half) = half(protocol::TCP);
        let admits = |filter: Filter, half: &Session| filter.admits_half(&key, half, Into::into);
        let guests = |text: &str| Filter {
            guests: net(text),
            ..Filter::default()
        };
        assert!(admits(Filter::default(), &half));
        assert!(admits(guests("10.0.0.2/32"), &half));
        assert!(!admits(guests("10.0.0.3/32"), &half));
        // Of a session between guests, the other one.
        assert!(!admits(guests("10.0.1.0/24"), &half));
        half.flags |= session_flags::TO_INSIDE;
        assert!(admits(guests("10.0.1.0/24"), &half));
        for (port, shown) in [(40000, true), (41000, true), (443, true), (44300, false)] {
            let filter = Filter {
                ports: vec![port..=port],
                ..Filter::default()
            };
            assert_eq!(admits(filter, &half), shown, "{port}");
        }
        let remotes = |text| Filter {
            remotes: net(text),
            ..Filter::default()
        };
        assert!(admits(remotes("198.51.100.0/24"), &half));
        assert!(!admits(remotes("10.0.1.3/32"), &half));
        let protocols = |number| Filter {
            protocols: vec![number],
            guests: net("10.0.0.0/8"),
            ..Filter::default()
        };
        assert!(admits(protocols(protocol::TCP), &half));
        assert!(!admits(protocols(protocol::UDP), &half));
    }

    #[test]
    fn prefixes_are_of_one_family() {
        let address = |text: &str| Be128::from(text.parse::<Ipv6Addr>().unwrap());
        let key = FlowKey {
            source: address("fd00:7a70::10"),
            destination: address("2001:db8:2::1"),
            arrival: Arrival::inside(NonZeroU32::MIN, protocol::TCP),
            ..FlowKey::default()
        };
        let admits = |guests, remotes| {
            let filter = Filter {
                guests: net(guests),
                remotes: net(remotes),
                ..Filter::default()
            };
            filter.admits_half(&key, &Session::default(), Into::into)
        };
        assert!(admits("fd00:7a70::/64", "::/0"));
        assert!(!admits("fd00:7a71::/64", "::/0"));
        assert!(!admits("fd00:7a70::10/128", "0.0.0.0/0"));
    }

    #[test]
    fn a_guest_is_not_known_by_its_stand_in() {
        let (key, half) = half(protocol::TCP);
        let guest: IpAddr = "fd00:7a70::10".parse().unwrap();
        let admits = |text: &str| {
            let filter = Filter {
                guests: net(text),
                ..Filter::default()
            };
            filter.admits_half(&key, &half, |address| {
                assert_eq!(address, key.source);
                guest
            })
        };
        assert!(admits("fd00:7a70::/64"));
        assert!(!admits("10.0.0.2/32"));
    }

    fn flow(guest: u8, state: State, idle_seconds: u64, bytes: u64) -> Flow {
        let endpoint = |port| Endpoint {
            address: Ipv4Addr::new(10, 0, 0, guest).into(),
            port,
        };
        let both = Some(Directions {
            outbound: bytes,
            inbound: 1,
        });
        Flow {
            protocol: Protocol(protocol::TCP),
            inside: endpoint(40000),
            outside: endpoint(40000),
            remote: endpoint(443),
            state,
            idle_seconds,
            expires_in_seconds: 100 - idle_seconds,
            packets: both,
            bytes: both,
        }
    }

    #[test]
    fn states_and_ages_are_told_from_the_whole_session() {
        let filter = Filter {
            states: vec![State::Opening, State::Closing],
            older: Some(10),
            newer: Some(20),
            ..Filter::default()
        };
        for (state, idle, shown) in [
            (State::Opening, 10, true),
            (State::Closing, 19, true),
            (State::Established, 15, false),
            (State::Opening, 9, false),
            (State::Opening, 20, false),
        ] {
            assert_eq!(
                filter.admits(&flow(1, state, idle, 0)),
                shown,
                "{state:?} {idle}"
            );
        }
    }

    #[test]
    fn the_first_of_an_order_are_kept() {
        let first = |keys: &[Key], reverse, limit| {
            let order = Order {
                keys: keys.to_vec(),
                reverse,
            };
            let mut sorted = Sorted::new(order, limit);
            for number in 0..10_000u64 {
                let guest = u8::try_from(number % 100).unwrap();
                sorted.add(flow(guest, State::Opening, number % 7, number));
            }
            let flows = sorted.into_flows();
            let first: Vec<_> = flows.iter().take(3).map(|it| it.bytes).collect();
            (
                flows.len(),
                first
                    .into_iter()
                    .map(|it| it.unwrap().outbound)
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(first(&[Key::Bytes], false, 3), (3, vec![9999, 9998, 9997]));
        assert_eq!(
            first(&[Key::Bytes], true, usize::MAX),
            (10_000, vec![0, 1, 2])
        );
        assert_eq!(
            first(&[Key::Inside, Key::Bytes], false, 2),
            (2, vec![9900, 9800])
        );
        assert_eq!(
            first(&[Key::Expires, Key::Bytes], false, 1),
            (1, vec![9995])
        );
        assert_eq!(first(&[Key::Idle, Key::Bytes], false, 1), (1, vec![9996]));
    }

    #[test]
    fn sums_are_of_what_sessions_have_in_common() {
        let flows = [
            flow(1, State::Opening, 0, 10),
            flow(2, State::Opening, 0, 100),
            flow(1, State::Closing, 0, 20),
        ];
        let sums = |by| {
            let mut sums = Sums::new(by);
            for flow in &flows {
                sums.add(flow);
            }
            sums.busiest_first()
        };
        let brief = |by| {
            let sums = sums(by).into_iter();
            sums.map(|it| (it.group, it.sessions, it.bytes.unwrap().outbound))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            brief(Common::Guest),
            [
                ("10.0.0.2".to_owned(), 1, 100),
                ("10.0.0.1".to_owned(), 2, 30)
            ]
        );
        assert_eq!(brief(Common::Service), [("tcp/443".to_owned(), 3, 130)]);
        assert_eq!(brief(Common::State)[0].0, "opening");
        assert_eq!(sums(Common::Protocol)[0].packets.unwrap().inbound, 3);
    }
}
