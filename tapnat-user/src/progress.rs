//! Says on a terminal that something takes its time, and how far it is: on the standard error, once a
//! second has passed, and no longer than it takes. Elsewhere it says nothing. Drawing is `indicatif`'s.

use std::{
    io::{self, IsTerminal as _, Read},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What takes less needs no word.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is drawn.
const TICK: Duration = Duration::from_millis(200);

const WAITING: &str = "{spinner} {msg} ({elapsed})";
const COUNTING: &str = "{spinner} {msg}: {human_pos} so far ({elapsed})";
const READING: &str = "{spinner} {msg}: {percent} % of {total_bytes} ({elapsed})";

/// Something that may take a while; over when it is dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    /// Waits until it is worth a word.
    waiting: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Of what cannot be measured: "the kernel verifies programs".
    #[must_use]
    pub fn waiting(what: &'static str) -> Self {
        Self::begin(what, WAITING, None)
    }

    /// Of which nobody knows how many there are: "looking at sessions".
    #[must_use]
    pub fn counting(what: &'static str) -> Self {
        Self::begin(what, COUNTING, None)
    }

    /// Of so many bytes, if that is known.
    #[must_use]
    pub fn reading(what: &'static str, bytes: Option<u64>) -> Self {
        let template = if bytes.is_some() { READING } else { WAITING };
        Self::begin(what, template, bytes)
    }

    /// Of what is shown in another way.
    #[must_use]
    pub fn silent() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            waiting: None,
        }
    }

    fn begin(what: &'static str, template: &str, length: Option<u64>) -> Self {
        let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::hidden());
        if !io::stderr().is_terminal() {
            return Self { bar, waiting: None };
        }
        bar.set_message(what);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let (stop, stopped) = channel::<()>();
        let shown = bar.clone();
        let thread = thread::spawn(move || {
            if stopped.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                shown.set_draw_target(ProgressDrawTarget::stderr());
                shown.enable_steady_tick(TICK);
            }
        });
        Self {
            bar,
            waiting: Some((stop, thread)),
        }
    }

    /// That much more is done.
    pub fn advance(&self, by: u64) {
        self.bar.inc(by);
    }

    /// Counts what is read from this.
    pub fn wrap<R: Read>(&self, reader: R) -> impl Read + use<R> {
        self.bar.wrap_read(reader)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let Some((stop, thread)) = self.waiting.take() else {
            return;
        };
        drop(stop);
        // It only waited, or has begun to draw.
        let _ = thread.join();
        self.bar.finish_and_clear();
    }
}
