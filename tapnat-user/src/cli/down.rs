//! `tapnat down`: the end of an instance.

use anyhow::Result;
use clap::Args;

use super::Instance;
use crate::daemon;

/// Works whether the instance's process runs, was killed, or never finished its start. An instance
/// that does not exist is no failure.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        if !daemon::down(&self.instance.name).await? {
            daemon::tell(&format!(
                "nothing to take away: there is no instance '{}'",
                self.instance.name
            ));
        }
        Ok(())
    }
}
