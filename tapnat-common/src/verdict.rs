//! What can become of a packet, and the one table of reasons for it.
//!
//! A [`Reason`] is the counter's index, the CLI's label, the metric's label and
//! what tests assert. The numbers are ABI: they rise with the table's layout
//! version, and a label never changes its meaning.

use crate::{
    abi::{EndpointKey, FlowKey, Session},
    nat::{Route, session::Other},
    net::Be32,
    network::Network,
    parse::Quoted,
    rewrite::Rewrite,
    time::{Instant, Slot},
};

/// The kind of exit that a reason belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Up to the host's own network stack, untouched.
    Pass,
    /// Up to the host's network stack, with the destination that the packet has when
    /// it is translated: its firewall decides.
    Ask,
    Drop,
    /// Dropped, and its sender told by ICMP where that is allowed.
    Refuse,
    /// Kept until the first fragment of its datagram comes.
    Hold,
    /// Cut into fragments, which come by again.
    Fragment,
    /// Translated and sent on.
    Forward,
}

macro_rules! reasons {
    (@) => { None };
    (@ $complaint:ident) => { Some(Complaint::$complaint) };
    ($($(#[$doc:meta])* $name:ident = $outcome:ident $(($complaint:ident))? $label:literal,)*) => {
        /// Why a packet left the datapath the way it did.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The number of reasons: the size of the counters' table.
            #[expect(clippy::cast_possible_truncation, reason = "there are some dozens")]
            pub const COUNT: u32 = [$(stringify!($name),)*].len() as u32;

            /// The name that the CLI, JSON and metrics show.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }

            #[inline(always)]
            #[must_use]
            pub const fn outcome(self) -> Outcome {
                match self {
                    $(Self::$name => Outcome::$outcome,)*
                }
            }

            /// What the sender is told, where it is.
            #[inline(always)]
            #[must_use]
            pub const fn complaint(self) -> Option<Complaint> {
                match self {
                    $(Self::$name => reasons!(@ $($complaint)?),)*
                }
            }
        }
    };
}

/// What an ICMP error tells a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Complaint {
    TimeExceeded,
    /// With the MTU of the way on.
    TooBig,
    /// Administratively prohibited; also where resources are missing (RFC 5508 REQ-8).
    Prohibited,
}

reasons! {
    /// Not IP, or in a VLAN: ARP and the rest are the host's.
    NotIp = Pass "not-ip",
    /// From a guest to an address of the host, or to a network that the host
    /// reaches otherwise than over the uplink.
    ForTheHost = Pass "for-the-host",
    /// Multicast or broadcast.
    NotUnicast = Pass "not-unicast",
    /// IPv6 from or to a link-local address, which stays on its link.
    LinkLocal = Pass "link-local",
    /// Arrived on the uplink, and no session, mapping or forward wants it.
    NoMapping = Pass "no-mapping",
    /// Too long for the way out and allowed to be fragmented: its fragments come by
    /// again.
    Fragmented = Fragment "fragmented",
    /// No route to the destination; the host tells the guest.
    NoRoute = Pass "no-route",
    /// Belongs to a socket of the host that shares the outside port.
    HostSocket = Pass "host-socket",

    /// Of a session that begins, or that was asked about again: the host's FORWARD
    /// chain decides.
    FirewallAsked = Ask "firewall-asked",

    /// Of a session that was there.
    Translated = Forward "translated",
    /// The first packet of a session from a guest.
    SessionStarted = Forward "session-started",
    /// The first packet of a session from outside, let in by a mapping's filter.
    SessionAdmitted = Forward "session-admitted",
    /// The first packet of a session between guests over an outside address.
    HairpinStarted = Forward "hairpin-started",
    /// An ICMP error about a packet of a session.
    ErrorTranslated = Forward "icmp-error-translated",
    /// Of no session: its prefix was translated (RFC 6296).
    PrefixTranslated = Forward "prefix-translated",

    /// The headers end before the packet says.
    Truncated = Drop "truncated",
    /// An IPv4 header length below 20 bytes, a version that is not the frame's, or more
    /// than one VLAN tag that names no network.
    BadHeader = Drop "bad-header",
    /// IPv6 extension headers that are too many, too long, or out of order.
    BadExtensionHeaders = Drop "bad-extension-headers",
    /// IPv6 with a routing header that is not used up: the checksum is another
    /// destination's.
    SourceRouted = Drop "source-routed",
    /// An IPv6 fragment that is the whole packet.
    AtomicFragment = Drop "atomic-fragment",
    /// Between IPv4 and IPv6, and without a counterpart there: a length, a checksum or a
    /// fragment that the other version cannot say.
    NotTranslatable = Drop "not-translatable",
    /// A router advertisement or a redirect from a guest.
    SpoofedRouter = Drop "spoofed-router",
    /// Neighbour discovery from a guest about an address that is somebody else's.
    SpoofedNeighbour = Drop "spoofed-neighbour",
    /// A source that does not belong on the device, or that nobody may have.
    SpoofedSource = Drop "spoofed-source",
    /// A destination that may not be forwarded to.
    UnroutableDestination = Drop "unroutable-destination",
    /// The time to live ran out here.
    TimeToLiveExceeded = Refuse(TimeExceeded) "time-to-live-exceeded",
    /// Larger than the way out.
    FragmentationNeeded = Refuse(TooBig) "fragmentation-needed",
    /// Larger than the way out and allowed to be fragmented, which we could not.
    TooBigToFragment = Drop "too-big-to-fragment",
    /// A fragment that came before its datagram's first: it waits for it.
    FragmentHeld = Hold "fragment-held",
    /// A fragment that came before its datagram's first, and is too long or one
    /// too many to wait.
    FragmentNotHeld = Drop "fragment-not-held",
    /// A fragment that repeats, or claims to be, bytes that came before.
    FragmentOverlap = Drop "fragment-overlap",
    /// A fragment that ends beyond the largest datagram.
    FragmentBeyondEnd = Drop "fragment-beyond-end",
    /// A fragment of a datagram whose first fragment was dropped.
    FragmentOfDropped = Drop "fragment-of-dropped",
    /// A first fragment without the whole transport header.
    FragmentTooShort = Drop "fragment-too-short",
    /// TCP that neither opens nor belongs to a session: a lone RST or FIN.
    NoSession = Drop "no-session",
    /// A TCP SYN from outside to a port that is the NAT's, which nobody asked for:
    /// answered after six seconds, unless a SYN from inside comes (RFC 5382
    /// REQ-4).
    UnsolicitedSyn = Drop "unsolicited-syn",
    /// The mapping's filter does not let this remote in.
    Filtered = Drop "filtered",
    /// No outside port is free.
    PortsExhausted = Refuse(Prohibited) "ports-exhausted",
    /// The session table is full.
    SessionTableFull = Refuse(Prohibited) "session-table-full",
    /// The mapping tables are full.
    MappingTableFull = Refuse(Prohibited) "mapping-table-full",
    /// The guest has as many sessions as it may.
    GuestSessionLimit = Refuse(Prohibited) "guest-session-limit",
    /// The guest holds as many outside ports as it may.
    GuestPortLimit = Refuse(Prohibited) "guest-port-limit",
    /// To a destination that the operator denies to guests.
    DeniedDestination = Refuse(Prohibited) "denied-destination",
    /// An address within a translated prefix that has no counterpart, or none in an
    /// inside network (RFC 6296 sections 3.4 and 3.7).
    PrefixUntranslatable = Refuse(Prohibited) "prefix-untranslatable",
    /// From a guest of NAT64 to the host itself, to what is reached otherwise than over
    /// the uplink, or to nothing that there is a way to.
    UnreachableByNat64 = Refuse(Prohibited) "unreachable-by-nat64",
    /// From a guest to another one, which it must not reach so.
    GuestIsolated = Refuse(Prohibited) "guest-isolated",
    /// From a guest to the host, which is denied to guests.
    HostDenied = Refuse(Prohibited) "host-denied",
    /// From an address that a guest with another link address has sessions with.
    SpoofedLinkAddress = Drop "spoofed-link-address",
    /// The guest begins more sessions in a second than it may.
    GuestSessionRate = Refuse(Prohibited) "guest-session-rate",
    /// The inside device has its share of the guest table.
    DeviceGuestLimit = Refuse(Prohibited) "device-guest-limit",
    /// The guest table is full.
    GuestTableFull = Refuse(Prohibited) "guest-table-full",
    /// A guest's packet that the host forwards to an uplink without having been
    /// asked about it, or otherwise than it was asked.
    FirewallNotAsked = Drop "firewall-not-asked",
    /// Two packets raced for one tuple and this one lost.
    SessionConflict = Drop "session-conflict",
    /// A transport protocol that the policy does not carry.
    ProtocolNotCarried = Drop "protocol-not-carried",
    /// An ICMP type that the policy does not carry.
    IcmpTypeNotCarried = Drop "icmp-type-not-carried",
    /// An ICMP error with a wrong checksum, its own or the quoted header's.
    ErrorBadChecksum = Drop "icmp-error-bad-checksum",
    /// An ICMP error too long to verify, or quoting too little to place.
    ErrorUnusable = Drop "icmp-error-unusable",
    /// An ICMP error about nothing that was translated.
    ErrorWithoutSession = Drop "icmp-error-without-session",
    /// The kernel looks no routes up for the inside device any more: somebody
    /// set its `net.ipv4.conf.DEVICE.forwarding` to 0.
    ForwardingDisabled = Drop "forwarding-disabled",
    /// From outside, for a guest whose device is down or leads to its address no longer.
    GuestUnreachable = Drop "guest-unreachable",
    /// The uplink has no address to translate to.
    NoOutsideAddress = Drop "no-outside-address",
    /// The packet's memory refused a change; the kernel is out of memory.
    RewriteFailed = Drop "rewrite-failed",
}

/// What follows a stage of [`crate::pipeline`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The packet leaves the datapath.
    Leave(Reason),
    /// On to [`crate::pipeline::resume`].
    Resume,
    /// On to [`crate::pipeline::error`].
    Error,
    /// On to [`crate::pipeline::close`].
    Close,
    /// On to [`crate::pipeline::start`].
    Start,
    /// On to [`crate::pipeline::map`].
    Map,
    /// On to [`crate::pipeline::open`].
    Open,
    /// On to [`crate::pipeline::insert`].
    Insert,
    /// On to [`crate::pipeline::upkeep`].
    Upkeep,
}

/// A session about to be made, as its first packet's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening<A = Be32> {
    /// What to say of the packet once the session is made.
    pub reason: Reason,
    /// What become of the packet's source and destination.
    pub source: EndpointKey<A>,
    pub destination: EndpointKey<A>,
    /// [`crate::abi::session_flags`] of this half, `INITIATOR` aside.
    pub flags: u8,
    pub route: Route,
    /// [`crate::abi::Settings::generation`] of the route.
    pub generation: u8,
    /// What [`crate::abi::Session::confirmed`] is to be.
    pub confirmed: Slot,
    /// For a new mapping: whose, where its owner is, and until when it lives.
    pub inside: EndpointKey<A>,
    pub device: u32,
    pub until: Instant,
    pub class: u32,
}

impl<A: Network> Opening<A> {
    /// Needs no new mapping, unless it is said later on.
    #[inline(always)]
    pub fn forget_mapping(&mut self) {
        self.inside = EndpointKey::default();
        self.device = 0;
        self.until = Instant::default();
        self.class = 0;
    }
}

impl<A: Network> Default for Opening<A> {
    fn default() -> Self {
        Self {
            reason: Reason::SessionConflict,
            source: EndpointKey::default(),
            destination: EndpointKey::default(),
            flags: 0,
            route: Route::default(),
            generation: 0,
            confirmed: Slot::default(),
            inside: EndpointKey::default(),
            device: 0,
            until: Instant::default(),
            class: 0,
        }
    }
}

/// The particulars of an exit, beside its [`Reason`]: filled in as far as the
/// reason's outcome needs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan<A = Be32> {
    /// The host's firewall has accepted the packet: set before the plan begins.
    pub accepted: bool,
    /// The packet is from a guest's stand-in: set before the plan begins.
    pub stands_in: bool,
    /// For [`Outcome::Forward`].
    pub rewrite: Rewrite<A>,
    /// For [`Reason::FirewallAsked`]: the destination that the firewall is to see.
    pub asked: EndpointKey<A>,
    /// For an ICMP error: the packet that it quotes.
    pub quoted: Quoted<A>,
    /// For [`Reason::ErrorTranslated`]: what becomes of the error's own source.
    pub error_source: A,
    /// For a guest's fragment: the identification that it is given.
    pub identification: Be32,
    /// The MTU of the way out in bytes.
    pub mtu: u16,
    /// How much shorter the segments of a GSO packet have to be, in bytes.
    pub excess: u16,
    /// For a fragment: how many of its datagram wait; of a held one, its own
    /// place among them.
    pub held: u32,
    /// For a packet that begins a session: what is left to do of [`crate::nat::upkeep`],
    /// and one. 0 before that is known.
    pub upkeep: u32,
    /// For a packet of a session: the other half, where that was looked at.
    pub other: Other,
    /// For a new session: what to make.
    pub opening: Opening<A>,
    /// For a new session: the keys of its halves.
    pub keys: [FlowKey<A>; 2],
    /// For a new session: the half whose packet is here, and its twin.
    pub halves: [Session<A>; 2],
}

impl<A: Network> Default for Plan<A> {
    fn default() -> Self {
        Self {
            accepted: false,
            stands_in: false,
            rewrite: Rewrite::default(),
            asked: EndpointKey::default(),
            quoted: Quoted::default(),
            error_source: A::UNSPECIFIED,
            identification: Be32::ZERO,
            mtu: 0,
            excess: 0,
            held: 0,
            upkeep: 0,
            other: Other::default(),
            opening: Opening::default(),
            keys: [FlowKey::default(); 2],
            halves: [Session::default(); 2],
        }
    }
}

impl<A: Network> Plan<A> {
    /// Begins the plan of another packet. What a stage always sets before it is
    /// looked at keeps what it had: it is long.
    #[inline(always)]
    pub fn begin(&mut self) {
        // It says that a packet is for the host.
        self.rewrite.next_hop.device = 0;
        self.error_source = A::UNSPECIFIED;
        self.mtu = 0;
        self.excess = 0;
        self.held = 0;
        self.upkeep = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn reasons_are_labelled_once() {
        let labels: HashSet<_> = Reason::ALL.iter().map(|reason| reason.label()).collect();
        assert_eq!(labels.len(), Reason::ALL.len());
    }
}
