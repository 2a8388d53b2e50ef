//! A session as a guest has it.

use std::net::IpAddr;

use serde::Serialize;
use tapnat_common::{
    abi::{FlowKey, Session, Settings, session_flags, setting_flags},
    nat::{
        STAMP_AFTER,
        session::{Half, State, last_kept, state, timeout},
    },
    time::{Instant, Ticks},
};

use super::{Directions, Endpoint, Protocol, label, seconds_left};
use crate::family::IpFamily;

/// A session, seen from the guest that it belongs to. One between two guests over an outside
/// address is shown from the side of the guest that began it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Flow {
    pub protocol: Protocol,
    /// The guest.
    pub inside: Endpoint,
    /// What the world sees in its place.
    pub outside: Endpoint,
    /// Whom the guest talks to.
    pub remote: Endpoint,
    /// `opening`, `established`, `closing` or `reset` for TCP, else `one-way` or `two-way`.
    #[serde(serialize_with = "label::by_name")]
    pub state: State,
    /// Since the last packet of either direction, to within a second.
    pub idle_seconds: u64,
    /// Until the session ends if no packet comes.
    pub expires_in_seconds: u64,
    /// Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<Directions>,
    /// Of IP packets, headers included. Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Directions>,
}

impl Flow {
    /// The session that this half belongs to, at `now`. None when the session is shown from its
    /// other half, and when it is past its time and counts as absent.
    #[must_use]
    pub fn from_half<A: IpFamily>(
        key: &FlowKey<A>,
        half: &Session<A>,
        twin: Option<&Session<A>>,
        settings: &Settings<A>,
        now: Instant,
    ) -> Option<Self> {
        key.arrival.device()?;
        let between_guests = half.flags & session_flags::TO_INSIDE != 0;
        if between_guests && half.flags & session_flags::INITIATOR == 0 {
            return None;
        }
        let number = key.arrival.protocol();
        let one = Half::from(half);
        let other = twin.map_or(one, Half::from);
        let state = state(number, one, other);
        let inbound_refresh = settings.flags & setting_flags::INBOUND_REFRESH != 0;
        let kept = last_kept(number, one, other, inbound_refresh);
        let expires_at = kept
            .after(timeout(number, state, &settings.timeouts))
            .after(STAMP_AFTER);
        if !now.is_before(expires_at) {
            return None;
        }
        let twin = twin.copied().unwrap_or_default();
        let counted = settings.flags & setting_flags::COUNTED != 0;
        Some(Self {
            protocol: Protocol(number),
            inside: Endpoint::new(key.source, key.source_port),
            outside: Endpoint::new(half.source, half.source_port),
            remote: Endpoint::new(key.destination, key.destination_port),
            state,
            idle_seconds: seconds(now.since(one.last_seen.later_of(other.last_seen))),
            expires_in_seconds: seconds_left(expires_at.since(now), STAMP_AFTER),
            packets: counted.then_some(Directions {
                outbound: half.packets,
                inbound: twin.packets,
            }),
            bytes: counted.then_some(Directions {
                outbound: half.bytes,
                inbound: twin.bytes,
            }),
        })
    }

    /// The same session, of the guest with this address.
    #[must_use]
    pub fn of_guest(mut self, address: IpAddr) -> Self {
        self.inside.address = address;
        self
    }
}

fn seconds(ticks: Ticks) -> u64 {
    ticks.milliseconds() / 1000
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tapnat_common::{
        abi::{Arrival, NextHop, tcp_state},
        net::{Be16, protocol},
    };

    use super::*;
    use crate::view::tests::{address, at, settings};

    const TAP: u32 = 7;

    /// The guest's half of a session to 198.51.100.7:443, last seen at second 1000, and its twin.
    fn session(protocol: u8) -> (FlowKey, Session, Session) {
        let key = FlowKey {
            source: address("10.0.0.2"),
            destination: address("198.51.100.7"),
            source_port: Be16::new(40000),
            destination_port: Be16::new(443),
            arrival: Arrival::inside(TAP.try_into().unwrap(), protocol),
        };
        let half = Session {
            source: address("192.0.2.10"),
            destination: key.destination,
            source_port: Be16::new(41000),
            destination_port: key.destination_port,
            last_seen: at(1000),
            tcp: tcp_state::STEADY,
            flags: session_flags::INITIATOR,
            ..Session::default()
        };
        let twin = Session {
            source: key.destination,
            destination: key.source,
            source_port: key.destination_port,
            destination_port: key.source_port,
            next_hop: NextHop {
                device: TAP,
                ..NextHop::default()
            },
            last_seen: at(1004),
            tcp: tcp_state::STEADY,
            flags: session_flags::TO_INSIDE,
            ..Session::default()
        };
        (key, half, twin)
    }

    #[test]
    fn a_flow_as_json() {
        let (key, mut half, mut twin) = session(protocol::TCP);
        (half.packets, half.bytes) = (3, 180);
        (twin.packets, twin.bytes) = (2, 3000);
        let counting = Settings {
            flags: setting_flags::COUNTED,
            ..settings()
        };
        let now = at(1010).after(Ticks::new(100));
        let flow = Flow::from_half(&key, &half, Some(&twin), &counting, now).unwrap();
        assert_eq!(
            serde_json::to_value(&flow).unwrap(),
            json!({
                "protocol": "tcp",
                "inside": {"address": "10.0.0.2", "port": 40000},
                "outside": {"address": "192.0.2.10", "port": 41000},
                "remote": {"address": "198.51.100.7", "port": 443},
                "state": "established",
                "idle_seconds": 6,
                "expires_in_seconds": 7434,
                "packets": {"outbound": 3, "inbound": 2},
                "bytes": {"outbound": 180, "inbound": 3000},
            })
        );
    }

    #[test]
    fn without_counting_there_are_no_counts() {
        let (key, half, twin) = session(protocol::TCP);
        let flow = Flow::from_half(&key, &half, Some(&twin), &settings(), at(1010)).unwrap();
        let json = serde_json::to_value(&flow).unwrap();
        assert!(
            json.get("packets").is_none() && json.get("bytes").is_none(),
            "{json}"
        );
    }

    #[test]
    fn each_session_is_shown_once() {
        let (key, half, twin) = session(protocol::UDP);
        let twin_key = half.twin_key(&key);
        assert_eq!(twin_key.arrival.device(), None);
        assert!(Flow::from_half(&twin_key, &twin, Some(&half), &settings(), at(1010)).is_none());
        // Between guests both halves arrive on inside devices.
        let mut half = half;
        half.flags |= session_flags::TO_INSIDE;
        half.next_hop.device = TAP + 1;
        let twin_key = half.twin_key(&key);
        assert_eq!(twin_key.arrival.device().map(Into::into), Some(TAP + 1));
        assert!(Flow::from_half(&key, &half, Some(&twin), &settings(), at(1010)).is_some());
        assert!(Flow::from_half(&twin_key, &twin, Some(&half), &settings(), at(1010)).is_none());
    }

    #[test]
    fn what_is_past_its_time_is_not_shown() {
        let (key, half, mut twin) = session(protocol::UDP);
        let shown = |now, twin: &Session| {
            Flow::from_half(&key, &half, Some(twin), &settings(), at(now)).is_some()
        };
        assert!(shown(1299, &twin));
        // The reply at second 1004 does not keep it (RFC 4787 REQ-6).
        assert!(!shown(1302, &twin));
        twin.tcp = 0;
        let flow = Flow::from_half(&key, &half, Some(&twin), &settings(), at(1010)).unwrap();
        assert_eq!(flow.state, State::OneWay);
        assert!(Flow::from_half(&key, &half, None, &settings(), at(1010)).is_some());
    }
}
