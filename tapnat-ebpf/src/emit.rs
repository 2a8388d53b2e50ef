//! A packet's exit: up to the host, dropped, refused with an ICMP error, or out
//! of a device.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_INGRESS, TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{
        bpf_clone_redirect, bpf_redirect, bpf_redirect_neigh, bpf_skb_adjust_room,
        bpf_skb_change_head, bpf_skb_change_tail,
    },
};
use tapnat_common::{
    abi::{FragmentKey, HeldKey, MAX_HELD, NextHop},
    frame::{Frame, LinkAddresses},
    parse::Packet,
    refusal::{self, HEADER_LENGTH, Refusal},
    rewrite,
};

use crate::{
    maps::{self, Scratch},
    skb::Skb,
};

/// Sends the rewritten packet on. `resolve`: let the kernel look the next hop's
/// link addresses up. `None` when its memory refuses a change.
#[inline(always)]
pub fn forward(skb: &mut Skb, next_hop: &NextHop, resolve: bool) -> Option<i32> {
    if skb.link_length() == 0 {
        return forward_raw(skb, next_hop, resolve);
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
fn forward_raw(skb: &mut Skb, next_hop: &NextHop, resolve: bool) -> Option<i32> {
    const ETHERNET: u32 = 14;
    const IPV4: [u8; 2] = [0x08, 0x00];
    let is_ethernet = maps::DEVICES
        .get_ptr(next_hop.device)
        .is_some_and(|device| {
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
    skb.store(ETHERNET - 2, &IPV4)?;
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
pub fn hold(skb: &Skb, key: &HeldKey) {
    let Some(frame) = maps::FRAME.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: this CPU's own; programs at one hook do not interrupt each other.
    let frame = unsafe { &mut *frame };
    frame.length = skb.length();
    if skb.read_into(&mut frame.bytes, frame.length).is_some() {
        // An LRU table makes room; if it cannot, the fragment is lost.
        let _ = maps::HELD.insert(key, frame, u64::from(BPF_ANY));
    }
}

/// Sends a first fragment, and after it those that waited for it; they all leave
/// by clones of its skb, into which they are copied.
///
/// To a guest or the world they go translated, as long as the link addresses of
/// the next hop are known. To the host they go as they came, through this hook
/// again.
#[inline(always)]
pub fn release(skb: &mut Skb, scratch: &mut Scratch, datagram: FragmentKey, to_host: bool) -> i32 {
    let Scratch {
        plan, link_length, ..
    } = &*scratch;
    let link_length = *link_length;
    let next_hop = plan.rewrite.next_hop;
    let (device, flags) = if to_host {
        (skb.device(), u64::from(BPF_F_INGRESS))
    } else {
        (next_hop.device, 0)
    };
    if !to_host && skb.link_length() != 0 && !next_hop.is_linked() {
        // The kernel asks for the neighbour; the rest has to come again.
        return forward(skb, &next_hop, true).unwrap_or(TC_ACT_SHOT);
    }
    if send_clone(skb, &next_hop, to_host, (device, flags)).is_none() {
        return TC_ACT_SHOT;
    }
    for index in 0..MAX_HELD {
        if index >= plan.held {
            break;
        }
        let key = HeldKey { datagram, index };
        // Without one of its fragments the rest of the datagram is of no use.
        let Some(held) = maps::HELD.get_ptr(key) else {
            break;
        };
        // SAFETY: the kernel keeps the value's memory for the program's run.
        let held = unsafe { &*held };
        if !to_host && held.length > link_length + u32::from(plan.mtu) {
            break;
        }
        if skb.replace_with(&held.bytes, held.length).is_none() {
            break;
        }
        let _ = maps::HELD.remove(key);
        if !to_host && rewrite::apply_network(skb, link_length, &plan.rewrite).is_none() {
            break;
        }
        if send_clone(skb, &next_hop, to_host, (device, flags)).is_none() {
            break;
        }
    }
    // The clones have left; this was only what they were cut from.
    TC_ACT_SHOT
}

#[inline(always)]
fn send_clone(
    skb: &mut Skb,
    next_hop: &NextHop,
    to_host: bool,
    (device, flags): (u32, u64),
) -> Option<()> {
    if !to_host && skb.link_length() != 0 {
        skb.store(0, &next_hop.link)?;
    }
    // SAFETY: the context is valid for the program's run.
    let result = unsafe { bpf_clone_redirect(skb.context(), device, flags) };
    (result == 0).then_some(())
}

/// Turns the packet into an ICMP error to its sender and sends it back.
#[inline(never)]
pub fn refuse(skb: &mut Skb, packet: &Packet, refusal: Refusal) -> i32 {
    answer(skb, packet, &refusal).unwrap_or(TC_ACT_SHOT)
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
    Some(redirect(skb.device()))
}
