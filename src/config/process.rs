//! What belongs to the process as a whole, and to no module.

use std::time::Duration;

use crate::engine::model::LoadFormat;

#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    /// Default: the catalog's `smollm2-135m-instruct`.
    pub model: String,
    /// Default: none, which stands for the model's own name.
    pub served_model_name: Vec<String>,
    /// Default: `auto`.
    pub load_format: LoadFormat,
    /// Default: 30 s. An orchestrator's own grace period must be longer.
    pub shutdown_timeout: Duration,
    /// Default: off.
    pub fault_injection: bool,
}

impl Default for Process {
    fn default() -> Self {
        Self {
            model: "smollm2-135m-instruct".into(),
            served_model_name: Vec::new(),
            load_format: LoadFormat::Auto,
            shutdown_timeout: Duration::from_secs(30),
            fault_injection: false,
        }
    }
}

/// A day: longer than any generation, and far from the edge of the clock's arithmetic.
const MAX_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

impl Process {
    pub fn validate(&self, problems: &mut Vec<String>) {
        if self.model.is_empty() {
            problems.push("model must not be empty".into());
        }
        if self.shutdown_timeout > MAX_SHUTDOWN_TIMEOUT {
            problems.push("shutdown_timeout must be at most 24h".into());
        }
    }
}
