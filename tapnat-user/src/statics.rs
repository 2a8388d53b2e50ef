//! Puts what the operator lets in ([`crate::forwards`]) into the tables as static mappings, takes it
//! out again, and keeps it right while the network changes. Only who holds the instance's lock may
//! call this: the daemon, or a command while there is none.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    slice,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use ipnet::IpNet;
use tapnat_common::{
    abi::{Device, EndpointKey, Mapping, mapping_flags, role, setting_flags},
    net::{Be32, Be128},
};

use crate::{
    clock::now,
    family::IpFamily,
    forwards::{Forward, Ports, Share, Standing, Transport, standing},
    host::sockets::{self, Listener},
    sweep::{self, Remover},
    tables::{BothTables, PinnedTables},
    view::{MappingView, Protocol},
};

/// The network that forwards lead through, of one IP version.
#[derive(Debug)]
pub struct Ground<A: IpFamily> {
    /// By their index.
    pub devices: Vec<(u32, Device<A>)>,
    /// What stands for the guests in the world.
    pub outside: Vec<A>,
}

impl<A: IpFamily> Ground<A> {
    /// As the tables say it is.
    fn read(tables: &PinnedTables<A>) -> Result<Self> {
        let settings = tables.settings()?;
        let outside = settings.outside.iter().copied();
        Ok(Self {
            devices: tables.devices()?,
            outside: outside.take(settings.outside_count as usize).collect(),
        })
    }

    fn first(&self) -> Option<A> {
        self.outside.first().copied()
    }

    /// Where a static mapping belongs: it may be one that moves with the first address.
    fn place(&self, outside: EndpointKey<A>, mapping: &Mapping<A>) -> EndpointKey<A> {
        let moves = mapping.flags & mapping_flags::MOVES != 0
            // Its device may come back, as taps do.
            && self.device_of(mapping.inside.address).is_some();
        let mut place = outside;
        if moves && let Some(first) = self.first() {
            place.address = first;
        }
        place
    }

    /// The inside device whose network has this address.
    fn device_of(&self, address: A) -> Option<(u32, &Device<A>)> {
        self.devices
            .iter()
            .find(|(_, device)| device.role == role::INSIDE && device.contains(address))
            .map(|(index, device)| (*index, device))
    }

    /// The static mappings that a forward takes.
    fn entries(
        &self,
        forward: &Forward,
        configured: bool,
    ) -> Result<Vec<(EndpointKey<A>, Mapping<A>)>> {
        let name = forward.name();
        let shown = forward.inside_address;
        let inside = of_family::<A>(shown)?;
        let Some((device, host)) = self.device_of(inside) else {
            let networks: Vec<_> = self
                .devices
                .iter()
                .filter(|(_, it)| it.role == role::INSIDE && it.address != A::UNSPECIFIED)
                .map(|(_, device)| network(device).to_string())
                .collect();
            bail!(
                "{name} cannot lead to {shown}: no inside network has that address, {}",
                if networks.is_empty() {
                    format!("as no inside device has {}", A::NAME)
                } else {
                    format!("they are {}", networks.join(", "))
                }
            );
        };
        ensure!(
            host.address != inside,
            "{name} cannot lead to {shown}: that is the host's own address; name a guest's"
        );
        ensure!(
            inside.is_host(host.mask),
            "{name} cannot lead to {shown}: no guest can have that address of {}",
            network(host)
        );
        let given = forward.outside_address.map(of_family::<A>).transpose()?;
        let Some(outside) = given.or_else(|| self.first()) else {
            bail!(
                "{name} has no outside address of {}: give the uplink one, or pass \
                 --outside-address",
                A::NAME
            );
        };
        let shown_outside: IpAddr = outside.into();
        if forward.share == Share::Everything {
            ensure!(
                !self.outside.contains(&outside),
                "{shown_outside} cannot be {shown}'s alone: all guests are translated to it; take \
                 another address, or forward single ports"
            );
        }
        ensure!(
            self.device_of(outside).is_none(),
            "{shown_outside} is no outside address: an inside network has it"
        );
        let (allowed, allowed_length) = A::from_net(forward.from)
            .map(A::parts)
            .with_context(|| format!("{} is not {}", forward.from, A::NAME))?;
        let mut flags = mapping_flags::STATIC;
        if configured {
            flags |= mapping_flags::CONFIGURED;
        }
        if forward.outside_address.is_none() {
            flags |= mapping_flags::MOVES;
        }
        let mapping = Mapping {
            device,
            allowed,
            allowed_length,
            flags,
            ..Mapping::default()
        };
        Ok(forward
            .endpoints(outside, inside)
            .into_iter()
            .map(|(outside, inside)| (outside, Mapping { inside, ..mapping }))
            .collect())
    }
}

fn of_family<A: IpFamily>(address: IpAddr) -> Result<A> {
    A::from_ip(address).with_context(|| format!("{address} is not {}", A::NAME))
}

/// The network that guests behind a device are in.
fn network<A: IpFamily>(device: &Device<A>) -> IpNet {
    let network = A::net(device.network, A::length(device.mask)).map(Into::into);
    network.unwrap_or_default().trunc()
}

/// What is to become of the tables.
#[derive(Debug)]
struct Change<A> {
    remove: Vec<EndpointKey<A>>,
    insert: Vec<(EndpointKey<A>, Mapping<A>)>,
}

impl<A> Change<A> {
    fn nothing() -> Self {
        Self {
            remove: Vec::new(),
            insert: Vec::new(),
        }
    }

    /// Whether the tables are as they should be.
    fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.insert.is_empty()
    }
}

/// What the operator may say of a forward that is to go.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Selector {
    Ports {
        protocol: Transport,
        ports: Ports,
        /// None means whatever their address, of both IP versions.
        outside_address: Option<IpAddr>,
    },
    Address(IpAddr),
}

impl Selector {
    fn selects<A: IpFamily>(&self, outside: EndpointKey<A>) -> bool {
        let address: IpAddr = outside.address.into();
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
pub fn list(tables: &BothTables) -> Result<Vec<Standing>> {
    let mut list = standing(&tables.ipv4.static_mappings()?);
    if let Some(ipv6) = &tables.ipv6 {
        list.extend(standing(&ipv6.static_mappings()?));
    }
    Ok(list)
}

/// What [`add`] has put into the tables.
#[derive(Debug)]
pub enum Added {
    Ipv4(Vec<EndpointKey>),
    Ipv6(Vec<EndpointKey<Be128>>),
}

impl Added {
    /// Whether all of it was there already.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        match self {
            Self::Ipv4(endpoints) => endpoints.is_empty(),
            Self::Ipv6(endpoints) => endpoints.is_empty(),
        }
    }
}

/// Adds one forward, all of it or nothing.
///
/// # Errors
///
/// When it contradicts another one, a guest or a program of the host has the port, or it leads
/// nowhere.
pub fn add(
    ipv4: &mut PinnedTables,
    ipv6: Option<&mut PinnedTables<Be128>>,
    remover: &impl Remover,
    forward: &Forward,
) -> Result<Added> {
    check_ipv6(ipv6.is_some(), slice::from_ref(forward))?;
    match (forward.inside_address, ipv6) {
        (IpAddr::V6(_), Some(ipv6)) => Ok(Added::Ipv6(add_to(ipv6, remover, forward)?)),
        (IpAddr::V4(_), _) | (IpAddr::V6(_), None) => {
            Ok(Added::Ipv4(add_to(ipv4, remover, forward)?))
        }
    }
}

/// Takes out what [`add`] has put there.
///
/// # Errors
///
/// When the kernel refuses.
pub fn take_back(
    ipv4: &mut PinnedTables,
    ipv6: Option<&mut PinnedTables<Be128>>,
    remover: &impl Remover,
    added: &Added,
) -> Result<()> {
    match (added, ipv6) {
        (Added::Ipv4(endpoints), _) => take_out(ipv4, remover, endpoints),
        (Added::Ipv6(endpoints), Some(ipv6)) => take_out(ipv6, remover, endpoints),
        (Added::Ipv6(_), None) => Ok(()),
    }
}

fn take_out<A: IpFamily>(
    tables: &mut PinnedTables<A>,
    remover: &impl Remover,
    endpoints: &[EndpointKey<A>],
) -> Result<()> {
    let change = Change {
        remove: endpoints.to_vec(),
        insert: Vec::new(),
    };
    apply(tables, remover, &change)
}

fn add_to<A: IpFamily>(
    tables: &mut PinnedTables<A>,
    remover: &impl Remover,
    forward: &Forward,
) -> Result<Vec<EndpointKey<A>>> {
    let change = plan(tables, &Ground::read(tables)?, &[*forward], false)?;
    apply(tables, remover, &change)?;
    Ok(change.insert.iter().map(|(outside, _)| *outside).collect())
}

/// Refuses forwards to guests with IPv6 where there are none.
fn check_ipv6(is_there: bool, forwards: &[Forward]) -> Result<()> {
    match forwards.iter().find(|it| it.inside_address.is_ipv6()) {
        Some(forward) if !is_there => bail!(
            "{} cannot lead to {}: no inside device has IPv6; give one a network, as in --inside \
             tap0=10.0.0.1/24,fd00:7a70::1/64",
            forward.name(),
            forward.inside_address
        ),
        _ => Ok(()),
    }
}

/// Takes forwards away. Connections that came in through them go on.
///
/// # Errors
///
/// When nothing is selected.
pub fn remove(
    ipv4: &mut PinnedTables,
    ipv6: Option<&mut PinnedTables<Be128>>,
    remover: &impl Remover,
    selector: &Selector,
) -> Result<()> {
    let mut there = Vec::new();
    let mut is_selected = remove_from(ipv4, remover, selector, &mut there)?;
    if let Some(ipv6) = ipv6 {
        is_selected |= remove_from(ipv6, remover, selector, &mut there)?;
    }
    if is_selected {
        return Ok(());
    }
    let is_meant = |forward: &Forward| match selector {
        Selector::Ports { .. } => forward.share != Share::Everything,
        Selector::Address(_) => forward.share == Share::Everything,
    };
    // One name may stand for one of each IP version.
    let names: BTreeSet<_> = there
        .iter()
        .filter(|it| is_meant(&it.forward))
        .map(|it| it.forward.name())
        .collect();
    let names: Vec<_> = names.into_iter().collect();
    let what = match selector {
        Selector::Ports { .. } => "there is no such forward",
        Selector::Address(_) => "no guest has this address for itself",
    };
    if names.is_empty() {
        bail!("{what}: there is none at all");
    }
    bail!("{what}: there is {}", names.join(", "));
}

/// Takes out what is selected, and adds to `there` what was there. Returns whether anything was
/// selected.
fn remove_from<A: IpFamily>(
    tables: &mut PinnedTables<A>,
    remover: &impl Remover,
    selector: &Selector,
    there: &mut Vec<Standing>,
) -> Result<bool> {
    let mappings = tables.static_mappings()?;
    there.extend(standing(&mappings));
    let outside = mappings.iter().map(|(outside, _)| *outside);
    let change = Change {
        remove: outside.filter(|it| selector.selects(*it)).collect(),
        insert: Vec::new(),
    };
    apply(tables, remover, &change)?;
    Ok(!change.is_empty())
}

/// Makes these the forwards that the configuration asks for, in place of those that it asked for
/// before. Those that commands made stay.
///
/// # Errors
///
/// As [`add`]. Nothing is changed then, unless a guest took a port just now or a table is full.
pub fn configure(
    ipv4: &mut PinnedTables,
    ipv6: Option<&mut PinnedTables<Be128>>,
    remover: &impl Remover,
    wanted: &[Forward],
) -> Result<()> {
    check_ipv6(ipv6.is_some(), wanted)?;
    let change = plan(ipv4, &Ground::read(ipv4)?, wanted, true)?;
    if let Some(ipv6) = ipv6 {
        let change = plan(ipv6, &Ground::read(ipv6)?, wanted, true)?;
        apply(ipv6, remover, &change)?;
    }
    apply(ipv4, remover, &change)
}

/// Refuses what [`configure`] would refuse when the network is as said here. Changes nothing.
///
/// # Errors
///
/// As [`configure`].
pub fn check(
    ipv4: (&PinnedTables, &Ground<Be32>),
    ipv6: Option<(&PinnedTables<Be128>, &Ground<Be128>)>,
    wanted: &[Forward],
) -> Result<()> {
    check_ipv6(ipv6.is_some(), wanted)?;
    plan(ipv4.0, ipv4.1, wanted, true)?;
    if let Some((tables, ground)) = ipv6 {
        plan(tables, ground, wanted, true)?;
    }
    Ok(())
}

/// What has to be changed for those of the `wanted` forwards that are of this IP version, on this
/// ground.
fn plan<A: IpFamily>(
    tables: &PinnedTables<A>,
    ground: &Ground<A>,
    wanted: &[Forward],
    configured: bool,
) -> Result<Change<A>> {
    let there: HashMap<_, _> = tables
        .static_mappings()?
        .into_iter()
        .map(|(outside, mapping)| (ground.place(outside, &mapping), mapping))
        .collect();
    let pool: Vec<IpAddr> = ground.outside.iter().map(|it| (*it).into()).collect();
    let wanted: Vec<_> = wanted
        .iter()
        .filter(|it| A::from_ip(it.inside_address).is_some())
        .collect();
    let replaced =
        |mapping: &Mapping<A>| configured && mapping.flags & mapping_flags::CONFIGURED != 0;
    let mut change = Change::nothing();
    let mut kept = HashSet::new();
    let mut listening: Option<Vec<Listener>> = None;
    for (position, forward) in wanted.iter().enumerate() {
        let earlier = wanted.iter().take(position).copied();
        if let Some(message) = forward.conflict(earlier, &pool) {
            bail!(message);
        }
        let entries = ground.entries(forward, configured)?;
        if let Some((outside, _)) = entries.first() {
            check_address(&there, *outside, replaced)?;
        }
        for (outside, mut mapping) in entries {
            if let Some(old) = there.get(&outside) {
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
                    old.inside.address.into(),
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
            let guests = tables.mapping(&outside)?;
            if let Some(old) = guests.filter(|it| it.flags & mapping_flags::STATIC == 0) {
                if old.inside == mapping.inside {
                    mapping.sessions = old.sessions;
                } else if let Some(view) = MappingView::new(&outside, &old, now()) {
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
fn check_address<A: IpFamily>(
    there: &HashMap<EndpointKey<A>, Mapping<A>>,
    outside: EndpointKey<A>,
    replaced: impl Fn(&Mapping<A>) -> bool,
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
            mapping.inside.address.into()
        ),
    }
}

/// Whether both mean the same to a packet.
fn same<A: IpFamily>(one: &Mapping<A>, other: &Mapping<A>) -> bool {
    let meaning = |it: &Mapping<A>| (it.inside, it.allowed, it.allowed_length);
    meaning(one) == meaning(other)
}

fn describe<A: IpFamily>(outside: EndpointKey<A>) -> String {
    let address: IpAddr = outside.address.into();
    let protocol = Protocol(outside.protocol);
    if outside.is_whole() {
        address.to_string()
    } else {
        format!("{protocol} port {} of {address}", outside.port.get())
    }
}

/// Makes a change that was planned on these tables: all of it, or nothing when a table is full or a
/// guest took a port since.
fn apply<A: IpFamily>(
    tables: &mut PinnedTables<A>,
    remover: &impl Remover,
    change: &Change<A>,
) -> Result<()> {
    let mut made: Vec<(EndpointKey<A>, Option<Mapping<A>>)> = Vec::new();
    for (outside, mapping) in &change.insert {
        let before = tables.mapping(outside)?;
        let done = if before.is_some() {
            tables.replace_mapping(outside, mapping)
        } else {
            match tables.insert_mapping(outside, mapping) {
                Ok(true) => Ok(()),
                Ok(false) => Err(anyhow!(
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
fn note_addresses<A: IpFamily>(tables: &mut PinnedTables<A>) -> Result<()> {
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
pub fn follow<A: IpFamily>(tables: &mut PinnedTables<A>) -> Result<Vec<String>> {
    let ground = Ground::read(tables)?;
    let mut notes = Vec::new();
    for (outside, mapping) in tables.static_mappings()? {
        let inside = mapping.inside.address;
        let Some((device, _)) = ground.device_of(inside) else {
            continue;
        };
        let right = ground.place(outside, &mapping);
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
                    "the forward of {} to {} is gone: {} is in use",
                    describe(outside),
                    inside.into(),
                    describe(right)
                ));
            }
        }
    }
    note_addresses(tables)?;
    Ok(notes)
}
