//! Later fragments have no ports: the first one's are remembered for them.

use core::num::NonZeroU32;

use super::Tables;
use crate::{
    abi::{Arrival, Fragment, FragmentKey},
    parse::Packet,
    verdict::Reason,
};

#[inline(always)]
const fn key_of(packet: &Packet, arrival: Arrival) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        arrival,
        identification: packet.identification,
        _zero: 0,
    }
}

/// Remembers the ports of a first fragment that was sent on.
#[inline(always)]
pub fn remember<T: Tables>(packet: &Packet, device: Option<NonZeroU32>, tables: &T) {
    let Some(settings) = tables.settings() else {
        return;
    };
    let fragment = Fragment {
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        expires_at: tables.now().after(settings.timeouts.fragment),
    };
    tables.set_fragment(&key_of(packet, packet.key(device).arrival), &fragment);
}

/// Gives a later fragment the ports of its datagram.
#[inline(always)]
pub(super) fn recall<T: Tables>(
    packet: &mut Packet,
    device: Option<NonZeroU32>,
    tables: &T,
) -> Result<(), Reason> {
    let arrival = packet.key(device).arrival;
    let known = tables
        .fragment(&key_of(packet, arrival))
        .filter(|fragment| tables.now().is_before(fragment.expires_at));
    match (known, device) {
        (Some(fragment), _) => {
            packet.source_port = fragment.source_port;
            packet.destination_port = fragment.destination_port;
            Ok(())
        }
        // It may be of a datagram to a guest, or to the host itself.
        (None, None) => Err(Reason::NoMapping),
        (None, Some(_)) => Err(Reason::FragmentUnknown),
    }
}
