//! The signals that a process of an instance listens to.

use std::io::{self, IsTerminal as _};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
pub(super) enum Asked {
    End,
    Reload,
}

/// The signals that the process listens to.
pub(super) struct Signals {
    ends: [Signal; 2],
    hangup: Signal,
    can_reload: bool,
    had_terminal: bool,
}

impl Signals {
    pub fn new(can_reload: bool) -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            ends: [
                listen(SignalKind::interrupt())?,
                listen(SignalKind::terminate())?,
            ],
            hangup: listen(SignalKind::hangup())?,
            can_reload,
            had_terminal: io::stdin().is_terminal(),
        })
    }

    pub async fn received(&mut self) -> Asked {
        let [interrupt, terminate] = &mut self.ends;
        tokio::select! {
            _ = interrupt.recv() => Asked::End,
            _ = terminate.recv() => Asked::End,
            _ = self.hangup.recv() => self.hung_up(),
        }
    }

    /// The same signal says that the terminal is gone, and that the file is to be read again.
    fn hung_up(&self) -> Asked {
        if self.can_reload && self.had_terminal == io::stdin().is_terminal() {
            Asked::Reload
        } else {
            Asked::End
        }
    }
}
