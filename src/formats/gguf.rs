//! Reads GGUF files, versions 2 and 3, little-endian: typed metadata, and tensors in ggml's block layouts. Does not know
//! what the metadata keys mean.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::gguf_reader::Reader;
use super::{MappedFile, TensorType};

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// No sensible file aligns tensors to more than a page.
const MAX_ALIGNMENT: u64 = 1 << 16;
/// ggml's own limit.
const MAX_DIMENSIONS: u32 = 4;
/// The least size of an entry: a key, a type and a value of one byte.
const MIN_ENTRY_BYTES: usize = 8 + 4 + 1;
/// The least size of a tensor entry: a name, the number of dimensions, a type and an offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;

#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("cannot read {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("not a GGUF file: it does not begin with the letters GGUF")]
    NotGguf,
    #[error("GGUF version {0} is not supported (versions 2 and 3 are)")]
    UnsupportedVersion(u32),
    #[error("a big-endian GGUF file; only little-endian files are supported")]
    BigEndian,
    #[error("the file is truncated: {wanted} bytes are needed at byte {position}")]
    Truncated { position: usize, wanted: u64 },
    #[error("text that is not UTF-8 at byte {position}")]
    NotUtf8 { position: usize },
    #[error("unknown metadata type {id} at byte {position}")]
    UnknownValueType { id: u32, position: usize },
    #[error("arrays are nested too deep at byte {position}")]
    NestedTooDeep { position: usize },
    #[error("metadata key {0:?} occurs twice")]
    DuplicateKey(String),
    #[error("tensor {0:?} occurs twice")]
    DuplicateTensor(String),
    #[error("general.alignment must be a power of two up to {MAX_ALIGNMENT}, not {0}")]
    Alignment(u64),
    #[error("tensor {name:?} has ggml type {id}, which is not supported")]
    UnsupportedTensorType { name: String, id: u32 },
    #[error("tensor {name:?} has an impossible shape: {shape:?} of type {ty}")]
    Shape { name: String, shape: Vec<u64>, ty: TensorType },
    #[error("tensor {name:?} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")]
    TooManyDimensions { name: String, dimensions: u32 },
    #[error("tensor {name:?} lies outside of the file: it ends at byte {end}, the file at byte {file}")]
    OutsideFile { name: String, end: u64, file: u64 },
    #[error("tensor {name:?} begins at {offset}, which is not a multiple of the alignment")]
    Misaligned { name: String, offset: u64 },
    #[error("there is no tensor {0:?} in the file")]
    NoSuchTensor(String),
}

/// A metadata value. Integers and floats are widened to the largest type of their kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Value {
    U64(u64),
    I64(i64),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl Value {
    /// A non-negative integer, however it was stored.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::U64(value) => Some(*value),
            Value::I64(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Value::U64(value) => i64::try_from(*value).ok(),
            Value::I64(value) => Some(*value),
            _ => None,
        }
    }

    /// A float, or an integer converted to one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::F64(value) => Some(*value),
            Value::U64(value) => Some(*value as f64),
            Value::I64(value) => Some(*value as f64),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(value) => Some(value),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    pub ty: TensorType,
    /// Outermost dimension first (`[out, in]` for a matrix): the reverse of the order in the file.
    pub shape: Vec<usize>,
    /// Where its bytes are, from the start of the file.
    pub range: Range<usize>,
}

/// Everything before the tensor data, checked against the length of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, GgufTensor>,
}

/// An open file.
#[derive(Debug)]
pub struct Gguf {
    file: MappedFile,
    header: Header,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = MappedFile::open(path).map_err(|source| GgufError::Io { path: path.to_owned(), source })?;
        let header = Self::parse(&file)?;
        Ok(Self { file, header })
    }

    /// Parses the bytes of a whole file.
    pub fn parse(bytes: &[u8]) -> Result<Header, GgufError> {
        let mut reader = Reader::new(bytes);
        if bytes.len() < MAGIC.len() || reader.array::<4>()? != MAGIC {
            return Err(GgufError::NotGguf);
        }
        let version = reader.u32()?;
        match version {
            2 | 3 => {}
            _ if matches!(version.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
            _ => return Err(GgufError::UnsupportedVersion(version)),
        }
        let num_tensors = reader.count(MIN_TENSOR_BYTES)?;
        let num_entries = reader.count(MIN_ENTRY_BYTES)?;
        let metadata = read_metadata(&mut reader, num_entries)?;
        let alignment = alignment(&metadata)?;
        let raw = (0..num_tensors).map(|_| RawEntry::read(&mut reader)).collect::<Result<Vec<_>, _>>()?;
        let data_start = (reader.position() as u64).next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for entry in raw {
            let name = entry.name.to_owned();
            if tensors.insert(name, entry.locate(data_start, alignment, bytes.len())?).is_some() {
                return Err(GgufError::DuplicateTensor(entry.name.to_owned()));
            }
        }
        Ok(Header { version, metadata, tensors })
    }

    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.header.metadata
    }

    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.header.tensors
    }

    /// The stored bytes of a tensor.
    pub fn tensor_data(&self, name: &str) -> Result<&[u8], GgufError> {
        let entry = self.header.tensors.get(name).ok_or_else(|| GgufError::NoSuchTensor(name.to_owned()))?;
        Ok(&self.file[entry.range.clone()])
    }

    /// Asks the system to read a tensor ahead from the disk. Returns its size in bytes, 0 if there is no such tensor.
    pub fn read_ahead(&self, name: &str) -> usize {
        self.header.tensors.get(name).map_or(0, |entry| {
            self.file.read_ahead(entry.range.clone());
            entry.range.len()
        })
    }
}

fn read_metadata(reader: &mut Reader<'_>, count: usize) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = reader.string()?;
        if metadata.insert(key.to_owned(), reader.value()?).is_some() {
            return Err(GgufError::DuplicateKey(key.to_owned()));
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value.as_u64().unwrap_or(0),
    };
    if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
        Ok(alignment)
    } else {
        Err(GgufError::Alignment(alignment))
    }
}

/// A tensor's entry as stored. Its data can be located only after all entries are read.
struct RawEntry<'a> {
    name: &'a str,
    /// Innermost dimension first.
    dimensions: Vec<u64>,
    type_id: u32,
    /// From the start of the tensor data.
    offset: u64,
}

impl<'a> RawEntry<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, GgufError> {
        let name = reader.string()?;
        let num_dimensions = reader.u32()?;
        if num_dimensions > MAX_DIMENSIONS {
            return Err(GgufError::TooManyDimensions { name: name.to_owned(), dimensions: num_dimensions });
        }
        let dimensions = (0..num_dimensions).map(|_| reader.u64()).collect::<Result<_, _>>()?;
        Ok(Self { name, dimensions, type_id: reader.u32()?, offset: reader.u64()? })
    }

    fn locate(&self, data_start: u64, alignment: u64, file_len: usize) -> Result<GgufTensor, GgufError> {
        let name = || self.name.to_owned();
        let ty = TensorType::from_ggml(self.type_id)
            .ok_or_else(|| GgufError::UnsupportedTensorType { name: name(), id: self.type_id })?;
        let (shape, len) = self.shape_and_bytes(ty).ok_or_else(|| GgufError::Shape {
            name: name(),
            shape: self.dimensions.clone(),
            ty,
        })?;
        if !self.offset.is_multiple_of(alignment) {
            return Err(GgufError::Misaligned { name: name(), offset: self.offset });
        }
        let start = data_start.saturating_add(self.offset);
        let end = start.saturating_add(len as u64);
        if end > file_len as u64 {
            return Err(GgufError::OutsideFile { name: name(), end, file: file_len as u64 });
        }
        Ok(GgufTensor { ty, shape, range: start as usize..end as usize })
    }

    /// Shape, outermost dimension first, and size; `None` when a dimension is 0, blocks are broken, or it overflows.
    fn shape_and_bytes(&self, ty: TensorType) -> Option<(Vec<usize>, usize)> {
        let shape = self.dimensions.iter().rev().map(|n| usize::try_from(*n).ok()).collect::<Option<Vec<_>>>()?;
        let (row_len, rows) = shape.split_last()?;
        let rows = rows.iter().try_fold(1usize, |product, n| product.checked_mul(*n))?;
        let bytes = ty.row_bytes(*row_len)?.checked_mul(rows)?;
        // Rows and row are non-zero, and so is every element count derived from them; it must not overflow either.
        rows.checked_mul(*row_len).filter(|elements| *elements > 0)?;
        Some((shape, bytes))
    }
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;
