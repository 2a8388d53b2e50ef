//! Attaches the eBPF programs, and pins the links. Owns what lies under the instance's directory in
//! the BPF file system, the programs themselves by way of [`generation`]; what the tables hold is
//! [`crate::tables`]'.
//!
//! The pins outlive the process: packets go on being translated when it is killed. The next one
//! adopts the tables, and the programs as well if it would load the same; otherwise it replaces
//! them. No packet is lost either way.

mod generation;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfError, TestRun as _, TestRunOptions,
    maps::{Map, MapData, MapError, MapInfo, xdp::DevMapHash},
    pin::PinError,
    programs::{
        CgroupAttachMode, CgroupSockAddr, LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        Xdp, XdpMode,
        cgroup_sock_addr::CgroupSockAddrAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
        xdp::XdpLink,
    },
    sys::SyscallError,
    util::KernelVersion,
};
use aya_log::Level;
use aya_obj::programs::XdpAttachType;
use tapnat_common::{
    abi::{maps, programs},
    nat_log::level,
};

use self::generation::{Constants, Generation};
use crate::{
    config::{Attach, Config},
    files::{self, make_directory, remove_all_but, unused_in},
    host::{bpffs, cgroup, namespace::NetworkNamespace, netlink::Device},
    instance::InstanceName,
    journal::{Direction, Role},
    sweep::Remover,
    tables::{PinnedTables, Unusable},
    view::Label as _,
};

/// Where the filter stands in clsact: late, so that filters of others come first.
pub const FILTER_PRIORITY: u16 = 40_000;
/// Where that of a trace stands: just before it.
pub const TRACE_PRIORITY: u16 = FILTER_PRIORITY - 1;
/// The filter's number at that priority.
pub const FILTER_HANDLE: u16 = 1;

/// Mappings need at most as many entries as there are sessions, and there are seldom more than one
/// outside address has ports.
const ENOUGH_MAPPINGS: u32 = 65_536;
/// The ports of an outside address: of TCP, of UDP, and the identifiers of ICMP.
const PORTS: u32 = 3 * 65_536;

/// Room for what the datapath tells between two looks at the NAT log's ring.
const LOG_BYTES: u32 = 4 << 20;
/// The smallest ring that there is, where there is no NAT log.
const LEAST_LOG_BYTES: u32 = 4096;

/// The directories of one instance's pins.
#[derive(Clone, Debug)]
pub struct Pins {
    instance: InstanceName,
    directory: PathBuf,
}

impl Pins {
    /// Of this instance, in the BPF file system mounted at `bpffs`.
    #[must_use]
    pub fn new(instance: &InstanceName, bpffs: &Path) -> Self {
        Self {
            instance: instance.clone(),
            directory: instance.pin_directory(bpffs),
        }
    }

    /// Of this instance, wherever the BPF file system is mounted.
    ///
    /// # Errors
    ///
    /// When it is not mounted any more.
    pub fn find(instance: &InstanceName) -> Result<Self> {
        let root = bpffs::find().context(
            "the BPF file system was unmounted: mount it (`mount -t bpf bpf /sys/fs/bpf`)",
        )?;
        Ok(Self::new(instance, &root))
    }

    /// Whether an earlier process left the instance's directory.
    #[must_use]
    pub fn exist(&self) -> bool {
        self.directory.exists()
    }

    /// Where the tables are pinned, each by its name.
    #[must_use]
    pub fn tables(&self) -> PathBuf {
        self.directory.join("maps")
    }

    fn links(&self) -> PathBuf {
        self.directory.join(LINKS)
    }

    /// Where the programs are pinned, in a directory for each of their generations: those that are
    /// attached must not go on to programs of another one, not even while they are replaced.
    fn generations(&self) -> PathBuf {
        self.directory.join("generations")
    }

    /// Where the links of the programs for the host's own sockets are pinned.
    fn host(&self) -> PathBuf {
        self.directory.join("host")
    }

    /// The sweep program of the instance, for whoever wants to sweep without a daemon.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn remover(&self) -> Result<impl Remover> {
        generation::sweep(&self.generations()).with_context(|| {
            format!(
                "cannot open a program of tapnat: start the instance again, which goes on with its \
                 sessions (`tapnat run --instance {}`)",
                self.instance
            )
        })
    }

    fn link(&self, hook: &Hook) -> PathBuf {
        link_pin(&self.directory, hook)
    }

    fn xdp_link(&self, hook: &Hook) -> PathBuf {
        self.links().join(format!("xdp-{}", hook.device.index))
    }

    /// The tables that an earlier process left, or `None` when it left none that were ever used.
    ///
    /// # Errors
    ///
    /// When there are tables that this process must not use.
    pub fn adoptable(&self) -> Result<Option<PinnedTables>> {
        match PinnedTables::open(&self.tables()) {
            Ok(tables) => Ok(Some(tables)),
            Err(Unusable::Missing | Unusable::Unfinished) => Ok(None),
            Err(Unusable::OtherVersion) => bail!(
                "{} holds the tables of another version of tapnat: pass --fresh to end its sessions \
                 and start anew, or only take it away (`tapnat down --instance {}`)",
                self.directory.display(),
                self.instance
            ),
            Err(Unusable::Refused(error)) => Err(error),
        }
    }

    /// Removes everything pinned, which detaches the programs too.
    ///
    /// # Errors
    ///
    /// When something cannot be removed.
    pub fn clear(&self) -> Result<()> {
        [self.links(), self.host(), self.generations(), self.tables()]
            .iter()
            .try_for_each(|directory| files::remove(directory).map(drop))
    }

    fn create(&self) -> Result<()> {
        [self.tables(), self.generations(), self.host(), self.links()]
            .iter()
            .try_for_each(|directory| make_directory(directory))
    }
}

/// The directory of the links in that of an instance's pins.
const LINKS: &str = "links";

/// Where the link to a device is pinned if it is one of TCX, in the directory of an instance's pins.
#[must_use]
pub fn link_pin(pins: &Path, hook: &Hook) -> PathBuf {
    let role = hook.role.label();
    let leaving = match hook.direction {
        Direction::Arriving => "",
        Direction::Leaving => "-leaving",
    };
    let index = hook.device.index;
    pins.join(LINKS).join(format!("{role}-{index}{leaving}"))
}

/// A place to attach to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hook {
    pub device: Device,
    pub role: Role,
    pub direction: Direction,
    /// Whether its frames have an Ethernet header.
    pub ethernet: bool,
    /// Whether its packets meet a program in the driver before those of TC.
    pub xdp: bool,
}

impl Hook {
    /// The program for it, by the name that it has in the object file.
    #[must_use]
    pub fn program(&self) -> &'static str {
        match (self.direction, self.role, self.ethernet) {
            (Direction::Arriving, Role::Inside, true) => programs::INSIDE_ETHERNET,
            (Direction::Arriving, Role::Inside, false) => programs::INSIDE_RAW,
            (Direction::Arriving, Role::Uplink, true) => programs::OUTSIDE_ETHERNET,
            (Direction::Arriving, Role::Uplink, false) => programs::OUTSIDE_RAW,
            (Direction::Leaving, Role::Inside | Role::Uplink, _) => programs::ACCEPTED,
        }
    }

    /// The place of the program for what arrives in [`tapnat_common::trace::names::PROGRAMS`].
    #[must_use]
    pub fn place(&self) -> usize {
        match (self.role, self.ethernet) {
            (Role::Inside, true) => 0,
            (Role::Inside, false) => 1,
            (Role::Uplink, true) => 2,
            (Role::Uplink, false) => 3,
        }
    }
}

impl From<Direction> for TcAttachType {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Arriving => Self::Ingress,
            Direction::Leaving => Self::Egress,
        }
    }
}

/// Whether the kernel is one of those that `cargo xtask test kernels` boots, or newer.
#[must_use]
pub fn is_kernel_supported() -> bool {
    kernel_is_at_least(6, 1)
}

/// What to do about a kernel that refuses what it ought to take.
fn explain_kernel() -> &'static str {
    if is_kernel_supported() {
        "please report this with the output of `uname -a`"
    } else {
        "this kernel is too old: tapnat needs Linux 6.1 or later"
    }
}

fn kernel_is_at_least(major: u8, minor: u8) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

/// Whether TCX is used, or clsact.
///
/// # Errors
///
/// When the kernel has no TCX and it was insisted on.
pub fn uses_tcx(attach: Attach) -> Result<bool> {
    choose_tcx(attach, has_tcx())
}

/// Asks the kernel what hangs on a device that every network namespace has. One that does not know
/// TCX, or was built without it, calls that invalid (`bpf_prog_query()` in `kernel/bpf/syscall.c`,
/// `tcx_prog_query()` in `include/net/tcx.h`).
fn has_tcx() -> bool {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => true,
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            false
        }
        // It may not be asked, as without privileges.
        Err(_) => kernel_is_at_least(6, 6),
    }
}

fn choose_tcx(attach: Attach, has_tcx: bool) -> Result<bool> {
    match attach {
        Attach::Auto => Ok(has_tcx),
        Attach::Clsact => Ok(false),
        Attach::Tcx if has_tcx => Ok(true),
        Attach::Tcx => {
            bail!("this kernel has no TCX, which came with Linux 6.6: pass --attach auto")
        }
    }
}

/// The programs of one instance.
#[derive(Debug)]
pub struct Datapath {
    pins: Pins,
    generation: Generation,
    sweep: SchedClassifier,
    resumes_log: bool,
    tcx: bool,
    host_sockets: HostSockets,
}

/// What leading the host's own sockets to guests takes.
#[derive(Debug)]
struct HostSockets {
    control_groups: Option<File>,
    /// Whether they are led; unknown of what an earlier process left.
    led: Option<bool>,
}

/// What it means when they are not led.
const UNREACHED: &str = "the host itself does not reach its forwards";

/// What each of [`programs::HOST`] is attached to.
const HOST_ATTACH_TYPES: [CgroupSockAddrAttachType; programs::HOST.len()] = [
    CgroupSockAddrAttachType::Connect4,
    CgroupSockAddrAttachType::UDPSendMsg4,
    CgroupSockAddrAttachType::UDPRecvMsg4,
    CgroupSockAddrAttachType::GetPeerName4,
    CgroupSockAddrAttachType::Connect6,
    CgroupSockAddrAttachType::UDPSendMsg6,
    CgroupSockAddrAttachType::UDPRecvMsg6,
    CgroupSockAddrAttachType::GetPeerName6,
];

impl Datapath {
    /// Takes the tables and programs that are pinned already, as far as they are what this process
    /// would load, and loads, creates and pins the others. `hooks` are those that programs are needed
    /// for; `ipv6` says whether any guest has that. Nothing is attached yet.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as it does for want of memory.
    pub fn open(pins: Pins, config: &Config, ipv6: bool, hooks: &[Hook]) -> Result<Self> {
        pins.create()?;
        let host_sockets = HostSockets {
            control_groups: cgroup::open_root(),
            led: None,
        };
        let constants = constants(config, ipv6)?;
        let wanted = programs_for(hooks);
        let (generations, tables) = (pins.generations(), pins.tables());
        let there = Generation::find(&generations, &tables, &constants);
        let (generation, resumes_log) = if let Some(generation) = there {
            generation.add(&wanted)?;
            (generation, true)
        } else {
            let resumes_log = has_ring(&tables.join(maps::NAT_LOG), constants.log_bytes)?;
            let generation = Generation::load(&generations, &tables, constants, &wanted)?;
            (generation, resumes_log)
        };
        let sweep = from_pin(&generation, programs::SWEEP)?;
        Ok(Self {
            pins,
            generation,
            sweep,
            resumes_log,
            tcx: uses_tcx(config.attach)?,
            host_sockets,
        })
    }

    /// Whether programs are attached through TCX, or as filters in clsact.
    #[must_use]
    pub fn uses_tcx(&self) -> bool {
        self.tcx
    }

    /// Whether the ring of the NAT log is one that earlier programs have written to.
    #[must_use]
    pub fn resumes_log(&self) -> bool {
        self.resumes_log
    }

    /// The object that the programs are from, with the tables that they have.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn open_object(&self) -> Result<Ebpf> {
        self.generation.open_object()
    }

    /// Loads the programs that these devices need, as far as they are not loaded, without attaching
    /// them.
    ///
    /// # Errors
    ///
    /// When the kernel's verifier refuses one.
    pub fn load_programs(&self, hooks: &[Hook]) -> Result<()> {
        self.generation.add(&programs_for(hooks))
    }

    /// Attaches the program of a device through TCX, in place of that which an earlier process of
    /// this instance attached there.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or the link cannot be pinned.
    pub fn attach_tcx(&self, hook: &Hook) -> Result<()> {
        let path = self.pins.link(hook);
        let mut program = from_pin(&self.generation, hook.program())?;
        if let Some(pinned) = pinned_link(&path)? {
            if replace_program(&mut program, pinned)
                .with_context(|| format!("cannot replace the program on {}", hook.device))?
            {
                return Ok(());
            }
            files::remove(&path)?;
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let attached = program
            .attach_with_options(&hook.device.name, hook.direction.into(), options)
            .and_then(|id| program.take_link(id))
            .with_context(|| format!("cannot attach to {}", hook.device))?;
        let link: FdLink = attached.try_into()?;
        link.pin(&path)
            .with_context(|| format!("cannot pin {}", path.display()))?;
        Ok(())
    }

    /// Attaches the program of a device as a filter in its clsact, in place of the one that is there
    /// if `replace` says that this may be this instance's.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn attach_clsact(&self, hook: &Hook, replace: bool) -> Result<()> {
        let mut program = from_pin(&self.generation, hook.program())?;
        let handle = TcHandle::new(0, FILTER_HANDLE);
        let name = &hook.device.name;
        if replace {
            let there = SchedClassifierLink::attached(
                name,
                hook.direction.into(),
                FILTER_PRIORITY,
                handle,
                None,
            )
            .with_context(|| format!("cannot attach to {name}"))?;
            if let Ok(id) = program.attach_to_link(there) {
                // Forgotten, not dropped: dropping it would detach the filter.
                std::mem::forget(program.take_link(id)?);
                return Ok(());
            }
        }
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: FILTER_PRIORITY,
            handle,
            ..NlOptions::default()
        });
        let id = program
            .attach_with_options(name, hook.direction.into(), options)
            .with_context(|| format!("cannot attach to {name}"))?;
        std::mem::forget(program.take_link(id)?);
        Ok(())
    }

    /// Leads the host's own sockets to guests, or no longer. Programs of an earlier process are replaced.
    ///
    /// # Errors
    ///
    /// When the kernel cannot, or refuses.
    pub fn lead_host_sockets(&mut self, wanted: bool) -> Result<()> {
        if self.host_sockets.led == Some(wanted) {
            return Ok(());
        }
        let mut pins = Vec::new();
        if wanted {
            self.generation.add(&programs::HOST).context(UNREACHED)?;
            for (name, attach_type) in programs::HOST.iter().zip(HOST_ATTACH_TYPES) {
                let pin = self.attach_to_host(name, attach_type);
                pins.push(pin.with_context(|| format!("{UNREACHED}: {name}"))?);
            }
        }
        remove_all_but(&pins, &self.pins.host())?;
        self.host_sockets.led = Some(wanted);
        Ok(())
    }

    /// Attaches a program to the root of the control groups, and returns where its link is pinned.
    fn attach_to_host(&self, name: &str, attach_type: CgroupSockAddrAttachType) -> Result<PathBuf> {
        let root = self.host_sockets.control_groups.as_ref();
        let root = root.context("no control group file system of version 2 is mounted")?;
        let pin = self.generation.program(name);
        let mut program =
            CgroupSockAddr::from_pin(&pin, attach_type).with_context(|| cannot_open(&pin))?;
        let attached = program
            .attach(root, CgroupAttachMode::Single)
            .and_then(|id| program.take_link(id))
            .context("cannot attach to the root of the control groups")?;
        let link: FdLink = attached.try_into()?;
        let path = unused_in(&self.pins.host(), "")?;
        link.pin(&path)
            .with_context(|| format!("cannot pin {}", path.display()))?;
        Ok(path)
    }

    /// Attaches the XDP program to a device's driver, in place of that which an earlier process of
    /// this instance attached there. It finds tables that are filled, and changes nothing for packets
    /// that it does not know.
    ///
    /// # Errors
    ///
    /// When the driver refuses, or the link cannot be pinned.
    pub fn attach_xdp(&self, hook: &Hook) -> Result<()> {
        let path = self.pins.xdp_link(hook);
        let device = &hook.device;
        let pin = self.generation.program(programs::OUTSIDE_XDP);
        let mut program =
            Xdp::from_pin(&pin, XdpAttachType::Interface).with_context(|| cannot_open(&pin))?;
        if let Some(pinned) = pinned_link(&path)? {
            let link: XdpLink = FdLink::from(pinned).try_into()?;
            match program.attach_to_link(link) {
                Ok(id) => {
                    // The pin keeps the link.
                    drop(program.take_link(id)?);
                    return Ok(());
                }
                Err(error) if is_gone(&error) => drop(files::remove(&path)?),
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot replace the XDP program on {device}"));
                }
            }
        }
        let attached = program
            .attach_to_if_index(device.index, XdpMode::Driver)
            .and_then(|id| program.take_link(id))
            .map_err(|error| explain_xdp(&device.name, error))?;
        let link: FdLink = attached.try_into()?;
        link.pin(&path)
            .with_context(|| format!("cannot pin {}", path.display()))?;
        Ok(())
    }

    /// Makes these the devices that frames are redirected to by the XDP program.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn set_xdp_devices(&self, devices: &[u32]) -> Result<()> {
        let pin = self.pins.tables().join(maps::XDP_DEVICES);
        let map = MapData::from_pin(&pin).with_context(|| cannot_open(&pin))?;
        let mut table = DevMapHash::try_from(Map::from_map_data(map)?)?;
        let known: Vec<u32> = table.keys().collect::<Result<_, _>>()?;
        for index in known.iter().filter(|index| !devices.contains(index)) {
            match table.remove(*index) {
                // It goes with its device.
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => {
                    return Err(error).context("cannot write the table of devices for XDP");
                }
            }
        }
        for index in devices.iter().filter(|index| !known.contains(index)) {
            table
                .insert(*index, *index, None, 0)
                .context("cannot write the table of devices for XDP")?;
        }
        Ok(())
    }

    /// Detaches what an earlier process attached by links to devices that are not among these, and
    /// lets go of the programs that it had attached.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub fn forget_others(&self, hooks: &[Hook]) -> Result<()> {
        let by_tc = hooks.iter().filter(|_| self.tcx);
        let by_tc = by_tc.map(|hook| self.pins.link(hook));
        let by_xdp = hooks.iter().filter(|hook| hook.xdp);
        let by_xdp = by_xdp.map(|hook| self.pins.xdp_link(hook));
        let wanted: Vec<_> = by_tc.chain(by_xdp).collect();
        remove_all_but(&wanted, &self.pins.links())?;
        let generation = self.generation.directory().to_owned();
        remove_all_but(&[generation], &self.pins.generations())
    }
}

/// What the programs and tables for this configuration are made of.
fn constants(config: &Config, ipv6: bool) -> Result<Constants> {
    let mappings = match config.max_sessions {
        few @ ..=ENOUGH_MAPPINGS => few,
        many => {
            let addresses = u32::try_from(config.outside_addresses.len().max(1))?;
            ENOUGH_MAPPINGS.max(many / 2).min(addresses * PORTS)
        }
    };
    let (log, log_bytes) = match (&config.nat_log, config.log_destinations) {
        (None, _) => (level::OFF, LEAST_LOG_BYTES),
        (Some(_), false) => (level::MAPPINGS, LOG_BYTES),
        (Some(_), true) => (level::SESSIONS, LOG_BYTES),
    };
    Ok(Constants {
        namespace: NetworkNamespace::current()?.cookie(),
        count: u8::from(config.count),
        log,
        ipv6_checksums: u8::from(kernel_is_at_least(6, 16)),
        ipv6,
        nat64: ipv6 && config.nat64.is_some(),
        prefixes: ipv6 && !config.prefixes.is_empty(),
        verbose: if config.verbose {
            Level::Debug as u8
        } else {
            0
        },
        log_bytes,
        halves: config.max_sessions.saturating_mul(2),
        mappings,
        // One permitted remote is in the mapping, which is all that most have.
        permissions: config.max_sessions.div_ceil(4),
    })
}

/// The programs that are attached to these, each once.
fn programs_for(hooks: &[Hook]) -> Vec<&'static str> {
    let mut names: Vec<_> = hooks.iter().map(Hook::program).collect();
    if hooks.iter().any(|hook| hook.xdp) {
        names.push(programs::OUTSIDE_XDP);
    }
    names.sort_unstable();
    names.dedup();
    names
}

fn from_pin(generation: &Generation, name: &str) -> Result<SchedClassifier> {
    let path = generation.program(name);
    SchedClassifier::from_pin(&path).with_context(|| cannot_open(&path))
}

fn cannot_open(path: &Path) -> String {
    format!("cannot open {}", path.display())
}

impl Remover for Datapath {
    fn remove(&self, packet: &[u8], keys: u32) -> Result<u32> {
        self.sweep.remove(packet, keys)
    }
}

/// Of the sweep program itself.
impl Remover for SchedClassifier {
    fn remove(&self, packet: &[u8], keys: u32) -> Result<u32> {
        let options = TestRunOptions {
            data_in: Some(packet),
            repeat: keys,
            ..TestRunOptions::default()
        };
        match self.test_run(options) {
            Ok(result) => Ok(result.return_value),
            // A signal came; the rest is for the next sweep.
            Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
                if io_error.kind() == io::ErrorKind::Interrupted =>
            {
                Ok(0)
            }
            Err(error) => Err(error).context("cannot run the sweep program"),
        }
    }
}

/// Whether a ring of this size is pinned there. One of another size, as where there was no log, is
/// unpinned.
fn has_ring(pin: &Path, bytes: u32) -> Result<bool> {
    match MapInfo::from_pin(pin) {
        Ok(info) if info.max_entries() == bytes => Ok(true),
        Ok(_) => files::remove(pin).map(|_| false),
        Err(_) => Ok(false),
    }
}

fn pinned_link(path: &Path) -> Result<Option<PinnedLink>> {
    match PinnedLink::from_pin(path) {
        Ok(pinned) => Ok(Some(pinned)),
        Err(LinkError::SyscallError(SyscallError { io_error, .. }))
            if io_error.kind() == io::ErrorKind::NotFound =>
        {
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| cannot_open(path)),
    }
}

/// Whether the device went away under the link.
fn is_gone(error: &ProgramError) -> bool {
    matches!(
        error,
        ProgramError::SyscallError(SyscallError { io_error, .. })
            if io_error.raw_os_error() == Some(libc::ENOLINK)
    )
}

/// What to do about a driver that takes no XDP program.
fn explain_xdp(device: &str, error: ProgramError) -> Error {
    let is = |number| {
        matches!(
            &error,
            ProgramError::SyscallError(SyscallError { io_error, .. })
                if io_error.raw_os_error() == Some(number)
        )
    };
    let why = if is(libc::EOPNOTSUPP) {
        "its driver cannot run XDP".to_owned()
    } else if is(libc::EBUSY) || is(libc::EEXIST) {
        "another XDP program is there".to_owned()
    } else {
        format!("{:#}", anyhow!(error))
    };
    anyhow!("cannot attach XDP to the uplink {device}: {why}: pass --uplink-hook tc")
}

/// `false` when the device went away under the link.
fn replace_program(program: &mut SchedClassifier, pinned: PinnedLink) -> Result<bool> {
    let link: SchedClassifierLink = FdLink::from(pinned).try_into()?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // The pin keeps the link.
            drop(program.take_link(id)?);
            Ok(true)
        }
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// What to do about tables that cannot be created.
fn explain_load(error: EbpfError) -> Error {
    match &error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => {
            let way_out = match io_error.raw_os_error() {
                Some(libc::ENOMEM | libc::E2BIG) => "pass a smaller --max-sessions",
                // Kernels before 5.11 count tables as locked memory, which root may be short of, too.
                Some(libc::EPERM) if is_kernel_supported() => "run as root",
                _ => explain_kernel(),
            };
            anyhow!("cannot create the table {name}: {io_error}: {way_out}")
        }
        // Its own words say the same three times.
        EbpfError::MapError(MapError::PinError {
            name,
            error: PinError::SyscallError(error),
        }) => {
            let name = name.as_deref().unwrap_or("without a name");
            anyhow!("cannot pin the table {name}: {}", error.io_error)
        }
        _ => anyhow!(error).context("cannot load the datapath"),
    }
}

/// How the lines begin that the verifier writes after its verdict.
const STATISTICS: [&str; 3] = ["processed ", "stack depth ", "verification time "];

/// The verifier's last word, on one line.
pub fn explain_refusal(name: &str, error: ProgramError) -> Error {
    match &error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            let last = log
                .lines()
                .map(str::trim)
                .rev()
                .find(|line| !line.is_empty() && !STATISTICS.iter().any(|it| line.starts_with(it)))
                .unwrap_or("it gives no reason");
            let way_out = explain_kernel();
            anyhow!("the kernel refuses the program {name}: {io_error}: {last}: {way_out}")
        }
        _ => anyhow!(error).context(format!("cannot load the program {name}")),
    }
}

/// The BTF of the running kernel, without which the programs cannot be loaded.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Says that the kernel has no BTF, if so.
///
/// # Errors
///
/// When it has none.
pub fn check_kernel() -> Result<()> {
    check_btf(Path::new(KERNEL_BTF))
}

fn check_btf(btf: &Path) -> Result<()> {
    if btf.exists() {
        return Ok(());
    }
    bail!(
        "this kernel has no BTF ({} is missing): use a distribution's kernel, or build one with \
         CONFIG_DEBUG_INFO_BTF=y",
        btf.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_btf_is_refused() {
        let error = check_btf(Path::new("/nonexistent/vmlinux")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this kernel has no BTF (/nonexistent/vmlinux is missing): use a distribution's kernel, \
             or build one with CONFIG_DEBUG_INFO_BTF=y"
        );
        assert!(check_btf(Path::new("/proc/self/exe")).is_ok());
    }

    #[test]
    fn tcx_is_used_where_there_is_one() {
        for has_tcx in [false, true] {
            assert_eq!(choose_tcx(Attach::Auto, has_tcx).unwrap(), has_tcx);
            assert!(!choose_tcx(Attach::Clsact, has_tcx).unwrap());
        }
        assert!(choose_tcx(Attach::Tcx, true).unwrap());
        let error = choose_tcx(Attach::Tcx, false).unwrap_err().to_string();
        assert!(
            error.contains("no TCX") && error.contains("--attach auto"),
            "{error}"
        );
    }
}
