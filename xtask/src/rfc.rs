//! `cargo xtask test rfc`: one line for each requirement of `docs/rfc-compliance.md`, with the result
//! of the tests that the document names for it. That document is the only list of requirements.
//! Owns reading it and printing; which tests there are, and what they assert, is up to `tests/`.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::io::{IsTerminal as _, Write as _, stdout};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

use crate::command::{self, workspace};

const DOCUMENT: &str = "docs/rfc-compliance.md";

/// One row of the document.
#[derive(Debug, PartialEq, Eq)]
struct Requirement {
    /// As its heading says: `RFC 4787`.
    rfc: String,
    number: String,
    level: String,
    asks: String,
    /// What of it holds for IPv6, in tables of what IPv4 and IPv6 have in common.
    ipv6: Option<String>,
    proof: Proof,
}

#[derive(Debug, PartialEq, Eq)]
enum Proof {
    Tests(Vec<Test>),
    DoesNotApply,
    NotDone,
}

/// A test of a program of `tests/`, which may run once for each family of IP.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Test {
    program: String,
    name: String,
}

/// What the runs of a test for the families are called (`both_families!`).
const FAMILIES: [&str; 2] = ["v4", "v6"];

impl Test {
    fn read(text: &str) -> Result<Self> {
        let (program, name) = text
            .split_once("::")
            .with_context(|| format!("`{text}` is no test: program::name"))?;
        Ok(Self {
            program: program.to_owned(),
            name: name.to_owned(),
        })
    }

    /// The names that the test runner may know it by.
    fn runs(&self) -> impl Iterator<Item = String> {
        let of_families = FAMILIES.map(|family| format!("{}::{family}", self.name));
        [self.name.clone()].into_iter().chain(of_families)
    }
}

/// What the tests of a requirement have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Pass,
    Fail,
    /// The document names a test that there is not.
    NoSuchTest,
    DoesNotApply,
    NotDone,
}

impl Verdict {
    fn of(proof: &Proof, passed: &BTreeMap<Test, bool>) -> Self {
        let tests = match proof {
            Proof::Tests(tests) => tests,
            Proof::DoesNotApply => return Self::DoesNotApply,
            Proof::NotDone => return Self::NotDone,
        };
        if tests.iter().any(|test| !passed.contains_key(test)) {
            Self::NoSuchTest
        } else if tests.iter().all(|test| passed[test]) {
            Self::Pass
        } else {
            Self::Fail
        }
    }

    fn is_failure(self) -> bool {
        matches!(self, Self::Fail | Self::NoSuchTest)
    }

    fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::NoSuchTest => "NO TEST",
            Self::DoesNotApply => "n/a",
            Self::NotDone => "not done",
        }
    }

    /// The escape sequence that colours it.
    fn colour(self) -> &'static str {
        match self {
            Self::Pass => "\x1b[32m",
            Self::Fail | Self::NoSuchTest => "\x1b[1;31m",
            Self::DoesNotApply => "\x1b[2m",
            Self::NotDone => "\x1b[33m",
        }
    }
}

/// Runs the tests that the document names and prints the result of each requirement. `cargo_test`
/// makes the command for these targets, which takes further arguments for the test programs.
///
/// # Errors
/// When a test fails or is not there; its output is then on standard error.
pub fn run(cargo_test: impl Fn(&[&str]) -> Command) -> Result<()> {
    let requirements = read()?;
    let tests: BTreeSet<&Test> = requirements.iter().flat_map(tests_of).collect();
    let programs: BTreeSet<_> = tests.iter().map(|test| test.program.as_str()).collect();
    let mut targets = vec!["--no-run"];
    for program in programs {
        targets.extend(["--test", program]);
    }
    // Said at once: what cannot be built, and how far it is.
    command::run(&mut cargo_test(&targets))?;
    let widths = Widths::of(&requirements);
    let mut passed = BTreeMap::new();
    let mut verdicts = Vec::new();
    let mut failures = String::new();
    let mut programs_run = BTreeSet::new();
    for one in &requirements {
        for test in tests_of(one) {
            if programs_run.insert(&test.program) {
                let names = tests
                    .iter()
                    .filter(|other| other.program == test.program)
                    .flat_map(|test| test.runs());
                let mut command = cargo_test(&["--test", &test.program]);
                failures += &run_program(command.args(names), &test.program, &mut passed)?;
            }
        }
        let verdict = Verdict::of(&one.proof, &passed);
        say(&line(one, verdict, &widths, is_coloured()));
        verdicts.push(verdict);
    }
    if !failures.is_empty() {
        eprintln!("{failures}");
    }
    let count = |wanted| {
        verdicts
            .iter()
            .filter(|verdict| **verdict == wanted)
            .count()
    };
    say(&format!(
        "\n{} requirements: {} pass, {} fail, {} not done, {} do not apply here; {} tests",
        verdicts.len(),
        count(Verdict::Pass),
        count(Verdict::Fail) + count(Verdict::NoSuchTest),
        count(Verdict::NotDone),
        count(Verdict::DoesNotApply),
        passed.len(),
    ));
    ensure!(
        !verdicts.iter().any(|verdict| verdict.is_failure()),
        "not all that {DOCUMENT} promises holds"
    );
    Ok(())
}

/// Runs tests of one program. Returns what is to be said about those that failed.
fn run_program(
    command: &mut Command,
    program: &str,
    passed: &mut BTreeMap<Test, bool>,
) -> Result<String> {
    let output = command
        .arg("--exact")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run the tests {program}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let results = results(&said);
    let all_passed = results.iter().all(|(_, has_passed)| *has_passed);
    for (name, has_passed) in results {
        let test = Test {
            program: program.to_owned(),
            name: without_family(name).to_owned(),
        };
        *passed.entry(test).or_insert(true) &= has_passed;
    }
    if output.status.success() == all_passed {
        let start = said.find("\nfailures:").unwrap_or(said.len());
        return Ok(said[start..].to_owned());
    }
    bail!(
        "the tests {program} were cut short ({}): {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The name of a test without that of the family it ran for.
fn without_family(name: &str) -> &str {
    match name.rsplit_once("::") {
        Some((name, family)) if FAMILIES.contains(&family) => name,
        _ => name,
    }
}

/// The tests that ran, and whether they passed, by the lines that Rust's test runner prints.
fn results(output: &str) -> Vec<(&str, bool)> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "))
        .map(|(name, result)| (name, result == "ok"))
        .collect()
}

/// Whether standard output is a terminal that is to have colours.
fn is_coloured() -> bool {
    stdout().is_terminal() && env::var_os("NO_COLOR").is_none()
}

/// The tests go on when nobody reads any more: they have the last word.
fn say(line: &str) {
    let mut stdout = stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// Of the columns of all lines.
#[derive(Default)]
struct Widths {
    rfc: usize,
    number: usize,
    level: usize,
    asks: usize,
}

impl Widths {
    fn of(requirements: &[Requirement]) -> Self {
        let widest = |column: fn(&Requirement) -> &str| {
            let widths = requirements.iter().map(|one| column(one).chars().count());
            widths.max().unwrap_or(0)
        };
        Self {
            rfc: widest(|one| &one.rfc),
            number: widest(|one| &one.number),
            level: widest(|one| &one.level),
            asks: widest(|one| &one.asks),
        }
    }
}

fn line(one: &Requirement, verdict: Verdict, widths: &Widths, coloured: bool) -> String {
    let (colour, end) = if coloured {
        (verdict.colour(), "\x1b[0m")
    } else {
        ("", "")
    };
    let tests: Vec<_> = tests_of(one)
        .map(|test| format!("{}::{}", test.program, test.name))
        .collect();
    let ipv6 = match &one.ipv6 {
        Some(ipv6) if !tests.is_empty() => format!("; IPv6: {ipv6}"),
        _ => String::new(),
    };
    let tests = if tests.is_empty() {
        String::new()
    } else {
        format!("({}{ipv6})", tests.join(", "))
    };
    let line = format!(
        "{:rfc$}  {:number$}  {:level$}  {colour}{:8}{end}  {:asks$}  {tests}",
        one.rfc,
        one.number,
        one.level,
        verdict.word(),
        one.asks,
        rfc = widths.rfc,
        number = widths.number,
        level = widths.level,
        asks = widths.asks,
    );
    line.trim_end().to_owned()
}

fn tests_of(one: &Requirement) -> impl Iterator<Item = &Test> {
    match &one.proof {
        Proof::Tests(tests) => tests.as_slice(),
        Proof::DoesNotApply | Proof::NotDone => &[],
    }
    .iter()
}

fn read() -> Result<Vec<Requirement>> {
    let path = workspace().join(DOCUMENT);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {DOCUMENT}"))?;
    parse(&text).with_context(|| format!("{DOCUMENT} is not as it should be"))
}

/// Reads the tables under headings that name an RFC.
fn parse(text: &str) -> Result<Vec<Requirement>> {
    let mut requirements = Vec::new();
    let mut heading = String::new();
    let mut in_heading = false;
    let mut row: Vec<String> = Vec::new();
    let mut columns = 0;
    let mut tests = Vec::new();
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Heading {
                level: HeadingLevel::H2,
                ..
            }) => {
                in_heading = true;
                heading.clear();
            }
            Event::End(TagEnd::Heading(_)) => in_heading = false,
            Event::Text(text) if in_heading => heading += &text,
            Event::Start(Tag::TableRow | Tag::TableHead) => {
                row.clear();
                tests.clear();
            }
            Event::Start(Tag::TableCell) => row.push(String::new()),
            Event::Text(text) => {
                if let Some(cell) = row.last_mut() {
                    *cell += &text;
                }
            }
            Event::Code(code) => {
                if row.len() == columns {
                    tests.push(Test::read(&code)?);
                } else if let Some(cell) = row.last_mut() {
                    *cell += &code;
                }
            }
            Event::End(TagEnd::TableHead) => columns = row.len(),
            Event::End(TagEnd::TableRow) if heading.starts_with("RFC ") => {
                requirements.push(requirement(&heading, &row, &tests)?);
            }
            _ => {}
        }
    }
    Ok(requirements)
}

/// From number, level, what it asks for, what is done, perhaps what of it holds for IPv6, and tests.
fn requirement(heading: &str, row: &[String], tests: &[Test]) -> Result<Requirement> {
    let (number, level, asks, ipv6, last) = match row {
        [number, level, asks, _, last] => (number, level, asks, None, last),
        [number, level, asks, _, ipv6, last] => (number, level, asks, Some(ipv6), last),
        _ => bail!("a row of {heading} has other columns: {row:?}"),
    };
    let proof = match (last.trim(), tests) {
        ("does not apply", []) => Proof::DoesNotApply,
        ("not done", []) => Proof::NotDone,
        (_, []) => bail!("{heading}, {number}: neither tests nor `not done` or `does not apply`"),
        (_, tests) => Proof::Tests(tests.to_vec()),
    };
    let rfc = heading.split(':').next().unwrap_or(heading);
    Ok(Requirement {
        rfc: rfc.to_owned(),
        number: number.clone(),
        level: level.clone(),
        asks: asks.clone(),
        ipv6: ipv6.map(|cell| cell.trim().to_owned()),
        proof,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Of a row whose tests all run for IPv6, too.
    const THE_SAME: &str = "same";

    const TEXT: &str = "# Rows\n\n| a | b |\n|-|-|\n| not | one |\n\n## RFC 4787: UDP\n\n\
        | | level | asks | how | tests |\n|-|-|-|-|-|\n\
        | REQ-1 | MUST | one `endpoint` | always | `rfc4787::one`, `host::two` |\n\
        | REQ-5a | MAY | shorter | no use | not done |\n\
        | REQ-7 | MUST | a DHCP server | there is none | does not apply |\n\n\
        ## RFC 5508: ICMP\n\n\
        | | level | asks | how | IPv6 | tests |\n|-|-|-|-|-|-|\n\
        | REQ-1 | MUST | two | with `--this` | same | `rfc5508::two` |\n";

    fn test(text: &str) -> Test {
        Test::read(text).unwrap()
    }

    #[test]
    fn rows_are_read() {
        let rows = parse(TEXT).unwrap();
        let proofs: Vec<_> = rows.iter().map(|row| &row.proof).collect();
        let tests = Proof::Tests(vec![test("rfc4787::one"), test("host::two")]);
        let other = Proof::Tests(vec![test("rfc5508::two")]);
        assert_eq!(
            proofs,
            [&tests, &Proof::NotDone, &Proof::DoesNotApply, &other]
        );
        assert_eq!(rows[0].rfc, "RFC 4787");
        assert_eq!(rows[0].asks, "one endpoint");
        assert_eq!(rows[0].ipv6, None);
        assert_eq!(rows[3].ipv6.as_deref(), Some(THE_SAME));
    }

    #[test]
    fn rows_without_proof_are_refused() {
        let text = TEXT.replace("not done", "soon");
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains("REQ-5a"), "{error}");
        assert!(parse(&TEXT.replace("rfc4787::", "")).is_err());
    }

    #[test]
    fn one_line_tells_all_of_a_requirement() {
        let rows = parse(TEXT).unwrap();
        let mut passed = BTreeMap::from([(test("rfc4787::one"), true)]);
        let first = Verdict::of(&rows[0].proof, &passed);
        assert_eq!(first, Verdict::NoSuchTest);
        passed.insert(test("host::two"), false);
        assert_eq!(Verdict::of(&rows[0].proof, &passed), Verdict::Fail);
        passed.insert(test("host::two"), true);
        let verdict = Verdict::of(&rows[0].proof, &passed);
        assert_eq!(
            line(&rows[0], verdict, &Widths::of(&rows), false),
            "RFC 4787  REQ-1   MUST  pass      one endpoint   (rfc4787::one, host::two)"
        );
        assert_eq!(
            line(&rows[1], Verdict::NotDone, &Widths::of(&rows), false),
            "RFC 4787  REQ-5a  MAY   not done  shorter"
        );
    }

    #[test]
    fn results_are_read_from_the_test_runner() {
        let output = "\nrunning 2 tests\ntest one ... ok\ntest two ... FAILED\n\nfailures:\n";
        assert_eq!(results(output), [("one", true), ("two", false)]);
    }

    #[test]
    fn a_test_is_that_for_both_families() {
        for name in test("rfc4787::one").runs() {
            assert_eq!(without_family(&name), "one");
        }
        assert_eq!(without_family("one::v5"), "one::v5");
    }

    /// The tests in a file, and whether they run for both families.
    fn tests_in(path: &Path) -> Vec<(Test, bool)> {
        let program = path.file_stem().unwrap().to_string_lossy();
        let text = fs::read_to_string(path).unwrap();
        let mut found = Vec::new();
        let mut is_test = false;
        for line in text.lines() {
            let of_families = line.strip_prefix("both_families!(");
            let both = of_families.and_then(|rest| rest.strip_suffix(");"));
            let name = if let Some(rest) = of_families {
                rest.split([',', ')']).next()
            } else if let Some(function) = line.strip_prefix("fn ").filter(|_| is_test) {
                function.split('(').next()
            } else {
                None
            };
            is_test = name.is_none() && (is_test || line == "#[test]");
            let named = name.map(|name| test(&format!("{program}::{name}")));
            let are_both = both.is_some_and(|rest| !rest.contains(','));
            found.extend(named.map(|test| (test, are_both)));
        }
        found
    }

    /// The tests in a directory, by the files' names, and whether they run for both families.
    fn tests_under(directory: &str) -> BTreeMap<Test, bool> {
        let entries = fs::read_dir(workspace().join(directory)).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let files = paths.filter(|path| path.is_file());
        files.flat_map(|path| tests_in(&path)).collect()
    }

    #[test]
    fn the_traps_name_tests_that_exist() {
        let text = fs::read_to_string(workspace().join("docs/traps.md")).unwrap();
        let programs = tests_under("tests/tests");
        let decisions = tests_under("tapnat-common/tests/datapath");
        let mut traps = 0;
        for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::TableRow) => traps += 1,
                Event::Code(name) if name.contains("::") && !name.ends_with("::") => {
                    let exists = match name.strip_prefix("datapath::") {
                        Some(name) => decisions.contains_key(&test(name)),
                        None => programs.contains_key(&test(&name)),
                    };
                    assert!(exists, "there is no test {name}");
                }
                _ => {}
            }
        }
        assert_eq!(traps, 44);
    }

    #[test]
    fn the_document_and_the_tests_name_each_other() {
        let all = tests_under("tests/tests");
        let requirements = read().unwrap();
        let named: BTreeSet<_> = requirements.iter().flat_map(tests_of).cloned().collect();
        let missing: Vec<_> = named
            .iter()
            .filter(|test| !all.contains_key(test))
            .collect();
        assert!(missing.is_empty(), "{DOCUMENT} names {missing:?}");
        let of_rfcs = all.keys().filter(|test| test.program.starts_with("rfc"));
        let forgotten: Vec<_> = of_rfcs.filter(|test| !named.contains(test)).collect();
        assert!(forgotten.is_empty(), "{DOCUMENT} lacks {forgotten:?}");
        for one in &requirements {
            let Some(ipv6) = &one.ipv6 else { continue };
            let are_of_both = tests_of(one).all(|test| all[test]);
            let has_tests = matches!(one.proof, Proof::Tests(_));
            assert_eq!(
                has_tests && are_of_both,
                ipv6 == THE_SAME,
                "{}, {}: `{ipv6}`",
                one.rfc,
                one.number
            );
            assert!(
                !(has_tests && ipv6.is_empty()),
                "{}, {}",
                one.rfc,
                one.number
            );
        }
        let numbers: BTreeSet<_> = requirements
            .iter()
            .map(|one| (&one.rfc, &one.number))
            .collect();
        assert_eq!(
            numbers.len(),
            requirements.len(),
            "a requirement has two rows"
        );
    }
}
