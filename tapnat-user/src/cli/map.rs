//! `tapnat map`: the picture of the network, with what passes now. Says what stands in it; how it is
//! drawn is [`tapnat_display`]'s.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs,
    net::IpAddr,
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use ipnet::IpNet;
use serde::Serialize;
use tapnat_display::{
    palette,
    picture::{Picture, Port, Segment, Station, inward, outward},
    units, vector,
};

use super::{
    Format, Instance, print,
    watch::{Watching, parse_interval, watch},
};
use crate::{
    activity::{Activity, DeviceActivity, GuestActivity, Look, Rates, rounded},
    files::{cannot, is_stdout},
    forwards::{Share, Standing},
    progress::Progress,
    statics,
    tables::BothTables,
    view::{ForwardView, StaticView, is_loss},
};

/// Where nothing says how many columns there are.
const COLUMNS: usize = 80;
/// So many guests of a device are shown with all that is known of them.
const WHOLE: usize = 2;
/// So many are shown at all.
const MOST_GUESTS: usize = 5;
const MOST_REMOTES: usize = 4;
const MOST_ADDRESSES: usize = 4;
/// Columns of an address where there is little room: as of IPv4's longest.
const SHORT: usize = 15;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Write the picture to a file as SVG instead; to the standard output with -
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "watch"])]
    svg: Option<PathBuf>,

    /// How long to look for what passes
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "1",
        value_parser = parse_interval,
        conflicts_with = "watch"
    )]
    interval: Duration,

    #[command(flatten)]
    watching: Watching,

    #[command(flatten)]
    instance: Instance,
    #[command(flatten)]
    format: Format,
}

/// What is in the picture.
#[derive(Debug, Serialize)]
struct Map {
    #[serde(flatten)]
    activity: Activity,
    /// Ports that lead to guests.
    forwards: Vec<ForwardView>,
    /// Addresses that are guests' own.
    static_addresses: Vec<StaticView>,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        if let Some(interval) = self.watching.watch {
            return self.watch(interval);
        }
        let progress = Progress::waiting("looking twice, for what passes in between");
        let activity = self.instance.activity(self.interval)?;
        drop(progress);
        let map = Map::new(activity, &self.instance.tables()?)?;
        if self.format.json {
            return print::json(&map);
        }
        if let Some(path) = &self.svg {
            console::set_colors_enabled(false);
            let document = vector::render(&map.draw(COLUMNS)?) + "\n";
            if is_stdout(path) {
                return print::text(&document);
            }
            return fs::write(path, document).map_err(|error| cannot("cannot write", path, error));
        }
        let columns = print::terminal_width().unwrap_or(COLUMNS);
        print::text(&text(&map.draw(columns)?))
    }

    fn watch(&self, interval: Duration) -> Result<()> {
        let mut before = Look::take(&self.instance.name, &self.instance.tables()?)?;
        // Long enough for rates.
        thread::sleep(Duration::from_millis(500));
        watch(interval, |output, room| {
            let tables = self.instance.tables()?;
            let after = Look::take(&self.instance.name, &tables)?;
            let map = Map::new(after.since(&before, &tables)?, &tables)?;
            before = after;
            if self.format.json {
                serde_json::to_writer(&mut *output, &map)?;
                output.push(b'\n');
                return Ok(());
            }
            let lines = match (map.draw(room.map_or(COLUMNS, |room| room.columns)), room) {
                // It may be made wider.
                (Err(reason), Some(_)) => vec![format!("{reason:#}")],
                (lines, _) => lines?,
            };
            output.extend(text(&lines).into_bytes());
            if room.is_none() {
                output.push(b'\n');
            }
            Ok(())
        })
    }
}

fn text(lines: &[String]) -> String {
    let mut text = lines.join("\n");
    text.push('\n');
    text
}

/// How much is said, where there is not room for all of it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Detail {
    /// Without the middle of long ones.
    ShortAddresses,
    Addresses,
    /// Whom guests talk to, too.
    ShortRemotes,
    Remotes,
    Networks,
}

impl Detail {
    fn address(self, address: IpAddr, style: &console::Style) -> String {
        let text = address.to_string();
        let text = match self {
            Self::ShortAddresses | Self::ShortRemotes => units::shortened(&text, SHORT),
            Self::Addresses | Self::Remotes | Self::Networks => text,
        };
        style.apply_to(text).to_string()
    }
}

impl Map {
    fn new(activity: Activity, tables: &BothTables) -> Result<Self> {
        let standing = statics::list(tables)?;
        let (ports, addresses): (Vec<&Standing>, Vec<&Standing>) = standing
            .iter()
            .partition(|it| matches!(it.forward.share, Share::Ports { .. }));
        Ok(Self {
            activity,
            forwards: ports.into_iter().map(ForwardView::from).collect(),
            static_addresses: addresses.into_iter().map(StaticView::from).collect(),
        })
    }

    /// The lines of the picture, and of what leads to guests.
    fn draw(&self, columns: usize) -> Result<Vec<String>> {
        let picture = [
            Detail::Networks,
            Detail::Remotes,
            Detail::ShortRemotes,
            Detail::Addresses,
            Detail::ShortAddresses,
        ]
        .into_iter()
        .find_map(|detail| self.picture(detail).draw(columns));
        let mut lines = picture.with_context(|| {
            format!(
                "the picture does not fit {columns} columns: make the terminal wider, or use \
                 `tapnat map | less -S` or --svg"
            )
        })?;
        lines.extend(self.ways_in());
        Ok(lines)
    }

    fn picture(&self, detail: Detail) -> Picture {
        let activity = &self.activity;
        let devices = activity.devices.iter();
        let (inside, uplinks): (Vec<_>, Vec<_>) = devices.partition(|it| it.device.is_inside());
        let mut segments: Vec<_> = inside
            .iter()
            .map(|device| {
                let mut port = port(device, detail, &palette::inside());
                port.lines
                    .extend(device.rates.map(to_world_first).unwrap_or_default());
                Segment {
                    guests: guests(&self.guests_of(device), detail),
                    port,
                }
            })
            .collect();
        if segments.is_empty() {
            segments.push(Segment {
                guests: Vec::new(),
                port: Port {
                    name: "no device".to_owned(),
                    ..Port::default()
                },
            });
        }
        let uplink = uplinks.first().map_or_else(
            || Port {
                name: "no uplink".to_owned(),
                ..Port::default()
            },
            |uplink| self.uplink(uplink, detail),
        );
        Picture {
            title: "guests",
            segments,
            uplink,
            world: Station {
                title: "world",
                lines: if detail >= Detail::ShortRemotes {
                    self.remotes(detail)
                } else {
                    Vec::new()
                },
            },
            summary: self.summary(),
        }
    }

    /// The guests in a device's network, those with the most to do first. One that also reaches IPv4
    /// by NAT64 has the sum.
    fn guests_of(&self, device: &DeviceActivity) -> Vec<GuestActivity> {
        let mut guests = BTreeMap::<_, GuestActivity>::new();
        for it in &self.activity.guests {
            if !device.device.has_in_network(it.guest.address) {
                continue;
            }
            match guests.entry(it.guest.address) {
                Entry::Vacant(place) => drop(place.insert(it.clone())),
                Entry::Occupied(mut known) => {
                    let known = known.get_mut();
                    known.guest.sessions += it.guest.sessions;
                    let rates = known.rates.zip(it.rates);
                    known.rates = rates.map(|(one, other)| one + other);
                }
            }
        }
        let mut guests: Vec<_> = guests.into_values().collect();
        guests.sort_by(|one, other| {
            let rate = |it: &GuestActivity| it.rates.map_or(0.0, Rates::bits);
            rate(other)
                .total_cmp(&rate(one))
                .then(other.guest.sessions.cmp(&one.guest.sessions))
                .then(one.guest.address.cmp(&other.guest.address))
        });
        guests
    }

    fn uplink(&self, uplink: &DeviceActivity, detail: Detail) -> Port {
        let mut port = port(uplink, detail, &palette::outside());
        if let Some(rates) = uplink.rates {
            port.lines
                .push(format!("{} {}", bits(rates.outbound.bits), outward()));
            port.lines
                .push(format!("{} {}", bits(rates.inbound.bits), inward()));
        }
        let addresses = &self.activity.outside_addresses;
        // The uplink's own is said already, if it is all there is.
        let own: Vec<_> = uplink.device.networks().map(|it| it.addr()).collect();
        if *addresses != own {
            port.lines.push("outside".to_owned());
            let shown = addresses.iter().take(MOST_ADDRESSES);
            port.lines
                .extend(shown.map(|it| detail.address(*it, &palette::outside())));
            port.lines.extend(more(addresses.len(), MOST_ADDRESSES));
            if addresses.is_empty() {
                port.lines.push("none".to_owned());
            }
        }
        port
    }

    /// Whom most is exchanged with.
    fn remotes(&self, detail: Detail) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let busiest = self
            .activity
            .busiest
            .iter()
            .map(|it| it.flow.remote.address);
        let remotes: Vec<_> = busiest.filter(|it| seen.insert(*it)).collect();
        let shown = remotes.iter().take(MOST_REMOTES);
        let shown = shown.map(|it| detail.address(*it, &console::Style::new()));
        shown.chain(more(remotes.len(), MOST_REMOTES)).collect()
    }

    fn summary(&self) -> Vec<String> {
        let activity = &self.activity;
        let sessions = activity.tables.sessions.used;
        let reasons = activity.reasons.iter();
        let drops: f64 = reasons
            .filter(|it| is_loss(it.reason.outcome))
            .map(|it| it.per_second)
            .sum();
        let mut summary = vec![
            format!(
                "{} session{}",
                units::count(sessions),
                print::plural(sessions)
            ),
            format!(
                "{} packets dropped in a second",
                units::count(rounded(drops))
            ),
        ];
        if activity.process.is_none() {
            summary.push("translating without a process".to_owned());
        }
        summary
    }

    /// What leads to guests from outside.
    fn ways_in(&self) -> Vec<String> {
        let arrow = inward();
        let inside = |it: String| palette::inside().apply_to(it).to_string();
        let outside = |it: String| palette::outside().apply_to(it).to_string();
        let from = |it: IpNet| match it.prefix_len() {
            0 => String::new(),
            _ => format!("  from {it}"),
        };
        let range = |ports: u32, first: u16| match ports {
            0 | 1 => String::new(),
            more => format!("-{}", u32::from(first) + more - 1),
        };
        let ports = self.forwards.iter().map(|it| {
            format!(
                "{} {arrow} {} {}{}",
                inside(format!("{}{}", it.inside, range(it.ports, it.inside.port))),
                it.protocol,
                outside(format!(
                    "{}{}",
                    it.outside,
                    range(it.ports, it.outside.port)
                )),
                from(it.from)
            )
        });
        let addresses = self.static_addresses.iter().map(|it| {
            format!(
                "{} {arrow} all {}{}",
                inside(it.inside.to_string()),
                outside(it.outside.to_string()),
                from(it.from)
            )
        });
        ports.chain(addresses).collect()
    }
}

fn port(device: &DeviceActivity, detail: Detail, style: &console::Style) -> Port {
    let device = &device.device;
    let mut addresses = device.written().map(|written| {
        if detail == Detail::Networks {
            style.apply_to(written).to_string()
        } else {
            detail.address(written.0.addr(), style)
        }
    });
    Port {
        name: device
            .name
            .clone()
            .unwrap_or_else(|| format!("#{}", device.index)),
        address: addresses.next().unwrap_or_default(),
        lines: addresses.collect(),
    }
}

/// Some guests: a few with all that is known, or more of them by address.
fn guests(guests: &[GuestActivity], detail: Detail) -> Vec<String> {
    if guests.is_empty() {
        return vec!["no guest yet".to_owned()];
    }
    let mut lines = Vec::new();
    for it in guests.iter().take(MOST_GUESTS) {
        let guest = &it.guest;
        lines.push(detail.address(guest.address, &palette::inside()));
        if guests.len() > WHOLE {
            continue;
        }
        let sessions = u64::from(guest.sessions);
        lines.push(format!(
            "{} session{}",
            units::count(sessions),
            print::plural(sessions)
        ));
        lines.extend(it.rates.map(to_world_first).unwrap_or_default());
    }
    lines.extend(more(guests.len(), MOST_GUESTS));
    lines
}

/// What stands in place of those that are not shown.
fn more(count: usize, shown: usize) -> Option<String> {
    let more = count.checked_sub(shown).filter(|more| *more > 0)?;
    Some(format!("and {} more", units::count(more as u64)))
}

fn to_world_first(rates: Rates) -> Vec<String> {
    vec![
        format!("{} {}", outward(), bits(rates.outbound.bits)),
        format!("{} {}", inward(), bits(rates.inbound.bits)),
    ]
}

fn bits(rate: f64) -> String {
    units::rate(rounded(rate))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tapnat_common::net::protocol;

    use super::*;
    use crate::{
        activity::samples::{activity, activity_in_both, device, guest, uncounted},
        journal::Role,
        view::{Endpoint, MadeBy, Protocol},
    };

    fn map(activity: Activity) -> Map {
        // Of the whole process, and never on for what is not a terminal.
        console::set_colors_enabled(false);
        let endpoint = |address: [u8; 4], port| Endpoint {
            address: Ipv4Addr::from(address).into(),
            port,
        };
        Map {
            activity,
            forwards: vec![ForwardView {
                protocol: Protocol(protocol::TCP),
                outside: endpoint([198, 51, 100, 2], 8080),
                inside: endpoint([10, 0, 0, 10], 80),
                ports: 11,
                from: "192.0.2.0/24".parse().unwrap(),
                made_by: MadeBy::Command,
                address_given: false,
                sessions: 0,
            }],
            static_addresses: vec![StaticView {
                outside: Ipv4Addr::new(203, 0, 113, 5).into(),
                inside: Ipv4Addr::new(10, 0, 1, 10).into(),
                from: "0.0.0.0/0".parse().unwrap(),
                made_by: MadeBy::Config,
            }],
        }
    }

    fn two_devices(mut activity: Activity) -> Activity {
        let mut other = guest(10, 12, 0, 4.5e6);
        other.guest.address = Ipv4Addr::new(10, 0, 1, 10).into();
        activity.devices.push(DeviceActivity {
            rates: other.rates,
            ..device("tap1", 4, Role::Inside, [10, 0, 1, 1])
        });
        activity.guests.push(other);
        activity
    }

    #[test]
    fn it_is_what_the_documents_show() {
        let lines = map(two_devices(activity_in_both())).draw(COLUMNS).unwrap();
        let document = include_str!("../../../docs/operations.md");
        let text = text(&lines);
        assert!(
            document.contains(&text),
            "docs/operations.md shows another:\n{text}"
        );
        let svg = include_str!("../../../docs/map.svg");
        let drawn = vector::render(&lines);
        assert!(
            svg.trim_end() == drawn,
            "docs/map.svg is another picture:\n{drawn}"
        );
    }

    #[test]
    fn whatever_there_is_fits_eighty_columns() {
        let mut wide = two_devices(uncounted());
        for device in &mut wide.devices {
            device.device.name = Some("fifteen-letters".to_owned());
            device.device.address = Some(Ipv4Addr::new(100, 100, 100, 101));
            device.device.prefix_length = Some(30);
            device.device.ipv6_address =
                Some("fd00:1111:2222:3333:4444:5555:6666:7777".parse().unwrap());
            device.device.ipv6_prefix_length = Some(126);
        }
        for (number, guest) in (100..).zip(&mut wide.guests) {
            guest.guest.address = Ipv4Addr::new(100, 100, 100, number).into();
        }
        wide.outside_addresses = (101..120)
            .map(|it| Ipv4Addr::new(203, 113, 113, it).into())
            .collect();
        wide.process = None;
        let mut empty = uncounted();
        empty.devices.clear();
        empty.guests.clear();
        empty.outside_addresses.clear();
        for (activity, words) in [
            (wide, ["and 15 more", "fd00:11…66:7777", "203.113.113.104"]),
            (empty, ["no device", "no uplink", "12,345 sessions"]),
        ] {
            let text = text(&map(activity).draw(COLUMNS).unwrap());
            assert!(
                text.lines().all(|line| line.chars().count() <= COLUMNS),
                "{text}"
            );
            for word in words {
                assert!(text.contains(word), "{word}:\n{text}");
            }
        }
        let error = map(activity()).draw(40).unwrap_err().to_string();
        assert!(
            error.contains("40 columns") && error.contains("--svg"),
            "{error}"
        );
    }

    #[test]
    fn a_guest_with_two_ways_to_the_world_is_one() {
        let mut activity = activity_in_both();
        activity.guests.retain(|it| it.guest.address.is_ipv6());
        let six = activity.guests.first().unwrap();
        let mut four = six.clone();
        four.guest.stand_in = Some(Ipv4Addr::new(0, 128, 0, 1));
        four.guest.sessions = 5;
        let shown = six.guest.address.to_string();
        activity.guests.push(four);
        let text = text(&map(activity).draw(100).unwrap());
        let lines: Vec<_> = text.lines().collect();
        let of_it: Vec<_> = (0..lines.len())
            .filter(|row| lines[*row].contains(&shown))
            .collect();
        let [row] = of_it.as_slice() else {
            panic!("{text}")
        };
        let below = lines[row + 1..].iter().take(2).copied().collect::<String>();
        assert!(
            below.contains("12 sessions") && below.contains("4.80 Mbit/s"),
            "{text}"
        );
    }

    #[test]
    fn many_guests_are_shown_by_address_alone() {
        let mut activity = activity();
        for number in 20..120 {
            activity.guests.push(guest(number, 1, 0, 0.0));
        }
        let text = text(&map(activity).draw(COLUMNS).unwrap());
        assert!(text.contains("and 98 more"), "{text}");
        assert!(
            text.contains("10.0.0.10 ") && !text.contains("12,000 sessions"),
            "{text}"
        );
    }
}
