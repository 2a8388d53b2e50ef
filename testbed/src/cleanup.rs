//! What must go when this process goes: child processes, directories and
//! namespaces, removed on drop, while a panic unwinds, and on a signal.
//!
//! It owns the one process-wide list and the signal handler. It does not know
//! how these things were made, and it cannot help against SIGKILL: what that
//! leaves behind is swept by the next run (see `namespace`).

use std::{
    collections::BTreeSet,
    fs, io,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, Once, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM},
    iterator::Signals,
};

/// One thing to remove. The order is that of removal: what runs in a namespace
/// ends before the namespace does.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Leftover {
    /// A process group with its leader our child, which gets SIGTERM and this
    /// much time before SIGKILL (none: SIGKILL at once).
    ProcessGroup {
        leader: i32,
        grace: Duration,
    },
    Directory(PathBuf),
    Namespace(String),
    /// A parameter of the kernel with the value that it had.
    Setting {
        path: PathBuf,
        before: String,
    },
}

static LEFTOVERS: Mutex<BTreeSet<Leftover>> = Mutex::new(BTreeSet::new());
static HANDLER: Once = Once::new();
static ACTIONS: Mutex<Option<Actions>> = Mutex::new(None);

type Action = Box<dyn FnOnce() + Send>;

struct Actions {
    before: Action,
    after: Action,
}

/// What to do when a signal ends this process, before and after everything is
/// removed: for a program that has a terminal to put in order and something to
/// say. Neither may start a command or make anything of this crate, which
/// would wait for ever.
pub fn at_signal(before: impl FnOnce() + Send + 'static, after: impl FnOnce() + Send + 'static) {
    let actions = Actions {
        before: Box::new(before),
        after: Box::new(after),
    };
    *ACTIONS.lock().unwrap_or_else(PoisonError::into_inner) = Some(actions);
}

/// Keeps a thing on the list; removes the thing when dropped.
#[derive(Debug)]
pub(crate) struct Registration(Leftover);

fn leftovers() -> MutexGuard<'static, BTreeSet<Leftover>> {
    LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts a thing on the list of what goes with this process.
pub(crate) fn register(leftover: Leftover) -> Registration {
    HANDLER.call_once(install_handler);
    leftovers().insert(leftover.clone());
    Registration(leftover)
}

/// Starts a child and puts it on the list, with no time between them in which
/// a signal would miss it.
pub(crate) fn register_child(
    grace: Duration,
    start: impl FnOnce() -> io::Result<Child>,
) -> io::Result<(Child, Registration)> {
    HANDLER.call_once(install_handler);
    let mut list = leftovers();
    let child = start()?;
    let leftover = Leftover::ProcessGroup {
        leader: child.id().cast_signed(),
        grace,
    };
    list.insert(leftover.clone());
    Ok((child, Registration(leftover)))
}

impl Registration {
    /// Takes the thing off the list, running `finish` before a signal can
    /// look at the list again: for a child that is about to be reaped, whose
    /// number may then be another process's.
    pub(crate) fn finish<T>(&self, finish: impl FnOnce() -> T) -> T {
        let mut list = leftovers();
        list.remove(&self.0);
        finish()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut list = leftovers();
        if list.remove(&self.0) {
            remove(&self.0);
        }
    }
}

fn install_handler() {
    // Without the handler a signal still ends the process; only the removal
    // is then left to the next run's sweep.
    let Ok(mut signals) = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM]) else {
        return;
    };
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            // The lock is never given back: no other thread may make anything
            // new between the removal and the end of the process.
            let list = leftovers();
            let actions = ACTIONS
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            match actions {
                Some(Actions { before, after }) => {
                    before();
                    remove_all(&list);
                    after();
                }
                None => remove_all(&list),
            }
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
}

fn remove_all(list: &BTreeSet<Leftover>) {
    let groups = || {
        list.iter().filter_map(|leftover| match leftover {
            Leftover::ProcessGroup { leader, grace } => Some((Pid::from_raw(*leader), *grace)),
            Leftover::Directory(_) | Leftover::Namespace(_) | Leftover::Setting { .. } => None,
        })
    };
    for (leader, grace) in groups() {
        if !grace.is_zero() {
            let _ = killpg(leader, Signal::SIGTERM);
        }
    }
    let start = Instant::now();
    for (leader, grace) in groups() {
        while start.elapsed() < grace && !has_exited(leader) {
            thread::sleep(Duration::from_millis(10));
        }
    }
    for leftover in list {
        remove(leftover);
    }
}

fn remove(leftover: &Leftover) {
    // Nobody is left to tell about a failure, and the next run sweeps.
    match leftover {
        Leftover::ProcessGroup { leader, .. } => {
            let _ = killpg(Pid::from_raw(*leader), Signal::SIGKILL);
        }
        Leftover::Directory(path) => {
            let _ = fs::remove_dir_all(path);
        }
        Leftover::Setting { path, before } => {
            let _ = fs::write(path, before);
        }
        Leftover::Namespace(name) => {
            let _ = Command::new("ip")
                .args(["netns", "delete", name])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Whether our child has ended (it may still wait to be reaped).
pub(crate) fn has_exited(child: Pid) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    !matches!(waitid(Id::Pid(child), flags), Ok(WaitStatus::StillAlive))
}
