//! When routers speak (RFC 4861 section 6.2): by themselves, and when they are asked. However many
//! ask, and whoever they say they are, what is said stays bounded, and everybody is answered. No
//! sockets, and time and chance are parameters.

use std::{
    net::Ipv6Addr,
    time::{Duration, Instant},
};

/// `MaxRtrAdvInterval` and `MinRtrAdvInterval`: their defaults.
const LONGEST_INTERVAL: Duration = Duration::from_mins(10);
const SHORTEST_INTERVAL: Duration = Duration::from_secs(200);
/// `MAX_INITIAL_RTR_ADVERT_INTERVAL` and `MAX_INITIAL_RTR_ADVERTISEMENTS`.
const FIRST_INTERVAL: Duration = Duration::from_secs(16);
const FIRST: u32 = 3;
/// `MIN_DELAY_BETWEEN_RAS`: between two advertisements for everybody.
const BETWEEN: Duration = Duration::from_secs(3);
/// `MAX_RA_DELAY_TIME`: how long an answer may wait.
const LONGEST_DELAY: Duration = Duration::from_millis(500);

/// Guests that are answered at once, and so many times in two of [`LONGEST_DELAY`] at most. When more
/// ask, one advertisement for everybody answers all of them.
const MOST_ANSWERS: usize = 16;
/// Solicitations that are looked at before the next answer.
const MOST_HEARD: u32 = 64;

/// Who is told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Audience {
    Everybody,
    Each(Vec<Ipv6Addr>),
}

/// What is to be said on one link, and when.
#[derive(Debug)]
pub(super) struct Schedule {
    /// Everybody is told then, at the latest.
    next: Instant,
    /// Soon, as some asked who cannot be told by themselves, or too many did.
    everybody_at: Option<Instant>,
    told_everybody: Option<Instant>,
    said: u32,
    answers: Option<Answers>,
    answered: Option<Instant>,
}

/// Those that wait for an answer.
#[derive(Debug)]
struct Answers {
    at: Instant,
    to: Vec<Ipv6Addr>,
    heard: u32,
}

impl Schedule {
    /// The first time is now.
    pub fn begin(now: Instant) -> Self {
        Self {
            next: now,
            everybody_at: None,
            told_everybody: None,
            said: 0,
            answers: None,
            answered: None,
        }
    }

    /// When there is something to say next.
    pub fn due(&self) -> Instant {
        let answers = self.answers.as_ref().map(|answers| answers.at);
        let sooner = self.everybody_at.into_iter().chain(answers).min();
        sooner.map_or(self.next, |sooner| sooner.min(self.next))
    }

    /// Whether it makes a difference who else asks before that.
    pub fn listens(&self) -> bool {
        self.answers
            .as_ref()
            .is_none_or(|answers| answers.heard < MOST_HEARD)
    }

    /// Somebody asks. One that has no address yet can only be told with everybody. `chance` is evenly
    /// spread over all of its values.
    pub fn ask(&mut self, from: Option<Ipv6Addr>, now: Instant, chance: u32) {
        let at = now + LONGEST_DELAY.mul_f64(portion(chance));
        let answers = self.answers.get_or_insert_with(|| Answers {
            at: not_before(at, self.answered, LONGEST_DELAY),
            to: Vec::new(),
            heard: 0,
        });
        answers.heard += 1;
        match from {
            Some(from) if answers.to.contains(&from) => {}
            Some(from) if answers.to.len() < MOST_ANSWERS => answers.to.push(from),
            Some(_) | None => {
                self.everybody_at
                    .get_or_insert_with(|| not_before(at, self.told_everybody, BETWEEN));
            }
        }
    }

    /// Who is to be told now, if somebody is.
    pub fn step(&mut self, now: Instant, chance: u32) -> Option<Audience> {
        let everybody = self.everybody_at.unwrap_or(self.next).min(self.next) <= now;
        let answers = self
            .answers
            .take_if(|answers| everybody || answers.at <= now);
        if everybody {
            self.said = self.said.saturating_add(1);
            let longest = if self.said < FIRST {
                FIRST_INTERVAL
            } else {
                LONGEST_INTERVAL
            };
            let spread = LONGEST_INTERVAL.saturating_sub(SHORTEST_INTERVAL);
            let interval = SHORTEST_INTERVAL + spread.mul_f64(portion(chance));
            self.next = now + interval.min(longest);
            self.everybody_at = None;
            self.told_everybody = Some(now);
            return Some(Audience::Everybody);
        }
        let answers = answers?;
        self.answered = Some(now);
        (!answers.to.is_empty()).then_some(Audience::Each(answers.to))
    }
}

fn portion(chance: u32) -> f64 {
    f64::from(chance) / f64::from(u32::MAX)
}

/// That time, or so much after an earlier one if that is later.
fn not_before(time: Instant, earlier: Option<Instant>, distance: Duration) -> Instant {
    earlier.map_or(time, |earlier| time.max(earlier + distance))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: u32 = u32::MAX / 2;

    fn guest(number: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, number)
    }

    /// Begun, and the first time over.
    fn begun() -> (Schedule, Instant) {
        let now = Instant::now();
        let mut schedule = Schedule::begin(now);
        assert_eq!(schedule.due(), now);
        assert_eq!(schedule.step(now, HALF), Some(Audience::Everybody));
        (schedule, now)
    }

    #[test]
    fn it_speaks_often_at_first_and_then_at_random_intervals() {
        let (mut schedule, mut now) = begun();
        let mut intervals = Vec::new();
        for chance in [0, u32::MAX, 0, HALF, u32::MAX] {
            intervals.push((schedule.due() - now).as_secs());
            let early = now + Duration::from_secs(15);
            assert_eq!(schedule.step(early, chance), None, "too early");
            now = schedule.due();
            assert_eq!(schedule.step(now, chance), Some(Audience::Everybody));
        }
        assert_eq!(intervals, [16, 16, 600, 200, 399]);
    }

    #[test]
    fn who_asks_is_answered_within_half_a_second() {
        for chance in [0, HALF, u32::MAX] {
            let (mut schedule, now) = begun();
            schedule.ask(Some(guest(1)), now, chance);
            schedule.ask(Some(guest(1)), now, chance);
            schedule.ask(Some(guest(2)), now, chance);
            assert!(schedule.due() <= now + LONGEST_DELAY);
            let now = schedule.due();
            let both = Audience::Each(vec![guest(1), guest(2)]);
            assert_eq!(schedule.step(now, chance), Some(both));
            assert_eq!(schedule.step(now, chance), None);
        }
    }

    #[test]
    fn who_has_no_address_is_told_with_everybody_every_three_seconds_at_most() {
        let (mut schedule, now) = begun();
        schedule.ask(None, now, HALF);
        let mut told = Vec::new();
        let mut time = now;
        while time < now + Duration::from_secs(10) {
            time = schedule.due();
            told.extend(schedule.step(time, HALF).map(|_| (time - now).as_secs()));
            schedule.ask(None, time, 0);
        }
        assert_eq!(told, [3, 6, 9]);
    }

    #[test]
    fn everybody_is_told_when_too_many_ask() {
        let (mut schedule, now) = begun();
        for number in 0..200 {
            if schedule.listens() {
                schedule.ask(Some(guest(number)), now, HALF);
            }
        }
        let first = schedule.due();
        let Some(Audience::Each(guests)) = schedule.step(first, HALF) else {
            panic!("the first ones are answered");
        };
        assert_eq!(guests.len(), MOST_ANSWERS);
        assert_eq!(schedule.due(), now + BETWEEN);
        assert_eq!(
            schedule.step(schedule.due(), HALF),
            Some(Audience::Everybody)
        );
    }

    #[test]
    fn a_flood_has_bounded_answers() {
        let (mut schedule, begin) = begun();
        let (mut now, mut looked_at, mut everybody, mut answers) = (begin, 0, 0, 0);
        let end = begin + Duration::from_secs(100);
        let mut number = 0_u16;
        while now < end {
            // Each from another source, a thousand in a second, and with the worst of luck.
            now += Duration::from_millis(1);
            number = number.wrapping_add(1);
            if schedule.listens() {
                looked_at += 1;
                let from = number.is_multiple_of(2).then(|| guest(number));
                schedule.ask(from, now, 0);
            }
            match schedule.step(now, 0) {
                Some(Audience::Everybody) => everybody += 1,
                Some(Audience::Each(guests)) => answers += guests.len(),
                None => {}
            }
        }
        assert!((33..=34).contains(&everybody), "{everybody}");
        assert!(answers <= 200 * MOST_ANSWERS, "{answers}");
        assert!(answers >= 100 * MOST_ANSWERS, "{answers}");
        assert!(looked_at <= 300 * MOST_HEARD, "{looked_at}");
    }
}
