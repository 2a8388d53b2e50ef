//! Translates packets between IPv4 and IPv6 without any state (RFC 7915): the headers,
//! ICMP's messages, and the packets that ICMP errors quote. Addresses are the caller's
//! affair, [`crate::embed`] for those that are embedded; so are the time to live, which
//! stays as it is, and packets too long for the way on.
//!
//! A packet is read by [`crate::parse`] in the version that it has. Then, from what was
//! read, a plan is made; the shell makes the packet as long as it is to be; and the plan
//! is written.
//!
//! # All packets but ICMP errors
//!
//! 1. [`plan`], with what the addresses become. Nothing is changed yet.
//! 2. If [`Translation::unsummed`] says so (UDP without a checksum, which IPv6 does not
//!    know), sum those bytes up and give the plan the sum: [`Translation::set_sum`].
//! 3. Change the protocol with `bpf_skb_change_proto`. It takes away, or puts in, the 20
//!    bytes that one header is longer than the other, where the IP header begins, and
//!    changes what GSO segments are.
//! 4. If [`Translation::room`] is not 0, put in or take away so many bytes in the same
//!    place, with `bpf_skb_adjust_room` and `BPF_ADJ_ROOM_MAC`: a fragment header, or
//!    options and extension headers.
//! 5. [`Translation::apply`]. The packet is then read again in its new version.
//!
//! # ICMP errors
//!
//! Those are packets with [`Transport::IcmpError`]. What they quote becomes longer or
//! shorter, too.
//!
//! 1. [`error::Translation::read`] reads the quoted header.
//! 2. Set what the packet's addresses and those of the quoted packet become:
//!    [`error::Translation::ends`] and [`error::Translation::quote_ends`].
//! 3. [`error::Translation::plan`]. Nothing is changed yet.
//! 4. Copy the frame. Change the protocol as above; then make the frame
//!    [`error::Translation::length`] bytes long, and copy the two
//!    [`error::Translation::parts`], of which the second is mostly empty, from the copy to
//!    where they belong now, with `bpf_skb_store_bytes` and `BPF_F_RECOMPUTE_CSUM`.
//! 5. [`error::Translation::apply`] writes all the rest.
//!
//! # Sums
//!
//! A device may have summed the whole packet up (`CHECKSUM_COMPLETE`). Headers are written
//! by [`Frame::overwrite`], which corrects that sum (`BPF_F_RECOMPUTE_CSUM`) for the one
//! header and the other. A transport checksum that changes for another pseudo-header then
//! changes the sum, too, as it does in IPv4 and not in IPv6: so on both ways
//! [`Frame::update_checksum`] is told that it is in IPv4.
//!
//! # Lengths
//!
//! IPv4 packets that may be fragmented are cut before they are translated, so short that they fit
//! then (by [`crate::nat::nat64::GROWTH`] and [`crate::nat::nat64::FRAGMENT_GROWTH`]); others that are longer
//! are refused.

pub mod error;
mod icmp;
mod ipv4;
mod ipv6;

use crate::{
    checksum::{self, Delta},
    frame::Frame,
    net::{Address as _, Be16, Be32, protocol},
    network::{Network, pseudo_header},
    parse::{Packet, Part, Transport},
};

/// Why a packet is not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untranslatable {
    /// Its bytes are not where its headers say.
    Truncated,
    /// Longer than the other version's length field can say.
    TooLong,
    /// A source route option that is not used up (RFC 7915 section 4.1). The sender is to
    /// be told with type 3, code 5.
    SourceRoute,
    /// An extension header in the fragmentable part (RFC 7915 section 5.1.1).
    HeaderInFragments,
    /// A fragment of ICMP, whose checksum covers a length that nobody knows here (RFC
    /// 7915 section 1.2).
    FragmentedIcmp,
    /// A fragment of a UDP datagram without a checksum (RFC 7915 section 4.5).
    FragmentWithoutChecksum,
    /// The other version's ICMP, or an extension header where there is none: it would be
    /// taken for what it is not.
    ForeignProtocol,
    /// ICMP of a type or code that the other version has no counterpart of (RFC 7915
    /// sections 4.2 and 5.2): timestamps, redirects, neighbour discovery, multicast
    /// listeners.
    NoCounterpart,
    /// An ICMP error that quotes too little, a later fragment, another ICMP error, or
    /// what cannot be translated itself.
    ErrorUnusable,
}

/// The MTUs of the ways on, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mtus {
    pub ipv4: u16,
    pub ipv6: u16,
}

/// The least that every way for IPv6 takes, in bytes (RFC 8200 section 5).
pub const LEAST_IPV6_MTU: u16 = 1280;

/// What an IP header says that both versions can say; protocol numbers are of the version
/// that is to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    traffic_class: u8,
    hop_limit: u8,
    protocol: u8,
    is_fragment: bool,
    more_fragments: bool,
    /// In units of 8 bytes.
    fragment_offset: u16,
    identification: Be32,
    /// In bytes, without any of the headers that go before the transport's.
    payload_length: u32,
}

/// An IP version that there is another one of, named by its addresses.
pub trait Version: Network {
    type Other: Version<Other = Self>;

    /// Bytes of a header with nothing to it.
    const HEADER: u32;
    /// Bytes of the longest ICMP error.
    const LONGEST_ERROR: u32;
    /// What the length of a quoted packet is counted in, in bytes (RFC 4884 section 4).
    const QUOTE_UNIT: u32;

    /// Whether there is something in the headers that is not to be translated.
    ///
    /// # Errors
    /// If there is.
    fn check<F: Frame>(frame: &F, packet: &Packet<Self>) -> Result<(), Untranslatable>;

    /// Reads the one thing that is not in [`Packet`].
    fn traffic_class<F: Frame>(frame: &F, network_offset: u32) -> Option<u8>;

    /// Reads the header of a quoted packet.
    ///
    /// # Errors
    /// [`Untranslatable::ErrorUnusable`] if that is of no use.
    fn read_quote<F: Frame>(frame: &F, offset: u32) -> Result<error::Quote<Self>, Untranslatable>;

    /// Bytes of this header, a fragment's included.
    fn header_length(header: &Header) -> u32;

    /// The sum of this header's words.
    fn header_sum(header: &Header, ends: (Self, Self)) -> u32;

    /// Whether its length is more than the field can say.
    fn is_too_long(header: &Header) -> bool;

    fn write<F: Frame>(
        frame: &mut F,
        offset: u32,
        header: &Header,
        ends: (Self, Self),
    ) -> Option<()>;

    /// The other version's type of this echo message.
    fn translate_echo(icmp_type: u8) -> Option<u8>;

    /// The other version's type and code of this error, and the number in the four bytes
    /// after its checksum.
    fn translate_error(
        kind: (u8, u8),
        rest: u32,
        quote: &error::Quote<Self>,
        mtus: Mtus,
    ) -> Option<((u8, u8), u32)>;

    /// By how many bits the length of the quoted packet is shifted in the four bytes after
    /// the checksum, in errors of a type that has it (RFC 4884 section 4).
    fn quote_length_shift(icmp_type: u8) -> Option<u32>;
}

/// What becomes of a packet: its plan in version `B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<B> {
    network_offset: u32,
    /// Of all headers before the transport's, in bytes, more than their version has at
    /// least.
    surplus: u32,
    header: Header,
    ends: (B, B),
    transport: Change,
}

/// What becomes of a transport header. Offsets are from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Nothing,
    /// The checksum, for other addresses.
    Checksum {
        field: u32,
        pseudo_header: Delta,
        zero_means_none: bool,
    },
    /// Type and checksum.
    Icmp {
        icmp_type: u8,
        pseudo_header: Delta,
        message: Delta,
    },
    /// UDP's checksum, which there is none of so far. Its pseudo-header's sum, or the
    /// whole one.
    Unsummed(u32),
    Sum(Be16),
}

/// Offset of the checksum in UDP, and in ICMP.
const UDP_CHECKSUM: u32 = 6;
const ICMP_CHECKSUM: u32 = 2;

/// Plans the translation of any packet but an ICMP error.
///
/// `ends` are what source and destination become. `identification` is what a whole
/// packet, which has none in IPv6, gets for its fragments in IPv4 (RFC 7915 section 5.1);
/// not looked at on the way to IPv6.
///
/// # Errors
/// Why it is not translated.
#[inline(always)]
pub fn plan<A: Version, F: Frame>(
    frame: &F,
    packet: &Packet<A>,
    ends: (A::Other, A::Other),
    identification: Be32,
) -> Result<Translation<A::Other>, Untranslatable> {
    A::check(frame, packet)?;
    let payload_length = packet.length - packet.header_length;
    let header = plan_header(frame, packet, payload_length, identification)?;
    let transport = plan_transport(frame, packet, payload_length, ends)?;
    Ok(Translation {
        network_offset: packet.network_offset,
        surplus: packet.header_length - A::HEADER,
        header,
        ends,
        transport,
    })
}

/// The header that becomes of a packet's, with this length of payload.
#[inline(always)]
fn plan_header<A: Version, F: Frame>(
    frame: &F,
    packet: &Packet<A>,
    payload_length: u32,
    identification: Be32,
) -> Result<Header, Untranslatable> {
    let is_fragment = packet.part != Part::Whole;
    let truncated = Untranslatable::Truncated;
    let header = Header {
        traffic_class: A::traffic_class(frame, packet.network_offset).ok_or(truncated)?,
        hop_limit: packet.time_to_live,
        protocol: translate_protocol::<A>(packet.protocol)?,
        is_fragment,
        more_fragments: packet.more_fragments,
        fragment_offset: packet.fragment_offset,
        identification: if is_fragment {
            packet.identification
        } else {
            identification
        },
        payload_length,
    };
    if A::Other::is_too_long(&header) {
        return Err(Untranslatable::TooLong);
    }
    Ok(header)
}

/// The number of the protocol in the other version.
#[inline(always)]
fn translate_protocol<A: Version>(number: u8) -> Result<u8, Untranslatable> {
    if number == A::ICMP {
        Ok(A::Other::ICMP)
    } else if protocol::is_icmp(number) || ipv6::is_extension(number) {
        Err(Untranslatable::ForeignProtocol)
    } else {
        Ok(number)
    }
}

#[inline(always)]
fn plan_transport<A: Version, F: Frame>(
    frame: &F,
    packet: &Packet<A>,
    length: u32,
    ends: (A::Other, A::Other),
) -> Result<Change, Untranslatable> {
    let old_ends = (packet.source, packet.destination);
    if packet.protocol == A::ICMP {
        if packet.part != Part::Whole {
            return Err(Untranslatable::FragmentedIcmp);
        }
        let icmp_type = A::translate_echo(packet.icmp_type).ok_or(Untranslatable::NoCounterpart)?;
        let [old, new] = [packet.icmp_type, icmp_type].map(|first| Be16::from_bytes([first, 0]));
        return Ok(Change::Icmp {
            icmp_type,
            pseudo_header: icmp_pseudo_header(old_ends, ends, length),
            message: Delta::of_word(old, new),
        });
    }
    let Some(offset) = packet.checksum_offset() else {
        return Ok(Change::Nothing);
    };
    let field = offset - packet.transport_offset();
    let is_udp = packet.protocol == protocol::UDP;
    if is_udp && A::HAS_HEADER_CHECKSUM {
        let old = frame.read::<[u8; 2]>(offset);
        if old.ok_or(Untranslatable::Truncated)? == [0; 2] {
            if packet.part != Part::Whole {
                return Err(Untranslatable::FragmentWithoutChecksum);
            }
            let (source, destination) = ends;
            let sum = pseudo_header(source, destination, protocol::UDP, length);
            return Ok(Change::Unsummed(sum));
        }
    }
    Ok(Change::Checksum {
        field,
        pseudo_header: addresses(old_ends, ends),
        zero_means_none: packet.transport == Transport::Udp,
    })
}

/// What other addresses change in a sum. Protocol and length are the same in both
/// versions' pseudo-headers.
#[inline(always)]
fn addresses<A: Version>(old: (A, A), new: (A::Other, A::Other)) -> Delta {
    Delta::of_sums(old.0.sum() + old.1.sum(), new.0.sum() + new.1.sum())
}

/// What other addresses change in a sum over ICMP, which only IPv6 has a pseudo-header
/// for (RFC 4443 section 2.3).
#[inline(always)]
fn icmp_pseudo_header<A: Version>(old: (A, A), new: (A::Other, A::Other), length: u32) -> Delta {
    Delta::of_sums(icmp_sum(old, length), icmp_sum(new, length))
}

/// The sum of what ICMP has for a pseudo-header.
#[inline(always)]
fn icmp_sum<A: Network>((source, destination): (A, A), length: u32) -> u32 {
    if A::HAS_HEADER_CHECKSUM {
        0
    } else {
        pseudo_header(source, destination, A::ICMP, length)
    }
}

impl<B: Version> Translation<B> {
    /// So many bytes are to be put in where the IP header begins, or, below 0, taken
    /// away, once the protocol was changed.
    #[inline(always)]
    #[must_use]
    pub fn room(&self) -> i32 {
        (B::header_length(&self.header) - B::HEADER).cast_signed() - self.surplus.cast_signed()
    }

    /// Offset and length of the bytes that have no checksum and need one, as long as the
    /// packet is as it was read.
    #[inline(always)]
    #[must_use]
    pub fn unsummed(&self) -> Option<(u32, u32)> {
        let Change::Unsummed(_) = self.transport else {
            return None;
        };
        let offset = self.network_offset + B::Other::HEADER + self.surplus;
        Some((offset, self.header.payload_length))
    }

    /// The sum of these bytes, as `bpf_csum_diff` makes it.
    #[inline(always)]
    pub fn set_sum(&mut self, sum: u32) {
        if let Change::Unsummed(pseudo_header) = self.transport {
            let pseudo_header = Delta::of_sums(0, pseudo_header);
            let sum = pseudo_header.apply(checksum::finish(sum));
            self.transport = Change::Sum(not_none(sum));
        }
    }

    /// Writes the packet, which is as long as it is to be.
    ///
    /// `None` when its memory could not be changed, or a sum is missing; it may then be
    /// half rewritten and must be dropped.
    #[inline(always)]
    pub fn apply<F: Frame>(&self, frame: &mut F) -> Option<()> {
        write_network(frame, self.network_offset, &self.header, self.ends)?;
        let transport = self.network_offset + B::header_length(&self.header);
        match self.transport {
            Change::Nothing => Some(()),
            Change::Checksum {
                field,
                pseudo_header,
                zero_means_none,
            } => frame.update_checksum::<Be32>(
                transport + field,
                pseudo_header,
                Delta::ZERO,
                zero_means_none,
            ),
            Change::Icmp {
                icmp_type,
                pseudo_header,
                message,
            } => {
                frame.write(transport, &[icmp_type])?;
                let field = transport + ICMP_CHECKSUM;
                frame.update_checksum::<Be32>(field, pseudo_header, message, false)
            }
            Change::Unsummed(_) => None,
            Change::Sum(sum) => frame.overwrite(transport + UDP_CHECKSUM, &sum.bytes()),
        }
    }
}

/// Writes the IP header and says in the link header which version it is.
#[inline(always)]
fn write_network<B: Version, F: Frame>(
    frame: &mut F,
    network_offset: u32,
    header: &Header,
    ends: (B, B),
) -> Option<()> {
    if frame.link_length() != 0 {
        frame.write(network_offset - 2, &B::ETHERTYPE)?;
    }
    B::write(frame, network_offset, header, ends)
}

/// A UDP checksum that does not say that there is none (RFC 768).
#[inline(always)]
fn not_none(sum: Be16) -> Be16 {
    if sum == Be16::ZERO {
        Be16::new(0xffff)
    } else {
        sum
    }
}
