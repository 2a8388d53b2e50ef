//! What is still to be done to a packet, as the virtio network header says it
//! (virtio 1.2, section 5.1.6; `struct virtio_net_hdr`, in native byte order
//! as taps and packet sockets have it).

const NEEDS_CHECKSUM: u8 = 1;
/// Set in addition to the kind when the packet has ECN's CWR flag.
const ECN: u8 = 0x80;

/// Length of the header with the number of buffers, which QEMU's virtio-net
/// and the taps of this crate use.
pub(crate) const LONG_HEADER: usize = 12;
/// Length of the header without it, which packet sockets use.
pub(crate) const SHORT_HEADER: usize = 10;

/// What is still to be done to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// Where to complete the transport checksum (`CHECKSUM_PARTIAL`).
    pub checksum: Option<ChecksumPlace>,
    /// How to segment the packet.
    pub gso: Option<Gso>,
    /// Length in bytes of all headers of a packet to be segmented.
    pub header_length: u16,
}

/// Which bytes a checksum covers, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChecksumPlace {
    /// Offset in bytes of the transport header from the packet's beginning.
    pub start: u16,
    /// Offset in bytes of the checksum from there.
    pub offset: u16,
}

/// Segmentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// What is segmented.
    pub kind: GsoKind,
    /// Payload bytes of each segment.
    pub size: u16,
}

/// What is segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP, into datagrams.
    Udp,
    /// A kind unknown here, such as UDP into fragments.
    Other(u8),
}

impl GsoKind {
    fn number(self) -> u8 {
        match self {
            Self::TcpV4 => 1,
            Self::TcpV6 => 4,
            Self::Udp => 5,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            1 => Self::TcpV4,
            4 => Self::TcpV6,
            5 => Self::Udp,
            other => Self::Other(other),
        }
    }
}

impl Offload {
    /// Reads a header of either length.
    pub(crate) fn from_header(header: &[u8]) -> Self {
        let number = |offset: usize| u16::from_ne_bytes([header[offset], header[offset + 1]]);
        let partial = header[0] & NEEDS_CHECKSUM != 0;
        let kind = header[1] & !ECN;
        Self {
            checksum: partial.then(|| ChecksumPlace {
                start: number(6),
                offset: number(8),
            }),
            gso: (kind != 0).then(|| Gso {
                kind: GsoKind::from_number(kind),
                size: number(4),
            }),
            header_length: number(2),
        }
    }

    /// Writes the long header.
    pub(crate) fn to_header(self) -> [u8; LONG_HEADER] {
        let mut header = [0; LONG_HEADER];
        let mut put = |offset: usize, number: u16| {
            header[offset..offset + 2].copy_from_slice(&number.to_ne_bytes());
        };
        put(2, self.header_length);
        if let Some(gso) = self.gso {
            put(4, gso.size);
        }
        if let Some(place) = self.checksum {
            put(6, place.start);
            put(8, place.offset);
        }
        header[0] = if self.checksum.is_some() {
            NEEDS_CHECKSUM
        } else {
            0
        };
        header[1] = self.gso.map_or(0, |gso| gso.kind.number());
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip() {
        for kind in [
            GsoKind::TcpV4,
            GsoKind::TcpV6,
            GsoKind::Udp,
            GsoKind::Other(3),
        ] {
            let offload = Offload {
                checksum: Some(ChecksumPlace {
                    start: 34,
                    offset: 16,
                }),
                gso: Some(Gso { kind, size: 1448 }),
                header_length: 66,
            };
            assert_eq!(Offload::from_header(&offload.to_header()), offload);
        }
        assert_eq!(Offload::default().to_header(), [0; LONG_HEADER]);
        assert_eq!(Offload::from_header(&[0; SHORT_HEADER]), Offload::default());
    }

    #[test]
    fn congestion_marks_are_not_part_of_the_kind() {
        let header = [1, 0x81, 0, 0, 0, 0, 0, 0, 0, 0];
        let gso = Offload::from_header(&header).gso.unwrap();
        assert_eq!(gso.kind, GsoKind::TcpV4);
    }
}
