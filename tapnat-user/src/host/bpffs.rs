//! The BPF file system that pins live in: finds it, mounts it, and takes the mount away again.
//! What is pinned there is not its business.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::{
    fs::{FsWord, statfs},
    mount::{MountFlags, UnmountFlags, mount as mount_at, unmount as unmount_from},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// Where every tool looks for it.
const MOUNT_POINT: &str = "/sys/fs/bpf";
/// The same place as the first process sees it. `ip netns exec` gives its program a mount namespace
/// of its own, where a fresh `/sys` hides the real one; what is pinned there would vanish with the
/// program, and `tapnat flows` in another shell would never see it.
const INIT_MOUNT_POINT: &str = "/proc/1/root/sys/fs/bpf";
const INIT_NAMESPACE: &str = "/proc/1/ns/mnt";
const OWN_NAMESPACE: &str = "/proc/self/ns/mnt";
/// `BPF_FS_MAGIC` of `include/uapi/linux/magic.h`.
const MAGIC: FsWord = 0xcafe_4a11;

/// The path to the BPF file system, if one is mounted in its usual place.
#[must_use]
pub fn find() -> Option<PathBuf> {
    [MOUNT_POINT, INIT_MOUNT_POINT]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| is_bpffs(path))
}

/// Whether this is the way through the first process's root directory, which is a privilege.
#[must_use]
pub fn is_elsewhere(path: &Path) -> bool {
    path.starts_with(INIT_MOUNT_POINT)
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|statistics| statistics.f_type == MAGIC)
}

/// Mounts the BPF file system in its usual place and returns the path to it. The mount is made in
/// the first process's mount namespace, where it outlives this one, unless that is out of reach.
///
/// # Errors
///
/// Without `CAP_SYS_ADMIN`, and when the kernel has no BPF file system.
pub fn mount() -> Result<PathBuf> {
    in_init_namespace(|| {
        // Only root gets in: pins are handles to the kernel's tables.
        mount_at("bpf", MOUNT_POINT, "bpf", MountFlags::empty(), c"mode=700").map_err(Into::into)
    })
    .with_context(|| {
        format!(
            "cannot mount the BPF file system: mount it yourself (`mount -t bpf bpf {MOUNT_POINT}`)"
        )
    })?;
    find().ok_or_else(|| anyhow!("{MOUNT_POINT} is not the BPF file system that was mounted there"))
}

/// Unmounts the BPF file system unless something is pinned in it. `false` when it was left mounted
/// or was not mounted.
///
/// # Errors
///
/// When it cannot be listed, and without `CAP_SYS_ADMIN`.
pub fn unmount_if_empty() -> Result<bool> {
    let Some(root) = find() else { return Ok(false) };
    if is_occupied(&root).with_context(|| format!("cannot list {}", root.display()))? {
        return Ok(false);
    }
    match in_init_namespace(|| {
        unmount_from(MOUNT_POINT, UnmountFlags::NOFOLLOW).map_err(Into::into)
    }) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        Err(error) => bail!("cannot unmount {MOUNT_POINT}: {error}"),
    }
}

fn is_occupied(root: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(root)? {
        // Names with dots are the kernel's own (`bpf_lookup()` in `kernel/bpf/inode.c`).
        if !entry?.file_name().as_encoded_bytes().contains(&b'.') {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Runs `action` in the mount namespace of the first process, on a thread of its own where that is
/// not the caller's, since a thread cannot come back.
fn in_init_namespace(action: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    match fs::read_link(INIT_NAMESPACE) {
        Ok(init) if init != fs::read_link(OWN_NAMESPACE)? => {}
        // Here already, or in a container that has no way out of its own.
        _ => return action(),
    }
    let namespace = File::open(INIT_NAMESPACE)?;
    thread::scope(|scope| {
        thread::Builder::new()
            .spawn_scoped(scope, || {
                // SAFETY: only the thread's root and working directory stop being shared, and it
                // does nothing but the action after this.
                unsafe { unshare_unsafe(UnshareFlags::FS) }?;
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
                action()
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread in that namespace failed")))
    })
}
