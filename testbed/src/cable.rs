//! The stand-in for a QEMU guest's virtio device: two taps (or L3 tuns) whose
//! descriptors are cross-connected by threads that copy each frame, virtio
//! header included, unchanged.
//!
//! A namespace with one end plays the guest with the whole kernel stack, so
//! that 64 KiB GSO packets and partial checksums reach the other end as they
//! do from a guest with virtio-net. The cable alters, drops and delays
//! nothing; what a device refuses is counted.

use std::{
    fs::File,
    io::{self, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{errno::Errno, poll::PollTimeout};

use crate::{
    Namespace,
    packet::{LONG_HEADER, Offload},
    sys::{self, Stop, Wake},
};

/// A GSO packet is at most 64 KiB long, its headers aside.
const LARGEST_FRAME: usize = LONG_HEADER + 65_536 + 256;

/// How long a forked process may take to get to its exec.
const FORK_PATIENCE: Duration = Duration::from_secs(1);

/// What a device carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Ethernet frames: a tap.
    Ethernet,
    /// IP packets: an L3 tun.
    Ip,
}

/// How to open a tap or tun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Tap or L3 tun.
    pub layer: Layer,
    /// Number of queues to open; more than one makes a multi-queue device.
    pub queues: usize,
    /// Opens the device as `IFF_MULTI_QUEUE` whatever the number of queues.
    pub multi_queue: bool,
    /// Whether the guest takes and sends segmentation and checksum offloads,
    /// as virtio-net does and an rtl8139 does not.
    pub offloads: bool,
    /// The device stays when the descriptors are closed.
    pub persistent: bool,
}

impl Options {
    /// One queue, offloads, gone when closed.
    #[must_use]
    pub const fn new(layer: Layer) -> Self {
        Self {
            layer,
            queues: 1,
            multi_queue: false,
            offloads: true,
            persistent: false,
        }
    }

    fn flags(self, multi_queue: bool) -> libc::c_int {
        let mut flags = libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        flags |= match self.layer {
            Layer::Ethernet => libc::IFF_TAP,
            Layer::Ip => libc::IFF_TUN,
        };
        if multi_queue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        flags
    }
}

/// An open tap or tun: the side of it where a virtual machine monitor sits.
#[derive(Debug)]
pub struct TunTap {
    name: String,
    queues: Vec<File>,
}

impl TunTap {
    /// Makes the device in a namespace and brings it up.
    ///
    /// # Errors
    /// A device of that name exists, or no root.
    pub fn create(namespace: &Namespace, name: &str, options: Options) -> Result<Self> {
        ensure!(
            namespace.device_index(name)?.is_none(),
            "there is a device {name} in {} already",
            namespace.name()
        );
        let device = Self::open(
            namespace,
            name,
            options,
            options.multi_queue || options.queues > 1,
        )
        .with_context(|| format!("cannot make {name}"))?;
        namespace.ip(&format!("link set {name} up"))?;
        Ok(device)
    }

    /// Attaches to a persistent device that someone else made, as QEMU does.
    ///
    /// # Errors
    /// There is no such device, it is of the other layer, or it has no free
    /// queue (a single-queue device that is open elsewhere).
    pub fn attach(namespace: &Namespace, name: &str, options: Options) -> Result<Self> {
        ensure!(
            namespace.device_index(name)?.is_some(),
            "there is no device {name} in {}",
            namespace.name()
        );
        // The kernel refuses to attach with another IFF_MULTI_QUEUE than the
        // device was made with (tun_set_iff), and does not tell which.
        let mut multi_queue = options.multi_queue || options.queues > 1;
        let mut other_tried = options.queues > 1;
        let start = Instant::now();
        loop {
            let error = match Self::open(namespace, name, options, multi_queue) {
                Ok(device) => return Ok(device),
                Err(error) => error,
            };
            match error.downcast_ref() {
                Some(Errno::EINVAL) if !other_tried => {
                    multi_queue = !multi_queue;
                    other_tried = true;
                }
                // A process that another thread is just forking holds a copy
                // of every descriptor, also of those just closed.
                Some(Errno::EBUSY) if start.elapsed() < FORK_PATIENCE => {
                    thread::sleep(Duration::from_millis(1));
                }
                _ => return Err(error.context(format!("cannot attach to {name}"))),
            }
        }
    }

    /// Makes a persistent device that nobody holds open, as a management tool
    /// does before it starts a guest.
    ///
    /// # Errors
    /// A device of that name exists, or no root.
    pub fn create_persistent(namespace: &Namespace, name: &str, options: Options) -> Result<()> {
        Self::create(
            namespace,
            name,
            Options {
                persistent: true,
                ..options
            },
        )
        .map(drop)
    }

    fn open(
        namespace: &Namespace,
        name: &str,
        options: Options,
        multi_queue: bool,
    ) -> Result<Self> {
        ensure!(options.queues > 0, "a device needs at least one queue");
        let flags = options.flags(multi_queue);
        let queues = namespace.run(|| {
            (0..options.queues)
                .map(|_| {
                    let queue = sys::open_tun()?;
                    sys::tun_set_device(&queue, name, flags)?;
                    configure(&queue, options)?;
                    Ok(queue)
                })
                .collect::<Result<_>>()
        })?;
        Ok(Self {
            name: name.to_owned(),
            queues,
        })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sends one frame as the guest, by the first queue; on an L3 tun it
    /// begins with the IP header.
    ///
    /// # Errors
    /// The device is down or gone, or does not take the offload.
    pub fn send(&self, offload: Offload, frame: &[u8]) -> Result<()> {
        let whole = [&offload.to_header(), frame].concat();
        (&self.queues[0])
            .write(&whole)
            .with_context(|| format!("{} takes no frame", self.name))?;
        Ok(())
    }

    /// Receives the next frame for the guest on the first queue; none if
    /// there is none in time.
    ///
    /// # Errors
    /// The device is gone.
    pub fn receive(&self, timeout: Duration) -> Result<Option<(Offload, Vec<u8>)>> {
        let never = Stop::new()?;
        let queue = &self.queues[0];
        let timeout = PollTimeout::try_from(timeout).context("too long a wait")?;
        match sys::wait_readable(queue, &never, timeout)? {
            Wake::TimedOut | Wake::Stopped => Ok(None),
            Wake::Broken => bail!("{} is gone", self.name),
            Wake::Readable => {
                let mut buffer = vec![0; LARGEST_FRAME];
                let length = { queue }.read(&mut buffer)?;
                buffer.truncate(length);
                ensure!(length > LONG_HEADER, "{} is gone", self.name);
                let frame = buffer.split_off(LONG_HEADER);
                Ok(Some((Offload::from_header(&buffer), frame)))
            }
        }
    }
}

fn configure(queue: &File, options: Options) -> Result<()> {
    let header = libc::c_int::try_from(LONG_HEADER)?;
    sys::tun_set_pointed(queue, libc::TUNSETVNETHDRSZ, header)
        .context("cannot set the size of the virtio header")?;
    if options.offloads {
        let usual = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        let with_udp = usual | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        // UDP segmentation came with 6.2.
        sys::tun_set_value(queue, libc::TUNSETOFFLOAD, with_udp)
            .or_else(|_| sys::tun_set_value(queue, libc::TUNSETOFFLOAD, usual))
    } else {
        sys::tun_set_value(queue, libc::TUNSETOFFLOAD, 0)
    }
    .context("cannot set the offloads")?;
    sys::tun_set_pointed(queue, libc::TUNSETSNDBUF, libc::c_int::MAX)
        .context("cannot set the send buffer")?;
    if options.persistent {
        sys::tun_set_value(queue, libc::TUNSETPERSIST, 1)
            .context("cannot make the device persistent")?;
    }
    Ok(())
}

/// What went one way through a cable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames delivered.
    pub frames: u64,
    /// Their bytes, without the virtio header.
    pub bytes: u64,
    /// Frames that were yet to be segmented.
    pub gso: u64,
    /// Frames whose checksum was only seeded.
    pub partial: u64,
    /// Frames that the receiving device refused, as it does when it is down.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct AtomicCounters {
    frames: AtomicU64,
    bytes: AtomicU64,
    gso: AtomicU64,
    partial: AtomicU64,
    refused: AtomicU64,
}

impl AtomicCounters {
    fn count(&self, frame: &[u8], delivered: bool) {
        if !delivered {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let (header, payload) = frame.split_at(LONG_HEADER);
        let offload = Offload::from_header(header);
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes
            .fetch_add(payload.len() as u64, Ordering::Relaxed);
        self.partial
            .fetch_add(u64::from(offload.checksum.is_some()), Ordering::Relaxed);
        self.gso
            .fetch_add(u64::from(offload.gso.is_some()), Ordering::Relaxed);
    }

    fn get(&self) -> Counters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            frames: load(&self.frames),
            bytes: load(&self.bytes),
            gso: load(&self.gso),
            partial: load(&self.partial),
            refused: load(&self.refused),
        }
    }
}

/// Two devices cross-connected. Dropping it unplugs both.
#[derive(Debug)]
pub struct Cable {
    stop: Stop,
    directions: [Arc<AtomicCounters>; 2],
    broken: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Cable {
    /// Connects two devices, queue by queue.
    ///
    /// # Errors
    /// The devices have different numbers of queues.
    pub fn connect(one: TunTap, other: TunTap) -> Result<Self> {
        if one.queues.len() != other.queues.len() {
            bail!(
                "{} has {} queues and {} has {}: a cable needs the same number",
                one.name,
                one.queues.len(),
                other.name,
                other.queues.len()
            );
        }
        let mut cable = Self {
            stop: Stop::new()?,
            directions: Default::default(),
            broken: Arc::default(),
            threads: Vec::new(),
        };
        for (one, other) in one.queues.into_iter().zip(other.queues) {
            let (one, other) = (Arc::new(one), Arc::new(other));
            cable.copy(one.clone(), other.clone(), 0);
            cable.copy(other, one, 1);
        }
        Ok(cable)
    }

    fn copy(&mut self, from: Arc<File>, to: Arc<File>, direction: usize) {
        let counters = self.directions[direction].clone();
        let (stop, broken) = (self.stop.clone(), self.broken.clone());
        self.threads.push(thread::spawn(move || {
            if copy_frames(&from, &to, &counters, &stop).is_err() {
                broken.store(true, Ordering::Relaxed);
            }
        }));
    }

    /// What the first device's host sent to the second's.
    #[must_use]
    pub fn from_first(&self) -> Counters {
        self.directions[0].get()
    }

    /// What the second device's host sent to the first's.
    #[must_use]
    pub fn from_second(&self) -> Counters {
        self.directions[1].get()
    }

    /// Whether both devices are still there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        !self.broken.load(Ordering::Relaxed)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop.raise();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Copies until stopped; an error means that a device is gone.
fn copy_frames(
    mut from: &File,
    mut to: &File,
    counters: &AtomicCounters,
    stop: &Stop,
) -> Result<()> {
    let mut buffer = vec![0; LARGEST_FRAME];
    while !stop.is_raised() {
        match from.read(&mut buffer) {
            Ok(length) if length > LONG_HEADER => {
                let frame = &buffer[..length];
                let delivered = match to.write(frame) {
                    Ok(_) => true,
                    Err(error) if is_gone(&error) => return Err(error.into()),
                    Err(_) => false,
                };
                counters.count(frame, delivered);
            }
            Ok(_) => bail!("the device is gone"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match sys::wait_readable(from, stop, PollTimeout::NONE)? {
                    Wake::Stopped => return Ok(()),
                    Wake::Broken => bail!("the device is gone"),
                    Wake::Readable | Wake::TimedOut => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A descriptor whose device was deleted answers EBADFD.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}
