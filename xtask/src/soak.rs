//! `cargo xtask soak`: lets the test program `soak` go on for longer than `cargo xtask test` does,
//! and shows what each fault cost. Owns how long; what is done, and what must hold, stands in
//! `tests/tests/soak.rs`.

use anyhow::{Result, ensure};
use clap::Args;

use crate::setup::{self, Group};
use crate::{build, command, test};

/// Traffic, faults and restarts for a while; nothing may be lost or grow. Needs root
#[derive(Args)]
pub struct Options {
    /// How long, to the end of the round that is then under way
    #[arg(long, value_name = "NUMBER", default_value_t = 10.0)]
    minutes: f64,

    /// Soak an optimised build
    #[arg(long)]
    release: bool,
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    ensure!(
        command::is_root(),
        "the soak makes network namespaces and loads eBPF programs: run it as root"
    );
    ensure!(
        options.minutes.is_finite() && options.minutes >= 0.0,
        "{} is no length of time",
        options.minutes
    );
    setup::ensure(&[Group::Build, Group::Sandbox, Group::Test])?;
    let tapnat = build::tapnat(&build::Options {
        release: options.release,
    })?;
    command::run(
        test::program("soak")
            .arg("--nocapture")
            .env("TAPNAT_BIN", tapnat)
            .env("TAPNAT_SOAK_MINUTES", options.minutes.to_string()),
    )
}
