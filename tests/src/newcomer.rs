//! A QEMU guest that was told nothing: it boots on a tap, asks by DHCP, and fetches a page by name.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    qemu::{Guest, Kernel, Machine, Model},
};

/// Emulation is slow, and the machine may be busy.
const PATIENCE: Duration = Duration::from_mins(1);

/// What a DHCP client runs, in the guest.
const CONFIGURE: &str = "#!/bin/sh
[ \"$1\" = bound ] || exit 0
ip address replace $ip/$mask dev $interface
ip route replace default via $router
for address in $dns; do echo nameserver $address; done > /etc/resolv.conf
";

/// Boots it on `tap0`, which has several queues, and lets it ask. `directory` is for a file.
///
/// # Errors
/// QEMU does not boot, or nobody tells the guest its address and the host as its resolver.
pub fn boot(host: &Namespace, directory: &Path) -> Result<Guest> {
    let script = directory.join("configure");
    fs::write(&script, CONFIGURE)?;
    let machine = Machine::new(Kernel::installed()?)
        .card_with_queues("tap0", Model::Virtio, 2)
        .file(&script, "/configure");
    let mut guest = machine.boot(host)?;
    guest.run("chmod 755 /configure && mkdir -p /etc && ip link set eth0 up")?;
    guest.run_within("udhcpc -f -n -q -i eth0 -s /configure", PATIENCE)?;
    let told = guest.run("cat /etc/resolv.conf")?;
    ensure!(told.trim() == "nameserver 10.0.0.1", "{told}");
    Ok(guest)
}

/// Fetches the page of `server.example` at this port, and returns whom the server saw.
///
/// # Errors
/// There is no answer.
pub fn fetch(guest: &mut Guest, port: u16) -> Result<SocketAddr> {
    let url = format!("http://server.example:{port}/");
    let seen = guest.run_within(&format!("/bin/curl -sS --max-time 50 {url}"), PATIENCE)?;
    seen.parse().with_context(|| seen.clone())
}
