//! An endpoint-independent mapping.

use std::net::IpAddr;

use serde::Serialize;
use tapnat_common::{
    abi::{EndpointKey, Mapping, mapping_flags},
    nat::STAMP_AFTER,
    time::Instant,
};

use super::{Endpoint, Label, Protocol, label, seconds_left};
use crate::family::IpFamily;

/// Where a mapping came from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MappingKind {
    /// A guest's packet.
    Dynamic,
    /// The operator.
    Static,
}

impl Label for MappingKind {
    fn label(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Static => "static",
        }
    }
}

/// An endpoint-independent mapping.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct MappingView {
    pub protocol: Protocol,
    pub inside: Endpoint,
    pub outside: Endpoint,
    #[serde(serialize_with = "label::by_name")]
    pub kind: MappingKind,
    /// Sessions that stand on it.
    pub sessions: u32,
    /// Never less than of the sessions that stand on it; null for one that stays.
    pub expires_in_seconds: Option<u64>,
}

impl MappingView {
    /// The mapping with this outside endpoint, at `now`. None when it is past its time.
    #[must_use]
    pub fn new<A: IpFamily>(
        outside: &EndpointKey<A>,
        mapping: &Mapping<A>,
        now: Instant,
    ) -> Option<Self> {
        let stays = mapping.flags & mapping_flags::STATIC != 0;
        if !stays && !now.is_before(mapping.expires_at) {
            return None;
        }
        Some(Self {
            protocol: Protocol(outside.protocol),
            inside: Endpoint::new(mapping.inside.address, mapping.inside.port),
            outside: Endpoint::new(outside.address, outside.port),
            kind: if stays {
                MappingKind::Static
            } else {
                MappingKind::Dynamic
            },
            sessions: mapping.sessions,
            expires_in_seconds: (!stays)
                .then(|| seconds_left(mapping.expires_at.since(now), STAMP_AFTER)),
        })
    }

    /// The same mapping, of the guest with this address.
    #[must_use]
    pub fn of_guest(mut self, address: IpAddr) -> Self {
        self.inside.address = address;
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tapnat_common::net::{Be16, protocol};

    use super::*;
    use crate::view::tests::{address, at};

    #[test]
    fn a_mapping_as_json() {
        let outside = EndpointKey::new(address("192.0.2.10"), Be16::new(41000), protocol::UDP);
        let mut mapping = Mapping {
            inside: EndpointKey::new(address("10.0.0.2"), Be16::new(40000), protocol::UDP),
            expires_at: at(1300),
            sessions: 2,
            ..Mapping::default()
        };
        let view = MappingView::new(&outside, &mapping, at(1000)).unwrap();
        assert_eq!(
            serde_json::to_value(&view).unwrap(),
            json!({
                "protocol": "udp",
                "inside": {"address": "10.0.0.2", "port": 40000},
                "outside": {"address": "192.0.2.10", "port": 41000},
                "kind": "dynamic",
                "sessions": 2,
                "expires_in_seconds": 300,
            })
        );
        assert_eq!(MappingView::new(&outside, &mapping, at(1301)), None);
        mapping.flags = mapping_flags::STATIC;
        let view = MappingView::new(&outside, &mapping, at(1301)).unwrap();
        assert_eq!(
            (view.kind, view.expires_in_seconds),
            (MappingKind::Static, None)
        );
    }
}
