//! Weights of safetensors files, sharded or not.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::load::{LoadError, read_json};
use super::weights::{RawTensor, TensorSource, TensorType};
use crate::formats::safetensors::Safetensors;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

pub(super) struct SafetensorsSource {
    files: Vec<Safetensors>,
    /// Which file holds a tensor.
    tensors: BTreeMap<String, usize>,
    total_bytes: u64,
}

impl SafetensorsSource {
    pub fn open(directory: &Path) -> Result<Self, LoadError> {
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        let mut total_bytes = 0;
        for path in weight_files(directory)? {
            let file = Safetensors::open(&path).map_err(|source| LoadError::Safetensors { path, source })?;
            for (name, entry) in file.tensors() {
                // Old checkpoints carry the rotary frequencies, which follow from the configuration.
                if name.ends_with(".rotary_emb.inv_freq") {
                    continue;
                }
                if tensors.insert(name.clone(), files.len()).is_some() {
                    return Err(LoadError::DuplicateTensor(name.clone()));
                }
                total_bytes += entry.range.len() as u64;
            }
            files.push(file);
        }
        Ok(Self { files, tensors, total_bytes })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

impl TensorSource for SafetensorsSource {
    fn tensor(&self, name: &str) -> Result<RawTensor<'_>, LoadError> {
        let file = self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
        let (ty, shape, data) = self.files[*file].tensor(name)?;
        Ok(RawTensor { ty, shape: shape.to_vec(), data: Cow::Borrowed(data) })
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        let file = self.tensors.get(name)?;
        self.files[*file].tensors().get(name).map(|entry| entry.shape.as_slice())
    }

    fn stored_type(&self, name: &str) -> Option<TensorType> {
        let file = self.tensors.get(name)?;
        self.files[*file].tensor(name).ok().map(|(ty, _, _)| ty)
    }

    fn read_ahead(&self, name: &str) -> usize {
        self.tensors.get(name).map_or(0, |file| self.files[*file].read_ahead(name))
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

/// Whether a directory holds weights that `open` would find.
pub(super) fn has_weights(directory: &Path) -> bool {
    weight_files(directory).is_ok()
}

/// The files that hold a model's weights: those the index names, else `model.safetensors`, else the only one there is.
fn weight_files(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let index = directory.join(INDEX_FILE);
    if index.is_file() {
        return indexed_files(directory, &index);
    }
    let single = directory.join(SINGLE_FILE);
    if single.is_file() {
        return Ok(vec![single]);
    }
    let mut others = super::load::files_with_extension(directory, "safetensors")?;
    match others.len() {
        1 => Ok(vec![others.remove(0)]),
        0 => Err(LoadError::NoWeights { directory: directory.to_owned() }),
        count => Err(LoadError::AmbiguousWeights { directory: directory.to_owned(), count }),
    }
}

fn indexed_files(directory: &Path, index: &Path) -> Result<Vec<PathBuf>, LoadError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index_json: Index = serde_json::from_value(read_json(index)?)
        .map_err(|source| LoadError::Json { path: index.to_owned(), source })?;
    let names: BTreeSet<String> = index_json.weight_map.into_values().collect();
    let located = names.into_iter().map(|name| {
        // A shard lies beside its index; a name that leads elsewhere is not followed.
        let is_plain = Path::new(&name).file_name().is_some_and(|file| file == name.as_str());
        if is_plain { Ok(directory.join(name)) } else { Err(LoadError::ShardName { index: index.to_owned(), name }) }
    });
    located.collect()
}
