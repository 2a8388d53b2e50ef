//! `cargo xtask fuzz`: tries arbitrary packets on the datapath's decisions for longer than `cargo
//! xtask test` does. Owns how long; what is tried, and what must hold, stands in
//! `tapnat-common/tests/datapath/arbitrary.rs`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::command;

/// Sequences of packets of each IP version in one round: each round draws others.
const SEQUENCES: u32 = 10_000;

/// Try arbitrary packets on the datapath's decisions; needs no root
#[derive(Args)]
pub struct Options {
    /// How long, to the end of the round that is then under way
    #[arg(long, value_name = "NUMBER", default_value_t = 5)]
    minutes: u32,
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    let enough = Duration::from_secs(u64::from(options.minutes) * 60);
    let begin = Instant::now();
    let mut rounds = 0;
    loop {
        // A failure prints the shortest sequence of packets that shows it.
        command::output(
            command::cargo("test")
                .args(["--quiet", "--profile", "fuzz"])
                .args(["--package", "tapnat-common", "--test", "datapath"])
                .args(["--", "arbitrary"])
                .env("PROPTEST_CASES", SEQUENCES.to_string()),
        )
        .context("something that must always hold does not: see above")?;
        rounds += 1;
        let minutes = begin.elapsed().as_secs_f64() / 60.0;
        println!(
            "fuzz: {} sequences of packets of each IP version in {minutes:.1} minutes, all as they must be",
            rounds * SEQUENCES
        );
        if begin.elapsed() >= enough {
            return Ok(());
        }
    }
}
