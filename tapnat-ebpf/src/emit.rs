//! A packet's exit: up to the host, dropped, refused with an ICMP error, or out
//! of a device.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{
        bpf_redirect, bpf_redirect_neigh, bpf_skb_adjust_room, bpf_skb_change_tail,
    },
};
use core::ptr;
use tapnat_common::{
    abi::NextHop,
    frame::{Frame, LinkAddresses},
    parse::Packet,
    refusal::{self, HEADER_LENGTH, Refusal},
};

use crate::skb::Skb;

/// Sends the rewritten packet on.
#[inline(always)]
pub fn forward(skb: &mut Skb, next_hop: &NextHop, resolve: bool) -> i32 {
    if skb.link_length() != 0 && !resolve {
        if skb.store(0, &next_hop.link).is_none() {
            return TC_ACT_SHOT;
        }
        // SAFETY: no preconditions.
        return unsafe { bpf_redirect(next_hop.device, 0) } as i32;
    }
    // Without parameters the kernel routes by the packet's destination, out of
    // this device, and finds (and so keeps alive) the neighbour itself.
    // SAFETY: a null pointer with length 0 is what the helper asks for.
    unsafe { bpf_redirect_neigh(next_hop.device, ptr::null_mut(), 0, 0) as i32 }
}

/// Turns the packet into an ICMP error to its sender and sends it back.
#[inline(never)]
pub fn refuse(skb: &mut Skb, packet: &Packet, refusal: &Refusal) -> i32 {
    answer(skb, packet, refusal).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn answer(skb: &mut Skb, packet: &Packet, refusal: &Refusal) -> Option<i32> {
    if !refusal::may_answer(packet) {
        return None;
    }
    let link = skb.link_length();
    let quoted = link + refusal::quoted_length(packet);
    skb.pull(quoted);
    let header = refusal::build(skb, packet, refusal)?;
    // SAFETY: the context is valid; the helper checks the length.
    if unsafe { bpf_skb_change_tail(skb.context(), quoted, 0) } != 0 {
        return None;
    }
    let room = HEADER_LENGTH as i32;
    // SAFETY: as above.
    if unsafe { bpf_skb_adjust_room(skb.context(), room, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        return None;
    }
    skb.store(link, &header)?;
    if link != 0 {
        let link = skb.load::<LinkAddresses>(0)?;
        skb.store(0, &link.swapped())?;
    }
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect(skb.device(), 0) } as i32)
}
