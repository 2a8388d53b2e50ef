//! What monitoring sees: guests and metrics, from the pinned tables alone.

use std::{
    collections::BTreeSet,
    env,
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tapnat_common::verdict::Reason;
use tapnat_testbed::{
    Namespace,
    process::Command,
    snapshot::Snapshot,
    topology::{Inside, Topology},
    traffic::{self, connect, tcp_listener},
};
use tapnat_tests::{
    instance::{Instance, PATIENCE},
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

    let tcp = ["address=\"198.51.100.2\"", "protocol=\"udp\""];
    ensure!(value(&text, "tapnat_ports_in_use", &tcp)? == 1, "{text}");
    ensure!(
        value(&text, "tapnat_ports_capacity", &tcp)? > 1000,
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

/// Scrapes until somebody listens.
fn scrape(host: &Namespace, address: SocketAddr) -> Result<String> {
    let start = Instant::now();
    loop {
        match get(host, address, "/metrics") {
            Ok(answer) => return Ok(answer),
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[test]
fn scrapers_are_answered() -> Result<()> {
    let world = world()?;
    let host = &world.topology.host;
    host.ip("link set lo up")?;
    let address: SocketAddr = "127.0.0.1:9477".parse()?;
    let command = world.instance.command("metrics")?;
    let mut exporter = command.args(["--listen", "127.0.0.1:9477"]).spawn()?;
    let answer = scrape(host, address)?;
    ensure!(
        answer.contains("200 OK") && answer.contains("text/plain; version=0.0.4"),
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

#[test]
fn a_running_instance_answers_scrapers_itself() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    topology.host.ip("link set lo up")?;
    let host = topology.host.clone();
    let file = tempfile::Builder::new().suffix(".toml").tempfile()?;
    let write = |metrics: &str| {
        let text = format!("inside = {:?}\n{metrics}", topology.inside());
        fs::write(file.path(), text)
    };
    write("metrics = \"127.0.0.1:9477\"\n")?;
    let instance = Instance::new(&host);
    let path = file.path().to_str().context("a path that is no text")?;
    let _process = instance.start(&["--config", path])?;
    let first: SocketAddr = "127.0.0.1:9477".parse()?;
    let answer = get(&host, first, "/metrics")?;
    ensure!(
        answer.contains("200 OK") && value(&answer, "tapnat_process_running", &[])? == 1,
        "{answer}"
    );

    // Who says nothing keeps nobody else from an answer.
    let silent: Vec<_> = (0..10)
        .map(|_| connect(&host, None, first, PATIENCE))
        .collect::<Result<_>>()?;
    ensure!(get(&host, first, "/metrics")?.contains("200 OK"));
    drop(silent);

    // Another program has the port that it is to go to.
    let second: SocketAddr = "127.0.0.1:9478".parse()?;
    let other = tcp_listener(&host, second)?;
    write("metrics = \"127.0.0.1:9478\"\n")?;
    let output = instance.command("reload")?.output()?;
    ensure!(
        !output.status.success() && output.stderr.contains("nothing was applied"),
        "{output:?}"
    );
    ensure!(get(&host, first, "/metrics")?.contains("200 OK"));
    drop(other);
    instance.ask("reload", &[])?;
    ensure!(get(&host, second, "/metrics")?.contains("200 OK"));
    ensure!(get(&host, first, "/metrics").is_err(), "it still listens");
    write("")?;
    instance.ask("reload", &[])?;
    ensure!(get(&host, second, "/metrics").is_err(), "it still listens");
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_told_with_who_has_it() -> Result<()> {
    let topology = Topology::builder().inside(Inside::Veth).build()?;
    topology.host.ip("link set lo up")?;
    let address: SocketAddr = "0.0.0.0:9477".parse()?;
    let _other = tcp_listener(&topology.host, address)?;
    let instance = Instance::new(&topology.host);
    let process = format!("(process {})", std::process::id());
    let before = Snapshot::take(&topology.host, &instance.pins())?;
    for (verb, arguments) in [
        ("metrics", &["--listen", "127.0.0.1:9477"][..]),
        (
            "run",
            &[
                "--inside",
                "veth0=10.0.0.1/24",
                "--metrics",
                "127.0.0.1:9477",
            ],
        ),
    ] {
        let output = instance.command(verb)?.args(arguments).output()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        ensure!(
            output.stderr.lines().count() == 1 && output.stderr.contains(&process),
            "{output:?}"
        );
    }
    let after = Snapshot::take(&topology.host, &instance.pins())?;
    ensure!(before == after, "it left {:?}", before.difference(&after));
    let output = instance
        .command("metrics")?
        .args(["--listen", "9477"])
        .output()?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    ensure!(output.stderr.contains("write 127.0.0.1:9477"), "{output:?}");
    Ok(())
}

/// Prometheus' own judge.
fn promtool() -> Result<Command> {
    let program = env::var_os("TAPNAT_PROMTOOL").context("run with `cargo xtask test`")?;
    Ok(Command::new(program).timeout(PATIENCE))
}

fn packaged(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging")
        .join(name);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// The metrics that a query is about.
fn metrics_in(query: &str) -> BTreeSet<&str> {
    query
        .split(|it: char| !it.is_ascii_alphanumeric() && it != '_')
        .filter(|word| word.starts_with("tapnat_") && *word != "tapnat_instance")
        .collect()
}

/// Every text of a JSON document that stands under this key.
fn texts<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| texts(item, key, found)),
        Value::Object(fields) => {
            for (name, field) in fields {
                match field {
                    Value::String(text) if name == key => found.push(text),
                    _ => texts(field, key, found),
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn promtool_finds_nothing_wrong_and_dashboard_and_alerts_name_what_there_is() -> Result<()> {
    let world = world()?;
    let ping = traffic::ping(&world.guest(0).namespace, server(0, 0).ip(), 1, &[])?;
    ensure!(ping.received == 1, "{}", ping.output);
    let text = world.instance.ask("metrics", &[])?;
    let judged = promtool()?
        .args(["check", "metrics"])
        .stdin(text.clone())
        .output()?;
    ensure!(
        judged.status.success() && judged.stdout.is_empty() && judged.stderr.is_empty(),
        "{judged:?}"
    );
    let names: BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();

    let operations = packaged("../docs/operations.md")?;
    let table = operations
        .split_once("| metric | |")
        .and_then(|(_, rest)| rest.split_once("\n\n"))
        .context("no table of metrics")?;
    let documented: BTreeSet<_> = table
        .0
        .split('`')
        .filter(|it| it.starts_with("tapnat_"))
        .collect();
    ensure!(
        documented == names,
        "{:?}",
        documented.symmetric_difference(&names)
    );

    let alerts = packaged("prometheus/tapnat.rules.yml")?;
    let dashboard: Value = serde_json::from_str(&packaged("grafana/tapnat.json")?)?;
    let mut queries = Vec::new();
    texts(&dashboard, "expr", &mut queries);
    ensure!(queries.len() > 10, "{queries:?}");
    let mut shown = BTreeSet::new();
    for query in &queries {
        ensure!(
            query.contains("tapnat_instance=~\"$tapnat_instance\""),
            "{query}"
        );
        shown.extend(metrics_in(query));
    }
    ensure!(shown.is_subset(&names), "{:?}", shown.difference(&names));
    let alerting: BTreeSet<_> = alerts
        .lines()
        .filter(|line| line.contains("expr:") || line.contains("increase("))
        .flat_map(metrics_in)
        .collect();
    ensure!(
        !alerting.is_empty() && alerting.is_subset(&names),
        "{:?}",
        alerting.difference(&names)
    );
    let known: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.label()).collect();
    for list in queries.iter().chain([&alerts.as_str()]) {
        for reasons in list.split("reason=~\"").skip(1) {
            let reasons = reasons.split('"').next().unwrap_or_default();
            for reason in reasons.split('|') {
                ensure!(
                    known.contains(reason),
                    "there is no reason {reason}: {list}"
                );
            }
        }
    }

    // As rules, which is how promtool reads queries; Grafana fills its own names in.
    let mut rules = "groups:\n- name: dashboard\n  rules:\n".to_owned();
    for (number, query) in queries.iter().enumerate() {
        let query = query
            .replace("$__rate_interval", "1m")
            .replace("$tapnat_instance", ".*");
        let line = serde_json::to_string(&query)?;
        writeln!(rules, "  - record: query{number}\n    expr: {line}")?;
    }
    for text in [alerts, rules] {
        let mut file = tempfile::Builder::new().suffix(".yml").tempfile()?;
        file.write_all(text.as_bytes())?;
        let judged = promtool()?
            .args(["check", "rules"])
            .arg(file.path())
            .output()?;
        ensure!(judged.status.success(), "{judged:?}");
    }
    Ok(())
}
