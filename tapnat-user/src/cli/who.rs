//! `tapnat who`: whose an outside endpoint was.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, BufReader, Read},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use jiff::{Timestamp, Zoned, tz::TimeZone};
use serde::Serialize;

use super::{Format, Instance, print, read_protocol};
use crate::{
    nat_log::{
        IDENTIFIER,
        history::{Answer, Question, parse_time, search},
    },
    progress::Progress,
    view::{Protocol, SCHEMA},
};

const READING: &str = "reading the log";
/// Ends with this when the log is sure that nobody had it.
const NOBODY: u8 = 3;

#[derive(Debug, Args)]
pub struct Arguments {
    /// The outside endpoint, as the world saw it
    #[arg(value_name = "ADDRESS:PORT", value_parser = parse_endpoint)]
    outside: SocketAddr,

    /// When: 14:02, '2026-11-23 14:02:11', '10m ago', or by RFC 3339
    #[arg(long, value_name = "TIME", default_value = "now", value_parser = parse_at)]
    at: At,

    /// Only of this protocol
    #[arg(long, visible_alias = "protocol", value_name = "PROTOCOL", value_parser = read_protocol)]
    proto: Option<u8>,

    /// The log, or - for the standard input; can be repeated, the oldest first [default: that of the
    /// instance, and the one rotated before it (.1)]
    #[arg(long, value_name = "FILE")]
    log: Vec<PathBuf>,

    #[command(flatten)]
    instance: Instance,

    #[command(flatten)]
    format: Format,
}

fn parse_endpoint(text: &str) -> Result<SocketAddr> {
    const EXAMPLES: &str = "write 203.0.113.5:41234 or [2001:db8::5]:41234";
    if let Ok(endpoint) = text.parse() {
        return Ok(endpoint);
    }
    if text.parse::<IpAddr>().is_ok() {
        bail!("'{text}' has no port: {EXAMPLES}");
    }
    let (address, port) = text
        .rsplit_once(':')
        .with_context(|| format!("'{text}' has no port: {EXAMPLES}"))?;
    let bare = address.trim_start_matches('[').trim_end_matches(']');
    if bare.parse::<IpAddr>().is_err() {
        bail!("'{address}' is not an address: {EXAMPLES}");
    }
    if port.parse::<u16>().is_err() {
        bail!("'{port}' is not a port");
    }
    bail!("'{text}' lacks its brackets: {EXAMPLES}")
}

/// From the first to the last moment that is meant.
#[derive(Clone, Copy, Debug)]
struct At {
    from: Timestamp,
    until: Timestamp,
}

fn parse_at(text: &str) -> Result<At> {
    let now = Zoned::now();
    let (from, until) = parse_time(text, &now)?;
    ensure!(
        from <= now.timestamp(),
        "{text} is not over yet: name a time in the past"
    );
    Ok(At { from, until })
}

#[derive(Serialize)]
struct Report<'a> {
    schema: u32,
    #[serde(flatten)]
    answer: &'a Answer,
}

impl Arguments {
    pub fn execute(self) -> Result<ExitCode> {
        let now = Zoned::now();
        let At { from, until } = self.at;
        let question = Question {
            address: self.outside.ip(),
            port: Some(self.outside.port()),
            protocol: self.proto.map(|number| Protocol(number).to_string()),
            from,
            until,
        };
        let answer = self.search(&question)?;
        if self.format.json {
            print::json(&Report {
                schema: SCHEMA,
                answer: &answer,
            })?;
        } else {
            print::text(&describe(&answer, now.time_zone())?)?;
        }
        if !answer.owners.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        if answer.is_complete {
            return Ok(ExitCode::from(NOBODY));
        }
        let reach = answer.first.zip(answer.last);
        let Some((first, last)) = reach else {
            bail!("there is no line of a NAT log, so it cannot tell");
        };
        bail!(
            "the log cannot tell: it reaches from {} to {}, and records may be missing",
            local(first, now.time_zone()),
            local(last, now.time_zone())
        )
    }

    /// Looks at all of the log, one file after the other.
    fn search(&self, question: &Question) -> Result<Answer> {
        let mut paths = self.log.clone();
        if paths.is_empty() {
            let Some(path) = self.default_log()? else {
                let progress = Progress::reading(READING, None);
                return search(BufReader::new(progress.wrap(journal()?)), question);
            };
            let rotated = PathBuf::from(format!("{}.1", path.display()));
            paths = [rotated, path]
                .into_iter()
                .filter(|it| it.exists())
                .collect();
        }
        let length = |path: &PathBuf| {
            let it = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
            Some(it.len())
        };
        let progress = Progress::reading(READING, paths.iter().map(length).sum());
        let mut all: Box<dyn Read> = Box::new(io::empty());
        for path in paths {
            let next: Box<dyn Read> = if path == Path::new("-") {
                Box::new(io::stdin())
            } else {
                let file = File::open(&path);
                Box::new(file.with_context(|| format!("cannot read {}", path.display()))?)
            };
            all = Box::new(all.chain(next));
        }
        search(BufReader::new(progress.wrap(all)), question)
    }

    /// The file that the instance writes; none if it writes to systemd's journal.
    fn default_log(&self) -> Result<Option<PathBuf>> {
        let name = &self.instance.name;
        match fs::read_to_string(name.nat_log_note()) {
            Ok(target) if target == "journald" => Ok(None),
            Ok(target) if target != "-" => Ok(Some(target.into())),
            Ok(_) => bail!("the log goes to the standard output of `tapnat run`: pass --log FILE"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
                "the instance '{name}' writes no NAT log: start it with --nat-log FILE, or name one \
                 (--log FILE)"
            ),
            Err(error) => Err(error).context("cannot tell where the log is: run as root"),
        }
    }
}

/// All that systemd's journal has of NAT logs. Its reader is the one that knows where it is.
fn journal() -> Result<impl Read> {
    let arguments = ["--quiet", "--no-pager", "--output=cat", "--identifier"];
    let child = Command::new("journalctl")
        .args(arguments)
        .arg(IDENTIFIER)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("the log is in systemd's journal, and journalctl cannot be started")?;
    child.stdout.context("journalctl has no output")
}

fn local(time: Timestamp, zone: &TimeZone) -> String {
    let time = time.to_zoned(zone.clone());
    time.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn describe(answer: &Answer, zone: &TimeZone) -> Result<String> {
    let mut text = String::new();
    for owner in &answer.owners {
        let since = match owner.since {
            Some(since) => format!("from {}", local(since, zone)),
            None => "from before the log begins".to_owned(),
        };
        let until = match owner.until {
            Some(until) => format!("to {}", local(until, zone)),
            None => "with no end in the log".to_owned(),
        };
        write!(
            text,
            "{} {} was {} {since} {until}",
            owner.protocol, owner.outside, owner.inside
        )?;
        if let Some(remote) = owner.remote {
            write!(text, ", to {remote}")?;
        }
        writeln!(text)?;
    }
    if answer.owners.is_empty() && answer.is_complete {
        writeln!(text, "nobody had it then")?;
    } else if !answer.owners.is_empty() && !answer.is_complete {
        writeln!(
            text,
            "(records of that time are missing, so there may have been others)"
        )?;
    }
    Ok(text)
}
