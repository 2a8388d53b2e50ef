//! Packets that nobody would send. Whatever they are, nothing panics, and what comes out is
//! a packet of the other version, as long as it says.

use proptest::prelude::*;
use std::net::{IpAddr, SocketAddr};
use tapnat_common::{
    frame::Frame as _,
    net::{Be32, Be128},
    parse::{self, Packet},
};
use tapnat_testbed::packet::{Builder, echo_request, icmp_error, tcp, udp};

use crate::{
    frame::Bytes,
    shell::{EMBEDDED, GUEST, SERVER, STAND_IN, Skb, WIDE, translate},
};

/// Right packets to begin with.
fn packets(source: IpAddr, destination: IpAddr) -> Vec<Vec<u8>> {
    let ends = (SocketAddr::new(source, 1), SocketAddr::new(destination, 2));
    let datagram = udp(ends.0, ends.1).payload(&[1; 300]);
    let segment = tcp(ends.0, ends.1).payload(&[2; 300]);
    let echo = echo_request(source, destination, 3, 4).payload(&[5; 300]);
    let unreachable = if source.is_ipv4() { (3, 3) } else { (1, 4) };
    let error =
        |quoted: &[u8]| icmp_error(source, destination, unreachable, [32; 4], quoted).build();
    let answer = |builder: &Builder| builder.build();
    vec![
        answer(&datagram),
        answer(&segment),
        answer(&echo),
        datagram.fragment(0..160),
        segment.fragment(160..320),
        error(&udp(ends.1, ends.0).payload(&[6; 200]).build()),
        error(&tcp(ends.1, ends.0).payload(&[7; 200]).fragment(0..160)),
        error(&echo_request(destination, source, 8, 9).build()),
    ]
}

/// Changes of bytes, mostly in headers.
fn changes() -> impl Strategy<Value = Vec<(usize, u8)>> {
    prop::collection::vec((prop_oneof![0_usize..80, 0_usize..400], any::<u8>()), 0..5)
}

/// What came out is read as the other version's. The addresses are not looked at, as those
/// that are changed are nobody's.
fn check(skb: &Skb) {
    let bytes = skb.bytes.ip();
    let length = u32::try_from(bytes.len()).unwrap();
    if bytes[0] >> 4 == 4 {
        let mut packet = Packet::<Be32>::default();
        let _ = parse::parse(skb, &mut packet);
        assert!(packet.length <= length, "{skb:?}");
        assert_eq!(packet.header_length, 20, "{skb:?}");
        assert_eq!(crate::frame::sum(&bytes[..20]), 0xffff, "{skb:?}");
    } else {
        let mut packet = Packet::<Be128>::default();
        let _ = parse::parse(skb, &mut packet);
        assert!(packet.length <= length, "{skb:?}");
        assert!(matches!(packet.header_length, 40 | 48), "{skb:?}");
    }
    assert!(skb.has_right_sum(), "{skb:?}");
}

fn try_out(bytes: &[u8], changes: &[(usize, u8)], length: usize, linear: usize) {
    let mut bytes = bytes.to_vec();
    for (at, byte) in changes {
        let at = at % bytes.len();
        // Addresses stay, for the shell of the tests to know them, and the version.
        let is_ipv4 = bytes[0] >> 4 == 4;
        let addresses = if is_ipv4 { 12..20 } else { 8..40 };
        if !addresses.contains(&at) {
            bytes[at] = *byte;
        }
    }
    bytes.truncate(bytes.len().min(length));
    let linear = bytes.len().min(linear);
    let skb = Skb::with_sum(Bytes {
        linear,
        ..Bytes::raw(&bytes)
    });
    let mut there = skb.clone();
    there.pull(255);
    if parse::parse(&there, &mut Packet::<Be32>::default()).is_ok() {
        if translate::<Be32>(&mut there, WIDE).is_ok() {
            check(&there);
        }
    } else if parse::parse(&there, &mut Packet::<Be128>::default()).is_ok()
        && translate::<Be128>(&mut there, WIDE).is_ok()
    {
        check(&there);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_packets(
        number in 0_usize..8,
        is_ipv4: bool,
        changes in changes(),
        length in prop_oneof![Just(usize::MAX), 20_usize..400],
        linear in prop_oneof![Just(usize::MAX), 40_usize..400],
    ) {
        let packets = if is_ipv4 {
            packets(SERVER.into(), STAND_IN.into())
        } else {
            packets(GUEST.into(), EMBEDDED.into())
        };
        try_out(&packets[number], &changes, length, linear);
    }
}
