//! Which network namespace a thread is in, and where another one can be entered from. Never moves
//! the process between namespaces.

use std::{
    ffi::c_int,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{fs::MetadataExt as _, net::UnixDatagram},
    },
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

const OWN: &str = "/proc/thread-self/ns/net";
/// `include/uapi/asm-generic/socket.h`; libc does not have it yet.
const SO_NETNS_COOKIE: c_int = 71;
const NAMED: &str = "/run/netns";

/// The identity of a network namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct NetworkNamespace {
    /// The inode of its file in nsfs, which the kernel uses again for a later namespace.
    inode: u64,
    /// `SO_NETNS_COOKIE`, which is never used again.
    cookie: u64,
}

impl NetworkNamespace {
    /// The calling thread's.
    ///
    /// # Errors
    ///
    /// When `/proc` is not mounted, or no socket can be made.
    pub fn current() -> Result<Self> {
        Self::of_this_thread().context("cannot tell which network namespace this is")
    }

    /// By what the kernel tells it to its programs.
    #[must_use]
    pub fn cookie(self) -> u64 {
        self.cookie
    }

    fn of_this_thread() -> io::Result<Self> {
        Ok(Self {
            inode: fs::metadata(OWN)?.ino(),
            cookie: cookie()?,
        })
    }

    fn of_file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        thread::scope(|scope| {
            thread::Builder::new()
                .spawn_scoped(scope, || {
                    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                    Self::of_this_thread()
                })?
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread in that namespace failed")))
        })
    }

    /// A path that `nsenter --net=` takes, or `None` when neither a process nor a name holds this
    /// namespace any more.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be listed.
    pub fn find(&self) -> Result<Option<PathBuf>> {
        if *self == Self::current()? {
            return Ok(Some(OWN.into()));
        }
        let named = fs::read_dir(NAMED)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let of_processes = fs::read_dir("/proc")
            .map_err(|error| anyhow!(error).context("cannot list the processes in /proc"))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit())
            })
            .map(|path| path.join("ns/net"));
        // A process may end, or be out of our reach, while we look.
        Ok(named.chain(of_processes).find(|path| {
            fs::metadata(path).is_ok_and(|metadata| metadata.ino() == self.inode)
                && Self::of_file(path).is_ok_and(|found| found == *self)
        }))
    }
}

fn cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let mut cookie = 0u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: the socket is open, and the kernel writes at most `length` bytes into `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(cookie);
    }
    match io::Error::last_os_error() {
        // Before Linux 5.14, which refuses the programs later: then it is told why.
        error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(0),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_namespace_of_this_process() {
        let current = NetworkNamespace::current().unwrap();
        let path = current.find().unwrap().unwrap();
        assert_eq!(fs::metadata(path).unwrap().ino(), current.inode);
    }

    #[test]
    fn a_namespace_that_reuses_the_inode_is_another_one() {
        let current = NetworkNamespace::current().unwrap();
        let earlier = NetworkNamespace {
            cookie: current.cookie + 1,
            ..current
        };
        assert_eq!(earlier.find().unwrap(), None);
    }
}
