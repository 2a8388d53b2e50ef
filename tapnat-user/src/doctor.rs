//! Looks a host and its instances over for what keeps guests from the world, and says of each thing
//! what it is, why it matters and the way out. Changes nothing. What it looks at is gathered here;
//! the judgements are functions of what was gathered, in a file for each thing looked at.

mod firewall;
mod instance;
mod kernel;
mod leftovers;
mod mtu;
mod networks;
mod offloads;
mod rules;
mod uplink;

use std::{
    io,
    process::{Command, Stdio},
};

use anyhow::Result;
use serde::Serialize;
use tapnat_common::abi::setting_flags;

use crate::{
    config::{self, Config},
    host::{bpffs, namespace::NetworkNamespace, netlink::Netlink},
    instance::InstanceName,
    journal::Journal,
    tables::BothTables,
};

use self::{
    firewall::judge_firewall,
    instance::instance,
    kernel::kernel,
    leftovers::leftovers,
    mtu::mtus,
    networks::{inside_networks, overlaps},
    offloads::{judge_offloads, offloads, tap_header},
    rules::Firewall,
    uplink::{find_uplink, judge_reverse_path, judge_uplink, reverse_path},
};

/// How grave a finding is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Something works, but not as one would think.
    Warning,
    /// Something does not work.
    Problem,
}

impl Level {
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    pub level: Level,
    /// What kind of thing: `kernel`, `firewall`, `forwarding` and so on.
    pub topic: &'static str,
    pub what: String,
    /// Null for what is as it should be.
    pub why: Option<String>,
    /// Null for what is as it should be, and where nothing need be done.
    pub way_out: Option<String>,
}

impl Finding {
    pub(crate) fn ok(topic: &'static str, what: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            topic,
            what: what.into(),
            why: None,
            way_out: None,
        }
    }

    pub(crate) fn new(
        level: Level,
        topic: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self {
            level,
            topic,
            what: what.into(),
            why: Some(why.into()),
            way_out: None,
        }
    }

    fn way_out(mut self, way_out: impl Into<String>) -> Self {
        self.way_out = Some(way_out.into());
        self
    }
}

/// Looks at this host, and at the instance if it is there. `config` is what the instance would be
/// started with, if that is known.
///
/// # Errors
///
/// When the kernel does not even list its devices.
pub async fn examine(name: &InstanceName, config: Option<&Config>) -> Result<Vec<Finding>> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let default_route = netlink.default_route().await?;
    let journal = Journal::load(name).unwrap_or(None);
    let here = NetworkNamespace::current()?;
    let is_here = journal
        .as_ref()
        .is_some_and(|journal| journal.network_namespace() == here);
    let tables = bpffs::find()
        .map(|root| name.pin_directory(&root).join("maps"))
        .and_then(|maps| BothTables::open(&maps).ok())
        .filter(|_| is_here);

    let mut findings = kernel();
    let uplink = find_uplink(&links, default_route, config, journal.as_ref());
    let networks = inside_networks(&links, tables.as_ref(), config)?;
    findings.push(judge_uplink(uplink, default_route, &networks));
    let asks = match (&tables, config) {
        (Some(tables), _) => tables.ipv4.settings()?.flags & setting_flags::ASK_FIREWALL != 0,
        (None, Some(config)) => config.firewall == config::Firewall::Ask,
        (None, None) => false,
    };
    findings.extend(judge_firewall(&Firewall::read(), &networks, asks));
    findings.extend(overlaps(&links, &networks));
    if let Some(uplink) = uplink {
        findings.extend(mtus(&links, uplink, &networks));
        findings.extend(judge_offloads(&uplink.name, &offloads(&uplink.name)));
        findings.extend(judge_reverse_path(
            &uplink.name,
            reverse_path(&uplink.name),
            default_route.is_none_or(|route| route.device_index == uplink.index),
        ));
    }
    for network in &networks {
        findings.extend(tap_header(&network.device));
    }
    findings.extend(leftovers(here)?);
    if let (Some(tables), Some(journal)) = (&tables, &journal) {
        findings.extend(instance(name, &links, tables, journal)?);
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    Ok(findings)
}

/// What a program prints, in English.
///
/// # Errors
///
/// When it is not there or fails.
fn output(program: &str, arguments: &[&str]) -> io::Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("{program} failed")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn levels(findings: &[Finding]) -> Vec<Level> {
        for finding in findings {
            assert_eq!(finding.why.is_none(), finding.level == Level::Ok);
        }
        findings.iter().map(|finding| finding.level).collect()
    }
}
