//! `tapnat static`: outside addresses that are one guest's alone.

use std::net::Ipv4Addr;

use anyhow::Result;
use clap::{Args, Subcommand};
use ipnet::Ipv4Net;

use super::{
    Format, Instance,
    forward::change,
    print::{Column, List},
};
use crate::{
    config::parse_outside_address,
    control::Request,
    forwards::{Forward, Share, anywhere, parse_from},
    statics::{self, Selector},
    view::StaticView,
};

const COLUMNS: [Column; 4] = [
    Column::text("OUTSIDE", 15),
    Column::text("INSIDE", 15),
    Column::text("FROM", 18),
    Column::text("MADE BY", 7),
];

/// Packets to the outside address go to the guest, whatever their protocol and port, and those of the
/// guest go out with it. The address must not be one that other guests are translated to. The
/// address is put on the uplink if no device has it; one of a network that is not the uplink's has to
/// be routed here.
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

/// The JSON is an array of objects: `outside` and `inside` (addresses), `from` and `made_by`
/// (`config` or `command`).
#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    format: Format,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        let instance = &self.instance;
        match self.verb {
            Verb::Add(arguments) => change(instance, &arguments.request()).await,
            Verb::Remove(arguments) => change(instance, &arguments.request()).await,
            Verb::List(arguments) => arguments.execute(instance),
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

impl Show {
    fn execute(self, instance: &Instance) -> Result<()> {
        let tables = instance.tables()?;
        let mut list = List::begin(self.format.json, &COLUMNS)?;
        for standing in statics::list(&tables)? {
            if standing.forward.share == Share::Everything {
                list.entry(&StaticView::from(&standing), cells)?;
            }
        }
        list.end()
    }
}

fn cells(view: &StaticView) -> Vec<String> {
    vec![
        view.outside.to_string(),
        view.inside.to_string(),
        if view.from == anywhere() {
            "anywhere".to_owned()
        } else {
            view.from.to_string()
        },
        view.made_by.to_owned(),
    ]
}
