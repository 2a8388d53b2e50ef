//! What the datapath is told: of the configuration, and of the network around it. Owns what is written
//! into those tables, not when.

use ipnet::IpNet;
use tapnat_common::{
    abi::{self, ABI_VERSION, MAX_OUTSIDE_ADDRESSES, Settings, role, setting_flags},
    net::Be32,
    ports::Reserved,
};

use crate::{
    config::{Config, Firewall},
    family::IpFamily,
    host::netlink::{Link, LinkLayer},
    ports::PortSet,
    preflight::Plan,
    statics::Ground,
    uplink_hook::Chosen,
};

/// What the datapath was told of the network, of one IP version, when it was last looked at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Surroundings<A = Be32> {
    pub devices: Vec<(u32, abi::Device<A>)>,
    pub outside: Vec<A>,
}

impl<A: IpFamily> Surroundings<A> {
    pub fn ground(self) -> Ground<A> {
        Ground {
            devices: self.devices,
            outside: self.outside,
        }
    }
}

pub(super) fn reserved(withheld: &PortSet) -> Reserved {
    let mut reserved = Reserved::default();
    for port in withheld.iter() {
        reserved.reserve(port);
    }
    reserved
}

/// What the datapath is told of the configuration. `left` is what it was told before.
pub(super) fn settings<A: IpFamily>(
    config: &Config,
    outside: &[A],
    left: &Settings<A>,
) -> Settings<A> {
    let mut settings = Settings {
        abi_version: ABI_VERSION,
        flags: flags::<A>(config) | left.flags & kept_flags(config),
        clamp_mss: config.clamp_mss.unwrap_or(0),
        confirm_after: config.timeouts.confirm_after(),
        timeouts: config.timeouts,
        guest_max_sessions: config.guest_max_sessions.into(),
        guest_new_sessions: config.guest_new_sessions.map_or(0, Into::into),
        guest_max_ports: config.guest_max_ports.into(),
        generation: left.generation.wrapping_add(1),
        filtering_tcp: config.filtering.tcp as u8,
        filtering_udp: config.filtering.udp as u8,
        mapping_tcp: config.mapping.tcp as u8,
        mapping_udp: config.mapping.udp as u8,
        ..Settings::default()
    };
    set_outside(&mut settings, outside);
    settings
}

/// What stays as it is, whatever the configuration says.
pub(super) fn kept_flags(config: &Config) -> u32 {
    let always = setting_flags::STATIC_ADDRESSES | Chosen::FLAGS;
    match config.firewall {
        Firewall::Bypass => always,
        Firewall::Ask => always | setting_flags::FIREWALL_KNOWS,
    }
}

pub(super) fn flags<A: IpFamily>(config: &Config) -> u32 {
    let has_own = |nets: &[IpNet]| nets.iter().any(|net| A::from_net(*net).is_some());
    [
        (config.inbound_refresh, setting_flags::INBOUND_REFRESH),
        (config.pass_unsolicited, setting_flags::PASS_UNSOLICITED),
        (has_own(&config.deny), setting_flags::DENY),
        (has_own(&config.untranslated), setting_flags::UNTRANSLATED),
        (config.deny_host, setting_flags::DENY_HOST),
        (config.isolate, setting_flags::ISOLATE),
        (config.route_guests, setting_flags::ROUTE_GUESTS),
        (config.roaming, setting_flags::ROAMING),
        (config.count, setting_flags::COUNTED),
        (
            config.firewall == Firewall::Ask,
            setting_flags::ASK_FIREWALL,
        ),
    ]
    .into_iter()
    .filter_map(|(is_set, flag)| is_set.then_some(flag))
    .sum()
}

pub(super) fn set_outside<A: IpFamily>(settings: &mut Settings<A>, outside: &[A]) {
    settings.outside = [A::UNSPECIFIED; MAX_OUTSIDE_ADDRESSES];
    settings.outside_count = 0;
    for (place, address) in settings.outside.iter_mut().zip(outside) {
        *place = *address;
        settings.outside_count += 1;
    }
}

/// What the datapath has to know of the network as `links` shows it, of one IP version.
pub(super) fn surroundings<A: IpFamily>(
    config: &Config,
    plan: &Plan,
    links: &[Link],
) -> Surroundings<A> {
    let given = config.outside_addresses.iter();
    let mut outside: Vec<_> = given.filter_map(|it| A::from_ip(*it)).collect();
    if outside.is_empty() {
        let uplink = links.iter().find(|link| link.index == plan.uplink.index);
        outside.extend(uplink.and_then(|it| A::outside(it, &plan.outside_addresses)));
    }
    Surroundings {
        devices: devices(plan, links, outside.first().copied()),
        outside,
    }
}

/// The devices as the datapath has to know them, of one IP version. `outside` is an address that
/// stands for the guests in the world.
pub(super) fn devices<A: IpFamily>(
    plan: &Plan,
    links: &[Link],
    outside: Option<A>,
) -> Vec<(u32, abi::Device<A>)> {
    let mut devices: Vec<_> = plan
        .insides
        .iter()
        .filter_map(|inside| {
            let link = inside.link_in(links)?;
            // Without a network no address is in it.
            let none = (A::UNSPECIFIED, A::BITS);
            let (address, _) = A::of(&inside.networks).map_or(none, A::host);
            let network = A::guests(&inside.networks).map_or(none, A::parts);
            Some((link.index, device(link, address, network, role::INSIDE)))
        })
        .collect();
    if let Some(uplink) = links.iter().find(|link| link.index == plan.uplink.index) {
        let (address, length) =
            A::primary(uplink).map_or_else(|| (outside.unwrap_or_default(), A::BITS), A::host);
        let uplink_device = device(uplink, address, (address, length), role::UPLINK);
        devices.push((uplink.index, uplink_device));
    }
    devices
}

/// Whether any guest has IPv6.
pub(super) fn has_ipv6(config: &Config, plan: &Plan) -> bool {
    let is_there = plan
        .insides
        .iter()
        .any(|inside| inside.networks.ipv6.is_some());
    is_there || config.speaks_ipv6()
}

pub(super) fn device<A: IpFamily>(
    link: &Link,
    address: A,
    (network, prefix_length): (A, u8),
    role: u8,
) -> abi::Device<A> {
    abi::Device {
        address,
        network,
        mask: A::mask(prefix_length),
        mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
        role,
        ethernet: u8::from(link.layer == LinkLayer::Ethernet),
    }
}
