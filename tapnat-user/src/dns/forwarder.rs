//! Takes guests' questions to the host's resolvers, and the answers back, as they are (RFC 5625
//! section 4: what a proxy does not understand it passes on). Keeps nothing: no cache, no record of who
//! asked what. That an answer is the question's is `domain`'s to tell. How much guests may ask at once
//! is [`super::room`]'s.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use domain::base::{Message, MessageBuilder, iana::Rcode};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    Gateway,
    room::{Place, Rooms},
};
use crate::{host::resolvers, services::Rate};

const DNS: u16 = 53;
/// The longest that UDP carries.
const LONGEST: usize = u16::MAX as usize;
/// How long a resolver may take until the next one is asked, which is what the C library gives it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may last. Those who have more to ask connect again (RFC 7766 section 6.2.3).
const LONGEST_TALK: Duration = Duration::from_mins(1);
/// Questions from one device that are taken in a second.
const MOST_QUESTIONS: u32 = 2000;
/// Connections that wait to be taken.
const BACKLOG: i32 = 16;
/// How long to rest when the host has no descriptor or memory left.
const REST: Duration = Duration::from_millis(100);

type Query = Message<Vec<u8>>;

/// What listens to the guests of one device.
#[derive(Debug)]
pub(super) struct Forwarder {
    questions: Arc<UdpSocket>,
    connections: TcpListener,
    gateway: Gateway,
    rooms: Arc<Rooms>,
}

impl Forwarder {
    /// Listens on the host's address on a device, for what arrives there.
    pub fn listen(gateway: Gateway, rooms: Arc<Rooms>) -> io::Result<Self> {
        let here = SocketAddr::from((gateway.address, DNS));
        let open = |kind, protocol| {
            let socket = Socket::new(Domain::for_address(here), kind, Some(protocol))?;
            socket.bind_device(Some(gateway.device.as_bytes()))?;
            // The address may be about to come back.
            if here.is_ipv4() {
                socket.set_freebind_v4(true)?;
            } else {
                socket.set_freebind_v6(true)?;
            }
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        };
        let here = here.into();
        let questions = open(Type::DGRAM, Protocol::UDP)?;
        questions.bind(&here)?;
        let connections = open(Type::STREAM, Protocol::TCP)?;
        // Connections of one that ended just now are no obstacle.
        connections.set_reuse_address(true)?;
        connections.bind(&here)?;
        connections.listen(BACKLOG)?;
        Ok(Self {
            questions: Arc::new(UdpSocket::from_std(questions.into())?),
            connections: TcpListener::from_std(connections.into())?,
            gateway,
            rooms,
        })
    }

    /// Serves guests until it is dropped, with all that it has begun.
    pub async fn run(self) {
        let mut work = JoinSet::new();
        let mut buffer = vec![0; LONGEST];
        let mut taken = Rate::new(MOST_QUESTIONS, Instant::now());
        loop {
            tokio::select! {
                received = self.questions.recv_from(&mut buffer) => {
                    let Ok((length, guest)) = received else {
                        sleep(REST).await;
                        continue;
                    };
                    if !taken.takes(Instant::now()) {
                        continue;
                    }
                    let text = buffer.get(..length).unwrap_or_default();
                    if let Some(query) = query(text)
                        && let Some(place) = self.place(guest, |rooms| &rooms.questions)
                    {
                        let socket = self.questions.clone();
                        work.spawn(reply(socket, guest, query, self.resolvers(), place));
                    }
                }
                accepted = self.connections.accept() => {
                    let Ok((connection, guest)) = accepted else {
                        sleep(REST).await;
                        continue;
                    };
                    if let Some(place) = self.place(guest, |rooms| &rooms.connections) {
                        work.spawn(connect(connection, self.resolvers(), place));
                    }
                }
                Some(_) = work.join_next() => {}
            }
        }
    }

    fn place(
        &self,
        guest: SocketAddr,
        room: impl Fn(&Rooms) -> &Arc<super::room::Room>,
    ) -> Option<Place> {
        room(&self.rooms).enter(self.gateway.index, guest.ip())
    }

    /// Whom to ask. Never this forwarder itself, which the host may have for a resolver.
    fn resolvers(&self) -> Vec<SocketAddr> {
        let mut resolvers = resolvers::of_host();
        resolvers.retain(|resolver| resolver.ip() != self.gateway.address);
        resolvers
    }
}

/// What a guest sent, if it asks something.
fn query(text: &[u8]) -> Option<Query> {
    let message = Message::from_octets(text.to_vec()).ok()?;
    (!message.header().qr()).then_some(message)
}

async fn reply(
    socket: Arc<UdpSocket>,
    guest: SocketAddr,
    query: Query,
    resolvers: Vec<SocketAddr>,
    place: Place,
) {
    let answer = answer(&query, &resolvers).await;
    // A guest that is gone does not ask again.
    let _ = socket.send_to(&answer, guest).await;
    drop(place);
}

/// What the first resolver says that says something, or that none does.
async fn answer(query: &Query, resolvers: &[SocketAddr]) -> Vec<u8> {
    for resolver in resolvers {
        if let Ok(Ok(answer)) = timeout(PATIENCE, ask(*resolver, query)).await {
            return answer;
        }
    }
    MessageBuilder::new_vec()
        .start_error(query, Rcode::SERVFAIL)
        .finish()
}

async fn ask(resolver: SocketAddr, query: &Query) -> io::Result<Vec<u8>> {
    // A port of its own: nobody else can guess where the answer is waited for.
    let socket = UdpSocket::bind(any(resolver)).await?;
    socket.connect(resolver).await?;
    socket.send(query.as_slice()).await?;
    loop {
        socket.readable().await?;
        let mut buffer = vec![0; LONGEST];
        match socket.try_recv(&mut buffer) {
            Ok(length) => buffer.truncate(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        let is_answer = Message::from_slice(&buffer).is_ok_and(|answer| answer.is_answer(query));
        if is_answer {
            return Ok(buffer);
        }
    }
}

fn any(resolver: SocketAddr) -> SocketAddr {
    match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Connects a guest with the first resolver that takes it.
async fn connect(mut guest: TcpStream, resolvers: Vec<SocketAddr>, place: Place) {
    for resolver in resolvers {
        if let Ok(Ok(mut there)) = timeout(PATIENCE, TcpStream::connect(resolver)).await {
            let talk = tokio::io::copy_bidirectional(&mut guest, &mut there);
            // Whichever side ends it, it is over.
            let _ = timeout(LONGEST_TALK, talk).await;
            break;
        }
    }
    drop(place);
}
