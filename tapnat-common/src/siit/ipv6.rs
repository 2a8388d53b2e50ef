//! What IPv6 has to say and to be told (RFC 8200, RFC 4443).

use super::{Header, LEAST_IPV6_MTU, Mtus, Untranslatable, Version, error::Quote, icmp};
use crate::{
    frame::{Frame, lengths},
    net::{Address as _, Be32, Be128, icmpv6, protocol},
    network::ipv6::walk,
    parse::{Packet, Part},
};

const VERSION: u32 = 6;
const MORE_FRAGMENTS: u32 = 1;

impl Version for Be128 {
    type Other = Be32;

    const HEADER: u32 = lengths::IPV6;
    /// RFC 4443 section 2.4.
    const LONGEST_ERROR: u32 = LEAST_IPV6_MTU as u32;
    const QUOTE_UNIT: u32 = 8;

    /// Other extension headers mean nothing to IPv4 and are left out (RFC 7915 section
    /// 5.1).
    #[inline(always)]
    fn check<F: Frame>(_frame: &F, packet: &Packet<Self>) -> Result<(), Untranslatable> {
        // RFC 7915 section 5.1.1: not what an encapsulating security payload has inside.
        let is_header =
            is_extension(packet.protocol) || packet.protocol == protocol::AUTHENTICATION;
        let has_header = match packet.part {
            Part::Whole => false,
            Part::First => is_header || packet.header_length != packet.unfragmentable_length,
            Part::Later => is_header,
        };
        if has_header {
            Err(Untranslatable::HeaderInFragments)
        } else {
            Ok(())
        }
    }

    #[inline(always)]
    fn traffic_class<F: Frame>(frame: &F, network_offset: u32) -> Option<u8> {
        let [high, low] = frame.read::<[u8; 2]>(network_offset)?;
        Some(high << 4 | low >> 4)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "taken apart")]
    fn read_quote<F: Frame>(frame: &F, offset: u32) -> Result<Quote<Self>, Untranslatable> {
        let unusable = Untranslatable::ErrorUnusable;
        let [first, second] = frame.read::<[Be32; 2]>(offset).ok_or(unusable)?;
        let [source, destination] = frame.read::<[Self; 2]>(offset + 8).ok_or(unusable)?;
        if first.get() >> 28 != VERSION {
            return Err(unusable);
        }
        let next = (second.get() >> 8) as u8;
        let Ok(chain) = walk(next, |at| frame.read::<[u8; 8]>(offset + at)) else {
            return Err(unusable);
        };
        let mut header = Header {
            traffic_class: (first.get() >> 20) as u8,
            hop_limit: second.get() as u8,
            protocol: chain.next,
            is_fragment: false,
            more_fragments: false,
            fragment_offset: 0,
            // Nobody remembers what it was.
            identification: Be32::ZERO,
            payload_length: (lengths::IPV6 + (second.get() >> 16)).saturating_sub(chain.length),
        };
        if let Some(fragment) = &chain.fragment {
            if fragment.offset != 0 {
                return Err(unusable);
            }
            header.is_fragment = true;
            header.more_fragments = fragment.more;
            header.identification = fragment.identification;
        }
        Ok(Quote {
            source,
            destination,
            offset,
            length: chain.length,
            header,
        })
    }

    #[inline(always)]
    fn header_length(header: &Header) -> u32 {
        if header.is_fragment {
            lengths::IPV6 + lengths::IPV6_FRAGMENT
        } else {
            lengths::IPV6
        }
    }

    #[inline(always)]
    fn header_sum(header: &Header, (source, destination): (Self, Self)) -> u32 {
        let [first, second] = beginning(header);
        let fragment = if header.is_fragment {
            let [first, second] = fragment_header(header);
            first.sum() + second.sum()
        } else {
            0
        };
        first.sum() + second.sum() + source.sum() + destination.sum() + fragment
    }

    #[inline(always)]
    fn is_too_long(header: &Header) -> bool {
        payload_length(header) > 0xffff
    }

    #[inline(always)]
    fn write<F: Frame>(
        frame: &mut F,
        offset: u32,
        header: &Header,
        (source, destination): (Self, Self),
    ) -> Option<()> {
        let [first, second] = beginning(header);
        let [s0, s1, s2, s3] = source.words();
        let [d0, d1, d2, d3] = destination.words();
        let words = [first, second, s0, s1, s2, s3, d0, d1, d2, d3];
        frame.overwrite(offset, &words)?;
        if header.is_fragment {
            frame.overwrite(offset + lengths::IPV6, &fragment_header(header))?;
        }
        Some(())
    }

    #[inline(always)]
    fn translate_echo(icmp_type: u8) -> Option<u8> {
        icmp::echo_to_ipv4(icmp_type)
    }

    #[inline(always)]
    fn translate_error(
        kind: (u8, u8),
        rest: u32,
        quote: &Quote<Self>,
        mtus: Mtus,
    ) -> Option<((u8, u8), u32)> {
        icmp::error_to_ipv4(kind, rest, quote.header.is_fragment, mtus)
    }

    #[inline(always)]
    fn quote_length_shift(icmp_type: u8) -> Option<u32> {
        match icmp_type {
            icmpv6::DESTINATION_UNREACHABLE | icmpv6::TIME_EXCEEDED => Some(24),
            0..=u8::MAX => None,
        }
    }
}

/// What the header's length field says.
#[inline(always)]
fn payload_length(header: &Header) -> u32 {
    header.payload_length + Be128::header_length(header) - lengths::IPV6
}

/// The first eight bytes. Without a flow label (RFC 7915 section 4.1).
#[inline(always)]
fn beginning(header: &Header) -> [Be32; 2] {
    let next = if header.is_fragment {
        protocol::FRAGMENT
    } else {
        header.protocol
    };
    let first = VERSION << 28 | u32::from(header.traffic_class) << 20;
    let second = payload_length(header) << 16 | u32::from(next) << 8 | u32::from(header.hop_limit);
    [Be32::new(first), Be32::new(second)]
}

/// RFC 7915 section 4.1.
#[inline(always)]
fn fragment_header(header: &Header) -> [Be32; 2] {
    let more = if header.more_fragments {
        MORE_FRAGMENTS
    } else {
        0
    };
    let first = u32::from(header.protocol) << 24 | u32::from(header.fragment_offset) << 3 | more;
    [Be32::new(first), header.identification]
}

/// Whether this is an extension header that is not a protocol of IPv4's, too.
#[inline(always)]
pub(super) const fn is_extension(number: u8) -> bool {
    matches!(
        number,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::DESTINATION_OPTIONS
    )
}
