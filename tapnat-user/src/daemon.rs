//! The life of an instance: it starts, adopts what an earlier process left, serves until it is told
//! to end, and takes everything away. Owns the order of these steps; each of them is another
//! module's.

mod down;
mod follow;
mod guests;
mod hooks;
mod ipv6;
mod prepare;
mod pressure;
mod reload;
mod retry;
mod settings;
mod signals;
mod six;
mod version;

use std::{
    fs::File,
    io::{self, Write as _},
    net::IpAddr,
    os::{fd::AsFd as _, unix::ffi::OsStrExt as _},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::geteuid;

pub use self::down::down;
use self::{
    down::{check_namespace, take_away, take_away_earlier},
    prepare::prepare,
    retry::Retry,
    signals::{Asked, Signals},
    six::Six,
    version::Version,
};
use crate::{
    changes::RealHost,
    config::Config,
    control::{self, Control, Request},
    datapath::{Datapath, Hook, Pins, check_kernel},
    dhcp, dhcpv6,
    dns::Names,
    files::write_note,
    host::{
        bpffs,
        capabilities::{self, Circumstances},
        events::Events,
        netlink::Netlink,
        systemd,
        xdp::Drivers,
    },
    instance::{InstanceName, Lock, mounted_bpffs},
    journal::Journal,
    logs::Logs,
    metrics::{
        self,
        scrapes::{Answering, Scrapes},
    },
    nat_log::NatLog,
    notice::{tell, warn},
    pool,
    preflight::Plan,
    router::Routers,
    statics,
    tables::{BothTables, PinnedTables},
};

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

/// A running instance.
struct Daemon {
    config: Config,
    reread: Option<Reread>,
    plan: Plan,
    host: RealHost,
    journal: Journal,
    lock: Lock,
    datapath: Datapath,
    four: Version,
    /// What there is for IPv6, if any guest has it.
    six: Option<Six>,
    logs: Option<Logs>,
    events: Events,
    control: Control,
    nat_log: Option<NatLog>,
    dhcp: dhcp::Servers,
    dhcpv6: dhcpv6::Servers,
    routers: Routers,
    names: Arc<Names>,
    scrapes: Option<Answering>,
    /// Where the programs are attached.
    hooks: Vec<Hook>,
    /// Something may be left on devices that are not served any more.
    must_let_go: bool,
    /// Whom to ask about XDP, where the kernel tells.
    drivers: Option<Drivers>,
    /// Warnings that need no repeating.
    told: Vec<String>,
    retry: Retry,
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
                    four: prepared.four,
                    six: prepared.six,
                    logs: prepared.logs,
                    events,
                    control,
                    nat_log: prepared.nat_log,
                    dhcp: dhcp::Servers::default(),
                    dhcpv6: dhcpv6::Servers::default(),
                    routers: Routers::default(),
                    names: Arc::default(),
                    scrapes: None,
                    hooks: prepared.hooks,
                    must_let_go: false,
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
        let outside = self
            .four
            .known
            .outside
            .iter()
            .map(|address| (*address).into());
        let six = self.six.iter().flat_map(|six| &six.version.known.outside);
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
                due = self.four.due() => {
                    if let Err(error) = self.four.step(&due, &self.datapath) {
                        warn(&format!("{error:#}"));
                    }
                }
                due = wait(self.six.as_ref(), Six::due) => {
                    if let Some(six) = &mut self.six
                        && let Err(error) = six.step(&due, &self.four.tables, &self.datapath)
                    {
                        warn(&format!("{error:#}"));
                    }
                }
                () = wait(self.nat_log.as_ref(), NatLog::due) => {
                    if let Some(log) = &mut self.nat_log
                        && let Err(error) = log.step(&self.four.tables)
                    {
                        warn(&format!("{error:#}"));
                    }
                }
                () = wait(self.logs.as_mut(), Logs::print) => {}
            }
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
        let wanted = wanted_addresses(&self.config, &self.four.tables, self.six.as_ref())?;
        let uplink = self.plan.uplink.device();
        pool::settle(&wanted, &[], &uplink, &self.host, &mut self.journal).await
    }

    /// Does what a command asks for.
    async fn perform(&mut self, request: &Request) -> Result<Vec<String>> {
        if *request == Request::Reload {
            return self.reload().await;
        }
        if let Request::AddForward(forward) = request
            && let Some(mistake) = forward.in_vain(&self.config.prefixes)
        {
            bail!("{mistake}");
        }
        let six = self.six.as_mut().map(|six| &mut six.version.tables);
        let done = control::perform(&mut self.four.tables, six, &self.datapath, request)?;
        let mut notes = done.notes;
        match (self.settle_addresses().await, &done.added) {
            (Ok(more), _) => notes.extend(more),
            (Err(error), None) => return Err(error),
            (Err(error), Some(added)) => {
                let six = self.six.as_mut().map(|six| &mut six.version.tables);
                statics::take_back(&mut self.four.tables, six, &self.datapath, added)?;
                // What fails again is tried again when the network changes.
                let _ = self.settle_addresses().await;
                return Err(error);
            }
        }
        let six = self.six.as_ref();
        notes.extend(settle_host_sockets(
            &mut self.datapath,
            &self.four.tables,
            six,
        ));
        Ok(notes)
    }

    /// Takes everything away.
    async fn end(self) -> Result<()> {
        if let Err(error) = systemd::stopping() {
            warn(&format!("{error:#}"));
        }
        control::remove(&self.config.instance)?;
        if let Some(log) = self.nat_log
            && let Err(error) = log.end(&self.four.tables)
        {
            warn(&format!("{error:#}"));
        }
        self.routers.end().await;
        // Nothing may hold the programs and tables when their pins go.
        drop((self.datapath, self.four, self.six, self.logs));
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
        let ipv6 = six
            .map(|six| six.version.tables.static_mappings())
            .transpose()?;
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
        notes.extend(statics::follow(&mut six.version.tables)?);
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
        addresses.extend(pool::of_statics(&six.version.tables)?);
    }
    Ok(addresses)
}

/// Waits for what may not be there.
async fn wait<T, O>(whose: Option<T>, what: impl AsyncFnOnce(T) -> O) -> O {
    match whose {
        Some(it) => what(it).await,
        None => std::future::pending().await,
    }
}

/// Says for commands where the configuration came from.
fn note_configuration(instance: &InstanceName, reread: Option<&Reread>) -> Result<()> {
    let path = reread.map(|it| it.path.as_os_str().as_bytes());
    write_note(&instance.configuration_note(), path)
}
