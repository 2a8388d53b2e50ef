//! The time that a packet of an established flow takes, from the driver that received it to the
//! driver at the other end of the wire.

use std::time::Duration;

use anyhow::Result;

use super::{Run, comparison};
use crate::{
    contender::{Contender, Stand, Wish},
    packets::Protocol,
    rig::Flows,
    rounds::interleave,
    statistics,
};

/// Packets sent in one go, a direction.
const BURST: u32 = 65_536;
/// With more flows than this, a turn is longer: see [`Turn::of_many`].
pub(super) const MANY: u32 = 131_072;
/// tapnat looks at a session closely every eight seconds.
const LONG: Duration = Duration::from_secs(9);
/// Rounds of such turns: what is near the eight seconds averages out.
const FEW: usize = 4;

/// How one contender's turn goes.
pub(super) struct Turn {
    /// Packets that are not measured.
    pub(super) warm: u32,
    pub(super) length: Duration,
    pub(super) rounds: usize,
    /// What stands for a turn's bursts.
    pub(super) summary: fn(&[f64]) -> f64,
}

impl Turn {
    /// With so many flows.
    pub(super) fn of(count: u32, run: &Run<'_>) -> Self {
        if count > MANY {
            return Self::of_many(count, run);
        }
        Self {
            warm: count.max(BURST),
            length: run.effort.length,
            rounds: run.effort.rounds,
            summary: statistics::median,
        }
    }

    /// One processor that serves so many flows evenly comes back to each within a second or two.
    /// Among the others' turns that would be minutes, so every flow gets a packet first, and then as
    /// many as come until each was looked at closely once: those are the slow ones, and count.
    fn of_many(count: u32, run: &Run<'_>) -> Self {
        Self {
            warm: count,
            length: LONG,
            rounds: run.effort.rounds.min(FEW),
            summary: statistics::mean,
        }
    }
}

pub fn run(run: &mut Run<'_>) -> Result<()> {
    let mut contenders = vec![Contender::Redirect, Contender::Forwarding, Contender::Nft];
    if !run.effort.quick {
        contenders.extend([Contender::IptablesLegacy, Contender::IptablesNft]);
    }
    contenders.extend([Contender::Tapnat, Contender::RedirectAgain]);
    let contenders = Contender::among(&contenders);
    for count in [1, 30_000, 1_000_000] {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let title = format!("{} of {count} established flows", protocol.label());
            if !run.wants(&title) || (run.effort.quick && count > MANY && run.case.is_empty()) {
                continue;
            }
            let flows = Flows { protocol, count };
            let wish = Wish {
                max_sessions: (count + count / 5).max(131_072),
                ..Wish::default()
            };
            let mut stands = Stand::build_all(&contenders, &wish)?;
            for stand in &mut stands {
                stand.rig.open(flows)?;
            }
            let turn = Turn::of(count, run);
            let rounds = interleave(&mut stands, turn.rounds, |stand| {
                let round = stand
                    .rig
                    .measure(turn.warm, BURST, turn.length, turn.summary)?;
                let both = f64::midpoint(round.outward, round.inward);
                Ok([round.outward, round.inward, both])
            })?;
            run.report.compare(comparison(
                title,
                &stands,
                vec!["out", "in", "both"],
                rounds,
                &[Contender::Redirect, Contender::Nft],
                Some(["bare redirect", "bare redirect again"]),
            ));
        }
    }
    Ok(())
}
