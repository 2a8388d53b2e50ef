//! Prints what the datapath logs (`tapnat run -v`) to the standard error.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use tokio::io::{Interest, unix::AsyncFd};

/// Prints records as lines.
#[derive(Debug)]
struct Lines;

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // Nobody reads: that must not stop the packets.
        let _ = writeln!(io::stderr(), "tapnat: {}", record.args());
    }

    fn flush(&self) {}
}

/// The datapath's log. Must live until the programs are loaded, and is worth reading after.
pub struct Logs {
    reader: AsyncFd<EbpfLogger<Lines>>,
}

impl Logs {
    /// Begins to read. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the datapath has no log.
    pub fn read(ebpf: &mut Ebpf) -> Result<Self> {
        let logger =
            EbpfLogger::init_with_logger(ebpf, Lines).context("cannot read the datapath's log")?;
        // SAFETY: the logger owns its descriptor and gives out the same one until it is dropped.
        let reader = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
            .context("cannot read the datapath's log")?;
        Ok(Self { reader })
    }

    /// Waits for records and prints them.
    pub async fn print(&mut self) {
        match self.reader.readable_mut().await {
            Ok(mut ready) => {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
            Err(_) => std::future::pending().await,
        }
    }
}
