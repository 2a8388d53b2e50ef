//! `tapnat revalidate`: the host's firewall is asked again about the sessions that are there.

use anyhow::{Result, ensure};
use clap::Args;
use tapnat_common::abi::setting_flags;

use super::Instance;
use crate::{datapath::Pins, sweep};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let name = &self.instance.name;
        let tables = self.instance.tables()?;
        let asks = tables.settings()?.flags & setting_flags::ASK_FIREWALL != 0;
        ensure!(
            asks,
            "the tapnat instance '{name}' asks no firewall: start it with `--firewall ask`"
        );
        sweep::ask_again(&tables, &Pins::find(name)?.remover()?)?;
        Ok(())
    }
}
