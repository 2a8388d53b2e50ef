//! Packets that are too long for the way on and may be cut (RFC 791 section 3.2,
//! RFC 4787 REQ-13): says where the pieces lie, and writes their IP headers.
//!
//! IPv6 packets are never cut: their senders are told.
//!
//! The pieces are fragments as if the sender had made them: the shell lets them
//! come by again one by one, and the NAT sees nothing out of the ordinary.

use crate::{
    checksum::Delta,
    frame::Frame,
    net::{Address, Be16},
    parse::{Packet, Transport},
};

/// The longest frame that is cut, in bytes.
pub const MAX_FRAME: u32 = 16_383;

/// At most so many pieces are made of a packet: the kernel lets programs go on to
/// others 33 times.
pub const MAX_PIECES: u32 = 26;

/// What `bpf_skb_adjust_room` takes at once.
const MAX_EXCESS: u32 = 0xfff;

/// With the longest headers there is still room for data in this many bytes.
const MIN_SEGMENT: u16 = 128;

/// Offsets in an IPv4 header.
const LENGTH: u32 = 2;
const FLAGS: u32 = 6;
const CHECKSUM: u32 = 10;

const MORE_FRAGMENTS: u16 = 0x2000;

/// A part of a packet's payload, which is what follows its IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In bytes from the payload's beginning.
    pub start: u32,
    pub length: u32,
    is_last: bool,
}

/// Whether the packet can be cut into pieces that fit `mtu`.
#[inline(always)]
#[must_use]
pub const fn is_possible<A: Address>(packet: &Packet<A>, mtu: u16) -> bool {
    let step = step(packet, mtu);
    // Of a GSO packet only the kernel knows where the segments are.
    packet.wire_length == packet.length
        && packet.network_offset + packet.length <= MAX_FRAME
        && step != 0
        && payload(packet) <= MAX_PIECES * step
}

/// By how many bytes the segments of a TCP packet with GSO are to be made shorter,
/// as the kernel cuts it up later anyway.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "compared just before")]
pub const fn excess<A: Address>(packet: &Packet<A>, mtu: u16) -> Option<u16> {
    let excess = packet.wire_length.saturating_sub(mtu as u32);
    let is_tcp = matches!(packet.transport, Transport::Tcp);
    if is_tcp && packet.wire_length < packet.length && mtu >= MIN_SEGMENT && excess <= MAX_EXCESS {
        Some(excess as u16)
    } else {
        None
    }
}

/// The piece with this number, if there are so many.
#[inline(always)]
#[must_use]
pub const fn piece<A: Address>(packet: &Packet<A>, mtu: u16, number: u32) -> Option<Piece> {
    let step = step(packet, mtu);
    let start = number * step;
    let all = payload(packet);
    if step == 0 || start >= all {
        return None;
    }
    let left = all - start;
    let is_last = left <= step;
    Some(Piece {
        start,
        length: if is_last { left } else { step },
        is_last,
    })
}

/// Bytes of payload in each piece but the last.
#[inline(always)]
const fn step<A: Address>(packet: &Packet<A>, mtu: u16) -> u32 {
    (mtu as u32).saturating_sub(packet.header_length) & !7
}

#[inline(always)]
const fn payload<A: Address>(packet: &Packet<A>) -> u32 {
    packet.length - packet.header_length
}

/// Makes the IP header of the whole packet that of the piece. `None` when it could
/// not be changed.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "a packet is no longer than 65535 bytes"
)]
pub fn write_header<F: Frame>(frame: &mut F, packet: &Packet, piece: Piece) -> Option<()> {
    let length = Be16::new((packet.header_length + piece.length) as u16);
    let mut flags = packet.fragment_offset + (piece.start / 8) as u16;
    if packet.more_fragments || !piece.is_last {
        flags |= MORE_FRAGMENTS;
    }
    let flags = Be16::new(flags);
    let at = packet.network_offset;
    let [old_length, old_flags, check] = [LENGTH, FLAGS, CHECKSUM]
        .map(|offset| frame.read::<[u8; 2]>(at + offset).map(Be16::from_bytes));
    let check = Delta::of_word(old_length?, length)
        .and(Delta::of_word(old_flags?, flags))
        .apply(check?);
    frame.write(at + LENGTH, &length.bytes())?;
    frame.write(at + FLAGS, &flags.bytes())?;
    frame.write(at + CHECKSUM, &check.bytes())
}
