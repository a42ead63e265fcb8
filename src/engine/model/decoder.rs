//! The decoder: token ids and a paged KV cache in, logits out.
//!
//! One data flow for all families; the differences between models are data in `ModelConfig`. Knows rows, positions and block
//! tables, but no sequences, scheduler or sampling.

use std::borrow::Cow;
use std::sync::Arc;

use outrigger_kernels::attention::{Attention, AttentionEntry, KvCache, MAX_HEAD_DIM, QueryShape, Slot};
use outrigger_kernels::matrix::{DenseType, Input, Matrix, MatrixSource, PackError, QuantType, Write};
use outrigger_kernels::rows::{
    HeadNorms, QuantizedRows, RopeTable, add_bias, embed, gated_activation, rms_norm, rms_norm_heads,
};
use outrigger_kernels::{Level, NUMERICS_VERSION, Pool, rows};
use sha2::{Digest, Sha256};

use super::config::{Activation, ModelConfig};
use super::load::LoadError;
use super::reader::{EMBEDDINGS, FINAL_NORM, HEAD, LayerNames, TensorReader, hex};
use super::weights::{RawTensor, TensorSource, TensorType, packed_type};
use crate::types::TokenId;

/// Number type of the weights in memory, and so of the arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DType {
    /// As the file has them: dense types are multiplied in f32, quantized ones in eight-bit integers.
    #[default]
    Auto,
    Float32,
    Float16,
    BFloat16,
}

impl DType {
    pub fn name(self) -> &'static str {
        match self {
            DType::Auto => "auto",
            DType::Float32 => "float32",
            DType::Float16 => "float16",
            DType::BFloat16 => "bfloat16",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DecoderError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("cannot pack {name}")]
    Pack { name: String, source: PackError },
    #[error("head_dim {0} is more than the {MAX_HEAD_DIM} that attention supports")]
    HeadDim(usize),
}

struct CpuLayer {
    input_norm: Vec<f32>,
    /// Query, key and value projections, one below the other.
    qkv: CpuProjection,
    /// Of each head of queries and of keys, `[head_dim]`, where the model has such norms.
    head_norms: Option<QueryKeyNorms>,
    output: CpuProjection,
    post_attention_norm: Vec<f32>,
    /// Gate, then up.
    gate_up: CpuProjection,
    down: CpuProjection,
}

struct QueryKeyNorms {
    query: Vec<f32>,
    key: Vec<f32>,
}

struct CpuProjection {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

/// A loaded model.
pub struct Decoder {
    config: ModelConfig,
    pool: Arc<Pool>,
    level: Level,
    embeddings: Matrix,
    layers: Vec<CpuLayer>,
    norm: Vec<f32>,
    /// `None` when tied to the embeddings.
    head: Option<Matrix>,
    rope: RopeTable,
    weights_digest: String,
    scratch: Scratch,
}

/// Activations of one step, kept from step to step.
#[derive(Default)]
struct Scratch {
    hidden: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    queries: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    activated: Vec<f32>,
    quantized: QuantizedRows,
    attention: Attention,
}

/// The tokens of one forward pass.
pub struct Pass<'a> {
    pub tokens: &'a [TokenId],
    pub slots: &'a [Slot],
    pub entries: &'a [AttentionEntry<'a>],
    /// Rows whose logits are wanted, ascending.
    pub output_rows: &'a [usize],
}

impl Decoder {
    /// Packs all weights. `progress` is told the bytes read so far.
    pub fn load(
        config: ModelConfig,
        tensors: &dyn TensorSource,
        dtype: DType,
        positions: usize,
        pool: Arc<Pool>,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DecoderError> {
        if config.head_dim > MAX_HEAD_DIM {
            return Err(DecoderError::HeadDim(config.head_dim));
        }
        let reader = TensorReader::new(&config, tensors, progress);
        let mut loader = Loader { reader, dtype, pool: &pool, config: &config };
        let embeddings = loader.matrix(&[EMBEDDINGS], config.hidden_size)?;
        let layers = (0..config.num_hidden_layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let norm = loader.reader.vector(FINAL_NORM)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.matrix(&[HEAD], config.hidden_size)?),
        };
        let weights_digest = loader.reader.finish();
        let rope = RopeTable::new(&config.inverse_frequencies(), positions);
        let level = Level::detect();
        Ok(Self {
            config,
            pool,
            level,
            embeddings,
            layers,
            norm,
            head,
            rope,
            weights_digest,
            scratch: Scratch::default(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Everything about the weights that decides the numbers: their content, the configuration, the arithmetic.
    pub fn numerics_digest(&self, dtype: DType) -> String {
        let mut digest = Sha256::new();
        digest.update(self.config.canonical_json());
        digest.update(dtype.name());
        digest.update(NUMERICS_VERSION.to_le_bytes());
        digest.update(&self.weights_digest);
        hex(&digest.finalize())
    }

    /// Bytes of all packed weights.
    pub fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        let matrices = layers.map(|projection| &projection.weight).chain([&self.embeddings]).chain(&self.head);
        matrices.map(Matrix::bytes).sum()
    }

    /// Overwrites part of the weights. For tests of the health probes.
    pub fn corrupt(&mut self) {
        for layer in &mut self.layers {
            layer.gate_up.weight.corrupt();
        }
    }

    /// Makes every logit NaN from now on, for drills; what is in the KV cache stays right.
    pub fn spoil(&mut self) {
        self.norm.fill(f32::NAN);
    }

    /// Computes all rows of `pass`, stores their keys and values in `cache`, and writes the logits of the output rows to
    /// `logits`, `[output_rows, vocab_size]`. `progress` is called once a layer.
    pub fn forward(&mut self, pass: &Pass<'_>, cache: &mut KvCache, logits: &mut Vec<f32>, progress: &dyn Fn()) {
        let Self { config, pool, level, scratch, .. } = self;
        let (pool, level) = (&**pool, *level);
        let shape = QueryShape { num_heads: config.num_attention_heads, sliding_window: config.sliding_window };
        resize(&mut scratch.hidden, pass.tokens.len() * config.hidden_size);
        embed(pool, &self.embeddings, pass.tokens, &mut scratch.hidden);
        scratch.attention.plan(pool.threads(), cache, shape, pass.entries);
        for (index, layer) in self.layers.iter().enumerate() {
            let step = Step { config, pool, level, layer, scratch };
            step.attend(index, shape, &self.rope, pass, cache);
            // Behind the last layer's attention only the output rows matter. Rows do not depend on one another there.
            if index + 1 == self.layers.len() {
                keep_rows(&mut scratch.hidden, config.hidden_size, pass.output_rows);
                keep_rows(&mut scratch.attended, config.query_size(), pass.output_rows);
            }
            if !scratch.hidden.is_empty() {
                Step { config, pool, level, layer, scratch }.feed_forward();
            }
            progress();
        }
        resize(logits, pass.output_rows.len() * config.vocab_size);
        if pass.output_rows.is_empty() {
            return;
        }
        resize(&mut scratch.normed, scratch.hidden.len());
        rms_norm(pool, level, &scratch.hidden, &self.norm, config.rms_norm_eps, &mut scratch.normed);
        let head = self.head.as_ref().unwrap_or(&self.embeddings);
        multiply(pool, level, head, &scratch.normed, &mut scratch.quantized, logits, Write::Store);
    }
}

/// One layer's work on the rows in `scratch`.
struct Step<'a> {
    config: &'a ModelConfig,
    pool: &'a Pool,
    level: Level,
    layer: &'a CpuLayer,
    scratch: &'a mut Scratch,
}

impl Step<'_> {
    /// Norm, projections, norms of the heads, rotation, and attention: from `hidden` to `attended`.
    fn attend(self, index: usize, shape: QueryShape, rope: &RopeTable, pass: &Pass<'_>, cache: &mut KvCache) {
        let Self { config, pool, level, layer, scratch } = self;
        let rows = pass.tokens.len();
        resize(&mut scratch.normed, scratch.hidden.len());
        rms_norm(pool, level, &scratch.hidden, &layer.input_norm, config.rms_norm_eps, &mut scratch.normed);
        resize(&mut scratch.qkv, rows * layer.qkv.weight.rows());
        let Scratch { normed, quantized, qkv, queries, attended, attention, .. } = scratch;
        layer.qkv.apply(pool, level, normed, quantized, qkv, Write::Store);
        if let Some(QueryKeyNorms { query, key }) = &layer.head_norms {
            let (num_heads, num_kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
            let norms = HeadNorms { query, key, num_heads, num_kv_heads, epsilon: config.rms_norm_eps };
            rms_norm_heads(pool, level, qkv, norms);
        }
        resize(queries, rows * shape.num_heads * cache.padded_dim());
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        cache.append(pool, index, rope, scale, pass.slots, qkv, queries);
        resize(attended, rows * config.query_size());
        attention.run(pool, level, cache, index, shape, pass.entries, queries, attended);
    }

    /// Output projection and gated feed-forward, both added to `hidden`.
    fn feed_forward(self) {
        let Self { config, pool, level, layer, scratch } = self;
        let Scratch { hidden, normed, attended, gate_up, activated, quantized, .. } = scratch;
        let rows = hidden.len() / config.hidden_size;
        layer.output.apply(pool, level, attended, quantized, hidden, Write::Add);
        resize(normed, hidden.len());
        rms_norm(pool, level, hidden, &layer.post_attention_norm, config.rms_norm_eps, normed);
        resize(gate_up, rows * 2 * config.intermediate_size);
        layer.gate_up.apply(pool, level, normed, quantized, gate_up, Write::Store);
        resize(activated, rows * config.intermediate_size);
        gated_activation(pool, level, config.hidden_act.into(), gate_up, config.intermediate_size, activated);
        layer.down.apply(pool, level, activated, quantized, hidden, Write::Add);
    }
}

impl From<Activation> for rows::Activation {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Silu => rows::Activation::Silu,
            Activation::Gelu => rows::Activation::Gelu,
            Activation::GeluTanh => rows::Activation::GeluTanh,
        }
    }
}

impl CpuProjection {
    fn apply(
        &self,
        pool: &Pool,
        level: Level,
        rows: &[f32],
        quantized: &mut QuantizedRows,
        out: &mut [f32],
        write: Write,
    ) {
        multiply(pool, level, &self.weight, rows, quantized, out, write);
        if let Some(bias) = &self.bias {
            add_bias(out, bias);
        }
    }
}

fn multiply(
    pool: &Pool,
    level: Level,
    weight: &Matrix,
    rows: &[f32],
    quantized: &mut QuantizedRows,
    out: &mut [f32],
    write: Write,
) {
    if weight.wants_quantized() {
        quantized.quantize(pool, level, rows, weight.cols());
    }
    weight.multiply(pool, level, Input { rows, quantized }, out, write);
}

/// Sets the length; the content is written by the next kernel.
fn resize(buffer: &mut Vec<f32>, len: usize) {
    buffer.resize(len, 0.0);
}

/// Moves the rows listed, ascending, to the front and drops the others.
fn keep_rows(buffer: &mut Vec<f32>, width: usize, rows: &[usize]) {
    for (to, &from) in rows.iter().enumerate() {
        buffer.copy_within(from * width..(from + 1) * width, to * width);
    }
    buffer.truncate(rows.len() * width);
}

/// Reads and packs tensors in a fixed order.
struct Loader<'a> {
    reader: TensorReader<'a>,
    dtype: DType,
    pool: &'a Pool,
    config: &'a ModelConfig,
}

impl Loader<'_> {
    fn layer(&mut self, index: usize) -> Result<CpuLayer, DecoderError> {
        let (hidden, intermediate) = (self.config.hidden_size, self.config.intermediate_size);
        let ModelConfig { qkv_bias, output_bias, mlp_bias, .. } = *self.config;
        let names = LayerNames::new(index);
        let query_size = self.config.query_size();
        Ok(CpuLayer {
            input_norm: self.reader.vector(&names.input_norm)?,
            qkv: self.projection(&names.qkv, hidden, qkv_bias)?,
            head_norms: match self.config.qk_norm {
                false => None,
                true => Some(QueryKeyNorms {
                    query: self.reader.vector(&names.query_norm)?,
                    key: self.reader.vector(&names.key_norm)?,
                }),
            },
            output: self.projection(&names.output, query_size, output_bias)?,
            post_attention_norm: self.reader.vector(&names.post_attention_norm)?,
            gate_up: self.projection(&names.gate_up, hidden, mlp_bias)?,
            down: self.projection(&names.down, intermediate, mlp_bias)?,
        })
    }

    fn projection(&mut self, names: &[String], cols: usize, bias: bool) -> Result<CpuProjection, DecoderError> {
        let weights: Vec<String> = names.iter().map(|name| format!("{name}.weight")).collect();
        let weights: Vec<&str> = weights.iter().map(String::as_str).collect();
        let weight = self.matrix(&weights, cols)?;
        let bias = match bias {
            false => None,
            true => Some(self.reader.biases(names)?),
        };
        Ok(CpuProjection { weight, bias })
    }

    fn matrix(&mut self, names: &[&str], cols: usize) -> Result<Matrix, DecoderError> {
        let tensors = names.iter().map(|name| self.reader.read(name)).collect::<Result<Vec<_>, _>>()?;
        let converted = tensors.iter().map(|tensor| convert(tensor, self.dtype)).collect::<Result<Vec<_>, _>>()?;
        let sources: Vec<_> =
            converted.iter().zip(&tensors).map(|(data, tensor)| (data.source(), tensor.shape[0])).collect();
        let packed = Matrix::pack(self.pool, cols, &sources);
        packed.map_err(|source| DecoderError::Pack { name: names.join(", "), source })
    }
}

/// A tensor in the type that it will be multiplied in.
enum Converted<'a> {
    Packed(QuantType, &'a [u8]),
    Dense(DenseType, Cow<'a, [u8]>),
}

impl Converted<'_> {
    fn source(&self) -> MatrixSource<'_> {
        match self {
            Converted::Packed(ty, bytes) => MatrixSource::Quantized(*ty, bytes),
            Converted::Dense(ty, bytes) => MatrixSource::Dense(*ty, bytes),
        }
    }
}

/// Chooses the type: what `dtype` names; for `auto` the stored one, or f16 where the kernels lack it.
fn convert<'a>(tensor: &'a RawTensor<'_>, dtype: DType) -> Result<Converted<'a>, LoadError> {
    let ty = match (dtype, tensor.ty, packed_type(tensor.ty)) {
        (DType::Auto, _, Some(packed)) => return Ok(Converted::Packed(packed, &tensor.data)),
        (DType::Float32, _, _) | (DType::Auto, TensorType::F32, None) => DenseType::F32,
        (DType::BFloat16, _, _) | (DType::Auto, TensorType::BF16, None) => DenseType::BF16,
        (DType::Float16, _, _) | (DType::Auto, _, None) => DenseType::F16,
    };
    Ok(Converted::Dense(ty, tensor.dense_bytes(ty)?))
}
