//! A second reference: candle-transformers' decoders must agree with the golden logits of every fixture that they support, with
//! weights that candle reads and dequantizes itself. This detects mistakes in the golden files. (candle supports neither linear
//! RoPE scaling nor biases for Llama, nor a window for Qwen, so those three fixtures rely on transformers alone.)

use std::collections::HashMap;
use std::fs::File;

use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use serde_json::{Value, json};

use crate::fixtures::{FLOAT32_TOLERANCE, Golden, PROMPT_LENGTH, path, relative_error};

pub type Tensors = HashMap<String, Tensor>;

#[test]
fn candle_llama_agrees_on_directories() {
    for name in ["llama-gqa-tied-bf16", "llama-llama3-rope-f32-sharded"] {
        check_llama(name, &config_json(name), directory_tensors(name));
    }
}

/// candle's Mistral supports other activations and an explicit head size, so it is also the reference for the Llama with
/// `gelu`.
#[test]
fn candle_mistral_agrees_on_directories() {
    for name in ["mistral-window-f16", "mistral-gelu-tanh-f16", "llama-gelu-bf16"] {
        let mut config = config_json(name);
        if let Some(theta) = config["rope_parameters"]["rope_theta"].as_f64() {
            config["rope_theta"] = json!(theta);
        }
        // candle lets a query see `sliding_window` keys before itself, transformers one fewer.
        let window = config["sliding_window"].as_u64();
        config["sliding_window"] = window.map_or(Value::Null, |window| json!(window - 1));
        check_mistral(name, config, directory_tensors(name), window.is_some());
    }
}

#[test]
fn candle_qwen_agrees_on_directories() {
    // candle applies the window even if `use_sliding_window` is false.
    let mut config = config_json("qwen2-bias-f32");
    config["sliding_window"] = config["max_position_embeddings"].clone();
    check_qwen2("qwen2-bias-f32", config, directory_tensors("qwen2-bias-f32"));
    let name = "qwen3-qk-norm-tied-bf16";
    check_qwen3(name, config_json(name), directory_tensors(name));
}

#[test]
fn candle_agrees_on_gguf_files() {
    let names = ["gguf-f32", "gguf-f16", "gguf-q4_0", "gguf-q4_1", "gguf-q4_k", "gguf-q6_k", "gguf-mixed"];
    for name in names {
        let (config, tensors) = gguf_model(name);
        check_llama(name, &config, tensors);
    }
    // candle does not read `rope_freqs.weight`, but computes the same values from this configuration.
    let (mut config, tensors) = gguf_model("gguf-bf16-llama3-rope");
    config["rope_scaling"] = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_type": "llama3",
    });
    check_llama("gguf-bf16-llama3-rope", &config, tensors);
    let (config, tensors) = gguf_model("gguf-qwen2-f16");
    check_qwen2("gguf-qwen2-f16", config, tensors);
    let (config, tensors) = gguf_model("gguf-qwen3-q8_0");
    check_qwen3("gguf-qwen3-q8_0", config, tensors);
}

fn check_llama(name: &str, config: &Value, tensors: Tensors) {
    let golden = Golden::load(name);
    let config: llama::LlamaConfig = serde_json::from_value(config.clone()).unwrap();
    let config = config.into_config(false);
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let model = llama::Llama::load(builder, &config).unwrap();
    let new_cache = || llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    for (position, expected) in &golden.rows {
        let logits = model.forward(&batch_of_one(&golden.ids[..=*position]), 0, &mut new_cache()).unwrap();
        check(name, *position, &logits, expected);
    }
    let mut cache = new_cache();
    let _ = model.forward(&batch_of_one(&golden.ids[..PROMPT_LENGTH]), 0, &mut cache).unwrap();
    for position in PROMPT_LENGTH..golden.ids.len() {
        let logits = model.forward(&batch_of_one(&golden.ids[position..=position]), position, &mut cache).unwrap();
        check(name, position, &logits, golden.row(position));
    }
}

fn check_mistral(name: &str, config: Value, tensors: Tensors, has_window: bool) {
    let config: mistral::Config = serde_json::from_value(config).unwrap();
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut model = mistral::Model::new(&config, builder).unwrap();
    check_prefill(name, &mut model);
    // candle's decode step ignores the window.
    if !has_window {
        check_decode(name, &mut model);
    }
}

fn check_qwen2(name: &str, config: Value, tensors: Tensors) {
    let config: qwen2::Config = serde_json::from_value(config).unwrap();
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut model = qwen2::ModelForCausalLM::new(&config, builder).unwrap();
    check_prefill(name, &mut model);
    check_decode(name, &mut model);
}

fn check_qwen3(name: &str, config: Value, tensors: Tensors) {
    let config: qwen3::Config = serde_json::from_value(config).unwrap();
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut model = qwen3::ModelForCausalLM::new(&config, builder).unwrap();
    check_prefill(name, &mut model);
    check_decode(name, &mut model);
}

/// A decoder of candle's that keeps its own cache.
trait Reference {
    fn clear(&mut self);

    /// The logits after the last of `ids`, `[1, n]`, whose positions start at `offset`.
    fn logits(&mut self, ids: &Tensor, offset: usize) -> Tensor;
}

macro_rules! impl_reference {
    ($($model:ty),*) => {$(
        impl Reference for $model {
            fn clear(&mut self) {
                self.clear_kv_cache();
            }

            fn logits(&mut self, ids: &Tensor, offset: usize) -> Tensor {
                self.forward(ids, offset).unwrap()
            }
        }
    )*};
}

impl_reference!(mistral::Model, qwen2::ModelForCausalLM, qwen3::ModelForCausalLM);

fn check_prefill(name: &str, model: &mut dyn Reference) {
    let golden = Golden::load(name);
    for (position, expected) in &golden.rows {
        model.clear();
        let logits = model.logits(&batch_of_one(&golden.ids[..=*position]), 0);
        check(name, *position, &logits, expected);
    }
}

fn check_decode(name: &str, model: &mut dyn Reference) {
    let golden = Golden::load(name);
    model.clear();
    model.logits(&batch_of_one(&golden.ids[..PROMPT_LENGTH]), 0);
    for position in PROMPT_LENGTH..golden.ids.len() {
        let logits = model.logits(&batch_of_one(&golden.ids[position..=position]), position);
        check(name, position, &logits, golden.row(position));
    }
}

fn check(name: &str, position: usize, logits: &Tensor, golden: &[f32]) {
    let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
    let error = relative_error(&logits, golden);
    assert!(error <= FLOAT32_TOLERANCE, "{name}: candle is off by {error:e} at position {position}");
}

fn batch_of_one(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
}

fn config_json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path(name).join("config.json")).unwrap()).unwrap()
}

pub fn directory_tensors(name: &str) -> Tensors {
    let files = std::fs::read_dir(path(name)).unwrap().map(|entry| entry.unwrap().path());
    let shards = files.filter(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    shards.flat_map(|file| candle_core::safetensors::load(file, &Device::Cpu).unwrap()).collect()
}

/// The configuration and the dequantized weights, with Hugging Face's names and row order.
pub fn gguf_model(name: &str) -> (Value, Tensors) {
    let mut file = File::open(path(name)).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let architecture = content.metadata["general.architecture"].to_string().unwrap();
    let optional = |key: &str| content.metadata.get(&format!("{architecture}.{key}"));
    let number = |key: &str| optional(key).unwrap().to_u32().unwrap() as usize;
    let heads = number("attention.head_count");
    let kv_heads = number("attention.head_count_kv");
    let head_dim = optional("attention.key_length").map(|length| length.to_u32().unwrap() as usize);
    let float = |key: &str| optional(key).unwrap().to_f32().unwrap();
    let config = json!({
        "hidden_size": number("embedding_length"), "intermediate_size": number("feed_forward_length"),
        "vocab_size": number("vocab_size"), "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "rms_norm_eps": float("attention.layer_norm_rms_epsilon"), "rope_theta": float("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": !content.tensor_infos.contains_key("output.weight"),
        "head_dim": head_dim.unwrap_or(number("embedding_length") / heads), "hidden_act": "silu", "attention_bias": false,
        "use_sliding_window": false, "sliding_window": number("context_length"), "max_window_layers": 0,
    });
    let is_interleaved = architecture == "llama";
    let mut tensors = Tensors::new();
    for ggml_name in content.tensor_infos.keys().filter(|name| *name != "rope_freqs.weight") {
        let tensor = content.tensor(&mut file, ggml_name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        let tensor = match ggml_name {
            name if is_interleaved && name.contains("attn_q.") => halves_from_pairs(&tensor, heads),
            name if is_interleaved && name.contains("attn_k.") => halves_from_pairs(&tensor, kv_heads),
            _ => tensor,
        };
        tensors.insert(hugging_face_name(ggml_name), tensor);
    }
    (config, tensors)
}

/// Undoes the row order that GGUF converters give to q and k: adjacent pairs of rows of a head become its two halves again.
fn halves_from_pairs(tensor: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = tensor.dims2().unwrap();
    let pairs = tensor.reshape((heads, rows / heads / 2, 2, cols)).unwrap();
    pairs.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, cols)).unwrap()
}

fn hugging_face_name(ggml_name: &str) -> String {
    let parts: Vec<&str> = ggml_name.split('.').collect();
    match parts[..] {
        ["token_embd", "weight"] => "model.embed_tokens.weight".to_owned(),
        ["output_norm", "weight"] => "model.norm.weight".to_owned(),
        ["output", "weight"] => "lm_head.weight".to_owned(),
        ["blk", layer, part, kind] => {
            let part = match part {
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "attn_q_norm" => "self_attn.q_norm",
                "attn_k_norm" => "self_attn.k_norm",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                "attn_norm" => "input_layernorm",
                "ffn_norm" => "post_attention_layernorm",
                other => panic!("unknown part {other}"),
            };
            format!("model.layers.{layer}.{part}.{kind}")
        }
        _ => panic!("unknown tensor {ggml_name}"),
    }
}
