//! What an instance is asked to do, before it is compared with the host: values that are right by
//! themselves. Where they came from, command line or file, does not show here.

use std::{net::Ipv4Addr, ops::RangeInclusive, str::FromStr};

use anyhow::{Context as _, Error, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net};

use crate::{host::tap::Queues, instance::InstanceName};

/// Ports that no guest gets unless asked for: a low source port means privilege to some servers.
pub const DEFAULT_PORTS: RangeInclusive<u16> = 1024..=65535;
/// Sessions that the tables have room for.
pub const DEFAULT_MAX_SESSIONS: u32 = 65536;

/// `IFNAMSIZ` without the terminating zero.
const LONGEST_DEVICE_NAME: usize = 15;

/// Everything that `tapnat run` can be told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    pub instance: InstanceName,
    pub insides: Vec<Inside>,
    /// None means the device of the default route.
    pub uplink: Option<DeviceName>,
    /// None given means the uplink's own address.
    pub outside_addresses: Vec<Ipv4Addr>,
    /// Ports of the outside addresses that guests may get.
    pub ports: RangeInclusive<u16>,
    pub max_sessions: u32,
    /// Count packets and bytes of each session.
    pub count: bool,
    /// Log packets from the datapath.
    pub verbose: bool,
    /// How many queues a tap that tapnat creates can have.
    pub tap_queues: Queues,
    /// Leave the datapath in place when the process ends.
    pub keep: bool,
}

/// A device that guests are behind, and the host's addresses on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Inside {
    pub device: DeviceName,
    /// None given means those that the device has already.
    pub addresses: Vec<Ipv4Net>,
}

impl FromStr for Inside {
    type Err = Error;

    /// Reads `DEVICE` or `DEVICE=ADDRESS/PREFIX[,ADDRESS/PREFIX..]`.
    fn from_str(text: &str) -> Result<Self> {
        let (device, addresses) = match text.split_once('=') {
            None => (text, Vec::new()),
            Some((device, list)) => (
                device,
                list.split(',')
                    .map(parse_host_address)
                    .collect::<Result<_>>()?,
            ),
        };
        Ok(Self {
            device: device.parse()?,
            addresses,
        })
    }
}

/// Reads the address of a host with the length of its network's prefix.
fn parse_host_address(text: &str) -> Result<Ipv4Net> {
    ensure!(
        !text.is_empty(),
        "there is no address after '=': write tap0=10.0.0.1/24"
    );
    if text.parse::<Ipv4Addr>().is_ok() {
        bail!("{text} has no prefix length: write {text}/24 for a network of 254 guests");
    }
    let net = text.parse::<IpNet>().with_context(|| {
        format!("'{text}' is not an address with a prefix length: write 10.0.0.1/24")
    })?;
    let IpNet::V4(net) = net else {
        bail!("{text} is an IPv6 address, which tapnat does not translate: give an IPv4 address");
    };
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
            "{text} is a {kind} address, which no host can have: write {first}/{}",
            net.prefix_len()
        );
    }
    ensure!(
        is_unicast(address),
        "{text} cannot be a host's address: use a private one, such as 10.0.0.1/24"
    );
    Ok(net)
}

/// Reads an outside address.
///
/// # Errors
///
/// When it is not an IPv4 address that a host can have.
pub fn parse_outside_address(text: &str) -> Result<Ipv4Addr> {
    let address = text
        .parse::<Ipv4Addr>()
        .with_context(|| format!("'{text}' is not an IPv4 address: write 203.0.113.5"))?;
    ensure!(is_unicast(address), "{text} cannot be a host's address");
    Ok(address)
}

fn is_unicast(address: Ipv4Addr) -> bool {
    let reserved = address.octets()[0] == 0 || address.octets()[0] >= 240;
    !(reserved || address.is_loopback() || address.is_multicast())
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

impl std::fmt::Display for DeviceName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_inside_devices() {
        let inside: Inside = "tap0=10.0.0.1/24".parse().unwrap();
        assert_eq!(inside.device.as_str(), "tap0");
        assert_eq!(
            inside.addresses,
            ["10.0.0.1/24".parse::<Ipv4Net>().unwrap()]
        );
        let inside: Inside = "br0.5=10.0.0.1/24,192.168.7.1/31".parse().unwrap();
        assert_eq!(inside.addresses.len(), 2);
        let inside: Inside = "virbr0".parse().unwrap();
        assert!(inside.addresses.is_empty());
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
            ("tap0=224.0.0.1/24", "use a private one"),
            ("tap0=fd00::1/64", "give an IPv4 address"),
            ("a-very-long-device-name", "15 letters"),
            ("ta/p", "use letters"),
            ("..", "use letters"),
            ("tap*", "use letters"),
            ("tap%d=10.0.0.1/24", "use letters"),
        ] {
            let error = format!("{:#}", text.parse::<Inside>().unwrap_err());
            assert!(error.contains(hint), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn reads_outside_addresses() {
        assert!(parse_outside_address("203.0.113.5").is_ok());
        for text in [
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
