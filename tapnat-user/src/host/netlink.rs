//! Network devices, addresses and routes of one network namespace, over rtnetlink. Translates
//! between the kernel's messages and plain values; decides nothing.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result, anyhow};
use futures::TryStreamExt as _;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rtnetlink::{
    Error, Handle, IpVersion, LinkUnspec, RouteMessageBuilder,
    packet_core::ErrorMessage,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::NeighbourMessage,
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
        },
        tc::{TcAttribute, TcHandle},
    },
};
use serde::{Deserialize, Serialize};

/// The kind of the queueing discipline that TC programs attach to without TCX.
const CLSACT: &str = "clsact";

/// A network device as the journal remembers it. The index stands for one device for as long as
/// its namespace lives; the name is for people, and may have changed.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    pub index: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.name)
    }
}

/// What a device puts before the IP header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkLayer {
    /// Ethernet: taps, bridges, veths, NICs, VLANs, bonds.
    Ethernet,
    /// Nothing: tuns, `WireGuard`, PPP, IP tunnels.
    None,
    /// Neither of them; holds the kernel's `ARPHRD_` number.
    Other(u16),
}

/// An address of a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the kernel's"
)]
pub struct Address {
    /// The device's own address with the length of its network's prefix. On a point-to-point device
    /// this is not the peer's.
    pub net: IpNet,
    /// Valid beyond this host and this link.
    pub global: bool,
    /// A later address of a network that the device already had one in.
    pub secondary: bool,
    /// Given for good, not for a time by a router or a server.
    pub permanent: bool,
    /// Not to be used yet, or never: somebody else may have it (RFC 4862 section 5.4).
    pub tentative: bool,
    /// Gives way to another one: what begins does not begin from it (RFC 4862 section 5.5.4).
    pub deprecated: bool,
}

/// A network device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub layer: LinkLayer,
    /// The kernel driver's word for it, such as `tun`, `veth` or `bridge`; none for hardware.
    pub kind: Option<String>,
    /// On Ethernet devices only.
    pub mac: Option<[u8; 6]>,
    /// Bytes, link layer header excluded.
    pub mtu: u32,
    /// Set up by the administrator (`IFF_UP`).
    pub up: bool,
    /// Set up, and the other end is there (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// The bridge or bond that the device is a port of.
    pub controller: Option<u32>,
    /// The device that this one stands on, as a VLAN does. The other end, of a veth.
    pub lower: Option<u32>,
    pub addresses: Vec<Address>,
}

impl Link {
    /// How the journal remembers this device.
    #[must_use]
    pub fn device(&self) -> Device {
        Device {
            name: self.name.clone(),
            index: self.index,
        }
    }

    /// The IPv4 addresses, in the kernel's order.
    pub fn ipv4(&self) -> impl Iterator<Item = (Ipv4Net, &Address)> {
        self.addresses
            .iter()
            .filter_map(|address| match address.net {
                IpNet::V4(net) => Some((net, address)),
                IpNet::V6(_) => None,
            })
    }

    /// The IPv6 addresses, in the kernel's order.
    pub fn ipv6(&self) -> impl Iterator<Item = (Ipv6Net, &Address)> {
        self.addresses
            .iter()
            .filter_map(|address| match address.net {
                IpNet::V6(net) => Some((net, address)),
                IpNet::V4(_) => None,
            })
    }

    /// The first IPv4 address of its own network that the device has, where guests can be.
    #[must_use]
    pub fn first_ipv4_network(&self) -> Option<Ipv4Net> {
        self.ipv4()
            .find(|(_, it)| it.global && !it.secondary)
            .map(|(net, _)| net)
    }

    /// The first IPv6 address that makes the host the router of guests there. Where it got its
    /// address from a router, that one is the guests', too.
    #[must_use]
    pub fn first_ipv6_network(&self) -> Option<Ipv6Net> {
        self.ipv6()
            .find(|(net, it)| it.global && it.permanent && net.prefix_len() < 128)
            .map(|(net, _)| net)
    }

    /// The link-local address that the device uses, if it has one yet.
    #[must_use]
    pub fn link_local(&self) -> Option<Ipv6Addr> {
        self.ipv6()
            .find(|(net, it)| net.addr().is_unicast_link_local() && !it.tentative)
            .map(|(net, _)| net.addr())
    }

    /// The first IPv4 address that the world can answer to.
    #[must_use]
    pub fn primary_ipv4(&self) -> Option<Ipv4Net> {
        let usable = |secondary| {
            self.ipv4()
                .find(move |(_, address)| address.global && address.secondary == secondary)
        };
        usable(false).or_else(|| usable(true)).map(|(net, _)| net)
    }

    /// The IPv6 address that stands for the device in the world: valid everywhere, in use, not one
    /// of those that change all the time (RFC 8981; the kernel calls them secondary), rather one that
    /// stays than one that gives way to another, rather of the world than of the site (RFC 4193), and
    /// rather for good than for as long as a router says. Of those that are as good it is the first
    /// that there was, and the kernel puts the last one first (`ipv6_link_dev_addr()` in
    /// `net/ipv6/addrconf.c`).
    #[must_use]
    pub fn primary_ipv6(&self) -> Option<Ipv6Net> {
        let mut best = None;
        for (net, address) in self.ipv6() {
            if !address.global || address.secondary || address.tentative {
                continue;
            }
            let rank = (
                !address.deprecated,
                !net.addr().is_unique_local(),
                address.permanent,
            );
            if best.is_none_or(|(best, _)| rank >= best) {
                best = Some((rank, net));
            }
        }
        best.map(|(_, net)| net)
    }
}

/// The route that packets take when no other fits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DefaultRoute {
    pub device_index: u32,
    /// The address that the host's own packets carry on it, when the route names one.
    pub source: Option<Ipv4Addr>,
}

/// A connection to the kernel, for the network namespace of the thread that opened it.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a connection that asks and answers; listening for events takes another one, as both on
    /// one socket deadlock. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the kernel gives no netlink socket.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All devices with all their addresses, in the order of their indices.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list them.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let mut addresses = self.addresses().await?;
        let messages: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(plain)
            .context("cannot list the network devices")?;
        let mut links: Vec<_> = messages.into_iter().filter_map(link).collect();
        for link in &mut links {
            link.addresses = addresses.remove(&link.index).unwrap_or_default();
        }
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    /// The device called `name`, if there is one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the devices.
    pub async fn link(&self, name: &str) -> Result<Option<Link>> {
        Ok(self
            .links()
            .await?
            .into_iter()
            .find(|link| link.name == name))
    }

    async fn addresses(&self) -> Result<HashMap<u32, Vec<Address>>> {
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(plain)
            .context("cannot list the addresses")?;
        let mut addresses: HashMap<u32, Vec<Address>> = HashMap::new();
        for message in messages {
            if let Some(address) = address(&message) {
                addresses
                    .entry(message.header.index)
                    .or_default()
                    .push(address);
            }
        }
        Ok(addresses)
    }

    /// The IPv4 neighbours that the kernel knows of.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list them.
    pub async fn neighbours(&self) -> Result<Vec<NeighbourMessage>> {
        let neighbours = self.handle.neighbours();
        let request = neighbours.get().set_family(IpVersion::V4).execute();
        let neighbours = request.try_collect().await.map_err(plain);
        neighbours.context("cannot list the neighbours")
    }

    /// The default route with the smallest metric of the main table, of IPv6 where IPv4 has none. Of
    /// a route with several next hops, the first counts.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the routes.
    pub async fn default_route(&self) -> Result<Option<DefaultRoute>> {
        let ipv4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        if let Some(route) = self.default_route_of(ipv4).await? {
            return Ok(Some(route));
        }
        let ipv6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        self.default_route_of(ipv6).await
    }

    async fn default_route_of(&self, family: RouteMessage) -> Result<Option<DefaultRoute>> {
        let routes: Vec<_> = self
            .handle
            .route()
            .get(family)
            .execute()
            .try_collect()
            .await
            .map_err(plain)
            .context("cannot list the routes")?;
        Ok(routes
            .iter()
            .filter_map(default_route)
            .min_by_key(|(metric, _)| *metric)
            .map(|(_, route)| route))
    }

    /// The index of the device by which the kernel would send on to this address; None where the
    /// address is the host's own, or there is no way there.
    ///
    /// # Errors
    ///
    /// When the kernel gives no answer.
    pub async fn route_to(&self, destination: IpAddr) -> Result<Option<u32>> {
        let length = IpNet::from(destination).prefix_len();
        let question = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination, length)
            .context("no route can be asked for")?
            .build();
        let mut answers = self.handle.route().get(question).execute();
        let answer = match answers.try_next().await {
            Ok(answer) => answer.context("the kernel does not tell a route")?,
            Err(Error::NetlinkError(error))
                if [
                    -libc::ENETUNREACH,
                    -libc::EHOSTUNREACH,
                    -libc::EACCES,
                    -libc::EINVAL,
                ]
                .contains(&error.raw_code()) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(plain(error)).context("the kernel does not tell a route"),
        };
        if answer.header.kind != RouteType::Unicast {
            return Ok(None);
        }
        Ok(answer
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            }))
    }

    /// The indices of the devices that the kernel has routes on which a router advertised.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the routes.
    pub async fn advertised_to(&self) -> Result<BTreeSet<u32>> {
        let routes: Vec<_> = self
            .handle
            .route()
            .get(RouteMessageBuilder::<Ipv6Addr>::new().build())
            .execute()
            .try_collect()
            .await
            .map_err(plain)
            .context("cannot list the IPv6 routes")?;
        let devices = routes
            .iter()
            .filter(|route| route.header.protocol == RouteProtocol::Ra)
            .flat_map(|route| &route.attributes)
            .filter_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(vec![*index]),
                RouteAttribute::MultiPath(hops) => {
                    Some(hops.iter().map(|hop| hop.interface_index).collect())
                }
                _ => None,
            });
        Ok(devices.flatten().collect())
    }

    /// Puts an address on a device. An IPv6 address is usable at once, without asking whether
    /// somebody else has it: nobody else may.
    ///
    /// # Errors
    ///
    /// When the device is gone or the address is there already.
    pub async fn add_address(&self, device: &Device, net: IpNet) -> Result<()> {
        let addresses = self.handle.address();
        let mut request = addresses.add(device.index, net.addr(), net.prefix_len());
        if net.addr().is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        if net.addr().is_ipv6() && net.prefix_len() == net.max_prefix_len() {
            // Without a network it is for what others send. The host's own connections do not begin
            // from it while it has another one (RFC 6724 section 5, rule 3).
            let mut lifetimes = CacheInfo::default();
            lifetimes.ifa_preferred = 0;
            lifetimes.ifa_valid = u32::MAX;
            let attributes = &mut request.message_mut().attributes;
            attributes.push(AddressAttribute::CacheInfo(lifetimes));
        }
        request
            .execute()
            .await
            .map_err(plain)
            .with_context(|| format!("cannot put {net} on {device}"))
    }

    /// Takes an address from a device. `false` when the device or the address is gone already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as without `CAP_NET_ADMIN`.
    pub async fn remove_address(&self, device: &Device, net: IpNet) -> Result<bool> {
        let mut message = AddressMessage::default();
        message.header.family = if net.addr().is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        message.header.index = device.index;
        message.header.prefix_len = net.prefix_len();
        message.attributes.push(AddressAttribute::Local(net.addr()));
        message
            .attributes
            .push(AddressAttribute::Address(net.addr()));
        gone_is_false(self.handle.address().del(message).execute().await)
            .with_context(|| format!("cannot take {net} from {device}"))
    }

    /// Sets a device up.
    ///
    /// # Errors
    ///
    /// When the device is gone or its driver refuses.
    pub async fn set_up(&self, device: &Device) -> Result<()> {
        let message = LinkUnspec::new_with_index(device.index).up().build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(plain)
            .with_context(|| format!("cannot set {device} up"))
    }

    /// Sets a device down. `false` when it is gone already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as without `CAP_NET_ADMIN`.
    pub async fn set_down(&self, device: &Device) -> Result<bool> {
        let message = LinkUnspec::new_with_index(device.index).down().build();
        gone_is_false(self.handle.link().set(message).execute().await)
            .with_context(|| format!("cannot set {device} down"))
    }

    /// Removes a device, also from under a program that has it open. `false` when it is gone
    /// already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as for hardware or without `CAP_NET_ADMIN`.
    pub async fn remove_link(&self, device: &Device) -> Result<bool> {
        gone_is_false(self.handle.link().del(device.index).execute().await)
            .with_context(|| format!("cannot remove {device}"))
    }

    /// Whether a device has the clsact queueing discipline, which TC programs attach to where the
    /// kernel has no TCX.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list them.
    pub async fn has_clsact(&self, device: &Device) -> Result<bool> {
        let disciplines: Vec<_> = self
            .handle
            .qdisc()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(plain)
            .context("cannot list the queueing disciplines")?;
        let clsact = TcAttribute::Kind(CLSACT.to_owned());
        Ok(disciplines.iter().any(|discipline| {
            discipline.header.index.cast_unsigned() == device.index
                && discipline.attributes.contains(&clsact)
        }))
    }

    /// How many filters a device has in its clsact queueing discipline, both ways.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list them.
    pub async fn clsact_filters(&self, device: &Device) -> Result<usize> {
        let mut filters = 0;
        let get = || self.handle.traffic_filter(device.index.cast_signed()).get();
        for request in [get().ingress(), get().egress()] {
            let found: Vec<_> = request
                .execute()
                .try_collect()
                .await
                .map_err(plain)
                .with_context(|| format!("cannot list the filters of {device}"))?;
            filters += found.len();
        }
        Ok(filters)
    }

    /// Removes the clsact queueing discipline from a device with everything in it. `false` when it
    /// or the device is gone already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as without `CAP_NET_ADMIN`.
    pub async fn remove_clsact(&self, device: &Device) -> Result<bool> {
        let mut request = self.handle.qdisc().del(device.index.cast_signed());
        let message = request.message_mut();
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle {
            major: TcHandle::CLSACT.major,
            minor: 0,
        };
        message
            .attributes
            .push(TcAttribute::Kind(CLSACT.to_owned()));
        gone_is_false(request.execute().await)
            .with_context(|| format!("cannot remove clsact from {device}"))
    }
}

/// Turns the netlink library's error, which prints whole messages, into the operating system's.
fn plain(error: Error) -> anyhow::Error {
    match error {
        Error::NetlinkError(message) => message.to_io().into(),
        other => anyhow!(other),
    }
}

fn gone_is_false(result: Result<(), Error>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::NetlinkError(message)) if means_gone(&message) => Ok(false),
        Err(error) => Err(plain(error)),
    }
}

fn means_gone(message: &ErrorMessage) -> bool {
    [libc::ENODEV, libc::ENOENT, libc::EADDRNOTAVAIL].contains(&-message.raw_code())
}

fn link(message: LinkMessage) -> Option<Link> {
    let header = message.header;
    let mut link = Link {
        index: header.index,
        name: String::new(),
        layer: match header.link_layer_type {
            LinkLayerType::Ether => LinkLayer::Ethernet,
            LinkLayerType::None
            | LinkLayerType::Ppp
            | LinkLayerType::Rawip
            | LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre
            | LinkLayerType::Ip6gre => LinkLayer::None,
            other => LinkLayer::Other(other as u16),
        },
        kind: None,
        mac: None,
        mtu: 0,
        up: header.flags.contains(LinkFlags::Up),
        carrier: header.flags.contains(LinkFlags::LowerUp),
        controller: None,
        lower: None,
        addresses: Vec::new(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::Link(index) => link.lower = Some(index),
            LinkAttribute::Address(bytes) if link.layer == LinkLayer::Ethernet => {
                link.mac = bytes.try_into().ok();
            }
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind),
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

/// `IFA_LOCAL` is the device's own address where it differs from `IFA_ADDRESS`, the peer's
/// (`include/uapi/linux/if_addr.h`). IPv6 often has `IFA_ADDRESS` alone.
fn address(message: &AddressMessage) -> Option<Address> {
    let (mut own, mut either) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => own = Some(*address),
            AddressAttribute::Address(address) => either = Some(*address),
            _ => {}
        }
    }
    let flags = message.header.flags;
    let unusable = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
    Some(Address {
        net: IpNet::new(own.or(either)?, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
        secondary: flags.contains(AddressHeaderFlags::Secondary),
        permanent: flags.contains(AddressHeaderFlags::Permanent),
        tentative: flags.intersects(unusable) && !flags.contains(AddressHeaderFlags::Optimistic),
        deprecated: flags.contains(AddressHeaderFlags::Deprecated),
    })
}

fn default_route(message: &RouteMessage) -> Option<(u32, DefaultRoute)> {
    let header = &message.header;
    if header.destination_prefix_length != 0
        || header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
    {
        return None;
    }
    let (mut metric, mut device, mut source) = (0, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::MultiPath(hops) => {
                device = device.or(hops.first().map(|hop| hop.interface_index));
            }
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(*address),
            _ => {}
        }
    }
    Some((
        metric,
        DefaultRoute {
            device_index: device?,
            source,
        },
    ))
}
