//! What something took from an instance that translates, or set back under it.

use anyhow::Result;
use ipnet::IpNet;

use super::{
    Finding, Level,
    networks::{InsideNetwork, inside_networks, versions},
};
use crate::{
    family::IpFamily,
    forwards::Share,
    host::{netlink::Link, sockets, sysctl::Sysctl},
    instance::InstanceName,
    journal::{Change, Claim, Journal, Role},
    ports::PortSet,
    statics,
    tables::{BothTables, PinnedTables},
};

/// What is wrong around an instance that translates.
pub(super) fn instance(
    name: &InstanceName,
    links: &[Link],
    tables: &BothTables,
    journal: &Journal,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let networks = inside_networks(links, Some(tables), None)?;
    for claim in journal.claims() {
        findings.extend(judge_device(name, claim, links, &networks));
    }
    let (ipv4, ipv6) = versions(&networks);
    if ipv4 {
        findings.extend(outside_addresses(links, &tables.ipv4, journal)?);
    }
    if let Some(tables) = tables.ipv6.as_ref().filter(|_| ipv6) {
        findings.extend(outside_addresses(links, tables, journal)?);
    }
    findings.extend(reservation(journal));
    findings.extend(forwards(tables)?);
    Ok(findings)
}

fn judge_device(
    name: &InstanceName,
    claim: &Claim,
    links: &[Link],
    networks: &[InsideNetwork],
) -> Vec<Finding> {
    let device = &claim.device.name;
    let Some(link) = links.iter().find(|it| it.index == claim.device.index) else {
        let level = match claim.role {
            Role::Inside => Level::Warning,
            Role::Uplink => Level::Problem,
        };
        let gone = Finding::new(
            level,
            "devices",
            format!("{device}, a device of the instance '{name}', is gone"),
            "what is attached to a device goes with it, also if another of the same name comes",
        );
        return vec![gone.way_out(format!(
            "start `tapnat run --instance {name}` again when it is back"
        ))];
    };
    let device = &link.name;
    if !link.up {
        let down = Finding::new(
            Level::Problem,
            "devices",
            format!("{device} is down"),
            "no packet passes it",
        );
        return vec![down.way_out(format!("ip link set {device} up"))];
    }
    if claim.role == Role::Uplink {
        return vec![Finding::ok("devices", format!("{device} is up"))];
    }
    let own = networks.iter().filter(|it| it.device == *device);
    own.map(|it| match it.network {
        IpNet::V4(_) => Sysctl::forwarding(device),
        IpNet::V6(_) => Sysctl::forwarding_ipv6(device),
    })
    .map(|sysctl| judge_forwarding(&sysctl))
    .collect()
}

/// Whether the host forwards what arrives on a device.
fn judge_forwarding(sysctl: &Sysctl) -> Finding {
    match sysctl.read() {
        Ok(value) if value == "0" => Finding::new(
            Level::Problem,
            "forwarding",
            format!("{sysctl} is 0"),
            "the kernel then finds no route for guests' packets; something set it back since \
             tapnat set it to 1 (network managers do so when they reload)",
        )
        .way_out(format!("sysctl -w {sysctl}=1")),
        Ok(_) => Finding::ok("forwarding", format!("{sysctl} is on")),
        Err(error) => Finding::new(
            Level::Warning,
            "forwarding",
            format!("{sysctl} cannot be read"),
            error.to_string(),
        ),
    }
}

/// Those of one IP version.
fn outside_addresses<A: IpFamily>(
    links: &[Link],
    tables: &PinnedTables<A>,
    journal: &Journal,
) -> Result<Vec<Finding>> {
    let topic = "outside-address";
    let pool = tables.outside_addresses()?;
    if pool.is_empty() {
        let none = Finding::new(
            Level::Problem,
            topic,
            format!("there is no outside address of {}", A::NAME),
            "new sessions are refused: the uplink has none, or lost it",
        );
        return Ok(vec![
            none.way_out(format!("give the uplink an {} address", A::NAME)),
        ]);
    }
    let claim = journal.claims().iter().find(|it| it.role == Role::Uplink);
    let uplink = claim.and_then(|it| links.iter().find(|link| link.index == it.device.index));
    let findings = pool
        .into_iter()
        .map(|address| {
            let has = |link: &Link| link.addresses.iter().any(|it| it.net.addr() == address);
            if uplink.is_some_and(has) {
                Finding::ok(topic, format!("the uplink has {address}"))
            } else {
                Finding::new(
                    Level::Warning,
                    topic,
                    format!("the uplink does not have the outside address {address}"),
                    "unless a router sends its packets here, no answer comes back",
                )
                .way_out(format!(
                    "put it there: `ip address add {} dev ..`",
                    IpNet::from(address)
                ))
            }
        })
        .collect();
    Ok(findings)
}

/// Whether the guests' ports are still kept from the host's own connections.
fn reservation(journal: &Journal) -> Option<Finding> {
    let topic = "ports";
    let ours = journal.changes().find_map(Change::reserved_ports)?;
    let sysctl = Sysctl::local_reserved_ports();
    let now: PortSet = sysctl.read().ok()?.parse().ok()?;
    let lost = ours.without(&now);
    Some(if lost.is_empty() {
        Finding::ok(topic, format!("the host leaves guests the ports {ours}"))
    } else {
        Finding::new(
            Level::Problem,
            topic,
            format!("{sysctl} no longer has {lost}"),
            "the host's own connections may take ports that guests have, and then both break; \
             something set it back since tapnat set it",
        )
        .way_out(format!("sysctl -w {sysctl}={}", now.union(ours)))
    })
}

/// Forwards that a program of the host hides.
fn forwards(tables: &BothTables) -> Result<Vec<Finding>> {
    let topic = "forwards";
    let listeners = sockets::listeners()?;
    let standing = statics::list(tables)?;
    let mut findings = Vec::new();
    for it in &standing {
        let Share::Ports {
            protocol, outside, ..
        } = it.forward.share
        else {
            continue;
        };
        let taken = outside.iter().find_map(|port| {
            let taker = listeners
                .iter()
                .find(|listener| listener.takes(protocol, it.outside_address, port))?;
            Some((port, taker))
        });
        if let Some((port, taker)) = taken {
            findings.push(
                Finding::new(
                    Level::Problem,
                    topic,
                    format!(
                        "{protocol} port {port} leads to {}, but {} listens there",
                        it.forward.inside_address,
                        taker.owner()
                    ),
                    "the host's own sockets go first",
                )
                .way_out("stop it, or forward another port"),
            );
        }
    }
    if findings.is_empty() && !standing.is_empty() {
        findings.push(Finding::ok(topic, "no program of the host hides a forward"));
    }
    Ok(findings)
}
