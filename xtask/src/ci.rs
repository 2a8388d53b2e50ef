//! `cargo xtask ci`: everything a change must pass.

use anyhow::Result;

use crate::{lint, test};

/// Runs the verb.
pub fn run() -> Result<()> {
    lint::run()?;
    test::run(&test::Options::default())
}
