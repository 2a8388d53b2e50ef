//! What others find out about the NAT: programs that are not ours, and know
//! nothing about it, ask from a guest how it behaves, or read what is on the
//! wire.

use std::{env, fs, net::SocketAddr, path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    Namespace, packet,
    process::Process,
    topology::{
        Builder, GATEWAY, GUEST_DEVICE, HOST_ADDRESS, Inside, Tap, Topology, UPLINK,
        WORLD_ADDRESSES,
    },
    traffic::{self, Amount, TcpReflector, TcpSession, UdpReflector, iperf3, ping, reflect_udp},
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    stun::{
        self,
        Behaviour::{self, AddressAndPortDependent, AddressDependent, EndpointIndependent},
    },
    wires::Wires,
    world::{World, server},
};

/// How long a program may take that waits for answers that do not come.
const PATIENCE: Duration = Duration::from_mins(1);

fn veth(family: Family) -> Builder {
    family.topology().inside(Inside::Veth)
}

/// What the classic STUN client says of the NAT (RFC 3489), with the classic
/// server in the world.
fn ask_classic_stun(arguments: &[&str]) -> Result<String> {
    let world = World::start(veth(V4), arguments)?;
    let [primary, secondary] = WORLD_ADDRESSES.map(|address| address.to_string());
    let _server = world
        .topology
        .world
        .command("stund")
        .args(["-h", &primary, "-a", &secondary])
        .spawn()?;
    let guest = &world.guest(0).namespace;
    // It prints nothing when it listens.
    let probe = traffic::udp_socket(guest, world.guest_endpoint(0, 0))?;
    for attempt in 0.. {
        let request = [&[0, 1, 0, 0][..], &[7; 16]].concat();
        probe.set_read_timeout(Some(Duration::from_millis(200)))?;
        probe.send_to(&request, server(0, 3478))?;
        if probe.recv(&mut [0; 500]).is_ok() {
            break;
        }
        ensure!(attempt < 50, "the STUN server does not answer");
    }
    // Its exit status is its verdict.
    let said = guest
        .command("stun")
        .args([&primary, "-p", "40000"])
        .timeout(PATIENCE)
        .output()?
        .stdout;
    let verdict = said.lines().find_map(|line| line.strip_prefix("Primary: "));
    verdict
        .map(|line| line.trim().to_owned())
        .with_context(|| said.clone())
}

#[test]
fn the_classic_stun_client_sees_address_dependent_filtering_by_default() -> Result<()> {
    let said = ask_classic_stun(&[])?;
    ensure!(
        said == "Independent Mapping, Address Dependent Filter, preserves ports, will hairpin",
        "{said}"
    );
    Ok(())
}

#[test]
fn the_classic_stun_client_sees_endpoint_independent_filtering() -> Result<()> {
    let said = ask_classic_stun(&["--filtering", "endpoint-independent"])?;
    ensure!(
        said == "Independent Mapping, Independent Filter, preserves ports, will hairpin",
        "{said}"
    );
    Ok(())
}

#[test]
fn the_classic_stun_client_sees_address_and_port_dependent_filtering() -> Result<()> {
    let said = ask_classic_stun(&["--filtering", "address-and-port-dependent"])?;
    ensure!(
        said == "Independent Mapping, Port Dependent Filter, preserves ports, will hairpin",
        "{said}"
    );
    Ok(())
}

#[test]
fn the_classic_stun_client_sees_random_ports_where_its_own_are_withheld() -> Result<()> {
    let said = ask_classic_stun(&["--ports", "50000-60000"])?;
    ensure!(
        said == "Independent Mapping, Address Dependent Filter, random port, will hairpin",
        "{said}"
    );
    Ok(())
}

/// What RFC 5780 finds of mapping and filtering, in this order.
fn discover(family: Family, arguments: &[&str]) -> Result<[Behaviour; 2]> {
    let world = World::start(veth(family).guests(2), arguments)?;
    let addresses = [0, 1].map(|number| family.server(number, 0).ip());
    let server = stun::Server::start(&world.topology.world, addresses, [3478, 3479])?;
    // Another guest has the same port for the second question's remote: there, a
    // port that depends on the remote is not the same as at the first.
    let other = world.guest_socket(1, 40_001)?;
    let target = SocketAddr::new(addresses[1], server.address().port());
    stun::mapped_address(&other, target)?;
    let socket = world.guest_socket(0, 40_001)?;
    let mapping = stun::discover_mapping(&socket, server.address())?;
    let socket = world.guest_socket(0, 40_002)?;
    let filtering = stun::discover_filtering(&socket, server.address())?;
    Ok([mapping, filtering])
}

fn rfc5780_discovery_finds_what_was_asked_for(family: Family) -> Result<()> {
    for (arguments, expected) in [
        (&[][..], [EndpointIndependent, AddressDependent]),
        (
            &["--filtering", "endpoint-independent"],
            [EndpointIndependent, EndpointIndependent],
        ),
        (
            &["--filtering", "address-and-port-dependent"],
            [EndpointIndependent, AddressAndPortDependent],
        ),
        (
            &["--mapping", "udp=address-and-port-dependent"],
            [AddressAndPortDependent, AddressAndPortDependent],
        ),
    ] {
        let found = discover(family, arguments).with_context(|| format!("{arguments:?}"))?;
        ensure!(found == expected, "{arguments:?}: {found:?}");
    }
    Ok(())
}
both_families!(rfc5780_discovery_finds_what_was_asked_for);

/// The host leases its outside address, and renews it, while guests talk: by
/// broadcast at first, then from address to address.
#[test]
fn the_hosts_dhcp_client_gets_its_lease_and_renews_it() -> Result<()> {
    let world = World::start(veth(V4), &[])?;
    let Topology {
        host, world: outer, ..
    } = &world.topology;
    world.check_reach()?;
    let directory = env::temp_dir();
    let file = |kind: &str| directory.join(format!("{}.{kind}", outer.name()));
    let [configuration, leases] = [file("udhcpd"), file("leases")];
    fs::write(&leases, "")?;
    let settings = format!(
        "interface {}\nstart {HOST_ADDRESS}\nend {HOST_ADDRESS}\nlease_file {}\n\
         option subnet 255.255.255.0\noption router {GATEWAY}\noption lease 3600\n",
        world.topology.world_device(),
        leases.display()
    );
    fs::write(&configuration, settings)?;
    let _server = outer
        .command("busybox")
        .args(["udhcpd", "-f"])
        .arg(&configuration)
        .spawn()?;
    let mut client = host
        .command("busybox")
        .args(["udhcpc", "-f", "-i", UPLINK, "-s", "/bin/true"])
        .spawn()?;
    let obtained = |line: &str| line.contains(&format!("lease of {HOST_ADDRESS} obtained"));
    client.wait_for_error_line(PATIENCE, obtained)?;
    // It renews when told to; the next lease is the next such line.
    client.signal(Signal::SIGUSR1)?;
    for attempt in 0.. {
        let said = client.stderr();
        if said.lines().filter(|line| obtained(line)).count() == 2 {
            break;
        }
        ensure!(attempt < 600 && client.is_running(), "{said}");
        thread::sleep(Duration::from_millis(50));
    }
    let said = client.stderr();
    ensure!(said.contains("renew"), "{said}");
    for file in [configuration, leases] {
        fs::remove_file(file)?;
    }
    world.check_reach()
}

/// Every hop, ours included, and the MTU of the path behind it.
fn tracepath_finds_hops_and_mtu(family: Family) -> Result<()> {
    let world = World::start(veth(family).path_mtu(1400), &[])?;
    let target = family.server(0, 0).ip();
    let said = world.guest(0).namespace.command("tracepath");
    let said = said
        .args(["-n", "-m", "5", &target.to_string()])
        .timeout(PATIENCE)
        .run()?;
    for hop in [family.inside_host(0, 1), family.gateway(), target] {
        ensure!(said.contains(&hop.to_string()), "{hop} is not in {said}");
    }
    ensure!(!said.contains("no reply"), "{said}");
    ensure!(said.contains("Resume: pmtu 1400 hops 3"), "{said}");
    Ok(())
}
both_families!(tracepath_finds_hops_and_mtu);

/// TCP, UDP, several at once, both ways at once; a busy machine may lose a
/// datagram.
fn iperf3_gets_through_in_all_its_ways(family: Family) -> Result<()> {
    let world = World::start(family.topology(), &[])?;
    let guest = &world.guest(0).namespace;
    let run = |bytes, options: &[&str]| {
        let (outer, amount) = (&world.topology.world, Amount::Bytes(bytes));
        iperf3(guest, outer, family.server(0, 5201), amount, options)
            .with_context(|| format!("{options:?}"))
    };
    for options in [&["-P", "4"][..], &["-P", "4", "-R"], &["--bidir"]] {
        let bulk = run(8 << 20, options)?;
        // Both ways at once, the faster one ends it for both.
        let least = if options == ["--bidir"] { 1 } else { 8 << 20 };
        ensure!(
            bulk.sent >= least && bulk.received > 0,
            "{options:?}: {bulk:?}"
        );
    }
    // Whole datagrams, and such as need fragments.
    for length in ["1400", "4000"] {
        for options in [
            &["-u", "-b", "20M", "-l", length][..],
            &["-u", "-b", "20M", "-l", length, "-R"],
        ] {
            let bulk = run(2 << 20, options)?;
            let (lost, all) = bulk.datagrams.context("no datagrams")?;
            ensure!(all > 500 && lost * 10 <= all, "{options:?}: {bulk:?}");
        }
    }
    Ok(())
}
both_families!(iperf3_gets_through_in_all_its_ways);

/// tcpdump at work on one end of a wire.
struct Tcpdump {
    process: Process,
    file: PathBuf,
}

impl Tcpdump {
    fn start(namespace: &Namespace, device: &str) -> Result<Self> {
        let name = format!("{}-{device}.pcap", namespace.name());
        let file = env::temp_dir().join(name);
        let mut process = namespace
            .command("tcpdump")
            .args(["-i", device, "-n", "-U", "--immediate-mode", "-B", "16384"])
            .args(["-Z", "root", "-w"])
            .arg(&file)
            .spawn()?;
        process.wait_for_error_line(Duration::from_secs(10), |line| {
            line.contains("listening on")
        })?;
        Ok(Self { process, file })
    }

    /// What it has to say about each packet, two lines and more of each.
    fn stop(mut self, namespace: &Namespace) -> Result<String> {
        // What is yet to be written is lost when it ends.
        let mut written = None;
        for _ in 0..100 {
            let before = written.replace(fs::metadata(&self.file)?.len());
            if before == written {
                break;
            }
            thread::sleep(Duration::from_millis(300));
        }
        self.process.terminate(Duration::from_secs(10))?;
        namespace
            .command("tcpdump")
            .args(["-n", "-vv", "-r"])
            .arg(&self.file)
            .timeout(PATIENCE)
            .run()
    }
}

impl Drop for Tcpdump {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// The lines in which tcpdump finds fault with a checksum.
fn faults(said: &str) -> Vec<&str> {
    let is_fault = |line: &&str| {
        [
            "bad cksum",
            "bad udp cksum",
            "incorrect ->",
            "wrong icmp cksum",
            "bad icmp6 cksum",
        ]
        .iter()
        .any(|fault| line.contains(fault))
    };
    said.lines().filter(is_fault).collect()
}

/// All kinds of packets between a guest without offloads and a world without,
/// so that every checksum on both wires is one that a receiver would see.
fn tcpdump_finds_no_bad_checksum(family: Family) -> Result<()> {
    let old = Tap {
        offloads: false,
        ..Tap::default()
    };
    let world = World::start(family.topology().inside(Inside::Tap(old)), &[])?;
    let Topology {
        world: outer,
        guests,
        ..
    } = &world.topology;
    let guest = &guests[0].namespace;
    let device = world.topology.world_device();
    outer.disable_checksum_offload(device)?;
    let dumps = [
        Tcpdump::start(guest, GUEST_DEVICE)?,
        Tcpdump::start(outer, device)?,
    ];
    let udp = UdpReflector::start(outer, family.server(0, 7))?;
    let tcp = TcpReflector::start(outer, family.server(1, 7))?;
    let socket = world.guest_socket(0, 40_000)?;
    for length in [0, 1, 2, 3, 1472, 1473, 5000] {
        reflect_udp(&socket, udp.address(), &traffic::pattern(length))?;
    }
    let mut session = TcpSession::open(guest, None, tcp.address())?;
    session.exchange(&traffic::pattern(300_001))?;
    for size in ["0", "1", "63", "65", "127", "129", "1472", "1473", "3000"] {
        let ping = ping(guest, family.server(0, 0).ip(), 2, &["-s", size])?;
        ensure!(ping.received == 2, "{}", ping.output);
    }
    // Errors, from the world's closed port and from a hop.
    for options in [&["-t", "1"][..], &["-t", "2"]] {
        ping(guest, family.server(0, 0).ip(), 1, options)?;
    }
    let closed = world.guest_socket(0, 40_001)?;
    closed.send_to(b"nobody?", family.server(0, 9999))?;
    let refused = closed.recv(&mut [0; 10]);
    ensure!(refused.is_err(), "somebody answered");
    for options in [&[][..], &["-R"]] {
        iperf3(
            guest,
            outer,
            family.server(0, 5201),
            Amount::Bytes(4 << 20),
            options,
        )?;
    }
    for (dump, namespace) in dumps.into_iter().zip([guest, outer]) {
        let said = dump.stop(namespace)?;
        ensure!(said.lines().count() > 2000, "a short capture");
        let told = match family {
            V4 => ["ICMP echo reply", "time exceeded", "unreachable"],
            V6 => ["ICMP6, echo reply", "time exceeded", "unreachable"],
        };
        for what in ["udp sum ok", "(correct)"].into_iter().chain(told) {
            let missing = what == "time exceeded" && namespace.name() == outer.name();
            ensure!(missing || said.contains(what), "no {what}");
        }
        let faults = faults(&said);
        ensure!(
            faults.is_empty(),
            "{} faults: {:?}",
            faults.len(),
            faults[0]
        );
    }
    Ok(())
}
both_families!(tcpdump_finds_no_bad_checksum);

/// It would find one: what comes with a bad checksum leaves with one.
fn tcpdump_finds_the_bad_checksum_that_was_sent(family: Family) -> Result<()> {
    let world = World::start(veth(family), &[])?;
    let wires = Wires::open(&world)?;
    let outer = &world.topology.world;
    let dump = Tcpdump::start(outer, world.topology.world_device())?;
    let good = packet::udp(wires.inside(0, 40_000), family.remote(0, 53)).payload(b"good");
    wires.out(0, &good)?;
    wires.guests[0].send_all(&good.payload(b"evil"), |packet| {
        let mut bytes = packet.build();
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        vec![bytes]
    })?;
    wires.unverified_arrivals()?;
    let said = dump.stop(outer)?;
    let faults = faults(&said);
    ensure!(faults.len() == 1, "{said}");
    // As tcpdump writes it.
    let to = format!("{}.53", family.remote(0, 0).ip());
    ensure!(faults[0].contains(&to), "{said}");
    Ok(())
}
both_families!(tcpdump_finds_the_bad_checksum_that_was_sent);
