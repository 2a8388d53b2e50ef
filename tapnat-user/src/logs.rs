//! Prints what the datapath logs (`tapnat run -v`) to the standard error, with the names of the
//! numbers in it. What is logged is the datapath's decision.

use std::{
    borrow::Cow,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use tapnat_common::verdict::Reason;
use tokio::io::{Interest, unix::AsyncFd};

use crate::view::Protocol;

/// Prints records as lines.
#[derive(Debug)]
struct Lines;

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // Nobody reads: that must not stop the packets.
        let _ = writeln!(
            io::stderr(),
            "tapnat: {}",
            named(&record.args().to_string())
        );
    }

    fn flush(&self) {}
}

/// A line of the datapath's, which begins with the numbers of a reason and of a protocol, with their
/// names in place of them. Endpoints follow, both families' as IPv6 without brackets.
fn named(line: &str) -> String {
    let mut words = line.splitn(3, ' ');
    if let (Some(reason), Some(protocol), Some(rest)) = (words.next(), words.next(), words.next())
        && let Some(reason) = reason
            .parse()
            .ok()
            .and_then(|it: usize| Reason::ALL.get(it))
        && let Ok(protocol) = protocol.parse()
    {
        let rest: Vec<_> = rest.split(' ').map(endpoint).collect();
        format!(
            "{} {} {}",
            reason.label(),
            Protocol(protocol),
            rest.join(" ")
        )
    } else {
        line.to_owned()
    }
}

/// A word as people write it, if it is an endpoint.
fn endpoint(word: &str) -> Cow<'_, str> {
    let end = word.rsplit_once(':').and_then(|(address, port)| {
        let address: IpAddr = address.parse().ok()?;
        Some(SocketAddr::new(address.to_canonical(), port.parse().ok()?))
    });
    end.map_or(Cow::Borrowed(word), |end| Cow::Owned(end.to_string()))
}

/// The datapath's log.
pub struct Logs {
    reader: AsyncFd<EbpfLogger<Lines>>,
}

impl Logs {
    /// Begins to read what programs of this object say. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the datapath has no log.
    pub fn read(ebpf: &mut Ebpf) -> Result<Self> {
        let logger =
            EbpfLogger::init_with_logger(ebpf, Lines).context("cannot read the datapath's log")?;
        // SAFETY: the logger owns its descriptor and gives out the same one until it is dropped.
        let reader = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
            .context("cannot read the datapath's log")?;
        Ok(Self { reader })
    }

    /// Waits for records and prints them.
    pub async fn print(&mut self) {
        match self.reader.readable_mut().await {
            Ok(mut ready) => {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_get_their_names() {
        let reason = Reason::SessionStarted as u32;
        assert_eq!(
            named(&format!(
                "{reason} 6 ::ffff:10.0.0.10:4000 -> ::ffff:192.0.2.1:80"
            )),
            "session-started tcp 10.0.0.10:4000 -> 192.0.2.1:80"
        );
        assert_eq!(
            named(&format!("{reason} 17 fd00::10:4000 -> 2001:db8::1:80")),
            "session-started udp [fd00::10]:4000 -> [2001:db8::1]:80"
        );
        let odd = format!("{} 6 10.0.0.10:4000", Reason::COUNT);
        assert_eq!(named(&odd), odd);
        assert_eq!(named("something else"), "something else");
        assert_eq!(named(""), "");
    }
}
