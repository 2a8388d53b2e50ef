//! `tapnat mappings`: which outside endpoint stands for which inside endpoint.

use anyhow::Result;
use clap::Args;

use super::{
    Format, Instance,
    print::{Column, List},
};
use crate::{daemon::now, view::MappingView};

const COLUMNS: [Column; 6] = [
    Column::text("PROTOCOL", 8),
    Column::text("INSIDE", 21),
    Column::text("OUTSIDE", 21),
    Column::text("KIND", 7),
    Column::number("SESSIONS", 8),
    Column::number("EXPIRES", 7),
];

/// The JSON is an array of objects: `protocol`, `inside` and `outside` (each an `address` and a
/// `port`), `kind`, `sessions` and `expires_in_seconds`, which is null for a static mapping.
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
        let mut list = List::begin(self.format.json, &COLUMNS)?;
        let settings = tables.settings()?;
        let now = now();
        tables.for_each_mapping(|outside, mapping| {
            match MappingView::new(outside, mapping, &settings, now) {
                Some(view) => list.entry(&view, cells),
                None => Ok(()),
            }
        })?;
        list.end()
    }
}

fn cells(mapping: &MappingView) -> Vec<String> {
    vec![
        mapping.protocol.clone(),
        mapping.inside.to_string(),
        mapping.outside.to_string(),
        mapping.kind.to_owned(),
        mapping.sessions.to_string(),
        mapping
            .expires_in_seconds
            .map_or_else(|| "never".to_owned(), |left| format!("{left}s")),
    ]
}
