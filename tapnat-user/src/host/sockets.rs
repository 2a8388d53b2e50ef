//! Ports that programs of the host have sockets on, in the calling process's network namespace.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};

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
    fn the_loopback_does_not_count() {
        assert_eq!(reachable("127.0.0.53:53".parse().unwrap()), None);
        assert_eq!(reachable("[::1]:631".parse().unwrap()), None);
        assert_eq!(reachable("[::ffff:127.0.0.1]:631".parse().unwrap()), None);
        assert_eq!(reachable("[::]:22".parse().unwrap()), Some(22));
    }
}
