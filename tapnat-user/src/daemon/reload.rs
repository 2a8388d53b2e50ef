//! A running instance takes in a changed configuration file: all of it, with no session lost, or
//! nothing of it.

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    Daemon, follow_statics, prepare::divide_ports, settings::surroundings, settle_host_sockets,
    wanted_addresses,
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
        let old = self.config.clone();
        let applied = async {
            if new.metrics != old.metrics {
                self.move_scrapes(&new).await?;
            }
            self.apply(&new).await
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
                    self.apply(&old).await
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

    async fn apply(&mut self, config: &Config) -> Result<Vec<String>> {
        let uplink = self.plan.uplink.device();
        let links = self.host.netlink().links().await?;
        let links = pool::without_ours(links, &uplink, &self.journal);
        let known = surroundings(config, &self.plan, &links);
        let known_six = surroundings(config, &self.plan, &links);
        self.four.apply(config, &known.outside)?;
        if let Some(six) = &mut self.six {
            six.version.apply(config, &known_six.outside)?;
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
        notes.extend(pool::settle(&wanted, &[], &uplink, &self.host, &mut self.journal).await?);
        let is_elsewhere = known.outside != self.four.known.outside
            || six.is_some_and(|six| known_six.outside != six.version.known.outside);
        self.four.known = known;
        if let Some(six) = &mut self.six {
            six.version.known = known_six;
        }
        if config.ports != self.config.ports || is_elsewhere {
            // What is reserved for guests that no longer get it stays so until the end: the host has
            // ports enough.
            let withheld = divide_ports(config, &self.host, &mut self.journal).await?;
            self.four.withhold(&withheld)?;
            if let Some(six) = &mut self.six {
                six.version.withhold(&withheld)?;
            }
        }
        if self.four.known.outside.is_empty() && config.speaks_ipv4() {
            notes.push("the uplink has no address: no new sessions until it has one".to_owned());
        }
        Ok(notes)
    }
}
