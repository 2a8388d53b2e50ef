//! What happens in the sandbox, in its order: hosts come, tapnat starts, the guest talks to the world,
//! and everything goes again. Owns the order and the words; each part is another module's.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use console::style;
use nix::unistd::geteuid;
use tapnat_display::{
    palette,
    picture::{Picture, Port, Segment, Station, inward, outward},
    units,
};
use tapnat_testbed::{
    at_signal,
    qemu::{Kernel, Machine, Model},
    snapshot::Snapshot,
    topology::{self, GATEWAY, HOST_ADDRESS, Inside, Tap, TapMaker, Topology, WORLD_ADDRESSES},
    traffic::{HttpServer, serve_iperf3},
};

use crate::{
    Options, flows,
    guest::{Bulk, Guest},
    instance::{Instance, as_typed},
    leftovers,
    readings::{Meter, Readings, Traffic},
    screen::{self, Screen},
};

const TAP: &str = "tap0";
const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
const TAP_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Of the guest's network, and of the uplink's.
const PREFIX_LENGTH: u8 = 24;
const SERVER: IpAddr = IpAddr::V4(WORLD_ADDRESSES[0]);
const HTTP_PORT: u16 = 80;
const IPERF3_PORT: u16 = 5201;

/// How often the picture is drawn.
const FRAME: Duration = Duration::from_millis(200);
const SPINNER: [&str; 4] = ["◐", "◓", "◑", "◒"];
/// Columns of the steps' names.
const NAMES: usize = 36;

/// Shows everything once.
///
/// # Errors
/// Something did not work. Nothing is left of it all the same, or the error says what is.
pub fn run(options: &Options) -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "the sandbox makes network namespaces and loads eBPF programs: run it as root"
    );
    let instance = Instance::new(&options.tapnat);
    let screen = Arc::new(Mutex::new(Screen::new()));
    prepare_for_signals(&screen, &instance);

    let outcome = play(options, &instance, &screen);
    lock(&screen).finish()?;
    let proof = leftovers::check(&instance).map(|()| String::new());
    lock(&screen).step(step_line(leftovers::WHAT, &proof))?;
    outcome?;
    proof.map(drop)
}

/// Says what became of the sandbox when a signal ends it.
fn prepare_for_signals(screen: &Arc<Mutex<Screen>>, instance: &Instance) {
    let close = |screen: &Mutex<Screen>, line: &str| {
        // There is nobody else to tell.
        let _ = lock(screen).close(line);
    };
    let before = {
        let screen = screen.clone();
        move || close(&screen, "\nInterrupted: everything is taken away.")
    };
    let (screen, instance) = (screen.clone(), instance.clone());
    let after = move || {
        let proof = leftovers::check(&instance).map(|()| String::new());
        close(&screen, &step_line(leftovers::WHAT, &proof));
    };
    at_signal(before, after);
}

fn lock(screen: &Mutex<Screen>) -> MutexGuard<'_, Screen> {
    screen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything but the proof that nothing is left, which is only there when this has returned.
fn play(options: &Options, instance: &Instance, screen: &Arc<Mutex<Screen>>) -> Result<()> {
    let mut show = Show::new(screen, options.qemu.is_some());
    let mut topology = show.must("a guest, a host and the world", || {
        let topology = build(options.qemu.is_none())?;
        instance.sweep(&topology.host)?;
        Ok((topology, "network namespaces".to_owned()))
    })?;
    let before = Snapshot::take(&topology.host, &instance.pins())?;
    let http = HttpServer::start(&topology.world, SocketAddr::new(SERVER, HTTP_PORT))?;

    let inside = format!("{TAP}={TAP_ADDRESS}/{PREFIX_LENGTH}");
    let tapnat = show.must(&format!("tapnat run --inside {inside}"), || {
        let start = Instant::now();
        let process = instance.start(&topology.host, &["--inside", &inside, "--count"])?;
        let took = start.elapsed().as_secs_f64();
        Ok((process, format!("ready in {took:.1} s")))
    })?;
    show.meter = Some(Meter {
        host: topology.host.clone(),
        instance: instance.clone(),
        tap: TAP,
        uplink: topology::UPLINK,
    });

    let mut guest = match &options.qemu {
        None => show.must("the guest's cable goes into tap0", || {
            plug_in(&mut topology)
        })?,
        Some(kernel) => show.must("a guest boots in QEMU, on tap0", || {
            boot(&topology, Kernel::open(kernel)?)
        })?,
    };
    talk(&mut show, &mut guest, &topology, &http)?;

    show.look()?;
    show.draw(None)?;
    let was_live = lock(screen).is_live();
    lock(screen).finish()?;
    if !was_live {
        show.print_picture()?;
    }
    show.explain()?;

    show.must("everything is taken away again", || {
        drop(guest);
        let warnings = Instance::end(tapnat)?;
        let after = Snapshot::take(&topology.host, &instance.pins())?;
        if let Some(difference) = before.difference(&after) {
            bail!("the host is not as it was:\n{difference}{warnings}");
        }
        Ok(((), "the host is as it was before".to_owned()))
    })?;
    show.verdict()
}

/// The hosts, with or without one that plays the guest.
fn build(with_guest: bool) -> Result<Topology> {
    let tap = Tap {
        made_by: TapMaker::Program,
        ..Tap::default()
    };
    Topology::builder()
        .inside(Inside::Tap(tap))
        .guests(with_guest.into())
        .build()
}

/// The other end of the tap is a tap of the guest, as if QEMU were between them.
fn plug_in(topology: &mut Topology) -> Result<(Guest, String)> {
    topology.plug_in()?;
    let guest = topology.guests.first().context("there is no guest")?;
    let guest = Guest::Namespace(guest.namespace.clone());
    Ok((guest, "as QEMU's would".to_owned()))
}

fn boot(topology: &Topology, kernel: Kernel) -> Result<(Guest, String)> {
    let start = Instant::now();
    let detail = format!("Linux {}", kernel.release());
    // A tap that tapnat makes has several queues, and QEMU has to ask for more than one.
    let machine = Machine::new(kernel).card_with_queues(TAP, Model::Virtio, 2);
    let mut guest = machine.boot(&topology.host)?;
    guest.configure(
        "eth0",
        format!("{GUEST_ADDRESS}/{PREFIX_LENGTH}"),
        TAP_ADDRESS,
    )?;
    let took = start.elapsed().as_secs_f64();
    Ok((
        Guest::Machine(Box::new(guest)),
        format!("{detail}, in {took:.1} s"),
    ))
}

/// The guest talks to the world.
fn talk(show: &mut Show, guest: &mut Guest, topology: &Topology, http: &HttpServer) -> Result<()> {
    show.may(&format!("ping {SERVER}"), || {
        let ping = guest.ping(SERVER)?;
        let average = ping.round_trip.map_or(0.0, |[_, average, _]| average);
        let (sent, received) = (ping.transmitted, ping.received);
        Ok(format!("{received} of {sent} answered, in {average:.2} ms"))
    })?;
    show.may(&format!("curl http://{SERVER}/"), || {
        let (seen, own) = guest.http(http.address())?;
        ensure!(
            seen.ip() == HOST_ADDRESS && own.ip() == GUEST_ADDRESS,
            "the guest was {own}, and the server saw {seen}"
        );
        Ok(format!(
            "the server saw {}",
            palette::outside().apply_to(seen)
        ))
    })?;
    for (name, way) in [
        ("TCP from the guest to the world", Bulk::ToWorld),
        ("TCP from the world to the guest", Bulk::ToGuest),
    ] {
        show.may(name, || {
            let address = SocketAddr::new(SERVER, IPERF3_PORT);
            let _listener = serve_iperf3(&topology.world, address)?;
            let bulk = guest.bulk(address, way)?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rate is not negative, and its fraction is not shown"
            )]
            let rate = units::rate(bulk.bits_per_second as u64);
            Ok(format!("{} arrived, {rate}", units::bytes(bulk.received)))
        })?;
    }
    Ok(())
}

/// What is shown, and what went wrong so far.
struct Show {
    screen: Arc<Mutex<Screen>>,
    picture: Picture,
    meter: Option<Meter>,
    readings: Readings,
    read_at: Instant,
    /// What the guest sent or received in a second when it was last looked at.
    rate: Option<u64>,
    failures: usize,
}

impl Show {
    fn new(screen: &Arc<Mutex<Screen>>, qemu: bool) -> Self {
        let inside = |address: String| palette::inside().apply_to(address).to_string();
        let outside = |address: String| palette::outside().apply_to(address).to_string();
        let with_prefix = |address: Ipv4Addr| format!("{address}/{PREFIX_LENGTH}");
        let (title, device) = if qemu {
            ("guest, QEMU", "eth0")
        } else {
            ("guest", topology::GUEST_DEVICE)
        };
        let picture = Picture {
            title,
            segments: vec![Segment {
                guests: vec![
                    device.to_owned(),
                    inside(with_prefix(GUEST_ADDRESS)),
                    String::new(),
                    "gateway".to_owned(),
                    TAP_ADDRESS.to_string(),
                ],
                port: Port {
                    name: TAP.to_owned(),
                    address: with_prefix(TAP_ADDRESS),
                    lines: traffic_lines(Traffic::default(), Traffic::default(), Side::Guest),
                },
            }],
            uplink: Port {
                name: topology::UPLINK.to_owned(),
                address: outside(with_prefix(HOST_ADDRESS)),
                lines: traffic_lines(Traffic::default(), Traffic::default(), Side::World),
            },
            world: Station {
                title: "world",
                lines: vec![
                    "downlink0".to_owned(),
                    GATEWAY.to_string(),
                    String::new(),
                    "server".to_owned(),
                    SERVER.to_string(),
                ],
            },
            summary: vec![String::new(); 2],
        };
        Self {
            screen: screen.clone(),
            picture,
            meter: None,
            readings: Readings::default(),
            read_at: Instant::now(),
            rate: None,
            failures: 0,
        }
    }

    /// A step that the rest stands on.
    fn must<T: Send>(
        &mut self,
        name: &str,
        task: impl FnOnce() -> Result<(T, String)> + Send,
    ) -> Result<T> {
        let outcome = self.watch(name, task)?;
        let (value, detail) = match outcome {
            Ok((value, detail)) => (Ok(value), Ok(detail)),
            Err(error) => {
                let shown = anyhow::anyhow!("{}", first_line(&error));
                (Err(error.context(format!("{name}: failed"))), Err(shown))
            }
        };
        self.screen().step(step_line(name, &detail))?;
        value
    }

    /// A step whose failure leaves the rest worth seeing.
    fn may(&mut self, name: &str, task: impl FnOnce() -> Result<String> + Send) -> Result<()> {
        let outcome = self.watch(name, task)?;
        self.failures += usize::from(outcome.is_err());
        self.screen().step(step_line(name, &outcome))?;
        Ok(())
    }

    /// Draws until a task is done.
    ///
    /// # Errors
    /// Nothing can be drawn or read. The task's own outcome is what is returned.
    fn watch<T: Send>(
        &mut self,
        name: &str,
        task: impl FnOnce() -> Result<T> + Send,
    ) -> Result<Result<T>> {
        let (done, finished) = mpsc::channel();
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                let outcome = task();
                // Nobody waits if nothing could be drawn.
                let _ = done.send(());
                outcome
            });
            let mut frames = SPINNER.iter().cycle();
            while self.screen().is_live()
                && finished.recv_timeout(FRAME) == Err(mpsc::RecvTimeoutError::Timeout)
            {
                self.look()?;
                let sign = frames.next().copied().unwrap_or_default();
                let rate = self.rate.map(units::rate).unwrap_or_default();
                self.draw(Some(&format!("{sign} {name:NAMES$}  {rate}")))?;
            }
            match worker.join() {
                Ok(outcome) => Ok(outcome),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Reads the numbers and puts them into the picture.
    fn look(&mut self) -> Result<()> {
        let Some(meter) = &self.meter else {
            return Ok(());
        };
        let readings = meter.read()?;
        let now = Instant::now();
        let all = |it: &Readings| it.tap.received.bytes + it.tap.sent.bytes;
        let bits = 8 * all(&readings).saturating_sub(all(&self.readings));
        let milliseconds = now.duration_since(self.read_at).as_millis().max(1);
        let rate = u64::try_from(u128::from(bits) * 1000 / milliseconds).unwrap_or(u64::MAX);
        self.rate = (rate > 0).then_some(rate);
        self.read_at = now;

        let picture = &mut self.picture;
        let (tap, uplink) = (readings.tap, readings.uplink);
        for segment in &mut picture.segments {
            segment.port.lines = traffic_lines(tap.received, tap.sent, Side::Guest);
        }
        picture.uplink.lines = traffic_lines(uplink.sent, uplink.received, Side::World);
        let dropped: u64 = readings.dropped.iter().map(|(_, packets)| packets).sum();
        let dropped = format!("{} dropped", units::count(dropped));
        let dropped = if readings.dropped.is_empty() {
            dropped
        } else {
            style(dropped).red().to_string()
        };
        picture.summary = vec![
            format!("{} sessions", readings.sessions),
            format!(
                "{} translated, {dropped}",
                units::count(readings.translated)
            ),
        ];
        self.readings = readings;
        Ok(())
    }

    fn draw(&self, current: Option<&str>) -> Result<()> {
        let (_, columns) = screen::size();
        let picture = self.picture.draw(columns).unwrap_or_default();
        self.screen().draw(&picture, current)?;
        Ok(())
    }

    fn print_picture(&self) -> Result<()> {
        let picture = self.picture.draw(screen::DEFAULT_COLUMNS);
        let picture = picture.context("the picture does not fit 80 columns")?;
        self.screen()
            .print(&[&[String::new()], picture.as_slice()].concat())?;
        Ok(())
    }

    /// Says what was seen.
    fn explain(&self) -> Result<()> {
        let (_, columns) = screen::size();
        let flows = self.meter.as_ref().context("nothing runs")?.flows()?;
        let guest = palette::inside().apply_to(GUEST_ADDRESS);
        let host = palette::outside().apply_to(HOST_ADDRESS);
        let program = as_typed(
            &self
                .meter
                .as_ref()
                .context("nothing runs")?
                .instance
                .program,
        );
        let mut lines = vec![String::new()];
        if self.picture.draw(columns).is_none() {
            lines.push(format!(
                "({columns} columns are too few for the picture of the network)\n"
            ));
        }
        let title = "The sessions, which `tapnat flows` shows too:";
        lines.push(style(title).bold().to_string());
        lines.extend(flows::table(&flows, columns));
        lines.push(String::new());
        for text in [
            format!(
                "tap0 is the host's end of the guest's network cable. tapnat sits on tap0 and on \
                 uplink0: it gave every packet from {guest} the address {host}, and turned every \
                 answer back. The world never saw {guest}. iptables and nftables had no part in \
                 it: their rules are as they were, and were not asked."
            ),
            format!("For guests of your own: {program} run --inside tap0=10.0.0.1/24"),
        ] {
            let wrapped = textwrap::wrap(&text, columns.min(screen::DEFAULT_COLUMNS - 1));
            lines.extend(wrapped.into_iter().map(Cow::into_owned));
        }
        lines.push(String::new());
        self.screen().print(&lines)?;
        Ok(())
    }

    /// Whether all steps went well.
    fn verdict(&self) -> Result<()> {
        if self.failures == 0 {
            return Ok(());
        }
        let reasons: Vec<_> = self
            .readings
            .dropped
            .iter()
            .map(|(reason, packets)| format!("{reason} {packets}"))
            .collect();
        let reasons = if reasons.is_empty() {
            "nothing".to_owned()
        } else {
            reasons.join(", ")
        };
        bail!(
            "{} of the steps failed; tapnat dropped {reasons}",
            self.failures
        )
    }

    fn screen(&self) -> MutexGuard<'_, Screen> {
        lock(&self.screen)
    }
}

/// Whom a device of the host is towards.
#[derive(Clone, Copy)]
enum Side {
    Guest,
    World,
}

/// What passed through a device, to the world and to the guest, below a blank line.
fn traffic_lines(to_world: Traffic, to_guest: Traffic, side: Side) -> Vec<String> {
    let mut lines = vec![String::new()];
    for (arrow, traffic) in [(outward(), to_world), (inward(), to_guest)] {
        let packets = format!("{} packets", units::count(traffic.packets));
        let bytes = units::bytes(traffic.bytes);
        lines.extend(match side {
            Side::Guest => [format!("{arrow} {packets}"), format!("  {bytes}")],
            Side::World => [format!("{packets} {arrow}"), format!("{bytes}  ")],
        });
    }
    lines
}

/// A step that has ended, on one line.
fn step_line(name: &str, outcome: &Result<String>) -> String {
    match outcome {
        Ok(detail) => {
            let sign = style("✓").green();
            format!("{sign} {name:NAMES$}  {detail}")
                .trim_end()
                .to_owned()
        }
        Err(error) => {
            let sign = style("✗").red();
            format!("{sign} {name:NAMES$}  {}", first_line(error))
        }
    }
}

fn first_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}
