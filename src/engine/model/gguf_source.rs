//! The weights of a GGUF file, under Hugging Face's names.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::config::ModelConfig;
use super::expected::expected_tensors;
use super::gguf_config::Family;
use super::load::LoadError;
use super::weights::{RawTensor, TensorSource, TensorType};
use crate::formats::gguf::Gguf;

/// Tensors that are read with the configuration and are no weights.
const CONFIG_TENSORS: [&str; 1] = ["rope_freqs.weight"];

pub(super) struct GgufSource {
    gguf: Arc<Gguf>,
    tensors: BTreeMap<String, Stored>,
    total_bytes: u64,
}

struct Stored {
    name: String,
    /// Heads whose rows are interleaved for a rotation of neighbours, if any.
    interleaved_heads: Option<usize>,
}

impl GgufSource {
    /// Fails if the file holds a tensor that the model does not use: ignoring it would give wrong numbers.
    pub fn new(gguf: Arc<Gguf>, family: Family, config: &ModelConfig) -> Result<Self, LoadError> {
        let expected: BTreeSet<String> = expected_tensors(config).into_iter().map(|(name, _)| name).collect();
        let mut tensors = BTreeMap::new();
        let mut total_bytes = 0;
        for (name, entry) in gguf.tensors() {
            if CONFIG_TENSORS.contains(&name.as_str()) {
                continue;
            }
            let hf_name = hugging_face_name(name).filter(|name| expected.contains(name));
            let hf_name = hf_name.ok_or_else(|| LoadError::UnexpectedTensor(name.clone()))?;
            let interleaved_heads = if family.interleaves_heads() { heads_of(&hf_name, config) } else { None };
            total_bytes += entry.range.len() as u64;
            tensors.insert(hf_name, Stored { name: name.clone(), interleaved_heads });
        }
        Ok(Self { gguf, tensors, total_bytes })
    }
}

impl TensorSource for GgufSource {
    fn tensor(&self, name: &str) -> Result<RawTensor<'_>, LoadError> {
        let stored = self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
        let entry = &self.gguf.tensors()[&stored.name];
        let data = self.gguf.tensor_data(&stored.name)?;
        let data = match stored.interleaved_heads {
            Some(heads) => Cow::Owned(halves_from_neighbours(data, entry.shape[0], heads)),
            None => Cow::Borrowed(data),
        };
        Ok(RawTensor { ty: entry.ty, shape: entry.shape.clone(), data })
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        let stored = self.tensors.get(name)?;
        Some(&self.gguf.tensors()[&stored.name].shape)
    }

    fn stored_type(&self, name: &str) -> Option<TensorType> {
        let stored = self.tensors.get(name)?;
        Some(self.gguf.tensors()[&stored.name].ty)
    }

    fn read_ahead(&self, name: &str) -> usize {
        self.tensors.get(name).map_or(0, |stored| self.gguf.read_ahead(&stored.name))
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

/// Heads that the rows of a tensor of q or k are made of.
fn heads_of(name: &str, config: &ModelConfig) -> Option<usize> {
    let (rest, _) = name.rsplit_once('.')?;
    match rest.rsplit('.').next()? {
        "q_proj" => Some(config.num_attention_heads),
        "k_proj" => Some(config.num_key_value_heads),
        _ => None,
    }
}

/// Row `2i + half` of each head moves to row `half * head_dim / 2 + i`, where a rotation turns rows half a head apart.
/// Shapes were checked against the configuration, so heads divide the rows evenly.
pub(super) fn halves_from_neighbours(data: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let row_bytes = data.len() / rows;
    let head_dim = rows / heads;
    let mut reordered = Vec::with_capacity(data.len());
    for head in data.chunks_exact(head_dim * row_bytes) {
        for half in 0..2 {
            for pair in head.chunks_exact(2 * row_bytes) {
                reordered.extend_from_slice(&pair[half * row_bytes..(half + 1) * row_bytes]);
            }
        }
    }
    reordered
}

/// The name of a tensor in Hugging Face's spelling; `None` for one that has none in any of the architectures.
fn hugging_face_name(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let stem = match stem {
        "token_embd" => "model.embed_tokens".to_owned(),
        "output_norm" => "model.norm".to_owned(),
        "output" => "lm_head".to_owned(),
        _ => {
            let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            let part = match part {
                "attn_norm" => "input_layernorm",
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_q_norm" => "self_attn.q_norm",
                "attn_k_norm" => "self_attn.k_norm",
                "attn_output" => "self_attn.o_proj",
                "ffn_norm" => "post_attention_layernorm",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                _ => return None,
            };
            format!("model.layers.{layer}.{part}")
        }
    };
    Some(format!("{stem}.{kind}"))
}
