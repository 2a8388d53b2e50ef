//! Arbitrary packets in arbitrary order: right ones, wrong ones, and bytes.
//!
//! Each is judged by what must always hold: nothing panics, what is to be
//! written lies within the packet and is nothing but what translating changes,
//! right checksums stay right, the books are right, no guest's address gets out
//! (all that: [`World::run`]), and what is translated and comes back, itself or
//! quoted in an ICMP error, is what was sent ([`round_trip`]).
//!
//! `PROPTEST_CASES` says how many sequences are tried; `cargo xtask fuzz` goes
//! on for as long as one likes.

use std::{net::SocketAddr, num::NonZeroU32};

use etherparse::{IpNumber, TcpOptionElement};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{Index, select},
};
use tapnat_common::{
    abi::setting_flags,
    net::{Be32, Be128, protocol},
    parse::{Packet, parse, parse_plain},
    time::Ticks,
    verdict::{Outcome, Reason},
};
use tapnat_testbed::packet::{self, Builder, checksum};

use crate::support::{
    frame::{Bytes, Partial},
    network::{MOST_OPTIONS, SECOND_TAP, TAP, UPLINK, Version, at, icmp_error, ip, tcp},
    world::{World, route},
};
use crate::sweep::sweep_all;

/// Who is on this side: mostly those who belong there, few enough to meet often.
fn here<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<A> {
    let own = match device {
        Some(TAP) => vec![A::GUEST, A::NEIGHBOUR],
        Some(_) => vec![A::OTHER_GUEST],
        None => vec![A::SERVER, A::OTHER_SERVER, A::ROUTER],
    };
    prop_oneof![30 => select(own), 1 => anyone::<A>()].boxed()
}

/// Whom they send to.
fn there<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<A> {
    match device {
        Some(_) => prop_oneof![
            20 => select(vec![A::SERVER, A::OTHER_SERVER]),
            8 => Just(A::OUTSIDE),
            1 => anyone::<A>(),
        ]
        .boxed(),
        None => prop_oneof![20 => Just(A::OUTSIDE), 1 => anyone::<A>()].boxed(),
    }
}

fn anyone<A: Version>() -> BoxedStrategy<A> {
    prop_oneof![
        select(vec![
            A::GUEST,
            A::NEIGHBOUR,
            A::OTHER_GUEST,
            A::SERVER,
            A::OUTSIDE,
            A::HOST[0],
            A::DHCP_SERVERS,
        ]),
        vec(any::<u8>(), size_of::<A>()).prop_map(|bytes| A::address(&bytes)),
    ]
    .boxed()
}

fn port() -> BoxedStrategy<u16> {
    prop_oneof![
        16 => 5000_u16..5002,
        2 => select(vec![0, 53, 1023, 1024, 65_535]),
        1 => any::<u16>(),
    ]
    .boxed()
}

fn payload() -> BoxedStrategy<Vec<u8>> {
    prop_oneof![
        8 => vec(any::<u8>(), 0..40),
        1 => (1000_usize..3000).prop_map(|length| vec![0xa5; length]),
    ]
    .boxed()
}

type Ends = (SocketAddr, SocketAddr);

fn ends<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<Ends> {
    (here::<A>(device), port(), there::<A>(device), port())
        .prop_map(|(source, from, destination, to)| (at(source, from), at(destination, to)))
        .boxed()
}

fn tcp_segment(ends: BoxedStrategy<Ends>) -> BoxedStrategy<Builder> {
    let flags = select(vec![
        "S", "S", "S", "SA", "A", "A", "A", "PA", "FA", "F", "R", "RA", "", "SF", "SFRPA",
    ]);
    let number = prop_oneof![4 => 0_u32..3, 1 => any::<u32>()];
    let options = select(vec![
        vec![],
        vec![TcpOptionElement::MaximumSegmentSize(1460)],
        vec![
            TcpOptionElement::Noop,
            TcpOptionElement::WindowScale(9),
            TcpOptionElement::MaximumSegmentSize(9000),
        ],
    ]);
    let numbers = (number.clone(), number, any::<u16>());
    (ends, flags, numbers, options)
        .prop_map(
            |((source, destination), flags, (sequence, acknowledged, window), options)| {
                tcp(source, destination, flags).with_tcp(|header| {
                    header.sequence_number = sequence;
                    header.acknowledgment_number = acknowledged;
                    header.window_size = window;
                    header.set_options(&options).unwrap();
                })
            },
        )
        .boxed()
}

fn datagram(ends: BoxedStrategy<Ends>) -> BoxedStrategy<Builder> {
    (ends, any::<bool>())
        .prop_map(|((source, destination), summed)| {
            let datagram = packet::udp(source, destination);
            if summed {
                datagram
            } else {
                datagram.without_udp_checksum()
            }
        })
        .boxed()
}

fn echo(ends: BoxedStrategy<Ends>) -> BoxedStrategy<Builder> {
    (ends, any::<bool>())
        .prop_map(|((source, destination), asks)| {
            let build = if asks {
                packet::echo_request
            } else {
                packet::echo_reply
            };
            build(source.ip(), destination.ip(), source.port(), 1)
        })
        .boxed()
}

fn other(ends: BoxedStrategy<Ends>) -> BoxedStrategy<Builder> {
    let protocols = prop_oneof![
        4 => select(vec![IpNumber::GRE, IpNumber::SCTP, IpNumber::UDP_LITE]),
        1 => any::<u8>().prop_map(IpNumber),
    ];
    (ends, protocols)
        .prop_map(|((source, destination), number)| {
            packet::other(source.ip(), destination.ip(), number)
        })
        .boxed()
}

/// Whatever is set beside addresses, ports and payload.
fn dressed<A: Version>(builder: BoxedStrategy<Builder>) -> BoxedStrategy<Builder> {
    let time_to_live = prop_oneof![6 => Just(64_u8), 1 => 0_u8..3];
    let options = prop_oneof![
        6 => Just(0),
        1 => 1..=MOST_OPTIONS,
    ];
    (
        builder,
        payload(),
        time_to_live,
        any::<bool>(),
        options,
        0_u32..4,
    )
        .prop_map(|(builder, payload, ttl, whole, options, identification)| {
            let builder = builder
                .payload(&payload)
                .ttl(ttl)
                .identification(identification);
            let builder = match options {
                0 => builder,
                amount => A::with_options(builder, amount),
            };
            if whole {
                builder.dont_fragment()
            } else {
                builder
            }
        })
        .boxed()
}

fn simple<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<Builder> {
    between::<A>(ends::<A>(device))
}

fn between<A: Version>(ends: BoxedStrategy<Ends>) -> BoxedStrategy<Builder> {
    prop_oneof![
        4 => dressed::<A>(tcp_segment(ends.clone())),
        4 => dressed::<A>(datagram(ends.clone())),
        2 => dressed::<A>(echo(ends.clone())),
        1 => dressed::<A>(other(ends)),
    ]
    .boxed()
}

/// What opens a session from the guest to a server.
fn outbound<A: Version>() -> BoxedStrategy<Builder> {
    let server = select(vec![A::SERVER, A::OTHER_SERVER]);
    let kinds = select(vec![6, 17, A::ICMP, 47, 132]);
    let builder = (kinds, port(), server, port()).prop_map(|(kind, from, server, to)| match kind {
        6 => tcp(at(A::GUEST, from), at(server, to), "S"),
        17 => packet::udp(at(A::GUEST, from), at(server, to)),
        number if number == A::ICMP => packet::echo_request(ip(A::GUEST), ip(server), from, 1),
        number => packet::other(ip(A::GUEST), ip(server), IpNumber(number)),
    });
    // Long enough for the ports of SCTP, and short enough for the way out with all options.
    (dressed::<A>(builder.boxed()), vec(any::<u8>(), 8..1300))
        .prop_map(|(builder, payload)| builder.payload(&payload))
        .boxed()
}

fn error_kind<A: Version>() -> BoxedStrategy<(u8, u8)> {
    prop_oneof![
        4 => select(vec![
            A::HOST_UNREACHABLE,
            A::PORT_UNREACHABLE,
            A::TOO_BIG,
            A::TIME_EXCEEDED,
            A::PARAMETER_PROBLEM,
        ]),
        1 => any::<(u8, u8)>(),
    ]
    .boxed()
}

/// An ICMP error about some packet that went the other way.
fn error<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<Builder> {
    let about = between::<A>(
        ends::<A>(device)
            .prop_map(|(source, destination)| (destination, source))
            .boxed(),
    );
    let length = prop_oneof![4 => A::HEADER + 8..A::HEADER + 60, 1 => 0_usize..3000];
    let tail = vec(any::<u8>(), 0..20);
    let ends = (here::<A>(device), there::<A>(device));
    (
        ends,
        error_kind::<A>(),
        any::<[u8; 4]>(),
        about,
        length,
        tail,
    )
        .prop_map(|((from, to), kind, rest, about, length, tail)| {
            let mut quoted = about.build();
            quoted.truncate(length);
            quoted.extend(tail);
            packet::icmp_error(ip(from), ip(to), kind, rest, &quoted)
        })
        .boxed()
}

/// An IP packet, right as far as its builder makes it so, or not.
fn ip_packet<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<Vec<u8>> {
    let whole = simple::<A>(device).prop_map(|builder| builder.build());
    let errors = error::<A>(device).prop_map(|builder| builder.build());
    let fragment =
        (simple::<A>(device), any::<Index>(), 1_usize..8).prop_map(|(builder, which, size)| {
            let mut fragments = builder.fragments(A::HEADER + 40 + size * 8);
            if fragments.is_empty() {
                // Of nothing there are none.
                return builder.build();
            }
            fragments.swap_remove(which.index(fragments.len()))
        });
    let bytes = vec(any::<u8>(), 0..200);
    let right = prop_oneof![
        8 => whole,
        3 => errors,
        2 => fragment,
    ]
    .boxed();
    let change = (any::<Index>(), any::<u8>());
    let changed = (right.clone(), vec(change, 1..4)).prop_map(|(mut bytes, changes)| {
        for (place, value) in changes {
            if !bytes.is_empty() {
                let place = place.index(bytes.len().min(A::HEADER + 60));
                bytes[place] = value;
            }
        }
        bytes
    });
    let cut = (right.clone(), any::<Index>()).prop_map(|(bytes, length)| {
        let length = length.index(bytes.len() + 1);
        bytes[..length].to_vec()
    });
    prop_oneof![
        12 => right,
        3 => changed,
        1 => cut,
        1 => bytes,
    ]
    .boxed()
}

/// A frame as it may arrive.
fn frame<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<Bytes> {
    let ethertype = prop_oneof![20 => Just(A::ETHERTYPE), 1 => any::<[u8; 2]>()];
    let offload = prop_oneof![
        8 => Just((0, false)),
        1 => (Just(0_u16), Just(true)),
        1 => (1_u16..2000, Just(true)),
    ];
    (
        ip_packet::<A>(device),
        option::of(ethertype),
        offload,
        option::of(0_usize..100),
        prop_oneof![20 => Just(false), 1 => Just(true)],
        0_usize..20,
    )
        .prop_map(
            |(packet, ethertype, (segment_size, is_partial), linear, tagged, padding)| {
                let mut bytes = Vec::new();
                let mut link_length = 0;
                if let Some(ethertype) = ethertype {
                    bytes.extend([2; 6]);
                    bytes.extend([4; 6]);
                    bytes.extend(ethertype);
                    link_length = 14;
                }
                bytes.extend(&packet);
                bytes.resize(bytes.len() + padding, 0);
                let partial = partial::<A>(&packet, link_length).filter(|_| is_partial);
                let linear = linear.unwrap_or(bytes.len()).min(bytes.len());
                Bytes {
                    segment_size: partial.map_or(0, |_| segment_size),
                    partial,
                    tagged,
                    linear,
                    link_length,
                    bytes,
                }
            },
        )
        .boxed()
}

/// Where the checksum is in a whole TCP or UDP packet without options, if it is
/// one.
fn partial<A: Version>(packet: &[u8], link_length: usize) -> Option<Partial> {
    let shape = A::shape(packet)?;
    let field = match shape.protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => return None,
    };
    let is_plain = packet[0] >> 4 == A::VERSION
        && shape.transport == A::HEADER
        && packet.len() >= A::HEADER + 20
        && shape.identification.is_none();
    let start = link_length + A::HEADER;
    is_plain.then_some(Partial {
        start,
        field: start + field,
    })
}

/// What happens.
#[derive(Clone, Debug)]
enum Step<A> {
    Frame(Option<NonZeroU32>, Bytes),
    /// A frame that came before comes again.
    Again(Index),
    /// Who got a packet answers it.
    Answer(Index),
    /// Who got a packet, or a router on its way, complains about it.
    Complaint(Index, (u8, u8), usize),
    /// A packet, and at once what it brings back.
    RoundTrip(Option<NonZeroU32>, Bytes, Back),
    /// Time passes, in milliseconds.
    Wait(u64),
    /// Routes and neighbours change.
    Generation,
    /// The way to this remote has this MTU.
    Route(A, u16),
    /// The operator changes his mind.
    Modes {
        filtering: [u8; 2],
        mapping: [u8; 2],
        flags: u32,
        clamp: u16,
        limit: u32,
    },
    /// Tables have room for so many more.
    Room(usize),
    /// User space takes away what is over.
    Sweep,
    /// User space is there, or no longer.
    Attend(bool),
}

/// What a packet brings back.
#[derive(Clone, Debug)]
enum Back {
    Answer,
    /// An error of this type and code that quotes so many bytes, from a router
    /// or the destination.
    Complaint((u8, u8), usize, bool),
}

fn round_trips<A: Version>(device: Option<NonZeroU32>) -> BoxedStrategy<Step<A>> {
    let back = prop_oneof![
        Just(Back::Answer),
        (error_kind::<A>(), 20_usize..200, any::<bool>())
            .prop_map(|(kind, length, routed)| Back::Complaint(kind, length, routed)),
    ];
    (frame::<A>(device), back)
        .prop_map(move |(frame, back)| Step::RoundTrip(device, frame, back))
        .boxed()
}

fn step<A: Version>() -> BoxedStrategy<Step<A>> {
    let device = select(vec![None, Some(TAP), Some(TAP), Some(SECOND_TAP)]);
    let modes = (
        any::<[bool; 2]>(),
        [0_u8..4, 0_u8..4],
        any::<u32>(),
        any::<bool>(),
        0_u32..6,
    );
    prop_oneof![
        30 => device.clone().prop_flat_map(|device| {
            frame::<A>(device).prop_map(move |frame| Step::Frame(device, frame))
        }),
        8 => device.prop_flat_map(round_trips),
        8 => any::<Index>().prop_map(Step::Again),
        16 => any::<Index>().prop_map(Step::Answer),
        6 => (any::<Index>(), error_kind::<A>(), 20_usize..100)
            .prop_map(|(which, kind, length)| Step::Complaint(which, kind, length)),
        6 => select(vec![100, 600, 2_500, 61_000, 121_000, 241_000, 302_000, 7_442_000])
            .prop_map(Step::Wait),
        1 => Just(Step::Generation),
        1 => (select(vec![A::SERVER, A::OTHER_SERVER]), select(vec![0, 68, 576, 1280, 1500]))
            .prop_map(|(remote, mtu)| Step::Route(remote, mtu)),
        1 => modes.prop_map(|(mapping, filtering, flags, clamps, limit)| Step::Modes {
            filtering,
            mapping: mapping.map(u8::from),
            flags: flags
                & (setting_flags::PASS_UNSOLICITED
                    | setting_flags::ISOLATE
                    | setting_flags::ROUTE_GUESTS
                    | setting_flags::DENY_HOST
                    | setting_flags::ROAMING
                    | setting_flags::UNTRANSLATED),
            clamp: if clamps { 1000 } else { 0 },
            limit,
        }),
        1 => (0_usize..6).prop_map(Step::Room),
        2 => Just(Step::Sweep),
        2 => any::<bool>().prop_map(Step::Attend),
    ]
    .boxed()
}

/// What came and what left so far.
#[derive(Default)]
struct History {
    came: Vec<(Option<NonZeroU32>, Bytes)>,
    left: Vec<(u32, Vec<u8>)>,
}

/// A packet that left, and the inside device that it left by, if any.
type Left = (Option<NonZeroU32>, Vec<u8>);

impl History {
    /// Runs a frame. Returns what became of it, and the packet that left with
    /// the device it left by.
    fn run<A: Version>(
        &mut self,
        world: &World<A>,
        device: Option<NonZeroU32>,
        frame: Bytes,
    ) -> (Reason, Option<Left>) {
        let exit = world.run(device, frame.clone());
        self.came.push((device, frame));
        if exit.reason.outcome() == Outcome::Forward
            && let Some(mut sent) = exit.sent
        {
            sent.frame.complete();
            let packet = sent.frame.ip().to_vec();
            self.left.push((sent.device, packet.clone()));
            let device = NonZeroU32::new(sent.device).filter(|device| *device != UPLINK);
            return (exit.reason, Some((device, packet)));
        }
        (exit.reason, None)
    }

    /// A packet that left, and where an answer to it arrives.
    fn find_left(&self, which: Index) -> Option<(Option<NonZeroU32>, &[u8])> {
        if self.left.is_empty() {
            return None;
        }
        let (device, packet) = which.get(&self.left);
        let device = NonZeroU32::new(*device).filter(|device| *device != UPLINK);
        Some((device, packet))
    }
}

fn take<A: Version>(world: &World<A>, step: Step<A>, history: &mut History) {
    match step {
        Step::Frame(device, frame) => drop(history.run(world, device, frame)),
        Step::RoundTrip(device, frame, back) => round_trip(world, device, frame, &back, history),
        Step::Again(which) => {
            if !history.came.is_empty() {
                let (device, frame) = which.get(&history.came).clone();
                history.run(world, device, frame);
            }
        }
        Step::Answer(which) => {
            if let Some((device, packet)) = history.find_left(which)
                && is_whole::<A>(packet)
            {
                let answer = Bytes::raw(&mirrored::<A>(packet));
                history.run(world, device, answer);
            }
        }
        Step::Complaint(which, kind, length) => {
            if let Some((device, packet)) = history.find_left(which) {
                let routed = device.is_none() && length % 2 == 0;
                let error = complaint::<A>(packet, kind, length, routed);
                history.run(world, device, Bytes::raw(&error));
            }
        }
        Step::Wait(milliseconds) => world.wait(Ticks::from_milliseconds(milliseconds)),
        Step::Generation => {
            world.set(|settings| settings.generation = settings.generation.wrapping_add(1));
        }
        Step::Route(remote, mtu) => {
            let route = if mtu == 0 {
                tapnat_common::nat::Route::default()
            } else {
                route(UPLINK.get(), mtu)
            };
            world.routes.borrow_mut().insert(remote, route);
        }
        Step::Modes {
            filtering,
            mapping,
            flags,
            clamp,
            limit,
        } => world.set(|settings| {
            [settings.filtering_tcp, settings.filtering_udp] = filtering;
            [settings.mapping_tcp, settings.mapping_udp] = mapping;
            settings.flags = flags | settings.flags & setting_flags::INBOUND_REFRESH;
            settings.clamp_mss = clamp;
            settings.guest_max_sessions = limit;
            settings.guest_max_ports = limit / 2;
        }),
        Step::Sweep => {
            sweep_all(world);
            world.audit();
        }
        Step::Attend(is_attended) => world.is_attended.set(is_attended),
        Step::Room(room) => {
            world.sessions.capacity.set(world.sessions.len() + room);
            world.mappings.capacity.set(world.mappings.len() + room);
            world.inside.capacity.set(world.inside.len() + room);
            world
                .permissions
                .capacity
                .set(world.permissions.len() + room);
            world.guests.capacity.set(world.guests.len() + room);
            world.fragments.capacity.set(room.max(1));
        }
    }
}

/// An ICMP error about a packet, from a router or the packet's destination.
fn complaint<A: Version>(packet: &[u8], kind: (u8, u8), length: usize, routed: bool) -> Vec<u8> {
    let [source, destination] = A::ends(packet);
    let from = if routed { A::ROUTER } else { destination };
    let quoted = &packet[..length.min(packet.len())];
    icmp_error(from, source, kind, quoted).build()
}

/// Runs a packet and, if it is sent on, at once what it brings back, which is
/// to be what was sent.
fn round_trip<A: Version>(
    world: &World<A>,
    device: Option<NonZeroU32>,
    frame: Bytes,
    back: &Back,
    history: &mut History,
) {
    let mut sent = frame.clone();
    sent.complete();
    let (first, left) = history.run(world, device, frame);
    let Some((on, mut packet)) = left else { return };
    let mut sent = sent.ip().to_vec();
    // An end system does not see what follows the packet in its frame.
    let length = match A::length(&sent) {
        // Too long to say so, yet to be cut.
        0 => sent.len(),
        length => length,
    };
    sent.truncate(length);
    packet.truncate(length);
    let is_right = checksum::verify(&sent, checksum::Expect::Complete).is_ok();
    let shape = A::shape(&sent).unwrap();
    let is_clamped = shape.protocol == protocol::TCP && world.settings_now().clamp_mss != 0;
    if !is_whole::<A>(&sent) || !is_right || is_clamped || first == Reason::ErrorTranslated {
        return;
    }
    match back {
        Back::Answer => {
            let answer = Bytes::raw(&mirrored::<A>(&packet));
            let (reason, left) = history.run(world, on, answer);
            if let Some((to, answer)) = left {
                assert_eq!(to, device, "an answer goes where its question came from");
                assert_eq!(mirrored::<A>(&answer), A::aged(&sent, 2), "{reason:?}");
            } else {
                // What claims to be from another guest's network gets no answer there.
                let is_excused = (device.is_none() && reason == Reason::ForTheHost)
                    || matches!(
                        reason,
                        Reason::TimeToLiveExceeded
                            | Reason::FragmentationNeeded
                            | Reason::TooBigToFragment
                            | Reason::Fragmented
                            | Reason::NoRoute
                    );
                assert!(is_excused, "after {first:?} the answer is {reason:?}");
            }
        }
        Back::Complaint(kind, length, routed) => {
            let error = complaint::<A>(&packet, *kind, *length, *routed && on.is_none());
            let (reason, left) = history.run(world, on, Bytes::raw(&error));
            let of_type = |(of, _): &&(u8, u8)| *of == kind.0;
            let Some((_, codes)) = A::ERROR_TYPES.iter().find(of_type) else {
                // Another kind of message, not about any packet.
                return;
            };
            if let Some((to, error)) = left {
                assert_eq!(reason, Reason::ErrorTranslated);
                assert_eq!(to, device, "an error goes to the sender");
                let length = (*length).min(packet.len());
                assert_eq!(error[A::HEADER..A::HEADER + 2], [kind.0, kind.1]);
                // Half a checksum, of no use to anyone, is left as it is.
                let is_cut = shape.protocol == protocol::TCP && length == shape.transport + 17;
                let length = length - usize::from(is_cut);
                let quoted = &error[A::HEADER + 8..];
                assert_eq!(quoted[..length], A::aged(&sent, 1)[..length]);
            } else {
                let is_carried = kind.1 < *codes;
                let is_enough = (*length).min(packet.len()) >= shape.transport + 8;
                // There may be no route to who sent it from the world.
                let is_excused = device.is_none() && reason == Reason::ErrorUnusable;
                assert!(
                    !(is_carried && is_enough) || is_excused,
                    "after {first:?} the error is {reason:?}"
                );
            }
        }
    }
}

/// The properties, for the packets of one IP version.
macro_rules! properties {
    ($name:ident, $version:ty) => {
        mod $name {
            use tapnat_common::net::Address as _;

            use super::*;

            type A = $version;

            proptest! {
                // What fails is printed whole, to become a test of its own.
                #![proptest_config(ProptestConfig {
                    failure_persistence: None,
                    ..ProptestConfig::default()
                })]

                #[test]
                fn anything_in_any_order(inbound_refresh: bool, steps in vec(step::<A>(), 1..60)) {
                    let world = World::<A>::new();
                    if inbound_refresh {
                        // From the start: sessions that it keeps stand on mappings that it did not.
                        world.set_inbound_refresh();
                    }
                    world.untranslated.borrow_mut().push((A::OTHER_SERVER, A::BITS));
                    let mut history = History::default();
                    for step in steps {
                        take(&world, step, &mut history);
                    }
                }

                #[test]
                fn the_plain_parser_reads_what_the_whole_one_reads(frame in frame::<A>(Some(TAP))) {
                    let mut plain = Packet::<A>::default();
                    if parse_plain(&frame, &mut plain) {
                        let mut whole = Packet::default();
                        prop_assert_eq!(parse(&frame, &mut whole), Ok(()));
                        // Read by the whole one only, as the quick stage needs neither.
                        whole.identification = plain.identification;
                        whole.unfragmentable_length = plain.unfragmentable_length;
                        whole.dont_fragment = plain.dont_fragment;
                        prop_assert_eq!(plain, whole);
                    }
                }

                #[test]
                fn what_comes_back_is_what_was_sent(builder in outbound::<A>(), port_taken: bool) {
                    let world = World::<A>::new();
                    if port_taken {
                        for port in 5000..5003 {
                            world.guest_sends(TAP, &packet::udp(at(A::NEIGHBOUR, port), at(A::SERVER, 1)).build());
                            world.guest_sends(TAP, &tcp(at(A::NEIGHBOUR, port), at(A::SERVER, 1), "S").build());
                            let request = packet::echo_request(ip(A::NEIGHBOUR), ip(A::SERVER), port, 1);
                            world.guest_sends(TAP, &request.build());
                        }
                    }
                    let sent = builder.build();
                    let exit = world.guest_sends(TAP, &sent);
                    if sent[A::TIME_TO_LIVE] < 2 {
                        prop_assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
                        return Ok(());
                    }
                    let outside = exit.forwarded(Reason::SessionStarted);
                    let exit = world.world_sends(&mirrored::<A>(&outside));
                    if sent[A::TIME_TO_LIVE] == 2 {
                        prop_assert_eq!(exit.reason, Reason::TimeToLiveExceeded);
                        return Ok(());
                    }
                    prop_assert_eq!(exit.reason.outcome(), Outcome::Forward);
                    let back = mirrored::<A>(&exit.forwarded_any());
                    prop_assert_eq!(back, A::aged(&sent, 2));
                }
            }
        }
    };
}
properties!(v4, Be32);
properties!(v6, Be128);

/// The packet that answers this one: addresses and ports swapped, an ICMP query
/// made a reply and the other way round. No checksum but theirs changes.
fn mirrored<A: Version>(packet: &[u8]) -> Vec<u8> {
    let mut bytes = packet.to_vec();
    let [source, destination] = A::ends(packet);
    let (start, length) = (A::HEADER - 2 * size_of::<A>(), size_of::<A>());
    let (own, other) = bytes[start..start + 2 * length].split_at_mut(length);
    own.swap_with_slice(other);
    let shape = A::shape(packet).unwrap();
    let body = &mut bytes[shape.transport..];
    match shape.protocol {
        6 | 17 | 132 | 136 if body.len() >= 4 => {
            body.swap(0, 2);
            body.swap(1, 3);
        }
        number if number == A::ICMP => {
            let Some(counterpart) = body.first().and_then(|first| A::counterpart(*first)) else {
                return bytes;
            };
            body[0] = counterpart;
            body[2..4].fill(0);
            let pseudo_header = match number {
                protocol::ICMP => Vec::new(),
                _ => checksum::pseudo_header(
                    ip(source),
                    ip(destination),
                    IpNumber(number),
                    body.len(),
                ),
            };
            let check = !checksum::sum(&[&pseudo_header, body]);
            body[2..4].copy_from_slice(&check.to_be_bytes());
        }
        _ => {}
    }
    bytes
}

/// Whether a packet is no fragment.
fn is_whole<A: Version>(packet: &[u8]) -> bool {
    let shape = A::shape(packet).unwrap();
    shape.identification.is_none()
}
