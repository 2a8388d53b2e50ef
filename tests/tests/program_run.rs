//! The programs as they are loaded, run packet by packet with
//! `BPF_PROG_TEST_RUN`: tables of what comes in, the state it meets, the verdict,
//! what goes out, and the reason that is counted. Then arbitrary bytes.
//!
//! The instance is a real one, on devices of a world whose ends nobody holds.
//! Redirected packets go nowhere here; that they arrive is what the other tests
//! show.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    TestRun as _, TestRunOptions,
    maps::{Map, MapData, PerCpuArray},
    programs::{
        SchedClassifier,
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};
use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};
use tapnat_common::{
    abi::{Counter, maps},
    verdict::{Outcome, Reason},
};
use tapnat_testbed::{
    packet::{self, Builder},
    topology::{GATEWAY, HOST_ADDRESS, Inside, Topology, UPLINK, Uplink},
    traffic,
};
use tapnat_tests::{
    wires::remote,
    world::{World, outside},
};

/// Bytes before the IP header in frames of devices with Ethernet.
const ETHERNET: usize = 14;
/// What an ICMP error adds to the packet that it quotes.
const ICMP_ERROR: usize = 28;
/// The longest frame that the kernel takes for a run is shorter than a page.
const LONGEST: usize = 3000;
/// Of guests and the world; what is in them decides nothing.
const ADDRESSES: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// What a program returns: `TC_ACT_UNSPEC`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// On to other programs and filters, and to the host.
    Pass = -1,
    Drop = 2,
    Redirect = 7,
}

impl Verdict {
    fn read(code: u32) -> Result<Self> {
        let code = code.cast_signed();
        [Self::Pass, Self::Drop, Self::Redirect]
            .into_iter()
            .find(|verdict| *verdict as i32 == code)
            .with_context(|| format!("the program returns {code}"))
    }

    fn may_follow(self, outcome: Outcome) -> bool {
        match outcome {
            Outcome::Pass | Outcome::Ask => self == Self::Pass,
            // What is cut comes by again in clones.
            Outcome::Drop | Outcome::Hold | Outcome::Fragment => self == Self::Drop,
            // Not every sender may be told.
            Outcome::Refuse => self != Self::Pass,
            Outcome::Forward => self == Self::Redirect,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// The guest with this number sends.
    Inside(usize),
    /// The world sends.
    Outside,
}
use Side::{Inside as Guest, Outside as Remote};

/// Where a program runs.
struct Hook {
    program: SchedClassifier,
    device: u32,
}

/// A world whose instance's programs are run by hand.
struct Runs {
    world: World,
    guests: Vec<Hook>,
    uplink: Hook,
    link_length: usize,
    counters: PerCpuArray<MapData, Counter>,
}

/// What a run did.
#[derive(Debug)]
struct Exit {
    verdict: Verdict,
    frame: Vec<u8>,
    reason: Reason,
}

impl Runs {
    fn new(builder: tapnat_testbed::topology::Builder, arguments: &[&str]) -> Result<Self> {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--count"]).collect();
        let world = World::start(builder, &arguments)?;
        let topology = &world.topology;
        let pins = world.instance.pins();
        let hook = |name: &str, role: &str| {
            let device = topology.host.device_index(name)?;
            let device = device.with_context(|| format!("no device {name}"))?;
            let link = pins.join("links").join(format!("{role}-{device}"));
            let program = attached(&link)?;
            Ok::<_, anyhow::Error>(Hook { program, device })
        };
        let guests = topology
            .guests
            .iter()
            .map(|guest| hook(&guest.inside_device, "inside"))
            .collect::<Result<_>>()?;
        let uplink = hook(UPLINK, "uplink")?;
        let counters = MapData::from_pin(pins.join("maps").join(maps::COUNTERS))?;
        let counters = Map::from_map_data(counters)?.try_into()?;
        let is_ethernet = topology.guests[0].inside_device.starts_with("veth");
        Ok(Self {
            link_length: if is_ethernet { ETHERNET } else { 0 },
            guests,
            uplink,
            counters,
            world,
        })
    }

    fn counts(&self) -> Result<BTreeMap<&'static str, u64>> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let counters = self.counters.get(&(*reason as u32), 0)?;
                let packets = counters.iter().map(|counter| counter.packets).sum();
                Ok((reason.label(), packets))
            })
            .collect()
    }

    /// Runs the program of a side on a frame, whose segments are to have this
    /// size, and finds the one reason that is counted for it.
    fn run(&self, side: Side, frame: &[u8], segment_size: Option<u32>) -> Result<Exit> {
        let hook = match side {
            Guest(number) => &self.guests[number],
            Remote => &self.uplink,
        };
        let before = self.counts()?;
        let context = context(hook.device, segment_size);
        let mut out = vec![0; LONGEST + 1000];
        let result = self.world.topology.host.run(|| {
            let options = TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ..TestRunOptions::default()
            };
            Ok(hook.program.test_run(options)?)
        })?;
        out.truncate(result.data_size_out as usize);
        let after = self.counts()?;
        let mut counted = Vec::new();
        for reason in Reason::ALL {
            let packets = after[reason.label()] - before[reason.label()];
            counted.extend(std::iter::repeat_n(*reason, usize::try_from(packets)?));
        }
        let [reason] = counted[..] else {
            anyhow::bail!("one packet is counted as {counted:?}");
        };
        Ok(Exit {
            verdict: Verdict::read(result.return_value)?,
            frame: out,
            reason,
        })
    }

    /// The frame of a packet on this world's devices.
    fn frame(&self, packet: &Builder) -> Vec<u8> {
        self.framed(packet).build()
    }

    fn framed(&self, packet: &Builder) -> Builder {
        let packet = packet.clone();
        match self.link_length {
            0 => packet,
            _ => packet.ethernet(ADDRESSES.0, ADDRESSES.1),
        }
    }

    fn inside(&self, guest: usize, port: u16) -> SocketAddr {
        self.world.guest_endpoint(guest, port)
    }

    fn gateway(&self, guest: usize) -> IpAddr {
        self.world.guest(guest).gateway.into()
    }

    /// Runs each row's packets and checks its last.
    fn check(&self, rows: &[Row]) -> Result<()> {
        for row in rows {
            self.check_row(row)
                .with_context(|| row.description.to_owned())?;
        }
        Ok(())
    }

    fn check_row(&self, row: &Row) -> Result<()> {
        for (side, packet) in &row.before {
            self.run(*side, &self.frame(packet), None)?;
        }
        for (packet, bytes) in &row.pieces_before {
            self.run(row.side, &self.framed(packet).fragment(bytes.clone()), None)?;
        }
        let frame = (row.cut)(&self.framed(&row.packet));
        let exit = self.run(row.side, &frame, row.segment_size)?;
        let found = (exit.verdict, exit.reason);
        let expected = (row.verdict, row.reason);
        ensure!(found == expected, "is {found:?} instead of {expected:?}");
        let found = &exit.frame[self.link_length..];
        let out = match (&row.out, row.side) {
            // A guest's fragments get another identification (RFC 7857 section 10).
            (Some(packet), Side::Inside(_)) if found[6..8] != [0, 0] => {
                let identification = u16::from_be_bytes([found[4], found[5]]);
                let packet = packet.clone().identification(identification.into());
                (row.cut)(&self.framed(&packet))
            }
            (Some(packet), _) => (row.cut)(&self.framed(packet)),
            (None, _) => frame,
        };
        let out = &out[self.link_length..];
        ensure!(found == out, "out: {found:02x?}\nexpected: {out:02x?}");
        Ok(())
    }
}

/// The program that a pinned link attaches.
fn attached(link: &Path) -> Result<SchedClassifier> {
    let link = PinnedLink::from_pin(link).with_context(|| link.display().to_string())?;
    let id = FdLink::from(link).info()?.program_id();
    let mut programs = loaded_programs().filter_map(Result::ok);
    let info = programs
        .find(|info| info.id() == id)
        .context("the attached program is not loaded")?;
    let name = info.name_as_str().unwrap_or_default().to_owned();
    SchedClassifier::from_program_info(info, name.into()).context("no classifier")
}

/// A `struct __sk_buff` of the kernel's, as far as these runs set it.
fn context(device: u32, segment_size: Option<u32>) -> [u8; 180] {
    const IFINDEX: usize = 40;
    const GSO_SEGS: usize = 164;
    const GSO_SIZE: usize = 176;
    let mut context = [0; 180];
    let mut set = |at: usize, value: u32| {
        context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    };
    set(IFINDEX, device);
    if let Some(size) = segment_size {
        set(GSO_SEGS, 2);
        set(GSO_SIZE, size);
    }
    context
}

/// Makes a frame of a packet.
type Cut = fn(&Builder) -> Vec<u8>;

/// A packet, the state that it meets, and what becomes of it.
struct Row {
    description: &'static str,
    before: Vec<(Side, Builder)>,
    /// Fragments from the same side, after those.
    pieces_before: Vec<(Builder, Range<usize>)>,
    side: Side,
    packet: Builder,
    cut: Cut,
    segment_size: Option<u32>,
    verdict: Verdict,
    /// None when the frame is left as it came.
    out: Option<Builder>,
    reason: Reason,
}

impl Row {
    /// It is handed to another device as this packet.
    fn redirected(
        description: &'static str,
        side: Side,
        packet: Builder,
        out: Builder,
        reason: Reason,
    ) -> Self {
        Self {
            description,
            before: Vec::new(),
            pieces_before: Vec::new(),
            side,
            packet,
            cut: Builder::build,
            segment_size: None,
            verdict: Verdict::Redirect,
            out: Some(out),
            reason,
        }
    }

    /// It goes up or is dropped as it came.
    fn kept(
        description: &'static str,
        side: Side,
        packet: Builder,
        verdict: Verdict,
        reason: Reason,
    ) -> Self {
        Self {
            verdict,
            out: None,
            ..Self::redirected(description, side, packet.clone(), packet, reason)
        }
    }

    /// These packets went before.
    fn after(mut self, before: &[(Side, Builder)]) -> Self {
        self.before = before.to_vec();
        self
    }

    /// This fragment of the same packet went before.
    fn after_fragment(mut self, bytes: Range<usize>) -> Self {
        self.pieces_before.push((self.packet.clone(), bytes));
        self
    }

    /// The frame is not the whole packet, but what this makes of it.
    fn cut(mut self, cut: Cut) -> Self {
        self.cut = cut;
        self
    }

    /// It is yet to be segmented.
    fn segments(mut self, size: u32) -> Self {
        self.segment_size = Some(size);
        self
    }
}

fn udp(source: SocketAddr, destination: SocketAddr) -> Builder {
    packet::udp(source, destination).payload(b"a payload of some bytes")
}

fn syn(source: SocketAddr, destination: SocketAddr) -> Builder {
    packet::tcp(source, destination).with_tcp(|header| {
        header.syn = true;
        header.sequence_number = 1000;
    })
}

fn syn_ack(source: SocketAddr, destination: SocketAddr) -> Builder {
    packet::tcp(source, destination).with_tcp(|header| {
        header.syn = true;
        header.ack = true;
        header.sequence_number = 5000;
        header.acknowledgment_number = 1001;
    })
}

fn data(source: SocketAddr, destination: SocketAddr) -> Builder {
    let packet = packet::tcp(source, destination).with_tcp(|header| {
        header.ack = true;
        header.psh = true;
        header.sequence_number = 1001;
        header.acknowledgment_number = 5001;
    });
    packet.payload(b"GET / HTTP/1.0\r\n\r\n")
}

fn veths(guests: u8) -> tapnat_testbed::topology::Builder {
    Topology::builder().inside(Inside::Veth).guests(guests)
}

/// What holds on every kind of device.
#[expect(clippy::too_many_lines, reason = "a table")]
fn common_rows(runs: &Runs) -> Vec<Row> {
    use Reason::{SessionStarted, Translated};
    let web = remote(0, 80);
    let dns = remote(0, 53);
    let a = |port| runs.inside(0, port);
    let request =
        |source: SocketAddr| packet::echo_request(source.ip(), dns.ip(), source.port(), 1);
    let reply = |to: SocketAddr| packet::echo_reply(dns.ip(), to.ip(), to.port(), 1);
    let first = (Guest(0), udp(a(40_000), dns));
    let open = [
        (Guest(0), syn(a(40_001), web)),
        (Remote, syn_ack(web, outside(40_001))),
    ];
    vec![
        Row::redirected(
            "the first datagram of a guest leaves from the outside address, its port kept",
            Guest(0),
            udp(a(40_000), dns),
            udp(outside(40_000), dns).ttl(63),
            SessionStarted,
        ),
        Row::redirected(
            "the next one finds the session",
            Guest(0),
            udp(a(40_000), dns),
            udp(outside(40_000), dns).ttl(63),
            Translated,
        )
        .after(std::slice::from_ref(&first)),
        Row::redirected(
            "the answer goes back to the guest",
            Remote,
            udp(dns, outside(40_000)),
            udp(dns, a(40_000)).ttl(63),
            Translated,
        )
        .after(std::slice::from_ref(&first)),
        Row::redirected(
            "a datagram without a checksum stays without",
            Guest(0),
            udp(a(40_000), dns).without_udp_checksum(),
            udp(outside(40_000), dns).without_udp_checksum().ttl(63),
            Translated,
        )
        .after(std::slice::from_ref(&first)),
        Row::redirected(
            "a SYN opens a session",
            Guest(0),
            syn(a(40_001), web),
            syn(outside(40_001), web).ttl(63),
            SessionStarted,
        ),
        Row::redirected(
            "its answer goes back",
            Remote,
            syn_ack(web, outside(40_001)),
            syn_ack(web, a(40_001)).ttl(63),
            Translated,
        )
        .after(&open[..1]),
        Row::redirected(
            "and data follows",
            Guest(0),
            data(a(40_001), web),
            data(outside(40_001), web).ttl(63),
            Translated,
        )
        .after(&open),
        Row::redirected(
            "an echo request keeps its identifier",
            Guest(0),
            request(a(40_002)),
            request(outside(40_002)).ttl(63),
            SessionStarted,
        ),
        Row::redirected(
            "the reply goes back",
            Remote,
            reply(outside(40_002)),
            reply(a(40_002)).ttl(63),
            Translated,
        )
        .after(&[(Guest(0), request(a(40_002)))]),
        Row::redirected(
            "IP options go along",
            Guest(0),
            udp(a(40_003), dns).options(&[148, 4, 0, 0]),
            udp(outside(40_003), dns).options(&[148, 4, 0, 0]).ttl(63),
            SessionStarted,
        ),
        Row::kept(
            "what is for the host goes up",
            Guest(0),
            udp(a(40_004), SocketAddr::new(runs.gateway(0), 53)),
            Verdict::Pass,
            Reason::ForTheHost,
        ),
        Row::kept(
            "a lone RST is nobody's",
            Guest(0),
            packet::tcp(a(40_005), web).with_tcp(|header| header.rst = true),
            Verdict::Drop,
            Reason::NoSession,
        ),
        Row::kept(
            "to a port without a mapping is the host's",
            Remote,
            udp(dns, outside(40_006)),
            Verdict::Pass,
            Reason::NoMapping,
        ),
    ]
}

#[test]
fn what_goes_out_and_what_comes_back() -> Result<()> {
    let runs = Runs::new(veths(2), &[])?;
    runs.check(&common_rows(&runs))
}

#[test]
fn devices_without_ethernet() -> Result<()> {
    let builder = Topology::builder().inside(Inside::Tun).uplink(Uplink::Tun);
    let runs = Runs::new(builder, &[])?;
    runs.check(&common_rows(&runs))
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn what_is_not_translated() -> Result<()> {
    use Verdict::{Drop, Pass};
    let runs = Runs::new(veths(2), &[])?;
    let dns = remote(0, 53);
    let a = runs.inside(0, 40_000);
    let b = runs.inside(1, 40_000);
    let to = |address: [u8; 4]| SocketAddr::new(Ipv4Addr::from(address).into(), 53);
    let kept = Row::kept;
    let unroutable = Reason::UnroutableDestination;
    let rows = [
        kept(
            "multicast",
            Guest(0),
            udp(a, to([224, 0, 0, 251])),
            Pass,
            Reason::NotUnicast,
        ),
        kept(
            "broadcast",
            Guest(0),
            udp(a, to([255; 4])),
            Pass,
            Reason::NotUnicast,
        ),
        kept(
            "to class E",
            Guest(0),
            udp(a, to([240, 0, 0, 1])),
            Drop,
            unroutable,
        ),
        kept(
            "to loopback",
            Guest(0),
            udp(a, to([127, 0, 0, 1])),
            Drop,
            unroutable,
        ),
        kept(
            "of another tap",
            Guest(0),
            udp(b, dns),
            Drop,
            Reason::SpoofedSource,
        ),
        kept(
            "of nobody",
            Guest(0),
            udp(to([0; 4]), dns),
            Drop,
            Reason::SpoofedSource,
        ),
        kept("an ARP frame", Guest(0), udp(a, dns), Pass, Reason::NotIp)
            .cut(|packet| with_byte(packet, ETHERNET - 1, 6)),
        kept(
            "a VLAN tag in the frame",
            Guest(0),
            udp(a, dns),
            Pass,
            Reason::NotIp,
        )
        .cut(|packet| {
            let mut frame = packet.build();
            frame.splice(12..12, [0x81, 0x00, 0, 5]);
            frame
        }),
        kept(
            "a header of 16 bytes",
            Guest(0),
            udp(a, dns),
            Drop,
            Reason::BadHeader,
        )
        .cut(|packet| with_byte(packet, ETHERNET, 0x44)),
        kept(
            "of IP version 6",
            Guest(0),
            udp(a, dns),
            Drop,
            Reason::BadHeader,
        )
        .cut(|packet| with_byte(packet, ETHERNET, 0x65)),
        kept(
            "longer than its frame",
            Guest(0),
            udp(a, dns),
            Drop,
            Reason::Truncated,
        )
        .cut(|packet| with_byte(packet, ETHERNET + 2, 1)),
        kept(
            "a header longer than its frame",
            Guest(0),
            udp(a, dns),
            Drop,
            Reason::Truncated,
        )
        .cut(|packet| with_byte(packet, ETHERNET, 0x4f)),
        kept(
            "a protocol without a policy",
            Guest(0),
            other(a, dns, 200),
            Drop,
            Reason::ProtocolNotCarried,
        ),
        kept(
            "an ICMP router solicitation",
            Guest(0),
            packet::icmp_error(a.ip(), dns.ip(), (10, 0), [0; 4], &[]),
            Drop,
            Reason::IcmpTypeNotCarried,
        ),
        kept(
            "a first fragment that hides its ports",
            Guest(0),
            udp(a, dns).payload(&[1; 64]),
            Drop,
            Reason::FragmentTooShort,
        )
        .cut(|packet| {
            let mut frame = packet.fragment(0..8);
            frame.truncate(ETHERNET + 24);
            frame[ETHERNET + 3] = 24;
            frame
        }),
        kept(
            "a fragment before the first",
            Guest(0),
            udp(a, dns).payload(&[1; 64]),
            Drop,
            Reason::FragmentHeld,
        )
        .cut(|packet| packet.fragment(32..72)),
    ];
    runs.check(&rows)
}

/// A packet's frame with another byte at a place.
fn with_byte(packet: &Builder, at: usize, value: u8) -> Vec<u8> {
    let mut frame = packet.build();
    frame[at] = value;
    frame
}

fn other(source: SocketAddr, destination: SocketAddr, protocol: u8) -> Builder {
    packet::other(source.ip(), destination.ip(), protocol.into()).payload(&[0; 16])
}

#[test]
fn what_the_sender_is_told() -> Result<()> {
    let arguments = ["--ports", "40000-40001", "--guest-max-sessions", "1"];
    let runs = Runs::new(veths(3).uplink_mtu(1400), &arguments)?;
    let dns = remote(0, 53);
    let gateway = |guest| runs.gateway(guest);
    let told = |description, guest: usize, packet: Builder, error, mtu: u16, reason| {
        let [high, low] = mtu.to_be_bytes();
        let quoted = packet.build()[..40].to_vec();
        let source = runs.inside(guest, 0).ip();
        let error = packet::icmp_error(gateway(guest), source, error, [0, 0, high, low], &quoted)
            .identification(0)
            .precedence(6);
        Row::redirected(description, Guest(guest), packet, error, reason)
    };
    let long = traffic::pattern(1380);
    let a = |port| runs.inside(0, port);
    let one = (Guest(0), udp(a(40_000), dns));
    let more = (Guest(1), udp(runs.inside(1, 40_001), dns));
    runs.check(&[
        told(
            "time exceeded",
            0,
            udp(a(40_000), dns).ttl(1),
            (11, 0),
            0,
            Reason::TimeToLiveExceeded,
        ),
        told(
            "fragmentation needed, with the way's MTU",
            0,
            udp(a(40_000), dns).payload(&long).dont_fragment(),
            (3, 4),
            1400,
            Reason::FragmentationNeeded,
        )
        .after(std::slice::from_ref(&one)),
        told(
            "no more sessions for this guest",
            0,
            udp(a(40_000), remote(1, 53)),
            (3, 13),
            0,
            Reason::GuestSessionLimit,
        )
        .after(std::slice::from_ref(&one)),
        told(
            "no more ports",
            2,
            udp(runs.inside(2, 40_000), dns),
            (3, 13),
            0,
            Reason::PortsExhausted,
        )
        .after(&[one, more]),
    ])
}

#[test]
fn fragments_filters_hairpins_and_errors() -> Result<()> {
    use Reason::{FragmentOverlap, HairpinStarted, SessionAdmitted, Translated};
    let runs = Runs::new(veths(2), &[])?;
    let dns = remote(0, 53);
    let (a, b) = (runs.inside(0, 40_000), runs.inside(1, 50_000));
    let first = (Guest(0), udp(a, dns));
    let long = |source, destination| packet::udp(source, destination).payload(&[7; 64]);
    let begin: Cut = |packet| packet.fragment(0..32);
    let rest: Cut = |packet| packet.fragment(32..72);
    let bulk = |source, destination| data(source, destination).payload(&traffic::pattern(2600));
    let web = remote(0, 80);
    let open = [
        (Guest(0), syn(a, web)),
        (Remote, syn_ack(web, outside(40_000))),
    ];
    // What a router says about a translated packet, and what the guest hears.
    let hop = GATEWAY.into();
    let said = |source| udp(source, dns).ttl(60).build()[..28].to_vec();
    let error = |quoted: &[u8]| packet::time_exceeded(hop, HOST_ADDRESS.into(), quoted);
    let heard = packet::time_exceeded(hop, a.ip(), &said(a)).ttl(63);
    runs.check(&[
        Row::redirected(
            "a first fragment is translated by its ports",
            Guest(0),
            long(a, dns),
            long(outside(40_000), dns).ttl(63),
            Translated,
        )
        .cut(begin)
        .after(std::slice::from_ref(&first)),
        Row::redirected(
            "a later one by those of the first",
            Guest(0),
            long(a, dns),
            long(outside(40_000), dns).ttl(63),
            Translated,
        )
        .cut(rest),
        Row::kept(
            "a fragment of a datagram that is there in part is not taken twice",
            Guest(0),
            long(a, dns).identification(9),
            Verdict::Drop,
            FragmentOverlap,
        )
        .cut(|packet| packet.fragment(24..64))
        .after_fragment(0..32),
        Row::redirected(
            "what is segmented later is not too long",
            Guest(0),
            bulk(a, web),
            bulk(outside(40_000), web).ttl(63),
            Translated,
        )
        .segments(1300)
        .after(&open),
        Row::kept(
            "a stranger is filtered",
            Remote,
            udp(remote(1, 53), outside(40_000)),
            Verdict::Drop,
            Reason::Filtered,
        ),
        Row::redirected(
            "another port of a remote that was sent to is let in",
            Remote,
            udp(remote(0, 5353), outside(40_000)),
            udp(remote(0, 5353), a).ttl(63),
            SessionAdmitted,
        ),
        Row::redirected(
            "a guest reaches another at its outside endpoint, and comes from its own",
            Guest(1),
            udp(b, outside(40_000)),
            udp(outside(50_000), a).ttl(63),
            HairpinStarted,
        )
        .after(&[(Guest(1), udp(b, dns)), (Guest(0), udp(a, outside(50_000)))]),
        Row::redirected(
            "an error goes to whom it is about, and quotes what he sent",
            Remote,
            error(&said(outside(40_000))),
            heard,
            Reason::ErrorTranslated,
        ),
        Row::kept(
            "one with a wrong checksum is the host's to judge",
            Remote,
            error(&said(outside(40_000))).bad_transport_checksum(),
            Verdict::Pass,
            Reason::NoMapping,
        ),
        Row::redirected(
            "GRE by its addresses",
            Guest(0),
            other(a, dns, 47),
            other(outside(0), dns, 47).ttl(63),
            Reason::SessionStarted,
        ),
    ])
}

/// Whatever comes, there is one exit with one reason, which the verdict fits, and
/// a packet grows by no more than an ICMP error's headers.
fn check_exit(runs: &Runs, side: Side, frame: &[u8]) -> Result<(), TestCaseError> {
    let exit = runs
        .run(side, frame, None)
        .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
    let outcome = exit.reason.outcome();
    prop_assert!(exit.verdict.may_follow(outcome), "{exit:?}");
    let most = frame.len()
        + if outcome == Outcome::Refuse {
            ICMP_ERROR
        } else {
            0
        };
    prop_assert!(exit.frame.len() <= most, "{exit:?}");
    if exit.verdict == Verdict::Pass {
        prop_assert_eq!(&exit.frame[..], frame);
    }
    Ok(())
}

/// Frames of packets that are translated, to be spoilt.
fn seeds(runs: &Runs) -> Vec<(Side, Vec<u8>)> {
    let (a, out) = (runs.inside(0, 40_000), outside(40_000));
    let web = remote(0, 80);
    let quoted = data(out, web).build();
    let packets = [
        (Guest(0), udp(a, web)),
        (Guest(0), data(a, web).options(&[148, 4, 0, 0])),
        (Guest(0), syn(a, web)),
        (Guest(0), udp(a, out)),
        (Guest(0), packet::echo_request(a.ip(), web.ip(), 40_000, 1)),
        (Remote, udp(web, out)),
        (Remote, syn_ack(web, out)),
        (Remote, data(web, out)),
        (Remote, packet::echo_reply(web.ip(), out.ip(), 40_000, 1)),
        (Remote, packet::unreachable(web.ip(), out.ip(), 3, &quoted)),
    ];
    let whole = packets
        .iter()
        .map(|(side, packet)| (*side, runs.frame(packet)));
    let pieces = packets.iter().flat_map(|(side, packet)| {
        let pieces = runs.framed(packet).fragments(40);
        pieces.into_iter().map(|piece| (*side, piece))
    });
    whole.chain(pieces).collect()
}

fn check_arbitrary_bytes(runs: &Runs) -> Result<()> {
    let config = Config {
        cases: 4000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let bytes = prop::collection::vec(any::<u8>(), ETHERNET..LONGEST);
    runner.run(
        &(prop::sample::select(vec![Guest(0), Remote]), bytes),
        |(side, bytes)| check_exit(runs, side, &bytes),
    )?;
    let spoilt = (
        prop::sample::select(seeds(runs)),
        // Mostly in the headers.
        prop::collection::vec((0..80_usize, any::<u8>()), 0..6),
        prop::option::of(ETHERNET..120),
    );
    runner.run(&spoilt, |((side, mut frame), changes, cut)| {
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame.truncate(cut.unwrap_or(frame.len()));
        check_exit(runs, side, &frame)
    })?;
    Ok(())
}

#[test]
fn arbitrary_bytes_have_one_exit() -> Result<()> {
    check_arbitrary_bytes(&Runs::new(veths(1), &[])?)
}

#[test]
fn arbitrary_bytes_without_ethernet_have_one_exit() -> Result<()> {
    let builder = Topology::builder().inside(Inside::Tun).uplink(Uplink::Tun);
    check_arbitrary_bytes(&Runs::new(builder, &[])?)
}
