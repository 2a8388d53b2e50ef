//! `tapnat doctor` finds what was broken on purpose, and the way out that it
//! names mends it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tapnat_testbed::{
    process::Process,
    snapshot::Snapshot,
    topology::{HOST_ADDRESS, Inside, Topology},
    traffic::tcp_listener,
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
};

const PROBLEM: i32 = 3;

struct Bed {
    // The instance goes before its host.
    instance: Instance,
    world: Topology,
}

impl Bed {
    fn new(family: Family) -> Result<Self> {
        let world = family.topology().inside(Inside::Veth).build()?;
        Ok(Self {
            instance: Instance::new(&world.host),
            world,
        })
    }

    fn start(&self) -> Result<Process> {
        let inside = self.world.guests[0].inside();
        self.instance.start(&["--inside", &inside])
    }

    /// What it finds; it must end with this code.
    fn findings(&self, code: i32) -> Result<Vec<Value>> {
        let output = self.instance.command("doctor")?.arg("--json").output()?;
        ensure!(output.status.code() == Some(code), "{output:?}");
        let report: Value = serde_json::from_str(&output.stdout)?;
        ensure!(report["schema"] == 1, "{report}");
        let findings = report["findings"].as_array().context("no findings")?;
        for finding in findings {
            let is_ok = finding["level"] == "ok";
            ensure!(
                finding["what"].is_string() && finding["why"].is_null() == is_ok,
                "{finding}"
            );
        }
        Ok(findings.clone())
    }

    /// The findings about a topic that are not as they should be, of this instance or of the host.
    fn wrong(&self, code: i32, topic: &str) -> Result<Vec<Value>> {
        let mut findings = self.findings(code)?;
        findings.retain(|finding| finding["topic"] == topic && finding["level"] != "ok");
        Ok(findings)
    }

    /// The one thing wrong about a topic, of this level and with these words.
    fn finds(&self, level: &str, topic: &str, words: &[&str]) -> Result<Value> {
        let code = if level == "problem" { PROBLEM } else { 0 };
        let wrong = self.wrong(code, topic)?;
        let found = wrong.iter().find(|finding| {
            let text = finding.to_string();
            finding["level"] == level && words.iter().all(|word| text.contains(word))
        });
        found
            .cloned()
            .with_context(|| format!("no {level} about {topic} with {words:?}: {wrong:?}"))
    }

    fn finds_nothing(&self, topic: &str) -> Result<()> {
        let wrong = self.wrong(0, topic)?;
        ensure!(wrong.is_empty(), "{wrong:?}");
        Ok(())
    }
}

fn a_sound_host_is_found_sound_and_left_as_it_is(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    for running in [false, true] {
        let process = running.then(|| bed.start()).transpose()?;
        let before = Snapshot::take(&bed.world.host, &bed.instance.pins())?;
        for topic in [
            "kernel",
            "uplink",
            "firewall",
            "networks",
            "mtu",
            "forwarding",
            "ports",
        ] {
            bed.finds_nothing(topic)?;
        }
        let text = bed.instance.ask("doctor", &[])?;
        ensure!(text.contains("0 problems"), "{text}");
        let after = Snapshot::take(&bed.world.host, &bed.instance.pins())?;
        ensure!(
            before == after,
            "it changed {:?}",
            before.difference(&after)
        );
        drop(process);
    }
    Ok(())
}
both_families!(a_sound_host_is_found_sound_and_left_as_it_is);

#[test]
fn rules_that_translate_guests_too_are_found() -> Result<()> {
    let bed = Bed::new(V4)?;
    let _process = bed.start()?;
    let host = &bed.world.host;
    host.exec("iptables-legacy -t nat -A POSTROUTING -s 10.0.0.0/8 -o uplink0 -j MASQUERADE")?;
    let finding = bed.finds("warning", "firewall", &["10.0.0.0/24", "MASQUERADE"])?;
    let way_out = finding["way_out"].as_str().context("no way out")?;
    let command = way_out.split_once("iptables").context("another way out")?.1;
    host.exec(&format!("iptables-legacy{command}"))?;
    bed.finds_nothing("firewall")?;

    host.exec("nft add table ip mine")?;
    host.command("nft")
        .arg("add chain ip mine post { type nat hook postrouting priority 100 ; }")
        .run()?;
    host.exec("nft add rule ip mine post ip saddr 172.17.0.0/16 masquerade")?;
    bed.finds_nothing("firewall")?;
    host.exec("nft add rule ip mine post oifname uplink0 masquerade")?;
    bed.finds("warning", "firewall", &["10.0.0.0/24", "masquerade"])?;
    host.exec("nft delete table ip mine")?;
    host.exec("iptables-nft -P FORWARD DROP")?;
    host.exec("iptables-nft -N DOCKER-USER")?;
    bed.finds("note", "firewall", &["drops forwarded packets"])?;
    bed.finds("note", "firewall", &["Docker"])?;
    host.exec("iptables-nft -N ufw-user-forward")?;
    bed.finds("note", "firewall", &["ufw"])?;
    Ok(())
}

fn a_firewall_that_keeps_guests_from_asking_is_found(family: Family) -> Result<()> {
    let (tool, other_tool, port) = match family {
        V4 => ("iptables", "ip6tables", "port 67"),
        V6 => ("ip6tables", "iptables", "port 547"),
    };
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let host = &bed.world.host;
    host.exec(&format!("{other_tool}-nft -P INPUT DROP"))?;
    bed.finds_nothing("firewall")?;
    host.exec(&format!("{tool}-nft -P INPUT DROP"))?;
    let finding = bed.finds("warning", "firewall", &[port, "port 53"])?;
    let way_out = finding["way_out"].as_str().context("no way out")?;
    let (_, command) = way_out.split_once(tool).context("another way out")?;
    let (command, _) = command.split_once(", and").context("one command")?;
    host.exec(&format!("{tool}-nft{command}"))?;
    bed.finds_nothing("firewall")
}
both_families!(a_firewall_that_keeps_guests_from_asking_is_found);

fn what_was_set_back_under_an_instance_is_found(family: Family) -> Result<()> {
    let bed = Bed::new(family)?;
    let _process = bed.start()?;
    let host = &bed.world.host;
    let mend = |finding: Value| -> Result<()> {
        let way_out = finding["way_out"].as_str().context("no way out")?;
        host.exec(way_out).map(drop)
    };
    let (forwarding, any): (_, IpAddr) = match family {
        V4 => (
            "net.ipv4.conf.veth0.forwarding",
            Ipv4Addr::UNSPECIFIED.into(),
        ),
        V6 => (
            "net.ipv6.conf.veth0.forwarding",
            Ipv6Addr::UNSPECIFIED.into(),
        ),
    };
    host.sysctl(forwarding, "0")?;
    mend(bed.finds("problem", "forwarding", &[forwarding])?)?;
    bed.finds_nothing("forwarding")?;

    host.sysctl("net.ipv4.ip_local_reserved_ports", "1000")?;
    mend(bed.finds("problem", "ports", &["36864-60999"])?)?;
    bed.finds_nothing("ports")?;
    let reserved = host.read_sysctl("net.ipv4.ip_local_reserved_ports")?;
    ensure!(reserved.trim() == "1000,36864-60999", "{reserved}");

    let inside = SocketAddr::new(family.inside_host(0, 10), 80).to_string();
    bed.instance
        .ask("forward", &["add", "tcp", "8080", &inside])?;
    bed.finds_nothing("forwards")?;
    let listener = tcp_listener(host, SocketAddr::new(any, 8080))?;
    let process = format!("(process {})", std::process::id());
    bed.finds("problem", "forwards", &["8080", &process])?;
    drop(listener);
    bed.finds_nothing("forwards")?;

    host.ip("link set veth0 down")?;
    mend(bed.finds("problem", "devices", &["veth0 is down"])?)?;
    bed.finds_nothing("devices")?;
    Ok(())
}
both_families!(what_was_set_back_under_an_instance_is_found);

#[test]
fn what_is_odd_about_the_network_is_found() -> Result<()> {
    let bed = Bed::new(V4)?;
    let host = &bed.world.host;
    let _process = bed.start()?;
    host.ip("link add br9 type bridge")?;
    host.ip("address add 10.0.0.129/25 dev br9")?;
    bed.finds("warning", "networks", &["10.0.0.0/24", "br9"])?;
    host.ip("link del br9")?;
    bed.finds_nothing("networks")?;
    host.ip("link set uplink0 mtu 1400")?;
    bed.finds("note", "mtu", &["veth0", "--clamp-mss 1360"])?;
    host.exec("ethtool -K uplink0 gro off")?;
    bed.finds(
        "note",
        "offloads",
        &["uplink0", "ethtool -K uplink0 gro on"],
    )?;
    host.ip("tuntap add tap7 mode tap")?;

    host.ip(&format!("address del {HOST_ADDRESS}/24 dev uplink0"))?;
    bed.finds("problem", "uplink", &["no IPv4 address"])?;
    host.ip("link set uplink0 down")?;
    bed.finds("problem", "uplink", &["ip link set uplink0 up"])?;
    Ok(())
}

#[test]
fn a_strict_reverse_path_is_found_beside_the_default_route() -> Result<()> {
    let bed = Bed::new(V4)?;
    let host = &bed.world.host;
    let _process = bed
        .instance
        .start(&["--inside", "veth0=10.0.0.1/24", "--uplink", "uplink0"])?;
    host.sysctl("net.ipv4.conf.uplink0.rp_filter", "1")?;
    bed.finds_nothing("rp-filter")?;
    host.ip("link add other0 type bridge")?;
    host.ip("link set other0 up")?;
    host.ip("route replace default dev other0")?;
    let finding = bed.finds("warning", "rp-filter", &["uplink0"])?;
    let way_out = finding["way_out"].as_str().context("no way out")?;
    host.exec(way_out)?;
    bed.finds_nothing("rp-filter")
}

#[test]
fn what_instances_left_is_found() -> Result<()> {
    let bed = Bed::new(V4)?;
    let name = bed.instance.name();
    let mut process = bed.start()?;
    let ours = |wrong: &[Value]| wrong.iter().any(|it| it.to_string().contains(name));
    ensure!(!ours(&bed.wrong(0, "instances")?), "it runs");
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    bed.finds(
        "warning",
        "instances",
        &[name, "without a process", "tapnat down"],
    )?;
    bed.instance.ask("down", &[])?;
    ensure!(!ours(&bed.wrong(0, "instances")?), "it is gone");
    Ok(())
}

#[test]
fn a_wrong_configuration_is_told_first() -> Result<()> {
    let bed = Bed::new(V4)?;
    let file = std::env::temp_dir().join(format!("{}.toml", bed.instance.name()));
    std::fs::write(&file, "inside = [\"veth0=10.0.0.1/24\"]\nuplnk = \"x\"\n")?;
    let command = bed.instance.command("doctor")?.arg("--config").arg(&file);
    let output = command.output()?;
    std::fs::remove_file(&file)?;
    ensure!(
        output.status.code() == Some(1) && output.stderr.contains(":2: unknown key"),
        "{output:?}"
    );
    Ok(())
}
