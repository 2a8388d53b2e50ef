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
    let mut walk = Walk::default();
    while !walk.is_over() {
        for (key, value) in walk.next(map)? {
            visit(key, value)?;
        }
    }
    Ok(())
}

/// Where a walk through a hash table is, which can be interrupted between any two batches.
#[derive(Clone, Debug)]
pub struct Walk<K, V> {
    entries: usize,
    /// The kernel's cursor, a bucket's number: where to go on.
    position: Option<u32>,
    is_over: bool,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K, V> Default for Walk<K, V> {
    fn default() -> Self {
        Self {
            entries: ENTRIES,
            position: None,
            is_over: false,
            keys: Vec::new(),
            values: Vec::new(),
        }
    }
}

impl<K: Pod + Default, V: Pod + Default> Walk<K, V> {
    /// Whether every bucket was seen.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Reads some more entries of the table, a few thousand at most unless a bucket holds more.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn next(&mut self, map: &MapData) -> Result<impl Iterator<Item = (&K, &V)>> {
        let count = loop {
            self.keys.resize(self.entries, K::default());
            self.values.resize(self.entries, V::default());
            let mut position = self.position.unwrap_or_default();
            let mut next = 0u32;
            let mut attributes = Attributes {
                in_batch: match self.position {
                    None => 0,
                    Some(_) => address(&raw mut position),
                },
                out_batch: address(&raw mut next),
                keys: address(self.keys.as_mut_ptr()),
                values: address(self.values.as_mut_ptr()),
                count: u32::try_from(self.entries)
                    .context("a table's bucket is too full to be read")?,
                map: map.fd().as_fd().as_raw_fd(),
                element_flags: 0,
                flags: 0,
            };
            match lookup(&mut attributes) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => self.is_over = true,
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    self.entries *= 2;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("the kernel refuses to list a table"),
            }
            self.position = Some(next);
            break attributes.count as usize;
        };
        Ok(self.keys.iter().zip(&self.values).take(count))
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
