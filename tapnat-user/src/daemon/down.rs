//! The end of an instance from outside: of the process that serves it, and of what that or one that is
//! gone has changed.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{check_privileges, hooks::choose_hook, prepare::facts};
use crate::{
    changes::RealHost,
    config::Config,
    datapath::uses_tcx,
    host::{
        namespace::NetworkNamespace,
        netlink::{Link, Netlink},
        xdp::Drivers,
    },
    instance::{InstanceName, Lock, unmount_bpffs},
    journal::{Change, Journal},
    notice::warn,
    progress::Progress,
};

/// How long a process that was told to end may take.
const END_TIMEOUT: Duration = Duration::from_secs(30);
const END_POLL: Duration = Duration::from_millis(20);

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
pub(super) async fn end_process(instance: &InstanceName) -> Result<(Lock, bool)> {
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
pub(super) fn check_namespace(instance: &InstanceName, journal: &mut Journal) -> Result<()> {
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
pub(super) async fn take_away(
    mut journal: Journal,
    host: &RealHost,
    lock: Lock,
    everyone: Lock,
) -> Result<()> {
    // What cannot be looked at is told of when it cannot be taken back.
    if let Ok(links) = host.netlink().links().await {
        journal.follow_names(&links)?;
    }
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
pub(super) async fn take_away_earlier(
    config: &Config,
    journal: &mut Journal,
    host: &RealHost,
) -> Result<()> {
    let mut facts = facts(config, host).await?;
    journal.follow_names(&facts.links)?;
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
pub(super) fn without_changes(links: Vec<Link>, journal: &Journal) -> Vec<Link> {
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
            Change::SetUp { .. }
            | Change::SetSysctl { .. }
            | Change::ReservePorts { .. }
            | Change::AddClsact { .. }
            | Change::AddFilter { .. }
            | Change::PinDirectory => {}
        }
    }
    links
}
