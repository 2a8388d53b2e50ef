//! Prefix translation (RFC 6296) of whole packets: no checksum has to be touched.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use etherparse::IpNumber;
use proptest::prelude::*;
use tapnat_common::nptv6::{Direction, PrefixPair, Untranslatable};
use tapnat_testbed::packet::{
    Builder,
    checksum::{Expect, verify},
    echo_request, icmp_error, other, tcp, udp,
};

use crate::frame::Bytes;

const REMOTE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 7);

fn pair(length: u8) -> PrefixPair {
    let internal = Ipv6Addr::new(0xfd01, 0x203, 0x405, 0, 0, 0, 0, 0);
    let external = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0);
    PrefixPair::new((internal.into(), length), (external.into(), length)).unwrap()
}

fn packets(source: IpAddr, destination: IpAddr) -> Vec<Builder> {
    let ends = (
        SocketAddr::new(source, 1024),
        SocketAddr::new(destination, 443),
    );
    vec![
        tcp(ends.0, ends.1).payload(b"payload"),
        udp(ends.0, ends.1).payload(b"odd"),
        echo_request(source, destination, 1, 2).payload(b"ping"),
        other(
            source,
            destination,
            IpNumber::ENCAPSULATING_SECURITY_PAYLOAD,
        )
        .payload(b"who knows"),
    ]
}

fn apply(
    packet: &[u8],
    at: u32,
    pair: PrefixPair,
    direction: Direction,
    is_quoted: bool,
) -> (Vec<u8>, Result<(), Untranslatable>) {
    let mut frame = Bytes::raw(packet);
    let result = pair.apply(&mut frame, at, direction, is_quoted).unwrap();
    (frame.bytes, result)
}

proptest! {
    #[test]
    fn packets_go_out_and_come_in(length in 48_u8..=64, subnet in 0_u16..0xffff, host: u64) {
        let pair = pair(length);
        // The bits that the prefix leaves.
        let subnet = subnet & 0xffff_u16.checked_shr(u32::from(length) - 48).unwrap_or(0);
        let [w4, w5, w6, w7] = std::array::from_fn(|word| {
            u16::from_be_bytes(host.to_be_bytes()[word * 2..][..2].try_into().unwrap())
        });
        let internal = Ipv6Addr::new(0xfd01, 0x203, 0x405, subnet, w4, w5, w6, w7);
        let Ok(external) = pair.translate_out(internal.into()) else {
            return Ok(());
        };
        let external = Ipv6Addr::from(external);
        let outward = packets(internal.into(), REMOTE.into());
        let expected = packets(external.into(), REMOTE.into());
        for (packet, expected) in outward.iter().zip(expected) {
            let (out, result) = apply(&packet.build(), 0, pair, Direction::Out, false);
            prop_assert_eq!(result, Ok(()));
            prop_assert_eq!(verify(&out, Expect::Complete), Ok(()));
            prop_assert_eq!(&out[..40], &expected.build()[..40]);
            // Nothing but the address has changed.
            prop_assert_eq!(&out[24..], &packet.build()[24..]);

            // A router tells of it: what it quotes was sent from the external address.
            let error = |to: Ipv6Addr, quoted: &[u8]| {
                icmp_error(REMOTE.into(), to.into(), (2, 0), [0, 0, 5, 0], quoted).build()
            };
            let told = error(external, &out);
            let (told, result) = apply(&told, 0, pair, Direction::In, false);
            prop_assert_eq!(result, Ok(()));
            let (told, result) = apply(&told, 48, pair, Direction::In, true);
            prop_assert_eq!(result, Ok(()));
            prop_assert_eq!(verify(&told, Expect::Complete), Ok(()));
            prop_assert_eq!(told, error(internal, &packet.build()));
        }
        let inward = packets(REMOTE.into(), external.into());
        for packet in inward {
            let (inside, result) = apply(&packet.build(), 0, pair, Direction::In, false);
            prop_assert_eq!(result, Ok(()));
            prop_assert_eq!(verify(&inside, Expect::Complete), Ok(()));
            prop_assert_eq!(&inside[24..40], &internal.octets());

            // The host inside tells of it.
            let error = |from: Ipv6Addr, quoted: &[u8]| {
                icmp_error(from.into(), REMOTE.into(), (1, 4), [0; 4], quoted).build()
            };
            let told = error(internal, &inside);
            let (told, _) = apply(&told, 0, pair, Direction::Out, false);
            let (told, _) = apply(&told, 48, pair, Direction::Out, true);
            prop_assert_eq!(told, error(external, &packet.build()));
        }
    }
}

#[test]
fn what_is_not_of_the_network_is_left_alone() {
    let pair = pair(48);
    let packet = udp(
        "[2001:db8:77::1]:1".parse().unwrap(),
        SocketAddr::new(REMOTE.into(), 2),
    )
    .build();
    for (direction, is_quoted) in [
        (Direction::Out, false),
        (Direction::In, false),
        (Direction::Out, true),
        (Direction::In, true),
    ] {
        let (bytes, result) = apply(&packet, 0, pair, direction, is_quoted);
        assert_eq!(result, Err(Untranslatable::Outside));
        assert_eq!(bytes, packet);
    }
    assert_eq!(
        pair.apply(&mut Bytes::raw(&packet[..30]), 0, Direction::In, false),
        None
    );
}
