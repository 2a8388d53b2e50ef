//! The ICMP error that tells a sender why its packet was dropped: the 28 bytes
//! that go before the quoted packet. The caller makes room for them.

use crate::{
    checksum,
    frame::Frame,
    net::{Be16, Be32, icmp, protocol},
    parse::{Packet, Part, Transport},
    time::Instant,
};

/// An IPv4 header without options and an ICMP header.
pub const HEADER_LENGTH: u32 = 28;

/// Precedence 6 of what used to be the type of service (RFC 1812 section 4.3.2.5).
const INTERNETWORK_CONTROL: u8 = 0xc0;

/// The time to live of packets that we make (RFC 1700).
const TIME_TO_LIVE: u8 = 64;

/// How much of the refused packet is quoted: its IP header, and of its
/// transport header 20 bytes or what there is. RFC 792 wants 8 of them.
///
/// With TCP's first 20 bytes goes its checksum field: the kernel does not cut
/// off a field that a device is to complete.
#[must_use]
pub const fn quoted_length(packet: &Packet) -> u32 {
    let most = packet.header_length + 20;
    let some = if packet.length < most {
        packet.length
    } else {
        most
    };
    // Whole words, which the checksum is taken of.
    some & !3
}

/// Whether the sender may be told (RFC 1122 section 3.2.2): not about an ICMP
/// error, a later fragment, or a source or destination that is no single host.
#[must_use]
pub const fn may_answer(packet: &Packet) -> bool {
    let about_error = matches!(
        packet.transport,
        Transport::IcmpError | Transport::IcmpOther
    );
    let to_many = packet.destination.bytes()[0] >= 224;
    !about_error
        && !to_many
        && !matches!(packet.part, Part::Later)
        && !packet.source.is_unroutable()
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
pub struct Refusal {
    pub icmp_type: u8,
    pub code: u8,
    /// The MTU of the next hop in bytes; told only by "fragmentation needed".
    pub mtu: u16,
    /// The address that the error comes from.
    pub from: Be32,
}

/// The header for the error about `packet`, which is still as it arrived.
///
/// `None` when the packet is shorter than it says.
#[inline(always)]
pub fn build<F: Frame>(
    frame: &F,
    packet: &Packet,
    refusal: &Refusal,
) -> Option<[u8; HEADER_LENGTH as usize]> {
    let quoted = quoted_length(packet);
    let kind = (refusal.icmp_type, refusal.code);
    let mtu = if kind == (icmp::DESTINATION_UNREACHABLE, icmp::FRAGMENTATION_NEEDED) {
        refusal.mtu
    } else {
        0
    };
    let [mtu_high, mtu_low] = Be16::new(mtu).bytes();
    let error = [
        refusal.icmp_type,
        refusal.code,
        0,
        0,
        0,
        0,
        mtu_high,
        mtu_low,
    ];
    let sum = add(
        add(quoted_sum(frame, packet, quoted)?, [error[0], error[1]]),
        [mtu_high, mtu_low],
    );
    let [check_high, check_low] = checksum::finish(sum).bytes();

    let length = Be16::new(length_field(HEADER_LENGTH + quoted)).bytes();
    let from = refusal.from.bytes();
    let to = packet.source.bytes();
    let mut ip = [
        0x45,
        INTERNETWORK_CONTROL,
        length[0],
        length[1],
        0,
        0,
        0,
        0,
        TIME_TO_LIVE,
        protocol::ICMP,
        0,
        0,
        from[0],
        from[1],
        from[2],
        from[3],
        to[0],
        to[1],
        to[2],
        to[3],
    ];
    let mut header_sum = add(add(0, [ip[0], ip[1]]), length);
    header_sum = add(header_sum, [TIME_TO_LIVE, protocol::ICMP]);
    header_sum = add_address(add_address(header_sum, refusal.from), packet.source);
    let [ip_high, ip_low] = checksum::finish(header_sum).bytes();
    ip[10] = ip_high;
    ip[11] = ip_low;
    Some([
        ip[0], ip[1], ip[2], ip[3], ip[4], ip[5], ip[6], ip[7], ip[8], ip[9], ip[10], ip[11],
        ip[12], ip[13], ip[14], ip[15], ip[16], ip[17], ip[18], ip[19], error[0], error[1],
        check_high, check_low, error[4], error[5], error[6], error[7],
    ])
}

/// A length as it stands in a header: what is longer has GSO, and no such field.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "see above")]
const fn length_field(length: u32) -> u16 {
    length as u16
}

#[inline(always)]
const fn add(sum: u32, word: [u8; 2]) -> u32 {
    sum + Be16::from_bytes(word).raw() as u32
}

#[inline(always)]
const fn add_address(sum: u32, address: Be32) -> u32 {
    let [a, b, c, d] = address.bytes();
    add(add(sum, [a, b]), [c, d])
}

/// The sum of the quoted bytes as they will be on the wire.
#[inline(always)]
fn quoted_sum<F: Frame>(frame: &F, packet: &Packet, quoted: u32) -> Option<u32> {
    let mut header = 0;
    let mut transport = 0;
    // 60 bytes of IP header and 20 of transport are 20 words.
    for word in 0..20u32 {
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
fn partial_checksum<F: Frame>(frame: &F, packet: &Packet) -> Option<Be16> {
    if !matches!(packet.transport, Transport::Tcp | Transport::Udp) {
        return None;
    }
    let field = Be16::from_bytes(frame.read::<[u8; 2]>(packet.checksum_offset()?)?);
    if frame.segment_size() != 0 {
        return Some(field);
    }
    let payload = packet.length - packet.header_length;
    let mut sum = add_address(add_address(0, packet.source), packet.destination);
    sum = add(sum, [0, packet.protocol]);
    sum = add(sum, Be16::new(length_field(payload)).bytes());
    // finish() complements, as a complete checksum would be.
    (checksum::finish(sum).raw() == !field.raw()).then_some(field)
}
