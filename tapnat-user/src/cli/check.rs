//! `tapnat check`: whether a configuration file is right.

use std::{ffi::OsString, path::PathBuf};

use anyhow::Result;
use clap::Args;

use super::{Instance, file, print, run};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,

    /// The file [default: the instance's, /etc/tapnat/tapnat.toml]
    file: Option<PathBuf>,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let path = self
            .file
            .unwrap_or_else(|| file::default_path(&self.instance.name));
        let typed = ["tapnat", "run"].map(OsString::from);
        let (config, _) = run::read(&typed, Some(&path))?;
        print::text(&format!(
            "{} is right: {} inside device{}, {} forward{}\n",
            path.display(),
            config.insides.len(),
            print::plural(config.insides.len() as u64),
            config.forwards.len(),
            print::plural(config.forwards.len() as u64)
        ))
    }
}
