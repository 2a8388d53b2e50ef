//! Another build of the program takes over while packets pass: a newer one, and
//! the older one again. One whose tables are others refuses, and ends the sessions
//! only when it is told to.
//!
//! `cargo xtask test upgrade` makes the other builds, from sources in which some
//! lines are others.

use std::{env, ffi::OsString, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    process::Process,
    topology::{Inside, Topology, WORLD_ADDRESSES},
    traffic::{
        TcpReflector, TcpSession, UdpReflector, pattern, ping, reflect_udp, start_pings, udp_socket,
    },
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    world::server,
};

const ARGUMENTS: [&str; 2] = ["--inside", "veth0=10.0.0.1/24"];

/// A path that `cargo xtask test upgrade` sets.
fn build(variable: &str) -> Result<OsString> {
    env::var_os(variable)
        .with_context(|| format!("{variable} is not set: run `cargo xtask test upgrade`"))
}

fn kill(process: &mut Process) -> Result<()> {
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    Ok(())
}

#[test]
#[ignore = "takes other builds: `cargo xtask test upgrade`"]
fn no_packet_is_lost_when_another_build_takes_over() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    let guest = &topology.guests[0];
    let builds = [build("TAPNAT_BIN")?, build("TAPNAT_NEXT_BIN")?];
    let mut instance = Instance::new(&topology.host);
    let mut process = instance.start(&ARGUMENTS)?;
    let version = |instance: &Instance| instance.version();
    let first = version(&instance)?;

    let tcp = TcpReflector::start(&topology.world, server(1, 7))?;
    let udp = UdpReflector::start(&topology.world, server(0, 7))?;
    let mut session = TcpSession::open(&guest.namespace, None, tcp.address())?;
    let socket = udp_socket(&guest.namespace, (guest.address, 40_000).into())?;
    let seen = reflect_udp(&socket, udp.address(), b"before")?;
    let target = WORLD_ADDRESSES[0].into();
    let mut pings = start_pings(&guest.namespace, target, 1500, Duration::from_millis(5))?;
    let mut times = 0;
    for program in builds.iter().cycle().skip(1) {
        if !pings.is_running() {
            break;
        }
        times += 1;
        kill(&mut process)?;
        session.exchange(b"without a process")?;
        instance.use_program(program);
        process = instance.start(&ARGUMENTS)?;
        ensure!(
            (version(&instance)? == first) == (times % 2 == 0),
            "it is not another version"
        );
        session.exchange(&pattern(100_000))?;
        ensure!(
            reflect_udp(&socket, udp.address(), b"after")? == seen,
            "the flow has another outside endpoint"
        );
        let new = ping(&guest.namespace, server(1, 0).ip(), 1, &[])?;
        ensure!(new.received == 1, "a new session: {}", new.output);
    }
    ensure!(times >= 2, "there was no time to go back");
    let lost = pings.lost()?;
    ensure!(lost.is_empty(), "{lost:?}");
    println!("{times} times, 1500 packets at 200 a second, none lost");
    Ok(())
}

#[test]
#[ignore = "takes other builds: `cargo xtask test upgrade`"]
fn a_build_with_other_tables_refuses_until_it_may_begin_anew() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    let guest = &topology.guests[0];
    let builds = [build("TAPNAT_BIN")?, build("TAPNAT_OTHER_LAYOUT_BIN")?];
    let mut instance = Instance::new(&topology.host);
    let udp = UdpReflector::start(&topology.world, server(0, 7))?;
    let socket = udp_socket(&guest.namespace, (guest.address, 40_000).into())?;
    let reflect = |what: &[u8]| reflect_udp(&socket, udp.address(), what);
    for [present, other] in [[&builds[0], &builds[1]], [&builds[1], &builds[0]]] {
        instance.use_program(present);
        let mut process = instance.start(&[&ARGUMENTS[..], &["--fresh"]].concat())?;
        let seen = reflect(b"before")?;
        kill(&mut process)?;

        instance.use_program(other);
        let refused = instance.command("run")?.args(ARGUMENTS).output()?;
        ensure!(
            !refused.status.success() && refused.stderr.contains("--fresh"),
            "{refused:?}"
        );
        // Nothing is read as what it is not.
        for verb in ["flows", "mappings", "status", "guests", "metrics"] {
            let refused = instance.command(verb)?.output()?;
            ensure!(
                !refused.status.success() && refused.stderr.contains("another version"),
                "{verb}: {refused:?}"
            );
        }
        // And what was there goes on.
        ensure!(reflect(b"after the refusal")? == seen, "the flow was lost");

        let mut process = instance.start(&[&ARGUMENTS[..], &["--fresh"]].concat())?;
        reflect(b"anew")?;
        let status = instance.ask_json("status")?;
        ensure!(status["tables"]["mappings"]["used"] == 1, "{status}");
        kill(&mut process)?;
        // The one before takes it away.
        instance.use_program(present);
        instance.ask("down", &[])?;
        ensure!(!instance.pins().exists(), "pins are left");
    }
    Ok(())
}
