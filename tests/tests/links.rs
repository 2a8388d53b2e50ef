//! Guests reach the world, whatever joins them to the host and the host to the
//! world, in both families of IP, and every packet that arrives anywhere is right.

use std::{
    collections::BTreeSet,
    env,
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use tapnat_testbed::{
    capture::{Capture, Direction, Packets, Partial},
    topology::{
        Builder, GATEWAY, GATEWAY6, GUEST_DEVICE, HOST_ADDRESS, HOST_ADDRESS6, Inside, Tap,
        TapMaker, Topology, Uplink,
    },
    traffic::{
        self, Amount, HttpServer, TcpReflector, TcpSession, UdpReflector, curl, iperf3, ping,
        reflect_udp,
    },
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    world::World,
};

/// Set in an emulated machine, which is slow.
const EMULATED: &str = "TAPNAT_EMULATED";

/// How many bytes are enough for every window to fill.
fn bulk() -> u64 {
    if is_emulated() { 1 << 20 } else { 16 << 20 }
}

fn is_emulated() -> bool {
    env::var_os(EMULATED).is_some()
}

/// A world in both families.
fn both() -> Builder {
    Topology::builder().ipv6()
}

fn tap(tap: Tap) -> Builder {
    both().inside(Inside::Tap(tap))
}

/// Checks everything, and that unsegmented packets stay so, both ways.
fn check_traffic(world: &World) -> Result<()> {
    let longest = world.explain(check_everything(world))?;
    // TCP makes no longer ones than it sends in a millisecond.
    let enough = if is_emulated() { 2000 } else { 32_000 };
    ensure!(longest > enough, "the longest has {longest} bytes");
    Ok(())
}

/// The list that every kind of link is put to in both families: [`check_bulk`],
/// [`check_errors`] and [`check_hairpins`].
///
/// Returns how long a payload came in one packet, both ways and on both sides.
fn check_everything(world: &World) -> Result<usize> {
    let mut longest = usize::MAX;
    for family in world.families() {
        let said = |what| format!("{what}, {family:?}");
        let its = check_bulk(world, family).with_context(|| said("traffic"))?;
        longest = longest.min(its);
        for guest in 0..world.topology.guests.len() {
            check_errors(world, family, guest).with_context(|| said("errors"))?;
        }
        check_hairpins(world, family).with_context(|| said("hairpins"))?;
    }
    Ok(longest)
}

/// Ping, UDP, TCP, HTTP and bulk from every guest, whole, in fragments both ways
/// and unsegmented, in captures on both sides of the host of which every
/// checksum is verified.
fn check_bulk(world: &World, family: Family) -> Result<usize> {
    let mut longest = usize::MAX;
    let Topology {
        guests,
        world: outer,
        ..
    } = &world.topology;
    let udp = [
        UdpReflector::start(outer, family.server(0, 3478))?,
        UdpReflector::start(outer, family.server(1, 3479))?,
    ];
    let tcp = TcpReflector::start(outer, family.server(1, 7))?;
    let http = HttpServer::start(outer, family.server(0, 80))?;
    let payload = traffic::pattern(200_000);
    let (peer, device) = world.topology.uplink_peer();
    for (number, guest) in guests.iter().enumerate() {
        let captures = [
            Capture::start(peer, device)?,
            Capture::start(&guest.namespace, GUEST_DEVICE)?,
        ];
        let local = world.guest_endpoint_in(family, number, 40_000);
        let socket = world.guest_socket_in(family, number, 40_000)?;
        for server in &udp {
            for length in [0, 1, 2, 1464, 1465, 1472, 1473, 5000, 20_000] {
                let seen = reflect_udp(&socket, server.address(), &payload[..length]);
                ensure!(
                    seen?.ip() == family.outside_address(),
                    "translated to another address"
                );
            }
        }
        let mut session = TcpSession::open(&guest.namespace, Some(local), tcp.address())?;
        ensure!(
            session.seen().ip() == family.outside_address(),
            "translated to another address"
        );
        session.exchange(&payload)?;
        drop(session);
        let url = format!("http://{}", http.address());
        let seen = curl(&guest.namespace, &format!("{url}/"))?;
        ensure!(
            seen.parse::<SocketAddr>()?.ip() == family.outside_address(),
            "seen as {seen}"
        );
        let body = curl(&guest.namespace, &format!("{url}/bytes/{}", payload.len()))?;
        ensure!(body.as_bytes() == payload, "the body is corrupt");
        for size in ["0", "56", "1472", "1473", "9000"] {
            let ping = ping(&guest.namespace, family.server(0, 0).ip(), 3, &["-s", size])?;
            ensure!(ping.received == 3, "{}", ping.output);
        }
        for options in [&[][..], &["-R"]] {
            let bulk = iperf3(
                &guest.namespace,
                outer,
                family.server(0, 5201),
                Amount::Bytes(bulk()),
                options,
            )?;
            ensure!(bulk.sent >= self::bulk(), "{bulk:?}");
        }
        for capture in captures {
            longest = longest.min(check_packets(&capture.stop()?)?);
        }
    }
    Ok(longest)
}

/// ICMP errors that the host makes, that come from the world, and that a guest
/// sends, with right checksums.
fn check_errors(world: &World, family: Family, number: usize) -> Result<()> {
    let Topology {
        guests,
        world: outer,
        ..
    } = &world.topology;
    let guest = &guests[number].namespace;
    let (peer, device) = world.topology.uplink_peer();
    let captures = [
        Capture::start(peer, device)?,
        Capture::start(guest, GUEST_DEVICE)?,
    ];
    let late = ping(guest, family.server(0, 0).ip(), 1, &["-t", "1"])?;
    let told = match family {
        V4 => "Time to live exceeded",
        V6 => "Time exceeded: Hop limit",
    };
    ensure!(
        late.received == 0 && late.output.contains(told),
        "{}",
        late.output
    );
    // Nobody listens there.
    let asker = world.guest_socket_in(family, number, 0)?;
    let refused = send_and_wait(&asker, family.server(0, 9999))?;
    ensure!(refused == ErrorKind::ConnectionRefused, "{refused}");
    // Nor here any more.
    let server = traffic::udp_socket(outer, family.server(1, 0))?;
    let asker = world.guest_socket_in(family, number, 0)?;
    asker.send_to(b"I leave", server.local_addr()?)?;
    let (_, seen) = server.recv_from(&mut [0; 10])?;
    // Closed it might go on hearing: a process that another thread is just forking
    // has a copy of it.
    asker.connect(family.server(0, 9999))?;
    let refused = send_and_wait(&server, seen)?;
    ensure!(refused == ErrorKind::ConnectionRefused, "{refused}");
    for capture in captures {
        capture.stop()?.verify_checksums(Partial::Accept)?;
    }
    Ok(())
}

/// Sends a datagram, and returns with what error the socket hears of it.
fn send_and_wait(socket: &UdpSocket, to: SocketAddr) -> Result<ErrorKind> {
    socket.connect(to)?;
    socket.send(b"anybody?")?;
    let heard = socket.recv(&mut [0; 10]);
    Ok(heard.err().context("somebody answered")?.kind())
}

/// The first guest and the last, who may be the same, talk over their outside
/// endpoints, whole and in fragments.
fn check_hairpins(world: &World, family: Family) -> Result<()> {
    let numbers = [0, world.topology.guests.len() - 1];
    let server = UdpReflector::start(&world.topology.world, family.server(0, 7))?;
    let mut ends = Vec::new();
    for (number, port) in numbers.into_iter().zip([40_100, 40_101]) {
        let socket = world.guest_socket_in(family, number, port)?;
        let outside = reflect_udp(&socket, server.address(), b"where?")?;
        ends.push((socket, outside));
    }
    let [(one, one_outside), (other, other_outside)] = &ends[..] else {
        bail!("not two ends");
    };
    // Not let in yet, but it lets the other one in.
    one.send_to(b"knock", other_outside)?;
    // By now it has come by.
    reflect_udp(one, server.address(), b"there?")?;
    let payload = traffic::pattern(5000);
    let mut buffer = [0; 9000];
    for length in [0, 100, 1472, 1473, 5000] {
        for (from, to, target, source) in [
            (other, one, one_outside, other_outside),
            (one, other, other_outside, one_outside),
        ] {
            from.send_to(&payload[..length], target)?;
            let (arrived, seen) = to
                .recv_from(&mut buffer)
                .with_context(|| format!("{length} bytes to {target}"))?;
            ensure!(
                buffer[..arrived] == payload[..length] && seen == *source,
                "{arrived} bytes from {seen}, not {length} from {source}"
            );
        }
    }
    Ok(())
}

/// Every checksum, and that the host is one hop. Returns how long a packet was
/// there each way.
fn check_packets(packets: &Packets) -> Result<usize> {
    packets.verify_checksums(Partial::Accept)?;
    let mut longest = usize::MAX;
    for direction in [Direction::In, Direction::Out] {
        let hops = match direction {
            Direction::In => 1,
            Direction::Out => 0,
        };
        let (mut bulk, mut largest) = (0, 0);
        for packet in &packets.list {
            let parsed = packet.parse()?;
            if packet.direction != direction {
                continue;
            }
            ensure!(parsed.ttl() == 64 - hops, "{}", packet.summary());
            bulk += parsed.payload.len();
            largest = largest.max(parsed.payload.len());
        }
        // iperf3 does not wait for the end of what is under way.
        ensure!(
            bulk as u64 > self::bulk() / 2,
            "{direction:?}: {bulk} bytes"
        );
        longest = longest.min(largest);
    }
    Ok(longest)
}

#[test]
fn guests_on_taps() -> Result<()> {
    check_traffic(&World::start(tap(Tap::default()).guests(2), &[])?)
}

#[test]
fn guests_on_taps_that_tapnat_makes() -> Result<()> {
    let made = Tap {
        made_by: TapMaker::Program,
        ..Tap::default()
    };
    check_traffic(&World::start(tap(made), &[])?)
}

#[test]
fn guests_on_taps_with_several_queues() -> Result<()> {
    let queues = Tap {
        queues: 2,
        ..Tap::default()
    };
    check_traffic(&World::start(tap(queues), &[])?)
}

/// Firecracker and Cloud Hypervisor (with one pair of queues) ask the kernel
/// for a tap with a vnet header and without `IFF_MULTI_QUEUE`, and find
/// otherwise that it is not theirs.
#[test]
fn guests_of_monitors_that_ask_for_one_queue() -> Result<()> {
    let made = Tap {
        made_by: TapMaker::Program,
        ..Tap::default()
    };
    let world = World::start(tap(made), &["--tap-queues", "single"])?;
    let shown = world.topology.host.ip("-json -details link show tap0")?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let flags = &shown[0]["linkinfo"]["info_data"];
    ensure!(
        flags["vnet_hdr"] == true && flags["multi_queue"] == false && flags["pi"] == false,
        "{flags}"
    );
    check_traffic(&world)
}

#[test]
fn guests_with_an_old_card_without_offloads() -> Result<()> {
    let old = Tap {
        offloads: false,
        ..Tap::default()
    };
    let longest = check_everything(&World::start(tap(old), &[])?)?;
    ensure!(longest <= 1500, "one of {longest} bytes");
    Ok(())
}

#[test]
fn guests_on_veths() -> Result<()> {
    let builder = both().inside(Inside::Veth).guests(2);
    check_traffic(&World::start(builder, &[])?)
}

#[test]
fn guests_on_a_bridge() -> Result<()> {
    let builder = both().inside(Inside::Bridge).guests(2);
    check_traffic(&World::start(builder, &[])?)
}

#[test]
fn guests_on_tuns() -> Result<()> {
    let builder = both().inside(Inside::Tun);
    check_traffic(&World::start(builder, &[])?)
}

#[test]
fn an_uplink_without_ethernet() -> Result<()> {
    check_traffic(&World::start(tap(Tap::default()).uplink(Uplink::Tun), &[])?)
}

#[test]
fn no_ethernet_anywhere() -> Result<()> {
    let builder = both().inside(Inside::Tun).uplink(Uplink::Tun);
    check_traffic(&World::start(builder, &[])?)
}

#[test]
fn guests_on_a_bridge_and_an_uplink_without_ethernet() -> Result<()> {
    let builder = both().inside(Inside::Bridge).guests(2);
    check_traffic(&World::start(builder.uplink(Uplink::Tun), &[])?)
}

#[test]
fn guests_on_veths_and_an_uplink_without_ethernet() -> Result<()> {
    let builder = both().inside(Inside::Veth).guests(2);
    check_traffic(&World::start(builder.uplink(Uplink::Tun), &[])?)
}

#[test]
fn clsact_in_place_of_tcx_without_ethernet() -> Result<()> {
    let builder = both().inside(Inside::Tun).uplink(Uplink::Tun);
    check_traffic(&World::start(builder, &["--attach", "clsact"])?)
}

#[test]
fn clsact_in_place_of_tcx() -> Result<()> {
    check_traffic(&World::start(tap(Tap::default()), &["--attach", "clsact"])?)
}

#[test]
fn a_bridge_as_uplink() -> Result<()> {
    let topology = both().build()?;
    let host = &topology.host;
    for line in [
        "link add br1 type bridge",
        "address flush dev uplink0",
        "link set uplink0 master br1",
        &format!("address add {HOST_ADDRESS}/24 dev br1"),
        "link set br1 up",
        &format!("route add default via {GATEWAY} dev br1"),
    ] {
        host.ip(line)?;
    }
    if topology.has_ipv6() {
        host.ip(&format!("address add {HOST_ADDRESS6}/64 dev br1"))?;
        host.ip(&format!("-6 route replace default via {GATEWAY6} dev br1"))?;
    }
    check_traffic(&World::start_in(topology, &[])?)
}

/// Two processors choose an outside port for the same inside port at once, and
/// open sessions to the same remote.
fn guests_that_begin_at_the_same_time_do_not_get_the_same_ports(family: Family) -> Result<()> {
    const SESSIONS: u16 = 300;
    let world = World::start(family.topology().inside(Inside::Veth).guests(2), &[])?;
    let outer = &world.topology.world;
    let udp = UdpReflector::start(outer, family.server(0, 7))?;
    let tcp = TcpReflector::start(outer, family.server(0, 7))?;
    let (world, udp, tcp) = (&world, &udp, &tcp);
    let run = |number: usize| -> Result<Vec<[SocketAddr; 2]>> {
        let mut sessions = Vec::new();
        for port in 30_000..30_000 + SESSIONS {
            let socket = world.guest_socket(number, port)?;
            let seen = reflect_udp(&socket, udp.address(), &port.to_be_bytes())?;
            let local = world.guest_endpoint(number, port);
            let guest = &world.guest(number).namespace;
            let mut session = TcpSession::open(guest, Some(local), tcp.address())?;
            session.exchange(&port.to_be_bytes())?;
            sessions.push((session, seen));
        }
        Ok(sessions
            .iter()
            .map(|(session, seen)| [session.seen(), *seen])
            .collect())
    };
    let seen = thread::scope(|scope| {
        let guests = [0, 1].map(|number| scope.spawn(move || run(number)));
        guests
            .into_iter()
            .map(|guest| guest.join().expect("no guest panics"))
            .collect::<Result<Vec<_>>>()
    })?
    .concat();
    for protocol in 0..2 {
        let distinct: BTreeSet<_> = seen.iter().map(|endpoints| endpoints[protocol]).collect();
        ensure!(
            distinct.len() == 2 * usize::from(SESSIONS),
            "shared endpoints"
        );
    }
    Ok(())
}
both_families!(guests_that_begin_at_the_same_time_do_not_get_the_same_ports);
