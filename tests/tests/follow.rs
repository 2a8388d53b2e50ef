//! The running instance follows its network: addresses and MTUs that change
//! under it are used at once.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tapnat_testbed::{
    Namespace, packet,
    topology::{HOST_ADDRESS, Inside, Topology},
};
use tapnat_tests::{
    both_families,
    connection::{Connection, Flags},
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
    wires::Wires,
    world::World,
};

fn device<'a>(status: &'a Value, name: &str) -> &'a Value {
    let devices = status["devices"].as_array();
    devices
        .and_then(|devices| devices.iter().find(|device| device["name"] == name))
        .unwrap_or(&Value::Null)
}

#[test]
fn the_outside_address_is_that_which_the_uplink_has() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    instance.until(|status| status["outside_addresses"] == json!([HOST_ADDRESS]))?;

    world.host.ip("address add 198.51.100.77/24 dev uplink0")?;
    world.host.ip("link set uplink0 mtu 1400")?;
    instance.until(|status| device(status, "uplink0")["mtu"] == 1400)?;
    // One that is still there is not given up for another.
    instance.until(|status| status["outside_addresses"] == json!([HOST_ADDRESS]))?;

    world.host.ip("address flush dev uplink0")?;
    instance.until(|status| status["outside_addresses"] == json!([]))?;
    ensure!(
        process.stderr().contains("uplink0 lost its IPv4 address"),
        "{}",
        process.stderr()
    );

    world.host.ip("address add 198.51.100.99/24 dev uplink0")?;
    instance.until(|status| status["outside_addresses"] == json!(["198.51.100.99"]))
}

/// Datagrams that sockets of this network namespace had no room for.
fn lost_events(host: &Namespace) -> Result<u64> {
    let sockets = host.exec("cat /proc/self/net/netlink")?;
    let drops = sockets.lines().skip(1).map(|line| {
        let drops = line.split_whitespace().nth(8).context("no drops")?;
        Ok(drops.parse::<u64>()?)
    });
    drops.sum()
}

#[test]
fn what_the_kernel_had_no_room_to_tell_is_followed_all_the_same() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let mut process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    instance.until(|status| status["outside_addresses"] == json!([HOST_ADDRESS]))?;
    process.signal(Signal::SIGSTOP)?;
    let mut changes = "link add br9 type bridge\n".to_owned();
    for number in 0..2000 {
        let address = format!("10.99.{}.{}/32", number / 250, number % 250);
        writeln!(changes, "address add {address} dev br9")?;
        writeln!(changes, "address del {address} dev br9")?;
    }
    world
        .host
        .command("ip")
        .args(["-batch", "-"])
        .stdin(changes)
        .timeout(PATIENCE)
        .run()?;
    ensure!(lost_events(&world.host)? > 0, "all of it was told");
    // Nor is this, which comes last.
    world.host.ip("address flush dev uplink0")?;
    world.host.ip("address add 198.51.100.99/24 dev uplink0")?;
    process.signal(Signal::SIGCONT)?;
    instance.until(|status| status["outside_addresses"] == json!(["198.51.100.99"]))?;
    // And it goes on to listen.
    world.host.ip("address flush dev uplink0")?;
    instance.until(|status| status["outside_addresses"] == json!([]))
}

#[test]
fn outside_addresses_that_were_given_stay() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let given = [
        "--inside",
        "veth0=10.0.0.1/24",
        "--outside-address",
        "203.0.113.5,203.0.113.6",
    ];
    let _process = instance.start(&given)?;
    let as_given =
        |status: &Value| status["outside_addresses"] == json!(["203.0.113.5", "203.0.113.6"]);
    instance.until(as_given)?;
    world.host.ip("address flush dev uplink0")?;
    world.host.ip("link set veth0 mtu 1300")?;
    instance.until(|status| device(status, "veth0")["mtu"] == 1300)?;
    instance.until(as_given)
}

/// The uplink is without an address, and with it goes its route.
fn lose_address(world: &World) -> Result<()> {
    let host = &world.topology.host;
    host.ip("address flush dev uplink0 scope global")?;
    if world.family() == V6 {
        // A route of IPv6 stays, unless the router that gave both is gone.
        host.ip("-6 route del default dev uplink0")?;
    }
    world
        .instance
        .until(|status| status["outside_addresses"] == json!([]))
}

/// As a DHCP client or a PPP daemon would.
fn give_address(world: &World, address: IpAddr) -> Result<()> {
    let host = &world.topology.host;
    let gateway = world.family().gateway();
    let length = match world.family() {
        V4 => 24,
        V6 => 64,
    };
    host.ip(&format!("address add {address}/{length} dev uplink0"))?;
    host.ip(&format!("route add default via {gateway} dev uplink0"))?;
    world
        .instance
        .until(|status| status["outside_addresses"] == json!([address]))
}

/// Checks that nothing went to the world, whatever its source.
fn check_silence(wires: &Wires, world: &World, guest: usize, port: u16) -> Result<()> {
    let sent = packet::udp(wires.inside(guest, port), wires.family.remote(0, 53)).payload(b"lost?");
    wires.guests[guest].send(&sent)?;
    // There is no way for a marker either; the host tells the guest so.
    let told = wires.guests[guest].receive()?;
    ensure!(told.icmp_kind().is_some(), "{told:?}");
    let status = world.instance.ask_json("status")?;
    ensure!(status["outside_addresses"] == json!([]), "{status}");
    Ok(())
}

fn flows_of_a_lost_address_end_and_begin_anew_with_the_next(family: Family) -> Result<()> {
    let (world, wires) = family.wired(1, &[])?;
    let old = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    ensure!(
        old == SocketAddr::new(family.outside_address(), 40_000),
        "{old}"
    );
    let mut connection = Connection::new(&wires, 0, 40_001, family.remote(0, 80));
    connection.open()?;
    connection.talk()?;

    lose_address(&world)?;
    check_silence(&wires, &world, 0, 40_000)?;
    check_silence(&wires, &world, 0, 41_000)?;

    let new = family.uplink_host(99);
    give_address(&world, new)?;
    // The same port, as nobody else has it.
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    ensure!(outside == SocketAddr::new(new, 40_000), "{outside}");
    wires.answer_udp(family.remote(0, 53), outside, 0, 40_000)?;
    // The server would answer a segment from elsewhere with a RST, so that the
    // guest knows soon. What it sends to the old address comes to nobody.
    let segment = wires.out(0, &connection.outward(Flags::Ack, b"still there?"))?;
    ensure!(segment.source().ip() == new, "{segment:?}");
    connection.check_ended()?;
    let late = packet::udp(family.remote(0, 53), old).payload(b"late");
    wires.world.send(&late)?;
    wires.nothing_arrives()?;

    let mappings = world.instance.ask_json("mappings")?;
    let left = mappings.as_array().is_some_and(|mappings| {
        mappings
            .iter()
            .any(|mapping| mapping["outside"]["address"] != json!(new))
    });
    ensure!(!left, "{mappings}");
    Ok(())
}
both_families!(flows_of_a_lost_address_end_and_begin_anew_with_the_next);

fn flows_go_on_when_the_address_comes_back(family: Family) -> Result<()> {
    let (world, wires) = family.wired(1, &[])?;
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let mut connection = Connection::new(&wires, 0, 40_001, family.remote(0, 80));
    connection.open()?;
    lose_address(&world)?;
    check_silence(&wires, &world, 0, 40_000)?;
    give_address(&world, family.outside_address())?;
    ensure!(
        wires.map_udp(0, 40_000, family.remote(0, 53))? == outside,
        "another endpoint"
    );
    wires.answer_udp(family.remote(0, 53), outside, 0, 40_000)?;
    connection.talk()
}
both_families!(flows_go_on_when_the_address_comes_back);
