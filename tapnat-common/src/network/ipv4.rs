//! IPv4's header (RFC 791) and ICMP's types (RFC 792).

use network_types::ip::Ipv4Hdr;

use super::{Network, add};
use crate::{
    checksum::{self, Delta},
    frame::{Frame, lengths},
    nat::neighbours::Claim,
    net::{Be16, Be32, icmp, protocol},
    parse::{Packet, Part, Quoted, Transport, verify_sum},
    verdict::{Complaint, Reason},
};

const _: () = assert!(size_of::<Ipv4Hdr>() == lengths::IPV4 as usize);

const MORE_FRAGMENTS: u16 = 0x2000;
const DONT_FRAGMENT: u16 = 0x4000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Offsets in the header.
const IDENTIFICATION: u32 = 4;
/// Protocol, checksum and the two addresses follow it.
const TIME_TO_LIVE: u32 = 8;
const CHECKSUM: u32 = 10;

/// Precedence 6 of what used to be the type of service (RFC 1812 section 4.3.2.5).
const INTERNETWORK_CONTROL: u8 = 0xc0;

/// The time to live of packets that we make (RFC 1700).
const OUR_TIME_TO_LIVE: u8 = 64;

/// With an ICMP header.
const ERROR_HEADER: u32 = lengths::IPV4 + 8;

impl Network for Be32 {
    const ETHERTYPE: [u8; 2] = [0x08, 0x00];
    const VERSION: u8 = 4;
    const ICMP: u8 = protocol::ICMP;
    const HAS_HEADER_CHECKSUM: bool = true;
    const FRAGMENTS_NAME_TRANSPORT: bool = true;
    const SOURCE: u32 = 12;
    const DESTINATION: u32 = 16;
    const ALL_HEADERS: u32 = 14 + 60 + 8 + 60 + 20;
    const LONGEST_HEADER: u32 = 60;
    const DHCP_SERVER: u16 = 67;

    type ErrorHeader = [Be32; ERROR_HEADER as usize / 4];

    #[inline(always)]
    fn read<F: Frame>(frame: &F, network_offset: u32, packet: &mut Packet) -> Result<(), Reason> {
        let Some(header) = frame.load::<Ipv4Hdr>(network_offset) else {
            return Err(Reason::Truncated);
        };
        let header_length = u32::from(header.vihl & 0x0f) * 4;
        if header.vihl >> 4 != Self::VERSION || header_length < lengths::IPV4 {
            return Err(Reason::BadHeader);
        }
        let carried = frame.length().wrapping_sub(network_offset);
        let mut length = u32::from(Be16::from_bytes(header.tot_len).get());
        let segment_size = frame.segment_size();
        if length == 0 && segment_size != 0 {
            // "BIG TCP": longer than the field can say.
            length = carried;
        }
        if length < header_length || length > carried {
            return Err(Reason::Truncated);
        }
        let fragment = Be16::from_bytes(header.frags).get();
        let part = if fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET) == 0 {
            Part::Whole
        } else if fragment & FRAGMENT_OFFSET == 0 {
            Part::First
        } else {
            Part::Later
        };
        packet.source = Self::from_bytes(header.src_addr);
        packet.destination = Self::from_bytes(header.dst_addr);
        packet.protocol = header.proto;
        packet.time_to_live = header.ttl;
        packet.dont_fragment = fragment & DONT_FRAGMENT != 0;
        packet.part = part;
        packet.transport = Self::transport_of(header.proto);
        packet.identification = Self::new(u32::from(Be16::from_bytes(header.id).get()));
        packet.fragment_offset = fragment & FRAGMENT_OFFSET;
        packet.more_fragments = fragment & MORE_FRAGMENTS != 0;
        packet.network_offset = network_offset;
        packet.header_length = header_length;
        packet.unfragmentable_length = header_length;
        packet.length = length;
        packet.wire_length = length;
        Ok(())
    }

    #[inline(always)]
    fn read_plain<F: Frame>(frame: &F, network_offset: u32, packet: &mut Packet) -> bool {
        const PLAIN: u8 = 0x45;
        let Some(header) = frame.load::<Ipv4Hdr>(network_offset) else {
            return false;
        };
        let fragment = Be16::from_bytes(header.frags);
        let is_fragment = fragment.raw() & Be16::new(MORE_FRAGMENTS | FRAGMENT_OFFSET).raw() != 0;
        let length = u32::from(Be16::from_bytes(header.tot_len).get());
        if header.vihl != PLAIN || is_fragment || length > frame.length() - network_offset {
            return false;
        }
        packet.source = Self::from_bytes(header.src_addr);
        packet.destination = Self::from_bytes(header.dst_addr);
        packet.protocol = header.proto;
        packet.time_to_live = header.ttl;
        packet.network_offset = network_offset;
        packet.header_length = lengths::IPV4;
        packet.length = length;
        packet.wire_length = length;
        packet.transport = match header.proto {
            protocol::TCP => Transport::Tcp,
            protocol::UDP => Transport::Udp,
            0..=u8::MAX => return false,
        };
        length >= lengths::IPV4
    }

    #[inline(always)]
    fn read_rest<F: Frame>(frame: &F, packet: &mut Packet) {
        packet.unfragmentable_length = packet.header_length;
        if let Some(header) = frame.load::<Ipv4Hdr>(packet.network_offset) {
            let fragment = Be16::from_bytes(header.frags).get();
            packet.dont_fragment = fragment & DONT_FRAGMENT != 0;
            packet.identification = Self::new(u32::from(Be16::from_bytes(header.id).get()));
        }
    }

    #[inline(always)]
    fn read_quoted<F: Frame>(
        frame: &F,
        offset: u32,
        quoted: &mut Quoted<Self>,
    ) -> Result<u32, Reason> {
        let unusable = Reason::ErrorUnusable;
        let header = frame.read::<Ipv4Hdr>(offset).ok_or(unusable)?;
        let length = u32::from(header.vihl & 0x0f) * 4;
        if header.vihl >> 4 != Self::VERSION || length < lengths::IPV4 {
            return Err(unusable);
        }
        if Be16::from_bytes(header.frags).get() & FRAGMENT_OFFSET != 0 {
            return Err(unusable);
        }
        verify_sum(frame, offset, length)?;
        quoted.source = Self::from_bytes(header.src_addr);
        quoted.destination = Self::from_bytes(header.dst_addr);
        quoted.protocol = header.proto;
        Ok(length)
    }

    #[inline(always)]
    fn icmp_kind(icmp_type: u8) -> Transport {
        match icmp_type {
            icmp::ECHO_REQUEST | icmp::TIMESTAMP_REQUEST => Transport::IcmpQuery,
            icmp::ECHO_REPLY | icmp::TIMESTAMP_REPLY => Transport::IcmpReply,
            icmp::DESTINATION_UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM => {
                Transport::IcmpError
            }
            0..=u8::MAX => Transport::IcmpOther,
        }
    }

    /// ARP does that for IPv4.
    #[inline(always)]
    fn is_link_upkeep(_icmp_type: u8) -> bool {
        false
    }

    #[inline(always)]
    fn claim<F: Frame>(_frame: &F, _packet: &Packet) -> Claim<Self> {
        Claim::Nothing
    }

    /// RFC 792, RFC 1191, and RFC 5508 REQ-8.
    #[inline(always)]
    fn icmp_error(complaint: Complaint) -> (u8, u8) {
        match complaint {
            Complaint::TimeExceeded => (icmp::TIME_EXCEEDED, 0),
            Complaint::TooBig => (icmp::DESTINATION_UNREACHABLE, icmp::FRAGMENTATION_NEEDED),
            Complaint::Prohibited => (
                icmp::DESTINATION_UNREACHABLE,
                icmp::ADMINISTRATIVELY_PROHIBITED,
            ),
        }
    }

    #[inline(always)]
    fn store<F: Frame>(
        frame: &mut F,
        network_offset: u32,
        (source, destination): (Self, Self),
        delta: Delta,
        time_to_live: u8,
    ) -> Option<()> {
        let offset = network_offset + TIME_TO_LIVE;
        let [before, protocol, check @ ..] = frame.load::<[u8; 4]>(offset)?;
        let hop = Delta::of_word(
            Be16::from_bytes([before, protocol]),
            Be16::from_bytes([time_to_live, protocol]),
        );
        let [check_high, check_low] = delta.and(hop).apply(Be16::from_bytes(check)).bytes();
        let first = [time_to_live, protocol, check_high, check_low];
        frame.store(offset, &[first, source.bytes(), destination.bytes()])
    }

    #[inline(always)]
    fn write_quoted<F: Frame>(
        frame: &mut F,
        offset: u32,
        (source, destination): (Self, Self),
        delta: Delta,
    ) -> Option<Delta> {
        let header = offset + TIME_TO_LIVE;
        let [time_to_live, number, check @ ..] = frame.read::<[u8; 4]>(header)?;
        let old_check = Be16::from_bytes(check);
        let new_check = delta.apply(old_check);
        let [check_high, check_low] = new_check.bytes();
        frame.write(
            header,
            &[
                [time_to_live, number, check_high, check_low],
                source.bytes(),
                destination.bytes(),
            ],
        )?;
        Some(delta.and(Delta::of_word(old_check, new_check)))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "it has 16 bits")]
    fn renumber<F: Frame>(frame: &mut F, packet: &Packet, identification: Be32) -> Option<()> {
        let at = packet.network_offset;
        let check = Be16::from_bytes(frame.load::<[u8; 2]>(at + CHECKSUM)?);
        let before = Be16::new(packet.identification.get() as u16);
        let identification = Be16::new(identification.get() as u16);
        let check = Delta::of_word(before, identification).apply(check);
        frame.store(at + IDENTIFICATION, &identification.bytes())?;
        frame.store(at + CHECKSUM, &check.bytes())
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
        let sum = add(quoted + rest.sum(), [icmp_type, code]);
        let [icmp_high, icmp_low] = checksum::finish(sum).bytes();
        let [length_high, length_low] = Be16::new((ERROR_HEADER + length) as u16).bytes();
        let first = [0x45, INTERNETWORK_CONTROL, length_high, length_low];
        let third = [OUR_TIME_TO_LIVE, protocol::ICMP, 0, 0];
        let words = [Self::from_bytes(first), Self::from_bytes(third), from, to];
        let [ip_high, ip_low] = checksum::finish(words.into_iter().map(Self::sum).sum()).bytes();
        [
            Self::from_bytes(first),
            Self::ZERO,
            Self::from_bytes([OUR_TIME_TO_LIVE, protocol::ICMP, ip_high, ip_low]),
            from,
            to,
            Self::from_bytes([icmp_type, code, icmp_high, icmp_low]),
            rest,
        ]
    }
}
