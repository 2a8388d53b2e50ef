//! What the kernel tells all who listen, over netlink: datagrams, as they come. Knows nothing of what
//! they say. What is not read waits in the socket, which has room for so much; beyond that the kernel
//! drops, and says so. So nobody who makes the kernel talk makes this process grow.

use std::io;

use rtnetlink::sys::Socket;
use tokio::io::{Interest, unix::AsyncFd};

/// More than the kernel puts into a datagram of its own accord (`NLMSG_GOODSIZE`, and what a device with
/// many attributes takes).
const LONGEST: usize = 32 * 1024;

/// A listener in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<Socket>,
}

impl Listener {
    /// Starts to listen to groups of a netlink protocol, by their numbers. Must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    ///
    /// When the kernel gives no socket, or there is no such group.
    pub fn new(protocol: isize, groups: impl IntoIterator<Item = u32>) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        for group in groups {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        // SAFETY: the socket keeps its descriptor open for as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self { socket })
    }

    /// Waits for the next datagram. Can be dropped while it waits, and called again.
    ///
    /// # Errors
    ///
    /// When some were lost, for want of room or otherwise. What comes after that is told again.
    pub async fn next(&self) -> io::Result<Vec<u8>> {
        loop {
            let mut ready = self.socket.readable().await?;
            if let Ok(datagram) = ready.try_io(|socket| receive(socket.get_ref())) {
                return datagram;
            }
        }
    }

    /// The next datagram, if one is there.
    ///
    /// # Errors
    ///
    /// As [`Self::next`].
    pub fn try_next(&self) -> io::Result<Option<Vec<u8>>> {
        match receive(self.socket.get_ref()) {
            Ok(datagram) => Ok(Some(datagram)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn receive(socket: &Socket) -> io::Result<Vec<u8>> {
    let mut datagram = Vec::with_capacity(LONGEST);
    socket.recv_from(&mut datagram, 0)?;
    Ok(datagram)
}
