//! What the kernel tells of changes to devices, what their drivers can do, addresses, routes and
//! neighbours' link addresses: only that there were some. Whoever wants to know more asks over [`super::netlink`], on another socket.

use std::{collections::HashMap, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    },
    sys::SocketAddr,
};
use tokio::time::{Instant, sleep_until};

use super::{netlink::Netlink, xdp::Changes};

/// Changes come in swarms; this long after the first, all that belong together are there.
const SETTLE: Duration = Duration::from_millis(100);

/// Neighbours to remember: more than the kernel itself keeps by default.
const MOST_NEIGHBOURS: usize = 4096;

/// A listener for changes in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Events {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    neighbours: Neighbours,
    features: Option<Changes>,
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
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Neigh,
        ];
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)
            .context("cannot listen for changes of the network")?;
        tokio::spawn(connection);
        let mut neighbours = Neighbours::default();
        for neighbour in netlink.neighbours().await? {
            neighbours.is_as_before(&neighbour);
        }
        Ok(Self {
            messages,
            neighbours,
            features: Changes::listen()?,
            settles_at: None,
        })
    }

    /// Waits for a change, and for the others that come with it. Never returns when the kernel stops
    /// telling. Can be dropped while it waits, and called again.
    pub async fn changed(&mut self) {
        while self.settles_at.is_none() {
            tokio::select! {
                message = self.messages.next() => match message {
                    Some((message, _)) if self.neighbours.are_as_before(&message) => {}
                    Some(_) => break,
                    None => std::future::pending().await,
                },
                () = next(self.features.as_ref()) => break,
            }
        }
        let settles_at = self
            .settles_at
            .get_or_insert_with(|| Instant::now() + SETTLE);
        sleep_until(*settles_at).await;
        self.settles_at = None;
        while let Ok((message, _)) = self.messages.try_recv() {
            self.neighbours.are_as_before(&message);
        }
    }
}

async fn next(features: Option<&Changes>) {
    match features {
        Some(features) => features.next().await,
        None => std::future::pending().await,
    }
}

/// The link addresses of neighbours. The kernel tells whenever it has asked one, too, which changes
/// nothing.
#[derive(Debug, Default)]
struct Neighbours {
    known: HashMap<(u32, Ipv4Addr), Vec<u8>>,
}

impl Neighbours {
    /// Whether the message is about a neighbour whose link address is not another than before.
    fn are_as_before(&mut self, message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewNeighbour(neighbour)
            | RouteNetlinkMessage::DelNeighbour(neighbour),
        ) = &message.payload
        else {
            return false;
        };
        self.is_as_before(neighbour)
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
fn read(neighbour: &NeighbourMessage) -> Option<(Ipv4Addr, Vec<u8>)> {
    let mut address = None;
    let mut link = None;
    for attribute in &neighbour.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(it)) => address = Some(*it),
            // The crate's name for NDA_LLADDR.
            NeighbourAttribute::LinkLocalAddress(it) => link = Some(it.clone()),
            _ => {}
        }
    }
    address.zip(link)
}
