//! Reads safetensors files: a JSON header, then the bytes of named dense tensors. The format's own crate is not used because
//! it adds up lengths before it has checked them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::{Deserializer, MapAccess, Visitor};

use super::{MappedFile, TensorType};

/// The format's own limit on the header.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The header's length stands in front of it.
const LENGTH_BYTES: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    #[error("cannot read {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("not a safetensors file: too short for a header")]
    TooShort,
    #[error("not a safetensors file: a header of {header} bytes does not fit a file of {file} bytes")]
    HeaderLength { header: u64, file: u64 },
    #[error("the header is not valid")]
    Header(#[source] serde_json::Error),
    #[error("tensor {name:?} has an impossible shape: {shape:?} of type {dtype}")]
    Shape { name: String, shape: Vec<u64>, dtype: String },
    #[error("tensor {name:?} of {expected} bytes is given bytes {begin}..{end} of {available}")]
    Range { name: String, expected: u64, begin: u64, end: u64, available: u64 },
    #[error("there is no tensor {0:?} in the file")]
    NoSuchTensor(String),
    #[error("tensor {name:?} has type {dtype}; F32, F16 and BF16 are supported")]
    UnsupportedType { name: String, dtype: String },
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct SafetensorsTensor {
    /// As the header spells it. A file may hold tensors of unsupported types, as long as they are not read.
    pub dtype: String,
    pub shape: Vec<usize>,
    /// Where its bytes are, from the start of the file.
    pub range: Range<usize>,
}

/// An open file.
#[derive(Debug)]
pub struct Safetensors {
    file: MappedFile,
    tensors: BTreeMap<String, SafetensorsTensor>,
}

impl Safetensors {
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        let file = MappedFile::open(path).map_err(|source| SafetensorsError::Io { path: path.to_owned(), source })?;
        let tensors = Self::parse(&file)?;
        Ok(Self { file, tensors })
    }

    /// Parses the bytes of a whole file.
    pub fn parse(bytes: &[u8]) -> Result<BTreeMap<String, SafetensorsTensor>, SafetensorsError> {
        let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or(SafetensorsError::TooShort)?;
        let header = u64::from_le_bytes(*length);
        if header > MAX_HEADER_BYTES || header > rest.len() as u64 {
            return Err(SafetensorsError::HeaderLength { header, file: bytes.len() as u64 });
        }
        let (header, data) = rest.split_at(header as usize);
        let header: HeaderJson = serde_json::from_slice(header).map_err(SafetensorsError::Header)?;
        let data_start = bytes.len() - data.len();
        let located = header.tensors.into_iter().map(|(name, tensor)| {
            let entry = tensor.locate(&name, data_start, data.len())?;
            Ok((name, entry))
        });
        located.collect()
    }

    pub fn tensors(&self) -> &BTreeMap<String, SafetensorsTensor> {
        &self.tensors
    }

    /// Type, shape and bytes of a tensor.
    pub fn tensor(&self, name: &str) -> Result<(TensorType, &[usize], &[u8]), SafetensorsError> {
        let entry = self.tensors.get(name).ok_or_else(|| SafetensorsError::NoSuchTensor(name.to_owned()))?;
        let ty = match entry.dtype.as_str() {
            "F32" => TensorType::F32,
            "F16" => TensorType::F16,
            "BF16" => TensorType::BF16,
            dtype => {
                return Err(SafetensorsError::UnsupportedType { name: name.to_owned(), dtype: dtype.to_owned() });
            }
        };
        Ok((ty, &entry.shape, &self.file[entry.range.clone()]))
    }

    /// Asks the system to read a tensor ahead from the disk. Returns its size in bytes, 0 if there is no such tensor.
    pub fn read_ahead(&self, name: &str) -> usize {
        self.tensors.get(name).map_or(0, |entry| {
            self.file.read_ahead(entry.range.clone());
            entry.range.len()
        })
    }
}

#[derive(serde::Deserialize)]
struct TensorJson {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl TensorJson {
    fn locate(self, name: &str, data_start: usize, available: usize) -> Result<SafetensorsTensor, SafetensorsError> {
        let bytes = dtype_bits(&self.dtype).and_then(|bits| {
            let elements = self.shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n))?;
            elements.checked_mul(bits).filter(|bits| bits % 8 == 0).map(|bits| bits / 8)
        });
        let Some(expected) = bytes else {
            return Err(SafetensorsError::Shape { name: name.to_owned(), shape: self.shape, dtype: self.dtype });
        };
        let (begin, end) = self.data_offsets;
        let available = available as u64;
        if end > available || end.checked_sub(begin) != Some(expected) {
            return Err(SafetensorsError::Range { name: name.to_owned(), expected, begin, end, available });
        }
        // An empty tensor may have a huge dimension beside the zero. It is never read.
        let shape = self.shape.iter().map(|n| usize::try_from(*n).unwrap_or(usize::MAX)).collect();
        let range = data_start + begin as usize..data_start + end as usize;
        Ok(SafetensorsTensor { dtype: self.dtype, shape, range })
    }
}

/// Bits per element of a type; `None` for an unknown name.
fn dtype_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// The header: tensors by name, and free-form text under `__metadata__`, which is not used.
struct HeaderJson {
    tensors: BTreeMap<String, TensorJson>,
}

impl<'de> serde::Deserialize<'de> for HeaderJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Refuses a name that occurs twice, which a plain map would accept.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = HeaderJson;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<HeaderJson, A::Error> {
        let mut tensors = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<BTreeMap<String, String>>()?;
                continue;
            }
            match tensors.entry(name) {
                Entry::Vacant(entry) => drop(entry.insert(map.next_value::<TensorJson>()?)),
                Entry::Occupied(entry) => {
                    return Err(serde::de::Error::custom(format!("tensor {:?} occurs twice", entry.key())));
                }
            }
        }
        Ok(HeaderJson { tensors })
    }
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
