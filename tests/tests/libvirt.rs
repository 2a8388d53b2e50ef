//! Guests that libvirt starts, with the examples in `packaging/libvirt`: by a real
//! libvirtd on a host of the testbed, whose files lie in mounts of its own.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    process::{Command, Process},
    qemu::{Guest, Image, Kernel, Machine},
    topology::Topology,
};
use tapnat_tests::instance::{Instance, PATIENCE};
use tempfile::TempDir;

/// Starts libvirtd with empty directories and the hook, and as much as it needs of what its package
/// for whole machines makes. What it starts is found in the directory `$1` first.
const START: &str = r#"
for directory in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /run; do
    mkdir -p "$directory"
    mount -t tmpfs libvirt $directory
done
for file in passwd group; do
    cp /etc/$file "$1/$file"
    for name in libvirt-qemu kvm; do
        grep -q "^$name:" /etc/$file || echo "$name:x:64055:64055::/:/bin/false" >> "$1/$file"
    done
    mount --bind "$1/$file" /etc/$file
done
cat > /etc/libvirt/qemu.conf <<'END'
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
remember_owner = 0
stdio_handler = "file"
END
cat > /etc/libvirt/libvirtd.conf <<END
auth_unix_rw = "none"
unix_sock_dir = "$1"
END
mkdir /etc/libvirt/hooks
cp "$1/hook" /etc/libvirt/hooks/qemu
PATH="$1:$PATH" libvirtd
"#;

/// A host with libvirt, and an instance that may or may not run.
struct Libvirt {
    directory: TempDir,
    instance: Instance,
    topology: Topology,
}

impl Libvirt {
    fn new() -> Result<Self> {
        let topology = Topology::builder().guests(0).build()?;
        let libvirt = Self {
            directory: tempfile::tempdir()?,
            instance: Instance::new(&topology.host),
            topology,
        };
        fs::copy(example("hook-qemu"), libvirt.path("hook"))?;
        let log = libvirt.path("systemctl.log");
        libvirt.script("systemctl", &format!("echo \"$@\" >> {}", log.display()))?;
        let program = env::var("TAPNAT_BIN").context("run with `cargo xtask test`")?;
        for verb in ["qemu-ifup", "qemu-ifdown"] {
            let name = libvirt.instance.name();
            let line = format!("exec {program} {verb} --instance {name} \"$@\"");
            libvirt.script(verb, &line)?;
        }
        Ok(libvirt)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn script(&self, name: &str, line: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{line}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let socket = self.path("libvirt-sock");
        let uri = format!("qemu:///system?socket={}", socket.display());
        let virsh = Command::new("virsh").args(["--quiet", "--connect", &uri]);
        virsh.args(arguments).timeout(PATIENCE).run()
    }

    /// Boots a guest that has the card of an example.
    fn boot(&self, card: &str) -> Result<Guest> {
        let card = fs::read_to_string(example(card))?;
        let here = format!("'{}/", self.directory.path().display());
        let card = card.replace("'/usr/lib/tapnat/", &here);
        let machine = Machine::new(Kernel::installed()?);
        machine.boot_by(|image| {
            let path = self.path("guest.xml");
            fs::write(&path, domain(image, &card))?;
            let path = path.to_str().context("a path that is no text")?;
            Command::new("virt-xml-validate")
                .args([path, "domain"])
                .run()?;
            let daemon = self.start()?;
            self.virsh(&["create", path])
                .with_context(|| daemon.stderr())?;
            Ok(daemon)
        })
    }

    /// Starts libvirtd; what it starts ends with it.
    fn start(&self) -> Result<Process> {
        let host = &self.topology.host;
        let daemon = host
            .command("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-ec", START, "sh"])
            .arg(self.directory.path())
            .spawn()?;
        let start = Instant::now();
        while let Err(error) = self.virsh(&["list"]) {
            ensure!(start.elapsed() < PATIENCE, "{error:#}: {}", daemon.stderr());
            thread::sleep(Duration::from_millis(100));
        }
        Ok(daemon)
    }
}

/// An example of how to use tapnat with libvirt.
fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging/libvirt")
        .join(name)
}

/// A machine as the testbed's own QEMU has it.
fn domain(image: &Image, card: &str) -> String {
    format!(
        "<domain type='qemu'>
  <name>guest</name>
  <memory unit='MiB'>512</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{}</kernel>
    <initrd>{}</initrd>
    <cmdline>{}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    {card}
    <serial type='null'><target port='0'/></serial>
    <serial type='unix'><source mode='connect' path='{}'/><target port='1'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
",
        image.kernel.display(),
        image.initramfs.display(),
        image.command_line,
        image.shell.display(),
    )
}

fn check_reach(guest: &mut Guest) -> Result<()> {
    guest.configure("eth0", "10.0.0.10/24", "10.0.0.1")?;
    let said = guest.run("ping -c 3 -W 5 203.0.113.1")?;
    ensure!(said.contains("3 packets received"), "{said}");
    Ok(())
}

#[test]
fn libvirt_calls_tapnat_for_a_guest_and_at_its_end() -> Result<()> {
    let libvirt = Libvirt::new()?;
    let mut guest = libvirt.boot("interface-script.xml")?;
    check_reach(&mut guest)?;
    ensure!(libvirt.instance.pins().exists(), "who translated?");
    libvirt.virsh(&["destroy", "guest"])?;
    ensure!(!libvirt.instance.pins().exists(), "the instance goes on");
    Ok(())
}

#[test]
fn libvirt_takes_a_tap_that_tapnat_made() -> Result<()> {
    let libvirt = Libvirt::new()?;
    let options = ["--inside", "tap0=10.0.0.1/24", "--tap-queues", "single"];
    let _process = libvirt.instance.start(&options)?;
    let mut guest = libvirt.boot("interface-tap.xml")?;
    check_reach(&mut guest)?;
    let asked = fs::read_to_string(libvirt.path("systemctl.log"))?;
    ensure!(
        asked == "start tapnat@default\n",
        "the hook asked for {asked}"
    );
    libvirt.virsh(&["destroy", "guest"])?;
    libvirt.topology.host.ip("link show tap0")?;
    Ok(())
}
