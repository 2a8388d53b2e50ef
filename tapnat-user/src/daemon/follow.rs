//! A running instance follows its host: devices that go and come, addresses and routes that change.
//! What is to become of the instance then is [`crate::preflight`]'s to say; this carries it out, and
//! goes on with the rest when a part of it fails.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use tapnat_common::net::Be128;

use super::{
    Daemon, follow_statics,
    hooks::{attach, choose_hook, hooks, xdp_devices},
    prepare::{claims, facts, forwarded, prepare_inside, set_forwarding},
    settings::{Surroundings, surroundings},
};
use crate::{
    config::Firewall,
    datapath::Hook,
    host::{netlink::Link, systemd},
    journal::{Change, Direction},
    notice::{tell, warn},
    pool,
    preflight::{Plan, PlannedInside},
    uplink_hook::{Chosen, UplinkHook},
};

/// The inside devices that have lost their carrier since, if only for a moment, or are gone from the
/// host. Those that are only served no more have their guests still.
fn unplugged(before: &Plan, now: &[Link]) -> Vec<u32> {
    let is_as_before = |link: &Link| {
        now.iter()
            .any(|it| (it.index, it.carrier_losses) == (link.index, link.carrier_losses))
    };
    let before = before.insides.iter().filter_map(|it| it.link.as_ref());
    let changed = before.filter(|link| !is_as_before(link));
    changed.map(|link| link.index).collect()
}

impl Daemon {
    /// Tells the datapath what the network looks like now, and attaches it to the devices that are
    /// there now.
    pub(super) async fn follow(&mut self) {
        self.retry.begin();
        if let Err(error) = self.take_over_network().await {
            self.fail(&format!("{error:#}"));
        }
        self.retry.end();
    }

    /// Says what failed, which is tried again.
    fn fail(&mut self, message: &str) {
        warn(message);
        self.retry.fail();
    }

    async fn take_over_network(&mut self) -> Result<()> {
        let facts = facts(&self.config, &self.host).await?;
        self.journal.follow_names(&facts.links)?;
        let mut plan = facts.replan(&self.config, &self.plan);
        self.prepare_newcomers(&mut plan).await;
        let links = self.host.netlink().links().await?;
        let claims = claims(&plan, &links);
        if claims != self.journal.claims() {
            self.journal.set_claims(claims)?;
        }
        let chosen = self.choose_hook(&mut plan, &links)?;
        let wanted = hooks(&self.config, &plan, &links, chosen);
        let own = pool::without_ours(links, &plan.uplink.device(), &self.journal);
        let known = surroundings(&self.config, &plan, &own);
        let known_six = surroundings(&self.config, &plan, &own);
        self.tell(&plan, &known, &known_six, &own);
        if !known.outside.is_empty() {
            // What the uplink has is not given up for another one that it had before.
            plan.outside_addresses.retain(IpAddr::is_ipv6);
            let outside = known.outside.iter().copied().map(IpAddr::from);
            plan.outside_addresses.extend(outside);
        }
        let unplugged = unplugged(&self.plan, &facts.links);
        self.unplug(&unplugged)?;
        self.plan = plan;

        self.datapath.load_programs(&wanted)?;
        self.must_let_go |= self.hooks.iter().any(|hook| !wanted.contains(hook));
        self.attach_to(wanted).await;
        let devices = xdp_devices(chosen, &self.plan, self.drivers.as_ref());
        self.datapath.set_xdp_devices(&devices)?;
        self.four.enter(known, chosen)?;
        if let Some(six) = &mut self.six {
            six.enter(known_six, chosen)?;
        }
        for note in follow_statics(&mut self.four.tables, self.six.as_mut())? {
            warn(&note);
        }
        self.let_in().await;
        if self.must_let_go {
            self.let_go().await?;
            self.must_let_go = false;
        }
        self.settle_guests().await;
        for note in self.settle_addresses().await? {
            warn(&note);
        }
        systemd::status(&self.summary())
    }

    /// Forgets who was behind devices that nobody is behind any more, such as taps that QEMU let go:
    /// the next guest there is another one.
    fn unplug(&mut self, devices: &[u32]) -> Result<()> {
        if devices.is_empty() {
            return Ok(());
        }
        self.four.unplug(devices, &self.datapath)?;
        if let Some(six) = &self.six {
            six.version.unplug(devices, &self.datapath)?;
        }
        for inside in &self.plan.insides {
            let index = inside.link.as_ref().map(|link| link.index);
            if !index.is_some_and(|it| devices.contains(&it)) {
                continue;
            }
            if let Some(network) = inside.networks.guests_ipv4() {
                self.dhcp.unplug(network);
            }
            if let Some(network) = inside.networks.ipv6 {
                self.dhcpv6.unplug(network.trunc());
            }
        }
        Ok(())
    }

    /// Where the world's packets meet the first program now. An uplink that cannot do what was asked
    /// for is served all the same.
    fn choose_hook(&self, plan: &mut Plan, links: &[Link]) -> Result<Chosen> {
        let drivers = self.drivers.as_ref();
        let chosen = choose_hook(&self.config, &plan.uplink, drivers, links);
        chosen.or_else(|error| {
            plan.warnings.push(format!("{error:#}"));
            Chosen::new(UplinkHook::Auto, &plan.uplink, None, links)
        })
    }

    /// Gets the inside devices ready that were not there before, and leaves out those that fail.
    async fn prepare_newcomers(&mut self, plan: &mut Plan) {
        let mut ready = Vec::new();
        for inside in plan.insides.drain(..) {
            let is_new = inside
                .link
                .as_ref()
                .is_some_and(|link| self.hooks.iter().all(|it| it.device.index != link.index));
            let prepared = if is_new {
                prepare_inside(&self.config, &inside, &self.host, &mut self.journal).await
            } else {
                Ok(())
            };
            match prepared {
                Ok(()) => ready.push(inside),
                Err(error) => self.fail(&format!(
                    "{} is not served: {error:#}",
                    inside.device_name()
                )),
            }
        }
        plan.insides = ready;
    }

    /// Says what is different from before.
    fn tell(
        &mut self,
        plan: &Plan,
        known: &Surroundings,
        known_six: &Surroundings<Be128>,
        links: &[Link],
    ) {
        for warning in &plan.warnings {
            if !self.told.contains(warning) {
                warn(warning);
            }
        }
        self.told.clone_from(&plan.warnings);
        let index = |inside: &PlannedInside| inside.link.as_ref().map(|link| link.index);
        let is_in = |plan: &Plan, inside: &PlannedInside| {
            plan.insides.iter().any(|it| index(it) == index(inside))
        };
        for inside in self.plan.insides.iter().filter(|it| !is_in(plan, it)) {
            warn(&format!(
                "{} is not served any more, until it is back",
                inside.device_name()
            ));
        }
        for inside in plan.insides.iter().filter(|it| !is_in(&self.plan, it)) {
            tell(&format!(
                "{} is served: {}",
                inside.device_name(),
                inside.networks
            ));
        }
        let name = &plan.uplink.name;
        if plan.uplink.index != self.plan.uplink.index {
            tell(&format!("the uplink is {name} now"));
        }
        let lost_ipv6 = self.six.as_ref().is_some_and(|six| {
            !six.version.known.outside.is_empty() && known_six.outside.is_empty()
        });
        if lost_ipv6 && links.iter().any(|link| link.index == plan.uplink.index) {
            warn(&format!(
                "uplink {name} lost its IPv6 address: no new sessions of IPv6 until it has one"
            ));
        }
        if known.outside.is_empty() && !self.four.known.outside.is_empty() {
            let is_there = links.iter().any(|link| link.index == plan.uplink.index);
            let what = if is_there {
                "lost its IPv4 address: no new sessions until it has one"
            } else {
                "is gone: no new sessions until it is back"
            };
            warn(&format!("uplink {name} {what}"));
        }
    }

    /// Attaches the programs where they are not yet.
    async fn attach_to(&mut self, wanted: Vec<Hook>) {
        let mut attached = Vec::new();
        for hook in wanted {
            let done = if self.hooks.contains(&hook) {
                Ok(())
            } else {
                attach(&self.datapath, &hook, &self.host, &mut self.journal).await
            };
            match done {
                Ok(()) => attached.push(hook),
                Err(error) => self.fail(&format!("{} is not served: {error:#}", hook.device)),
            }
        }
        self.hooks = attached;
    }

    /// Has the kernel tell routes for packets from devices that are new. Not before all else is in
    /// place: the host would send guests' packets on as they are.
    async fn let_in(&mut self) {
        let mut failures = Vec::new();
        for (name, family) in forwarded(&self.config, &self.plan) {
            let sysctl = family.forwarding(name);
            let last = match self.config.firewall {
                Firewall::Bypass => Direction::Arriving,
                Firewall::Ask => Direction::Leaving,
            };
            let is_attached = self
                .hooks
                .iter()
                .any(|hook| hook.device.name == name && hook.direction == last);
            if is_attached
                && !self.journal.changes().any(|it| it.sets(&sysctl))
                && let Err(error) =
                    set_forwarding(name, family, &self.host, &mut self.journal).await
            {
                failures.push(format!(
                    "no routes are told for what arrives on {name}: {error:#}"
                ));
            }
        }
        for failure in failures {
            self.fail(&failure);
        }
    }

    /// Takes everything away from devices that are not served any more.
    async fn let_go(&mut self) -> Result<()> {
        self.datapath.forget_others(&self.hooks)?;
        let served: Vec<_> = self.hooks.iter().map(|hook| hook.device.clone()).collect();
        let is_left = |change: &Change| match (change, change.device()) {
            (_, Some(device)) => served.iter().all(|it| it.index != device.index),
            (Change::SetSysctl { sysctl, .. }, None) => {
                served.iter().all(|device| !sysctl.is_of(&device.name))
            }
            (_, None) => false,
        };
        // Whoever has taken such a device over wants it up.
        self.journal
            .forget_matching(|change| matches!(change, Change::SetUp { .. }) && is_left(change))?;
        let notes = self
            .journal
            .revert_matching(is_left, &self.host)
            .await
            .context("cannot take everything away from a device that is not served any more")?;
        for note in notes {
            warn(&note);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::tests::{config, facts};

    #[test]
    fn a_device_that_is_only_served_no_more_has_its_guests_still() {
        let mut facts = facts();
        let plan = facts.plan(&config(&["virbr0"])).unwrap();
        facts.links[3].name = "renamed".to_owned();
        assert!(unplugged(&plan, &facts.links).is_empty());
        facts.links[3].carrier_losses += 1;
        assert_eq!(unplugged(&plan, &facts.links), [4]);
        facts.links.retain(|it| it.index != 4);
        assert_eq!(unplugged(&plan, &facts.links), [4]);
    }
}
