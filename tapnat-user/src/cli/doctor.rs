//! `tapnat doctor`: what keeps guests from the world, and the way out.

use std::{ffi::OsString, fmt::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::{Format, Instance, file, print, run};
use crate::{
    doctor::{self, Finding, Level},
    progress::Progress,
    view::SCHEMA,
};

/// Ends with this when there is a problem.
const PROBLEM: u8 = 3;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,

    /// The configuration that the instance would be started with [default: as of `tapnat run`, if it
    /// is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Report<'a> {
    schema: u32,
    findings: &'a [Finding],
}

impl Arguments {
    pub async fn execute(self) -> Result<ExitCode> {
        let default = || Some(file::default_path(&self.instance.name)).filter(|it| it.exists());
        let path = self.config.clone().or_else(default);
        let typed = ["tapnat", "run"].map(OsString::from);
        let config = match &path {
            Some(path) => Some(run::read(&typed, Some(path))?.0),
            None => None,
        };
        let progress = Progress::waiting("looking at the host");
        let findings = doctor::examine(&self.instance.name, config.as_ref()).await?;
        drop(progress);
        if self.format.json {
            print::json(&Report {
                schema: SCHEMA,
                findings: &findings,
            })?;
        } else {
            print::text(&describe(&findings)?)?;
        }
        let is_ill = findings
            .iter()
            .any(|finding| finding.level == Level::Problem);
        Ok(if is_ill {
            ExitCode::from(PROBLEM)
        } else {
            ExitCode::SUCCESS
        })
    }
}

fn describe(findings: &[Finding]) -> Result<String> {
    let mut text = String::new();
    for finding in findings {
        writeln!(text, "{:<8} {}", finding.level.label(), finding.what)?;
        if let Some(why) = &finding.why {
            writeln!(text, "         why: {why}")?;
        }
        if let Some(way_out) = &finding.way_out {
            writeln!(text, "         way out: {way_out}")?;
        }
    }
    let count = |level, name: &str| {
        let count = findings.iter().filter(|it| it.level == level).count() as u64;
        format!("{count} {name}{}", print::plural(count))
    };
    writeln!(
        text,
        "{} looked at: {}, {}, {}",
        findings.len(),
        count(Level::Problem, "problem"),
        count(Level::Warning, "warning"),
        count(Level::Note, "note")
    )?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_counts_in_words() {
        let problem = Finding::new(Level::Problem, "uplink", "it is down", "nobody set it up");
        let ok = Finding::ok("kernel", "it has BTF");
        let last = |findings: &[Finding]| {
            describe(findings)
                .unwrap()
                .lines()
                .last()
                .unwrap()
                .to_owned()
        };
        assert_eq!(
            last(&[problem.clone(), ok]),
            "2 looked at: 1 problem, 0 warnings, 0 notes"
        );
        assert_eq!(
            last(&[problem.clone(), problem]),
            "2 looked at: 2 problems, 0 warnings, 0 notes"
        );
    }
}
