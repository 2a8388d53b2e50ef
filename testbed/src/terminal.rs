//! A pseudo terminal for programs that look at theirs: what they draw on it is read as a terminal
//! would show it. Owns the two ends and the screen; what is typed and expected is the test's.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    num::NonZeroU16,
    os::fd::OwnedFd,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    pty::{OpenptyResult, Winsize, openpty},
    unistd::ttyname,
};
use vt100::Parser;

use crate::process::{Command, Process};

/// A terminal with a program on it.
pub struct Terminal {
    process: Process,
    keyboard: File,
    path: PathBuf,
    shown: Arc<Mutex<Parser>>,
}

impl Terminal {
    /// Starts a command on a terminal of this size.
    ///
    /// # Errors
    /// There is no pseudo terminal, or the command cannot be started.
    pub fn start(command: Command, columns: u16, rows: u16) -> Result<Self> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let OpenptyResult { master, slave } =
            openpty(Some(&size), None).context("cannot open a pseudo terminal")?;
        // A terminal is gone when nobody has it open any more.
        for end in [&master, &slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let process = command
            .env("TERM", "xterm-256color")
            .on_terminal(&slave)?
            .spawn()?;
        let path = ttyname(&slave).context("the terminal has no name")?;
        drop(slave);
        let [rows, columns] = [rows, columns].map(NonZeroU16::new);
        let parser = Parser::new(
            rows.context("a terminal has rows")?,
            columns.context("a terminal has columns")?,
            0,
        );
        let shown = Arc::new(Mutex::new(parser));
        let screen = File::from(master.try_clone()?);
        let parser = Arc::clone(&shown);
        thread::spawn(move || follow(screen, &parser));
        Ok(Self {
            process,
            keyboard: File::from(master),
            path,
            shown,
        })
    }

    /// Makes it larger or smaller, which the program is told.
    ///
    /// # Errors
    /// The program has ended.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let [new_rows, new_columns] = [rows, columns].map(NonZeroU16::new);
        self.parser().set_size(
            new_rows.context("a terminal has rows")?,
            new_columns.context("a terminal has columns")?,
        );
        let path = self.path.to_str().context("an odd name")?;
        let [rows, columns] = [rows, columns].map(|it| it.to_string());
        let arguments = ["-F", path, "rows", &rows, "columns", &columns];
        Command::new("stty").args(arguments).run()?;
        Ok(())
    }

    /// Types these keys.
    ///
    /// # Errors
    /// The program has ended.
    pub fn type_keys(&mut self, keys: &str) -> Result<()> {
        self.keyboard
            .write_all(keys.as_bytes())
            .context("cannot type")
    }

    /// What is on the screen now, without colours, a line for each row.
    #[must_use]
    pub fn screen(&self) -> String {
        self.parser().screen().contents()
    }

    /// Whether any of what is on the screen has a colour.
    #[must_use]
    pub fn has_colours(&self) -> bool {
        let parser = self.parser();
        let screen = parser.screen();
        let (rows, columns) = screen.size();
        (0..rows.get()).any(|row| {
            (0..columns.get()).any(|column| {
                screen
                    .cell(row, column)
                    .is_some_and(|cell| cell.fgcolor() != vt100::Color::Default)
            })
        })
    }

    /// Whether a full-screen program has the terminal, which gets what it showed before back later.
    #[must_use]
    pub fn is_full_screen(&self) -> bool {
        self.parser().screen().alternate_screen()
    }

    /// Whether the cursor is seen.
    #[must_use]
    pub fn has_cursor(&self) -> bool {
        !self.parser().screen().hide_cursor()
    }

    /// Waits until the screen shows what it should, and returns it.
    ///
    /// # Errors
    /// It does not; the error quotes what it shows.
    pub fn wait_for(&self, timeout: Duration, shows: impl Fn(&str) -> bool) -> Result<String> {
        let start = Instant::now();
        loop {
            let screen = self.screen();
            if shows(&screen) {
                return Ok(screen);
            }
            if start.elapsed() > timeout {
                bail!("the terminal shows something else:\n{screen}");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The program on the terminal.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn parser(&self) -> MutexGuard<'_, Parser> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads until the last program has closed the terminal.
fn follow(mut screen: File, shown: &Mutex<Parser>) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = screen.read(&mut bytes) {
        let mut parser = shown.lock().unwrap_or_else(PoisonError::into_inner);
        parser.process(bytes.get(..count).unwrap_or_default());
    }
}

/// The three streams of a program on a terminal.
pub(crate) fn streams(terminal: &OwnedFd) -> Result<[Stdio; 3]> {
    let stream = || Ok::<_, anyhow::Error>(Stdio::from(terminal.try_clone()?));
    Ok([stream()?, stream()?, stream()?])
}
