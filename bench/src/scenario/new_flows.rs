//! The time that the first packet of a flow takes: a mapping and a session are made, or a connection
//! is tracked and a port is found.

use std::net::Ipv4Addr;

use anyhow::Result;
use tapnat_testbed::topology::HOST_ADDRESS;

use super::{Run, comparison, contestants, reference_names};
use crate::{
    contender::{Contender, Stand, Wish},
    packets::{FIRST_PORT, Order, Packets, Protocol, Vary},
    report::Comparison,
    rig::Direction,
    rounds::interleave,
    statistics::Better,
};

/// New flows a turn, with ports in plenty.
const MANY: u32 = 8192;
/// The ports that there are when few are to be left: a Fibonacci number of them, as then steps of a
/// golden ratio leave the last ones evenly spread.
const NARROW: u32 = 10_946;
/// New flows a turn, with few ports left.
const FEW: u32 = 48;
/// Turns after which half of those few are taken too.
const FEW_TURNS: usize = (NARROW / 20 / 2 / FEW) as usize;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        let title = format!("first packets of {} flows", protocol.label());
        if run.wants(&title) {
            with_ports_in_plenty(run, title, protocol)?;
        }
        let title = format!(
            "first packets of {} flows, 95% of the ports taken",
            protocol.label()
        );
        if run.wants(&title) {
            with_few_ports_left(run, title, protocol)?;
        }
    }
    Ok(())
}

fn flags(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Udp => 0,
        Protocol::Tcp => crate::packets::tcp_flags::SYN,
    }
}

/// Every flow has an inside endpoint of its own, and each run of them a guest and a remote of its
/// own: netfilter finds every port free at once with a single address; tapnat, whose mappings do not
/// depend on the remote, gets a pool of addresses and finds most of them free.
fn with_ports_in_plenty(run: &mut Run<'_>, title: String, protocol: Protocol) -> Result<()> {
    let contenders = Contender::among(&[
        Contender::Redirect,
        Contender::Forwarding,
        Contender::Nft,
        Contender::IptablesLegacy,
        Contender::Tapnat,
        Contender::RedirectAgain,
    ]);
    let [a, b, c, _] = HOST_ADDRESS.octets();
    let pool = (2..18).map(|last| Ipv4Addr::new(a, b, c, last)).collect();
    let wish = Wish {
        outside: pool,
        // Half as many mappings, and each of these flows has one to itself.
        max_sessions: 524_288,
        ..Wish::default()
    };
    let mut stands = Stand::build_all(&contenders, &wish)?;
    for stand in &mut stands {
        let packets = Packets {
            flags: flags(protocol),
            vary: Vary::Both,
            translated_mask: Ipv4Addr::new(255, 255, 255, 0),
            ..stand
                .rig
                .packets(Direction::Outward, protocol, Order::Fresh)?
        };
        stand.rig.choose(&packets)?;
    }
    let rounds = interleave(&mut stands, run.effort.rounds, |stand| {
        let sent = stand.rig.burst(Direction::Outward, MANY)?;
        Ok([sent.each.as_secs_f64() * 1e9])
    })?;
    run.report.compare(comparison(
        title,
        &stands,
        vec!["out"],
        rounds,
        &[Contender::Redirect, Contender::Nft],
        Some(["bare redirect", "bare redirect again"]),
    ));
    Ok(())
}

/// All flows go to one remote, so that netfilter too needs a port of its own for each. One guest has
/// taken 19 of 20 ports, evenly spread; the others want ports that are nearly all taken.
fn with_few_ports_left(run: &mut Run<'_>, title: String, protocol: Protocol) -> Result<()> {
    let contenders = [Contender::Nft, Contender::IptablesLegacy, Contender::Tapnat];
    let contenders = Contender::among(&contenders);
    let mut all = vec![vec![Vec::new()]; contenders.len()];
    for _ in 0..run.effort.rounds.div_ceil(FEW_TURNS) {
        let mut stands = contenders
            .iter()
            .map(|contender| nearly_full(*contender, protocol))
            .collect::<Result<Vec<_>>>()?;
        let rounds = interleave(&mut stands, FEW_TURNS, |stand| {
            let sent = stand.rig.burst(Direction::Outward, FEW)?;
            Ok([sent.each.as_secs_f64() * 1e9])
        })?;
        for (all, more) in all.iter_mut().flatten().zip(rounds.into_iter().flatten()) {
            all.extend(more);
        }
    }
    let names = contenders.iter().map(ToString::to_string);
    run.report.compare(Comparison {
        title,
        unit: "ns a packet",
        better: Better::Lower,
        series: vec!["out"],
        contenders: contestants(names, all),
        references: reference_names(&contenders, &[Contender::Nft]),
        control: None,
    });
    Ok(())
}

fn nearly_full(contender: Contender, protocol: Protocol) -> Result<Stand> {
    let wish = Wish {
        ports: Some((protocol, FIRST_PORT..=FIRST_PORT + (NARROW - 1) as u16)),
        ..Wish::default()
    };
    let mut stand = Stand::build(contender, &wish)?;
    let first = Packets {
        flags: flags(protocol),
        ..stand
            .rig
            .packets(Direction::Outward, protocol, Order::Mixed(NARROW))?
    };
    stand.rig.choose(&first)?;
    stand.rig.burst(Direction::Outward, NARROW / 20 * 19)?;
    stand.rig.choose(&Packets {
        guest: Ipv4Addr::from_bits(first.guest.to_bits() + 1),
        order: Order::Fresh,
        vary: Vary::Guest,
        ..first
    })?;
    Ok(stand)
}
