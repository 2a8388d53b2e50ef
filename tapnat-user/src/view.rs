//! What the tables say, for people and for programs: plain values with names and units, made from
//! the tables' entries without a kernel. Their serialisation is the JSON that `--json` prints; a
//! field is never renamed or given another meaning without a new [`SCHEMA`].

use std::{
    borrow::Cow,
    cmp::Reverse,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};
use tapnat_common::{
    abi::{
        Counter, Device, EndpointKey, FlowKey, Guest, Mapping, Session, Settings, mapping_flags,
        role, session_flags, setting_flags,
    },
    embed::Prefix,
    nat::{
        STAMP_AFTER,
        session::{Half, last_kept, state, timeout},
    },
    net::{Address as _, Be16, Be32, Be128, protocol},
    nptv6::PrefixPair,
    time::{Instant, Ticks},
    verdict::{Outcome, Reason},
};

use crate::{
    config::{Written, filtering_label, mapping_label},
    family::IpFamily,
    forwards::{Share, Standing},
    tables::Usage,
    uplink_hook::Chosen,
};

/// The version of everything that `--json` prints.
pub const SCHEMA: u32 = 1;

/// An address and a port. For ICMP queries the port of the side that asked is the query's
/// identifier and that of the other side 0; protocols without ports have 0.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Deserialize, Serialize)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: u16,
}

impl Endpoint {
    pub(crate) fn new(address: impl Into<IpAddr>, port: Be16) -> Self {
        Self {
            address: address.into().to_canonical(),
            port: port.get(),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(formatter)
    }
}

/// A number for each direction.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Directions {
    /// From the guest.
    pub outbound: u64,
    /// To the guest.
    pub inbound: u64,
}

impl Directions {
    #[must_use]
    pub fn total(self) -> u64 {
        self.outbound.saturating_add(self.inbound)
    }

    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            outbound: self.outbound.saturating_add(other.outbound),
            inbound: self.inbound.saturating_add(other.inbound),
        }
    }
}

/// A session, seen from the guest that it belongs to. One between two guests over an outside
/// address is shown from the side of the guest that began it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Flow {
    pub protocol: Cow<'static, str>,
    /// The guest.
    pub inside: Endpoint,
    /// What the world sees in its place.
    pub outside: Endpoint,
    /// Whom the guest talks to.
    pub remote: Endpoint,
    /// `opening`, `established`, `closing` or `reset` for TCP, else `one-way` or `two-way`.
    pub state: &'static str,
    /// Since the last packet of either direction, to within a second.
    pub idle_seconds: u64,
    /// Until the session ends if no packet comes.
    pub expires_in_seconds: u64,
    /// Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<Directions>,
    /// Of IP packets, headers included. Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Directions>,
}

impl Flow {
    /// The session that this half belongs to, at `now`. None when the session is shown from its
    /// other half, and when it is past its time and counts as absent.
    #[must_use]
    pub fn from_half<A: IpFamily>(
        key: &FlowKey<A>,
        half: &Session<A>,
        twin: Option<&Session<A>>,
        settings: &Settings<A>,
        now: Instant,
    ) -> Option<Self> {
        key.arrival.device()?;
        let between_guests = half.flags & session_flags::TO_INSIDE != 0;
        if between_guests && half.flags & session_flags::INITIATOR == 0 {
            return None;
        }
        let number = key.arrival.protocol();
        let one = Half::from(half);
        let other = twin.map_or(one, Half::from);
        let state = state(number, one, other);
        let inbound_refresh = settings.flags & setting_flags::INBOUND_REFRESH != 0;
        let kept = last_kept(number, one, other, inbound_refresh);
        let expires_at = kept
            .after(timeout(number, state, &settings.timeouts))
            .after(STAMP_AFTER);
        if !now.is_before(expires_at) {
            return None;
        }
        let twin = twin.copied().unwrap_or_default();
        let counted = settings.flags & setting_flags::COUNTED != 0;
        Some(Self {
            protocol: protocol_label(number),
            inside: Endpoint::new(key.source, key.source_port),
            outside: Endpoint::new(half.source, half.source_port),
            remote: Endpoint::new(key.destination, key.destination_port),
            state: state.label(),
            idle_seconds: seconds(now.since(one.last_seen.later_of(other.last_seen))),
            expires_in_seconds: seconds_left(expires_at.since(now), STAMP_AFTER),
            packets: counted.then_some(Directions {
                outbound: half.packets,
                inbound: twin.packets,
            }),
            bytes: counted.then_some(Directions {
                outbound: half.bytes,
                inbound: twin.bytes,
            }),
        })
    }

    /// The same session, of the guest with this address.
    #[must_use]
    pub fn of_guest(mut self, address: IpAddr) -> Self {
        self.inside.address = address;
        self
    }
}

/// An endpoint-independent mapping.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct MappingView {
    pub protocol: String,
    pub inside: Endpoint,
    pub outside: Endpoint,
    /// `dynamic`, or `static` for one that the operator made.
    pub kind: &'static str,
    /// Sessions that stand on it.
    pub sessions: u32,
    /// Never less than of the sessions that stand on it; null for one that stays.
    pub expires_in_seconds: Option<u64>,
}

impl MappingView {
    /// The mapping with this outside endpoint, at `now`. None when it is past its time.
    #[must_use]
    pub fn new<A: IpFamily>(
        outside: &EndpointKey<A>,
        mapping: &Mapping<A>,
        now: Instant,
    ) -> Option<Self> {
        let stays = mapping.flags & mapping_flags::STATIC != 0;
        if !stays && !now.is_before(mapping.expires_at) {
            return None;
        }
        Some(Self {
            protocol: protocol_label(outside.protocol).into_owned(),
            inside: Endpoint::new(mapping.inside.address, mapping.inside.port),
            outside: Endpoint::new(outside.address, outside.port),
            kind: if stays { "static" } else { "dynamic" },
            sessions: mapping.sessions,
            expires_in_seconds: (!stays)
                .then(|| seconds_left(mapping.expires_at.since(now), STAMP_AFTER)),
        })
    }

    /// The same mapping, of the guest with this address.
    #[must_use]
    pub fn of_guest(mut self, address: IpAddr) -> Self {
        self.inside.address = address;
        self
    }
}

/// Who made a static mapping: the configuration file or a command.
fn made_by(configured: bool) -> &'static str {
    if configured { "config" } else { "command" }
}

/// Ports of an outside address that lead to a guest.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ForwardView {
    pub protocol: String,
    /// With the first port.
    pub outside: Endpoint,
    /// With the first port.
    pub inside: Endpoint,
    /// How many ports, in the same order on both sides.
    pub ports: u32,
    /// Who may come in.
    pub from: IpNet,
    /// `config` or `command`.
    pub made_by: &'static str,
    /// Whether it was made for this outside address; else it moves with the uplink's.
    pub address_given: bool,
    /// Sessions that stand on it, started from either side.
    pub sessions: u32,
}

impl From<&Standing> for ForwardView {
    fn from(standing: &Standing) -> Self {
        let forward = &standing.forward;
        let (protocol, outside, inside, ports) = match forward.share {
            Share::Ports {
                protocol,
                outside,
                inside,
            } => (
                protocol.to_string(),
                outside.first,
                inside.first,
                outside.count(),
            ),
            Share::Everything => (protocol_label(0).into_owned(), 0, 0, 1),
        };
        Self {
            protocol,
            outside: Endpoint {
                address: standing.outside_address,
                port: outside,
            },
            inside: Endpoint {
                address: forward.inside_address,
                port: inside,
            },
            ports,
            from: forward.from,
            made_by: made_by(standing.configured),
            address_given: forward.outside_address.is_some(),
            sessions: standing.sessions,
        }
    }
}

/// An outside address that is one guest's alone.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct StaticView {
    pub outside: IpAddr,
    pub inside: IpAddr,
    /// Who may come in.
    pub from: IpNet,
    /// `config` or `command`.
    pub made_by: &'static str,
}

impl From<&Standing> for StaticView {
    fn from(standing: &Standing) -> Self {
        Self {
            outside: standing.outside_address,
            inside: standing.forward.inside_address,
            from: standing.forward.from,
            made_by: made_by(standing.configured),
        }
    }
}

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
    pub filtering: Modes,
    pub mapping: Modes,
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
    /// What the host's firewall has to do with their packets: `bypass` or `ask`.
    pub firewall: &'static str,
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

/// [`DeviceView::role`].
const INSIDE: &str = "inside";
const UPLINK: &str = "uplink";
/// [`DeviceView::link_layer`].
const ETHERNET: &str = "ethernet";
const WITHOUT_LINK: &str = "none";

/// A device that the datapath works on.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct DeviceView {
    /// Null when this host does not know it by a name.
    pub name: Option<String>,
    pub index: u32,
    /// `inside` or `uplink`.
    pub role: &'static str,
    /// The host's IPv4 address on it; null if it has none.
    pub address: Option<Ipv4Addr>,
    /// Of the network that guests have their addresses from.
    pub prefix_length: Option<u8>,
    /// The one guest's address where it is in no network with the host's; null elsewhere.
    pub peer: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub ipv6_address: Option<Ipv6Addr>,
    pub ipv6_prefix_length: Option<u8>,
    /// Bytes.
    pub mtu: u16,
    /// `ethernet`, or `none` where packets begin with the IP header.
    pub link_layer: &'static str,
}

impl DeviceView {
    /// The host's addresses on it, with the lengths of the networks that guests have theirs from.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> + use<> {
        let ipv4 = self.address.map(IpAddr::V4).zip(self.prefix_length);
        let ipv6 = self.ipv6_address.map(IpAddr::V6);
        let ipv6 = ipv6.zip(self.ipv6_prefix_length);
        let networks = [ipv4, ipv6].into_iter().flatten();
        networks.filter_map(|(address, length)| IpNet::new(address, length).ok())
    }

    /// The same as `--inside` takes them.
    pub fn written(&self) -> impl Iterator<Item = Written> + use<> {
        let peer = self.peer;
        self.networks()
            .map(move |it| Written(it, peer.filter(|_| it.addr().is_ipv4())))
    }

    /// Whether the address is of one of its networks.
    #[must_use]
    pub fn has_in_network(&self, address: IpAddr) -> bool {
        self.written().any(|Written(network, peer)| match peer {
            Some(peer) => address == IpAddr::V4(peer),
            None => network.contains(&address),
        })
    }

    /// Whether guests are behind it.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.role == INSIDE
    }

    /// What the tables say of a device: those of IPv4, which has them all, and of IPv6.
    #[must_use]
    pub fn new(
        name: Option<String>,
        index: u32,
        device: &Device,
        ipv6: Option<&Device<Be128>>,
    ) -> Self {
        let ipv4 = (device.address != Be32::UNSPECIFIED).then_some(device);
        let ipv6 = ipv6.filter(|it| it.address != Be128::UNSPECIFIED);
        Self {
            name,
            index,
            role: role_label(device.role),
            address: ipv4.map(|it| it.address.into()),
            prefix_length: ipv4.map(|it| prefix_length(&it.mask.bytes())),
            peer: ipv4
                .filter(|it| !it.contains(it.address))
                .map(|it| it.network.into()),
            ipv6_address: ipv6.map(|it| it.address.into()),
            ipv6_prefix_length: ipv6.map(|it| prefix_length(&it.mask.bytes())),
            mtu: device.mtu,
            link_layer: if device.ethernet == 0 {
                WITHOUT_LINK
            } else {
                ETHERNET
            },
        }
    }

    /// Whether frames have an Ethernet header.
    #[must_use]
    pub fn is_ethernet(&self) -> bool {
        self.link_layer == ETHERNET
    }
}

fn prefix_length(mask: &[u8]) -> u8 {
    let ones: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    // There are 128 at most.
    u8::try_from(ones).unwrap_or(u8::MAX)
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

/// A behaviour for TCP, and for everything else.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Modes {
    pub tcp: &'static str,
    pub udp: &'static str,
}

/// How full the tables are.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct TablesView {
    pub sessions: UsageView,
    pub mappings: UsageView,
    pub guests: UsageView,
}

impl TablesView {
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            sessions: self.sessions.plus(other.sessions),
            mappings: self.mappings.plus(other.mappings),
            guests: self.guests.plus(other.guests),
        }
    }
}

/// How full the tables of each family are.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct FamiliesView {
    pub ipv4: TablesView,
    /// Null where IPv6 is not translated.
    pub ipv6: Option<TablesView>,
}

impl FamiliesView {
    /// Both together.
    #[must_use]
    pub fn sum(self) -> TablesView {
        self.ipv6.map_or(self.ipv4, |ipv6| self.ipv4.plus(ipv6))
    }

    /// Those that there are, with their names.
    pub fn named(self) -> impl Iterator<Item = (&'static str, TablesView)> {
        let ipv6 = self.ipv6.map(|it| ("ipv6", it));
        std::iter::once(("ipv4", self.ipv4)).chain(ipv6)
    }
}

/// How full one table is. What is past its time and not yet collected counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct UsageView {
    pub used: u64,
    pub capacity: u32,
}

impl UsageView {
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            used: self.used.saturating_add(other.used),
            capacity: self.capacity.saturating_add(other.capacity),
        }
    }
}

impl From<Usage> for UsageView {
    fn from(usage: Usage) -> Self {
        Self {
            used: usage.used,
            capacity: usage.capacity,
        }
    }
}

/// A guest, by its inside address.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct GuestView {
    pub address: IpAddr,
    /// Null where it is not known, as on devices without link addresses.
    pub link_address: Option<String>,
    /// Sessions now; what is over and not yet collected counts.
    pub sessions: u32,
    /// Outside ports that it holds, those that rest among them.
    pub ports: u32,
    /// New sessions that a limit refused.
    pub refused: u32,
    /// What stands for it in the tables of IPv4, where these are its sessions with IPv4 (NAT64), which
    /// are counted apart from those with IPv6.
    pub stand_in: Option<Ipv4Addr>,
}

impl GuestView {
    #[must_use]
    pub fn new(address: impl Into<IpAddr>, guest: &Guest) -> Self {
        let [_, _, link @ ..] = guest.link.to_be_bytes();
        let link = link.map(|byte| format!("{byte:02x}")).join(":");
        Self {
            address: address.into(),
            stand_in: None,
            link_address: (guest.link != 0).then_some(link),
            sessions: guest.sessions,
            ports: guest.ports,
            refused: guest.refused,
        }
    }

    /// The same entry, of the guest with this address if its own stands in for it.
    #[must_use]
    pub fn behind(mut self, guest: Option<IpAddr>) -> Self {
        if let (Some(guest), IpAddr::V4(address)) = (guest, self.address) {
            self.stand_in = Some(address);
            self.address = guest;
        }
        self
    }

    /// What it has in the tables.
    #[must_use]
    pub fn key(&self) -> IpAddr {
        self.stand_in.map_or(self.address, Into::into)
    }

    /// The address, and by which of its ways to the world this is where it has two.
    #[must_use]
    pub fn title(&self) -> String {
        match self.stand_in {
            Some(_) => format!("{} (NAT64)", self.address),
            None => self.address.to_string(),
        }
    }
}

/// How many packets left the datapath for one reason.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct ReasonView {
    pub reason: &'static str,
    /// `pass`, `drop`, `refuse` (dropped, and the sender told) or `forward`.
    pub outcome: &'static str,
    pub packets: u64,
    pub bytes: u64,
}

impl ReasonView {
    #[must_use]
    pub fn new(reason: Reason, counter: Counter) -> Self {
        Self {
            reason: reason.label(),
            outcome: outcome_label(reason.outcome()),
            packets: counter.packets,
            bytes: counter.bytes,
        }
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
            filtering: Modes {
                tcp: filtering_label(settings.filtering(tcp)),
                udp: filtering_label(settings.filtering(udp)),
            },
            mapping: Modes {
                tcp: mapping_label(settings.mapping(tcp)),
                udp: mapping_label(settings.mapping(udp)),
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
                    "bypass"
                } else {
                    "ask"
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

/// In place of a protocol, of a mapping that is of a whole address.
pub const WHOLE: &str = "all";

/// The names of IP protocols that have one here.
const PROTOCOLS: [(u8, &str); 9] = [
    // Of a mapping for all protocols.
    (0, WHOLE),
    (protocol::ICMP, "icmp"),
    (protocol::TCP, "tcp"),
    (protocol::UDP, "udp"),
    (protocol::GRE, "gre"),
    (protocol::ESP, "esp"),
    (protocol::ICMPV6, "icmpv6"),
    (protocol::SCTP, "sctp"),
    (protocol::UDP_LITE, "udp-lite"),
];

/// The name of what a device is to an instance.
#[must_use]
pub const fn role_label(number: u8) -> &'static str {
    if number == role::UPLINK {
        UPLINK
    } else {
        INSIDE
    }
}

/// The name of what becomes of a packet.
#[must_use]
pub const fn outcome_label(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "pass",
        Outcome::Ask => "ask",
        Outcome::Drop => "drop",
        Outcome::Refuse => "refuse",
        Outcome::Hold => "hold",
        Outcome::Fragment => "fragment",
        Outcome::Forward => "forward",
    }
}

/// The name of an IP protocol, or its number where it has no name here.
#[must_use]
pub fn protocol_label(number: u8) -> Cow<'static, str> {
    let known = PROTOCOLS.iter().find(|(known, _)| *known == number);
    match known {
        Some((_, name)) => Cow::Borrowed(name),
        None => Cow::Owned(number.to_string()),
    }
}

/// The number of an IP protocol by [its label](protocol_label), or by its number as text.
#[must_use]
pub fn protocol_number(label: &str) -> Option<u8> {
    let known = PROTOCOLS.iter().find(|(_, name)| *name == label);
    known
        .map(|(number, _)| *number)
        .or_else(|| label.parse().ok())
        .filter(|number| *number != 0)
}

fn seconds(ticks: Ticks) -> u64 {
    ticks.milliseconds() / 1000
}

/// Rounded up, and without the time by which the datapath's stamps may be late, which everything
/// lives on.
fn seconds_left(ticks: Ticks, late: Ticks) -> u64 {
    ticks
        .milliseconds()
        .saturating_sub(late.milliseconds())
        .div_ceil(1000)
}

/// To a hundredth: a tick is longer than a millisecond, and was rounded up.
fn exact_seconds(ticks: Ticks) -> f64 {
    Duration::from_millis(ticks.milliseconds() / 10 * 10).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tapnat_common::{
        abi::{ABI_VERSION, Arrival, NextHop, Timeouts, tcp_state},
        embed::WELL_KNOWN,
    };

    use super::*;
    use crate::config::parse_prefix_pair;

    const TAP: u32 = 7;

    fn settings() -> Settings {
        Settings {
            abi_version: ABI_VERSION,
            timeouts: Timeouts::default(),
            ..Settings::default()
        }
    }

    fn address(text: &str) -> Be32 {
        text.parse::<Ipv4Addr>().unwrap().into()
    }

    fn at(seconds: u32) -> Instant {
        Instant::default().after(Ticks::from_seconds(seconds))
    }

    /// The guest's half of a session to 198.51.100.7:443, last seen at second 1000, and its twin.
    fn session(protocol: u8) -> (FlowKey, Session, Session) {
        let key = FlowKey {
            source: address("10.0.0.2"),
            destination: address("198.51.100.7"),
            source_port: Be16::new(40000),
            destination_port: Be16::new(443),
            arrival: Arrival::inside(TAP.try_into().unwrap(), protocol),
        };
        let half = Session {
            source: address("192.0.2.10"),
            destination: key.destination,
            source_port: Be16::new(41000),
            destination_port: key.destination_port,
            last_seen: at(1000),
            tcp: tcp_state::STEADY,
            flags: session_flags::INITIATOR,
            ..Session::default()
        };
        let twin = Session {
            source: key.destination,
            destination: key.source,
            source_port: key.destination_port,
            destination_port: key.source_port,
            next_hop: NextHop {
                device: TAP,
                ..NextHop::default()
            },
            last_seen: at(1004),
            tcp: tcp_state::STEADY,
            flags: session_flags::TO_INSIDE,
            ..Session::default()
        };
        (key, half, twin)
    }

    #[test]
    fn a_flow_as_json() {
        let (key, mut half, mut twin) = session(protocol::TCP);
        (half.packets, half.bytes) = (3, 180);
        (twin.packets, twin.bytes) = (2, 3000);
        let counting = Settings {
            flags: setting_flags::COUNTED,
            ..settings()
        };
        let now = at(1010).after(Ticks::new(100));
        let flow = Flow::from_half(&key, &half, Some(&twin), &counting, now).unwrap();
        assert_eq!(
            serde_json::to_value(&flow).unwrap(),
            json!({
                "protocol": "tcp",
                "inside": {"address": "10.0.0.2", "port": 40000},
                "outside": {"address": "192.0.2.10", "port": 41000},
                "remote": {"address": "198.51.100.7", "port": 443},
                "state": "established",
                "idle_seconds": 6,
                "expires_in_seconds": 7434,
                "packets": {"outbound": 3, "inbound": 2},
                "bytes": {"outbound": 180, "inbound": 3000},
            })
        );
    }

    #[test]
    fn protocols_have_names_or_numbers() {
        for number in 1..=u8::MAX {
            assert_eq!(protocol_number(&protocol_label(number)), Some(number));
        }
        assert_eq!(protocol_number("6"), Some(protocol::TCP));
        for label in ["", "all", "0", "tpc", "256"] {
            assert_eq!(protocol_number(label), None, "{label}");
        }
    }

    #[test]
    fn without_counting_there_are_no_counts() {
        let (key, half, twin) = session(protocol::TCP);
        let flow = Flow::from_half(&key, &half, Some(&twin), &settings(), at(1010)).unwrap();
        let json = serde_json::to_value(&flow).unwrap();
        assert!(
            json.get("packets").is_none() && json.get("bytes").is_none(),
            "{json}"
        );
    }

    #[test]
    fn each_session_is_shown_once() {
        let (key, half, twin) = session(protocol::UDP);
        let twin_key = half.twin_key(&key);
        assert_eq!(twin_key.arrival.device(), None);
        assert!(Flow::from_half(&twin_key, &twin, Some(&half), &settings(), at(1010)).is_none());
        // Between guests both halves arrive on inside devices.
        let mut half = half;
        half.flags |= session_flags::TO_INSIDE;
        half.next_hop.device = TAP + 1;
        let twin_key = half.twin_key(&key);
        assert_eq!(twin_key.arrival.device().map(Into::into), Some(TAP + 1));
        assert!(Flow::from_half(&key, &half, Some(&twin), &settings(), at(1010)).is_some());
        assert!(Flow::from_half(&twin_key, &twin, Some(&half), &settings(), at(1010)).is_none());
    }

    #[test]
    fn what_is_past_its_time_is_not_shown() {
        let (key, half, mut twin) = session(protocol::UDP);
        let shown = |now, twin: &Session| {
            Flow::from_half(&key, &half, Some(twin), &settings(), at(now)).is_some()
        };
        assert!(shown(1299, &twin));
        // The reply at second 1004 does not keep it (RFC 4787 REQ-6).
        assert!(!shown(1302, &twin));
        twin.tcp = 0;
        let flow = Flow::from_half(&key, &half, Some(&twin), &settings(), at(1010)).unwrap();
        assert_eq!(flow.state, "one-way");
        assert!(Flow::from_half(&key, &half, None, &settings(), at(1010)).is_some());
    }

    #[test]
    fn a_mapping_as_json() {
        let outside = EndpointKey::new(address("192.0.2.10"), Be16::new(41000), protocol::UDP);
        let mut mapping = Mapping {
            inside: EndpointKey::new(address("10.0.0.2"), Be16::new(40000), protocol::UDP),
            expires_at: at(1300),
            sessions: 2,
            ..Mapping::default()
        };
        let view = MappingView::new(&outside, &mapping, at(1000)).unwrap();
        assert_eq!(
            serde_json::to_value(&view).unwrap(),
            json!({
                "protocol": "udp",
                "inside": {"address": "10.0.0.2", "port": 40000},
                "outside": {"address": "192.0.2.10", "port": 41000},
                "kind": "dynamic",
                "sessions": 2,
                "expires_in_seconds": 300,
            })
        );
        assert_eq!(MappingView::new(&outside, &mapping, at(1301)), None);
        mapping.flags = mapping_flags::STATIC;
        let view = MappingView::new(&outside, &mapping, at(1301)).unwrap();
        assert_eq!((view.kind, view.expires_in_seconds), ("static", None));
    }

    #[test]
    fn a_guest_may_be_alone_in_its_network() {
        let alone = Device {
            address: address("169.254.1.1"),
            network: address("10.0.0.10"),
            mask: Be32::mask(32),
            role: role::INSIDE,
            ..Device::default()
        };
        let alone = DeviceView::new(None, TAP, &alone, None);
        let networks: Vec<_> = alone.written().map(|it| it.to_string()).collect();
        assert_eq!(networks, ["169.254.1.1 peer 10.0.0.10"]);
        assert!(alone.has_in_network("10.0.0.10".parse().unwrap()));
        assert!(!alone.has_in_network("169.254.1.1".parse().unwrap()));
    }

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
