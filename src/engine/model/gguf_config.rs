//! Reads a model's configuration from GGUF metadata and the tensors that are present.

use std::collections::BTreeMap;

use super::config::{Activation, Architecture, ModelConfig, ModelConfigError, RopeConfig, RopeScaling};
use super::hf_config::default_head_dim;
use crate::formats::gguf::{Gguf, GgufTensor, Value};

/// Keys under the architecture's prefix that change the numbers in ways we do not compute.
const UNSUPPORTED_KEYS: [&str; 7] = [
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
];
/// The architectures whose data flow is ours, as `general.architecture` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Qwen2,
    Qwen3,
}

impl Family {
    pub fn of(metadata: &BTreeMap<String, Value>) -> Result<Self, ModelConfigError> {
        const KEY: &str = "general.architecture";
        let value = metadata.get(KEY).ok_or_else(|| ModelConfigError::Missing(KEY.to_owned()))?;
        match value.as_str().ok_or_else(|| wrong_type(KEY, "a string", value))? {
            "llama" => Ok(Family::Llama),
            "qwen2" => Ok(Family::Qwen2),
            "qwen3" => Ok(Family::Qwen3),
            other => Err(ModelConfigError::Architecture(other.to_owned())),
        }
    }

    /// What stands in front of the architecture's own keys.
    fn prefix(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// Whether converters interleave the rows of q and k for a rotation of neighbours; the others' stand as in Hugging
    /// Face's files.
    pub fn interleaves_heads(self) -> bool {
        self == Family::Llama
    }
}

pub(super) fn parse(gguf: &Gguf, family: Family) -> Result<ModelConfig, ModelConfigError> {
    let keys = Keys { family, metadata: gguf.metadata() };
    refuse_unsupported(&keys)?;
    let hidden_size = keys.usize("embedding_length")?;
    let num_attention_heads = keys.usize("attention.head_count")?;
    let head_dim = head_dim(&keys, hidden_size, num_attention_heads)?;
    let tensors = gguf.tensors();
    let config = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: vocab_size(tensors)?,
        hidden_size,
        intermediate_size: keys.usize("feed_forward_length")?,
        num_hidden_layers: keys.usize("block_count")?,
        num_attention_heads,
        num_key_value_heads: keys.optional_usize("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: keys.f64("attention.layer_norm_rms_epsilon")? as f32,
        rope: rope(&keys, gguf)?,
        max_position_embeddings: keys.usize("context_length")?,
        tie_word_embeddings: !tensors.contains_key("output.weight"),
        sliding_window: keys.optional_usize("attention.sliding_window")?.filter(|window| *window > 0),
        qkv_bias: has_biases(tensors, &["attn_q", "attn_k", "attn_v"])?,
        output_bias: has_biases(tensors, &["attn_output"])?,
        qk_norm: family == Family::Qwen3,
        mlp_bias: has_biases(tensors, &["ffn_gate", "ffn_up", "ffn_down"])?,
        hidden_act: Activation::Silu,
    };
    config.validated()
}

/// The ids that end a generation: end of sequence, of turn and of message, as far as a key names them. Those that only their
/// text gives away, the tokenizer knows.
pub(super) fn eos_token_ids(metadata: &BTreeMap<String, Value>) -> Result<Vec<u32>, ModelConfigError> {
    /// Converters write it for "none".
    const NONE: u32 = u32::MAX;
    let mut ids = Vec::new();
    for key in ["eos", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        if let Some(value) = metadata.get(&key) {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            ids.push(id.ok_or_else(|| wrong_type(&key, "a token id", value))?);
        }
    }
    ids.retain(|&id| id != NONE);
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), ModelConfigError> {
    if let Some(experts) = keys.optional_usize("expert_count")?.filter(|experts| *experts > 0) {
        return Err(ModelConfigError::unsupported(keys.key("expert_count"), experts));
    }
    // What reads Qwen's files knows no such key, and which layers it would mean is nowhere said.
    if keys.family != Family::Llama
        && let Some(window) = keys.optional_usize("attention.sliding_window")?.filter(|window| *window > 0)
    {
        return Err(ModelConfigError::unsupported(keys.key("attention.sliding_window"), window));
    }
    if let Some(count) = keys.metadata.get("split.count").and_then(Value::as_u64).filter(|count| *count > 1) {
        return Err(ModelConfigError::Unsupported {
            key: "split.count".to_owned(),
            value: count.to_string(),
            hint: Some("join the parts into one file first"),
        });
    }
    match UNSUPPORTED_KEYS.iter().find(|key| keys.get(key).is_some()) {
        Some(key) => Err(ModelConfigError::unsupported(keys.key(key), "a value")),
        None => Ok(()),
    }
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, heads: usize) -> Result<usize, ModelConfigError> {
    let head_dim = match keys.optional_usize("attention.key_length")? {
        Some(length) => length,
        None => default_head_dim(hidden_size, heads)?,
    };
    for (key, what) in [("attention.value_length", "values"), ("rope.dimension_count", "rotated dimensions")] {
        if let Some(length) = keys.optional_usize(key)?.filter(|length| *length != head_dim) {
            let message = format!("{} is {length}: {what} of another length than keys ({head_dim})", keys.key(key));
            return Err(ModelConfigError::Inconsistent(message));
        }
    }
    Ok(head_dim)
}

/// The embedding has a row for every id; `vocab_size` in the metadata is sometimes left out or padded differently.
fn vocab_size(tensors: &BTreeMap<String, GgufTensor>) -> Result<usize, ModelConfigError> {
    let embedding = tensors.get("token_embd.weight").and_then(|tensor| tensor.shape.first());
    embedding.copied().ok_or_else(|| ModelConfigError::Missing("tensor token_embd.weight".to_owned()))
}

/// Whether the projections have biases: all of them in every layer, or none.
fn has_biases(tensors: &BTreeMap<String, GgufTensor>, projections: &[&str]) -> Result<bool, ModelConfigError> {
    let present = |name: &&&str| tensors.contains_key(&format!("blk.0.{name}.bias"));
    match projections.iter().filter(present).count() {
        0 => Ok(false),
        count if count == projections.len() => Ok(true),
        _ => Err(ModelConfigError::Inconsistent(format!("only some of {} have biases", projections.join(", ")))),
    }
}

fn rope(keys: &Keys<'_>, gguf: &Gguf) -> Result<RopeConfig, ModelConfigError> {
    let theta = keys.optional_f64("rope.freq_base")?.unwrap_or(10_000.0);
    let factor = match keys.optional_f64("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.optional_f64("rope.scale_linear")?,
    };
    let linear = match (keys.optional_str("rope.scaling.type")?, factor) {
        (Some("none"), _) | (None | Some("linear"), None) => RopeScaling::None,
        // No change; some converters write it.
        (None | Some("linear"), Some(1.0)) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
        (Some(other), _) => return Err(ModelConfigError::unsupported(keys.key("rope.scaling.type"), other)),
    };
    let scaling = match (rope_factors(gguf)?, linear) {
        (None, linear) => linear,
        (Some(factors), RopeScaling::None) => RopeScaling::Factors(factors),
        (Some(_), _) => {
            let message = "both rope_freqs.weight and a linear scaling of the rotary positions".to_owned();
            return Err(ModelConfigError::Inconsistent(message));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

/// The factors of `rope_freqs.weight`, which is f32.
fn rope_factors(gguf: &Gguf) -> Result<Option<Vec<f32>>, ModelConfigError> {
    let Some(entry) = gguf.tensors().get("rope_freqs.weight") else { return Ok(None) };
    if entry.ty != crate::formats::TensorType::F32 {
        return Err(ModelConfigError::unsupported("rope_freqs.weight of type", entry.ty));
    }
    let bytes =
        gguf.tensor_data("rope_freqs.weight").map_err(|error| ModelConfigError::Inconsistent(error.to_string()))?;
    Ok(Some(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
}

/// Metadata under the prefix of the architecture.
struct Keys<'a> {
    family: Family,
    metadata: &'a BTreeMap<String, Value>,
}

impl<'a> Keys<'a> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.family.prefix())
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&self.key(key))
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong_type(&self.key(key), expected, value))
    }

    fn optional_usize(&self, key: &str) -> Result<Option<usize>, ModelConfigError> {
        self.optional(key, "a count", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
    }

    fn optional_f64(&self, key: &str) -> Result<Option<f64>, ModelConfigError> {
        self.optional(key, "a number", Value::as_f64)
    }

    fn optional_str(&self, key: &str) -> Result<Option<&'a str>, ModelConfigError> {
        self.optional(key, "a string", Value::as_str)
    }

    fn usize(&self, key: &str) -> Result<usize, ModelConfigError> {
        self.optional_usize(key)?.ok_or_else(|| ModelConfigError::Missing(self.key(key)))
    }

    fn f64(&self, key: &str) -> Result<f64, ModelConfigError> {
        self.optional_f64(key)?.ok_or_else(|| ModelConfigError::Missing(self.key(key)))
    }
}

fn wrong_type(key: &str, expected: &'static str, found: &Value) -> ModelConfigError {
    let found = match found {
        Value::U64(value) => value.to_string(),
        Value::I64(value) => value.to_string(),
        Value::F64(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
    };
    ModelConfigError::WrongType { key: key.to_owned(), expected, found }
}
