//! What an instance does now: [looks](look) at its tables and at its devices' counters, and the
//! [rates] between two looks. What `tapnat top`, `tapnat map`, `tapnat status` and `tapnat metrics`
//! show is made here; how it is drawn is theirs.

mod busiest;
mod look;
mod ports;
mod rates;
#[cfg(test)]
pub(crate) mod samples;
mod status;
mod traffic;
mod view;

pub use self::{
    look::Look,
    ports::{PortsView, ports_in_use},
    rates::{Rate, Rates, rounded},
    status::{devices, guests, status},
    view::{Activity, DeviceActivity, FlowActivity, GuestActivity, GuestDetail, ReasonActivity},
};
