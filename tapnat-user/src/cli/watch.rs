//! Shows something again and again until Ctrl-C: on a terminal in the same place, elsewhere one after
//! the other. Knows nothing of what is shown.

use std::{
    io::{self, Write as _},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Args;

use super::print;
use crate::config::parse_duration;

/// Where the cursor begins a frame, and what takes away the rest of a line, and all below.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

/// Whether something is shown again and again.
#[derive(Clone, Copy, Debug, Args)]
pub struct Watching {
    /// Show it anew every two seconds, or as often as it says, until Ctrl-C
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2",
        value_parser = parse_interval
    )]
    pub watch: Option<Duration>,
}

/// Reads how long to wait between two looks.
///
/// # Errors
///
/// When it is no time, or too short.
pub fn parse_interval(text: &str) -> Result<Duration> {
    let interval = parse_duration(text)?;
    Ok(Duration::from_millis(interval.milliseconds() / 10 * 10))
}

/// Columns and rows that there are for what is shown.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub columns: usize,
    pub rows: usize,
}

/// Shows what `show` writes, every `interval`; on a terminal as much as there is room for. Rests at
/// least as long as `show` took. Never ends by itself.
///
/// # Errors
///
/// What `show` says, or when the standard output cannot be written to.
pub fn watch(
    interval: Duration,
    mut show: impl FnMut(&mut Vec<u8>, Option<Room>) -> Result<()>,
) -> Result<()> {
    loop {
        let begin = Instant::now();
        let room = print::terminal_size().map(|(columns, rows)| Room { columns, rows });
        let mut text = Vec::new();
        show(&mut text, room)?;
        if let Some(room) = room {
            text = frame(&String::from_utf8_lossy(&text), room).into_bytes();
        }
        let mut output = io::stdout().lock();
        output
            .write_all(&text)
            .and_then(|()| output.flush())
            .context(print::OUTPUT)?;
        drop(output);
        let took = begin.elapsed();
        thread::sleep(interval.saturating_sub(took).max(took));
    }
}

/// Puts lines in the place of those that are there. No more than fit: what scrolls away could not be
/// replaced.
fn frame(text: &str, room: Room) -> String {
    let lines: Vec<_> = text.lines().take(room.rows).collect();
    let separator = format!("{CLEAR_LINE}\r\n");
    format!("{HOME}{}{CLEAR_LINE}{CLEAR_BELOW}", lines.join(&separator))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_takes_the_place_of_the_last_one_and_does_not_scroll() {
        let room = Room {
            columns: 80,
            rows: 2,
        };
        assert_eq!(
            frame("one\ntwo\nthree\n", room),
            "\x1b[Hone\x1b[K\r\ntwo\x1b[K\x1b[J"
        );
        assert_eq!(frame("", room), "\x1b[H\x1b[K\x1b[J");
    }
}
