//! `tapnat flows`: the sessions.

use std::{
    io::Write,
    num::NonZeroUsize,
    ops::{ControlFlow, RangeInclusive},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum, builder::PossibleValue};
use ipnet::IpNet;
use tapnat_common::{abi::setting_flags, nat::session::State, time::Ticks};
use tapnat_display::units;

use super::{
    Format, Instance,
    print::{self, Column, List},
    read_protocol,
    watch::{Room, Watching, watch},
};
use crate::{
    config::{parse_duration, parse_prefix},
    flows::{Common, Filter, Key, Order, Sorted, Sum, Sums, for_each},
    ports::parse_range,
    progress::Progress,
    tables::BothTables,
    view::{Directions, Flow},
};

/// Lines of a watched list that are no rows: what is shown, and the titles.
const HEAD: usize = 2;

const UNCOUNTED: &str = "packets and bytes are not counted: end the instance, and start it with \
                         `tapnat run --count`";

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    chosen: Chosen,
    #[command(flatten)]
    shape: Shape,

    #[command(flatten)]
    watching: Watching,

    #[command(flatten)]
    instance: Instance,
    #[command(flatten)]
    format: Format,
}

/// Which sessions.
#[derive(Debug, Args)]
#[command(next_help_heading = "Which sessions")]
struct Chosen {
    /// Of guests with this address, or in this network
    #[arg(long, value_name = "ADDRESS[/LENGTH]", value_delimiter = ',', value_parser = parse_prefix)]
    guest: Vec<IpNet>,

    /// With a remote of this address, or in this network
    #[arg(long, value_name = "ADDRESS[/LENGTH]", value_delimiter = ',', value_parser = parse_prefix)]
    remote: Vec<IpNet>,

    /// Of this protocol: tcp, udp, icmp, icmpv6, .. or a number
    #[arg(
        long,
        visible_alias = "proto",
        value_name = "PROTOCOL",
        value_delimiter = ',',
        value_parser = read_protocol
    )]
    protocol: Vec<u8>,

    /// In this state
    #[arg(long, value_name = "STATE", value_delimiter = ',')]
    state: Vec<StateName>,

    /// With this port inside, outside or at the remote
    #[arg(long, value_name = "PORT[-PORT]", value_delimiter = ',', value_parser = parse_range)]
    port: Vec<RangeInclusive<u16>>,

    /// Without a packet for so long
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    older: Option<Ticks>,

    /// With a packet since so long ago
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    newer: Option<Ticks>,
}

/// What is shown of them.
#[derive(Debug, Args)]
#[command(next_help_heading = "What is shown of them")]
struct Shape {
    /// In this order; the first key counts most
    #[arg(long, value_name = "KEY", value_delimiter = ',')]
    sort: Vec<Key>,

    /// The other way round
    #[arg(long, requires = "sort")]
    reverse: bool,

    /// These columns, as the titles of the table name them
    #[arg(
        long,
        value_name = "COLUMN",
        value_delimiter = ',',
        conflicts_with_all = ["json", "by"]
    )]
    columns: Vec<Cell>,

    /// Only the first so many
    #[arg(long, value_name = "NUMBER")]
    limit: Option<NonZeroUsize>,

    /// Who talks most: the sums of the sessions that have this in common, the most bytes first, or
    /// the most sessions without `tapnat run --count`
    #[arg(long, value_name = "WHAT", conflicts_with = "sort")]
    by: Option<Common>,
}

/// A session's state, as it is shown.
#[derive(Clone, Copy, Debug)]
struct StateName(State);

impl ValueEnum for StateName {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self(State::Opening),
            Self(State::Established),
            Self(State::Closing),
            Self(State::Reset),
            Self(State::OneWay),
            Self(State::TwoWay),
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.label()))
    }
}

/// What can stand in a column.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Cell {
    #[value(alias = "protocol")]
    Proto,
    Inside,
    Outside,
    Remote,
    State,
    Expires,
    Idle,
    Packets,
    Bytes,
}

impl Cell {
    /// The columns that are shown where none are chosen.
    fn usual(counted: bool) -> Vec<Self> {
        let cells = Self::value_variants().iter().copied();
        cells.filter(|it| counted || !it.needs_counts()).collect()
    }

    fn needs_counts(self) -> bool {
        matches!(self, Self::Packets | Self::Bytes)
    }

    fn column(self) -> Column {
        match self {
            Self::Proto => Column::text("PROTO"),
            Self::Inside => Column::inside("INSIDE"),
            Self::Outside => Column::outside("OUTSIDE"),
            Self::Remote => Column::endpoint("REMOTE"),
            Self::State => Column::text("STATE"),
            Self::Expires => Column::number("EXPIRES"),
            Self::Idle => Column::number("IDLE"),
            Self::Packets => Column::number("PACKETS"),
            Self::Bytes => Column::number("BYTES"),
        }
    }

    fn of(self, flow: &Flow) -> String {
        match self {
            Self::Proto => flow.protocol.to_string(),
            Self::Inside => flow.inside.to_string(),
            Self::Outside => flow.outside.to_string(),
            Self::Remote => flow.remote.to_string(),
            Self::State => flow.state.label().to_owned(),
            Self::Expires => format!("{}s", flow.expires_in_seconds),
            Self::Idle => format!("{}s", flow.idle_seconds),
            Self::Packets => both(flow.packets),
            Self::Bytes => both(flow.bytes),
        }
    }
}

impl From<Key> for Cell {
    fn from(key: Key) -> Self {
        match key {
            Key::Protocol => Self::Proto,
            Key::Inside => Self::Inside,
            Key::Outside => Self::Outside,
            Key::Remote => Self::Remote,
            Key::State => Self::State,
            Key::Expires => Self::Expires,
            Key::Idle => Self::Idle,
            Key::Packets => Self::Packets,
            Key::Bytes => Self::Bytes,
        }
    }
}

/// What passed, as OUTBOUND/INBOUND.
pub(super) fn both(it: Option<Directions>) -> String {
    it.map_or_else(String::new, |it| format!("{}/{}", it.outbound, it.inbound))
}

/// What was found, and how many there are of it, of which only the first are kept.
struct Found {
    rows: Rows,
    count: usize,
}

enum Rows {
    Flows(Vec<Flow>),
    Sums(Vec<Sum>),
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let Some(interval) = self.watching.watch else {
            let tables = self.instance.tables()?;
            let width = print::terminal_width();
            // What comes bit by bit on a terminal is seen.
            let is_seen = width.is_some() && self.shape.is_printed_at_once();
            let progress = if is_seen {
                Progress::silent()
            } else {
                Progress::counting("looking at sessions")
            };
            return self.shape.show(
                &tables,
                &self.chosen.filter(),
                self.format.json,
                print::standard_output(),
                width,
                &progress,
            );
        };
        watch(interval, |output, room| {
            // Opened anew each time: the instance may go, and another may come.
            let tables = self.instance.tables()?;
            if let Some(room) = room {
                return self.fill(&tables, interval, output, room);
            }
            let (filter, json) = (self.chosen.filter(), self.format.json);
            self.shape.show(
                &tables,
                &filter,
                json,
                &mut *output,
                None,
                &Progress::silent(),
            )?;
            if !json {
                output.push(b'\n');
            }
            Ok(())
        })
    }

    /// Fills a terminal.
    fn fill(
        &self,
        tables: &BothTables,
        interval: Duration,
        output: &mut Vec<u8>,
        room: Room,
    ) -> Result<()> {
        let rows = room.rows.saturating_sub(HEAD).min(self.shape.limit());
        let filter = self.chosen.filter();
        let found = (self.shape).find(tables, &filter, rows, &Progress::silent())?;
        let what = match found.rows {
            Rows::Flows(_) => "session",
            Rows::Sums(_) => "sum",
        };
        let part = if found.count > rows {
            format!(", the first {rows}")
        } else {
            String::new()
        };
        let count = found.count as u64;
        let head = format!(
            "{} {what}{}{part}; every {} s until Ctrl-C",
            units::count(count),
            print::plural(count),
            interval.as_secs_f64()
        );
        writeln!(output, "{head:.*}", room.columns).context(print::OUTPUT)?;
        let counted = is_counted(tables)?;
        found.print(
            &self.shape,
            counted,
            self.format.json,
            output,
            Some(room.columns),
        )
    }
}

impl Chosen {
    fn filter(&self) -> Filter {
        let seconds = |it: Ticks| it.milliseconds() / 1000;
        Filter {
            guests: self.guest.clone(),
            protocols: self.protocol.clone(),
            states: self.state.iter().map(|it| it.0).collect(),
            ports: self.port.clone(),
            remotes: self.remote.clone(),
            older: self.older.map(seconds),
            newer: self.newer.map(seconds),
        }
    }
}

impl Shape {
    /// Whether each session is printed when it is read.
    fn is_printed_at_once(&self) -> bool {
        self.by.is_none() && self.sort.is_empty()
    }

    fn limit(&self) -> usize {
        self.limit.map_or(usize::MAX, NonZeroUsize::get)
    }

    /// Prints once what there is. What needs not be sorted or added up is printed as it is read.
    fn show(
        &self,
        tables: &BothTables,
        filter: &Filter,
        json: bool,
        output: impl Write,
        width: Option<usize>,
        progress: &Progress,
    ) -> Result<()> {
        let counted = is_counted(tables)?;
        if !self.is_printed_at_once() {
            let found = self.find(tables, filter, self.limit(), progress)?;
            return found.print(self, counted, json, output, width);
        }
        let (cells, columns) = self.cells(counted, width)?;
        let mut list = List::begin_on(output, json, &columns, self.width(width))?;
        let mut left = self.limit();
        for_each(tables, filter, |flow| {
            progress.advance(1);
            list.entry(&flow, |flow| row(&cells, flow))?;
            left -= 1;
            Ok(if left == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            })
        })?;
        list.end()
    }

    /// Reads everything, and keeps the first so many.
    fn find(
        &self,
        tables: &BothTables,
        filter: &Filter,
        limit: usize,
        progress: &Progress,
    ) -> Result<Found> {
        let counted = is_counted(tables)?;
        ensure!(
            counted || !self.sort.iter().any(|key| key.needs_counts()),
            UNCOUNTED
        );
        let mut count = 0;
        if let Some(by) = self.by {
            let mut sums = Sums::new(by);
            for_each(tables, filter, |flow| {
                progress.advance(1);
                sums.add(&flow);
                Ok(ControlFlow::Continue(()))
            })?;
            let mut sums = sums.busiest_first();
            count = sums.len();
            sums.truncate(limit);
            return Ok(Found {
                rows: Rows::Sums(sums),
                count,
            });
        }
        let order = Order {
            keys: self.sort.clone(),
            reverse: self.reverse,
        };
        let mut sorted = Sorted::new(order, limit);
        for_each(tables, filter, |flow| {
            progress.advance(1);
            sorted.add(flow);
            count += 1;
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Found {
            rows: Rows::Flows(sorted.into_flows()),
            count,
        })
    }

    /// What stands in a row, and the columns of that. Where there is only so much room, what sessions
    /// are sorted by comes before what may be left out.
    fn cells(&self, counted: bool, width: Option<usize>) -> Result<(Vec<Cell>, Vec<Column>)> {
        ensure!(
            counted || !self.columns.iter().any(|cell| cell.needs_counts()),
            UNCOUNTED
        );
        let mut cells = if self.columns.is_empty() {
            Cell::usual(counted)
        } else {
            self.columns.clone()
        };
        if self.width(width).is_some() && !self.sort.is_empty() {
            let matters = |cell: &Cell| {
                [Cell::Proto, Cell::Inside, Cell::Remote].contains(cell)
                    || self.sort.iter().any(|key| Cell::from(*key) == *cell)
            };
            cells.sort_by_key(|cell| !matters(cell));
        }
        let columns = cells.iter().map(|cell| cell.column()).collect();
        Ok((cells, columns))
    }

    /// Columns that were asked for are never left out.
    fn width(&self, width: Option<usize>) -> Option<usize> {
        width.filter(|_| self.columns.is_empty())
    }
}

impl Found {
    fn print(
        &self,
        shape: &Shape,
        counted: bool,
        json: bool,
        output: impl Write,
        width: Option<usize>,
    ) -> Result<()> {
        match &self.rows {
            Rows::Flows(flows) => {
                let (cells, columns) = shape.cells(counted, width)?;
                let mut list = List::begin_on(output, json, &columns, shape.width(width))?;
                for flow in flows {
                    list.entry(flow, |flow| row(&cells, flow))?;
                }
                list.end()
            }
            Rows::Sums(sums) => {
                let title = shape.by.map_or("", title);
                let mut columns = vec![Column::endpoint(title), Column::number("SESSIONS")];
                if counted {
                    columns.extend([Cell::Packets, Cell::Bytes].map(Cell::column));
                }
                let mut list = List::begin_on(output, json, &columns, width)?;
                for sum in sums {
                    list.entry(sum, sum_row)?;
                }
                list.end()
            }
        }
    }
}

fn row(cells: &[Cell], flow: &Flow) -> Vec<String> {
    cells.iter().map(|cell| cell.of(flow)).collect()
}

fn sum_row(sum: &Sum) -> Vec<String> {
    let mut row = vec![sum.group.clone(), sum.sessions.to_string()];
    let counts = [sum.packets, sum.bytes].into_iter();
    row.extend(counts.filter(Option::is_some).map(both));
    row
}

const fn title(by: Common) -> &'static str {
    match by {
        Common::Guest => "GUEST",
        Common::Remote => "REMOTE",
        Common::Service => "SERVICE",
        Common::Protocol => "PROTO",
        Common::State => "STATE",
    }
}

fn is_counted(tables: &BothTables) -> Result<bool> {
    Ok(tables.ipv4.settings()?.flags & setting_flags::COUNTED != 0)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn read(line: &str) -> Result<Arguments> {
        let words = std::iter::once("flows").chain(line.split_whitespace());
        Ok(Line::try_parse_from(words)?.arguments)
    }

    #[test]
    fn conditions_are_read() {
        let filter = read(
            "--guest 10.0.0.2,10.0.1.0/24,fd00::/64 --remote 0.0.0.0/0 --proto tcp,47 --state closing,reset \
             --port 80,1000-2000 --older 5m --newer 90",
        )
        .unwrap()
        .chosen
        .filter();
        assert_eq!(filter.guests.len(), 3);
        assert_eq!(filter.guests[0].prefix_len(), 32);
        assert_eq!(filter.guests[2].prefix_len(), 64);
        assert_eq!(filter.protocols, [6, 47]);
        assert_eq!(filter.states, [State::Closing, State::Reset]);
        assert_eq!(filter.ports, [80..=80, 1000..=2000]);
        assert_eq!((filter.older, filter.newer), (Some(300), Some(90)));
    }

    #[test]
    fn mistakes_are_told_with_the_way_out() {
        for (line, said) in [
            ("--guest 10.0.0.2/24", "write 10.0.0.0/24 for all of it"),
            ("--guest fd00::1/64", "write fd00::/64 for all of it"),
            ("--remote example.org", "is not a prefix or an address"),
            ("--protocol tpc", "write tcp, udp, icmp, icmpv6 or a number"),
            ("--state open", "one-way"),
            ("--port 90000", "not a port"),
            ("--port 9-1", "upside down"),
            ("--older soon", "write 300, 300s or 5m"),
            ("--sort size", "bytes"),
            ("--columns port", "inside"),
            ("--limit 0", "limit"),
            ("--reverse", "--sort"),
            ("--by port", "service"),
            ("--by guest --sort bytes", "cannot be used with"),
            ("--json --columns inside", "cannot be used with"),
            ("--watch=0", "too short"),
        ] {
            let error = format!("{:#}", read(line).unwrap_err());
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn an_interval_may_be_given() {
        assert_eq!(read("").unwrap().watching.watch, None);
        assert_eq!(
            read("--watch").unwrap().watching.watch,
            Some(Duration::from_secs(2))
        );
        assert_eq!(
            read("--watch=10 --by guest").unwrap().watching.watch,
            Some(Duration::from_secs(10))
        );
    }
}
