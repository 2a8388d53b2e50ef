//! The configuration file. A key of it is an option of `tapnat run` without its dashes, with the
//! same values, so the command line's own definitions read it; what the command line has no option
//! for, forwards, stands in tables of its own. Mistakes are told with their line.

use std::{
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, anyhow};
use clap::{ArgAction, ArgMatches, Command, CommandFactory as _, parser::ValueSource};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Cli, on_one_line};
use crate::{
    config::{
        Config,
        check::{About, Contradiction},
        parse_outside_address,
    },
    files::cannot,
    forwards::{Forward, parse_from},
    instance::InstanceName,
};

const DIRECTORY: &str = "/etc/tapnat";
/// A key at most this many edits away from a known one is worth suggesting.
const NEAR: usize = 3;

/// Options that are of one invocation and not of an instance.
const NO_KEYS: [&str; 5] = ["config", "instance", "fresh", "help", "version"];
pub(super) const FORWARD: &str = "forward";
const FORWARD_KEYS: [&str; 5] = ["protocol", "port", "to", "from", "outside-address"];
pub(super) const STATIC: &str = "static";
const STATIC_KEYS: [&str; 3] = ["outside", "inside", "from"];

/// Where the configuration of an instance is looked for.
pub(super) fn default_path(instance: &InstanceName) -> PathBuf {
    let name = match instance.as_str() {
        "default" => "tapnat",
        name => name,
    };
    Path::new(DIRECTORY).join(name).with_extension("toml")
}

/// A configuration file that was read.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    options: Vec<Entry>,
    forwards: Vec<(usize, Forward)>,
}

/// A key with its value.
#[derive(Debug)]
struct Entry {
    key: String,
    line: usize,
    /// The same on the command line.
    arguments: Vec<OsString>,
}

/// What is wrong, and in which line.
#[derive(Debug)]
struct Mistake {
    line: usize,
    message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.line, self.message)
    }
}

impl File {
    /// Reads a file. Each value is right by itself; whether they go together is not asked yet.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let text = fs::read_to_string(path)
            .map_err(|error| cannot("cannot read the configuration file", path, error))?;
        let (options, forwards) = parse(&text).map_err(|mistake| anyhow!("{shown}:{mistake}"))?;
        Ok(Self {
            path: path.to_owned(),
            options,
            forwards,
        })
    }

    /// The options that the command line did not give, as it would have given them.
    pub(super) fn arguments(&self, given: &ArgMatches) -> Vec<OsString> {
        let run = run_command();
        self.options
            .iter()
            .filter(|entry| {
                let option = run
                    .get_arguments()
                    .find(|option| option.get_long() == Some(&entry.key));
                option.is_none_or(|option| {
                    given.value_source(option.get_id().as_str()) != Some(ValueSource::CommandLine)
                })
            })
            .flat_map(|entry| entry.arguments.clone())
            .collect()
    }

    pub(super) fn forwards(&self) -> Vec<Forward> {
        self.forwards.iter().map(|(_, forward)| *forward).collect()
    }

    /// Refuses a configuration that contradicts itself, with the line at fault.
    pub(super) fn check(&self, config: &Config) -> Result<()> {
        config.check().map_err(|contradiction| {
            let Contradiction { about, message } = contradiction;
            let line = match about {
                About::Option(key) => self
                    .options
                    .iter()
                    .find(|entry| entry.key == key)
                    .map(|entry| entry.line),
                About::Forward(position) => self.forwards.get(position).map(|(line, _)| *line),
            };
            match line {
                Some(line) => anyhow!("{}:{line}: {message}", self.path.display()),
                None => anyhow!("{}: {message}", self.path.display()),
            }
        })
    }
}

/// The forwards that the text of a file asks for, in its order.
pub(super) fn forwards(path: &Path, text: &str) -> Result<Vec<Forward>> {
    let (_, forwards) = parse(text).map_err(|mistake| anyhow!("{}:{mistake}", path.display()))?;
    Ok(forwards.into_iter().map(|(_, forward)| forward).collect())
}

fn run_command() -> Command {
    let mut cli = Cli::command();
    cli.build();
    cli.find_subcommand("run").cloned().unwrap_or_default()
}

/// Every key that a file can have at its top.
fn known_keys(run: &Command) -> Vec<&str> {
    run.get_arguments()
        .filter_map(clap::Arg::get_long)
        .filter(|name| !NO_KEYS.contains(name))
        .chain([FORWARD, STATIC])
        .collect()
}

/// Options and forwards, each with its line, in their order.
type Contents = (Vec<Entry>, Vec<(usize, Forward)>);

fn parse(text: &str) -> Result<Contents, Mistake> {
    let line_at = |offset: usize| 1 + text.get(..offset).unwrap_or(text).matches('\n').count();
    let root = DeTable::parse(text).map_err(|error| Mistake {
        line: line_at(error.span().map_or(text.len(), |span| span.start)),
        message: one_line(error.message()),
    })?;
    let run = run_command();
    let known = known_keys(&run);
    let (mut options, mut forwards) = (Vec::new(), Vec::new());
    for (key, value) in root.get_ref() {
        let line = line_at(key.span().start);
        let wrong = |message| Mistake { line, message };
        let name = key.get_ref().as_ref();
        match name {
            FORWARD | STATIC => {
                for table in tables(name, value).map_err(wrong)? {
                    let line = line_at(table.span().start);
                    let fields = Fields {
                        value: table,
                        line_at: &line_at,
                    };
                    let forward = if name == FORWARD {
                        fields.forward()
                    } else {
                        fields.whole_address()
                    };
                    forwards.push((line, forward?));
                }
            }
            _ => {
                let option = run
                    .get_arguments()
                    .find(|option| option.get_long() == Some(name) && known.contains(&name));
                let Some(option) = option else {
                    return Err(wrong(unknown(name, &known)));
                };
                let arguments = arguments(name, option, value.get_ref()).map_err(wrong)?;
                run.clone()
                    .no_binary_name(true)
                    .try_get_matches_from(&arguments)
                    .map_err(|error| wrong(on_one_line(&error)))?;
                options.push(Entry {
                    key: name.to_owned(),
                    line,
                    arguments,
                });
            }
        }
    }
    // The first in the file comes first, which the table has not kept.
    options.sort_by_key(|entry| entry.line);
    forwards.sort_by_key(|(line, _)| *line);
    Ok((options, forwards))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn unknown(name: &str, known: &[&str]) -> String {
    let nearest = known
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .filter(|(distance, _)| *distance <= NEAR)
        .min();
    if NO_KEYS.contains(&name) {
        return format!("'{name}' is no key of a file: give it on the command line, as --{name}");
    }
    match nearest {
        Some((_, candidate)) => format!("unknown key '{name}': did you mean '{candidate}'?"),
        None => format!("unknown key '{name}': there is {}", known.join(", ")),
    }
}

/// A scalar as it would stand on the command line.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}

/// What the command line would say for a key.
fn arguments(name: &str, option: &clap::Arg, value: &DeValue<'_>) -> Result<Vec<OsString>, String> {
    if matches!(option.get_action(), ArgAction::SetTrue) {
        return match value {
            DeValue::Boolean(true) => Ok(vec![format!("--{name}").into()]),
            DeValue::Boolean(false) => Ok(Vec::new()),
            _ => Err(format!("{name} is a switch: write {name} = true")),
        };
    }
    let one = |value: &DeValue<'_>| {
        scalar(value)
            .map(|text| OsString::from(format!("--{name}={text}")))
            .ok_or_else(|| format!("{name} needs a text or a number: write {name} = \"..\""))
    };
    match value {
        DeValue::Array(values) if matches!(option.get_action(), ArgAction::Append) => {
            values.iter().map(|value| one(value.get_ref())).collect()
        }
        DeValue::Array(_) => Err(format!("{name} has one value, not a list")),
        value => Ok(vec![one(value)?]),
    }
}

type Value<'i> = Spanned<DeValue<'i>>;

fn tables<'a, 'i>(name: &str, value: &'a Value<'i>) -> Result<Vec<&'a Value<'i>>, String> {
    let tables = value
        .get_ref()
        .as_array()
        .filter(|list| list.iter().all(|entry| entry.get_ref().is_table()));
    match tables {
        Some(list) => Ok(list.iter().collect()),
        None => Err(format!(
            "{name} is a list of tables: begin each with [[{name}]]"
        )),
    }
}

/// A table of which every key is taken by name.
struct Fields<'a, 'i> {
    value: &'a Value<'i>,
    line_at: &'a dyn Fn(usize) -> usize,
}

impl Fields<'_, '_> {
    fn wrong(&self, message: String) -> Mistake {
        Mistake {
            line: (self.line_at)(self.value.span().start),
            message,
        }
    }

    fn check_keys(&self, known: &[&str]) -> Result<(), Mistake> {
        for key in self
            .value
            .get_ref()
            .as_table()
            .into_iter()
            .flat_map(|it| it.keys())
        {
            let name = key.get_ref().as_ref();
            if !known.contains(&name) {
                return Err(Mistake {
                    line: (self.line_at)(key.span().start),
                    message: unknown(name, known),
                });
            }
        }
        Ok(())
    }

    /// A value that may be missing.
    fn optional<T>(
        &self,
        name: &str,
        read: impl FnOnce(&str) -> Result<T>,
    ) -> Result<Option<T>, Mistake> {
        let table = self.value.get_ref().as_table();
        let Some((_, value)) =
            table.and_then(|table| table.iter().find(|(key, _)| key.get_ref() == name))
        else {
            return Ok(None);
        };
        let wrong = |message| Mistake {
            line: (self.line_at)(value.span().start),
            message,
        };
        let text = scalar(value.get_ref())
            .ok_or_else(|| wrong(format!("{name} needs a text or a number")))?;
        read(&text)
            .map(Some)
            .map_err(|error| wrong(format!("{error:#}")))
    }

    fn required<T>(&self, name: &str, read: impl FnOnce(&str) -> Result<T>) -> Result<T, Mistake> {
        self.optional(name, read)?
            .ok_or_else(|| self.wrong(format!("{name} is missing here")))
    }

    fn forward(&self) -> Result<Forward, Mistake> {
        self.check_keys(&FORWARD_KEYS)?;
        Forward::of_ports(
            self.required("protocol", str::parse)?,
            self.required("port", str::parse)?,
            self.required("to", str::parse)?,
            self.optional("from", parse_from)?,
            self.optional("outside-address", parse_outside_address)?,
        )
        .map_err(|error| self.wrong(format!("{error:#}")))
    }

    fn whole_address(&self) -> Result<Forward, Mistake> {
        self.check_keys(&STATIC_KEYS)?;
        Forward::of_address(
            self.required("outside", parse_outside_address)?,
            self.required("inside", parse_outside_address)?,
            self.optional("from", parse_from)?,
        )
        .map_err(|error| self.wrong(format!("{error:#}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forwards::Share;

    fn mistake(text: &str) -> String {
        let mistake = parse(text).unwrap_err().to_string();
        assert!(!mistake.contains('\n'), "{mistake}");
        mistake
    }

    #[test]
    fn reads_every_kind_of_value() {
        let text = "inside = [\"tap0=10.0.0.1/24\", \"tap1=10.0.1.1/24\"]\nuplink = \"eth0\"\n\
                    max-sessions = 1_000\nudp-timeout = 120\ncount = true\nkeep = false\n\
                    filtering = [\"endpoint-independent\", \"tcp=address-dependent\"]\n\
                    [[forward]]\nprotocol = \"tcp\"\nport = 8080\nto = \"10.0.0.10:80\"\n\
                    [[static]]\noutside = \"203.0.113.6\"\ninside = \"10.0.1.2\"\n";
        let (options, forwards) = parse(text).unwrap();
        let arguments: Vec<_> = options
            .iter()
            .flat_map(|entry| &entry.arguments)
            .map(|it| it.to_str().unwrap())
            .collect();
        assert_eq!(
            arguments,
            [
                "--inside=tap0=10.0.0.1/24",
                "--inside=tap1=10.0.1.1/24",
                "--uplink=eth0",
                "--max-sessions=1000",
                "--udp-timeout=120",
                "--count",
                "--filtering=endpoint-independent",
                "--filtering=tcp=address-dependent",
            ]
        );
        assert_eq!(forwards[0].1.name(), "tcp 8080");
        assert_eq!(
            (forwards[1].0, forwards[1].1.share),
            (12, Share::Everything)
        );
    }

    #[test]
    fn mistakes_are_told_with_their_line_and_the_way_out() {
        for (text, said) in [
            (
                "uplink = \"eth0\"\nuplnk = 1\n",
                "2: unknown key 'uplnk': did you mean 'uplink'?",
            ),
            (
                "\n\nsomething = 1\n",
                "3: unknown key 'something': there is ",
            ),
            (
                "instance = \"a\"\n",
                "1: 'instance' is no key of a file: give it on the command line",
            ),
            (
                "uplink = \"eth0\"\n\n\nuplink = \"eth1\"\n",
                "4: duplicate key",
            ),
            ("inside = [\"tap0=10.0.0.1\"]\n", "write 10.0.0.1/24"),
            ("# a\nudp-timeout = \"5x\"\n", "2: "),
            ("count = 1\n", "1: count is a switch: write count = true"),
            ("uplink = [\"a\", \"b\"]\n", "1: uplink has one value"),
            ("max-sessions = 0\n", "1: invalid value '0'"),
            ("uplink = {}\n", "1: uplink needs a text"),
            ("uplink = \n", "1: "),
            ("forward = 1\n", "[[forward]]"),
            (
                "[[forward]]\nprotocol = \"tcp\"\nprt = 1\n",
                "3: unknown key 'prt': did you mean 'port'?",
            ),
            (
                "[[forward]]\nprotocol = \"tcp\"\nport = 1\n",
                "1: to is missing",
            ),
            (
                "[[forward]]\nprotocol = \"sctp\"\n",
                "2: 'sctp' is not a protocol",
            ),
            (
                "[[static]]\noutside = \"203.0.113.6\"\ninside = 7\n",
                "3: '7' is not an address",
            ),
            (
                "[[static]]\noutside = \"203.0.113.6\"\ninside = \"fd00::6\"\n",
                "1: 203.0.113.6 cannot lead to fd00::6: 203.0.113.6 is IPv4",
            ),
            (
                "[[forward]]\nprotocol = \"tcp\"\nport = 80\nto = \"fd00::6:80\"\n",
                "4: 'fd00::6:80' may end with an address or with a port",
            ),
        ] {
            let told = mistake(text);
            assert!(told.contains(said), "{text}: {told}");
        }
    }

    #[test]
    fn the_file_of_an_instance_has_its_name() {
        let path = |name: &str| default_path(&name.parse().unwrap());
        assert_eq!(path("default"), Path::new("/etc/tapnat/tapnat.toml"));
        assert_eq!(path("vm-1"), Path::new("/etc/tapnat/vm-1.toml"));
    }

    /// The document has a heading for every key and none for others, and its examples are right.
    #[test]
    fn every_key_is_documented() {
        let text = include_str!("../../../docs/configuration.md");
        let run = run_command();
        let mut keys = known_keys(&run);
        let forward_keys = FORWARD_KEYS.map(|key| format!("forward.{key}"));
        let static_keys = STATIC_KEYS.map(|key| format!("static.{key}"));
        keys.extend(forward_keys.iter().chain(&static_keys).map(String::as_str));
        keys.retain(|key| ![FORWARD, STATIC].contains(key));
        keys.sort_unstable();
        let mut headings: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
            .collect();
        headings.sort_unstable();
        assert_eq!(headings, keys);

        let examples: Vec<_> = text
            .split("```toml\n")
            .skip(1)
            .filter_map(|rest| rest.split("```").next())
            .collect();
        assert!(!examples.is_empty());
        for example in examples {
            if let Err(mistake) = parse(example) {
                panic!("{mistake}\n{example}");
            }
        }
    }

    /// What goes with what is looked at when all of the file is known, or the other key might stand
    /// below.
    #[test]
    fn every_switch_may_stand_alone() {
        let run = run_command();
        let switches = run.get_arguments().filter_map(|option| {
            let is_switch = matches!(option.get_action(), ArgAction::SetTrue);
            option.get_long().filter(|_| is_switch)
        });
        let known = known_keys(&run);
        let keys: Vec<_> = switches.filter(|key| known.contains(key)).collect();
        assert!(keys.contains(&"log-destinations"));
        for key in keys {
            if let Err(mistake) = parse(&format!("{key} = true\n")) {
                panic!("{mistake}");
            }
        }
    }

    /// Of each key it stands there whether a reload applies it.
    #[test]
    fn every_key_is_in_the_table_of_a_reload() {
        let text = include_str!("../../../docs/configuration.md");
        let (_, table) = text.split_once("| applied at once |").unwrap();
        let row = table.lines().nth(2).unwrap();
        let named: Vec<_> = row.split('`').skip(1).step_by(2).collect();
        let run = run_command();
        for key in known_keys(&run) {
            let times = named.iter().filter(|name| **name == key).count();
            let is_told_apart =
                key.ends_with("-timeout") || ["port-rest", "keep", FORWARD, STATIC].contains(&key);
            assert_eq!(times, usize::from(!is_told_apart), "{key}");
        }
    }
}
