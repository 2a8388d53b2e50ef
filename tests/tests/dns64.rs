//! Guests with IPv6 only reach by name what has only an IPv4 address: names by unbound with DNS64
//! (RFC 6147), set up as docs/recipes.md says, packets by NAT64. The host's own resolver is dnsmasq.

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    process::Process,
    topology::{Inside, Topology},
    traffic::HttpServer,
};
use tapnat_tests::{
    family::{V4, V6},
    instance::PATIENCE,
    resolver::{self, STUB},
    world::World,
};
use tempfile::TempDir;

/// The recipe's prefix must not hold the addresses of these worlds (RFC 6052 section 3.1).
const PREFIXES: [&str; 2] = ["64:ff9b::/96", "64:ff9b:1::/96"];
/// 203.0.113.1, which is all that the host's resolver knows of the name.
const EMBEDDED: &str = "64:ff9b:1::cb00:7101";

/// The file that the recipe writes, with the prefix of these worlds.
fn recipe() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/recipes.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (_, rest) = text
        .split_once("unbound.conf.d/dns64.conf <<'END'\n")
        .context("no recipe")?;
    let (file, _) = rest.split_once("END\n").context("no end")?;
    let [theirs, ours] = PREFIXES;
    ensure!(file.contains(theirs), "{file}");
    Ok(file.replace(theirs, ours))
}

/// Starts unbound with what is written in this directory.
fn unbound(host: &Namespace, directory: &Path) -> Result<Process> {
    let programs = env::var_os("TAPNAT_UNBOUND").context("run with `cargo xtask test`")?;
    let ours = format!(
        "server:\n    username: \"\"\n    chroot: \"\"\n    pidfile: \"\"\n    use-syslog: no\n    \
         directory: \"{}\"\n    logfile: \"\"\n    verbosity: 1\n",
        directory.display()
    );
    let file = directory.join("unbound.conf");
    fs::write(&file, ours + &recipe()?)?;
    let mut process = host
        .command(PathBuf::from(programs).join("unbound"))
        .args(["-d", "-c"])
        .arg(&file)
        .spawn()?;
    process
        .wait_for_error_line(PATIENCE, |line| line.contains("start of service"))
        .with_context(|| process.stderr())?;
    Ok(process)
}

/// What a guest gets by a URL when it asks the host for names.
fn fetch(world: &World, directory: &TempDir, url: &str) -> Result<String> {
    const FETCH: &str = "mount --bind \"$1\" /etc/resolv.conf && exec curl -q --noproxy '*' \
                         --fail --silent --show-error --max-time 30 \"$2\"";
    let guest = world.guest(0);
    let file = directory.path().join("resolv.conf");
    resolver::write(&file, &[&V6.gateway_of(guest).to_string()])?;
    let command = guest.namespace.command("unshare");
    command
        .args(["--mount", "sh", "-ec", FETCH, "sh"])
        .arg(&file)
        .arg(url)
        .timeout(PATIENCE)
        .run()
}

#[test]
fn a_guest_with_ipv6_only_fetches_by_a_name_with_ipv4_only() -> Result<()> {
    let topology = Topology::builder()
        .ipv6_guests()
        .inside(Inside::Veth)
        .build()?;
    topology.host.ip("link set lo up")?;
    let http = HttpServer::start(&topology.world, V4.server(0, 80))?;
    let _known = resolver::start(&topology.host, STUB)?;
    let directory = tempfile::tempdir()?;
    // Before tapnat, which leaves the port to it then.
    let _resolver = unbound(&topology.host, directory.path())?;
    let world = World::start_in(topology, &["--nat64", PREFIXES[1], "--dns", "fd00:7a70::1"])?;

    let guest = world.guest(0);
    let ask = |kind: &str| {
        let command = guest.namespace.command("dig");
        command
            .arg(format!("@{}", V6.gateway_of(guest)))
            .args(["+tries=1", "+time=20", "+short", "server.example", kind])
            .timeout(PATIENCE)
            .run()
    };
    ensure!(ask("A")?.trim() == V4.server(0, 0).ip().to_string());
    let said = ask("AAAA")?;
    ensure!(said.trim() == EMBEDDED, "{said}");

    let url = format!("http://server.example:{}/", http.address().port());
    let seen = fetch(&world, &directory, &url)?;
    let seen: SocketAddr = seen.parse().with_context(|| seen.clone())?;
    ensure!(seen.ip() == V4.outside_address(), "seen as {seen}");
    Ok(())
}
