//! The sessions as a table that fits the terminal: the busiest first, in the words of
//! `tapnat flows`.

use std::net::{IpAddr, SocketAddr};

use console::{Alignment, Style, measure_text_width, pad_str};
use serde::Deserialize;

use tapnat_display::{palette, units};

use crate::readings::Traffic;

/// A session, as `tapnat flows --json` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Flow {
    protocol: String,
    inside: Endpoint,
    outside: Endpoint,
    remote: Endpoint,
    state: String,
    packets: Directions,
    bytes: Directions,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Endpoint {
    address: IpAddr,
    port: u16,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Directions {
    outbound: u64,
    inbound: u64,
}

impl Flow {
    /// All that passed in this session, both ways.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            packets: self.packets.outbound + self.packets.inbound,
            bytes: self.bytes.outbound + self.bytes.inbound,
        }
    }

    fn cells(&self) -> [String; 7] {
        let endpoint = |it: Endpoint| SocketAddr::new(it.address, it.port).to_string();
        let Traffic { packets, bytes } = self.traffic();
        [
            self.protocol.clone(),
            endpoint(self.inside),
            endpoint(self.outside),
            endpoint(self.remote),
            self.state.clone(),
            units::bytes(bytes),
            units::count(packets),
        ]
    }
}

/// A column's title and side. The colours are the picture's.
fn columns() -> [(&'static str, Alignment, Style); 7] {
    let plain = Style::new;
    [
        ("PROTO", Alignment::Left, plain()),
        ("INSIDE", Alignment::Left, palette::inside()),
        ("OUTSIDE", Alignment::Left, palette::outside()),
        ("REMOTE", Alignment::Left, plain()),
        ("STATE", Alignment::Left, plain()),
        ("BYTES", Alignment::Right, plain()),
        ("PACKETS", Alignment::Right, plain()),
    ]
}

/// The table's lines, busiest sessions first, without the last columns where they do not fit.
pub fn table(flows: &[Flow], width: usize) -> Vec<String> {
    let mut flows: Vec<_> = flows.iter().collect();
    flows.sort_by_key(|flow| std::cmp::Reverse(flow.traffic().bytes));
    let rows: Vec<_> = flows.iter().map(|flow| flow.cells()).collect();
    let columns = columns();
    let widths: Vec<_> = columns
        .iter()
        .enumerate()
        .map(|(place, (title, ..))| {
            let cells = rows.iter().map(|row| measure_text_width(&row[place]));
            cells.max().unwrap_or(0).max(title.len())
        })
        .collect();
    let mut shown = columns.len();
    while shown > 1 && widths[..shown].iter().sum::<usize>() + 2 * (shown - 1) > width {
        shown -= 1;
    }
    let line = |cells: Vec<String>| cells.join("  ").trim_end().to_owned();
    let titles = columns[..shown]
        .iter()
        .zip(&widths)
        .map(|((title, side, _), width)| pad_str(title, *width, *side, None).into_owned());
    let mut lines = vec![
        Style::new()
            .bold()
            .apply_to(line(titles.collect()))
            .to_string(),
    ];
    for row in &rows {
        let cells = columns[..shown].iter().zip(&widths).zip(row);
        let cells = cells.map(|(((_, side, style), width), cell)| {
            let cell = pad_str(cell, *width, *side, None);
            style.apply_to(cell).to_string()
        });
        lines.push(line(cells.collect()));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"[
        {"protocol":"icmp","inside":{"address":"10.0.0.10","port":7},
         "outside":{"address":"198.51.100.2","port":7},"remote":{"address":"203.0.113.1","port":0},
         "state":"two-way","idle_seconds":1,"expires_in_seconds":59,
         "packets":{"outbound":5,"inbound":5},"bytes":{"outbound":420,"inbound":420}},
        {"protocol":"tcp","inside":{"address":"10.0.0.10","port":40000},
         "outside":{"address":"198.51.100.2","port":40000},
         "remote":{"address":"203.0.113.1","port":5201},"state":"closing","idle_seconds":0,
         "expires_in_seconds":240,"packets":{"outbound":123456,"inbound":6},
         "bytes":{"outbound":1210000000,"inbound":312}}]"#;

    #[test]
    fn the_table_fits_and_is_sorted() {
        let _alone = crate::COLOURS.lock();
        console::set_colors_enabled(false);
        let flows: Vec<Flow> = serde_json::from_str(JSON).unwrap();
        let wide = [
            "PROTO  INSIDE           OUTSIDE             REMOTE            STATE      BYTES  PACKETS",
            "tcp    10.0.0.10:40000  198.51.100.2:40000  203.0.113.1:5201  closing  1.21 GB  123,462",
            "icmp   10.0.0.10:7      198.51.100.2:7      203.0.113.1:0     two-way    840 B       10",
        ];
        assert_eq!(table(&flows, 120), wide);
        let narrow = table(&flows, 80);
        assert!(narrow.iter().all(|line| line.len() <= 80), "{narrow:?}");
        assert!(narrow[0].ends_with("BYTES"), "{narrow:?}");
    }

    #[test]
    fn no_sessions_leave_the_titles() {
        let _alone = crate::COLOURS.lock();
        console::set_colors_enabled(false);
        assert_eq!(table(&[], 80).len(), 1);
    }
}
