//! What an instance does for guests by itself, beside translating: a task for each device. Owns which
//! of them run, how much guests may ask of them, and what is said where one cannot be; what they do is
//! [`crate::dhcp`]'s, [`crate::dhcpv6`]'s, [`crate::router`]'s and [`crate::dns`]'s.

use std::{
    io,
    time::{Duration, Instant},
};

use anyhow::{Error, Result};
use tokio::task::JoinHandle;

/// So many messages of guests a second, and no more.
#[derive(Debug)]
pub struct Rate {
    most: u32,
    since: Instant,
    taken: u32,
}

impl Rate {
    /// At most so many in a second, the first of which begins now.
    #[must_use]
    pub const fn new(most: u32, now: Instant) -> Self {
        Self {
            most,
            since: now,
            taken: 0,
        }
    }

    /// Whether there is room for another one, which takes it then.
    pub fn takes(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            *self = Self::new(self.most, now);
        }
        let has_room = self.taken < self.most;
        self.taken += u32::from(has_room);
        has_room
    }
}

/// Why guests of a device get no addresses: of `addresses`, by what kind of `server`.
#[must_use]
pub fn no_addresses(device: &str, addresses: &str, server: &str, error: io::Error) -> Error {
    let way_out = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another {server} server listens there, and guests get their addresses from it; pass \
             --no-dhcp to say so"
        ),
        io::ErrorKind::PermissionDenied => {
            "grant CAP_NET_BIND_SERVICE, or pass --no-dhcp".to_owned()
        }
        _ => "pass --no-dhcp if guests need no addresses".to_owned(),
    };
    Error::new(error).context(format!(
        "cannot give guests of {device} {addresses}: {way_out}"
    ))
}

/// The tasks of one service, each with what it was started for. They end with this.
#[derive(Debug)]
pub struct PerDevice<S, H> {
    running: Vec<Running<S, H>>,
    /// Notes that need no repeating.
    told: Vec<String>,
}

#[derive(Debug)]
struct Running<S, H> {
    service: S,
    task: JoinHandle<()>,
    /// What the task shares with others.
    handle: H,
}

/// What came of it that other tasks were wanted.
#[derive(Debug)]
pub struct Settled<S, H> {
    /// Those that run no more.
    pub ended: Vec<(S, H)>,
    /// What is to be told of those that could not be started.
    pub notes: Vec<String>,
}

impl<S, H> Default for PerDevice<S, H> {
    fn default() -> Self {
        Self {
            running: Vec::new(),
            told: Vec::new(),
        }
    }
}

impl<S: PartialEq, H> PerDevice<S, H> {
    /// Lets those run that are wanted and no others, and starts those that do not run yet. Must be
    /// called within a tokio runtime.
    pub async fn settle(
        &mut self,
        wanted: Vec<S>,
        mut start: impl FnMut(&S) -> Result<(JoinHandle<()>, H)>,
    ) -> Settled<S, H> {
        let (stay, end): (Vec<_>, Vec<_>) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|it| wanted.contains(&it.service) && !it.task.is_finished());
        self.running = stay;
        let mut ended = Vec::new();
        for running in end {
            ended.push(running.end().await);
        }
        let mut notes = Vec::new();
        for service in wanted {
            if self.running.iter().any(|it| it.service == service) {
                continue;
            }
            match start(&service) {
                Ok((task, handle)) => self.running.push(Running {
                    service,
                    task,
                    handle,
                }),
                Err(error) => notes.push(format!("{error:#}")),
            }
        }
        let told = std::mem::replace(&mut self.told, notes.clone());
        notes.retain(|note| !told.contains(note));
        Settled { ended, notes }
    }
}

impl<S, H> Running<S, H> {
    /// Afterwards its port is free for another.
    async fn end(self) -> (S, H) {
        self.task.abort();
        // It says that it was aborted.
        let _ = self.task.await;
        (self.service, self.handle)
    }
}

impl<S, H> Drop for PerDevice<S, H> {
    fn drop(&mut self) {
        for running in &self.running {
            running.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn so_many_come_in_a_second() {
        let begin = Instant::now();
        let mut rate = Rate::new(2, begin);
        for (after, rooms) in [
            (0, [true, true, false]),
            (999, [false; 3]),
            (1000, [true, true, false]),
        ] {
            for room in rooms {
                assert_eq!(
                    rate.takes(begin + Duration::from_millis(after)),
                    room,
                    "{after}"
                );
            }
        }
    }

    #[tokio::test]
    async fn only_what_differs_is_ended_and_started() {
        let mut services = PerDevice::default();
        let mut started = Vec::new();
        let mut start = |name: &&'static str| {
            if *name == "broken" {
                bail!("it is broken");
            }
            started.push(*name);
            Ok((tokio::spawn(std::future::pending()), name.len()))
        };
        let wanted = vec!["one", "three", "broken"];
        let settled = services.settle(wanted, &mut start).await;
        assert_eq!(settled.notes, ["it is broken"]);
        let wanted = vec!["one", "four", "broken"];
        let settled = services.settle(wanted, &mut start).await;
        assert_eq!(settled.ended, [("three", 5)]);
        assert_eq!(settled.notes, Vec::<String>::new(), "it was told");
        let settled = services.settle(Vec::new(), &mut start).await;
        assert_eq!(settled.ended.len(), 2);
        assert_eq!(started, ["one", "three", "four"]);
    }

    #[tokio::test]
    async fn what_ended_by_itself_is_started_anew() {
        let mut services = PerDevice::default();
        let mut started = 0;
        for _ in 0..2 {
            let start = |_: &_| {
                started += 1;
                Ok((tokio::spawn(std::future::ready(())), ()))
            };
            services.settle(vec!["it"], start).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(started, 2);
    }
}
