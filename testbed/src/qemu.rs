//! Real guests in QEMU, emulated in software: a Debian kernel, a file system
//! of busybox and a few programs, and a shell that the test drives over a
//! second serial port.
//!
//! Emulation says whether things work and whether sizes and checksums are
//! right; it says nothing about speed. The kernel is fetched and unpacked by
//! someone else (`cargo xtask setup`).

use std::{
    env,
    fmt::Write as _,
    fs::{self, Permissions},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

use crate::{
    Namespace,
    cleanup::{self, Leftover, Registration},
    namespace,
    process::{Command, Process},
};

mod initramfs;

use initramfs::Initramfs;

/// From start to a shell; 4 to 6 seconds are usual.
const BOOT_TIMEOUT: Duration = Duration::from_mins(1);
/// Becomes a user without privileges, who can open the device of taps as everybody can where udev
/// runs.
const UNPRIVILEGED: &str = r#"
device=$1 user=$2
shift 2
[ -e "$device" ] || mknod --mode=666 "$device" c 10 200
mount --bind "$device" /dev/net/tun
exec setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs --bounding-set=-all "$@"
"#;
/// How long a command in the guest may take unless the caller says otherwise.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);
/// What the serial line may take on top of the command's own time.
const LINE_PATIENCE: Duration = Duration::from_secs(15);

/// A kernel to boot, unpacked from its package.
#[derive(Debug, Clone)]
pub struct Kernel {
    image: PathBuf,
    /// What holds `lib/modules/RELEASE`.
    directory: PathBuf,
    release: String,
}

impl Kernel {
    /// Opens a directory that holds `vmlinux` (or any image that QEMU boots),
    /// `release` (the kernel's version) and `lib/modules/RELEASE` with a
    /// `modules.dep`.
    ///
    /// # Errors
    /// Something of that is missing.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self> {
        let directory = directory.into();
        let release = fs::read_to_string(directory.join("release")).with_context(|| {
            format!(
                "no guest kernel in {}: run `cargo xtask setup`",
                directory.display()
            )
        })?;
        let release = release.trim().to_owned();
        let image = directory.join("vmlinux");
        let modules = directory
            .join("lib/modules")
            .join(&release)
            .join("modules.dep");
        for file in [&image, &modules] {
            ensure!(file.is_file(), "the guest kernel lacks {}", file.display());
        }
        Ok(Self {
            image,
            directory,
            release,
        })
    }

    /// Opens the one that `cargo xtask setup` unpacked, or that in the
    /// directory named by `TAPNAT_GUEST_KERNEL`.
    ///
    /// # Errors
    /// Neither is there.
    pub fn installed() -> Result<Self> {
        let target = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest/kernel");
        Self::open(env::var_os("TAPNAT_GUEST_KERNEL").map_or_else(target, PathBuf::from))
    }

    /// The version, as `uname -r` says it in the guest.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }
}

/// What a guest boots from, for a QEMU that the test starts itself.
#[derive(Debug, Clone)]
pub struct Image {
    /// The uncompressed kernel.
    pub kernel: PathBuf,
    /// Its first file system.
    pub initramfs: PathBuf,
    /// Its command line: the console is the first serial port.
    pub command_line: String,
    /// The socket that the second serial port has to connect to.
    pub shell: PathBuf,
}

/// A network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// virtio-net, with segmentation and checksum offloads.
    Virtio,
    /// Realtek 8139C+.
    Rtl8139,
    /// NE2000 on PCI, with no offload whatsoever.
    Ne2k,
}

impl Model {
    fn device(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::Rtl8139 => "rtl8139",
            Self::Ne2k => "ne2k_pci",
        }
    }
}

/// A card on a tap of the host.
#[derive(Debug, Clone)]
struct Card {
    tap: String,
    model: Model,
    queues: u32,
}

/// A machine to start. In the guest its cards are `eth0`, `eth1` and so on.
#[derive(Debug, Clone)]
pub struct Machine {
    kernel: Kernel,
    cards: Vec<Card>,
    programs: Vec<PathBuf>,
    files: Vec<(PathBuf, PathBuf)>,
    modules: Vec<String>,
    memory: u32,
    processors: u32,
    ipv6: bool,
    user: Option<u32>,
}

impl Machine {
    /// A machine with 512 MB, one processor and no card; in it busybox, `curl`,
    /// `ip` and `iperf3`.
    #[must_use]
    pub fn new(kernel: Kernel) -> Self {
        let drivers = [
            "virtio_pci",
            "virtio_net",
            "8139cp",
            "8139too",
            "ne2k-pci",
            "af_packet",
        ];
        Self {
            kernel,
            cards: Vec::new(),
            programs: Vec::new(),
            files: Vec::new(),
            modules: drivers.map(str::to_owned).to_vec(),
            memory: 512,
            processors: 1,
            ipv6: false,
            user: None,
        }
    }

    /// Adds a card on a tap of the host's namespace.
    #[must_use]
    pub fn card(self, tap: &str, model: Model) -> Self {
        self.card_with_queues(tap, model, 1)
    }

    /// Adds a card with several queues. A tap that was made multi-queue takes
    /// only QEMUs that ask for at least two.
    #[must_use]
    pub fn card_with_queues(mut self, tap: &str, model: Model, queues: u32) -> Self {
        self.cards.push(Card {
            tap: tap.to_owned(),
            model,
            queues,
        });
        self
    }

    /// Puts a program of this machine under /bin, with its libraries.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.programs.push(program.into());
        self
    }

    /// Puts a file of this machine at an absolute path.
    #[must_use]
    pub fn file(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.files.push((from.into(), to.into()));
        self
    }

    /// Loads a module, and what it depends on, before the shell starts.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// Sets the memory in MB.
    #[must_use]
    pub fn memory(mut self, megabytes: u32) -> Self {
        self.memory = megabytes;
        self
    }

    /// Sets how many processors there are.
    #[must_use]
    pub fn processors(mut self, number: u32) -> Self {
        self.processors = number;
        self
    }

    /// Leaves IPv6 on in the guest.
    #[must_use]
    pub fn ipv6(mut self) -> Self {
        self.ipv6 = true;
        self
    }

    /// Runs QEMU as the user with this number, without any privilege.
    #[must_use]
    pub fn user(mut self, number: u32) -> Self {
        self.user = Some(number);
        self
    }

    /// Starts QEMU in the host's namespace and waits for the guest's shell,
    /// once more if it does not come in time.
    ///
    /// # Errors
    /// QEMU or a file is missing, QEMU refuses, or the guest does not boot;
    /// the error quotes the end of its console.
    pub fn boot(&self, host: &Namespace) -> Result<Guest> {
        self.boot_by(|image| self.command(host, image)?.spawn())
    }

    /// The same with a QEMU that somebody else starts: `start` returns the
    /// process that lives as long as that does.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_by(&self, start: impl Fn(&Image) -> Result<Process>) -> Result<Guest> {
        let directory = Directory::new()?;
        let image = Image {
            kernel: self.kernel.image.clone(),
            initramfs: directory.path.join("initramfs"),
            command_line: format!(
                "console=ttyS0 quiet panic=-1 net.ifnames=0 ipv6.disable={}",
                u8::from(!self.ipv6)
            ),
            shell: directory.path.join("shell"),
        };
        self.build_file_system()?.write(&image.initramfs)?;
        let started = match try_start(&image, &start) {
            Err(Failure::TimedOut(first)) => try_start(&image, &start).map_err(|error| {
                error
                    .into_inner()
                    .context(format!("twice; the first time: {first:#}"))
            }),
            result => result.map_err(Failure::into_inner),
        };
        let (process, shell) = started.context("the guest did not boot")?;
        Ok(Guest {
            shell,
            process,
            _directory: directory,
        })
    }

    fn build_file_system(&self) -> Result<Initramfs> {
        let mut initramfs = Initramfs::default();
        // curl because the wget of a static busybox dies in the C library.
        for program in ["busybox", "curl", "ip", "iperf3"] {
            initramfs.program(&find_program(program)?)?;
        }
        for program in &self.programs {
            initramfs.program(program)?;
        }
        for (from, to) in &self.files {
            initramfs.copy(from, to)?;
        }
        let modules = initramfs.modules(&self.kernel, &self.modules)?;
        let mut order = String::new();
        for module in modules {
            let _ = writeln!(order, "{}", module.display());
        }
        initramfs.file("/modules/order", 0o644, order.into_bytes());
        initramfs.file("/init", 0o755, include_bytes!("qemu/init.sh").to_vec());
        initramfs.file("/shell", 0o755, include_bytes!("qemu/shell.sh").to_vec());
        Ok(initramfs)
    }

    fn command(&self, host: &Namespace, image: &Image) -> Result<Command> {
        let qemu = find_program("qemu-system-x86_64")?;
        let mut command = host.command(&qemu);
        let mut kernel = image.kernel.clone();
        if let Some(number) = self.user {
            // That user may not be able to read where the kernel is.
            kernel = image.shell.with_file_name("vmlinux");
            fs::copy(&image.kernel, &kernel).context("cannot copy the guest's kernel")?;
            fs::set_permissions(&image.shell, Permissions::from_mode(0o666))
                .with_context(|| format!("cannot open {} to all", image.shell.display()))?;
            let device = image.shell.with_file_name("tun");
            command = host
                .command("unshare")
                .args(["--mount", "sh", "-ec", UNPRIVILEGED, "sh"])
                .arg(&device)
                .arg(number.to_string())
                .arg(&qemu);
        }
        command = command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args(["-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-smp", &self.processors.to_string()])
            .args(["-m", &self.memory.to_string()])
            .arg("-kernel")
            .arg(&kernel)
            .arg("-initrd")
            .arg(&image.initramfs)
            .args(["-append", &image.command_line, "-serial", "stdio"])
            .args([
                "-chardev",
                &format!("socket,id=shell,path={}", image.shell.display()),
            ])
            .args(["-serial", "chardev:shell"]);
        for (number, Card { tap, model, queues }) in self.cards.iter().enumerate() {
            let mut backend =
                format!("tap,id=n{number},ifname={tap},script=no,downscript=no,vhost=off");
            // The address begins with what QEMU's own begin with.
            let mut device = format!(
                "{},netdev=n{number},romfile=,mac=52:54:00:00:00:{:02x}",
                model.device(),
                number + 1
            );
            if *queues > 1 {
                let _ = write!(backend, ",queues={queues}");
            }
            if *queues > 1 && *model == Model::Virtio {
                let _ = write!(device, ",mq=on,vectors={}", 2 * queues + 2);
            }
            command = command.args(["-netdev", &backend, "-device", &device]);
        }
        Ok(command)
    }
}

/// Starts QEMU and waits for the guest's shell.
fn try_start(
    image: &Image,
    start: impl Fn(&Image) -> Result<Process>,
) -> Result<(Process, Shell), Failure> {
    let socket = &image.shell;
    // A first attempt may have left it.
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    listener
        .set_nonblocking(true)
        .context("cannot wait for QEMU's connection")?;
    let mut process = start(image)?;
    let shell = Shell::connect(&listener, &mut process)
        .map_err(|error| anyhow!("{error:#}; QEMU said: {}", last_words(&process)));
    match shell {
        Ok(shell) => Ok((process, shell)),
        Err(error) if process.is_running() => Err(Failure::TimedOut(error)),
        Err(error) => Err(Failure::Ended(error)),
    }
}

/// Why a guest did not boot.
#[derive(Debug)]
enum Failure {
    /// It was too slow, which a second attempt may not be.
    TimedOut(anyhow::Error),
    /// QEMU refused or ended, or never started.
    Ended(anyhow::Error),
}

impl Failure {
    fn into_inner(self) -> anyhow::Error {
        match self {
            Self::TimedOut(error) | Self::Ended(error) => error,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Ended(error)
    }
}

/// A command's end in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit status, as the guest's shell has it.
    pub status: i32,
    /// Standard output and standard error together, with invalid UTF-8
    /// replaced.
    pub text: String,
}

/// A running guest. Dropping it ends QEMU.
#[derive(Debug)]
pub struct Guest {
    shell: Shell,
    process: Process,
    _directory: Directory,
}

impl Guest {
    /// Runs a command line in the guest's shell to its end, whatever its exit
    /// status. Busybox prefers its own applets: call other programs by path,
    /// as in `/bin/ip`.
    ///
    /// # Errors
    /// It takes longer than the timeout (the guest then kills it), or the
    /// guest is gone.
    pub fn output(&mut self, command: &str, timeout: Duration) -> Result<Output> {
        self.shell.output(command, timeout).map_err(|error| {
            anyhow!(
                "{error:#}; the console's last words: {}",
                last_words(&self.process)
            )
        })
    }

    /// Runs a command line that is to succeed within the usual time, and
    /// returns what it wrote.
    ///
    /// # Errors
    /// As [`output`](Self::output), or its exit status is not 0.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.run_within(command, COMMAND_TIMEOUT)
    }

    /// The same with a time of its own.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_within(&mut self, command: &str, timeout: Duration) -> Result<String> {
        let Output { status, text } = self.output(command, timeout)?;
        ensure!(
            status == 0,
            "`{command}` failed in the guest ({status}): {}",
            text.trim()
        );
        Ok(text)
    }

    /// Gives a card an address with its prefix length, and the default route
    /// by a gateway on that card.
    ///
    /// # Errors
    /// The guest refuses, for example because it has no driver for the card.
    pub fn configure(
        &mut self,
        device: &str,
        address: impl std::fmt::Display,
        gateway: impl std::fmt::Display,
    ) -> Result<()> {
        self.run(&format!(
            "/bin/ip link set {device} up && /bin/ip address add {address} dev {device} && \
             /bin/ip route add default via {gateway} dev {device}"
        ))
        .map(drop)
    }

    /// What the kernel wrote to its console, and QEMU to its errors.
    #[must_use]
    pub fn console(&self) -> String {
        format!("{}{}", self.process.stdout(), self.process.stderr())
    }

    /// Waits for the guest to switch itself off.
    ///
    /// # Errors
    /// It does not in time.
    pub fn wait_for_end(&mut self, timeout: Duration) -> Result<()> {
        self.process.wait(timeout).map(drop)
    }
}

/// The guest's side is `qemu/shell.sh`.
#[derive(Debug)]
struct Shell {
    reader: BufReader<UnixStream>,
    commands: u32,
}

impl Shell {
    fn connect(listener: &UnixListener, process: &mut Process) -> Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("cannot accept QEMU's connection"),
            }
            ensure!(process.is_running(), "QEMU ended");
            ensure!(
                start.elapsed() < BOOT_TIMEOUT,
                "QEMU did not connect the serial port"
            );
            thread::sleep(Duration::from_millis(5));
        };
        stream.set_nonblocking(false)?;
        let mut shell = Self {
            reader: BufReader::new(stream),
            commands: 0,
        };
        shell
            .wait_for("ready", start + BOOT_TIMEOUT)
            .context("no shell came up")?;
        Ok(shell)
    }

    fn output(&mut self, command: &str, timeout: Duration) -> Result<Output> {
        self.commands += 1;
        let number = self.commands;
        let (seconds, encoded) = (timeout.as_secs().max(1), BASE64.encode(command));
        let line = format!("{number} {seconds} {encoded}\n");
        self.reader
            .get_ref()
            .write_all(line.as_bytes())
            .context("the guest's shell is gone")?;
        let deadline = Instant::now() + timeout + LINE_PATIENCE;
        self.wait_for(&format!("begin {number}"), deadline)?;
        let mut encoded = String::new();
        let end = format!("end {number} ");
        let status = loop {
            let line = self.line(deadline)?;
            match line.strip_prefix(&end) {
                Some(status) => break status.parse().context("the guest's shell said nonsense")?,
                None => encoded.push_str(&line),
            }
        };
        let text = BASE64
            .decode(&encoded)
            .context("the serial port garbled the output")?;
        let text = String::from_utf8_lossy(&text).into_owned();
        // SIGKILL from the guest's `timeout`.
        ensure!(
            status != 137,
            "`{command}` took longer than {timeout:?} in the guest: {text}"
        );
        Ok(Output { status, text })
    }

    fn wait_for(&mut self, awaited: &str, deadline: Instant) -> Result<()> {
        while self.line(deadline)? != awaited {}
        Ok(())
    }

    fn line(&mut self, deadline: Instant) -> Result<String> {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "the guest did not answer in time");
        self.reader.get_ref().set_read_timeout(Some(left))?;
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => bail!("the guest is gone"),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => Err(error).context("the guest did not answer in time"),
        }
    }
}

/// A directory that goes with this process.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    _registration: Registration,
}

impl Directory {
    fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(|| namespace::sweep_directories(&env::temp_dir(), "-qemu"));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("tapnat-{}-{number}-qemu", std::process::id()));
        let registration = cleanup::register(Leftover::Directory(path.clone()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self {
            path,
            _registration: registration,
        })
    }
}

/// Where a program of this machine is.
///
/// # Errors
/// It is nowhere on the search path.
pub fn find_program(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
        .with_context(|| format!("there is no {name}: run `cargo xtask setup`"))
}

fn last_words(process: &Process) -> String {
    let said = format!("{}{}", process.stdout(), process.stderr());
    let lines: Vec<_> = said.lines().collect();
    let last = &lines[lines.len().saturating_sub(20)..];
    if last.is_empty() {
        "nothing".to_owned()
    } else {
        last.join("\n")
    }
}
