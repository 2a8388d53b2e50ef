//! What the kernel tells of changes to devices, addresses and routes: only that there were some.
//! Whoever wants to know more asks over [`super::netlink`], on another socket.

use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup, packet_core::NetlinkMessage, packet_route::RouteNetlinkMessage, sys::SocketAddr,
};
use tokio::time::{Instant, sleep_until};

/// Changes come in swarms; this long after the first, all that belong together are there.
const SETTLE: Duration = Duration::from_millis(100);

/// A listener for changes in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Events {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    /// There was a change, and those that come with it are there by then.
    settles_at: Option<Instant>,
}

impl Events {
    /// Starts to listen. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the kernel gives no netlink socket.
    pub fn listen() -> Result<Self> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
        ];
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)
            .context("cannot listen for changes of the network")?;
        tokio::spawn(connection);
        Ok(Self {
            messages,
            settles_at: None,
        })
    }

    /// Waits for a change, and for the others that come with it. Never returns when the kernel stops
    /// telling. Can be dropped while it waits, and called again.
    pub async fn changed(&mut self) {
        if self.settles_at.is_none() && self.messages.next().await.is_none() {
            std::future::pending::<()>().await;
        }
        let settles_at = self
            .settles_at
            .get_or_insert_with(|| Instant::now() + SETTLE);
        sleep_until(*settles_at).await;
        self.settles_at = None;
        while self.messages.try_recv().is_ok() {}
    }
}
