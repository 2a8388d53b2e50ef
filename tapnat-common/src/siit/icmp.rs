//! The tables of RFC 7915: types, codes, pointers and MTUs of ICMP messages.

use super::{LEAST_IPV6_MTU, Mtus};
use crate::{
    frame::lengths,
    net::{icmp, icmpv6},
};

/// So many bytes is IPv6's header longer than IPv4's.
const DIFFERENCE: u32 = 20;

/// The least MTU that there is in IPv4 (RFC 791 section 3.2).
const LEAST_IPV4_MTU: u32 = 68;

/// The MTU that is likely where a packet of this length did not pass: the next lower one
/// that is common (RFC 1191 section 7), if IPv6 allows it.
#[inline(always)]
const fn plateau_below(length: u32) -> u32 {
    match length {
        0..=1492 => 0,
        1493..=2002 => 1492,
        2003..=4352 => 2002,
        4353..=8166 => 4352,
        8167..=17_914 => 8166,
        17_915..=32_000 => 17_914,
        32_001..=65_535 => 32_000,
        65_536.. => 65_535,
    }
}

/// The pointer in IPv6 for one in IPv4 (RFC 7915 figure 3).
#[inline(always)]
const fn pointer_to_ipv6(pointer: u8) -> Option<u8> {
    Some(match pointer {
        // Version, length; type of service.
        0 | 1 => pointer,
        // Total length.
        2 | 3 => 4,
        // Time to live, protocol.
        8 => 7,
        9 => 6,
        // Addresses.
        12..=15 => 8,
        16..=19 => 24,
        // Identification, flags, fragment offset, checksum; options.
        4..=7 | 10 | 11 | 20.. => return None,
    })
}

/// The pointer in IPv4 for one in IPv6 (RFC 7915 figure 6).
#[inline(always)]
const fn pointer_to_ipv4(pointer: u32) -> Option<u8> {
    Some(match pointer {
        // Version, traffic class.
        0 => 0,
        1 => 1,
        // Payload length.
        4 | 5 => 2,
        // Next header, hop limit.
        6 => 9,
        7 => 8,
        // Addresses.
        8..=23 => 12,
        24..=39 => 16,
        // Flow label; extension headers.
        2 | 3 | 40.. => return None,
    })
}

#[inline(always)]
pub(super) const fn echo_to_ipv6(icmp_type: u8) -> Option<u8> {
    match icmp_type {
        icmp::ECHO_REQUEST => Some(icmpv6::ECHO_REQUEST),
        icmp::ECHO_REPLY => Some(icmpv6::ECHO_REPLY),
        1..=u8::MAX => None,
    }
}

#[inline(always)]
pub(super) const fn echo_to_ipv4(icmp_type: u8) -> Option<u8> {
    match icmp_type {
        icmpv6::ECHO_REQUEST => Some(icmp::ECHO_REQUEST),
        icmpv6::ECHO_REPLY => Some(icmp::ECHO_REPLY),
        0..=u8::MAX => None,
    }
}

/// RFC 7915 section 4.2. `quoted` is the length that the quoted packet had, in bytes.
#[inline(always)]
pub(super) fn error_to_ipv6(
    kind: (u8, u8),
    rest: u32,
    quoted: u32,
    mtus: Mtus,
) -> Option<((u8, u8), u32)> {
    const NEXT_HEADER: u32 = 6;
    let [pointer, _, mtu @ ..] = rest.to_be_bytes();
    let unreachable = |code| ((icmpv6::DESTINATION_UNREACHABLE, code), 0);
    Some(match kind {
        (icmp::DESTINATION_UNREACHABLE, code) => match code {
            // Net, host; source route failed; unknown, isolated, for this type of service.
            0 | 1 | 5..=8 | 11 | 12 => unreachable(0),
            // Administratively prohibited, precedence too low.
            9 | 10 | 13 | 15 => unreachable(1),
            // Port.
            3 => unreachable(4),
            // Protocol: a next header that is not known.
            2 => ((icmpv6::PARAMETER_PROBLEM, 1), NEXT_HEADER),
            icmp::FRAGMENTATION_NEEDED => {
                let mtu = mtu_to_ipv6(u16::from_be_bytes(mtu), quoted, mtus);
                ((icmpv6::PACKET_TOO_BIG, 0), mtu)
            }
            14 | 16.. => return None,
        },
        (icmp::TIME_EXCEEDED, code) => ((icmpv6::TIME_EXCEEDED, code), 0),
        // Not: a required option is missing.
        (icmp::PARAMETER_PROBLEM, 0 | 2) => {
            let pointer = pointer_to_ipv6(pointer)?;
            ((icmpv6::PARAMETER_PROBLEM, 0), u32::from(pointer))
        }
        (0..=u8::MAX, _) => return None,
    })
}

#[inline(always)]
fn mtu_to_ipv6(mtu: u16, quoted: u32, mtus: Mtus) -> u32 {
    let mtu = if mtu == 0 {
        // From a router that does not know RFC 1191.
        plateau_below(quoted)
    } else {
        u32::from(mtu)
    };
    (mtu + DIFFERENCE)
        .min(mtus.ipv6.into())
        .min(u32::from(mtus.ipv4) + DIFFERENCE)
        .max(LEAST_IPV6_MTU.into())
}

/// RFC 7915 section 5.2. `is_fragment`: the quoted packet has a fragment header, which
/// IPv4 does without.
#[inline(always)]
pub(super) fn error_to_ipv4(
    kind: (u8, u8),
    rest: u32,
    is_fragment: bool,
    mtus: Mtus,
) -> Option<((u8, u8), u32)> {
    const HOST: u8 = 1;
    const PROTOCOL: u8 = 2;
    const PORT: u8 = 3;
    const HOST_PROHIBITED: u8 = 10;
    let unreachable = |code| ((icmp::DESTINATION_UNREACHABLE, code), 0);
    Some(match kind {
        (icmpv6::DESTINATION_UNREACHABLE, code) => match code {
            // No route; beyond the source's scope; address.
            0 | 2 | 3 => unreachable(HOST),
            icmpv6::ADMINISTRATIVELY_PROHIBITED => unreachable(HOST_PROHIBITED),
            4 => unreachable(PORT),
            5.. => return None,
        },
        (icmpv6::PACKET_TOO_BIG, _) => {
            let (kind, _) = unreachable(icmp::FRAGMENTATION_NEEDED);
            (kind, mtu_to_ipv4(rest, is_fragment, mtus))
        }
        (icmpv6::TIME_EXCEEDED, code) => ((icmp::TIME_EXCEEDED, code), 0),
        (icmpv6::PARAMETER_PROBLEM, 0) => {
            let pointer = pointer_to_ipv4(rest)?;
            ((icmp::PARAMETER_PROBLEM, 0), u32::from(pointer) << 24)
        }
        (icmpv6::PARAMETER_PROBLEM, 1) => unreachable(PROTOCOL),
        (0..=u8::MAX, _) => return None,
    })
}

#[inline(always)]
fn mtu_to_ipv4(mtu: u32, is_fragment: bool, mtus: Mtus) -> u32 {
    let headers = if is_fragment {
        DIFFERENCE + lengths::IPV6_FRAGMENT
    } else {
        DIFFERENCE
    };
    mtu.saturating_sub(headers)
        .min(mtus.ipv4.into())
        .min(u32::from(mtus.ipv6).saturating_sub(DIFFERENCE))
        .max(LEAST_IPV4_MTU)
}
