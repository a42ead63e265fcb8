//! Compares our loader with candle's on every fixture: both must give the same tensors with the same values, with Hugging
//! Face's names and row order. Both sides use candle's values for quantized types; the golden logits show that these are
//! correct.

use std::path::Path;

use outrigger::engine::model::{Activation, LoadFormat, ModelFiles, RopeScaling, TokenizerSource};
use outrigger::tokenizer::Tokenizer;

use crate::fixtures::{DIRECTORIES, GGUF_FILES, path};
use crate::numerics_candle::{directory_tensors, gguf_model};

#[test]
#[expect(clippy::iter_over_hash_type, reason = "each tensor is compared by itself")]
fn weights_are_the_stored_ones() {
    for name in DIRECTORIES.into_iter().chain(GGUF_FILES) {
        let expected = if path(name).is_dir() { directory_tensors(name) } else { gguf_model(name).1 };
        let files = open(name);
        for (tensor_name, expected) in expected {
            let tensor = files.tensors.tensor(&tensor_name).unwrap();
            assert_eq!(tensor.shape, expected.dims(), "{name}: {tensor_name}");
            let expected = expected.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap();
            assert!(tensor.dequantize().unwrap() == expected.to_vec1::<f32>().unwrap(), "{name}: {tensor_name}");
        }
    }
}

#[test]
fn configurations_are_read_in_every_spelling() {
    let config = open("llama-gelu-bf16").config;
    assert_eq!((config.rope.theta, config.hidden_act), (50000.0, Activation::Gelu));
    let config = open("mistral-gelu-tanh-f16").config;
    assert_eq!((config.head_dim, config.sliding_window, config.hidden_act), (24, None, Activation::GeluTanh));
    assert_eq!(open("mistral-window-f16").config.sliding_window, Some(72));
    let config = open("llama-mha-bias-linear-odd").config;
    assert_eq!((config.qkv_bias, config.output_bias, config.qk_norm, config.mlp_bias), (true, true, false, true));
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(open("gguf-q8_0-linear-rope").config.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert!(
        matches!(open("gguf-bf16-llama3-rope").config.rope.scaling, RopeScaling::Factors(factors) if factors.len() == 8)
    );
    let config = open("qwen2-bias-f32").config;
    assert_eq!((config.qkv_bias, config.output_bias, config.qk_norm, config.mlp_bias), (true, false, false, false));
    assert_eq!((config.sliding_window, config.head_dim), (None, 16), "the window is not in use");
    let config = open("qwen3-bias-window-f16").config;
    assert_eq!((config.qkv_bias, config.output_bias, config.qk_norm, config.mlp_bias), (true, true, true, false));
    assert_eq!((config.sliding_window, config.head_dim), (Some(50), 24));
    let config = open("gguf-qwen2-f16").config;
    assert_eq!((config.qkv_bias, config.output_bias, config.qk_norm, config.mlp_bias), (true, false, false, false));
    let config = open("gguf-qwen3-q8_0").config;
    assert_eq!((config.qkv_bias, config.output_bias, config.qk_norm, config.head_dim), (false, false, true, 32));
    let files = open("llama-llama3-rope-f32-sharded");
    assert_eq!(files.eos_token_ids, [2, 0]);
    assert!(matches!(files.config.rope.scaling, RopeScaling::Llama3 { original_max_position_embeddings: 64, .. }));
}

/// Checks the models in `benches/models` against the published numbers of their weights.
#[test]
fn shapes_to_be_measured_are_those_of_the_models() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/models");
    for (name, weights) in
        [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920)]
    {
        let files = ModelFiles::open(&models.join(name), LoadFormat::Dummy).unwrap();
        assert_eq!(files.tensors.total_bytes(), 2 * weights, "{name}, in bf16");
        assert!(ModelFiles::open(&models.join(name), LoadFormat::Auto).is_err(), "{name} holds no weights");
        let TokenizerSource::Directory(directory) = files.tokenizer else { panic!("{name} is a directory") };
        Tokenizer::from_dir(&directory).unwrap();
    }
}

fn open(name: &str) -> ModelFiles {
    ModelFiles::open(&path(name), LoadFormat::Auto).unwrap_or_else(|error| panic!("{name}: {error}"))
}
