//! A running instance takes in a changed configuration file: all of it, with no session lost, or
//! nothing of it.

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    Daemon, answers, divide_ports, follow_statics, reserved, settings, settle_host_sockets,
    surroundings, wanted_addresses, warn,
};
use crate::{config::Config, host::systemd, metrics::scrapes::Scrapes, pool, statics};

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
        let left = self.tables.settings()?;
        // What begins from then on is judged by it, and what is there with its next packet.
        self.tables.set_denied(&config.deny)?;
        self.tables.set_untranslated(&config.untranslated)?;
        self.tables
            .set_settings(&settings(config, &known.outside, &left))?;
        if let Some(six) = &mut self.six {
            six.apply(config, &known_six)?;
        }
        let mut notes = follow_statics(&mut self.tables, self.six.as_mut())?;
        let ipv6 = self.six.as_mut().map(|six| &mut six.tables);
        statics::configure(&mut self.tables, ipv6, &self.datapath, &config.forwards)?;
        let six = self.six.as_ref();
        notes.extend(settle_host_sockets(&mut self.datapath, &self.tables, six));
        let wanted = wanted_addresses(config, &self.tables, six)?;
        notes.extend(pool::settle(&wanted, &[], &uplink, &self.host, &mut self.journal).await?);
        let outside_six = six.map(|six| &six.known.outside);
        if config.ports != self.config.ports
            || known.outside != self.known.outside
            || outside_six.is_some_and(|outside| known_six.outside != *outside)
        {
            // What is reserved for guests that no longer get it stays so until the end: the host has
            // ports enough.
            let withheld = divide_ports(config, &self.host, &mut self.journal).await?;
            self.tables
                .set_reserved(&reserved(&withheld), &known.outside)?;
            if let Some(six) = &mut self.six {
                six.known = known_six;
                six.withhold(&withheld)?;
            }
        } else if let Some(six) = &mut self.six {
            six.known = known_six;
        }
        if known.outside.is_empty() && config.speaks_ipv4() {
            notes.push("the uplink has no address: no new sessions until it has one".to_owned());
        }
        self.sweep.set_interval(config.sweep_interval);
        // By shorter timeouts much may be over.
        self.sweep.hurry();
        self.answers = answers(config);
        self.known = known;
        Ok(notes)
    }
}
