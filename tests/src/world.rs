//! A world of the testbed in which an instance translates. What the instance
//! does is left to real traffic, or to [`crate::wires`].

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    process::Process,
    topology::{Builder, Guest, HOST_ADDRESS, Topology},
    traffic::{self, TcpReflector, TcpSession, UdpReflector},
};

use crate::{
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
};

/// [`Family::outside_address`] of IPv4.
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
    pub fn start_in(topology: Topology, arguments: &[&str]) -> Result<Self> {
        let instance = Instance::new(&topology.host);
        Self::start_instance(topology, instance, arguments)
    }

    /// The same with an instance of this topology's host that is prepared.
    ///
    /// # Errors
    /// The program does not become ready.
    pub fn start_instance(
        mut topology: Topology,
        instance: Instance,
        arguments: &[&str],
    ) -> Result<Self> {
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

    /// A result, whose error also tells what became of the packets: without that, one that got lost
    /// on somebody else's machine is hard to find.
    ///
    /// # Errors
    /// The result is one.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| {
            let status = self.instance.ask("status", &[]);
            let flows = self.instance.ask("flows", &[]);
            format!(
                "{}\n{}",
                status.unwrap_or_else(|error| format!("{error:#}")),
                flows.unwrap_or_else(|error| format!("{error:#}")),
            )
        })
    }

    /// The family in which it is looked at where it has both.
    #[must_use]
    pub fn family(&self) -> Family {
        if self.topology.has_ipv4() { V4 } else { V6 }
    }

    /// Those that it has.
    #[must_use]
    pub fn families(&self) -> Vec<Family> {
        let ipv4 = self.topology.has_ipv4().then_some(V4);
        let ipv6 = self.topology.has_ipv6().then_some(V6);
        ipv4.into_iter().chain(ipv6).collect()
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
        self.guest_endpoint_in(self.family(), number, port)
    }

    /// The same in one of the families of a world that has both.
    ///
    /// # Panics
    /// There are fewer guests.
    #[must_use]
    pub fn guest_endpoint_in(&self, family: Family, number: usize, port: u16) -> SocketAddr {
        SocketAddr::new(family.address_of(self.guest(number)), port)
    }

    /// A UDP socket of a guest; port 0 chooses a free one.
    ///
    /// # Errors
    /// The port is taken.
    pub fn guest_socket(&self, number: usize, port: u16) -> Result<UdpSocket> {
        self.guest_socket_in(self.family(), number, port)
    }

    /// The same in one of the families of a world that has both.
    ///
    /// # Errors
    /// The port is taken.
    pub fn guest_socket_in(&self, family: Family, number: usize, port: u16) -> Result<UdpSocket> {
        let local = self.guest_endpoint_in(family, number, port);
        traffic::udp_socket(&self.guest(number).namespace, local)
    }

    /// Sends a little of everything from each guest to the world and back, in
    /// each family that they have.
    ///
    /// # Errors
    /// Something does not get through.
    pub fn check_reach(&self) -> Result<()> {
        for family in self.families() {
            self.check_reach_in(family)
                .with_context(|| format!("{family:?}"))?;
        }
        Ok(())
    }

    fn check_reach_in(&self, family: Family) -> Result<()> {
        const PORT: u16 = 7;
        let Topology { guests, world, .. } = &self.topology;
        let tcp = TcpReflector::start(world, family.server(0, PORT))?;
        let udp = UdpReflector::start(world, family.server(1, PORT))?;
        for guest in guests {
            let any_port = SocketAddr::new(family.address_of(guest), 0);
            let socket = traffic::udp_socket(&guest.namespace, any_port)?;
            traffic::reflect_udp(&socket, udp.address(), &traffic::pattern(1000))?;
            let mut session = TcpSession::open(&guest.namespace, None, tcp.address())?;
            session.exchange(&traffic::pattern(100_000))?;
            let ping = traffic::ping(&guest.namespace, family.server(0, 0).ip(), 1, &[])?;
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

/// [`Family::server`] of IPv4.
///
/// # Panics
/// The world has no such address.
#[must_use]
pub fn server(number: usize, port: u16) -> SocketAddr {
    V4.server(number, port)
}

/// [`Family::outside`] of IPv4.
#[must_use]
pub fn outside(port: u16) -> SocketAddr {
    V4.outside(port)
}

/// A little more than so many seconds of the datapath's clock, for timeouts to
/// pass: what it looks at may be half a second older than it says, and mappings
/// live as much longer again.
#[must_use]
pub fn just_over(seconds: u64) -> Duration {
    Duration::from_millis(seconds * 1000 + 1400)
}
