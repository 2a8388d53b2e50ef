//! `tapnat guests`: who is behind an instance.

use anyhow::Result;
use clap::Args;

use super::{Shown, flows::both, print::Column};
use crate::activity::{GuestDetail, Look};

const COLUMNS: [Column; 10] = [
    Column::inside("ADDRESS"),
    Column::text("DEVICE"),
    Column::text("LINK ADDRESS"),
    Column::number("SESSIONS"),
    Column::number("LIMIT"),
    Column::number("PORTS"),
    Column::number("LIMIT"),
    Column::number("REFUSED"),
    Column::number("PACKETS"),
    Column::number("BYTES"),
];
/// So many are there without `tapnat run --count`.
const UNCOUNTED: usize = 8;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    shown: Shown,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let look = Look::take(&self.shown.instance.name, &self.shown.tables()?)?;
        let columns = if look.status.counted {
            &COLUMNS[..]
        } else {
            &COLUMNS[..UNCOUNTED]
        };
        let mut list = self.shown.list(columns)?;
        for guest in &look.guests() {
            list.entry(guest, cells)?;
        }
        list.end()
    }
}

fn cells(it: &GuestDetail) -> Vec<String> {
    let known = |it: &Option<String>| it.clone().unwrap_or_else(|| "-".to_owned());
    let guest = &it.guest;
    vec![
        guest.title(),
        known(&it.device),
        known(&guest.link_address),
        guest.sessions.to_string(),
        it.max_sessions.to_string(),
        guest.ports.to_string(),
        it.max_ports.to_string(),
        guest.refused.to_string(),
        both(it.packets),
        both(it.bytes),
    ]
}
