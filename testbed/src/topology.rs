//! The standard world: guests, a host that is to translate for them, an
//! optional router, and the outside world with several addresses.
//!
//! ```text
//! guest0 -- tap|veth|bridge|tun -- host -- uplink0 -- [router] -- world
//! 10.0.0.10        (10.0.0.1)       198.51.100.2  .1         203.0.113.1 .2
//! ```
//!
//! The host's inside address is not set here: that is the job of whatever
//! translates ([`Topology::set_inside_addresses`] plays it for plain
//! forwarding). The world has no route to the guests, so a packet that leaves
//! untranslated gets no answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    Namespace,
    cable::{Cable, Layer, Options, TunTap},
};

/// The host's device towards the world.
pub const UPLINK: &str = "uplink0";
/// The host's address on the uplink, of a /24.
pub const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// Next hop of the host's default route: the world itself, or the router.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The world's addresses behind the next hop, for servers that differ only in
/// address. Without a router the world also answers at [`GATEWAY`].
pub const WORLD_ADDRESSES: [Ipv4Addr; 2] =
    [Ipv4Addr::new(203, 0, 113, 1), Ipv4Addr::new(203, 0, 113, 2)];
/// The router's address towards the world, and the world's towards it.
pub const ROUTER_LINK: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];

/// The host's IPv6 address on the uplink, of a /64.
pub const HOST_ADDRESS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
/// IPv6 next hop of the host's default route.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
/// The world's IPv6 addresses.
pub const WORLD_ADDRESSES6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2),
];
/// The router's IPv6 address towards the world, and the world's towards it.
pub const ROUTER_LINK6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 2),
];

/// A guest's only device.
pub const GUEST_DEVICE: &str = "lan0";

/// What joins the guests to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    /// A tap for each guest (`tap0`, `tap1`, ..) with a network of its own.
    Tap(Tap),
    /// A veth for each guest (`veth0`, ..) with a network of its own.
    Veth,
    /// One bridge `br0` with a veth port (`port0`, ..) for each guest, all in
    /// one network.
    Bridge,
    /// An L3 tun for each guest (`tun0`, ..) with a network of its own.
    Tun,
}

/// How the host's taps come to be and what the guests' ends can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tap {
    /// Who makes the host's end. If not the testbed, the guests are plugged
    /// in with [`Topology::plug_in`] once the taps are there.
    pub made_by: TapMaker,
    /// Queues for each guest.
    pub queues: usize,
    /// Whether the guests have segmentation and checksum offloads.
    pub offloads: bool,
}

/// Who makes the host's taps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapMaker {
    /// This crate, as persistent devices.
    Testbed,
    /// The program under test.
    Program,
}

impl Default for Tap {
    fn default() -> Self {
        Self {
            made_by: TapMaker::Testbed,
            queues: 1,
            offloads: true,
        }
    }
}

/// What joins the host to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uplink {
    /// A veth.
    Ethernet,
    /// A tun, which has no Ethernet header and no neighbours.
    Tun,
}

/// Which families of IP have addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Families {
    Ipv4,
    Both,
    /// Hosts have both, and guests only IPv6.
    Ipv6Guests,
    Ipv6,
}

impl Families {
    fn have_ipv4(self) -> bool {
        self != Self::Ipv6
    }

    fn have_guests_ipv4(self) -> bool {
        matches!(self, Self::Ipv4 | Self::Both)
    }

    fn have_ipv6(self) -> bool {
        self != Self::Ipv4
    }
}

/// What to build. Defaults: one guest on a tap that the testbed makes, an
/// Ethernet uplink, no router, MTU 1500 everywhere, no IPv6.
#[derive(Debug, Clone)]
pub struct Builder {
    inside: Inside,
    guests: u8,
    uplink: Uplink,
    router: bool,
    families: Families,
    inside_mtu: Option<u32>,
    uplink_mtu: Option<u32>,
    path_mtu: Option<u32>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            inside: Inside::Tap(Tap::default()),
            guests: 1,
            uplink: Uplink::Ethernet,
            router: false,
            families: Families::Ipv4,
            inside_mtu: None,
            uplink_mtu: None,
            path_mtu: None,
        }
    }
}

impl Builder {
    /// Chooses what joins guests and host.
    #[must_use]
    pub fn inside(mut self, inside: Inside) -> Self {
        self.inside = inside;
        self
    }

    /// Chooses how many guests there are (at most 100).
    #[must_use]
    pub fn guests(mut self, guests: u8) -> Self {
        self.guests = guests;
        self
    }

    /// Chooses what joins host and world.
    #[must_use]
    pub fn uplink(mut self, uplink: Uplink) -> Self {
        self.uplink = uplink;
        self
    }

    /// Puts a router between the host and the world.
    #[must_use]
    pub fn router(mut self) -> Self {
        self.router = true;
        self
    }

    /// Leaves IPv6 on and gives every host IPv6 addresses as well.
    #[must_use]
    pub fn ipv6(mut self) -> Self {
        self.families = Families::Both;
        self
    }

    /// Gives hosts addresses of both families, and guests only IPv6 ones.
    #[must_use]
    pub fn ipv6_guests(mut self) -> Self {
        self.families = Families::Ipv6Guests;
        self
    }

    /// Gives hosts and guests IPv6 addresses, and no others.
    #[must_use]
    pub fn ipv6_only(mut self) -> Self {
        self.families = Families::Ipv6;
        self
    }

    /// MTU in bytes of the guests' link, at both its ends.
    #[must_use]
    pub fn inside_mtu(mut self, mtu: u32) -> Self {
        self.inside_mtu = Some(mtu);
        self
    }

    /// MTU in bytes of the uplink, at both its ends.
    #[must_use]
    pub fn uplink_mtu(mut self, mtu: u32) -> Self {
        self.uplink_mtu = Some(mtu);
        self
    }

    /// MTU in bytes of the link between router and world, which only the
    /// router's ICMP errors reveal to the host. Puts a router there.
    #[must_use]
    pub fn path_mtu(mut self, mtu: u32) -> Self {
        self.path_mtu = Some(mtu);
        self.router()
    }

    /// Builds it.
    ///
    /// # Errors
    /// No root, or the kernel lacks a device type.
    pub fn build(self) -> Result<Topology> {
        ensure!(
            self.guests <= 100,
            "at most 100 guests fit the addresses used here"
        );
        let host = self.namespace("host")?;
        let world = self.namespace("world")?;
        let router = if self.router {
            Some(self.namespace("router")?)
        } else {
            None
        };
        let mut topology = Topology {
            host,
            world,
            router,
            guests: Vec::new(),
            inside: self.inside,
            families: self.families,
            uplink_cable: None,
        };
        self.build_uplink(&mut topology)
            .context("cannot build the uplink")?;
        self.build_world(&topology)
            .context("cannot build the world")?;
        if self.inside == Inside::Bridge {
            topology.host.ip("link add br0 type bridge")?;
            topology.host.ip("link set br0 up")?;
        }
        for number in 0..self.guests {
            let guest = self
                .build_guest(&topology, number)
                .with_context(|| format!("cannot build guest {number}"))?;
            topology.guests.push(guest);
        }
        if topology.taps_are_ours() {
            topology.plug_in()?;
        }
        Ok(topology)
    }

    fn namespace(&self, role: &str) -> Result<Namespace> {
        if self.families.have_ipv6() {
            Namespace::with_ipv6(role)
        } else {
            Namespace::new(role)
        }
    }

    fn build_uplink(&self, topology: &mut Topology) -> Result<()> {
        let Topology { host, .. } = topology;
        let far = topology.router.as_ref().unwrap_or(&topology.world);
        match self.uplink {
            Uplink::Ethernet => host.add_veth(UPLINK, far, "downlink0")?,
            Uplink::Tun => {
                let options = Options::new(Layer::Ip);
                let near_end = TunTap::create(host, UPLINK, options)?;
                let far_end = TunTap::create(far, "downlink0", options)?;
                topology.uplink_cable = Some(Cable::connect(near_end, far_end)?);
            }
        }
        set_mtu(host, UPLINK, self.uplink_mtu)?;
        set_mtu(far, "downlink0", self.uplink_mtu)?;
        if self.families.have_ipv4() {
            host.ip(&format!("address add {HOST_ADDRESS}/24 dev {UPLINK}"))?;
            far.ip(&format!("address add {GATEWAY}/24 dev downlink0"))?;
            host.ip(&format!("route add default via {GATEWAY} dev {UPLINK}"))?;
        }
        if self.families.have_ipv6() {
            host.ip(&format!(
                "address add {HOST_ADDRESS6}/64 dev {UPLINK} nodad"
            ))?;
            far.ip(&format!("address add {GATEWAY6}/64 dev downlink0 nodad"))?;
            host.ip(&format!("-6 route add default via {GATEWAY6} dev {UPLINK}"))?;
        }
        Ok(())
    }

    fn build_world(&self, topology: &Topology) -> Result<()> {
        let world = &topology.world;
        if self.families.have_ipv4() {
            for address in WORLD_ADDRESSES {
                world.ip(&format!("address add {address}/32 dev lo"))?;
            }
        }
        if self.families.have_ipv6() {
            for address in WORLD_ADDRESSES6 {
                world.ip(&format!("address add {address}/128 dev lo nodad"))?;
            }
        }
        let Some(router) = &topology.router else {
            return Ok(());
        };
        router.add_veth("outer0", world, "world0")?;
        set_mtu(router, "outer0", self.path_mtu)?;
        set_mtu(world, "world0", self.path_mtu)?;
        if self.families.have_ipv4() {
            router.sysctl("net.ipv4.ip_forward", "1")?;
            let [near, far] = ROUTER_LINK;
            router.ip(&format!("address add {near}/24 dev outer0"))?;
            world.ip(&format!("address add {far}/24 dev world0"))?;
            router.ip(&format!("route add 203.0.113.0/24 via {far}"))?;
            world.ip(&format!("route add 198.51.100.0/24 via {near}"))?;
        }
        if self.families.have_ipv6() {
            router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
            let [near, far] = ROUTER_LINK6;
            router.ip(&format!("address add {near}/64 dev outer0 nodad"))?;
            world.ip(&format!("address add {far}/64 dev world0 nodad"))?;
            router.ip(&format!("-6 route add 2001:db8:2::/64 via {far}"))?;
            world.ip(&format!("-6 route add 2001:db8:1::/64 via {near}"))?;
        }
        Ok(())
    }

    fn build_guest(&self, topology: &Topology, number: u8) -> Result<Guest> {
        let host = &topology.host;
        let namespace = self.namespace(&format!("guest{number}"))?;
        let (network, host_part, inside_device) = match self.inside {
            Inside::Tap(_) => (number, 10, format!("tap{number}")),
            Inside::Veth => (number, 10, format!("veth{number}")),
            Inside::Bridge => (0, 10 + number, "br0".to_owned()),
            Inside::Tun => (number, 10, format!("tun{number}")),
        };
        let mut socket = None;
        match self.inside {
            Inside::Tap(tap) => {
                let options = tap.options();
                if tap.made_by == TapMaker::Testbed {
                    TunTap::create_persistent(host, &inside_device, options)?;
                }
                socket = Some(TunTap::create(&namespace, GUEST_DEVICE, options)?);
            }
            Inside::Tun => {
                let options = Options::new(Layer::Ip);
                TunTap::create_persistent(host, &inside_device, options)?;
                socket = Some(TunTap::create(&namespace, GUEST_DEVICE, options)?);
            }
            Inside::Veth => host.add_veth(&inside_device, &namespace, GUEST_DEVICE)?,
            Inside::Bridge => {
                let port = format!("port{number}");
                host.add_veth(&port, &namespace, GUEST_DEVICE)?;
                host.ip(&format!("link set {port} master br0"))?;
                host.wait_for_carrier("br0")?;
                set_mtu(host, &port, self.inside_mtu)?;
            }
        }
        if topology.taps_are_ours() {
            set_mtu(host, &inside_device, self.inside_mtu)?;
        }
        set_mtu(&namespace, GUEST_DEVICE, self.inside_mtu)?;
        let guest = Guest {
            address: Ipv4Addr::new(10, 0, network, host_part),
            gateway: Ipv4Addr::new(10, 0, network, 1),
            has_ipv4: self.families.have_guests_ipv4(),
            ipv6: self.families.have_ipv6().then(|| {
                let network = u16::from(network);
                let address =
                    |host: u8| Ipv6Addr::new(0xfd00, 0x7a70, 0, network, 0, 0, 0, u16::from(host));
                (address(host_part), address(1))
            }),
            namespace,
            inside_device,
            socket,
            cable: None,
        };
        guest.configure()?;
        Ok(guest)
    }
}

impl Tap {
    fn options(self) -> Options {
        Options {
            queues: self.queues,
            offloads: self.offloads,
            ..Options::new(Layer::Ethernet)
        }
    }
}

/// One guest.
#[derive(Debug)]
pub struct Guest {
    /// Where its side of the link is.
    pub namespace: Namespace,
    /// Its address, of a /24. (With IPv6 only, it has it not.)
    pub address: Ipv4Addr,
    /// Its default route: the address that the host's inside device is to get.
    pub gateway: Ipv4Addr,
    has_ipv4: bool,
    /// The same two in IPv6, of a /64, when the world has IPv6.
    pub ipv6: Option<(Ipv6Addr, Ipv6Addr)>,
    /// The host's device that serves it, shared by the guests of a bridge.
    pub inside_device: String,
    socket: Option<TunTap>,
    cable: Option<Cable>,
}

impl Guest {
    /// The value for `--inside`: device, gateway addresses and prefix lengths.
    #[must_use]
    pub fn inside(&self) -> String {
        let ipv4 = self.has_ipv4.then(|| format!("{}/24", self.gateway));
        let ipv6 = self.ipv6.map(|(_, gateway)| format!("{gateway}/64"));
        let networks: Vec<_> = ipv4.into_iter().chain(ipv6).collect();
        format!("{}={}", self.inside_device, networks.join(","))
    }

    /// The cable to the host of a guest on a tap or tun that is plugged in;
    /// its first end is the guest's.
    #[must_use]
    pub fn cable(&self) -> Option<&Cable> {
        self.cable.as_ref()
    }

    /// Whether it is on a tap that the program under test makes, and not
    /// plugged in yet: see [`Topology::plug_in`].
    #[must_use]
    pub fn is_unplugged(&self) -> bool {
        self.socket.is_some()
    }

    /// Gives it its addresses and routes, also again after its device was down.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn configure(&self) -> Result<()> {
        let Self {
            namespace,
            address,
            gateway,
            ..
        } = self;
        if self.has_ipv4 {
            namespace.ip(&format!("address replace {address}/24 dev {GUEST_DEVICE}"))?;
            namespace.ip(&format!(
                "route replace default via {gateway} dev {GUEST_DEVICE}"
            ))?;
        }
        if let Some((address, gateway)) = self.ipv6 {
            // Its addresses are set by hand, whatever a router says.
            namespace.sysctl(&format!("net.ipv6.conf.{GUEST_DEVICE}.accept_ra"), "0")?;
            namespace.ip(&format!(
                "address replace {address}/64 dev {GUEST_DEVICE} nodad"
            ))?;
            namespace.ip(&format!(
                "-6 route replace default via {gateway} dev {GUEST_DEVICE}"
            ))?;
        }
        Ok(())
    }

    /// Takes its IPv6 addresses and routes away and has its kernel configure
    /// it by what a router says, which it asks for.
    ///
    /// # Errors
    /// It has no IPv6.
    pub fn forget_ipv6(&self) -> Result<()> {
        let Self { namespace, .. } = self;
        namespace.ip(&format!("link set {GUEST_DEVICE} down"))?;
        namespace.ip(&format!("-6 address flush dev {GUEST_DEVICE}"))?;
        namespace.sysctl(&format!("net.ipv6.conf.{GUEST_DEVICE}.accept_ra"), "1")?;
        namespace
            .ip(&format!("link set {GUEST_DEVICE} up"))
            .map(drop)
    }
}

/// A built world. Dropping it takes everything away.
#[derive(Debug)]
pub struct Topology {
    // Cables come before the namespaces that their devices live in.
    uplink_cable: Option<Cable>,
    /// The guests, in order of their addresses.
    pub guests: Vec<Guest>,
    /// Where translation is to happen.
    pub host: Namespace,
    /// The router between host and world, if there is one.
    pub router: Option<Namespace>,
    /// The outside.
    pub world: Namespace,
    inside: Inside,
    families: Families,
}

impl Topology {
    /// Starts describing a world.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Whether guests have IPv4 addresses.
    #[must_use]
    pub fn has_ipv4(&self) -> bool {
        self.families.have_guests_ipv4()
    }

    /// Whether they have IPv6 addresses.
    #[must_use]
    pub fn has_ipv6(&self) -> bool {
        self.families.have_ipv6()
    }

    /// The values for `--inside`, one for each inside device of the host.
    #[must_use]
    pub fn inside(&self) -> Vec<String> {
        let mut values: Vec<_> = self.guests.iter().map(Guest::inside).collect();
        values.dedup();
        values
    }

    /// The namespace at the far end of the uplink, and its device there.
    #[must_use]
    pub fn uplink_peer(&self) -> (&Namespace, &'static str) {
        (self.router.as_ref().unwrap_or(&self.world), "downlink0")
    }

    /// The world's device towards the host.
    #[must_use]
    pub fn world_device(&self) -> &'static str {
        if self.router.is_some() {
            "world0"
        } else {
            "downlink0"
        }
    }

    /// Plugs the cables of guests on taps and tuns into the host's devices,
    /// and waits until the host has noticed, if the devices are up: what it
    /// sends before is lost. Needed only when the program under test makes the taps.
    ///
    /// # Errors
    /// The host has no such tap, or somebody else holds it.
    pub fn plug_in(&mut self) -> Result<()> {
        for guest in &mut self.guests {
            let options = match self.inside {
                Inside::Tap(tap) => tap.options(),
                Inside::Tun => Options::new(Layer::Ip),
                Inside::Veth | Inside::Bridge => return Ok(()),
            };
            if guest.socket.is_none() {
                bail!("{} is plugged in already", guest.namespace.name());
            }
            let plug = TunTap::attach(&self.host, &guest.inside_device, options)?;
            let socket = guest.socket.take().context("the guest has no device")?;
            guest.cable = Some(Cable::connect(socket, plug)?);
            self.host.wait_for_carrier(&guest.inside_device)?;
        }
        Ok(())
    }

    /// Gives the host's inside devices their addresses, as the program under
    /// test would.
    ///
    /// # Errors
    /// A device is missing or has the address already.
    pub fn set_inside_addresses(&self) -> Result<()> {
        for value in self.inside() {
            let (device, addresses) = value.split_once('=').context("malformed inside value")?;
            self.host.ip(&format!("link set {device} up"))?;
            for address in addresses.split(',') {
                self.host
                    .ip(&format!("address add {address} dev {device} nodad"))?;
            }
        }
        Ok(())
    }

    /// Lets the host and the rest forward as plain routers without any
    /// translation: the inside addresses set, and a route back to the guests.
    ///
    /// # Errors
    /// As [`set_inside_addresses`](Self::set_inside_addresses).
    pub fn forward_plainly(&self) -> Result<()> {
        self.set_inside_addresses()?;
        if self.has_ipv4() {
            self.host.sysctl("net.ipv4.ip_forward", "1")?;
        }
        if self.has_ipv6() {
            self.host.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        }
        let [near, near6] = [ROUTER_LINK[0].to_string(), ROUTER_LINK6[0].to_string()];
        let mut hops = vec![(
            self.uplink_peer().0,
            HOST_ADDRESS.to_string(),
            HOST_ADDRESS6.to_string(),
        )];
        if self.router.is_some() {
            hops.push((&self.world, near, near6));
        }
        for (namespace, via, via6) in hops {
            if self.has_ipv4() {
                namespace.ip(&format!("route add 10.0.0.0/8 via {via}"))?;
            }
            if self.has_ipv6() {
                namespace.ip(&format!("-6 route add fd00:7a70::/32 via {via6}"))?;
            }
        }
        Ok(())
    }

    /// Makes all neighbour entries permanent, so that no ARP is needed and
    /// none is sent: on the uplink, and on the inside devices that exist and
    /// have Ethernet addresses.
    ///
    /// # Errors
    /// A device of the topology is missing.
    pub fn pin_neighbours(&self) -> Result<()> {
        if self.uplink_cable.is_none() {
            let (peer, device) = self.uplink_peer();
            pin_neighbour(&self.host, UPLINK, GATEWAY, peer, device)?;
            pin_neighbour(peer, device, HOST_ADDRESS, &self.host, UPLINK)?;
        }
        if let Some(router) = &self.router {
            let [near, far] = ROUTER_LINK;
            pin_neighbour(router, "outer0", far, &self.world, "world0")?;
            pin_neighbour(&self.world, "world0", near, router, "outer0")?;
        }
        if self.inside == Inside::Tun {
            return Ok(());
        }
        for Guest {
            namespace,
            address,
            gateway,
            inside_device,
            ..
        } in &self.guests
        {
            pin_neighbour(namespace, GUEST_DEVICE, *gateway, &self.host, inside_device)?;
            pin_neighbour(&self.host, inside_device, *address, namespace, GUEST_DEVICE)?;
        }
        Ok(())
    }

    fn taps_are_ours(&self) -> bool {
        !matches!(
            self.inside,
            Inside::Tap(Tap {
                made_by: TapMaker::Program,
                ..
            })
        )
    }
}

fn pin_neighbour(
    namespace: &Namespace,
    device: &str,
    address: impl Into<IpAddr>,
    owner: &Namespace,
    owner_device: &str,
) -> Result<()> {
    let mac = owner.mac_address(owner_device)?;
    let address = address.into();
    namespace
        .ip(&format!(
            "neighbour replace {address} lladdr {mac} nud permanent dev {device}"
        ))
        .map(drop)
}

fn set_mtu(namespace: &Namespace, device: &str, mtu: Option<u32>) -> Result<()> {
    match mtu {
        Some(mtu) => namespace
            .ip(&format!("link set {device} mtu {mtu}"))
            .map(drop),
        None => Ok(()),
    }
}
