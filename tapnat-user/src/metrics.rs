//! What monitoring reads: the counters and tables of one instance in the `OpenMetrics` text format,
//! which Prometheus scrapes. Reads the pinned tables alone, as all that shows something does. Who asks
//! for it, and how, is [`crate::cli`]'s.

use std::fmt::Error;

use anyhow::{Context as _, Result};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use crate::view::{GuestView, ReasonView, Status, UsageView};

/// What the numbers are taken from.
#[derive(Debug)]
struct Source {
    status: Status,
}

/// The text that a scrape gets.
///
/// # Errors
///
/// When it cannot be made.
pub fn text(status: Status) -> Result<String> {
    let mut registry = Registry::with_prefix("tapnat");
    registry.register_collector(Box::new(Source { status }));
    let mut text = String::new();
    encode(&mut text, &registry).context("cannot write metrics")?;
    Ok(text)
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct InstanceLabels {
    instance: String,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct ReasonLabels {
    instance: String,
    reason: String,
    outcome: String,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct TableLabels {
    instance: String,
    table: String,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct GuestLabels {
    instance: String,
    guest: String,
}

/// One metric: its name, what it says, and its value for each set of labels.
struct Metric<'a, L> {
    name: &'a str,
    help: &'a str,
    values: Vec<(L, u64)>,
}

impl<L: EncodeLabelSet> Metric<'_, L> {
    fn count(self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut metric =
            encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
        for (labels, value) in &self.values {
            ConstCounter::new(*value).encode(metric.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn measure(self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut metric =
            encoder.encode_descriptor(self.name, self.help, None, MetricType::Gauge)?;
        for (labels, value) in &self.values {
            let value = i64::try_from(*value).unwrap_or(i64::MAX);
            ConstGauge::new(value).encode(metric.encode_family(labels)?)?;
        }
        Ok(())
    }
}

impl Collector for Source {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let encoder = &mut encoder;
        self.encode_instance(encoder)?;
        self.encode_reasons(encoder)?;
        self.encode_tables(encoder)?;
        self.encode_guests(encoder)
    }
}

impl Source {
    fn encode_instance(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let one = |value: bool| {
            let labels = InstanceLabels {
                instance: self.status.instance.clone(),
            };
            vec![(labels, u64::from(value))]
        };
        Metric {
            name: "process_running",
            help: "Whether `tapnat run` runs; packets are translated without it, too",
            values: one(self.status.process.is_some()),
        }
        .measure(encoder)?;
        Metric {
            name: "counts_every_packet",
            help: "Whether packets of steady sessions are counted (--count)",
            values: one(self.status.counted),
        }
        .measure(encoder)
    }

    fn encode_reasons(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let labelled = |value: fn(&ReasonView) -> u64| {
            let reasons = self.status.reasons.iter();
            reasons
                .map(|reason| {
                    let labels = ReasonLabels {
                        instance: self.status.instance.clone(),
                        reason: reason.reason.to_owned(),
                        outcome: reason.outcome.to_owned(),
                    };
                    (labels, value(reason))
                })
                .collect()
        };
        Metric {
            name: "packets",
            help: "Packets that left the datapath, by reason",
            values: labelled(|reason| reason.packets),
        }
        .count(encoder)?;
        Metric {
            name: "packet_bytes",
            help: "Bytes of the packets that left the datapath, by reason",
            values: labelled(|reason| reason.bytes),
        }
        .count(encoder)
    }

    fn encode_tables(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let tables = &self.status.tables;
        let labelled = |value: fn(&UsageView) -> u64| {
            [
                ("sessions", tables.sessions),
                ("mappings", tables.mappings),
                ("guests", tables.guests),
            ]
            .map(|(table, usage)| {
                let labels = TableLabels {
                    instance: self.status.instance.clone(),
                    table: table.to_owned(),
                };
                (labels, value(&usage))
            })
            .into()
        };
        Metric {
            name: "table_entries",
            help: "Entries of a table in use",
            values: labelled(|usage| usage.used),
        }
        .measure(encoder)?;
        Metric {
            name: "table_capacity",
            help: "Entries that a table has room for",
            values: labelled(|usage| u64::from(usage.capacity)),
        }
        .measure(encoder)
    }

    fn encode_guests(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let labelled = |value: fn(&GuestView) -> u32| {
            let guests = self.status.guests.iter();
            guests
                .map(|guest| {
                    let labels = GuestLabels {
                        instance: self.status.instance.clone(),
                        guest: guest.address.to_string(),
                    };
                    (labels, u64::from(value(guest)))
                })
                .collect()
        };
        Metric {
            name: "guest_sessions",
            help: "Sessions of a guest",
            values: labelled(|guest| guest.sessions),
        }
        .measure(encoder)?;
        Metric {
            name: "guest_ports",
            help: "Outside ports that a guest holds",
            values: labelled(|guest| guest.ports),
        }
        .measure(encoder)?;
        Metric {
            name: "guest_refused_sessions",
            help: "Sessions that a limit refused a guest",
            values: labelled(|guest| guest.refused),
        }
        .count(encoder)
    }
}
