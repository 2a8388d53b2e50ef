//! What tapnat tells the service manager (`Type=notify`, see `sd_notify(3)`), which is nothing when
//! there is no service manager that wants to know, and its journal.

use std::{io, os::unix::net::UnixDatagram};

use anyhow::{Context as _, Result};
use sd_notify::NotifyState;

/// Says that packets are translated, with a line that `systemctl status` shows.
///
/// # Errors
///
/// When `NOTIFY_SOCKET` is set but cannot be written to.
pub fn ready(status: &str) -> Result<()> {
    sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(status)])
        .context("cannot tell the service manager that tapnat is ready")
}

/// Changes the line that `systemctl status` shows.
///
/// # Errors
///
/// When `NOTIFY_SOCKET` is set but cannot be written to.
pub fn status(status: &str) -> Result<()> {
    sd_notify::notify(&[NotifyState::Status(status)])
        .context("cannot tell the service manager what is translated")
}

/// Says that the configuration is being read again (`Type=notify-reload`); [`ready`] ends that.
///
/// # Errors
///
/// When `NOTIFY_SOCKET` is set but cannot be written to.
pub fn reloading() -> Result<()> {
    NotifyState::monotonic_usec_now()
        .and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now]))
        .context("cannot tell the service manager that tapnat reads its configuration")
}

/// Says that tapnat is taking everything away.
///
/// # Errors
///
/// When `NOTIFY_SOCKET` is set but cannot be written to.
pub fn stopping() -> Result<()> {
    sd_notify::notify(&[NotifyState::Stopping])
        .context("cannot tell the service manager that tapnat is stopping")
}

/// <https://systemd.io/JOURNAL_NATIVE_PROTOCOL>
const JOURNAL: &str = "/run/systemd/journal/socket";

/// The way to systemd's journal.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
    /// What `journalctl -t` asks for.
    identifier: &'static str,
}

impl Journal {
    /// # Errors
    ///
    /// When there is no journal.
    pub fn open(identifier: &'static str) -> Result<Self> {
        let socket = UnixDatagram::unbound().and_then(|socket| {
            socket.connect(JOURNAL)?;
            Ok(socket)
        });
        let socket =
            socket.with_context(|| format!("cannot reach systemd's journal at {JOURNAL}"))?;
        Ok(Self { socket, identifier })
    }

    /// Writes a line.
    ///
    /// # Errors
    ///
    /// When the journal has no room, or has gone.
    pub fn write(&self, line: &str) -> io::Result<()> {
        // A line that has several would have to be written with its length.
        let line = line.replace('\n', " ");
        let identifier = self.identifier;
        let message = format!("MESSAGE={line}\nPRIORITY=6\nSYSLOG_IDENTIFIER={identifier}\n");
        self.socket.send(message.as_bytes()).map(drop)
    }
}
