//! The log: levels by filter, text or JSON. Prompts, completions and keys are never logged, by anyone.

use std::io::IsTerminal;

use serde::Deserialize;
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use crate::types::with_causes;

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

/// Starts logging to standard error. At most once per process.
pub fn init(config: &Config) -> Result<(), TraceError> {
    let filter = config.filter()?;
    let registry = tracing_subscriber::registry().with(filter);
    match config.log_format {
        LogFormat::Text => {
            let is_terminal = std::io::stderr().is_terminal();
            registry.with(fmt::layer().with_ansi(is_terminal).with_writer(std::io::stderr)).try_init()?
        }
        LogFormat::Json => registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init()?,
    }
    Ok(())
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
