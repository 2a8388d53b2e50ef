//! Names for guests. They are told of the host's resolvers where they reach these themselves. Where
//! they do not, as with systemd-resolved, which listens on the host's loopback only, the host asks for
//! them: a [`forwarder`] listens on the host's address on their device. Decides who asks whom;
//! [`crate::host::resolvers`] knows whom there is to ask, and [`crate::dhcp`] and [`crate::router`]
//! tell guests.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Error, Result, anyhow};
use ipnet::IpNet;
use tokio::task::JoinHandle;

use self::{forwarder::Forwarder, room::Rooms};
use crate::host::resolvers;

mod forwarder;
mod room;

/// One `--dns`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resolver {
    /// The host, which asks its own.
    Host,
    Address(IpAddr),
}

/// The host's address on a device that guests are behind. They are told of resolvers of its family.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Gateway {
    pub device: String,
    pub index: u32,
    pub address: IpAddr,
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
            anyhow!("'{text}' is no address: write 192.0.2.53, or {FORWARD} to have the host ask")
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
    Given(Vec<IpAddr>),
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
    denied: Vec<IpNet>,
    rooms: Arc<Rooms>,
    /// By the device's index and the host's address on it.
    forwarders: HashMap<(u32, IpAddr), JoinHandle<()>>,
    /// Notes that need no repeating.
    told: Vec<String>,
}

impl Names {
    /// Goes by this from now on, for the guests behind these and no others. Returns what the operator should
    /// know. Must be called within a tokio runtime.
    pub fn settle(
        &self,
        gateways: &[Gateway],
        resolvers: &Resolvers,
        denied: &[IpNet],
    ) -> Vec<String> {
        let mut state = self.state();
        state.resolvers = resolvers.clone();
        state.denied = denied.to_vec();
        let may_forward = match resolvers {
            Resolvers::Automatic | Resolvers::Host => true,
            Resolvers::NotHost | Resolvers::Given(_) => false,
        };
        state.forwarders.retain(|key, task| {
            let is_wanted = gateways.iter().any(|gateway| gateway.key() == *key);
            let stays = may_forward && is_wanted && !task.is_finished();
            if !stays {
                task.abort();
            }
            stays
        });
        let mut notes = Vec::new();
        for gateway in gateways {
            if state.host_asks(gateway) {
                notes.extend(state.listen(gateway).err().map(|error| {
                    let note = explain(gateway, error);
                    format!("{note:#}")
                }));
            }
        }
        let told = std::mem::replace(&mut state.told, notes.clone());
        notes.retain(|note| !told.contains(note));
        notes
    }

    /// Whom the guests behind an address are to ask, at this time: addresses of its family. Must be
    /// called within a tokio runtime.
    #[must_use]
    pub fn for_guests_of(&self, gateway: &Gateway) -> Vec<IpAddr> {
        let mut state = self.state();
        if let Resolvers::Given(addresses) = &state.resolvers {
            let mut addresses = addresses.clone();
            addresses.retain(|address| gateway.is_alike(address));
            return addresses;
        }
        // The host may be in another network than when it was last looked at.
        if state.host_asks(gateway) && state.answers(gateway) {
            vec![gateway.address]
        } else {
            state.within_reach(gateway)
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        for task in self.state().forwarders.values() {
            task.abort();
        }
    }
}

impl Gateway {
    fn key(&self) -> (u32, IpAddr) {
        (self.index, self.address)
    }

    /// Whether an address is of the same family.
    fn is_alike(&self, address: &IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4()
    }
}

impl State {
    /// Whether the host has to ask for the guests behind this address.
    fn host_asks(&self, gateway: &Gateway) -> bool {
        match self.resolvers {
            Resolvers::Host => true,
            Resolvers::Automatic => {
                self.allowed(gateway, resolvers::beyond_loopback())
                    .is_empty()
                    && !resolvers::of_host().is_empty()
            }
            Resolvers::NotHost | Resolvers::Given(_) => false,
        }
    }

    /// The host's resolvers that guests can ask themselves.
    fn within_reach(&self, gateway: &Gateway) -> Vec<IpAddr> {
        let own = self.allowed(gateway, resolvers::beyond_loopback());
        if own.is_empty() {
            self.allowed(gateway, resolvers::behind_stub())
        } else {
            own
        }
    }

    fn allowed(&self, gateway: &Gateway, mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        let is_denied = |address: &IpAddr| {
            let mut nets = self.denied.iter();
            nets.any(|net| net.contains(address))
        };
        addresses.retain(|address| gateway.is_alike(address) && !is_denied(address));
        addresses
    }

    /// Whether somebody answers guests at the host's address on their device: a forwarder, or
    /// another program of the host.
    fn answers(&mut self, gateway: &Gateway) -> bool {
        match self.listen(gateway) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::AddrInUse,
        }
    }

    fn listen(&mut self, gateway: &Gateway) -> io::Result<()> {
        if self
            .forwarders
            .get(&gateway.key())
            .is_some_and(|task| !task.is_finished())
        {
            return Ok(());
        }
        let forwarder = Forwarder::listen(gateway.clone(), self.rooms.clone())?;
        let task = tokio::spawn(forwarder.run());
        self.forwarders.insert(gateway.key(), task);
        Ok(())
    }
}

fn explain(gateway: &Gateway, error: io::Error) -> Error {
    let Gateway {
        device: name,
        address,
        ..
    } = gateway;
    let what = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another program of the host has port 53 of {address}: guests of {name} are told to ask \
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
        let address = IpAddr::from([192, 0, 2, 53]);
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
            Resolver::Address(IpAddr::from([192, 0, 2, 53]))
        );
        for wrong in ["", "host", "192.0.2", "192.0.2.53:53", "dns.example.org"] {
            let error = wrong.parse::<Resolver>().unwrap_err().to_string();
            assert!(error.contains("write 192.0.2.53"), "{error}");
        }
    }

    fn gateway(address: &str) -> Gateway {
        Gateway {
            device: "tap0".to_owned(),
            index: 7,
            address: address.parse().unwrap(),
        }
    }

    #[test]
    fn resolvers_that_guests_do_not_reach_are_not_theirs() {
        let state = State {
            denied: vec!["192.168.0.0/16".parse().unwrap()],
            ..State::default()
        };
        let all: Vec<IpAddr> = ["192.168.1.1", "192.0.2.53", "2001:db8::53"]
            .iter()
            .map(|address| address.parse().unwrap())
            .collect();
        assert_eq!(state.allowed(&gateway("10.0.0.1"), all.clone()), [all[1]]);
        assert_eq!(state.allowed(&gateway("fd00::1"), all.clone()), [all[2]]);
    }

    #[test]
    fn guests_are_told_of_what_was_given_in_their_family() {
        let names = Names::default();
        let given = ["192.0.2.53", "2001:db8::53"].map(|address| address.parse().unwrap());
        names.settle(&[], &Resolvers::Given(given.to_vec()), &[]);
        assert_eq!(names.for_guests_of(&gateway("10.0.0.1")), [given[0]]);
        assert_eq!(names.for_guests_of(&gateway("fd00::1")), [given[1]]);
    }
}
