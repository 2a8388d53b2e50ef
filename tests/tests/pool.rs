//! Several outside addresses: each guest keeps one (RFC 4787 REQ-2), and the
//! host answers for all of them as long as they are needed.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    Namespace,
    snapshot::Snapshot,
    topology::{Guest, Inside, Topology, WORLD_ADDRESSES},
    traffic::{TcpReflector, TcpSession, UdpReflector, reflect_udp, udp_socket},
};
use tapnat_tests::instance::{Instance, PATIENCE};

/// Six addresses of the uplink's network, which nobody has.
const PREFIX: &str = "198.51.100.8/29";
const ALONE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);

struct Bed {
    // The instance goes before its host.
    instance: Instance,
    world: Topology,
}

impl Bed {
    /// Guests on one bridge, so that one inside device has them all.
    fn new(guests: u8) -> Result<Self> {
        let world = Topology::builder()
            .inside(Inside::Bridge)
            .guests(guests)
            .build()?;
        Ok(Self {
            instance: Instance::new(&world.host),
            world,
        })
    }

    fn start(&self, more: &[&str]) -> Result<tapnat_testbed::process::Process> {
        self.instance
            .start(&[&["--inside", "br0=10.0.0.1/24"], more].concat())
    }
}

fn addresses(host: &Namespace) -> Result<Vec<String>> {
    let said = host.ip("-4 -oneline address show dev uplink0")?;
    Ok(said
        .split_whitespace()
        .filter(|word| word.contains('/') && word.starts_with("198."))
        .map(str::to_owned)
        .collect())
}

/// The outside addresses that many sockets of a guest have.
fn seen(guest: &Guest, servers: &[SocketAddr], sockets: usize) -> Result<BTreeSet<IpAddr>> {
    let mut seen = BTreeSet::new();
    for _ in 0..sockets {
        let socket = udp_socket(&guest.namespace, (guest.address, 0).into())?;
        for server in servers {
            seen.insert(reflect_udp(&socket, *server, b"x")?.ip());
        }
    }
    Ok(seen)
}

#[test]
fn every_guest_keeps_one_address_of_the_pool() -> Result<()> {
    let bed = Bed::new(12)?;
    let before = Snapshot::take(&bed.world.host, &bed.instance.pins())?;
    let mut process = bed.start(&["--outside-address", PREFIX])?;
    ensure!(
        addresses(&bed.world.host)?.len() == 7,
        "{:?}",
        addresses(&bed.world.host)?
    );
    let world = &bed.world.world;
    let servers = WORLD_ADDRESSES.map(|address| UdpReflector::start(world, (address, 0).into()));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let endpoints: Vec<_> = servers.iter().map(UdpReflector::address).collect();
    let web = TcpReflector::start(world, (WORLD_ADDRESSES[0], 0).into())?;
    let mut pool = BTreeSet::new();
    for guest in &bed.world.guests {
        let mut own = seen(guest, &endpoints, 16)?;
        let session = TcpSession::open(&guest.namespace, None, web.address())?;
        own.insert(session.seen().ip());
        ensure!(own.len() == 1, "{} has {own:?}", guest.address);
        pool.extend(own);
    }
    // That all twelve share one of six is no pool.
    ensure!(pool.len() > 2, "only {pool:?} were used");
    for address in &pool {
        ensure!(
            *address > IpAddr::from([198, 51, 100, 8])
                && *address < IpAddr::from([198, 51, 100, 15]),
            "{address} is not of the pool"
        );
    }

    // Killed and taken over, each still has its own.
    let guest = bed.world.guests.first().context("no guest")?;
    let own = seen(guest, &endpoints, 1)?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    ensure!(seen(guest, &endpoints, 4)? == own, "without a process");
    let mut process = bed.start(&["--outside-address", PREFIX])?;
    ensure!(seen(guest, &endpoints, 4)? == own, "with another process");
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let after = Snapshot::take(&bed.world.host, &bed.instance.pins())?;
    ensure!(before == after, "it left {:?}", before.difference(&after));
    Ok(())
}

#[test]
fn an_address_that_the_host_has_stays_its_own() -> Result<()> {
    let bed = Bed::new(1)?;
    let host = &bed.world.host;
    host.ip("address add 198.51.100.9/24 dev uplink0")?;
    let before = Snapshot::take(host, &bed.instance.pins())?;
    let mut process = bed.start(&["--outside-address", "198.51.100.9,198.51.100.10"])?;
    ensure!(addresses(host)?.len() == 3, "{:?}", addresses(host)?);
    // The next one does with less.
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let mut process = bed.start(&["--outside-address", "198.51.100.9"])?;
    ensure!(addresses(host)?.len() == 2, "{:?}", addresses(host)?);
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let after = Snapshot::take(host, &bed.instance.pins())?;
    ensure!(before == after, "it left {:?}", before.difference(&after));
    Ok(())
}

#[test]
fn a_reload_changes_the_pool() -> Result<()> {
    let bed = Bed::new(1)?;
    let host = &bed.world.host;
    let file = std::env::temp_dir().join(format!("{}.toml", bed.instance.name()));
    let write = |addresses: &str| {
        fs::write(
            &file,
            format!("inside = \"br0=10.0.0.1/24\"\noutside-address = {addresses}\n"),
        )
    };
    write("\"198.51.100.9\"")?;
    let path = file.display().to_string();
    let process = bed.instance.start(&["--config", &path])?;
    let guest = bed.world.guests.first().context("no guest")?;
    let server = UdpReflector::start(&bed.world.world, (WORLD_ADDRESSES[0], 0).into())?;
    let one = |last| BTreeSet::from([IpAddr::from([198, 51, 100, last])]);
    ensure!(seen(guest, &[server.address()], 1)? == one(9), "not .9");
    write("[\"198.51.100.10/32\"]")?;
    bed.instance.ask("reload", &[])?;
    ensure!(seen(guest, &[server.address()], 1)? == one(10), "not .10");
    let there = addresses(host)?;
    ensure!(
        there.contains(&"198.51.100.10/32".to_owned()) && there.len() == 2,
        "{there:?}"
    );
    write("\"198.51.100.0/26\"")?;
    let refused = bed.instance.command("reload")?.output()?;
    ensure!(
        refused.stderr.contains("nothing was applied") && refused.stderr.contains("a /28 has 14"),
        "{refused:?}"
    );
    ensure!(addresses(host)? == there, "the refusal changed something");
    fs::remove_file(&file)?;
    drop(process);
    Ok(())
}

#[test]
fn the_host_answers_for_an_address_of_ones_own() -> Result<()> {
    let bed = Bed::new(1)?;
    let host = &bed.world.host;
    let guest = bed.world.guests.first().context("no guest")?;
    let before = Snapshot::take(host, &bed.instance.pins())?;
    let mut process = bed.start(&[])?;
    let own = ALONE.to_string();
    let inside = guest.address.to_string();
    let web = TcpReflector::start(&guest.namespace, SocketAddr::new(guest.address.into(), 80))?;
    let is_there = || -> Result<bool> { Ok(addresses(host)?.contains(&format!("{own}/32"))) };
    let comes_in = || -> Result<()> {
        TcpSession::open(&bed.world.world, None, (ALONE, 80).into())?.exchange(b"x")
    };
    bed.instance.ask("static", &["add", &own, &inside])?;
    ensure!(is_there()?, "the address is not on the uplink");
    comes_in()?;
    bed.instance.ask("static", &["remove", &own])?;
    ensure!(!is_there()?, "the address is still on the uplink");

    // The same without a process, and taken over by the next.
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    bed.instance.ask("static", &["add", &own, &inside])?;
    ensure!(is_there()?, "the address is not on the uplink");
    comes_in()?;
    let mut process = bed.start(&[])?;
    ensure!(is_there()?, "the address is not on the uplink any more");
    comes_in()?;
    drop(web);
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let after = Snapshot::take(host, &bed.instance.pins())?;
    ensure!(before == after, "it left {:?}", before.difference(&after));
    Ok(())
}
