//! The shell: makes packets as long as they are to be, as the kernel's helpers do, and
//! keeps the sum that a device has computed, as the kernel does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tapnat_common::{
    checksum::Delta,
    embed::Prefix,
    frame::{Frame, Header},
    net::{Be32, Be128},
    network::Network,
    parse::{self, Packet, Transport},
    siit::{
        self, Mtus, Untranslatable, Version,
        error::{self, Kept},
    },
};
use tapnat_testbed::packet::Builder;

use crate::frame::{Bytes, sum};

/// The guest, and what stands in for it in IPv4.
pub const GUEST: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x7a70, 0, 0, 0, 0, 0, 0x10);
pub const STAND_IN: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 7);
/// A server, and what it is in IPv6.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
pub const EMBEDDED: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0xc633, 0x6409);
/// A router on the way.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The identification of whole packets in IPv4.
pub const IDENTIFICATION: u16 = 0x1234;

pub const WIDE: Mtus = Mtus {
    ipv4: u16::MAX,
    ipv6: u16::MAX,
};

fn prefix() -> Prefix {
    let address = Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0, 0);
    Prefix::new(address.into(), 96).unwrap()
}

/// An IP version whose addresses the tests translate.
pub trait Mapped: Version {
    fn map(self) -> Self::Other;
}

impl Mapped for Be32 {
    fn map(self) -> Be128 {
        if self == STAND_IN.into() {
            GUEST.into()
        } else {
            prefix().embed(self)
        }
    }
}

impl Mapped for Be128 {
    fn map(self) -> Be32 {
        if self == GUEST.into() {
            STAND_IN.into()
        } else {
            // Any other is as good as any.
            prefix().extract(self).unwrap_or(ROUTER.into())
        }
    }
}

/// An address of the tests in IPv4, and in IPv6.
pub fn in_both(address: Ipv4Addr) -> (IpAddr, IpAddr) {
    let other = Ipv6Addr::from(Be32::from(address).map());
    (address.into(), other.into())
}

/// The same packet in both versions, given how it is made between two addresses.
pub fn twins(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    make: impl Fn(IpAddr, IpAddr) -> Builder,
) -> (Builder, Builder) {
    let (source, destination) = (in_both(source), in_both(destination));
    (make(source.0, destination.0), make(source.1, destination.1))
}

/// Sets traffic class or type of service, of a packet without a link header.
pub fn with_traffic_class(mut packet: Vec<u8>, class: u8) -> Vec<u8> {
    if packet[0] >> 4 == 6 {
        packet[0] = 0x60 | class >> 4;
        packet[1] = packet[1] & 0x0f | class << 4;
    } else {
        packet[1] = class;
        let header = usize::from(packet[0] & 0xf) * 4;
        packet[10..12].fill(0);
        let check = !sum(&packet[..header]);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
    }
    packet
}

/// A packet as the kernel has it.
#[derive(Clone, Debug)]
pub struct Skb {
    pub bytes: Bytes,
    /// The sum of everything behind the link header, if a device has computed it
    /// (`CHECKSUM_COMPLETE`).
    pub complete: Option<u16>,
}

impl Skb {
    pub fn new(bytes: Bytes) -> Self {
        Self {
            bytes,
            complete: None,
        }
    }

    /// Whatever the device would have computed.
    pub fn with_sum(bytes: Bytes) -> Self {
        let complete = Some(sum(bytes.ip()));
        Self { bytes, complete }
    }

    /// Whether the sum is that of what is there. The two zeros are one.
    pub fn has_right_sum(&self) -> bool {
        self.complete
            .is_none_or(|complete| complete % 0xffff == sum(self.bytes.ip()) % 0xffff)
    }

    /// Corrects the sum for bytes that change.
    fn replace_in_sum(&mut self, at: usize, old: &[u8], new: &[u8]) {
        let odd = (at - self.bytes.link_length) % 2 == 1;
        let of = |bytes: &[u8]| sum(&[&[0; 1][..usize::from(odd)], bytes].concat());
        if let Some(complete) = self.complete {
            let parts = [complete, !of(old), of(new)].map(u16::to_be_bytes);
            self.complete = Some(sum(&parts.concat()));
        }
    }

    /// `bpf_skb_adjust_room` with `BPF_ADJ_ROOM_MAC`, also what `bpf_skb_change_proto`
    /// does to the bytes.
    fn adjust_room(&mut self, room: isize) {
        let at = self.bytes.link_length;
        let size = room.unsigned_abs();
        if room >= 0 {
            self.bytes.make_room(size);
            return;
        }
        let gone: Vec<u8> = self.bytes.bytes.drain(at..at + size).collect();
        self.replace_in_sum(at, &gone, &[]);
        self.bytes.linear -= size;
        if let Some(partial) = &mut self.bytes.partial {
            partial.start -= size;
            partial.field -= size;
        }
    }

    /// `bpf_skb_change_tail`. What is new is anything.
    fn change_tail(&mut self, length: usize) {
        let old = self.bytes.bytes.len();
        if length > old {
            self.bytes.bytes.resize(length, 0xa5);
            self.complete = None;
        } else {
            let gone = self.bytes.bytes.split_off(length);
            self.replace_in_sum(length, &gone, &[]);
        }
        self.bytes.linear = self.bytes.linear.min(length);
    }

    /// `bpf_skb_store_bytes` with `BPF_F_RECOMPUTE_CSUM`.
    fn store_bytes(&mut self, at: usize, new: &[u8]) {
        let old = self.bytes.bytes[at..at + new.len()].to_vec();
        self.replace_in_sum(at, &old, new);
        self.bytes.bytes[at..at + new.len()].copy_from_slice(new);
    }
}

impl Frame for Skb {
    fn length(&self) -> u32 {
        self.bytes.length()
    }

    fn link_length(&self) -> u32 {
        self.bytes.link_length()
    }

    fn is_tagged(&self) -> bool {
        self.bytes.is_tagged()
    }

    fn segment_size(&self) -> u32 {
        self.bytes.segment_size()
    }

    fn pull(&mut self, length: u32) {
        self.bytes.pull(length);
    }

    fn load<T: Header>(&self, offset: u32) -> Option<T> {
        self.bytes.load(offset)
    }

    fn store<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        self.bytes.store(offset, header)
    }

    fn read<T: Header>(&self, offset: u32) -> Option<T> {
        self.bytes.read(offset)
    }

    fn write<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        self.bytes.write(offset, header)
    }

    fn overwrite<T: Header>(&mut self, offset: u32, header: &T) -> Option<()> {
        let at = usize::try_from(offset).unwrap();
        let range = at..at + size_of::<T>();
        let old = self.bytes.bytes.get(range.clone())?.to_vec();
        self.bytes.write(offset, header)?;
        let new = self.bytes.bytes[range].to_vec();
        self.replace_in_sum(at, &old, &new);
        Some(())
    }

    fn update_checksum<A: Network>(
        &mut self,
        offset: u32,
        addresses: Delta,
        ports: Delta,
        zero_means_none: bool,
    ) -> Option<()> {
        let is_none = zero_means_none && self.read::<[u8; 2]>(offset)? == [0; 2];
        self.bytes
            .update_checksum::<A>(offset, addresses, ports, zero_means_none)?;
        // inet_proto_csum_replace_by_diff(), without `BPF_F_IPV6`.
        if let Some(complete) = self.complete
            && A::HAS_HEADER_CHECKSUM
            && !is_none
        {
            let [a, b, c, d] = addresses.wide().to_ne_bytes();
            let less = !sum(&[a, b, c, d]);
            let both = [complete, less].map(u16::to_be_bytes);
            self.complete = Some(sum(&both.concat()));
        }
        Some(())
    }
}

/// Translates the packet, as the kernel's shell does.
pub fn translate<A: Mapped>(skb: &mut Skb, mtus: Mtus) -> Result<(), Untranslatable>
where
    A::Other: Mapped,
{
    skb.pull(255);
    let mut packet = Packet::<A>::default();
    parse::parse(skb, &mut packet).unwrap();
    let ends = (packet.source.map(), packet.destination.map());
    let identification = Be32::new(IDENTIFICATION.into());
    let difference = difference::<A>();
    if packet.transport != Transport::IcmpError {
        let mut plan = siit::plan(skb, &packet, ends, identification)?;
        if let Some((offset, length)) = plan.unsummed() {
            let offset = usize::try_from(offset).unwrap();
            let length = usize::try_from(length).unwrap();
            let sum = sum(&skb.bytes.bytes[offset..offset + length]);
            plan.set_sum(u16::from_ne_bytes(sum.to_be_bytes()).into());
        }
        skb.adjust_room(difference);
        skb.adjust_room(isize::try_from(plan.room()).unwrap());
        plan.apply(skb).unwrap();
        return Ok(());
    }
    let mut plan = error::Translation::<A::Other>::default();
    plan.ends = ends;
    plan.read(skb, &packet)?;
    plan.quote_ends = (plan.quote.source.map(), plan.quote.destination.map());
    plan.plan(skb, &packet, mtus, identification)?;
    let copy = skb.bytes.bytes.clone();
    skb.adjust_room(difference);
    skb.change_tail(usize::try_from(plan.length()).unwrap());
    for Kept { from, to, length } in plan.parts() {
        let [from, to, length] = [from, to, length].map(|it| usize::try_from(it).unwrap());
        skb.store_bytes(to, &copy[from..from + length]);
    }
    plan.apply(skb).unwrap();
    Ok(())
}

/// By how much longer the other version's header is.
fn difference<A: Version>() -> isize {
    let [here, there] = [A::HEADER, A::Other::HEADER].map(|it| isize::try_from(it).unwrap());
    there - here
}

/// Translates a packet without a link header, to whichever version it is not.
pub fn translated(packet: &[u8], mtus: Mtus) -> Result<Vec<u8>, Untranslatable> {
    let mut skb = Skb::with_sum(Bytes::raw(packet));
    if packet[0] >> 4 == 4 {
        translate::<Be32>(&mut skb, mtus)?;
    } else {
        translate::<Be128>(&mut skb, mtus)?;
    }
    assert!(skb.has_right_sum(), "{skb:?}");
    Ok(skb.bytes.bytes)
}
