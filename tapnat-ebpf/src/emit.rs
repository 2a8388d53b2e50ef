//! A packet's exit: up to the host, dropped, refused with an ICMP error, or out
//! of a device.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_INGRESS, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{
        bpf_clone_redirect, bpf_csum_diff, bpf_redirect, bpf_redirect_neigh, bpf_skb_adjust_room,
        bpf_skb_change_head, bpf_skb_change_tail,
    },
};
use tapnat_common::{
    abi::{FragmentKey, HeldKey, MAX_HELD, NextHop},
    checksum,
    cut::{self, MAX_FRAME, Piece},
    frame::{Frame, LinkAddresses, lengths::ETHERNET},
    net::Be16,
    parse::{Packet, Part, Transport},
    refusal::{self, Budget, Refusal},
    time::Instant,
};

use crate::{
    maps::{self, Maps, WHOLE_BYTES, Whole},
    skb::Skb,
};

/// Sends the rewritten packet on. `resolve`: let the kernel look the next hop's
/// link addresses up. `None` when its memory refuses a change.
#[inline(always)]
pub fn forward<A: Maps>(skb: &mut Skb, next_hop: &NextHop, resolve: bool) -> Option<i32> {
    if skb.link_length() == 0 {
        return forward_raw::<A>(skb, next_hop, resolve);
    }
    if !resolve {
        skb.store(0, &next_hop.link)?;
        return Some(redirect(next_hop.device));
    }
    Some(redirect_neighbour(next_hop.device))
}

/// Sends on a packet that came without a link header: as it is to a device that
/// has none either, else with a new Ethernet header.
#[inline(always)]
fn forward_raw<A: Maps>(skb: &mut Skb, next_hop: &NextHop, resolve: bool) -> Option<i32> {
    let is_ethernet = A::devices().get_ptr(next_hop.device).is_some_and(|device| {
        // SAFETY: the kernel keeps the value's memory for the program's run.
        unsafe { (*device).ethernet != 0 }
    });
    if !is_ethernet {
        return Some(redirect(next_hop.device));
    }
    // SAFETY: the context is valid; the helper checks the length.
    if unsafe { bpf_skb_change_head(skb.context(), ETHERNET, 0) } != 0 {
        return None;
    }
    skb.store(0, &next_hop.link)?;
    skb.store(ETHERNET - 2, &A::ETHERTYPE)?;
    Some(if resolve {
        redirect_neighbour(next_hop.device)
    } else {
        redirect(next_hop.device)
    })
}

#[inline(always)]
fn redirect(device: u32) -> i32 {
    // SAFETY: no preconditions.
    unsafe { bpf_redirect(device, 0) as i32 }
}

/// Lets the kernel route by the packet's destination, out of this device, and
/// find (and so keep alive) the neighbour.
#[inline(always)]
fn redirect_neighbour(device: u32) -> i32 {
    // SAFETY: a null pointer with length 0 asks for the kernel's own routing.
    unsafe { bpf_redirect_neigh(device, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Keeps the frame for when its datagram's first fragment comes.
#[inline(always)]
pub fn hold<A: Maps>(skb: &Skb, key: &HeldKey<A>) {
    let Some(frame) = maps::FRAME.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    let frame = unsafe { &mut *frame };
    frame.length = skb.length();
    if skb.read_into(&mut frame.bytes, 0, frame.length).is_some() {
        // An LRU table makes room; if it cannot, the fragment is lost.
        let _ = A::held().insert(key, frame, u64::from(BPF_ANY));
    }
}

/// Lets the fragments come by again that waited for this first one, which is about to
/// leave.
#[inline(always)]
pub fn release<A: Maps>(skb: &mut Skb, count: u32, datagram: FragmentKey<A>) -> Option<()> {
    let whole = maps::WHOLE.get_ptr_mut(0)?;
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    let whole = unsafe { &mut *whole };
    let length = skb.length();
    if length <= MAX_FRAME && skb.read_into(whole, 0, length).is_some() {
        come_again(skb, datagram, count);
        skb.replace_with(whole, length)?;
    }
    Some(())
}

/// Lets held fragments come by again, as clones of this skb, into which they are
/// copied.
#[inline(always)]
fn come_again<A: Maps>(skb: &mut Skb, datagram: FragmentKey<A>, count: u32) {
    for index in 0..MAX_HELD {
        if index >= count {
            break;
        }
        let key = HeldKey { datagram, index };
        // Without one of its fragments the rest of the datagram is of no use.
        let Some(held) = A::held().get_ptr(key) else {
            break;
        };
        // SAFETY: the kernel keeps the value's memory for the program's run.
        let held = unsafe { &*held };
        if skb.replace_with(&held.bytes, held.length).is_none() {
            break;
        }
        let _ = A::held().remove(key);
        if arrive_again(skb).is_none() {
            break;
        }
    }
}

/// Puts a clone of the packet where it arrived, behind what waits there already.
#[inline(always)]
fn arrive_again(skb: &Skb) -> Option<()> {
    let flags = u64::from(BPF_F_INGRESS);
    // SAFETY: the context is valid for the program's run.
    let result = unsafe { bpf_clone_redirect(skb.context(), skb.device(), flags) };
    (result == 0).then_some(())
}

/// Copies the packet for [`send_piece`], with its transport checksum complete.
#[inline(always)]
pub fn prepare_cut(skb: &mut Skb, packet: &Packet) -> Option<()> {
    let whole = maps::WHOLE.get_ptr_mut(0)?;
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    let whole = unsafe { &mut *whole };
    // Without what Ethernet fills short frames up with.
    skb.read_into(whole, 0, packet.network_offset + packet.length)?;
    if packet.part != Part::Whole {
        return Some(());
    }
    complete_checksum(skb, packet, whole)
}

/// Lets a piece of the packet come by.
#[inline(always)]
pub fn send_piece(skb: &mut Skb, packet: &Packet, piece: Piece) -> Option<()> {
    let whole = maps::WHOLE.get_ptr(0)?;
    // SAFETY: as above.
    let whole = unsafe { &*whole };
    let headers = packet.network_offset + packet.header_length;
    skb.replace_with_parts(whole, headers, headers + piece.start, piece.length)?;
    cut::write_header(skb, packet, piece)?;
    arrive_again(skb)
}

/// Completes the transport checksum in `whole` if a device was to do that, which
/// it cannot do piece by piece. The skb, whose contents are in `whole`, is of no
/// other use from then on.
#[inline(always)]
fn complete_checksum(skb: &mut Skb, packet: &Packet, whole: &mut Whole) -> Option<()> {
    let transport = packet.transport_offset();
    if !skb.has_partial_checksum(transport)? {
        return Some(());
    }
    let is_udp = packet.transport == Transport::Udp;
    if !is_udp && packet.transport != Transport::Tcp {
        return None;
    }
    let length = packet.length - packet.header_length;
    // What is there holds the sum of the pseudo-header, and so belongs in the sum.
    let mut check = checksum::finish(sum(whole, transport, length));
    if is_udp && check == Be16::ZERO {
        check = Be16::new(0xffff);
    }
    let offset = packet.checksum_offset()? as usize & (WHOLE_BYTES / 2 - 1);
    let [high, low] = check.bytes();
    whole[offset] = high;
    whole[offset + 1] = low;
    skb.forget_partial_checksum(transport)
}

/// The sum of so many bytes of `whole`, as `bpf_csum_diff` makes it. Overwrites up
/// to three bytes after them.
///
/// Only the last block's size and place depend on the length, so that the verifier has one
/// way to go behind each of the others.
#[inline(always)]
fn sum(whole: &mut Whole, start: u32, length: u32) -> u32 {
    let start = start as usize & 0x7f;
    let length = length as usize & (WHOLE_BYTES / 2 - 1);
    let end = start + length;
    for padding in 0..3 {
        whole[end + padding] = 0;
    }
    let mut total = 0;
    for number in 1..=WHOLE_BYTES / 2 / BLOCK {
        if number * BLOCK > length {
            break;
        }
        total = add_block(whole, start + (number - 1) * BLOCK, BLOCK, total);
    }
    let rest = length % BLOCK;
    let at = start + (length & !(BLOCK - 1));
    add_block(whole, at, (rest + 3) & !3, total)
}

/// Bytes that kernels before 6.13 sum up at once.
const BLOCK: usize = 512;

/// Adds bytes, whole words of them and [`BLOCK`] at most, to a sum: what the helper does not
/// refuse.
#[inline(always)]
fn add_block(whole: &Whole, at: usize, size: usize, sum: u32) -> u32 {
    let from = whole.as_ptr().wrapping_add(at).cast_mut().cast();
    // SAFETY: the helper reads `size` bytes, which lie in the array.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, from, size as u32, sum) };
    sum.cast_unsigned() as u32
}

/// The sum of so many bytes of the packet, at least 1 and at most 8 KiB.
#[inline(always)]
pub fn sum_of(skb: &Skb, offset: u32, length: u32) -> Option<u32> {
    let whole = maps::WHOLE.get_ptr_mut(0)?;
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    let whole = unsafe { &mut *whole };
    skb.read_into(whole, offset, length)?;
    Some(sum(whole, 0, length))
}

/// Whether this sender was not told of too many errors lately.
#[inline(always)]
pub fn may_tell<A: Maps>(sender: A, now: Instant) -> bool {
    if A::told().get_ptr_mut(sender).is_none() {
        // If the table cannot make room, the look-up tells.
        let _ = A::told().insert(sender, Budget::default(), u64::from(BPF_ANY));
    }
    A::told().get_ptr_mut(sender).is_some_and(|budget| {
        // SAFETY: the kernel keeps the value's memory for the program's run. That
        // other CPUs may count in it at the same time costs an error or two.
        unsafe { (*budget).take(now) }
    })
}

/// Turns the packet into an ICMP error to its sender and sends it back.
#[inline(always)]
pub fn refuse<A: Maps>(skb: &mut Skb, packet: &Packet<A>, refusal: &Refusal<A>) -> Option<i32> {
    if !refusal::may_answer(packet) {
        return None;
    }
    let link = skb.link_length();
    let quoted = link + refusal::quoted_length(packet);
    skb.pull(quoted);
    let sum = refusal::quoted_sum(skb, packet)?;
    // SAFETY: the context is valid; the helper checks the length.
    if unsafe { bpf_skb_change_tail(skb.context(), quoted, 0) } != 0 {
        return None;
    }
    let room = size_of::<A::ErrorHeader>() as i32;
    // SAFETY: as above.
    if unsafe { bpf_skb_adjust_room(skb.context(), room, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        return None;
    }
    skb.store(link, &refusal::header(packet, refusal, sum))?;
    if link != 0 {
        let link = skb.load::<LinkAddresses>(0)?;
        skb.store(0, &link.swapped())?;
    }
    Some(redirect(skb.device()))
}
