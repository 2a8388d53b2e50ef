//! Reads a frame: Ethernet or bare IP, the network header by [`crate::network`], and
//! as much of the transport header as translation needs. Decides nothing beyond what
//! is malformed, and looks into no payload but the packet that an ICMP error quotes.

use core::num::NonZeroU32;

use network_types::tcp::TcpHdr;

use crate::{
    abi::{Arrival, FlowKey},
    frame::{Frame, lengths},
    net::{Address, Be16, Be32},
    network::{Network, pseudo_header},
    verdict::Reason,
};

/// The part of a datagram that a packet is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    #[default]
    Whole,
    /// The first fragment, which has the transport header.
    First,
    /// A later fragment, which has payload only.
    Later,
}

/// How the transport is translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    /// UDP and UDP-Lite.
    Udp,
    /// An ICMP query: its identifier is the source's port.
    IcmpQuery,
    /// The reply to an ICMP query: its identifier is the destination's port.
    IcmpReply,
    /// An ICMP error: the packet it quotes is what counts.
    IcmpError,
    /// An ICMP type that is neither.
    IcmpOther,
    /// Ports tell sessions apart but cannot be changed (SCTP: its checksum is
    /// a CRC over them).
    PortsFixed,
    /// No ports that we could read: GRE, ESP.
    AddressOnly,
    /// Anything else.
    #[default]
    Unknown,
}

/// TCP flags, as in byte 13 of the header.
pub mod tcp_flags {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    pub const ACK: u8 = 1 << 4;
}

/// What a TCP header says about its connection; zeros for other protocols.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    pub flags: u8,
    pub window: Be16,
    pub sequence: Be32,
    pub acknowledged: Be32,
    /// Of a SYN: the shift of the windows to come (RFC 7323), at most 14.
    pub window_scale: u8,
}

/// What was read of a packet. Offsets are in bytes from the frame's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet<A = Be32> {
    pub source: A,
    pub destination: A,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub protocol: u8,
    pub time_to_live: u8,
    pub dont_fragment: bool,
    pub part: Part,
    pub transport: Transport,
    /// Of the datagram that a fragment is of; IPv4's has 16 bits.
    pub identification: Be32,
    /// Where in its datagram the payload lies, in units of 8 bytes.
    pub fragment_offset: u16,
    pub more_fragments: bool,
    /// Of ICMP, else 0.
    pub icmp_type: u8,
    /// Offset of the IP header, and its length with all that comes before the
    /// transport header.
    pub network_offset: u32,
    pub header_length: u32,
    /// How much of that each fragment has: IPv4's header, IPv6's up to the end of the
    /// fragment header (RFC 8200 section 4.5).
    pub unfragmentable_length: u32,
    /// Bytes of the IP packet, headers included, however large GSO made it.
    pub length: u32,
    /// The size of the largest packet on the wire: `length`, or with GSO that
    /// of a segment.
    pub wire_length: u32,
    pub segment: Segment,
}

const _: () = assert!(size_of::<TcpHdr>() == lengths::TCP as usize);
/// Offset of the header's length in a TCP header.
const TCP_DATA_OFFSET: u32 = 12;
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u32 = 16;
/// Offset of the checksum in a UDP header.
const UDP_CHECKSUM: u32 = 6;
/// Offset of the checksum in an ICMP header.
const ICMP_CHECKSUM: u32 = 2;
/// Offset of the identifier in an ICMP query.
pub const ICMP_IDENTIFIER: u32 = 4;

impl<A: Address> Packet<A> {
    /// Offset of the transport header.
    #[inline(always)]
    #[must_use]
    pub const fn transport_offset(&self) -> u32 {
        self.network_offset + self.header_length
    }

    /// The key of the packet's session, given where it arrived: the index of
    /// an inside device, or `None` for the outside.
    #[inline(always)]
    #[must_use]
    pub const fn key(&self, device: Option<NonZeroU32>) -> FlowKey<A> {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: self.destination_port,
            arrival: Arrival::of(device, self.protocol),
        }
    }

    /// Where the transport checksum is; `None` where none covers addresses or
    /// ports, or where this packet does not have it.
    #[inline(always)]
    #[must_use]
    pub const fn checksum_offset(&self) -> Option<u32> {
        if matches!(self.part, Part::Later) {
            return None;
        }
        match self.transport {
            Transport::Tcp => Some(self.transport_offset() + TCP_CHECKSUM),
            Transport::Udp => Some(self.transport_offset() + UDP_CHECKSUM),
            Transport::IcmpQuery | Transport::IcmpReply => {
                Some(self.transport_offset() + ICMP_CHECKSUM)
            }
            Transport::IcmpError
            | Transport::IcmpOther
            | Transport::PortsFixed
            | Transport::AddressOnly
            | Transport::Unknown => None,
        }
    }
}

const ETHERTYPE_ARP: [u8; 2] = [8, 6];

/// Whether the frame is ARP, without a VLAN tag.
#[inline(always)]
pub fn is_arp<F: Frame>(frame: &F) -> bool {
    let link_length = frame.link_length();
    link_length != 0
        && !frame.is_tagged()
        && frame.load::<[u8; 2]>(link_length - 2) == Some(ETHERTYPE_ARP)
}

/// Where the IP header begins, if the frame is of this IP version and has no VLAN tag:
/// what has one is another network's, which the host may have a device for.
#[inline(always)]
fn network_offset<A: Network, F: Frame>(frame: &F) -> Option<u32> {
    let offset = frame.link_length();
    if frame.is_tagged() {
        return None;
    }
    let is_of_version = if offset != 0 {
        frame.load::<[u8; 2]>(offset - 2) == Some(A::ETHERTYPE)
    } else {
        frame
            .load::<[u8; 1]>(offset)
            .is_some_and(|[first]| first >> 4 == A::VERSION)
    };
    is_of_version.then_some(offset)
}

/// Whether the frame is of this IP version and has no VLAN tag.
#[inline(always)]
pub fn is<A: Network, F: Frame>(frame: &F) -> bool {
    network_offset::<A, F>(frame).is_some()
}

/// Reads the frame into `packet`.
///
/// # Errors
/// The exit of a packet that is of another IP version, or malformed.
#[inline(always)]
pub fn parse<A: Network, F: Frame>(frame: &F, packet: &mut Packet<A>) -> Result<(), Reason> {
    *packet = Packet::default();
    let offset = network_offset::<A, F>(frame).ok_or(Reason::NotIp)?;
    A::read(frame, offset, packet)?;
    if packet.part != Part::Later {
        read_transport(frame, packet, frame.segment_size())?;
    }
    Ok(())
}

/// Reads the frame into `packet` if it is what nearly every packet is: a network header
/// and nothing more before TCP or UDP, whole, its headers in one piece. All offsets are
/// then constants. Returns whether it is.
#[inline(always)]
pub fn parse_plain<A: Network, F: Frame>(frame: &F, packet: &mut Packet<A>) -> bool {
    let offset = frame.link_length();
    let is_of_version = !frame.is_tagged()
        && (offset == 0 || frame.load::<[u8; 2]>(offset - 2) == Some(A::ETHERTYPE));
    is_of_version
        && A::read_plain(frame, offset, packet)
        && read_transport(frame, packet, frame.segment_size()).is_ok()
}

/// Whether a TCP segment is a header and nothing more.
#[inline(always)]
pub fn is_without_data<A: Address, F: Frame>(frame: &F, packet: &Packet<A>) -> bool {
    let offset = packet.transport_offset() + TCP_DATA_OFFSET;
    frame
        .load::<[u8; 1]>(offset)
        .is_some_and(|[words]| packet.length == packet.header_length + u32::from(words >> 4) * 4)
}

#[inline(always)]
fn read_transport<A: Network, F: Frame>(
    frame: &F,
    packet: &mut Packet<A>,
    segment_size: u32,
) -> Result<(), Reason> {
    let offset = packet.transport_offset();
    let available = packet.length - packet.header_length;
    let short = match packet.part {
        Part::First => Reason::FragmentTooShort,
        Part::Whole | Part::Later => Reason::Truncated,
    };
    match packet.transport {
        Transport::Tcp => {
            if available < lengths::TCP {
                return Err(short);
            }
            let header = frame.load::<TcpHdr>(offset).ok_or(short)?;
            let bytes = frame.load::<[u8; 2]>(offset + 12).ok_or(short)?;
            packet.source_port = Be16::from_bytes(header.source);
            packet.destination_port = Be16::from_bytes(header.dest);
            packet.segment = Segment {
                flags: bytes[1],
                window: Be16::from_bytes(header.window),
                sequence: Be32::from_bytes(header.seq),
                acknowledged: Be32::from_bytes(header.ack_seq),
                window_scale: 0,
            };
            if bytes[1] & tcp_flags::SYN != 0 {
                let end = offset + u32::from(bytes[0] >> 4) * 4;
                packet.segment.window_scale = read_window_scale(frame, offset, end);
            }
            if segment_size != 0 {
                let data_offset = u32::from(bytes[0] >> 4) * 4;
                packet.wire_length = packet.header_length + data_offset + segment_size;
            }
        }
        Transport::Udp | Transport::PortsFixed => {
            // SCTP's common header is longer, but only its ports matter here.
            if available < 8 {
                return Err(short);
            }
            let ports = frame.load::<[[u8; 2]; 2]>(offset).ok_or(short)?;
            packet.source_port = Be16::from_bytes(ports[0]);
            packet.destination_port = Be16::from_bytes(ports[1]);
            if segment_size != 0 {
                packet.wire_length = packet.header_length + 8 + segment_size;
            }
        }
        Transport::IcmpQuery => {
            if available < 8 {
                return Err(short);
            }
            let header = frame.load::<[u8; 8]>(offset).ok_or(short)?;
            let identifier = Be16::from_bytes([header[4], header[5]]);
            packet.icmp_type = header[0];
            packet.transport = A::icmp_kind(header[0]);
            match packet.transport {
                Transport::IcmpQuery => packet.source_port = identifier,
                Transport::IcmpReply => packet.destination_port = identifier,
                Transport::IcmpError
                | Transport::IcmpOther
                | Transport::Tcp
                | Transport::Udp
                | Transport::PortsFixed
                | Transport::AddressOnly
                | Transport::Unknown => {}
            }
        }
        Transport::IcmpReply
        | Transport::IcmpError
        | Transport::IcmpOther
        | Transport::AddressOnly
        | Transport::Unknown => {}
    }
    Ok(())
}

/// The shift that a window scale option gives; 0 without one (RFC 7323).
#[inline(always)]
fn read_window_scale<F: Frame>(frame: &F, start: u32, end: u32) -> u8 {
    let Some(option) = find_tcp_option(frame, start, end, WINDOW_SCALE) else {
        return 0;
    };
    match frame.read::<[u8; 1]>(option.get() + 2) {
        Some([scale]) => scale.min(14),
        None => 0,
    }
}

/// The kind and length of the window scale option.
const WINDOW_SCALE: [u8; 2] = [3, 3];
/// The kind and length of the maximum segment size option.
pub const MAXIMUM_SEGMENT_SIZE: [u8; 2] = [2, 4];

/// The offset of the option of this kind and length in the TCP header from
/// `start` to `end`; `None` when it is not there, or when the options make no
/// sense.
#[inline(never)]
pub fn find_tcp_option<F: Frame>(
    frame: &F,
    start: u32,
    end: u32,
    wanted: [u8; 2],
) -> Option<NonZeroU32> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    let mut offset = start + lengths::TCP;
    // Every known stack has what we look for among its first six.
    for _ in 0..8 {
        if offset + 2 > end {
            break;
        }
        let Some([kind, length]) = frame.read::<[u8; 2]>(offset) else {
            break;
        };
        if [kind, length] == wanted {
            return if offset + u32::from(length) <= end {
                NonZeroU32::new(offset)
            } else {
                None
            };
        }
        if kind == END {
            break;
        }
        offset += if kind == NO_OPERATION {
            1
        } else if length < 2 {
            break;
        } else {
            u32::from(length)
        };
    }
    None
}

/// The packet that an ICMP error quotes. Offsets are from the frame's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quoted<A = Be32> {
    pub source: A,
    pub destination: A,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub protocol: u8,
    pub transport: Transport,
    pub network_offset: u32,
    pub transport_offset: u32,
    /// Where the transport checksum is, if so much is quoted.
    pub checksum_offset: Option<u32>,
}

/// Reads the packet quoted by the ICMP error `packet` into `quoted`.
///
/// Only the first 8 bytes of its transport header are certain to be there
/// (RFC 792); what follows the quoted packet (RFC 4884) is left alone.
///
/// # Errors
/// [`Reason::ErrorUnusable`] when it quotes too little, a later fragment or a
/// protocol without sessions; [`Reason::ErrorBadChecksum`] when its checksum or
/// that of the quoted header is wrong (RFC 5508 REQ-3).
#[inline(always)]
pub fn parse_quoted<A: Network, F: Frame>(
    frame: &F,
    packet: &Packet<A>,
    quoted: &mut Quoted<A>,
) -> Result<(), Reason> {
    let unusable = Reason::ErrorUnusable;
    verify_error(frame, packet)?;
    let network_offset = packet.transport_offset() + lengths::ICMP;
    let length = A::read_quoted(frame, network_offset, quoted)?;
    let end = packet.network_offset + packet.length;
    let transport_offset = network_offset + length;
    if transport_offset + 8 > end {
        return Err(unusable);
    }
    let start = frame.read::<[u8; 8]>(transport_offset).ok_or(unusable)?;
    quoted.source_port = Be16::ZERO;
    quoted.destination_port = Be16::ZERO;
    quoted.transport = A::transport_of(quoted.protocol);
    quoted.network_offset = network_offset;
    quoted.transport_offset = transport_offset;
    quoted.checksum_offset = None;
    match quoted.transport {
        Transport::Tcp | Transport::Udp | Transport::PortsFixed => {
            quoted.source_port = Be16::from_bytes([start[0], start[1]]);
            quoted.destination_port = Be16::from_bytes([start[2], start[3]]);
            if quoted.transport == Transport::Udp {
                quoted.checksum_offset = Some(transport_offset + UDP_CHECKSUM);
            } else if quoted.transport == Transport::Tcp
                && transport_offset + TCP_CHECKSUM + 2 <= end
            {
                quoted.checksum_offset = Some(transport_offset + TCP_CHECKSUM);
            }
        }
        Transport::IcmpQuery => {
            let identifier = Be16::from_bytes([start[4], start[5]]);
            quoted.checksum_offset = Some(transport_offset + ICMP_CHECKSUM);
            quoted.transport = A::icmp_kind(start[0]);
            match quoted.transport {
                Transport::IcmpQuery => quoted.source_port = identifier,
                Transport::IcmpReply => quoted.destination_port = identifier,
                // RFC 1122 section 3.2.2: no errors about errors.
                Transport::IcmpError
                | Transport::IcmpOther
                | Transport::Tcp
                | Transport::Udp
                | Transport::PortsFixed
                | Transport::AddressOnly
                | Transport::Unknown => return Err(unusable),
            }
        }
        Transport::AddressOnly => {}
        Transport::IcmpReply | Transport::IcmpError | Transport::IcmpOther | Transport::Unknown => {
            return Err(unusable);
        }
    }
    Ok(())
}

/// The longest ICMP error whose checksum is verified, in bytes. Routers send 576
/// at most, with what they quote (RFC 1812 section 4.3.2.3).
pub const LONGEST_ERROR: u32 = 1480;

/// Checks the checksum of the ICMP error itself (RFC 5508 REQ-3).
#[inline(always)]
fn verify_error<A: Network, F: Frame>(frame: &F, packet: &Packet<A>) -> Result<(), Reason> {
    let length = packet.length - packet.header_length;
    if length > LONGEST_ERROR {
        return Err(Reason::ErrorUnusable);
    }
    if A::HAS_HEADER_CHECKSUM {
        return verify_sum(frame, packet.transport_offset(), length);
    }
    let pseudo_header = pseudo_header(packet.source, packet.destination, packet.protocol, length);
    match frame.checksum(packet.transport_offset(), length) {
        Some(sum) => {
            let whole = pseudo_header + u32::from(!sum.raw());
            if crate::checksum::finish(whole) == Be16::ZERO {
                Ok(())
            } else {
                Err(Reason::ErrorBadChecksum)
            }
        }
        None => Err(Reason::ErrorUnusable),
    }
}

/// Checks that the bytes sum up to a right checksum: `length` of them, at most
/// [`LONGEST_ERROR`].
#[inline(always)]
pub(crate) fn verify_sum<F: Frame>(frame: &F, offset: u32, length: u32) -> Result<(), Reason> {
    match frame.checksum(offset, length) {
        Some(Be16::ZERO) => Ok(()),
        Some(_) => Err(Reason::ErrorBadChecksum),
        None => Err(Reason::ErrorUnusable),
    }
}

/// See [`Frame::checksum`].
#[inline(always)]
pub fn checksum<F: Frame>(frame: &F, offset: u32, length: u32) -> Option<Be16> {
    const STEP: u32 = 4;
    let mut sum = 0u32;
    for step in 0..LONGEST_ERROR / STEP {
        let at = step * STEP;
        if at + STEP > length {
            break;
        }
        let words = frame.read::<[[u8; 2]; 2]>(offset + at)?;
        sum += u32::from(Be16::from_bytes(words[0]).raw());
        sum += u32::from(Be16::from_bytes(words[1]).raw());
    }
    // What does not fill a word is filled up with zeros.
    for odd in 0..STEP - 1 {
        let at = (length & !(STEP - 1)) + odd;
        if at >= length {
            break;
        }
        let [byte] = frame.read::<[u8; 1]>(offset + at)?;
        let word = if odd % 2 == 0 { [byte, 0] } else { [0, byte] };
        sum += u32::from(Be16::from_bytes(word).raw());
    }
    Some(crate::checksum::finish(sum))
}
