//! Packets as tests see them: built byte by byte ([`Builder`]), read back
//! ([`Parsed`], [`Quoted`]), and their checksums verified ([`checksum`]).
//!
//! Reading is `etherparse`'s; nothing is shared with the code under test, so
//! that a mistake there cannot hide here.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use etherparse::{
    Ethernet2Header, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, Ipv4Header,
    Ipv6Extensions, Ipv6Header, LaxIpSlice, LinkHeader, NetHeaders, PacketHeaders, TcpHeader,
    TransportHeader, UdpHeader,
};

mod build;
pub mod checksum;
mod offload;

pub use build::{
    Builder, echo_reply, echo_request, fragmentation_needed, icmp_error, other, tcp, time_exceeded,
    udp, unreachable,
};

pub use offload::{ChecksumPlace, Gso, GsoKind, Offload};
pub(crate) use offload::{LONG_HEADER, SHORT_HEADER};

/// What a packet's first byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Link {
    /// An Ethernet header.
    Ethernet,
    /// The IP header itself, as on an L3 tun.
    Ip,
}

/// The network header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ip {
    /// IPv4, options included.
    V4(Ipv4Header),
    /// IPv6 and its extension headers.
    V6(Ipv6Header, Box<Ipv6Extensions>),
}

/// Where a fragment belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fragment {
    /// What the fragments of a packet have in common.
    pub identification: u32,
    /// Offset in bytes from the beginning of what was cut.
    pub start: usize,
    /// Whether it is not the last.
    pub more: bool,
}

/// A packet taken apart. Numbers are in host byte order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// The Ethernet header, on links that have one.
    pub ethernet: Option<Ethernet2Header>,
    /// The network header.
    pub ip: Ip,
    /// The transport protocol's number, after any extension headers.
    pub protocol: IpNumber,
    /// The transport header; none in fragments and for protocols other than
    /// TCP, UDP and ICMP.
    pub transport: Option<TransportHeader>,
    /// What follows the last header that was read.
    pub payload: Vec<u8>,
}

impl Parsed {
    /// Reads a whole packet.
    ///
    /// # Errors
    /// It is not IP, or its headers contradict its length.
    pub fn new(link: Link, packet: &[u8]) -> Result<Self> {
        let headers = match link {
            Link::Ethernet => PacketHeaders::from_ethernet_slice(packet).map_err(Into::into),
            Link::Ip => PacketHeaders::from_ip_slice(packet).map_err(anyhow::Error::from),
        }
        .context("malformed packet")?;
        let ethernet = match headers.link {
            Some(LinkHeader::Ethernet2(header)) => Some(header),
            _ => None,
        };
        let (ip, protocol) = match headers.net {
            Some(NetHeaders::Ipv4(header, extensions)) => {
                let protocol = extensions.next_header(header.protocol)?;
                (Ip::V4(header), protocol)
            }
            Some(NetHeaders::Ipv6(header, extensions)) => {
                let protocol = extensions.next_header(header.next_header)?;
                (Ip::V6(header, Box::new(extensions)), protocol)
            }
            _ => bail!("not an IP packet"),
        };
        let payload = headers.payload.slice().to_vec();
        Ok(Self {
            ethernet,
            ip,
            protocol,
            transport: headers.transport,
            payload,
        })
    }

    /// Where a fragment belongs: its identification, its offset in bytes, and
    /// whether more follow. Also of an IPv4 packet that is whole; in IPv6 of one
    /// with a fragment header.
    #[must_use]
    pub fn fragment(&self) -> Option<Fragment> {
        let (identification, offset, more) = match &self.ip {
            Ip::V4(header) => (
                header.identification.into(),
                header.fragment_offset,
                header.more_fragments,
            ),
            Ip::V6(_, extensions) => {
                let header = extensions.fragment.as_ref()?;
                (
                    header.identification,
                    header.fragment_offset,
                    header.more_fragments,
                )
            }
        };
        Some(Fragment {
            identification,
            start: usize::from(offset.value()) * 8,
            more,
        })
    }

    /// The IPv4 header, if it is an IPv4 packet.
    #[must_use]
    pub fn ipv4(&self) -> Option<&Ipv4Header> {
        match &self.ip {
            Ip::V4(header) => Some(header),
            Ip::V6(..) => None,
        }
    }

    /// Source address.
    #[must_use]
    pub fn source_address(&self) -> IpAddr {
        match &self.ip {
            Ip::V4(header) => header.source.into(),
            Ip::V6(header, _) => header.source.into(),
        }
    }

    /// Destination address.
    #[must_use]
    pub fn destination_address(&self) -> IpAddr {
        match &self.ip {
            Ip::V4(header) => header.destination.into(),
            Ip::V6(header, _) => header.destination.into(),
        }
    }

    /// Source address and port; of an ICMP echo, its identifier; otherwise 0.
    #[must_use]
    pub fn source(&self) -> SocketAddr {
        SocketAddr::new(
            self.source_address(),
            self.ports().map_or(0, |(source, _)| source),
        )
    }

    /// Destination address and port; of an ICMP echo, its identifier;
    /// otherwise 0.
    #[must_use]
    pub fn destination(&self) -> SocketAddr {
        let port = self.ports().map_or(0, |(_, destination)| destination);
        SocketAddr::new(self.destination_address(), port)
    }

    /// Time to live or hop limit.
    #[must_use]
    pub fn ttl(&self) -> u8 {
        match &self.ip {
            Ip::V4(header) => header.time_to_live,
            Ip::V6(header, _) => header.hop_limit,
        }
    }

    /// Whether it is a fragment, the first included.
    #[must_use]
    pub fn is_fragment(&self) -> bool {
        match &self.ip {
            Ip::V4(header) => header.is_fragmenting_payload(),
            Ip::V6(_, extensions) => extensions.is_fragmenting_payload(),
        }
    }

    /// The TCP header.
    #[must_use]
    pub fn tcp(&self) -> Option<&TcpHeader> {
        match self.transport.as_ref()? {
            TransportHeader::Tcp(header) => Some(header),
            _ => None,
        }
    }

    /// The UDP header.
    #[must_use]
    pub fn udp(&self) -> Option<&UdpHeader> {
        match self.transport.as_ref()? {
            TransportHeader::Udp(header) => Some(header),
            _ => None,
        }
    }

    /// The ICMP header.
    #[must_use]
    pub fn icmpv4(&self) -> Option<&Icmpv4Header> {
        match self.transport.as_ref()? {
            TransportHeader::Icmpv4(header) => Some(header),
            _ => None,
        }
    }

    /// The ICMPv6 header.
    #[must_use]
    pub fn icmpv6(&self) -> Option<&Icmpv6Header> {
        match self.transport.as_ref()? {
            TransportHeader::Icmpv6(header) => Some(header),
            _ => None,
        }
    }

    /// Type and code of an ICMP or ICMPv6 message.
    #[must_use]
    pub fn icmp_kind(&self) -> Option<(u8, u8)> {
        self.icmp().map(|header| (header[0], header[1]))
    }

    /// The four bytes behind the checksum of an ICMP or ICMPv6 message.
    #[must_use]
    pub fn icmp_rest(&self) -> Option<[u8; 4]> {
        self.icmp()
            .map(|header| [header[4], header[5], header[6], header[7]])
    }

    fn icmp(&self) -> Option<[u8; 8]> {
        let bytes = match self.transport.as_ref()? {
            TransportHeader::Icmpv4(header) => header.to_bytes().to_vec(),
            TransportHeader::Icmpv6(header) => header.to_bytes().to_vec(),
            TransportHeader::Tcp(_) | TransportHeader::Udp(_) | TransportHeader::Igmp(_) => {
                return None;
            }
        };
        bytes.first_chunk().copied()
    }

    /// The packet that an ICMP error quotes.
    ///
    /// # Errors
    /// This is not an ICMP error, or what it quotes has no whole IP header.
    pub fn quoted(&self) -> Result<Quoted> {
        let is_error = match self.transport.as_ref() {
            Some(TransportHeader::Icmpv4(header)) => matches!(
                header.icmp_type,
                Icmpv4Type::DestinationUnreachable(_)
                    | Icmpv4Type::TimeExceeded(_)
                    | Icmpv4Type::ParameterProblem(_)
            ),
            Some(TransportHeader::Icmpv6(header)) => header.icmp_type.type_u8() < 128,
            _ => false,
        };
        if !is_error {
            bail!("not an ICMP error");
        }
        Quoted::new(&self.payload)
    }

    fn ports(&self) -> Option<(u16, u16)> {
        match self.transport.as_ref()? {
            TransportHeader::Tcp(header) => Some((header.source_port, header.destination_port)),
            TransportHeader::Udp(header) => Some((header.source_port, header.destination_port)),
            TransportHeader::Icmpv4(header) => match header.icmp_type {
                Icmpv4Type::EchoRequest(echo) | Icmpv4Type::EchoReply(echo) => {
                    Some((echo.id, echo.id))
                }
                _ => None,
            },
            TransportHeader::Icmpv6(header) => match header.icmp_type {
                Icmpv6Type::EchoRequest(echo) | Icmpv6Type::EchoReply(echo) => {
                    Some((echo.id, echo.id))
                }
                _ => None,
            },
            TransportHeader::Igmp(_) => None,
        }
    }
}

/// The beginning of a packet, as an ICMP error quotes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quoted {
    /// Source address and port, or an ICMP echo's identifier, or 0.
    pub source: SocketAddr,
    /// Destination address and port, or an ICMP echo's identifier, or 0.
    pub destination: SocketAddr,
    /// The transport protocol's number.
    pub protocol: IpNumber,
    /// The quoted IP header, extension headers included.
    pub header: Vec<u8>,
    /// As much of the transport header and payload as is quoted.
    pub transport: Vec<u8>,
}

impl Quoted {
    fn new(quote: &[u8]) -> Result<Self> {
        let (ip, _) = LaxIpSlice::from_slice(quote).context("the quoted packet is malformed")?;
        let protocol = ip.payload_ip_number();
        let transport = ip.payload().payload;
        let number = |offset: usize| {
            let bytes = transport.get(offset..offset + 2)?;
            Some(u16::from_be_bytes([bytes[0], bytes[1]]))
        };
        let ports = match protocol {
            IpNumber::TCP | IpNumber::UDP | IpNumber::UDP_LITE => number(0).zip(number(2)),
            IpNumber::ICMP | IpNumber::IPV6_ICMP => number(4).zip(number(4)),
            _ => None,
        };
        let (source_port, destination_port) = ports.unwrap_or_default();
        Ok(Self {
            source: SocketAddr::new(ip.source_addr(), source_port),
            destination: SocketAddr::new(ip.destination_addr(), destination_port),
            protocol,
            // The two slices are of one buffer, the header's first.
            header: quote[..transport.as_ptr().addr() - quote.as_ptr().addr()].to_vec(),
            transport: transport.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: &str = "10.0.0.10:40000";
    const SERVER: &str = "203.0.113.1:80";

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_built_is_read_back() {
        let packet = tcp(address(GUEST), address(SERVER))
            .with_tcp(|header| {
                header.syn = true;
                header.sequence_number = 7;
            })
            .ttl(3)
            .options(&[7, 4, 4, 0])
            .payload(b"hello")
            .ethernet([2; 6], [4; 6])
            .build();
        let parsed = Parsed::new(Link::Ethernet, &packet).unwrap();
        assert_eq!(parsed.ethernet.as_ref().unwrap().source, [2; 6]);
        assert_eq!(
            (parsed.source(), parsed.destination()),
            (address(GUEST), address(SERVER))
        );
        assert_eq!(parsed.ttl(), 3);
        assert_eq!(parsed.ipv4().unwrap().options.as_slice(), [7, 4, 4, 0]);
        assert!(parsed.tcp().unwrap().syn);
        assert_eq!(parsed.payload, b"hello");
    }

    #[test]
    fn quotes_are_read_even_when_truncated_to_eight_bytes() {
        let packet = udp(address(GUEST), address(SERVER))
            .options(&[1; 8])
            .payload(&[9; 64])
            .build();
        let error = time_exceeded(
            address("198.51.100.1:0").ip(),
            address(GUEST).ip(),
            &packet[..36],
        )
        .build();
        let quoted = Parsed::new(Link::Ip, &error).unwrap().quoted().unwrap();
        assert_eq!(
            (quoted.source, quoted.destination),
            (address(GUEST), address(SERVER))
        );
        assert_eq!(quoted.header, packet[..28]);
        assert_eq!(quoted.transport, packet[28..36]);
    }

    #[test]
    fn echoes_have_their_identifier_as_port() {
        for (source, destination) in [("10.0.0.10", "203.0.113.1"), ("fd00::10", "2001:db8::1")] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let packet = echo_request(source, destination, 77, 1)
                .payload(b"data")
                .build();
            let parsed = Parsed::new(Link::Ip, &packet).unwrap();
            assert_eq!(parsed.source(), SocketAddr::new(source, 77));
            assert_eq!(parsed.destination(), SocketAddr::new(destination, 77));
        }
    }
}
