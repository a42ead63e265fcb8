//! The tensors that a configuration calls for, by Hugging Face's names.

use super::config::ModelConfig;

/// Names and shapes (`[out, in]`) of every tensor of the model, in the order of the computation.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden])];
    for layer in 0..config.num_hidden_layers {
        tensors.extend(layer_tensors(config, layer));
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]));
    }
    tensors
}

fn layer_tensors(config: &ModelConfig, layer: usize) -> Vec<(String, Vec<usize>)> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (query, key_value) = (config.query_size(), config.key_value_size());
    let projections = [
        ("self_attn.q_proj", query, hidden, config.qkv_bias),
        ("self_attn.k_proj", key_value, hidden, config.qkv_bias),
        ("self_attn.v_proj", key_value, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, query, config.output_bias),
        ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
    ];
    let named = |name: &str, kind: &str| format!("model.layers.{layer}.{name}.{kind}");
    let mut tensors = vec![
        (named("input_layernorm", "weight"), vec![hidden]),
        (named("post_attention_layernorm", "weight"), vec![hidden]),
    ];
    if config.qk_norm {
        tensors.push((named("self_attn.q_norm", "weight"), vec![config.head_dim]));
        tensors.push((named("self_attn.k_norm", "weight"), vec![config.head_dim]));
    }
    for (name, outputs, inputs, has_bias) in projections {
        tensors.push((named(name, "weight"), vec![outputs, inputs]));
        if has_bias {
            tensors.push((named(name, "bias"), vec![outputs]));
        }
    }
    tensors
}
