//! System calls that fail, or that a process is killed at: the program under `strace`, which
//! injects faults. Owns which calls are worth it, and what is passed to `strace`; what must
//! come of a fault is the tests' to say.

use std::{
    collections::{BTreeSet, HashMap},
    env, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::process::{Command, Process};

use crate::instance::PATIENCE;

/// The calls by which the program and the rest of the system touch each other. What reads and
/// what waits is left out, but for what finds out whether something is there.
const CALLS: &str = "bind,bpf,capset,clone3,connect,ftruncate,ioctl,listen,mkdir,mount,\
                     openat,prctl,rename,rmdir,sendto,setsockopt,socket,unlink,unlinkat,write";

/// What the process writes to wake itself up, which never fails.
const WAKE_UP: &str = r#""\1\0\0\0\0\0\0\0", 8"#;

/// A place in a run of the program: a call, and which of its kind it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub call: String,
    /// From 1.
    pub number: usize,
    /// As `strace` prints it.
    pub line: String,
}

impl Step {
    /// Whether something outside the process is another after the call than before.
    #[must_use]
    pub fn changes_something(&self) -> bool {
        let says = |words: &[&str]| words.iter().any(|word| self.line.contains(word));
        match self.call.as_str() {
            "mkdir" | "mount" | "rename" | "rmdir" | "unlink" | "unlinkat" | "write" => true,
            "openat" => says(&["O_CREAT"]),
            "bind" => says(&["AF_UNIX"]),
            "ioctl" => says(&["TUNSET"]),
            "sendto" => says(&["RTM_NEW", "RTM_SET", "RTM_DEL"]),
            "bpf" => says(&["BPF_OBJ_PIN", "BPF_LINK_CREATE", "BPF_LINK_UPDATE"]),
            _ => false,
        }
    }

    /// What the call says when it cannot do it: something that it does say.
    #[must_use]
    pub fn error(&self) -> &'static str {
        match self.call.as_str() {
            "bpf" if self.line.contains("BPF_PROG_LOAD") => "EINVAL",
            "bpf" | "socket" => "ENOMEM",
            "write" | "openat" | "mkdir" | "ftruncate" => "ENOSPC",
            "bind" | "listen" => "EADDRINUSE",
            "sendto" => "ENOBUFS",
            "clone3" => "EAGAIN",
            "rename" | "unlink" | "unlinkat" | "rmdir" => "EIO",
            _ => "EPERM",
        }
    }

    /// The call and what it is about, without numbers that differ from call to call.
    fn kind(&self) -> String {
        self.line
            .split_once(" = ")
            .map_or(self.line.as_str(), |(call, _)| call)
            .split(", ")
            .filter(|word| !word.contains("0x") && !word.contains("nlmsg_seq"))
            // Tables are made in any order.
            .map(|word| word.split_once("/maps/").map_or(word, |(path, _)| path))
            .map(|word| word.split_once("CAP_").map_or(word, |(call, _)| call))
            .collect::<Vec<_>>()
            .join(", ")
            .chars()
            .filter(|letter| !letter.is_ascii_digit())
            .take(120)
            .collect()
    }
}

/// The first and the last step of each kind.
#[must_use]
pub fn ends_of_each_kind(steps: &[Step]) -> Vec<Step> {
    let mut ends: HashMap<String, [usize; 2]> = HashMap::new();
    for (place, step) in steps.iter().enumerate() {
        ends.entry(step.kind()).or_insert([place; 2])[1] = place;
    }
    let places: BTreeSet<usize> = ends.into_values().flatten().collect();
    places
        .into_iter()
        .filter_map(|place| steps.get(place).cloned())
        .collect()
}

/// Where `strace` writes, removed with it.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
}

impl Default for Trace {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Trace {
    #[must_use]
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("tapnat-trace-{}-{number}", std::process::id());
        Self {
            path: env::temp_dir().join(name),
        }
    }

    /// What to put before a command line so that the calls are recorded.
    #[must_use]
    pub fn recorder(&self) -> Vec<String> {
        let mut arguments = self.common();
        // Others are not even stopped.
        arguments.push("--seccomp-bpf".to_owned());
        arguments
    }

    /// What to put before a command line so that the process is killed at the step.
    #[must_use]
    pub fn killer(&self, step: &Step) -> Vec<String> {
        let Step { call, number, .. } = step;
        // Without seccomp, with which `strace` sends no signal.
        let mut arguments = self.common();
        arguments.push(format!("--inject={call}:signal=SIGKILL:when={number}"));
        arguments
    }

    /// What to put before a command line so that the step fails; `onwards`: so do all of its
    /// kind after it.
    #[must_use]
    pub fn breaker(&self, step: &Step, onwards: bool) -> Vec<String> {
        let mut arguments = self.recorder();
        arguments.push(format!(
            "{}{}",
            failure(step),
            if onwards { "+" } else { "" }
        ));
        arguments
    }

    /// What to put before a command line so that the file cannot be opened at these times, as
    /// `strace` counts them (`3`, `1+`).
    #[must_use]
    pub fn locker(&self, file: &str, when: &str) -> Vec<String> {
        let mut arguments = self.recorder();
        arguments.push(format!("--trace-path={file}"));
        arguments.push(format!("--inject=openat:error=EIO:when={when}"));
        arguments
    }

    /// Records the calls of a process that runs, until what is returned ends.
    ///
    /// # Errors
    /// It cannot be attached to.
    pub fn record(&self, process: u32) -> Result<Process> {
        self.attach(process, None)
    }

    /// Lets the step of a process that runs fail, counted from now on.
    ///
    /// # Errors
    /// It cannot be attached to.
    pub fn break_step(&self, process: u32, step: &Step) -> Result<Process> {
        self.attach(process, Some(failure(step)))
    }

    fn attach(&self, process: u32, more: Option<String>) -> Result<Process> {
        let mut arguments = self.common();
        arguments.push(format!("--attach={process}"));
        arguments.extend(more);
        let (program, arguments) = arguments.split_first().context("no command")?;
        let mut strace = Command::new(program).args(arguments).spawn()?;
        strace.wait_for_error_line(PATIENCE, |line| line.contains("attached"))?;
        Ok(strace)
    }

    fn common(&self) -> Vec<String> {
        let path = self.path.display().to_string();
        let calls = format!("--trace={CALLS}");
        ["strace", "-f", "--output", &path, &calls]
            .map(str::to_owned)
            .into()
    }

    /// The steps of the program's first thread, in their order.
    ///
    /// # Errors
    /// There is no record.
    pub fn steps(&self) -> Result<Vec<Step>> {
        let text = read(&self.path)?;
        let (first, _) = text.split_once(' ').context("nothing was recorded")?;
        let mut counts: HashMap<&str, usize> = HashMap::new();
        let mut steps = Vec::new();
        for line in text.lines() {
            let Some(line) = line.strip_prefix(first).map(str::trim_start) else {
                continue;
            };
            let Some((call, _)) = line.split_once('(').filter(|(call, _)| is_name(call)) else {
                continue;
            };
            let number = counts.entry(call).or_default();
            *number += 1;
            if line.contains(WAKE_UP) {
                continue;
            }
            steps.push(Step {
                call: call.to_owned(),
                number: *number,
                line: line.to_owned(),
            });
        }
        ensure!(!steps.is_empty(), "nothing was recorded: {text}");
        Ok(steps)
    }
}

fn failure(step: &Step) -> String {
    let error = step.error();
    let Step { call, number, .. } = step;
    format!("--inject={call}:error={error}:when={number}")
}

fn read(path: &Path) -> Result<String> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn is_name(call: &str) -> bool {
    !call.is_empty()
        && call
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}
