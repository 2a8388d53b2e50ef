//! What the lines of a NAT log say of a time in the past: whose an outside endpoint was then, and
//! whether the log can tell.

use std::{collections::BTreeMap, io::BufRead, net::IpAddr};

use anyhow::{Context as _, Result, bail};
use jiff::{Span, Timestamp, ToSpan as _, Zoned, civil};
use serde::Serialize;

use super::{Event, Line};
use crate::view::{Endpoint, WHOLE};

/// Whose an outside endpoint is asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Question {
    pub address: IpAddr,
    /// Any, of an address that is one guest's alone.
    pub port: Option<u16>,
    pub protocol: Option<String>,
    /// From the first to the last moment that is meant.
    pub from: Timestamp,
    pub until: Timestamp,
}

/// One who had it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Owner {
    pub protocol: String,
    pub inside: Endpoint,
    pub outside: Endpoint,
    /// Null where destinations are not logged.
    pub remote: Option<Endpoint>,
    /// Since when; null when it was there before the log began to tell.
    pub since: Option<Timestamp>,
    /// Null when the log does not tell its end.
    pub until: Option<Timestamp>,
}

/// What a log says.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Answer {
    pub owners: Vec<Owner>,
    /// What the log covers; null when it is empty.
    pub first: Option<Timestamp>,
    pub last: Option<Timestamp>,
    /// Whether something may have happened at the time that the log does not tell.
    pub is_complete: bool,
}

/// An owner as far as the lines tell.
struct Known {
    owner: Owner,
    is_session: bool,
    /// It was there before this moment, and was not told to be there after it.
    doubt: Option<Timestamp>,
}

/// What the lines of one instance have told so far.
#[derive(Default)]
struct Book {
    known: Vec<Known>,
    last: Option<Timestamp>,
    /// From the last line before something is missing to the first one after it.
    gaps: Vec<(Timestamp, Timestamp)>,
    /// Whether lines may still come without a beginning.
    is_open: bool,
}

impl Book {
    fn read(&mut self, line: &Line, question: &Question) {
        let before = self.last.unwrap_or(line.time);
        self.last = Some(before.max(line.time));
        match line.event {
            Event::LogStarted | Event::LogResumed | Event::RecordsLost => {
                let is_new = line.event == Event::LogStarted;
                if line.count.is_some() || (is_new && self.is_open) {
                    self.gaps.push((before, line.time));
                }
                for it in &mut self.known {
                    let is_open = it.owner.until.is_none() && it.doubt.is_none();
                    if is_open && (is_new || !it.is_session) {
                        it.doubt = Some(line.time);
                    }
                }
                self.is_open = true;
            }
            Event::LogEnded => {
                for it in &mut self.known {
                    it.owner.until.get_or_insert(it.doubt.unwrap_or(line.time));
                }
                self.is_open = false;
            }
            Event::MappingCreated | Event::SessionCreated | Event::MappingPresent => {
                add(line, question, &mut self.known);
            }
            Event::MappingRemoved | Event::SessionRemoved => {
                let same = self.known.iter_mut().rev();
                if let Some(it) = same.into_iter().find(|it| is_same(&it.owner, line)) {
                    it.owner.until.get_or_insert(line.time);
                    it.doubt = None;
                }
            }
        }
    }
}

/// Looks for the owners in lines of a log, in their order; of several instances in one log, each has
/// its own. Lines that are none of a log are skipped.
///
/// # Errors
///
/// When the log cannot be read.
pub fn search(log: impl BufRead, question: &Question) -> Result<Answer> {
    let mut books: BTreeMap<String, Book> = BTreeMap::new();
    let mut answer = Answer::default();
    for text in log.lines() {
        let text = text.context("cannot read the NAT log")?;
        let Ok(line) = serde_json::from_str::<Line>(&text) else {
            continue;
        };
        answer.first = Some(answer.first.map_or(line.time, |first| first.min(line.time)));
        answer.last = answer.last.max(Some(line.time));
        match books.get_mut(&line.instance) {
            Some(book) => book.read(&line, question),
            None => books
                .entry(line.instance.clone())
                .or_default()
                .read(&line, question),
        }
    }
    let is_gap =
        |(start, end): &(Timestamp, Timestamp)| *start <= question.until && *end >= question.from;
    let is_within = answer.first.is_some_and(|first| first <= question.from);
    answer.is_complete = is_within && !books.values().any(|book| book.gaps.iter().any(is_gap));
    let known = books.into_values().flat_map(|book| book.known);
    let owners = known.map(|it| Owner {
        until: it.owner.until.or(it.doubt),
        ..it.owner
    });
    answer.owners = owners
        .filter(|owner| {
            owner.since.is_none_or(|since| since <= question.until)
                && owner.until.is_none_or(|until| until >= question.from)
        })
        .collect();
    Ok(answer)
}

fn is_same(owner: &Owner, line: &Line) -> bool {
    Some(owner.outside) == line.outside
        && Some(owner.inside) == line.inside
        && Some(owner.protocol.as_str()) == line.protocol.as_deref()
        && owner.remote == line.remote
}

/// Takes note of an owner, if it is one of those that are asked for.
fn add(line: &Line, question: &Question, known: &mut Vec<Known>) {
    let (Some(outside), Some(inside), Some(protocol)) =
        (line.outside, line.inside, line.protocol.clone())
    else {
        return;
    };
    let is_whole = protocol == WHOLE;
    let is_asked = outside.address == question.address
        && (is_whole || question.port.is_none_or(|port| port == outside.port))
        && (is_whole || question.protocol.as_ref().is_none_or(|it| *it == protocol));
    if !is_asked {
        return;
    }
    let is_present = line.event == Event::MappingPresent;
    if is_present {
        let same = known
            .iter_mut()
            .rev()
            .find(|it| it.owner.until.is_none() && is_same(&it.owner, line));
        if let Some(it) = same {
            it.doubt = None;
            return;
        }
    }
    known.push(Known {
        owner: Owner {
            protocol,
            inside,
            outside,
            remote: line.remote,
            since: (!is_present).then_some(line.time),
            until: None,
        },
        is_session: line.event == Event::SessionCreated,
        doubt: None,
    });
}

/// Reads a time as people write it, and how exact it is: `14:02` is all of that minute, of today, or
/// of yesterday where that is not over yet.
///
/// # Errors
///
/// When it is none.
pub fn parse_time(text: &str, now: &Zoned) -> Result<(Timestamp, Timestamp)> {
    let text = text.trim();
    if text == "now" {
        return Ok((now.timestamp(), now.timestamp()));
    }
    let colons = text.matches(':').count();
    let within = |start: Timestamp, length: Span| {
        let end = start.saturating_add(length).unwrap_or(start);
        (start, end - 1.nanosecond())
    };
    let exact = |start: Timestamp| {
        let is_minute = colons == 1;
        within(start, if is_minute { 1.minute() } else { 1.second() })
    };
    if let Ok(time) = text.parse::<Timestamp>() {
        // What others noted down is seldom more exact than its second.
        let is_second = time.subsec_nanosecond() == 0;
        let moment = (time, time);
        return Ok(if is_second {
            within(time, 1.second())
        } else {
            moment
        });
    }
    if let Ok(span) = text.parse::<Span>()
        && colons == 0
    {
        let is_past = text.ends_with("ago") || text.starts_with('-');
        let span = if is_past { span } else { span.negate() };
        let at = now.saturating_add(span).timestamp();
        return Ok((at - 30.seconds(), at + 30.seconds()));
    }
    let zone = now.time_zone();
    // Before a time alone, as which a date with a time is read, too.
    if let Ok(date) = text.parse::<civil::DateTime>()
        && colons != 0
    {
        let at = date
            .to_zoned(zone.clone())
            .context("there is no such time")?;
        return Ok(exact(at.timestamp()));
    }
    if let Ok(time) = text.parse::<civil::Time>()
        && colons != 0
    {
        let today = now.date().to_datetime(time).to_zoned(zone.clone());
        let today = today.context("there is no such time today")?;
        let day = if today > *now {
            today.saturating_sub(1.day())
        } else {
            today
        };
        return Ok(exact(day.timestamp()));
    }
    bail!("'{text}' is no time: write 14:02, '2026-11-23 14:02:11' or '10m ago'")
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use jiff::tz::TimeZone;

    const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 5));

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + minute * 60).unwrap()
    }

    fn line(minute: i64, event: &str, guest: u8, port: u16) -> String {
        format!(
            "{{\"schema\":1,\"time\":\"{}\",\"instance\":\"x\",\"event\":\"{event}\",\
             \"protocol\":\"udp\",\"inside\":{{\"address\":\"10.0.0.{guest}\",\"port\":5000}},\
             \"outside\":{{\"address\":\"{ADDRESS}\",\"port\":{port}}}}}",
            at(minute)
        )
    }

    fn mark(minute: i64, event: &str, count: &str) -> String {
        format!(
            "{{\"schema\":1,\"time\":\"{}\",\"instance\":\"x\",\"event\":\"{event}\"{count}}}",
            at(minute)
        )
    }

    fn ask(lines: &[String], minute: i64) -> Answer {
        let question = Question {
            address: ADDRESS,
            port: Some(40_000),
            protocol: None,
            from: at(minute),
            until: at(minute),
        };
        search(lines.join("\n").as_bytes(), &question).unwrap()
    }

    fn guests(answer: &Answer) -> Vec<String> {
        let owners = answer.owners.iter();
        owners.map(|it| it.inside.address.to_string()).collect()
    }

    #[test]
    fn who_had_it_then_is_found() {
        let lines = [
            mark(0, "log-started", ""),
            line(10, "mapping-created", 10, 40_000),
            line(12, "mapping-created", 12, 40_002),
            line(20, "mapping-removed", 10, 40_000),
            line(30, "mapping-created", 11, 40_000),
            "not of the log".to_owned(),
        ];
        assert_eq!(guests(&ask(&lines, 15)), ["10.0.0.10"]);
        assert_eq!(ask(&lines, 15).owners[0].until, Some(at(20)));
        assert!(guests(&ask(&lines, 25)).is_empty());
        assert_eq!(guests(&ask(&lines, 35)), ["10.0.0.11"]);
        for (minute, is_complete) in [(-1, false), (0, true), (25, true), (35, true)] {
            assert_eq!(ask(&lines, minute).is_complete, is_complete, "{minute}");
        }
    }

    #[test]
    fn what_was_not_told_is_not_made_up() {
        let lines = [
            mark(0, "log-started", ""),
            line(0, "mapping-present", 9, 40_000),
            line(5, "mapping-removed", 9, 40_000),
            line(10, "mapping-created", 10, 40_000),
            mark(20, "records-lost", ",\"count\":7"),
            line(20, "mapping-present", 10, 40_000),
            mark(30, "log-ended", ""),
        ];
        assert_eq!(ask(&lines, 3).owners[0].since, None);
        let over = ask(&lines, 25);
        assert_eq!(guests(&over), ["10.0.0.10"]);
        assert_eq!(over.owners[0].since, Some(at(10)));
        assert_eq!(over.owners[0].until, Some(at(30)));
        assert!(over.is_complete && !ask(&lines, 15).is_complete);
        assert!(guests(&ask(&lines, 31)).is_empty());
        assert_eq!(ask(&[], 3), Answer::default());
    }

    #[test]
    fn instances_that_write_one_log_are_told_apart() {
        let other = |text: String| text.replace("\"x\"", "\"y\"");
        let lines = [
            mark(0, "log-started", ""),
            line(10, "mapping-created", 10, 40_000),
            other(mark(20, "log-started", "")),
            other(mark(30, "log-ended", "")),
        ];
        let answer = ask(&lines, 35);
        assert_eq!(guests(&answer), ["10.0.0.10"]);
        assert!(answer.owners[0].until.is_none() && answer.is_complete);
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        let now: Zoned = "2026-11-23T15:00:00+00:00[UTC]".parse().unwrap();
        assert_eq!(*now.time_zone(), TimeZone::UTC);
        for (text, from, until) in [
            (
                "14:02",
                "2026-11-23T14:02:00Z",
                "2026-11-23T14:02:59.999999999Z",
            ),
            (
                "16:02",
                "2026-11-22T16:02:00Z",
                "2026-11-22T16:02:59.999999999Z",
            ),
            (
                "14:02:11",
                "2026-11-23T14:02:11Z",
                "2026-11-23T14:02:11.999999999Z",
            ),
            (
                "2026-11-20 14:02",
                "2026-11-20T14:02:00Z",
                "2026-11-20T14:02:59.999999999Z",
            ),
            (
                "2026-11-20T14:02:11Z",
                "2026-11-20T14:02:11Z",
                "2026-11-20T14:02:11.999999999Z",
            ),
            (
                "2026-11-20T15:02:11+01:00",
                "2026-11-20T14:02:11Z",
                "2026-11-20T14:02:11.999999999Z",
            ),
            (
                "2026-11-20T14:02:11.5Z",
                "2026-11-20T14:02:11.5Z",
                "2026-11-20T14:02:11.5Z",
            ),
            ("10m ago", "2026-11-23T14:49:30Z", "2026-11-23T14:50:30Z"),
            ("now", "2026-11-23T15:00:00Z", "2026-11-23T15:00:00Z"),
        ] {
            let expected = (from.parse().unwrap(), until.parse().unwrap());
            assert_eq!(parse_time(text, &now).unwrap(), expected, "{text}");
        }
        for text in ["", "x", "25:00", "2026-11-20"] {
            assert!(parse_time(text, &now).is_err(), "{text}");
        }
    }
}
