//! Single mappings, as the operator makes and takes them away. The datapath makes its own at the
//! same time: an insert that must not replace anything decides whose a port is.

use std::io;

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{HashMap, MapData, MapError},
};
use tapnat_common::abi::{EndpointKey, Mapping, Permission, PermissionKey, mapping_flags};

use super::PinnedTables;
use crate::family::IpFamily;

/// `BPF_ANY` and `BPF_NOEXIST` of `include/uapi/linux/bpf.h`.
const ANY: u64 = 0;
const ONLY_NEW: u64 = 1;

impl<A: IpFamily> PinnedTables<A> {
    /// The mappings that the operator made, by their outside endpoints.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn static_mappings(&self) -> Result<Vec<(EndpointKey<A>, Mapping<A>)>> {
        let mut mappings = Vec::new();
        self.for_each_mapping(|outside, mapping| {
            if mapping.flags & mapping_flags::STATIC != 0 {
                mappings.push((*outside, *mapping));
            }
            Ok(())
        })?;
        Ok(mappings)
    }

    /// The mapping with this outside endpoint.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn mapping(&self, outside: &EndpointKey<A>) -> Result<Option<Mapping<A>>> {
        get(&self.mappings, *outside)
    }

    /// The outside endpoint of an inside one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn outside_of(&self, inside: &EndpointKey<A>) -> Result<Option<EndpointKey<A>>> {
        get(&self.inside, *inside)
    }

    /// Until when a remote may send to a mapping.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn permission(&self, key: &PermissionKey<A>) -> Result<Option<Permission>> {
        get(&self.permissions, *key)
    }

    /// Adds a mapping, with the way from its inside endpoint unless that has one. `false` when the
    /// outside endpoint is taken.
    ///
    /// # Errors
    ///
    /// When the table is full, or the kernel refuses.
    pub fn insert_mapping(
        &mut self,
        outside: &EndpointKey<A>,
        mapping: &Mapping<A>,
    ) -> Result<bool> {
        let inserted = insert_new(&mut self.mappings, *outside, mapping)
            .context("no room for another mapping: raise --max-sessions")?;
        if inserted {
            insert_new(&mut self.inside, mapping.inside, outside)
                .context("no room for another mapping: raise --max-sessions")?;
        }
        Ok(inserted)
    }

    /// Puts a mapping in the place of the one that is there.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn replace_mapping(
        &mut self,
        outside: &EndpointKey<A>,
        mapping: &Mapping<A>,
    ) -> Result<()> {
        if let Some(before) = self.mapping(outside)?
            && before.inside != mapping.inside
        {
            self.remove_way_out(before.inside, *outside)?;
        }
        self.mappings
            .insert(outside, mapping, ANY)
            .context("cannot write the table of mappings")?;
        insert_new(&mut self.inside, mapping.inside, outside)
            .context("cannot write the table of mappings")?;
        Ok(())
    }

    /// Removes a mapping, with the way from its inside endpoint. Sessions that stand on it go on.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn remove_mapping(&mut self, outside: &EndpointKey<A>) -> Result<()> {
        let Some(mapping) = self.mapping(outside)? else {
            return Ok(());
        };
        // First the one by which the datapath would find it from inside.
        self.remove_way_out(mapping.inside, *outside)?;
        gone_is_fine(self.mappings.remove(outside)).context("cannot write the table of mappings")
    }

    /// An inside endpoint may be behind several outside ones; only one of them is its way out.
    fn remove_way_out(&mut self, inside: EndpointKey<A>, outside: EndpointKey<A>) -> Result<()> {
        if get(&self.inside, inside)? == Some(outside) {
            gone_is_fine(self.inside.remove(&inside))
                .context("cannot write the table of mappings")?;
        }
        Ok(())
    }
}

fn get<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>, key: K) -> Result<Option<V>> {
    match map.get(&key, 0) {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).context("cannot read the table of mappings"),
    }
}

/// `false` when the key was there.
fn insert_new<A: IpFamily, V: Pod>(
    map: &mut HashMap<MapData, EndpointKey<A>, V>,
    key: EndpointKey<A>,
    value: &V,
) -> Result<bool, MapError> {
    match map.insert(key, value, ONLY_NEW) {
        Ok(()) => Ok(true),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == io::ErrorKind::AlreadyExists =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Whether it was there or not, it is gone.
pub(super) fn gone_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}
