//! The served model as the API sees it: what turns text into ids and back, and what generates.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::cluster::ModelReport;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use crate::types::{SamplingDefaults, TokenId};

/// In a request, always names the node's own model.
pub const DEFAULT_ALIAS: &str = "default";

/// This node's model, or one that peers serve.
pub struct ServedModel {
    /// Under which it is listed; the first one names it in responses. Never empty.
    names: Vec<String>,
    pub tokenizer: Tokenizer,
    /// Digest of what turns text into ids: what replicas that serve the same requests have in common.
    pub tokenizer_digest: String,
    pub chat_template: ChatTemplate,
    /// Tokens that end a generation, of the model and of its tokenizer.
    pub eos_token_ids: Vec<TokenId>,
    /// For requests that leave sampling parameters out.
    pub sampling_defaults: SamplingDefaults,
    /// Prompt and generated tokens together.
    pub max_model_len: usize,
    /// Seconds since the epoch.
    pub created: u64,
}

impl ServedModel {
    pub fn new(
        report: &ModelReport,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        eos_token_ids: Vec<TokenId>,
    ) -> Self {
        assert!(!report.names.is_empty(), "a served model has a name");
        Self {
            names: report.names.clone(),
            tokenizer,
            tokenizer_digest: report.tokenizer.clone(),
            chat_template,
            eos_token_ids,
            sampling_defaults: SamplingDefaults::default(),
            max_model_len: report.max_model_len as usize,
            created: report.created,
        }
    }

    pub fn with_sampling_defaults(mut self, defaults: SamplingDefaults) -> Self {
        self.sampling_defaults = defaults;
        self
    }

    /// The name that responses give.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether a request that gives this name means it.
    pub fn has_name(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }
}

/// Now, as responses give it.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
