//! TCP connections whose segments a test sends for both ends, one by one, and
//! checks as they arrive.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use tapnat_testbed::packet::{self, Builder, Parsed};

use crate::wires::Wires;

use Flags::{Ack, FinAck, Rst, Syn, SynAck};

/// Sequence numbers that the two ends of a connection begin with.
pub const OURS: u32 = 0x1000_0000;
pub const THEIRS: u32 = 0xffff_fff0;

/// The flags of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    Syn,
    SynAck,
    Ack,
    FinAck,
    Rst,
}

impl Flags {
    fn is_syn(self) -> bool {
        matches!(self, Syn | SynAck)
    }

    fn is_ack(self) -> bool {
        matches!(self, SynAck | Ack | FinAck)
    }
}

/// A connection between a guest's port and a remote, whose segments the test
/// sends for both ends; each is checked when it arrives.
#[derive(Debug)]
pub struct Connection<'a> {
    pub wires: &'a Wires,
    pub guest: usize,
    pub inside: SocketAddr,
    pub remote: SocketAddr,
    /// Our outside endpoint, once it is known.
    pub outside: Option<SocketAddr>,
    /// The next sequence number of each end.
    pub next: [u32; 2],
}

/// A segment with these sequence and acknowledgement numbers.
#[must_use]
pub fn segment(
    (source, destination): (SocketAddr, SocketAddr),
    flags: Flags,
    [sequence, acknowledgment]: [u32; 2],
    payload: &[u8],
) -> Builder {
    let segment = packet::tcp(source, destination).with_tcp(|header| {
        header.syn = flags.is_syn();
        header.ack = flags.is_ack();
        header.fin = flags == FinAck;
        header.rst = flags == Rst;
        header.sequence_number = sequence;
        header.acknowledgment_number = if flags.is_ack() { acknowledgment } else { 0 };
        header.window_size = 8192;
    });
    segment.payload(payload)
}

impl<'a> Connection<'a> {
    /// One that nothing was sent on yet.
    #[must_use]
    pub fn new(wires: &'a Wires, guest: usize, port: u16, remote: SocketAddr) -> Self {
        Self {
            wires,
            guest,
            inside: wires.inside(guest, port),
            remote,
            outside: None,
            next: [OURS, THEIRS],
        }
    }

    /// Our outside endpoint.
    ///
    /// # Errors
    /// Nothing was sent yet.
    pub fn outside(&self) -> Result<SocketAddr> {
        self.outside.context("nothing was sent yet")
    }

    /// Counts what an end has sent (0: the guest, 1: the remote).
    ///
    /// # Panics
    /// The payload is longer than a window.
    pub fn advance(&mut self, end: usize, flags: Flags, payload: &[u8]) {
        let taken = payload.len() + usize::from(flags.is_syn()) + usize::from(flags == FinAck);
        self.next[end] =
            self.next[end].wrapping_add(u32::try_from(taken).expect("a short payload"));
    }

    /// What the guest sends next.
    #[must_use]
    pub fn outward(&self, flags: Flags, payload: &[u8]) -> Builder {
        let [ours, theirs] = self.next;
        segment((self.inside, self.remote), flags, [ours, theirs], payload)
    }

    /// What the remote sends next.
    ///
    /// # Errors
    /// Nothing was sent yet.
    pub fn inward(&self, flags: Flags, payload: &[u8]) -> Result<Builder> {
        let [ours, theirs] = self.next;
        let ends = (self.remote, self.outside()?);
        Ok(segment(ends, flags, [theirs, ours], payload))
    }

    /// The guest sends, and it arrives.
    ///
    /// # Errors
    /// It does not, or changed.
    pub fn out(&mut self, flags: Flags, payload: &[u8]) -> Result<()> {
        let segment = self.outward(flags, payload);
        let arrived = self
            .wires
            .out(self.guest, &segment)
            .with_context(|| format!("out: {flags:?}"))?;
        let outside = *self.outside.get_or_insert(arrived.source());
        ensure!(
            (arrived.source(), arrived.destination()) == (outside, self.remote)
                && same_segment(&arrived, &segment),
            "{arrived:?}, not from {outside}"
        );
        self.advance(0, flags, payload);
        Ok(())
    }

    /// The remote sends, and it arrives.
    ///
    /// # Errors
    /// It does not, or changed.
    pub fn back(&mut self, flags: Flags, payload: &[u8]) -> Result<()> {
        let segment = self.inward(flags, payload)?;
        let arrived = self
            .wires
            .back(&segment, self.guest)
            .with_context(|| format!("back: {flags:?}"))?;
        ensure!(
            (arrived.source(), arrived.destination()) == (self.remote, self.inside)
                && same_segment(&arrived, &segment),
            "{arrived:?}"
        );
        self.advance(1, flags, payload);
        Ok(())
    }

    /// The remote sends, and it does not arrive, nor anything else anywhere.
    ///
    /// # Errors
    /// Something arrives.
    pub fn not_back(&self, flags: Flags, payload: &[u8]) -> Result<()> {
        self.wires.world.send(&self.inward(flags, payload)?)?;
        self.wires
            .nothing_arrives()
            .with_context(|| format!("back: {flags:?}"))
    }

    /// Checks that what the remote sends no longer reaches the guest. (The host
    /// may well answer in its place.)
    ///
    /// # Errors
    /// It does.
    pub fn check_ended(&self) -> Result<()> {
        self.wires.world.send(&self.inward(Ack, b"late")?)?;
        let arrivals = self.wires.arrivals()?;
        let guest = &arrivals.guests[self.guest];
        ensure!(guest.is_empty(), "{} arrived", guest[0].summary());
        Ok(())
    }

    /// Three-way handshake.
    ///
    /// # Errors
    /// A segment does not arrive, or changed.
    pub fn open(&mut self) -> Result<()> {
        self.out(Syn, b"")?;
        self.back(SynAck, b"")?;
        self.out(Ack, b"")
    }

    /// Data both ways.
    ///
    /// # Errors
    /// A segment does not arrive, or changed.
    pub fn talk(&mut self) -> Result<()> {
        self.out(Ack, b"request")?;
        self.back(Ack, b"response")?;
        self.out(Ack, b"")
    }
}

/// Whether all of a segment but its ports is what was sent.
#[must_use]
pub fn same_segment(arrived: &Parsed, sent: &Builder) -> bool {
    let sent = Parsed::new(packet::Link::Ip, &sent.build());
    let Some((arrived_header, sent)) = arrived.tcp().zip(sent.as_ref().ok()) else {
        return false;
    };
    let Some(sent_header) = sent.tcp() else {
        return false;
    };
    let mut header = arrived_header.clone();
    header.source_port = sent_header.source_port;
    header.destination_port = sent_header.destination_port;
    header.checksum = sent_header.checksum;
    header == *sent_header && arrived.payload == sent.payload
}
