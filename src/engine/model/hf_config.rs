//! Reads Hugging Face's `config.json` and `generation_config.json`. Defaults are those of the reference's configuration
//! classes, so that a key left out means the same here.

use serde_json::{Map, Value};

use super::config::{Activation, Architecture, ModelConfig, ModelConfigError, RopeConfig, RopeScaling};

/// The window of `MistralConfig` when the key is absent; `null` means none.
const MISTRAL_DEFAULT_WINDOW: usize = 4096;
/// The heads of `MistralConfig` when the key is absent; `null` means as many as query heads.
const MISTRAL_DEFAULT_KV_HEADS: usize = 8;
/// The heads of `Qwen2Config` and `Qwen3Config` when the key is absent; `null` means as many as query heads.
const QWEN_DEFAULT_KV_HEADS: usize = 32;
/// The head size of `Qwen3Config` when the key is absent.
const QWEN3_DEFAULT_HEAD_DIM: usize = 128;
/// The window of `Qwen2Config` and `Qwen3Config` when the key is absent; it counts only with `use_sliding_window`.
const QWEN_DEFAULT_WINDOW: usize = 4096;
/// The first layer with a window, of `Qwen2Config` and `Qwen3Config`, when the key is absent.
const QWEN_DEFAULT_MAX_WINDOW_LAYERS: usize = 28;

#[derive(Clone, Copy, PartialEq)]
enum HfFamily {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// Parses the content of a `config.json`.
pub(super) fn parse(json: &Value) -> Result<ModelConfig, ModelConfigError> {
    let fields = Fields::of(json, "")?;
    let family = family(&fields)?;
    refuse_unsupported(&fields)?;
    let hidden_size = fields.usize("hidden_size")?;
    let num_attention_heads = fields.usize("num_attention_heads")?;
    let head_dim = match fields.optional_usize("head_dim")? {
        Some(head_dim) => head_dim,
        None if family == HfFamily::Qwen3 => QWEN3_DEFAULT_HEAD_DIM,
        None => default_head_dim(hidden_size, num_attention_heads)?,
    };
    let num_hidden_layers = fields.usize("num_hidden_layers")?;
    let biases = biases(&fields, family)?;
    let config = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: fields.usize("vocab_size")?,
        hidden_size,
        intermediate_size: fields.usize("intermediate_size")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: num_key_value_heads(&fields, family)?.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: fields.optional_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope: rope(&fields)?,
        max_position_embeddings: fields.usize("max_position_embeddings")?,
        tie_word_embeddings: fields.optional_bool("tie_word_embeddings")?.unwrap_or(false),
        sliding_window: sliding_window(&fields, family, num_hidden_layers)?,
        qkv_bias: biases.qkv,
        output_bias: biases.output,
        qk_norm: family == HfFamily::Qwen3,
        mlp_bias: biases.mlp,
        hidden_act: activation(fields.optional_str("hidden_act")?.unwrap_or("silu"))?,
    };
    config.validated()
}

/// End-of-sequence ids: those of `generation_config.json` where it names any, else those of `config.json`.
pub(super) fn eos_token_ids(config: &Value, generation_config: Option<&Value>) -> Result<Vec<u32>, ModelConfigError> {
    let named = generation_config.and_then(|json| json.get("eos_token_id")).filter(|ids| !ids.is_null());
    let Some(ids) = named.or_else(|| config.get("eos_token_id").filter(|ids| !ids.is_null())) else {
        return Ok(Vec::new());
    };
    let one = |id: &Value| {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong_type("eos_token_id", "a token id or a list of them", ids))
    };
    match ids {
        Value::Array(ids) => ids.iter().map(one).collect(),
        id => Ok(vec![one(id)?]),
    }
}

pub(super) fn default_head_dim(hidden_size: usize, heads: usize) -> Result<usize, ModelConfigError> {
    match heads > 0 && hidden_size.is_multiple_of(heads) {
        true => Ok(hidden_size / heads),
        false => Err(ModelConfigError::Inconsistent(format!(
            "hidden_size ({hidden_size}) is no multiple of num_attention_heads ({heads}), and head_dim is not given"
        ))),
    }
}

fn family(fields: &Fields<'_>) -> Result<HfFamily, ModelConfigError> {
    let named = match fields.get("architectures") {
        Some(Value::Array(names)) => names.first().and_then(Value::as_str),
        _ => None,
    };
    match named.or(fields.optional_str("model_type")?) {
        Some("LlamaForCausalLM" | "llama") => Ok(HfFamily::Llama),
        Some("MistralForCausalLM" | "mistral") => Ok(HfFamily::Mistral),
        Some("Qwen2ForCausalLM" | "qwen2") => Ok(HfFamily::Qwen2),
        Some("Qwen3ForCausalLM" | "qwen3") => Ok(HfFamily::Qwen3),
        Some(other) => Err(ModelConfigError::Architecture(other.to_owned())),
        None => Err(ModelConfigError::Missing("architectures".to_owned())),
    }
}

fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ModelConfigError> {
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        let hint = Some("quantized safetensors are not read; use the model's plain weights or a GGUF file");
        return Err(ModelConfigError::Unsupported { key: "quantization_config".to_owned(), value: method, hint });
    }
    for key in ["num_local_experts", "num_experts"] {
        if let Some(experts) = fields.optional_usize(key)?.filter(|experts| *experts > 0) {
            return Err(ModelConfigError::unsupported(key, experts));
        }
    }
    if let Some(types) = fields.get("layer_types").and_then(Value::as_array)
        && types.windows(2).any(|pair| pair[0] != pair[1])
    {
        return Err(ModelConfigError::unsupported("layer_types", "a mixture of layer types"));
    }
    Ok(())
}

/// `None` means as many as query heads.
fn num_key_value_heads(fields: &Fields<'_>, family: HfFamily) -> Result<Option<usize>, ModelConfigError> {
    const KEY: &str = "num_key_value_heads";
    match family {
        HfFamily::Mistral if fields.is_absent(KEY) => Ok(Some(MISTRAL_DEFAULT_KV_HEADS)),
        HfFamily::Qwen2 | HfFamily::Qwen3 if fields.is_absent(KEY) => Ok(Some(QWEN_DEFAULT_KV_HEADS)),
        _ => fields.optional_usize(KEY),
    }
}

/// Which projections have biases.
struct Biases {
    qkv: bool,
    output: bool,
    mlp: bool,
}

/// Qwen 2 has the biases of q, k and v and no others, whatever its configuration says; neither generation has biases in
/// its MLP.
fn biases(fields: &Fields<'_>, family: HfFamily) -> Result<Biases, ModelConfigError> {
    let attention = fields.optional_bool("attention_bias")?.unwrap_or(false);
    let mlp = fields.optional_bool("mlp_bias")?.unwrap_or(false);
    Ok(match family {
        HfFamily::Qwen2 => Biases { qkv: true, output: false, mlp: false },
        HfFamily::Qwen3 => Biases { qkv: attention, output: attention, mlp: false },
        HfFamily::Llama | HfFamily::Mistral => Biases { qkv: attention, output: attention, mlp },
    })
}

fn sliding_window(fields: &Fields<'_>, family: HfFamily, num_layers: usize) -> Result<Option<usize>, ModelConfigError> {
    match family {
        HfFamily::Llama => Ok(None),
        HfFamily::Mistral if fields.is_absent("sliding_window") => Ok(Some(MISTRAL_DEFAULT_WINDOW)),
        HfFamily::Mistral => fields.optional_usize("sliding_window"),
        HfFamily::Qwen2 | HfFamily::Qwen3 => qwen_sliding_window(fields, num_layers),
    }
}

/// Off unless `use_sliding_window` says so; then the layers from `max_window_layers` on have it, or those that
/// `layer_types` names. All layers or none is what we compute.
fn qwen_sliding_window(fields: &Fields<'_>, num_layers: usize) -> Result<Option<usize>, ModelConfigError> {
    let window = match fields.is_absent("sliding_window") {
        true => Some(QWEN_DEFAULT_WINDOW),
        false => fields.optional_usize("sliding_window")?,
    };
    let in_use = fields.optional_bool("use_sliding_window")?.unwrap_or(false);
    let Some(window) = window.filter(|_| in_use) else { return Ok(None) };
    // `refuse_unsupported` has seen that they are all of one type.
    if let Some(ty) = fields.get("layer_types").and_then(Value::as_array).and_then(|types| types.first()) {
        return match ty.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(Some(window)),
            _ => Err(ModelConfigError::unsupported("layer_types", ty)),
        };
    }
    let first = fields.optional_usize("max_window_layers")?.unwrap_or(QWEN_DEFAULT_MAX_WINDOW_LAYERS);
    match first {
        0 => Ok(Some(window)),
        _ if first >= num_layers => Ok(None),
        _ => Err(ModelConfigError::Unsupported {
            key: "max_window_layers".to_owned(),
            value: first.to_string(),
            hint: Some("with use_sliding_window, a window in all layers or in none is"),
        }),
    }
}

fn activation(name: &str) -> Result<Activation, ModelConfigError> {
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        other => Err(ModelConfigError::unsupported("hidden_act", other)),
    }
}

/// The rotary positions: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before.
fn rope(fields: &Fields<'_>) -> Result<RopeConfig, ModelConfigError> {
    let section = match fields.get("rope_parameters") {
        Some(parameters) => Some(Fields::of(parameters, "rope_parameters.")?),
        None => fields.get("rope_scaling").map(|scaling| Fields::of(scaling, "rope_scaling.")).transpose()?,
    };
    let theta = match section.as_ref().map(|section| section.optional_f64("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => fields.optional_f64("rope_theta")?.unwrap_or(10_000.0),
    };
    for fields in section.iter().chain([fields]) {
        if let Some(factor) = fields.optional_f64("partial_rotary_factor")?.filter(|factor| *factor != 1.0) {
            return Err(ModelConfigError::unsupported(fields.key("partial_rotary_factor"), factor));
        }
    }
    let scaling = section.as_ref().map_or(Ok(RopeScaling::None), rope_scaling)?;
    Ok(RopeConfig { theta, scaling })
}

fn rope_scaling(section: &Fields<'_>) -> Result<RopeScaling, ModelConfigError> {
    if section.map.values().any(Value::is_object) {
        return Err(ModelConfigError::unsupported(section.key("…"), "different rotary positions for different layers"));
    }
    let named = section.optional_str("rope_type")?.or(section.optional_str("type")?);
    match named {
        Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: section.f64("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: section.f64("factor")?,
            low_freq_factor: section.f64("low_freq_factor")?,
            high_freq_factor: section.f64("high_freq_factor")?,
            original_max_position_embeddings: section.usize("original_max_position_embeddings")?,
        }),
        Some(other) => Err(ModelConfigError::Unsupported {
            key: section.key("rope_type"),
            value: other.to_owned(),
            hint: Some("default, linear and llama3 are"),
        }),
        // Only the theta, which transformers 5 writes for unscaled models.
        None if section.is_absent("factor") => Ok(RopeScaling::None),
        None => Err(ModelConfigError::Missing(section.key("rope_type"))),
    }
}

/// A JSON object whose values are asked for by key; `null` counts as not given.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Stands in front of keys in errors.
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    fn of(json: &'a Value, prefix: &'static str) -> Result<Self, ModelConfigError> {
        let named = if prefix.is_empty() { "config.json" } else { prefix.trim_end_matches('.') };
        let map = json.as_object().ok_or_else(|| wrong_type(named, "an object", json))?;
        Ok(Self { map, prefix })
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn is_absent(&self, key: &str) -> bool {
        !self.map.contains_key(key)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
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

    fn optional_bool(&self, key: &str) -> Result<Option<bool>, ModelConfigError> {
        self.optional(key, "true or false", Value::as_bool)
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
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    ModelConfigError::WrongType { key: key.to_owned(), expected, found }
}

#[cfg(test)]
#[path = "hf_config_tests.rs"]
mod tests;
