//! What only IPv6 has: extension headers, fragments that one of them tells of, hops that
//! never fragment, and addresses and messages that stay on their link (RFC 8200, 4443,
//! 4861, 5095, 7112, 8021).

use etherparse::IpNumber;
use tapnat_common::{
    abi::{Filtering, setting_flags},
    net::{Be128, protocol},
    verdict::{Outcome, Reason},
};
use tapnat_testbed::packet::{self, Builder};

use crate::support::{
    frame::Bytes,
    network::{
        IcmpKind, MOST_OPTIONS, SECOND_TAP, TAP, UPLINK, Version as _, at, icmp_error, ip, ping,
        pong, tcp, udp,
    },
    world::{Exit, World, route},
};

const GUEST: Be128 = Be128::GUEST;
const NEIGHBOUR: Be128 = Be128::NEIGHBOUR;
const HOST: Be128 = Be128::HOST[0];
const OUTSIDE: Be128 = Be128::OUTSIDE;
const SERVER: Be128 = Be128::SERVER;

/// An extension header's number, and what follows its length.
type Extension = (IpNumber, Vec<u8>);

const HOP_BY_HOP: IpNumber = IpNumber::IPV6_HEADER_HOP_BY_HOP;
const ROUTING: IpNumber = IpNumber::IPV6_ROUTE_HEADER;
const DESTINATION: IpNumber = IpNumber::IPV6_DESTINATION_OPTIONS;

/// A header of so many bytes with nothing but padding.
fn padded(number: IpNumber, bytes: usize) -> Extension {
    // Options of one byte.
    (number, vec![0; bytes - 2])
}

/// A routing header with so many hops left.
fn routing(left: u8) -> Extension {
    (ROUTING, vec![4, left, 0, 0, 0, 0])
}

fn with(builder: Builder, extensions: &[Extension]) -> Builder {
    extensions.iter().fold(builder, |builder, (number, data)| {
        builder.extension(*number, data)
    })
}

/// What guests send, and how the world sees it.
fn sessions() -> [(Builder, Builder); 3] {
    let (guest, outside, server) = (at(GUEST, 40_000), at(OUTSIDE, 40_000), at(SERVER, 80));
    [
        (udp(guest, server), udp(outside, server)),
        (tcp(guest, server, "S"), tcp(outside, server, "S")),
        (ping(GUEST, SERVER, 7), ping(OUTSIDE, SERVER, 7)),
    ]
}

/// What comes back from the world, and how the guest sees it.
fn answers() -> [(Builder, Builder); 3] {
    let (guest, outside, server) = (at(GUEST, 40_000), at(OUTSIDE, 40_000), at(SERVER, 80));
    [
        (udp(server, outside), udp(server, guest)),
        (tcp(server, outside, "SA"), tcp(server, guest, "SA")),
        (pong(SERVER, OUTSIDE, 7), pong(SERVER, GUEST, 7)),
    ]
}

/// Checks what becomes of packets with these extension headers, of each protocol and both
/// ways: they go on as they are, or are dropped for this reason.
#[track_caller]
fn check(extensions: &[Extension], dropped: Option<Reason>) {
    for ((out, sent), (back, received)) in sessions().into_iter().zip(answers()) {
        let world = World::<Be128>::new();
        if dropped.is_some() {
            // A session that is there does not help.
            world.guest_sends(TAP, &out.build()).forwarded_any();
        }
        let sizes = world.sizes();
        let ways = [(Some(TAP), out, sent), (None, back, received)];
        for (device, packet, expected) in ways {
            let packet = with(packet, extensions).build();
            let exit = world.run(device, Bytes::raw(&packet));
            if let Some(reason) = dropped {
                assert_eq!(exit.reason, reason, "{extensions:?}");
                assert!(exit.sent.is_none(), "nobody is told");
                assert_eq!(world.sizes(), sizes);
            } else {
                let expected = with(expected, extensions).ttl(63).build();
                assert_eq!(exit.forwarded_any(), expected, "{extensions:?}");
            }
        }
    }
}

#[test]
fn chains_of_extension_headers_have_a_bound() {
    let chain = |number: usize, bytes| vec![padded(DESTINATION, bytes); number];
    for number in 1..=6 {
        check(&chain(number, 8), None);
        check(&chain(number, 24), None);
    }
    // Six of them, and 144 bytes, as many as a sender may have reason for.
    for number in [7, 8, 40] {
        check(&chain(number, 8), Some(Reason::BadExtensionHeaders));
    }
    check(&chain(1, 144), None);
    for number in 1..=6 {
        let just_too_long = [chain(number - 1, 8), chain(1, 152 - (number - 1) * 8)].concat();
        check(&just_too_long, Some(Reason::BadExtensionHeaders));
    }
    check(&chain(1, 1200), Some(Reason::BadExtensionHeaders));
}

/// RFC 8200 section 4.1.
#[test]
fn options_for_each_hop_come_first_or_not_at_all() {
    let hop_by_hop = padded(HOP_BY_HOP, 8);
    check(std::slice::from_ref(&hop_by_hop), None);
    for before in [hop_by_hop.clone(), padded(DESTINATION, 8), routing(0)] {
        let chain = [before, hop_by_hop.clone()];
        check(&chain, Some(Reason::BadExtensionHeaders));
    }
}

/// RFC 5095, RFC 8200 section 4.4: the checksum is another destination's.
#[test]
fn who_was_led_over_all_its_hops_may_pass() {
    check(&[routing(0)], None);
    for left in [1, 2, 255] {
        check(&[routing(left)], Some(Reason::SourceRouted));
        let behind_others = [
            padded(HOP_BY_HOP, 8),
            padded(DESTINATION, 16),
            routing(left),
        ];
        check(&behind_others, Some(Reason::SourceRouted));
    }
}

#[test]
fn what_is_no_extension_header_is_a_protocol() {
    // Authentication, which covers the addresses, mobility, and nothing at all.
    for number in [51, 135, 59, 253] {
        let world = World::<Be128>::new();
        let message = packet::other(ip(GUEST), ip(SERVER), IpNumber(number)).payload(&[0; 24]);
        for extensions in [vec![], vec![padded(DESTINATION, 8)]] {
            let packet = with(message.clone(), &extensions).build();
            let exit = world.guest_sends(TAP, &packet);
            assert_eq!(exit.reason, Reason::ProtocolNotCarried, "{number}");
        }
        assert_eq!(world.sizes()[..4], [0; 4]);
    }
}

#[test]
fn every_cut_of_extension_headers_is_truncated() {
    let world = World::<Be128>::new();
    for (out, _) in sessions() {
        let whole = Be128::with_options(out, MOST_OPTIONS).payload(b"").build();
        let end = whole.len();
        for length in 1..end {
            let mut cut = whole[..length].to_vec();
            let exit = world.guest_sends(TAP, &cut);
            assert_eq!(exit.reason, Reason::Truncated, "{length} of {end} bytes");
            // Also when its length agrees, and when its frame does not end there.
            Be128::set_length(&mut cut, length);
            let exit = world.guest_sends(TAP, &cut);
            assert_eq!(exit.reason, Reason::Truncated, "{length} of {end} bytes");
            if length >= Be128::HEADER {
                cut.extend(&whole[length..]);
                let exit = world.guest_sends(TAP, &cut);
                assert_eq!(exit.reason, Reason::Truncated, "{length} of {end} bytes");
            }
        }
    }
    assert_eq!(world.sizes(), [0; 5]);
}

/// An extension header that says it is longer than it is, hides no other ports.
#[test]
fn an_extension_header_that_ends_in_the_payload_is_its_own() {
    let inner = udp(at(GUEST, 40_001), at(SERVER, 25))
        .payload(&[0; 8])
        .build();
    let outer = |source, payload: &[u8]| {
        udp(source, at(SERVER, 80))
            .payload(payload)
            .extension(DESTINATION, &[0; 6])
    };
    // The datagram in the payload is the one that the chain leads to.
    let mut packet = outer(at(GUEST, 40_000), &inner[40..]).build();
    packet[41] = 1;
    let world = World::<Be128>::new();
    let sent = world.guest_sends(TAP, &packet).forwarded_any();
    assert_eq!(sent[56..60], [0x9c, 0x41, 0, 25], "it is seen by its ports");
    assert_eq!(sent[48..56], packet[48..56], "and the rest is left alone");
}

/// RFC 7112: whoever decides by the ports sees them in the first fragment.
#[test]
fn first_fragments_without_their_transport_header_are_dropped() {
    let extensions = [
        padded(HOP_BY_HOP, 8),
        padded(DESTINATION, 24),
        padded(DESTINATION, 16),
    ];
    for (out, _) in sessions() {
        let packet = with(out, &extensions).payload(&[5; 64]);
        let hidden = packet.fragmentable().len() - 64;
        // What fragments begin with: both headers of 40 bytes, and the transport's.
        for end in (8..hidden).step_by(8) {
            let world = World::<Be128>::new();
            let exit = world.guest_sends(TAP, &packet.fragment(0..end));
            let expected = if end < 40 {
                Reason::Truncated
            } else {
                Reason::FragmentTooShort
            };
            assert_eq!(exit.reason, expected, "{end} of {hidden} bytes");
            // Nor does what follows it get anywhere.
            let exit = world.guest_sends(TAP, &packet.fragment(end..hidden + 64));
            assert_eq!(exit.reason, Reason::FragmentHeld);
            assert_eq!(world.sizes(), [0; 5]);
        }
        let world = World::<Be128>::new();
        let end = hidden.next_multiple_of(8);
        let exit = world.guest_sends(TAP, &packet.fragment(0..end));
        assert_eq!(exit.reason, Reason::SessionStarted);
        let exit = world.guest_sends(TAP, &packet.fragment(end..hidden + 64));
        assert_eq!(exit.reason, Reason::Translated);
    }
}

/// Options for the destination come with the first fragment alone, and the others name
/// them and not the transport (RFC 8200 section 4.5).
#[test]
fn fragments_of_what_begins_with_extension_headers_are_kept() {
    let chains = [
        vec![padded(DESTINATION, 8)],
        vec![padded(HOP_BY_HOP, 8), padded(DESTINATION, 16)],
        vec![padded(DESTINATION, 8), routing(0), padded(DESTINATION, 24)],
    ];
    for chain in &chains {
        let long = |packet: Builder| with(packet.payload(&[7; 3000]), chain).fragments(1280);
        for ((out, sent), (back, received)) in sessions().into_iter().zip(answers()) {
            for order in [[0, 1, 2], [0, 2, 1], [1, 2, 0], [2, 1, 0]] {
                let world = World::<Be128>::new();
                let ways = [(Some(TAP), &out, &sent), (None, &back, &received)];
                for (device, packet, expected) in ways {
                    let fragments = long(packet.clone());
                    let mut arrived: Vec<_> = order
                        .into_iter()
                        .flat_map(|number| world.run(device, Bytes::raw(&fragments[number])).all())
                        .collect();
                    arrived.sort();
                    let mut expected = long(expected.clone().ttl(63));
                    expected.sort();
                    assert_eq!(arrived, expected, "{chain:?}, {order:?}");
                }
            }
        }
    }
}

/// RFC 8021: nobody needs them.
#[test]
fn atomic_fragments_are_dropped() {
    for ((out, _), (back, _)) in sessions().into_iter().zip(answers()) {
        let world = World::<Be128>::new();
        let atomic = |packet: &Builder| packet.fragment(0..packet.fragmentable().len());
        let check = |device, packet: &Builder| {
            let exit = world.run(device, Bytes::raw(&atomic(packet)));
            assert_eq!(exit.reason, Reason::AtomicFragment);
            assert!(exit.sent.is_none());
        };
        check(Some(TAP), &out);
        assert_eq!(world.sizes(), [0; 5]);
        // Nor in a session.
        world.guest_sends(TAP, &out.build()).forwarded_any();
        check(Some(TAP), &out);
        check(None, &back);
        assert!(world.fragments.all().is_empty());
    }
}

#[test]
fn one_fragment_header_is_enough() {
    let datagram = udp(at(GUEST, 40_000), at(SERVER, 53)).payload(&[1; 400]);
    let mut first = datagram.fragment(0..80);
    // Of the second one the first says that it is next; it is one as good as the other.
    let header: Vec<u8> = first[40..48].to_vec();
    first.splice(40..40, header);
    first[40] = protocol::FRAGMENT;
    let length = first.len();
    Be128::set_length(&mut first, length);
    let exit = World::<Be128>::new().guest_sends(TAP, &first);
    assert_eq!(exit.reason, Reason::BadExtensionHeaders);
}

#[test]
fn bits_beside_the_fragment_offset_say_nothing() {
    let world = World::<Be128>::new();
    let datagram = |source| udp(source, at(SERVER, 53)).payload(&[1; 400]);
    let (inside, outside) = (datagram(at(GUEST, 40_000)), datagram(at(OUTSIDE, 40_000)));
    for (bytes, reason) in [
        (0..80, Reason::SessionStarted),
        (80..160, Reason::Translated),
        (160..408, Reason::Translated),
    ] {
        // The reserved byte, and the reserved bits (RFC 8200 section 4.5).
        let reserved = |mut fragment: Vec<u8>| {
            fragment[41] = 0xff;
            fragment[43] |= 0b110;
            fragment
        };
        let exit = world.guest_sends(TAP, &reserved(inside.fragment(bytes.clone())));
        let expected = outside.clone().ttl(63).fragment(bytes);
        assert_eq!(exit.forwarded(reason), reserved(expected));
    }
}

#[test]
fn identifications_have_all_their_bits() {
    // Alike in 16 bits, as IPv4 has.
    let world = World::<Be128>::new();
    for identification in [0x0001_0007, 0x0002_0007, 0x0003_0007] {
        let datagram = udp(at(GUEST, 40_000), at(SERVER, 53))
            .identification(identification)
            .payload(&[1; 400]);
        let exit = world.guest_sends(TAP, &datagram.fragment(0..80));
        assert_eq!(exit.reason.outcome(), Outcome::Forward);
    }
    assert_eq!(world.fragments.len(), 3);
}

/// RFC 8200 section 5: hops do not fragment. The sender is told, whatever it sent.
#[test]
fn what_does_not_fit_is_never_cut() {
    let narrow = || {
        let world = World::<Be128>::new();
        let narrow = route(UPLINK.get(), 1300);
        world.routes.borrow_mut().insert(SERVER, narrow);
        world
    };
    let told = |exit: Exit| {
        let answer = exit.refused(Reason::FragmentationNeeded);
        let parsed = packet::Parsed::new(packet::Link::Ip, &answer).unwrap();
        assert_eq!(parsed.icmp_kind(), Some(Be128::TOO_BIG));
        assert_eq!(parsed.icmp_rest(), Some([0, 0, 0x05, 0x14]));
        assert_eq!(parsed.destination_address(), ip(GUEST));
    };
    for (out, _) in sessions() {
        let world = narrow();
        let header = if matches!(out.build()[6], protocol::TCP) {
            20
        } else {
            8
        };
        let sized = |length: usize| out.clone().payload(&vec![5; length - 40 - header]);
        told(world.guest_sends(TAP, &sized(1301).build()));
        world
            .guest_sends(TAP, &sized(1300).build())
            .forwarded(Reason::SessionStarted);
        told(world.guest_sends(TAP, &sized(1301).build()));
        // Extension headers count.
        told(world.guest_sends(TAP, &Be128::with_options(sized(1300), 1).build()));
    }
    // Nor are segments made shorter that a device is yet to cut.
    let world = narrow();
    let segments = tcp(at(GUEST, 40_000), at(SERVER, 80), "A").payload(&vec![5; 20_000]);
    for (size, fits) in [(1300 - 60, true), (1300 - 60 + 1, false)] {
        let frame = Bytes {
            segment_size: size,
            ..Bytes::offloaded(&segments)
        };
        let exit = world.run(Some(TAP), frame);
        if fits {
            assert_eq!(exit.reason.outcome(), Outcome::Forward);
        } else {
            told(exit);
        }
    }
    // A fragment, too: of the first the sender is told.
    let world = narrow();
    let datagram = udp(at(GUEST, 40_000), at(SERVER, 53)).payload(&[5; 3000]);
    let fragments = datagram.fragments(1400);
    told(world.guest_sends(TAP, &fragments[0]));
    let exit = world.guest_sends(TAP, &fragments[1]);
    assert_eq!(exit.reason, Reason::FragmentOfDropped);
    assert!(exit.sent.is_none());
}

/// RFC 4443 section 2.4 (e).
#[test]
fn nobody_is_told_of_what_was_for_many_or_came_from_nobody() {
    let world = World::<Be128>::new();
    for (from, to) in [
        (GUEST, Be128::MULTICAST),
        (Be128::ZERO, SERVER),
        (Be128::MULTICAST, SERVER),
        (Be128::NEWCOMER, SERVER),
        (GUEST, Be128::NEWCOMER),
    ] {
        for time_to_live in [1, 64] {
            let packet = udp(at(from, 40_000), at(to, 53)).ttl(time_to_live);
            let exit = world.guest_sends(TAP, &packet.build());
            assert!(exit.sent.is_none(), "{from:?} to {to:?}: {:?}", exit.reason);
        }
    }
    assert_eq!(world.sizes(), [0; 5]);
}

/// RFC 4291 section 2.5.6. Between guest and host they serve all the same.
#[test]
fn link_local_addresses_stay_on_their_link() {
    let newcomer = Be128::NEWCOMER;
    let host = Be128::new(0xfe80 << 112 | 1);
    let packets = [
        (udp(at(newcomer, 546), at(SERVER, 53)), Reason::LinkLocal),
        (udp(at(GUEST, 5), at(newcomer, 53)), Reason::LinkLocal),
        (tcp(at(newcomer, 5), at(host, 22), "S"), Reason::LinkLocal),
        (ping(newcomer, host, 1), Reason::LinkLocal),
    ];
    for flags in [0, setting_flags::DENY_HOST] {
        let world = World::<Be128>::new();
        world.set(|settings| settings.flags |= flags);
        for (packet, reason) in &packets {
            let exit = world.guest_sends(TAP, &packet.build());
            let is_denied = exit.reason == Reason::HostDenied;
            assert!(exit.reason == *reason || is_denied, "{:?}", exit.reason);
            assert_eq!(is_denied, flags != 0);
        }
        assert_eq!(world.sizes()[..4], [0; 4]);
    }
    // From the world they reach no guest, though its mapping lets everybody in.
    let world = World::<Be128>::new();
    world.set_filtering(Filtering::EndpointIndependent);
    world.guest_sends(TAP, &udp(at(GUEST, 40_000), at(SERVER, 53)).build());
    let sizes = world.sizes();
    let exit = world.world_sends(&udp(at(newcomer, 53), at(OUTSIDE, 40_000)).build());
    assert_eq!(exit.reason, Reason::SpoofedSource);
    assert_eq!(world.sizes(), sizes);
}

/// A message of neighbour discovery about an address.
fn discovery(from: Be128, icmp_type: u8, about: Be128) -> Builder {
    let body = [&about.bytes()[..], &[2, 1, 2, 0, 0, 0, 9, 7]].concat();
    icmp_error(from, Be128::MULTICAST, (icmp_type, 0), &body).ttl(255)
}

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

/// RFC 6105: whatever a guest says of routes and prefixes, the host does not get to hear.
#[test]
fn guests_are_no_routers() {
    let world = World::<Be128>::new();
    let check = |kind: IcmpKind, expected| {
        for to in [Be128::MULTICAST, HOST, OUTSIDE] {
            let message = icmp_error(Be128::NEWCOMER, to, kind, &[0; 40]).ttl(255);
            let exit = world.guest_sends(TAP, &message.build());
            assert_eq!(exit.reason, expected, "{kind:?} to {to:?}");
            assert!(exit.sent.is_none());
        }
    };
    check((134, 0), Reason::SpoofedRouter);
    check((137, 0), Reason::SpoofedRouter);
    // Asking for routers, and to listen, is everybody's right.
    let exit = world.guest_sends(
        TAP,
        &icmp_error(Be128::NEWCOMER, Be128::MULTICAST, (133, 0), &[]).build(),
    );
    assert_eq!(exit.reason, Reason::NotUnicast);
    // The world's are the host's to judge.
    let message = icmp_error(Be128::ROUTER, Be128::MULTICAST, (134, 0), &[0; 40]).build();
    assert_eq!(world.world_sends(&message).reason, Reason::NoMapping);
}

#[test]
fn guests_do_not_pose_as_their_neighbours() {
    let world = World::<Be128>::new();
    let sends = |device, packet: &Builder, last: u8| {
        let packet = packet.clone();
        let frame = packet.ethernet([2, 0, 0, 0, 9, last], [0x33, 0x33, 0, 0, 0, 1]);
        world
            .run(Some(device), Bytes::ethernet(&frame.build()))
            .reason
    };
    // The host's address is nobody's else, and a guest's is its own while it has sessions.
    let claims = |address, last| {
        [
            discovery(address, SOLICITATION, SERVER),
            discovery(Be128::NEWCOMER, ADVERTISEMENT, address),
        ]
        .map(|message| sends(TAP, &message, last))
    };
    assert_eq!(claims(HOST, 7), [Reason::SpoofedNeighbour; 2]);
    assert_eq!(claims(NEIGHBOUR, 8), [Reason::NotUnicast; 2]);
    let out = udp(at(NEIGHBOUR, 40_000), at(SERVER, 53));
    assert_eq!(sends(TAP, &out, 7), Reason::SessionStarted);
    assert_eq!(claims(NEIGHBOUR, 8), [Reason::SpoofedNeighbour; 2]);
    assert_eq!(claims(NEIGHBOUR, 7), [Reason::NotUnicast; 2]);
    world.set(|settings| settings.flags |= setting_flags::ROAMING);
    assert_eq!(claims(NEIGHBOUR, 8), [Reason::NotUnicast; 2]);
    assert_eq!(claims(HOST, 8), [Reason::SpoofedNeighbour; 2]);
    // Whoever has no address yet asks whether somebody has the one that it wants (RFC 4862
    // section 5.4), whosever that is.
    for wanted in [HOST, NEIGHBOUR, GUEST] {
        let probe = discovery(Be128::ZERO, SOLICITATION, wanted);
        assert_eq!(sends(SECOND_TAP, &probe, 8), Reason::NotUnicast);
    }
}
