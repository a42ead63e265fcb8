//! A served model as the API sees it: the tokenizer and what responses say about the model.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::cluster::ModelReport;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use crate::types::{SamplingDefaults, TokenId};

/// The name that always means the node's own model.
pub const DEFAULT_ALIAS: &str = "default";

/// A model that this node or its peers serve.
pub struct ServedModel {
    /// Names from `/v1/models`. The first one appears in responses. Never empty.
    names: Vec<String>,
    pub tokenizer: Tokenizer,
    /// Digest of the tokenizer, the chat template and their settings. Replicas that serve the same requests have the same
    /// digest.
    pub tokenizer_digest: String,
    pub chat_template: ChatTemplate,
    /// Tokens that end a generation, from the model's and the tokenizer's files.
    pub eos_token_ids: Vec<TokenId>,
    /// Used for sampling parameters that a request leaves out.
    pub sampling_defaults: SamplingDefaults,
    /// Maximum tokens of prompt and output together.
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

    /// The name that responses contain.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether a request with this name means this model.
    pub fn has_name(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }
}

/// The current time as responses give it.
#[expect(clippy::disallowed_methods, reason = "the time of day is what clients ask for")]
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
