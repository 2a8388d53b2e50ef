//! The benchmarks: compares tapnat with the bare path and with other NATs, scenario by scenario.
//! `cargo xtask bench` starts it; `docs/performance.md` says how it measures and why.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "figures are rounded to be shown, and counts and lengths are small"
)]

mod abi;
mod contender;
mod packets;
mod processor;
mod report;
mod rig;
mod rounds;
mod scenario;
mod statistics;
mod user_space;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser;

use rounds::Effort;
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

    /// Only cases whose title contains this, such as `30000`
    #[arg(long, default_value = "", hide_default_value = true)]
    case: String,

    /// Compare with this program, another build of tapnat, in place of all others (`established`,
    /// `new-flows`, `program`)
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,

    /// Where to write the JSON and the drawings
    #[arg(long, value_name = "DIRECTORY", default_value = "target/bench")]
    output: PathBuf,
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
    if let Some(program) = &options.against {
        let program = program.canonicalize();
        let program = program.context("cannot find the other build of tapnat")?;
        contender::OTHER_BUILD.get_or_init(|| program);
    }
    let effort = Effort::new(options.quick);
    for scenario in scenarios {
        scenario
            .run(effort, &options.case)?
            .finish(&options.output)?;
    }
    Ok(())
}
