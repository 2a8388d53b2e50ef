//! Who is known: a guest has an entry from its first session on.
//!
//! Owns how many entries the guests behind one inside device may have. A guest may use every
//! address of its device's network, and so could take the room of those behind other
//! devices. So a device may have no more guests than there is room left for: one that takes
//! all it can get leaves half of what it found, and it takes thirteen to leave nothing.
//! What a guest may do is counted in its entry, by who does it.

use super::{Insert, Tables};
use crate::{
    abi::{EVERY_DEVICE, Guest, MOST_GUESTS},
    network::Network,
    verdict::Reason,
};

/// What became of an entry that a guest is to have.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Done,
    /// The device has its share.
    DeviceLimit,
    Full,
}

/// What the guest on this inside device uses; made on first use.
#[inline(always)]
pub(super) fn of<A: Network, T: Tables<A>>(
    address: A,
    device: u32,
    tables: &T,
) -> Result<&mut Guest, Reason> {
    if let Some(guest) = tables.guest(address)
        && guest.device == device
    {
        return Ok(guest);
    }
    match tables.enter_guest(address, device) {
        Entry::Done => tables.guest(address).ok_or(Reason::GuestTableFull),
        Entry::DeviceLimit => Err(Reason::DeviceGuestLimit),
        Entry::Full => Err(Reason::GuestTableFull),
    }
}

/// Sees to it that the guest is known, and counted on this inside device.
#[inline(always)]
pub fn enter<A: Network, T: Tables<A>>(address: A, device: u32, tables: &T) -> Entry {
    if let Some(guest) = tables.guest(address) {
        // It moved, or its device was made anew.
        let before = guest.device;
        if before != device {
            guest.device = device;
            count_off(before, tables);
            count_on(device, tables);
        }
        return Entry::Done;
    }
    let (Some(all), Some(own)) = (tables.guests_on(EVERY_DEVICE), tables.guests_on(device)) else {
        return Entry::Full;
    };
    let room = MOST_GUESTS.saturating_sub(*all);
    // Two that forget guests at once may make it less than none, which is very many.
    if room != 0 && (room..=MOST_GUESTS).contains(own) {
        return Entry::DeviceLimit;
    }
    let guest = Guest {
        device,
        ..Guest::default()
    };
    match tables.insert_guest(address, &guest) {
        Insert::Done => {
            tables.count(all, true);
            tables.count(own, true);
            Entry::Done
        }
        // Another CPU was faster.
        Insert::Exists => Entry::Done,
        Insert::Full => Entry::Full,
    }
}

/// Forgets a guest that has no sessions and holds no ports. Returns whether it was there.
#[inline(always)]
pub(super) fn forget<A: Network, T: Tables<A>>(address: A, tables: &T) -> bool {
    let Some(guest) = tables.guest(address) else {
        return false;
    };
    if guest.sessions != 0 || guest.ports != 0 {
        return false;
    }
    let device = guest.device;
    let is_removed = tables.remove_guest(address);
    if is_removed {
        count_off(EVERY_DEVICE, tables);
        count_off(device, tables);
    }
    is_removed
}

/// Whether those who do nothing have to make room when so many are known: well before one
/// device has its share.
#[inline(always)]
#[must_use]
pub const fn are_many(known: u32) -> bool {
    known > MOST_GUESTS / 4
}

/// Forgets a guest that does nothing if there are many.
#[inline(always)]
pub(super) fn make_room<A: Network, T: Tables<A>>(address: A, tables: &T) {
    let are_many = tables
        .guests_on(EVERY_DEVICE)
        .is_some_and(|all| are_many(*all));
    if are_many {
        forget(address, tables);
    }
}

#[inline(always)]
fn count_on<A: Network, T: Tables<A>>(device: u32, tables: &T) {
    if let Some(guests) = tables.guests_on(device) {
        tables.count(guests, true);
    }
}

/// A device that is gone is counted no more.
#[inline(always)]
fn count_off<A: Network, T: Tables<A>>(device: u32, tables: &T) {
    if let Some(guests) = tables.guests_on(device)
        && *guests != 0
    {
        tables.count(guests, false);
    }
}
