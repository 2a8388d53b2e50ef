//! What the operator is told on the side: notes and warnings. What a command was asked for goes to the
//! standard output, and is its own.

use std::io::{self, Write as _};

use crate::host::systemd;

/// What `journalctl -t` asks for.
const IDENTIFIER: &str = "tapnat";

/// Says what is not as it should be, though it stops nothing, on the standard error.
pub fn warn(message: &str) {
    tell(&format!("warning: {message}"));
}

/// Says what the user should know, on the standard error, or in systemd's journal when that is closed:
/// who started the process, such as QEMU's script, may be gone.
pub fn tell(message: &str) {
    if writeln!(io::stderr(), "tapnat: {message}").is_err()
        && let Ok(journal) = systemd::Journal::open(IDENTIFIER)
    {
        // There is nobody else to tell.
        let _ = journal.write(message);
    }
}
