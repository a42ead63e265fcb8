//! Tests of reading `config.json`.

use serde_json::json;

use super::*;

/// SmolLM2-135M-Instruct's, shortened.
fn smollm2() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
        "mlp_bias": false, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "vocab_size": 49152
    })
}

fn with(changes: Value) -> Value {
    let mut json = smollm2();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    json
}

fn without(key: &str) -> Value {
    let mut json = smollm2();
    json.as_object_mut().unwrap().shift_remove(key).unwrap();
    json
}

fn unsupported_key(json: Value) -> String {
    match parse(&json) {
        Err(ModelConfigError::Unsupported { key, .. }) => key,
        other => panic!("{other:?} instead of an unsupported key"),
    }
}

#[test]
fn a_llama_configuration_is_read() {
    let config = parse(&smollm2()).unwrap();
    let expected = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 49152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 30,
        num_attention_heads: 9,
        num_key_value_heads: 3,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        rope: RopeConfig { theta: 100_000.0, scaling: RopeScaling::None },
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        sliding_window: None,
        qkv_bias: false,
        output_bias: false,
        qk_norm: false,
        mlp_bias: false,
        hidden_act: Activation::Silu,
    };
    assert_eq!(config, expected);
    assert_eq!(
        config.canonical_json(),
        r#"{"architecture":"llama","vocab_size":49152,"hidden_size":576,"intermediate_size":1536,"num_hidden_layers":30,"num_attention_heads":9,"num_key_value_heads":3,"head_dim":64,"rms_norm_eps":0.00001,"rope":{"theta":100000.0,"scaling":"none"},"max_position_embeddings":8192,"tie_word_embeddings":true,"sliding_window":null,"qkv_bias":false,"output_bias":false,"qk_norm":false,"mlp_bias":false,"hidden_act":"silu"}"#,
        "a change of this text changes every fingerprint"
    );
}

#[test]
fn keys_left_out_mean_what_they_mean_to_the_reference() {
    assert_eq!(parse(&without("num_key_value_heads")).unwrap().num_key_value_heads, 9);
    assert!(!parse(&without("tie_word_embeddings")).unwrap().tie_word_embeddings);
    assert_eq!(parse(&without("rms_norm_eps")).unwrap().rms_norm_eps, 1e-6);
    assert_eq!(parse(&without("rope_theta")).unwrap().rope.theta, 10_000.0);
    assert_eq!(parse(&without("hidden_size")), Err(ModelConfigError::Missing("hidden_size".to_owned())));
    assert_eq!(parse(&with(json!({"head_dim": 128}))).unwrap().head_dim, 128);
    assert_eq!(parse(&with(json!({"head_dim": null}))).unwrap().head_dim, 64);
}

#[test]
fn the_window_of_mistral_is_known_when_it_is_left_out() {
    let mistral = |changes: Value| {
        let mut json = with(json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}));
        json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        parse(&json).unwrap().sliding_window
    };
    assert_eq!(mistral(json!({})), Some(4096));
    assert_eq!(mistral(json!({"sliding_window": null})), None);
    assert_eq!(mistral(json!({"sliding_window": 16})), Some(16));
    assert_eq!(parse(&with(json!({"sliding_window": 16}))).unwrap().sliding_window, None, "Llama has no window");
}

/// Qwen3-0.6B's.
fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_sliding_window": false,
        "vocab_size": 151936
    })
}

/// Qwen2.5-0.5B-Instruct's, shortened.
fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936
    })
}

fn changed(mut json: Value, changes: Value) -> Value {
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    json
}

#[test]
fn configurations_of_qwen_are_read() {
    let config = parse(&qwen3()).unwrap();
    assert_eq!((config.head_dim, config.query_size(), config.key_value_size()), (128, 2048, 1024));
    assert_eq!((config.qk_norm, config.qkv_bias, config.output_bias, config.mlp_bias), (true, false, false, false));
    assert_eq!((config.rope.theta, config.sliding_window, config.tie_word_embeddings), (1e6, None, true));
    let biased = parse(&changed(qwen3(), json!({"attention_bias": true}))).unwrap();
    assert_eq!((biased.qkv_bias, biased.output_bias), (true, true));
    let config = parse(&qwen2()).unwrap();
    assert_eq!((config.head_dim, config.num_key_value_heads, config.sliding_window), (64, 2, None));
    assert_eq!((config.qk_norm, config.qkv_bias, config.output_bias, config.mlp_bias), (false, true, false, false));
    let ignored = parse(&changed(qwen2(), json!({"attention_bias": false, "mlp_bias": true}))).unwrap();
    assert_eq!(ignored, config, "the reference has no such keys");
}

#[test]
fn what_qwen_leaves_out_means_what_it_means_to_the_reference() {
    let without = |mut json: Value, key: &str| {
        json.as_object_mut().unwrap().shift_remove(key).unwrap();
        json
    };
    assert_eq!(parse(&changed(without(qwen3(), "head_dim"), json!({"hidden_size": 512}))).unwrap().head_dim, 128);
    let many_heads = changed(qwen2(), json!({"num_attention_heads": 64, "hidden_size": 1024}));
    assert_eq!(parse(&without(many_heads, "num_key_value_heads")).unwrap().num_key_value_heads, 32);
    assert_eq!(parse(&changed(qwen2(), json!({"num_key_value_heads": null}))).unwrap().num_key_value_heads, 14);
}

#[test]
fn a_window_of_qwen_is_in_all_layers_or_in_none() {
    let window = |changes: Value| parse(&changed(qwen2(), changes)).map(|config| config.sliding_window);
    let on = |changes: Value| window(changed(changes, json!({"use_sliding_window": true})));
    assert_eq!(window(json!({"max_window_layers": 0})), Ok(None), "not in use");
    assert_eq!(on(json!({"max_window_layers": 24})), Ok(None), "it would begin behind the last layer");
    assert_eq!(on(json!({"max_window_layers": 0, "sliding_window": 64})), Ok(Some(64)));
    assert_eq!(on(json!({"max_window_layers": 0, "sliding_window": null})), Ok(None));
    let some = changed(qwen2(), json!({"use_sliding_window": true, "max_window_layers": 21}));
    assert_eq!(unsupported_key(some), "max_window_layers");
    let types = |ty: &str| json!({"layer_types": vec![ty; 24]});
    assert_eq!(on(types("full_attention")), Ok(None), "the list decides");
    assert_eq!(on(types("sliding_attention")), Ok(Some(32768)));
    assert_eq!(window(types("sliding_attention")), Ok(None));
    let unknown = changed(qwen2(), changed(types("chunked_attention"), json!({"use_sliding_window": true})));
    assert_eq!(unsupported_key(unknown), "layer_types");
}

#[test]
fn rotary_scaling_is_read_in_both_spellings() {
    let llama3 = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"
    });
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(parse(&with(json!({"rope_scaling": llama3}))).unwrap().rope.scaling, expected);
    let mut newer = llama3.clone();
    newer["rope_theta"] = json!(500_000.0);
    let rope = parse(&with(json!({"rope_parameters": newer}))).unwrap().rope;
    assert_eq!(rope, RopeConfig { theta: 500_000.0, scaling: expected });
    let linear = parse(&with(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}))).unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    let unscaled = parse(&with(json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}))).unwrap();
    assert_eq!(unscaled.rope, RopeConfig { theta: 1e6, scaling: RopeScaling::None });
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    assert_eq!(
        parse(&with(json!({"architectures": ["Qwen2MoeForCausalLM"]}))),
        Err(ModelConfigError::Architecture("Qwen2MoeForCausalLM".to_owned()))
    );
    assert_eq!(unsupported_key(with(json!({"quantization_config": {"quant_method": "gptq"}}))), "quantization_config");
    assert_eq!(unsupported_key(with(json!({"hidden_act": "relu"}))), "hidden_act");
    assert_eq!(unsupported_key(with(json!({"num_local_experts": 8}))), "num_local_experts");
    let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}});
    assert_eq!(unsupported_key(with(yarn.clone())), "rope_scaling.rope_type");
    let message = parse(&changed(qwen3(), yarn)).unwrap_err().to_string();
    assert_eq!(message, "rope_scaling.rope_type = yarn is not supported (default, linear and llama3 are)");
    let partial = json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}});
    assert_eq!(unsupported_key(with(partial)), "rope_parameters.partial_rotary_factor");
    let layered = json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}});
    assert_eq!(unsupported_key(with(layered)), "rope_parameters.…");
    assert_eq!(unsupported_key(with(json!({"layer_types": ["full_attention", "sliding_attention"]}))), "layer_types");
}

#[test]
fn numbers_that_make_no_model_are_refused() {
    for (key, value) in [
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(7)),
        ("num_key_value_heads", json!(2)),
        ("num_key_value_heads", json!(18)),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_size", json!("576")),
        ("hidden_size", json!(-1)),
        ("head_dim", json!(63)),
        ("rms_norm_eps", json!(0.0)),
        ("rope_theta", json!(0.0)),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 0.0})),
        ("rope_scaling", json!({"rope_type": "linear"})),
        ("rope_scaling", json!([])),
        ("vocab_size", json!(0)),
    ] {
        let found = parse(&with(json!({key: value})));
        assert!(found.is_err(), "{key} = {value} was accepted");
    }
    assert!(parse(&json!([])).is_err());
}

#[test]
fn end_of_sequence_ids_come_from_the_generation_configuration_first() {
    let ids = |generation: Option<Value>| eos_token_ids(&smollm2(), generation.as_ref());
    assert_eq!(ids(None).unwrap(), [2]);
    assert_eq!(ids(Some(json!({"eos_token_id": [7, 9]}))).unwrap(), [7, 9]);
    assert_eq!(ids(Some(json!({"eos_token_id": 5}))).unwrap(), [5]);
    assert_eq!(ids(Some(json!({"temperature": 0.5}))).unwrap(), [2]);
    assert!(ids(Some(json!({"eos_token_id": "x"}))).is_err());
    assert!(eos_token_ids(&json!({}), None).unwrap().is_empty());
}
