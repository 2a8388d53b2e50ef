//! RFC 6888, Common Requirements for Carrier-Grade NATs: a test for each
//! requirement that concerns this NAT, by what arrives. Those that repeat other
//! RFCs' have their tests there.

use std::{collections::BTreeSet, net::SocketAddr, thread};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    packet::{self, Builder},
    topology::{Inside, UPLINK},
};
use tapnat_tests::{
    both_families,
    connection::Connection,
    family::{Family, V4, V6},
    wires::Wires,
    world::{World, just_over},
};

/// Checks that a packet of a guest is refused as prohibited, with ICMP.
fn check_refused(wires: &Wires, guest: usize, packet: &Builder) -> Result<()> {
    wires.guests[guest].send(packet)?;
    let answer = wires.guests[guest].receive()?;
    let prohibited = Some(wires.family.prohibited());
    ensure!(answer.icmp_kind() == prohibited, "{answer:?}");
    Ok(())
}

/// REQ-3: the external addresses need not be contiguous.
fn req_3_the_address_pool_need_not_be_contiguous(family: Family) -> Result<()> {
    let pool = [
        family.outside_address(),
        family.uplink_host(77),
        family.world_host(250),
    ];
    let pool = pool.map(|address| address.to_string());
    let topology = family.topology().inside(Inside::Veth).guests(20).build()?;
    for address in &pool[1..] {
        topology
            .host
            .ip(&format!("address add {address} dev {UPLINK}"))?;
        let outside = family.outside_address();
        topology
            .world
            .ip(&format!("route replace {address} via {outside}"))?;
    }
    let world = World::start_in(topology, &["--outside-address", &pool.join(",")])?;
    world.check_reach()?;
    let wires = Wires::open(&world)?;
    let mut used = BTreeSet::new();
    for guest in 0..20 {
        let seen = wires.map_udp(guest, 40_000, family.remote(0, 53))?;
        wires.answer_udp(family.remote(0, 53), seen, guest, 40_000)?;
        used.insert(seen.ip().to_string());
    }
    ensure!(used == pool.into(), "{used:?}");
    Ok(())
}
both_families!(req_3_the_address_pool_need_not_be_contiguous);

/// REQ-4: the number of ports of a subscriber can be limited, and is given back.
fn req_4_a_guests_ports_can_be_limited(family: Family) -> Result<()> {
    let limits = "--guest-max-ports 3 --udp-timeout 2 --port-rest 1 --sweep-interval 1";
    let (world, wires) = family.wired(2, &limits.split(' ').collect::<Vec<_>>())?;
    let guest = wires.inside(0, 0).ip().to_string();
    // Other ones each time, so that it gets none of its own again.
    for first in [40_000, 40_010] {
        for port in first..first + 3 {
            wires.map_udp(0, port, family.remote(0, 53))?;
        }
        for port in first + 3..first + 6 {
            check_refused(
                &wires,
                0,
                &packet::udp(wires.inside(0, port), family.remote(0, 53)),
            )?;
        }
        // One port is good for many remotes, and others do not feel it.
        wires.map_udp(0, first, family.remote(1, 53))?;
        wires.map_udp(1, first, family.remote(0, 53))?;
        world.instance.until(|status| {
            let guests = status["guests"].as_array();
            guests.is_some_and(|guests| {
                guests
                    .iter()
                    .any(|it| it["address"] == guest && it["ports"] == 0)
            })
        })?;
    }
    Ok(())
}
both_families!(req_4_a_guests_ports_can_be_limited);

/// REQ-5: so can its state: many remotes by one port.
fn req_5_a_guests_state_can_be_limited(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--guest-max-sessions", "8"])?;
    for port in 1..=8 {
        wires.map_udp(0, 40_000, family.remote(0, port))?;
    }
    for port in 9..20 {
        check_refused(
            &wires,
            0,
            &packet::udp(wires.inside(0, 40_000), family.remote(0, port)),
        )?;
    }
    for port in 1..=8 {
        wires.map_udp(0, 40_000, family.remote(0, port))?;
        wires.map_udp(1, 40_000, family.remote(0, port))?;
    }
    Ok(())
}
both_families!(req_5_a_guests_state_can_be_limited);

/// REQ-6: translation can be turned off for some destinations. (Whoever is there
/// has a route to the guests.)
fn req_6_destinations_can_be_exempt_from_translation(family: Family) -> Result<()> {
    let exempt = family.remote(1, 0).ip().to_string();
    let options = ["--untranslated", &exempt, "--udp-timeout", "1"];
    let (world, wires) = family.wired(2, &options)?;
    for guest in 0..2 {
        let inside = wires.inside(guest, 40_000);
        for _ in 0..2 {
            let seen = wires.map_udp(guest, 40_000, family.remote(1, 53))?;
            ensure!(seen == inside, "{inside} is seen as {seen}");
            wires.answer_udp(family.remote(1, 53), inside, guest, 40_000)?;
        }
        let mut connection = Connection::new(&wires, guest, 40_000, family.remote(1, 80));
        connection.open()?;
        connection.talk()?;
        ensure!(connection.outside()? == inside, "{:?}", connection.outside);
        // An error about a packet of it.
        let about = packet::udp(inside, family.remote(1, 53)).ttl(60).build();
        let error = packet::time_exceeded(family.remote(1, 0).ip(), inside.ip(), &about);
        let arrived = wires.back(&error, guest)?;
        ensure!(arrived.quoted()?.source == inside, "{arrived:?}");
        // In fragments.
        let long = packet::udp(inside, family.remote(1, 53)).payload(&[7; 3000]);
        wires.guests[guest].send_all(&long, |packet| packet.fragments(1500))?;
        let arrived = wires.world.receive_whole()?;
        ensure!(arrived.source == inside.ip() && arrived.ip_payload == long.fragmentable());
        // Others see the shared address.
        let seen = wires.map_udp(guest, 40_000, family.remote(0, 53))?;
        ensure!(seen.ip() == family.outside_address(), "{seen}");
    }
    let status = world.instance.ask("status", &[])?;
    let all = match family {
        V4 => 32,
        V6 => 128,
    };
    ensure!(
        status.contains(&format!("not translated: to {exempt}/{all}")),
        "{status}"
    );
    // Only answers get in, and only as long as there is a session.
    let inside = wires.inside(0, 40_000);
    wires
        .world
        .send(&packet::udp(family.remote(1, 54), inside))?;
    wires
        .world
        .send(&packet::udp(family.remote(0, 53), inside))?;
    thread::sleep(just_over(1));
    wires
        .world
        .send(&packet::udp(family.remote(1, 53), inside))?;
    let arrivals = wires.arrivals()?;
    ensure!(arrivals.guests.iter().all(Vec::is_empty), "got in");
    Ok(())
}
both_families!(req_6_destinations_can_be_exempt_from_translation);

/// REQ-7: endpoint-independent filtering can be had; address-dependent
/// filtering may be used.
fn req_7_filtering_can_be_endpoint_independent(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(1, &["--filtering", "endpoint-independent"])?;
    let seen = wires.map_udp(0, 40_000, family.remote(0, 53))?;
    wires.answer_udp(family.remote(1, 99), seen, 0, 40_000)
}
both_families!(req_7_filtering_can_be_endpoint_independent);

/// REQ-8: a freed port rests before it is given to another subscriber, by
/// default 120 seconds; its former owner may have it back.
fn req_8_a_freed_port_rests(family: Family) -> Result<()> {
    let (world, _wires) = family.wired(1, &[])?;
    let status = world.instance.ask_json("status")?;
    let rest = status["timeouts"]["port_rest"].as_f64();
    ensure!(rest.is_some_and(|seconds| seconds >= 120.0), "{status}");

    let (_world, wires) = family.wired(2, &["--udp-timeout", "1", "--port-rest", "30"])?;
    ensure!(wires.map_udp(0, 40_000, family.remote(0, 53))? == family.outside(40_000));
    thread::sleep(just_over(1));
    let other = wires.map_udp(1, 40_000, family.remote(0, 53))?;
    ensure!(other != family.outside(40_000), "it did not rest");
    ensure!(
        wires.map_udp(0, 40_000, family.remote(0, 53))? == family.outside(40_000),
        "its owner did not get it back"
    );
    Ok(())
}
both_families!(req_8_a_freed_port_rests);

/// REQ-8: after its rest it is given to others.
fn req_8_a_port_that_has_rested_is_used_again(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--udp-timeout", "1", "--port-rest", "1"])?;
    ensure!(wires.map_udp(0, 40_000, family.remote(0, 53))? == family.outside(40_000));
    thread::sleep(just_over(2));
    ensure!(
        wires.map_udp(1, 40_000, family.remote(0, 53))? == family.outside(40_000),
        "it still rests"
    );
    Ok(())
}
both_families!(req_8_a_port_that_has_rested_is_used_again);

/// REQ-11: out of resources, the packet is dropped (A), its sender told (B), and
/// no mapping that exists is given up for it (D).
fn req_11_nothing_is_given_up_for_what_is_refused(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--ports", "40000-40015"])?;
    let seen = (0..16)
        .map(|port| wires.map_udp(0, port + 40_000, family.remote(0, 53)))
        .collect::<Result<Vec<_>>>()?;
    for port in 0..200 {
        let packet = packet::udp(wires.inside(1, 20_000 + port), family.remote(0, 53));
        check_refused(&wires, 1, &packet)?;
    }
    for (port, seen) in (40_000..).zip(seen) {
        wires.answer_udp(family.remote(0, 53), seen, 0, port)?;
        ensure!(
            wires.map_udp(0, port, family.remote(1, 53))? == seen,
            "remapped"
        );
    }
    Ok(())
}
both_families!(req_11_nothing_is_given_up_for_what_is_refused);

/// REQ-11 for the table of sessions: no live session makes way.
fn req_11_a_full_table_gives_no_session_up(family: Family) -> Result<()> {
    let (_world, wires) = family.wired(2, &["--max-sessions", "32"])?;
    let mut seen = Vec::new();
    let mut refused = 0;
    for port in 40_000..40_100 {
        let inside = wires.inside(0, port);
        wires.guests[0].send(&packet::udp(inside, family.remote(0, 53)))?;
        // The one or the other, told apart by a packet that has a session.
        wires.guests[0].send(&packet::udp(wires.inside(0, 40_000), family.remote(0, 53)))?;
        let arrived = wires.world.receive()?.source();
        if arrived.port() == port {
            seen.push((port, arrived));
            wires.world.receive()?;
        } else {
            wires.guests[0].receive()?;
            refused += 1;
        }
    }
    ensure!(
        seen.len() >= 32 && refused > 0,
        "{} sessions and {refused} refusals",
        seen.len()
    );
    for (port, seen) in seen {
        wires.answer_udp(family.remote(0, 53), seen, 0, port)?;
    }
    Ok(())
}
both_families!(req_11_a_full_table_gives_no_session_up);

/// REQ-12: destinations are not logged by default.
fn req_12_destinations_are_not_logged(family: Family) -> Result<()> {
    let (world, wires) = family.wired(1, &[])?;
    wires.map_udp(0, 40_000, family.remote(0, 53))?;
    Connection::new(&wires, 0, 40_000, family.remote(1, 80)).open()?;
    wires.nothing_arrives()?;
    let said = world.said();
    ensure!(said.contains("tapnat ready"), "{said}");
    ensure!(
        (0..2).all(|number| !said.contains(&family.remote(number, 0).ip().to_string())),
        "{said}"
    );
    Ok(())
}
both_families!(req_12_destinations_are_not_logged);

/// REQ-13: every port is used, the last free one found.
fn req_13_every_port_is_used(family: Family) -> Result<()> {
    const PORTS: u16 = 2000;
    let (_world, wires) = family.wired(2, &["--ports", "50000-51999"])?;
    let mut seen = BTreeSet::new();
    for number in 0..PORTS {
        let (guest, port) = (usize::from(number % 2), 10_000 + number);
        let outside = wires
            .map_udp(guest, port, family.remote(0, 53))
            .with_context(|| format!("after {number} ports"))?;
        ensure!(seen.insert(outside), "{outside} was given twice");
    }
    let ports: BTreeSet<_> = seen.iter().map(SocketAddr::port).collect();
    ensure!(
        ports == (50_000..52_000).collect(),
        "other ports: {ports:?}"
    );
    check_refused(
        &wires,
        0,
        &packet::udp(wires.inside(0, 1234), family.remote(0, 53)),
    )
}
both_families!(req_13_every_port_is_used);
