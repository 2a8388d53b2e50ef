//! The ICMP error that tells a sender why its packet was dropped: the headers
//! that go before the quoted packet. The caller makes room for them.

use crate::{
    checksum,
    frame::Frame,
    net::{Be16, Be32},
    network::{Network, pseudo_header},
    parse::{Packet, Part, Transport},
    time::Instant,
    verdict::Complaint,
};

/// How much of the refused packet is quoted: its IP header, and of its
/// transport header 20 bytes or what there is. RFC 792 wants 8 of them.
///
/// With TCP's first 20 bytes goes its checksum field: the kernel does not cut
/// off a field that a device is to complete.
#[must_use]
pub const fn quoted_length<A: Network>(packet: &Packet<A>) -> u32 {
    let most = packet.header_length + 20;
    let some = if packet.length < most {
        packet.length
    } else {
        most
    };
    // Whole words, which the checksum is taken of.
    some & !3
}

/// Whether the sender may be told (RFC 1122 section 3.2.2, RFC 4443 section 2.4): not
/// about an ICMP error, a later fragment, or a source or destination that is no single
/// host.
#[must_use]
pub fn may_answer<A: Network>(packet: &Packet<A>) -> bool {
    let about_error = matches!(
        packet.transport,
        Transport::IcmpError | Transport::IcmpOther
    );
    !about_error
        && !packet.destination.is_multicast()
        && !matches!(packet.part, Part::Later)
        && (packet.source.is_stand_in() || !packet.source.is_unroutable())
}

/// How many errors one sender was told lately (RFC 1812 section 4.3.2.8, RFC 5508
/// REQ-10 f).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    since: Instant,
    spent: u32,
}

impl Budget {
    /// Errors for one sender in half a second: more than any traceroute asks for.
    pub const MOST: u32 = 256;

    /// Whether there may be one more, which it then counts.
    #[inline(always)]
    #[must_use]
    pub fn take(&mut self, now: Instant) -> bool {
        // Not by its age, which a stamp of weeks ago does not tell.
        if now.slot() != self.since.slot() {
            self.since = now;
            self.spent = 0;
        }
        self.spent += 1;
        self.spent <= Self::MOST
    }
}

/// An ICMP error to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal<A = Be32> {
    pub complaint: Complaint,
    /// The MTU of the next hop in bytes; told only by [`Complaint::TooBig`].
    pub mtu: u16,
    /// The address that the error comes from.
    pub from: A,
}

/// The header for the error about `packet`, which is still as it arrived.
///
/// `None` when the packet is shorter than it says.
#[inline(always)]
pub fn build<A: Network, F: Frame>(
    frame: &F,
    packet: &Packet<A>,
    refusal: &Refusal<A>,
) -> Option<A::ErrorHeader> {
    let quoted = quoted_length(packet);
    // In IPv4 the upper half is not used (RFC 1191 section 4).
    let rest = match refusal.complaint {
        Complaint::TooBig => Be32::new(u32::from(refusal.mtu)),
        Complaint::TimeExceeded | Complaint::Prohibited => Be32::ZERO,
    };
    let sum = quoted_sum(frame, packet, quoted)?;
    let kind = A::icmp_error(refusal.complaint);
    let ends = (refusal.from, packet.source);
    Some(A::error_header(kind, rest, ends, sum, quoted))
}

#[inline(always)]
const fn add(sum: u32, word: [u8; 2]) -> u32 {
    sum + Be16::from_bytes(word).raw() as u32
}

/// The sum of the quoted bytes as they will be on the wire.
#[inline(always)]
fn quoted_sum<A: Network, F: Frame>(frame: &F, packet: &Packet<A>, quoted: u32) -> Option<u32> {
    let mut header = 0;
    let mut transport = 0;
    for word in 0..(A::LONGEST_HEADER + 20) / 4 {
        let at = word * 4;
        if at + 4 > quoted {
            break;
        }
        let [high, low] = frame.read::<[[u8; 2]; 2]>(packet.network_offset + at)?;
        if at < packet.header_length {
            header = add(add(header, high), low);
        } else {
            transport = add(add(transport, high), low);
        }
    }
    if let Some(partial) = partial_checksum(frame, packet) {
        // A device will complete the quoted transport checksum; whatever the
        // rest is, it then sums up to the complement of what stands there now.
        return Some(header + u32::from(!partial.raw()));
    }
    Some(header + transport)
}

/// The transport checksum field, if it holds only the sum of the pseudo-header
/// because a device is to complete it.
///
/// The kernel does not tell; one complete checksum in 65,536 looks alike, and
/// costs an ICMP error that its receiver drops.
#[inline(always)]
fn partial_checksum<A: Network, F: Frame>(frame: &F, packet: &Packet<A>) -> Option<Be16> {
    if !matches!(packet.transport, Transport::Tcp | Transport::Udp) {
        return None;
    }
    let field = Be16::from_bytes(frame.read::<[u8; 2]>(packet.checksum_offset()?)?);
    if frame.segment_size() != 0 {
        return Some(field);
    }
    let payload = packet.length - packet.header_length;
    let sum = pseudo_header(packet.source, packet.destination, packet.protocol, payload);
    // finish() complements, as a complete checksum would be.
    (checksum::finish(sum).raw() == !field.raw()).then_some(field)
}
