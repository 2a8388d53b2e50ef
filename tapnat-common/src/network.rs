//! What tells the IP versions apart in a packet: headers read and written, ICMP's
//! types, the header of an ICMP error of our own. One implementation of [`Network`]
//! for each; everything else is the same code for both.
//!
//! Decides nothing about packets that are well-formed.

mod ipv4;
pub(crate) mod ipv6;

use crate::{
    checksum::Delta,
    frame::{Frame, Header},
    nat::neighbours::Claim,
    net::{Address, Be16, Be32, protocol},
    parse::{Packet, Quoted, Transport},
    verdict::{Complaint, Reason},
};

pub(crate) use self::ipv6::behind_extensions;

/// An IP version, named by its addresses.
pub trait Network: Address + Header {
    /// The two bytes before the header in an Ethernet frame.
    const ETHERTYPE: [u8; 2];
    /// The IP version.
    const VERSION: u8;
    /// The number of its ICMP.
    const ICMP: u8;
    /// Whether a checksum in the network header makes up for what changes in the
    /// addresses, and whether ICMP's leaves them out: both are so, or neither
    /// (RFC 8200 section 8.1).
    const HAS_HEADER_CHECKSUM: bool;
    /// Whether each fragment names the protocol of its datagram, which then is part of
    /// what tells datagrams apart (RFC 791 section 3.2): IPv6's later ones name the header
    /// that the first one begins with (RFC 8200 section 4.5).
    const FRAGMENTS_NAME_TRANSPORT: bool;
    /// Where the addresses are in the header, in bytes.
    const SOURCE: u32;
    const DESTINATION: u32;
    /// Link, network and transport header, and the same of a quoted packet, at their
    /// longest that still leaves 20 bytes of the quoted transport header.
    const ALL_HEADERS: u32;
    /// Bytes of the longest network header that is read.
    const LONGEST_HEADER: u32;
    /// Where servers listen that guests ask for their addresses (RFC 2131 section 4.1,
    /// RFC 8415 section 7.2).
    const DHCP_SERVER: u16;

    /// A network and an ICMP header, for an error of our own.
    type ErrorHeader: Header;

    /// Reads the network header of an untagged frame of this version into a packet of
    /// which nothing is known yet.
    ///
    /// # Errors
    /// The exit of a packet that is malformed.
    fn read<F: Frame>(
        frame: &F,
        network_offset: u32,
        packet: &mut Packet<Self>,
    ) -> Result<(), Reason>;

    /// Reads the network header if it is what nearly all are: the shortest that there
    /// is, of a whole packet of TCP or UDP. Returns whether it is.
    fn read_plain<F: Frame>(frame: &F, network_offset: u32, packet: &mut Packet<Self>) -> bool;

    /// Whom a packet of this version is for, if that can be looked at.
    #[inline(always)]
    fn read_destination<F: Frame>(frame: &F, network_offset: u32) -> Option<Self> {
        read_anywhere(frame, network_offset + Self::DESTINATION)
    }

    /// Reads what [`Self::read_plain`] has left out.
    fn read_rest<F: Frame>(frame: &F, packet: &mut Packet<Self>);

    /// Who sent a packet of this version, if that can be looked at.
    #[inline(always)]
    fn read_source<F: Frame>(frame: &F, network_offset: u32) -> Option<Self> {
        read_anywhere(frame, network_offset + Self::SOURCE)
    }

    /// Reads the network header of the packet that an ICMP error quotes, whose checksum
    /// is right. Returns how many bytes there are before the transport header.
    ///
    /// # Errors
    /// [`Reason::ErrorUnusable`] when there is no transport header behind it,
    /// [`Reason::ErrorBadChecksum`] when its own checksum is wrong.
    fn read_quoted<F: Frame>(
        frame: &F,
        offset: u32,
        quoted: &mut Quoted<Self>,
    ) -> Result<u32, Reason>;

    /// What kind of transport this protocol is here. ICMP is refined by its type.
    ///
    /// An authentication header covers the addresses, so what has one is not carried
    /// (RFC 4302).
    #[inline(always)]
    #[must_use]
    fn transport_of(number: u8) -> Transport {
        match number {
            protocol::TCP => Transport::Tcp,
            protocol::UDP | protocol::UDP_LITE => Transport::Udp,
            protocol::SCTP => Transport::PortsFixed,
            protocol::GRE | protocol::ESP => Transport::AddressOnly,
            0..=u8::MAX if number == Self::ICMP => Transport::IcmpQuery,
            0..=u8::MAX => Transport::Unknown,
        }
    }

    /// What kind of message this type of ICMP is.
    fn icmp_kind(icmp_type: u8) -> Transport;

    /// Whether the ICMP message keeps a link working, and so is between a guest and
    /// the host.
    fn is_link_upkeep(icmp_type: u8) -> bool;

    /// What a message of that kind claims of its sender.
    fn claim<F: Frame>(frame: &F, packet: &Packet<Self>) -> Claim<Self>;

    /// The type and code of the ICMP error for this.
    fn icmp_error(complaint: Complaint) -> (u8, u8);

    /// Writes addresses and what is left of the time to live, and the header's
    /// checksum if it has one.
    fn store<F: Frame>(
        frame: &mut F,
        network_offset: u32,
        addresses: (Self, Self),
        delta: Delta,
        time_to_live: u8,
    ) -> Option<()>;

    /// Writes the addresses of a quoted packet. Returns what that changes in a sum
    /// over it, given what the addresses alone do.
    fn write_quoted<F: Frame>(
        frame: &mut F,
        offset: u32,
        addresses: (Self, Self),
        delta: Delta,
    ) -> Option<Delta>;

    /// Gives a fragment another identification.
    fn renumber<F: Frame>(frame: &mut F, packet: &Packet<Self>, identification: Be32)
    -> Option<()>;

    /// The header of an ICMP error of this type and code about a packet, with this
    /// number in its last four bytes. `quoted` is the sum of the `length` bytes that
    /// follow it.
    fn error_header(
        kind: (u8, u8),
        rest: Be32,
        ends: (Self, Self),
        quoted: u32,
        length: u32,
    ) -> Self::ErrorHeader;
}

/// Reads where headers mostly are, or where a sender's odd buffers have them.
#[inline(always)]
fn read_anywhere<T: Header, F: Frame>(frame: &F, offset: u32) -> Option<T> {
    frame.load(offset).or_else(|| frame.read(offset))
}

/// The sum of a pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1). `length`: of
/// the transport header and what follows, in bytes, less than 2^16.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "what is longer has GSO, and no such sum"
)]
pub(crate) fn pseudo_header<A: Address>(
    source: A,
    destination: A,
    protocol: u8,
    length: u32,
) -> u32 {
    source.sum()
        + destination.sum()
        + u32::from(Be16::new(u16::from(protocol)).raw())
        + u32::from(Be16::new(length as u16).raw())
}

/// Adds a word to a sum.
#[inline(always)]
const fn add(sum: u32, word: [u8; 2]) -> u32 {
    sum + Be16::from_bytes(word).raw() as u32
}
