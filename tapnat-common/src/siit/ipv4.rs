//! What IPv4 has to say and to be told (RFC 791, RFC 792).

use super::{Header, Mtus, Untranslatable, Version, error::Quote, icmp};
use crate::{
    checksum,
    frame::{Frame, lengths},
    net::{Be32, Be128, icmp as types},
    parse::Packet,
};

const VERSION_AND_LENGTH: u32 = 0x45;
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Longer packets must not be fragmented on their way: their sender may count on being
/// told of the path's MTU (RFC 7915 section 5.1).
const LONGEST_FRAGMENTABLE: u32 = 1260;

/// Source route options (RFC 791 section 3.1).
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
/// Bytes of all options.
const MOST_OPTIONS: u32 = 40;

impl Version for Be32 {
    type Other = Be128;

    const HEADER: u32 = lengths::IPV4;
    /// Any: IPv4 has no least MTU to speak of, and its errors may be fragmented.
    const LONGEST_ERROR: u32 = 65_535;
    const QUOTE_UNIT: u32 = 4;

    #[inline(always)]
    fn check<F: Frame>(frame: &F, packet: &Packet<Self>) -> Result<(), Untranslatable> {
        if packet.header_length > lengths::IPV4 && has_source_route(frame, packet) {
            return Err(Untranslatable::SourceRoute);
        }
        Ok(())
    }

    #[inline(always)]
    fn traffic_class<F: Frame>(frame: &F, network_offset: u32) -> Option<u8> {
        let [_, type_of_service] = frame.read::<[u8; 2]>(network_offset)?;
        Some(type_of_service)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "taken apart")]
    fn read_quote<F: Frame>(frame: &F, offset: u32) -> Result<Quote<Self>, Untranslatable> {
        let unusable = Untranslatable::ErrorUnusable;
        let words = frame.read::<[Self; 5]>(offset).ok_or(unusable)?;
        let [first, second, third, source, destination] = words;
        let length = (first.get() >> 24 & 0xf) * 4;
        let fragment = second.get() as u16;
        if first.get() >> 28 != 4 || length < lengths::IPV4 || fragment & FRAGMENT_OFFSET != 0 {
            return Err(unusable);
        }
        let more_fragments = fragment & MORE_FRAGMENTS != 0;
        Ok(Quote {
            source,
            destination,
            offset,
            length,
            header: Header {
                traffic_class: (first.get() >> 16) as u8,
                hop_limit: (third.get() >> 24) as u8,
                protocol: (third.get() >> 16) as u8,
                is_fragment: more_fragments,
                more_fragments,
                fragment_offset: 0,
                identification: Self::new(second.get() >> 16),
                payload_length: (first.get() & 0xffff).saturating_sub(length),
            },
        })
    }

    #[inline(always)]
    fn header_length(_header: &Header) -> u32 {
        lengths::IPV4
    }

    /// With a checksum that is right: 0xffff, which is as good as nothing.
    #[inline(always)]
    fn header_sum(_header: &Header, _ends: (Self, Self)) -> u32 {
        0
    }

    #[inline(always)]
    fn is_too_long(header: &Header) -> bool {
        lengths::IPV4 + header.payload_length > 0xffff
    }

    #[inline(always)]
    fn write<F: Frame>(
        frame: &mut F,
        offset: u32,
        header: &Header,
        (source, destination): (Self, Self),
    ) -> Option<()> {
        let length = lengths::IPV4 + header.payload_length;
        // RFC 7915 sections 5.1 and 5.1.1.
        let fragment = if header.is_fragment {
            let more = if header.more_fragments {
                MORE_FRAGMENTS
            } else {
                0
            };
            header.fragment_offset | more
        } else if length > LONGEST_FRAGMENTABLE {
            DONT_FRAGMENT
        } else {
            0
        };
        let first = VERSION_AND_LENGTH << 24 | u32::from(header.traffic_class) << 16 | length;
        let second = header.identification.get() << 16 | u32::from(fragment);
        let third = u32::from(header.hop_limit) << 24 | u32::from(header.protocol) << 16;
        let [first, second, unsummed] = [first, second, third].map(Self::new);
        let sum = first.sum() + second.sum() + unsummed.sum() + source.sum() + destination.sum();
        let third = Self::new(third | u32::from(checksum::finish(sum).get()));
        frame.overwrite(offset, &[first, second, third, source, destination])
    }

    #[inline(always)]
    fn translate_echo(icmp_type: u8) -> Option<u8> {
        icmp::echo_to_ipv6(icmp_type)
    }

    #[inline(always)]
    fn translate_error(
        kind: (u8, u8),
        rest: u32,
        quote: &Quote<Self>,
        mtus: Mtus,
    ) -> Option<((u8, u8), u32)> {
        icmp::error_to_ipv6(kind, rest, quote.length + quote.header.payload_length, mtus)
    }

    #[inline(always)]
    fn quote_length_shift(icmp_type: u8) -> Option<u32> {
        match icmp_type {
            types::DESTINATION_UNREACHABLE | types::TIME_EXCEEDED | types::PARAMETER_PROBLEM => {
                Some(16)
            }
            0..=u8::MAX => None,
        }
    }
}

/// Whether an option says how the packet is to travel on (RFC 7915 section 4.1). Options
/// that make no sense say nothing.
#[inline(always)]
fn has_source_route<F: Frame>(frame: &F, packet: &Packet<Be32>) -> bool {
    let mut offset = packet.network_offset + lengths::IPV4;
    let end = packet.network_offset + packet.header_length;
    for _ in 0..MOST_OPTIONS {
        if offset + 3 > end {
            break;
        }
        let Some([kind, length, pointer]) = read_option(frame, offset) else {
            break;
        };
        if matches!(kind, LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE) {
            // What it points at lies behind it when all of it is used up.
            return pointer <= length;
        }
        offset += if kind == NO_OPERATION {
            1
        } else if kind == END || length < 2 {
            break;
        } else {
            u32::from(length)
        };
    }
    false
}

#[inline(always)]
fn read_option<F: Frame>(frame: &F, offset: u32) -> Option<[u8; 3]> {
    let [kind] = frame.read::<[u8; 1]>(offset)?;
    let [length, pointer] = frame.read::<[u8; 2]>(offset + 1)?;
    Some([kind, length, pointer])
}
