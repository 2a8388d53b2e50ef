//! `tapnat top`: a live view of an instance. Owns the terminal and the keys; what is drawn is
//! [`screen`]'s, what it says is [`crate::activity`]'s.

mod screen;

use std::{
    io::{self, IsTerminal as _},
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::DefaultTerminal;
use signal_hook::{consts::SIGTERM, low_level::emulate_default_handler};

use self::screen::View;
use super::{Format, Instance, print, watch::parse_interval};
use crate::{
    activity::{Activity, Look},
    progress::Progress,
};

/// The second look comes as soon as rates make sense.
const FIRST: Duration = Duration::from_millis(500);
/// How long a signal may go unnoticed.
const ATTENTION: Duration = Duration::from_millis(200);
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_mins(1);

#[derive(Debug, Args)]
pub struct Arguments {
    /// Look anew so often
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = parse_interval)]
    interval: Duration,

    #[command(flatten)]
    instance: Instance,
    #[command(flatten)]
    format: Format,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        if self.format.json {
            let progress = Progress::waiting("looking twice, for what passes in between");
            let activity = self.instance.activity(self.interval)?;
            drop(progress);
            return print::json(&activity);
        }
        ensure!(
            io::stdout().is_terminal() && io::stdin().is_terminal(),
            "`tapnat top` draws on a terminal, and this is none: `tapnat top --json` prints what it \
             would show"
        );
        // What is wrong with the instance is better said before the screen is taken.
        let first = self.instance.look()?;
        let signal = catch_signals()?;
        let mut terminal = Screen::take()?;
        let result = self.run(&mut terminal.0, first, &signal);
        drop(terminal);
        match signal.load(Ordering::Relaxed) {
            0 => result,
            number => emulate_default_handler(number).context("cannot end as the signal asks"),
        }
    }

    fn run(&self, terminal: &mut DefaultTerminal, first: Look, signal: &AtomicI32) -> Result<()> {
        let mut view = View::new(self.interval);
        let mut before = first;
        let mut activity = None::<Activity>;
        let mut next = Instant::now() + FIRST;
        loop {
            terminal
                .draw(|frame| view.draw(activity.as_ref(), frame))
                .context("cannot draw on the terminal")?;
            while signal.load(Ordering::Relaxed) == 0 && Instant::now() < next {
                let left = next.saturating_duration_since(Instant::now());
                if !event::poll(left.min(ATTENTION)).context("cannot read the keys")? {
                    continue;
                }
                match event::read().context("cannot read the keys")? {
                    Event::Key(key) if key.kind != KeyEventKind::Release && !view.press(key) => {
                        return Ok(());
                    }
                    // It looks different now, or has another size.
                    _ => {}
                }
                break;
            }
            if signal.load(Ordering::Relaxed) != 0 {
                return Ok(());
            }
            if Instant::now() < next {
                continue;
            }
            let begin = Instant::now();
            if !view.is_held() {
                let tables = self.instance.tables()?;
                let look = Look::take(&self.instance.name, &tables)?;
                activity = Some(look.since(&before, &tables)?);
                before = look;
            }
            // With a million sessions a look takes a while; no more than half of a processor.
            let took = begin.elapsed();
            next = begin + view.interval().max(2 * took);
        }
    }
}

impl Instance {
    fn look(&self) -> Result<Look> {
        Look::take(&self.name, &self.tables()?)
    }

    /// What happens in so long.
    pub fn activity(&self, interval: Duration) -> Result<Activity> {
        let before = self.look()?;
        thread::sleep(interval);
        let tables = self.tables()?;
        Look::take(&self.name, &tables)?.since(&before, &tables)
    }
}

/// The terminal in the state that drawing needs, put back when dropped and when there is a panic.
struct Screen(DefaultTerminal);

impl Screen {
    fn take() -> Result<Self> {
        ratatui::try_init()
            .map(Self)
            .context("cannot draw on this terminal")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// The signal that is to end this process, 0 for none.
///
/// SIGHUP ends it as it ends any: the terminal is gone, and crossterm would go on reading from it.
fn catch_signals() -> Result<Arc<AtomicI32>> {
    let last = Arc::new(AtomicI32::new(0));
    let noted = Arc::clone(&last);
    let note = move || noted.store(SIGTERM, Ordering::Relaxed);
    // SAFETY: storing to an atomic is all that the handler does.
    unsafe { signal_hook::low_level::register(SIGTERM, note) }
        .context("cannot wait for signals")?;
    Ok(last)
}

impl View {
    /// Does what a key asks for. `false` when it is to end.
    fn press(&mut self, key: KeyEvent) -> bool {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return false,
            KeyCode::Char('q') => return false,
            KeyCode::Esc if !self.hide_help() => return false,
            KeyCode::Char('h' | '?') => self.toggle_help(),
            KeyCode::Tab => self.next_list(),
            KeyCode::Char('s') => self.next_order(),
            KeyCode::Char('p' | ' ') => self.toggle_hold(),
            KeyCode::Char('+') => self.set_interval((self.interval() * 2).min(LONGEST)),
            KeyCode::Char('-') => self.set_interval((self.interval() / 2).max(SHORTEST)),
            KeyCode::Down => self.scroll(1),
            KeyCode::Up => self.scroll(-1),
            KeyCode::PageDown => self.scroll(10),
            KeyCode::PageUp => self.scroll(-10),
            KeyCode::Home => self.scroll(isize::MIN),
            _ => {}
        }
        true
    }
}
