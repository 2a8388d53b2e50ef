//! What the kernel tells of changes to devices, what their drivers can do, addresses, routes and
//! neighbours' link addresses: only that there were some. Whoever wants to know more asks over
//! [`super::netlink`], on another socket.

use std::{collections::HashMap, io, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    },
    sys::protocols::NETLINK_ROUTE,
};
use tokio::time::{Instant, sleep_until};

use super::{multicast::Listener, netlink::Netlink, xdp};

/// Changes come in swarms; this long after the first, all that belong together are there.
const SETTLE: Duration = Duration::from_millis(100);

/// Between two changes of neighbours' link addresses. Guests make as many as they like, and each has
/// every session look for its next hop.
const NEIGHBOURS_REST: Duration = Duration::from_secs(1);

/// Neighbours to remember: more than the kernel itself keeps by default.
const MOST_NEIGHBOURS: usize = 4096;

/// Datagrams that are read in one go.
const MOST_AT_ONCE: usize = 1024;

/// A listener for changes in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Events {
    netlink: Netlink,
    network: Listener,
    /// Apart from the others, which must not get lost among them.
    neighbours: Listener,
    drivers: Option<Listener>,
    known: Neighbours,
    /// Something that was told of neighbours was lost.
    is_behind: bool,
    /// Neighbours are not listened to before this.
    quiet_until: Instant,
    /// There was a change, and those that come with it are there by then.
    settles_at: Option<Instant>,
}

impl Events {
    /// Starts to listen. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the kernel gives no netlink socket, or does not tell the neighbours that it knows.
    pub async fn listen(netlink: &Netlink) -> Result<Self> {
        let listen = |groups: &[MulticastGroup]| {
            let groups = groups.iter().map(|group| *group as u32);
            Listener::new(NETLINK_ROUTE, groups).context("cannot listen for changes of the network")
        };
        let network = listen(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])?;
        let neighbours = listen(&[MulticastGroup::Neigh])?;
        Ok(Self {
            network,
            neighbours,
            drivers: xdp::listen()?,
            known: Neighbours::of(&netlink.neighbours().await?),
            netlink: netlink.clone(),
            is_behind: false,
            quiet_until: Instant::now(),
            settles_at: None,
        })
    }

    /// Waits for a change, and for the others that come with it. Can be dropped while it waits, and
    /// called again.
    pub async fn changed(&mut self) {
        while self.settles_at.is_none() {
            let is_change = tokio::select! {
                // Even if something was lost: then this is not known.
                _ = self.network.next() => true,
                heard = next_after(&self.neighbours, self.quiet_until) => self.read_neighbours(heard),
                () = next(self.drivers.as_ref()) => true,
            };
            self.settles_at = is_change.then(|| Instant::now() + SETTLE);
        }
        if let Some(settles_at) = self.settles_at {
            sleep_until(settles_at).await;
        }
        for _ in 0..MOST_AT_ONCE {
            if let Ok(None) = self.network.try_next() {
                break;
            }
        }
        if self.is_behind
            && let Ok(neighbours) = self.netlink.neighbours().await
        {
            self.known = Neighbours::of(&neighbours);
            self.is_behind = false;
        }
        self.settles_at = None;
    }

    /// Takes in what was heard of neighbours, and what else is there of them. Returns whether a link
    /// address is another one now, as far as can be told.
    fn read_neighbours(&mut self, heard: io::Result<Vec<u8>>) -> bool {
        let mut is_change = self.take_in(heard);
        for _ in 0..MOST_AT_ONCE {
            let Some(heard) = self.neighbours.try_next().transpose() else {
                break;
            };
            is_change |= self.take_in(heard);
        }
        let rest = if is_change { NEIGHBOURS_REST } else { SETTLE };
        self.quiet_until = Instant::now() + rest;
        is_change
    }

    fn take_in(&mut self, heard: io::Result<Vec<u8>>) -> bool {
        let Ok(datagram) = heard else {
            self.is_behind = true;
            return true;
        };
        !self.known.are_as_before(&datagram)
    }
}

async fn next_after(listener: &Listener, time: Instant) -> io::Result<Vec<u8>> {
    sleep_until(time).await;
    listener.next().await
}

async fn next(drivers: Option<&Listener>) {
    match drivers {
        Some(drivers) => drop(drivers.next().await),
        None => std::future::pending().await,
    }
}

/// The link addresses of neighbours. The kernel tells whenever it has asked one, too, which changes
/// nothing.
#[derive(Debug, Default)]
struct Neighbours {
    known: HashMap<(u32, IpAddr), Vec<u8>>,
}

impl Neighbours {
    fn of(neighbours: &[NeighbourMessage]) -> Self {
        let mut them = Self::default();
        for neighbour in neighbours {
            them.is_as_before(neighbour);
        }
        them
    }

    /// Whether the datagram is about neighbours whose link addresses are not others than before.
    fn are_as_before(&mut self, datagram: &[u8]) -> bool {
        let mut rest = datagram;
        let mut are_as_before = true;
        while !rest.is_empty() {
            let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else {
                return false;
            };
            are_as_before &= match &message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewNeighbour(neighbour)
                    | RouteNetlinkMessage::DelNeighbour(neighbour),
                ) => self.is_as_before(neighbour),
                _ => false,
            };
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
        are_as_before
    }

    fn is_as_before(&mut self, neighbour: &NeighbourMessage) -> bool {
        let Some((address, link)) = read(neighbour) else {
            return true;
        };
        if self.known.len() >= MOST_NEIGHBOURS {
            self.known.clear();
        }
        let key = (neighbour.header.ifindex, address);
        let before = self.known.insert(key, link.clone());
        before.is_none_or(|before| before == link)
    }
}

/// A neighbour's address and link address, if the latter is known.
fn read(neighbour: &NeighbourMessage) -> Option<(IpAddr, Vec<u8>)> {
    let mut address = None;
    let mut link = None;
    for attribute in &neighbour.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(it)) => {
                address = Some(IpAddr::V4(*it));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(it)) => {
                address = Some(IpAddr::V6(*it));
            }
            // The crate's name for NDA_LLADDR.
            NeighbourAttribute::LinkLocalAddress(it) => link = Some(it.clone()),
            _ => {}
        }
    }
    address.zip(link)
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    fn neighbour(address: NeighbourAddress, link: &[u8]) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 2;
        message.attributes = vec![
            NeighbourAttribute::Destination(address),
            NeighbourAttribute::LinkLocalAddress(link.to_vec()),
        ];
        message
    }

    #[test]
    fn another_link_address_is_a_change_in_either_family() {
        let addresses = [
            NeighbourAddress::Inet([198, 51, 100, 1].into()),
            NeighbourAddress::Inet6([0xfe80, 0, 0, 0, 0, 0, 0, 1].into()),
        ];
        for address in addresses {
            let (one, other) = (
                neighbour(address.clone(), &[2, 0, 0, 0, 0, 1]),
                neighbour(address.clone(), &[2, 0, 0, 0, 0, 2]),
            );
            let mut known = Neighbours::of(slice::from_ref(&one));
            assert!(known.is_as_before(&one), "{address:?}");
            assert!(!known.is_as_before(&other), "{address:?}");
            assert!(known.is_as_before(&other), "{address:?}");
        }
    }
}
