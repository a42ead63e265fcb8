//! All that turns a model's text into ids and back, in one piece that can be sent to another node.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Tokenizer, TokenizerError};
use crate::formats::gguf::Value;
use crate::types::TokenId;

/// What a tokenizer reads of a directory.
const FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// Of a GGUF file's metadata.
const PREFIX: &str = "tokenizer.";

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("the tokenizer's files cannot be copied")]
    Files(#[from] std::io::Error),
    #[error("the bundle is damaged")]
    Damaged(#[source] postcard::Error),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenizerBundle {
    /// Of the model and of its tokenizer.
    pub eos_token_ids: Vec<TokenId>,
    source: Source,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Source {
    Gguf(BTreeMap<String, Value>),
    Directory(BTreeMap<String, Vec<u8>>),
}

impl TokenizerBundle {
    pub fn from_gguf(metadata: &BTreeMap<String, Value>, eos_token_ids: Vec<TokenId>) -> Self {
        let of_tokenizer = metadata.iter().filter(|(key, _)| key.starts_with(PREFIX));
        let source = Source::Gguf(of_tokenizer.map(|(key, value)| (key.clone(), value.clone())).collect());
        Self { eos_token_ids, source }
    }

    pub fn from_dir(directory: &Path, eos_token_ids: Vec<TokenId>) -> Result<Self, BundleError> {
        let mut files = BTreeMap::new();
        for name in FILES {
            match std::fs::read(directory.join(name)) {
                Ok(bytes) => drop(files.insert(name.to_owned(), bytes)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { eos_token_ids, source: Source::Directory(files) })
    }

    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a bundle serializes into memory")
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BundleError> {
        postcard::from_bytes(bytes).map_err(BundleError::Damaged)
    }

    /// The tokenizer. Blocks, for as long as building one takes.
    pub fn build(&self) -> Result<Tokenizer, BundleError> {
        match &self.source {
            Source::Gguf(metadata) => Ok(Tokenizer::from_gguf(metadata)?),
            Source::Directory(files) => {
                let directory = tempfile::tempdir()?;
                for name in FILES {
                    if let Some(bytes) = files.get(name) {
                        std::fs::write(directory.path().join(name), bytes)?;
                    }
                }
                Ok(Tokenizer::from_dir(directory.path())?)
            }
        }
    }
}

/// Names an encoded bundle: equal bundles, equal ids for every text.
pub fn digest(bundle: &[u8]) -> String {
    Sha256::digest(bundle).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_survives_the_way() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/llama-gqa-tied-bf16");
        let bundle = TokenizerBundle::from_dir(&fixture, vec![2]).expect("the fixture has a tokenizer");
        let bytes = bundle.encode();
        let arrived = TokenizerBundle::decode(&bytes).expect("undamaged");
        assert_eq!(arrived, bundle);
        assert_eq!(digest(&arrived.encode()), digest(&bytes));
        let (here, there) = (Tokenizer::from_dir(&fixture).expect("reads"), arrived.build().expect("builds"));
        let text = "the wave hits the hull";
        assert_eq!(here.encode(text, true).expect("encodes"), there.encode(text, true).expect("encodes"));
        assert_eq!(here.chat_template().is_ok(), there.chat_template().is_ok());
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let bundle = TokenizerBundle::from_gguf(&BTreeMap::new(), vec![]);
        let bytes = bundle.encode();
        assert!(matches!(TokenizerBundle::decode(&bytes[..bytes.len() - 1]), Err(BundleError::Damaged(_))));
        assert!(TokenizerBundle::decode(&bytes).expect("whole").build().is_err(), "nothing is in it");
    }
}
