//! The IP versions as user space writes them: addresses and prefixes. What the datapath makes of
//! them is [`tapnat_common`]'s.

use std::{fmt::Debug, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tapnat_common::{
    abi::Family,
    net::{Be32, Be128},
};

use crate::{
    config::Networks,
    host::{netlink::Link, sysctl::Sysctl},
};

/// An IP version.
pub trait IpFamily: Family + Default + Into<IpAddr> {
    /// A prefix of addresses.
    type Net: Copy + Debug + Ord + Into<IpNet>;
    /// Its name, in messages.
    const NAME: &str;

    /// The prefix with this address and length, which must not be longer than an address.
    fn net(address: Self, length: u8) -> Option<Self::Net>;
    /// The first address of a prefix, and its length.
    fn parts(net: Self::Net) -> (Self, u8);
    /// A prefix, if it is of this version.
    fn from_net(net: IpNet) -> Option<Self::Net>;
    /// The address that was written with a prefix, and its length.
    fn host(net: Self::Net) -> (Self, u8);
    /// An address, if it is of this version.
    fn from_ip(address: IpAddr) -> Option<Self>;
    /// Whether the host forwards what arrives on this device.
    fn forwarding(device: &str) -> Sysctl;
    /// The host's address on an inside device.
    fn of(networks: &Networks) -> Option<Self::Net>;
    /// Where guests have their addresses there.
    fn guests(networks: &Networks) -> Option<Self::Net>;
    /// The address that a device has for good, or at least as long as it is there.
    fn primary(link: &Link) -> Option<Self::Net>;
    /// The address of the uplink that stands for guests, where the operator named none. `before` are
    /// those that did so far.
    fn outside(uplink: &Link, before: &[IpAddr]) -> Option<Self>;
    /// The length of the prefixes that have this mask.
    fn length(mask: Self) -> u8 {
        let mut lengths = 0..=Self::BITS;
        let found = lengths.find(|length| Self::mask(*length) == mask);
        found.unwrap_or(Self::BITS)
    }
    /// Whether a device has this address now.
    fn is_on(self, link: &Link) -> bool {
        let address: IpAddr = self.into();
        link.addresses.iter().any(|it| it.net.addr() == address)
    }
}

impl IpFamily for Be32 {
    type Net = Ipv4Net;
    const NAME: &str = "IPv4";

    fn net(address: Self, length: u8) -> Option<Ipv4Net> {
        Ipv4Net::new(address.into(), length).ok()
    }

    fn parts(net: Ipv4Net) -> (Self, u8) {
        (net.network().into(), net.prefix_len())
    }

    fn from_net(net: IpNet) -> Option<Ipv4Net> {
        match net {
            IpNet::V4(net) => Some(net),
            IpNet::V6(_) => None,
        }
    }

    fn host(net: Ipv4Net) -> (Self, u8) {
        (net.addr().into(), net.prefix_len())
    }

    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(address) => Some(address.into()),
            IpAddr::V6(_) => None,
        }
    }

    fn forwarding(device: &str) -> Sysctl {
        Sysctl::forwarding(device)
    }

    fn of(networks: &Networks) -> Option<Ipv4Net> {
        networks.ipv4
    }

    fn guests(networks: &Networks) -> Option<Ipv4Net> {
        networks.guests_ipv4()
    }

    fn primary(link: &Link) -> Option<Ipv4Net> {
        link.primary_ipv4()
    }

    /// One that is still there goes on.
    fn outside(uplink: &Link, before: &[IpAddr]) -> Option<Self> {
        let before = before.iter().filter_map(|address| Self::from_ip(*address));
        let mut kept = before.filter(|address| address.is_on(uplink));
        kept.next()
            .or_else(|| Self::primary(uplink).map(|net| Self::host(net).0))
    }
}

impl IpFamily for Be128 {
    type Net = Ipv6Net;
    const NAME: &str = "IPv6";

    fn net(address: Self, length: u8) -> Option<Ipv6Net> {
        Ipv6Net::new(address.into(), length).ok()
    }

    fn parts(net: Ipv6Net) -> (Self, u8) {
        (net.network().into(), net.prefix_len())
    }

    fn from_net(net: IpNet) -> Option<Ipv6Net> {
        match net {
            IpNet::V4(_) => None,
            IpNet::V6(net) => Some(net),
        }
    }

    fn host(net: Ipv6Net) -> (Self, u8) {
        (net.addr().into(), net.prefix_len())
    }

    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.into()),
        }
    }

    fn forwarding(device: &str) -> Sysctl {
        Sysctl::forwarding_ipv6(device)
    }

    fn of(networks: &Networks) -> Option<Ipv6Net> {
        networks.ipv6
    }

    fn guests(networks: &Networks) -> Option<Ipv6Net> {
        networks.ipv6
    }

    fn primary(link: &Link) -> Option<Ipv6Net> {
        link.primary_ipv6()
    }

    /// One that gives way to another is there for a while yet (RFC 4862 section 5.5.4), so that it is
    /// there says nothing. Those that do not are told by their age.
    fn outside(uplink: &Link, _before: &[IpAddr]) -> Option<Self> {
        Self::primary(uplink).map(|net| Self::host(net).0)
    }
}
