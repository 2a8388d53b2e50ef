//! Names for guests. They are told of the host's resolvers where they reach these themselves. Where
//! they do not, as with systemd-resolved, which listens on the host's loopback only, the host asks for
//! them: a [`forwarder`] listens on the host's address on their device. Decides who asks whom;
//! [`crate::host::resolvers`] knows whom there is to ask, and [`crate::dhcp`] tells guests.

use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Error, Result, anyhow};
use ipnet::Ipv4Net;
use tokio::task::JoinHandle;

use self::{forwarder::Forwarder, room::Rooms};
use crate::{dhcp::Served, host::resolvers};

mod forwarder;
mod room;

/// One `--dns`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resolver {
    /// The host, which asks its own.
    Host,
    Address(Ipv4Addr),
}

/// How [`Resolver::Host`] is written.
const FORWARD: &str = "forward";

impl FromStr for Resolver {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == FORWARD {
            return Ok(Self::Host);
        }
        text.parse().map(Self::Address).map_err(|_| {
            anyhow!(
                "'{text}' is no IPv4 address: write 192.0.2.53, or {FORWARD} to have the host ask"
            )
        })
    }
}

/// Whom guests ask for names.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Resolvers {
    /// The host's resolvers where guests reach them, else the host.
    #[default]
    Automatic,
    /// The host's resolvers where guests reach them, as they do not reach the host.
    NotHost,
    /// The host, which asks its own.
    Host,
    /// These.
    Given(Vec<Ipv4Addr>),
}

impl Resolvers {
    /// What the operator chose. `host_denied`: guests do not reach the host (`--deny-host`).
    #[must_use]
    pub fn choose(given: &[Resolver], host_denied: bool) -> Self {
        if given.contains(&Resolver::Host) {
            return Self::Host;
        }
        let addresses: Vec<_> = given
            .iter()
            .filter_map(|resolver| match resolver {
                Resolver::Host => None,
                Resolver::Address(address) => Some(*address),
            })
            .collect();
        if !addresses.is_empty() {
            Self::Given(addresses)
        } else if host_denied {
            Self::NotHost
        } else {
            Self::Automatic
        }
    }
}

/// Whom the guests of an instance ask, and the forwarders that this takes.
#[derive(Debug, Default)]
pub struct Names {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    resolvers: Resolvers,
    /// Where guests must not send to.
    denied: Vec<Ipv4Net>,
    rooms: Arc<Rooms>,
    /// By the device's index.
    forwarders: HashMap<u32, Running>,
    /// Notes that need no repeating.
    told: Vec<String>,
}

#[derive(Debug)]
struct Running {
    gateway: Ipv4Addr,
    task: JoinHandle<()>,
}

impl Names {
    /// Goes by this from now on, for these devices and no others. Returns what the operator should
    /// know. Must be called within a tokio runtime.
    pub fn settle(
        &self,
        devices: &[Served],
        resolvers: &Resolvers,
        denied: &[Ipv4Net],
    ) -> Vec<String> {
        let mut state = self.state();
        state.resolvers = resolvers.clone();
        state.denied = denied.to_vec();
        let may_forward = match resolvers {
            Resolvers::Automatic | Resolvers::Host => true,
            Resolvers::NotHost | Resolvers::Given(_) => false,
        };
        state.forwarders.retain(|index, running| {
            let is_wanted = |device: &Served| {
                device.index == *index && device.address.addr() == running.gateway
            };
            let stays = may_forward && devices.iter().any(is_wanted) && !running.task.is_finished();
            if !stays {
                running.task.abort();
            }
            stays
        });
        let mut notes = Vec::new();
        if state.host_asks() {
            for device in devices {
                notes.extend(state.listen(device).err().map(|error| {
                    let note = explain(device, error);
                    format!("{note:#}")
                }));
            }
        }
        let told = std::mem::replace(&mut state.told, notes.clone());
        notes.retain(|note| !told.contains(note));
        notes
    }

    /// Whom the guests of a device are to ask, at this time. Must be called within a tokio runtime.
    #[must_use]
    pub fn for_guests_of(&self, device: &Served) -> Vec<Ipv4Addr> {
        let mut state = self.state();
        if let Resolvers::Given(addresses) = &state.resolvers {
            return addresses.clone();
        }
        // The host may be in another network than when it was last looked at.
        if state.host_asks() && state.answers(device) {
            vec![device.address.addr()]
        } else {
            state.within_reach()
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        for running in self.state().forwarders.values() {
            running.task.abort();
        }
    }
}

impl State {
    /// Whether the host has to ask for guests.
    fn host_asks(&self) -> bool {
        match self.resolvers {
            Resolvers::Host => true,
            Resolvers::Automatic => {
                self.allowed(resolvers::beyond_loopback()).is_empty()
                    && !resolvers::of_host().is_empty()
            }
            Resolvers::NotHost | Resolvers::Given(_) => false,
        }
    }

    /// The host's resolvers that guests can ask themselves.
    fn within_reach(&self) -> Vec<Ipv4Addr> {
        let own = self.allowed(resolvers::beyond_loopback());
        if own.is_empty() {
            self.allowed(resolvers::behind_stub())
        } else {
            own
        }
    }

    fn allowed(&self, mut addresses: Vec<Ipv4Addr>) -> Vec<Ipv4Addr> {
        addresses.retain(|address| !self.denied.iter().any(|net| net.contains(address)));
        addresses
    }

    /// Whether somebody answers guests at the host's address on their device: a forwarder, or
    /// another program of the host.
    fn answers(&mut self, device: &Served) -> bool {
        match self.listen(device) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::AddrInUse,
        }
    }

    fn listen(&mut self, device: &Served) -> io::Result<()> {
        if self
            .forwarders
            .get(&device.index)
            .is_some_and(|running| !running.task.is_finished())
        {
            return Ok(());
        }
        let forwarder = Forwarder::listen(device, self.rooms.clone())?;
        let running = Running {
            gateway: device.address.addr(),
            task: tokio::spawn(forwarder.run()),
        };
        self.forwarders.insert(device.index, running);
        Ok(())
    }
}

fn explain(device: &Served, error: io::Error) -> Error {
    let Served { name, address, .. } = device;
    let gateway = address.addr();
    let what = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another program of the host has port 53 of {gateway}: guests of {name} are told to ask \
             that for names; pass --dns with a resolver's address if it does not answer them"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "cannot ask for names for guests of {name}: grant CAP_NET_BIND_SERVICE, or pass --dns \
             with a resolver's address"
        ),
        _ => format!(
            "cannot ask for names for guests of {name}: pass --dns with a resolver's address"
        ),
    };
    Error::new(error).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_choice_goes_before_what_is_found() {
        let address = Ipv4Addr::new(192, 0, 2, 53);
        let given = [Resolver::Address(address)];
        assert_eq!(Resolvers::choose(&[], false), Resolvers::Automatic);
        assert_eq!(Resolvers::choose(&[], true), Resolvers::NotHost);
        assert_eq!(Resolvers::choose(&[Resolver::Host], false), Resolvers::Host);
        for host_denied in [false, true] {
            let chosen = Resolvers::choose(&given, host_denied);
            assert_eq!(chosen, Resolvers::Given(vec![address]));
        }
    }

    #[test]
    fn a_resolver_is_an_address_or_the_host() {
        assert_eq!("forward".parse::<Resolver>().unwrap(), Resolver::Host);
        assert_eq!(
            "192.0.2.53".parse::<Resolver>().unwrap(),
            Resolver::Address(Ipv4Addr::new(192, 0, 2, 53))
        );
        for wrong in ["", "host", "192.0.2", "192.0.2.53:53", "dns.example.org"] {
            let error = wrong.parse::<Resolver>().unwrap_err().to_string();
            assert!(error.contains("write 192.0.2.53"), "{error}");
        }
    }

    #[test]
    fn resolvers_that_guests_must_not_reach_are_not_theirs() {
        let state = State {
            denied: vec!["192.168.0.0/16".parse().unwrap()],
            ..State::default()
        };
        let [denied, other] = [[192, 168, 1, 1], [192, 0, 2, 53]].map(Ipv4Addr::from);
        assert_eq!(state.allowed(vec![denied, other]), [other]);
    }
}
