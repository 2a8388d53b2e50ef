//! The daemon gives back what is over: sessions, mappings, ports, the room of
//! guests that are gone. What is alive stays. Without a daemon new sessions see to it.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapInfo, MapType, loaded_maps},
    programs::loaded_programs,
};
use nix::sys::signal::Signal;
use tapnat_common::{
    abi::{
        EVERY_DEVICE, EndpointKey, FlowKey, Guest, Mapping, Permission, PermissionKey, Session,
        maps, programs,
    },
    net::Be32,
    ports::{Class, PortSet, set_index},
};
use tapnat_testbed::{
    topology::{self, Inside, Topology},
    traffic::{TcpReflector, TcpSession, UdpReflector, ping, reflect_udp, udp_socket},
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
    world::{World, server},
};

/// The shortest that there is of everything but established TCP.
const SHORT: [&str; 12] = [
    "--sweep-interval",
    "1s",
    "--udp-timeout",
    "1s",
    "--icmp-timeout",
    "1s",
    "--tcp-opening-timeout",
    "1s",
    "--tcp-closing-timeout",
    "1s",
    "--port-rest",
    "1s",
];

fn open<T: TryFrom<Map, Error = aya::maps::MapError>>(
    instance: &Instance,
    name: &str,
) -> Result<T> {
    let path: PathBuf = instance.pins().join("maps").join(name);
    let map = Map::from_map_data(MapData::from_pin(path)?)?;
    Ok(map.try_into()?)
}

fn entries<K: Pod, V: Pod>(instance: &Instance, name: &str) -> Result<usize> {
    let map: HashMap<_, K, V> = open(instance, name)?;
    Ok(map.keys().count())
}

/// Entries of the tables that are to become empty, guests aside.
fn sizes(instance: &Instance) -> Result<[usize; 4]> {
    Ok([
        entries::<FlowKey, Session>(instance, maps::IPV4.sessions)?,
        entries::<EndpointKey, Mapping>(instance, maps::IPV4.mappings)?,
        entries::<EndpointKey, EndpointKey>(instance, maps::IPV4.inside)?,
        entries::<PermissionKey, Permission>(instance, maps::IPV4.permissions)?,
    ])
}

/// Waits until there are as many entries as this.
fn until_sizes(instance: &Instance, expected: [usize; 4]) -> Result<()> {
    until(|| {
        let sizes = sizes(instance)?;
        ensure!(sizes == expected, "{sizes:?} entries, not {expected:?}");
        Ok(())
    })
}

/// Waits until this is no error any more.
fn until(check: impl Fn() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    loop {
        match check() {
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(50)),
            Ok(()) => return Ok(()),
        }
    }
}

fn is_taken(instance: &Instance, class: Class, port: u16) -> Result<bool> {
    let sets: Array<_, PortSet> = open(instance, maps::IPV4.ports)?;
    let set = sets.get(&set_index(0, class as u32, port), 0)?;
    Ok(set.is_taken(port))
}

#[test]
fn what_is_over_is_given_back_and_what_is_alive_stays() -> Result<()> {
    let world = World::start(Topology::builder().inside(Inside::Veth), &SHORT)?;
    let instance = &world.instance;
    let guest = world.guest(0);
    let tcp = TcpReflector::start(&world.topology.world, server(0, 7))?;
    let udp = UdpReflector::start(&world.topology.world, server(0, 7))?;
    let mut session = TcpSession::open(&guest.namespace, None, tcp.address())?;
    ping(&guest.namespace, server(0, 0).ip(), 1, &[])?;
    let socket = world.guest_socket(0, 0)?;
    let seen = reflect_udp(&socket, udp.address(), b"hello")?;
    socket.send_to(b"hello", server(1, 7))?;
    until(|| {
        let sizes = sizes(instance)?;
        ensure!(sizes[0] >= 6 && sizes[3] == 1, "{sizes:?} entries");
        Ok(())
    })?;
    ensure!(is_taken(instance, Class::Udp, seen.port())?, "not marked");

    // Two halves of one TCP session, and what it stands on.
    until_sizes(instance, [2, 1, 1, 0])?;
    ensure!(
        !is_taken(instance, Class::Udp, seen.port())?,
        "a port is lost"
    );
    session.exchange(b"still there")?;
    // The guest's count goes down with its sessions.
    let guests: HashMap<_, Be32, Guest> = open(instance, maps::IPV4.guests)?;
    let counted = guests.get(&Be32::from(guest.address), 0)?;
    ensure!(counted.sessions == 1, "{counted:?}");
    // And it may come again.
    reflect_udp(&socket, udp.address(), b"again")?;

    session.stream().shutdown(std::net::Shutdown::Both)?;
    drop(session);
    until_sizes(instance, [0; 4])
}

#[test]
fn the_next_process_gives_back_what_an_earlier_one_left() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let arguments = [&["--inside", "veth0=10.0.0.1/24"][..], &SHORT].concat();
    let mut first = instance.start(&arguments)?;
    let guest = world.guests.first().context("the world has no guest")?;
    let udp = UdpReflector::start(&world.world, server(0, 7))?;
    let socket = udp_socket(&guest.namespace, (guest.address, 0).into())?;
    let seen = reflect_udp(&socket, udp.address(), b"hello")?;
    first.signal(Signal::SIGKILL)?;
    first.wait(PATIENCE)?;
    // A port that nobody has, marked as taken: as after a lost race.
    let mut sets: Array<_, PortSet> = open(&instance, maps::IPV4.ports)?;
    let lost = seen.port() ^ 2;
    let index = set_index(0, Class::Udp as u32, lost);
    let mut set = sets.get(&index, 0)?;
    set.take(lost);
    sets.set(index, set, 0)?;
    drop(sets);

    let _second = instance.start(&arguments)?;
    until_sizes(&instance, [0; 4])?;
    until(|| {
        for port in [seen.port(), lost] {
            ensure!(!is_taken(&instance, Class::Udp, port)?, "{port} is lost");
        }
        Ok(())
    })
}

#[test]
fn a_table_full_of_mappings_has_room_again() -> Result<()> {
    let limits = [
        "--max-sessions",
        "300",
        "--guest-max-sessions",
        "300",
        "--guest-max-ports",
        "2000",
        "--udp-timeout",
        "1s",
        // Sessions are gone by then.
        "--port-rest",
        "10s",
        "--sweep-interval",
        "1s",
    ];
    let world = World::start(Topology::builder().inside(Inside::Veth), &limits)?;
    let udp = UdpReflector::start(&world.topology.world, server(0, 7))?;
    until(|| {
        for _ in 0..300 {
            let socket = world.guest_socket(0, 0)?;
            socket.send_to(b"one more", udp.address())?;
        }
        let refused = world.instance.count("mapping-table-full")?;
        ensure!(refused > 0, "it does not get full");
        Ok(())
    })?;
    until(|| {
        reflect_udp(&world.guest_socket(0, 0)?, udp.address(), b"hello")?;
        Ok(())
    })
    .context("what is over makes no room")
}

#[test]
fn guests_that_are_gone_make_room_for_others() -> Result<()> {
    let world = World::start(Topology::builder().inside(Inside::Veth), &SHORT)?;
    let mut guests: HashMap<_, Be32, Guest> = open(&world.instance, maps::IPV4.guests)?;
    let tcp = TcpReflector::start(&world.topology.world, server(0, 7))?;
    let mut session = TcpSession::open(&world.guest(0).namespace, None, tcp.address())?;
    for number in 0u32.. {
        let address = Be32::new(0x0a01_0000 + number);
        if guests.insert(address, Guest::default(), 0).is_err() {
            ensure!(number > 1000, "there is hardly any room");
            break;
        }
    }
    until(|| {
        let known = guests.keys().count();
        ensure!(known == 1, "{known} guests are known");
        Ok(())
    })?;
    session.exchange(b"still there")?;
    let guest = guests.get(&Be32::from(world.guest(0).address), 0)?;
    ensure!(guest.sessions == 1, "{guest:?}");
    Ok(())
}

#[test]
fn how_many_guests_a_device_has_is_counted_anew_by_the_next_process() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let arguments = ["--inside", "veth0=10.0.0.1/24"];
    let mut first = instance.start(&arguments)?;
    let guest = world.guests.first().context("the world has no guest")?;
    let udp = UdpReflector::start(&world.world, server(0, 7))?;
    begin(guest, V4, &udp)?;
    let device = world.host.device_index("veth0")?;
    let counted = [EVERY_DEVICE, device.context("the device is gone")?];
    let mut counts: HashMap<_, u32, u32> = open(&instance, maps::IPV4.guests_on)?;
    // As after a lost race: new guests behind the device would be refused, for ever.
    for device in counted {
        ensure!(counts.get(&device, 0)? == 1, "{device}");
        counts.insert(device, 5000, 0)?;
    }
    first.signal(Signal::SIGKILL)?;
    first.wait(PATIENCE)?;
    let _second = instance.start(&arguments)?;
    for device in counted {
        ensure!(counts.get(&device, 0)? == 1, "{device}");
    }
    Ok(())
}

/// Until Linux 6.3 the kernel runs the sweep with softirqs on (`bpf_test_run()`), so that packets come
/// while it is in the middle of something.
#[test]
fn the_sweep_shares_no_memory_of_a_cpu_with_packets() -> Result<()> {
    let world = World::start(V6.topology().inside(Inside::Veth), &[])?;
    for table in [maps::IPV4.sessions, maps::IPV6.sessions] {
        let table = MapInfo::from_pin(world.instance.pins().join("maps").join(table))?.id();
        let mut sweeps = BTreeSet::new();
        let mut packets = BTreeSet::new();
        for program in loaded_programs().filter_map(Result::ok) {
            // One that is gone meanwhile is another instance's.
            let used = program.map_ids().ok().flatten().unwrap_or_default();
            if used.contains(&table) {
                let is_sweep = program.name_as_str() == Some(programs::SWEEP);
                if is_sweep { &mut sweeps } else { &mut packets }.extend(used);
            }
        }
        ensure!(!sweeps.is_empty() && packets.len() > 10, "no programs");
        let shared: Vec<_> = loaded_maps()
            .filter_map(Result::ok)
            .filter(|map| sweeps.contains(&map.id()) && packets.contains(&map.id()))
            .filter(|map| matches!(map.map_type(), Ok(MapType::PerCpuArray)))
            .filter_map(|map| map.name_as_str().map(ToOwned::to_owned))
            .collect();
        // Only ever added to, in one instruction.
        ensure!(shared == [maps::NAT_LOG_LOST], "{shared:?}");
    }
    Ok(())
}

/// Fewer than a guest begins in [`a_guest_goes_on_beginning_sessions_without_a_process`], and
/// more than it has at once.
const LIMIT: usize = 64;

/// Begins a flow, which ends by itself, and has an answer come back.
fn begin(guest: &topology::Guest, family: Family, server: &UdpReflector) -> Result<()> {
    let any_port = SocketAddr::new(family.address_of(guest), 0);
    let socket = udp_socket(&guest.namespace, any_port)?;
    reflect_udp(&socket, server.address(), b"hello").map(drop)
}

fn a_guest_goes_on_beginning_sessions_without_a_process(family: Family) -> Result<()> {
    let builder = family.topology().inside(Inside::Veth).guests(2);
    let world = builder.build()?;
    let instance = Instance::new(&world.host);
    let limit = LIMIT.to_string();
    let devices = world.inside();
    let arguments: Vec<_> = devices
        .iter()
        .flat_map(|device| ["--inside", device])
        .chain(SHORT)
        .chain(["--guest-max-sessions", &limit, "--guest-max-ports", &limit])
        .collect();
    let mut first = instance.start(&arguments)?;
    let [guest, other] = &world.guests[..] else {
        bail!("the world has {} guests", world.guests.len());
    };
    let tcp = TcpReflector::start(&world.world, family.server(0, 7))?;
    let udp = UdpReflector::start(&world.world, family.server(0, 7))?;
    let mut alive = [guest, other]
        .map(|guest| TcpSession::open(&guest.namespace, None, tcp.address()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;

    // At its limit at this moment, with what nobody is to touch again.
    first.signal(Signal::SIGKILL)?;
    first.wait(PATIENCE)?;
    for _ in 0..LIMIT * 2 {
        let any_port = SocketAddr::new(family.address_of(guest), 0);
        udp_socket(&guest.namespace, any_port)?.send_to(b"hello", udp.address())?;
    }
    let refused = |reason| instance.count(reason);
    ensure!(
        refused("guest-session-limit")? != 0,
        "it was refused nothing"
    );
    // The datapath waits a while for another process.
    until(|| begin(guest, family, &udp))?;
    let before = refused("guest-session-limit")?;
    for number in 0..LIMIT * 3 {
        let beside = if number % 20 == 0 {
            &[guest, other][..]
        } else {
            &[guest]
        };
        for guest in beside {
            begin(guest, family, &udp).with_context(|| format!("flow {number}"))?;
        }
        for session in &mut alive {
            session.exchange(b"still there")?;
        }
        thread::sleep(Duration::from_millis(120));
    }
    let after = refused("guest-session-limit")? + refused("guest-port-limit")?;
    ensure!(after == before, "{} were refused", after - before);

    let _second = instance.start(&arguments)?;
    for session in &mut alive {
        session.exchange(b"still there")?;
    }
    begin(guest, family, &udp)
}
both_families!(a_guest_goes_on_beginning_sessions_without_a_process);
