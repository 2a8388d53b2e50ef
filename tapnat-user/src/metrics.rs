//! What monitoring reads: the counters and tables of one instance in the text format of Prometheus.
//! Reads the pinned tables alone, as all that shows something does. How scrapers get it is
//! [`scrapes`]'.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use prometheus::{
    TextEncoder,
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};

use crate::{
    activity::{self, PortsView},
    instance::InstanceName,
    tables::BothTables,
    view::{GuestView, Label as _, ReasonView, Status, UsageView},
};

pub mod scrapes;

/// The text that a scrape gets.
///
/// # Errors
///
/// When the kernel refuses.
pub fn text(name: &InstanceName, tables: &BothTables) -> Result<String> {
    let status = activity::status(name, tables)?;
    let ports = activity::ports_in_use(tables)?;
    let mut families = families(&status, &ports);
    // Without guests there is nothing to say of them.
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new()
        .encode_to_string(&families)
        .context("cannot write metrics")
}

/// A label's name and value.
type Label = (&'static str, String);

/// All metrics of one kind.
struct Family<'a> {
    instance: &'a str,
    name: &'static str,
    help: &'static str,
}

impl Family<'_> {
    /// Of what only ever grows.
    fn counters(self, values: impl IntoIterator<Item = (Vec<Label>, u64)>) -> MetricFamily {
        self.of(MetricType::COUNTER, values, |metric, value| {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        })
    }

    fn gauges(self, values: impl IntoIterator<Item = (Vec<Label>, u64)>) -> MetricFamily {
        self.of(MetricType::GAUGE, values, |metric, value| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        })
    }

    fn of(
        self,
        kind: MetricType,
        values: impl IntoIterator<Item = (Vec<Label>, u64)>,
        set: impl Fn(&mut Metric, f64),
    ) -> MetricFamily {
        // `instance` is Prometheus' own label.
        let instance = ("tapnat_instance", self.instance.to_owned());
        let metrics = values.into_iter().map(|(labels, value)| {
            let labels = std::iter::once(instance.clone()).chain(labels);
            let mut metric = Metric::default();
            metric.set_label(labels.map(label).collect());
            #[expect(
                clippy::cast_precision_loss,
                reason = "the format knows no other numbers"
            )]
            set(&mut metric, value as f64);
            metric
        });
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics.collect());
        family
    }
}

fn label((name, value): Label) -> LabelPair {
    let mut label = LabelPair::default();
    label.set_name(name.to_owned());
    label.set_value(value);
    label
}

fn families(status: &Status, ports: &[PortsView]) -> Vec<MetricFamily> {
    let family = |name, help| Family {
        instance: &status.instance,
        name,
        help,
    };
    let version = ("version", env!("CARGO_PKG_VERSION").to_owned());
    let one = |value: bool| [(Vec::new(), u64::from(value))];
    vec![
        family("tapnat_build_info", "The version of tapnat that says this")
            .gauges([(vec![version], 1)]),
        family(
            "tapnat_process_running",
            "Whether `tapnat run` runs; packets are translated without it, too",
        )
        .gauges(one(status.process.is_some())),
        family(
            "tapnat_counts_every_packet",
            "Whether packets of steady sessions are counted (--count)",
        )
        .gauges(one(status.counted)),
        family(
            "tapnat_packets_total",
            "Packets that left the datapath, by reason",
        )
        .counters(by_reason(status, |reason| reason.packets)),
        family(
            "tapnat_packet_bytes_total",
            "Bytes of the packets that left the datapath, by reason",
        )
        .counters(by_reason(status, |reason| reason.bytes)),
        family("tapnat_table_entries", "Entries of a table in use")
            .gauges(by_table(status, |usage| usage.used)),
        family("tapnat_table_capacity", "Entries that a table has room for")
            .gauges(by_table(status, |usage| usage.capacity.into())),
        family(
            "tapnat_ports_in_use",
            "Ports of an outside address that stand for guests (of ICMP, identifiers)",
        )
        .gauges(by_address(ports, |usage| usage.used)),
        family(
            "tapnat_ports_capacity",
            "Ports of an outside address that guests can have",
        )
        .gauges(by_address(ports, |usage| usage.capacity.into())),
        family("tapnat_guest_sessions", "Sessions of a guest")
            .gauges(by_guest(status, |guest| guest.sessions)),
        family("tapnat_guest_ports", "Outside ports that a guest holds")
            .gauges(by_guest(status, |guest| guest.ports)),
        family(
            "tapnat_guest_refused_sessions_total",
            "Sessions that a limit refused a guest",
        )
        .counters(by_guest(status, |guest| guest.refused)),
    ]
}

fn by_reason(status: &Status, value: fn(&ReasonView) -> u64) -> Vec<(Vec<Label>, u64)> {
    let reasons = status.reasons.iter();
    reasons
        .map(|reason| {
            let labels = vec![
                ("reason", reason.reason.label().to_owned()),
                ("outcome", reason.outcome.label().to_owned()),
            ];
            (labels, value(reason))
        })
        .collect()
}

fn by_table(status: &Status, value: fn(&UsageView) -> u64) -> Vec<(Vec<Label>, u64)> {
    let families = status.families.named();
    families
        .flat_map(|(family, tables)| {
            [
                ("sessions", tables.sessions),
                ("mappings", tables.mappings),
                ("guests", tables.guests),
            ]
            .map(|(table, usage)| {
                let labels = vec![("table", table.to_owned()), ("family", family.to_owned())];
                (labels, value(&usage))
            })
        })
        .collect()
}

fn by_address(ports: &[PortsView], value: fn(&UsageView) -> u64) -> Vec<(Vec<Label>, u64)> {
    let of = |address: IpAddr, protocol: &str, usage: &UsageView| {
        let labels = vec![
            ("address", address.to_string()),
            ("protocol", protocol.to_owned()),
        ];
        (labels, value(usage))
    };
    ports
        .iter()
        .flat_map(|ports| {
            [
                of(ports.address, "tcp", &ports.tcp),
                of(ports.address, "udp", &ports.udp),
                of(ports.address, "icmp", &ports.icmp),
            ]
        })
        .collect()
}

/// Of one that has sessions with IPv4 by NAT64 and others with IPv6, both together.
fn by_guest(status: &Status, value: fn(&GuestView) -> u32) -> Vec<(Vec<Label>, u64)> {
    let mut sums = BTreeMap::new();
    for guest in &status.guests {
        *sums.entry(guest.address).or_default() += u64::from(value(guest));
    }
    let label = |address: IpAddr| ("guest", address.to_string());
    let sums = sums.into_iter();
    sums.map(|(address, sum)| (vec![label(address)], sum))
        .collect()
}
