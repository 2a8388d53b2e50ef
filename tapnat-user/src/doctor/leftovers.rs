//! What instances left, here and in other network namespaces.

use std::collections::BTreeSet;

use anyhow::Result;

use super::{Finding, Level};
use crate::{
    host::{bpffs, namespace::NetworkNamespace},
    instance::{InstanceName, Lock},
    journal::Journal,
    tables::{PinnedTables, Unusable},
};

/// What instances left.
pub(super) fn leftovers(here: NetworkNamespace) -> Result<Vec<Finding>> {
    let topic = "instances";
    let mut findings = Vec::new();
    let pinned = match bpffs::find() {
        Some(root) => InstanceName::all_pinned(&root).unwrap_or_default(),
        None => Vec::new(),
    };
    let names: BTreeSet<_> = InstanceName::all()
        .unwrap_or_default()
        .into_iter()
        .chain(pinned.iter().cloned())
        .collect();
    for name in names {
        let is_pinned = pinned.contains(&name);
        let down = format!("tapnat down --instance {name}");
        let process = Lock::holder(&name).and_then(|holder| holder.0);
        let journal = match Journal::load(&name) {
            Ok(journal) => journal,
            Err(error) => {
                findings.push(
                    Finding::new(
                        Level::Warning,
                        topic,
                        format!("the instance '{name}' cannot be looked at"),
                        format!("{error:#}"),
                    )
                    .way_out("run as root, with the version of tapnat that started it"),
                );
                continue;
            }
        };
        let elsewhere = match &journal {
            Some(journal) if journal.network_namespace() != here => {
                Some(journal.network_namespace().find()?)
            }
            _ => None,
        };
        findings.push(match (process, elsewhere) {
            (_, Some(None)) => Finding::new(
                Level::Warning,
                topic,
                format!("the instance '{name}' is left from a network namespace that is gone"),
                if is_pinned {
                    "its tables take memory"
                } else {
                    "only its record of changes is left, and they went with the namespace"
                },
            )
            .way_out(down),
            (_, Some(Some(path))) => Finding::ok(
                topic,
                format!(
                    "'{name}' belongs to the network namespace {}",
                    path.display()
                ),
            ),
            (Some(process), None) => {
                Finding::ok(topic, format!("'{name}' runs (process {process})"))
            }
            (None, None) => state_without_process(&name, &down),
        });
    }
    Ok(findings)
}

fn state_without_process(name: &InstanceName, down: &str) -> Finding {
    let topic = "instances";
    let maps = bpffs::find().map(|root| name.pin_directory(&root).join("maps"));
    let opened = maps.map_or(Err(Unusable::Missing), |maps| <PinnedTables>::open(&maps));
    match opened {
        Ok(_) => Finding::new(
            Level::Warning,
            topic,
            format!("the instance '{name}' translates without a process"),
            "packets go on, but nothing follows changes of addresses and devices",
        )
        .way_out(format!(
            "start `tapnat run --instance {name}` again with its options, or end it: {down}"
        )),
        Err(Unusable::OtherVersion) => Finding::new(
            Level::Warning,
            topic,
            format!("the instance '{name}' was left by another version of tapnat"),
            "its tables are not of this version's layout",
        )
        .way_out(format!(
            "`tapnat run --instance {name} --fresh` with its options, or {down}"
        )),
        Err(Unusable::Missing | Unusable::Unfinished | Unusable::Refused(_)) => Finding::new(
            Level::Warning,
            topic,
            format!("a start of the instance '{name}' was cut short"),
            "what it changed on the host is still changed",
        )
        .way_out(down),
    }
}
