//! What the tables say, for people and for programs: plain values with names and units, made from
//! the tables' entries without a kernel. Their serialisation is the JSON that `--json` prints; a
//! field is never renamed or given another meaning without a new [`SCHEMA`].
//!
//! Each subject has a file of its own; what several of them hold is here.

mod device;
mod flow;
mod guest;
mod label;
mod mapping;
mod protocol;
mod reason;
mod status;
mod usage;
mod way_in;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use tapnat_common::{net::Be16, time::Ticks};

pub(crate) use self::label::by_name;
pub use self::{
    device::{DeviceView, LinkLayer},
    flow::Flow,
    guest::GuestView,
    label::Label,
    mapping::{MappingKind, MappingView},
    protocol::{Protocol, WHOLE, protocol_number},
    reason::{ReasonView, is_loss},
    status::{PolicyView, PrefixPairView, Status, StatusSource, TimeoutsView, UplinkHookView},
    usage::{FamiliesView, TablesView, UsageView},
    way_in::{ForwardView, MadeBy, StaticView},
};

/// The version of everything that `--json` prints.
pub const SCHEMA: u32 = 1;

/// An address and a port. For ICMP queries the port of the side that asked is the query's
/// identifier and that of the other side 0; protocols without ports have 0.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Deserialize, Serialize)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: u16,
}

impl Endpoint {
    pub(crate) fn new(address: impl Into<IpAddr>, port: Be16) -> Self {
        Self {
            address: address.into().to_canonical(),
            port: port.get(),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(formatter)
    }
}

/// A number for each direction.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Directions {
    /// From the guest.
    pub outbound: u64,
    /// To the guest.
    pub inbound: u64,
}

impl Directions {
    #[must_use]
    pub fn total(self) -> u64 {
        self.outbound.saturating_add(self.inbound)
    }

    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            outbound: self.outbound.saturating_add(other.outbound),
            inbound: self.inbound.saturating_add(other.inbound),
        }
    }
}

/// Rounded up, and without the time by which the datapath's stamps may be late, which everything
/// lives on.
fn seconds_left(ticks: Ticks, late: Ticks) -> u64 {
    ticks
        .milliseconds()
        .saturating_sub(late.milliseconds())
        .div_ceil(1000)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tapnat_common::{
        abi::{ABI_VERSION, Settings, Timeouts},
        net::Be32,
        time::Instant,
    };

    use super::*;

    pub(super) fn settings() -> Settings {
        Settings {
            abi_version: ABI_VERSION,
            timeouts: Timeouts::default(),
            ..Settings::default()
        }
    }

    pub(super) fn address(text: &str) -> Be32 {
        text.parse::<Ipv4Addr>().unwrap().into()
    }

    pub(super) fn at(seconds: u32) -> Instant {
        Instant::default().after(Ticks::from_seconds(seconds))
    }
}
