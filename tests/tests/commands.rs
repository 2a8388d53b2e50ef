//! Every command in the documents for users is run: the blocks of shell in them,
//! by the name in their info string (```` ```sh run=NAME ````), in their order, on a
//! host of the testbed that has its own /run, /etc, /usr and pins. A block with
//! `in=guest` is the guest's, one with `as=user` of somebody without privileges.
//! What cannot be run here is named, with the reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    os::unix::fs::chown,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use pulldown_cmark::{CodeBlockKind, Event, Parser, Tag, TagEnd};
use tapnat_testbed::{
    Namespace,
    process::{Command, Process},
    topology::{Builder, Inside, Tap, TapMaker, Topology},
};
use tapnat_tests::instance::PATIENCE;
use tempfile::TempDir;

/// Where every block of shell is run.
const DOCUMENTS: [&str; 8] = [
    "../README",
    "tutorial",
    "recipes",
    "troubleshooting",
    "comparison",
    "operations",
    "configuration",
    "security",
];

/// Blocks that are not.
const NOT_RUN: [(&str, &str); 12] = [
    (
        "no-readme-qemu",
        "`..` stands for what the guest is; `qemu` is the same with a disk",
    ),
    (
        "no-readme-script",
        "`..` stands for what the guest is; `qemu-script` is the same with a disk",
    ),
    (
        "no-package",
        "tests/dist.rs installs the package on a machine of its own",
    ),
    (
        "no-build",
        "what is tested was built so, without `--release`",
    ),
    (
        "no-unit",
        "tests/dist.rs runs the unit with a systemd of its own",
    ),
    ("no-watch", "it does not end by itself; tests/flows.rs does"),
    (
        "tutorial-qemu",
        "a stand-in has the tap; `qemu` is the same command",
    ),
    (
        "no-cloud-hypervisor",
        "it is in none of the registries; tests/links.rs opens the tap as it does",
    ),
    (
        "no-wireguard",
        "not every kernel has it; a tun is the tunnel in `wireguard`",
    ),
    (
        "no-systemd",
        "tests/dist.rs runs the unit with a systemd of its own",
    ),
    (
        "no-unbound",
        "the unit is another package's; tests/dns64.rs runs the program with this file",
    ),
    ("no-tcpdump", "it does not end by itself"),
];

/// Users of the host that the documents name.
const USER: u32 = 65534;

/// Gives a host files of its own. `$1` is a directory for what is written, `$2` the
/// program, `$3` its configuration, `$4` a directory with unbound's programs.
const ISOLATE: &str = r#"
mount --make-rprivate /
mount -t bpf bpf /sys/fs/bpf
mkdir "$1/layers"
mount -t tmpfs layers "$1/layers"
for name in etc usr; do
    mkdir -p "$1/layers/$name/upper" "$1/layers/$name/work"
    mount -t overlay -o "lowerdir=/$name,upperdir=$1/layers/$name/upper,workdir=$1/layers/$name/work" \
        overlay /$name
done
mount -t tmpfs tmpfs /run
mknod -m 666 "$1/layers/tun" c 10 200
mount --bind "$1/layers/tun" /dev/net/tun
grep -q '^libvirt-qemu:' /etc/passwd || echo 'libvirt-qemu:x:64055:64055::/:/bin/false' >> /etc/passwd
touch /usr/bin/tapnat
mount --bind "$2" /usr/bin/tapnat
mkdir -p /usr/lib/tapnat /etc/tapnat
ln -sf /usr/bin/tapnat /usr/lib/tapnat/qemu-ifup
ln -sf /usr/bin/tapnat /usr/lib/tapnat/qemu-ifdown
cp "$3" /etc/tapnat/tapnat.toml
cp "$4/unbound-checkconf" /usr/sbin/
mkdir -p /etc/unbound/unbound.conf.d
grep -q '^unbound:' /etc/passwd || echo 'unbound:x:64056:64056::/:/bin/false' >> /etc/passwd
printf '#!/bin/sh\nexec "$@"\n' > /usr/bin/sudo
chmod 755 /usr/bin/sudo
echo isolated
exec sleep infinity
"#;

/// One block of shell in a document.
#[derive(Debug)]
struct Block {
    run: String,
    in_guest: bool,
    as_user: bool,
    text: String,
}

impl Block {
    fn read(info: &str) -> Option<Self> {
        let mut words = info.split_whitespace();
        (words.next()? == "sh").then_some(())?;
        let mut block = Self {
            run: String::new(),
            in_guest: false,
            as_user: false,
            text: String::new(),
        };
        for word in words {
            match word.split_once('=') {
                Some(("run", name)) => name.clone_into(&mut block.run),
                Some(("in", "guest")) => block.in_guest = true,
                Some(("as", "user")) => block.as_user = true,
                _ => return None,
            }
        }
        Some(block)
    }
}

fn blocks(document: &str) -> Result<Vec<Block>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../docs/{document}.md"));
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut blocks = Vec::new();
    let mut current = None;
    for event in Parser::new(&text) {
        match event {
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info)))
                if info.starts_with("sh") || info.contains("run=") =>
            {
                let block = Block::read(&info);
                current = Some(block.with_context(|| format!("{document}: what is `{info}`?"))?);
            }
            Event::Text(text) => {
                if let Some(block) = &mut current {
                    block.text.push_str(&text);
                }
            }
            Event::End(TagEnd::CodeBlock) => blocks.extend(current.take()),
            _ => {}
        }
    }
    Ok(blocks)
}

/// A host whose files are its own.
struct Host {
    topology: Topology,
    directory: TempDir,
    holder: Process,
}

impl Host {
    fn new(topology: Topology) -> Result<Self> {
        topology.host.ip("link set lo up")?;
        let directory = tempfile::tempdir()?;
        let program = env::var("TAPNAT_BIN").context("run with `cargo xtask test`")?;
        let unbound = env::var("TAPNAT_UNBOUND").context("run with `cargo xtask test`")?;
        let configuration = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/tapnat.toml");
        let home = directory.path().join("home");
        fs::create_dir(&home)?;
        let disk = home.join("guest.qcow2");
        fs::File::create(&disk)?.set_len(1 << 20)?;
        for path in [directory.path(), &home, &disk] {
            chown(path, Some(USER), Some(USER))?;
        }
        let mut holder = topology
            .host
            .command("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-ec", ISOLATE, "sh"])
            .arg(directory.path())
            .arg(program)
            .arg(configuration)
            .arg(unbound)
            .spawn()?;
        holder.wait_for_line(PATIENCE, |line| line == "isolated")?;
        Ok(Self {
            topology,
            directory,
            holder,
        })
    }

    /// A command among the host's own files.
    fn command(&self, program: &str) -> Result<Command> {
        let parent = self.holder.id();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
        let first = children.split_whitespace().next().context("it has ended")?;
        Ok(self
            .topology
            .host
            .command("nsenter")
            .args(["--target", first, "--mount", "--pid", program])
            .env("USER", "nobody")
            .timeout(PATIENCE))
    }

    fn run(&mut self, number: usize, block: &Block) -> Result<()> {
        if block.in_guest {
            let guest = self.topology.guests.first().context("no guest")?;
            if guest.is_unplugged() {
                self.topology.plug_in()?;
            }
            return run_in(&self.topology.guests[0].namespace, &block.text);
        }
        let said = self.directory.path().join(format!("{number}.said"));
        // With job control: what is started in the background goes on.
        let home = self.directory.path().join("home");
        let script = format!("cd {}\nset -emx\n{}", home.display(), block.text);
        let status = if block.as_user {
            let user = USER.to_string();
            self.command("setpriv")?
                .args([format!("--reuid={user}"), format!("--regid={user}")])
                .args(["--clear-groups", "--no-new-privs", "--bounding-set=-all"])
                .args(["bash", "-c", &script])
                .output()?
        } else {
            // What goes on must not hold the pipe.
            let script = format!("exec > {} 2>&1\n{script}", said.display());
            self.command("bash")?.args(["-c", &script]).output()?
        };
        let expected = block.text.matches("tapnat run").count();
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(&said).unwrap_or_default();
            ensure!(status.status.success(), "{text}{}", status.stderr);
            if text.matches("tapnat ready:").count() >= expected {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "tapnat is not ready: {text}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn run_in(guest: &Namespace, text: &str) -> Result<()> {
    guest.command("bash").args(["-ec", text]).run().map(drop)
}

/// What a reader of the blocks has already.
type Prepare = fn(&Topology) -> Result<()>;

/// Runs the blocks of a name.
fn run(name: &str, prepare: Option<Prepare>, builder: Builder) -> Result<()> {
    let topology = builder.build()?;
    if let Some(prepare) = prepare {
        prepare(&topology)?;
    }
    let mut host = Host::new(topology)?;
    let mut number = 0;
    for document in DOCUMENTS {
        for block in blocks(document)?.iter().filter(|block| block.run == name) {
            host.run(number, block)
                .with_context(|| format!("{document}: {}", block.text))?;
            number += 1;
        }
    }
    ensure!(number > 0, "no document has such a block");
    Ok(())
}

/// A guest whose tap tapnat makes.
fn a_guest() -> Builder {
    Topology::builder().inside(Inside::Tap(Tap {
        made_by: TapMaker::Program,
        ..Tap::default()
    }))
}

fn no_guest() -> Builder {
    Topology::builder().guests(0)
}

fn a_tunnel(topology: &Topology) -> Result<()> {
    topology.host.ip("tuntap add wg0 mode tun")?;
    topology.host.ip("address add 10.8.0.2/24 dev wg0")?;
    topology.host.ip("link set wg0 up").map(drop)
}

fn another_uplink(topology: &Topology) -> Result<()> {
    let Topology { host, world, .. } = topology;
    host.add_veth("uplink1", world, "downlink1")?;
    host.ip("address add 192.0.2.2/24 dev uplink1")?;
    world.ip("address add 192.0.2.1/24 dev downlink1").map(drop)
}

/// A test for each name, and the list of them.
macro_rules! runs {
    ($($test:ident $name:literal $prepare:expr, $builder:ident)*) => {
        const RUN: &[&str] = &[$($name),*];
        $(
            #[test]
            fn $test() -> Result<()> {
                run($name, $prepare, $builder())
            }
        )*
    };
}

runs! {
    tutorial "tutorial" None, a_guest
    qemu "qemu" None, no_guest
    qemu_calls_tapnat "qemu-script" None, no_guest
    qemu_without_root "qemu-owner" None, no_guest
    a_bridge "bridge" None, no_guest
    taps "taps" None, no_guest
    taps_with_one_address "taps-alone" None, no_guest
    libvirt "libvirt" None, no_guest
    firecracker "firecracker" None, a_guest
    cloud_hypervisor "cloud-hypervisor" None, a_guest
    docker "docker" None, no_guest
    forwards "forward" None, no_guest
    saved_forwards "forward-saved" None, no_guest
    wireguard "wireguard" Some(a_tunnel), no_guest
    several_uplinks "uplinks" Some(another_uplink), no_guest
    several_addresses "pool" None, no_guest
    dns64 "dns64" None, no_guest
    metrics "metrics" None, no_guest
    operations "operations" None, a_guest
    down "down" None, no_guest
    troubleshooting "troubleshooting" None, a_guest
    comparison_with_iptables "iptables" None, no_guest
}

#[test]
fn every_block_is_run_or_its_reason_is_known() -> Result<()> {
    let mut used: BTreeMap<String, &str> = BTreeMap::new();
    for document in DOCUMENTS {
        for block in blocks(document)? {
            ensure!(
                !block.run.is_empty(),
                "{document}: how is this run? {}",
                block.text
            );
            if let Some(other) = used.insert(block.run.clone(), document)
                && other != document
            {
                bail!("{document} and {other} both have blocks of {}", block.run);
            }
        }
    }
    let used: BTreeSet<_> = used.keys().map(String::as_str).collect();
    let known = RUN.iter().chain(NOT_RUN.iter().map(|(name, _)| name));
    let known: BTreeSet<_> = known.copied().collect();
    ensure!(used == known, "{:?}", used.symmetric_difference(&known));
    Ok(())
}
