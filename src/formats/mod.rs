//! File formats of models: GGUF and safetensors. Knows bytes, names, types and shapes; knows no architecture.
//!
//! Files may come from anywhere. Every length is checked against the file before it is used, so no input panics or
//! allocates more than the file could hold.

pub mod gguf;
#[cfg(test)]
pub(crate) mod gguf_builder;
mod gguf_reader;
mod mapped_file;
pub mod safetensors;
mod tensor_type;

pub use mapped_file::MappedFile;
pub use tensor_type::TensorType;
