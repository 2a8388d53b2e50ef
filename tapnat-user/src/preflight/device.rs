//! Whether a device can be an instance's at all, whatever its role.

use anyhow::{Result, bail, ensure};

use super::Facts;
use crate::{
    host::netlink::{Link, LinkLayer},
    journal::Role,
};

/// `ARPHRD_LOOPBACK` of `include/uapi/linux/if_arp.h`.
pub(super) const LOOPBACK: u16 = 772;

impl Facts {
    pub(super) fn check_kind(&self, link: &Link) -> Result<()> {
        let name = &link.name;
        match link.layer {
            LinkLayer::Other(LOOPBACK) => {
                bail!(
                    "{name} is the loopback, which no guest and no world is behind: name another device"
                )
            }
            LinkLayer::Other(number) => bail!(
                "{name} carries neither Ethernet nor bare IP (its ARPHRD number is {number}): \
                 name another device"
            ),
            LinkLayer::Ethernet | LinkLayer::None => {}
        }
        let controller = link
            .controller
            .and_then(|index| self.links.iter().find(|link| link.index == index))
            .filter(|controller| controller.kind.as_deref() != Some("vrf"));
        if let Some(controller) = controller {
            bail!("{name} is a port of {0}: name {0} instead", controller.name);
        }
        Ok(())
    }

    pub(super) fn check_free(&self, link: &Link) -> Result<()> {
        match self
            .taken
            .iter()
            .find(|(_, claim)| claim.device.index == link.index)
        {
            None => Ok(()),
            Some((instance, claim)) => {
                let role = match claim.role {
                    Role::Inside => "an inside device",
                    Role::Uplink => "the uplink",
                };
                bail!(
                    "{} is {role} of the tapnat instance '{instance}' already: name another device, \
                     or end that instance (`tapnat down --instance {instance}`)",
                    link.name
                )
            }
        }
    }
}

/// In a VRF the host forgets on which device a packet came, and so what its firewall was asked.
pub(super) fn check_routed_plainly(link: &Link) -> Result<()> {
    ensure!(
        link.controller.is_none(),
        "{} is in a VRF, where the firewall cannot be asked: take it out of it, or leave \
         --firewall ask away",
        link.name
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::netlink::Device,
        journal::Claim,
        preflight::tests::{config, facts, refusal},
    };

    #[test]
    fn one_device_has_one_role() {
        assert!(refusal(&facts(), &config(&["eth0=10.0.0.1/24"])).contains("both the uplink"));
        let error = refusal(&facts(), &config(&["tap0=10.0.0.1/24", "tap0=10.0.1.1/24"]));
        assert!(error.contains("given twice"), "{error}");
        assert!(refusal(&facts(), &config(&["lo=10.0.0.1/24"])).contains("the loopback"));
        assert!(refusal(&facts(), &config(&["vnet0=10.0.0.1/24"])).contains("name virbr0 instead"));
    }

    #[test]
    fn a_device_belongs_to_one_instance() {
        let mut facts = facts();
        let device = Device {
            name: "eth0".to_owned(),
            index: 2,
        };
        let claim = Claim {
            device,
            role: Role::Uplink,
        };
        facts.taken = vec![("other".parse().unwrap(), claim)];
        let error = refusal(&facts, &config(&["tap0=10.0.0.1/24"]));
        assert!(error.contains("tapnat down --instance other"), "{error}");
    }
}
