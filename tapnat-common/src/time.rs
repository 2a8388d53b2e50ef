//! The datapath's clock: wrapping 32-bit ticks of `CLOCK_MONOTONIC`.
//!
//! One clock and one unit everywhere. A tick is 2^20 ns (about 1.05 ms), which
//! the datapath gets from a nanosecond clock by a shift, not a division. This
//! module reads no clock: the present is a parameter.

use core::ops::Div;

/// Nanoseconds in a tick are two to this power.
const TICK_SHIFT: u32 = 20;

/// Ticks in a slot are two to this power.
const SLOT_SHIFT: u32 = 9;

/// A point in time. Points further than 24 days apart do not compare.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instant(u32);

/// A length of time in ticks.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticks(u32);

impl Instant {
    /// The point at `nanoseconds` of `CLOCK_MONOTONIC`.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the clock wraps by design")]
    pub const fn from_nanoseconds(nanoseconds: u64) -> Self {
        Self((nanoseconds >> TICK_SHIFT) as u32)
    }

    /// The point as a number, to be handed to where none but numbers can go.
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The point with this [`Self::number`].
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// The slot that the point lies in.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "slots wrap by design")]
    pub const fn slot(self) -> Slot {
        Slot((self.0 >> SLOT_SHIFT) as u8)
    }

    /// Time passed since `earlier`; nothing when `earlier` lies ahead, as a
    /// stamp written by another CPU may.
    #[inline(always)]
    #[must_use]
    pub const fn since(self, earlier: Self) -> Ticks {
        let passed = self.0.wrapping_sub(earlier.0).cast_signed();
        if passed < 0 {
            Ticks(0)
        } else {
            Ticks(passed.cast_unsigned())
        }
    }

    #[inline(always)]
    #[must_use]
    pub const fn after(self, ticks: Ticks) -> Self {
        Self(self.0.wrapping_add(ticks.0))
    }

    #[inline(always)]
    #[must_use]
    pub const fn before(self, ticks: Ticks) -> Self {
        Self(self.0.wrapping_sub(ticks.0))
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_before(self, other: Self) -> bool {
        self.0.wrapping_sub(other.0).cast_signed() < 0
    }

    #[inline(always)]
    #[must_use]
    pub const fn later_of(self, other: Self) -> Self {
        if self.is_before(other) { other } else { self }
    }
}

/// A point in time to within half a second, of the last two minutes: for stamps
/// that are known to be no older, and have to be small.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot(u8);

impl Slot {
    /// So many slots earlier.
    #[inline(always)]
    #[must_use]
    pub const fn before(self, slots: u8) -> Self {
        Self(self.0.wrapping_sub(slots))
    }

    /// Slots since `earlier`. Many when it lies ahead.
    #[inline(always)]
    #[must_use]
    pub const fn since(self, earlier: Self) -> u8 {
        self.0.wrapping_sub(earlier.0)
    }
}

impl Ticks {
    /// The length of a slot: 2^29 ns, about 0.54 s.
    pub const SLOT: Self = Self(1 << SLOT_SHIFT);

    /// So many slots.
    #[inline(always)]
    #[must_use]
    pub const fn from_slots(slots: u8) -> Self {
        Self((slots as u32) << SLOT_SHIFT)
    }

    /// Whole slots in this time, as far as they can be told.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "capped just before")]
    pub const fn slots(self) -> u8 {
        let slots = self.0 >> SLOT_SHIFT;
        if slots > u8::MAX as u32 {
            u8::MAX
        } else {
            slots as u8
        }
    }

    /// The longest time that the clock can tell, 26 days.
    pub const MAX: Self = Self(i32::MAX.cast_unsigned());

    #[inline(always)]
    #[must_use]
    pub const fn new(ticks: u32) -> Self {
        Self(ticks)
    }

    /// At least this many milliseconds: rounded up, capped at [`Ticks::MAX`].
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "capped just before")]
    pub const fn from_milliseconds(milliseconds: u64) -> Self {
        let ticks = milliseconds
            .saturating_mul(1_000_000)
            .div_ceil(1 << TICK_SHIFT);
        if ticks > Self::MAX.0 as u64 {
            Self::MAX
        } else {
            Self(ticks as u32)
        }
    }

    #[must_use]
    pub const fn from_seconds(seconds: u32) -> Self {
        Self::from_milliseconds(seconds as u64 * 1000)
    }

    #[must_use]
    pub const fn milliseconds(self) -> u64 {
        ((self.0 as u64) << TICK_SHIFT) / 1_000_000
    }

    #[inline(always)]
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl Div<u32> for Ticks {
    type Output = Self;

    fn div(self, parts: u32) -> Self {
        Self(self.0 / parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_across_the_wrap() {
        let before = Instant(u32::MAX - 5);
        let after = before.after(Ticks::new(10));
        assert_eq!(after.since(before), Ticks::new(10));
        assert!(before.is_before(after));
        assert_eq!(
            before.since(after),
            Ticks::new(0),
            "a stamp ahead of us is not an age"
        );
        assert_eq!(before.later_of(after), after);
    }

    #[test]
    fn a_duration_is_never_cut_short() {
        assert!(Ticks::from_seconds(7440).milliseconds() >= 7_440_000);
        assert_eq!(Ticks::from_milliseconds(u64::MAX), Ticks::MAX);
        assert_eq!(Instant::from_nanoseconds(5 << 20), Instant(5));
    }
}
