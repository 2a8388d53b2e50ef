//! How full the tables are.

use serde::Serialize;

use crate::tables::Usage;

/// How full the tables are.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct TablesView {
    pub sessions: UsageView,
    pub mappings: UsageView,
    pub guests: UsageView,
}

impl TablesView {
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            sessions: self.sessions.plus(other.sessions),
            mappings: self.mappings.plus(other.mappings),
            guests: self.guests.plus(other.guests),
        }
    }
}

/// How full the tables of each family are.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct FamiliesView {
    pub ipv4: TablesView,
    /// Null where IPv6 is not translated.
    pub ipv6: Option<TablesView>,
}

impl FamiliesView {
    /// Both together.
    #[must_use]
    pub fn sum(self) -> TablesView {
        self.ipv6.map_or(self.ipv4, |ipv6| self.ipv4.plus(ipv6))
    }

    /// Those that there are, with their names.
    pub fn named(self) -> impl Iterator<Item = (&'static str, TablesView)> {
        let ipv6 = self.ipv6.map(|it| ("ipv6", it));
        std::iter::once(("ipv4", self.ipv4)).chain(ipv6)
    }
}

/// How full one table is. What is past its time and not yet collected counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct UsageView {
    pub used: u64,
    pub capacity: u32,
}

impl UsageView {
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            used: self.used.saturating_add(other.used),
            capacity: self.capacity.saturating_add(other.capacity),
        }
    }
}

impl From<Usage> for UsageView {
    fn from(usage: Usage) -> Self {
        Self {
            used: usage.used,
            capacity: usage.capacity,
        }
    }
}
