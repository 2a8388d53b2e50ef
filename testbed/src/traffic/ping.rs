//! `ping`, with its result read.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::ANSWER_TIMEOUT;
use crate::{Namespace, process::Process};

/// How long pings under way may take, on a machine that may be emulated.
const PATIENCE: Duration = Duration::from_secs(90);

/// What `ping` reported.
#[derive(Debug, Clone, PartialEq)]
pub struct Ping {
    /// Requests sent.
    pub transmitted: u32,
    /// Replies received.
    pub received: u32,
    /// Round trip times in milliseconds: minimum, average, maximum.
    pub round_trip: Option<[f64; 3]>,
    /// All that it printed, ICMP errors included.
    pub output: String,
}

/// Pings from a namespace, `count` times at once; `options` are further
/// arguments (`-s 1472`, `-M do`, `-t 1`).
///
/// Lost replies are no error: look at the result.
///
/// # Errors
/// `ping` cannot run, or refuses an argument.
pub fn ping(namespace: &Namespace, target: IpAddr, count: u32, options: &[&str]) -> Result<Ping> {
    let count = count.to_string();
    // Once one is answered, ping waits for the others no longer than an interval,
    // whatever `-W` says, and a busy machine may be late: hence a long interval, and
    // no waiting for it.
    let output = namespace
        .command("ping")
        .args(["-n", "-i", "3", "-W", "3", "-c", &count, "-l", &count])
        .args(options)
        .arg(target.to_string())
        .output()?;
    let said = format!("{}{}", output.stdout, output.stderr);
    Ping::read(said).with_context(|| format!("ping {target} from {}", namespace.name()))
}

/// Pings `count` times at this interval, for [`Pings::lost`] to tell which of
/// them were not answered.
///
/// # Errors
/// `ping` cannot be started.
pub fn start_pings(
    namespace: &Namespace,
    target: IpAddr,
    count: u32,
    interval: Duration,
) -> Result<Pings> {
    // It sends on until so many are answered, and does not end before a late reply.
    let deadline = PATIENCE.as_secs().to_string();
    let interval = interval.as_secs_f64().to_string();
    let process = namespace
        .command("ping")
        .args(["-n", "-w", &deadline, "-c", &count.to_string()])
        .args(["-i", &interval, &target.to_string()])
        .spawn()?;
    Ok(Pings { process, count })
}

/// Pings under way.
#[derive(Debug)]
pub struct Pings {
    process: Process,
    count: u32,
}

impl Pings {
    /// Whether some of them are yet to be sent or answered.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits for the end, and returns which were not answered, by their numbers from 1.
    ///
    /// # Errors
    /// It does not end.
    pub fn lost(mut self) -> Result<Vec<u32>> {
        self.process.wait(PATIENCE + ANSWER_TIMEOUT)?;
        let answered = answered(&self.process.stdout());
        Ok((1..=self.count)
            .filter(|number| !answered.contains(number))
            .collect())
    }
}

/// The numbers of the requests that replies came to, not errors.
fn answered(said: &str) -> BTreeSet<u32> {
    said.lines()
        .filter_map(|line| line.split_once("icmp_seq=")?.1.split_once(" ttl="))
        .filter_map(|(number, _)| number.parse().ok())
        .collect()
}

impl Ping {
    /// Reads what the `ping` of iputils or of busybox printed.
    ///
    /// # Errors
    /// There is no summary in it.
    pub fn read(output: String) -> Result<Self> {
        let summary = output
            .lines()
            .find(|line| line.contains("packets transmitted"));
        let Some(summary) = summary else {
            bail!("no summary: {}", output.trim())
        };
        let count = |what: &str| {
            summary.split(", ").find_map(|part| {
                part.strip_suffix(what)?
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            })
        };
        let round_trip = output.lines().find_map(|line| {
            let numbers = line
                .strip_prefix("rtt ")
                .or_else(|| line.strip_prefix("round-trip "))?
                .split_once(" = ")?
                .1;
            let mut numbers = numbers.trim_end_matches(" ms").split('/').map(str::parse);
            Some([
                numbers.next()?.ok()?,
                numbers.next()?.ok()?,
                numbers.next()?.ok()?,
            ])
        });
        Ok(Self {
            transmitted: count("packets transmitted").context("no count of requests")?,
            received: count("received").context("no count of replies")?,
            round_trip,
            output,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ping_summaries_are_read() {
        let ping = Ping::read(
            "PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.\n\n--- 10.0.0.1 ping statistics ---\n\
             3 packets transmitted, 2 received, 33.3333% packet loss, time 40ms\n\
             rtt min/avg/max/mdev = 0.025/0.035/0.045/0.005 ms\n"
                .to_owned(),
        )
        .unwrap();
        assert_eq!((ping.transmitted, ping.received), (3, 2));
        assert_eq!(ping.round_trip, Some([0.025, 0.035, 0.045]));
        let busybox = Ping::read(
            "PING 10.0.0.1 (10.0.0.1): 56 data bytes\n\n--- 10.0.0.1 ping statistics ---\n\
             3 packets transmitted, 3 packets received, 0% packet loss\n\
             round-trip min/avg/max = 0.025/0.035/0.045 ms\n"
                .to_owned(),
        )
        .unwrap();
        assert_eq!((busybox.transmitted, busybox.received), (3, 3));
        assert_eq!(busybox.round_trip, Some([0.025, 0.035, 0.045]));
        let lost = Ping::read(
            "From 10.0.0.1 icmp_seq=1 Time to live exceeded\n\
             1 packets transmitted, 0 received, +1 errors, 100% packet loss, time 0ms\n"
                .to_owned(),
        )
        .unwrap();
        assert_eq!(
            (lost.transmitted, lost.received, lost.round_trip),
            (1, 0, None)
        );
        assert!(Ping::read("ping: connect: Network is unreachable".to_owned()).is_err());
    }

    #[test]
    fn replies_are_told_from_errors() {
        let said = "PING 203.0.113.1 (203.0.113.1) 56(84) bytes of data.\n\
                    64 bytes from 203.0.113.1: icmp_seq=1 ttl=63 time=0.1 ms\n\
                    From 10.0.0.1 icmp_seq=2 Destination Host Unreachable\n\
                    64 bytes from 203.0.113.1: icmp_seq=10 ttl=63 time=0.1 ms\n";
        assert_eq!(answered(said), BTreeSet::from([1, 10]));
    }
}
