//! The time in tapnat's own programs, as the kernel counts it (`kernel.bpf_stats_enabled`), and their
//! size. The clock that is read before and after every run costs more than many a program: the bare
//! redirect shows how much.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use aya::{
    maps::MapInfo,
    programs::{ProgramInfo, loaded_programs},
    sys::{Stats, enable_stats},
};
use tapnat_common::abi::maps;

use super::{Run, comparison};
use crate::{
    contender::{Contender, Stand, Wish},
    packets::{Order, Packets, Protocol, Vary, tcp_flags},
    report::Facts,
    rig::{Direction, Flows},
    rounds::interleave,
};

const BURST: u32 = 65_536;
/// New flows a turn: no more than there are free ports for them all.
const NEW: u32 = 2048;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    let _counting = enable_stats(Stats::RunTime).context("cannot count the programs' time")?;
    let contenders = Contender::among(&[Contender::Redirect, Contender::Tapnat]);
    for count in [1, 30_000] {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let title = format!("program: {} of {count} established flows", protocol.label());
            if !run.wants(&title) {
                continue;
            }
            let mut stands = Stand::build_all(&contenders, &Wish::default())?;
            for stand in &mut stands {
                stand.rig.open(Flows { protocol, count })?;
                for direction in Direction::BOTH {
                    stand.rig.burst(direction, BURST)?;
                }
            }
            let rounds = interleave(&mut stands, run.effort.rounds, |stand| {
                let [out, inward] = [
                    time_a_run(stand, Direction::Outward, BURST)?,
                    time_a_run(stand, Direction::Inward, BURST)?,
                ];
                Ok([out, inward, f64::midpoint(out, inward)])
            })?;
            let series = vec!["out", "in", "both"];
            let mut comparison = comparison(title, &stands, series, rounds, &[], None);
            comparison.unit = "ns a run";
            run.report.compare(comparison);
        }
    }
    let title = "program: first packets of TCP flows".to_owned();
    if run.wants(&title) {
        new_flows(run, title, &contenders)?;
    }
    Ok(())
}

fn new_flows(run: &mut Run<'_>, title: String, contenders: &[Contender]) -> Result<()> {
    let mut stands = Stand::build_all(contenders, &Wish::default())?;
    for stand in &mut stands {
        let packets = Packets {
            flags: tcp_flags::SYN,
            vary: Vary::Both,
            // Each run of flows is another guest's, and goes out untranslated by the redirect.
            translated_mask: Ipv4Addr::new(255, 255, 255, 0),
            ..stand
                .rig
                .packets(Direction::Outward, Protocol::Tcp, Order::Fresh)?
        };
        stand.rig.choose(&packets)?;
    }
    let rounds = interleave(&mut stands, run.effort.rounds, |stand| {
        Ok([time_a_run(stand, Direction::Outward, NEW)?])
    })?;
    let mut comparison = comparison(title, &stands, vec!["out"], rounds, &[], None);
    comparison.unit = "ns a run";
    run.report.compare(comparison);
    let stand = stands.last().context("no tapnat")?;
    sizes(run, stand)
}

/// Nanoseconds. What the program goes on to counts with it.
fn time_a_run(stand: &Stand, direction: Direction, packets: u32) -> Result<f64> {
    let program = || stand.program(direction)?.context("there is no program");
    let before = program()?;
    stand.rig.burst(direction, packets)?;
    let after = program()?;
    let time = after.run_time().saturating_sub(before.run_time());
    let runs = after.run_count() - before.run_count();
    Ok(time.as_secs_f64() * 1e9 / runs as f64)
}

/// The programs that use this tapnat's tables.
fn sizes(run: &mut Run<'_>, stand: &Stand) -> Result<()> {
    let tapnat = stand.installed.tapnat.as_ref().context("no tapnat")?;
    let path = tapnat
        .instance
        .pins()
        .join("maps")
        .join(maps::IPV4.settings);
    let settings = MapInfo::from_pin(&path)
        .with_context(|| format!("cannot open {}", path.display()))?
        .id();
    let uses = |program: &ProgramInfo| {
        program
            .map_ids()
            .is_ok_and(|ids| ids.is_some_and(|ids| ids.contains(&settings)))
    };
    let rows = loaded_programs()
        .filter_map(Result::ok)
        .filter(uses)
        .map(|program| {
            let count = |bytes: Option<u32>| {
                bytes.map_or_else(|| "?".to_owned(), |bytes| (bytes / 8).to_string())
            };
            vec![
                program.name_as_str().unwrap_or_default().to_owned(),
                count(program.size_translated()),
                program.size_jitted().to_string(),
                program
                    .verified_instruction_count()
                    .map_or_else(|| "?".to_owned(), |count| count.to_string()),
            ]
        })
        .collect();
    run.report.state(Facts {
        title: "tapnat's programs".to_owned(),
        columns: [
            "program",
            "instructions",
            "bytes of machine code",
            "instructions the verifier followed",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows,
        remark: None,
    });
    Ok(())
}
