//! Looks at an instance: all that its tables and its devices' counters say at one time, and what
//! has happened between two of them.

use std::{collections::HashMap, time::Instant as Clock};

use anyhow::{Context as _, Result};
use procfs::net::dev_status;
use tapnat_common::abi::{Counter, setting_flags};

use super::{
    busiest::busiest,
    ports::{PortsView, ports_in_use},
    rates::{Passed, Span},
    status::{status_with, usage},
    traffic::{Part, Traffic},
    view::{Activity, DeviceActivity, GuestActivity, GuestDetail, ReasonActivity},
};
use crate::{
    host::namespace::NetworkNamespace,
    instance::InstanceName,
    journal::Journal,
    tables::{BothTables, PinnedTables, Usage},
    view::{DeviceView, Directions, FamiliesView, SCHEMA, Status, TablesView},
};

/// Everything at one time.
#[derive(Debug)]
pub struct Look {
    at: Clock,
    pub status: Status,
    ports: Vec<PortsView>,
    /// By the index of the device. Absent where the instance is in another network namespace.
    devices: HashMap<u32, Passed>,
    traffic: Option<Traffic>,
}

impl Look {
    /// Looks at an instance.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn take(name: &InstanceName, tables: &BothTables) -> Result<Self> {
        let at = Clock::now();
        let counted = tables.ipv4.settings()?.flags & setting_flags::COUNTED != 0;
        let mut traffic = counted.then(Traffic::default);
        let families = FamiliesView {
            ipv4: read_sessions(&tables.ipv4, traffic.as_mut())?,
            ipv6: match &tables.ipv6 {
                Some(tables) => Some(read_sessions(tables, traffic.as_mut())?),
                None => None,
            },
        };
        let status = status_with(name, tables, families)?;
        let is_here = Journal::load(name).unwrap_or(None).is_some_and(|journal| {
            NetworkNamespace::current().is_ok_and(|it| it == journal.network_namespace())
        });
        let devices = if is_here {
            device_counters(&status.devices)?
        } else {
            HashMap::new()
        };
        Ok(Self {
            at,
            ports: ports_in_use(tables)?,
            status,
            devices,
            traffic,
        })
    }

    /// What has happened since an earlier look at the same instance.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn since(&self, earlier: &Self, tables: &BothTables) -> Result<Activity> {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64();
        let span = Span { seconds };
        let status = &self.status;
        let devices = status.devices.iter().map(|device| {
            let passed = |look: &Self| look.devices.get(&device.index).copied();
            let rates = passed(earlier).zip(passed(self));
            DeviceActivity {
                device: device.clone(),
                rates: rates.map(|(before, after)| span.rates(before, after)),
            }
        });
        let guests = status.guests.iter().map(|guest| {
            let passed = |look: &Self| {
                let traffic = look.traffic.as_ref()?;
                let passed = traffic.guests.get(&guest.key());
                Some(passed.copied().unwrap_or_default())
            };
            let rates = passed(earlier).zip(passed(self));
            GuestActivity {
                guest: guest.clone(),
                rates: rates.map(|(before, after)| span.rates(before, after)),
            }
        });
        let reasons = status.reasons.iter().zip(&earlier.status.reasons);
        let reasons = reasons.map(|(after, before)| ReasonActivity {
            reason: *after,
            per_second: span.per_second(before.packets, after.packets),
        });
        Ok(Activity {
            schema: SCHEMA,
            instance: status.instance.clone(),
            process: status.process,
            seconds,
            counted: status.counted,
            outside_addresses: status.outside_addresses.clone(),
            tables: status.tables,
            families: status.families,
            ports: self.ports.clone(),
            devices: devices.collect(),
            guests: guests.collect(),
            reasons: reasons.collect(),
            busiest: match (&earlier.traffic, &self.traffic) {
                (Some(before), Some(after)) => busiest(before, after, span, tables)?,
                _ => Vec::new(),
            },
        })
    }

    /// Guests by address, with what each may have and what its sessions have carried.
    #[must_use]
    pub fn guests(&self) -> Vec<GuestDetail> {
        let status = &self.status;
        let devices = || status.devices.iter().filter(|it| it.is_inside());
        let guests = status.guests.iter().map(|guest| {
            let is_on = |it: &&DeviceView| it.has_in_network(guest.address);
            let traffic = self.traffic.as_ref();
            let passed = traffic.map(|it| it.guests.get(&guest.key()).copied().unwrap_or_default());
            let both = |part: fn(Counter) -> u64| {
                passed.map(|it| Directions {
                    outbound: part(it.outbound),
                    inbound: part(it.inbound),
                })
            };
            GuestDetail {
                guest: guest.clone(),
                device: devices().find(is_on).and_then(|it| it.name.clone()),
                max_sessions: status.guest_max_sessions,
                max_ports: status.guest_max_ports,
                max_new_sessions: status.guest_new_sessions,
                packets: both(|it| it.packets),
                bytes: both(|it| it.bytes),
            }
        });
        let mut guests: Vec<_> = guests.collect();
        guests.sort_unstable_by_key(|it| (it.guest.address, it.guest.stand_in));
        guests
    }
}

/// Looks at each session of a family, and how full its tables are.
fn read_sessions<A: Part>(
    tables: &PinnedTables<A>,
    mut traffic: Option<&mut Traffic>,
) -> Result<TablesView> {
    let mut halves = 0u64;
    tables.for_each_half(|key, half| {
        halves += 1;
        if let Some(traffic) = &mut traffic {
            traffic.add(key, half);
        }
        Ok(())
    })?;
    let sessions = Usage {
        used: halves.div_ceil(2),
        capacity: tables.session_capacity()?,
    };
    usage(tables, sessions)
}

/// The kernel's counters of these devices, as far as they are there.
fn device_counters(devices: &[DeviceView]) -> Result<HashMap<u32, Passed>> {
    let known = dev_status().context("cannot read the devices' counters (/proc/net/dev)")?;
    let counters = devices.iter().filter_map(|device| {
        let counters = known.get(device.name.as_ref()?)?;
        let received = Counter {
            packets: counters.recv_packets,
            bytes: counters.recv_bytes,
        };
        let sent = Counter {
            packets: counters.sent_packets,
            bytes: counters.sent_bytes,
        };
        let (outbound, inbound) = if device.is_inside() {
            (received, sent)
        } else {
            (sent, received)
        };
        Some((device.index, Passed { outbound, inbound }))
    });
    Ok(counters.collect())
}
