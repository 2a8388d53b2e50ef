//! The devices that the datapath is attached to.

use crate::net::{Address, Be32, Be128};

/// The role of a device the datapath is attached to.
pub mod role {
    pub const INSIDE: u8 = 1;
    pub const UPLINK: u8 = 2;
}

/// A device the datapath is attached to, the value of [`super::maps::Names::devices`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device<A = Be32> {
    /// The host's address on it: where our ICMP errors come from.
    pub address: A,
    /// An address of the inside network. The host's is one, unless there is but one guest, and this
    /// is its address (point to point).
    pub network: A,
    /// The network mask of the inside network; guests have addresses in it.
    pub mask: A,
    /// In bytes.
    pub mtu: u16,
    /// [`role`].
    pub role: u8,
    /// Non-zero where frames have an Ethernet header.
    pub ethernet: u8,
}

impl<A: Address> Device<A> {
    /// Whether an address is of the inside network.
    #[inline(always)]
    #[must_use]
    pub fn contains(&self, address: A) -> bool {
        address.same_network(self.network, self.mask)
    }

    /// Whether a guest can have this address.
    #[inline(always)]
    #[must_use]
    pub fn is_guests(&self, address: A) -> bool {
        self.contains(address) && address.is_host(self.mask) && address != self.address
    }
}

const _: () = {
    assert!(size_of::<Device>() == 16);
    assert!(size_of::<Device<Be128>>() == 52);
};
