//! Captures: every packet that a device sends or receives, gathered by a
//! thread, with what the kernel says about checksums and segmentation.
//!
//! What a capture shows on a sending device is what the device gets, after TC
//! egress; on a receiving one, what the device delivered, before TC ingress.
//! ARP and the neighbour chatter of IPv6 are left out unless asked for.

use std::{
    fmt::Write as _,
    fs::File,
    io::IoSliceMut,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{
    EtherType, Icmpv6Slice, IpNumber, IpSlice, NetSlice, SlicedPacket, defrag::IpDefragPool,
};
use nix::{
    errno::Errno,
    poll::PollTimeout,
    sys::socket::{LinkAddr, MsgFlags, recvmsg, setsockopt, sockopt},
};
use pcap_file::{
    DataLink, TsResolution,
    pcap::{PcapHeader, PcapPacket, PcapWriter},
};

use crate::{
    Namespace,
    packet::{
        Builder, Link, Offload, Parsed, SHORT_HEADER,
        checksum::{self, Expect, Fault},
    },
    sys::{self, Stop, Wake},
};

const LARGEST_PACKET: usize = 65_536 + 256;
const RECEIVE_BUFFER: usize = 64 << 20;

/// What to capture.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Keeps ARP, IPv6 neighbour discovery, IGMP, MLD and all that is not IP.
    pub chatter: bool,
    /// Stops keeping packets after this many bytes, so that a capture of bulk
    /// traffic stays bounded.
    pub limit: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            chatter: false,
            limit: 256 << 20,
        }
    }
}

/// Which way a packet went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The device received it.
    In,
    /// The device was to send it.
    Out,
}

/// A captured packet.
#[derive(Debug, Clone)]
pub struct Captured {
    /// When the kernel saw it.
    pub time: SystemTime,
    /// Which way it went.
    pub direction: Direction,
    /// What `data` begins with.
    pub link: Link,
    /// All its bytes.
    pub data: Vec<u8>,
    /// What whoever puts it on a wire has yet to do.
    pub offload: Offload,
}

/// What to do with packets whose checksum is not completed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partial {
    /// They are faults.
    Refuse,
    /// They are verified as far as they can be: the field holds the sum of
    /// the pseudo-header, and the kernel's pointers to it are right.
    Accept,
}

/// A capture under way. Dropping it ends it; if that happens in a panic, the
/// packets are left in a pcap file, whose name is printed.
#[derive(Debug)]
pub struct Capture {
    name: String,
    shared: Arc<Shared>,
    stop: Stop,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    packets: Vec<Captured>,
    bytes: usize,
    /// Packets not kept, for whatever reason.
    lost: u64,
}

/// The packets of a finished capture, in the order the kernel saw them. If
/// they are dropped in a panic, they are left in a pcap file, whose name is
/// printed.
#[derive(Debug)]
pub struct Packets {
    name: String,
    /// The packets.
    pub list: Vec<Captured>,
    /// How many more there were that could not be kept.
    pub lost: u64,
}

impl Capture {
    /// Starts to capture on a device; every later packet is in the capture.
    ///
    /// # Errors
    /// No such device, or no root.
    pub fn start(namespace: &Namespace, device: &str) -> Result<Self> {
        Self::start_with(namespace, device, Options::default())
    }

    /// The same, with options.
    ///
    /// # Errors
    /// No such device, or no root.
    pub fn start_with(namespace: &Namespace, device: &str, options: Options) -> Result<Self> {
        let (socket, _) = namespace.run(|| {
            sys::packet_socket(device, |socket| {
                sys::set_socket_option(socket, libc::SOL_PACKET, sys::PACKET_VNET_HDR, 1)
                    .context("cannot ask for virtio headers")?;
                setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)
                    .context("cannot enlarge the receive buffer")?;
                setsockopt(socket, sockopt::ReceiveTimestampns, &true)
                    .context("cannot ask for timestamps")
            })
        })?;
        let shared = Arc::new(Shared::default());
        let stop = Stop::new()?;
        let thread = {
            let (shared, stop) = (shared.clone(), stop.clone());
            thread::spawn(move || gather(&socket, &shared, &stop, options))
        };
        let name = format!("{}-{device}", namespace.name());
        Ok(Self {
            name,
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// Waits until a captured packet satisfies `matches` and returns it;
    /// packets captured before the call count.
    ///
    /// # Errors
    /// None came in time; the error lists what did come.
    pub fn wait_for(
        &self,
        timeout: Duration,
        mut matches: impl FnMut(&Captured) -> bool,
    ) -> Result<Captured> {
        let end = Instant::now() + timeout;
        let mut seen = 0;
        let mut state = self.shared.state();
        loop {
            if let Some(found) = state.packets[seen..].iter().find(|packet| matches(packet)) {
                return Ok(found.clone());
            }
            seen = state.packets.len();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let summary = summarise(&state.packets);
                bail!(
                    "no such packet on {} within {timeout:?}; captured:\n{summary}",
                    self.name
                );
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the capture and returns what was captured.
    ///
    /// # Errors
    /// The device went away in the meantime.
    pub fn stop(mut self) -> Result<Packets> {
        self.join()
            .with_context(|| format!("capture on {} failed", self.name))?;
        let state = std::mem::take(&mut *self.shared.state());
        Ok(Packets {
            name: self.name.clone(),
            list: state.packets,
            lost: state.lost,
        })
    }

    fn join(&mut self) -> Result<()> {
        self.stop.raise();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the capturing thread panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.join();
        leave_evidence(&self.name, &self.shared.state().packets);
    }
}

impl Drop for Packets {
    fn drop(&mut self) {
        leave_evidence(&self.name, &self.list);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gather(socket: &OwnedFd, shared: &Shared, stop: &Stop, options: Options) -> Result<()> {
    let mut buffer = vec![0; SHORT_HEADER + LARGEST_PACKET];
    loop {
        let wake = sys::wait_readable(socket, stop, PollTimeout::NONE)?;
        loop {
            let packet = match receive(socket, &mut buffer) {
                Ok(packet) => packet,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                // The kernel cannot describe it in a virtio header, and drops it.
                Err(Errno::EINVAL) => {
                    shared.state().lost += 1;
                    continue;
                }
                Err(error) => return Err(error).context("cannot receive"),
            };
            if !options.chatter && is_chatter(&packet) {
                continue;
            }
            let mut state = shared.state();
            if state.bytes + packet.data.len() > options.limit {
                state.lost += 1;
            } else {
                state.bytes += packet.data.len();
                state.packets.push(packet);
            }
            drop(state);
            shared.changed.notify_all();
        }
        if wake == Wake::Stopped {
            shared.state().lost += u64::from(sys::packet_socket_drops(socket)?);
            return Ok(());
        }
    }
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Captured, Errno> {
    let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let time = message.cmsgs()?.find_map(|control| match control {
        nix::sys::socket::ControlMessageOwned::ScmTimestampns(time) => {
            Some(UNIX_EPOCH + Duration::from(time))
        }
        _ => None,
    });
    let address = message.address.ok_or(Errno::EPROTO)?;
    let length = message.bytes;
    let (header, data) = buffer[..length].split_at(SHORT_HEADER);
    Ok(Captured {
        time: time.unwrap_or_else(SystemTime::now),
        direction: match address.pkttype() {
            libc::PACKET_OUTGOING => Direction::Out,
            _ => Direction::In,
        },
        link: match address.hatype() {
            libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK => Link::Ethernet,
            _ => Link::Ip,
        },
        data: data.to_vec(),
        offload: Offload::from_header(header),
    })
}

fn is_chatter(packet: &Captured) -> bool {
    let sliced = match packet.link {
        Link::Ethernet => SlicedPacket::from_ethernet(&packet.data),
        Link::Ip => SlicedPacket::from_ip(&packet.data),
    };
    let Ok(sliced) = sliced else {
        // What cannot be read must not go unseen, unless it is no IP at all.
        return packet.link == Link::Ethernet
            && packet.data.get(12..14).is_some_and(|kind| {
                let kind = EtherType(u16::from_be_bytes([kind[0], kind[1]]));
                kind != EtherType::IPV4 && kind != EtherType::IPV6
            });
    };
    match sliced.net {
        // What kernels tell of their multicast groups, when it pleases them (RFC 3376).
        Some(NetSlice::Ipv4(ip)) => ip.payload().ip_number == IpNumber::IGMP,
        Some(NetSlice::Ipv6(ip)) => {
            let payload = ip.payload();
            // MLD (RFC 2710, 3810) and neighbour discovery (RFC 4861), by the hop limits without
            // which they are none: what a router let through is no chatter.
            let hop_limit = ip.header().hop_limit();
            payload.ip_number == IpNumber::IPV6_ICMP
                && Icmpv6Slice::from_slice(payload.payload).is_ok_and(|icmp| {
                    matches!(
                        (icmp.type_u8(), hop_limit),
                        (130..=132 | 143, 1) | (133..=137, 255)
                    )
                })
        }
        _ => true,
    }
}

impl Captured {
    /// The packet taken apart.
    ///
    /// # Errors
    /// It is malformed or not IP.
    pub fn parse(&self) -> Result<Parsed> {
        Parsed::new(self.link, &self.data)
    }

    /// Whether it can be read and satisfies `matches`.
    pub fn is(&self, matches: impl FnOnce(&Parsed) -> bool) -> bool {
        self.parse().is_ok_and(|parsed| matches(&parsed))
    }

    /// The bytes from the IP header on.
    #[must_use]
    pub fn ip(&self) -> &[u8] {
        &self.data[self.ip_offset()..]
    }

    /// Checks that it is this packet, from the IP header on. A device may have padded it.
    ///
    /// # Errors
    /// It is another one: both are told.
    pub fn check(&self, expected: &Builder) -> Result<()> {
        let expected = expected.build();
        ensure!(
            self.ip().starts_with(&expected),
            "arrived: {:02x?}\nexpected: {expected:02x?}",
            self.ip()
        );
        Ok(())
    }

    fn ip_offset(&self) -> usize {
        match self.link {
            Link::Ethernet => 14.min(self.data.len()),
            Link::Ip => 0,
        }
    }

    /// Verifies every checksum in it.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verify_checksums(&self, partial: Partial) -> Result<()> {
        let Some(place) = self.offload.checksum else {
            return match checksum::verify(self.ip(), Expect::Complete) {
                // What Linux itself writes for 0, whatever the protocol, where no device
                // completes it: `skb_checksum_help()` in `net/core/dev.c`.
                Err(Fault::Wrong {
                    found: 0xffff,
                    expected: 0,
                    ..
                }) => Ok(()),
                result => result.map_err(|fault| anyhow::anyhow!("{fault}")),
            };
        };
        ensure!(partial == Partial::Accept, "its checksum is not completed");
        checksum::verify(self.ip(), Expect::PseudoHeader)
            .map_err(|fault| anyhow::anyhow!("to be completed, but {fault}"))?;
        let ip = IpSlice::from_slice(self.ip()).context("malformed")?;
        let payload = ip.payload();
        let start = payload.payload.as_ptr().addr() - self.data.as_ptr().addr();
        let offset = checksum::offset(payload.ip_number);
        let found = (usize::from(place.start), usize::from(place.offset));
        ensure!(
            offset.is_some_and(|offset| found == (start, offset)),
            "the kernel would complete its checksum at {} + {}, and the transport header is at \
             {start}",
            place.start,
            place.offset
        );
        Ok(())
    }

    /// One line about it, for lists.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut line = match self.direction {
            Direction::In => "in ".to_owned(),
            Direction::Out => "out ".to_owned(),
        };
        match self.parse() {
            Ok(parsed) => {
                let _ = write!(line, "{} > {}", parsed.source(), parsed.destination());
                let _ = write!(line, " {} ttl {}", describe(&parsed), parsed.ttl());
            }
            Err(error) => {
                let _ = write!(line, "{error}");
            }
        }
        let _ = write!(line, " length {}", self.data.len());
        if let Some(gso) = self.offload.gso {
            let _ = write!(line, " gso {}", gso.size);
        }
        if self.offload.checksum.is_some() {
            line.push_str(" partial");
        }
        line
    }
}

fn describe(parsed: &Parsed) -> String {
    if let Some(tcp) = parsed.tcp() {
        let flags = [
            (tcp.syn, 'S'),
            (tcp.ack, 'A'),
            (tcp.fin, 'F'),
            (tcp.rst, 'R'),
            (tcp.psh, 'P'),
        ];
        let flags: String = flags
            .iter()
            .filter(|(set, _)| *set)
            .map(|(_, flag)| flag)
            .collect();
        return format!(
            "TCP {flags} seq {} ack {}",
            tcp.sequence_number, tcp.acknowledgment_number
        );
    }
    if let Some((kind, code)) = parsed.icmp_kind() {
        return format!("ICMP {kind}/{code}");
    }
    let name = parsed.protocol.keyword_str().unwrap_or("protocol");
    let fragment = if parsed.is_fragment() {
        " fragment"
    } else {
        ""
    };
    format!("{name}{fragment}")
}

fn summarise(packets: &[Captured]) -> String {
    const SHOWN: usize = 50;
    let mut lines: Vec<_> = packets.iter().take(SHOWN).map(Captured::summary).collect();
    if packets.len() > SHOWN {
        lines.push(format!("and {} more", packets.len() - SHOWN));
    }
    if lines.is_empty() {
        "nothing".to_owned()
    } else {
        lines.join("\n")
    }
}

impl Packets {
    /// The packets taken apart that satisfy `matches`; unreadable ones are
    /// left out.
    pub fn parsed(&self, matches: impl Fn(&Parsed) -> bool) -> Vec<Parsed> {
        let parsed = self.list.iter().filter_map(|packet| packet.parse().ok());
        parsed.filter(matches).collect()
    }

    /// One line a packet.
    #[must_use]
    pub fn summary(&self) -> String {
        summarise(&self.list)
    }

    /// Verifies every checksum of every packet, and those of reassembled
    /// fragments.
    ///
    /// # Errors
    /// A list of each bad packet with what is wrong with it; or packets were
    /// lost, or there are none, so that nothing was verified.
    pub fn verify_checksums(&self, partial: Partial) -> Result<()> {
        let Self { name, list, lost } = self;
        ensure!(
            *lost == 0,
            "{lost} packets of the capture on {name} were not kept"
        );
        ensure!(
            !list.is_empty(),
            "nothing was captured on {name}: nothing to verify"
        );
        let mut faults = Vec::new();
        let mut fragments = IpDefragPool::<(), Direction>::new();
        for (number, packet) in list.iter().enumerate() {
            let result = packet.verify_checksums(partial);
            let result = result.and_then(|()| verify_reassembled(&mut fragments, packet));
            if let Err(error) = result {
                faults.push(format!(
                    "packet {}: {error}: {}",
                    number + 1,
                    packet.summary()
                ));
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        let count = faults.len();
        faults.truncate(50);
        bail!(
            "{count} of {} packets on {name} have bad checksums:\n{}",
            list.len(),
            faults.join("\n")
        );
    }

    /// Writes the packets for `tcpdump -r` or Wireshark.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_pcap(&self, path: impl AsRef<Path>) -> Result<()> {
        write_pcap(path.as_ref(), &self.list)
    }
}

/// Verifies the transport checksum of a packet whose last fragment this is.
fn verify_reassembled(pool: &mut IpDefragPool<(), Direction>, packet: &Captured) -> Result<()> {
    let ip = IpSlice::from_slice(packet.ip()).context("malformed")?;
    if !ip.is_fragmenting_payload() {
        return Ok(());
    }
    let (source, destination): (IpAddr, IpAddr) = (ip.source_addr(), ip.destination_addr());
    let sliced = SlicedPacket::from_ip(packet.ip()).context("malformed")?;
    let whole = pool
        .process_sliced_packet(&sliced, (), packet.direction)
        .context("cannot reassemble")?;
    let Some(whole) = whole else { return Ok(()) };
    let result = checksum::verify_transport(
        source,
        destination,
        whole.ip_number,
        &whole.payload,
        Expect::Complete,
    );
    result.map_err(|fault| anyhow::anyhow!("reassembled: {fault}"))
}

fn write_pcap(path: &Path, packets: &[Captured]) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let header = PcapHeader {
        datalink: match packets.first().map(|packet| packet.link) {
            Some(Link::Ip) => DataLink::RAW,
            _ => DataLink::ETHERNET,
        },
        snaplen: u32::try_from(LARGEST_PACKET)?,
        ts_resolution: TsResolution::NanoSecond,
        ..PcapHeader::default()
    };
    let mut writer = PcapWriter::with_header(std::io::BufWriter::new(file), header)?;
    for packet in packets {
        let time = packet.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let length = u32::try_from(packet.data.len())?;
        writer.write_packet(&PcapPacket::new(time, length, &packet.data))?;
    }
    Ok(())
}

/// Keeps the packets of a failing test, and tells where.
fn leave_evidence(name: &str, packets: &[Captured]) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    if !thread::panicking() || packets.is_empty() {
        return;
    }
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("{name}-{number}.pcap"));
    match write_pcap(&path, packets) {
        Ok(()) => eprintln!(
            "{} packets on {name} are in {}",
            packets.len(),
            path.display()
        ),
        Err(error) => eprintln!("the packets on {name} could not be kept: {error:#}"),
    }
}
