//! Tests of opening directories, with weights or dummy ones.

use std::collections::BTreeMap;

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

use super::*;

fn config_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 6, "max_position_embeddings": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 5,
        "eos_token_id": 1, "torch_dtype": "float32"
    })
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    expected_tensors(&hf_config::parse(&config_json()).unwrap())
}

/// A directory with a configuration and nothing else.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    write_json(&directory, "config.json", &config_json());
    directory
}

fn write_json(directory: &tempfile::TempDir, name: &str, json: &Value) {
    std::fs::write(directory.path().join(name), json.to_string()).unwrap();
}

fn write_weights(directory: &tempfile::TempDir, name: &str, shapes: &[(String, Vec<usize>)]) {
    let data: Vec<Vec<u8>> = shapes.iter().map(|(_, shape)| vec![0; 4 * shape.iter().product::<usize>()]).collect();
    let views = shapes.iter().zip(&data);
    let views = views.map(|((name, shape), data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, &directory.path().join(name)).unwrap();
}

fn open(directory: &tempfile::TempDir, format: LoadFormat) -> Result<ModelFiles, LoadError> {
    ModelFiles::open(directory.path(), format)
}

#[test]
fn a_single_file_of_weights_is_found_under_any_name() {
    for name in ["model.safetensors", "other.safetensors"] {
        let directory = directory();
        write_weights(&directory, name, &shapes());
        write_json(&directory, "generation_config.json", &json!({"eos_token_id": [3, 4]}));
        let files = open(&directory, LoadFormat::Auto).unwrap();
        assert_eq!(files.eos_token_ids, [3, 4]);
        assert_eq!(files.tensors.tensor("lm_head.weight").unwrap().shape, [5, 8]);
        assert_eq!(files.name, directory.path().file_name().unwrap().to_str().unwrap());
        assert!(matches!(open(&directory, LoadFormat::Gguf), Err(LoadError::WrongFormat { .. })));
    }
}

#[test]
fn shards_are_found_through_their_index() {
    let directory = directory();
    let shapes = shapes();
    let (first, second) = shapes.split_at(7);
    write_weights(&directory, "a.safetensors", first);
    write_weights(&directory, "b.safetensors", second);
    assert!(matches!(open(&directory, LoadFormat::Safetensors), Err(LoadError::AmbiguousWeights { count: 2, .. })));
    let map = |file: &'static str, shapes: &[(String, Vec<usize>)]| -> BTreeMap<String, &'static str> {
        shapes.iter().map(|(name, _)| (name.clone(), file)).collect()
    };
    let mut weight_map = map("a.safetensors", first);
    weight_map.extend(map("b.safetensors", second));
    write_json(&directory, "model.safetensors.index.json", &json!({"weight_map": weight_map}));
    let files = open(&directory, LoadFormat::Auto).unwrap();
    let elements: usize = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(files.tensors.total_bytes(), 4 * elements as u64);
    assert!(shapes.iter().all(|(name, _)| files.tensors.tensor(name).is_ok()));
}

#[test]
fn an_index_that_leads_out_of_the_directory_is_refused() {
    for name in ["../a.safetensors", "/a.safetensors", "b/a.safetensors", ".."] {
        let directory = directory();
        write_json(&directory, "model.safetensors.index.json", &json!({"weight_map": {"lm_head.weight": name}}));
        let result = open(&directory, LoadFormat::Safetensors);
        assert!(matches!(result, Err(LoadError::ShardName { .. })), "{name}");
    }
}

#[test]
fn tensors_are_checked_against_the_configuration() {
    let with = |change: fn(&mut Vec<(String, Vec<usize>)>)| {
        let directory = directory();
        let mut shapes = shapes();
        change(&mut shapes);
        write_weights(&directory, "model.safetensors", &shapes);
        open(&directory, LoadFormat::Auto)
    };
    let missing = with(|shapes| shapes.retain(|(name, _)| name != "model.norm.weight"));
    assert!(matches!(missing, Err(LoadError::MissingTensor(name)) if name == "model.norm.weight"));
    let reshaped = with(|shapes| shapes[0].1.reverse());
    assert!(matches!(reshaped, Err(LoadError::Shape { .. })));
    let unknown = with(|shapes| shapes.push(("model.layers.0.self_attn.q_norm.weight".to_owned(), vec![4])));
    assert!(matches!(unknown, Err(LoadError::UnexpectedTensor(_))));
    let ignored = with(|shapes| {
        shapes.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![2]));
        shapes.push(("v_head.weight".to_owned(), vec![2]));
    });
    assert!(ignored.is_ok());
}

#[test]
fn a_directory_that_is_no_model_says_what_is_missing() {
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(open(&empty, LoadFormat::Auto), Err(LoadError::NotAModel { .. })));
    assert!(matches!(open(&directory(), LoadFormat::Auto), Err(LoadError::NoWeights { .. })));
    let broken = directory();
    std::fs::write(broken.path().join("config.json"), "{").unwrap();
    write_weights(&broken, "model.safetensors", &shapes());
    assert!(matches!(open(&broken, LoadFormat::Auto), Err(LoadError::Json { .. })));
    std::fs::write(broken.path().join("config.json"), "[".repeat(100_000)).unwrap();
    assert!(matches!(open(&broken, LoadFormat::Auto), Err(LoadError::Json { .. })));
    let garbage = directory();
    std::fs::write(garbage.path().join("model.safetensors"), "garbage").unwrap();
    assert!(matches!(open(&garbage, LoadFormat::Auto), Err(LoadError::Safetensors { .. })));
}

#[test]
fn dummy_weights_need_a_tokenizer_and_no_weights() {
    let directory = directory();
    assert!(matches!(open(&directory, LoadFormat::Dummy), Err(LoadError::NoTokenizer { .. })));
    std::fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    let files = open(&directory, LoadFormat::Dummy).unwrap();
    let tensor = files.tensors.tensor("lm_head.weight").unwrap();
    assert_eq!((tensor.ty, &tensor.shape[..]), (TensorType::F32, &[5, 8][..]));
    assert!(matches!(files.tokenizer, TokenizerSource::Directory(path) if path == directory.path()));
}

#[test]
fn formats_are_spelt_as_vllm_does() {
    for format in [LoadFormat::Auto, LoadFormat::Safetensors, LoadFormat::Gguf, LoadFormat::Dummy] {
        assert_eq!(format.to_string().parse(), Ok(format));
        assert_eq!(serde_json::to_value(format).unwrap(), format.to_string());
    }
    assert!("pickle".parse::<LoadFormat>().is_err());
}
