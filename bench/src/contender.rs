//! Those who are compared: how each is set up in a world of its own.

use std::{fmt, time::Duration};

use anyhow::{Context as _, Result};
use tapnat_testbed::{
    process::Process,
    topology::{Topology, UPLINK},
};
use tapnat_tests::instance::Instance;

use crate::rig::{INSIDE, Rig};

/// A way for packets from the guest to the world and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// A TC program that only redirects.
    Redirect,
    /// The same once more: what differs between the two is noise.
    Control,
    /// The kernel's router, without a translation.
    Forwarding,
    IptablesLegacy,
    IptablesNft,
    Nft,
    Tapnat,
}

impl Contender {
    /// Whether the guest's address is translated.
    #[must_use]
    pub const fn translates(self) -> bool {
        match self {
            Self::Redirect | Self::Control | Self::Forwarding => false,
            Self::IptablesLegacy | Self::IptablesNft | Self::Nft | Self::Tapnat => true,
        }
    }

    /// Builds it.
    ///
    /// # Errors
    ///
    /// When a program it is made of is missing or refuses.
    pub fn build(self, max_sessions: u32) -> Result<Built> {
        self.try_build(max_sessions)
            .with_context(|| format!("cannot set up {self}"))
    }

    fn try_build(self, max_sessions: u32) -> Result<Built> {
        let mut rig = Rig::build(self.translates())?;
        let mut tapnat = None;
        let host = &rig.topology.host;
        if self != Self::Tapnat {
            rig.topology.set_inside_addresses()?;
        }
        match self {
            Self::Redirect | Self::Control => rig.attach_redirect()?,
            Self::Forwarding => host.sysctl("net.ipv4.ip_forward", "1")?,
            Self::IptablesLegacy | Self::IptablesNft | Self::Nft => {
                host.sysctl("net.ipv4.ip_forward", "1")?;
                self.add_rule(&rig.topology)?;
                for timeout in ["udp_timeout", "udp_timeout_stream"] {
                    host.sysctl(&format!("net.netfilter.nf_conntrack_{timeout}"), "7200")?;
                }
            }
            Self::Tapnat => tapnat = Some(Tapnat::start(&rig.topology, max_sessions)?),
        }
        rig.topology.pin_neighbours()?;
        Ok(Built {
            contender: self,
            _tapnat: tapnat,
            rig,
        })
    }

    fn add_rule(self, topology: &Topology) -> Result<()> {
        let host = &topology.host;
        match self {
            Self::IptablesLegacy => host.exec(&format!(
                "iptables-legacy -t nat -A POSTROUTING -o {UPLINK} -j MASQUERADE"
            )),
            Self::IptablesNft => host.exec(&format!(
                "iptables-nft -t nat -A POSTROUTING -o {UPLINK} -j MASQUERADE"
            )),
            Self::Nft => host
                .command("nft")
                .args(["-f", "-"])
                .stdin(format!(
                    "table ip nat {{\n\
                     chain postrouting {{\n\
                     type nat hook postrouting priority srcnat; policy accept;\n\
                     oifname \"{UPLINK}\" masquerade\n\
                     }}\n\
                     }}\n"
                ))
                .run(),
            Self::Redirect | Self::Control | Self::Forwarding | Self::Tapnat => Ok(String::new()),
        }
        .map(drop)
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Redirect => "bare redirect",
            Self::Control => "bare redirect again",
            Self::Forwarding => "plain forwarding",
            Self::IptablesLegacy => "iptables (legacy)",
            Self::IptablesNft => "iptables (nft)",
            Self::Nft => "nft masquerade",
            Self::Tapnat => "tapnat",
        })
    }
}

/// A contender in its world.
pub struct Built {
    pub contender: Contender,
    // Ends before its world does.
    _tapnat: Option<Tapnat>,
    pub rig: Rig,
}

struct Tapnat {
    // The process ends by its instance's `down`.
    _instance: Instance,
    _process: Process,
}

impl Tapnat {
    fn start(topology: &Topology, max_sessions: u32) -> Result<Self> {
        let instance = Instance::new(&topology.host);
        let inside = topology.inside();
        let sessions = max_sessions.to_string();
        let mut arguments = vec!["--uplink", UPLINK, "--max-sessions", &sessions];
        arguments.extend(["--udp-timeout", "2h"]);
        for inside in &inside {
            arguments.extend(["--inside", inside]);
        }
        debug_assert!(inside.iter().all(|inside| inside.starts_with(INSIDE)));
        let process = instance.start(&arguments)?;
        // What the daemon does once after its start is not to be measured.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Self {
            _instance: instance,
            _process: process,
        })
    }
}
