//! The documents name what the program has: every reason with its outcome, no other.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result};
use tapnat_common::verdict::{Outcome, Reason};

fn operations() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn outcome(reason: Reason) -> &'static str {
    match reason.outcome() {
        Outcome::Pass => "pass",
        Outcome::Ask => "ask",
        Outcome::Drop => "drop",
        Outcome::Refuse => "refuse",
        Outcome::Forward => "forward",
        Outcome::Hold => "hold",
        Outcome::Fragment => "fragment",
    }
}

#[test]
fn every_reason_is_explained_under_its_outcome() -> Result<()> {
    let text = operations()?;
    let start = text.find("### Reasons").context("no list of reasons")?;
    let end = text
        .find("## The JSON and exit codes")
        .context("no end of the list")?;
    let mut documented = BTreeSet::new();
    let mut heading = "";
    for line in text[start..end].lines() {
        if let Some((name, _)) = line.strip_prefix('*').and_then(|it| it.split_once("*: ")) {
            heading = name;
        } else if let Some((reason, _)) = line.strip_prefix("| `").and_then(|it| it.split_once('`'))
        {
            documented.insert((heading, reason));
        }
    }
    let known: BTreeSet<_> = Reason::ALL
        .iter()
        .map(|reason| (outcome(*reason), reason.label()))
        .collect();
    assert_eq!(documented, known);
    Ok(())
}
