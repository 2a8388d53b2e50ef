//! Guests of a host whose resolver listens on its loopback only, as systemd-resolved does, get names
//! all the same. The host's resolver is dnsmasq, the guests' client dig.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    topology::{Builder, GUEST_DEVICE, Inside, Topology},
    traffic,
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    resolver::{self, STUB},
    world::World,
};
use tempfile::TempDir;

/// A host with such resolvers, and guests.
struct Host {
    directory: TempDir,
    topology: Topology,
}

impl Host {
    /// With these resolvers in its /etc/resolv.conf.
    fn new(inside: Inside, guests: u8, resolvers: &[&str]) -> Result<Self> {
        Self::of(Topology::builder().inside(inside).guests(guests), resolvers)
    }

    fn of(topology: Builder, resolvers: &[&str]) -> Result<Self> {
        let topology = topology.build()?;
        topology.host.ip("link set lo up")?;
        let host = Self {
            directory: tempfile::tempdir()?,
            topology,
        };
        resolver::write(&host.file(), resolvers)?;
        Ok(host)
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("resolv.conf")
    }

    /// Starts `tapnat run` there.
    fn start(self, arguments: &[&str]) -> Result<(World, TempDir)> {
        let mut instance = Instance::new(&self.topology.host);
        instance.use_resolvers(&self.file())?;
        let world = World::start_instance(self.topology, instance, arguments)?;
        Ok((world, self.directory))
    }
}

/// Asks as a guest, once.
fn answer(world: &World, guest: usize, arguments: &[&str]) -> Result<String> {
    let gateway = world.guest(guest).gateway.into();
    answer_of(gateway, world, guest, arguments)
}

fn answer_of(resolver: IpAddr, world: &World, guest: usize, arguments: &[&str]) -> Result<String> {
    let command = world.guest(guest).namespace.command("dig");
    command
        .arg(format!("@{resolver}"))
        .args(["+tries=1", "+time=20"])
        .args(arguments)
        .timeout(PATIENCE)
        .run()
}

/// The resolvers that a guest is told by DHCP.
fn told(world: &World, directory: &TempDir, guest: usize) -> Result<String> {
    let script = directory.path().join("told");
    fs::write(
        &script,
        "#!/bin/sh\n[ \"$1\" != bound ] || echo \"dns=$dns\"\n",
    )?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let client = world.guest(guest).namespace.command("busybox");
    let output = client
        .args(["udhcpc", "-f", "-n", "-q", "-i", GUEST_DEVICE, "-s"])
        .arg(&script)
        .timeout(PATIENCE)
        .run()?;
    let line = output.lines().find_map(|line| line.strip_prefix("dns="));
    Ok(line.with_context(|| output.clone())?.to_owned())
}

/// Whether somebody listens on a port of the host's address on a guest's device.
fn listens(world: &World) -> Result<bool> {
    let shown = world
        .topology
        .host
        .exec("ss --no-header --listening --tcp --udp --numeric src 10.0.0.1:53")?;
    Ok(!shown.trim().is_empty())
}

#[test]
fn the_host_asks_where_its_resolver_is_a_stub() -> Result<()> {
    let host = Host::new(Inside::Veth, 2, &[STUB])?;
    let _resolver = resolver::start(&host.topology.host, STUB)?;
    let (world, directory) = host.start(&[])?;
    for guest in 0..2 {
        let gateway = world.guest(guest).gateway.to_string();
        ensure!(
            told(&world, &directory, guest)? == gateway,
            "of guest {guest}"
        );
        for how in [&["+short"][..], &["+short", "+tcp"], &["+short", "+dnssec"]] {
            let said = answer(&world, guest, &[&["server.example"], how].concat())?;
            ensure!(said == "203.0.113.1\n", "{how:?}: {said}");
        }
    }
    // What does not exist, and what is too long for a datagram.
    let said = answer(&world, 0, &["other.example"])?;
    ensure!(said.contains("status: REFUSED"), "{said}");
    let said = answer(&world, 0, &["large.example", "TXT", "+noedns", "+ignore"])?;
    ensure!(said.contains(" tc "), "{said}");
    for how in [&["+noedns"][..], &["+bufsize=4096"], &["+tcp"]] {
        let said = answer(
            &world,
            0,
            &[&["large.example", "TXT", "+short"], how].concat(),
        )?;
        ensure!(said.lines().count() == resolver::LARGE, "{how:?}: {said}");
    }
    Ok(())
}

#[test]
fn guests_of_an_ipv6_network_ask_the_host_there() -> Result<()> {
    let host = Host::of(Topology::builder().inside(Inside::Veth).ipv6(), &[STUB])?;
    let _resolver = resolver::start(&host.topology.host, STUB)?;
    let (world, _directory) = host.start(&[])?;
    let (_, gateway) = world.guest(0).ipv6.context("there is IPv6")?;
    for how in ["+notcp", "+tcp"] {
        let said = answer_of(
            gateway.into(),
            &world,
            0,
            &["server.example", "+short", how],
        )?;
        ensure!(said == "203.0.113.1\n", "{how}: {said}");
    }
    Ok(())
}

#[test]
fn the_next_resolver_is_asked_and_that_none_answers_is_told() -> Result<()> {
    // Nobody listens on the first one.
    let host = Host::new(Inside::Veth, 1, &["127.0.0.54", STUB])?;
    let mut process = resolver::start(&host.topology.host, STUB)?;
    let (world, _directory) = host.start(&[])?;
    for how in ["+notcp", "+tcp"] {
        let said = answer(&world, 0, &["server.example", "+short", how])?;
        ensure!(said == "203.0.113.1\n", "{how}: {said}");
    }
    process.terminate(PATIENCE)?;
    let said = answer(&world, 0, &["server.example"])?;
    ensure!(said.contains("status: SERVFAIL"), "{said}");
    Ok(())
}

#[test]
fn guests_ask_resolvers_that_they_reach_themselves() -> Result<()> {
    let host = Host::new(Inside::Veth, 1, &["127.0.0.54", "203.0.113.1"])?;
    let (world, directory) = host.start(&[])?;
    ensure!(told(&world, &directory, 0)? == "203.0.113.1");
    ensure!(!listens(&world)?, "of no use");

    // The host moves to other networks.
    let file = directory.path().join("resolv.conf");
    resolver::write(&file, &["203.0.113.2"])?;
    ensure!(told(&world, &directory, 0)? == "203.0.113.2");
    resolver::write(&file, &[STUB])?;
    ensure!(told(&world, &directory, 0)? == "10.0.0.1" && listens(&world)?);
    Ok(())
}

#[test]
fn what_guests_must_not_reach_they_are_not_told() -> Result<()> {
    let host = Host::new(Inside::Veth, 1, &["203.0.113.1"])?;
    let (world, directory) = host.start(&["--deny", "203.0.113.0/24"])?;
    ensure!(told(&world, &directory, 0)? == "10.0.0.1");
    drop(world);

    let host = Host::new(Inside::Veth, 1, &[STUB])?;
    let (world, directory) = host.start(&["--deny-host"])?;
    ensure!(told(&world, &directory, 0)?.is_empty());
    ensure!(!listens(&world)?, "guests do not get there");
    Ok(())
}

#[test]
fn the_operator_may_want_it_so() -> Result<()> {
    let host = Host::new(Inside::Veth, 1, &["203.0.113.1"])?;
    let topology = &host.topology;
    topology.host.ip("address add 192.0.2.53/32 dev lo")?;
    let _resolver = resolver::start(&topology.host, "192.0.2.53")?;
    resolver::write(&host.file(), &["192.0.2.53"])?;
    // Also where addresses are given by hand.
    let (world, _directory) = host.start(&["--dns", "forward", "--no-dhcp"])?;
    let said = answer(&world, 0, &["server.example", "+short"])?;
    ensure!(said == "203.0.113.1\n", "{said}");
    Ok(())
}

#[test]
fn another_program_on_that_port_is_left_alone() -> Result<()> {
    let host = Host::new(Inside::Veth, 1, &[STUB])?;
    let another = host
        .topology
        .host
        .run(|| Ok(UdpSocket::bind("0.0.0.0:53")?))?;
    let (world, directory) = host.start(&[])?;
    ensure!(told(&world, &directory, 0)? == "10.0.0.1");
    let said = world.said();
    ensure!(
        said.contains("another program") && said.contains("--dns"),
        "{said}"
    );
    drop(another);
    Ok(())
}

#[test]
fn a_guest_that_floods_leaves_others_their_answers() -> Result<()> {
    // Nobody answers on the first one, and nobody says so.
    let host = Host::new(Inside::Bridge, 2, &["127.0.0.54"])?;
    let silent: SocketAddr = "127.0.0.54:53".parse()?;
    let silent = traffic::udp_socket(&host.topology.host, silent)?;
    let (world, directory) = host.start(&[])?;
    let gateway = SocketAddr::from((world.guest(0).gateway, 53));
    // Some header and no question, a thousand times.
    let socket = world.guest_socket(0, 0)?;
    let query = |number: u16| {
        let [high, low] = number.to_be_bytes();
        [high, low, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    };
    let start = Instant::now();
    for number in 0..1000 {
        socket.send_to(&query(number), gateway)?;
    }
    let mut asked = 0;
    let mut buffer = [0; 512];
    silent.set_read_timeout(Some(Duration::from_secs(2)))?;
    while let Ok((length, _)) = silent.recv_from(&mut buffer) {
        ensure!(length == query(0).len(), "not as it was sent");
        asked += 1;
    }
    // So many at once, and each for five seconds.
    let most = 48 * (start.elapsed().as_secs() / 5 + 1);
    ensure!(
        (1..=most).contains(&asked),
        "{asked} of its questions were passed on"
    );
    let connections: Vec<_> = (0..20)
        .map(|_| traffic::connect(&world.guest(0).namespace, None, gateway, PATIENCE))
        .collect();

    resolver::write(&directory.path().join("resolv.conf"), &[STUB])?;
    let _resolver = resolver::start(&world.topology.host, STUB)?;
    for how in ["+notcp", "+tcp"] {
        let said = answer(&world, 1, &["server.example", "+short", how])?;
        ensure!(said == "203.0.113.1\n", "{how}: {said}");
    }
    drop(connections);
    Ok(())
}

#[test]
fn what_is_no_question_gets_no_answer() -> Result<()> {
    let host = Host::new(Inside::Veth, 1, &[STUB])?;
    let _resolver = resolver::start(&host.topology.host, STUB)?;
    let (world, _directory) = host.start(&[])?;
    let gateway = SocketAddr::from((world.guest(0).gateway, 53));
    let socket = world.guest_socket(0, 0)?;
    socket.connect(gateway)?;
    // Too short, an answer, and what nobody can read.
    let answer_header: &[u8] = &[0, 1, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for nonsense in [&[][..], &[0; 11], answer_header] {
        socket.send(nonsense)?;
    }
    let mut stream = traffic::connect(&world.guest(0).namespace, None, gateway, PATIENCE)?;
    stream.write_all(&[0xff; 4096])?;
    let said = answer(&world, 0, &["server.example", "+short"])?;
    ensure!(said == "203.0.113.1\n", "{said}");
    // The good answer came to another socket, and this one had time to get one.
    socket.set_nonblocking(true)?;
    ensure!(socket.recv(&mut [0; 512]).is_err(), "what was answered?");
    Ok(())
}
