//! What an instance is asked to do, before it is compared with the host: values that are right by
//! themselves. Where they came from, command line or file, does not show here.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    ops::RangeInclusive,
    str::FromStr,
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use ipnet::{IpNet, Ipv6Net};
use tapnat_common::{
    abi::{Filtering, MAX_OUTSIDE_ADDRESSES, MappingMode, Timeouts},
    embed::{Prefix, PrefixError},
    net::{Address as _, Be32, Be128},
    nptv6::{LONGEST, PairError, PrefixPair},
    time::Ticks,
};

use crate::{
    dns::{Resolver, Resolvers},
    forwards::Forward,
    host::tap::{Owner, Queues},
    instance::InstanceName,
    nat_log::Target,
    uplink_hook::UplinkHook,
};

pub mod check;
mod inside;

pub use self::inside::{Devices, Inside, Networks, Written, overlap};

/// Ports that guests may get unless told otherwise. Those from 512 to 1023 go only to guests that
/// use such a port themselves (RFC 4787 REQ-3a), as clients of NFS do; those below belong to
/// servers.
pub const DEFAULT_PORTS: RangeInclusive<u16> = 512..=65535;
/// Sessions that the tables have room for unless told otherwise.
pub const DEFAULT_MAX_SESSIONS: u32 = 131_072;
/// One guest gets as large a part of the sessions that there can be, and of the ports of its outside
/// address, unless told otherwise: the others still have room when it takes all that it gets.
const GUEST_SHARE: u32 = 4;
/// Unless that is fewer than this.
const GUEST_LEAST: u32 = 1024;

/// How many sessions one guest may have, unless told otherwise.
#[must_use]
pub fn default_guest_max_sessions(max_sessions: u32) -> NonZeroU32 {
    let share = (max_sessions / GUEST_SHARE)
        .max(GUEST_LEAST)
        .min(max_sessions);
    NonZeroU32::new(share).unwrap_or(NonZeroU32::MIN)
}

/// How many outside ports one guest may hold, unless told otherwise. Those that rest count, so that
/// many sessions one after the other do not take all. Not more than sessions: tables for few of those
/// have room for as few mappings.
#[must_use]
pub fn default_guest_max_ports(ports: &RangeInclusive<u16>, max_sessions: u32) -> NonZeroU32 {
    let count = u32::from(ports.end().saturating_sub(*ports.start())) + 1;
    NonZeroU32::new((count / GUEST_SHARE).max(GUEST_LEAST))
        .unwrap_or(NonZeroU32::MIN)
        .min(default_guest_max_sessions(max_sessions))
}

/// Between two sweeps unless told otherwise.
pub const DEFAULT_SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// More sessions than this do not fit the tables' sizes.
pub const MOST_SESSIONS: u32 = 1 << 24;

/// `IFNAMSIZ` without the terminating zero.
const LONGEST_DEVICE_NAME: usize = 15;

/// Everything that `tapnat run` can be told.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the operator's"
)]
pub struct Config {
    pub instance: InstanceName,
    pub insides: Vec<Inside>,
    /// None means the device of the default route.
    pub uplink: Option<DeviceName>,
    /// None given, of an IP version, means the uplink's own address.
    pub outside_addresses: Vec<IpAddr>,
    /// Ports of the outside addresses that guests may get.
    pub ports: RangeInclusive<u16>,
    pub max_sessions: u32,
    pub guest_max_sessions: NonZeroU32,
    pub guest_max_ports: NonZeroU32,
    /// In a second. None means no limit.
    pub guest_new_sessions: Option<NonZeroU32>,
    pub timeouts: Timeouts,
    pub filtering: PerProtocol<Filtering>,
    pub mapping: PerProtocol<MappingMode>,
    /// Whether packets from outside keep sessions other than TCP alive (RFC 4787 REQ-6).
    pub inbound_refresh: bool,
    /// The largest TCP segment that a SYN may announce, in bytes.
    pub clamp_mss: Option<u16>,
    pub pass_unsolicited: bool,
    /// Tell the senders of other such connections that nobody is there (RFC 5382 REQ-4).
    pub answer_unsolicited: bool,
    /// Where guests must not send to.
    pub deny: Vec<IpNet>,
    /// What guests reach under their own addresses.
    pub untranslated: Vec<IpNet>,
    /// Behind which guests with IPv6 reach the world's IPv4.
    pub nat64: Option<Nat64Prefix>,
    /// Prefixes of IPv6 that are translated without sessions (RFC 6296).
    pub prefixes: Vec<PrefixPair>,
    /// Keep guests from the host, and from networks that are not behind the uplink.
    pub deny_host: bool,
    /// Keep guests from each other over outside addresses, too.
    pub isolate: bool,
    /// Whether guests may reach each other under their own addresses.
    pub route_guests: bool,
    /// Let guests' addresses move from one link address to another.
    pub roaming: bool,
    /// Whether the host's firewall decides about guests' packets.
    pub firewall: Firewall,
    /// Count packets and bytes of each session.
    pub count: bool,
    /// Where it is written down which outside endpoint is whose.
    pub nat_log: Option<Target>,
    /// Write every session there, with whom the guest talks to.
    pub log_destinations: bool,
    /// Where Prometheus is answered.
    pub metrics: Option<SocketAddr>,
    /// Log packets from the datapath.
    pub verbose: bool,
    /// How many queues a tap that tapnat creates can have.
    pub tap_queues: Queues,
    /// Who may attach to such a tap without privileges; None leaves that to whoever may open
    /// `/dev/net/tun`.
    pub tap_owner: Option<Owner>,
    pub attach: Attach,
    /// Where the world's packets meet the first program.
    pub uplink_hook: UplinkHook,
    /// Answer guests that ask for an address.
    pub dhcp: bool,
    /// Tell guests of IPv6 networks that the host is their router.
    pub router_advertisements: bool,
    /// The domain that guests are told.
    pub domain: Option<String>,
    /// Whom guests ask for names. None given leaves that to what is found.
    pub dns: Vec<Resolver>,
    /// What is always let in from outside.
    pub forwards: Vec<Forward>,
    /// How long memory and ports that are free again rest before they are given back.
    /// None: as long as is of use.
    pub sweep_interval: Option<Duration>,
}

impl Config {
    /// Whether any guest is to have IPv6.
    #[must_use]
    pub fn speaks_ipv6(&self) -> bool {
        self.insides
            .iter()
            .any(|inside| inside.networks.ipv6.is_some())
    }

    /// The addresses that are named to be the host's in the world, whether for all guests or for one.
    #[must_use]
    pub fn given_outside(&self) -> Vec<IpAddr> {
        let forwards = self.forwards.iter().filter_map(|it| it.outside_address);
        let addresses = self.outside_addresses.iter().copied();
        addresses.chain(forwards).collect()
    }

    /// Whether any guest is to reach the world's IPv4.
    #[must_use]
    pub fn speaks_ipv4(&self) -> bool {
        self.nat64.is_some()
            || self
                .insides
                .iter()
                .any(|inside| inside.networks.ipv4.is_some() || inside.networks.is_empty())
    }

    /// Whether any guest may have IPv6, if only because its device has it already.
    #[must_use]
    pub fn has_ipv6_networks(&self) -> bool {
        self.speaks_ipv6() || self.insides.iter().any(|inside| inside.networks.is_empty())
    }

    /// Whom guests ask for names.
    #[must_use]
    pub fn resolvers(&self) -> Resolvers {
        Resolvers::choose(&self.dns, self.deny_host)
    }
}

/// A mode for TCP and one for everything else.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PerProtocol<T> {
    pub tcp: T,
    pub udp: T,
}

/// A mode for some protocols, in the form `MODE`, `tcp=MODE` or `udp=MODE`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Choice<T> {
    tcp: bool,
    udp: bool,
    mode: T,
}

impl<T> Choice<T> {
    fn parse(text: &str, parse: impl Fn(&str) -> Result<T>) -> Result<Self> {
        let (tcp, udp, mode) = match text.split_once('=') {
            None => (true, true, text),
            Some(("tcp", mode)) => (true, false, mode),
            Some(("udp", mode)) => (false, true, mode),
            Some((other, mode)) => {
                bail!("'{other}' is not a protocol here: write tcp={mode} or udp={mode}")
            }
        };
        Ok(Self {
            tcp,
            udp,
            mode: parse(mode)?,
        })
    }
}

impl<T: Copy + Default> PerProtocol<T> {
    /// The default with these choices applied one after the other.
    #[must_use]
    pub fn choose(choices: &[Choice<T>]) -> Self {
        choices.iter().fold(Self::default(), |chosen, choice| Self {
            tcp: if choice.tcp { choice.mode } else { chosen.tcp },
            udp: if choice.udp { choice.mode } else { chosen.udp },
        })
    }
}

/// Reads the domain that guests are told: labels as host names have (RFC 1123 section 2.1).
///
/// # Errors
///
/// When it is no domain name, or too long for DHCP.
pub fn parse_domain(text: &str) -> Result<String> {
    const LONGEST: usize = 253;
    const LONGEST_LABEL: usize = 63;
    let is_label = |label: &str| {
        (1..=LONGEST_LABEL).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    ensure!(
        text.len() <= LONGEST && text.split('.').all(is_label),
        "'{text}' is not a domain name: write one such as lan.example.org"
    );
    Ok(text.to_owned())
}

/// Reads the address and port that scrapers of metrics are answered on.
///
/// # Errors
///
/// When it is none.
pub fn parse_endpoint(text: &str) -> Result<SocketAddr> {
    let endpoint: Option<SocketAddr> = text.parse().ok().filter(|it: &SocketAddr| it.port() != 0);
    endpoint.ok_or_else(|| {
        anyhow!("'{text}' is not an address with a port: write 127.0.0.1:9477 or [::1]:9477")
    })
}

/// Reads a choice of a filtering behaviour.
///
/// # Errors
///
/// When it has another form, or names no behaviour.
pub fn parse_filtering_choice(text: &str) -> Result<Choice<Filtering>> {
    Choice::parse(text, parse_filtering)
}

/// Reads a choice of a mapping behaviour.
///
/// # Errors
///
/// When it has another form, or names no behaviour.
pub fn parse_mapping_choice(text: &str) -> Result<Choice<MappingMode>> {
    Choice::parse(text, parse_mapping)
}

fn parse_filtering(name: &str) -> Result<Filtering> {
    [
        Filtering::EndpointIndependent,
        Filtering::AddressDependent,
        Filtering::AddressAndPortDependent,
    ]
    .into_iter()
    .find(|mode| filtering_label(*mode) == name)
    .ok_or_else(|| {
        anyhow!(
            "'{name}' is not a filtering behaviour: use endpoint-independent, address-dependent or \
             address-and-port-dependent"
        )
    })
}

/// The name of a filtering behaviour (RFC 4787 section 5).
#[must_use]
pub fn filtering_label(mode: Filtering) -> &'static str {
    match mode {
        Filtering::EndpointIndependent => "endpoint-independent",
        Filtering::AddressDependent => "address-dependent",
        Filtering::AddressAndPortDependent => "address-and-port-dependent",
    }
}

fn parse_mapping(name: &str) -> Result<MappingMode> {
    [
        MappingMode::EndpointIndependent,
        MappingMode::AddressAndPortDependent,
    ]
    .into_iter()
    .find(|mode| mapping_label(*mode) == name)
    .ok_or_else(|| {
        anyhow!(
            "'{name}' is not a mapping behaviour: use endpoint-independent or \
                 address-and-port-dependent"
        )
    })
}

/// The name of a mapping behaviour (RFC 4787 section 4.1).
#[must_use]
pub fn mapping_label(mode: MappingMode) -> &'static str {
    match mode {
        MappingMode::EndpointIndependent => "endpoint-independent",
        MappingMode::AddressAndPortDependent => "address-and-port-dependent",
    }
}

/// Reads a length of time: a number of seconds, or numbers with units such as `5m` or `2h 4m`.
///
/// # Errors
///
/// When it is neither, or too short to be told from nothing.
pub fn parse_duration(text: &str) -> Result<Ticks> {
    let duration = match text.parse::<u32>() {
        Ok(seconds) => Duration::from_secs(seconds.into()),
        Err(_) => humantime::parse_duration(text)
            .with_context(|| format!("'{text}' is not a length of time: write 300, 300s or 5m"))?,
    };
    ensure!(
        duration >= Duration::from_secs(1),
        "{text} is too short: one second is the least"
    );
    Ok(Ticks::from_milliseconds(
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
    ))
}

/// What the host's firewall has to do with guests' packets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Firewall {
    /// It does not see them.
    #[default]
    Bypass,
    /// Its FORWARD chain decides about the first packets of each session.
    Ask,
}

/// How the datapath gets hold of packets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Attach {
    /// TCX where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    Tcx,
    Clsact,
}

/// Outside addresses that were given in one word: an address, or a prefix that stands for the
/// addresses that hosts can have in it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OutsideAddresses(Vec<IpAddr>);

impl OutsideAddresses {
    /// All the addresses of several words, each once, in their order.
    #[must_use]
    pub fn all(words: &[Self]) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for address in words.iter().flat_map(|word| &word.0) {
            if !addresses.contains(address) {
                addresses.push(*address);
            }
        }
        addresses
    }
}

impl FromStr for OutsideAddresses {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if !text.contains('/') {
            return parse_outside_address(text).map(|address| Self(vec![address]));
        }
        let net = text.parse::<IpNet>().with_context(|| {
            format!(
                "'{text}' is not a prefix: write 203.0.113.8/29 or 2001:db8::8/125, or one address"
            )
        })?;
        ensure!(
            net.addr() == net.network(),
            "{text} is an address within a prefix: write {} for all of it, or {} for the one",
            net.trunc(),
            net.addr()
        );
        let hosts = net.hosts().filter(|address| can_be_host(net, *address));
        let addresses: Vec<_> = hosts.take(MAX_OUTSIDE_ADDRESSES + 1).collect();
        ensure!(
            addresses.len() <= MAX_OUTSIDE_ADDRESSES,
            "{text} has more than {MAX_OUTSIDE_ADDRESSES} addresses, which are the most: a {}",
            match net {
                IpNet::V4(_) => "/28 has 14",
                IpNet::V6(_) => "/124 has 15",
            }
        );
        for address in &addresses {
            ensure!(is_unicast(*address), "{address} cannot be a host's address");
        }
        Ok(Self(addresses))
    }
}

/// The prefix of NAT64 (RFC 6052).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Nat64Prefix {
    pub net: Ipv6Net,
    /// As the datapath has it.
    pub prefix: Prefix,
}

impl FromStr for Nat64Prefix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let net: Ipv6Net = text.parse().map_err(|_| {
            anyhow!("'{text}' is not an IPv6 prefix: write 64:ff9b::/96, or one of your own")
        })?;
        let prefix = Prefix::new(net.addr().into(), net.prefix_len()).map_err(|error| match error {
            PrefixError::Length => anyhow!(
                "no IPv4 addresses can be embedded in {net} (RFC 6052 section 2.2): give it a length \
                 of 96, or of 32, 40, 48, 56 or 64"
            ),
            PrefixError::HostBits => anyhow!(
                "{net} is an address within a prefix: write {}",
                net.trunc()
            ),
            PrefixError::ReservedBits => anyhow!(
                "in {net} bits 64 to 71 are not zero (RFC 6052 section 2.2): choose another prefix"
            ),
            PrefixError::Unroutable => anyhow!(
                "nothing can be sent to {net}: choose 64:ff9b::/96, or a prefix of your own"
            ),
        })?;
        Ok(Self { net, prefix })
    }
}

/// Reads a prefix, or an address, which is a prefix of one.
///
/// # Errors
///
/// When it is neither, or an address within a prefix.
pub fn parse_prefix(text: &str) -> Result<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    let net = text.parse::<IpNet>().with_context(|| {
        format!("'{text}' is not a prefix or an address: write 192.168.0.0/16 or fd00::/8")
    })?;
    ensure!(
        net.addr() == net.network(),
        "{text} is an address within a prefix: write {} for all of it, or {} for the one",
        net.trunc(),
        net.addr()
    );
    Ok(net)
}

/// Reads a pair of prefixes, the internal one first.
///
/// # Errors
///
/// When it is none, or one that cannot be translated.
pub fn parse_prefix_pair(text: &str) -> Result<PrefixPair> {
    let example = "write fd00:1::/48=2001:db8:1::/48";
    let read = |prefix: &str| {
        let net = prefix
            .parse::<Ipv6Net>()
            .with_context(|| format!("'{prefix}' is not an IPv6 prefix: {example}"))?;
        ensure!(
            net.addr() == net.network(),
            "{prefix} is an address within a prefix: write {}",
            net.trunc()
        );
        Ok((net.addr().into(), net.prefix_len()))
    };
    let (internal, external) = text
        .split_once('=')
        .with_context(|| format!("'{text}' is not two prefixes: {example}"))?;
    PrefixPair::new(read(internal)?, read(external)?).map_err(|error| match error {
        PairError::Length => anyhow!(
            "a prefix in {text} is not 1 to {LONGEST} bits long: behind longer ones no room is left to \
             keep checksums as they are (RFC 6296)"
        ),
        PairError::HostBits => anyhow!("{text} has bits behind a prefix: {example}"),
        PairError::Unroutable => anyhow!(
            "{text} has a prefix whose addresses are not forwarded: give a unique local one \
             (fd00::/8) and a global one"
        ),
        PairError::Overlap => anyhow!(
            "one prefix in {text} lies within the other: what is translated must be told from what \
             is not"
        ),
    })
}

/// Reads destinations of guests: a prefix, or an address.
///
/// # Errors
///
/// When it is neither, or an address within a prefix, or everything.
pub fn parse_destinations(text: &str) -> Result<IpNet> {
    let net = parse_prefix(text)?;
    ensure!(
        net.prefix_len() != 0,
        "{text} is everything, and tapnat is not needed where nothing is translated: name less"
    );
    Ok(net)
}

/// Reads an outside address.
///
/// # Errors
///
/// When it is not an address that a host can have in the world.
pub fn parse_outside_address(text: &str) -> Result<IpAddr> {
    let address = text
        .parse::<IpAddr>()
        .with_context(|| format!("'{text}' is not an address: write 203.0.113.5 or 2001:db8::5"))?;
    ensure!(is_unicast(address), "{text} cannot be a host's address");
    Ok(address)
}

/// Whether a host can have it, and be known by it beyond its link.
fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !Be32::from(address).is_unroutable(),
        IpAddr::V6(address) => {
            let address = Be128::from(address);
            !address.is_unroutable() && !address.is_link_local()
        }
    }
}

/// Whether a host can have this address of the network.
pub(crate) fn can_be_host(network: IpNet, address: IpAddr) -> bool {
    // Of IPv6 the last one is a host's like any other (RFC 4291 section 2.6.1).
    let is_end =
        address == network.network() || (address.is_ipv4() && address == network.broadcast());
    !is_end || network.prefix_len() + 1 >= network.max_prefix_len()
}

/// A name that a network device can have (`dev_valid_name()` in `net/core/dev.c`), without the
/// letters that the kernel or tapnat read as a pattern.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct DeviceName(String);

impl DeviceName {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let forbidden = |letter: char| {
            letter.is_whitespace() || letter.is_control() || "/:%*?[]=,".contains(letter)
        };
        ensure!(
            !name.is_empty(),
            "the name of the device is missing: write tap0=10.0.0.1/24"
        );
        ensure!(
            name.len() <= LONGEST_DEVICE_NAME,
            "'{name}' is too long for a device: {LONGEST_DEVICE_NAME} letters are the most"
        );
        ensure!(
            ![".", ".."].contains(&name) && !name.contains(forbidden),
            "'{name}' cannot name a device: use letters, digits, '.', '-' and '_'"
        );
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lengths_of_time() {
        for (text, seconds) in [("300", 300), ("300s", 300), ("5m", 300), ("2h 4m", 7440)] {
            assert_eq!(
                parse_duration(text).unwrap(),
                Ticks::from_seconds(seconds),
                "{text}"
            );
        }
        assert_eq!(
            parse_duration("1500ms").unwrap(),
            Ticks::from_milliseconds(1500)
        );
        for text in ["", "0", "999ms", "5", "-1", "5 parsecs"] {
            assert_eq!(parse_duration(text).is_err(), text != "5", "{text}");
        }
    }

    #[test]
    fn reads_a_mode_for_each_protocol() {
        let parse = |text: &str| {
            let choices: Result<Vec<_>> = text.split(',').map(parse_filtering_choice).collect();
            choices.map(|choices| PerProtocol::choose(&choices))
        };
        assert_eq!(
            parse("udp=endpoint-independent").unwrap(),
            PerProtocol {
                tcp: Filtering::AddressDependent,
                udp: Filtering::EndpointIndependent,
            }
        );
        let mixed = parse("endpoint-independent,tcp=address-and-port-dependent").unwrap();
        assert_eq!(mixed.tcp, Filtering::AddressAndPortDependent);
        assert_eq!(mixed.udp, Filtering::EndpointIndependent);
        for text in ["x", "icmp=address-dependent", "tcp=", "tcp"] {
            assert!(parse(text).is_err(), "{text}");
        }
        for mode in [
            MappingMode::EndpointIndependent,
            MappingMode::AddressAndPortDependent,
        ] {
            assert_eq!(
                parse_mapping_choice(mapping_label(mode)).unwrap().mode,
                mode
            );
        }
    }

    #[test]
    fn a_prefix_stands_for_its_hosts() {
        let read = |words: &[&str]| -> Result<Vec<IpAddr>> {
            let words: Result<Vec<OutsideAddresses>> =
                words.iter().map(|word| word.parse()).collect();
            words.map(|words| OutsideAddresses::all(&words))
        };
        let all = read(&["203.0.113.5", "203.0.113.4/30", "203.0.113.9/32"]).unwrap();
        let all: Vec<_> = all.iter().map(ToString::to_string).collect();
        assert_eq!(all, ["203.0.113.5", "203.0.113.6", "203.0.113.9"]);
        let all = read(&["2001:db8::9", "2001:db8::8/126"]).unwrap();
        let all: Vec<_> = all.iter().map(ToString::to_string).collect();
        assert_eq!(all, ["2001:db8::9", "2001:db8::a", "2001:db8::b"]);
        for (word, count) in [
            ("203.0.113.0/31", 2),
            ("203.0.113.16/28", 14),
            ("2001:db8::/127", 2),
            ("2001:db8::10/124", 15),
        ] {
            assert_eq!(read(&[word]).unwrap().len(), count, "{word}");
        }
        for (word, said) in [
            ("203.0.113.0/27", "a /28 has 14"),
            ("10.0.0.0/8", "a /28 has 14"),
            ("203.0.113.5/29", "write 203.0.113.0/29"),
            ("127.0.0.0/30", "cannot be"),
            ("x/29", "203.0.113.8/29"),
            ("2001:db8::/64", "a /124 has 15"),
            ("2001:db8::5/124", "write 2001:db8::/124"),
            ("fe80::8/125", "cannot be"),
        ] {
            let error = format!("{:#}", read(&[word]).unwrap_err());
            assert!(error.contains(said), "{word}: {error}");
        }
    }

    #[test]
    fn reads_destinations() {
        for (text, net) in [
            ("169.254.169.254", "169.254.169.254/32"),
            ("192.168.0.0/16", "192.168.0.0/16"),
            ("fd00::/8", "fd00::/8"),
            ("2001:db8::5", "2001:db8::5/128"),
        ] {
            assert_eq!(parse_destinations(text).unwrap(), net.parse().unwrap());
        }
        for (text, said) in [
            ("192.168.0.1/16", "write 192.168.0.0/16"),
            ("0.0.0.0/0", "is everything"),
            ("::/0", "is everything"),
            ("x", "write 192.168.0.0/16 or fd00::/8"),
        ] {
            let error = format!("{:#}", parse_destinations(text).unwrap_err());
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn reads_outside_addresses() {
        for text in ["203.0.113.5", "2001:db8::5", "fd00::5"] {
            assert!(parse_outside_address(text).is_ok(), "{text}");
        }
        for text in [
            "2001:db8::/64",
            "::",
            "::1",
            "::ffff:203.0.113.5",
            "fe80::1",
            "ff02::1",
            "203.0.113.0/24",
            "0.0.0.0",
            "127.0.0.1",
            "255.255.255.255",
            "x",
        ] {
            assert!(parse_outside_address(text).is_err(), "{text}");
        }
    }
}
