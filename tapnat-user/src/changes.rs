//! How each change to the host is made and how it is reverted, side by side. The order, and the
//! record that survives a crash, are [`crate::journal`]'s.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Error, Result, bail};
use aya::programs::{
    ProgramError,
    links::Link as _,
    tc::{self, SchedClassifierLink, TcHandle},
};

use crate::{
    datapath::TRACE_PRIORITY,
    files::{self, make_directory},
    host::{
        bpffs,
        namespace::NetworkNamespace,
        netlink::{Device, Netlink},
        sysctl::Sysctl,
        tap,
    },
    instance::InstanceName,
    journal::{Change, Direction, Host, Journal, Reverted},
    ports::PortSet,
};

/// The driver's word for taps and tuns.
const TUN: &str = "tun";

/// The host that this process runs on, for one instance.
#[derive(Debug)]
pub struct RealHost {
    instance: InstanceName,
    netlink: Netlink,
}

impl RealHost {
    #[must_use]
    pub fn new(instance: InstanceName, netlink: Netlink) -> Self {
        Self { instance, netlink }
    }

    /// The kernel's side of it, to look around with.
    #[must_use]
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// Where the instance's maps and links are, or would be, pinned. None without a BPF file system.
    #[must_use]
    pub fn pin_directory(&self) -> Option<PathBuf> {
        bpffs::find().map(|root| self.instance.pin_directory(&root))
    }

    async fn remove_tap(&self, name: &str, index: Option<u32>) -> Result<Reverted> {
        let found = self
            .netlink
            .links()
            .await?
            .into_iter()
            .find(|link| match index {
                Some(index) => link.index == index,
                None => link.name == name,
            });
        match found {
            None => Ok(Reverted::NotThere),
            Some(link) if link.kind.as_deref() != Some(TUN) => Ok(Reverted::LeftAlone(format!(
                "{} is not a tap any more",
                link.name
            ))),
            Some(link) => self.netlink.remove_link(&link.device()).await.map(done_if),
        }
    }

    async fn set_down(&self, device: &Device) -> Result<Reverted> {
        let links = self.netlink.links().await?;
        if links
            .iter()
            .any(|link| link.index == device.index && link.up)
        {
            self.netlink.set_down(device).await.map(done_if)
        } else {
            Ok(Reverted::NotThere)
        }
    }

    async fn remove_clsact(&self, device: &Device) -> Result<Reverted> {
        if !self.netlink.has_clsact(device).await? {
            return Ok(Reverted::NotThere);
        }
        if self.netlink.clsact_filters(device).await? > 0 {
            return Ok(Reverted::LeftAlone(format!(
                "clsact stays on {device}: somebody else has filters in it"
            )));
        }
        self.netlink.remove_clsact(device).await.map(done_if)
    }

    async fn remove_filter(
        &self,
        device: &Device,
        direction: Direction,
        priority: u16,
        handle: u16,
    ) -> Result<Reverted> {
        let links = self.netlink.links().await?;
        let Some(link) = links.into_iter().find(|link| link.index == device.index) else {
            return Ok(Reverted::NotThere);
        };
        // One that a killed trace may have left goes with it.
        let _ = detach_filter(&link.name, direction, TRACE_PRIORITY, handle);
        match detach_filter(&link.name, direction, priority, handle) {
            Ok(()) => Ok(Reverted::Done),
            Err(error) if means_no_filter(&error) => Ok(Reverted::NotThere),
            Err(error) => Err(error.context(format!("cannot take the filter from {device}"))),
        }
    }

    /// Ports that other instances in this network namespace reserved.
    fn reserved_by_others(&self) -> Result<PortSet> {
        let here = NetworkNamespace::current()?;
        let mut reserved = PortSet::empty();
        for other in InstanceName::all()?
            .iter()
            .filter(|name| **name != self.instance)
        {
            if let Some(journal) = Journal::load(other)?.filter(|it| it.network_namespace() == here)
            {
                reserved = reserved.union(&reserved_in(&journal));
            }
        }
        Ok(reserved)
    }

    /// The ports that the host's operator reserved, tapnat's own reservations left out. `journal`
    /// is this instance's.
    ///
    /// # Errors
    ///
    /// When the kernel's parameter or another instance's journal cannot be read.
    pub fn reserved_by_operator(&self, journal: &Journal) -> Result<PortSet> {
        let ours = self.reserved_by_others()?.union(&reserved_in(journal));
        Ok(reserved_ports()?.without(&ours))
    }

    fn release_ports(&self, ports: &PortSet) -> Result<Reverted> {
        let reserved = reserved_ports()?;
        let left = reserved.without(&ports.without(&self.reserved_by_others()?));
        if left == reserved {
            return Ok(Reverted::NotThere);
        }
        write_sysctl(&Sysctl::local_reserved_ports(), &left.to_string())?;
        Ok(Reverted::Done)
    }
}

fn reserved_in(journal: &Journal) -> PortSet {
    journal
        .changes()
        .filter_map(Change::reserved_ports)
        .fold(PortSet::empty(), |reserved, ports| reserved.union(ports))
}

impl Host for RealHost {
    async fn make(&self, change: &mut Change) -> Result<()> {
        match change {
            Change::CreateTap {
                name,
                queues,
                owner,
                index,
            } => {
                tap::create(name, *queues, *owner)?;
                *index = self.netlink.link(name).await?.map(|link| link.index);
                Ok(())
            }
            Change::AddAddress {
                device,
                address,
                peer,
            } => self.netlink.add_address(device, *address, *peer).await,
            Change::SetUp { device } => self.netlink.set_up(device).await,
            Change::SetSysctl { sysctl, new, .. } => write_sysctl(sysctl, new),
            Change::ReservePorts { ports } => {
                let reserved = reserved_ports()?.union(ports);
                write_sysctl(&Sysctl::local_reserved_ports(), &reserved.to_string())
            }
            Change::AddClsact { device } => add_clsact(device),
            Change::AddFilter { device, .. } => {
                bail!("the filter of {device} is not put there with its program")
            }
            Change::PinDirectory => match self.pin_directory() {
                Some(path) => make_directory(&path),
                None => bail!("the BPF file system was unmounted during the start: try again"),
            },
        }
    }

    async fn revert(&self, change: &Change) -> Result<Reverted> {
        match change {
            Change::CreateTap { name, index, .. } => self.remove_tap(name, *index).await,
            Change::AddAddress {
                device,
                address,
                peer,
            } => self
                .netlink
                .remove_address(device, *address, *peer)
                .await
                .map(done_if),
            Change::SetUp { device } => self.set_down(device).await,
            Change::SetSysctl { sysctl, old, new } => restore_sysctl(sysctl, old, new),
            Change::ReservePorts { ports } => self.release_ports(ports),
            Change::AddClsact { device } => self.remove_clsact(device).await,
            Change::AddFilter {
                device,
                direction,
                priority,
                handle,
            } => {
                self.remove_filter(device, *direction, *priority, *handle)
                    .await
            }
            Change::PinDirectory => match self.pin_directory() {
                Some(path) => remove_directory(&path),
                None => Ok(Reverted::NotThere),
            },
        }
    }
}

fn add_clsact(device: &Device) -> Result<()> {
    tc::qdisc_add_clsact(&device.name)
        .with_context(|| format!("cannot put clsact on {device}: the kernel lacks NET_SCH_INGRESS"))
}

/// Takes a filter from clsact.
///
/// # Errors
///
/// When there is none, or the kernel refuses.
pub fn detach_filter(device: &str, direction: Direction, priority: u16, handle: u16) -> Result<()> {
    let handle = TcHandle::new(0, handle);
    SchedClassifierLink::attached(device, direction.into(), priority, handle, None)?.detach()?;
    Ok(())
}

/// The kernel says `EINVAL` where there is no clsact, `ENOENT` where there is no such filter.
fn means_no_filter(error: &Error) -> bool {
    let Some(ProgramError::NetlinkError(error)) = error.downcast_ref() else {
        return false;
    };
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
    )
}

fn done_if(there: bool) -> Reverted {
    if there {
        Reverted::Done
    } else {
        Reverted::NotThere
    }
}

fn reserved_ports() -> Result<PortSet> {
    read_sysctl(&Sysctl::local_reserved_ports())?.parse()
}

/// Reads a kernel parameter.
///
/// # Errors
///
/// When the kernel has no such parameter.
pub fn read_sysctl(sysctl: &Sysctl) -> Result<String> {
    sysctl
        .read()
        .with_context(|| format!("cannot read {sysctl}"))
}

fn write_sysctl(sysctl: &Sysctl, value: &str) -> Result<()> {
    sysctl.write(value).with_context(|| {
        format!("cannot set {sysctl} to '{value}': /proc/sys must be writable, in a container too")
    })
}

fn restore_sysctl(sysctl: &Sysctl, old: &str, new: &str) -> Result<Reverted> {
    let now = match sysctl.read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Reverted::NotThere),
        now => now.with_context(|| format!("cannot read {sysctl}"))?,
    };
    if now == new {
        write_sysctl(sysctl, old)?;
        Ok(Reverted::Done)
    } else if now == old {
        Ok(Reverted::NotThere)
    } else {
        Ok(Reverted::LeftAlone(format!(
            "{sysctl} is {now} now; tapnat had set it from {old} to {new}"
        )))
    }
}

fn remove_directory(path: &Path) -> Result<Reverted> {
    if !files::remove(path)? {
        return Ok(Reverted::NotThere);
    }
    if let Some(parent) = path.parent() {
        // Other instances may still be in it.
        let _ = fs::remove_dir(parent);
    }
    Ok(Reverted::Done)
}
