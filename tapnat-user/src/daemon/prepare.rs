//! The start: brings the host, step by step and each in the journal, into the state in which packets
//! are translated. What is there already, of an earlier process or of the operator, is left.

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use tapnat_common::abi::setting_flags;

use super::{
    follow_statics,
    hooks::{attach, choose_hook, hooks, xdp_devices},
    ipv6,
    settings::{has_ipv6, surroundings},
    settle_host_sockets,
    six::{self, Six},
    version::Version,
    wanted_addresses,
};
use crate::{
    changes::{RealHost, read_sysctl},
    config::{Config, Firewall},
    datapath::{Datapath, Hook, Pins, uses_tcx},
    family::IpFamily,
    files::write_note,
    host::{namespace::NetworkNamespace, netlink::Link, sockets, sysctl::Sysctl, xdp::Drivers},
    instance::{InstanceName, bpffs_or_mount},
    journal::{Change, Claim, Direction, Journal, Role},
    logs::Logs,
    nat_log::NatLog,
    notice::warn,
    pool,
    ports::{Division, PortSet, parse_ephemeral},
    preflight::{Facts, Plan, PlannedInside},
    progress::Progress,
    statics,
    sweep::ask_again,
    tables::PinnedTables,
};

/// What a start has when everything is in place.
pub(super) struct Prepared {
    pub plan: Plan,
    pub datapath: Datapath,
    pub four: Version,
    pub six: Option<Six>,
    pub logs: Option<Logs>,
    pub nat_log: Option<NatLog>,
    pub hooks: Vec<Hook>,
    pub drivers: Option<Drivers>,
    pub told: Vec<String>,
}

/// Brings the host into the state in which packets are translated.
pub(super) async fn prepare(
    config: &Config,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<Prepared> {
    let facts = facts(config, host).await?;
    journal.follow_names(&facts.links)?;
    let plan = facts.plan(config)?;
    pool::check(&config.given_outside(), host).await?;
    uses_tcx(config.attach)?;
    let drivers = Drivers::open()?;
    let chosen = choose_hook(config, &plan.uplink, drivers.as_ref(), &facts.links)?;
    let pins = Pins::new(&config.instance, &bpffs_or_mount()?);
    let is_adoptable = is_adoptable(config, &pins)?;
    for warning in &plan.warnings {
        warn(warning);
    }
    for inside in &plan.insides {
        prepare_inside(config, inside, host, journal).await?;
    }
    let told = plan.warnings.clone();
    let plan = with_links(config, &plan, host).await?;
    let links = host.netlink().links().await?;
    journal.set_claims(claims(&plan, &links))?;
    let withheld = divide_ports(config, host, journal).await?;

    if pins.exist() {
        journal.record(Change::PinDirectory)?;
    } else {
        journal.make(Change::PinDirectory, host).await?;
    }
    let own = pool::without_ours(links.clone(), &plan.uplink.device(), journal);
    let known = surroundings(config, &plan, &own);
    let ipv6 = has_ipv6(config, &plan);
    let hooks = hooks(config, &plan, &links, chosen);
    if !is_adoptable {
        pins.clear()?;
    }
    if ipv6 {
        six::forget_small_tables(&pins)?;
    }
    let progress = Progress::waiting("the kernel verifies tapnat's programs");
    let mut datapath = Datapath::open(pins.clone(), config, ipv6, &hooks)?;
    drop(progress);
    let logs = config
        .verbose
        .then(|| Logs::read(&mut datapath.open_object()?))
        .transpose()?;
    let mut four = Version::open(&pins, config, known, &withheld)?;
    let mut six = ipv6
        .then(|| Six::open(&pins, config, surroundings(config, &plan, &own), &withheld))
        .transpose()?;
    // Before anything is shown to the firewall, which may be at once.
    let (leaving, arriving): (Vec<_>, Vec<_>) = hooks
        .iter()
        .partition(|hook| hook.direction == Direction::Leaving);
    for hook in leaving {
        attach(&datapath, hook, host, journal).await?;
    }
    four.begin(config, chosen)?;
    six.as_mut()
        .map_or(Ok(()), |six| six.begin(config, chosen))?;
    datapath.set_xdp_devices(&xdp_devices(chosen, &plan, drivers.as_ref()))?;
    for note in follow_statics(&mut four.tables, six.as_mut())? {
        warn(&note);
    }
    let ipv6 = six.as_mut().map(|six| &mut six.version.tables);
    statics::configure(&mut four.tables, ipv6, &datapath, &config.forwards)?;
    // Before the programs that tell it more.
    let nat_log = nat_log(config, &pins, &datapath, &four.tables)?;
    for hook in arriving {
        attach(&datapath, hook, host, journal).await?;
    }
    // Not before the programs are there: the host would send guests' packets
    // on as they are.
    for (name, family) in forwarded(config, &plan) {
        set_forwarding(name, family, host, journal).await?;
    }
    tell_firewall(config, &mut four.tables, six.as_mut(), &datapath)?;
    let wanted = wanted_addresses(config, &four.tables, six.as_ref())?;
    for note in pool::settle(&wanted, &[], &plan.uplink.device(), host, journal).await? {
        warn(&note);
    }
    if let Some(note) = settle_host_sockets(&mut datapath, &four.tables, six.as_ref()) {
        warn(&note);
    }
    datapath.forget_others(&hooks)?;
    for note in journal.revert_unwanted(host).await? {
        warn(&note);
    }
    Ok(Prepared {
        plan,
        datapath,
        four,
        six,
        logs,
        nat_log,
        hooks,
        drivers,
        told,
    })
}

/// Whether an earlier process left tables that this one can go on with.
fn is_adoptable(config: &Config, pins: &Pins) -> Result<bool> {
    let tables = pins.adoptable()?;
    if let Some(tables) = &tables {
        check_capacity(config, tables)?;
    }
    Ok(tables.is_some())
}

/// Has the firewall asked about sessions that began without it.
pub(super) fn tell_firewall(
    config: &Config,
    tables: &mut PinnedTables,
    six: Option<&mut Six>,
    datapath: &Datapath,
) -> Result<()> {
    tell_firewall_of(config, tables, datapath)?;
    six.map_or(Ok(()), |six| {
        tell_firewall_of(config, &mut six.version.tables, datapath)
    })
}

pub(super) fn tell_firewall_of<A: IpFamily>(
    config: &Config,
    tables: &mut PinnedTables<A>,
    datapath: &Datapath,
) -> Result<()> {
    let mut settings = tables.settings()?;
    if config.firewall == Firewall::Ask && settings.flags & setting_flags::FIREWALL_KNOWS == 0 {
        ask_again(tables, datapath)?;
        settings.flags |= setting_flags::FIREWALL_KNOWS;
        tables.set_settings(&settings)?;
    }
    Ok(())
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    /// Whether the host is to forward what arrives on a device.
    pub fn forwarding(self, device: &str) -> Sysctl {
        match self {
            Self::Ipv4 => Sysctl::forwarding(device),
            Self::Ipv6 => Sysctl::forwarding_ipv6(device),
        }
    }
}

/// The devices from which the host has to forward packets, or to tell where it would.
pub(super) fn forwarded<'a>(
    config: &Config,
    plan: &'a Plan,
) -> impl Iterator<Item = (&'a str, Family)> {
    let uplink = (config.firewall == Firewall::Ask).then_some(plan.uplink.name.as_str());
    let insides = plan.insides.iter().flat_map(|inside| {
        let families = inside.networks.iter().map(|network| match network {
            IpNet::V4(_) => Family::Ipv4,
            IpNet::V6(_) => Family::Ipv6,
        });
        // Guests that reach the world's IPv4 by IPv6 do so by the routes of IPv4.
        let nat64 =
            (config.nat64.is_some() && inside.networks.ipv4.is_none()).then_some(Family::Ipv4);
        families
            .chain(nat64)
            .map(|family| (inside.device_name(), family))
    });
    let uplink = uplink.map(|name| (name, Family::Ipv4));
    uplink.into_iter().chain(insides)
}

pub(super) async fn set_forwarding(
    device: &str,
    family: Family,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<()> {
    match family {
        Family::Ipv4 => set_sysctl(&family.forwarding(device), "1", host, journal).await,
        Family::Ipv6 => ipv6::set_forwarding(device, host, journal).await,
    }
}

/// Begins to write the NAT log, if there is to be one, and says where for `tapnat who`.
pub(super) fn nat_log(
    config: &Config,
    pins: &Pins,
    datapath: &Datapath,
    tables: &PinnedTables,
) -> Result<Option<NatLog>> {
    let note = config.instance.nat_log_note();
    let Some(target) = &config.nat_log else {
        write_note(&note, None)?;
        return Ok(None);
    };
    let resumes = datapath.resumes_log();
    let log = NatLog::begin(&config.instance, target, &pins.tables(), tables, resumes)?;
    write_note(&note, Some(target.to_string().as_bytes()))?;
    Ok(Some(log))
}

/// The plan again, when every inside device that was asked for by name is there.
pub(super) async fn with_links(config: &Config, plan: &Plan, host: &RealHost) -> Result<Plan> {
    let plan = facts(config, host).await?.replan(config, plan);
    for name in config
        .insides
        .iter()
        .filter_map(|inside| inside.devices.name())
    {
        ensure!(
            plan.insides.iter().any(|inside| inside.name == *name),
            "{name} vanished during the start: try again"
        );
    }
    Ok(plan)
}

pub(super) async fn facts(config: &Config, host: &RealHost) -> Result<Facts> {
    let here = NetworkNamespace::current()?;
    let mut taken = Vec::new();
    for other in InstanceName::all()?
        .into_iter()
        .filter(|name| *name != config.instance)
    {
        if let Some(journal) = Journal::load(&other)?.filter(|it| it.network_namespace() == here) {
            taken.extend(
                journal
                    .claims()
                    .iter()
                    .map(|claim| (other.clone(), claim.clone())),
            );
        }
    }
    Ok(Facts {
        links: host.netlink().links().await?,
        default_route: host.netlink().default_route().await?,
        taken,
    })
}

/// Creates an inside device, gives it its addresses and sets it up, as far as that is not so already.
pub(super) async fn prepare_inside(
    config: &Config,
    inside: &PlannedInside,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<()> {
    let name = inside.name.as_str();
    let create = Change::CreateTap {
        name: name.to_owned(),
        queues: config.tap_queues,
        owner: config.tap_owner,
        index: None,
    };
    let link = if let Some(link) = &inside.link {
        journal.keep(&create);
        link.clone()
    } else {
        journal.make(create, host).await?;
        host.netlink()
            .link(name)
            .await?
            .with_context(|| format!("the tap {name} vanished while it was created"))?
    };
    let device = link.device();
    if inside.networks.ipv6.is_some() {
        ipv6::prepare(&link.name, host, journal).await?;
    }
    for address in inside.networks.iter() {
        let add = Change::AddAddress {
            device: device.clone(),
            address,
            peer: inside.networks.peer_of(address),
        };
        let is_there = !inside.lacks(address);
        journal.make_unless(is_there, add, host).await?;
    }
    let set_up = Change::SetUp { device };
    journal.make_unless(link.up, set_up, host).await
}

pub(super) async fn set_sysctl(
    sysctl: &Sysctl,
    value: &str,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<()> {
    let old = read_sysctl(sysctl)?;
    let right = old == value;
    let change = Change::SetSysctl {
        sysctl: sysctl.clone(),
        old,
        new: value.to_owned(),
    };
    journal.make_unless(right, change, host).await
}

/// Divides the ports between host and guests, and reserves the guests'. Returns those that no guest
/// may get.
pub(super) async fn divide_ports(
    config: &Config,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<PortSet> {
    let ephemeral = parse_ephemeral(&read_sysctl(&Sysctl::local_port_range())?)?;
    let operators = host.reserved_by_operator(journal)?;
    let mut division = Division::new(&config.ports, &ephemeral, &operators);
    if !division.reserve.is_empty() {
        journal
            .make(
                Change::ReservePorts {
                    ports: division.reserve.clone(),
                },
                host,
            )
            .await?;
    }
    // Only now: what is reserved cannot come into use any more.
    division.host.extend(sockets::ports_in_use()?);
    division.withheld(&config.ports)
}

pub(super) fn claims(plan: &Plan, links: &[Link]) -> Vec<Claim> {
    let uplink = Claim {
        device: plan.uplink.device(),
        role: Role::Uplink,
    };
    let insides = plan.insides.iter().filter_map(|inside| {
        let link = inside.link_in(links)?;
        Some(Claim {
            device: link.device(),
            role: Role::Inside,
        })
    });
    std::iter::once(uplink).chain(insides).collect()
}

pub(super) fn check_capacity(config: &Config, tables: &PinnedTables) -> Result<()> {
    let capacity = tables.session_capacity()?;
    ensure!(
        capacity == config.max_sessions,
        "the sessions that are there are in tables for {capacity}, and --max-sessions asks for {}: \
         pass --max-sessions {capacity} to go on with them, or --fresh to end them",
        config.max_sessions
    );
    Ok(())
}
