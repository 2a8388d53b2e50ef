//! What is decided without a session: which packets have their prefix translated and where
//! they go, by routes and networks alone, and who stands in for guests of NAT64.

use std::{
    cell::RefCell,
    net::{Ipv6Addr, SocketAddr},
    num::NonZeroU32,
};

use tapnat_common::{
    abi::{
        Device, EndpointKey, FlowKey, Fragment, FragmentKey, Guest, Mapping, NextHop, Permission,
        PermissionKey, Session, Settings, StandIn, Unsolicited, Upkeep, role, setting_flags,
    },
    embed::Prefix,
    nat::{
        Fate, Insert, Route, Tables,
        guests::Entry,
        nat64::{self, StandIns},
        prefixes,
    },
    net::{Address as _, Be32, Be128},
    nptv6::PrefixPair,
    parse::Packet,
    pipeline,
    ports::{PortSet, Reserved},
    time::Instant,
    verdict::{Next, Plan, Reason},
};
use tapnat_testbed::packet::{Builder, icmp_error, udp, unreachable};

use crate::frame::Bytes;

/// Interface indices.
const UPLINK: u32 = 1;
const NEAR: u32 = 2;
const FAR: u32 = 3;

fn v6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// Two inside networks in the internal prefix, and the host's address on the uplink, which
/// lies in the external one.
struct Net {
    settings: Settings<Be128>,
    devices: [(u32, Device<Be128>); 3],
    pairs: [PrefixPair; 4],
    denied: Option<Be128>,
    /// What routes there are to the world, and to guests.
    outward: Fate,
    inward: Fate,
    mtu: u16,
}

impl Net {
    fn new() -> Self {
        let pair = PrefixPair::new(
            (v6("fd01:203:405::").into(), 48),
            (v6("2001:db8:1::").into(), 48),
        );
        let device = |address, role| Device {
            address: v6(address).into(),
            network: v6(address).into(),
            mask: Be128::mask(64),
            mtu: 1500,
            role,
            ethernet: 1,
        };
        let mut settings = Settings::default();
        settings.outside[0] = v6("2001:db8:1::2").into();
        settings.outside_count = 1;
        Self {
            settings,
            devices: [
                (UPLINK, device("2001:db8:1::2", role::UPLINK)),
                (NEAR, device("fd01:203:405:1::1", role::INSIDE)),
                (FAR, device("fd01:203:405:2::1", role::INSIDE)),
            ],
            pairs: [
                pair.unwrap(),
                PrefixPair::default(),
                PrefixPair::default(),
                PrefixPair::default(),
            ],
            denied: None,
            outward: Fate::Onward,
            inward: Fate::Onward,
            mtu: 1500,
        }
    }

    /// What becomes of a packet that arrives on this inside device, or 0.
    fn decide(&self, packet: &Builder, device: u32) -> (Next, Bytes, Plan<Be128>) {
        let mut frame = Bytes::raw(&packet.build());
        let (mut read, mut plan) = (Packet::default(), Plan::default());
        let device = NonZeroU32::new(device);
        let next = if prefixes::concern(&frame, device, self) {
            pipeline::prefix(&mut frame, device, self, &mut read, &mut plan)
        } else {
            Next::Start
        };
        (next, frame, plan)
    }

    fn route(&self, fate: Fate, device: u32) -> Route {
        Route {
            fate,
            next_hop: NextHop {
                device,
                ..NextHop::default()
            },
            linked: false,
            mtu: self.mtu,
        }
    }
}

/// What only sessions ask for.
macro_rules! never {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        $(
            fn $name(&self $(, _: $argument)*) $(-> $result)? {
                panic!("there are no sessions")
            }
        )*
    };
}

impl Tables<Be128> for Net {
    fn settings(&self) -> Option<&Settings<Be128>> {
        Some(&self.settings)
    }

    fn device(&self, index: u32) -> Option<&Device<Be128>> {
        let found = self.devices.iter().find(|(known, _)| *known == index);
        found.map(|(_, device)| device)
    }

    fn prefix_pair(&self, place: u32) -> Option<&PrefixPair> {
        self.pairs.get(place as usize)
    }

    fn inside_device(&self, address: Be128) -> Option<u32> {
        let found = self
            .devices
            .iter()
            .find(|(_, device)| device.role == role::INSIDE && device.contains(address));
        found.map(|(index, _)| *index)
    }

    fn is_denied(&self, destination: Be128) -> bool {
        self.denied == Some(destination)
    }

    fn route_from(&self, _: NonZeroU32, packet: &Packet<Be128>) -> Route {
        match self.inside_device(packet.destination) {
            Some(device) => self.route(Fate::Onward, device),
            None => self.route(self.outward, UPLINK),
        }
    }

    fn route_on(&self, device: u32, _: Be128, destination: Be128) -> Route {
        let is_hosts = self.devices.iter().any(|(_, it)| it.address == destination);
        let fate = if is_hosts { Fate::Local } else { self.inward };
        self.route(fate, device)
    }

    never! {
        session(&FlowKey<Be128>) -> Option<&mut Session<Be128>>;
        insert_session(&FlowKey<Be128>, &Session<Be128>) -> Insert;
        remove_session(&FlowKey<Be128>) -> bool;
        mapping(&EndpointKey<Be128>) -> Option<&mut Mapping<Be128>>;
        insert_mapping(&EndpointKey<Be128>, &Mapping<Be128>) -> Insert;
        remove_mapping(&EndpointKey<Be128>) -> bool;
        count(&mut u32, bool);
        outside_of(&EndpointKey<Be128>) -> Option<EndpointKey<Be128>>;
        insert_outside_of(&EndpointKey<Be128>, &EndpointKey<Be128>) -> Insert;
        remove_outside_of(&EndpointKey<Be128>);
        permission(&PermissionKey<Be128>) -> Option<&mut Permission>;
        remove_permission(&PermissionKey<Be128>) -> bool;
        set_permission(&PermissionKey<Be128>, &Permission) -> Insert;
        note_unsolicited(&FlowKey<Be128>, &Unsolicited);
        note_asked(&FlowKey<Be128>, &EndpointKey<Be128>);
        take_asked(&FlowKey<Be128>) -> Option<EndpointKey<Be128>>;
        fragment(&FragmentKey<Be128>) -> Option<&mut Fragment>;
        new_fragment(&FragmentKey<Be128>) -> Option<&mut Fragment>;
        next_identification() -> Be32;
        guest(Be128) -> Option<&mut Guest>;
        insert_guest(Be128, &Guest) -> Insert;
        guests_on(u32) -> Option<&mut u32>;
        remove_guest(Be128) -> bool;
        is_untranslated(Be128) -> bool;
        count_off_guest(Be128);
        count_port_on_guest(Be128, u32, bool);
        forget_link_of_guest(Be128);
        upkeep() -> Option<&mut Upkeep>;
        look_after(impl FnOnce(&mut FlowKey<Be128>));
        take_looked_after(&mut FlowKey<Be128>) -> bool;
        ports(u32) -> Option<&mut PortSet>;
        reserved(u32) -> Option<&Reserved>;
        host_socket(&EndpointKey<Be128>, &EndpointKey<Be128>) -> bool;
        random() -> u32;
        counts_traffic() -> bool;
        now() -> Instant;
    }
}

/// The guest of the standard's example, and what the world knows it as.
const GUEST: &str = "fd01:203:405:1::1234";
const KNOWN: &str = "2001:db8:1:d550::1234";
/// Another guest of the same network.
const OTHER_OF_DEVICE: &str = "fd01:203:405:1::77";
/// A guest of the other network.
const OTHER: &str = "fd01:203:405:2::5";
const OTHER_KNOWN: &str = "2001:db8:1:d551::5";
const REMOTE: &str = "2001:db8:ffff::7";

fn datagram(from: &str, to: &str) -> Builder {
    udp(
        SocketAddr::new(v6(from).into(), 1024),
        SocketAddr::new(v6(to).into(), 53),
    )
    .payload(b"payload")
}

/// Checks that a packet that arrives on this device, or 0, goes out of that one as this.
#[track_caller]
fn goes(net: &Net, sent: &Builder, device: u32, out: u32, expected: &Builder) {
    let (fate, frame, plan) = net.decide(sent, device);
    assert_eq!(fate, Next::Leave(Reason::PrefixTranslated));
    assert_eq!(frame.bytes, expected.clone().ttl(63).build());
    assert_eq!(plan.rewrite.next_hop.device, out);
    assert!(plan.rewrite.resolve);
}

/// Checks what becomes of a packet, which is left as it was.
#[track_caller]
fn becomes(net: &Net, sent: &Builder, device: u32, expected: Next) {
    let (fate, frame, _) = net.decide(sent, device);
    assert_eq!(fate, expected);
    assert_eq!(frame.bytes, sent.build());
}

#[test]
fn packets_go_out_come_in_and_turn_round() {
    let net = Net::new();
    let cases = [
        ((GUEST, REMOTE, NEAR), (KNOWN, REMOTE, UPLINK)),
        ((REMOTE, KNOWN, 0), (REMOTE, GUEST, NEAR)),
        ((REMOTE, OTHER_KNOWN, 0), (REMOTE, OTHER, FAR)),
        ((GUEST, OTHER_KNOWN, NEAR), (KNOWN, OTHER, FAR)),
        // To itself.
        ((GUEST, KNOWN, NEAR), (KNOWN, GUEST, NEAR)),
    ];
    for ((from, to, device), (source, destination, out)) in cases {
        goes(
            &net,
            &datagram(from, to),
            device,
            out,
            &datagram(source, destination),
        );
    }
}

#[test]
fn errors_take_what_they_quote_with_them() {
    let net = Net::new();
    let error = |from: &str, to: &str, quoted: &Builder| {
        unreachable(v6(from).into(), v6(to).into(), 4, &quoted.build())
    };
    goes(
        &net,
        &error(REMOTE, KNOWN, &datagram(KNOWN, REMOTE)),
        0,
        NEAR,
        &error(REMOTE, GUEST, &datagram(GUEST, REMOTE)),
    );
    goes(
        &net,
        &error(GUEST, REMOTE, &datagram(REMOTE, GUEST)),
        NEAR,
        UPLINK,
        &error(KNOWN, REMOTE, &datagram(REMOTE, KNOWN)),
    );
    goes(
        &net,
        &error(OTHER, KNOWN, &datagram(KNOWN, OTHER)),
        FAR,
        NEAR,
        &error(OTHER_KNOWN, GUEST, &datagram(GUEST, OTHER_KNOWN)),
    );
    // About nothing of this network: the error itself goes on.
    let foreign = datagram("2001:db8:5::1", "2001:db8:6::1");
    goes(
        &net,
        &error(REMOTE, KNOWN, &foreign),
        0,
        NEAR,
        &error(REMOTE, GUEST, &foreign),
    );
    let short = &datagram(KNOWN, REMOTE).build()[..39];
    let ends = (v6(REMOTE).into(), v6(KNOWN).into());
    let error = icmp_error(ends.0, ends.1, (3, 0), [0; 4], short);
    becomes(&net, &error, 0, Next::Leave(Reason::ErrorUnusable));
}

#[test]
fn what_is_not_for_the_world_is_left_to_the_rest() {
    let mut net = Net::new();
    // No prefix of theirs is translated.
    becomes(&net, &datagram("fd02::1", REMOTE), NEAR, Next::Start);
    becomes(&net, &datagram(REMOTE, "2001:db8:2::2"), 0, Next::Start);
    // The host's, and between two inside networks.
    becomes(&net, &datagram(REMOTE, "2001:db8:1::2"), 0, Next::Resume);
    becomes(&net, &datagram(GUEST, OTHER), NEAR, Next::Resume);
    becomes(&net, &datagram("fe80::1", KNOWN), 0, Next::Resume);
    net.outward = Fate::Local;
    becomes(&net, &datagram(GUEST, REMOTE), NEAR, Next::Resume);
}

#[test]
fn what_may_not_go_does_not() {
    let leaves = |net: &Net, from: &str, to: &str, device, reason| {
        becomes(net, &datagram(from, to), device, Next::Leave(reason));
    };
    let mut net = Net::new();
    // The other device's guest, nobody's network, and the host itself.
    for source in [OTHER, "fd01:203:405:9::1", "fd01:203:405:1::1"] {
        leaves(&net, source, REMOTE, NEAR, Reason::SpoofedSource);
    }
    for source in [OTHER, "fd01:203:405:9::1", "::1", "ff02::1"] {
        leaves(&net, source, KNOWN, 0, Reason::SpoofedSource);
    }
    leaves(&net, GUEST, "ff0e::1", NEAR, Reason::NotUnicast);
    for nobody in [
        "2001:db8:1:ffff::1",
        "2001:db8:1:1234::1",
        // The host's address inside.
        "2001:db8:1:d550::1",
    ] {
        leaves(&net, REMOTE, nobody, 0, Reason::PrefixUntranslatable);
    }
    net.settings.flags = setting_flags::ISOLATE | setting_flags::DENY;
    leaves(&net, GUEST, OTHER_KNOWN, NEAR, Reason::GuestIsolated);
    net.denied = Some(v6(REMOTE).into());
    leaves(&net, GUEST, REMOTE, NEAR, Reason::DeniedDestination);
    leaves(&net, REMOTE, KNOWN, 0, Reason::Filtered);
    net.settings.flags = 0;
    net.inward = Fate::Disabled;
    leaves(&net, REMOTE, KNOWN, 0, Reason::ForwardingDisabled);
}

#[test]
fn hops_and_lengths_are_looked_at() {
    let mut net = Net::new();
    for (from, to, device) in [
        (GUEST, REMOTE, NEAR),
        (REMOTE, KNOWN, 0),
        (GUEST, OTHER_KNOWN, NEAR),
    ] {
        let last = datagram(from, to).ttl(1);
        becomes(&net, &last, device, Next::Leave(Reason::TimeToLiveExceeded));
        net.mtu = 1400;
        let fits = datagram(from, to).payload(&[0; 1400 - 48]);
        let (fate, ..) = net.decide(&fits, device);
        assert_eq!(fate, Next::Leave(Reason::PrefixTranslated));
        let long = datagram(from, to).payload(&[0; 1401 - 48]);
        let (fate, _, plan) = net.decide(&long, device);
        assert_eq!(fate, Next::Leave(Reason::FragmentationNeeded));
        assert_eq!(plan.mtu, 1400);
    }
}

#[test]
fn a_subnet_of_ones_only_has_no_counterpart() {
    let mut net = Net::new();
    let device = &mut net.devices[1].1;
    device.address = v6("fd01:203:405:ffff::1").into();
    device.network = device.address;
    let guest = "fd01:203:405:ffff::7";
    becomes(
        &net,
        &datagram(guest, REMOTE),
        NEAR,
        Next::Leave(Reason::PrefixUntranslatable),
    );
}

/// Who stands in for whom.
struct Known {
    secret: u32,
    stand_ins: RefCell<Vec<(Be32, &'static StandIn)>>,
    /// What becomes of a stand-in among the guests of IPv4.
    entry: Entry,
}

impl Known {
    const fn with_secret(secret: u32) -> Self {
        Self {
            secret,
            stand_ins: RefCell::new(Vec::new()),
            entry: Entry::Done,
        }
    }

    fn stand_in_of(&self, guest: &str) -> Result<Be32, Reason> {
        let packet = Packet {
            source: v6(guest).into(),
            destination: v6("64:ff9b::192.0.1.1").into(),
            ..Packet::default()
        };
        nat64::to_ipv4(&packet, NonZeroU32::new(NEAR), &Net::new(), self).map(|(source, _)| source)
    }
}

impl StandIns for Known {
    fn prefix(&self) -> Option<Prefix> {
        Prefix::new(v6("64:ff9b::").into(), 96).ok()
    }

    fn secret(&self) -> u32 {
        self.secret
    }

    fn stand_in(&self, address: Be32) -> Option<&StandIn> {
        let known = self.stand_ins.borrow();
        let found = known.iter().find(|(there, _)| *there == address);
        found.map(|(_, guest)| *guest)
    }

    fn insert_stand_in(&self, address: Be32, guest: &StandIn) -> Insert {
        if self.stand_in(address).is_some() {
            return Insert::Exists;
        }
        let guest = Box::leak(Box::new(*guest));
        self.stand_ins.borrow_mut().push((address, guest));
        Insert::Done
    }

    fn enter_guest(&self, _address: Be32, _device: u32) -> Entry {
        self.entry
    }
}

#[test]
fn a_guest_keeps_its_stand_in_when_a_better_one_becomes_free() {
    let known = Known::with_secret(1);
    let first = known.stand_in_of(GUEST).unwrap();
    // Somebody else had that one, and goes.
    let known = Known::with_secret(1);
    let other = StandIn {
        address: v6(OTHER).into(),
        device: FAR,
    };
    assert_eq!(known.insert_stand_in(first, &other), Insert::Done);
    let second = known.stand_in_of(GUEST).unwrap();
    assert_ne!(second, first);
    known.stand_ins.borrow_mut().remove(0);
    assert_eq!(known.stand_in_of(GUEST), Ok(second));
    for stand_in in [first, second] {
        assert!(nat64::is_stand_in(stand_in));
    }
}

#[test]
fn there_are_no_more_stand_ins_than_guests_of_ipv4() {
    let mut known = Known::with_secret(1);
    let first = known.stand_in_of(GUEST).unwrap();
    for (entry, reason) in [
        (Entry::DeviceLimit, Reason::DeviceGuestLimit),
        (Entry::Full, Reason::GuestTableFull),
    ] {
        known.entry = entry;
        assert_eq!(known.stand_in_of(OTHER_OF_DEVICE), Err(reason));
        assert_eq!(known.stand_ins.borrow().len(), 1);
        // One that is there stays.
        assert_eq!(known.stand_in_of(GUEST), Ok(first));
    }
}

/// Otherwise a guest with a network full of addresses could take those of another.
#[test]
fn which_stand_in_a_guest_gets_is_not_to_be_known() {
    let chosen: Vec<_> = (0..64)
        .map(|secret| Known::with_secret(secret).stand_in_of(GUEST).unwrap())
        .collect();
    for (place, stand_in) in chosen.iter().enumerate() {
        assert!(!chosen[..place].contains(stand_in), "{stand_in:?}");
    }
    let known = Known::with_secret(7);
    let neighbours = (10..74).map(|host| format!("fd01:203:405:1::{host:x}"));
    let stand_ins: Vec<_> = neighbours
        .map(|guest| known.stand_in_of(&guest).unwrap())
        .collect();
    for (place, stand_in) in stand_ins.iter().enumerate() {
        assert!(!stand_ins[..place].contains(stand_in), "{stand_in:?}");
    }
}
