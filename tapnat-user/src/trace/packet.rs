//! What a traced packet is to people and to programs: headers in words and in JSON, in one place.

use std::{fmt::Write as _, net::IpAddr};

use etherparse::{
    EtherType, Icmpv4Type, Icmpv6Type, LaxPacketHeaders, LinkHeader, NetHeaders, TcpHeader,
    TransportHeader,
};
use serde::Serialize;
use tapnat_common::verdict::Reason;

use super::Seen;
use crate::view::{Endpoint, Label as _, Protocol};

/// A packet that came by.
#[derive(Clone, Debug, Serialize)]
pub struct TraceView {
    /// When, by RFC 3339.
    pub time: String,
    /// That it arrived on; null when this host does not know it by a name.
    pub device: Option<String>,
    /// `inside` or `uplink`; null when the datapath does not know the device any more.
    pub role: Option<&'static str>,
    pub reason: &'static str,
    /// As in [`crate::view::ReasonView`].
    pub outcome: &'static str,
    pub before: PacketView,
    /// Null when it did not leave, or went to the host as it was.
    pub after: Option<PacketView>,
}

impl TraceView {
    #[must_use]
    pub fn new(
        seen: &Seen,
        time: String,
        device: Option<String>,
        role: Option<&'static str>,
    ) -> Self {
        let record = &seen.record;
        let reason = Reason::ALL.get(record.reason as usize);
        let packet = |bytes, side: &tapnat_common::trace::Side| {
            PacketView::read(bytes, side.link as usize, side.length)
        };
        Self {
            time,
            device,
            role,
            reason: reason.map_or("unknown", |reason| reason.label()),
            outcome: reason.map_or("unknown", |reason| reason.outcome().label()),
            before: packet(&seen.before, &record.before),
            after: (!seen.after.is_empty()).then(|| packet(&seen.after, &record.after)),
        }
    }
}

/// The headers of a packet.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct PacketView {
    /// Bytes, with the link header. Of a GSO packet, which the kernel divides later, as a whole.
    pub length: u32,
    /// `tcp` and so on; `arp` or an Ethernet type for what is not IP.
    pub protocol: String,
    /// Null where it is not IP.
    pub source: Option<Endpoint>,
    pub destination: Option<Endpoint>,
    pub time_to_live: Option<u8>,
    /// What else its headers say, in words.
    pub details: String,
}

impl PacketView {
    /// Reads what a packet of this length begins with, after so many bytes of link header.
    #[must_use]
    pub fn read(bytes: &[u8], link: usize, length: u32) -> Self {
        let headers = if link == 0 {
            LaxPacketHeaders::from_ip(bytes).ok()
        } else {
            LaxPacketHeaders::from_ethernet(bytes).ok()
        };
        let mut view = Self {
            length,
            protocol: "unreadable".to_owned(),
            ..Self::default()
        };
        let Some(headers) = headers else { return view };
        if let Some(LinkHeader::Ethernet2(header)) = &headers.link {
            view.protocol = match header.ether_type {
                EtherType::ARP => "arp".to_owned(),
                EtherType::IPV6 => "ipv6".to_owned(),
                EtherType(number) => format!("ethertype {number:#06x}"),
            };
        }
        let Some(ip) = headers.net.as_ref().and_then(Internet::read) else {
            return view;
        };
        let (mut ports, mut details) = ([0, 0], String::new());
        match &headers.transport {
            Some(TransportHeader::Tcp(tcp)) => {
                ports = [tcp.source_port, tcp.destination_port];
                details = describe_tcp(tcp);
            }
            Some(TransportHeader::Udp(udp)) => ports = [udp.source_port, udp.destination_port],
            Some(TransportHeader::Icmpv4(icmp)) => details = describe_icmp(&icmp.icmp_type),
            Some(TransportHeader::Icmpv6(icmp)) => details = describe_icmpv6(&icmp.icmp_type),
            Some(TransportHeader::Igmp(_)) | None => {}
        }
        if let Some(part) = ip.part {
            let more = if part.more { "" } else { " (last)" };
            if !details.is_empty() {
                details.push(' ');
            }
            // Writing to a string does not fail.
            let _ = write!(
                details,
                "fragment of {} at {}{more}",
                part.identification, part.start
            );
        }
        let [source_port, destination_port] = ports;
        let endpoint = |address, port| Some(Endpoint { address, port });
        view.protocol = Protocol(ip.protocol).to_string();
        view.source = endpoint(ip.source, source_port);
        view.destination = endpoint(ip.destination, destination_port);
        view.time_to_live = Some(ip.time_to_live);
        view.details = details;
        view
    }

    /// In a line.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = self.protocol.clone();
        if let (Some(source), Some(destination)) = (self.source, self.destination) {
            let end = |it: Endpoint| {
                if it.port == 0 {
                    it.address.to_string()
                } else {
                    it.to_string()
                }
            };
            text = format!("{text} {} > {}", end(source), end(destination));
        }
        if !self.details.is_empty() {
            text = format!("{text} {}", self.details);
        }
        if let Some(time_to_live) = self.time_to_live {
            text = format!("{text} ttl {time_to_live}");
        }
        format!("{text} len {}", self.length)
    }
}

/// What is told of the header of either version.
struct Internet {
    source: IpAddr,
    destination: IpAddr,
    time_to_live: u8,
    /// Behind extension headers.
    protocol: u8,
    part: Option<Part>,
}

/// A part of a packet.
struct Part {
    identification: u32,
    /// In bytes.
    start: u32,
    more: bool,
}

impl Internet {
    fn read(headers: &NetHeaders) -> Option<Self> {
        let start = |units: u16| u32::from(units) * 8;
        match headers {
            NetHeaders::Ipv4(ip, _) => Some(Self {
                source: ip.source.into(),
                destination: ip.destination.into(),
                time_to_live: ip.time_to_live,
                protocol: ip.protocol.0,
                part: ip.is_fragmenting_payload().then(|| Part {
                    identification: ip.identification.into(),
                    start: start(ip.fragment_offset.value()),
                    more: ip.more_fragments,
                }),
            }),
            NetHeaders::Ipv6(ip, extensions) => Some(Self {
                source: ip.source.into(),
                destination: ip.destination.into(),
                time_to_live: ip.hop_limit,
                protocol: extensions
                    .next_header(ip.next_header)
                    .unwrap_or(ip.next_header)
                    .0,
                part: extensions.fragment.as_ref().map(|it| Part {
                    identification: it.identification,
                    start: start(it.fragment_offset.value()),
                    more: it.more_fragments,
                }),
            }),
            NetHeaders::Arp(_) => None,
        }
    }
}

fn describe_tcp(tcp: &TcpHeader) -> String {
    let flags: Vec<_> = [
        (tcp.syn, "SYN"),
        (tcp.fin, "FIN"),
        (tcp.rst, "RST"),
        (tcp.psh, "PSH"),
        (tcp.ack, "ACK"),
    ]
    .into_iter()
    .filter_map(|(is_set, name)| is_set.then_some(name))
    .collect();
    format!("{} seq {}", flags.join(","), tcp.sequence_number)
}

fn describe_icmp(kind: &Icmpv4Type) -> String {
    match kind {
        Icmpv4Type::EchoRequest(echo) => format!("echo request id {} seq {}", echo.id, echo.seq),
        Icmpv4Type::EchoReply(echo) => format!("echo reply id {} seq {}", echo.id, echo.seq),
        Icmpv4Type::DestinationUnreachable(code) => {
            format!("destination unreachable, code {}", code.code_u8())
        }
        Icmpv4Type::TimeExceeded(code) => format!("time exceeded, code {}", code.code_u8()),
        Icmpv4Type::TimestampRequest(_) => "timestamp request".to_owned(),
        Icmpv4Type::TimestampReply(_) => "timestamp reply".to_owned(),
        Icmpv4Type::Redirect(_) => "redirect".to_owned(),
        Icmpv4Type::ParameterProblem(_) => "parameter problem".to_owned(),
        Icmpv4Type::Unknown { type_u8, .. } => format!("type {type_u8}"),
    }
}

fn describe_icmpv6(kind: &Icmpv6Type) -> String {
    match kind {
        Icmpv6Type::EchoRequest(echo) => format!("echo request id {} seq {}", echo.id, echo.seq),
        Icmpv6Type::EchoReply(echo) => format!("echo reply id {} seq {}", echo.id, echo.seq),
        Icmpv6Type::DestinationUnreachable(code) => {
            format!("destination unreachable, code {}", code.code_u8())
        }
        Icmpv6Type::PacketTooBig { mtu } => format!("packet too big, mtu {mtu}"),
        Icmpv6Type::TimeExceeded(code) => format!("time exceeded, code {}", code.code_u8()),
        Icmpv6Type::ParameterProblem(_) => "parameter problem".to_owned(),
        Icmpv6Type::RouterSolicitation => "router solicitation".to_owned(),
        Icmpv6Type::RouterAdvertisement(_) => "router advertisement".to_owned(),
        Icmpv6Type::NeighborSolicitation => "neighbour solicitation".to_owned(),
        Icmpv6Type::NeighborAdvertisement(_) => "neighbour advertisement".to_owned(),
        Icmpv6Type::Redirect => "redirect".to_owned(),
        Icmpv6Type::Unknown { type_u8, .. } => format!("type {type_u8}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn described(builder: etherparse::PacketBuilderStep<etherparse::UdpHeader>) -> String {
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"hello").unwrap();
        PacketView::read(&bytes, 14, 47).describe()
    }

    #[test]
    fn headers_are_told_in_a_line() {
        let udp = PacketBuilder::ethernet2(MAC, MAC)
            .ipv4([10, 0, 0, 10], [203, 0, 113, 1], 64)
            .udp(40000, 53);
        assert_eq!(
            described(udp),
            "udp 10.0.0.10:40000 > 203.0.113.1:53 ttl 64 len 47"
        );
        let mut bytes = Vec::new();
        PacketBuilder::ipv4([10, 0, 0, 10], [203, 0, 113, 1], 63)
            .tcp(40000, 80, 12, 1000)
            .syn()
            .write(&mut bytes, b"")
            .unwrap();
        // A packet without a link header, and one whose end was not recorded.
        for end in [40, 50] {
            let bytes = &bytes[..bytes.len().min(end)];
            assert_eq!(
                PacketView::read(bytes, 0, 40).describe(),
                "tcp 10.0.0.10:40000 > 203.0.113.1:80 SYN seq 12 ttl 63 len 40"
            );
        }
        let mut bytes = Vec::new();
        PacketBuilder::ipv4([10, 0, 0, 10], [203, 0, 113, 1], 63)
            .icmpv4_echo_request(5, 1)
            .write(&mut bytes, b"")
            .unwrap();
        assert_eq!(
            PacketView::read(&bytes, 0, 28).describe(),
            "icmp 10.0.0.10 > 203.0.113.1 echo request id 5 seq 1 ttl 63 len 28"
        );
    }

    #[test]
    fn ipv6_is_told_like_ipv4() {
        let ends = || {
            let address = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
            (address("fd00:7a70::10"), address("2001:db8:2::1"))
        };
        let (source, destination) = ends();
        let udp = PacketBuilder::ethernet2(MAC, MAC)
            .ipv6(source, destination, 64)
            .udp(40000, 53);
        assert_eq!(
            described(udp),
            "udp [fd00:7a70::10]:40000 > [2001:db8:2::1]:53 ttl 64 len 47"
        );
        let mut bytes = Vec::new();
        PacketBuilder::ipv6(source, destination, 63)
            .icmpv6_echo_request(5, 1)
            .write(&mut bytes, b"")
            .unwrap();
        assert_eq!(
            PacketView::read(&bytes, 0, 48).describe(),
            "icmpv6 fd00:7a70::10 > 2001:db8:2::1 echo request id 5 seq 1 ttl 63 len 48"
        );
        // A fragment header before it, the first of several.
        bytes[6] = 44;
        bytes.splice(40..40, [58, 0, 0, 1, 0, 0, 0, 7]);
        bytes[5] += 8;
        assert!(
            PacketView::read(&bytes, 0, 56)
                .describe()
                .contains("fragment of 7 at 0 ttl"),
        );
    }

    #[test]
    fn what_is_not_ip_has_a_name_at_least() {
        let mut frame = [0; 60];
        frame[12..14].copy_from_slice(&[0x08, 0x06]);
        assert_eq!(PacketView::read(&frame, 14, 60).protocol, "arp");
        frame[12..14].copy_from_slice(&[0x88, 0xcc]);
        assert_eq!(
            PacketView::read(&frame, 14, 60).describe(),
            "ethertype 0x88cc len 60"
        );
        for length in 0..60 {
            for link in [0, 14] {
                let view = PacketView::read(&frame[..length], link, 60);
                assert!(view.source.is_none(), "{view:?}");
            }
        }
    }
}
