//! Snapshots see what is done to a host. Needs root.

use std::{fs, path::Path, time::Duration};

use tapnat_testbed::{
    snapshot::Snapshot,
    topology::{Inside, Topology, WORLD_ADDRESSES},
    traffic::ping,
};

#[test]
fn each_change_shows_and_its_undoing_too() {
    let topology = Topology::builder().inside(Inside::Bridge).build().unwrap();
    topology.forward_plainly().unwrap();
    let host = &topology.host;
    let pins = std::env::temp_dir().join(host.name());
    let changes = [
        (
            "ip address add 192.0.2.9/32 dev lo",
            "ip address del 192.0.2.9/32 dev lo",
        ),
        (
            "ip route add 192.0.2.0/24 dev br0",
            "ip route del 192.0.2.0/24 dev br0",
        ),
        (
            "ip rule add priority 5 lookup main",
            "ip rule del priority 5",
        ),
        (
            "ip neighbour add 198.51.100.9 lladdr 02:00:00:00:00:09 nud permanent dev uplink0",
            "ip neighbour del 198.51.100.9 dev uplink0",
        ),
        (
            "tc qdisc add dev uplink0 clsact",
            "tc qdisc del dev uplink0 clsact",
        ),
        (
            "iptables-nft -P FORWARD DROP",
            "iptables-nft -P FORWARD ACCEPT",
        ),
        (
            "iptables-legacy -A INPUT -j DROP",
            "iptables-legacy -D INPUT -j DROP",
        ),
        ("nft add table inet mine", "nft delete table inet mine"),
        (
            "sysctl -w net.ipv4.ip_forward=0",
            "sysctl -w net.ipv4.ip_forward=1",
        ),
        (
            "ip link set uplink0 mtu 1400",
            "ip link set uplink0 mtu 1500",
        ),
    ];
    // The first use of either iptables makes its tables and chains.
    host.exec("iptables-nft -P FORWARD ACCEPT").unwrap();
    host.exec("iptables-legacy -L").unwrap();
    let before = Snapshot::take(host, &pins).unwrap();
    for (change, undo) in changes {
        host.exec(change).unwrap();
        let difference = before.difference(&Snapshot::take(host, &pins).unwrap());
        assert!(difference.is_some(), "`{change}` goes unseen");
        host.exec(undo).unwrap();
        let after = Snapshot::take(host, &pins).unwrap();
        assert_eq!(before.difference(&after), None, "after `{undo}`");
    }
    fs::create_dir_all(pins.join("instance")).unwrap();
    let difference = before.difference(&Snapshot::take(host, &pins).unwrap());
    fs::remove_dir_all(&pins).unwrap();
    assert_eq!(
        difference.unwrap(),
        "pins:\n@@ -0,0 +1,2 @@\n+/\n+instance/\n\n"
    );
}

#[test]
fn traffic_and_time_do_not_show() {
    let topology = Topology::builder().inside(Inside::Bridge).build().unwrap();
    topology.forward_plainly().unwrap();
    let host = &topology.host;
    host.exec("iptables-nft -t nat -A POSTROUTING -o uplink0 -j MASQUERADE")
        .unwrap();
    host.exec("iptables-legacy -A INPUT -j ACCEPT").unwrap();
    let pins = Path::new("/nonexistent");
    let before = Snapshot::take(host, pins).unwrap();
    let guest = &topology.guests[0].namespace;
    assert_eq!(
        ping(guest, WORLD_ADDRESSES[0].into(), 2, &[])
            .unwrap()
            .received,
        2
    );
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(
        before.difference(&Snapshot::take(host, pins).unwrap()),
        None
    );
}
