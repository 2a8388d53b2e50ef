//! Ports that programs of the host have sockets on, in the calling process's network namespace.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use procfs::{
    net::TcpState,
    process::{FDTarget, all_processes},
};

use crate::forwards::Transport;

/// The local ports of all TCP and UDP sockets of the host that the world can reach, whatever their
/// state: a port in use must not be given to a guest, or the host's packets would go to the guest.
/// Sockets on the loopback do not count.
///
/// # Errors
///
/// When `/proc/net` cannot be read.
pub fn ports_in_use() -> Result<Vec<u16>> {
    let tcp = [procfs::net::tcp(), procfs::net::tcp6()];
    let udp = [procfs::net::udp(), procfs::net::udp6()];
    let mut ports = Vec::new();
    for table in tcp {
        ports.extend(
            present(table)?
                .into_iter()
                .filter_map(|entry| reachable(entry.local_address)),
        );
    }
    for table in udp {
        ports.extend(
            present(table)?
                .into_iter()
                .filter_map(|entry| reachable(entry.local_address)),
        );
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

/// A kernel without IPv6 has no `tcp6` and `udp6`.
fn present<T>(table: procfs::ProcResult<Vec<T>>) -> Result<Vec<T>> {
    match table {
        Err(procfs::ProcError::NotFound(_)) => Ok(Vec::new()),
        other => other.context("cannot read the host's sockets from /proc/net"),
    }
}

fn reachable(local: SocketAddr) -> Option<u16> {
    let loopback = match local.ip() {
        IpAddr::V4(address) => address.is_loopback(),
        IpAddr::V6(address) => address.to_canonical().is_loopback(),
    };
    (!loopback && local.port() != 0).then(|| local.port())
}

/// A socket of the host that takes packets from anybody.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Listener {
    protocol: Transport,
    local: SocketAddr,
    inode: u64,
}

impl Listener {
    /// Whether it takes what comes to this port of this address.
    #[must_use]
    pub fn takes(&self, protocol: Transport, address: IpAddr, port: u16) -> bool {
        let local = self.local.ip().to_canonical();
        self.protocol == protocol
            && self.local.port() == port
            && (local == address || self.takes_all_of(address))
    }

    /// Sockets of IPv6 mostly take IPv4, too.
    fn takes_all_of(&self, address: IpAddr) -> bool {
        let local = self.local.ip();
        local.is_unspecified() && (local.is_ipv6() || address.is_ipv4())
    }

    /// Whose it is.
    #[must_use]
    pub fn owner(&self) -> Owner {
        owner_of(self.inode)
    }
}

fn owner_of(inode: u64) -> Owner {
    let find = || {
        for process in all_processes().ok()?.flatten() {
            // A process may end, or be out of our reach, while we look.
            let Ok(descriptors) = process.fd() else {
                continue;
            };
            let has_it = descriptors
                .flatten()
                .any(|descriptor| descriptor.target == FDTarget::Socket(inode));
            if has_it {
                return Some((process.stat().ok()?.comm, process.pid()));
            }
        }
        None
    };
    Owner {
        program: find(),
        inode,
    }
}

/// The program behind a socket, if it can be told: only who may look into it sees that.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Owner {
    program: Option<(String, i32)>,
    inode: u64,
}

/// What stands for a program that cannot be told, before its socket's number and a parenthesis.
const SOMEBODY: &str = "a program of the host (socket ";

impl fmt::Display for Owner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.program {
            Some((name, process)) => write!(formatter, "{name} (process {process})"),
            None => write!(formatter, "{SOMEBODY}{})", self.inode),
        }
    }
}

/// Names the program in a message of a process that could not tell it.
#[must_use]
pub fn name_owner(message: &str) -> String {
    let owner = || {
        let (before, rest) = message.split_once(SOMEBODY)?;
        let (number, after) = rest.split_once(')')?;
        let owner = owner_of(number.parse().ok()?);
        Some(format!("{before}{owner}{after}"))
    };
    owner().unwrap_or_else(|| message.to_owned())
}

/// Who listens where a TCP socket at this address would.
#[must_use]
pub fn listener_on(address: SocketAddr) -> Option<Owner> {
    let listeners = listeners().ok()?;
    let listener = listeners.iter().find(|it| {
        let local = it.local.ip().to_canonical();
        let is_same = local == address.ip().to_canonical();
        it.protocol == Transport::Tcp
            && it.local.port() == address.port()
            && (is_same || local.is_unspecified() || address.ip().is_unspecified())
    });
    listener.map(Listener::owner)
}

/// The sockets of the host that wait for anybody: listening TCP ones, and UDP ones without a peer.
///
/// # Errors
///
/// When `/proc/net` cannot be read.
pub fn listeners() -> Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for table in [procfs::net::tcp(), procfs::net::tcp6()] {
        for entry in present(table)? {
            if entry.state == TcpState::Listen {
                listeners.push(Listener {
                    protocol: Transport::Tcp,
                    local: entry.local_address,
                    inode: entry.inode,
                });
            }
        }
    }
    for table in [procfs::net::udp(), procfs::net::udp6()] {
        for entry in present(table)? {
            if entry.remote_address.port() == 0 {
                listeners.push(Listener {
                    protocol: Transport::Udp,
                    local: entry.local_address,
                    inode: entry.inode,
                });
            }
        }
    }
    Ok(listeners)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn sees_a_listener_and_a_bound_socket() {
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let ports = ports_in_use().unwrap();
        assert!(
            ports.contains(&listener.local_addr().unwrap().port()),
            "{ports:?}"
        );
        assert!(
            ports.contains(&socket.local_addr().unwrap().port()),
            "{ports:?}"
        );
    }

    #[test]
    fn names_the_process_that_listens() {
        let address = std::net::Ipv4Addr::new(192, 0, 2, 1);
        let tcp = TcpListener::bind("0.0.0.0:0").unwrap();
        let udp = UdpSocket::bind("[::]:0").unwrap();
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let find = |protocol, local: SocketAddr| {
            listeners()
                .unwrap()
                .into_iter()
                .find(|it| it.takes(protocol, address.into(), local.port()))
        };
        let found = find(Transport::Tcp, tcp.local_addr().unwrap()).unwrap();
        let process = format!("(process {})", std::process::id());
        assert!(found.owner().to_string().ends_with(&process));
        assert!(find(Transport::Udp, udp.local_addr().unwrap()).is_some());
        assert_eq!(find(Transport::Tcp, here.local_addr().unwrap()), None);
    }

    #[test]
    fn the_loopback_does_not_count() {
        assert_eq!(reachable("127.0.0.53:53".parse().unwrap()), None);
        assert_eq!(reachable("[::1]:631".parse().unwrap()), None);
        assert_eq!(reachable("[::ffff:127.0.0.1]:631".parse().unwrap()), None);
        assert_eq!(reachable("[::]:22".parse().unwrap()), Some(22));
    }
}
