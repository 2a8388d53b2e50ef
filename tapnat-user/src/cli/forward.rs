//! `tapnat forward`: ports of an outside address that lead to a guest.

use std::net::IpAddr;

use anyhow::Result;
use clap::{Args, Subcommand};
use ipnet::IpNet;
use serde::Serialize;

use super::{Format, Instance, Shown, print::Column, saved::Saved};
use crate::{
    config::parse_outside_address,
    control::{self, Request},
    forwards::{Forward, InsideEnd, Ports, Share, Standing, Transport, parse_from},
    notice::tell,
    statics::{self, Selector},
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

/// Whether a change is to last.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Save {
    /// Change it in the configuration file, too, which the instance then reads again, as `tapnat
    /// reload` has it do. Without, it is for as long as the instance is up
    #[arg(long)]
    save: bool,
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

#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    format: Format,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        match self.verb {
            Verb::Add(arguments) => {
                let save = arguments.save;
                add(&self.instance, arguments.forward()?, save).await
            }
            Verb::Remove(arguments) => {
                let save = arguments.save;
                remove(&self.instance, arguments.selector(), save).await
            }
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
    fn forward(self) -> Result<Forward> {
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
    fn selector(self) -> Selector {
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

/// Who may come in, as a cell.
pub(super) fn from_cell(from: IpNet) -> String {
    if from.prefix_len() == 0 {
        "anywhere".to_owned()
    } else {
        from.to_string()
    }
}

/// Prints those of the static mappings that `view` shows.
pub(super) fn list<T: Serialize>(
    shown: &Shown,
    columns: &[Column],
    view: impl Fn(&Standing) -> Option<T>,
    cells: impl Fn(&T) -> Vec<String>,
) -> Result<()> {
    let tables = shown.tables()?;
    let mut list = shown.list(columns)?;
    for view in statics::list(&tables)?.iter().filter_map(view) {
        list.entry(&view, &cells)?;
    }
    list.end()
}

/// Lets in, for as long as the instance is up or from now on.
pub(super) async fn add(instance: &Instance, forward: Forward, save: Save) -> Result<()> {
    if !save.save {
        return change(instance, &Request::AddForward(forward)).await;
    }
    let mut saved = Saved::of(&instance.name)?;
    saved.add(&forward)?;
    saved.store(&instance.name).await
}

/// Takes away, from the file as well if that is asked for.
pub(super) async fn remove(instance: &Instance, selector: Selector, save: Save) -> Result<()> {
    let request = Request::RemoveForward(selector);
    if !save.save {
        return change(instance, &request).await;
    }
    let mut saved = Saved::of(&instance.name)?;
    if !saved.remove(&selector)? {
        return change(instance, &request).await;
    }
    saved.store(&instance.name).await?;
    // What a command had added beside it may be left. Mostly nothing is.
    let _ = control::ask(&instance.name, &request, || instance.tables()).await;
    Ok(())
}

/// Has the instance change something, and says what it says.
pub(super) async fn change(instance: &Instance, request: &Request) -> Result<()> {
    for note in control::ask(&instance.name, request, || instance.tables()).await? {
        tell(&note);
    }
    Ok(())
}
