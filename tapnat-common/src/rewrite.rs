//! Changes a packet as decided: addresses, ports, time to live, checksums, and
//! the packet that an ICMP error quotes. Decides nothing.

use crate::{
    abi::{EndpointKey, NextHop, Session, session_flags},
    checksum::Delta,
    frame::Frame,
    net::{Be16, Be32},
    parse::{
        ICMP_IDENTIFIER, MAXIMUM_SEGMENT_SIZE, Packet, Part, Quoted, Transport, find_tcp_option,
        tcp_flags,
    },
};

/// What a packet's addresses and ports become, and where it then goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    pub source: Be32,
    pub destination: Be32,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub address_delta: Delta,
    pub port_delta: Delta,
    pub next_hop: NextHop,
    /// Leave through the kernel's neighbour table rather than with the cached
    /// link addresses: there are none, or it is time to confirm them.
    pub resolve: bool,
}

impl Rewrite {
    /// `confirm`: let the kernel look the neighbour up even if it is known.
    #[inline(always)]
    #[must_use]
    pub const fn of(session: &Session, confirm: bool) -> Self {
        Self {
            source: session.source,
            destination: session.destination,
            source_port: session.source_port,
            destination_port: session.destination_port,
            address_delta: session.address_delta(),
            port_delta: session.port_delta(),
            next_hop: session.next_hop,
            resolve: confirm || session.flags & session_flags::NEXT_HOP_KNOWN == 0,
        }
    }
}

/// Offsets in an IPv4 header.
const IDENTIFICATION: u32 = 4;
const CHECKSUM: u32 = 10;

/// Offset of the time to live in an IPv4 header; protocol, checksum and the
/// two addresses follow it.
const TIME_TO_LIVE: u32 = 8;

/// Translates a packet of a session.
///
/// `None` when the packet's memory could not be changed; it may then be half
/// rewritten and must be dropped.
#[inline(always)]
pub fn apply<F: Frame>(frame: &mut F, packet: &Packet, rewrite: &Rewrite) -> Option<()> {
    write(frame, packet, rewrite, packet.time_to_live.wrapping_sub(1))
}

/// Changes where a packet goes and what is left of its time to live, for the host's
/// firewall to see it as it would go, and back.
///
/// As [`apply`] when it fails.
#[inline(always)]
pub fn redirect<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    destination: &EndpointKey,
    time_to_live: u8,
) -> Option<()> {
    let address_delta = Delta::of_address(packet.destination, destination.address);
    // An ICMP query has one identifier, which is its source's.
    let has_ports = matches!(packet.transport, Transport::Tcp | Transport::Udp);
    let (destination_port, port_delta) = if has_ports {
        let delta = Delta::of_word(packet.destination_port, destination.port);
        (destination.port, delta)
    } else {
        (packet.destination_port, Delta::ZERO)
    };
    let rewrite = Rewrite {
        source: packet.source,
        destination: destination.address,
        source_port: packet.source_port,
        destination_port,
        address_delta,
        port_delta,
        ..Rewrite::default()
    };
    write(frame, packet, &rewrite, time_to_live)
}

#[inline(always)]
fn write<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    rewrite: &Rewrite,
    time_to_live: u8,
) -> Option<()> {
    if let Some(offset) = packet.checksum_offset() {
        let covers_addresses = matches!(packet.transport, Transport::Tcp | Transport::Udp);
        let addresses = if covers_addresses {
            rewrite.address_delta
        } else {
            Delta::ZERO
        };
        let zero_means_none = packet.transport == Transport::Udp;
        frame.update_checksum(offset, addresses, rewrite.port_delta, zero_means_none)?;
    }
    if packet.part != Part::Later {
        store_ports(frame, packet, rewrite)?;
    }
    let addresses = (rewrite.source, rewrite.destination);
    store_network(
        frame,
        packet.network_offset,
        addresses,
        rewrite.address_delta,
        time_to_live,
    )
}

/// Writes the ports where this transport has them.
#[inline(always)]
fn store_ports<F: Frame>(frame: &mut F, packet: &Packet, rewrite: &Rewrite) -> Option<()> {
    let offset = packet.transport_offset();
    match packet.transport {
        Transport::Tcp | Transport::Udp => frame.store(
            offset,
            &[
                rewrite.source_port.bytes(),
                rewrite.destination_port.bytes(),
            ],
        ),
        Transport::IcmpQuery => frame.store(offset + ICMP_IDENTIFIER, &rewrite.source_port.bytes()),
        Transport::IcmpReply => {
            frame.store(offset + ICMP_IDENTIFIER, &rewrite.destination_port.bytes())
        }
        Transport::PortsFixed
        | Transport::AddressOnly
        | Transport::IcmpError
        | Transport::IcmpOther
        | Transport::Unknown => Some(()),
    }
}

/// Lowers the maximum segment size that a SYN announces to `most` bytes, for
/// paths that swallow "fragmentation needed".
#[inline(always)]
pub fn clamp_segment_size<F: Frame>(frame: &mut F, packet: &Packet, most: u16) -> Option<()> {
    if packet.transport != Transport::Tcp || packet.segment.flags & tcp_flags::SYN == 0 {
        return Some(());
    }
    let start = packet.transport_offset();
    let [data_offset, ..] = frame.read::<[u8; 2]>(start + 12)?;
    let end = start + u32::from(data_offset >> 4) * 4;
    let Some(option) = find_tcp_option(frame, start, end, MAXIMUM_SEGMENT_SIZE) else {
        return Some(());
    };
    let offset = option.get() + 2;
    let announced = Be16::from_bytes(frame.read::<[u8; 2]>(offset)?);
    if announced.get() <= most {
        return Some(());
    }
    let lowered = Be16::new(most);
    frame.write(offset, &lowered.bytes())?;
    let mut delta = Delta::of_word(announced, lowered);
    if (offset - start) % 2 == 1 {
        // It lies across two of the words that are summed up.
        delta = delta.swapped();
    }
    frame.update_checksum(packet.checksum_offset()?, Delta::ZERO, delta, false)
}

/// Writes the ports of a quoted packet, which travelled against the session's.
#[inline(always)]
fn write_quoted_ports<F: Frame>(frame: &mut F, quoted: &Quoted, rewrite: &Rewrite) -> Option<()> {
    let offset = quoted.transport_offset;
    let (source, destination) = (rewrite.destination_port, rewrite.source_port);
    match quoted.transport {
        Transport::Tcp | Transport::Udp => {
            frame.write(offset, &[source.bytes(), destination.bytes()])
        }
        Transport::IcmpQuery => frame.write(offset + ICMP_IDENTIFIER, &source.bytes()),
        Transport::IcmpReply => frame.write(offset + ICMP_IDENTIFIER, &destination.bytes()),
        Transport::PortsFixed
        | Transport::AddressOnly
        | Transport::IcmpError
        | Transport::IcmpOther
        | Transport::Unknown => Some(()),
    }
}

/// Gives a fragment another identification.
#[inline(always)]
pub fn renumber<F: Frame>(frame: &mut F, packet: &Packet, identification: Be16) -> Option<()> {
    let at = packet.network_offset;
    let check = Be16::from_bytes(frame.load::<[u8; 2]>(at + CHECKSUM)?);
    let check = Delta::of_word(packet.identification, identification).apply(check);
    frame.store(at + IDENTIFICATION, &identification.bytes())?;
    frame.store(at + CHECKSUM, &check.bytes())
}

/// Writes the addresses and the time to live, and their checksum.
#[inline(always)]
fn store_network<F: Frame>(
    frame: &mut F,
    network_offset: u32,
    (source, destination): (Be32, Be32),
    address_delta: Delta,
    time_to_live: u8,
) -> Option<()> {
    let offset = network_offset + TIME_TO_LIVE;
    let [before, protocol, check @ ..] = frame.load::<[u8; 4]>(offset)?;
    let hop = Delta::of_word(
        Be16::from_bytes([before, protocol]),
        Be16::from_bytes([time_to_live, protocol]),
    );
    let [check_high, check_low] = address_delta
        .and(hop)
        .apply(Be16::from_bytes(check))
        .bytes();
    let first = [time_to_live, protocol, check_high, check_low];
    frame.store(offset, &[first, source.bytes(), destination.bytes()])
}

/// Translates an ICMP error: the quoted packet becomes what its sender sent,
/// and the error goes to that sender (RFC 5508 REQ-4 and REQ-5).
///
/// `rewrite` is that of the session's packets that travel the error's way;
/// `source` is what becomes the error's source.
#[inline(always)]
pub fn apply_error<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    quoted: &Quoted,
    rewrite: &Rewrite,
    source: Be32,
) -> Option<()> {
    // The quoted packet travelled the other way.
    let addresses = Delta::of_address(quoted.source, rewrite.destination)
        .and(Delta::of_address(quoted.destination, rewrite.source));
    let ports = Delta::of_word(quoted.source_port, rewrite.destination_port)
        .and(Delta::of_word(quoted.destination_port, rewrite.source_port));

    // Every changed word of the quoted packet changes the error's checksum.
    let mut changed = addresses;
    let header = quoted.network_offset + TIME_TO_LIVE;
    let [time_to_live, number, check @ ..] = frame.read::<[u8; 4]>(header)?;
    let old_check = Be16::from_bytes(check);
    let new_check = addresses.apply(old_check);
    changed = changed.and(Delta::of_word(old_check, new_check));

    if let Some(offset) = quoted.checksum_offset {
        let covers_addresses = matches!(quoted.transport, Transport::Tcp | Transport::Udp);
        let delta = if covers_addresses {
            addresses.and(ports)
        } else {
            ports
        };
        let old = Be16::from_bytes(frame.read::<[u8; 2]>(offset)?);
        let absent = quoted.transport == Transport::Udp && old == Be16::ZERO;
        if !absent {
            let mut new = delta.apply(old);
            if quoted.transport == Transport::Udp && new == Be16::ZERO {
                new = Be16::new(0xffff);
            }
            frame.write(offset, &new.bytes())?;
            changed = changed.and(Delta::of_word(old, new));
        }
    }
    if !matches!(
        quoted.transport,
        Transport::PortsFixed | Transport::AddressOnly
    ) {
        changed = changed.and(ports);
    }
    write_quoted_ports(frame, quoted, rewrite)?;
    let [check_high, check_low] = new_check.bytes();
    frame.write(
        header,
        &[
            [time_to_live, number, check_high, check_low],
            rewrite.destination.bytes(),
            rewrite.source.bytes(),
        ],
    )?;

    let checksum = packet.transport_offset() + 2;
    frame.update_checksum(checksum, Delta::ZERO, changed, false)?;
    let outer = Delta::of_address(packet.source, source)
        .and(Delta::of_address(packet.destination, rewrite.destination));
    let addresses = (source, rewrite.destination);
    let fewer = packet.time_to_live.wrapping_sub(1);
    store_network(frame, packet.network_offset, addresses, outer, fewer)
}
