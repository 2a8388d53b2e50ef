//! Guests with IPv6 only that talk to the world's IPv4 (RFC 6146): what stands for them in
//! the tables of IPv4, and for the world in theirs.
//!
//! Such a guest has a *stand-in*, an IPv4 address that nobody has and that is on no wire.
//! Its packets are translated without state ([`crate::siit`]) into packets from the
//! stand-in, which then are like those of any guest with IPv4; and what IPv4's part sends
//! to a stand-in is translated back. So there is one NAT, and this only says who is who.

use core::num::NonZeroU32;

use super::{Insert, Tables, guests::Entry};
use crate::{
    abi::StandIn,
    embed::Prefix,
    frame::LinkAddresses,
    net::{Be32, Be128},
    parse::Packet,
    siit,
    verdict::Reason,
};

/// Stand-ins begin here: behind what [`Address::of_nobody`] is used for elsewhere.
const FIRST: u32 = 1 << 23;
/// Bits that tell stand-ins apart.
const BITS: u32 = 22;
/// Stand-ins that are tried for a guest.
const TRIES: u32 = 4;
/// 2^64 divided by the golden ratio: neighbours become far apart.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// In place of link addresses, for packets to a stand-in.
pub const TO_STAND_IN: LinkAddresses = LinkAddresses::new([0; 6], [0, 0, 0, 0, 0, 64]);

/// How many bytes longer a packet becomes on the way to a guest.
pub const GROWTH: u16 = 20;
/// And how many more if it is a fragment.
pub const FRAGMENT_GROWTH: u16 = 8;

/// The tables that NAT64 needs besides IPv4's.
pub trait StandIns {
    /// Behind which the world's addresses are for guests. `None` without NAT64.
    fn prefix(&self) -> Option<Prefix>;
    /// See [`crate::abi::Nat64::secret`].
    fn secret(&self) -> u32;
    /// Whom an address stands in for.
    fn stand_in(&self, address: Be32) -> Option<&StandIn>;
    fn insert_stand_in(&self, address: Be32, guest: &StandIn) -> Insert;
    /// Has IPv4's tables know a stand-in as a guest on this inside device
    /// ([`super::guests::enter`]), so that there are no more of them than of those.
    fn enter_guest(&self, address: Be32, device: u32) -> Entry;
}

/// Whether the address is of those that stand in for guests.
#[inline(always)]
#[must_use]
pub const fn is_stand_in(address: Be32) -> bool {
    address.get() >> BITS == FIRST >> BITS
}

/// Whether IPv6 packets to this address are for the world's IPv4.
#[inline(always)]
pub fn is_for<S: StandIns>(destination: Be128, stand_ins: &S) -> bool {
    stand_ins
        .prefix()
        .is_some_and(|prefix| prefix.contains(destination))
}

/// The stand-in of a guest, which is made on first use.
#[inline(always)]
fn stand_in_of<S: StandIns>(guest: &StandIn, stand_ins: &S) -> Result<Be32, Reason> {
    let hash = hash_of(guest, stand_ins.secret());
    // One that others made it take it keeps, also when those are gone.
    for attempt in 0..TRIES {
        let address = candidate(hash, attempt);
        if is_of(address, guest, stand_ins) {
            return Ok(address);
        }
    }
    for attempt in 0..TRIES {
        let address = candidate(hash, attempt);
        if stand_ins.stand_in(address).is_some() {
            continue;
        }
        match stand_ins.enter_guest(address, guest.device) {
            Entry::Done => {}
            Entry::DeviceLimit => return Err(Reason::DeviceGuestLimit),
            Entry::Full => return Err(Reason::GuestTableFull),
        }
        if stand_ins.insert_stand_in(address, guest) == Insert::Full {
            return Err(Reason::GuestTableFull);
        }
        // Another CPU may have been faster, for the same guest.
        if is_of(address, guest, stand_ins) {
            return Ok(address);
        }
    }
    Err(Reason::GuestTableFull)
}

#[inline(always)]
fn is_of<S: StandIns>(address: Be32, guest: &StandIn, stand_ins: &S) -> bool {
    stand_ins
        .stand_in(address)
        .is_some_and(|there| there == guest)
}

/// What the stand-ins follow from that a guest may get. Who does not know the secret finds no
/// address of which the same follow as of another guest's.
#[inline(always)]
fn hash_of(guest: &StandIn, secret: u32) -> u32 {
    let mut hash = secret;
    for word in guest.address.words() {
        hash = mix(hash, word.get());
    }
    mix(hash, guest.device)
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "it is taken apart")]
const fn mix(hash: u32, word: u32) -> u32 {
    let product = ((hash ^ word) as u64).wrapping_mul(SPREAD);
    (product >> u32::BITS) as u32 ^ (product as u32).rotate_left(15)
}

#[inline(always)]
const fn candidate(hash: u32, attempt: u32) -> Be32 {
    Be32::new(FIRST | mix(hash, attempt) >> (u32::BITS - BITS))
}

/// What source and destination of a guest's packet become. It came on this inside device.
///
/// # Errors
/// The exit of a packet that is not translated.
#[inline(always)]
pub fn to_ipv4<T: Tables<Be128>, S: StandIns>(
    packet: &Packet<Be128>,
    device: Option<NonZeroU32>,
    tables: &T,
    stand_ins: &S,
) -> Result<(Be32, Be32), Reason> {
    // From the world nobody comes this way.
    let device = device.ok_or(Reason::UnroutableDestination)?;
    let inside = tables.device(device.get()).ok_or(Reason::NoMapping)?;
    if !inside.is_guests(packet.source) {
        return Err(Reason::SpoofedSource);
    }
    let destination = world(packet.destination, stand_ins)?;
    let guest = StandIn {
        address: packet.source,
        device: device.get(),
    };
    Ok((stand_in_of(&guest, stand_ins)?, destination))
}

/// The world's address that is embedded in this one.
///
/// # Errors
/// The exit of packets to addresses that must not be embedded (RFC 6052 section 3.1).
#[inline(always)]
pub fn world<S: StandIns>(address: Be128, stand_ins: &S) -> Result<Be32, Reason> {
    stand_ins
        .prefix()
        .and_then(|prefix| {
            let address = prefix.extract(address)?;
            prefix.may_hold(address).then_some(address)
        })
        .ok_or(Reason::UnroutableDestination)
}

/// The guest that a packet to a stand-in is for, and what its source becomes.
///
/// `six` are the tables of IPv6: what the host itself says, it says from its IPv6 address.
///
/// # Errors
/// The exit of a packet whose guest is forgotten.
#[inline(always)]
pub fn to_ipv6<'a, T: Tables<Be32>, X: Tables<Be128>, S: StandIns>(
    packet: &Packet,
    tables: &T,
    six: &X,
    stand_ins: &'a S,
) -> Result<(&'a StandIn, Be128), Reason> {
    let forgotten = Reason::NotTranslatable;
    let guest = stand_ins.stand_in(packet.destination).ok_or(forgotten)?;
    let is_hosts = tables
        .device(guest.device)
        .is_none_or(|device| device.address == packet.source);
    let source = if is_hosts {
        six.device(guest.device).ok_or(forgotten)?.address
    } else {
        stand_ins.prefix().ok_or(forgotten)?.embed(packet.source)
    };
    Ok((guest, source))
}

/// The exit of a packet that has no counterpart in the other IP version.
#[inline(always)]
#[must_use]
pub const fn exit(why: siit::Untranslatable) -> Reason {
    match why {
        siit::Untranslatable::Truncated => Reason::Truncated,
        siit::Untranslatable::SourceRoute => Reason::SourceRouted,
        siit::Untranslatable::HeaderInFragments => Reason::BadExtensionHeaders,
        siit::Untranslatable::ErrorUnusable => Reason::ErrorUnusable,
        siit::Untranslatable::NoCounterpart => Reason::IcmpTypeNotCarried,
        siit::Untranslatable::ForeignProtocol => Reason::ProtocolNotCarried,
        siit::Untranslatable::TooLong
        | siit::Untranslatable::FragmentedIcmp
        | siit::Untranslatable::FragmentWithoutChecksum => Reason::NotTranslatable,
    }
}
