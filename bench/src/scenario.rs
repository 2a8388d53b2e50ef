//! What is measured, one file each.

mod established;
mod gso;
mod latency;
mod memory;
mod new_flows;
mod program;
mod scaling;
mod startup;
mod xdp;

use anyhow::Result;
use clap::ValueEnum;

use crate::{
    contender::{Contender, Stand},
    report::{Comparison, Contestant, Report},
    rounds::Effort,
    statistics::Better,
};

/// One question that is answered by measuring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Time that a packet of an established flow takes
    Established,
    /// Time that the first packet of a flow takes
    NewFlows,
    /// Bulk transfer through a tap: 64 KiB packets, and iperf3
    Gso,
    /// Memory that a flow takes
    Memory,
    /// Time from a question to its answer
    Latency,
    /// Time to start, to take over after a crash, to show a million flows
    Startup,
    /// Time in tapnat's own programs, and their size
    Program,
    /// Time that a packet takes when it arrives at a driver with XDP
    Xdp,
    /// Rate with a thousand to a million flows, on one processor and on two
    Scaling,
}

impl Scenario {
    pub const ALL: &[Self] = &[
        Self::Established,
        Self::NewFlows,
        Self::Gso,
        Self::Memory,
        Self::Latency,
        Self::Startup,
        Self::Program,
        Self::Xdp,
        Self::Scaling,
    ];

    /// Measures, and prints what came out. Only cases whose title contains `case`.
    ///
    /// # Errors
    ///
    /// When a contender does not do its work.
    pub fn run(self, effort: Effort, case: &str) -> Result<Report> {
        let (name, run): (_, fn(&mut Run<'_>) -> Result<()>) = match self {
            Self::Established => ("established", established::run),
            Self::NewFlows => ("new-flows", new_flows::run),
            Self::Gso => ("gso", gso::run),
            Self::Memory => ("memory", memory::run),
            Self::Latency => ("latency", latency::run),
            Self::Startup => ("startup", startup::run),
            Self::Program => ("program", program::run),
            Self::Xdp => ("xdp", xdp::run),
            Self::Scaling => ("scaling", scaling::run),
        };
        let mut report = Report::begin(name, effort.quick)?;
        run(&mut Run {
            effort,
            case,
            report: &mut report,
        })?;
        Ok(report)
    }
}

/// One run of a scenario.
struct Run<'a> {
    effort: Effort,
    case: &'a str,
    report: &'a mut Report,
}

impl Run<'_> {
    /// Whether a case of this title was asked for.
    fn wants(&self, title: &str) -> bool {
        title.contains(self.case)
    }
}

/// Puts names to the values of all rounds.
fn contestants(
    names: impl IntoIterator<Item = String>,
    rounds: Vec<Vec<Vec<f64>>>,
) -> Vec<Contestant> {
    names
        .into_iter()
        .zip(rounds)
        .map(|(name, rounds)| Contestant { name, rounds })
        .collect()
}

/// Nanoseconds a packet, of stands.
fn comparison(
    title: String,
    stands: &[Stand],
    series: Vec<&'static str>,
    rounds: Vec<Vec<Vec<f64>>>,
    references: &[Contender],
    control: Option<[&str; 2]>,
) -> Comparison {
    let contenders: Vec<_> = stands.iter().map(|stand| stand.contender).collect();
    let names = contenders.iter().map(ToString::to_string);
    Comparison {
        title,
        unit: "ns a packet",
        better: Better::Lower,
        series,
        contenders: contestants(names, rounds),
        references: reference_names(&contenders, references),
        control: control.map(|names| names.map(str::to_owned)),
    }
}

/// Those of the `references` that are there, and another build of tapnat if it is.
fn reference_names(contenders: &[Contender], references: &[Contender]) -> Vec<String> {
    references
        .iter()
        .chain(&[Contender::OtherBuild])
        .filter(|it| contenders.contains(it))
        .map(ToString::to_string)
        .collect()
}
