//! Activities of no instance, for tests of what shows them.

use std::net::{Ipv4Addr, Ipv6Addr};

use tapnat_common::{abi::Counter, nat::session::State, net::protocol, verdict::Reason};

use super::{
    ports::PortsView,
    rates::{Rate, Rates},
    view::{Activity, DeviceActivity, FlowActivity, GuestActivity, ReasonActivity},
};
use crate::{
    journal::Role,
    view::{
        DeviceView, Directions, Endpoint, FamiliesView, Flow, GuestView, LinkLayer, Protocol,
        ReasonView, SCHEMA, TablesView, UsageView,
    },
};

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

pub(crate) fn device(name: &str, index: u32, role: Role, address: [u8; 4]) -> DeviceActivity {
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
            link_layer: LinkLayer::Ethernet,
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

fn reason(reason: Reason, packets: u64) -> ReasonActivity {
    let counter = Counter {
        packets,
        bytes: packets * 60,
    };
    ReasonActivity {
        reason: ReasonView::new(reason, counter),
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
            protocol: Protocol(protocol::TCP),
            inside: endpoint([10, 0, 0, guest], 40000),
            outside: endpoint([198, 51, 100, 2], 40000),
            remote: endpoint([203, 0, 113, 1], 443),
            state: State::Established,
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
            device("uplink0", 2, Role::Uplink, [198, 51, 100, 2]),
            device("tap0", 3, Role::Inside, [10, 0, 0, 1]),
        ],
        guests: vec![
            guest(12, 7, 12, 0.0),
            guest(10, 12_000, 0, 1.2e9),
            guest(11, 338, 0, 9.5e6),
        ],
        reasons: vec![
            reason(Reason::SessionStarted, 13_000),
            reason(Reason::NoSession, 17),
            reason(Reason::Truncated, 0),
            reason(Reason::GuestSessionLimit, 12),
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
