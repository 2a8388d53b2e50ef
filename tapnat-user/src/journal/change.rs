//! The changes to a host that there are, what each is made to, and who makes them.

use std::net::Ipv4Addr;

use anyhow::Result;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    host::{
        netlink::Device,
        sysctl::Sysctl,
        tap::{Owner, Queues},
    },
    ports::PortSet,
};

/// One change to the host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Change {
    /// A persistent tap was created. Its index is known only once it exists.
    CreateTap {
        name: String,
        queues: Queues,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<Owner>,
        index: Option<u32>,
    },
    /// An address was put on a device.
    AddAddress {
        device: Device,
        address: IpNet,
        /// Who is at the other end, if the address is of no network.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peer: Option<Ipv4Addr>,
    },
    /// A device was set up.
    SetUp { device: Device },
    /// A kernel parameter was changed.
    SetSysctl {
        sysctl: Sysctl,
        old: String,
        new: String,
    },
    /// Ports were added to `net.ipv4.ip_local_reserved_ports`.
    ReservePorts { ports: PortSet },
    /// The clsact queueing discipline was put on a device.
    AddClsact { device: Device },
    /// A filter was put in a device's clsact.
    AddFilter {
        device: Device,
        #[serde(default)]
        direction: Direction,
        priority: u16,
        handle: u16,
    },
    /// The instance's directory for maps and links was made in the BPF file system. Its path is not
    /// recorded: it differs between mount namespaces.
    PinDirectory,
}

/// Which of a device's packets a program meets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    #[default]
    Arriving,
    Leaving,
}

impl Change {
    /// Whether the change is to one network namespace, and gone when that is gone.
    #[must_use]
    pub fn in_network_namespace(&self) -> bool {
        *self != Self::PinDirectory
    }

    /// The device that is changed, unless it is one of the instance's own making.
    #[must_use]
    pub fn device(&self) -> Option<&Device> {
        match self {
            Self::AddAddress { device, .. }
            | Self::SetUp { device }
            | Self::AddClsact { device }
            | Self::AddFilter { device, .. } => Some(device),
            Self::CreateTap { .. }
            | Self::SetSysctl { .. }
            | Self::ReservePorts { .. }
            | Self::PinDirectory => None,
        }
    }

    /// Whether it sets this kernel parameter.
    #[must_use]
    pub fn sets(&self, parameter: &Sysctl) -> bool {
        matches!(self, Self::SetSysctl { sysctl, .. } if sysctl == parameter)
    }

    /// Whether both change the same thing, possibly in different ways.
    #[must_use]
    pub fn same_target(&self, other: &Self) -> bool {
        self.target() == other.target()
    }

    fn target(&self) -> Target<'_> {
        match self {
            Self::CreateTap { name, .. } => Target::Tap(name),
            Self::AddAddress {
                device,
                address,
                peer,
            } => Target::Address(device.index, *address, *peer),
            Self::SetUp { device } => Target::Up(device.index),
            Self::SetSysctl { sysctl, .. } => Target::Sysctl(sysctl),
            Self::ReservePorts { .. } => Target::ReservedPorts,
            Self::AddClsact { device } => Target::Clsact(device.index),
            Self::AddFilter {
                device, direction, ..
            } => Target::Filter(device.index, *direction),
            Self::PinDirectory => Target::PinDirectory,
        }
    }

    /// The ports that it adds to those that the host leaves alone.
    #[must_use]
    pub fn reserved_ports(&self) -> Option<&PortSet> {
        if let Self::ReservePorts { ports } = self {
            Some(ports)
        } else {
            None
        }
    }

    /// This change, to be made on top of an earlier one of the same target: what was there before
    /// the earlier one is what has to come back.
    pub(super) fn after(mut self, earlier: &Self) -> Self {
        if let (Self::SetSysctl { old, .. }, Self::SetSysctl { old: before, .. }) =
            (&mut self, earlier)
        {
            old.clone_from(before);
        }
        if let (Self::ReservePorts { ports }, Some(before)) = (&mut self, earlier.reserved_ports())
        {
            *ports = ports.union(before);
        }
        self
    }
}

/// What a change is made to. Devices go by their index.
#[derive(Debug, PartialEq)]
enum Target<'a> {
    Tap(&'a str),
    Address(u32, IpNet, Option<Ipv4Addr>),
    Up(u32),
    Sysctl(&'a Sysctl),
    ReservedPorts,
    Clsact(u32),
    Filter(u32, Direction),
    PinDirectory,
}

/// What came of reverting a change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reverted {
    /// It is as it was before.
    Done,
    /// There was nothing to revert.
    NotThere,
    /// Somebody changed it since, so it was left as it is; says what, in a clause.
    LeftAlone(String),
}

/// Makes changes and reverts them.
pub trait Host {
    /// Makes a change, and fills in what is known only then.
    fn make(&self, change: &mut Change) -> impl Future<Output = Result<()>>;

    /// Takes a change back, also when it was never made.
    fn revert(&self, change: &Change) -> impl Future<Output = Result<Reverted>>;
}
