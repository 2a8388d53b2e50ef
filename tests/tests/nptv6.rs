//! Prefix translation (RFC 6296): nothing of a packet changes but the prefix, the word
//! that makes up for it, and the hop limit; and both sides may begin.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use etherparse::IpNumber;
use serde_json::{Value, json};
use tapnat_testbed::{
    packet::{self, Builder},
    topology::{self, HOST_ADDRESS6, Inside, Topology},
    traffic::{self, TcpReflector, TcpSession},
};
use tapnat_tests::{
    family::V6,
    instance::Instance,
    wires::{Wire, Wires},
    world::World,
};

/// The networks of all guests are in the first.
const PREFIXES: [&str; 2] = ["--prefix", "fd00:7a70::/48=2001:db8:f::/48"];
/// What the words of the first prefix add up to more than those of the second.
const ADJUSTMENT: u16 = 0x49a9;

/// What the world knows an inside address as.
fn outside(inside: IpAddr) -> IpAddr {
    let IpAddr::V6(address) = inside else {
        return inside;
    };
    let [_, _, _, subnet, a, b, c, d] = address.segments();
    Ipv6Addr::new(0x2001, 0xdb8, 0xf, subnet + ADJUSTMENT, a, b, c, d).into()
}

fn outside_endpoint(inside: SocketAddr) -> SocketAddr {
    SocketAddr::new(outside(inside.ip()), inside.port())
}

fn topology() -> topology::Builder {
    Topology::builder().inside(Inside::Veth).ipv6()
}

fn world(guests: u8, more: &[&str]) -> Result<(World, Wires)> {
    wired(topology().guests(guests), &[&PREFIXES, more].concat())
}

fn wired(builder: topology::Builder, arguments: &[&str]) -> Result<(World, Wires)> {
    let world = World::start(builder, arguments)?;
    let wires = Wires::open_for(&world, V6)?;
    Ok((world, wires))
}

/// Packets of every kind between two ends, the first of a session or not.
fn kinds(from: SocketAddr, to: SocketAddr) -> Vec<Builder> {
    let (one, other) = (from.ip(), to.ip());
    let payload = traffic::pattern(333);
    [
        packet::udp(from, to),
        packet::tcp(from, to).with_tcp(|header| header.syn = true),
        packet::tcp(from, to).with_tcp(|header| header.ack = true),
        packet::tcp(from, to).with_tcp(|header| header.rst = true),
        packet::echo_request(one, other, from.port(), 7),
        packet::echo_reply(one, other, from.port(), 7),
        // No NAT knows what it is, and none needs to.
        packet::other(one, other, IpNumber(253)),
        packet::udp(from, to).extension(IpNumber::IPV6_DESTINATION_OPTIONS, &[1, 4, 0, 0, 0, 0]),
    ]
    .map(|packet| packet.payload(&payload))
    .to_vec()
}

#[test]
fn both_sides_may_begin_and_no_checksum_changes() -> Result<()> {
    let (world, wires) = world(2, &[])?;
    let remote = V6.remote(0, 53);
    for guest in 0..2 {
        let inside = wires.inside(guest, 40_000);
        let known = outside_endpoint(inside);
        let inward = kinds(remote, known).into_iter().zip(kinds(remote, inside));
        for (sent, expected) in inward {
            wires.world.send(&sent)?;
            let arrived = wires.guests[guest].receive_captured()?;
            arrived.check(&expected.ttl(63))?;
            ensure!(
                arrived.ip()[40..] == sent.build()[40..],
                "{}",
                arrived.summary()
            );
        }
        let outward = kinds(inside, remote).into_iter().zip(kinds(known, remote));
        for (sent, expected) in outward {
            wires.guests[guest].send(&sent)?;
            let arrived = wires.world.receive_captured()?;
            arrived.check(&expected.ttl(63))?;
            ensure!(
                arrived.ip()[40..] == sent.build()[40..],
                "{}",
                arrived.summary()
            );
        }
    }
    ensure!(
        world.instance.count("prefix-translated")? >= 32,
        "not counted"
    );
    ensure!(
        world.instance.count("session-started")? == 0,
        "there are sessions"
    );
    wires.nothing_arrives()
}

#[test]
fn errors_are_translated_with_what_they_quote() -> Result<()> {
    let (_world, wires) = world(1, &[])?;
    let (inside, remote) = (wires.inside(0, 40_000), V6.remote(0, 53));
    let known = outside_endpoint(inside);
    for kind in V6.errors() {
        for length in [40, 41, 48, 60, 200] {
            let quote = |packet: Builder| {
                let whole = packet.payload(&traffic::pattern(200)).build();
                whole[..length].to_vec()
            };
            let about = |source| quote(packet::udp(source, remote));
            let error =
                |to, about: &[u8]| packet::icmp_error(V6.router(), to, kind, [0, 0, 5, 220], about);
            wires.world.send(&error(known.ip(), &about(known)))?;
            let expected = error(inside.ip(), &about(inside));
            wires.guests[0]
                .receive_this(&expected.ttl(63))
                .with_context(|| format!("{kind:?}, {length} bytes"))?;

            let about = |to| quote(packet::udp(remote, to));
            let error =
                |from, about: &[u8]| packet::icmp_error(from, remote.ip(), kind, [0; 4], about);
            wires.guests[0].send(&error(inside.ip(), &about(inside)))?;
            let expected = error(known.ip(), &about(known));
            wires
                .world
                .receive_this(&expected.ttl(63))
                .with_context(|| format!("{kind:?}, {length} bytes"))?;
        }
    }
    wires.nothing_arrives()
}

#[test]
fn fragments_are_translated_one_by_one() -> Result<()> {
    let (_world, wires) = world(1, &[])?;
    let (inside, remote) = (wires.inside(0, 40_000), V6.remote(0, 53));
    let known = outside_endpoint(inside);
    let payload = traffic::pattern(4000);
    let whole = |from, to| packet::udp(from, to).payload(&payload).identification(77);
    let backwards = |packet: &Builder| {
        let mut frames = packet.fragments(1280);
        frames.reverse();
        frames
    };
    wires.guests[0].send_all(&whole(inside, remote), backwards)?;
    let arrived = wires.world.receive_whole()?;
    ensure!(arrived.source == known.ip(), "{:?}", arrived.source);
    ensure!(
        arrived.ip_payload == whole(known, remote).fragmentable(),
        "another payload"
    );
    wires.world.send_all(&whole(remote, known), backwards)?;
    let arrived = wires.guests[0].receive_whole()?;
    ensure!(
        arrived.destination == inside.ip(),
        "{:?}",
        arrived.destination
    );
    ensure!(
        arrived.ip_payload == whole(remote, inside).fragmentable(),
        "another payload"
    );
    wires.nothing_arrives()
}

#[test]
fn guests_reach_each_other_as_the_world_does() -> Result<()> {
    let (_world, wires) = world(2, &[])?;
    let [one, other] = [wires.inside(0, 40_000), wires.inside(1, 80)];
    let [one_known, other_known] = [one, other].map(outside_endpoint);
    for (sent, expected) in kinds(one, other_known)
        .into_iter()
        .zip(kinds(one_known, other))
    {
        wires.guests[0].send(&sent)?;
        wires.guests[1].receive_this(&expected.ttl(63))?;
    }
    // And an error about it goes back the same way.
    let arrived = packet::udp(one_known, other).payload(b"hairpin").build();
    let sent = packet::udp(one, other_known).payload(b"hairpin").build();
    let error = packet::unreachable(other.ip(), one_known.ip(), 4, &arrived);
    wires.guests[1].send(&error)?;
    let expected = packet::unreachable(other_known.ip(), one.ip(), 4, &sent);
    wires.guests[0].receive_this(&expected.ttl(63))?;
    wires.nothing_arrives()
}

#[test]
fn isolated_guests_do_not() -> Result<()> {
    let (world, wires) = world(2, &["--isolate"])?;
    let to = outside_endpoint(wires.inside(1, 80));
    wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), to))?;
    let told = wires.guests[0].receive()?;
    ensure!(
        told.icmp_kind() == Some(V6.prohibited()),
        "arrived: {told:?}"
    );
    ensure!(
        world.instance.count("guest-isolated")? == 1,
        "another reason"
    );
    wires.nothing_arrives()
}

#[test]
fn hop_limits_run_out_here() -> Result<()> {
    let (_world, wires) = world(1, &[])?;
    let (inside, remote) = (wires.inside(0, 40_000), V6.remote(0, 53));
    let known = outside_endpoint(inside);
    let last = packet::udp(inside, remote).payload(b"last hop").ttl(1);
    wires.guests[0].send(&last)?;
    let told = wires.guests[0].receive()?;
    ensure!(
        told.icmp_kind() == Some(V6.time_exceeded()),
        "arrived: {told:?}"
    );
    ensure!(told.payload.starts_with(&last.build()[..40]), "{told:?}");
    let last = packet::udp(remote, known).payload(b"last hop").ttl(1);
    wires.world.send(&last)?;
    let told = wires.world.receive()?;
    ensure!(
        told.icmp_kind() == Some(V6.time_exceeded()),
        "arrived: {told:?}"
    );
    ensure!(told.payload.starts_with(&last.build()[..40]), "{told:?}");
    wires.nothing_arrives()
}

#[test]
fn what_is_too_big_is_told_with_the_mtu() -> Result<()> {
    let far = topology().uplink_mtu(1400);
    let near = topology().inside_mtu(1300);
    for (builder, mtu) in [(far, 1400_u16), (near, 1300)] {
        let (_world, wires) = wired(builder, &PREFIXES)?;
        let (inside, remote) = (wires.inside(0, 40_000), V6.remote(0, 53));
        let (wire, from, to): (&Wire, _, _) = if mtu == 1400 {
            (&wires.guests[0], inside, remote)
        } else {
            (&wires.world, remote, outside_endpoint(inside))
        };
        let length = usize::from(mtu) - 48;
        let too_big = packet::udp(from, to).payload(&traffic::pattern(length + 1));
        wire.send(&too_big)?;
        let told = wire.receive()?;
        let [high, low] = mtu.to_be_bytes();
        ensure!(
            told.icmp_kind() == Some(V6.too_big()) && told.icmp_rest() == Some([0, 0, high, low]),
            "arrived: {told:?}"
        );
        ensure!(told.destination_address() == from.ip(), "{told:?}");
        wire.send(&packet::udp(from, to).payload(&traffic::pattern(length)))?;
        let other = if mtu == 1400 {
            &wires.world
        } else {
            &wires.guests[0]
        };
        ensure!(other.receive()?.payload.len() == length, "cut");
        wires.nothing_arrives()?;
    }
    Ok(())
}

#[test]
fn nobody_is_somebody_else() -> Result<()> {
    let (world, wires) = world(2, &[])?;
    let (one, other) = (wires.inside(0, 40_000), wires.inside(1, 40_000));
    let remote = V6.remote(0, 53);
    // Another guest, and nobody's network.
    let nobody = SocketAddr::new("fd00:7a70:0:99::1".parse()?, 1);
    for source in [other, nobody] {
        wires.guests[0].send(&packet::udp(source, remote))?;
        wires.nothing_arrives()?;
    }
    // The world does not know internal addresses.
    for source in [other, nobody] {
        wires
            .world
            .send(&packet::udp(source, outside_endpoint(one)))?;
        wires.nothing_arrives()?;
    }
    ensure!(
        world.instance.count("spoofed-source")? == 4,
        "another reason"
    );
    Ok(())
}

#[test]
fn addresses_without_a_counterpart_are_refused() -> Result<()> {
    let (world, wires) = world(1, &[])?;
    let remote = V6.remote(0, 53);
    // No subnet has this number, no inside network that, and the last is the host's.
    let ends = [
        "2001:db8:f:ffff::1".parse()?,
        "2001:db8:f:1234::1".parse()?,
        outside(V6.inside_host(0, 1)),
    ];
    for end in ends {
        wires
            .world
            .send(&packet::udp(remote, SocketAddr::new(end, 9)))?;
        let told = wires.world.receive()?;
        ensure!(told.icmp_kind() == Some(V6.prohibited()), "{end}: {told:?}");
    }
    ensure!(
        world.instance.count("prefix-untranslatable")? == 3,
        "another reason"
    );
    wires.nothing_arrives()
}

#[test]
fn networks_in_no_prefix_share_the_uplinks_address() -> Result<()> {
    let only = ["--prefix", "fd00:7a70:0:1::/64=2001:db8:f:7::/64"];
    let (world, wires) = wired(topology().guests(2), &only)?;
    let remote = V6.remote(0, 53);
    let shared = wires.map_udp(0, 40_000, remote)?;
    ensure!(shared.ip() == V6.outside_address(), "{shared}");
    wires.answer_udp(remote, shared, 0, 40_000)?;
    // Behind long prefixes it is the identifier that changes.
    let own = wires.map_udp(1, 40_000, remote)?;
    let IpAddr::V6(address) = own.ip() else {
        anyhow::bail!("{own}");
    };
    ensure!(
        address.segments()[..4] == [0x2001, 0xdb8, 0xf, 7] && own.port() == 40_000,
        "{own}"
    );
    wires.answer_udp(remote, own, 1, 40_000)?;
    wires.nothing_arrives()?;
    let guest = world.guest(1);
    ensure!(
        traffic::ping(&guest.namespace, V6.gateway_of(guest), 1, &["-W", "5"])?.received == 1,
        "the host does not answer"
    );
    Ok(())
}

/// RFC 6296 section 3.6: the standard's own example, between kernels. The host's uplink
/// is itself in the external prefix.
#[test]
fn the_example_of_the_standard_works_between_kernels() -> Result<()> {
    let topology = topology().build()?;
    let Topology {
        host,
        world,
        guests,
        ..
    } = &topology;
    let guest = &guests[0].namespace;
    guest.ip("address add fd01:203:405:1::1234/64 dev lan0 nodad")?;
    guest.ip("-6 route replace default via fd01:203:405:1::1 src fd01:203:405:1::1234")?;
    world.ip(&format!(
        "-6 route add 2001:db8:1:d550::/64 via {HOST_ADDRESS6}"
    ))?;
    let instance = Instance::new(host);
    let inside = format!(
        "{}=10.0.0.1/24,fd01:203:405:1::1/64",
        guests[0].inside_device
    );
    let prefix = "fd01:203:405::/48=2001:db8:1::/48";
    let _process = instance.start(&["--inside", &inside, "--prefix", prefix])?;
    let known: IpAddr = "2001:db8:1:d550::1234".parse()?;

    let server = TcpReflector::start(world, V6.server(0, 7))?;
    let mut session = TcpSession::open(guest, None, server.address())?;
    ensure!(session.seen().ip() == known, "{}", session.seen());
    session.exchange(&traffic::pattern(300_000))?;

    let server = TcpReflector::start(guest, "[fd01:203:405:1::1234]:7".parse()?)?;
    let mut session = TcpSession::open(world, None, SocketAddr::new(known, 7))?;
    session.exchange(&traffic::pattern(300_000))?;
    drop(server);

    for (from, to) in [(world, known), (guest, V6.server(0, 7).ip())] {
        ensure!(
            traffic::ping(from, to, 1, &["-W", "5"])?.received == 1,
            "{to} does not answer"
        );
    }
    // The host itself, and its gateway, are who they were.
    for (from, to) in [
        (world, HOST_ADDRESS6.into()),
        (guest, HOST_ADDRESS6.into()),
        (guest, V6.gateway()),
    ] {
        ensure!(
            traffic::ping(from, to, 1, &["-W", "5"])?.received == 1,
            "{to} does not answer"
        );
    }
    Ok(())
}

#[test]
fn prefixes_that_cannot_be_translated_are_refused() -> Result<()> {
    let topology = topology().build()?;
    let instance = Instance::new(&topology.host);
    let inside = topology.inside();
    let five = (1..=5)
        .map(|number| format!("fd0{number}::/48=2001:db8:{number}::/48"))
        .collect::<Vec<_>>()
        .join(",");
    for (prefixes, said) in [
        ("fd00:7a70::/48", "is not two prefixes"),
        ("fd00:7a70::/48=x", "is not an IPv6 prefix"),
        ("10.0.0.0/8=2001:db8:f::/48", "is not an IPv6 prefix"),
        ("fd00:7a70::/65=2001:db8:f::/48", "1 to 64 bits"),
        ("::/0=2001:db8:f::/48", "1 to 64 bits"),
        ("fd00:7a70::1/48=2001:db8:f::/48", "write fd00:7a70::/48"),
        ("fe80::/64=2001:db8:f::/48", "are not forwarded"),
        ("ff00::/48=2001:db8:f::/48", "are not forwarded"),
        ("fd00::/16=fd00:7a70::/48", "lies within the other"),
        (
            "fd00:7a70::/48=2001:db8:f::/48,fd00:7a70:0:1::/64=2001:db8:e::/48",
            "overlaps",
        ),
        (
            "fd00:7a70::/48=2001:db8:f::/48,fd00:7a71::/48=2001:db8::/32",
            "overlaps",
        ),
        (five.as_str(), "4 are the most"),
        (
            "fd00:7a71::/48=2001:db8:f::/48",
            "no inside network lies in the prefix fd00:7a71::/48",
        ),
    ] {
        let mut command = instance.command("run")?;
        for inside in &inside {
            command = command.args(["--inside", inside]);
        }
        let output = command.args(["--prefix", prefixes]).output()?;
        let text = output.stderr;
        ensure!(!output.status.success(), "{prefixes} is taken");
        ensure!(text.contains(said), "{prefixes}: {text}");
    }
    Ok(())
}

/// What such a guest answers has its own outside address, whatever it was asked by.
#[test]
fn forwards_to_such_guests_are_refused() -> Result<()> {
    let (world, wires) = world(1, &[])?;
    let inside = wires.inside(0, 80).ip();
    let reached = format!("the world reaches it by {}", outside(inside));
    let end = format!("[{inside}]:80");
    let add = world.instance.command("forward")?;
    let added = add.args(["add", "tcp", "8080", &end]).output()?;
    ensure!(
        added.status.code() == Some(1) && added.stderr.contains(&reached),
        "{added:?}"
    );
    let add = world.instance.command("static")?;
    let address = V6.uplink_host(99).to_string();
    let added = add.args(["add", &address, &inside.to_string()]).output()?;
    ensure!(
        added.status.code() == Some(1) && added.stderr.contains(&reached),
        "{added:?}"
    );
    let [_, pair] = PREFIXES;
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile()?;
    write!(
        file,
        "inside = \"veth0=fd00:7a70::1/64\"\nprefix = [\"{pair}\"]\n\
         [[forward]]\nprotocol = \"tcp\"\nport = 8080\nto = \"{end}\"\n"
    )?;
    let path = file.path().display().to_string();
    let checked = world.instance.command("check")?.arg(&path).output()?;
    ensure!(
        checked.status.code() == Some(1) && checked.stderr.contains(&reached),
        "{checked:?}"
    );
    let remote = V6.remote(0, 53).ip().to_string();
    let asked = ["--guest", &inside.to_string(), "--to", &remote];
    let said = world.instance.ask("why", &asked)?;
    ensure!(said.contains("translated without any"), "{said}");
    let nobody = world.instance.command("why")?;
    let nobody = nobody.args(["--to", &remote]).output()?;
    ensure!(nobody.stderr.contains("(--guest)"), "{nobody:?}");
    Ok(())
}

#[test]
fn pairs_are_shown_and_why_knows_them() -> Result<()> {
    let (world, wires) = world(1, &[])?;
    let status = world.instance.ask_json("status")?;
    let expected = json!([{"internal": "fd00:7a70::/48", "external": "2001:db8:f::/48"}]);
    ensure!(status["prefixes"] == expected, "{status}");
    let text = world.instance.ask("status", &[])?;
    let line = "prefix: fd00:7a70::/48 is 2001:db8:f::/48 outside, without sessions";
    ensure!(text.contains(line), "{text}");

    let why = |arguments: &[&str]| -> Result<Value> {
        let more = ["--proto", "udp", "--json"];
        let said = world.instance.ask("why", &[arguments, &more].concat())?;
        Ok(serde_json::from_str::<Value>(&said)?["packet"].clone())
    };
    let (inside, remote) = (wires.inside(0, 40_000), V6.remote(0, 53));
    let known = outside_endpoint(inside);
    let shown = |end: SocketAddr| json!({"address": end.ip(), "port": end.port()});
    let (guest, server) = (inside.ip().to_string(), remote.to_string());
    let out = why(&["--guest", &guest, "--to", &server])?;
    ensure!(
        out["reason"] == "prefix-translated"
            && out["after"]["source"] == shown(known)
            && out["after"]["destination"] == shown(remote),
        "{out}"
    );
    // As it says, so it is.
    wires.guests[0].send(&packet::udp(inside, remote))?;
    wires
        .world
        .receive_this(&packet::udp(known, remote).ttl(63))?;
    let back = why(&["--from", &server, "--to", &known.to_string()])?;
    ensure!(
        back["reason"] == "prefix-translated" && back["after"]["destination"] == shown(inside),
        "{back}"
    );
    Ok(())
}
