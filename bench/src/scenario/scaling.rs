//! How the rate goes with the number of flows and of processors. On one processor both directions
//! take turns; on two each direction has one of its own, at the same time, as when one serves the
//! tap's queue and another the uplink's.

use anyhow::Result;

use super::{
    Run, contestants,
    established::{MANY, Turn},
};
use crate::{
    contender::{Contender, Stand, Wish},
    packets::Protocol,
    report::Comparison,
    rig::{Flows, Round},
    rounds::interleave,
    statistics::Better,
};

/// Packets sent in one go, a direction.
const BURST: u32 = 65_536;
/// A thousand nanoseconds a packet are a million packets a second.
const NANOSECONDS: f64 = 1e3;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    let contenders = [
        Contender::Redirect,
        Contender::Nft,
        Contender::Tapnat,
        Contender::RedirectAgain,
    ];
    for count in [1000, 10_000, 100_000, 1_000_000] {
        let title = format!("UDP of {count} flows");
        if !run.wants(&title) || (run.effort.quick && count > MANY && run.case.is_empty()) {
            continue;
        }
        let wish = Wish {
            max_sessions: (count + count / 5).max(131_072),
            ..Wish::default()
        };
        let mut stands = Stand::build_all(&contenders, &wish)?;
        let flows = Flows {
            protocol: Protocol::Udp,
            count,
        };
        for stand in &mut stands {
            stand.rig.open(flows)?;
        }
        let turn = Turn::of(count, run);
        let rounds = interleave(&mut stands, turn.rounds, |stand| {
            let rig = &stand.rig;
            let one = rig.measure(turn.warm, BURST, turn.length, turn.summary)?;
            let two = rig.measure_side_by_side(turn.warm, BURST, turn.length, turn.summary)?;
            Ok([rate_on_one(one), rate_on_two(two)])
        })?;
        run.report.compare(Comparison {
            title,
            unit: "million packets a second",
            better: Better::Higher,
            series: vec!["1 CPU", "2 CPUs"],
            contenders: contestants(contenders.iter().map(ToString::to_string), rounds),
            references: vec![Contender::Redirect.to_string(), Contender::Nft.to_string()],
            control: Some([Contender::Redirect, Contender::RedirectAgain].map(|it| it.to_string())),
        });
    }
    Ok(())
}

/// One processor that does both directions' packets in turn.
fn rate_on_one(round: Round) -> f64 {
    NANOSECONDS / f64::midpoint(round.outward, round.inward)
}

/// Two, each with a direction of its own.
fn rate_on_two(round: Round) -> f64 {
    NANOSECONDS / round.outward + NANOSECONDS / round.inward
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_that_disturb_each_other_in_nothing_have_twice_the_rate() {
        let round = Round {
            outward: 500.0,
            inward: 500.0,
        };
        assert!((rate_on_one(round) - 2.0).abs() < 1e-9);
        assert!((rate_on_two(round) - 4.0).abs() < 1e-9);
    }
}
