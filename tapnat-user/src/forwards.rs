//! What the operator lets in from outside: port forwards, and whole outside addresses that stand
//! for one guest (1:1). How they are written, which of them contradict each other, and how they are
//! read back from static mappings. Pure; [`crate::statics`] puts them into the tables.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    str::FromStr,
};

use anyhow::{Context as _, Error, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use tapnat_common::{
    abi::{EndpointKey, Mapping, mapping_flags},
    net::{Be16, Be32, Be128, protocol},
    nptv6::PrefixPair,
};

use crate::{family::IpFamily, ports::parse_range};

/// A transport protocol that has ports which can be forwarded.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// The IP protocol number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp]
            .into_iter()
            .find(|transport| transport.number() == number)
    }
}

impl FromStr for Transport {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => bail!("'{text}' is not a protocol with ports to forward: write tcp or udp"),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A run of neighbouring ports.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
pub struct Ports {
    pub first: u16,
    pub last: u16,
}

impl Ports {
    /// How many there are.
    #[must_use]
    pub fn count(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }

    #[must_use]
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    #[must_use]
    pub fn iter(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }

    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl FromStr for Ports {
    type Err = Error;

    /// Reads a port, or `FIRST-LAST`.
    fn from_str(text: &str) -> Result<Self> {
        let range = parse_range(text)?;
        ensure!(*range.start() != 0, "0 is no port that can be forwarded");
        Ok(Self {
            first: *range.start(),
            last: *range.end(),
        })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(formatter, "{}", self.first)
        } else {
            write!(formatter, "{}-{}", self.first, self.last)
        }
    }
}

/// Where a forward leads: an inside address, and its ports unless they are the outside ones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InsideEnd {
    pub address: IpAddr,
    pub ports: Option<Ports>,
}

impl FromStr for InsideEnd {
    type Err = Error;

    /// Reads `ADDRESS`, `ADDRESS:PORT` or `ADDRESS:FIRST-LAST`, with an address of IPv6 in brackets
    /// (RFC 5952 section 6): without them nobody could tell a port from its end.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            format!("'{text}' is not a guest's endpoint: write 10.0.0.10:80, or [fd00:7a70::10]:80")
        };
        if let Ok(address) = text.parse::<Ipv6Addr>() {
            bail!(
                "'{text}' may end with an address or with a port: write [{address}] if it is all \
                 address, else its address in brackets and the port behind, as [fd00:7a70::10]:80"
            );
        }
        let (address, rest) = if let Some(bracketed) = text.strip_prefix('[') {
            let (address, rest) = bracketed.split_once(']').with_context(wrong)?;
            let address: Ipv6Addr = address.parse().with_context(wrong)?;
            (IpAddr::from(address), rest)
        } else {
            let (address, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
            let address: Ipv4Addr = address.parse().with_context(wrong)?;
            (IpAddr::from(address), rest)
        };
        let ports = match rest.strip_prefix(':') {
            Some(ports) => Some(ports.parse()?),
            None if rest.is_empty() => None,
            None => bail!(wrong()),
        };
        Ok(Self { address, ports })
    }
}

impl fmt::Display for InsideEnd {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(ports) = self.ports else {
            return write!(formatter, "{}", Host(self.address));
        };
        write!(formatter, "{}:{ports}", Host(self.address))
    }
}

/// An address as it stands before a port.
struct Host(IpAddr);

impl fmt::Display for Host {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => write!(formatter, "{address}"),
            IpAddr::V6(address) => write!(formatter, "[{address}]"),
        }
    }
}

/// What of an outside address is a guest's.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Share {
    /// As many ports inside as outside, in the same order.
    Ports {
        protocol: Transport,
        outside: Ports,
        inside: Ports,
    },
    /// All of it, whatever the protocol.
    Everything,
}

/// Something that the operator lets in. All its addresses are of one IP version.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Forward {
    /// None means the first of the instance's outside addresses of the guest's IP version,
    /// whichever that is at the time.
    pub outside_address: Option<IpAddr>,
    pub inside_address: IpAddr,
    pub share: Share,
    /// The network whose hosts may come in.
    pub from: IpNet,
}

/// The network of everybody who has the IP version of this address.
#[must_use]
pub fn anywhere(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => Ipv4Net::default().into(),
        IpAddr::V6(_) => Ipv6Net::default().into(),
    }
}

fn version(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => Be32::NAME,
        IpAddr::V6(_) => Be128::NAME,
    }
}

/// Reads the network that may come in, or one address.
///
/// # Errors
///
/// When it is neither, or has bits beyond its prefix, which would say two things at once.
pub fn parse_from(text: &str) -> Result<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    let net = text.parse::<IpNet>().with_context(|| {
        format!("'{text}' is not a network: write 192.0.2.0/24 or 2001:db8::/32, or one address")
    })?;
    ensure!(
        net.addr() == net.network(),
        "{text} is an address within a network: write {} for the network, or {} for the host",
        net.trunc(),
        net.addr()
    );
    Ok(net)
}

impl Forward {
    /// A forward of ports; `from` none means that everybody may come in.
    ///
    /// # Errors
    ///
    /// When there are not as many ports inside as outside, or it has addresses of both IP versions.
    pub fn of_ports(
        protocol: Transport,
        outside: Ports,
        inside: InsideEnd,
        from: Option<IpNet>,
        outside_address: Option<IpAddr>,
    ) -> Result<Self> {
        let inside_ports = inside.ports.unwrap_or(outside);
        // As many as outside, from as high a port as has so many above it.
        let more = outside.last - outside.first;
        let first = inside_ports.first.min(u16::MAX - more);
        let fitting = Ports {
            first,
            last: first + more,
        };
        ensure!(
            inside_ports.count() == outside.count(),
            "{outside} has {} ports, {inside_ports} has {}: write {}:{fitting}",
            outside.count(),
            inside_ports.count(),
            Host(inside.address)
        );
        Self {
            outside_address,
            inside_address: inside.address,
            share: Share::Ports {
                protocol,
                outside,
                inside: inside_ports,
            },
            from: from.unwrap_or_else(|| anywhere(inside.address)),
        }
        .of_one_version()
    }

    /// A whole outside address for one guest; `from` none means that everybody may come in.
    ///
    /// # Errors
    ///
    /// When it has addresses of both IP versions.
    pub fn of_address(outside: IpAddr, inside: IpAddr, from: Option<IpNet>) -> Result<Self> {
        Self {
            outside_address: Some(outside),
            inside_address: inside,
            share: Share::Everything,
            from: from.unwrap_or_else(|| anywhere(inside)),
        }
        .of_one_version()
    }

    /// Refuses what would have to be translated from one IP version to the other.
    fn of_one_version(self) -> Result<Self> {
        let (name, inside) = (self.name(), self.inside_address);
        let own = version(inside);
        if let Some(outside) = self.outside_address {
            ensure!(
                version(outside) == own,
                "{name} cannot lead to {inside}: {outside} is {}, and nothing is translated from one \
                 IP version to the other on its way in; name an {own} address outside, or the \
                 guest's {} one",
                version(outside),
                version(outside)
            );
        }
        let from = self.from.addr();
        ensure!(
            version(from) == own,
            "{name} leads to {inside}, and from {} nobody comes by {own}: name an {own} network",
            self.from
        );
        Ok(self)
    }

    /// What is wrong with it where these prefixes are translated: what a guest answers then goes by
    /// its own outside address, and not by the forward.
    #[must_use]
    pub fn in_vain(&self, pairs: &[PrefixPair]) -> Option<String> {
        let (name, inside) = (self.name(), self.inside_address);
        let address = Be128::from_ip(inside)?;
        let pair = pairs.iter().find(|it| it.has_internal(address))?;
        let way_out = match pair.translate_out(address) {
            Ok(outside) => format!("the world reaches it by {}", IpAddr::from(outside)),
            Err(_) => "name a guest of another network".to_owned(),
        };
        Some(format!(
            "{name} cannot lead to {inside}: its prefix is translated, without sessions; {way_out}"
        ))
    }

    /// The inside end, as it is written.
    #[must_use]
    pub fn inside_end(&self) -> InsideEnd {
        InsideEnd {
            address: self.inside_address,
            ports: match self.share {
                Share::Ports { inside, .. } => Some(inside),
                Share::Everything => None,
            },
        }
    }

    /// Whether everybody may come in.
    #[must_use]
    pub fn is_for_everybody(&self) -> bool {
        self.from.prefix_len() == 0
    }

    /// The words with which `tapnat` would be asked for it.
    #[must_use]
    pub fn name(&self) -> String {
        let at = |it: Option<IpAddr>| it.map_or_else(String::new, |it| format!(" on {it}"));
        match self.share {
            Share::Ports {
                protocol, outside, ..
            } => format!("{protocol} {outside}{}", at(self.outside_address)),
            Share::Everything => self
                .outside_address
                .map_or_else(String::new, |it| it.to_string()),
        }
    }

    /// What is wrong with it if one of the `earlier` ones wants the same of an outside address.
    /// `outside` are those of the instance, the first of which, of the guest's IP version, stands for
    /// none.
    #[must_use]
    pub fn conflict<'a>(
        &self,
        mut earlier: impl Iterator<Item = &'a Self>,
        outside: &[IpAddr],
    ) -> Option<String> {
        let other = earlier.find(|it| it.contradicts(self, outside))?;
        Some(format!(
            "{} cannot lead to {}: {} leads to {} already",
            self.name(),
            self.inside_address,
            other.name(),
            other.inside_address
        ))
    }

    /// Whether both want the same of one of these outside addresses.
    fn contradicts(&self, other: &Self, outside: &[IpAddr]) -> bool {
        let own = version(self.inside_address);
        let first = outside.iter().find(|it| version(**it) == own).copied();
        if own != version(other.inside_address)
            || self.outside_address.or(first) != other.outside_address.or(first)
        {
            return false;
        }
        match (self.share, other.share) {
            (
                Share::Ports {
                    protocol, outside, ..
                },
                Share::Ports {
                    protocol: other_protocol,
                    outside: other_outside,
                    ..
                },
            ) => protocol == other_protocol && outside.overlaps(other_outside),
            (Share::Everything, _) | (_, Share::Everything) => true,
        }
    }

    /// The outside and inside endpoints of the static mappings that it takes, from this outside
    /// address to this inside one.
    #[must_use]
    pub fn endpoints<A: IpFamily>(
        &self,
        outside_address: A,
        inside_address: A,
    ) -> Vec<(EndpointKey<A>, EndpointKey<A>)> {
        match self.share {
            Share::Everything => vec![(
                EndpointKey::whole(outside_address),
                EndpointKey::whole(inside_address),
            )],
            Share::Ports {
                protocol,
                outside,
                inside,
            } => outside
                .iter()
                .zip(inside.iter())
                .map(|(outside, inside)| {
                    let number = protocol.number();
                    (
                        EndpointKey::new(outside_address, Be16::new(outside), number),
                        EndpointKey::new(inside_address, Be16::new(inside), number),
                    )
                })
                .collect(),
        }
    }

    /// One that is only this static mapping; `None` of a mapping that is not static.
    #[must_use]
    pub fn from_mapping<A: IpFamily>(
        outside: &EndpointKey<A>,
        mapping: &Mapping<A>,
    ) -> Option<Self> {
        if mapping.flags & mapping_flags::STATIC == 0 {
            return None;
        }
        let share = if outside.is_whole() {
            Share::Everything
        } else {
            let port = |it: Be16| Ports {
                first: it.get(),
                last: it.get(),
            };
            Share::Ports {
                protocol: Transport::from_number(outside.protocol)?,
                outside: port(outside.port),
                inside: port(mapping.inside.port),
            }
        };
        let moves = mapping.flags & mapping_flags::MOVES != 0;
        Some(Self {
            outside_address: (!moves).then(|| outside.address.into()),
            inside_address: mapping.inside.address.into(),
            share,
            from: A::net(mapping.allowed, mapping.allowed_length)?.into(),
        })
    }

    /// Takes the next one in, if together they are one range.
    #[must_use]
    fn joined(&self, next: &Self) -> Option<Self> {
        let alike = Self {
            share: self.share,
            ..*next
        };
        let (
            Share::Ports {
                protocol,
                outside,
                inside,
            },
            Share::Ports {
                protocol: next_protocol,
                outside: next_outside,
                inside: next_inside,
            },
        ) = (self.share, next.share)
        else {
            return None;
        };
        let follows = |one: Ports, other: Ports| one.last.checked_add(1) == Some(other.first);
        (alike == *self
            && protocol == next_protocol
            && follows(outside, next_outside)
            && follows(inside, next_inside))
        .then_some(Self {
            share: Share::Ports {
                protocol,
                outside: Ports {
                    last: next_outside.last,
                    ..outside
                },
                inside: Ports {
                    last: next_inside.last,
                    ..inside
                },
            },
            ..*self
        })
    }
}

/// A forward as it stands in the tables.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Standing {
    pub forward: Forward,
    /// Where it is now, also if the operator named no address.
    pub outside_address: IpAddr,
    /// The configuration file asks for it.
    pub configured: bool,
    /// Sessions that stand on it; those of a whole address are not counted.
    pub sessions: u32,
}

/// The forwards that these static mappings stand for, neighbouring ports put together.
#[must_use]
pub fn standing<A: IpFamily>(mappings: &[(EndpointKey<A>, Mapping<A>)]) -> Vec<Standing> {
    let mut sorted: Vec<_> = mappings.iter().collect();
    sorted.sort_by_key(|(outside, _)| {
        let address: IpAddr = outside.address.into();
        (address, outside.protocol, outside.port.get())
    });
    let mut list: Vec<Standing> = Vec::new();
    for (outside, mapping) in sorted {
        let Some(forward) = Forward::from_mapping(outside, mapping) else {
            continue;
        };
        let next = Standing {
            forward,
            outside_address: outside.address.into(),
            configured: mapping.flags & mapping_flags::CONFIGURED != 0,
            sessions: mapping.sessions,
        };
        let joined = list.last_mut().and_then(|last| {
            let alike =
                last.outside_address == next.outside_address && last.configured == next.configured;
            let forward = last.forward.joined(&next.forward).filter(|_| alike)?;
            Some((last, forward))
        });
        if let Some((last, forward)) = joined {
            last.forward = forward;
            last.sessions = last.sessions.saturating_add(next.sessions);
        } else {
            list.push(next);
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(outside: &str, inside: &str) -> Result<Forward> {
        Forward::of_ports(
            Transport::Tcp,
            outside.parse()?,
            inside.parse()?,
            None,
            None,
        )
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A forward of ports of this outside address.
    fn on(outside_address: &str, inside: &str, from: Option<&str>) -> Result<Forward> {
        let (protocol, ports) = (Transport::Tcp, "8080".parse()?);
        let from = from.map(parse_from).transpose()?;
        let outside_address = Some(address(outside_address));
        Forward::of_ports(protocol, ports, inside.parse()?, from, outside_address)
    }

    #[test]
    fn reads_ports_and_ranges() {
        let one = forward("8080", "10.0.0.10:80").unwrap();
        assert_eq!(one.name(), "tcp 8080");
        let same = forward("8000-8010", "10.0.0.10").unwrap();
        let Share::Ports {
            outside, inside, ..
        } = same.share
        else {
            panic!("{same:?}");
        };
        assert_eq!((outside, inside.count()), (inside, 11));
        let [outside, inside] = [[192, 0, 2, 1], [10, 0, 0, 10]].map(Be32::from_bytes);
        assert_eq!(same.endpoints(outside, inside).len(), 11);
    }

    #[test]
    fn says_what_to_write_instead() {
        for (outside, inside, hint) in [
            ("8000-8010", "10.0.0.10:80", "10.0.0.10:80-90"),
            ("8080", "10.0.0.10:80-81", "write 10.0.0.10:80"),
            (
                "65000-65535",
                "10.0.0.10:65100",
                "write 10.0.0.10:65000-65535",
            ),
            ("8080", "web", "10.0.0.10:80"),
            ("8080", "10.0.0.10:http", "0 to 65535"),
            ("9-5", "10.0.0.10", "write 5-9"),
            ("0", "10.0.0.10", "no port"),
            ("8000-8010", "[fd00::10]:80", "[fd00::10]:80-90"),
            ("8080", "fd00::10", "write [fd00::10] if it is all address"),
            (
                "8080",
                "fd00::10:80",
                "write [fd00::10:80] if it is all address",
            ),
            ("8080", "[fd00::10", "[fd00:7a70::10]:80"),
            ("8080", "[fd00::10]80", "[fd00:7a70::10]:80"),
            ("8080", "[10.0.0.10]:80", "write 10.0.0.10:80"),
        ] {
            let error = format!("{:#}", forward(outside, inside).unwrap_err());
            assert!(error.contains(hint), "{error}");
        }
        assert!(parse_from("192.0.2.1/24").is_err());
        assert_eq!(parse_from("192.0.2.1").unwrap().prefix_len(), 32);
        assert_eq!(parse_from("2001:db8::1").unwrap().prefix_len(), 128);
        assert!("sctp".parse::<Transport>().is_err());
    }

    #[test]
    fn an_inside_end_is_written_as_it_is_read() {
        for text in [
            "10.0.0.10",
            "10.0.0.10:80",
            "[fd00::10]",
            "[fd00::10]:80-90",
        ] {
            assert_eq!(text.parse::<InsideEnd>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn all_is_of_one_ip_version() {
        assert!(on("2001:db8::1", "[fd00::10]:80", Some("2001:db8::/32")).is_ok());
        assert_eq!(
            forward("8080", "[fd00::10]:80").unwrap().from,
            parse_from("::/0").unwrap()
        );
        for (outside, inside, from, said) in [
            (
                "192.0.2.1",
                "[fd00::10]:80",
                None,
                "name an IPv6 address outside",
            ),
            (
                "2001:db8::1",
                "10.0.0.10:80",
                None,
                "or the guest's IPv6 one",
            ),
            (
                "2001:db8::1",
                "[fd00::10]:80",
                Some("192.0.2.0/24"),
                "name an IPv6 network",
            ),
            (
                "192.0.2.1",
                "10.0.0.10:80",
                Some("::/0"),
                "name an IPv4 network",
            ),
        ] {
            let error = on(outside, inside, from).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert!(Forward::of_address(address("192.0.2.1"), address("fd00::1"), None).is_err());
    }

    #[test]
    fn two_on_one_port_contradict_each_other() {
        let first = address("192.0.2.1");
        let one = forward("8000-8010", "10.0.0.10").unwrap();
        let mut other = forward("8010", "10.0.0.11:80").unwrap();
        assert!(one.contradicts(&other, &[]));
        other.outside_address = Some(first);
        assert!(one.contradicts(&other, &[address("2001:db8::1"), first]));
        assert!(!one.contradicts(&other, &[]));
        other = forward("8011", "10.0.0.11:80").unwrap();
        assert!(!one.contradicts(&other, &[]));
        let whole = Forward::of_address(first, address("10.0.0.12"), None).unwrap();
        assert!(whole.contradicts(&one, &[first]));
        let ipv6 = forward("8000-8010", "[fd00::10]").unwrap();
        assert!(!one.contradicts(&ipv6, &[]));
    }

    #[test]
    fn a_range_is_read_back_as_one() {
        let outside = address("192.0.2.1");
        let mut mappings = Vec::new();
        for forward in [
            forward("8000-8010", "10.0.0.10:9000-9010").unwrap(),
            forward("8011", "10.0.0.10:80").unwrap(),
            Forward::of_address(outside, address("10.0.0.12"), None).unwrap(),
        ] {
            let [outside, inside] =
                [outside, forward.inside_address].map(|it| Be32::from_ip(it).unwrap());
            for (key, inside) in forward.endpoints(outside, inside) {
                mappings.push((
                    key,
                    Mapping {
                        inside,
                        sessions: 1,
                        flags: mapping_flags::STATIC,
                        ..Mapping::default()
                    },
                ));
            }
        }
        mappings.reverse();
        let list = standing(&mappings);
        assert_eq!(list.len(), 3);
        assert_eq!(list[0].forward.share, Share::Everything);
        assert_eq!(list[1].forward.name(), "tcp 8000-8010 on 192.0.2.1");
        assert_eq!(list[1].sessions, 11);
        assert_eq!(list[2].forward.name(), "tcp 8011 on 192.0.2.1");
    }
}
