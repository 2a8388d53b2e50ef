//! Prints lists of any length: as a table for people, as a JSON array for programs. Rows are written
//! as they come, so that a million of them need no memory; the first ones wait for each other, as
//! they say how wide the columns are. On a terminal no row is wider than that: long endpoints lack
//! their middle, then columns are left out. There are colours there unless `NO_COLOR` is set.

use std::io::{self, BufWriter, IsTerminal as _, StdoutLock, Write};

use anyhow::{Context as _, Result};
use console::Style;
use rustix::termios::tcgetwinsize;
use serde::Serialize;
use tapnat_display::{palette, units::shortened};

pub const OUTPUT: &str = "cannot write to the standard output";

/// How many rows are looked at for the widths of the columns.
const SAMPLE: usize = 200;
const SEPARATOR: &str = "  ";
/// To how many letters an endpoint is shortened at most: any of IPv4 stays whole.
const SHORTEST: usize = "255.255.255.255:65535".len();
/// Bytes that are written at once.
const BUFFER: usize = 1 << 16;

/// A column of a table. A later cell that is wider pushes the rest of its row aside, and those of
/// the rows below: addresses of IPv6 come after those of IPv4.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    title: &'static str,
    is_number: bool,
    /// Whether its cells are of use without their middle.
    is_endpoint: bool,
    tint: Tint,
}

/// What a column's cells are, where that is shown by a colour.
#[derive(Clone, Copy, Debug)]
enum Tint {
    Plain,
    /// Guests' own endpoints.
    Inside,
    /// What the world sees in their place.
    Outside,
}

impl Tint {
    fn style(self) -> Style {
        match self {
            Self::Plain => Style::new(),
            Self::Inside => palette::inside(),
            Self::Outside => palette::outside(),
        }
    }
}

impl Column {
    /// Aligned to the left.
    pub const fn text(title: &'static str) -> Self {
        Self {
            title,
            is_number: false,
            is_endpoint: false,
            tint: Tint::Plain,
        }
    }

    /// As [`Self::text`], of addresses with or without ports.
    pub const fn endpoint(title: &'static str) -> Self {
        Self {
            is_endpoint: true,
            ..Self::text(title)
        }
    }

    /// Guests' own endpoints.
    pub const fn inside(title: &'static str) -> Self {
        Self {
            tint: Tint::Inside,
            ..Self::endpoint(title)
        }
    }

    /// Endpoints that stand for guests.
    pub const fn outside(title: &'static str) -> Self {
        Self {
            tint: Tint::Outside,
            ..Self::endpoint(title)
        }
    }

    /// Aligned to the right.
    pub const fn number(title: &'static str) -> Self {
        Self {
            is_number: true,
            ..Self::text(title)
        }
    }

    /// The least width of a column whose widest cell is this wide.
    fn least(&self, widest: usize) -> usize {
        if self.is_endpoint {
            widest.min(SHORTEST)
        } else {
            widest
        }
    }
}

/// A list that is being printed.
pub struct List<'a, W: Write = BufWriter<StdoutLock<'static>>> {
    output: W,
    form: Form<'a>,
}

enum Form<'a> {
    Table(Table<'a>),
    Json { empty: bool },
}

impl<'a> List<'a> {
    /// Begins a JSON array, or a table with these columns, on the standard output.
    ///
    /// # Errors
    ///
    /// When the standard output cannot be written to.
    pub fn begin(json: bool, columns: &'a [Column]) -> Result<Self> {
        Self::begin_on(standard_output(), json, columns, terminal_width())
    }
}

impl<'a, W: Write> List<'a, W> {
    /// Begins a JSON array, or a table with these columns: without those at the right that do not
    /// fit a `width`.
    ///
    /// # Errors
    ///
    /// When the output cannot be written to.
    pub fn begin_on(
        mut output: W,
        json: bool,
        columns: &'a [Column],
        width: Option<usize>,
    ) -> Result<Self> {
        let form = if json {
            output.write_all(b"[").context(OUTPUT)?;
            Form::Json { empty: true }
        } else {
            Form::Table(Table::new(columns, width))
        };
        Ok(Self { output, form })
    }

    /// Prints an entry: `value` as JSON, or `cells` as a row.
    ///
    /// # Errors
    ///
    /// When the standard output cannot be written to.
    pub fn entry<T: Serialize>(
        &mut self,
        value: &T,
        cells: impl FnOnce(&T) -> Vec<String>,
    ) -> Result<()> {
        let output = &mut self.output;
        match &mut self.form {
            Form::Json { empty } => {
                let separator: &[u8] = if *empty { b"\n" } else { b",\n" };
                *empty = false;
                output.write_all(separator).context(OUTPUT)?;
                serde_json::to_writer(output, value)
                    .map_err(io::Error::from)
                    .context(OUTPUT)
            }
            Form::Table(table) => table.row(cells(value), output).context(OUTPUT),
        }
    }

    /// Prints what is left.
    ///
    /// # Errors
    ///
    /// When the output cannot be written to.
    pub fn end(mut self) -> Result<()> {
        match &mut self.form {
            Form::Json { empty } => {
                let end: &[u8] = if *empty { b"]\n" } else { b"\n]\n" };
                self.output.write_all(end).context(OUTPUT)?;
            }
            Form::Table(table) => table.settle(&mut self.output).context(OUTPUT)?,
        }
        self.output.flush().context(OUTPUT)
    }
}

/// The standard output, for much of it.
pub fn standard_output() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(BUFFER, io::stdout().lock())
}

/// Columns of the standard output, if that is a terminal.
pub fn terminal_width() -> Option<usize> {
    terminal_size().map(|(columns, _)| columns)
}

/// Columns and rows of the standard output, if that is a terminal.
pub fn terminal_size() -> Option<(usize, usize)> {
    let output = io::stdout();
    if !output.is_terminal() {
        return None;
    }
    let size = tcgetwinsize(output).ok()?;
    // One that nobody told how large it is says 0.
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col.into(), size.ws_row.into()))
}

/// A table that is being printed.
struct Table<'a> {
    columns: &'a [Column],
    /// Those of the columns that are printed, once that is known.
    widths: Option<Vec<usize>>,
    /// Rows that wait until then.
    held: Vec<Vec<String>>,
    limit: Option<usize>,
    is_coloured: bool,
}

impl<'a> Table<'a> {
    /// A table whose rows are no wider than `limit`, as far as the first of them tell.
    fn new(columns: &'a [Column], limit: Option<usize>) -> Self {
        Self {
            columns,
            widths: None,
            held: Vec::new(),
            limit,
            is_coloured: console::colors_enabled(),
        }
    }

    fn row(&mut self, mut cells: Vec<String>, output: &mut impl Write) -> io::Result<()> {
        if let Some(widths) = &mut self.widths {
            if self.limit.is_some() {
                shorten(&mut cells, self.columns, widths);
            } else {
                for (width, cell) in widths.iter_mut().zip(&cells) {
                    *width = cell.len().max(*width);
                }
            }
            let style = |it: &Column| self.is_coloured.then(|| it.tint.style());
            return write_row(output, self.columns, widths, &cells, style);
        }
        self.held.push(cells);
        if self.held.len() < SAMPLE {
            return Ok(());
        }
        self.settle(output)
    }

    /// Chooses the widths, and prints what waited for them.
    fn settle(&mut self, output: &mut impl Write) -> io::Result<()> {
        if self.widths.is_some() {
            return Ok(());
        }
        let titles: Vec<_> = self.columns.iter().map(|it| it.title.to_owned()).collect();
        self.held.insert(0, titles);
        let widest = |place: usize| {
            let cells = self.held.iter().filter_map(|row| row.get(place));
            cells.map(String::len).max().unwrap_or(0)
        };
        let mut widths: Vec<_> = (0..self.columns.len()).map(widest).collect();
        let total = |widths: &[usize]| {
            widths.iter().sum::<usize>() + SEPARATOR.len() * widths.len().saturating_sub(1)
        };
        if let Some(limit) = self.limit {
            let least = |(column, width): (&Column, &usize)| column.least(*width);
            let mut least: Vec<_> = self.columns.iter().zip(&widths).map(least).collect();
            while least.len() > 1 && total(&least) > limit {
                least.pop();
            }
            widths.truncate(least.len());
            while total(&widths) > limit
                && let Some((width, _)) = widths
                    .iter_mut()
                    .zip(&least)
                    .filter(|(width, least)| **width > **least)
                    .max_by_key(|(width, _)| **width)
            {
                *width -= 1;
            }
        }
        for (number, mut row) in self.held.drain(..).enumerate() {
            if self.limit.is_some() && number > 0 {
                shorten(&mut row, self.columns, &widths);
            }
            let is_coloured = self.is_coloured;
            let style = |column: &Column| {
                is_coloured.then(|| match number {
                    0 => Style::new().bold(),
                    _ => column.tint.style(),
                })
            };
            write_row(output, self.columns, &widths, &row, style)?;
        }
        self.widths = Some(widths);
        Ok(())
    }
}

/// Takes the middle out of endpoints that are too wide.
fn shorten(cells: &mut [String], columns: &[Column], widths: &[usize]) {
    for ((cell, column), width) in cells.iter_mut().zip(columns).zip(widths) {
        if column.is_endpoint && cell.len() > *width {
            *cell = shortened(cell, *width);
        }
    }
}

/// Prints as many cells as there are widths. Of a million rows most of the time goes by here, so
/// nothing is formatted.
fn write_row(
    output: &mut impl Write,
    columns: &[Column],
    widths: &[usize],
    cells: &[String],
    style: impl Fn(&Column) -> Option<Style>,
) -> io::Result<()> {
    for (position, ((column, cell), &width)) in columns.iter().zip(cells).zip(widths).enumerate() {
        if position > 0 {
            output.write_all(SEPARATOR.as_bytes())?;
        }
        let blanks = width.saturating_sub(cell.len());
        if column.is_number {
            write_blanks(output, blanks)?;
        }
        match style(column) {
            Some(style) => write!(output, "{}", style.apply_to(cell))?,
            None => output.write_all(cell.as_bytes())?,
        }
        if !column.is_number && position + 1 < widths.len() {
            write_blanks(output, blanks)?;
        }
    }
    output.write_all(b"\n")
}

fn write_blanks(output: &mut impl Write, mut count: usize) -> io::Result<()> {
    const BLANKS: &[u8] = b"                                ";
    while let Some(blanks) = BLANKS.get(..count.min(BLANKS.len()))
        && !blanks.is_empty()
    {
        output.write_all(blanks)?;
        count -= blanks.len();
    }
    Ok(())
}

/// What ends the word for so many things.
pub const fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Prints one JSON value, over several lines.
///
/// # Errors
///
/// When the standard output cannot be written to.
pub fn json<T: Serialize>(value: &T) -> Result<()> {
    let mut output = BufWriter::new(io::stdout().lock());
    serde_json::to_writer_pretty(&mut output, value)
        .map_err(io::Error::from)
        .context(OUTPUT)?;
    writeln!(output)
        .and_then(|()| output.flush())
        .context(OUTPUT)
}

/// Prints text.
///
/// # Errors
///
/// When the standard output cannot be written to.
pub fn text(text: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .context(OUTPUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [
        Column::text("NAME"),
        Column::number("COUNT"),
        Column::text("TO"),
    ];

    fn row(cells: [&str; 3]) -> Vec<String> {
        cells.map(str::to_owned).to_vec()
    }

    #[test]
    fn colours_are_only_around_what_stands_there() {
        let columns = [Column::inside("INSIDE"), Column::outside("OUTSIDE")];
        let mut output = Vec::new();
        let style = |it: &Column| Some(it.tint.style().force_styling(true));
        let cells = ["a", "b"].map(str::to_owned);
        write_row(&mut output, &columns, &[3, 7], &cells, style).unwrap();
        let text = String::from_utf8(output).unwrap();
        assert_eq!(console::strip_ansi_codes(&text), "a    b\n");
        assert_eq!(text.matches('\u{1b}').count(), 4, "{text:?}");
    }

    fn printed(limit: Option<usize>, rows: &[[&str; 3]]) -> String {
        let mut output = Vec::new();
        let mut table = Table::new(&COLUMNS, limit);
        for cells in rows {
            table.row(row(*cells), &mut output).unwrap();
        }
        table.settle(&mut output).unwrap();
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn rows_line_up_and_end_without_blanks() {
        let rows = [["a", "7", "b"], ["longer-name", "123456", "b"]];
        assert_eq!(
            printed(None, &rows),
            "NAME          COUNT  TO\na                 7  b\nlonger-name  123456  b\n"
        );
        assert_eq!(printed(None, &[]), "NAME  COUNT  TO\n");
    }

    #[test]
    fn columns_that_do_not_fit_the_terminal_are_left_out() {
        let rows = [["longer-name", "7", "b"]];
        assert_eq!(printed(Some(22), &rows), printed(None, &rows));
        assert_eq!(
            printed(Some(21), &rows),
            "NAME         COUNT\nlonger-name      7\n"
        );
        assert_eq!(printed(Some(1), &rows), "NAME\nlonger-name\n");
    }

    #[test]
    fn endpoints_lack_their_middle_before_columns_are_left_out() {
        let columns = [
            Column::inside("INSIDE"),
            Column::endpoint("REMOTE"),
            Column::text("STATE"),
        ];
        let inside = "[fd00:7a70::431:6ff:fe47:d058]:28352";
        let cells = [inside, "198.51.100.111:65535", "two-way"];
        let printed = |limit, rows: usize| {
            let mut output = Vec::new();
            let mut table = Table::new(&columns, Some(limit));
            for _ in 0..rows {
                table.row(row(cells), &mut output).unwrap();
            }
            table.settle(&mut output).unwrap();
            String::from_utf8(output).unwrap()
        };
        let whole = printed(80, 1);
        assert!(whole.contains(inside), "{whole}");
        for limit in [60, 52] {
            let text = printed(limit, SAMPLE + 1);
            let (title, rows) = text.split_once('\n').unwrap();
            assert!(title.ends_with("STATE"), "{text}");
            for line in rows.lines() {
                assert_eq!(line.chars().count(), limit, "{line}");
                assert!(
                    line.starts_with("[fd00:7a7") && line.contains("…"),
                    "{line}"
                );
                assert!(line.ends_with(":28352  198.51.100.111:65535  two-way"));
            }
        }
        let narrower = printed(51, 1);
        let ends = |line: &str| line.ends_with(":28352  198.51.100.111:65535");
        assert!(narrower.lines().skip(1).all(ends), "{narrower}");
    }

    #[test]
    fn the_first_rows_say_how_wide_the_columns_are() {
        let mut rows = vec![["ab", "1", "x"]; SAMPLE];
        rows.push(["wider-than-all", "1", "x"]);
        let text = printed(None, &rows);
        assert_eq!(text.lines().count(), SAMPLE + 2);
        assert!(
            text.starts_with("NAME  COUNT  TO\nab        1  x\n"),
            "{text}"
        );
        assert!(text.ends_with("wider-than-all      1  x\n"), "{text}");
    }
}
