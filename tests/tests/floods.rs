//! Whatever one guest or somebody in the world sends, and however much of it: the
//! other guests' flows go on, and they begin new ones.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{ArpEthIpv4Packet, ArpOperation};
use tapnat_testbed::{
    packet::{self, Builder},
    traffic,
};
use tapnat_tests::{
    both_families,
    connection::{Connection, Flags},
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE, size},
    wires::{Wires, remote},
    world::World,
};

/// More than one guest may have, and fewer than there can be.
const FLOOD: u16 = 4000;
/// So that a guest may have 1024 of them.
const SESSIONS: [&str; 2] = ["--max-sessions", "4096"];

/// Flows of the first guest, who does no harm.
struct Bystander<'a> {
    wires: &'a Wires,
    connection: Connection<'a>,
    next: u16,
}

impl<'a> Bystander<'a> {
    fn new(wires: &'a Wires) -> Result<Self> {
        let mut connection = Connection::new(wires, 0, 30_000, wires.family.remote(0, 80));
        connection.open()?;
        connection.talk()?;
        wires.map_udp(0, 30_001, wires.family.remote(0, 53))?;
        Ok(Self {
            wires,
            connection,
            next: 31_000,
        })
    }

    /// What was there goes on, and new things begin.
    fn check(&mut self) -> Result<()> {
        let wires = self.wires;
        self.connection.talk().context("its connection")?;
        for port in [30_001, self.next] {
            let outside = wires.map_udp(0, port, wires.family.remote(0, 53))?;
            wires.answer_udp(wires.family.remote(0, 53), outside, 0, port)?;
        }
        let mut connection = Connection::new(wires, 0, self.next, wires.family.remote(1, 80));
        connection.open().context("a new connection")?;
        connection.talk()?;
        let inside = wires.inside(0, 0).ip();
        let ping = packet::echo_request(inside, wires.family.remote(0, 0).ip(), self.next, 1);
        wires.out(0, &ping.payload(b"ping")).context("a new ping")?;
        self.next += 1;
        Ok(())
    }
}

/// The second guest sends these, and the first one goes on in between and after.
fn flood(
    bystander: &mut Bystander,
    wires: &Wires,
    packets: impl Iterator<Item = Builder>,
) -> Result<()> {
    for (number, packet) in packets.enumerate() {
        wires.guests[1].send(&packet)?;
        if number % 1000 == 999 {
            wires.arrivals()?;
            bystander.check()?;
        }
    }
    // And whatever came of it.
    wires.arrivals()?;
    bystander.check()
}

fn refused(instance: &Instance, address: &str) -> Result<u64> {
    let status = instance.ask_json("status")?;
    let guests = status["guests"].as_array();
    guests
        .and_then(|guests| guests.iter().find(|guest| guest["address"] == address))
        .and_then(|guest| guest["refused"].as_u64())
        .with_context(|| format!("{address} is not known: {status}"))
}

/// The flooding guest got as many sessions as it may, and was refused the rest.
fn check_limits(world: &World, wires: &Wires) -> Result<()> {
    let [one, other] = [0, 1].map(|guest| wires.inside(guest, 0).ip().to_string());
    let refusals = refused(&world.instance, &other)?;
    ensure!(refusals >= u64::from(FLOOD) - 1024, "{refusals} refused");
    ensure!(
        refused(&world.instance, &one)? == 0,
        "the bystander was refused"
    );
    let text = world.instance.ask("status", &[])?;
    ensure!(text.contains(&format!("guest {other}: ")), "{text}");
    for reason in [
        "session-table-full",
        "mapping-table-full",
        "ports-exhausted",
    ] {
        ensure!(world.instance.count(reason)? == 0, "{reason}");
    }
    Ok(())
}

fn a_guest_floods_connections(family: Family) -> Result<()> {
    let (world, wires) = family.wired(2, &SESSIONS)?;
    let mut bystander = Bystander::new(&wires)?;
    let syns = (0..FLOOD).map(|number| {
        let mut connection = Connection::new(&wires, 1, 10_000 + number, family.remote(0, 80));
        connection.next = [u32::from(number), 0];
        connection.outward(Flags::Syn, b"")
    });
    flood(&mut bystander, &wires, syns)?;
    check_limits(&world, &wires)
}
both_families!(a_guest_floods_connections);

fn a_guest_scans_ports(family: Family) -> Result<()> {
    let (world, wires) = family.wired(2, &SESSIONS)?;
    let mut bystander = Bystander::new(&wires)?;
    // Not the port of markers.
    let scan =
        (100..100 + FLOOD).map(|port| packet::udp(wires.inside(1, 40_000), family.remote(0, port)));
    flood(&mut bystander, &wires, scan)?;
    check_limits(&world, &wires)
}
both_families!(a_guest_scans_ports);

fn a_guest_takes_another_port_each_time(family: Family) -> Result<()> {
    // Of which it could otherwise have all.
    let arguments = ["--ports", "20000-24095", "--guest-max-sessions", "100000"];
    let (world, wires) = family.wired(2, &arguments)?;
    let mut bystander = Bystander::new(&wires)?;
    let scan = (0..FLOOD)
        .map(|number| packet::udp(wires.inside(1, 10_000 + number), family.remote(0, 53)));
    flood(&mut bystander, &wires, scan)?;
    let refusals = world.instance.count("guest-port-limit")?;
    ensure!(refusals >= u64::from(FLOOD) - 1024, "{refusals} refused");
    let other = wires.inside(1, 0).ip().to_string();
    ensure!(
        refused(&world.instance, &other)? >= refusals,
        "not counted on the guest"
    );
    ensure!(world.instance.count("ports-exhausted")? == 0, "exhausted");
    Ok(())
}
both_families!(a_guest_takes_another_port_each_time);

fn a_guest_floods_pings(family: Family) -> Result<()> {
    let (world, wires) = family.wired(2, &SESSIONS)?;
    let mut bystander = Bystander::new(&wires)?;
    let ends = (wires.inside(1, 0).ip(), family.remote(0, 0).ip());
    let pings = (0..FLOOD).map(|number| packet::echo_request(ends.0, ends.1, number, 1));
    flood(&mut bystander, &wires, pings)?;
    check_limits(&world, &wires)
}
both_families!(a_guest_floods_pings);

/// Of as many datagrams, each without an end.
fn a_guest_floods_fragments(family: Family) -> Result<()> {
    let (world, wires) = family.wired(2, &SESSIONS)?;
    let mut bystander = Bystander::new(&wires)?;
    for first in [true, false] {
        for number in 0..FLOOD {
            let whole = packet::udp(wires.inside(1, 40_000), family.remote(0, 9000))
                .payload(&[0; 100])
                .identification(number.into());
            wires.guests[1].send_all(&whole, |whole| {
                let mut pieces = whole.fragments(64);
                vec![pieces.remove(usize::from(!first))]
            })?;
            if number % 1000 == 999 {
                wires.arrivals()?;
                bystander.check()?;
                check_fragmented(&wires)?;
            }
        }
    }
    ensure!(world.instance.count("session-table-full")? == 0, "full");
    Ok(())
}
both_families!(a_guest_floods_fragments);

/// A datagram of the bystander's in fragments arrives whole.
fn check_fragmented(wires: &Wires) -> Result<()> {
    let payload: Vec<u8> = (0..=255).cycle().take(2000).collect();
    let whole = packet::udp(wires.inside(0, 30_001), wires.family.remote(0, 53)).payload(&payload);
    wires.guests[0].send_all(&whole, |whole| whole.fragments(1000))?;
    let arrived = wires.world.receive_whole()?;
    ensure!(
        arrived.ip_payload.ends_with(&payload),
        "other bytes arrived"
    );
    Ok(())
}

fn the_world_scans_the_outside_address(family: Family) -> Result<()> {
    let (world, wires) = family.wired(2, &SESSIONS)?;
    let mut bystander = Bystander::new(&wires)?;
    let outside = bystander.connection.outside()?.ip();
    let before = world.instance.ask_json("status")?["tables"]["sessions"]["used"].clone();
    for number in 0..FLOOD {
        let to = SocketAddr::new(outside, 1024 + number * 16);
        wires
            .world
            .send(&packet::udp(family.remote(1, 9), to).payload(b"?"))?;
        let syn = packet::tcp(family.remote(1, 9), to).with_tcp(|header| header.syn = true);
        wires.world.send(&syn)?;
    }
    wires.arrivals()?;
    let after = world.instance.ask_json("status")?["tables"]["sessions"]["used"].clone();
    // But for those that tell that all has arrived.
    let [before, after] = [before, after].map(|used| used.as_u64().unwrap_or(u64::MAX));
    ensure!(after <= before + 2, "{before} sessions became {after}");
    bystander.check()
}
both_families!(the_world_scans_the_outside_address);

fn so_many_sessions_begin_in_a_second(family: Family) -> Result<()> {
    const RATE: u64 = 50;
    let (world, wires) = family.wired(2, &["--guest-new-sessions", "50"])?;
    let mut bystander = Bystander::new(&wires)?;
    let start = Instant::now();
    for port in 20_000..20_400 {
        let sent = packet::udp(wires.inside(1, port), family.remote(0, 53)).payload(b"new");
        wires.guests[1].send(&sent)?;
    }
    let begun = world.instance.count("session-started")?;
    let seconds = start.elapsed().as_secs() + 1;
    ensure!(
        begun <= 20 + RATE + RATE * seconds,
        "{begun} in {seconds} s"
    );
    ensure!(begun >= RATE, "{begun}");
    ensure!(
        world.instance.count("guest-session-rate")? >= 400 - begun,
        "not counted"
    );
    let other = wires.inside(1, 0).ip().to_string();
    ensure!(
        refused(&world.instance, &other)? > 0,
        "not counted on the guest"
    );
    // Markers go by the flooding guest's wire, too.
    std::thread::sleep(std::time::Duration::from_secs(1));
    wires.arrivals()?;
    bystander.check()
}
both_families!(so_many_sessions_begin_in_a_second);

/// All that there are in a network of IPv6, as far as it gets.
#[test]
fn a_guest_uses_very_many_addresses() -> Result<()> {
    const USED: u16 = 5000;
    const GIVEN: u16 = 4096;
    let (world, wires) = V6.wired(2, &["--max-sessions", "16384"])?;
    let mut bystander = Bystander::new(&wires)?;
    let sent = |guest: usize, number: u16| {
        let SocketAddr::V6(mut source) = wires.inside(guest, 20_000) else {
            bail!("the guest has no IPv6");
        };
        let mut address = source.ip().segments();
        address[6] = 1;
        address[7] = number;
        source.set_ip(address.into());
        Ok(packet::udp(source.into(), V6.remote(0, 53)).payload(b"another address"))
    };
    let packets = (0..USED).map(|number| sent(1, number));
    let packets: Vec<_> = packets.collect::<Result<_>>()?;
    flood(&mut bystander, &wires, packets.into_iter())?;
    let refused = world.instance.count("device-guest-limit")?;
    let too_many = u64::from(USED - GIVEN);
    ensure!(
        (too_many..too_many + 100).contains(&refused),
        "{refused} refused"
    );
    // Those behind the other device may be new.
    for number in 0..100 {
        let arrived = wires.out(0, &sent(0, number)?)?;
        ensure!(arrived.payload == b"another address", "{arrived:?}");
    }
    ensure!(world.instance.count("guest-table-full")? == 0, "it is full");
    Ok(())
}

/// More guests than the table has room for begin what nobody answers.
fn for_want_of_room_what_nobody_answers_in_goes_first(family: Family) -> Result<()> {
    let (world, wires) = family.wired(4, &SESSIONS)?;
    let mut bystander = Bystander::new(&wires)?;
    // What tells that all has arrived begins before the flood.
    wires.arrivals()?;
    for guest in 1..4 {
        for number in 0..1024 {
            let syn = Connection::new(&wires, guest, 10_000 + number, family.remote(0, 80))
                .outward(Flags::Syn, b"");
            wires.guests[guest].send(&syn)?;
        }
    }
    wires.arrivals()?;
    let used = |status: &serde_json::Value| status["tables"]["sessions"]["used"].as_u64();
    let start = Instant::now();
    loop {
        bystander.connection.talk()?;
        let status = world.instance.ask_json("status")?;
        // It goes on until half of the table is free.
        let is_told = world.said().contains("sessions are in use");
        if is_told && used(&status).is_some_and(|used| used < 2048) {
            break;
        }
        ensure!(start.elapsed() < PATIENCE, "{status}");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    wires.arrivals()?;
    bystander.check()
}
both_families!(for_want_of_room_what_nobody_answers_in_goes_first);

/// What a process may grow by without being said to do so.
const SLACK_KIB: u64 = 4096;

/// A frame by which a guest tells everybody that its address is at another link address
/// now (RFC 826).
fn announcement(address: [u8; 4], link: [u8; 6]) -> Vec<u8> {
    const ARP: [u8; 2] = [0x08, 0x06];
    let announced = ArpEthIpv4Packet {
        operation: ArpOperation::REQUEST,
        sender_mac: link,
        sender_ipv4: address,
        target_mac: [0; 6],
        target_ipv4: address,
    };
    [&[0xff; 6], &link[..], &ARP, &announced.to_bytes()].concat()
}

/// Each of them is told to the process, too, and has every session look for its way.
#[test]
fn a_guest_takes_another_link_address_all_the_time() -> Result<()> {
    let (world, wires) = V4.wired(2, &SESSIONS)?;
    let mut bystander = Bystander::new(&wires)?;
    let (host, guest) = (&world.topology.host, world.guest(1));
    let address = guest.address;
    // So that the host knows it.
    let ping = traffic::ping(host, address.into(), 1, &["-W", "10"])?;
    ensure!(ping.received == 1, "{}", ping.output);
    let status = world.instance.ask_json("status")?;
    let process = status["process"]
        .as_u64()
        .context("no process")?
        .try_into()?;
    let (before, _) = size(process)?;
    for round in 0..20 {
        let frames = (0..1000_u16).map(|number| {
            let [high, low] = number.to_be_bytes();
            announcement(address.octets(), [2, 0, 0, round, high, low])
        });
        wires.guests[1].send_all(&packet::udp(remote(0, 1), remote(0, 1)), |_| {
            frames.collect()
        })?;
        bystander.check()?;
    }
    let known = host.ip(&format!("neighbour show {address}"))?;
    ensure!(
        known.contains("02:00:00:13:"),
        "the host knows it as {known}"
    );
    // It is told of more than it can take, and still follows what matters.
    host.ip("link set uplink0 mtu 1400")?;
    world.instance.until(|status| {
        let devices = status["devices"].as_array();
        devices.is_some_and(|devices| devices.iter().any(|device| device["mtu"] == 1400))
    })?;
    bystander.check()?;
    let (after, _) = size(process)?;
    ensure!(
        after <= before + SLACK_KIB,
        "{before} KiB became {after} KiB"
    );
    Ok(())
}
