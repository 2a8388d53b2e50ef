//! `cargo xtask`: every command a developer of tapnat needs, one file per verb. Owns the command
//! line and nothing else. No verb here is needed to use an installed tapnat.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod build;
mod ci;
mod command;
mod dist;
mod documents;
mod ebpf_toolchain;
mod fuzz;
mod lint;
mod rfc;
mod run;
mod setup;
mod soak;
mod test;
mod upgrade;

/// Development commands of tapnat.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Setup(setup::Options),
    Build(build::Options),
    Run(run::Options),
    Test(test::Options),
    Bench(bench::Options),
    Dist(dist::Options),
    Fuzz(fuzz::Options),
    Soak(soak::Options),
    /// Check formatting and lints, for this machine and for BPF
    Lint,
    /// Check everything that a change must pass: lint, then test
    Ci,
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(verb: Verb) -> Result<()> {
    match verb {
        Verb::Setup(options) => setup::run(&options),
        Verb::Build(options) => build::run(&options),
        Verb::Run(options) => run::run(options),
        Verb::Test(options) => test::run(&options),
        Verb::Bench(options) => bench::run(&options),
        Verb::Dist(options) => dist::run(&options),
        Verb::Fuzz(options) => fuzz::run(&options),
        Verb::Soak(options) => soak::run(&options),
        Verb::Lint => lint::run(),
        Verb::Ci => ci::run(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
