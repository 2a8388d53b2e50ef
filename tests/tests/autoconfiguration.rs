//! Guests configure themselves over IPv6: the host is their router on its
//! inside devices, and on no other; what it tells them is true.

use std::{
    fs,
    net::{Ipv6Addr, SocketAddrV6, UdpSocket},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use etherparse::{
    Icmpv6Type, PacketBuilder,
    icmpv6::{NdpOptionsIterator, RouterAdvertisementHeader},
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, socket,
};
use tapnat_testbed::{
    Namespace,
    capture::{Capture, Captured, Options},
    packet::Ip,
    process::Process,
    snapshot::Snapshot,
    topology::{GUEST_DEVICE, Guest, Inside, Tap, TapMaker, Topology, UPLINK, WORLD_ADDRESSES6},
    traffic::{self, FrameSender},
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
    world::World,
};
use tempfile::TempDir;

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

/// The Ethernet address of a device.
fn mac(namespace: &Namespace, device: &str) -> Result<[u8; 6]> {
    let mac = namespace.mac_address(device)?;
    let mac: Vec<u8> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    Ok(mac.as_slice().try_into()?)
}

/// The option that says which link address a sender has.
fn link_address(mac: [u8; 6]) -> Vec<u8> {
    [&[1, 1], &mac[..]].concat()
}

/// A message of neighbour discovery to everybody on a link.
fn frame(from: [u8; 6], source: Ipv6Addr, kind: Icmpv6Type, rest: &[u8]) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(from, ALL_NODES_LINK)
        .ipv6(source.octets(), ALL_NODES.octets(), 255)
        .icmpv6(kind);
    let mut frame = Vec::new();
    builder.write(&mut frame, rest)?;
    Ok(frame)
}

/// Says, as a router of the world would, that it is the host's way out.
fn advertise(world: &Namespace, device: &str) -> Result<()> {
    let advertisement = Icmpv6Type::RouterAdvertisement(RouterAdvertisementHeader {
        cur_hop_limit: 64,
        managed_address_config: false,
        other_config: false,
        router_lifetime: 1800,
    });
    let timers = [0; 8];
    let source = link_local(world, device)?;
    let frame = frame(mac(world, device)?, source, advertisement, &timers)?;
    FrameSender::open(world, device)?.send(&frame)
}

/// What a router said.
#[derive(Debug)]
struct Advertisement {
    header: RouterAdvertisementHeader,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    hop_limit: u8,
    /// By their kinds.
    options: Vec<(u8, Vec<u8>)>,
}

impl Advertisement {
    fn read(packet: &Captured) -> Option<Self> {
        let packet = packet.parse().ok()?;
        let Icmpv6Type::RouterAdvertisement(header) = packet.icmpv6()?.icmp_type else {
            return None;
        };
        let Ip::V6(ip, _) = &packet.ip else {
            return None;
        };
        let options = NdpOptionsIterator::from_slice(packet.payload.get(8..)?);
        let options = options.map(|option| {
            let option = option.ok()?;
            Some((option.option_type().0, option.as_bytes().to_vec()))
        });
        Some(Self {
            header,
            source: ip.source_addr(),
            destination: ip.destination_addr(),
            hop_limit: ip.hop_limit,
            options: options.collect::<Option<_>>()?,
        })
    }

    fn option(&self, kind: u8) -> Result<&[u8]> {
        let option = self.options.iter().find(|(other, _)| *other == kind);
        let (_, bytes) = option.with_context(|| format!("no option {kind}: {self:?}"))?;
        Ok(bytes)
    }
}

/// A capture in which neighbour discovery is no chatter.
fn listen(guest: &Guest) -> Result<Capture> {
    let options = Options {
        chatter: true,
        ..Options::default()
    };
    Capture::start_with(&guest.namespace, GUEST_DEVICE, options)
}

fn advertisement(
    capture: &Capture,
    matches: impl Fn(&Advertisement) -> bool,
) -> Result<Advertisement> {
    let is_meant = |packet: &Captured| Advertisement::read(packet).is_some_and(|it| matches(&it));
    let packet = capture.wait_for(PATIENCE, is_meant)?;
    Advertisement::read(&packet).context("it was read before")
}

/// Waits until a guest has configured itself, and has it reach its router by both addresses.
fn check_guest(guest: &Guest) -> Result<()> {
    let (address, gateway) = guest.ipv6.context("there is IPv6")?;
    let beginning: Vec<_> = address.segments()[..4]
        .iter()
        .map(|segment| format!("{segment:x}"))
        .collect();
    let beginning = beginning.join(":").replace(":0:0", ":");
    has_address(&guest.namespace, GUEST_DEVICE, &beginning)?;
    let route = until(&guest.namespace, "-6 route show default", |said| {
        said.contains("proto ra")
    })?;
    let router = route.split_whitespace().nth(2).context("no router")?;
    let ping = traffic::ping(&guest.namespace, gateway.into(), 1, &[])?;
    ensure!(ping.received == 1, "{}", ping.output);
    let line = format!("ping -6 -c 1 -W 5 {router}%{GUEST_DEVICE}");
    guest.namespace.exec(&line).map(drop)
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

#[test]
fn a_guest_needs_nothing_else() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6().guests(2);
    let topology = topology.inside_mtu(1400).build()?;
    let capture = listen(&topology.guests[0])?;
    let arguments = [
        "--dns",
        "198.51.100.53,2001:db8::53,2001:db8::54",
        "--domain",
        "lan.example",
        "--nat64",
        "64:ff9b::/96",
    ];
    let world = World::start_in(topology, &arguments)?;
    let told = advertisement(&capture, |_| true)?;
    let packets = capture.stop()?;
    for guest in &world.topology.guests {
        guest.forget_ipv6()?;
        check_guest(guest)?;
    }
    let guest = world.guest(0);
    let mtu = format!("net.ipv6.conf.{GUEST_DEVICE}.mtu");
    ensure!(guest.namespace.read_sysctl(&mtu)? == "1400");
    // Its own, so that its neighbours are reached directly.
    let routes = guest.namespace.ip("-6 route show")?;
    ensure!(
        routes.contains("fd00:7a70::/64 dev lan0 proto kernel"),
        "{routes}"
    );

    let host = &world.topology.host;
    ensure!(told.source == link_local(host, "veth0")? && told.hop_limit == 255);
    ensure!(told.header.router_lifetime == 3600 && told.header.cur_hop_limit == 64);
    ensure!(told.option(1)? == link_address(mac(host, "veth0")?));
    ensure!(told.option(5)?[4..] == 1400_u32.to_be_bytes());
    let servers: Vec<_> = told.option(25)?[8..]
        .chunks_exact(16)
        .map(|bytes| Ipv6Addr::from(<[u8; 16]>::try_from(bytes).unwrap_or_default()))
        .collect();
    let expected: [Ipv6Addr; 2] = ["2001:db8::53".parse()?, "2001:db8::54".parse()?];
    ensure!(servers == expected, "{servers:?}");
    ensure!(told.option(31)?[8..] == *b"\x03lan\x07example\0\0\0\0");
    // For an hour, in units of eight seconds; then a code for 96 bits, and these.
    let pref64 = [
        38, 2, 0x0e, 0x10, 0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    ensure!(told.option(38)? == pref64);

    // Another reader than ours.
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("ra.pcap");
    packets.write_pcap(&file)?;
    let file = file.to_str().context("a path")?;
    let said = world
        .topology
        .host
        .exec(&format!("tcpdump -vv -n -r {file} icmp6[icmp6type]==134"))?;
    for words in [
        "router lifetime 3600s",
        "mtu option (5), length 8 (1):  1400",
        "fd00:7a70::/64, Flags [onlink, auto], valid time 7200s, pref. time 3600s",
        "rdnss option (25), length 40 (5):  lifetime 3600s, addr: 2001:db8::53 addr: 2001:db8::54",
        "dnssl option (31), length 24 (3):  lifetime 3600s, domain(s): lan.example.",
        "[icmp6 sum ok]",
    ] {
        ensure!(said.contains(words), "no '{words}' in {said}");
    }
    Ok(())
}

#[test]
fn guests_of_a_bridge_and_of_an_l3_device_configure_themselves() -> Result<()> {
    for inside in [Inside::Bridge, Inside::Tun] {
        let topology = Topology::builder()
            .inside(inside)
            .ipv6()
            .guests(2)
            .build()?;
        let capture = listen(&topology.guests[0])?;
        let world = World::start_in(topology, &[])?;
        let expected = match inside {
            Inside::Tun => [5, 3].as_slice(),
            _ => &[1, 5, 3],
        };
        let told = advertisement(&capture, |_| true)?;
        let kinds: Vec<_> = told.options.iter().map(|(kind, _)| *kind).collect();
        ensure!(kinds.starts_with(expected), "{inside:?}: {told:?}");
        for guest in &world.topology.guests {
            guest.forget_ipv6()?;
            check_guest(guest).with_context(|| format!("{inside:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_guest_whose_cable_is_plugged_in_later_is_told() -> Result<()> {
    let tap = Tap {
        made_by: TapMaker::Program,
        ..Tap::default()
    };
    let topology = Topology::builder()
        .inside(Inside::Tap(tap))
        .ipv6()
        .build()?;
    topology.guests[0].forget_ipv6()?;
    let world = World::start_in(topology, &[])?;
    check_guest(world.guest(0))
}

#[test]
fn each_solicitation_is_answered() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6();
    let world = World::start(topology, &[])?;
    let guest = world.guest(0);
    let capture = listen(guest)?;
    let own = link_local(&guest.namespace, GUEST_DEVICE)?;
    let mac = mac(&guest.namespace, GUEST_DEVICE)?;
    let sender = FrameSender::open(&guest.namespace, GUEST_DEVICE)?;
    let ask = |source, rest: &[u8]| {
        sender.send(&frame(mac, source, Icmpv6Type::RouterSolicitation, rest)?)
    };
    // By itself, as it has an address.
    ask(own, &link_address(mac))?;
    advertisement(&capture, |it| it.destination == own)?;
    drop(capture);
    // With all others, as it has none.
    let capture = listen(guest)?;
    ask(Ipv6Addr::UNSPECIFIED, &[])?;
    advertisement(&capture, |it| it.destination == ALL_NODES)?;
    Ok(())
}

#[test]
fn a_flood_of_solicitations_is_answered_in_measure() -> Result<()> {
    const MOST_EACH: u64 = 32;
    let topology = Topology::builder().inside(Inside::Veth).ipv6();
    let world = World::start(topology, &[])?;
    let guest = world.guest(0);
    let sender = FrameSender::open(&guest.namespace, GUEST_DEVICE)?;
    let mac = mac(&guest.namespace, GUEST_DEVICE)?;
    let capture = listen(guest)?;
    let start = Instant::now();
    let mut sent = 0_u16;
    while start.elapsed() < Duration::from_secs(4) {
        sent = sent.wrapping_add(1);
        // No more than the kernel remembers neighbours, of all namespaces together.
        let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xf, sent % 200);
        let source = if sent.is_multiple_of(3) {
            Ipv6Addr::UNSPECIFIED
        } else {
            source
        };
        // Some say where they are, so that they can be answered by themselves.
        let rest = if sent.is_multiple_of(3) {
            Vec::new()
        } else {
            link_address(mac)
        };
        let solicitation = frame(mac, source, Icmpv6Type::RouterSolicitation, &rest)?;
        // What the queue has no room for is lost, as for any guest.
        let _ = sender.send(&solicitation);
    }
    let seconds = start.elapsed().as_secs() + 1;
    let packets = capture.stop()?;
    let told: Vec<_> = packets
        .list
        .iter()
        .filter_map(Advertisement::read)
        .collect();
    let everybody = told.iter().filter(|it| it.destination == ALL_NODES).count() as u64;
    let each = told.len() as u64 - everybody;
    ensure!(
        (1..=seconds / 3 + 2).contains(&everybody)
            && (1..=seconds * MOST_EACH + MOST_EACH).contains(&each),
        "{everybody} for everybody and {each} in {seconds} s, of {}",
        packets.list.len()
    );
    // Who is left is answered.
    guest.forget_ipv6()?;
    check_guest(guest)
}

#[test]
fn guests_are_told_when_it_is_over() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6().build()?;
    let inside = topology.guests[0].inside();
    let instance = Instance::new(&topology.host);
    topology.guests[0].forget_ipv6()?;
    let mut process = instance.start(&["--inside", &inside])?;
    check_guest(&topology.guests[0])?;
    let capture = listen(&topology.guests[0])?;
    let status = process.terminate(PATIENCE)?;
    ensure!(status.success(), "{}", process.stderr());
    let last = advertisement(&capture, |it| it.header.router_lifetime == 0)?;
    ensure!(last.destination == ALL_NODES);
    let namespace = &topology.guests[0].namespace;
    until(namespace, "-6 route show default", str::is_empty)?;
    let line = format!("-6 address show dev {GUEST_DEVICE} scope global");
    until(namespace, &line, |said| said.contains("deprecated"))?;

    // What goes on without the process goes on for guests, too.
    let mut process = instance.start(&["--inside", &inside, "--keep"])?;
    check_guest(&topology.guests[0])?;
    let capture = listen(&topology.guests[0])?;
    let status = process.terminate(PATIENCE)?;
    ensure!(status.success(), "{}", process.stderr());
    // What it sent before its end has arrived.
    let packets = capture.stop()?;
    let told: Vec<_> = packets
        .list
        .iter()
        .filter_map(Advertisement::read)
        .collect();
    let is_last = |it: &Advertisement| it.header.router_lifetime == 0;
    ensure!(!told.iter().any(is_last), "{told:?}");
    check_guest(&topology.guests[0])
}

/// What the DHCP client runs: it writes down what it was told.
const CLIENT_SCRIPT: &str = "#!/bin/sh
[ -z \"$new_dhcp6_name_servers$new_ip6_address\" ] || {
    echo \"address=$new_ip6_address\"
    echo \"resolvers=$new_dhcp6_name_servers\"
    echo \"domains=$new_dhcp6_domain_search\"
    echo end
} >> TOLD
exit 0
";

/// A guest's DHCP client (ISC's), with all that it writes.
struct Client {
    process: Process,
    directory: TempDir,
}

impl Client {
    fn start(guest: &Guest, options: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(name).display().to_string();
        let script = CLIENT_SCRIPT.replace("TOLD", &path("told"));
        fs::write(path("script"), script)?;
        fs::set_permissions(path("script"), fs::Permissions::from_mode(0o755))?;
        fs::write(path("leases"), "")?;

        link_local(&guest.namespace, GUEST_DEVICE)?;
        let command = guest.namespace.command("dhclient");
        let process = command
            .args(["-6", "-v", "-d", "-1", "-D", "LL"])
            .args(["-sf", &path("script"), "-lf", &path("leases")])
            .args(["-pf", &path("process")])
            .args(options)
            .arg(GUEST_DEVICE)
            .spawn()?;
        Ok(Self { process, directory })
    }

    /// What it was told, line by line.
    fn told(&self, name: &str) -> Result<String> {
        let start = Instant::now();
        loop {
            let told = fs::read_to_string(self.directory.path().join("told"));
            let told = told.unwrap_or_default();
            if told.contains("end") {
                let line = told
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
                return Ok(line.with_context(|| told.clone())?.trim().to_owned());
            }
            let said = || self.process.stderr();
            ensure!(start.elapsed() < PATIENCE, "told nothing: {}", said());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn guests_that_ask_get_addresses_that_stay_and_resolvers() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Bridge).ipv6().guests(2);
    let topology = topology.build()?;
    let capture = listen(&topology.guests[0])?;
    let arguments = ["--dns", "2001:db8::53", "--domain", "lan.example"];
    let mut world = World::start_in(topology, &arguments)?;
    // The advertisement says that there is something to ask for.
    let told = advertisement(&capture, |_| true)?;
    ensure!(told.header.managed_address_config && told.header.other_config);

    let information = Client::start(world.guest(0), &["-S"])?;
    ensure!(information.told("resolvers")? == "2001:db8::53");
    ensure!(information.told("domains")?.trim_end_matches('.') == "lan.example");
    drop(information);
    let mut given = Vec::new();
    for guest in 0..2 {
        let client = Client::start(world.guest(guest), &[])?;
        let address: Ipv6Addr = client.told("address")?.parse()?;
        ensure!(client.told("resolvers")? == "2001:db8::53");
        ensure!(
            address.segments()[..4] == [0xfd00, 0x7a70, 0, 0],
            "{address}"
        );
        given.push(address);
    }
    ensure!(given[0] != given[1], "{given:?}");
    // Also from one that remembers nothing.
    world.restart(&arguments)?;
    let again: Ipv6Addr = Client::start(world.guest(0), &[])?
        .told("address")?
        .parse()?;
    ensure!(again == given[0], "{again} and {given:?}");
    // It is of use.
    let guest = &world.guest(0).namespace;
    guest.ip(&format!("address add {again}/128 dev {GUEST_DEVICE} nodad"))?;
    let (_, gateway) = world.guest(0).ipv6.context("there is IPv6")?;
    let line = format!("ping -6 -c 1 -W 5 -I {again} {gateway}");
    guest.exec(&line).map(drop)
}

#[test]
fn in_a_network_of_another_size_guests_have_addresses_by_asking() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6().build()?;
    let guest = &topology.guests[0];
    guest.forget_ipv6()?;
    let capture = listen(guest)?;
    let instance = Instance::new(&topology.host);
    let _process = instance.start(&["--inside", "veth0=fd00:7a70::1/126"])?;
    let told = advertisement(&capture, |_| true)?;
    // On the link, and nobody's choice.
    ensure!(told.option(3)?[2..4] == [126, 0x80], "{told:?}");
    let client = Client::start(guest, &[])?;
    let address: Ipv6Addr = client.told("address")?.parse()?;
    let of_guests = ["fd00:7a70::2", "fd00:7a70::3"].map(|it| it.parse().ok());
    ensure!(of_guests.contains(&Some(address)), "{address}");
    let shown = guest
        .namespace
        .ip(&format!("-6 address show dev {GUEST_DEVICE}"))?;
    ensure!(!shown.contains("scope global"), "{shown}");
    // It is of use, and there are no more than these.
    let remote = WORLD_ADDRESSES6[0];
    for (address, answers) in [(address, true), ("fd00:7a70::7".parse()?, false)] {
        let namespace = &guest.namespace;
        namespace.ip(&format!(
            "address add {address}/128 dev {GUEST_DEVICE} nodad"
        ))?;
        let ping = traffic::ping(namespace, remote.into(), 1, &["-I", &address.to_string()])?;
        ensure!(
            (ping.received == 1) == answers,
            "{address}: {}",
            ping.output
        );
    }
    ensure!(instance.count("spoofed-source")? > 0);
    Ok(())
}

#[test]
fn another_dhcp_server_is_left_its_guests() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6().build()?;
    let another = topology.host.run(|| Ok(UdpSocket::bind("[::]:547")?))?;
    let world = World::start_in(topology, &[])?;
    let start = Instant::now();
    while !world.said().contains("another DHCPv6 server") {
        ensure!(start.elapsed() < PATIENCE, "{}", world.said());
        thread::sleep(Duration::from_millis(20));
    }
    ensure!(world.said().contains("--no-dhcp"), "{}", world.said());
    drop(another);
    Ok(())
}

/// Sockets that hear ICMPv6 on a host. In place of a local port they have its number.
fn raw_sockets(host: &Namespace) -> Result<usize> {
    let table = host.run(|| Ok(fs::read_to_string("/proc/thread-self/net/raw6")?))?;
    let local = |line: &str| line.split_whitespace().nth(1).map(str::to_owned);
    let locals = table.lines().skip(1).filter_map(local);
    Ok(locals.filter(|it| it.ends_with(":003A")).count())
}

#[test]
fn nobody_is_told_who_is_not_to_be() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6();
    let mut world = World::start(topology, &["--no-ra"])?;
    ensure!(raw_sockets(&world.topology.host)? == 0);
    world.restart(&[])?;
    ensure!(raw_sockets(&world.topology.host)? == 1);
    Ok(())
}

#[test]
fn another_router_of_the_host_is_left_its_guests() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).ipv6();
    let mut world = World::start(topology, &[])?;
    let host = world.topology.host.clone();
    let index = host.device_index("veth0")?.context("no veth0")?;
    let advertisement = [134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    host.run(|| {
        let another = socket(
            AddressFamily::Inet6,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::IcmpV6,
        )?;
        nix::sys::socket::setsockopt(&another, nix::sys::socket::sockopt::Ipv6MulticastHops, &255)?;
        let everybody = SockaddrIn6::from(SocketAddrV6::new(ALL_NODES, 0, 0, index));
        sendto(
            another.as_raw_fd(),
            &advertisement,
            &everybody,
            MsgFlags::empty(),
        )?;
        Ok(())
    })?;
    let start = Instant::now();
    while !world.said().contains("advertises it as a router on veth0") {
        ensure!(start.elapsed() < PATIENCE, "{}", world.said());
        thread::sleep(Duration::from_millis(20));
    }
    // A guest that says it is a router has no such word.
    world.restart(&[])?;
    let guest = world.guest(0);
    advertise(&guest.namespace, GUEST_DEVICE)?;
    guest.forget_ipv6()?;
    check_guest(guest)?;
    ensure!(!world.said().contains("advertises"), "{}", world.said());
    Ok(())
}
