//! An instance as a whole: what it was told to do, and how far it has got.

use std::{cmp::Reverse, net::IpAddr, time::Duration};

use ipnet::{IpNet, Ipv6Net};
use serde::{Serialize, Serializer, ser::SerializeStruct as _};
use tapnat_common::{
    abi::{Counter, Filtering, MappingMode, Settings, setting_flags},
    embed::Prefix,
    net::{Be128, protocol},
    nptv6::PrefixPair,
    time::Ticks,
    verdict::Reason,
};

use super::{DeviceView, FamiliesView, GuestView, Label, ReasonView, SCHEMA, TablesView, label};
use crate::{
    config::{Firewall, PerProtocol},
    uplink_hook::Chosen,
};

/// An instance as a whole.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    pub schema: u32,
    pub instance: String,
    /// The process of `tapnat run`; null when none runs and the datapath works by itself.
    pub process: Option<i32>,
    pub abi_version: u32,
    /// Of IPv4, then of IPv6.
    pub outside_addresses: Vec<IpAddr>,
    pub devices: Vec<DeviceView>,
    pub timeouts: TimeoutsView,
    pub filtering: PerProtocol<Filtering>,
    pub mapping: PerProtocol<MappingMode>,
    /// Whether packets from outside keep sessions other than TCP alive.
    pub inbound_refresh: bool,
    /// Whether every packet is counted, in `reasons` and in the sessions. If not, `translated` counts
    /// only what the quick path for steady sessions did not take.
    pub counted: bool,
    pub uplink_hook: UplinkHookView,
    /// Sessions that one guest may have.
    pub guest_max_sessions: u32,
    /// Outside ports that one guest may hold.
    pub guest_max_ports: u32,
    /// Sessions that one guest may begin in a second; null for no limit.
    pub guest_new_sessions: Option<u32>,
    pub policy: PolicyView,
    /// Behind which guests with IPv6 reach IPv4; null without NAT64.
    pub nat64: Option<Ipv6Net>,
    /// Prefixes of IPv6 that are translated into each other, without sessions.
    pub prefixes: Vec<PrefixPairView>,
    /// Of both families together.
    pub tables: TablesView,
    pub families: FamiliesView,
    /// Every guest that was seen, those with the most refusals first, then those with the most
    /// sessions.
    pub guests: Vec<GuestView>,
    pub reasons: Vec<ReasonView>,
}

/// Where the world's packets meet the first program.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct UplinkHookView {
    /// `tc` or `xdp`.
    pub hook: &'static str,
    pub reason: &'static str,
}

/// What the operator denies to guests, and where they go as themselves.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of its own"
)]
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct PolicyView {
    /// Prefixes that they must not send to.
    pub deny: Vec<IpNet>,
    /// Prefixes that they reach under their own addresses.
    pub untranslated: Vec<IpNet>,
    /// Whether they must not reach the host.
    pub deny_host: bool,
    /// Whether they must not reach each other over outside addresses either.
    pub isolate: bool,
    /// Whether guests reach each other under their own addresses, through the host.
    pub route_guests: bool,
    /// Whether their addresses may move to other link addresses while they have sessions.
    pub roaming: bool,
    /// What the host's firewall has to do with their packets.
    #[serde(serialize_with = "label::by_name")]
    pub firewall: Firewall,
}

/// Two prefixes that are translated into each other (RFC 6296).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct PrefixPairView {
    /// Of guests.
    pub internal: Ipv6Net,
    /// By which the world knows them.
    pub external: Ipv6Net,
}

fn pair(pair: PrefixPair) -> Option<PrefixPairView> {
    let net = |(address, length): (Be128, u8)| Ipv6Net::new(address.into(), length).ok();
    Some(PrefixPairView {
        internal: net(pair.internal())?,
        external: net(pair.external())?,
    })
}

/// Timeouts in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TimeoutsView {
    pub udp: f64,
    pub tcp_established: f64,
    pub tcp_opening: f64,
    pub tcp_closing: f64,
    pub icmp: f64,
    pub other: f64,
    pub port_rest: f64,
    pub fragment: f64,
}

impl<T: Label> Serialize for PerProtocol<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut both = serializer.serialize_struct("PerProtocol", 2)?;
        both.serialize_field("tcp", self.tcp.label())?;
        both.serialize_field("udp", self.udp.label())?;
        both.end()
    }
}

/// What a [`Status`] is made of, as read.
#[derive(Clone, Debug)]
pub struct StatusSource {
    pub instance: String,
    pub process: Option<i32>,
    /// What is the same for IPv6 is taken from here.
    pub settings: Settings,
    pub outside_addresses: Vec<IpAddr>,
    pub devices: Vec<DeviceView>,
    pub denied: Vec<IpNet>,
    pub untranslated: Vec<IpNet>,
    pub nat64: Option<Prefix>,
    pub prefixes: Vec<PrefixPair>,
    pub families: FamiliesView,
    pub guests: Vec<GuestView>,
    pub counters: Vec<(Reason, Counter)>,
}

impl From<StatusSource> for Status {
    fn from(mut source: StatusSource) -> Self {
        source
            .guests
            .sort_by_key(|guest| (Reverse((guest.refused, guest.sessions)), guest.address));
        let settings = source.settings;
        let timeouts = settings.timeouts;
        let (tcp, udp) = (protocol::TCP, protocol::UDP);
        let hook = Chosen::from_flags(settings.flags);
        Self {
            schema: SCHEMA,
            instance: source.instance,
            process: source.process,
            abi_version: settings.abi_version,
            outside_addresses: source.outside_addresses,
            devices: source.devices,
            timeouts: TimeoutsView {
                udp: exact_seconds(timeouts.udp),
                tcp_established: exact_seconds(timeouts.tcp_established),
                tcp_opening: exact_seconds(timeouts.tcp_opening),
                tcp_closing: exact_seconds(timeouts.tcp_closing),
                icmp: exact_seconds(timeouts.icmp),
                other: exact_seconds(timeouts.other),
                port_rest: exact_seconds(timeouts.port_rest),
                fragment: exact_seconds(timeouts.fragment),
            },
            filtering: PerProtocol {
                tcp: settings.filtering(tcp),
                udp: settings.filtering(udp),
            },
            mapping: PerProtocol {
                tcp: settings.mapping(tcp),
                udp: settings.mapping(udp),
            },
            inbound_refresh: settings.flags & setting_flags::INBOUND_REFRESH != 0,
            counted: settings.flags & setting_flags::COUNTED != 0,
            uplink_hook: UplinkHookView {
                hook: hook.label(),
                reason: hook.reason(),
            },
            guest_max_sessions: settings.guest_max_sessions,
            guest_max_ports: settings.guest_max_ports,
            guest_new_sessions: Some(settings.guest_new_sessions).filter(|most| *most != 0),
            policy: PolicyView {
                deny: source.denied,
                untranslated: source.untranslated,
                deny_host: settings.flags & setting_flags::DENY_HOST != 0,
                isolate: settings.flags & setting_flags::ISOLATE != 0,
                route_guests: settings.flags & setting_flags::ROUTE_GUESTS != 0,
                roaming: settings.flags & setting_flags::ROAMING != 0,
                firewall: if settings.flags & setting_flags::ASK_FIREWALL == 0 {
                    Firewall::Bypass
                } else {
                    Firewall::Ask
                },
            },
            nat64: source
                .nat64
                .and_then(|it| Ipv6Net::new(it.address().into(), it.length()).ok()),
            prefixes: source.prefixes.into_iter().filter_map(pair).collect(),
            tables: source.families.sum(),
            families: source.families,
            guests: source.guests,
            reasons: source
                .counters
                .into_iter()
                .map(|(reason, counter)| ReasonView::new(reason, counter))
                .collect(),
        }
    }
}

/// To a hundredth: a tick is longer than a millisecond, and was rounded up.
fn exact_seconds(ticks: Ticks) -> f64 {
    Duration::from_millis(ticks.milliseconds() / 10 * 10).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use serde_json::json;
    use tapnat_common::{
        abi::{Device, role},
        embed::WELL_KNOWN,
        net::{Address as _, Be32},
    };

    use super::*;
    use crate::{
        config::parse_prefix_pair,
        view::{
            UsageView,
            tests::{address, settings},
        },
    };

    const TAP: u32 = 7;

    #[test]
    fn a_status_says_what_was_set() {
        let mut settings = settings();
        settings.filtering_tcp = 1;
        settings.mapping_udp = 1;
        let usage = UsageView {
            used: 1,
            capacity: 2,
        };
        let tables = TablesView {
            sessions: usage,
            mappings: usage,
            guests: usage,
        };
        let status = Status::from(StatusSource {
            instance: "default".to_owned(),
            process: None,
            settings,
            outside_addresses: ["192.0.2.10", "2001:db8::10"]
                .map(|it| it.parse().unwrap())
                .into(),
            devices: vec![DeviceView::new(
                Some("tap0".to_owned()),
                TAP,
                &Device {
                    address: address("10.0.0.1"),
                    network: address("10.0.0.0"),
                    mask: Be32::mask(24),
                    mtu: 1500,
                    role: role::INSIDE,
                    ethernet: 1,
                },
                Some(&Device {
                    address: "fd00:7a70::1".parse::<Ipv6Addr>().unwrap().into(),
                    network: "fd00:7a70::".parse::<Ipv6Addr>().unwrap().into(),
                    mask: Be128::mask(64),
                    ..Device::default()
                }),
            )],
            denied: Vec::new(),
            untranslated: Vec::new(),
            nat64: Some(WELL_KNOWN),
            prefixes: vec![parse_prefix_pair("fd00:1::/48=2001:db8:1::/48").unwrap()],
            families: FamiliesView {
                ipv4: tables,
                ipv6: Some(tables),
            },
            guests: Vec::new(),
            counters: vec![(
                Reason::Truncated,
                Counter {
                    packets: 5,
                    bytes: 300,
                },
            )],
        });
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["schema"], SCHEMA);
        assert_eq!(
            json["outside_addresses"],
            json!(["192.0.2.10", "2001:db8::10"])
        );
        let device = &status.devices[0];
        assert_eq!(
            (device.prefix_length, device.ipv6_prefix_length),
            (Some(24), Some(64))
        );
        let networks: Vec<_> = device.written().map(|it| it.to_string()).collect();
        assert_eq!(networks, ["10.0.0.1/24", "fd00:7a70::1/64"]);
        assert!(device.has_in_network("fd00:7a70::10".parse().unwrap()));
        assert!(!device.has_in_network("fd00:7a71::10".parse().unwrap()));
        assert_eq!(
            json["tables"]["sessions"],
            json!({"used": 2, "capacity": 4})
        );
        assert_eq!(
            json["families"]["ipv6"]["guests"],
            json!({"used": 1, "capacity": 2})
        );
        assert_eq!(json["timeouts"]["tcp_established"], json!(7440.0));
        assert_eq!(
            json["filtering"],
            json!({"tcp": "address-dependent", "udp": "endpoint-independent"})
        );
        assert_eq!(json["mapping"]["udp"], "address-and-port-dependent");
        assert_eq!(json["nat64"], "64:ff9b::/96");
        assert_eq!(
            json["prefixes"],
            json!([{"internal": "fd00:1::/48", "external": "2001:db8:1::/48"}])
        );
        assert_eq!(json["counted"], json!(false));
        assert_eq!(json["guest_new_sessions"], json!(null));
        assert_eq!(
            json["reasons"],
            json!([{"reason": "truncated", "outcome": "drop", "packets": 5, "bytes": 300}])
        );
    }
}
