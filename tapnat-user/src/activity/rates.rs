//! How much passes in a second, from how much had passed at two times.

use std::ops::Add;

use serde::Serialize;
use tapnat_common::abi::Counter;

/// Packets and bytes for each direction, seen from the guests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Passed {
    pub outbound: Counter,
    pub inbound: Counter,
}

/// The time between two looks.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) seconds: f64,
}

impl Span {
    /// What is taken away meanwhile counts as nothing.
    #[expect(clippy::cast_precision_loss, reason = "a rate is not exact")]
    pub(super) fn per_second(self, before: u64, after: u64) -> f64 {
        if self.seconds > 0.0 {
            after.saturating_sub(before) as f64 / self.seconds
        } else {
            0.0
        }
    }

    fn rate(self, before: Counter, after: Counter) -> Rate {
        Rate {
            packets: self.per_second(before.packets, after.packets),
            bits: self.per_second(before.bytes, after.bytes) * 8.0,
        }
    }

    pub(super) fn rates(self, before: Passed, after: Passed) -> Rates {
        Rates {
            outbound: self.rate(before.outbound, after.outbound),
            inbound: self.rate(before.inbound, after.inbound),
        }
    }
}

/// A rate in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rate {
    /// In a second.
    pub packets: f64,
    /// In a second.
    pub bits: f64,
}

/// A rate for each direction, seen from the guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    /// Towards the world.
    pub outbound: Rate,
    /// Towards the guests.
    pub inbound: Rate,
}

impl Add for Rate {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            bits: self.bits + other.bits,
        }
    }
}

impl Add for Rates {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            outbound: self.outbound + other.outbound,
            inbound: self.inbound + other.inbound,
        }
    }
}

/// A rate without its fraction.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are neither negative nor near the limit"
)]
pub fn rounded(rate: f64) -> u64 {
    rate.round() as u64
}

impl Rates {
    /// Both ways, in a second.
    #[must_use]
    pub fn bits(self) -> f64 {
        self.outbound.bits + self.inbound.bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_what_came_in_the_time_between() {
        let span = Span { seconds: 2.0 };
        let passed = |packets, bytes| Passed {
            outbound: Counter { packets, bytes },
            inbound: Counter::default(),
        };
        let rates = span.rates(passed(10, 1000), passed(30, 5000));
        assert_eq!(
            rates.outbound,
            Rate {
                packets: 10.0,
                bits: 16_000.0
            }
        );
        assert_eq!(rates.inbound, Rate::default());
        // A device that was made anew, a guest whose sessions went.
        assert_eq!(
            span.rates(passed(30, 5000), passed(10, 1000)),
            Rates::default()
        );
        let none = Span { seconds: 0.0 };
        assert_eq!(none.rates(passed(0, 0), passed(1, 1)), Rates::default());
    }
}
