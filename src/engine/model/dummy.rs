//! Random weights for a configuration, to measure without a download. The same on every machine, tensor by tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;

use half::{bf16, f16};

use super::config::ModelConfig;
use super::expected::expected_tensors;
use super::load::LoadError;
use super::weights::{RawTensor, TensorSource, TensorType};

/// Values after which those of a tensor repeat, so that a large model takes seconds. A prime: no two rows of a matrix begin
/// at the same place, and none equals another, before there are so many.
const PERIOD: usize = (1 << 20) + 7;

/// Projections keep the variance of their input: uniform in ±sqrt(3 / inputs). Norms are one and biases are zero, so
/// that activations stay in the range of a trained model's and neither overflow nor denormals distort a measurement.
pub(super) struct DummySource {
    ty: TensorType,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl DummySource {
    /// `ty` is a dense type.
    pub fn new(config: &ModelConfig, ty: TensorType) -> Self {
        assert!(!ty.is_quantized(), "dummy weights are dense");
        Self { ty, shapes: expected_tensors(config).into_iter().collect() }
    }

    fn element_bytes(&self) -> usize {
        self.ty.block_bytes()
    }

    /// The first `len` values of a tensor, as they are stored.
    fn stored(&self, mut values: Values, len: usize) -> Vec<u8> {
        let values = std::iter::repeat_with(|| values.next()).take(len);
        match self.ty {
            TensorType::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            TensorType::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
            _ => values.flat_map(f32::to_le_bytes).collect(),
        }
    }
}

impl TensorSource for DummySource {
    fn tensor(&self, name: &str) -> Result<RawTensor<'_>, LoadError> {
        let shape = self.shapes.get(name).ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
        let len: usize = shape.iter().product();
        let period = self.stored(Values::new(name, shape), len.min(PERIOD));
        let bytes = len * self.element_bytes();
        let mut data = Vec::with_capacity(bytes);
        while data.len() < bytes {
            data.extend_from_slice(&period[..period.len().min(bytes - data.len())]);
        }
        Ok(RawTensor { ty: self.ty, shape: shape.clone(), data: Cow::Owned(data) })
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.shapes.get(name).map(Vec::as_slice)
    }

    fn stored_type(&self, name: &str) -> Option<TensorType> {
        self.shapes.contains_key(name).then_some(self.ty)
    }

    fn read_ahead(&self, _: &str) -> usize {
        0
    }

    fn total_bytes(&self) -> u64 {
        let elements = |shape: &Vec<usize>| shape.iter().map(|n| *n as u64).product::<u64>();
        self.shapes.values().map(elements).sum::<u64>() * self.element_bytes() as u64
    }
}

/// The values of one tensor: a constant, or a sequence that starts from a hash of the name.
enum Values {
    Constant(f32),
    Random { state: u64, bound: f32 },
}

impl Values {
    fn new(name: &str, shape: &[usize]) -> Self {
        match shape {
            [_, inputs] => Values::Random { state: fnv1a(name.as_bytes()), bound: (3.0 / *inputs as f32).sqrt() },
            _ if name.ends_with(".bias") => Values::Constant(0.0),
            _ => Values::Constant(1.0),
        }
    }

    fn next(&mut self) -> f32 {
        match self {
            Values::Constant(value) => *value,
            Values::Random { state, bound } => {
                // The upper 24 bits are exact in f32: a multiple of 2^-23 in [-1, 1).
                let unit = (splitmix64(state) >> 40) as f32 * (1.0 / (1 << 23) as f32) - 1.0;
                unit * *bound
            }
        }
    }
}

/// Fowler, Noll and Vo's hash, 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Steele, Lea and Flood's generator ("Fast splittable pseudorandom number generators", 2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::hf_config;
    use super::*;

    fn source(ty: TensorType) -> DummySource {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100,
            "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "attention_bias": true
        });
        DummySource::new(&hf_config::parse(&config).unwrap(), ty)
    }

    #[test]
    fn weights_are_the_same_each_time_and_differ_between_tensors() {
        let (first, second) = (source(TensorType::F32), source(TensorType::F32));
        let data = |source: &DummySource, name: &str| source.tensor(name).unwrap().data.into_owned();
        let (up, gate) = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight");
        assert_eq!(data(&first, up), data(&second, up));
        assert_ne!(data(&first, up), data(&first, gate));
        let bytes: usize = first.shapes.keys().map(|name| data(&first, name).len()).sum();
        assert_eq!(bytes as u64, first.total_bytes());
    }

    #[test]
    fn a_large_tensor_repeats_itself_but_no_row_of_it() {
        let mut source = source(TensorType::BF16);
        let (name, rows, cols) = ("model.embed_tokens.weight", 600, 4096);
        source.shapes.insert(name.to_owned(), vec![rows, cols]);
        let tensor = source.tensor(name).unwrap();
        assert_eq!(tensor.data.len(), rows * cols * 2);
        let (first, again) = tensor.data.split_at(PERIOD * 2);
        assert_eq!(first[..again.len().min(first.len())], again[..again.len().min(first.len())]);
        let rows: std::collections::BTreeSet<&[u8]> = tensor.data.chunks_exact(cols * 2).collect();
        assert_eq!(rows.len(), 600);
        let values = tensor.dequantize().unwrap();
        let variance = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
        assert!((variance * cols as f32 - 1.0).abs() < 0.01, "variance {variance}");
    }

    #[test]
    fn projections_keep_the_variance_and_norms_are_one() {
        for ty in [TensorType::F32, TensorType::F16, TensorType::BF16] {
            let values = |name: &str| source(ty).tensor(name).unwrap().dequantize().unwrap();
            let weights = values("model.embed_tokens.weight");
            let count = weights.len() as f32;
            let mean = weights.iter().sum::<f32>() / count;
            let variance = weights.iter().map(|value| value * value).sum::<f32>() / count;
            assert!(mean.abs() < 0.005, "{ty}: mean {mean}");
            assert!((variance * 64.0 - 1.0).abs() < 0.05, "{ty}: variance {variance}");
            assert!(values("model.norm.weight").iter().all(|value| *value == 1.0));
            assert!(values("model.layers.0.self_attn.q_proj.bias").iter().all(|value| *value == 0.0));
        }
    }
}
