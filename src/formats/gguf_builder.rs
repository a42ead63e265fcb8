//! Writes small GGUF files for tests, well-formed or not.

use super::TensorType;

/// Collects metadata and tensors, then lays out a version 3 file.
#[derive(Default)]
pub(crate) struct GgufBuilder {
    entries: Vec<Vec<u8>>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufBuilder {
    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, &[value.into()])
    }

    pub fn string(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &string(value))
    }

    pub fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| bytes.extend(string(value)));
        self.raw(key, 9, &bytes)
    }

    /// A value of ggml's type `ty` in the file's own bytes.
    pub fn raw(mut self, key: &str, ty: u32, value: &[u8]) -> Self {
        self.entries.push([&string(key)[..], &ty.to_le_bytes(), value].concat());
        self
    }

    /// `shape` is outermost first, as our reader gives it back.
    pub fn tensor(self, name: &str, shape: &[usize], ty: TensorType, data: Vec<u8>) -> Self {
        let id = (0..64).find(|id| TensorType::from_ggml(*id) == Some(ty)).expect("every type has a number");
        self.raw_tensor(name, shape.iter().rev().map(|n| *n as u64).collect(), id, data)
    }

    pub fn f32_tensor(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, shape, TensorType::F32, data)
    }

    pub fn raw_tensor(mut self, name: &str, dimensions: Vec<u64>, ty: u32, data: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), dimensions, ty, data));
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.entries.len() as u64).to_le_bytes());
        file.extend(self.entries.concat());
        let mut offset = 0u64;
        for (name, dimensions, ty, data) in &self.tensors {
            file.extend(string(name));
            file.extend((dimensions.len() as u32).to_le_bytes());
            dimensions.iter().for_each(|n| file.extend(n.to_le_bytes()));
            file.extend(ty.to_le_bytes());
            file.extend(offset.to_le_bytes());
            offset += (data.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, data) in &self.tensors {
            file.resize(file.len().next_multiple_of(32), 0);
            file.extend(data);
        }
        file
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
