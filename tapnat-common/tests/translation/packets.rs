//! Packets that are no ICMP errors: byte for byte what the other version's sender would
//! have sent, and back.

use etherparse::IpNumber;
use proptest::prelude::*;
use std::net::{IpAddr, SocketAddr};
use tapnat_common::{
    nat::nat64::{FRAGMENT_GROWTH, GROWTH},
    net::{Be32, Be128},
};
use tapnat_testbed::packet::{
    Builder,
    checksum::{Expect, verify},
    echo_reply, echo_request, other, tcp, udp,
};

use crate::{
    frame::{Bytes, Partial},
    shell::{
        IDENTIFICATION, SERVER, STAND_IN, Skb, WIDE, translate, translated, twins,
        with_traffic_class,
    },
};

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// A kind of packet between two addresses.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp,
    Udp,
    Request,
    Reply,
    Gre,
}

const KINDS: [Kind; 5] = [Kind::Tcp, Kind::Udp, Kind::Request, Kind::Reply, Kind::Gre];

fn make(kind: Kind, payload: &[u8]) -> impl Fn(IpAddr, IpAddr) -> Builder + use<> {
    let payload = payload.to_vec();
    move |source, destination| {
        let ends = (
            SocketAddr::new(source, 40000),
            SocketAddr::new(destination, 53),
        );
        let builder = match kind {
            Kind::Tcp => tcp(ends.0, ends.1).with_tcp(|header| header.syn = true),
            Kind::Udp => udp(ends.0, ends.1),
            Kind::Request => echo_request(source, destination, 0x77, 5),
            Kind::Reply => echo_reply(source, destination, 0x77, 5),
            Kind::Gre => other(source, destination, IpNumber::GRE),
        };
        builder.payload(&payload).ttl(61)
    }
}

/// The packet in IPv4, as the translator is to make it, and in IPv6.
fn whole(kind: Kind, payload: &[u8], traffic_class: u8) -> (Vec<u8>, Vec<u8>) {
    let (ipv4, ipv6) = twins(STAND_IN, SERVER, make(kind, payload));
    let ipv4 = ipv4.identification(IDENTIFICATION.into());
    let is_long = ipv4.build().len() > 1260;
    let ipv4 = if is_long { ipv4.dont_fragment() } else { ipv4 };
    (
        with_traffic_class(ipv4.build(), traffic_class),
        with_traffic_class(ipv6.build(), traffic_class),
    )
}

/// By hand, with nothing of this repository: RFC 768, RFC 791, RFC 8200.
#[test]
fn a_datagram_byte_by_byte() {
    let ipv6 = [
        0x6b, 0x80, 0x00, 0x00, // version, traffic class 0xb8, flow label
        0x00, 0x0c, 17, 64, // 12 bytes of UDP, hop limit
        0xfd, 0x00, 0x7a, 0x70, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, //
        0x20, 0x01, 0x0d, 0xb8, 0x00, 0x64, 0, 0, 0, 0, 0, 0, 198, 51, 100, 9, //
        0x9c, 0x40, 0x00, 0x35, 0x00, 0x0c, 0xe4, 0xf8, // 40000 to 53
        b'o', b'k', b'?', b'!',
    ];
    let ipv4 = [
        0x45, 0xb8, 0x00, 0x20, // 32 bytes
        0x12, 0x34, 0x00, 0x00, // identification, may be fragmented
        64, 17, 0x33, 0x5e, // time to live, UDP
        10, 64, 0, 7, 198, 51, 100, 9, //
        0x9c, 0x40, 0x00, 0x35, 0x00, 0x0c, 0x80, 0x50, //
        b'o', b'k', b'?', b'!',
    ];
    for packet in [&ipv6[..], &ipv4[..]] {
        assert_eq!(verify(packet, Expect::Complete), Ok(()));
    }
    assert_eq!(translated(&ipv6, WIDE).unwrap(), ipv4);
    assert_eq!(translated(&ipv4, WIDE).unwrap(), ipv6);
}

#[test]
fn echo_requests_and_replies_byte_by_byte() {
    let ipv6 = [
        0x60, 0x00, 0x00, 0x00, 0x00, 0x08, 58, 64, //
        0xfd, 0x00, 0x7a, 0x70, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, //
        0x20, 0x01, 0x0d, 0xb8, 0x00, 0x64, 0, 0, 0, 0, 0, 0, 198, 51, 100, 9, //
        128, 0, 0x9d, 0xac, 0x12, 0x34, 0x00, 0x01,
    ];
    let ipv4 = [
        0x45, 0x00, 0x00, 0x1c, 0x12, 0x34, 0x00, 0x00, 64, 1, 0x34, 0x2a, //
        10, 64, 0, 7, 198, 51, 100, 9, //
        8, 0, 0xe5, 0xca, 0x12, 0x34, 0x00, 0x01,
    ];
    for packet in [&ipv6[..], &ipv4[..]] {
        assert_eq!(verify(packet, Expect::Complete), Ok(()));
    }
    assert_eq!(translated(&ipv6, WIDE).unwrap(), ipv4);
    assert_eq!(translated(&ipv4, WIDE).unwrap(), ipv6);
}

/// RFC 7915 section 5.1: what fits 1280 bytes of IPv6 may be fragmented on its way.
#[test]
fn long_packets_must_not_be_fragmented_further_on() {
    for (length, flags) in [(1220, 0x00), (1221, 0x40)] {
        let (_, ipv6) = whole(Kind::Tcp, &vec![7; length], 0);
        assert_eq!(ipv6.len(), 60 + length);
        let ipv4 = translated(&ipv6, WIDE).unwrap();
        assert_eq!(ipv4[6], flags, "{length}");
    }
}

#[test]
fn a_datagram_without_a_checksum_gets_one() {
    for payload in [&b""[..], b"odd", b"four"] {
        let make = make(Kind::Udp, payload);
        let (ipv4, _) = twins(SERVER, STAND_IN, |s, d| make(s, d).without_udp_checksum());
        let (_, ipv6) = twins(SERVER, STAND_IN, make);
        assert_eq!(translated(&ipv4.build(), WIDE).unwrap(), ipv6.build());
    }
    // One whose checksum comes out as 0.
    let zero = |fill: u16| make(Kind::Udp, &fill.to_be_bytes());
    let (_, ipv6) = twins(SERVER, STAND_IN, zero(0));
    let rest = ipv6.build();
    let fill = u16::from_be_bytes([rest[46], rest[47]]);
    let (ipv4, _) = twins(SERVER, STAND_IN, |s, d| {
        zero(fill)(s, d).without_udp_checksum()
    });
    let ipv6 = translated(&ipv4.build(), WIDE).unwrap();
    assert_eq!(ipv6[46..48], [0xff; 2]);
    assert_eq!(verify(&ipv6, Expect::Complete), Ok(()));
}

/// What is wrong is for the receiver to find.
#[test]
fn a_wrong_checksum_stays_wrong() {
    for kind in [Kind::Tcp, Kind::Udp, Kind::Request] {
        let wrong = |s, d| make(kind, b"payload")(s, d).bad_transport_checksum();
        let (ipv4, ipv6) = twins(STAND_IN, SERVER, wrong);
        for packet in [ipv4.build(), ipv6.build()] {
            let translated = translated(&packet, WIDE).unwrap();
            assert!(verify(&translated, Expect::Complete).is_err(), "{kind:?}");
        }
    }
}

/// What a guest with virtio-net sends: the checksum is the device's affair.
#[test]
fn partial_checksums_are_of_the_other_pseudo_header() {
    for kind in [Kind::Tcp, Kind::Udp] {
        let make = |s, d| make(kind, &[9; 3000])(s, d).ethernet(MACS.0, MACS.1);
        let (ipv4, ipv6) = twins(STAND_IN, SERVER, make);
        let ipv4 = ipv4.identification(IDENTIFICATION.into()).dont_fragment();
        let offloaded = |builder: &Builder| {
            let (offload, bytes) = builder.offloaded(Some(1000));
            let place = offload.checksum.unwrap();
            let start = 14 + usize::from(place.start);
            let partial = Partial {
                start,
                field: start + usize::from(place.offset),
            };
            Bytes {
                partial: Some(partial),
                segment_size: 1000,
                ..Bytes::ethernet(&bytes)
            }
        };
        let (ipv4, ipv6) = (offloaded(&ipv4), offloaded(&ipv6));
        let mut there = Skb::new(ipv6.clone());
        translate::<Be128>(&mut there, WIDE).unwrap();
        assert_eq!(
            there.bytes,
            Bytes {
                linear: there.bytes.linear,
                ..ipv4.clone()
            }
        );
        let mut back = Skb::new(ipv4);
        translate::<Be32>(&mut back, WIDE).unwrap();
        assert_eq!(
            back.bytes,
            Bytes {
                linear: back.bytes.linear,
                ..ipv6
            }
        );
    }
}

#[test]
fn fragments_keep_their_number_and_place() {
    let payload: Vec<u8> = (0..=255).cycle().take(3000).collect();
    for kind in [Kind::Tcp, Kind::Udp, Kind::Gre] {
        let (ipv4, ipv6) = twins(SERVER, STAND_IN, make(kind, &payload));
        let (ipv4, ipv6) = (ipv4.identification(0xbeef), ipv6.identification(0xbeef));
        for range in [
            0..1200,
            1200..1208,
            1208..2400,
            2400..ipv4.build().len() - 20,
        ] {
            let ipv4 = ipv4.fragment(range.clone());
            let ipv6 = ipv6.fragment(range.clone());
            assert_eq!(translated(&ipv4, WIDE).unwrap(), ipv6, "{kind:?} {range:?}");
            assert_eq!(translated(&ipv6, WIDE).unwrap(), ipv4, "{kind:?} {range:?}");
        }
        // IPv4 has room for half of the number (RFC 7915 section 5.1.1).
        let long = ipv6.identification(0xdead_beef).fragment(0..1200);
        assert_eq!(translated(&long, WIDE).unwrap(), ipv4.fragment(0..1200));
    }
}

/// "Don't fragment" in a fragment is said by IPv6 anyway.
#[test]
fn a_fragment_that_must_not_be_fragmented_is_one_all_the_same() {
    let (ipv4, ipv6) = twins(SERVER, STAND_IN, make(Kind::Udp, &[1; 100]));
    let (ipv4, ipv6) = (
        ipv4.identification(9).dont_fragment(),
        ipv6.identification(9),
    );
    assert_eq!(
        translated(&ipv4.fragment(0..64), WIDE).unwrap(),
        ipv6.fragment(0..64)
    );
}

/// RFC 7915 section 4.1: what is cut shorter by that fits.
#[test]
fn the_longest_ipv4_packets_fit() {
    for ipv6_mtu in [1280, 1500] {
        let whole_mtu = ipv6_mtu - GROWTH;
        let (ipv4, _) = twins(SERVER, STAND_IN, make(Kind::Udp, &vec![3; 3000]));
        let payload = vec![3; usize::from(whole_mtu) - 28];
        let (whole, _) = twins(SERVER, STAND_IN, make(Kind::Udp, &payload));
        let whole = translated(&whole.build(), WIDE).unwrap();
        assert_eq!(whole.len(), usize::from(ipv6_mtu));
        let longest = ipv4
            .fragments((ipv6_mtu - GROWTH - FRAGMENT_GROWTH).into())
            .iter()
            .map(|fragment| translated(fragment, WIDE).unwrap().len())
            .max()
            .unwrap();
        let room = usize::from(ipv6_mtu) - longest;
        assert!(room < 8, "{room}");
    }
}

/// RFC 7915 section 4.1: options mean nothing to IPv6.
#[test]
fn ipv4_options_are_left_out() {
    // Record route, not used up; no operation; end.
    let options = [
        7, 11, 8, 198, 51, 100, 2, 0, 0, 0, 0, 1, 148, 4, 0, 0, 1, 1, 0, 0,
    ];
    for kind in KINDS {
        let with = |s, d| make(kind, b"payload")(s, d);
        let (ipv4, ipv6) = twins(SERVER, STAND_IN, with);
        let ipv4 = ipv4.options(&options).build();
        assert_eq!(translated(&ipv4, WIDE).unwrap(), ipv6.build(), "{kind:?}");
    }
}

proptest! {
    #[test]
    fn any_packet_is_what_its_sender_would_have_sent_and_comes_back(
        kind in prop::sample::select(&KINDS),
        payload in prop::collection::vec(any::<u8>(), 0..1400),
        traffic_class: u8,
        ethernet: bool,
    ) {
        let (ipv4, ipv6) = whole(kind, &payload, traffic_class);
        prop_assert_eq!(&translated(&ipv6, WIDE).unwrap(), &ipv4);
        prop_assert_eq!(&translated(&ipv4, WIDE).unwrap(), &ipv6);
        if ethernet {
            let framed = |ethertype: [u8; 2], packet: &[u8]| {
                let padding = vec![0; 46_usize.saturating_sub(packet.len())];
                let (source, destination) = MACS;
                [&destination[..], &source, &ethertype, packet, &padding].concat()
            };
            let frame = framed([0x86, 0xdd], &ipv6);
            let mut skb = Skb::with_sum(Bytes::ethernet(&frame));
            translate::<Be128>(&mut skb, WIDE).unwrap();
            prop_assert_eq!(&skb.bytes.bytes[..14], &framed([8, 0], &[])[..14]);
            prop_assert_eq!(&skb.bytes.ip()[..ipv4.len()], &ipv4);
            prop_assert!(skb.has_right_sum());
        }
    }
}
