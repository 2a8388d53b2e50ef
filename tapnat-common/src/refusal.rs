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

/// The sum of the quoted bytes of `packet`, which is still as it arrived, as they will be
/// on the wire.
///
/// `None` when the packet is shorter than it says.
#[inline(always)]
pub fn quoted_sum<A: Network, F: Frame>(frame: &F, packet: &Packet<A>) -> Option<u32> {
    let quoted = quoted_length(packet);
    let header_length = packet.header_length.min(quoted);
    let header = sum(frame, packet.network_offset, header_length)?;
    if let Some(partial) = partial_checksum(frame, packet) {
        // A device will complete the quoted transport checksum; whatever the
        // rest is, it then sums up to the complement of what stands there now.
        return Some(header + u32::from(!partial.raw()));
    }
    let length = quoted - header_length;
    Some(header + sum(frame, packet.transport_offset(), length)?)
}

/// The header for the error about `packet`, given the [`quoted_sum`].
#[inline(always)]
pub fn header<A: Network>(packet: &Packet<A>, refusal: &Refusal<A>, sum: u32) -> A::ErrorHeader {
    // In IPv4 the upper half is not used (RFC 1191 section 4).
    let rest = match refusal.complaint {
        Complaint::TooBig => Be32::new(u32::from(refusal.mtu)),
        Complaint::TimeExceeded | Complaint::Prohibited => Be32::ZERO,
    };
    let kind = A::icmp_error(refusal.complaint);
    let ends = (refusal.from, packet.source);
    A::error_header(kind, rest, ends, sum, quoted_length(packet))
}

#[inline(always)]
fn sum<F: Frame>(frame: &F, offset: u32, length: u32) -> Option<u32> {
    if length == 0 {
        return Some(0);
    }
    let checksum = frame.checksum(offset, length)?;
    Some(u32::from(!checksum.raw()))
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
