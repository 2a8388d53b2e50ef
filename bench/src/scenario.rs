//! What is measured, one file each.

mod established;

use anyhow::Result;
use clap::ValueEnum;

/// One question that is answered by measuring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Time a packet of an established flow takes
    Established,
}

impl Scenario {
    pub const ALL: &[Self] = &[Self::Established];

    /// Measures, and prints what came out.
    ///
    /// # Errors
    ///
    /// When a contender does not do its work.
    pub fn run(self, quick: bool) -> Result<()> {
        match self {
            Self::Established => established::run(quick),
        }
    }
}
