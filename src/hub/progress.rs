//! Shows the progress of a long step: a bar on a terminal, log lines elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Minimum time between two log lines.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Called with the fraction of the current step that is done, 0 to 1.
pub type Observer = Arc<dyn Fn(f64) + Send + Sync>;

#[derive(Clone)]
pub enum Progress {
    /// A bar on standard error.
    Bar,
    Log,
    /// Like the inner one, and also calls the observer.
    Observed(Box<Progress>, Observer),
}

impl Progress {
    /// Chooses a bar if standard error is a terminal, else the log.
    pub fn detect() -> Self {
        if std::io::stderr().is_terminal() { Progress::Bar } else { Progress::Log }
    }

    /// Also calls the observer.
    pub fn observed(self, observer: impl Fn(f64) + Send + Sync + 'static) -> Self {
        Progress::Observed(Box::new(self), Arc::new(observer))
    }

    /// Starts a step of `total` bytes. `what` describes it, such as "downloading …".
    pub fn start(&self, what: impl Into<String>, total: u64) -> ProgressTask {
        let what = what.into();
        let bar = match self {
            Progress::Observed(inner, observer) => {
                observer(0.0);
                let mut task = inner.start(what, total);
                task.observer = Some(observer.clone());
                return task;
            }
            Progress::Bar => bar(&what, total),
            Progress::Log => {
                tracing::info!(total_bytes = total, "{what}");
                ProgressBar::hidden()
            }
        };
        ProgressTask {
            bar,
            what,
            total,
            done: 0,
            logs: matches!(self, Progress::Log),
            last_line: Instant::now(),
            observer: None,
        }
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

/// A running step. Dropping it removes the bar.
pub struct ProgressTask {
    bar: ProgressBar,
    what: String,
    total: u64,
    done: u64,
    logs: bool,
    last_line: Instant,
    observer: Option<Observer>,
}

impl ProgressTask {
    pub fn advance(&mut self, bytes: u64) {
        self.set(self.done + bytes);
    }

    /// Sets the bytes done.
    pub fn set(&mut self, done: u64) {
        self.done = done;
        self.bar.set_position(done.min(self.total));
        if let Some(observer) = &self.observer {
            observer(done.min(self.total) as f64 / self.total.max(1) as f64);
        }
        if self.logs && self.last_line.elapsed() >= LOG_INTERVAL {
            self.last_line = Instant::now();
            tracing::info!(bytes = done, total_bytes = self.total, "{}", self.what);
        }
    }
}

impl Drop for ProgressTask {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn an_observer_is_told_the_fraction() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let progress = Progress::Log.observed({
            let told = told.clone();
            move |fraction| told.lock().push(fraction)
        });
        let mut task = progress.start("loading", 8);
        task.advance(2);
        task.set(8);
        task.set(16);
        assert_eq!(*told.lock(), [0.0, 0.25, 1.0, 1.0]);
        progress.start("nothing", 0).set(0);
        assert_eq!(told.lock().last(), Some(&0.0));
    }
}
