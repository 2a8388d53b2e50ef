//! Starting other programs, and where things lie in the workspace. Owns how a failed program is
//! reported; what is run and why is up to the verbs.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Keeps Cargo from building for this machine what builds only for BPF.
pub const EXCLUDE_EBPF: [&str; 4] = ["--exclude", "tapnat-ebpf", "--exclude", "tapnat-bench-ebpf"];

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Cargo's target directory.
pub fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(
        || workspace().join("target"),
        |chosen| workspace().join(chosen),
    )
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Cargo of the toolchain that this program was started with, in the workspace, on the
/// committed `Cargo.lock`.
pub fn cargo(verb: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args([verb, "--locked"]);
    command
}

/// Where `program` is on the search path, or in the directories of system programs that the
/// search path of an ordinary user lacks.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let search_path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&search_path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Runs `command` in the foreground.
///
/// # Errors
/// When it cannot be started or fails; it has then said why itself.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| cannot_start(command))?;
    ensure!(
        status.success(),
        "`{}` failed ({status})",
        describe(command)
    );
    Ok(())
}

/// Runs `command` without a terminal and returns its standard output.
///
/// # Errors
/// When it cannot be started or fails; everything it said is then on standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| cannot_start(command))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        eprint!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    }
    ensure!(
        output.status.success(),
        "`{}` failed ({})",
        describe(command),
        output.status
    );
    Ok(stdout.into_owned())
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start `{}`", describe(command))
}

/// The command as one would type it.
fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut line = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_named_as_typed() {
        let error = run(Command::new("/bin/sh").args(["-c", "exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "`sh -c exit 3` failed (exit status: 3)");
    }

    #[test]
    fn output_is_the_standard_output() {
        assert_eq!(
            output(Command::new("echo").arg("hello")).unwrap(),
            "hello\n"
        );
    }

    #[test]
    fn programs_are_found_by_name_only() {
        assert!(find_program("sh").is_some());
        assert_eq!(find_program("no such program"), None);
    }
}
