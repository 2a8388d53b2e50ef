//! What leads to guests from outside because the operator said so.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use super::{Endpoint, Label, Protocol, label};
use crate::forwards::{Share, Standing};

/// Who let something in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MadeBy {
    /// The configuration, a file or the options of `tapnat run`.
    Config,
    Command,
}

impl MadeBy {
    fn of(standing: &Standing) -> Self {
        if standing.configured {
            Self::Config
        } else {
            Self::Command
        }
    }
}

impl Label for MadeBy {
    fn label(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Command => "command",
        }
    }
}

/// Ports of an outside address that lead to a guest.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ForwardView {
    pub protocol: Protocol,
    /// With the first port.
    pub outside: Endpoint,
    /// With the first port.
    pub inside: Endpoint,
    /// How many ports, in the same order on both sides.
    pub ports: u32,
    /// Who may come in.
    pub from: IpNet,
    #[serde(serialize_with = "label::by_name")]
    pub made_by: MadeBy,
    /// Whether it was made for this outside address; else it moves with the uplink's.
    pub address_given: bool,
    /// Sessions that stand on it, started from either side.
    pub sessions: u32,
}

impl From<&Standing> for ForwardView {
    fn from(standing: &Standing) -> Self {
        let forward = &standing.forward;
        let (protocol, outside, inside, ports) = match forward.share {
            Share::Ports {
                protocol,
                outside,
                inside,
            } => (
                Protocol(protocol.number()),
                outside.first,
                inside.first,
                outside.count(),
            ),
            Share::Everything => (Protocol::WHOLE, 0, 0, 1),
        };
        Self {
            protocol,
            outside: Endpoint {
                address: standing.outside_address,
                port: outside,
            },
            inside: Endpoint {
                address: forward.inside_address,
                port: inside,
            },
            ports,
            from: forward.from,
            made_by: MadeBy::of(standing),
            address_given: forward.outside_address.is_some(),
            sessions: standing.sessions,
        }
    }
}

/// An outside address that is one guest's alone.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct StaticView {
    pub outside: IpAddr,
    pub inside: IpAddr,
    /// Who may come in.
    pub from: IpNet,
    #[serde(serialize_with = "label::by_name")]
    pub made_by: MadeBy,
}

impl From<&Standing> for StaticView {
    fn from(standing: &Standing) -> Self {
        Self {
            outside: standing.outside_address,
            inside: standing.forward.inside_address,
            from: standing.forward.from,
            made_by: MadeBy::of(standing),
        }
    }
}
