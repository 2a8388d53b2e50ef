//! The table of everything tapnat's development needs beyond Rust's stable toolchain and a C
//! linker: what for, how to tell that it is there, and how to get it. Refuses to install anything
//! itself.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Group;
use super::apt::Apt;
use super::unpacked::{PROMTOOL, UNBOUND};
use super::{bpf_linker, clean_root, guest_kernel};
use crate::command::{self, find_program};
use crate::ebpf_toolchain::{self, EbpfToolchain};

/// One thing that must be on the machine.
pub struct Requirement {
    pub name: &'static str,
    pub why: &'static str,
    pub group: Group,
    pub check: Check,
    pub install: Install,
}

impl Requirement {
    /// One that a Debian package meets, to be told by a program of that package.
    const fn package(
        group: Group,
        package: &'static [&'static str; 1],
        program: &'static str,
        why: &'static str,
    ) -> Self {
        let [name] = *package;
        let check = Check::Program(program);
        Self {
            name,
            why,
            group,
            check,
            install: Install::Packages(package),
        }
    }

    pub fn is_present(&self, machine: &Machine) -> bool {
        match self.check {
            Check::Program(name) => find_program(name).is_some(),
            Check::Machine(has) => has(machine),
        }
    }
}

/// How to tell that a requirement is met.
pub enum Check {
    /// A program of this name is there.
    Program(&'static str),
    /// This says so.
    Machine(fn(&Machine) -> bool),
}

/// How to meet a requirement.
pub enum Install {
    /// Debian packages, installed together with those of other requirements.
    Packages(&'static [&'static str]),
    /// What packages alone cannot do; runs after all packages are there, in the table's order.
    Action(fn(&mut Apt) -> Result<()>),
    /// Not for this program to do; says how to.
    ByHand(&'static str),
}

/// What is costly to find out about this machine, found out once.
pub struct Machine {
    ebpf_toolchain: Option<EbpfToolchain>,
    has_linker: bool,
}

impl Machine {
    pub fn inspect() -> Self {
        Self {
            ebpf_toolchain: EbpfToolchain::detect(),
            has_linker: ebpf_toolchain::has_linker(),
        }
    }
}

/// Where libvirt's part for QEMU lies, which has no program.
const QEMU_DRIVER: &str =
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so";

/// Where Debian's compiler for BPF lies.
const DEBIAN_SYSROOT: &str = "/usr";

pub const REQUIREMENTS: &[Requirement] = &[
    Requirement {
        name: "rustup",
        why: "keeps the compilers for this machine and for BPF apart",
        group: Group::Build,
        check: Check::Program("rustup"),
        install: Install::ByHand("install it with a stable toolchain as https://rustup.rs says"),
    },
    Requirement {
        name: "rustc-web",
        why: "Rust for BPF, as rustup's nightly with rust-src is not here",
        group: Group::Build,
        check: Check::Machine(|machine| machine.ebpf_toolchain.is_some() || has_debian_compiler()),
        install: Install::Packages(&["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"]),
    },
    Requirement {
        name: "toolchain bpf",
        why: "lets rustup find rustc-web under a name of its own",
        group: Group::Build,
        check: Check::Machine(|machine| machine.ebpf_toolchain.is_some()),
        install: Install::Action(|_| link_toolchain()),
    },
    Requirement {
        name: "llvm-22-dev",
        why: "the LLVM of rustc-web, to build bpf-linker with",
        group: Group::Build,
        check: Check::Machine(|machine| {
            machine.has_linker
                || machine.ebpf_toolchain == Some(EbpfToolchain::Nightly)
                || bpf_linker::llvm_prefix(22).is_some()
        }),
        install: Install::Packages(&["llvm-22-dev"]),
    },
    Requirement {
        name: "bpf-linker",
        why: "links the eBPF object (built from crates.io: a minute or two)",
        group: Group::Build,
        check: Check::Machine(|machine| machine.has_linker),
        install: Install::Action(bpf_linker::install),
    },
    Requirement {
        name: "rustfmt, clippy",
        why: "format and lint the host's crates",
        group: Group::Lint,
        check: Check::Machine(|_| has_lints_for_host()),
        install: Install::Action(|_| {
            let mut rustup = Command::new("rustup");
            command::output(rustup.args(["component", "add", "rustfmt", "clippy"])).map(drop)
        }),
    },
    Requirement {
        name: "rust-web-clippy",
        why: "lints the eBPF crate for the BPF target",
        group: Group::Lint,
        check: Check::Machine(|machine| {
            machine.ebpf_toolchain == Some(EbpfToolchain::Nightly)
                || has_programs(Path::new(DEBIAN_SYSROOT), &["cargo-clippy"])
        }),
        install: Install::Packages(&["rust-web-clippy"]),
    },
    Requirement {
        name: "nightly's clippy",
        why: "lints the eBPF crate for the BPF target",
        group: Group::Lint,
        check: Check::Machine(|machine| {
            machine.ebpf_toolchain != Some(EbpfToolchain::Nightly)
                || EbpfToolchain::Nightly
                    .sysroot()
                    .is_some_and(|root| has_programs(&root, &["cargo-clippy"]))
        }),
        install: Install::Action(|_| {
            let mut rustup = Command::new("rustup");
            rustup.args(["component", "add", "--toolchain", "nightly", "clippy"]);
            command::output(&mut rustup).map(drop)
        }),
    },
    Requirement::package(
        Group::Sandbox,
        &["iproute2"],
        "tc",
        "ip and tc: make network namespaces, show what tapnat did",
    ),
    Requirement::package(
        Group::Sandbox,
        &["iptables"],
        "iptables-save",
        "the rules that tapnat must leave alone",
    ),
    Requirement::package(
        Group::Sandbox,
        &["nftables"],
        "nft",
        "the rules that tapnat must leave alone",
    ),
    Requirement::package(
        Group::Test,
        &["tcpdump"],
        "tcpdump",
        "captures packets and verifies their checksums",
    ),
    Requirement::package(Group::Sandbox, &["iperf3"], "iperf3", "bulk TCP and UDP"),
    Requirement::package(Group::Sandbox, &["iputils-ping"], "ping", "ICMP echo"),
    Requirement::package(
        Group::Test,
        &["traceroute"],
        "traceroute",
        "TTL and Time Exceeded",
    ),
    Requirement::package(
        Group::Test,
        &["iputils-tracepath"],
        "tracepath",
        "finds the MTU of a path",
    ),
    Requirement::package(
        Group::Sandbox,
        &["curl"],
        "curl",
        "HTTP from guest to world",
    ),
    Requirement::package(
        Group::Test,
        &["ethtool"],
        "ethtool",
        "turns offloads on and off",
    ),
    Requirement::package(
        Group::Test,
        &["busybox-static"],
        "busybox",
        "HTTP and DHCP servers, and all of the QEMU guest",
    ),
    Requirement::package(
        Group::Test,
        &["isc-dhcp-client"],
        "dhclient",
        "guests that ask for IPv6 addresses (no device of this machine is asked for)",
    ),
    Requirement::package(
        Group::Test,
        &["stun-client"],
        "stun",
        "asks a STUN server how the NAT behaves",
    ),
    Requirement::package(
        Group::Test,
        &["stun-server"],
        "stund",
        "the server that it asks",
    ),
    Requirement::package(
        Group::Test,
        &["dnsmasq-base"],
        "dnsmasq",
        "the host's resolver (the program; no service is set up)",
    ),
    Requirement::package(
        Group::Test,
        &["bind9-dnsutils"],
        "dig",
        "asks for names as guests do",
    ),
    Requirement {
        name: "promtool",
        why: "judges the metrics (of Debian's package prometheus, unpacked under target/promtool)",
        group: Group::Test,
        check: Check::Machine(|_| PROMTOOL.is_present()),
        install: Install::Action(|apt| PROMTOOL.install(apt)),
    },
    Requirement {
        name: "unbound",
        why: "a resolver with DNS64 (of Debian's package, unpacked under target/unbound)",
        group: Group::Test,
        check: Check::Machine(|_| UNBOUND.is_present()),
        install: Install::Action(|apt| UNBOUND.install(apt)),
    },
    Requirement::package(
        Group::Test,
        &["strace"],
        "strace",
        "lets system calls fail, and kills at them",
    ),
    Requirement::package(Group::Test, &["groff-base"], "groff", "reads the man pages"),
    Requirement::package(
        Group::Test,
        &["zsh"],
        "zsh",
        "reads the completions that are made for it",
    ),
    Requirement::package(
        Group::Guest,
        &["qemu-system-x86"],
        "qemu-system-x86_64",
        "runs a real guest (in software)",
    ),
    Requirement::package(
        Group::Guest,
        &["xz-utils"],
        "xz",
        "unpacks the guest's kernel",
    ),
    Requirement::package(
        Group::Guest,
        &["kmod"],
        "depmod",
        "finds the order in which the guest's drivers load",
    ),
    Requirement::package(
        Group::Guest,
        &["libvirt-daemon"],
        "libvirtd",
        "starts guests as most hosts do (the program; no service is set up)",
    ),
    Requirement {
        name: "libvirt-daemon-driver-qemu",
        why: "its part that knows QEMU",
        group: Group::Guest,
        check: Check::Machine(|_| Path::new(QEMU_DRIVER).exists()),
        install: Install::Packages(&["libvirt-daemon-driver-qemu"]),
    },
    Requirement::package(Group::Guest, &["libvirt-clients"], "virsh", "asks it to"),
    Requirement::package(
        Group::Guest,
        &["libxml2-utils"],
        "xmllint",
        "checks what it is asked",
    ),
    Requirement {
        name: "guest kernel",
        why: "a Debian kernel for the guest to boot, unpacked under target/guest",
        group: Group::Guest,
        check: Check::Machine(|_| guest_kernel::is_present()),
        install: Install::Action(guest_kernel::install),
    },
    Requirement::package(
        Group::Bench,
        &["passt"],
        "passt",
        "a NAT in user space to compare with",
    ),
    Requirement::package(
        Group::Bench,
        &["slirp4netns"],
        "slirp4netns",
        "a NAT in user space to compare with",
    ),
    Requirement::package(
        Group::Dist,
        &["dpkg-dev"],
        "dpkg-shlibdeps",
        "finds what the program depends on",
    ),
    Requirement {
        name: "cargo-deb",
        why: "builds the package (built from crates.io: a minute or two)",
        group: Group::Dist,
        check: Check::Program("cargo-deb"),
        install: Install::Action(|_| install_cargo_deb()),
    },
    Requirement::package(
        Group::DistTest,
        &["debootstrap"],
        "debootstrap",
        "makes the clean root",
    ),
    Requirement {
        name: "clean root",
        why: "Debian and nothing else, unpacked under target/clean-root, to install the package in",
        group: Group::DistTest,
        check: Check::Machine(|_| clean_root::is_present()),
        install: Install::Action(clean_root::install),
    },
];

/// The release of cargo-deb that the package has been tried with.
const CARGO_DEB: &str = "3.8.0";

/// Whether the packages of Debian's compiler for BPF are there.
fn has_debian_compiler() -> bool {
    let sysroot = Path::new(DEBIAN_SYSROOT);
    has_programs(sysroot, &["rustc", "cargo"]) && EbpfToolchain::Linked.is_complete_in(sysroot)
}

fn install_cargo_deb() -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["install", "--locked", "cargo-deb", "--version", CARGO_DEB]);
    command::output(&mut cargo).map(drop)
}

fn link_toolchain() -> Result<()> {
    let mut rustup = Command::new("rustup");
    rustup.args([
        "toolchain",
        "link",
        EbpfToolchain::Linked.name(),
        DEBIAN_SYSROOT,
    ]);
    command::output(&mut rustup).map(drop)
}

/// Whether the toolchain in use has its optional tools; rustup puts their names on the search path
/// even when it has not.
fn has_lints_for_host() -> bool {
    let mut rustc = Command::new("rustc");
    command::output(rustc.args(["--print", "sysroot"]))
        .is_ok_and(|root| has_programs(Path::new(root.trim()), &["rustfmt", "cargo-clippy"]))
}

fn has_programs(sysroot: &Path, names: &[&str]) -> bool {
    names
        .iter()
        .all(|name| sysroot.join("bin").join(name).is_file())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_tell_requirements_apart() {
        let names: BTreeSet<_> = REQUIREMENTS
            .iter()
            .map(|requirement| requirement.name)
            .collect();
        assert_eq!(names.len(), REQUIREMENTS.len());
    }

    #[test]
    fn nightly_spares_the_packages_of_debians_compiler() {
        let nightly = Machine {
            ebpf_toolchain: Some(EbpfToolchain::Nightly),
            has_linker: false,
        };
        let missing: Vec<_> = REQUIREMENTS
            .iter()
            .filter(|requirement| requirement.group == Group::Build)
            .filter(|requirement| !requirement.is_present(&nightly))
            .map(|requirement| requirement.name)
            .collect();
        assert!(missing.contains(&"bpf-linker"));
        for name in ["rustc-web", "toolchain bpf", "llvm-22-dev"] {
            assert!(!missing.contains(&name), "{name} is asked for");
        }
    }
}
