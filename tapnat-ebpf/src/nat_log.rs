//! Tells user space which endpoints are given and given back, where the NAT log is
//! on. Where it is off the verifier takes all of this out.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, helpers::generated::bpf_ktime_get_ns};
use tapnat_common::{
    abi::{EndpointKey, Family, FlowKey, Session, session_flags},
    nat_log::{level, mapped},
};

use crate::{NAT_LOG_LEVEL, maps};

/// Whether anything is to be told.
#[inline(always)]
pub fn is_on() -> bool {
    NAT_LOG_LEVEL.load() != level::OFF
}

/// Tells of a mapping.
#[inline(always)]
pub fn mapping<A: Family>(event: u32, outside: &EndpointKey<A>, inside: &EndpointKey<A>) {
    if is_on() {
        tell(event, outside, inside, None);
    }
}

/// What is told of a session, once for both halves: by the half that the guest's
/// packets arrive as, of which the one that began counts between guests. Its outside
/// endpoint, or nothing if it is not to be told.
#[inline(always)]
pub fn outside_of<A: Family>(key: &FlowKey<A>, half: &Session<A>) -> Option<EndpointKey<A>> {
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
pub fn session<A: Family>(event: u32, key: &FlowKey<A>, outside: &EndpointKey<A>) {
    let remote = (NAT_LOG_LEVEL.load() == level::SESSIONS).then(|| key.destination_endpoint());
    tell(event, outside, &key.source_endpoint(), remote.as_ref());
}

/// Writes a field of a record in the ring.
macro_rules! write {
    ($record:ident, $field:ident, $value:expr) => {{
        let value = $value;
        // SAFETY: the ring has reserved the record's memory.
        let field = unsafe { &raw mut (*$record).$field };
        // SAFETY: as above, and aligned as the ring aligns it.
        unsafe { field.write(value) };
    }};
}

/// The reader looks by itself, so that nobody is woken on a packet's way.
#[inline(always)]
fn tell<A: Family>(
    event: u32,
    outside: &EndpointKey<A>,
    inside: &EndpointKey<A>,
    remote: Option<&EndpointKey<A>>,
) {
    if let Some(mut record) = maps::NAT_LOG.reserve(0) {
        // SAFETY: no preconditions.
        let time = unsafe { bpf_ktime_get_ns() };
        // Field by field: a record does not fit a stack beside all else.
        let record_there = record.as_mut_ptr();
        write!(record_there, time, time);
        write!(record_there, outside, mapped(outside));
        write!(record_there, inside, mapped(inside));
        write!(record_there, remote, remote.map(mapped).unwrap_or_default());
        write!(record_there, event, event);
        write!(record_there, remote_is_told, u32::from(remote.is_some()));
        write!(record_there, zero, 0);
        record.submit(u64::from(BPF_RB_NO_WAKEUP));
    } else if let Some(lost) = maps::NAT_LOG_LOST.get_ptr_mut(0) {
        // In one instruction: packets may interrupt the sweep.
        // SAFETY: this CPU's own, and aligned.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(lost, 1) };
    }
}
