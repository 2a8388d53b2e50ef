//! The record as a file: which version of tapnat can read it. A loss of power undoes the changes, too,
//! so it need not survive that.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Change, Claim};
use crate::{files, host::namespace::NetworkNamespace, instance::InstanceName};

/// Rises whenever an older tapnat could not read, or would misread, the file.
const FORMAT: u32 = 1;
const FILE: &str = "changes.json";

/// What an instance did to its host.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) format: u32,
    pub(super) network_namespace: NetworkNamespace,
    pub(super) claims: Vec<Claim>,
    pub(super) changes: Vec<Entry>,
}

/// A change, and what the running process thinks of it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(flatten)]
    pub(super) change: Change,
    /// Whether the running process wants the change, be it that it made it or that it found it.
    #[serde(skip)]
    pub(super) wanted: bool,
}

/// The part of a [`Record`] that every version can read.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

impl Record {
    /// One of nothing yet.
    pub(super) fn new(network_namespace: NetworkNamespace) -> Self {
        Self {
            format: FORMAT,
            network_namespace,
            claims: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// Reads what an instance left at `path`, if it left something.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or was written by another version of tapnat.
    pub(super) fn read(path: &Path, instance: &InstanceName) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let foreign = || {
            format!(
                "{} was written by another version of tapnat: end the instance with that version's \
                 `tapnat down --instance {instance}`, or remove the file and undo its changes by hand",
                path.display()
            )
        };
        let Version { format } = serde_json::from_slice(&text).with_context(foreign)?;
        if format != FORMAT {
            bail!(foreign());
        }
        serde_json::from_slice(&text)
            .map(Some)
            .with_context(foreign)
    }

    /// Writes it in place of what is there.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        files::replace(path, &serde_json::to_vec_pretty(self)?)
    }
}

/// Where an instance's file is.
pub(super) fn path_of(instance: &InstanceName) -> PathBuf {
    file_in(&instance.run_directory())
}

/// The file of a journal in this directory.
pub(super) fn file_in(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Direction,
            fake::{Scratch, forwarding, load},
        },
        *,
    };
    use crate::host::{netlink::Device, tap::Queues};

    #[test]
    fn refuses_a_record_of_another_version() {
        let scratch = Scratch::new();
        for text in [
            "{\"format\": 99, \"something\": []}",
            "not JSON",
            "{\"format\": 1}",
        ] {
            fs::write(scratch.file(), text).unwrap();
            let error = format!("{:#}", load(scratch.file()).unwrap_err());
            assert!(error.contains("another version of tapnat"), "{error}");
            assert!(error.contains("`tapnat down --instance vm-1`"), "{error}");
        }
    }

    #[test]
    fn every_kind_of_change_survives_the_file() {
        let device = Device {
            name: "tap0".to_owned(),
            index: 3,
        };
        let changes = [
            Change::CreateTap {
                name: "tap0".to_owned(),
                queues: Queues::Multi,
                owner: None,
                index: None,
            },
            Change::AddAddress {
                device: device.clone(),
                address: "10.0.0.1/24".parse().unwrap(),
                peer: None,
            },
            Change::SetUp {
                device: device.clone(),
            },
            Change::AddClsact {
                device: device.clone(),
            },
            Change::AddFilter {
                device,
                direction: Direction::Leaving,
                priority: 1,
                handle: 1,
            },
            forwarding("tap0", "0", "1"),
            Change::ReservePorts {
                ports: "36864-60999".parse().unwrap(),
            },
            Change::PinDirectory,
        ];
        for change in &changes {
            let entry = Entry {
                change: change.clone(),
                wanted: false,
            };
            let json = serde_json::to_string(&entry).unwrap();
            assert_eq!(
                serde_json::from_str::<Entry>(&json).unwrap(),
                entry,
                "{json}"
            );
        }
        for (position, change) in changes.iter().enumerate() {
            let targets = changes.iter().filter(|other| other.same_target(change));
            assert_eq!(
                targets.count(),
                1,
                "change {position} has a target of its own"
            );
        }
    }
}
