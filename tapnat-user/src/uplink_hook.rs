//! Decides whether the world's packets meet a program before the kernel makes skbs of them (XDP), and
//! says why not. Pure: it sees only the facts that it is given.
//!
//! XDP halves the cost of small packets and more, but nothing then gathers a bulk transfer's packets
//! into large ones (GRO), and with many drivers attaching alone turns off what does. So `auto` never
//! chooses it.

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use tapnat_common::abi::setting_flags;

use crate::host::{
    netlink::{Link, LinkLayer},
    xdp::Features,
};

/// Where the world's packets meet the first program.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum UplinkHook {
    /// TC; `tapnat status` says why
    #[default]
    Auto,
    /// After GRO, which keeps bulk transfer fast
    Tc,
    /// In the uplink's driver: for many small packets. TCP's data still waits for GRO
    Xdp,
}

/// What was chosen, and what of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Chosen {
    pub xdp: bool,
    /// The operator said so.
    given: bool,
    /// The uplink's driver could do it.
    possible: bool,
}

impl Chosen {
    /// All bits of the settings' flags that this is kept in.
    pub const FLAGS: u32 =
        setting_flags::XDP | setting_flags::HOOK_GIVEN | setting_flags::XDP_POSSIBLE;

    /// Chooses for an uplink. `features`: of its driver, where the kernel tells; `links`: all devices.
    ///
    /// # Errors
    ///
    /// When XDP is asked for and cannot be.
    pub fn new(
        wanted: UplinkHook,
        uplink: &Link,
        features: Option<Features>,
        links: &[Link],
    ) -> Result<Self> {
        let possible = check(uplink, features, links);
        let xdp = wanted == UplinkHook::Xdp;
        let chosen = Self {
            xdp,
            given: wanted != UplinkHook::Auto,
            possible: possible.is_ok() && features.is_some(),
        };
        if xdp {
            possible?;
        }
        Ok(chosen)
    }

    /// As the tables say.
    #[must_use]
    pub const fn from_flags(flags: u32) -> Self {
        Self {
            xdp: flags & setting_flags::XDP != 0,
            given: flags & setting_flags::HOOK_GIVEN != 0,
            possible: flags & setting_flags::XDP_POSSIBLE != 0,
        }
    }

    /// The settings' flags with this kept in them.
    #[must_use]
    pub fn kept_in(self, flags: u32) -> u32 {
        flags & !Self::FLAGS | self.flags()
    }

    fn flags(self) -> u32 {
        [
            (self.xdp, setting_flags::XDP),
            (self.given, setting_flags::HOOK_GIVEN),
            (self.possible, setting_flags::XDP_POSSIBLE),
        ]
        .into_iter()
        .filter_map(|(is_set, flag)| is_set.then_some(flag))
        .sum()
    }

    #[must_use]
    pub const fn label(self) -> &'static str {
        if self.xdp { "xdp" } else { "tc" }
    }

    /// Why it was chosen.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self { xdp: true, .. } => "as asked for; data of TCP and what is not steady goes by tc",
            Self { given: true, .. } => "as asked for",
            Self { possible: true, .. } => {
                "keeps bulk transfer fast; for many small packets: --uplink-hook xdp"
            }
            Self { .. } => "the uplink cannot run xdp in its driver",
        }
    }
}

fn check(uplink: &Link, features: Option<Features>, links: &[Link]) -> Result<()> {
    const WAY_OUT: &str = "pass --uplink-hook tc";
    let name = &uplink.name;
    ensure!(
        uplink.layer == LinkLayer::Ethernet,
        "XDP needs an uplink with Ethernet, which {name} has not: {WAY_OUT}"
    );
    if features.is_some_and(|features| !features.is_native()) {
        let kind = uplink.kind.as_deref().unwrap_or("its driver");
        bail!("the uplink {name} ({kind}) cannot run XDP in its driver: {WAY_OUT}");
    }
    // Its driver may have taken the tag off a frame, where no XDP program sees it.
    let is_on_it =
        |link: &&Link| link.kind.as_deref() == Some("vlan") && link.lower == Some(uplink.index);
    if let Some(vlan) = links.iter().find(is_on_it) {
        bail!(
            "the VLAN {} is on the uplink {name}, and XDP could take its packets for the uplink's own: \
             {WAY_OUT}, or move the VLAN elsewhere",
            vlan.name
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NATIVE: Option<Features> = Some(Features::new(3));
    const NONE: Option<Features> = Some(Features::new(0));

    fn link(index: u32, name: &str, layer: LinkLayer, kind: Option<&str>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            layer,
            kind: kind.map(str::to_owned),
            mac: None,
            mtu: 1500,
            up: true,
            carrier: true,
            carrier_losses: 0,
            controller: None,
            lower: None,
            addresses: Vec::new(),
        }
    }

    fn eth0() -> Link {
        link(2, "eth0", LinkLayer::Ethernet, None)
    }

    fn choose(wanted: UplinkHook, features: Option<Features>) -> Chosen {
        Chosen::new(wanted, &eth0(), features, &[eth0()]).unwrap()
    }

    fn refusal(uplink: &Link, features: Option<Features>, links: &[Link]) -> String {
        let error = Chosen::new(UplinkHook::Xdp, uplink, features, links).unwrap_err();
        error.to_string()
    }

    #[test]
    fn auto_says_why_it_is_tc() {
        for (wanted, features, label, reason) in [
            (UplinkHook::Auto, NATIVE, "tc", "keeps bulk transfer fast"),
            (UplinkHook::Auto, NONE, "tc", "cannot run xdp"),
            (UplinkHook::Tc, NATIVE, "tc", "as asked for"),
            (UplinkHook::Xdp, NATIVE, "xdp", "as asked for; data of TCP"),
            // Before Linux 6.3: the driver tells when it is asked to.
            (UplinkHook::Xdp, None, "xdp", "as asked for; data of TCP"),
        ] {
            let chosen = choose(wanted, features);
            assert_eq!(chosen.label(), label, "{wanted:?}");
            assert!(chosen.reason().contains(reason), "{}", chosen.reason());
            assert_eq!(Chosen::from_flags(chosen.flags()), chosen);
            assert_eq!(chosen.flags() & !Chosen::FLAGS, 0);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_way_out() {
        let bridge = link(3, "br0", LinkLayer::Ethernet, Some("bridge"));
        let tun = link(4, "tun0", LinkLayer::None, Some("tun"));
        let tagged = Link {
            lower: Some(2),
            ..link(5, "eth0.5", LinkLayer::Ethernet, Some("vlan"))
        };
        // The other end of a veth has that index in another namespace.
        let veth = Link {
            lower: Some(2),
            ..link(6, "veth0", LinkLayer::Ethernet, Some("veth"))
        };
        for (refusal, text) in [
            (refusal(&bridge, NONE, &[]), "br0 (bridge) cannot run XDP"),
            (refusal(&tun, NATIVE, &[]), "tun0 has not"),
            (
                refusal(&eth0(), NATIVE, &[eth0(), tagged]),
                "the VLAN eth0.5",
            ),
        ] {
            assert!(refusal.contains(text), "{refusal}");
            assert!(refusal.contains("--uplink-hook tc"), "{refusal}");
        }
        assert!(Chosen::new(UplinkHook::Xdp, &eth0(), NATIVE, &[veth]).is_ok());
    }
}
