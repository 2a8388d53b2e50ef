//! What `tapnat top` draws, for 80 columns: an instance's activity above, and three lists of which
//! one has the room. Owns where things stand; reads nothing.

use std::{cmp::Ordering, time::Duration};

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Style, Stylize as _},
    text::Line,
    widgets::{Block, Cell, Clear, Paragraph, Row, Table, Wrap},
};
use tapnat_common::verdict::{Outcome, Reason};
use tapnat_display::units;

use crate::{
    activity::{Activity, GuestActivity, Rate, Rates, rounded},
    view::{ReasonView, UsageView, is_loss},
};

/// The least that it can be drawn in.
const COLUMNS: u16 = 80;
const ROWS: u16 = 20;

/// Of these no more are shown than there usually are.
const MOST_DEVICES: usize = 5;
const MOST_ADDRESSES: usize = 2;
/// Title and rows of a list that has not the room.
const SMALL: usize = 4;

const KEYS: [(&str, &str); 8] = [
    ("q, Esc, Ctrl-C", "end"),
    ("Tab", "give the room to the next list"),
    ("arrows, PgUp, PgDn", "scroll it"),
    ("Home", "back to its top"),
    ("s", "sort the guests by something else"),
    ("p, Space", "hold the view, and let it go on"),
    ("+, -", "look less or more often"),
    ("h, ?", "show and hide this"),
];

/// A list of which there may be more than fits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum List {
    Guests,
    Sessions,
    Drops,
}

impl List {
    const ALL: [Self; 3] = [Self::Guests, Self::Sessions, Self::Drops];
}

/// What guests are sorted by.
#[derive(Clone, Copy, Debug)]
enum Order {
    Rate,
    Sessions,
    Refused,
    Address,
}

impl Order {
    fn next(self) -> Self {
        match self {
            Self::Rate => Self::Sessions,
            Self::Sessions => Self::Refused,
            Self::Refused => Self::Address,
            Self::Address => Self::Rate,
        }
    }

    const fn label(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Sessions => "sessions",
            Self::Refused => "refused",
            Self::Address => "address",
        }
    }

    fn sort(self, guests: &mut [&GuestActivity]) {
        guests.sort_by(|one, other| {
            let rate = |it: &GuestActivity| it.rates.map_or(0.0, Rates::bits);
            let sessions = other.guest.sessions.cmp(&one.guest.sessions);
            let most_first = match self {
                Self::Rate => rate(other).total_cmp(&rate(one)).then(sessions),
                Self::Sessions => sessions,
                Self::Refused => other.guest.refused.cmp(&one.guest.refused),
                Self::Address => Ordering::Equal,
            };
            most_first.then(one.guest.address.cmp(&other.guest.address))
        });
    }
}

/// What the keys have made of the view.
#[derive(Debug)]
pub struct View {
    interval: Duration,
    large: List,
    order: Order,
    /// The first row of the large list.
    first: usize,
    is_held: bool,
    is_helping: bool,
}

impl View {
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            large: List::Guests,
            order: Order::Rate,
            first: 0,
            is_held: false,
            is_helping: false,
        }
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }

    pub fn set_interval(&mut self, interval: Duration) {
        self.interval = interval;
    }

    pub fn is_held(&self) -> bool {
        self.is_held
    }

    pub fn toggle_hold(&mut self) {
        self.is_held = !self.is_held;
    }

    pub fn toggle_help(&mut self) {
        self.is_helping = !self.is_helping;
    }

    /// Whether it was shown.
    pub fn hide_help(&mut self) -> bool {
        std::mem::take(&mut self.is_helping)
    }

    pub fn next_list(&mut self) {
        self.first = 0;
        self.large = match self.large {
            List::Guests => List::Sessions,
            List::Sessions => List::Drops,
            List::Drops => List::Guests,
        };
    }

    pub fn next_order(&mut self) {
        self.order = self.order.next();
    }

    /// By so many rows; drawing sees to it that it is not too far.
    pub fn scroll(&mut self, rows: isize) {
        self.first = self.first.saturating_add_signed(rows);
    }

    /// Draws what there is to see, if there is enough room and a first look.
    pub fn draw(&mut self, activity: Option<&Activity>, frame: &mut Frame<'_>) {
        let area = frame.area();
        if area.width < COLUMNS || area.height < ROWS {
            let text = format!(
                "This terminal has {} columns and {} rows. `tapnat top` needs {COLUMNS} and {ROWS}: \
                 make it larger, or end with q and use `tapnat status`.",
                area.width, area.height
            );
            let text = Paragraph::new(text).wrap(Wrap { trim: true });
            frame.render_widget(text, area);
            return;
        }
        let Some(activity) = activity else {
            frame.render_widget("taking a first look ..", area);
            return;
        };
        let addresses = activity.ports.len().min(MOST_ADDRESSES);
        let devices = activity.devices.iter().take(MOST_DEVICES);
        let devices = devices.map(|it| it.device.networks().count().max(1)).sum();
        let more = area.width - COLUMNS;
        let lists = List::ALL.map(|list| self.list(list, activity, more));
        let [head, ports, device_list, rest, foot] = Layout::vertical([
            Constraint::Length(3),
            Constraint::Length(1 + length(addresses)),
            Constraint::Length(1 + length(devices)),
            Constraint::Fill(1),
            Constraint::Length(1),
        ])
        .areas(area);
        self.draw_head(activity, frame, head);
        draw_ports(activity, frame, ports);
        draw_devices(activity, frame, device_list);
        let lengths = lists.each_ref().map(|list| list.rows.len());
        let heights = heights(lengths, self.large, rest.height.into());
        let areas = Layout::vertical(heights.map(|it| Constraint::Length(length(it)))).split(rest);
        for ((list, kind), area) in lists.into_iter().zip(List::ALL).zip(areas.iter()) {
            let room = usize::from(area.height).saturating_sub(1);
            let mut first = 0;
            if kind == self.large {
                self.first = self.first.min(list.rows.len().saturating_sub(room));
                first = self.first;
            }
            list.draw(kind == self.large, first, frame, *area);
        }
        let keys =
            "q end   Tab next list   arrows scroll   s sort   p hold   + - interval   h help";
        frame.render_widget(Line::from(keys).dim(), foot);
        if self.is_helping {
            draw_help(frame, area);
        }
    }

    fn draw_head(&self, activity: &Activity, frame: &mut Frame<'_>, area: Rect) {
        let process = match activity.process {
            Some(process) => format!("process {process}"),
            None => "translating without a process".to_owned(),
        };
        let pace = if self.is_held {
            "held".to_owned()
        } else {
            format!("every {} s", self.interval.as_secs_f64())
        };
        let usage = |name: &str, it: UsageView| format!("{name} {}", share(it));
        let tables = &activity.tables;
        let per_second = |chosen: fn(&ReasonView) -> bool| {
            let reasons = activity.reasons.iter();
            let chosen = reasons.filter(|it| chosen(&it.reason));
            number(chosen.map(|it| it.per_second).sum())
        };
        let began = |it: &ReasonView| {
            [
                Reason::SessionStarted,
                Reason::SessionAdmitted,
                Reason::HairpinStarted,
            ]
            .contains(&it.reason)
        };
        let lines = vec![
            Line::from(vec![
                "tapnat ".bold(),
                activity.instance.clone().bold(),
                format!(": {process}").into(),
            ]),
            Line::from(format!(
                "{}   {}   {}",
                usage("sessions", tables.sessions),
                usage("mappings", tables.mappings),
                usage("guests", tables.guests)
            )),
            Line::from(format!(
                "in a second: {} new sessions, {} packets dropped, {} refused",
                per_second(began),
                per_second(|it| it.outcome == Outcome::Drop),
                per_second(|it| it.outcome == Outcome::Refuse)
            )),
        ];
        frame.render_widget(Paragraph::new(lines), area);
        let pace = Paragraph::new(pace).alignment(Alignment::Right);
        frame.render_widget(pace, Rect { height: 1, ..area });
    }

    /// `more` columns than are needed.
    fn list(&self, list: List, activity: &Activity, more: u16) -> Listed {
        match list {
            List::Guests => guests(activity, self.order, more),
            List::Sessions => sessions(activity, more),
            List::Drops => drops(activity),
        }
    }
}

/// How many lines each list gets, so that small ones are seen whole if possible.
fn heights(lengths: [usize; 3], large: List, room: usize) -> [usize; 3] {
    // Below the titles is at least a line that says that there is nothing.
    let wanted = lengths.map(|rows| 1 + rows.max(1));
    let fits = wanted.iter().sum::<usize>() <= room;
    let mut heights = wanted.map(|lines| if fits { lines } else { lines.min(SMALL) });
    let mut others = 0;
    for (list, height) in List::ALL.into_iter().zip(&heights) {
        if list != large {
            others += height;
        }
    }
    for (list, height) in List::ALL.into_iter().zip(&mut heights) {
        if list == large {
            *height = room.saturating_sub(others);
        }
    }
    heights
}

fn length(rows: usize) -> u16 {
    u16::try_from(rows).unwrap_or(u16::MAX)
}

/// A list's rows, all of them.
struct Listed {
    /// The first title.
    name: String,
    /// The others.
    titles: Vec<Cell<'static>>,
    widths: Vec<u16>,
    rows: Vec<Row<'static>>,
    /// What stands there when there are none.
    nothing: &'static str,
}

impl Listed {
    fn draw(self, is_large: bool, first: usize, frame: &mut Frame<'_>, area: Rect) {
        let mark = if is_large { "▸ " } else { "" };
        let name = Cell::from(format!("{mark}{}", self.name));
        let titles = Row::new(std::iter::once(name).chain(self.titles));
        let is_empty = self.rows.is_empty();
        let rows = self.rows.into_iter().skip(first);
        let widths = self.widths.into_iter().map(Constraint::Length);
        let table = Table::new(rows, widths).header(titles.style(title_style()));
        frame.render_widget(table, area);
        if is_empty && area.height > 1 {
            let below = Rect {
                y: area.y + 1,
                height: 1,
                ..area
            };
            frame.render_widget(Line::from(self.nothing).dim(), below);
        }
    }
}

fn title_style() -> Style {
    Style::new().bold().reversed()
}

/// A column of numbers.
fn right(text: impl Into<String>) -> Cell<'static> {
    Cell::from(Line::from(text.into()).right_aligned())
}

/// Columns that an area has beyond what is needed. Addresses of IPv6 get them.
fn more(area: Rect) -> u16 {
    area.width.saturating_sub(COLUMNS)
}

/// An address in so many columns.
fn fitted(address: &impl ToString, columns: u16) -> Cell<'static> {
    Cell::from(units::shortened(&address.to_string(), columns.into()))
}

fn draw_ports(activity: &Activity, frame: &mut Frame<'_>, area: Rect) {
    let hidden = activity.ports.len().saturating_sub(MOST_ADDRESSES);
    let title = match hidden {
        0 => "PORTS IN USE OF".to_owned(),
        more => format!("PORTS OF ({more} more)"),
    };
    let titles = ["TCP", "UDP", "ICMP"].map(right);
    let header = Row::new(std::iter::once(Cell::from(title)).chain(titles));
    let width = 20 + more(area);
    let rows = activity.ports.iter().take(MOST_ADDRESSES).map(|ports| {
        let address = fitted(&ports.address, width).fg(Color::Green);
        let usage = [ports.tcp, ports.udp, ports.icmp].map(|it| right(share(it)));
        Row::new(std::iter::once(address).chain(usage))
    });
    let widths = [width, 19, 19, 19].map(Constraint::Length);
    let table = Table::new(rows, widths).header(header.style(title_style()));
    frame.render_widget(table, area);
}

fn draw_devices(activity: &Activity, frame: &mut Frame<'_>, area: Rect) {
    let hidden = activity.devices.len().saturating_sub(MOST_DEVICES);
    let title = match hidden {
        0 => "DEVICE".to_owned(),
        more => format!("DEVICE ({more} more)"),
    };
    let left = [Cell::from(title), Cell::from("ADDRESS")];
    let header = Row::new(left.into_iter().chain(RATE_TITLES.map(right)));
    let width = 18 + more(area);
    let rows = activity.devices.iter().take(MOST_DEVICES).flat_map(|it| {
        let device = &it.device;
        let name = device
            .name
            .clone()
            .unwrap_or_else(|| format!("#{}", device.index));
        let colour = if device.is_inside() {
            Color::Yellow
        } else {
            Color::Green
        };
        let mut networks = device.written().map(|it| fitted(&it, width).fg(colour));
        let first = networks.next().unwrap_or_else(|| Cell::from("-"));
        let left = [Cell::from(name), first];
        let first = Row::new(left.into_iter().chain(rates(it.rates)));
        // What passes is not told by family.
        let others: Vec<_> = networks.map(|it| Row::new([Cell::from(""), it])).collect();
        std::iter::once(first).chain(others)
    });
    let widths = [15, width, 12, 9, 12, 9].map(Constraint::Length);
    let table = Table::new(rows, widths).header(header.style(title_style()));
    frame.render_widget(table, area);
}

const RATE_TITLES: [&str; 4] = ["TO WORLD", "PACKETS/S", "TO GUESTS", "PACKETS/S"];

fn guests(activity: &Activity, order: Order, more: u16) -> Listed {
    let width = 18 + more;
    let mut guests: Vec<_> = activity.guests.iter().collect();
    order.sort(&mut guests);
    let rows = guests.into_iter().map(|it| {
        let guest = &it.guest;
        // Its mark stays where the address is shortened.
        let mark = if guest.stand_in.is_some() {
            " (NAT64)"
        } else {
            ""
        };
        let room = usize::from(width) - mark.len();
        let address = units::shortened(&guest.address.to_string(), room);
        let left = [
            Cell::from(address + mark).fg(Color::Yellow),
            right(units::count(guest.sessions.into())),
            right(units::count(guest.refused.into())),
        ];
        Row::new(left.into_iter().chain(rates(it.rates)))
    });
    let titles = ["SESSIONS", "REFUSED"].into_iter().chain(RATE_TITLES);
    Listed {
        name: format!("GUEST by {}", order.label()),
        titles: titles.map(right).collect(),
        widths: vec![width, 8, 8, 11, 9, 11, 9],
        rows: rows.collect(),
        nothing: "no guest has sent anything to the world",
    }
}

fn sessions(activity: &Activity, more: u16) -> Listed {
    let width = 21 + more / 2;
    let rows = activity.busiest.iter().map(|it| {
        let flow = &it.flow;
        let bits = |rate: Rate| right(units::rate(rounded(rate.bits)));
        Row::new([
            Cell::from(flow.protocol.to_string()),
            fitted(&flow.inside, width).fg(Color::Yellow),
            fitted(&flow.remote, width),
            bits(it.rates.outbound),
            bits(it.rates.inbound),
        ])
    });
    Listed {
        name: "BUSIEST".to_owned(),
        titles: vec![
            Cell::from("INSIDE"),
            Cell::from("REMOTE"),
            right("TO WORLD"),
            right("TO GUEST"),
        ],
        widths: vec![11, width, width, 11, 11],
        rows: rows.collect(),
        nothing: if activity.counted {
            "no session carries anything"
        } else {
            "sessions are not counted: the busiest are seen with `tapnat run --count`"
        },
    }
}

fn drops(activity: &Activity) -> Listed {
    let mut reasons: Vec<_> = activity
        .reasons
        .iter()
        .filter(|it| is_loss(it.reason.outcome) && it.reason.packets > 0)
        .collect();
    reasons.sort_by(|one, other| {
        let rate = other.per_second.total_cmp(&one.per_second);
        rate.then(other.reason.packets.cmp(&one.reason.packets))
    });
    let rows = reasons.into_iter().map(|it| {
        let reason = &it.reason;
        Row::new([
            Cell::from(reason.reason.label()),
            Cell::from(if reason.outcome == Outcome::Refuse {
                "refused, sender told"
            } else {
                "dropped"
            }),
            right(units::count(reason.packets)),
            right(number(it.per_second)),
        ])
    });
    Listed {
        name: "DROPS".to_owned(),
        titles: vec![Cell::from(""), right("PACKETS"), right("PACKETS/S")],
        widths: vec![32, 20, 14, 11],
        rows: rows.collect(),
        nothing: "no packet was dropped",
    }
}

/// The four columns of [`RATE_TITLES`].
fn rates(rates: Option<Rates>) -> [Cell<'static>; 4] {
    let cells = |rate: Option<Rate>| match rate {
        Some(rate) => [units::rate(rounded(rate.bits)), number(rate.packets)],
        None => ["-".to_owned(), "-".to_owned()],
    };
    let [to_world, packets_to_world] = cells(rates.map(|it| it.outbound)).map(right);
    let [to_guest, packets_to_guest] = cells(rates.map(|it| it.inbound)).map(right);
    [to_world, packets_to_world, to_guest, packets_to_guest]
}

fn number(per_second: f64) -> String {
    units::count(rounded(per_second))
}

fn share(usage: UsageView) -> String {
    let capacity = units::count(usage.capacity.into());
    format!("{} of {capacity}", units::count(usage.used))
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let rows = KEYS.map(|(key, does)| Row::new([key, does]));
    let [_, middle, _] = Layout::vertical([
        Constraint::Fill(1),
        Constraint::Length(length(KEYS.len() + 2)),
        Constraint::Fill(1),
    ])
    .areas(area);
    let [_, middle, _] = Layout::horizontal([
        Constraint::Fill(1),
        Constraint::Length(62),
        Constraint::Fill(1),
    ])
    .areas(middle);
    let widths = [Constraint::Length(20), Constraint::Fill(1)];
    let table = Table::new(rows, widths).block(Block::bordered().title(" keys "));
    frame.render_widget(Clear, middle);
    frame.render_widget(table, middle);
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::activity::samples::{activity, activity_in_both, uncounted};

    fn drawn(view: &mut View, activity: Option<&Activity>, columns: u16, rows: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
        terminal.draw(|frame| view.draw(activity, frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let lines = (0..rows).map(|row| {
            let cells = (0..columns).map(|column| buffer[(column, row)].symbol());
            cells.collect::<String>().trim_end().to_owned()
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    fn view() -> View {
        View::new(Duration::from_secs(2))
    }

    #[test]
    fn it_is_what_the_document_shows() {
        let text = drawn(&mut view(), Some(&activity_in_both()), 80, 24);
        let document = include_str!("../../../../docs/operations.md");
        assert!(
            document.contains(&text),
            "docs/operations.md shows another:\n{text}"
        );
    }

    fn row_of(text: &str, word: &str) -> Option<usize> {
        text.lines().position(|line| line.starts_with(word))
    }

    #[test]
    fn the_room_is_for_the_list_that_was_asked_for() {
        let mut activity = activity();
        let guest = activity.guests[0].clone();
        for number in 100..200 {
            let mut guest = guest.clone();
            guest.guest.address = Ipv4Addr::new(10, 0, 0, number).into();
            activity.guests.push(guest);
        }
        let mut view = view();
        view.next_order();
        view.next_order();
        view.next_order();
        let text = drawn(&mut view, Some(&activity), 80, 24);
        assert!(text.contains("▸ GUEST by address"), "{text}");
        assert_eq!(row_of(&text, "BUSIEST"), Some(17), "{text}");
        assert_eq!(row_of(&text, "10.0.0.12"), Some(11), "{text}");
        view.scroll(2);
        let text = drawn(&mut view, Some(&activity), 80, 24);
        assert_eq!(row_of(&text, "10.0.0.12"), Some(9), "{text}");
        view.scroll(1000);
        let text = drawn(&mut view, Some(&activity), 80, 24);
        assert_eq!(row_of(&text, "10.0.0.199"), Some(16), "{text}");
        view.scroll(isize::MIN);
        view.next_list();
        let text = drawn(&mut view, Some(&activity), 80, 24);
        assert_eq!(row_of(&text, "▸ BUSIEST"), Some(12), "{text}");
        assert_eq!(row_of(&text, "10.0.0.10"), Some(9), "{text}");
    }

    #[test]
    fn keys_are_shown_and_the_view_is_held() {
        let mut view = view();
        view.toggle_help();
        view.toggle_hold();
        let text = drawn(&mut view, Some(&activity()), 80, 24);
        for (key, does) in KEYS {
            assert!(text.contains(key) && text.contains(does), "{key}: {text}");
        }
        assert!(
            text.lines()
                .next()
                .is_some_and(|line| line.ends_with(" held"))
        );
        assert!(view.hide_help() && !view.hide_help());
    }

    #[test]
    fn what_is_not_known_is_said() {
        let mut activity = uncounted();
        activity.process = None;
        activity.devices[0].rates = None;
        activity.guests.clear();
        let text = drawn(&mut view(), Some(&activity), 80, 24);
        assert!(text.contains("translating without a process"), "{text}");
        assert!(text.contains("no guest has sent anything"), "{text}");
        assert!(text.contains("`tapnat run --count`"), "{text}");
        let uplink = row_of(&text, "uplink0").and_then(|row| text.lines().nth(row));
        assert!(uplink.is_some_and(|line| line.ends_with('-')), "{text}");
        assert!(drawn(&mut view(), None, 80, 24).starts_with("taking a first look"));
    }

    #[test]
    fn every_size_is_drawn_or_says_what_is_needed() {
        for columns in [1, 40, 79, 80, 200] {
            for rows in [1, 10, 19, 20, 60] {
                let text = drawn(&mut view(), Some(&activity()), columns, rows);
                let fits = columns >= COLUMNS && rows >= ROWS;
                assert_eq!(
                    text.contains("no-session"),
                    fits,
                    "{columns}x{rows}:\n{text}"
                );
            }
        }
        let text = drawn(&mut view(), Some(&activity()), 40, 10);
        let words: Vec<_> = text.split_whitespace().collect();
        assert!(
            words.join(" ").starts_with(
                "This terminal has 40 columns and 10 rows. `tapnat top` needs 80 and 20: make it larger"
            ),
            "{text}"
        );
    }
}
