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
mod saved;
mod static_address;
mod static_mappings;
mod status;
mod top;
mod trace;
mod watch;
mod who;
mod why;

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};

use self::print::{Column, List};
use crate::{
    control::{self, Request},
    host::bpffs,
    instance::{Holder, InstanceName, Lock},
    notice::tell,
    tables::{BothTables, Unusable},
    view::protocol_number,
};

/// NAT for virtual machines on tap devices, in eBPF.
///
/// Exit codes: 0 when all went well, 1 on a failure, 2 when the command line is wrong, 3 when `tapnat
/// doctor` found a problem, `tapnat why` that a packet would be dropped, or
/// `tapnat who` that nobody had an endpoint.
#[derive(Debug, Parser)]
#[command(name = "tapnat", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What a verb's help says stands here: clap leaves out what its arguments' type says of itself.
#[derive(Debug, Subcommand)]
enum Command {
    /// Translate packets until a signal comes, then take everything away
    ///
    /// Stays in the foreground. Prints a line that begins `tapnat ready` when packets are translated,
    /// and tells the service manager. SIGINT and SIGTERM take everything away and restore what was
    /// changed. SIGHUP has the configuration file read again, as `tapnat reload` does. After SIGKILL
    /// packets go on being translated, the next `tapnat run` takes over, and `tapnat down` takes
    /// everything away.
    Run(Box<run::Arguments>),
    /// Read the configuration file again, with no session lost
    ///
    /// Applies what has changed in the file, with no session lost; or, if something in it is wrong or
    /// needs a restart, nothing, and says why. SIGHUP does the same.
    Reload(reload::Arguments),
    /// Ask the host's firewall again about the sessions that are there
    ///
    /// For when its rules have changed: sessions that it does not let through any more end.
    Revalidate(revalidate::Arguments),
    /// Say what is wrong in a configuration file
    ///
    /// Reads the file as `tapnat run --config` would and refuses what is wrong in it, without looking at
    /// the host and without root.
    Check(check::Arguments),
    /// Say what keeps guests from the world, and the way out
    ///
    /// Looks at the kernel, the uplink, the firewall, networks, MTUs and offloads, at what instances left,
    /// and around an instance that translates; changes nothing. Ends with 0 when no problem was found
    /// (there may be warnings and notes), with 3 when there is one, and with 1 when it could not look.
    ///
    /// The JSON is an object with the version of all of tapnat's JSON in `schema` and the array
    /// `findings`, gravest first: `level` (`problem`, `warning`, `note` or `ok`), `topic`, `what`, and
    /// `why` and `way_out`, which are null where there is nothing to say.
    Doctor(doctor::Arguments),
    /// Show the sessions of an instance
    ///
    /// With `tapnat run --count`, packets and bytes are shown as OUTBOUND/INBOUND. On a terminal, columns
    /// at the right that do not fit are left out (what sessions are sorted by is not at the right);
    /// `tapnat flows | cat` has them all.
    ///
    /// Conditions of one kind are alternatives (`--protocol tcp,icmp`), those of different kinds must all
    /// hold. The tables know when a session's last packet came, not when it began: that is what
    /// `--older` and `--newer` go by.
    ///
    /// The JSON is an array of objects: `protocol`, `inside`, `outside` and `remote` (each an `address`
    /// and a `port`), `state`, `idle_seconds`, `expires_in_seconds`, and with `tapnat run --count`
    /// `packets` and `bytes` (each `outbound` and `inbound`). With `--by`: `group`, `sessions`, and these.
    Flows(flows::Arguments),
    /// Show the mappings of inside to outside endpoints
    ///
    /// The JSON is an array of objects: `protocol`, `inside` and `outside` (each an `address` and a
    /// `port`), `kind`, `sessions` and `expires_in_seconds`, which is null for a static mapping.
    Mappings(mappings::Arguments),
    /// Show who is behind an instance
    ///
    /// Guests that sent something to the world since the instance began and were not forgotten for want
    /// of room. PORTS are the outside ports that it holds, those that rest among them. The LIMIT after
    /// each is the most that it may have. REFUSED counts new sessions that were over one of these limits,
    /// or over the one on new sessions in a second. With `tapnat run --count`, packets and bytes of the
    /// sessions that there are stand there as OUTBOUND/INBOUND.
    ///
    /// The JSON is an array of objects: `address`, `device`, `link_address`, `sessions`, `ports`,
    /// `refused`, `max_sessions`, `max_ports`, `max_new_sessions`, and `packets` and `bytes` where they are counted.
    Guests(guests::Arguments),
    /// Print what an instance does for Prometheus, or answer its scrapes
    ///
    /// Prints the metrics once, in the `OpenMetrics` text format; or answers scrapers until it is killed.
    /// Works without the process of `tapnat run`, and changes nothing.
    Metrics(metrics::Arguments),
    /// Draw the network, with what passes now
    ///
    /// Guests, their devices, tapnat, the uplink and the world, with what passes in a second, and below
    /// the ports and addresses that lead to guests. Works without the process of `tapnat run`, and
    /// changes nothing. Rates of guests and remotes need `tapnat run --count`.
    ///
    /// The JSON is one object with the version of all of tapnat's JSON in `schema`.
    Map(map::Arguments),
    /// Show live what an instance does: guests, rates, sessions, drops
    ///
    /// Guests, rates, the busiest sessions, what is dropped and why, and ports in use. Works without the
    /// process of `tapnat run`, and changes nothing. Rates of guests and sessions need `tapnat run
    /// --count`; those of devices are the kernel's, with the host's own traffic.
    ///
    /// Keys: q, Esc or Ctrl-C ends; Tab goes to the next list, which gets the room; the arrows, page keys
    /// and Home scroll it; s sorts the guests by something else; p or Space holds the view; + and - change how
    /// often it is drawn; h shows the keys.
    ///
    /// The JSON is one object with the version of all of tapnat's JSON in `schema`, of two looks.
    Top(top::Arguments),
    /// Show what an instance does and how it fares
    ///
    /// The JSON is one object with the version of all of tapnat's JSON in `schema`.
    Status(status::Arguments),
    /// Show what becomes of packets, one by one, as they come
    ///
    /// Where they arrived, for which reason they left, their headers before and after. Ends by Ctrl-C, or by itself after `--count` packets or `--seconds`.
    ///
    /// Filters work in the kernel; several of them must all hold, and one of an address or port holds if
    /// it is that of either end, before or after. Nothing of the instance is changed, and it is as quick
    /// as ever when the trace is over, however that ends. While it lasts each packet costs some hundreds
    /// of nanoseconds more. What comes faster than it can be shown is counted at the end.
    ///
    /// The JSON is one object a line: `schema`, `time`, `device`, `role`, `reason`, `outcome`, and the
    /// headers `before` and `after` (null if it did not leave, or went to the host as it was).
    Trace(Box<trace::Arguments>),
    /// Say what would become of a packet, and why
    ///
    /// Decides about a packet that is not sent, by the datapath's own rules, over the tables as they are
    /// now; and says what became of packets so far, by reason. Changes nothing, and sends nothing.
    ///
    /// With `--to`, the packet is the first of a flow from the guest: for TCP a SYN, without a port a
    /// ping. With `--from`, it comes from the world. Ends with 0 when it would get through or go to the
    /// host, with 3 when it would be dropped, and with 1 when that cannot be told.
    Why(why::Arguments),
    /// Say whose an outside endpoint was, by the NAT log
    ///
    /// Looks into the NAT log (`tapnat run --nat-log`) for the guest that had an outside endpoint at a
    /// time. Ends with 0 when one is found, with 3 when nobody had it, and with 1 when the log cannot
    /// tell.
    Who(who::Arguments),
    /// Lead ports of an outside address to guests
    ///
    /// A forward works from the world, from guests, and from the host itself, over the outside address;
    /// `localhost` is not led anywhere.
    ///
    /// It stays until it is removed or the instance is taken down; `tapnat run --config` has a place for
    /// those that are always to be there.
    Forward(forward::Arguments),
    /// Give guests outside addresses of their own
    ///
    /// Packets to the outside address go to the guest, whatever their protocol and port, and those of the
    /// guest go out with it. The address must not be one that other guests are translated to. The
    /// address is put on the uplink if no device has it; one of a network that is not the uplink's has to
    /// be routed here.
    Static(static_address::Arguments),
    /// For QEMU's `script=`: see to it that a guest's tap is served
    ///
    /// Joins the instance if it runs. Else starts one in the background, with its configuration file
    /// (/etc/tapnat/tapnat.toml) if there is one, and waits until the tap is served. Called as
    /// `qemu-ifup` tapnat does this, too: link /usr/bin/tapnat there.
    QemuIfup(qemu::Up),
    /// For QEMU's `downscript=`: end what was started for the last guest
    ///
    /// An instance that `qemu-ifup` started ends with its last tap; any other one goes on.
    QemuIfdown(qemu::Down),
    /// End an instance and take everything away that it changed
    ///
    /// Works whether the instance's process runs, was killed, or never finished its start. An instance
    /// that does not exist is no failure.
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
    fn tables(&self) -> Result<BothTables> {
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
            Command::Who(arguments) => arguments.execute().map(|it| code = it),
            Command::Run(arguments) => arguments.execute().await,
            Command::Reload(arguments) => arguments.execute().await,
            Command::Revalidate(arguments) => arguments.execute(),
            Command::Check(arguments) => arguments.execute(),
            Command::Flows(arguments) => arguments.execute(),
            Command::Mappings(arguments) => arguments.execute(),
            Command::Guests(arguments) => arguments.execute(),
            Command::Metrics(arguments) => arguments.execute().await,
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

/// A protocol, by the name that it has in what is shown, or by its number.
fn read_protocol(text: &str) -> Result<u8> {
    protocol_number(text).with_context(|| {
        format!("'{text}' is no protocol: write tcp, udp, icmp, icmpv6 or a number")
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

impl Instance {
    /// Has the instance change something, and says what it says.
    async fn change(&self, request: &Request) -> Result<()> {
        for note in control::ask(&self.name, request, || self.tables()).await? {
            tell(&note);
        }
        Ok(())
    }

    /// Opens the instance's pinned tables.
    fn tables(&self) -> Result<BothTables> {
        self.tables_and_pins().map(|(tables, _)| tables)
    }

    /// Refuses if a process has the instance, though its tables are not here.
    fn check_not_elsewhere(&self) -> Result<()> {
        let Some(Holder(Some(process))) = Lock::holder(&self.name) else {
            return Ok(());
        };
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        let both = namespace("self").zip(namespace(&process.to_string()));
        ensure!(
            both.is_none_or(|(ours, theirs)| ours == theirs),
            "the tapnat instance '{}' has its tables in the mount namespace of its process {process}: \
             ask there (`nsenter --mount --net --target {process} tapnat ..`)",
            self.name
        );
        Ok(())
    }

    /// The same, and the directory of the instance's pins.
    fn tables_and_pins(&self) -> Result<(BothTables, PathBuf)> {
        let Some(root) = bpffs::find() else {
            self.check_not_elsewhere()?;
            bail!(
                "there is no tapnat instance '{}': no BPF file system is mounted, so there is none \
                 at all; start one with `tapnat run`",
                self.name
            );
        };
        let pins = self.name.pin_directory(&root);
        let directory = pins.join("maps");
        match BothTables::open(&directory) {
            Ok(tables) => Ok((tables, pins)),
            Err(Unusable::Missing) => {
                self.check_not_elsewhere()?;
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
