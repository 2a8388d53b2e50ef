//! When the table of sessions fills up, those that nobody has answered in go first: they are what
//! floods and scans leave. The datapath ends them early for as long as this says so.

use std::time::Duration;

use anyhow::Result;
use tapnat_common::time::Ticks;
use tokio::time::{Instant as Timer, sleep_until};

use crate::{clock::now, family::IpFamily, notice::warn, sweep::Sweep, tables::PinnedTables};

const PERIOD: Duration = Duration::from_secs(1);
/// How long a session lives then in which nobody answers. Whoever still waits for an answer sends
/// again, which begins the session anew, from the same outside endpoint.
const UNANSWERED: Ticks = Ticks::from_seconds(10);

/// Whether there is room for sessions.
#[derive(Debug)]
pub(super) struct Pressure {
    next: Timer,
    is_on: bool,
}

impl Default for Pressure {
    fn default() -> Self {
        Self {
            next: Timer::now(),
            is_on: false,
        }
    }
}

impl Pressure {
    /// Waits until it is time to look.
    pub(super) async fn due(&self) {
        sleep_until(self.next).await;
    }

    /// Looks how full the table is, and has what is over collected at once if it is. Tells the
    /// datapath that somebody does.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn step<A: IpFamily>(
        &mut self,
        tables: &mut PinnedTables<A>,
        sweep: &mut Sweep<A>,
    ) -> Result<()> {
        self.next = Timer::now() + PERIOD;
        tables.attend(now())?;
        let capacity = u64::from(tables.session_capacity()?);
        // Each session counts on its guest, and those between guests on both.
        let guests = tables.guests()?;
        let used: u64 = guests
            .iter()
            .map(|(_, guest)| u64::from(guest.sessions))
            .sum();
        let is_on = is_on(self.is_on, used, capacity);
        if is_on && !self.is_on {
            warn(&format!(
                "{used} of {capacity} sessions are in use: those that nobody answers in end after {} \
                 seconds until there is room again",
                UNANSWERED.milliseconds() / 1000
            ));
        }
        self.is_on = is_on;
        let unanswered = if is_on { UNANSWERED } else { Ticks::new(0) };
        let mut settings = tables.settings()?;
        // A reload sets it back.
        if settings.timeouts.unanswered != unanswered {
            settings.timeouts.unanswered = unanswered;
            tables.set_settings(&settings)?;
        }
        sweep.press(is_on);
        Ok(())
    }
}

/// From three quarters on, until it is less than a half.
fn is_on(was_on: bool, used: u64, capacity: u64) -> bool {
    used * 4 >= capacity * 3 || (was_on && used * 2 >= capacity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_later_than_it_begins() {
        for (was_on, used, now) in [
            (false, 74, false),
            (false, 75, true),
            (true, 74, true),
            (true, 50, true),
            (true, 49, false),
            (false, 0, false),
        ] {
            assert_eq!(is_on(was_on, used, 100), now, "{used}");
        }
    }
}
