//! Prints lists of any length: as a table for people, as a JSON array for programs. Rows are written
//! as they come, so that a million of them need no memory and the first is there at once.

use std::io::{self, BufWriter, StdoutLock, Write as _};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, ColumnConstraint, Table, Width, presets};
use serde::Serialize;

/// Rows that are laid out together.
const ROWS: usize = 256;

/// A column of a table. Text that is longer than `width` pushes the rest of its block aside.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub title: &'static str,
    pub width: u16,
    pub alignment: CellAlignment,
}

impl Column {
    pub const fn text(title: &'static str, width: u16) -> Self {
        Self {
            title,
            width,
            alignment: CellAlignment::Left,
        }
    }

    pub const fn number(title: &'static str, width: u16) -> Self {
        Self {
            title,
            width,
            alignment: CellAlignment::Right,
        }
    }
}

/// A list that is being printed to the standard output.
pub struct List<'a> {
    output: BufWriter<StdoutLock<'static>>,
    columns: &'a [Column],
    form: Form,
}

enum Form {
    /// The rows that are not written yet, and maybe the header.
    Table(Box<Table>),
    Json {
        empty: bool,
    },
}

impl<'a> List<'a> {
    /// Begins a JSON array, or a table with these columns.
    ///
    /// # Errors
    ///
    /// When the standard output cannot be written to.
    pub fn begin(json: bool, columns: &'a [Column]) -> Result<Self> {
        let mut output = BufWriter::new(io::stdout().lock());
        let form = if json {
            output.write_all(b"[").context(OUTPUT)?;
            Form::Json { empty: true }
        } else {
            let mut table = Table::new();
            table.set_header(columns.iter().map(|column| column.title));
            Form::Table(Box::new(table))
        };
        Ok(Self {
            output,
            columns,
            form,
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
        match &mut self.form {
            Form::Json { empty } => {
                let separator: &[u8] = if *empty { b"\n" } else { b",\n" };
                *empty = false;
                self.output.write_all(separator).context(OUTPUT)?;
                serde_json::to_writer(&mut self.output, value)
                    .map_err(io::Error::from)
                    .context(OUTPUT)
            }
            Form::Table(table) => {
                table.add_row(cells(value));
                if table.row_count() < ROWS {
                    return Ok(());
                }
                write_table(&mut self.output, self.columns, table)?;
                **table = Table::new();
                Ok(())
            }
        }
    }

    /// Prints what is left.
    ///
    /// # Errors
    ///
    /// When the standard output cannot be written to.
    pub fn end(mut self) -> Result<()> {
        match &mut self.form {
            Form::Json { empty } => {
                let end: &[u8] = if *empty { b"]\n" } else { b"\n]\n" };
                self.output.write_all(end).context(OUTPUT)?;
            }
            Form::Table(table) if table.header().is_some() || table.row_count() > 0 => {
                write_table(&mut self.output, self.columns, table)?;
            }
            Form::Table(_) => {}
        }
        self.output.flush().context(OUTPUT)
    }
}

const OUTPUT: &str = "cannot write to the standard output";

fn write_table(output: &mut impl io::Write, columns: &[Column], table: &mut Table) -> Result<()> {
    table.load_preset(presets::NOTHING);
    for (column, layout) in columns.iter().zip(table.column_iter_mut()) {
        layout
            .set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(column.width)))
            .set_padding((0, 1))
            .set_cell_alignment(column.alignment);
    }
    for line in table.lines() {
        writeln!(output, "{}", line.trim_end()).context(OUTPUT)?;
    }
    Ok(())
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
