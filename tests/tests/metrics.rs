//! What monitoring sees: guests and metrics, from the pinned tables alone.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    topology::{Inside, Topology},
    traffic,
};
use tapnat_tests::{
    instance::PATIENCE,
    world::{World, server},
};

fn world() -> Result<World> {
    let topology = Topology::builder().inside(Inside::Veth).guests(2);
    World::start(topology, &["--count", "--guest-max-sessions", "2"])
}

/// The value of a metric with these labels among others.
fn value(text: &str, name: &str, labels: &[&str]) -> Result<u64> {
    let line = text.lines().find(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('{'))
            && labels.iter().all(|label| line.contains(label))
    });
    let line = line.with_context(|| format!("no {name} {labels:?} in {text}"))?;
    let value = line.rsplit(' ').next().context("no value")?;
    Ok(value.parse()?)
}

#[test]
fn metrics_tell_of_packets_tables_and_guests() -> Result<()> {
    let world = world()?;
    for guest in &world.topology.guests {
        let ping = traffic::ping(&guest.namespace, server(0, 0).ip(), 3, &[])?;
        ensure!(ping.received == 3, "{}", ping.output);
    }
    let socket = world.guest_socket(0, 0)?;
    for port in 1000..1005 {
        socket.send_to(b"more than it may have", server(1, port))?;
    }
    let text = world.instance.ask("metrics", &[])?;
    ensure!(text.ends_with("# EOF\n"), "{text}");
    let started = value(
        &text,
        "tapnat_packets_total",
        &["reason=\"session-started\""],
    )?;
    ensure!(started >= 3, "{text}");
    ensure!(value(&text, "tapnat_process_running", &[])? == 1, "{text}");
    ensure!(
        value(&text, "tapnat_table_entries", &["table=\"guests\""])? == 2,
        "{text}"
    );
    let first = ["guest=\"10.0.0.10\""];
    ensure!(
        value(&text, "tapnat_guest_sessions", &first)? == 2,
        "{text}"
    );
    ensure!(value(&text, "tapnat_guest_ports", &first)? == 2, "{text}");
    ensure!(
        value(&text, "tapnat_guest_refused_sessions_total", &first)? == 4,
        "{text}"
    );
    let second = ["guest=\"10.0.1.10\""];
    ensure!(
        value(&text, "tapnat_guest_refused_sessions_total", &second)? == 0,
        "{text}"
    );

    let guests = world.instance.ask_json("guests")?;
    let status = world.instance.ask_json("status")?;
    ensure!(
        guests.as_array().is_some_and(|guests| guests.len() == 2),
        "{guests}"
    );
    ensure!(
        guests[0]["address"] == "10.0.0.10" && guests[0]["refused"] == 4,
        "{guests}"
    );
    ensure!(
        guests[0]["device"] == "veth0"
            && guests[1]["device"] == "veth1"
            && guests[0]["max_sessions"] == 2
            && guests[0]["max_ports"] == 16_256
            && guests[0]["max_new_sessions"] == status["guest_new_sessions"],
        "{guests} {status}"
    );
    // A ping of three, and one datagram that went out and was not answered.
    ensure!(
        guests[0]["packets"]["inbound"] == 3 && guests[0]["packets"]["outbound"] == 4,
        "{guests}"
    );
    let mac = world.guest(0).namespace.mac_address("lan0")?;
    ensure!(guests[0]["link_address"] == mac.as_str(), "{guests}");
    let table = world.instance.ask("guests", &[])?;
    ensure!(
        table.lines().count() == 3 && table.contains("10.0.1.10  veth1") && table.contains(" 4/3 "),
        "{table}"
    );
    Ok(())
}

/// Asks a server on this host, and returns all of its answer.
fn get(host: &Namespace, address: SocketAddr, path: &str) -> Result<String> {
    host.run(|| {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

#[test]
fn scrapers_are_answered() -> Result<()> {
    let world = world()?;
    let host = &world.topology.host;
    host.ip("link set lo up")?;
    let address: SocketAddr = "127.0.0.1:9477".parse()?;
    let command = world.instance.command("metrics")?;
    let mut exporter = command.args(["--listen", "127.0.0.1:9477"]).spawn()?;
    let start = Instant::now();
    let answer = loop {
        match get(host, address, "/metrics") {
            Ok(answer) => break answer,
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    ensure!(
        answer.contains("200 OK") && answer.contains("openmetrics-text"),
        "{answer}"
    );
    ensure!(answer.contains("tapnat_table_capacity"), "{answer}");
    ensure!(
        get(host, address, "/other")?.contains("404"),
        "another path"
    );
    // It outlives the instance, and says so.
    world.instance.ask("down", &[])?;
    ensure!(
        get(host, address, "/metrics")?.contains("503"),
        "without an instance"
    );
    exporter.terminate(PATIENCE)?;
    Ok(())
}
