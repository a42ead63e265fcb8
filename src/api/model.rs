//! The served model as the API sees it: what turns text into ids and back, and what generates.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::error::ApiError;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use crate::types::{Backend, TokenId};

/// In a request, always names the served model.
pub const DEFAULT_ALIAS: &str = "default";

/// Set once, when the model is loaded.
pub struct ServedModel {
    /// Under which it is listed; the first one names it in responses. Never empty.
    names: Vec<String>,
    pub backend: Arc<dyn Backend>,
    pub tokenizer: Tokenizer,
    pub chat_template: ChatTemplate,
    /// Tokens that end a generation, of the model and of its tokenizer.
    pub eos_token_ids: Vec<TokenId>,
    /// Prompt and generated tokens together.
    pub max_model_len: usize,
    /// Seconds since the epoch.
    pub created: u64,
    pub fingerprint: String,
}

impl ServedModel {
    pub fn new(
        names: Vec<String>,
        backend: Arc<dyn Backend>,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        eos_token_ids: Vec<TokenId>,
        max_model_len: usize,
    ) -> Self {
        assert!(!names.is_empty(), "a served model has a name");
        let fingerprint = backend.fingerprint().as_str().to_string();
        Self {
            names,
            backend,
            tokenizer,
            chat_template,
            eos_token_ids,
            max_model_len,
            created: unix_seconds(),
            fingerprint,
        }
    }

    /// The name that responses give.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Refuses a request for another model. No name, or `default`, means this one.
    pub fn check_name(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            None | Some(DEFAULT_ALIAS) => Ok(()),
            Some(name) if self.names.iter().any(|known| known == name) => Ok(()),
            Some(name) => Err(ApiError::model_not_found(name)),
        }
    }
}

/// Now, as responses give it.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
