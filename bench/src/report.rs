//! What a scenario found: on the terminal, as JSON and as a drawing. Measures nothing.

mod plot;

use std::{fs, path::Path, thread, time::SystemTime};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;
use tapnat_testbed::process::Command;

use crate::statistics::{Better, Ratio, median, quantile};

/// Two measurements of the same thing may differ by so much, or the machine was too noisy.
const TOLERANCE: f64 = 0.05;
/// Length of the longest bar on the terminal, in characters.
const BAR: f64 = 40.0;

/// Contenders measured in rounds.
#[derive(Debug, Serialize)]
pub struct Comparison {
    pub title: String,
    /// Of every figure.
    pub unit: &'static str,
    pub better: Better,
    /// Columns of figures; the last one decides.
    pub series: Vec<&'static str>,
    pub contenders: Vec<Contestant>,
    /// Names of those that the others are compared with.
    pub references: Vec<String>,
    /// Names of the two that do the same.
    pub control: Option<[String; 2]>,
}

/// One contender's figures.
#[derive(Debug, Serialize)]
pub struct Contestant {
    pub name: String,
    /// For each of [`Comparison::series`], one figure a round.
    pub rounds: Vec<Vec<f64>>,
}

impl Contestant {
    /// The figures that decide.
    fn decisive(&self) -> &[f64] {
        self.rounds.last().map_or(&[], Vec::as_slice)
    }
}

/// A contender's figures compared with another's, as JSON holds it.
#[derive(Debug, Serialize)]
struct Verdict<'a> {
    contender: &'a str,
    to: &'a str,
    #[serde(flatten)]
    ratio: Ratio,
}

impl Comparison {
    fn find(&self, name: &str) -> Option<&Contestant> {
        self.contenders.iter().find(|it| it.name == name)
    }

    fn ratio(&self, one: &Contestant, other: &str) -> Option<Ratio> {
        let other = self.find(other)?;
        Some(Ratio::new(one.decisive(), other.decisive(), self.better))
    }

    fn verdicts(&self) -> Vec<Verdict<'_>> {
        let mut verdicts = Vec::new();
        for one in &self.contenders {
            for to in &self.references {
                if let Some(ratio) = self.ratio(one, to) {
                    verdicts.push(Verdict {
                        contender: &one.name,
                        to,
                        ratio,
                    });
                }
            }
        }
        verdicts
    }

    /// What differs between the two that do the same, if it is too much.
    fn noise(&self) -> Option<String> {
        let [one, other] = self.control.as_ref()?;
        let ratio = self.ratio(self.find(one)?, other)?;
        let off = (ratio.of_best - 1.0).abs().max((ratio.median - 1.0).abs());
        (off > TOLERANCE).then(|| {
            format!(
                "{}: noisy: {one} and {other} do the same and differ by {:.0}% (best {:.3}, median \
                 {:.3}): take this with caution",
                self.title,
                off * 100.0,
                ratio.of_best,
                ratio.median
            )
        })
    }

    fn print(&self) {
        let best = match self.better {
            Better::Lower => "lowest",
            Better::Higher => "highest",
        };
        println!("\n{} ({}; the {best} of all rounds)", self.title, self.unit);
        let mut header = vec![String::new()];
        header.extend(self.series.iter().map(ToString::to_string));
        for name in &self.references {
            header.push(format!("to {name}"));
            header.push("median (quarters) of rounds".to_owned());
        }
        let rows = self.contenders.iter().map(|one| {
            let mut row = vec![one.name.clone()];
            for rounds in &one.rounds {
                row.push(figure(self.better.best(rounds)));
            }
            for name in &self.references {
                match self.ratio(one, name) {
                    Some(ratio) => {
                        let [low, high] = ratio.spread;
                        row.push(format!("{:.3}", ratio.of_best));
                        row.push(format!("{:.3} ({low:.3} {high:.3})", ratio.median));
                    }
                    None => row.extend([String::new(), String::new()]),
                }
            }
            row
        });
        print_table(&header, rows);
        let bests: Vec<_> = self
            .contenders
            .iter()
            .map(|one| self.better.best(one.decisive()))
            .collect();
        let longest = bests.iter().copied().fold(0.0, f64::max);
        for (one, best) in self.contenders.iter().zip(bests) {
            let length = (best / longest * BAR).round() as usize;
            println!("{:>24} {} {}", one.name, "█".repeat(length), figure(best));
        }
        if let Some(noise) = self.noise() {
            println!("{noise}");
        }
    }
}

/// Facts that are not measured in rounds.
#[derive(Debug, Serialize)]
pub struct Facts {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
    pub remark: Option<String>,
}

impl Facts {
    fn print(&self) {
        println!("\n{}", self.title);
        print_table(&self.columns, self.rows.iter().cloned());
        if let Some(remark) = &self.remark {
            println!("{remark}");
        }
    }
}

/// Everything a scenario found.
#[derive(Debug, Serialize)]
pub struct Report {
    pub scenario: &'static str,
    taken_at: String,
    commit: Option<String>,
    kernel: String,
    processor: String,
    processors: usize,
    /// Of one minute, at the beginning: what else the machine was doing.
    load: String,
    /// Few, short rounds.
    quick: bool,
    comparisons: Vec<Comparison>,
    facts: Vec<Facts>,
}

impl Report {
    /// Notes the conditions.
    ///
    /// # Errors
    ///
    /// When the kernel does not tell them.
    pub fn begin(scenario: &'static str, quick: bool) -> Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
        let processor = read("/proc/cpuinfo")?
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned());
        let load = read("/proc/loadavg")?;
        let report = Self {
            scenario,
            taken_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            commit: Command::new("git")
                .args(["describe", "--always", "--dirty"])
                .run()
                .ok()
                .map(|text| text.trim().to_owned()),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor,
            processors: thread::available_parallelism().map_or(0, Into::into),
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            quick,
            comparisons: Vec::new(),
            facts: Vec::new(),
        };
        println!(
            "\n== {scenario}: {}, {} x {}, Linux {}, load {}{} ==",
            report.taken_at,
            report.processors,
            report.processor,
            report.kernel,
            report.load,
            if quick { ", quick" } else { "" }
        );
        Ok(report)
    }

    /// Prints and keeps a comparison.
    pub fn compare(&mut self, comparison: Comparison) {
        comparison.print();
        self.comparisons.push(comparison);
    }

    /// Prints and keeps facts.
    pub fn state(&mut self, facts: Facts) {
        facts.print();
        self.facts.push(facts);
    }

    /// Writes the JSON and, of comparisons, the drawing.
    ///
    /// # Errors
    ///
    /// When the directory cannot be written.
    pub fn finish(&self, directory: &Path) -> Result<()> {
        #[derive(Serialize)]
        struct Whole<'a> {
            #[serde(flatten)]
            report: &'a Report,
            ratios: Vec<Vec<Verdict<'a>>>,
            noise: Vec<String>,
        }
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let whole = Whole {
            report: self,
            ratios: self.comparisons.iter().map(Comparison::verdicts).collect(),
            noise: self
                .comparisons
                .iter()
                .filter_map(Comparison::noise)
                .collect(),
        };
        let path = directory.join(format!("{}.json", self.scenario));
        fs::write(&path, serde_json::to_string_pretty(&whole)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("\nwritten: {}", path.display());
        if !self.comparisons.is_empty() {
            let path = directory.join(format!("{}.svg", self.scenario));
            plot::draw(&self.comparisons, &path)
                .with_context(|| format!("cannot draw {}", path.display()))?;
            println!("written: {}", path.display());
        }
        Ok(())
    }
}

/// The quarter points and the middle of what decides.
fn quarters(one: &Contestant) -> [f64; 3] {
    let values = one.decisive();
    [
        quantile(values, 0.25),
        median(values),
        quantile(values, 0.75),
    ]
}

/// With as many digits as mean something.
#[must_use]
pub fn figure(value: f64) -> String {
    if value.abs() >= 1000.0 {
        format!("{value:.0}")
    } else if value.abs() >= 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

fn print_table(header: &[String], rows: impl Iterator<Item = Vec<String>>) {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
}
