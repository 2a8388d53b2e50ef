//! What an instance changed on its host, and how to take it back: a record that is written to
//! `/run/tapnat/<instance>/changes.json` *before* each change, so that `tapnat down` finds every
//! change even after a SIGKILL at any moment. A recorded change may therefore not have been made;
//! reverting one that was not, or that somebody reverted by hand, is no error.
//!
//! Owns the record, its order and its file. How a change is made and reverted is
//! [`crate::changes`]' business, behind [`Host`].

use std::{
    fs, io, mem,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    host::{
        namespace::NetworkNamespace,
        netlink::{Device, Link},
        sysctl::Sysctl,
        tap::{Owner, Queues},
    },
    instance::InstanceName,
    ports::PortSet,
};

/// Rises whenever an older tapnat could not read, or would misread, the file.
const FORMAT: u32 = 1;
const FILE: &str = "changes.json";

/// One change to the host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Change {
    /// A persistent tap was created. Its index is known only once it exists.
    CreateTap {
        name: String,
        queues: Queues,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<Owner>,
        index: Option<u32>,
    },
    /// An address was put on a device.
    AddAddress {
        device: Device,
        address: IpNet,
        /// Who is at the other end, if the address is of no network.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peer: Option<Ipv4Addr>,
    },
    /// A device was set up.
    SetUp { device: Device },
    /// A kernel parameter was changed.
    SetSysctl {
        sysctl: Sysctl,
        old: String,
        new: String,
    },
    /// Ports were added to `net.ipv4.ip_local_reserved_ports`.
    ReservePorts { ports: PortSet },
    /// The clsact queueing discipline was put on a device.
    AddClsact { device: Device },
    /// A filter was put in a device's clsact.
    AddFilter {
        device: Device,
        #[serde(default)]
        direction: Direction,
        priority: u16,
        handle: u16,
    },
    /// The instance's directory for maps and links was made in the BPF file system. Its path is not
    /// recorded: it differs between mount namespaces.
    PinDirectory,
}

impl Change {
    /// Whether the change is to one network namespace, and gone when that is gone.
    #[must_use]
    pub fn in_network_namespace(&self) -> bool {
        *self != Self::PinDirectory
    }

    /// The device that is changed, unless it is one of the instance's own making.
    #[must_use]
    pub fn device(&self) -> Option<&Device> {
        match self {
            Self::AddAddress { device, .. }
            | Self::SetUp { device }
            | Self::AddClsact { device }
            | Self::AddFilter { device, .. } => Some(device),
            Self::CreateTap { .. }
            | Self::SetSysctl { .. }
            | Self::ReservePorts { .. }
            | Self::PinDirectory => None,
        }
    }

    /// Whether it sets this kernel parameter.
    #[must_use]
    pub fn sets(&self, parameter: &Sysctl) -> bool {
        matches!(self, Self::SetSysctl { sysctl, .. } if sysctl == parameter)
    }

    /// Whether both change the same thing, possibly in different ways.
    #[must_use]
    pub fn same_target(&self, other: &Self) -> bool {
        self.target() == other.target()
    }

    fn target(&self) -> Target<'_> {
        match self {
            Self::CreateTap { name, .. } => Target::Tap(name),
            Self::AddAddress {
                device,
                address,
                peer,
            } => Target::Address(device.index, *address, *peer),
            Self::SetUp { device } => Target::Up(device.index),
            Self::SetSysctl { sysctl, .. } => Target::Sysctl(sysctl),
            Self::ReservePorts { .. } => Target::ReservedPorts,
            Self::AddClsact { device } => Target::Clsact(device.index),
            Self::AddFilter {
                device, direction, ..
            } => Target::Filter(device.index, *direction),
            Self::PinDirectory => Target::PinDirectory,
        }
    }

    /// The ports that it adds to those that the host leaves alone.
    #[must_use]
    pub fn reserved_ports(&self) -> Option<&PortSet> {
        if let Self::ReservePorts { ports } = self {
            Some(ports)
        } else {
            None
        }
    }

    /// This change, to be made on top of an earlier one of the same target: what was there before
    /// the earlier one is what has to come back.
    fn after(mut self, earlier: &Self) -> Self {
        if let (Self::SetSysctl { old, .. }, Self::SetSysctl { old: before, .. }) =
            (&mut self, earlier)
        {
            old.clone_from(before);
        }
        if let (Self::ReservePorts { ports }, Some(before)) = (&mut self, earlier.reserved_ports())
        {
            *ports = ports.union(before);
        }
        self
    }
}

/// What a change is made to. Devices go by their index.
#[derive(Debug, PartialEq)]
enum Target<'a> {
    Tap(&'a str),
    Address(u32, IpNet, Option<Ipv4Addr>),
    Up(u32),
    Sysctl(&'a Sysctl),
    ReservedPorts,
    Clsact(u32),
    Filter(u32, Direction),
    PinDirectory,
}

/// What came of reverting a change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reverted {
    /// It is as it was before.
    Done,
    /// There was nothing to revert.
    NotThere,
    /// Somebody changed it since, so it was left as it is; says what, in a clause.
    LeftAlone(String),
}

/// Makes changes and reverts them.
pub trait Host {
    /// Makes a change, and fills in what is known only then.
    fn make(&self, change: &mut Change) -> impl Future<Output = Result<()>>;

    /// Takes a change back, also when it was never made.
    fn revert(&self, change: &Change) -> impl Future<Output = Result<Reverted>>;
}

/// A device of the host that an instance works on, so that no other instance takes it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    pub device: Device,
    pub role: Role,
}

/// What a device is to an instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Inside,
    Uplink,
}

/// Which of a device's packets a program meets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    #[default]
    Arriving,
    Leaving,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    change: Change,
    /// Whether the running process wants the change, be it that it made it or that it found it.
    #[serde(skip)]
    wanted: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    network_namespace: NetworkNamespace,
    claims: Vec<Claim>,
    changes: Vec<Entry>,
}

/// The part of a [`Record`] that every version can read.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

/// The record of one instance, as it is in memory and on disk.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    record: Record,
}

/// The state of a [`Journal`] at one time.
#[derive(Debug)]
pub struct Mark {
    changes: usize,
    claims: Vec<Claim>,
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
        let record = Record {
            format: FORMAT,
            network_namespace,
            claims: Vec::new(),
            changes: Vec::new(),
        };
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
        let text = match fs::read(&path) {
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
        let record = serde_json::from_slice(&text).with_context(foreign)?;
        Ok(Some(Self { path, record }))
    }

    /// Where the changes that belong to a network namespace were made.
    #[must_use]
    pub fn network_namespace(&self) -> NetworkNamespace {
        self.record.network_namespace
    }

    /// The devices that the instance works on.
    #[must_use]
    pub fn claims(&self) -> &[Claim] {
        &self.record.claims
    }

    /// Records the devices that the instance works on, in place of those recorded before.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn set_claims(&mut self, claims: Vec<Claim>) -> Result<()> {
        self.record.claims = claims;
        self.save()
    }

    /// Takes in that claimed devices have other names now: the kernel has their parameters under
    /// these.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn follow_names(&mut self, links: &[Link]) -> Result<()> {
        let mut renamed = Vec::new();
        for Claim { device, .. } in &mut self.record.claims {
            let link = links.iter().find(|link| link.index == device.index);
            if let Some(link) = link.filter(|link| link.name != device.name) {
                let before = mem::replace(&mut device.name, link.name.clone());
                renamed.push((before, link.name.as_str()));
            }
        }
        if renamed.is_empty() {
            return Ok(());
        }
        for entry in &mut self.record.changes {
            if let Change::SetSysctl { sysctl, .. } = &mut entry.change {
                // Once only: two devices may have changed names with each other.
                let mut moved = renamed.iter();
                if let Some(moved) = moved.find_map(|(before, now)| sysctl.moved(before, now)) {
                    *sysctl = moved;
                }
            }
        }
        self.save()
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

    /// Reverts what an earlier process of this instance changed and this one does not want.
    ///
    /// # Errors
    ///
    /// As [`Self::revert_from`].
    pub async fn revert_unwanted(&mut self, host: &impl Host) -> Result<Vec<String>> {
        self.revert_where(|_, entry| !entry.wanted, host).await
    }

    /// What the record says now, to return to.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            changes: self.record.changes.len(),
            claims: self.record.claims.clone(),
        }
    }

    /// Reverts the changes that were recorded after `mark` was taken, and claims what was claimed
    /// then.
    ///
    /// # Errors
    ///
    /// As [`Self::revert_from`].
    pub async fn return_to(&mut self, mark: Mark, host: &impl Host) -> Result<Vec<String>> {
        self.record.claims = mark.claims;
        self.revert_from(mark.changes, host).await
    }

    /// Reverts the changes from the one at `position` to the last, last one first, and forgets them.
    /// Returns what was left alone, and why. With position 0 the record is empty afterwards.
    ///
    /// # Errors
    ///
    /// When some changes could not be reverted: they stay in the record, and all others are reverted
    /// all the same.
    pub async fn revert_from(&mut self, position: usize, host: &impl Host) -> Result<Vec<String>> {
        self.revert_where(|found, _| found >= position, host).await
    }

    /// Reverts the changes that are selected, and forgets them.
    ///
    /// # Errors
    ///
    /// As [`Self::revert_from`].
    pub async fn revert_matching(
        &mut self,
        selected: impl Fn(&Change) -> bool,
        host: &impl Host,
    ) -> Result<Vec<String>> {
        if !self.changes().any(&selected) {
            return Ok(Vec::new());
        }
        self.revert_where(|_, entry| selected(&entry.change), host)
            .await
    }

    /// Forgets the changes that are selected: they stay as they are.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn forget_matching(&mut self, selected: impl Fn(&Change) -> bool) -> Result<()> {
        self.record.changes.retain(|entry| !selected(&entry.change));
        self.save()
    }

    /// Forgets the changes that were made in a network namespace which is gone.
    pub fn forget_namespace(&mut self) {
        self.record
            .changes
            .retain(|entry| !entry.change.in_network_namespace());
    }

    async fn revert_where(
        &mut self,
        selected: impl Fn(usize, &Entry) -> bool,
        host: &impl Host,
    ) -> Result<Vec<String>> {
        let (mut kept, mut left_alone, mut failures) = (Vec::new(), Vec::new(), Vec::new());
        for (position, entry) in self.record.changes.drain(..).enumerate().rev() {
            if !selected(position, &entry) {
                kept.push(entry);
                continue;
            }
            match host.revert(&entry.change).await {
                Ok(Reverted::Done | Reverted::NotThere) => {}
                Ok(Reverted::LeftAlone(reason)) => left_alone.push(reason),
                Err(error) => {
                    failures.push(format!("{error:#}"));
                    kept.push(entry);
                }
            }
        }
        kept.reverse();
        self.record.changes = kept;
        self.save()?;
        if failures.is_empty() {
            Ok(left_alone)
        } else {
            Err(anyhow!(failures.join("; ")))
        }
    }

    /// Removes the file.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be removed.
    pub fn remove(self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// The file changes as a whole or not at all. It need not survive a loss of power, which undoes
    /// the changes too.
    fn save(&self) -> Result<()> {
        let new = self.path.with_extension("json.new");
        let text = serde_json::to_vec_pretty(&self.record)?;
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

fn path_of(instance: &InstanceName) -> PathBuf {
    file_in(&instance.run_directory())
}

fn file_in(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// A host of sysctls, which checks that every change was recorded before it is made.
    struct FakeHost {
        path: PathBuf,
        values: RefCell<Vec<(Sysctl, String)>>,
        broken: Option<Sysctl>,
        log: RefCell<Vec<String>>,
    }

    impl FakeHost {
        fn value(&self, sysctl: &Sysctl) -> Option<String> {
            self.values
                .borrow()
                .iter()
                .find(|(name, _)| name == sysctl)
                .map(|(_, v)| v.clone())
        }

        fn set(&self, sysctl: &Sysctl, value: &str) {
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

    fn load(path: PathBuf) -> Result<Option<Journal>> {
        Journal::load_from(path, &"vm-1".parse().unwrap())
    }

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("tapnat-journal-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn journal(&self) -> Journal {
            Journal::begin_at(file_in(&self.0), NetworkNamespace::current().unwrap())
        }

        fn host(&self) -> FakeHost {
            FakeHost {
                path: file_in(&self.0),
                values: RefCell::default(),
                broken: None,
                log: RefCell::default(),
            }
        }

        fn reload(&self) -> Journal {
            load(file_in(&self.0)).unwrap().unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn forwarding(device: &str, old: &str, new: &str) -> Change {
        Change::SetSysctl {
            sysctl: Sysctl::forwarding(device),
            old: old.to_owned(),
            new: new.to_owned(),
        }
    }

    #[tokio::test]
    async fn reverts_in_reverse_order_and_forgets() {
        let scratch = Scratch::new("order");
        let (mut journal, host) = (scratch.journal(), scratch.host());
        journal
            .make(forwarding("a", "0", "1"), &host)
            .await
            .unwrap();
        journal
            .make(forwarding("b", "0", "1"), &host)
            .await
            .unwrap();
        let mut journal = scratch.reload();
        assert_eq!(
            journal.revert_from(0, &host).await.unwrap(),
            Vec::<String>::new()
        );
        assert_eq!(
            *host.log.borrow(),
            ["net.ipv4.conf.b.forwarding", "net.ipv4.conf.a.forwarding"]
        );
        assert_eq!(scratch.reload().changes().len(), 0);
    }

    #[tokio::test]
    async fn what_is_known_only_after_the_change_is_recorded_too() {
        let scratch = Scratch::new("index");
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

    #[tokio::test]
    async fn the_value_from_before_the_first_run_comes_back_after_the_second() {
        let scratch = Scratch::new("adopt");
        let host = scratch.host();
        scratch
            .journal()
            .make(forwarding("a", "0", "1"), &host)
            .await
            .unwrap();
        let mut journal = scratch.reload();
        journal
            .make(forwarding("a", "1", "2"), &host)
            .await
            .unwrap();
        assert_eq!(journal.changes().len(), 1);
        journal.revert_from(0, &host).await.unwrap();
        assert_eq!(host.value(&Sysctl::forwarding("a")).as_deref(), Some("0"));
    }

    #[tokio::test]
    async fn only_what_the_second_run_does_not_want_is_reverted() {
        let scratch = Scratch::new("unwanted");
        let (mut journal, host) = (scratch.journal(), scratch.host());
        journal
            .make(forwarding("a", "0", "1"), &host)
            .await
            .unwrap();
        journal
            .make(forwarding("b", "0", "1"), &host)
            .await
            .unwrap();
        let mut journal = scratch.reload();
        journal.keep(&forwarding("b", "0", "1"));
        journal
            .make(forwarding("c", "0", "1"), &host)
            .await
            .unwrap();
        journal.revert_unwanted(&host).await.unwrap();
        assert_eq!(*host.log.borrow(), ["net.ipv4.conf.a.forwarding"]);
        let left: Vec<_> = scratch.reload().changes().cloned().collect();
        assert_eq!(left, [forwarding("b", "0", "1"), forwarding("c", "0", "1")]);
    }

    #[tokio::test]
    async fn a_failed_start_leaves_what_an_earlier_one_recorded() {
        let scratch = Scratch::new("failed");
        let (mut journal, host) = (scratch.journal(), scratch.host());
        journal
            .make(forwarding("a", "0", "1"), &host)
            .await
            .unwrap();
        let claim = |name: &str| Claim {
            device: Device {
                name: name.to_owned(),
                index: 3,
            },
            role: Role::Inside,
        };
        journal.set_claims(vec![claim("a")]).unwrap();
        let before = fs::read_to_string(&host.path).unwrap();
        let mark = journal.mark();
        journal.set_claims(vec![claim("b")]).unwrap();
        journal
            .make(forwarding("b", "0", "1"), &host)
            .await
            .unwrap();
        journal.return_to(mark, &host).await.unwrap();
        assert_eq!(host.value(&Sysctl::forwarding("b")).as_deref(), Some("0"));
        assert_eq!(fs::read_to_string(&host.path).unwrap(), before);
    }

    #[tokio::test]
    async fn a_failure_stays_in_the_record_and_does_not_stop_the_rest() {
        let scratch = Scratch::new("failure");
        let mut host = scratch.host();
        let mut journal = scratch.journal();
        for device in ["a", "b", "c"] {
            journal
                .make(forwarding(device, "0", "1"), &host)
                .await
                .unwrap();
        }
        host.set(&Sysctl::forwarding("a"), "2");
        host.broken = Some(Sysctl::forwarding("b"));
        let error = journal.revert_from(0, &host).await.unwrap_err().to_string();
        assert_eq!(error, "cannot write net.ipv4.conf.b.forwarding");
        assert_eq!(
            scratch.reload().changes().cloned().collect::<Vec<_>>(),
            [forwarding("b", "0", "1")]
        );
        host.broken = None;
        assert!(scratch.reload().revert_from(0, &host).await.is_ok());
    }

    #[tokio::test]
    async fn says_what_somebody_else_changed_since() {
        let scratch = Scratch::new("changed");
        let (mut journal, host) = (scratch.journal(), scratch.host());
        journal
            .make(forwarding("a", "0", "1"), &host)
            .await
            .unwrap();
        host.set(&Sysctl::forwarding("a"), "2");
        let notes = journal.revert_from(0, &host).await.unwrap();
        assert_eq!(notes, ["net.ipv4.conf.a.forwarding was changed"]);
        assert_eq!(host.value(&Sysctl::forwarding("a")).as_deref(), Some("2"));
    }

    #[test]
    fn refuses_a_record_of_another_version() {
        let scratch = Scratch::new("version");
        for text in [
            "{\"format\": 99, \"something\": []}",
            "not JSON",
            "{\"format\": 1}",
        ] {
            fs::write(file_in(&scratch.0), text).unwrap();
            let error = format!("{:#}", load(file_in(&scratch.0)).unwrap_err());
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
