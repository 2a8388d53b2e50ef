//! Gives guests their addresses (RFC 2131): the host's address on their device is their router, and
//! each link address gets the same address again. Reading and writing of messages is `smoltcp`'s;
//! leases are [`crate::leases`]'; whom guests ask for names is [`crate::dns`]'s.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use ipnet::Ipv4Net;
use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_MAX_DNS_SERVER_COUNT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption,
    DhcpPacket, DhcpRepr,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use crate::{
    dns::{Gateway, Names},
    host::netlink::{Neighbour, Netlink},
    leases::{Guest, Ipv4Guests, Pool},
    services::{PerDevice, Rate, no_addresses},
};

/// How long a guest may keep its address without asking again.
const LEASE: Duration = Duration::from_hours(1);
/// The longest message that is read; RFC 2131 wants 576 bytes of UDP and IP to fit.
const LONGEST: usize = 1500;
/// Messages from one device that are looked at in a second.
const MOST: u32 = 100;
/// How often the kernel is asked in a second who is behind one device.
const MOST_LOOKS: u32 = 20;

const OPTION_MTU: u8 = 26;
const OPTION_DOMAIN: u8 = 15;
const OPTION_ROUTES: u8 = 121;

/// A device whose guests are served.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Served {
    pub name: String,
    pub index: u32,
    /// The host's address on it.
    pub address: Ipv4Addr,
    /// The guests'. It need not have the host's address, if there is one guest.
    pub network: Ipv4Net,
    /// Bytes.
    pub mtu: u16,
}

impl Served {
    /// Whom its guests know as their router.
    #[must_use]
    pub fn gateway(&self) -> Gateway {
        Gateway {
            device: self.name.clone(),
            index: self.index,
            address: self.address.into(),
        }
    }

    /// Whether there is room for a guest.
    fn has_room(&self) -> bool {
        self.network.prefix_len() < 32 || !self.has_host()
    }

    /// Whether guests are in one network with the host.
    fn has_host(&self) -> bool {
        self.network.contains(&self.address)
    }
}

/// Guests of several devices may share a network.
type Pools = HashMap<Ipv4Net, Arc<Mutex<Pool<Ipv4Guests>>>>;

/// The servers of one instance, one for each device.
#[derive(Debug, Default)]
pub struct Servers {
    running: PerDevice<(Served, Option<String>), ()>,
    pools: Pools,
}

impl Servers {
    /// Serves these devices, and no others, and tells guests this domain. Returns what is to be told
    /// of those that cannot be served. Must be called within a tokio runtime.
    pub async fn settle(
        &mut self,
        devices: &[Served],
        domain: Option<&str>,
        names: &Arc<Names>,
        netlink: &Netlink,
    ) -> Vec<String> {
        let Self { running, pools } = self;
        let wanted = devices.iter().filter(|device| device.has_room());
        let wanted = wanted.map(|device| (device.clone(), domain.map(str::to_owned)));
        let start = |(device, domain): &(Served, Option<String>)| {
            let server = Server::open(device.clone(), domain.clone(), pools, names.clone())?;
            Ok((tokio::spawn(server.run(netlink.clone())), ()))
        };
        running.settle(wanted.collect(), start).await.notes
    }

    /// Nobody is in this network of guests any more.
    pub fn unplug(&self, network: Ipv4Net) {
        if let Some(pool) = self.pools.get(&network) {
            let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
            pool.unplug(Instant::now());
        }
    }
}

/// A socket that hears the guests of one device.
fn listen(device: &str) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind_device(Some(device.as_bytes()))?;
    socket.set_broadcast(true)?;
    send_without_checksum(&socket)?;
    socket.set_nonblocking(true)?;
    let anybody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, DHCP_SERVER_PORT));
    socket.bind(&anybody.into())?;
    UdpSocket::from_std(socket.into())
}

/// Old clients read answers from the device itself, and drop those whose checksum a network card
/// was to complete, which no tap does. Without any they take them.
fn send_without_checksum(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    let size = libc::socklen_t::try_from(size_of_val(&on)).unwrap_or_default();
    // SAFETY: the option is a c_int, and as long as it is said to be.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const on).cast(),
            size,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Routes for a guest whose router is in none of its networks (RFC 3442): first to that, on the
/// link, and by that to everybody. Each is a length, as many bytes of the prefix as that takes, and
/// the router.
fn routes_to(router: Ipv4Addr) -> [u8; 14] {
    let [a, b, c, d] = router.octets();
    [32, a, b, c, d, 0, 0, 0, 0, 0, a, b, c, d]
}

struct Server {
    socket: UdpSocket,
    device: Served,
    pool: Arc<Mutex<Pool<Ipv4Guests>>>,
    domain: Option<String>,
    names: Arc<Names>,
}

/// How much of what one device's guests ask is looked at.
struct Rates {
    heard: Rate,
    looked: Rate,
}

impl Rates {
    const fn new(now: Instant) -> Self {
        Self {
            heard: Rate::new(MOST, now),
            looked: Rate::new(MOST_LOOKS, now),
        }
    }
}

/// An answer and where it goes.
#[derive(Debug)]
struct Answer {
    message: Vec<u8>,
    to: SocketAddr,
}

impl Server {
    fn open(
        device: Served,
        domain: Option<String>,
        pools: &mut Pools,
        names: Arc<Names>,
    ) -> Result<Self> {
        let socket = listen(&device.name)
            .map_err(|error| no_addresses(&device.name, "addresses", "DHCP", error))?;
        let pool = pools.entry(device.network).or_insert_with(|| {
            let pool = Pool::new(Ipv4Guests {
                network: device.network,
                host: device.address,
            });
            Arc::new(Mutex::new(pool))
        });
        Ok(Self {
            socket,
            pool: pool.clone(),
            device,
            domain,
            names,
        })
    }

    async fn run(self, netlink: Netlink) {
        let mut buffer = vec![0; LONGEST];
        let mut rates = Rates::new(Instant::now());
        while let Ok((length, _)) = self.socket.recv_from(&mut buffer).await {
            let message = buffer.get(..length).unwrap_or_default();
            let look = netlink.neighbours_on(self.device.index);
            if let Some(answer) = self.hear(message, &mut rates, look, Instant::now()).await {
                // The device may be down: the guest asks again.
                let _ = self.socket.send_to(&answer.message, answer.to).await;
            }
        }
    }

    /// Whether a message is of a guest that nothing is known of.
    fn is_of_newcomer(&self, message: &[u8]) -> bool {
        let packet = DhcpPacket::new_checked(message).ok();
        let asked = packet.as_ref().and_then(|it| DhcpRepr::parse(it).ok());
        asked.is_some_and(|asked| {
            let guest = Guest(asked.client_hardware_address.0.to_vec());
            let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            pool.address_of(&guest).is_none()
        })
    }

    /// Takes note of who is there: leases of an earlier process are known by that, and addresses that
    /// were set by hand (RFC 2131 section 3.1 has servers look for these).
    fn meet(&self, seen: &[Neighbour], now: Instant) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        for neighbour in seen {
            if let IpAddr::V4(address) = neighbour.address
                && let Some(heard) = now.checked_sub(neighbour.since)
            {
                let guest = Guest(neighbour.link_address.to_vec());
                pool.meet(&guest, address, heard, now, LEASE);
            }
        }
    }

    /// What is to be answered to a message, if anything, and if it is looked at. `look` says who is
    /// there, once it is awaited.
    async fn hear(
        &self,
        message: &[u8],
        rates: &mut Rates,
        look: impl Future<Output = Result<Vec<Neighbour>>>,
        now: Instant,
    ) -> Option<Answer> {
        if !rates.heard.takes(now) {
            return None;
        }
        // A look is at all who are there: one will do for several newcomers.
        if self.is_of_newcomer(message) && rates.looked.takes(now) {
            // Not known is not taken.
            self.meet(&look.await.unwrap_or_default(), now);
        }
        self.answer(message, now)
    }

    /// What is to be answered to a message, if anything.
    fn answer(&self, message: &[u8], now: Instant) -> Option<Answer> {
        let packet = DhcpPacket::new_checked(message).ok()?;
        let asked = DhcpRepr::parse(&packet).ok()?;
        let guest = &Guest(asked.client_hardware_address.0.to_vec());
        let gateway = self.device.address;
        let for_another = asked
            .server_identifier
            .is_some_and(|server| server != gateway);
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = asked
            .requested_ip
            .or(Some(asked.client_ip))
            .filter(|address| !address.is_unspecified());
        match asked.message_type {
            DhcpMessageType::Discover => {
                let address = pool.offer(guest, wanted, now)?;
                self.reply(&asked, DhcpMessageType::Offer, Some(address))
            }
            DhcpMessageType::Request if for_another => {
                pool.release(guest);
                None
            }
            DhcpMessageType::Request => match wanted {
                Some(address) if pool.lease(guest, address, now, LEASE) => {
                    self.reply(&asked, DhcpMessageType::Ack, Some(address))
                }
                Some(_) => self.reply(&asked, DhcpMessageType::Nak, None),
                None => None,
            },
            DhcpMessageType::Inform => self.reply(&asked, DhcpMessageType::Ack, None),
            DhcpMessageType::Decline => {
                pool.avoid(guest, wanted?, now, LEASE);
                None
            }
            DhcpMessageType::Release => {
                pool.release(guest);
                None
            }
            DhcpMessageType::Offer
            | DhcpMessageType::Ack
            | DhcpMessageType::Nak
            | DhcpMessageType::Unknown(_) => None,
        }
    }

    /// Whom guests are to ask for names.
    fn resolvers(&self) -> Vec<Ipv4Addr> {
        let resolvers = self.names.for_guests_of(&self.device.gateway());
        let ipv4 = resolvers.into_iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        });
        ipv4.collect()
    }

    fn reply(
        &self,
        asked: &DhcpRepr<'_>,
        message_type: DhcpMessageType,
        address: Option<Ipv4Addr>,
    ) -> Option<Answer> {
        let gateway = self.device.address;
        let refused = message_type == DhcpMessageType::Nak;
        let lease = u32::try_from(LEASE.as_secs()).ok()?;
        let leased = address.map(|_| lease);
        let mtu = self.device.mtu.to_be_bytes();
        let routes = routes_to(gateway);
        let mut options = Vec::new();
        if !refused && !self.device.has_host() {
            options.push(DhcpOption {
                kind: OPTION_ROUTES,
                data: &routes,
            });
        }
        if !refused {
            options.push(DhcpOption {
                kind: OPTION_MTU,
                data: &mtu,
            });
            if let Some(domain) = &self.domain {
                options.push(DhcpOption {
                    kind: OPTION_DOMAIN,
                    data: domain.as_bytes(),
                });
            }
        }
        let resolvers = if refused {
            Vec::new()
        } else {
            self.resolvers()
        };
        let reply = DhcpRepr {
            message_type,
            transaction_id: asked.transaction_id,
            secs: 0,
            client_hardware_address: asked.client_hardware_address,
            client_ip: if refused {
                Ipv4Addr::UNSPECIFIED
            } else {
                asked.client_ip
            },
            your_ip: address.unwrap_or(Ipv4Addr::UNSPECIFIED),
            server_ip: gateway,
            router: (!refused).then_some(gateway),
            subnet_mask: (!refused).then_some(self.device.network.netmask()),
            relay_agent_ip: asked.relay_agent_ip,
            broadcast: asked.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(gateway),
            parameter_request_list: None,
            dns_servers: (!resolvers.is_empty()).then(|| {
                let told = resolvers.into_iter().take(DHCP_MAX_DNS_SERVER_COUNT);
                told.collect()
            }),
            max_size: None,
            lease_duration: leased,
            renew_duration: leased.map(|lease| lease / 2),
            rebind_duration: leased.map(|lease| lease / 8 * 7),
            additional_options: &options,
        };
        let mut message = vec![0; reply.buffer_len()];
        let mut packet = DhcpPacket::new_unchecked(&mut message);
        reply.emit(&mut packet).ok()?;
        // A guest that has its address hears what is sent to it; one that has none yet hears
        // broadcasts only (RFC 2131 section 4.1).
        let has_address = !asked.client_ip.is_unspecified() && !refused;
        let to = if has_address {
            asked.client_ip
        } else {
            Ipv4Addr::BROADCAST
        };
        Some(Answer {
            message,
            to: SocketAddr::from((to, DHCP_CLIENT_PORT)),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use smoltcp::wire::EthernetAddress;

    use super::*;

    fn message(message_type: DhcpMessageType, guest: u8) -> Vec<u8> {
        let asked = DhcpRepr {
            message_type,
            transaction_id: 1,
            secs: 0,
            client_hardware_address: EthernetAddress([2, 0, 0, 0, 0, guest]),
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: None,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut message = vec![0; asked.buffer_len()];
        asked
            .emit(&mut DhcpPacket::new_unchecked(&mut message))
            .unwrap();
        message
    }

    async fn server() -> Server {
        let host = Ipv4Addr::new(10, 0, 0, 1);
        let network = Ipv4Net::new_assert(host, 24).trunc();
        Server {
            socket: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
            device: Served {
                name: "tap0".to_owned(),
                index: 2,
                address: host,
                network,
                mtu: 1500,
            },
            pool: Arc::new(Mutex::new(Pool::new(Ipv4Guests { network, host }))),
            domain: None,
            names: Arc::default(),
        }
    }

    #[tokio::test]
    async fn what_needs_no_answer_takes_room_too() {
        let (server, now) = (server().await, Instant::now());
        let mut rates = Rates::new(now);
        let mut hear = async |message: &[u8], now| {
            let nobody = async { Ok(Vec::new()) };
            let answer = server.hear(message, &mut rates, nobody, now).await;
            answer.is_some()
        };
        let discover = message(DhcpMessageType::Discover, 1);
        assert!(hear(&discover, now).await);
        let release = message(DhcpMessageType::Release, 1);
        for useless in [&release[..], b"junk"].repeat(MOST as usize / 2) {
            assert!(!hear(useless, now).await);
        }
        assert!(!hear(&discover, now).await);
        let later = now + Duration::from_secs(1);
        assert!(hear(&discover, later).await);
    }

    #[tokio::test]
    async fn for_what_is_not_heard_nobody_looks() {
        let (server, now) = (server().await, Instant::now());
        let mut rates = Rates::new(now);
        for _ in 0..MOST {
            assert!(rates.heard.takes(now));
        }
        let looked = AtomicBool::new(false);
        let discover = message(DhcpMessageType::Discover, 1);
        for (now, is_heard) in [(now, false), (now + Duration::from_secs(1), true)] {
            let look = async {
                looked.store(true, Ordering::Relaxed);
                Ok(Vec::new())
            };
            let answer = server.hear(&discover, &mut rates, look, now).await;
            assert_eq!(answer.is_some(), is_heard);
            assert_eq!(looked.load(Ordering::Relaxed), is_heard);
        }
    }
}
