//! Builds of tapnat to upgrade to: made from a copy of the sources in which some lines are others.
//! Owns the directory `target/upgrade`; what is done with them is the business of the test program
//! `upgrade`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::command;

/// Programs that differ from the one of these sources.
pub struct Others {
    /// Of another version and with another eBPF program, and with the same tables.
    pub next: PathBuf,
    /// With tables of another layout, too.
    pub other_layout: PathBuf,
}

/// A line in a file of the sources, by how it begins, and what it becomes.
struct Edit {
    file: &'static str,
    line: String,
    becomes: fn(&str) -> String,
}

/// Builds both.
///
/// # Errors
/// When the sources are not as expected here, or a build fails.
pub fn build() -> Result<Others> {
    let version = Edit {
        file: "Cargo.toml",
        line: format!("version = {:?}", env!("CARGO_PKG_VERSION")),
        becomes: |line| line.replacen(env!("CARGO_PKG_VERSION"), "99.0.0", 1),
    };
    let program = Edit {
        file: "tapnat-common/src/cut.rs",
        line: "pub const MAX_PIECES: u32 = ".to_owned(),
        becomes: |line| line.replace(';', " - 1;"),
    };
    let layout = Edit {
        file: "tapnat-common/src/abi.rs",
        line: "pub const ABI_VERSION: u32 = ".to_owned(),
        becomes: |line| line.replace(';', " + 1;"),
    };
    let next = build_with("next", &[&version, &program])?;
    let other_layout = build_with("other-layout", &[&version, &program, &layout])?;
    Ok(Others { next, other_layout })
}

fn build_with(name: &str, edits: &[&Edit]) -> Result<PathBuf> {
    let directory = command::target_directory().join("upgrade");
    let sources = directory.join("sources");
    copy(command::workspace(), &sources, Path::new(""), edits)?;
    let target = directory.join("target");
    // Not `--locked`: the version stands in the lock file, too.
    let mut cargo = std::process::Command::new("cargo");
    cargo
        .current_dir(&sources)
        .args(["build", "--offline", "--package", "tapnat-user"])
        .args(["--bin", "tapnat"])
        .env("CARGO_TARGET_DIR", &target);
    command::run(&mut cargo)?;
    let program = directory.join(name);
    fs::copy(target.join("debug/tapnat"), &program)
        .with_context(|| format!("cannot make {}", program.display()))?;
    Ok(program)
}

/// Copies what is at `path` in the sources, with these edits. What has not changed is not written,
/// so that Cargo does not build it anew.
fn copy(from: &Path, to: &Path, path: &Path, edits: &[&Edit]) -> Result<()> {
    let here = from.join(path);
    if here.is_dir() {
        let is_hidden = |name: &OsStr| name.to_string_lossy().starts_with('.') && name != ".cargo";
        fs::create_dir_all(to.join(path))
            .with_context(|| format!("cannot make {}", to.join(path).display()))?;
        for entry in
            fs::read_dir(&here).with_context(|| format!("cannot list {}", here.display()))?
        {
            let name = entry?.file_name();
            if name != "target" && !is_hidden(&name) {
                copy(from, to, &path.join(name), edits)?;
            }
        }
        return Ok(());
    }
    let mut content = fs::read(&here).with_context(|| format!("cannot read {}", here.display()))?;
    for edit in edits.iter().filter(|edit| Path::new(edit.file) == path) {
        let text = String::from_utf8(content).context("a source that is no text")?;
        content = edit.apply(&text)?.into_bytes();
    }
    // Cargo adapts it to the version.
    let is_lock = path == Path::new("Cargo.lock");
    let there = to.join(path);
    if fs::read(&there).is_ok_and(|present| present == content || is_lock) {
        return Ok(());
    }
    fs::write(&there, content).with_context(|| format!("cannot write {}", there.display()))
}

impl Edit {
    fn apply(&self, text: &str) -> Result<String> {
        let is_it = |line: &str| line.starts_with(&self.line);
        ensure!(
            text.lines().filter(|line| is_it(line)).count() == 1,
            "{} has not one line that begins with `{}`: adapt xtask/src/upgrade.rs",
            self.file,
            self.line
        );
        let edited: Vec<_> = text
            .lines()
            .map(|line| {
                if is_it(line) {
                    (self.becomes)(line)
                } else {
                    line.to_owned()
                }
            })
            .collect();
        Ok(edited.join("\n") + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_edited_and_others_are_not() {
        let edit = Edit {
            file: "numbers",
            line: "two = ".to_owned(),
            becomes: |line| line.replace(';', " + 1;"),
        };
        let text = "one = 1;\ntwo = 2;\n";
        assert_eq!(edit.apply(text).unwrap(), "one = 1;\ntwo = 2 + 1;\n");
        assert!(edit.apply("one = 1;\n").is_err());
        assert!(edit.apply(&text.repeat(2)).is_err());
    }
}
