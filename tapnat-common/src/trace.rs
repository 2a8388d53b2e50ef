//! What `tapnat trace` and its programs in the kernel share: which packets are
//! wanted, and the record of one. The datapath itself knows nothing of it, but for
//! the number of the reason, which it leaves in the packet where [`NO_REASON`] stood.
//!
//! Nothing of this is pinned or outlives a trace, so it is not part of
//! [`crate::abi`].

use crate::{
    net::{Be16, Be32, icmp, protocol},
    verdict::{Outcome, Reason},
};

/// The programs and maps of a trace, by the names they have in their object file.
pub mod names {
    /// The programs that stand before the datapath's, and call them. Each has a place
    /// in [`TARGETS`] for that of another trace behind it, which calls the datapath's
    /// in its turn, and so many places later one for the datapath's own, for when the
    /// other trace is gone.
    pub const PROGRAMS: [&str; 4] = [
        "trace_inside_ethernet",
        "trace_inside_raw",
        "trace_outside_ethernet",
        "trace_outside_raw",
    ];
    /// The programs that they call. Written by user space only.
    pub const TARGETS: &str = "TARGETS";
    /// [`super::Wanted`] at index 0. Written by user space only.
    pub const WANTED: &str = "WANTED";
    /// [`super::Record`]s, each with the bytes before and the bytes after.
    pub const RECORDS: &str = "RECORDS";
    /// A `u64` for each CPU: records that found no room.
    pub const LOST: &str = "LOST";
}

/// The word of an skb's control block, which TC programs may use among each other
/// (`cb` of `struct __sk_buff`), in which the datapath leaves the number of the
/// reason for which a packet out of the ordinary leaves.
pub const REASON_WORD: usize = 0;

/// What a trace writes there before the datapath looks at the packet.
pub const NO_REASON: u32 = u32::MAX;

/// At most so many bytes of a packet are in a record, before and after each.
pub const MOST_BYTES: u32 = 2048;

/// Values that classifiers return (`linux/pkt_cls.h`; those of TCX are the same).
pub mod actions {
    pub const OK: u32 = 0;
    pub const SHOT: u32 = 2;
    pub const REDIRECT: u32 = 7;
    /// On to the next program or filter: `TC_ACT_UNSPEC`, which is -1.
    pub const NEXT: u32 = u32::MAX;
}

/// Which packets are wanted; 0 stands for any.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// A bit for each [`Reason`].
    pub reasons: u64,
    pub guest: Be32,
    pub remote: Be32,
    /// The index of the device that they arrived on.
    pub device: u32,
    pub port: Be16,
    pub protocol: u8,
    pub zero: u8,
    /// Bytes of each packet to record.
    pub bytes: u32,
    pub padding: u32,
}

/// A packet as it came by, once. What follows in the ring are `before.captured`
/// bytes, then `after.captured` bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// [`Reason`], as a number.
    pub reason: u32,
    /// [`actions`].
    pub action: u32,
    /// The index of the device that it arrived on.
    pub device: u32,
    pub before: Side,
    pub after: Side,
    pub zero: u32,
}

/// A packet before or after the datapath.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Bytes of the packet, with its link header.
    pub length: u32,
    /// Bytes of it in the record.
    pub captured: u32,
    /// Bytes of its link header.
    pub link: u32,
}

/// The ends of a packet, as far as it is IPv4; all 0 where it is not.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub source: Be32,
    pub destination: Be32,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub protocol: u32,
}

impl Ends {
    /// Reads them off the first 20 bytes of an IP packet; `transport` reads the first
    /// eight bytes at this offset.
    #[inline(always)]
    #[must_use]
    pub fn read(header: &[u8; 20], transport: impl FnOnce(u32) -> Option<[u8; 8]>) -> Self {
        let mut ends = Self::default();
        let (first, number) = (header[0], header[9]);
        if first >> 4 != 4 {
            return ends;
        }
        ends.source = Be32::from_bytes([header[12], header[13], header[14], header[15]]);
        ends.destination = Be32::from_bytes([header[16], header[17], header[18], header[19]]);
        ends.protocol = u32::from(number);
        let is_later_fragment = header[6] & 0x1f != 0 || header[7] != 0;
        if is_later_fragment {
            return ends;
        }
        let Some(first_bytes) = transport(u32::from(first & 15) * 4) else {
            return ends;
        };
        match number {
            protocol::TCP | protocol::UDP | protocol::UDP_LITE => {
                ends.source_port = Be16::from_bytes([first_bytes[0], first_bytes[1]]);
                ends.destination_port = Be16::from_bytes([first_bytes[2], first_bytes[3]]);
            }
            // An identifier, where the type has one.
            protocol::ICMP
                if matches!(
                    first_bytes[0],
                    icmp::ECHO_REPLY
                        | icmp::ECHO_REQUEST
                        | icmp::TIMESTAMP_REQUEST
                        | icmp::TIMESTAMP_REPLY
                ) =>
            {
                ends.source_port = Be16::from_bytes([first_bytes[4], first_bytes[5]]);
                ends.destination_port = ends.source_port;
            }
            _ => {}
        }
        ends
    }

    #[inline(always)]
    fn have_address(&self, address: Be32) -> bool {
        self.source == address || self.destination == address
    }

    #[inline(always)]
    fn have_port(&self, port: Be16) -> bool {
        self.source_port == port || self.destination_port == port
    }
}

impl Wanted {
    /// Whether a packet with these ends before and after is wanted.
    #[inline(always)]
    #[must_use]
    pub fn admits(&self, before: &Ends, after: &Ends, device: u32, reason: u32) -> bool {
        let has_address = |address| {
            address == Be32::ZERO || before.have_address(address) || after.have_address(address)
        };
        (self.reasons == 0 || (reason < 64 && self.reasons >> reason & 1 != 0))
            && (self.device == 0 || self.device == device)
            && (self.protocol == 0 || u32::from(self.protocol) == before.protocol)
            && has_address(self.guest)
            && has_address(self.remote)
            && (self.port == Be16::ZERO
                || before.have_port(self.port)
                || after.have_port(self.port))
    }
}

/// A bit for each reason to forward.
const FORWARDS: u64 = {
    let mut bits = 0;
    let mut number = 0;
    while number < Reason::ALL.len() {
        if matches!(Reason::ALL[number].outcome(), Outcome::Forward) {
            bits |= 1 << number;
        }
        number += 1;
    }
    bits
};

const _: () = assert!(
    Reason::COUNT <= u64::BITS,
    "Wanted::reasons has a bit for each"
);

/// The number of the reason for which a packet left, of what the datapath noted and
/// did: it notes none for packets of steady sessions, nor for those that it had no
/// memory to go on with.
#[inline(always)]
#[must_use]
pub const fn reason(noted: u32, action: u32) -> u32 {
    let forwards = noted >= Reason::COUNT || FORWARDS >> noted & 1 != 0;
    if forwards && action == actions::SHOT {
        Reason::RewriteFailed as u32
    } else if noted >= Reason::COUNT {
        Reason::Translated as u32
    } else {
        noted
    }
}

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, of integers, without padding.
    unsafe impl aya::Pod for super::Wanted {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: [u8; 20] = [
        0x46, 0, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 10, 203, 0, 113, 1,
    ];

    fn ends(header: &[u8; 20]) -> Ends {
        Ends::read(header, |offset| {
            (offset == 24).then_some([0x9c, 0x40, 0, 80, 0x12, 0x34, 0, 0])
        })
    }

    #[test]
    fn ends_are_read_as_far_as_they_are_there() {
        let tcp = ends(&TCP);
        assert_eq!(tcp.source, Be32::from_bytes([10, 0, 0, 10]));
        assert_eq!(tcp.destination, Be32::from_bytes([203, 0, 113, 1]));
        assert_eq!(
            (tcp.source_port.get(), tcp.destination_port.get()),
            (40000, 80)
        );
        let mut fragment = TCP;
        fragment[7] = 1;
        assert_eq!(ends(&fragment).source_port, Be16::ZERO);
        let mut ipv6 = TCP;
        ipv6[0] = 0x60;
        assert_eq!(ends(&ipv6), Ends::default());
        let mut ping = TCP;
        ping[9] = protocol::ICMP;
        let read = Ends::read(&ping, |_| Some([8, 0, 0, 0, 0x12, 0x34, 0, 1]));
        assert_eq!(read.source_port.get(), 0x1234);
        let error = Ends::read(&ping, |_| Some([3, 0, 0, 0, 0x12, 0x34, 0, 1]));
        assert_eq!(error.source_port, Be16::ZERO);
    }

    #[test]
    fn what_is_wanted_is_admitted_by_either_side() {
        let before = ends(&TCP);
        let mut after = before;
        after.source = Be32::from_bytes([198, 51, 100, 2]);
        let reason = Reason::SessionStarted as u32;
        let admits = |wanted: Wanted| wanted.admits(&before, &after, 7, reason);
        assert!(admits(Wanted::default()));
        for (right, wrong) in [
            (
                Wanted {
                    guest: before.source,
                    ..Wanted::default()
                },
                Wanted {
                    guest: Be32::new(1),
                    ..Wanted::default()
                },
            ),
            (
                Wanted {
                    remote: after.source,
                    ..Wanted::default()
                },
                Wanted {
                    remote: Be32::new(1),
                    ..Wanted::default()
                },
            ),
            (
                Wanted {
                    port: Be16::new(80),
                    ..Wanted::default()
                },
                Wanted {
                    port: Be16::new(81),
                    ..Wanted::default()
                },
            ),
            (
                Wanted {
                    protocol: 6,
                    ..Wanted::default()
                },
                Wanted {
                    protocol: 17,
                    ..Wanted::default()
                },
            ),
            (
                Wanted {
                    device: 7,
                    ..Wanted::default()
                },
                Wanted {
                    device: 8,
                    ..Wanted::default()
                },
            ),
            (
                Wanted {
                    reasons: 1 << reason,
                    ..Wanted::default()
                },
                Wanted {
                    reasons: 1,
                    ..Wanted::default()
                },
            ),
        ] {
            assert!(admits(right), "{right:?}");
            assert!(!admits(wrong), "{wrong:?}");
        }
    }

    #[test]
    fn reasons_are_told_by_what_was_noted_and_done() {
        let translated = Reason::Translated as u32;
        let lost = Reason::RewriteFailed as u32;
        let filtered = Reason::Filtered as u32;
        assert_eq!(reason(NO_REASON, actions::REDIRECT), translated);
        assert_eq!(reason(NO_REASON, actions::SHOT), lost);
        assert_eq!(reason(translated, actions::SHOT), lost);
        assert_eq!(reason(filtered, actions::SHOT), filtered);
        assert_eq!(reason(filtered, actions::REDIRECT), filtered);
    }
}
