//! Prints lists of any length: as a table for people, as a JSON array for programs. Rows are written
//! as they come, so that a million of them need no memory and the first is there at once; columns
//! have fixed widths for that.

use std::io::{self, BufWriter, StdoutLock, Write as _};

use anyhow::{Context as _, Result};
use serde::Serialize;

const OUTPUT: &str = "cannot write to the standard output";

/// A column of a table. Text that is wider pushes the rest of its row aside.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    title: &'static str,
    width: usize,
    is_number: bool,
}

impl Column {
    /// Aligned to the left.
    pub const fn text(title: &'static str, width: usize) -> Self {
        Self {
            title,
            width,
            is_number: false,
        }
    }

    /// Aligned to the right.
    pub const fn number(title: &'static str, width: usize) -> Self {
        Self {
            title,
            width,
            is_number: true,
        }
    }
}

/// A list that is being printed to the standard output.
pub struct List<'a> {
    output: BufWriter<StdoutLock<'static>>,
    form: Form<'a>,
}

enum Form<'a> {
    Table(&'a [Column]),
    Json { empty: bool },
}

impl<'a> List<'a> {
    /// Begins a JSON array, or a table with these columns.
    ///
    /// # Errors
    ///
    /// When the standard output cannot be written to.
    pub fn begin(json: bool, columns: &'a [Column]) -> Result<Self> {
        let mut output = BufWriter::new(io::stdout().lock());
        if json {
            output.write_all(b"[").context(OUTPUT)?;
            return Ok(Self {
                output,
                form: Form::Json { empty: true },
            });
        }
        write_row(
            &mut output,
            columns,
            columns.iter().map(|column| column.title),
        )
        .context(OUTPUT)?;
        Ok(Self {
            output,
            form: Form::Table(columns),
        })
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
            Form::Table(columns) => write_row(output, columns, cells(value)).context(OUTPUT),
        }
    }

    /// Prints what is left.
    ///
    /// # Errors
    ///
    /// When the standard output cannot be written to.
    pub fn end(mut self) -> Result<()> {
        if let Form::Json { empty } = self.form {
            let end: &[u8] = if empty { b"]\n" } else { b"\n]\n" };
            self.output.write_all(end).context(OUTPUT)?;
        }
        self.output.flush().context(OUTPUT)
    }
}

fn write_row(
    output: &mut impl io::Write,
    columns: &[Column],
    cells: impl IntoIterator<Item = impl AsRef<str>>,
) -> io::Result<()> {
    for (position, (column, cell)) in columns.iter().zip(cells).enumerate() {
        let (cell, width) = (cell.as_ref(), column.width);
        let separator = if position == 0 { "" } else { "  " };
        if column.is_number {
            write!(output, "{separator}{cell:>width$}")?;
        } else if position + 1 == columns.len() {
            write!(output, "{separator}{cell}")?;
        } else {
            write!(output, "{separator}{cell:<width$}")?;
        }
    }
    writeln!(output)
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

    #[test]
    fn rows_line_up_and_end_without_blanks() {
        let columns = [
            Column::text("NAME", 6),
            Column::number("COUNT", 5),
            Column::text("TO", 4),
        ];
        let mut output = Vec::new();
        write_row(&mut output, &columns, columns.map(|column| column.title)).unwrap();
        write_row(&mut output, &columns, ["a", "7", "b"]).unwrap();
        write_row(&mut output, &columns, ["longer-name", "123456", "b"]).unwrap();
        assert_eq!(
            String::from_utf8(output).unwrap(),
            "NAME    COUNT  TO\na           7  b\nlonger-name  123456  b\n"
        );
    }
}
