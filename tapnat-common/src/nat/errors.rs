//! ICMP errors about packets of sessions (RFC 5508 section 4 and 7). They never
//! make, keep alive or end anything.

use super::{Tables, session};
use crate::{
    abi::{Arrival, FlowKey, session_flags},
    net::Be32,
    parse::{Packet, Quoted},
    rewrite::Rewrite,
    time::Instant,
    verdict::{Reason, Verdict},
};

/// Decides about an ICMP error by the packet it quotes. With the verdict comes
/// what becomes of the error's own source address.
#[inline(always)]
pub fn decide_error<T: Tables>(
    packet: &Packet,
    quoted: &Quoted,
    device: Option<u32>,
    now: Instant,
    tables: &T,
) -> (Verdict, Be32) {
    // The quoted packet came this way translated; its answer would carry this key.
    let key = FlowKey {
        source: quoted.destination,
        destination: quoted.source,
        source_port: quoted.destination_port,
        destination_port: quoted.source_port,
        arrival: match device {
            Some(device) => Arrival::inside(device, quoted.protocol),
            None => Arrival::outside(quoted.protocol),
        },
    };
    let Some(session) = tables.session(&key) else {
        return (without_session(packet, device, tables), packet.source);
    };
    if session::is_expired(&key, session, now, tables) {
        return (Verdict::Drop(Reason::ErrorWithoutSession), packet.source);
    }
    if packet.time_to_live <= 1 {
        // RFC 1122 section 3.2.2: no error about an error.
        return (Verdict::Drop(Reason::TimeToLiveExceeded), packet.source);
    }
    let resolve = session.flags & session_flags::NEXT_HOP_KNOWN == 0;
    let mut rewrite = Rewrite::of(session, resolve);
    if rewrite.next_hop.device == 0 {
        // No packet has gone this way yet, so nobody has looked its device up.
        return (Verdict::Drop(Reason::ErrorWithoutSession), packet.source);
    }
    rewrite.resolve = resolve;
    // An inside address must not show; a router outside keeps its own.
    let source = if device.is_some() { session.source } else { packet.source };
    (Verdict::Forward(Reason::ErrorTranslated, rewrite), source)
}

/// An error about nothing of ours: the host's, if it is for the host.
#[inline(always)]
fn without_session<T: Tables>(packet: &Packet, device: Option<u32>, tables: &T) -> Verdict {
    match device {
        None => Verdict::Pass(Reason::NoMapping),
        Some(device) if tables.device(device).is_some_and(|d| d.address == packet.destination) => {
            Verdict::Pass(Reason::ForTheHost)
        }
        Some(_) => Verdict::Drop(Reason::ErrorWithoutSession),
    }
}
