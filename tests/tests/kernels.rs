//! Other kernels than this machine's, booted in QEMU. In each of them every
//! program is loaded in all its variants, and tests of other test programs make
//! hosts, as they do here: what is attached translates, and outlives its process.
//!
//! `cargo xtask test kernels` boots one kernel after the other, the oldest that is
//! supported and one that is too old among them. Without it, it is the one that
//! `cargo xtask setup` unpacked, and only what the tests load is loaded.

use std::{
    env,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::{
    Namespace,
    qemu::{Guest, Kernel, Machine, find_program},
};

/// Set when the program is to be loaded in all its variants, which takes minutes.
const ALL: &str = "TAPNAT_KERNELS";
/// Test programs, as in `PATH`.
const PROGRAMS: &str = "TAPNAT_TEST_PROGRAMS";
/// The oldest kernel that is supported.
const OLDEST: (u32, u32) = (6, 1);
/// Emulation is slow, and the machine may be busy.
const PATIENCE: Duration = Duration::from_mins(10);

/// What the test programs start.
const TOOLS: [&str; 4] = ["ethtool", "ping", "tc", "tcpdump"];

const MODULES: [&str; 5] = ["bridge", "cls_bpf", "sch_ingress", "tun", "veth"];

/// Test programs and their tests.
const TESTS: [(&str, &str); 11] = [
    ("links", "guests_on_taps_that_tapnat_makes"),
    ("links", "guests_on_taps"),
    ("links", "guests_on_a_bridge"),
    ("links", "clsact_in_place_of_tcx"),
    ("links", "no_ethernet_anywhere"),
    (
        "lifecycle",
        "no_packet_is_lost_while_processes_are_killed_and_replaced::v4",
    ),
    (
        "lifecycle",
        "no_packet_is_lost_while_processes_are_killed_and_replaced::v6",
    ),
    ("nat64", "connections_through_a_tap_with_offloads"),
    ("nat64", "errors_come_back_about_what_was_sent"),
    ("forwards", "the_host_itself_comes_in::v4"),
    ("trace", "packets_are_told_as_they_come_and_as_they_leave"),
];

/// A host in the guest, with an uplink that has Ethernet headers and one that has
/// none, and an inside device of each kind; and how a start is told from a failure.
const HOST: &str = r#"
set -e
mkdir -p /etc /run /var/tmp
mount -t cgroup2 none /sys/fs/cgroup
/bin/ip link add uplink0 type veth peer name world0
/bin/ip link set world0 up
/bin/ip link set uplink0 up
/bin/ip address add 198.51.100.2/24 dev uplink0
/bin/ip tuntap add uplink1 mode tun
/bin/ip link set uplink1 up
/bin/ip address add 192.0.2.2/24 dev uplink1
/bin/ip tuntap add tun0 mode tun
/bin/ip link add veth0 type veth peer name guest0
/bin/ip address add 2001:db8:1::2/64 dev uplink0 nodad
/bin/ip address add 2001:db8:2::2/64 dev uplink1
cat >/bin/try <<'END'
#!/bin/sh
rm -f /tmp/said
tapnat run --inside tap0=10.0.0.1/24 --inside tun0=10.0.1.1/24 "$@" >/tmp/said 2>&1 &
process=$!
while ! grep -qs '^tapnat ready' /tmp/said; do
    if ! kill -0 $process 2>/dev/null; then
        cat /tmp/said
        exit 1
    fi
    sleep 0.1
done
kill -TERM $process
wait $process
END
chmod +x /bin/try
"#;

/// Boots the kernel with the program under test and what tests it.
fn boot() -> Result<(Kernel, Guest)> {
    let kernel = Kernel::installed()?;
    let host = Namespace::new("machine")?;
    let program = env::var_os("TAPNAT_BIN").context("run it with `cargo xtask test kernels`")?;
    // The test hosts' settings of IPv6 are there only with IPv6.
    let mut machine = Machine::new(kernel.clone())
        .memory(1536)
        .processors(2)
        .ipv6()
        .program(program);
    for tool in TOOLS {
        machine = machine.program(find_program(tool)?);
    }
    for (name, path) in test_programs()? {
        machine = machine.file(&path, Path::new("/bin").join(name));
    }
    for module in MODULES {
        machine = machine.module(module);
    }
    let mut guest = machine.boot(&host)?;
    guest.run(HOST)?;
    Ok((kernel, guest))
}

/// The test programs, by the names that Cargo has added a number to.
fn test_programs() -> Result<Vec<(String, PathBuf)>> {
    let paths = env::var_os(PROGRAMS).context("run it with `cargo xtask test kernels`")?;
    env::split_paths(&paths)
        .map(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            let (name, _) = name
                .and_then(|name| name.rsplit_once('-'))
                .with_context(|| format!("{} is no test program", path.display()))?;
            Ok((name.to_owned(), path.clone()))
        })
        .collect()
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Result<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse().ok());
    next()
        .zip(next())
        .with_context(|| format!("{release} is no kernel's release"))
}

/// Starts and ends the program in each variant: with and without counters and
/// log, with and without Ethernet headers on the uplink, asking the firewall, and with
/// IPv6, prefixes of it, and IPv4 for guests that have only that.
fn check_variants(guest: &mut Guest) -> Result<()> {
    let of_ipv4 = [
        "--uplink uplink0",
        "--uplink uplink0 --count",
        "--uplink uplink0 --verbose",
        "--uplink uplink0 --count --verbose --firewall ask",
        "--uplink uplink0 --uplink-hook xdp",
        "--uplink uplink0 --uplink-hook xdp --count --verbose",
        "--uplink uplink1",
        "--uplink uplink1 --count",
        "--uplink uplink1 --verbose",
        "--uplink uplink1 --count --verbose --firewall ask",
    ];
    let of_ipv6 = [
        "--uplink uplink0",
        "--uplink uplink0 --count --verbose --firewall ask",
        "--uplink uplink0 --uplink-hook xdp",
        "--uplink uplink0 --prefix fd00:7a70::/64=2001:db8:7::/64",
        "--uplink uplink0 --nat64 64:ff9b::/96",
        "--uplink uplink1",
        "--uplink uplink1 --count --verbose --firewall ask",
    ];
    let of_ipv6 = of_ipv6.map(|options| format!("--inside veth0=fd00:7a70::1/64 {options}"));
    let of_ipv6 = of_ipv6.iter().map(String::as_str);
    for options in of_ipv4.into_iter().chain(of_ipv6) {
        guest.run_within(&format!("try {options}"), PATIENCE)?;
        println!("{options}");
    }
    Ok(())
}

fn check_tests(guest: &mut Guest) -> Result<()> {
    for (program, test) in TESTS {
        let start = Instant::now();
        let line =
            format!("TAPNAT_EMULATED=1 TAPNAT_BIN=/bin/tapnat {program} --exact {test} 2>&1");
        let said = guest.run_within(&line, PATIENCE)?;
        ensure!(said.contains("1 passed"), "there is no test {test}: {said}");
        println!("{test}: {:.0?}", start.elapsed());
    }
    Ok(())
}

/// A kernel that is too old is told to be, and nothing is left.
fn check_refusal(guest: &mut Guest) -> Result<()> {
    let refused = guest.output("try --uplink uplink0", PATIENCE)?;
    let last = refused.text.lines().last().unwrap_or_default();
    ensure!(
        refused.status != 0 && last.contains("Linux 6.1 or later"),
        "{refused:?}"
    );
    println!("{last}");
    let doctor = guest.output("tapnat doctor", PATIENCE)?;
    ensure!(
        doctor.text.contains("is too old") && doctor.text.contains("Linux 6.1 or later"),
        "{doctor:?}"
    );
    let left = guest.output(
        "ls /sys/fs/bpf/tapnat/* /run/tapnat/* /sys/class/net/tap0",
        PATIENCE,
    )?;
    ensure!(
        left.text.lines().all(|line| line.contains("No such file")),
        "{left:?}"
    );
    Ok(())
}

#[test]
fn another_kernel_translates_or_says_that_it_is_too_old() -> Result<()> {
    let (kernel, mut guest) = boot()?;
    println!("Linux {}", kernel.release());
    let version = version(kernel.release())?;
    if version < OLDEST {
        return check_refusal(&mut guest);
    }
    if env::var_os(ALL).is_some() {
        check_variants(&mut guest).context("a variant")?;
    }
    check_tests(&mut guest)
}

#[test]
fn versions_are_read_from_releases() -> Result<()> {
    for (release, expected) in [
        ("6.1.0-56-amd64", (6, 1)),
        ("7.3-amd64", (7, 3)),
        ("7.2.13+deb14-amd64", (7, 2)),
    ] {
        ensure!(version(release)? == expected, "{release}");
    }
    ensure!(version("amd64").is_err(), "no release");
    Ok(())
}
