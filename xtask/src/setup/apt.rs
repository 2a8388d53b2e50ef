//! Debian packages, without questions asked. Owns the ways of getting one: installed, installed from
//! backports, or only downloaded, also from another release. Never removes a package, and never edits
//! the machine's list of sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::command;

/// The keys that sign Debian's archives, backports among them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// How packages are installed: no questions, nothing that is not needed, nothing taken away.
const INSTALL: [&str; 4] = ["install", "--yes", "--no-install-recommends", "--no-remove"];

/// apt-get, with package lists that are refreshed before they are first needed.
#[derive(Default)]
pub struct Apt {
    suite: Option<Suite>,
    is_refreshed: bool,
}

impl Apt {
    /// Of another suite of Debian's archive than the machine's, such as `sid`, by the machine's own
    /// mirror, with lists and caches of its own. To download from, not to install.
    ///
    /// # Errors
    /// When the machine gets no packages from Debian's archive.
    pub fn of_suite(name: &str) -> Result<Self> {
        let targets = index_targets()?;
        let (_, mirror) =
            main_archive(&targets).context("no source here is Debian's main archive")?;
        Ok(Self {
            suite: Some(Suite::new(name, mirror)?),
            is_refreshed: false,
        })
    }

    /// Installs packages and what they depend on. Those that could only come by removing another
    /// package come from the backports of the machine's release: it then has a relative of theirs
    /// from there already.
    ///
    /// # Errors
    /// When apt-get refuses; the error holds its complaint.
    pub fn install(&mut self, packages: &[&str]) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        self.refresh();
        let Err(refusal) = try_out(packages) else {
            return install(packages);
        };
        if refusal.to_string().contains("Unable to locate") {
            bail!("{refusal} (Debian 12 with its security suite has all that is needed)");
        }
        let (possible, impossible): (Vec<&str>, Vec<&str>) = packages
            .iter()
            .partition(|package| try_out(&[**package]).is_ok());
        install(&possible)?;
        install_from_backports(&impossible)
            .map_err(|error| anyhow!("{refusal}; nor do backports help: {error:#}"))
    }

    /// Whether the machine's sources have a package.
    pub fn offers(&mut self, package: &str) -> bool {
        self.refresh();
        self.apt("apt-cache")
            .args(["show", package])
            .succeed()
            .is_ok()
    }

    /// The packages that a package depends on.
    ///
    /// # Errors
    /// When the sources have no such package.
    pub fn dependencies(&mut self, package: &str) -> Result<Vec<String>> {
        self.refresh();
        let list = self
            .apt("apt-cache")
            .args(["depends", "--important", package])
            .succeed()
            .unwrap_or_default();
        let found: Vec<_> = dependencies(&list).map(str::to_owned).collect();
        ensure!(
            !found.is_empty(),
            "no package {package} is known here: run `apt-get update` as root"
        );
        Ok(found)
    }

    /// Downloads a package's file into a directory, installing nothing. Needs no root.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn download(&mut self, package: &str, directory: &Path) -> Result<()> {
        self.refresh();
        self.apt("apt-get")
            .current_dir(directory)
            .args(["download", package])
            .succeed()
            .map(drop)
    }

    /// The machine's release of Debian, such as `bookworm`, and the mirror that it comes from.
    ///
    /// # Errors
    /// When no source here is Debian's main archive.
    pub fn release(&mut self) -> Result<(String, String)> {
        self.refresh();
        let targets = index_targets()?;
        main_archive(&targets)
            .map(|(release, mirror)| (release.to_owned(), mirror.to_owned()))
            .context("no source here is Debian's main archive")
    }

    /// A source that fails here may not be one that is needed: what is missing shows later.
    fn refresh(&mut self) {
        if self.is_refreshed || !command::is_root() {
            return;
        }
        self.is_refreshed = true;
        if let Err(error) = self.apt("apt-get").arg("update").succeed() {
            println!("  warning: package lists could not all be refreshed: {error:#}");
        }
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = apt(program);
        if let Some(suite) = &self.suite {
            suite.choose_for(&mut command);
            command.args(["-o", "Dir::Etc::sourceparts=/dev/null"]);
        }
        command
    }
}

/// A suite of Debian's archive, with lists and caches of our own, so that the machine's sources stay
/// as they are.
struct Suite {
    directory: PathBuf,
}

impl Suite {
    fn new(name: &str, mirror: &str) -> Result<Self> {
        let directory = command::target_directory().join("apt").join(name);
        for needed in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(needed))
                .with_context(|| format!("cannot make {}", directory.join(needed).display()))?;
        }
        let list = directory.join("sources.list");
        let signed_by = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        fs::write(&list, format!("deb {signed_by}{mirror} {name} main\n"))
            .with_context(|| format!("cannot write {}", list.display()))?;
        Ok(Self { directory })
    }

    fn choose_for(&self, command: &mut Command) {
        for (option, path) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            command
                .arg("-o")
                .arg(format!("{option}={}", self.directory.join(path).display()));
        }
    }

    fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.directory)
            .with_context(|| format!("cannot remove {}", self.directory.display()))
    }
}

/// Whether these packages could be installed; changes nothing.
fn try_out(packages: &[&str]) -> Result<()> {
    apt("apt-get")
        .args(INSTALL)
        .arg("--simulate")
        .args(packages)
        .succeed()
        .map(drop)
}

fn install(packages: &[&str]) -> Result<()> {
    apt("apt-get")
        .args(INSTALL)
        .args(packages)
        .succeed()
        .map(drop)
}

/// Installs packages from backports; what they depend on may come from the machine's own sources.
fn install_from_backports(packages: &[&str]) -> Result<()> {
    let targets = index_targets()?;
    let (name, mirror) = backports(&targets).context("no source here is Debian's main archive")?;
    let suite = Suite::new(&name, mirror)?;
    let apt_get = || {
        let mut command = apt("apt-get");
        suite.choose_for(&mut command);
        command
    };
    println!(
        "  {} from {name}, as packages installed here ask for it",
        packages.join(", ")
    );
    apt_get().arg("update").succeed()?;
    apt_get()
        .args(INSTALL)
        .args(["--target-release", &name])
        .args(packages)
        .succeed()?;
    suite.remove()
}

const INDEX_TARGET_FORMAT: &str = "$(ORIGIN) $(RELEASE) $(REPO_URI)";

/// What package lists there are, one a line: origin, release, mirror.
fn index_targets() -> Result<String> {
    apt("apt-get")
        .args([
            "indextargets",
            "--format",
            INDEX_TARGET_FORMAT,
            "Identifier: Packages",
        ])
        .succeed()
}

/// The backports suite of the machine's release, and the mirror to get it from.
fn backports(index_targets: &str) -> Option<(String, &str)> {
    main_archive(index_targets).map(|(release, mirror)| (format!("{release}-backports"), mirror))
}

/// The machine's release of Debian, and the mirror that it comes from.
fn main_archive(index_targets: &str) -> Option<(&str, &str)> {
    index_targets.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (origin, release, mirror) = (fields.next()?, fields.next()?, fields.next()?);
        let is_main = origin == "Debian" && !release.contains(['-', '/']);
        is_main.then_some((release, mirror))
    })
}

/// The dependencies in the output of `apt-cache depends`.
fn dependencies(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .filter_map(|line| line.trim_start().strip_prefix("Depends: "))
}

fn apt(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .args([
            "-o",
            "quiet=1",
            "-o",
            "Acquire::Retries=3",
            "-o",
            "DPkg::Lock::Timeout=300",
        ]);
    command
}

trait Succeed {
    /// Runs a program of apt and returns its output; an error holds what it complained about.
    fn succeed(&mut self) -> Result<String>;
}

impl Succeed for Command {
    fn succeed(&mut self) -> Result<String> {
        let name = self.get_program().to_string_lossy().into_owned();
        let output = self
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start {name}"))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{name}: {}", complaints(&stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// apt's errors, without its warnings and notes.
fn complaints(stderr: &str) -> String {
    let errors: Vec<_> = stderr
        .lines()
        .filter_map(|line| line.strip_prefix("E: "))
        .collect();
    if errors.is_empty() {
        stderr.trim().to_owned()
    } else {
        errors.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backports_come_from_the_mirror_of_the_release() {
        let targets = "\
            NodeSource nodistro https://deb.example.org/node/\n\
            Debian bookworm-updates http://mirror.example.org/debian/\n\
            Debian bookworm-security http://mirror.example.org/debian-security/\n\
            Debian bookworm http://mirror.example.org/debian/\n";
        assert_eq!(
            backports(targets),
            Some((
                "bookworm-backports".to_owned(),
                "http://mirror.example.org/debian/"
            ))
        );
    }

    #[test]
    fn a_machine_that_is_not_debian_has_no_backports() {
        assert_eq!(
            backports("Ubuntu noble http://mirror.example.org/ubuntu/\n"),
            None
        );
        assert_eq!(backports(""), None);
    }

    #[test]
    fn dependencies_are_listed() {
        let list = "linux-image-amd64\n  Depends: linux-base\n  Depends: linux-image-7.2-amd64\n";
        let found: Vec<_> = dependencies(list).collect();
        assert_eq!(found, ["linux-base", "linux-image-7.2-amd64"]);
        assert_eq!(dependencies("").next(), None);
    }

    #[test]
    fn errors_are_picked_out_of_what_apt_says() {
        let stderr = "W: Some index files failed.\nE: Unable to locate package nothing\n";
        assert_eq!(complaints(stderr), "Unable to locate package nothing");
        assert_eq!(complaints("killed\n"), "killed");
    }
}
