//! Changes a packet as decided: addresses, ports, time to live, checksums, and
//! the packet that an ICMP error quotes. Decides nothing.

use crate::{
    abi::{EndpointKey, NextHop, Session, session_flags},
    checksum::Delta,
    frame::Frame,
    net::{Address, Be16, Be32},
    network::Network,
    parse::{
        ICMP_IDENTIFIER, MAXIMUM_SEGMENT_SIZE, Packet, Part, Quoted, Transport, find_tcp_option,
        tcp_flags,
    },
};

/// What a packet's addresses and ports become, and where it then goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rewrite<A = Be32> {
    pub source: A,
    pub destination: A,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub address_delta: Delta,
    pub port_delta: Delta,
    pub next_hop: NextHop,
    /// Leave through the kernel's neighbour table rather than with the cached
    /// link addresses: there are none, or it is time to confirm them.
    pub resolve: bool,
}

impl<A: Address> Rewrite<A> {
    /// `confirm`: let the kernel look the neighbour up even if it is known.
    #[inline(always)]
    #[must_use]
    pub const fn of(session: &Session<A>, confirm: bool) -> Self {
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

/// Translates a packet of a session.
///
/// `None` when the packet's memory could not be changed; it may then be half
/// rewritten and must be dropped.
#[inline(always)]
pub fn apply<A: Network, F: Frame>(
    frame: &mut F,
    packet: &Packet<A>,
    rewrite: &Rewrite<A>,
) -> Option<()> {
    write(frame, packet, rewrite, packet.time_to_live.wrapping_sub(1))
}

/// Changes where a packet goes and what is left of its time to live, for the host's
/// firewall to see it as it would go, and back.
///
/// As [`apply`] when it fails.
#[inline(always)]
pub fn redirect<A: Network, F: Frame>(
    frame: &mut F,
    packet: &Packet<A>,
    destination: &EndpointKey<A>,
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
fn write<A: Network, F: Frame>(
    frame: &mut F,
    packet: &Packet<A>,
    rewrite: &Rewrite<A>,
    time_to_live: u8,
) -> Option<()> {
    if let Some(offset) = packet.checksum_offset() {
        let addresses = if covers_addresses::<A>(packet.transport) {
            rewrite.address_delta
        } else {
            Delta::ZERO
        };
        let zero_means_none = packet.transport == Transport::Udp;
        frame.update_checksum::<A>(offset, addresses, rewrite.port_delta, zero_means_none)?;
    }
    if packet.part != Part::Later {
        store_ports(frame, packet, rewrite)?;
    }
    let addresses = (rewrite.source, rewrite.destination);
    A::store(
        frame,
        packet.network_offset,
        addresses,
        rewrite.address_delta,
        time_to_live,
    )
}

/// Whether the transport's checksum covers the addresses.
#[inline(always)]
const fn covers_addresses<A: Network>(transport: Transport) -> bool {
    match transport {
        Transport::Tcp | Transport::Udp => true,
        Transport::IcmpQuery | Transport::IcmpReply | Transport::IcmpError => {
            !A::HAS_HEADER_CHECKSUM
        }
        Transport::IcmpOther
        | Transport::PortsFixed
        | Transport::AddressOnly
        | Transport::Unknown => false,
    }
}

/// Writes the ports where this transport has them.
#[inline(always)]
fn store_ports<A: Network, F: Frame>(
    frame: &mut F,
    packet: &Packet<A>,
    rewrite: &Rewrite<A>,
) -> Option<()> {
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
pub fn clamp_segment_size<A: Network, F: Frame>(
    frame: &mut F,
    packet: &Packet<A>,
    most: u16,
) -> Option<()> {
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
    frame.update_checksum::<A>(packet.checksum_offset()?, Delta::ZERO, delta, false)
}

/// Writes the ports of a quoted packet, which travelled against the session's.
#[inline(always)]
fn write_quoted_ports<A: Network, F: Frame>(
    frame: &mut F,
    quoted: &Quoted<A>,
    rewrite: &Rewrite<A>,
) -> Option<()> {
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

/// Translates an ICMP error: the quoted packet becomes what its sender sent,
/// and the error goes to that sender (RFC 5508 REQ-4 and REQ-5).
///
/// `rewrite` is that of the session's packets that travel the error's way;
/// `source` is what becomes the error's source.
#[inline(always)]
pub fn apply_error<A: Network, F: Frame>(
    frame: &mut F,
    packet: &Packet<A>,
    quoted: &Quoted<A>,
    rewrite: &Rewrite<A>,
    source: A,
) -> Option<()> {
    // The quoted packet travelled the other way.
    let addresses = Delta::of_address(quoted.source, rewrite.destination)
        .and(Delta::of_address(quoted.destination, rewrite.source));
    let ports = Delta::of_word(quoted.source_port, rewrite.destination_port)
        .and(Delta::of_word(quoted.destination_port, rewrite.source_port));

    // Every changed word of the quoted packet changes the error's checksum.
    let mut changed = Delta::ZERO;
    if let Some(offset) = quoted.checksum_offset {
        let delta = if covers_addresses::<A>(quoted.transport) {
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
    let quoted_ends = (rewrite.destination, rewrite.source);
    changed = changed.and(A::write_quoted(
        frame,
        quoted.network_offset,
        quoted_ends,
        addresses,
    )?);

    let outer = Delta::of_address(packet.source, source)
        .and(Delta::of_address(packet.destination, rewrite.destination));
    let covered = if covers_addresses::<A>(packet.transport) {
        outer
    } else {
        Delta::ZERO
    };
    let checksum = packet.transport_offset() + 2;
    frame.update_checksum::<A>(checksum, covered, changed, false)?;
    let addresses = (source, rewrite.destination);
    let fewer = packet.time_to_live.wrapping_sub(1);
    A::store(frame, packet.network_offset, addresses, outer, fewer)
}
