//! Our loader against candle's on every fixture: the same tensors, the same values, under Hugging Face's names and in its
//! row order. The values of quantized types are candle's on both sides here; that they are right is what the golden logits show.

use outrigger::engine::model::{Activation, LoadFormat, ModelFiles, RopeScaling};

use crate::fixtures::{DIRECTORIES, GGUF_FILES, path};
use crate::numerics_candle::{directory_tensors, gguf_model};

#[test]
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
    let files = open("llama-llama3-rope-f32-sharded");
    assert_eq!(files.eos_token_ids, [2, 0]);
    assert!(matches!(files.config.rope.scaling, RopeScaling::Llama3 { original_max_position_embeddings: 64, .. }));
}

fn open(name: &str) -> ModelFiles {
    ModelFiles::open(&path(name), LoadFormat::Auto).unwrap_or_else(|error| panic!("{name}: {error}"))
}
