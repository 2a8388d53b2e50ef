//! The memory that a flow takes in the kernel: of tapnat's tables, which are reserved at once, and of
//! tracked connections, which are not.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use tapnat_common::abi::maps;

use super::Run;
use crate::{
    contender::{Contender, Stand, Wish},
    packets::Protocol,
    report::Facts,
    rig::Flows,
};

/// Flows to make room for, and to open.
const FLOWS: u32 = 200_000;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    let wish = Wish {
        max_sessions: FLOWS,
        ..Wish::default()
    };
    let tapnat = Stand::build(Contender::Tapnat, &wish)?;
    tables(run, &tapnat)?;
    drop(tapnat);

    let mut rows = Vec::new();
    for contender in [Contender::Tapnat, Contender::Nft] {
        let before = kernel_memory()?;
        let mut stand = Stand::build(contender, &wish)?;
        let empty = kernel_memory()?;
        stand.rig.open(Flows {
            protocol: Protocol::Tcp,
            count: FLOWS,
        })?;
        let full = kernel_memory()?;
        let each = |from: i64, to: i64| format!("{}", (to - from) / i64::from(FLOWS));
        rows.push(vec![
            contender.to_string(),
            each(before, empty),
            each(empty, full),
            each(before, full),
        ]);
    }
    let slab = fs::read_to_string("/proc/slabinfo").context("cannot read /proc/slabinfo")?;
    let object = slab
        .lines()
        .find(|line| line.starts_with("nf_conntrack "))
        .and_then(|line| line.split_whitespace().nth(3))
        .unwrap_or("?");
    run.report.state(Facts {
        title: format!("growth of the kernel's memory, bytes for each of {FLOWS} TCP flows"),
        columns: ["", "at the start", "as flows open", "together"]
            .map(str::to_owned)
            .to_vec(),
        rows,
        remark: Some(format!(
            "an nf_conntrack object is {object} bytes, its NAT data and its share of the hash table \
             not counted. What else the machine does shows here too"
        )),
    });
    Ok(())
}

/// What each table reserves.
fn tables(run: &mut Run<'_>, stand: &Stand) -> Result<()> {
    let tapnat = stand.installed.tapnat.as_ref().context("no tapnat")?;
    let directory = tapnat.instance.pins().join("maps");
    let mut rows = Vec::new();
    let mut sum = 0;
    for name in maps::all().filter(|name| *name != maps::STAGES) {
        let path = directory.join(name);
        let map =
            MapInfo::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let reserved = locked(&map)?;
        sum += reserved;
        rows.push(vec![
            (*name).to_owned(),
            map.max_entries().to_string(),
            reserved.to_string(),
            format!("{:.1}", reserved as f64 / f64::from(FLOWS)),
        ]);
    }
    rows.push(vec![
        "together".to_owned(),
        String::new(),
        sum.to_string(),
        format!("{:.1}", sum as f64 / f64::from(FLOWS)),
    ]);
    run.report.state(Facts {
        title: format!("tapnat's tables with --max-sessions {FLOWS}"),
        columns: ["table", "entries", "bytes", "bytes a session"]
            .map(str::to_owned)
            .to_vec(),
        rows,
        remark: None,
    });
    Ok(())
}

/// Bytes that the kernel says it has set aside for a table.
fn locked(map: &MapInfo) -> Result<u64> {
    let descriptor = map.fd()?;
    let path = format!("/proc/self/fdinfo/{}", descriptor.as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .with_context(|| format!("{path} tells no memory"))
}

/// Bytes in use that are neither a process's nor a file's.
fn kernel_memory() -> Result<i64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kilobytes = |name: &str| -> Result<i64> {
        text.lines()
            .find_map(|line| {
                let value = line.strip_prefix(name)?.strip_prefix(':')?;
                value.trim().strip_suffix(" kB")?.parse().ok()
            })
            .with_context(|| format!("/proc/meminfo tells no {name}"))
    };
    let mut sum = 0;
    for name in ["Slab", "Percpu", "VmallocUsed"] {
        sum += kilobytes(name)?;
    }
    Ok(sum * 1024)
}
