//! Forwards in the configuration file: writes them into it and takes them out, with everything else in
//! it as it was, comments too, and has a running instance read it. What a file may say is
//! [`super::file`]'s.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt as _, path::PathBuf};

use anyhow::{Result, anyhow, bail, ensure};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

use super::{
    file::{self, FORWARD, STATIC},
    run,
};
use crate::{
    control::{self, Request},
    files::{self, cannot},
    forwards::{Forward, Share},
    instance::InstanceName,
    notice::tell,
    statics::Selector,
};

/// A configuration file that is about to change.
pub(super) struct Saved {
    path: PathBuf,
    before: String,
    document: DocumentMut,
}

impl Saved {
    /// The file that the instance reads, or will when it starts.
    pub(super) fn of(instance: &InstanceName) -> Result<Self> {
        let path = if let Ok(path) = fs::read(instance.configuration_note()) {
            PathBuf::from(OsString::from_vec(path))
        } else {
            ensure!(
                !control::is_listening(instance),
                "the tapnat instance '{instance}' was started without a configuration file: start \
                 it with --config to save this"
            );
            file::default_path(instance)
        };
        // What is a link stays one.
        let path =
            fs::canonicalize(&path).map_err(|error| cannot("cannot save this in", &path, error))?;
        let before = fs::read_to_string(&path)
            .map_err(|error| cannot("cannot read the configuration file", &path, error))?;
        let document = before.parse().map_err(|_| {
            anyhow!(
                "{0} is no TOML: `tapnat check {0}` says where",
                path.display()
            )
        })?;
        Ok(Self {
            path,
            before,
            document,
        })
    }

    /// Adds a forward, behind those that are there.
    pub(super) fn add(&mut self, forward: &Forward) -> Result<()> {
        let name = name(forward);
        let item = self
            .document
            .entry(name)
            .or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
        let Some(tables) = item.as_array_of_tables_mut() else {
            bail!("{}: begin each {name} with [[{name}]]", self.path.display());
        };
        tables.push(table(forward));
        Ok(())
    }

    /// Takes out what is selected. `false` if nothing is.
    pub(super) fn remove(&mut self, selector: &Selector) -> Result<bool> {
        let mut removed = false;
        let forwards = file::forwards(&self.path, &self.before)?;
        for kind in [FORWARD, STATIC] {
            let Some(tables) = self
                .document
                .get_mut(kind)
                .and_then(Item::as_array_of_tables_mut)
            else {
                continue;
            };
            let of_kind = forwards.iter().filter(|forward| name(forward) == kind);
            let mut position = 0;
            for forward in of_kind {
                match selected(selector, forward) {
                    Selected::Nothing => position += 1,
                    Selected::All => {
                        tables.remove(position);
                        removed = true;
                    }
                    Selected::Part => bail!(
                        "{} has {}, of which this is a part: change that there, then `tapnat reload`",
                        self.path.display(),
                        forward.name()
                    ),
                }
            }
        }
        Ok(removed)
    }

    /// Writes the file, and has a running instance read it: if that refuses, the file is as it was.
    pub(super) async fn store(self, instance: &InstanceName) -> Result<()> {
        files::replace(&self.path, self.document.to_string().as_bytes())?;
        match self.take_in(instance).await {
            Ok(notes) => {
                for note in notes {
                    tell(&note);
                }
                Ok(())
            }
            Err(error) => {
                files::replace(&self.path, self.before.as_bytes())?;
                Err(error)
            }
        }
    }

    async fn take_in(&self, instance: &InstanceName) -> Result<Vec<String>> {
        if !control::is_listening(instance) {
            let typed = ["tapnat", "run"].map(OsString::from);
            run::read(&typed, Some(&self.path))?;
            let path = self.path.display();
            return Ok(vec![format!(
                "{path} is changed; '{instance}' does not run, and reads it when it starts"
            )]);
        }
        control::ask(instance, &Request::Reload, || {
            bail!("the tapnat instance '{instance}' has ended meanwhile")
        })
        .await
    }
}

fn name(forward: &Forward) -> &'static str {
    match forward.share {
        Share::Ports { .. } => FORWARD,
        Share::Everything => STATIC,
    }
}

fn table(forward: &Forward) -> Table {
    let mut table = Table::new();
    let inside = forward.inside_end();
    match forward.share {
        Share::Ports {
            protocol, outside, ..
        } => {
            table["protocol"] = value(protocol.to_string());
            table["port"] = if outside.count() == 1 {
                value(i64::from(outside.first))
            } else {
                value(outside.to_string())
            };
            table["to"] = value(inside.to_string());
            if let Some(address) = forward.outside_address {
                table["outside-address"] = value(address.to_string());
            }
        }
        Share::Everything => {
            if let Some(address) = forward.outside_address {
                table["outside"] = value(address.to_string());
            }
            table["inside"] = value(inside.address.to_string());
        }
    }
    if !forward.is_for_everybody() {
        table["from"] = value(forward.from.to_string());
    }
    table
}

/// How much of a forward is selected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Selected {
    Nothing,
    Part,
    All,
}

fn selected(selector: &Selector, forward: &Forward) -> Selected {
    let all = match (*selector, forward.share) {
        (Selector::Address(address), Share::Everything) => forward.outside_address == Some(address),
        (
            Selector::Ports {
                protocol,
                ports,
                outside_address,
            },
            Share::Ports {
                protocol: other,
                outside,
                ..
            },
        ) => {
            let is_meant = protocol == other
                && ports.overlaps(outside)
                && (outside_address.is_none() || outside_address == forward.outside_address);
            if is_meant && !(ports.contains(outside.first) && ports.contains(outside.last)) {
                return Selected::Part;
            }
            is_meant
        }
        (Selector::Address(_), Share::Ports { .. })
        | (Selector::Ports { .. }, Share::Everything) => false,
    };
    if all {
        Selected::All
    } else {
        Selected::Nothing
    }
}
