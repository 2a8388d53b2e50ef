//! The sessions that carried the most between two looks. Only these are looked up again to be shown.

use std::{cmp::Reverse, collections::HashMap};

use anyhow::Result;
use tapnat_common::abi::{FlowKey, Session};

use super::{
    rates::{Passed, Span},
    traffic::{Part, Traffic},
    view::FlowActivity,
};
use crate::{
    clock::now,
    tables::{BothTables, PinnedTables},
    view::Flow,
};

/// So many sessions are shown, those with the most traffic.
const BUSIEST: usize = 100;

/// The sessions with the most traffic.
pub(super) fn busiest(
    before: &Traffic,
    after: &Traffic,
    span: Span,
    tables: &BothTables,
) -> Result<Vec<FlowActivity>> {
    let mut flows = busiest_of(before, after, span, &tables.ipv4)?;
    if let Some(tables) = &tables.ipv6 {
        flows.extend(busiest_of(before, after, span, tables)?);
    }
    flows.sort_by(|one, other| other.rates.bits().total_cmp(&one.rates.bits()));
    flows.truncate(BUSIEST);
    Ok(flows)
}

/// The same of one family, in no order, and some more.
fn busiest_of<A: Part>(
    before: &Traffic,
    after: &Traffic,
    span: Span,
    tables: &PinnedTables<A>,
) -> Result<Vec<FlowActivity>> {
    let (before, after) = (A::part(before), A::part(after));
    let passed = |key: &FlowKey<A>| {
        // One that is new began with nothing.
        let was = before.get(key).copied().unwrap_or_default();
        let is = after.get(key).copied().unwrap_or_default();
        (was, is)
    };
    let mut halves: Vec<_> = after
        .iter()
        .filter_map(|(key, is)| {
            let was = before.get(key).copied().unwrap_or_default();
            let more = is.bytes.saturating_sub(was.bytes);
            (more > 0).then_some((Reverse(more), *key))
        })
        .collect();
    // Of a session that is among the first, one half is.
    let enough = 2 * BUSIEST;
    if halves.len() > enough {
        halves.select_nth_unstable_by_key(enough, |(more, _)| *more);
        halves.truncate(enough);
    }
    let settings = tables.settings()?;
    let now = now();
    let mut flows: HashMap<FlowKey<A>, FlowActivity> = HashMap::new();
    for (_, mut key) in halves {
        let Some(mut half) = tables.half(&key)? else {
            continue;
        };
        let mut other_key = half.twin_key(&key);
        let mut other = tables.half(&other_key)?;
        let is_shown = |key: &FlowKey<A>, half: &Session<A>, other: Option<&Session<A>>| {
            Flow::from_half(key, half, other, &settings, now)
        };
        let mut flow = is_shown(&key, &half, other.as_ref());
        if flow.is_none()
            && let Some(twin) = other
        {
            (key, other_key) = (other_key, key);
            (half, other) = (twin, Some(half));
            flow = is_shown(&key, &half, other.as_ref());
        }
        let Some(flow) = flow else { continue };
        let flow = flow.of_guest(tables.guest_of(key.source));
        let (outbound, inbound) = (passed(&key), passed(&other_key));
        let [before, after] = [(outbound.0, inbound.0), (outbound.1, inbound.1)]
            .map(|(outbound, inbound)| Passed { outbound, inbound });
        let rates = span.rates(before, after);
        flows.insert(key, FlowActivity { flow, rates });
    }
    Ok(flows.into_values().collect())
}
