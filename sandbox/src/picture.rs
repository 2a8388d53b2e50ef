//! The picture of the network: the guest, the host with its two devices and tapnat between them, and
//! the world. Owns where things stand; knows neither what they say nor how they come to the terminal.

use console::{Alignment, measure_text_width, pad_str, style};

use tapnat_display::units;

use crate::readings::Traffic;

/// A host at one end of the picture.
pub struct Station {
    pub title: &'static str,
    /// Its device at the cable.
    pub device: &'static str,
    /// What stands below the device.
    pub lines: Vec<String>,
}

/// A device of the host, with what passed through it.
#[derive(Default)]
pub struct Port {
    pub name: &'static str,
    pub address: String,
    pub to_world: Traffic,
    pub to_guest: Traffic,
}

pub struct Picture {
    pub guest: Station,
    pub tap: Port,
    pub uplink: Port,
    pub world: Station,
    /// What tapnat did.
    pub summary: [String; 2],
}

/// Three for names and addresses, four for traffic, two for the summary, and two between them.
const HOST_ROWS: usize = 11;
/// The row that the cables are in.
const CABLE_ROW: usize = 1;
const SHORTEST_CABLE: usize = 2;
const LONGEST_CABLE: usize = 10;
/// What a box adds to what is in it: a border and a space on each side.
const FRAME: usize = 4;

const TAPNAT: [&str; 3] = ["┌────────┐", "┤ tapnat ├", "└────────┘"];
const TAPNAT_WIDTH: usize = 10;

impl Picture {
    /// The picture's lines, none longer than `columns`. None when it does not fit.
    pub fn draw(&self, columns: usize) -> Option<Vec<String>> {
        let (guest, host, world) = (station(&self.guest), self.host(), station(&self.world));
        let [guest_width, host_width, world_width] = [&guest, &host, &world].map(|it| width(it));
        let boxes = guest_width + host_width + world_width + 3 * FRAME;
        let cable = columns.checked_sub(boxes)? / 2;
        if cable < SHORTEST_CABLE {
            return None;
        }
        let cable = cable.min(LONGEST_CABLE);
        let parts = [
            frame(self.guest.title, &guest, guest_width),
            frame("host", &host, host_width),
            frame(self.world.title, &world, world_width),
        ];
        let lines = (0..HOST_ROWS + 2).map(|row| {
            // The border's own row comes first.
            let (end, between, begin) = if row == CABLE_ROW + 1 {
                ("├", "─".repeat(cable), "┤")
            } else {
                ("│", " ".repeat(cable), "│")
            };
            let [left, middle, right] = parts.each_ref().map(|part| part[row].as_str());
            if row == 0 || row == HOST_ROWS + 1 {
                format!("{left}{between}{middle}{between}{right}")
            } else {
                format!("│{left}{end}{between}{begin}{middle}{end}{between}{begin}{right}│")
            }
        });
        Some(lines.collect())
    }

    /// The host's rows, all of one width.
    fn host(&self) -> Vec<String> {
        let (tap, uplink) = (&self.tap, &self.uplink);
        let address = |port: &Port| port.address.clone();
        let left = [
            measure_text_width(tap.name),
            measure_text_width(&tap.address),
        ];
        let right = [
            measure_text_width(uplink.name),
            measure_text_width(&uplink.address),
        ];
        let [left, right] = [left, right].map(|[name, address]| name.max(address));
        let packets = |traffic: &Traffic| format!("{} packets", units::count(traffic.packets));
        let bytes = |traffic: &Traffic| units::bytes(traffic.bytes);
        let rows = [
            (
                format!("{} {}", outward(), packets(&tap.to_world)),
                format!("{} {}", packets(&uplink.to_world), outward()),
            ),
            (
                format!("  {}", bytes(&tap.to_world)),
                format!("{}  ", bytes(&uplink.to_world)),
            ),
            (
                format!("{} {}", inward(), packets(&tap.to_guest)),
                format!("{} {}", packets(&uplink.to_guest), inward()),
            ),
            (
                format!("  {}", bytes(&tap.to_guest)),
                format!("{}  ", bytes(&uplink.to_guest)),
            ),
        ];
        let widest = rows
            .iter()
            .map(|(left, right)| measure_text_width(left) + 1 + measure_text_width(right))
            .chain(self.summary.iter().map(|line| measure_text_width(line)))
            .chain([left + 1 + TAPNAT_WIDTH + 1 + right])
            .max()
            .unwrap_or(0);
        // tapnat stands in the middle of what the devices leave free.
        let before = left + (widest - left - TAPNAT_WIDTH - right) / 2;
        let after = widest - before - TAPNAT_WIDTH;
        let [top, middle, bottom] = TAPNAT.map(|part| style(part).cyan().bold());
        let wire = |name: &str, room: usize| "─".repeat(room.saturating_sub(name.len() + 1));
        let mut host = vec![
            format!("{}{top}{}", " ".repeat(before), " ".repeat(after)),
            format!(
                "{} {}{middle}{} {}",
                tap.name,
                wire(tap.name, before),
                wire(uplink.name, after),
                uplink.name
            ),
            format!(
                "{}{bottom}{}",
                pad_str(&address(tap), before, Alignment::Left, None),
                pad_str(&address(uplink), after, Alignment::Right, None)
            ),
            String::new(),
        ];
        host.extend(rows.iter().map(|(left, right)| {
            let room = widest - measure_text_width(left);
            format!("{left}{}", pad_str(right, room, Alignment::Right, None))
        }));
        host.push(String::new());
        host.extend(
            self.summary
                .iter()
                .map(|line| pad_str(line, widest, Alignment::Center, None).into_owned()),
        );
        host
    }
}

fn outward() -> String {
    style("→").green().to_string()
}

fn inward() -> String {
    style("←").blue().to_string()
}

/// The rows of a host at one end.
fn station(station: &Station) -> Vec<String> {
    let mut rows = vec![String::new(); CABLE_ROW];
    rows.push(station.device.to_owned());
    rows.extend(station.lines.iter().cloned());
    rows
}

fn width(rows: &[String]) -> usize {
    rows.iter()
        .map(|row| measure_text_width(row))
        .max()
        .unwrap_or(0)
}

/// A box's borders with its title, and between them its rows without the sides, which cables go
/// through.
fn frame(title: &str, rows: &[String], width: usize) -> Vec<String> {
    let rule = "─".repeat((width + FRAME).saturating_sub(title.len() + 5));
    let mut lines = vec![format!("┌─ {} {rule}┐", style(title).bold())];
    for row in 0..HOST_ROWS {
        let text = rows.get(row).map_or("", String::as_str);
        lines.push(format!(" {} ", pad_str(text, width, Alignment::Left, None)));
    }
    lines.push(format!("└{}┘", "─".repeat(width + 2)));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        let traffic = |packets, bytes| Traffic { packets, bytes };
        Picture {
            guest: Station {
                title: "guest",
                device: "lan0",
                lines: ["10.0.0.10/24", "", "gateway", "10.0.0.1"]
                    .map(str::to_owned)
                    .to_vec(),
            },
            tap: Port {
                name: "tap0",
                address: "10.0.0.1/24".to_owned(),
                to_world: traffic(123_456, 1_210_000_000),
                to_guest: traffic(7, 420),
            },
            uplink: Port {
                name: "uplink0",
                address: "198.51.100.2/24".to_owned(),
                to_world: traffic(123_456, 1_210_000_000),
                to_guest: traffic(7, 420),
            },
            world: Station {
                title: "world",
                device: "downlink0",
                lines: ["198.51.100.1", "", "203.0.113.1"]
                    .map(str::to_owned)
                    .to_vec(),
            },
            summary: ["6 sessions", "123,463 translated, 0 dropped"].map(str::to_owned),
        }
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
                let drawn = picture().draw(columns).unwrap();
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
