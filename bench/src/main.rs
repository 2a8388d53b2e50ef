//! The benchmarks: compares tapnat with the bare path and with other NATs, scenario by scenario.
//! `cargo xtask bench` starts it.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "frames, rounds and shares are small"
)]

mod abi;
mod contender;
mod packets;
mod processor;
mod rig;
mod scenario;
mod statistics;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use scenario::Scenario;

/// Compare tapnat with the bare path and with other NATs.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Options {
    /// What to measure [default: everything]
    scenarios: Vec<Scenario>,

    /// Fewer, shorter rounds: to try it out, not to publish
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let scenarios = if options.scenarios.is_empty() {
        Scenario::ALL
    } else {
        &options.scenarios
    };
    for scenario in scenarios {
        scenario.run(options.quick)?;
    }
    Ok(())
}
