//! What is sent: which packets the generators make, and what proves that they were translated.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};

use crate::abi::{FRAME_LENGTH, PORTS, Stream};

/// The transport protocol of a measurement's flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Udp,
    Tcp,
}

/// TCP's flags, as far as they are used here.
pub mod tcp_flags {
    pub const SYN: u8 = 2;
    pub const ACK: u8 = 16;
}

/// The address of flow 0's remote; others follow.
pub const FIRST_REMOTE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The guest's port of flow 0: one of those that every NAT here leaves as it is.
pub const FIRST_PORT: u16 = 2048;
const REMOTE_PORT: u16 = 4433;
const ETHERNET: usize = 14;
const IP: usize = 20;

/// One direction's packets of a set of flows.
#[derive(Clone, Copy, Debug)]
pub struct Packets {
    pub protocol: Protocol,
    /// Only for TCP.
    pub flags: u8,
    /// Whether they go from the guest to the world.
    pub outward: bool,
    /// The device's address where the packets arrive.
    pub mac: [u8; 6],
    /// The guest's address, as it stands where the packets arrive.
    pub guest: Ipv4Addr,
    /// The guest's address, as it stands where the packets leave.
    pub translated: Ipv4Addr,
    pub first_remote: Ipv4Addr,
    pub first_port: u16,
    pub flows: u32,
}

impl Packets {
    /// What to tell the generator.
    ///
    /// # Errors
    ///
    /// When the ports overflow.
    pub fn stream(&self) -> Result<Stream> {
        ensure!(
            self.flows > 0 && u32::from(self.first_port) + PORTS <= 1 << 16,
            "the guest's ports would wrap"
        );
        let frame = self.frame();
        let mut header = [0; 7];
        for (word, bytes) in header.iter_mut().zip(frame.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let transport_length = FRAME_LENGTH - ETHERNET - IP;
        let pseudo = u32::from(self.number()) + transport_length as u32 + sum(&self.guest.octets());
        let [a, b, c, d] = self.translated.octets();
        Ok(Stream {
            header,
            ip_sum: sum(&frame[ETHERNET..ETHERNET + IP]),
            transport_sum: sum(&frame[ETHERNET + IP..]) + pseudo,
            first_remote: self.first_remote.to_bits(),
            first_port: self.first_port.into(),
            flows: self.flows,
            stride: stride(self.flows),
            position: 0,
            tcp: u32::from(self.protocol == Protocol::Tcp),
            proof: [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])],
            zero: 0,
        })
    }

    const fn number(&self) -> u8 {
        match self.protocol {
            Protocol::Udp => 17,
            Protocol::Tcp => 6,
        }
    }

    /// Flow 0's frame without its remote address, the guest's port and checksums.
    fn frame(&self) -> [u8; FRAME_LENGTH] {
        let mut bytes = Vec::with_capacity(FRAME_LENGTH);
        bytes.extend(self.mac);
        bytes.extend([2, 0, 0, 0, 0, 1]);
        bytes.extend([8, 0]);
        let ip_length = (FRAME_LENGTH - ETHERNET) as u16;
        bytes.extend([0x45, 0]);
        bytes.extend(ip_length.to_be_bytes());
        // Identification 0, and not to be fragmented.
        bytes.extend([0, 0, 0x40, 0, 64, self.number(), 0, 0]);
        let (addresses, ports) = if self.outward {
            ([self.guest, Ipv4Addr::UNSPECIFIED], [0, REMOTE_PORT])
        } else {
            ([Ipv4Addr::UNSPECIFIED, self.guest], [REMOTE_PORT, 0])
        };
        bytes.extend(addresses.iter().flat_map(Ipv4Addr::octets));
        bytes.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        match self.protocol {
            Protocol::Udp => {
                bytes.extend((ip_length - IP as u16).to_be_bytes());
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

/// Steps of nearly a golden ratio of all flows: successive packets have little to do with each
/// other, and after `flows` packets each flow had exactly one.
fn stride(flows: u32) -> u32 {
    let wanted = (f64::from(flows) * 0.618) as u32;
    (wanted..flows)
        .find(|step| greatest_common_divisor(*step, flows) == 1)
        .unwrap_or(0)
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
