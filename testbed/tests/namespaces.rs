//! Namespaces, and that nothing outlives its maker. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like the tests"
)]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use tapnat_testbed::{
    Namespace,
    process::{Command, Process},
};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_namespace_is_another_network_with_the_same_files() {
    let namespace = Namespace::new("box").unwrap();
    let links = namespace.ip("-brief link").unwrap();
    assert_eq!(links.lines().count(), 1, "{links}");
    assert!(
        links.starts_with("lo ") && links.contains("LOOPBACK,UP"),
        "{links}"
    );
    assert_eq!(
        namespace
            .read_sysctl("net.ipv6.conf.lo.disable_ipv6")
            .unwrap(),
        "1"
    );
    // `ip netns exec` would show another /sys here.
    let mounts = |command: Command| command.arg("/proc/self/ns/mnt").run().unwrap();
    assert_eq!(
        mounts(namespace.command("readlink")),
        mounts(Command::new("readlink"))
    );
}

#[test]
fn sockets_made_inside_stay_inside() {
    let namespace = Namespace::new("box").unwrap();
    let bind = || Ok(std::net::UdpSocket::bind("127.0.0.1:7")?);
    let _first = namespace.run(bind).unwrap();
    assert!(namespace.run(bind).is_err(), "the port is taken inside");
    let other = Namespace::new("other").unwrap();
    other.run(bind).unwrap();
}

#[test]
fn devices_join_namespaces_and_move() {
    let (one, two) = (
        Namespace::new("one").unwrap(),
        Namespace::new("two").unwrap(),
    );
    one.add_veth("left", &two, "right").unwrap();
    one.ip("address add 192.0.2.1/30 dev left").unwrap();
    two.ip("address add 192.0.2.2/30 dev right").unwrap();
    one.exec("ping -n -c 1 -W 2 192.0.2.2").unwrap();
    assert!(one.device_index("left").unwrap().is_some());
    let three = Namespace::new("three").unwrap();
    one.move_device("left", &three).unwrap();
    assert_eq!(one.device_index("left").unwrap(), None);
    assert!(three.device_index("left").unwrap().is_some());
}

#[test]
fn dropping_deletes() {
    let namespace = Namespace::new("box").unwrap();
    let (path, clone) = (namespace.path(), namespace.clone());
    drop(namespace);
    assert!(path.exists(), "a clone still holds it");
    drop(clone);
    assert!(!path.exists());
}

#[test]
fn a_panic_deletes() {
    let path = std::sync::Mutex::new(None);
    let result = std::panic::catch_unwind(|| {
        let namespace = Namespace::new("box").unwrap();
        *path.lock().unwrap() = Some(namespace.path());
        let _child = namespace.command("sleep").arg("60").spawn().unwrap();
        panic!("on purpose");
    });
    assert!(result.is_err());
    assert!(!path.into_inner().unwrap().unwrap().exists());
}

/// Not a test: the body of the processes that the tests below start and kill.
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn maker() {
    let namespace = Namespace::new("made").unwrap();
    let child = namespace.command("sleep").arg("60").spawn().unwrap();
    println!("\nmade {} {}", namespace.path().display(), child.id());
    std::thread::sleep(Duration::from_mins(1));
}

/// Starts a process that makes a namespace, and returns it with the path of
/// the namespace and the number of a process inside.
fn start_maker() -> (Process, String, String) {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "maker", "--nocapture"])
        .grace(PATIENCE)
        .spawn()
        .unwrap();
    let line = process
        .wait_for_line(PATIENCE, |line| line.starts_with("made "))
        .unwrap();
    let mut words = line.split(' ').skip(1).map(str::to_owned);
    let (path, inhabitant) = (words.next().unwrap(), words.next().unwrap());
    assert!(Path::new(&path).exists());
    (process, path, inhabitant)
}

fn is_running(process: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z "))
}

/// A killed process ends in its own time.
fn wait_for_end(process: &str) {
    let start = Instant::now();
    while is_running(process) {
        assert!(
            start.elapsed() < PATIENCE,
            "process {process} was left running"
        );
    }
}

#[test]
fn interruptions_delete() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (mut process, path, inhabitant) = start_maker();
        process.signal(signal).unwrap();
        let status = process.wait(PATIENCE).unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(signal as i32),
            "the process ends as if it had not caught the signal"
        );
        assert!(!Path::new(&path).exists(), "{signal} left {path}");
        wait_for_end(&inhabitant);
    }
}

#[test]
fn what_sigkill_leaves_is_swept_by_the_next_run() {
    let (mut process, path, inhabitant) = start_maker();
    // The group is the maker's alone: its children have groups of their own.
    process.signal(Signal::SIGKILL).unwrap();
    process.wait(PATIENCE).unwrap();
    assert!(Path::new(&path).exists() && is_running(&inhabitant));
    let (_next, ..) = start_maker();
    assert!(!Path::new(&path).exists());
    wait_for_end(&inhabitant);
}
