//! `tapnat flows`: the sessions.

use anyhow::Result;
use clap::Args;

use super::{
    Format, Instance,
    print::{Column, List},
};
use crate::{
    daemon::now,
    view::{Directions, Flow},
};

const COLUMNS: [Column; 9] = [
    Column::text("PROTOCOL", 8),
    Column::text("INSIDE", 21),
    Column::text("OUTSIDE", 21),
    Column::text("REMOTE", 21),
    Column::text("STATE", 11),
    Column::number("IDLE", 6),
    Column::number("EXPIRES", 7),
    Column::number("PACKETS", 11),
    Column::number("BYTES", 11),
];

/// The JSON is an array of objects: `protocol`, `inside`, `outside` and `remote` (each an `address`
/// and a `port`), `state`, `idle_seconds`, `expires_in_seconds`, and with `tapnat run --count`
/// `packets` and `bytes` (each `outbound` and `inbound`).
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,
    #[command(flatten)]
    format: Format,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let tables = self.instance.tables()?;
        let settings = tables.settings()?;
        let mut list = List::begin(self.format.json, &COLUMNS)?;
        let now = now();
        tables.for_each_half(|key, half| {
            if key.arrival.device().is_none() {
                return Ok(());
            }
            let twin = tables.half(&half.twin_key(key))?;
            match Flow::from_half(key, half, twin.as_ref(), &settings, now) {
                Some(flow) => list.entry(&flow, cells),
                None => Ok(()),
            }
        })?;
        list.end()
    }
}

fn cells(flow: &Flow) -> Vec<String> {
    let both = |count: Option<Directions>| {
        count.map_or_else(
            || "-".to_owned(),
            |it| format!("{}/{}", it.outbound, it.inbound),
        )
    };
    vec![
        flow.protocol.clone(),
        flow.inside.to_string(),
        flow.outside.to_string(),
        flow.remote.to_string(),
        flow.state.to_owned(),
        format!("{}s", flow.idle_seconds),
        format!("{}s", flow.expires_in_seconds),
        both(flow.packets),
        both(flow.bytes),
    ]
}
