//! The tables of both families of one instance, for what shows them. IPv4's are always there.

use std::path::Path;

use anyhow::Result;
use tapnat_common::{embed::Prefix, net::Be128, nptv6::PrefixPair};

use super::{PinnedTables, PrefixTables, Unusable};

/// The tables of an instance.
pub struct BothTables {
    pub ipv4: PinnedTables,
    /// Absent where IPv6 is not translated.
    pub ipv6: Option<PinnedTables<Be128>>,
    prefixes: Option<PrefixTables>,
}

impl BothTables {
    /// Opens the tables pinned in `directory`.
    ///
    /// # Errors
    ///
    /// With the reason why they cannot be used.
    pub fn open(directory: &Path) -> Result<Self, Unusable> {
        let ipv6 = match PinnedTables::open(directory) {
            Ok(tables) => Some(tables),
            Err(Unusable::Unfinished) => None,
            Err(reason) => return Err(reason),
        };
        let prefixes = ipv6.is_some().then(|| PrefixTables::open(directory));
        Ok(Self {
            ipv4: PinnedTables::open(directory)?,
            ipv6,
            prefixes: prefixes.transpose()?,
        })
    }

    /// The prefix of NAT64, if there is one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn nat64(&self) -> Result<Option<Prefix>> {
        match &self.ipv6 {
            Some(tables) => tables.nat64(),
            None => Ok(None),
        }
    }

    /// The pairs of prefixes that are translated into each other.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn prefix_pairs(&self) -> Result<Vec<PrefixPair>> {
        let tables = self.prefixes.as_ref();
        tables.map_or_else(|| Ok(Vec::new()), PrefixTables::pairs)
    }
}
