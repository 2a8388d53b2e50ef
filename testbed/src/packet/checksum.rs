//! Independent verification of checksums: a plain sum as RFC 1071 defines it,
//! over every byte, with no incremental update anywhere.

use std::{fmt, net::IpAddr};

use etherparse::{IpNumber, IpSlice, LaxIpSlice};

/// The one's complement sum of 16-bit big-endian words, padded with a zero
/// byte, folded and not complemented (RFC 1071).
#[must_use]
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u16;
    for part in parts {
        for word in part.chunks(2) {
            let word = u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
            let (added, carry) = sum.overflowing_add(word);
            // After a carry the lower bits are at most 0xfffe.
            sum = added + u16::from(carry);
        }
    }
    sum
}

/// The pseudo-header that TCP, UDP and ICMPv6 checksums cover (RFC 9293
/// section 3.1, RFC 8200 section 8.1).
#[must_use]
pub fn pseudo_header(
    source: IpAddr,
    destination: IpAddr,
    protocol: IpNumber,
    length: usize,
) -> Vec<u8> {
    let mut header = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => header.extend(address.octets()),
            IpAddr::V6(address) => header.extend(address.octets()),
        }
    }
    // Both layouts add the same words: length and protocol number.
    // A length of 64 bits would add the same words, the upper ones being zero.
    header.extend((length as u64).to_be_bytes());
    header.extend([0, protocol.0]);
    header
}

/// Where the checksum is in the transport header, or none for protocols whose
/// checksum is not this one.
#[must_use]
pub fn offset(protocol: IpNumber) -> Option<usize> {
    match protocol {
        IpNumber::TCP => Some(16),
        IpNumber::UDP => Some(6),
        IpNumber::ICMP | IpNumber::IPV6_ICMP => Some(2),
        _ => None,
    }
}

/// What is wrong with a packet's checksums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The packet cannot be read.
    Malformed(String),
    /// A checksum has another value than the bytes it covers ask for.
    Wrong {
        /// Which one.
        what: &'static str,
        /// What the packet says.
        found: u16,
        /// What it ought to say.
        expected: u16,
    },
    /// IPv6 asks for a UDP checksum (RFC 8200 section 8.1).
    Missing,
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(reason) => write!(formatter, "malformed: {reason}"),
            Self::Wrong {
                what,
                found,
                expected,
            } => {
                write!(
                    formatter,
                    "{what} checksum is {found:#06x} and should be {expected:#06x}"
                )
            }
            Self::Missing => write!(formatter, "UDP over IPv6 without a checksum"),
        }
    }
}

/// What the transport checksum is expected to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The checksum of the whole.
    Complete,
    /// The sum of the pseudo-header alone, for a device or the kernel to
    /// complete (`CHECKSUM_PARTIAL`).
    PseudoHeader,
}

/// Verifies every checksum of an IP packet: the IPv4 header's, the transport
/// header's (not in fragments: see [`verify_transport`]), and that of an IPv4
/// header quoted in an ICMP error.
///
/// Exact values are asked for: the other zero of one's complement arithmetic
/// is a fault too.
///
/// # Errors
/// The first fault found.
pub fn verify(packet: &[u8], expect: Expect) -> Result<(), Fault> {
    let ip = IpSlice::from_slice(packet).map_err(|error| Fault::Malformed(error.to_string()))?;
    if let Some(ipv4) = ip.ipv4() {
        verify_ipv4_header(ipv4.header().slice(), "IPv4 header")?;
    }
    if ip.is_fragmenting_payload() {
        return Ok(());
    }
    let payload = ip.payload();
    let (source, destination) = (ip.source_addr(), ip.destination_addr());
    verify_transport(
        source,
        destination,
        payload.ip_number,
        payload.payload,
        expect,
    )?;
    let is_error = payload.ip_number == IpNumber::ICMP
        && matches!(payload.payload.first(), Some(3 | 4 | 5 | 11 | 12));
    if is_error
        && let Some(quote) = payload.payload.get(8..)
        && let Ok((LaxIpSlice::Ipv4(quoted), _)) = LaxIpSlice::from_slice(quote)
    {
        verify_ipv4_header(quoted.header().slice(), "quoted IPv4 header")?;
    }
    Ok(())
}

/// Verifies the transport checksum of a packet's whole payload.
///
/// # Errors
/// The fault found.
pub fn verify_transport(
    source: IpAddr,
    destination: IpAddr,
    protocol: IpNumber,
    payload: &[u8],
    expect: Expect,
) -> Result<(), Fault> {
    let Some(offset) = offset(protocol) else {
        return Ok(());
    };
    let Some(field) = payload.get(offset..offset + 2) else {
        return Err(Fault::Malformed(
            "the transport header is cut off".to_owned(),
        ));
    };
    let found = u16::from_be_bytes([field[0], field[1]]);
    if protocol == IpNumber::UDP && found == 0 && expect == Expect::Complete {
        return if source.is_ipv4() {
            Ok(())
        } else {
            Err(Fault::Missing)
        };
    }
    let pseudo = match protocol {
        IpNumber::ICMP => Vec::new(),
        _ => pseudo_header(source, destination, protocol, payload.len()),
    };
    let expected = match expect {
        Expect::PseudoHeader => sum(&[&pseudo]),
        Expect::Complete => {
            match !sum(&[&pseudo, &payload[..offset], &payload[offset + 2..]]) {
                // RFC 768: zero would say that there is none.
                0 if protocol == IpNumber::UDP => 0xffff,
                checksum => checksum,
            }
        }
    };
    let what = match protocol {
        IpNumber::TCP => "TCP",
        IpNumber::UDP => "UDP",
        _ => "ICMP",
    };
    if found == expected {
        Ok(())
    } else {
        Err(Fault::Wrong {
            what,
            found,
            expected,
        })
    }
}

fn verify_ipv4_header(header: &[u8], what: &'static str) -> Result<(), Fault> {
    let found = u16::from_be_bytes([header[10], header[11]]);
    let expected = !sum(&[&header[..10], &header[12..]]);
    if found == expected {
        Ok(())
    } else {
        Err(Fault::Wrong {
            what,
            found,
            expected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Link, Parsed, tcp, udp};

    #[test]
    fn sum_of_the_example_in_rfc_1071() {
        assert_eq!(
            sum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]),
            0xddf2
        );
        assert_eq!(sum(&[&[0xff]]), 0xff00);
        assert_eq!(sum(&[]), 0);
    }

    /// The well-known example header with the checksum 0xb861.
    #[test]
    fn header_from_a_textbook() {
        let header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8,
            0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7,
        ];
        assert_eq!(verify_ipv4_header(&header, "IPv4 header"), Ok(()));
    }

    #[test]
    fn agrees_with_etherparse() {
        let (source, destination) = (
            "10.0.0.10:1234".parse().unwrap(),
            "203.0.113.1:80".parse().unwrap(),
        );
        let packet = tcp(source, destination).payload(b"odd").build();
        let parsed = Parsed::new(Link::Ip, &packet).unwrap();
        let header = parsed.tcp().unwrap();
        let expected = header
            .calc_checksum_ipv4(parsed.ipv4().unwrap(), &parsed.payload)
            .unwrap();
        assert_eq!(header.checksum, expected);
        assert_eq!(
            parsed.ipv4().unwrap().calc_header_checksum(),
            parsed.ipv4().unwrap().header_checksum
        );
    }

    #[test]
    fn zero_udp_checksum_is_fine_in_ipv4_only() {
        let packet = |source: &str, destination: &str| {
            udp(source.parse().unwrap(), destination.parse().unwrap())
                .payload(b"data")
                .without_udp_checksum()
                .build()
        };
        assert_eq!(
            verify(&packet("10.0.0.1:1", "10.0.0.2:2"), Expect::Complete),
            Ok(())
        );
        assert_eq!(
            verify(&packet("[fd00::1]:1", "[fd00::2]:2"), Expect::Complete),
            Err(Fault::Missing)
        );
    }

    #[test]
    fn a_computed_zero_is_sent_as_all_ones() {
        let (source, destination) = (
            "10.0.0.10:1234".parse().unwrap(),
            "203.0.113.1:80".parse().unwrap(),
        );
        // The payload is chosen so that everything else sums to 0xffff.
        let rest = udp(source, destination).payload(&[0, 0]).build();
        let fill = u16::from_be_bytes([rest[26], rest[27]]);
        let packet = udp(source, destination)
            .payload(&fill.to_be_bytes())
            .build();
        assert_eq!(packet[26..28], [0xff, 0xff]);
        assert_eq!(verify(&packet, Expect::Complete), Ok(()));
    }

    #[test]
    fn each_fault_is_found() {
        let builder = tcp(
            "10.0.0.10:1".parse().unwrap(),
            "203.0.113.1:2".parse().unwrap(),
        );
        let wrong = |packet: &[u8]| match verify(packet, Expect::Complete) {
            Err(Fault::Wrong { what, .. }) => what,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            wrong(&builder.clone().bad_ip_checksum().build()),
            "IPv4 header"
        );
        assert_eq!(
            wrong(&builder.clone().bad_transport_checksum().build()),
            "TCP"
        );
        let partial = builder.clone().partial_checksum().build();
        assert_eq!(wrong(&partial), "TCP");
        assert_eq!(verify(&partial, Expect::PseudoHeader), Ok(()));
        assert!(verify(&builder.build(), Expect::PseudoHeader).is_err());
    }

    #[test]
    fn the_quoted_header_is_verified() {
        let quoted = udp(
            "10.0.0.10:1".parse().unwrap(),
            "203.0.113.1:2".parse().unwrap(),
        );
        let error = |quoted: &[u8]| {
            let (source, destination) = (
                "198.51.100.1".parse().unwrap(),
                "10.0.0.10".parse().unwrap(),
            );
            crate::packet::time_exceeded(source, destination, quoted).build()
        };
        assert_eq!(verify(&error(&quoted.build()), Expect::Complete), Ok(()));
        assert!(matches!(
            verify(&error(&quoted.bad_ip_checksum().build()), Expect::Complete),
            Err(Fault::Wrong {
                what: "quoted IPv4 header",
                ..
            })
        ));
    }
}
