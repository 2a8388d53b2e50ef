//! What the operator denies to guests they do not get, and nobody else notices;
//! and guests that are not who they say.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use etherparse::{ArpEthIpv4Packet, ArpOperation};
use nix::libc;
use tapnat_testbed::{
    Namespace, packet,
    topology::{GUEST_DEVICE, HOST_ADDRESS, Inside, Topology},
    traffic::{self, TcpReflector, TcpSession, UdpReflector},
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::Instance,
    wires::Wires,
    world::World,
};

const PATIENCE: Duration = Duration::from_secs(5);

fn world(family: Family, guests: u8, arguments: &[&str]) -> Result<World> {
    let builder = family.topology().inside(Inside::Veth).guests(guests);
    World::start(builder, arguments)
}

/// Checks that whoever connects is told at once that it may not.
fn is_refused(namespace: &Namespace, to: SocketAddr) -> Result<()> {
    let Err(error) = traffic::connect(namespace, None, to, PATIENCE) else {
        anyhow::bail!("{to} was reached");
    };
    let told = error
        .root_cause()
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error);
    // The kernel's word for ICMP 3/13, or ICMPv6 1/1.
    let prohibited = match Family::of(to.ip()) {
        V4 => libc::EHOSTUNREACH,
        V6 => libc::EACCES,
    };
    ensure!(told == Some(prohibited), "{error:#}");
    Ok(())
}

fn ping(namespace: &Namespace, to: IpAddr) -> Result<bool> {
    Ok(traffic::ping(namespace, to, 1, &["-W", "1"])?.received == 1)
}

fn denied_destinations_are_refused_and_the_others_are_not(family: Family) -> Result<()> {
    let length = match family {
        V4 => 32,
        V6 => 128,
    };
    let denied = format!("{}/{length}", family.server(1, 0).ip());
    let world = world(family, 1, &["--deny", &denied])?;
    let servers =
        [0, 1].map(|number| TcpReflector::start(&world.topology.world, family.server(number, 7)));
    let [open, closed] = servers;
    let guest = &world.guest(0).namespace;
    TcpSession::open(guest, None, open?.address())?.exchange(b"let through")?;
    is_refused(guest, closed?.address())?;
    ensure!(!ping(guest, family.server(1, 0).ip())?, "answered");
    ensure!(ping(guest, family.server(0, 0).ip())?, "not answered");
    ensure!(
        world.instance.count("denied-destination")? >= 2,
        "not counted"
    );
    let text = world.instance.ask("status", &[])?;
    ensure!(
        text.contains(&format!("guests are kept from: {denied}")),
        "{text}"
    );
    Ok(())
}
both_families!(denied_destinations_are_refused_and_the_others_are_not);

struct Reloading {
    instance: Instance,
    file: PathBuf,
}

impl Reloading {
    fn say(&self, topology: &Topology, more: &str) -> Result<()> {
        fs::write(
            &self.file,
            format!("inside = {:?}\n{more}", topology.inside()),
        )?;
        Ok(())
    }

    fn reload(&self, topology: &Topology, more: &str) -> Result<()> {
        self.say(topology, more)?;
        self.instance.ask("reload", &[]).map(drop)
    }
}

impl Drop for Reloading {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

fn sessions_end_when_they_are_denied_and_the_others_go_on(family: Family) -> Result<()> {
    let builder = family.topology().inside(Inside::Veth);
    let topology = builder.guests(2).build()?;
    let instance = Instance::new(&topology.host);
    let file = std::env::temp_dir().join(format!("{}.toml", instance.name()));
    let bed = Reloading { instance, file };
    bed.say(&topology, "filtering = \"endpoint-independent\"\n")?;
    let path = Path::to_str(&bed.file).context("a strange directory")?;
    let _process = bed.instance.start(&["--config", path])?;
    let servers = [
        TcpReflector::start(&topology.world, family.server(0, 7))?,
        TcpReflector::start(&topology.world, family.server(1, 7))?,
    ];
    let guest = &topology.guests[0].namespace;
    let mut kept = TcpSession::open(guest, None, servers[0].address())?;
    let mut ended = TcpSession::open(guest, None, servers[1].address())?;
    kept.exchange(b"both")?;
    ended.exchange(b"both")?;

    let denied = family.server(1, 0).ip().to_string();
    let deny = format!("deny = [\"{denied}\"]\n");
    bed.reload(&topology, &deny)?;
    kept.exchange(&traffic::pattern(100_000))?;
    ended
        .stream()
        .set_read_timeout(Some(Duration::from_secs(1)))?;
    ensure!(ended.exchange(b"no more").is_err(), "it goes on");
    is_refused(guest, servers[1].address())?;
    let flows = bed.instance.ask("flows", &[])?;
    ensure!(!flows.contains(&denied), "{flows}");

    // What is allowed again is a new beginning, which here is the old one.
    bed.reload(&topology, "")?;
    TcpSession::open(guest, None, servers[1].address())?.exchange(b"again")?;
    kept.exchange(b"still")?;
    Ok(())
}
both_families!(sessions_end_when_they_are_denied_and_the_others_go_on);

fn guests_reach_each_other_as_the_world_does_or_as_they_are_let(family: Family) -> Result<()> {
    for (option, over_outside, directly) in [
        ("", true, false),
        ("--isolate", false, false),
        ("--route-guests", true, true),
    ] {
        let mut arguments = vec!["--filtering", "endpoint-independent"];
        arguments.extend(Some(option).filter(|option| !option.is_empty()));
        let world = world(family, 2, &arguments)?;
        if family == V6 {
            // Without it the kernel forwards between no devices, whatever is set for them.
            world
                .topology
                .host
                .sysctl("net.ipv6.conf.all.forwarding", "1")?;
        }
        let outer = UdpReflector::start(&world.topology.world, family.server(0, 7))?;
        let inner = TcpReflector::start(&world.guest(1).namespace, world.guest_endpoint(1, 80))?;
        let asked = world.guest_socket(1, 40_000)?;
        let outside = traffic::reflect_udp(&asked, outer.address(), b"where am I?")?;
        let asking = world.guest_socket(0, 40_001)?;
        traffic::reflect_udp(&asking, outer.address(), b"where am I?")?;
        asking.send_to(b"hairpin", outside)?;
        if over_outside {
            let mut buffer = [0; 16];
            let (length, _) = asked.recv_from(&mut buffer)?;
            ensure!(&buffer[..length] == b"hairpin", "something else");
        } else {
            asked.send_to(b"after it", outer.address())?;
            let (_, first) = asked.recv_from(&mut [0; 64])?;
            ensure!(first == outer.address(), "{option}: the hairpin arrived");
        }
        let guest = &world.guest(0).namespace;
        if directly {
            TcpSession::open(guest, None, inner.address())?.exchange(b"neighbour")?;
        } else {
            is_refused(guest, inner.address())?;
        }
        let refused = world.instance.count("guest-isolated")?;
        let paths = [over_outside, directly];
        let expected = paths.iter().filter(|path| !**path).count();
        ensure!(
            refused >= u64::try_from(expected)? && (refused == 0) == (expected == 0),
            "{option}: {refused} refused"
        );
        world.check_reach()?;
    }
    Ok(())
}
both_families!(guests_reach_each_other_as_the_world_does_or_as_they_are_let);

fn guests_that_are_kept_from_the_host_reach_the_world_and_answer_the_host(
    family: Family,
) -> Result<()> {
    for deny in [false, true] {
        let arguments: &[&str] = if deny { &["--deny-host"] } else { &[] };
        let world = world(family, 1, arguments)?;
        let host = &world.topology.host;
        let guest = world.guest(0);
        let gateway = family.gateway_of(guest);
        let of_host = TcpReflector::start(host, SocketAddr::new(gateway, 22))?;
        let of_guest = TcpReflector::start(&guest.namespace, world.guest_endpoint(0, 22))?;
        if deny {
            is_refused(&guest.namespace, of_host.address())?;
            ensure!(!ping(&guest.namespace, gateway)?, "answered");
            ensure!(world.instance.count("host-denied")? >= 2, "not counted");
        } else {
            TcpSession::open(&guest.namespace, None, of_host.address())?.exchange(b"host")?;
            ensure!(ping(&guest.namespace, gateway)?, "not answered");
        }
        TcpSession::open(host, None, of_guest.address())?.exchange(&traffic::pattern(10_000))?;
        ensure!(
            ping(host, family.address_of(guest))?,
            "no answer to the host"
        );
        world.check_reach()?;
    }
    Ok(())
}
both_families!(guests_that_are_kept_from_the_host_reach_the_world_and_answer_the_host);

fn no_guest_of_a_bridge_begins_in_anothers_name(family: Family) -> Result<()> {
    let world = World::start(family.topology().inside(Inside::Bridge).guests(2), &[])?;
    let wires = Wires::open(&world)?;
    wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let spoofed = packet::udp(wires.inside(0, 40_001), family.remote(0, 53)).payload(b"not me");
    wires.guests[1].send(&spoofed)?;
    // Nor in that of the host, or of nobody here.
    for source in [family.inside_host(0, 1), family.inside_host(9, 9)] {
        let source = SocketAddr::new(source, 40_001);
        let spoofed = packet::udp(source, family.remote(0, 53)).payload(b"not me");
        wires.guests[1].send(&spoofed)?;
    }
    wires.nothing_arrives()?;
    ensure!(
        world.instance.count("spoofed-link-address")? == 1,
        "not counted"
    );
    ensure!(world.instance.count("spoofed-source")? == 2, "not counted");
    // Whose it is, and the other one, go on.
    wires.map_udp(0, 40_002, family.remote(0, 53))?;
    wires.map_udp(1, 40_000, family.remote(0, 53))?;
    Ok(())
}
both_families!(no_guest_of_a_bridge_begins_in_anothers_name);

fn an_address_that_roams_is_let_go_where_that_is_allowed(family: Family) -> Result<()> {
    let builder = family.topology().inside(Inside::Bridge).guests(2);
    let world = World::start(builder, &["--roaming"])?;
    let wires = Wires::open(&world)?;
    wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let moved = packet::udp(wires.inside(0, 40_001), family.remote(0, 53)).payload(b"took over");
    wires.guests[1].send(&moved)?;
    let arrived = wires.world.receive()?;
    ensure!(arrived.payload == b"took over", "{arrived:?}");
    Ok(())
}
both_families!(an_address_that_roams_is_let_go_where_that_is_allowed);

fn a_guest_cannot_send_in_anothers_name_from_another_device(family: Family) -> Result<()> {
    let (world, wires) = family.wired(2, &[])?;
    let outside = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    let spoofed = packet::udp(wires.inside(0, 40_000), family.remote(0, 53)).payload(b"not me");
    wires.guests[1].send(&spoofed)?;
    wires.nothing_arrives()?;
    ensure!(world.instance.count("spoofed-source")? == 1, "not counted");
    wires.answer_udp(family.remote(0, 53), outside, 0, 40_000)
}
both_families!(a_guest_cannot_send_in_anothers_name_from_another_device);

/// Neither a guest on another device nor the host's own addresses can be announced away.
#[test]
fn what_a_guest_announces_by_arp_holds_for_its_own_device_alone() -> Result<()> {
    let world = world(V4, 2, &[])?;
    world.check_reach()?;
    let host = &world.topology.host;
    let wires = Wires::open(&world)?;
    let victim = world.guest(0);
    let known = || host.ip(&format!("neighbour show {} dev veth0", victim.address));
    let link = victim.namespace.mac_address(GUEST_DEVICE)?;
    ensure!(known()?.contains(&link), "the host does not know the guest");
    let forged = [
        victim.address,
        victim.gateway,
        HOST_ADDRESS,
        world.guest(1).gateway,
    ];
    let frames = forged.map(|address| {
        let announced = ArpEthIpv4Packet {
            operation: ArpOperation::REQUEST,
            sender_mac: [2, 0, 0, 0, 6, 6],
            sender_ipv4: address.octets(),
            target_mac: [0; 6],
            target_ipv4: address.octets(),
        };
        [
            &[0xff; 6][..],
            &[2, 0, 0, 0, 6, 6, 0x08, 0x06],
            &announced.to_bytes(),
        ]
        .concat()
    });
    wires.guests[1].send_all(&packet::udp(V4.remote(0, 1), V4.remote(0, 1)), |_| {
        frames.into()
    })?;
    // After those.
    wires.map_udp(1, 40_000, V4.remote(0, 53))?;
    ensure!(known()?.contains(&link), "{}", known()?);
    world.check_reach()
}
