//! Kernel parameters of the whole machine that no namespace has a copy of, raised for a while and
//! set back when dropped, panicking or interrupted.
//!
//! Only for limits: what any of them changes for the rest of the machine is at most more room.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::cleanup::{self, Leftover, Registration};

/// A raised limit.
#[derive(Debug)]
pub struct Setting {
    _registration: Option<Registration>,
}

impl Setting {
    /// Raises a limit, given by its file under `/proc/sys` or `/sys`, if it is lower.
    ///
    /// # Errors
    /// There is no such parameter, it is no number, or no root.
    pub fn raise(path: &Path, value: &str) -> Result<Self> {
        let read = |text: &str| {
            text.trim()
                .parse::<u64>()
                .with_context(|| format!("{} is {text}, no number", path.display()))
        };
        let before = fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .trim()
            .to_owned();
        if read(&before)? >= read(value)? {
            return Ok(Self {
                _registration: None,
            });
        }
        let registration = cleanup::register(Leftover::Setting {
            path: path.to_owned(),
            before,
        });
        fs::write(path, value)
            .with_context(|| format!("cannot write {value} to {}", path.display()))?;
        Ok(Self {
            _registration: Some(registration),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_raised_and_set_back() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("limit");
        fs::write(&path, "100\n")?;
        let content = || fs::read_to_string(&path).unwrap();
        let setting = Setting::raise(&path, "200")?;
        assert_eq!(content(), "200");
        // One that is high enough stays, and is nobody's to set back.
        drop(Setting::raise(&path, "150")?);
        assert_eq!(content(), "200");
        drop(setting);
        assert_eq!(content(), "100");
        Ok(())
    }
}
