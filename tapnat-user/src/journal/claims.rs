//! The devices of the host that an instance works on, so that no other instance takes them.

use std::mem;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Change, Journal};
use crate::host::netlink::{Device, Link};

/// A device that an instance works on.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    pub device: Device,
    pub role: Role,
}

/// What a device is to an instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Inside,
    Uplink,
}

impl Journal {
    /// The devices that the instance works on.
    #[must_use]
    pub fn claims(&self) -> &[Claim] {
        &self.record.claims
    }

    /// Records the devices that the instance works on, in place of those recorded before.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn set_claims(&mut self, claims: Vec<Claim>) -> Result<()> {
        self.record.claims = claims;
        self.save()
    }

    /// Takes in that claimed devices have other names now: the kernel has their parameters under
    /// these.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn follow_names(&mut self, links: &[Link]) -> Result<()> {
        let mut renamed = Vec::new();
        for Claim { device, .. } in &mut self.record.claims {
            let link = links.iter().find(|link| link.index == device.index);
            if let Some(link) = link.filter(|link| link.name != device.name) {
                let before = mem::replace(&mut device.name, link.name.clone());
                renamed.push((before, link.name.as_str()));
            }
        }
        if renamed.is_empty() {
            return Ok(());
        }
        for entry in &mut self.record.changes {
            if let Change::SetSysctl { sysctl, .. } = &mut entry.change {
                // Once only: two devices may have changed names with each other.
                let mut moved = renamed.iter();
                if let Some(moved) = moved.find_map(|(before, now)| sysctl.moved(before, now)) {
                    *sysctl = moved;
                }
            }
        }
        self.save()
    }
}
