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
//! [`Workspace`], before it goes to a table: until Linux 6.2 tables take keys and
//! values from nowhere else. Results are numbers.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use tapnat_common::{
    abi::{EndpointKey, FlowKey, Mapping, Session},
    checksum,
    nat::{self, HalfInsert, Insert, Tables as _, guests::Entry},
    net::{Be32, Be128},
    refusal::Refusal,
    time::Instant,
};

use crate::{
    emit,
    maps::{Maps, Workspace},
    scratch,
    skb::Skb,
    tables::{Kernel, Routed, workspace},
};

/// In place of a number of 16 bits where there is none.
pub const NONE: u32 = u32::MAX;

/// An IP version with the functions for it.
pub trait Apart: Maps {
    /// Whether the pool has the address.
    fn is_outside(address: *const Self) -> u32;
    /// A free port in a set, or [`NONE`].
    fn find_port(set: u32, wanted: u32, random: u32) -> u32;
    /// The place of a port that is taken, as [`nat::upkeep::next_taken`] tells it.
    fn next_taken(set: u32, place: u32) -> u32;
    /// What became of the entry of a guest on an inside device: an [`Entry`].
    fn enter_guest(address: *const Self, device: u32) -> u32;
    /// What became of taking a port: an [`Insert`].
    fn take_port(
        context: *mut __sk_buff,
        outside: *const EndpointKey<Self>,
        mapping: *const Mapping<Self>,
        is_at_limit: u32,
        now: u32,
    ) -> u32;
    /// Whether a session may have this half: 0 or 1.
    fn is_unused(context: *mut __sk_buff, back: *const FlowKey<Self>, now: u32) -> u32;
    /// What became of a half of a session: a [`HalfInsert`].
    fn insert_half(
        key: *const FlowKey<Self>,
        session: *const Session<Self>,
        twin_key: *const FlowKey<Self>,
        now: u32,
    ) -> u32;
    /// Ends a session; 0.
    fn close_session(key: *const FlowKey<Self>, kept: *const FlowKey<Self>, now: u32) -> u32;
    /// The action for the packet that [`crate::scratch`] knows, which it makes an ICMP
    /// error to its sender.
    fn refuse(context: *mut __sk_buff, refusal: *const Refusal<Self>) -> u32;
}

/// The tables for what looks at nothing else but the time, of which
/// [`Instant::number`] is `now`: an argument that is not used reaches no function.
#[inline(always)]
fn tables<A: Routed>(now: u32) -> Kernel<A> {
    Kernel::new(core::ptr::null_mut(), Instant::from_number(now))
}

/// A copy of what an argument points to.
#[inline(always)]
fn copied<T: Copy>(argument: *const T) -> Option<T> {
    // SAFETY: null, or as the verifier has seen to.
    unsafe { argument.as_ref() }.copied()
}

#[inline(always)]
fn is_outside<A: Routed>(address: *const A) -> u32 {
    let kernel = tables::<A>(0);
    let settings = kernel.settings();
    u32::from(
        copied(address)
            .zip(settings)
            .is_some_and(|(address, settings)| settings.is_outside(address)),
    )
}

#[inline(always)]
fn find_port<A: Routed>(set: u32, wanted: u32, random: u32) -> u32 {
    let kernel = tables::<A>(0);
    let set = kernel.ports(set);
    set.and_then(|set| set.find(wanted as u16, random))
        .map_or(NONE, u32::from)
}

#[inline(always)]
fn next_taken<A: Routed>(set: u32, place: u32) -> u32 {
    nat::upkeep::next_taken(set, place, &tables::<A>(0))
}

#[inline(always)]
fn enter_guest<A: Routed>(address: *const A, device: u32) -> u32 {
    let entry = match copied(address) {
        Some(address) => nat::guests::enter(address, device, &tables::<A>(0)),
        None => Entry::Full,
    };
    entry as u32
}

#[inline(always)]
fn take_port<A: Routed>(
    context: *mut __sk_buff,
    outside: *const EndpointKey<A>,
    mapping: *const Mapping<A>,
    is_at_limit: u32,
    now: u32,
) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let outside = unsafe { outside.as_ref() };
    // SAFETY: as above.
    let mapping = unsafe { mapping.as_ref() };
    let (Some(outside), Some(mapping), Some(workspace)) = (outside, mapping, workspace::<A>())
    else {
        return Insert::Full as u32;
    };
    workspace.outside = *outside;
    workspace.mapping = *mapping;
    let Workspace {
        outside, mapping, ..
    } = workspace;
    let kernel = Kernel::new(context, Instant::from_number(now));
    nat::mapping::take(outside, mapping, is_at_limit != 0, &kernel) as u32
}

#[inline(always)]
fn is_unused<A: Routed>(context: *mut __sk_buff, back: *const FlowKey<A>, now: u32) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let back = unsafe { back.as_ref() };
    let (Some(back), Some(workspace)) = (back, workspace::<A>()) else {
        return 0;
    };
    workspace.key = *back;
    let kernel = Kernel::<A>::new(context, Instant::from_number(now));
    u32::from(nat::mapping::is_unused(&workspace.key, &kernel))
}

#[inline(always)]
fn insert_half<A: Routed>(
    key: *const FlowKey<A>,
    session: *const Session<A>,
    twin_key: *const FlowKey<A>,
    now: u32,
) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let key = unsafe { key.as_ref() };
    // SAFETY: as above.
    let session = unsafe { session.as_ref() };
    // SAFETY: as above.
    let twin_key = unsafe { twin_key.as_ref() };
    let (Some(key), Some(session), Some(workspace)) = (key, session, workspace::<A>()) else {
        return HalfInsert::Full as u32;
    };
    workspace.key = *key;
    workspace.half = *session;
    let Workspace { key, half, .. } = workspace;
    nat::session::insert_half(key, half, twin_key, &tables::<A>(now)) as u32
}

#[inline(always)]
fn close_session<A: Routed>(key: *const FlowKey<A>, kept: *const FlowKey<A>, now: u32) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let key = unsafe { key.as_ref() };
    // SAFETY: as above.
    let kept = unsafe { kept.as_ref() };
    if let (Some(key), Some(workspace)) = (key, workspace::<A>()) {
        workspace.key = *key;
        nat::session::close(&workspace.key, kept, &tables::<A>(now));
    }
    0
}

#[inline(always)]
fn refuse<A: Routed>(context: *mut __sk_buff, refusal: *const Refusal<A>) -> u32 {
    // SAFETY: null, or as the verifier has seen to.
    let refusal = unsafe { refusal.as_ref() };
    let (Some(refusal), Some(scratch)) = (refusal, scratch::<A>()) else {
        return TC_ACT_SHOT.cast_unsigned();
    };
    let mut skb = Skb::new(context, scratch.link_length);
    emit::refuse(&mut skb, &scratch.packet, refusal)
        .unwrap_or(TC_ACT_SHOT)
        .cast_unsigned()
}

macro_rules! apart {
    ($address:ty: $($name:ident $function:ident($($argument:ident: $type:ty),*),)*) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name($($argument: $type),*) -> u32 {
                $function::<$address>($($argument),*)
            }
        )*
        impl Apart for $address {
            $(
                #[inline(always)]
                fn $function($($argument: $type),*) -> u32 {
                    $name($($argument),*)
                }
            )*
        }
    };
}

apart! {
    Be32:
    is_outside4 is_outside(address: *const Be32),
    find_port4 find_port(set: u32, wanted: u32, random: u32),
    next_taken4 next_taken(set: u32, place: u32),
    enter_guest4 enter_guest(address: *const Be32, device: u32),
    take_port4 take_port(
        context: *mut __sk_buff,
        outside: *const EndpointKey,
        mapping: *const Mapping,
        is_at_limit: u32,
        now: u32
    ),
    is_unused4 is_unused(
        context: *mut __sk_buff,
        back: *const FlowKey,
        now: u32
    ),
    insert_half4 insert_half(
        key: *const FlowKey,
        session: *const Session,
        twin_key: *const FlowKey,
        now: u32
    ),
    close_session4 close_session(key: *const FlowKey, kept: *const FlowKey, now: u32),
    refuse4 refuse(context: *mut __sk_buff, refusal: *const Refusal),
}
apart! {
    Be128:
    is_outside6 is_outside(address: *const Be128),
    find_port6 find_port(set: u32, wanted: u32, random: u32),
    next_taken6 next_taken(set: u32, place: u32),
    enter_guest6 enter_guest(address: *const Be128, device: u32),
    take_port6 take_port(
        context: *mut __sk_buff,
        outside: *const EndpointKey<Be128>,
        mapping: *const Mapping<Be128>,
        is_at_limit: u32,
        now: u32
    ),
    is_unused6 is_unused(
        context: *mut __sk_buff,
        back: *const FlowKey<Be128>,
        now: u32
    ),
    insert_half6 insert_half(
        key: *const FlowKey<Be128>,
        session: *const Session<Be128>,
        twin_key: *const FlowKey<Be128>,
        now: u32
    ),
    close_session6 close_session(
        key: *const FlowKey<Be128>,
        kept: *const FlowKey<Be128>,
        now: u32
    ),
    refuse6 refuse(context: *mut __sk_buff, refusal: *const Refusal<Be128>),
}

/// The checksum of so many bytes, or [`NONE`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn checksum_of(context: *mut __sk_buff, offset: u32, length: u32) -> u32 {
    let sum = emit::sum_of(&Skb::new(context, 0), offset, length);
    sum.map_or(NONE, |sum| u32::from(checksum::finish(sum).get()))
}
