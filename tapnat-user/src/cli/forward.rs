//! `tapnat forward`: ports of an outside address that lead to a guest.

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
    forwards::{Forward, InsideEnd, Ports, Share, Standing, Transport, parse_from},
    statics::Selector,
    view::{Endpoint, ForwardView, Label as _},
};

const COLUMNS: [Column; 6] = [
    Column::text("PROTO"),
    Column::outside("OUTSIDE"),
    Column::inside("INSIDE"),
    Column::text("FROM"),
    Column::text("MADE BY"),
    Column::number("SESSIONS"),
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
    /// Let connections to a port in
    Add(Add),
    /// Take forwards away; connections that came in through them go on
    Remove(Remove),
    /// Show the forwards
    ///
    /// The JSON is an array of objects: `protocol`, `outside` and `inside` (each the `address` and the
    /// first `port`), `ports` (how many there are), `from`, `made_by` (`config` or `command`),
    /// `address_given` (whether it was made for this outside address) and `sessions`.
    List(Show),
}

#[derive(Debug, Args)]
struct Add {
    /// tcp or udp
    protocol: Transport,

    /// The outside port, or a range of them: 8080, 8000-8010
    #[arg(value_name = "PORT[-PORT]")]
    outside: Ports,

    /// The guest, and its ports unless they are the same: 10.0.0.10:80, 10.0.0.10:8000-8010,
    /// 10.0.0.10, `[fd00:7a70::10]:80`
    #[arg(value_name = "ADDRESS[:PORT[-PORT]]")]
    inside: InsideEnd,

    /// The network, or the one address, that may come in [default: everybody]
    #[arg(long, value_name = "NETWORK", value_parser = parse_from)]
    from: Option<IpNet>,

    /// The outside address that it is on [default: the first of the instance's of the guest's IP
    /// version, whichever that is at the time]
    #[arg(long, value_name = "ADDRESS", value_parser = parse_outside_address)]
    outside_address: Option<IpAddr>,

    #[command(flatten)]
    save: Save,
}

#[derive(Debug, Args)]
struct Remove {
    /// tcp or udp
    protocol: Transport,

    /// The outside port, or a range of them; may be a part of a range that was added
    #[arg(value_name = "PORT[-PORT]")]
    outside: Ports,

    /// Only those on this outside address [default: on all, of both IP versions]
    #[arg(long, value_name = "ADDRESS", value_parser = parse_outside_address)]
    outside_address: Option<IpAddr>,

    #[command(flatten)]
    save: Save,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        let Self { instance, verb } = self;
        match verb {
            Verb::Add(it) => it.save.add(&instance, it.forward()?).await,
            Verb::Remove(it) => it.save.remove(&instance, it.selector()).await,
            Verb::List(it) => it.list(instance, &COLUMNS, view, cells),
        }
    }
}

impl Add {
    fn forward(&self) -> Result<Forward> {
        Forward::of_ports(
            self.protocol,
            self.outside,
            self.inside,
            self.from,
            self.outside_address,
        )
    }
}

impl Remove {
    fn selector(&self) -> Selector {
        Selector::Ports {
            protocol: self.protocol,
            ports: self.outside,
            outside_address: self.outside_address,
        }
    }
}

/// None for an outside address that is one guest's alone, which `tapnat static` shows.
fn view(standing: &Standing) -> Option<ForwardView> {
    (standing.forward.share != Share::Everything).then(|| ForwardView::from(standing))
}

fn cells(view: &ForwardView) -> Vec<String> {
    let end = |first: Endpoint| match u32::from(first.port) + view.ports - 1 {
        last if last == u32::from(first.port) => first.to_string(),
        last => format!("{first}-{last}"),
    };
    vec![
        view.protocol.to_string(),
        end(view.outside),
        end(view.inside),
        from_cell(view.from),
        view.made_by.label().to_owned(),
        view.sessions.to_string(),
    ]
}
