//! System calls that neither the standard library nor `nix` wraps: tun ioctls,
//! packet sockets and an event to wake a thread with.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, SockaddrLike as _, bind,
            socket,
        },
    },
};

/// `PACKET_VNET_HDR` of `linux/if_packet.h`, which `libc` lacks.
pub(crate) const PACKET_VNET_HDR: libc::c_int = 15;

/// Opens /dev/net/tun in the calling thread's namespace without binding it to
/// a device yet.
pub(crate) fn open_tun() -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun (is the tun driver there, and are we root?)")
}

/// Binds a tun descriptor to the device of that name, making it if need be.
pub(crate) fn tun_set_device(tun: &File, device: &str, flags: libc::c_int) -> Result<(), Errno> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            // IFF_VNET_HDR and its like are bit patterns in a signed field.
            ifru_flags: (flags & 0xffff) as libc::c_short,
        },
    };
    if device.is_empty() || device.len() >= libc::IFNAMSIZ {
        return Err(Errno::EINVAL);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request is a whole ifreq with a terminated name, and outlives the call.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(result).map(drop)
}

/// A tun ioctl whose argument is a plain number.
pub(crate) fn tun_set_value(
    tun: &File,
    request: libc::Ioctl,
    value: libc::c_uint,
) -> Result<(), Errno> {
    // SAFETY: the request takes its argument by value.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), request, libc::c_ulong::from(value)) };
    Errno::result(result).map(drop)
}

/// A tun ioctl whose argument is a pointer to a number.
pub(crate) fn tun_set_pointed(
    tun: &File,
    request: libc::Ioctl,
    value: libc::c_int,
) -> Result<(), Errno> {
    // SAFETY: the request reads one int, which outlives the call.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), request, &raw const value) };
    Errno::result(result).map(drop)
}

fn length_of<T>(value: &T) -> io::Result<libc::socklen_t> {
    libc::socklen_t::try_from(size_of_val(value)).map_err(io::Error::other)
}

/// Sets an integer socket option.
pub(crate) fn set_socket_option(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = length_of(&value)?;
    let descriptor = socket.as_fd().as_raw_fd();
    // SAFETY: value and length describe one int, which outlives the call.
    let result =
        unsafe { libc::setsockopt(descriptor, level, option, (&raw const value).cast(), length) };
    Ok(Errno::result(result).map(drop)?)
}

/// How many packets a packet socket had to drop since the last call.
pub(crate) fn packet_socket_drops(socket: impl AsFd) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut length = length_of(&statistics)?;
    let descriptor = socket.as_fd().as_raw_fd();
    // SAFETY: statistics and length describe one tpacket_stats, and outlive the call.
    let result = unsafe {
        libc::getsockopt(
            descriptor,
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    Errno::result(result)?;
    Ok(statistics.tp_drops)
}

/// `BPF_TCX_INGRESS` of `linux/bpf.h`.
pub(crate) const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`.
pub(crate) const TCX_EGRESS: u32 = 47;

/// The part of `union bpf_attr` that `BPF_PROG_QUERY` uses.
#[repr(C)]
#[derive(Default)]
struct ProgramQuery {
    device: u32,
    hook: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    padding: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// How many programs are attached to a device's TCX hook, in the calling
/// thread's namespace; none on kernels before 6.6, which have no TCX.
pub(crate) fn count_tcx_programs(device: u32, hook: u32) -> Result<u32> {
    const BPF_PROG_QUERY: libc::c_int = 16;
    let mut query = ProgramQuery {
        device,
        hook,
        ..ProgramQuery::default()
    };
    // SAFETY: the query is a whole attribute of that size, asks for no
    // arrays, and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut query,
            size_of::<ProgramQuery>(),
        )
    };
    match Errno::result(result) {
        // Nothing was ever attached, or there is no such hook.
        Err(Errno::ENOENT | Errno::EINVAL) => Ok(0),
        result => result
            .map(|_| query.program_count)
            .context("cannot query TCX programs"),
    }
}

/// The address of a device for a packet socket.
pub(crate) fn link_address(index: u32, protocol: u16) -> Result<LinkAddr> {
    // SAFETY: all fields of sockaddr_ll are numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET)?;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index.cast_signed();
    let length = length_of(&address)?;
    // SAFETY: the pointer is to a whole sockaddr_ll of that length.
    let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) };
    address.context("the kernel's link address has another layout here")
}

/// Opens a packet socket on a device of the calling thread's namespace. All
/// options are set by `configure` before the first packet can arrive.
pub(crate) fn packet_socket(
    device: &str,
    configure: impl FnOnce(&OwnedFd) -> Result<()>,
) -> Result<(OwnedFd, u32)> {
    let index = nix::net::if_::if_nametoindex(device)
        .with_context(|| format!("no device {device} to open a packet socket on"))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // Protocol 0 receives nothing until bound to the device and to all protocols.
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        flags,
        None::<SockProtocol>,
    )
    .context("cannot open a packet socket (root is needed)")?;
    configure(&socket)?;
    let address = link_address(index, u16::try_from(libc::ETH_P_ALL)?)?;
    bind(socket.as_raw_fd(), &address)
        .with_context(|| format!("cannot bind a packet socket to {device}"))?;
    Ok((socket, index))
}

/// Opens a packet socket that receives nothing, for a device of the calling
/// thread's namespace.
pub(crate) fn packet_sending_socket(device: &str) -> Result<(OwnedFd, u32)> {
    let index = nix::net::if_::if_nametoindex(device)
        .with_context(|| format!("no device {device} to send by"))?;
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        flags,
        None::<SockProtocol>,
    )
    .context("cannot open a packet socket (root is needed)")?;
    Ok((socket, index))
}

/// Tells threads to stop, waking them from [`wait_readable`].
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    event: Arc<EventFd>,
    raised: Arc<AtomicBool>,
}

impl Stop {
    pub(crate) fn new() -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_flags(flags).context("cannot make an event descriptor")?;
        Ok(Self {
            event: Arc::new(event),
            raised: Arc::default(),
        })
    }

    pub(crate) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Relaxed)
    }

    pub(crate) fn raise(&self) {
        self.raised.store(true, Ordering::Relaxed);
        // The only failure is a full counter, which wakes as well.
        let _ = self.event.write(1);
    }
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    Readable,
    Stopped,
    /// The descriptor is of no more use: its device is gone or down.
    Broken,
    TimedOut,
}

/// Waits until the descriptor can be read or the stop is raised.
pub(crate) fn wait_readable(
    descriptor: impl AsFd,
    stop: &Stop,
    timeout: PollTimeout,
) -> Result<Wake> {
    let mut waited = [
        PollFd::new(descriptor.as_fd(), PollFlags::POLLIN),
        PollFd::new(stop.event.as_fd(), PollFlags::POLLIN),
    ];
    loop {
        match poll(&mut waited, timeout) {
            Ok(0) => return Ok(Wake::TimedOut),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for packets"),
        }
    }
    let [descriptor, stop] = waited.map(|entry| entry.revents().unwrap_or(PollFlags::empty()));
    if !stop.is_empty() {
        return Ok(Wake::Stopped);
    }
    if descriptor.contains(PollFlags::POLLIN) {
        return Ok(Wake::Readable);
    }
    ensure!(!descriptor.is_empty(), "poll reported nothing");
    Ok(Wake::Broken)
}
