//! The host is its guests' IPv6 router, and tells them so by router advertisements (RFC 4861 section
//! 6.2): by which network they reach it and each other, how long packets may be, and whom to ask for
//! names. When it speaks is [`schedule`]'s, what it says [`message`]'s. Who has which link address
//! (neighbour discovery) is the kernel's.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Error, Result};
use ipnet::Ipv6Net;
use rustix::rand::{GetRandomFlags, getrandom};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use tokio::{net::UdpSocket, time::sleep_until};

use self::{
    message::{Advertisement, Solicitation},
    schedule::{Audience, Schedule},
};
use crate::{
    dns::{Gateway, Names},
    notice::warn,
    services::PerDevice,
};

mod message;
mod schedule;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// Of every message of neighbour discovery: who has another one is not on the link.
const HOP_LIMIT: u32 = 255;
/// A longer solicitation is looked at so far, and what is cut is none.
const LONGEST: usize = 1500;
/// Resolvers that guests are told: as many as by DHCP.
const MOST_RESOLVERS: usize = 3;

/// A device whose guests have the host for a router.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Served {
    pub name: String,
    pub index: u32,
    /// The host's address on it, and the guests' network.
    pub address: Ipv6Net,
    /// The address by which guests know their router.
    pub link_local: Ipv6Addr,
    /// Of Ethernet devices.
    pub link_address: Option<[u8; 6]>,
    /// Bytes.
    pub mtu: u32,
    /// Whether a DHCP server gives addresses there, and tells the rest.
    pub managed: bool,
}

impl Served {
    /// Whom guests ask for names where they reach nobody else.
    #[must_use]
    pub fn gateway(&self) -> Gateway {
        Gateway {
            device: self.name.clone(),
            index: self.index,
            address: self.address.addr().into(),
        }
    }
}

/// What guests are told, beside what their device says and whom to ask for names.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Advice {
    pub domain: Option<String>,
    /// What stands for IPv4 addresses, where the host translates these.
    pub nat64: Option<Ipv6Net>,
}

/// The routers that the host is, one for each device.
#[derive(Debug, Default)]
pub struct Routers {
    running: PerDevice<(Served, Advice), Arc<Voice>>,
}

impl Routers {
    /// Is a router on these devices, and on no others. Returns what is to be told of those where it
    /// cannot be one. Must be called within a tokio runtime.
    pub async fn settle(
        &mut self,
        devices: &[Served],
        advice: &Advice,
        names: &Arc<Names>,
    ) -> Vec<String> {
        let wanted = devices.iter().map(|it| (it.clone(), advice.clone()));
        let start = |(device, advice): &(Served, Advice)| {
            let voice = Voice::open(device.clone(), advice.clone(), names.clone())?;
            let voice = Arc::new(voice);
            let router = Router {
                voice: voice.clone(),
                schedule: Schedule::begin(Instant::now()),
            };
            Ok((tokio::spawn(router.run()), voice))
        };
        let settled = self.running.settle(wanted.collect(), start).await;
        for ((ended, _), voice) in settled.ended {
            let is_same =
                |it: &Served| (it.index, it.link_local) == (ended.index, ended.link_local);
            if !devices.iter().any(is_same) {
                voice.say_goodbye();
            }
        }
        settled.notes
    }

    /// Tells guests that the host is their router no more.
    pub async fn end(mut self) {
        self.settle(&[], &Advice::default(), &Arc::default()).await;
    }
}

/// What speaks on one device.
#[derive(Debug)]
struct Voice {
    socket: UdpSocket,
    device: Served,
    advice: Advice,
    names: Arc<Names>,
    /// Another program of the host speaks there.
    yields: AtomicBool,
}

impl Voice {
    fn open(device: Served, advice: Advice, names: Arc<Names>) -> Result<Self> {
        let socket = listen(&device).map_err(|error| explain(&device.name, error))?;
        Ok(Self {
            socket,
            device,
            advice,
            names,
            yields: AtomicBool::new(false),
        })
    }

    fn message(&self, last: bool) -> Vec<u8> {
        let resolvers = self.names.for_guests_of(&self.device.gateway());
        let resolvers = resolvers.into_iter().filter_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        });
        let resolvers: Vec<_> = resolvers.take(MOST_RESOLVERS).collect();
        Advertisement {
            link_address: self.device.link_address,
            network: self.device.address,
            mtu: self.device.mtu,
            managed: self.device.managed,
            resolvers: &resolvers,
            domain: self.advice.domain.as_deref(),
            nat64: self.advice.nat64,
            last,
        }
        .to_bytes()
    }

    fn say(&self, audience: Audience) {
        if self.yields.load(Ordering::Relaxed) {
            return;
        }
        let message = self.message(false);
        let guests = match audience {
            Audience::Everybody => vec![ALL_NODES],
            Audience::Each(guests) => guests,
        };
        for guest in guests {
            self.send(&message, guest);
        }
    }

    fn send(&self, message: &[u8], guest: Ipv6Addr) {
        let guest = SocketAddrV6::new(guest, 0, 0, self.device.index);
        // The device may be down, or the guest gone: who is there asks again. Nothing waits for those
        // who are not.
        let _ = SockRef::from(&self.socket).send_to(message, &guest.into());
    }

    fn say_goodbye(&self) {
        if !self.yields.load(Ordering::Relaxed) {
            self.send(&self.message(true), ALL_NODES);
        }
    }

    /// It speaks with the same address, so it is the same router for guests: what this one says would
    /// contradict it.
    fn yield_to_another(&self) {
        if !self.yields.swap(true, Ordering::Relaxed) {
            warn(&format!(
                "another program of the host advertises it as a router on {}, and guests configure \
                 themselves by that; pass --no-ra to say so",
                self.device.name
            ));
        }
    }
}

struct Router {
    voice: Arc<Voice>,
    schedule: Schedule,
}

impl Router {
    async fn run(mut self) {
        let mut buffer = vec![0; LONGEST];
        loop {
            let due = sleep_until(self.schedule.due().into());
            tokio::select! {
                received = self.voice.socket.recv_from(&mut buffer), if self.schedule.listens() => {
                    let Ok((length, from)) = received else {
                        return;
                    };
                    self.hear(buffer.get(..length).unwrap_or_default(), from);
                }
                () = due => {
                    if let Some(audience) = self.schedule.step(Instant::now(), chance()) {
                        self.voice.say(audience);
                    }
                }
            }
        }
    }

    fn hear(&mut self, message: &[u8], from: SocketAddr) {
        if message.first() == Some(&ROUTER_ADVERTISEMENT) {
            self.voice.yield_to_another();
            return;
        }
        let IpAddr::V6(from) = from.ip() else {
            return;
        };
        let Some(solicitation) = Solicitation::read(message, !from.is_unspecified()) else {
            return;
        };
        // What waits until the kernel has found out where a guest is takes others' room.
        let is_found = solicitation.has_link_address || self.voice.device.link_address.is_none();
        let from = Some(from).filter(|from| !from.is_unspecified() && is_found);
        self.schedule.ask(from, Instant::now(), chance());
    }
}

/// Evenly spread.
fn chance() -> u32 {
    let mut bytes = [0; 4];
    // It always has so few of them, but for moments after the machine's start: then no chance is no
    // harm.
    let _ = getrandom(&mut bytes, GetRandomFlags::NONBLOCK);
    u32::from_ne_bytes(bytes)
}

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;

/// What the kernel lets through to the socket: solicitations from the link (RFC 4861 section 6.1.1),
/// and what other programs of the host advertise, of which the kernel gives the host a copy.
fn filter() -> Vec<SockFilter> {
    const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    /// Where the message's type stands, which the packet begins with for this socket.
    const TYPE: u32 = 0;
    /// From the IPv6 header on (RFC 8200 section 3).
    const HOP_LIMIT_FIELD: u32 = libc::SKF_NET_OFF.cast_unsigned() + 7;
    const PACKET_TYPE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE).cast_unsigned();
    /// `PACKET_LOOPBACK` of `include/uapi/linux/if_packet.h`.
    const COPY: u32 = 5;
    const ALL: u32 = u32::MAX;
    let step = |code: u32, if_true, if_false, operand| {
        SockFilter::new(
            u16::try_from(code).unwrap_or_default(),
            if_true,
            if_false,
            operand,
        )
    };
    vec![
        step(LOAD_BYTE, 0, 0, HOP_LIMIT_FIELD),
        step(IF_EQUAL, 0, 7, HOP_LIMIT),
        step(LOAD_BYTE, 0, 0, PACKET_TYPE),
        step(IF_EQUAL, 2, 0, COPY),
        step(LOAD_BYTE, 0, 0, TYPE),
        step(IF_EQUAL, 2, 3, ROUTER_SOLICITATION.into()),
        step(LOAD_BYTE, 0, 0, TYPE),
        step(IF_EQUAL, 0, 1, ROUTER_ADVERTISEMENT.into()),
        step(RETURN, 0, 0, ALL),
        step(RETURN, 0, 0, 0),
    ]
}

/// A socket that hears solicitations of one device, and speaks there with the router's address.
fn listen(device: &Served) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.attach_filter(&filter())?;
    socket.bind_device(Some(device.name.as_bytes()))?;
    socket.set_multicast_hops_v6(HOP_LIMIT)?;
    socket.set_unicast_hops_v6(HOP_LIMIT)?;
    socket.set_multicast_loop_v6(false)?;
    socket.join_multicast_v6(&ALL_ROUTERS, device.index)?;
    socket.set_nonblocking(true)?;
    let router = SocketAddrV6::new(device.link_local, 0, 0, device.index);
    socket.bind(&router.into())?;
    // It sends and receives with addresses, which is all that is asked of it.
    UdpSocket::from_std(socket.into())
}

fn explain(device: &str, error: io::Error) -> Error {
    let way_out = match error.kind() {
        io::ErrorKind::PermissionDenied => "grant CAP_NET_RAW, or pass --no-ra",
        _ => "pass --no-ra if guests need no IPv6 router",
    };
    Error::new(error).context(format!(
        "cannot tell guests of {device} of their IPv6 router: {way_out}"
    ))
}
