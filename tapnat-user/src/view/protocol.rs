//! The names of IP protocols.

use std::{borrow::Cow, fmt};

use serde::{Serialize, Serializer};
use tapnat_common::net::protocol;

/// The label of [`Protocol::WHOLE`].
pub const WHOLE: &str = "all";

/// The names of IP protocols that have one here.
const PROTOCOLS: [(u8, &str); 9] = [
    // Of a mapping for all protocols.
    (Protocol::WHOLE.0, WHOLE),
    (protocol::ICMP, "icmp"),
    (protocol::TCP, "tcp"),
    (protocol::UDP, "udp"),
    (protocol::GRE, "gre"),
    (protocol::ESP, "esp"),
    (protocol::ICMPV6, "icmpv6"),
    (protocol::SCTP, "sctp"),
    (protocol::UDP_LITE, "udp-lite"),
];

/// An IP protocol, by its number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Protocol(pub u8);

impl Protocol {
    /// In place of one, of a mapping that is of a whole address.
    pub const WHOLE: Self = Self(0);

    /// Its name, or its number where it has no name here.
    #[must_use]
    pub fn label(self) -> Cow<'static, str> {
        let known = PROTOCOLS.iter().find(|(known, _)| *known == self.0);
        match known {
            Some((_, name)) => Cow::Borrowed(name),
            None => Cow::Owned(self.0.to_string()),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.label())
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.label())
    }
}

/// The number of an IP protocol by [its label](Protocol::label), or by its number as text.
#[must_use]
pub fn protocol_number(label: &str) -> Option<u8> {
    let known = PROTOCOLS.iter().find(|(_, name)| *name == label);
    known
        .map(|(number, _)| *number)
        .or_else(|| label.parse().ok())
        .filter(|number| *number != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_have_names_or_numbers() {
        for number in 1..=u8::MAX {
            assert_eq!(protocol_number(&Protocol(number).label()), Some(number));
        }
        assert_eq!(protocol_number("6"), Some(protocol::TCP));
        for label in ["", "all", "0", "tpc", "256"] {
            assert_eq!(protocol_number(label), None, "{label}");
        }
    }
}
