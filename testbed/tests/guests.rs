//! Real QEMU guests, through plain forwarding. Needs root, QEMU and the guest
//! kernel.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like the tests"
)]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tapnat_testbed::{
    Namespace,
    cable::{self, Layer, TunTap},
    capture::{Capture, Direction, Partial},
    qemu::{Guest, Kernel, Machine, Model},
    topology::{Topology, WORLD_ADDRESSES},
    traffic::HttpServer,
};

fn world(number: usize, port: u16) -> SocketAddr {
    SocketAddr::new(WORLD_ADDRESSES[number].into(), port)
}

/// A world without guests of its own, and a QEMU guest on `tap0`.
fn boot(model: Model, queues: u32) -> (Topology, Guest) {
    let topology = Topology::builder().guests(0).build().unwrap();
    let host = &topology.host;
    let options = cable::Options {
        multi_queue: queues > 1,
        ..cable::Options::new(Layer::Ethernet)
    };
    TunTap::create_persistent(host, "tap0", options).unwrap();
    host.ip("address add 10.0.0.1/24 dev tap0").unwrap();
    topology.forward_plainly().unwrap();
    let machine =
        Machine::new(Kernel::installed().unwrap()).card_with_queues("tap0", model, queues);
    let mut guest = machine.boot(host).unwrap();
    guest.configure("eth0", "10.0.0.10/24", "10.0.0.1").unwrap();
    (topology, guest)
}

/// Ping, HTTP, UDP and a bulk transfer; returns the largest packet that the
/// guest sent.
fn check_traffic(topology: &Topology, guest: &mut Guest) -> usize {
    let capture = Capture::start(&topology.host, "tap0").unwrap();
    let said = guest.run("ping -c 3 -W 2 203.0.113.1").unwrap();
    assert!(said.contains("3 packets received"), "{said}");

    let http = HttpServer::start(&topology.world, world(0, 80)).unwrap();
    let seen = guest
        .run(&format!(
            "/bin/curl -sS --max-time 10 http://{}/",
            http.address()
        ))
        .unwrap();
    assert_eq!(
        seen.parse::<SocketAddr>().unwrap().ip().to_string(),
        "10.0.0.10"
    );

    let mut transfer = |address: &str, options: &str| {
        let mut server = topology
            .world
            .command("iperf3")
            .args(["--server", "--one-off", "--forceflush", "--bind", address])
            .spawn()
            .unwrap();
        let patience = Duration::from_secs(40);
        server
            .wait_for_line(patience, |line| line.contains("Server listening"))
            .unwrap();
        let report = guest.run_within(&format!("/bin/iperf3 -c {address} {options}"), patience);
        server.wait(patience).unwrap();
        report.unwrap()
    };
    let tcp = transfer("203.0.113.1", "-n 4M -C cubic");
    assert!(tcp.contains("receiver"), "{tcp}");
    let udp = transfer("203.0.113.2", "-u -b 1M -n 100K");
    assert!(
        udp.lines()
            .any(|line| line.contains("(0%)") && line.contains("receiver")),
        "{udp}"
    );

    let packets = capture.stop().unwrap();
    packets.verify_checksums(Partial::Accept).unwrap();
    let sent = packets
        .list
        .iter()
        .filter(|packet| packet.direction == Direction::In);
    sent.map(|packet| packet.data.len()).max().unwrap()
}

#[test]
fn a_guest_with_virtio_sends_unsegmented_packets() {
    let (topology, mut guest) = boot(Model::Virtio, 1);
    let largest = check_traffic(&topology, &mut guest);
    assert!(largest > 20_000, "the largest packet has {largest} bytes");
}

#[test]
fn a_guest_with_virtio_on_a_multi_queue_tap() {
    let (topology, mut guest) = boot(Model::Virtio, 2);
    check_traffic(&topology, &mut guest);
}

#[test]
fn a_guest_with_an_rtl8139() {
    let (topology, mut guest) = boot(Model::Rtl8139, 1);
    let largest = check_traffic(&topology, &mut guest);
    assert!(largest <= 1514, "the largest packet has {largest} bytes");
}

#[test]
fn a_guest_with_an_ne2000() {
    let (topology, mut guest) = boot(Model::Ne2k, 1);
    let largest = check_traffic(&topology, &mut guest);
    assert!(largest <= 1514, "the largest packet has {largest} bytes");
}

#[test]
fn the_shell_is_bounded_and_tells_how_commands_end() {
    let host = Namespace::new("host").unwrap();
    let kernel = Kernel::installed().unwrap();
    let release = kernel.release().to_owned();
    let mut guest = Machine::new(kernel).boot(&host).unwrap();
    assert_eq!(guest.run("uname -r").unwrap().trim(), release);
    let output = guest
        .output("echo out; echo error >&2; exit 7", Duration::from_secs(5))
        .unwrap();
    assert_eq!((output.status, output.text.as_str()), (7, "out\nerror\n"));
    let start = Instant::now();
    let error = guest
        .output("echo before; sleep 60", Duration::from_secs(1))
        .unwrap_err();
    assert!(error.to_string().contains("took longer"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(30));
    // A long answer, and the shell in order after what went before.
    let text = guest.run("seq 20000").unwrap();
    assert_eq!(text.lines().last(), Some("20000"));
    assert!(guest.run("false").is_err());
    assert!(guest.run("poweroff -f; sleep 5").is_err());
    guest.wait_for_end(Duration::from_secs(10)).unwrap();
    assert!(
        guest.console().contains("Power down"),
        "{}",
        guest.console()
    );
}

#[test]
fn what_keeps_a_guest_from_booting_is_told() {
    let host = Namespace::new("host").unwrap();
    let machine = Machine::new(Kernel::installed().unwrap());
    let options = cable::Options {
        multi_queue: true,
        ..cable::Options::new(Layer::Ethernet)
    };
    TunTap::create_persistent(&host, "tap0", options).unwrap();
    let error = machine
        .clone()
        .card("tap0", Model::Virtio)
        .boot(&host)
        .unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains("could not configure /dev/net/tun (tap0)"),
        "{error}"
    );
    let error = machine.memory(8).boot(&host).unwrap_err();
    assert!(format!("{error:#}").contains("did not boot"), "{error:#}");
}
