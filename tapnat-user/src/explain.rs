//! What each reason means and what to do about it, in the words of `docs/operations.md`: they are
//! written there, and nowhere else.

use tapnat_common::verdict::Reason;

const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// A row of the document's tables of reasons.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Explanation {
    pub meaning: &'static str,
    /// What to do; None where there is nothing to say.
    pub advice: Option<&'static str>,
}

/// What the document says of a reason. None if it forgets it, which a test rules out.
#[must_use]
pub fn explain(reason: Reason) -> Option<Explanation> {
    let begin = format!("| `{}` | ", reason.label());
    let row = OPERATIONS
        .lines()
        .find_map(|line| line.strip_prefix(&begin))?;
    let (meaning, advice) = row.trim_end_matches('|').split_once(" | ")?;
    let advice = advice.trim();
    Some(Explanation {
        meaning,
        advice: (!advice.is_empty() && !advice.starts_with("nothing")).then_some(advice),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_explained() {
        for reason in Reason::ALL {
            let explanation = explain(*reason);
            assert!(
                explanation.is_some_and(|it| !it.meaning.is_empty() && !it.meaning.contains('|')),
                "{reason:?}: {explanation:?}"
            );
        }
        let full = explain(Reason::SessionTableFull).unwrap();
        assert_eq!(full.meaning, "no room for another session");
        assert_eq!(full.advice, Some("`--max-sessions`, with `--fresh` once"));
        assert_eq!(explain(Reason::Translated).unwrap().advice, None);
    }
}
