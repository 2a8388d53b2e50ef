//! The name of an instance, the places on the host that belong to it, and the lock that only one
//! process holds. What is written in those places is other modules' business.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    slice,
    str::FromStr,
};

use anyhow::{Context as _, Error, Result, ensure};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{
    files::{self, cannot, private_directory, remove_all_but},
    host::bpffs,
};

const RUN_DIRECTORY: &str = "/run/tapnat";
const PIN_DIRECTORY: &str = "tapnat";
const LOCK_FILE: &str = "lock";
/// There while the BPF file system is one that tapnat mounted.
const MOUNTED_FILE: &str = "bpffs-mounted";
const LONGEST_NAME: usize = 32;

/// The name of an instance. It is a directory's name, also in the BPF file system, which forbids
/// dots.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct InstanceName(String);

impl InstanceName {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the instance keeps its lock and its journal.
    #[must_use]
    pub fn run_directory(&self) -> PathBuf {
        Path::new(RUN_DIRECTORY).join(&self.0)
    }

    /// The file that says where the instance's NAT log is, while it writes one.
    #[must_use]
    pub fn nat_log_note(&self) -> PathBuf {
        self.run_directory().join("nat-log")
    }

    /// The file that says where the configuration of the running process came from, if from a file.
    #[must_use]
    pub fn configuration_note(&self) -> PathBuf {
        self.run_directory().join("configuration")
    }

    /// Where the instance's maps and links are pinned in the BPF file system mounted at `bpffs`.
    #[must_use]
    pub fn pin_directory(&self, bpffs: &Path) -> PathBuf {
        bpffs.join(PIN_DIRECTORY).join(&self.0)
    }

    /// Every instance that left a directory under `/run/tapnat`, running or not, by name.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed.
    pub fn all() -> Result<Vec<Self>> {
        names_in(Path::new(RUN_DIRECTORY))
    }

    /// Every instance that has something pinned in the BPF file system mounted at `bpffs`, by name.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed, as without root.
    pub fn all_pinned(bpffs: &Path) -> Result<Vec<Self>> {
        names_in(&bpffs.join(PIN_DIRECTORY))
    }
}

/// Mounts the BPF file system if it is missing, and notes that before. Returns its path.
///
/// # Errors
///
/// When it cannot be mounted.
pub fn bpffs_or_mount() -> Result<PathBuf> {
    if let Some(path) = bpffs::find() {
        return Ok(path);
    }
    let marker = Path::new(RUN_DIRECTORY).join(MOUNTED_FILE);
    File::create(&marker).with_context(|| format!("cannot write {}", marker.display()))?;
    bpffs::mount()
}

/// Unmounts the BPF file system if tapnat mounted it and nothing is pinned there any more.
///
/// # Errors
///
/// When the kernel refuses.
pub fn unmount_bpffs() -> Result<()> {
    let marker = Path::new(RUN_DIRECTORY).join(MOUNTED_FILE);
    if marker.exists() && (bpffs::unmount_if_empty()? || bpffs::find().is_none()) {
        files::remove(&marker)?;
    }
    Ok(())
}

/// Whether the BPF file system is one that tapnat mounted.
#[must_use]
pub fn mounted_bpffs() -> bool {
    Path::new(RUN_DIRECTORY).join(MOUNTED_FILE).exists()
}

fn names_in(directory: &Path) -> Result<Vec<InstanceName>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot list {}", directory.display()))?,
    };
    let mut names: Vec<InstanceName> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    names.sort();
    Ok(names)
}

impl FromStr for InstanceName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let allowed = |letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter);
        ensure!(
            !name.is_empty()
                && name.len() <= LONGEST_NAME
                && !name.starts_with('-')
                && name.chars().all(allowed),
            "'{name}' cannot name an instance: use 1 to {LONGEST_NAME} letters, digits, '-' and '_', \
             and no '-' at the start"
        );
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// An exclusive lock on a file, given back when dropped or when the process ends however it ends.
/// The file names the process that holds it.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Locks the instance for this process, or says who has it.
    ///
    /// # Errors
    ///
    /// When `/run` cannot be written to.
    pub fn instance(name: &InstanceName) -> Result<Result<Self, Holder>> {
        Self::acquire(
            &name.run_directory().join(LOCK_FILE),
            FlockOperation::NonBlockingLockExclusive,
        )
    }

    /// The process that has the instance's lock, if one has.
    #[must_use]
    pub fn holder(name: &InstanceName) -> Option<Holder> {
        let mut file = File::open(name.run_directory().join(LOCK_FILE)).ok()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => Some(Holder::read(&mut file)),
            _ => None,
        }
    }

    /// Locks all instances against beginning and ending, for the short time in which a process
    /// compares what it wants with what the others have. Waits for it.
    ///
    /// # Errors
    ///
    /// When `/run` cannot be written to.
    pub fn all_instances() -> Result<Self> {
        let path = Path::new(RUN_DIRECTORY).join(LOCK_FILE);
        match Self::acquire(&path, FlockOperation::LockExclusive)? {
            Ok(lock) => Ok(lock),
            Err(holder) => Err(Error::msg(format!(
                "another tapnat{holder} is starting or ending: try again"
            ))),
        }
    }

    fn acquire(path: &Path, operation: FlockOperation) -> Result<Result<Self, Holder>> {
        let acquired = Self::try_acquire(path, operation);
        if acquired.is_err()
            && let Some(directory) = path.parent()
        {
            // If it was made for this, or is empty for another reason.
            let _ = fs::remove_dir(directory);
        }
        acquired
            .map(|outcome| {
                outcome.map(|file| Self {
                    file,
                    path: path.to_owned(),
                })
            })
            .map_err(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => Error::new(error).context(format!(
                    "cannot lock {}: run as root, or let this user write to {RUN_DIRECTORY}",
                    path.display()
                )),
                _ => cannot("cannot lock", path, error),
            })
    }

    fn try_acquire(path: &Path, operation: FlockOperation) -> io::Result<Result<File, Holder>> {
        loop {
            if let Some(directory) = path.parent() {
                private_directory().create(directory)?;
            }
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path);
            let mut file = match opened {
                // The previous holder removed the directory just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            match flock(&file, operation) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(Err(Holder::read(&mut file))),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            // The previous holder may have removed the file while we waited: then ours is a lock
            // that nobody else will ever see.
            if fs::metadata(path).is_ok_and(|found| {
                file.metadata()
                    .is_ok_and(|ours| (found.dev(), found.ino()) == (ours.dev(), ours.ino()))
            }) {
                let named = file
                    .set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| writeln!(file, "{}", std::process::id()));
                if named.is_err() {
                    let _ = fs::remove_file(path);
                }
                return named.map(|()| Ok(file));
            }
        }
    }

    /// Gives the lock of an instance back and removes its directory, with whatever another version
    /// of tapnat may have put there.
    ///
    /// # Errors
    ///
    /// When a file cannot be removed.
    pub fn remove_with_directory(self) -> Result<()> {
        if let Some(directory) = self.path.parent() {
            remove_all_but(slice::from_ref(&self.path), directory)
                .with_context(|| format!("cannot empty {}", directory.display()))?;
        }
        // The last one: as long as it is there, nobody else begins.
        self.remove()
    }

    /// Gives the lock back and removes its file and its directory, as far as that is empty.
    ///
    /// # Errors
    ///
    /// When the file cannot be removed.
    pub fn remove(self) -> Result<()> {
        fs::remove_file(&self.path)
            .with_context(|| format!("cannot remove {}", self.path.display()))?;
        if let Some(directory) = self.path.parent() {
            // Not empty, or gone with another instance: both are fine.
            let _ = fs::remove_dir(directory);
        }
        drop(self.file);
        Ok(())
    }
}

/// The process that has a lock.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Holder(pub Option<i32>);

impl Holder {
    fn read(file: &mut File) -> Self {
        let mut text = String::new();
        let number = file
            .read_to_string(&mut text)
            .ok()
            .and_then(|_| text.trim().parse().ok());
        Self(number)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(process) => write!(formatter, " (process {process})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_refused() {
        for name in ["", "a/b", "..", "a.b", "-a", "ü", "a b", &"x".repeat(33)] {
            let error = name.parse::<InstanceName>().unwrap_err().to_string();
            assert!(error.contains("letters, digits"), "{error}");
        }
        for name in ["default", "vm-1", "A_b", &"x".repeat(32)] {
            assert_eq!(name.parse::<InstanceName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn one_holder_at_a_time_and_nothing_left_behind() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("instance");
        let path = directory.join("lock");
        let operation = FlockOperation::NonBlockingLockExclusive;
        let lock = Lock::acquire(&path, operation).unwrap().unwrap();
        let holder = Lock::acquire(&path, operation).unwrap().unwrap_err();
        assert_eq!(holder.0, Some(std::process::id().cast_signed()));
        fs::create_dir_all(directory.join("of/another")).unwrap();
        fs::write(directory.join("of/another/version"), "").unwrap();
        fs::write(directory.join("control"), "").unwrap();
        lock.remove_with_directory().unwrap();
        assert!(!directory.exists());
        Lock::acquire(&path, operation)
            .unwrap()
            .unwrap()
            .remove()
            .unwrap();
    }
}
