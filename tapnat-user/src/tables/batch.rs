//! Reads whole hash tables with few system calls (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6), which the BPF
//! library does not offer. Walks bucket by bucket, so that it ends while other CPUs insert and
//! delete; entries that come or go meanwhile are seen or not.

use std::{
    ffi::{c_int, c_long},
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::{Context as _, Result};
use aya::{Pod, maps::MapData};

/// `enum bpf_cmd` of `include/uapi/linux/bpf.h`.
const BPF_MAP_LOOKUP_BATCH: c_int = 24;
/// Entries asked for at once; more are asked for when one bucket holds more.
const ENTRIES: usize = 4096;

/// The `batch` part of `union bpf_attr`.
#[repr(C)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: c_int,
    element_flags: u64,
    flags: u64,
}

/// Calls `visit` with every entry of a hash table. `K` and `V` must be as large as the table's keys
/// and values are.
///
/// # Errors
///
/// What the kernel answers, or what `visit` does.
pub fn for_each<K, V>(map: &MapData, mut visit: impl FnMut(&K, &V) -> Result<()>) -> Result<()>
where
    K: Pod + Default,
    V: Pod + Default,
{
    let mut entries = ENTRIES;
    // The kernel's cursor: a bucket's number.
    let (mut cursor, mut next) = (0u32, 0u32);
    let mut first = true;
    let (mut keys, mut values) = (Vec::<K>::new(), Vec::<V>::new());
    loop {
        keys.resize(entries, K::default());
        values.resize(entries, V::default());
        let mut attributes = Attributes {
            in_batch: if first { 0 } else { address(&raw mut cursor) },
            out_batch: address(&raw mut next),
            keys: address(keys.as_mut_ptr()),
            values: address(values.as_mut_ptr()),
            count: u32::try_from(entries).context("a table's bucket is too full to be read")?,
            map: map.fd().as_fd().as_raw_fd(),
            element_flags: 0,
            flags: 0,
        };
        let outcome = lookup(&mut attributes);
        let last = match outcome {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                entries *= 2;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("the kernel refuses to list a table"),
        };
        for (key, value) in keys.iter().zip(&values).take(attributes.count as usize) {
            visit(key, value)?;
        }
        if last {
            return Ok(());
        }
        cursor = next;
        first = false;
    }
}

fn address<T>(pointer: *mut T) -> u64 {
    pointer.expose_provenance() as u64
}

fn lookup(attributes: &mut Attributes) -> io::Result<()> {
    // SAFETY: the kernel writes at most `count` keys and values, and one cursor, to buffers that
    // the caller keeps; the map's descriptor is open.
    let result: c_long = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_LOOKUP_BATCH,
            &raw mut *attributes,
            size_of::<Attributes>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
