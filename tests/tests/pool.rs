//! Several outside addresses: each guest keeps one (RFC 4787 REQ-2), and the
//! host answers for all of them as long as they are needed.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    snapshot::Snapshot,
    topology::{Guest, Inside, Topology},
    traffic::{TcpReflector, TcpSession, UdpReflector, reflect_udp, udp_socket},
};
use tapnat_tests::{
    both_families,
    family::{Family, V4, V6},
    instance::{Instance, PATIENCE},
};

struct Bed {
    family: Family,
    // The instance goes before its host.
    instance: Instance,
    world: Topology,
}

impl Bed {
    /// Guests on one bridge, so that one inside device has them all.
    fn new(family: Family, guests: u8) -> Result<Self> {
        let builder = family.topology().inside(Inside::Bridge);
        let world = builder.guests(guests).build()?;
        Ok(Self {
            family,
            instance: Instance::new(&world.host),
            world,
        })
    }

    fn start(&self, more: &[&str]) -> Result<tapnat_testbed::process::Process> {
        let inside = self.world.inside();
        let inside = inside.first().context("no inside device")?;
        self.instance.start(&[&["--inside", inside], more].concat())
    }

    /// The addresses of the uplink, but for that of its link.
    fn addresses(&self) -> Result<Vec<String>> {
        let (option, beginning) = match self.family {
            V4 => ("-4", "198."),
            V6 => ("-6", "2001:"),
        };
        let host = &self.world.host;
        let said = host.ip(&format!("{option} -oneline address show dev uplink0"))?;
        let words = said.split_whitespace();
        Ok(words
            .filter(|word| word.contains('/') && word.starts_with(beginning))
            .map(str::to_owned)
            .collect())
    }

    /// The outside addresses that many sockets of a guest have.
    fn seen(
        &self,
        guest: &Guest,
        servers: &[SocketAddr],
        sockets: usize,
    ) -> Result<BTreeSet<IpAddr>> {
        let mut seen = BTreeSet::new();
        for _ in 0..sockets {
            let local = SocketAddr::new(self.family.address_of(guest), 0);
            let socket = udp_socket(&guest.namespace, local)?;
            for server in servers {
                seen.insert(reflect_udp(&socket, *server, b"x")?.ip());
            }
        }
        Ok(seen)
    }
}

/// An address as a prefix of one.
fn alone(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}/32"),
        IpAddr::V6(address) => format!("{address}/128"),
    }
}

fn every_guest_keeps_one_address_of_the_pool(family: Family) -> Result<()> {
    let bed = Bed::new(family, 12)?;
    // Six addresses of the uplink's network, or seven, which nobody has.
    let (length, count) = match family {
        V4 => (29, 6),
        V6 => (125, 7),
    };
    let prefix = format!("{}/{length}", family.uplink_host(8));
    let before = Snapshot::take(&bed.world.host, &bed.instance.pins())?;
    let mut process = bed.start(&["--outside-address", &prefix])?;
    let there = bed.addresses()?;
    ensure!(there.len() == 1 + count, "{there:?}");
    let world = &bed.world.world;
    let servers = [0, 1].map(|number| UdpReflector::start(world, family.server(number, 0)));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let endpoints: Vec<_> = servers.iter().map(UdpReflector::address).collect();
    let web = TcpReflector::start(world, family.server(0, 0))?;
    // The host's own connections begin from the address that it had.
    let session = TcpSession::open(&bed.world.host, None, web.address())?;
    let own = session.seen().ip();
    ensure!(own == family.outside_address(), "the host has {own}");
    let mut pool = BTreeSet::new();
    for guest in &bed.world.guests {
        let mut own = bed.seen(guest, &endpoints, 16)?;
        let session = TcpSession::open(&guest.namespace, None, web.address())?;
        own.insert(session.seen().ip());
        ensure!(own.len() == 1, "{} has {own:?}", guest.address);
        pool.extend(own);
    }
    // That all twelve share one is no pool.
    ensure!(pool.len() > 2, "only {pool:?} were used");
    for address in &pool {
        ensure!(
            *address > family.uplink_host(8) && *address <= family.uplink_host(15),
            "{address} is not of the pool"
        );
    }

    // Killed and taken over, each still has its own.
    let guest = bed.world.guests.first().context("no guest")?;
    let own = bed.seen(guest, &endpoints, 1)?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    ensure!(bed.seen(guest, &endpoints, 4)? == own, "without a process");
    let mut process = bed.start(&["--outside-address", &prefix])?;
    ensure!(
        bed.seen(guest, &endpoints, 4)? == own,
        "with another process"
    );
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let after = Snapshot::take(&bed.world.host, &bed.instance.pins())?;
    ensure!(before == after, "it left {:?}", before.difference(&after));
    Ok(())
}
both_families!(every_guest_keeps_one_address_of_the_pool);

fn an_address_that_the_host_has_stays_its_own(family: Family) -> Result<()> {
    let bed = Bed::new(family, 1)?;
    let host = &bed.world.host;
    let [hosts_own, other] = [9, 10].map(|it| family.uplink_host(it));
    let length = match family {
        V4 => "24",
        V6 => "64 nodad",
    };
    host.ip(&format!("address add {hosts_own}/{length} dev uplink0"))?;
    let [hosts_own, other] = [hosts_own, other].map(|it| it.to_string());
    let before = Snapshot::take(host, &bed.instance.pins())?;
    let both = [hosts_own.as_str(), &other].join(",");
    let mut process = bed.start(&["--outside-address", &both])?;
    ensure!(bed.addresses()?.len() == 3, "{:?}", bed.addresses()?);
    // The next one does with less.
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    let mut process = bed.start(&["--outside-address", &hosts_own])?;
    ensure!(bed.addresses()?.len() == 2, "{:?}", bed.addresses()?);
    ensure!(
        process.terminate(PATIENCE)?.success(),
        "{}",
        process.stderr()
    );
    let after = Snapshot::take(host, &bed.instance.pins())?;
    ensure!(before == after, "it left {:?}", before.difference(&after));
    Ok(())
}
both_families!(an_address_that_the_host_has_stays_its_own);

fn a_reload_changes_the_pool(family: Family) -> Result<()> {
    let bed = Bed::new(family, 1)?;
    let inside = bed.world.inside();
    let [old, new] = [9, 10].map(|it| family.uplink_host(it));
    let (too_many, most) = match family {
        V4 => ("198.51.100.0/26", "a /28 has 14"),
        V6 => ("2001:db8:1::/122", "a /124 has 15"),
    };
    let file = std::env::temp_dir().join(format!("{}.toml", bed.instance.name()));
    let write = |addresses: &str| {
        fs::write(
            &file,
            format!("inside = {inside:?}\noutside-address = [{addresses:?}]\n"),
        )
    };
    write(&old.to_string())?;
    let path = file.display().to_string();
    let process = bed.instance.start(&["--config", &path])?;
    let guest = bed.world.guests.first().context("no guest")?;
    let server = UdpReflector::start(&bed.world.world, family.server(0, 0))?;
    let seen = bed.seen(guest, &[server.address()], 1)?;
    ensure!(seen == [old].into(), "{seen:?}");
    write(&alone(new))?;
    bed.instance.ask("reload", &[])?;
    let seen = bed.seen(guest, &[server.address()], 1)?;
    ensure!(seen == [new].into(), "{seen:?}");
    let there = bed.addresses()?;
    ensure!(there.contains(&alone(new)) && there.len() == 2, "{there:?}");
    write(too_many)?;
    let refused = bed.instance.command("reload")?.output()?;
    ensure!(
        refused.stderr.contains("nothing was applied") && refused.stderr.contains(most),
        "{refused:?}"
    );
    ensure!(bed.addresses()? == there, "the refusal changed something");
    fs::remove_file(&file)?;
    drop(process);
    Ok(())
}
both_families!(a_reload_changes_the_pool);

fn the_host_answers_for_an_address_of_ones_own(family: Family) -> Result<()> {
    let bed = Bed::new(family, 1)?;
    let address = family.uplink_host(20);
    let host = &bed.world.host;
    let guest = bed.world.guests.first().context("no guest")?;
    let before = Snapshot::take(host, &bed.instance.pins())?;
    let mut process = bed.start(&[])?;
    let own = address.to_string();
    let inside = family.address_of(guest);
    let web = TcpReflector::start(&guest.namespace, SocketAddr::new(inside, 80))?;
    let inside = inside.to_string();
    let is_there = || -> Result<bool> { Ok(bed.addresses()?.contains(&alone(address))) };
    let comes_in = || -> Result<()> {
        TcpSession::open(&bed.world.world, None, (address, 80).into())?.exchange(b"x")
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
both_families!(the_host_answers_for_an_address_of_ones_own);

/// With the address of the router that it reaches the world by the host would reach nothing any more.
fn the_routers_address_is_none_to_have(family: Family) -> Result<()> {
    let bed = Bed::new(family, 1)?;
    let router = family.uplink_host(1).to_string();
    let host = &bed.world.host;
    let guest = bed.world.guests.first().context("no guest")?;
    let inside = family.address_of(guest).to_string();
    let network = bed.world.inside();
    let network = network.first().context("no inside device")?;
    let before = Snapshot::take(host, &bed.instance.pins())?;
    let refused = |verb: &str, arguments: &[&str]| -> Result<()> {
        let output = bed.instance.command(verb)?.args(arguments).output()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        let said = format!("{router} cannot be an outside address");
        ensure!(output.stderr.contains(&said), "{output:?}");
        Ok(())
    };
    refused("run", &["--inside", network, "--outside-address", &router])?;
    let after = Snapshot::take(host, &bed.instance.pins())?;
    ensure!(before == after, "it left {:?}", before.difference(&after));

    let file = std::env::temp_dir().join(format!("{}.toml", bed.instance.name()));
    let write = |more: &str| fs::write(&file, format!("inside = {network:?}\n{more}"));
    write("")?;
    let path = file.to_str().context("no text")?;
    let mut process = bed.instance.start(&["--config", path])?;
    let there = bed.addresses()?;
    write(&format!("outside-address = {router:?}\n"))?;
    refused("reload", &[])?;
    write(&format!(
        "[[static]]\noutside = {router:?}\ninside = {inside:?}\n"
    ))?;
    refused("reload", &[])?;
    fs::remove_file(&file)?;
    refused("static", &["add", &router, &inside])?;
    process.signal(Signal::SIGKILL)?;
    process.wait(PATIENCE)?;
    refused("static", &["add", &router, &inside])?;
    ensure!(
        bed.addresses()? == there,
        "the refusals changed {there:?} to {:?}",
        bed.addresses()?
    );
    let own = bed.instance.ask("static", &["list", "--json"])?;
    let own: serde_json::Value = serde_json::from_str(&own)?;
    ensure!(own == serde_json::json!([]), "{own}");
    Ok(())
}
both_families!(the_routers_address_is_none_to_have);
