//! A host of kernel parameters, and a directory for its journal, for tests.

use std::{cell::RefCell, path::PathBuf};

use anyhow::{Result, bail};
use tempfile::TempDir;

use super::{Change, Host, Journal, Reverted, file::file_in};
use crate::host::{namespace::NetworkNamespace, sysctl::Sysctl};

/// A host of sysctls, which checks that every change was recorded before it is made.
pub(super) struct FakeHost {
    pub(super) path: PathBuf,
    values: RefCell<Vec<(Sysctl, String)>>,
    pub(super) broken: Option<Sysctl>,
    pub(super) log: RefCell<Vec<String>>,
}

impl FakeHost {
    pub(super) fn value(&self, sysctl: &Sysctl) -> Option<String> {
        self.values
            .borrow()
            .iter()
            .find(|(name, _)| name == sysctl)
            .map(|(_, v)| v.clone())
    }

    pub(super) fn set(&self, sysctl: &Sysctl, value: &str) {
        let mut values = self.values.borrow_mut();
        values.retain(|(name, _)| name != sysctl);
        values.push((sysctl.clone(), value.to_owned()));
    }
}

impl Host for FakeHost {
    async fn make(&self, change: &mut Change) -> Result<()> {
        let recorded = load(self.path.clone())?.unwrap();
        assert!(
            recorded.changes().any(|found| found == change),
            "made before recorded"
        );
        match change {
            Change::CreateTap { index, .. } => *index = Some(7),
            Change::SetSysctl { sysctl, new, .. } => self.set(sysctl, new),
            _ => {}
        }
        Ok(())
    }

    async fn revert(&self, change: &Change) -> Result<Reverted> {
        let Change::SetSysctl { sysctl, old, new } = change else {
            return Ok(Reverted::NotThere);
        };
        if self.broken.as_ref() == Some(sysctl) {
            bail!("cannot write {sysctl}");
        }
        self.log.borrow_mut().push(sysctl.to_string());
        if self.value(sysctl).as_ref() != Some(new) {
            return Ok(Reverted::LeftAlone(format!("{sysctl} was changed")));
        }
        self.set(sysctl, old);
        Ok(Reverted::Done)
    }
}

/// Makes a change, which nothing keeps from being made.
pub(super) async fn make(journal: &mut Journal, change: Change, host: &FakeHost) {
    journal.make(change, host).await.unwrap();
}

pub(super) fn load(path: PathBuf) -> Result<Option<Journal>> {
    Journal::load_from(path, &"vm-1".parse().unwrap())
}

/// The directory of an instance's journal.
pub(super) struct Scratch(TempDir);

impl Scratch {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(super) fn file(&self) -> PathBuf {
        file_in(self.0.path())
    }

    pub(super) fn journal(&self) -> Journal {
        Journal::begin_at(self.file(), NetworkNamespace::current().unwrap())
    }

    pub(super) fn host(&self) -> FakeHost {
        FakeHost {
            path: self.file(),
            values: RefCell::default(),
            broken: None,
            log: RefCell::default(),
        }
    }

    pub(super) fn reload(&self) -> Journal {
        load(self.file()).unwrap().unwrap()
    }
}

pub(super) fn forwarding(device: &str, old: &str, new: &str) -> Change {
    Change::SetSysctl {
        sysctl: Sysctl::forwarding(device),
        old: old.to_owned(),
        new: new.to_owned(),
    }
}
