//! Opens a model: a `.gguf` file, or a directory in Hugging Face's layout. Opening reads headers and checks that every
//! tensor is there in the right shape; the weights themselves are paged in when the decoder packs them.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde_json::Value;

use super::config::{ModelConfig, ModelConfigError};
use super::dummy::DummySource;
use super::expected::expected_tensors;
use super::gguf_source::GgufSource;
use super::safetensors_source::{SafetensorsSource, has_weights};
use super::weights::{TensorSource, TensorType};
use super::{gguf_config, hf_config};
use crate::formats::gguf::{Gguf, GgufError};
use crate::formats::safetensors::SafetensorsError;
use crate::tokenizer::TOKENIZER_FILE;

/// A `config.json` and its like are read up to this size.
const MAX_JSON_BYTES: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is larger than a configuration can be ({MAX_JSON_BYTES} bytes)")]
    JsonTooLarge { path: PathBuf },
    #[error("{path} is not valid")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{path}: this model cannot be served")]
    Config { path: PathBuf, source: ModelConfigError },
    #[error("cannot open {path}")]
    OpenGguf { path: PathBuf, source: GgufError },
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("cannot open {path}")]
    Safetensors { path: PathBuf, source: SafetensorsError },
    #[error(transparent)]
    SafetensorsTensor(#[from] SafetensorsError),
    #[error("{index} names the shard {name:?}, which is no file beside it")]
    ShardName { index: PathBuf, name: String },
    #[error("{directory} holds no safetensors weights")]
    NoWeights { directory: PathBuf },
    #[error("{directory} holds {count} weight files and no index that says which belong to the model")]
    AmbiguousWeights { directory: PathBuf, count: usize },
    #[error("{directory} is no model: it holds neither a config.json nor a .gguf file")]
    NotAModel { directory: PathBuf },
    #[error("{directory} holds no {TOKENIZER_FILE}; dummy weights replace the weights, not the tokenizer")]
    NoTokenizer { directory: PathBuf },
    #[error("load_format {format} asks for other files than {path} holds")]
    WrongFormat { path: PathBuf, format: LoadFormat },
    #[error("tensor {0:?} is missing")]
    MissingTensor(String),
    #[error("tensor {name:?} has shape {found:?} where the configuration calls for {expected:?}")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor {0:?} is in two files")]
    DuplicateTensor(String),
    #[error("tensor {0:?} has no place in this architecture")]
    UnexpectedTensor(String),
    #[error("cannot dequantize a tensor")]
    Dequantize(#[from] candle_core::Error),
}

/// Which files to load, as `load_format` names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// What the folder holds; safetensors before GGUF.
    #[default]
    Auto,
    Safetensors,
    Gguf,
    /// Random weights in the shapes of the configuration.
    Dummy,
}

impl std::fmt::Display for LoadFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LoadFormat::Auto => "auto",
            LoadFormat::Safetensors => "safetensors",
            LoadFormat::Gguf => "gguf",
            LoadFormat::Dummy => "dummy",
        })
    }
}

impl FromStr for LoadFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(LoadFormat::Auto),
            "safetensors" => Ok(LoadFormat::Safetensors),
            "gguf" => Ok(LoadFormat::Gguf),
            "dummy" => Ok(LoadFormat::Dummy),
            _ => Err("one of auto, safetensors, gguf, dummy is expected".to_owned()),
        }
    }
}

/// Where the tokenizer and the chat template come from.
#[derive(Clone)]
pub enum TokenizerSource {
    /// The metadata of this file.
    Gguf(Arc<Gguf>),
    /// `tokenizer.json` and its companions in this directory.
    Directory(PathBuf),
}

/// An opened model.
pub struct ModelFiles {
    pub config: ModelConfig,
    pub tensors: Box<dyn TensorSource>,
    pub tokenizer: TokenizerSource,
    /// Ids that end a generation, as the configuration names them; the tokenizer may know more. Empty when it names none.
    pub eos_token_ids: Vec<u32>,
    /// The file's or directory's own name, without extension.
    pub name: String,
}

impl ModelFiles {
    /// Opens a `.gguf` file or a directory. Blocks on the disk.
    pub fn open(path: &Path, format: LoadFormat) -> Result<Self, LoadError> {
        // A missing path gets its own error first.
        std::fs::metadata(path).map_err(|source| LoadError::Io { path: path.to_owned(), source })?;
        let files = match find(path, format)? {
            Found::Gguf(path) => open_gguf(&path, format)?,
            Found::Directory => open_directory(path, format)?,
        };
        check_shapes(&files.config, files.tensors.as_ref())?;
        Ok(files)
    }
}

enum Found {
    Gguf(PathBuf),
    Directory,
}

fn find(path: &Path, format: LoadFormat) -> Result<Found, LoadError> {
    let wrong_format = || LoadError::WrongFormat { path: path.to_owned(), format };
    if !path.is_dir() {
        return match format {
            LoadFormat::Safetensors => Err(wrong_format()),
            _ => Ok(Found::Gguf(path.to_owned())),
        };
    }
    let has_config = path.join("config.json").is_file();
    let wants_directory = match format {
        LoadFormat::Safetensors => true,
        LoadFormat::Gguf => false,
        LoadFormat::Dummy => has_config,
        LoadFormat::Auto => has_config && has_weights(path),
    };
    if wants_directory {
        return Ok(Found::Directory);
    }
    let mut ggufs = files_with_extension(path, "gguf")?;
    match ggufs.len() {
        1 => Ok(Found::Gguf(ggufs.remove(0))),
        // Opening the directory says what is wrong with its weights.
        0 if has_config && format == LoadFormat::Auto => Ok(Found::Directory),
        0 if format == LoadFormat::Gguf => Err(wrong_format()),
        0 => Err(LoadError::NotAModel { directory: path.to_owned() }),
        count => Err(LoadError::AmbiguousWeights { directory: path.to_owned(), count }),
    }
}

fn open_gguf(path: &Path, format: LoadFormat) -> Result<ModelFiles, LoadError> {
    let gguf = Gguf::open(path).map_err(|source| LoadError::OpenGguf { path: path.to_owned(), source })?;
    let gguf = Arc::new(gguf);
    let invalid = |source| LoadError::Config { path: path.to_owned(), source };
    let family = gguf_config::Family::of(gguf.metadata()).map_err(invalid)?;
    let config = gguf_config::parse(&gguf, family).map_err(invalid)?;
    let eos_token_ids = gguf_config::eos_token_ids(gguf.metadata()).map_err(invalid)?;
    let tensors: Box<dyn TensorSource> = match format {
        LoadFormat::Dummy => Box::new(DummySource::new(&config, TensorType::BF16)),
        _ => Box::new(GgufSource::new(gguf.clone(), family, &config)?),
    };
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(ModelFiles { config, tensors, tokenizer: TokenizerSource::Gguf(gguf), eos_token_ids, name })
}

fn open_directory(path: &Path, format: LoadFormat) -> Result<ModelFiles, LoadError> {
    let config_path = path.join("config.json");
    let config_json = read_json(&config_path)?;
    let generation_path = path.join("generation_config.json");
    let generation_json = generation_path.is_file().then(|| read_json(&generation_path)).transpose()?;
    let invalid = |source| LoadError::Config { path: config_path.clone(), source };
    let config = hf_config::parse(&config_json).map_err(invalid)?;
    let eos_token_ids = hf_config::eos_token_ids(&config_json, generation_json.as_ref()).map_err(invalid)?;
    let tensors: Box<dyn TensorSource> = match format {
        LoadFormat::Dummy if !path.join(TOKENIZER_FILE).is_file() => {
            return Err(LoadError::NoTokenizer { directory: path.to_owned() });
        }
        LoadFormat::Dummy => Box::new(DummySource::new(&config, stored_type(&config_json))),
        _ => Box::new(open_safetensors(path, &config)?),
    };
    let name = directory_name(path);
    Ok(ModelFiles { config, tensors, tokenizer: TokenizerSource::Directory(path.to_owned()), eos_token_ids, name })
}

/// Refuses tensors inside the layers that the architecture does not use. Others are only logged, because checkpoints often
/// carry heads and buffers from training.
fn open_safetensors(path: &Path, config: &ModelConfig) -> Result<SafetensorsSource, LoadError> {
    let source = SafetensorsSource::open(path)?;
    let expected: BTreeSet<String> = expected_tensors(config).into_iter().map(|(name, _)| name).collect();
    for name in source.names().filter(|name| !expected.contains(*name)) {
        if name.starts_with("model.layers.") {
            return Err(LoadError::UnexpectedTensor(name.to_owned()));
        }
        tracing::debug!(tensor = name, "the model does not use this tensor");
    }
    Ok(source)
}

/// The type that the configuration says its weights have; bf16 when it says nothing.
fn stored_type(config: &Value) -> TensorType {
    let named = config.get("dtype").or_else(|| config.get("torch_dtype")).and_then(Value::as_str);
    match named {
        Some("float32") => TensorType::F32,
        Some("float16") => TensorType::F16,
        _ => TensorType::BF16,
    }
}

fn check_shapes(config: &ModelConfig, tensors: &dyn TensorSource) -> Result<(), LoadError> {
    for (name, expected) in expected_tensors(config) {
        match tensors.shape(&name) {
            None => return Err(LoadError::MissingTensor(name)),
            Some(found) if found != expected => {
                return Err(LoadError::Shape { name, found: found.to_vec(), expected });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// The last part of a path, also of one like `.` that has none in its spelling.
fn directory_name(path: &Path) -> String {
    let resolved = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().or(resolved.file_name()).unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Reads a JSON file of bounded size.
pub(super) fn read_json(path: &Path) -> Result<Value, LoadError> {
    let failed = |source| LoadError::Io { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_JSON_BYTES {
        return Err(LoadError::JsonTooLarge { path: path.to_owned() });
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    serde_json::from_slice(&bytes).map_err(|source| LoadError::Json { path: path.to_owned(), source })
}

/// Files of a directory with this extension, sorted by name.
pub(super) fn files_with_extension(directory: &Path, extension: &str) -> Result<Vec<PathBuf>, LoadError> {
    let failed = |source| LoadError::Io { path: directory.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension() == Some(OsStr::new(extension)) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
