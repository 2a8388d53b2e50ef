//! The command line: what `tapnat` understands, one file for each verb. Reads arguments and prints
//! results; the work is done elsewhere.

mod check;
mod doctor;
mod down;
mod file;
mod flows;
mod forward;
mod guests;
mod map;
mod mappings;
mod metrics;
mod print;
mod qemu;
mod reload;
mod revalidate;
mod run;
mod static_address;
mod status;
mod top;
mod trace;
mod watch;
mod why;

use std::{
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};

use self::print::{Column, List};
use crate::{
    host::bpffs,
    instance::InstanceName,
    tables::{PinnedTables, Unusable},
};

/// NAT for virtual machines on tap devices, in eBPF.
///
/// Exit codes: 0 when all went well, 1 on a failure, 2 when the command line is wrong, 3 when `tapnat
/// doctor` found a problem or `tapnat why` that a packet would be dropped.
#[derive(Debug, Parser)]
#[command(name = "tapnat", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Translate packets until a signal comes, then take everything away
    Run(Box<run::Arguments>),
    /// Read the configuration file again, with no session lost
    Reload(reload::Arguments),
    /// Ask the host's firewall again about the sessions that are there
    Revalidate(revalidate::Arguments),
    /// Say what is wrong in a configuration file
    Check(check::Arguments),
    /// Say what keeps guests from the world, and the way out
    Doctor(doctor::Arguments),
    /// Show the sessions of an instance
    Flows(flows::Arguments),
    /// Show the mappings of inside to outside endpoints
    Mappings(mappings::Arguments),
    /// Show who is behind an instance
    Guests(guests::Arguments),
    /// Print what an instance does for Prometheus, or answer its scrapes
    Metrics(metrics::Arguments),
    /// Draw the network, with what passes now
    Map(map::Arguments),
    /// Show live what an instance does: guests, rates, sessions, drops
    Top(top::Arguments),
    /// Show what an instance does and how it fares
    Status(status::Arguments),
    /// Show what becomes of packets, one by one, as they come
    Trace(Box<trace::Arguments>),
    /// Say what would become of a packet, and why
    Why(why::Arguments),
    /// Lead ports of an outside address to guests
    Forward(forward::Arguments),
    /// Give guests outside addresses of their own
    Static(static_address::Arguments),
    /// For QEMU's `script=`: see to it that a guest's tap is served
    QemuIfup(qemu::Up),
    /// For QEMU's `downscript=`: end what was started for the last guest
    QemuIfdown(qemu::Down),
    /// End an instance and take everything away that it changed
    Down(down::Arguments),
}

/// Which instance is meant.
#[derive(Clone, Debug, Args)]
struct Instance {
    /// The instance's name
    #[arg(
        long = "instance",
        value_name = "NAME",
        default_value = "default",
        global = true
    )]
    name: InstanceName,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Args)]
struct Format {
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

/// The names by which QEMU may call tapnat itself, and the verbs that they stand for.
const SCRIPTS: [&str; 2] = ["qemu-ifup", "qemu-ifdown"];

/// The command line of a process that was called by one of these names, with its verb.
#[must_use]
pub fn with_verb(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments
        .first()
        .and_then(|path| Path::new(path).file_name());
    let verb = SCRIPTS
        .iter()
        .find(|script| name == Some(OsStr::new(script)));
    if let Some(verb) = verb {
        arguments.insert(1, OsString::from(verb));
    }
    arguments
}

/// Which instance is shown, and how.
#[derive(Clone, Debug, Args)]
struct Shown {
    #[command(flatten)]
    instance: Instance,
    #[command(flatten)]
    format: Format,
}

impl Shown {
    fn tables(&self) -> Result<PinnedTables> {
        self.instance.tables()
    }

    /// Begins a list of what is shown.
    fn list<'a>(&self, columns: &'a [Column]) -> Result<List<'a>> {
        List::begin(self.format.json, columns)
    }
}

impl Cli {
    /// Does what was asked. Returns the exit code of a success.
    ///
    /// # Errors
    ///
    /// With a sentence that says what went wrong, why, and the way out.
    pub async fn execute(self) -> Result<ExitCode> {
        let mut code = ExitCode::SUCCESS;
        let result = match self.command {
            Command::Doctor(arguments) => arguments.execute().await.map(|it| code = it),
            Command::Why(arguments) => arguments.execute().await.map(|it| code = it),
            Command::Run(arguments) => arguments.execute().await,
            Command::Reload(arguments) => arguments.execute().await,
            Command::Revalidate(arguments) => arguments.execute(),
            Command::Check(arguments) => arguments.execute(),
            Command::Flows(arguments) => arguments.execute(),
            Command::Mappings(arguments) => arguments.execute(),
            Command::Guests(arguments) => arguments.execute(),
            Command::Metrics(arguments) => arguments.execute(),
            Command::Map(arguments) => arguments.execute(),
            Command::Top(arguments) => arguments.execute(),
            Command::Status(arguments) => arguments.execute(),
            Command::Trace(arguments) => arguments.execute().await,
            Command::Forward(arguments) => arguments.execute().await,
            Command::Static(arguments) => arguments.execute().await,
            Command::QemuIfup(arguments) => arguments.execute().await,
            Command::QemuIfdown(arguments) => arguments.execute().await,
            Command::Down(arguments) => arguments.execute().await,
        };
        match result {
            // Whoever read our output has seen enough.
            Err(error) if is_broken_pipe(&error) => Ok(code),
            result => result.map(|()| code),
        }
    }
}

/// What is wrong and what may have been meant, without the usage, which `--help` shows.
#[must_use]
pub fn on_one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let paragraphs = text
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|paragraph| {
            !paragraph.starts_with("Usage:") && !paragraph.starts_with("For more information")
        })
        .collect::<Vec<_>>()
        .join("; ");
    paragraphs
        .strip_prefix("error: ")
        .unwrap_or(&paragraphs)
        .to_owned()
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

impl Instance {
    /// Opens the instance's pinned tables.
    fn tables(&self) -> Result<PinnedTables> {
        self.tables_and_pins().map(|(tables, _)| tables)
    }

    /// The same, and the directory of the instance's pins.
    fn tables_and_pins(&self) -> Result<(PinnedTables, PathBuf)> {
        let Some(root) = bpffs::find() else {
            bail!(
                "there is no tapnat instance '{}': no BPF file system is mounted, so there is none \
                 at all; start one with `tapnat run`",
                self.name
            );
        };
        let pins = self.name.pin_directory(&root);
        let directory = pins.join("maps");
        match PinnedTables::open(&directory) {
            Ok(tables) => Ok((tables, pins)),
            Err(Unusable::Missing) => {
                let others = InstanceName::all_pinned(&root)
                    .context("cannot look for instances: run as root")?;
                let way_out = if others.is_empty() {
                    "start it with `tapnat run`".to_owned()
                } else {
                    let names: Vec<_> = others.iter().map(InstanceName::as_str).collect();
                    format!("pass --instance with one of {}", names.join(", "))
                };
                bail!("there is no tapnat instance '{}': {way_out}", self.name)
            }
            Err(reason) => Err(reason.explain(&self.name, &directory)),
        }
    }
}
