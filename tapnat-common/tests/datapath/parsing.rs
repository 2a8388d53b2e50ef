//! What is read of a frame, and which frames are refused as malformed.

use etherparse::{IpNumber, TcpOptionElement as Option};
use tapnat_common::{
    net::{Be16, Be32},
    parse::{Packet, Part, Segment, Transport, parse, tcp_flags},
    verdict::Reason,
};
use tapnat_testbed::packet::{self, Builder};

use crate::support::{
    frame::Bytes,
    network::{GUEST, SERVER, at, ip, ping, pong, tcp, udp},
};

fn read(frame: &Bytes) -> Result<Packet, Reason> {
    let mut packet = Packet::default();
    parse(frame, &mut packet).map(|()| packet)
}

fn read_ip(packet: &[u8]) -> Result<Packet, Reason> {
    read(&Bytes::raw(packet))
}

fn datagram() -> Builder {
    udp(at(GUEST, 40000), at(SERVER, 53))
}

#[test]
fn every_field_of_a_datagram() {
    let bytes = datagram()
        .ttl(17)
        .identification(0xbeef)
        .dont_fragment()
        .build();
    let expected = Packet {
        source: GUEST.into(),
        destination: SERVER.into(),
        source_port: Be16::new(40000),
        destination_port: Be16::new(53),
        protocol: 17,
        time_to_live: 17,
        dont_fragment: true,
        part: Part::Whole,
        transport: Transport::Udp,
        identification: Be32::new(0xbeef),
        fragment_offset: 0,
        more_fragments: false,
        network_offset: 0,
        icmp_type: 0,
        header_length: 20,
        unfragmentable_length: 20,
        length: 36,
        wire_length: 36,
        segment: Segment::default(),
    };
    assert_eq!(read_ip(&bytes), Ok(expected));
    let frame = datagram()
        .ttl(17)
        .identification(0xbeef)
        .dont_fragment()
        .ethernet([2; 6], [4; 6])
        .build();
    let behind_ethernet = Packet {
        network_offset: 14,
        ..expected
    };
    assert_eq!(read(&Bytes::ethernet(&frame)), Ok(behind_ethernet));
}

#[test]
fn a_segment_of_tcp() {
    let bytes = tcp(at(GUEST, 40000), at(SERVER, 80), "SA")
        .with_tcp(|header| {
            header.sequence_number = 0x0102_0304;
            header.acknowledgment_number = 0x0506_0708;
            header.window_size = 0x1122;
        })
        .options(&[7, 4, 4, 0])
        .build();
    let packet = read_ip(&bytes).unwrap();
    assert_eq!((packet.header_length, packet.transport_offset()), (24, 24));
    assert_eq!(packet.checksum_offset(), Some(24 + 16));
    let expected = Segment {
        flags: tcp_flags::SYN | tcp_flags::ACK,
        window: Be16::new(0x1122),
        sequence: Be32::new(0x0102_0304),
        acknowledged: Be32::new(0x0506_0708),
        window_scale: 0,
    };
    assert_eq!(packet.segment, expected);
}

#[test]
fn the_window_scale_is_found_among_the_options() {
    let usual = [
        Option::MaximumSegmentSize(1460),
        Option::SelectiveAcknowledgementPermitted,
        Option::Timestamp(1, 0),
        Option::Noop,
        Option::WindowScale(7),
    ];
    let scale = |options: &[Option], flags: &str| {
        let bytes = tcp(at(GUEST, 1), at(SERVER, 2), flags)
            .with_tcp(|header| header.set_options(options).unwrap())
            .payload(b"payload")
            .build();
        read_ip(&bytes).unwrap().segment.window_scale
    };
    assert_eq!(scale(&usual, "S"), 7);
    assert_eq!(scale(&usual, "SA"), 7);
    assert_eq!(scale(&usual, "A"), 0, "only a SYN tells it");
    assert_eq!(scale(&[Option::WindowScale(3)], "S"), 3);
    assert_eq!(scale(&[], "S"), 0);
    // RFC 7323 section 2.3.
    assert_eq!(scale(&[Option::WindowScale(200)], "S"), 14);
}

#[test]
fn options_that_make_no_sense_are_no_window_scale() {
    let raw: [&[u8]; 6] = [
        // A length of 0 and of 1, a scale of another length.
        &[2, 0, 3, 3, 7, 0, 0, 0],
        &[2, 1, 3, 3, 7, 0, 0, 0],
        &[3, 4, 7, 7],
        // The end of the list comes first.
        &[0, 3, 3, 7],
        // An option longer than all options can be.
        &[9, 41, 3, 3, 7, 0, 0, 0],
        // It is cut off by the end of the header.
        &[1, 1, 1, 3],
    ];
    for options in raw {
        let bytes = tcp(at(GUEST, 1), at(SERVER, 2), "S")
            .with_tcp(|header| header.set_options_raw(options).unwrap())
            .build();
        assert_eq!(
            read_ip(&bytes).unwrap().segment.window_scale,
            0,
            "{options:?}"
        );
    }
}

#[test]
fn queries_replies_and_errors_of_icmp() {
    let request = read_ip(&ping(GUEST, SERVER, 77).build()).unwrap();
    assert_eq!(request.transport, Transport::IcmpQuery);
    assert_eq!(
        (request.source_port, request.destination_port),
        (Be16::new(77), Be16::ZERO)
    );
    let reply = read_ip(&pong(SERVER, GUEST, 77).build()).unwrap();
    assert_eq!(reply.transport, Transport::IcmpReply);
    assert_eq!(
        (reply.source_port, reply.destination_port),
        (Be16::ZERO, Be16::new(77))
    );

    let quoted = datagram().build();
    for (kind, expected) in [
        (3, Transport::IcmpError),
        (11, Transport::IcmpError),
        (12, Transport::IcmpError),
        // Quench and redirect must not be forwarded (RFC 6633, RFC 1812).
        (4, Transport::IcmpOther),
        (5, Transport::IcmpOther),
        (9, Transport::IcmpOther),
        (17, Transport::IcmpOther),
        (13, Transport::IcmpQuery),
        (14, Transport::IcmpReply),
    ] {
        let error = packet::icmp_error(ip(SERVER), ip(GUEST), (kind, 0), [0; 4], &quoted);
        let packet = read_ip(&error.build()).unwrap();
        assert_eq!(packet.transport, expected, "type {kind}");
    }
}

#[test]
fn protocols_without_ports_that_can_change() {
    for (number, transport) in [
        (IpNumber::SCTP, Transport::PortsFixed),
        (IpNumber::GRE, Transport::AddressOnly),
        (
            IpNumber::ENCAPSULATING_SECURITY_PAYLOAD,
            Transport::AddressOnly,
        ),
        (IpNumber::UDP_LITE, Transport::Udp),
        (IpNumber::IGMP, Transport::Unknown),
        (IpNumber::IPV4, Transport::Unknown),
    ] {
        let bytes = packet::other(ip(GUEST), ip(SERVER), number)
            .payload(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0, 0, 0, 0, 0])
            .build();
        let packet = read_ip(&bytes).unwrap();
        assert_eq!(packet.transport, transport, "{number:?}");
        let has_ports = matches!(transport, Transport::PortsFixed | Transport::Udp);
        let ports = if has_ports { (0x1234, 0x5678) } else { (0, 0) };
        assert_eq!(
            (packet.source_port.get(), packet.destination_port.get()),
            ports,
            "{number:?}"
        );
        let has_checksum = transport == Transport::Udp;
        assert_eq!(packet.checksum_offset().is_some(), has_checksum);
    }
}

#[test]
fn fragments_have_ports_only_in_the_first() {
    let builder = datagram().payload(&[7; 100]);
    let first = read_ip(&builder.fragment(0..48)).unwrap();
    assert_eq!(first.part, Part::First);
    assert_eq!(first.source_port, Be16::new(40000));
    assert!(first.checksum_offset().is_some());
    for bytes in [48..96, 96..108] {
        let offset = u16::try_from(bytes.start / 8).unwrap();
        let is_last = bytes.end == 108;
        let later = read_ip(&builder.fragment(bytes)).unwrap();
        assert_eq!(later.more_fragments, !is_last);
        assert_eq!(later.fragment_offset, offset);
        assert_eq!(later.part, Part::Later);
        assert_eq!(
            (later.source_port, later.destination_port),
            (Be16::ZERO, Be16::ZERO)
        );
        assert_eq!(later.checksum_offset(), None);
    }
}

#[test]
fn bits_beside_the_fragment_offset_do_not_make_a_fragment() {
    let mut bytes = datagram().build();
    // The reserved bit and "don't fragment".
    bytes[6] = 0xc0;
    let packet = read_ip(&bytes).unwrap();
    assert_eq!(packet.part, Part::Whole);
    assert!(packet.dont_fragment);
    // An offset of 8 bytes in the low byte of the field.
    bytes[6] = 0;
    bytes[7] = 1;
    assert_eq!(read_ip(&bytes).unwrap().part, Part::Later);
}

#[test]
fn a_first_fragment_needs_its_transport_header() {
    let segment = tcp(at(GUEST, 1), at(SERVER, 2), "S").payload(&[0; 64]);
    assert_eq!(
        read_ip(&segment.fragment(0..8)),
        Err(Reason::FragmentTooShort)
    );
    assert_eq!(
        read_ip(&segment.fragment(0..16)),
        Err(Reason::FragmentTooShort)
    );
    assert!(read_ip(&segment.fragment(0..24)).is_ok());
    assert!(read_ip(&datagram().fragment(0..8)).is_ok());
    let request = ping(GUEST, SERVER, 1);
    assert!(read_ip(&request.fragment(0..8)).is_ok());
}

#[test]
fn frames_of_other_protocols_are_not_ours() {
    let mut frame = datagram().ethernet([2; 6], [4; 6]).build();
    for ethertype in [
        [0x08, 0x06],
        [0x86, 0xdd],
        [0x81, 0x00],
        [0x88, 0x64],
        [0, 8],
    ] {
        frame[12..14].copy_from_slice(&ethertype);
        assert_eq!(
            read(&Bytes::ethernet(&frame)),
            Err(Reason::NotIp),
            "{ethertype:02x?}"
        );
    }
    assert_eq!(
        read(&Bytes::ethernet(&frame[..13])),
        Err(Reason::NotIp),
        "half a link header"
    );
    // On a link without headers the version tells.
    let mut six = datagram().build();
    six[0] = 0x65;
    assert_eq!(read_ip(&six), Err(Reason::NotIp));
}

#[test]
fn malformed_headers_are_named() {
    let good = datagram().build();
    let mut short_header = good.clone();
    short_header[0] = 0x44;
    assert_eq!(read_ip(&short_header), Err(Reason::BadHeader));
    // Behind Ethernet, which said IPv4, another version is wrong.
    let mut frame = datagram().ethernet([2; 6], [4; 6]).build();
    frame[14] = 0x65;
    assert_eq!(read(&Bytes::ethernet(&frame)), Err(Reason::BadHeader));
    // The header is longer than the packet.
    let mut long_header = good.clone();
    long_header[0] = 0x4f;
    assert_eq!(read_ip(&long_header), Err(Reason::Truncated));
    // The packet is longer than the frame, or shorter than its header.
    for length in [37_u16, 1500, 65535, 19, 0] {
        let mut wrong = good.clone();
        wrong[2..4].copy_from_slice(&length.to_be_bytes());
        assert_eq!(read_ip(&wrong), Err(Reason::Truncated), "length {length}");
    }
}

#[test]
fn every_cut_is_truncated() {
    let packets = [
        datagram().payload(b"").build(),
        tcp(at(GUEST, 1), at(SERVER, 2), "S").build(),
        ping(GUEST, SERVER, 1).payload(b"").build(),
    ];
    for whole in &packets {
        assert!(read_ip(whole).is_ok());
        // Without a first byte nobody knows that it is IP.
        assert_eq!(read_ip(&[]), Err(Reason::NotIp));
        for length in 1..whole.len() {
            let mut cut = whole[..length].to_vec();
            assert_eq!(read_ip(&cut), Err(Reason::Truncated), "{length} bytes");
            // Also when its length agrees.
            if length >= 4 {
                cut[2..4].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
                assert_eq!(read_ip(&cut), Err(Reason::Truncated), "{length} bytes");
            }
        }
    }
}

#[test]
fn padding_behind_the_packet_is_not_part_of_it() {
    let mut frame = datagram().payload(b"").ethernet([2; 6], [4; 6]).build();
    frame.resize(60, 0xaa);
    let packet = read(&Bytes::ethernet(&frame)).unwrap();
    assert_eq!((packet.length, packet.wire_length), (28, 28));
}

#[test]
fn a_packet_yet_to_be_cut_counts_by_its_segments() {
    let mut segments = Bytes::raw(
        &tcp(at(GUEST, 1), at(SERVER, 2), "A")
            .with_tcp(|header| {
                header
                    .set_options(&[Option::Noop, Option::Noop, Option::Timestamp(1, 2)])
                    .unwrap();
            })
            .payload(&vec![0; 60_000])
            .build(),
    );
    segments.segment_size = 1448;
    let packet = read(&segments).unwrap();
    assert_eq!(
        (packet.length, packet.wire_length),
        (60_052, 20 + 32 + 1448)
    );

    let mut datagrams = Bytes::raw(&datagram().payload(&vec![0; 10_000]).build());
    datagrams.segment_size = 1200;
    assert_eq!(read(&datagrams).unwrap().wire_length, 20 + 8 + 1200);
}

#[test]
fn big_tcp_has_no_length_of_its_own() {
    let mut big = tcp(at(GUEST, 1), at(SERVER, 2), "A")
        .payload(&vec![0; 60_000])
        .build();
    big.resize(100_000, 0);
    big[2..4].fill(0);
    let mut frame = Bytes::raw(&big);
    frame.segment_size = 1460;
    let packet = read(&frame).unwrap();
    assert_eq!((packet.length, packet.wire_length), (100_000, 1500));
    frame.segment_size = 0;
    assert_eq!(read(&frame), Err(Reason::Truncated));
}

#[test]
fn headers_that_are_not_in_the_linear_part_cannot_be_read_yet() {
    let mut frame = Bytes::ethernet(
        &tcp(at(GUEST, 1), at(SERVER, 2), "S")
            .ethernet([2; 6], [4; 6])
            .build(),
    );
    for linear in 14..54 {
        frame.linear = linear;
        assert_eq!(read(&frame), Err(Reason::Truncated), "{linear} bytes");
    }
    frame.linear = 54;
    assert!(read(&frame).is_ok());
}
