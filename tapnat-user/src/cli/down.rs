//! `tapnat down`: the end of an instance.

use anyhow::Result;
use clap::Args;

use super::Instance;
use crate::{daemon, notice};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        if !daemon::down(&self.instance.name).await? {
            notice::tell(&format!(
                "nothing to take away: there is no instance '{}'",
                self.instance.name
            ));
        }
        Ok(())
    }
}
