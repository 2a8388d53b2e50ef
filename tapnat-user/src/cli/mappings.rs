//! `tapnat mappings`: which outside endpoint stands for which inside endpoint.

use anyhow::Result;
use clap::Args;

use super::{
    Shown,
    print::{Column, List},
};
use crate::{
    clock::now,
    family::IpFamily,
    tables::PinnedTables,
    view::{Endpoint, Label as _, MappingView, Protocol},
};

const COLUMNS: [Column; 6] = [
    Column::text("PROTO"),
    Column::inside("INSIDE"),
    Column::outside("OUTSIDE"),
    Column::text("KIND"),
    Column::number("SESSIONS"),
    Column::number("EXPIRES"),
];

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    shown: Shown,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let tables = self.shown.tables()?;
        let mut list = self.shown.list(&COLUMNS)?;
        print(&tables.ipv4, &mut list)?;
        if let Some(tables) = &tables.ipv6 {
            print(tables, &mut list)?;
        }
        list.end()
    }
}

fn print<A: IpFamily>(tables: &PinnedTables<A>, list: &mut List) -> Result<()> {
    let now = now();
    tables.for_each_mapping(
        |outside, mapping| match MappingView::new(outside, mapping, now) {
            Some(view) => {
                let guest = tables.guest_of(mapping.inside.address);
                list.entry(&view.of_guest(guest), cells)
            }
            None => Ok(()),
        },
    )
}

fn cells(mapping: &MappingView) -> Vec<String> {
    // What is of the whole address has no port.
    let end = |it: Endpoint| {
        if mapping.protocol == Protocol::WHOLE {
            it.address.to_string()
        } else {
            it.to_string()
        }
    };
    vec![
        mapping.protocol.to_string(),
        end(mapping.inside),
        end(mapping.outside),
        mapping.kind.label().to_owned(),
        mapping.sessions.to_string(),
        mapping
            .expires_in_seconds
            .map_or_else(|| "never".to_owned(), |left| format!("{left}s")),
    ]
}
