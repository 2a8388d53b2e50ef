//! Building packets, right and wrong ones.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use etherparse::{
    EtherType, Ethernet2Header, IpDscp, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options,
    Ipv6FragmentHeader, Ipv6Header, TcpHeader,
};

use super::{ChecksumPlace, Gso, GsoKind, Offload, checksum};

const IPV4_MINIMUM_HEADER: usize = 20;

#[derive(Debug, Clone)]
enum Transport {
    Tcp(Box<TcpHeader>),
    Udp {
        source_port: u16,
        destination_port: u16,
    },
    /// ICMP or ICMPv6: type, code, and the four bytes after the checksum.
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
    },
    Other(IpNumber),
}

/// Number of an IPv6 extension header, and what follows its length.
type Extension = (IpNumber, Vec<u8>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checksum {
    Right,
    Wrong,
    Zero,
    PseudoHeader,
}

/// A packet in the making. All that is not set has the usual value.
///
/// # Panics
/// [`build`](Self::build) and its like panic on what no packet can hold
/// (mixed families, options not a multiple of four long, too long a payload).
#[derive(Debug, Clone)]
pub struct Builder {
    ethernet: Option<([u8; 6], [u8; 6])>,
    source: IpAddr,
    destination: IpAddr,
    ttl: u8,
    precedence: u8,
    identification: u32,
    dont_fragment: bool,
    options: Vec<u8>,
    flow_label: u32,
    extensions: Vec<Extension>,
    transport: Transport,
    payload: Vec<u8>,
    ip_checksum: Checksum,
    transport_checksum: Checksum,
}

/// A UDP datagram.
#[must_use]
pub fn udp(source: SocketAddr, destination: SocketAddr) -> Builder {
    let transport = Transport::Udp {
        source_port: source.port(),
        destination_port: destination.port(),
    };
    Builder::new(source.ip(), destination.ip(), transport)
}

/// A TCP segment without flags: see [`Builder::with_tcp`].
#[must_use]
pub fn tcp(source: SocketAddr, destination: SocketAddr) -> Builder {
    let header = TcpHeader::new(source.port(), destination.port(), 0, 0xffff);
    Builder::new(
        source.ip(),
        destination.ip(),
        Transport::Tcp(Box::new(header)),
    )
}

/// An ICMP or ICMPv6 echo request.
#[must_use]
pub fn echo_request(
    source: IpAddr,
    destination: IpAddr,
    identifier: u16,
    sequence: u16,
) -> Builder {
    let kind = if source.is_ipv4() { 8 } else { 128 };
    echo(source, destination, kind, identifier, sequence)
}

/// An ICMP or ICMPv6 echo reply.
#[must_use]
pub fn echo_reply(source: IpAddr, destination: IpAddr, identifier: u16, sequence: u16) -> Builder {
    let kind = if source.is_ipv4() { 0 } else { 129 };
    echo(source, destination, kind, identifier, sequence)
}

fn echo(source: IpAddr, destination: IpAddr, kind: u8, id: u16, sequence: u16) -> Builder {
    let [[a, b], [c, d]] = [id.to_be_bytes(), sequence.to_be_bytes()];
    icmp(source, destination, kind, 0, [a, b, c, d])
}

/// An ICMP or ICMPv6 error of any type, quoting as much of a packet as is
/// given; `rest` is what follows the checksum.
#[must_use]
pub fn icmp_error(
    source: IpAddr,
    destination: IpAddr,
    (kind, code): (u8, u8),
    rest: [u8; 4],
    quoted: &[u8],
) -> Builder {
    icmp(source, destination, kind, code, rest).payload(quoted)
}

/// Destination unreachable with this code.
#[must_use]
pub fn unreachable(source: IpAddr, destination: IpAddr, code: u8, quoted: &[u8]) -> Builder {
    let kind = if source.is_ipv4() { 3 } else { 1 };
    icmp_error(source, destination, (kind, code), [0; 4], quoted)
}

/// Fragmentation needed, or packet too big, with the next hop's MTU in bytes.
#[must_use]
pub fn fragmentation_needed(
    source: IpAddr,
    destination: IpAddr,
    mtu: u16,
    quoted: &[u8],
) -> Builder {
    let kind = if source.is_ipv4() { (3, 4) } else { (2, 0) };
    let [high, low] = mtu.to_be_bytes();
    icmp_error(source, destination, kind, [0, 0, high, low], quoted)
}

/// Time to live exceeded in transit.
#[must_use]
pub fn time_exceeded(source: IpAddr, destination: IpAddr, quoted: &[u8]) -> Builder {
    let kind = if source.is_ipv4() { 11 } else { 3 };
    icmp_error(source, destination, (kind, 0), [0; 4], quoted)
}

fn icmp(source: IpAddr, destination: IpAddr, kind: u8, code: u8, rest: [u8; 4]) -> Builder {
    Builder::new(source, destination, Transport::Icmp { kind, code, rest })
}

/// A packet of any other protocol, its header being part of the payload.
#[must_use]
pub fn other(source: IpAddr, destination: IpAddr, protocol: IpNumber) -> Builder {
    Builder::new(source, destination, Transport::Other(protocol))
}

impl Builder {
    fn new(source: IpAddr, destination: IpAddr, transport: Transport) -> Self {
        Self {
            ethernet: None,
            source,
            destination,
            ttl: 64,
            precedence: 0,
            identification: 0x1234,
            dont_fragment: false,
            options: Vec::new(),
            flow_label: 0,
            extensions: Vec::new(),
            transport,
            payload: Vec::new(),
            ip_checksum: Checksum::Right,
            transport_checksum: Checksum::Right,
        }
    }

    /// Puts an Ethernet header in front.
    #[must_use]
    pub fn ethernet(mut self, source: [u8; 6], destination: [u8; 6]) -> Self {
        self.ethernet = Some((source, destination));
        self
    }

    /// Sets what follows the transport header.
    #[must_use]
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// Sets time to live or hop limit (64 unless set).
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// Sets the IPv4 precedence, the upper three bits of what used to be the
    /// type of service, or those of the IPv6 traffic class (0 unless set).
    #[must_use]
    pub fn precedence(mut self, precedence: u8) -> Self {
        self.precedence = precedence;
        self
    }

    /// Sets the identification of the packet and of its fragments (in IPv4,
    /// its lower 16 bits).
    #[must_use]
    pub fn identification(mut self, identification: u32) -> Self {
        self.identification = identification;
        self
    }

    /// Sets the IPv4 flag "don't fragment", which IPv6 has not: there it is
    /// always as if it were set.
    #[must_use]
    pub fn dont_fragment(mut self) -> Self {
        self.dont_fragment = true;
        self
    }

    /// Sets IPv4 options, a multiple of four bytes.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// Sets the IPv6 flow label, of 20 bits (0 unless set).
    #[must_use]
    pub fn flow_label(mut self, label: u32) -> Self {
        self.flow_label = label;
        self
    }

    /// Appends an IPv6 extension header (hop-by-hop options, routing,
    /// destination options): its number, and what follows its length, which
    /// is six bytes and a multiple of eight. They come in the order in which
    /// they were appended, whatever their kind. When the packet is cut, the
    /// fragment header comes after the last that routers look at (RFC 8200
    /// section 4.5).
    #[must_use]
    pub fn extension(mut self, number: IpNumber, data: &[u8]) -> Self {
        self.extensions.push((number, data.to_vec()));
        self
    }

    /// Changes the TCP header; of any other packet nothing.
    #[must_use]
    pub fn with_tcp(mut self, change: impl FnOnce(&mut TcpHeader)) -> Self {
        if let Transport::Tcp(header) = &mut self.transport {
            change(header);
        }
        self
    }

    /// Makes the IPv4 header's checksum wrong. (An IPv6 header has none.)
    #[must_use]
    pub fn bad_ip_checksum(mut self) -> Self {
        self.ip_checksum = Checksum::Wrong;
        self
    }

    /// Makes the transport checksum wrong.
    #[must_use]
    pub fn bad_transport_checksum(mut self) -> Self {
        self.transport_checksum = Checksum::Wrong;
        self
    }

    /// Leaves the transport checksum zero, which in UDP over IPv4 says there is
    /// none.
    #[must_use]
    pub fn without_udp_checksum(mut self) -> Self {
        self.transport_checksum = Checksum::Zero;
        self
    }

    /// Puts only the pseudo-header's sum in place, as a sender with checksum
    /// offload does.
    #[must_use]
    pub fn partial_checksum(mut self) -> Self {
        self.transport_checksum = Checksum::PseudoHeader;
        self
    }

    /// The packet.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        self.frame(&self.fragmentable(), None)
    }

    /// The packet with its checksum left to complete, and, for TCP and UDP
    /// with a segment size in payload bytes, yet to be segmented: what a guest
    /// with virtio-net hands to its tap.
    ///
    /// # Panics
    /// The protocol has no checksum, or cannot be segmented.
    #[must_use]
    pub fn offloaded(&self, segment: Option<u16>) -> (Offload, Vec<u8>) {
        let packet = self.clone().partial_checksum().build();
        let transport = packet.len() - self.transport().len();
        let (header, offset) = match &self.transport {
            Transport::Tcp(header) => (header.header_len(), 16),
            Transport::Udp { .. } => (8, 6),
            Transport::Icmp { .. } => (8, 2),
            Transport::Other(protocol) => panic!("{protocol:?} has no checksum"),
        };
        let kind = || match &self.transport {
            Transport::Tcp(_) if self.source.is_ipv4() => GsoKind::TcpV4,
            Transport::Tcp(_) => GsoKind::TcpV6,
            Transport::Udp { .. } => GsoKind::Udp,
            other => panic!("{other:?} cannot be segmented"),
        };
        let length = |length: usize| u16::try_from(length).expect("a header's length");
        let offload = Offload {
            checksum: Some(ChecksumPlace {
                start: length(transport),
                offset,
            }),
            gso: segment.map(|size| Gso { kind: kind(), size }),
            header_length: length(transport + header),
        };
        (offload, packet)
    }

    /// The packet cut into fragments that fit an MTU in bytes, in order.
    ///
    /// # Panics
    /// The MTU leaves no room for payload.
    #[must_use]
    pub fn fragments(&self, mtu: usize) -> Vec<Vec<u8>> {
        let header = self.ip_header(0, Some((0, true))).len();
        let step = mtu.saturating_sub(header) / 8 * 8;
        assert!(step > 0, "an MTU of {mtu} leaves no room for payload");
        let length = self.fragmentable().len();
        (0..length)
            .step_by(step)
            .map(|start| self.fragment(start..(start + step).min(length)))
            .collect()
    }

    /// One fragment, with these bytes of what is [cut](Self::fragmentable). It
    /// begins at a multiple of eight; it is the last one if it ends where the
    /// whole does. One with all of it is what IPv6 calls an atomic fragment.
    ///
    /// # Panics
    /// It begins elsewhere, or ends behind the payload.
    #[must_use]
    pub fn fragment(&self, bytes: Range<usize>) -> Vec<u8> {
        assert!(
            bytes.start.is_multiple_of(8),
            "fragments begin at multiples of eight"
        );
        let whole = self.fragmentable();
        let more = bytes.end < whole.len();
        self.frame(&whole[bytes.clone()], Some((bytes.start / 8, more)))
    }

    /// What fragments are cut from: transport header and payload; in IPv6 with
    /// the extension headers before them that no router looks at.
    #[must_use]
    pub fn fragmentable(&self) -> Vec<u8> {
        let (_, extensions) = self.split_extensions();
        let mut bytes = self.chain(extensions, self.protocol()).1;
        bytes.extend(self.transport());
        bytes
    }

    /// The extension headers that go with every fragment, and the others.
    fn split_extensions(&self) -> (&[Extension], &[Extension]) {
        let is_for_routers = |(number, _): &Extension| {
            [
                IpNumber::IPV6_HEADER_HOP_BY_HOP,
                IpNumber::IPV6_ROUTE_HEADER,
            ]
            .contains(number)
        };
        let last = self.extensions.iter().rposition(is_for_routers);
        self.extensions.split_at(last.map_or(0, |last| last + 1))
    }

    /// Extension headers in front of one with this number: the number of the
    /// first, and their bytes.
    fn chain(&self, extensions: &[Extension], last: IpNumber) -> (IpNumber, Vec<u8>) {
        assert!(
            extensions.is_empty() || self.source.is_ipv6(),
            "IPv4 has no extension headers"
        );
        let mut next = last;
        let mut headers = Vec::new();
        for (number, data) in extensions.iter().rev() {
            let length = data.len() + 2;
            assert!(
                length.is_multiple_of(8),
                "an extension header of {length} bytes"
            );
            let words = u8::try_from(length / 8 - 1).expect("an extension header's length");
            headers.push([&[next.0, words], &data[..]].concat());
            next = *number;
        }
        headers.reverse();
        (next, headers.concat())
    }

    fn protocol(&self) -> IpNumber {
        match self.transport {
            Transport::Tcp(_) => IpNumber::TCP,
            Transport::Udp { .. } => IpNumber::UDP,
            Transport::Icmp { .. } if self.source.is_ipv4() => IpNumber::ICMP,
            Transport::Icmp { .. } => IpNumber::IPV6_ICMP,
            Transport::Other(protocol) => protocol,
        }
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = match &self.transport {
            Transport::Tcp(header) => header.to_bytes().to_vec(),
            Transport::Udp {
                source_port,
                destination_port,
            } => {
                let length = u16::try_from(8 + self.payload.len()).expect("UDP length");
                [*source_port, *destination_port, length, 0]
                    .iter()
                    .flat_map(|number| number.to_be_bytes())
                    .collect()
            }
            Transport::Icmp { kind, code, rest } => {
                let mut bytes = vec![*kind, *code, 0, 0];
                bytes.extend(rest);
                bytes
            }
            Transport::Other(_) => Vec::new(),
        };
        bytes.extend(&self.payload);
        self.put_transport_checksum(&mut bytes);
        bytes
    }

    fn put_transport_checksum(&self, bytes: &mut [u8]) {
        let protocol = self.protocol();
        let offset = match self.transport {
            Transport::Other(_) => return,
            _ => checksum::offset(protocol).expect("a protocol with a checksum"),
        };
        bytes[offset..offset + 2].fill(0);
        let pseudo = match protocol {
            IpNumber::ICMP => Vec::new(),
            _ => checksum::pseudo_header(self.source, self.destination, protocol, bytes.len()),
        };
        let right = match !checksum::sum(&[&pseudo, bytes]) {
            0 if protocol == IpNumber::UDP => 0xffff,
            right => right,
        };
        let value = match self.transport_checksum {
            Checksum::Right => right,
            Checksum::Wrong => wrong(right),
            Checksum::Zero => 0,
            Checksum::PseudoHeader => checksum::sum(&[&pseudo]),
        };
        bytes[offset..offset + 2].copy_from_slice(&value.to_be_bytes());
    }

    fn frame(&self, payload: &[u8], fragment: Option<(usize, bool)>) -> Vec<u8> {
        let mut packet = Vec::new();
        if let Some((source, destination)) = self.ethernet {
            let ether_type = if self.source.is_ipv4() {
                EtherType::IPV4
            } else {
                EtherType::IPV6
            };
            let header = Ethernet2Header {
                source,
                destination,
                ether_type,
            };
            packet.extend(header.to_bytes());
        }
        packet.extend(self.ip_header(payload.len(), fragment));
        packet.extend(payload);
        packet
    }

    fn ip_header(&self, payload: usize, fragment: Option<(usize, bool)>) -> Vec<u8> {
        let (offset, more_fragments) = fragment.unwrap_or_default();
        let offset = u16::try_from(offset)
            .ok()
            .and_then(|offset| IpFragOffset::try_new(offset).ok());
        let fragment_offset = offset.expect("fragment offset");
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let [_, _, high, low] = self.identification.to_be_bytes();
                let identification = u16::from_be_bytes([high, low]);
                let options: Ipv4Options = self
                    .options
                    .as_slice()
                    .try_into()
                    .expect("options of a valid length");
                let total = IPV4_MINIMUM_HEADER + self.options.len() + payload;
                let mut header = Ipv4Header {
                    dscp: IpDscp::try_new(self.precedence << 3).expect("a precedence"),
                    total_len: u16::try_from(total).expect("total length"),
                    identification,
                    dont_fragment: self.dont_fragment,
                    more_fragments,
                    fragment_offset,
                    time_to_live: self.ttl,
                    protocol: self.protocol(),
                    source: source.octets(),
                    destination: destination.octets(),
                    options,
                    ..Ipv4Header::default()
                };
                header.header_checksum = !checksum::sum(&[&header.to_bytes()]);
                if self.ip_checksum == Checksum::Wrong {
                    header.header_checksum = wrong(header.header_checksum);
                }
                header.to_bytes().to_vec()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let (for_routers, others) = self.split_extensions();
                let (first, _) = self.chain(others, self.protocol());
                let fragment = fragment.map(|_| Ipv6FragmentHeader {
                    next_header: first,
                    fragment_offset,
                    more_fragments,
                    identification: self.identification,
                });
                let next = match fragment {
                    Some(_) => IpNumber::IPV6_FRAGMENTATION_HEADER,
                    None => first,
                };
                let (next_header, mut extensions) = self.chain(for_routers, next);
                if let Some(header) = fragment {
                    extensions.extend(header.to_bytes());
                }
                let length = extensions.len() + payload;
                let header = Ipv6Header {
                    traffic_class: self.precedence << 5,
                    flow_label: self.flow_label.try_into().expect("a flow label"),
                    payload_length: u16::try_from(length).expect("length"),
                    next_header,
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                [&header.to_bytes()[..], &extensions].concat()
            }
            _ => panic!(
                "{} and {} are of two families",
                self.source, self.destination
            ),
        }
    }
}

/// Another value, and not the other zero.
fn wrong(checksum: u16) -> u16 {
    checksum ^ 0x5555
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Ip, Link, Parsed, checksum::Expect};

    #[test]
    fn a_datagram_byte_by_byte() {
        let packet = udp(
            "10.0.0.10:4660".parse().unwrap(),
            "203.0.113.1:80".parse().unwrap(),
        )
        .payload(b"hi")
        .build();
        assert_eq!(
            packet,
            [
                0x45, 0, 0, 30, 0x12, 0x34, 0, 0, 64, 17, 0x22, 0x90, 10, 0, 0, 10, 203, 0, 113, 1,
                0x12, 0x34, 0, 80, 0, 10, 0x3e, 0xe1, b'h', b'i'
            ]
        );
    }

    #[test]
    fn fragments_cover_the_packet() {
        for (source, destination) in [
            ("10.0.0.10:1", "203.0.113.1:2"),
            ("[fd00::1]:1", "[2001:db8::1]:2"),
        ] {
            let builder = udp(source.parse().unwrap(), destination.parse().unwrap())
                .payload(&(0..=255).cycle().take(3000).collect::<Vec<u8>>());
            let fragments = builder.fragments(1280);
            assert_eq!(fragments.len(), 3);
            let mut whole = Vec::new();
            for (number, fragment) in fragments.iter().enumerate() {
                assert!(fragment.len() <= 1280);
                assert_eq!(checksum::verify(fragment, Expect::Complete), Ok(()));
                let parsed = Parsed::new(Link::Ip, fragment).unwrap();
                assert!(parsed.is_fragment());
                let (offset, more) = match &parsed.ip {
                    Ip::V4(header) => (header.fragment_offset, header.more_fragments),
                    Ip::V6(_, extensions) => {
                        let header = extensions.fragment.as_ref().unwrap();
                        (header.fragment_offset, header.more_fragments)
                    }
                };
                assert_eq!(usize::from(offset.value()) * 8, whole.len());
                assert_eq!(more, number < 2);
                whole.extend(parsed.payload);
            }
            assert_eq!(whole, builder.fragmentable());
        }
    }

    #[test]
    fn extension_headers_byte_by_byte() {
        let packet = udp(
            "[fd00::1]:4660".parse().unwrap(),
            "[2001:db8::1]:80".parse().unwrap(),
        )
        .precedence(7)
        .flow_label(0x12345)
        .extension(IpNumber::IPV6_HEADER_HOP_BY_HOP, &[5, 2, 0, 0, 1, 0])
        .extension(IpNumber::IPV6_ROUTE_HEADER, &[3, 0, 0, 0, 0, 0])
        .extension(IpNumber::IPV6_DESTINATION_OPTIONS, &[1, 4, 0, 0, 0, 0])
        .payload(b"hi");
        let whole = packet.build();
        assert_eq!(whole[..8], [0x6e, 0x01, 0x23, 0x45, 0, 34, 0, 64]);
        let before = [43, 0, 5, 2, 0, 0, 1, 0, 60, 0, 3, 0, 0, 0, 0, 0];
        let after = [17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(whole[40..56], before);
        assert_eq!(whole[56..64], after);
        assert_eq!(whole[64..70], [0x12, 0x34, 0, 80, 0, 10]);
        assert_eq!(checksum::verify(&whole, Expect::Complete), Ok(()));
        // Of the checksum only the pseudo-header's own protocol counts.
        let parsed = Parsed::new(Link::Ip, &whole).unwrap();
        assert_eq!(
            parsed.source(),
            "[fd00::1]:4660".parse::<SocketAddr>().unwrap()
        );

        let fragment = packet.fragment(0..16);
        assert_eq!(fragment[..8], [0x6e, 0x01, 0x23, 0x45, 0, 40, 0, 64]);
        assert_eq!(
            fragment[40..56],
            [43, 0, 5, 2, 0, 0, 1, 0, 44, 0, 3, 0, 0, 0, 0, 0]
        );
        assert_eq!(fragment[56..64], [60, 0, 0, 1, 0, 0, 0x12, 0x34]);
        assert_eq!(fragment[64..72], after);
        let atomic = packet.fragment(0..packet.fragmentable().len());
        assert_eq!(atomic[56..64], [60, 0, 0, 0, 0, 0, 0x12, 0x34]);
        assert_eq!(atomic[64..], whole[56..]);
    }
}
