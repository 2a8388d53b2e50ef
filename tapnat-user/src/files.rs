//! Files and directories as a whole: made, replaced, listed and removed, and what a user can do about
//! one that cannot be read or written. What is in them is their owners'.

use std::{
    fmt,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Error, Result};

/// Makes a directory that only its owner can enter, and those that it is in, as far as they are not
/// there.
#[must_use]
pub fn private_directory() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
}

/// Makes such a directory.
///
/// # Errors
///
/// When it cannot be made.
pub fn make_directory(path: &Path) -> Result<()> {
    private_directory()
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

/// What is in a directory.
///
/// # Errors
///
/// When it cannot be read.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let listing = || format!("cannot list {}", directory.display());
    fs::read_dir(directory)
        .with_context(listing)?
        .map(|entry| Ok(entry.with_context(listing)?.path()))
        .collect()
}

/// A name in a directory that nothing there has: `prefix` and a number.
///
/// # Errors
///
/// When all are taken.
pub fn unused_in(directory: &Path, prefix: &str) -> Result<PathBuf> {
    (0..u16::MAX)
        .map(|number| directory.join(format!("{prefix}{number}")))
        .find(|path| !path.exists())
        .with_context(|| format!("{} is full", directory.display()))
}

/// Writes a file in place of the one that is there: all of it or nothing, with that one's permissions.
/// Whoever reads it meanwhile reads the old one. It need not survive a loss of power.
///
/// # Errors
///
/// When it cannot be written.
pub fn replace(path: &Path, text: &[u8]) -> Result<()> {
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    let written = fs::write(&new, text)
        .and_then(|()| match fs::metadata(path) {
            Ok(old) => fs::set_permissions(&new, old.permissions()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        })
        .and_then(|()| fs::rename(&new, path));
    written.with_context(|| {
        // Only if it could not be renamed.
        let _ = fs::remove_file(&new);
        format!("cannot write {}", path.display())
    })
}

/// Removes a file, or a directory with all that is in it. `false` if it is not there.
///
/// # Errors
///
/// When it cannot be removed.
pub fn remove(path: &Path) -> Result<bool> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// Removes all that is in a directory but these.
///
/// # Errors
///
/// When something cannot be removed.
pub fn remove_all_but(kept: &[PathBuf], directory: &Path) -> Result<()> {
    for path in list(directory)? {
        if !kept.contains(&path) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Writes what others find there, or has them find nothing.
///
/// # Errors
///
/// When it cannot be written, or what was there not removed.
pub fn write_note(path: &Path, text: Option<&[u8]>) -> Result<()> {
    match text {
        Some(text) => {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        }
        None => remove(path).map(drop),
    }
}

/// Whether what is to be written to a file is to go to the standard output, as `-` says.
#[must_use]
pub fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}

/// Says what could not be done with a file, why, and the way out. `action` is the first part of the
/// sentence, such as "cannot write".
#[must_use]
pub fn cannot(action: &str, path: &Path, error: io::Error) -> Error {
    let way_out = way_out(error.kind());
    Error::new(error).context(Sentence {
        action: action.to_owned(),
        path: path.display().to_string(),
        way_out,
    })
}

/// What to do about an error of this kind; none where that depends on more than the file.
fn way_out(kind: io::ErrorKind) -> Option<&'static str> {
    match kind {
        io::ErrorKind::NotFound => Some("make it, or its directory, first, or name another"),
        io::ErrorKind::PermissionDenied => Some("run as root, or name another"),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Some("make room there, or name one elsewhere")
        }
        io::ErrorKind::ReadOnlyFilesystem => Some("name one elsewhere"),
        io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory => {
            Some("name a file, in a directory")
        }
        _ => None,
    }
}

#[derive(Debug)]
struct Sentence {
    action: String,
    path: String,
    way_out: Option<&'static str>,
}

impl fmt::Display for Sentence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.action, self.path)?;
        if let Some(way_out) = self.way_out {
            write!(formatter, ": {way_out}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_replaces_a_file_has_its_permissions_and_leaves_nothing_else() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("file.toml");
        replace(&path, b"one").unwrap();
        let private = fs::Permissions::from_mode(0o640);
        fs::set_permissions(&path, private.clone()).unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
        assert_eq!(list(scratch.path()).unwrap(), [path]);
        // A directory cannot be written over, and the attempt leaves nothing behind.
        let directory = scratch.path().join("directory");
        make_directory(&directory.join("inner")).unwrap();
        let error = replace(&directory, b"three").unwrap_err().to_string();
        assert!(error.starts_with("cannot write "), "{error}");
        assert_eq!(list(scratch.path()).unwrap().len(), 2);
    }

    #[test]
    fn what_is_kept_is_all_that_is_left() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("private");
        make_directory(&directory.join("of/another")).unwrap();
        let mode = fs::metadata(&directory).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let all = [unused_in(&directory, "pin-").unwrap()];
        let [kept] = &all;
        fs::write(kept, "").unwrap();
        assert_eq!(
            unused_in(&directory, "pin-").unwrap(),
            directory.join("pin-1")
        );
        fs::write(directory.join("of/another/version"), "").unwrap();
        fs::write(directory.join("control"), "").unwrap();
        remove_all_but(&all, &directory).unwrap();
        assert_eq!(list(&directory).unwrap(), all);
        assert!(remove(kept).unwrap());
        assert!(!remove(kept).unwrap());
        write_note(kept, Some(b"note")).unwrap();
        assert_eq!(fs::read(kept).unwrap(), b"note");
        write_note(kept, None).unwrap();
        write_note(kept, None).unwrap();
        assert!(remove(&directory).unwrap() && !directory.exists());
    }

    #[test]
    fn says_what_why_and_the_way_out() {
        let path = Path::new("/nowhere/log");
        for (error, way_out) in [
            (system_error(libc::ENOENT), "directory, first"),
            (system_error(libc::EACCES), "run as root"),
            (system_error(libc::ENOSPC), "make room"),
            (system_error(libc::EROFS), "elsewhere"),
            (system_error(libc::EISDIR), "in a directory"),
        ] {
            let why = error.to_string();
            let said = format!("{:#}", cannot("cannot write", path, error));
            assert!(said.starts_with("cannot write /nowhere/log: "), "{said}");
            assert!(said.contains(way_out) && said.ends_with(&why), "{said}");
        }
        let other = cannot("cannot write", path, system_error(libc::EIO));
        assert!(format!("{other:#}").starts_with("cannot write /nowhere/log: Input/output"));
    }

    fn system_error(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }
}
