//! Tells user space which endpoints are given and given back, where the NAT log is
//! on. Where it is off the verifier takes all of this out.

use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, helpers::generated::bpf_ktime_get_ns};
use tapnat_common::{
    abi::{EndpointKey, FlowKey, Session, session_flags},
    nat_log::{Record, level},
    net::{Be16, Be32},
};

use crate::{NAT_LOG_LEVEL, maps};

/// Whether anything is to be told.
#[inline(always)]
pub fn is_on() -> bool {
    NAT_LOG_LEVEL.load() != level::OFF
}

/// An endpoint in a register, as a stack is short: address, port and protocol.
#[inline(always)]
fn packed(endpoint: &EndpointKey) -> u64 {
    let port = u16::from_ne_bytes(endpoint.port.bytes());
    u64::from(endpoint.address.raw()) | u64::from(port) << 32 | u64::from(endpoint.protocol) << 48
}

#[inline(always)]
fn unpacked(packed: u64) -> EndpointKey {
    EndpointKey::new(
        Be32::from_raw(packed as u32),
        Be16::from_bytes(((packed >> 32) as u16).to_ne_bytes()),
        (packed >> 48) as u8,
    )
}

/// Tells of a mapping.
#[inline(always)]
pub fn mapping(event: u32, outside: &EndpointKey, inside: &EndpointKey) {
    if is_on() {
        tell(event, packed(outside), packed(inside), 0);
    }
}

/// What is told of a session, once for both halves: by the half that the guest's
/// packets arrive as, of which the one that began counts between guests. Its outside
/// endpoint, or nothing if it is not to be told.
#[inline(always)]
pub fn outside_of(key: &FlowKey, half: &Session) -> Option<EndpointKey> {
    let level = NAT_LOG_LEVEL.load();
    if level == level::OFF || key.arrival.device().is_none() {
        return None;
    }
    let is_mapped = half.flags & session_flags::UNMAPPED == 0;
    let is_second = half.flags & (session_flags::TO_INSIDE | session_flags::INITIATOR)
        == session_flags::TO_INSIDE;
    if is_second || (is_mapped && level == level::MAPPINGS) {
        return None;
    }
    let protocol = key.arrival.protocol();
    Some(EndpointKey::new(half.source, half.source_port, protocol))
}

/// Tells of a session with this outside endpoint.
#[inline(always)]
pub fn session(event: u32, key: &FlowKey, outside: EndpointKey) {
    let remote = if NAT_LOG_LEVEL.load() == level::SESSIONS {
        packed(&key.destination_endpoint()) | REMOTE_IS_TOLD
    } else {
        0
    };
    tell(
        event,
        packed(&outside),
        packed(&key.source_endpoint()),
        remote,
    );
}

/// A bit beside a packed endpoint.
const REMOTE_IS_TOLD: u64 = 1 << 56;

/// The reader looks by itself, so that nobody is woken on a packet's way.
#[inline(never)]
fn tell(event: u32, outside: u64, inside: u64, remote: u64) {
    if let Some(mut record) = maps::NAT_LOG.reserve(0) {
        // SAFETY: no preconditions.
        let time = unsafe { bpf_ktime_get_ns() };
        record.write(Record {
            time,
            outside: unpacked(outside),
            inside: unpacked(inside),
            remote: unpacked(remote),
            event,
            remote_is_told: u32::from(remote & REMOTE_IS_TOLD != 0),
        });
        record.submit(u64::from(BPF_RB_NO_WAKEUP));
    } else if let Some(lost) = maps::NAT_LOG_LOST.get_ptr_mut(0) {
        // SAFETY: this CPU's own.
        unsafe { *lost += 1 };
    }
}
