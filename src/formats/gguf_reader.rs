//! A cursor over a GGUF header. Every read is checked against the bytes left, and every count against the least size of its
//! elements, before anything is allocated.

use super::gguf::{GgufError, Value};

/// Arrays of arrays deeper than this are refused (real files have depth one).
const MAX_ARRAY_DEPTH: u32 = 4;

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

/// ggml's numbers for the types of metadata values.
#[derive(Clone, Copy)]
enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => ValueType::U8,
            1 => ValueType::I8,
            2 => ValueType::U16,
            3 => ValueType::I16,
            4 => ValueType::U32,
            5 => ValueType::I32,
            6 => ValueType::F32,
            7 => ValueType::Bool,
            8 => ValueType::String,
            9 => ValueType::Array,
            10 => ValueType::U64,
            11 => ValueType::I64,
            12 => ValueType::F64,
            _ => return None,
        })
    }

    /// The least size of a value of this type, in bytes.
    fn min_bytes(self) -> usize {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    pub fn position(&self) -> usize {
        self.position
    }

    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], GgufError> {
        let end = self.position.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(GgufError::Truncated { position: self.position, wanted: len as u64 })?;
        let taken = &self.bytes[self.position..end];
        self.position = end;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub fn u32(&mut self) -> Result<u32, GgufError> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, GgufError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads a count of elements of at least `min_bytes` each. Refuses a count that the rest of the file cannot hold.
    pub fn count(&mut self, min_bytes: usize) -> Result<usize, GgufError> {
        let count = self.u64()?;
        let fits = (self.remaining() / min_bytes) as u64;
        if count > fits {
            let wanted = count.saturating_mul(min_bytes as u64);
            return Err(GgufError::Truncated { position: self.position, wanted });
        }
        Ok(count as usize)
    }

    pub fn string(&mut self) -> Result<&'a str, GgufError> {
        let len = self.count(1)?;
        let position = self.position;
        std::str::from_utf8(self.take(len)?).map_err(|_| GgufError::NotUtf8 { position })
    }

    /// Reads a typed value: the type's number, then the value.
    pub fn value(&mut self) -> Result<Value, GgufError> {
        let ty = self.value_type()?;
        self.value_of(ty, 0)
    }

    fn value_type(&mut self) -> Result<ValueType, GgufError> {
        let position = self.position;
        let id = self.u32()?;
        ValueType::from_id(id).ok_or(GgufError::UnknownValueType { id, position })
    }

    fn value_of(&mut self, ty: ValueType, depth: u32) -> Result<Value, GgufError> {
        Ok(match ty {
            ValueType::U8 => Value::U64(u8::from_le_bytes(self.array()?).into()),
            ValueType::I8 => Value::I64(i8::from_le_bytes(self.array()?).into()),
            ValueType::U16 => Value::U64(u16::from_le_bytes(self.array()?).into()),
            ValueType::I16 => Value::I64(i16::from_le_bytes(self.array()?).into()),
            ValueType::U32 => Value::U64(self.u32()?.into()),
            ValueType::I32 => Value::I64(i32::from_le_bytes(self.array()?).into()),
            ValueType::F32 => Value::F64(f32::from_le_bytes(self.array()?).into()),
            ValueType::Bool => Value::Bool(u8::from_le_bytes(self.array()?) != 0),
            ValueType::String => Value::String(self.string()?.to_owned()),
            ValueType::U64 => Value::U64(self.u64()?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array()?)),
            ValueType::Array => {
                if depth == MAX_ARRAY_DEPTH {
                    return Err(GgufError::NestedTooDeep { position: self.position });
                }
                let element = self.value_type()?;
                let count = self.count(element.min_bytes())?;
                let elements = (0..count).map(|_| self.value_of(element, depth + 1));
                Value::Array(elements.collect::<Result<_, _>>()?)
            }
        })
    }
}
