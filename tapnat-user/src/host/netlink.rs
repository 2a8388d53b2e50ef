//! Network devices, addresses and routes of one network namespace, over rtnetlink. Translates
//! between the kernel's messages and plain values; decides nothing.

use std::{
    collections::{BTreeSet, HashMap},
    error::Error as StdError,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures::{Stream, TryStreamExt as _};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rtnetlink::{
    Error, Handle, LinkUnspec, RouteMessageBuilder,
    packet_core::{ErrorMessage, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
            RouteVia,
        },
        tc::{TcAttribute, TcHandle},
    },
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

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
    /// The other end, where that is one host outside of the device's own network.
    pub peer: Option<Ipv4Addr>,
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
    /// How often it has lost its carrier.
    pub carrier_losses: u32,
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
    pub fn first_ipv4_network(&self) -> Option<(Ipv4Net, &Address)> {
        self.ipv4().find(|(_, it)| it.global && !it.secondary)
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

/// Somebody on the link of a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Neighbour {
    pub address: IpAddr,
    pub link_address: [u8; 6],
    /// How long ago it was last known to be there.
    pub since: Duration,
}

/// The route that packets take when no other fits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DefaultRoute {
    pub device_index: u32,
    /// The address that the host's own packets carry on it, when the route names one.
    pub source: Option<Ipv4Addr>,
}

/// The connection ended, or the answer did not come, whatever was asked.
#[derive(Clone, Copy, Debug)]
struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the kernel took no netlink request, or gave no whole answer")
    }
}

impl StdError for Broken {}

/// How long the kernel may take for an answer, which is nearly none.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to the kernel, for the network namespace of the thread that opened it. One that
/// breaks off, as when the kernel has no memory for a request, is made anew for the next one, in the
/// namespace of the thread that asks.
#[derive(Clone, Debug)]
pub struct Netlink {
    connection: Arc<Mutex<Connection>>,
}

#[derive(Debug)]
struct Connection {
    handle: Handle,
    is_over: Arc<AtomicBool>,
}

impl Connection {
    fn open() -> Result<Self> {
        let (mut connection, handle, _) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        // Or an answer that breaks off would look like a whole one.
        connection.set_forward_done(true);
        connection.set_forward_ack(true);
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        tokio::spawn(async move {
            connection.await;
            over.store(true, Ordering::Relaxed);
        });
        Ok(Self { handle, is_over })
    }
}

impl Netlink {
    /// Opens a connection that asks and answers; listening for events takes another one, as both on
    /// one socket deadlock. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the kernel gives no netlink socket.
    pub fn open() -> Result<Self> {
        Ok(Self {
            connection: Arc::new(Mutex::new(Connection::open()?)),
        })
    }

    fn handle(&self) -> Result<Handle> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if connection.is_over.load(Ordering::Relaxed) {
            *connection = Connection::open()?;
        }
        Ok(connection.handle.clone())
    }

    /// Asks for a list. What changes nothing can be asked twice.
    async fn list<S, T>(&self, ask: impl Fn(Handle) -> S) -> Result<Vec<T>>
    where
        S: Stream<Item = Result<T, Error>>,
    {
        match self.list_once(&ask).await {
            Err(error) if error.is::<Broken>() => self.list_once(&ask).await,
            answer => answer,
        }
    }

    async fn list_once<S, T>(&self, ask: impl Fn(Handle) -> S) -> Result<Vec<T>>
    where
        S: Stream<Item = Result<T, Error>>,
    {
        let mut answers = pin!(ask(self.handle()?));
        let mut found = Vec::new();
        loop {
            let answer = timeout(PATIENCE, answers.try_next()).await;
            match answer.context(Broken)? {
                Ok(Some(item)) => found.push(item),
                // The end, without which it is not all.
                Err(Error::UnexpectedMessage(message)) => {
                    check_done(message)?;
                    return Ok(found);
                }
                Ok(None) | Err(Error::RequestFailed) => bail!(Broken),
                Err(error) => return Err(plain(error)),
            }
        }
    }

    /// Has the kernel do something. `false` when what it is to be done to is gone.
    async fn change<F>(&self, request: impl FnOnce(Handle) -> F) -> Result<bool>
    where
        F: Future<Output = Result<(), Error>>,
    {
        let answer = timeout(PATIENCE, request(self.handle()?)).await;
        match answer.context(Broken)? {
            // The acknowledgement is an error without a number.
            Err(Error::NetlinkError(message)) if message.code.is_none() => Ok(true),
            Err(Error::NetlinkError(message)) if means_gone(&message) => Ok(false),
            Ok(()) | Err(Error::RequestFailed) => bail!(Broken),
            Err(error) => Err(plain(error)),
        }
    }

    /// All devices with all their addresses, in the order of their indices.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list them.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let mut addresses = self.addresses().await?;
        let messages = self
            .list(|handle| handle.link().get().execute())
            .await
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
        let messages = self
            .list(|handle| handle.address().get().execute())
            .await
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

    /// The neighbours that the kernel knows of.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list them.
    pub async fn neighbours(&self) -> Result<Vec<NeighbourMessage>> {
        self.list(|handle| handle.neighbours().get().execute())
            .await
            .context("cannot list the neighbours")
    }

    /// Whom the kernel knows behind a device.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the neighbours.
    pub async fn neighbours_on(&self, device: u32) -> Result<Vec<Neighbour>> {
        let neighbours = self.neighbours().await?;
        let there = neighbours.iter().filter(|it| it.header.ifindex == device);
        Ok(there.filter_map(neighbour).collect())
    }

    /// The default route with the smallest metric of the main table, of IPv6 where IPv4 has none. Of
    /// a route with several next hops, the first counts.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the routes.
    pub async fn default_route(&self) -> Result<Option<DefaultRoute>> {
        let ipv4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        if let Some(route) = self.default_route_of(&ipv4).await? {
            return Ok(Some(route));
        }
        let ipv6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        self.default_route_of(&ipv6).await
    }

    async fn routes_of(&self, family: &RouteMessage) -> Result<Vec<RouteMessage>> {
        self.list(|handle| handle.route().get(family.clone()).execute())
            .await
            .context("cannot list the routes")
    }

    async fn default_route_of(&self, family: &RouteMessage) -> Result<Option<DefaultRoute>> {
        let routes = self.routes_of(family).await?;
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
        let mut answers = self.handle()?.route().get(question).execute();
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

    /// The routers that routes of the host lead by, of both IP versions, in all tables.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the routes.
    pub async fn routers(&self) -> Result<Vec<IpAddr>> {
        let ipv4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let ipv6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut routers = Vec::new();
        for family in [ipv4, ipv6] {
            let all = self.routes_of(&family).await?;
            routers.extend(all.iter().flat_map(|route| gateways(&route.attributes)));
        }
        Ok(routers)
    }

    /// The indices of the devices that the kernel has routes on which a router advertised.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the routes.
    pub async fn advertised_to(&self) -> Result<BTreeSet<u32>> {
        let routes = self
            .list(|handle| {
                let question = RouteMessageBuilder::<Ipv6Addr>::new().build();
                handle.route().get(question).execute()
            })
            .await
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
    pub async fn add_address(
        &self,
        device: &Device,
        net: IpNet,
        peer: Option<Ipv4Addr>,
    ) -> Result<()> {
        let add = self.change(|handle| {
            let addresses = handle.address();
            let mut request = addresses.add(device.index, net.addr(), net.prefix_len());
            if let Some(peer) = peer {
                let attributes = &mut request.message_mut().attributes;
                // Nobody else is on the way there.
                attributes.retain(|it| {
                    !matches!(
                        it,
                        AddressAttribute::Address(_) | AddressAttribute::Broadcast(_)
                    )
                });
                attributes.push(AddressAttribute::Address(peer.into()));
            }
            if net.addr().is_ipv6() {
                request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            }
            if net.addr().is_ipv6() && net.prefix_len() == net.max_prefix_len() {
                // Without a network it is for what others send. The host's own connections do not
                // begin from it while it has another one (RFC 6724 section 5, rule 3).
                let mut lifetimes = CacheInfo::default();
                lifetimes.ifa_preferred = 0;
                lifetimes.ifa_valid = u32::MAX;
                let attributes = &mut request.message_mut().attributes;
                attributes.push(AddressAttribute::CacheInfo(lifetimes));
            }
            request.execute()
        });
        add.await
            .and_then(not_gone)
            .with_context(|| format!("cannot put {net} on {device}"))
    }

    /// Takes an address from a device. `false` when the device or the address is gone already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as without `CAP_NET_ADMIN`.
    pub async fn remove_address(
        &self,
        device: &Device,
        net: IpNet,
        peer: Option<Ipv4Addr>,
    ) -> Result<bool> {
        let mut message = AddressMessage::default();
        message.header.family = if net.addr().is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        message.header.index = device.index;
        message.header.prefix_len = net.prefix_len();
        message.attributes.push(AddressAttribute::Local(net.addr()));
        message.attributes.push(AddressAttribute::Address(
            peer.map_or(net.addr(), Into::into),
        ));
        self.change(|handle| handle.address().del(message).execute())
            .await
            .with_context(|| format!("cannot take {net} from {device}"))
    }

    /// Sets a device up.
    ///
    /// # Errors
    ///
    /// When the device is gone or its driver refuses.
    pub async fn set_up(&self, device: &Device) -> Result<()> {
        let message = LinkUnspec::new_with_index(device.index).up().build();
        self.change(|handle| handle.link().set(message).execute())
            .await
            .and_then(not_gone)
            .with_context(|| format!("cannot set {device} up"))
    }

    /// Sets a device down. `false` when it is gone already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as without `CAP_NET_ADMIN`.
    pub async fn set_down(&self, device: &Device) -> Result<bool> {
        let message = LinkUnspec::new_with_index(device.index).down().build();
        self.change(|handle| handle.link().set(message).execute())
            .await
            .with_context(|| format!("cannot set {device} down"))
    }

    /// Removes a device, also from under a program that has it open. `false` when it is gone
    /// already.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as for hardware or without `CAP_NET_ADMIN`.
    pub async fn remove_link(&self, device: &Device) -> Result<bool> {
        self.change(|handle| handle.link().del(device.index).execute())
            .await
            .with_context(|| format!("cannot remove {device}"))
    }

    /// Whether a device has the clsact queueing discipline, which TC programs attach to where the
    /// kernel has no TCX.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list them.
    pub async fn has_clsact(&self, device: &Device) -> Result<bool> {
        let disciplines = self
            .list(|handle| handle.qdisc().get().execute())
            .await
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
        for is_ingress in [true, false] {
            let found = self
                .list(|handle| {
                    let request = handle.traffic_filter(device.index.cast_signed()).get();
                    let request = if is_ingress {
                        request.ingress()
                    } else {
                        request.egress()
                    };
                    request.execute()
                })
                .await
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
        let remove = self.change(|handle| {
            let mut request = handle.qdisc().del(device.index.cast_signed());
            let message = request.message_mut();
            message.header.parent = TcHandle::CLSACT;
            message.header.handle = TcHandle {
                major: TcHandle::CLSACT.major,
                minor: 0,
            };
            message
                .attributes
                .push(TcAttribute::Kind(CLSACT.to_owned()));
            request.execute()
        });
        remove
            .await
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

/// What ends a list, if nothing kept the kernel from going on.
fn check_done(message: NetlinkMessage<RouteNetlinkMessage>) -> Result<()> {
    match message.payload {
        NetlinkPayload::Done(done) if done.code < 0 => {
            bail!(io::Error::from_raw_os_error(-done.code))
        }
        NetlinkPayload::Done(_) => Ok(()),
        _ => bail!(Error::UnexpectedMessage(message)),
    }
}

/// For what cannot be done to a thing that is gone.
fn not_gone(is_there: bool) -> Result<()> {
    ensure!(is_there, "it is gone");
    Ok(())
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
        carrier_losses: 0,
        controller: None,
        lower: None,
        addresses: Vec::new(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::CarrierDownCount(count) => link.carrier_losses = count,
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
    let peer = match (own, either) {
        (Some(own), Some(IpAddr::V4(peer))) if own != peer => {
            (message.header.prefix_len == 32).then_some(peer)
        }
        _ => None,
    };
    Some(Address {
        net: IpNet::new(own.or(either)?, message.header.prefix_len).ok()?,
        peer,
        global: message.header.scope == AddressScope::Universe,
        secondary: flags.contains(AddressHeaderFlags::Secondary),
        permanent: flags.contains(AddressHeaderFlags::Permanent),
        tentative: flags.intersects(unusable) && !flags.contains(AddressHeaderFlags::Optimistic),
        deprecated: flags.contains(AddressHeaderFlags::Deprecated),
    })
}

/// None of one that was asked for and did not answer. The kernel counts time in hundredths of a second
/// (`USER_HZ`). Of a newcomer that has confirmed nothing yet it says a minute; when it last changed the
/// entry says nothing, as it does so when it hears nothing more.
fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let is_there = !matches!(
        message.header.state,
        NeighbourState::Incomplete
            | NeighbourState::Failed
            | NeighbourState::Noarp
            | NeighbourState::None
    );
    let (mut address, mut link_address, mut since) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(it)) => {
                address = Some(IpAddr::V4(*it));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(it)) => {
                address = Some(IpAddr::V6(*it));
            }
            NeighbourAttribute::LinkLocalAddress(bytes) => {
                link_address = bytes.as_slice().try_into().ok();
            }
            NeighbourAttribute::CacheInfo(it) => since = Some(it.confirmed),
            _ => {}
        }
    }
    Some(Neighbour {
        address: address.filter(|_| is_there)?,
        link_address: link_address?,
        since: Duration::from_millis(u64::from(since?) * 10),
    })
}

/// The routers that a route names, of all its next hops. One of IPv4 may lead by a router of IPv6
/// (RFC 8950).
fn gateways(attributes: &[RouteAttribute]) -> Vec<IpAddr> {
    let of_one = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address))
        | RouteAttribute::Via(RouteVia::Inet(address)) => vec![IpAddr::V4(*address)],
        RouteAttribute::Gateway(RouteAddress::Inet6(address))
        | RouteAttribute::Via(RouteVia::Inet6(address)) => vec![IpAddr::V6(*address)],
        RouteAttribute::MultiPath(hops) => {
            let hops = hops.iter();
            hops.flat_map(|hop| gateways(&hop.attributes)).collect()
        }
        _ => Vec::new(),
    };
    attributes.iter().flat_map(of_one).collect()
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
