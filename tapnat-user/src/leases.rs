//! Which guest has which address of one network, of either family. No sockets, no messages, and the
//! time is a parameter.

use std::{
    collections::HashMap,
    fmt::Debug,
    hash::Hash,
    net::{Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use ipnet::{Ipv4Net, Ipv6Net};

/// Addresses given out at most, whatever the network's size: guests may make link addresses up.
const MOST: usize = 4096;
/// How long an address that was offered waits for its guest to take it.
const OFFER: Duration = Duration::from_mins(1);

/// By what a guest is known: its Ethernet address, or what it says of itself.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Guest(pub Vec<u8>);

/// A network of guests, and the host's own address.
pub trait Network: Copy + Debug {
    type Address: Copy + Debug + Eq + Hash;

    /// Whether a guest can have this address: it is in the network, no more than one host's, and not
    /// the host's own.
    fn is_guests(&self, address: Self::Address) -> bool;

    /// Addresses of the network from the one on that the guest stands for, which is the same for ever
    /// and needs no memory.
    fn candidates(&self, guest: &Guest) -> impl Iterator<Item = Self::Address> + use<Self>;
}

/// Who stands behind an address that is not free.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Holder {
    Guest(Guest),
    /// Somebody who did not get it from here (RFC 2131, DHCPDECLINE).
    Stranger,
}

#[derive(Clone, Debug)]
struct Lease {
    holder: Holder,
    until: Instant,
}

/// The addresses of one network.
#[derive(Debug)]
pub struct Pool<N: Network> {
    network: N,
    leases: HashMap<N::Address, Lease>,
    /// When nobody was there, the last time.
    unplugged: Option<Instant>,
}

impl<N: Network> Pool<N> {
    /// Of the network that this address of the host is in.
    #[must_use]
    pub fn new(network: N) -> Self {
        Self {
            network,
            leases: HashMap::new(),
            unplugged: None,
        }
    }

    /// An address for the guest, held for it for a minute: the one that it has, or wants, or the one
    /// that its link address stands for, or the next free one after that.
    pub fn offer(
        &mut self,
        guest: &Guest,
        wanted: Option<N::Address>,
        now: Instant,
    ) -> Option<N::Address> {
        let own = self.address_of(guest);
        let address = own
            .into_iter()
            .chain(wanted)
            .chain(self.network.candidates(guest))
            .find(|address| self.may_have(guest, *address, now))?;
        let until = self
            .leases
            .get(&address)
            .map_or(now, |lease| lease.until)
            .max(now + OFFER);
        self.hold(address, Holder::Guest(guest.clone()), until, now)
            .then_some(address)
    }

    /// Gives the guest this address. `false` if it may not have it.
    pub fn lease(
        &mut self,
        guest: &Guest,
        address: N::Address,
        now: Instant,
        length: Duration,
    ) -> bool {
        if !self.may_have(guest, address, now) {
            return false;
        }
        if self.address_of(guest).is_some_and(|own| own != address) {
            self.release(guest);
        }
        self.hold(address, Holder::Guest(guest.clone()), now + length, now)
    }

    /// A guest was last heard of at this time with this address, which it has from elsewhere, or from
    /// an earlier process. Nobody else is given it for so long from then on, unless the guest was
    /// unplugged since.
    pub fn meet(
        &mut self,
        guest: &Guest,
        address: N::Address,
        heard: Instant,
        now: Instant,
        length: Duration,
    ) {
        let until = heard + length;
        let is_gone = self.unplugged.is_some_and(|unplugged| heard <= unplugged);
        let is_free = self
            .leases
            .get(&address)
            .is_none_or(|lease| lease.until <= now);
        if is_gone || !is_free || until <= now || !self.network.is_guests(address) {
            return;
        }
        let holder = match self.address_of(guest) {
            // It has this one beside.
            Some(own) if own != address => Holder::Stranger,
            Some(_) | None => Holder::Guest(guest.clone()),
        };
        self.hold(address, holder, until, now);
    }

    /// Nobody is there any more: whoever comes next may have any address. Those who come back have
    /// theirs while nobody took it.
    pub fn unplug(&mut self, now: Instant) {
        self.unplugged = Some(now);
        for lease in self.leases.values_mut() {
            lease.until = lease.until.min(now);
        }
    }

    /// The guest needs its address no longer.
    pub fn release(&mut self, guest: &Guest) {
        self.leases.retain(|_, lease| !lease.is_of(guest));
    }

    /// The guest found somebody else at its address.
    pub fn avoid(&mut self, guest: &Guest, address: N::Address, now: Instant, length: Duration) {
        // Nobody takes others' addresses away.
        if self.address_of(guest) == Some(address) {
            self.hold(address, Holder::Stranger, now + length, now);
        }
    }

    /// The address that a guest has here.
    #[must_use]
    pub fn address_of(&self, guest: &Guest) -> Option<N::Address> {
        self.leases
            .iter()
            .find(|(_, lease)| lease.is_of(guest))
            .map(|(address, _)| *address)
    }

    fn may_have(&self, guest: &Guest, address: N::Address, now: Instant) -> bool {
        self.network.is_guests(address)
            && self
                .leases
                .get(&address)
                .is_none_or(|lease| lease.is_of(guest) || lease.until <= now)
    }

    fn hold(&mut self, address: N::Address, holder: Holder, until: Instant, now: Instant) -> bool {
        if self.leases.len() >= MOST && !self.leases.contains_key(&address) {
            self.leases.retain(|_, lease| lease.until > now);
            if self.leases.len() >= MOST {
                return false;
            }
        }
        self.leases.insert(address, Lease { holder, until });
        true
    }
}

impl Lease {
    fn is_of(&self, guest: &Guest) -> bool {
        matches!(&self.holder, Holder::Guest(holder) if holder == guest)
    }
}

/// A network of IPv4's, and the host's own address, which need not be in it if there is one guest.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4Guests {
    pub network: Ipv4Net,
    pub host: Ipv4Addr,
}

impl Ipv4Guests {
    /// Whether the network's ends are nobody's. In smaller ones both are hosts' (RFC 3021).
    const fn has_ends(self) -> bool {
        self.network.prefix_len() < 31
    }
}

impl Network for Ipv4Guests {
    type Address = Ipv4Addr;

    fn is_guests(&self, address: Ipv4Addr) -> bool {
        let ends = [self.network.network(), self.network.broadcast()];
        let is_end = self.has_ends() && ends.contains(&address);
        self.network.contains(&address) && address != self.host && !is_end
    }

    fn candidates(&self, guest: &Guest) -> impl Iterator<Item = Ipv4Addr> + use<> {
        let first = u32::from(self.network.network());
        let rest = u32::from(self.network.broadcast()) - first;
        let hosts = if self.has_ends() { rest } else { rest + 1 };
        // FNV-1a: it spreads addresses that differ in the last byte only.
        let start = guest.0.iter().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
        });
        (0..hosts.min(u32::try_from(MOST).unwrap_or(u32::MAX)))
            .map(move |step| Ipv4Addr::from(first + start.wrapping_add(step) % hosts))
    }
}

impl Network for Ipv6Net {
    type Address = Ipv6Addr;

    /// The first address is every router's (RFC 4291 section 2.6.1).
    fn is_guests(&self, address: Ipv6Addr) -> bool {
        self.contains(&address) && ![self.addr(), self.network()].contains(&address)
    }

    fn candidates(&self, guest: &Guest) -> impl Iterator<Item = Ipv6Addr> + use<> {
        let first = u128::from(self.network());
        let last = u128::from(self.broadcast()) - first;
        // FNV-1a of 128 bits.
        let start = guest.0.iter().fold(
            0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128,
            |hash, byte| {
                (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
            },
        );
        let steps = last.min(u128::try_from(MOST).unwrap_or(u128::MAX));
        // A network has a power of two of addresses.
        (0..=steps).map(move |step| Ipv6Addr::from(first + (start.wrapping_add(step) & last)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const LEASE: Duration = Duration::from_hours(1);

    fn pool(prefix: u8) -> Pool<Ipv4Guests> {
        let host = Ipv4Addr::new(10, 0, 0, 1);
        let network = Ipv4Net::new_assert(host, prefix).trunc();
        Pool::new(Ipv4Guests { network, host })
    }

    fn guest(number: u16) -> Guest {
        let [high, low] = number.to_be_bytes();
        Guest(vec![0x52, 0x54, 0, 0x12, high, low])
    }

    fn lease<N: Network>(pool: &mut Pool<N>, number: u16, now: Instant) -> Option<N::Address> {
        let guest = guest(number);
        let address = pool.offer(&guest, None, now)?;
        pool.lease(&guest, address, now, LEASE).then_some(address)
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
    fn small_networks_have_room_for_one() {
        let now = Instant::now();
        let host = Ipv4Addr::new(10, 0, 0, 1);
        for (network, guest) in [("10.0.0.0/30", 2), ("10.0.0.0/31", 0), ("10.0.0.10/32", 10)] {
            let network = network.parse().unwrap();
            let mut pool = Pool::new(Ipv4Guests { network, host });
            let given = Some(Ipv4Addr::new(10, 0, 0, guest));
            assert_eq!(lease(&mut pool, 1, now), given, "{network}");
            assert_eq!(lease(&mut pool, 2, now), None, "{network}");
            assert_eq!(lease(&mut pool, 1, now), given, "{network}");
        }
    }

    #[test]
    fn a_guest_may_ask_for_an_address() {
        let now = Instant::now();
        let mut pool = pool(24);
        let wanted = Ipv4Addr::new(10, 0, 0, 10);
        assert_eq!(pool.offer(&guest(1), Some(wanted), now), Some(wanted));
        assert!(pool.lease(&guest(1), wanted, now, LEASE));
        assert!(
            !pool.lease(&guest(2), wanted, now, LEASE),
            "it is another's"
        );
        for not_guests in [[10, 0, 0, 0], [10, 0, 0, 1], [10, 0, 0, 255], [10, 0, 1, 2]] {
            assert!(!pool.lease(&guest(2), not_guests.into(), now, LEASE));
        }
    }

    #[test]
    fn a_guest_that_moves_gives_its_old_address_back() {
        let now = Instant::now();
        let mut pool = pool(29);
        let [one, other] = [3, 4].map(|last| Ipv4Addr::new(10, 0, 0, last));
        assert!(pool.lease(&guest(1), one, now, LEASE));
        assert!(pool.lease(&guest(1), other, now, LEASE));
        assert!(pool.lease(&guest(2), one, now, LEASE));
    }

    #[test]
    fn what_was_declined_is_not_offered_for_a_while() {
        let now = Instant::now();
        let mut pool = pool(24);
        let address = lease(&mut pool, 1, now).unwrap();
        pool.avoid(&guest(2), address, now, LEASE);
        assert_eq!(lease(&mut pool, 1, now), Some(address), "only its own");
        pool.avoid(&guest(1), address, now, LEASE);
        assert_ne!(lease(&mut pool, 1, now), Some(address));
    }

    #[test]
    fn who_was_seen_at_an_address_has_it() {
        let now = Instant::now();
        let mut pool = pool(24);
        let [own, other] = [20, 21].map(|last| Ipv4Addr::new(10, 0, 0, last));
        // As one that an earlier process gave to the guest, or that it was given by hand.
        pool.meet(&guest(1), own, now, now, LEASE);
        pool.meet(&guest(1), other, now, now, LEASE);
        assert_eq!(pool.offer(&guest(1), None, now), Some(own));
        for taken in [own, other] {
            assert_ne!(pool.offer(&guest(2), Some(taken), now), Some(taken));
            assert!(!pool.lease(&guest(2), taken, now, LEASE));
        }
        let later = now + LEASE;
        assert!(pool.lease(&guest(2), other, later, LEASE));
        // It is the other's now, whoever was seen there.
        pool.meet(&guest(1), other, later, later, LEASE);
        assert_eq!(pool.address_of(&guest(2)), Some(other));
        pool.meet(&guest(3), Ipv4Addr::new(10, 0, 0, 1), now, now, LEASE);
        assert_eq!(pool.address_of(&guest(3)), None, "the host's own");
    }

    #[test]
    fn whoever_is_plugged_in_next_gets_the_address() {
        let now = Instant::now();
        let mut pool = pool(30);
        let first = lease(&mut pool, 1, now);
        assert_eq!(lease(&mut pool, 2, now), None);
        pool.unplug(now);
        assert_eq!(lease(&mut pool, 1, now), first, "it came back");
        pool.unplug(now);
        assert_eq!(lease(&mut pool, 2, now), first);
        assert_eq!(lease(&mut pool, 1, now), None);
    }

    #[test]
    fn who_was_seen_before_it_was_unplugged_has_no_address() {
        let (now, address) = (Instant::now(), Ipv4Addr::new(10, 0, 0, 2));
        let later = now + Duration::from_secs(2);
        let mut pool = pool(30);
        pool.unplug(now + Duration::from_secs(1));
        // The kernel may keep it for longer.
        pool.meet(&guest(1), address, now, later, LEASE);
        assert_eq!(lease(&mut pool, 2, later), Some(address));
        pool.release(&guest(2));
        pool.meet(&guest(1), address, later, later, LEASE);
        assert_eq!(lease(&mut pool, 2, later), None);
    }

    #[test]
    fn an_ipv6_network_gives_each_guest_the_same_address_again() {
        let now = Instant::now();
        let pool = |text: &str| Pool::<Ipv6Net>::new(text.parse().unwrap());
        let mut first = pool("fd00:7a70::1/64");
        let given: HashSet<_> = (0..1000)
            .map(|number| lease(&mut first, number, now).unwrap())
            .collect();
        assert_eq!(given.len(), 1000);
        let mut other = pool("fd00:7a70::1/64");
        assert_eq!(
            lease(&mut other, 7, now),
            first.address_of(&guest(7)),
            "without memory"
        );
        let network: Ipv6Net = "fd00:7a70::/64".parse().unwrap();
        assert!(given.iter().all(|address| network.contains(address)));
        // Of a small one every address, but the host's own and every router's.
        let mut small = pool("fd00:7a70::1/120");
        let given: HashSet<_> = (0..254)
            .map(|number| lease(&mut small, number, now).unwrap())
            .collect();
        assert_eq!(given.len(), 254);
        assert_eq!(lease(&mut small, 999, now), None);
        for not_guests in ["fd00:7a70::1", "fd00:7a70::", "fd00:7a70::100"] {
            let address = not_guests.parse().unwrap();
            assert!(!pool("fd00:7a70::1/120").lease(&guest(1), address, now, LEASE));
        }
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
