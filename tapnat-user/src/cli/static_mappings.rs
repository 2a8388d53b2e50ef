//! What `tapnat forward` and `tapnat static` have in common: both are static mappings, which are added,
//! removed and listed alike. What each of them is called by, and how it is shown, is theirs.

use anyhow::Result;
use clap::Args;
use ipnet::IpNet;
use serde::Serialize;

use super::{Format, Instance, Shown, print::Column, saved::Saved};
use crate::{
    control::{self, Request},
    forwards::{Forward, Standing},
    statics::{self, Selector},
};

/// Whether a change is to last.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Save {
    /// Change it in the configuration file, too, which the instance then reads again, as `tapnat
    /// reload` has it do. Without, it is for as long as the instance is up
    #[arg(long)]
    save: bool,
}

impl Save {
    /// Lets in, for as long as the instance is up or from now on.
    pub(super) async fn add(self, instance: &Instance, forward: Forward) -> Result<()> {
        if !self.save {
            return instance.change(&Request::AddForward(forward)).await;
        }
        let mut saved = Saved::of(&instance.name)?;
        saved.add(&forward)?;
        saved.store(&instance.name).await
    }

    /// Takes away, from the file as well if that is asked for.
    pub(super) async fn remove(self, instance: &Instance, selector: Selector) -> Result<()> {
        let request = Request::RemoveForward(selector);
        if !self.save {
            return instance.change(&request).await;
        }
        let mut saved = Saved::of(&instance.name)?;
        if !saved.remove(&selector)? {
            return instance.change(&request).await;
        }
        saved.store(&instance.name).await?;
        // What a command had added beside it may be left. Mostly nothing is.
        let _ = control::ask(&instance.name, &request, || instance.tables()).await;
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Show {
    #[command(flatten)]
    format: Format,
}

impl Show {
    /// Prints those of an instance's static mappings that `view` shows.
    pub(super) fn list<T: Serialize>(
        self,
        instance: Instance,
        columns: &[Column],
        view: impl Fn(&Standing) -> Option<T>,
        cells: impl Fn(&T) -> Vec<String>,
    ) -> Result<()> {
        let shown = Shown {
            instance,
            format: self.format,
        };
        let tables = shown.tables()?;
        let mut list = shown.list(columns)?;
        for view in statics::list(&tables)?.iter().filter_map(view) {
            list.entry(&view, &cells)?;
        }
        list.end()
    }
}

/// Who may come in, as a cell.
pub(super) fn from_cell(from: IpNet) -> String {
    if from.prefix_len() == 0 {
        "anywhere".to_owned()
    } else {
        from.to_string()
    }
}
