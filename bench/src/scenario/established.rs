//! The time that a packet of an established flow takes, from the driver that received it to the
//! driver at the other end of the wire.

use anyhow::Result;

use super::{Run, comparison};
use crate::{
    contender::{Contender, Stand, Wish},
    packets::Protocol,
    rig::Flows,
    rounds::interleave,
};

/// Packets sent in one go, a direction.
const BURST: u32 = 65_536;
/// With more flows than this, not even one packet each comes before every turn.
const WARM: u32 = 131_072;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    let mut contenders = vec![Contender::Redirect, Contender::Forwarding, Contender::Nft];
    if !run.effort.quick {
        contenders.extend([Contender::IptablesLegacy, Contender::IptablesNft]);
    }
    contenders.extend([Contender::Tapnat, Contender::RedirectAgain]);
    for count in [1, 30_000, 1_000_000] {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let title = format!("{} of {count} established flows", protocol.label());
            if !run.wants(&title) || (run.effort.quick && count > WARM && run.case.is_empty()) {
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
            let warm = if count > WARM {
                BURST
            } else {
                count.max(BURST)
            };
            let rounds = interleave(&mut stands, run.effort.rounds, |stand| {
                let round = stand.rig.measure(warm, BURST, run.effort.length)?;
                let both = f64::midpoint(round.outward, round.inward);
                Ok([round.outward, round.inward, both])
            })?;
            run.report.compare(comparison(
                title,
                &stands,
                vec!["out", "in", "both"],
                rounds,
                &["bare redirect", "nft masquerade"],
                Some(["bare redirect", "bare redirect again"]),
            ));
        }
    }
    Ok(())
}
