//! `cargo xtask test`: runs the tests with Cargo's own runner, which has the last word. Owns which
//! crates and test programs are run; knows nothing about what they test.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::setup::{self, Group};
use crate::{build, command};

/// The crate whose tests need root: they make network namespaces and load programs.
const INTEGRATION: &str = "tapnat-tests";

/// Run the tests: those of the crates, then those that need root
#[derive(Args, Default)]
pub struct Options {
    /// `unit`, or a test program under tests/tests such as `end-to-end`, or part of a test's name
    #[arg(value_name = "WHAT")]
    what: Option<String>,

    /// What follows `--` goes to the test programs, such as `--nocapture`
    #[arg(last = true, value_name = "TEST ARGUMENTS")]
    arguments: Vec<String>,
}

/// What one invocation runs.
#[derive(Debug, PartialEq, Eq)]
enum Selection {
    Everything,
    Unit,
    Program(String),
    Filter(String),
}

/// Runs the verb.
pub fn run(options: &Options) -> Result<()> {
    let programs = test_programs(&command::workspace().join("tests/tests"))?;
    let selection = select(options.what.as_deref(), &programs);

    if selection == Selection::Unit {
        setup::ensure(&[Group::Build])?;
    } else {
        ensure!(
            command::is_root(),
            "the integration tests make network namespaces and load eBPF programs: \
             run them as root, or run only `cargo xtask test unit`"
        );
        setup::ensure(&[Group::Build, Group::Test, Group::Guest])?;
    }

    if !matches!(selection, Selection::Program(_)) {
        let mut unit = command::cargo("test");
        unit.args(["--no-fail-fast", "--workspace"]).args([
            "--exclude",
            "tapnat-ebpf",
            "--exclude",
            INTEGRATION,
        ]);
        command::run(with_arguments(&mut unit, &selection, &options.arguments))?;
    }
    if selection != Selection::Unit {
        let tapnat = build::tapnat(&build::Options::default())?;
        let mut integration = command::cargo("test");
        integration
            .args(["--no-fail-fast", "--package", INTEGRATION])
            .env("TAPNAT", tapnat);
        match &selection {
            Selection::Program(name) => integration.args(["--test", name]),
            // Without this, tests in documentation have the last word, and there are none.
            _ => integration.arg("--tests"),
        };
        command::run(with_arguments(
            &mut integration,
            &selection,
            &options.arguments,
        ))?;
    }
    Ok(())
}

fn with_arguments<'a>(
    cargo: &'a mut Command,
    selection: &Selection,
    arguments: &[String],
) -> &'a mut Command {
    if let Selection::Filter(part) = selection {
        cargo.arg(part);
    }
    cargo.arg("--").args(arguments)
}

fn select(what: Option<&str>, programs: &BTreeSet<String>) -> Selection {
    let Some(what) = what else {
        return Selection::Everything;
    };
    let program = what.replace('-', "_");
    if what == "unit" {
        Selection::Unit
    } else if programs.contains(&program) {
        Selection::Program(program)
    } else {
        Selection::Filter(what.to_owned())
    }
}

/// The names Cargo gives to the test programs in a directory: files, and directories with a
/// `main.rs`.
fn test_programs(directory: &Path) -> Result<BTreeSet<String>> {
    if !directory.exists() {
        return Ok(BTreeSet::new());
    }
    let mut programs = BTreeSet::new();
    let entries = fs::read_dir(directory)
        .with_context(|| format!("cannot list the test programs in {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let is_program =
            path.extension().is_some_and(|end| end == "rs") || path.join("main.rs").is_file();
        if let Some(name) = path.file_stem().filter(|_| is_program) {
            programs.insert(name.to_string_lossy().into_owned());
        }
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_selects_a_program_before_it_filters() {
        let programs = BTreeSet::from(["end_to_end".to_owned()]);
        assert_eq!(select(None, &programs), Selection::Everything);
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
    fn test_programs_are_files_and_directories_with_main() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::write(path.join("program_run.rs"), "").unwrap();
        fs::write(path.join("notes.md"), "").unwrap();
        fs::create_dir(path.join("common")).unwrap();
        fs::create_dir(path.join("end_to_end")).unwrap();
        fs::write(path.join("end_to_end/main.rs"), "").unwrap();
        let programs = test_programs(path).unwrap();
        assert_eq!(
            programs,
            ["end_to_end", "program_run"].map(str::to_owned).into()
        );
        assert!(test_programs(&path.join("absent")).unwrap().is_empty());
    }
}
