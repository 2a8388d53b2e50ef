//! What looks show, field by field as programs get it in JSON. [`crate::view`] has what does not
//! depend on time.

use std::net::IpAddr;

use serde::Serialize;

use super::{ports::PortsView, rates::Rates};
use crate::view::{DeviceView, Directions, FamiliesView, Flow, GuestView, ReasonView, TablesView};

/// What an instance does, as rates between two looks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Activity {
    pub schema: u32,
    pub instance: String,
    /// The process of `tapnat run`; null when none runs and the datapath works by itself.
    pub process: Option<i32>,
    /// Between the looks.
    pub seconds: f64,
    /// Whether there are rates of guests and sessions.
    pub counted: bool,
    /// As in a [`Status`](crate::view::Status).
    pub outside_addresses: Vec<IpAddr>,
    /// Of both families together.
    pub tables: TablesView,
    pub families: FamiliesView,
    /// Of each outside address.
    pub ports: Vec<PortsView>,
    pub devices: Vec<DeviceActivity>,
    /// As in a [`Status`](crate::view::Status).
    pub guests: Vec<GuestActivity>,
    pub reasons: Vec<ReasonActivity>,
    /// The sessions that carried the most, the busiest first; empty when sessions are not counted.
    pub busiest: Vec<FlowActivity>,
}

/// A device, and what passes through it, the host's own traffic included.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceActivity {
    #[serde(flatten)]
    pub device: DeviceView,
    /// Null where the device is in another network namespace.
    pub rates: Option<Rates>,
}

/// A guest, and what its sessions carry.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GuestActivity {
    #[serde(flatten)]
    pub guest: GuestView,
    /// Null when sessions are not counted.
    pub rates: Option<Rates>,
}

/// A guest, and all that is kept about it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct GuestDetail {
    #[serde(flatten)]
    pub guest: GuestView,
    /// That it is behind; null when that is gone.
    pub device: Option<String>,
    /// Sessions that it may have.
    pub max_sessions: u32,
    /// Outside ports that it may hold.
    pub max_ports: u32,
    /// Sessions that it may begin in a second; null for no limit.
    pub max_new_sessions: Option<u32>,
    /// Of the sessions that there are. Absent when sessions are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<Directions>,
    /// The same, of IP packets, headers included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Directions>,
}

/// Packets that left for a reason.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ReasonActivity {
    #[serde(flatten)]
    pub reason: ReasonView,
    pub per_second: f64,
}

/// A session, and what it carries.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlowActivity {
    #[serde(flatten)]
    pub flow: Flow,
    pub rates: Rates,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::samples::{activity, guest, uncounted},
        *,
    };
    use crate::view::SCHEMA;

    #[test]
    fn a_guest_as_json() {
        let detail = GuestDetail {
            guest: guest(10, 7, 2, 0.0).guest,
            device: Some("tap0".to_owned()),
            max_sessions: 100,
            max_ports: 50,
            max_new_sessions: None,
            packets: None,
            bytes: None,
        };
        assert_eq!(
            serde_json::to_value(detail).unwrap(),
            json!({
                "address": "10.0.0.10",
                "link_address": "02:00:00:00:00:0a",
                "sessions": 7,
                "ports": 7,
                "refused": 2,
                "stand_in": null,
                "device": "tap0",
                "max_sessions": 100,
                "max_ports": 50,
                "max_new_sessions": null,
            })
        );
    }

    #[test]
    fn an_activity_as_json() {
        let json = serde_json::to_value(activity()).unwrap();
        assert_eq!(json["schema"], SCHEMA);
        assert_eq!(json["devices"][1]["name"], "tap0");
        assert_eq!(
            json["guests"][0]["rates"]["outbound"],
            json!({"packets": 0.0, "bits": 0.0})
        );
        assert_eq!(json["reasons"][1]["reason"], "no-session");
        assert_eq!(json["reasons"][1]["per_second"], 3.0);
        assert_eq!(json["busiest"][0]["remote"]["port"], 443);
        assert_eq!(
            json["ports"][0]["tcp"],
            json!({"used": 11_000, "capacity": 27_231})
        );
        let json = serde_json::to_value(uncounted()).unwrap();
        assert_eq!(json["guests"][0]["rates"], json!(null));
    }
}
