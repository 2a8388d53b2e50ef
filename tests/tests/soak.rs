//! Everything at once, for a while: guests transfer, begin and end flows while
//! the instance is reloaded, killed, taken over and replaced, and its network
//! comes and goes. Not one byte is wrong, not one flow is lost, and nothing grows.
//!
//! `cargo xtask soak --minutes N` runs it for longer, and prints what each fault
//! cost.

use std::{
    env, fs,
    io::{self, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tapnat_testbed::{
    Namespace,
    process::Process,
    topology::{GATEWAY, HOST_ADDRESS, Topology},
    traffic::{self, TcpReflector, TcpSession, UdpReflector},
};
use tapnat_tests::{
    instance::{Instance, PATIENCE, size},
    world::server,
};

/// For so many minutes; without it each fault comes once.
const MINUTES: &str = "TAPNAT_SOAK_MINUTES";
const GUESTS: u8 = 2;
/// Between two probes of one guest.
const PACE: Duration = Duration::from_millis(2);
/// How long traffic goes on after a fault before the next one.
const SETTLE: Duration = Duration::from_millis(700);
/// What a process may grow by without being said to leak: the allocator's rests.
const SLACK_KIB: u64 = 3072;

/// What is done to the instance or its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Nothing,
    Reload,
    Forward,
    Kill,
    TakeOver,
    Upgrade,
    Restart,
    AddressBack,
    UplinkDown,
    RouteChange,
    NewNeighbour,
}

use Fault::{
    AddressBack, Forward, Kill, NewNeighbour, Nothing, Reload, Restart, RouteChange, TakeOver,
    Upgrade, UplinkDown,
};

const FAULTS: [Fault; 11] = [
    Nothing,
    Reload,
    Forward,
    Kill,
    TakeOver,
    Upgrade,
    Restart,
    AddressBack,
    UplinkDown,
    RouteChange,
    NewNeighbour,
];

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Nothing => "nothing",
            Reload => "reload with other timeouts",
            Forward => "a forward is made and taken away",
            Kill => "SIGKILL",
            TakeOver => "the next run takes over",
            Upgrade => "SIGKILL, and a run with other programs takes over",
            Restart => "stop and start with --keep",
            AddressBack => "the uplink loses its address, and gets it back",
            UplinkDown => "the uplink goes down and up",
            RouteChange => "the default route is replaced",
            NewNeighbour => "the next hop gets another link address",
        }
    }

    /// Whether it must not cost a packet.
    fn is_free(self) -> bool {
        !matches!(self, AddressBack | UplinkDown | NewNeighbour)
    }
}

/// What came of the traffic.
#[derive(Default)]
struct Score {
    stop: AtomicBool,
    /// The number of the fault that is in effect.
    fault: AtomicUsize,
    sent: [AtomicU64; FAULTS.len()],
    answered: [AtomicU64; FAULTS.len()],
    bytes: AtomicU64,
    begun: AtomicU64,
    /// What went wrong, which nothing must.
    wrong: Mutex<Vec<String>>,
}

impl Score {
    fn is_over(&self) -> bool {
        self.stop.load(Relaxed)
    }

    fn complain(&self, what: &str, result: Result<()>) {
        if let Err(error) = result {
            let fault = FAULTS[self.fault.load(Relaxed)].name();
            let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
            wrong.push(format!("{what} ({fault}): {error:#}"));
        }
    }
}

/// Who runs the instance, and does things to it.
struct Operator<'a> {
    topology: &'a Topology,
    instance: Instance,
    process: Option<Process>,
    file: PathBuf,
    rounds: u32,
    /// Whether sessions are counted: by other programs than if not.
    counts: bool,
}

impl Drop for Operator<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

impl<'a> Operator<'a> {
    fn new(topology: &'a Topology) -> Result<Self> {
        let instance = Instance::new(&topology.host);
        let mut operator = Self {
            topology,
            process: None,
            file: env::temp_dir().join(format!("{}.toml", instance.name())),
            instance,
            rounds: 0,
            counts: false,
        };
        operator.configure()?;
        operator.start()?;
        Ok(operator)
    }

    /// Writes the file, which is another one each time.
    fn configure(&mut self) -> Result<()> {
        self.rounds += 1;
        let text = format!(
            "inside = {:?}\nkeep = true\ncount = {}\nudp-timeout = {}\nport-rest = 1\n\
             tcp-opening-timeout = 10\ntcp-closing-timeout = 5\nsweep-interval = 1\n",
            self.topology.inside(),
            self.counts,
            8 + self.rounds % 5,
        );
        fs::write(&self.file, text).context("cannot write the configuration")
    }

    fn start(&mut self) -> Result<()> {
        let path = Path::to_str(&self.file).context("a strange directory")?;
        self.process = Some(self.instance.start(&["--config", path])?);
        Ok(())
    }

    fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().context("no process runs")
    }

    fn kill(&mut self) -> Result<()> {
        let process = self.process()?;
        process.signal(Signal::SIGKILL)?;
        process.wait(PATIENCE)?;
        Ok(())
    }

    fn strike(&mut self, fault: Fault) -> Result<()> {
        let host = &self.topology.host;
        let back = format!("route replace default via {GATEWAY} dev uplink0");
        match fault {
            Nothing => {}
            Reload => {
                self.configure()?;
                self.instance.ask("reload", &[])?;
            }
            Forward => {
                // No guest's connections are given a port as low as that.
                self.instance
                    .ask("forward", &["add", "tcp", "80", "10.0.0.10:80"])?;
                self.instance.ask("forward", &["remove", "tcp", "80"])?;
            }
            Kill => self.kill()?,
            TakeOver => self.start()?,
            Upgrade => {
                self.kill()?;
                self.counts = !self.counts;
                self.configure()?;
                self.start()?;
            }
            Restart => {
                let status = self.process()?.terminate(PATIENCE)?;
                ensure!(status.success(), "{status}");
                self.start()?;
            }
            AddressBack => {
                host.ip("address flush dev uplink0")?;
                thread::sleep(Duration::from_millis(200));
                host.ip(&format!("address add {HOST_ADDRESS}/24 dev uplink0"))?;
                host.ip(&back)?;
            }
            UplinkDown => {
                host.ip("link set uplink0 down")?;
                host.ip("link set uplink0 up")?;
                host.wait_for_carrier("uplink0")?;
                host.ip(&back)?;
            }
            RouteChange => {
                host.ip(&format!("{back} mtu 1500"))?;
                host.ip(&back)?;
            }
            NewNeighbour => {
                self.rounds += 1;
                let last = 10 + self.rounds % 200;
                self.topology.world.ip(&format!(
                    "link set downlink0 address 02:00:00:00:00:{last:02x}"
                ))?;
                // Whoever takes an address over announces it.
                host.ip(&format!(
                    "neighbour replace {GATEWAY} lladdr 02:00:00:00:00:{last:02x} dev uplink0"
                ))?;
            }
        }
        Ok(())
    }
}

/// What guests send, and to whom.
struct Traffic<'a> {
    topology: &'a Topology,
    udp: UdpReflector,
    tcp: TcpReflector,
    /// Where connections are forgotten when they are over, as there are many.
    brief: SocketAddr,
}

impl<'a> Traffic<'a> {
    fn new(topology: &'a Topology) -> Result<Self> {
        Ok(Self {
            topology,
            udp: UdpReflector::start(&topology.world, server(0, 7))?,
            tcp: TcpReflector::start(&topology.world, server(1, 7))?,
            brief: serve_briefly(&topology.world)?,
        })
    }

    /// Transfers over one connection for as long as it all lasts.
    fn transfer(&self, guest: usize, score: &Score) -> Result<()> {
        let guest = &self.topology.guests[guest].namespace;
        let mut session = TcpSession::open(guest, None, self.tcp.address())?;
        let payload = traffic::pattern(200_000);
        let mut round = 0;
        while !score.is_over() {
            round += 1;
            let part = &payload[..=(round * 7919) % (payload.len() - 1)];
            session.exchange(part)?;
            score.bytes.fetch_add(part.len() as u64, Relaxed);
            // The instance has to get at a processor, too.
            thread::sleep(PACE);
        }
        Ok(())
    }

    /// Begins and ends flows.
    fn churn(&self, guest: usize, score: &Score) -> Result<()> {
        let guest = &self.topology.guests[guest];
        let local = SocketAddr::new(guest.address.into(), 0);
        while !score.is_over() {
            let before = FAULTS[score.fault.load(Relaxed)];
            let begin = || -> Result<()> {
                let socket = traffic::udp_socket(&guest.namespace, local)?;
                traffic::reflect_udp(&socket, self.udp.address(), &traffic::pattern(700))?;
                TcpSession::open(&guest.namespace, None, self.brief)?
                    .exchange(&traffic::pattern(30_000))
            };
            let result = begin();
            let after = FAULTS[score.fault.load(Relaxed)];
            match result {
                Ok(()) => score.begun.fetch_add(2, Relaxed),
                // Without a way nothing begins.
                Err(_) if !(before.is_free() && after.is_free()) => 0,
                Err(error) => return Err(error),
            };
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Sends datagrams in one flow, and counts the answers, by the fault in which
    /// they were sent.
    fn probe(&self, guest: usize, score: &Score) -> Result<()> {
        let guest = &self.topology.guests[guest];
        let local = SocketAddr::new(guest.address.into(), 40_000);
        let socket = traffic::udp_socket(&guest.namespace, local)?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let receiver = socket.try_clone()?;
        thread::scope(|scope| {
            scope.spawn(|| count_answers(&receiver, score));
            while !score.is_over() {
                let fault = score.fault.load(Relaxed);
                let mark = [u8::try_from(fault).unwrap_or(u8::MAX)];
                // What cannot even be sent is lost, too.
                let _ = socket.send_to(&mark, self.udp.address());
                score.sent[fault].fetch_add(1, Relaxed);
                thread::sleep(PACE);
            }
        });
        Ok(())
    }
}

/// A server as [`TcpReflector`], which keeps nothing, until the program ends.
fn serve_briefly(world: &Namespace) -> Result<SocketAddr> {
    let listener = traffic::tcp_listener(world, server(1, 8))?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Whoever hears nothing complains.
            thread::spawn(move || reflect(&stream));
        }
    });
    Ok(address)
}

fn reflect(stream: &TcpStream) -> io::Result<u64> {
    let (mut reader, mut writer) = (stream, stream);
    writeln!(writer, "{}", stream.peer_addr()?)?;
    io::copy(&mut reader, &mut writer)
}

fn count_answers(socket: &UdpSocket, score: &Score) {
    let mut buffer = [0; 128];
    let mut over_since: Option<Instant> = None;
    loop {
        if let Ok(length) = socket.recv(&mut buffer) {
            // The seen endpoint and a line feed stand before what was sent.
            if let Some(fault) = buffer[..length].last()
                && let Some(answered) = score.answered.get(usize::from(*fault))
            {
                answered.fetch_add(1, Relaxed);
            }
        }
        if score.is_over() {
            let since = *over_since.get_or_insert_with(Instant::now);
            if since.elapsed() > Duration::from_millis(500) {
                return;
            }
        }
    }
}

/// Strikes until the time is over, and each fault once at least. Returns how often
/// all of them came, and what the process was like after the first time.
fn strike_all(
    operator: &mut Operator,
    score: &Score,
    length: Option<Duration>,
) -> Result<(u32, (u64, usize))> {
    let start = Instant::now();
    let mut times = 0;
    let mut first = None;
    loop {
        for (number, fault) in FAULTS.into_iter().enumerate() {
            score.fault.store(number, Relaxed);
            operator
                .strike(fault)
                .with_context(|| fault.name().to_owned())?;
            thread::sleep(SETTLE);
        }
        // What is still under way belongs to what was before.
        score.fault.store(0, Relaxed);
        times += 1;
        let now = size(operator.process()?.id())?;
        first.get_or_insert(now);
        if length.is_none_or(|length| start.elapsed() >= length) {
            return Ok((times, first.unwrap_or(now)));
        }
    }
}

/// A table for people, and for docs/reliability.md.
fn table(score: &Score, times: u32) -> String {
    let mut lines = vec![format!(
        "{:<52} {:>6} {:>8} {:>6}",
        "fault", "times", "packets", "lost"
    )];
    for (number, fault) in FAULTS.into_iter().enumerate() {
        let sent = score.sent[number].load(Relaxed);
        let lost = sent.saturating_sub(score.answered[number].load(Relaxed));
        lines.push(format!(
            "{:<52} {times:>6} {sent:>8} {lost:>6}",
            fault.name()
        ));
    }
    lines.push(format!(
        "{} bytes there and back, {} flows begun",
        score.bytes.load(Relaxed),
        score.begun.load(Relaxed)
    ));
    lines.join("\n")
}

#[test]
fn nothing_is_lost_and_nothing_grows() -> Result<()> {
    let minutes: Option<f64> = env::var(MINUTES).ok().and_then(|text| text.parse().ok());
    let length = minutes.map(|minutes| Duration::from_secs_f64(minutes * 60.0));
    let topology = Topology::builder().guests(GUESTS).build()?;
    let mut operator = Operator::new(&topology)?;
    let traffic = Traffic::new(&topology)?;
    let score = Score::default();
    let struck = thread::scope(|scope| {
        for guest in 0..usize::from(GUESTS) {
            let (traffic, score) = (&traffic, &score);
            scope.spawn(move || score.complain("a transfer", traffic.transfer(guest, score)));
            scope.spawn(move || score.complain("new flows", traffic.churn(guest, score)));
            scope.spawn(move || score.complain("probes", traffic.probe(guest, score)));
        }
        let struck = strike_all(&mut operator, &score, length);
        score.stop.store(true, Relaxed);
        struck
    });
    let (times, first) = struck?;
    println!("{}", table(&score, times));
    let wrong = score
        .wrong
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    // What became of the packets tells why.
    let status = operator.instance.ask("status", &[])?;
    ensure!(wrong.is_empty(), "{}\n{status}", wrong.join("\n"));
    for (number, fault) in FAULTS.into_iter().enumerate() {
        let (sent, answered) = (&score.sent[number], &score.answered[number]);
        let lost = sent.load(Relaxed).saturating_sub(answered.load(Relaxed));
        ensure!(
            lost == 0 || !fault.is_free(),
            "{}: {lost} lost\n{status}",
            fault.name()
        );
        ensure!(answered.load(Relaxed) > 0, "{}: no answers", fault.name());
    }
    let last = size(operator.process()?.id())?;
    ensure!(
        last.1 <= first.1,
        "descriptors: {} became {}",
        first.1,
        last.1
    );
    ensure!(
        last.0 <= first.0 + SLACK_KIB,
        "memory: {} KiB became {} KiB",
        first.0,
        last.0
    );
    // With the flows go their entries.
    operator.instance.until(|status| {
        ["sessions", "mappings"]
            .iter()
            .all(|table| status["tables"][table]["used"] == 0)
    })?;
    operator.instance.ask("down", &[])?;
    ensure!(!operator.instance.pins().exists(), "pins are left");
    Ok(())
}
