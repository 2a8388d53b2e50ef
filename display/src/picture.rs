//! The picture of the network: guests at their cables, the host with its devices and tapnat between
//! them, and the world. Owns where things stand; knows neither what they say nor how they come to the
//! terminal.

use console::{Alignment, measure_text_width, pad_str, style};

/// What is at one end of the picture.
#[derive(Clone, Debug)]
pub struct Station {
    pub title: &'static str,
    /// From the row of the cable on.
    pub lines: Vec<String>,
}

/// A device of the host.
#[derive(Clone, Debug, Default)]
pub struct Port {
    pub name: String,
    pub address: String,
    /// What stands below.
    pub lines: Vec<String>,
}

/// A cable on the guests' side.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    /// Who is on it, from its row on.
    pub guests: Vec<String>,
    /// Where it ends in the host.
    pub port: Port,
}

#[derive(Clone, Debug)]
pub struct Picture {
    /// Of the box at the left.
    pub title: &'static str,
    /// One or more.
    pub segments: Vec<Segment>,
    pub uplink: Port,
    pub world: Station,
    /// What tapnat did, below the devices.
    pub summary: Vec<String>,
}

/// The row that the first cable is in.
const CABLE_ROW: usize = 1;
const SHORTEST_CABLE: usize = 2;
const LONGEST_CABLE: usize = 10;
/// What a box adds to what is in it: a border and a space on each side.
const FRAME: usize = 4;

const TAPNAT: [&str; 3] = ["┌────────┐", "┤ tapnat ├", "└────────┘"];
/// The last of these where more cables come from below.
const TAPNAT_BUS: &str = "└───┬────┘";
const TAPNAT_WIDTH: usize = 10;
/// Where those come in.
const BUS: usize = 4;

/// The way out, before what goes it.
#[must_use]
pub fn outward() -> String {
    style("→").green().to_string()
}

/// The way in.
#[must_use]
pub fn inward() -> String {
    style("←").blue().to_string()
}

impl Picture {
    /// The picture's lines, none longer than `columns`. None when it does not fit.
    #[must_use]
    pub fn draw(&self, columns: usize) -> Option<Vec<String>> {
        let rows = self.cable_rows();
        let guests = self.guests(&rows);
        let host = self.host(&rows);
        let mut world = vec![String::new(); CABLE_ROW];
        world.extend(self.world.lines.iter().cloned());
        let height = guests.len().max(host.len()).max(world.len());
        let titles = [self.title, "host", self.world.title];
        let boxes = [guests, host, world];
        let widths: Vec<_> = boxes
            .iter()
            .zip(titles)
            .map(|(rows, title)| width(rows).max(title.len() + 1))
            .collect();
        let all = widths.iter().sum::<usize>() + FRAME * boxes.len();
        let cable = columns.checked_sub(all)? / 2;
        if cable < SHORTEST_CABLE {
            return None;
        }
        let cable = cable.min(LONGEST_CABLE);
        let parts: Vec<_> = boxes
            .iter()
            .zip(titles)
            .zip(&widths)
            .map(|((rows, title), width)| frame(title, rows, *width, height))
            .collect();
        let [left, middle, right] = parts.as_slice() else {
            return None;
        };
        let lines = left.iter().zip(middle).zip(right).enumerate();
        let lines = lines.map(|(row, ((left, middle), right))| {
            let gap = |is_cable: bool| {
                if is_cable {
                    format!("├{}┤", "─".repeat(cable))
                } else {
                    format!("│{}│", " ".repeat(cable))
                }
            };
            if row == 0 || row == height + 1 {
                let gap = " ".repeat(cable);
                return format!("{left}{gap}{middle}{gap}{right}");
            }
            // The border's own row comes first.
            let first = gap(rows.contains(&(row - 1)));
            let second = gap(row - 1 == CABLE_ROW);
            format!("│{left}{first}{middle}{second}{right}│")
        });
        Some(lines.collect())
    }

    /// The rows in which cables come in from the left.
    fn cable_rows(&self) -> Vec<usize> {
        let heights = self
            .segments
            .iter()
            .map(|it| it.guests.len().max(it.port.rows().count()) + 1);
        heights
            .scan(CABLE_ROW, |next, height| {
                let row = *next;
                *next += height;
                Some(row)
            })
            .collect()
    }

    /// The rows of the box at the left.
    fn guests(&self, cables: &[usize]) -> Vec<String> {
        let mut rows = Vec::new();
        for (segment, row) in self.segments.iter().zip(cables) {
            place(&mut rows, *row, segment.guests.iter().map(String::as_str));
        }
        rows
    }

    /// The host's rows, all of one width.
    fn host(&self, cables: &[usize]) -> Vec<String> {
        let mut left = Vec::new();
        for (segment, row) in self.segments.iter().zip(cables) {
            place(&mut left, *row, segment.port.rows());
        }
        let mut right = Vec::new();
        place(&mut right, CABLE_ROW, self.uplink.rows());
        let height = left.len().max(right.len());
        left.resize(height, String::new());
        right.resize(height, String::new());

        let has_bus = cables.len() > 1;
        // What stands beside tapnat; with cables from below nothing may be in their way.
        let beside = |rows: &[String]| width(&rows[..if has_bus { height } else { height.min(3) }]);
        let (left_width, right_width) = (beside(&left), beside(&right));
        let widest = left
            .iter()
            .zip(&right)
            .map(|(left, right)| measure_text_width(left) + 1 + measure_text_width(right))
            .chain(self.summary.iter().map(|line| measure_text_width(line)))
            .chain([left_width + 1 + TAPNAT_WIDTH + 1 + right_width])
            .max()
            .unwrap_or(0);
        // tapnat stands in the middle of what the devices leave free.
        let before = left_width + (widest - left_width - TAPNAT_WIDTH - right_width) / 2;
        let after = widest - before - TAPNAT_WIDTH;
        let last_cable = cables.last().copied().unwrap_or(CABLE_ROW);
        let mut host: Vec<_> = left
            .iter()
            .zip(&right)
            .enumerate()
            .map(|(row, (left, right))| match TAPNAT.get(row) {
                Some(part) => {
                    let part = if has_bus && row + 1 == TAPNAT.len() {
                        TAPNAT_BUS
                    } else {
                        part
                    };
                    let part = style(part).cyan().bold();
                    if row == CABLE_ROW {
                        let (wire_in, wire_out) = (wire(left, before), wire(right, after));
                        return format!("{left} {wire_in}{part}{wire_out} {right}");
                    }
                    let left = pad_str(left, before, Alignment::Left, None);
                    format!("{left}{part}{}", pad_right(right, after))
                }
                None if has_bus && row <= last_cable => {
                    let bus = before + BUS;
                    let right = pad_right(right, widest - bus - 1);
                    if !cables.contains(&row) {
                        let left = pad_str(left, bus, Alignment::Left, None);
                        return format!("{left}│{right}");
                    }
                    let corner = if row == last_cable { "┘" } else { "┤" };
                    format!("{left} {}{corner}{right}", wire(left, bus))
                }
                None => format!(
                    "{left}{}",
                    pad_right(right, widest - measure_text_width(left))
                ),
            })
            .collect();
        host.push(String::new());
        let summary = self.summary.iter();
        host.extend(
            summary.map(|line| pad_str(line, widest, Alignment::Center, None).into_owned()),
        );
        host
    }
}

impl Port {
    fn rows(&self) -> impl Iterator<Item = &str> {
        let head = [&self.name, &self.address];
        head.into_iter().chain(&self.lines).map(String::as_str)
    }
}

/// Puts lines into rows, from one on.
fn place<'a>(rows: &mut Vec<String>, first: usize, lines: impl Iterator<Item = &'a str>) {
    rows.resize(first, String::new());
    rows.extend(lines.map(str::to_owned));
}

/// What leads to or from a name, in the room for both and a space.
fn wire(name: &str, room: usize) -> String {
    "─".repeat(room.saturating_sub(measure_text_width(name) + 1))
}

fn pad_right(text: &str, room: usize) -> String {
    pad_str(text, room, Alignment::Right, None).into_owned()
}

fn width(rows: &[String]) -> usize {
    let widths = rows.iter().map(|row| measure_text_width(row));
    widths.max().unwrap_or(0)
}

/// A box's borders with its title, and between them its rows without the sides, which cables go
/// through.
fn frame(title: &str, rows: &[String], width: usize, height: usize) -> Vec<String> {
    let rule = "─".repeat((width + FRAME).saturating_sub(title.len() + 5));
    let mut lines = vec![format!("┌─ {} {rule}┐", style(title).bold())];
    for row in 0..height {
        let text = rows.get(row).map_or("", String::as_str);
        lines.push(format!(" {} ", pad_str(text, width, Alignment::Left, None)));
    }
    lines.push(format!("└{}┘", "─".repeat(width + 2)));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|it| (*it).to_owned()).collect()
    }

    fn port(name: &str, address: &str, below: &[&str]) -> Port {
        Port {
            name: name.to_owned(),
            address: address.to_owned(),
            lines: lines(below),
        }
    }

    fn picture() -> Picture {
        let (outward, inward) = (outward(), inward());
        let tap = [
            "",
            &format!("{outward} 123,456 packets"),
            "  1.21 GB",
            &format!("{inward} 7 packets"),
            "  420 B",
        ];
        let uplink = [
            "",
            &format!("123,456 packets {outward}"),
            "1.21 GB  ",
            &format!("7 packets {inward}"),
            "420 B  ",
        ];
        Picture {
            title: "guest",
            segments: vec![Segment {
                guests: lines(&["lan0", "10.0.0.10/24", "", "gateway", "10.0.0.1"]),
                port: port("tap0", "10.0.0.1/24", &tap),
            }],
            uplink: port("uplink0", "198.51.100.2/24", &uplink),
            world: Station {
                title: "world",
                lines: lines(&["downlink0", "198.51.100.1", "", "203.0.113.1"]),
            },
            summary: lines(&["6 sessions", "123,463 translated, 0 dropped"]),
        }
    }

    /// With more cables on the guests' side, of different heights.
    fn several() -> Picture {
        let mut picture = picture();
        picture.title = "guests";
        picture.segments = vec![
            Segment {
                guests: lines(&["10.0.0.10", "10.0.0.11", "10.0.0.12", "and 7 more"]),
                port: port("br0", "10.0.0.1/24", &["→ 12 Mbit/s"]),
            },
            Segment {
                guests: Vec::new(),
                port: port("tap1", "10.0.1.1/24", &[]),
            },
            Segment {
                guests: lines(&["10.0.2.10"]),
                port: port("tap2", "10.0.2.1/24", &["→ 0 bit/s", "← 0 bit/s"]),
            },
        ];
        picture.uplink.lines.truncate(3);
        picture
    }

    #[test]
    fn several_cables_come_together() {
        let _alone = crate::COLOURS.lock();
        console::set_colors_enabled(false);
        let expected = "\
┌─ guests ───┐   ┌─ host ───────────────────────────────────┐   ┌─ world ──────┐
│            │   │             ┌────────┐                   │   │              │
│ 10.0.0.10  ├───┤ br0 ────────┤ tapnat ├────────── uplink0 ├───┤ downlink0    │
│ 10.0.0.11  │   │ 10.0.0.1/24 └───┬────┘   198.51.100.2/24 │   │ 198.51.100.1 │
│ 10.0.0.12  │   │ → 12 Mbit/s     │                        │   │              │
│ and 7 more │   │                 │      123,456 packets → │   │ 203.0.113.1  │
│            │   │                 │              1.21 GB   │   │              │
│            ├───┤ tap1 ───────────┤                        │   │              │
│            │   │ 10.0.1.1/24     │                        │   │              │
│            │   │                 │                        │   │              │
│ 10.0.2.10  ├───┤ tap2 ───────────┘                        │   │              │
│            │   │ 10.0.2.1/24                              │   │              │
│            │   │ → 0 bit/s                                │   │              │
│            │   │ ← 0 bit/s                                │   │              │
│            │   │                                          │   │              │
│            │   │                6 sessions                │   │              │
│            │   │      123,463 translated, 0 dropped       │   │              │
└────────────┘   └──────────────────────────────────────────┘   └──────────────┘
";
        let drawn = several().draw(80).unwrap().join("\n");
        assert_eq!(drawn, expected.trim_end(), "\n{drawn}");
    }

    #[test]
    fn however_many_guests_there_are_all_of_it_is_drawn() {
        let _alone = crate::COLOURS.lock();
        console::set_colors_enabled(false);
        let mut picture = several();
        if let Some(last) = picture.segments.last_mut() {
            last.guests = (1..=20).map(|it| format!("10.0.2.{it}")).collect();
        }
        let drawn = picture.draw(80).unwrap();
        assert!(
            drawn.iter().any(|it| it.starts_with("│ 10.0.2.20 ")),
            "\n{}",
            drawn.join("\n")
        );
    }

    #[test]
    fn everything_stands_where_it_should() {
        let _alone = crate::COLOURS.lock();
        console::set_colors_enabled(false);
        let expected = "\
┌─ guest ──────┐   ┌─ host ─────────────────────────────────┐   ┌─ world ──────┐
│              │   │             ┌────────┐                 │   │              │
│ lan0         ├───┤ tap0 ───────┤ tapnat ├──────── uplink0 ├───┤ downlink0    │
│ 10.0.0.10/24 │   │ 10.0.0.1/24 └────────┘ 198.51.100.2/24 │   │ 198.51.100.1 │
│              │   │                                        │   │              │
│ gateway      │   │ → 123,456 packets    123,456 packets → │   │ 203.0.113.1  │
│ 10.0.0.1     │   │   1.21 GB                    1.21 GB   │   │              │
│              │   │ ← 7 packets                7 packets ← │   │              │
│              │   │   420 B                        420 B   │   │              │
│              │   │                                        │   │              │
│              │   │               6 sessions               │   │              │
│              │   │     123,463 translated, 0 dropped      │   │              │
└──────────────┘   └────────────────────────────────────────┘   └──────────────┘
";
        let drawn = picture().draw(80).unwrap();
        assert_eq!(drawn.join("\n"), expected.trim_end());
    }

    #[test]
    fn all_lines_are_equally_long_and_fit() {
        let _alone = crate::COLOURS.lock();
        for columns in [78, 80, 81, 99, 120, 300] {
            for colours in [false, true] {
                console::set_colors_enabled(colours);
                let drawn = [picture(), several()].map(|it| it.draw(columns).unwrap());
                let drawn = drawn.concat();
                let widths: Vec<_> = drawn.iter().map(|line| measure_text_width(line)).collect();
                assert!(widths[0] <= columns, "{columns}: {widths:?}");
                assert!(
                    widths.iter().all(|width| *width == widths[0]),
                    "{columns}: {widths:?}\n{}",
                    drawn.join("\n")
                );
            }
        }
        console::set_colors_enabled(false);
    }

    #[test]
    fn a_narrow_terminal_gets_none() {
        assert!(picture().draw(77).is_none());
        assert!(picture().draw(10).is_none());
    }
}
