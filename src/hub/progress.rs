//! Shows how far a long step has come: a bar where a person looks on, lines in the log elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// At least this long between two lines in the log.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A bar on standard error.
    Bar,
    Log,
}

impl Progress {
    /// A bar if standard error is a terminal.
    pub fn detect() -> Self {
        if std::io::stderr().is_terminal() { Progress::Bar } else { Progress::Log }
    }

    /// Begins a step of `total` bytes. `what` completes "downloading …" or the like, and stands in the log.
    pub fn start(self, what: impl Into<String>, total: u64) -> Task {
        let what = what.into();
        let bar = match self {
            Progress::Bar => bar(&what, total),
            Progress::Log => {
                tracing::info!(total_bytes = total, "{what}");
                ProgressBar::hidden()
            }
        };
        Task { bar, what, total, done: 0, logs: self == Progress::Log, last_line: Instant::now() }
    }
}

fn bar(what: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg} [{bar:32}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .expect("the template is valid");
    bar.set_style(style.progress_chars("=> "));
    bar.set_message(what.to_owned());
    bar
}

/// A step under way. Dropping it removes the bar.
pub struct Task {
    bar: ProgressBar,
    what: String,
    total: u64,
    done: u64,
    logs: bool,
    last_line: Instant,
}

impl Task {
    pub fn advance(&mut self, bytes: u64) {
        self.set(self.done + bytes);
    }

    /// `done` of the total, whatever it was before.
    pub fn set(&mut self, done: u64) {
        self.done = done;
        self.bar.set_position(done.min(self.total));
        if self.logs && self.last_line.elapsed() >= LOG_INTERVAL {
            self.last_line = Instant::now();
            tracing::info!(bytes = done, total_bytes = self.total, "{}", self.what);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
