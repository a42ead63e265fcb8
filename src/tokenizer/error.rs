//! Errors in a tokenizer's files, for the operator.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} does not hold the expected JSON: {reason}")]
    Json { path: PathBuf, reason: String },
    #[error("{path} is larger than {limit} bytes")]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("there is no tokenizer.json in {0}")]
    NoTokenizerFile(PathBuf),
    #[error("the file's metadata has no {0:?}, so it contains no usable tokenizer")]
    MissingKey(&'static str),
    #[error("{key:?} in the metadata is not {expected}")]
    WrongType { key: &'static str, expected: &'static str },
    #[error("tokenizer model {0:?} is not supported (\"gpt2\" and \"llama\" are)")]
    UnsupportedModel(String),
    #[error("pre-tokenizer {0:?} (tokenizer.ggml.pre) is not supported; another one would give wrong tokens")]
    UnsupportedPreTokenizer(String),
    #[error("the file does not say how to split text (tokenizer.ggml.pre is missing); convert the model again")]
    MissingPreTokenizer,
    #[error("merge {index}, {merge:?}, does not join two tokens of the vocabulary into a third")]
    InvalidMerge { index: usize, merge: String },
    #[error("{key:?} names token {id}, but the vocabulary has {size} tokens")]
    TokenOutOfRange { key: String, id: u64, size: usize },
    #[error("tokenizer type {id} of token {token} is unknown")]
    UnknownTokenType { token: usize, id: u64 },
    #[error("byte token {token} is {text:?}, not of the form <0xFF>")]
    InvalidByteToken { token: usize, text: String },
    #[error("{what} of tokenizer.json is of an unsupported kind: {kind}")]
    Unsupported { what: &'static str, kind: String },
    #[error("{token:?} should be token {id}, which tokenizer.json gives to {other:?}")]
    AddedToken { token: String, id: u32, other: String },
    #[error("{token:?} is declared outside tokenizer.json as token {id}, and cannot be added under that id")]
    AddedTokenPlace { token: String, id: u32 },
    #[error("the tokenizers library reports: {0}")]
    Library(String),
    #[error("the text cannot be split within the limits of the pre-tokenizer's pattern: {0}")]
    Split(String),
}
