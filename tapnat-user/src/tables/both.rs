//! The tables of both families of one instance, for what shows them. IPv4's are always there.

use std::path::Path;

use tapnat_common::net::Be128;

use super::{PinnedTables, Unusable};

/// The tables of an instance.
pub struct BothTables {
    pub ipv4: PinnedTables,
    /// Absent where IPv6 is not translated.
    pub ipv6: Option<PinnedTables<Be128>>,
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
        Ok(Self {
            ipv4: PinnedTables::open(directory)?,
            ipv6,
        })
    }
}
