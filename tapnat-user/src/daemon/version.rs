//! What an instance keeps of one IP version: its tables, the network as the datapath was told of it,
//! and what is done there from time to time.

use anyhow::Result;
use tapnat_common::{abi::Settings, net::Be32, ports::Class};

use super::{
    pressure::Pressure,
    settings::{Surroundings, reserved, set_outside, settings},
    wait,
};
use crate::{
    clock::now,
    config::Config,
    datapath::{Datapath, Pins},
    family::IpFamily,
    notice::warn,
    ports::PortSet,
    sweep::{Sweep, unplug_guests},
    tables::PinnedTables,
    unsolicited::Answers,
    uplink_hook::Chosen,
};

pub(super) struct Version<A: IpFamily = Be32> {
    pub tables: PinnedTables<A>,
    pub known: Surroundings<A>,
    sweep: Sweep<A>,
    pressure: Pressure,
    answers: Option<Answers<A>>,
    /// What the tables said before this process came.
    left: Settings<A>,
}

/// What it is time for.
pub(super) enum Due {
    Sweep,
    Pressure,
    Answers,
}

impl<A: IpFamily> Version<A> {
    /// Opens the tables and enters what the network looks like. Nothing is translated before
    /// [`Self::begin`].
    pub fn open(
        pins: &Pins,
        config: &Config,
        known: Surroundings<A>,
        withheld: &PortSet,
    ) -> Result<Self> {
        let directory = pins.tables();
        let mut tables = PinnedTables::<A>::open_unfilled(&directory)
            .map_err(|reason| reason.explain(&config.instance, &directory))?;
        tables.set_devices(&known.devices)?;
        tables.set_denied(&config.deny)?;
        tables.set_untranslated(&config.untranslated)?;
        tables.set_reserved(&reserved(withheld), &known.outside)?;
        Ok(Self {
            left: tables.settings()?,
            tables,
            known,
            sweep: Sweep::new(config.sweep_interval),
            pressure: Pressure::default(),
            answers: answers(config),
        })
    }

    /// Has packets translated.
    pub fn begin(&mut self, config: &Config, chosen: Chosen) -> Result<()> {
        let mut settings = settings(config, &self.known.outside, &self.left);
        settings.flags = chosen.kept_in(settings.flags);
        self.tables.set_settings(&settings)
    }

    /// Waits until there is something to do.
    pub async fn due(&self) -> Due {
        tokio::select! {
            () = self.sweep.due() => Due::Sweep,
            () = self.pressure.due() => Due::Pressure,
            () = wait(self.answers.as_ref(), Answers::due) => Due::Answers,
        }
    }

    /// Does what it is time for.
    pub fn step(&mut self, due: &Due, datapath: &Datapath) -> Result<()> {
        match due {
            Due::Sweep => self.sweep.step(&self.tables, datapath, now()),
            Due::Pressure => self.pressure.step(&mut self.tables, &mut self.sweep),
            Due::Answers => match &mut self.answers {
                Some(answers) => answers.step(&mut self.tables, now()),
                None => Ok(()),
            },
        }
    }

    /// Enters what the network looks like now, and has routes looked up anew.
    pub fn enter(&mut self, known: Surroundings<A>, chosen: Chosen) -> Result<()> {
        self.surround(known)?;
        let mut settings = self.tables.settings()?;
        set_outside(&mut settings, &self.known.outside);
        settings.generation = settings.generation.wrapping_add(1);
        settings.flags = chosen.kept_in(settings.flags);
        self.tables.set_settings(&settings)
    }

    /// Forgets from which link addresses guests sent whose devices these are.
    pub fn unplug(&self, devices: &[u32], datapath: &Datapath) -> Result<()> {
        let guests = self.tables.guests()?.into_iter();
        let unplugged = guests.filter(|(_, guest)| devices.contains(&guest.device));
        let unplugged: Vec<_> = unplugged.map(|(address, _)| address).collect();
        unplug_guests(&unplugged, datapath)
    }

    /// Enters what the network looks like, but for the settings.
    fn surround(&mut self, known: Surroundings<A>) -> Result<()> {
        if known == self.known {
            return Ok(());
        }
        self.tables.set_devices(&known.devices)?;
        if known.outside != self.known.outside && !known.outside.is_empty() {
            // Before the first port of another address is given away.
            let withheld = self.tables.reserved(Class::Tcp)?;
            self.tables.set_reserved(&withheld, &known.outside)?;
        }
        self.known = known;
        // What stood on an address or a device that is gone is over.
        self.sweep.hurry();
        Ok(())
    }

    /// Applies another configuration, by which the network looks so and these ports are kept from
    /// guests, if others than before. What begins from then on is judged by it, and what is there
    /// with its next packet.
    pub fn apply(
        &mut self,
        config: &Config,
        known: Surroundings<A>,
        withheld: Option<&PortSet>,
    ) -> Result<()> {
        self.surround(known)?;
        if let Some(withheld) = withheld {
            let outside = &self.known.outside;
            self.tables.set_reserved(&reserved(withheld), outside)?;
        }
        let left = self.tables.settings()?;
        self.tables.set_denied(&config.deny)?;
        self.tables.set_untranslated(&config.untranslated)?;
        let settings = settings(config, &self.known.outside, &left);
        self.tables.set_settings(&settings)?;
        self.sweep.set_interval(config.sweep_interval);
        // By shorter timeouts much may be over.
        self.sweep.hurry();
        self.answers = answers(config);
        Ok(())
    }
}

/// Who answers connections that nobody asked for, if somebody is to. Without the privilege for it
/// all else still works.
fn answers<A: IpFamily>(config: &Config) -> Option<Answers<A>> {
    if !config.answer_unsolicited {
        return None;
    }
    Answers::open()
        .inspect_err(|error| warn(&format!("{error:#}")))
        .ok()
}
