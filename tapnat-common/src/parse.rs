//! Reads a frame: Ethernet or bare IP, IPv4, and as much of the transport
//! header as translation needs. Decides nothing beyond what is malformed, and
//! looks into no payload but the packet that an ICMP error quotes.

use core::num::NonZeroU32;

use network_types::{ip::Ipv4Hdr, tcp::TcpHdr};

use crate::{
    abi::{Arrival, FlowKey},
    frame::Frame,
    net::{Be16, Be32, icmp, protocol},
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
pub struct Packet {
    pub source: Be32,
    pub destination: Be32,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub protocol: u8,
    pub time_to_live: u8,
    pub dont_fragment: bool,
    pub part: Part,
    pub transport: Transport,
    pub identification: Be16,
    /// Where in its datagram the payload lies, in units of 8 bytes.
    pub fragment_offset: u16,
    pub more_fragments: bool,
    /// Offset of the IP header, and its length.
    pub network_offset: u32,
    pub header_length: u32,
    /// Bytes of the IP packet, headers included, however large GSO made it.
    pub length: u32,
    /// The size of the largest packet on the wire: `length`, or with GSO that
    /// of a segment.
    pub wire_length: u32,
    pub segment: Segment,
}

/// Bytes of an IPv4 header without options.
const IPV4_HEADER: u32 = 20;
/// Bytes of a TCP header without options.
const TCP_HEADER: u32 = 20;
const _: () = assert!(size_of::<Ipv4Hdr>() == 20 && size_of::<TcpHdr>() == 20);
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

impl Packet {
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
    pub const fn key(&self, device: Option<NonZeroU32>) -> FlowKey {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: self.destination_port,
            arrival: match device {
                Some(device) => Arrival::inside(device, self.protocol),
                None => Arrival::outside(self.protocol),
            },
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

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const MORE_FRAGMENTS: u16 = 0x2000;
const DONT_FRAGMENT: u16 = 0x4000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

const ETHERTYPE_ARP: [u8; 2] = [8, 6];

/// Whether the frame is ARP, without a VLAN tag.
#[inline(always)]
pub fn is_arp<F: Frame>(frame: &F) -> bool {
    let link_length = frame.link_length();
    link_length != 0
        && !frame.is_tagged()
        && frame.load::<[u8; 2]>(link_length - 2) == Some(ETHERTYPE_ARP)
}

/// Reads the frame into `packet`.
///
/// # Errors
/// The exit of a packet that is not IPv4, or malformed.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), Reason> {
    match read_network(frame) {
        Ok(read) => *packet = read,
        Err(reason) => {
            *packet = Packet::default();
            return Err(reason);
        }
    }
    if packet.part != Part::Later {
        read_transport(frame, packet, frame.segment_size())?;
    }
    Ok(())
}

/// Reads the Ethernet and IP headers.
#[inline(always)]
fn read_network<F: Frame>(frame: &F) -> Result<Packet, Reason> {
    // Another network's, which the host may have a device for.
    if frame.is_tagged() {
        return Err(Reason::NotIpv4);
    }
    let network_offset = frame.link_length();
    if network_offset != 0 {
        let Some(ethertype) = frame.load::<[u8; 2]>(network_offset - 2) else {
            return Err(Reason::NotIpv4);
        };
        if ethertype != ETHERTYPE_IPV4 {
            return Err(Reason::NotIpv4);
        }
    }
    let Some(header) = frame.load::<Ipv4Hdr>(network_offset) else {
        return Err(Reason::Truncated);
    };
    if network_offset == 0 && header.version() != 4 {
        return Err(Reason::NotIpv4);
    }
    let header_length = u32::from(header.vihl & 0x0f) * 4;
    if header.vihl >> 4 != 4 || header_length < IPV4_HEADER {
        return Err(Reason::BadHeader);
    }
    let carried = frame.length().wrapping_sub(network_offset);
    let mut length = u32::from(Be16::from_bytes(header.tot_len).get());
    let segment_size = frame.segment_size();
    if length == 0 && segment_size != 0 {
        // "BIG TCP": longer than the field can say.
        length = carried;
    }
    if length < header_length || length > carried {
        return Err(Reason::Truncated);
    }
    let fragment = Be16::from_bytes(header.frags).get();
    let part = if fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET) == 0 {
        Part::Whole
    } else if fragment & FRAGMENT_OFFSET == 0 {
        Part::First
    } else {
        Part::Later
    };
    Ok(Packet {
        source: Be32::from_bytes(header.src_addr),
        destination: Be32::from_bytes(header.dst_addr),
        protocol: header.proto,
        time_to_live: header.ttl,
        dont_fragment: fragment & DONT_FRAGMENT != 0,
        part,
        transport: transport_of(header.proto),
        identification: Be16::from_bytes(header.id),
        fragment_offset: fragment & FRAGMENT_OFFSET,
        more_fragments: fragment & MORE_FRAGMENTS != 0,
        network_offset,
        header_length,
        length,
        wire_length: length,
        ..Packet::default()
    })
}

/// Reads the frame into `packet` if it is what nearly every packet is: IPv4
/// without options, whole, TCP or UDP, its headers in one piece. All offsets are
/// then constants. Returns whether it is.
#[inline(always)]
pub fn parse_plain<F: Frame>(frame: &F, packet: &mut Packet) -> bool {
    const PLAIN: u8 = 0x45;
    let network_offset = frame.link_length();
    if frame.is_tagged()
        || (network_offset != 0
            && frame.load::<[u8; 2]>(network_offset - 2) != Some(ETHERTYPE_IPV4))
    {
        return false;
    }
    let Some(header) = frame.load::<Ipv4Hdr>(network_offset) else {
        return false;
    };
    let fragment = Be16::from_bytes(header.frags);
    let is_fragment = fragment.raw() & Be16::new(MORE_FRAGMENTS | FRAGMENT_OFFSET).raw() != 0;
    let length = u32::from(Be16::from_bytes(header.tot_len).get());
    if header.vihl != PLAIN || is_fragment || length > frame.length() - network_offset {
        return false;
    }
    packet.source = Be32::from_bytes(header.src_addr);
    packet.destination = Be32::from_bytes(header.dst_addr);
    packet.protocol = header.proto;
    packet.time_to_live = header.ttl;
    packet.network_offset = network_offset;
    packet.header_length = IPV4_HEADER;
    packet.length = length;
    packet.wire_length = length;
    packet.transport = match header.proto {
        protocol::TCP => Transport::Tcp,
        protocol::UDP => Transport::Udp,
        0..=u8::MAX => return false,
    };
    length >= IPV4_HEADER && read_transport(frame, packet, frame.segment_size()).is_ok()
}

/// Whether a TCP segment is a header and nothing more.
#[inline(always)]
pub fn is_without_data<F: Frame>(frame: &F, packet: &Packet) -> bool {
    let offset = packet.transport_offset() + TCP_DATA_OFFSET;
    frame
        .load::<[u8; 1]>(offset)
        .is_some_and(|[words]| packet.length == packet.header_length + u32::from(words >> 4) * 4)
}

#[inline(always)]
const fn transport_of(number: u8) -> Transport {
    match number {
        protocol::TCP => Transport::Tcp,
        protocol::UDP | protocol::UDP_LITE => Transport::Udp,
        // Refined by its type, where that can be read.
        protocol::ICMP => Transport::IcmpQuery,
        protocol::SCTP => Transport::PortsFixed,
        protocol::GRE | protocol::ESP => Transport::AddressOnly,
        0..=u8::MAX => Transport::Unknown,
    }
}

#[inline(always)]
fn read_transport<F: Frame>(
    frame: &F,
    packet: &mut Packet,
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
            if available < TCP_HEADER {
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
            match header[0] {
                icmp::ECHO_REQUEST | icmp::TIMESTAMP_REQUEST => packet.source_port = identifier,
                icmp::ECHO_REPLY | icmp::TIMESTAMP_REPLY => {
                    packet.transport = Transport::IcmpReply;
                    packet.destination_port = identifier;
                }
                icmp::DESTINATION_UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM => {
                    packet.transport = Transport::IcmpError;
                }
                0..=u8::MAX => packet.transport = Transport::IcmpOther,
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
    let mut offset = start + TCP_HEADER;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted {
    pub source: Be32,
    pub destination: Be32,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub protocol: u8,
    pub transport: Transport,
    pub network_offset: u32,
    pub transport_offset: u32,
    /// Where the transport checksum is, if so much is quoted.
    pub checksum_offset: Option<u32>,
}

/// Bytes of an ICMP header before the quoted packet.
const ICMP_HEADER: u32 = 8;

/// Reads the packet quoted by the ICMP error `packet`.
///
/// Only the first 8 bytes of its transport header are certain to be there
/// (RFC 792); what follows the quoted packet (RFC 4884) is left alone.
///
/// # Errors
/// [`Reason::ErrorUnusable`] when it quotes too little, a later fragment or a
/// protocol without sessions; [`Reason::ErrorBadChecksum`] when its checksum or
/// that of the quoted header is wrong (RFC 5508 REQ-3).
#[inline(always)]
pub fn parse_quoted<F: Frame>(frame: &F, packet: &Packet) -> Result<Quoted, Reason> {
    let unusable = Reason::ErrorUnusable;
    verify_error(frame, packet)?;
    let network_offset = packet.transport_offset() + ICMP_HEADER;
    let header = frame.read::<Ipv4Hdr>(network_offset).ok_or(unusable)?;
    let header_length = u32::from(header.vihl & 0x0f) * 4;
    if header.vihl >> 4 != 4 || header_length < IPV4_HEADER {
        return Err(unusable);
    }
    if Be16::from_bytes(header.frags).get() & FRAGMENT_OFFSET != 0 {
        return Err(unusable);
    }
    let end = packet.network_offset + packet.length;
    let transport_offset = network_offset + header_length;
    if transport_offset + 8 > end {
        return Err(unusable);
    }
    verify_sum(frame, network_offset, header_length)?;
    let start = frame.read::<[u8; 8]>(transport_offset).ok_or(unusable)?;
    let mut quoted = Quoted {
        source: Be32::from_bytes(header.src_addr),
        destination: Be32::from_bytes(header.dst_addr),
        source_port: Be16::ZERO,
        destination_port: Be16::ZERO,
        protocol: header.proto,
        transport: transport_of(header.proto),
        network_offset,
        transport_offset,
        checksum_offset: None,
    };
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
            match start[0] {
                icmp::ECHO_REQUEST | icmp::TIMESTAMP_REQUEST => quoted.source_port = identifier,
                icmp::ECHO_REPLY | icmp::TIMESTAMP_REPLY => {
                    quoted.transport = Transport::IcmpReply;
                    quoted.destination_port = identifier;
                }
                // RFC 1122 section 3.2.2: no errors about errors.
                0..=u8::MAX => return Err(unusable),
            }
        }
        Transport::AddressOnly => {}
        Transport::IcmpReply | Transport::IcmpError | Transport::IcmpOther | Transport::Unknown => {
            return Err(unusable);
        }
    }
    Ok(quoted)
}

/// The longest ICMP error whose checksum is verified, in bytes. Routers send 576
/// at most, with what they quote (RFC 1812 section 4.3.2.3).
pub const LONGEST_ERROR: u32 = 1480;

/// Checks the checksum of the ICMP error itself (RFC 5508 REQ-3).
#[inline(always)]
fn verify_error<F: Frame>(frame: &F, packet: &Packet) -> Result<(), Reason> {
    let length = packet.length - packet.header_length;
    if length > LONGEST_ERROR {
        return Err(Reason::ErrorUnusable);
    }
    verify_sum(frame, packet.transport_offset(), length)
}

/// Checks that the bytes sum up to a right checksum: `length` of them, at most
/// [`LONGEST_ERROR`].
#[inline(always)]
fn verify_sum<F: Frame>(frame: &F, offset: u32, length: u32) -> Result<(), Reason> {
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
