//! `tapnat flows`: the sessions.

use anyhow::Result;
use clap::Args;
use tapnat_common::abi::setting_flags;

use super::{Shown, print::Column};
use crate::{
    daemon::now,
    view::{Directions, Flow},
};

const COLUMNS: [Column; 9] = [
    Column::text("PROTO"),
    Column::text("INSIDE"),
    Column::text("OUTSIDE"),
    Column::text("REMOTE"),
    Column::text("STATE"),
    Column::number("EXPIRES"),
    Column::number("IDLE"),
    Column::number("PACKETS"),
    Column::number("BYTES"),
];
/// So many are there without `tapnat run --count`.
const UNCOUNTED: usize = 7;

/// With `tapnat run --count`, packets and bytes are shown as OUTBOUND/INBOUND. On a terminal, columns
/// at the right that do not fit are left out; `tapnat flows | cat` has them all.
///
/// The JSON is an array of objects: `protocol`, `inside`, `outside` and `remote` (each an `address`
/// and a `port`), `state`, `idle_seconds`, `expires_in_seconds`, and with `tapnat run --count`
/// `packets` and `bytes` (each `outbound` and `inbound`).
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    shown: Shown,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let tables = self.shown.tables()?;
        let settings = tables.settings()?;
        let counted = settings.flags & setting_flags::COUNTED != 0;
        let columns = if counted {
            &COLUMNS[..]
        } else {
            &COLUMNS[..UNCOUNTED]
        };
        let mut list = self.shown.list(columns)?;
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
    let both = |it: Directions| format!("{}/{}", it.outbound, it.inbound);
    let mut cells = vec![
        flow.protocol.clone(),
        flow.inside.to_string(),
        flow.outside.to_string(),
        flow.remote.to_string(),
        flow.state.to_owned(),
        format!("{}s", flow.expires_in_seconds),
        format!("{}s", flow.idle_seconds),
    ];
    cells.extend([flow.packets, flow.bytes].into_iter().flatten().map(both));
    cells
}
