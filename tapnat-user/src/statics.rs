//! Puts what the operator lets in ([`crate::forwards`]) into the tables as static mappings, takes it
//! out again, and keeps it right while the network changes. Only who holds the instance's lock may
//! call this: the daemon, or a command while there is none.

use std::{collections::HashSet, net::Ipv4Addr};

use anyhow::{Result, bail, ensure};
use tapnat_common::{
    abi::{Device, EndpointKey, Mapping, Settings, mapping_flags, role, setting_flags},
    net::Be32,
};

use crate::{
    daemon::now,
    forwards::{Forward, Ports, Share, Standing, Transport, standing},
    host::sockets::{self, Listener},
    sweep::{self, Remover},
    tables::PinnedTables,
    view::MappingView,
};

/// What the tables say of the network.
struct Ground {
    devices: Vec<(u32, Device)>,
    settings: Settings,
}

impl Ground {
    fn read(tables: &PinnedTables) -> Result<Self> {
        Ok(Self {
            devices: tables.devices()?,
            settings: tables.settings()?,
        })
    }

    fn pool(&self) -> &[Be32] {
        let count = self.settings.outside_count as usize;
        self.settings.outside.get(..count).unwrap_or_default()
    }

    fn first(&self) -> Option<Ipv4Addr> {
        self.pool().first().map(|address| (*address).into())
    }

    /// The inside device whose network has this address.
    fn device_of(&self, address: Ipv4Addr) -> Option<(u32, &Device)> {
        self.devices
            .iter()
            .find(|(_, device)| {
                device.role == role::INSIDE
                    && Be32::from(address).same_network(device.address, device.mask)
            })
            .map(|(index, device)| (*index, device))
    }

    /// The static mappings that a forward takes.
    fn entries(&self, forward: &Forward, configured: bool) -> Result<Vec<(EndpointKey, Mapping)>> {
        let name = forward.name();
        let inside = forward.inside_address;
        let Some((device, host)) = self.device_of(inside) else {
            let networks: Vec<_> = self
                .devices
                .iter()
                .filter(|(_, device)| device.role == role::INSIDE)
                .map(|(_, device)| network(device).to_string())
                .collect();
            bail!(
                "{name} cannot lead to {inside}: no inside network has that address, they are {}",
                networks.join(", ")
            );
        };
        ensure!(
            host.address != inside.into(),
            "{name} cannot lead to {inside}: that is the host's own address; name a guest's"
        );
        let ends = [network(host).network(), network(host).broadcast()];
        ensure!(
            network(host).prefix_len() > 30 || !ends.contains(&inside),
            "{name} cannot lead to {inside}: no guest can have that address of {}",
            network(host)
        );
        let Some(outside) = forward.outside_address.or(self.first()) else {
            bail!("{name} has no outside address: give the uplink one, or pass --outside-address");
        };
        if forward.share == Share::Everything {
            ensure!(
                !self.settings.is_outside(outside.into()),
                "{outside} cannot be {inside}'s alone: all guests are translated to it; take another \
                 address, or forward single ports"
            );
        }
        ensure!(
            self.device_of(outside).is_none(),
            "{outside} is no outside address: an inside network has it"
        );
        let mut flags = mapping_flags::STATIC;
        if configured {
            flags |= mapping_flags::CONFIGURED;
        }
        if forward.outside_address.is_none() {
            flags |= mapping_flags::MOVES;
        }
        let mapping = Mapping {
            device,
            allowed: forward.from.network().into(),
            allowed_length: forward.from.prefix_len(),
            flags,
            ..Mapping::default()
        };
        Ok(forward
            .endpoints(outside)
            .into_iter()
            .map(|(outside, inside)| (outside, Mapping { inside, ..mapping }))
            .collect())
    }
}

fn network(device: &Device) -> ipnet::Ipv4Net {
    let length = u8::try_from(device.mask.get().count_ones()).unwrap_or(32);
    ipnet::Ipv4Net::new(device.address.into(), length)
        .unwrap_or_default()
        .trunc()
}

/// What is to become of the tables.
#[derive(Debug, Default)]
pub struct Change {
    remove: Vec<EndpointKey>,
    insert: Vec<(EndpointKey, Mapping)>,
}

impl Change {
    /// Whether the tables are as they should be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.insert.is_empty()
    }
}

/// What the operator may say of a forward that is to go.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Selector {
    Ports {
        protocol: Transport,
        ports: Ports,
        /// None means whatever their address.
        outside_address: Option<Ipv4Addr>,
    },
    Address(Ipv4Addr),
}

impl Selector {
    fn selects(&self, outside: EndpointKey) -> bool {
        let address = Ipv4Addr::from(outside.address);
        match *self {
            Self::Address(wanted) => outside.is_whole() && wanted == address,
            Self::Ports {
                protocol,
                ports,
                outside_address,
            } => {
                outside.protocol == protocol.number()
                    && ports.contains(outside.port.get())
                    && outside_address.is_none_or(|wanted| wanted == address)
            }
        }
    }
}

/// The forwards of an instance.
///
/// # Errors
///
/// When the kernel refuses.
pub fn list(tables: &PinnedTables) -> Result<Vec<Standing>> {
    Ok(standing(&tables.static_mappings()?))
}

/// Adds one forward, all of it or nothing. `false` when it is there already.
///
/// # Errors
///
/// When it contradicts another one, a guest or a program of the host has the port, or it leads
/// nowhere.
pub fn add(tables: &mut PinnedTables, remover: &impl Remover, forward: &Forward) -> Result<bool> {
    let there = tables.static_mappings()?;
    let change = plan(tables, &there, &[*forward], false)?;
    apply(tables, remover, &change)?;
    Ok(!change.is_empty())
}

/// Takes forwards away. Connections that came in through them go on.
///
/// # Errors
///
/// When nothing is selected.
pub fn remove(
    tables: &mut PinnedTables,
    remover: &impl Remover,
    selector: &Selector,
) -> Result<()> {
    let there = tables.static_mappings()?;
    let remove: Vec<_> = there
        .iter()
        .map(|(outside, _)| *outside)
        .filter(|outside| selector.selects(*outside))
        .collect();
    if remove.is_empty() {
        let is_meant = |forward: &Forward| match selector {
            Selector::Ports { .. } => forward.share != Share::Everything,
            Selector::Address(_) => forward.share == Share::Everything,
        };
        let names: Vec<_> = standing(&there)
            .iter()
            .filter(|it| is_meant(&it.forward))
            .map(|it| it.forward.name())
            .collect();
        let what = match selector {
            Selector::Ports { .. } => "there is no such forward",
            Selector::Address(_) => "no guest has this address for itself",
        };
        if names.is_empty() {
            bail!("{what}: there is none at all");
        }
        bail!("{what}: there is {}", names.join(", "));
    }
    let change = Change {
        remove,
        insert: Vec::new(),
    };
    apply(tables, remover, &change)
}

/// What makes these the forwards that the configuration asks for, in place of those that it asked
/// for before. Those that commands made stay.
///
/// # Errors
///
/// As [`add`].
pub fn plan_configured(tables: &PinnedTables, wanted: &[Forward]) -> Result<Change> {
    let there = tables.static_mappings()?;
    plan(tables, &there, wanted, true)
}

fn plan(
    tables: &PinnedTables,
    there: &[(EndpointKey, Mapping)],
    wanted: &[Forward],
    configured: bool,
) -> Result<Change> {
    let ground = Ground::read(tables)?;
    let replaced = |mapping: &Mapping| configured && mapping.flags & mapping_flags::CONFIGURED != 0;
    let mut change = Change::default();
    let mut kept = HashSet::new();
    let mut listening: Option<Vec<Listener>> = None;
    for (position, forward) in wanted.iter().enumerate() {
        let first = ground.first();
        let earlier = wanted.iter().take(position);
        if let Some(other) = earlier
            .into_iter()
            .find(|it| it.contradicts(forward, first))
        {
            bail!(
                "{} cannot lead to {}: {} leads to {} already",
                forward.name(),
                forward.inside_address,
                other.name(),
                other.inside_address
            );
        }
        let entries = ground.entries(forward, configured)?;
        if let Some((outside, _)) = entries.first() {
            check_address(there, *outside, replaced)?;
        }
        for (outside, mut mapping) in entries {
            let current = tables.mapping(&outside)?;
            if let Some(old) = &current
                && old.flags & mapping_flags::STATIC != 0
            {
                if same(old, &mapping) {
                    kept.insert(outside);
                    // A command's stays a command's.
                    if replaced(old) && old.flags != mapping.flags {
                        mapping.sessions = old.sessions;
                        change.insert.push((outside, mapping));
                    }
                    continue;
                }
                ensure!(
                    replaced(old),
                    "{} leads to {} already: take that away first, or choose another {}",
                    describe(outside),
                    Ipv4Addr::from(old.inside.address),
                    if outside.is_whole() {
                        "address"
                    } else {
                        "port"
                    }
                );
                kept.insert(outside);
                change.insert.push((outside, mapping));
                continue;
            }
            if let Some(old) = &current {
                if old.inside == mapping.inside {
                    mapping.sessions = old.sessions;
                } else if let Some(view) = MappingView::new(&outside, old, now()) {
                    bail!(
                        "{} is in use: the guest {} sends from it for another {}s at least; choose \
                         another port, or wait",
                        describe(outside),
                        view.inside.address,
                        view.expires_in_seconds.unwrap_or_default()
                    );
                }
            }
            if let Share::Ports { protocol, .. } = forward.share {
                let listening = match &listening {
                    Some(listening) => listening,
                    None => listening.insert(sockets::listeners()?),
                };
                let (address, port) = (outside.address.into(), outside.port.get());
                if let Some(taker) = listening
                    .iter()
                    .find(|it| it.takes(protocol, address, port))
                {
                    bail!(
                        "{} is in use: {} listens there; stop it, or choose another port",
                        describe(outside),
                        taker.owner()
                    );
                }
            }
            change.insert.push((outside, mapping));
        }
    }
    if configured {
        change.remove = there
            .iter()
            .filter(|(outside, mapping)| replaced(mapping) && !kept.contains(outside))
            .map(|(outside, _)| *outside)
            .collect();
    }
    Ok(change)
}

/// Refuses a whole address of which ports are forwarded, and the other way round.
fn check_address(
    there: &[(EndpointKey, Mapping)],
    outside: EndpointKey,
    replaced: impl Fn(&Mapping) -> bool,
) -> Result<()> {
    let other = there.iter().find(|(other, mapping)| {
        other.address == outside.address
            && other.is_whole() != outside.is_whole()
            && !replaced(mapping)
    });
    match other {
        None => Ok(()),
        Some((other, mapping)) => bail!(
            "{} leads to {} already: an address is either one guest's alone, or has forwards of \
             single ports",
            describe(*other),
            Ipv4Addr::from(mapping.inside.address)
        ),
    }
}

/// Whether both mean the same to a packet.
fn same(one: &Mapping, other: &Mapping) -> bool {
    let meaning = |it: &Mapping| (it.inside, it.allowed, it.allowed_length);
    meaning(one) == meaning(other)
}

fn describe(outside: EndpointKey) -> String {
    let address = Ipv4Addr::from(outside.address);
    let protocol = crate::view::protocol_label(outside.protocol);
    if outside.is_whole() {
        address.to_string()
    } else {
        format!("{protocol} port {} of {address}", outside.port.get())
    }
}

/// Makes a change that was planned on these tables.
///
/// # Errors
///
/// When a table is full, or a guest took a port since: then nothing of it is left.
pub fn apply(tables: &mut PinnedTables, remover: &impl Remover, change: &Change) -> Result<()> {
    let mut made: Vec<(EndpointKey, Option<Mapping>)> = Vec::new();
    for (outside, mapping) in &change.insert {
        let before = tables.mapping(outside)?;
        let done = if before.is_some() {
            tables.replace_mapping(outside, mapping)
        } else {
            match tables.insert_mapping(outside, mapping) {
                Ok(true) => Ok(()),
                Ok(false) => Err(anyhow::anyhow!(
                    "{} was taken by a guest just now: try again, or choose another port",
                    describe(*outside)
                )),
                Err(error) => Err(error),
            }
        };
        if let Err(error) = done {
            for (outside, before) in made.iter().rev() {
                match before {
                    Some(before) => tables.replace_mapping(outside, before)?,
                    None => tables.remove_mapping(outside)?,
                }
            }
            return Err(error);
        }
        made.push((*outside, before));
    }
    // What guests held themselves.
    let given_up: Vec<_> = made
        .iter()
        .filter_map(|(_, before)| before.as_ref())
        .filter(|before| before.flags & mapping_flags::STATIC == 0)
        .map(|before| before.inside.address)
        .collect();
    sweep::take_ports_from_guests(&given_up, remover)?;
    for outside in &change.remove {
        tables.remove_mapping(outside)?;
    }
    note_addresses(tables)
}

/// Says to the datapath whether it has to look for static mappings beyond the pool.
fn note_addresses(tables: &mut PinnedTables) -> Result<()> {
    let mut settings = tables.settings()?;
    let beyond = tables
        .static_mappings()?
        .iter()
        .any(|(outside, _)| !settings.is_outside(outside.address));
    let flags = if beyond {
        settings.flags | setting_flags::STATIC_ADDRESSES
    } else {
        settings.flags & !setting_flags::STATIC_ADDRESSES
    };
    if flags == settings.flags {
        return Ok(());
    }
    settings.flags = flags;
    tables.set_settings(&settings)
}

/// Makes the static mappings right for the devices and addresses that there are now: an inside
/// device may have come back with another index, and the outside address may be another. Returns
/// what the operator should know, one line each.
///
/// # Errors
///
/// When the kernel refuses.
pub fn follow(tables: &mut PinnedTables) -> Result<Vec<String>> {
    let ground = Ground::read(tables)?;
    let mut notes = Vec::new();
    for (outside, mapping) in tables.static_mappings()? {
        let inside = Ipv4Addr::from(mapping.inside.address);
        let Some((device, _)) = ground.device_of(inside) else {
            // It may come back, as taps do.
            continue;
        };
        let mut right = outside;
        if mapping.flags & mapping_flags::MOVES != 0
            && let Some(first) = ground.first()
        {
            right.address = first.into();
        }
        let now = Mapping { device, ..mapping };
        if right == outside {
            if now != mapping {
                tables.replace_mapping(&outside, &now)?;
            }
        } else {
            tables.remove_mapping(&outside)?;
            let moved = Mapping { sessions: 0, ..now };
            if !tables.insert_mapping(&right, &moved)? {
                notes.push(format!(
                    "the forward of {} to {inside} is gone: {} is in use",
                    describe(outside),
                    describe(right)
                ));
            }
        }
    }
    note_addresses(tables)?;
    Ok(notes)
}
