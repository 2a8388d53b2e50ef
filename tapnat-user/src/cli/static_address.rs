//! `tapnat static`: outside addresses that are one guest's alone.

use std::net::IpAddr;

use anyhow::Result;
use clap::{Args, Subcommand};
use ipnet::IpNet;

use super::{
    Instance,
    print::Column,
    static_mappings::{Save, Show, from_cell},
};
use crate::{
    config::parse_outside_address,
    forwards::{Forward, Share, Standing, parse_from},
    statics::Selector,
    view::{Label as _, StaticView},
};

const COLUMNS: [Column; 4] = [
    Column::outside("OUTSIDE"),
    Column::inside("INSIDE"),
    Column::text("FROM"),
    Column::text("MADE BY"),
];

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Give a guest an outside address of its own
    Add(Add),
    /// Take it back; sessions that go on keep it
    Remove(Remove),
    /// Show which guests have one
    ///
    /// The JSON is an array of objects: `outside` and `inside` (addresses), `from` and `made_by`
    /// (`config` or `command`).
    List(Show),
}

#[derive(Debug, Args)]
struct Add {
    /// The outside address
    #[arg(value_parser = parse_outside_address)]
    outside: IpAddr,

    /// The guest's address, of the same IP version
    #[arg(value_parser = parse_outside_address)]
    inside: IpAddr,

    /// The network, or the one address, that may come in [default: everybody]
    #[arg(long, value_name = "NETWORK", value_parser = parse_from)]
    from: Option<IpNet>,

    #[command(flatten)]
    save: Save,
}

#[derive(Debug, Args)]
struct Remove {
    /// The outside address
    #[arg(value_parser = parse_outside_address)]
    outside: IpAddr,

    #[command(flatten)]
    save: Save,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        let Self { instance, verb } = self;
        match verb {
            Verb::Add(it) => it.save.add(&instance, it.forward()?).await,
            Verb::Remove(it) => {
                let selector = Selector::Address(it.outside);
                it.save.remove(&instance, selector).await
            }
            Verb::List(it) => it.list(instance, &COLUMNS, view, cells),
        }
    }
}

impl Add {
    fn forward(&self) -> Result<Forward> {
        Forward::of_address(self.outside, self.inside, self.from)
    }
}

/// None for a forward, which `tapnat forward` shows.
fn view(standing: &Standing) -> Option<StaticView> {
    (standing.forward.share == Share::Everything).then(|| StaticView::from(standing))
}

fn cells(view: &StaticView) -> Vec<String> {
    vec![
        view.outside.to_string(),
        view.inside.to_string(),
        from_cell(view.from),
        view.made_by.label().to_owned(),
    ]
}
