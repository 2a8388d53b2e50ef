//! `tapnat static`: outside addresses that are one guest's alone.

use std::net::Ipv4Addr;

use anyhow::Result;
use clap::{Args, Subcommand};
use ipnet::Ipv4Net;

use super::{
    Format, Instance, Shown,
    forward::{change, from_cell, list},
    print::Column,
};
use crate::{
    config::parse_outside_address,
    control::Request,
    forwards::{Forward, Share, Standing, anywhere, parse_from},
    statics::Selector,
    view::StaticView,
};

const COLUMNS: [Column; 4] = [
    Column::text("OUTSIDE"),
    Column::text("INSIDE"),
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
    outside: Ipv4Addr,

    /// The guest's address
    #[arg(value_parser = parse_outside_address)]
    inside: Ipv4Addr,

    /// The network, or the one address, that may come in [default: everybody]
    #[arg(long, value_name = "NETWORK", value_parser = parse_from)]
    from: Option<Ipv4Net>,
}

#[derive(Debug, Args)]
struct Remove {
    /// The outside address
    #[arg(value_parser = parse_outside_address)]
    outside: Ipv4Addr,
}

#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    format: Format,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        match self.verb {
            Verb::Add(arguments) => change(&self.instance, &arguments.request()).await,
            Verb::Remove(arguments) => change(&self.instance, &arguments.request()).await,
            Verb::List(Show { format }) => list(
                &Shown {
                    instance: self.instance,
                    format,
                },
                &COLUMNS,
                view,
                cells,
            ),
        }
    }
}

impl Add {
    fn request(self) -> Request {
        let from = self.from.unwrap_or_else(anywhere);
        Request::AddForward(Forward::of_address(self.outside, self.inside, from))
    }
}

impl Remove {
    fn request(self) -> Request {
        Request::RemoveForward(Selector::Address(self.outside))
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
        view.made_by.to_owned(),
    ]
}
