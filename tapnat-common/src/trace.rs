//! What `tapnat trace` and its programs in the kernel share: which packets are
//! wanted, and the record of one. The datapath itself knows nothing of it, but for
//! the number of the reason, which it leaves in the packet where [`NO_REASON`] stood.
//!
//! Nothing of this is pinned or outlives a trace, so it is not part of
//! [`crate::abi`].

use crate::{
    net::{Address as _, Be16, Be32, Be128, icmp, icmpv6, protocol},
    network,
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

/// A set of [`Reason`]s, by their numbers.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasons([u64; 2]);

impl Reasons {
    const NONE: Self = Self([0; 2]);

    /// These and one more.
    #[must_use]
    pub const fn with(self, reason: Reason) -> Self {
        let Self([low, high]) = self;
        let number = reason as u32;
        let bit = 1 << (number & 63);
        if number < u64::BITS {
            Self([low | bit, high])
        } else {
            Self([low, high | bit])
        }
    }

    #[inline(always)]
    const fn has(self, number: u32) -> bool {
        let Self([low, high]) = self;
        let word = if number < u64::BITS { low } else { high };
        number < Reason::COUNT && word >> (number & 63) & 1 != 0
    }

    #[inline(always)]
    const fn is_empty(self) -> bool {
        let Self([low, high]) = self;
        low | high == 0
    }
}

const _: () = assert!(Reason::COUNT <= 2 * u64::BITS, "Reasons has a bit for each");

/// Which packets are wanted; 0 stands for any.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub reasons: Reasons,
    /// Of either family: see [`Address::mapped`](crate::net::Address::mapped).
    pub guest: Be128,
    pub remote: Be128,
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

/// The ends of a packet, as far as it is IP; all 0 where it is not. Addresses of IPv4 are mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub source: Be128,
    pub destination: Be128,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub protocol: u32,
}

impl Ends {
    /// Reads them off the first 20 bytes of an IP packet; `address` reads 16 bytes at this
    /// offset, and `part` eight.
    #[inline(always)]
    #[must_use]
    pub fn read(
        header: &[u8; 20],
        address: impl Fn(u32) -> Option<[u8; 16]>,
        part: impl Fn(u32) -> Option<[u8; 8]>,
    ) -> Self {
        let mut ends = Self::default();
        let transport = match header[0] >> 4 {
            4 => ends.read_ipv4(header),
            6 => ends.read_ipv6(header, address, &part),
            0..=u8::MAX => None,
        };
        if let Some(first_bytes) = transport.and_then(part) {
            ends.read_ports(first_bytes);
        }
        ends
    }

    /// Returns where the transport header is, if there is one.
    #[inline(always)]
    fn read_ipv4(&mut self, header: &[u8; 20]) -> Option<u32> {
        let word = |at: usize| {
            Be32::from_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        self.source = word(12).mapped();
        self.destination = word(16).mapped();
        self.protocol = u32::from(header[9]);
        let is_later_fragment = header[6] & 0x1f != 0 || header[7] != 0;
        (!is_later_fragment).then_some(u32::from(header[0] & 15) * 4)
    }

    #[inline(always)]
    fn read_ipv6(
        &mut self,
        header: &[u8; 20],
        address: impl Fn(u32) -> Option<[u8; 16]>,
        part: impl Fn(u32) -> Option<[u8; 8]>,
    ) -> Option<u32> {
        self.source = Be128::from_bytes(address(8)?);
        self.destination = Be128::from_bytes(address(24)?);
        self.protocol = u32::from(header[6]);
        let (number, transport) = network::behind_extensions(header[6], part)?;
        self.protocol = u32::from(number);
        transport
    }

    #[inline(always)]
    fn read_ports(&mut self, bytes: [u8; 8]) {
        const TCP: u32 = protocol::TCP as u32;
        const UDP: u32 = protocol::UDP as u32;
        const UDP_LITE: u32 = protocol::UDP_LITE as u32;
        const ICMP: u32 = protocol::ICMP as u32;
        const ICMPV6: u32 = protocol::ICMPV6 as u32;
        let [source @ .., _, _, _, _, _, _] = bytes;
        let [_, _, destination @ .., _, _, _, _] = bytes;
        let [kind, _, _, _, identifier @ .., _, _] = bytes;
        // An identifier, where the type has one.
        let is_query = match self.protocol {
            TCP | UDP | UDP_LITE => {
                self.source_port = Be16::from_bytes(source);
                self.destination_port = Be16::from_bytes(destination);
                false
            }
            ICMP => matches!(
                kind,
                icmp::ECHO_REPLY
                    | icmp::ECHO_REQUEST
                    | icmp::TIMESTAMP_REQUEST
                    | icmp::TIMESTAMP_REPLY
            ),
            ICMPV6 => matches!(kind, icmpv6::ECHO_REQUEST | icmpv6::ECHO_REPLY),
            _ => false,
        };
        if is_query {
            self.source_port = Be16::from_bytes(identifier);
            self.destination_port = self.source_port;
        }
    }

    #[inline(always)]
    fn have_address(&self, address: Be128) -> bool {
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
            address == Be128::ZERO || before.have_address(address) || after.have_address(address)
        };
        (self.reasons.is_empty() || self.reasons.has(reason))
            && (self.device == 0 || self.device == device)
            && (self.protocol == 0 || u32::from(self.protocol) == before.protocol)
            && has_address(self.guest)
            && has_address(self.remote)
            && (self.port == Be16::ZERO
                || before.have_port(self.port)
                || after.have_port(self.port))
    }
}

/// The reasons to forward.
const FORWARDS: Reasons = {
    let mut reasons = Reasons::NONE;
    let mut number = 0;
    while number < Reason::ALL.len() {
        let reason = Reason::ALL[number];
        if matches!(reason.outcome(), Outcome::Forward) {
            reasons = reasons.with(reason);
        }
        number += 1;
    }
    reasons
};

/// The number of the reason for which a packet left, of what the datapath noted and
/// did: it notes none for packets of steady sessions, nor for those that it had no
/// memory to go on with.
#[inline(always)]
#[must_use]
pub const fn reason(noted: u32, action: u32) -> u32 {
    let forwards = noted >= Reason::COUNT || FORWARDS.has(noted);
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
        let ports = |offset| (offset == 24).then_some([0x9c, 0x40, 0, 80, 0x12, 0x34, 0, 0]);
        Ends::read(header, |_| None, ports)
    }

    #[test]
    fn ends_are_read_as_far_as_they_are_there() {
        let tcp = ends(&TCP);
        assert_eq!(tcp.source, Be32::from_bytes([10, 0, 0, 10]).mapped());
        let destination = Be32::from_bytes([203, 0, 113, 1]);
        assert_eq!(tcp.destination, destination.mapped());
        assert_eq!(
            (tcp.source_port.get(), tcp.destination_port.get()),
            (40000, 80)
        );
        let mut fragment = TCP;
        fragment[7] = 1;
        assert_eq!(ends(&fragment).source_port, Be16::ZERO);
        let mut neither = TCP;
        neither[0] = 0x50;
        assert_eq!(ends(&neither), Ends::default());
        let mut ping = TCP;
        ping[9] = protocol::ICMP;
        let read = Ends::read(&ping, |_| None, |_| Some([8, 0, 0, 0, 0x12, 0x34, 0, 1]));
        assert_eq!(read.source_port.get(), 0x1234);
        let error = Ends::read(&ping, |_| None, |_| Some([3, 0, 0, 0, 0x12, 0x34, 0, 1]));
        assert_eq!(error.source_port, Be16::ZERO);
    }

    #[test]
    fn ipv6_is_read_behind_its_extension_headers() {
        let address = |last| {
            let mut address = [0; 16];
            (address[0], address[15]) = (0xfd, last);
            address
        };
        let read = |first, parts: &[(u32, [u8; 8])]| {
            let mut header = [0; 20];
            (header[0], header[6]) = (0x60, first);
            Ends::read(
                &header,
                |offset| match offset {
                    8 => Some(address(1)),
                    24 => Some(address(2)),
                    _ => None,
                },
                |offset| parts.iter().find(|(at, _)| *at == offset).map(|it| it.1),
            )
        };
        let ports = [0x9c, 0x40, 0, 80, 0, 0, 0, 0];
        let udp = read(protocol::UDP, &[(40, ports)]);
        assert_eq!(udp.source, Be128::from_bytes(address(1)));
        assert_eq!(udp.destination, Be128::from_bytes(address(2)));
        assert_eq!(udp.destination_port.get(), 80);
        let options = [protocol::TCP, 1, 0, 0, 0, 0, 0, 0];
        let tcp = read(protocol::DESTINATION_OPTIONS, &[(40, options), (56, ports)]);
        assert_eq!((tcp.protocol, tcp.source_port.get()), (6, 40000));
        let later = [protocol::UDP, 0, 0, 8, 0, 0, 0, 1];
        let fragment = read(protocol::FRAGMENT, &[(40, later), (48, ports)]);
        assert_eq!((fragment.protocol, fragment.source_port.get()), (17, 0));
        let ping = [128, 0, 0, 0, 0x12, 0x34, 0, 1];
        let ping = read(protocol::ICMPV6, &[(40, ping)]);
        assert_eq!(ping.source_port.get(), 0x1234);
        let cut = read(protocol::DESTINATION_OPTIONS, &[]);
        assert_eq!(cut.source, udp.source);
    }

    #[test]
    fn every_reason_has_a_place_of_its_own() {
        for one in Reason::ALL {
            let set = Reasons::NONE.with(*one);
            for other in Reason::ALL {
                assert_eq!(set.has(*other as u32), one == other);
            }
            assert!(!set.has(NO_REASON) && !set.is_empty());
        }
    }

    #[test]
    fn what_is_wanted_is_admitted_by_either_side() {
        let before = ends(&TCP);
        let mut after = before;
        after.source = Be32::from_bytes([198, 51, 100, 2]).mapped();
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
                    guest: Be128::new(1),
                    ..Wanted::default()
                },
            ),
            (
                Wanted {
                    remote: after.source,
                    ..Wanted::default()
                },
                Wanted {
                    remote: Be128::new(1),
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
                    reasons: Reasons::NONE.with(Reason::SessionStarted),
                    ..Wanted::default()
                },
                Wanted {
                    reasons: Reasons::NONE.with(Reason::ALL[0]),
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
