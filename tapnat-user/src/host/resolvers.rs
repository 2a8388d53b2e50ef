//! The resolvers that the host asks for names, as its files say (resolv.conf(5)). They are read each
//! time, as they change with the network that a host is in.

use std::{
    fs,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    path::Path,
};

use nix::net::if_::if_nametoindex;
use resolv_conf::ScopedIp;

/// What the host's own programs go by.
const OWN: &str = "/etc/resolv.conf";
/// Whom systemd-resolved asks, where [`OWN`] names only its stub.
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";
/// Of how many the C library makes use (`MAXNS`).
const MOST: usize = 3;
const DNS: u16 = 53;

/// Those that the host's programs ask, in their order.
#[must_use]
pub fn of_host() -> Vec<SocketAddr> {
    let mut resolvers = read(Path::new(OWN));
    resolvers.truncate(MOST);
    resolvers
}

/// Those of [`of_host`] that others than the host can ask: not those on its loopback, nor those that
/// are known by an address on one link only.
#[must_use]
pub fn beyond_loopback() -> Vec<IpAddr> {
    others(&read(Path::new(OWN)))
}

/// The same of those that systemd-resolved asks.
#[must_use]
pub fn behind_stub() -> Vec<IpAddr> {
    others(&read(Path::new(BEHIND_STUB)))
}

fn others(resolvers: &[SocketAddr]) -> Vec<IpAddr> {
    let is_shared = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    };
    let addresses = resolvers.iter().map(SocketAddr::ip);
    addresses.filter(is_shared).collect()
}

/// A file that is not there, or is wrong, names nobody.
fn read(path: &Path) -> Vec<SocketAddr> {
    parse(&fs::read(path).unwrap_or_default())
}

fn parse(text: &[u8]) -> Vec<SocketAddr> {
    let config = resolv_conf::Config::parse(text).unwrap_or_default();
    config.nameservers.iter().filter_map(endpoint).collect()
}

fn endpoint(resolver: &ScopedIp) -> Option<SocketAddr> {
    match resolver {
        ScopedIp::V4(address) => Some((*address, DNS).into()),
        ScopedIp::V6(address, None) => Some((*address, DNS).into()),
        // On a device that there may not be any more.
        ScopedIp::V6(address, Some(device)) => {
            let index = if_nametoindex(device.as_str()).ok()?;
            Some(SocketAddrV6::new(*address, DNS, 0, index).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_resolver_is_read_and_guests_are_spared_the_loopback() {
        let text = b"# Mine.\nsearch lan.example\nnameserver 127.0.0.53\nnameserver 192.0.2.53\n\
                     nameserver 2001:db8::53\nnameserver fe80::1%lo\nnameserver fe80::1%nope0\n\
                     options edns0\n";
        let resolvers = parse(text);
        let expected = [
            "127.0.0.53:53",
            "192.0.2.53:53",
            "[2001:db8::53]:53",
            "[fe80::1%1]:53",
        ];
        let expected: Vec<SocketAddr> = expected.iter().map(|it| it.parse().unwrap()).collect();
        assert_eq!(resolvers, expected);
        let shared: Vec<IpAddr> = ["192.0.2.53", "2001:db8::53"]
            .map(|it| it.parse().unwrap())
            .to_vec();
        assert_eq!(others(&resolvers), shared);
    }

    #[test]
    fn a_file_that_is_not_there_names_nobody() {
        assert!(read(Path::new("/nonexistent/resolv.conf")).is_empty());
    }
}
