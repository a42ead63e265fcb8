//! A model's tokenizer files and settings in one piece, which can be sent to another node.

use std::collections::BTreeMap;

use prost::Message;
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
    Damaged(#[source] prost::DecodeError),
    #[error("the GGUF metadata in the bundle is damaged")]
    DamagedMetadata(#[source] postcard::Error),
    #[error("the bundle holds no tokenizer that this version knows")]
    Empty,
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerBundle {
    /// End tokens of the model and the tokenizer.
    eos_token_ids: Vec<TokenId>,
    source: BundleSource,
    /// Settings of the node that serves the model.
    sampling_defaults: SamplingDefaults,
    /// Replaces the model's own template.
    chat_template: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
enum BundleSource {
    Gguf(BTreeMap<String, Value>),
    Directory(BTreeMap<String, Vec<u8>>),
}

/// The bundle as it is sent. Fields keep their numbers and meaning for ever. Nodes of different versions share requests only
/// while their digests are equal, so a new field must be absent unless it is used, and a further kind of file changes the
/// digest of every model that has it.
#[derive(Clone, PartialEq, Message)]
struct WireBundle {
    #[prost(uint32, repeated, tag = "1")]
    eos_token_ids: Vec<u32>,
    /// The tokenizer's part of the metadata, in Postcard.
    #[prost(bytes = "vec", optional, tag = "2")]
    gguf: Option<Vec<u8>>,
    #[prost(message, repeated, tag = "3")]
    files: Vec<WireFile>,
    #[prost(message, optional, tag = "4")]
    sampling_defaults: Option<WireDefaults>,
    #[prost(string, optional, tag = "5")]
    chat_template: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct WireFile {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", tag = "2")]
    bytes: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct WireDefaults {
    #[prost(float, optional, tag = "1")]
    temperature: Option<f32>,
    #[prost(float, optional, tag = "2")]
    top_p: Option<f32>,
    #[prost(uint32, optional, tag = "3")]
    top_k: Option<u32>,
    #[prost(float, optional, tag = "4")]
    min_p: Option<f32>,
    #[prost(float, optional, tag = "5")]
    repetition_penalty: Option<f32>,
    #[prost(uint32, optional, tag = "6")]
    max_new_tokens: Option<u32>,
}

impl WireDefaults {
    fn of(defaults: &SamplingDefaults) -> Option<Self> {
        let SamplingDefaults { temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens } = *defaults;
        let wire = Self { temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens };
        (!defaults.is_empty()).then_some(wire)
    }

    fn read(self) -> SamplingDefaults {
        let Self { temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens } = self;
        SamplingDefaults { temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens }
    }
}

impl TokenizerBundle {
    pub fn from_gguf(metadata: &BTreeMap<String, Value>, eos_token_ids: Vec<TokenId>) -> Self {
        let of_tokenizer = metadata.iter().filter(|(key, _)| key.starts_with(PREFIX));
        let source = BundleSource::Gguf(of_tokenizer.map(|(key, value)| (key.clone(), value.clone())).collect());
        Self::new(source, eos_token_ids)
    }

    pub fn from_files(files: TokenizerFiles, eos_token_ids: Vec<TokenId>) -> Self {
        Self::new(BundleSource::Directory(files.into_bundle()), eos_token_ids)
    }

    fn new(source: BundleSource, eos_token_ids: Vec<TokenId>) -> Self {
        Self { eos_token_ids, source, sampling_defaults: SamplingDefaults::default(), chat_template: None }
    }

    /// Sets the values for sampling parameters that a request leaves out.
    pub fn with_sampling_defaults(self, sampling_defaults: SamplingDefaults) -> Self {
        Self { sampling_defaults, ..self }
    }

    /// Replaces the chat templates of the model.
    pub fn with_chat_template(self, chat_template: Option<String>) -> Self {
        Self { chat_template, ..self }
    }

    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.eos_token_ids
    }

    pub fn sampling_defaults(&self) -> &SamplingDefaults {
        &self.sampling_defaults
    }

    pub fn encode(&self) -> Vec<u8> {
        let (mut gguf, mut files) = (None, Vec::new());
        match &self.source {
            BundleSource::Gguf(metadata) => gguf = Some(postcard::to_stdvec(metadata).expect("plain data")),
            BundleSource::Directory(found) => {
                let file = |(name, bytes): (&String, &Vec<u8>)| WireFile { name: name.clone(), bytes: bytes.clone() };
                files = found.iter().map(file).collect();
            }
        }
        let wire = WireBundle {
            eos_token_ids: self.eos_token_ids.clone(),
            gguf,
            files,
            sampling_defaults: WireDefaults::of(&self.sampling_defaults),
            chat_template: self.chat_template.clone(),
        };
        wire.encode_to_vec()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BundleError> {
        let wire = WireBundle::decode(bytes).map_err(BundleError::Damaged)?;
        let source = match wire.gguf {
            Some(metadata) => {
                BundleSource::Gguf(postcard::from_bytes(&metadata).map_err(BundleError::DamagedMetadata)?)
            }
            None if wire.files.is_empty() => return Err(BundleError::Empty),
            None => BundleSource::Directory(wire.files.into_iter().map(|file| (file.name, file.bytes)).collect()),
        };
        Ok(Self {
            eos_token_ids: wire.eos_token_ids,
            source,
            sampling_defaults: wire.sampling_defaults.map(WireDefaults::read).unwrap_or_default(),
            chat_template: wire.chat_template,
        })
    }

    /// Builds the tokenizer, with the chat template set by the node. Blocks while it is built.
    pub fn build(&self) -> Result<Tokenizer, BundleError> {
        let tokenizer = match &self.source {
            BundleSource::Gguf(metadata) => Tokenizer::from_gguf(metadata)?,
            BundleSource::Directory(files) => Tokenizer::from_files(&TokenizerFiles::from_bundle(files.clone()))?,
        };
        Ok(match &self.chat_template {
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
