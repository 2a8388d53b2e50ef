//! The processor that everything of one measurement runs on: the last one.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

/// Binds the calling thread, and what it starts from then on, to the processor.
///
/// # Errors
///
/// When the kernel refuses.
pub fn bind() -> Result<()> {
    bind_to(last()?)
}

/// Binds the calling thread to another processor than that of the measurement, if there is one.
///
/// # Errors
///
/// When the kernel refuses.
pub fn bind_elsewhere() -> Result<()> {
    bind_to(last()?.saturating_sub(1))
}

/// Binds the calling thread, and so the packets that it sends, to the processor, and lets nothing
/// ordinary interrupt it: for short measurements in a thread that ends with them.
///
/// # Errors
///
/// When the kernel refuses.
pub fn occupy() -> Result<()> {
    bind()?;
    become_real_time()
}

/// The same with another processor than that of the measurement.
///
/// # Errors
///
/// When the kernel refuses.
pub fn occupy_elsewhere() -> Result<()> {
    bind_elsewhere()?;
    become_real_time()
}

/// Lets nothing ordinary interrupt the calling thread and the processes that it starts.
///
/// # Errors
///
/// When the kernel refuses.
pub fn become_real_time() -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters outlive the call, and 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    Errno::result(result).context("cannot become a real-time thread")?;
    Ok(())
}

fn bind_to(processor: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(processor).context("cannot name the processor")?;
    sched_setaffinity(Pid::from_raw(0), &set).context("cannot bind to a processor")
}

fn last() -> Result<usize> {
    // Not `available_parallelism`, which counts what the calling thread is bound to.
    // SAFETY: no preconditions.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(count)
        .ok()
        .and_then(|count| count.checked_sub(1))
        .context("cannot count the processors")
}

/// Measures the processor's time that one thread uses, in the kernel too.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Duration);

impl Stopwatch {
    /// Begins, for the calling thread.
    ///
    /// # Errors
    ///
    /// Never, on Linux.
    pub fn start() -> Result<Self> {
        let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
            .context("cannot read the thread's clock")?;
        Ok(Self(time.into()))
    }

    /// What the thread has used since.
    ///
    /// # Errors
    ///
    /// Never, on Linux.
    pub fn used(self) -> Result<Duration> {
        Ok(Self::start()?.0.saturating_sub(self.0))
    }
}

/// Runs a task in a thread of its own and waits for it, so that what it does to its thread ends
/// with it.
///
/// # Errors
///
/// The task's own.
///
/// # Panics
///
/// When the task does.
pub fn in_thread<T: Send>(task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(task).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
