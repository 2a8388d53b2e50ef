//! The device that leads to the world.

use anyhow::{Result, anyhow, bail, ensure};

use super::{Facts, Plan};
use crate::{config::Config, host::netlink::Link};

impl Facts {
    pub(super) fn uplink(&self, config: &Config) -> Result<&Link> {
        let link = if let Some(name) = &config.uplink {
            let Some(link) = self.link(name.as_str()) else {
                bail!(
                    "there is no device called {name}: {}",
                    self.suggest(name.as_str())
                );
            };
            link
        } else {
            let Some(route) = self.default_route else {
                bail!("no uplink is given and there is no default route: pass --uplink");
            };
            let Some(link) = self
                .links
                .iter()
                .find(|link| link.index == route.device_index)
            else {
                bail!("the default route's device is gone: pass --uplink");
            };
            link
        };
        let name = &link.name;
        ensure!(
            link.up,
            "uplink {name} is down: set it up (`ip link set {name} up`)"
        );
        self.check_kind(link)?;
        self.check_free(link)?;
        Ok(link)
    }

    /// The uplink of a running instance, if it is there.
    pub(super) fn present_uplink(
        &self,
        config: &Config,
        before: &Plan,
        warnings: &mut Vec<String>,
    ) -> Option<&Link> {
        let by_index = |index| self.links.iter().find(|link| link.index == index);
        let wanted = match &config.uplink {
            Some(name) => self.link(name.as_str()),
            None => self
                .default_route
                .and_then(|route| by_index(route.device_index)),
        };
        let is_inside = |link: &Link| {
            before.insides.iter().any(|inside| {
                inside
                    .link
                    .as_ref()
                    .is_some_and(|it| it.index == link.index)
            })
        };
        let usable = wanted.filter(|link| {
            link.index == before.uplink.index || {
                let checked = if is_inside(link) {
                    Err(anyhow!("{} is an inside device", link.name))
                } else {
                    self.check_kind(link).and_then(|()| self.check_free(link))
                };
                if let Err(error) = &checked {
                    warnings.push(format!(
                        "the way to the world is {} now, which cannot be the uplink: {error:#}",
                        link.name
                    ));
                }
                checked.is_ok()
            }
        });
        usable
            // Renamed, or without a route for a while.
            .or_else(|| by_index(before.uplink.index))
            // Made anew, and without a route yet.
            .or_else(|| self.link(&before.uplink.name))
    }
}

/// Whether there is nothing at its other end yet.
pub(super) fn lacks_carrier(uplink: &Link) -> Option<String> {
    (!uplink.carrier).then(|| format!("uplink {} has no carrier: is it plugged in?", uplink.name))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::{
        host::netlink::DefaultRoute,
        preflight::tests::{config, facts, link, names, refusal},
    };

    #[test]
    fn without_default_route_the_uplink_must_be_named() {
        let mut facts = facts();
        facts.default_route = None;
        assert!(refusal(&facts, &config(&["tap0=10.0.0.1/24"])).contains("pass --uplink"));
    }

    #[test]
    fn a_down_uplink_is_refused_and_a_missing_carrier_is_told() {
        let mut facts = facts();
        facts.links[1].carrier = false;
        let plan = facts.plan(&config(&["tap0=10.0.0.1/24"])).unwrap();
        assert!(
            plan.warnings[0].contains("no carrier"),
            "{:?}",
            plan.warnings
        );
        facts.links[1].up = false;
        assert_eq!(
            refusal(&facts, &config(&["tap0=10.0.0.1/24"])),
            "uplink eth0 is down: set it up (`ip link set eth0 up`)"
        );
    }

    #[test]
    fn the_uplink_is_followed() {
        let mut facts = facts();
        let asked = config(&["virbr0"]);
        let plan = facts.plan(&asked).unwrap();
        // Renamed, and without a route.
        facts.links[1].name = "wan0".to_owned();
        facts.default_route = None;
        let plan = facts.replan(&asked, &plan);
        assert_eq!((plan.uplink.name.as_str(), plan.uplink.index), ("wan0", 2));
        // Gone: it may come back.
        let gone = facts.links.remove(1);
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.index, 2);
        assert_eq!(names(&plan), ["virbr0"]);
        // Back by its name, without an address yet.
        facts.links.push(Link {
            index: 20,
            addresses: Vec::new(),
            ..gone
        });
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.index, 20);
        assert_eq!(plan.outside_addresses, [IpAddr::from([192, 0, 2, 10])]);
        // The route goes elsewhere.
        facts.links.push(link(21, "ppp0", &["203.0.113.9/32"]));
        facts.default_route = Some(DefaultRoute {
            device_index: 21,
            source: None,
        });
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.name, "ppp0");
        assert_eq!(plan.outside_addresses, [IpAddr::from([203, 0, 113, 9])]);
        // There it is of no use.
        facts.default_route = Some(DefaultRoute {
            device_index: 4,
            source: None,
        });
        let plan = facts.replan(&asked, &plan);
        assert_eq!(plan.uplink.name, "ppp0");
        assert!(
            plan.warnings[0].contains("virbr0 is an inside device"),
            "{:?}",
            plan.warnings
        );
    }
}
