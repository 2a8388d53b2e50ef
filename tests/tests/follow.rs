//! The running instance follows its network: addresses and MTUs that change
//! under it are used at once.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tapnat_testbed::topology::{HOST_ADDRESS, Inside, Topology};
use tapnat_tests::instance::{Instance, PATIENCE};

/// Waits until `status` says so.
fn until(instance: &Instance, holds: impl Fn(&Value) -> bool) -> Result<()> {
    let start = Instant::now();
    loop {
        let status = instance.ask_json("status")?;
        if holds(&status) {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{status}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn device<'a>(status: &'a Value, name: &str) -> &'a Value {
    let devices = status["devices"].as_array();
    devices
        .and_then(|devices| devices.iter().find(|device| device["name"] == name))
        .unwrap_or(&Value::Null)
}

#[test]
fn the_outside_address_is_that_which_the_uplink_has() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let process = instance.start(&["--inside", "veth0=10.0.0.1/24"])?;
    until(&instance, |status| {
        status["outside_addresses"] == json!([HOST_ADDRESS])
    })?;

    world.host.ip("address add 198.51.100.77/24 dev uplink0")?;
    world.host.ip("link set uplink0 mtu 1400")?;
    until(&instance, |status| device(status, "uplink0")["mtu"] == 1400)?;
    // One that is still there is not given up for another.
    until(&instance, |status| {
        status["outside_addresses"] == json!([HOST_ADDRESS])
    })?;

    world.host.ip("address flush dev uplink0")?;
    until(&instance, |status| status["outside_addresses"] == json!([]))?;
    ensure!(
        process.stderr().contains("uplink0 lost its IPv4 address"),
        "{}",
        process.stderr()
    );

    world.host.ip("address add 198.51.100.99/24 dev uplink0")?;
    until(&instance, |status| {
        status["outside_addresses"] == json!(["198.51.100.99"])
    })
}

#[test]
fn outside_addresses_that_were_given_stay() -> Result<()> {
    let world = Topology::builder().inside(Inside::Veth).build()?;
    let instance = Instance::new(&world.host);
    let given = [
        "--inside",
        "veth0=10.0.0.1/24",
        "--outside-address",
        "203.0.113.5,203.0.113.6",
    ];
    let _process = instance.start(&given)?;
    let as_given =
        |status: &Value| status["outside_addresses"] == json!(["203.0.113.5", "203.0.113.6"]);
    until(&instance, as_given)?;
    world.host.ip("address flush dev uplink0")?;
    world.host.ip("link set veth0 mtu 1300")?;
    until(&instance, |status| device(status, "veth0")["mtu"] == 1300)?;
    until(&instance, as_given)
}
