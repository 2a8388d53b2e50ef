//! Which guest has which address of one network. No sockets, no messages, and the time is a
//! parameter.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;

/// Addresses given out at most, whatever the network's size: guests may make link addresses up.
const MOST: usize = 4096;
/// How long an address that was offered waits for its guest to take it.
const OFFER: Duration = Duration::from_mins(1);

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct LinkAddress(pub [u8; 6]);

/// Who stands behind an address that is not free.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Holder {
    Guest(LinkAddress),
    /// Somebody who did not get it from here (RFC 2131, DHCPDECLINE).
    Stranger,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    holder: Holder,
    until: Instant,
}

/// The addresses of one network.
#[derive(Debug)]
pub(super) struct Pool {
    /// With the host's own address.
    network: Ipv4Net,
    leases: HashMap<Ipv4Addr, Lease>,
}

impl Pool {
    /// Of the network that this address of the host is in.
    pub fn new(network: Ipv4Net) -> Self {
        Self {
            network,
            leases: HashMap::new(),
        }
    }

    /// An address for the guest, held for it for a minute: the one that it has, or wants, or the one
    /// that its link address stands for, or the next free one after that.
    pub fn offer(
        &mut self,
        guest: LinkAddress,
        wanted: Option<Ipv4Addr>,
        now: Instant,
    ) -> Option<Ipv4Addr> {
        let own = self.address_of(guest);
        let address = own
            .into_iter()
            .chain(wanted)
            .chain(self.candidates(guest))
            .find(|address| self.may_have(guest, *address, now))?;
        let until = self
            .leases
            .get(&address)
            .map_or(now, |lease| lease.until)
            .max(now + OFFER);
        self.hold(address, Holder::Guest(guest), until, now)
            .then_some(address)
    }

    /// Gives the guest this address. `false` if it may not have it.
    pub fn lease(
        &mut self,
        guest: LinkAddress,
        address: Ipv4Addr,
        now: Instant,
        length: Duration,
    ) -> bool {
        if !self.may_have(guest, address, now) {
            return false;
        }
        if self.address_of(guest).is_some_and(|own| own != address) {
            self.release(guest);
        }
        self.hold(address, Holder::Guest(guest), now + length, now)
    }

    /// The guest needs its address no longer.
    pub fn release(&mut self, guest: LinkAddress) {
        self.leases
            .retain(|_, lease| lease.holder != Holder::Guest(guest));
    }

    /// The guest found somebody else at its address.
    pub fn avoid(&mut self, guest: LinkAddress, address: Ipv4Addr, now: Instant, length: Duration) {
        // Nobody takes others' addresses away.
        if self.address_of(guest) == Some(address) {
            self.hold(address, Holder::Stranger, now + length, now);
        }
    }

    fn address_of(&self, guest: LinkAddress) -> Option<Ipv4Addr> {
        let holder = Holder::Guest(guest);
        self.leases
            .iter()
            .find(|(_, lease)| lease.holder == holder)
            .map(|(address, _)| *address)
    }

    fn may_have(&self, guest: LinkAddress, address: Ipv4Addr, now: Instant) -> bool {
        let is_guests = self.network.contains(&address)
            && ![
                self.network.addr(),
                self.network.network(),
                self.network.broadcast(),
            ]
            .contains(&address);
        is_guests
            && self
                .leases
                .get(&address)
                .is_none_or(|lease| lease.holder == Holder::Guest(guest) || lease.until <= now)
    }

    fn hold(&mut self, address: Ipv4Addr, holder: Holder, until: Instant, now: Instant) -> bool {
        if self.leases.len() >= MOST && !self.leases.contains_key(&address) {
            self.leases.retain(|_, lease| lease.until > now);
            if self.leases.len() >= MOST {
                return false;
            }
        }
        self.leases.insert(address, Lease { holder, until });
        true
    }

    /// The network's addresses from the one on that the link address stands for, which is the same
    /// for ever and needs no memory.
    fn candidates(&self, guest: LinkAddress) -> impl Iterator<Item = Ipv4Addr> + use<> {
        let first = u32::from(self.network.network());
        let hosts = u32::from(self.network.broadcast()) - first;
        // FNV-1a: it spreads addresses that differ in the last byte only.
        let start = guest.0.iter().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
        });
        (0..hosts.min(u32::try_from(MOST).unwrap_or(u32::MAX)))
            .map(move |step| Ipv4Addr::from(first + start.wrapping_add(step) % hosts))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const LEASE: Duration = Duration::from_hours(1);

    fn pool(prefix: u8) -> Pool {
        Pool::new(Ipv4Net::new(Ipv4Addr::new(10, 0, 0, 1), prefix).unwrap())
    }

    fn guest(number: u16) -> LinkAddress {
        let [high, low] = number.to_be_bytes();
        LinkAddress([0x52, 0x54, 0, 0x12, high, low])
    }

    fn lease(pool: &mut Pool, number: u16, now: Instant) -> Option<Ipv4Addr> {
        let address = pool.offer(guest(number), None, now)?;
        pool.lease(guest(number), address, now, LEASE)
            .then_some(address)
    }

    #[test]
    fn a_guest_gets_the_same_address_again() {
        let now = Instant::now();
        let first = lease(&mut pool(24), 7, now).unwrap();
        // Of another server, without memory.
        let mut other = pool(24);
        assert_eq!(lease(&mut other, 7, now), Some(first));
        assert_eq!(lease(&mut other, 7, now + LEASE * 3), Some(first));
    }

    #[test]
    fn every_address_is_given_once_and_none_of_the_hosts() {
        let now = Instant::now();
        let mut pool = pool(24);
        let given: HashSet<_> = (0..253)
            .map(|number| lease(&mut pool, number, now).unwrap())
            .collect();
        assert_eq!(given.len(), 253);
        assert!(
            given
                .iter()
                .all(|address| (2..255).contains(&address.octets()[3]))
        );
        assert_eq!(lease(&mut pool, 999, now), None, "there are no more");
        let later = now + LEASE;
        assert!(
            lease(&mut pool, 999, later).is_some(),
            "expired ones are free"
        );
    }

    #[test]
    fn a_guest_may_ask_for_an_address() {
        let now = Instant::now();
        let mut pool = pool(24);
        let wanted = Ipv4Addr::new(10, 0, 0, 10);
        assert_eq!(pool.offer(guest(1), Some(wanted), now), Some(wanted));
        assert!(pool.lease(guest(1), wanted, now, LEASE));
        assert!(!pool.lease(guest(2), wanted, now, LEASE), "it is another's");
        for not_guests in [[10, 0, 0, 0], [10, 0, 0, 1], [10, 0, 0, 255], [10, 0, 1, 2]] {
            assert!(!pool.lease(guest(2), not_guests.into(), now, LEASE));
        }
    }

    #[test]
    fn a_guest_that_moves_gives_its_old_address_back() {
        let now = Instant::now();
        let mut pool = pool(29);
        let [one, other] = [3, 4].map(|last| Ipv4Addr::new(10, 0, 0, last));
        assert!(pool.lease(guest(1), one, now, LEASE));
        assert!(pool.lease(guest(1), other, now, LEASE));
        assert!(pool.lease(guest(2), one, now, LEASE));
    }

    #[test]
    fn what_was_declined_is_not_offered_for_a_while() {
        let now = Instant::now();
        let mut pool = pool(24);
        let address = lease(&mut pool, 1, now).unwrap();
        pool.avoid(guest(2), address, now, LEASE);
        assert_eq!(lease(&mut pool, 1, now), Some(address), "only its own");
        pool.avoid(guest(1), address, now, LEASE);
        assert_ne!(lease(&mut pool, 1, now), Some(address));
    }

    #[test]
    fn link_addresses_that_are_made_up_fill_no_memory() {
        let now = Instant::now();
        let mut pool = pool(8);
        for number in 0..6000 {
            let _ = lease(&mut pool, number, now);
        }
        assert_eq!(pool.leases.len(), MOST);
        assert!(lease(&mut pool, 6000, now + LEASE).is_some());
    }
}
