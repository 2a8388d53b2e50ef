//! `cargo xtask setup`: brings a machine to building and testing tapnat. Owns the order of things and
//! what is said about them; what is needed stands in `setup/requirements.rs`, how Debian's packages
//! are had in `setup/apt.rs`. Removes nothing.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};

use self::apt::Apt;
use self::requirements::{Install, Machine, REQUIREMENTS, Requirement};
use crate::command;

mod apt;
mod bpf_linker;
mod clean_root;
mod guest_kernel;
mod requirements;
mod unpacked;

/// Install what building, linting and testing need
#[derive(Args)]
pub struct Options {
    /// Only what this is needed for [default: all but bench, dist and dist-test]
    #[arg(value_enum, value_name = "WHAT FOR")]
    groups: Vec<Group>,
}

/// What something is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// Compiling tapnat
    Build,
    /// Checking formatting and Clippy's lints
    Lint,
    /// The sandbox with network namespaces, and tests
    Sandbox,
    /// Tests alone
    Test,
    /// Tests and the sandbox with a QEMU guest
    Guest,
    /// Comparing with other NATs
    Bench,
    /// Building a Debian package
    Dist,
    /// Installing that package on a machine that has nothing else
    DistTest,
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    let groups = match options.groups.as_slice() {
        [] => &[
            Group::Build,
            Group::Lint,
            Group::Sandbox,
            Group::Test,
            Group::Guest,
        ],
        chosen => chosen,
    };
    ensure(groups)?;
    let names: Vec<_> = groups
        .iter()
        .filter_map(Group::to_possible_value)
        .map(|value| value.get_name().to_owned())
        .collect();
    println!("setup: everything is here for {}", names.join(", "));
    Ok(())
}

/// Installs what `groups` need and this machine lacks. Says nothing when that is nothing.
///
/// # Errors
/// When something cannot be installed, above all without root: the error then names the command
/// to run.
pub fn ensure(groups: &[Group]) -> Result<()> {
    let missing = find_missing(groups);
    if missing.is_empty() {
        return Ok(());
    }
    for requirement in &missing {
        if let Install::ByHand(how) = requirement.install {
            bail!(
                "{} is missing ({}): {how}",
                requirement.name,
                requirement.why
            );
        }
    }

    let packages = packages(&missing);
    let has_apt = command::find_program("apt-get").is_some();
    if let Some(refusal) = refusal(&packages, has_apt, command::is_root()) {
        println!("setup: missing");
        for requirement in &missing {
            print(requirement, &missing);
        }
        bail!(refusal);
    }

    // Each line stands there while what it names is being installed.
    println!("setup: installing");
    let (from_packages, by_action): (Vec<&Requirement>, Vec<&Requirement>) = missing
        .iter()
        .partition(|requirement| matches!(requirement.install, Install::Packages(_)));
    let mut apt = Apt::default();
    for requirement in from_packages {
        print(requirement, &missing);
    }
    apt.install(&packages).context("cannot install packages")?;
    for requirement in by_action {
        print(requirement, &missing);
        if let Install::Action(install) = requirement.install {
            install(&mut apt).with_context(|| format!("cannot install {}", requirement.name))?;
        }
    }

    let absent: Vec<_> = find_missing(groups)
        .iter()
        .map(|requirement| requirement.name)
        .collect();
    ensure!(
        absent.is_empty(),
        "installed, but still not found: {} (is Cargo's bin directory on your PATH?)",
        absent.join(", ")
    );
    Ok(())
}

/// Why packages cannot be installed by this process, and the way out; nothing when they can.
fn refusal(packages: &[&str], has_apt: bool, is_root: bool) -> Option<String> {
    let packages = packages.join(" ");
    if packages.is_empty() {
        None
    } else if !has_apt {
        Some(format!(
            "there is no apt-get here: install the counterparts of these packages by this system's \
             own means: {packages} (nightly with rust-src serves in place of rustc-web: `rustup \
             toolchain install nightly --component rust-src`)"
        ))
    } else if !is_root {
        Some(format!(
            "installing packages needs root: run `sudo apt-get update && sudo apt-get install \
             --no-install-recommends {packages}`, then this command again"
        ))
    } else {
        None
    }
}

/// Where the root of a machine lies that has nothing but Debian.
pub fn clean_root_directory() -> PathBuf {
    clean_root::directory()
}

/// Where the guest's kernel lies once it is there.
pub fn guest_kernel_directory() -> PathBuf {
    guest_kernel::directory()
}

/// Where Prometheus' judge of metrics lies once it is there.
pub fn promtool() -> PathBuf {
    unpacked::PROMTOOL.directory().join("promtool")
}

/// Where unbound and the judge of its configuration lie once they are there.
pub fn unbound_directory() -> PathBuf {
    unpacked::UNBOUND.directory()
}

/// Where the kernel of a release of Debian lies; fetches it if it is not there.
///
/// # Errors
/// When it cannot be had.
pub fn guest_kernel_of(release: &str) -> Result<PathBuf> {
    guest_kernel::of_suite(release)
}

fn find_missing(groups: &[Group]) -> Vec<&'static Requirement> {
    let machine = Machine::inspect();
    REQUIREMENTS
        .iter()
        .filter(|requirement| groups.contains(&requirement.group))
        .filter(|requirement| !requirement.is_present(&machine))
        .collect()
}

fn packages(requirements: &[&Requirement]) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for requirement in requirements {
        if let Install::Packages(names) = requirement.install {
            packages.extend(names);
        }
    }
    packages
}

/// Prints what a requirement is for, in a column with `others`.
fn print(requirement: &Requirement, others: &[&Requirement]) {
    let width = others
        .iter()
        .map(|other| other.name.len())
        .max()
        .unwrap_or(0);
    println!("  {:width$}  {}", requirement.name, requirement.why);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_installed_is_told_with_the_way_out() {
        let packages = ["clang", "tcpdump"];
        assert_eq!(refusal(&packages, true, true), None);
        assert_eq!(refusal(&[], false, false), None);
        let without_root = refusal(&packages, true, false).unwrap();
        assert!(
            without_root.contains("needs root")
                && without_root
                    .contains("sudo apt-get install --no-install-recommends clang tcpdump"),
            "{without_root}"
        );
        for is_root in [false, true] {
            let elsewhere = refusal(&packages, false, is_root).unwrap();
            assert!(
                elsewhere.contains("no apt-get") && elsewhere.contains("clang tcpdump"),
                "{elsewhere}"
            );
        }
    }
}
