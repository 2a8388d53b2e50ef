//! One contender's world with the generators and sinks in it: sends bursts of packets through the
//! host and counts what comes out.
//!
//! ```text
//! sink lan0 -- veth0 [generator] -- host -- [generator] uplink0 -- downlink0 sink
//! ```
//! The generators put packets into the receive path of the host's devices, so that they take the
//! same way as a guest's; the sinks drop them in the peer's driver.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunAttrs, TestRunOptions,
    maps::{Array, PerCpuArray},
    programs::{SchedClassifier, TcAttachType, Xdp, XdpMode},
};
use tapnat_testbed::topology::{GUEST_DEVICE, HOST_ADDRESS, Inside, Topology, UPLINK};

use crate::{
    abi::{self, FRAME_LENGTH, Received, Stream},
    packets::{FIRST_PORT, FIRST_REMOTE, Packets, Protocol, tcp_flags},
    processor, statistics,
};

/// The host's device towards the guest.
pub const INSIDE: &str = "veth0";
/// Frames that the kernel makes before it delivers them.
const BATCH: u32 = 64;

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
pub struct Rig {
    // Before the namespaces, as its links hold devices in them.
    ebpf: Ebpf,
    pub topology: Topology,
    /// The guests' address in the world.
    pub outside: Ipv4Addr,
}

impl Rig {
    /// Builds a world of one guest on a veth. `outside`: what becomes of the guest's address, or
    /// `None` if nothing does.
    ///
    /// # Errors
    ///
    /// No root, or the kernel refuses.
    pub fn build(translates: bool) -> Result<Self> {
        let topology = Topology::builder().inside(Inside::Veth).build()?;
        let guest = topology.guests.first().context("no guest")?;
        let outside = if translates {
            HOST_ADDRESS
        } else {
            guest.address
        };
        let host = &topology.host;
        let index = |device| -> Result<u32> {
            host.device_index(device)?
                .with_context(|| format!("no device {device}"))
        };
        let (inside_index, uplink_index) = (index(INSIDE)?, index(UPLINK)?);
        let object = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench"));
        let mut ebpf = EbpfLoader::new()
            .override_global(abi::INSIDE, &inside_index, true)
            .override_global(abi::UPLINK, &uplink_index, true)
            .load(object)
            .context("cannot load the benchmarks' eBPF programs")?;
        for direction in Direction::BOTH {
            // Only then does a veth accept XDP frames as if received.
            host.exec(&format!("ethtool -K {} gro on", direction.entrance()))?;
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
            outside,
        })
    }

    /// Attaches the programs that only redirect.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn attach_redirect(&mut self) -> Result<()> {
        for direction in Direction::BOTH {
            let name = match direction {
                Direction::Outward => "redirect_outward",
                Direction::Inward => "redirect_inward",
            };
            let program: &mut SchedClassifier = self
                .ebpf
                .program_mut(name)
                .with_context(|| format!("no program {name}"))?
                .try_into()?;
            program.load()?;
            self.topology.host.run(|| {
                program.attach(direction.entrance(), TcAttachType::Ingress)?;
                Ok(())
            })?;
        }
        Ok(())
    }

    fn packets(&self, flows: Flows, direction: Direction, flags: u8) -> Result<Packets> {
        let guest = self.topology.guests.first().context("no guest")?;
        let mac = self.topology.host.mac_address(direction.entrance())?;
        let outward = direction == Direction::Outward;
        let (before, after) = if outward {
            (guest.address, self.outside)
        } else {
            (self.outside, guest.address)
        };
        Ok(Packets {
            protocol: flows.protocol,
            flags,
            outward,
            mac: parse_mac(&mac)?,
            guest: before,
            translated: after,
            first_remote: FIRST_REMOTE,
            first_port: FIRST_PORT,
            flows: flows.count,
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
            let packets = self.packets(flows, *direction, *flags)?;
            self.choose(&packets)?;
            let before = self.received(*direction)?;
            self.burst(*direction, flows.count)?;
            let after = self.received(*direction)?;
            let proven = after.proven - before.proven;
            ensure!(
                proven == u64::from(flows.count),
                "of {} packets {direction:?} only {proven} came out as they should ({} in all)",
                flows.count,
                after.packets - before.packets
            );
        }
        Ok(())
    }

    /// Sends so many packets one way and returns the processor's time that this took, up to the
    /// sink: the kernel also waits, for its own housekeeping, before the call returns.
    ///
    /// The calling thread must be in the host's namespace.
    fn send(&self, direction: Direction, packets: u32, device: u32) -> Result<Duration> {
        let program = self
            .ebpf
            .program(direction.generator())
            .context("no generator")?;
        let program: &Xdp = program.try_into()?;
        let frame = [0; FRAME_LENGTH];
        // struct xdp_md of linux/bpf.h: data, data_end, data_meta, ingress_ifindex,
        // rx_queue_index, egress_ifindex.
        let context = [0, FRAME_LENGTH as u32, 0, device, 0, 0].map(u32::to_ne_bytes);
        let start = processor::time_used()?;
        program
            .test_run(TestRunOptions {
                data_in: Some(&frame),
                ctx_in: Some(context.as_flattened()),
                repeat: packets,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::default()
            })
            .context("cannot send packets")?;
        Ok(processor::time_used()?.saturating_sub(start))
    }

    /// Sends so many packets one way.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn burst(&self, direction: Direction, packets: u32) -> Result<()> {
        let host = &self.topology.host;
        let device = host
            .device_index(direction.entrance())?
            .context("the device is gone")?;
        host.run(|| {
            processor::occupy()?;
            self.send(direction, packets, device).map(drop)
        })
    }

    /// Sends bursts of packets in both directions, turn by turn, for about so long.
    ///
    /// # Errors
    ///
    /// When a packet is lost or comes out untranslated.
    pub fn measure(&self, warm: u32, burst: u32, length: Duration) -> Result<Round> {
        let host = &self.topology.host;
        let mut devices = [0; 2];
        for (device, direction) in devices.iter_mut().zip(Direction::BOTH) {
            *device = host
                .device_index(direction.entrance())?
                .context("the device is gone")?;
        }
        let before = self.received_both()?;
        let (sent, times) = host.run(|| {
            processor::occupy()?;
            for (direction, device) in Direction::BOTH.into_iter().zip(devices) {
                self.send(direction, warm, device)?;
            }
            let mut sent = u64::from(warm);
            let mut times = [Vec::new(), Vec::new()];
            let start = Instant::now();
            while start.elapsed() < length {
                for ((direction, device), times) in
                    Direction::BOTH.into_iter().zip(devices).zip(&mut times)
                {
                    let time = self.send(direction, burst, device)?;
                    times.push(time.as_secs_f64() * 1e9 / f64::from(burst));
                }
                sent += u64::from(burst);
            }
            Ok((sent, times))
        })?;
        let after = self.received_both()?;
        for ((before, after), direction) in before.iter().zip(after).zip(Direction::BOTH) {
            let proven = after.proven - before.proven;
            ensure!(
                proven == sent,
                "of {sent} packets {direction:?} only {proven} came out as they should ({} in all)",
                after.packets - before.packets
            );
        }
        let [outward, inward] = times.map(|times| statistics::median(&times));
        Ok(Round { outward, inward })
    }

    fn received_both(&self) -> Result<[Received; 2]> {
        Ok([
            self.received(Direction::Outward)?,
            self.received(Direction::Inward)?,
        ])
    }

    /// What the sink of this direction has got so far.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn received(&self, direction: Direction) -> Result<Received> {
        let map = self.ebpf.map(abi::RECEIVED).context("no counters")?;
        let map: PerCpuArray<_, Received> = PerCpuArray::try_from(map)?;
        let values = map.get(&direction.index(), 0)?;
        Ok(values
            .iter()
            .fold(Received::default(), |sum, one| Received {
                packets: sum.packets + one.packets,
                proven: sum.proven + one.proven,
            }))
    }
}

/// Nanoseconds a packet in one round.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    pub outward: f64,
    pub inward: f64,
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?;
    Ok(program.try_into()?)
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    for (byte, part) in mac.iter_mut().zip(text.split(':')) {
        *byte =
            u8::from_str_radix(part, 16).with_context(|| format!("malformed address {text}"))?;
    }
    Ok(mac)
}
