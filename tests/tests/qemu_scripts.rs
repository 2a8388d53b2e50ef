//! What QEMU runs when a guest's tap comes and goes.

use std::{net::UdpSocket, os::unix::fs::symlink};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    process::Output,
    topology::{Inside, Tap, Topology},
    traffic,
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    world::server,
};

fn topology(guests: u8) -> Result<Topology> {
    Topology::builder()
        .inside(Inside::Tap(Tap::default()))
        .guests(guests)
        .build()
}

fn script(instance: &Instance, verb: &str, arguments: &[&str]) -> Result<Output> {
    let command = instance.command(verb)?.args(arguments);
    command.timeout(PATIENCE).output()
}

fn check_reach(guest: &Namespace) -> Result<()> {
    let ping = traffic::ping(guest, server(0, 0).ip(), 1, &[])?;
    ensure!(ping.received == 1, "{}", ping.output);
    Ok(())
}

#[test]
fn an_instance_comes_with_the_first_guest_and_goes_with_the_last() -> Result<()> {
    let topology = topology(2)?;
    let instance = Instance::new(&topology.host);
    for (tap, guest) in ["tap0", "tap1"].into_iter().zip(&topology.guests) {
        let output = script(&instance, "qemu-ifup", &[tap])?;
        ensure!(output.status.success(), "{output:?}");
        check_reach(&guest.namespace)?;
    }
    let output = script(&instance, "qemu-ifdown", &["tap0"])?;
    ensure!(output.status.success(), "{output:?}");
    topology.host.ip("link delete tap0")?;
    check_reach(&topology.guests[1].namespace)?;
    let output = script(&instance, "qemu-ifdown", &["tap1"])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(!instance.pins().exists(), "it goes on");
    Ok(())
}

#[test]
fn an_instance_that_runs_is_joined_and_left() -> Result<()> {
    let topology = topology(1)?;
    let instance = Instance::new(&topology.host);
    let _process = instance.start(&["--inside", "tap0=10.0.0.1/24"])?;
    let output = script(&instance, "qemu-ifup", &["tap0"])?;
    ensure!(output.status.success(), "{output:?}");
    let output = script(&instance, "qemu-ifdown", &["tap0"])?;
    ensure!(output.status.success(), "{output:?}");
    check_reach(&topology.guests[0].namespace)?;
    let output = script(&instance, "qemu-ifup", &["tap7"])?;
    ensure!(
        !output.status.success() && output.stderr.contains("there is no device tap7"),
        "{output:?}"
    );
    // One that it does not serve.
    topology.host.ip("tuntap add tap7 mode tap")?;
    let output = script(&instance, "qemu-ifup", &["tap7"])?;
    ensure!(
        !output.status.success() && output.stderr.contains("does not serve tap7"),
        "{output:?}"
    );
    Ok(())
}

#[test]
fn what_is_wrong_is_told() -> Result<()> {
    let topology = topology(1)?;
    topology.host.ip("route delete default")?;
    let instance = Instance::new(&topology.host);
    let output = script(&instance, "qemu-ifup", &["tap0"])?;
    ensure!(
        !output.status.success() && output.stderr.contains("--uplink"),
        "{output:?}"
    );
    ensure!(output.stderr.lines().count() == 1, "{output:?}");
    Ok(())
}

#[test]
fn what_the_instance_says_at_its_start_is_told() -> Result<()> {
    let topology = topology(1)?;
    let _another = topology.host.run(|| Ok(UdpSocket::bind("0.0.0.0:67")?))?;
    let instance = Instance::new(&topology.host);
    let output = script(&instance, "qemu-ifup", &["tap0"])?;
    ensure!(
        output.status.success() && output.stderr.contains("another DHCP server"),
        "{output:?}"
    );
    check_reach(&topology.guests[0].namespace)
}

#[test]
fn tapnat_may_be_the_script_itself() -> Result<()> {
    let topology = topology(1)?;
    let instance = Instance::new(&topology.host);
    let program = std::env::var_os("TAPNAT_BIN").context("run with `cargo xtask test`")?;
    let directory = std::env::temp_dir().join(format!("tapnat-scripts-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let link = directory.join("qemu-ifup");
    symlink(program, &link)?;
    let command = topology.host.command(&link);
    let output = command
        .args(["tap0", "--instance", instance.name()])
        .timeout(PATIENCE)
        .output();
    std::fs::remove_dir_all(&directory)?;
    let output = output?;
    ensure!(output.status.success(), "{output:?}");
    check_reach(&topology.guests[0].namespace)
}
