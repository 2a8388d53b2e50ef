//! The clock that the datapath's time stamps are of.

use rustix::time::{ClockId, clock_gettime};
use tapnat_common::time::Instant;

/// The datapath's clock.
#[must_use]
pub fn now() -> Instant {
    let now = clock_gettime(ClockId::Monotonic);
    let nanoseconds = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
    Instant::from_nanoseconds(nanoseconds)
}
