//! What is sent: which packets the generators make, and what proves that they were translated.

use std::{f64::consts::GOLDEN_RATIO, net::Ipv4Addr};

use anyhow::{Result, ensure};

use crate::abi::{FRAME_LENGTH, PORTS, REMOTE_PORT, Stream};

/// The transport protocol of a measurement's flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Udp,
    Tcp,
}

impl Protocol {
    /// As people write it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Udp => "UDP",
            Self::Tcp => "TCP",
        }
    }

    /// As iptables and nft write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Udp => 17,
            Self::Tcp => 6,
        }
    }
}

/// TCP's flags, as far as they are used here.
pub mod tcp_flags {
    pub const SYN: u8 = 2;
    pub const ACK: u8 = 16;
}

/// The address of flow 0's remote; others follow.
pub const FIRST_REMOTE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The guest's port of flow 0: one of those that every NAT here leaves as it is, if it is free.
pub const FIRST_PORT: u16 = 2048;
const ETHERNET: usize = 14;
const IP: usize = 20;

/// In which order the flows have their packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Round and round through so many flows, in steps of nearly a golden ratio of them: successive
    /// packets have little to do with each other, and of so many packets each flow has one.
    Mixed(u32),
    /// One packet for each flow, from flow 0 on, and never the same again.
    Fresh,
}

/// Of whom the next run of [`PORTS`] flows, which differ by the guest's port, has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vary {
    Remote,
    Guest,
    Both,
}

/// One direction's packets of a set of flows.
#[derive(Clone, Copy, Debug)]
pub struct Packets {
    pub protocol: Protocol,
    /// Only for TCP.
    pub flags: u8,
    /// Whether they go from the guest to the world.
    pub outward: bool,
    /// The device's link address where the packets arrive.
    pub mac: [u8; 6],
    /// Flow 0's guest, as it stands where the packets arrive.
    pub guest: Ipv4Addr,
    /// The guest's address, as it stands where the packets leave.
    pub translated: Ipv4Addr,
    /// The bits of it that are so for every flow.
    pub translated_mask: Ipv4Addr,
    pub order: Order,
    pub vary: Vary,
    /// The interface index to send frames through instead of receiving them, or zero.
    pub through: u32,
}

impl Packets {
    /// What to tell the generator.
    ///
    /// # Errors
    ///
    /// When there are no flows.
    pub fn stream(&self) -> Result<Stream> {
        let frame = self.frame();
        let mut header = [0; 7];
        for (word, bytes) in header.iter_mut().zip(frame.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let (flows, stride) = match self.order {
            Order::Mixed(flows) => (flows, golden_stride(flows)),
            Order::Fresh => (u32::MAX >> 1, 1),
        };
        ensure!(flows > 0, "there must be a flow");
        let transport_length = FRAME_LENGTH - ETHERNET - IP;
        let pseudo = u32::from(self.protocol.number()) + transport_length as u32;
        let mask = |varies| if varies { u32::MAX } else { 0 };
        let halves = |address: Ipv4Addr| {
            let [a, b, c, d] = address.octets();
            [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
        };
        Ok(Stream {
            header,
            ip_sum: sum(&frame[ETHERNET..ETHERNET + IP]),
            transport_sum: sum(&frame[ETHERNET + IP..]) + pseudo,
            first_guest: self.guest.to_bits(),
            guest_mask: mask(self.vary != Vary::Remote),
            first_remote: FIRST_REMOTE.to_bits(),
            remote_mask: mask(self.vary != Vary::Guest),
            first_port: FIRST_PORT.into(),
            flows,
            stride,
            // So that the first packet is flow 0's.
            position: flows - stride,
            tcp: u32::from(self.protocol == Protocol::Tcp),
            through: self.through,
            proof: halves(self.translated & self.translated_mask),
            proof_mask: halves(self.translated_mask),
        })
    }

    /// A frame without addresses, the guest's port and checksums.
    fn frame(&self) -> [u8; FRAME_LENGTH] {
        const IP_LENGTH: u16 = (FRAME_LENGTH - ETHERNET) as u16;
        const UDP_LENGTH: u16 = IP_LENGTH - IP as u16;
        let mut bytes = Vec::with_capacity(FRAME_LENGTH);
        bytes.extend(self.mac);
        bytes.extend([2, 0, 0, 0, 0, 1]);
        bytes.extend([8, 0]);
        bytes.extend([0x45, 0]);
        bytes.extend(IP_LENGTH.to_be_bytes());
        // Identification 0, and not to be fragmented.
        bytes.extend([0, 0, 0x40, 0, 64, self.protocol.number(), 0, 0]);
        bytes.extend([0; 8]);
        let remote = REMOTE_PORT as u16;
        let ports = if self.outward {
            [0, remote]
        } else {
            [remote, 0]
        };
        bytes.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        match self.protocol {
            Protocol::Udp => {
                bytes.extend(UDP_LENGTH.to_be_bytes());
                bytes.extend([0, 0]);
            }
            Protocol::Tcp => {
                // The first byte after the SYN, over and over: always within the window.
                let syn = self.flags & tcp_flags::SYN != 0;
                bytes.extend(u32::from(!syn).to_be_bytes());
                let acknowledged = u32::from(self.flags & tcp_flags::ACK != 0);
                bytes.extend(acknowledged.to_be_bytes());
                bytes.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            }
        }
        let mut frame = [0; FRAME_LENGTH];
        for (place, byte) in frame.iter_mut().zip(bytes) {
            *place = byte;
        }
        frame
    }
}

fn golden_stride(flows: u32) -> u32 {
    let wanted = (f64::from(flows) * (GOLDEN_RATIO - 1.0)) as u32;
    (wanted.max(1)..flows)
        .find(|step| greatest_common_divisor(*step, flows) == 1)
        .unwrap_or(1)
}

fn greatest_common_divisor(one: u32, other: u32) -> u32 {
    if other == 0 {
        one
    } else {
        greatest_common_divisor(other, one % other)
    }
}

/// Of 16-bit words in network byte order.
fn sum(bytes: &[u8]) -> u32 {
    let (words, _) = bytes.as_chunks();
    words
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum()
}

const _: () = assert!(
    FIRST_PORT as u32 + PORTS <= 32_768,
    "ephemeral ports begin there"
);
