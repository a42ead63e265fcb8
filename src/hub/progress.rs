//! Shows how far a long step has come: a bar where a person looks on, lines in the log elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// At least this long between two lines in the log.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Is told the fraction done, 0 to 1, of the step under way.
pub type Observer = Arc<dyn Fn(f64) + Send + Sync>;

#[derive(Clone)]
pub enum Progress {
    /// A bar on standard error.
    Bar,
    Log,
    /// As the inner one, and told to the observer.
    Observed(Box<Progress>, Observer),
}

impl Progress {
    /// A bar if standard error is a terminal.
    pub fn detect() -> Self {
        if std::io::stderr().is_terminal() { Progress::Bar } else { Progress::Log }
    }

    /// Tells the observer as well.
    pub fn observed(self, observer: impl Fn(f64) + Send + Sync + 'static) -> Self {
        Progress::Observed(Box::new(self), Arc::new(observer))
    }

    /// Begins a step of `total` bytes. `what` completes "downloading …" or the like, and stands in the log.
    pub fn start(&self, what: impl Into<String>, total: u64) -> Task {
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
        Task {
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

/// A step under way. Dropping it removes the bar.
pub struct Task {
    bar: ProgressBar,
    what: String,
    total: u64,
    done: u64,
    logs: bool,
    last_line: Instant,
    observer: Option<Observer>,
}

impl Task {
    pub fn advance(&mut self, bytes: u64) {
        self.set(self.done + bytes);
    }

    /// `done` of the total, whatever it was before.
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

impl Drop for Task {
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
