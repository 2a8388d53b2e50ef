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
        let asks = tables.ipv4.settings()?.flags & setting_flags::ASK_FIREWALL != 0;
        ensure!(
            asks,
            "the tapnat instance '{name}' asks no firewall: start it with `--firewall ask`"
        );
        let pins = Pins::find(name)?;
        let remover = pins.remover()?;
        sweep::ask_again(&tables.ipv4, &remover)?;
        if let Some(tables) = &tables.ipv6 {
            sweep::ask_again(tables, &remover)?;
        }
        Ok(())
    }
}
