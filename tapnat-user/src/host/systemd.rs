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

/// Says that tapnat is taking everything away.
///
/// # Errors
///
/// When `NOTIFY_SOCKET` is set but cannot be written to.
pub fn stopping() -> Result<()> {
    sd_notify::notify(&[NotifyState::Stopping])
        .context("cannot tell the service manager that tapnat is stopping")
}
