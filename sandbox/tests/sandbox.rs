//! The sandbox as it is started: with a guest of each kind, interrupted, and with a tapnat that does
//! not work. Needs root, QEMU and the guest kernel.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like the tests"
)]

use std::{env, ffi::OsString, fs, thread, time::Duration};

use nix::sys::signal::Signal;
use tapnat_testbed::process::{Command, Process};

/// How long all of it may take on a busy machine.
const PATIENCE: Duration = Duration::from_mins(3);
const PROOF: &str = "✓ no namespace, device, process, pin or file of the sandbox is left";

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test`"))
}

fn sandbox() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tapnat-sandbox"))
        .timeout(PATIENCE)
        .grace(Duration::from_secs(10))
}

/// Whether anything has this process's number in its name where the sandbox puts things.
fn is_anything_left(process: u32) -> bool {
    let marks = [format!("tapnat-{process}-"), format!("sandbox-{process}")];
    ["/run/netns", "/run/tapnat", "/sys/fs/bpf/tapnat"]
        .into_iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .any(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            marks.iter().any(|mark| name.starts_with(mark))
        })
}

/// Runs it to its end, which is to be a good one, and returns what it printed.
fn run(command: Command) -> String {
    let mut process = command.spawn().unwrap();
    let status = process.wait(PATIENCE).unwrap();
    let printed = process.stdout();
    assert!(status.success(), "{printed}{}", process.stderr());
    assert!(printed.trim_end().ends_with(PROOF), "{printed}");
    assert!(!is_anything_left(process.id()));
    printed
}

/// The guest's bulk transfers are in both pictures of the network: the devices' counters and the
/// sessions.
fn check(printed: &str) {
    for part in [
        "┤ tapnat ├",
        "10.0.0.10/24",
        "198.51.100.2/24",
        "the server saw 198.51.100.2:",
        "5 of 5 answered",
        "6 sessions",
        ", 0 dropped",
    ] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    assert!(!printed.contains('\x1b'), "escapes in a pipe: {printed}");
    let is_session =
        |line: &&str| line.contains("  10.0.0.10:") && line.contains("  198.51.100.2:");
    assert_eq!(printed.lines().filter(is_session).count(), 6, "{printed}");
    assert!(
        printed.lines().all(|line| line.chars().count() <= 80),
        "{printed}"
    );
}

#[test]
fn a_guest_in_a_namespace() {
    check(&run(sandbox().arg("--tapnat").arg(variable("TAPNAT_BIN"))));
}

#[test]
fn a_guest_in_qemu() {
    let kernel = variable("TAPNAT_GUEST_KERNEL");
    let printed = run(sandbox()
        .arg("--tapnat")
        .arg(variable("TAPNAT_BIN"))
        .arg("--qemu")
        .arg(kernel));
    check(&printed);
    assert!(printed.contains("a guest boots in QEMU"), "{printed}");
}

fn interrupt(process: &mut Process, signal: Signal) {
    process.signal(signal).unwrap();
    let status = process.wait(PATIENCE).unwrap();
    assert_eq!(status.code(), None, "not ended by the signal");
    let printed = process.stdout();
    assert!(printed.contains("Interrupted"), "{printed}");
    assert!(printed.trim_end().ends_with(PROOF), "{printed}");
    assert!(!is_anything_left(process.id()));
}

#[test]
fn interrupted_it_takes_everything_away() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let command = || sandbox().arg("--tapnat").arg(variable("TAPNAT_BIN"));
        // While tapnat starts.
        let mut process = command().spawn().unwrap();
        process
            .wait_for_line(PATIENCE, |line| line.contains("a guest, a host"))
            .unwrap();
        thread::sleep(Duration::from_millis(200));
        interrupt(&mut process, signal);
        // While there is traffic.
        let mut process = command().spawn().unwrap();
        process
            .wait_for_line(PATIENCE, |line| line.contains("curl"))
            .unwrap();
        interrupt(&mut process, signal);
    }
}

#[test]
fn what_does_not_work_shows_in_the_exit_code() {
    let output = sandbox().args(["--tapnat", "/bin/false"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.contains("✗ tapnat run"), "{}", output.stdout);
    assert!(
        output.stdout.trim_end().ends_with(PROOF),
        "{}",
        output.stdout
    );
    assert!(output.stderr.starts_with("error: "), "{}", output.stderr);
}
