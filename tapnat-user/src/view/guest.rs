//! A guest, and what it holds of the tables.

use std::net::{IpAddr, Ipv4Addr};

use serde::Serialize;
use tapnat_common::abi::Guest;

/// A guest, by its inside address.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct GuestView {
    pub address: IpAddr,
    /// Null where it is not known, as on devices without link addresses.
    pub link_address: Option<String>,
    /// Sessions now; what is over and not yet collected counts.
    pub sessions: u32,
    /// Outside ports that it holds, those that rest among them.
    pub ports: u32,
    /// New sessions that a limit refused.
    pub refused: u32,
    /// What stands for it in the tables of IPv4, where these are its sessions with IPv4 (NAT64), which
    /// are counted apart from those with IPv6.
    pub stand_in: Option<Ipv4Addr>,
}

impl GuestView {
    #[must_use]
    pub fn new(address: impl Into<IpAddr>, guest: &Guest) -> Self {
        let [_, _, link @ ..] = guest.link.to_be_bytes();
        let link = link.map(|byte| format!("{byte:02x}")).join(":");
        Self {
            address: address.into(),
            stand_in: None,
            link_address: (guest.link != 0).then_some(link),
            sessions: guest.sessions,
            ports: guest.ports,
            refused: guest.refused,
        }
    }

    /// The same entry, of the guest with this address if its own stands in for it.
    #[must_use]
    pub fn behind(mut self, guest: Option<IpAddr>) -> Self {
        if let (Some(guest), IpAddr::V4(address)) = (guest, self.address) {
            self.stand_in = Some(address);
            self.address = guest;
        }
        self
    }

    /// What it has in the tables.
    #[must_use]
    pub fn key(&self) -> IpAddr {
        self.stand_in.map_or(self.address, Into::into)
    }

    /// The address, and by which of its ways to the world this is where it has two.
    #[must_use]
    pub fn title(&self) -> String {
        match self.stand_in {
            Some(_) => format!("{} (NAT64)", self.address),
            None => self.address.to_string(),
        }
    }
}
