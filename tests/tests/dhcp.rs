//! Guests get their addresses from tapnat, and reach the world with nothing but
//! what they were told. The client is busybox's.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    Namespace,
    process::Output,
    snapshot::Snapshot,
    topology::{GUEST_DEVICE, Inside, Topology},
    traffic::{self, TcpReflector, TcpSession},
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    world::{OUTSIDE, World, server},
};

/// What the client runs: it says what it was told, in one line.
const SCRIPT: &str = "#!/bin/sh
[ \"$1\" = bound ] && echo \"bound ip=$ip subnet=$subnet router=$router dns=$dns mtu=$mtu domain=$domain lease=$lease routes=$(echo $staticroutes | tr ' ' ,)\"
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
    ask_as(&world.guest(guest).namespace, name, options)
}

fn ask_as(guest: &Namespace, name: &str, options: &[&str]) -> Result<Output> {
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
    let client = guest.command("busybox");
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

/// A network of its own for each of two devices, as small as can be.
struct Small {
    inside: &'static str,
    subnet: &'static str,
    routers: [&'static str; 2],
    guests: [&'static str; 2],
    /// What the first is told of ways to its router.
    routes: &'static str,
}

const SMALL: [Small; 3] = [
    Small {
        inside: "veth*=10.9.0.1/30",
        subnet: "255.255.255.252",
        routers: ["10.9.0.1", "10.9.0.5"],
        guests: ["10.9.0.2", "10.9.0.6"],
        routes: "",
    },
    Small {
        inside: "veth*=10.9.0.1/31",
        subnet: "255.255.255.254",
        routers: ["10.9.0.1", "10.9.0.3"],
        guests: ["10.9.0.0", "10.9.0.2"],
        routes: "",
    },
    Small {
        inside: "veth*=10.9.0.1 peer 10.9.0.10",
        subnet: "255.255.255.255",
        routers: ["10.9.0.1", "10.9.0.1"],
        guests: ["10.9.0.10", "10.9.0.11"],
        routes: "10.9.0.1/32,0.0.0.0,0.0.0.0/0,10.9.0.1",
    },
];

#[test]
fn a_guest_may_have_a_network_or_an_address_alone() -> Result<()> {
    for small in SMALL {
        check_small(&small).with_context(|| small.inside)?;
    }
    Ok(())
}

fn check_small(small: &Small) -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2);
    let topology = topology.build()?;
    let Topology { host, guests, .. } = &topology;
    let instance = Instance::new(host);
    let before = Snapshot::take(host, &instance.pins())?;
    let mut process = instance.start(&["--inside", small.inside, "--route-guests"])?;
    for (number, guest) in guests.iter().enumerate() {
        let namespace = &guest.namespace;
        let (router, address) = (small.routers[number], small.guests[number]);
        let output = ask_as(namespace, &format!("{address}-{}", instance.name()), &[])?;
        for (name, value) in [
            ("ip", address),
            ("subnet", small.subnet),
            ("router", router),
        ] {
            ensure!(told(&output, name)? == value, "{output:?}");
        }
        if number == 0 {
            ensure!(told(&output, "routes")? == small.routes, "{output:?}");
        }
        namespace.ip(&format!("address flush dev {GUEST_DEVICE}"))?;
        namespace.ip(&format!("address add {address}/32 dev {GUEST_DEVICE}"))?;
        namespace.ip(&format!("route add {router} dev {GUEST_DEVICE}"))?;
        namespace.ip(&format!("route add default via {router}"))?;
    }
    let reflector = TcpReflector::start(&topology.world, server(0, 7))?;
    for guest in guests {
        let mut session = TcpSession::open(&guest.namespace, None, reflector.address())?;
        session.exchange(&traffic::pattern(100_000))?;
        ensure!(session.seen().ip() == OUTSIDE);
        // The host, the world, and each other, through the host.
        let others = small.guests.iter().chain(&small.routers[..1]);
        for other in others.copied().chain(["203.0.113.1"]) {
            let ping = traffic::ping(&guest.namespace, other.parse()?, 1, &[])?;
            ensure!(ping.received == 1, "{other}: {}", ping.output);
        }
    }

    // The world comes in to guests, and to nobody else there.
    let first = &guests[0].namespace;
    let local = SocketAddr::new(small.guests[0].parse()?, 80);
    let inner = TcpReflector::start(first, local)?;
    let forward = |to: &str| instance.ask("forward", &["add", "tcp", "8080", to]);
    for not_a_guest in [small.routers[0], "10.9.0.77"] {
        ensure!(forward(not_a_guest).is_err(), "{not_a_guest}");
    }
    forward(&inner.address().to_string())?;
    let forwarded = SocketAddr::new(OUTSIDE, 8080);
    TcpSession::open(&topology.world, None, forwarded)?.exchange(b"from the world")?;

    // One guest is not another.
    first.ip(&format!(
        "address add {}/32 dev {GUEST_DEVICE}",
        "10.9.0.77"
    ))?;
    let ping = traffic::ping(first, server(0, 0).ip(), 1, &["-I", "10.9.0.77"])?;
    ensure!(ping.received == 0, "{}", ping.output);
    let devices = &instance.ask_json("status")?["devices"];
    let peers: Vec<_> = devices.as_array().into_iter().flatten().collect();
    let peer = peers.iter().find(|it| it["name"] == "veth0");
    let peer = peer.map(|it| it["peer"].clone()).context("no veth0")?;
    let is_alone = small.subnet == "255.255.255.255";
    ensure!(
        peer.as_str() == is_alone.then_some(small.guests[0]),
        "{peer}"
    );

    // Also what was left by a process that was killed is taken away.
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let mut process = instance.start(&["--inside", small.inside])?;
    let ping = traffic::ping(&guests[1].namespace, server(0, 0).ip(), 1, &[])?;
    ensure!(ping.received == 1, "{}", ping.output);
    ensure!(process.terminate(PATIENCE)?.success());
    let after = Snapshot::take(host, &instance.pins())?;
    ensure!(before == after, "{:?}", before.difference(&after));
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

/// Gives a guest what it was told, as its client does.
fn set_up(guest: &Namespace, output: &Output, length: u8) -> Result<()> {
    let (address, router) = (told(output, "ip")?, told(output, "router")?);
    guest.ip(&format!(
        "address replace {address}/{length} dev {GUEST_DEVICE}"
    ))?;
    guest.ip(&format!(
        "route replace default via {router} dev {GUEST_DEVICE}"
    ))?;
    Ok(())
}

/// A guest is destroyed with its sessions open, and another one gets its tap, its network and so its
/// address, but has an Ethernet address of its own.
#[test]
fn the_next_guest_on_a_cable_is_not_the_last_one() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    // As where the kernel hears of the loss too late to forget who was there.
    let evicts = "net.ipv4.conf.veth0.arp_evict_nocarrier";
    topology.host.sysctl(evicts, "0")?;
    let instance = Instance::new(&topology.host);
    let _process = instance.start(&["--inside", "veth0=10.9.0.1/30"])?;
    let guest = &topology.guests.first().context("no guest")?.namespace;
    guest.ip(&format!("address flush dev {GUEST_DEVICE}"))?;
    let web = TcpReflector::start(&topology.world, server(0, 0))?;
    set_up(guest, &ask_as(guest, "destroyed", &[])?, 30)?;
    let open = TcpSession::open(guest, None, web.address())?;
    ensure!(traffic::ping(guest, "10.9.0.1".parse()?, 1, &[])?.received == 1);

    guest.ip(&format!("link set {GUEST_DEVICE} down"))?;
    guest.ip(&format!(
        "link set {GUEST_DEVICE} address 02:00:00:00:00:77"
    ))?;
    guest.ip(&format!("link set {GUEST_DEVICE} up"))?;
    let begin = Instant::now();
    let next = loop {
        let next = ask_as(guest, "next", &[])?;
        if told(&next, "ip").is_ok() || begin.elapsed() > PATIENCE {
            break next;
        }
    };
    ensure!(told(&next, "ip")? == "10.9.0.2", "{next:?}");
    set_up(guest, &next, 30)?;
    TcpSession::open(guest, None, web.address())?.exchange(b"x")?;
    ensure!(instance.count("spoofed-link-address")? == 0);
    drop(open);
    Ok(())
}

/// Who is there is known by the kernel, also after a crash.
#[test]
fn what_a_killed_process_gave_is_not_given_to_another() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Bridge).guests(2);
    let topology = topology.build()?;
    let instance = Instance::new(&topology.host);
    let inside = ["--inside", "br0=10.9.0.1/24"];
    let mut process = instance.start(&inside)?;
    let [one, other] = [0, 1].map(|number| &topology.guests[number].namespace);
    for guest in [one, other] {
        guest.ip(&format!("address flush dev {GUEST_DEVICE}"))?;
    }
    let first = ask_as(one, "first", &["-r", "10.9.0.77"])?;
    ensure!(told(&first, "ip")? == "10.9.0.77", "{first:?}");
    set_up(one, &first, 24)?;
    let router = "10.9.0.1".parse()?;
    ensure!(traffic::ping(one, router, 1, &[])?.received == 1);
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let _process = instance.start(&inside)?;
    let next = ask_as(other, "other", &["-r", "10.9.0.77"])?;
    ensure!(told(&next, "ip")? != "10.9.0.77", "{next:?}");
    let again = ask_as(one, "again", &[])?;
    ensure!(told(&again, "ip")? == "10.9.0.77", "{again:?}");
    Ok(())
}
