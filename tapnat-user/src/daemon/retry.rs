//! When to try again what the kernel refused: soon at first, as it may have had no memory, and then
//! ever less often, as it may have a reason that stays.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_mins(5);

/// Tries of one thing.
#[derive(Debug)]
pub(super) struct Retry {
    next: Option<Instant>,
    wait: Duration,
    failed: bool,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            next: None,
            wait: FIRST,
            failed: false,
        }
    }
}

impl Retry {
    /// A try begins.
    pub(super) fn begin(&mut self) {
        self.failed = false;
    }

    /// Something of this try failed.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// The try is over.
    pub(super) fn end(&mut self) {
        if self.failed {
            self.next = Some(Instant::now() + self.wait);
            self.wait = (self.wait * 2).min(LONGEST);
        } else {
            *self = Self::default();
        }
    }

    /// Waits until it is time for another try, if there is to be one.
    pub(super) async fn due(&self) {
        match self.next {
            Some(next) => sleep_until(next).await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_fails_is_tried_ever_less_often() {
        let mut retry = Retry::default();
        let mut waits = Vec::new();
        for _ in 0..12 {
            retry.begin();
            retry.fail();
            waits.push(retry.wait.as_secs());
            retry.end();
            assert!(retry.next.is_some());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        retry.begin();
        retry.end();
        assert_eq!((retry.next, retry.wait), (None, FIRST));
    }
}
