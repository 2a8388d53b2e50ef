//! IPv6's header and its extensions (RFC 8200), and ICMPv6's types (RFC 4443).

use network_types::ip::Ipv6Hdr;

use super::{Network, add, pseudo_header};
use crate::{
    checksum::{self, Delta},
    frame::{Frame, lengths},
    nat::neighbours::Claim,
    net::{Address as _, Be16, Be32, Be128, icmpv6, protocol},
    parse::{Packet, Part, Quoted, Transport},
    verdict::{Complaint, Reason},
};

const _: () = assert!(size_of::<Ipv6Hdr>() == lengths::IPV6 as usize);

/// At most so many extension headers are walked: each kind may be there once, and
/// destination options twice (RFC 8200 section 4.1).
const MOST_EXTENSIONS: u32 = 6;

/// At most so many bytes of headers come before the transport's.
const LONGEST: u32 = 40 + 144;

/// Offsets in the header.
const LENGTH: u32 = 4;

/// Offset of the address in a neighbour advertisement.
const TARGET: u32 = 8;

/// Offset of the identification in a fragment header.
const IDENTIFICATION: u32 = 4;

const MORE_FRAGMENTS: u16 = 1;

/// The hop limit of packets that we make (RFC 1700).
const OUR_HOP_LIMIT: u8 = 64;

/// With an ICMPv6 header.
const ERROR_HEADER: u32 = lengths::IPV6 + 8;

/// A chain of extension headers, as far as it was walked.
pub(crate) struct Chain {
    /// What comes next.
    pub next: u8,
    /// Bytes so far, with the first header's.
    pub length: u32,
    /// A fragment header's, where there is one.
    pub fragment: Option<Fragment>,
}

pub(crate) struct Fragment {
    /// In units of 8 bytes.
    pub offset: u16,
    pub more: bool,
    pub identification: Be32,
    /// Bytes up to its end.
    pub end: u32,
}

/// Walks the extension headers with `read`, which reads eight bytes at an offset from
/// the IP header. What may be anything is passed by; what is about the way itself must
/// have been followed.
///
/// # Errors
/// The exit of a packet that we cannot or must not translate.
#[inline(always)]
pub(crate) fn walk(first: u8, read: impl Fn(u32) -> Option<[u8; 8]>) -> Result<Chain, Reason> {
    let mut chain = Chain {
        next: first,
        length: lengths::IPV6,
        fragment: None,
    };
    for number in 0..=MOST_EXTENSIONS {
        let at = chain.length;
        match chain.next {
            // First of all, or not at all (RFC 8200 section 4.1).
            protocol::HOP_BY_HOP if number != 0 => return Err(Reason::BadExtensionHeaders),
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {
                let [next, units, _, left, ..] = read(at).ok_or(Reason::Truncated)?;
                // Whoever comes last is not who the checksum says, and none that we
                // know (RFC 8200 sections 4.4 and 8.1, RFC 5095).
                if chain.next == protocol::ROUTING && left != 0 {
                    return Err(Reason::SourceRouted);
                }
                chain.next = next;
                chain.length = at + (u32::from(units) + 1) * 8;
            }
            protocol::FRAGMENT => {
                if chain.fragment.is_some() {
                    return Err(Reason::BadExtensionHeaders);
                }
                let [next, _, high, low, identification @ ..] =
                    read(at).ok_or(Reason::Truncated)?;
                let field = Be16::from_bytes([high, low]).get();
                let fragment = Fragment {
                    offset: field >> 3,
                    more: field & MORE_FRAGMENTS != 0,
                    identification: Be32::from_bytes(identification),
                    end: at + lengths::IPV6_FRAGMENT,
                };
                chain.next = next;
                chain.length = fragment.end;
                let is_later = fragment.offset != 0;
                chain.fragment = Some(fragment);
                if is_later {
                    return Ok(chain);
                }
            }
            _ => return Ok(chain),
        }
        if chain.length > LONGEST {
            break;
        }
    }
    Err(Reason::BadExtensionHeaders)
}

/// The protocol behind the extension headers of a packet, and the offset of its header from the IP
/// header unless that is in an earlier fragment. `None` where they cannot be followed.
#[inline(always)]
pub(crate) fn behind_extensions(
    first: u8,
    read: impl Fn(u32) -> Option<[u8; 8]>,
) -> Option<(u8, Option<u32>)> {
    let chain = walk(first, read).ok()?;
    let is_later = chain.fragment.is_some_and(|fragment| fragment.offset != 0);
    Some((chain.next, (!is_later).then_some(chain.length)))
}

impl Network for Be128 {
    const ETHERTYPE: [u8; 2] = [0x86, 0xdd];
    const VERSION: u8 = 6;
    const ICMP: u8 = protocol::ICMPV6;
    const HAS_HEADER_CHECKSUM: bool = false;
    const FRAGMENTS_NAME_TRANSPORT: bool = false;
    const SOURCE: u32 = 8;
    const DESTINATION: u32 = 24;
    const ALL_HEADERS: u32 = 14 + LONGEST + 8 + 40 + 20;
    const LONGEST_HEADER: u32 = LONGEST;
    const DHCP_SERVER: u16 = 547;

    type ErrorHeader = [Be32; ERROR_HEADER as usize / 4];

    #[inline(always)]
    fn read<F: Frame>(
        frame: &F,
        network_offset: u32,
        packet: &mut Packet<Self>,
    ) -> Result<(), Reason> {
        let Some(header) = frame.load::<Ipv6Hdr>(network_offset) else {
            return Err(Reason::Truncated);
        };
        if header.vcf[0] >> 4 != Self::VERSION {
            return Err(Reason::BadHeader);
        }
        packet.source = Self::from_bytes(header.src_addr);
        packet.destination = Self::from_bytes(header.dst_addr);
        packet.time_to_live = header.hop_limit;
        // Routers do not fragment (RFC 8200 section 5).
        packet.dont_fragment = true;
        packet.network_offset = network_offset;
        let carried = frame.length().wrapping_sub(network_offset);
        let mut length = lengths::IPV6 + u32::from(Be16::from_bytes(header.payload_len).get());
        if length == lengths::IPV6 && frame.segment_size() != 0 {
            // "BIG TCP": longer than the field can say.
            length = carried;
        }
        let chain = walk(header.next_hdr, |at| frame.load(network_offset + at))?;
        if length < chain.length || length > carried {
            return Err(Reason::Truncated);
        }
        packet.protocol = chain.next;
        packet.transport = Self::transport_of(chain.next);
        packet.header_length = chain.length;
        packet.unfragmentable_length = lengths::IPV6;
        packet.length = length;
        packet.wire_length = length;
        if let Some(fragment) = chain.fragment {
            // Whole, and yet a fragment: nothing that anybody has to send (RFC 8021).
            if fragment.offset == 0 && !fragment.more {
                return Err(Reason::AtomicFragment);
            }
            packet.part = if fragment.offset == 0 {
                Part::First
            } else {
                Part::Later
            };
            packet.identification = fragment.identification;
            packet.fragment_offset = fragment.offset;
            packet.more_fragments = fragment.more;
            packet.unfragmentable_length = fragment.end;
        }
        Ok(())
    }

    #[inline(always)]
    fn read_plain<F: Frame>(frame: &F, network_offset: u32, packet: &mut Packet<Self>) -> bool {
        let Some(header) = frame.load::<Ipv6Hdr>(network_offset) else {
            return false;
        };
        let length = lengths::IPV6 + u32::from(Be16::from_bytes(header.payload_len).get());
        if header.vcf[0] >> 4 != Self::VERSION || length > frame.length() - network_offset {
            return false;
        }
        packet.source = Self::from_bytes(header.src_addr);
        packet.destination = Self::from_bytes(header.dst_addr);
        packet.protocol = header.next_hdr;
        packet.time_to_live = header.hop_limit;
        packet.network_offset = network_offset;
        packet.header_length = lengths::IPV6;
        packet.length = length;
        packet.wire_length = length;
        packet.transport = match header.next_hdr {
            protocol::TCP => Transport::Tcp,
            protocol::UDP => Transport::Udp,
            0..=u8::MAX => return false,
        };
        true
    }

    #[inline(always)]
    fn read_rest<F: Frame>(_frame: &F, packet: &mut Packet<Self>) {
        packet.unfragmentable_length = packet.header_length;
        packet.dont_fragment = true;
    }

    #[inline(always)]
    fn read_quoted<F: Frame>(
        frame: &F,
        offset: u32,
        quoted: &mut Quoted<Self>,
    ) -> Result<u32, Reason> {
        let unusable = Reason::ErrorUnusable;
        let read = |at| frame.read::<[u8; 8]>(offset + at);
        let [first, _, _, _, _, _, next, _] = read(0).ok_or(unusable)?;
        if first >> 4 != Self::VERSION {
            return Err(unusable);
        }
        let Ok(chain) = walk(next, read) else {
            return Err(unusable);
        };
        if chain.fragment.is_some_and(|fragment| fragment.offset != 0) {
            return Err(unusable);
        }
        quoted.source = frame.read(offset + Self::SOURCE).ok_or(unusable)?;
        quoted.destination = frame.read(offset + Self::DESTINATION).ok_or(unusable)?;
        quoted.protocol = chain.next;
        Ok(chain.length)
    }

    #[inline(always)]
    fn icmp_kind(icmp_type: u8) -> Transport {
        match icmp_type {
            icmpv6::ECHO_REQUEST => Transport::IcmpQuery,
            icmpv6::ECHO_REPLY => Transport::IcmpReply,
            icmpv6::DESTINATION_UNREACHABLE
            | icmpv6::PACKET_TOO_BIG
            | icmpv6::TIME_EXCEEDED
            | icmpv6::PARAMETER_PROBLEM => Transport::IcmpError,
            0..=u8::MAX => Transport::IcmpOther,
        }
    }

    /// Multicast listeners (RFC 2710, RFC 3810) and neighbours (RFC 4861).
    #[inline(always)]
    fn is_link_upkeep(icmp_type: u8) -> bool {
        matches!(
            icmp_type,
            icmpv6::MULTICAST_LISTENER_QUERY..=icmpv6::MULTICAST_LISTENER_DONE
                | icmpv6::MULTICAST_LISTENER_REPORT
                | icmpv6::ROUTER_SOLICITATION..=icmpv6::REDIRECT
        )
    }

    /// An advertisement has its sender's address in it (RFC 4861 section 4.4); whoever
    /// solicits has it as its source, unless it has none yet.
    #[inline(always)]
    fn claim<F: Frame>(frame: &F, packet: &Packet<Self>) -> Claim<Self> {
        match packet.icmp_type {
            icmpv6::ROUTER_ADVERTISEMENT | icmpv6::REDIRECT => Claim::Router,
            icmpv6::NEIGHBOUR_ADVERTISEMENT => frame
                .load(packet.transport_offset() + TARGET)
                .map_or(Claim::Nothing, Claim::Address),
            icmpv6::ROUTER_SOLICITATION | icmpv6::NEIGHBOUR_SOLICITATION
                if packet.source != Self::UNSPECIFIED =>
            {
                Claim::Address(packet.source)
            }
            0..=u8::MAX => Claim::Nothing,
        }
    }

    /// RFC 4443.
    #[inline(always)]
    fn icmp_error(complaint: Complaint) -> (u8, u8) {
        match complaint {
            Complaint::TimeExceeded => (icmpv6::TIME_EXCEEDED, 0),
            Complaint::TooBig => (icmpv6::PACKET_TOO_BIG, 0),
            Complaint::Prohibited => (
                icmpv6::DESTINATION_UNREACHABLE,
                icmpv6::ADMINISTRATIVELY_PROHIBITED,
            ),
        }
    }

    #[inline(always)]
    fn store<F: Frame>(
        frame: &mut F,
        network_offset: u32,
        (source, destination): (Self, Self),
        _delta: Delta,
        time_to_live: u8,
    ) -> Option<()> {
        let offset = network_offset + LENGTH;
        let [length_high, length_low, next, _] = frame.load::<[u8; 4]>(offset)?;
        let first = Be32::from_bytes([length_high, length_low, next, time_to_live]);
        let (from, to) = (source.words(), destination.words());
        let words = [
            first, from[0], from[1], from[2], from[3], to[0], to[1], to[2], to[3],
        ];
        frame.store(offset, &words)
    }

    #[inline(always)]
    fn write_quoted<F: Frame>(
        frame: &mut F,
        offset: u32,
        (source, destination): (Self, Self),
        delta: Delta,
    ) -> Option<Delta> {
        frame.write(offset + Self::SOURCE, &[source, destination])?;
        Some(delta)
    }

    #[inline(always)]
    fn renumber<F: Frame>(
        frame: &mut F,
        packet: &Packet<Self>,
        identification: Be32,
    ) -> Option<()> {
        let end = packet.network_offset + packet.unfragmentable_length;
        frame.store(
            end - lengths::IPV6_FRAGMENT + IDENTIFICATION,
            &identification,
        )
    }

    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "what is longer has GSO, and no such field"
    )]
    fn error_header(
        (icmp_type, code): (u8, u8),
        rest: Be32,
        (from, to): (Self, Self),
        quoted: u32,
        length: u32,
    ) -> Self::ErrorHeader {
        let length = length + ERROR_HEADER - lengths::IPV6;
        let sum = quoted + rest.sum() + pseudo_header(from, to, protocol::ICMPV6, length);
        let [icmp_high, icmp_low] = checksum::finish(add(sum, [icmp_type, code])).bytes();
        let [length_high, length_low] = Be16::new(length as u16).bytes();
        let [from_a, from_b, from_c, from_d] = from.words();
        let [to_a, to_b, to_c, to_d] = to.words();
        [
            Be32::from_bytes([Self::VERSION << 4, 0, 0, 0]),
            Be32::from_bytes([length_high, length_low, protocol::ICMPV6, OUR_HOP_LIMIT]),
            from_a,
            from_b,
            from_c,
            from_d,
            to_a,
            to_b,
            to_c,
            to_d,
            Be32::from_bytes([icmp_type, code, icmp_high, icmp_low]),
            rest,
        ]
    }
}
