//! Packets that are not translated, each by its name.

use etherparse::IpNumber;
use std::net::{IpAddr, SocketAddr};
use tapnat_common::siit::Untranslatable;
use tapnat_testbed::packet::{
    Builder, checksum::sum, echo_request, icmp_error, other, tcp, time_exceeded, udp,
};

use crate::shell::{GUEST, SERVER, STAND_IN, WIDE, translated, twins};

fn datagram(source: IpAddr, destination: IpAddr) -> Builder {
    let ends = (
        SocketAddr::new(source, 1000),
        SocketAddr::new(destination, 53),
    );
    udp(ends.0, ends.1).payload(&[5; 100])
}

fn refusal(packet: &[u8]) -> Untranslatable {
    translated(packet, WIDE).unwrap_err()
}

/// RFC 7915 section 1.2.
#[test]
fn fragments_of_icmp() {
    let make = |s, d| echo_request(s, d, 1, 1).payload(&[0; 200]);
    let (ipv4, ipv6) = twins(STAND_IN, SERVER, make);
    for packet in [ipv4, ipv6] {
        for range in [0..104, 104..208] {
            let fragment = packet.fragment(range);
            assert_eq!(refusal(&fragment), Untranslatable::FragmentedIcmp);
        }
    }
}

/// RFC 7915 section 4.5.
#[test]
fn first_fragments_of_datagrams_without_a_checksum() {
    let (ipv4, ipv6) = twins(SERVER, STAND_IN, |s, d| {
        datagram(s, d).without_udp_checksum().identification(7)
    });
    let first = refusal(&ipv4.fragment(0..64));
    assert_eq!(first, Untranslatable::FragmentWithoutChecksum);
    // Without the first one the others are of no use.
    let later = ipv4.fragment(64..108);
    assert_eq!(translated(&later, WIDE).unwrap(), ipv6.fragment(64..108));
}

/// RFC 7915 section 4.1.
#[test]
fn source_routes_that_are_not_used_up() {
    let (ipv4, ipv6) = twins(SERVER, STAND_IN, datagram);
    for (options, is_used_up) in [
        ([131, 11, 4, 1, 1, 1, 1, 2, 2, 2, 2, 0], false),
        ([131, 11, 8, 1, 1, 1, 1, 2, 2, 2, 2, 0], false),
        ([131, 11, 11, 1, 1, 1, 1, 2, 2, 2, 2, 0], false),
        ([131, 11, 12, 1, 1, 1, 1, 2, 2, 2, 2, 0], true),
        ([137, 11, 8, 1, 1, 1, 1, 2, 2, 2, 2, 0], false),
        ([137, 11, 12, 1, 1, 1, 1, 2, 2, 2, 2, 0], true),
        ([1, 131, 7, 4, 1, 1, 1, 1, 0, 0, 0, 0], false),
        ([148, 4, 0, 0, 131, 7, 4, 1, 1, 1, 1, 0], false),
        ([148, 4, 0, 0, 131, 7, 8, 1, 1, 1, 1, 0], true),
        // Behind the end of all options.
        ([0, 131, 7, 4, 1, 1, 1, 1, 0, 0, 0, 0], true),
        // An option that makes no sense.
        ([148, 0, 0, 0, 131, 7, 4, 1, 1, 1, 1, 0], true),
    ] {
        let result = translated(&ipv4.clone().options(&options).build(), WIDE);
        if is_used_up {
            assert_eq!(result.unwrap(), ipv6.build(), "{options:?}");
        } else {
            assert_eq!(result, Err(Untranslatable::SourceRoute), "{options:?}");
        }
    }
    let long: Vec<u8> = [1; 36].into_iter().chain([131, 3, 4, 0]).collect();
    assert!(translated(&ipv4.options(&long).build(), WIDE).is_ok());
}

/// They would be taken for extension headers.
#[test]
fn extension_headers_as_protocols_of_ipv4() {
    for number in [0, 43, 44, 60] {
        let (ipv4, _) = twins(SERVER, STAND_IN, |s, d| {
            other(s, d, IpNumber(number)).payload(&[17, 0, 0, 0, 0, 0, 0, 0])
        });
        assert_eq!(refusal(&ipv4.build()), Untranslatable::ForeignProtocol);
    }
}

/// They would be taken for the other version's own.
#[test]
fn the_other_versions_icmp() {
    for (protocol, in_ipv6) in [(IpNumber::ICMP, true), (IpNumber::IPV6_ICMP, false)] {
        let (ipv4, ipv6) = twins(STAND_IN, SERVER, |s, d| {
            other(s, d, protocol).payload(&[134, 0, 1, 2, 3, 4, 5, 6])
        });
        let packet = if in_ipv6 { ipv6 } else { ipv4 };
        assert_eq!(refusal(&packet.build()), Untranslatable::ForeignProtocol);
        let later = packet.payload(&[0; 64]).fragment(8..64);
        assert_eq!(refusal(&later), Untranslatable::ForeignProtocol);
    }
}

/// RFC 7915 sections 4.2 and 5.2.
#[test]
fn icmp_without_a_counterpart() {
    let message = |kind, is_ipv4| {
        let (ipv4, ipv6) = twins(SERVER, STAND_IN, |s, d| {
            icmp_error(s, d, (kind, 0), [0; 4], &[0; 40])
        });
        refusal(&if is_ipv4 { ipv4 } else { ipv6 }.build())
    };
    // Source quench, redirect, another address, routers, timestamps, information, masks,
    // photuris; the types that only IPv6 has.
    for kind in [
        1, 2, 4, 5, 6, 7, 9, 10, 13, 14, 15, 16, 17, 18, 40, 128, 129, 255,
    ] {
        assert_eq!(message(kind, true), Untranslatable::NoCounterpart, "{kind}");
    }
    // Multicast listeners, neighbour discovery, node information, and IPv4's types.
    for kind in [
        0, 8, 100, 127, 130, 131, 132, 133, 134, 135, 136, 137, 139, 143, 255,
    ] {
        assert_eq!(
            message(kind, false),
            Untranslatable::NoCounterpart,
            "{kind}"
        );
    }
}

#[test]
fn errors_that_quote_too_little_or_the_wrong_thing() {
    let sent = |s, d| datagram(s, d).build();
    let (asked, answered) = (GUEST.into(), crate::shell::EMBEDDED.into());
    let error = |quoted: &[u8]| time_exceeded(answered, asked, quoted).build();
    let unusable = Untranslatable::ErrorUnusable;
    let whole = sent(asked, answered);
    for length in 0..48 {
        assert_eq!(refusal(&error(&whole[..length])), unusable, "{length}");
    }
    assert!(translated(&error(&whole[..48]), WIDE).is_ok());

    let echo = echo_request(asked, answered, 1, 1).payload(&[1; 64]);
    let an_error = time_exceeded(asked, answered, &sent(answered, asked)).build();
    let mut other_version = whole.clone();
    other_version[0] = 0x45;
    for quoted in [
        // An error, and what has no counterpart.
        an_error,
        icmp_error(asked, answered, (135, 0), [0; 4], &[0; 16]).build(),
        // Fragments of ICMP, and later ones of anything.
        echo.fragment(0..64),
        datagram(asked, answered).fragment(64..108),
        other(asked, answered, IpNumber::ICMP)
            .payload(&[8; 16])
            .build(),
        other_version,
    ] {
        assert_eq!(refusal(&error(&quoted)), unusable);
    }
}

#[test]
fn errors_in_fragments() {
    let (ipv4, ipv6) = twins(SERVER, STAND_IN, |s, d| {
        time_exceeded(s, d, &datagram(d, s).build())
    });
    for packet in [ipv4, ipv6] {
        for range in [0..96, 96..104] {
            let fragment = refusal(&packet.fragment(range));
            assert_eq!(fragment, Untranslatable::FragmentedIcmp);
        }
    }
}

/// IPv4 counts its header in.
#[test]
fn a_packet_longer_than_ipv4_can_say() {
    for (length, fits) in [(65_495, true), (65_496, false)] {
        let make = |s, d| {
            let ends = (SocketAddr::new(s, 1), SocketAddr::new(d, 2));
            tcp(ends.0, ends.1).payload(&vec![0; length])
        };
        let source = GUEST.into();
        let packet = make(source, crate::shell::EMBEDDED.into()).build();
        match translated(&packet, WIDE) {
            Ok(ipv4) => {
                assert!(fits);
                assert_eq!(ipv4[2..4], [0xff; 2]);
                assert_eq!(sum(&[&ipv4[..20]]), 0xffff);
            }
            Err(reason) => {
                assert!(!fits);
                assert_eq!(reason, Untranslatable::TooLong);
            }
        }
    }
}
