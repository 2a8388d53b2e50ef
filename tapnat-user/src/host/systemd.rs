//! What tapnat tells the service manager (`Type=notify`, see `sd_notify(3)`). Does nothing when
//! there is no service manager that wants to know.

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
