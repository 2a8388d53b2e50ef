//! NAT behaviour discovery by STUN (RFC 5780): a server with two addresses and
//! two ports, and the questions to it. The messages are `stun_codec`'s.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bytecodec::{DecodeExt as _, EncodeExt as _};
use stun_codec::{
    Attribute as _, Message, MessageClass, MessageDecoder, MessageEncoder, TransactionId,
    define_attribute_enums,
    rfc5389::{attributes::XorMappedAddress, methods::BINDING},
    rfc5780::attributes::{ChangeRequest, OtherAddress, ResponseOrigin},
};
use tapnat_testbed::{Namespace, traffic};

define_attribute_enums!(
    Answer,
    AnswerDecoder,
    AnswerEncoder,
    [XorMappedAddress, OtherAddress, ResponseOrigin]
);
define_attribute_enums!(Question, QuestionDecoder, QuestionEncoder, [ChangeRequest]);

/// How long an answer that may be filtered is waited for.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the server looks whether it is to end.
const BREATH: Duration = Duration::from_millis(50);

/// Mapping or filtering, as RFC 4787 has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// A server. Each of its four endpoints answers binding requests, from the one
/// that the request asks for.
#[derive(Debug)]
pub struct Server {
    endpoints: [SocketAddr; 4],
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts one in a namespace.
    ///
    /// # Errors
    /// An address is not the namespace's, or a port is taken.
    pub fn start(namespace: &Namespace, addresses: [IpAddr; 2], ports: [u16; 2]) -> Result<Self> {
        // Bit 0 is the port, bit 1 the address, in a change request's order.
        let endpoints = [0, 1, 2, 3]
            .map(|place: usize| SocketAddr::new(addresses[place >> 1], ports[place & 1]));
        let mut sockets = Vec::new();
        for endpoint in endpoints {
            let socket = traffic::udp_socket(namespace, endpoint)?;
            socket.set_read_timeout(Some(BREATH))?;
            sockets.push(socket);
        }
        let sockets = Arc::new(sockets);
        let ended = Arc::new(AtomicBool::new(false));
        let serve = |place: usize| {
            let (sockets, ended) = (sockets.clone(), ended.clone());
            thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    // What is no request gets no answer.
                    let _ = answer(&sockets, &endpoints, place);
                }
            })
        };
        Ok(Self {
            endpoints,
            threads: (0..sockets.len()).map(serve).collect(),
            ended,
        })
    }

    /// Where to ask first.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.endpoints[0]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn answer(sockets: &[UdpSocket], endpoints: &[SocketAddr; 4], place: usize) -> Result<()> {
    let mut buffer = [0; 1500];
    let (length, peer) = sockets[place].recv_from(&mut buffer)?;
    let request = read(&buffer[..length])?;
    // stun_codec 0.4 writes a change request, but reads the wrong bits of it.
    let change = request
        .unknown_attributes()
        .find(|attribute| attribute.get_type().as_u16() == ChangeRequest::CODEPOINT)
        .and_then(|attribute| attribute.value().last());
    let from = place ^ usize::from(change.unwrap_or(&0) >> 1 & 3);
    let class = MessageClass::SuccessResponse;
    let mut response = Message::<Answer>::new(class, BINDING, request.transaction_id());
    response.add_attribute(XorMappedAddress::new(peer));
    response.add_attribute(ResponseOrigin::new(endpoints[from]));
    response.add_attribute(OtherAddress::new(endpoints[place ^ 3]));
    let bytes = MessageEncoder::new().encode_into_bytes(response)?;
    sockets[from].send_to(&bytes, peer)?;
    Ok(())
}

fn read(bytes: &[u8]) -> Result<Message<Answer>> {
    let decoded = MessageDecoder::<Answer>::new().decode_from_bytes(bytes)?;
    decoded.map_err(|broken| anyhow::anyhow!("a broken STUN message: {broken:?}"))
}

/// The mapping behaviour that a socket sees (RFC 5780 section 4.3).
///
/// # Errors
/// The server does not answer.
pub fn discover_mapping(socket: &UdpSocket, server: SocketAddr) -> Result<Behaviour> {
    let first = ask(socket, server, None)?.context("no answer")?;
    let other = other_address(&first)?;
    let second = SocketAddr::new(other.ip(), server.port());
    let second = ask(socket, second, None)?.context("no answer of the other address")?;
    if mapped(&second)? == mapped(&first)? {
        return Ok(Behaviour::EndpointIndependent);
    }
    let third = ask(socket, other, None)?.context("no answer of the other endpoint")?;
    Ok(if mapped(&third)? == mapped(&second)? {
        Behaviour::AddressDependent
    } else {
        Behaviour::AddressAndPortDependent
    })
}

/// The filtering behaviour that a socket sees (RFC 5780 section 4.4); one that
/// has asked nobody but this server's first endpoint.
///
/// # Errors
/// The server does not answer.
pub fn discover_filtering(socket: &UdpSocket, server: SocketAddr) -> Result<Behaviour> {
    ask(socket, server, None)?.context("no answer")?;
    let from_elsewhere = ask(socket, server, Some(ChangeRequest::new(true, true)))?;
    if from_elsewhere.is_some() {
        return Ok(Behaviour::EndpointIndependent);
    }
    let from_other_port = ask(socket, server, Some(ChangeRequest::new(false, true)))?;
    Ok(if from_other_port.is_some() {
        Behaviour::AddressDependent
    } else {
        Behaviour::AddressAndPortDependent
    })
}

/// The endpoint that the server sees of a socket.
///
/// # Errors
/// The server does not answer.
pub fn mapped_address(socket: &UdpSocket, server: SocketAddr) -> Result<SocketAddr> {
    mapped(&ask(socket, server, None)?.context("no answer")?)
}

/// The response to a binding request, if one comes.
fn ask(
    socket: &UdpSocket,
    server: SocketAddr,
    change: Option<ChangeRequest>,
) -> Result<Option<Message<Answer>>> {
    static NUMBER: AtomicU8 = AtomicU8::new(0);
    let transaction = TransactionId::new([NUMBER.fetch_add(1, Ordering::Relaxed); 12]);
    let mut request = Message::<Question>::new(MessageClass::Request, BINDING, transaction);
    if let Some(change) = change {
        request.add_attribute(change);
    }
    let bytes = MessageEncoder::new().encode_into_bytes(request)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(&bytes, server)?;
    let mut buffer = [0; 1500];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) => return Err(error).context("cannot receive"),
        };
        let response = read(&buffer[..length])?;
        if response.transaction_id() != transaction {
            continue;
        }
        let origin = response.get_attribute::<ResponseOrigin>();
        if origin.map(ResponseOrigin::address) != Some(from) {
            bail!("an answer of {origin:?} came from {from}");
        }
        return Ok(Some(response));
    }
}

fn mapped(response: &Message<Answer>) -> Result<SocketAddr> {
    let attribute = response.get_attribute::<XorMappedAddress>();
    attribute
        .map(XorMappedAddress::address)
        .context("no mapped address")
}

fn other_address(response: &Message<Answer>) -> Result<SocketAddr> {
    let attribute = response.get_attribute::<OtherAddress>();
    attribute
        .map(OtherAddress::address)
        .context("no other address")
}
