//! Names that no device has: which one may have been meant.

use super::{Facts, device::LOOPBACK};
use crate::host::netlink::LinkLayer;

/// A name at most this many edits away from a given one is worth suggesting.
const NEAR: usize = 2;

impl Facts {
    pub(super) fn suggest(&self, name: &str) -> String {
        let mut near: Vec<_> = self
            .links
            .iter()
            .map(|link| (strsim::damerau_levenshtein(name, &link.name), &link.name))
            .filter(|(distance, _)| *distance <= NEAR)
            .collect();
        near.sort();
        if let Some((_, name)) = near.first() {
            return format!("did you mean {name}?");
        }
        let names: Vec<_> = self
            .links
            .iter()
            .filter(|link| link.layer != LinkLayer::Other(LOOPBACK))
            .map(|link| link.name.as_str())
            .collect();
        if names.is_empty() {
            "there is none but the loopback".to_owned()
        } else {
            format!("there is {}", names.join(", "))
        }
    }

    /// What may have been meant by a name that no device has yet. That one is called `tap0` and one
    /// `tap1` is no mistake.
    pub(super) fn mistyped(&self, name: &str) -> Option<String> {
        let kind = |name: &str| {
            name.trim_end_matches(|it: char| it.is_ascii_digit())
                .to_owned()
        };
        let mut near = self.links.iter().filter(|link| {
            kind(&link.name) != kind(name) && strsim::damerau_levenshtein(name, &link.name) < NEAR
        });
        let known = self.links.iter().any(|link| kind(&link.name) == kind(name));
        let meant = &near.next().filter(|_| !known)?.name;
        Some(format!(
            "there is no {name}, so it is created, as a tap: if {meant} was meant, end this and write \
             that"
        ))
    }
}

#[cfg(test)]
mod tests {
    use crate::preflight::tests::{config, facts, refusal};

    #[test]
    fn unknown_devices_get_suggestions() {
        let mut asked = config(&["tap0=10.0.0.1/24"]);
        asked.uplink = Some("eht0".parse().unwrap());
        assert_eq!(
            refusal(&facts(), &asked),
            "there is no device called eht0: did you mean eth0?"
        );
        asked.uplink = Some("wlp3s0".parse().unwrap());
        assert_eq!(
            refusal(&facts(), &asked),
            "there is no device called wlp3s0: there is eth0, docker0, virbr0, vnet0"
        );
        let error = refusal(&facts(), &config(&["virbr1"]));
        assert!(
            error.contains("did you mean virbr0?") && error.contains("tap created"),
            "{error}"
        );
    }

    #[test]
    fn a_tap_with_a_name_that_is_nearly_another_ones_is_told() {
        let warnings = |inside: &str| facts().plan(&config(&[inside])).unwrap().warnings;
        let told = warnings("vent0=10.0.0.1/24");
        assert!(
            told.len() == 1 && told[0].contains("if vnet0 was meant"),
            "{told:?}"
        );
        for new in ["vnet1=10.0.0.1/24", "tap0=10.0.0.1/24"] {
            assert!(warnings(new).is_empty(), "{new}");
        }
    }
}
