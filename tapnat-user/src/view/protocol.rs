//! The names of IP protocols.

use std::borrow::Cow;

use tapnat_common::net::protocol;

/// In place of a protocol, of a mapping that is of a whole address.
pub const WHOLE: &str = "all";

/// The names of IP protocols that have one here.
const PROTOCOLS: [(u8, &str); 9] = [
    // Of a mapping for all protocols.
    (0, WHOLE),
    (protocol::ICMP, "icmp"),
    (protocol::TCP, "tcp"),
    (protocol::UDP, "udp"),
    (protocol::GRE, "gre"),
    (protocol::ESP, "esp"),
    (protocol::ICMPV6, "icmpv6"),
    (protocol::SCTP, "sctp"),
    (protocol::UDP_LITE, "udp-lite"),
];

/// The name of an IP protocol, or its number where it has no name here.
#[must_use]
pub fn protocol_label(number: u8) -> Cow<'static, str> {
    let known = PROTOCOLS.iter().find(|(known, _)| *known == number);
    match known {
        Some((_, name)) => Cow::Borrowed(name),
        None => Cow::Owned(number.to_string()),
    }
}

/// The number of an IP protocol by [its label](protocol_label), or by its number as text.
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
            assert_eq!(protocol_number(&protocol_label(number)), Some(number));
        }
        assert_eq!(protocol_number("6"), Some(protocol::TCP));
        for label in ["", "all", "0", "tpc", "256"] {
            assert_eq!(protocol_number(label), None, "{label}");
        }
    }
}
