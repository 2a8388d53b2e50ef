//! A running instance takes in a changed configuration file: all of it, with no session lost, or
//! nothing of it.

use anyhow::{Context as _, Result, bail, ensure};
use tapnat_common::net::Be128;

use super::{
    Daemon, follow_statics,
    prepare::divide_ports,
    settings::{Surroundings, surroundings},
    settle_host_sockets, wanted_addresses,
};
use crate::{
    config::Config, host::systemd, metrics::scrapes::Scrapes, notice::warn, pool, statics,
};

/// What begins every refusal.
const NOTHING: &str = "nothing was applied";

impl Daemon {
    /// Reads the file again and applies what is different in it. Returns what the operator should
    /// know, one line each.
    ///
    /// # Errors
    ///
    /// When there is no file, something in it is wrong, or needs a restart, or does not go with the
    /// host. Everything is then as it was.
    pub(super) async fn reload(&mut self) -> Result<Vec<String>> {
        if let Err(error) = systemd::reloading() {
            warn(&format!("{error:#}"));
        }
        let result = self.take_in().await;
        if let Err(error) = systemd::ready(&self.summary()) {
            warn(&format!("{error:#}"));
        }
        result
    }

    async fn take_in(&mut self) -> Result<Vec<String>> {
        let Some(reread) = &self.reread else {
            bail!("{NOTHING}: the instance was started without a file; start it with --config");
        };
        let new = (reread.read)().context(NOTHING)?;
        let restart = self.config.needs_restart(&new);
        ensure!(
            restart.is_empty(),
            "{NOTHING}: {} can only change with a new start; end the instance and start it again",
            restart.join(", ")
        );
        if new == self.config {
            return Ok(vec!["the file says what it said before".to_owned()]);
        }
        self.check_forwards(&new).await.context(NOTHING)?;
        let old = self.config.clone();
        let applied = async {
            if new.metrics != old.metrics {
                self.move_scrapes(&new).await?;
            }
            self.apply(&old, &new).await
        };
        match applied.await {
            Ok(notes) => {
                self.config = new;
                self.settle_guests().await;
                Ok(notes)
            }
            Err(error) => {
                let back = async {
                    if new.metrics != old.metrics {
                        self.move_scrapes(&old).await?;
                    }
                    self.apply(&new, &old).await
                };
                if let Err(error) = back.await {
                    warn(&format!("cannot go back to what was before: {error:#}"));
                }
                Err(error.context(NOTHING))
            }
        }
    }

    /// Answers scrapes elsewhere.
    async fn move_scrapes(&mut self, config: &Config) -> Result<()> {
        if let Some(answering) = self.scrapes.take() {
            answering.end().await;
        }
        self.answer_scrapes(config.metrics.map(Scrapes::listen).transpose()?);
        Ok(())
    }

    /// What the network looks like by a configuration.
    async fn around(&self, config: &Config) -> Result<(Surroundings, Surroundings<Be128>)> {
        let links = self.host.netlink().links().await?;
        let links = pool::without_ours(links, &self.plan.uplink.device(), &self.journal);
        Ok((
            surroundings(config, &self.plan, &links),
            surroundings(config, &self.plan, &links),
        ))
    }

    /// Refuses forwards that cannot be, while everything is as it was.
    async fn check_forwards(&self, config: &Config) -> Result<()> {
        pool::check(&config.given_outside(), &self.host).await?;
        let (known, known_six) = self.around(config).await?;
        let (ground, ground_six) = (known.ground(), known_six.ground());
        let six = self.six.as_ref();
        statics::check(
            (&self.four.tables, &ground),
            six.map(|six| (&six.version.tables, &ground_six)),
            &config.forwards,
        )
    }

    /// Goes over from one configuration to another.
    async fn apply(&mut self, from: &Config, config: &Config) -> Result<Vec<String>> {
        let (known, known_six) = self.around(config).await?;
        let is_elsewhere = known.outside != self.four.known.outside
            || (self.six.iter()).any(|six| known_six.outside != six.version.known.outside);
        // What is reserved for guests that no longer get it stays so until the end: the host has
        // ports enough.
        let withheld = if config.ports != from.ports || is_elsewhere {
            Some(divide_ports(config, &self.host, &mut self.journal).await?)
        } else {
            None
        };
        self.four.apply(config, known, withheld.as_ref())?;
        if let Some(six) = &mut self.six {
            six.apply(config, known_six, withheld.as_ref())?;
        }
        let mut notes = follow_statics(&mut self.four.tables, self.six.as_mut())?;
        let ipv6 = self.six.as_mut().map(|six| &mut six.version.tables);
        statics::configure(
            &mut self.four.tables,
            ipv6,
            &self.datapath,
            &config.forwards,
        )?;
        let six = self.six.as_ref();
        notes.extend(settle_host_sockets(
            &mut self.datapath,
            &self.four.tables,
            six,
        ));
        let wanted = wanted_addresses(config, &self.four.tables, six)?;
        let uplink = self.plan.uplink.device();
        notes.extend(pool::settle(&wanted, &[], &uplink, &self.host, &mut self.journal).await?);
        if self.four.known.outside.is_empty() && config.speaks_ipv4() {
            notes.push("the uplink has no address: no new sessions until it has one".to_owned());
        }
        Ok(notes)
    }
}
