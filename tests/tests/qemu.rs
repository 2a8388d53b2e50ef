//! Real QEMU guests, on taps that tapnat makes, reach the world: one with a
//! card that leaves segmentation and checksums to others, one with a card of
//! 1990s make that does all by itself.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    capture::{Capture, Direction, Partial},
    qemu::{Guest, Kernel, Machine, Model, find_program},
    topology::{Topology, WORLD_ADDRESSES, WORLD_ADDRESSES6},
    traffic::{self, HttpServer},
};
use tapnat_tests::{
    instance::Instance,
    newcomer, resolver,
    world::{OUTSIDE, World, server},
};

/// Emulation is slow, and the machine may be busy.
const PATIENCE: Duration = Duration::from_mins(1);

/// A user with no privilege, whom every system has.
const NOBODY: u32 = 65534;

/// A world whose only guest is a QEMU one.
fn boot(model: Model, queues: u32) -> Result<(World, Guest)> {
    let topology = Topology::builder().guests(0).build()?;
    let tap_queues = if queues > 1 { "multi" } else { "single" };
    let options = ["--inside", "tap0=10.0.0.1/24", "--tap-queues", tap_queues];
    let world = World::start_in(topology, &options)?;
    let machine = Machine::new(Kernel::installed()?).card_with_queues("tap0", model, queues);
    let mut guest = machine.boot(&world.topology.host)?;
    guest.configure("eth0", "10.0.0.10/24", "10.0.0.1")?;
    Ok((world, guest))
}

/// Runs `iperf3` in the guest, against a server in the world.
fn transfer(world: &World, guest: &mut Guest, number: usize, options: &str) -> Result<String> {
    let address = WORLD_ADDRESSES[number].to_string();
    let mut listener = world
        .topology
        .world
        .command("iperf3")
        .args(["--server", "--one-off", "--forceflush", "--bind", &address])
        .spawn()?;
    listener.wait_for_line(PATIENCE, |line| line.contains("Server listening"))?;
    let said = guest.run_within(&format!("/bin/iperf3 -c {address} {options}"), PATIENCE)?;
    listener.wait(PATIENCE)?;
    Ok(said)
}

/// Ping, HTTP both ways, UDP and bulk TCP both ways; returns the length of the
/// largest packet that the guest sent.
fn check_traffic(world: &World, guest: &mut Guest) -> Result<usize> {
    let host = &world.topology.host;
    let (peer, device) = world.topology.uplink_peer();
    let captures = [Capture::start(host, "tap0")?, Capture::start(peer, device)?];

    let said = guest.run("ping -c 3 -W 5 -s 1400 203.0.113.1")?;
    ensure!(said.contains("3 packets received"), "{said}");
    // In fragments.
    let said = guest.run("ping -c 3 -W 5 -s 4000 203.0.113.1")?;
    ensure!(said.contains("3 packets received"), "{said}");

    let http = HttpServer::start(&world.topology.world, server(0, 80))?;
    let url = format!("http://{}", http.address());
    let seen = guest.run(&format!("/bin/curl -sS --max-time 15 {url}/"))?;
    let seen: std::net::SocketAddr = seen.parse().with_context(|| seen.clone())?;
    ensure!(seen.ip() == OUTSIDE, "seen as {seen}");
    let sum = guest.run(&format!(
        "/bin/curl -sS --max-time 15 {url}/bytes/300000 | md5sum"
    ))?;
    let expected = host
        .command("md5sum")
        .stdin(traffic::pattern(300_000))
        .run()?;
    ensure!(sum == expected, "{sum} and not {expected}");

    for options in ["-n 4M -C cubic", "-n 4M -C cubic -R"] {
        let said = transfer(world, guest, 0, options)?;
        ensure!(said.contains("receiver"), "{said}");
    }
    for options in ["-u -b 1M -n 100K", "-u -b 1M -n 100K -R"] {
        let said = transfer(world, guest, 1, options)?;
        let is_whole = |line: &str| line.contains("(0%)") && line.contains("receiver");
        ensure!(said.lines().any(is_whole), "{said}");
    }

    let [inside, outside] = captures.map(Capture::stop);
    outside?.verify_checksums(Partial::Accept)?;
    let inside = inside?;
    inside.verify_checksums(Partial::Accept)?;
    let sent = inside
        .list
        .iter()
        .filter(|packet| packet.direction == Direction::In);
    sent.map(|packet| packet.data.len())
        .max()
        .context("the guest sent nothing")
}

#[test]
fn a_guest_with_virtio_reaches_the_world() -> Result<()> {
    let (world, mut guest) = boot(Model::Virtio, 2)?;
    let largest = check_traffic(&world, &mut guest)?;
    ensure!(largest > 20_000, "the largest packet has {largest} bytes");
    Ok(())
}

#[test]
fn a_guest_with_an_old_card_reaches_the_world() -> Result<()> {
    let (world, mut guest) = boot(Model::Ne2k, 1)?;
    let largest = check_traffic(&world, &mut guest)?;
    ensure!(largest <= 1514, "the largest packet has {largest} bytes");
    Ok(())
}

/// On a host as laptops are: its own resolver is one that guests cannot reach.
#[test]
fn a_guest_needs_nothing_but_tapnat() -> Result<()> {
    let topology = Topology::builder().guests(0).build()?;
    topology.host.ip("link set lo up")?;
    let _resolver = resolver::start(&topology.host, resolver::STUB)?;
    let http = HttpServer::start(&topology.world, server(0, 80))?;
    let directory = tempfile::tempdir()?;
    let resolvers = directory.path().join("resolv.conf");
    resolver::write(&resolvers, &[resolver::STUB])?;

    let mut instance = Instance::new(&topology.host);
    instance.use_resolvers(&resolvers)?;
    let world = World::start_instance(topology, instance, &["--inside", "tap0=10.0.0.1/24"])?;
    let mut guest = newcomer::boot(&world.topology.host, directory.path())?;
    let seen = newcomer::fetch(&mut guest, http.address().port())?;
    ensure!(seen.ip() == OUTSIDE, "seen as {seen}");
    Ok(())
}

/// What the client of DHCPv6 runs, in the guest.
const CONFIGURE_IPV6: &str = "#!/bin/sh
[ -z \"$new_dhcp6_name_servers\" ] ||
    for address in $new_dhcp6_name_servers; do echo nameserver $address; done > /etc/resolv.conf
exit 0
";

/// Its kernel hears who its router is and chooses its address; a client asks whom to ask for names.
#[test]
fn a_guest_with_ipv6_needs_nothing_but_tapnat() -> Result<()> {
    let topology = Topology::builder().ipv6().guests(0).build()?;
    topology.host.ip("link set lo up")?;
    let _resolver = resolver::start(&topology.host, resolver::STUB)?;
    let directory = tempfile::tempdir()?;
    let resolvers = directory.path().join("resolv.conf");
    resolver::write(&resolvers, &[resolver::STUB])?;
    let script = directory.path().join("configure");
    fs::write(&script, CONFIGURE_IPV6)?;

    let mut instance = Instance::new(&topology.host);
    instance.use_resolvers(&resolvers)?;
    let inside = ["--inside", "tap0=fd00:7a70::1/64"];
    let world = World::start_instance(topology, instance, &inside)?;
    let machine = Machine::new(Kernel::installed()?)
        .ipv6()
        .program(find_program("dhclient")?)
        .card_with_queues("tap0", Model::Virtio, 2)
        .file(&script, "/configure");
    let mut guest = machine.boot(&world.topology.host)?;
    guest.run("chmod 755 /configure && mkdir -p /etc && ip link set eth0 up")?;
    let until = |guest: &mut Guest, command: &str| {
        let wait = format!("until {command}; do sleep 0.2; done");
        guest.run_within(&wait, PATIENCE).map(drop)
    };
    until(
        &mut guest,
        "/bin/ip -6 address show dev eth0 scope global -tentative | grep -q fd00:7a70:",
    )?;
    until(&mut guest, "/bin/ip -6 route show default | grep -q fe80:")?;
    let mtu = guest.run("cat /proc/sys/net/ipv6/conf/eth0/mtu")?;
    ensure!(mtu.trim() == "1500", "{mtu}");
    let said = guest.run("ping6 -c 3 -W 5 fd00:7a70::1")?;
    ensure!(said.contains("3 packets received"), "{said}");
    let client = "/bin/dhclient -6 -S -1 -sf /configure -lf /tmp/leases -pf /tmp/process eth0";
    guest.run_within(client, PATIENCE)?;
    until(&mut guest, "grep -q nameserver /etc/resolv.conf")?;
    let told = guest.run("cat /etc/resolv.conf")?;
    ensure!(told.trim() == "nameserver fd00:7a70::1", "{told}");
    let said = guest.run_within("nslookup -type=a server.example", PATIENCE)?;
    ensure!(said.contains("203.0.113.1"), "{said}");
    let remote = WORLD_ADDRESSES6[0];
    let said = guest.run(&format!("ping6 -c 3 -W 5 {remote}"))?;
    ensure!(said.contains("3 packets received"), "{said}");
    Ok(())
}

#[test]
fn qemu_without_privileges_opens_its_owners_tap_and_no_other() -> Result<()> {
    let topology = Topology::builder().guests(0).build()?;
    let owner = NOBODY.to_string();
    let options = [
        "--inside",
        "tap0=10.0.0.1/24",
        "--inside",
        "tap1=10.0.1.1/24",
    ];
    let options = [
        &options[..],
        &["--tap-owner", &owner, "--tap-queues", "single"],
    ]
    .concat();
    let world = World::start_in(topology, &options)?;
    let host = &world.topology.host;
    let shown = host.ip("-details link show tap0")?;
    ensure!(
        shown.contains("user 65534") || shown.contains("user nobody"),
        "{shown}"
    );

    let machine = |user| {
        let kernel = Kernel::installed()?;
        anyhow::Ok(Machine::new(kernel).card("tap0", Model::Virtio).user(user))
    };
    let refusal = machine(NOBODY - 1)?.boot(host).map(drop);
    let refusal = format!(
        "{:#}",
        refusal.err().context("another user's QEMU opened it")?
    );
    ensure!(refusal.contains("Operation not permitted"), "{refusal}");

    let mut guest = machine(NOBODY)?.boot(host)?;
    guest.configure("eth0", "10.0.0.10/24", "10.0.0.1")?;
    let said = guest.run("ping -c 3 -W 5 203.0.113.1")?;
    ensure!(said.contains("3 packets received"), "{said}");
    Ok(())
}
