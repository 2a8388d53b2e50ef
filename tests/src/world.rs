//! A world of the testbed in which an instance translates. What the instance
//! does is left to real traffic, or to [`crate::wires`].

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Result, ensure};
use tapnat_testbed::{
    process::Process,
    topology::{Builder, Guest, HOST_ADDRESS, Topology, WORLD_ADDRESSES},
    traffic::{self, TcpReflector, TcpSession, UdpReflector},
};

use crate::instance::{Instance, PATIENCE};

/// What the world sees in place of every guest, unless told otherwise.
pub const OUTSIDE: IpAddr = IpAddr::V4(HOST_ADDRESS);

/// A topology and the instance that translates in it.
#[derive(Debug)]
pub struct World {
    // Ended in this order.
    process: Process,
    pub instance: Instance,
    pub topology: Topology,
}

impl World {
    /// Builds the topology and starts `tapnat run` in its host, with these
    /// arguments besides its inside devices. Guests whose taps the program
    /// is to make are plugged in.
    ///
    /// # Errors
    /// The topology cannot be built, or the program does not become ready.
    pub fn start(builder: Builder, arguments: &[&str]) -> Result<Self> {
        Self::start_in(builder.build()?, arguments)
    }

    /// The same in a topology that is there.
    ///
    /// # Errors
    /// The program does not become ready.
    pub fn start_in(mut topology: Topology, arguments: &[&str]) -> Result<Self> {
        let instance = Instance::new(&topology.host);
        let process = start(&instance, &topology, arguments)?;
        if topology.guests.iter().any(Guest::is_unplugged) {
            topology.plug_in()?;
        }
        Ok(Self {
            process,
            instance,
            topology,
        })
    }

    /// Ends the instance as its user would, and starts it again with other
    /// arguments.
    ///
    /// # Errors
    /// It does not end well, or does not become ready.
    pub fn restart(&mut self, arguments: &[&str]) -> Result<()> {
        let status = self.process.terminate(PATIENCE)?;
        ensure!(status.success(), "{status}: {}", self.process.stderr());
        self.process = start(&self.instance, &self.topology, arguments)?;
        Ok(())
    }

    /// All that the instance has written, to standard output and error.
    #[must_use]
    pub fn said(&self) -> String {
        format!("{}{}", self.process.stdout(), self.process.stderr())
    }

    /// The guest with this number.
    ///
    /// # Panics
    /// There are fewer.
    #[must_use]
    pub fn guest(&self, number: usize) -> &Guest {
        &self.topology.guests[number]
    }

    /// An endpoint of a guest.
    ///
    /// # Panics
    /// There are fewer guests.
    #[must_use]
    pub fn guest_endpoint(&self, number: usize, port: u16) -> SocketAddr {
        SocketAddr::new(self.guest(number).address.into(), port)
    }

    /// A UDP socket of a guest; port 0 chooses a free one.
    ///
    /// # Errors
    /// The port is taken.
    pub fn guest_socket(&self, number: usize, port: u16) -> Result<UdpSocket> {
        let local = self.guest_endpoint(number, port);
        traffic::udp_socket(&self.guest(number).namespace, local)
    }

    /// Sends a little of everything from each guest to the world and back.
    ///
    /// # Errors
    /// Something does not get through.
    pub fn check_reach(&self) -> Result<()> {
        const PORT: u16 = 7;
        let Topology { guests, world, .. } = &self.topology;
        let tcp = TcpReflector::start(world, server(0, PORT))?;
        let udp = UdpReflector::start(world, server(1, PORT))?;
        for guest in guests {
            let any_port = SocketAddr::new(guest.address.into(), 0);
            let socket = traffic::udp_socket(&guest.namespace, any_port)?;
            traffic::reflect_udp(&socket, udp.address(), &traffic::pattern(1000))?;
            let mut session = TcpSession::open(&guest.namespace, None, tcp.address())?;
            session.exchange(&traffic::pattern(100_000))?;
            let ping = traffic::ping(&guest.namespace, server(0, 0).ip(), 1, &[])?;
            ensure!(ping.received == 1, "{}", ping.output);
        }
        Ok(())
    }
}

fn start(instance: &Instance, topology: &Topology, arguments: &[&str]) -> Result<Process> {
    let inside = topology.inside();
    let inside = inside.iter().flat_map(|value| ["--inside", value]);
    let arguments: Vec<_> = inside.chain(arguments.iter().copied()).collect();
    instance.start(&arguments)
}

/// An endpoint of the world.
///
/// # Panics
/// The world has no such address.
#[must_use]
pub fn server(number: usize, port: u16) -> SocketAddr {
    SocketAddr::new(WORLD_ADDRESSES[number].into(), port)
}

/// An endpoint of the host on the uplink, which is also the guests' outside
/// endpoint.
#[must_use]
pub fn outside(port: u16) -> SocketAddr {
    SocketAddr::new(OUTSIDE, port)
}

/// A little more than so many seconds of the datapath's clock, for timeouts to
/// pass: what it looks at may be half a second older than it says, and mappings
/// live as much longer again.
#[must_use]
pub fn just_over(seconds: u64) -> Duration {
    Duration::from_millis(seconds * 1000 + 1400)
}
