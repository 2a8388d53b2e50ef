//! Programs taken out of Debian's packages, whose services nobody here needs and which would start on
//! being installed. They lie under `target`. Refuses to install the packages.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::apt::Apt;
use crate::command;

/// Prometheus' own judge of metrics, rules and queries. Has no libraries.
pub const PROMTOOL: Unpacked = Unpacked {
    name: "promtool",
    package: "prometheus",
    programs: &["usr/bin/promtool"],
    needs_libraries: false,
};

/// A resolver with DNS64, and the judge of its configuration.
pub const UNBOUND: Unpacked = Unpacked {
    name: "unbound",
    package: "unbound",
    programs: &["usr/sbin/unbound", "usr/sbin/unbound-checkconf"],
    needs_libraries: true,
};

/// What is taken out of a package.
pub struct Unpacked {
    /// Its directory.
    name: &'static str,
    package: &'static str,
    /// Where they lie in the package.
    programs: &'static [&'static str],
    /// Whether the libraries that the package depends on are to be installed.
    needs_libraries: bool,
}

impl Unpacked {
    /// Where the programs lie once they are there.
    pub fn directory(&self) -> PathBuf {
        command::target_directory().join(self.name)
    }

    pub fn is_present(&self) -> bool {
        self.programs.iter().all(|program| {
            program
                .rsplit('/')
                .next()
                .is_some_and(|name| self.directory().join(name).is_file())
        })
    }

    /// Downloads the package and keeps these programs of it.
    ///
    /// # Errors
    /// When it cannot be downloaded, has no such program, or its libraries cannot be installed.
    pub fn install(&self, apt: &mut Apt) -> Result<()> {
        if self.needs_libraries {
            let needed = apt.dependencies(self.package)?;
            let libraries: Vec<_> = needed
                .iter()
                .map(String::as_str)
                .filter(|package| package.starts_with("lib"))
                .collect();
            apt.install(&libraries)?;
        }
        let directory = self.directory();
        let partial = directory.with_extension("partial");
        let _ = fs::remove_dir_all(&partial);
        let unpacked = partial.join("unpacked");
        fs::create_dir_all(&unpacked)
            .with_context(|| format!("cannot make {}", unpacked.display()))?;
        apt.download(self.package, &partial)?;
        let archive = super::guest_kernel::only_entry(&partial, &format!("{}_", self.package))?;
        command::output(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&archive)
                .arg(&unpacked),
        )?;
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        for program in self.programs {
            let program = unpacked.join(program);
            let name = program.file_name().context("a program without a name")?;
            fs::rename(&program, directory.join(name))
                .with_context(|| format!("{} has no {}", self.package, program.display()))?;
        }
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))
    }
}
