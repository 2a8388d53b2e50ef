//! How long tapnat takes to start, to take over what a killed one left, and to deal with a million
//! flows: on the clock, and of the processor. What starts is a real-time process, as it would
//! have the clock to itself on a machine that does nothing else.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        resource::{UsageWho, getrusage},
        signal::Signal,
        time::TimeVal,
    },
    unistd::{SysconfVar, sysconf},
};

use super::Run;
use crate::{
    contender::{self, Contender, Stand, Tapnat, Wish},
    packets::Protocol,
    processor::{become_real_time, in_thread},
    report::Facts,
    rig::{Direction, Flows, Rig},
    statistics::{median, quantile},
};

const PATIENCE: Duration = Duration::from_secs(30);
/// Packets of one burst while a new process takes over.
const BURST: u32 = 8192;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    let mut rows = Vec::new();
    let repeats = if run.effort.quick { 5 } else { 20 };

    let stand = Stand::build(Contender::Tapnat, &Wish::default())?;
    starts(stand, repeats, &mut rows)?;

    let count = if run.effort.quick { 100_000 } else { 1_000_000 };
    let wish = Wish {
        max_sessions: count + count / 5,
        ..Wish::default()
    };
    let mut stand = Stand::build(Contender::Tapnat, &wish)?;
    stand.rig.open(Flows {
        protocol: Protocol::Udp,
        count,
    })?;
    with_flows(&mut stand, count, run.effort.quick, &mut rows)?;
    run.report.state(Facts {
        title: "tapnat's own time".to_owned(),
        columns: ["", "median", "quarters", "processor"]
            .map(str::to_owned)
            .to_vec(),
        rows,
        remark: Some(
            "times are on the clock; `processor` is the process's own time, in the kernel too"
                .to_owned(),
        ),
    });
    Ok(())
}

fn starts(mut stand: Stand, repeats: usize, rows: &mut Vec<Vec<String>>) -> Result<()> {
    let tapnat = stand.installed.tapnat.as_mut().context("no tapnat")?;
    let of_ipv4 = tapnat.arguments.clone();
    for argument in &mut tapnat.arguments {
        if argument.starts_with("--inside=") {
            argument.push_str(",fd00:7a70::1/64");
        }
    }
    let both = start_anew(tapnat, repeats)?;
    tapnat.arguments = of_ipv4;
    let fresh = start_anew(tapnat, repeats)?;
    let mut adopted = Vec::new();
    stand.rig.topology.pin_neighbours()?;
    stand.rig.open(Flows {
        protocol: Protocol::Udp,
        count: 1,
    })?;
    let mut sent = 0;
    for _ in 0..repeats {
        let (time, packets) = take_over(&stand.rig, tapnat)?;
        adopted.push(time);
        sent += packets;
    }
    rows.push(row("load, attach, ready", &fresh, None));
    rows.push(row("the same with IPv6, too", &both, None));
    rows.push(row(
        &format!("take over after SIGKILL ({sent} packets meanwhile, none lost)"),
        &adopted,
        None,
    ));
    Ok(())
}

/// Milliseconds of each start after an end.
fn start_anew(tapnat: &mut Tapnat, repeats: usize) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..repeats {
        tapnat.process.terminate(PATIENCE)?;
        times.push(start(tapnat)?);
        // What comes after being ready.
        thread::sleep(Duration::from_millis(300));
    }
    Ok(times)
}

fn with_flows(
    stand: &mut Stand,
    count: u32,
    quick: bool,
    rows: &mut Vec<Vec<String>>,
) -> Result<()> {
    let host = stand.rig.topology.host.clone();
    let tapnat = stand.installed.tapnat.as_mut().context("no tapnat")?;
    for format in ["", " --json"] {
        let mut times = Vec::new();
        let mut used = Duration::ZERO;
        for _ in 0..3 {
            let before = children_used()?;
            let begin = Instant::now();
            let line = format!(
                "exec \"$TAPNAT_BIN\" flows{format} --instance {} >/dev/null",
                tapnat.instance.name()
            );
            host.command("sh")
                .args(["-c", &line])
                .timeout(PATIENCE)
                .run()?;
            times.push(begin.elapsed().as_secs_f64() * 1e3);
            used = children_used()?.saturating_sub(before);
        }
        rows.push(row(
            &format!("`tapnat flows{format}` of {count}"),
            &times,
            Some(used),
        ));
    }
    let (time, packets) = take_over(&stand.rig, tapnat)?;
    rows.push(row(
        &format!("take over {count} flows after SIGKILL ({packets} packets meanwhile, none lost)"),
        &[time],
        None,
    ));
    // It walks through its tables soon after its start, and then seldom.
    for (what, seconds) in [
        ("with its first walk", 20),
        ("then", if quick { 20 } else { 60 }),
    ] {
        let length = Duration::from_secs(seconds);
        let before = process_used(tapnat.process.id())?;
        thread::sleep(length);
        let used = process_used(tapnat.process.id())?.saturating_sub(before);
        rows.push(vec![
            format!("daemon beside {count} idle flows, {what}, {seconds} s"),
            String::new(),
            String::new(),
            format!(
                "{} ms ({:.3}% of one)",
                used.as_millis(),
                used.as_secs_f64() / length.as_secs_f64() * 100.0
            ),
        ]);
    }
    Ok(())
}

/// Milliseconds until an instance that has ended is ready again.
fn start(tapnat: &mut Tapnat) -> Result<f64> {
    in_thread(|| {
        become_real_time()?;
        let begin = Instant::now();
        tapnat.process = contender::start(&tapnat.instance, &tapnat.arguments)?;
        Ok(begin.elapsed().as_secs_f64() * 1e3)
    })
}

/// Kills the process and starts another, while packets go through: milliseconds until it is ready,
/// and the packets.
fn take_over(rig: &Rig, tapnat: &mut Tapnat) -> Result<(f64, u32)> {
    tapnat.process.signal(Signal::SIGKILL)?;
    tapnat.process.wait(PATIENCE)?;
    thread::scope(|scope| {
        let next = scope.spawn(|| start(tapnat));
        let mut packets = 0;
        while !next.is_finished() {
            rig.burst(Direction::Outward, BURST)?;
            packets += BURST;
        }
        ensure!(packets > 0, "nothing was sent meanwhile");
        match next.join() {
            Ok(time) => Ok((time?, packets)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn row(name: &str, milliseconds: &[f64], processor: Option<Duration>) -> Vec<String> {
    let [low, high] = [0.25, 0.75].map(|share| quantile(milliseconds, share));
    vec![
        name.to_owned(),
        format!("{:.0} ms", median(milliseconds)),
        format!("{low:.0} to {high:.0} ms"),
        processor.map_or_else(String::new, |used| format!("{} ms", used.as_millis())),
    ]
}

/// The processor's time that finished children have used.
fn children_used() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("cannot read the children's use")?;
    let seconds = |time: TimeVal| {
        Duration::from_secs(time.tv_sec().cast_unsigned())
            + Duration::from_micros(time.tv_usec().cast_unsigned())
    };
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// The processor's time that a process has used, to within a tick of the kernel's.
fn process_used(process: u32) -> Result<Duration> {
    let path = format!("/proc/{process}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The name, in brackets, may hold anything; utime and stime are the 14th and 15th fields, and
    // the first after the name is the third.
    let (_, rest) = text.rsplit_once(')').context("a process without a name")?;
    let ticks: u64 = rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let a_second = sysconf(SysconfVar::CLK_TCK)
        .context("cannot read the kernel's tick")?
        .and_then(|ticks| u64::try_from(ticks).ok())
        .context("the kernel has no tick")?;
    Ok(Duration::from_millis(ticks * 1000 / a_second))
}
