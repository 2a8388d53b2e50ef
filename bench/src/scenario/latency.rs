//! The time from a guest's question to the world's answer, when nothing else happens and beside a
//! flood on another processor.
//!
//! One thread is guest and world in turn, and the kernel carries a packet to its socket before the
//! call that sends it returns: so the figures hold the path, and no waiting for the scheduler.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tapnat_testbed::{topology::WORLD_ADDRESSES, traffic};

use super::{Run, contestants};
use crate::{
    contender::{Contender, Stand, Wish},
    packets::Protocol,
    processor,
    report::Comparison,
    rig::{Direction, Flows, Rig},
    rounds::interleave,
    statistics::{Better, quantile},
};

const PORT: u16 = 7000;
const PATIENCE: Duration = Duration::from_secs(2);
/// Packets of the flood in one go.
const BURST: u32 = 65_536;

pub fn run(run: &mut Run<'_>) -> Result<()> {
    for loaded in [false, true] {
        let title = if loaded {
            "question and answer, another processor half busy with 30000 flows"
        } else {
            "question and answer, idle"
        };
        if run.wants(title) {
            measure(run, title, loaded)?;
        }
    }
    Ok(())
}

struct Pair {
    stand: Stand,
    guest: UdpSocket,
    world: UdpSocket,
}

fn measure(run: &mut Run<'_>, title: &str, loaded: bool) -> Result<()> {
    let contenders = [
        Contender::Forwarding,
        Contender::Nft,
        Contender::Tapnat,
        Contender::ForwardingAgain,
    ];
    let mut pairs = Vec::new();
    for mut stand in Stand::build_all(&contenders, &Wish::default())? {
        let topology = &stand.rig.topology;
        let guest = topology.guests.first().context("no guest")?;
        let [world, _] = WORLD_ADDRESSES;
        let world = SocketAddr::new(IpAddr::V4(world), PORT);
        let pair = [
            traffic::udp_socket(
                &guest.namespace,
                SocketAddr::new(guest.address.into(), PORT),
            )?,
            traffic::udp_socket(&topology.world, world)?,
        ];
        if loaded {
            stand.rig.open(Flows {
                protocol: Protocol::Udp,
                count: 30_000,
            })?;
        }
        let [guest, world_socket] = pair;
        guest.connect(world)?;
        for socket in [&guest, &world_socket] {
            socket.set_nonblocking(true)?;
        }
        pairs.push(Pair {
            stand,
            guest,
            world: world_socket,
        });
    }
    let count = if run.effort.quick { 5_000 } else { 20_000 };
    let rounds = interleave(&mut pairs, run.effort.rounds, |pair| {
        let rig = &pair.stand.rig;
        let stop = AtomicBool::new(false);
        let times = thread::scope(|scope| {
            let flood = loaded.then(|| scope.spawn(|| flood(rig, &stop)));
            let times = processor::in_thread(|| {
                processor::occupy()?;
                // The first ones pay for what the rest find done.
                questions(pair, count / 10)?;
                questions(pair, count)
            });
            stop.store(true, Ordering::Relaxed);
            match flood.map(thread::ScopedJoinHandle::join) {
                None | Some(Ok(Ok(()))) => times,
                Some(Ok(Err(error))) => Err(error),
                Some(Err(panic)) => std::panic::resume_unwind(panic),
            }
        })?;
        Ok([0.5, 0.999, 0.99].map(|share| quantile(&times, share)))
    })?;
    run.report.compare(Comparison {
        title: title.to_owned(),
        unit: "µs there and back",
        better: Better::Lower,
        series: vec!["median", "99.9%", "99%"],
        contenders: contestants(contenders.iter().map(ToString::to_string), rounds),
        references: [Contender::Forwarding, Contender::Nft]
            .map(|it| it.to_string())
            .to_vec(),
        control: Some([Contender::Forwarding, Contender::ForwardingAgain].map(|it| it.to_string())),
    });
    Ok(())
}

/// Microseconds that each question took.
fn questions(pair: &Pair, count: usize) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        pair.guest.send(b"question").context("cannot ask")?;
        let asker = receive(&pair.world).context("the world hears nothing")?;
        pair.world
            .send_to(b"answer!!", asker)
            .context("cannot answer")?;
        receive(&pair.guest).context("the guest hears nothing")?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

fn receive(socket: &UdpSocket) -> Result<SocketAddr> {
    let mut buffer = [0; 64];
    let start = Instant::now();
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((_, from)) => return Ok(from),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if start.elapsed() > PATIENCE {
                    bail!("no packet within {PATIENCE:?}");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Keeps another processor busy for half of the time.
fn flood(rig: &Rig, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let sent = rig.burst_elsewhere(Direction::Outward, BURST)?;
        thread::sleep((sent.used * 2).saturating_sub(start.elapsed()));
    }
    Ok(())
}
