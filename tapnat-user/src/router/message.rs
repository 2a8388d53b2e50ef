//! What a router says: router advertisements (RFC 4861 section 4.2), and what of solicitations is
//! looked at. `smoltcp` reads and writes; of the options that it does not know this writes the bytes,
//! and reads none.

use std::{net::Ipv6Addr, time::Duration};

use ipnet::Ipv6Net;
use smoltcp::{
    time::Duration as WireDuration,
    wire::{
        Icmpv6Packet, NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags,
        RawHardwareAddress,
    },
};

/// How long guests go by what they were told: as long as by a DHCP lease, and several times longer
/// than until they are told again. (The most for a router is 9000 seconds.)
const LIFETIME: Duration = Duration::from_hours(1);
/// How long a guest keeps an address that it has by the prefix. Begins anew with each advertisement;
/// no host lets anybody lower it under two hours (RFC 4862 section 5.5.3).
const PREFIX_LIFETIME: Duration = Duration::from_hours(2);
/// The hop limit that guests are to begin with.
const HOP_LIMIT: u8 = 64;
/// In a prefix of another length no guest chooses its address itself (RFC 4862 section 5.5.3, RFC
/// 4291 section 2.5.1).
const CHOOSABLE: u8 = 64;

/// Options that `smoltcp` does not write.
mod option {
    pub const RECURSIVE_DNS_SERVERS: u8 = 25;
    pub const DNS_SEARCH_LIST: u8 = 31;
    pub const PREF64: u8 = 38;
}
/// The unit of an option's length (RFC 4861 section 4.6).
const UNIT: usize = 8;

/// What guests are told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Advertisement<'a> {
    /// On devices that have one.
    pub link_address: Option<[u8; 6]>,
    /// The guests' network.
    pub network: Ipv6Net,
    /// Bytes.
    pub mtu: u32,
    /// Whether a DHCP server gives addresses, and tells the rest.
    pub managed: bool,
    pub resolvers: &'a [Ipv6Addr],
    pub domain: Option<&'a str>,
    /// What stands for IPv4 addresses, where the host translates these.
    pub nat64: Option<Ipv6Net>,
    /// Whether this is the last one: nothing of it is of use any more.
    pub last: bool,
}

impl Advertisement<'_> {
    /// The ICMPv6 message, with a checksum of zero: the kernel completes that.
    pub fn to_bytes(&self) -> Vec<u8> {
        let lifetime = if self.last { Duration::ZERO } else { LIFETIME };
        let mut flags = NdiscRouterFlags::empty();
        flags.set(
            NdiscRouterFlags::MANAGED | NdiscRouterFlags::OTHER,
            self.managed,
        );
        let mut prefix_flags = NdiscPrefixInfoFlags::ON_LINK;
        prefix_flags.set(
            NdiscPrefixInfoFlags::ADDRCONF,
            self.network.prefix_len() == CHOOSABLE,
        );
        let advertisement = NdiscRepr::RouterAdvert {
            hop_limit: HOP_LIMIT,
            flags,
            router_lifetime: wire(lifetime),
            // Both are up to the guest.
            reachable_time: wire(Duration::ZERO),
            retrans_time: wire(Duration::ZERO),
            lladdr: self
                .link_address
                .map(|address| RawHardwareAddress::from_bytes(&address)),
            mtu: Some(self.mtu),
            prefix_info: Some(NdiscPrefixInformation {
                prefix_len: self.network.prefix_len(),
                flags: prefix_flags,
                valid_lifetime: wire(PREFIX_LIFETIME),
                preferred_lifetime: wire(lifetime),
                prefix: self.network.network(),
            }),
        };
        let mut message = vec![0; advertisement.buffer_len()];
        advertisement.emit(&mut Icmpv6Packet::new_unchecked(&mut message));
        if !self.resolvers.is_empty() {
            message.extend(recursive_dns_servers(self.resolvers, lifetime));
        }
        if let Some(domain) = self.domain {
            message.extend(dns_search_list(domain, lifetime));
        }
        if let Some(prefix) = self.nat64 {
            message.extend(pref64(prefix, lifetime));
        }
        message
    }
}

fn wire(duration: Duration) -> WireDuration {
    WireDuration::from_secs(duration.as_secs())
}

/// RFC 8106 section 5.1.
fn recursive_dns_servers(addresses: &[Ipv6Addr], lifetime: Duration) -> Vec<u8> {
    let addresses = addresses.iter().flat_map(Ipv6Addr::octets);
    lasting(option::RECURSIVE_DNS_SERVERS, lifetime, addresses)
}

/// RFC 8106 section 5.2: the name as in a DNS message (RFC 1035 section 3.1), without compression.
fn dns_search_list(domain: &str, lifetime: Duration) -> Vec<u8> {
    let labels = domain.split('.').flat_map(|label| {
        // What is longer is no label, and no configuration has it.
        let length = u8::try_from(label.len()).unwrap_or_default();
        std::iter::once(length).chain(label.bytes().take(length.into()))
    });
    let root = [0];
    lasting(option::DNS_SEARCH_LIST, lifetime, labels.chain(root))
}

/// Both have two reserved bytes and a lifetime in seconds before the rest, and zeros at the end.
fn lasting(kind: u8, lifetime: Duration, rest: impl Iterator<Item = u8>) -> Vec<u8> {
    let seconds = u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX);
    let mut option = vec![kind, 0, 0, 0];
    option.extend(seconds.to_be_bytes());
    option.extend(rest);
    with_length(option)
}

/// RFC 8781 section 4: 13 bits of lifetime in units of 8 seconds, 3 bits for the prefix's length, and
/// the first 96 bits of the prefix.
fn pref64(prefix: Ipv6Net, lifetime: Duration) -> Vec<u8> {
    const LENGTHS: [u8; 6] = [96, 64, 56, 48, 40, 32];
    const LONGEST: u16 = 0x1fff;
    let code = LENGTHS
        .iter()
        .position(|length| *length == prefix.prefix_len());
    // Any other is none of RFC 6052, and no configuration has it.
    let Some(code) = code.and_then(|code| u16::try_from(code).ok()) else {
        return Vec::new();
    };
    let scaled = u16::try_from(lifetime.as_secs().div_ceil(8))
        .unwrap_or(LONGEST)
        .min(LONGEST);
    let mut option = vec![option::PREF64, 0];
    option.extend((scaled << 3 | code).to_be_bytes());
    option.extend(prefix.network().octets().iter().take(12));
    with_length(option)
}

/// Fills up to a whole number of units, and says how many these are.
fn with_length(mut option: Vec<u8>) -> Vec<u8> {
    option.resize(option.len().next_multiple_of(UNIT), 0);
    let units = u8::try_from(option.len() / UNIT).unwrap_or(u8::MAX);
    if let Some(length) = option.get_mut(1) {
        *length = units;
    }
    option
}

/// What a router solicitation says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Solicitation {
    /// With it the kernel knows the sender's link address.
    pub has_link_address: bool,
}

impl Solicitation {
    /// Reads a router solicitation to go by (RFC 4861 section 6.1.1), from a guest that has an address
    /// or says that it has none. The kernel has looked at its checksum and hop limit.
    pub fn read(message: &[u8], has_address: bool) -> Option<Self> {
        let packet = Icmpv6Packet::new_checked(message).ok()?;
        let NdiscRepr::RouterSolicit { lladdr } = NdiscRepr::parse(&packet).ok()? else {
            return None;
        };
        let has_link_address = lladdr.is_some();
        let is_right = packet.msg_code() == 0 && (has_address || !has_link_address);
        is_right.then_some(Self { has_link_address })
    }
}

#[cfg(test)]
mod tests {
    use etherparse::icmpv6::{NdpOptionSlice, NdpOptionsIterator};

    use super::*;

    const RESOLVERS: [Ipv6Addr; 1] = [Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53)];

    fn advertisement() -> Advertisement<'static> {
        Advertisement {
            link_address: Some([2, 0, 0, 0, 0, 1]),
            network: "fd00:7a70::1/64".parse().unwrap(),
            mtu: 1400,
            managed: true,
            resolvers: &RESOLVERS,
            domain: Some("lan.example"),
            nat64: Some("64:ff9b::/96".parse().unwrap()),
            last: false,
        }
    }

    /// The options, read by another crate than the one that wrote them.
    fn options(message: &[u8]) -> Vec<(u8, Vec<u8>)> {
        NdpOptionsIterator::from_slice(&message[16..])
            .map(|option| {
                let option: NdpOptionSlice<'_> = option.unwrap();
                (option.option_type().0, option.as_bytes().to_vec())
            })
            .collect()
    }

    #[test]
    fn an_advertisement_says_all_that_there_is() {
        let message = advertisement().to_bytes();
        // Type, code, checksum, hop limit, managed and other, an hour, and nothing of the timers.
        assert_eq!(message[..8], [134, 0, 0, 0, 64, 0xc0, 0x0e, 0x10]);
        assert_eq!(message[8..16], [0; 8]);
        let options = options(&message);
        let kinds: Vec<_> = options.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [1, 5, 3, 25, 31, 38]);
        assert_eq!(options[0].1, [1, 1, 2, 0, 0, 0, 0, 1]);
        assert_eq!(options[1].1, [5, 1, 0, 0, 0, 0, 0x05, 0x78]);
        // On the link and to choose from, for two hours, of which it is preferred for one.
        let prefix = [
            3, 4, 64, 0xc0, 0, 0, 0x1c, 0x20, 0, 0, 0x0e, 0x10, 0, 0, 0, 0,
        ];
        assert_eq!(options[2].1[..16], prefix);
        assert_eq!(options[2].1[16..22], [0xfd, 0, 0x7a, 0x70, 0, 0]);
        assert_eq!(options[3].1[..8], [25, 3, 0, 0, 0, 0, 0x0e, 0x10]);
        assert_eq!(options[3].1[8..12], [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(options[4].1[..8], [31, 3, 0, 0, 0, 0, 0x0e, 0x10]);
        assert_eq!(options[4].1[8..], *b"\x03lan\x07example\0\0\0\0");
        // 450 units of 8 seconds, a prefix of 96 bits.
        let pref64 = [
            38, 2, 0x0e, 0x10, 0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(options[5].1, pref64);
    }

    #[test]
    fn there_is_no_more_than_that() {
        let message = Advertisement {
            link_address: None,
            network: "fd00::1/120".parse().unwrap(),
            managed: false,
            resolvers: &[],
            domain: None,
            nat64: None,
            ..advertisement()
        }
        .to_bytes();
        assert_eq!(message[5], 0);
        let options = options(&message);
        let kinds: Vec<_> = options.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [5, 3]);
        // On the link, and nobody's choice.
        assert_eq!(options[1].1[2..4], [120, 0x80]);
    }

    #[test]
    fn nothing_of_the_last_one_is_of_use() {
        let message = Advertisement {
            last: true,
            ..advertisement()
        }
        .to_bytes();
        assert_eq!(message[6..8], [0, 0]);
        let options = options(&message);
        assert_eq!(options[2].1[4..12], [0, 0, 0x1c, 0x20, 0, 0, 0, 0]);
        assert_eq!(options[3].1[4..8], [0; 4]);
        assert_eq!(options[4].1[4..8], [0; 4]);
        assert_eq!(options[5].1[2..4], [0, 0]);
    }

    /// The codes of RFC 8781 section 4.
    #[test]
    fn every_length_of_a_nat64_prefix_has_its_code() {
        for (length, code) in [(96, 0), (64, 1), (56, 2), (48, 3), (40, 4), (32, 5)] {
            let prefix = Ipv6Net::new(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), length);
            let option = pref64(prefix.unwrap(), Duration::from_mins(10));
            assert_eq!(option[2..4], (75_u16 << 3 | code).to_be_bytes(), "{length}");
        }
    }

    #[test]
    fn only_what_is_a_solicitation_is_heard() {
        let bare = [133, 0, 0, 0, 0, 0, 0, 0];
        let read = |message: &[u8]| {
            let read = Solicitation::read(message, true);
            read.map(|it| it.has_link_address)
        };
        assert_eq!(read(&bare), Some(false));
        assert!(Solicitation::read(&bare, false).is_some());
        let with = |more: &[u8]| [&bare[..], more].concat();
        let with_address = with(&[1, 1, 2, 0, 0, 0, 0, 7]);
        assert_eq!(read(&with_address), Some(true));
        assert_eq!(
            Solicitation::read(&with_address, false),
            None,
            "it has none"
        );
        // An option that nobody knows (a nonce) is no obstacle; one without a length is.
        assert_eq!(read(&with(&[14, 1, 1, 2, 3, 4, 5, 6])), Some(false));
        assert_eq!(read(&with(&[14, 0, 1, 2, 3, 4, 5, 6])), None);
        assert_eq!(read(&with(&[1, 2, 2, 0, 0, 0, 0, 7])), None);
        for message in [&[][..], &bare[..7], &[133, 1, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(read(message), None, "{message:?}");
        }
        assert_eq!(read(&advertisement().to_bytes()), None);
    }

    /// Guests send what they like: nothing of it ends the process.
    #[test]
    fn no_message_is_too_odd() {
        let mut state = 1_u32;
        for _ in 0..200_000 {
            let mut next = || {
                // xorshift (Marsaglia, 2003).
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state
            };
            let length = next() % 80;
            let mut message: Vec<_> = (0..length).map(|_| next().to_be_bytes()[3]).collect();
            // Small lengths and known kinds get further.
            for byte in message.iter_mut().skip(8) {
                *byte %= 7;
            }
            for (place, byte) in message.iter_mut().zip([133, 0]) {
                *place = byte;
            }
            let _ = Solicitation::read(&message, true);
        }
    }
}
