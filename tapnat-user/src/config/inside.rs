//! The devices that guests are behind, and the networks that they have there: as they are written,
//! and as they are on one device of several. Whether they go together with others, and with the
//! host, is asked elsewhere.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use anyhow::{Context as _, Error, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{DeviceName, is_unicast};

/// Where no host can be (RFC 4291 sections 2.5 to 2.7, RFC 3879, RFC 6052, RFC 8215), and why.
const NOT_FOR_HOSTS: [(Ipv6Net, &str); 5] = [
    (net6([0xff00, 0], 8), "multicast addresses"),
    (
        net6([0xfe80, 0], 10),
        "link-local addresses, which every device has already",
    ),
    (
        net6([0xfec0, 0], 10),
        "site-local addresses, which nobody knows any more",
    ),
    (net6([0x64, 0xff9b], 32), "NAT64's stand-ins for IPv4"),
    (
        net6([0, 0], 8),
        "the loopback's and other reserved addresses",
    ),
];

const fn net6(first: [u16; 2], prefix_length: u8) -> Ipv6Net {
    let address = Ipv6Addr::new(first[0], first[1], 0, 0, 0, 0, 0, 0);
    Ipv6Net::new_assert(address, prefix_length)
}

/// A device that guests are behind, or several, and the host's addresses on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Inside {
    pub devices: Devices,
    /// None given means those that the device has already. Of several devices, the addresses on
    /// that with the number 0: each has networks of its own.
    pub networks: Networks,
}

/// The host's own addresses on an inside device, each with the length of its network's prefix: one
/// of a family, or none.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Networks {
    pub ipv4: Option<Ipv4Net>,
    /// The address of the only guest, which need not be in a network with the host's: that is
    /// written with a length of 32 then.
    pub peer: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Net>,
}

/// One device, or all whose names begin alike.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Devices {
    Named(DeviceName),
    /// Written with a `*` at the end.
    Beginning(DeviceName),
}

impl Devices {
    /// The name, if it is one device.
    #[must_use]
    pub fn name(&self) -> Option<&DeviceName> {
        match self {
            Self::Named(name) => Some(name),
            Self::Beginning(_) => None,
        }
    }

    /// Whether a device of this name is one of several that are meant here.
    #[must_use]
    pub fn include(&self, name: &str) -> bool {
        match self {
            Self::Named(_) => false,
            Self::Beginning(prefix) => name.starts_with(prefix.as_str()),
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => write!(formatter, "{name}"),
            Self::Beginning(prefix) => write!(formatter, "{prefix}*"),
        }
    }
}

impl FromStr for Devices {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some(prefix) = text.strip_suffix('*') else {
            return text.parse().map(Self::Named);
        };
        ensure!(
            !prefix.is_empty(),
            "'*' alone would take the uplink, too: write what the names begin with, as in tap*"
        );
        prefix.parse().map(Self::Beginning)
    }
}

impl Networks {
    /// Whether there is none of either family.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The host's addresses that there are, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + use<> {
        let ipv4 = self.ipv4.map(IpNet::V4);
        ipv4.into_iter().chain(self.ipv6.map(IpNet::V6))
    }

    /// Where guests have IPv4 addresses.
    #[must_use]
    pub fn guests_ipv4(&self) -> Option<Ipv4Net> {
        let peer = self.peer.map(Ipv4Net::from);
        peer.or(self.ipv4.map(|it| it.trunc()))
    }

    /// Where guests have addresses, IPv4 first.
    pub fn guests(&self) -> impl Iterator<Item = IpNet> + use<> {
        let ipv4 = self.guests_ipv4().map(IpNet::V4);
        let ipv6 = self.ipv6.map(|it| IpNet::V6(it.trunc()));
        ipv4.into_iter().chain(ipv6)
    }

    /// The peer of one of the host's addresses.
    #[must_use]
    pub fn peer_of(&self, address: IpNet) -> Option<Ipv4Addr> {
        self.peer.filter(|_| address.addr().is_ipv4())
    }

    /// These, and of a family that is missing here, the other ones.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let ipv4 = if self.ipv4.is_some() { self } else { other };
        Self {
            ipv4: ipv4.ipv4,
            peer: ipv4.peer,
            ipv6: self.ipv6.or(other.ipv6),
        }
    }

    /// The network here that has addresses in common with those of another device: guests' with
    /// guests' or its host's, or the host's with guests'.
    #[must_use]
    pub fn overlapping(&self, other: &Self) -> Option<IpNet> {
        let within = |guests: &Self, others: IpNet| guests.guests().any(|it| overlap(it, others));
        let hosts = |it: &Self| it.iter().map(|it| IpNet::from(it.addr()));
        let of_guests = |network: &IpNet| {
            within(other, *network) || hosts(other).any(|it| overlap(*network, it))
        };
        let mut own = hosts(self);
        self.guests()
            .find(of_guests)
            .or_else(|| own.find(|it| within(other, *it)))
    }
}

/// Whether two networks have addresses in common, which those of different families have not.
#[must_use]
pub fn overlap(one: impl Into<IpNet>, other: impl Into<IpNet>) -> bool {
    let (one, other) = (one.into(), other.into());
    one.contains(&other.network()) || other.contains(&one.network())
}

/// As `--inside` takes them.
impl fmt::Display for Networks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, network) in self.iter().enumerate() {
            let separator = if position == 0 { "" } else { "," };
            write!(
                formatter,
                "{separator}{}",
                Written(network, self.peer_of(network))
            )?;
        }
        Ok(())
    }
}

/// An address of the host's on a device, as `ip address` has it and `--inside` takes it.
pub struct Written(pub IpNet, pub Option<Ipv4Addr>);

impl fmt::Display for Written {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            Some(peer) => write!(formatter, "{} peer {peer}", self.0.addr()),
            None => self.0.fmt(formatter),
        }
    }
}

impl Inside {
    /// The host's addresses on one of several devices. The number at the end of its name is that of
    /// its networks, counted from those that are given: with `tap*=10.0.0.1/24,fd00:7a70::1/64`,
    /// tap3 has 10.0.3.1/24 and `fd00:7a70:0:3::1/64`. None given means those that the device has
    /// already.
    ///
    /// # Errors
    ///
    /// When the name has no number, or there is no such network.
    pub fn networks_on(&self, name: &str) -> Result<Networks> {
        let Devices::Beginning(prefix) = &self.devices else {
            return Ok(self.networks);
        };
        if self.networks.is_empty() {
            return Ok(self.networks);
        }
        let number = name.strip_prefix(prefix.as_str()).unwrap_or_default();
        let number: u32 = number.parse().with_context(|| {
            format!(
                "the name of {name} has no number after '{prefix}' that tells which network it \
                 gets: name it in an --inside of its own"
            )
        })?;
        let mut networks = Networks::default();
        for first in self.networks.iter() {
            let peer = self.networks.peer_of(first);
            let counted = peer.map_or(first, |peer| IpNet::from(IpAddr::V4(peer)));
            let network = numbered(counted, number).with_context(|| {
                format!("there is no network number {number} after {counted}, for {name}")
            })?;
            match (peer, network) {
                // The host has the same address on all of them.
                (Some(_), IpNet::V4(guest)) => {
                    networks.add(first);
                    networks.peer = Some(guest.addr());
                }
                _ => networks.add(network),
            }
        }
        Ok(networks)
    }
}

/// The same address in the network that comes so many after the given one.
fn numbered(first: IpNet, number: u32) -> Option<IpNet> {
    match first {
        IpNet::V4(first) => {
            let size = 1u32.checked_shl(32 - u32::from(first.prefix_len()))?;
            let distance = number.checked_mul(size)?;
            let address = u32::from(first.addr()).checked_add(distance)?;
            let net = Ipv4Net::new(address.into(), first.prefix_len()).ok()?;
            is_unicast(net.addr().into()).then_some(net.into())
        }
        IpNet::V6(first) => {
            let size = 1u128.checked_shl(128 - u32::from(first.prefix_len()))?;
            let distance = u128::from(number).checked_mul(size)?;
            let address = u128::from(first.addr()).checked_add(distance)?;
            let net = Ipv6Net::new(address.into(), first.prefix_len()).ok()?;
            check_ipv6(net).is_ok().then_some(net.into())
        }
    }
}

impl Networks {
    fn add(&mut self, network: IpNet) {
        match network {
            IpNet::V4(network) => self.ipv4 = Some(network),
            IpNet::V6(network) => self.ipv6 = Some(network),
        }
    }
}

impl FromStr for Inside {
    type Err = Error;

    /// Reads `DEVICE` or `DEVICE=ADDRESS/PREFIX[,ADDRESS/PREFIX]`, where the device may end in `*`
    /// and the addresses are of different families.
    fn from_str(text: &str) -> Result<Self> {
        let (device, networks) = match text.split_once('=') {
            None => (text, Networks::default()),
            Some((device, addresses)) => (device, addresses.parse()?),
        };
        Ok(Self {
            devices: device.parse()?,
            networks,
        })
    }
}

impl FromStr for Networks {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure!(
            !text.is_empty(),
            "there is no address after '=': write tap0=10.0.0.1/24"
        );
        let mut networks = Self::default();
        for word in text.split(',') {
            let (network, peer) = match word.split_once(" peer ") {
                Some((host, guest)) => {
                    let (host, guest) = parse_pair(host, guest)?;
                    (host.into(), Some(guest))
                }
                None => (parse_host_address(word)?, None),
            };
            let family = match network {
                IpNet::V4(_) => networks.ipv4.map(|_| "IPv4"),
                IpNet::V6(_) => networks.ipv6.map(|_| "IPv6"),
            };
            if let Some(family) = family {
                bail!(
                    "'{text}' has two {family} networks, and an inside device has one of each \
                     family: give the next one a device of its own"
                );
            }
            networks.add(network);
            networks.peer = networks.peer.or(peer);
        }
        Ok(networks)
    }
}

/// Reads the host's address and that of the one guest.
fn parse_pair(host: &str, guest: &str) -> Result<(Ipv4Net, Ipv4Addr)> {
    let read = |text: &str| -> Result<Ipv4Addr> {
        let text = text.trim();
        let text = text.strip_suffix("/32").unwrap_or(text);
        let address: IpAddr = text.parse().with_context(|| {
            format!("'{text}' is not the address of one host: write 10.0.0.1 peer 10.0.0.10")
        })?;
        let IpAddr::V4(address) = address else {
            bail!(
                "{text} cannot have a peer: give each tap an IPv6 network of its own, such as \
                 fd00:7a70::1/64, in which the guest chooses its address"
            )
        };
        ensure!(
            is_unicast(address.into()),
            "{text} cannot be a host's address: use private ones, as in 10.0.0.1 peer 10.0.0.10"
        );
        Ok(address)
    };
    let (host, guest) = (read(host)?, read(guest)?);
    ensure!(
        host != guest,
        "{host} is the host's address and the guest's at once: write 10.0.0.1 peer 10.0.0.10"
    );
    Ok((host.into(), guest))
}

/// Reads the address of a host with the length of its network's prefix.
fn parse_host_address(text: &str) -> Result<IpNet> {
    match text.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => {
            bail!("{text} has no prefix length: write {text}/24 for a network of 254 guests")
        }
        Ok(IpAddr::V6(_)) => bail!(
            "{text} has no prefix length: write {text}/64, in which guests choose their own \
             addresses"
        ),
        Err(_) => {}
    }
    let net = text.parse::<IpNet>().with_context(|| {
        format!(
            "'{text}' is not an address with a prefix length: write 10.0.0.1/24 or \
             fd00:7a70::1/64"
        )
    })?;
    match net {
        IpNet::V4(net) => check_ipv4(net)?,
        IpNet::V6(net) => check_ipv6(net)?,
    }
    Ok(net)
}

fn check_ipv4(net: Ipv4Net) -> Result<()> {
    let address = net.addr();
    let of_the_network =
        net.prefix_len() < 31 && [net.network(), net.broadcast()].contains(&address);
    if of_the_network {
        let kind = if address == net.network() {
            "network"
        } else {
            "broadcast"
        };
        let first = Ipv4Addr::from(u32::from(net.network()) + 1);
        bail!(
            "{net} is a {kind} address, which no host can have: write {first}/{}",
            net.prefix_len()
        );
    }
    ensure!(
        is_unicast(address.into()),
        "{net} cannot be a host's address: use a private one, such as 10.0.0.1/24"
    );
    ensure!(
        net.prefix_len() < 32,
        "{net} has no room for a guest: write {address}/24, or, for one guest alone, '{address} peer \
         10.0.0.10'"
    );
    Ok(())
}

fn check_ipv6(net: Ipv6Net) -> Result<()> {
    if let Some((_, what)) = NOT_FOR_HOSTS
        .iter()
        .find(|(reserved, _)| overlap(net, *reserved))
    {
        bail!(
            "there are {what} in {}: use a network of your own, such as fd00:7a70::1/64",
            net.trunc()
        );
    }
    ensure!(
        net.prefix_len() < 128,
        "{net} has no room for a guest: write {}/64",
        net.addr()
    );
    // RFC 4291 section 2.6.1, and RFC 6164 for /127.
    if net.addr() == net.network() && net.prefix_len() < 127 {
        let first = Ipv6Addr::from(u128::from(net.network()) + 1);
        bail!(
            "{net} is the address of every router of its network and none of a host: write \
             {first}/{}",
            net.prefix_len()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(text: &str) -> Networks {
        text.parse().unwrap()
    }

    #[test]
    fn reads_inside_devices() {
        let inside: Inside = "tap0=10.0.0.1/24".parse().unwrap();
        assert_eq!(inside.devices.to_string(), "tap0");
        assert_eq!(inside.networks.ipv4, Some("10.0.0.1/24".parse().unwrap()));
        assert_eq!(inside.networks.ipv6, None);
        let inside: Inside = "br0.5=192.168.7.1/31".parse().unwrap();
        assert_eq!(inside.devices.to_string(), "br0.5");
        let inside: Inside = "virbr0".parse().unwrap();
        assert!(inside.networks.is_empty());
    }

    #[test]
    fn a_device_has_a_network_of_each_family() {
        let both = networks("10.0.0.1/24,fd00:7a70::1/64");
        assert_eq!(networks("fd00:7A70::1/64,10.0.0.1/24"), both);
        assert_eq!(both.to_string(), "10.0.0.1/24,fd00:7a70::1/64");
        let inside: Inside = "tap0=fd00:7a70::1/64".parse().unwrap();
        assert_eq!(inside.networks.ipv4, None);
        assert_eq!(inside.networks.to_string(), "fd00:7a70::1/64");
        for text in ["2001:db8::1/56", "fd00::1/126", "fd00::/127", "2001::1/16"] {
            assert!(text.parse::<Networks>().is_ok(), "{text}");
        }
    }

    #[test]
    fn each_of_several_devices_has_networks_of_its_own() {
        let inside: Inside = "tap*=10.0.0.1/24,fd00:7a70::1/64".parse().unwrap();
        assert_eq!(inside.devices.to_string(), "tap*");
        assert!(inside.devices.include("tap7") && !inside.devices.include("veth7"));
        for (name, both) in [
            ("tap0", "10.0.0.1/24,fd00:7a70::1/64"),
            ("tap3", "10.0.3.1/24,fd00:7a70:0:3::1/64"),
            ("tap300", "10.1.44.1/24,fd00:7a70:0:12c::1/64"),
        ] {
            assert_eq!(inside.networks_on(name).unwrap(), networks(both));
        }
        for name in ["tap", "tap-x", "tap4294967295", "tap16777216"] {
            assert!(inside.networks_on(name).is_err(), "{name}");
        }
        let inside: Inside = "vnet*".parse().unwrap();
        assert!(inside.networks_on("vnet3").unwrap().is_empty());
        let inside: Inside = "tap0=10.0.0.1/24".parse().unwrap();
        assert!(!inside.devices.include("tap0"));
    }

    #[test]
    fn a_device_may_have_one_guest_in_no_network_of_the_hosts() {
        let one = networks("169.254.1.1 peer 10.0.0.10,fd00:7a70::1/64");
        assert_eq!(
            networks("fd00:7a70::1/64,169.254.1.1/32 peer 10.0.0.10/32"),
            one
        );
        assert_eq!(
            one.to_string(),
            "169.254.1.1 peer 10.0.0.10,fd00:7a70::1/64"
        );
        let guests: Vec<_> = one.guests().map(|it| it.to_string()).collect();
        assert_eq!(guests, ["10.0.0.10/32", "fd00:7a70::/64"]);

        let inside: Inside = "tap*=10.0.0.1 peer 10.0.0.10".parse().unwrap();
        let on = |name| inside.networks_on(name).unwrap();
        assert_eq!(on("tap0"), networks("10.0.0.1 peer 10.0.0.10"));
        assert_eq!(on("tap3"), networks("10.0.0.1 peer 10.0.0.13"));
        assert_eq!(on("tap0").overlapping(&on("tap3")), None);
        assert!(
            on("tap0")
                .overlapping(&networks("10.0.0.2 peer 10.0.0.10"))
                .is_some()
        );
        assert!(
            on("tap0")
                .overlapping(&networks("10.0.9.1 peer 10.0.0.1"))
                .is_some()
        );
        assert!(on("tap0").overlapping(&networks("10.0.0.1/24")).is_some());
        assert!(networks("10.0.0.1/16").overlapping(&on("tap0")).is_some());
    }

    #[test]
    fn numbers_count_networks_of_any_size() {
        for (first, name, networks) in [
            ("fd00::1/48", "tap2", "fd00:0:2::1/48"),
            ("fd00::1/112", "tap2", "fd00::2:1/112"),
            (
                "fdff:ffff:ffff:ffff::1/64",
                "tap0",
                "fdff:ffff:ffff:ffff::1/64",
            ),
        ] {
            let inside: Inside = format!("tap*={first}").parse().unwrap();
            assert_eq!(inside.networks_on(name).unwrap().to_string(), networks);
        }
        // The next one has link-local addresses, or others that no host has.
        for first in ["fdff:ffff:ffff:ffff::1/64", "fe00::1/9"] {
            let inside: Inside = format!("tap*={first}").parse().unwrap();
            let error = inside.networks_on("tap1");
            assert_eq!(error.is_err(), first == "fe00::1/9", "{first}");
        }
    }

    #[test]
    fn says_what_to_write_instead() {
        for (text, hint) in [
            ("tap0=10.0.0.1", "write 10.0.0.1/24"),
            ("tap0=", "write tap0=10.0.0.1/24"),
            ("=10.0.0.1/24", "write tap0=10.0.0.1/24"),
            ("tap0=10.0.0.0/24", "write 10.0.0.1/24"),
            ("tap0=10.0.0.255/24", "write 10.0.0.1/24"),
            ("tap0=10.0.0.1/33", "write 10.0.0.1/24"),
            ("tap0=host/24", "write 10.0.0.1/24"),
            ("tap0=127.0.0.1/8", "use a private one"),
            ("tap0=10.0.0.1/32", "'10.0.0.1 peer 10.0.0.10'"),
            ("tap0=10.0.0.1 peer 10.0.0.1", "at once"),
            ("tap0=10.0.0.1 peer 10.0.0.0/24", "of one host"),
            ("tap0=10.0.0.1/24 peer 10.0.0.10", "of one host"),
            ("tap0=10.0.0.1 peer 127.0.0.1", "use private ones"),
            ("tap0=fd00::1 peer fd00::2", "an IPv6 network of its own"),
            ("tap0=224.0.0.1/24", "use a private one"),
            ("tap0=10.0.0.1/24,10.0.1.1/24", "a device of its own"),
            ("tap0=fd00::1/64,fd01::1/64", "two IPv6 networks"),
            ("tap0=10.0.0.1/24,", "write 10.0.0.1/24"),
            ("tap0=fd00::1", "write fd00::1/64"),
            ("tap0=fd00::1/129", "write 10.0.0.1/24 or fd00:7a70::1/64"),
            ("tap0=fd00::1%eth0/64", "fd00:7a70::1/64"),
            ("tap0=fd00:1::/64", "write fd00:1::1/64"),
            ("tap0=fd00::1/128", "write fd00::1/64"),
            ("tap0=fe80::1/64", "link-local"),
            ("tap0=ff02::1/64", "multicast"),
            ("tap0=fec0::1/64", "site-local"),
            ("tap0=::1/128", "the loopback's"),
            ("tap0=::ffff:10.0.0.1/120", "reserved"),
            ("tap0=64:ff9b::1/120", "NAT64's"),
            ("tap0=8000::1/1", "multicast addresses in 8000::/1"),
            ("tap0=::1/0", "multicast"),
            ("a-very-long-device-name", "15 letters"),
            ("ta/p", "use letters"),
            ("..", "use letters"),
            ("*", "as in tap*"),
            ("t*p", "use letters"),
            ("tap**", "use letters"),
            ("tap%d=10.0.0.1/24", "use letters"),
        ] {
            let error = format!("{:#}", text.parse::<Inside>().unwrap_err());
            assert!(error.contains(hint), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
