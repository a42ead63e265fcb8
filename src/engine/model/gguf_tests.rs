//! Tests of models in GGUF files: configuration, names, row order.

use std::path::Path;

use super::config::{ModelConfig, ModelConfigError, RopeScaling};
use super::load::{LoadError, LoadFormat, ModelFiles};
use super::weights::TensorType;
use crate::formats::gguf_builder::GgufBuilder;

const HIDDEN: usize = 8;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 4;
const INTERMEDIATE: usize = 6;
const VOCAB: usize = 5;

/// The metadata of a model of one layer.
fn metadata() -> GgufBuilder {
    metadata_of("llama")
}

fn metadata_of(architecture: &str) -> GgufBuilder {
    let key = |key: &str| format!("{architecture}.{key}");
    GgufBuilder::default()
        .string("general.architecture", architecture)
        .u32(&key("block_count"), 1)
        .u32(&key("context_length"), 64)
        .u32(&key("embedding_length"), HIDDEN as u32)
        .u32(&key("feed_forward_length"), INTERMEDIATE as u32)
        .u32(&key("attention.head_count"), HEADS as u32)
        .u32(&key("attention.head_count_kv"), KV_HEADS as u32)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .u32(&key("rope.dimension_count"), HEAD_DIM as u32)
        .u32("tokenizer.ggml.eos_token_id", 2)
}

/// Every value of a row is the row's number in the file.
fn rows(builder: GgufBuilder, name: &str, rows: usize, width: usize) -> GgufBuilder {
    let values: Vec<f32> = (0..rows * width).map(|i| (i / width) as f32).collect();
    builder.f32_tensor(name, &[rows, width], &values)
}

fn with_tensors(mut builder: GgufBuilder) -> GgufBuilder {
    for (name, out, width) in [
        ("token_embd.weight", VOCAB, HIDDEN),
        ("blk.0.attn_q.weight", HEADS * HEAD_DIM, HIDDEN),
        ("blk.0.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN),
        ("blk.0.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN),
        ("blk.0.attn_output.weight", HIDDEN, HEADS * HEAD_DIM),
        ("blk.0.ffn_gate.weight", INTERMEDIATE, HIDDEN),
        ("blk.0.ffn_up.weight", INTERMEDIATE, HIDDEN),
        ("blk.0.ffn_down.weight", HIDDEN, INTERMEDIATE),
    ] {
        builder = rows(builder, name, out, width);
    }
    for name in ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"] {
        builder = builder.f32_tensor(name, &[HIDDEN], &[1.0; HIDDEN]);
    }
    builder
}

fn open(builder: &GgufBuilder) -> Result<ModelFiles, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    std::fs::write(&path, builder.build()).unwrap();
    ModelFiles::open(&path, LoadFormat::Auto)
}

fn config(builder: GgufBuilder) -> Result<ModelConfig, ModelConfigError> {
    match open(&with_tensors(builder)) {
        Ok(files) => Ok(files.config),
        Err(LoadError::Config { source, .. }) => Err(source),
        Err(other) => panic!("{other}"),
    }
}

/// The row numbers of a tensor, in the order they are given.
fn row_order(files: &ModelFiles, name: &str) -> Vec<f32> {
    let tensor = files.tensors.tensor(name).unwrap();
    let width = tensor.shape.get(1).copied().unwrap_or(1);
    tensor.dequantize().unwrap().chunks(width).map(|row| row[0]).collect()
}

#[test]
fn a_model_is_read_under_hugging_faces_names() {
    let files = open(&with_tensors(metadata())).unwrap();
    assert_eq!(files.name, "tiny");
    assert_eq!(files.eos_token_ids, [2]);
    let config = &files.config;
    assert_eq!((config.vocab_size, config.head_dim, config.num_key_value_heads), (VOCAB, HEAD_DIM, KV_HEADS));
    assert_eq!((config.rms_norm_eps, config.rope.theta), (1e-5, 10_000.0));
    assert!(config.tie_word_embeddings && !files.tensors.contains("lm_head.weight"));
    assert_eq!(files.tensors.shape("model.layers.0.mlp.down_proj.weight"), Some(&[HIDDEN, INTERMEDIATE][..]));
    assert!(matches!(files.tensors.tensor("blk.0.attn_q.weight"), Err(LoadError::MissingTensor(_))));
    let stored: usize = super::expected_tensors(config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(files.tensors.total_bytes(), 4 * stored as u64);
}

#[test]
fn rows_of_q_and_k_are_put_back_in_halves() {
    let files = open(&with_tensors(metadata())).unwrap();
    let q = row_order(&files, "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(q, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0], "in each of two heads");
    assert_eq!(row_order(&files, "model.layers.0.self_attn.k_proj.weight"), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(row_order(&files, "model.layers.0.self_attn.v_proj.weight"), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(row_order(&files, "model.layers.0.self_attn.o_proj.weight").len(), HIDDEN);
}

/// Biases on q, k and v whose values are their rows' numbers.
fn with_qkv_biases(mut builder: GgufBuilder) -> GgufBuilder {
    for (name, len) in [("attn_q", 8), ("attn_k", 4), ("attn_v", 4)] {
        let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
        builder = builder.f32_tensor(&format!("blk.0.{name}.bias"), &[len], &values);
    }
    builder
}

#[test]
fn rows_of_qwen_stay_where_they_are() {
    let files = open(&with_qkv_biases(with_tensors(metadata_of("qwen2")))).unwrap();
    let config = &files.config;
    assert_eq!((config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm), (true, false, false, false));
    let ascending: Vec<f32> = (0..8).map(|row| row as f32).collect();
    for kind in ["weight", "bias"] {
        assert_eq!(row_order(&files, &format!("model.layers.0.self_attn.q_proj.{kind}")), ascending);
        assert_eq!(row_order(&files, &format!("model.layers.0.self_attn.k_proj.{kind}")), ascending[..4]);
    }
}

#[test]
fn norms_of_the_heads_belong_to_qwen3() {
    let norms = |builder: GgufBuilder| {
        let builder = builder.f32_tensor("blk.0.attn_q_norm.weight", &[HEAD_DIM], &[2.0; HEAD_DIM]);
        builder.f32_tensor("blk.0.attn_k_norm.weight", &[HEAD_DIM], &[3.0; HEAD_DIM])
    };
    let files = open(&norms(with_tensors(metadata_of("qwen3")))).unwrap();
    assert!(files.config.qk_norm && !files.config.qkv_bias);
    assert_eq!(row_order(&files, "model.layers.0.self_attn.q_norm.weight"), [2.0; HEAD_DIM]);
    assert_eq!(row_order(&files, "model.layers.0.self_attn.k_norm.weight"), [3.0; HEAD_DIM]);
    assert!(matches!(
        open(&with_tensors(metadata_of("qwen3"))),
        Err(LoadError::MissingTensor(name)) if name == "model.layers.0.self_attn.q_norm.weight"
    ));
    let stray = open(&norms(with_tensors(metadata_of("qwen2"))));
    assert!(matches!(stray, Err(LoadError::UnexpectedTensor(name)) if name == "blk.0.attn_k_norm.weight"));
    let window = metadata_of("qwen2").u32("qwen2.attention.sliding_window", 8);
    assert!(config(window).unwrap_err().to_string().contains("qwen2.attention.sliding_window"));
    let yarn = metadata_of("qwen3").string("qwen3.rope.scaling.type", "yarn").f32("qwen3.rope.scaling.factor", 4.0);
    assert!(config(yarn).unwrap_err().to_string().contains("qwen3.rope.scaling.type = yarn"));
}

#[test]
fn rows_of_blocks_move_whole() {
    // One head of four rows, each a block of Q8_0 whose scale is zero and whose bytes are the row's number.
    let block = |row: u8| [&[0, 0][..], &[row; 32]].concat();
    let data: Vec<u8> = (0..4).flat_map(block).collect();
    let reordered = super::gguf_source::halves_from_neighbours(&data, 4, 1);
    let rows: Vec<u8> = reordered.chunks(34).map(|row| row[33]).collect();
    assert_eq!(rows, [0, 2, 1, 3]);
    assert_eq!(reordered.len(), data.len());
}

#[test]
fn biases_of_q_and_k_are_put_back_too() {
    let builder = with_qkv_biases(with_tensors(metadata())).f32_tensor("blk.0.attn_output.bias", &[8], &[0.0; 8]);
    let files = open(&builder).unwrap();
    assert!(files.config.qkv_bias && files.config.output_bias && !files.config.mlp_bias);
    assert_eq!(row_order(&files, "model.layers.0.self_attn.k_proj.bias"), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(row_order(&files, "model.layers.0.self_attn.v_proj.bias"), [0.0, 1.0, 2.0, 3.0]);
    let only_q = with_tensors(metadata()).f32_tensor("blk.0.attn_q.bias", &[8], &[0.0; 8]);
    assert!(matches!(open(&only_q), Err(LoadError::Config { source: ModelConfigError::Inconsistent(_), .. })));
}

#[test]
fn a_tensor_without_a_place_is_refused() {
    for name in [
        "blk.0.attn_q_norm.weight",
        "blk.0.ffn_gate_exps.weight",
        "blk.1.attn_q.weight",
        "blk.x.attn_q.weight",
        "mystery",
    ] {
        let builder = with_tensors(metadata()).f32_tensor(name, &[HIDDEN], &[1.0; HIDDEN]);
        assert!(matches!(open(&builder), Err(LoadError::UnexpectedTensor(found)) if found == name), "{name}");
    }
}

#[test]
fn a_tensor_that_is_missing_or_of_another_shape_is_named() {
    let two_layers = metadata().u32("llama.vocab_size", 99);
    assert_eq!(config(two_layers).unwrap().vocab_size, VOCAB, "the embedding decides");
    let builder = with_tensors(
        GgufBuilder::default()
            .string("general.architecture", "llama")
            .u32("llama.block_count", 2)
            .u32("llama.context_length", 64)
            .u32("llama.embedding_length", HIDDEN as u32)
            .u32("llama.feed_forward_length", INTERMEDIATE as u32)
            .u32("llama.attention.head_count", HEADS as u32)
            .u32("llama.attention.head_count_kv", KV_HEADS as u32)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
    );
    assert!(matches!(open(&builder), Err(LoadError::MissingTensor(name)) if name.starts_with("model.layers.1.")));
    let builder = with_tensors(metadata()).f32_tensor("output.weight", &[VOCAB, HIDDEN + 1], &[0.0; 45]);
    assert!(matches!(open(&builder), Err(LoadError::Shape { name, .. }) if name == "lm_head.weight"));
}

#[test]
fn rotary_scaling_is_read() {
    let scaling = |builder: GgufBuilder| config(builder).map(|config| config.rope.scaling);
    assert_eq!(scaling(metadata().f32("llama.rope.freq_base", 5e5)), Ok(RopeScaling::None));
    assert_eq!(scaling(metadata().f32("llama.rope.scaling.factor", 4.0)), Ok(RopeScaling::Linear { factor: 4.0 }));
    assert_eq!(scaling(metadata().f32("llama.rope.scale_linear", 2.0)), Ok(RopeScaling::Linear { factor: 2.0 }));
    assert_eq!(scaling(metadata().f32("llama.rope.scale_linear", 1.0)), Ok(RopeScaling::None));
    let yarn = metadata().string("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0);
    assert!(matches!(scaling(yarn), Err(ModelConfigError::Unsupported { .. })));
    let factors = metadata().f32_tensor("rope_freqs.weight", &[2], &[1.0, 8.0]);
    assert_eq!(scaling(factors), Ok(RopeScaling::Factors(vec![1.0, 8.0])));
    let too_many = metadata().f32_tensor("rope_freqs.weight", &[3], &[1.0; 3]);
    assert!(matches!(scaling(too_many), Err(ModelConfigError::Inconsistent(_))));
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let refused = |builder: GgufBuilder| config(builder).unwrap_err().to_string();
    assert!(refused(metadata().u32("llama.expert_count", 8)).contains("llama.expert_count"));
    assert!(refused(metadata().f32("llama.attention.scale", 0.1)).contains("llama.attention.scale"));
    assert!(refused(metadata().u32("split.count", 2)).contains("split.count"));
    assert!(refused(metadata().u32("llama.attention.value_length", 8)).contains("value_length"));
    assert!(refused(metadata().strings("llama.attention.sliding_window", &["x"])).contains("sliding_window"));
    let other = GgufBuilder::default().string("general.architecture", "qwen2moe");
    assert_eq!(config(other), Err(ModelConfigError::Architecture("qwen2moe".to_owned())));
    assert!(matches!(config(GgufBuilder::default()), Err(ModelConfigError::Missing(_))));
}

#[test]
fn the_ends_are_those_that_keys_name() {
    let builder = metadata().u32("tokenizer.ggml.eot_token_id", 4).u32("tokenizer.ggml.eom_token_id", u32::MAX);
    let files = open(&with_tensors(builder)).unwrap();
    assert_eq!(files.eos_token_ids, [2, 4], "the largest id stands for none");
}

#[test]
fn dummy_weights_of_a_gguf_file_have_its_shapes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    std::fs::write(&path, with_tensors(metadata()).build()).unwrap();
    let files = ModelFiles::open(&path, LoadFormat::Dummy).unwrap();
    assert_eq!(files.tensors.tensor("model.embed_tokens.weight").unwrap().ty, TensorType::BF16);
    assert!(matches!(ModelFiles::open(&path, LoadFormat::Safetensors), Err(LoadError::WrongFormat { .. })));
    let missing = ModelFiles::open(Path::new("no/such.gguf"), LoadFormat::Auto);
    assert!(matches!(missing, Err(LoadError::Io { .. })));
}
