//! File formats of models: GGUF and safetensors. Knows bytes, names, types and shapes; knows no architecture.
//!
//! Everything read here comes from files of unknown origin. No length is trusted before it was checked against the
//! file, so nothing panics and nothing is allocated that the file could not hold.

pub mod gguf;
#[cfg(test)]
pub(crate) mod gguf_builder;
mod gguf_reader;
mod mapped_file;
pub mod safetensors;
mod tensor_type;

pub use mapped_file::MappedFile;
pub use tensor_type::TensorType;
