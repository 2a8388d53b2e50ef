//! The host goes on as before beside its guests: its own traffic on the
//! address that it shares with them, its services, and its firewall.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace, packet,
    topology::{Inside, Topology},
    traffic::{
        self, Amount, HttpServer, TcpReflector, TcpSession, UdpReflector, curl, iperf3, ping,
        reflect_udp,
    },
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::PATIENCE,
    wires::{Wires, remote},
    world::{OUTSIDE, World},
};

fn veth(family: Family) -> tapnat_testbed::topology::Builder {
    family.topology().inside(Inside::Veth)
}

/// Any port of the host on the uplink.
const ANY: u16 = 0;

fn the_host_reaches_the_world(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    world.check_reach()?;
    let pinged = ping(host, family.server(0, 0).ip(), 3, &["-s", "4000"])?;
    ensure!(pinged.received == 3, "{}", pinged.output);
    let udp = UdpReflector::start(outer, family.server(1, 7))?;
    let socket = traffic::udp_socket(host, family.outside(ANY))?;
    let seen = reflect_udp(&socket, udp.address(), &traffic::pattern(3000))?;
    ensure!(seen == socket.local_addr()?, "translated");
    let http = HttpServer::start(outer, family.server(0, 80))?;
    let seen = curl(host, &format!("http://{}/", http.address()))?;
    ensure!(
        seen.parse::<SocketAddr>()?.ip() == family.outside_address(),
        "seen as {seen}"
    );
    for options in [&[][..], &["-R"]] {
        iperf3(
            host,
            outer,
            family.server(0, 5201),
            Amount::Bytes(4 << 20),
            options,
        )?;
    }
    Ok(())
}
both_families!(the_host_reaches_the_world);

fn the_world_reaches_the_host(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    world.check_reach()?;
    let pinged = ping(outer, family.outside_address(), 3, &["-s", "4000"])?;
    ensure!(pinged.received == 3, "{}", pinged.output);
    for port in [22, 600, 8080, 40_000, 65_535] {
        let udp = UdpReflector::start(host, family.outside(port))?;
        let from = family.server(0, 40_000);
        let socket = traffic::udp_socket(outer, from)?;
        ensure!(
            reflect_udp(&socket, udp.address(), &traffic::pattern(3000))? == from,
            "translated"
        );
        let tcp = TcpReflector::start(host, family.outside(port))?;
        let mut session = TcpSession::open(outer, Some(from), tcp.address())?;
        ensure!(session.seen() == from, "translated");
        session.exchange(&traffic::pattern(200_000))?;
    }
    // Nobody listens: the host says so, as it did before.
    let error = traffic::connect(outer, None, family.outside(9), traffic::ANSWER_TIMEOUT);
    let error = format!("{:#}", error.err().context("somebody listens")?);
    ensure!(error.contains("refused"), "{error}");
    Ok(())
}
both_families!(the_world_reaches_the_host);

fn guests_reach_the_hosts_services(family: Family) -> Result<()> {
    let world = World::start(family.topology(), &[])?;
    let host = &world.topology.host;
    let guest = &world.guest(0).namespace;
    let gateway = family.gateway_of(world.guest(0));
    for address in [gateway, family.outside_address()] {
        let pinged = ping(guest, address, 3, &["-s", "4000"])?;
        ensure!(pinged.received == 3, "{}", pinged.output);
        let udp = UdpReflector::start(host, SocketAddr::new(address, 5300))?;
        let socket = world.guest_socket(0, 40_000)?;
        let seen = reflect_udp(&socket, udp.address(), &traffic::pattern(3000))?;
        ensure!(seen == world.guest_endpoint(0, 40_000), "translated");
        let tcp = TcpReflector::start(host, SocketAddr::new(address, 5300))?;
        TcpSession::open(guest, None, tcp.address())?.exchange(&traffic::pattern(1 << 20))?;
        // And the host its guests.
        let pinged = ping(host, family.address_of(world.guest(0)), 1, &[])?;
        ensure!(pinged.received == 1, "{}", pinged.output);
    }
    Ok(())
}
both_families!(guests_reach_the_hosts_services);

/// Whether a guest with this source port gets another one outside, and both it
/// and the host's socket of that port get the answers to what they sent.
fn check_port_is_the_hosts(world: &World, port: u16) -> Result<()> {
    let family = world.family();
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    let udp = UdpReflector::start(outer, family.server(0, 53))?;
    let guest = world.guest_socket(0, port)?;
    let seen = reflect_udp(&guest, udp.address(), b"guest")?;
    ensure!(
        seen.port() != port,
        "the guest got the host's UDP port {port}"
    );
    let tcp = TcpReflector::start(outer, family.server(0, 53))?;
    let local = world.guest_endpoint(0, port);
    let mut session = TcpSession::open(&world.guest(0).namespace, Some(local), tcp.address())?;
    ensure!(
        session.seen().port() != port,
        "the guest got the host's TCP port {port}"
    );
    session.exchange(b"guest")?;
    let mut own = TcpSession::open(host, Some(family.outside(port)), tcp.address())?;
    ensure!(own.seen() == family.outside(port), "translated");
    own.exchange(b"host")
}

fn ports_that_the_host_listens_on_are_not_handed_out(family: Family) -> Result<()> {
    // One listens before the instance starts, one after.
    let topology = veth(family).build()?;
    let before = (
        UdpReflector::start(&topology.host, family.outside(40_000))?,
        traffic::tcp_listener(&topology.host, family.outside(40_000))?,
    );
    let world = World::start_in(topology, &[])?;
    let host = &world.topology.host;
    let any: SocketAddr = match family {
        V4 => "0.0.0.0:40001",
        V6 => "[::]:40001",
    }
    .parse()?;
    let after = (
        UdpReflector::start(host, any)?,
        traffic::tcp_listener(host, any)?,
    );
    let udp = UdpReflector::start(&world.topology.world, family.server(0, 53))?;
    let tcp = TcpReflector::start(&world.topology.world, family.server(0, 53))?;
    for port in [40_000, 40_001] {
        let guest = world.guest_socket(0, port)?;
        let seen = reflect_udp(&guest, udp.address(), b"guest")?;
        ensure!(seen.port() != port, "the guest got the UDP port {port}");
        let local = world.guest_endpoint(0, port);
        let session = TcpSession::open(&world.guest(0).namespace, Some(local), tcp.address())?;
        ensure!(
            session.seen().port() != port,
            "the guest got the TCP port {port}"
        );
    }
    drop((before, after));
    Ok(())
}
both_families!(ports_that_the_host_listens_on_are_not_handed_out);

/// The other way round: a guest has the port already. What is there goes on, and
/// what is new is the host's.
fn a_port_that_the_host_listens_on_later_is_shared(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    let udp = UdpReflector::start(outer, family.server(0, 53))?;
    let tcp = TcpReflector::start(outer, family.server(0, 53))?;
    let guest = world.guest_socket(0, 40_000)?;
    let seen = reflect_udp(&guest, udp.address(), b"guest")?;
    let namespace = &world.guest(0).namespace;
    let local = world.guest_endpoint(0, 40_000);
    let mut session = TcpSession::open(namespace, Some(local), tcp.address())?;
    ensure!((seen, session.seen()) == (family.outside(40_000), family.outside(40_000)));

    let hosts = UdpReflector::start(host, family.outside(40_000))?;
    let hosts_tcp = TcpReflector::start(host, family.outside(40_000))?;
    for _ in 0..2 {
        let seen = reflect_udp(&guest, udp.address(), b"guest")?;
        ensure!(seen == family.outside(40_000), "{seen}");
        session.exchange(b"guest")?;
        // Also from an address that the guest has sent to.
        for number in 0..2 {
            let client = traffic::udp_socket(outer, family.server(number, ANY))?;
            reflect_udp(&client, hosts.address(), b"host")?;
            let local = Some(family.server(number, ANY));
            TcpSession::open(outer, local, hosts_tcp.address())?.exchange(b"host")?;
        }
    }
    Ok(())
}
both_families!(a_port_that_the_host_listens_on_later_is_shared);

fn the_hosts_ephemeral_ports_and_the_guests_never_meet(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    // What the kernel chooses for the host, a guest does not get.
    let socket = traffic::udp_socket(host, family.outside(ANY))?;
    socket.connect(family.server(0, 53))?;
    check_port_is_the_hosts(&world, socket.local_addr()?.port())?;
    // What guests have, the kernel does not choose for the host.
    let range = host.read_sysctl("net.ipv4.ip_local_port_range")?;
    let mut ends = range.split_whitespace().map(str::parse::<u16>);
    let (Some(low), Some(high)) = (ends.next(), ends.next()) else {
        anyhow::bail!("the range is {range}");
    };
    let (low, high) = (low?, high?);
    let udp = UdpReflector::start(outer, family.server(0, 53))?;
    let mut taken = BTreeSet::new();
    for port in (low..=high).step_by(64) {
        let guest = world.guest_socket(0, port)?;
        taken.insert(reflect_udp(&guest, udp.address(), b"guest")?.port());
    }
    ensure!(
        taken.len() == usize::from((high - low) / 64 + 1),
        "shared ports"
    );
    let sockets: Result<Vec<_>> = (0..2000)
        .map(|_| traffic::udp_socket(host, family.outside(ANY)))
        .collect();
    for socket in sockets? {
        let port = socket.local_addr()?.port();
        ensure!(!taken.contains(&port), "both have {port}");
    }
    Ok(())
}
both_families!(the_hosts_ephemeral_ports_and_the_guests_never_meet);

fn pings_of_the_host_and_of_guests_do_not_mix(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let wires = Wires::open(&world)?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    let target = family.server(0, 0).ip();
    thread::scope(|scope| {
        let pings = [host, &world.guest(0).namespace]
            .map(|namespace: &Namespace| scope.spawn(move || ping(namespace, target, 10, &[])));
        let inbound = scope.spawn(|| ping(outer, family.outside_address(), 10, &[]));
        for pinger in pings.into_iter().chain([inbound]) {
            let pinged = pinger.join().expect("ping does not panic")?;
            ensure!(pinged.received == 10, "{}", pinged.output);
        }
        anyhow::Ok(())
    })?;
    drop(wires);
    // The world pings the host with the identifier that a guest has.
    let wires = Wires::open(&world)?;
    let guest = wires.inside(0, 0).ip();
    let request = packet::echo_request(guest, family.remote(0, 0).ip(), 77, 1);
    let translated = wires.out(0, &request)?.source().port();
    let request = packet::echo_request(
        family.remote(0, 0).ip(),
        family.outside_address(),
        translated,
        1,
    );
    wires.world.send(&request)?;
    let reply = wires.world.receive()?;
    ensure!(
        reply.source() == family.outside(translated)
            && reply.destination().ip() == family.remote(0, 0).ip(),
        "{reply:?}"
    );
    wires.nothing_arrives()
}
both_families!(pings_of_the_host_and_of_guests_do_not_mix);

/// An error about what the host itself sent is the host's.
fn icmp_errors_for_the_host_reach_it(family: Family) -> Result<()> {
    let world = World::start(veth(family).router(), &[])?;
    let host = &world.topology.host;
    world.check_reach()?;
    let target = family.server(0, 0).ip();
    let said = host.exec(&format!("traceroute -n -q 1 -w 3 -m 4 -N 1 {target}"))?;
    let hops: Vec<_> = said
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    let expected = [family.gateway(), target].map(|hop| hop.to_string());
    ensure!(hops == expected, "{said}");
    let socket = traffic::udp_socket(host, family.outside(ANY))?;
    socket.connect(family.server(0, 9))?;
    socket.send(b"nobody is there")?;
    let error = socket.recv(&mut [0; 10]);
    let error = error.err().context("somebody is there")?;
    ensure!(
        error.kind() == std::io::ErrorKind::ConnectionRefused,
        "{error}"
    );
    Ok(())
}
both_families!(icmp_errors_for_the_host_reach_it);

/// What the host's packet filters say, counters included.
fn filters(host: &Namespace) -> Result<Vec<String>> {
    [
        "iptables-legacy-save -c",
        "iptables-nft-save -c",
        "nft list ruleset",
    ]
    .iter()
    .map(|line| {
        let said = host.exec(line)?;
        // The comments tell the time.
        Ok(said
            .lines()
            .filter(|line| !line.starts_with('#'))
            .collect::<Vec<_>>()
            .join("\n"))
    })
    .collect()
}

#[test]
fn the_firewall_is_neither_changed_nor_an_obstacle() -> Result<()> {
    let topology = veth(V4).build()?;
    let host = &topology.host;
    for iptables in ["iptables-legacy", "iptables-nft"] {
        // As Docker and ufw leave it, and a NAT of somebody else's.
        for rule in [
            "-P FORWARD DROP",
            "-A FORWARD -i docker0 -o uplink0 -j ACCEPT",
            "-t nat -A POSTROUTING -s 10.0.0.0/24 -o uplink0 -j MASQUERADE",
            "-t mangle -A PREROUTING -i veth0 -j DROP",
        ] {
            host.exec(&format!("{iptables} {rule}"))?;
        }
    }
    host.exec("nft add table inet guard")?;
    host.exec("nft add chain inet guard forward { type filter hook forward priority -10 ; policy drop ; }")?;
    let before = filters(host)?;
    let mut world = World::start_in(topology, &[])?;
    world.check_reach()?;
    let host = &world.topology.host;
    // Not even a counter has moved: the guests' packets do not come by.
    ensure!(filters(host)? == before, "{before:?}\n{:?}", filters(host)?);
    world.restart(&[])?;
    world.check_reach()?;
    let World {
        instance, topology, ..
    } = &world;
    instance.ask("down", &[])?;
    ensure!(filters(&topology.host)? == before, "changed");
    Ok(())
}

/// Packets that the host's stack has to fragment come by its firewall, which
/// is no obstacle to them either.
#[test]
fn the_firewall_is_no_obstacle_to_packets_to_fragment() -> Result<()> {
    let topology = veth(V4).uplink_mtu(1400).build()?;
    topology.host.exec("iptables-legacy -P FORWARD DROP")?;
    let world = World::start_in(topology, &[])?;
    let wires = Wires::open(&world)?;
    let large = packet::udp(wires.inside(0, 40_000), remote(0, 53));
    wires.guests[0].send(&large.payload(&traffic::pattern(1400)))?;
    let arrived = wires.world.receive_whole()?;
    ensure!(arrived.source == OUTSIDE, "from {}", arrived.source);
    Ok(())
}

/// The rules do stop what tapnat does not translate, so that the test above
/// shows something.
#[test]
fn the_firewall_guards_the_host() -> Result<()> {
    let topology = veth(V4).build()?;
    let host = &topology.host;
    host.exec("iptables-legacy -A INPUT -p udp --dport 53 -j DROP")?;
    host.exec("iptables-legacy -A INPUT -p icmp -j DROP")?;
    let world = World::start_in(topology, &[])?;
    world.check_reach()?;
    let host = &world.topology.host;
    let guest = &world.guest(0).namespace;
    let pinged = ping(guest, world.guest(0).gateway.into(), 1, &["-W", "1"])?;
    ensure!(pinged.received == 0, "{}", pinged.output);
    let said = host.exec("iptables-legacy -S")?;
    ensure!(said.contains("--dport 53 -j DROP"), "{said}");
    Ok(())
}

/// Broadcasts and multicasts of a guest are the host's, for DHCP and the like.
#[test]
fn a_guests_broadcasts_reach_the_host() -> Result<()> {
    let world = World::start(veth(V4), &["--no-dhcp"])?;
    let wires = Wires::open(&world)?;
    let any: SocketAddr = "0.0.0.0:67".parse()?;
    let server = UdpReflector::start(&world.topology.host, any)?;
    let broadcast: SocketAddr = "255.255.255.255:67".parse()?;
    for source in ["0.0.0.0:68".parse()?, wires.inside(0, 68)] {
        wires.guests[0].send(&packet::udp(source, broadcast).payload(b"discover"))?;
    }
    let expected = ["0.0.0.0:68".parse()?, wires.inside(0, 68)];
    let start = Instant::now();
    loop {
        let received = server.received();
        let peers: Vec<_> = received.iter().map(|datagram| datagram.peer).collect();
        if peers == expected {
            break;
        }
        ensure!(start.elapsed() < PATIENCE, "got {peers:?}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
