//! The processor that everything of one measurement runs on.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

/// Binds the calling thread, and so the packets that it sends, to the last processor, and lets
/// nothing ordinary interrupt it: for short measurements in a thread that ends with them.
///
/// # Errors
///
/// When the kernel refuses.
pub fn occupy() -> Result<()> {
    let processors = thread::available_parallelism().context("cannot count the processors")?;
    let mut set = CpuSet::new();
    set.set(processors.get() - 1)
        .context("cannot name the last processor")?;
    sched_setaffinity(Pid::from_raw(0), &set).context("cannot bind to a processor")?;
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters outlive the call, and 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    nix::errno::Errno::result(result).context("cannot become a real-time thread")?;
    Ok(())
}

/// The processor's time that the calling thread has used, in the kernel too.
///
/// # Errors
///
/// Never, on Linux.
pub fn time_used() -> Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .context("cannot read the thread's clock")?;
    Ok(time.into())
}
