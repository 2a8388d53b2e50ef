//! What an instance has for IPv6 besides what serves both families: its tables, and the network as
//! the datapath was told of it.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use tapnat_common::{
    abi::{Settings, maps},
    net::Be128,
    ports::Class,
};

use tokio::time::Instant as Timer;

use super::{Surroundings, answers, now, pressure::Pressure, reserved, set_outside, settings};
use crate::{
    config::Config,
    datapath::{Datapath, Pins},
    ports::PortSet,
    sweep::Sweep,
    tables::{PinnedTables, PrefixTables, Unusable},
    unsolicited::Answers,
};

/// How often stand-ins are given back that have no sessions, at most.
const STAND_INS_PERIOD: Duration = Duration::from_mins(1);

pub(super) struct Six {
    pub tables: PinnedTables<Be128>,
    prefixes: PrefixTables,
    pub known: Surroundings<Be128>,
    sweep: Sweep<Be128>,
    pressure: Pressure,
    pub answers: Option<Answers<Be128>>,
    /// When stand-ins are looked at next.
    stand_ins_at: Timer,
    /// What the tables said before this process came.
    left: Settings<Be128>,
}

impl Six {
    /// Opens the tables and enters what the network looks like. Nothing is translated before
    /// [`Self::begin`].
    pub fn open(
        pins: &Pins,
        config: &Config,
        known: Surroundings<Be128>,
        withheld: &PortSet,
    ) -> Result<Self> {
        let explain = |reason: Unusable| reason.explain(&config.instance, &pins.tables());
        let mut tables = PinnedTables::<Be128>::open_unfilled(&pins.tables()).map_err(explain)?;
        tables.set_devices(&known.devices)?;
        tables.set_denied(&config.deny)?;
        tables.set_untranslated(&config.untranslated)?;
        let mut prefixes = PrefixTables::open(&pins.tables()).map_err(explain)?;
        prefixes.set_pairs(&config.prefixes)?;
        prefixes.set_networks(&known.devices)?;
        tables.set_reserved(&reserved(withheld), &known.outside)?;
        Ok(Self {
            left: tables.settings()?,
            tables,
            prefixes,
            known,
            sweep: Sweep::new(config.sweep_interval),
            pressure: Pressure::default(),
            answers: answers(config),
            stand_ins_at: Timer::now() + STAND_INS_PERIOD,
        })
    }

    /// Has packets translated.
    pub fn begin(&mut self, config: &Config) -> Result<()> {
        self.tables
            .set_nat64(config.nat64.map(|nat64| nat64.prefix))?;
        self.tables
            .set_settings(&settings(config, &self.known.outside, &self.left))
    }

    /// Waits until it is time for [`Self::step`].
    pub async fn due(&self) {
        self.sweep.due().await;
    }

    /// Gives back what is over. `four` are the tables in which stand-ins are guests.
    pub fn step(&mut self, four: &PinnedTables, datapath: &Datapath) -> Result<()> {
        self.sweep.step(&self.tables, datapath, now())?;
        if self.stand_ins_at > Timer::now() {
            return Ok(());
        }
        self.stand_ins_at = Timer::now() + STAND_INS_PERIOD;
        for (address, _) in self.tables.stand_ins()? {
            let is_used = four
                .guest(address)?
                .is_some_and(|guest| guest.sessions != 0 || guest.ports != 0);
            // One whose packet is under way gets the same one again.
            if !is_used {
                self.tables.forget_stand_in(address)?;
            }
        }
        Ok(())
    }

    /// Answers connections that nobody asked for.
    pub fn answer(&mut self) -> Result<()> {
        match &mut self.answers {
            Some(answers) => answers.step(&mut self.tables, now()),
            None => Ok(()),
        }
    }

    /// Looks how full the table is.
    pub fn relieve(&mut self) -> Result<()> {
        self.pressure.step(&mut self.tables, &mut self.sweep)
    }

    /// Enters what the network looks like now, and has routes looked up anew.
    pub fn enter(&mut self, known: Surroundings<Be128>) -> Result<()> {
        let mut settings = self.tables.settings()?;
        if known != self.known {
            self.tables.set_devices(&known.devices)?;
            self.prefixes.set_networks(&known.devices)?;
            if known.outside != self.known.outside && !known.outside.is_empty() {
                // Before the first port of another address is given away.
                let withheld = self.tables.reserved(Class::Tcp)?;
                self.tables.set_reserved(&withheld, &known.outside)?;
            }
            set_outside(&mut settings, &known.outside);
            self.known = known;
            // What stood on an address or a device that is gone is over.
            self.sweep.hurry();
        }
        settings.generation = settings.generation.wrapping_add(1);
        self.tables.set_settings(&settings)
    }

    /// Applies another configuration, by which the network looks like this.
    pub fn apply(&mut self, config: &Config, known: &Surroundings<Be128>) -> Result<()> {
        let left = self.tables.settings()?;
        self.tables.set_denied(&config.deny)?;
        self.tables.set_untranslated(&config.untranslated)?;
        self.tables
            .set_settings(&settings(config, &known.outside, &left))?;
        self.sweep.set_interval(config.sweep_interval);
        // By shorter timeouts much may be over.
        self.sweep.hurry();
        self.answers = answers(config);
        Ok(())
    }

    /// Keeps these ports from guests, of the addresses that are known.
    pub fn withhold(&mut self, withheld: &PortSet) -> Result<()> {
        let outside = &self.known.outside;
        self.tables.set_reserved(&reserved(withheld), outside)
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
        let path = directory.join(name);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
