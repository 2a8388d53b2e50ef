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
    network::{
        MOST_OPTIONS, Version, at, both_families, icmp_error, ip, other_ethertype, ping, pong, tcp,
        udp,
    },
};

fn read<A: Version>(frame: &Bytes) -> Result<Packet<A>, Reason> {
    let mut packet = Packet::default();
    parse(frame, &mut packet).map(|()| packet)
}

fn read_ip<A: Version>(packet: &[u8]) -> Result<Packet<A>, Reason> {
    read(&Bytes::raw(packet))
}

fn datagram<A: Version>() -> Builder {
    udp(at(A::GUEST, 40000), at(A::SERVER, 53))
}

/// Bytes of a header without more.
fn header<A: Version>() -> u32 {
    u32::try_from(A::HEADER).unwrap()
}

fn every_field_of_a_datagram<A: Version>() {
    let bytes = datagram::<A>()
        .ttl(17)
        .identification(0xbeef)
        .dont_fragment()
        .build();
    let header = header::<A>();
    let expected = Packet {
        source: A::GUEST,
        destination: A::SERVER,
        source_port: Be16::new(40000),
        destination_port: Be16::new(53),
        protocol: 17,
        time_to_live: 17,
        dont_fragment: true,
        part: Part::Whole,
        transport: Transport::Udp,
        identification: Be32::new(if A::IDENTIFIES_WHOLE { 0xbeef } else { 0 }),
        fragment_offset: 0,
        more_fragments: false,
        network_offset: 0,
        icmp_type: 0,
        header_length: header,
        unfragmentable_length: header,
        length: header + 16,
        wire_length: header + 16,
        segment: Segment::default(),
    };
    assert_eq!(read_ip::<A>(&bytes), Ok(expected));
    let frame = datagram::<A>()
        .ttl(17)
        .identification(0xbeef)
        .dont_fragment()
        .ethernet([2; 6], [4; 6])
        .build();
    let behind_ethernet = Packet {
        network_offset: 14,
        ..expected
    };
    assert_eq!(read::<A>(&Bytes::ethernet(&frame)), Ok(behind_ethernet));
}
both_families!(every_field_of_a_datagram);

fn a_segment_of_tcp<A: Version>() {
    let segment = tcp(at(A::GUEST, 40000), at(A::SERVER, 80), "SA").with_tcp(|header| {
        header.sequence_number = 0x0102_0304;
        header.acknowledgment_number = 0x0506_0708;
        header.window_size = 0x1122;
    });
    let expected = Segment {
        flags: tcp_flags::SYN | tcp_flags::ACK,
        window: Be16::new(0x1122),
        sequence: Be32::new(0x0102_0304),
        acknowledged: Be32::new(0x0506_0708),
        window_scale: 0,
    };
    for amount in 1..=MOST_OPTIONS {
        let bytes = A::with_options(segment.clone(), amount).build();
        let packet = read_ip::<A>(&bytes).unwrap();
        let header = u32::try_from(bytes.len() - 20).unwrap();
        let lengths = (packet.header_length, packet.transport_offset());
        assert_eq!(lengths, (header, header));
        assert_eq!(packet.checksum_offset(), Some(header + 16));
        assert_eq!(packet.segment, expected);
    }
}
both_families!(a_segment_of_tcp);

fn the_window_scale_is_found_among_the_options<A: Version>() {
    let usual = [
        Option::MaximumSegmentSize(1460),
        Option::SelectiveAcknowledgementPermitted,
        Option::Timestamp(1, 0),
        Option::Noop,
        Option::WindowScale(7),
    ];
    let scale = |options: &[Option], flags: &str| {
        let bytes = tcp(at(A::GUEST, 1), at(A::SERVER, 2), flags)
            .with_tcp(|header| header.set_options(options).unwrap())
            .payload(b"payload")
            .build();
        read_ip::<A>(&bytes).unwrap().segment.window_scale
    };
    assert_eq!(scale(&usual, "S"), 7);
    assert_eq!(scale(&usual, "SA"), 7);
    assert_eq!(scale(&usual, "A"), 0, "only a SYN tells it");
    assert_eq!(scale(&[Option::WindowScale(3)], "S"), 3);
    assert_eq!(scale(&[], "S"), 0);
    // RFC 7323 section 2.3.
    assert_eq!(scale(&[Option::WindowScale(200)], "S"), 14);
}
both_families!(the_window_scale_is_found_among_the_options);

fn options_that_make_no_sense_are_no_window_scale<A: Version>() {
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
        let bytes = tcp(at(A::GUEST, 1), at(A::SERVER, 2), "S")
            .with_tcp(|header| header.set_options_raw(options).unwrap())
            .build();
        assert_eq!(
            read_ip::<A>(&bytes).unwrap().segment.window_scale,
            0,
            "{options:?}"
        );
    }
}
both_families!(options_that_make_no_sense_are_no_window_scale);

fn queries_replies_and_errors_of_icmp<A: Version>() {
    let request = read_ip::<A>(&ping(A::GUEST, A::SERVER, 77).build()).unwrap();
    assert_eq!(request.transport, Transport::IcmpQuery);
    assert_eq!(
        (request.source_port, request.destination_port),
        (Be16::new(77), Be16::ZERO)
    );
    let reply = read_ip::<A>(&pong(A::SERVER, A::GUEST, 77).build()).unwrap();
    assert_eq!(reply.transport, Transport::IcmpReply);
    assert_eq!(
        (reply.source_port, reply.destination_port),
        (Be16::ZERO, Be16::new(77))
    );

    let quoted = datagram::<A>().build();
    let errors = A::ERROR_TYPES.iter().map(|(icmp_type, _)| icmp_type);
    let kinds = errors.map(|icmp_type| (icmp_type, Transport::IcmpError));
    let others = A::OTHER_TYPES.iter();
    for (icmp_type, expected) in kinds.chain(others.map(|other| (other, Transport::IcmpOther))) {
        let message = icmp_error(A::SERVER, A::GUEST, (*icmp_type, 0), &quoted);
        let packet = read_ip::<A>(&message.build()).unwrap();
        assert_eq!(packet.transport, expected, "type {icmp_type}");
    }
}
both_families!(queries_replies_and_errors_of_icmp);

#[test]
fn timestamps_of_icmp_are_queries_and_replies() {
    for (icmp_type, expected) in [(13, Transport::IcmpQuery), (14, Transport::IcmpReply)] {
        let message = icmp_error(Be32::SERVER, Be32::GUEST, (icmp_type, 0), &[0; 12]);
        let packet = read_ip::<Be32>(&message.build()).unwrap();
        assert_eq!(packet.transport, expected, "type {icmp_type}");
    }
}

fn protocols_without_ports_that_can_change<A: Version>() {
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
        let bytes = packet::other(ip(A::GUEST), ip(A::SERVER), number)
            .payload(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0, 0, 0, 0, 0])
            .build();
        let packet = read_ip::<A>(&bytes).unwrap();
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
both_families!(protocols_without_ports_that_can_change);

fn fragments_have_ports_only_in_the_first<A: Version>() {
    let builder = datagram::<A>().payload(&[7; 100]);
    let first = read_ip::<A>(&builder.fragment(0..48)).unwrap();
    assert_eq!(first.part, Part::First);
    assert_eq!(first.source_port, Be16::new(40000));
    assert!(first.checksum_offset().is_some());
    for bytes in [48..96, 96..108] {
        let offset = u16::try_from(bytes.start / 8).unwrap();
        let is_last = bytes.end == 108;
        let later = read_ip::<A>(&builder.fragment(bytes)).unwrap();
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
both_families!(fragments_have_ports_only_in_the_first);

#[test]
fn bits_beside_the_fragment_offset_do_not_make_a_fragment() {
    type A = Be32;
    let mut bytes = datagram::<A>().build();
    // The reserved bit and "don't fragment".
    bytes[6] = 0xc0;
    let packet = read_ip::<A>(&bytes).unwrap();
    assert_eq!(packet.part, Part::Whole);
    assert!(packet.dont_fragment);
    // An offset of 8 bytes in the low byte of the field.
    bytes[6] = 0;
    bytes[7] = 1;
    assert_eq!(read_ip::<A>(&bytes).unwrap().part, Part::Later);
}

fn a_first_fragment_needs_its_transport_header<A: Version>() {
    let segment = tcp(at(A::GUEST, 1), at(A::SERVER, 2), "S").payload(&[0; 64]);
    assert_eq!(
        read_ip::<A>(&segment.fragment(0..8)),
        Err(Reason::FragmentTooShort)
    );
    assert_eq!(
        read_ip::<A>(&segment.fragment(0..16)),
        Err(Reason::FragmentTooShort)
    );
    assert!(read_ip::<A>(&segment.fragment(0..24)).is_ok());
    assert!(read_ip::<A>(&datagram::<A>().fragment(0..8)).is_ok());
    let request = ping(A::GUEST, A::SERVER, 1);
    assert!(read_ip::<A>(&request.fragment(0..8)).is_ok());
}
both_families!(a_first_fragment_needs_its_transport_header);

fn frames_of_other_protocols_are_not_ours<A: Version>() {
    let mut frame = datagram::<A>().ethernet([2; 6], [4; 6]).build();
    for ethertype in [
        [0x08, 0x06],
        other_ethertype::<A>(),
        [0x81, 0x00],
        [0x88, 0x64],
        [A::ETHERTYPE[1], A::ETHERTYPE[0]],
    ] {
        frame[12..14].copy_from_slice(&ethertype);
        assert_eq!(
            read::<A>(&Bytes::ethernet(&frame)),
            Err(Reason::NotIp),
            "{ethertype:02x?}"
        );
    }
    assert_eq!(
        read::<A>(&Bytes::ethernet(&frame[..13])),
        Err(Reason::NotIp),
        "half a link header"
    );
    // On a link without headers the version tells.
    let mut other = datagram::<A>().build();
    other[0] ^= 0x20;
    assert_eq!(read_ip::<A>(&other), Err(Reason::NotIp));
}
both_families!(frames_of_other_protocols_are_not_ours);

#[test]
fn malformed_headers_of_ipv4_are_named() {
    type A = Be32;
    let good = datagram::<A>().build();
    let mut short_header = good.clone();
    short_header[0] = 0x44;
    assert_eq!(read_ip::<A>(&short_header), Err(Reason::BadHeader));
    // The header is longer than the packet.
    let mut long_header = good.clone();
    long_header[0] = 0x4f;
    assert_eq!(read_ip::<A>(&long_header), Err(Reason::Truncated));
    // The packet is shorter than its header.
    for length in [19, 0] {
        let mut wrong = good.clone();
        A::set_length(&mut wrong, length);
        assert_eq!(
            read_ip::<A>(&wrong),
            Err(Reason::Truncated),
            "length {length}"
        );
    }
}

fn malformed_headers_are_named<A: Version>() {
    // Behind Ethernet, which said which version it is, another one is wrong.
    let mut frame = datagram::<A>().ethernet([2; 6], [4; 6]).build();
    frame[14] ^= 0x20;
    assert_eq!(read::<A>(&Bytes::ethernet(&frame)), Err(Reason::BadHeader));
    // The packet is longer than the frame, or has nothing but its header.
    let good = datagram::<A>().build();
    for length in [good.len() + 1, 1500, 65535, A::HEADER] {
        let mut wrong = good.clone();
        A::set_length(&mut wrong, length);
        assert_eq!(
            read_ip::<A>(&wrong),
            Err(Reason::Truncated),
            "length {length}"
        );
    }
}
both_families!(malformed_headers_are_named);

fn every_cut_is_truncated<A: Version>() {
    let packets = [
        datagram::<A>().payload(b"").build(),
        tcp(at(A::GUEST, 1), at(A::SERVER, 2), "S").build(),
        ping(A::GUEST, A::SERVER, 1).payload(b"").build(),
    ];
    for whole in &packets {
        assert!(read_ip::<A>(whole).is_ok());
        // Without a first byte nobody knows that it is IP.
        assert_eq!(read_ip::<A>(&[]), Err(Reason::NotIp));
        for length in 1..whole.len() {
            let mut cut = whole[..length].to_vec();
            assert_eq!(read_ip::<A>(&cut), Err(Reason::Truncated), "{length} bytes");
            // Also when its length agrees.
            A::set_length(&mut cut, length);
            assert_eq!(read_ip::<A>(&cut), Err(Reason::Truncated), "{length} bytes");
        }
    }
}
both_families!(every_cut_is_truncated);

fn padding_behind_the_packet_is_not_part_of_it<A: Version>() {
    let mut frame = datagram::<A>()
        .payload(b"")
        .ethernet([2; 6], [4; 6])
        .build();
    frame.resize(frame.len() + 18, 0xaa);
    let length = header::<A>() + 8;
    let packet = read::<A>(&Bytes::ethernet(&frame)).unwrap();
    assert_eq!((packet.length, packet.wire_length), (length, length));
}
both_families!(padding_behind_the_packet_is_not_part_of_it);

fn a_packet_yet_to_be_cut_counts_by_its_segments<A: Version>() {
    let mut segments = Bytes::raw(
        &tcp(at(A::GUEST, 1), at(A::SERVER, 2), "A")
            .with_tcp(|header| {
                header
                    .set_options(&[Option::Noop, Option::Noop, Option::Timestamp(1, 2)])
                    .unwrap();
            })
            .payload(&vec![0; 60_000])
            .build(),
    );
    let header = header::<A>();
    segments.segment_size = 1448;
    let packet = read::<A>(&segments).unwrap();
    assert_eq!(
        (packet.length, packet.wire_length),
        (header + 32 + 60_000, header + 32 + 1448)
    );

    let mut datagrams = Bytes::raw(&datagram::<A>().payload(&vec![0; 10_000]).build());
    datagrams.segment_size = 1200;
    assert_eq!(
        read::<A>(&datagrams).unwrap().wire_length,
        header + 8 + 1200
    );
}
both_families!(a_packet_yet_to_be_cut_counts_by_its_segments);

fn big_tcp_has_no_length_of_its_own<A: Version>() {
    let mut big = tcp(at(A::GUEST, 1), at(A::SERVER, 2), "A")
        .payload(&vec![0; 60_000])
        .build();
    big.resize(100_000, 0);
    A::set_length(&mut big, 0);
    let mut frame = Bytes::raw(&big);
    frame.segment_size = 1460;
    let packet = read::<A>(&frame).unwrap();
    assert_eq!(
        (packet.length, packet.wire_length),
        (100_000, header::<A>() + 20 + 1460)
    );
    frame.segment_size = 0;
    assert_eq!(read::<A>(&frame), Err(Reason::Truncated));
}
both_families!(big_tcp_has_no_length_of_its_own);

fn headers_that_are_not_in_the_linear_part_cannot_be_read_yet<A: Version>() {
    let mut frame = Bytes::ethernet(
        &tcp(at(A::GUEST, 1), at(A::SERVER, 2), "S")
            .ethernet([2; 6], [4; 6])
            .build(),
    );
    let whole = 14 + A::HEADER + 20;
    for linear in 14..whole {
        frame.linear = linear;
        assert_eq!(read::<A>(&frame), Err(Reason::Truncated), "{linear} bytes");
    }
    frame.linear = whole;
    assert!(read::<A>(&frame).is_ok());
}
both_families!(headers_that_are_not_in_the_linear_part_cannot_be_read_yet);
