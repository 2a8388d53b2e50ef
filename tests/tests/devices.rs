//! Devices go and come under a running instance, and guests go on as soon as
//! they can.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tapnat_testbed::{
    Namespace,
    cable::{Cable, Layer, Options, TunTap},
    process::Process,
    snapshot::Snapshot,
    topology::{GATEWAY, GUEST_DEVICE, Guest, HOST_ADDRESS, Inside, Topology},
    traffic::{self, TcpReflector, TcpSession, UdpReflector},
};
use tapnat_tests::{
    family::V6,
    instance::{Instance, PATIENCE},
    world::{OUTSIDE, server},
};

/// A world with an instance and servers that say whom they see.
struct Setting {
    process: Process,
    instance: Instance,
    udp: UdpReflector,
    tcp: TcpReflector,
    topology: Topology,
    /// Of the guests' cards.
    link_addresses: Vec<String>,
}

impl Setting {
    fn new(guests: u8, arguments: &[&str]) -> Result<Self> {
        let topology = Topology::builder()
            .inside(Inside::Veth)
            .guests(guests)
            .build()?;
        let instance = Instance::new(&topology.host);
        let guests = topology.guests.iter();
        let link_addresses = guests.map(|guest| guest.namespace.mac_address(GUEST_DEVICE));
        Ok(Self {
            link_addresses: link_addresses.collect::<Result<_>>()?,
            process: instance.start(arguments)?,
            instance,
            udp: UdpReflector::start(&topology.world, server(0, 7))?,
            tcp: TcpReflector::start(&topology.world, server(0, 7))?,
            topology,
        })
    }

    fn host(&self) -> &Namespace {
        &self.topology.host
    }

    fn guest(&self, number: usize) -> &Guest {
        &self.topology.guests[number]
    }

    fn socket(&self, guest: usize, port: u16) -> Result<UdpSocket> {
        let guest = self.guest(guest);
        traffic::udp_socket(
            &guest.namespace,
            SocketAddr::new(guest.address.into(), port),
        )
    }

    /// Where the world sees this socket.
    fn seen(&self, socket: &UdpSocket) -> Result<SocketAddr> {
        traffic::reflect_udp(socket, self.udp.address(), b"who am I?")
    }

    fn connect(&self, guest: usize) -> Result<TcpSession> {
        TcpSession::open(&self.guest(guest).namespace, None, self.tcp.address())
    }

    /// Waits until these inside devices are served, and no others.
    fn until_served(&self, names: &[&str]) -> Result<()> {
        self.instance.until(|status| {
            // Set last of all.
            let is_ready = |name: &&str| {
                let key = format!("net.ipv4.conf.{name}.forwarding");
                self.host()
                    .read_sysctl(&key)
                    .is_ok_and(|value| value.trim() == "1")
            };
            served(status, "inside") == names && names.iter().all(is_ready)
        })
    }

    /// Plugs a guest in again whose device is gone.
    fn replug(&self, number: usize) -> Result<()> {
        let guest = self.guest(number);
        let Guest {
            namespace,
            address,
            gateway,
            ..
        } = guest;
        self.host()
            .add_veth(&guest.inside_device, namespace, GUEST_DEVICE)?;
        // It is still the same card, or the guest would have to wait until its sessions are over.
        let link_address = &self.link_addresses[number];
        namespace.ip(&format!("link set {GUEST_DEVICE} address {link_address}"))?;
        namespace.ip(&format!("address add {address}/24 dev {GUEST_DEVICE}"))?;
        namespace
            .ip(&format!(
                "route add default via {gateway} dev {GUEST_DEVICE}"
            ))
            .map(drop)
    }
}

fn served<'a>(status: &'a Value, role: &str) -> Vec<&'a str> {
    let devices = status["devices"].as_array();
    let mut names: Vec<_> = devices
        .into_iter()
        .flatten()
        .filter(|device| device["role"] == role)
        .filter_map(|device| device["name"].as_str())
        .collect();
    names.sort_unstable();
    names
}

const ONE: [&str; 2] = ["--inside", "veth0=10.0.0.1/24"];

#[test]
fn a_guests_device_that_comes_back_is_served_again() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let setting = Setting::new(1, &[&ONE[..], &["--attach", attach]].concat())?;
        let socket = setting.socket(0, 40_000)?;
        let seen = setting.seen(&socket)?;
        let mut session = setting.connect(0)?;

        setting.host().ip("link delete veth0")?;
        setting.until_served(&[])?;
        setting.replug(0)?;
        setting.until_served(&["veth0"])?;
        // Neither the world nor the guest notices.
        ensure!(setting.seen(&socket)? == seen, "another endpoint");
        session.exchange(&traffic::pattern(100_000))?;
        setting.connect(0)?.exchange(b"a new one")?;
        ensure!(
            setting.instance.ask_json("mappings")?[0]["inside"]["address"] == "10.0.0.10",
            "mappings of others"
        );
        let said = setting.process.stderr();
        ensure!(said.contains("veth0 is served: 10.0.0.1/24"), "{said}");
    }
    Ok(())
}

#[test]
fn devices_that_begin_alike_are_served_when_they_come() -> Result<()> {
    let mut setting = Setting::new(2, &["--inside", "veth*=10.0.0.1/24"])?;
    setting.until_served(&["veth0", "veth1"])?;
    let sockets = [setting.socket(0, 40_000)?, setting.socket(1, 40_000)?];
    let seen = [setting.seen(&sockets[0])?, setting.seen(&sockets[1])?];
    ensure!(seen[0] != seen[1], "{seen:?}");

    setting.host().ip("link delete veth1")?;
    setting.until_served(&["veth0"])?;
    ensure!(setting.seen(&sockets[0])? == seen[0], "another endpoint");
    setting.replug(1)?;
    setting.until_served(&["veth0", "veth1"])?;
    ensure!(setting.seen(&sockets[1])? == seen[1], "another endpoint");

    // What has no number gets no network, and is told about once.
    setting.host().ip("link add vethx type bridge")?;
    let line = setting
        .process
        .wait_for_error_line(PATIENCE, |line| line.contains("vethx is not served"))?;
    ensure!(line.contains("has no number"), "{line}");
    setting.host().ip("link delete vethx")?;

    // One that becomes a bridge's is let go.
    let forwarding = "net.ipv4.conf.veth1.forwarding";
    setting.host().ip("link add br9 type bridge")?;
    setting.host().ip("link set veth1 master br9")?;
    setting.until_served(&["veth0"])?;
    setting.instance.until(|_| {
        let left = setting.host().ip("-brief address show dev veth1");
        let value = setting.host().read_sysctl(forwarding);
        left.is_ok_and(|left| !left.contains("10.0.1.1"))
            && value.is_ok_and(|value| value.trim() == "0")
    })?;
    // Whoever took it over wants it up.
    let left = setting.host().ip("-brief address show dev veth1")?;
    ensure!(left.contains("UP"), "{left}");
    setting.host().ip("link set veth1 nomaster")?;
    setting.until_served(&["veth0", "veth1"])?;
    ensure!(setting.seen(&sockets[1])?.ip() == OUTSIDE, "not translated");
    Ok(())
}

#[test]
fn nothing_stays_of_devices_that_came_later() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2).build()?;
    let instance = Instance::new(&topology.host);
    let host = &topology.host;
    let before = Snapshot::take(host, &instance.pins())?;
    let mut process = instance.start(&["--inside", "tap*=10.7.0.1/24"])?;
    for number in [3, 4] {
        host.ip(&format!("tuntap add tap{number} mode tap"))?;
    }
    instance.until(|status| served(status, "inside") == ["tap3", "tap4"])?;
    let addresses = host.ip("-brief address show dev tap4")?;
    ensure!(addresses.contains("10.7.4.1/24"), "{addresses}");
    host.ip("link delete tap4")?;
    instance.until(|status| served(status, "inside") == ["tap3"])?;
    // Killed, and taken over while another one comes.
    process.signal(nix::sys::signal::Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    host.ip("tuntap add tap5 mode tap")?;
    let mut process = instance.start(&["--inside", "tap*=10.7.0.1/24"])?;
    instance.until(|status| served(status, "inside") == ["tap3", "tap5"])?;
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let left = host.ip("-brief address show dev tap3")?;
    ensure!(!left.contains("10.7.3.1"), "{left}");
    host.ip("link delete tap3")?;
    host.ip("link delete tap5")?;
    let after = Snapshot::take(host, &instance.pins())?;
    ensure!(
        before.difference(&after).is_none(),
        "{:?}",
        before.difference(&after)
    );
    Ok(())
}

/// Kernel parameters of a device that an instance sets.
fn parameters(host: &Namespace, device: &str) -> Result<Vec<String>> {
    let parameters = [
        "net.ipv4.conf.DEVICE.forwarding",
        "net.ipv6.conf.DEVICE.forwarding",
        "net.ipv6.conf.DEVICE.accept_ra",
        "net.ipv6.conf.DEVICE.accept_dad",
        "net.ipv6.conf.DEVICE.keep_addr_on_down",
    ];
    parameters
        .iter()
        .map(|key| host.read_sysctl(&key.replace("DEVICE", device)))
        .collect()
}

#[test]
fn nothing_stays_of_a_device_that_has_another_name_now() -> Result<()> {
    for (inside, is_killed) in [("veth*", false), ("veth0", false), ("veth0", true)] {
        let topology = Topology::builder().inside(Inside::Veth).build()?;
        let instance = Instance::new(&topology.host);
        let host = &topology.host;
        let before = parameters(host, "veth0")?;
        let networks = format!("{inside}=10.0.0.1/24,fd00:7a70::1/56");
        let mut process = instance.start(&["--inside", &networks])?;
        instance.until(|status| served(status, "inside") == ["veth0"])?;
        if is_killed {
            process.signal(nix::sys::signal::Signal::SIGKILL)?;
            process.wait(PATIENCE)?;
        }
        host.ip("link set veth0 down")?;
        host.ip("link set veth0 name veth9")?;
        host.ip("link set veth9 up")?;
        if !is_killed {
            instance.until(|status| served(status, "inside") == ["veth9"])?;
        }
        instance.ask("down", &[])?;
        let after = parameters(host, "veth9")?;
        ensure!(before == after, "{networks}: {before:?} became {after:?}");
        let left = host.ip("-brief address show dev veth9")?;
        ensure!(!left.contains("10.0.0.1"), "{left}");
        ensure!(!left.contains("fd00:"), "{left}");
    }
    Ok(())
}

/// The uplink's address and route, as whoever manages the host would set them.
fn configure_uplink(setting: &Setting, device: &str) -> Result<()> {
    let host = setting.host();
    host.ip(&format!("address replace {HOST_ADDRESS}/24 dev {device}"))?;
    host.ip(&format!("route replace default via {GATEWAY} dev {device}"))?;
    setting.instance.until(|status| {
        served(status, "uplink") == [device] && status["outside_addresses"] == json!([OUTSIDE])
    })
}

#[test]
fn flows_outlive_an_uplink_that_is_down_renamed_or_made_anew() -> Result<()> {
    for given in [&[][..], &["--uplink", "uplink0"]] {
        let arguments = [&ONE[..], given].concat();
        let setting = Setting::new(1, &arguments)?;
        let socket = setting.socket(0, 40_000)?;
        let seen = setting.seen(&socket)?;
        let mut session = setting.connect(0)?;
        let mut go_on = |what: &str| -> Result<()> {
            ensure!(setting.seen(&socket)? == seen, "{what}: another endpoint");
            session.exchange(&traffic::pattern(50_000))?;
            setting.connect(0)?.exchange(b"a new one")
        };
        let (host, world) = (setting.host(), &setting.topology.world);

        host.ip("link set uplink0 down")?;
        host.ip("link set uplink0 up")?;
        host.wait_for_carrier("uplink0")?;
        configure_uplink(&setting, "uplink0")?;
        go_on("down and up")?;

        host.ip("link set uplink0 down")?;
        host.ip("link set uplink0 name wan0")?;
        host.ip("link set wan0 up")?;
        host.wait_for_carrier("wan0")?;
        configure_uplink(&setting, "wan0")?;
        go_on("renamed")?;

        // What is still to be acknowledged would be sent again as soon as the host
        // has its address back, which is a moment before tapnat has the device.
        thread::sleep(Duration::from_millis(500));
        host.ip("link delete wan0")?;
        setting
            .instance
            .until(|status| served(status, "uplink").is_empty())?;
        host.add_veth("uplink0", world, "downlink0")?;
        world.ip(&format!("address add {GATEWAY}/24 dev downlink0"))?;
        configure_uplink(&setting, "uplink0")?;
        go_on("made anew")?;
    }
    Ok(())
}

#[test]
fn the_default_routes_device_is_the_uplink_wherever_it_goes() -> Result<()> {
    let setting = Setting::new(1, &ONE)?;
    let (host, world) = (setting.host(), &setting.topology.world);
    host.add_veth("uplink1", world, "world1")?;
    host.ip("address add 192.0.2.129/25 dev uplink1")?;
    world.ip("address add 192.0.2.130/25 dev world1")?;
    let socket = setting.socket(0, 40_000)?;
    ensure!(setting.seen(&socket)?.ip() == OUTSIDE, "not translated");

    host.ip("route replace default via 192.0.2.130 dev uplink1")?;
    setting.instance.until(|status| {
        served(status, "uplink") == ["uplink1"]
            && status["outside_addresses"] == json!(["192.0.2.129"])
    })?;
    let other: IpAddr = "192.0.2.129".parse()?;
    ensure!(
        setting.seen(&socket)? == SocketAddr::new(other, 40_000),
        "not at once"
    );
    let mut session = setting.connect(0)?;
    ensure!(session.seen().ip() == other, "{}", session.seen());
    session.exchange(&traffic::pattern(50_000))?;

    // No route for a while is no reason to give it up.
    host.ip("route delete default")?;
    host.ip("route add default via 192.0.2.130 dev uplink1")?;
    session.exchange(&traffic::pattern(50_000))?;
    configure_uplink(&setting, "uplink0")?;
    ensure!(setting.seen(&socket)?.ip() == OUTSIDE, "not back");
    Ok(())
}

#[test]
fn the_device_of_ipv6s_default_route_is_the_uplink_where_ipv4_has_none() -> Result<()> {
    let topology = V6.topology().inside(Inside::Veth).build()?;
    let (host, world) = (&topology.host, &topology.world);
    host.add_veth("uplink1", world, "world1")?;
    host.ip("address add 2001:db8:9::2/64 dev uplink1 nodad")?;
    let instance = Instance::new(host);
    let _process = instance.start(&["--inside", &topology.guests[0].inside()])?;
    let is_uplink = |name: &'static str| move |status: &Value| served(status, "uplink") == [name];
    instance.until(is_uplink("uplink0"))?;
    // Nothing else changes then: the kernel has looked for duplicates of all addresses, and what it
    // told of that is followed.
    instance.until(|_| {
        let tentative = host.ip("-6 address show tentative");
        tentative.is_ok_and(|tentative| tentative.is_empty())
    })?;
    thread::sleep(Duration::from_secs(2));
    host.ip("-6 route replace default via 2001:db8:9::1 dev uplink1")?;
    instance.until(is_uplink("uplink1"))
}

/// What a provider gives a line that is dialled in: another end, which is no network.
const PROVIDER: &str = "192.0.2.1";

/// Makes a line without Ethernet with this address, as a PPP daemon does.
fn dial(setting: &Setting, address: &str) -> Result<Cable> {
    let (host, world) = (setting.host(), &setting.topology.world);
    let options = Options::new(Layer::Ip);
    let ends = [
        TunTap::create(host, "ppp0", options)?,
        TunTap::create(world, "provider0", options)?,
    ];
    let [near, far] = ends;
    let cable = Cable::connect(near, far)?;
    host.ip(&format!("address add {address} peer {PROVIDER} dev ppp0"))?;
    world.ip(&format!(
        "address add {PROVIDER} peer {address} dev provider0"
    ))?;
    host.ip("route replace default dev ppp0")?;
    setting.instance.until(|status| {
        served(status, "uplink") == ["ppp0"] && status["outside_addresses"] == json!([address])
    })?;
    Ok(cable)
}

#[test]
fn a_line_that_is_dialled_anew_has_another_address() -> Result<()> {
    let setting = Setting::new(1, &ONE)?;
    let socket = setting.socket(0, 40_000)?;
    let mut seen = vec![setting.seen(&socket)?.ip()];
    for last in 50..53 {
        let address = format!("198.18.0.{last}");
        let cable = dial(&setting, &address)?;
        let own: IpAddr = address.parse()?;
        let outside = setting.seen(&socket)?;
        ensure!(outside == SocketAddr::new(own, 40_000), "from {outside}");
        let mut session = setting.connect(0)?;
        ensure!(session.seen().ip() == own, "from {}", session.seen());
        session.exchange(&traffic::pattern(50_000))?;
        seen.push(own);
        // It hangs up. What the guest sends until the next one goes nowhere.
        drop(cable);
        setting
            .instance
            .until(|status| status["outside_addresses"] == json!([]))?;
        socket.send_to(b"into the void", setting.udp.address())?;
    }
    configure_uplink(&setting, "uplink0")?;
    ensure!(setting.seen(&socket)?.ip() == OUTSIDE, "not back");
    let received = setting.udp.received();
    let others: Vec<_> = received
        .iter()
        .filter(|datagram| !seen.contains(&datagram.peer.ip()))
        .collect();
    ensure!(others.is_empty(), "{others:?}");
    Ok(())
}

#[test]
fn an_uplink_that_was_given_stays_wherever_the_default_route_goes() -> Result<()> {
    let setting = Setting::new(1, &[&ONE[..], &["--uplink", "uplink0"]].concat())?;
    let (host, world) = (setting.host(), &setting.topology.world);
    host.add_veth("uplink1", world, "world1")?;
    host.ip("address add 192.0.2.129/25 dev uplink1")?;
    world.ip("address add 192.0.2.130/25 dev world1")?;
    let socket = setting.socket(0, 40_000)?;
    setting.seen(&socket)?;
    let for_the_host = |status: &Value| {
        let reasons = status["reasons"].as_array().into_iter().flatten();
        let of_the_host = |it: &&Value| it["reason"] == "for-the-host";
        let found = reasons
            .filter(of_the_host)
            .find_map(|it| it["packets"].as_u64());
        found.unwrap_or_default()
    };
    let before = for_the_host(&setting.instance.ask_json("status")?);
    host.ip("route replace default via 192.0.2.130 dev uplink1")?;
    // Whoever names the uplink does not have another one: what would leave elsewhere is the host's.
    setting.instance.until(|status| {
        let sent = socket.send_to(b"elsewhere", setting.udp.address());
        sent.is_ok() && for_the_host(status) > before
    })?;
    host.ip(&format!("route replace default via {GATEWAY} dev uplink0"))?;
    setting.instance.until(|_| {
        let seen = setting.seen(&socket);
        seen.is_ok_and(|seen| seen.ip() == OUTSIDE)
    })?;
    Ok(())
}

#[test]
fn an_mtu_that_changes_is_used_both_ways() -> Result<()> {
    let setting = Setting::new(1, &ONE)?;
    // What the guest sends may be made fragments of.
    let guest = &setting.guest(0).namespace;
    guest.sysctl("net.ipv4.ip_no_pmtu_disc", "1")?;
    let socket = setting.socket(0, 40_000)?;
    let payload = traffic::pattern(1400);
    let reflect = || traffic::reflect_udp(&socket, setting.udp.address(), &payload);
    let seen = reflect()?;
    // The host makes fragments from now on, and no longer after that.
    for mtu in [1200, 1500] {
        let (host, world) = (setting.host(), &setting.topology.world);
        host.ip(&format!("link set uplink0 mtu {mtu}"))?;
        world.ip(&format!("link set downlink0 mtu {mtu}"))?;
        setting.instance.until(|status| {
            status["devices"].as_array().is_some_and(|devices| {
                devices
                    .iter()
                    .any(|device| device["mtu"] == mtu && device["role"] == "uplink")
            })
        })?;
        ensure!(reflect()? == seen, "another endpoint");
    }
    Ok(())
}
