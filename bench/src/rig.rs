//! One contender's world with the generators and sinks in it: sends bursts of packets through the
//! host and counts what comes out.
//!
//! ```text
//! sink lan0 -- veth0 [generator] -- host -- [generator] uplink0 -- downlink0 sink
//! ```
//! The generators put packets into the receive path of the host's devices, so that they take the
//! same way as a guest's; the sinks drop them in the peer's driver.

use std::{net::Ipv4Addr, sync::Barrier, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunAttrs, TestRunOptions,
    maps::{Array, PerCpuArray},
    programs::{Xdp, XdpMode},
};
use tapnat_testbed::{
    Namespace,
    topology::{GUEST_DEVICE, HOST_ADDRESS, Inside, Topology, UPLINK},
};

use crate::{
    abi::{self, FRAME_LENGTH, Received, Stream},
    packets::{Order, Packets, Protocol, Vary, tcp_flags},
    processor::{self, Stopwatch},
};

/// The host's device towards the guest.
pub const INSIDE: &str = "veth0";
/// Frames that the kernel makes before it delivers them.
const BATCH: u32 = 64;

/// The benchmarks' eBPF programs.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench"));

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest to the world.
    Outward,
    /// From the world to the guest.
    Inward,
}

impl Direction {
    pub const BOTH: [Self; 2] = [Self::Outward, Self::Inward];

    const fn index(self) -> u32 {
        match self {
            Self::Outward => abi::OUTWARD,
            Self::Inward => abi::INWARD,
        }
    }

    const fn generator(self) -> &'static str {
        match self {
            Self::Outward => "send_outward",
            Self::Inward => "send_inward",
        }
    }

    const fn sink(self) -> &'static str {
        match self {
            Self::Outward => "receive_outward",
            Self::Inward => "receive_inward",
        }
    }

    /// The host's device that the packets arrive on.
    #[must_use]
    pub const fn entrance(self) -> &'static str {
        match self {
            Self::Outward => INSIDE,
            Self::Inward => UPLINK,
        }
    }
}

/// A set of flows between the guest and the world.
#[derive(Clone, Copy, Debug)]
pub struct Flows {
    pub protocol: Protocol,
    pub count: u32,
}

/// A world with generators and sinks.
#[derive(Debug)]
pub struct Rig {
    // Before the namespaces, as its links hold devices in them.
    ebpf: Ebpf,
    pub topology: Topology,
    /// Of the contender, for messages.
    name: String,
    translates: bool,
}

/// How long a burst took.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// The processor's time of the whole call.
    pub used: Duration,
    /// The mean time of a packet as the kernel measures it, without what it does before the first
    /// and after the last: for bursts that are short. In whole nanoseconds.
    pub each: Duration,
}

/// Nanoseconds a packet in one round.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    pub outward: f64,
    pub inward: f64,
}

impl Rig {
    /// Builds a world of one guest on a veth for the contender of this name. `translates`: whether
    /// the guest's address becomes the host's.
    ///
    /// # Errors
    ///
    /// No root, or the kernel refuses.
    pub fn build(name: String, translates: bool) -> Result<Self> {
        let topology = Topology::builder().inside(Inside::Veth).build()?;
        let mut ebpf = EbpfLoader::new()
            .load(PROGRAMS)
            .context("cannot load the benchmarks' eBPF programs")?;
        let guest = topology.guests.first().context("no guest")?;
        for direction in Direction::BOTH {
            // Only then does a veth accept XDP frames as if received.
            let entrance = direction.entrance();
            topology
                .host
                .exec(&format!("ethtool -K {entrance} gro on"))?;
            xdp(&mut ebpf, direction.generator())?.load()?;
            let sink = xdp(&mut ebpf, direction.sink())?;
            sink.load()?;
            let (namespace, device) = match direction {
                Direction::Outward => topology.uplink_peer(),
                Direction::Inward => (&guest.namespace, GUEST_DEVICE),
            };
            namespace.run(|| {
                sink.attach(device, XdpMode::Driver)
                    .with_context(|| format!("cannot attach the sink to {device}"))?;
                Ok(())
            })?;
        }
        Ok(Self {
            ebpf,
            topology,
            name,
            translates,
        })
    }

    fn guest(&self) -> Result<Ipv4Addr> {
        Ok(self.topology.guests.first().context("no guest")?.address)
    }

    /// The packets of one direction between the guest and the world.
    ///
    /// # Errors
    ///
    /// When a device is gone.
    pub fn packets(
        &self,
        direction: Direction,
        protocol: Protocol,
        order: Order,
    ) -> Result<Packets> {
        let guest = self.guest()?;
        let outside = if self.translates { HOST_ADDRESS } else { guest };
        let outward = direction == Direction::Outward;
        let (before, after) = if outward {
            (guest, outside)
        } else {
            (outside, guest)
        };
        Ok(Packets {
            protocol,
            flags: 0,
            outward,
            mac: mac(&self.topology.host.mac_address(direction.entrance())?)?,
            guest: before,
            translated: after,
            translated_mask: Ipv4Addr::BROADCAST,
            order,
            vary: Vary::Remote,
            through: 0,
        })
    }

    /// Chooses what the generator of this direction sends.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn choose(&mut self, packets: &Packets) -> Result<()> {
        let direction = if packets.outward {
            Direction::Outward
        } else {
            Direction::Inward
        };
        let map = self.ebpf.map_mut(abi::STREAMS).context("no streams")?;
        let mut streams: Array<_, Stream> = Array::try_from(map)?;
        streams.set(direction.index(), packets.stream()?, 0)?;
        Ok(())
    }

    /// Opens the flows, and leaves the generators with their established packets. Every packet
    /// must come out translated.
    ///
    /// # Errors
    ///
    /// When one does not.
    pub fn open(&mut self, flows: Flows) -> Result<()> {
        use tcp_flags::{ACK, SYN};
        let handshake = match flows.protocol {
            Protocol::Udp => &[(Direction::Outward, 0), (Direction::Inward, 0)][..],
            Protocol::Tcp => &[
                (Direction::Outward, SYN),
                (Direction::Inward, SYN | ACK),
                (Direction::Outward, ACK),
                (Direction::Inward, ACK),
            ],
        };
        for (direction, flags) in handshake {
            let packets = Packets {
                flags: *flags,
                ..self.packets(*direction, flows.protocol, Order::Mixed(flows.count))?
            };
            self.choose(&packets)?;
            self.burst(*direction, flows.count)?;
        }
        Ok(())
    }

    /// Sends so many packets one way, all of which must come out translated.
    ///
    /// # Errors
    ///
    /// When one does not, or the kernel refuses.
    pub fn burst(&self, direction: Direction, packets: u32) -> Result<Sent> {
        self.burst_on(processor::occupy, direction, packets)
    }

    /// The same from another processor than that of the measurement.
    ///
    /// # Errors
    ///
    /// As [`Self::burst`].
    pub fn burst_elsewhere(&self, direction: Direction, packets: u32) -> Result<Sent> {
        self.burst_on(processor::bind_elsewhere, direction, packets)
    }

    fn burst_on(
        &self,
        prepare: fn() -> Result<()>,
        direction: Direction,
        packets: u32,
    ) -> Result<Sent> {
        let device = self.index(direction)?;
        let before = self.received(direction)?;
        let sent = self.topology.host.run(|| {
            prepare()?;
            self.send(direction, packets, device)
        })?;
        self.check(direction, before, packets.into())?;
        Ok(sent)
    }

    /// Sends so many packets from the world over the wire, so that they arrive at the uplink's driver;
    /// the generator must have been told to send through the world's device. All of them must come
    /// out translated.
    ///
    /// # Errors
    ///
    /// When one does not, or the kernel refuses.
    pub fn burst_over_wire(&self, packets: u32) -> Result<Sent> {
        let (world, device) = self.wire()?;
        let before = self.received(Direction::Inward)?;
        let sent = world.run(|| {
            processor::occupy()?;
            self.send(Direction::Inward, packets, device)
        })?;
        self.check(Direction::Inward, before, packets.into())?;
        Ok(sent)
    }

    /// The world, and the index of its device towards the host.
    ///
    /// # Errors
    ///
    /// When the device is gone.
    pub fn wire(&self) -> Result<(&Namespace, u32)> {
        let (world, device) = self.topology.uplink_peer();
        let index = world.device_index(device)?;
        Ok((world, index.with_context(|| format!("{device} is gone"))?))
    }

    /// Sends bursts of packets in both directions, turn by turn, for about so long, after a first
    /// one of `warm` packets that is not measured. `summary` makes one figure of the bursts' in each
    /// direction.
    ///
    /// # Errors
    ///
    /// When a packet is lost or comes out untranslated, or the kernel refuses.
    pub fn measure(
        &self,
        warm: u32,
        burst: u32,
        length: Duration,
        summary: fn(&[f64]) -> f64,
    ) -> Result<Round> {
        let devices = [
            self.index(Direction::Outward)?,
            self.index(Direction::Inward)?,
        ];
        let before = [
            self.received(Direction::Outward)?,
            self.received(Direction::Inward)?,
        ];
        let (sent, times) = self.topology.host.run(|| {
            processor::occupy()?;
            for (direction, device) in Direction::BOTH.into_iter().zip(devices) {
                self.send(direction, warm, device)?;
            }
            let mut sent = u64::from(warm);
            let mut times = [Vec::new(), Vec::new()];
            let mut elapsed = Duration::ZERO;
            while elapsed < length {
                for ((direction, device), times) in
                    Direction::BOTH.into_iter().zip(devices).zip(&mut times)
                {
                    let used = self.send(direction, burst, device)?.used;
                    elapsed += used;
                    times.push(used.as_secs_f64() * 1e9 / f64::from(burst));
                }
                sent += u64::from(burst);
            }
            Ok((sent, times))
        })?;
        for (direction, before) in Direction::BOTH.into_iter().zip(before) {
            self.check(direction, before, sent)?;
        }
        let [outward, inward] = times.map(|times| summary(&times));
        Ok(Round { outward, inward })
    }

    /// The same with a processor for each direction, at the same time.
    ///
    /// # Errors
    ///
    /// As [`Self::measure`].
    pub fn measure_side_by_side(
        &self,
        warm: u32,
        burst: u32,
        length: Duration,
        summary: fn(&[f64]) -> f64,
    ) -> Result<Round> {
        let [outward, inward] = [
            self.index(Direction::Outward)?,
            self.index(Direction::Inward)?,
        ];
        let start = Barrier::new(Direction::BOTH.len());
        let one = |direction: Direction, device: u32, occupy: fn() -> Result<()>| -> Result<f64> {
            let before = self.received(direction);
            let (sent, times) = self.topology.host.run(|| {
                let ready = occupy().and_then(|()| self.send(direction, warm, device));
                // The other one waits for this one, also in vain.
                start.wait();
                ready?;
                let mut sent = u64::from(warm);
                let mut times = Vec::new();
                let mut elapsed = Duration::ZERO;
                while elapsed < length {
                    let used = self.send(direction, burst, device)?.used;
                    elapsed += used;
                    times.push(used.as_secs_f64() * 1e9 / f64::from(burst));
                    sent += u64::from(burst);
                }
                Ok((sent, times))
            })?;
            self.check(direction, before?, sent)?;
            Ok(summary(&times))
        };
        thread::scope(|scope| {
            let outward = scope.spawn(|| one(Direction::Outward, outward, processor::occupy));
            let inward = one(Direction::Inward, inward, processor::occupy_elsewhere);
            let outward = outward
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(Round {
                outward: outward?,
                inward: inward?,
            })
        })
    }

    fn index(&self, direction: Direction) -> Result<u32> {
        let entrance = direction.entrance();
        self.topology
            .host
            .device_index(entrance)?
            .with_context(|| format!("{entrance} is gone"))
    }

    /// The calling thread must be in the host's namespace.
    fn send(&self, direction: Direction, packets: u32, device: u32) -> Result<Sent> {
        let program = self
            .ebpf
            .program(direction.generator())
            .context("no generator")?;
        let program: &Xdp = program.try_into()?;
        let frame = [0; FRAME_LENGTH];
        // struct xdp_md of linux/bpf.h: data, data_end, data_meta, ingress_ifindex,
        // rx_queue_index, egress_ifindex.
        let context = [0, FRAME_LENGTH as u32, 0, device, 0, 0].map(u32::to_ne_bytes);
        // The kernel also sleeps in this call, for its own housekeeping: the clock on the wall
        // would count that too.
        let watch = Stopwatch::start()?;
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(&frame),
                ctx_in: Some(context.as_flattened()),
                repeat: packets,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::default()
            })
            .context("cannot send packets")?;
        Ok(Sent {
            used: watch.used()?,
            each: result.duration,
        })
    }

    fn check(&self, direction: Direction, before: Received, sent: u64) -> Result<()> {
        let after = self.received(direction)?;
        let proven = after.proven - before.proven;
        ensure!(
            proven == sent,
            "{}: of {sent} packets {direction:?} only {proven} came out as they should ({} in all)",
            self.name,
            after.packets - before.packets
        );
        Ok(())
    }

    /// What the sink of this direction has got so far.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn received(&self, direction: Direction) -> Result<Received> {
        received(&self.ebpf, direction)
    }
}

/// What the sink of this direction has got so far.
///
/// # Errors
///
/// When the map cannot be read.
pub fn received(ebpf: &Ebpf, direction: Direction) -> Result<Received> {
    let map = ebpf.map(abi::RECEIVED).context("no counters")?;
    let map: PerCpuArray<_, Received> = PerCpuArray::try_from(map)?;
    let values = map.get(&direction.index(), 0)?;
    Ok(values
        .iter()
        .fold(Received::default(), |sum, one| Received {
            packets: sum.packets + one.packets,
            proven: sum.proven + one.proven,
            bytes: sum.bytes + one.bytes,
            segments: sum.segments + one.segments,
        }))
}

/// One of the benchmarks' XDP programs.
///
/// # Errors
///
/// When there is none of that name.
pub fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?;
    Ok(program.try_into()?)
}

/// A link address in bytes.
///
/// # Errors
///
/// When it is none.
pub fn mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    for (byte, part) in mac.iter_mut().zip(text.split(':')) {
        *byte =
            u8::from_str_radix(part, 16).with_context(|| format!("malformed address {text}"))?;
    }
    Ok(mac)
}
