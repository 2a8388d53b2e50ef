//! The time that a packet of an established flow takes, from the driver that received it to the
//! driver at the other end of the wire.

use std::time::Duration;

use anyhow::Result;

use crate::{
    contender::{Built, Contender},
    packets::Protocol,
    rig::Flows,
    statistics::{Ratio, minimum},
};

const BURST: u32 = 65_536;

pub fn run(quick: bool) -> Result<()> {
    let contenders = if quick {
        &[
            Contender::Redirect,
            Contender::Forwarding,
            Contender::Nft,
            Contender::Tapnat,
            Contender::Control,
        ][..]
    } else {
        &[
            Contender::Redirect,
            Contender::Forwarding,
            Contender::Nft,
            Contender::Tapnat,
            Contender::IptablesLegacy,
            Contender::IptablesNft,
            Contender::Control,
        ]
    };
    let (rounds, length) = if quick {
        (6, Duration::from_millis(150))
    } else {
        (20, Duration::from_millis(400))
    };
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        for count in [1, 30_000] {
            let flows = Flows { protocol, count };
            println!("{protocol:?}, {count} flows");
            let mut built = contenders
                .iter()
                .map(|contender| contender.build(131_072))
                .collect::<Result<Vec<Built>>>()?;
            for built in &mut built {
                built.rig.open(flows)?;
            }
            let mut times = vec![[Vec::new(), Vec::new(), Vec::new()]; built.len()];
            for number in 0..rounds {
                let mut order: Vec<_> = (0..built.len()).collect();
                if number % 2 == 1 {
                    order.reverse();
                }
                for index in order {
                    let round = built[index].rig.measure(count.max(BURST), BURST, length)?;
                    times[index][0].push(round.outward);
                    times[index][1].push(round.inward);
                    times[index][2].push(f64::midpoint(round.outward, round.inward));
                }
            }
            for (built, mine) in built.iter().zip(&times) {
                let to_bare = Ratio::new(&mine[2], &times[0][2]);
                let to_nft = Ratio::new(&mine[2], &times[2][2]);
                println!(
                    "{:20} out {:6.1} in {:6.1} both {:6.1} ns | to bare {:.3} ({:.3} {:.3}..{:.3}) | to nft {:.3} ({:.3})",
                    built.contender,
                    minimum(&mine[0]),
                    minimum(&mine[1]),
                    minimum(&mine[2]),
                    to_bare.of_minima,
                    to_bare.median,
                    to_bare.spread[0],
                    to_bare.spread[1],
                    to_nft.of_minima,
                    to_nft.median
                );
            }
        }
    }
    Ok(())
}
