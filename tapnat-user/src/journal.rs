//! What an instance changed on its host, and how to take it back: a record that is written to
//! `/run/tapnat/<instance>/changes.json` *before* each change, so that `tapnat down` finds every
//! change even after a SIGKILL at any moment. A recorded change may therefore not have been made;
//! reverting one that was not, or that somebody reverted by hand, is no error.
//!
//! Owns the record, its order and its file. How a change is made and reverted is
//! [`crate::changes`]' business, behind [`Host`].

mod change;
mod claims;
#[cfg(test)]
mod fake;
mod file;
mod revert;

use std::path::PathBuf;

use anyhow::Result;

use self::file::{Entry, Record, path_of};
pub use self::{
    change::{Change, Direction, Host, Reverted},
    claims::{Claim, Role},
    revert::Mark,
};
use crate::{files, host::namespace::NetworkNamespace, instance::InstanceName};

/// The record of one instance, as it is in memory and on disk.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    record: Record,
}

impl Journal {
    /// Begins a record for an instance that has none, in the calling thread's network namespace.
    /// Writes nothing yet.
    ///
    /// # Errors
    ///
    /// When the network namespace cannot be told.
    pub fn begin(instance: &InstanceName) -> Result<Self> {
        Ok(Self::begin_at(
            path_of(instance),
            NetworkNamespace::current()?,
        ))
    }

    fn begin_at(path: PathBuf, network_namespace: NetworkNamespace) -> Self {
        let record = Record::new(network_namespace);
        Self { path, record }
    }

    /// Whether an instance left a record, be it one that cannot be read.
    #[must_use]
    pub fn is_there(instance: &InstanceName) -> bool {
        path_of(instance).exists()
    }

    /// Reads the record that an instance left, if it left one.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or was written by another version of tapnat.
    pub fn load(instance: &InstanceName) -> Result<Option<Self>> {
        Self::load_from(path_of(instance), instance)
    }

    fn load_from(path: PathBuf, instance: &InstanceName) -> Result<Option<Self>> {
        let record = Record::read(&path, instance)?;
        Ok(record.map(|record| Self { path, record }))
    }

    /// Where the changes that belong to a network namespace were made.
    #[must_use]
    pub fn network_namespace(&self) -> NetworkNamespace {
        self.record.network_namespace
    }

    /// The recorded changes, in the order in which they were made.
    #[must_use]
    pub fn changes(&self) -> impl DoubleEndedIterator<Item = &Change> + ExactSizeIterator {
        self.record.changes.iter().map(|entry| &entry.change)
    }

    /// Records a change that the caller makes right afterwards. A change that was recorded before,
    /// by this process or by an earlier one, is not recorded twice. Returns its place in the record.
    ///
    /// # Errors
    ///
    /// When the file cannot be written: then the change must not be made.
    pub fn record(&mut self, change: Change) -> Result<usize> {
        let earlier = self
            .record
            .changes
            .iter()
            .position(|entry| entry.change.same_target(&change));
        let position = if let Some(position) = earlier {
            let entry = &mut self.record.changes[position];
            *entry = Entry {
                change: change.after(&entry.change),
                wanted: true,
            };
            position
        } else {
            self.record.changes.push(Entry {
                change,
                wanted: true,
            });
            self.record.changes.len() - 1
        };
        self.save()?;
        Ok(position)
    }

    /// Records a change and then makes it.
    ///
    /// # Errors
    ///
    /// When the file cannot be written, in which case nothing is changed, or when the change fails.
    pub async fn make(&mut self, change: Change, host: &impl Host) -> Result<()> {
        let position = self.record(change)?;
        let entry = &mut self.record.changes[position];
        let recorded = entry.change.clone();
        host.make(&mut entry.change).await?;
        if entry.change == recorded {
            Ok(())
        } else {
            self.save()
        }
    }

    /// Makes a change, or [keeps](Self::keep) it if all is so already.
    ///
    /// # Errors
    ///
    /// As [`Self::make`].
    pub async fn make_unless(
        &mut self,
        is_so: bool,
        change: Change,
        host: &impl Host,
    ) -> Result<()> {
        if is_so {
            self.keep(&change);
            return Ok(());
        }
        self.make(change, host).await
    }

    /// Says that this process wants the recorded change of the same target, if there is one: it
    /// found that as it should be, and made no change.
    pub fn keep(&mut self, change: &Change) {
        for entry in &mut self.record.changes {
            entry.wanted |= entry.change.same_target(change);
        }
    }

    /// Removes the file.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be removed.
    pub fn remove(self) -> Result<()> {
        files::remove(&self.path).map(drop)
    }

    fn save(&self) -> Result<()> {
        self.record.write(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::{fake::Scratch, *};
    use crate::host::tap::Queues;

    #[tokio::test]
    async fn what_is_known_only_after_the_change_is_recorded_too() {
        let scratch = Scratch::new();
        let (mut journal, host) = (scratch.journal(), scratch.host());
        let change = Change::CreateTap {
            name: "tap0".to_owned(),
            queues: Queues::Multi,
            owner: None,
            index: None,
        };
        journal.make(change, &host).await.unwrap();
        let expected = Change::CreateTap {
            name: "tap0".to_owned(),
            queues: Queues::Multi,
            owner: None,
            index: Some(7),
        };
        assert_eq!(scratch.reload().changes().next(), Some(&expected));
    }
}
