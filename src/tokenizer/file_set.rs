//! The tokenizer files of a model directory in Hugging Face's layout: those that decide how text becomes ids and how requests
//! are read.
//!
//! This is the only such list. It determines what a tokenizer is built from, what is downloaded from a hub, what is sent to
//! other nodes, and what the digest covers.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::TokenizerError;

/// The only required file.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
pub(super) const ADDED_TOKENS: &str = "added_tokens.json";
pub(super) const GENERATION_CONFIG: &str = "generation_config.json";
pub(super) const CHAT_TEMPLATE_JSON: &str = "chat_template.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
pub(super) const TOOL_USE_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";

/// All files, relative to the directory. A name contains a `/` if the file is in a subdirectory.
pub const TOKENIZER_FILES: [&str; 8] = [
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    GENERATION_CONFIG,
    CHAT_TEMPLATE_JSON,
    CHAT_TEMPLATE,
    TOOL_USE_TEMPLATE,
];

/// The largest in use have about 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
const MAX_COMPANION_BYTES: u64 = 16 << 20;

/// The contents of the files that exist, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// The directory, for error messages. Empty if the files came from another node.
    directory: PathBuf,
    files: BTreeMap<String, Vec<u8>>,
}

impl TokenizerFiles {
    /// Reads the files of a directory.
    pub fn read(directory: &Path) -> Result<Self, TokenizerError> {
        let mut files = BTreeMap::new();
        for name in TOKENIZER_FILES {
            let limit = if name == TOKENIZER_FILE { MAX_TOKENIZER_BYTES } else { MAX_COMPANION_BYTES };
            if let Some(bytes) = read(&directory.join(name), limit)? {
                files.insert(name.to_owned(), bytes);
            }
        }
        Ok(Self { directory: directory.to_owned(), files })
    }

    pub(super) fn from_bundle(files: BTreeMap<String, Vec<u8>>) -> Self {
        Self { directory: PathBuf::new(), files }
    }

    pub(super) fn into_bundle(self) -> BTreeMap<String, Vec<u8>> {
        self.files
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// `None` when there is no such file.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, TokenizerError> {
        let Some(bytes) = self.files.get(name) else { return Ok(None) };
        std::str::from_utf8(bytes).map(Some).map_err(|error| self.not_json(name, error.to_string()))
    }

    pub(super) fn json(&self, name: &str) -> Result<Option<Value>, TokenizerError> {
        let Some(bytes) = self.files.get(name) else { return Ok(None) };
        serde_json::from_slice(bytes).map(Some).map_err(|error| self.not_json(name, error.to_string()))
    }

    /// Empty when there is no such file.
    pub(super) fn object(&self, name: &str) -> Result<Map<String, Value>, TokenizerError> {
        match self.json(name)? {
            None => Ok(Map::new()),
            Some(Value::Object(object)) => Ok(object),
            Some(_) => Err(self.not_json(name, "it is not an object".to_owned())),
        }
    }

    fn not_json(&self, name: &str, reason: String) -> TokenizerError {
        TokenizerError::Json { path: self.directory.join(name), reason }
    }
}

/// `None` when there is no such file.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TokenizerError> {
    let failed = |source| TokenizerError::Io { path: path.to_owned(), source };
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if length > limit {
        return Err(TokenizerError::TooLarge { path: path.to_owned(), limit });
    }
    std::fs::read(path).map(Some).map_err(failed)
}
