//! Creates the taps that tapnat makes itself. Owns the flags such a tap has; addresses, link state
//! and removal go through [`super::netlink`].

use std::{
    ffi::{c_int, c_short, c_ulong},
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    str::FromStr,
};

use anyhow::{Context as _, Error, Result, anyhow};
use clap::ValueEnum;
use nix::unistd::User;
use serde::{Deserialize, Serialize};

/// `IFF_TUN_EXCL` refuses a tap that somebody else made in the meantime.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the kernel reads these 16 bits as unsigned"
)]
const FLAGS: c_short =
    (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL) as c_short;
#[expect(clippy::cast_possible_truncation, reason = "the value is 0x100")]
const MULTI_QUEUE: c_short = libc::IFF_MULTI_QUEUE as c_short;
const CLONE_DEVICE: &str = "/dev/net/tun";

/// How many queues a tap can have. Every program that opens the tap later has to say the same, or
/// the kernel answers `EINVAL` (`tun_set_iff()` in `drivers/net/tun.c`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Queues {
    /// One or more: QEMU opens it only with `queues=2` or more.
    #[default]
    Multi,
    /// Exactly one: QEMU opens it only without `queues=`.
    Single,
}

/// The user who may attach to a tap without `CAP_NET_ADMIN`, by number.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Owner(u32);

impl FromStr for Owner {
    type Err = Error;

    /// Reads a user's name, or the number of one who need not be known here.
    fn from_str(text: &str) -> Result<Self> {
        if let Ok(number) = text.parse() {
            return Ok(Self(number));
        }
        let user = User::from_name(text).with_context(|| format!("cannot look for {text}"))?;
        user.map(|user| Self(user.uid.as_raw()))
            .with_context(|| format!("there is no user '{text}' here: `getent passwd` lists them"))
    }
}

/// Creates a persistent tap called `name`, down and without addresses, in the caller's network
/// namespace. It has a vnet header, so that a guest's checksum and segmentation offloads pass. Without
/// an owner every user who may open `/dev/net/tun` can attach to it.
///
/// # Errors
///
/// When `/dev/net/tun` cannot be opened, when the name is taken (`EBUSY`) or impossible, and without
/// `CAP_NET_ADMIN`.
pub fn create(name: &str, queues: Queues, owner: Option<Owner>) -> Result<()> {
    let opened = OpenOptions::new().read(true).write(true).open(CLONE_DEVICE);
    let device = opened.map_err(|error| explain(&error, name))?;
    claim(&device, name, queues).with_context(|| format!("cannot create the tap {name}"))?;
    if let Some(owner) = owner {
        give(&device, owner)
            .with_context(|| format!("cannot give the tap {name} to user {}", owner.0))?;
    }
    persist(&device).with_context(|| format!("cannot make the tap {name} persistent"))
}

fn explain(error: &io::Error, name: &str) -> Error {
    let way_out = if error.kind() == io::ErrorKind::PermissionDenied {
        "run as root, or let this user open it"
    } else {
        "load the tun module (`modprobe tun`)"
    };
    anyhow!(
        "cannot open {CLONE_DEVICE} ({error}): {way_out}, or create {name} yourself (`ip tuntap add \
         {name} mode tap vnet_hdr`)"
    )
}

fn claim(device: &File, name: &str, queues: Queues) -> io::Result<()> {
    let flags = match queues {
        Queues::Multi => FLAGS | MULTI_QUEUE,
        Queues::Single => FLAGS,
    };
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed();
    }
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `ifreq`, which outlives
    // the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

fn give(device: &File, owner: Owner) -> io::Result<()> {
    // SAFETY: the descriptor is open, and TUNSETOWNER takes its argument by value.
    check(unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            libc::TUNSETOWNER,
            c_ulong::from(owner.0),
        )
    })
}

fn persist(device: &File) -> io::Result<()> {
    const PERSISTENT: c_ulong = 1;
    // SAFETY: the descriptor is open, and TUNSETPERSIST takes its argument by value.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST, PERSISTENT) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_have_names_and_numbers() {
        assert_eq!("root".parse::<Owner>().unwrap(), Owner(0));
        assert_eq!("4242".parse::<Owner>().unwrap(), Owner(4242));
        for nobody in ["no such user", "-1", ""] {
            let said = nobody.parse::<Owner>().unwrap_err().to_string();
            assert!(said.contains("getent"), "{said}");
        }
    }

    #[test]
    fn the_way_out_is_that_of_the_error() {
        let said = |number| explain(&io::Error::from_raw_os_error(number), "tap0").to_string();
        for number in [libc::ENOENT, libc::ENODEV] {
            assert!(said(number).contains("modprobe tun"), "{}", said(number));
        }
        for number in [libc::EACCES, libc::EPERM] {
            let said = said(number);
            assert!(
                said.contains("run as root") && !said.contains("modprobe"),
                "{said}"
            );
        }
    }
}
