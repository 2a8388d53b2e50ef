//! Real traffic: servers that tell a peer which endpoint they saw, clients
//! bound to chosen ports, senders of arbitrary packets, and `curl` and `iperf3`
//! with their results read; `ping` has its own module.
//!
//! Everything is bounded in time, and nothing is sent twice to make up for a
//! loss: a test that allows losses says so itself.

mod ping;

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    poll::PollTimeout,
    sys::socket::{LinkAddr, MsgFlags, sendto, setsockopt, sockopt},
};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

pub use ping::{Ping, Pings, ping, start_pings};

use crate::{
    Namespace,
    process::Process,
    sys::{self, Stop, Wake},
};

/// How long a client waits for an answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes that may wait in a UDP socket, with what the kernel adds to each datagram.
const RECEIVE_BUFFER: usize = 4 << 20;

const LARGEST_DATAGRAM: usize = 65_536;

/// A datagram as a server got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Where it came from, as the server saw it.
    pub peer: SocketAddr,
    /// What was in it.
    pub payload: Vec<u8>,
}

/// A UDP server that answers each datagram with the sender's endpoint as it
/// saw it, a line feed, and the datagram.
#[derive(Debug)]
pub struct UdpReflector {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Datagram>>>,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl UdpReflector {
    /// Starts a server in a namespace; port 0 chooses a free one.
    ///
    /// # Errors
    /// The address is not the namespace's or the port is taken.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let socket = udp_socket(namespace, address)?;
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        let received = Arc::new(Mutex::new(Vec::new()));
        let stop = Stop::new()?;
        let thread = {
            let (received, stop) = (received.clone(), stop.clone());
            thread::spawn(move || reflect_datagrams(&socket, &received, &stop))
        };
        Ok(Self {
            address,
            received,
            stop,
            thread: Some(thread),
        })
    }

    /// Where the server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// All it has got so far.
    #[must_use]
    pub fn received(&self) -> Vec<Datagram> {
        lock(&self.received).clone()
    }
}

impl Drop for UdpReflector {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn reflect_datagrams(socket: &UdpSocket, received: &Mutex<Vec<Datagram>>, stop: &Stop) {
    let mut buffer = vec![0; LARGEST_DATAGRAM];
    while let Ok(Wake::Readable | Wake::Broken) =
        sys::wait_readable(socket, stop, PollTimeout::NONE)
    {
        // An error is one that an ICMP message left for the next call.
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let payload = buffer[..length].to_vec();
            let answer = [format!("{peer}\n").as_bytes(), &payload].concat();
            lock(received).push(Datagram { peer, payload });
            // A lost answer is the client's to notice.
            let _ = socket.send_to(&answer, peer);
        }
    }
}

/// A UDP socket of a namespace, usable from any thread.
///
/// # Errors
/// The address is not the namespace's or the port is taken.
pub fn udp_socket(namespace: &Namespace, local: SocketAddr) -> Result<UdpSocket> {
    let socket = namespace.run(|| {
        UdpSocket::bind(local)
            .with_context(|| format!("cannot bind UDP {local} in {}", namespace.name()))
    })?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    // What comes while its reader gets no processor is not lost.
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)
        .context("cannot enlarge the receive buffer")?;
    Ok(socket)
}

/// Sends a datagram with this payload to a [`UdpReflector`] and returns the
/// endpoint that it saw.
///
/// # Errors
/// No answer came from that server in time, or not the payload.
pub fn reflect_udp(socket: &UdpSocket, server: SocketAddr, payload: &[u8]) -> Result<SocketAddr> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    // Late answers to earlier questions must not be taken for this one's.
    let number = NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let question = [&number, payload].concat();
    socket
        .send_to(&question, server)
        .with_context(|| format!("cannot send to {server}"))?;
    let mut buffer = vec![0; LARGEST_DATAGRAM];
    loop {
        let (length, peer) = socket
            .recv_from(&mut buffer)
            .with_context(|| format!("no answer from {server} (UDP)"))?;
        let answer = &buffer[..length];
        let Some(end) = answer.iter().position(|byte| *byte == b'\n') else {
            continue;
        };
        if peer != server || !answer[end + 1..].starts_with(&number) {
            continue;
        }
        ensure!(
            answer[end + 1..] == question,
            "{server} answered with another payload"
        );
        let seen = std::str::from_utf8(&answer[..end])?;
        return seen
            .parse()
            .with_context(|| format!("{server} said it saw {seen:?}"));
    }
}

/// A TCP server that greets each client with the endpoint it saw and a line
/// feed, and then echoes.
#[derive(Debug)]
pub struct TcpReflector {
    address: SocketAddr,
    connections: Arc<Mutex<Vec<(SocketAddr, TcpStream)>>>,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl TcpReflector {
    /// Starts a server in a namespace; port 0 chooses a free one.
    ///
    /// # Errors
    /// The address is not the namespace's or the port is taken.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let listener = tcp_listener(namespace, address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let connections = Arc::new(Mutex::new(Vec::new()));
        let stop = Stop::new()?;
        let thread = {
            let (connections, stop) = (connections.clone(), stop.clone());
            thread::spawn(move || accept_connections(&listener, &connections, &stop))
        };
        Ok(Self {
            address,
            connections,
            stop,
            thread: Some(thread),
        })
    }

    /// Where the server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The peers of all connections so far, as the server saw them.
    #[must_use]
    pub fn peers(&self) -> Vec<SocketAddr> {
        lock(&self.connections)
            .iter()
            .map(|(peer, _)| *peer)
            .collect()
    }
}

impl Drop for TcpReflector {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for (_, stream) in lock(&self.connections).drain(..) {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept_connections(
    listener: &TcpListener,
    connections: &Mutex<Vec<(SocketAddr, TcpStream)>>,
    stop: &Stop,
) {
    while let Ok(Wake::Readable) = sys::wait_readable(listener, stop, PollTimeout::NONE) {
        while let Ok((stream, peer)) = listener.accept() {
            let Ok(handle) = stream.try_clone() else {
                continue;
            };
            lock(connections).push((peer, handle));
            thread::spawn(move || echo(stream, peer));
        }
    }
}

fn echo(mut stream: TcpStream, peer: SocketAddr) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("{peer}\n").as_bytes())?;
    std::io::copy(&mut stream.try_clone()?, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

/// A listening TCP socket of a namespace, usable from any thread.
///
/// # Errors
/// The address is not the namespace's or the port is taken.
pub fn tcp_listener(namespace: &Namespace, address: SocketAddr) -> Result<TcpListener> {
    namespace.run(|| {
        TcpListener::bind(address)
            .with_context(|| format!("cannot listen on TCP {address} in {}", namespace.name()))
    })
}

/// Connects from a namespace, from a given local endpoint or any.
///
/// # Errors
/// The local endpoint cannot be bound, or nobody accepts in time.
pub fn connect(
    namespace: &Namespace,
    local: Option<SocketAddr>,
    remote: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream> {
    let socket = namespace.run(|| {
        Ok(Socket::new(
            Domain::for_address(remote),
            Type::STREAM,
            Some(Protocol::TCP),
        )?)
    })?;
    if let Some(local) = local {
        socket.set_reuse_address(true)?;
        socket
            .bind(&local.into())
            .with_context(|| format!("cannot bind TCP {local} in {}", namespace.name()))?;
    }
    socket
        .connect_timeout(&remote.into(), timeout)
        .with_context(|| format!("cannot connect to {remote} from {}", namespace.name()))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection to a [`TcpReflector`].
#[derive(Debug)]
pub struct TcpSession {
    reader: BufReader<TcpStream>,
    seen: SocketAddr,
}

impl TcpSession {
    /// Connects and reads the greeting.
    ///
    /// # Errors
    /// As [`connect`], or no greeting in time.
    pub fn open(
        namespace: &Namespace,
        local: Option<SocketAddr>,
        server: SocketAddr,
    ) -> Result<Self> {
        let stream = connect(namespace, local, server, ANSWER_TIMEOUT)?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader
            .read_line(&mut line)
            .with_context(|| format!("no greeting from {server}"))?;
        let seen = line.trim_end();
        let seen = seen
            .parse()
            .with_context(|| format!("{server} said it saw {seen:?}"))?;
        Ok(Self { reader, seen })
    }

    /// Our endpoint as the server saw it.
    #[must_use]
    pub fn seen(&self) -> SocketAddr {
        self.seen
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    /// Sends bytes and checks that the same come back.
    ///
    /// # Errors
    /// The connection broke, or other bytes came back.
    pub fn exchange(&mut self, payload: &[u8]) -> Result<()> {
        let mut writer = self.stream().try_clone()?;
        let mut answer = vec![0; payload.len()];
        thread::scope(|scope| {
            // Both ends stall when nobody reads what comes back.
            let sent = scope.spawn(move || writer.write_all(payload));
            self.reader.read_exact(&mut answer).context("no echo")?;
            sent.join().unwrap_or(Ok(())).context("cannot send")
        })?;
        ensure!(
            answer == payload,
            "the echo has other bytes than what was sent"
        );
        Ok(())
    }
}

/// An HTTP server. `/` answers with the client's endpoint as the server saw
/// it; `/bytes/N` with N bytes of [`pattern`]; a PUT or POST with the number
/// of bytes received, if they were [`pattern`]'s.
pub struct HttpServer {
    namespace: Namespace,
    address: SocketAddr,
    server: Option<Arc<tiny_http::Server>>,
    threads: Vec<JoinHandle<()>>,
}

impl HttpServer {
    /// Starts a server in a namespace; port 0 chooses a free one.
    ///
    /// # Errors
    /// The address is not the namespace's or the port is taken.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        const WORKERS: usize = 4;
        let listener = tcp_listener(namespace, address)?;
        let address = listener.local_addr()?;
        let server = tiny_http::Server::from_listener(listener, None)
            .map_err(|error| anyhow::anyhow!("cannot start an HTTP server: {error}"))?;
        let server = Arc::new(server);
        let threads = (0..WORKERS)
            .map(|_| {
                let server = server.clone();
                thread::spawn(move || {
                    while let Ok(request) = server.recv() {
                        // A client that went away is the client's business.
                        let _ = answer_http(request);
                    }
                })
            })
            .collect();
        Ok(Self {
            namespace: namespace.clone(),
            address,
            server: Some(server),
            threads,
        })
    }

    /// Where the server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        for _ in &self.threads {
            server.unblock();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // It ends its listener by a connection to it, which is to stay in there.
        let _ = self.namespace.run(|| {
            drop(server);
            Ok(())
        });
    }
}

fn answer_http(mut request: tiny_http::Request) -> std::io::Result<()> {
    use tiny_http::{Method, Response};
    if matches!(request.method(), Method::Post | Method::Put) {
        let mut body = Vec::new();
        request.as_reader().read_to_end(&mut body)?;
        if body != pattern(body.len()) {
            return request.respond(Response::from_string("corrupt").with_status_code(400));
        }
        return request.respond(Response::from_string(body.len().to_string()));
    }
    if let Some(length) = request.url().strip_prefix("/bytes/") {
        return match length.parse() {
            Ok(length) => request.respond(Response::from_data(pattern(length))),
            Err(_) => request.respond(Response::from_string("no number").with_status_code(404)),
        };
    }
    let peer = request
        .remote_addr()
        .map(ToString::to_string)
        .unwrap_or_default();
    request.respond(Response::from_string(peer))
}

/// Bytes of printable text that do not repeat with any period a packet has.
#[must_use]
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    let mut next = || {
        // Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        b'0' + (state % 64) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Fetches a URL with `curl` from a namespace and returns the body.
///
/// # Errors
/// `curl`'s failure, an HTTP status of 400 or more included.
pub fn curl(namespace: &Namespace, url: &str) -> Result<String> {
    namespace
        .command("curl")
        .args(["-q", "--noproxy", "*", "--fail", "--silent", "--show-error"])
        .args(["--max-time", "15", url])
        .run()
}

/// What `iperf3` reported.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Iperf {
    /// Payload bits per second that arrived.
    pub bits_per_second: f64,
    /// Payload bytes that were sent.
    pub sent: u64,
    /// Payload bytes that arrived before the end: what is under way then does
    /// not count.
    pub received: u64,
    /// TCP retransmissions, where the sender counts them.
    pub retransmits: Option<u64>,
    /// UDP datagrams lost, and sent in all.
    pub datagrams: Option<(u64, u64)>,
}

/// How much `iperf3` is to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// As much as it can in so many seconds.
    Seconds(u32),
    /// So many bytes.
    Bytes(u64),
}

/// Runs one `iperf3` transfer from a client to a server address, with the
/// congestion control cubic; `options` are further client arguments (`-R` for
/// the other way, `-u -b 100M`, `-P 4`).
///
/// # Errors
/// `iperf3` cannot run, cannot connect, or reports an error.
pub fn iperf3(
    client: &Namespace,
    server: &Namespace,
    address: SocketAddr,
    amount: Amount,
    options: &[&str],
) -> Result<Iperf> {
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let _listener = serve_iperf3(server, address)?;
    let (amount, duration) = match amount {
        Amount::Seconds(seconds) => (["--time".to_owned(), seconds.to_string()], seconds),
        Amount::Bytes(bytes) => (["--bytes".to_owned(), bytes.to_string()], 0),
    };
    let mut command = client
        .command("iperf3")
        .args([
            "--json",
            "--connect-timeout",
            "3000",
            "--client",
            &host,
            "--port",
            &port,
        ])
        .args(amount)
        .timeout(Duration::from_secs(u64::from(duration) + 30));
    if !options.contains(&"-u") {
        command = command.args(["--congestion", "cubic"]);
    }
    // iperf3 tells its errors in the JSON, with a status of 1.
    let output = command.args(options).output()?;
    Iperf::read(if output.stdout.is_empty() {
        &output.stderr
    } else {
        &output.stdout
    })
    .with_context(|| format!("iperf3 from {} to {address}", client.name()))
}

/// Starts an `iperf3` server for one transfer, and waits until it listens.
///
/// # Errors
/// `iperf3` cannot run, or the address is not the namespace's or taken.
pub fn serve_iperf3(namespace: &Namespace, address: SocketAddr) -> Result<Process> {
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let mut listener = namespace
        .command("iperf3")
        .args(["--server", "--one-off", "--forceflush"])
        .args(["--bind", &host, "--port", &port])
        .spawn()?;
    listener.wait_for_line(Duration::from_secs(5), |line| {
        line.contains("Server listening")
    })?;
    Ok(listener)
}

impl Iperf {
    /// Reads what an `iperf3` client with `--json` printed.
    ///
    /// # Errors
    /// It is no report, or one of an error.
    pub fn read(json: &str) -> Result<Self> {
        let report: Value =
            serde_json::from_str(json).with_context(|| format!("no report: {json}"))?;
        if let Some(error) = report.get("error").and_then(Value::as_str) {
            bail!("{error}");
        }
        let end = report.get("end").context("the report has no end")?;
        let number = |path: &str| end.pointer(path).and_then(Value::as_u64);
        let sum = if end.get("sum_received").is_some() {
            "/sum_received"
        } else {
            "/sum"
        };
        Ok(Self {
            bits_per_second: end
                .pointer(&format!("{sum}/bits_per_second"))
                .and_then(Value::as_f64)
                .context("the report has no rate")?,
            sent: number("/sum_sent/bytes").context("the report lacks the bytes sent")?,
            received: number(&format!("{sum}/bytes"))
                .context("the report lacks the bytes received")?,
            retransmits: number("/sum_sent/retransmits"),
            datagrams: number("/sum/lost_packets").zip(number("/sum/packets")),
        })
    }
}

/// Sends packets with any IP header whatsoever by the namespace's routes.
#[derive(Debug)]
pub struct IpSender(Socket);

impl IpSender {
    /// Opens a raw socket for IPv4 or IPv6, as the address is.
    ///
    /// # Errors
    /// No root.
    pub fn open(namespace: &Namespace, family: IpAddr) -> Result<Self> {
        let protocol = Protocol::from(libc::IPPROTO_RAW);
        let domain = if family.is_ipv4() {
            Domain::IPV4
        } else {
            Domain::IPV6
        };
        // IPPROTO_RAW means that the header is included (raw(7)).
        let socket = namespace.run(|| {
            Socket::new(domain, Type::RAW, Some(protocol)).context("cannot open a raw socket")
        })?;
        Ok(Self(socket))
    }

    /// Sends a packet that begins with its IP header. The kernel fills in the
    /// IPv4 header's checksum and length, and an identification of 0.
    ///
    /// # Errors
    /// No route, too long for the device, or not IP.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        let ip = etherparse::IpSlice::from_slice(packet).context("not an IP packet")?;
        let destination = SocketAddr::new(ip.destination_addr(), 0);
        self.0
            .send_to(packet, &destination.into())
            .with_context(|| format!("cannot send to {}", ip.destination_addr()))
            .map(drop)
    }
}

/// Sends frames byte for byte by one device, whatever is in them.
#[derive(Debug)]
pub struct FrameSender {
    socket: OwnedFd,
    address: LinkAddr,
}

impl FrameSender {
    /// Opens a packet socket for sending; protocol and destination are the
    /// frame's own.
    ///
    /// # Errors
    /// No such device, or no root.
    pub fn open(namespace: &Namespace, device: &str) -> Result<Self> {
        let (socket, index) = namespace.run(|| sys::packet_sending_socket(device))?;
        Ok(Self {
            socket,
            address: sys::link_address(index, 0)?,
        })
    }

    /// Sends a frame: from the Ethernet header on, where the device has one.
    ///
    /// # Errors
    /// The device is down, or the frame longer than its MTU.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        sendto(
            self.socket.as_raw_fd(),
            frame,
            &self.address,
            MsgFlags::empty(),
        )
        .context("cannot send the frame")
        .map(drop)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iperf3_errors_are_errors() {
        let error =
            Iperf::read(r#"{"start":{},"end":{},"error":"unable to connect"}"#).unwrap_err();
        assert_eq!(error.to_string(), "unable to connect");
    }

    #[test]
    fn the_pattern_is_text_without_a_short_period() {
        let pattern = pattern(100_000);
        assert!(pattern.iter().all(u8::is_ascii_graphic));
        assert!((1..4096).all(|shift| pattern[shift..shift + 64] != pattern[..64]));
    }
}
