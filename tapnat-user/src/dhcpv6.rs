//! Gives guests of IPv6 networks addresses that stay the same, and tells those that ask whom to ask for
//! names (RFC 8415). By which router and network they reach others, [`crate::router`] tells them. Reading
//! and writing of messages is `dhcproto`'s; leases are [`crate::leases`]'.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    panic::catch_unwind,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use dhcproto::{
    Name,
    v6::{
        CLIENT_PORT, Decodable as _, DhcpOption, DhcpOptions, Encodable as _, IAAddr, IANA,
        Message, MessageType, OptionCode, SERVER_PORT, Status, StatusCode,
    },
};
use ipnet::Ipv6Net;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::UdpSocket;

use crate::{
    dns::{Gateway, Names},
    leases::{Guest, Pool},
    services::{PerDevice, Rate, no_addresses},
};

/// `All_DHCP_Relay_Agents_and_Servers`.
const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// How long a guest uses its address for what is new, without asking again, and how long at all: as
/// long as one that it has chosen itself.
const PREFERRED: Duration = Duration::from_hours(1);
const VALID: Duration = Duration::from_hours(2);
/// The longest message that is read: what an Ethernet frame carries.
const LONGEST: usize = 1500;
/// Messages from one device that are looked at in a second. What is sent to guests that do not exist
/// takes room for three seconds, and the answers to so many fit.
const MOST: u32 = 50;
/// Addresses that one message asks for; a guest needs one.
const MOST_ADDRESSES: usize = 4;
/// A DUID is no longer (RFC 8415 section 11.1).
const LONGEST_DUID: usize = 130;
/// Resolvers that guests are told: as many as by router advertisements.
const MOST_RESOLVERS: usize = 3;
/// The preference with which a guest asks no other server (RFC 8415 section 18.2.1).
const ALONE: u8 = 255;

/// A device whose guests are served.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Served {
    pub name: String,
    pub index: u32,
    /// The host's address on it, and the guests' network.
    pub address: Ipv6Net,
    /// The device's Ethernet address.
    pub link_address: [u8; 6],
}

impl Served {
    /// By what guests know this server: a DUID-LL (RFC 8415 section 11.4).
    fn duid(&self) -> Vec<u8> {
        const BY_LINK_ADDRESS: u16 = 3;
        const ETHERNET: u16 = 1;
        let mut duid = BY_LINK_ADDRESS.to_be_bytes().to_vec();
        duid.extend(ETHERNET.to_be_bytes());
        duid.extend(self.link_address);
        duid
    }

    /// Whom guests ask for names where they reach nobody else.
    fn gateway(&self) -> Gateway {
        Gateway {
            device: self.name.clone(),
            index: self.index,
            address: self.address.addr().into(),
        }
    }
}

/// Of each network, also while its server is started anew.
type Pools = HashMap<Ipv6Net, Arc<Mutex<Pool<Ipv6Net>>>>;

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
    ) -> Vec<String> {
        let Self { running, pools } = self;
        let wanted = devices
            .iter()
            .map(|device| (device.clone(), domain.map(str::to_owned)));
        let start = |(device, domain): &(Served, Option<String>)| {
            let socket = listen(device)
                .map_err(|error| no_addresses(&device.name, "IPv6 addresses", "DHCPv6", error))?;
            let pool = pools.entry(device.address.trunc()).or_insert_with(|| {
                let pool = Pool::new(device.address);
                Arc::new(Mutex::new(pool))
            });
            let server = Server {
                device: device.clone(),
                pool: pool.clone(),
                domain: domain.clone(),
                names: names.clone(),
            };
            Ok((tokio::spawn(server.run(socket)), ()))
        };
        running.settle(wanted.collect(), start).await.notes
    }

    /// Nobody is in this network of guests any more.
    pub fn unplug(&self, network: Ipv6Net) {
        if let Some(pool) = self.pools.get(&network) {
            let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
            pool.unplug(Instant::now());
        }
    }
}

/// A socket that hears the guests of one device.
fn listen(device: &Served) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(true)?;
    socket.bind_device(Some(device.name.as_bytes()))?;
    socket.set_nonblocking(true)?;
    let anybody = SocketAddr::from((Ipv6Addr::UNSPECIFIED, SERVER_PORT));
    socket.bind(&anybody.into())?;
    socket.join_multicast_v6(&SERVERS, device.index)?;
    UdpSocket::from_std(socket.into())
}

struct Server {
    device: Served,
    pool: Arc<Mutex<Pool<Ipv6Net>>>,
    domain: Option<String>,
    names: Arc<Names>,
}

impl Server {
    async fn run(self, socket: UdpSocket) {
        let mut buffer = vec![0; LONGEST];
        let mut heard = Rate::new(MOST, Instant::now());
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let now = Instant::now();
            if !heard.takes(now) {
                continue;
            }
            let message = buffer.get(..length).unwrap_or_default();
            // Guests ask from their link (RFC 8415 section 13.1), and are answered there.
            let guest = match from.ip() {
                IpAddr::V6(address) if address.is_unicast_link_local() => address,
                IpAddr::V4(_) | IpAddr::V6(_) => continue,
            };
            if let Some(answer) = self.answer(message, now) {
                let guest = SocketAddrV6::new(guest, CLIENT_PORT, 0, self.device.index);
                // The device may be down: the guest asks again. Nothing waits for one that is gone.
                let _ = SockRef::from(&socket).send_to(&answer, &guest.into());
            }
        }
    }

    /// What is to be answered to a message, if anything.
    fn answer(&self, message: &[u8], now: Instant) -> Option<Vec<u8>> {
        let asked = read(message)?;
        let client = client(&asked);
        let for_this = for_this(&asked, &self.device.duid());
        let mut answer = match asked.msg_type() {
            MessageType::Solicit if for_this.is_none() => {
                let client = client?;
                if asked.opts().get(OptionCode::RapidCommit).is_some() {
                    let mut answer = self.bind(&asked, client, now);
                    answer.opts_mut().insert(DhcpOption::RapidCommit);
                    answer
                } else {
                    self.offer(&asked, client, now)
                }
            }
            MessageType::Request if for_this == Some(true) => self.bind(&asked, client?, now),
            MessageType::Renew if for_this == Some(true) => self.renew(&asked, client?, now),
            MessageType::Rebind if for_this.is_none() => self.renew(&asked, client?, now),
            MessageType::Confirm if for_this.is_none() => {
                client?;
                self.confirm(&asked)?
            }
            MessageType::Release if for_this == Some(true) => {
                self.take_back(&asked, client?, |pool, guest, _| pool.release(guest))
            }
            MessageType::Decline if for_this == Some(true) => {
                // Somebody else has that address.
                self.take_back(&asked, client?, |pool, guest, address| {
                    pool.avoid(guest, address, now, VALID);
                })
            }
            MessageType::InformationRequest if for_this != Some(false) => {
                reply(&asked, MessageType::Reply)
            }
            // Of somebody else, or for somebody else.
            _ => return None,
        };
        self.finish(&asked, &mut answer)?;
        answer.to_vec().ok()
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, Pool<Ipv6Net>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says which addresses there would be (RFC 8415 section 18.3.9).
    fn offer(&self, asked: &Message, client: &[u8], now: Instant) -> Message {
        let mut answer = reply(asked, MessageType::Advertise);
        answer.opts_mut().insert(DhcpOption::Preference(ALONE));
        for association in associations(asked) {
            let guest = guest(client, association.id);
            let wanted = wanted(association).next();
            let offered = self.pool().offer(&guest, wanted, now);
            answer.opts_mut().insert(DhcpOption::IANA(match offered {
                Some(address) => leased(association.id, [address]),
                None => refused(association.id, Status::NoAddrsAvail),
            }));
        }
        answer
    }

    /// Gives addresses (RFC 8415 section 18.3.2).
    fn bind(&self, asked: &Message, client: &[u8], now: Instant) -> Message {
        let mut answer = reply(asked, MessageType::Reply);
        for association in associations(asked) {
            let guest = guest(client, association.id);
            let mut pool = self.pool();
            let is_elsewhere = wanted(association).any(|it| !self.device.address.contains(&it));
            let mut give = || {
                pool.offer(&guest, wanted(association).next(), now)
                    .filter(|address| pool.lease(&guest, *address, now, VALID))
            };
            let bound = if is_elsewhere {
                refused(association.id, Status::NotOnLink)
            } else if let Some(address) = give() {
                leased(association.id, [address])
            } else {
                refused(association.id, Status::NoAddrsAvail)
            };
            answer.opts_mut().insert(DhcpOption::IANA(bound));
        }
        answer
    }

    /// Lets guests keep their addresses, also those that another process of this server gave them
    /// (RFC 8415 sections 18.3.4 and 18.3.5).
    fn renew(&self, asked: &Message, client: &[u8], now: Instant) -> Message {
        let mut answer = reply(asked, MessageType::Reply);
        for association in associations(asked) {
            let guest = guest(client, association.id);
            let mut pool = self.pool();
            let mut kept = wanted(association)
                .filter(|address| pool.lease(&guest, *address, now, VALID))
                .take(1);
            let kept = kept.next();
            let mut renewed = match kept {
                Some(address) => leased(association.id, [address]),
                None => refused(association.id, Status::NoBinding),
            };
            // What is of no use any more.
            for address in wanted(association).filter(|it| Some(*it) != kept) {
                renewed
                    .opts
                    .insert(lifetimes(address, Duration::ZERO, Duration::ZERO));
            }
            answer.opts_mut().insert(DhcpOption::IANA(renewed));
        }
        answer
    }

    /// Whether a guest is still on the link that it was on (RFC 8415 section 18.3.3).
    fn confirm(&self, asked: &Message) -> Option<Message> {
        let mut addresses = associations(asked).flat_map(wanted).peekable();
        addresses.peek()?;
        let status = if addresses.all(|address| self.device.address.contains(&address)) {
            Status::Success
        } else {
            Status::NotOnLink
        };
        let mut answer = reply(asked, MessageType::Reply);
        answer.opts_mut().insert(status_code(status));
        Some(answer)
    }

    /// Takes from a guest what it gives back, and says what it does not have (RFC 8415 sections 18.3.7
    /// and 18.3.8).
    fn take_back(
        &self,
        asked: &Message,
        client: &[u8],
        take: impl Fn(&mut Pool<Ipv6Net>, &Guest, Ipv6Addr),
    ) -> Message {
        let mut answer = reply(asked, MessageType::Reply);
        answer.opts_mut().insert(status_code(Status::Success));
        for association in associations(asked) {
            let guest = guest(client, association.id);
            let mut pool = self.pool();
            let Some(own) = pool.address_of(&guest) else {
                let unknown = refused(association.id, Status::NoBinding);
                answer.opts_mut().insert(DhcpOption::IANA(unknown));
                continue;
            };
            if wanted(association).any(|address| address == own) {
                take(&mut pool, &guest, own);
            }
        }
        answer
    }

    /// Adds what is in every answer.
    fn finish(&self, asked: &Message, answer: &mut Message) -> Option<()> {
        let resolvers = self.names.for_guests_of(&self.device.gateway());
        let resolvers = resolvers.into_iter().filter_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        });
        let resolvers: Vec<_> = resolvers.take(MOST_RESOLVERS).collect();
        let options = answer.opts_mut();
        options.insert(DhcpOption::ServerId(self.device.duid()));
        if !resolvers.is_empty() {
            options.insert(DhcpOption::DomainNameServers(resolvers));
        }
        if let Some(domain) = &self.domain {
            let domain = Name::from_ascii(domain).ok()?;
            options.insert(DhcpOption::DomainSearchList(vec![domain]));
        }
        if asked.msg_type() == MessageType::InformationRequest {
            options.insert(DhcpOption::InformationRefreshTime(seconds(PREFERRED)));
        }
        Some(())
    }
}

/// Reads a message. `dhcproto` 0.15 takes from the lengths of some options before it looks whether
/// there is so much, which ends in a panic where a build checks for that.
fn read(message: &[u8]) -> Option<Message> {
    let read = catch_unwind(|| Message::from_bytes(message));
    read.ok()?.ok()
}

/// What a guest says that it is.
fn client(asked: &Message) -> Option<&[u8]> {
    match asked.opts().get(OptionCode::ClientId)? {
        DhcpOption::ClientId(duid) if (1..=LONGEST_DUID).contains(&duid.len()) => Some(duid),
        _ => None,
    }
}

/// Whether a message is for the server with this DUID. None: for any.
fn for_this(asked: &Message, duid: &[u8]) -> Option<bool> {
    match asked.opts().get(OptionCode::ServerId)? {
        DhcpOption::ServerId(other) => Some(other == duid),
        _ => None,
    }
}

/// For what a message asks addresses.
fn associations(asked: &Message) -> impl Iterator<Item = &IANA> {
    let all = asked.opts().get_all(OptionCode::IANA).unwrap_or_default();
    let all = all.iter().filter_map(|option| match option {
        DhcpOption::IANA(association) => Some(association),
        _ => None,
    });
    all.take(MOST_ADDRESSES)
}

/// The addresses that a guest names for one of them.
fn wanted(association: &IANA) -> impl Iterator<Item = Ipv6Addr> {
    let all = association.opts.get_all(OptionCode::IAAddr);
    let all = all.unwrap_or_default().iter();
    let all = all.filter_map(|option| match option {
        DhcpOption::IAAddr(address) => Some(address.addr),
        _ => None,
    });
    all.take(MOST_ADDRESSES)
}

/// By what a lease is known: a guest may have several cards.
fn guest(client: &[u8], association: u32) -> Guest {
    Guest([client, &association.to_be_bytes()].concat())
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

fn lifetimes(address: Ipv6Addr, preferred: Duration, valid: Duration) -> DhcpOption {
    DhcpOption::IAAddr(IAAddr {
        addr: address,
        preferred_life: seconds(preferred),
        valid_life: seconds(valid),
        opts: DhcpOptions::new(),
    })
}

/// These are the guest's; it asks again after half of the time, and anybody after four fifths.
fn leased(association: u32, addresses: [Ipv6Addr; 1]) -> IANA {
    IANA {
        id: association,
        t1: seconds(PREFERRED / 2),
        t2: seconds(PREFERRED * 4 / 5),
        opts: addresses
            .into_iter()
            .map(|address| lifetimes(address, PREFERRED, VALID))
            .collect(),
    }
}

fn refused(association: u32, status: Status) -> IANA {
    IANA {
        id: association,
        t1: 0,
        t2: 0,
        opts: std::iter::once(status_code(status)).collect(),
    }
}

fn status_code(status: Status) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode {
        status,
        msg: String::new(),
    })
}

/// An answer with what it has to repeat.
fn reply(asked: &Message, kind: MessageType) -> Message {
    let mut answer = Message::new_with_id(kind, asked.xid());
    if let Some(client) = asked.opts().get(OptionCode::ClientId) {
        answer.opts_mut().insert(client.clone());
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::Resolvers;

    const RESOLVER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53);

    fn server(network: &str) -> Server {
        let address = network.parse().unwrap();
        let names = Names::default();
        names.settle(&[], &Resolvers::Given(vec![RESOLVER.into()]), &[]);
        Server {
            device: Served {
                name: "tap0".to_owned(),
                index: 7,
                address,
                link_address: [2, 0, 0, 0, 0, 1],
            },
            pool: Arc::new(Mutex::new(Pool::new(address))),
            domain: Some("lan.example".to_owned()),
            names: Arc::new(names),
        }
    }

    fn message(kind: MessageType, number: u8, options: &[DhcpOption]) -> Message {
        let mut message = Message::new_with_id(kind, [1, 2, number]);
        let client = DhcpOption::ClientId(vec![0, 3, 0, 1, 2, 0, 0, 0, 0, number]);
        for option in options.iter().chain([&client]) {
            message.opts_mut().insert(option.clone());
        }
        message
    }

    fn association(addresses: &[Ipv6Addr]) -> DhcpOption {
        let named = addresses
            .iter()
            .map(|address| lifetimes(*address, Duration::ZERO, Duration::ZERO));
        DhcpOption::IANA(IANA {
            id: 5,
            t1: 0,
            t2: 0,
            opts: named.collect(),
        })
    }

    fn this(server: &Server) -> DhcpOption {
        DhcpOption::ServerId(server.device.duid())
    }

    fn ask(server: &Server, message: &Message, now: Instant) -> Option<Message> {
        let answer = server.answer(&message.to_vec().unwrap(), now)?;
        Some(Message::from_bytes(&answer).unwrap())
    }

    /// The address that an answer gives, and for how long it is valid; or why there is none.
    fn given(answer: &Message) -> Result<(Ipv6Addr, u32), Status> {
        let association = associations(answer).next().unwrap();
        match association.opts.get(OptionCode::StatusCode) {
            Some(DhcpOption::StatusCode(code)) => Err(code.status),
            _ => match association.opts.get(OptionCode::IAAddr) {
                Some(DhcpOption::IAAddr(address)) => Ok((address.addr, address.valid_life)),
                other => panic!("{other:?}"),
            },
        }
    }

    fn status(answer: &Message) -> Status {
        match answer.opts().get(OptionCode::StatusCode) {
            Some(DhcpOption::StatusCode(code)) => code.status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_asks_for_information_gets_it() {
        let server = server("fd00:7a70::1/64");
        let asked = message(MessageType::InformationRequest, 1, &[]);
        let answer = ask(&server, &asked, Instant::now()).unwrap();
        assert_eq!(answer.msg_type(), MessageType::Reply);
        assert_eq!(answer.xid(), asked.xid());
        let options = answer.opts();
        for code in [OptionCode::ClientId, OptionCode::InformationRefreshTime] {
            assert!(options.get(code).is_some(), "{code:?}");
        }
        assert_eq!(options.get(OptionCode::ServerId), Some(&this(&server)));
        assert_eq!(
            options.get(OptionCode::DomainNameServers),
            Some(&DhcpOption::DomainNameServers(vec![RESOLVER]))
        );
        let Some(DhcpOption::DomainSearchList(domains)) = options.get(OptionCode::DomainSearchList)
        else {
            panic!("{options:?}");
        };
        assert_eq!(domains[0].to_string().trim_end_matches('.'), "lan.example");
        assert!(options.get(OptionCode::IANA).is_none());
        // Also who does not say who it is (RFC 8415 section 18.2.6).
        let anonymous = Message::new_with_id(MessageType::InformationRequest, [0, 0, 1]);
        assert!(ask(&server, &anonymous, Instant::now()).is_some());
    }

    #[test]
    fn a_guest_gets_an_address_keeps_it_and_gives_it_back() {
        let (server, now) = (server("fd00:7a70::1/64"), Instant::now());
        let solicit = message(MessageType::Solicit, 1, &[association(&[])]);
        let offer = ask(&server, &solicit, now).unwrap();
        assert_eq!(offer.msg_type(), MessageType::Advertise);
        assert_eq!(
            offer.opts().get(OptionCode::Preference),
            Some(&DhcpOption::Preference(255))
        );
        let (address, valid) = given(&offer).unwrap();
        assert!(server.device.address.contains(&address) && valid == 7200);
        let named = [association(&[address]), this(&server)];
        for kind in [MessageType::Request, MessageType::Renew] {
            let answer = ask(&server, &message(kind, 1, &named), now).unwrap();
            assert_eq!(answer.msg_type(), MessageType::Reply);
            assert_eq!(given(&answer).unwrap(), (address, 7200), "{kind:?}");
        }
        let rebind = message(MessageType::Rebind, 1, &named[..1]);
        assert_eq!(
            given(&ask(&server, &rebind, now).unwrap()).unwrap().0,
            address
        );
        // It is nobody else's.
        let other = message(MessageType::Rebind, 2, &named[..1]);
        assert_eq!(
            given(&ask(&server, &other, now).unwrap()),
            Err(Status::NoBinding)
        );
        // What is not the guest's stays another's.
        for kind in [MessageType::Release, MessageType::Decline] {
            let answer = ask(&server, &message(kind, 2, &named), now).unwrap();
            assert_eq!(status(&answer), Status::Success);
            assert_eq!(given(&answer), Err(Status::NoBinding));
        }
        let elsewhere = [
            association(&["fd00:7a70::5".parse().unwrap()]),
            this(&server),
        ];
        ask(&server, &message(MessageType::Release, 1, &elsewhere), now).unwrap();
        let answer = ask(&server, &other, now).unwrap();
        assert_eq!(given(&answer), Err(Status::NoBinding), "it is still had");
        let released = ask(&server, &message(MessageType::Release, 1, &named), now).unwrap();
        assert_eq!(status(&released), Status::Success);
        assert_eq!(associations(&released).count(), 0);
        let answer = ask(&server, &other, now).unwrap();
        assert_eq!(given(&answer).unwrap().0, address, "it is free");
    }

    #[test]
    fn a_guest_in_haste_gets_it_at_once() {
        let server = server("fd00:7a70::1/64");
        let options = [association(&[]), DhcpOption::RapidCommit];
        let solicit = message(MessageType::Solicit, 1, &options);
        let answer = ask(&server, &solicit, Instant::now()).unwrap();
        assert_eq!(answer.msg_type(), MessageType::Reply);
        assert!(answer.opts().get(OptionCode::RapidCommit).is_some());
        assert!(given(&answer).is_ok());
    }

    #[test]
    fn an_address_of_another_link_is_no_more_of_use() {
        let (server, now) = (server("fd00:7a70::1/64"), Instant::now());
        let elsewhere: Ipv6Addr = "2001:db8::5".parse().unwrap();
        let options = [association(&[elsewhere])];
        let confirm = ask(&server, &message(MessageType::Confirm, 1, &options), now);
        assert_eq!(status(&confirm.unwrap()), Status::NotOnLink);
        let here = [association(&["fd00:7a70::5".parse().unwrap()])];
        let confirm = ask(&server, &message(MessageType::Confirm, 1, &here), now);
        assert_eq!(status(&confirm.unwrap()), Status::Success);
        let without = message(MessageType::Confirm, 1, &[]);
        assert_eq!(ask(&server, &without, now), None);
        let request = [association(&[elsewhere]), this(&server)];
        let answer = ask(&server, &message(MessageType::Request, 1, &request), now);
        assert_eq!(given(&answer.unwrap()), Err(Status::NotOnLink));
        let answer = ask(&server, &message(MessageType::Rebind, 1, &options), now).unwrap();
        let association = associations(&answer).next().unwrap();
        let Some(DhcpOption::IAAddr(address)) = association.opts.get(OptionCode::IAAddr) else {
            panic!("{association:?}");
        };
        assert_eq!((address.addr, address.valid_life), (elsewhere, 0));
    }

    #[test]
    fn what_somebody_else_has_is_not_given_again() {
        let (server, now) = (server("fd00:7a70::1/64"), Instant::now());
        let solicit = message(
            MessageType::Solicit,
            1,
            &[association(&[]), DhcpOption::RapidCommit],
        );
        let (address, _) = given(&ask(&server, &solicit, now).unwrap()).unwrap();
        let named = [association(&[address]), this(&server)];
        ask(&server, &message(MessageType::Decline, 1, &named), now).unwrap();
        let (another, _) = given(&ask(&server, &solicit, now).unwrap()).unwrap();
        assert_ne!(another, address);
    }

    #[test]
    fn there_are_no_more_than_the_network_has() {
        let (server, now) = (server("fd00:7a70::1/126"), Instant::now());
        let rapid = [association(&[]), DhcpOption::RapidCommit];
        let answer = |number| {
            let solicit = message(MessageType::Solicit, number, &rapid);
            given(&ask(&server, &solicit, now).unwrap())
        };
        assert!(answer(1).is_ok() && answer(2).is_ok());
        assert_eq!(answer(3), Err(Status::NoAddrsAvail));
        let offered = message(MessageType::Solicit, 3, &rapid[..1]);
        assert_eq!(
            given(&ask(&server, &offered, now).unwrap()),
            Err(Status::NoAddrsAvail)
        );
    }

    #[test]
    fn whoever_is_plugged_in_next_gets_an_address() {
        let (server, now) = (server("fd00:7a70::1/126"), Instant::now());
        let servers = Servers {
            pools: Pools::from([(server.device.address.trunc(), server.pool.clone())]),
            ..Servers::default()
        };
        let rapid = [association(&[]), DhcpOption::RapidCommit];
        let answer = |number, now| {
            let solicit = message(MessageType::Solicit, number, &rapid);
            given(&ask(&server, &solicit, now).unwrap())
        };
        assert!(answer(1, now).is_ok() && answer(2, now).is_ok());
        servers.unplug("fd00:7a71::/126".parse().unwrap());
        assert!(answer(3, Instant::now()).is_err(), "others stay");
        servers.unplug(server.device.address.trunc());
        assert!(answer(3, Instant::now()).is_ok());
    }

    #[test]
    fn what_is_for_another_or_wrong_gets_no_answer() {
        let (server, now) = (server("fd00:7a70::1/64"), Instant::now());
        let another = DhcpOption::ServerId(vec![0, 3, 0, 1, 9, 9, 9, 9, 9, 9]);
        let named = association(&["fd00:7a70::5".parse().unwrap()]);
        for (kind, options) in [
            (MessageType::Request, vec![named.clone(), another.clone()]),
            (MessageType::Request, vec![named.clone()]),
            (MessageType::Solicit, vec![named.clone(), this(&server)]),
            (MessageType::Rebind, vec![named.clone(), this(&server)]),
            (MessageType::InformationRequest, vec![another]),
            (MessageType::Advertise, vec![named.clone()]),
            (MessageType::Reply, vec![named.clone()]),
            (MessageType::RelayForw, vec![named.clone()]),
            (MessageType::Unknown(200), vec![named.clone()]),
        ] {
            let asked = message(kind, 1, &options);
            assert_eq!(ask(&server, &asked, now), None, "{kind:?}");
        }
        let mut nameless = Message::new_with_id(MessageType::Solicit, [0, 0, 1]);
        nameless.opts_mut().insert(named);
        assert_eq!(ask(&server, &nameless, now), None);
        nameless
            .opts_mut()
            .insert(DhcpOption::ClientId(vec![0; LONGEST_DUID + 1]));
        assert_eq!(ask(&server, &nameless, now), None);
    }

    #[test]
    fn one_message_takes_a_few_addresses_at_most() {
        let (server, now) = (server("fd00:7a70::1/64"), Instant::now());
        let many: Vec<_> = (0..100)
            .map(|id| {
                DhcpOption::IANA(IANA {
                    id,
                    t1: 0,
                    t2: 0,
                    opts: DhcpOptions::new(),
                })
            })
            .collect();
        let answer = ask(&server, &message(MessageType::Solicit, 1, &many), now).unwrap();
        let all = answer.opts().get_all(OptionCode::IANA).unwrap();
        assert_eq!(all.len(), MOST_ADDRESSES);
    }

    /// Guests send what they like: nothing of it ends the process.
    #[test]
    fn no_message_is_too_odd() {
        let (server, now) = (server("fd00:7a70::1/64"), Instant::now());
        let whole = message(
            MessageType::Solicit,
            1,
            &[association(&["fd00:7a70::5".parse().unwrap()])],
        )
        .to_vec()
        .unwrap();
        let mut state = 1_u32;
        let mut next = || {
            // xorshift (Marsaglia, 2003).
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        for _ in 0..20_000 {
            let mut odd = whole.clone();
            odd.truncate(usize::try_from(next()).unwrap() % (whole.len() + 1));
            for _ in 0..next() % 4 {
                let place = usize::try_from(next()).unwrap();
                let length = odd.len().max(1);
                if let Some(byte) = odd.get_mut(place % length) {
                    *byte = next().to_be_bytes()[3] % 40;
                }
            }
            let _ = server.answer(&odd, now);
        }
        // Options that say that they are shorter than what is in each of them, and many in one
        // another.
        for kind in 0..64_u8 {
            let _ = server.answer(&[1, 0, 0, 1, 0, kind, 0, 0], now);
            let _ = server.answer(&[1, 0, 0, 1, 0, kind, 0, 1, 0, 0, 0, 0], now);
        }
        let nested = |kind: u8, head: usize| {
            let mut message = Vec::new();
            while message.len() + head + 4 + 4 < LONGEST {
                let length = u16::try_from(message.len() + head).unwrap().to_be_bytes();
                let option = [&[0, kind], &length[..], &vec![0; head]].concat();
                message = [option, message].concat();
            }
            [vec![1, 0, 0, 1], message].concat()
        };
        // IA_NA, IA_TA, vendor options, and messages of relays.
        for (kind, head) in [(3, 12), (4, 4), (17, 4), (9, 34)] {
            assert_eq!(server.answer(&nested(kind, head), now), None);
        }
    }
}
