//! What stands on the terminal: on a real one the picture and the steps below it, drawn again and again
//! in the same place; elsewhere the steps as they end, and the picture when it is asked for. Owns the
//! terminal's state; knows nothing of what is shown.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Stdout, Write},
};

use console::{Term, truncate_str};

/// Columns where no terminal says how many there are.
pub const DEFAULT_COLUMNS: usize = 80;

const HIDE_CURSOR: &str = "\x1b[?25l";
const SHOW_CURSOR: &str = "\x1b[?25h";
const CLEAR_LINE: &str = "\x1b[2K";
const CLEAR_BELOW: &str = "\x1b[J";

/// Where things are shown.
pub struct Screen<W: Write = Stdout> {
    output: W,
    /// Whether the same place can be drawn again.
    live: bool,
    /// How many lines above the cursor are drawn anew next time.
    drawn: usize,
    /// What stands below the picture in every drawing.
    steps: Vec<String>,
    /// Whether nothing is shown any more.
    closed: bool,
}

impl Screen {
    /// The standard output.
    pub fn new() -> Self {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self::on(io::stdout(), io::stdout().is_terminal() && !is_dumb)
    }
}

impl<W: Write> Screen<W> {
    fn on(output: W, live: bool) -> Self {
        Self {
            output,
            live,
            drawn: 0,
            steps: Vec::new(),
            closed: false,
        }
    }

    /// Whether [`draw`](Self::draw) shows anything.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Draws the picture, the steps so far and the one that is under way in the place of what was
    /// drawn last.
    pub fn draw(&mut self, picture: &[String], current: Option<&str>) -> io::Result<()> {
        if self.live {
            self.draw_within(picture, current, size())
        } else {
            Ok(())
        }
    }

    fn draw_within(
        &mut self,
        picture: &[String],
        current: Option<&str>,
        (rows, columns): (usize, usize),
    ) -> io::Result<()> {
        let blank = String::new();
        let mut lines: Vec<&str> = Vec::new();
        if !picture.is_empty() {
            lines.extend(picture.iter().chain([&blank]).map(String::as_str));
        }
        lines.extend(self.steps.iter().map(String::as_str));
        lines.extend(current);
        // What has scrolled away cannot be drawn again.
        let hidden = (lines.len() + 1).saturating_sub(rows);
        let mut frame = HIDE_CURSOR.to_owned();
        if self.drawn > 0 {
            let _ = write!(frame, "\x1b[{}A\r", self.drawn);
        }
        for line in &lines[hidden..] {
            let line = truncate_str(line, columns, "…");
            let _ = writeln!(frame, "{CLEAR_LINE}{line}");
        }
        frame.push_str(CLEAR_BELOW);
        self.drawn = lines.len() - hidden;
        self.write(&frame)
    }

    /// Adds a step that has ended: to the next drawing, or at once where nothing is drawn.
    pub fn step(&mut self, line: String) -> io::Result<()> {
        if self.live {
            self.steps.push(line);
            Ok(())
        } else {
            self.write(&format!("{line}\n"))
        }
    }

    /// Leaves what is drawn where it is; what follows comes below.
    pub fn finish(&mut self) -> io::Result<()> {
        if !self.live {
            return Ok(());
        }
        self.drawn = 0;
        self.steps.clear();
        self.live = false;
        self.write(SHOW_CURSOR)
    }

    /// Leaves what is drawn, and prints a line; nothing else is shown any more but by another call.
    pub fn close(&mut self, line: &str) -> io::Result<()> {
        self.closed = false;
        self.finish()?;
        self.print(&[line.to_owned()])?;
        self.closed = true;
        Ok(())
    }

    /// Prints lines that stay.
    pub fn print(&mut self, lines: &[String]) -> io::Result<()> {
        let mut text = lines.join("\n");
        text.push('\n');
        self.write(&text)
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        self.output.write_all(text.as_bytes())?;
        self.output.flush()
    }
}

impl<W: Write> Drop for Screen<W> {
    fn drop(&mut self) {
        // There is nobody else to tell.
        let _ = self.finish();
    }
}

/// The terminal's rows and columns.
pub fn size() -> (usize, usize) {
    let size = Term::stdout().size_checked();
    size.map_or((usize::MAX, DEFAULT_COLUMNS), |(rows, columns)| {
        (rows.into(), columns.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(count: usize) -> Vec<String> {
        (0..count).map(|number| format!("line {number}")).collect()
    }

    #[test]
    fn a_drawing_takes_the_place_of_the_last_one() {
        let mut screen = Screen::on(Vec::new(), true);
        let size = (24, 80);
        screen.draw_within(&lines(3), Some("now"), size).unwrap();
        screen.output.clear();
        screen.step("done".to_owned()).unwrap();
        screen.draw_within(&lines(3), Some("next"), size).unwrap();
        let frame = String::from_utf8(screen.output.clone()).unwrap();
        // Three lines, a blank one, and the step.
        assert!(frame.contains("\x1b[5A\r"), "{frame:?}");
        assert_eq!(screen.drawn, 6);
        screen.output.clear();
        screen.finish().unwrap();
        assert_eq!(screen.output, SHOW_CURSOR.as_bytes());
        screen.step("later".to_owned()).unwrap();
        assert!(screen.output.ends_with(b"later\n"));
    }

    #[test]
    fn a_small_terminal_shows_the_end_of_each_drawing() {
        let mut screen = Screen::on(Vec::new(), true);
        screen
            .draw_within(&lines(30), Some("now"), (10, 6))
            .unwrap();
        assert_eq!(screen.drawn, 9);
        let frame = String::from_utf8(screen.output.clone()).unwrap();
        assert!(
            !frame.contains("line 0") && frame.contains("now"),
            "{frame:?}"
        );
        assert!(frame.contains("line …"), "{frame:?}");
    }

    #[test]
    fn a_closed_screen_is_silent() {
        let mut screen = Screen::on(Vec::new(), false);
        screen.close("first").unwrap();
        screen.step("done".to_owned()).unwrap();
        screen.print(&lines(1)).unwrap();
        screen.close("last").unwrap();
        assert_eq!(screen.output, b"first\nlast\n");
    }

    #[test]
    fn elsewhere_steps_are_printed_and_nothing_is_drawn() {
        let mut screen = Screen::on(Vec::new(), false);
        screen.draw(&lines(3), Some("now")).unwrap();
        screen.step("done".to_owned()).unwrap();
        screen.finish().unwrap();
        assert_eq!(screen.output, b"done\n");
    }
}
