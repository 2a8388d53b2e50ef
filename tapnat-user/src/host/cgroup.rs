//! The root of the control groups, where programs for the host's sockets are attached. Finds and
//! opens it; never makes, moves or mounts anything.

use std::{fs::File, path::Path};

use rustix::fs::{FsWord, statfs};

/// Where systemd mounts version 2, alone and beside version 1; and the same as the first process sees
/// them, which `ip netns exec` hides.
const MOUNT_POINTS: [&str; 4] = [
    "/sys/fs/cgroup",
    "/sys/fs/cgroup/unified",
    "/proc/1/root/sys/fs/cgroup",
    "/proc/1/root/sys/fs/cgroup/unified",
];
/// `CGROUP2_SUPER_MAGIC` of `include/uapi/linux/magic.h`.
const MAGIC: FsWord = 0x6367_7270;

/// Opens the root, if version 2 is mounted where it usually is.
#[must_use]
pub fn open_root() -> Option<File> {
    MOUNT_POINTS
        .map(Path::new)
        .into_iter()
        .find(|path| statfs(*path).is_ok_and(|it| it.f_type == MAGIC))
        .and_then(|path| File::open(path).ok())
}
