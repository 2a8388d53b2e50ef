//! System calls that fail, and a process that is killed at any of them: what is said is true,
//! what is left can be taken away, and guests' flows go on.

use std::{env, fs, net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tapnat_testbed::{
    process::{Output, Process},
    snapshot::Snapshot,
    topology::{Inside, Topology, WORLD_ADDRESSES},
    traffic::{self, UdpReflector},
};
use tapnat_tests::{
    faults::{Step, Trace, ends_of_each_kind},
    instance::{Instance, PATIENCE},
};

/// The guest's veth, and a tap that is to be created.
const BOTH: [&str; 4] = [
    "--inside",
    "veth0=10.0.0.1/24",
    "--inside",
    "tap9=10.0.9.1/24",
];

const FORWARDING: &str = "net.ipv4.conf.veth0.forwarding";

/// Where a kernel parameter of a device is written.
fn forwarding_of(device: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{device}/forwarding")
}

/// A host, and what it looks like without an instance.
struct Bed {
    // The instance goes before its host.
    instance: Instance,
    world: Topology,
    before: Snapshot,
}

impl Bed {
    fn new() -> Result<Self> {
        let world = Topology::builder().inside(Inside::Veth).build()?;
        let instance = Instance::new(&world.host);
        Ok(Self {
            before: Snapshot::take(&world.host, &instance.pins())?,
            instance,
            world,
        })
    }

    fn is_as_before(&self) -> Result<()> {
        let after = Snapshot::take(&self.world.host, &self.instance.pins())?;
        if let Some(difference) = self.before.difference(&after) {
            bail!("the host is not as it was:\n{difference}");
        }
        for path in [self.instance.pins(), self.instance.run_directory()] {
            ensure!(!path.exists(), "{} is still there", path.display());
        }
        Ok(())
    }

    fn run_under(&self, wrapper: &[String]) -> Result<Process> {
        self.instance
            .command_under(wrapper, "run")?
            .args(BOTH)
            .spawn()
    }

    /// The steps of a start, and of the end after it.
    fn record(&self) -> Result<[Vec<Step>; 2]> {
        let trace = Trace::new();
        let mut process = self.run_under(&trace.recorder())?;
        process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
        let start = trace.steps()?.len();
        ensure!(
            process.terminate(PATIENCE)?.success(),
            "{}",
            process.stderr()
        );
        let mut steps = trace.steps()?;
        // What it did after it had said so, before it was told to end.
        let is_end = |step: &Step| step.line.contains("/control\") = 0");
        let end = steps.iter().rposition(is_end).context("it did not end")?;
        let end = steps.split_off(end);
        steps.truncate(start);
        // Before that, it was loaded.
        let is_begin = |step: &Step| step.line.contains("\"/run/tapnat\"");
        let begin = steps.iter().position(is_begin).context("nothing began")?;
        Ok([steps.split_off(begin), end])
    }

    /// That it is ready is true.
    fn works(&self) -> Result<()> {
        let guest = &self.world.guests[0].namespace;
        let ping = traffic::ping(guest, WORLD_ADDRESSES[0].into(), 1, &["-W", "10"])?;
        ensure!(ping.received == 1, "no way out: {}", ping.output);
        let status = self.instance.ask_json("status")?;
        let devices = status["devices"].as_array().map(Vec::len);
        ensure!(devices == Some(3), "{status}");
        let reserved = self
            .world
            .host
            .read_sysctl("net.ipv4.ip_local_reserved_ports")?;
        ensure!(reserved.trim() == "36864-60999", "{reserved}");
        Ok(())
    }

    /// Runs an instance that serves veths when they come, under this wrapper, and waits until it is
    /// ready.
    fn serve_veths_under(&self, wrapper: &[String]) -> Result<Process> {
        let command = self.instance.command_under(wrapper, "run")?;
        let mut process = command.args(["--inside", "veth*=10.0.0.1/24"]).spawn()?;
        process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
        Ok(process)
    }

    /// Makes the guest's veth a bridge's, and waits until nothing of the instance's is left on it.
    fn is_let_go(&self) -> Result<()> {
        let host = &self.world.host;
        host.ip("link add br9 type bridge")?;
        host.ip("link set veth0 master br9")?;
        self.instance.until(|_| {
            let left = host.ip("-brief address show dev veth0");
            let value = host.read_sysctl(FORWARDING);
            left.is_ok_and(|left| !left.contains("10.0.0.1"))
                && value.is_ok_and(|value| value == "0")
        })
    }

    fn down(&self) -> Result<()> {
        self.instance.ask("down", &[])?;
        self.is_as_before()
    }
}

/// What differs for others, without most of the journal's many lives.
fn steps_that_matter(steps: &[Step]) -> Vec<Step> {
    let ends = ends_of_each_kind(steps);
    steps
        .iter()
        .filter(|step| step.changes_something())
        .filter(|step| !matches!(step.call.as_str(), "openat" | "write") || ends.contains(step))
        .cloned()
        .collect()
}

/// All of them where there is time, and else some.
fn sample(steps: Vec<Step>) -> impl Iterator<Item = Step> {
    let one_in = if env::var_os("TAPNAT_FAULTS").is_some() {
        1
    } else {
        10
    };
    steps.into_iter().step_by(one_in)
}

/// It may not come to the step, as others make and remove directories, too: then it is killed when
/// it is ready.
fn until_killed(process: &mut Process) -> Result<()> {
    let ready = process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"));
    if ready.is_ok() && process.is_running() {
        process.signal(Signal::SIGKILL)?;
    }
    process.wait(PATIENCE).map(drop)
}

#[test]
fn a_start_that_is_killed_at_any_step_is_taken_back() -> Result<()> {
    let bed = Bed::new()?;
    let [start, _] = bed.record()?;
    for step in sample(steps_that_matter(&start)) {
        let trace = Trace::new();
        let mut process = bed.run_under(&trace.killer(&step))?;
        until_killed(&mut process)?;
        bed.down()
            .with_context(|| format!("killed at {}", step.line))?;
    }
    Ok(())
}

#[test]
fn an_end_that_is_killed_at_any_step_is_finished() -> Result<()> {
    let bed = Bed::new()?;
    let [_, end] = bed.record()?;
    // One table is as good as another.
    let mut pins = 0;
    let mut steps = steps_that_matter(&end);
    steps.retain(|step| {
        let is_pin = step.call == "unlinkat" && !step.line.contains("AT_REMOVEDIR");
        pins += usize::from(is_pin);
        !is_pin || pins % 8 == 1
    });
    for step in sample(steps) {
        let trace = Trace::new();
        let mut process = bed.run_under(&trace.killer(&step))?;
        // Calls of other threads move the step, at worst into the start.
        let ready = process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"));
        if ready.is_ok() {
            process.terminate(PATIENCE)?;
        } else {
            process.wait(PATIENCE)?;
        }
        bed.down()
            .with_context(|| format!("killed at {}", step.line))?;
    }
    Ok(())
}

/// A flow of the guest's, which must go on as it is.
struct Flow {
    socket: std::net::UdpSocket,
    mirror: UdpReflector,
    seen: SocketAddr,
}

impl Flow {
    fn begin(world: &Topology) -> Result<Self> {
        let mirror = UdpReflector::start(&world.world, (WORLD_ADDRESSES[0], 7).into())?;
        let guest = &world.guests[0];
        let socket = traffic::udp_socket(&guest.namespace, (guest.address, 40_000).into())?;
        let seen = traffic::reflect_udp(&socket, mirror.address(), b"begin")?;
        Ok(Self {
            socket,
            mirror,
            seen,
        })
    }

    fn goes_on(&self) -> Result<()> {
        let seen = traffic::reflect_udp(&self.socket, self.mirror.address(), b"go on")?;
        ensure!(seen == self.seen, "from {seen}, no longer {}", self.seen);
        Ok(())
    }
}

#[test]
fn flows_outlive_a_next_start_that_is_killed_at_any_step() -> Result<()> {
    let bed = Bed::new()?;
    let mut process = bed.instance.start(&BOTH)?;
    let flow = Flow::begin(&bed.world)?;
    let kill = |process: &mut Process| -> Result<()> {
        process.signal(Signal::SIGKILL)?;
        process.wait(PATIENCE).map(drop)
    };
    kill(&mut process)?;
    let trace = Trace::new();
    let mut process = bed.run_under(&trace.recorder())?;
    process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"))?;
    kill(&mut process)?;
    for step in sample(steps_that_matter(&trace.steps()?)) {
        let trace = Trace::new();
        let mut process = bed.run_under(&trace.killer(&step))?;
        let mut check = || {
            until_killed(&mut process)?;
            flow.goes_on().context("without a process")?;
            kill(&mut bed.instance.start(&BOTH)?)?;
            flow.goes_on().context("with the next process")
        };
        check().with_context(|| format!("killed at {}", step.line))?;
    }
    bed.down()
}

#[test]
fn what_cannot_be_taken_from_a_device_at_first_is_taken_later() -> Result<()> {
    let bed = Bed::new()?;
    let trace = Trace::new();
    // It is read and written at the start.
    let wrapper = trace.locker(&forwarding_of("veth0"), "3");
    let process = bed.serve_veths_under(&wrapper)?;
    bed.is_let_go()?;
    let said = process.stderr();
    ensure!(said.contains("cannot take everything away"), "{said}");
    Ok(())
}

#[test]
fn a_device_that_cannot_be_let_in_keeps_no_other_from_being_let_go() -> Result<()> {
    let bed = Bed::new()?;
    let trace = Trace::new();
    let wrapper = trace.locker(&forwarding_of("veth7"), "1+");
    let mut process = bed.serve_veths_under(&wrapper)?;
    bed.world
        .host
        .ip("link add veth7 type veth peer name vethx")?;
    process.wait_for_error_line(PATIENCE, |line| {
        line.contains("no routes are told for what arrives on veth7")
    })?;
    bed.is_let_go()
}

#[test]
fn a_start_whose_calls_fail_works_or_says_why_and_leaves_nothing() -> Result<()> {
    let bed = Bed::new()?;
    let [start, _] = bed.record()?;
    let mut wrong = Vec::new();
    for step in sample(ends_of_each_kind(&start)) {
        let trace = Trace::new();
        let mut process = bed.run_under(&trace.breaker(&step, false))?;
        let outcome = outcome(&bed, &mut process);
        println!("{}: {}: {outcome:?}", step.error(), step.line);
        if let Err(error) = outcome {
            wrong.push(format!("{} at {}: {error:#}", step.error(), step.line));
            drop(process);
            bed.down()?;
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// What came of a start in which something failed: an instance that works, or a refusal. Nothing
/// is left of it, or nothing that `down` does not take away.
fn outcome(bed: &Bed, process: &mut Process) -> Result<String> {
    let ready = process.wait_for_line(PATIENCE, |line| line.starts_with("tapnat ready"));
    let code = if ready.is_ok() {
        bed.works().with_context(|| process.stderr())?;
        process.terminate(PATIENCE)?.code()
    } else {
        process.wait(PATIENCE)?.code()
    };
    let said = process.stderr();
    let is_ours = |line: &str| line.starts_with("tapnat: ");
    ensure!(said.lines().all(is_ours), "{said}");
    // Calls of other threads move the step, at worst from the end of the start to the end.
    if ready.is_ok() && code == Some(1) {
        ensure!(!said.is_empty(), "it ended with 1 and said nothing");
        bed.down()?;
        return Ok(said);
    }
    ensure!(code == Some(i32::from(ready.is_err())), "{code:?}: {said}");
    bed.is_as_before().with_context(|| said.clone())?;
    Ok(said)
}

/// A running instance with a configuration file, and a flow.
struct Running {
    // The instance goes before its host.
    bed: Bed,
    process: Process,
    flow: Flow,
    file: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

impl Running {
    fn new(file: &str) -> Result<Self> {
        let bed = Bed::new()?;
        let path = env::temp_dir().join(format!("{}.toml", bed.instance.name()));
        fs::write(&path, file)?;
        let name = path.to_str().context("a strange directory")?;
        let process = bed.instance.start(&["--config", name])?;
        Ok(Self {
            flow: Flow::begin(&bed.world)?,
            bed,
            process,
            file: path,
        })
    }

    /// What a reload can change.
    fn state(&self) -> Result<Value> {
        let status = self.bed.instance.ask_json("status")?;
        let forwards = self.bed.instance.ask("forward", &["list", "--json"])?;
        let reserved = self.bed.world.host.read_sysctl(RESERVED)?;
        Ok(json!([
            status["timeouts"],
            status["filtering"],
            status["policy"],
            status["guest_max_ports"],
            serde_json::from_str::<Value>(&forwards)?,
            reserved,
        ]))
    }

    fn reload(&self, text: &str) -> Result<Output> {
        fs::write(&self.file, text)?;
        self.bed.instance.command("reload")?.output()
    }
}

const RESERVED: &str = "net.ipv4.ip_local_reserved_ports";
const ONE: &str = "inside = \"veth0=10.0.0.1/24\"\n";
const OTHER: &str = "inside = \"veth0=10.0.0.1/24\"\nudp-timeout = \"10m\"\nports = \"1024-65000\"\n\
    deny = [\"192.0.2.0/24\"]\nguest-max-ports = 70\nfiltering = \"endpoint-independent\"\n\
    [[forward]]\nprotocol = \"tcp\"\nport = 8080\nto = \"10.0.0.10:80\"\n";

#[test]
fn a_reload_whose_calls_fail_is_applied_as_a_whole_or_not_at_all() -> Result<()> {
    let running = Running::new(ONE)?;
    let process = running.process.id();
    let one = running.state()?;
    let trace = Trace::new();
    let mut strace = trace.record(process)?;
    let output = running.reload(OTHER)?;
    strace.terminate(PATIENCE)?;
    ensure!(output.status.success(), "{output:?}");
    let other = running.state()?;
    ensure!(one != other, "nothing is different: {one}");

    let mut wrong = Vec::new();
    for step in sample(ends_of_each_kind(&trace.steps()?)) {
        let trace = Trace::new();
        let back = running.reload(ONE)?;
        ensure!(back.status.success(), "{back:?}");
        ensure!(running.state()? == one, "not back: {}", running.state()?);
        let mut strace = trace.break_step(process, &step)?;
        let output = running.reload(OTHER)?;
        strace.terminate(PATIENCE)?;
        println!("{}: {}: {output:?}", step.error(), step.line);
        let check = || {
            let state = running.state()?;
            if output.status.success() {
                ensure!(state == other, "applied, and is {state}");
            } else if output.stderr.contains("nothing was applied") {
                ensure!(state == one, "not applied, and is {state}, not {one}");
            } else {
                // Whoever asked was not told, or not heard.
                ensure!(state == one || state == other, "half applied: {state}");
            }
            running.flow.goes_on()
        };
        if let Err(error) = check() {
            wrong.push(format!(
                "{} at {}: {output:?} {error:#}",
                step.error(),
                step.line
            ));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
