//! Child processes bounded in time: output captured, killed on drop together
//! with whatever they started.
//!
//! Entering a namespace is a property of the command (see
//! [`Namespace::command`](crate::Namespace::command)); only the network
//! namespace changes, so the child sees the caller's files, /sys/fs/bpf
//! included, which `ip netns exec` would hide.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::Write as _,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::Path,
    process::{Child, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::signal::{Signal, killpg},
    unistd::{Pid, setsid},
};

use crate::{
    cleanup::{self, Registration},
    terminal,
};

/// How long a command may take unless [`Command::timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the rest of the output may take to arrive after the process ended.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);

/// A command to run, here or in a namespace.
#[derive(Debug)]
pub struct Command {
    inner: std::process::Command,
    stdin: Option<Vec<u8>>,
    timeout: Duration,
    grace: Duration,
    inherit_output: bool,
    streams: Option<[Stdio; 3]>,
}

/// What a finished command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// All it wrote to standard output, with invalid UTF-8 replaced.
    pub stdout: String,
    /// All it wrote to standard error, with invalid UTF-8 replaced.
    pub stderr: String,
}

impl Command {
    /// A command that runs in the caller's own namespaces.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            inner: std::process::Command::new(program),
            stdin: None,
            timeout: DEFAULT_TIMEOUT,
            grace: Duration::ZERO,
            inherit_output: false,
            streams: None,
        }
    }

    /// The same command inside a network namespace.
    pub(crate) fn in_namespace(mut self, namespace: Arc<File>) -> Self {
        let enter = move || setns(&*namespace, CloneFlags::CLONE_NEWNET).map_err(Into::into);
        // SAFETY: between fork and exec the closure makes one system call and
        // neither allocates nor locks.
        unsafe { self.inner.pre_exec(enter) };
        self
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.inner.arg(argument);
        self
    }

    /// Adds several arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.inner.args(arguments);
        self
    }

    /// Sets an environment variable for the child.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.inner.env(name, value);
        self
    }

    /// Sets the child's working directory.
    #[must_use]
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.inner.current_dir(directory);
        self
    }

    /// Feeds these bytes to standard input, which is otherwise empty.
    #[must_use]
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(input.into());
        self
    }

    /// Bounds [`run`](Self::run) and [`output`](Self::output).
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// On drop and on a signal the child gets SIGTERM and this much time
    /// before SIGKILL, for programs that clean up after themselves.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Lets the child write to the caller's own output instead of capturing.
    #[must_use]
    pub fn inherit_output(mut self) -> Self {
        self.inherit_output = true;
        self
    }

    /// Gives the child a session of its own with this terminal, for all its streams.
    pub(crate) fn on_terminal(mut self, terminal: &OwnedFd) -> Result<Self> {
        self.streams = Some(terminal::streams(terminal)?);
        let take = || {
            setsid()?;
            // SAFETY: a request on a descriptor of ours that takes no pointer.
            Errno::result(unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) })?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes two system calls and
        // neither allocates nor locks.
        unsafe { self.inner.pre_exec(take) };
        Ok(self)
    }

    /// Starts the command and returns at once.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(mut self) -> Result<Process> {
        let description = describe(&self.inner);
        if let Some([input, output, error]) = self.streams.take() {
            // Its session makes it a group's leader, too.
            self.inner.stdin(input).stdout(output).stderr(error);
        } else {
            let output = || {
                if self.inherit_output {
                    Stdio::inherit()
                } else {
                    Stdio::piped()
                }
            };
            self.inner
                .stdin(if self.stdin.is_some() {
                    Stdio::piped()
                } else {
                    Stdio::null()
                })
                .stdout(output())
                .stderr(output())
                .process_group(0);
        }
        let (mut child, registration) = cleanup::register_child(self.grace, || self.inner.spawn())
            .with_context(|| format!("cannot start `{description}`"))?;
        let stdout = child.stdout.take().map(Stream::follow).unwrap_or_default();
        let stderr = child.stderr.take().map(Stream::follow).unwrap_or_default();
        if let (Some(mut pipe), Some(input)) = (child.stdin.take(), self.stdin) {
            thread::spawn(move || {
                // A child that does not read all its input is free not to.
                let _ = pipe.write_all(&input);
            });
        }
        Ok(Process {
            description,
            child,
            status: None,
            grace: self.grace,
            registration,
            stdout,
            stderr,
        })
    }

    /// Runs the command to its end, whatever its exit status.
    ///
    /// # Errors
    /// The program cannot be started or takes longer than its timeout.
    pub fn output(self) -> Result<Output> {
        let timeout = self.timeout;
        let mut process = self.spawn()?;
        let status = process.wait(timeout)?;
        Ok(Output {
            status,
            stdout: process.stdout(),
            stderr: process.stderr(),
        })
    }

    /// Runs the command to its end and returns its standard output.
    ///
    /// # Errors
    /// The program cannot be started, takes longer than its timeout, or
    /// fails; the error then quotes what it wrote.
    pub fn run(self) -> Result<String> {
        let description = describe(&self.inner);
        let output = self.output()?;
        ensure!(
            output.status.success(),
            "`{description}` failed ({}): {}",
            output.status,
            excerpt(&output.stderr, &output.stdout)
        );
        Ok(output.stdout)
    }
}

/// A running child. Dropping it kills it and all it started.
#[derive(Debug)]
pub struct Process {
    description: String,
    child: Child,
    status: Option<ExitStatus>,
    grace: Duration,
    registration: Registration,
    stdout: Stream,
    stderr: Stream,
}

impl Process {
    /// The process id, in the caller's pid namespace.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Whether the process has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.poll().is_none()
    }

    /// Waits until a line of standard output satisfies `matches`, and returns
    /// that line without its end.
    ///
    /// # Errors
    /// The time is over, or the output ended before such a line came.
    pub fn wait_for_line(
        &mut self,
        timeout: Duration,
        matches: impl Fn(&str) -> bool,
    ) -> Result<String> {
        self.wait_for_line_of(&self.stdout, timeout, matches)
    }

    /// As [`Self::wait_for_line`], but of standard error.
    ///
    /// # Errors
    /// The time is over, or the output ended before such a line came.
    pub fn wait_for_error_line(
        &mut self,
        timeout: Duration,
        matches: impl Fn(&str) -> bool,
    ) -> Result<String> {
        self.wait_for_line_of(&self.stderr, timeout, matches)
    }

    fn wait_for_line_of(
        &self,
        stream: &Stream,
        timeout: Duration,
        matches: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let found = stream.wait(timeout, |content| {
            content
                .text
                .split_inclusive(|byte| *byte == b'\n')
                .find_map(|line| {
                    let line = String::from_utf8_lossy(line);
                    let line = line.strip_suffix('\n')?;
                    matches(line).then(|| line.to_owned())
                })
        });
        match found {
            Some(line) => Ok(line),
            None => bail!(
                "`{}` did not print the awaited line within {timeout:?}: {}",
                self.description,
                excerpt(&self.stderr(), &self.stdout())
            ),
        }
    }

    /// Waits for the process to end.
    ///
    /// # Errors
    /// It takes longer than `timeout`; it then goes on running.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.poll() {
                self.stdout.wait_for_end();
                self.stderr.wait_for_end();
                return Ok(status);
            }
            ensure!(
                start.elapsed() < timeout,
                "`{}` took longer than {timeout:?}: {}",
                self.description,
                excerpt(&self.stderr(), &self.stdout())
            );
            let pause = (start.elapsed() / 10).max(Duration::from_micros(200));
            thread::sleep(pause.min(Duration::from_millis(10)));
        }
    }

    /// Sends a signal to the process and what it started.
    ///
    /// # Errors
    /// It has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        ensure!(
            self.is_running(),
            "`{}` has ended already",
            self.description
        );
        killpg(self.leader(), signal)
            .with_context(|| format!("cannot send {signal} to `{}`", self.description))
    }

    /// Asks the process to end with SIGTERM and waits for it.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        if self.is_running() {
            self.signal(Signal::SIGTERM)?;
        }
        self.wait(timeout)
    }

    fn leader(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn poll(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() && cleanup::has_exited(self.leader()) {
            self.reap();
        }
        self.status
    }

    /// Kills what is left of the group, and only then lets go of its number.
    fn reap(&mut self) {
        let leader = self.leader();
        let child = &mut self.child;
        self.status = self.registration.finish(|| {
            let _ = killpg(leader, Signal::SIGKILL);
            child.wait().ok()
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.poll().is_some() {
            return;
        }
        if !self.grace.is_zero() {
            let _ = killpg(self.leader(), Signal::SIGTERM);
            let start = Instant::now();
            while start.elapsed() < self.grace && !cleanup::has_exited(self.leader()) {
                thread::sleep(Duration::from_millis(5));
            }
        }
        self.reap();
    }
}

#[derive(Debug, Default)]
struct Content {
    text: Vec<u8>,
    open: bool,
}

/// One output of a child, gathered by a thread.
#[derive(Debug, Default, Clone)]
struct Stream(Arc<(Mutex<Content>, Condvar)>);

impl Stream {
    fn follow(mut pipe: impl std::io::Read + Send + 'static) -> Self {
        let stream = Self::default();
        stream.content().open = true;
        let writer = stream.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            loop {
                let length = match pipe.read(&mut buffer) {
                    Ok(length) => length,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(_) => 0,
                };
                let mut content = writer.content();
                content.text.extend_from_slice(&buffer[..length]);
                content.open = length > 0;
                drop(content);
                writer.0.1.notify_all();
                if length == 0 {
                    break;
                }
            }
        });
        stream
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.content().text).into_owned()
    }

    fn wait<T>(&self, timeout: Duration, mut find: impl FnMut(&Content) -> Option<T>) -> Option<T> {
        let end = Instant::now() + timeout;
        let mut content = self.content();
        loop {
            let found = find(&content);
            let left = end.saturating_duration_since(Instant::now());
            if found.is_some() || !content.open || left.is_zero() {
                return found;
            }
            content = self
                .0
                .1
                .wait_timeout(content, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn wait_for_end(&self) {
        self.wait(OUTPUT_GRACE, |content| (!content.open).then_some(()));
    }
}

fn describe(command: &std::process::Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsString::from)
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The end of what a program wrote, short enough for an error message.
fn excerpt(stderr: &str, stdout: &str) -> String {
    let text = if stderr.trim().is_empty() {
        stdout
    } else {
        stderr
    }
    .trim();
    let skip = text.chars().count().saturating_sub(2000);
    if text.is_empty() {
        "no output".to_owned()
    } else {
        text.chars().skip(skip).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_input_are_passed() {
        let output = Command::new("sh")
            .args(["-c", "cat; echo oops >&2; exit 3"])
            .stdin("hello")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("hello", "oops\n")
        );
    }

    #[test]
    fn failure_quotes_what_the_command_said() {
        let error = Command::new("sh")
            .args(["-c", "echo because >&2; exit 1"])
            .run()
            .unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
    }

    #[test]
    fn a_command_over_its_time_is_killed_with_its_children() {
        let marker = format!("{}.5", 60_000 + std::process::id());
        let script = format!("sleep {marker} & sleep {marker}; true");
        let error = Command::new("sh")
            .args(["-c", &script])
            .timeout(Duration::from_millis(200))
            .run()
            .unwrap_err();
        assert!(error.to_string().contains("took longer"), "{error}");
        let is_alive = || {
            std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                std::fs::read(entry.path().join("cmdline"))
                    .is_ok_and(|line| line == format!("sleep\0{marker}\0").as_bytes())
            })
        };
        // The signal is sent by now, and takes effect in its own time.
        let start = Instant::now();
        while is_alive() {
            assert!(
                start.elapsed() < DEFAULT_TIMEOUT,
                "the command's child outlived it"
            );
        }
    }

    #[test]
    fn lines_can_be_awaited() {
        let mut process = Command::new("sh")
            .args(["-c", "echo one; echo ready 7; sleep 60"])
            .spawn()
            .unwrap();
        let line = process
            .wait_for_line(Duration::from_secs(10), |line| line.starts_with("ready"))
            .unwrap();
        assert_eq!(line, "ready 7");
        assert!(process.is_running());
        let status = process.terminate(Duration::from_secs(10)).unwrap();
        assert!(!status.success());
    }

    #[test]
    fn waiting_for_a_line_ends_with_the_output() {
        let mut process = Command::new("sh").args(["-c", "echo one"]).spawn().unwrap();
        assert!(
            process
                .wait_for_line(Duration::from_mins(1), |line| line == "two")
                .is_err()
        );
    }
}
