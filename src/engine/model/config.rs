//! A model's configuration as the decoder needs it, whatever file it came from.
//!
//! A configuration that asks for something that is not computed is refused by name, instead of being served wrongly.

use serde::Serialize;

/// Bounds that no real model reaches; they keep products of a crafted configuration from overflowing.
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 14;
const MAX_WIDTH: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 30;

#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ModelConfigError {
    #[error(
        "architecture {0:?} is not supported (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM \
         are; in GGUF files, llama, qwen2 and qwen3)"
    )]
    Architecture(String),
    #[error("{0} is missing")]
    Missing(String),
    #[error("{key} should be {expected}, not {found}")]
    WrongType { key: String, expected: &'static str, found: String },
    #[error("{key} = {value} is not supported{}", hint.map(|hint| format!(" ({hint})")).unwrap_or_default())]
    Unsupported { key: String, value: String, hint: Option<&'static str> },
    #[error("{key} is {value}, which is outside of {min}..={max}")]
    OutOfRange { key: &'static str, value: usize, min: usize, max: usize },
    #[error("{0}")]
    Inconsistent(String),
}

impl ModelConfigError {
    pub(super) fn unsupported(key: impl Into<String>, value: impl ToString) -> Self {
        ModelConfigError::Unsupported { key: key.into(), value: value.to_string(), hint: None }
    }
}

/// The data flow of the decoder. Families that share one differ in their configuration only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Pre-norm decoder with grouped-query attention, rotary positions and a gated MLP: Llama 2 and 3, SmolLM2, Mistral,
    /// Qwen 2, 2.5 and 3.
    Llama,
}

/// Everything that decides the shape of the computation. Serialized, it is part of the fingerprint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Even. Heads times this need not equal `hidden_size`.
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeConfig,
    pub max_position_embeddings: usize,
    /// The output projection is `model.embed_tokens.weight`.
    pub tie_word_embeddings: bool,
    /// A token attends to this many positions, itself included.
    pub sliding_window: Option<usize>,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on the output projection of attention.
    pub output_bias: bool,
    /// Each head of queries and keys goes through an RMSNorm of its own, with weights of `[head_dim]` that the heads of a
    /// layer share, before it is rotated.
    pub qk_norm: bool,
    /// Biases on the gate, up and down projections.
    pub mlp_bias: bool,
    pub hidden_act: Activation,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RopeConfig {
    /// Base of the geometric sequence of wavelengths.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How the inverse frequencies `theta^(-2i/head_dim)` are changed for contexts longer than those of pre-training.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    None,
    /// All divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// Each divided by its own factor, `head_dim / 2` of them, as GGUF stores them.
    Factors(Vec<f32>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Silu,
    /// With the error function.
    Gelu,
    /// With the tanh approximation.
    GeluTanh,
}

impl ModelConfig {
    /// The same text for the same model, whatever file and spelling it came from.
    pub fn canonical_json(&self) -> String {
        serde_json::to_string(self).expect("a struct of numbers, strings and vectors serializes")
    }

    /// Width of the query projection.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the key and of the value projection.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Radians a position for each pair of a head, with the configuration's scaling for long contexts.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let dim = self.head_dim;
        let plain = (0..dim / 2).map(|pair| libm::pow(self.rope.theta, -2.0 * pair as f64 / dim as f64));
        match &self.rope.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            RopeScaling::Factors(factors) => {
                plain.zip(factors).map(|(frequency, factor)| frequency / f64::from(*factor)).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let context = *original_max_position_embeddings as f64;
                let blend = |frequency: f64| {
                    let turns = context * frequency / std::f64::consts::TAU;
                    if turns < *low_freq_factor {
                        frequency / factor
                    } else if turns > *high_freq_factor {
                        frequency
                    } else {
                        let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - keep) * frequency / factor + keep * frequency
                    }
                };
                plain.map(blend).collect()
            }
        }
    }

    /// Checks what the decoder relies on. Both parsers end with it.
    pub(super) fn validated(self) -> Result<Self, ModelConfigError> {
        let within = |key, value, min, max| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(ModelConfigError::OutOfRange { key, value, min, max })
            }
        };
        within("vocab_size", self.vocab_size, 1, MAX_WIDTH)?;
        within("hidden_size", self.hidden_size, 1, MAX_WIDTH)?;
        within("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)?;
        within("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)?;
        within("num_attention_heads", self.num_attention_heads, 1, MAX_HEADS)?;
        within("num_key_value_heads", self.num_key_value_heads, 1, self.num_attention_heads)?;
        within("head_dim", self.head_dim, 2, MAX_HEADS)?;
        within("max_position_embeddings", self.max_position_embeddings, 1, MAX_POSITIONS)?;
        if let Some(window) = self.sliding_window {
            within("sliding_window", window, 1, MAX_POSITIONS)?;
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
            return inconsistent(format!("num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv})"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return inconsistent(format!("head_dim ({}) is odd, and rotary positions need pairs", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return inconsistent(format!("rms_norm_eps ({}) is not between 0 and 1", self.rms_norm_eps));
        }
        self.rope.validate(self.head_dim)?;
        Ok(self)
    }
}

impl RopeConfig {
    fn validate(&self, head_dim: usize) -> Result<(), ModelConfigError> {
        let positive = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => inconsistent(format!("{name} of the rotary positions is {value}, not a positive number")),
        };
        positive("theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("original_max_position_embeddings", *original_max_position_embeddings as f64)?;
                match high_freq_factor > low_freq_factor && high_freq_factor.is_finite() {
                    true => Ok(()),
                    false => inconsistent("high_freq_factor is not greater than low_freq_factor".to_owned()),
                }
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != head_dim / 2 {
                    return inconsistent(format!("{} rotary factors for {} pairs", factors.len(), head_dim / 2));
                }
                factors.iter().try_for_each(|factor| positive("factor", (*factor).into()))
            }
        }
    }
}

fn inconsistent<T>(message: String) -> Result<T, ModelConfigError> {
    Err(ModelConfigError::Inconsistent(message))
}
