//! Bulk transfer from a guest with offloads: 64 KiB packets written to its tap, as a virtual machine
//! monitor does, and iperf3 between a guest behind a tap and the world, everything on one processor.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::Array,
    programs::{SchedClassifier, TcAttachType},
};
use tapnat_testbed::{
    cable::{Layer, Options, TunTap},
    packet::{self, Offload},
    process::Process,
    topology::{HOST_ADDRESS, Inside, Tap, Topology, UPLINK, WORLD_ADDRESSES},
    traffic::{Amount, FrameSender, iperf3},
};

use super::{Run, contestants};
use crate::{
    abi::{self, Stream},
    contender::{Contender, Installed, Wish, install_for_guest},
    packets::{Order, Packets, Protocol, Vary},
    processor::{self, Stopwatch},
    report::Comparison,
    rig::{self, Direction, received},
    rounds::interleave,
    statistics::Better,
    user_space::UserSpace,
};

const TAP: &str = "tap0";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const GUEST_PORT: u16 = 4000;
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 10];
/// Payload of a segment: what a packet of 1500 bytes holds.
const SEGMENT: u16 = 1460;
/// Segments of a packet: as many as fit 64 KiB.
const SEGMENTS: u16 = 44;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    let title = "64 KiB TCP packets written to a tap";
    if run.wants(title) {
        write_to_tap(run, title)?;
    }
    for (title, options) in [
        ("iperf3 from guest to world, one processor", &[][..]),
        ("iperf3 from world to guest, one processor", &["-R"]),
    ] {
        if run.wants(title) {
            transfer(run, title, options)?;
        }
    }
    Ok(())
}

/// A host with a tap whose other side is in our hands.
struct Writer {
    tap: TunTap,
    sink: Ebpf,
    offload: Offload,
    frame: Vec<u8>,
    _installed: Installed,
    _topology: Topology,
}

impl Writer {
    fn build(contender: Contender) -> Result<Self> {
        let topology = Topology::builder().guests(0).build()?;
        let host = &topology.host;
        let options = Options {
            offloads: true,
            ..Options::new(Layer::Ethernet)
        };
        let tap = TunTap::create(host, TAP, options)?;
        let installed = contender.install(host, TAP, GATEWAY, &Wish::default())?;
        topology.pin_neighbours()?;
        host.ip(&format!(
            "neighbour replace {GUEST} lladdr {} nud permanent dev {TAP}",
            GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":")
        ))?;
        let translated = if contender.translates() {
            HOST_ADDRESS
        } else {
            GUEST
        };
        let sink = attach_sink(&topology, translated)?;

        let [world, _] = WORLD_ADDRESSES;
        let remote = SocketAddr::new(world.into(), abi::REMOTE_PORT as u16);
        let guest = SocketAddr::new(GUEST.into(), GUEST_PORT);
        let host_mac = rig::mac(&host.mac_address(TAP)?)?;
        let outward = packet::tcp(guest, remote).ethernet(GUEST_MAC, host_mac);
        // The handshake.
        let syn = outward.clone().with_tcp(|tcp| {
            tcp.syn = true;
            tcp.ack = false;
        });
        tap.send(Offload::default(), &syn.build())?;
        let (peer, device) = topology.uplink_peer();
        let back = SocketAddr::new(IpAddr::V4(translated), GUEST_PORT);
        let answer = packet::tcp(remote, back)
            .ethernet(
                rig::mac(&peer.mac_address(device)?)?,
                rig::mac(&host.mac_address(UPLINK)?)?,
            )
            .with_tcp(|tcp| {
                tcp.syn = true;
                tcp.ack = true;
                tcp.acknowledgment_number = 1;
            });
        FrameSender::open(peer, device)?.send(&answer.build())?;
        let outward = outward.with_tcp(|tcp| {
            tcp.syn = false;
            tcp.ack = true;
            tcp.sequence_number = 1;
            tcp.acknowledgment_number = 1;
            tcp.window_size = u16::MAX;
        });
        tap.send(Offload::default(), &outward.build())?;
        let payload = vec![0; usize::from(SEGMENT) * usize::from(SEGMENTS)];
        let (offload, frame) = outward.payload(&payload).offloaded(Some(SEGMENT));
        Ok(Self {
            tap,
            sink,
            offload,
            frame,
            _installed: installed,
            _topology: topology,
        })
    }

    /// Nanoseconds a packet, each of which must arrive whole and translated.
    fn measure(&self, count: u32) -> Result<f64> {
        let before = received(&self.sink, Direction::Outward)?;
        let used = processor::in_thread(|| {
            processor::occupy()?;
            let watch = Stopwatch::start()?;
            for _ in 0..count {
                self.tap.send(self.offload, &self.frame)?;
            }
            watch.used()
        })?;
        let after = received(&self.sink, Direction::Outward)?;
        let count = u64::from(count);
        ensure!(
            after.proven - before.proven == count
                && after.segments - before.segments == count * u64::from(SEGMENTS)
                && after.bytes - before.bytes == count * self.frame.len() as u64,
            "of {count} packets {} arrived translated, {} in all with {} bytes in {} segments",
            after.proven - before.proven,
            after.packets - before.packets,
            after.bytes - before.bytes,
            after.segments - before.segments
        );
        Ok(used.as_secs_f64() * 1e9 / count as f64)
    }
}

/// Counts and drops in the world whatever arrives there, before its stack sees it.
fn attach_sink(topology: &Topology, translated: Ipv4Addr) -> Result<Ebpf> {
    let proof = Packets {
        protocol: Protocol::Tcp,
        flags: 0,
        outward: true,
        mac: [0; 6],
        guest: GUEST,
        translated,
        translated_mask: Ipv4Addr::BROADCAST,
        order: Order::Fresh,
        vary: Vary::Remote,
        through: 0,
    };
    let mut ebpf = EbpfLoader::new()
        .load(rig::PROGRAMS)
        .context("cannot load the benchmarks' eBPF programs")?;
    let map = ebpf.map_mut(abi::STREAMS).context("no streams")?;
    let mut streams: Array<_, Stream> = Array::try_from(map)?;
    streams.set(abi::OUTWARD, proof.stream()?, 0)?;
    let program: &mut SchedClassifier = ebpf
        .program_mut("receive_offloaded")
        .context("no sink")?
        .try_into()?;
    program.load()?;
    let (peer, device) = topology.uplink_peer();
    peer.run(|| {
        program.attach(device, TcAttachType::Ingress)?;
        Ok(())
    })?;
    Ok(ebpf)
}

fn write_to_tap(run: &mut Run<'_>, title: &str) -> Result<()> {
    let contenders = [
        Contender::Redirect,
        Contender::Forwarding,
        Contender::Nft,
        Contender::Tapnat,
        Contender::ForwardingAgain,
    ];
    let mut writers = contenders
        .iter()
        .map(|contender| Writer::build(*contender))
        .collect::<Result<Vec<_>>>()?;
    let count = if run.effort.quick { 5_000 } else { 20_000 };
    let rounds = interleave(&mut writers, run.effort.rounds, |writer| {
        // Also renews what was not used since the last turn.
        writer.measure(100)?;
        Ok([writer.measure(count)?])
    })?;
    run.report.compare(Comparison {
        title: title.to_owned(),
        unit: "ns a packet",
        better: Better::Lower,
        series: vec!["out"],
        contenders: contestants(contenders.iter().map(ToString::to_string), rounds),
        references: [Contender::Forwarding, Contender::Nft]
            .map(|it| it.to_string())
            .to_vec(),
        control: Some([Contender::Forwarding, Contender::ForwardingAgain].map(|it| it.to_string())),
    });
    Ok(())
}

/// Who carries iperf3's bytes.
#[derive(Clone, Copy)]
enum Carrier {
    Kernel(Contender),
    UserSpace(UserSpace),
}

impl fmt::Display for Carrier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(contender) => contender.fmt(formatter),
            Self::UserSpace(user_space) => user_space.fmt(formatter),
        }
    }
}

struct Bulk {
    // These go before their world does.
    _installed: Option<Installed>,
    _process: Option<Process>,
    topology: Topology,
}

impl Bulk {
    fn build(carrier: Carrier) -> Result<Self> {
        let inside = match carrier {
            Carrier::Kernel(_) => Inside::Tap(Tap::default()),
            // A cable that is only taken away.
            Carrier::UserSpace(_) => Inside::Veth,
        };
        let topology = Topology::builder().inside(inside).build()?;
        let (installed, process) = match carrier {
            Carrier::Kernel(contender) => {
                let installed = install_for_guest(contender, &topology, &Wish::default())?;
                (Some(installed), None)
            }
            Carrier::UserSpace(user_space) => (None, Some(user_space.start(&topology)?)),
        };
        Ok(Self {
            _installed: installed,
            _process: process,
            topology,
        })
    }
}

fn transfer(run: &mut Run<'_>, title: &str, options: &[&str]) -> Result<()> {
    let carriers = [
        Carrier::Kernel(Contender::Forwarding),
        Carrier::Kernel(Contender::Nft),
        Carrier::UserSpace(UserSpace::Pasta),
        Carrier::UserSpace(UserSpace::Slirp),
        Carrier::Kernel(Contender::Tapnat),
        Carrier::Kernel(Contender::ForwardingAgain),
    ];
    let rounds = if run.effort.quick {
        3
    } else {
        run.effort.rounds
    };
    let values = processor::in_thread(|| {
        // Cables, iperf3 and the kernel's work for them: all of it.
        processor::bind()?;
        let mut bulks = carriers
            .into_iter()
            .map(Bulk::build)
            .collect::<Result<Vec<_>>>()?;
        interleave(&mut bulks, rounds, |bulk| {
            let topology = &bulk.topology;
            let guest = topology.guests.first().context("no guest")?;
            let [world, _] = WORLD_ADDRESSES;
            let iperf = iperf3(
                &guest.namespace,
                &topology.world,
                SocketAddr::new(world.into(), 5201),
                Amount::Seconds(1),
                options,
            )?;
            Ok([iperf.bits_per_second / 1e9])
        })
    })?;
    run.report.compare(Comparison {
        title: title.to_owned(),
        unit: "Gbit/s",
        better: Better::Higher,
        series: vec!["rate"],
        contenders: contestants(carriers.iter().map(ToString::to_string), values),
        references: [Contender::Forwarding, Contender::Nft]
            .map(|it| it.to_string())
            .to_vec(),
        control: Some([Contender::Forwarding, Contender::ForwardingAgain].map(|it| it.to_string())),
    });
    Ok(())
}
