//! Reads the tensors of a model once, in a fixed order, and hashes their content for the fingerprint.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;

use super::config::ModelConfig;
use super::expected::expected_tensors;
use super::load::LoadError;
use super::weights::{RawTensor, TensorSource};

pub(super) const EMBEDDINGS: &str = "model.embed_tokens.weight";
pub(super) const FINAL_NORM: &str = "model.norm.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// The names of one layer: of norms whole, of projections without `.weight` and `.bias`.
pub(super) struct LayerNames {
    pub input_norm: String,
    pub qkv: [String; 3],
    pub query_norm: String,
    pub key_norm: String,
    pub output: [String; 1],
    pub post_attention_norm: String,
    pub gate_up: [String; 2],
    pub down: [String; 1],
}

impl LayerNames {
    pub fn new(layer: usize) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Self {
            input_norm: name("input_layernorm.weight"),
            qkv: ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj"))),
            query_norm: name("self_attn.q_norm.weight"),
            key_norm: name("self_attn.k_norm.weight"),
            output: [name("self_attn.o_proj")],
            post_attention_norm: name("post_attention_layernorm.weight"),
            gate_up: ["gate", "up"].map(|part| name(&format!("mlp.{part}_proj"))),
            down: [name("mlp.down_proj")],
        }
    }
}

/// Bytes to read ahead. Enough for several files at once.
const READ_AHEAD: u64 = 2 << 30;

pub(super) struct TensorReader<'a> {
    tensors: &'a dyn TensorSource,
    /// In about the order in which they are read: those not yet asked for.
    ahead: std::vec::IntoIter<String>,
    bytes_ahead: u64,
    progress: &'a dyn Fn(u64),
    bytes: u64,
    digest: Sha256,
}

impl<'a> TensorReader<'a> {
    /// `progress` is told the bytes read so far.
    pub fn new(config: &ModelConfig, tensors: &'a dyn TensorSource, progress: &'a dyn Fn(u64)) -> Self {
        let names: Vec<String> = expected_tensors(config).into_iter().map(|(name, _)| name).collect();
        Self { tensors, ahead: names.into_iter(), bytes_ahead: 0, progress, bytes: 0, digest: Sha256::new() }
    }

    /// Keeps the disk busy while the bytes already read are hashed, converted and copied.
    fn read_ahead(&mut self) {
        while self.bytes_ahead < self.bytes + READ_AHEAD
            && let Some(name) = self.ahead.next()
        {
            self.bytes_ahead += self.tensors.read_ahead(&name) as u64;
        }
    }

    pub fn read(&mut self, name: &str) -> Result<RawTensor<'a>, LoadError> {
        self.read_ahead();
        let tensor = self.tensors.tensor(name)?;
        self.digest.update(name);
        self.digest.update(tensor.ty.name());
        self.digest.update(xxh3_128(&tensor.data).to_le_bytes());
        self.bytes += tensor.data.len() as u64;
        (self.progress)(self.bytes);
        Ok(tensor)
    }

    /// The biases of several projections, one after another.
    pub fn biases(&mut self, names: &[String]) -> Result<Vec<f32>, LoadError> {
        let parts = names.iter().map(|name| self.vector(&format!("{name}.bias")));
        Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
    }

    pub fn vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        self.read(name)?.dequantize()
    }

    /// Of the names, types and content of all that was read.
    pub fn finish(self) -> String {
        hex(&self.digest.finalize())
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
