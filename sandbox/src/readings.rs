//! The numbers in the picture: what `tapnat status --json` and `tapnat flows --json` say, and the
//! kernel's counters of the host's devices.

use anyhow::{Context as _, Result};
use serde::Deserialize;
use tapnat_testbed::Namespace;

use crate::{flows::Flow, instance::Instance};

/// What passed one way through a device. A packet that is yet to be segmented counts as one.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

/// A device's counters, from the host's point of view.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct Counters {
    #[serde(rename = "rx")]
    pub received: Traffic,
    #[serde(rename = "tx")]
    pub sent: Traffic,
}

/// Everything at one time.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    pub tap: Counters,
    pub uplink: Counters,
    pub sessions: usize,
    /// Packets of these sessions.
    pub translated: u64,
    /// Packets that tapnat dropped, whether it told the sender or not, by reason.
    pub dropped: Vec<(String, u64)>,
}

/// Reads the numbers of an instance on a host.
#[derive(Clone, Debug)]
pub struct Meter {
    pub host: Namespace,
    pub instance: Instance,
    pub tap: &'static str,
    pub uplink: &'static str,
}

#[derive(Deserialize)]
struct Status {
    reasons: Vec<Exit>,
}

#[derive(Deserialize)]
struct Exit {
    reason: String,
    outcome: String,
    packets: u64,
}

#[derive(Deserialize)]
struct Link {
    stats64: Counters,
}

impl Meter {
    /// Reads everything once.
    ///
    /// # Errors
    /// The instance does not answer, or a device is gone.
    pub fn read(&self) -> Result<Readings> {
        let status: Status = self.instance.ask_json(&self.host, "status")?;
        let flows = self.flows()?;
        let dropped = status
            .reasons
            .iter()
            .filter(|it| it.packets > 0 && ["drop", "refuse"].contains(&it.outcome.as_str()));
        Ok(Readings {
            tap: self.counters(self.tap)?,
            uplink: self.counters(self.uplink)?,
            sessions: flows.len(),
            translated: flows.iter().map(|flow| flow.traffic().packets).sum(),
            dropped: dropped.map(|it| (it.reason.clone(), it.packets)).collect(),
        })
    }

    /// The instance's sessions.
    ///
    /// # Errors
    /// The instance does not answer.
    pub fn flows(&self) -> Result<Vec<Flow>> {
        self.instance.ask_json(&self.host, "flows")
    }

    fn counters(&self, device: &str) -> Result<Counters> {
        let text = self
            .host
            .ip(&format!("-json -stats link show dev {device}"))?;
        let links: Vec<Link> =
            serde_json::from_str(&text).context("`ip -json` printed something else")?;
        let link = links
            .first()
            .with_context(|| format!("the host has no {device}"))?;
        Ok(link.stats64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_as_ip_prints_them() {
        let text = r#"[{"ifindex":2,"ifname":"tap0","stats64":{"rx":{"bytes":420,"packets":7,
            "errors":0},"tx":{"bytes":84,"packets":1,"errors":0}}}]"#;
        let links: Vec<Link> = serde_json::from_str(text).unwrap();
        let received = Traffic {
            packets: 7,
            bytes: 420,
        };
        let sent = Traffic {
            packets: 1,
            bytes: 84,
        };
        assert_eq!(links[0].stats64, Counters { received, sent });
    }
}
