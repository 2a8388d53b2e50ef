//! What an instance has for IPv6: a [`Version`] like IPv4's, prefixes that are translated, and the
//! stand-ins of NAT64's guests.

use std::time::Duration;

use anyhow::Result;
use aya::maps::MapInfo;
use tapnat_common::{abi::maps, net::Be128};
use tokio::time::Instant as Timer;

use super::{
    settings::Surroundings,
    version::{Due, Version},
};
use crate::{
    config::Config,
    datapath::{Datapath, Pins},
    files,
    ports::PortSet,
    tables::{PinnedTables, PrefixTables},
    uplink_hook::Chosen,
};

/// How often stand-ins are given back that have no sessions, at most.
const STAND_INS_PERIOD: Duration = Duration::from_mins(1);

pub(super) struct Six {
    pub version: Version<Be128>,
    prefixes: PrefixTables,
    /// When stand-ins are looked at next.
    stand_ins_at: Timer,
}

impl Six {
    /// As [`Version::open`].
    pub fn open(
        pins: &Pins,
        config: &Config,
        known: Surroundings<Be128>,
        withheld: &PortSet,
    ) -> Result<Self> {
        let directory = pins.tables();
        let mut prefixes = PrefixTables::open(&directory)
            .map_err(|reason| reason.explain(&config.instance, &directory))?;
        prefixes.set_pairs(&config.prefixes)?;
        prefixes.set_networks(&known.devices)?;
        Ok(Self {
            version: Version::open(pins, config, known, withheld)?,
            prefixes,
            stand_ins_at: Timer::now() + STAND_INS_PERIOD,
        })
    }

    /// As [`Version::begin`].
    pub fn begin(&mut self, config: &Config, chosen: Chosen) -> Result<()> {
        let prefix = config.nat64.map(|nat64| nat64.prefix);
        self.version.tables.set_nat64(prefix)?;
        self.version.begin(config, chosen)
    }

    /// As [`Version::due`].
    pub async fn due(&self) -> Due {
        self.version.due().await
    }

    /// Does what it is time for. `four` are the tables in which stand-ins are guests.
    pub fn step(&mut self, due: &Due, four: &PinnedTables, datapath: &Datapath) -> Result<()> {
        self.version.step(due, datapath)?;
        if self.stand_ins_at > Timer::now() {
            return Ok(());
        }
        self.stand_ins_at = Timer::now() + STAND_INS_PERIOD;
        let tables = &mut self.version.tables;
        for (address, _) in tables.stand_ins()? {
            let is_used = four
                .guest(address)?
                .is_some_and(|guest| guest.sessions != 0 || guest.ports != 0);
            // One whose packet is under way gets the same one again.
            if !is_used {
                tables.forget_stand_in(address)?;
            }
        }
        Ok(())
    }

    /// As [`Version::enter`].
    pub fn enter(&mut self, known: Surroundings<Be128>, chosen: Chosen) -> Result<()> {
        self.surround(&known)?;
        self.version.enter(known, chosen)
    }

    /// As [`Version::apply`].
    pub fn apply(
        &mut self,
        config: &Config,
        known: Surroundings<Be128>,
        withheld: Option<&PortSet>,
    ) -> Result<()> {
        self.surround(&known)?;
        self.version.apply(config, known, withheld)
    }

    fn surround(&mut self, known: &Surroundings<Be128>) -> Result<()> {
        if *known == self.version.known {
            return Ok(());
        }
        self.prefixes.set_networks(&known.devices)
    }
}

/// Forgets the tables that an earlier process without IPv6 left, which have no room for anything.
///
/// # Errors
///
/// When they cannot be removed.
pub(super) fn forget_small_tables(pins: &Pins) -> Result<()> {
    let directory = pins.tables();
    let sessions = MapInfo::from_pin(directory.join(maps::IPV6.sessions));
    if !sessions.is_ok_and(|sessions| sessions.max_entries() <= 1) {
        return Ok(());
    }
    for name in maps::IPV6.all() {
        files::remove(&directory.join(name))?;
    }
    Ok(())
}
