//! ICMP errors about packets of sessions (RFC 5508 section 4 and 7). They never
//! make, keep alive or end anything.

use core::num::NonZeroU32;

use super::{Fate, Route, Tables, session};
use crate::{
    abi::{Arrival, FlowKey},
    network::Network,
    parse::{Packet, Transport},
    rewrite::Rewrite,
    verdict::{Plan, Reason},
};

/// Decides about an ICMP error by the packet it quotes.
#[inline(always)]
pub fn decide_error<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
    plan: &mut Plan<A>,
) -> Reason {
    let quoted = &plan.quoted;
    // The quoted packet came this way translated; its answer would carry this key.
    plan.keys[0] = FlowKey {
        source: quoted.destination,
        destination: quoted.source,
        source_port: quoted.destination_port,
        destination_port: quoted.source_port,
        arrival: Arrival::of(device, quoted.protocol),
    };
    let key = &plan.keys[0];
    let Some(session) = tables.session(key) else {
        return without_session(packet, device, tables);
    };
    // What answers a query with identifier 0 has the key of another such query.
    let is_other_way =
        quoted.transport == Transport::IcmpQuery && session.source_port != quoted.destination_port;
    if is_other_way || session::is_expired(key, session, tables) {
        return Reason::ErrorWithoutSession;
    }
    // RFC 1122 section 3.2.2: no error about an error.
    if packet.time_to_live <= 1 {
        return Reason::ErrorUnusable;
    }
    plan.rewrite = Rewrite::of(session, false);
    if session.next_hop.device == 0 {
        // No packet has gone this way yet, so it has not been looked up.
        let route = match device {
            Some(device) => tables.route_from(device, packet),
            None => Route::default(),
        };
        if route.fate != Fate::Onward {
            return Reason::ErrorUnusable;
        }
        plan.rewrite.next_hop = route.next_hop;
    }
    // An inside address must not show; a router outside keeps its own.
    plan.error_source = if device.is_some() {
        session.source
    } else {
        packet.source
    };
    Reason::ErrorTranslated
}

/// An error about nothing of ours: the host's, if it is for the host.
#[inline(always)]
fn without_session<A: Network, T: Tables<A>>(
    packet: &Packet<A>,
    device: Option<NonZeroU32>,
    tables: &T,
) -> Reason {
    match device {
        None => Reason::NoMapping,
        Some(device) => match tables.device(device.get()) {
            Some(device) if device.address == packet.destination => Reason::ForTheHost,
            Some(_) | None => Reason::ErrorWithoutSession,
        },
    }
}
