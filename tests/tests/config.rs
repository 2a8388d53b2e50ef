//! The configuration file: what it says is done, what is wrong in it is told
//! with its line, and a running instance takes a changed one in as a whole or
//! not at all, without losing a session.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    thread,
    time::{Duration, Instant as Clock},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use tapnat_testbed::{
    process::Process,
    topology::{Guest, Inside, Topology, WORLD_ADDRESSES},
    traffic::{TcpReflector, TcpSession, connect, tcp_listener},
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
    world::outside,
};

const SHORT: Duration = Duration::from_millis(700);

struct Bed {
    family: Family,
    // The instance goes before its host.
    instance: Instance,
    world: Topology,
    file: PathBuf,
}

impl Bed {
    fn new(family: Family) -> Result<Self> {
        let world = family.topology().inside(Inside::Veth).guests(2).build()?;
        let instance = Instance::new(&world.host);
        let file = std::env::temp_dir().join(format!("{}.toml", instance.name()));
        Ok(Self {
            family,
            instance,
            world,
            file,
        })
    }

    fn guest(&self, number: usize) -> Result<&Guest> {
        self.world.guests.get(number).context("no such guest")
    }

    /// Writes the file: both guests, and more.
    fn write(&self, more: &str) -> Result<()> {
        let insides: Vec<_> = self.world.guests.iter().map(Guest::inside).collect();
        fs::write(&self.file, format!("inside = {insides:?}\n{more}"))?;
        Ok(())
    }

    fn start(&self) -> Result<Process> {
        let file = self.file.display().to_string();
        self.instance.start(&["--config", &file])
    }

    /// What `check` says of a file that is wrong.
    fn wrong(&self, text: &str) -> Result<String> {
        fs::write(&self.file, text)?;
        let output = self.instance.command("check")?.arg(&self.file).output()?;
        ensure!(
            output.status.code() == Some(1) && output.stderr.lines().count() == 1,
            "{text}: {output:?}"
        );
        Ok(output.stderr)
    }

    /// What `reload` says that must fail.
    fn refused(&self) -> Result<String> {
        let output = self.instance.command("reload")?.output()?;
        ensure!(
            output.status.code() == Some(1) && output.stderr.lines().count() == 1,
            "{output:?}"
        );
        ensure!(output.stderr.contains("nothing was applied"), "{output:?}");
        Ok(output.stderr)
    }

    fn forwards(&self) -> Result<serde_json::Value> {
        let text = self.instance.ask("forward", &["list", "--json"])?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    fn web(&self, number: usize) -> Result<TcpReflector> {
        let guest = self.guest(number)?;
        let address = self.family.address_of(guest);
        TcpReflector::start(&guest.namespace, SocketAddr::new(address, 80))
    }

    fn is_closed(&self, port: u16) -> bool {
        connect(&self.world.world, None, self.family.outside(port), SHORT).is_err()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

const FORWARD: &str = "[[forward]]\nprotocol = \"tcp\"\nport = 8080\nto = \"10.0.0.10:80\"\n";

#[test]
fn what_the_file_says_is_done() -> Result<()> {
    let bed = Bed::new(V4)?;
    bed.write(&format!(
        "uplink = \"uplink0\"\nudp-timeout = \"2m\"\nmax-sessions = 1000\ncount = true\n\
         filtering = \"tcp=endpoint-independent\"\n{FORWARD}"
    ))?;
    let checked = bed.instance.command("check")?.arg(&bed.file).run()?;
    ensure!(checked.contains("2 inside devices, 1 forward"), "{checked}");
    let file = bed.file.display().to_string();
    let more = ["--config", &file, "--udp-timeout", "3m"];
    let mut process = bed.instance.start(&more)?;
    let status = bed.instance.ask_json("status")?;
    // What the command line says goes before the file.
    ensure!(status["timeouts"]["udp"] == 180.0, "{status}");
    ensure!(status["tables"]["sessions"]["capacity"] == 1000, "{status}");
    ensure!(
        status["filtering"]["tcp"] == "endpoint-independent",
        "{status}"
    );
    let _web = bed.web(0)?;
    TcpSession::open(&bed.world.world, None, outside(8080))?.exchange(b"x")?;
    ensure!(bed.forwards()?[0]["made_by"] == "config", "not the file's");

    // After a crash it is taken over as it is, and after an end it is there again.
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let mut process = bed.start()?;
    TcpSession::open(&bed.world.world, None, outside(8080))?.exchange(b"x")?;
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let _process = bed.start()?;
    TcpSession::open(&bed.world.world, None, outside(8080))?.exchange(b"x")?;
    Ok(())
}

#[test]
fn the_file_of_the_instance_is_read_without_being_named() -> Result<()> {
    let bed = Bed::new(V4)?;
    let said = bed.instance.command("run")?.output()?;
    let path = format!("/etc/tapnat/{}.toml", bed.instance.name());
    ensure!(
        said.status.code() == Some(2)
            && said.stderr.contains("--inside")
            && said.stderr.contains(&path),
        "{said:?}"
    );
    // In a mount namespace where /etc is empty but for that file.
    bed.write("")?;
    let script = format!(
        "mount -t tmpfs tmpfs /etc && mkdir /etc/tapnat && cp {} {path} && exec \"$TAPNAT_BIN\" \
         run --instance {}",
        bed.file.display(),
        bed.instance.name()
    );
    let mut process = bed
        .world
        .host
        .command("unshare")
        .args(["--mount", "sh", "-c", &script])
        .spawn()?;
    process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    Ok(())
}

#[test]
fn what_is_wrong_with_ipv6_is_told_with_its_line() -> Result<()> {
    let bed = Bed::new(V6)?;
    for (text, words) in [
        (
            "inside = \"tap0=10.0.0.1/24\"\noutside-address = \"2001:db8::5\"\n",
            ":2: outside-address names 2001:db8::5/128, and no guest has IPv6 here",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\ndeny = [\"10.9.0.0/16\", \"fd00::/8\"]\n",
            ":2: deny names fd00::/8, and no guest has IPv6 here",
        ),
        (
            "inside = \"tap0=fd00:7a70::1/64\"\nnat64 = \"64:ff9b::/96\"\n\
             deny = \"64:ff9b::a00:0/104\"\n",
            ":3: deny names 64:ff9b::a00:0/104 of the prefix that stands for IPv4, 64:ff9b::/96",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\n[[forward]]\nprotocol = \"tcp\"\nport = 80\n\
             to = \"[fd00:7a70::a]\"\n",
            ":2: tcp 80 cannot lead to fd00:7a70::a: no inside network",
        ),
        (
            "inside = \"tap0=fd00:7a70::1/64\"\n[[forward]]\nprotocol = \"tcp\"\nport = 80\n\
             to = \"[fd00:7a70::]\"\n",
            ":2: tcp 80 cannot lead to fd00:7a70::: no guest can have that address",
        ),
        (
            "inside = \"tap0=fd00:7a70::1/64\"\n[[forward]]\nprotocol = \"tcp\"\nport = 80\n\
             to = \"[fd00:7a70::a]\"\noutside-address = \"203.0.113.5\"\n",
            ":2: tcp 80 on 203.0.113.5 cannot lead to fd00:7a70::a: 203.0.113.5 is IPv4",
        ),
    ] {
        let said = bed.wrong(text)?;
        ensure!(said.contains(words), "no '{words}' in: {said}");
    }
    Ok(())
}

#[test]
fn what_is_wrong_is_told_with_its_line() -> Result<()> {
    let bed = Bed::new(V4)?;
    for (text, words) in [
        (
            "uplnk = \"eth0\"\n",
            ":1: unknown key 'uplnk': did you mean 'uplink'?",
        ),
        ("# tap\n\ninside = \"tap0=10.0.0.1\"\n", ":3: "),
        ("count = 1\n", ":1: count is a switch"),
        ("inside = [\n", ":1: "),
        (
            "inside = [\"tap0=10.0.0.1/24\", \"tap1=10.0.0.129/25\"]\n",
            ":1: the inside network 10.0.0.128/25 of tap1 overlaps that of tap0",
        ),
        (
            "inside = [\"tap0=fd00::1/64\", \"tap*=10.0.0.1/24,fd00::5:0:0:1/48\"]\n",
            ":1: the inside network fd00::/48 of tap* overlaps that of tap0",
        ),
        ("inside = [\"tap0=fd00::1\"]\n", "write fd00::1/64"),
        (
            "no-dhcp = true\ninside = [\"tap0=fd00::1/127\"]\n",
            ":2: in the inside network fd00::1/127 of tap0 no guest can configure itself: write \
             fd00::1/64",
        ),
        (
            "no-dhcp = true\nno-ra = true\ndomain = \"lan\"\ninside = [\"tap0=fd00::1/127\"]\n",
            ":3: with no-dhcp nobody tells guests the domain",
        ),
        (
            "uplink = \"eth0\"\ninside = [\"eth0=10.0.0.1/24\"]\n",
            ":2: eth0 is both",
        ),
        (
            "max-sessions = 10\nguest-max-sessions = 20\ninside = \"tap0=10.0.0.1/24\"\n",
            ":2: 20 sessions for one guest",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\n[[forward]]\nprotocol = \"tcp\"\nport = 80\n\
             to = \"10.0.1.10\"\n",
            ":2: tcp 80 cannot lead to 10.0.1.10: no inside network",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\n[[forward]]\nprotocol = \"tcp\"\nport = 80\n\
             to = \"10.0.0.10\"\n[[forward]]\nprotocol = \"tcp\"\nport = \"79-81\"\n\
             to = \"10.0.0.11\"\n",
            ":6: tcp 79-81 cannot lead to 10.0.0.11: tcp 80 leads to 10.0.0.10 already",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\noutside-address = [\"192.0.2.1\", \"192.0.2.2\"]\n\
             [[static]]\noutside = \"192.0.2.2\"\ninside = \"10.0.0.10\"\n",
            ":3: 192.0.2.2 cannot be 10.0.0.10's alone",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\ndns = [\"192.0.2.53\", \"forward\"]\n",
            ":2: guests ask either the host (forward) or these addresses",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\ndeny-host = true\ndns = \"forward\"\n",
            ":3: with deny-host guests do not reach the host",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\nno-dhcp = true\ndns = \"192.0.2.53\"\n",
            ":3: with no-dhcp nobody tells guests",
        ),
        ("dns = \"resolver\"\n", "or forward to have the host ask"),
        (
            "inside = \"tap0=10.0.0.1/24\"\nisolate = true\nroute-guests = true\n",
            ":3: guests cannot be isolated and reach each other",
        ),
        (
            "inside = \"tap0=10.0.0.1/24\"\nlog-destinations = true\n",
            ":2: destinations are written into the NAT log, and there is none",
        ),
    ] {
        let said = bed.wrong(text)?;
        ensure!(said.contains(words), "no '{words}' in: {said}");
        ensure!(
            said.contains(&bed.file.display().to_string()),
            "not which file: {said}"
        );
    }
    fs::remove_file(&bed.file)?;
    let output = bed.instance.command("check")?.arg(&bed.file).output()?;
    ensure!(output.stderr.contains("cannot read"), "{output:?}");
    // A start refuses the same.
    fs::write(&bed.file, "uplnk = \"eth0\"\n")?;
    let mut command = bed.instance.command("run")?;
    command = command.arg("--config").arg(&bed.file);
    let output = command.output()?;
    ensure!(
        output.status.code() == Some(1) && output.stderr.contains("did you mean 'uplink'?"),
        "{output:?}"
    );
    Ok(())
}

#[test]
fn a_changed_file_is_taken_in_and_no_session_is_lost() -> Result<()> {
    let bed = Bed::new(V4)?;
    bed.write(FORWARD)?;
    let mut process = bed.start()?;
    let (_web, other_web) = (bed.web(0)?, bed.web(1)?);
    bed.instance
        .ask("forward", &["add", "tcp", "7000", "10.0.0.10:80"])?;
    let world = &bed.world.world;
    let server = TcpReflector::start(world, (WORLD_ADDRESSES[0], 0).into())?;
    let guest = bed.guest(0)?;
    let mut out = TcpSession::open(&guest.namespace, None, server.address())?;
    let mut inward = TcpSession::open(world, None, outside(8080))?;

    bed.write(
        "udp-timeout = 120\nfiltering = \"endpoint-independent\"\nguest-max-sessions = 50\nguest-max-ports = 60\n\
         inbound-refresh = true\nports = \"20000-30000\"\n\
         [[forward]]\nprotocol = \"tcp\"\nport = 8080\nto = \"10.0.1.10:80\"\n\
         [[forward]]\nprotocol = \"tcp\"\nport = 8081\nto = \"10.0.0.10:80\"\n",
    )?;
    bed.instance.ask("reload", &[])?;
    let status = bed.instance.ask_json("status")?;
    ensure!(status["timeouts"]["udp"] == 120.0, "{status}");
    ensure!(
        status["filtering"]["udp"] == "endpoint-independent",
        "{status}"
    );
    ensure!(
        status["guest_max_sessions"] == 50
            && status["guest_max_ports"] == 60
            && status["inbound_refresh"] == true,
        "{status}"
    );
    out.exchange(b"goes on")?;
    inward.exchange(b"goes on")?;
    let mut moved = TcpSession::open(world, None, outside(8080))?;
    moved.exchange(b"at the other guest")?;
    ensure!(other_web.peers().len() == 1, "not at the other guest");
    for port in [8081, 7000] {
        TcpSession::open(world, None, outside(port))?.exchange(b"x")?;
    }
    let session = TcpSession::open(&guest.namespace, None, server.address())?;
    ensure!(
        (20000..=30000).contains(&session.seen().port()),
        "{}",
        session.seen()
    );

    // By a signal, too. What a command made stays.
    bed.write("")?;
    process.signal(Signal::SIGHUP)?;
    let start = Clock::now();
    while bed.forwards()?.as_array().map(Vec::len) != Some(1) {
        ensure!(start.elapsed() < PATIENCE, "{}", process.stderr());
        thread::sleep(Duration::from_millis(20));
    }
    ensure!(bed.is_closed(8081), "8081 is open");
    TcpSession::open(world, None, outside(7000))?.exchange(b"x")?;
    moved.exchange(b"goes on")?;
    out.exchange(b"goes on")?;
    ensure!(
        bed.instance.ask_json("status")?["timeouts"]["udp"] == 300.0,
        "not the default again"
    );
    ensure!(process.is_running(), "{}", process.stderr());
    Ok(())
}

/// Both may come at once, and then the file is read first.
#[test]
fn a_device_that_changes_while_the_file_is_read_is_followed() -> Result<()> {
    let bed = Bed::new(V4)?;
    bed.write("")?;
    let mut process = bed.start()?;
    let has_mtu = |status: &serde_json::Value| {
        let devices = status["devices"].as_array();
        devices.is_some_and(|devices| devices.iter().any(|device| device["mtu"] == 1400))
    };
    ensure!(!has_mtu(&bed.instance.ask_json("status")?), "already");
    process.signal(Signal::SIGSTOP)?;
    bed.world.host.ip("link set veth0 mtu 1400")?;
    bed.write("udp-timeout = \"6m\"\n")?;
    process.signal(Signal::SIGHUP)?;
    process.signal(Signal::SIGCONT)?;
    bed.instance
        .until(|status| status["timeouts"]["udp"] == 360.0)?;
    bed.instance.until(has_mtu)
}

#[test]
fn a_forward_outlives_a_file_that_is_refused() -> Result<()> {
    let bed = Bed::new(V4)?;
    let addresses = |first: &str, second: &str| {
        format!("outside-address = [\"203.0.113.5{first}\", \"203.0.113.5{second}\"]\n")
    };
    bed.write(&addresses("1", "2"))?;
    let _process = bed.start()?;
    // The first moves with the first of the addresses, where the second would be in its way.
    for more in [
        &["tcp", "7000", "10.0.0.10:80"][..],
        &[
            "tcp",
            "7000",
            "10.0.1.10:80",
            "--outside-address",
            "203.0.113.52",
        ],
    ] {
        bed.instance.ask("forward", &[&["add"], more].concat())?;
    }
    let before = bed.forwards()?;
    let _listener = tcp_listener(&bed.world.host, outside(9090))?;
    bed.write(&format!(
        "{}[[forward]]\nprotocol = \"tcp\"\nport = 9090\nto = \"10.0.0.10\"\n\
         outside-address = \"{}\"\n",
        addresses("2", "1"),
        outside(9090).ip(),
    ))?;
    let said = bed.refused()?;
    ensure!(said.contains("in use"), "{said}");
    let after = bed.forwards()?;
    ensure!(before == after, "{before} became {after}");
    Ok(())
}

#[test]
fn what_cannot_be_taken_in_leaves_everything_as_it_was() -> Result<()> {
    let bed = Bed::new(V4)?;
    bed.write(FORWARD)?;
    let process = bed.start()?;
    let _web = bed.web(0)?;
    let state = || -> Result<serde_json::Value> {
        let status = bed.instance.ask_json("status")?;
        let mut forwards = bed.forwards()?;
        for forward in forwards.as_array_mut().into_iter().flatten() {
            forward["sessions"].take();
        }
        Ok(json!([
            status["timeouts"],
            status["filtering"],
            status["outside_addresses"],
            forwards
        ]))
    };
    let before = state()?;
    let _listener = tcp_listener(&bed.world.host, outside(9090))?;
    for (text, words) in [
        (
            "udp-timeout = \"6m\"\ncuont = true\n",
            "did you mean 'count'?",
        ),
        (
            "udp-timeout = \"6m\"\ncount = true\n",
            "count can only change with a new start",
        ),
        (
            "udp-timeout = \"6m\"\nuplink = \"uplink0\"\nattach = \"clsact\"\n",
            "uplink, attach",
        ),
        (
            "udp-timeout = \"6m\"\n[[forward]]\nprotocol = \"tcp\"\nport = 81\nto = \"10.0.0.10\"\n\
             [[forward]]\nprotocol = \"tcp\"\nport = 9090\nto = \"10.0.0.10\"\n",
            "(process ",
        ),
        ("udp-timeout = \"6m\"\nports = \"32768-33000\"\n", "no port"),
    ] {
        bed.write(text)?;
        let said = bed.refused()?;
        ensure!(said.contains(words), "no '{words}' in: {said}");
        let after = state()?;
        ensure!(before == after, "{text}: {before} became {after}");
        TcpSession::open(&bed.world.world, None, outside(8080))?.exchange(b"x")?;
        ensure!(bed.is_closed(81), "81 is open");
    }
    drop(process);
    let said = bed.instance.command("reload")?.output()?;
    ensure!(
        said.status.code() == Some(1) && said.stderr.contains("no process"),
        "{said:?}"
    );
    Ok(())
}

fn forwards_are_saved_in_the_file_and_taken_out_of_it(family: Family) -> Result<()> {
    let (web, other_web, whole, another, nowhere, from) = match family {
        V4 => (
            "10.0.0.10:80",
            "10.0.1.10:80",
            "10.0.0.10",
            "10.0.1.10",
            "10.9.9.9",
            "203.0.113.0/24",
        ),
        V6 => (
            "[fd00:7a70::a]:80",
            "[fd00:7a70:0:1::a]:80",
            "[fd00:7a70::a]",
            "fd00:7a70:0:1::a",
            "[fd00:7a70:0:9::a]",
            "2001:db8:2::/64",
        ),
    };
    let bed = Bed::new(family)?;
    let comment = "# Mine, and it stays.\n";
    bed.write(&format!(
        "{comment}\n# The web.\n[[forward]]\nprotocol = \"tcp\"\nport = 8080\nto = \"{web}\"\n"
    ))?;
    let before = fs::read_to_string(&bed.file)?;
    let mut process = bed.start()?;
    let (_web, _other) = (bed.web(0)?, bed.web(1)?);
    let ask = |line: &str| {
        let (verb, rest) = line.split_once(' ').context("a verb alone")?;
        let words: Vec<_> = rest.split(' ').collect();
        bed.instance.ask(verb, &words)
    };
    let text = || fs::read_to_string(&bed.file);
    let world = &bed.world.world;

    let own = family.world_host(77);
    ask(&format!("forward add tcp 8081 {other_web} --save"))?;
    ask(&format!(
        "forward add udp 5000-5010 {whole} --from {from} --save"
    ))?;
    ask(&format!("static add {own} {another} --save"))?;
    let saved = text()?;
    ensure!(saved.starts_with(&before), "{saved}");
    TcpSession::open(world, None, family.outside(8081))?.exchange(b"x")?;
    ensure!(
        bed.forwards()?
            .as_array()
            .is_some_and(|list| list.len() == 3 && list.iter().all(|it| it["made_by"] == "config")),
        "{}",
        bed.forwards()?
    );

    // What cannot be leaves the file as it is.
    let listener = tcp_listener(&bed.world.host, family.outside(8082))?;
    for wrong in [
        format!("add tcp 8082 {whole}"),
        format!("add tcp 8081 {whole}"),
        format!("add tcp 8083 {nowhere}"),
        "remove udp 5000".to_owned(),
        "remove udp 1".to_owned(),
    ] {
        let command = bed.instance.command("forward")?;
        let output = command.args(wrong.split(' ')).arg("--save").output()?;
        ensure!(
            output.status.code() == Some(1) && output.stderr.lines().count() == 1,
            "{wrong}: {output:?}"
        );
        ensure!(text()? == saved, "{wrong}: {}", text()?);
    }
    drop(listener);

    // After a new start it is as it was.
    process.terminate(PATIENCE)?;
    let _process = bed.start()?;
    TcpSession::open(world, None, family.outside(8081))?.exchange(b"x")?;
    ask("forward remove tcp 8081 --save")?;
    ask("forward remove udp 5000-5010 --save")?;
    ask(&format!("static remove {own} --save"))?;
    ensure!(text()? == before, "{}", text()?);
    ensure!(bed.is_closed(8081), "it still leads there");
    Ok(())
}
both_families!(forwards_are_saved_in_the_file_and_taken_out_of_it);

#[test]
fn a_forward_is_saved_for_a_start_to_come() -> Result<()> {
    let bed = Bed::new(V4)?;
    bed.write("")?;
    let mut process = bed.start()?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let output = bed
        .instance
        .command("forward")?
        .args(["add", "tcp", "8081", "10.0.1.10:80", "--save"])
        .output()?;
    ensure!(
        output.status.success() && output.stderr.contains("reads it when it starts"),
        "{output:?}"
    );
    let _web = bed.web(1)?;
    let _process = bed.start()?;
    TcpSession::open(&bed.world.world, None, outside(8081))?.exchange(b"x")?;
    Ok(())
}

#[test]
fn without_a_file_there_is_nowhere_to_save() -> Result<()> {
    let bed = Bed::new(V4)?;
    let inside = bed.guest(0)?.inside();
    let _process = bed.instance.start(&["--inside", &inside])?;
    let output = bed
        .instance
        .command("forward")?
        .args(["add", "tcp", "8081", "10.0.0.10:80", "--save"])
        .output()?;
    ensure!(
        output.status.code() == Some(1)
            && output
                .stderr
                .contains("started without a configuration file"),
        "{output:?}"
    );
    ensure!(bed.forwards()? == json!([]), "{}", bed.forwards()?);
    Ok(())
}

#[test]
fn without_a_file_there_is_nothing_to_reload() -> Result<()> {
    let bed = Bed::new(V4)?;
    let mut process = bed.instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    let said = bed.refused()?;
    ensure!(said.contains("--config"), "{said}");
    // The signal then means what it means to other programs.
    process.signal(Signal::SIGHUP)?;
    ensure!(process.wait(PATIENCE)?.success(), "{}", process.stderr());
    Ok(())
}
