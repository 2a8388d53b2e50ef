//! Guests configure themselves over IPv6: the host is their router on its
//! inside devices, and on no other; what it tells them is true.

use std::{
    net::Ipv6Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use etherparse::{Icmpv6Type, PacketBuilder, icmpv6::RouterAdvertisementHeader};
use tapnat_testbed::{
    Namespace,
    snapshot::Snapshot,
    topology::{Inside, Topology, UPLINK},
    traffic::{self, FrameSender},
};
use tapnat_tests::instance::{Instance, PATIENCE};

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_LINK: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// Waits until a command of a namespace says what is waited for.
fn until(namespace: &Namespace, line: &str, holds: impl Fn(&str) -> bool) -> Result<String> {
    let start = Instant::now();
    loop {
        let said = namespace.ip(line)?;
        if holds(&said) {
            return Ok(said);
        }
        ensure!(start.elapsed() < PATIENCE, "`ip {line}` says: {said}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The link-local address that a device uses, once it uses one.
fn link_local(namespace: &Namespace, device: &str) -> Result<Ipv6Addr> {
    let line = format!("-6 -oneline address show dev {device} scope link -tentative");
    let said = until(namespace, &line, |said| said.contains("fe80:"))?;
    let address = said.split_whitespace().find(|word| word.contains("fe80:"));
    let address = address.and_then(|word| word.split('/').next());
    Ok(address.context("no address")?.parse()?)
}

/// The first part of an address of that device's network, once it has one.
fn has_address(namespace: &Namespace, device: &str, beginning: &str) -> Result<()> {
    let line = format!("-6 -oneline address show dev {device} scope global -tentative");
    until(namespace, &line, |said| said.contains(beginning)).map(drop)
}

/// Says, as a router of the world would, that it is the host's way out.
fn advertise(world: &Namespace, device: &str) -> Result<()> {
    let source = link_local(world, device)?;
    let mac = world.mac_address(device)?;
    let mac: Vec<u8> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    let advertisement = RouterAdvertisementHeader {
        cur_hop_limit: 64,
        managed_address_config: false,
        other_config: false,
        router_lifetime: 1800,
    };
    let mac: [u8; 6] = mac.as_slice().try_into()?;
    let builder = PacketBuilder::ethernet2(mac, ALL_NODES_LINK)
        .ipv6(source.octets(), ALL_NODES.octets(), 255)
        .icmpv6(Icmpv6Type::RouterAdvertisement(advertisement));
    let timers = [0; 8];
    let mut frame = Vec::new();
    builder.write(&mut frame, &timers)?;
    FrameSender::open(world, device)?.send(&frame)
}

#[test]
fn the_host_is_a_router_on_its_inside_devices_alone() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6().build()?;
    let host = &topology.host;
    for device in [UPLINK, "veth0"] {
        link_local(host, device)?;
    }
    let instance = Instance::new(host);
    let before = Snapshot::take(host, &instance.pins())?;
    let inside = topology.guests[0].inside();
    let mut process = instance.start(&["--inside", &inside, "--uplink", UPLINK])?;
    let address = host.ip("-6 -oneline address show dev veth0 scope global")?;
    ensure!(
        address.contains("fd00:7a70::1/64") && !address.contains("tentative"),
        "{address}"
    );
    for (setting, value) in [
        ("veth0.forwarding", "1"),
        ("veth0.accept_ra", "0"),
        ("all.forwarding", "0"),
        ("uplink0.forwarding", "0"),
        ("uplink0.accept_ra", "1"),
    ] {
        let is = host.read_sysctl(&format!("net.ipv6.conf.{setting}"))?;
        ensure!(is == value, "{setting} is {is}");
    }
    let gateway = topology.guests[0].ipv6.context("there is IPv6")?.1;
    let ping = traffic::ping(&topology.guests[0].namespace, gateway.into(), 1, &[])?;
    ensure!(ping.received == 1, "{}", ping.output);

    // What is on the device stays there while it is down, as that of IPv4 does.
    host.ip("link set veth0 down")?;
    host.ip("link set veth0 up")?;
    has_address(host, "veth0", "fd00:7a70::1/64")?;

    let status = process.terminate(PATIENCE)?;
    ensure!(status.success(), "{status}: {}", process.stderr());
    link_local(host, "veth0")?;
    let after = Snapshot::take(host, &instance.pins())?;
    if let Some(difference) = before.difference(&after) {
        anyhow::bail!("the host is not as it was:\n{difference}");
    }
    Ok(())
}

#[test]
fn the_host_keeps_the_way_out_that_a_router_told_it() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6().build()?;
    let host = &topology.host;
    host.ip("-6 route delete default")?;
    link_local(host, UPLINK)?;
    advertise(&topology.world, "downlink0")?;
    let default = "-6 route show default";
    let route = until(host, default, |said| said.contains("proto ra"))?;
    let instance = Instance::new(host);
    let inside = topology.guests[0].inside();
    let pattern = "later*=10.1.0.1/24,fd00:7a70:1::1/64";
    let _process = instance.start(&["--inside", &inside, "--inside", pattern])?;
    let same = |when| -> Result<()> {
        let now = host.ip(default)?;
        let settled = |said: &str| said.split("expires").next().map(str::to_owned);
        ensure!(settled(&now) == settled(&route), "{when}: {now}");
        let accepts = host.read_sysctl("net.ipv6.conf.uplink0.accept_ra")?;
        ensure!(accepts == "1", "{when}: accept_ra is {accepts}");
        Ok(())
    };
    ensure!(host.read_sysctl("net.ipv6.conf.veth0.forwarding")? == "1");
    same("at the start")?;
    host.add_veth("later0", &topology.world, "later0")?;
    let start = Instant::now();
    while host.read_sysctl("net.ipv6.conf.later0.forwarding")? != "1" {
        ensure!(start.elapsed() < PATIENCE, "later0 is not served");
        thread::sleep(Duration::from_millis(20));
    }
    same("with a device that came later")?;
    Ok(())
}
