//! Writes what a package of tapnat has that is made and not written: man pages and shell completions
//! from the command line's own definition, and the links by which QEMU calls tapnat. Owns the layout
//! of the directory that `[package.metadata.deb]` in `tapnat-user/Cargo.toml` takes them from; where
//! they go on a machine stands there.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser};
use clap_complete::Shell;
use tapnat_user::cli::Cli;

/// Where a package puts the program.
const PROGRAM: &str = "/usr/bin/tapnat";
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// Write man pages, shell completions and links into a directory
#[derive(Parser)]
struct Options {
    /// Is made anew
    directory: PathBuf,
}

fn main() -> Result<()> {
    write_all(&Options::parse().directory)
}

/// Writes `man/`, `completions/` and `links/` into a directory, in place of what it holds.
fn write_all(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    let make = |name: &str| -> Result<PathBuf> {
        let path = directory.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    };
    // One page for each verb, `tapnat-forward-add.1` for `tapnat forward add`, and `tapnat.1`.
    clap_mangen::generate_to(Cli::command(), make("man")?).context("cannot write man pages")?;
    let completions = make("completions")?;
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut Cli::command(), "tapnat", &completions)
            .with_context(|| format!("cannot write the completions for {shell}"))?;
    }
    let links = make("links")?;
    for name in ["qemu-ifup", "qemu-ifdown"] {
        symlink(PROGRAM, links.join(name)).with_context(|| format!("cannot link {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Output;

    use clap::Command;

    use super::*;

    fn run(program: &str, arguments: &[&str], path: &Path) -> Output {
        std::process::Command::new(program)
            .args(arguments)
            .arg(path)
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}: run `cargo xtask setup`"))
    }

    fn files(directory: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        files
    }

    #[test]
    fn each_verb_has_a_page_that_groff_accepts() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        let pages = files(&directory.path().join("man"));
        let names: Vec<_> = pages
            .iter()
            .map(|page| page.file_name().unwrap().to_str().unwrap())
            .collect();
        for name in ["tapnat.1", "tapnat-run.1", "tapnat-forward-add.1"] {
            assert!(names.contains(&name), "{names:?}");
        }
        for page in &pages {
            let output = run("groff", &["-man", "-Tutf8", "-ww", "-z"], page);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && said.is_empty(),
                "{}: {said}",
                page.display()
            );
        }
    }

    #[test]
    fn the_page_of_a_verb_says_what_its_help_says() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        let page = fs::read_to_string(directory.path().join("man/tapnat-forward-add.1")).unwrap();
        for expected in [
            ".TH tapnat-forward-add 1",
            "tapnat forward add",
            r"\-\-from",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
        let page = fs::read_to_string(directory.path().join("man/tapnat-run.1")).unwrap();
        assert!(page.contains("SIGTERM take everything away"), "{page}");
    }

    #[test]
    fn every_verb_and_every_argument_has_help() {
        let mut command = Cli::command();
        command.build();
        check_help(&command);
    }

    fn check_help(command: &Command) {
        let name = command.get_bin_name().unwrap_or(command.get_name());
        assert!(command.get_about().is_some(), "{name} has no help");
        for argument in command.get_arguments() {
            assert!(
                argument.get_help().is_some(),
                "{name}: {argument} has no help"
            );
        }
        command.get_subcommands().for_each(check_help);
    }

    #[test]
    fn shells_can_read_their_completions() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        let completions = directory.path().join("completions");
        for (shell, file) in [("bash", "tapnat.bash"), ("zsh", "_tapnat")] {
            let output = run(shell, &["-n"], &completions.join(file));
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && said.is_empty(),
                "{shell}: {said}"
            );
        }
        let fish = fs::read_to_string(completions.join("tapnat.fish")).unwrap();
        assert!(fish.contains("complete -c tapnat"), "{fish}");
    }

    /// What bash offers for a line whose last word is begun.
    fn complete(script: &Path, line: &[&str]) -> String {
        let words = line.join(" ");
        let ask = format!(
            "source {}; COMP_WORDS=({words}); COMP_CWORD={}; _tapnat tapnat '{}' '{}'; \
             echo \"${{COMPREPLY[*]}}\"",
            script.display(),
            line.len() - 1,
            line[line.len() - 1],
            line[line.len() - 2],
        );
        let output = std::process::Command::new("bash")
            .args(["-c", &ask])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    #[test]
    fn bash_completes_verbs_and_options() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        let script = directory.path().join("completions/tapnat.bash");
        assert_eq!(complete(&script, &["tapnat", "fl"]), "flows");
        assert_eq!(
            complete(&script, &["tapnat", "run", "--outside-"]),
            "--outside-address"
        );
    }
}
