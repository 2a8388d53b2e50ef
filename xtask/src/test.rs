//! `cargo xtask test`: runs the tests with Cargo's own runner, which has the last word. Owns which
//! tests are run; knows nothing about what they test. Tests inside the crates need no root; test
//! programs (`tests/` of a crate) may, and find the built `tapnat` in the environment variable
//! `TAPNAT_BIN`, the guest's kernel in `TAPNAT_GUEST_KERNEL`, and one another, to be run in a guest, in
//! `TAPNAT_TEST_PROGRAMS`. What `dist` and `upgrade` need takes minutes to make, so most of it runs
//! only when they are named.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs::{self, DirEntry};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::setup::{self, Group};
use crate::{build, command, dist, rfc, upgrade};

/// A directory laid out as `setup` leaves it; a developer may set it to try another kernel.
const GUEST_KERNEL: &str = "TAPNAT_GUEST_KERNEL";

/// Run the tests: those inside the crates, then the test programs, which need root
#[derive(Args, Default)]
pub struct Options {
    /// `unit` (the tests inside the crates), `rfc` (one line for each requirement of
    /// docs/rfc-compliance.md), `kernels` (the programs on each kernel that is supported), or the
    /// name of a test program, or part of a test's name
    #[arg(value_name = "WHAT")]
    what: Option<String>,

    /// With `kernels`: only those of these releases of Debian [default: all]
    #[arg(value_name = "RELEASE")]
    releases: Vec<String>,

    /// What follows `--` goes to the test programs, such as `--nocapture`
    #[arg(last = true, value_name = "TEST ARGUMENTS")]
    arguments: Vec<String>,
}

/// What one invocation runs.
#[derive(Debug, PartialEq, Eq)]
enum Selection {
    Everything,
    Unit,
    Rfc,
    Kernels,
    Program(String),
    Filter(String),
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    let programs = test_programs(command::workspace())?;
    let selection = select(options.what.as_deref(), &programs);
    ensure!(
        options.releases.is_empty() || selection == Selection::Kernels,
        "only `cargo xtask test kernels` takes names of releases"
    );

    if selection == Selection::Unit {
        setup::ensure(&[Group::Build])?;
    } else {
        ensure!(
            command::is_root(),
            "the test programs make network namespaces and load eBPF programs: run them as root, \
             or only `cargo xtask test unit`"
        );
        setup::ensure(&[Group::Build, Group::Sandbox, Group::Test, Group::Guest])?;
    }

    if selection == Selection::Rfc {
        ensure!(
            options.arguments.is_empty(),
            "`cargo xtask test rfc` takes no further arguments: name a test program instead"
        );
        return run_rfc();
    }
    if selection == Selection::Kernels {
        return run_kernels(options);
    }
    if !matches!(selection, Selection::Program(_)) {
        command::run(cargo_test(&["--doc"], &selection).args(&options.arguments))?;
        command::run(cargo_test(&["--lib", "--bins"], &selection).args(&options.arguments))?;
    }
    if selection != Selection::Unit {
        let tapnat = build::tapnat(&build::Options::default())?;
        let programs = match &selection {
            Selection::Program(name) => name,
            _ => "*",
        };
        let mut cargo = cargo_test(&["--test", programs], &selection);
        cargo
            .args(&options.arguments)
            .env("TAPNAT_BIN", tapnat)
            .env("TAPNAT_PROMTOOL", setup::promtool())
            .env("TAPNAT_UNBOUND", setup::unbound_directory())
            .env(PROGRAMS, build_programs(IN_GUESTS)?);
        if env::var_os(GUEST_KERNEL).is_none() {
            cargo.env(GUEST_KERNEL, setup::guest_kernel_directory());
        }
        if selection == Selection::Program("dist".to_owned()) {
            add_packages(&mut cargo)?;
        }
        if selection == Selection::Program("faults".to_owned()) {
            cargo.env("TAPNAT_FAULTS", "all");
        }
        if selection == Selection::Program("upgrade".to_owned()) {
            let others = upgrade::build()?;
            cargo
                .arg("--include-ignored")
                .env("TAPNAT_NEXT_BIN", others.next)
                .env("TAPNAT_OTHER_LAYOUT_BIN", others.other_layout);
        }
        command::run(&mut cargo)?;
    }
    Ok(())
}

/// Lets the test program `dist` run as a whole: gives it a package, one that says it is older, and a
/// root to install them in.
fn add_packages(cargo: &mut Command) -> Result<()> {
    setup::ensure(&[Group::DistTest])?;
    let build = build::Options::default();
    cargo
        .arg("--include-ignored")
        .env(
            "TAPNAT_OLD_PACKAGE",
            dist::package(&build, Some("0.0.1-1"))?,
        )
        .env("TAPNAT_PACKAGE", dist::package(&build, None)?)
        .env("TAPNAT_CLEAN_ROOT", setup::clean_root_directory());
    Ok(())
}

/// Leaves the word to the requirements.
fn run_rfc() -> Result<()> {
    let tapnat = build::tapnat(&build::Options::default())?;
    rfc::run(|targets| {
        let mut cargo = cargo_test(targets, &Selection::Rfc);
        cargo.env("TAPNAT_BIN", &tapnat);
        cargo
    })
}

/// Releases of Debian, with Linux 5.10, 6.1, 6.12 and the newest packaged one. The first is too old,
/// and is to be told so.
const RELEASES: [&str; 4] = ["bullseye", "bookworm", "trixie", "sid"];

/// Boots one kernel after the other, and goes on if one fails.
fn run_kernels(options: &Options) -> Result<()> {
    let releases: Vec<&str> = if options.releases.is_empty() {
        RELEASES.to_vec()
    } else {
        options.releases.iter().map(String::as_str).collect()
    };
    let tapnat = build::tapnat(&build::Options::default())?;
    let programs = build_programs(IN_GUESTS)?;
    let boot = |release: &str| -> Result<()> {
        let kernel = setup::guest_kernel_of(release)?;
        command::run(
            program("kernels")
                .arg("--nocapture")
                .args(&options.arguments)
                .env("TAPNAT_BIN", &tapnat)
                .env(PROGRAMS, &programs)
                .env(GUEST_KERNEL, kernel)
                .env("TAPNAT_KERNELS", "all"),
        )
    };
    let mut failures = 0;
    let mut results = Vec::new();
    for release in releases {
        println!("\n=== the kernel of Debian {release}");
        let result = boot(release);
        failures += usize::from(result.is_err());
        let outcome = result.map_or_else(|error| format!("{error:#}"), |()| "as it should".into());
        results.push(format!("{release:<10}  {outcome}"));
    }
    println!("\n{}", results.join("\n"));
    ensure!(failures == 0, "{failures} of the kernels failed");
    Ok(())
}

/// The test programs of which the test program `kernels` runs parts in guests.
const IN_GUESTS: &[&str] = &["links", "lifecycle", "nat64", "forwards", "trace"];
/// Their paths, as in `PATH`.
const PROGRAMS: &str = "TAPNAT_TEST_PROGRAMS";

/// Builds test programs, and returns their paths as in `PATH`.
fn build_programs(names: &[&str]) -> Result<OsString> {
    let mut cargo = command::cargo("test");
    cargo
        .args(["--no-run", "--message-format", "json", "--workspace"])
        .args(command::EXCLUDE_EBPF);
    for name in names {
        cargo.args(["--test", name]);
    }
    let said = command::output(&mut cargo)?;
    let paths = executables(&said);
    ensure!(
        paths.len() == names.len(),
        "Cargo does not say where it has put {}",
        names.join(", ")
    );
    env::join_paths(paths).context("a strange target directory")
}

/// The test programs in what Cargo says of a build, a JSON object a line.
fn executables(said: &str) -> Vec<String> {
    said.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["kind"] == json!(["test"]))
        .filter_map(|message| Some(message["executable"].as_str()?.to_owned()))
        .collect()
}

/// Cargo's test runner on one test program, built as for all of them.
pub fn program(name: &str) -> Command {
    cargo_test(&["--test", name], &Selection::Program(name.to_owned()))
}

/// Cargo's test runner on these targets of all crates but the eBPF one; what is added goes to the
/// test programs. Always the same crates, as their dependencies would be built anew for others.
fn cargo_test(targets: &[&str], selection: &Selection) -> Command {
    let mut cargo = command::cargo("test");
    cargo
        .args(["--no-fail-fast", "--workspace"])
        .args(command::EXCLUDE_EBPF)
        .args(targets);
    if let Selection::Filter(part) = selection {
        cargo.arg(part);
    }
    cargo.arg("--");
    cargo
}

fn select(what: Option<&str>, programs: &BTreeSet<String>) -> Selection {
    let Some(what) = what else {
        return Selection::Everything;
    };
    let program = what.replace('-', "_");
    if what == "unit" {
        Selection::Unit
    } else if what == "rfc" {
        Selection::Rfc
    } else if what == "kernels" {
        Selection::Kernels
    } else if programs.contains(&program) {
        Selection::Program(program)
    } else {
        Selection::Filter(what.to_owned())
    }
}

/// The names Cargo gives to the test programs of the crates in a directory.
fn test_programs(workspace: &Path) -> Result<BTreeSet<String>> {
    let mut programs = BTreeSet::new();
    for member in list(workspace)? {
        if !member.path().join("Cargo.toml").is_file() || !member.path().join("tests").is_dir() {
            continue;
        }
        for entry in list(&member.path().join("tests"))? {
            let path = entry.path();
            let is_program =
                path.extension().is_some_and(|end| end == "rs") || path.join("main.rs").is_file();
            if let Some(name) = path.file_stem().filter(|_| is_program) {
                programs.insert(name.to_string_lossy().into_owned());
            }
        }
    }
    Ok(programs)
}

fn list(directory: &Path) -> Result<Vec<DirEntry>> {
    fs::read_dir(directory)
        .and_then(Iterator::collect)
        .with_context(|| format!("cannot list {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_selects_a_program_before_it_filters() {
        let programs = BTreeSet::from(["end_to_end".to_owned()]);
        assert_eq!(select(None, &programs), Selection::Everything);
        assert_eq!(select(Some("rfc"), &programs), Selection::Rfc);
        assert_eq!(select(Some("kernels"), &programs), Selection::Kernels);
        assert_eq!(select(Some("unit"), &programs), Selection::Unit);
        assert_eq!(
            select(Some("end-to-end"), &programs),
            Selection::Program("end_to_end".to_owned())
        );
        assert_eq!(
            select(Some("hairpin"), &programs),
            Selection::Filter("hairpin".to_owned())
        );
    }

    #[test]
    fn executables_are_found_in_what_cargo_says() {
        let said = concat!(
            r#"{"reason":"compiler-artifact","target":{"kind":["lib"]},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"kind":["test"]},"executable":"/t/links-1"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executables(said), ["/t/links-1"]);
        assert!(executables("").is_empty());
    }

    #[test]
    fn test_programs_are_files_and_directories_with_main() {
        let workspace = tempfile::tempdir().unwrap();
        let member = workspace.path().join("tests");
        let tests = member.join("tests");
        fs::create_dir_all(tests.join("end_to_end")).unwrap();
        fs::create_dir_all(tests.join("common")).unwrap();
        fs::create_dir_all(workspace.path().join("docs/tests")).unwrap();
        for file in ["end_to_end/main.rs", "program_run.rs", "notes.md"] {
            fs::write(tests.join(file), "").unwrap();
        }
        fs::write(member.join("Cargo.toml"), "").unwrap();
        fs::write(workspace.path().join("docs/tests/no_crate.rs"), "").unwrap();
        let programs = test_programs(workspace.path()).unwrap();
        assert_eq!(
            programs,
            ["end_to_end", "program_run"].map(str::to_owned).into()
        );
    }
}
