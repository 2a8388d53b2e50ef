//! Port forwards and 1:1 addresses: they let the world and other guests in to a
//! guest, stay while processes come and go, and refuse what contradicts them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant as Clock},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tapnat_testbed::{
    Namespace,
    topology::{Guest, HOST_ADDRESS, Inside, Topology},
    traffic::{
        TcpReflector, TcpSession, UdpReflector, connect, pattern, reflect_udp, tcp_listener,
        udp_socket,
    },
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
};

/// Long enough for a connection that works, short for one that does not.
const SHORT: Duration = Duration::from_millis(700);

struct Bed {
    family: Family,
    // The instance goes before its host.
    instance: Instance,
    world: Topology,
}

impl Bed {
    fn new(family: Family) -> Result<Self> {
        let world = family.topology().inside(Inside::Veth).guests(2).build()?;
        Ok(Self {
            family,
            instance: Instance::new(&world.host),
            world,
        })
    }

    fn guest(&self, number: usize) -> Result<&Guest> {
        self.world.guests.get(number).context("no such guest")
    }

    fn arguments(&self) -> Vec<String> {
        let insides = self.world.guests.iter().map(Guest::inside);
        insides.flat_map(|it| ["--inside".to_owned(), it]).collect()
    }

    fn start(&self) -> Result<tapnat_testbed::process::Process> {
        let arguments = self.arguments();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        self.instance.start(&arguments)
    }

    /// The words of a line, with a guest's address for its name, also before ports, in the way
    /// that the command wants it.
    fn words(&self, verb: &str, line: &str) -> Vec<String> {
        let word = |word: &str| {
            let Some(rest) = word.strip_prefix("guest") else {
                return word.to_owned();
            };
            let (number, ports) = rest.split_once(':').unwrap_or((rest, ""));
            let guest = &self.world.guests[usize::from(number == "1")];
            let address = match self.family.address_of(guest) {
                IpAddr::V6(address) if verb == "forward" => format!("[{address}]"),
                address => address.to_string(),
            };
            match ports {
                "" => address,
                ports => format!("{address}:{ports}"),
            }
        };
        line.split_whitespace().map(word).collect()
    }

    fn forward(&self, line: &str) -> Result<String> {
        self.ask("forward", line)
    }

    fn ask(&self, verb: &str, line: &str) -> Result<String> {
        let words = self.words(verb, line);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        self.instance.ask(verb, &words)
    }

    /// What a command says that must fail.
    fn refusal(&self, verb: &str, line: &str) -> Result<String> {
        let output = self
            .instance
            .command(verb)?
            .args(self.words(verb, line))
            .output()?;
        ensure!(
            output.status.code() == Some(1) && output.stderr.lines().count() == 1,
            "{verb} {line}: {output:?}"
        );
        Ok(output.stderr)
    }

    fn json(&self, verb: &str) -> Result<Value> {
        let text = self.instance.ask(verb, &["list", "--json"])?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }
}

fn server(family: Family, guest: &Guest, port: u16) -> SocketAddr {
    SocketAddr::new(family.address_of(guest), port)
}

/// The address that stands for all of a host's.
fn any_address(family: Family) -> IpAddr {
    match family {
        V4 => Ipv4Addr::UNSPECIFIED.into(),
        V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The network of all addresses.
fn anywhere(family: Family) -> &'static str {
    match family {
        V4 => "0.0.0.0/0",
        V6 => "::/0",
    }
}

fn is_refused(namespace: &Namespace, remote: SocketAddr) -> bool {
    connect(namespace, None, remote, SHORT).is_err()
}

fn the_world_and_other_guests_come_in(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let (guest, other) = (bed.guest(0)?, bed.guest(1)?);
    let tcp = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
    let udp = UdpReflector::start(&guest.namespace, server(family, guest, 53))?;
    bed.forward("add tcp 8080 guest0:80")?;
    bed.forward("add udp 5353 guest0:53")?;
    // One of the ports that the host keeps for itself, and one below 1024.
    bed.forward("add tcp 33000 guest0:80")?;
    bed.forward("add tcp 81 guest0:80")?;

    for port in [8080, 33000, 81] {
        let mut session = TcpSession::open(&bed.world.world, None, family.outside(port))?;
        // The guest sees who it really is.
        ensure!(session.seen() == session.stream().local_addr()?, "{port}");
        session.exchange(&vec![7; 100_000])?;
        // RFC 5382 REQ-8: over the other guest's outside endpoint.
        let mut session = TcpSession::open(&other.namespace, None, family.outside(port))?;
        ensure!(
            session.seen().ip() == family.outside_address(),
            "{}",
            session.seen()
        );
        session.exchange(&vec![8; 100_000])?;
        // Its own, too.
        let mut session = TcpSession::open(&guest.namespace, None, family.outside(port))?;
        session.exchange(b"myself")?;
    }
    let socket = udp_socket(&bed.world.world, family.server(1, 4000))?;
    let seen = reflect_udp(&socket, family.outside(5353), b"hello")?;
    ensure!(seen == socket.local_addr()?, "{seen}");
    let socket = udp_socket(&other.namespace, server(family, other, 4000))?;
    let seen = reflect_udp(&socket, family.outside(5353), b"hello")?;
    ensure!(seen.ip() == family.outside_address(), "{seen}");
    // What the guest sends from the forwarded port has the forwarded address.
    drop(udp);
    let mirror = UdpReflector::start(&bed.world.world, family.server(0, 0))?;
    let socket = udp_socket(&guest.namespace, server(family, guest, 53))?;
    let seen = reflect_udp(&socket, mirror.address(), b"out")?;
    ensure!(seen == family.outside(5353), "{seen}");

    let list = bed.json("forward")?;
    let entries = list.as_array().context("not an array")?;
    ensure!(entries.len() == 4, "{list}");
    let web = entries
        .iter()
        .find(|entry| entry["outside"]["port"] == 8080)
        .context("not listed")?;
    ensure!(web["protocol"] == "tcp", "{web}");
    ensure!(
        web["outside"] == json!({"address": family.outside_address(), "port": 8080}),
        "{web}"
    );
    ensure!(
        web["inside"] == json!({"address": family.address_of(guest), "port": 80}),
        "{web}"
    );
    ensure!(
        web["from"] == anywhere(family) && web["ports"] == 1,
        "{web}"
    );
    ensure!(web["made_by"] == "command", "{web}");
    let mappings = bed.instance.ask_json("mappings")?;
    ensure!(
        mappings.to_string().contains("\"static\""),
        "not among the mappings: {mappings}"
    );
    drop(tcp);
    Ok(())
}
both_families!(the_world_and_other_guests_come_in);

/// What would become of a packet, what does, and the picture.
fn a_forward_is_seen_in_every_view(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let guest = bed.guest(0)?;
    let inside = server(family, guest, 80);
    let _tcp = TcpReflector::start(&guest.namespace, inside)?;
    bed.forward("add tcp 8080 guest0:80")?;
    let end = |end: SocketAddr| json!({"address": end.ip(), "port": end.port()});

    let remote = family.server(1, 5000);
    let question = |port| [remote, family.outside(port)].map(|end| end.to_string());
    let [from, to] = question(8080);
    let arguments = ["--from", &from, "--to", &to, "--json"];
    let report: Value = serde_json::from_str(&bed.instance.ask("why", &arguments)?)?;
    let packet = &report["packet"];
    ensure!(packet["reason"] == "session-admitted", "{packet}");
    ensure!(
        packet["after"]["source"] == end(remote) && packet["after"]["destination"] == end(inside),
        "{packet}"
    );
    let [from, to] = question(8081);
    let why = bed.instance.command("why")?;
    let other = why
        .args(["--from", &from, "--to", &to, "--json"])
        .output()?;
    let report: Value = serde_json::from_str(&other.stdout)?;
    let refused = ["no-mapping", "unsolicited-syn"].map(Value::from);
    ensure!(refused.contains(&report["packet"]["reason"]), "{report}");

    let trace = bed.instance.command("trace")?;
    let mut trace = trace
        .args(["--json", "--count", "2", "--protocol", "tcp"])
        .spawn()?;
    trace.wait_for_error_line(PATIENCE, |line| line.starts_with("tapnat: tracing"))?;
    let local = SocketAddr::new(family.server(0, 0).ip(), 5001);
    let session = TcpSession::open(&bed.world.world, Some(local), family.outside(8080))?;
    let status = trace.wait(PATIENCE)?;
    let told = trace.stdout();
    ensure!(status.success(), "{status}: {told}{}", trace.stderr());
    let told: Vec<Value> = told
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let [syn, answer] = told.as_slice() else {
        bail!("{told:?}")
    };
    ensure!(
        syn["reason"] == "session-admitted" && syn["role"] == "uplink",
        "{syn}"
    );
    for (packet, before, after) in [
        (syn, [local, family.outside(8080)], [local, inside]),
        (answer, [inside, local], [family.outside(8080), local]),
    ] {
        for (side, [source, destination]) in [("before", before), ("after", after)] {
            let seen = &packet[side];
            ensure!(
                seen["source"] == end(source) && seen["destination"] == end(destination),
                "{packet}"
            );
        }
    }

    let map: Value = serde_json::from_str(&bed.instance.ask("map", &["--json"])?)?;
    let [forward] = map["forwards"].as_array().context("no array")?.as_slice() else {
        bail!("{map}")
    };
    ensure!(
        forward["outside"] == end(family.outside(8080))
            && forward["inside"] == end(inside)
            && forward["sessions"] == 1,
        "{forward}"
    );
    let picture = bed.instance.ask("map", &[])?;
    let is_line = |line: &str| line.contains("80 ←") && line.contains(":8080");
    ensure!(picture.lines().any(is_line), "{picture}");
    let guest = family.address_of(guest).to_string();
    let flows = bed.instance.ask("flows", &["--guest", &guest])?;
    ensure!(flows.contains(&family.outside(8080).to_string()), "{flows}");
    drop(session);
    Ok(())
}
both_families!(a_forward_is_seen_in_every_view);

fn a_range_of_ports_and_a_part_of_it(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let guest = bed.guest(0)?;
    let servers = [9000, 9005, 9010]
        .map(|port| TcpReflector::start(&guest.namespace, server(family, guest, port)));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    bed.forward("add tcp 8000-8010 guest0:9000-9010")?;
    for port in [8000, 8005, 8010] {
        TcpSession::open(&bed.world.world, None, family.outside(port))?.exchange(b"x")?;
    }
    let list = bed.json("forward")?;
    ensure!(
        list[0]["ports"] == 11 && list[0]["inside"]["port"] == 9000,
        "{list}"
    );
    ensure!(list.as_array().is_some_and(|it| it.len() == 1), "{list}");
    let table = bed.forward("list")?;
    ensure!(
        table.contains(&format!("{}-8010", family.outside(8000))),
        "{table}"
    );
    bed.forward("remove tcp 8004-8006")?;
    let list = bed.json("forward")?;
    ensure!(list.as_array().is_some_and(|it| it.len() == 2), "{list}");
    ensure!(
        is_refused(&bed.world.world, family.outside(8005)),
        "8005 is open"
    );
    TcpSession::open(&bed.world.world, None, family.outside(8010))?.exchange(b"x")?;
    drop(servers);
    Ok(())
}
both_families!(a_range_of_ports_and_a_part_of_it);

fn only_those_whom_it_is_for_come_in(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let guest = bed.guest(0)?;
    let web = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
    let udp = UdpReflector::start(&guest.namespace, server(family, guest, 53))?;
    let [welcome, stranger] = [0, 1].map(|number| family.server(number, 0).ip());
    bed.forward(&format!("add tcp 8080 guest0:80 --from {welcome}"))?;
    let one = match family {
        V4 => 32,
        V6 => 128,
    };
    bed.forward(&format!("add udp 53 guest0 --from {welcome}/{one}"))?;
    let from = |address| Some(SocketAddr::new(address, 0));
    TcpSession::open(&bed.world.world, from(welcome), family.outside(8080))?;
    ensure!(
        connect(
            &bed.world.world,
            from(stranger),
            family.outside(8080),
            SHORT
        )
        .is_err(),
        "a stranger came in"
    );
    let socket = udp_socket(&bed.world.world, (welcome, 0).into())?;
    reflect_udp(&socket, family.outside(53), b"x")?;
    let socket = udp_socket(&bed.world.world, (stranger, 0).into())?;
    socket.set_read_timeout(Some(SHORT))?;
    ensure!(
        reflect_udp(&socket, family.outside(53), b"x").is_err(),
        "a stranger came in"
    );
    ensure!(udp.received().len() == 1, "{:?}", udp.received());
    ensure!(web.peers().len() == 1, "{:?}", web.peers());
    Ok(())
}
both_families!(only_those_whom_it_is_for_come_in);

fn they_stay_while_processes_come_and_go(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let mut process = bed.start()?;
    let guest = bed.guest(0)?;
    let _web = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
    bed.forward("add tcp 8080 guest0:80")?;
    let mut session = TcpSession::open(&bed.world.world, None, family.outside(8080))?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    session.exchange(b"without a process")?;
    // Commands work without a process, too.
    bed.forward("add tcp 8081 guest0:80")?;
    for port in [8080, 8081] {
        TcpSession::open(&bed.world.world, None, family.outside(port))?.exchange(b"x")?;
    }
    let mut process = bed.start()?;
    session.exchange(b"with another process")?;
    for port in [8080, 8081] {
        TcpSession::open(&bed.world.world, None, family.outside(port))?.exchange(b"x")?;
    }
    // A connection outlives the forward that it came in by.
    bed.forward("remove tcp 8080")?;
    ensure!(
        is_refused(&bed.world.world, family.outside(8080)),
        "8080 is open"
    );
    session.exchange(b"goes on")?;
    // And the port can be another guest's at once.
    let other = bed.guest(1)?;
    let _other_web = TcpReflector::start(&other.namespace, server(family, other, 80))?;
    bed.forward("add tcp 8080 guest1:80")?;
    TcpSession::open(&bed.world.world, None, family.outside(8080))?.exchange(b"x")?;
    session.exchange(b"still goes on")?;
    drop(session);
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    ensure!(!bed.instance.run_directory().exists(), "something is left");
    Ok(())
}
both_families!(they_stay_while_processes_come_and_go);

fn they_move_with_the_uplinks_address(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let process = bed.start()?;
    let guest = bed.guest(0)?;
    let _web = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
    bed.forward("add tcp 8080 guest0:80")?;
    let host = &bed.world.host;
    let (another, gateway) = (family.uplink_host(7), family.gateway());
    let length = match family {
        V4 => 24,
        V6 => 64,
    };
    host.ip("address flush dev uplink0 scope global")?;
    host.ip(&format!("address add {another}/{length} dev uplink0"))?;
    host.ip(&format!("route replace default via {gateway} dev uplink0"))?;
    let start = Clock::now();
    while bed.json("forward")?[0]["outside"]["address"] != json!(another) {
        ensure!(start.elapsed() < PATIENCE, "{}", process.stderr());
        thread::sleep(Duration::from_millis(20));
    }
    TcpSession::open(&bed.world.world, None, (another, 8080).into())?.exchange(b"x")?;
    Ok(())
}
both_families!(they_move_with_the_uplinks_address);

/// What a refusal says in a family.
struct Words {
    networks: [&'static str; 2],
    nowhere: &'static str,
    hosts_own: &'static str,
    nobodys: &'static str,
    guest_with_ports: &'static str,
}

impl Words {
    fn of(family: Family) -> Self {
        match family {
            V4 => Self {
                networks: ["10.0.0.0/24", "10.0.1.0/24"],
                nowhere: "10.9.9.9:80",
                hosts_own: "10.0.0.1:80",
                nobodys: "10.0.0.255:80",
                guest_with_ports: "10.0.0.10:80-90",
            },
            V6 => Self {
                networks: ["fd00:7a70::/64", "fd00:7a70:0:1::/64"],
                nowhere: "[fd00:7a70:0:9::9]:80",
                hosts_own: "[fd00:7a70::1]:80",
                nobodys: "[fd00:7a70::]:80",
                guest_with_ports: "[fd00:7a70::a]:80-90",
            },
        }
    }
}

fn what_contradicts_is_refused_and_changes_nothing(family: Family) -> Result<()> {
    let words = Words::of(family);
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let (guest, other) = (bed.guest(0)?, bed.guest(1)?);
    bed.forward("add tcp 8080 guest0:80")?;
    // Saying it twice is no contradiction.
    let again = bed.instance.command("forward")?;
    let again = again
        .args(bed.words("forward", "add tcp 8080 guest0:80"))
        .output()?;
    ensure!(
        again.status.success() && again.stderr.contains("there already"),
        "{again:?}"
    );
    let before = bed.json("forward")?;
    let refused = |verb: &str, line: &str, words: &[&str]| {
        let said = bed.refusal(verb, line)?;
        for word in words {
            ensure!(said.contains(word), "{verb} {line}: no '{word}' in: {said}");
        }
        Ok(())
    };

    let line = "add tcp 8080 guest1:80";
    let holder = family.address_of(guest).to_string();
    let leads = format!("leads to {holder} already");
    refused("forward", line, &["8080", &leads])?;
    refused("forward", "add tcp 8070-8090 guest1", &["port 8080"])?;
    refused(
        "forward",
        &format!("add tcp 8081 {}", words.nowhere),
        &["no inside network", words.networks[0], words.networks[1]],
    )?;
    let line = format!("add tcp 8081 {}", words.hosts_own);
    refused("forward", &line, &["the host's own"])?;
    let line = format!("add tcp 8081 {}", words.nobodys);
    refused("forward", &line, &["no guest"])?;
    refused(
        "forward",
        "add tcp 8000-8010 guest0:80",
        &[words.guest_with_ports],
    )?;
    refused("forward", "remove tcp 9999", &["there is tcp 8080"])?;
    let outside = family.outside_address();
    let line = format!("add {outside} guest0");
    refused("static", &line, &["all guests", "another address"])?;

    // Neither does a packet change its IP version on its way in, nor does anybody come by another.
    let (other_family, of_guest) = match family {
        V4 => (V6, "IPv4"),
        V6 => (V4, "IPv6"),
    };
    let foreign = other_family.uplink_host(7);
    let line = format!("add tcp 8081 guest0:80 --outside-address {foreign}");
    let name = format!("name an {of_guest} address");
    refused("forward", &line, &[&holder, &name])?;
    refused("static", &format!("add {foreign} guest0"), &[&name])?;
    let line = format!("add tcp 8081 guest0:80 --from {foreign}");
    refused("forward", &line, &[&format!("name an {of_guest} network")])?;
    let inside = SocketAddr::new(other_family.inside_host(0, 10), 80);
    refused("forward", &format!("add tcp 8081 {inside}"), &["no inside"])?;

    // The host's own programs are named.
    let _tcp = tcp_listener(&bed.world.host, (any_address(family), 8088).into())?;
    let _udp = udp_socket(&bed.world.host, (outside, 8088).into())?;
    let process = format!("(process {})", std::process::id());
    refused("forward", "add tcp 8080-8100 guest1", &["port 8080"])?;
    refused("forward", "add tcp 8081-8100 guest1", &["8088", &process])?;
    refused("forward", "add udp 8088 guest1", &["8088", &process])?;

    // A guest that has the port at this time, too.
    let mirror = UdpReflector::start(&bed.world.world, family.server(0, 0))?;
    let socket = udp_socket(&guest.namespace, server(family, guest, 7000))?;
    ensure!(
        reflect_udp(&socket, mirror.address(), b"x")? == family.outside(7000),
        "the guest got another port"
    );
    let line = "add udp 7000 guest1";
    refused("forward", line, &[&holder])?;
    ensure!(bed.json("forward")? == before, "something was changed");
    // But to that guest it can lead, and then stays.
    bed.forward("add udp 7000 guest0")?;
    ensure!(
        reflect_udp(&socket, mirror.address(), b"x")? == family.outside(7000),
        "the guest lost its port"
    );
    let stranger = udp_socket(&other.namespace, server(family, other, 0))?;
    stranger.send_to(b"knock", family.outside(7000))?;
    let mut buffer = [0; 16];
    let (length, _) = socket.recv_from(&mut buffer)?;
    ensure!(&buffer[..length] == b"knock", "something else came");
    Ok(())
}
both_families!(what_contradicts_is_refused_and_changes_nothing);

/// One port of the same protocol, in each IP version another guest's.
#[test]
fn each_family_has_its_own_forwards() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).guests(2).ipv6();
    let world = world.build()?;
    let bed = Bed {
        family: V4,
        instance: Instance::new(&world.host),
        world,
    };
    let _process = bed.start()?;
    let families = [(V4, bed.guest(0)?), (V6, bed.guest(1)?)];
    let mut servers = Vec::new();
    for (family, guest) in families {
        let inside = server(family, guest, 80);
        servers.push(TcpReflector::start(&guest.namespace, inside)?);
        bed.forward(&format!("add tcp 8080 {inside}"))?;
    }
    for (family, _) in families {
        TcpSession::open(&bed.world.world, None, family.outside(8080))?.exchange(b"x")?;
    }
    for (server, (family, _)) in servers.iter().zip(families) {
        let peers = server.peers();
        ensure!(peers.len() == 1 && Family::of(peers[0].ip()) == family);
    }
    let list = bed.json("forward")?;
    ensure!(list.as_array().map(Vec::len) == Some(2), "{list}");
    let outside = V6.outside_address();
    bed.forward(&format!("remove tcp 8080 --outside-address {outside}"))?;
    ensure!(is_refused(&bed.world.world, V6.outside(8080)), "it is open");
    TcpSession::open(&bed.world.world, None, V4.outside(8080))?.exchange(b"x")?;
    let (family, guest) = families[1];
    bed.forward(&format!("add tcp 8080 {}", server(family, guest, 80)))?;
    bed.forward("remove tcp 8080")?;
    ensure!(
        bed.json("forward")? == json!([]),
        "{}",
        bed.json("forward")?
    );
    Ok(())
}

/// What a guest's socket has, becomes the operator's, and counts on the guest no more.
fn a_forwarded_port_is_none_of_those_that_a_guest_holds(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let mut process = bed.start()?;
    let guest = bed.guest(0)?;
    let mirror = UdpReflector::start(&bed.world.world, family.server(0, 0))?;
    let held = || -> Result<u64> {
        let status = bed.instance.ask_json("status")?;
        status["guests"][0]["ports"].as_u64().context("no guest")
    };
    let sockets =
        [7000, 7001].map(|port| udp_socket(&guest.namespace, server(family, guest, port)));
    for socket in sockets {
        reflect_udp(&socket?, mirror.address(), b"x")?;
    }
    ensure!(held()? == 2, "{} ports", held()?);
    bed.forward("add udp 7000 guest0")?;
    ensure!(held()? == 1, "{} ports", held()?);
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    bed.forward("add udp 7001 guest0")?;
    ensure!(held()? == 0, "{} ports", held()?);
    bed.forward("remove udp 7000-7001")?;
    ensure!(held()? == 0, "{} ports", held()?);
    Ok(())
}
both_families!(a_forwarded_port_is_none_of_those_that_a_guest_holds);

fn guests_never_get_a_forwarded_port(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let other = bed.guest(1)?;
    bed.forward("add udp 7000 guest0")?;
    let mirror = UdpReflector::start(&bed.world.world, family.server(0, 0))?;
    let socket = udp_socket(&other.namespace, server(family, other, 7000))?;
    let seen = reflect_udp(&socket, mirror.address(), b"x")?;
    ensure!(seen != family.outside(7000), "it was handed out");
    Ok(())
}
both_families!(guests_never_get_a_forwarded_port);

fn an_address_of_ones_own(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let mut process = bed.start()?;
    let (guest, other) = (bed.guest(0)?, bed.guest(1)?);
    let another = family.uplink_host(7);
    bed.world
        .host
        .ip(&format!("address add {another} dev uplink0"))?;
    // A program of the host that would take what is not the guest's.
    let any = any_address(family);
    let _host = tcp_listener(&bed.world.host, (any, 80).into())?;
    let own = another.to_string();
    bed.ask("static", &format!("add {own} guest0"))?;
    let mappings = bed.instance.ask("mappings", &[])?;
    ensure!(
        mappings.contains(&format!("{own} ")),
        "it has no ports: {mappings}"
    );

    let check = || -> Result<()> {
        let web = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
        let udp = UdpReflector::start(&guest.namespace, server(family, guest, 53))?;
        let mut session = TcpSession::open(&bed.world.world, None, (another, 80).into())?;
        ensure!(session.seen() == session.stream().local_addr()?, "TCP in");
        session.exchange(&vec![1; 100_000])?;
        let socket = udp_socket(&bed.world.world, family.server(0, 0))?;
        reflect_udp(&socket, (another, 53).into(), b"x")?;
        bed.world.world.exec(&format!("ping -c 1 -W 5 {another}"))?;
        // Another guest comes in, too, with the address that it has outside.
        let mut session = TcpSession::open(&other.namespace, None, (another, 80).into())?;
        ensure!(
            session.seen().ip() == family.outside_address(),
            "{}",
            session.seen()
        );
        session.exchange(&vec![2; 100_000])?;
        drop((web, udp));
        // Outwards it keeps its ports, and pings with its own address.
        let mirror = UdpReflector::start(&bed.world.world, family.server(0, 0))?;
        let socket = udp_socket(&guest.namespace, server(family, guest, 0))?;
        let seen = reflect_udp(&socket, mirror.address(), b"x")?;
        ensure!(
            seen == (another, socket.local_addr()?.port()).into(),
            "UDP out: {seen}"
        );
        let mirror = TcpReflector::start(&bed.world.world, family.server(0, 0))?;
        let session = TcpSession::open(&guest.namespace, None, mirror.address())?;
        ensure!(session.seen().ip() == another, "{}", session.seen());
        guest
            .namespace
            .exec(&format!("ping -c 1 -W 5 {}", family.server(0, 0).ip()))?;
        // The others go on as before.
        let session = TcpSession::open(&other.namespace, None, mirror.address())?;
        ensure!(
            session.seen().ip() == family.outside_address(),
            "{}",
            session.seen()
        );
        Ok(())
    };
    check()?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    check().context("without a process")?;
    let _process = bed.start()?;
    check().context("with another process")?;

    let list = bed.json("static")?;
    ensure!(
        list == json!([{
            "outside": another, "inside": family.address_of(guest), "from": anywhere(family), "made_by": "command",
        }]),
        "{list}"
    );
    let line = format!("add tcp 8080 guest1:80 --outside-address {own}");
    let said = bed.refusal("forward", &line)?;
    ensure!(said.contains("one guest's alone"), "{said}");
    bed.instance.ask("static", &["remove", &own])?;
    let mirror = TcpReflector::start(&bed.world.world, family.server(0, 0))?;
    let session = TcpSession::open(&guest.namespace, None, mirror.address())?;
    ensure!(
        session.seen().ip() == family.outside_address(),
        "{}",
        session.seen()
    );
    Ok(())
}
both_families!(an_address_of_ones_own);

#[test]
fn a_command_that_fails_has_done_nothing() -> Result<()> {
    let bed = Bed::new(V6)?;
    let mut process = bed.start()?;
    let address = V6.uplink_host(7).to_string();
    let line = format!("add {address} guest0");
    let disable = |value| {
        let key = "net.ipv6.conf.uplink0.disable_ipv6";
        bed.world.host.sysctl(key, value)
    };
    for is_running in [true, false] {
        if !is_running {
            process.signal(Signal::SIGKILL)?;
            process.wait(PATIENCE)?;
        }
        disable("1")?;
        let said = bed.refusal("static", &line)?;
        ensure!(said.contains(&address), "{said}");
        ensure!(bed.json("static")? == json!([]), "the mapping stays");
        let journal = fs::read_to_string(bed.instance.run_directory().join("changes.json"))?;
        ensure!(!journal.contains(&address), "{journal}");
        disable("0")?;
        bed.ask("static", &line)?;
        bed.instance.ask("static", &["remove", &address])?;
    }
    Ok(())
}

/// Programs of the host that are led to guests.
fn pinned_host_programs(bed: &Bed) -> usize {
    fs::read_dir(bed.instance.pins().join("host")).map_or(0, Iterator::count)
}

fn the_host_itself_comes_in(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let mut process = bed.start()?;
    let (host, guest) = (&bed.world.host, bed.guest(0)?);
    let tcp = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
    let udp = UdpReflector::start(&guest.namespace, server(family, guest, 53))?;
    ensure!(is_refused(host, family.outside(8080)), "who answers?");
    ensure!(pinned_host_programs(&bed) == 0, "for what?");
    bed.forward("add tcp 8080 guest0:80")?;
    bed.forward("add udp 5353 guest0:53")?;

    let check = || -> Result<()> {
        let mut session = TcpSession::open(host, None, family.outside(8080))?;
        session.exchange(&pattern(100_000))?;
        // It talks to whom it asked for, as far as it can tell.
        ensure!(session.stream().peer_addr()? == family.outside(8080));
        if family == V4 {
            let mapped = SocketAddr::new(HOST_ADDRESS.to_ipv6_mapped().into(), 8080);
            let mapped = host.run(|| Ok(TcpStream::connect_timeout(&mapped, PATIENCE)?))?;
            ensure!(mapped.peer_addr()?.ip().to_canonical() == IpAddr::from(HOST_ADDRESS));
            ensure!(mapped.peer_addr()?.port() == 8080);
        }

        let any = SocketAddr::new(any_address(family), 0);
        let socket = udp_socket(host, any)?;
        // The answer comes from whom it sent to.
        reflect_udp(&socket, family.outside(5353), b"who am I?")?;
        socket.connect(family.outside(5353))?;
        ensure!(socket.peer_addr()? == family.outside(5353));
        socket.send(b"and now?")?;
        let mut answer = [0; 100];
        ensure!(socket.recv_from(&mut answer)?.1 == family.outside(5353));
        Ok(())
    };
    check().context("at first")?;
    ensure!(
        tcp.peers()
            .iter()
            .all(|peer| peer.ip() == family.gateway_of(guest)),
        "{:?}",
        tcp.peers()
    );
    ensure!(!udp.received().is_empty());

    // Without a process, and with another one.
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    check().context("without a process")?;
    process = bed.start()?;
    check().context("with another process")?;
    ensure!(
        pinned_host_programs(&bed) == 8,
        "{}",
        pinned_host_programs(&bed)
    );

    bed.forward("remove tcp 8080")?;
    ensure!(
        is_refused(host, family.outside(8080)),
        "it still leads there"
    );
    bed.forward("remove udp 5353")?;
    ensure!(pinned_host_programs(&bed) == 0, "for what?");
    bed.forward("add tcp 8080 guest0:80")?;
    check_tcp(host, family.outside(8080)).context("again")?;
    process.terminate(PATIENCE)?;
    ensure!(is_refused(host, family.outside(8080)), "something is left");
    Ok(())
}
both_families!(the_host_itself_comes_in);

fn check_tcp(namespace: &Namespace, remote: SocketAddr) -> Result<()> {
    TcpSession::open(namespace, None, remote)?.exchange(&pattern(1000))
}

fn the_host_comes_in_where_it_may_and_other_hosts_are_left_alone(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let another = family.uplink_host(7);
    let (elsewhere, uplinks) = match family {
        V4 => ("192.0.2.0/24", "198.51.100.0/24"),
        V6 => ("2001:db8:9::/48", "2001:db8:1::/64"),
    };
    let _process = bed.start()?;
    let (host, guest) = (&bed.world.host, bed.guest(0)?);
    let _tcp = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
    bed.forward("add tcp 8080 guest0:80")?;
    bed.forward(&format!("add tcp 8081 guest0:80 --from {elsewhere}"))?;
    bed.forward(&format!("add tcp 8082 guest0:80 --from {uplinks}"))?;
    bed.ask("static", &format!("add {another} guest0"))?;
    check_tcp(host, family.outside(8080))?;
    ensure!(is_refused(host, family.outside(8081)), "the host is let in");
    check_tcp(host, family.outside(8082))?;
    check_tcp(host, SocketAddr::new(another, 80)).context("1:1")?;
    ensure!(
        is_refused(host, family.outside(80)),
        "no forward has port 80"
    );

    // The same addresses on another host.
    let elsewhere = family.topology().inside(Inside::Veth).build()?;
    elsewhere.set_inside_addresses()?;
    let guest = &elsewhere.guests[0];
    let _tcp = TcpReflector::start(&guest.namespace, server(family, guest, 80))?;
    check_tcp(&elsewhere.host, server(family, guest, 80))?;
    ensure!(
        is_refused(&elsewhere.host, family.outside(8080)),
        "another host's sockets are led"
    );
    Ok(())
}
both_families!(the_host_comes_in_where_it_may_and_other_hosts_are_left_alone);
