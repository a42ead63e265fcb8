//! What belongs to the process as a whole, and to no module.

use std::path::PathBuf;
use std::time::Duration;

use crate::engine::model::LoadFormat;

/// Where the sampling defaults of requests come from, as vLLM's key of this name says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationConfig {
    /// The model's authors.
    #[default]
    Auto,
    /// The API.
    Vllm,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ProcessConfig {
    /// Default: the catalog's `smollm2-135m-instruct`.
    pub model: String,
    /// Default: none, which stands for the model's own name.
    pub served_model_name: Vec<String>,
    /// Default: `auto`.
    pub load_format: LoadFormat,
    /// Default: `auto`.
    pub generation_config: GenerationConfig,
    /// Default: none, which stands for the model's own.
    pub chat_template: Option<PathBuf>,
    /// Holds downloads. Default: none, which stands for the XDG cache folder.
    pub home: Option<PathBuf>,
    /// Default: 30 s. An orchestrator's own grace period must be longer than this and `relay_timeout`.
    pub shutdown_timeout: Duration,
    /// Default: 60 s.
    pub relay_timeout: Duration,
    /// Default: 5 s.
    pub drain_linger: Duration,
    /// Default: 5 s.
    pub failure_linger: Duration,
    /// Default: off.
    pub fault_injection: bool,
}

impl Default for ProcessConfig {
    fn default() -> Self {
        Self {
            model: "smollm2-135m-instruct".into(),
            served_model_name: Vec::new(),
            load_format: LoadFormat::Auto,
            generation_config: GenerationConfig::Auto,
            chat_template: None,
            home: None,
            shutdown_timeout: Duration::from_secs(30),
            relay_timeout: Duration::from_secs(60),
            drain_linger: Duration::from_secs(5),
            failure_linger: Duration::from_secs(5),
            fault_injection: false,
        }
    }
}

/// A day: longer than any generation, and far from the edge of the clock's arithmetic.
const MAX_TIME: Duration = Duration::from_secs(24 * 60 * 60);

impl ProcessConfig {
    /// The names under which the API serves a model that is known by `own_name`, and as `model` says it; never empty.
    pub fn served_names(&self, own_name: &str) -> Vec<String> {
        if !self.served_model_name.is_empty() {
            return self.served_model_name.clone();
        }
        let mut names = vec![own_name.to_owned()];
        if self.model != own_name {
            names.push(self.model.clone());
        }
        names
    }

    pub fn validate(&self, problems: &mut Vec<String>) {
        if self.model.is_empty() {
            problems.push("model must not be empty".into());
        }
        for (key, time) in [
            ("shutdown_timeout", self.shutdown_timeout),
            ("relay_timeout", self.relay_timeout),
            ("drain_linger", self.drain_linger),
            ("failure_linger", self.failure_linger),
        ] {
            if time > MAX_TIME {
                problems.push(format!("{key} must be at most 24h"));
            }
        }
    }
}
