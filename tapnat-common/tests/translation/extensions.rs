//! IPv6 with extension headers (RFC 8200 section 4).

use std::net::SocketAddr;

use tapnat_common::siit::Untranslatable;
use tapnat_testbed::packet::udp;

use crate::shell::{IDENTIFICATION, SERVER, STAND_IN, WIDE, translated, twins};

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const AUTHENTICATION: u8 = 51;
const UDP: u8 = 17;

/// An extension header of this many units of 8 bytes more than one: padding, or a routing
/// header that is used up.
fn header(next: u8, units: u8) -> Vec<u8> {
    let length = 8 + usize::from(units) * 8;
    let mut bytes = vec![0; length];
    bytes[0] = next;
    bytes[1] = units;
    bytes[2] = 1;
    bytes
}

/// A fragment header with this offset in units of 8 bytes.
fn fragment(next: u8, offset: u16, more: bool) -> Vec<u8> {
    let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
    vec![next, 0, high, low, 0xab, 0xcd, 0x12, 0x34]
}

/// Puts headers in front of what follows the packet's own; `first` is the first one's.
fn with_headers(mut packet: Vec<u8>, first: u8, headers: &[Vec<u8>]) -> Vec<u8> {
    let headers = headers.concat();
    let length = u16::from_be_bytes([packet[4], packet[5]]);
    let length = length + u16::try_from(headers.len()).unwrap();
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    packet[6] = first;
    packet.splice(40..40, headers);
    packet
}

/// The datagram in IPv4, and in IPv6.
fn datagram() -> (Vec<u8>, Vec<u8>) {
    let (ipv4, ipv6) = twins(STAND_IN, SERVER, |s, d| {
        udp(SocketAddr::new(s, 1), SocketAddr::new(d, 2)).payload(&[7; 64])
    });
    (
        ipv4.identification(IDENTIFICATION.into()).build(),
        ipv6.build(),
    )
}

/// RFC 7915 section 5.1: they mean nothing to IPv4.
#[test]
fn they_are_left_out() {
    let (ipv4, ipv6) = datagram();
    for (first, headers) in [
        (HOP_BY_HOP, vec![header(UDP, 0)]),
        (DESTINATION, vec![header(UDP, 3)]),
        (ROUTING, vec![header(UDP, 2)]),
        (
            HOP_BY_HOP,
            vec![
                header(DESTINATION, 0),
                header(ROUTING, 1),
                header(DESTINATION, 2),
                header(UDP, 0),
            ],
        ),
    ] {
        let packet = with_headers(ipv6.clone(), first, &headers);
        assert_eq!(translated(&packet, WIDE).unwrap(), ipv4, "{headers:?}");
    }
}

/// RFC 7915 section 5.1.1.
#[test]
fn before_a_fragment_header_they_are_left_out_too() {
    let (ipv4, ipv6) = datagram();
    let headers = [
        header(DESTINATION, 1),
        header(FRAGMENT, 0),
        fragment(UDP, 0, true),
    ];
    let packet = with_headers(ipv6, HOP_BY_HOP, &headers);
    let mut expected = ipv4;
    // More fragments, and what that changes in the checksum.
    expected[6] = 0x20;
    expected[10] = expected[10].wrapping_sub(0x20);
    assert_eq!(translated(&packet, WIDE).unwrap(), expected);
}

#[test]
fn behind_a_fragment_header_they_are_not_there() {
    let (_, ipv6) = datagram();
    for next in [DESTINATION, ROUTING, AUTHENTICATION] {
        let first = [fragment(next, 0, true), header(UDP, 0)];
        let packet = with_headers(ipv6.clone(), FRAGMENT, &first);
        let refused = translated(&packet, WIDE);
        assert_eq!(refused, Err(Untranslatable::HeaderInFragments), "{next}");
        let later = with_headers(ipv6.clone(), FRAGMENT, &[fragment(next, 8, false)]);
        let refused = translated(&later, WIDE);
        assert_eq!(refused, Err(Untranslatable::HeaderInFragments), "{next}");
    }
}
