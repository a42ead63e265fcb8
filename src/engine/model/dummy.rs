//! Random weights for a configuration, to measure without a download. The same on every machine, tensor by tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::config::ModelConfig;
use super::expected::expected_tensors;
use super::load::LoadError;
use super::weights::{RawTensor, TensorSource, TensorType};

/// Values after which random ones repeat. A prime: the rows of a matrix begin at as many places before one recurs.
const PERIOD: usize = (1 << 20) + 7;

/// Projections keep the variance of their input: uniform in ±sqrt(3 / inputs). Norms are one and biases are zero, so
/// that activations stay in the range of a trained model's and neither overflow nor denormals distort a measurement.
///
/// Projections of as many inputs are parts of one periodic stream, each from a place of its own. So the 16 GB of a model of
/// 8B parameters are read out of little more than its largest matrix, without being made first.
pub(super) struct DummySource {
    ty: TensorType,
    shapes: BTreeMap<String, Vec<usize>>,
    /// By the number of inputs.
    streams: BTreeMap<usize, Stream>,
}

impl DummySource {
    /// `ty` is a dense type.
    pub fn new(config: &ModelConfig, ty: TensorType) -> Self {
        Self::of_shapes(expected_tensors(config).into_iter().collect(), ty)
    }

    fn of_shapes(shapes: BTreeMap<String, Vec<usize>>, ty: TensorType) -> Self {
        assert!(!ty.is_quantized(), "dummy weights are dense");
        let mut streams: BTreeMap<usize, Stream> = BTreeMap::new();
        for shape in shapes.values() {
            if let [outputs, inputs] = shape[..] {
                let stream = streams.entry(inputs).or_insert_with(|| Stream::new(inputs, ty));
                stream.longest = stream.longest.max(outputs * inputs);
            }
        }
        Self { ty, shapes, streams }
    }
}

impl TensorSource for DummySource {
    fn tensor(&self, name: &str) -> Result<RawTensor<'_>, LoadError> {
        let shape = self.shapes.get(name).ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
        let len: usize = shape.iter().product();
        let data = match shape[..] {
            [_, inputs] => Cow::Borrowed(self.streams[&inputs].part(name, len)),
            _ if name.ends_with(".bias") => Cow::Owned(stored(self.ty, std::iter::repeat_n(0.0, len))),
            _ => Cow::Owned(stored(self.ty, std::iter::repeat_n(1.0, len))),
        };
        Ok(RawTensor { ty: self.ty, shape: shape.clone(), data })
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
        self.shapes.values().map(elements).sum::<u64>() * self.ty.block_bytes() as u64
    }
}

/// Random values for projections of `inputs` inputs, made when the first of them is asked for.
struct Stream {
    inputs: usize,
    ty: TensorType,
    /// Values of the longest part.
    longest: usize,
    stored: OnceLock<Vec<u8>>,
}

impl Stream {
    fn new(inputs: usize, ty: TensorType) -> Self {
        Self { inputs, ty, longest: 0, stored: OnceLock::new() }
    }

    /// `len` values from the place of the tensor `name`.
    fn part(&self, name: &str, len: usize) -> &[u8] {
        let start = (fnv1a(name.as_bytes()) % PERIOD as u64) as usize;
        let bytes = self.ty.block_bytes();
        &self.stored.get_or_init(|| self.fill())[start * bytes..(start + len) * bytes]
    }

    /// A period of random values, repeated until the longest part fits behind any place.
    fn fill(&self) -> Vec<u8> {
        let mut state = self.inputs as u64;
        let bound = (3.0 / self.inputs as f32).sqrt();
        // The upper 24 bits are exact in f32: a multiple of 2^-23 in [-1, 1).
        let unit = || (splitmix64(&mut state) >> 40) as f32 * (1.0 / (1 << 23) as f32) - 1.0;
        let period = stored(self.ty, std::iter::repeat_with(unit).map(|unit| unit * bound).take(PERIOD));
        let bytes = (PERIOD + self.longest) * self.ty.block_bytes();
        let mut stored = Vec::with_capacity(bytes);
        while stored.len() < bytes {
            stored.extend_from_slice(&period[..period.len().min(bytes - stored.len())]);
        }
        stored
    }
}

/// Values as a file has them.
fn stored(ty: TensorType, values: impl Iterator<Item = f32>) -> Vec<u8> {
    match ty {
        TensorType::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
        TensorType::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
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
        let (name, rows, cols) = ("large", 600, 4096);
        let shapes = BTreeMap::from([(name.to_owned(), vec![rows, cols]), ("small".to_owned(), vec![2, cols])]);
        let source = DummySource::of_shapes(shapes, TensorType::BF16);
        let tensor = source.tensor(name).unwrap();
        assert_eq!(tensor.data.len(), rows * cols * 2);
        let (first, again) = tensor.data.split_at(PERIOD * 2);
        assert!(again.starts_with(first));
        let rows: std::collections::BTreeSet<&[u8]> = tensor.data.chunks_exact(cols * 2).collect();
        assert_eq!(rows.len(), 600);
        assert_eq!(source.tensor("small").unwrap().data.len(), 2 * cols * 2);
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
