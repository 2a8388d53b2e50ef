//! ICMP errors: byte for byte what a router or host of the other version would have sent
//! about the same packet.

use etherparse::IpNumber;
use proptest::prelude::*;
use std::net::{IpAddr, SocketAddr};
use tapnat_common::siit::Mtus;
use tapnat_testbed::packet::{
    Builder,
    checksum::{self, Expect, verify},
    echo_reply, echo_request, icmp_error, other, tcp, udp,
};

use crate::shell::{
    EMBEDDED, GUEST, IDENTIFICATION, ROUTER, SERVER, STAND_IN, WIDE, in_both, translated,
};

type Kind = (u8, u8);

/// What a guest sent: a packet in IPv4, as it came back from the NAT, and in IPv6. That it
/// is identified nobody knows any more.
fn sent(make: impl Fn(IpAddr, IpAddr) -> Builder) -> (Vec<u8>, Vec<u8>) {
    let ipv4 = make(STAND_IN.into(), SERVER.into())
        .identification(0)
        .ttl(1);
    let is_long = ipv4.build().len() > 1260;
    let ipv4 = if is_long { ipv4.dont_fragment() } else { ipv4 };
    let ipv6 = make(GUEST.into(), EMBEDDED.into()).ttl(1);
    (ipv4.build(), ipv6.build())
}

fn datagram(length: usize) -> impl Fn(IpAddr, IpAddr) -> Builder {
    move |s, d| udp(SocketAddr::new(s, 4000), SocketAddr::new(d, 53)).payload(&vec![3; length])
}

/// The same error in both versions, about what the guest sent, from a router in IPv4.
fn errors(
    (kind4, rest4): (Kind, [u8; 4]),
    (kind6, rest6): (Kind, [u8; 4]),
    (quoted4, quoted6): (&[u8], &[u8]),
) -> (Vec<u8>, Vec<u8>) {
    let (router4, router6) = in_both(ROUTER);
    let ipv4 = icmp_error(router4, STAND_IN.into(), kind4, rest4, quoted4)
        .identification(IDENTIFICATION.into());
    let is_long = ipv4.build().len() > 1260;
    let ipv4 = if is_long { ipv4.dont_fragment() } else { ipv4 };
    let ipv6 = icmp_error(router6, GUEST.into(), kind6, rest6, quoted6);
    (ipv4.build(), ipv6.build())
}

fn translate_to_ipv6(kind: Kind, rest: [u8; 4], mtus: Mtus) -> Option<(Kind, [u8; 4])> {
    let (quoted, _) = sent(datagram(1400));
    let (ipv4, _) = errors((kind, rest), ((1, 0), [0; 4]), (&quoted, &[0; 8]));
    Some(kind_of(&translated(&ipv4, mtus).ok()?, 40))
}

fn translate_to_ipv4(kind: Kind, rest: [u8; 4], mtus: Mtus) -> Option<(Kind, [u8; 4])> {
    let (_, quoted) = sent(datagram(1000));
    let (_, ipv6) = errors(((3, 0), [0; 4]), (kind, rest), (&[0; 8], &quoted));
    Some(kind_of(&translated(&ipv6, mtus).ok()?, 20))
}

fn kind_of(packet: &[u8], at: usize) -> (Kind, [u8; 4]) {
    assert_eq!(verify(packet, Expect::Complete), Ok(()));
    (
        (packet[at], packet[at + 1]),
        packet[at + 4..at + 8].try_into().unwrap(),
    )
}

/// RFC 7915 section 4.2.
#[test]
fn types_and_codes_of_ipv4() {
    let unreachable = [
        (0, Some((1, 0))),
        (1, Some((1, 0))),
        (2, Some((4, 1))),
        (3, Some((1, 4))),
        (5, Some((1, 0))),
        (6, Some((1, 0))),
        (7, Some((1, 0))),
        (8, Some((1, 0))),
        (9, Some((1, 1))),
        (10, Some((1, 1))),
        (11, Some((1, 0))),
        (12, Some((1, 0))),
        (13, Some((1, 1))),
        (14, None),
        (15, Some((1, 1))),
        (16, None),
        (255, None),
    ];
    for (code, expected) in unreachable {
        let translated = translate_to_ipv6((3, code), [0; 4], WIDE);
        assert_eq!(translated.map(|(kind, _)| kind), expected, "{code}");
        // "Protocol unreachable" points at the next header field.
        let rest = if code == 2 { [0, 0, 0, 6] } else { [0; 4] };
        assert!(translated.is_none_or(|(_, found)| found == rest), "{code}");
    }
    for code in [0, 1] {
        let translated = translate_to_ipv6((11, code), [0; 4], WIDE);
        assert_eq!(translated, Some(((3, code), [0; 4])));
    }
}

/// RFC 7915 section 5.2.
#[test]
fn types_and_codes_of_ipv6() {
    for (kind, expected) in [
        ((1, 0), Some((3, 1))),
        ((1, 1), Some((3, 10))),
        ((1, 2), Some((3, 1))),
        ((1, 3), Some((3, 1))),
        ((1, 4), Some((3, 3))),
        ((1, 5), None),
        ((1, 6), None),
        ((3, 0), Some((11, 0))),
        ((3, 1), Some((11, 1))),
        ((4, 1), Some((3, 2))),
        ((4, 2), None),
        ((4, 3), None),
    ] {
        let translated = translate_to_ipv4(kind, [0; 4], WIDE);
        assert_eq!(translated, expected.map(|kind| (kind, [0; 4])), "{kind:?}");
    }
}

/// RFC 7915 figures 3 and 6.
#[test]
fn pointers() {
    let to_ipv6 = [
        (0, 0),
        (1, 1),
        (2, 4),
        (3, 4),
        (8, 7),
        (9, 6),
        (12, 8),
        (15, 8),
        (16, 24),
        (19, 24),
    ];
    for pointer in 0..=255 {
        let expected = to_ipv6
            .into_iter()
            .find(|(from, _)| {
                *from == pointer
                    || (13..=14).contains(&pointer) && *from == 12
                    || (17..=18).contains(&pointer) && *from == 16
            })
            .map(|(_, to)| ((4, 0), [0, 0, 0, to]));
        for code in [0, 2] {
            let found = translate_to_ipv6((12, code), [pointer, 0, 0, 0], WIDE);
            assert_eq!(found, expected, "{pointer}");
        }
        // A required option is missing.
        assert_eq!(translate_to_ipv6((12, 1), [pointer, 0, 0, 0], WIDE), None);
    }
    for (from, to) in [
        (0, Some(0)),
        (1, Some(1)),
        (2, None),
        (3, None),
        (4, Some(2)),
        (5, Some(2)),
        (6, Some(9)),
        (7, Some(8)),
        (8, Some(12)),
        (23, Some(12)),
        (24, Some(16)),
        (39, Some(16)),
        (40, None),
        (0x100, None),
        (u32::MAX, None),
    ] {
        let found = translate_to_ipv4((4, 0), u32::to_be_bytes(from), WIDE);
        let expected = to.map(|to| ((12, 0), [to, 0, 0, 0]));
        assert_eq!(found, expected, "{from}");
    }
}

/// RFC 7915 section 4.2: 1280 at least, and the least of what was told and 20 more, of the
/// IPv6 way's, and of the IPv4 way's and 20 more; without an MTU, what is likely (RFC 1191 section 7).
#[test]
fn mtus_from_ipv4() {
    let found = |mtu: u16, mtus| {
        let [high, low] = mtu.to_be_bytes();
        let (kind, rest) = translate_to_ipv6((3, 4), [0, 0, high, low], mtus).unwrap();
        assert_eq!(kind, (2, 0));
        u32::from_be_bytes(rest)
    };
    for (mtu, expected) in [
        (1500, 1520),
        (1280, 1300),
        (1261, 1281),
        (1260, 1280),
        (1259, 1280),
        (68, 1280),
        (1, 1280),
        (65_535, 65_535),
    ] {
        assert_eq!(found(mtu, WIDE), expected, "{mtu}");
    }
    let ways = |ipv4, ipv6| Mtus { ipv4, ipv6 };
    assert_eq!(found(1480, ways(1400, 1500)), 1420);
    assert_eq!(found(1480, ways(1500, 1400)), 1400);
    assert_eq!(found(1480, ways(1500, 1000)), 1280);
    // 1428 bytes did not pass.
    assert_eq!(found(0, WIDE), 1280);
    for (length, expected) in [
        (1492, 1280),
        (1493, 1512),
        (2002, 1512),
        (2003, 2022),
        (4352, 2022),
        (4353, 4372),
        (8166, 4372),
        (8167, 8186),
        (17_914, 8186),
        (17_915, 17_934),
        (32_000, 17_934),
        (32_001, 32_020),
        (65_535, 32_020),
    ] {
        let (quoted, _) = sent(datagram(length - 28));
        let quoted = &quoted[..500];
        let (ipv4, _) = errors(((3, 4), [0; 4]), ((2, 0), [0; 4]), (quoted, &[]));
        let translated = translated(&ipv4, WIDE).unwrap();
        let (_, rest) = kind_of(&translated, 40);
        assert_eq!(u32::from_be_bytes(rest), expected, "{length}");
    }
}

/// RFC 7915 section 5.2: `min(MTU - 20, MTU of the IPv4 way, MTU of the IPv6 way - 20)`,
/// and 8 less where the packet had a fragment header.
#[test]
fn mtus_from_ipv6() {
    let found = |mtu: u32, mtus| {
        let (kind, rest) = translate_to_ipv4((2, 0), mtu.to_be_bytes(), mtus).unwrap();
        assert_eq!(kind, (3, 4));
        u32::from_be_bytes(rest)
    };
    for (mtu, expected) in [
        (1500, 1480),
        (1280, 1260),
        (100, 80),
        (88, 68),
        (0, 68),
        (70_000, 65_515),
        (u32::MAX, 65_515),
    ] {
        assert_eq!(found(mtu, WIDE), expected, "{mtu}");
    }
    let ways = |ipv4, ipv6| Mtus { ipv4, ipv6 };
    assert_eq!(found(1480, ways(1400, 1500)), 1400);
    assert_eq!(found(1480, ways(1500, 1400)), 1380);

    let fragment = datagram(2000)(GUEST.into(), EMBEDDED.into()).fragment(0..1200);
    let (_, ipv6) = errors(((3, 4), [0; 4]), ((2, 0), [0, 0, 5, 0]), (&[], &fragment));
    let translated = translated(&ipv6, WIDE).unwrap();
    let (_, rest) = kind_of(&translated, 20);
    assert_eq!(u32::from_be_bytes(rest), 1280 - 28);
}

const KINDS: [&str; 6] = ["tcp", "udp", "no checksum", "request", "reply", "gre"];

/// A packet of the guest's.
fn make(kind: &str, payload: usize) -> impl Fn(IpAddr, IpAddr) -> Builder {
    move |s, d| {
        let ends = (SocketAddr::new(s, 4000), SocketAddr::new(d, 53));
        let builder = match kind {
            "tcp" => tcp(ends.0, ends.1),
            "udp" => udp(ends.0, ends.1),
            "no checksum" => udp(ends.0, ends.1).without_udp_checksum(),
            "request" => echo_request(s, d, 7, 8),
            "reply" => echo_reply(s, d, 7, 8),
            "gre" => other(s, d, IpNumber::GRE),
            _ => panic!("{kind}"),
        };
        builder.payload(&vec![6; payload + 8])
    }
}

const PORT: (Kind, Kind) = ((3, 3), (1, 4));

/// What a router quotes of a fragment, and where its options were.
#[test]
fn quoted_fragments_and_options() {
    let make = datagram(1000);
    let ipv4 = make(STAND_IN.into(), SERVER.into()).identification(0x5678);
    let ipv6 = make(GUEST.into(), EMBEDDED.into()).identification(0x5678);
    let (quoted4, quoted6) = (ipv4.fragment(0..800), ipv6.fragment(0..800));
    let (kind4, kind6) = ((PORT.0, [0; 4]), (PORT.1, [0; 4]));
    let (error4, error6) = errors(kind4, kind6, (&quoted4, &quoted6));
    assert_eq!(translated(&error4, WIDE).unwrap(), error6);
    assert_eq!(translated(&error6, WIDE).unwrap(), error4);

    // Nobody says what options there were.
    let options = [7, 7, 4, 0, 0, 0, 0, 0];
    let quoted4 = make(STAND_IN.into(), SERVER.into())
        .options(&options)
        .build();
    let quoted6 = make(GUEST.into(), EMBEDDED.into()).build();
    let (error4, error6) = errors(kind4, kind6, (&quoted4[..300], &quoted6[..312]));
    assert_eq!(translated(&error4, WIDE).unwrap(), error6);
}

/// RFC 4443 section 2.4: an ICMPv6 error is not longer than 1280 bytes.
#[test]
fn what_is_too_long_for_ipv6_is_cut() {
    let (quoted4, quoted6) = sent(make("tcp", 1500));
    for length in [1211, 1212, 1213, 1300, 1472] {
        let quoted4 = &quoted4[..length];
        let quoted6 = &quoted6[..(length + 20).min(1232)];
        let (error4, error6) = errors((PORT.0, [0; 4]), (PORT.1, [0; 4]), (quoted4, quoted6));
        let translated = translated(&error4, WIDE).unwrap();
        assert_eq!(translated, error6, "{length}");
        assert!(translated.len() <= 1280);
    }
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    let (quoted4, quoted6) = sent(datagram(1000));
    let (router4, router6) = in_both(ROUTER);
    let ipv4 = icmp_error(router4, STAND_IN.into(), PORT.0, [0; 4], &quoted4);
    let ipv6 = icmp_error(router6, GUEST.into(), PORT.1, [0; 4], &quoted6);
    let cut = icmp_error(
        router4,
        STAND_IN.into(),
        PORT.0,
        [0; 4],
        &[quoted4, vec![1; 400]].concat(),
    );
    for error in [ipv4, ipv6, cut] {
        let wrong = error.bad_transport_checksum().build();
        let translated = translated(&wrong, WIDE).unwrap();
        assert!(verify(&translated, Expect::Complete).is_err());
    }
}

/// A guest complains, too, of what a server sent it.
#[test]
fn errors_of_guests() {
    let make = datagram(200);
    let quoted4 = make(SERVER.into(), STAND_IN.into())
        .identification(0)
        .build();
    let quoted6 = make(EMBEDDED.into(), GUEST.into()).build();
    let ipv4 = icmp_error(STAND_IN.into(), SERVER.into(), PORT.0, [0; 4], &quoted4)
        .identification(IDENTIFICATION.into())
        .build();
    let ipv6 = icmp_error(GUEST.into(), EMBEDDED.into(), PORT.1, [0; 4], &quoted6).build();
    assert_eq!(translated(&ipv6, WIDE).unwrap(), ipv4);
    assert_eq!(translated(&ipv4, WIDE).unwrap(), ipv6);
}

/// An extension structure with one object (RFC 4884 sections 7 and 8): MPLS labels.
fn labels() -> Vec<u8> {
    let mut bytes = vec![0x20, 0, 0, 0, 0, 8, 1, 1, 0x12, 0x34, 0x51, 0xff];
    let check = !checksum::sum(&[&bytes]);
    bytes[2..4].copy_from_slice(&check.to_be_bytes());
    bytes
}

/// What is quoted, filled up with zeros to this length, and what follows it.
fn followed(quoted: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = quoted.to_vec();
    bytes.resize(length, 0);
    bytes.extend(labels());
    bytes
}

/// RFC 4884: the length is told in words of 4 bytes, in IPv6 of 8, and of no less than 128.
#[test]
fn what_follows_the_quoted_packet_does_still() {
    let (quoted4, quoted6) = sent(make("tcp", 400));
    let exceeded = ((11, 0), (3, 0));
    for (length4, length6) in [(128, 152), (132, 152), (136, 160), (140, 160), (400, 424)] {
        // Filled up for a second time where IPv6's unit asks for it.
        let shorter = &quoted6[..length4 + 20];
        let (error4, error6) = errors(
            (exceeded.0, [0, u8::try_from(length4 / 4).unwrap(), 0, 0]),
            (exceeded.1, [u8::try_from(length6 / 8).unwrap(), 0, 0, 0]),
            (
                &followed(&quoted4[..length4], length4),
                &followed(shorter, length6),
            ),
        );
        let translated = translated(&error4, WIDE).unwrap();
        assert_eq!(translated, error6, "{length4}");
    }
    for (length6, length4) in [(128, 128), (144, 128), (152, 132), (400, 380)] {
        let shorter = &quoted4[..length6 - 20];
        let (error4, error6) = errors(
            (exceeded.0, [0, u8::try_from(length4 / 4).unwrap(), 0, 0]),
            (exceeded.1, [u8::try_from(length6 / 8).unwrap(), 0, 0, 0]),
            (
                &followed(shorter, length4),
                &followed(&quoted6[..length6], length6),
            ),
        );
        let translated = translated(&error6, WIDE).unwrap();
        assert_eq!(translated, error4, "{length6}");
    }
}

/// Where the other version has no place for the length, or no room.
#[test]
fn what_cannot_follow_the_quoted_packet_is_left_out() {
    let (quoted4, quoted6) = sent(make("udp", 1500));
    let words = |length: usize| u8::try_from(length / 4).unwrap();
    for (kind4, rest4, kind6, rest6) in [
        ((3, 4), [0, words(128), 5, 0xdc], (2, 0), [0, 0, 5, 0xf0]),
        ((3, 2), [0, words(128), 0, 0], (4, 1), [0, 0, 0, 6]),
        ((12, 0), [8, words(128), 0, 0], (4, 0), [0, 0, 0, 7]),
    ] {
        let (error4, error6) = errors(
            (kind4, rest4),
            (kind6, rest6),
            (&followed(&quoted4[..128], 128), &quoted6[..148]),
        );
        assert_eq!(translated(&error4, WIDE).unwrap(), error6, "{kind4:?}");
    }
    // 1020 bytes and 200 more: too long.
    let more = [&followed(&quoted4[..1020], 1020)[..], &[0x11; 200]].concat();
    let (error4, error6) = errors(
        ((11, 0), [0, words(1020), 0, 0]),
        ((3, 0), [0; 4]),
        (&more, &quoted6[..1040]),
    );
    assert_eq!(translated(&error4, WIDE).unwrap(), error6);
    // 1048 bytes: more than words of 4 bytes say in one byte.
    let (error4, error6) = errors(
        ((11, 0), [0; 4]),
        ((3, 0), [131, 0, 0, 0]),
        (&quoted4[..1028], &followed(&quoted6[..1048], 1048)),
    );
    assert_eq!(translated(&error6, WIDE).unwrap(), error4);
}

/// A length that leads nowhere: all is quoted.
#[test]
fn a_length_that_makes_no_sense_is_not_believed() {
    let (quoted4, quoted6) = sent(make("udp", 200));
    for length in [50, 64, 255] {
        let (error4, error6) = errors(
            ((11, 0), [0, length, 0, 0]),
            ((3, 0), [0; 4]),
            (&quoted4[..200], &quoted6[..220]),
        );
        assert_eq!(translated(&error4, WIDE).unwrap(), error6, "{length}");
    }
}

proptest! {
    #[test]
    fn any_quote_of_any_length_there_and_back(
        kind in prop::sample::select(&KINDS),
        payload in 0_usize..1600,
        quoted in 8_usize..1200,
    ) {
        let (quoted4, quoted6) = sent(make(kind, payload));
        let end = quoted.min(quoted4.len() - 20);
        // Of half a checksum nothing can be made.
        prop_assume!(kind != "tcp" || end != 17);
        // RFC 4443 section 2.4.
        let (quoted4, quoted6) = (&quoted4[..20 + end], &quoted6[..(40 + end).min(1232)]);
        let (error4, error6) = errors((PORT.0, [0; 4]), (PORT.1, [0; 4]), (quoted4, quoted6));
        prop_assert_eq!(&translated(&error4, WIDE).unwrap(), &error6);
        if quoted6.len() == 40 + end {
            prop_assert_eq!(&translated(&error6, WIDE).unwrap(), &error4);
        }
    }
}
