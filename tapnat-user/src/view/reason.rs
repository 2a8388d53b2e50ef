//! What became of packets, counted by reason.

use serde::Serialize;
use tapnat_common::{
    abi::Counter,
    verdict::{Outcome, Reason},
};

/// How many packets left the datapath for one reason.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct ReasonView {
    pub reason: &'static str,
    /// `pass`, `drop`, `refuse` (dropped, and the sender told) or `forward`.
    pub outcome: &'static str,
    pub packets: u64,
    pub bytes: u64,
}

impl ReasonView {
    #[must_use]
    pub fn new(reason: Reason, counter: Counter) -> Self {
        Self {
            reason: reason.label(),
            outcome: outcome_label(reason.outcome()),
            packets: counter.packets,
            bytes: counter.bytes,
        }
    }
}

/// The name of what becomes of a packet.
#[must_use]
pub const fn outcome_label(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "pass",
        Outcome::Ask => "ask",
        Outcome::Drop => "drop",
        Outcome::Refuse => "refuse",
        Outcome::Hold => "hold",
        Outcome::Fragment => "fragment",
        Outcome::Forward => "forward",
    }
}
