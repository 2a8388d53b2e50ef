//! `tapnat guests`: who is behind an instance.

use anyhow::Result;
use clap::Args;

use super::{Shown, print::Column};
use crate::view::GuestView;

const COLUMNS: [Column; 4] = [
    Column::text("ADDRESS"),
    Column::text("LINK ADDRESS"),
    Column::number("SESSIONS"),
    Column::number("REFUSED"),
];

/// Guests that sent something to the world since the instance began and were not forgotten for want
/// of room. REFUSED counts new sessions that a limit refused. The JSON is an array.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    shown: Shown,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let (guests, _) = self.shown.tables()?.guests()?;
        let guests = guests.iter();
        let mut guests: Vec<_> = guests
            .map(|(address, guest)| GuestView::new(*address, guest))
            .collect();
        guests.sort_unstable_by_key(|guest| guest.address);
        let mut list = self.shown.list(&COLUMNS)?;
        for guest in &guests {
            list.entry(guest, cells)?;
        }
        list.end()
    }
}

fn cells(guest: &GuestView) -> Vec<String> {
    vec![
        guest.address.to_string(),
        guest.link_address.clone().unwrap_or_else(|| "-".to_owned()),
        guest.sessions.to_string(),
        guest.refused.to_string(),
    ]
}
