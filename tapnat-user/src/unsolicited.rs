//! Answers TCP connections from outside that nobody asked for (RFC 5382 REQ-4): not before six
//! seconds are over, in which a SYN from inside would make one of them a simultaneous open, and then
//! with ICMP "port unreachable". The datapath notes them and drops them; this reads its notes.

use std::{
    io,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use etherparse::{
    Icmpv4Type, Icmpv6Type, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder,
    TcpHeader, err::packet::BuildWriteError, icmpv4::DestUnreachableHeader,
    icmpv6::DestUnreachableCode,
};
use socket2::{Domain, Protocol, Socket, Type};
use tapnat_common::{
    abi::{FlowKey, UNSOLICITED_WAIT, Unsolicited},
    net::Be16,
    time::{Instant, Ticks},
};
use tokio::time::{Instant as Timer, sleep_until};

use crate::{family::IpFamily, tables::PinnedTables};

/// How often the notes are read.
const PERIOD: Duration = Duration::from_secs(1);
/// At most so many answers in a period: who sends SYNs in another's name shall not flood them.
const MOST: usize = 50;
/// What is older is not answered: no daemon ran, or there was a flood, and the other end gave up.
const TOO_OLD: Ticks = Ticks::from_seconds(30);

const TIME_TO_LIVE: u8 = 64;
/// An ICMP error has at least so much of the packet after its IP header (RFC 792).
const QUOTED: usize = 8;

/// Who answers, by one IP version.
#[derive(Debug)]
pub struct Answers<A> {
    socket: Socket,
    next: Timer,
    version: PhantomData<A>,
}

impl<A: IpFamily> Answers<A> {
    /// Gets ready to answer.
    ///
    /// # Errors
    ///
    /// When the kernel gives no raw socket, as without `CAP_NET_RAW`.
    pub fn open() -> Result<Self> {
        // IPPROTO_RAW means that packets begin with their IP headers (raw(7), and `rawv6_init_sk()` in
        // `net/ipv6/raw.c`): the source is an
        // outside address, which need not be one of the host's.
        let protocol = Protocol::from(libc::IPPROTO_RAW);
        let domain = Domain::for_address(SocketAddr::new(A::UNSPECIFIED.into(), 0));
        let socket = Socket::new(domain, Type::RAW, Some(protocol))
            .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
            .context(
                "cannot answer connections that nobody asked for: grant CAP_NET_RAW, or pass \
                 --no-unsolicited-answer",
            )?;
        Ok(Self {
            socket,
            next: Timer::now() + PERIOD,
            version: PhantomData,
        })
    }

    /// Waits until there may be something to do.
    pub async fn due(&self) {
        sleep_until(self.next).await;
    }

    /// Answers what has waited long enough.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn step(&mut self, tables: &mut PinnedTables<A>, now: Instant) -> Result<()> {
        self.next = Timer::now() + PERIOD;
        let mut waiting = tables.unsolicited()?;
        waiting.retain(|(_, syn)| now.since(syn.arrived) >= UNSOLICITED_WAIT);
        if waiting.is_empty() {
            return Ok(());
        }
        waiting.sort_by_key(|(_, syn)| std::cmp::Reverse(now.since(syn.arrived)));
        let settings = tables.settings()?;
        let mut answered = 0;
        for (key, syn) in waiting {
            let is_due = now.since(syn.arrived) < TOO_OLD
                && settings.is_outside(key.destination)
                && !key.source.is_unroutable()
                // A SYN from inside came in time, or a later one from outside was let in.
                && tables.half(&key)?.is_none();
            if is_due {
                if answered == MOST {
                    break;
                }
                answered += 1;
                self.answer(&key, syn)?;
            }
            tables.forget_unsolicited(&key)?;
        }
        Ok(())
    }

    fn answer(&self, key: &FlowKey<A>, syn: Unsolicited) -> Result<()> {
        let packet = port_unreachable(key, syn).context("cannot build an ICMP error")?;
        let remote = SocketAddr::new(key.source.into(), 0);
        // No route, no room, or the host's firewall is against it: then there is no answer.
        let _ = self.socket.send_to(&packet, &remote.into());
        Ok(())
    }
}

/// The ICMP error about a SYN, with its IP header. Of the SYN's own IP header only the addresses are
/// known, which is all that its sender looks at.
fn port_unreachable<A: IpFamily>(key: &FlowKey<A>, syn: Unsolicited) -> Result<Vec<u8>> {
    let [from, to] = [key.source_port, key.destination_port].map(Be16::get);
    let segment = TcpHeader::new(from, to, syn.sequence.get(), 0).to_bytes();
    let length = u16::try_from(segment.len())?;
    let mut packet = Vec::new();
    let written = match (key.source.into(), key.destination.into()) {
        (IpAddr::V4(remote), IpAddr::V4(outside)) => {
            let [remote, outside] = [remote, outside].map(|it| it.octets());
            let mut header = Ipv4Header::new(length, TIME_TO_LIVE, IpNumber::TCP, remote, outside)?;
            header.header_checksum = header.calc_header_checksum();
            let quoted = [
                &header.to_bytes(),
                segment.get(..QUOTED).unwrap_or(&segment),
            ]
            .concat();
            let error = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
            let builder = PacketBuilder::ipv4(outside, remote, TIME_TO_LIVE).icmpv4(error);
            builder.write(&mut packet, &quoted)
        }
        (IpAddr::V6(remote), IpAddr::V6(outside)) => {
            let [remote, outside] = [remote, outside].map(|it| it.octets());
            let header = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: length,
                next_header: IpNumber::TCP,
                hop_limit: TIME_TO_LIVE,
                source: remote,
                destination: outside,
            };
            // RFC 4443 section 3.1: as much as fits.
            let quoted = [&header.to_bytes()[..], &segment].concat();
            let error = Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Port);
            let builder = PacketBuilder::ipv6(outside, remote, TIME_TO_LIVE).icmpv6(error);
            builder.write(&mut packet, &quoted)
        }
        (remote, outside) => bail!("{remote} and {outside} are not of one IP version"),
    };
    written.map_err(|error: BuildWriteError| io::Error::other(error))?;
    Ok(packet)
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv4Slice, checksum::Sum16BitWords};
    use tapnat_common::{
        abi::Arrival,
        net::{Be32, protocol},
    };

    use super::*;

    #[test]
    fn the_error_quotes_the_syn() {
        let key = FlowKey {
            source: Be32::from_bytes([203, 0, 113, 1]),
            destination: Be32::from_bytes([198, 51, 100, 2]),
            source_port: Be16::new(1234),
            destination_port: Be16::new(40_000),
            arrival: Arrival::outside(protocol::TCP),
        };
        let syn = Unsolicited {
            arrived: Instant::default(),
            sequence: Be32::new(0x0102_0304),
        };
        let packet = port_unreachable(&key, syn).unwrap();
        assert_eq!(packet.len(), 20 + 8 + 20 + 8);
        let outer = Ipv4Slice::from_slice(&packet).unwrap();
        assert_eq!(outer.header().source(), [198, 51, 100, 2]);
        assert_eq!(outer.header().destination(), [203, 0, 113, 1]);
        let icmp = outer.payload().payload;
        assert_eq!(icmp[..2], [3, 3]);
        let sum = Sum16BitWords::new().add_slice(icmp);
        assert_eq!(sum.ones_complement(), 0);
        let quoted = &icmp[8..];
        assert_eq!(quoted[12..20], [203, 0, 113, 1, 198, 51, 100, 2]);
        assert_eq!(quoted[20..], [4, 210, 156, 64, 1, 2, 3, 4]);
        let sum = Sum16BitWords::new().add_slice(&quoted[..20]);
        assert_eq!(sum.ones_complement(), 0);
    }
}
