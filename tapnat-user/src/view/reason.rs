//! What became of packets, counted by reason.

use serde::Serialize;
use tapnat_common::{
    abi::Counter,
    verdict::{Outcome, Reason},
};

use super::label;

/// How many packets left the datapath for one reason.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct ReasonView {
    #[serde(serialize_with = "label::by_name")]
    pub reason: Reason,
    #[serde(serialize_with = "label::by_name")]
    pub outcome: Outcome,
    pub packets: u64,
    pub bytes: u64,
}

impl ReasonView {
    #[must_use]
    pub fn new(reason: Reason, counter: Counter) -> Self {
        Self {
            reason,
            outcome: reason.outcome(),
            packets: counter.packets,
            bytes: counter.bytes,
        }
    }
}

/// Whether the packet is gone.
#[must_use]
pub const fn is_loss(outcome: Outcome) -> bool {
    match outcome {
        Outcome::Drop | Outcome::Refuse => true,
        Outcome::Pass | Outcome::Ask | Outcome::Hold | Outcome::Fragment | Outcome::Forward => {
            false
        }
    }
}
