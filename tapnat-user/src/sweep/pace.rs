//! When the tables are walked. Nothing hangs on it while there is room, so a daemon beside many
//! sessions that nobody begins or ends rests long: walks take half a thousandth of a processor at most.
//! Where what is over may be in somebody's way, a walk comes as soon as the interval is over, and
//! rarer again while it finds nothing. Pure: it sees only what it is told.

use std::time::Duration;

use tapnat_common::verdict::Reason;

/// Walks take this part of the time at most, while nothing presses.
const SHARE: u32 = 2000;
/// So many sessions begun since the last walk, as a part of those that there can be, press.
const MANY: u64 = 16;

/// Between two walks when the table of sessions is nearly full.
const WHEN_FULL: Duration = Duration::from_secs(1);

/// What may press, as it is at one moment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Signs {
    /// Sessions that were begun since the datapath began to count.
    pub(super) started: u64,
    /// What was refused for want of room since then.
    pub(super) refused: u64,
    /// Sessions that there can be.
    pub(super) capacity: u32,
    /// A guest is near its limit, or there are many guests.
    pub(super) is_tight: bool,
    /// There is little room for sessions.
    pub(super) is_full: bool,
}

/// Whether packets of this reason began a session.
pub(super) const fn starts(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::SessionStarted | Reason::SessionAdmitted | Reason::HairpinStarted
    )
}

/// Whether packets of this reason found no room that a walk may give back.
pub(super) const fn refuses(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::PortsExhausted
            | Reason::SessionTableFull
            | Reason::MappingTableFull
            | Reason::GuestSessionLimit
            | Reason::GuestPortLimit
            | Reason::GuestTableFull
            | Reason::DeviceGuestLimit
    )
}

/// How the walks of an instance follow each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    interval: Duration,
    /// Walks come after each interval, whatever they take.
    is_fixed: bool,
    /// Walks one after the other that found nothing.
    vain: u32,
    /// Processor time of the last walk.
    spent: Duration,
    /// At the end of the last walk.
    before: Signs,
}

impl Pace {
    pub(super) fn new(interval: Duration, is_fixed: bool) -> Self {
        Self {
            interval,
            is_fixed,
            vain: 0,
            spent: Duration::ZERO,
            before: Signs::default(),
        }
    }

    pub(super) const fn interval(&self) -> Duration {
        self.interval
    }

    pub(super) const fn is_fixed(&self) -> bool {
        self.is_fixed
    }

    /// Notes a walk that is over.
    pub(super) fn walked(&mut self, spent: Duration, removed: u64, signs: Signs) {
        self.vain = if removed == 0 { self.vain + 1 } else { 0 };
        self.spent = spent;
        self.before = signs;
    }

    /// Whether to walk, so long after the last one.
    pub(super) fn is_due(&self, rested: Duration, signs: Signs) -> bool {
        let begun = signs.started.saturating_sub(self.before.started);
        let is_eager =
            signs.refused > self.before.refused || begun * MANY >= u64::from(signs.capacity);
        let least = if signs.is_full {
            WHEN_FULL.min(self.interval)
        } else {
            self.interval
        };
        let patient = least.saturating_mul(2u32.saturating_pow(self.vain));
        self.is_fixed
            || rested >= self.spent.saturating_mul(SHARE)
            || (is_eager && rested >= least)
            || ((signs.is_tight || signs.is_full) && rested >= patient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const ROOM: Signs = Signs {
        started: 100,
        refused: 5,
        capacity: 16_000,
        is_tight: false,
        is_full: false,
    };

    fn after(spent: Duration, removed: u64) -> Pace {
        let mut pace = Pace::new(INTERVAL, false);
        pace.walked(spent, removed, ROOM);
        pace
    }

    #[test]
    fn walks_take_next_to_nothing_while_there_is_room() {
        let pace = after(Duration::from_millis(300), 10);
        assert!(!pace.is_due(Duration::from_millis(599_999), ROOM));
        assert!(pace.is_due(Duration::from_mins(10), ROOM));
        // What costs nothing is done each time.
        assert!(after(Duration::from_millis(1), 0).is_due(INTERVAL, ROOM));
    }

    #[test]
    fn what_is_in_the_way_is_looked_for_at_once() {
        let pace = after(Duration::from_millis(300), 10);
        for (is_due, signs) in [
            (false, ROOM),
            (
                false,
                Signs {
                    started: 1099,
                    ..ROOM
                },
            ),
            (
                true,
                Signs {
                    started: 1100,
                    ..ROOM
                },
            ),
            (true, Signs { refused: 6, ..ROOM }),
            (
                true,
                Signs {
                    is_tight: true,
                    ..ROOM
                },
            ),
        ] {
            assert_eq!(pace.is_due(INTERVAL, signs), is_due, "{signs:?}");
            assert!(!pace.is_due(INTERVAL / 2, signs));
        }
    }

    #[test]
    fn walks_that_find_nothing_get_rarer_until_one_finds_something() {
        let tight = Signs {
            is_tight: true,
            ..ROOM
        };
        let spent = Duration::from_secs(1);
        let mut pace = Pace::new(INTERVAL, false);
        for seconds in [20, 40, 80] {
            pace.walked(spent, 0, tight);
            assert!(!pace.is_due(Duration::from_secs(seconds - 1), tight));
            assert!(pace.is_due(Duration::from_secs(seconds), tight));
        }
        // What may be in the way is another matter.
        let refused = Signs {
            refused: 6,
            ..tight
        };
        assert!(pace.is_due(INTERVAL, refused));
        pace.walked(spent, 1, tight);
        assert!(pace.is_due(INTERVAL, tight));
    }

    #[test]
    fn a_full_table_is_looked_through_each_second_while_that_helps() {
        let full = Signs {
            is_full: true,
            ..ROOM
        };
        let mut pace = after(Duration::from_millis(300), 10);
        assert!(pace.is_due(Duration::from_secs(1), full));
        pace.walked(Duration::from_millis(300), 0, full);
        assert!(!pace.is_due(Duration::from_secs(1), full));
        assert!(pace.is_due(Duration::from_secs(2), full));
        let more = Signs {
            started: 1100,
            ..full
        };
        assert!(pace.is_due(Duration::from_secs(1), more));
    }

    #[test]
    fn an_interval_that_was_given_is_kept() {
        let mut pace = Pace::new(INTERVAL, true);
        pace.walked(Duration::from_secs(5), 0, ROOM);
        assert!(pace.is_due(INTERVAL, ROOM));
    }
}
