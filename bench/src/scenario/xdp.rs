//! The time that a packet takes from the wire: the world's driver sends frames to the uplink's
//! driver, where XDP, or TC, has them. From the world to the guest only.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, maps::Array, programs::XdpMode};
use tapnat_testbed::topology::{GUEST_DEVICE, HOST_ADDRESS, UPLINK};

use super::{Run, contestants};
use crate::{
    abi::{self, Rewrite},
    contender::{Contender, Stand, Wish},
    packets::{Order, Packets, Protocol},
    report::Comparison,
    rig::{self, Direction, Flows, INSIDE},
    rounds::interleave,
    statistics::Better,
};

const BURST: u32 = 65_536;
const STATELESS: &str = "stateless XDP";
const TAPNAT_XDP: &str = "tapnat, XDP";

pub fn run(run: &mut Run<'_>) -> Result<()> {
    for count in [1, 30_000] {
        let title = format!("UDP of {count} established flows, from the wire");
        if !run.wants(&title) {
            continue;
        }
        let contenders = [
            Contender::Redirect,
            Contender::Forwarding,
            Contender::Nft,
            Contender::Tapnat,
            Contender::RedirectAgain,
        ];
        let mut stands = Stand::build_all(&contenders, &Wish::default())?;
        let mut names: Vec<_> = contenders.iter().map(ToString::to_string).collect();
        let mut stateless = Stand::build(Contender::Nft, &Wish::default())?;
        let flows = Flows {
            protocol: Protocol::Udp,
            count,
        };
        stateless.rig.open(flows)?;
        // From here on nothing gets as far as nft.
        let _program = attach_stateless(&stateless)?;
        for stand in &mut stands {
            stand.rig.open(flows)?;
        }
        let wish = Wish {
            uplink_hook: "xdp",
            ..Wish::default()
        };
        let mut early = Stand::build(Contender::Tapnat, &wish)?;
        early.rig.open(flows)?;
        stands.insert(0, early);
        names.insert(0, TAPNAT_XDP.to_owned());
        stands.insert(0, stateless);
        names.insert(0, STATELESS.to_owned());
        for stand in &mut stands {
            let (_, through) = stand.rig.wire()?;
            let packets = Packets {
                through,
                ..stand
                    .rig
                    .packets(Direction::Inward, Protocol::Udp, Order::Mixed(count))?
            };
            stand.rig.choose(&packets)?;
        }
        let turns = (run.effort.length.as_millis() / 50).max(1) as u32;
        let rounds = interleave(&mut stands, run.effort.rounds, |stand| {
            stand.rig.burst_over_wire(count.max(BURST))?;
            let sent = stand.rig.burst_over_wire(BURST * turns)?;
            Ok([sent.used.as_secs_f64() * 1e9 / f64::from(BURST * turns)])
        })?;
        run.report.compare(Comparison {
            title,
            unit: "ns a packet",
            better: Better::Lower,
            series: vec!["in"],
            contenders: contestants(names, rounds),
            references: vec![STATELESS.to_owned(), Contender::Nft.to_string()],
            control: Some([Contender::Redirect, Contender::RedirectAgain].map(|it| it.to_string())),
        });
    }
    Ok(())
}

/// Attaches the program that translates every packet alike to the host's uplink.
fn attach_stateless(stand: &Stand) -> Result<Ebpf> {
    let topology = &stand.rig.topology;
    let host = &topology.host;
    let guest = topology.guests.first().context("no guest")?;
    let link = [
        rig::mac(&guest.namespace.mac_address(GUEST_DEVICE)?)?,
        rig::mac(&host.mac_address(INSIDE)?)?,
    ]
    .concat();
    let mut rewrite = Rewrite {
        device: host.device_index(INSIDE)?.context("the device is gone")?,
        destination: halves(guest.address).map(u16::to_be),
        delta: halves(guest.address).map(u32::from).iter().sum::<u32>()
            + halves(HOST_ADDRESS)
                .map(|half| u32::from(!half))
                .iter()
                .sum::<u32>(),
        ..Rewrite::default()
    };
    for (place, bytes) in rewrite.link.iter_mut().zip(link.as_chunks().0) {
        *place = u16::from_ne_bytes(*bytes);
    }
    let mut ebpf = EbpfLoader::new()
        .load(rig::PROGRAMS)
        .context("cannot load the benchmarks' eBPF programs")?;
    let map = ebpf
        .map_mut(abi::REWRITE)
        .context("no plan to rewrite by")?;
    Array::try_from(map)?.set(0, rewrite, 0)?;
    let program = rig::xdp(&mut ebpf, "rewrite_inward")?;
    program.load()?;
    host.run(|| {
        program.attach(UPLINK, XdpMode::Driver)?;
        Ok(())
    })?;
    Ok(ebpf)
}

fn halves(address: Ipv4Addr) -> [u16; 2] {
    let bits = address.to_bits();
    [(bits >> 16) as u16, bits as u16]
}
