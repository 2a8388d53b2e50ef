//! What a user can do about a file that cannot be read or written. Opens none.

use std::{fmt, io, path::Path};

use anyhow::Error;

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
    use super::*;

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
