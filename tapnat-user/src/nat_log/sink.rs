//! Where the lines of a NAT log go: a file, systemd's journal, or the standard output.

use std::{
    fmt, fs,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{self, Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Error, Result, anyhow, ensure};

use super::{IDENTIFIER, Line};
use crate::{files::cannot, host::systemd::Journal};

/// What the operator named.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    Journald,
    Output,
    File(PathBuf),
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure!(
            !text.is_empty(),
            "where shall it be written? name a file, journald, or - for the standard output"
        );
        Ok(match text {
            "journald" => Self::Journald,
            "-" => Self::Output,
            path => Self::File(path::absolute(path)?),
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Journald => formatter.write_str("journald"),
            Self::Output => formatter.write_str("-"),
            Self::File(path) => path.display().fmt(formatter),
        }
    }
}

/// A target that is open.
pub enum Sink {
    Journald(Journal),
    Output,
    File { file: File, path: PathBuf },
}

impl Sink {
    pub fn open(target: &Target) -> Result<Self> {
        Ok(match target {
            Target::Journald => {
                let journal = Journal::open(IDENTIFIER);
                Self::Journald(journal.map_err(|error| anyhow!("{error:#}: name a file instead"))?)
            }
            Target::Output => Self::Output,
            Target::File(path) => Self::File {
                file: open(path)?,
                path: path.clone(),
            },
        })
    }

    /// Writes the lines. A file that was moved away, as by `logrotate`, is begun anew before.
    pub fn write(&mut self, lines: &[Line]) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let mut texts = Vec::new();
        for line in lines {
            texts.push(serde_json::to_string(line)?);
        }
        let all = || texts.join("\n") + "\n";
        match self {
            Self::Journald(journal) => texts.iter().try_for_each(|text| {
                journal
                    .write(text)
                    .context("cannot write the NAT log to systemd's journal")
            }),
            Self::Output => {
                let mut output = io::stdout().lock();
                output
                    .write_all(all().as_bytes())
                    .and_then(|()| output.flush())
                    .context("cannot write the NAT log to the standard output")
            }
            Self::File { file, path } => {
                let (ours, there) = (file.metadata()?, fs::metadata(&path).ok());
                let is_there =
                    there.is_some_and(|it| (it.dev(), it.ino()) == (ours.dev(), ours.ino()));
                if !is_there {
                    *file = open(path)?;
                }
                file.write_all(all().as_bytes())
                    .map_err(|error| cannot("cannot write the NAT log to", path, error))
            }
        }
    }
}

/// Readable by its owner alone: it tells who did what.
fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| cannot("cannot write the NAT log to", path, error))
}
