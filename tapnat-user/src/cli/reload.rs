//! `tapnat reload`: a running instance reads its configuration file again.

use anyhow::Result;
use clap::Args;

use super::Instance;
use crate::control::Request;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        self.instance.change(&Request::Reload).await
    }
}
