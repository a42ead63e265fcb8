//! The log: levels by filter, text or JSON. Prompts, completions and keys are never logged, by anyone.
//!
//! Standard error and standard output are written by threads of their own (see `sink`), so that a collector that stops
//! reading costs lines and holds up nothing.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::panic::{self, PanicHookInfo};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use tracing::{error, warn};
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use super::sink::{OnDropped, Sink};
use crate::types::{panic_message, with_causes};

/// At its end the process waits this long for each stream to take what is still queued.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The sink of the log, once there is one.
static LOG: OnceLock<Sink> = OnceLock::new();

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directives such as `info` or `outrigger=debug,hyper=warn`. Default: `info`.
    pub log_level: String,
    /// Default: `text`.
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// One readable line per event.
    Text,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("log_level {directives:?} is not a list of filter directives")]
    Filter { directives: String, source: ParseError },
    #[error("the log is already set up")]
    AlreadySet(#[from] TryInitError),
    #[error("standard error cannot be written to")]
    Stream(#[source] io::Error),
}

impl Default for Config {
    fn default() -> Self {
        Self { log_level: "info".into(), log_format: LogFormat::Text }
    }
}

impl Config {
    pub fn validate(&self, errors: &mut Vec<String>) {
        if let Err(error) = self.filter() {
            errors.push(with_causes(&error).to_string());
        }
    }

    fn filter(&self) -> Result<EnvFilter, TraceError> {
        EnvFilter::builder()
            .parse(&self.log_level)
            .map_err(|source| TraceError::Filter { directives: self.log_level.clone(), source })
    }
}

/// A stream of this process. Dropping it writes what is queued, within a bound.
#[must_use]
pub struct Output(Sink);

impl Output {
    /// Standard output, for the few lines that the person at the terminal is told.
    pub fn terminal() -> io::Result<Self> {
        Ok(Self(Sink::start("stdout", File::from(io::stdout().as_fd().try_clone_to_owned()?), None)?))
    }

    /// Standard error. The descriptor is a copy, since a thread that waits in a write must not hold the lock of the standard
    /// library's handle.
    fn errors(on_dropped: Option<OnDropped>) -> io::Result<Self> {
        Ok(Self(Sink::start("log", File::from(io::stderr().as_fd().try_clone_to_owned()?), on_dropped)?))
    }

    /// Writes the text and a line feed, without waiting.
    pub fn say(&self, text: &str) {
        self.0.push(format!("{text}\n").as_bytes());
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

/// Starts logging to standard error, panics included. At most once per process.
pub fn init(config: &Config) -> Result<Output, TraceError> {
    let filter = config.filter()?;
    let on_dropped: OnDropped =
        Box::new(|lines| warn!(lines, "log lines were dropped, because standard error did not take them"));
    let output = Output::errors(Some(on_dropped)).map_err(TraceError::Stream)?;
    let registry = tracing_subscriber::registry().with(filter);
    let sink = output.0.clone();
    let writer = move || sink.clone();
    match config.log_format {
        LogFormat::Text => {
            let is_terminal = io::stderr().is_terminal();
            registry.with(fmt::layer().with_ansi(is_terminal).with_writer(writer)).try_init()?
        }
        LogFormat::Json => registry.with(fmt::layer().json().with_writer(writer)).try_init()?,
    }
    panic::set_hook(Box::new(log_panic));
    // `try_init` succeeds once, so this is the first sink.
    let _ = LOG.set(output.0.clone());
    Ok(output)
}

/// Writes what is queued, within a bound. For an end that drops nothing.
pub fn flush() {
    if let Some(sink) = LOG.get() {
        sink.flush(FLUSH_TIMEOUT);
    }
}

/// Lines of the log that standard error did not take.
pub fn dropped_lines() -> u64 {
    LOG.get().map_or(0, Sink::dropped)
}

/// The standard hook prints to standard error, and so would wait for it.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let (message, location) = (panic_message(panic.payload()), panic.location());
    let thread = thread::current();
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then_some(backtrace);
    error!(
        thread = thread.name(),
        location = location.map(tracing::field::display),
        backtrace = backtrace.map(tracing::field::display),
        "a thread panicked: {message}"
    );
}

/// The last words of the process, on standard error as they are. Waits for it, but not for long.
pub fn last_words(text: &str) {
    // Without a descriptor or a thread for it there is nobody left to tell.
    if let Ok(output) = Output::errors(None) {
        output.say(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_reported_with_its_text() {
        let config = Config { log_level: "outrigger=loud".into(), ..Config::default() };
        let mut errors = Vec::new();
        config.validate(&mut errors);
        assert_eq!(errors.len(), 1);
        assert!(
            errors[0].starts_with("log_level \"outrigger=loud\" is not a list of filter directives: "),
            "{errors:?}"
        );
        errors.clear();
        Config { log_level: "warn,outrigger=debug".into(), ..Config::default() }.validate(&mut errors);
        assert!(errors.is_empty());
    }
}
