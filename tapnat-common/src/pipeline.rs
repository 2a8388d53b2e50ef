//! A packet's life up to its exit: parse, decide, rewrite. The kernel's shell
//! and the host's tests both call [`translate`].

use crate::{
    frame::Frame,
    nat::{self, Tables},
    parse::{self, Packet, Transport},
    rewrite,
    time::Instant,
    verdict::{Reason, Verdict},
};

/// Link, IP and transport header, and the same of a quoted packet, at their
/// longest that still leaves 20 bytes of the quoted transport header.
const ALL_HEADERS: u32 = 14 + 60 + 8 + 60 + 20;

/// Decides about the frame and, if it is to go on, rewrites it.
///
/// `device`: the inside device's index that it arrived on, or `None` for an
/// uplink. With the verdict comes what was read of the packet, if it was IPv4.
#[inline(always)]
pub fn translate<F: Frame, T: Tables>(
    frame: &mut F,
    device: Option<u32>,
    now: Instant,
    tables: &T,
) -> (Verdict, Option<Packet>) {
    let mut packet = match parse::parse(frame) {
        Ok(packet) => packet,
        Err(Verdict::Drop(Reason::Truncated)) => {
            // The headers may be there, but not in one piece.
            frame.pull(ALL_HEADERS);
            match parse::parse(frame) {
                Ok(packet) => packet,
                Err(verdict) => return (verdict, None),
            }
        }
        Err(verdict) => return (verdict, None),
    };
    if packet.transport == Transport::IcmpError {
        return (translate_error(frame, &packet, device, now, tables), Some(packet));
    }
    let verdict = nat::decide(&mut packet, device, now, tables);
    if let Verdict::Forward(_, rewrite) = &verdict
        && rewrite::apply(frame, &packet, rewrite).is_none()
    {
        return (Verdict::Drop(Reason::RewriteFailed), Some(packet));
    }
    (verdict, Some(packet))
}

#[inline(never)]
fn translate_error<F: Frame, T: Tables>(
    frame: &mut F,
    packet: &Packet,
    device: Option<u32>,
    now: Instant,
    tables: &T,
) -> Verdict {
    frame.pull(ALL_HEADERS);
    let quoted = match parse::parse_quoted(frame, packet) {
        Ok(quoted) => quoted,
        // It may well be about something that the host itself sent.
        Err(Reason::ErrorUnusable) if device.is_none() => return Verdict::Pass(Reason::NoMapping),
        Err(reason) => return Verdict::Drop(reason),
    };
    let (verdict, source) = nat::decide_error(packet, &quoted, device, now, tables);
    if let Verdict::Forward(_, rewrite) = &verdict
        && rewrite::apply_error(frame, packet, &quoted, rewrite, source).is_none()
    {
        return Verdict::Drop(Reason::RewriteFailed);
    }
    verdict
}
