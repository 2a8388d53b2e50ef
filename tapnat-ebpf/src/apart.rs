//! Decisions that the kernel's verifier looks at by themselves.
//!
//! It verifies a global function once, for every argument that there may be, and what
//! is part of its caller once for each way that leads there. So these few, which are
//! called from many places or in loops, make the programs load several times as fast.
//! They decide nothing: each calls what `tapnat_common` has for it, with the tables of
//! [`Kernel`], which is who calls them.
//!
//! Arguments are numbers, or pointers to memory whose size the verifier knows, which it
//! takes to be null perhaps. What they point to is copied, to the stack or to
//! [`crate::scratch`], before it goes to a table: until Linux 6.2 tables take keys and
//! values from nowhere else. Results are numbers.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use tapnat_common::{
    abi::{EndpointKey, FlowKey, Mapping, Session},
    nat::{self, HalfInsert, Insert, Tables as _},
    net::Be32,
    parse,
    refusal::Refusal,
};

use crate::{emit, now, scratch, skb::Skb, tables::Kernel};

/// In place of a number of 16 bits where there is none.
pub const NONE: u32 = u32::MAX;

/// The tables for what looks at nothing else: an argument that is not used reaches no
/// function.
#[inline(always)]
fn tables() -> Kernel {
    Kernel::new(core::ptr::null_mut(), now())
}

/// Whether the pool has the address, given as in [`Be32::raw`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn is_outside(address: u32) -> u32 {
    let kernel = tables();
    let settings = kernel.settings();
    u32::from(settings.is_some_and(|settings| settings.is_outside(Be32::from_raw(address))))
}

/// A free port in a set, or [`NONE`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_port(set: u32, wanted: u32, random: u32) -> u32 {
    let kernel = tables();
    let set = kernel.ports(set);
    set.and_then(|set| set.find(wanted as u16, random))
        .map_or(NONE, u32::from)
}

/// What became of taking a port: an [`Insert`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn take_port(
    context: *mut __sk_buff,
    outside: *const EndpointKey,
    mapping: *const Mapping,
) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let outside = unsafe { outside.as_ref() }.copied();
    // SAFETY: as above.
    let mapping = unsafe { mapping.as_ref() }.copied();
    let (Some(outside), Some(mapping)) = (outside, mapping) else {
        return Insert::Full as u32;
    };
    nat::mapping::take(&outside, &mapping, &Kernel::new(context, now())) as u32
}

/// Whether a session may have this half: 0 or 1.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn is_unused(context: *mut __sk_buff, back: *const FlowKey) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let back = unsafe { back.as_ref() }.copied();
    let kernel = Kernel::new(context, now());
    u32::from(back.is_some_and(|back| nat::mapping::is_unused(&back, &kernel)))
}

/// What became of a half of a session: a [`HalfInsert`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn insert_half(
    key: *const FlowKey,
    session: *const Session,
    twin_key: *const FlowKey,
) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let key = unsafe { key.as_ref() }.copied();
    // SAFETY: as above.
    let session = unsafe { session.as_ref() };
    // SAFETY: as above.
    let twin_key = unsafe { twin_key.as_ref() };
    let (Some(key), Some(session), Some(scratch)) = (key, session, scratch()) else {
        return HalfInsert::Full as u32;
    };
    scratch.half = *session;
    nat::session::insert_half(&key, &scratch.half, twin_key, &tables()) as u32
}

/// Ends a session; 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn close_session(key: *const FlowKey, session: *const Session) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let key = unsafe { key.as_ref() }.copied();
    // SAFETY: as above.
    let session = unsafe { session.as_ref() }.copied();
    if let (Some(key), Some(session)) = (key, session) {
        nat::session::close(&key, &session, &tables());
    }
    0
}

/// A checksum, or [`NONE`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn checksum(context: *mut __sk_buff, offset: u32, length: u32) -> u32 {
    parse::checksum(&Skb::new(context, 0), offset, length).map_or(NONE, |sum| u32::from(sum.get()))
}

/// The action for the packet that [`crate::scratch`] knows, which it makes an ICMP error
/// to its sender.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn refuse(context: *mut __sk_buff, refusal: *const Refusal) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let refusal = unsafe { refusal.as_ref() };
    let (Some(refusal), Some(scratch)) = (refusal, scratch()) else {
        return TC_ACT_SHOT.cast_unsigned();
    };
    let mut skb = Skb::new(context, scratch.link_length);
    emit::refuse(&mut skb, &scratch.packet, refusal)
        .unwrap_or(TC_ACT_SHOT)
        .cast_unsigned()
}
