//! What a host asks for names: its /etc/resolv.conf, and a resolver on its loopback, as
//! systemd-resolved is one. It is dnsmasq, which knows `server.example` and `large.example`.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use tapnat_testbed::{Namespace, process::Process};

use crate::{instance::PATIENCE, world::server};

/// Where systemd-resolved listens.
pub const STUB: &str = "127.0.0.53";
/// How many texts `large.example` has: too many for a datagram, unless one says that it takes more
/// (RFC 1035 section 2.3.4).
pub const LARGE: usize = 10;

/// Writes a file that names these resolvers, in place: a program may have it mounted.
///
/// # Errors
/// It cannot be written.
pub fn write(file: &Path, resolvers: &[&str]) -> Result<()> {
    let lines = resolvers.iter().map(|it| format!("nameserver {it}\n"));
    fs::write(file, lines.collect::<String>()).with_context(|| file.display().to_string())
}

/// Starts a resolver on an address of the host, to which `server.example` is the world's first server.
///
/// # Errors
/// It does not start.
pub fn start(host: &Namespace, address: &str) -> Result<Process> {
    let text = "x".repeat(200);
    let mut command = host
        .command("dnsmasq")
        .args(["--keep-in-foreground", "--log-facility=-", "--log-queries"])
        .args(["--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
        .args(["--user=root", "--pid-file=", "--bind-interfaces"])
        .arg(format!("--listen-address={address}"))
        .arg(format!("--address=/server.example/{}", server(0, 0).ip()));
    for number in 0..LARGE {
        command = command.arg(format!("--txt-record=large.example,{number}{text}"));
    }
    let mut process = command.spawn()?;
    process
        .wait_for_error_line(PATIENCE, |line| line.contains("started"))
        .with_context(|| process.stderr())?;
    Ok(process)
}
