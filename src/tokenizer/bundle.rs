//! A model's tokenizer files and settings in one piece, which can be sent to another node.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::file_set::TokenizerFiles;
use super::{Tokenizer, TokenizerError};
use crate::formats::gguf::Value;
use crate::types::{SamplingDefaults, TokenId};

/// Prefix of the tokenizer's keys in GGUF metadata.
const PREFIX: &str = "tokenizer.";

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("the bundle is damaged")]
    Damaged(#[source] postcard::Error),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Encoded as the base followed by the additions, so that a node that knows only the base can read it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerBundle {
    base: Base,
    additions: Additions,
}

/// The layout of the first version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Base {
    /// End tokens of the model and the tokenizer.
    eos_token_ids: Vec<TokenId>,
    source: BundleSource,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum BundleSource {
    Gguf(BTreeMap<String, Value>),
    Directory(BTreeMap<String, Vec<u8>>),
}

/// Settings of the node that serves the model. Append new fields at the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Additions {
    sampling_defaults: SamplingDefaults,
    /// Replaces the model's own template.
    chat_template: Option<String>,
}

impl TokenizerBundle {
    pub fn from_gguf(metadata: &BTreeMap<String, Value>, eos_token_ids: Vec<TokenId>) -> Self {
        let of_tokenizer = metadata.iter().filter(|(key, _)| key.starts_with(PREFIX));
        let source = BundleSource::Gguf(of_tokenizer.map(|(key, value)| (key.clone(), value.clone())).collect());
        Self { base: Base { eos_token_ids, source }, additions: Additions::default() }
    }

    pub fn from_files(files: TokenizerFiles, eos_token_ids: Vec<TokenId>) -> Self {
        let source = BundleSource::Directory(files.into_bundle());
        Self { base: Base { eos_token_ids, source }, additions: Additions::default() }
    }

    /// Sets the values for sampling parameters that a request leaves out.
    pub fn with_sampling_defaults(mut self, defaults: SamplingDefaults) -> Self {
        self.additions.sampling_defaults = defaults;
        self
    }

    /// Replaces the chat templates of the model.
    pub fn with_chat_template(mut self, template: Option<String>) -> Self {
        self.additions.chat_template = template;
        self
    }

    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.base.eos_token_ids
    }

    pub fn sampling_defaults(&self) -> &SamplingDefaults {
        &self.additions.sampling_defaults
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = postcard::to_stdvec(&self.base).expect("a bundle serializes into memory");
        bytes.extend(postcard::to_stdvec(&self.additions).expect("a bundle serializes into memory"));
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BundleError> {
        let (base, rest) = postcard::take_from_bytes(bytes).map_err(BundleError::Damaged)?;
        let additions = match rest {
            // A bundle from a node of the first version.
            [] => Additions::default(),
            rest => postcard::from_bytes(rest).map_err(BundleError::Damaged)?,
        };
        Ok(Self { base, additions })
    }

    /// Builds the tokenizer, with the chat template set by the node. Blocks while it is built.
    pub fn build(&self) -> Result<Tokenizer, BundleError> {
        let tokenizer = match &self.base.source {
            BundleSource::Gguf(metadata) => Tokenizer::from_gguf(metadata)?,
            BundleSource::Directory(files) => Tokenizer::from_files(&TokenizerFiles::from_bundle(files.clone()))?,
        };
        Ok(match &self.additions.chat_template {
            Some(template) => tokenizer.with_chat_template(template.clone()),
            None => tokenizer,
        })
    }
}

/// The digest of an encoded bundle. Nodes with equal digests give equal ids for every text and conversation, and use the same
/// sampling defaults. A request is only passed between nodes with the same digest.
pub fn digest(bundle: &[u8]) -> String {
    Sha256::digest(bundle).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "bundle_tests.rs"]
mod tests;
