//! The life of an instance: it starts, adopts what an earlier process left, serves until it is told
//! to end, and takes everything away. Owns the order of these steps; each of them is another
//! module's.

mod follow;
mod ipv6;
mod pressure;
mod reload;
mod retry;
mod six;

use std::{
    fs::{self, File},
    io::{self, IsTerminal as _, Write as _},
    net::IpAddr,
    os::{fd::AsFd as _, unix::ffi::OsStrExt as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use rustix::{
    process::{
        Pid, PidfdFlags, Resource, Rlimit, Signal, geteuid, pidfd_open, pidfd_send_signal,
        setrlimit,
    },
    time::{ClockId, clock_gettime},
};
use tapnat_common::{
    abi::{self, ABI_VERSION, MAX_OUTSIDE_ADDRESSES, Settings, role, setting_flags},
    net::Be32,
    ports::Reserved,
    time::Instant,
};
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};

use self::{pressure::Pressure, retry::Retry, six::Six};
use crate::{
    changes::{RealHost, read_sysctl},
    config::{Config, Firewall},
    control::{self, Control, Request},
    datapath::{Datapath, FILTER_HANDLE, FILTER_PRIORITY, Hook, Pins, check_kernel, uses_tcx},
    dhcp, dhcpv6,
    dns::Names,
    family::IpFamily,
    host::{
        bpffs,
        capabilities::{self, Circumstances},
        events::Events,
        namespace::NetworkNamespace,
        netlink::{Link, LinkLayer, Netlink},
        sockets,
        sysctl::Sysctl,
        systemd,
        xdp::{Drivers, Features},
    },
    instance::{InstanceName, Lock, bpffs_or_mount, mounted_bpffs, unmount_bpffs},
    journal::{Change, Claim, Direction, Journal, Role},
    logs::Logs,
    metrics::{
        self,
        scrapes::{Answering, Scrapes},
    },
    nat_log::NatLog,
    pool,
    ports::{Division, PortSet, parse_ephemeral},
    preflight::{Facts, Plan, PlannedInside},
    progress::Progress,
    router::{self, Routers},
    statics,
    sweep::{Sweep, ask_again},
    tables::{BothTables, PinnedTables},
    unsolicited::Answers,
    uplink_hook::Chosen,
};

/// How long a process that was told to end may take.
const END_TIMEOUT: Duration = Duration::from_secs(30);
const END_POLL: Duration = Duration::from_millis(20);

/// How `tapnat run` begins and ends.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Options {
    /// Leave the datapath in place at the end.
    pub keep: bool,
    /// Take away what an earlier process left, with its sessions, before the start.
    pub fresh: bool,
}

/// Reads the configuration again, where there is a file that it came from.
pub struct Reread {
    /// The file.
    pub path: PathBuf,
    pub read: Box<dyn Fn() -> Result<Config>>,
}

/// Runs an instance until a signal ends it. SIGHUP makes it read its configuration again, if it can.
///
/// # Errors
///
/// When it cannot start, in which case nothing is left behind, or when something cannot be taken
/// away at the end.
pub async fn run(config: &Config, options: Options, reread: Option<Reread>) -> Result<()> {
    check_privileges()?;
    check_kernel()?;
    // From here on a signal waits until the start is done, and then ends what was started.
    let mut signals = Signals::new(reread.is_some())?;
    let (mut daemon, scrapes) = Box::pin(Daemon::start(config, options.fresh, reread)).await?;
    daemon.settle_guests().await;
    let settled = daemon.give_up_privileges().and_then(|()| {
        daemon.answer_scrapes(scrapes);
        daemon.announce()
    });
    if let Err(error) = settled {
        if let Err(error) = Box::pin(daemon.end()).await {
            warn(&format!("{error:#}"));
        }
        return Err(error);
    }
    daemon.serve(&mut signals).await;
    if options.keep {
        let name = &config.instance;
        tell(&format!(
            "packets go on being translated; `tapnat down --instance {name}` ends that"
        ));
        return Ok(());
    }
    Box::pin(daemon.end()).await
}

/// Ends an instance, whether a process serves it or not, and takes everything away that it changed.
/// Returns whether there was anything to end; an instance that does not exist is no error.
///
/// # Errors
///
/// When its process does not end, when its changes were made in another network namespace, or when
/// some could not be taken back.
pub async fn down(instance: &InstanceName) -> Result<bool> {
    check_privileges()?;
    // Before its process is told to end: from here nobody could take away the rest.
    if let Some(mut journal) = Journal::load(instance)? {
        check_namespace(instance, &mut journal)?;
    }
    let (lock, ended) = end_process(instance).await?;
    let everyone = Lock::all_instances()?;
    let journal = Journal::load(instance)?;
    let host = RealHost::new(instance.clone(), Netlink::open()?);
    let pinned = host.pin_directory().is_some_and(|path| path.exists());
    let existed = ended || journal.is_some() || pinned;
    let mut journal = match journal {
        Some(journal) => journal,
        None => Journal::begin(instance)?,
    };
    check_namespace(instance, &mut journal)?;
    if pinned {
        journal.record(Change::PinDirectory)?;
    }
    take_away(journal, &host, lock, everyone).await?;
    Ok(existed)
}

/// Locks the instance, after ending the process that has the lock. Returns whether one had it.
async fn end_process(instance: &InstanceName) -> Result<(Lock, bool)> {
    let mut told = false;
    let _progress = Progress::waiting("the instance's process ends");
    let deadline = tokio::time::Instant::now() + END_TIMEOUT;
    loop {
        let holder = match Lock::instance(instance)? {
            Ok(lock) => return Ok((lock, told)),
            Err(holder) => holder,
        };
        ensure!(
            tokio::time::Instant::now() < deadline,
            "the process of the tapnat instance '{instance}'{holder} does not end: kill it \
             (`kill -KILL`), then repeat `tapnat down --instance {instance}`"
        );
        if let Some(process) = holder.0.and_then(Pid::from_raw)
            && !told
        {
            let told_how = pidfd_open(process, PidfdFlags::empty())
                .and_then(|process| pidfd_send_signal(process, Signal::TERM));
            match told_how {
                Ok(()) => told = true,
                // It ended just now, and the lock is free.
                Err(rustix::io::Errno::SRCH) => {}
                Err(error) => {
                    bail!(
                        "cannot end the process of the tapnat instance '{instance}'{holder}: {error}"
                    )
                }
            }
        }
        tokio::time::sleep(END_POLL).await;
    }
}

/// Says where an instance of another network namespace can be ended. If that namespace is gone, the
/// changes in it are gone too, and forgotten.
fn check_namespace(instance: &InstanceName, journal: &mut Journal) -> Result<()> {
    let namespace = journal.network_namespace();
    if namespace == NetworkNamespace::current()? {
        return Ok(());
    }
    if let Some(path) = namespace.find()? {
        bail!(
            "the tapnat instance '{instance}' belongs to another network namespace: end it there \
             (`nsenter --net={} tapnat down --instance {instance}`), or choose another name",
            path.display()
        );
    }
    journal.forget_namespace();
    Ok(())
}

/// Reverts every change and removes every file of an instance.
async fn take_away(
    mut journal: Journal,
    host: &RealHost,
    lock: Lock,
    everyone: Lock,
) -> Result<()> {
    for note in journal.revert_from(0, host).await? {
        warn(&note);
    }
    journal.remove()?;
    unmount_bpffs()?;
    lock.remove_with_directory()?;
    everyone.remove()
}

/// Takes away what an earlier process of the instance left, with its sessions, for a start that
/// finds nothing to refuse.
async fn take_away_earlier(config: &Config, journal: &mut Journal, host: &RealHost) -> Result<()> {
    let mut facts = facts(config, host).await?;
    facts.links = without_changes(facts.links, journal);
    let plan = facts.plan(config)?;
    uses_tcx(config.attach)?;
    let drivers = Drivers::open()?;
    choose_hook(config, &plan.uplink, drivers.as_ref(), &facts.links)?;
    if host.pin_directory().is_some_and(|path| path.exists()) {
        journal.record(Change::PinDirectory)?;
    }
    for note in journal.revert_from(0, host).await? {
        warn(&note);
    }
    Ok(())
}

/// The devices as they will be when the recorded changes are taken back.
fn without_changes(links: Vec<Link>, journal: &Journal) -> Vec<Link> {
    let mut links = links;
    for change in journal.changes() {
        match change {
            Change::CreateTap { name, index, .. } => {
                links.retain(|link| link.name != *name || Some(link.index) != *index);
            }
            Change::AddAddress {
                device, address, ..
            } => {
                for link in links.iter_mut().filter(|link| link.index == device.index) {
                    link.addresses.retain(|it| it.net != *address);
                }
            }
            _ => {}
        }
    }
    links
}

/// Refuses to begin without the privileges that will be needed.
fn check_privileges() -> Result<()> {
    let missing = capabilities::missing(bpffs::find().is_none())?;
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join(", ");
    if geteuid().is_root() {
        bail!("root lacks {missing} here: run tapnat outside the container, or grant it these");
    }
    bail!(
        "tapnat must run as root (`sudo tapnat ..`), or with {missing}, better CAP_NET_RAW too, and \
         as a user who may write to /run/tapnat, /sys/fs/bpf/tapnat and, for new taps, /dev/net/tun"
    )
}

/// Says what is not as it should be, though it stops nothing, on the standard error.
pub fn warn(message: &str) {
    tell(&format!("warning: {message}"));
}

/// What `journalctl -t` asks for.
const IDENTIFIER: &str = "tapnat";

/// Says what the user should know, on the standard error, or in systemd's journal when that is closed:
/// who started the process, such as QEMU's script, may be gone.
pub fn tell(message: &str) {
    if writeln!(io::stderr(), "tapnat: {message}").is_err()
        && let Ok(journal) = systemd::Journal::open(IDENTIFIER)
    {
        // There is nobody else to tell.
        let _ = journal.write(message);
    }
}

/// What a signal asks for.
enum Asked {
    End,
    Reload,
}

/// The signals that the process listens to.
struct Signals {
    ends: [SignalStream; 2],
    hangup: SignalStream,
    can_reload: bool,
    had_terminal: bool,
}

impl Signals {
    fn new(can_reload: bool) -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            ends: [
                listen(SignalKind::interrupt())?,
                listen(SignalKind::terminate())?,
            ],
            hangup: listen(SignalKind::hangup())?,
            can_reload,
            had_terminal: io::stdin().is_terminal(),
        })
    }

    async fn received(&mut self) -> Asked {
        let [interrupt, terminate] = &mut self.ends;
        tokio::select! {
            _ = interrupt.recv() => Asked::End,
            _ = terminate.recv() => Asked::End,
            _ = self.hangup.recv() => self.hung_up(),
        }
    }

    /// The same signal says that the terminal is gone, and that the file is to be read again.
    fn hung_up(&self) -> Asked {
        if self.can_reload && self.had_terminal == io::stdin().is_terminal() {
            Asked::Reload
        } else {
            Asked::End
        }
    }
}

/// What the datapath was told of the network, of one IP version, when it was last looked at.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Surroundings<A = Be32> {
    devices: Vec<(u32, abi::Device<A>)>,
    outside: Vec<A>,
}

/// A running instance.
struct Daemon {
    config: Config,
    reread: Option<Reread>,
    plan: Plan,
    host: RealHost,
    journal: Journal,
    lock: Lock,
    datapath: Datapath,
    tables: PinnedTables,
    logs: Option<Logs>,
    events: Events,
    control: Control,
    sweep: Sweep,
    pressure: Pressure,
    answers: Option<Answers<Be32>>,
    nat_log: Option<NatLog>,
    dhcp: dhcp::Servers,
    dhcpv6: dhcpv6::Servers,
    routers: Routers,
    names: Arc<Names>,
    scrapes: Option<Answering>,
    known: Surroundings,
    /// What there is for IPv6, if any guest has it.
    six: Option<Six>,
    /// Where the programs are attached.
    hooks: Vec<Hook>,
    /// Whom to ask about XDP, where the kernel tells.
    drivers: Option<Drivers>,
    /// Warnings that need no repeating.
    told: Vec<String>,
    retry: Retry,
}

/// What a start has when everything is in place.
struct Prepared {
    plan: Plan,
    datapath: Datapath,
    tables: PinnedTables,
    logs: Option<Logs>,
    nat_log: Option<NatLog>,
    known: Surroundings,
    six: Option<Six>,
    hooks: Vec<Hook>,
    drivers: Option<Drivers>,
    told: Vec<String>,
}

/// What a start has before it changes anything.
struct Begun {
    host: RealHost,
    events: Events,
    journal: Journal,
    /// Whether an earlier start left the journal.
    adopting: bool,
}

impl Begun {
    async fn new(instance: &InstanceName) -> Result<Self> {
        let host = RealHost::new(instance.clone(), Netlink::open()?);
        // Before anything is read, so that no change falls between.
        let events = Events::listen(host.netlink()).await?;
        let left = Journal::load(instance)?;
        let adopting = left.is_some();
        let mut journal = match left {
            Some(journal) => journal,
            None => Journal::begin(instance)?,
        };
        check_namespace(instance, &mut journal)?;
        Ok(Self {
            host,
            events,
            journal,
            adopting,
        })
    }
}

impl Daemon {
    /// Scrapes wait until they are answered.
    async fn start(
        config: &Config,
        fresh: bool,
        reread: Option<Reread>,
    ) -> Result<(Self, Option<Scrapes>)> {
        let instance = &config.instance;
        let everyone = Lock::all_instances()?;
        let lock = match Lock::instance(instance)? {
            Ok(lock) => lock,
            Err(holder) if control::is_listening(instance) => bail!(
                "the tapnat instance '{instance}' is running already{holder}: choose another name \
                 (--instance NAME), or end it (`tapnat down --instance {instance}`)"
            ),
            Err(holder) => {
                bail!("the tapnat instance '{instance}'{holder} is starting or ending: try again")
            }
        };
        let begun = match Begun::new(instance).await {
            Ok(begun) => begun,
            Err(error) => {
                // What an earlier start left is its own.
                if !Journal::is_there(instance) {
                    let removed = lock.remove_with_directory();
                    if let Err(error) = removed.and_then(|()| everyone.remove()) {
                        warn(&format!("{error:#}"));
                    }
                }
                return Err(error);
            }
        };
        let Begun {
            host,
            events,
            mut journal,
            mut adopting,
        } = begun;
        let mark = journal.mark();
        let prepared = async {
            // Before anything is changed: the port may be another program's.
            let scrapes = config.metrics.map(Scrapes::listen).transpose()?;
            if fresh {
                take_away_earlier(config, &mut journal, &host).await?;
                adopting = false;
            }
            let control = Control::listen(instance)?;
            let prepared = prepare(config, &host, &mut journal).await?;
            note_configuration(instance, reread.as_ref())?;
            Ok((control, scrapes, prepared))
        };
        match prepared.await {
            Ok((control, scrapes, prepared)) => {
                drop(everyone);
                let daemon = Self {
                    config: config.clone(),
                    reread,
                    plan: prepared.plan,
                    host,
                    journal,
                    lock,
                    datapath: prepared.datapath,
                    tables: prepared.tables,
                    logs: prepared.logs,
                    events,
                    control,
                    sweep: Sweep::new(config.sweep_interval),
                    pressure: Pressure::default(),
                    answers: answers(config),
                    nat_log: prepared.nat_log,
                    dhcp: dhcp::Servers::default(),
                    dhcpv6: dhcpv6::Servers::default(),
                    routers: Routers::default(),
                    names: Arc::default(),
                    scrapes: None,
                    known: prepared.known,
                    six: prepared.six,
                    hooks: prepared.hooks,
                    drivers: prepared.drivers,
                    told: prepared.told,
                    retry: Retry::default(),
                };
                Ok((daemon, scrapes))
            }
            Err(error) => {
                let reverted = if adopting {
                    journal.return_to(mark, &host).await.map(|_| ())
                } else {
                    take_away(journal, &host, lock, everyone).await
                };
                if let Err(error) = reverted {
                    warn(&format!("{error:#}"));
                }
                Err(error)
            }
        }
    }

    /// From here on a mistake of ours can do only what the instance itself does.
    fn give_up_privileges(&self) -> Result<()> {
        let pins = self.host.pin_directory();
        let circumstances = Circumstances {
            unmounts: mounted_bpffs(),
            pins_elsewhere: pins.is_some_and(|path| bpffs::is_elsewhere(&path)),
        };
        capabilities::give_up(circumstances, || {
            self.reread
                .as_ref()
                .is_none_or(|reread| (reread.read)().is_ok())
        })
    }

    /// What is translated, in a line.
    fn summary(&self) -> String {
        let insides: Vec<_> = self
            .plan
            .insides
            .iter()
            .map(|inside| format!("{} {}", inside.device_name(), inside.networks))
            .collect();
        let outside = self.known.outside.iter().map(|address| (*address).into());
        let six = self.six.iter().flat_map(|six| &six.known.outside);
        let outside: Vec<_> = outside
            .chain(six.map(|address| (*address).into()))
            .map(|address: IpAddr| address.to_string())
            .collect();
        format!(
            "{} -> {} {}",
            insides.join(", "),
            self.plan.uplink.name,
            outside.join(", ")
        )
    }

    /// Tells whoever waits that packets are translated.
    fn announce(&self) -> Result<()> {
        let summary = self.summary();
        // Not by a buffer, which would say it after all when the process has ended for want of that.
        let print = || -> io::Result<()> {
            let mut output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
            output.write_all(format!("tapnat ready: {summary}\n").as_bytes())
        };
        match print() {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(error).context("cannot write to the standard output");
            }
            _ => {}
        }
        systemd::ready(&summary)
    }

    /// Follows the network until a signal comes.
    async fn serve(&mut self, signals: &mut Signals) {
        loop {
            tokio::select! {
                asked = signals.received() => match asked {
                    Asked::End => return,
                    Asked::Reload => match self.reload().await {
                        Ok(notes) => notes.iter().for_each(|note| tell(note)),
                        Err(error) => warn(&format!("{error:#}")),
                    },
                },
                () = self.events.changed() => self.follow().await,
                () = self.retry.due() => self.follow().await,
                pending = self.control.next() => {
                    let result = self.perform(&pending.request).await;
                    pending.answer(result);
                }
                () = self.sweep.due() => {
                    if let Err(error) = self.sweep.step(&self.tables, &self.datapath, now()) {
                        warn(&format!("{error:#}"));
                    }
                }
                () = six_due(self.six.as_ref()) => {
                    if let Some(six) = &mut self.six
                        && let Err(error) = six.step(&self.tables, &self.datapath)
                    {
                        warn(&format!("{error:#}"));
                    }
                }
                () = due(self.six.as_ref().and_then(|six| six.answers.as_ref())) => {
                    if let Some(six) = &mut self.six
                        && let Err(error) = six.answer()
                    {
                        warn(&format!("{error:#}"));
                    }
                }
                () = self.pressure.due() => {
                    let Self { pressure, tables, sweep, six, .. } = self;
                    let relieved = pressure
                        .step(tables, sweep)
                        .and_then(|()| six.as_mut().map_or(Ok(()), Six::relieve));
                    if let Err(error) = relieved {
                        warn(&format!("{error:#}"));
                    }
                }
                () = log_due(self.nat_log.as_ref()) => {
                    if let Some(log) = &mut self.nat_log
                        && let Err(error) = log.step(&self.tables)
                    {
                        warn(&format!("{error:#}"));
                    }
                }
                () = due(self.answers.as_ref()) => {
                    if let Some(answers) = &mut self.answers
                        && let Err(error) = answers.step(&mut self.tables, now())
                    {
                        warn(&format!("{error:#}"));
                    }
                }
                () = print(&mut self.logs) => {}
            }
        }
    }

    /// Serves the guests of the devices that there are.
    async fn settle_guests(&mut self) {
        let mtu_of = |index| {
            let mut devices = self.known.devices.iter();
            devices
                .find(|(known, device)| *known == index && device.ethernet != 0)
                .map(|(_, device)| device.mtu)
        };
        let insides = || {
            let insides = self.plan.insides.iter();
            insides.filter_map(|inside| Some((inside.link.as_ref()?, inside.networks)))
        };
        let mut hosts: Vec<_> = insides()
            .filter_map(|(link, networks)| {
                Some(dhcp::Served {
                    name: link.name.clone(),
                    index: link.index,
                    address: networks.ipv4?.addr(),
                    network: networks.guests_ipv4()?,
                    mtu: mtu_of(link.index)?,
                })
            })
            .collect();
        let mut routers: Vec<_> = insides()
            .filter_map(|(link, networks)| {
                Some(router::Served {
                    name: link.name.clone(),
                    index: link.index,
                    address: networks.ipv6?,
                    link_local: link.link_local()?,
                    link_address: link.mac,
                    mtu: link.mtu,
                    managed: self.config.dhcp && link.mac.is_some(),
                })
            })
            .collect();
        let mut managed: Vec<_> = routers
            .iter()
            .filter_map(|router| {
                Some(dhcpv6::Served {
                    name: router.name.clone(),
                    index: router.index,
                    address: router.address,
                    link_address: router.link_address?,
                })
            })
            .collect();
        let (config, names) = (&self.config, &self.names);
        let gateways: Vec<_> = hosts
            .iter()
            .map(dhcp::Served::gateway)
            .chain(routers.iter().map(router::Served::gateway))
            .collect();
        let mut notes = names.settle(&gateways, &config.resolvers(), &config.deny);
        if !config.dhcp {
            hosts.clear();
            managed.clear();
        }
        if !config.router_advertisements {
            routers.clear();
        }
        let domain = config.domain.as_deref();
        notes.extend(self.dhcp.settle(&hosts, domain, names).await);
        notes.extend(self.dhcpv6.settle(&managed, domain, names).await);
        let advice = router::Advice {
            domain: config.domain.clone(),
            nat64: config.nat64.map(|nat64| nat64.net),
        };
        notes.extend(self.routers.settle(&routers, &advice, names).await);
        for note in notes {
            warn(&note);
        }
    }

    /// Tells scrapers what the instance does, from now on. Not before privileges are given up: the
    /// threads that this takes have what the process has.
    fn answer_scrapes(&mut self, scrapes: Option<Scrapes>) {
        let Some(root) = bpffs::find() else {
            return;
        };
        let instance = self.config.instance.clone();
        let directory = Pins::new(&instance, &root).tables();
        let text = move || {
            let tables = BothTables::open(&directory)
                .map_err(|reason| reason.explain(&instance, &directory))?;
            metrics::text(&instance, &tables)
        };
        self.scrapes = scrapes.map(|scrapes| Answering::begin(scrapes, Arc::new(text)));
    }

    /// Puts the outside addresses that are missing on the uplink, and takes those away that it no
    /// longer needs.
    async fn settle_addresses(&mut self) -> Result<Vec<String>> {
        let wanted = wanted_addresses(&self.config, &self.tables, self.six.as_ref())?;
        let uplink = self.plan.uplink.device();
        pool::settle(&wanted, &[], &uplink, &self.host, &mut self.journal).await
    }

    /// Does what a command asks for.
    async fn perform(&mut self, request: &Request) -> Result<Vec<String>> {
        if *request == Request::Reload {
            return self.reload().await;
        }
        let six = self.six.as_mut().map(|six| &mut six.tables);
        let mut notes = control::perform(&mut self.tables, six, &self.datapath, request)?;
        notes.extend(self.settle_addresses().await?);
        let six = self.six.as_ref();
        notes.extend(settle_host_sockets(&mut self.datapath, &self.tables, six));
        Ok(notes)
    }

    /// Takes everything away.
    async fn end(self) -> Result<()> {
        if let Err(error) = systemd::stopping() {
            warn(&format!("{error:#}"));
        }
        control::remove(&self.config.instance)?;
        if let Some(log) = self.nat_log
            && let Err(error) = log.end(&self.tables)
        {
            warn(&format!("{error:#}"));
        }
        self.routers.end().await;
        // Nothing may hold the programs and tables when their pins go.
        drop((self.datapath, self.tables, self.six, self.logs));
        let everyone = Lock::all_instances()?;
        take_away(self.journal, &self.host, self.lock, everyone).await
    }
}

/// Lets the host itself use forwards while there are any. All else works without that.
fn settle_host_sockets(
    datapath: &mut Datapath,
    tables: &PinnedTables,
    six: Option<&Six>,
) -> Option<String> {
    let are_there = || -> Result<bool> {
        let ipv6 = six.map(|six| six.tables.static_mappings()).transpose()?;
        Ok(!tables.static_mappings()?.is_empty() || ipv6.is_some_and(|it| !it.is_empty()))
    };
    are_there()
        .and_then(|wanted| datapath.lead_host_sockets(wanted))
        .err()
        .map(|error| format!("{error:#}"))
}

/// Makes forwards right for the devices and addresses that there are now. Returns what the operator
/// should know, one line each.
fn follow_statics(tables: &mut PinnedTables, six: Option<&mut Six>) -> Result<Vec<String>> {
    let mut notes = statics::follow(tables)?;
    if let Some(six) = six {
        notes.extend(statics::follow(&mut six.tables)?);
    }
    Ok(notes)
}

/// The outside addresses that the operator gave, as opposed to those that the uplink happens to have.
fn wanted_addresses(
    config: &Config,
    tables: &PinnedTables,
    six: Option<&Six>,
) -> Result<Vec<IpAddr>> {
    let mut addresses = config.outside_addresses.clone();
    addresses.extend(pool::of_statics(tables)?);
    if let Some(six) = six {
        addresses.extend(pool::of_statics(&six.tables)?);
    }
    Ok(addresses)
}

/// Who answers connections that nobody asked for, if somebody is to. Without the privilege for it
/// all else still works.
fn answers<A: IpFamily>(config: &Config) -> Option<Answers<A>> {
    if !config.answer_unsolicited {
        return None;
    }
    Answers::open()
        .inspect_err(|error| warn(&format!("{error:#}")))
        .ok()
}

async fn due<A: IpFamily>(answers: Option<&Answers<A>>) {
    match answers {
        Some(answers) => answers.due().await,
        None => std::future::pending().await,
    }
}

async fn log_due(log: Option<&NatLog>) {
    match log {
        Some(log) => log.due().await,
        None => std::future::pending().await,
    }
}

async fn six_due(six: Option<&Six>) {
    match six {
        Some(six) => six.due().await,
        None => std::future::pending().await,
    }
}

async fn print(logs: &mut Option<Logs>) {
    match logs {
        Some(logs) => logs.print().await,
        None => std::future::pending().await,
    }
}

/// Brings the host into the state in which packets are translated.
async fn prepare(config: &Config, host: &RealHost, journal: &mut Journal) -> Result<Prepared> {
    let facts = facts(config, host).await?;
    let plan = facts.plan(config)?;
    uses_tcx(config.attach)?;
    let drivers = Drivers::open()?;
    let chosen = choose_hook(config, &plan.uplink, drivers.as_ref(), &facts.links)?;
    let pins = Pins::new(&config.instance, &bpffs_or_mount()?);
    let left = left_settings(config, &pins)?;
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
    if left.is_none() {
        pins.clear()?;
    }
    let left = left.unwrap_or_default();
    if ipv6 {
        six::forget_small_tables(&pins)?;
    }
    allow_tables();
    let progress = Progress::waiting("the kernel verifies tapnat's programs");
    let mut datapath = Datapath::open(pins.clone(), config, ipv6, &hooks)?;
    drop(progress);
    let logs = config
        .verbose
        .then(|| Logs::read(&mut datapath.open_object()?))
        .transpose()?;
    let mut tables = PinnedTables::open_unfilled(&pins.tables())
        .map_err(|reason| reason.explain(&config.instance, &pins.tables()))?;
    tables.set_devices(&known.devices)?;
    tables.set_denied(&config.deny)?;
    tables.set_untranslated(&config.untranslated)?;
    tables.set_reserved(&reserved(&withheld), &known.outside)?;
    let mut six = ipv6
        .then(|| Six::open(&pins, config, surroundings(config, &plan, &own), &withheld))
        .transpose()?;
    let mut settings = settings(config, &known.outside, &left);
    settings.flags = settings.flags & !Chosen::FLAGS | chosen.flags();
    // Before anything is shown to the firewall, which may be at once.
    let (leaving, arriving): (Vec<_>, Vec<_>) = hooks
        .iter()
        .partition(|hook| hook.direction == Direction::Leaving);
    for hook in leaving {
        attach(&datapath, hook, host, journal).await?;
    }
    tables.set_settings(&settings)?;
    six.as_mut().map_or(Ok(()), |six| six.begin(config))?;
    datapath.set_xdp_devices(&xdp_devices(chosen, &plan, drivers.as_ref()))?;
    for note in follow_statics(&mut tables, six.as_mut())? {
        warn(&note);
    }
    let ipv6 = six.as_mut().map(|six| &mut six.tables);
    statics::configure(&mut tables, ipv6, &datapath, &config.forwards)?;
    // Before the programs that tell it more.
    let nat_log = nat_log(config, &pins, &datapath, &tables)?;
    for hook in arriving {
        attach(&datapath, hook, host, journal).await?;
    }
    // Not before the programs are there: the host would send guests' packets
    // on as they are.
    for (name, family) in forwarded(config, &plan) {
        set_forwarding(name, family, host, journal).await?;
    }
    tell_firewall(config, &mut tables, six.as_mut(), &datapath)?;
    let wanted = wanted_addresses(config, &tables, six.as_ref())?;
    for note in pool::settle(&wanted, &[], &plan.uplink.device(), host, journal).await? {
        warn(&note);
    }
    if let Some(note) = settle_host_sockets(&mut datapath, &tables, six.as_ref()) {
        warn(&note);
    }
    datapath.forget_others(&hooks)?;
    for note in journal.revert_unwanted(host).await? {
        warn(&note);
    }
    Ok(Prepared {
        plan,
        datapath,
        tables,
        logs,
        nat_log,
        known,
        six,
        hooks,
        drivers,
        told,
    })
}

/// What the tables say that an earlier process left, if this one can go on with them.
fn left_settings(config: &Config, pins: &Pins) -> Result<Option<Settings>> {
    let Some(tables) = pins.adoptable()? else {
        return Ok(None);
    };
    check_capacity(config, &tables)?;
    tables.settings().map(Some)
}

/// Kernels before 5.11 count tables as locked memory.
fn allow_tables() {
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    let _ = setrlimit(Resource::Memlock, unlimited);
}

/// Has the firewall asked about sessions that began without it.
fn tell_firewall(
    config: &Config,
    tables: &mut PinnedTables,
    six: Option<&mut Six>,
    datapath: &Datapath,
) -> Result<()> {
    tell_firewall_of(config, tables, datapath)?;
    six.map_or(Ok(()), |six| {
        tell_firewall_of(config, &mut six.tables, datapath)
    })
}

fn tell_firewall_of<A: IpFamily>(
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
enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    /// Whether the host is to forward what arrives on a device.
    fn forwarding(self, device: &str) -> Sysctl {
        match self {
            Self::Ipv4 => Sysctl::forwarding(device),
            Self::Ipv6 => Sysctl::forwarding_ipv6(device),
        }
    }
}

/// The devices from which the host has to forward packets, or to tell where it would.
fn forwarded<'a>(config: &Config, plan: &'a Plan) -> impl Iterator<Item = (&'a str, Family)> {
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

async fn set_forwarding(
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

/// Says for commands where the configuration came from.
fn note_configuration(instance: &InstanceName, reread: Option<&Reread>) -> Result<()> {
    let note = instance.configuration_note();
    let Some(Reread { path, .. }) = reread else {
        // There may have been one before.
        let _ = fs::remove_file(note);
        return Ok(());
    };
    fs::write(&note, path.as_os_str().as_bytes())
        .with_context(|| format!("cannot write {}", note.display()))
}

/// Begins to write the NAT log, if there is to be one, and says where for `tapnat who`.
fn nat_log(
    config: &Config,
    pins: &Pins,
    datapath: &Datapath,
    tables: &PinnedTables,
) -> Result<Option<NatLog>> {
    let note = config.instance.nat_log_note();
    let Some(target) = &config.nat_log else {
        // There is seldom one.
        let _ = fs::remove_file(note);
        return Ok(None);
    };
    let resumes = datapath.resumes_log();
    let log = NatLog::begin(&config.instance, target, &pins.tables(), tables, resumes)?;
    fs::write(&note, target.to_string())
        .with_context(|| format!("cannot write {}", note.display()))?;
    Ok(Some(log))
}

/// The plan again, when every inside device that was asked for by name is there.
async fn with_links(config: &Config, plan: &Plan, host: &RealHost) -> Result<Plan> {
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

async fn facts(config: &Config, host: &RealHost) -> Result<Facts> {
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
async fn prepare_inside(
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
        if inside.lacks(address) {
            journal.make(add, host).await?;
        } else {
            journal.keep(&add);
        }
    }
    let set_up = Change::SetUp { device };
    if link.up {
        journal.keep(&set_up);
        Ok(())
    } else {
        journal.make(set_up, host).await
    }
}

async fn set_sysctl(
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
    if right {
        journal.keep(&change);
        Ok(())
    } else {
        journal.make(change, host).await
    }
}

/// Divides the ports between host and guests, and reserves the guests'. Returns those that no guest
/// may get.
async fn divide_ports(config: &Config, host: &RealHost, journal: &mut Journal) -> Result<PortSet> {
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

fn claims(plan: &Plan, links: &[Link]) -> Vec<Claim> {
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

/// Where programs are attached.
fn hooks(config: &Config, plan: &Plan, links: &[Link], chosen: Chosen) -> Vec<Hook> {
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

fn choose_hook(
    config: &Config,
    uplink: &Link,
    drivers: Option<&Drivers>,
    links: &[Link],
) -> Result<Chosen> {
    let features = drivers.map(|drivers| drivers.features(uplink.index));
    Chosen::new(config.uplink_hook, uplink, features.transpose()?, links)
}

/// The inside devices that frames can be redirected to. A device that takes none would lose them.
fn xdp_devices(chosen: Chosen, plan: &Plan, drivers: Option<&Drivers>) -> Vec<u32> {
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

async fn attach(
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

async fn attach_clsact(
    datapath: &Datapath,
    hook: &Hook,
    host: &RealHost,
    journal: &mut Journal,
) -> Result<()> {
    let device = &hook.device;
    let qdisc = Change::AddClsact {
        device: device.clone(),
    };
    if host.netlink().has_clsact(device).await? {
        journal.keep(&qdisc);
    } else {
        journal.make(qdisc, host).await?;
    }
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

fn check_capacity(config: &Config, tables: &PinnedTables) -> Result<()> {
    let capacity = tables.session_capacity()?;
    ensure!(
        capacity == config.max_sessions,
        "the sessions that are there are in tables for {capacity}, and --max-sessions asks for {}: \
         pass --max-sessions {capacity} to go on with them, or --fresh to end them",
        config.max_sessions
    );
    Ok(())
}

fn reserved(withheld: &PortSet) -> Reserved {
    let mut reserved = Reserved::default();
    for port in withheld.iter() {
        reserved.reserve(port);
    }
    reserved
}

/// What the datapath is told of the configuration. `left` is what it was told before.
fn settings<A: IpFamily>(config: &Config, outside: &[A], left: &Settings<A>) -> Settings<A> {
    let mut settings = Settings {
        abi_version: ABI_VERSION,
        flags: flags::<A>(config) | left.flags & kept_flags(config),
        clamp_mss: config.clamp_mss.unwrap_or(0),
        confirm_after: config.timeouts.confirm_after(),
        timeouts: config.timeouts,
        guest_max_sessions: config.guest_max_sessions.into(),
        guest_new_sessions: config.guest_new_sessions.map_or(0, Into::into),
        guest_max_ports: config.guest_max_ports.into(),
        generation: left.generation.wrapping_add(1),
        filtering_tcp: config.filtering.tcp as u8,
        filtering_udp: config.filtering.udp as u8,
        mapping_tcp: config.mapping.tcp as u8,
        mapping_udp: config.mapping.udp as u8,
        ..Settings::default()
    };
    set_outside(&mut settings, outside);
    settings
}

/// What stays as it is, whatever the configuration says.
fn kept_flags(config: &Config) -> u32 {
    let always = setting_flags::STATIC_ADDRESSES | Chosen::FLAGS;
    match config.firewall {
        Firewall::Bypass => always,
        Firewall::Ask => always | setting_flags::FIREWALL_KNOWS,
    }
}

fn flags<A: IpFamily>(config: &Config) -> u32 {
    let has_own = |nets: &[IpNet]| nets.iter().any(|net| A::from_net(*net).is_some());
    [
        (config.inbound_refresh, setting_flags::INBOUND_REFRESH),
        (config.pass_unsolicited, setting_flags::PASS_UNSOLICITED),
        (has_own(&config.deny), setting_flags::DENY),
        (has_own(&config.untranslated), setting_flags::UNTRANSLATED),
        (config.deny_host, setting_flags::DENY_HOST),
        (config.isolate, setting_flags::ISOLATE),
        (config.route_guests, setting_flags::ROUTE_GUESTS),
        (config.roaming, setting_flags::ROAMING),
        (config.count, setting_flags::COUNTED),
        (
            config.firewall == Firewall::Ask,
            setting_flags::ASK_FIREWALL,
        ),
    ]
    .into_iter()
    .filter_map(|(is_set, flag)| is_set.then_some(flag))
    .sum()
}

fn set_outside<A: IpFamily>(settings: &mut Settings<A>, outside: &[A]) {
    settings.outside = [A::UNSPECIFIED; MAX_OUTSIDE_ADDRESSES];
    settings.outside_count = 0;
    for (place, address) in settings.outside.iter_mut().zip(outside) {
        *place = *address;
        settings.outside_count += 1;
    }
}

/// What the datapath has to know of the network as `links` shows it, of one IP version.
fn surroundings<A: IpFamily>(config: &Config, plan: &Plan, links: &[Link]) -> Surroundings<A> {
    let given = config.outside_addresses.iter();
    let mut outside: Vec<_> = given.filter_map(|it| A::from_ip(*it)).collect();
    if outside.is_empty() {
        let uplink = links.iter().find(|link| link.index == plan.uplink.index);
        outside.extend(uplink.and_then(|it| A::outside(it, &plan.outside_addresses)));
    }
    Surroundings {
        devices: devices(plan, links, outside.first().copied()),
        outside,
    }
}

/// The devices as the datapath has to know them, of one IP version. `outside` is an address that
/// stands for the guests in the world.
fn devices<A: IpFamily>(
    plan: &Plan,
    links: &[Link],
    outside: Option<A>,
) -> Vec<(u32, abi::Device<A>)> {
    let mut devices: Vec<_> = plan
        .insides
        .iter()
        .filter_map(|inside| {
            let link = inside.link_in(links)?;
            // Without a network no address is in it.
            let none = (A::UNSPECIFIED, A::BITS);
            let (address, _) = A::of(&inside.networks).map_or(none, A::host);
            let network = A::guests(&inside.networks).map_or(none, A::parts);
            Some((link.index, device(link, address, network, role::INSIDE)))
        })
        .collect();
    if let Some(uplink) = links.iter().find(|link| link.index == plan.uplink.index) {
        let (address, length) =
            A::primary(uplink).map_or_else(|| (outside.unwrap_or_default(), A::BITS), A::host);
        let uplink_device = device(uplink, address, (address, length), role::UPLINK);
        devices.push((uplink.index, uplink_device));
    }
    devices
}

/// Whether any guest has IPv6.
fn has_ipv6(config: &Config, plan: &Plan) -> bool {
    let is_there = plan
        .insides
        .iter()
        .any(|inside| inside.networks.ipv6.is_some());
    is_there || config.speaks_ipv6()
}

fn device<A: IpFamily>(
    link: &Link,
    address: A,
    (network, prefix_length): (A, u8),
    role: u8,
) -> abi::Device<A> {
    abi::Device {
        address,
        network,
        mask: A::mask(prefix_length),
        mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
        role,
        ethernet: u8::from(link.layer == LinkLayer::Ethernet),
    }
}

/// The datapath's clock.
#[must_use]
pub fn now() -> Instant {
    let now = clock_gettime(ClockId::Monotonic);
    let nanoseconds = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
    Instant::from_nanoseconds(nanoseconds)
}
