//! A device that the datapath works on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::Serialize;
use tapnat_common::{
    abi::{Device, role},
    net::{Address as _, Be32, Be128},
};

use super::{Label, label};
use crate::{config::Written, journal::Role};

/// What packets begin with on a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkLayer {
    Ethernet,
    /// The IP header.
    None,
}

impl Label for LinkLayer {
    fn label(self) -> &'static str {
        match self {
            Self::Ethernet => "ethernet",
            Self::None => "none",
        }
    }
}

/// A device that the datapath works on.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct DeviceView {
    /// Null when this host does not know it by a name.
    pub name: Option<String>,
    pub index: u32,
    #[serde(serialize_with = "label::by_name")]
    pub role: Role,
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
    #[serde(serialize_with = "label::by_name")]
    pub link_layer: LinkLayer,
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
        self.role == Role::Inside
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
            role: if device.role == role::UPLINK {
                Role::Uplink
            } else {
                Role::Inside
            },
            address: ipv4.map(|it| it.address.into()),
            prefix_length: ipv4.map(|it| prefix_length(&it.mask.bytes())),
            peer: ipv4
                .filter(|it| !it.contains(it.address))
                .map(|it| it.network.into()),
            ipv6_address: ipv6.map(|it| it.address.into()),
            ipv6_prefix_length: ipv6.map(|it| prefix_length(&it.mask.bytes())),
            mtu: device.mtu,
            link_layer: if device.ethernet == 0 {
                LinkLayer::None
            } else {
                LinkLayer::Ethernet
            },
        }
    }

    /// Whether frames have an Ethernet header.
    #[must_use]
    pub fn is_ethernet(&self) -> bool {
        self.link_layer == LinkLayer::Ethernet
    }
}

fn prefix_length(mask: &[u8]) -> u8 {
    let ones: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    // There are 128 at most.
    u8::try_from(ones).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::address;

    const TAP: u32 = 7;

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
}
