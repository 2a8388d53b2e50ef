//! The names that values have in what is printed, the same for people and for programs.

use serde::Serializer;
use tapnat_common::{
    abi::{Filtering, MappingMode},
    nat::session::State,
    verdict::{Outcome, Reason},
};

use crate::{
    config::{Firewall, filtering_label, mapping_label},
    journal::Role,
};

/// A value that is printed by its name, which stays as it is: programs read it.
pub trait Label: Copy {
    #[must_use]
    fn label(self) -> &'static str;
}

/// Serialises a value by its name.
pub(crate) fn by_name<S: Serializer>(value: &impl Label, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(value.label())
}

impl Label for State {
    fn label(self) -> &'static str {
        self.label()
    }
}

impl Label for Reason {
    fn label(self) -> &'static str {
        self.label()
    }
}

impl Label for Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Ask => "ask",
            Self::Drop => "drop",
            Self::Refuse => "refuse",
            Self::Hold => "hold",
            Self::Fragment => "fragment",
            Self::Forward => "forward",
        }
    }
}

impl Label for Filtering {
    fn label(self) -> &'static str {
        filtering_label(self)
    }
}

impl Label for MappingMode {
    fn label(self) -> &'static str {
        mapping_label(self)
    }
}

impl Label for Role {
    fn label(self) -> &'static str {
        match self {
            Self::Inside => "inside",
            Self::Uplink => "uplink",
        }
    }
}

impl Label for Firewall {
    fn label(self) -> &'static str {
        match self {
            Self::Bypass => "bypass",
            Self::Ask => "ask",
        }
    }
}
