//! What can be checked of the Markdown documents without reading them: that links within the
//! repository lead somewhere, and that `cargo xtask` takes the commands they name. Part of
//! `cargo xtask lint`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use pulldown_cmark::{Event, Parser, Tag};

use crate::Cli;
use crate::command::workspace;

/// Checks all documents of the workspace.
///
/// # Errors
/// When there is a mistake; all of them are then on standard error, one a line.
pub fn check() -> Result<()> {
    let mut paths = Vec::new();
    find_documents(workspace(), &mut paths)?;
    let mut mistakes = 0;
    for path in paths {
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let directory = path.parent().unwrap_or(workspace());
        let name = path.strip_prefix(workspace()).unwrap_or(&path);
        for mistake in find_mistakes(&text, directory) {
            eprintln!("{}: {mistake}", name.display());
            mistakes += 1;
        }
    }
    ensure!(
        mistakes == 0,
        "{mistakes} of what the documents say does not hold"
    );
    Ok(())
}

/// Adds the Markdown files under a directory, but for build products and hidden directories.
fn find_documents(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type()?.is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                find_documents(&path, found)?;
            }
        } else if path.extension().is_some_and(|end| end == "md") {
            found.push(path);
        }
    }
    Ok(())
}

fn find_mistakes(text: &str, directory: &Path) -> Vec<String> {
    let mut mistakes = Vec::new();
    let mut in_code = false;
    for event in Parser::new(text) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. })
                if !leads_somewhere(&dest_url, directory) =>
            {
                mistakes.push(format!("the link to {dest_url} leads nowhere"));
            }
            Event::Start(Tag::CodeBlock(_)) => in_code = true,
            Event::End(_) => in_code = false,
            Event::Code(code) => mistakes.extend(find_bad_command(&code)),
            Event::Text(code) if in_code => {
                mistakes.extend(code.lines().filter_map(find_bad_command));
            }
            _ => {}
        }
    }
    mistakes
}

/// Links to other sites are taken on trust.
fn leads_somewhere(link: &str, directory: &Path) -> bool {
    let path = link.split('#').next().unwrap_or_default();
    path.contains(':') || directory.join(path).exists()
}

/// What is wrong with a line of code if it is a `cargo xtask` command.
fn find_bad_command(line: &str) -> Option<String> {
    let line = line
        .trim()
        .trim_start_matches("$ ")
        .trim_start_matches("sudo ");
    let arguments = line.strip_prefix("cargo xtask")?;
    let arguments = arguments.split(" #").next()?.trim();
    let stands_for_several = arguments.contains(['[', '<', '|', '…']) || arguments.contains("..");
    if arguments.is_empty() || stands_for_several {
        return None;
    }
    let words = ["cargo xtask"]
        .into_iter()
        .chain(arguments.split_whitespace());
    let error = Cli::try_parse_from(words).err()?;
    let is_mistake = error.use_stderr();
    is_mistake.then(|| format!("`{line}` is refused: {}", first_line(&error.to_string())))
}

fn first_line(text: &str) -> &str {
    text.lines()
        .next()
        .unwrap_or_default()
        .trim_start_matches("error: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(text: &str) -> Vec<String> {
        find_mistakes(text, Path::new(env!("CARGO_MANIFEST_DIR")))
    }

    #[test]
    fn true_documents_pass() {
        let text = "See [the manifest](Cargo.toml), [the source](src/main.rs#L1), [below](#here),\n\
                    [Rust](https://rust-lang.org), `cargo xtask build [--release]`,\n\
                    `cargo xtask build --release` and `cargo xtask`.\n\n\
                    ```sh\n$ cargo xtask test unit   # no root needed\ncargo xtask --help\n```\n";
        assert_eq!(mistakes(text), [""; 0]);
    }

    #[test]
    fn dead_links_are_found() {
        assert_eq!(
            mistakes("[gone](docs/gone.md) ![picture](gone.svg)"),
            [
                "the link to docs/gone.md leads nowhere",
                "the link to gone.svg leads nowhere"
            ]
        );
    }

    #[test]
    fn commands_that_do_not_exist_are_found() {
        let found = mistakes("Say `cargo xtask fly` or\n\n    cargo xtask build --slowly\n");
        assert_eq!(
            found,
            [
                "`cargo xtask fly` is refused: unrecognized subcommand 'fly'",
                "`cargo xtask build --slowly` is refused: unexpected argument '--slowly' found",
            ]
        );
    }
}
