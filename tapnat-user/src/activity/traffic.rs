//! What sessions have carried by now, by session and by guest, where the datapath counts it.

use std::{collections::HashMap, net::IpAddr};

use tapnat_common::{
    abi::{Counter, FlowKey, Session, session_flags},
    net::{Be32, Be128},
};

use super::rates::Passed;
use crate::family::IpFamily;

/// What sessions have carried, where they are counted.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    ipv4: Halves<Be32>,
    ipv6: Halves<Be128>,
    /// Their sums, by what guests have in the tables.
    pub(super) guests: HashMap<IpAddr, Passed>,
}

/// What each half of a session has carried.
pub(super) type Halves<A> = HashMap<FlowKey<A>, Counter>;

/// A family whose halves are a part of the traffic.
pub(super) trait Part: IpFamily {
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
    pub(super) fn add<A: Part>(&mut self, key: &FlowKey<A>, half: &Session<A>) {
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

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, Ipv6Addr},
        num::NonZeroU32,
    };

    use tapnat_common::{
        abi::Arrival,
        net::{Be16, protocol},
    };

    use super::*;

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
}
