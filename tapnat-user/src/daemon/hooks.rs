//! Where the programs are attached, and by which of the kernel's ways.

use anyhow::Result;

use crate::{
    changes::RealHost,
    config::{Config, Firewall},
    datapath::{Datapath, FILTER_HANDLE, FILTER_PRIORITY, Hook},
    host::{
        netlink::{Link, LinkLayer},
        xdp::{Drivers, Features},
    },
    journal::{Change, Direction, Journal, Role},
    notice::warn,
    preflight::Plan,
    uplink_hook::Chosen,
};

/// Where programs are attached.
pub(super) fn hooks(config: &Config, plan: &Plan, links: &[Link], chosen: Chosen) -> Vec<Hook> {
    let uplink = links.iter().find(|link| link.index == plan.uplink.index);
    let insides = plan.insides.iter();
    let insides = insides.filter_map(|inside| inside.link_in(links));
    let devices = uplink
        .map(|link| (link, Role::Uplink))
        .into_iter()
        .chain(insides.map(|link| (link, Role::Inside)));
    // What leaves before what arrives: what the firewall lets through finds its way.
    let directions: &[_] = match config.firewall {
        Firewall::Bypass => &[Direction::Arriving],
        Firewall::Ask => &[Direction::Leaving, Direction::Arriving],
    };
    let mut hooks = Vec::new();
    for (link, role) in devices {
        hooks.extend(directions.iter().map(|direction| Hook {
            device: link.device(),
            role,
            direction: *direction,
            ethernet: link.layer == LinkLayer::Ethernet,
            xdp: chosen.xdp && role == Role::Uplink && *direction == Direction::Arriving,
        }));
    }
    hooks
}

pub(super) fn choose_hook(
    config: &Config,
    uplink: &Link,
    drivers: Option<&Drivers>,
    links: &[Link],
) -> Result<Chosen> {
    let features = drivers.map(|drivers| drivers.features(uplink.index));
    Chosen::new(config.uplink_hook, uplink, features.transpose()?, links)
}

/// The inside devices that frames can be redirected to. A device that takes none would lose them.
pub(super) fn xdp_devices(chosen: Chosen, plan: &Plan, drivers: Option<&Drivers>) -> Vec<u32> {
    if !chosen.xdp {
        return Vec::new();
    }
    let links = plan
        .insides
        .iter()
        .filter_map(|inside| inside.link.as_ref());
    links
        .filter(|link| {
            link.layer == LinkLayer::Ethernet
                && match drivers {
                    Some(drivers) => drivers
                        .features(link.index)
                        .inspect_err(|error| warn(&format!("{error:#}")))
                        .is_ok_and(Features::takes_frames),
                    None => link.kind.as_deref() == Some("tun"),
                }
        })
        .map(|link| link.index)
        .collect()
}

pub(super) async fn attach(
    datapath: &Datapath,
    hook: &Hook,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<()> {
    if datapath.uses_tcx() {
        datapath.attach_tcx(hook)?;
    } else {
        attach_clsact(datapath, hook, host, journal).await?;
    }
    if hook.xdp {
        datapath.attach_xdp(hook)?;
    }
    Ok(())
}

pub(super) async fn attach_clsact(
    datapath: &Datapath,
    hook: &Hook,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<()> {
    let device = &hook.device;
    let qdisc = Change::AddClsact {
        device: device.clone(),
    };
    let is_there = host.netlink().has_clsact(device).await?;
    journal.make_unless(is_there, qdisc, host).await?;
    let filter = Change::AddFilter {
        device: device.clone(),
        direction: hook.direction,
        priority: FILTER_PRIORITY,
        handle: FILTER_HANDLE,
    };
    let maybe_there = journal.changes().any(|change| change.same_target(&filter));
    journal.record(filter)?;
    datapath.attach_clsact(hook, maybe_there)
}
