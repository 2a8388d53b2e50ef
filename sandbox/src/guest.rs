//! The guest: a namespace with the other end of the tap, or a machine in QEMU. Both are told the same
//! commands, and what those print is read here.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace, qemu,
    traffic::{Iperf, Ping},
};

/// Pings sent, and seconds of each bulk transfer.
const PINGS: u32 = 5;
const SECONDS: u32 = 3;

/// Which way a bulk transfer goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bulk {
    ToWorld,
    ToGuest,
}

/// Somebody who runs commands behind the tap.
#[derive(Debug)]
pub enum Guest {
    Namespace(Namespace),
    Machine(Box<qemu::Guest>),
}

impl Guest {
    /// Pings an address. Fails unless all is answered.
    pub fn ping(&mut self, target: IpAddr) -> Result<Ping> {
        let (count, target) = (PINGS.to_string(), target.to_string());
        // Quiet, as ping looks up the name of whoever answers otherwise.
        let said = self.run(&["ping", "-q", "-c", &count, "-i", "0.2", "-W", "2", &target])?;
        let ping = Ping::read(said)?;
        let (sent, received) = (ping.transmitted, ping.received);
        ensure!(sent == received, "{received} of {sent} answered");
        Ok(ping)
    }

    /// Asks an HTTP server which client it sees. Returns what the server says, and the guest's own
    /// endpoint.
    pub fn http(&mut self, server: SocketAddr) -> Result<(SocketAddr, SocketAddr)> {
        let url = format!("http://{server}/");
        let said = self.run(&[
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "10",
            "--write-out",
            r"\n%{local_ip}:%{local_port}",
            &url,
        ])?;
        let mut lines = said.lines();
        let mut endpoint = || lines.next()?.parse().ok();
        endpoint()
            .zip(endpoint())
            .with_context(|| format!("the server or curl said something else: {said}"))
    }

    /// Sends or receives as much as goes through one TCP connection in some seconds.
    pub fn bulk(&mut self, server: SocketAddr, way: Bulk) -> Result<Iperf> {
        let (address, port) = (server.ip().to_string(), server.port().to_string());
        let seconds = SECONDS.to_string();
        let mut command = vec![
            "iperf3",
            "--json",
            "--interval",
            "0",
            "--congestion",
            "cubic",
        ];
        command.extend(["--connect-timeout", "3000", "--time", &seconds]);
        command.extend(["--client", &address, "--port", &port]);
        if way == Bulk::ToGuest {
            command.push("--reverse");
        }
        let bulk = Iperf::read(&self.run(&command)?)?;
        ensure!(bulk.received > 0, "nothing arrived");
        Ok(bulk)
    }

    /// Runs a command, whose words have no quotes in them, and returns what it printed.
    fn run(&mut self, words: &[&str]) -> Result<String> {
        match self {
            Self::Namespace(namespace) => {
                let (program, arguments) = words.split_first().context("empty command")?;
                namespace.command(program).args(arguments).run()
            }
            Self::Machine(machine) => {
                let quoted: Vec<_> = words.iter().map(|word| format!("'{word}'")).collect();
                machine.run(&quoted.join(" "))
            }
        }
    }
}
