//! Models: what a configuration says, where weights come from, and the decoder that runs them.
//!
//! Every source speaks Hugging Face's tensor names and row order, so the decoder knows one layout.

pub mod config;
pub mod decoder;
mod dummy;
mod expected;
mod gguf_config;
mod gguf_source;
#[cfg(test)]
mod gguf_tests;
pub mod gpu_decoder;
pub mod gpu_products;
pub mod gpu_weights;
mod hf_config;
pub mod load;
mod reader;
mod safetensors_source;
pub mod weights;

pub use config::{Activation, Architecture, ModelConfig, ModelConfigError, RopeConfig, RopeScaling};
pub use expected::expected_tensors;
pub use load::{LoadError, LoadFormat, ModelFiles, TokenizerSource};
pub use weights::{RawTensor, TensorSource, TensorType};
