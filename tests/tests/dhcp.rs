//! Guests get their addresses from tapnat, and reach the world with nothing but
//! what they were told. The client is busybox's.

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    process::Output,
    topology::{GUEST_DEVICE, Inside, Topology},
    traffic,
};
use tapnat_tests::world::{World, server};

/// What the client runs: it says what it was told, in one line.
const SCRIPT: &str = "#!/bin/sh
[ \"$1\" = bound ] && echo \"bound ip=$ip subnet=$subnet router=$router dns=$dns mtu=$mtu domain=$domain lease=$lease\"
exit 0
";

/// A script in a file of its own.
struct Script(PathBuf);

impl Script {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tapnat-dhcp-{}-{name}", std::process::id()));
        fs::write(&path, SCRIPT)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // Nobody misses it.
        let _ = fs::remove_file(&self.0);
    }
}

/// Asks as a guest, and gives up soon.
fn ask(world: &World, guest: usize, name: &str, options: &[&str]) -> Result<Output> {
    let script = Script::new(name)?;
    let script = script.0.to_str().context("a path")?;
    let arguments = [
        "udhcpc",
        "-f",
        "-n",
        "-q",
        "-t",
        "3",
        "-T",
        "1",
        "-i",
        GUEST_DEVICE,
        "-s",
        script,
    ];
    let client = world.guest(guest).namespace.command("busybox");
    client.args(arguments).args(options).output()
}

/// What a guest was told, by name.
fn told<'a>(output: &'a Output, name: &str) -> Result<&'a str> {
    let line = output
        .stdout
        .lines()
        .find(|line| line.starts_with("bound "));
    let line = line.with_context(|| format!("no lease: {output:?}"))?;
    line.split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .with_context(|| format!("no {name} in {line}"))
}

#[test]
fn a_guest_needs_nothing_else() -> Result<()> {
    let topology = Topology::builder()
        .inside(Inside::Veth)
        .guests(2)
        .inside_mtu(1400);
    let world = World::start(
        topology,
        &["--dns", "198.51.100.53", "--domain", "lan.example"],
    )?;
    let output = ask(&world, 0, "first", &[])?;
    let address: Ipv4Addr = told(&output, "ip")?.parse()?;
    let gateway = world.guest(0).gateway;
    ensure!(address.octets()[..3] == gateway.octets()[..3] && address != gateway);
    let expected = [
        ("subnet", "255.255.255.0"),
        ("router", "10.0.0.1"),
        ("dns", "198.51.100.53"),
        ("mtu", "1400"),
        ("domain", "lan.example"),
        ("lease", "3600"),
    ];
    for (name, value) in expected {
        ensure!(told(&output, name)? == value, "{output:?}");
    }
    // The same again, also if another one is wanted that is not the network's.
    let again = ask(&world, 0, "again", &["-r", "10.9.9.9"])?;
    ensure!(told(&again, "ip")? == address.to_string(), "{again:?}");

    let namespace = &world.guest(0).namespace;
    namespace.ip(&format!("address flush dev {GUEST_DEVICE}"))?;
    namespace.ip(&format!("address add {address}/24 dev {GUEST_DEVICE}"))?;
    namespace.ip(&format!(
        "route add default via {gateway} dev {GUEST_DEVICE}"
    ))?;
    let ping = traffic::ping(namespace, server(0, 0).ip(), 1, &[])?;
    ensure!(ping.received == 1, "{}", ping.output);

    // Each device has its own network.
    let other = ask(&world, 1, "other", &[])?;
    ensure!(told(&other, "router")? == "10.0.1.1", "{other:?}");
    Ok(())
}

#[test]
fn guests_of_a_bridge_get_addresses_of_their_own() -> Result<()> {
    let world = World::start(Topology::builder().inside(Inside::Bridge).guests(3), &[])?;
    let mut given = Vec::new();
    for guest in 0..3 {
        let output = ask(&world, guest, &format!("bridge{guest}"), &[])?;
        given.push(told(&output, "ip")?.to_owned());
    }
    given.sort_unstable();
    given.dedup();
    ensure!(given.len() == 3, "{given:?}");
    Ok(())
}

#[test]
fn nobody_is_served_who_is_not_to_be() -> Result<()> {
    let world = World::start(Topology::builder().inside(Inside::Veth), &["--no-dhcp"])?;
    let output = ask(&world, 0, "none", &[])?;
    ensure!(!output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn another_server_is_left_its_guests() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    let another = topology.host.run(|| Ok(UdpSocket::bind("0.0.0.0:67")?))?;
    let world = World::start_in(topology, &[])?;
    let said = world.said();
    ensure!(
        said.contains("another DHCP server") && said.contains("--no-dhcp"),
        "{said}"
    );
    drop(another);
    world.check_reach()
}
